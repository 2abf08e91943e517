//! Request traces: for every request its tokens and the ids of its chain of blocks, each naming the whole prefix up to its block.
//! Kept as runs of consecutive ids, so that a hundred million references fit a few hundred MiB.
//!
//! JSON lines, plain or gzipped, in the order of replay: `timestamp` (ms), `input_length` (tokens), `output_length`, and either
//! `hash_ids` (a list, as in Mooncake's releases) or `runs` (`[[first, count], …]`). Or recordings of events: see `kv_events`.

use crate::kv_events::{self, Recorder};
use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use serde::Deserialize;
use serde_json::Value;
use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Block sizes that are looked for where a trace does not say its own.
const COMMON_BLOCK_TOKENS: [u64; 9] = [16, 32, 64, 128, 256, 512, 1024, 2048, 8];

/// Ids below this many times the references are used as they are; others are numbered anew.
const SPARSE: u64 = 8;

/// Longest prompt.
const MAX_INPUT_TOKENS: u64 = 1 << 32;

/// Blocks asked for in all: what fits the optimum's tables.
const MAX_REFERENCES: u64 = 1 << 31;

/// What gzip files begin with.
const GZIP_MAGIC: [u8; 2] = [0x1F, 0x8B];

/// A trace that cannot be used.
#[derive(Debug, Error)]
pub enum TraceError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A line is not a request.
    #[error(
        "{path}, line {line}: {what}. A request is a JSON object with input_length and either hash_ids or runs"
    )]
    Line {
        /// Of the file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// There are no requests.
    #[error("{0} has no requests")]
    Empty(PathBuf),
    /// The block size cannot be told from the lengths.
    #[error("{0}: the tokens of a block cannot be told from the lengths; give --block-tokens")]
    BlockTokens(PathBuf),
    /// More than ids have room for.
    #[error("{0} has more than 4 billion different blocks")]
    TooLarge(PathBuf),
}

/// One request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// When it came, ms.
    pub timestamp_ms: i64,
    /// Tokens of its prompt.
    pub input_tokens: u64,
    /// Tokens of its answer.
    pub output_tokens: u64,
    /// Its runs: first, and one past the last.
    runs: (u32, u32),
}

/// Requests in order.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// Of the file or the generator.
    pub name: String,
    /// Tokens of a block.
    pub block_tokens: u64,
    requests: Vec<Request>,
    /// First id and count.
    runs: Vec<(u32, u32)>,
    references: u64,
    /// One more than the largest id.
    ids: u32,
    unique: u64,
}

#[derive(Deserialize)]
struct Line {
    #[serde(default)]
    timestamp: f64,
    input_length: u64,
    #[serde(default)]
    output_length: u64,
    #[serde(default)]
    hash_ids: Vec<u64>,
    #[serde(default)]
    runs: Vec<(u64, u64)>,
}

impl Trace {
    /// An empty trace, to be filled.
    pub fn new(name: impl Into<String>, block_tokens: u64) -> Self {
        Self { name: name.into(), block_tokens, ..Self::default() }
    }

    /// Reads a file. Without `block_tokens` the size of blocks is told from the lengths.
    ///
    /// # Errors
    /// When the file is not such a trace, with the line.
    pub fn read(path: &Path, block_tokens: Option<u64>) -> Result<Self, TraceError> {
        let failed = |source| TraceError::Read { path: path.to_owned(), source };
        let lines = open(path).map_err(failed)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let name = name.trim_end_matches(".gz").trim_end_matches(".jsonl");
        let (mut raw, mut recorder) = (Raw::default(), None);
        for (number, line) in (1..).zip(lines.lines()) {
            let line = line.map_err(failed)?;
            if line.trim().is_empty() {
                continue;
            }
            let wrong = |what: String| TraceError::Line { path: path.to_owned(), line: number, what };
            // The first line says what they all are.
            if raw.requests.is_empty() && recorder.is_none() && line.trim_start().starts_with(['[', '{']) {
                let value: Value = serde_json::from_str(&line).map_err(|error| wrong(error.to_string()))?;
                recorder = kv_events::is_batch(&value).then(Recorder::default);
            }
            if let Some(recorder) = &mut recorder {
                let value = serde_json::from_str(&line).map_err(|error| wrong(error.to_string()))?;
                recorder.add(&value).map_err(wrong)?;
                continue;
            }
            let parsed: Line = serde_json::from_str(&line).map_err(|error| wrong(error.to_string()))?;
            raw.add(parsed).map_err(wrong)?;
        }
        let mut block_tokens = block_tokens;
        if let Some(recorder) = recorder {
            block_tokens = raw.recorded(recorder).map_err(|what| {
                // A recording as a whole.
                TraceError::Line { path: path.to_owned(), line: 1, what }
            })?;
        }
        if raw.requests.is_empty() {
            return Err(TraceError::Empty(path.to_owned()));
        }
        let block_tokens = match block_tokens {
            Some(tokens) => tokens,
            None => raw.block_tokens().ok_or_else(|| TraceError::BlockTokens(path.to_owned()))?,
        };
        raw.finish(name, block_tokens).ok_or_else(|| TraceError::TooLarge(path.to_owned()))
    }

