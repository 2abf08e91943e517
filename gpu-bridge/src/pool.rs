//! Which slots of a worker's paged pool are in use, and which hold blocks that a later prompt may share. Decisions only:
//! the bytes are device memory.
//!
//! A slot is *held* while sequences use it. When the last one lets go, a slot with a name stays *reusable* until its room
//! is needed (least recently used first, leaves before parents, because sequences release their tail first);
//! one without a name is free at once.

use cairn_kernels::Slot;
use cairn_proto::BlockHash;
use std::collections::{BTreeMap, HashMap};

#[derive(Clone, Default)]
struct State {
    holders: u32,
    name: Option<BlockHash>,
    /// When it became reusable; a key of `reusable`.
    since: u64,
}

/// See the module.
pub struct BlockPool {
    states: Vec<State>,
    free: Vec<Slot>,
    named: HashMap<BlockHash, Slot>,
    reusable: BTreeMap<u64, Slot>,
    clock: u64,
}

impl BlockPool {
    /// All slots free.
    pub fn new(slots: u32) -> Self {
        Self {
            states: vec![State::default(); slots as usize],
            free: (0..slots).rev().map(Slot).collect(),
            named: HashMap::new(),
            reusable: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Slots that nothing holds, reusable ones included.
    pub fn available(&self) -> usize {
        self.free.len() + self.reusable.len()
    }

    /// Slots in all.
    pub fn capacity(&self) -> usize {
        self.states.len()
    }

    /// Holds a slot for new content. Forgets the least recently used reusable block when nothing is free.
    pub fn take(&mut self) -> Option<Slot> {
        let slot = self.free.pop().or_else(|| {
            let (_, slot) = self.reusable.pop_first()?;
            self.forget(slot);
            Some(slot)
        })?;
        self.states[slot.0 as usize].holders = 1;
        Some(slot)
    }

    /// Holds the slots of the longest named run from the start of a chain.
    pub fn share(&mut self, chain: &[BlockHash]) -> Vec<Slot> {
        let run: Vec<Slot> = chain.iter().map_while(|hash| self.named.get(hash).copied()).collect();
        for slot in &run {
            let state = &mut self.states[slot.0 as usize];
            if state.holders == 0 {
                self.reusable.remove(&state.since);
            }
            state.holders += 1;
        }
        run
    }

    /// Names a held slot whose content is complete. If another slot has the name already, that one keeps it.
    pub fn name(&mut self, slot: Slot, hash: BlockHash) {
        let state = &mut self.states[slot.0 as usize];
        if state.name.is_none() && !self.named.contains_key(&hash) {
            state.name = Some(hash);
            self.named.insert(hash, slot);
        }
    }

    /// Lets go of the slots of a sequence, first block first.
    pub fn release(&mut self, slots: &[Slot]) {
        for slot in slots.iter().rev() {
            let state = &mut self.states[slot.0 as usize];
            debug_assert!(state.holders > 0, "released more often than held");
            state.holders -= 1;
            if state.holders > 0 {
                continue;
            }
            if state.name.is_some() {
                self.clock += 1;
                state.since = self.clock;
                self.reusable.insert(self.clock, *slot);
            } else {
                self.free.push(*slot);
            }
        }
    }

    /// Forgets every block that nothing holds.
    pub fn clear(&mut self) {
        while let Some((_, slot)) = self.reusable.pop_first() {
            self.forget(slot);
            self.free.push(slot);
        }
    }

    fn forget(&mut self, slot: Slot) {
        if let Some(hash) = self.states[slot.0 as usize].name.take() {
            self.named.remove(&hash);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng, rngs::StdRng};

    fn chain(branch: u8, n: u8) -> Vec<BlockHash> {
        (0..n).map(|i| BlockHash([branch ^ (i << 3); 32])).collect()
    }

    #[test]
    fn names_are_shared_until_the_room_is_needed_leaves_first() {
        let mut pool = BlockPool::new(4);
        let names = chain(1, 3);
        let slots: Vec<Slot> = names.iter().map(|_| pool.take().unwrap()).collect();
        slots.iter().zip(&names).for_each(|(slot, name)| pool.name(*slot, *name));
        pool.release(&slots);
        assert_eq!(pool.available(), 4);
        assert_eq!(pool.share(&names), slots);
        pool.release(&slots);
        let taken = [pool.take().unwrap(), pool.take().unwrap()];
        assert!(taken.contains(&slots[2]), "the leaf goes first");
        assert_eq!(pool.share(&names), slots[..2]);
        assert_eq!(pool.take(), None, "held slots are never taken");
    }

    #[test]
    fn random_use_never_hands_a_held_slot_out_and_loses_none() {
        let mut rng = StdRng::seed_from_u64(7);
        let mut pool = BlockPool::new(20);
        let mut sequences: Vec<Vec<Slot>> = Vec::new();
        for _ in 0..20_000 {
            if rng.random_bool(0.5) && !sequences.is_empty() {
                let sequence = sequences.swap_remove(rng.random_range(0..sequences.len()));
                pool.release(&sequence);
                continue;
            }
            let names = chain(rng.random_range(0..8), rng.random_range(1..6));
            let mut slots = pool.share(&names);
            while slots.len() < names.len() {
                let Some(slot) = pool.take() else { break };
                assert!(sequences.iter().flatten().all(|held| *held != slot) && !slots.contains(&slot));
                pool.name(slot, names[slots.len()]);
                slots.push(slot);
            }
            sequences.push(slots);
            let mut held: Vec<_> = sequences.iter().flatten().copied().collect();
            held.sort();
            held.dedup();
            assert_eq!(held.len() + pool.available(), 20);
        }
    }
}
