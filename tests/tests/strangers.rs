//! Peers that connect and then say nothing, or nonsense, and too many of them: they cost a bounded place for a bounded time.

#![allow(clippy::unwrap_used)]

use cairn_client::WireKind;
use cairn_tests::wires::Site;
use cairn_tests::*;
use rand::{RngCore, SeedableRng, rngs::StdRng};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

/// All handshakes together are cut off before this.
const PATIENCE: Duration = Duration::from_secs(12);

/// Waits until the other side closes the connection.
async fn closed<S: AsyncRead + Unpin>(socket: &mut S) -> Duration {
    let started = Instant::now();
    let mut buffer = vec![0; 4096];
    let end = async {
        // Whatever it says before it hangs up.
        while matches!(socket.read(&mut buffer).await, Ok(1..)) {}
    };
    tokio::time::timeout(PATIENCE, end).await.expect("the server hangs up");
    started.elapsed()
}

async fn nonsense<S: AsyncRead + AsyncWrite + Unpin>(mut socket: S, seed: u64) {
    let mut bytes = vec![0; 70_000];
    StdRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    // It may hang up in the middle.
    let _ = socket.write_all(&bytes).await;
    closed(&mut socket).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_and_nonsense_are_cut_off_on_every_port() {
    let mut config = config(16);
    config.limits.handshake_ms = 1500;
    let site = Site::with(config).await;
    let session = site.session().await;
    let grpc = site.server.address();
    let data = site.server.data_address().unwrap();
    let path = session.offer(WireKind::Shm);
    let mut tasks = Vec::new();
    for address in [grpc, data] {
        tasks.push(tokio::spawn(async move {
            let mut silent = TcpStream::connect(address).await.unwrap();
            assert!(closed(&mut silent).await > Duration::from_secs(1), "it had its time");
        }));
        for seed in 0..4 {
            tasks.push(tokio::spawn(async move {
                nonsense(TcpStream::connect(address).await.unwrap(), seed).await;
            }));
        }
    }
    let socket = path.clone();
    tasks.push(tokio::spawn(async move {
        let mut silent = UnixStream::connect(socket).await.unwrap();
        closed(&mut silent).await;
    }));
    for seed in 0..4 {
        let socket = path.clone();
        tasks.push(tokio::spawn(async move {
            nonsense(UnixStream::connect(socket).await.unwrap(), seed).await;
        }));
    }
    // TLS is fine, and then silence: before HTTP/2, and before the handshake of the data path.
    for address in [grpc, data] {
        let tls = session.tls();
        tasks.push(tokio::spawn(async move {
            let mut config = rustls::ClientConfig::clone(&tls);
            if address == grpc {
                config.alpn_protocols = vec![b"h2".to_vec()];
            }
            let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
            let socket = TcpStream::connect(address).await.unwrap();
            let name = "127.0.0.1".try_into().unwrap();
            let mut silent = connector.connect(name, socket).await.unwrap();
            closed(&mut silent).await;
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    // Those who have something to say are served all the while.
    let client = site.client(None);
    let space = space("t");
    let chain = hashes(&space, 1, 4);
    client.publish(&space, None, &blocks(&space, &chain)).await;
    assert_eq!(fetch_verified(&client, &space, &chain).await, 4);
    drop((client, session));
    site.server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_bounded() {
    let mut config = config(16);
    config.limits.max_connections = 3;
    let site = Site::with(config).await;
    let client = site.client(Some(WireKind::Grpc));
    client.open_space(&space("t")).await.unwrap();
    let address = site.server.address();
    let mut others = Vec::new();
    for _ in 0..2 {
        others.push(TcpStream::connect(address).await.unwrap());
    }
    // Two wait for TLS that never comes; the next one is turned away at once.
    eventually_async("a fourth connection is refused", || async {
        let mut fourth = TcpStream::connect(address).await.unwrap();
        let mut byte = [0];
        let read = tokio::time::timeout(Duration::from_millis(200), fourth.read(&mut byte)).await;
        matches!(read, Ok(Ok(0) | Err(_)))
    })
    .await;
    drop(others);
    assert!(client.open_space(&space("u")).await.is_ok(), "who was there is still served");
    // Data connections of one session, likewise.
    let session = site.session_when_possible().await;
    let mut wires = Vec::new();
    let refused = loop {
        match session.wire(&site.server, WireKind::Tls).await {
            Ok(wire) => wires.push(wire),
            Err(status) => break status,
        }
    };
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted, "{refused}");
    assert_eq!(wires.len(), 64);
    drop((wires, session, client));
    site.server.shutdown().await.unwrap();
}

async fn eventually_async<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    for _ in 0..100 {
        if condition().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("still not: {what}");
}
