//! Segments: maximal runs of consecutive blocks of one chain that were last used by the same request and are of the same kind. A
//! segment loses blocks from its deep end only; those that left are its *ghost*: remembered as two keys and a length.

use super::learn::{AGES, Kind, age_floor};
use crate::index::EntryId;
use crate::policy::spread;
use hashbrown::HashTable;

pub(super) const NONE: u32 = u32::MAX;

/// A segment of a fresh prompt's last block.
const LAST: u8 = 0x20;
/// It would be resident under LRU.
const RECENT: u8 = 0x40;
const SHARE: u8 = 0x1f;

/// Gaps are kept in so many parts of an octave.
const GAP_PARTS: f64 = 256.0;

/// 40 bytes.
#[derive(Clone, Copy)]
pub(super) struct Segment {
    /// The request that used it last.
    pub(super) touched: u32,
    pub(super) uses: u16,
    gap: u16,
    /// Blocks that it began with.
    pub(super) len: u16,
    pub(super) resident: u16,
    pub(super) ghosts: u16,
    pub(super) class: u8,
    marks: u8,
    /// The deepest resident block; of a ghost alone, the ghost that is next older.
    bottom: u32,
    /// Position among the leaves; of a ghost alone, the ghost that is next younger.
    leaf: u32,
    /// Topmost and deepest block that left.
    pub(super) first_ghost: u32,
    pub(super) last_ghost: u32,
    older: u32,
    newer: u32,
}

const EMPTY: Segment = Segment {
    touched: 0,
    uses: 1,
    gap: 0,
    len: 0,
    resident: 0,
    ghosts: 0,
    class: 0,
    marks: 0,
    bottom: NONE,
    leaf: NONE,
    first_ghost: 0,
    last_ghost: 0,
    older: NONE,
    newer: NONE,
};

impl Segment {
    pub(super) fn kind(&self) -> Kind {
        Kind { class: self.class, marks: [self.marks & SHARE, u8::from(self.marks & LAST != 0)] }
    }

    pub(super) fn set_marks(&mut self, share: u8, last: bool) {
        self.marks = share & SHARE | if last { LAST } else { 0 } | self.marks & RECENT;
    }

    pub(super) fn recent(&self) -> bool {
        self.marks & RECENT != 0
    }

    pub(super) fn set_recent(&mut self, recent: bool) {
        self.marks = self.marks & !RECENT | if recent { RECENT } else { 0 };
    }

    /// Usual gap between uses, as a binary logarithm.
    pub(super) fn gap(&self) -> f64 {
        f64::from(self.gap) / GAP_PARTS
    }

    pub(super) fn set_gap(&mut self, gap: f64) {
        self.gap = (gap * GAP_PARTS).round() as u16;
    }

    /// Blocks that it still has or remembers.
    pub(super) fn known(&self) -> u64 {
        u64::from(self.resident) + u64::from(self.ghosts)
    }

    /// What each of its blocks counts in statistics: a long segment lives and dies as one, so it counts as its root.
    pub(super) fn block_weight(&self) -> f64 {
        1.0 / f64::from(self.len.max(1)).sqrt()
    }

    pub(super) fn bottom(&self) -> Option<EntryId> {
        (self.resident > 0 && self.bottom != NONE).then_some(EntryId(self.bottom))
    }

    pub(super) fn set_bottom(&mut self, bottom: EntryId) {
        self.bottom = bottom.0;
    }

    /// In no list of ghosts, and not a leaf.
    pub(super) fn is_leaf(&self) -> bool {
        self.resident > 0 && self.leaf != NONE
    }
}

/// All segments by last use, leaves among them, and ghosts by key.
pub(super) struct Segments {
    all: Vec<Segment>,
    free: Vec<u32>,
    count: usize,
    oldest: u32,
    newest: u32,
    /// Segments whose deepest block has no resident child.
    leaves: Vec<u32>,
    /// Segments of ghosts only, by when they lost their last block.
    oldest_ghost: u32,
    newest_ghost: u32,
    by_ghost: HashTable<u32>,
    pub(super) ghost_blocks: u64,
    /// For each age class, the oldest segment that has not reached it.
    waiting: [u32; AGES],
    /// The oldest segment that may have resident blocks.
    first_resident: u32,
    /// The oldest segment that LRU would keep.
    boundary: u32,
    /// Blocks that LRU would keep.
    pub(super) recent_blocks: u64,
}

