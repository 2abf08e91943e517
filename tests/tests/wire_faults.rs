//! Networks that lose, delay, reorder, flip and stop. The client reaches the server through proxies on 127.0.0.2, at the same port
//! numbers, and is not told. Every case must end in verified bytes or in counted misses within the deadline; what one wire cannot bring,
//! the next one does.

#![allow(clippy::unwrap_used)]

use cairn_client::{CacheClient, ClientOptions, Security, View, WireKind};
use cairn_proto::{BlockHash, KeySpace, MissReason, Outcome};
use cairn_server::Server;
use cairn_server::certs::{Certs, CertsOptions, make};
use cairn_tests::wires::with_tls;
use cairn_tests::*;
use cairn_transfer::QuicOptions;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// What a network does once it is told to.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    /// Loses, duplicates, delays or reorders each packet with this probability. UDP only.
    Lossy(f64),
    /// Flips a bit in one piece out of so many.
    Flip(u64),
    /// Passes nothing on any more.
    BlackHole,
    /// Ends connections after so many bytes. TCP only.
    Cut(u64),
    /// Everything takes this long more.
    Delay(Duration),
}

#[derive(Clone)]
struct Switch {
    on: Arc<AtomicBool>,
    injected: Arc<AtomicU64>,
    fault: Fault,
}

impl Switch {
    fn new(fault: Fault) -> Self {
        Self { on: Arc::default(), injected: Arc::default(), fault }
    }

    fn active(&self) -> Option<Fault> {
        self.on.load(Ordering::Relaxed).then_some(self.fault)
    }

    fn count(&self) {
        self.injected.fetch_add(1, Ordering::Relaxed);
    }
}

