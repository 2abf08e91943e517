//! One server, real sockets: what is published can be looked up, fetched and explained; what goes wrong ends in a clear
//! error or a counted miss, and nothing leaks.

#![allow(clippy::unwrap_used)]

use cairn_client::{CacheClient, Stored};
use cairn_proto::{Layout, MissReason, Outcome, Tier, limits, pb};
use cairn_server::{Server, ServerError};
use cairn_tests::*;
use pb::cache_client::CacheClient as Grpc;
use pb::publish_chunk::Chunk;
use std::time::Duration;
use tonic::Code;
use tonic::transport::Channel;

type Raw = Grpc<Channel>;

/// A session without the client library, to say what the library never would.
async fn raw(server: &Server) -> (Raw, u64, tonic::Streaming<pb::SessionEvent>) {
    let mut grpc = Raw::connect(format!("http://{}", server.address())).await.unwrap();
    let request = pb::SessionRequest { client_name: "raw".into(), api_version: limits::API_VERSION };
    let mut events = grpc.session(request).await.unwrap().into_inner();
    match events.message().await.unwrap().unwrap().event.unwrap() {
        pb::session_event::Event::Opened(opened) => (grpc, opened.session_id, events),
        other => panic!("{other:?}"),
    }
}

async fn reserve(grpc: &mut Raw, session_id: u64, space: &cairn_proto::KeySpace, seed: u32, n: usize) -> u64 {
    grpc.open_space(pb::OpenSpaceRequest { session_id, space: Some(space.into()) }).await.unwrap();
    let request = pb::ReserveRequest {
        session_id,
        space_id: space.id().0.to_vec().into(),
        parent_hash: Default::default(),
        block_hashes: cairn_proto::BlockHash::concat(&hashes(space, seed, n)),
        ttl_ms: 60_000,
    };
    grpc.reserve(request).await.unwrap().into_inner().reservation_id
}

fn header(session_id: u64, reservation_id: u64) -> pb::PublishChunk {
    pb::PublishChunk { chunk: Some(Chunk::Header(pb::PublishHeader { session_id, reservation_id })) }
}

fn pieces(pieces: Vec<(u32, u64, Vec<u8>)>, seals: Vec<(u32, [u8; 16])>) -> pb::PublishChunk {
    let piece =
        |(block, offset, data): (u32, u64, Vec<u8>)| pb::BlockPiece { block, offset, data: data.into() };
    let seal = |(block, sum): (u32, [u8; 16])| pb::BlockSeal { block, checksum: sum.to_vec().into() };
    let pieces = pieces.into_iter().map(piece).collect();
    let seals = seals.into_iter().map(seal).collect();
    pb::PublishChunk { chunk: Some(Chunk::Pieces(pb::PublishPieces { pieces, seals })) }
}

