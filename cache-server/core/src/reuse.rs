//! What is worth writing to a device: reuse as seen so far, by depth in the prompt.

use crate::index::EntryId;
use crate::nvme::Admission;
use crate::state::Core;
use cairn_proto::MissReason;

/// Depths are told apart by their power of two.
const DEPTHS: usize = 17;

/// After so many blocks of one depth the counts are halved: old habits fade.
const MEMORY: u32 = 4096;

/// Blocks of a depth that must have been seen before a prediction is made.
const ENOUGH: u32 = 32;

#[derive(Clone, Copy, Default)]
struct Seen {
    stored: u32,
    used_again: u32,
}

/// Counts of blocks stored, and of those used again, by depth.
#[derive(Default)]
pub(crate) struct Reuse([Seen; DEPTHS]);

impl Reuse {
    fn at(&mut self, depth: u16) -> &mut Seen {
        &mut self.0[class(depth)]
    }

    fn stored(&mut self, depth: u16) {
        let seen = self.at(depth);
        seen.stored += 1;
        if seen.stored >= MEMORY {
            seen.stored /= 2;
            seen.used_again /= 2;
        }
    }

    fn used_again(&mut self, depth: u16) {
        let seen = self.at(depth);
        seen.used_again = (seen.used_again + 1).min(seen.stored);
    }

    /// Whether most blocks of this depth were used again.
    fn likely(&self, depth: u16) -> bool {
        let seen = &self.0[class(depth)];
        seen.stored < ENOUGH || 2 * seen.used_again >= seen.stored
    }
}

fn class(depth: u16) -> usize {
    (u32::from(depth) + 1).ilog2() as usize
}

impl Core {
    /// A block is new in host memory.
    pub(crate) fn first_use(&mut self, id: EntryId) {
        let entry = &self.index[id];
        if self.disks.devices.is_empty() || entry.place().is_some() {
            return;
        }
        let depth = entry.depth;
        let came_back = || {
            let left = self.history.find(entry.space, &entry.hash);
            left.is_some_and(|(reason, _)| reason == MissReason::Evicted)
        };
        let wanted = match self.config.admission {
            Admission::Always => true,
            Admission::SecondUse => came_back(),
            Admission::PredictedReuse => came_back() || self.reuse.likely(depth),
        };
        self.reuse.stored(depth);
        if wanted {
            self.enqueue_write(id);
        }
    }

    /// A block was offered that is stored already: its copy on a device may have left before.
    pub(crate) fn offered_again(&mut self, id: EntryId) {
        if self.config.admission == Admission::Always || self.index[id].disk.reused {
            self.enqueue_write(id);
        }
    }

    /// A block was found.
    pub(crate) fn used_again(&mut self, id: EntryId) {
        if self.disks.devices.is_empty() {
            return;
        }
        let entry = &mut self.index[id];
        let depth = entry.depth;
        if !std::mem::replace(&mut entry.disk.reused, true) {
            self.reuse.used_again(depth);
        }
        // Whatever the admission: blocks that came while no device could take them are written at their next use.
        self.enqueue_write(id);
    }
}
