//! Decisions about devices: what is written, where, what leaves, which segment is used again, and when a device is given up.

use crate::disk::{DeviceState, Going, PAGE_BYTES, Place, SegmentState, record_pages};
use crate::index::{Copying, EntryId, EntryRef, EntryState};
use crate::moves::{DeviceId, Ended, Move, MoveId, Record, Source, Work};
use crate::policy::Left;
use crate::reserve::MAX_ANCESTOR_WALK;
use crate::state::Core;
use crate::{Effects, Millis, Room};
use cairn_proto::MissReason;
use std::collections::BTreeSet;

/// Segments that only reclaiming may open, so that it can always go on.
const RESERVED_SEGMENTS: usize = 1;

/// Uses of a block on its device beyond this are not told apart.
const MAX_USES: u8 = 3;

/// A file system that had no room for a segment is asked again after this long.
const FULL_RETRY_MS: u64 = 3000;

/// What stops blocks from being written to a device at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Admission {
    /// Every block is written.
    #[default]
    Always,
    /// A block is written at its second use: its first hit, or when it is stored again after it left.
    SecondUse,
    /// A block is written if blocks at its depth of a prompt were mostly used again so far, else at its second use.
    PredictedReuse,
}

impl Admission {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Always, Self::SecondUse, Self::PredictedReuse];

    /// The name used in config and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::SecondUse => "second_use",
            Self::PredictedReuse => "predicted_reuse",
        }
    }
}

impl std::str::FromStr for Admission {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| format!("unknown admission {name:?}; known: {}", known()))
    }
}

impl Core {
    /// Puts a block of the host tier into the queue of a device, unless it is or will be on one.
    pub(crate) fn enqueue_write(&mut self, id: EntryId) {
        let entry = &mut self.index[id];
        if entry.disk.copying == Copying::Leaving {
            entry.disk.copying = Copying::Returning;
        }
        let moving = entry.disk.queued || entry.disk.writing();
        if entry.place().is_some() || moving || entry.slot().is_none() {
            return;
        }
        let space = entry.space;
        let pages = self.record_pages(space);
        let reference = self.index.reference(id);
        let Some(device) = self.disks.next_device(pages) else { return };
        self.disks.devices[device].queue.push_back(reference);
        self.index[id].disk.queued = true;
    }

    pub(crate) fn record_pages(&self, space: u32) -> u32 {
        record_pages(self.spaces.classes[self.spaces[space].class.0 as usize].slot_bytes)
    }

    /// A block on a device was used.
    pub(crate) fn touch_disk(&mut self, id: EntryId) {
        let entry = &mut self.index[id];
        if let Some(place) = entry.place()
            && entry.disk.ordered
        {
            entry.disk.uses = (entry.disk.uses + 1).min(MAX_USES);
            let entry = &self.index[id];
            let member = entry.member(id);
            self.disks.device_of(place).policy.touch(&mut self.disk_nodes, member);
        }
    }

    /// What a device should do next, within what it can take.
    pub(crate) fn plan_moves(
        &mut self,
        now: Millis,
        device: DeviceId,
        (mut room, sync): (Room, bool),
        effects: &mut Effects,
    ) -> Vec<Move> {
        let device = device.0 as usize;
        let mut moves = Vec::new();
        if self.disks.devices[device].state != DeviceState::Ready {
            return moves;
        }
        self.plan_marks(device, &mut moves);
        self.plan_seals(device, &mut moves);
        // Segments that wait to be freed are needed.
        if sync || self.disks.devices[device].free.len() <= RESERVED_SEGMENTS {
            self.plan_sync(device, &mut moves);
        }
        self.shrink_device(now, device, effects);
        self.reclaim(now, (device, &mut room), &mut moves, effects);
        self.plan_writes(now, device, room, &mut moves);
        self.disks.devices[device].policy.requested(&mut self.disk_nodes, 0);
        moves
    }

