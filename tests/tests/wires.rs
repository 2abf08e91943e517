//! The conformance suite: what every wire must do, run on each that works here. RDMA runs the same cases in a virtual machine.

#![allow(clippy::unwrap_used)]

use bytes::Bytes;
use cairn_client::WireKind;
use cairn_proto::{Layout, MissReason, pb};
use cairn_tests::devices::with_device;
use cairn_tests::wires::{Session, Site, wires};
use cairn_tests::*;
use cairn_transfer::{Arrival, Arrivals, FetchJob, Promise, Wire};
use std::sync::Arc;
use std::time::Duration;
use tonic::Code;

/// A server, a session on it and one wire.
struct Case {
    site: Site,
    session: Session,
    wire: Arc<dyn Wire>,
}

impl Case {
    async fn start(kind: WireKind) -> Self {
        Self::on(Site::start(128).await, kind).await
    }

    async fn on(site: Site, kind: WireKind) -> Self {
        let session = site.session().await;
        let wire = session.wire(&site.server, kind).await.unwrap();
        assert_eq!(wire.kind(), kind);
        Self { site, session, wire }
    }

    async fn publish(&self, space: &cairn_proto::KeySpace, chain: &[cairn_proto::BlockHash]) {
        self.session.declare(space).await;
        let reservation = self.session.reserve(space, chain).await;
        let job = self.session.offer_all(space, chain, reservation);
        let commits = self.wire.publish(&job).await.unwrap();
        assert_eq!(commits.len(), chain.len());
        assert!(commits.iter().all(|commit| commit.commit() == pb::Commit::Committed), "{commits:?}");
    }

    /// Every wire must leave a server as it found it.
    async fn end(self) {
        let Self { site, session, wire } = self;
        let kind = wire.kind();
        drop((wire, session));
        let server = &site.server;
        eventually(&format!("nothing is held, {kind}"), || {
            let usage = server.usage();
            usage.sessions == 0
                && usage.leases == 0
                && usage.reservations == 0
                && usage.used_slots == usage.host_blocks
        })
        .await;
        server.audit().unwrap();
        site.server.shutdown().await.unwrap();
    }
}

