//! Bringing blocks from devices and GPUs to readers.

use crate::index::{EntryId, EntryRef, EntryState};
use crate::moves::{DeviceId, Ended, Load, LoadId, Origin, ScrubItem};
use crate::policy::Left;
use crate::state::Core;
use crate::{Effects, LeaseId, Millis, Refusal, Reply, SlotId};
use cairn_proto::MissReason;

/// A block on its way; it is pinned until it arrived.
pub(crate) struct Loading {
    pub(crate) entry: EntryRef,
    /// Where it goes; `None` when it is for one reader only, or only checked.
    pub(crate) slot: Option<SlotId>,
    /// Nobody asked for it: no read of anybody's.
    pub(crate) scrub: bool,
    /// It comes from this GPU, not from a device.
    pub(crate) gpu: Option<usize>,
    /// The GPU needs the room: nobody asked for it either, and its copy there goes.
    pub(crate) leaves: bool,
    /// Its GPU was lost meanwhile: whoever wants the block gets it from elsewhere, and what was promised to this load, when it ends.
    pub(crate) abandoned: bool,
}

impl Core {
    /// How a reader gets at one block of its lease, in a read that has begun.
    pub(crate) fn load(
        &mut self,
        now: Millis,
        lease: LeaseId,
        position: usize,
        effects: &mut Effects,
    ) -> Result<Reply, Refusal> {
        let held = self.leases.get(&lease).filter(|lease| lease.reads > 0).ok_or(Refusal::UnknownLease)?;
        let blocks = held.run.len();
        let outside = Refusal::OutsideLease { first: position, end: position + 1, blocks };
        let id = *held.run.get(position).ok_or(outside)?;
        let entry = &self.index[id];
        if let Some(slot) = entry.slot() {
            return Ok(Reply::Load(Load::Ready(slot)));
        }
        let resident = entry.state == EntryState::Resident;
        let from = match (self.on_gpu(id), entry.place()) {
            (Some(slot), _) if resident => {
                Some((Origin::Gpu(self.gpus.outside(slot)), Some(self.gpus.gpu_of(slot))))
            }
            (_, Some(place)) if resident => Some((Origin::Disk(self.disks.outside(place)), None)),
            _ => None,
        };
        let Some((from, gpu)) = from else {
            let reason = self.history.find(entry.space, &entry.hash);
            let reason = reason.map_or(MissReason::DeviceLost, |(reason, _)| reason);
            return Ok(Reply::Load(Load::Lost(reason)));
        };
        if entry.disk.loading {
            return Ok(Reply::Load(Load::Wait));
        }
        let space = entry.space;
        if let Some(held) = self.leases.get_mut(&lease) {
            held.loaded = true;
        }
        self.pin(id);
        self.index[id].disk.loading = true;
        let slot = self.make_room(now, space, effects);
        let load = LoadId(self.next_id());
        let entry = self.index.reference(id);
        self.loads.insert(load, Loading { entry, slot, scrub: false, gpu, leaves: false, abandoned: false });
        let record = self.record_of(id, 0);
        Ok(Reply::Load(match slot {
            Some(slot) => Load::Promote { load, from, record, slot },
            None => Load::Through { load, from, record },
        }))
    }

    /// A load ended: the slot holds the verified bytes, or it does not.
    pub(crate) fn end_load(&mut self, now: Millis, load: LoadId, ended: Ended, effects: &mut Effects) {
        let Some(loading) = self.loads.remove(&load) else { return };
        let Loading { entry: reference, slot, scrub, gpu, leaves, abandoned } = loading;
        // Pinned by the load: it is still the same entry.
        let id = reference.id;
        let (space, resident) = (self.index[id].space, self.index[id].state == EntryState::Resident);
        if abandoned {
            if let Some(slot) = slot {
                self.free_slot(space, slot);
            }
            return self.unpin(id);
        }
        self.index[id].disk.loading = false;
        match (ended, slot) {
            (Ended::Done, Some(slot)) => {
                self.arena.occupy(slot, id);
                let entry = &mut self.index[id];
                entry.set_slot(Some(slot));
                if resident {
                    self.enter_host(id);
                    self.order(now, id);
                    self.settle_host(space, 0);
                }
            }
            (_, Some(slot)) => self.free_slot(space, slot),
            (_, None) => {}
        }
        match gpu {
            Some(gpu) => self.end_gpu_load(now, id, (gpu, leaves), ended, effects),
            None => self.end_disk_load(now, id, scrub, ended, effects),
        }
        self.drop_record_of_doomed(id);
        self.unpin(id);
    }

