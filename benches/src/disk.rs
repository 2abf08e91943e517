//! The NVMe tier's data path (whole records, verified on read, into and out of host slots) beside a bare io_uring loop on the same file
//! system, and beside foyer's hybrid cache. Random order, direct IO; rounds are interleaved because disks are erratic.

use crate::raw_disk::RawDisk;
use crate::{BenchError, OrFail, Watch, cpu_seconds};
use cairn_harness::section::{Bar, Bars, Cell, Column, Plot, Role, Section, quantile};
use cairn_server::nvme::{DeviceOptions, METADATA_BYTES, Store};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Of a segment, unless all that is written is smaller.
const SEGMENT_BYTES: u64 = 256 << 20;
const SMALL_SEGMENT_BYTES: u64 = 8 << 20;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where; emptied again.
    pub folder: PathBuf,
    /// Sizes of a block, KiB.
    pub blocks_kib: Vec<u32>,
    /// Requests at a time.
    pub depths: Vec<usize>,
    /// Of each.
    pub rounds: usize,
    /// Bytes of one round, in millions.
    pub megabytes: u64,
    /// The program that drives foyer.
    pub foyer: Option<PathBuf>,
}

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
    /// Writing and reading.
    foyer: Option<[Rate; 2]>,
}

/// Measures all sizes and depths, then recovery; the flag says whether nothing is missing.
///
/// # Errors
/// When anything does not work, or a byte is wrong.
pub async fn run(options: &Options, watch: &dyn Watch) -> Result<(Vec<Section>, bool), BenchError> {
    let folder = tempfile::tempdir_in(&options.folder).or_fail(&options.folder.display().to_string())?;
    let mut section = Section::new("disk", "The NVMe tier beside a bare io_uring loop", columns(options));
    section.notes.push(format!(
        "Medians of {} interleaved rounds of {} MB; ratios within a round. Whole records, random order, direct IO, reads verified, writes with a \
         final flush. raw: a bare io_uring loop with registered buffers over one preallocated file.",
        options.rounds, options.megabytes
    ));
    if options.foyer.is_some() {
        let note = "foyer writes to new files in every round and makes its values meanwhile: compare reads, not writes.";
        section.notes.push(note.into());
    }
    watch.begin(options.blocks_kib.len() * options.depths.len() + 1);
    let mut read = Vec::new();
    for block_kib in options.blocks_kib.iter().copied() {
        for depth in options.depths.iter().copied() {
            if watch.stopped() {
                return Ok((vec![section], false));
            }
            watch.step(&format!("{block_kib} KiB, {depth} at a time"));
            let bench = Bench::new(folder.path(), (block_kib, depth), options.megabytes);
            let mut rounds = Vec::new();
            for seed in 0..options.rounds as u64 {
                rounds.push(bench.round(seed, options.foyer.as_deref()).await?);
            }
            section.rows.push(row((block_kib, depth), &rounds, options));
            read.push(bar((block_kib, depth), &rounds));
            std::fs::remove_dir_all(folder.path().join("store")).or_fail("the store's folder")?;
            std::fs::remove_file(folder.path().join("raw")).or_fail("the raw file")?;
        }
    }
    section.plots.push(Plot::Bars(Bars {
        name: "read".into(),
        title: "reads, with the bare loop as the limit".into(),
        x: "GB/s".into(),
        parts: vec!["GB/s".into()],
        bars: read,
    }));
    watch.step("recovery");
    let recovery = recovery(folder.path(), options.megabytes).await?;
    Ok((vec![section, recovery], true))
}

struct Bench {
    folder: PathBuf,
    block_bytes: u64,
    depth: usize,
    blocks: u32,
}

impl Bench {
    fn new(folder: &Path, (block_kib, depth): (u32, usize), megabytes: u64) -> Self {
        let block_bytes = u64::from(block_kib) << 10;
        let blocks = ((megabytes * 1_000_000 / block_bytes) as u32).max(2);
        Self { folder: folder.to_owned(), block_bytes, depth, blocks }
    }

