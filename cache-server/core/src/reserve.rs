//! Writing: reservations, fills, commits, and making room.

use crate::arena::{ClassId, Occupant};
use crate::index::{EntryId, EntryRef};
use crate::spaces::Class;
use crate::state::Core;
use crate::timers::Timer;
use crate::{
    CommitOutcome, Effects, FillSlot, Grant, Millis, Refusal, Reply, ReservationId, SessionId, SlotId,
};
use cairn_proto::{BlockHash, Checksum, MissReason, SpaceId};

/// A slot class that nobody used for this long lends its chunks to any other, even below its fair share.
const CLASS_IDLE_MS: u64 = 600_000;

/// Ancestors that one event touches at most, so that a chain of any length costs bounded time.
pub(crate) const MAX_ANCESTOR_WALK: usize = cairn_proto::limits::MAX_BLOCKS_PER_REQUEST;

pub(crate) struct Reservation {
    pub(crate) session: SessionId,
    pub(crate) space: u32,
    pub(crate) deadline: Millis,
    /// The block before the first, pinned.
    pub(crate) parent: Option<EntryRef>,
    pub(crate) blocks: Vec<Pending>,
    /// A stream is writing into the slots.
    pub(crate) filling: bool,
    /// Ended while being filled: commits fail, slots are freed when the fill ends.
    pub(crate) dead: bool,
}

pub(crate) struct Pending {
    pub(crate) hash: BlockHash,
    pub(crate) state: PendingState,
}

#[derive(Clone, Copy)]
pub(crate) enum PendingState {
    /// Resident and pinned by this reservation, whoever committed it.
    Pinned(EntryRef),
    /// Room for its bytes.
    Slot(SlotId),
    /// No room was given, or the block was given up.
    Nothing,
}

impl Core {
    pub(crate) fn reserve(
        &mut self,
        now: Millis,
        (session, space): (SessionId, SpaceId),
        parent: Option<BlockHash>,
        (hashes, ttl_ms): (&[BlockHash], u32),
        effects: &mut Effects,
    ) -> Result<Reply, Refusal> {
        let max = self.config.max_reservations_per_session;
        if self.session(session)?.reservations.len() >= max {
            return Err(Refusal::TooMany { what: "reservations in one session", max });
        }
        let space = self.spaces.find(&space)?;
        self.spaces.class_of(space).used = now;
        let parent = match parent {
            None => None,
            Some(hash) => match self.index.find(space, &hash) {
                Some(id) => Some(self.pinned(id)),
                None => {
                    let grants = vec![Grant::ParentMissing; hashes.len()];
                    return Ok(Reply::Reserved { reservation: None, grants });
                }
            },
        };
        self.touch_ancestors(now, space, parent);
        self.settle_host(space, 0);
        let before = parent.map(|parent| self.index[parent.id].hash);
        let (blocks, grants) = self.grant(now, space, (before, hashes), effects);
        let deadline = now.plus(u64::from(ttl_ms));
        let reservation =
            Reservation { session, space, deadline, parent, blocks, filling: false, dead: false };
        if !grants.contains(&Grant::Granted) {
            self.dissolve(now, reservation);
            return Ok(Reply::Reserved { reservation: None, grants });
        }
        let id = ReservationId(self.next_id());
        self.timers.set(deadline, Timer::Reservation(id));
        self.reservations.insert(id, reservation);
        self.session(session)?.reservations.insert(id);
        Ok(Reply::Reserved { reservation: Some(id), grants })
    }

    /// Pins what is stored already and finds room for the rest, until there is none.
    fn grant(
        &mut self,
        now: Millis,
        space: u32,
        (mut before, hashes): (Option<BlockHash>, &[BlockHash]),
        effects: &mut Effects,
    ) -> (Vec<Pending>, Vec<Grant>) {
        let mut blocks = Vec::with_capacity(hashes.len());
        let mut grants = Vec::with_capacity(hashes.len());
        let mut full = false;
        for hash in hashes {
            let (state, grant) = if let Some(id) = self.index.find(space, hash) {
                // A stored block that follows another one is not of this chain: what comes after it could not be reached.
                if self.index[id].parent == before {
                    (PendingState::Pinned(self.pinned(id)), Grant::AlreadyStored)
                } else {
                    (PendingState::Nothing, Grant::ParentMissing)
                }
            } else {
                let slot = if full { None } else { self.make_room(now, space, effects) };
                full = slot.is_none();
                match slot {
                    Some(slot) => (PendingState::Slot(slot), Grant::Granted),
                    None => {
                        self.history.record(space, hash, MissReason::NotAdmitted, now);
                        (PendingState::Nothing, Grant::NoSpace)
                    }
                }
            };
            before = Some(*hash);
            blocks.push(Pending { hash: *hash, state });
            grants.push(grant);
        }
        let refused = grants.iter().filter(|grant| **grant == Grant::NoSpace).count();
        self.counters.refused_blocks += refused as u64;
        (blocks, grants)
    }