    /// Writes it as JSON lines with runs; gzipped if the name ends in `.gz`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let file = BufWriter::new(File::create(path)?);
        if path.extension().is_some_and(|extension| extension == "gz") {
            let mut gzip = GzEncoder::new(file, Compression::default());
            self.write_lines(&mut gzip)?;
            return gzip.finish()?.flush();
        }
        let mut file = file;
        self.write_lines(&mut file)?;
        file.flush()
    }

    fn write_lines(&self, out: &mut impl Write) -> std::io::Result<()> {
        for request in &self.requests {
            let runs = &self.runs[request.runs.0 as usize..request.runs.1 as usize];
            let line = serde_json::json!({
                "timestamp": request.timestamp_ms,
                "input_length": request.input_tokens,
                "output_length": request.output_tokens,
                "runs": runs,
            });
            writeln!(out, "{line}")?;
        }
        Ok(())
    }

    /// Adds a request with this chain.
    pub fn push(&mut self, timestamp_ms: i64, (input_tokens, output_tokens): (u64, u64), chain: &[u32]) {
        let first = self.runs.len() as u32;
        for id in chain {
            match self.runs[first as usize..].last_mut() {
                Some((start, count)) if *start + *count == *id => *count += 1,
                _ => self.runs.push((*id, 1)),
            }
            self.ids = self.ids.max(*id + 1);
        }
        self.references += chain.len() as u64;
        let runs = (first, self.runs.len() as u32);
        self.requests.push(Request { timestamp_ms, input_tokens, output_tokens, runs });
    }

    /// Counts what is different. To be called once all is pushed.
    pub fn seal(&mut self) {
        let mut seen = vec![false; self.ids as usize];
        self.runs.iter().for_each(|(first, count)| {
            seen[*first as usize..(*first + *count) as usize].fill(true);
        });
        self.unique = seen.into_iter().filter(|seen| *seen).count() as u64;
    }

    /// All of them.
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// The blocks of a request, from the first on.
    pub fn chain(&self, request: &Request) -> impl DoubleEndedIterator<Item = u32> + '_ {
        let runs = &self.runs[request.runs.0 as usize..request.runs.1 as usize];
        runs.iter().flat_map(|(first, count)| *first..*first + *count)
    }

    /// How many blocks that is.
    pub fn chain_len(&self, request: &Request) -> usize {
        let runs = &self.runs[request.runs.0 as usize..request.runs.1 as usize];
        runs.iter().map(|(_, count)| *count as usize).sum()
    }

    /// One more than the largest id.
    pub fn ids(&self) -> usize {
        self.ids as usize
    }

    /// Blocks that were asked for, in all.
    pub fn references(&self) -> u64 {
        self.references
    }

    /// Different blocks.
    pub fn unique(&self) -> u64 {
        self.unique
    }

    /// Tokens of all prompts.
    pub fn tokens(&self) -> u64 {
        self.requests.iter().map(|request| request.input_tokens).sum()
    }

    /// The same requests at other times, as many as there are of them.
    #[must_use]
    pub fn arriving(&self, times_ms: &[i64]) -> Self {
        let mut trace = self.head(times_ms.len());
        trace.requests.iter_mut().zip(times_ms).for_each(|(request, time)| request.timestamp_ms = *time);
        trace
    }

    /// The first `count` requests.
    #[must_use]
    pub fn head(&self, count: usize) -> Self {
        let mut head = Self::new(self.name.clone(), self.block_tokens);
        for request in self.requests.iter().take(count) {
            let chain: Vec<u32> = self.chain(request).collect();
            head.push(request.timestamp_ms, (request.input_tokens, request.output_tokens), &chain);
        }
        head.seal();
        head
    }

    /// From the first request after the `skipped` ones to the last.
    pub fn duration_ms(&self, skipped: usize) -> u64 {
        let times = self.requests.iter().skip(skipped).map(|request| request.timestamp_ms);
        let (first, last) = (times.clone().min().unwrap_or(0), times.max().unwrap_or(0));
        last.saturating_sub(first).max(0) as u64
    }
}