    async fn round(&self, seed: u64, foyer: Option<&Path>) -> Result<Round, BenchError> {
        let order = shuffled(self.blocks, seed);
        let store_folder = self.folder.join("store");
        std::fs::create_dir_all(&store_folder).or_fail("a folder")?;
        let store = self.store(&store_folder)?;
        let raw = self.folder.join("raw");
        let blocks = u64::from(self.blocks);
        let mut disk =
            RawDisk::create(&raw, self.block_bytes as usize, blocks, self.depth).or_fail("a raw file")?;
        let mut round = Round::default();
        store.prepare(self.blocks).await.or_fail("room on the disk")?;
        // Both files exist in full before anything is timed: the first writes to fresh extents cost more.
        let all: Vec<u32> = (0..self.blocks).collect();
        if seed == 0 {
            disk.transfer(&all, true).or_fail("a raw write")?;
            self.write(&store, &all).await?;
        }
        let clock = self.clock();
        self.write(&store, &order).await?;
        store.sync(self.blocks).await.or_fail("a flush")?;
        round.write = clock.stop();
        let clock = self.clock();
        tokio::task::block_in_place(|| disk.transfer(&order, true)).or_fail("a raw write")?;
        disk.sync().or_fail("a flush")?;
        round.raw_write = clock.stop();
        let clock = self.clock();
        self.read(&store, &order).await?;
        round.read = clock.stop();
        let clock = self.clock();
        tokio::task::block_in_place(|| disk.transfer(&order, false)).or_fail("a raw read")?;
        round.raw_read = clock.stop();
        drop((store, disk));
        if let Some(foyer) = foyer {
            round.foyer = Some(self.foyer(foyer, seed).await?);
        }
        Ok(round)
    }

    fn store(&self, folder: &Path) -> Result<Store, BenchError> {
        let bytes = u64::from(self.blocks) * self.block_bytes;
        let segment_bytes =
            if bytes < SEGMENT_BYTES { SMALL_SEGMENT_BYTES.max(2 * self.block_bytes) } else { SEGMENT_BYTES };
        let options = DeviceOptions {
            path: folder.to_owned(),
            capacity_bytes: METADATA_BYTES
                + 2 * u64::from(self.blocks) * (self.block_bytes + 4096)
                + 4 * segment_bytes,
            segment_bytes,
            keys: HashMap::new(),
            read_only: false,
        };
        Store::open(&options, self.block_bytes, self.depth as u32, false).or_fail("a store")
    }

    fn clock(&self) -> Clock {
        let gigabytes = f64::from(self.blocks) * self.block_bytes as f64 / 1e9;
        Clock { gigabytes, started: Instant::now(), cpu: cpu_seconds() }
    }

    /// Each of the slots in turn, as many at a time as there are.
    async fn write(&self, store: &Store, order: &[u32]) -> Result<(), BenchError> {
        let depth = self.depth as u32;
        let lanes = (0..depth).map(|slot| async move {
            for block in order.iter().filter(|block| *block % depth == slot) {
                store.write(*block, slot).await.or_fail("a write")?;
            }
            Ok(())
        });
        futures::future::try_join_all(lanes).await.map(|_| ())
    }

    async fn read(&self, store: &Store, order: &[u32]) -> Result<(), BenchError> {
        let depth = self.depth as u32;
        let lanes = (0..depth).map(|slot| async move {
            for block in order.iter().skip(slot as usize).step_by(depth as usize) {
                store.read(*block, *block % depth, slot).await.or_fail("the bytes that were written")?;
            }
            Ok(())
        });
        futures::future::try_join_all(lanes).await.map(|_| ())
    }

    /// Another process, built by itself: see `contenders/foyer`.
    async fn foyer(&self, program: &Path, seed: u64) -> Result<[Rate; 2], BenchError> {
        let folder = self.folder.join("foyer");
        std::fs::create_dir_all(&folder).or_fail("a folder")?;
        let numbers = [self.block_bytes, u64::from(self.blocks), self.depth as u64, seed];
        let output = tokio::process::Command::new(program)
            .arg(&folder)
            .args(numbers.map(|number| number.to_string()))
            .process_group(0)
            .kill_on_drop(true)
            .output()
            .await
            .or_fail(&program.display().to_string())?;
        std::fs::remove_dir_all(&folder).or_fail("foyer's folder")?;
        let text = String::from_utf8_lossy(&output.stdout);
        let numbers: Vec<f64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [write, write_cpu, read, read_cpu] = numbers[..] else {
            let why = String::from_utf8_lossy(&output.stderr);
            return Err(BenchError(format!("foyer was not measured: {}", why.lines().last().unwrap_or("?"))));
        };
        Ok([Rate { gb_s: write, cpu_s_gb: write_cpu }, Rate { gb_s: read, cpu_s_gb: read_cpu }])
    }
}

struct Clock {
    gigabytes: f64,
    started: Instant,
    cpu: f64,
}

impl Clock {
    fn stop(self) -> Rate {
        Rate {
            gb_s: self.gigabytes / self.started.elapsed().as_secs_f64(),
            cpu_s_gb: (cpu_seconds() - self.cpu) / self.gigabytes,
        }
    }
}

