//! The cache server's tier in the memory of a GPU, with the server in another process, as CUDA IPC wants it: blocks go there and back, readers
//! on the same GPU take them from there, and what is wrong there stops nobody.

use super::Bench;
use super::remote::Remote;
use super::tokens::{Answer, ask, prompt, small_checkpoint, worker_options};
use crate::{blocks, hashes, payload, space_with};
use cairn_client::{CacheClient, GpuUuid, Reach, View};
use cairn_gpu::backend::cuda::{CudaDevice, IpcHandle};
use cairn_proto::{BlockHash, KeySpace, Layout, Outcome, Tier, pb};
use cairn_runtime::{ComputeDevice, Worker};
use std::time::Duration;

/// Of host memory and of the GPU's: with blocks of 24 KiB, 170 and 85 of them.
const HOST_MIB: u64 = 4;
const GPU_MIB: u64 = 2;

/// Blocks of the prompt that workers share.
const PROMPT_BLOCKS: usize = 25;

/// What the server is told.
fn config() -> String {
    format!(
        "[host]\ncapacity_mib = {HOST_MIB}\nchunk_mib = 2\npolicy = \"lru\"\n[gpu]\ncapacity_mib = {GPU_MIB}\n"
    )
}

async fn gpu_stats(client: &CacheClient) -> pb::GpuStats {
    let stats = client.stats().await.expect("stats");
    stats.gpus.into_iter().next().expect("a GPU tier")
}

async fn until(client: &CacheClient, what: &str, holds: impl Fn(&pb::GpuStats) -> bool) -> pb::GpuStats {
    for _ in 0..3000 {
        let stats = gpu_stats(client).await;
        if holds(&stats) {
            return stats;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not after thirty seconds: {what}: {:?}", gpu_stats(client).await);
}

/// Workers on the GPU take blocks from the GPU; others get them by way of host memory; what has to make room is not lost; and what somebody wrote
/// over is noticed.
///
/// # Panics
/// When anything of that fails.
pub fn check(device: &CudaDevice, compute: &ComputeDevice, child: &[&str], seed: u64) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let remote = Remote::start(child, &config(), &[]);
        let client = remote.client();
        if !gpu_stats(&client).await.shared {
            println!("SKIPPED: the GPU tier: this driver shares no device memory");
            return remote.end();
        }
        workers(&remote, &client, device, compute, seed).await;
        others(&client, device).await;
        println!("GPU tier: {:?}", gpu_stats(&client).await);
        remote.end();
        readers_only(device, child).await;
        println!("GPU tier: blocks go there and back, between processes, and what is wrong there is noticed");
    });
}

async fn worker(compute: &ComputeDevice, folder: &std::path::Path, remote: &Remote) -> Worker {
    let options = worker_options(compute, folder, remote.options());
    Worker::start(options).await.expect("a worker")
}

/// Asks a worker that has nothing in its pool.
async fn fresh(compute: &ComputeDevice, folder: &std::path::Path, remote: &Remote, prompt: &[u32]) -> Answer {
    let worker = worker(compute, folder, remote).await;
    ask(&worker, prompt, true, 0.0).await
}

