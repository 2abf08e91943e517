//! Tenants that do not trust each other, and strangers: none can read, overwrite, probe or push out what is another's, and what
//! crosses the network is not readable.

#![allow(clippy::unwrap_used)]

use cairn_client::{CacheClient, ClientOptions, Security, Stored, WireKind};
use cairn_proto::{ErrorKind, KeySpace, Layout, MissReason, Outcome, pb};
use cairn_server::certs::{Certs, CertsOptions, make, token_hash};
use cairn_server::{Config, Server, TenantConfig, TokenConfig};
use cairn_tests::wires::{Session, certs, options, with_tls};
use cairn_tests::*;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tonic::Code;

fn token(tenant: &str, rights: &[&str], token: &str) -> TokenConfig {
    TokenConfig {
        tenant: tenant.into(),
        rights: rights.iter().map(|right| (*right).into()).collect(),
        blake3: Some(token_hash(token)),
        file: None,
    }
}

fn two_tenants(slots: u64) -> Config {
    let mut config = config(slots);
    config.token = vec![
        token("a", &["read", "publish"], "token-a"),
        token("b", &["read", "publish"], "token-b"),
        token("b", &["read"], "token-b-reader"),
        token("b", &["publish"], "token-b-writer"),
        token("ops", &["admin"], "token-ops"),
    ];
    config
}

struct Site {
    server: Server,
    certs: Certs,
    _folder: tempfile::TempDir,
}

