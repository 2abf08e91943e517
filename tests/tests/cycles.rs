//! Clients that come, do something, and are gone without a word, over and over, on a server that is itself restarted: nothing may
//! be left of them. Alone in its file, because it counts the descriptors, mappings and threads of its process.
//!
//! `CAIRN_CYCLES` says how many (300 in every test run, 10,000 before a release), `CAIRN_CYCLES_SEED` which.

#![allow(clippy::unwrap_used)]

use cairn_client::WireKind;
use cairn_tests::wires::{Session, Site, wires};
use cairn_tests::*;
use cairn_transfer::{FetchJob, ShmWire};
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::sync::Arc;
use std::time::Duration;

fn setting(name: &str, default: u64) -> u64 {
    #[allow(clippy::disallowed_methods)]
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// What this process holds.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Held {
    descriptors: usize,
    chunk_mappings: usize,
    threads: usize,
}

fn held() -> Held {
    let count = |path: &str| std::fs::read_dir(path).unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let names = ["cairn-host-chunk", "cairn-staging", "cairn-rdma"];
    let shared = |line: &&str| names.iter().any(|name| line.contains(name));
    Held {
        descriptors: count("/proc/self/fd"),
        chunk_mappings: maps.lines().filter(shared).count(),
        threads: count("/proc/self/task"),
    }
}

/// One client's visit, cut off at a random moment.
async fn visit(site: &Site, rng: &mut StdRng) {
    let session = site.session().await;
    let kinds: Vec<_> = wires().into_iter().filter(|kind| *kind != WireKind::Mem).collect();
    let kind = kinds[rng.random_range(0..kinds.len())];
    // An emulated machine is slower.
    let longest_us = if kind == WireKind::Rdma { 300_000 } else { 6000 };
    let patience = Duration::from_micros(rng.random_range(0..longest_us));
    let (seed, blocks, deed) = (rng.random_range(0..40), rng.random_range(1..12), rng.random_range(0..4));
    // Whatever is in progress is dropped where it stands.
    let _ = tokio::time::timeout(patience, work(site, &session, kind, (seed, blocks, deed))).await;
}

async fn work(site: &Site, session: &Session, kind: WireKind, (seed, blocks, deed): (u32, usize, u32)) {
    let space = space("t");
    let chain = hashes(&space, seed, blocks);
    session.declare(&space).await;
    let Ok(wire) = session.wire(&site.server, kind).await else { return };
    let reservation = session.reserve(&space, &chain).await;
    if deed != 1 && reservation != 0 {
        let _ = wire.publish(&session.offer_all(&space, &chain, reservation)).await;
    }
    let (lease, sums) = session.lease(&space, &chain, 60_000).await;
    if deed == 2 && kind == WireKind::Shm {
        let shm = ShmWire::connect(session.offer(kind).as_ref(), session.id, session.key).await.unwrap();
        let blocks = 0..sums.len();
        let job = FetchJob { session: session.id, lease, blocks, locations: Arc::from([]), range_bytes: 0 };
        let Ok(view) = shm.pin(&job, space.block_bytes(), cairn_client::Reach::default()).await else {
            return;
        };
        for (i, hash) in chain.iter().enumerate().take(sums.len()) {
            assert!(view.bytes(i).unwrap() == payload(&space, hash));
        }
        return;
    }
    for _ in 0..3 {
        let what = (&space, &chain[..sums.len()], &sums[..]);
        let Ok(found) = session.fetch(&*wire, what, lease, 0..sums.len()).await else { return };
        for ((arrival, bytes), hash) in found.iter().zip(&chain) {
            if *arrival == Some(cairn_transfer::Arrival::Whole) {
                assert!(*bytes == payload(&space, hash), "other bytes than were stored");
            }
        }
    }
}

async fn nothing_is_left(site: &Site) {
    let server = &site.server;
    eventually("sessions, leases, reservations and slots are back", || {
        let usage = server.usage();
        usage.sessions == 0
            && usage.leases == 0
            && usage.reservations == 0
            && usage.used_slots == usage.host_blocks
    })
    .await;
    server.audit().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_vanish_leave_nothing() {
    let (cycles, seed) = (setting("CAIRN_CYCLES", 300), setting("CAIRN_CYCLES_SEED", 1));
    println!("CAIRN_CYCLES={cycles} CAIRN_CYCLES_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    // The first server brings what stays: threads of the runtime, descriptors of the system.
    let first = Site::start(64).await;
    for _ in 0..20 {
        visit(&first, &mut rng).await;
    }
    nothing_is_left(&first).await;
    first.server.shutdown().await.unwrap();
    settled(held().descriptors).await;
    let before = held();
    let mut done = 0;
    while done < cycles {
        let site = Site::start(64).await;
        let part = rng.random_range(40..160).min(cycles - done);
        for _ in 0..part {
            visit(&site, &mut rng).await;
        }
        done += part;
        // Half of the time the server goes while clients are still there.
        if rng.random_bool(0.5) {
            nothing_is_left(&site).await;
        }
        site.server.shutdown().await.unwrap();
    }
    settled(before.descriptors).await;
    let after = held();
    println!("{done} visits: {before:?} before, {after:?} after");
    assert!(after.descriptors <= before.descriptors, "{before:?} {after:?}");
    assert_eq!(after.chunk_mappings, 0, "{after:?}");
    assert!(after.threads <= before.threads + 1, "{before:?} {after:?}");
}

/// Sockets close a little after those who held them; those of QUIC after three probe timeouts.
async fn settled(descriptors: usize) {
    for _ in 0..2000 {
        let now = held();
        if now.descriptors <= descriptors && now.chunk_mappings == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