/// Small and large, and sizes that are no multiple of anything.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_of_any_size_arrive_as_they_were() {
    for kind in wires() {
        let mut config = config(128);
        config.host.chunk_mib = 8;
        config.host.capacity_mib = 128;
        config.wires.staging_mib = 2;
        let case = Case::on(Site::with(config).await, kind).await;
        let shapes = [
            (1, 1, 1, 16, 33),
            (3, 1, 7, 5, 9),
            (2, 2, 64, 16, 20),
            (30, 3, 64, 16, 12),
            (31, 8, 129, 32, 4),
        ];
        for (i, (layers, heads, size, tokens, blocks)) in shapes.into_iter().enumerate() {
            let space = space_with(&format!("t{i}"), Layout::new(layers, heads, size, tokens).unwrap());
            let chain = hashes(&space, i as u32, blocks);
            case.publish(&space, &chain).await;
            let (lease, sums) = case.session.lease(&space, &chain, 60_000).await;
            assert_eq!(sums.len(), blocks, "{kind}");
            for range in [0..blocks, blocks / 2..blocks, 1..2] {
                let what = (&space, &chain[..], &sums[..]);
                let found = case.session.fetch(&*case.wire, what, lease, range.clone()).await.unwrap();
                for ((arrival, bytes), hash) in found.iter().zip(&chain[range]) {
                    assert_eq!(*arrival, Some(Arrival::Whole), "{kind}, {} bytes", space.block_bytes());
                    assert!(*bytes == payload(&space, hash), "{kind}: other bytes than were stored");
                }
            }
            case.session.release(lease).await;
        }
        case.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_not_stored_and_what_is_there_stays() {
    for kind in wires() {
        let case = Case::start(kind).await;
        let space = space("t");
        let chain = hashes(&space, 1, 4);
        case.session.declare(&space).await;
        let reservation = case.session.reserve(&space, &chain).await;
        let mut job = case.session.offer_all(&space, &chain, reservation);
        let mut bytes = job.blocks[2].bytes.to_vec();
        bytes[70_000] ^= 4;
        job.blocks[2].bytes = Bytes::from(bytes);
        let commits = case.wire.publish(&job).await.unwrap();
        let of = |block: u32| commits.iter().find(|commit| commit.block == block).unwrap().commit();
        assert_eq!(of(1), pb::Commit::Committed, "{kind}");
        assert_eq!(of(2), pb::Commit::ChecksumMismatch, "{kind}");
        assert_eq!(of(3), pb::Commit::ParentMissing, "{kind}");
        assert_eq!(case.session.lease(&space, &chain, 1000).await.1.len(), 2, "{kind}");
        // The same again: refused as a whole, and the wire goes on working.
        let again = case.wire.publish(&job).await.unwrap_err();
        assert_eq!(again.code(), Code::NotFound, "{kind}: {again}");
        let other = hashes(&space, 2, 8);
        case.publish(&space, &other).await;
        case.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_is_worth_nothing_after_its_lease() {
    for kind in wires() {
        let case = Case::start(kind).await;
        let space = space("t");
        let chain = hashes(&space, 1, 4);
        case.publish(&space, &chain).await;
        let (lease, sums) = case.session.lease(&space, &chain, 60_000).await;
        case.session.release(lease).await;
        let what = (&space, &chain[..], &sums[..]);
        let late = case.session.fetch(&*case.wire, what, lease, 0..4).await.unwrap_err();
        assert_eq!(late.code(), Code::NotFound, "{kind}: {late}");
        let (lease, sums) = case.session.lease(&space, &chain, 60_000).await;
        let what = (&space, &chain[..], &sums[..]);
        let outside = case.session.fetch(&*case.wire, what, lease, 2..5).await;
        assert!(outside.is_err(), "{kind}: positions outside the lease");
        // Another session's lease is no better than none.
        let stranger = case.site.session().await;
        let wire = stranger.wire(&case.site.server, kind).await.unwrap();
        let stolen = stranger.fetch(&*wire, what, lease, 0..4).await.unwrap_err();
        assert_eq!(stolen.code(), Code::NotFound, "{kind}: {stolen}");
        drop((wire, stranger));
        let found = case.session.fetch(&*case.wire, what, lease, 0..4).await.unwrap();
        assert!(found.iter().all(|(arrival, _)| *arrival == Some(Arrival::Whole)), "{kind}");
        case.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_ends_in_the_middle_keeps_its_blocks_for_the_read() {
    for kind in wires() {
        let case = Case::start(kind).await;
        let space = space("t");
        let chain = hashes(&space, 1, 100);
        case.publish(&space, &chain).await;
        let mut arrived = 0;
        for ttl_ms in [20, 40, 80, 160, 1000] {
            let (lease, sums) = case.session.lease(&space, &chain, ttl_ms).await;
            let what = (&space, &chain[..], &sums[..]);
            // Too late is fine; half is not.
            if let Ok(found) = case.session.fetch(&*case.wire, what, lease, 0..100).await {
                arrived += 1;
                for ((arrival, bytes), hash) in found.iter().zip(&chain) {
                    assert!(*arrival == Some(Arrival::Whole) && *bytes == payload(&space, hash), "{kind}");
                }
            }
        }
        assert!(arrived > 0, "{kind}: one of them was in time");
        case.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn transfers_that_are_given_up_leave_nothing_behind() {
    for kind in wires() {
        let case = Case::start(kind).await;
        let space = space("t");
        let chain = hashes(&space, 1, 60);
        case.publish(&space, &chain).await;
        for attempt in 0..12u64 {
            let (lease, sums) = case.session.lease(&space, &chain, 60_000).await;
            let what = (&space, &chain[..], &sums[..]);
            let fetch = case.session.fetch(&*case.wire, what, lease, 0..60);
            let _ = tokio::time::timeout(Duration::from_micros(300 * attempt), fetch).await;
            case.session.release(lease).await;
            let other = hashes(&space, 100 + attempt as u32, 20);
            let reservation = case.session.reserve(&space, &other).await;
            let job = case.session.offer_all(&space, &other, reservation);
            let publish = case.wire.publish(&job);
            let _ = tokio::time::timeout(Duration::from_micros(300 * attempt), publish).await;
            let _ = case
                .session
                .api
                .clone()
                .abort(pb::AbortRequest { session_id: case.session.id, reservation_id: reservation })
                .await;
        }
        let server = &case.site.server;
        eventually("nothing is held", || server.usage().leases == 0 && server.usage().reservations == 0)
            .await;
        let last = hashes(&space, 500, 4);
        case.publish(&space, &last).await;
        let (lease, sums) = case.session.lease(&space, &last, 60_000).await;
        let what = (&space, &last[..], &sums[..]);
        let found = case.session.fetch(&*case.wire, what, lease, 0..4).await.unwrap();
        assert_eq!(found[3].0, Some(Arrival::Whole), "{kind}: the wire still works");
        case.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_requests_at_a_time() {
    for kind in wires() {
        let case = Arc::new(Case::start(kind).await);
        let space = space("t");
        let chains: Vec<_> = (0..6).map(|seed| hashes(&space, seed, 8)).collect();
        // Tasks of their own, as callers have them: one that computes does not keep the others from their turn in a handshake.
        let mut tasks = tokio::task::JoinSet::new();
        for chain in chains.clone() {
            let (case, space) = (case.clone(), space.clone());
            tasks.spawn(async move { case.publish(&space, &chain).await });
        }
        assert_eq!(std::mem::take(&mut tasks).join_all().await.len(), 6);
        for i in 0..24 {
            let (case, space, chain) = (case.clone(), space.clone(), chains[i % 6].clone());
            tasks.spawn(async move {
                let (lease, sums) = case.session.lease(&space, &chain, 60_000).await;
                let what = (&space, &chain[..], &sums[..]);
                let found = case.session.fetch(&*case.wire, what, lease, 0..8).await.unwrap();
                assert_eq!(found.len(), 8);
                for ((arrival, bytes), hash) in found.iter().zip(&chain) {
                    assert!(*arrival == Some(Arrival::Whole) && *bytes == payload(&space, hash));
                }
            });
        }
        assert_eq!(tasks.join_all().await.len(), 24);
        Arc::into_inner(case).unwrap().end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wire_ends_with_its_session() {
    for kind in wires() {
        let Case { site, session, wire } = Case::start(kind).await;
        let space = space("t");
        let chain = hashes(&space, 1, 4);
        session.declare(&space).await;
        let reservation = session.reserve(&space, &chain).await;
        let job = session.offer_all(&space, &chain, reservation);
        wire.publish(&job).await.unwrap();
        let (lease, sums) = session.lease(&space, &chain, 60_000).await;
        let Session { api, id, key, offers, events, .. } = session;
        drop(events);
        eventually("the session ended", || site.server.usage().sessions == 0).await;
        let block_bytes = space.block_bytes();
        let promise = Promise { space: space.id(), block_bytes, hashes: &chain, checksums: &sums };
        let mut memory = vec![vec![0u8; block_bytes as usize]; 4];
        let targets = memory.iter_mut().map(Vec::as_mut_slice).collect();
        let mut arrivals = Arrivals::new(promise, 0, targets);
        let job = FetchJob { session: id, lease, blocks: 0..4, locations: Arc::from([]), range_bytes: 0 };
        let fetch = tokio::time::timeout(Duration::from_secs(5), wire.fetch(&job, &mut arrivals)).await;
        assert!(fetch.unwrap().is_err(), "{kind}");
        drop((wire, api, key, offers));
        site.server.shutdown().await.unwrap();
    }
}

/// Who does not know a session's key gets nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_key_opens_nothing() {
    let site = Site::start(16).await;
    let session = site.session().await;
    for kind in wires().into_iter().filter(|kind| ![WireKind::Mem, WireKind::Grpc].contains(kind)) {
        let mut key = session.key;
        key[31] ^= 1;
        let refused = session.wire_with(&site.server, kind, key).await.err().unwrap();
        // The client finds out first: the server cannot prove that it knows this key.
        assert_eq!(refused.code(), Code::Unauthenticated, "{kind}: {refused}");
        assert!(!format!("{refused:?}").contains(&format!("{:?}", &session.key[..4])));
    }
    site.server.shutdown().await.unwrap();
}

/// More than host memory holds: what was written to the device makes room.
async fn publish_in_parts(
    client: &cairn_client::CacheClient,
    space: &cairn_proto::KeySpace,
    chain: &[cairn_proto::BlockHash],
) {
    let mut parent = None;
    for part in chain.chunks(8) {
        devices::publish_after(client, space, parent, part).await;
        parent = part.last().copied();
    }
}

/// Host memory holds a fraction: most blocks are brought from the device, some past full memory.
#[tokio::test(flavor = "multi_thread")]
async fn blocks_on_a_device_come_over_every_wire() {
    for kind in wires() {
        let folder = tempfile::tempdir().unwrap();
        let case = Case::on(Site::with(with_device(16, folder.path(), 64)).await, kind).await;
        let space = space("t");
        let chain = hashes(&space, 5, 40);
        let client = case.site.client(Some(WireKind::Grpc));
        publish_in_parts(&client, &space, &chain).await;
        drop(client);
        case.session.declare(&space).await;
        let (lease, sums) = case.session.lease(&space, &chain, 60_000).await;
        assert_eq!(sums.len(), 40, "{kind}");
        let what = (&space, &chain[..], &sums[..]);
        let found = case.session.fetch(&*case.wire, what, lease, 0..40).await.unwrap();
        for ((arrival, bytes), hash) in found.iter().zip(&chain) {
            assert!(
                *arrival == Some(Arrival::Whole) && *bytes == payload(&space, hash),
                "{kind} {arrival:?}"
            );
        }
        case.session.release(lease).await;
        case.end().await;
    }
}

/// A block whose device is gone is lost with its reason; the others arrive.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_had_is_named() {
    for kind in wires() {
        let folder = tempfile::tempdir().unwrap();
        let case = Case::on(Site::with(with_device(16, folder.path(), 64)).await, kind).await;
        let space = space("t");
        let chain = hashes(&space, 5, 40);
        let client = case.site.client(Some(WireKind::Grpc));
        publish_in_parts(&client, &space, &chain).await;
        case.session.declare(&space).await;
        let (lease, sums) = case.session.lease(&space, &chain, 60_000).await;
        client.detach_device(&folder.path().display().to_string()).await.unwrap();
        let what = (&space, &chain[..], &sums[..]);
        let found = case.session.fetch(&*case.wire, what, lease, 0..sums.len()).await.unwrap();
        let lost = found.iter().filter(|(found, _)| *found == Some(Arrival::Lost(MissReason::DeviceLost)));
        let whole = found.iter().filter(|(found, _)| *found == Some(Arrival::Whole));
        assert!(lost.count() > 0, "{kind}");
        assert_eq!(
            whole.count() + found.iter().filter(|(f, _)| matches!(f, Some(Arrival::Lost(_)))).count(),
            sums.len()
        );
        drop(client);
        case.session.release(lease).await;
        case.end().await;
    }
}