impl Site {
    async fn start(config: Config) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let certs = certs(folder.path());
        let server = Server::start(with_tls(config, &certs)).await.unwrap();
        Self { server, certs, _folder: folder }
    }

    fn client(&self, token: &str) -> CacheClient {
        self.client_over(token, None)
    }

    fn client_over(&self, token: &str, wire: Option<WireKind>) -> CacheClient {
        let mut options = options(&self.server, &self.certs.ca);
        options.security.token = Some(token.into());
        options.wire = wire;
        CacheClient::start(options).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_cannot_read_write_or_probe_another() {
    let site = Site::start(two_tenants(64)).await;
    let (a, b) = (site.client("token-a"), site.client("token-b"));
    let space = space("a");
    let chain = hashes(&space, 1, 8);
    let stored = a.publish(&space, None, &blocks(&space, &chain)).await;
    assert!(stored.iter().all(|stored| *stored == Stored::Committed));
    // The very same space: b knows all that a knows, except the token.
    let refused = b.open_space(&space).await.unwrap_err();
    assert_eq!(refused.kind, ErrorKind::FixInput);
    let probed = b.lookup(&space, &chain).await;
    assert_eq!(probed.outcomes, vec![Outcome::Miss(MissReason::NotAdmitted); 8]);
    let never = b.lookup(&space, &hashes(&space, 9, 8)).await;
    assert_eq!(never.outcomes, probed.outcomes, "what is there and what is not look the same");
    let written = b.publish(&space, None, &blocks(&space, &hashes(&space, 2, 2))).await;
    assert!(written.iter().all(|stored| matches!(stored, Stored::Failed(_))), "{written:?}");
    // Below the client: requests that name the space without declaring it, whether it exists or not, get the same words.
    let explained = b.explain(space.id(), &chain).await.unwrap_err();
    let unknown = b.explain(cairn_tests::space("nobody").id(), &chain).await.unwrap_err();
    assert_eq!((explained.kind, &explained.message), (unknown.kind, &unknown.message));
    assert_eq!(fetch_verified(&a, &space, &chain).await, 8);
    drop((a, b));
    site.server.shutdown().await.unwrap();
}

/// By hand, as somebody would who does not use our client: sessions, leases and reservations of others, by their numbers.
#[tokio::test(flavor = "multi_thread")]
async fn numbers_of_others_are_worth_nothing() {
    let site = Site::start(two_tenants(64)).await;
    let a = Session::open_with(&site.server, &site.certs.ca, Some("token-a")).await;
    let b = Session::open_with(&site.server, &site.certs.ca, Some("token-b")).await;
    let space = space("a");
    let chain = hashes(&space, 1, 4);
    a.declare(&space).await;
    let reservation = a.reserve(&space, &chain).await;
    // b's token, a's session.
    let mut api = b.api.clone();
    let space_id: bytes::Bytes = space.id().0.to_vec().into();
    let lookup = pb::LookupRequest {
        session_id: a.id,
        space_id: space_id.clone(),
        block_hashes: cairn_proto::BlockHash::concat(&chain),
        ..Default::default()
    };
    let refused = api.lookup(lookup.clone()).await.unwrap_err();
    let nobody = api.lookup(pb::LookupRequest { session_id: 999_999, ..lookup.clone() }).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (nobody.code(), nobody.message()));
    assert_eq!(refused.code(), Code::NotFound);
    let own = api.lookup(pb::LookupRequest { session_id: b.id, ..lookup }).await.unwrap_err();
    assert_eq!(own.code(), Code::NotFound, "the space was not declared in b's session");
    let abort = pb::AbortRequest { session_id: a.id, reservation_id: reservation };
    assert_eq!(api.abort(abort).await.unwrap_err().code(), Code::NotFound);
    let fetch = pb::FetchRequest { session_id: a.id, lease_id: 1, count: 1, ..Default::default() };
    assert_eq!(api.fetch(fetch).await.unwrap_err().code(), Code::NotFound);
    let header = pb::PublishHeader { session_id: a.id, reservation_id: reservation };
    let chunk = pb::PublishChunk { chunk: Some(pb::publish_chunk::Chunk::Header(header)) };
    let publish = api.publish(tokio_stream::iter([chunk])).await;
    assert_eq!(publish.unwrap_err().code(), Code::NotFound);
    assert_eq!(site.server.usage().reservations, 1, "a's reservation is untouched");
    // Data connections of b cannot be opened for a's session.
    for kind in [WireKind::Shm, WireKind::Tls, WireKind::Quic] {
        let key = b.key;
        let mut stolen = Session::open_with(&site.server, &site.certs.ca, Some("token-b")).await;
        stolen.id = a.id;
        assert!(stolen.wire_with(&site.server, kind, key).await.is_err(), "{kind}");
    }
    drop((a, b, api));
    site.server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_carry_rights() {
    let site = Site::start(two_tenants(64)).await;
    let writer = site.client("token-b-writer");
    let space = space("b");
    let chain = hashes(&space, 1, 4);
    for wire in [WireKind::Grpc, WireKind::Shm, WireKind::Tls, WireKind::Quic] {
        let space = space_with("b", Layout::new(8, 4, 128, 16 + wire as u32).unwrap());
        let chain = hashes(&space, 1, 4);
        let writer = site.client_over("token-b-writer", Some(wire));
        let reader = site.client_over("token-b-reader", Some(wire));
        let stored = writer.publish(&space, None, &blocks(&space, &chain)).await;
        assert!(stored.iter().all(|stored| *stored == Stored::Committed), "{wire}: {stored:?}");
        assert_eq!(writer.lookup(&space, &chain).await.outcomes[0], Outcome::Miss(MissReason::NotAdmitted));
        assert_eq!(fetch_verified(&reader, &space, &chain).await, 4, "{wire}");
        let refused = reader.publish(&space, None, &blocks(&space, &hashes(&space, 2, 1))).await;
        assert_eq!(refused, [Stored::Failed(MissReason::NotAdmitted)], "{wire}");
    }
    writer.publish(&space, None, &blocks(&space, &chain)).await;
    let admin = site.client("token-ops");
    assert!(admin.stats().await.is_ok());
    for token in ["token-a", "token-b"] {
        let client = site.client(token);
        assert_eq!(client.stats().await.unwrap_err().kind, ErrorKind::FixInput);
        assert!(client.flush(space.id()).await.is_err());
    }
    let reader = site.client("token-b-reader");
    assert_eq!(fetch_verified(&reader, &space, &chain).await, 4, "nobody flushed it");
    drop((writer, admin, reader));
    site.server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_good_token_there_is_nothing() {
    let site = Site::start(two_tenants(16)).await;
    for token in [None, Some(""), Some("token"), Some("token-a "), Some("token-A")] {
        let mut options = options(&site.server, &site.certs.ca);
        options.security.token = token.map(str::to_owned);
        let client = CacheClient::start(options).unwrap();
        let refused = client.open_space(&space("a")).await.unwrap_err();
        assert!(refused.message.contains("token"), "{token:?}: {refused}");
        assert!(!client.is_connected());
    }
    assert_eq!(site.server.usage().sessions, 0);
    site.server.shutdown().await.unwrap();
}

/// Neither options nor errors show a token.
#[test]
fn secrets_are_not_shown() {
    let mut options = ClientOptions::new("https://127.0.0.1:1");
    options.security.token = Some("very-secret".into());
    assert!(!format!("{options:?}").contains("very-secret"));
    let token = token("a", &["read"], "very-secret");
    let shown = format!("{token:?}");
    assert!(!shown.contains("very-secret") && !shown.contains(token.blake3.as_ref().unwrap()));
}

/// One tenant fills everything it may: another's blocks stay, and there is still room for more of them.
#[tokio::test(flavor = "multi_thread")]
async fn a_flood_stays_within_its_quota() {
    let mut config = two_tenants(32);
    let tenant = |name: &str, max_mib| TenantConfig {
        name: name.into(),
        max_blocks: None,
        max_mib: Some(max_mib),
        encryption_key_file: None,
        encryption_key_command: None,
    };
    // Eight chunks of 1 MiB in all.
    config.tenant = vec![tenant("a", 4), tenant("b", 4)];
    let site = Site::start(config).await;
    let (a, b) = (site.client("token-a"), site.client("token-b"));
    let mine = space("a");
    let chain = hashes(&mine, 1, 16);
    a.publish(&mine, None, &blocks(&mine, &chain)).await;
    assert_eq!(fetch_verified(&a, &mine, &chain).await, 16, "a's share is full");
    // b floods: one shape after the other, each of which wants chunks of its own, and many blocks of one.
    for shape in 1..=40u32 {
        let space = space_with("b", Layout::new(shape, 1, 16, 16).unwrap());
        b.publish(&space, None, &blocks(&space, &hashes(&space, shape, 2))).await;
    }
    let space = space_with("b", Layout::new(8, 4, 128, 16).unwrap());
    for seed in 0..20 {
        b.publish(&space, None, &blocks(&space, &hashes(&space, seed, 8))).await;
    }
    assert_eq!(fetch_verified(&a, &mine, &chain).await, 16, "b pushed nothing of a's out");
    assert!(fetch_verified(&b, &space, &hashes(&space, 19, 8)).await > 0, "b can use its own share");
    site.server.audit().unwrap();
    drop((a, b));
    site.server.shutdown().await.unwrap();
}

/// Passes bytes on and keeps a copy of all of them.
async fn tap(target: std::net::SocketAddr) -> (std::net::SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let copy = seen.clone();
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let server = TcpStream::connect(target).await.unwrap();
            let (from_client, to_client) = client.into_split();
            let (from_server, to_server) = server.into_split();
            tokio::spawn(record(from_client, to_server, copy.clone()));
            tokio::spawn(record(from_server, to_client, copy.clone()));
        }
    });
    (address, seen)
}

