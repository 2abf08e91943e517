//! Made-up traffic for those who have no trace: seeded, so that two runs see the same requests. It imitates the *shapes* of traffic
//! (what is shared, how long, how soon it comes again), not any measured distribution.

use crate::trace::Trace;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::fmt;
use std::str::FromStr;

/// Tokens of a block in all of them.
pub const BLOCK_TOKENS: u64 = 16;

/// Mean time between two requests.
const PACE_MS: i64 = 400;

/// A kind of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Workload {
    /// Conversations of several turns behind a few system prompts; each turn repeats all before it.
    Chat,
    /// Questions about documents, some of which are asked about much more often than others.
    Rag,
    /// Agents: long sessions in which every step appends a little to a large context, from which at times a part is cut.
    Agent,
    /// One long system prompt, and short questions that have nothing else in common.
    SharedPrompt,
}

impl Workload {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Chat, Self::Rag, Self::Agent, Self::SharedPrompt];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Rag => "rag",
            Self::Agent => "agent",
            Self::SharedPrompt => "shared-prompt",
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Workload {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| format!("no workload {name:?}; there are chat, rag, agent, shared-prompt"))
    }
}

/// Makes `requests` requests. The same arguments make the same trace.
pub fn generate(kind: &Workload, requests: usize, seed: u64) -> Trace {
    let mut maker = Maker {
        rng: StdRng::seed_from_u64(seed),
        trace: Trace::new(format!("{kind}-{seed}"), BLOCK_TOKENS),
        next_id: 0,
        now_ms: 0,
    };
    match kind {
        Workload::Chat => maker.sessions(requests, 8, (40, 120), (1, 12), 0.0),
        Workload::Agent => maker.sessions(requests, 3, (150, 400), (10, 60), 0.05),
        Workload::Rag => maker.documents(requests),
        Workload::SharedPrompt => maker.shared_prompt(requests),
    }
    maker.trace.seal();
    maker.trace
}

struct Maker {
    rng: StdRng,
    trace: Trace,
    next_id: u32,
    now_ms: i64,
}

impl Maker {
    /// So many new blocks.
    fn fresh(&mut self, blocks: u32) -> Vec<u32> {
        let first = self.next_id;
        self.next_id += blocks;
        (first..self.next_id).collect()
    }

    fn ask(&mut self, chain: &[u32], answer_tokens: u64) {
        self.now_ms += self.rng.random_range(0..2 * PACE_MS);
        let input = chain.len() as u64 * BLOCK_TOKENS;
        self.trace.push(self.now_ms, (input, answer_tokens), chain);
    }

    /// Sessions that take turns, behind `prompts` system prompts of so many blocks; `cut` of the turns drop a part of the context.
    fn sessions(&mut self, requests: usize, prompts: usize, prompt: (u32, u32), turns: (u32, u32), cut: f64) {
        let prompts: Vec<Vec<u32>> = (0..prompts)
            .map(|_| {
                let blocks = self.rng.random_range(prompt.0..prompt.1);
                self.fresh(blocks)
            })
            .collect();
        // Chain, turns that remain.
        let mut open: Vec<(Vec<u32>, u32)> = Vec::new();
        for _ in 0..requests {
            if open.is_empty() || self.rng.random_bool(0.15) {
                let turns = self.rng.random_range(turns.0..=turns.1);
                open.push((prompts[self.rng.random_range(0..prompts.len())].clone(), turns));
            }
            // The latest sessions are the likeliest to go on.
            let back = (self.rng.random::<f64>().powi(2) * open.len() as f64) as usize;
            let at = open.len() - 1 - back.min(open.len() - 1);
            let (mut chain, turns) = open.swap_remove(at);
            if self.rng.random_bool(cut) {
                let kept = self.rng.random_range(chain.len() / 4..=chain.len());
                chain.truncate(kept.max(1));
            }
            let question = self.rng.random_range(1..12);
            let question = self.fresh(question);
            chain.extend(question);
            let answer = self.rng.random_range(1..24u32);
            self.ask(&chain, u64::from(answer) * BLOCK_TOKENS);
            let answer = self.fresh(answer);
            chain.extend(answer);
            if turns > 1 {
                open.push((chain, turns - 1));
            }
        }
    }

    fn documents(&mut self, requests: usize) {
        let prompt = self.fresh(20);
        let mut documents: Vec<Vec<u32>> = Vec::new();
        for _ in 0..requests {
            // A few are asked about all the time, most once.
            let rank = (self.rng.random::<f64>().powi(4) * (requests as f64 / 3.0).max(1.0)) as usize;
            while documents.len() <= rank {
                let blocks = self.rng.random_range(60..500);
                let document = self.fresh(blocks);
                documents.push(document);
            }
            let question = self.fresh(3);
            let chain: Vec<u32> = prompt.iter().chain(&documents[rank]).chain(&question).copied().collect();
            self.ask(&chain, 128);
        }
    }

    fn shared_prompt(&mut self, requests: usize) {
        let prompt = self.fresh(256);
        for _ in 0..requests {
            let question = self.rng.random_range(2..40);
            let question = self.fresh(question);
            let chain: Vec<u32> = prompt.iter().chain(&question).copied().collect();
            self.ask(&chain, 256);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hit_rate::ceiling;

    #[test]
    fn seeds_decide_and_reuse_is_there() {
        for kind in Workload::ALL {
            let (a, b, c) = (generate(&kind, 500, 1), generate(&kind, 500, 1), generate(&kind, 500, 2));
            let all = |trace: &Trace| -> Vec<Vec<u32>> {
                trace.requests().iter().map(|request| trace.chain(request).collect()).collect()
            };
            assert_eq!(all(&a), all(&b), "{kind}");
            assert_ne!(all(&a), all(&c), "{kind}");
            let ceiling = ceiling(&a, 0.0);
            let share = ceiling.hit_tokens as f64 / ceiling.tokens as f64;
            assert!((0.2..0.99).contains(&share), "{kind}: {share}");
            // An id has one predecessor, as in any trace of prefixes.
            let mut before = std::collections::HashMap::new();
            for chain in all(&a) {
                for pair in chain.windows(2) {
                    assert_eq!(*before.entry(pair[1]).or_insert(pair[0]), pair[0], "{kind}");
                }
            }
        }
    }
}
