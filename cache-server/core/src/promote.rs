//! Decisions about the GPU tier: what is brought there, what makes room, and where that goes.

use crate::arena::{ClassId, Occupant};
use crate::gpu::{CopyState, GpuCopy};
use crate::index::{EntryId, EntryState};
use crate::load::Loading;
use crate::moves::{CopyId, Ended, GpuWork, LoadId};
use crate::policy::Left;
use crate::state::Core;
use crate::{Effects, GpuEvent, LeaseId, Millis, Refusal, Reply, Room, SessionId, SlotId};
use cairn_proto::{BlockHash, MissReason, SpaceId};
use std::collections::BTreeSet;

/// Blocks that wait to be brought to a GPU; what is read beyond that waits for its next use.
const MAX_QUEUED: usize = 4096;

/// Whether there is a slot on a GPU.
enum Vacancy {
    Now(SlotId),
    /// Once what is going on has ended.
    Later,
    /// Everything there is held in place.
    Never,
}

impl Core {
    pub(crate) fn apply_gpu(
        &mut self,
        now: Millis,
        event: GpuEvent<'_>,
        effects: &mut Effects,
    ) -> Result<Reply, Refusal> {
        match event {
            GpuEvent::Attach(config) => self.attach_gpus(config),
            GpuEvent::Want { session, lease, first, count } => {
                return self.want_gpu((session, lease), first, count);
            }
            GpuEvent::Plan(room) => return Ok(Reply::Copies(self.plan_copies(now, room, effects))),
            GpuEvent::EndCopy { copy, ended } => self.end_copy(now, copy, ended, effects),
            GpuEvent::Spoil { space, hash } => return self.spoil_copy(now, space, hash, effects),
            GpuEvent::Lose(gpu) => self.lose_gpu(now, gpu, effects),
        }
        Ok(Reply::Done)
    }

    /// A reader that could use copies on a GPU reads blocks of its lease: those that are in host memory only are worth a copy.
    pub(crate) fn want_gpu(
        &mut self,
        (session, lease): (SessionId, LeaseId),
        first: usize,
        count: usize,
    ) -> Result<Reply, Refusal> {
        let lease = self.leases.get(&lease).filter(|lease| lease.session == session && !lease.ended);
        let lease = lease.ok_or(Refusal::UnknownLease)?;
        let end = first.saturating_add(count);
        let outside = Refusal::OutsideLease { first, end, blocks: lease.run.len() };
        let run = lease.run.get(first..end).ok_or(outside)?.to_vec();
        if !self.gpus.in_service() {
            return Ok(Reply::Done);
        }
        for id in run {
            let entry = &self.index[id];
            let here = self.gpus.copy(id).is_some();
            if here || entry.slot().is_none() || entry.state != EntryState::Resident {
                continue;
            }
            if self.gpus.queue.len() >= MAX_QUEUED {
                break;
            }
            let reference = self.index.reference(id);
            self.gpus.enqueue(reference);
        }
        Ok(Reply::Done)
    }

    /// What should be copied to and from GPUs next, within what can be taken.
    pub(crate) fn plan_copies(&mut self, now: Millis, mut room: Room, effects: &mut Effects) -> Vec<GpuWork> {
        let (mut work, mut sized) = (Vec::new(), BTreeSet::new());
        while let Some(reference) = self.gpus.queue.front().copied() {
            let queued = |copy: &GpuCopy| copy.state == CopyState::Queued;
            let wanted = self.index.resident(reference).filter(|id| {
                let entry = &self.index[*id];
                entry.slot().is_some() && self.gpus.copy(*id).is_some_and(queued)
            });
            let Some(id) = wanted else {
                self.gpus.queue.pop_front();
                self.forget_queued(reference);
                continue;
            };
            let space = self.index[id].space;
            let bytes = self.spaces.class_of(space).slot_bytes;
            let class = self.spaces[space].class;
            if sized.insert(class) {
                self.resize_gpu_policy(class);
            }
            if !{ room }.take(bytes) {
                break;
            }
            // What makes room for it must not be it. A demotion takes of the room, and then this waits for it.
            self.pin(id);
            match self.vacancy(now, id, (&mut room, &mut work), effects) {
                Vacancy::Now(to) => {
                    room.take(bytes);
                    self.gpus.queue.pop_front();
                    work.push(self.begin_copy(id, to));
                }
                Vacancy::Later => {
                    self.unpin(id);
                    break;
                }
                Vacancy::Never => {
                    self.gpus.queue.pop_front();
                    self.forget_queued(reference);
                    self.unpin(id);
                }
            }
        }
        work
    }