    fn plan_marks(&mut self, device: usize, moves: &mut Vec<Move>) {
        for place in std::mem::take(&mut self.disks.devices[device].erases) {
            let id = self.disks.next_move(Going::Erase { segment: place.segment });
            self.disks.segments[place.segment as usize].writes += 1;
            moves.push(Move { id, work: Work::Erase(self.disks.outside(place)) });
        }
        for (space, sequence) in std::mem::take(&mut self.disks.devices[device].forgets) {
            let id = self.disks.next_move(Going::Forget { device, space, sequence });
            moves.push(Move { id, work: Work::Forget { space, sequence } });
        }
    }

    fn plan_seals(&mut self, device: usize, moves: &mut Vec<Move>) {
        for segment in self.disks.devices[device].segment_range() {
            let state = &mut self.disks.segments[segment as usize];
            if state.state != SegmentState::Closing || state.writes > 0 {
                continue;
            }
            state.state = SegmentState::Sealed;
            state.writes += 1;
            let generation = state.generation;
            let wanted = |(page, reference): &(u32, EntryRef)| {
                let id = self.index.resident(*reference)?;
                let here = Place { segment, page: *page };
                (self.index[id].place() == Some(here)).then_some(*page)
            };
            let pages: Vec<u32> = state.records.iter().filter_map(wanted).collect();
            let segment_local = self.disks.devices[device].local(segment);
            let id = self.disks.next_move(Going::Seal { segment });
            moves.push(Move { id, work: Work::Seal { segment: segment_local, generation, pages } });
        }
    }

    fn plan_sync(&mut self, device: usize, moves: &mut Vec<Move>) {
        let state = &mut self.disks.devices[device];
        let written = std::mem::take(&mut state.unsynced);
        if written.is_empty() {
            return;
        }
        state.syncs_begun += 1;
        let number = state.syncs_begun;
        let segments: BTreeSet<u32> = written.iter().map(|(_, place)| state.local(place.segment)).collect();
        let id = self.disks.next_move(Going::Sync { device, number, written });
        moves.push(Move { id, work: Work::Sync { segments: segments.into_iter().collect() } });
    }

    /// Gives up the copy of a block on its device; the block itself leaves if that was the last copy.
    pub(crate) fn evict_copy(&mut self, now: Millis, id: EntryId, effects: &mut Effects) {
        let Some(place) = self.index[id].place() else { return };
        let pages = self.record_pages(self.index[id].space);
        let device = self.disks.device_of(place);
        device.counters.evicted_blocks += 1;
        let in_memory = self.in_memory(id);
        if self.index[id].disk.copying == Copying::Relocating {
            self.disks.device_of(place).leaving_pages += u64::from(pages);
            self.index[id].disk.copying = Copying::Leaving;
            if in_memory {
                self.unorder_disk(id, Left::Evicted);
            } else {
                self.remove(now, id, MissReason::Evicted, effects);
            }
        } else if !in_memory {
            self.remove(now, id, MissReason::Evicted, effects);
        } else {
            self.leave_device(id, Left::Evicted);
        }
    }

    /// Takes a block out of its device's order and frees its record.
    pub(crate) fn leave_device(&mut self, id: EntryId, left: Left) {
        self.unorder_disk(id, left);
        let entry = &mut self.index[id];
        let Some(place) = entry.place() else { return };
        entry.set_place(None);
        entry.disk.durable = false;
        entry.disk.uses = 0;
        let pages = self.record_pages(self.index[id].space);
        self.disks.drop_live(place, pages);
    }

    pub(crate) fn unorder_disk(&mut self, id: EntryId, left: Left) {
        let entry = &mut self.index[id];
        let member = entry.member(id);
        if std::mem::take(&mut entry.disk.ordered)
            && let Some(place) = entry.place()
        {
            self.disks.device_of(place).policy.remove(&mut self.disk_nodes, member, left);
        }
    }