async fn record(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    seen: Arc<Mutex<Vec<u8>>>,
) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        seen.lock().unwrap().extend(&buffer[..count]);
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}

/// A text that is easy to find.
fn marked(space: &KeySpace, hash: &cairn_proto::BlockHash) -> cairn_client::Block {
    let bytes: Vec<u8> =
        b"attention state of a secret prompt; ".repeat(space.block_bytes() as usize / 36 + 1);
    let bytes = bytes[..space.block_bytes() as usize].to_vec();
    let checksum = cairn_proto::Checksum::of(&space.id(), hash, &bytes);
    cairn_client::Block { hash: *hash, checksum, bytes: bytes.into() }
}

fn contains(seen: &[u8], what: &[u8]) -> bool {
    seen.windows(what.len()).any(|window| window == what)
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_on_the_way_can_read_blocks_or_tokens() {
    let mark: &[u8] = b"attention state of a secret prompt";
    for secure in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let certs = certs(folder.path());
        let config = match secure {
            true => with_tls(two_tenants(16), &certs),
            // The same tap sees everything of a server without TLS: so it does look.
            false => config(16),
        };
        let server = Server::start(config).await.unwrap();
        let (address, seen) = tap(server.address()).await;
        let scheme = if secure { "https" } else { "http" };
        let mut options = ClientOptions::new(format!("{scheme}://{address}"));
        options.security = Security {
            ca_file: Some(certs.ca.clone()),
            token: Some("token-a".into()),
            ..Security::default()
        };
        options.wire = Some(WireKind::Grpc);
        let client = CacheClient::start(options).unwrap();
        let space = space("a");
        let chain = hashes(&space, 1, 2);
        let offered: Vec<_> = chain.iter().map(|hash| marked(&space, hash)).collect();
        let stored = client.publish(&space, None, &offered).await;
        assert!(stored.iter().all(|stored| stored.is_stored()), "{stored:?}");
        let run = client.lookup(&space, &chain).await.run.unwrap();
        let mut targets = vec![vec![0; space.block_bytes() as usize]; 2];
        assert!(client.fetch(&run, 0, &mut targets).await.iter().all(|outcome| outcome.is_hit()));
        assert!(targets[0].starts_with(mark));
        let seen = seen.lock().unwrap();
        assert!(seen.len() > 1 << 20, "the blocks went through here, both ways");
        assert_eq!(contains(&seen, mark), !secure);
        drop((client, run));
    }
}

