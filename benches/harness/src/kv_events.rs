//! Recordings of vLLM's KV-cache events, as requests.
//!
//! One line is one batch as its publisher sends it, in JSON instead of MessagePack: `[ts, [event, ...], ...]` with events like
//! `["BlockStored", [hash, ...], parent, [token, ...], block_size, ...]`, or the same with field names
//! (`{"ts": ..., "events": [{"type": "BlockStored", "block_hashes": [...], ...}]}`). Hashes are integers or texts.
//!
//! Events tell what was computed, not what was asked for. A run of new blocks after a known one is a request that had its prefix in the cache;
//! more blocks after the end of a recent request are that request going on. A prompt that was cached as a whole leaves no event, so
//! hit rates on recordings are lower than those on requests.

use serde_json::Value;
use std::collections::HashMap;

/// Blocks that follow the end of a request within this time belong to it; later ones to the next turn of the conversation.
const GOES_ON_MS: f64 = 2000.0;

/// Blocks before one, at most: a parent that leads back to itself would have no end.
const MAX_DEPTH: usize = 1 << 20;

/// A request put together from events.
pub(crate) struct Recorded {
    pub(crate) timestamp_ms: f64,
    pub(crate) chain: Vec<u64>,
}

/// Puts requests together, line by line.
#[derive(Default)]
pub(crate) struct Recorder {
    parents: HashMap<u64, Option<u64>>,
    requests: Vec<Recorded>,
    /// Last block of a request, which request, and when it came.
    ends: HashMap<u64, (usize, f64)>,
    block_tokens: Option<u64>,
    first_s: Option<f64>,
}

/// Whether this is a line of such a recording.
pub(crate) fn is_batch(line: &Value) -> bool {
    line.is_array() || line.get("events").is_some()
}

impl Recorder {
    /// One line.
    pub(crate) fn add(&mut self, line: &Value) -> Result<(), String> {
        let (time, events) = match line {
            Value::Array(fields) => (fields.first(), fields.get(1)),
            line => (line.get("ts"), line.get("events")),
        };
        let time = time.and_then(Value::as_f64).ok_or("a batch begins with its time in seconds")?;
        let events = events.and_then(Value::as_array).ok_or("a batch has a list of events")?;
        let first = *self.first_s.get_or_insert(time);
        let ms = 1e3 * (time - first);
        events.iter().try_for_each(|event| self.event(ms, event))
    }

    fn event(&mut self, ms: f64, event: &Value) -> Result<(), String> {
        let field = |at: usize, name: &str| match event {
            Value::Array(fields) => fields.get(at),
            event => event.get(name),
        };
        let kind = field(0, "type").and_then(Value::as_str).ok_or("an event begins with its type")?;
        match kind {
            "BlockStored" => {}
            // What their cache dropped, ours might have kept.
            "BlockRemoved" | "AllBlocksCleared" => return Ok(()),
            other => return Err(format!("{other:?} is not an event of a KV cache")),
        }
        let hashes =
            field(1, "block_hashes").and_then(Value::as_array).ok_or("BlockStored names its blocks")?;
        let hashes: Vec<u64> = hashes.iter().map(hash).collect::<Result<_, _>>()?;
        let parent = match field(2, "parent_block_hash") {
            None | Some(Value::Null) => None,
            Some(parent) => Some(hash(parent)?),
        };
        let size = field(4, "block_size").and_then(Value::as_u64).filter(|size| *size > 0);
        let size = size.ok_or("BlockStored tells its block size")?;
        if *self.block_tokens.get_or_insert(size) != size {
            return Err("blocks of two sizes cannot be replayed together".into());
        }
        self.stored(ms, parent, &hashes)
    }

