//! Cairn's own policy: whole segments of prefixes, kept by what they are expected to earn, with LRU as a guard.
//!
//! What leaves is the deep end of the leaf segment whose expected rate of reuse, at its age and for its kind, is least (see
//! `learn`). So prompts that nobody continues make room early, whatever their length, and those of sessions that come back at
//! their usual pace are waited for. The resident blocks stay a tree without holes.
//!
//! Learning costs when there is nothing to gain: if nearly all reuse is within reach of LRU, LRU is followed to the block. An
//! imagined LRU cache of the same size is kept track of on the side: it is left when reuse beyond its reach is worth it, and
//! returned to when leaving it was regretted by more than a cache full of hits, each time for longer.

mod learn;
mod segments;
mod tree;

use super::{Blocks, Left, Member, Nodes, Policy};
use crate::index::EntryId;
use learn::{GAPS, Learned, class_of};
use segments::{NONE, Segments};

/// Segments that are remembered, for each block of capacity: what keeps to 64 bytes a block.
const MAX_SEGMENTS_PER_BLOCK: f64 = 15.0 / 16.0;

/// Reuse beyond LRU's reach that is worth leaving it, and regret that is not borne: this share of all hits.
const THRESHOLD: f64 = 0.02;
/// Hits are compared over so many cache fulls of blocks asked for.
const WINDOW: u64 = 16;

/// Leaf segments that are all looked at for a victim; of more, a sample and the worst of earlier samples.
const MAX_EXACT_LEAVES: usize = 128;
const SAMPLE: usize = 32;
const POOL: usize = 16;

/// Consequences are drawn after so many requests, sooner while there were few.
const RECOMPUTE_REQUESTS: u64 = 50;

/// A longer run is split.
const MAX_RUN: usize = 50_000;

/// What a request did with a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Used,
    Inserted,
    /// Part of the chain of an insertion, used already.
    Refreshed,
}

/// Which cache is imitated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Recency,
    Worth,
}

/// Hits of the last windows.
#[derive(Default)]
struct Guard {
    own: f64,
    recency: f64,
    /// Hits of a cache that never forgets what is remembered here.
    known: f64,
    /// Blocks asked for so far.
    asked: u64,
    halve_at: u64,
    /// LRU is followed at least until then.
    stay_until: u64,
    returns: u64,
}

pub(super) struct Cairn {
    learned: Learned,
    segments: Segments,
    capacity: usize,
    size: usize,
    now: u32,
    requests: u64,
    recompute_at: u64,
    mode: Mode,
    guard: Guard,
    /// Blocks of the present request, deepest first.
    pending: Vec<(Member, How)>,
    pending_inserts: usize,
    /// The segment that the last victim was of: it goes on shrinking until the next request.
    shrinking: u32,
    pool: Vec<u32>,
    random: u64,
}

/// Consecutive blocks of a request with the same past.
#[derive(Clone, Copy)]
struct Run {
    start: usize,
    end: usize,
    uses: u16,
    gap: f64,
    class: u8,
    share: u8,
    last: bool,
}