impl Default for Segments {
    fn default() -> Self {
        Self {
            all: Vec::new(),
            free: Vec::new(),
            count: 0,
            oldest: NONE,
            newest: NONE,
            leaves: Vec::new(),
            oldest_ghost: NONE,
            newest_ghost: NONE,
            by_ghost: HashTable::new(),
            ghost_blocks: 0,
            waiting: [NONE; AGES],
            first_resident: NONE,
            boundary: NONE,
            recent_blocks: 0,
        }
    }
}

impl std::ops::Index<u32> for Segments {
    type Output = Segment;

    fn index(&self, id: u32) -> &Segment {
        &self.all[id as usize]
    }
}

impl std::ops::IndexMut<u32> for Segments {
    fn index_mut(&mut self, id: u32) -> &mut Segment {
        &mut self.all[id as usize]
    }
}

impl Segments {
    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn leaves(&self) -> &[u32] {
        &self.leaves
    }

    /// The next younger segment.
    pub(super) fn newer(&self, id: u32) -> u32 {
        self[id].newer
    }

    /// A new segment, used at `now`.
    pub(super) fn create(&mut self, now: u32) -> u32 {
        let segment = Segment { touched: now, older: self.newest, ..EMPTY };
        let id = match self.free.pop() {
            Some(id) => {
                self[id] = segment;
                id
            }
            None => {
                self.all.push(segment);
                self.all.len() as u32 - 1
            }
        };
        match self.newest {
            NONE => self.oldest = id,
            newest => self[newest].newer = id,
        }
        self.newest = id;
        self.count += 1;
        for pointer in self.waiting.iter_mut().chain([&mut self.first_resident, &mut self.boundary]) {
            if *pointer == NONE {
                *pointer = id;
            }
        }
        id
    }

    /// Forgets a segment that has no resident block.
    pub(super) fn delete(&mut self, id: u32) {
        let Segment { older, newer, .. } = self[id];
        if self[id].ghosts > 0 {
            self.unlist_ghost(id);
            self.unindex(id);
            self.ghost_blocks -= u64::from(self[id].ghosts);
        }
        if self[id].recent() {
            self.recent_blocks -= self[id].known();
        }
        for pointer in self.waiting.iter_mut().chain([&mut self.first_resident, &mut self.boundary]) {
            if *pointer == id {
                *pointer = newer;
            }
        }
        match older {
            NONE => self.oldest = newer,
            older => self[older].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self[newer].older = older,
        }
        self[id] = EMPTY;
        self.free.push(id);
        self.count -= 1;
    }

    pub(super) fn add_leaf(&mut self, id: u32) {
        if self[id].leaf == NONE {
            self[id].leaf = self.leaves.len() as u32;
            self.leaves.push(id);
        }
    }

    pub(super) fn remove_leaf(&mut self, id: u32) {
        let position = std::mem::replace(&mut self[id].leaf, NONE);
        if position == NONE {
            return;
        }
        self.leaves.swap_remove(position as usize);
        if let Some(moved) = self.leaves.get(position as usize).copied() {
            self[moved].leaf = position;
        }
    }

    /// A segment lost its last resident block.
    pub(super) fn list_ghost(&mut self, id: u32) {
        let newest = self.newest_ghost;
        (self[id].bottom, self[id].leaf) = (newest, NONE);
        match newest {
            NONE => self.oldest_ghost = id,
            newest => self[newest].leaf = id,
        }
        self.newest_ghost = id;
    }

    /// Takes a segment out of the list of ghosts, if it is in it.
    fn unlist_ghost(&mut self, id: u32) {
        if self[id].resident > 0 {
            return;
        }
        let (older, newer) = (self[id].bottom, self[id].leaf);
        match older {
            NONE if self.oldest_ghost == id => self.oldest_ghost = newer,
            NONE => {}
            older => self[older].leaf = newer,
        }
        match newer {
            NONE if self.newest_ghost == id => self.newest_ghost = older,
            NONE => {}
            newer => self[newer].bottom = older,
        }
        (self[id].bottom, self[id].leaf) = (NONE, NONE);
    }

