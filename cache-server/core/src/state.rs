//! The one owner of all state, and the one way to change it. Rules that span parts (removal, pins, slots) are here;
//! reading is in `lease`, writing in `reserve`.

use crate::arena::Arena;
use crate::disk::Disks;
use crate::gpu::Gpus;
use crate::history::History;
use crate::index::{EntryId, EntryState, Index};
use crate::lease::Lease;
use crate::load::Loading;
use crate::moves::{LoadId, Record};
use crate::policy::{Left, Nodes};
use crate::reserve::{MAX_ANCESTOR_WALK, Reservation};
use crate::reuse::Reuse;
use crate::spaces::Spaces;
use crate::timers::Timers;
use crate::{
    BlockState, ConfigError, CoreConfig, Counters, Effects, Event, LeaseId, Millis, Refusal, Removed, Reply,
    ReservationId, SessionId, SlotId, SpaceUsage, Usage,
};
use cairn_proto::{BlockHash, KeySpace, MissReason, SpaceId, Tier};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Default)]
pub(crate) struct Session {
    pub(crate) leases: BTreeSet<LeaseId>,
    pub(crate) reservations: BTreeSet<ReservationId>,
}

/// All decisions of one cache server. See the package documentation.
pub struct Core {
    pub(crate) config: CoreConfig,
    pub(crate) index: Index,
    pub(crate) nodes: Nodes,
    pub(crate) arena: Arena,
    pub(crate) spaces: Spaces,
    pub(crate) sessions: BTreeMap<SessionId, Session>,
    pub(crate) leases: BTreeMap<LeaseId, Lease>,
    pub(crate) reservations: BTreeMap<ReservationId, Reservation>,
    pub(crate) timers: Timers,
    pub(crate) history: History,
    pub(crate) counters: Counters,
    /// Of host memory.
    pub(crate) resident_bytes: u64,
    pub(crate) disks: Disks,
    pub(crate) disk_nodes: Nodes,
    pub(crate) loads: BTreeMap<LoadId, Loading>,
    pub(crate) reuse: Reuse,
    pub(crate) gpus: Gpus,
    last_id: u64,
}