    fn plan_writes(&mut self, now: Millis, device: usize, mut room: Room, moves: &mut Vec<Move>) {
        if self.disks.devices[device].free.len() < RESERVED_SEGMENTS {
            // What is left of the open segment is for reclaiming, which will free one.
            return;
        }
        // The block that was planned last, the shallowest so far of its chain.
        let mut last: Option<EntryId> = None;
        while let Some(reference) = self.disks.devices[device].queue.front().copied() {
            let wanted = |id: &EntryId| {
                let entry = &self.index[*id];
                entry.disk.queued
                    && !entry.disk.writing()
                    && entry.place().is_none()
                    && entry.slot().is_some()
            };
            let Some(id) = self.index.resident(reference).filter(wanted) else {
                self.disks.devices[device].queue.pop_front();
                if let Some(id) = self.index.resident(reference) {
                    self.index[id].disk.queued = false;
                }
                continue;
            };
            let pages = self.record_pages(self.index[id].space);
            let bytes = u64::from(pages) * PAGE_BYTES;
            if let Some(before) = last
                && self.index[before].parent != Some(self.index[id].hash)
            {
                // Another chain begins, and the policy is to see this one as a whole.
                self.refresh_before(before);
                last = None;
            }
            let mut after = room;
            if !after.take(bytes) || !self.plan_write(now, (device, id), (pages, false), moves) {
                break;
            }
            room = after;
            self.disks.devices[device].queue.pop_front();
            last = Some(id);
        }
        if let Some(last) = last {
            self.refresh_before(last);
        }
    }

    /// A block came to a device: those before it in its chain must not leave the device before it does.
    fn refresh_before(&mut self, id: EntryId) {
        let space = self.index[id].space;
        let mut next = self.index[id].parent;
        for _ in 0..MAX_ANCESTOR_WALK {
            let Some(id) = next.and_then(|hash| self.index.find(space, &hash)) else { return };
            let entry = &self.index[id];
            if entry.disk.queued {
                // It comes after this one, and sees to those before it itself.
                return;
            }
            if let Some(place) = entry.place()
                && entry.disk.ordered
            {
                let member = entry.member(id);
                self.disks.device_of(place).policy.refresh(&mut self.disk_nodes, member);
            }
            next = self.index[id].parent;
        }
    }

    /// Takes room for a record and plans its writing. False when there is no room.
    pub(crate) fn plan_write(
        &mut self,
        now: Millis,
        (device, id): (usize, EntryId),
        (pages, relocation): (u32, bool),
        moves: &mut Vec<Move>,
    ) -> bool {
        let reference = self.index.reference(id);
        let place = match self.disks.append(device, pages, reference) {
            Some(place) => place,
            None => {
                if !self.open_segment(now, device, relocation, moves) {
                    return false;
                }
                match self.disks.append(device, pages, reference) {
                    Some(place) => place,
                    None => return false,
                }
            }
        };
        self.disks.devices[device].sequence += 1;
        let record = self.record_of(id, self.disks.devices[device].sequence);
        let entry = &self.index[id];
        let source = match (entry.slot(), entry.place()) {
            (Some(slot), _) => Source::Slot(slot),
            (None, Some(from)) => Source::Disk(self.disks.outside(from)),
            (None, None) => unreachable!("a block that is nowhere is not in the index"),
        };
        self.pin(id);
        let entry = &mut self.index[id];
        entry.disk.copying = if relocation { Copying::Relocating } else { Copying::First };
        entry.disk.queued = false;
        if !relocation {
            entry.set_place(Some(place));
            entry.disk.ordered = true;
            let member = entry.member(id);
            self.disks.devices[device].policy.insert(&mut self.disk_nodes, member);
        }
        let from_disk = matches!(source, Source::Disk(_));
        if relocation {
            let state = &mut self.disks.devices[device];
            state.counters.relocated_bytes += u64::from(pages) * PAGE_BYTES;
            state.moving_pages += u64::from(pages);
        }
        let going = Going::Write { entry: reference, to: place, pages, relocation, from_disk };
        let to = self.disks.outside(place);
        let id = self.disks.next_move(going);
        moves.push(Move { id, work: Work::Write { record, source, to } });
        true
    }

    pub(crate) fn record_of(&self, id: EntryId, sequence: u64) -> Record {
        let entry = &self.index[id];
        let space = &self.spaces[entry.space];
        let tenant = self.spaces.classes[space.class.0 as usize].tenant;
        Record {
            space: space.id,
            tenant: self.spaces.tenants[tenant].name.clone(),
            block_bytes: space.block_bytes,
            hash: entry.hash,
            parent: entry.parent,
            checksum: entry.checksum,
            depth: entry.depth,
            sequence,
        }
    }

