//! Replays of a trace at many capacities by many policies, side by side.

use crate::opt::Optimum;
use crate::trace::{Request, Trace};
use cairn_core::PolicyKind;
use cairn_core::replay::{Replay, SecondTier, TwoTiers};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

/// Milliseconds of a day.
const DAY_MS: f64 = 86_400_000.0;

/// What decides who leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    /// A policy of the server.
    Policy(PolicyKind),
    /// Knows the future.
    Optimum,
}

impl Contender {
    /// All policies, and the optimum.
    pub fn all() -> Vec<Self> {
        PolicyKind::ALL.into_iter().map(Self::Policy).chain([Self::Optimum]).collect()
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Policy(kind) => kind.name(),
            Self::Optimum => "opt",
        })
    }
}

impl FromStr for Contender {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "opt" => Ok(Self::Optimum),
            name => name.parse().map(Self::Policy).map_err(|error| format!("{error}, opt, all")),
        }
    }
}

/// How large a cache is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Capacity {
    /// A share of the trace's different blocks.
    Share(f64),
    /// So many blocks.
    Blocks(u64),
    /// So many bytes.
    Bytes(u64),
}

impl FromStr for Capacity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no capacity: give a share (5%), blocks (2000) or bytes (16GiB)");
        if let Some(percent) = text.strip_suffix('%') {
            let percent: f64 = percent.parse().map_err(|_| wrong())?;
            return match percent > 0.0 && percent <= 100.0 {
                true => Ok(Self::Share(percent / 100.0)),
                false => Err(wrong()),
            };
        }
        for (unit, shift) in [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40)] {
            if let Some(number) = text.strip_suffix(unit) {
                let number: f64 = number.trim().parse().map_err(|_| wrong())?;
                let bytes = number * (1u64 << shift) as f64;
                return if bytes >= 1.0 { Ok(Self::Bytes(bytes as u64)) } else { Err(wrong()) };
            }
        }
        match text.parse() {
            Ok(0) | Err(_) => Err(wrong()),
            Ok(blocks) => Ok(Self::Blocks(blocks)),
        }
    }
}

impl Capacity {
    /// In blocks of this trace. `token_bytes` is what one token's state takes.
    ///
    /// # Errors
    /// When it is in bytes and nobody said what a token takes.
    pub fn blocks(self, trace: &Trace, token_bytes: Option<u64>) -> Result<u64, String> {
        match self {
            Self::Share(share) => Ok(((trace.unique() as f64 * share) as u64).max(1)),
            Self::Blocks(blocks) => Ok(blocks),
            Self::Bytes(bytes) => match token_bytes {
                Some(token_bytes) => Ok((bytes / (token_bytes * trace.block_tokens).max(1)).max(1)),
                None => Err(
                    "a capacity in bytes needs to know what a token takes: give --token-bytes or --geometry"
                        .into(),
                ),
            },
        }
    }
}

/// Capacities from a thousandth of the different blocks to all of them, evenly spaced by ratio.
pub fn sweep(points: u32) -> Vec<Capacity> {
    let last = f64::from(points.max(2) - 1);
    (0..points.max(2)).map(|i| Capacity::Share(10f64.powf(-3.0 + 3.0 * f64::from(i) / last))).collect()
}

/// A second tier below the first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Below {
    /// What it does with what the first has.
    pub kind: SecondTier,
    /// Its size.
    pub capacity: Capacity,
    /// Blocks are written from this use on.
    pub admit: u32,
    /// What leaves it; as in the first tier if not said.
    pub policy: Option<PolicyKind>,
}

/// What to replay.
#[derive(Clone, Debug)]
pub struct Plan {
    /// By whom.
    pub contenders: Vec<Contender>,
    /// At which sizes.
    pub capacities: Vec<Capacity>,
    /// With a second tier; the optimum has none.
    pub below: Option<Below>,
    /// Share of the requests that fill the caches and are not counted.
    pub warm_up: f64,
    /// What one token's state takes.
    pub token_bytes: Option<u64>,
    /// Bytes that the drive of the second tier can take in its life.
    pub endurance_bytes: Option<f64>,
}