/// Likewise for UDP and the TLS data path.
#[tokio::test(flavor = "multi_thread")]
async fn data_paths_are_encrypted() {
    let site = Site::start(two_tenants(16)).await;
    let mut session = Session::open_with(&site.server, &site.certs.ca, Some("token-a")).await;
    let space = space("a");
    let chain = hashes(&space, 1, 2);
    let publisher = site.client("token-a");
    let offered: Vec<_> = chain.iter().map(|hash| marked(&space, hash)).collect();
    publisher.publish(&space, None, &offered).await;
    session.declare(&space).await;
    let (lease, sums) = session.lease(&space, &chain, 60_000).await;
    let mark: &[u8] = b"attention state of a secret prompt";
    let real: std::net::SocketAddr = format!("127.0.0.1{}", session.offer(WireKind::Tls)).parse().unwrap();
    let (address, seen) = tap(real).await;
    session.redirect(WireKind::Tls, &format!(":{}", address.port()));
    let quic: std::net::SocketAddr = format!("127.0.0.1{}", session.offer(WireKind::Quic)).parse().unwrap();
    let (address, datagrams) = udp_tap(quic).await;
    session.redirect(WireKind::Quic, &format!(":{}", address.port()));
    for (kind, seen) in [(WireKind::Tls, &seen), (WireKind::Quic, &datagrams)] {
        let wire = session.wire(&site.server, kind).await.unwrap();
        let found = session.fetch(&*wire, (&space, &chain, &sums), lease, 0..2).await.unwrap();
        assert!(found.iter().all(|(_, bytes)| bytes.starts_with(mark)), "{kind}");
        let seen = seen.lock().unwrap();
        assert!(seen.len() > 2 * space.block_bytes() as usize, "{kind}: all went through here");
        assert!(!contains(&seen, mark), "{kind}");
        assert!(!contains(&seen, &session.key), "{kind}");
    }
    drop((session, publisher));
    site.server.shutdown().await.unwrap();
}

async fn udp_tap(target: std::net::SocketAddr) -> (std::net::SocketAddr, Arc<Mutex<Vec<u8>>>) {
    let outside = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let inside = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    inside.connect(target).await.unwrap();
    let address = outside.local_addr().unwrap();
    let seen = Arc::new(Mutex::new(Vec::new()));
    let copy = seen.clone();
    tokio::spawn(async move {
        let (mut here, mut there) = (vec![0; 65_536], vec![0; 65_536]);
        let mut client = None;
        loop {
            tokio::select! {
                Ok((count, from)) = outside.recv_from(&mut here) => {
                    client = Some(from);
                    copy.lock().unwrap().extend(&here[..count]);
                    let _ = inside.send(&here[..count]).await;
                }
                Ok(count) = inside.recv(&mut there) => {
                    copy.lock().unwrap().extend(&there[..count]);
                    if let Some(client) = client {
                        let _ = outside.send_to(&there[..count], client).await;
                    }
                }
            }
        }
    });
    (address, seen)
}

