//! What the tier in the memory of GPUs holds. A copy there is one more of a block that is in host memory or on a device too, or the only
//! one once those have made room. Decisions about it are in `promote`; bytes are elsewhere.

use crate::arena::{Arena, ClassId};
use crate::index::{EntryId, EntryRef, EntryState};
use crate::moves::{CopyId, GpuCounters, GpuId, GpuSlot, GpuUsage};
use crate::policy::{Left, Nodes, Policy};
use crate::state::Core;
use crate::{Effects, LeaseId, Millis, PolicyKind, SessionId, SlotId};
use cairn_proto::MissReason;
use std::collections::{BTreeMap, VecDeque};

/// A GPU that fails so often without a success between is out of service.
const MAX_ERRORS_IN_ROW: u32 = 3;

/// The GPUs of one server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuTierConfig {
    /// How many.
    pub gpus: u32,
    /// Chunks on each, of the same size as those of host memory.
    pub chunks_per_gpu: u32,
    /// Chunks on all of them together that one tenant may ever have: a chunk stays with its first tenant.
    pub max_chunks_per_tenant: usize,
    /// What leaves when there is no room.
    pub policy: PolicyKind,
}

/// One copy in the memory of a GPU, or a place in the queue for one.
pub(crate) struct GpuCopy {
    /// Where; none while it is queued.
    slot: Option<SlotId>,
    pub(crate) state: CopyState,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CopyState {
    /// It waits to be brought here.
    Queued,
    /// Its bytes are on their way.
    Filling,
    /// It can be read.
    Ready,
    /// Nobody may begin to read it; its slot is free once the block's last pin is gone.
    Spoilt,
}

pub(crate) struct GpuClass {
    pub(crate) policy: Box<dyn Policy>,
    /// Room that the policy knows of.
    capacity: usize,
}

/// A handle of no copy.
const NO_COPY: u32 = u32::MAX;

/// All GPUs, and what is on them.
pub(crate) struct Gpus {
    count: u32,
    max_chunks_per_tenant: usize,
    pub(crate) arena: Arena,
    policy: PolicyKind,
    pub(crate) classes: Vec<GpuClass>,
    pub(crate) nodes: Nodes,
    copies: Vec<GpuCopy>,
    free: Vec<u32>,
    /// The handle of each entry's copy, by entry id: as long as there is no GPU, blocks pay nothing for it.
    handles: Vec<u32>,
    /// Blocks to bring here, first come first served.
    pub(crate) queue: VecDeque<EntryRef>,
    /// Copies to here that are going on.
    pub(crate) filling: BTreeMap<CopyId, EntryRef>,
    pub(crate) lost: Vec<bool>,
    errors_in_row: Vec<u32>,
    pub(crate) counters: Vec<GpuCounters>,
    /// Copies that can be read, by GPU, and bytes of their slots.
    ready: Vec<(u64, u64)>,
}

impl Gpus {
    pub(crate) fn none(chunk_bytes: u64) -> Self {
        let config = GpuTierConfig {
            gpus: 0,
            chunks_per_gpu: 0,
            max_chunks_per_tenant: 0,
            policy: PolicyKind::default(),
        };
        Self::new(&config, chunk_bytes)
    }