async fn nothing_held(server: &Server) {
    eventually("leases and reservations are gone", || {
        let usage = server.usage();
        usage.leases == 0 && usage.reservations == 0 && usage.used_slots == usage.resident_blocks
    })
    .await;
    server.audit().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn published_blocks_are_found_fetched_verified_and_explained() {
    let (server, client) = server_and_client(config(64)).await;
    let space = space("t");
    let chain = hashes(&space, 1, 20);
    assert_eq!(client.lookup(&space, &chain).await.outcomes[0], Outcome::Miss(MissReason::NeverStored));
    let stored = client.publish(&space, None, &blocks(&space, &chain[..12])).await;
    assert_eq!(stored, vec![Stored::Committed; 12]);
    let stored = client.publish(&space, Some(chain[11]), &blocks(&space, &chain[12..16])).await;
    assert_eq!(stored, vec![Stored::Committed; 4]);
    let lookup = client.lookup(&space, &chain).await;
    assert_eq!(lookup.outcomes[..16], [Outcome::Hit(Tier::Host); 16]);
    assert_eq!(lookup.outcomes[16], Outcome::Miss(MissReason::NeverStored));
    assert_eq!(lookup.outcomes[17], Outcome::Miss(MissReason::ParentMissing));
    drop(lookup);
    assert_eq!(fetch_verified(&client, &space, &chain).await, 16);
    let other = client_at(&format!("http://{}", server.address()));
    assert_eq!(fetch_verified(&other, &space, &chain[..7]).await, 7, "another client shares them");
    let again = client.publish(&space, None, &blocks(&space, &chain[..2])).await;
    assert_eq!(again, vec![Stored::AlreadyStored; 2]);
    let explained = client.explain(space.id(), &chain[15..17]).await.unwrap();
    assert!(matches!(explained[0].state, Some(pb::block_explanation::State::Resident(_))));
    assert!(matches!(explained[1].state, Some(pb::block_explanation::State::Absent(_))));
    let stats = client.stats().await.unwrap();
    let missed: u64 = stats.misses.iter().map(|reason| reason.blocks).sum();
    assert_eq!(stats.asked_blocks, stats.tiers[0].hit_blocks + missed);
    assert_eq!(stats.published_bytes, 16 * space.block_bytes());
    nothing_held(&server).await;
    let other_tenant = cairn_tests::space("u");
    assert_eq!(client.lookup(&other_tenant, &chain).await.resident(), 0, "tenants do not see each other");
    assert_eq!(client.flush(space.id()).await.unwrap(), 16);
    assert_eq!(client.lookup(&space, &chain).await.outcomes[0], Outcome::Miss(MissReason::Removed));
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_arena_evicts_leaves_first_and_with_everything_leased_refuses() {
    let (server, client) = server_and_client(config(8)).await;
    let space = space("t");
    let (a, b) = (hashes(&space, 1, 8), hashes(&space, 2, 4));
    assert!(client.publish(&space, None, &blocks(&space, &a)).await.iter().all(|s| s.is_stored()));
    let held = client.lookup(&space, &a).await;
    assert_eq!(held.resident(), 8);
    assert_eq!(client.publish(&space, None, &blocks(&space, &b)).await, vec![Stored::NoSpace; 4]);
    drop(held);
    nothing_held(&server).await;
    assert_eq!(client.publish(&space, None, &blocks(&space, &b)).await, vec![Stored::Committed; 4]);
    assert_eq!(fetch_verified(&client, &space, &a).await, 4);
    assert_eq!(fetch_verified(&client, &space, &b).await, 4);
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_make_no_sense_get_a_clear_error() {
    let (server, _client) = server_and_client(config(8)).await;
    let (mut grpc, session_id, _events) = raw(&server).await;
    let space = space("t");
    let lookup = |space_id: Vec<u8>, block_hashes: Vec<u8>| pb::LookupRequest {
        session_id,
        space_id: space_id.into(),
        block_hashes: block_hashes.into(),
        ..Default::default()
    };
    let unknown = grpc.lookup(lookup(space.id().0.to_vec(), vec![0; 32])).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    assert!(unknown.message().contains("OpenSpace"), "{unknown}");
    let ragged = grpc.lookup(lookup(space.id().0.to_vec(), vec![0; 33])).await.unwrap_err();
    assert_eq!(ragged.code(), Code::InvalidArgument);
    let many = 32 * (limits::MAX_BLOCKS_PER_REQUEST + 1);
    let many = grpc.lookup(lookup(space.id().0.to_vec(), vec![0; many])).await.unwrap_err();
    assert!(many.message().contains("split the request"), "{many}");
    let oversized = grpc.lookup(lookup(vec![0; limits::MAX_MESSAGE_BYTES + 1], vec![])).await.unwrap_err();
    assert_eq!(oversized.code(), Code::OutOfRange, "{oversized}");
    let mut wrong: pb::KeySpace = (&space).into();
    wrong.layout.as_mut().unwrap().layers = 0;
    let wrong = grpc.open_space(pb::OpenSpaceRequest { session_id, space: Some(wrong) }).await.unwrap_err();
    assert!(wrong.message().contains("layout.layers is 0"), "{wrong}");
    let large = space_with("t", Layout::new(64, 8, 128, 64).unwrap());
    let large =
        grpc.open_space(pb::OpenSpaceRequest { session_id, space: Some((&large).into()) }).await.unwrap_err();
    assert!(large.message().contains("chunk_mib"), "{large}");
    let stranger =
        grpc.open_space(pb::OpenSpaceRequest { session_id: 99_999, space: Some((&space).into()) }).await;
    assert_eq!(stranger.unwrap_err().code(), Code::NotFound);
    let old = pb::SessionRequest { client_name: "old".into(), api_version: 0 };
    assert_eq!(grpc.session(old).await.unwrap_err().code(), Code::FailedPrecondition);
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_publishes_store_nothing_and_leak_nothing() {
    let (server, client) = server_and_client(config(16)).await;
    let (mut grpc, session, events) = raw(&server).await;
    let space = space("t");
    let size = space.block_bytes() as usize;
    let chain = hashes(&space, 1, 2);
    let good = blocks(&space, &chain);
    let publish = |grpc: &Raw, chunks: Vec<pb::PublishChunk>| {
        let mut grpc = grpc.clone();
        async move { grpc.publish(tokio_stream::iter(chunks)).await.map(|answer| answer.into_inner().commits) }
    };

    let without_reserve = publish(&grpc, vec![header(session, 777)]).await.unwrap_err();
    assert!(without_reserve.message().contains("call Reserve"), "{without_reserve}");
    let without_header = publish(&grpc, vec![pieces(vec![], vec![])]).await.unwrap_err();
    assert_eq!(without_header.code(), Code::InvalidArgument);

    let id = reserve(&mut grpc, session, &space, 1, 2).await;
    let half = pieces(vec![(0, 0, good[0].bytes[..size / 2].to_vec())], vec![(0, good[0].checksum.0)]);
    let commits = publish(&grpc, vec![header(session, id), half]).await.unwrap();
    let incomplete = pb::Commit::Incomplete;
    assert_eq!(commits.iter().map(pb::BlockCommit::commit).collect::<Vec<_>>(), vec![incomplete; 2]);

    let id = reserve(&mut grpc, session, &space, 1, 2).await;
    let mut flipped = good[0].bytes.to_vec();
    flipped[size / 3] ^= 4;
    let bad = pieces(vec![(0, 0, flipped)], vec![(0, good[0].checksum.0)]);
    let next = pieces(vec![(1, 0, good[1].bytes.to_vec())], vec![(1, good[1].checksum.0)]);
    let commits = publish(&grpc, vec![header(session, id), bad, next]).await.unwrap();
    let found: Vec<_> = commits.iter().map(pb::BlockCommit::commit).collect();
    assert_eq!(found, [pb::Commit::ChecksumMismatch, pb::Commit::ParentMissing]);

    let id = reserve(&mut grpc, session, &space, 1, 2).await;
    let gap = pieces(vec![(0, 7, vec![1, 2, 3])], vec![]);
    assert_eq!(
        publish(&grpc, vec![header(session, id), gap]).await.unwrap_err().code(),
        Code::InvalidArgument
    );
    let id = reserve(&mut grpc, session, &space, 1, 1).await;
    let long = pieces(vec![(0, 0, vec![0; size + 1])], vec![]);
    assert_eq!(
        publish(&grpc, vec![header(session, id), long]).await.unwrap_err().code(),
        Code::InvalidArgument
    );

    assert_eq!(client.lookup(&space, &chain).await.resident(), 0);
    assert_eq!(client.stats().await.unwrap().checksum_mismatches, 1);
    drop(events);
    nothing_held(&server).await;
    assert_eq!(server.usage().used_slots, 0);
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_die_in_the_middle_leave_nothing_behind() {
    let (server, client) = server_and_client(config(64)).await;
    let space = space("t");
    let chain = hashes(&space, 1, 40);
    client.publish(&space, None, &blocks(&space, &chain)).await;

    let (mut grpc, session, events) = raw(&server).await;
    let id = reserve(&mut grpc, session, &space, 2, 4).await;
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    let publishing =
        tokio::spawn(
            async move { grpc.publish(tokio_stream::wrappers::ReceiverStream::new(receiver)).await },
        );
    sender.send(header(session, id)).await.unwrap();
    sender.send(pieces(vec![(0, 0, vec![7; 1000])], vec![])).await.unwrap();
    eventually("the reservation is being filled", || server.usage().reservations == 1).await;
    publishing.abort();
    drop((sender, events));
    nothing_held(&server).await;

    let (mut grpc, session_id, events) = raw(&server).await;
    grpc.open_space(pb::OpenSpaceRequest { session_id, space: Some((&space).into()) }).await.unwrap();
    let request = pb::LookupRequest {
        session_id,
        space_id: space.id().0.to_vec().into(),
        block_hashes: cairn_proto::BlockHash::concat(&chain),
        lease_ttl_ms: 60_000,
        ..Default::default()
    };
    let lease_id = grpc.lookup(request).await.unwrap().into_inner().lease_id;
    let request = pb::FetchRequest { session_id, lease_id, first: 0, count: 40, range_bytes: 0, transfer: 0 };
    let mut chunks = grpc.fetch(request).await.unwrap().into_inner();
    chunks.message().await.unwrap().unwrap();
    assert_eq!(server.usage().leases, 1);
    drop((chunks, events, grpc));
    nothing_held(&server).await;
    assert_eq!(fetch_verified(&client, &space, &chain).await, 40);
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stops_reading_loses_its_blocks_at_the_deadline() {
    let mut config = config(256);
    config.limits.fetch_timeout_ms = 300;
    let (server, client) = server_and_client(config).await;
    let space = space("t");
    let chain = hashes(&space, 1, 200);
    client.publish(&space, None, &blocks(&space, &chain)).await;
    let (mut grpc, session_id, _events) = raw(&server).await;
    grpc.open_space(pb::OpenSpaceRequest { session_id, space: Some((&space).into()) }).await.unwrap();
    let request = pb::LookupRequest {
        session_id,
        space_id: space.id().0.to_vec().into(),
        block_hashes: cairn_proto::BlockHash::concat(&chain),
        lease_ttl_ms: 100,
        ..Default::default()
    };
    let lease_id = grpc.lookup(request).await.unwrap().into_inner().lease_id;
    let request =
        pb::FetchRequest { session_id, lease_id, first: 0, count: 200, range_bytes: 0, transfer: 0 };
    let mut chunks = grpc.fetch(request).await.unwrap().into_inner();
    chunks.message().await.unwrap().unwrap();
    nothing_held(&server).await;
    let ended = loop {
        match chunks.message().await {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert_eq!(ended.unwrap_err().code(), Code::DeadlineExceeded);
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expired_lease_is_a_miss_and_the_bytes_can_be_found_again() {
    let (server, _) = server_and_client(config(16)).await;
    let mut options = client(&server).options().clone();
    options.lease_ttl = Duration::from_millis(20);
    let client = CacheClient::start(options).unwrap();
    let space = space("t");
    let chain = hashes(&space, 1, 4);
    client.publish(&space, None, &blocks(&space, &chain)).await;
    let run = client.lookup(&space, &chain).await.run.unwrap();
    eventually("the lease expired", || server.usage().leases == 0).await;
    let mut targets = vec![vec![0u8; space.block_bytes() as usize]; 4];
    let outcomes = client.fetch(&run, 0, &mut targets).await.outcomes;
    assert_eq!(outcomes, vec![Outcome::Miss(MissReason::LeaseLost); 4]);
    assert_eq!(server.counters().expired_leases, 1);
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_or_silent_server_is_a_miss_within_the_deadline() {
    let space = space("t");
    let chain = hashes(&space, 1, 3);
    // Bound and never listening: nobody else gets the port.
    let closed = tokio::net::TcpSocket::new_v4().unwrap();
    closed.bind(([127, 0, 0, 1], 0).into()).unwrap();
    let client = client_at(&format!("http://{}", closed.local_addr().unwrap()));
    assert_eq!(client.lookup(&space, &chain).await.outcomes, vec![Outcome::Miss(MissReason::PeerDown); 3]);
    assert!(client.stats().await.unwrap_err().message.contains("cannot be reached"));

    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut options = cairn_client::ClientOptions::new(format!("http://{}", silent.local_addr().unwrap()));
    options.lookup_timeout = Duration::from_millis(200);
    let client = CacheClient::start(options).unwrap();
    let outcomes = client.lookup(&space, &chain).await.outcomes;
    assert_eq!(outcomes, vec![Outcome::Miss(MissReason::Deadline); 3]);
    let stored = client.publish(&space, None, &blocks(&space, &chain)).await;
    assert!(stored.iter().all(|stored| matches!(stored, Stored::Failed(_))), "{stored:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_finds_its_server_again_after_a_restart() {
    let (server, client) = server_and_client(config(16)).await;
    let space = space("t");
    let chain = hashes(&space, 1, 4);
    client.publish(&space, None, &blocks(&space, &chain)).await;
    let run = client.lookup(&space, &chain).await.run.unwrap();
    let mut again = config(16);
    again.server.listen = server.address();
    server.shutdown().await.unwrap();
    let restarted = Server::start(again).await.unwrap();
    eventually("the client reconnected", || client.is_connected()).await;
    let mut targets = vec![vec![0u8; space.block_bytes() as usize]; 4];
    let outcomes = client.fetch(&run, 0, &mut targets).await;
    assert!(
        outcomes.iter().all(|outcome| matches!(outcome, Outcome::Miss(_))),
        "an old lease means nothing now"
    );
    assert_eq!(client.lookup(&space, &chain).await.outcomes[0], Outcome::Miss(MissReason::NeverStored));
    assert!(client.publish(&space, None, &blocks(&space, &chain)).await.iter().all(|s| s.is_stored()));
    assert_eq!(fetch_verified(&client, &space, &chain).await, 4);
    restarted.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tenants_are_held_to_the_list_and_to_their_quota() {
    let mut config = config(64);
    config.tenant = vec![cairn_server::TenantConfig {
        name: "t".into(),
        max_blocks: Some(5),
        max_mib: None,
        encryption_key_file: None,
        encryption_key_command: None,
    }];
    let (server, client) = server_and_client(config).await;
    let refused = client.open_space(&space("stranger")).await.unwrap_err();
    assert!(refused.message.contains("not configured"), "{refused}");
    let space = space("t");
    client.publish(&space, None, &blocks(&space, &hashes(&space, 1, 5))).await;
    client.publish(&space, None, &blocks(&space, &hashes(&space, 2, 3))).await;
    assert_eq!(server.usage().resident_blocks, 5);
    assert_eq!(fetch_verified(&client, &space, &hashes(&space, 2, 3)).await, 3);
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_start_says_what_to_change() {
    let (server, _client) = server_and_client(config(8)).await;
    let mut taken = config(8);
    taken.server.listen = server.address();
    let message = |error: Result<Server, ServerError>| error.err().expect("it must not start").to_string();
    let text = message(Server::start(taken).await);
    assert!(text.contains(&server.address().to_string()) && text.contains("--listen"), "{text}");
    let mut open = config(8);
    open.server.listen = ([0, 0, 0, 0], 0).into();
    assert!(message(Server::start(open).await).contains("allow_insecure_network"));
    let mut huge = config(8);
    huge.host.capacity_mib = 1 << 40;
    huge.host.chunk_mib = 1 << 20;
    assert!(message(Server::start(huge).await).contains("memory"));
    let mut odd = config(8);
    odd.host.policy = "random".into();
    assert!(message(Server::start(odd).await).contains("known: cairn, lru, fifo"));
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_and_health_are_there_and_add_up() {
    let (server, client) = server_and_client(config(8)).await;
    let space = space("t");
    let chain = hashes(&space, 1, 2);
    client.publish(&space, None, &blocks(&space, &chain)).await;
    client.lookup(&space, &hashes(&space, 1, 3)).await;
    let page = |path: &str| {
        let url = format!("http://{}/{path}", server.http_address());
        async move { reqwest::get(url).await.unwrap().text().await.unwrap() }
    };
    assert_eq!(page("healthz").await, "ok\n");
    assert_eq!(page("readyz").await, "ready\n");
    let metrics = page("metrics").await;
    let value = |name: &str| -> u64 {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} is not in\n{metrics}")).parse().unwrap()
    };
    assert_eq!(value("cairn_asked_blocks_total"), 3);
    assert_eq!(value("cairn_hit_blocks_total{tier=\"host\"}"), 2);
    assert_eq!(value("cairn_missed_blocks_total{reason=\"never_stored\"}"), 1);
    assert_eq!(value("cairn_resident_blocks"), 2);
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_different_copies_of_a_key_one_wins_whole() {
    let (server, client) = server_and_client(config(64)).await;
    let space = space("t");
    let chain = hashes(&space, 1, 16);
    // Workers that chunk a prefill differently may compute different bits for one key.
    let copy = |mark: u8| -> Vec<cairn_client::Block> {
        let block = |hash: &cairn_proto::BlockHash| {
            let bytes = vec![mark; space.block_bytes() as usize];
            let checksum = cairn_proto::Checksum::of(&space.id(), hash, &bytes);
            cairn_client::Block { hash: *hash, bytes: bytes.into(), checksum }
        };
        chain.iter().map(block).collect()
    };
    let others: Vec<CacheClient> = (0..4).map(|_| self::client(&server)).collect();
    let copies: Vec<_> = (1..=4).map(copy).collect();
    let publishes = others.iter().zip(&copies).map(|(client, copy)| client.publish(&space, None, copy));
    let stored = futures::future::join_all(publishes).await;
    let committed = stored.iter().flatten().filter(|s| **s == Stored::Committed).count();
    assert_eq!(committed, 16, "each key is committed once: {stored:?}");
    assert!(stored.iter().flatten().all(|s| s.is_stored()), "{stored:?}");
    let run = client.lookup(&space, &chain).await.run.unwrap();
    let mut targets = vec![vec![0u8; space.block_bytes() as usize]; 16];
    assert!(client.fetch(&run, 0, &mut targets).await.iter().all(|outcome| outcome.is_hit()));
    for target in &targets {
        assert!(target.iter().all(|byte| *byte == target[0]) && (1..=4).contains(&target[0]));
    }
    drop(run);
    nothing_held(&server).await;
    server.shutdown().await.unwrap();
}