    fn stored(&mut self, ms: f64, parent: Option<u64>, hashes: &[u64]) -> Result<(), String> {
        let Some(last) = hashes.last().copied() else { return Ok(()) };
        let mut before = parent;
        for hash in hashes {
            self.parents.insert(*hash, before);
            before = Some(*hash);
        }
        let going = parent.and_then(|parent| self.ends.get(&parent).copied());
        let number = match going {
            Some((number, then)) if ms - then <= GOES_ON_MS => {
                if let Some(parent) = parent {
                    self.ends.remove(&parent);
                }
                self.requests[number].chain.extend(hashes);
                number
            }
            _ => {
                let mut chain = self.before(parent)?;
                chain.extend(hashes);
                self.requests.push(Recorded { timestamp_ms: ms, chain });
                self.requests.len() - 1
            }
        };
        self.ends.insert(last, (number, ms));
        Ok(())
    }

    /// A block and all before it. What came before the recording began is not known: the chain begins after it.
    fn before(&self, block: Option<u64>) -> Result<Vec<u64>, String> {
        let (mut chain, mut next) = (Vec::new(), block);
        while let Some(block) = next {
            chain.push(block);
            if chain.len() > MAX_DEPTH {
                return Err("a block follows itself".into());
            }
            next = self.parents.get(&block).copied().flatten();
        }
        chain.reverse();
        Ok(chain)
    }

    /// The requests in order, and the size of their blocks.
    pub(crate) fn finish(self) -> (Vec<Recorded>, Option<u64>) {
        (self.requests, self.block_tokens)
    }
}

/// A number that stands for a hash: itself, or for texts the first bytes of an FNV-1a hash of them.
fn hash(value: &Value) -> Result<u64, String> {
    if let Some(number) = value.as_u64() {
        return Ok(number);
    }
    if let Some(number) = value.as_i64() {
        return Ok(number as u64);
    }
    let text = value.as_str().ok_or("hashes of blocks are integers or texts")?;
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
    Ok(text.bytes().fold(0xCBF2_9CE4_8422_2325, mix))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn requests(lines: &[&str]) -> Vec<(f64, Vec<u64>)> {
        let mut recorder = Recorder::default();
        for line in lines {
            let line = serde_json::from_str(line).unwrap();
            assert!(is_batch(&line));
            recorder.add(&line).unwrap();
        }
        let (requests, size) = recorder.finish();
        assert_eq!(size, Some(16));
        requests.into_iter().map(|one| (one.timestamp_ms, one.chain)).collect()
    }

    #[test]
    fn runs_become_requests() {
        let found = requests(&[
            r#"[100.0, [["BlockStored", [1, 2], null, [], 16, null, "GPU"]], 0]"#,
            r#"[100.5, [["BlockStored", [3], 2, [], 16, null, "GPU"], ["BlockRemoved", [9], "GPU"]]]"#,
            r#"{"ts": 101.0, "events": [{"type": "BlockStored", "block_hashes": [7], "parent_block_hash": 1, "block_size": 16}]}"#,
            r#"[110.0, [["BlockStored", [4], 3, [], 16], ["AllBlocksCleared"]]]"#,
        ]);
        assert_eq!(
            found,
            [(0.0, vec![1, 2, 3]), (1000.0, vec![1, 7]), (10_000.0, vec![1, 2, 3, 4])],
            "the second goes on, the third shares a block, the fourth is a new turn"
        );
    }

    #[test]
    fn what_is_wrong_is_said() {
        let error = |line: &str| Recorder::default().add(&serde_json::from_str(line).unwrap()).unwrap_err();
        assert!(error(r#"[[], []]"#).contains("seconds"));
        assert!(error(r#"[1.0, [["BlockStored", [1], null, []]]]"#).contains("block size"));
        assert!(error(r#"[1.0, [["BlockEaten", [1]]]]"#).contains("BlockEaten"));
        assert!(error(r#"[1.0, [["BlockStored", [1.5], null, [], 16]]]"#).contains("integers"));
        let circle = r#"[1.0, [["BlockStored", [1], 2, [], 16], ["BlockStored", [2], 1, [], 16], ["BlockStored", [5], 2, [], 16]]]"#;
        let mut recorder = Recorder::default();
        let line = serde_json::from_str(circle).unwrap();
        // Joined into one request, or refused: never without end.
        let _ = recorder.add(&line);
    }
}