/// Hits that were counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Hits {
    /// Requests.
    pub requests: u64,
    /// Tokens of their prompts.
    pub tokens: u64,
    /// Of them, in blocks that were resident.
    pub hit_tokens: u64,
    /// Blocks asked for.
    pub blocks: u64,
    /// Of them, resident.
    pub hit_blocks: u64,
    /// Mean over the requests of the share of tokens that were resident.
    pub request_mean: f64,
}

/// What a second tier did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct BelowRow {
    /// What it does with what the first has.
    pub kind: String,
    /// What leaves it; absent if as in the first tier.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    /// Blocks are written from this use on.
    pub admit: u32,
    /// Its size in blocks.
    pub capacity_blocks: u64,
    /// Tokens that it brought.
    pub hit_tokens: u64,
    /// Blocks read.
    pub reads: u64,
    /// Blocks written.
    pub writes: u64,
    /// Tokens written for each token that the tier brought.
    pub written_per_hit: Option<f64>,
    /// How long a drive lasts at the trace's pace.
    pub life_days: Option<f64>,
}

/// One replay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Of the trace.
    pub trace: String,
    /// Who decided.
    pub policy: String,
    /// Size of the (first) tier in blocks.
    pub capacity_blocks: u64,
    /// The same as a share of the different blocks.
    pub capacity_share: f64,
    /// In both tiers together.
    pub hits: Hits,
    /// Blocks that came in; not counted in two tiers.
    pub inserted: Option<u64>,
    /// Blocks that had to leave; not counted in two tiers, nor for the optimum.
    pub evicted: Option<u64>,
    /// Hit tokens as a share of the optimum's at this size, if that was replayed. The optimum is of block hits over the whole trace: with a
    /// warm-up, or where last blocks are partial, a policy can come out above it.
    pub share_of_optimum: Option<f64>,
    /// The same of a cache without bounds.
    pub share_of_ceiling: f64,
    /// The second tier.
    pub below: Option<BelowRow>,
}

/// All of one trace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Name of the trace.
    pub trace: String,
    /// Tokens of a block.
    pub block_tokens: u64,
    /// Requests.
    pub requests: u64,
    /// Blocks asked for.
    pub references: u64,
    /// Different blocks.
    pub unique: u64,
    /// From the first request to the last.
    pub duration_ms: u64,
    /// What a cache without bounds hits.
    pub ceiling: Hits,
    /// In the order of capacities, then of contenders.
    pub rows: Vec<Row>,
    /// False if it was interrupted.
    pub complete: bool,
}

/// Hands the chain of every request to `hits`, one after the other.
pub(crate) fn prefix_hits<'a>(
    trace: &'a Trace,
    mut hits: impl FnMut(&[u64]) -> usize + 'a,
) -> impl Iterator<Item = usize> + 'a {
    let mut chain = Vec::new();
    trace.requests().iter().map(move |request| {
        chain.clear();
        chain.extend(trace.chain(request).map(u64::from));
        hits(&chain)
    })
}

#[derive(Default)]
struct Counter {
    hits: Hits,
    shares: f64,
}

impl Counter {
    /// Tokens of `blocks` first blocks of a request.
    fn tokens(trace: &Trace, request: &Request, blocks: usize) -> u64 {
        (blocks as u64 * trace.block_tokens).min(request.input_tokens)
    }

    fn count(&mut self, trace: &Trace, request: &Request, hit_blocks: usize) {
        let hit_tokens = Self::tokens(trace, request, hit_blocks);
        self.hits.requests += 1;
        self.hits.tokens += request.input_tokens;
        self.hits.hit_tokens += hit_tokens;
        self.hits.blocks += trace.chain_len(request) as u64;
        self.hits.hit_blocks += hit_blocks as u64;
        self.shares += hit_tokens as f64 / request.input_tokens.max(1) as f64;
    }

