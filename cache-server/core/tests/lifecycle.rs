//! The endings that a random history reaches rarely: what is held when a lease, a reservation, a session or a block ends
//! in the middle of something.

#![allow(clippy::unwrap_used)]

use cairn_core::*;
use cairn_proto::*;

const PAGE: u64 = 4096;

struct Server {
    core: Core,
    now: u64,
}

impl Server {
    fn new(chunks: u32, slots_per_chunk: u64) -> Self {
        Self::with(chunks, slots_per_chunk, Vec::new())
    }

    fn with(host_chunks: u32, slots_per_chunk: u64, tenants: Vec<TenantQuota>) -> Self {
        let core = Core::new(CoreConfig {
            host_chunks,
            chunk_bytes: slots_per_chunk * PAGE,
            slot_align_bytes: PAGE,
            policy: PolicyKind::Lru,
            admission: Admission::Always,
            tenants,
            history_entries: 1000,
            max_leases_per_session: 8,
            max_reservations_per_session: 8,
            max_spaces: 8,
            hash_seed: [3, 4],
        });
        Self { core: core.unwrap(), now: 0 }
    }

    fn apply(&mut self, event: Event<'_>) -> Reply {
        let reply = self.core.apply(Millis(self.now), event).reply;
        self.core.audit().unwrap();
        reply
    }

    fn session(&mut self) -> SessionId {
        match self.apply(Event::OpenSession) {
            Reply::Session(id) => id,
            other => panic!("{other:?}"),
        }
    }

    /// A space whose blocks take `pages` pages.
    fn space(&mut self, session: SessionId, tenant: &str, pages: u32) -> SpaceId {
        let layout = Layout::new(pages, 1, 64, 16).unwrap();
        let space = KeySpace::new(SpaceParts::new(tenant, [0; 32], Dtype::Bf16, layout)).unwrap();
        assert_eq!(self.apply(Event::OpenSpace { session, space: &space }), Reply::Done);
        space.id()
    }

    fn reserve(
        &mut self,
        session: SessionId,
        space: SpaceId,
        hashes: &[BlockHash],
    ) -> (Option<ReservationId>, Vec<Grant>) {
        match self.apply(Event::Reserve { session, space, parent: None, hashes, ttl_ms: 100 }) {
            Reply::Reserved { reservation, grants } => (reservation, grants),
            other => panic!("{other:?}"),
        }
    }

    fn fill(&mut self, session: SessionId, reservation: ReservationId) -> Vec<FillSlot> {
        match self.apply(Event::BeginFill { session, reservation }) {
            Reply::Fill { slots, .. } => slots,
            other => panic!("{other:?}"),
        }
    }

    fn commit(&mut self, reservation: ReservationId, block: usize) -> CommitOutcome {
        match self.apply(Event::Commit { reservation, block, checksum: Checksum([block as u8; 16]) }) {
            Reply::Committed(outcome) => outcome,
            other => panic!("{other:?}"),
        }
    }

    fn publish(&mut self, session: SessionId, space: SpaceId, hashes: &[BlockHash]) -> usize {
        let (Some(reservation), _) = self.reserve(session, space, hashes) else {
            return 0;
        };
        let slots = self.fill(session, reservation);
        for slot in &slots {
            assert_eq!(self.commit(reservation, slot.block), CommitOutcome::Committed);
        }
        self.apply(Event::EndFill(reservation));
        slots.len()
    }

    fn lookup(
        &mut self,
        session: SessionId,
        space: SpaceId,
        hashes: &[BlockHash],
    ) -> (Option<LeaseId>, Vec<Outcome>) {
        match self.apply(Event::Lookup { session, space, hashes, ttl_ms: 100 }) {
            Reply::Found { lease, outcomes, .. } => (lease, outcomes),
            other => panic!("{other:?}"),
        }
    }

    fn used_slots(&self) -> usize {
        self.core.usage().used_slots
    }
}

fn chain(branch: u8, length: u8) -> Vec<BlockHash> {
    let block = |i| {
        let mut hash = [branch; 32];
        hash[8] = i;
        BlockHash(hash)
    };
    (0..length).map(block).collect()
}

#[test]
fn a_lease_that_ends_during_a_read_keeps_the_bytes_until_the_read_ends() {
    let mut server = Server::new(1, 4);
    let session = server.session();
    let space = server.space(session, "t", 1);
    let blocks = chain(1, 4);
    server.publish(session, space, &blocks);
    let lease = server.lookup(session, space, &blocks).0.unwrap();
    let read = server.apply(Event::BeginRead { session, lease, first: 1, count: 2 });
    assert!(matches!(read, Reply::Read { slots, .. } if slots.len() == 2));
    server.now = 1000;
    assert_eq!(
        server.apply(Event::BeginRead { session, lease, first: 0, count: 1 }),
        Reply::Refused(Refusal::UnknownLease)
    );
    assert_eq!(
        server.publish(session, space, &chain(2, 1)),
        0,
        "nothing may be overwritten while it is read"
    );
    server.apply(Event::EndRead(lease));
    assert_eq!(server.publish(session, space, &chain(2, 1)), 1);
    assert_eq!(server.core.counters().expired_leases, 1);
}