    /// Closes the open segment and opens a free one.
    fn open_segment(&mut self, now: Millis, device: usize, relocation: bool, moves: &mut Vec<Move>) -> bool {
        let reserved = if relocation { 0 } else { RESERVED_SEGMENTS };
        let state = &mut self.disks.devices[device];
        if state.free.len() <= reserved || now < state.full_until {
            return false;
        }
        let Some(segment) = state.free.pop_first() else { return false };
        if let Some(full) = state.open.replace(segment) {
            self.disks.segments[full as usize].state = SegmentState::Closing;
        }
        state.generation += 1;
        let generation = state.generation;
        let place = &mut self.disks.segments[segment as usize];
        place.state = SegmentState::Open;
        place.generation = generation;
        // The first page is the segment's own header.
        place.used_pages = 1;
        place.records = Vec::new();
        let local = state.local(segment);
        let id = self.disks.next_move(Going::Open { segment, generation });
        moves.push(Move { id, work: Work::Open { segment: local, generation } });
        true
    }

    /// A move ended.
    pub(crate) fn end_move(&mut self, now: Millis, id: MoveId, ended: Ended, effects: &mut Effects) {
        let Some(going) = self.disks.moves.remove(&id) else { return };
        let device = match &going {
            Going::Open { segment, .. }
            | Going::Seal { segment }
            | Going::Free { segment }
            | Going::Erase { segment } => self.disks.segments[*segment as usize].device,
            Going::Write { to, .. } => self.disks.segments[to.segment as usize].device,
            Going::Sync { device, .. } | Going::Forget { device, .. } => *device,
        };
        match going {
            Going::Open { segment, generation } => self.end_open(now, (segment, generation), ended),
            Going::Free { segment } => self.end_free(segment, ended),
            Going::Seal { segment } | Going::Erase { segment } => {
                let place = &mut self.disks.segments[segment as usize];
                place.writes -= 1;
                // An erased record must leave the summary, and a summary that could not be written is tried again.
                let again = matches!(going, Going::Erase { .. }) || ended != Ended::Done;
                if again && place.state == SegmentState::Sealed {
                    place.state = SegmentState::Closing;
                }
            }
            Going::Write { entry, to, pages, relocation, from_disk } => {
                self.end_write(now, (entry, ended), (to, pages), (relocation, from_disk), effects);
            }
            Going::Sync { number, written, .. } => {
                if ended == Ended::Done {
                    let state = &mut self.disks.devices[device];
                    state.synced = state.synced.max(number);
                    self.end_sync(&written);
                } else if self.disks.devices[device].state != DeviceState::Lost {
                    // What the device accepted and could not keep is gone, and nobody can say what else is.
                    self.lose_device(now, DeviceId(device as u32), effects);
                }
            }
            Going::Forget { space, sequence, .. } if ended != Ended::Done => {
                self.disks.devices[device].forgets.push((space, sequence));
                if self.disks.devices[device].state == DeviceState::Lost {
                    self.disks.remember_missed(device);
                }
            }
            Going::Forget { .. } => {}
        }
        self.note_result(now, device, ended, effects);
    }

    fn end_open(&mut self, now: Millis, (segment, generation): (u32, u64), ended: Ended) {
        let place = &mut self.disks.segments[segment as usize];
        let over = matches!(place.state, SegmentState::Free | SegmentState::Freeing);
        if ended == Ended::Done || over || place.generation != generation {
            return;
        }
        let device = &mut self.disks.devices[place.device];
        device.open = device.open.filter(|open| *open != segment);
        // Writes planned into it fail as well; then it is freed, or not touched again.
        place.state = SegmentState::Unusable;
        if ended == Ended::NoRoom {
            place.state = SegmentState::Reclaiming;
            place.no_room = true;
            device.full_until = now.plus(FULL_RETRY_MS);
            device.needs_room = true;
        }
    }