fn made(folder: &Path, hosts: &[&str], valid: Duration) -> Certs {
    let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
    make(&CertsOptions { dir: folder.to_owned(), hosts, valid }).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_cannot_prove_who_it_is_is_not_talked_to() {
    let hour = Duration::from_secs(3600);
    let folder = tempfile::tempdir().unwrap();
    let good = made(&folder.path().join("good"), &["127.0.0.1"], hour);
    let other = made(&folder.path().join("other"), &["127.0.0.1"], hour);
    let elsewhere = made(&folder.path().join("elsewhere"), &["cache.example"], hour);
    let expired = made(&folder.path().join("expired"), &["127.0.0.1"], Duration::ZERO);
    let cases = [
        ("a good one", &good, &good.ca, true),
        ("of another authority", &good, &other.ca, false),
        ("for another host", &elsewhere, &elsewhere.ca, false),
        ("expired", &expired, &expired.ca, false),
    ];
    tokio::time::sleep(Duration::from_millis(1100)).await;
    for (name, server_certs, ca, works) in cases {
        let server = Server::start(with_tls(config(16), server_certs)).await.unwrap();
        let client = CacheClient::start(options(&server, ca)).unwrap();
        let opened = client.open_space(&space("a")).await;
        assert_eq!(opened.is_ok(), works, "{name}: {opened:?}");
        if !works {
            let message = opened.unwrap_err().message.to_lowercase();
            assert!(message.contains("certificate"), "{name}: {message}");
        }
        drop(client);
        server.shutdown().await.unwrap();
    }
    // Plain HTTP at a TLS port, and TLS at a plain one.
    let server = Server::start(with_tls(config(16), &good)).await.unwrap();
    let plain = CacheClient::start(ClientOptions::new(format!("http://{}", server.address()))).unwrap();
    assert!(plain.open_space(&space("a")).await.is_err());
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn mutual_tls_asks_clients_for_certificates_on_every_path() {
    let folder = tempfile::tempdir().unwrap();
    let good = certs(&folder.path().join("good"));
    let other = certs(&folder.path().join("other"));
    let mut config = with_tls(config(16), &good);
    config.tls.client_ca_file = Some(good.ca.clone());
    let server = Server::start(config).await.unwrap();
    let space = space("a");
    for wire in [WireKind::Grpc, WireKind::Tls, WireKind::Quic] {
        for (certs, works) in [(Some(&good), true), (Some(&other), false), (None, false)] {
            let mut options = options(&server, &good.ca);
            options.wire = Some(wire);
            options.security.cert_file = certs.map(|certs| certs.client.0.clone());
            options.security.key_file = certs.map(|certs| certs.client.1.clone());
            let client = CacheClient::start(options).unwrap();
            let chain = hashes(&space, wire as u32, 2);
            let stored = client.publish(&space, None, &blocks(&space, &chain)).await;
            assert_eq!(stored.iter().all(|stored| stored.is_stored()), works, "{wire}: {stored:?}");
        }
    }
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_does_not_listen_beyond_loopback_by_accident() {
    let folder = tempfile::tempdir().unwrap();
    let certs = certs(folder.path());
    let everywhere = ([0, 0, 0, 0], 0).into();
    let mut open = config(16);
    open.server.listen = everywhere;
    let refused = Server::start(open.clone()).await.err().unwrap().to_string();
    assert!(refused.contains("cairn certs") && refused.contains("allow_insecure_network"), "{refused}");
    // TLS without tokens, and tokens without TLS, are half of it.
    assert!(Server::start(with_tls(open.clone(), &certs)).await.is_err());
    let mut tokens = two_tenants(16);
    tokens.server.listen = everywhere;
    assert!(Server::start(tokens.clone()).await.is_err());
    let mut data = two_tenants(16);
    data.wires.data_listen = Some(everywhere);
    assert!(Server::start(data).await.is_err());
    let mut metrics = with_tls(two_tenants(16), &certs);
    metrics.server.http_listen = everywhere;
    let refused = Server::start(metrics).await.err().unwrap().to_string();
    assert!(refused.contains("allow_insecure_http"), "{refused}");
    // Nothing of the above left a socket or a port behind that stops this one. (It binds loopback all the same.)
    let both = with_tls(two_tenants(16), &certs);
    Server::start(both).await.unwrap().shutdown().await.unwrap();
}
