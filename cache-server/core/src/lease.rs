//! Reading: lookups, leases, and reads in progress.

use crate::index::{EntryId, EntryState};
use crate::state::Core;
use crate::timers::Timer;
use crate::{LeaseId, Millis, ReadSlot, Refusal, Reply, SessionId, SlotId};
use cairn_proto::{BlockHash, MissReason, Outcome, SpaceId};

pub(crate) struct Lease {
    pub(crate) session: SessionId,
    pub(crate) space: u32,
    pub(crate) deadline: Millis,
    /// The run, first block first. Each entry carries one pin of this lease.
    pub(crate) run: Vec<EntryId>,
    /// Reads in progress.
    pub(crate) reads: u32,
    /// Ended while a read was in progress: invisible to its session, released with the last read.
    pub(crate) ended: bool,
    /// Blocks of it were brought into host memory, in whatever order they arrived.
    pub(crate) loaded: bool,
}

impl Core {
    /// Walks the chain to its first hole, leases what is before it, and says for every block what became of it.
    pub(crate) fn lookup(
        &mut self,
        now: Millis,
        session: SessionId,
        space: SpaceId,
        hashes: &[BlockHash],
        ttl_ms: u32,
    ) -> Result<Reply, Refusal> {
        let held = self.session(session)?.leases.len();
        let space = self.spaces.find(&space)?;
        let mut run: Vec<EntryId> = Vec::with_capacity(hashes.len());
        self.walk(space, hashes, &mut run);
        self.spaces.class_of(space).used = now;
        let busy = held >= self.config.max_leases_per_session;
        let mut outcomes = Vec::with_capacity(hashes.len());
        let outcome = |id: &EntryId| if busy { Outcome::Busy } else { Outcome::Hit(self.tier(*id)) };
        outcomes.extend(run.iter().map(outcome));
        if let Some(hole) = hashes.get(run.len()) {
            let reason = match self.index.find(space, hole) {
                // It is there, but not after these blocks.
                Some(_) => MissReason::ParentMissing,
                None => self.history.find(space, hole).map_or(MissReason::NeverStored, |(reason, _)| reason),
            };
            outcomes.push(Outcome::Miss(reason));
            outcomes.resize(hashes.len(), Outcome::Miss(MissReason::ParentMissing));
        }
        self.counters.lookup(&outcomes);
        if run.is_empty() || busy {
            return Ok(Reply::Found { lease: None, outcomes, checksums: Vec::new() });
        }
        let checksums = self.touch_and_pin(now, space, (&run, hashes.len()));
        let lease = LeaseId(self.next_id());
        let deadline = now.plus(u64::from(ttl_ms));
        self.timers.set(deadline, Timer::Lease(lease));
        self.leases
            .insert(lease, Lease { session, space, deadline, run, reads: 0, ended: false, loaded: false });
        self.session(session)?.leases.insert(lease);
        Ok(Reply::Found { lease: Some(lease), outcomes, checksums })
    }

    /// The longest run from the start of a prompt in which every block is resident and follows the one before it. So no
    /// block can be in a run twice.
    fn walk(&self, space: u32, hashes: &[BlockHash], run: &mut Vec<EntryId>) {
        let mut before = None;
        for hash in hashes {
            let Some(id) = self.index.find(space, hash) else { return };
            if self.index[id].parent != before {
                return;
            }
            run.push(id);
            before = Some(*hash);
        }
    }

    /// Tail first, so that the head of the chain ends most recent.
    fn touch_and_pin(
        &mut self,
        now: Millis,
        space: u32,
        (run, asked): (&[EntryId], usize),
    ) -> Vec<cairn_proto::Checksum> {
        let class = self.spaces[space].class;
        let mut checksums = Vec::with_capacity(run.len());
        let (on_devices, on_gpus) = (!self.disks.devices.is_empty(), !self.gpus.is_empty());
        for id in run.iter().rev() {
            let entry = &mut self.index[*id];
            let class = &mut self.spaces.classes[class.0 as usize];
            class.evictable -= usize::from(entry.pins == 0 && entry.slot().is_some());
            entry.pins += 1;
            entry.touched = now;
            checksums.push(entry.checksum);
            if entry.ordered {
                class.policy.touch(&mut self.nodes, entry.member(*id));
            }
            if on_devices {
                self.touch_disk(*id);
                self.used_again(*id);
            }
            if on_gpus {
                self.touch_gpu(*id);
            }
        }
        self.settle(run.first().copied(), asked);
        checksums.reverse();
        checksums
    }

    /// A request is over: the policies that saw its blocks are told.
    fn settle(&mut self, one: Option<EntryId>, asked: usize) {
        let Some(id) = one else { return };
        let space = self.index[id].space;
        self.settle_host(space, asked);
        self.settle_gpu(space, asked);
        for device in &mut self.disks.devices {
            device.policy.requested(&mut self.disk_nodes, asked);
            device.policy.settle(&mut self.disk_nodes);
        }
    }

    pub(crate) fn settle_host(&mut self, space: u32, asked: usize) {
        let policy = &mut self.spaces.class_of(space).policy;
        policy.requested(&mut self.nodes, asked);
        policy.settle(&mut self.nodes);
    }

    /// A block is part of a chain that is being stored: no use of its own, but not older than what follows it.
    pub(crate) fn refresh(&mut self, id: EntryId) {
        let entry = &self.index[id];
        let member = entry.member(id);
        if entry.ordered {
            self.spaces.class_of(entry.space).policy.refresh(&mut self.nodes, member);
        }
        if let Some(place) = entry.place()
            && entry.disk.ordered
        {
            self.disks.device_of(place).policy.refresh(&mut self.disk_nodes, member);
        }
    }