#[test]
fn a_quarantined_block_leaves_at_once_and_its_slot_when_the_last_lease_ends() {
    let mut server = Server::new(1, 4);
    let session = server.session();
    let space = server.space(session, "t", 1);
    let blocks = chain(1, 3);
    server.publish(session, space, &blocks);
    let lease = server.lookup(session, space, &blocks).0.unwrap();
    server.apply(Event::Quarantine { space, hash: blocks[1] });
    let outcomes = server.lookup(session, space, &blocks).1;
    assert_eq!(outcomes[1], Outcome::Miss(MissReason::Quarantined));
    assert_eq!(outcomes[2], Outcome::Miss(MissReason::ParentMissing));
    assert_eq!(server.used_slots(), 3);
    let explained = server.apply(Event::Explain { space, hashes: &[blocks[2]] });
    assert!(
        matches!(explained, Reply::Explained(states) if matches!(states[..], [BlockState::Resident { reachable: false, .. }]))
    );
    server.apply(Event::Release { session, lease });
    assert_eq!(server.used_slots(), 2);
    assert_eq!(server.publish(session, space, &blocks), 1, "it can be published anew");
    assert_eq!(server.lookup(session, space, &blocks).1, vec![Outcome::Hit(Tier::Host); 3]);
}

#[test]
fn an_orphaned_reservation_times_out_and_one_being_filled_fails_its_commits() {
    let mut server = Server::new(1, 4);
    let session = server.session();
    let space = server.space(session, "t", 1);
    server.reserve(session, space, &chain(1, 2)).0.unwrap();
    let filling = server.reserve(session, space, &chain(2, 2)).0.unwrap();
    server.fill(session, filling);
    assert_eq!(server.commit(filling, 0), CommitOutcome::Committed);
    assert_eq!(server.used_slots(), 4);
    server.now = 1000;
    server.apply(Event::Tick);
    assert_eq!(server.used_slots(), 2, "the orphan's room is free, the fill's is not");
    assert_eq!(server.commit(filling, 1), CommitOutcome::Expired);
    server.apply(Event::EndFill(filling));
    assert_eq!(server.used_slots(), 1);
    let outcomes = server.lookup(session, space, &chain(2, 2)).1;
    assert_eq!(outcomes, vec![Outcome::Hit(Tier::Host), Outcome::Miss(MissReason::Expired)]);
}

#[test]
fn the_first_committed_copy_wins_and_the_later_one_is_acknowledged_and_dropped() {
    let mut server = Server::new(1, 4);
    let (a, b) = (server.session(), server.session());
    let space = server.space(a, "t", 1);
    let blocks = chain(1, 2);
    let (first, second) =
        (server.reserve(a, space, &blocks).0.unwrap(), server.reserve(b, space, &blocks).0.unwrap());
    server.fill(a, first);
    server.fill(b, second);
    assert_eq!(server.commit(second, 0), CommitOutcome::Committed);
    assert_eq!(server.commit(first, 0), CommitOutcome::Duplicate);
    assert_eq!(server.commit(first, 1), CommitOutcome::Committed, "it may go on above the other's copy");
    server.apply(Event::EndFill(first));
    server.apply(Event::EndFill(second));
    assert_eq!(server.used_slots(), 2);
    assert_eq!(server.core.counters().duplicate_blocks, 1);
}

#[test]
fn the_end_of_a_session_frees_all_it_held_but_what_is_in_use_this_moment() {
    let mut server = Server::new(1, 8);
    let session = server.session();
    let space = server.space(session, "t", 1);
    server.publish(session, space, &chain(1, 2));
    let lease = server.lookup(session, space, &chain(1, 2)).0.unwrap();
    server.apply(Event::BeginRead { session, lease, first: 0, count: 2 });
    let filling = server.reserve(session, space, &chain(2, 2)).0.unwrap();
    server.fill(session, filling);
    server.reserve(session, space, &chain(3, 2)).0.unwrap();
    assert_eq!(server.apply(Event::EndSession(session)), Reply::Done);
    assert_eq!(server.used_slots(), 4);
    assert_eq!(server.commit(filling, 0), CommitOutcome::Expired);
    server.apply(Event::EndFill(filling));
    server.apply(Event::EndRead(lease));
    let usage = server.core.usage();
    assert_eq!((usage.sessions, usage.leases, usage.reservations, usage.used_slots), (0, 0, 0, 2));
    let dead = server.apply(Event::Lookup { session, space, hashes: &chain(1, 1), ttl_ms: 1 });
    assert_eq!(dead, Reply::Refused(Refusal::UnknownSession));
}