impl Core {
    /// An empty core.
    ///
    /// # Errors
    /// When a setting cannot work.
    pub fn new(config: CoreConfig) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            index: Index::new(config.hash_seed),
            nodes: Nodes::default(),
            arena: Arena::new(config.host_chunks, config.chunk_bytes),
            spaces: Spaces::new(&config),
            sessions: BTreeMap::new(),
            leases: BTreeMap::new(),
            reservations: BTreeMap::new(),
            timers: Timers::default(),
            history: History::new(config.history_entries),
            counters: Counters::default(),
            resident_bytes: 0,
            disks: Disks::default(),
            disk_nodes: Nodes::default(),
            loads: BTreeMap::new(),
            reuse: Reuse::default(),
            gpus: Gpus::none(config.chunk_bytes),
            last_id: 0,
            config,
        })
    }

    /// Applies one event that happened at `now`, after everything that was due before it.
    pub fn apply(&mut self, now: Millis, event: Event<'_>) -> Effects {
        let mut effects = Effects::default();
        self.expire(now);
        let reply = match event {
            Event::OpenSession => Ok(self.open_session()),
            Event::EndSession(session) => self.end_session(now, session),
            Event::OpenSpace { session, space } => self.open_space(now, session, space),
            Event::Lookup { session, space, hashes, ttl_ms } => {
                self.lookup(now, session, space, hashes, ttl_ms)
            }
            Event::Renew { session, lease, ttl_ms } => self.renew(now, session, lease, ttl_ms),
            Event::Release { session, lease } => self.release(session, lease),
            Event::BeginRead { session, lease, first, count } => {
                self.begin_read(session, lease, first, count)
            }
            Event::EndRead(lease) => {
                self.end_read(now, lease);
                Ok(Reply::Done)
            }
            Event::Reserve { session, space, parent, hashes, ttl_ms } => {
                self.reserve(now, (session, space), parent, (hashes, ttl_ms), &mut effects)
            }
            Event::BeginFill { session, reservation } => self.begin_fill(session, reservation),
            Event::Commit { reservation, block, checksum } => {
                Ok(Reply::Committed(self.commit(now, reservation, block, checksum)))
            }
            Event::EndFill(reservation) => {
                self.end_fill(now, reservation);
                Ok(Reply::Done)
            }
            Event::Abort { session, reservation } => self.abort(now, session, reservation),
            Event::Quarantine { space, hash } => self.quarantine(now, space, hash, &mut effects),
            Event::Flush(space) => self.flush(now, space, &mut effects),
            Event::Load { lease, position } => self.load(now, lease, position, &mut effects),
            Event::EndLoad { load, ended } | Event::EndScrub { load, ended } => {
                self.end_load(now, load, ended, &mut effects);
                Ok(Reply::Done)
            }
            Event::AttachDevice(config) => Ok(Reply::Device(self.disks.attach(config.clone()))),
            Event::Recovered { device, segment, generation, sealed, found } => {
                self.recovered(now, device, (segment, generation, sealed), found);
                Ok(Reply::Done)
            }
            Event::RecoveryDone { device, sequence } => {
                self.recovery_done(device, sequence);
                Ok(Reply::Done)
            }
            Event::LoseDevice(device) => {
                self.lose_device(now, device, &mut effects);
                Ok(Reply::Done)
            }
            Event::PlanMoves { device, room, sync } => {
                Ok(Reply::Moves(self.plan_moves(now, device, (room, sync), &mut effects)))
            }
            Event::EndMove { id, ended } => {
                self.end_move(now, id, ended, &mut effects);
                Ok(Reply::Done)
            }
            Event::BeginScrub { device, after } => Ok(Reply::Scrub(self.begin_scrub(device, after))),
            Event::Gpu(event) => self.apply_gpu(now, event, &mut effects),
            Event::Explain { space, hashes } => self.explain(now, space, hashes),
            Event::Tick => Ok(Reply::Done),
        };
        effects.reply = reply.unwrap_or_else(Reply::Refused);
        effects.stale = self.arena.take_stale();
        effects
    }

    /// Totals since the start.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// What is held now.
    pub fn usage(&self) -> Usage {
        Usage {
            sessions: self.sessions.len(),
            leases: self.leases.len(),
            reservations: self.reservations.len(),
            resident_blocks: self.index.len(),
            host_blocks: self.spaces.classes.iter().map(|class| class.blocks).sum(),
            resident_bytes: self.resident_bytes,
            gpu_blocks: self.gpus().iter().map(|gpu| gpu.blocks as usize).sum(),
            used_slots: self.arena.used_slots(),
            free_chunks: self.arena.free_chunks(),
        }
    }

    /// What leaves when there is no room.
    pub fn policy(&self) -> crate::PolicyKind {
        self.config.policy
    }

    /// Every declared space and what it holds.
    pub fn spaces(&self) -> Vec<SpaceUsage> {
        let usage = |space: &crate::spaces::Space| SpaceUsage {
            id: space.id,
            space: space.key.clone(),
            block_bytes: space.block_bytes,
            resident_blocks: space.resident,
        };
        self.spaces.iter().map(usage).collect()
    }

    /// Flushed spaces that devices have not yet written down.
    pub fn pending_forgets(&self) -> usize {
        self.disks.pending_forgets()
    }

    /// Whose a space is.
    pub fn tenant(&self, id: &SpaceId) -> Option<&str> {
        let space = &self.spaces[self.spaces.find(id).ok()?];
        Some(&self.spaces.tenants[self.spaces.classes[space.class.0 as usize].tenant].name)
    }

    /// The bytes of a block of a space, and of the slots that hold them.
    pub fn block_bytes(&self, id: &SpaceId) -> Option<(u64, u64)> {
        let space = &self.spaces[self.spaces.find(id).ok()?];
        Some((space.block_bytes, self.spaces.classes[space.class.0 as usize].slot_bytes))
    }

    fn open_session(&mut self) -> Reply {
        let id = SessionId(self.next_id());
        self.sessions.insert(id, Session::default());
        Reply::Session(id)
    }

    fn open_space(&mut self, now: Millis, session: SessionId, key: &KeySpace) -> Result<Reply, Refusal> {
        self.session(session)?;
        let slot_bytes = key.block_bytes().next_multiple_of(self.config.slot_align_bytes);
        let chunk_bytes = self.arena.chunk_bytes();
        if slot_bytes > chunk_bytes {
            return Err(Refusal::BlockTooLarge { block_bytes: slot_bytes, chunk_bytes });
        }
        let Self { spaces, arena, gpus, config, .. } = self;
        let new_class = |tenant| {
            gpus.add_class(tenant, slot_bytes);
            (arena.add_class(tenant, slot_bytes), config.policy.build(0))
        };
        spaces.open(key, slot_bytes, new_class)?;
        let space = self.spaces.find(&key.id())?;
        self.spaces.class_of(space).used = now;
        Ok(Reply::Done)
    }

    /// The space of a block that a device remembers.
    pub(crate) fn recovered_space(&mut self, record: &Record, slot_bytes: u64) -> Result<u32, Refusal> {
        let chunk_bytes = self.arena.chunk_bytes();
        if slot_bytes > chunk_bytes {
            return Err(Refusal::BlockTooLarge { block_bytes: slot_bytes, chunk_bytes });
        }
        let Self { spaces, arena, gpus, config, .. } = self;
        let names = (record.space, &*record.tenant);
        let new_class = |tenant| {
            gpus.add_class(tenant, slot_bytes);
            (arena.add_class(tenant, slot_bytes), config.policy.build(0))
        };
        spaces.enter(names, (record.block_bytes, slot_bytes), new_class)
    }

    fn quarantine(
        &mut self,
        now: Millis,
        space: SpaceId,
        hash: BlockHash,
        effects: &mut Effects,
    ) -> Result<Reply, Refusal> {
        let space = self.spaces.find(&space)?;
        if let Some(id) = self.index.find(space, &hash) {
            self.remove(now, id, MissReason::Quarantined, effects);
        }
        Ok(Reply::Done)
    }

    fn flush(&mut self, now: Millis, space: SpaceId, effects: &mut Effects) -> Result<Reply, Refusal> {
        let space = self.spaces.find(&space)?;
        let of_space = |(id, entry): (EntryId, &crate::index::Entry)| {
            (entry.space == space && entry.state == EntryState::Resident).then_some(id)
        };
        let mut blocks: Vec<EntryId> = self.index.occupied().filter_map(of_space).collect();
        // Policies that know chains are quickest when children go before their parents.
        blocks.sort_by_key(|id| std::cmp::Reverse(self.index[*id].depth));
        for id in &blocks {
            self.remove(now, *id, MissReason::Removed, effects);
        }
        let id = self.spaces[space].id;
        self.disks.forget(id);
        Ok(Reply::Flushed(blocks.len() as u64))
    }

    fn explain(&self, now: Millis, space: SpaceId, hashes: &[BlockHash]) -> Result<Reply, Refusal> {
        let space = self.spaces.find(&space)?;
        let mut known = BTreeMap::new();
        let states = hashes.iter().map(|hash| self.explain_block(now, space, hash, &mut known));
        Ok(Reply::Explained(states.collect()))
    }

    /// `known`: blocks whose reachability was found out on the way, so that no block is walked over twice in one event.
    fn explain_block(
        &self,
        now: Millis,
        space: u32,
        hash: &BlockHash,
        known: &mut BTreeMap<EntryId, bool>,
    ) -> BlockState {
        let Some(id) = self.index.find(space, hash) else {
            let (reason, at) = self.history.find(space, hash).unwrap_or((MissReason::NeverStored, now));
            return BlockState::Absent { reason, ago_ms: now.since(at) };
        };
        let entry = &self.index[id];
        BlockState::Resident {
            tier: self.tier(id),
            durable: entry.disk.durable,
            bytes: self.spaces.classes[self.spaces[space].class.0 as usize].slot_bytes,
            leases: entry.pins,
            idle_ms: now.since(entry.touched),
            checksum: entry.checksum,
            reachable: self.reachable(space, id, known),
        }
    }

    /// The fastest tier that has a block.
    pub(crate) fn tier(&self, id: EntryId) -> Tier {
        match self.index[id].slot() {
            _ if self.on_gpu(id).is_some() => Tier::Gpu,
            Some(_) => Tier::Host,
            None => Tier::Nvme,
        }
    }

    /// Bounded, because a client that invents its own hashes can publish a chain that bites its tail.
    fn reachable(&self, space: u32, mut id: EntryId, known: &mut BTreeMap<EntryId, bool>) -> bool {
        let mut walked = Vec::new();
        let mut reachable = false;
        for _ in 0..MAX_ANCESTOR_WALK {
            if let Some(found) = known.get(&id) {
                reachable = *found;
                break;
            }
            walked.push(id);
            let Some(parent) = &self.index[id].parent else {
                reachable = true;
                break;
            };
            match self.index.find(space, parent) {
                Some(parent) => id = parent,
                None => break,
            }
        }
        known.extend(walked.into_iter().map(|id| (id, reachable)));
        reachable
    }

    pub(crate) fn session(&mut self, id: SessionId) -> Result<&mut Session, Refusal> {
        self.sessions.get_mut(&id).ok_or(Refusal::UnknownSession)
    }

    /// Ids of sessions, leases and reservations are never reused, and differ from those of any other start: a counter, mixed
    /// by a bijection (the finaliser of splitmix64) with this start's seed. Never 0, which means "none" on the wire.
    pub(crate) fn next_id(&mut self) -> u64 {
        loop {
            self.last_id += 1;
            let mut id = self.last_id.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.config.hash_seed[0];
            id = (id ^ (id >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            id = (id ^ (id >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            id ^= id >> 31;
            if id != 0 {
                return id;
            }
        }
    }

    /// Takes a resident block out of the index. What it holds is free at once, or when its last pin is gone.
    pub(crate) fn remove(&mut self, now: Millis, id: EntryId, reason: MissReason, effects: &mut Effects) {
        let entry = &self.index[id];
        let (space, hash, pinned, ordered) = (entry.space, entry.hash, entry.pins > 0, entry.ordered);
        let (member, in_host, place) = (entry.member(id), entry.slot().is_some(), entry.place());
        let left = if reason == MissReason::Evicted { Left::Evicted } else { Left::Removed };
        self.index.doom(id);
        self.spaces[space].resident -= 1;
        let class = self.spaces.class_of(space);
        if ordered {
            class.policy.remove(&mut self.nodes, member, left);
        }
        if in_host {
            self.resident_bytes -= class.slot_bytes;
            class.evictable -= usize::from(!pinned);
            class.blocks -= 1;
        }
        self.unorder_disk(id, left);
        self.leave_gpu(id, left);
        match (reason, place) {
            (MissReason::Evicted, _) => self.counters.evicted_blocks += 1,
            (MissReason::Quarantined, None) => self.counters.quarantined_blocks += 1,
            (MissReason::Quarantined, Some(place)) => {
                self.counters.quarantined_blocks += 1;
                self.disks.device_of(place).erases.push(place);
            }
            _ => {}
        }
        self.history.record(space, &hash, reason, now);
        effects.removed.push(Removed { hash, reason });
        if !pinned {
            self.free_entry(id);
        } else {
            self.drop_record_of_doomed(id);
        }
    }

    /// Nobody reads the record of a block that left the index, unless a move is at it.
    pub(crate) fn drop_record_of_doomed(&mut self, id: EntryId) {
        let entry = &mut self.index[id];
        let busy = entry.disk.loading || entry.disk.writing() || entry.state != EntryState::Doomed;
        let Some(place) = entry.place().filter(|_| !busy) else { return };
        entry.set_place(None);
        let pages = self.record_pages(self.index[id].space);
        self.disks.drop_live(place, pages);
    }

    /// Makes room in host memory: the block leaves, unless a device has it too.
    pub(crate) fn evict_from_host(&mut self, now: Millis, id: EntryId, effects: &mut Effects) {
        if self.index[id].place().is_some() || self.on_gpu(id).is_some() {
            self.counters.demoted_blocks += 1;
            self.leave_host(id, Left::Evicted);
        } else {
            self.remove(now, id, MissReason::Evicted, effects);
        }
    }

    /// Holds a block in place.
    pub(crate) fn pin(&mut self, id: EntryId) {
        let entry = &mut self.index[id];
        entry.pins += 1;
        if entry.pins == 1 && entry.slot().is_some() && entry.state == EntryState::Resident {
            let space = entry.space;
            self.spaces.class_of(space).evictable -= 1;
        }
    }

    pub(crate) fn unpin(&mut self, id: EntryId) {
        let entry = &mut self.index[id];
        entry.pins -= 1;
        if entry.pins > 0 {
            return;
        }
        match entry.state {
            EntryState::Doomed => return self.free_entry(id),
            _ if entry.slot().is_some() => {
                let space = entry.space;
                self.spaces.class_of(space).evictable += 1;
            }
            _ => {}
        }
        self.release_spoilt_copy(id);
    }

    fn free_entry(&mut self, id: EntryId) {
        let entry = &self.index[id];
        let (space, slot, place) = (entry.space, entry.slot(), entry.place());
        self.release_copy(id);
        self.index.free(id);
        if let Some(slot) = slot {
            self.free_slot(space, slot);
        }
        if let Some(place) = place {
            self.disks.drop_live(place, self.record_pages(space));
        }
    }

    pub(crate) fn free_slot(&mut self, space: u32, slot: SlotId) {
        self.arena.give_back(slot);
        let tenant = self.spaces.class_of(space).tenant;
        self.spaces.tenants[tenant].slots -= 1;
    }
}