    fn finish(self) -> Hits {
        Hits { request_mean: self.shares / self.hits.requests.max(1) as f64, ..self.hits }
    }
}

fn warm(trace: &Trace, warm_up: f64) -> usize {
    (trace.requests().len() as f64 * warm_up.clamp(0.0, 1.0)) as usize
}

/// Counts all requests after the warm-up; stops early when told to.
fn count(trace: &Trace, warm_up: f64, stop: &AtomicBool, hits: impl FnMut(&[u64]) -> usize) -> Option<Hits> {
    let (mut counter, warm) = (Counter::default(), warm(trace, warm_up));
    for (number, hits) in prefix_hits(trace, hits).enumerate() {
        if number >= warm {
            counter.count(trace, &trace.requests()[number], hits);
        }
        if number % 1024 == 0 && stop.load(Ordering::Relaxed) {
            return None;
        }
    }
    Some(counter.finish())
}

/// What a cache without bounds hits.
pub fn ceiling(trace: &Trace, warm_up: f64) -> Hits {
    let mut seen = vec![false; trace.ids()];
    let hits = |chain: &[u64]| {
        let hits = chain.iter().take_while(|id| seen[**id as usize]).count();
        chain.iter().for_each(|id| seen[*id as usize] = true);
        hits
    };
    count(trace, warm_up, &AtomicBool::new(false), hits).unwrap_or_default()
}

struct Replayed {
    hits: Hits,
    inserted: Option<u64>,
    evicted: Option<u64>,
    below: Option<BelowRow>,
}

/// Two counters as they were when counting began.
#[derive(Default)]
struct Since {
    warm: usize,
    number: usize,
    start: [u64; 2],
}

impl Since {
    /// A request begins, with the counters like this.
    fn request(&mut self, now: [u64; 2]) {
        if self.number == self.warm {
            self.start = now;
        }
        self.number += 1;
    }

    fn counted(&self, now: [u64; 2]) -> [u64; 2] {
        [now[0] - self.start[0], now[1] - self.start[1]]
    }
}

fn replay(
    trace: &Trace,
    plan: &Plan,
    optimum: Option<&Optimum<'_>>,
    (contender, capacity): (Contender, u64),
    stop: &AtomicBool,
) -> Option<Replayed> {
    let mut since = Since { warm: warm(trace, plan.warm_up), ..Since::default() };
    let Contender::Policy(kind) = contender else {
        let mut replay = optimum?.replay(capacity as usize);
        let hits = count(trace, plan.warm_up, stop, |chain| {
            since.request([replay.inserted, 0]);
            replay.request(chain)
        })?;
        let [inserted, _] = since.counted([replay.inserted, 0]);
        return Some(Replayed { hits, inserted: Some(inserted), evicted: None, below: None });
    };
    if let Some(below) = plan.below {
        return replay_tiers(trace, plan, below, (kind, capacity), stop);
    }
    let mut cache = Replay::new(kind, capacity as usize);
    let (mut left, mut evicted) = (Vec::new(), 0);
    let hits = count(trace, plan.warm_up, stop, |chain| {
        since.request([evicted + cache.len() as u64, evicted]);
        left.clear();
        let hits = cache.request(chain, &mut left);
        evicted += left.len() as u64;
        hits
    })?;
    let [inserted, evicted] = since.counted([evicted + cache.len() as u64, evicted]);
    Some(Replayed { hits, inserted: Some(inserted), evicted: Some(evicted), below: None })
}

