//! The way between an engine and the cache: loads and publishes run here, on tokio, while the engine computes.

use crate::compute::{Gathered, LoadedBlocks, NearBlocks, NearRoom, Stager, Staging};
use crate::engine::{Command, Summary, Update};
use crate::peer::PrefillPeer;
use cairn_client::{Block, CacheClient, Fetched, Lookup, Reach, Run, View, WireKind};
use cairn_proto::{BlockHash, Checksum, KeySpace};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// Batches between the engine and the publisher. When it is full the engine stops offering, rather than wait.
const PUBLISH_QUEUE: usize = 64;

/// Bytes waiting to be published, likewise.
const PUBLISH_QUEUE_BYTES: usize = 256 << 20;

/// Bytes that are read with the lookup: more is fetched once it is known that it is there.
const READ_BYTES: usize = 32 << 20;

/// Blocks in host memory are copied to the device and verified there, unless more than this part of what is loaded remains to be computed. Then they
/// are verified where they are, and copied while their first layers are computed: that saves the time of the shorter of the two, and reading
/// every byte on the CPU costs about what the bus does. By calculation, computing a token takes ten times as
/// long as moving its state, or more (models of 1B to 8B, 400 TFLOP/s, a bus of 50 GB/s).
const OVERLAP_FROM: usize = 16;

/// Blocks of one fetch: bounds what one late block can spoil, and the message sizes.
const FETCH_BLOCKS: usize = 512;

/// A worker's connection to the cache, and to a worker that prefills for it.
#[derive(Clone)]
pub struct Share {
    client: CacheClient,
    space: KeySpace,
    delegate: Option<Delegate>,
    publishes: mpsc::Sender<PublishBatch>,
    /// Bytes of the queued batches.
    queued: Arc<AtomicUsize>,
    runtime: Handle,
}

/// When and whom a decode worker asks to prefill.
#[derive(Clone)]
pub struct Delegate {
    /// Whom.
    pub peer: PrefillPeer,
    /// Fewer missing tokens than this are computed here: the round trip would cost more.
    pub min_tokens: usize,
}

pub(crate) struct LoadJob {
    pub(crate) id: u64,
    /// The chain from the first block of the prompt on.
    pub(crate) hashes: Vec<BlockHash>,
    /// Its tokens.
    pub(crate) tokens: Vec<u32>,
    /// Tokens of the prompt in all.
    pub(crate) prompt: usize,
    /// Blocks that need no loading.
    pub(crate) first: usize,
    /// Blocks that there is room for.
    pub(crate) room: usize,
    /// Whether a prefill worker may be asked for what is missing.
    pub(crate) may_delegate: bool,
    /// Gives the memory that blocks are loaded into.
    pub(crate) stager: Stager,
}

pub(crate) struct Loaded {
    pub(crate) id: u64,
    /// Blocks from the start that the cache has; `None` when it cannot be reached.
    pub(crate) resident: Option<usize>,
    /// Verified blocks from `first` on, in canonical order.
    pub(crate) arrived: Option<LoadedBlocks>,
    pub(crate) blocks: usize,
    /// Of them, those that were verified on the device, and of these those that came from the memory of a GPU.
    pub(crate) near: (usize, usize),
    /// How they came.
    pub(crate) wire: Option<WireKind>,
    pub(crate) delegated: bool,
    pub(crate) elapsed: Duration,
}

pub(crate) struct PublishBatch {
    pub(crate) parent: Option<BlockHash>,
    /// Names of the blocks.
    pub(crate) hashes: Vec<BlockHash>,
    /// Their bytes; none where there are no blocks.
    pub(crate) gathered: Option<Gathered>,
    /// Counts what the cache acknowledged.
    pub(crate) stored: Arc<AtomicUsize>,
    /// Sent once all before it is done.
    pub(crate) finish: Option<(Summary, mpsc::Sender<Update>)>,
}

impl Share {
    /// Starts the publisher on the current tokio runtime.
    pub fn new(client: CacheClient, space: KeySpace, delegate: Option<Delegate>) -> Self {
        let (publishes, batches) = mpsc::channel(PUBLISH_QUEUE);
        let runtime = Handle::current();
        let queued = Arc::new(AtomicUsize::new(0));
        runtime.spawn(publish_all(client.clone(), space.clone(), batches, queued.clone()));
        Self { client, space, delegate, publishes, queued, runtime }
    }

    /// The key space of this worker's blocks.
    pub fn space(&self) -> &KeySpace {
        &self.space
    }

    pub(crate) fn load(&self, job: LoadJob, done: mpsc::Sender<Command>) {
        let share = self.clone();
        self.runtime.spawn(async move {
            let loaded = share.run_load(job).await;
            // The engine is gone: so is the request.
            let _ = done.send(Command::Loaded(loaded)).await;
        });
    }

