//! Devices that come and go: what they hold when they are attached, and what is lost with them.

use crate::disk::{DeviceState, PAGE_BYTES, Place, SegmentState};
use crate::index::EntryId;
use crate::index::EntryState;
use crate::moves::{DeviceCondition, DeviceId, DeviceUsage, Ended, Found, Record};
use crate::policy::Left;
use crate::state::Core;
use crate::{Effects, Millis};
use cairn_proto::MissReason;

/// A device that fails so often without a success between is out of service.
const MAX_ERRORS_IN_ROW: u32 = 3;

impl Core {
    /// Counts errors, and gives a device up that returns nothing else.
    pub(crate) fn note_result(&mut self, now: Millis, device: usize, ended: Ended, effects: &mut Effects) {
        let state = &mut self.disks.devices[device];
        match ended {
            Ended::Done => state.errors_in_row = 0,
            Ended::Corrupt | Ended::NoRoom | Ended::Cancelled => {}
            Ended::Failed => {
                state.errors_in_row += 1;
                state.counters.errors += 1;
                if state.errors_in_row >= MAX_ERRORS_IN_ROW && state.state != DeviceState::Lost {
                    self.lose_device(now, DeviceId(device as u32), effects);
                }
            }
        }
    }

    /// Takes a device out of service: blocks that were only there are gone.
    pub(crate) fn lose_device(&mut self, now: Millis, device: DeviceId, effects: &mut Effects) {
        let number = device.0 as usize;
        let state = &mut self.disks.devices[number];
        if state.state == DeviceState::Lost {
            return;
        }
        state.state = DeviceState::Lost;
        state.open = None;
        state.erases.clear();
        state.unsynced.clear();
        let queue = std::mem::take(&mut state.queue);
        effects.lost.push(device);
        self.disks.remember_missed(number);
        for reference in queue {
            if let Some(id) = self.index.resident(reference) {
                self.index[id].disk.queued = false;
                // Another device may take it.
                self.enqueue_write(id);
            }
        }
        let here = |(id, entry): (EntryId, &crate::index::Entry)| {
            let place = entry.place()?;
            let here = self.disks.segments[place.segment as usize].device == number;
            (here && entry.state == EntryState::Resident).then_some((id, self.in_memory(id)))
        };
        let mut blocks: Vec<(EntryId, bool)> = self.index.occupied().filter_map(here).collect();
        blocks.sort_by_key(|(id, _)| std::cmp::Reverse(self.index[*id].depth));
        for (id, in_memory) in blocks {
            if !in_memory {
                self.remove(now, id, MissReason::DeviceLost, effects);
            } else {
                self.leave_device(id, Left::Removed);
                self.enqueue_write(id);
            }
        }
    }

    /// Blocks found in one segment of a device that is being attached.
    pub(crate) fn recovered(
        &mut self,
        now: Millis,
        device: DeviceId,
        (segment, generation, sealed): (u32, u64, bool),
        found: &[Found],
    ) {
        let number = device.0 as usize;
        let state = &mut self.disks.devices[number];
        if state.state != DeviceState::Recovering || segment >= state.config.segments {
            return;
        }
        let global = state.segment_range().start + segment;
        state.free.remove(&global);
        state.generation = state.generation.max(generation);
        let place = &mut self.disks.segments[global as usize];
        place.state = if sealed { SegmentState::Sealed } else { SegmentState::Closing };
        place.generation = generation;
        for found in found {
            let state = &mut self.disks.devices[number];
            state.sequence = state.sequence.max(found.record.sequence);
            if !self.disks.devices[number].skip.contains(&found.record.space) {
                let place = Place { segment: global, page: found.page };
                self.recover_block(now, (number, sealed), place, &found.record);
            }
        }
        self.disks.devices[number].policy.requested(&mut self.disk_nodes, 0);
    }

    fn recover_block(&mut self, now: Millis, (device, sealed): (usize, bool), place: Place, record: &Record) {
        let slot_bytes = record.block_bytes.next_multiple_of(self.config.slot_align_bytes);
        let Ok(space) = self.recovered_space(record, slot_bytes) else { return };
        let id = match self.index.find(space, &record.hash) {
            // The first copy stays, whatever tier it came from.
            Some(id) if self.index[id].place().is_some() || self.index[id].disk.queued => return,
            Some(id) if self.index[id].checksum != record.checksum => return,
            Some(id) => id,
            None => {
                let id = self.index.insert((space, record.hash), record.checksum, record.parent);
                self.index[id].touched = now;
                self.index[id].depth = record.depth;
                self.spaces[space].resident += 1;
                id
            }
        };
        let pages = self.record_pages(space);
        let reference = self.index.reference(id);
        self.disks.add_live(place, pages, reference);
        let entry = &mut self.index[id];
        entry.set_place(Some(place));
        // What was found in an open segment may be in a cache of the device only.
        entry.disk.durable = sealed;
        entry.disk.ordered = true;
        let member = entry.member(id);
        if !sealed {
            self.disks.devices[device].unsynced.push((reference, place));
        }
        self.disks.devices[device].policy.insert(&mut self.disk_nodes, member);
    }

    /// All segments of a device were read: it may be written to.
    pub(crate) fn recovery_done(&mut self, device: DeviceId, sequence: u64) {
        let state = &mut self.disks.devices[device.0 as usize];
        state.sequence = state.sequence.max(sequence);
        if state.state == DeviceState::Recovering {
            state.state = DeviceState::Ready;
            let skipped = std::mem::take(&mut state.skip);
            state.forgets.extend(skipped.into_iter().map(|space| (space, state.sequence)));
        }
    }

    /// Every device, in the order of attachment.
    pub fn devices(&self) -> Vec<DeviceUsage> {
        let usage = |(number, device): (usize, &crate::disk::Device)| DeviceUsage {
            device: DeviceId(number as u32),
            state: match device.state {
                DeviceState::Recovering => DeviceCondition::Recovering,
                DeviceState::Ready => DeviceCondition::Ready,
                DeviceState::Lost => DeviceCondition::Lost,
            },
            capacity_bytes: device.usable_segments(&self.disks.segments) as u64 * device.config.segment_bytes,
            live_bytes: device.live_pages * PAGE_BYTES,
            target_bytes: device.room(&self.disks.segments).1 * PAGE_BYTES,
            live_blocks: device.live_blocks,
            queued_blocks: (device.queue.len() + self.disks.writes_to(number)) as u64,
            free_segments: device.free.len() as u64,
            counters: device.counters,
        };
        self.disks.devices.iter().enumerate().map(usage).collect()
    }
}
