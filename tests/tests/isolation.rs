//! What clients can see of the server's memory, looked at from inside. Alone in its file, because it counts the mappings of its
//! process.

#![allow(clippy::unwrap_used)]

use cairn_client::{CacheClient, WireKind};
use cairn_proto::BlockHash;
use cairn_server::certs::token_hash;
use cairn_server::{Server, TokenConfig};
use cairn_tests::wires::{certs, options, with_tls};
use cairn_tests::*;

/// Memory that one tenant has mapped goes to another only as other memory.
#[tokio::test(flavor = "multi_thread")]
async fn shared_memory_of_one_tenant_never_shows_anothers_blocks() {
    let mut config = config(16);
    let token = |name: &str, rights: &[&str]| TokenConfig {
        tenant: name.into(),
        rights: rights.iter().map(|right| (*right).into()).collect(),
        blake3: Some(token_hash(name)),
        file: None,
    };
    config.token =
        vec![token("a", &["read", "publish"]), token("b", &["read", "publish"]), token("ops", &["admin"])];
    let folder = tempfile::tempdir().unwrap();
    let certs = certs(folder.path());
    let server = Server::start(with_tls(config, &certs)).await.unwrap();
    let client = |token: &str| {
        let mut options = options(&server, &certs.ca);
        options.security.token = Some(token.into());
        options.wire = Some(WireKind::Shm);
        CacheClient::start(options).unwrap()
    };
    let (a, b) = (client("a"), client("b"));
    let (space_a, space_b) = (space("a"), space("b"));
    let chain = hashes(&space_a, 1, 16);
    a.publish(&space_a, None, &blocks(&space_a, &chain)).await;
    // a maps all four chunks of the server.
    assert_eq!(fetch_verified(&a, &space_a, &chain).await, 16);
    assert_eq!(mapped_chunks(), 2 * 4, "once by the server and once by a, in one process");
    let admin = client("ops");
    admin.flush(space_a.id()).await.unwrap();
    let secret = hashes(&space_b, 2, 16);
    let stored = b.publish(&space_b, None, &blocks(&space_b, &secret)).await;
    assert!(stored.iter().all(|stored| stored.is_stored()), "{stored:?}");
    assert_eq!(fetch_verified(&b, &space_b, &secret).await, 16);
    // What a still has mapped is what it was: the server's mapping, b's, and a's old one.
    let all = memory_that_clients_mapped();
    let shows = |hash: &BlockHash| {
        let start = payload(&space_b, hash)[..64].to_vec();
        all.iter().filter(|chunk| chunk.chunks(4096).any(|page| page.starts_with(&start))).count()
    };
    for hash in &secret {
        assert_eq!(shows(hash), 1, "of all client mappings, b's block is in b's only");
    }
    // The other direction: what a stored over the network, never mapped by anybody, is not in what b can map.
    let network = {
        let mut options = options(&server, &certs.ca);
        options.security.token = Some("a".into());
        options.wire = Some(WireKind::Tls);
        CacheClient::start(options).unwrap()
    };
    admin.flush(space_b.id()).await.unwrap();
    let mine = hashes(&space_a, 3, 16);
    let stored = network.publish(&space_a, None, &blocks(&space_a, &mine)).await;
    assert!(stored.iter().all(|stored| stored.is_stored()), "{stored:?}");
    admin.flush(space_a.id()).await.unwrap();
    let one = hashes(&space_b, 4, 1);
    let stored = b.publish(&space_b, None, &blocks(&space_b, &one)).await;
    assert!(stored.iter().all(|stored| stored.is_stored()), "{stored:?}");
    assert_eq!(fetch_verified(&b, &space_b, &one).await, 1);
    let all = memory_that_clients_mapped();
    for hash in &mine {
        let start = payload(&space_a, hash)[..64].to_vec();
        assert!(!all.iter().any(|chunk| chunk.chunks(4096).any(|page| page.starts_with(&start))));
    }
    drop((a, b, admin, network));
    server.audit().unwrap();
    server.shutdown().await.unwrap();
}

fn mapped_chunks() -> usize {
    let text = std::fs::read_to_string("/proc/self/maps").unwrap();
    text.lines().filter(|line| line.contains("cairn-host-chunk")).count()
}

/// The read-only mappings of chunks in this process: those of clients.
fn memory_that_clients_mapped() -> Vec<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let memory = std::fs::File::open("/proc/self/mem").unwrap();
    let text = std::fs::read_to_string("/proc/self/maps").unwrap();
    let mine = text.lines().filter(|line| line.contains("cairn-host-chunk") && line.contains(" r--s "));
    mine.map(|line| {
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let (start, end) = (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap());
        let mut content = vec![0; (end - start) as usize];
        memory.read_exact_at(&mut content, start).unwrap();
        content
    })
    .collect()
}
