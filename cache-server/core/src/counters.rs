//! What a core counts. `asked_blocks` is the one denominator: it equals all hits plus all misses plus `busy_blocks`.

use cairn_proto::{MissReason, Outcome, Tier};

/// Totals since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Blocks asked for in lookups.
    pub asked_blocks: u64,
    /// Found, by position in [`Tier::ALL`].
    pub hit_blocks: [u64; Tier::ALL.len()],
    /// Not found, by position in [`MissReason::ALL`].
    pub missed_blocks: [u64; MissReason::ALL.len()],
    /// Refused for want of lease room.
    pub busy_blocks: u64,
    /// Made visible.
    pub committed_blocks: u64,
    /// Offered a second time and dropped.
    pub duplicate_blocks: u64,
    /// Had to make room.
    pub evicted_blocks: u64,
    /// Left host memory and stayed on a device or a GPU.
    pub demoted_blocks: u64,
    /// Left because their bytes were wrong.
    pub quarantined_blocks: u64,
    /// Offered and not given room.
    pub refused_blocks: u64,
    /// Leases that ended by their deadline.
    pub expired_leases: u64,
    /// Reservations that ended by their deadline.
    pub expired_reservations: u64,
}

/// What is held now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Open sessions.
    pub sessions: usize,
    /// Leases, those with a read in progress included.
    pub leases: usize,
    /// Reservations, those being filled included.
    pub reservations: usize,
    /// Committed blocks in the index.
    pub resident_blocks: usize,
    /// Those of them that are in host memory.
    pub host_blocks: usize,
    /// Bytes of the slots of blocks in host memory.
    pub resident_bytes: u64,
    /// Committed blocks that can be read on a GPU.
    pub gpu_blocks: usize,
    /// Slots that hold anything: resident, reserved, or removed but still read.
    pub used_slots: usize,
    /// Chunks that no slot size owns.
    pub free_chunks: usize,
}

impl Counters {
    pub(crate) fn lookup(&mut self, outcomes: &[Outcome]) {
        self.asked_blocks += outcomes.len() as u64;
        for (count, outcome) in cairn_proto::runs(outcomes) {
            let count = u64::from(count);
            match outcome {
                Outcome::Hit(tier) => self.hit_blocks[tier as usize] += count,
                Outcome::Miss(reason) => self.missed_blocks[reason as usize] += count,
                Outcome::Busy => self.busy_blocks += count,
                Outcome::Corrupt => self.missed_blocks[MissReason::Quarantined as usize] += count,
            }
        }
    }

    /// Whether every block asked for is accounted for exactly once.
    pub fn balanced(&self) -> bool {
        let hits: u64 = self.hit_blocks.iter().sum();
        let misses: u64 = self.missed_blocks.iter().sum();
        self.asked_blocks == hits + misses + self.busy_blocks
    }
}