#[test]
fn a_full_arena_with_everything_leased_grants_nothing_and_recovers() {
    let mut server = Server::new(2, 2);
    let session = server.session();
    let space = server.space(session, "t", 1);
    server.publish(session, space, &chain(1, 4));
    let lease = server.lookup(session, space, &chain(1, 4)).0.unwrap();
    assert_eq!(server.reserve(session, space, &chain(2, 2)), (None, vec![Grant::NoSpace; 2]));
    assert_eq!(server.lookup(session, space, &chain(2, 1)).1, vec![Outcome::Miss(MissReason::NotAdmitted)]);
    server.apply(Event::Release { session, lease });
    assert_eq!(server.publish(session, space, &chain(2, 2)), 2);
    let left = server.lookup(session, space, &chain(1, 4)).1;
    assert_eq!(left[..2], [Outcome::Hit(Tier::Host); 2], "leaves leave before their parents");
    assert_eq!(left[2], Outcome::Miss(MissReason::Evicted));
}

#[test]
fn a_new_slot_size_gets_its_share_and_no_more() {
    let mut server = Server::new(4, 4);
    let session = server.session();
    let small = server.space(session, "t", 1);
    assert_eq!(server.publish(session, small, &chain(1, 16)), 16);
    let large = server.space(session, "t", 2);
    assert_eq!(server.publish(session, large, &chain(2, 8)), 8 / 2, "two of four chunks, two slots each");
    let left = server.lookup(session, small, &chain(1, 16)).1;
    assert_eq!(left.iter().filter(|outcome| outcome.is_hit()).count(), 8);
}

#[test]
fn a_tenant_at_its_quota_evicts_its_own_and_nobody_elses() {
    let quota = |name: &str, max_blocks| TenantQuota { name: name.into(), max_blocks, max_chunks: None };
    let mut server = Server::with(4, 4, vec![quota("big", None), quota("small", Some(3))]);
    let session = server.session();
    let (big, small) = (server.space(session, "big", 1), server.space(session, "small", 1));
    server.publish(session, big, &chain(1, 4));
    assert_eq!(server.publish(session, small, &chain(2, 3)), 3);
    assert_eq!(server.publish(session, small, &chain(3, 3)), 3);
    assert_eq!(server.core.spaces()[1].resident_blocks, 3);
    assert_eq!(server.core.spaces()[0].resident_blocks, 4);
    assert_eq!(server.reserve(session, small, &chain(4, 5)).1[3..], [Grant::NoSpace; 2]);
}

#[test]
fn limits_and_unknown_names_are_refused_with_their_reason() {
    let mut server = Server::new(1, 4);
    let session = server.session();
    let space = server.space(session, "t", 1);
    let unknown = server.apply(Event::Lookup { session, space: SpaceId([9; 32]), hashes: &[], ttl_ms: 1 });
    assert_eq!(unknown, Reply::Refused(Refusal::UnknownSpace));
    server.publish(session, space, &chain(1, 1));
    for _ in 0..8 {
        server.lookup(session, space, &chain(1, 1)).0.unwrap();
    }
    assert_eq!(server.lookup(session, space, &chain(1, 1)), (None, vec![Outcome::Busy]));
    let orphan =
        Event::Reserve { session, space, parent: Some(chain(7, 1)[0]), hashes: &chain(8, 2), ttl_ms: 1 };
    let expected = Reply::Reserved { reservation: None, grants: vec![Grant::ParentMissing; 2] };
    assert_eq!(server.apply(orphan), expected);
    let fill = server.apply(Event::BeginFill { session, reservation: ReservationId(12345) });
    assert_eq!(fill, Reply::Refused(Refusal::UnknownReservation));
    let (other, filling) = (server.session(), server.reserve(session, space, &chain(2, 1)).0.unwrap());
    let stolen = server.apply(Event::BeginFill { session: other, reservation: filling });
    assert_eq!(stolen, Reply::Refused(Refusal::UnknownReservation), "reservations belong to their session");
    server.fill(session, filling);
    assert_eq!(
        server.apply(Event::BeginFill { session, reservation: filling }),
        Reply::Refused(Refusal::FillInProgress)
    );
    assert!(server.core.counters().balanced());
}

