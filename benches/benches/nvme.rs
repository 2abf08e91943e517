//! The NVMe tier's data path (whole records, verified on read, into and out of host slots) beside a bare io_uring loop on the same file
//! system, and, with `--foyer`, beside foyer's hybrid cache. Random order, direct IO; rounds are interleaved because disks are
//! erratic; medians. `--dir PATH` chooses the file system.

use cairn_bench::disk::{RawDisk, cpu_seconds};
use cairn_bench::tiny;
use cairn_server::nvme::{DeviceOptions, METADATA_BYTES, Store};
use futures::StreamExt;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

const BLOCK_KIB: [u32; 3] = [256, 1024, 4096];
const DEPTHS: [usize; 3] = [1, 8, 16];

/// Gigabytes a second, and CPU seconds a gigabyte.
#[derive(Clone, Copy, Default)]
struct Rate {
    gb_s: f64,
    cpu_s_gb: f64,
}

#[derive(Clone, Copy, Default)]
struct Round {
    write: Rate,
    raw_write: Rate,
    read: Rate,
    raw_read: Rate,
    foyer_write: Rate,
    foyer_read: Rate,
}

fn argument(name: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    arguments.nth(1)
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    let folder = match argument("--dir") {
        Some(path) => tempfile::tempdir_in(path),
        None => tempfile::tempdir(),
    };
    let folder = folder.expect("a folder");
    let foyer = argument("--foyer").map(PathBuf::from);
    let (rounds, megabytes) = if tiny() { (1, 8) } else { (5, 768) };
    println!("GB/s and CPU-s/GB, medians of {rounds} rounds of {megabytes} MB; ratios within a round");
    println!(
        "block     QD   write    raw  ratio   CPU (raw)      read    raw  ratio   CPU (raw)      foyer write, read (CPU)"
    );
    for block_kib in BLOCK_KIB {
        for depth in DEPTHS {
            let bench = Bench::new(folder.path(), block_kib, depth, megabytes);
            let all: Vec<Round> =
                (0..rounds).map(|seed| bench.round(&runtime, seed, foyer.as_deref())).collect();
            print(block_kib, depth, &all, foyer.is_some());
            std::fs::remove_dir_all(folder.path().join("store")).expect("removed");
            std::fs::remove_file(folder.path().join("raw")).expect("removed");
        }
    }
    runtime.block_on(recovery(folder.path(), megabytes));
}

struct Bench {
    folder: PathBuf,
    block_bytes: u64,
    depth: usize,
    blocks: u32,
}

impl Bench {
    fn new(folder: &Path, block_kib: u32, depth: usize, megabytes: u64) -> Self {
        let block_bytes = u64::from(block_kib) << 10;
        let blocks = ((megabytes * 1_000_000 / block_bytes) as u32).max(2);
        Self { folder: folder.to_owned(), block_bytes, depth, blocks }
    }

    fn round(&self, runtime: &tokio::runtime::Runtime, seed: u64, foyer: Option<&Path>) -> Round {
        let order = shuffled(self.blocks, seed);
        let store_folder = self.folder.join("store");
        std::fs::create_dir_all(&store_folder).expect("a folder");
        let store = self.store(&store_folder);
        let raw = self.folder.join("raw");
        let blocks = u64::from(self.blocks);
        let mut disk =
            RawDisk::create(&raw, self.block_bytes as usize, blocks, self.depth).expect("a raw file");
        let mut round = Round::default();
        runtime.block_on(store.prepare(self.blocks)).expect("room");
        // Both files exist in full before anything is timed: the first writes to fresh extents cost more.
        let all: Vec<u32> = (0..self.blocks).collect();
        if seed == 0 {
            disk.transfer(&all, true).expect("a raw write");
            runtime.block_on(self.write(&store, &all));
        }
        round.write = self.timed(|| {
            runtime.block_on(async {
                self.write(&store, &order).await;
                store.sync(self.blocks).await.expect("a sync");
            });
        });
        round.raw_write = self.timed(|| {
            disk.transfer(&order, true).expect("a raw write");
            disk.sync().expect("a sync");
        });
        round.read = self.timed(|| runtime.block_on(self.read(&store, &order)));
        round.raw_read = self.timed(|| disk.transfer(&order, false).expect("a raw read"));
        drop((store, disk));
        if let Some(foyer) = foyer {
            [round.foyer_write, round.foyer_read] = self.foyer(foyer, seed);
        }
        round
    }

    fn store(&self, folder: &Path) -> Store {
        let segment_bytes = if tiny() { 8 << 20 } else { 256 << 20 };
        let options = DeviceOptions {
            path: folder.to_owned(),
            capacity_bytes: METADATA_BYTES
                + 2 * u64::from(self.blocks) * (self.block_bytes + 4096)
                + 4 * segment_bytes,
            segment_bytes,
            keys: HashMap::new(),
            read_only: false,
        };
        let store = Store::open(&options, self.block_bytes, self.depth as u32, false).expect("a store");
        assert!(store.capacity() >= self.blocks);
        store
    }