fn replay_tiers(
    trace: &Trace,
    plan: &Plan,
    below: Below,
    (kind, capacity): (PolicyKind, u64),
    stop: &AtomicBool,
) -> Option<Replayed> {
    let second_blocks = below.capacity.blocks(trace, plan.token_bytes).ok()?;
    let capacities = [capacity as usize, second_blocks as usize];
    let mut tiers = TwoTiers::new(below.kind, [kind, below.policy.unwrap_or(kind)], capacities, below.admit);
    let warm = warm(trace, plan.warm_up);
    let mut since = Since { warm, ..Since::default() };
    let mut first = Counter::default();
    let both = count(trace, plan.warm_up, stop, |chain| {
        let number = since.number;
        since.request([tiers.reads, tiers.writes]);
        let [upper, both] = tiers.request(chain);
        if number >= warm {
            first.count(trace, &trace.requests()[number], upper);
        }
        both
    })?;
    let [reads, writes] = since.counted([tiers.reads, tiers.writes]);
    let hit_tokens = both.hit_tokens - first.finish().hit_tokens;
    let written_tokens = (writes * trace.block_tokens) as f64;
    let days = trace.duration_ms(warm) as f64 / DAY_MS;
    let bytes_a_day =
        plan.token_bytes.filter(|_| days > 0.0).map(|bytes| written_tokens * bytes as f64 / days);
    let life_days = bytes_a_day.filter(|bytes| *bytes > 0.0).zip(plan.endurance_bytes);
    let row = BelowRow {
        kind: format!("{:?}", below.kind),
        policy: below.policy.map(|policy| policy.name().into()),
        admit: below.admit,
        capacity_blocks: second_blocks,
        hit_tokens,
        reads,
        writes,
        written_per_hit: (hit_tokens > 0).then(|| written_tokens / hit_tokens as f64),
        life_days: life_days.map(|(bytes, endurance)| endurance / bytes),
    };
    Some(Replayed { hits: both, inserted: None, evicted: None, below: Some(row) })
}

