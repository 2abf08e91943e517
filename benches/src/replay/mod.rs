//! A trace through a real server over a real wire, with real bytes, every one of them verified; and beside it what the model of the same
//! policies says. Run by one worker the two must agree to the token.

mod site;
mod tables;

use crate::{BenchError, OrFail, Watch, cpu_seconds};
use cairn_client::{Block, CacheClient, WireKind};
use cairn_core::PolicyKind;
use cairn_harness::hit_rate::Capacity;
use cairn_harness::section::Section;
use cairn_harness::trace::{Request, Trace};
use cairn_proto::{BlockHash, Checksum, KeySpace, Outcome, Tier, limits, pb};
use site::Site;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// Blocks of one fetch or publish.
const BATCH: usize = 512;
/// How often a worker that waits for its time looks whether it should end.
const GLANCE: Duration = Duration::from_millis(200);

/// Longest wait until everything is on the device.
const DRAIN: Duration = Duration::from_secs(60);
/// How requests follow each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pace {
    /// Each worker starts the next when its last is done.
    Closed,
    /// As the trace says, so many times faster.
    Timestamps(f64),
}

/// What to replay, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The requests.
    pub trace: Trace,
    /// Real bytes of a block, whatever it stands for.
    pub block_kib: u32,
    /// Host memory.
    pub host: Capacity,
    /// The second tier.
    pub nvme: Option<Capacity>,
    /// Where it is.
    pub folder: PathBuf,
    /// What leaves host memory, and what the second tier.
    pub policies: [PolicyKind; 2],
    /// The only wire; else the best that works.
    pub wire: Option<WireKind>,
    /// Clients at a time.
    pub workers: usize,
    /// How requests follow each other.
    pub pace: Pace,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// Tables and plots.
    pub sections: Vec<Section>,
    /// Nothing is missing.
    pub complete: bool,
    /// How far the hit tokens are from the model's, in points of all tokens.
    pub points: f64,
    /// How far they may be, below and above. By timestamps there is no bound: what comes faster than the device writes may leave memory before.
    pub bounds: Option<[f64; 2]>,
}

impl Replayed {
    /// Server and model agree within the bounds.
    pub fn agrees(&self) -> bool {
        self.bounds.is_none_or(|[below, above]| (below..=above).contains(&self.points))
    }
}

/// One request as it went.
#[derive(Clone, Copy, Debug, Default)]
struct Went {
    hits: usize,
    host: usize,
    nvme: usize,
    /// Found, and then not brought.
    lost: usize,
    stored: usize,
    refused: usize,
    fetch_s: f64,
    publish_s: f64,
    /// Behind its time.
    late_s: f64,
}
/// What all workers share.
struct Work {
    options: Options,
    space: KeySpace,
    names: Vec<BlockHash>,
    next: AtomicUsize,
    stop: AtomicBool,
    started: Instant,
    /// Blocks that may wait for the device when the next request begins: none if nothing is to depend on time, else few enough that they do
    /// not leave memory before they are written, as they would not at the pace of a model. `None`: the trace says when.
    backlog: Option<u64>,
}
/// Replays; `servers` runs the server.
///
/// # Errors
/// When something does not work, or a byte is wrong.
pub async fn run(options: Options, servers: &Handle, watch: &dyn Watch) -> Result<Replayed, BenchError> {
    let names = names(&options.trace)?;
    let site = servers.spawn(Site::start(options.clone())).await.or_fail("a server")??;
    let work = Arc::new(Work {
        space: site.space.clone(),
        names,
        next: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
        started: Instant::now(),
        backlog: match options.pace {
            Pace::Closed if options.nvme.is_some() && options.workers > 1 => Some(site.block_slots / 4),
            Pace::Closed if options.nvme.is_some() => Some(0),
            _ => None,
        },
        options,
    });
    watch.begin(work.options.trace.requests().len());
    let cpu = cpu_seconds();
    let mut workers = tokio::task::JoinSet::new();
    for _ in 0..work.options.workers {
        workers.spawn(worker(work.clone(), site.client(work.options.wire)?));
    }
    let mut told = 0;
    let mut went: Vec<(usize, Went)> = Vec::new();
    loop {
        tokio::select! {
            ended = workers.join_next() => match ended {
                Some(ended) => went.extend(ended.or_fail("a worker")??),
                None => break,
            },
            () = tokio::time::sleep(Duration::from_millis(100)) => {
                let now = work.next.load(Ordering::Relaxed).min(work.options.trace.requests().len());
                (told..now).for_each(|_| watch.step(&work.options.trace.name));
                told = now;
                if watch.stopped() {
                    work.stop.store(true, Ordering::Relaxed);
                }
            }
        }
    }
    let (wall, cpu) = (work.started.elapsed().as_secs_f64(), cpu_seconds() - cpu);
    let stats = site.client(work.options.wire)?.stats().await.or_fail("the server's totals")?;
    let block_slots = site.block_slots;
    servers.spawn(site.server.shutdown()).await.or_fail("a server")?.or_fail("an orderly end")?;
    went.sort_by_key(|(index, _)| *index);
    let went: Vec<Went> = went.into_iter().map(|(_, went)| went).collect();
    tables::summary(&work, &went, (block_slots, &stats), (wall, cpu))
}
/// A name for each block, which names its whole prefix as in any chain.
fn names(trace: &Trace) -> Result<Vec<BlockHash>, BenchError> {
    let mut parents: Vec<Option<u32>> = vec![None; trace.ids()];
    for request in trace.requests() {
        let mut before = u32::MAX;
        for id in trace.chain(request) {
            match parents[id as usize] {
                None => parents[id as usize] = Some(before),
                Some(parent) if parent == before => {}
                Some(_) => {
                    let why =
                        "block ids of this trace do not name prefixes: the same id follows different blocks";
                    return Err(BenchError(why.into()));
                }
            }
            before = id;
        }
    }
    let name = |id: u32| {
        let mut bytes = [0u8; 32];
        for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&mix(u64::from(id) << 8 | i as u64).to_le_bytes());
        }
        BlockHash(bytes)
    };
    Ok((0..trace.ids() as u32).map(name).collect())
}

