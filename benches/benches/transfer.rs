//! Block bytes over gRPC, both ends in this process over loopback TCP, verification on: beside a plain TCP stream, a tonic
//! stream of the same messages with no store behind it, and memcpy. Rounds are interleaved; medians of them.

use cairn_bench::{tiny, wire};
use cairn_client::{Block, CacheClient, ClientOptions};
use cairn_proto::*;
use cairn_server::{Config, Server};
use std::time::Instant;

/// Blocks of one request.
const BATCHES: [usize; 2] = [1, 8];

fn space(block_kib: u32) -> KeySpace {
    // 2 KiB a layer: 2 × 16 tokens × 1 head × 32 elements × 2 bytes.
    let layout = Layout::new(block_kib / 2, 1, 32, 16).expect("a valid layout");
    KeySpace::new(SpaceParts::new("bench", [0; 32], Dtype::Bf16, layout)).expect("a valid space")
}

fn blocks(space: &KeySpace, count: usize, seed: u32) -> Vec<Block> {
    let tokens: Vec<u32> = (0..16 * count as u32).map(|i| i ^ (seed << 16)).collect();
    let block = |hash: BlockHash| {
        let bytes: Vec<u8> = (0..space.block_bytes()).map(|i| (i * 31 % 251) as u8 ^ hash.0[0]).collect();
        Block { hash, checksum: Checksum::of(&space.id(), &hash, &bytes), bytes: bytes.into() }
    };
    chain(space, &tokens, |_| &[]).into_iter().map(block).collect()
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let (rounds, megabytes) = if tiny() { (1, 4) } else { (5, 64) };
    let mut config = Config::default();
    config.server.listen = ([127, 0, 0, 1], 0).into();
    config.server.http_listen = ([127, 0, 0, 1], 0).into();
    config.host.capacity_mib = 128;
    config.host.chunk_mib = 16;
    let server = Server::start(config).await.expect("a server");
    let client =
        CacheClient::start(ClientOptions::new(format!("http://{}", server.address()))).expect("a client");
    let limits = wire::Limits::start().await;
    println!(
        "GB/s, median of {rounds} rounds of {megabytes} MB; ratios to the limit named in the heading, same round"
    );
    println!("block    batch  fetch  of tonic  of tcp   publish  of tonic     tonic    tcp  memcpy");
    for block_kib in [64, 256, 1024, 4096] {
        for batch in BATCHES {
            let space = space(block_kib);
            let bytes = batch * space.block_bytes() as usize;
            let repeats = (megabytes * 1_000_000 / bytes).max(1);
            let mut rows = Vec::new();
            for round in 0..rounds as u32 {
                let published = publish(&client, &space, batch, repeats, round).await;
                let fetched = fetch(&client, &space, batch, repeats).await;
                let (tonic, tcp) = (limits.tonic(bytes, repeats).await, limits.tcp(bytes, repeats).await);
                rows.push([
                    fetched,
                    fetched / tonic,
                    fetched / tcp,
                    published,
                    published / tonic,
                    tonic,
                    tcp,
                    wire::memcpy(bytes, repeats),
                ]);
            }
            let median = |column: usize| {
                let mut values: Vec<f64> = rows.iter().map(|row: &[f64; 8]| row[column]).collect();
                values.sort_by(f64::total_cmp);
                values[values.len() / 2]
            };
            let m: Vec<f64> = (0..8).map(median).collect();
            println!(
                "{block_kib:5} KiB {batch:4}  {:5.2}  {:8.2}  {:6.2}   {:7.2}  {:8.2}  {:8.2} {:6.2}  {:6.1}",
                m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]
            );
        }
    }
    server.shutdown().await.expect("an orderly end");
}

/// Publishes fresh blocks; making their bytes is not timed.
async fn publish(client: &CacheClient, space: &KeySpace, batch: usize, repeats: usize, round: u32) -> f64 {
    let fresh = blocks(space, batch, 0);
    let mut seconds = 0.0;
    for i in 0..repeats {
        let other = blocks_named(space, &fresh, 1 + round * 10_000 + i as u32);
        let start = Instant::now();
        let stored = client.publish(space, None, &other).await;
        seconds += start.elapsed().as_secs_f64();
        assert!(stored.iter().all(|s| s.is_stored()), "{stored:?}");
    }
    (repeats * batch) as f64 * space.block_bytes() as f64 / seconds / 1e9
}

/// The same bytes under other names.
fn blocks_named(space: &KeySpace, blocks: &[Block], seed: u32) -> Vec<Block> {
    let tokens: Vec<u32> = (0..16 * blocks.len() as u32).map(|i| i ^ (seed << 12)).collect();
    let renamed = chain(space, &tokens, |_| &[]).into_iter().zip(blocks);
    renamed
        .map(|(hash, block)| Block {
            hash,
            checksum: Checksum::of(&space.id(), &hash, &block.bytes),
            bytes: block.bytes.clone(),
        })
        .collect()
}

async fn fetch(client: &CacheClient, space: &KeySpace, batch: usize, repeats: usize) -> f64 {
    let source = blocks(space, batch, 0);
    client.publish(space, None, &source).await;
    let names: Vec<BlockHash> = source.iter().map(|block| block.hash).collect();
    let mut targets = vec![vec![0u8; space.block_bytes() as usize]; batch];
    let start = Instant::now();
    for _ in 0..repeats {
        let run = client.lookup(space, &names).await.run.expect("resident");
        let outcomes = client.fetch(&run, 0, &mut targets).await;
        assert!(outcomes.iter().all(|outcome| outcome.is_hit()), "{outcomes:?}");
    }
    let seconds = start.elapsed().as_secs_f64();
    assert!(targets.iter().zip(&source).all(|(target, block)| *target == block.bytes), "every byte arrived");
    (repeats * batch) as f64 * space.block_bytes() as f64 / seconds / 1e9
}
