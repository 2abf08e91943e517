//! The NVMe tier of a whole server: blocks outlive memory and restarts, room is bounded, and whatever a device does, no wrong byte
//! is served and the server goes on.

#![allow(clippy::unwrap_used)]

use cairn_core::DeviceCondition;
use cairn_proto::{BlockHash, MissReason, Outcome, Tier};
use cairn_server::nvme::fault::{FaultRates, Faults};
use cairn_server::{Server, TenantConfig};
use cairn_tests::devices::*;
use cairn_tests::*;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;

#[tokio::test(flavor = "multi_thread")]
async fn what_memory_cannot_hold_comes_back_from_the_device() {
    let folder = TempDir::new().unwrap();
    let (server, client) = server_and_client(with_device(16, folder.path(), 64)).await;
    recovered(&server).await;
    let space = space("t");
    let chains: Vec<_> = (0..6).map(|seed| hashes(&space, seed, 12)).collect();
    for (i, chain) in chains.iter().enumerate() {
        publish(&client, &space, chain).await;
        written(&server, 12 * (i as u64 + 1)).await;
    }
    assert_eq!(server.usage().host_blocks, 16);
    for chain in &chains {
        let found = client.lookup(&space, chain).await;
        assert!(found.outcomes.iter().all(|outcome| outcome.is_hit()), "{:?}", found.outcomes);
        drop(found);
        assert_eq!(fetch_verified(&client, &space, chain).await, 12);
    }
    let counters = server.counters();
    assert!(counters.hit_blocks[Tier::Nvme as usize] >= 56, "{counters:?}");
    assert_eq!(counters.evicted_blocks, 0, "every block is somewhere");
    assert!(counters.demoted_blocks > 50);
    let device = server.devices()[0];
    assert_eq!(device.counters.stored_blocks, 72, "what is on the device is not written again");
    server.audit().unwrap();
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_finds_every_durable_block_and_a_flush_stays_a_flush() {
    for io in ["io_uring", "threads"] {
        let folder = TempDir::new().unwrap();
        let mut config = with_device(16, folder.path(), 64);
        config.nvme.io = io.into();
        let (server, client) = server_and_client(config.clone()).await;
        recovered(&server).await;
        let (kept, flushed) = (space("t"), space_with("t", cairn_proto::Layout::new(8, 4, 128, 32).unwrap()));
        let chain = hashes(&kept, 1, 30);
        let other = hashes(&flushed, 2, 4);
        publish(&client, &kept, &chain[..15]).await;
        // Or the other space could push them out of memory before they are written.
        durable(&client, &kept, &chain[..15]).await;
        publish(&client, &flushed, &other).await;
        durable(&client, &flushed, &other).await;
        client.flush(flushed.id()).await.unwrap();
        publish_after(&client, &kept, Some(chain[14]), &chain[15..22]).await;
        durable(&client, &kept, &chain[..22]).await;
        publish_after(&client, &kept, Some(chain[21]), &chain[22..]).await;
        durable(&client, &kept, &chain).await;
        // No orderly end: the files are as they are at this moment.
        let copy = TempDir::new().unwrap();
        copy_folder(folder.path(), copy.path());
        server.shutdown().await.unwrap();
        for path in [copy.path(), folder.path()] {
            config.nvme.device[0].path = path.to_owned();
            let (server, client) = server_and_client(config.clone()).await;
            recovered(&server).await;
            assert_eq!(fetch_verified(&client, &kept, &chain).await, 30, "{io}");
            assert_eq!(fetch_verified(&client, &flushed, &other).await, 0, "{io}");
            server.audit().unwrap();
            server.shutdown().await.unwrap();
        }
    }
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.metadata().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_is_never_larger_than_configured_and_wears_within_its_bound() {
    let folder = TempDir::new().unwrap();
    let capacity_mib = 17;
    let (server, client) = server_and_client(with_device(16, folder.path(), capacity_mib)).await;
    recovered(&server).await;
    let space = space("t");
    let hot = hashes(&space, 0, 8);
    publish(&client, &space, &hot).await;
    written(&server, 8).await;
    for seed in 1..40 {
        let chain = hashes(&space, seed, 10);
        publish(&client, &space, &chain).await;
        client.lookup(&space, &hot).await;
        eventually("the queue drains", || server.devices()[0].queued_blocks == 0).await;
        assert!(disk_usage(folder.path()) <= capacity_mib << 20);
    }
    let device = server.devices()[0];
    assert!(device.counters.reclaimed_segments > 20, "{device:?}");
    assert!(device.counters.evicted_blocks > 200, "{device:?}");
    assert!(device.counters.write_amplification() <= 1.6, "{device:?}");
    assert_eq!(fetch_verified(&client, &space, &hot).await, 8, "what is used stays");
    server.audit().unwrap();
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn flipped_bits_in_files_are_all_found_and_never_served() {
    use std::os::unix::fs::FileExt;
    let folder = TempDir::new().unwrap();
    let (server, client) = server_and_client(with_device(16, folder.path(), 64)).await;
    recovered(&server).await;
    let space = space("t");
    let chains: Vec<_> = (0..4).map(|seed| hashes(&space, seed, 12)).collect();
    for (i, chain) in chains.iter().enumerate() {
        publish(&client, &space, chain).await;
        written(&server, 12 * (i as u64 + 1)).await;
    }
    // Ten blocks that are on the device only.
    let mut flipped = Vec::new();
    for (i, hash) in chains[0].iter().enumerate().take(10) {
        let payload = payload(&space, hash);
        let (file, at) = find_in_segments(folder.path(), &payload[..64]);
        let at = at + 4096 * i + 7;
        let mut byte = [0];
        file.read_exact_at(&mut byte, at as u64).unwrap();
        file.write_all_at(&[byte[0] ^ (1 << (i % 8))], at as u64).unwrap();
        flipped.push(*hash);
    }
    let found = client.lookup(&space, &chains[0]).await.run.unwrap();
    let mut targets = vec![vec![0u8; space.block_bytes() as usize]; 12];
    let outcomes = client.fetch(&found, 0, &mut targets).await;
    for (i, outcome) in outcomes.iter().enumerate() {
        let expected = if i < 10 { Outcome::Miss(MissReason::Quarantined) } else { Outcome::Hit(Tier::Nvme) };
        assert_eq!(*outcome, expected, "block {i}");
    }
    drop(found);
    assert_eq!(server.counters().quarantined_blocks, flipped.len() as u64, "injected = detected");
    let corrupt: u64 = server.devices().iter().map(|device| device.counters.corrupt_blocks).sum();
    assert_eq!(corrupt, flipped.len() as u64);
    let outcomes = client.lookup(&space, &chains[0]).await.outcomes;
    assert_eq!(outcomes[0], Outcome::Miss(MissReason::Quarantined));
    publish(&client, &space, &chains[0]).await;
    assert_eq!(fetch_verified(&client, &space, &chains[0]).await, 12);
    server.audit().unwrap();
    server.shutdown().await.unwrap();
}

fn find_in_segments(folder: &Path, start: &[u8]) -> (std::fs::File, usize) {
    for entry in std::fs::read_dir(folder.join("segments")).unwrap().map(Result::unwrap) {
        let content = std::fs::read(entry.path()).unwrap();
        if let Some(page) = content.chunks(4096).position(|page| page.starts_with(start)) {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(entry.path()).unwrap();
            return (file, page * 4096);
        }
    }
    panic!("the block is in no segment");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_scrubber_finds_what_nobody_reads() {
    use std::os::unix::fs::FileExt;
    let folder = TempDir::new().unwrap();
    let mut config = with_device(16, folder.path(), 64);
    config.nvme.scrub_mib_per_s = 1000;
    let (server, client) = server_and_client(config).await;
    recovered(&server).await;
    let space = space("t");
    let rot = |hash: &BlockHash| {
        let (file, at) = find_in_segments(folder.path(), &payload(&space, hash)[..64]);
        file.write_all_at(b"rot", at as u64 + 1000).unwrap();
    };
    let corrupt = |server: &Server| server.devices()[0].counters.corrupt_blocks;
    // In memory as well: only the copy on the device goes.
    let chain = hashes(&space, 1, 10);
    publish(&client, &space, &chain).await;
    written(&server, 10).await;
    assert_eq!(server.devices()[0].counters.read_blocks, 0, "a check is nobody's read");
    rot(&chain[4]);
    eventually("the scrubber comes by", || corrupt(&server) == 1).await;
    assert_eq!(client.lookup(&space, &chain).await.resident(), 10);
    assert_eq!(server.counters().quarantined_blocks, 0);
    // On the device only: the block goes.
    for seed in 2..4 {
        publish(&client, &space, &hashes(&space, seed, 12)).await;
        written(&server, 10 + 12 * (u64::from(seed) - 1)).await;
    }
    rot(&chain[2]);
    eventually("the scrubber comes by again", || server.counters().quarantined_blocks == 1).await;
    assert_eq!(client.lookup(&space, &chain).await.resident(), 2);
    server.audit().unwrap();
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_is_gone_costs_misses_and_can_come_back() {
    let folder = TempDir::new().unwrap();
    let faults = Faults::new(1, FaultRates::default());
    let config = with_device(16, folder.path(), 64);
    let server = Server::start_with(config, Some(faults.clone())).await.unwrap();
    let client = client(&server);
    recovered(&server).await;
    let space = space("t");
    let chains: Vec<_> = (0..4).map(|seed| hashes(&space, seed, 12)).collect();
    for (i, chain) in chains.iter().enumerate() {
        publish(&client, &space, chain).await;
        written(&server, 12 * (i as u64 + 1)).await;
    }
    faults.set_gone(true);
    for chain in &chains[..3] {
        let Some(run) = client.lookup(&space, chain).await.run else { continue };
        let mut targets = vec![vec![0u8; space.block_bytes() as usize]; run.len()];
        client.fetch(&run, 0, &mut targets).await;
    }
    eventually("the device is given up", || server.devices()[0].state == DeviceCondition::Lost).await;
    let outcomes = client.lookup(&space, &chains[0]).await.outcomes;
    assert_eq!(outcomes[0], Outcome::Miss(MissReason::DeviceLost));
    // Memory takes new blocks and serves them.
    let fresh = hashes(&space, 9, 4);
    publish(&client, &space, &fresh).await;
    assert_eq!(fetch_verified(&client, &space, &fresh).await, 4);
    server.audit().unwrap();
    let stats = client.stats().await.unwrap();
    assert_eq!(stats.devices[0].state, "lost");
    faults.set_gone(false);
    let path = folder.path().display().to_string();
    let mut attached = client.attach_device(&path).await;
    for _ in 0..100 {
        if attached.is_ok() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        attached = client.attach_device(&path).await;
    }
    attached.unwrap();
    eventually("the device is back", || {
        server.devices().last().is_some_and(|device| device.state == DeviceCondition::Ready)
    })
    .await;
    for chain in &chains {
        assert_eq!(fetch_verified(&client, &space, chain).await, 12);
    }
    server.audit().unwrap();
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_file_system_leaves_a_smaller_device_and_a_server_that_serves() {
    let folder = TempDir::new().unwrap();
    let rates = FaultRates { no_space: 1, ..FaultRates::default() };
    let faults = Faults::new(1, rates);
    let server = Server::start_with(with_device(16, folder.path(), 32), Some(faults.clone())).await.unwrap();
    let client = client(&server);
    recovered(&server).await;
    let space = space("t");
    for seed in 0..6 {
        let chain = hashes(&space, seed, 12);
        publish(&client, &space, &chain).await;
        assert_eq!(fetch_verified(&client, &space, &chain).await, 12);
    }
    assert_eq!((server.devices()[0].live_blocks, server.devices()[0].counters.stored_blocks), (0, 0));
    // Room comes back, and the device is used.
    faults.set_rates(FaultRates::default());
    written(&server, 12).await;
    server.audit().unwrap();
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn directories_that_cannot_be_used_do_not_keep_the_server_down() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("precious.txt"), "keep me").unwrap();
    let missing = folder.path().join("not there");
    for path in [folder.path().to_owned(), missing] {
        let (server, client) = server_and_client(with_device(16, &path, 32)).await;
        let space = space("t");
        let chain = hashes(&space, 1, 5);
        publish(&client, &space, &chain).await;
        assert_eq!(fetch_verified(&client, &space, &chain).await, 5);
        assert_eq!(client.stats().await.unwrap().devices[0].state, "lost");
        server.shutdown().await.unwrap();
    }
    assert_eq!(std::fs::read_to_string(folder.path().join("precious.txt")).unwrap(), "keep me");
}

fn key_file(folder: &Path, name: &str, byte: u8) -> PathBuf {
    let path = folder.join(name);
    std::fs::write(&path, format!("{byte:02x}").repeat(32)).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_of_a_tenant_with_a_key_are_unreadable_without_it() {
    let (folder, keys) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let mut config = with_device(16, folder.path(), 64);
    let tenant = |key: Option<PathBuf>| TenantConfig {
        name: "t".into(),
        max_blocks: None,
        max_mib: None,
        encryption_key_file: key,
        encryption_key_command: None,
    };
    config.tenant = vec![tenant(Some(key_file(keys.path(), "right", 7)))];
    let (server, client) = server_and_client(config.clone()).await;
    recovered(&server).await;
    let space = space("t");
    let chain = hashes(&space, 1, 12);
    let more = hashes(&space, 2, 12);
    publish(&client, &space, &chain).await;
    durable(&client, &space, &chain).await;
    publish(&client, &space, &more).await;
    durable(&client, &space, &more).await;
    assert_eq!(fetch_verified(&client, &space, &chain).await, 12, "read back through the device");
    assert!(server.devices()[0].counters.read_blocks > 0);
    server.shutdown().await.unwrap();
    for entry in std::fs::read_dir(folder.path().join("segments")).unwrap().map(Result::unwrap) {
        let content = std::fs::read(entry.path()).unwrap();
        let plain = payload(&space, &chain[0]);
        assert!(
            !content.chunks(4096).any(|page| page.starts_with(&plain[..64])),
            "a plain block on the device"
        );
    }
    let wrong = tenant(Some(key_file(keys.path(), "wrong", 8)));
    for (tenant, expected) in [(wrong, 0), (tenant(None), 0), (config.tenant[0].clone(), 12)] {
        let copy = TempDir::new().unwrap();
        copy_folder(folder.path(), copy.path());
        let mut config = config.clone();
        config.nvme.device[0].path = copy.path().to_owned();
        config.tenant = vec![tenant];
        let (server, client) = server_and_client(config).await;
        recovered(&server).await;
        let verified = fetch_verified(&client, &space, &chain).await;
        assert_eq!(
            verified,
            expected,
            "{:?} {:?}",
            client.lookup(&space, &chain).await.outcomes,
            server.devices()
        );
        server.shutdown().await.unwrap();
    }
}

/// Faults of all kinds at once, from one seed: `CAIRN_FAULT_SEED` replays it.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_a_device_does_no_wrong_byte_is_served() {
    let number = |name| std::env::vars().find(|(key, _)| key == name).map(|(_, v)| v.parse::<u64>().unwrap());
    let first = number("CAIRN_FAULT_SEED").unwrap_or_else(rand::random);
    let rounds = number("CAIRN_FAULT_ROUNDS").unwrap_or(4);
    for seed in first..first + rounds {
        println!("CAIRN_FAULT_SEED={seed}");
        simulate(seed).await;
    }
}

async fn simulate(seed: u64) {
    use rand::{Rng, SeedableRng, rngs::StdRng};
    let mut rng = StdRng::seed_from_u64(seed);
    let folder = TempDir::new().unwrap();
    let rates = FaultRates {
        error: 200,
        short_write: 100,
        torn_write: 30,
        flipped_read: 20,
        delay: 10,
        no_space: 50,
    };
    let faults: Arc<Faults> = Faults::new(seed, FaultRates::default());
    let config = with_device(16, folder.path(), 24);
    let space = space("t");
    for round in 0..3 {
        faults.set_rates(FaultRates::default());
        let server = Server::start_with(config.clone(), Some(faults.clone())).await.unwrap();
        let client = client(&server);
        recovered(&server).await;
        faults.set_rates(rates);
        for _ in 0..40 {
            let chain = hashes(&space, rng.random_range(0..8), 10);
            if rng.random_bool(0.5) {
                client.publish(&space, None, &blocks(&space, &chain)).await;
            }
            // Panics on any byte that is not as published.
            fetch_verified(&client, &space, &chain).await;
        }
        faults.set_rates(FaultRates::default());
        if round % 2 == 0 {
            server.audit().unwrap();
        }
        server.shutdown().await.unwrap();
    }
    assert!(faults.torn() > 0, "the history must tear writes");
}