impl Cairn {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            learned: Learned::new(),
            segments: Segments::default(),
            capacity,
            size: 0,
            now: 0,
            requests: 0,
            recompute_at: 0,
            mode: Mode::Recency,
            guard: Guard::default(),
            pending: Vec::new(),
            pending_inserts: 0,
            shrinking: NONE,
            pool: Vec::new(),
            random: 0x0139_408d_cbbf_7a44,
        }
    }

    /// Takes in what was told of since the last time. `asked`: blocks of the whole request, 0 when it was counted before.
    fn process(&mut self, nodes: &mut Nodes, asked: usize) {
        let pending = std::mem::take(&mut self.pending);
        self.pending_inserts = 0;
        self.shrinking = NONE;
        if asked > 0 {
            self.requests += 1;
            self.now = self.now.wrapping_add(1);
            self.guard.asked += asked as u64;
        }
        let Self { segments, learned, now, .. } = self;
        segments.age(*now, |segment, age| {
            learned.count_reached(segment.kind(), age, segment.known() as f64 * segment.block_weight());
        });
        // From the deepest up; where depth grows, another chain begins.
        for chain in pending.chunk_by(|(deeper, _), (member, _)| member.depth < deeper.depth) {
            let chain: Vec<(Member, How)> = chain.iter().rev().copied().collect();
            self.take_in(nodes, &chain, asked);
        }
        if self.requests >= self.recompute_at {
            self.learned.recompute();
            self.recompute_at = self.requests + (self.requests / 8).clamp(1, RECOMPUTE_REQUESTS);
        }
        self.segments.move_boundary(self.now, self.capacity as u64);
        self.choose_mode();
        self.segments.trim((self.capacity as f64 * MAX_SEGMENTS_PER_BLOCK) as usize);
    }

    fn take_in(&mut self, nodes: &mut Nodes, chain: &[(Member, How)], asked: usize) {
        // From the top, so that each finds its parent planted.
        for (at, (member, how)) in chain.iter().enumerate() {
            if *how == How::Inserted {
                self.size += 1;
                nodes.plant(member.id, at.checked_sub(1).map(|before| chain[before].0.id));
            }
        }
        self.straighten(nodes, chain);
        let (old, known) = self.find_old(nodes, chain);
        let length = asked.max(chain.len());
        let share = (known * 10 / length).min(9) as u8;
        let runs = self.runs(chain, &old, (known, share));
        self.let_go(&old);
        self.put(nodes, chain, &runs);
    }

    /// The segment that each block was in, resident or as a ghost; and how many blocks from the start were in any.
    fn find_old(&mut self, nodes: &Nodes, chain: &[(Member, How)]) -> (Vec<u32>, usize) {
        let mut old = vec![NONE; chain.len()];
        let mut at = 0;
        let mut diverged = false;
        let mut known = None;
        while at < chain.len() {
            let (member, how) = chain[at];
            if how != How::Inserted {
                old[at] = nodes[member.id].segment();
                at += 1;
                continue;
            }
            let ghost = if diverged { None } else { self.segments.with_ghost(member.key as u32) };
            let Some(segment) = ghost else {
                known.get_or_insert(at);
                diverged = true;
                at += 1;
                continue;
            };
            self.segments.recall(segment);
            let count = usize::from(self.segments[segment].ghosts);
            let ghost =
                chain.get(at..at + count).filter(|ghost| ghost.iter().all(|(_, how)| *how == How::Inserted));
            let end = ghost.and_then(|ghost| ghost.last());
            if end.is_some_and(|(end, _)| end.key as u32 == self.segments[segment].last_ghost) {
                old[at..at + count].fill(segment);
                at += count;
            } else {
                // The chain leaves the ghost somewhere inside: only its first block is known to be the same.
                self.segments.drop_ghosts(segment, count as u16 - 1);
                old[at] = segment;
                at += 1;
                diverged = true;
                known.get_or_insert(at);
            }
        }
        (old, known.unwrap_or(chain.len()))
    }

    /// Cuts a request into runs of equal past, counts their uses, and takes their blocks out of their old segments.
    fn runs(&mut self, chain: &[(Member, How)], old: &[u32], (known, share): (usize, u8)) -> Vec<Run> {
        let mut runs: Vec<Run> = Vec::new();
        let before = known.checked_sub(1).map(|last| self.continued(old[last], chain[last].1));
        let mut recency_hits = 0;
        let mut start = 0;
        while start < chain.len() {
            let same = |at: &usize| old[*at] == old[start] && chain[*at].1 == chain[start].1;
            let end = (start..chain.len().min(start + MAX_RUN)).take_while(same).last().unwrap_or(start) + 1;
            let run = Run { start, end, uses: 1, gap: 0.0, class: 0, share, last: false };
            match old[start] {
                NONE => fresh(run, chain.len(), before, &mut runs),
                segment => {
                    let recent = self.segments[segment].recent();
                    let run = self.again(segment, chain[start].1, run);
                    if recent && recency_hits == start {
                        recency_hits = end;
                    }
                    merge(run, &mut runs);
                }
            }
            start = end;
        }
        let used = chain.iter().take_while(|(_, how)| *how == How::Used).count();
        // Hits on blocks that were refreshed were counted when they were used.
        let refreshed = chain.iter().filter(|(_, how)| *how == How::Refreshed).count();
        self.guard.own += used as f64;
        self.guard.recency += recency_hits.saturating_sub(refreshed) as f64;
        self.guard.known += known.saturating_sub(refreshed) as f64;
        runs
    }

    /// Class and gap of what follows a known block.
    fn continued(&self, segment: u32, how: How) -> (f64, Option<(u8, u8)>) {
        let old = &self.segments[segment];
        if how == How::Refreshed {
            // A fresh prompt that is stored in pieces stays one fresh prompt.
            let same = (old.uses == 1).then(|| (old.class, old.kind().marks[0]));
            return (old.gap(), same);
        }
        (self.new_gap(segment), None)
    }

    fn new_gap(&self, segment: u32) -> f64 {
        let old = &self.segments[segment];
        let gap = f64::from(self.now.wrapping_sub(old.touched).max(1)).log2();
        if old.uses == 1 { gap } else { f64::midpoint(old.gap(), gap) }
    }

    /// Blocks of an old segment in a new request.
    fn again(&mut self, segment: u32, how: How, mut run: Run) -> Run {
        let old = self.segments[segment];
        let blocks = (run.end - run.start) as u16;
        if how == How::Refreshed {
            (run.uses, run.gap, run.class) = (old.uses, old.gap(), old.class);
            run.share = old.kind().marks[0];
        } else {
            run.gap = self.new_gap(segment);
            run.uses = old.uses.saturating_add(1);
            run.class = class_of(run.uses, gap_class(run.gap));
            run.share |= 16;
            let age = self.now.wrapping_sub(old.touched);
            self.learned.count_use(old.kind(), age, f64::from(blocks) * old.block_weight());
        }
        let old = &mut self.segments[segment];
        let recent = old.recent();
        if how == How::Inserted {
            old.ghosts -= blocks;
            self.segments.ghost_blocks -= u64::from(blocks);
        } else {
            old.resident -= blocks;
        }
        if recent {
            self.segments.recent_blocks -= u64::from(blocks);
        }
        run
    }

    /// Old segments that lost all their resident blocks to new ones.
    fn let_go(&mut self, old: &[u32]) {
        let mut distinct: Vec<u32> = old.iter().copied().filter(|segment| *segment != NONE).collect();
        distinct.sort_unstable();
        distinct.dedup();
        for segment in distinct {
            if self.segments[segment].resident > 0 {
                continue;
            }
            self.segments.empty(segment);
        }
    }

    /// Makes a segment of each run, deepest first.
    fn put(&mut self, nodes: &mut Nodes, chain: &[(Member, How)], runs: &[Run]) {
        let mut made = Vec::with_capacity(runs.len());
        for run in runs.iter().rev() {
            let id = self.segments.create(self.now);
            let blocks = (run.end - run.start) as u16;
            let segment = &mut self.segments[id];
            (segment.uses, segment.class) = (run.uses, run.class);
            segment.set_gap(run.gap);
            segment.set_marks(run.share, run.last);
            segment.set_recent(true);
            (segment.len, segment.resident) = (blocks, blocks);
            segment.set_bottom(chain[run.end - 1].0.id);
            let weight = f64::from(blocks) * segment.block_weight();
            self.segments.recent_blocks += u64::from(blocks);
            self.learned.count_segment(weight);
            chain[run.start..run.end].iter().for_each(|(member, _)| nodes[member.id].set_segment(id));
            made.push((id, chain[run.end - 1].0.id));
        }
        for (segment, bottom) in made {
            if nodes[bottom].children() == 0 {
                self.segments.add_leaf(segment);
            }
        }
    }

    fn choose_mode(&mut self) {
        let capacity = self.capacity as f64;
        let window = WINDOW * self.capacity as u64;
        let guard = &mut self.guard;
        match self.mode {
            Mode::Recency => {
                // With a memory that is full, what is known stands for what would be known with a cache full of ghosts.
                let full = self.segments.count() >= (capacity * MAX_SEGMENTS_PER_BLOCK) as usize;
                let ghosts = self.segments.ghost_blocks.max(1) as f64;
                let scale = if full { (capacity / ghosts).max(1.0) } else { 1.0 };
                let beyond = (guard.known - guard.recency) * scale;
                let worth_it = beyond > THRESHOLD * (guard.recency + beyond);
                let filled = self.segments.recent_blocks >= self.capacity as u64;
                if worth_it && filled && guard.asked >= guard.stay_until {
                    self.mode = Mode::Worth;
                    guard.own = guard.recency;
                }
            }
            Mode::Worth => {
                let regret = guard.recency - guard.own;
                if regret > capacity && regret > THRESHOLD * guard.recency {
                    self.mode = Mode::Recency;
                    guard.returns = (2 * guard.returns).max(1);
                    guard.stay_until = guard.asked + guard.returns.saturating_mul(window);
                }
            }
        }
        if guard.asked > guard.halve_at {
            guard.halve_at = guard.asked + window;
            guard.own /= 2.0;
            guard.recency /= 2.0;
            guard.known /= 2.0;
        }
    }

    /// The leaf segment that is worth least, of all or of a sample; of equals, the older.
    fn least_worth(&mut self, blocks: &dyn Blocks) -> Option<u32> {
        let leaves = self.segments.leaves();
        let mut candidates: Vec<u32> = if leaves.len() <= MAX_EXACT_LEAVES {
            leaves.to_vec()
        } else {
            let mut random = self.random;
            let sample = (0..SAMPLE).map(|_| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                leaves[(random >> 11) as usize % leaves.len()]
            });
            let sample: Vec<u32> = sample.collect();
            self.random = random;
            let still = self.pool.iter().copied().filter(|segment| self.segments[*segment].is_leaf());
            still.chain(sample).collect()
        };
        candidates.retain(|segment| self.segments[*segment].bottom().is_some_and(|id| blocks.may_leave(id)));
        let rate = |segment: u32| {
            let segment = &self.segments[segment];
            let age = self.now.wrapping_sub(segment.touched);
            (self.learned.value(segment.kind(), age), u32::MAX - age, segment)
        };
        let mut rated: Vec<(f64, u32, u32)> = candidates
            .into_iter()
            .map(|segment| {
                let (value, young, _) = rate(segment);
                (value, young, segment)
            })
            .collect();
        rated.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
        rated.dedup();
        if self.segments.leaves().len() > MAX_EXACT_LEAVES {
            self.pool = rated.iter().take(POOL).map(|(_, _, segment)| *segment).collect();
        }
        rated.first().map(|(_, _, segment)| *segment)
    }

    /// The oldest segment whose deep end may leave; one that nothing hangs from, if there is any.
    fn least_recent(&mut self, nodes: &Nodes, blocks: &dyn Blocks) -> Option<u32> {
        let mut with_children = None;
        let mut next = self.segments.oldest_resident();
        while next != NONE {
            if let Some(id) = self.segments[next].bottom().filter(|id| blocks.may_leave(*id)) {
                if nodes[id].children() == 0 {
                    return Some(next);
                }
                with_children.get_or_insert(next);
            }
            next = self.segments.newer(next);
        }
        with_children
    }
}

