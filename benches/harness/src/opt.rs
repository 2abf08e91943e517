//! The best that any cache of a given size can do, knowing the future: Belady's rule with bypass, under the rule that a hit is a
//! resident prefix. What is used next farthest in the future leaves first, the deepest of one request first; a new block may be the one
//! that leaves. (A parent's next use is never later than its child's, so this never opens a hole before a block that stays.)

use crate::trace::Trace;
use std::collections::BinaryHeap;

/// No later use.
const NEVER: u32 = u32::MAX;

/// The next use of every reference of a trace, shared by replays at all capacities.
pub struct Optimum<'a> {
    trace: &'a Trace,
    /// For each reference in order: the next request that has the same block.
    next: Vec<u32>,
}

/// A replay of the optimum.
pub(crate) struct OptReplay<'a> {
    optimum: &'a Optimum<'a>,
    capacity: usize,
    /// By id: the next use of a resident block; `None` where it is not resident.
    resident: Vec<Option<u32>>,
    len: usize,
    /// Next use, depth and id of blocks; entries that the resident block no longer has are stale.
    farthest: BinaryHeap<(u32, u32, u32)>,
    reference: usize,
    pub(crate) inserted: u64,
}

impl<'a> Optimum<'a> {
    /// Looks at the whole trace from behind.
    pub fn new(trace: &'a Trace) -> Self {
        let mut next = vec![NEVER; trace.references() as usize];
        let mut later = vec![NEVER; trace.ids()];
        let mut reference = next.len();
        for (number, request) in trace.requests().iter().enumerate().rev() {
            for id in trace.chain(request).rev() {
                reference -= 1;
                next[reference] = later[id as usize];
                later[id as usize] = number as u32;
            }
        }
        Self { trace, next }
    }

    pub(crate) fn replay(&'a self, capacity: usize) -> OptReplay<'a> {
        OptReplay {
            optimum: self,
            capacity,
            resident: vec![None; self.trace.ids()],
            len: 0,
            farthest: BinaryHeap::new(),
            reference: 0,
            inserted: 0,
        }
    }
}

impl OptReplay<'_> {
    /// Blocks that the next request of the trace hits, whose chain this is.
    pub(crate) fn request(&mut self, chain: &[u64]) -> usize {
        let is_resident = |id: &&u64| self.resident[**id as usize].is_some();
        let hits = chain.iter().take_while(is_resident).count();
        let kept = self.capacity.min(chain.len());
        for (depth, id) in chain.iter().enumerate() {
            let next = self.optimum.next[self.reference + depth];
            let block = &mut self.resident[*id as usize];
            let was = block.is_some();
            // What never comes again takes no room.
            let stays = next != NEVER && (was || depth < kept);
            *block = stays.then_some(next);
            self.len = self.len + usize::from(stays) - usize::from(was);
            if stays {
                self.farthest.push((next, depth as u32, *id as u32));
                // As published counts have it: a block that leaves again at once came in, too.
                self.inserted += u64::from(!was);
            }
        }
        self.reference += chain.len();
        while self.len > self.capacity
            && let Some((next, _, id)) = self.farthest.pop()
        {
            if self.resident[id as usize] == Some(next) {
                self.resident[id as usize] = None;
                self.len -= 1;
            }
        }
        self.forget_stale();
        hits
    }

    /// Keeps the heap in proportion to what is resident.
    fn forget_stale(&mut self) {
        if self.farthest.len() > 4 * self.len + 1024 {
            let resident = &self.resident;
            self.farthest.retain(|(next, _, id)| resident[*id as usize] == Some(*next));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hit_rate::prefix_hits;
    use proptest::prelude::*;
    use std::collections::{BTreeSet, HashMap};

    /// The most that any sequence of decisions reaches, by trying all of them: which blocks to keep after each request, prefix-closed
    /// or not.
    fn best(chains: &[Vec<u32>], capacity: usize) -> usize {
        let mut states: HashMap<BTreeSet<u32>, usize> = HashMap::from([(BTreeSet::new(), 0)]);
        for chain in chains {
            let mut after: HashMap<BTreeSet<u32>, usize> = HashMap::new();
            for (state, hits) in states {
                let hits = hits + chain.iter().take_while(|id| state.contains(id)).count();
                let all: Vec<u32> = state
                    .iter()
                    .copied()
                    .chain(chain.iter().copied())
                    .collect::<BTreeSet<_>>()
                    .into_iter()
                    .collect();
                for mask in 0..1u32 << all.len() {
                    if mask.count_ones() as usize > capacity {
                        continue;
                    }
                    let kept = (0..all.len()).filter(|i| mask >> i & 1 == 1).map(|i| all[i]).collect();
                    let entry = after.entry(kept).or_default();
                    *entry = hits.max(*entry);
                }
            }
            states = after;
        }
        states.into_values().max().unwrap_or(0)
    }

    /// Chains of a small tree: node `i` has parent `(i - 1) / 2`.
    fn chain(leaf: u32) -> Vec<u32> {
        let mut chain = vec![leaf];
        let mut node = leaf;
        while node > 0 {
            node = (node - 1) / 2;
            chain.push(node);
        }
        chain.reverse();
        chain
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn nobody_does_better(leaves in proptest::collection::vec(0u32..7, 1..8), capacity in 0usize..5) {
            let chains: Vec<_> = leaves.into_iter().map(chain).collect();
            let mut trace = Trace::new("tree", 1);
            for chain in &chains {
                trace.push(0, (chain.len() as u64, 0), chain);
            }
            trace.seal();
            let optimum = Optimum::new(&trace);
            let mut replay = optimum.replay(capacity);
            let hits: usize = prefix_hits(&trace, |chain| replay.request(chain)).sum();
            prop_assert_eq!(hits, best(&chains, capacity));
        }
    }
}