    /// Queues a batch; says whether there was room.
    pub(crate) fn publish(&self, batch: PublishBatch) -> bool {
        let bytes = batch.hashes.len() * self.space.block_bytes() as usize;
        // Only the engine adds, so the sum cannot pass the bound between the check and the addition.
        if self.queued.load(Ordering::Relaxed) + bytes > PUBLISH_QUEUE_BYTES {
            return false;
        }
        self.queued.fetch_add(bytes, Ordering::Relaxed);
        let sent = self.publishes.try_send(batch).is_ok();
        if !sent {
            self.queued.fetch_sub(bytes, Ordering::Relaxed);
        }
        sent
    }

    async fn run_load(&self, job: LoadJob) -> Loaded {
        let started = Instant::now();
        let mut delegated = false;
        let mut staging = None;
        let in_place = job.stager.reads_in_place() && self.client.shares_memory().await;
        let (lookup, fetched) = if job.may_delegate && self.delegate.is_some() {
            let mut lookup = self.client.lookup(&self.space, &job.hashes).await;
            delegated = self.delegate(&job, lookup.resident()).await;
            if delegated {
                lookup = self.client.lookup(&self.space, &job.hashes).await;
            }
            (lookup, Fetched { outcomes: Vec::new(), wire: None })
        } else if in_place {
            let lookup = self.client.lookup(&self.space, &job.hashes).await;
            (lookup, Fetched { outcomes: Vec::new(), wire: None })
        } else {
            // Nobody knows yet how much there is: room for the first blocks, which come with the answer.
            let wanted = job.hashes.len().saturating_sub(job.first).min(job.room);
            let few = (READ_BYTES / self.space.block_bytes() as usize).clamp(1, FETCH_BLOCKS);
            staging = self.staging(&job.stager, wanted.min(few));
            self.read(&job, staging.as_mut()).await
        };
        let resident = lookup.resident();
        let mut loaded = Loaded {
            id: job.id,
            resident: self.client.is_connected().then_some(resident),
            arrived: None,
            blocks: 0,
            near: (0, 0),
            wire: fetched.wire,
            delegated,
            elapsed: Duration::ZERO,
        };
        let end = resident.min(job.first + job.room);
        if let Some(run) = lookup.run.as_ref().filter(|_| in_place && end > job.first) {
            self.view(run, &job, end, &mut loaded).await;
        } else if let Some(run) = lookup.run.as_ref().filter(|_| end > job.first)
            && let Some(mut staging) = self.enough(&job.stager, staging, end - job.first)
        {
            (loaded.blocks, loaded.wire) = self.fetch_rest(run, &job, end, fetched, &mut staging).await;
            loaded.arrived = (loaded.blocks > 0).then_some(LoadedBlocks::Staged(staging));
        }
        loaded.elapsed = started.elapsed();
        loaded
    }

    /// Lets another worker compute what is missing, if it is worth it; says whether it did.
    async fn delegate(&self, job: &LoadJob, resident: usize) -> bool {
        let missing = job.hashes.len() - resident.max(job.first);
        let missing_tokens = missing * self.space.layout().block_tokens();
        // Without the cache the other worker's result could not be loaded.
        if self.client.is_connected()
            && let Some(delegate) = &self.delegate
            && missing > 0
            && missing_tokens >= delegate.min_tokens
        {
            return delegate.peer.prefill(&self.space, &job.tokens).await;
        }
        false
    }

    /// Room for all blocks, with what is in the first ones.
    fn enough(&self, stager: &Stager, staging: Option<Staging>, blocks: usize) -> Option<Staging> {
        let bytes = blocks * self.space.block_bytes() as usize;
        match staging {
            Some(staging) if staging.as_ref().len() >= bytes => Some(staging),
            few => {
                let mut all = self.staging(stager, blocks)?;
                if let Some(few) = few {
                    all.as_mut()[..few.as_ref().len()].copy_from_slice(few.as_ref());
                }
                Some(all)
            }
        }
    }

    /// Room for so many blocks; none if there is none to be had.
    fn staging(&self, stager: &Stager, blocks: usize) -> Option<Staging> {
        let bytes = blocks * self.space.block_bytes() as usize;
        if bytes == 0 {
            return None;
        }
        let allocated = stager.allocate(bytes);
        allocated.inspect_err(|error| tracing::warn!(%error, "no memory to load cached blocks into")).ok()
    }

    /// What is resident, and its first blocks.
    async fn read(&self, job: &LoadJob, staging: Option<&mut Staging>) -> (Lookup, Fetched) {
        let block_bytes = self.space.block_bytes() as usize;
        let memory = staging.map_or(Default::default(), AsMut::as_mut);
        let mut targets: Vec<&mut [u8]> = memory.chunks_exact_mut(block_bytes).take(FETCH_BLOCKS).collect();
        self.client.read(&self.space, &job.hashes, job.first, &mut targets).await
    }

