//! Decisions about devices: what is written, where, what leaves, which segment is used again, and when a device is given up.

use crate::disk::{DeviceState, Going, PAGE_BYTES, Place, SegmentState, record_pages};
use crate::index::{EntryId, EntryRef, EntryState, OnDisk};
use crate::moves::{
    DeviceCondition, DeviceId, DeviceUsage, Ended, Found, Move, MoveId, Record, Source, Work,
};
use crate::policy::Left;
use crate::state::Core;
use crate::{Effects, Millis};
use cairn_proto::MissReason;

/// Pages of a segment that hold no record: its header, and a summary of one page and its trailer.
const MIN_OVERHEAD_PAGES: u64 = 3;

/// Segments that only reclaiming may open, so that it can always go on.
const RESERVED_SEGMENTS: usize = 1;

/// Reclaiming starts when fewer segments than this are free.
const LOW_SEGMENTS: usize = 3;

/// A device that fails so often without a success between is out of service.
const MAX_ERRORS_IN_ROW: u32 = 3;

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
        let entry = &self.index[id];
        let moving = entry.disk.queued || entry.disk.writing;
        if entry.place().is_some() || moving || entry.slot().is_none() {
            return;
        }
        let pages = self.record_pages(entry.space);
        let reference = self.index.reference(id);
        let Some(device) = self.disks.next_device() else { return };
        let device = &mut self.disks.devices[device];
        if u64::from(pages + crate::disk::summary_pages(1)) > u64::from(device.segment_pages()) {
            return;
        }
        device.queue.push_back(reference);
        self.index[id].disk.queued = true;
    }

    pub(crate) fn record_pages(&self, space: u32) -> u32 {
        record_pages(self.spaces.classes[self.spaces[space].class.0 as usize].slot_bytes)
    }

    /// A block on a device was used.
    pub(crate) fn touch_disk(&mut self, id: EntryId) {
        let entry = &self.index[id];
        if let Some(place) = entry.place()
            && entry.disk.ordered
        {
            let member = entry.member(id);
            self.disks.device_of(place).policy.touch(&mut self.disk_nodes, member);
        }
    }

    /// What a device should do next, within `room_bytes` of writing.
    pub(crate) fn plan_moves(
        &mut self,
        now: Millis,
        device: DeviceId,
        (mut room_bytes, sync): (u64, bool),
        effects: &mut Effects,
    ) -> Vec<Move> {
        let device = device.0 as usize;
        let mut moves = Vec::new();
        if self.disks.devices[device].state != DeviceState::Ready {
            return moves;
        }
        self.plan_marks(device, &mut moves);
        self.plan_seals(device, &mut moves);
        if sync {
            self.plan_sync(device, &mut moves);
        }
        self.shrink_device(now, device, effects);
        self.reclaim(now, (device, &mut room_bytes), &mut moves, effects);
        self.plan_writes(now, device, room_bytes, &mut moves);
        self.disks.devices[device].policy.requested(&mut self.disk_nodes, 0);
        moves
    }

    fn plan_marks(&mut self, device: usize, moves: &mut Vec<Move>) {
        for place in std::mem::take(&mut self.disks.devices[device].erases) {
            let id = self.disks.next_move(Going::Mark { device });
            moves.push(Move { id, work: Work::Erase(self.disks.outside(place)) });
        }
        for (space, sequence) in std::mem::take(&mut self.disks.devices[device].forgets) {
            let id = self.disks.next_move(Going::Mark { device });
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
            let generation = state.generation;
            let wanted = |(page, reference): &(u32, EntryRef)| {
                let id = self.index.occupied_by(*reference)?;
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
        let written = std::mem::take(&mut self.disks.devices[device].unsynced);
        if written.is_empty() {
            return;
        }
        let places = written.iter().filter_map(|reference| self.index.occupied_by(*reference));
        let places = places.filter_map(|id| self.index[id].place());
        let local = |place: Place| self.disks.devices[device].local(place.segment);
        let mine = places.filter(|place| self.disks.segments[place.segment as usize].device == device);
        let segments: std::collections::BTreeSet<u32> = mine.map(local).collect();
        let id = self.disks.next_move(Going::Sync { device, written });
        moves.push(Move { id, work: Work::Sync { segments: segments.into_iter().collect() } });
    }

    /// Lets copies leave until the device is as full as it may be.
    fn shrink_device(&mut self, now: Millis, device: usize, effects: &mut Effects) {
        let state = &mut self.disks.devices[device];
        let per_block = (state.live_pages / state.live_blocks.max(1)).max(1);
        // Some segments are kept free, and each has a header, a summary and a rest at its end that is too small.
        let segments = state.usable_segments(&self.disks.segments).saturating_sub(LOW_SEGMENTS) as u64;
        let in_segment = u64::from(state.segment_pages()).saturating_sub(MIN_OVERHEAD_PAGES) / per_block;
        let target = ((segments * in_segment * per_block) as f64 * state.config.fill) as u64;
        state.policy.resize((target / per_block) as usize);
        while self.disks.devices[device].live_pages > target {
            let policy = &mut self.disks.devices[device].policy;
            let Some(victim) = policy.victim(&mut self.disk_nodes, &OnDisk(&self.index)) else { return };
            self.evict_copy(now, victim, effects);
        }
    }

    /// Gives up the copy of a block on its device; the block itself leaves if that was the last copy.
    fn evict_copy(&mut self, now: Millis, id: EntryId, effects: &mut Effects) {
        let Some(place) = self.index[id].place() else { return };
        self.disks.device_of(place).counters.evicted_blocks += 1;
        if self.index[id].slot().is_none() {
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

    /// Empties the segment with the least in it when segments run out, and frees those that are empty.
    fn reclaim(
        &mut self,
        now: Millis,
        (device, room_bytes): (usize, &mut u64),
        moves: &mut Vec<Move>,
        effects: &mut Effects,
    ) {
        let range = self.disks.devices[device].segment_range();
        let state = |core: &Self, segment: u32| core.disks.segments[segment as usize].state;
        let low = self.disks.devices[device].free.len() < LOW_SEGMENTS;
        if (low || now < self.disks.devices[device].full_until)
            && !range.clone().any(|segment| {
                matches!(state(self, segment), SegmentState::Reclaiming | SegmentState::Freeing)
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
                self.empty_segment(now, (segment, room_bytes), moves, effects);
            }
            let segment_state = &mut self.disks.segments[segment as usize];
            let empty = segment_state.live_pages == 0 && segment_state.writes == 0;
            if empty && matches!(segment_state.state, SegmentState::Reclaiming | SegmentState::Sealed) {
                segment_state.state = SegmentState::Freeing;
                segment_state.records = Vec::new();
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
        (segment, room_bytes): (u32, &mut u64),
        moves: &mut Vec<Move>,
        effects: &mut Effects,
    ) {
        let device = self.disks.segments[segment as usize].device;
        for (page, reference) in self.disks.segments[segment as usize].records.clone() {
            let Some(id) = self.index.occupied_by(reference) else { continue };
            let entry = &self.index[id];
            let busy = entry.disk.loading || entry.disk.writing || entry.state != EntryState::Resident;
            if entry.place() != Some(Place { segment, page }) || busy {
                continue;
            }
            let must_stay = entry.pins > 0 && entry.slot().is_none();
            let pages = self.record_pages(entry.space);
            let bytes = u64::from(pages) * PAGE_BYTES;
            if must_stay || self.may_relocate(device, bytes) {
                if *room_bytes < bytes {
                    return;
                }
                if self.plan_write(now, (device, id), (pages, true), moves) {
                    *room_bytes -= bytes;
                    continue;
                }
                if must_stay {
                    continue;
                }
            }
            self.evict_copy(now, id, effects);
        }
    }

    fn may_relocate(&self, device: usize, bytes: u64) -> bool {
        let device = &self.disks.devices[device];
        let (stored, relocated) = (device.counters.stored_bytes, device.counters.relocated_bytes);
        (relocated + bytes) as f64 <= (device.config.max_write_amplification - 1.0) * stored as f64
    }

    fn plan_writes(&mut self, now: Millis, device: usize, mut room_bytes: u64, moves: &mut Vec<Move>) {
        if self.disks.devices[device].free.len() < RESERVED_SEGMENTS {
            // What is left of the open segment is for reclaiming, which will free one.
            return;
        }
        while let Some(reference) = self.disks.devices[device].queue.front().copied() {
            let wanted = |id: &EntryId| {
                let entry = &self.index[*id];
                entry.disk.queued && !entry.disk.writing && entry.place().is_none() && entry.slot().is_some()
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
            if room_bytes < bytes || !self.plan_write(now, (device, id), (pages, false), moves) {
                return;
            }
            room_bytes -= bytes;
            self.disks.devices[device].queue.pop_front();
        }
    }

    /// Takes room for a record and plans its writing. False when there is no room.
    fn plan_write(
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
        entry.disk.writing = true;
        entry.disk.queued = false;
        if !relocation {
            entry.set_place(Some(place));
            entry.disk.ordered = true;
            let member = entry.member(id);
            self.disks.devices[device].policy.insert(&mut self.disk_nodes, member);
        }
        let going = Going::Write { entry: reference, to: place, pages, relocation };
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
            Going::Open { segment, .. } | Going::Seal { segment } | Going::Free { segment } => {
                self.disks.segments[*segment as usize].device
            }
            Going::Write { to, .. } => self.disks.segments[to.segment as usize].device,
            Going::Sync { device, .. } | Going::Mark { device } => *device,
        };
        match going {
            Going::Open { segment, generation } if ended != Ended::Done => {
                let place = &self.disks.segments[segment as usize];
                let over = matches!(place.state, SegmentState::Free | SegmentState::Freeing);
                if over || place.generation != generation {
                    return;
                }
                let state = &mut self.disks.devices[device];
                state.open = state.open.filter(|open| *open != segment);
                let place = &mut self.disks.segments[segment as usize];
                // Writes planned into it fail as well; then it is freed, or not touched again.
                place.state = SegmentState::Unusable;
                if ended == Ended::NoRoom {
                    place.state = SegmentState::Reclaiming;
                    state.full_until = now.plus(FULL_RETRY_MS);
                }
            }
            Going::Free { segment } => {
                let state = &mut self.disks.segments[segment as usize];
                state.state = SegmentState::Free;
                self.disks.devices[device].free.insert(segment);
                self.disks.devices[device].counters.reclaimed_segments += 1;
            }
            Going::Write { entry, to, pages, relocation } => {
                self.end_write(now, (entry, ended), (to, pages, relocation), effects);
            }
            Going::Sync { written, .. } => {
                for reference in written {
                    if ended == Ended::Done {
                        if let Some(id) = self.index.resident(reference) {
                            let entry = &mut self.index[id];
                            entry.disk.durable = entry.place().is_some();
                        }
                    } else {
                        self.disks.devices[device].unsynced.push(reference);
                    }
                }
            }
            Going::Open { .. } | Going::Seal { .. } | Going::Mark { .. } => {}
        }
        self.note_result(now, device, ended, effects);
    }

    fn end_write(
        &mut self,
        now: Millis,
        (reference, ended): (EntryRef, Ended),
        (to, pages, relocation): (Place, u32, bool),
        effects: &mut Effects,
    ) {
        let device = self.disks.segments[to.segment as usize].device;
        self.disks.segments[to.segment as usize].writes -= 1;
        // Pinned by the move: it is still the same entry.
        let id = reference.id;
        let bytes = u64::from(pages) * PAGE_BYTES;
        let lost = self.disks.devices[device].state == DeviceState::Lost;
        self.index[id].disk.writing = false;
        if ended == Ended::Done && !lost {
            let counters = &mut self.disks.devices[device].counters;
            if relocation {
                counters.relocated_bytes += bytes;
                if let Some(from) = self.index[id].place() {
                    self.disks.drop_live(from, pages);
                }
                self.index[id].set_place(Some(to));
            } else {
                counters.stored_blocks += 1;
                counters.stored_bytes += bytes;
            }
            self.index[id].disk.durable = false;
            self.disks.devices[device].unsynced.push(reference);
        } else if relocation {
            self.disks.drop_live(to, pages);
            if ended == Ended::Corrupt {
                self.disks.devices[device].counters.corrupt_blocks += 1;
                if self.index[id].state == EntryState::Resident {
                    self.remove(now, id, MissReason::Quarantined, effects);
                }
            }
        } else if self.index[id].place() == Some(to) {
            self.leave_device(id, Left::Removed);
        }
        self.unpin(id);
    }

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
        state.forgets.clear();
        state.unsynced.clear();
        let queue = std::mem::take(&mut state.queue);
        effects.lost.push(device);
        for reference in queue {
            if let Some(id) = self.index.resident(reference) {
                self.index[id].disk.queued = false;
            }
        }
        let here = |(id, entry): (EntryId, &crate::index::Entry)| {
            let place = entry.place()?;
            let here = self.disks.segments[place.segment as usize].device == number;
            (here && entry.state == EntryState::Resident).then_some((id, entry.slot().is_some()))
        };
        let mut blocks: Vec<(EntryId, bool)> = self.index.occupied().filter_map(here).collect();
        blocks.sort_by_key(|(id, _)| std::cmp::Reverse(self.index[*id].depth));
        for (id, in_host) in blocks {
            if !in_host {
                self.remove(now, id, MissReason::DeviceLost, effects);
            } else {
                self.leave_device(id, Left::Removed);
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
            self.recover_block(now, number, Place { segment: global, page: found.page }, &found.record);
        }
    }

    fn recover_block(&mut self, now: Millis, device: usize, place: Place, record: &Record) {
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
        entry.disk.durable = true;
        entry.disk.ordered = true;
        let member = entry.member(id);
        self.disks.devices[device].policy.insert(&mut self.disk_nodes, member);
    }

    /// All segments of a device were read: it may be written to.
    pub(crate) fn recovery_done(&mut self, device: DeviceId, sequence: u64) {
        let state = &mut self.disks.devices[device.0 as usize];
        state.sequence = state.sequence.max(sequence);
        if state.state == DeviceState::Recovering {
            state.state = DeviceState::Ready;
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
            live_blocks: device.live_blocks,
            queued_blocks: device.queue.len() as u64,
            free_segments: device.free.len() as u64,
            counters: device.counters,
        };
        self.disks.devices.iter().enumerate().map(usage).collect()
    }
}
