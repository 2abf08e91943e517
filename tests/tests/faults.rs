//! A network that lies: a proxy between client and server flips bits, cuts connections and stalls. Every case must end in
//! verified bytes or in a counted miss within the deadline, and leave nothing behind.

#![allow(clippy::unwrap_used)]

use cairn_client::{CacheClient, ClientOptions, WireKind};
use cairn_proto::{MissReason, Outcome};
use cairn_tests::*;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What the proxy does to the bytes on their way to the client.
#[derive(Clone, Copy)]
enum Fault {
    /// One bit in about this many bytes, and never in the first kilobyte of a read, so that mostly payload is hit.
    Flip(u64),
    /// Ends the connection after this many bytes.
    Cut(u64),
    /// Stops passing bytes on after this many.
    Stall(u64),
}

struct Proxy {
    address: SocketAddr,
    active: Arc<AtomicBool>,
    injected: Arc<AtomicU64>,
}

impl Proxy {
    async fn start(target: SocketAddr, fault: Fault, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (active, injected) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (flag, count) = (active.clone(), injected.clone());
        tokio::spawn(async move {
            let mut connections = 0;
            while let Ok((client, _)) = listener.accept().await {
                connections += 1;
                let Ok(server) = TcpStream::connect(target).await else { continue };
                let (mut from_client, to_client) = client.into_split();
                let (from_server, mut to_server) = server.into_split();
                tokio::spawn(async move { tokio::io::copy(&mut from_client, &mut to_server).await });
                let rng = StdRng::seed_from_u64(seed + connections);
                tokio::spawn(distort(from_server, to_client, fault, (flag.clone(), count.clone()), rng));
            }
        });
        Self { address, active, injected }
    }

    fn client(&self) -> CacheClient {
        let mut options = ClientOptions::new(format!("http://{}", self.address));
        options.fetch_timeout = Duration::from_millis(700);
        // The others do not go through here.
        options.wire = Some(WireKind::Grpc);
        CacheClient::start(options).unwrap()
    }
}