    /// Blocks up to `end` of the run where the server has them, verified; what is not in place is none.
    async fn view(&self, run: &Run, job: &LoadJob, end: usize, loaded: &mut Loaded) {
        let near =
            job.stager.near().map(|near| near.room(end - job.first, self.space.block_bytes() as usize));
        let gpus = near.as_ref().map(NearRoom::gpus).unwrap_or_default();
        let reach = Reach { gpus: &gpus, blocks: near.as_ref().map_or(0, NearRoom::blocks) };
        let view = self.client.fetch_view_near(run, job.first, end - job.first, reach).await;
        let remaining = job.prompt.saturating_sub(end * self.space.layout().block_tokens());
        let host = remaining * OVERLAP_FROM <= (end - job.first) * self.space.layout().block_tokens();
        let verified = match self.verify(near.map(|near| (near, host)), view).await {
            Some(verified) => Some(verified),
            None => {
                let view = self.client.fetch_view(run, job.first, end - job.first).await;
                self.verify(None, view).await
            }
        };
        let Some((view, near, blocks)) = verified else { return };
        loaded.wire = view.wire();
        loaded.blocks = blocks;
        loaded.near = near.as_ref().map_or((0, 0), |near| near.count(blocks));
        loaded.arrived = (blocks > 0).then_some(LoadedBlocks::InPlace(Box::new(view), near));
    }

    /// Verifies a view up to its first block that is not right, with copies on the device of those on a GPU and maybe of those in host memory; none
    /// when they could not be copied.
    async fn verify(
        &self,
        near: Option<(NearRoom, bool)>,
        view: View,
    ) -> Option<(View, Option<NearBlocks>, usize)> {
        let block_bytes = self.space.block_bytes() as usize;
        // Verifying reads every byte once.
        let verified = tokio::task::spawn_blocking(move || {
            let copied = near.map(|(near, host)| near.copy(&view, block_bytes, host)).transpose();
            let near = copied
                .inspect_err(|error| tracing::warn!(%error, "blocks were not copied to the device"))
                .ok()?;
            let blocks = view.verify_all();
            if let Some(Err(outcome)) = (blocks < view.len()).then(|| view.block(blocks)) {
                tracing::info!(%outcome, "a cached block did not arrive; the rest is computed");
            }
            Some((view, near, blocks))
        });
        verified.await.ok().flatten()
    }

    /// Blocks up to `end` of the run, or to the first that did not arrive whole: how many there are after those that were read with the
    /// lookup, and how the last came.
    async fn fetch_rest(
        &self,
        run: &Run,
        job: &LoadJob,
        end: usize,
        mut fetched: Fetched,
        staging: &mut Staging,
    ) -> (usize, Option<WireKind>) {
        let block_bytes = self.space.block_bytes() as usize;
        let mut targets: Vec<&mut [u8]> =
            staging.as_mut().chunks_exact_mut(block_bytes).take(end.saturating_sub(job.first)).collect();
        let mut arrived = 0;
        loop {
            let hits = fetched.outcomes.iter().take_while(|outcome| outcome.is_hit()).count();
            arrived += hits;
            if let Some(outcome) = fetched.outcomes.get(hits) {
                tracing::info!(%outcome, "a cached block did not arrive; the rest is computed");
                return (arrived, fetched.wire);
            }
            let next = targets.len().min(arrived + FETCH_BLOCKS);
            if arrived >= next {
                return (arrived, fetched.wire);
            }
            fetched = self.client.fetch(run, job.first + arrived, &mut targets[arrived..next]).await;
        }
    }
}

/// Gathered blocks with their checksums, made here where the bytes are; none when they did not arrive.
async fn blocks(space: &KeySpace, hashes: Vec<BlockHash>, gathered: Option<Gathered>) -> Vec<Block> {
    let Some(gathered) = gathered else { return Vec::new() };
    let bytes = match gathered.bytes().await {
        Ok(bytes) => bytes,
        Err(error) => {
            tracing::warn!(%error, "blocks did not leave the device; they are not offered to the cache");
            return Vec::new();
        }
    };
    let (id, size) = (space.id(), space.block_bytes() as usize);
    let block = |(i, hash): (usize, BlockHash)| {
        let bytes = bytes.slice(i * size..(i + 1) * size);
        Block { hash, checksum: Checksum::of(&id, &hash, &bytes), bytes }
    };
    hashes.into_iter().enumerate().map(block).collect()
}

async fn publish_all(
    client: CacheClient,
    space: KeySpace,
    mut batches: mpsc::Receiver<PublishBatch>,
    queued: Arc<AtomicUsize>,
) {
    while let Some(batch) = batches.recv().await {
        let bytes = batch.hashes.len() * space.block_bytes() as usize;
        let blocks = blocks(&space, batch.hashes, batch.gathered).await;
        queued.fetch_sub(bytes, Ordering::Relaxed);
        let outcomes = client.publish(&space, batch.parent, &blocks).await;
        let stored = outcomes.iter().filter(|outcome| outcome.is_stored()).count();
        if let Some(first) = outcomes.iter().find(|outcome| !outcome.is_stored()) {
            tracing::debug!(outcome = ?first, blocks = outcomes.len() - stored, "blocks were not stored");
        }
        batch.stored.fetch_add(stored, Ordering::Relaxed);
        if let Some((mut summary, updates)) = batch.finish {
            summary.stored_blocks = batch.stored.load(Ordering::Relaxed);
            // A requester that is gone needs no answer.
            let _ = updates.try_send(Update::Finished(summary));
        }
    }
}
