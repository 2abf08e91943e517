//! Keys of blocks that left, oldest first: what a policy remembers to recognise a return. 32 bytes a key at most.

use hashbrown::HashTable;

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy)]
struct Ghost {
    key: u64,
    older: u32,
    newer: u32,
}

/// A bounded set of keys in the order of their arrival.
pub struct Ghosts {
    slab: Vec<Ghost>,
    free: Vec<u32>,
    positions: HashTable<u32>,
    oldest: u32,
    newest: u32,
}

impl Default for Ghosts {
    fn default() -> Self {
        Self { slab: Vec::new(), free: Vec::new(), positions: HashTable::new(), oldest: NONE, newest: NONE }
    }
}

impl Ghosts {
    /// Keys remembered.
    pub fn len(&self) -> usize {
        self.positions.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Remembers a key as the newest.
    pub fn push(&mut self, key: u64) {
        self.take(key);
        let ghost = Ghost { key, older: self.newest, newer: NONE };
        let position = match self.free.pop() {
            Some(position) => {
                self.slab[position as usize] = ghost;
                position
            }
            None => {
                self.slab.push(ghost);
                self.slab.len() as u32 - 1
            }
        };
        match self.newest {
            NONE => self.oldest = position,
            newest => self.slab[newest as usize].newer = position,
        }
        self.newest = position;
        let slab = &self.slab;
        self.positions.insert_unique(spread(key), position, |p| spread(slab[*p as usize].key));
    }

    /// Forgets a key and says whether it was there.
    pub fn take(&mut self, key: u64) -> bool {
        let Self { positions, slab, .. } = self;
        let Ok(found) = positions.find_entry(spread(key), |p| slab[*p as usize].key == key) else {
            return false;
        };
        let (position, _) = found.remove();
        let Ghost { older, newer, .. } = slab[position as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.slab[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.slab[newer as usize].older = older,
        }
        self.free.push(position);
        true
    }

    /// Forgets the oldest keys until at most `max` are left.
    pub fn trim(&mut self, max: usize) {
        while self.len() > max {
            let oldest = self.slab[self.oldest as usize].key;
            self.take(oldest);
        }
    }
}

/// A table position for a key: keys are parts of cryptographic hashes, but traces number theirs.
pub const fn spread(key: u64) -> u64 {
    let mixed = (key ^ (key >> 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}