    pub(crate) fn begin_fill(&mut self, session: SessionId, id: ReservationId) -> Result<Reply, Refusal> {
        let reservation = self.reservations.get_mut(&id);
        let reservation = reservation.filter(|r| r.session == session && !r.dead);
        let reservation = reservation.ok_or(Refusal::UnknownReservation)?;
        if std::mem::replace(&mut reservation.filling, true) {
            return Err(Refusal::FillInProgress);
        }
        let slot = |(block, pending): (usize, &Pending)| match pending.state {
            PendingState::Slot(slot) => Some(FillSlot { block, slot, hash: pending.hash }),
            _ => None,
        };
        let slots = reservation.blocks.iter().enumerate().filter_map(slot).collect();
        Ok(Reply::Fill { space: self.spaces[reservation.space].id, slots })
    }

    pub(crate) fn commit(
        &mut self,
        now: Millis,
        id: ReservationId,
        block: usize,
        sum: Checksum,
    ) -> CommitOutcome {
        let Some(reservation) = self.reservations.get(&id).filter(|r| r.filling) else {
            return CommitOutcome::NotReserved;
        };
        let Some(Pending { hash, state: PendingState::Slot(slot) }) = reservation.blocks.get(block) else {
            return CommitOutcome::NotReserved;
        };
        if reservation.dead {
            return CommitOutcome::Expired;
        }
        let (space, hash, slot) = (reservation.space, *hash, *slot);
        let Ok(parent) = self.parent_of(reservation, block) else {
            return CommitOutcome::ParentMissing;
        };
        let (entry, outcome) = match self.index.find(space, &hash) {
            Some(first) => {
                self.free_slot(space, slot);
                self.counters.duplicate_blocks += 1;
                (first, CommitOutcome::Duplicate)
            }
            None => {
                let entry = self.index.insert((space, hash), sum, parent.map(|id| self.index[id].hash));
                let depth = parent.map_or(0, |id| self.index[id].depth.saturating_add(1));
                let place = &mut self.index[entry];
                place.touched = now;
                place.depth = depth;
                place.set_slot(Some(slot));
                self.arena.occupy(slot, entry);
                self.enter_host(entry);
                self.spaces[space].resident += 1;
                self.counters.committed_blocks += 1;
                (entry, CommitOutcome::Committed)
            }
        };
        let pinned = PendingState::Pinned(self.pinned(entry));
        if let Some(reservation) = self.reservations.get_mut(&id) {
            reservation.blocks[block].state = pinned;
        }
        outcome
    }

    /// The resident block before `block`; `None` at the start of a prompt.
    fn parent_of(&self, reservation: &Reservation, block: usize) -> Result<Option<EntryId>, ()> {
        let parent = match block.checked_sub(1) {
            None => match reservation.parent {
                None => return Ok(None),
                Some(parent) => parent,
            },
            Some(before) => match reservation.blocks[before].state {
                PendingState::Pinned(parent) => parent,
                _ => return Err(()),
            },
        };
        self.index.resident(parent).map(Some).ok_or(())
    }

    pub(crate) fn end_fill(&mut self, now: Millis, id: ReservationId) {
        let Some(reservation) = self.reservations.remove(&id) else {
            return;
        };
        if !reservation.dead {
            self.timers.clear(reservation.deadline, Timer::Reservation(id));
            if let Some(session) = self.sessions.get_mut(&reservation.session) {
                session.reservations.remove(&id);
            }
        }
        self.dissolve(now, reservation);
    }

    pub(crate) fn abort(
        &mut self,
        now: Millis,
        session: SessionId,
        id: ReservationId,
    ) -> Result<Reply, Refusal> {
        self.session(session)?;
        if self.reservations.get(&id).is_some_and(|r| r.session == session && !r.dead) {
            self.abandon_reservation(now, id);
        }
        Ok(Reply::Done)
    }

    pub(crate) fn expire_reservation(&mut self, now: Millis, id: ReservationId) {
        self.counters.expired_reservations += 1;
        if let Some(reservation) = self.reservations.get(&id) {
            let space = reservation.space;
            let given_up = reservation.blocks.iter().filter(|b| matches!(b.state, PendingState::Slot(_)));
            for hash in given_up.map(|block| block.hash) {
                self.history.record(space, &hash, MissReason::Expired, now);
            }
        }
        self.end_reservation(now, id);
    }