    pub(crate) fn new(config: &GpuTierConfig, chunk_bytes: u64) -> Self {
        let count = config.gpus as usize;
        let chunks = config.gpus * config.chunks_per_gpu;
        Self {
            count: config.gpus,
            max_chunks_per_tenant: config.max_chunks_per_tenant,
            arena: Arena::new(chunks, chunk_bytes).keeping_tenants(config.max_chunks_per_tenant),
            policy: config.policy,
            classes: Vec::new(),
            nodes: Nodes::default(),
            copies: Vec::new(),
            free: Vec::new(),
            handles: Vec::new(),
            queue: VecDeque::new(),
            filling: BTreeMap::new(),
            lost: vec![false; count],
            errors_in_row: vec![0; count],
            counters: vec![GpuCounters::default(); count],
            ready: vec![(0, 0); count],
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(crate) fn in_service(&self) -> bool {
        self.lost.iter().any(|lost| !lost)
    }

    /// Classes are numbered as those of host memory are.
    pub(crate) fn add_class(&mut self, tenant: usize, slot_bytes: u64) {
        self.arena.add_class(tenant, slot_bytes);
        self.classes.push(GpuClass { policy: self.policy.build(0), capacity: 0 });
    }

    pub(crate) fn class(&mut self, class: ClassId) -> &mut GpuClass {
        &mut self.classes[class.0 as usize]
    }

    /// The even share of each tenant in the chunks that are in service.
    fn share_what_is_left(&mut self) {
        let left = self.lost.iter().filter(|lost| !**lost).count();
        let all = self.max_chunks_per_tenant * left;
        self.arena.keep_at_most(all.div_ceil(self.lost.len().max(1)));
    }

    /// Chunks take turns between GPUs.
    pub(crate) fn gpu_of(&self, slot: SlotId) -> usize {
        (slot.chunk % self.count.max(1)) as usize
    }

    /// The slot as the outside names it.
    pub(crate) fn outside(&self, slot: SlotId) -> GpuSlot {
        let count = self.count.max(1);
        GpuSlot { gpu: GpuId(slot.chunk % count), chunk: slot.chunk / count, index: slot.index }
    }

    fn chunks_of(&self, gpu: usize) -> impl Iterator<Item = u32> + use<> {
        (gpu as u32..self.arena.total_chunks() as u32).step_by(self.count.max(1) as usize)
    }

    fn handle(&self, id: EntryId) -> Option<u32> {
        self.handles.get(id.0 as usize).copied().filter(|handle| *handle != NO_COPY)
    }

    pub(crate) fn copy(&self, id: EntryId) -> Option<&GpuCopy> {
        Some(&self.copies[self.handle(id)? as usize])
    }

    fn copy_mut(&mut self, id: EntryId) -> Option<&mut GpuCopy> {
        let handle = self.handle(id)?;
        Some(&mut self.copies[handle as usize])
    }

    /// A place in the queue for a block that has none.
    pub(crate) fn enqueue(&mut self, entry: EntryRef) {
        self.queue.push_back(entry);
        let copy = GpuCopy { slot: None, state: CopyState::Queued };
        let handle = match self.free.pop() {
            Some(handle) => {
                self.copies[handle as usize] = copy;
                handle
            }
            None => {
                self.copies.push(copy);
                self.copies.len() as u32 - 1
            }
        };
        let position = entry.id.0 as usize;
        if self.handles.len() <= position {
            self.handles.resize(position + 1, NO_COPY);
        }
        self.handles[position] = handle;
    }

    /// State and place of a copy that has one.
    pub(crate) fn copy_of(&self, id: EntryId) -> Option<(CopyState, SlotId)> {
        self.copy(id).and_then(|copy| Some((copy.state, copy.slot?)))
    }

    /// A queued block's bytes are on their way.
    pub(crate) fn fill(&mut self, id: EntryId, slot: SlotId) {
        if let Some(copy) = self.copy_mut(id) {
            *copy = GpuCopy { slot: Some(slot), state: CopyState::Filling };
        }
    }

    /// Where a copy that can be read is.
    pub(crate) fn ready(&self, id: EntryId) -> Option<SlotId> {
        self.copy(id).filter(|copy| copy.state == CopyState::Ready)?.slot
    }
}

impl Core {
    /// The GPUs of this server, once, before anything is on them.
    pub(crate) fn attach_gpus(&mut self, config: &GpuTierConfig) {
        let mut gpus = Gpus::new(config, self.arena.chunk_bytes());
        self.spaces.classes.iter().for_each(|class| gpus.add_class(class.tenant, class.slot_bytes));
        self.gpus = gpus;
    }

    /// Where a block is in the memory of a GPU, for those who begin to read.
    pub(crate) fn on_gpu(&self, id: EntryId) -> Option<SlotId> {
        self.gpus.ready(id)
    }

    /// Whether a block needs no device.
    pub(crate) fn in_memory(&self, id: EntryId) -> bool {
        self.index[id].slot().is_some() || self.on_gpu(id).is_some()
    }

    /// A block on a GPU was used.
    pub(crate) fn touch_gpu(&mut self, id: EntryId) {
        if self.on_gpu(id).is_some() {
            let entry = &self.index[id];
            let (class, member) = (self.spaces[entry.space].class, entry.member(id));
            let Self { gpus, .. } = self;
            gpus.classes[class.0 as usize].policy.touch(&mut gpus.nodes, member);
        }
    }

    /// A request is over, or told of: see [`Policy::requested`].
    pub(crate) fn settle_gpu(&mut self, space: u32, asked: usize) {
        if self.gpus.is_empty() {
            return;
        }
        let class = self.spaces[space].class;
        let Self { gpus, .. } = self;
        let policy = &mut gpus.classes[class.0 as usize].policy;
        policy.requested(&mut gpus.nodes, asked);
        policy.settle(&mut gpus.nodes);
    }

    /// A copy arrived: it can be read.
    pub(crate) fn enter_gpu(&mut self, id: EntryId, slot: SlotId) {
        let entry = &self.index[id];
        let (space, member) = (entry.space, entry.member(id));
        let Some(copy) = self.gpus.copy_mut(id) else { return };
        copy.state = CopyState::Ready;
        self.gpus.arena.occupy(slot, id);
        let class = self.spaces[space].class;
        let bytes = self.spaces.class_of(space).slot_bytes;
        let gpu = self.gpus.gpu_of(slot);
        let Self { gpus, .. } = self;
        gpus.classes[class.0 as usize].policy.insert(&mut gpus.nodes, member);
        gpus.ready[gpu].0 += 1;
        gpus.ready[gpu].1 += bytes;
    }

    /// No more reads of a copy begin. Its slot is free at once, or with the block's last pin.
    pub(crate) fn leave_gpu(&mut self, id: EntryId, left: Left) {
        let entry = &self.index[id];
        let (space, pinned, member) = (entry.space, entry.pins > 0, entry.member(id));
        let Some(copy) = self.gpus.copy_mut(id) else { return };
        let (state, slot) = (copy.state, copy.slot);
        copy.state = CopyState::Spoilt;
        match (state, slot) {
            (CopyState::Queued, _) => return self.release_copy(id),
            (CopyState::Ready, Some(slot)) => {
                let class = self.spaces[space].class;
                let bytes = self.spaces.class_of(space).slot_bytes;
                let gpu = self.gpus.gpu_of(slot);
                let Self { gpus, .. } = self;
                gpus.classes[class.0 as usize].policy.remove(&mut gpus.nodes, member, left);
                gpus.ready[gpu].0 -= 1;
                gpus.ready[gpu].1 -= bytes;
            }
            _ => {}
        }
        if !pinned {
            self.release_copy(id);
        }
    }

    /// Gives the slot of a copy that nobody reads back.
    pub(crate) fn release_copy(&mut self, id: EntryId) {
        let Some(handle) = self.gpus.handle(id) else { return };
        self.gpus.handles[id.0 as usize] = NO_COPY;
        if let Some(slot) = self.gpus.copies[handle as usize].slot.take() {
            self.gpus.arena.give_back(slot);
        }
        self.gpus.free.push(handle);
    }

    /// The last pin of a block is gone.
    pub(crate) fn release_spoilt_copy(&mut self, id: EntryId) {
        let spoilt = |copy: &GpuCopy| copy.state == CopyState::Spoilt;
        if self.gpus.copy(id).is_some_and(spoilt) {
            self.release_copy(id);
        }
    }

    /// The copy that should leave a class next. Whoever reads a block, or moves it, has it pinned, and only copies that can be read are in a
    /// policy's order.
    pub(crate) fn gpu_victim(&mut self, class: ClassId) -> Option<EntryId> {
        let Self { gpus, index, .. } = self;
        gpus.classes[class.0 as usize].policy.victim(&mut gpus.nodes, index)
    }

    /// Tells a class's policy how many copies there may be at present.
    pub(crate) fn resize_gpu_policy(&mut self, class: ClassId) {
        let capacity = self.gpus.arena.reach(class, usize::MAX);
        let class = self.gpus.class(class);
        if class.capacity != capacity {
            class.capacity = capacity;
            class.policy.resize(capacity);
        }
    }

    /// Counts errors, and gives a GPU up that returns nothing else.
    pub(crate) fn note_gpu(&mut self, now: Millis, gpu: usize, failed: bool, effects: &mut Effects) {
        if !failed {
            self.gpus.errors_in_row[gpu] = 0;
            return;
        }
        self.gpus.errors_in_row[gpu] += 1;
        self.gpus.counters[gpu].errors += 1;
        if self.gpus.errors_in_row[gpu] >= MAX_ERRORS_IN_ROW {
            self.lose_gpu(now, GpuId(gpu as u32), effects);
        }
    }

    /// Takes a GPU out of service: what was only there is gone. Who reads there will notice.
    pub(crate) fn lose_gpu(&mut self, now: Millis, gpu: GpuId, effects: &mut Effects) {
        let number = gpu.0 as usize;
        if self.gpus.lost.get(number).is_none_or(|lost| *lost) {
            return;
        }
        self.gpus.lost[number] = true;
        effects.lost_gpus.push(gpu);
        for chunk in self.gpus.chunks_of(number) {
            self.gpus.arena.retire(chunk);
        }
        self.gpus.share_what_is_left();
        // A driver that hangs never ends its copies.
        let mut left = Vec::new();
        for load in self.loads.values_mut().filter(|load| load.gpu == Some(number) && !load.abandoned) {
            load.abandoned = true;
            self.index[load.entry.id].disk.loading = false;
            left.push(load.entry.id);
        }
        left.into_iter().for_each(|id| self.drop_record_of_doomed(id));
        let here = |(id, entry): (EntryId, &crate::index::Entry)| {
            let copy = self.gpus.copy(id)?;
            let here = self.gpus.gpu_of(copy.slot?) == number;
            (here && entry.state == EntryState::Resident).then_some(id)
        };
        let mut blocks: Vec<EntryId> = self.index.occupied().filter_map(here).collect();
        blocks.sort_by_key(|id| std::cmp::Reverse(self.index[*id].depth));
        for id in blocks {
            let elsewhere = self.index[id].slot().is_some() || self.index[id].place().is_some();
            if elsewhere {
                self.leave_gpu(id, Left::Removed);
            } else {
                self.remove(now, id, MissReason::DeviceLost, effects);
            }
        }
        if !self.gpus.in_service() {
            self.clear_gpu_queue();
        }
    }

    /// Nothing waits to be brought to a GPU any more.
    pub(crate) fn clear_gpu_queue(&mut self) {
        for reference in std::mem::take(&mut self.gpus.queue) {
            self.forget_queued(reference);
        }
    }

    /// A block is not in the queue any more.
    pub(crate) fn forget_queued(&mut self, reference: EntryRef) {
        if let Some(id) = self.index.resident(reference) {
            let queued = |copy: &GpuCopy| copy.state == CopyState::Queued;
            if self.gpus.copy(id).is_some_and(queued) {
                self.release_copy(id);
            }
        }
    }

    /// Whether a lease holds a block in this chunk of a GPU: then the chunk is of the lease's tenant.
    pub fn is_in_gpu_chunk(&self, session: SessionId, lease: LeaseId, (gpu, chunk): (GpuId, u32)) -> bool {
        let lease = self.leases.get(&lease).filter(|lease| lease.session == session && !lease.ended);
        let inside = |id: &EntryId| {
            let slot = self.on_gpu(*id).map(|slot| self.gpus.outside(slot));
            slot.is_some_and(|slot| slot.gpu == gpu && slot.chunk == chunk)
        };
        lease.is_some_and(|lease| lease.run.iter().any(inside))
    }

    /// Every GPU.
    pub fn gpus(&self) -> Vec<GpuUsage> {
        let chunks = self.gpus.arena.total_chunks() as u64 / u64::from(self.gpus.count.max(1));
        let usage = |gpu: usize| GpuUsage {
            gpu: GpuId(gpu as u32),
            lost: self.gpus.lost[gpu],
            capacity_bytes: chunks * self.gpus.arena.chunk_bytes(),
            blocks: self.gpus.ready[gpu].0,
            bytes: self.gpus.ready[gpu].1,
            counters: self.gpus.counters[gpu],
        };
        (0..self.gpus.count as usize).map(usage).collect()
    }

    /// Blocks that wait to be brought to a GPU.
    pub fn gpu_queue(&self) -> usize {
        self.gpus.queue.len()
    }

    /// The invariants of this tier, recounted.
    pub(crate) fn audit_gpus(&self) -> Result<(), String> {
        let (mut filling, mut blocks, mut ordered) = (0, 0, vec![0; self.gpus.classes.len()]);
        let mut ready = vec![(0, 0); self.gpus.count as usize];
        let mut handles = std::collections::BTreeSet::new();
        for (id, entry) in self.index.occupied() {
            let Some(copy) = self.gpus.copy(id) else { continue };
            if !handles.insert(self.gpus.handle(id)) {
                return Err(format!("{id:?} shares its copy on a GPU"));
            }
            let moving = self.gpus.filling.values().any(|reference| reference.id == id);
            match (copy.state, copy.slot) {
                (CopyState::Queued, None) if entry.state == EntryState::Resident => {}
                (CopyState::Filling | CopyState::Spoilt, Some(_)) if moving => filling += 1,
                (CopyState::Spoilt, Some(_)) if entry.pins > 0 => blocks += 1,
                (CopyState::Ready, Some(slot)) if entry.state == EntryState::Resident => {
                    blocks += 1;
                    let class = self.spaces[entry.space].class.0 as usize;
                    ordered[class] += 1;
                    let gpu = self.gpus.gpu_of(slot);
                    ready[gpu].0 += 1;
                    ready[gpu].1 += self.spaces.classes[class].slot_bytes;
                    let occupant = self.gpus.arena.occupants(slot.chunk).get(slot.index as usize);
                    if occupant != Some(&crate::arena::Occupant::Block(id)) || self.gpus.lost[gpu] {
                        return Err(format!("{id:?} is not in its slot on a GPU: {occupant:?}"));
                    }
                }
                other => return Err(format!("{id:?} on a GPU is {other:?}, with {} pins", entry.pins)),
            }
        }
        let recount = self.gpus.arena.recount();
        if recount != (filling, blocks) || self.gpus.arena.used_slots() != filling + blocks {
            return Err(format!("slots on GPUs: {recount:?}, held {:?}", (filling, blocks)));
        }
        if ready != self.gpus.ready {
            return Err(format!("copies on GPUs: counted {:?}, not {ready:?}", self.gpus.ready));
        }
        let lens: Vec<usize> = self.gpus.classes.iter().map(|class| class.policy.len()).collect();
        if lens != ordered {
            return Err(format!("policies of GPUs order {lens:?}, not {ordered:?}"));
        }
        let held = self.gpus.copies.len() - self.gpus.free.len();
        if held != handles.len() {
            return Err(format!("{held} copies on GPUs are held by {} entries", handles.len()));
        }
        Ok(())
    }
}