/// A trace with its ids as they are in the file.
#[derive(Default)]
struct Raw {
    requests: Vec<Request>,
    runs: Vec<(u64, u64)>,
    references: u64,
    largest: u64,
}

/// Its lines, unzipped if need be.
fn open(path: &Path) -> std::io::Result<BufReader<Box<dyn Read>>> {
    let mut file = BufReader::new(File::open(path)?);
    let gzipped = file.fill_buf()?.starts_with(&GZIP_MAGIC);
    let text: Box<dyn Read> = if gzipped { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
    Ok(BufReader::new(text))
}

/// All of a small file.
pub(crate) fn text(path: &Path) -> Result<String, TraceError> {
    let failed = |source| TraceError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    open(path).and_then(|mut file| file.read_to_string(&mut text)).map_err(failed)?;
    Ok(text)
}

impl Raw {
    /// All requests of a recording; returns the size of its blocks.
    fn recorded(&mut self, recorder: Recorder) -> Result<Option<u64>, String> {
        let (requests, block_tokens) = recorder.finish();
        for request in requests {
            self.add(Line {
                timestamp: request.timestamp_ms,
                input_length: request.chain.len() as u64 * block_tokens.unwrap_or(1),
                output_length: 0,
                hash_ids: request.chain,
                runs: Vec::new(),
            })?;
        }
        Ok(block_tokens)
    }

    fn add(&mut self, line: Line) -> Result<(), String> {
        if !line.hash_ids.is_empty() && !line.runs.is_empty() {
            return Err("it has hash_ids and runs".into());
        }
        let first = self.runs.len();
        for id in line.hash_ids {
            match self.runs[first..].last_mut() {
                Some((start, count)) if start.checked_add(*count) == Some(id) => *count += 1,
                _ => self.runs.push((id, 1)),
            }
        }
        for (start, count) in line.runs {
            start.checked_add(count.saturating_sub(1)).ok_or("a run ends beyond all ids")?;
            if count > 0 {
                self.runs.push((start, count));
            }
        }
        let blocks = self.runs[first..].iter().try_fold(0u64, |sum, (_, count)| sum.checked_add(*count));
        if line.input_length > MAX_INPUT_TOKENS || blocks.is_none_or(|blocks| blocks > line.input_length) {
            return Err("it has more blocks than tokens, or more tokens than any prompt".into());
        }
        for (start, count) in &self.runs[first..] {
            self.references += count;
            if self.references > MAX_REFERENCES {
                return Err(format!("the trace asks for more than {MAX_REFERENCES} blocks"));
            }
            self.largest = self.largest.max(start + (count - 1));
        }
        let index = |at: usize| u32::try_from(at).map_err(|_| "the trace has too many runs".to_owned());
        self.requests.push(Request {
            timestamp_ms: line.timestamp as i64,
            input_tokens: line.input_length,
            output_tokens: line.output_length,
            runs: (index(first)?, index(self.runs.len())?),
        });
        Ok(())
    }

    /// The only common size with which nearly every request has as many blocks as its tokens fill, counting the last part or not.
    fn block_tokens(&self) -> Option<u64> {
        let fits = |tokens: u64| {
            let right = self.requests.iter().filter(|request| {
                let runs = &self.runs[request.runs.0 as usize..request.runs.1 as usize];
                let blocks: u64 = runs.iter().map(|(_, count)| count).sum();
                [request.input_tokens / tokens, request.input_tokens.div_ceil(tokens)].contains(&blocks)
            });
            right.count() * 100 >= self.requests.len() * 95
        };
        let mut sizes = COMMON_BLOCK_TOKENS.into_iter().filter(|tokens| fits(*tokens));
        let size = sizes.next()?;
        sizes.next().is_none().then_some(size)
    }

    fn finish(self, name: &str, block_tokens: u64) -> Option<Trace> {
        let mut trace = Trace::new(name, block_tokens);
        trace.references = self.references;
        if self.largest < SPARSE.saturating_mul(self.references).min(u64::from(u32::MAX) - 1) {
            trace.runs = self.runs.iter().map(|(first, count)| (*first as u32, *count as u32)).collect();
            trace.requests = self.requests;
            trace.ids = self.largest as u32 + 1;
            trace.seal();
            return Some(trace);
        }
        // Hashes, say: numbered as they come.
        let mut numbers: HashMap<u64, u32> = HashMap::new();
        for request in &self.requests {
            let runs = &self.runs[request.runs.0 as usize..request.runs.1 as usize];
            let mut chain = Vec::new();
            for id in runs.iter().flat_map(|(first, count)| (0..*count).map(move |i| first + i)) {
                let next = u32::try_from(numbers.len()).ok()?;
                chain.push(*numbers.entry(id).or_insert(next));
            }
            trace.push(request.timestamp_ms, (request.input_tokens, request.output_tokens), &chain);
        }
        trace.references = self.references;
        trace.seal();
        Some(trace)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn read(text: &str, block_tokens: Option<u64>) -> Result<Trace, TraceError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("some.jsonl.gz");
        let mut gzip = GzEncoder::new(File::create(&path).unwrap(), flate2::Compression::fast());
        gzip.write_all(text.as_bytes()).unwrap();
        gzip.finish().unwrap();
        Trace::read(&path, block_tokens)
    }

    fn chains(trace: &Trace) -> Vec<Vec<u32>> {
        trace.requests().iter().map(|request| trace.chain(request).collect()).collect()
    }

    #[test]
    fn lists_and_runs_are_the_same() {
        let lists = "{\"timestamp\": 0, \"input_length\": 80, \"hash_ids\": [0, 1, 2, 7, 8]}\n\n{\"timestamp\": 5, \"input_length\": 33, \"output_length\": 4, \"hash_ids\": [0, 1]}\n";
        let runs = "{\"input_length\": 80, \"runs\": [[0, 3], [7, 2]]}\n{\"timestamp\": 5, \"input_length\": 33, \"output_length\": 4, \"runs\": [[0, 2]]}\n";
        for text in [lists, runs] {
            let trace = read(text, None).unwrap();
            assert_eq!((trace.name.as_str(), trace.block_tokens), ("some", 16));
            assert_eq!(chains(&trace), [vec![0, 1, 2, 7, 8], vec![0, 1]]);
            assert_eq!(
                (trace.references(), trace.unique(), trace.tokens(), trace.duration_ms(0)),
                (7, 5, 113, 5)
            );
            assert_eq!(chains(&trace.head(1)).len(), 1);
        }
    }

    #[test]
    fn hashes_get_numbers() {
        let text = "{\"input_length\": 32, \"hash_ids\": [18446744073709551615, 9]}\n{\"input_length\": 48, \"hash_ids\": [18446744073709551615, 9, 77]}\n";
        let trace = read(text, Some(16)).unwrap();
        assert_eq!(chains(&trace), [vec![0, 1], vec![0, 1, 2]]);
        assert_eq!(trace.unique(), 3);
    }

    #[test]
    fn what_is_no_trace_says_where() {
        let error = |text: &str| read(text, Some(16)).unwrap_err().to_string();
        assert!(error("{\"input_length\": 1, \"hash_ids\": []}\nnonsense\n").contains("line 2"));
        assert!(error("{\"hash_ids\": [1]}\n").contains("input_length"));
        assert!(error("\n").contains("no requests"));
        assert!(
            error("{\"input_length\": 1, \"hash_ids\": [1], \"runs\": [[1, 1]]}")
                .contains("hash_ids and runs")
        );
        assert!(error("{\"input_length\": 9, \"runs\": [[18446744073709551615, 2]]}").contains("beyond"));
        assert!(
            error("{\"input_length\": 9, \"runs\": [[0, 4000000000]]}").contains("more blocks than tokens")
        );
        let twice = "{\"input_length\": 9, \"runs\": [[0, 9223372036854775808], [0, 9223372036854775808]]}";
        assert!(error(twice).contains("more blocks than tokens"));
        let unclear = read("{\"input_length\": 5, \"hash_ids\": [1, 2, 3]}\n", None).unwrap_err().to_string();
        assert!(unclear.contains("--block-tokens"), "{unclear}");
        assert!(
            Trace::read(Path::new("/nowhere/at/all"), None).unwrap_err().to_string().contains("/nowhere")
        );
    }
}
