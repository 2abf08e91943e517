//! Room on devices: which copies leave, and which segments are used again.

use crate::disk::{Device, Going, PAGE_BYTES, Place, Segment, SegmentState};
use crate::index::{EntryState, OnDisk};
use crate::moves::{Move, Work};
use crate::state::Core;
use crate::{Effects, Millis, Room};

/// Pages of a segment that hold no record: its header, and a summary of one page and its trailer.
const MIN_OVERHEAD_PAGES: u64 = 3;

/// Reclaiming starts when fewer segments than this are free.
const LOW_SEGMENTS: usize = 3;

/// Copies that leave in one plan, so that none takes long.
const MAX_EVICTIONS: usize = 1024;

impl Device {
    /// Pages of a block on average, and pages of blocks that the device may hold: some segments are kept free, and each has a header, a
    /// summary and a rest at its end that is too small.
    pub(crate) fn room(&self, all: &[Segment]) -> (u64, u64) {
        let per_block = (self.live_pages / self.live_blocks.max(1)).max(1);
        let segments = self.usable_segments(all).saturating_sub(LOW_SEGMENTS) as u64;
        let in_segment = u64::from(self.segment_pages()).saturating_sub(MIN_OVERHEAD_PAGES) / per_block;
        (per_block, ((segments * in_segment * per_block) as f64 * self.config.fill) as u64)
    }
}

impl Core {
    /// Lets copies leave until the device is as full as it may be.
    pub(crate) fn shrink_device(&mut self, now: Millis, device: usize, effects: &mut Effects) {
        let state = &mut self.disks.devices[device];
        let (per_block, target) = state.room(&self.disks.segments);
        state.policy.resize((target / per_block) as usize);
        for _ in 0..MAX_EVICTIONS {
            let state = &self.disks.devices[device];
            if state.live_pages <= target + state.moving_pages + state.leaving_pages {
                return;
            }
            let policy = &mut self.disks.devices[device].policy;
            let Some(victim) = policy.victim(&mut self.disk_nodes, &OnDisk(&self.index)) else { return };
            self.evict_copy(now, victim, effects);
        }
    }

    /// Empties the segment with the least in it when segments run out, and frees those that are empty.
    pub(crate) fn reclaim(
        &mut self,
        now: Millis,
        (device, room): (usize, &mut Room),
        moves: &mut Vec<Move>,
        effects: &mut Effects,
    ) {
        let range = self.disks.devices[device].segment_range();
        let state = |core: &Self, segment: u32| core.disks.segments[segment as usize].state;
        let low = self.disks.devices[device].free.len() < LOW_SEGMENTS;
        if (low || self.disks.devices[device].needs_room)
            && !range.clone().any(|segment| {
                let reclaiming =
                    matches!(state(self, segment), SegmentState::Reclaiming | SegmentState::Freeing);
                reclaiming && !self.disks.segments[segment as usize].no_room
            })
        {
            let sealed = range.clone().filter(|segment| state(self, *segment) == SegmentState::Sealed);
            let least = sealed.min_by_key(|segment| {
                let segment = &self.disks.segments[*segment as usize];
                (segment.live_pages, segment.generation)
            });
            if let Some(segment) = least {
                self.disks.segments[segment as usize].state = SegmentState::Reclaiming;
            }
        }
        for segment in range {
            if state(self, segment) == SegmentState::Reclaiming {
                self.empty_segment(now, (segment, room), moves, effects);
            }
            let segment_state = &mut self.disks.segments[segment as usize];
            // What was moved out is safe first.
            let synced = segment_state.wait_sync <= self.disks.devices[device].synced;
            let empty = segment_state.live_pages == 0 && segment_state.writes == 0 && synced;
            if empty && matches!(segment_state.state, SegmentState::Reclaiming | SegmentState::Sealed) {
                segment_state.state = SegmentState::Freeing;
                segment_state.records = Vec::new();
                segment_state.wait_sync = 0;
                let id = self.disks.next_move(Going::Free { segment });
                let segment = self.disks.devices[device].local(segment);
                moves.push(Move { id, work: Work::Free { segment } });
            }
        }
    }

    /// Moves what is wanted out of a segment, or lets it leave when moving would wear the device too much.
    fn empty_segment(
        &mut self,
        now: Millis,
        (segment, room): (u32, &mut Room),
        moves: &mut Vec<Move>,
        effects: &mut Effects,
    ) {
        let device = self.disks.segments[segment as usize].device;
        for (page, reference) in self.disks.segments[segment as usize].records.clone() {
            let Some(id) = self.index.occupied_by(reference) else { continue };
            let entry = &self.index[id];
            let busy = entry.disk.loading || entry.disk.writing() || entry.state != EntryState::Resident;
            if entry.place() != Some(Place { segment, page }) || busy {
                continue;
            }
            let must_stay = entry.pins > 0 && entry.slot().is_none();
            let pages = self.record_pages(entry.space);
            let bytes = u64::from(pages) * PAGE_BYTES;
            if must_stay || self.may_relocate(device, bytes, entry.disk.uses > 0) {
                let mut after = *room;
                if !after.take(bytes) {
                    return;
                }
                if self.plan_write(now, (device, id), (pages, true), moves) {
                    *room = after;
                    continue;
                }
                if must_stay {
                    continue;
                }
            }
            self.evict_copy(now, id, effects);
        }
    }

    /// Whether so many bytes may be written once more. A segment's worth is kept back for blocks that are in use: when moving gets
    /// scarce, what nobody asked for leaves first.
    pub(crate) fn may_relocate(&self, device: usize, bytes: u64, used: bool) -> bool {
        let device = &self.disks.devices[device];
        let (stored, relocated) = (device.counters.stored_bytes, device.counters.relocated_bytes);
        // There is a beginning: a device that was just attached has stored nothing yet.
        let segments = if used { 2 } else { 1 };
        let allowed = (device.config.max_write_amplification - 1.0) * stored as f64
            + (segments * device.config.segment_bytes) as f64;
        (relocated + bytes) as f64 <= allowed
    }
}