async fn tcp_proxy(port: u16, switch: Switch) {
    let listener = TcpListener::bind(("127.0.0.2", port)).await.unwrap();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await else { continue };
            client.set_nodelay(true).unwrap();
            server.set_nodelay(true).unwrap();
            let (from_client, to_client) = client.into_split();
            let (from_server, to_server) = server.into_split();
            tokio::spawn(pass(from_client, to_server, Switch::new(switch.fault)));
            tokio::spawn(pass(from_server, to_client, switch.clone()));
        }
    });
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    switch: Switch,
) {
    let mut buffer = vec![0; 64 << 10];
    let mut passed = 0;
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        match switch.active() {
            Some(Fault::Flip(every)) if passed / every != (passed + count as u64) / every => {
                buffer[count / 2] ^= 8;
                switch.count();
            }
            Some(Fault::BlackHole) => {
                switch.count();
                std::future::pending::<()>().await;
            }
            Some(Fault::Cut(after)) if passed + count as u64 > after => {
                switch.count();
                return;
            }
            Some(Fault::Delay(time)) => tokio::time::sleep(time).await,
            _ => {}
        }
        if switch.active().is_some() {
            passed += count as u64;
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

async fn udp_proxy(port: u16, switch: Switch) {
    let outside = Arc::new(UdpSocket::bind(("127.0.0.2", port)).await.unwrap());
    tokio::spawn(async move {
        let mut buffer = vec![0; 65_536];
        let mut rng = StdRng::seed_from_u64(9);
        let mut inside: Option<(SocketAddr, Arc<UdpSocket>)> = None;
        while let Ok((count, from)) = outside.recv_from(&mut buffer).await {
            // A client that moved is another one for the server.
            if inside.as_ref().is_none_or(|(client, _)| *client != from) {
                let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
                socket.connect(("127.0.0.1", port)).await.unwrap();
                tokio::spawn(back(socket.clone(), outside.clone(), from, switch.clone()));
                inside = Some((from, socket));
            }
            let (_, socket) = inside.as_ref().unwrap();
            distort(buffer[..count].to_vec(), &switch, &mut rng, socket.clone(), None).await;
        }
    });
}

async fn back(inside: Arc<UdpSocket>, outside: Arc<UdpSocket>, client: SocketAddr, switch: Switch) {
    let mut buffer = vec![0; 65_536];
    let mut rng = StdRng::seed_from_u64(10);
    while let Ok(count) = inside.recv(&mut buffer).await {
        distort(buffer[..count].to_vec(), &switch, &mut rng, outside.clone(), Some(client)).await;
    }
}

async fn distort(
    mut packet: Vec<u8>,
    switch: &Switch,
    rng: &mut StdRng,
    socket: Arc<UdpSocket>,
    to: Option<SocketAddr>,
) {
    let (mut copies, mut delay) = (1, Duration::ZERO);
    match switch.active() {
        Some(Fault::Lossy(probability)) if rng.random_bool(probability) => {
            switch.count();
            match rng.random_range(0..3) {
                0 => copies = 0,
                1 => copies = 2,
                // Later than those that come after it.
                _ => delay = Duration::from_millis(rng.random_range(1..20)),
            }
        }
        Some(Fault::Flip(every)) if rng.random_ratio(1, every as u32) => {
            let at = rng.random_range(0..packet.len());
            packet[at] ^= 1 << rng.random_range(0..8);
            switch.count();
        }
        Some(Fault::BlackHole) => {
            switch.count();
            return;
        }
        Some(Fault::Delay(time)) => delay = time,
        _ => {}
    }
    for _ in 0..copies {
        let (packet, socket) = (packet.clone(), socket.clone());
        let send = async move {
            tokio::time::sleep(delay).await;
            let _ = match to {
                Some(to) => socket.send_to(&packet, to).await,
                None => socket.send(&packet).await,
            };
        };
        match delay.is_zero() {
            true => send.await,
            false => drop(tokio::spawn(send)),
        }
    }
}

/// A server behind proxies, and a chain that it holds.
struct Site {
    server: Server,
    certs: Certs,
    space: KeySpace,
    chain: Vec<BlockHash>,
    _folder: tempfile::TempDir,
}

const FETCH_TIMEOUT: Duration = Duration::from_secs(6);

impl Site {
    /// Only the data path has the fault; the API passes through a proxy without one.
    async fn start(kind: WireKind, switch: &Switch) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let hosts = vec!["127.0.0.1".into(), "127.0.0.2".into()];
        let valid = Duration::from_secs(3600);
        let certs = make(&CertsOptions { dir: folder.path().to_owned(), hosts, valid }).unwrap();
        let mut config = with_tls(config(64), &certs);
        config.wires.shm = false;
        config.wires.tls = kind == WireKind::Tls;
        config.wires.quic = kind == WireKind::Quic;
        let server = Server::start(config).await.unwrap();
        tcp_proxy(server.address().port(), Switch::new(Fault::BlackHole)).await;
        let data = server.data_address().unwrap().port();
        match kind {
            WireKind::Tls => tcp_proxy(data, switch.clone()).await,
            _ => udp_proxy(data, switch.clone()).await,
        }
        let space = space("t");
        let chain = hashes(&space, 1, 40);
        let site = Self { server, certs, space, chain, _folder: folder };
        let direct = site.client_at("127.0.0.1", Some(WireKind::Grpc));
        direct.publish(&site.space, None, &blocks(&site.space, &site.chain)).await;
        site
    }

    fn client_at(&self, host: &str, wire: Option<WireKind>) -> CacheClient {
        let mut options = ClientOptions::new(format!("https://{host}:{}", self.server.address().port()));
        options.security = Security { ca_file: Some(self.certs.ca.clone()), ..Security::default() };
        options.fetch_timeout = FETCH_TIMEOUT;
        options.wire = wire;
        options.quic = QuicOptions::default();
        CacheClient::start(options).unwrap()
    }

    /// One fetch of all blocks: how many were verified, and what the others are.
    async fn fetch(&self, client: &CacheClient) -> (usize, Vec<Outcome>, Option<WireKind>) {
        self.bring(client, false).await
    }

    /// The same, with the lookup or after it.
    async fn bring(&self, client: &CacheClient, as_one: bool) -> (usize, Vec<Outcome>, Option<WireKind>) {
        let mut targets = vec![vec![0; self.space.block_bytes() as usize]; self.chain.len()];
        let started = Instant::now();
        let fetched = if as_one {
            client.read(&self.space, &self.chain, 0, &mut targets).await.1
        } else {
            let run = client.lookup(&self.space, &self.chain).await.run.unwrap();
            client.fetch(&run, 0, &mut targets[..run.len()]).await
        };
        assert!(started.elapsed() < FETCH_TIMEOUT + Duration::from_secs(2), "{:?}", started.elapsed());
        let mut verified = 0;
        for ((outcome, target), hash) in fetched.iter().zip(&targets).zip(&self.chain) {
            if outcome.is_hit() {
                assert!(*target == payload(&self.space, hash), "a hit with wrong bytes");
                verified += 1;
            }
        }
        let others = fetched.outcomes.iter().copied().filter(|outcome| !outcome.is_hit()).collect();
        (verified, others, fetched.wire)
    }

    async fn end(self, client: CacheClient) {
        drop(client);
        let server = &self.server;
        eventually("nothing is held", || server.usage().leases == 0 && server.usage().sessions == 0).await;
        server.audit().unwrap();
        self.server.shutdown().await.unwrap();
    }
}

async fn connected(client: &CacheClient, kind: WireKind) {
    eventually("the wire is there", || client.wires().iter().any(|wire| wire.kind == kind && wire.connected))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_wire_cannot_bring_the_next_one_does() {
    let cases = [
        (WireKind::Tls, Fault::Cut(3 << 20)),
        (WireKind::Tls, Fault::Flip(2 << 20)),
        (WireKind::Tls, Fault::BlackHole),
        (WireKind::Quic, Fault::BlackHole),
    ];
    for ((kind, fault), as_one) in cases.into_iter().flat_map(|case| [(case, false), (case, true)]) {
        let switch = Switch::new(fault);
        let site = Site::start(kind, &switch).await;
        let client = site.client_at("127.0.0.2", None);
        assert!(client.open_space(&site.space).await.is_ok());
        connected(&client, kind).await;
        let (verified, _, wire) = site.bring(&client, as_one).await;
        assert_eq!((verified, wire), (40, Some(kind)), "without the fault");
        switch.on.store(true, Ordering::Relaxed);
        let (verified, others, wire) = site.bring(&client, as_one).await;
        assert_eq!((verified, wire), (40, Some(WireKind::Grpc)), "{kind} {fault:?}: {others:?}");
        assert!(switch.injected.load(Ordering::Relaxed) > 0, "{kind} {fault:?}");
        let failures =
            |client: &CacheClient| client.wires().iter().find(|w| w.kind == kind).unwrap().failures;
        assert!(failures(&client) > 0, "{kind} {fault:?}: it is remembered");
        // It is left alone: the next fetch does not wait for it.
        let (_, _, wire) = site.fetch(&client).await;
        assert_eq!(wire, Some(WireKind::Grpc));
        // And tried again once the network is well.
        switch.on.store(false, Ordering::Relaxed);
        let mut back = None;
        for _ in 0..200 {
            back = site.fetch(&client).await.2;
            if back == Some(kind) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(back, Some(kind), "{kind} {fault:?}");
        assert_eq!(failures(&client), 0);
        site.end(client).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn quic_lives_with_loss_reordering_and_flipped_bits() {
    for fault in [Fault::Lossy(0.03), Fault::Flip(50), Fault::Delay(Duration::from_millis(5))] {
        let switch = Switch::new(fault);
        let site = Site::start(WireKind::Quic, &switch).await;
        let client = site.client_at("127.0.0.2", Some(WireKind::Quic));
        assert!(client.open_space(&site.space).await.is_ok());
        connected(&client, WireKind::Quic).await;
        switch.on.store(true, Ordering::Relaxed);
        let (mut verified, mut missed) = (0, 0);
        for _ in 0..3 {
            let (whole, others, _) = site.fetch(&client).await;
            verified += whole;
            missed += others.len();
            let expected = |outcome: &Outcome| matches!(outcome, Outcome::Miss(MissReason::Deadline));
            assert!(others.iter().all(expected), "{fault:?}: {others:?}");
        }
        println!("{fault:?}: {verified} verified, {missed} missed, {:?} injected", switch.injected);
        assert!(verified >= 60, "{fault:?}: most arrives all the same");
        switch.on.store(false, Ordering::Relaxed);
        site.end(client).await;
    }
}

/// A forced wire is never replaced: what it cannot bring is missed, with the reason, in time.
#[tokio::test(flavor = "multi_thread")]
async fn a_forced_wire_that_is_gone_costs_counted_misses() {
    for (kind, fault) in [(WireKind::Tls, Fault::BlackHole), (WireKind::Quic, Fault::BlackHole)] {
        let switch = Switch::new(fault);
        let site = Site::start(kind, &switch).await;
        let client = site.client_at("127.0.0.2", Some(kind));
        assert_eq!(site.fetch(&client).await.0, 40);
        switch.on.store(true, Ordering::Relaxed);
        let (verified, others, wire) = site.fetch(&client).await;
        assert_eq!((verified, others.len()), (0, 40), "{kind}: {others:?}");
        assert!(wire.is_none_or(|wire| wire == kind), "{kind}: {wire:?}");
        // The lookup before it may have found out that the wire is gone.
        let expected =
            |outcome: &Outcome| matches!(outcome, Outcome::Miss(MissReason::Deadline | MissReason::PeerDown));
        assert!(others.iter().all(expected), "{others:?}");
        site.end(client).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_follows_a_client_that_moves() {
    let site = Site::start(WireKind::Quic, &Switch::new(Fault::BlackHole)).await;
    let session = cairn_tests::wires::Session::open(&site.server, &site.certs.ca).await;
    let wire = session.quic(QuicOptions::default(), session.key).await.unwrap();
    session.declare(&site.space).await;
    let (lease, sums) = session.lease(&site.space, &site.chain, 60_000).await;
    for _ in 0..3 {
        let what = (&site.space, &site.chain[..], &sums[..]);
        let found = session.fetch(&wire, what, lease, 0..40).await.unwrap();
        assert!(found.iter().zip(&site.chain).all(|((_, bytes), hash)| *bytes == payload(&site.space, hash)));
        wire.rebind().unwrap();
    }
    drop((wire, session));
    site.server.shutdown().await.unwrap();
}

/// A second connection with the same settings resumes the TLS session of the first.
#[tokio::test(flavor = "multi_thread")]
async fn tls_sessions_are_resumed() {
    let site = Site::start(WireKind::Tls, &Switch::new(Fault::BlackHole)).await;
    let session = cairn_tests::wires::Session::open(&site.server, &site.certs.ca).await;
    let (tls, address) = (session.tls(), site.server.data_address().unwrap().to_string());
    let connect = || {
        let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
        cairn_transfer::TlsWire::connect(tls.clone(), (address.clone(), name), session.id, session.key)
    };
    let first = connect().await.unwrap();
    assert!(!first.is_resumed());
    drop(first);
    assert!(connect().await.unwrap().is_resumed());
    drop(session);
    site.server.shutdown().await.unwrap();
}

/// With QUIC, the first layer of all blocks is there long before the last one.
#[tokio::test(flavor = "multi_thread")]
async fn layers_come_one_after_the_other() {
    let site = Site::start(WireKind::Quic, &Switch::new(Fault::BlackHole)).await;
    let client = site.client_at("127.0.0.1", Some(WireKind::Quic));
    let run = client.lookup(&site.space, &site.chain).await.run.unwrap();
    let mut targets = vec![vec![0; site.space.block_bytes() as usize]; 40];
    let layers = site.space.layout().layers();
    let mut arrived = vec![0; 40];
    let (mut total, mut when_first_was_complete) = (0, None);
    let fetched = client
        .fetch_layers(&run, 0, &mut targets, &mut |block, layer, bytes| {
            assert_eq!(layer, arrived[block], "in order, each once");
            let whole = payload(&site.space, &site.chain[block]);
            assert!(*bytes == whole[layer * bytes.len()..(layer + 1) * bytes.len()]);
            total += 1;
            arrived[block] += 1;
            if when_first_was_complete.is_none() && arrived.iter().all(|count| *count > 0) {
                when_first_was_complete = Some(total);
            }
        })
        .await;
    assert!(fetched.iter().all(|outcome| outcome.is_hit()), "{fetched:?}");
    assert_eq!(fetched.wire, Some(WireKind::Quic));
    assert!(targets.iter().zip(&site.chain).all(|(target, hash)| *target == payload(&site.space, hash)));
    assert_eq!(arrived, vec![layers; 40]);
    let first = when_first_was_complete.unwrap();
    println!("{first} of {total} layers had arrived when every block had its first");
    assert!(first < total / 2, "{first} of {total}");
    drop(run);
    site.end(client).await;
}

fn right(view: &View, space: &KeySpace, chain: &[BlockHash]) -> bool {
    (0..view.len()).all(|i| view.block(i).is_ok_and(|bytes| *bytes == payload(space, &chain[i])))
}

/// A view shows the same bytes for as long as it lives: through eviction, flush, the end of its lease and of its session.
#[tokio::test(flavor = "multi_thread")]
async fn a_view_keeps_its_bytes() {
    let (server, client) = server_and_client(config(16)).await;
    let space = space("t");
    let chain = hashes(&space, 1, 8);
    client.publish(&space, None, &blocks(&space, &chain)).await;
    let run = client.lookup(&space, &chain).await.run.unwrap();
    let view = client.fetch_view(&run, 0, 8).await;
    assert_eq!(view.wire(), Some(WireKind::Shm));
    drop(run);
    client.flush(space.id()).await.unwrap();
    for seed in 2..12 {
        client.publish(&space, None, &blocks(&space, &hashes(&space, seed, 8))).await;
    }
    assert!(right(&view, &space, &chain), "everything else was replaced several times");
    // Requests that fail or are given up cost connections, never a view.
    let lost = client.lookup(&space, &hashes(&space, 11, 8)).await.run.unwrap();
    let mut targets = vec![vec![0; space.block_bytes() as usize]; 8];
    for micros in [0, 50, 100, 200, 400] {
        let fetch = client.fetch(&lost, 0, &mut targets);
        let _ = tokio::time::timeout(Duration::from_micros(micros), fetch).await;
        let offered = blocks(&space, &hashes(&space, 60 + micros as u32, 4));
        let publish = client.publish(&space, None, &offered);
        let _ = tokio::time::timeout(Duration::from_micros(micros), publish).await;
        drop(tokio::time::timeout(Duration::from_micros(micros), client.fetch_view(&lost, 0, 4)).await);
    }
    drop(lost);
    for seed in 12..20 {
        client.publish(&space, None, &blocks(&space, &hashes(&space, seed, 8))).await;
    }
    assert!(right(&view, &space, &chain));
    // The session ends; its process, and so its sockets, live on.
    drop(client);
    eventually("the session ended", || server.usage().sessions == 0).await;
    let other = cairn_tests::client(&server);
    for seed in 20..30 {
        other.publish(&space, None, &blocks(&space, &hashes(&space, seed, 8))).await;
    }
    assert!(right(&view, &space, &chain));
    drop(view);
    eventually("its slots are free", || server.usage().used_slots == server.usage().host_blocks).await;
    server.audit().unwrap();
    // And a view of a server that is gone.
    let chain = hashes(&space, 50, 4);
    other.publish(&space, None, &blocks(&space, &chain)).await;
    let run = other.lookup(&space, &chain).await.run.unwrap();
    let view = other.fetch_view(&run, 0, 4).await;
    server.shutdown().await.unwrap();
    assert!(right(&view, &space, &chain));
}

/// Where there is no shared memory a view is a copy, and nobody notices.
#[tokio::test(flavor = "multi_thread")]
async fn a_view_is_a_copy_where_it_must_be() {
    let site = Site::start(WireKind::Tls, &Switch::new(Fault::BlackHole)).await;
    let client = site.client_at("127.0.0.1", None);
    let run = client.lookup(&site.space, &site.chain).await.run.unwrap();
    let view = client.fetch_view(&run, 4, 8).await;
    assert!(right(&view, &site.space, &site.chain[4..]));
    assert_ne!(view.wire(), Some(WireKind::Shm));
    drop((view, run));
    site.end(client).await;
}
