//! `contender-foyer FOLDER BLOCK_BYTES BLOCKS DEPTH SEED`: writes that many blocks through foyer's hybrid cache to its disk tier, waits
//! until they are there, reads them in random order, `DEPTH` at a time, and prints GB/s and CPU-s/GB of writing and reading.

use foyer::{
    BlockEngineConfig, DeviceBuilder, FsDeviceBuilder, HybridCache, HybridCacheBuilder, HybridCachePolicy,
    IoEngineConfig, UringIoEngineConfig,
};
use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
use std::time::Instant;

fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Its writes are buffered: so much may wait.
const BUFFER_BYTES: usize = 256 << 20;
/// Its unit of eviction on disk.
const REGION_BYTES: usize = 64 << 20;

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, numbers @ ..] = &arguments[..] else {
        panic!("contender-foyer FOLDER BLOCK_BYTES BLOCKS DEPTH SEED")
    };
    let numbers: Vec<usize> = numbers.iter().map(|number| number.parse().expect("a number")).collect();
    let [block_bytes, blocks, depth, seed] = numbers[..] else { panic!("four numbers after the folder") };
    let capacity = (2 * blocks * block_bytes + 8 * REGION_BYTES).next_multiple_of(REGION_BYTES);
    let device =
        FsDeviceBuilder::new(folder).with_capacity(capacity).with_direct(true).build().expect("a device");
    let engine = BlockEngineConfig::new(device)
        .with_block_size(REGION_BYTES)
        .with_buffer_pool_size(BUFFER_BYTES)
        .with_submit_queue_size_threshold(BUFFER_BYTES);
    let cache: HybridCache<u64, Vec<u8>> = HybridCacheBuilder::new()
        .with_policy(HybridCachePolicy::WriteOnInsertion)
        .memory(block_bytes)
        .with_shards(1)
        .with_weighter(|_, value: &Vec<u8>| value.len())
        .storage()
        .with_io_engine_config(
            Box::new(UringIoEngineConfig::new().with_io_depth(64)) as Box<dyn IoEngineConfig>
        )
        .with_engine_config(engine)
        .build()
        .await
        .expect("a cache");
    let mut order: Vec<u64> = (0..blocks as u64).collect();
    order.shuffle(&mut StdRng::seed_from_u64(seed as u64));
    let gigabytes = (blocks * block_bytes) as f64 / 1e9;
    let (start, cpu) = (Instant::now(), cpu_seconds());
    for (i, key) in order.iter().enumerate() {
        cache.storage_writer(*key).force().insert(vec![*key as u8; block_bytes]);
        // It drops what it cannot buffer.
        if (i + 1) * block_bytes % (BUFFER_BYTES / 4) < block_bytes {
            cache.storage().wait().await;
        }
    }
    cache.storage().wait().await;
    let write = (gigabytes / start.elapsed().as_secs_f64(), (cpu_seconds() - cpu) / gigabytes);
    let (start, cpu) = (Instant::now(), cpu_seconds());
    let lanes = (0..depth).map(|lane| {
        let (cache, order) = (&cache, &order);
        async move {
            let mut found = 0;
            for key in order.iter().skip(lane).step_by(depth) {
                let value = cache.get(key).await.expect("no error");
                found += usize::from(value.is_some_and(|value| value.value()[block_bytes - 1] == *key as u8));
            }
            found
        }
    });
    let found: usize = futures::future::join_all(lanes).await.into_iter().sum();
    let read = (gigabytes / start.elapsed().as_secs_f64(), (cpu_seconds() - cpu) / gigabytes);
    assert!(found * 100 >= blocks * 95, "only {found} of {blocks} blocks were found");
    println!("{} {} {} {}", write.0, write.1, read.0, read.1);
}