async fn workers(
    remote: &Remote,
    client: &CacheClient,
    device: &CudaDevice,
    compute: &ComputeDevice,
    seed: u64,
) {
    let folder = small_checkpoint(3);
    let prompt = prompt(16 * PROMPT_BLOCKS + 3, seed);
    let first = worker(compute, folder.path(), remote).await;
    let off = ask(&first, &prompt, false, 0.0).await;
    let cold = ask(&first, &prompt, true, 0.0).await;
    assert!(off.tokens == cold.tokens && cold.loaded == 0, "cold differs from off");
    let stored = async || client.stats().await.expect("stats").committed_blocks >= PROMPT_BLOCKS as u64;
    let mut tries = 0..3000;
    while !stored().await {
        tries.next().expect("the blocks are stored");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let all = 16 * PROMPT_BLOCKS as u64;
    let from_host = fresh(compute, folder.path(), remote, &prompt).await;
    assert_eq!((from_host.loaded, from_host.from_gpu), (all, 0), "from host memory");
    assert_eq!(from_host.tokens, off.tokens, "warm from host memory differs from off");
    // That read made the server bring them to the GPU.
    until(client, "the blocks are on the GPU", |gpu| gpu.resident_blocks >= PROMPT_BLOCKS as u64).await;
    let from_gpu = fresh(compute, folder.path(), remote, &prompt).await;
    assert_eq!((from_gpu.loaded, from_gpu.from_gpu), (all, all), "from the GPU");
    assert_eq!(from_gpu.tokens, off.tokens, "warm from the GPU differs from off");
    // A process of the tenant writes where it should not: nobody takes that for a block.
    let space = first.space().clone();
    let names = cairn_proto::chain(&space, &prompt, |_| &[]);
    scribble(client, device, &space, &names, 3).await;
    let noticed = fresh(compute, folder.path(), remote, &prompt).await;
    assert_eq!(noticed.tokens, off.tokens, "tokens of wrong bytes");
    assert_eq!((noticed.loaded, noticed.from_gpu), (48, 48), "what is right before the wrong block");
    until(client, "the wrong copy is given up", |gpu| gpu.corrupt_blocks == 1).await;
    let again = fresh(compute, folder.path(), remote, &prompt).await;
    assert_eq!((again.loaded, again.tokens), (all, off.tokens), "the right copy is in host memory");
    println!("GPU tier: tokens are the same with the cache off, cold, and warm from host memory and the GPU");
}

async fn view(client: &CacheClient, space: &KeySpace, names: &[BlockHash], gpus: &[GpuUuid]) -> View {
    let lookup = client.lookup(space, names).await;
    let run = lookup.run.expect("they are there");
    assert_eq!(run.len(), names.len(), "all of them");
    let reach = Reach { gpus, blocks: names.len() };
    client.fetch_view_near(&run, 0, names.len(), reach).await
}

/// Writes over one block on the GPU.
async fn scribble(
    client: &CacheClient,
    device: &CudaDevice,
    space: &KeySpace,
    names: &[BlockHash],
    index: usize,
) {
    let view = view(client, space, names, &[device.info().uuid]).await;
    let (chunk, offset) = view.on_gpu(index).expect("it is on the GPU");
    let memory = device.open_shared(IpcHandle(chunk.handle), chunk.bytes as usize).expect("opened");
    let bench = Bench::new(device.clone(), 0, 0);
    bench.stream.upload(&[0xEE; 64], &memory, offset as usize + 4096).expect("issued");
    bench.stream.synchronize().expect("written");
}

/// Publishes blocks, each before the other, and lets a reader on the GPU want them.
async fn promote(client: &CacheClient, device: &CudaDevice, space: &KeySpace, names: &[BlockHash]) {
    publish(client, space, names).await;
    drop(view(client, space, names, &[device.info().uuid]).await);
}

async fn publish(client: &CacheClient, space: &KeySpace, names: &[BlockHash]) {
    let stored = client.publish(space, None, &blocks(space, names)).await;
    assert!(stored.iter().all(|stored| stored.is_stored()), "{stored:?}");
}

/// Readers that do not reach the GPU, and more blocks than there is room for.
async fn others(client: &CacheClient, device: &CudaDevice) {
    // Of the size of the workers' blocks: they share slots and order with them.
    let space = space_with("t", Layout::new(3, 2, 64, 16).expect("a layout"));
    let before = gpu_stats(client).await;
    let kept = hashes(&space, 1, 20);
    promote(client, device, &space, &kept).await;
    until(client, "the second chain is on the GPU", |gpu| {
        gpu.promoted_blocks >= before.promoted_blocks + kept.len() as u64
    })
    .await;
    // Host memory is filled with others: what is on the GPU stays there.
    for seed in 2..8 {
        publish(client, &space, &hashes(&space, seed, 40)).await;
    }
    let before = gpu_stats(client).await;
    let found = client.lookup(&space, &kept).await;
    assert_eq!(found.outcomes, vec![Outcome::Hit(Tier::Gpu); kept.len()], "only on the GPU");
    let run = found.run.expect("leased");
    let mut targets = vec![vec![0; space.block_bytes() as usize]; kept.len()];
    let fetched = client.fetch(&run, 0, &mut targets).await;
    assert!(fetched.iter().all(|outcome| outcome.is_hit()), "{:?}", fetched.outcomes);
    for (hash, target) in kept.iter().zip(&targets) {
        assert!(*target == payload(&space, hash), "a block that came from the GPU");
    }
    drop(run);
    let read = gpu_stats(client).await;
    assert!(read.read_blocks >= before.read_blocks + kept.len() as u64, "{read:?}");
    // Now the GPU has to make room for more than it has: the only copies go to host memory first.
    for seed in 2..8 {
        publish(client, &space, &hashes(&space, seed + 10, 40)).await;
    }
    let demoted = gpu_stats(client).await.demoted_blocks;
    let many = hashes(&space, 30, 80);
    promote(client, device, &space, &many).await;
    until(client, "only copies move to host memory", |gpu| gpu.demoted_blocks > demoted).await;
    let found = client.lookup(&space, &kept).await;
    let resident = found.outcomes.iter().filter(|outcome| outcome.is_hit()).count();
    assert!(resident > 0, "what made room on the GPU is in host memory: {:?}", found.outcomes);
    assert_eq!(crate::fetch_verified(client, &space, &kept).await, resident);
}

/// Whoever opens the memory of a GPU can write there: who may only read gets its blocks another way.
async fn readers_only(device: &CudaDevice, child: &[&str]) {
    let token = |rights: &str, token: &str| {
        let hash = cairn_server::certs::token_hash(token);
        format!("[[token]]\ntenant = \"t\"\nrights = [{rights}]\nblake3 = \"{hash}\"\n")
    };
    let tokens = token("\"read\", \"publish\", \"admin\"", "writes") + &token("\"read\"", "reads");
    let remote = Remote::start(child, &(config() + &tokens), &[]);
    let client = |token: &str| {
        let mut options = remote.options();
        options.security.token = Some(token.into());
        CacheClient::start(options).expect("a client")
    };
    let (writer, reader) = (client("writes"), client("reads"));
    let space = space_with("t", Layout::new(3, 2, 64, 16).expect("a layout"));
    let names = hashes(&space, 1, 10);
    promote(&writer, device, &space, &names).await;
    until(&writer, "all is on the GPU", |gpu| gpu.resident_blocks == names.len() as u64).await;
    let gpus = [device.info().uuid];
    let (may, may_not) =
        (view(&writer, &space, &names, &gpus).await, view(&reader, &space, &names, &gpus).await);
    for (index, name) in names.iter().enumerate() {
        assert!(may.on_gpu(index).is_some(), "block {index}, for who may publish");
        assert!(may_not.on_gpu(index).is_none(), "block {index}, for who may only read");
        let block = may_not.block(index).unwrap_or_else(|outcome| panic!("block {index}: {outcome}"));
        assert!(block == payload(&space, name), "block {index}");
    }
    drop((may, may_not, writer, reader));
    remote.end();
    println!("GPU tier: who may only read cannot open the GPU's memory, and reads all the same");
}

/// A GPU that is lost takes its tier along, and nothing else. Only for the emulator.
///
/// # Panics
/// When workers notice.
pub fn lost(compute: &ComputeDevice, child: &[&str], after: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let remote = Remote::start(child, &config(), &[("CAIRN_EMULATOR_LOSE_AFTER", after)]);
        let (client, folder) = (remote.client(), small_checkpoint(3));
        let first = worker(compute, folder.path(), &remote).await;
        let mut last = None;
        for seed in 0..3 {
            let prompt = prompt(16 * PROMPT_BLOCKS + 3, seed);
            let off = ask(&first, &prompt, false, 0.0).await;
            ask(&first, &prompt, true, 0.0).await;
            for _ in 0..2 {
                let answer = fresh(compute, folder.path(), &remote, &prompt).await;
                assert_eq!(answer.tokens, off.tokens, "tokens while the server's GPU goes");
            }
            last = Some((prompt, off));
        }
        let gpu = until(&client, "the GPU is out of service", |gpu| gpu.state == "lost").await;
        assert_eq!(gpu.resident_blocks, 0);
        let promoted = after.parse::<u64>().is_ok_and(|after| after >= 4);
        assert!(!promoted || gpu.promoted_blocks > 0, "it had blocks before it went: {gpu:?}");
        let (prompt, off) = last.expect("three prompts");
        let answer = fresh(compute, folder.path(), &remote, &prompt).await;
        assert_eq!((answer.loaded, answer.from_gpu), (16 * PROMPT_BLOCKS as u64, 0), "from host memory");
        assert_eq!(answer.tokens, off.tokens);
        remote.end();
        println!("GPU tier: lost after {after} operations; the server went on from host memory");
    });
}
