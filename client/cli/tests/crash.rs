//! A real server with an NVMe tier, killed without warning again and again in the middle of its work. After each restart every block
//! that was durable is there, and no block that is served differs from what was published. Ten rounds;
//! `CAIRN_CRASH_ROUNDS` makes it more (100 for a night).

#![allow(clippy::unwrap_used)]

use cairn_client::{CacheClient, ClientOptions};
use cairn_proto::{BlockHash, pb};
use cairn_tests::{blocks, fetch_verified, hashes, space};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const DEFAULT_ROUNDS: u64 = 10;
/// Chains of the load; all of them fit the device, so that only a defect can lose a durable block.
const CHAINS: u64 = 24;
const CHAIN_BLOCKS: usize = 8;
const WRITERS: u64 = 3;

struct Server {
    child: Child,
    url: String,
}

impl Server {
    fn start(folder: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_cairn"))
            .args(["--log", "error", "serve", "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"])
            .args(["--capacity-mib", "64", "--nvme-mib", "129", "--nvme-segment-mib", "4", "--nvme-dir"])
            .arg(folder)
            .arg("--supervised")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let announced: Value =
            serde_json::from_str(&line).unwrap_or_else(|_| panic!("no address in {line:?}"));
        Self { url: format!("http://{}", announced["address"].as_str().unwrap()), child }
    }

    fn client(&self) -> CacheClient {
        CacheClient::start(ClientOptions::new(&self.url)).unwrap()
    }

    /// SIGKILL.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already ended is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Durable blocks by chain: how many from the start.
type Durable = Arc<Mutex<BTreeSet<(u64, usize)>>>;

async fn ready(client: &CacheClient) {
    for _ in 0..1000 {
        if let Ok(stats) = client.stats().await
            && stats.devices.iter().all(|device| device.state == "ready")
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the device is never ready");
}

fn chain(seed: u64) -> Vec<BlockHash> {
    hashes(&space("t"), seed as u32, CHAIN_BLOCKS)
}

/// Publishes, reads and asks what is durable, until the server is gone.
async fn load(client: CacheClient, seed: u64, durable: Durable) {
    let space = space("t");
    let mut rng = StdRng::seed_from_u64(seed);
    loop {
        let number = rng.random_range(0..CHAINS);
        let chain = chain(number);
        if rng.random_bool(0.6) {
            client.publish(&space, None, &blocks(&space, &chain)).await;
        }
        // Panics on any byte that is not as published.
        fetch_verified(&client, &space, &chain).await;
        let Ok(explained) = client.explain(space.id(), &chain).await else { return };
        let is_durable = |block: &pb::BlockExplanation| matches!(&block.state, Some(pb::block_explanation::State::Resident(block)) if block.durable);
        let count = explained.iter().take_while(|block| is_durable(block)).count();
        durable.lock().unwrap().insert((number, count));
    }
}

async fn check(client: &CacheClient, durable: &Durable) -> usize {
    let space = space("t");
    let promised = durable.lock().unwrap().clone();
    for (number, count) in &promised {
        let found = fetch_verified(client, &space, &chain(*number)).await;
        assert!(found >= *count, "{count} blocks of chain {number} were durable, {found} are there");
    }
    promised.iter().map(|(_, count)| count).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_keeps_what_was_durable_and_serves_nothing_else() {
    let number = |name| std::env::vars().find(|(key, _)| key == name).map(|(_, v)| v.parse::<u64>().unwrap());
    let seed = number("CAIRN_CRASH_SEED").unwrap_or_else(rand::random);
    let rounds = number("CAIRN_CRASH_ROUNDS").unwrap_or(DEFAULT_ROUNDS);
    println!("CAIRN_CRASH_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let folder = tempfile::tempdir().unwrap();
    let durable = Durable::default();
    let mut promised = 0;
    for round in 0..rounds {
        let server = Server::start(folder.path());
        let client = server.client();
        ready(&client).await;
        promised = check(&client, &durable).await;
        let writers = (0..WRITERS).map(|i| {
            tokio::spawn(load(server.client(), seed.wrapping_add(round * WRITERS + i), durable.clone()))
        });
        let writers: Vec<_> = writers.collect();
        tokio::time::sleep(Duration::from_millis(rng.random_range(20..400))).await;
        server.kill();
        for writer in writers {
            writer.await.unwrap();
        }
    }
    assert!(promised > 0, "nothing was ever durable");
    let server = Server::start(folder.path());
    let client = server.client();
    ready(&client).await;
    check(&client, &durable).await;
    server.kill();
    disk_tools(folder.path());
}

fn disk(arguments: &[&str], folder: &Path) -> (bool, Value) {
    let output = Command::new(env!("CARGO_BIN_EXE_cairn"))
        .args(["--log", "error", "disk"])
        .args(arguments)
        .arg("--json")
        .arg(folder)
        .output()
        .unwrap();
    (output.status.success(), serde_json::from_slice(&output.stdout).unwrap_or_default())
}

/// What the last kill left is looked at, and rebuilt.
fn disk_tools(folder: &Path) {
    let (ok, inspected) = disk(&["inspect"], folder);
    assert!(ok && inspected["spaces"][0]["tenant"] == "t", "{inspected}");
    let (ok, verified) = disk(&["verify"], folder);
    assert!(ok && verified["corrupt"] == 0, "{verified}");
    let (ok, dry) = disk(&["rebuild"], folder);
    assert!(ok && dry["repaired"] == 0, "{dry}");
    let (ok, rebuilt) = disk(&["rebuild", "--write"], folder);
    assert!(ok, "{rebuilt}");
    let (_, after) = disk(&["inspect"], folder);
    assert_eq!(after["spaces"], verified["spaces"], "a rebuild loses nothing");
    let (missing, _) = disk(&["inspect"], &folder.join("nowhere"));
    assert!(!missing);
}