    fn end_disk_load(&mut self, now: Millis, id: EntryId, scrub: bool, ended: Ended, effects: &mut Effects) {
        let space = self.index[id].space;
        let device = self.index[id].place().map(|p| self.disks.segments[p.segment as usize].device);
        if let Some(device) = device {
            let bytes = self.spaces[space].block_bytes;
            let counters = &mut self.disks.devices[device].counters;
            match ended {
                Ended::Done if scrub => {}
                Ended::Done => {
                    counters.read_blocks += 1;
                    counters.read_bytes += bytes;
                }
                Ended::Corrupt => counters.corrupt_blocks += 1,
                Ended::NoRoom | Ended::Failed | Ended::Cancelled => {}
            }
            self.note_result(now, device, ended, effects);
        }
        // One failed read is no proof against the bytes, but nobody can use what cannot be read.
        let resident = self.index[id].state == EntryState::Resident;
        match ended {
            // A copy in memory is as good as ever.
            Ended::Corrupt | Ended::Failed | Ended::NoRoom if resident && self.in_memory(id) => {
                if let Some(place) = self.index[id].place() {
                    if ended == Ended::Corrupt {
                        self.disks.device_of(place).erases.push(place);
                    }
                    self.leave_device(id, Left::Removed);
                }
            }
            Ended::Corrupt if resident => self.remove(now, id, MissReason::Quarantined, effects),
            Ended::Failed | Ended::NoRoom if resident => {
                self.remove(now, id, MissReason::DeviceLost, effects)
            }
            _ => {}
        }
    }

    /// The next block of a device after an entry, held in place while it is checked.
    pub(crate) fn begin_scrub(&mut self, device: DeviceId, after: Option<EntryId>) -> Option<ScrubItem> {
        let first = after.map_or(0, |id| id.0 + 1);
        let segments = &self.disks.segments;
        let (id, place) = self.index.occupied_from(first).find_map(|(id, entry)| {
            let place = entry.place()?;
            let here = segments[place.segment as usize].device == device.0 as usize;
            let busy = entry.disk.loading || entry.disk.writing() || entry.state != EntryState::Resident;
            (here && !busy).then_some((id, place))
        })?;
        self.pin(id);
        self.index[id].disk.loading = true;
        let load = LoadId(self.next_id());
        let entry = self.index.reference(id);
        self.loads.insert(
            load,
            Loading { entry, slot: None, scrub: true, gpu: None, leaves: false, abandoned: false },
        );
        Some(ScrubItem { load, block: id, from: self.disks.outside(place), record: self.record_of(id, 0) })
    }

    /// A resident block got a host slot.
    pub(crate) fn enter_host(&mut self, id: crate::EntryId) {
        let entry = &self.index[id];
        let unpinned = usize::from(entry.pins == 0);
        let class = self.spaces.class_of(entry.space);
        class.evictable += unpinned;
        class.blocks += 1;
        self.resident_bytes += class.slot_bytes;
    }

    /// A block leaves host memory; what remains of it is on a device.
    pub(crate) fn leave_host(&mut self, id: crate::EntryId, left: Left) {
        let entry = &mut self.index[id];
        let Some(slot) = entry.slot() else { return };
        let member = entry.member(id);
        let (space, pinned, ordered) = (entry.space, entry.pins > 0, std::mem::take(&mut entry.ordered));
        entry.set_slot(None);
        let class = self.spaces.class_of(space);
        if ordered {
            class.policy.remove(&mut self.nodes, member, left);
        }
        class.evictable -= usize::from(!pinned);
        class.blocks -= 1;
        self.resident_bytes -= class.slot_bytes;
        self.free_slot(space, slot);
    }
}