/// Replays everything of a plan, on all cores. `done` hears of each replay that ended.
///
/// # Errors
/// When a capacity is in bytes and nobody said what a token takes.
pub fn run(trace: &Trace, plan: &Plan, stop: &AtomicBool, done: impl Fn() + Sync) -> Result<Outcome, String> {
    let capacities = plan.capacities.iter().map(|capacity| capacity.blocks(trace, plan.token_bytes));
    let mut capacities = capacities.collect::<Result<Vec<u64>, _>>()?;
    capacities.sort_unstable();
    capacities.dedup();
    if let Some(below) = plan.below {
        below.capacity.blocks(trace, plan.token_bytes)?;
    }
    let contenders = plan.contenders.iter().copied();
    let contenders = contenders.filter(|one| plan.below.is_none() || *one != Contender::Optimum);
    let jobs: Vec<(u64, Contender)> = {
        let contenders: Vec<_> = contenders.collect();
        let all = capacities.iter().flat_map(|capacity| contenders.iter().map(|one| (*capacity, *one)));
        all.collect()
    };
    let wanted = jobs.iter().any(|(_, one)| *one == Contender::Optimum);
    let optimum = (wanted && !stop.load(Ordering::Relaxed)).then(|| Optimum::new(trace));
    let replayed: Vec<Option<Replayed>> = jobs
        .par_iter()
        .map(|(capacity, contender)| {
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            let replayed = replay(trace, plan, optimum.as_ref(), (*contender, *capacity), stop);
            done();
            replayed
        })
        .collect();
    let ceiling = ceiling(trace, plan.warm_up);
    let complete = replayed.iter().all(Option::is_some);
    let best = |capacity: u64| {
        let mut here = jobs.iter().zip(&replayed);
        let found = here.find(|((at, one), _)| (*at, *one) == (capacity, Contender::Optimum))?.1.as_ref();
        Some(found?.hits.hit_tokens)
    };
    let share = |part: u64, whole: u64| part as f64 / whole.max(1) as f64;
    let row = |((capacity, contender), replayed): (&(u64, Contender), &Option<Replayed>)| {
        let Replayed { hits, inserted, evicted, below } = replayed.as_ref()?;
        Some(Row {
            trace: trace.name.clone(),
            policy: contender.to_string(),
            capacity_blocks: *capacity,
            capacity_share: share(*capacity, trace.unique()),
            hits: *hits,
            inserted: *inserted,
            evicted: *evicted,
            share_of_optimum: best(*capacity).map(|best| share(hits.hit_tokens, best)),
            share_of_ceiling: share(hits.hit_tokens, ceiling.hit_tokens),
            below: below.clone(),
        })
    };
    Ok(Outcome {
        trace: trace.name.clone(),
        block_tokens: trace.block_tokens,
        requests: trace.requests().len() as u64,
        references: trace.references(),
        unique: trace.unique(),
        duration_ms: trace.duration_ms(0),
        ceiling,
        rows: jobs.iter().zip(&replayed).filter_map(row).collect(),
        complete,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn trace() -> Trace {
        crate::workload::generate(&"chat".parse().unwrap(), 300, 7)
    }

    fn plan(capacities: &[&str]) -> Plan {
        Plan {
            contenders: Contender::all(),
            capacities: capacities.iter().map(|text| text.parse().unwrap()).collect(),
            below: None,
            warm_up: 0.0,
            token_bytes: None,
            endurance_bytes: None,
        }
    }

    #[test]
    fn nobody_beats_the_optimum_and_the_optimum_not_the_ceiling() {
        let trace = trace();
        let outcome =
            run(&trace, &plan(&["1%", "10%", "50%", "100%"]), &AtomicBool::new(false), || ()).unwrap();
        assert!(outcome.complete && outcome.rows.len() == 4 * 9);
        for row in &outcome.rows {
            assert!(row.share_of_optimum.unwrap() <= 1.0 && row.share_of_ceiling <= 1.0, "{row:?}");
            assert_eq!(row.hits.blocks, trace.references());
        }
        let at_all = outcome.rows.iter().filter(|row| row.capacity_share >= 1.0);
        at_all.for_each(|row| assert_eq!(row.hits.hit_tokens, outcome.ceiling.hit_tokens, "{}", row.policy));
    }

    #[test]
    fn capacities_are_shares_blocks_or_bytes() {
        let trace = trace();
        let blocks = |text: &str, bytes| text.parse::<Capacity>().unwrap().blocks(&trace, bytes);
        assert_eq!(blocks("100%", None), Ok(trace.unique()));
        assert_eq!(blocks("12", None), Ok(12));
        assert_eq!(blocks("1GiB", Some(1024)), Ok((1 << 30) / 1024 / trace.block_tokens));
        assert!(blocks("1GiB", None).unwrap_err().contains("--token-bytes"));
        for wrong in ["0", "0%", "101%", "-3", "GiB", "five", ""] {
            assert!(wrong.parse::<Capacity>().is_err(), "{wrong}");
        }
        assert_eq!(sweep(4).len(), 4);
        assert_eq!(sweep(4)[3], Capacity::Share(1.0));
    }

    #[test]
    fn a_second_tier_adds_hits_and_wear() {
        let below =
            Below { kind: SecondTier::WriteThrough, capacity: Capacity::Share(0.5), admit: 1, policy: None };
        let mut plan = plan(&["5%"]);
        plan.below = Some(below);
        plan.token_bytes = Some(1000);
        plan.endurance_bytes = Some(1e15);
        let outcome = run(&trace(), &plan, &AtomicBool::new(false), || ()).unwrap();
        assert!(outcome.rows.iter().all(|row| row.policy != "opt"));
        for row in &outcome.rows {
            let below = row.below.clone().unwrap();
            assert!(below.hit_tokens > 0 && below.writes > 0 && below.life_days.unwrap() > 0.0, "{row:?}");
        }
    }

    #[test]
    fn a_warm_up_is_not_counted_and_a_stop_is_told() {
        let mut plan = plan(&["10%"]);
        plan.warm_up = 0.5;
        let outcome = run(&trace(), &plan, &AtomicBool::new(false), || ()).unwrap();
        assert!(outcome.rows.iter().all(|row| row.hits.requests == outcome.requests.div_ceil(2)));
        let stopped = run(&trace(), &plan, &AtomicBool::new(true), || ()).unwrap();
        assert!(!stopped.complete && stopped.rows.is_empty());
    }
}
