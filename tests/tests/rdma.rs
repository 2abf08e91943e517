//! RDMA as clients see it: what only this wire promises, and what happens where there is no device. The conformance suite is in
//! `wires.rs`; what a key opens is tested beside the verbs.

#![cfg(feature = "rdma")]
#![allow(clippy::unwrap_used)]

use cairn_client::{CacheClient, WireKind};
use cairn_tests::wires::{Site, options, rdma_address};
use cairn_tests::*;
use std::time::Duration;

fn skipped() -> bool {
    let skipped = rdma_address().is_none();
    if skipped {
        println!("SKIPPED: no RDMA device (CAIRN_RDMA names an address of one)");
    }
    skipped
}

/// A server on a machine without a device says so and goes on; a client takes another wire.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_device_the_next_wire_is_taken() {
    let mut config = config(16);
    config.wires.shm = false;
    let mut site_config = config.clone();
    // Loopback is never on an RDMA device.
    site_config.wires.rdma_listen = Some(([127, 0, 0, 1], 0).into());
    let folder = tempfile::tempdir().unwrap();
    let certs = cairn_tests::wires::certs(folder.path());
    let mut config = cairn_tests::wires::with_tls(site_config.clone(), &certs);
    config.wires.rdma_listen = site_config.wires.rdma_listen;
    let server = cairn_server::Server::start(config).await.unwrap();
    let client = CacheClient::start(options(&server, &certs.ca)).unwrap();
    let space = space("t");
    let chain = hashes(&space, 1, 4);
    devices::publish_after(&client, &space, None, &chain).await;
    assert_eq!(fetch_verified(&client, &space, &chain).await, 4);
    let report = client.wires();
    assert!(report.iter().all(|wire| wire.kind != WireKind::Rdma || wire.transfers == 0), "{report:?}");
    drop(client);
    server.shutdown().await.unwrap();
}

/// A client that may choose takes RDMA where shared memory is not, and its fetches cost the server no request.
#[tokio::test(flavor = "multi_thread")]
async fn a_resident_run_is_read_without_the_server() {
    if skipped() {
        return;
    }
    let mut config = config(64);
    config.wires.shm = false;
    let site = Site::with(config).await;
    let client = site.client(None);
    let space = space("t");
    let chain = hashes(&space, 1, 20);
    // The first request finds what is connected by then.
    for _ in 0..300 {
        client.lookup(&space, &chain).await;
        if client.wires().iter().any(|wire| wire.kind == WireKind::Rdma && wire.connected) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    devices::publish_after(&client, &space, None, &chain).await;
    let stats = |kind: &'static str| {
        let client = client.clone();
        async move {
            let stats = client.stats().await.unwrap();
            stats.wires.into_iter().find(|wire| wire.wire == kind).unwrap_or_default()
        }
    };
    assert_eq!(fetch_verified(&client, &space, &chain).await, 20);
    let first = stats("rdma").await;
    assert_eq!(fetch_verified(&client, &space, &chain).await, 20);
    // What was read is told with the next lookup.
    client.lookup(&space, &chain).await;
    let second = stats("rdma").await;
    println!("{first:?} {second:?}");
    assert_eq!(second.fetches, first.fetches, "the second fetch asked the server");
    assert!(second.fetched_bytes >= 2 * 20 * space.block_bytes(), "{second:?}");
    assert_eq!(stats("tls").await.fetches, 0);
    drop(client);
    site.server.shutdown().await.unwrap();
}

/// Blocks of one tenant that take the memory of another's are never seen through an old key, and the new owner's arrive as they are.
#[tokio::test(flavor = "multi_thread")]
async fn chunks_that_change_hands_change_keys() {
    let kind = if skipped() { WireKind::Grpc } else { WireKind::Rdma };
    let mut config = config(8);
    config.wires.shm = false;
    let site = Site::with(config).await;
    let client = site.client(Some(kind));
    for round in 0..9 {
        // Three tenants for two chunks.
        let space = space(&format!("tenant {}", round % 3));
        let chain = hashes(&space, round, 4);
        devices::publish_after(&client, &space, None, &chain).await;
        assert_eq!(fetch_verified(&client, &space, &chain).await, 4, "round {round}");
        assert_eq!(fetch_verified(&client, &space, &chain).await, 4, "round {round}");
    }
    drop(client);
    site.server.shutdown().await.unwrap();
}

/// A server that goes in the middle costs misses, not wrong bytes; the next one is found, with new keys.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_restarts_is_found_again() {
    if skipped() {
        return;
    }
    let space = space("t");
    let chain = hashes(&space, 1, 40);
    let folder = tempfile::tempdir().unwrap();
    let certs = cairn_tests::wires::certs(folder.path());
    let mut settings = cairn_tests::wires::with_tls(config(64), &certs);
    settings.wires.shm = false;
    let server = cairn_server::Server::start(settings.clone()).await.unwrap();
    settings.server.listen = server.address();
    let mut options = options(&server, &certs.ca);
    options.wire = Some(WireKind::Rdma);
    let client = CacheClient::start(options).unwrap();
    devices::publish_after(&client, &space, None, &chain).await;
    let reading = async {
        let mut verified = 0;
        loop {
            match fetch_verified(&client, &space, &chain).await {
                40 => verified += 40,
                part => return verified + part,
            }
        }
    };
    let stopping = async {
        tokio::time::sleep(Duration::from_millis(400)).await;
        server.shutdown().await.unwrap();
    };
    let (verified, ()) = tokio::join!(reading, stopping);
    println!("{verified} blocks before and while the server went");
    assert!(verified > 0);
    let server = cairn_server::Server::start(settings).await.unwrap();
    let mut found = 0;
    for _ in 0..300 {
        devices::publish_after(&client, &space, None, &chain).await;
        found = fetch_verified(&client, &space, &chain).await;
        if found == 40 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(found, 40);
    drop(client);
    server.shutdown().await.unwrap();
}