    /// A segment has no resident block any more: it is a ghost, or nothing.
    pub(super) fn empty(&mut self, id: u32) {
        self.remove_leaf(id);
        self[id].bottom = NONE;
        if self[id].ghosts == 0 {
            self.delete(id);
        } else {
            self.list_ghost(id);
        }
    }

    /// A segment's ghost is about to become resident.
    pub(super) fn recall(&mut self, id: u32) {
        self.unindex(id);
        self.unlist_ghost(id);
    }

    /// The segment whose ghost begins with this block.
    pub(super) fn with_ghost(&self, key: u32) -> Option<u32> {
        let same = |id: &u32| self.all[*id as usize].first_ghost == key;
        self.by_ghost.find(position(key), same).copied()
    }

    pub(super) fn index(&mut self, id: u32) {
        let Self { by_ghost, all, .. } = self;
        let key = all[id as usize].first_ghost;
        by_ghost.insert_unique(position(key), id, |id| position(all[*id as usize].first_ghost));
    }

    pub(super) fn unindex(&mut self, id: u32) {
        let key = self[id].first_ghost;
        if let Ok(found) = self.by_ghost.find_entry(position(key), |other| *other == id) {
            found.remove();
        }
    }

    /// Takes ghosts out of a segment, of which the first is indexed no more. It is deleted when nothing is left.
    pub(super) fn drop_ghosts(&mut self, id: u32, count: u16) {
        self[id].ghosts -= count;
        self.ghost_blocks -= u64::from(count);
        if self[id].recent() {
            self.recent_blocks -= u64::from(count);
        }
    }

    /// Deletes ghosts that are longest without a block, until there are at most `max` segments.
    pub(super) fn trim(&mut self, max: usize) {
        while self.count > max && self.oldest_ghost != NONE {
            self.delete(self.oldest_ghost);
        }
    }

    /// Tells of each segment and age class that it reached since the last time.
    pub(super) fn age(&mut self, now: u32, mut reached: impl FnMut(&Segment, usize)) {
        for class in 0..AGES {
            let age = age_floor(class).max(1.0);
            while let Some(segment) = self.all.get(self.waiting[class] as usize) {
                if f64::from(now.wrapping_sub(segment.touched)) < age {
                    break;
                }
                reached(segment, class);
                self.waiting[class] = segment.newer;
            }
        }
    }

    /// Lets LRU's imagined cache of so many blocks forget its oldest segments, but none of the present request.
    pub(super) fn move_boundary(&mut self, now: u32, capacity: u64) {
        while let Some(segment) = self.all.get(self.boundary as usize).copied() {
            let rest = self.recent_blocks.saturating_sub(segment.known());
            if segment.touched == now || rest < capacity {
                return;
            }
            let boundary = self.boundary;
            if segment.recent() {
                self.recent_blocks = rest;
            }
            self[boundary].set_recent(false);
            self.boundary = segment.newer;
        }
    }

    /// The oldest segment with resident blocks.
    pub(super) fn oldest_resident(&mut self) -> u32 {
        while self.first_resident != NONE && self[self.first_resident].resident == 0 {
            self.first_resident = self[self.first_resident].newer;
        }
        self.first_resident
    }
}

fn position(key: u32) -> u64 {
    spread(u64::from(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_costs_at_most_64_bytes() {
        // At worst every segment has one block. Ghosts alone are at most what is left to 15/16 of the blocks; their
        // table is at its lowest load (7/16).
        let (segment, leaf, node) =
            (size_of::<Segment>() as f64, 4.0, size_of::<crate::policy::Node>() as f64);
        let indexed = segment + 5.0 * 16.0 / 7.0;
        let resident_only = segment + leaf + node;
        let share = super::super::MAX_SEGMENTS_PER_BLOCK;
        let with_ghosts = share * (indexed + leaf) + node;
        assert!(resident_only <= 64.0 && with_ghosts <= 64.0, "{resident_only} {with_ghosts}");
    }
}