    pub(crate) fn renew(
        &mut self,
        now: Millis,
        session: SessionId,
        id: LeaseId,
        ttl_ms: u32,
    ) -> Result<Reply, Refusal> {
        let lease = visible(&mut self.leases, session, id)?;
        self.timers.clear(lease.deadline, Timer::Lease(id));
        lease.deadline = now.plus(u64::from(ttl_ms));
        self.timers.set(lease.deadline, Timer::Lease(id));
        Ok(Reply::Done)
    }

    pub(crate) fn release(&mut self, session: SessionId, id: LeaseId) -> Result<Reply, Refusal> {
        self.session(session)?;
        if let Ok(lease) = visible(&mut self.leases, session, id) {
            self.timers.clear(lease.deadline, Timer::Lease(id));
            self.end_lease(id);
        }
        Ok(Reply::Done)
    }

    pub(crate) fn begin_read(
        &mut self,
        session: SessionId,
        id: LeaseId,
        first: usize,
        count: usize,
    ) -> Result<Reply, Refusal> {
        let lease = visible(&mut self.leases, session, id)?;
        let end = first.saturating_add(count);
        let Some(run) = lease.run.get(first..end) else {
            return Err(Refusal::OutsideLease { first, end, blocks: lease.run.len() });
        };
        let slot = |id: &EntryId| {
            let entry = &self.index[*id];
            let gpu = self.gpus.ready(*id).map(|slot| self.gpus.outside(slot));
            ReadSlot { slot: entry.slot(), gpu, hash: entry.hash, checksum: entry.checksum }
        };
        let slots = run.iter().map(slot).collect();
        lease.reads += 1;
        Ok(Reply::Read { space: self.spaces[lease.space].id, slots })
    }

    /// Whether a lease holds a block in this chunk: then the chunk's memory is of the lease's tenant, as long as the lease is held.
    pub fn is_in_chunk(&self, session: SessionId, lease: LeaseId, chunk: u32) -> bool {
        let lease = self.leases.get(&lease).filter(|lease| lease.session == session && !lease.ended);
        let inside = |id: &EntryId| self.index[*id].slot().is_some_and(|slot| slot.chunk == chunk);
        lease.is_some_and(|lease| lease.run.iter().any(inside))
    }

    /// Where the blocks of a lease are in host memory, in run order.
    pub fn slots(&self, session: SessionId, lease: LeaseId) -> Vec<Option<SlotId>> {
        let lease = self.leases.get(&lease).filter(|lease| lease.session == session);
        lease.map_or_else(Vec::new, |lease| lease.run.iter().map(|id| self.index[*id].slot()).collect())
    }

    pub(crate) fn end_read(&mut self, now: Millis, id: LeaseId) {
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        lease.reads -= 1;
        if lease.reads > 0 {
            return;
        }
        let (ended, space) = (lease.ended, lease.space);
        if std::mem::take(&mut lease.loaded) {
            let run = lease.run.clone();
            for id in run.into_iter().rev() {
                if self.index[id].state == EntryState::Resident {
                    self.index[id].touched = now;
                    self.refresh(id);
                }
            }
            self.settle_host(space, 0);
        }
        if ended {
            self.free_lease(id);
        }
    }

    /// The lease's timer fired.
    pub(crate) fn expire_lease(&mut self, id: LeaseId) {
        self.counters.expired_leases += 1;
        self.end_lease(id);
    }

    /// Ends a lease whose timer is already cleared: at once, or with its last read.
    pub(crate) fn end_lease(&mut self, id: LeaseId) {
        let Some(lease) = self.leases.get_mut(&id) else {
            return;
        };
        lease.ended = true;
        let (session, reading) = (lease.session, lease.reads > 0);
        if let Some(session) = self.sessions.get_mut(&session) {
            session.leases.remove(&id);
        }
        if !reading {
            self.free_lease(id);
        }
    }

    fn free_lease(&mut self, id: LeaseId) {
        if let Some(lease) = self.leases.remove(&id) {
            for entry in lease.run {
                self.unpin(entry);
            }
        }
    }

    /// Ends everything that a session holds.
    pub(crate) fn end_session(&mut self, now: Millis, id: SessionId) -> Result<Reply, Refusal> {
        let session = self.sessions.remove(&id).ok_or(Refusal::UnknownSession)?;
        for lease in session.leases {
            let deadline = self.leases.get(&lease).map(|lease| lease.deadline);
            self.timers.clear(deadline.unwrap_or_default(), Timer::Lease(lease));
            self.end_lease(lease);
        }
        for reservation in session.reservations {
            self.abandon_reservation(now, reservation);
        }
        Ok(Reply::Done)
    }

    pub(crate) fn expire(&mut self, now: Millis) {
        while let Some(timer) = self.timers.due(now) {
            match timer {
                Timer::Lease(lease) => self.expire_lease(lease),
                Timer::Reservation(reservation) => self.expire_reservation(now, reservation),
            }
        }
    }
}

fn visible(
    leases: &mut std::collections::BTreeMap<LeaseId, Lease>,
    session: SessionId,
    id: LeaseId,
) -> Result<&mut Lease, Refusal> {
    let lease = leases.get_mut(&id).filter(|lease| lease.session == session && !lease.ended);
    lease.ok_or(Refusal::UnknownLease)
}