    /// The block is pinned until its copy ended.
    fn begin_copy(&mut self, id: EntryId, to: SlotId) -> GpuWork {
        self.gpus.fill(id, to);
        let copy = CopyId(self.next_id());
        self.gpus.filling.insert(copy, self.index.reference(id));
        let from = self.index[id].slot().unwrap_or(SlotId::NONE);
        GpuWork::Promote { copy, record: self.record_of(id, 0), from, to: self.gpus.outside(to) }
    }

    /// A copy to a GPU ended.
    pub(crate) fn end_copy(&mut self, now: Millis, copy: CopyId, ended: Ended, effects: &mut Effects) {
        let Some(reference) = self.gpus.filling.remove(&copy) else { return };
        // Pinned by the copy: it is still the same entry.
        let id = reference.id;
        let Some((state, slot)) = self.gpus.copy_of(id) else { return };
        let (gpu, space) = (self.gpus.gpu_of(slot), self.index[id].space);
        let resident = self.index[id].state == EntryState::Resident;
        if ended == Ended::Done && state == CopyState::Filling && resident {
            self.enter_gpu(id, slot);
            self.settle_gpu(space, 0);
            let bytes = self.spaces[space].block_bytes;
            self.gpus.counters[gpu].promoted_blocks += 1;
            self.gpus.counters[gpu].promoted_bytes += bytes;
        } else {
            self.release_copy(id);
        }
        if matches!(ended, Ended::Done | Ended::Failed) {
            self.note_gpu(now, gpu, ended == Ended::Failed, effects);
        }
        self.unpin(id);
    }

    /// The copy of a block on a GPU is wrong.
    pub(crate) fn spoil_copy(
        &mut self,
        now: Millis,
        space: SpaceId,
        hash: BlockHash,
        effects: &mut Effects,
    ) -> Result<Reply, Refusal> {
        let space = self.spaces.find(&space)?;
        let found = self.index.find(space, &hash).and_then(|id| Some((id, self.on_gpu(id)?)));
        if let Some((id, slot)) = found {
            let gpu = self.gpus.gpu_of(slot);
            self.gpus.counters[gpu].corrupt_blocks += 1;
            let entry = &self.index[id];
            if entry.slot().is_some() || entry.place().is_some() {
                self.leave_gpu(id, Left::Removed);
            } else {
                self.remove(now, id, MissReason::Quarantined, effects);
            }
        }
        Ok(Reply::Done)
    }

    /// A slot for a copy of a block, at the price of other copies if need be.
    fn vacancy(
        &mut self,
        now: Millis,
        id: EntryId,
        (room, work): (&mut Room, &mut Vec<GpuWork>),
        effects: &mut Effects,
    ) -> Vacancy {
        let class = self.spaces[self.index[id].space].class;
        loop {
            if let Some(slot) = self.gpus.arena.take(class) {
                return Vacancy::Now(slot);
            }
            let victims = match self.chunk_to_take_over(class) {
                Some(victims) => victims,
                None => self.gpu_victim(class).into_iter().collect(),
            };
            if victims.is_empty() {
                let leaving = self.loads.values().any(|load| load.leaves && !load.abandoned);
                return if leaving { Vacancy::Later } else { Vacancy::Never };
            }
            let mut all = true;
            for victim in victims {
                all &= self.vacate(now, victim, (room, work), effects);
            }
            if !all {
                return Vacancy::Later;
            }
        }
    }

    /// Takes a copy off its GPU; says whether its slot is free now. The only copy of a block goes to host memory first.
    fn vacate(
        &mut self,
        now: Millis,
        id: EntryId,
        (room, work): (&mut Room, &mut Vec<GpuWork>),
        effects: &mut Effects,
    ) -> bool {
        let Some(from) = self.on_gpu(id) else { return false };
        let gpu = self.gpus.gpu_of(from);
        let entry = &self.index[id];
        let space = entry.space;
        if entry.slot().is_some() || entry.place().is_some() {
            self.leave_gpu(id, Left::Evicted);
            self.gpus.counters[gpu].dropped_blocks += 1;
            return true;
        }
        let bytes = self.spaces.class_of(space).slot_bytes;
        if !room.take(bytes) {
            return false;
        }
        let Some(slot) = self.make_room(now, space, effects) else {
            self.remove(now, id, MissReason::Evicted, effects);
            return true;
        };
        self.pin(id);
        self.index[id].disk.loading = true;
        let load = LoadId(self.next_id());
        let loading = Loading {
            entry: self.index.reference(id),
            slot: Some(slot),
            scrub: false,
            gpu: Some(gpu),
            leaves: true,
            abandoned: false,
        };
        self.loads.insert(load, loading);
        work.push(GpuWork::Demote {
            load,
            record: self.record_of(id, 0),
            from: self.gpus.outside(from),
            to: slot,
        });
        false
    }

