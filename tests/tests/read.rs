//! A lookup and its blocks as one request: the same answers as lookup and fetch, over every wire, and a round trip less over TLS.

#![allow(clippy::unwrap_used)]

use cairn_client::{CacheClient, WireKind};
use cairn_proto::{KeySpace, MissReason, Outcome};
use cairn_tests::wires::{Site, options, wires};
use cairn_tests::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

fn targets(space: &KeySpace, count: usize) -> Vec<Vec<u8>> {
    vec![vec![0xEE; space.block_bytes() as usize]; count]
}

async fn connected(client: &CacheClient, kind: WireKind) {
    eventually("the wire is there", || client.wires().iter().any(|wire| wire.kind == kind && wire.connected))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_is_a_lookup_and_a_fetch() {
    for kind in wires().into_iter().filter(|kind| *kind != WireKind::Mem) {
        let site = Site::start(128).await;
        let client = site.client(Some(kind));
        let space = space("t");
        let chain = hashes(&space, 1, 30);
        devices::publish_after(&client, &space, None, &chain[..20]).await;
        connected(&client, kind).await;
        // First position, targets, and what must come of it.
        for (first, count, expected) in
            [(0, 30, 20), (0, 7, 7), (5, 30, 15), (19, 4, 1), (20, 3, 0), (0, 0, 0)]
        {
            let mut memory = targets(&space, count);
            let (lookup, fetched) = client.read(&space, &chain, first, &mut memory).await;
            assert_eq!(lookup.resident(), 20, "{kind} {first} {count}");
            assert_eq!(lookup.outcomes[20], Outcome::Miss(MissReason::NeverStored), "{kind}");
            assert_eq!(fetched.outcomes.len(), expected, "{kind} {first} {count}: {:?}", fetched.outcomes);
            assert!(fetched.iter().all(|outcome| outcome.is_hit()), "{kind}: {:?}", fetched.outcomes);
            assert!(expected == 0 || fetched.wire == Some(kind), "{kind}: {:?}", fetched.wire);
            for (i, memory) in memory.iter().enumerate() {
                match i < expected {
                    true => assert!(*memory == payload(&space, &chain[first + i]), "{kind}: other bytes"),
                    false => assert!(memory.iter().all(|byte| *byte == 0xEE), "{kind}: a target touched"),
                }
            }
        }
        let other = hashes(&space, 2, 5);
        let (lookup, fetched) = client.read(&space, &other, 0, &mut targets(&space, 5)).await;
        assert_eq!((lookup.resident(), fetched.outcomes.len()), (0, 0), "{kind}");
        drop((lookup, client));
        let server = &site.server;
        eventually("nothing is held", || server.usage().leases == 0 && server.usage().sessions == 0).await;
        server.audit().unwrap();
        site.server.shutdown().await.unwrap();
    }
}

/// Passes TCP on, and counts how often the client speaks after it heard something.
async fn turns(port: u16, turns: Arc<AtomicU64>) {
    let listener = TcpListener::bind(("127.0.0.2", port)).await.unwrap();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let mut server = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
            let turns = turns.clone();
            tokio::spawn(async move {
                let (mut question, mut answer) = (vec![0; 64 << 10], vec![0; 64 << 10]);
                let mut heard = true;
                loop {
                    tokio::select! {
                        Ok(count @ 1..) = client.read(&mut question) => {
                            turns.fetch_add(u64::from(heard), Ordering::Relaxed);
                            heard = false;
                            server.write_all(&question[..count]).await.unwrap();
                        }
                        Ok(count @ 1..) = server.read(&mut answer) => {
                            heard = true;
                            if client.write_all(&answer[..count]).await.is_err() {
                                return;
                            }
                        }
                        else => return,
                    }
                }
            });
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_takes_one_round_trip() {
    let folder = tempfile::tempdir().unwrap();
    let hosts = vec!["127.0.0.1".into(), "127.0.0.2".into()];
    let valid = Duration::from_secs(3600);
    let dir = folder.path().to_owned();
    let certs = cairn_server::certs::make(&cairn_server::certs::CertsOptions { dir, hosts, valid }).unwrap();
    let mut config = cairn_tests::wires::with_tls(config(64), &certs);
    config.wires.shm = false;
    config.wires.quic = false;
    let server = cairn_server::Server::start(config).await.unwrap();
    let count = Arc::new(AtomicU64::new(0));
    turns(server.data_address().unwrap().port(), count.clone()).await;
    turns(server.address().port(), Arc::default()).await;
    let mut options = options(&server, &certs.ca);
    options.endpoint = format!("https://127.0.0.2:{}", server.address().port());
    options.wire = Some(WireKind::Tls);
    let client = CacheClient::start(options).unwrap();
    let space = space("t");
    let chain = hashes(&space, 1, 20);
    devices::publish_after(&client, &space, None, &chain).await;
    connected(&client, WireKind::Tls).await;
    let mut memory = targets(&space, 20);
    // What finds nothing, or only what is skipped, costs a round trip, too, and no new connection.
    for (chain, first) in [(hashes(&space, 9, 5), 0), (chain.clone(), 20)] {
        for _ in 0..2 {
            let before = count.load(Ordering::Relaxed);
            client.read(&space, &chain, first, &mut memory).await;
            assert_eq!(count.load(Ordering::Relaxed) - before, 1, "a read of nothing");
        }
    }
    let before = count.load(Ordering::Relaxed);
    let (lookup, fetched) = client.read(&space, &chain, 0, &mut memory).await;
    assert!(fetched.len() == 20 && fetched.iter().all(|outcome| outcome.is_hit()));
    let one = count.load(Ordering::Relaxed);
    assert_eq!(one - before, 1, "a read");
    let run = lookup.run.unwrap();
    assert_eq!(fetch_verified(&client, &space, &chain).await, 20);
    assert_eq!(count.load(Ordering::Relaxed) - one, 2, "a lookup, and then a fetch");
    drop((run, client));
    server.shutdown().await.unwrap();
}