fn gap_class(gap: f64) -> usize {
    ((gap + 1.0) as usize).min(GAPS - 1)
}

/// Blocks that are not known: the last one of a request by itself, because what follows it next time is not known.
fn fresh(mut run: Run, end_of_chain: usize, before: Option<(f64, Option<(u8, u8)>)>, runs: &mut Vec<Run>) {
    match before {
        None => run.class = class_of(1, 0),
        Some((_, Some((class, share)))) => (run.class, run.share) = (class, share),
        Some((gap, None)) => run.class = class_of(1, (1 + gap_class(gap)).min(GAPS - 1)),
    }
    if run.end == end_of_chain {
        if run.end - run.start > 1 {
            runs.push(Run { end: run.end - 1, ..run });
            run.start = run.end - 1;
        }
        run.last = true;
    }
    runs.push(run);
}

/// Neighbours of the same kind are one.
fn merge(run: Run, runs: &mut Vec<Run>) {
    match runs.last_mut() {
        Some(last)
            if last.uses > 1
                && run.uses > 1
                && last.class == run.class
                && run.end - last.start <= MAX_RUN =>
        {
            last.end = run.end;
        }
        _ => runs.push(run),
    }
}

impl Policy for Cairn {
    fn resize(&mut self, capacity: usize) {
        self.capacity = capacity;
    }