/// The finalizer of MurmurHash3: every bit of the result depends on every bit of the input.
fn mix(mut bits: u64) -> u64 {
    bits = (bits ^ (bits >> 33)).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
    bits = (bits ^ (bits >> 33)).wrapping_mul(0xC4CE_B9FE_1A85_EC53);
    bits ^ (bits >> 33)
}

/// The bytes of a block: any two blocks differ in nearly every one.
fn payload(id: u32, bytes: &mut [u8]) {
    let seed = mix(u64::from(id) + 1);
    for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = (seed ^ i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        word.copy_from_slice(&value.to_le_bytes());
    }
}

fn is_payload(id: u32, bytes: &[u8]) -> bool {
    let seed = mix(u64::from(id) + 1);
    bytes
        .chunks_exact(8)
        .enumerate()
        .all(|(i, word)| *word == (seed ^ i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes())
}
async fn worker(work: Arc<Work>, client: CacheClient) -> Result<Vec<(usize, Went)>, BenchError> {
    let block_bytes = work.space.block_bytes() as usize;
    let mut memory = vec![0u8; BATCH * block_bytes];
    let mut went = Vec::new();
    let first = work.options.trace.requests().first().map_or(0, |request| request.timestamp_ms);
    while !work.stop.load(Ordering::Relaxed) {
        let index = work.next.fetch_add(1, Ordering::Relaxed);
        let Some(request) = work.options.trace.requests().get(index) else { break };
        let mut late_s = 0.0;
        if let Pace::Timestamps(speed) = work.options.pace {
            let due = (request.timestamp_ms - first).max(0) as f64 / 1e3 / speed;
            let due = Duration::try_from_secs_f64(due).or_fail("a pace at which the trace ends")?;
            let due = work.started.checked_add(due).or_fail("a pace at which the trace ends")?;
            while Instant::now() < due && !work.stop.load(Ordering::Relaxed) {
                tokio::time::sleep_until(due.min(Instant::now() + GLANCE).into()).await;
            }
            if work.stop.load(Ordering::Relaxed) {
                break;
            }
            late_s = due.elapsed().as_secs_f64();
        }
        let mut one = replay(&work, &client, request, &mut memory).await?;
        one.late_s = late_s;
        if let Some(backlog) = work.backlog {
            drain(&client, &work.space, backlog).await?;
        }
        went.push((index, one));
    }
    Ok(went)
}

/// Looks the chain up, brings and checks what is there, and publishes the rest.
async fn replay(
    work: &Work,
    client: &CacheClient,
    request: &Request,
    memory: &mut [u8],
) -> Result<Went, BenchError> {
    let ids: Vec<u32> = work.options.trace.chain(request).collect();
    let chain: Vec<BlockHash> = ids.iter().map(|id| work.names[*id as usize]).collect();
    let block_bytes = work.space.block_bytes() as usize;
    let mut went = Went::default();
    if chain.is_empty() {
        return Ok(went);
    }
    let started = Instant::now();
    let lookup = client.lookup(&work.space, &chain).await;
    let mut fetch = started.elapsed();
    // A found block may be written again, and what is being written cannot leave memory: another one would.
    rest(work, client).await?;
    let resident = lookup.resident();
    if let Some(run) = lookup.run {
        while went.hits < resident && went.lost == 0 {
            let count = BATCH.min(resident - went.hits);
            let mut targets: Vec<&mut [u8]> = memory.chunks_exact_mut(block_bytes).take(count).collect();
            let began = Instant::now();
            let fetched = client.fetch(&run, went.hits, &mut targets).await;
            fetch += began.elapsed();
            let hits = fetched.iter().take_while(|outcome| outcome.is_hit()).count();
            for (target, id) in targets.iter().zip(&ids[went.hits..]).take(hits) {
                if !is_payload(*id, target) {
                    return Err(BenchError(format!("wrong bytes arrived for block {id}")));
                }
            }
            went.hits += hits;
            went.lost = count - hits;
        }
    }
    let of =
        |tier| lookup.outcomes[..went.hits].iter().filter(|outcome| **outcome == Outcome::Hit(tier)).count();
    (went.host, went.nvme) = (of(Tier::Host), of(Tier::Nvme));
    went.fetch_s = fetch.as_secs_f64();
    rest(work, client).await?;
    let mut from = went.hits;
    while from < chain.len() {
        let to = chain.len().min(from + BATCH);
        let blocks: Vec<Block> = (from..to)
            .map(|at| {
                let mut bytes = vec![0; block_bytes];
                payload(ids[at], &mut bytes);
                let checksum = Checksum::of(&work.space.id(), &chain[at], &bytes);
                Block { hash: chain[at], checksum, bytes: bytes.into() }
            })
            .collect();
        let began = Instant::now();
        let parent = from.checked_sub(1).map(|before| chain[before]);
        let stored = client.publish(&work.space, parent, &blocks).await;
        went.publish_s += began.elapsed().as_secs_f64();
        let kept = stored.iter().filter(|stored| stored.is_stored()).count();
        went.stored += kept;
        went.refused += stored.len() - kept;
        from = to;
    }
    Ok(went)
}

/// Between the steps of one worker nothing goes on at the device, so that its hits depend on nothing but the trace.
async fn rest(work: &Work, client: &CacheClient) -> Result<(), BenchError> {
    match work.backlog {
        Some(0) => drain(client, &work.space, 0).await,
        _ => Ok(()),
    }
}

/// Waits until no more blocks than this wait for the device; if none may, until it holds no more than it should.
async fn drain(client: &CacheClient, space: &KeySpace, backlog: u64) -> Result<(), BenchError> {
    let record = record_bytes(space);
    let started = Instant::now();
    loop {
        let stats = client.stats().await.or_fail("the server's totals")?;
        let settled = |device: &pb::DeviceStats| {
            let full = backlog == 0 && device.live_blocks > device.target_bytes / record;
            device.queued_blocks <= backlog && !full
        };
        if stats.devices.iter().all(settled) {
            return Ok(());
        }
        if started.elapsed() > DRAIN {
            return Err(BenchError("the second tier did not come to rest; is its disk full?".into()));
        }
        tokio::time::sleep(Duration::from_micros(300)).await;
    }
}

/// On a device: the block and its header.
fn record_bytes(space: &KeySpace) -> u64 {
    space.block_bytes().next_multiple_of(limits::SLOT_ALIGN_BYTES) + limits::SLOT_ALIGN_BYTES
}
#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::Unwatched;
    use cairn_harness::section::Cell;

    fn options(folder: PathBuf, workers: usize, policy: PolicyKind) -> Options {
        Options {
            trace: cairn_harness::workload::generate(&"rag".parse().unwrap(), 120, 5),
            block_kib: 4,
            // More than the longest prompt.
            host: Capacity::Share(0.1),
            nvme: Some(Capacity::Share(0.25)),
            folder,
            policies: [policy; 2],
            wire: None,
            workers,
            pace: Pace::Closed,
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_worker_and_the_model_agree_to_the_token() {
        let folder = tempfile::tempdir().unwrap();
        let options = options(folder.path().to_owned(), 1, PolicyKind::Lru);
        let replayed = run(options, &Handle::current(), &Unwatched).await.unwrap();
        assert!(replayed.complete && replayed.bounds == Some([-0.0, 0.0]));
        assert!(replayed.agrees(), "{:?}", replayed.sections[0].rows);
        let [server, model] = &replayed.sections[0].rows[..] else { panic!("two rows") };
        assert_eq!((&server[1..4], &server[6]), (&model[1..4], &model[6]), "tokens and writes");
        // A slot that is being written out just then cannot leave: another one did.
        let hits = |row: &[Cell]| [4, 5].map(|at| row[at].value().unwrap());
        let ([host, nvme], [model_host, model_nvme]) = (hits(server), hits(model));
        assert_eq!(host + nvme, model_host + model_nvme);
        assert!(nvme > 500.0 && (host - model_host).abs() <= 0.01 * (host + nvme), "{host} and {nvme}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn several_workers_stay_near() {
        let folder = tempfile::tempdir().unwrap();
        let options = options(folder.path().to_owned(), 3, PolicyKind::Lru);
        let replayed = run(options, &Handle::current(), &Unwatched).await.unwrap();
        assert!(replayed.complete && replayed.agrees(), "{} {:?}", replayed.points, replayed.bounds);
    }

    #[test]
    fn ids_that_name_no_prefix_are_refused() {
        let mut trace = Trace::new("odd", 16);
        trace.push(0, (32, 0), &[1, 2]);
        trace.push(1, (32, 0), &[3, 2]);
        trace.seal();
        assert!(names(&trace).unwrap_err().to_string().contains("prefixes"));
        let mut bytes = vec![0; 64];
        payload(7, &mut bytes);
        assert!(is_payload(7, &bytes) && !is_payload(8, &bytes));
    }
}