async fn distort(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    fault: Fault,
    (active, injected): (Arc<AtomicBool>, Arc<AtomicU64>),
    mut rng: StdRng,
) {
    const HEADERS: usize = 1024;
    let mut buffer = vec![0u8; 64 << 10];
    let mut passed = 0u64;
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let mut bytes = &mut buffer[..count];
        if active.load(Ordering::Relaxed) {
            passed += count as u64;
            match fault {
                Fault::Flip(every) if count > 2 * HEADERS && rng.random_range(0..every) < count as u64 => {
                    let at = rng.random_range(HEADERS..count);
                    bytes[at] ^= 1 << rng.random_range(0..8);
                    injected.fetch_add(1, Ordering::Relaxed);
                }
                Fault::Cut(after) if passed > after => {
                    injected.fetch_add(1, Ordering::Relaxed);
                    let keep = count / 2;
                    bytes = &mut bytes[..keep];
                    let _ = to.write_all(bytes).await;
                    return;
                }
                Fault::Stall(after) if passed > after => {
                    injected.fetch_add(1, Ordering::Relaxed);
                    std::future::pending::<()>().await;
                }
                _ => {}
            }
        }
        if to.write_all(bytes).await.is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn flipped_bits_on_the_wire_never_become_bytes() {
    let (server, direct) = server_and_client(config(64)).await;
    let space = space("t");
    let chain = hashes(&space, 1, 40);
    direct.publish(&space, None, &blocks(&space, &chain)).await;
    let proxy = Proxy::start(server.address(), Fault::Flip(2 << 20), 11).await;
    let client = proxy.client();
    assert_eq!(fetch_verified(&client, &space, &chain).await, 40, "without faults all arrives");
    proxy.active.store(true, Ordering::Relaxed);
    let (mut corrupt, mut hits, mut missed) = (0, 0, 0);
    for _ in 0..30 {
        let Some(run) = client.lookup(&space, &chain).await.run else {
            missed += 1;
            eventually("the client has a session again", || client.is_connected()).await;
            continue;
        };
        let mut targets = vec![vec![0u8; space.block_bytes() as usize]; run.len()];
        let outcomes = client.fetch(&run, 0, &mut targets).await;
        for ((outcome, target), hash) in outcomes.iter().zip(&targets).zip(&chain) {
            match outcome {
                Outcome::Hit(_) => {
                    assert!(*target == payload(&space, hash), "a hit with wrong bytes");
                    hits += 1;
                }
                Outcome::Corrupt => corrupt += 1,
                _ => missed += 1,
            }
        }
    }
    let injected = proxy.injected.load(Ordering::Relaxed);
    println!("{injected} bits flipped: {corrupt} blocks corrupt, {missed} missed, {hits} verified");
    assert!(injected > 20 && corrupt > 5 && hits > 100);
    proxy.active.store(false, Ordering::Relaxed);
    assert_eq!(direct.stats().await.unwrap().quarantined_blocks, 0, "the server's own copies are good");
    assert_eq!(fetch_verified(&direct, &space, &chain).await, 40);
    drop(client);
    eventually("nothing is held", || server.usage().leases == 0 && server.usage().sessions == 1).await;
    server.audit().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_and_stalled_connections_are_misses_within_the_deadline() {
    for fault in [Fault::Cut(3 << 20), Fault::Stall(3 << 20)] {
        let (server, direct) = server_and_client(config(64)).await;
        let space = space("t");
        let chain = hashes(&space, 1, 40);
        direct.publish(&space, None, &blocks(&space, &chain)).await;
        let proxy = Proxy::start(server.address(), fault, 5).await;
        let client = proxy.client();
        let run = client.lookup(&space, &chain).await.run.unwrap();
        proxy.active.store(true, Ordering::Relaxed);
        let mut targets = vec![vec![0u8; space.block_bytes() as usize]; run.len()];
        let started = Instant::now();
        let outcomes = client.fetch(&run, 0, &mut targets).await;
        assert!(
            started.elapsed() < Duration::from_secs(3),
            "a deadline of 0.7 s took {:?}",
            started.elapsed()
        );
        let arrived = outcomes.iter().take_while(|outcome| outcome.is_hit()).count();
        assert!(arrived > 5 && arrived < 40, "{arrived} blocks before the fault");
        for (target, hash) in targets.iter().zip(&chain).take(arrived) {
            assert!(*target == payload(&space, hash));
        }
        let expected = match fault {
            Fault::Stall(_) => MissReason::Deadline,
            _ => MissReason::PeerDown,
        };
        assert_eq!(outcomes[arrived], Outcome::Miss(expected));
        drop((run, client));
        eventually("nothing is held", || server.usage().leases == 0 && server.usage().sessions == 1).await;
        assert_eq!(fetch_verified(&direct, &space, &chain).await, 40);
        server.audit().unwrap();
    }
}

/// One bit of each block flips after its checksum was made and before the server has it: every one is counted.
#[tokio::test(flavor = "multi_thread")]
async fn every_bit_that_flips_on_its_way_in_is_counted() {
    let (server, client) = server_and_client(config(64)).await;
    let space = space("t");
    let injected = 24;
    let mut detected = 0;
    for seed in 0..injected {
        let chain = hashes(&space, seed, 1);
        let mut block = blocks(&space, &chain).remove(0);
        let mut bytes = block.bytes.to_vec();
        let bit = (seed as usize * 104_729 + 11) % (bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        block.bytes = bytes.into();
        let stored = client.publish(&space, None, &[block]).await;
        detected += u32::from(stored == [cairn_client::Stored::Corrupt]);
        assert_eq!(client.lookup(&space, &chain).await.resident(), 0);
    }
    assert_eq!(detected, injected, "injected = detected");
    assert_eq!(client.stats().await.unwrap().checksum_mismatches, u64::from(injected));
    server.audit().unwrap();
    server.shutdown().await.unwrap();
}
