//! Why blocks that are gone are gone: a bounded memory, oldest forgotten first. Keys are 64-bit fingerprints; a
//! collision can misattribute a reason, never a block.

use crate::Millis;
use cairn_proto::{BlockHash, MissReason};
use hashbrown::HashTable;

#[derive(Clone, Copy)]
struct Removal {
    fingerprint: u64,
    at: Millis,
    reason: MissReason,
}

pub(crate) struct History {
    ring: Vec<Removal>,
    capacity: usize,
    /// Position that the next removal overwrites once the ring is full.
    next: usize,
    positions: HashTable<u32>,
}

impl History {
    pub(crate) fn new(capacity: usize) -> Self {
        let capacity = capacity.min(u32::MAX as usize);
        Self { ring: Vec::new(), capacity, next: 0, positions: HashTable::new() }
    }

    pub(crate) fn record(&mut self, space: u32, hash: &BlockHash, reason: MissReason, at: Millis) {
        let fingerprint = fingerprint(space, hash);
        let removal = Removal { fingerprint, at, reason };
        if let Some(position) = self.position(fingerprint) {
            self.ring[position] = removal;
            return;
        }
        let position = self.next;
        self.next = (self.next + 1) % self.capacity;
        if position < self.ring.len() {
            let old = self.ring[position].fingerprint;
            if let Ok(entry) = self.positions.find_entry(old, |p| *p as usize == position) {
                entry.remove();
            }
            self.ring[position] = removal;
        } else {
            self.ring.push(removal);
        }
        let ring = &self.ring;
        self.positions.insert_unique(fingerprint, position as u32, |p| ring[*p as usize].fingerprint);
    }

    pub(crate) fn find(&self, space: u32, hash: &BlockHash) -> Option<(MissReason, Millis)> {
        let removal = &self.ring[self.position(fingerprint(space, hash))?];
        Some((removal.reason, removal.at))
    }

    fn position(&self, fingerprint: u64) -> Option<usize> {
        let found = self.positions.find(fingerprint, |p| self.ring[*p as usize].fingerprint == fingerprint);
        found.map(|p| *p as usize)
    }
}

fn fingerprint(space: u32, hash: &BlockHash) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&hash.0[8..16]);
    u64::from_le_bytes(bytes) ^ (u64::from(space) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgets_the_oldest_and_keeps_the_newest_reason() {
        let mut history = History::new(3);
        let hash = |i: u8| BlockHash([i; 32]);
        for i in 0..5 {
            history.record(0, &hash(i), MissReason::Evicted, Millis(u64::from(i)));
        }
        history.record(0, &hash(4), MissReason::Quarantined, Millis(9));
        assert_eq!(history.find(0, &hash(0)), None);
        assert_eq!(history.find(0, &hash(1)), None);
        assert_eq!(history.find(0, &hash(2)), Some((MissReason::Evicted, Millis(2))));
        assert_eq!(history.find(0, &hash(4)), Some((MissReason::Quarantined, Millis(9))));
        assert_eq!(history.find(1, &hash(4)), None);
    }
}
