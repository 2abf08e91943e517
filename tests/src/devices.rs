//! Servers with an NVMe tier, and waiting for what they do in the background.

use crate::{blocks, config, eventually};
use cairn_client::CacheClient;
use cairn_core::DeviceCondition;
use cairn_proto::{BlockHash, KeySpace, pb};
use cairn_server::{Config, DeviceEntry, Server};
use std::path::Path;

/// Host room for `slots` blocks of 256 KiB, and one device of segments of 2 MiB (seven records each).
pub fn with_device(slots: u64, folder: &Path, capacity_mib: u64) -> Config {
    let mut config = config(slots);
    config.nvme.segment_mib = 2;
    config.nvme.sync_interval_ms = 20;
    // Blocks being written stay in memory: four of them leave room for others.
    config.nvme.write_in_flight_mib = 1;
    config.nvme.device = vec![DeviceEntry { path: folder.to_owned(), capacity_mib }];
    config
}

/// Publishes a chain, however long it takes to find room.
///
/// # Panics
/// When there is no room for half a minute.
pub async fn publish(client: &CacheClient, space: &KeySpace, chain: &[BlockHash]) {
    publish_after(client, space, None, chain).await;
}

/// As [`publish`], after a block.
///
/// # Panics
/// When there is no room for half a minute.
pub async fn publish_after(
    client: &CacheClient,
    space: &KeySpace,
    parent: Option<BlockHash>,
    chain: &[BlockHash],
) {
    for _ in 0..crate::PATIENCE {
        let stored = client.publish(space, parent, &blocks(space, chain)).await;
        if stored.iter().all(|stored| stored.is_stored()) {
            return;
        }
        // Everything in memory is being written or read at this moment.
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("blocks find no room");
}

/// Waits until so many blocks were written to devices.
pub async fn written(server: &Server, blocks: u64) {
    eventually("blocks are written", || {
        server.devices().iter().map(|device| device.counters.stored_blocks).sum::<u64>() >= blocks
    })
    .await;
}

/// Waits until blocks survive a loss of power.
///
/// # Panics
/// When they do not in half a minute.
pub async fn durable(client: &CacheClient, space: &KeySpace, chain: &[BlockHash]) {
    for _ in 0..crate::PATIENCE {
        let explained = client.explain(space.id(), chain).await.expect("it works");
        let is_durable = |block: &pb::BlockExplanation| matches!(&block.state, Some(pb::block_explanation::State::Resident(block)) if block.durable);
        if explained.iter().all(is_durable) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("blocks never become durable");
}

/// Bytes that a folder takes on its file system.
///
/// # Panics
/// When it cannot be read.
pub fn disk_usage(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(folder).expect("it works").map(|entry| entry.expect("it works"));
    let size = |entry: std::fs::DirEntry| {
        let metadata = entry.metadata().expect("it works");
        if metadata.is_dir() { disk_usage(&entry.path()) } else { metadata.blocks() * 512 }
    };
    entries.map(size).sum()
}

/// Waits until all devices are in service.
pub async fn recovered(server: &Server) {
    eventually("the device is ready", || {
        server.devices().iter().all(|device| device.state == DeviceCondition::Ready)
    })
    .await;
}