    /// Ends a live reservation: its client aborted it or is gone.
    pub(crate) fn abandon_reservation(&mut self, now: Millis, id: ReservationId) {
        if let Some(reservation) = self.reservations.get(&id) {
            self.timers.clear(reservation.deadline, Timer::Reservation(id));
        }
        self.end_reservation(now, id);
    }

    /// Its timer is already cleared. At once, or with the fill in progress.
    fn end_reservation(&mut self, now: Millis, id: ReservationId) {
        let Some(reservation) = self.reservations.get_mut(&id) else {
            return;
        };
        reservation.dead = true;
        if let Some(session) = self.sessions.get_mut(&reservation.session) {
            session.reservations.remove(&id);
        }
        if !reservation.filling
            && let Some(reservation) = self.reservations.remove(&id)
        {
            self.dissolve(now, reservation);
        }
    }

    /// Puts new blocks into the eviction order, deepest first, and gives back all that the reservation held.
    fn dissolve(&mut self, now: Millis, reservation: Reservation) {
        let space = reservation.space;
        for pending in reservation.blocks.iter().rev() {
            match pending.state {
                PendingState::Nothing => {}
                PendingState::Slot(slot) => self.free_slot(space, slot),
                PendingState::Pinned(reference) => {
                    if let Some(id) = self.index.resident(reference) {
                        self.order(now, id);
                    }
                    self.unpin(reference.id);
                }
            }
        }
        self.touch_ancestors(now, space, reservation.parent);
        self.settle_host(space, 0);
        if let Some(parent) = reservation.parent {
            self.unpin(parent.id);
        }
    }

    /// Inserts a new block into its policy, or touches an old one.
    pub(crate) fn order(&mut self, now: Millis, id: EntryId) {
        let entry = &mut self.index[id];
        entry.touched = entry.touched.max(now);
        if entry.ordered || entry.slot().is_none() {
            self.refresh(id);
            self.offered_again(id);
            return;
        }
        entry.ordered = true;
        let member = entry.member(id);
        self.spaces.class_of(entry.space).policy.insert(&mut self.nodes, member);
        self.first_use(id);
    }

    fn touch_ancestors(&mut self, now: Millis, space: u32, from: Option<EntryRef>) {
        let mut next = from.and_then(|reference| self.index.resident(reference));
        for _ in 0..MAX_ANCESTOR_WALK {
            let Some(id) = next else { return };
            let entry = &mut self.index[id];
            entry.touched = entry.touched.max(now);
            self.refresh(id);
            next = self.index[id].parent.and_then(|hash| self.index.find(space, &hash));
        }
    }

    fn pinned(&mut self, id: EntryId) -> EntryRef {
        self.pin(id);
        self.index.reference(id)
    }

    /// A slot for a block of `space`, at the price of other blocks if need be.
    pub(crate) fn make_room(&mut self, now: Millis, space: u32, effects: &mut Effects) -> Option<SlotId> {
        let class_id = self.spaces[space].class;
        let tenant = self.spaces.classes[class_id.0 as usize].tenant;
        self.resize_policy(class_id);
        if self.spaces.tenants[tenant].at_quota() {
            let victim = self.victim_of_tenant(tenant, class_id)?;
            self.evict_from_host(now, victim, effects);
        }
        let slot = match self.take_slot(class_id) {
            Some(slot) => slot,
            None => {
                if !self.take_over_chunk(now, class_id, effects) {
                    let victim = self.victim_of_class(class_id)?;
                    self.evict_from_host(now, victim, effects);
                }
                self.take_slot(class_id)?
            }
        };
        self.spaces.tenants[tenant].slots += 1;
        Some(slot)
    }

    /// A free slot, if the tenant may have the chunk that it is in.
    fn take_slot(&mut self, class_id: ClassId) -> Option<SlotId> {
        if !self.arena.has_open_chunk(class_id) && self.chunk_room(class_id) == 0 {
            return None;
        }
        self.arena.take(class_id)
    }

    /// Chunks that the tenant of a class may still take.
    fn chunk_room(&self, class_id: ClassId) -> usize {
        let tenant = self.spaces.classes[class_id.0 as usize].tenant;
        let max = self.spaces.tenants[tenant].max_chunks.unwrap_or(usize::MAX);
        max.saturating_sub(self.arena.chunks_of_tenant(tenant))
    }

    /// Tells a class's policy how many blocks there may be at present.
    fn resize_policy(&mut self, class_id: ClassId) {
        let reach = self.arena.reach(class_id, self.chunk_room(class_id));
        let class = &mut self.spaces.classes[class_id.0 as usize];
        let quota = self.spaces.tenants[class.tenant].max_blocks.unwrap_or(u64::MAX);
        let capacity = reach.min(usize::try_from(quota).unwrap_or(usize::MAX));
        if class.capacity != capacity {
            class.capacity = capacity;
            class.policy.resize(capacity);
        }
    }

