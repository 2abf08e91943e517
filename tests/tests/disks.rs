//! File systems as they are when things go wrong: a directory that vanishes, one that is full or read-only, one of another release, and
//! one that takes its time. The server serves from memory through all of it.
//!
//! The full and the read-only one need a small file system of their own: `CAIRN_SMALL_DIR` names an empty directory with less than 32 MiB.

#![allow(clippy::unwrap_used)]

use cairn_core::DeviceCondition;
use cairn_server::Server;
use cairn_server::nvme::fault::{FaultRates, Faults};
use cairn_tests::devices::*;
use cairn_tests::*;
use std::path::PathBuf;
use tempfile::TempDir;

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_that_is_removed_under_the_server() {
    let folder = TempDir::new().unwrap();
    let (server, client) = server_and_client(with_device(16, folder.path(), 64)).await;
    recovered(&server).await;
    let space = space("t");
    publish(&client, &space, &hashes(&space, 0, 12)).await;
    written(&server, 12).await;
    std::fs::remove_dir_all(folder.path()).unwrap();
    for seed in 1..12 {
        let chain = hashes(&space, seed, 12);
        publish(&client, &space, &chain).await;
        assert!(fetch_verified(&client, &space, &chain).await >= 1);
    }
    eventually("the device is given up", || server.devices()[0].state == DeviceCondition::Lost).await;
    let chain = hashes(&space, 50, 12);
    publish(&client, &space, &chain).await;
    assert_eq!(fetch_verified(&client, &space, &chain).await, 12);
    server.audit().unwrap();
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_another_release_is_refused_by_name_and_not_touched() {
    let folder = TempDir::new().unwrap();
    let description = "format = 99\nsomething = \"new\"\n";
    std::fs::write(folder.path().join("device.toml"), description).unwrap();
    let (server, client) = server_and_client(with_device(16, folder.path(), 64)).await;
    assert_eq!(client.stats().await.unwrap().devices[0].state, "lost");
    let error = client.attach_device(&folder.path().display().to_string()).await.unwrap_err().to_string();
    assert!(error.contains("format version 99"), "{error}");
    let entries: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
    assert_eq!(entries.len(), 1, "{entries:?}");
    assert_eq!(std::fs::read_to_string(folder.path().join("device.toml")).unwrap(), description);
    server.shutdown().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn lookups_are_answered_while_a_device_is_read_in() {
    let folder = TempDir::new().unwrap();
    let config = with_device(16, folder.path(), 96);
    let space = space("t");
    let chains: Vec<_> = (0..24).map(|seed| hashes(&space, seed, 10)).collect();
    {
        let (server, client) = server_and_client(config.clone()).await;
        recovered(&server).await;
        for (i, chain) in chains.iter().enumerate() {
            publish(&client, &space, chain).await;
            written(&server, 10 * (i as u64 + 1)).await;
        }
        server.shutdown().await.unwrap();
    }
    // Every request to the device takes milliseconds.
    let faults = Faults::new(3, FaultRates { delay: 1, ..FaultRates::default() });
    let server = Server::start_with(config, Some(faults.clone())).await.unwrap();
    let client = client(&server);
    let fresh = hashes(&space, 99, 5);
    publish(&client, &space, &fresh).await;
    assert_eq!(fetch_verified(&client, &space, &fresh).await, 5);
    assert_eq!(server.devices()[0].state, DeviceCondition::Recovering, "too quick to show anything");
    faults.set_rates(FaultRates::default());
    recovered(&server).await;
    for chain in &chains {
        assert_eq!(fetch_verified(&client, &space, chain).await, 10);
    }
    // What came meanwhile is written as well.
    written(&server, 5).await;
    server.audit().unwrap();
    server.shutdown().await.unwrap();
}

fn small_folder() -> Option<PathBuf> {
    let folder = std::env::var_os("CAIRN_SMALL_DIR").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("SKIPPED: CAIRN_SMALL_DIR is not set, so there is no full and no read-only file system");
    }
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_system_that_is_really_full_or_read_only() {
    let Some(folder) = small_folder() else { return };
    let config = with_device(16, &folder, 256);
    let (server, client) = server_and_client(config.clone()).await;
    recovered(&server).await;
    let space = space("t");
    for seed in 0..30 {
        let chain = hashes(&space, seed, 12);
        publish(&client, &space, &chain).await;
        assert!(fetch_verified(&client, &space, &chain).await >= 1);
    }
    let device = server.devices()[0];
    assert_eq!(device.state, DeviceCondition::Ready, "a full file system only makes a device smaller");
    assert!(device.live_blocks > 20 && device.live_bytes < 32 << 20, "{device:?}");
    server.audit().unwrap();
    server.shutdown().await.unwrap();
    let remount = |how: &str| {
        let status = std::process::Command::new("mount").args(["-o", how]).arg(&folder).status();
        status.is_ok_and(|status| status.success())
    };
    if !remount("remount,ro") {
        eprintln!("SKIPPED: {} cannot be made read-only", folder.display());
        return;
    }
    let (server, client) = server_and_client(config).await;
    let chain = hashes(&space, 77, 12);
    publish(&client, &space, &chain).await;
    assert_eq!(fetch_verified(&client, &space, &chain).await, 12);
    assert_eq!(client.stats().await.unwrap().devices[0].state, "lost");
    server.shutdown().await.unwrap();
    assert!(remount("remount,rw"));
}