#[test]
fn a_chain_that_bites_its_tail_costs_bounded_time() {
    let mut server = Server::new(1, 4);
    let session = server.session();
    let space = server.space(session, "t", 1);
    let blocks = chain(1, 2);
    server.publish(session, space, &blocks);
    server.apply(Event::Quarantine { space, hash: blocks[0] });
    let parent = Some(blocks[1]);
    let reserve = Event::Reserve { session, space, parent, hashes: &blocks[..1], ttl_ms: 100 };
    let Reply::Reserved { reservation: Some(id), .. } = server.apply(reserve) else { panic!("granted") };
    server.fill(session, id);
    assert_eq!(server.commit(id, 0), CommitOutcome::Committed);
    server.apply(Event::EndFill(id));
    let explained = server.apply(Event::Explain { space, hashes: &[blocks[0]] });
    assert!(
        matches!(explained, Reply::Explained(states) if matches!(states[..], [BlockState::Resident { reachable: false, .. }]))
    );
}

/// Memory with one tenant's bytes is never another's: it is used again by the same tenant, or reported as stale.
#[test]
fn a_chunk_changes_hands_only_as_other_memory() {
    let mut server = Server::new(2, 4);
    let session = server.session();
    let (a, b) = (server.space(session, "a", 1), server.space(session, "b", 1));
    let chain = |n: u8| (0..4).map(|i| BlockHash([n + i; 32])).collect::<Vec<_>>();
    let store = |server: &mut Server, space, hashes: &[BlockHash]| {
        let (reservation, _) = server.reserve(session, space, hashes);
        let reservation = reservation.unwrap();
        let slots = server.fill(session, reservation);
        for slot in &slots {
            assert_eq!(server.commit(reservation, slot.block), CommitOutcome::Committed);
        }
        server.apply(Event::EndFill(reservation));
        slots[0].slot.chunk
    };
    let chunk = store(&mut server, a, &chain(0));
    let lookup = Event::Lookup { session, space: a, hashes: &chain(0), ttl_ms: 50 };
    let Reply::Found { lease: Some(lease), .. } = server.apply(lookup) else { panic!("resident") };
    assert!(server.core.is_in_chunk(session, lease, chunk));
    assert!(!server.core.is_in_chunk(session, lease, 1 - chunk), "no block of the lease is there");
    assert!(!server.core.is_in_chunk(SessionId(0), lease, chunk), "somebody else's lease");
    server.apply(Event::Release { session, lease });
    server.apply(Event::Flush(a));
    // Its own tenant takes it again as it is, another takes the other one first.
    assert_eq!(store(&mut server, b, &chain(50)), 1 - chunk);
    assert_eq!(store(&mut server, a, &chain(100)), chunk);
    server.apply(Event::Flush(a));
    // Now only a's is left: b gets it, and it is stale in the very event that hands it over.
    let hashes = chain(150);
    let event = Event::Reserve { session, space: b, parent: None, hashes: &hashes, ttl_ms: 100 };
    let effects = server.core.apply(Millis(server.now), event);
    assert_eq!(effects.stale, [chunk]);
    server.core.audit().unwrap();
    let again = server.core.apply(Millis(server.now), Event::Tick);
    assert!(again.stale.is_empty(), "once");
}

/// A quota in chunks holds whatever shapes a tenant's blocks have.
#[test]
fn many_shapes_of_one_tenant_take_no_more_chunks_than_it_may() {
    let quota = |name: &str, max_chunks| TenantQuota { name: name.into(), max_blocks: None, max_chunks };
    let mut server = Server::with(6, 8, vec![quota("a", Some(3)), quota("b", Some(3))]);
    let session = server.session();
    let mine = server.space(session, "a", 1);
    let hashes: Vec<_> = (0..24).map(|i| BlockHash([i; 32])).collect();
    let (reservation, grants) = server.reserve(session, mine, &hashes);
    assert!(grants.iter().all(|grant| *grant == Grant::Granted), "three chunks of eight");
    let reservation = reservation.unwrap();
    for slot in server.fill(session, reservation) {
        server.commit(reservation, slot.block);
    }
    server.apply(Event::EndFill(reservation));
    for shape in 2..8u32 {
        let space = server.space(session, "b", shape);
        let hashes: Vec<_> = (0..6).map(|i| BlockHash([100 + i + shape as u8; 32])).collect();
        let (reservation, _) = server.reserve(session, space, &hashes);
        if let Some(reservation) = reservation {
            for slot in server.fill(session, reservation) {
                server.commit(reservation, slot.block);
            }
            server.apply(Event::EndFill(reservation));
        }
    }
    let lookup = Event::Lookup { session, space: mine, hashes: &hashes, ttl_ms: 50 };
    let Reply::Found { outcomes, .. } = server.apply(lookup) else { panic!("an answer") };
    assert!(outcomes.iter().all(|outcome| outcome.is_hit()), "nothing of a was pushed out: {outcomes:?}");
}