    fn victim_of_tenant(&mut self, tenant: usize, first: ClassId) -> Option<EntryId> {
        let classes = &self.spaces.classes;
        let others = (0..classes.len() as u32).map(ClassId).filter(|id| *id != first);
        let others = others.filter(|id| classes[id.0 as usize].tenant == tenant);
        let ordered: Vec<ClassId> = std::iter::once(first).chain(others).collect();
        ordered.into_iter().find_map(|id| self.victim_of_class(id))
    }

    fn victim_of_class(&mut self, id: ClassId) -> Option<EntryId> {
        let class = &mut self.spaces.classes[id.0 as usize];
        if class.evictable == 0 {
            return None;
        }
        class.policy.victim(&mut self.nodes, &self.index)
    }

    /// Empties a chunk of a class that has more than its fair share, or that is idle, when `class` has less than its
    /// own. Tenants share evenly, however many classes each has; so do the classes of one tenant. Where there are more of them than
    /// chunks, one that has none takes the coldest. Says whether the pool has a chunk now that the class may take.
    fn take_over_chunk(&mut self, now: Millis, class: ClassId, effects: &mut Effects) -> bool {
        let classes = &self.spaces.classes;
        let tenant = classes[class.0 as usize].tenant;
        let active = |class: &&Class| now.since(class.used) < CLASS_IDLE_MS;
        let mut tenants: Vec<usize> = classes.iter().filter(active).map(|class| class.tenant).collect();
        tenants.sort_unstable();
        tenants.dedup();
        let fair_tenant = self.arena.total_chunks() / tenants.len().max(1);
        let chunks = self.arena.chunks_of_tenant(tenant);
        let max_chunks = self.spaces.tenants[tenant].max_chunks.unwrap_or(usize::MAX);
        let from_others = chunks < fair_tenant.max(1).min(max_chunks);
        let own = classes.iter().filter(active).filter(|class| class.tenant == tenant).count().max(1);
        let fair = fair_tenant.max(chunks).min(max_chunks) / own;
        let from_own = self.arena.chunk_count(class) < fair.max(1);
        let may_give = |(position, other): &(usize, &Class)| {
            let id = ClassId(*position as u32);
            let idle = now.since(other.used) >= CLASS_IDLE_MS;
            match other.tenant == tenant {
                true => id != class && from_own && (idle || self.arena.chunk_count(id) > fair),
                false => from_others && (idle || self.arena.chunks_of_tenant(other.tenant) > fair_tenant),
            }
        };
        let donors = classes.iter().enumerate().filter(may_give);
        let donors: Vec<ClassId> = donors.map(|(position, _)| ClassId(position as u32)).collect();
        let Some(chunk) = self.chunk_to_empty(&donors) else {
            return false;
        };
        let block = |occupant: &Occupant| match occupant {
            Occupant::Block(id) => Some(*id),
            _ => None,
        };
        let blocks: Vec<EntryId> = self.arena.occupants(chunk).iter().filter_map(block).collect();
        for id in blocks {
            self.evict_from_host(now, id, effects);
        }
        true
    }

    /// The chunk of the oldest block that its policy would evict next; if something in it is pinned, the coldest chunk
    /// without pins.
    fn chunk_to_empty(&mut self, donors: &[ClassId]) -> Option<u32> {
        let victims: Vec<EntryId> = donors.iter().filter_map(|donor| self.victim_of_class(*donor)).collect();
        let by_policy = victims
            .into_iter()
            .map(|id| (self.index[id].touched, self.index[id].slot().map_or(0, |slot| slot.chunk)))
            .min();
        if let Some((_, chunk)) = by_policy
            && self.last_touch(chunk).is_some()
        {
            return Some(chunk);
        }
        let chunks = donors.iter().flat_map(|donor| self.arena.chunks_of(*donor));
        chunks.filter_map(|chunk| Some((self.last_touch(chunk)?, chunk))).min().map(|(_, chunk)| chunk)
    }

    /// When a chunk's most recent block was touched; `None` if something in it cannot leave.
    fn last_touch(&self, chunk: u32) -> Option<Millis> {
        let mut last = Millis(0);
        for occupant in self.arena.occupants(chunk) {
            match occupant {
                Occupant::Free => {}
                Occupant::Reserved => return None,
                Occupant::Block(id) if self.index[*id].pins > 0 => return None,
                Occupant::Block(id) => last = last.max(self.index[*id].touched),
            }
        }
        Some(last)
    }
}