fn columns(options: &Options) -> Vec<Column> {
    let mut columns = vec![
        Column::key("block KiB"),
        Column::key("at a time"),
        Column::new("write GB/s", Role::Higher, 2),
        Column::new("of raw", Role::Higher, 2),
        Column::new("write CPU-s/GB", Role::Lower, 3),
        Column::new("raw", Role::Fact, 3),
        Column::new("read GB/s", Role::Higher, 2),
        Column::new("read of raw", Role::Higher, 2),
        Column::new("read CPU-s/GB", Role::Lower, 3),
        Column::new("raw read", Role::Fact, 3),
    ];
    if options.foyer.is_some() {
        columns.push(Column::new("foyer write", Role::Fact, 2));
        columns.push(Column::new("foyer read", Role::Fact, 2));
        columns.push(Column::new("foyer read CPU-s/GB", Role::Fact, 2));
        columns.push(Column::new("read of foyer's", Role::Higher, 2));
    }
    columns
}

fn row((block_kib, depth): (u32, usize), rounds: &[Round], options: &Options) -> Vec<Cell> {
    let all = |value: fn(&Round) -> f64| Cell::rounds(&rounds.iter().map(value).collect::<Vec<_>>());
    let mut row = vec![
        Cell::Number(f64::from(block_kib)),
        Cell::Number(depth as f64),
        all(|round| round.write.gb_s),
        all(|round| round.write.gb_s / round.raw_write.gb_s),
        all(|round| round.write.cpu_s_gb),
        all(|round| round.raw_write.cpu_s_gb),
        all(|round| round.read.gb_s),
        all(|round| round.read.gb_s / round.raw_read.gb_s),
        all(|round| round.read.cpu_s_gb),
        all(|round| round.raw_read.cpu_s_gb),
    ];
    if options.foyer.is_some() {
        let foyer = |value: fn(&Round, [Rate; 2]) -> f64| {
            let values = rounds.iter().filter_map(|round| Some(value(round, round.foyer?)));
            Cell::rounds(&values.collect::<Vec<_>>())
        };
        row.push(foyer(|_, [write, _]| write.gb_s));
        row.push(foyer(|_, [_, read]| read.gb_s));
        row.push(foyer(|_, [_, read]| read.cpu_s_gb));
        row.push(foyer(|round, [_, read]| round.read.gb_s / read.gb_s));
    }
    row
}

fn bar((block_kib, depth): (u32, usize), rounds: &[Round]) -> Bar {
    let median = |value: fn(&Round) -> f64| quantile(&rounds.iter().map(value).collect::<Vec<_>>(), 0.5);
    Bar {
        name: format!("{block_kib} KiB, {depth} at a time"),
        parts: vec![median(|round| round.read.gb_s)],
        limit: Some(median(|round| round.raw_read.gb_s)),
    }
}

/// What a start costs: segments with summaries, and segments that were open.
async fn recovery(folder: &Path, megabytes: u64) -> Result<Section, BenchError> {
    let columns = vec![
        Column::key("segments"),
        Column::new("blocks", Role::Fact, 0),
        Column::new("ms", Role::Lower, 1),
        Column::new("blocks/s", Role::Higher, 0),
        Column::new("GB/s of blocks", Role::Higher, 1),
    ];
    let mut section = Section::new("recovery", "Reading a directory back at the start", columns);
    section.notes.push("Blocks of 256 KiB; one run each.".into());
    for (what, sealed) in [("with summaries", true), ("all open", false)] {
        let folder = folder.join(what);
        std::fs::create_dir_all(&folder).or_fail("a folder")?;
        let bench = Bench::new(&folder, (256, 8), megabytes);
        let store = bench.store(&folder)?;
        store.prepare(bench.blocks).await.or_fail("room on the disk")?;
        let all: Vec<u32> = (0..bench.blocks).collect();
        bench.write(&store, &all).await?;
        if sealed {
            store.seal(bench.blocks).await.or_fail("a summary")?;
        }
        drop(store);
        let start = Instant::now();
        let survey = Store::recover(&folder).await.or_fail("a survey")?;
        let seconds = start.elapsed().as_secs_f64();
        let found: u64 = survey.spaces.values().map(|space| space.blocks).sum();
        if found != u64::from(bench.blocks) {
            return Err(BenchError(format!("{found} of {} blocks were found again", bench.blocks)));
        }
        section.rows.push(vec![
            Cell::text(what),
            Cell::Number(found as f64),
            Cell::Number(1e3 * seconds),
            Cell::Number(found as f64 / seconds),
            Cell::Number(found as f64 * bench.block_bytes as f64 / seconds / 1e9),
        ]);
        std::fs::remove_dir_all(&folder).or_fail("a folder")?;
    }
    Ok(section)
}

fn shuffled(blocks: u32, seed: u64) -> Vec<u32> {
    use rand::{SeedableRng, rngs::StdRng, seq::SliceRandom};
    let mut order: Vec<u32> = (0..blocks).collect();
    order.shuffle(&mut StdRng::seed_from_u64(seed));
    order
}