    fn bypasses(&self) -> bool {
        true
    }

    fn insert(&mut self, nodes: &mut Nodes, member: Member) {
        nodes.clear(member.id);
        self.pending.push((member, How::Inserted));
        self.pending_inserts += 1;
    }

    fn touch(&mut self, _nodes: &mut Nodes, member: Member) {
        self.pending.push((member, How::Used));
    }

    fn refresh(&mut self, _nodes: &mut Nodes, member: Member) {
        self.pending.push((member, How::Refreshed));
    }

    fn requested(&mut self, nodes: &mut Nodes, asked: usize) {
        self.process(nodes, asked);
    }

    fn remove(&mut self, nodes: &mut Nodes, member: Member, left: Left) {
        if !self.pending.is_empty() {
            self.process(nodes, 0);
        }
        let segment = nodes[member.id].segment();
        if segment == NONE {
            return;
        }
        self.size -= 1;
        let deepest = self.segments[segment].bottom() == Some(member.id);
        if deepest && left == Left::Evicted {
            self.shorten(nodes, segment, member);
        } else {
            self.take_away(nodes, segment, member.id);
        }
    }

    fn victim(&mut self, nodes: &mut Nodes, blocks: &dyn Blocks) -> Option<EntryId> {
        if !self.pending.is_empty() {
            self.process(nodes, 0);
        }
        let goes_on = self.shrinking != NONE
            && self.segments[self.shrinking]
                .bottom()
                .is_some_and(|id| blocks.may_leave(id) && nodes[id].children() == 0);
        if !goes_on {
            let least = if self.mode == Mode::Worth { self.least_worth(blocks) } else { None };
            self.shrinking = least.or_else(|| self.least_recent(nodes, blocks))?;
        }
        self.segments[self.shrinking].bottom()
    }

    fn len(&self) -> usize {
        self.size + self.pending_inserts
    }
}