    fn end_free(&mut self, segment: u32, ended: Ended) {
        let place = &mut self.disks.segments[segment as usize];
        let device = &mut self.disks.devices[place.device];
        if ended != Ended::Done {
            place.state = SegmentState::Unusable;
            return;
        }
        place.state = SegmentState::Free;
        device.free.insert(segment);
        if !std::mem::take(&mut place.no_room) {
            device.counters.reclaimed_segments += 1;
            device.needs_room = false;
            device.full_until = Millis(0);
        }
    }

    fn end_sync(&mut self, written: &[(EntryRef, Place)]) {
        for (reference, place) in written {
            if let Some(id) = self.index.resident(*reference) {
                let entry = &mut self.index[id];
                if entry.place() == Some(*place) {
                    entry.disk.durable = true;
                }
            }
        }
    }

    fn end_write(
        &mut self,
        now: Millis,
        (reference, ended): (EntryRef, Ended),
        (to, pages): (Place, u32),
        (relocation, from_disk): (bool, bool),
        effects: &mut Effects,
    ) {
        let device = self.disks.segments[to.segment as usize].device;
        self.disks.segments[to.segment as usize].writes -= 1;
        // Pinned by the move: it is still the same entry.
        let id = reference.id;
        let lost = self.disks.devices[device].state == DeviceState::Lost;
        let copied = std::mem::take(&mut self.index[id].disk.copying);
        let leaves = copied.leaves();
        if relocation {
            self.disks.devices[device].moving_pages -= u64::from(pages);
        }
        let resident = self.index[id].state == EntryState::Resident;
        if ended == Ended::Done && !lost {
            let state = &mut self.disks.devices[device];
            state.unsynced.push((reference, to));
            if relocation {
                let wait_sync = state.syncs_begun + 1;
                if let Some(from) = self.index[id].place() {
                    self.disks.drop_live(from, pages);
                    self.disks.segments[from.segment as usize].wait_sync = wait_sync;
                }
                let entry = &mut self.index[id];
                entry.set_place(Some(to));
                entry.disk.uses = entry.disk.uses.saturating_sub(1);
                if !resident && !leaves {
                    // The new copy of a block that must not come back: its old one is marked already.
                    self.disks.devices[device].erases.push(to);
                }
            } else {
                state.counters.stored_blocks += 1;
                state.counters.stored_bytes += u64::from(pages) * PAGE_BYTES;
            }
            self.index[id].disk.durable = false;
        } else if relocation {
            self.disks.drop_live(to, pages);
            match ended {
                // What is on a GPU, too, is as good as ever.
                Ended::Corrupt | Ended::Failed if resident && from_disk && self.in_memory(id) => {
                    if let Some(place) = self.index[id].place().filter(|_| ended == Ended::Corrupt) {
                        self.disks.device_of(place).erases.push(place);
                    }
                    self.leave_device(id, Left::Removed);
                }
                Ended::Corrupt if resident => self.remove(now, id, MissReason::Quarantined, effects),
                // What cannot be read cannot be moved, and would be in the way for ever.
                Ended::Failed if resident && from_disk => {
                    self.remove(now, id, MissReason::DeviceLost, effects)
                }
                _ => {}
            }
            if ended == Ended::Corrupt {
                self.disks.devices[device].counters.corrupt_blocks += 1;
            }
        } else if self.index[id].place() == Some(to) {
            self.leave_device(id, Left::Removed);
            if resident && matches!(ended, Ended::Cancelled | Ended::NoRoom) {
                self.enqueue_write(id);
            }
        }
        if leaves {
            self.disks.devices[device].leaving_pages -= u64::from(pages);
            self.end_leaving(now, id, copied, effects);
        }
        self.drop_record_of_doomed(id);
        self.unpin(id);
    }

    /// A copy that was to leave its device while it was moved leaves now.
    fn end_leaving(&mut self, now: Millis, id: EntryId, copied: Copying, effects: &mut Effects) {
        if self.index[id].state != EntryState::Resident {
            return;
        }
        self.leave_device(id, Left::Evicted);
        if !self.in_memory(id) {
            // The copy in memory that was to stay is gone since, with its GPU.
            self.remove(now, id, MissReason::Evicted, effects);
        } else if copied == Copying::Returning {
            self.enqueue_write(id);
        }
    }
}