    /// What has to leave for a class to get a chunk from another class of its tenant, if it has less than its share of what the tenant has;
    /// nothing, if that is leaving already.
    fn chunk_to_take_over(&mut self, class: ClassId) -> Option<Vec<EntryId>> {
        let tenant = self.spaces.classes[class.0 as usize].tenant;
        let own = self.gpus.arena.chunk_count(class);
        let classes = (0..).map(ClassId).zip(&self.spaces.classes);
        let others: Vec<ClassId> = classes
            .filter(|(id, other)| {
                *id != class && other.tenant == tenant && self.gpus.arena.chunk_count(*id) > 0
            })
            .map(|(id, _)| id)
            .collect();
        let fair = (self.gpus.arena.chunks_of_tenant(tenant) / (others.len() + 1)).max(1);
        let donor = others.into_iter().max_by_key(|id| self.gpus.arena.chunk_count(*id))?;
        if own >= fair || self.gpus.arena.chunk_count(donor) <= fair && own > 0 {
            return None;
        }
        // One chunk at a time: what leaves other classes of the tenant already may be enough.
        let from_others = |load: &Loading| {
            let other = self.spaces[self.index[load.entry.id].space].class;
            other != class && self.spaces.classes[other.0 as usize].tenant == tenant
        };
        if self.loads.values().any(|load| load.leaves && !load.abandoned && from_others(load)) {
            return Some(Vec::new());
        }
        let victim = self.gpu_victim(donor).and_then(|victim| self.on_gpu(victim));
        let movable = |occupant: &Occupant| match occupant {
            Occupant::Free => true,
            Occupant::Block(id) => self.index[*id].pins == 0 && self.on_gpu(*id).is_some(),
            Occupant::Reserved => false,
        };
        // The chunk of what should leave next; if something is held in place there, any chunk where nothing is.
        let chunk = victim.map(|slot| slot.chunk).into_iter().chain(self.gpus.arena.chunks_of(donor));
        let arena = &self.gpus.arena;
        let chunk = { chunk }
            .find(|chunk| arena.in_service(*chunk) && arena.occupants(*chunk).iter().all(movable))?;
        let blocks = arena.occupants(chunk).iter().filter_map(|occupant| match occupant {
            Occupant::Block(id) => Some(*id),
            _ => None,
        });
        Some(blocks.collect())
    }

    /// A block came from a GPU into host memory, or for one reader; or it did not.
    pub(crate) fn end_gpu_load(
        &mut self,
        now: Millis,
        id: EntryId,
        (gpu, leaves): (usize, bool),
        ended: Ended,
        effects: &mut Effects,
    ) {
        let bytes = self.spaces[self.index[id].space].block_bytes;
        let counters = &mut self.gpus.counters[gpu];
        match ended {
            Ended::Done if leaves => counters.demoted_blocks += 1,
            Ended::Done => {
                counters.read_blocks += 1;
                counters.read_bytes += bytes;
            }
            Ended::Corrupt => counters.corrupt_blocks += 1,
            Ended::Failed | Ended::NoRoom | Ended::Cancelled => {}
        }
        if matches!(ended, Ended::Done | Ended::Failed) {
            self.note_gpu(now, gpu, ended == Ended::Failed, effects);
        }
        if self.on_gpu(id).is_none() {
            return;
        }
        let elsewhere = self.index[id].slot().is_some() || self.index[id].place().is_some();
        match ended {
            // Unless somebody began to read it meanwhile: then it is worth its place.
            Ended::Done if leaves && self.index[id].pins == 1 => self.leave_gpu(id, Left::Evicted),
            Ended::Corrupt | Ended::Failed if elsewhere => self.leave_gpu(id, Left::Removed),
            Ended::Corrupt => self.remove(now, id, MissReason::Quarantined, effects),
            Ended::Failed => self.remove(now, id, MissReason::DeviceLost, effects),
            _ => {}
        }
        // What waits for this room would ask for it again at once, and for ever.
        if leaves && ended != Ended::Done {
            self.clear_gpu_queue();
        }
    }
}