    fn timed(&self, work: impl FnOnce()) -> Rate {
        let (start, cpu) = (Instant::now(), cpu_seconds());
        work();
        let gigabytes = f64::from(self.blocks) * self.block_bytes as f64 / 1e9;
        Rate { gb_s: gigabytes / start.elapsed().as_secs_f64(), cpu_s_gb: (cpu_seconds() - cpu) / gigabytes }
    }

    /// Each of the slots in turn, as many at a time as there are.
    async fn write(&self, store: &Store, order: &[u32]) {
        let depth = self.depth as u32;
        let lanes = (0..depth).map(|slot| async move {
            for block in order.iter().filter(|block| *block % depth == slot) {
                store.write(*block, slot).await.expect("a write");
            }
        });
        futures::future::join_all(lanes).await;
    }

    async fn read(&self, store: &Store, order: &[u32]) {
        let depth = self.depth as u32;
        let lanes = (0..depth).map(|slot| async move {
            let mine = order.iter().skip(slot as usize).step_by(depth as usize);
            futures::stream::iter(mine)
                .for_each(|block| async move {
                    store.read(*block, *block % depth, slot).await.expect("the bytes that were written");
                })
                .await;
        });
        futures::future::join_all(lanes).await;
    }

    /// Another process, built by itself: see `contenders/foyer`.
    fn foyer(&self, program: &Path, seed: u64) -> [Rate; 2] {
        let folder = self.folder.join("foyer");
        std::fs::create_dir_all(&folder).expect("a folder");
        let output = std::process::Command::new(program)
            .arg(&folder)
            .args([self.block_bytes, u64::from(self.blocks), self.depth as u64, seed].map(|n| n.to_string()))
            .output()
            .expect("the contender runs");
        std::fs::remove_dir_all(&folder).expect("removed");
        let text = String::from_utf8_lossy(&output.stdout);
        let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [write, write_cpu, read, read_cpu] = numbers[..] else {
            panic!("{text} {}", String::from_utf8_lossy(&output.stderr))
        };
        [Rate { gb_s: write, cpu_s_gb: write_cpu }, Rate { gb_s: read, cpu_s_gb: read_cpu }]
    }
}

/// What a start costs: segments with summaries, and segments that were open.
async fn recovery(folder: &Path, megabytes: u64) {
    for (what, sealed) in [("with summaries", true), ("all open", false)] {
        let folder = folder.join(what);
        std::fs::create_dir_all(&folder).expect("a folder");
        let bench = Bench::new(&folder, 256, 8, megabytes);
        let store = bench.store(&folder);
        store.prepare(bench.blocks).await.expect("room");
        let all: Vec<u32> = (0..bench.blocks).collect();
        bench.write(&store, &all).await;
        if sealed {
            store.seal(bench.blocks).await.expect("sealed");
        }
        drop(store);
        let start = Instant::now();
        let survey = Store::recover(&folder).await.expect("a survey");
        let seconds = start.elapsed().as_secs_f64();
        let found: u64 = survey.spaces.values().map(|space| space.blocks).sum();
        assert_eq!(found, u64::from(bench.blocks));
        println!(
            "recovery, {what}: {found} blocks of 256 KiB in {:.1} ms: {:.0} blocks/s, {:.1} GB/s of blocks",
            1e3 * seconds,
            found as f64 / seconds,
            found as f64 * bench.block_bytes as f64 / seconds / 1e9
        );
        std::fs::remove_dir_all(&folder).expect("removed");
    }
}

fn shuffled(blocks: u32, seed: u64) -> Vec<u32> {
    use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
    let mut order: Vec<u32> = (0..blocks).collect();
    order.shuffle(&mut StdRng::seed_from_u64(seed));
    order
}

fn median(all: &[Round], value: impl Fn(&Round) -> f64) -> f64 {
    let mut values: Vec<f64> = all.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn print(block_kib: u32, depth: usize, all: &[Round], foyer: bool) {
    let m = |value: fn(&Round) -> f64| median(all, value);
    print!(
        "{block_kib:5} KiB {depth:3}  {:6.2} {:6.2} {:6.2}  {:.3} ({:.3})   {:6.2} {:6.2} {:6.2}  {:.3} ({:.3})",
        m(|r| r.write.gb_s),
        m(|r| r.raw_write.gb_s),
        m(|r| r.write.gb_s / r.raw_write.gb_s),
        m(|r| r.write.cpu_s_gb),
        m(|r| r.raw_write.cpu_s_gb),
        m(|r| r.read.gb_s),
        m(|r| r.raw_read.gb_s),
        m(|r| r.read.gb_s / r.raw_read.gb_s),
        m(|r| r.read.cpu_s_gb),
        m(|r| r.raw_read.cpu_s_gb),
    );
    if foyer {
        print!(
            "   {:6.2}, {:6.2} ({:.3}), read ratio {:.1}",
            m(|r| r.foyer_write.gb_s),
            m(|r| r.foyer_read.gb_s),
            m(|r| r.foyer_read.cpu_s_gb),
            m(|r| r.read.gb_s / r.foyer_read.gb_s),
        );
    }
    println!();
}
