//! The way between an engine and the cache: loads and publishes run here, on tokio, while the engine computes.

use crate::engine::{Command, Summary, Update};
use crate::peer::PrefillPeer;
use cairn_client::{Block, CacheClient, WireKind};
use cairn_gpu::{Device, HostDevice, HostPinned};
use cairn_proto::{BlockHash, KeySpace};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// Batches between the engine and the publisher. When it is full the engine stops offering, rather than wait.
const PUBLISH_QUEUE: usize = 64;

/// Bytes waiting to be published, likewise.
const PUBLISH_QUEUE_BYTES: usize = 256 << 20;

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
    /// Blocks that need no loading.
    pub(crate) first: usize,
    /// Blocks that there is room for.
    pub(crate) room: usize,
    /// Whether a prefill worker may be asked for what is missing.
    pub(crate) may_delegate: bool,
}

pub(crate) struct Loaded {
    pub(crate) id: u64,
    /// Blocks from the start that the cache has; `None` when it cannot be reached.
    pub(crate) resident: Option<usize>,
    /// Verified blocks from `first` on, in canonical order.
    pub(crate) staging: Option<HostPinned>,
    pub(crate) blocks: usize,
    /// How they came.
    pub(crate) wire: Option<WireKind>,
    pub(crate) delegated: bool,
    pub(crate) elapsed: Duration,
}

pub(crate) struct PublishBatch {
    pub(crate) parent: Option<BlockHash>,
    pub(crate) blocks: Vec<Block>,
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
        let bytes = batch.bytes();
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
        let mut lookup = self.client.lookup(&self.space, &job.hashes).await;
        let mut delegated = false;
        let missing = job.hashes.len() - lookup.resident().max(job.first);
        let missing_tokens = missing * self.space.layout().block_tokens();
        // Without the cache the other worker's result could not be loaded.
        if job.may_delegate
            && self.client.is_connected()
            && let Some(delegate) = &self.delegate
            && missing > 0
            && missing_tokens >= delegate.min_tokens
        {
            delegated = delegate.peer.prefill(&self.space, &job.tokens).await;
            if delegated {
                lookup = self.client.lookup(&self.space, &job.hashes).await;
            }
        }
        let resident = lookup.resident();
        let mut loaded = Loaded {
            id: job.id,
            resident: self.client.is_connected().then_some(resident),
            staging: None,
            blocks: 0,
            wire: None,
            delegated,
            elapsed: Duration::ZERO,
        };
        let end = resident.min(job.first + job.room);
        if let Some(run) = lookup.run.filter(|_| end > job.first) {
            (loaded.staging, loaded.blocks, loaded.wire) = self.fetch(&run, job.first, end).await;
        }
        loaded.elapsed = started.elapsed();
        loaded
    }

    /// Blocks `first..end` of the run, up to the first that did not arrive whole.
    async fn fetch(
        &self,
        run: &cairn_client::Run,
        first: usize,
        end: usize,
    ) -> (Option<HostPinned>, usize, Option<WireKind>) {
        let block_bytes = self.space.block_bytes() as usize;
        let mut staging = match HostDevice.allocate_pinned((end - first) * block_bytes) {
            Ok(staging) => staging,
            Err(error) => {
                tracing::warn!(%error, "no memory to load cached blocks into");
                return (None, 0, None);
            }
        };
        let mut targets: Vec<&mut [u8]> = staging.as_mut().chunks_exact_mut(block_bytes).collect();
        let (mut arrived, mut wire) = (0, None);
        for (i, targets) in targets.chunks_mut(FETCH_BLOCKS).enumerate() {
            let fetched = self.client.fetch(run, first + i * FETCH_BLOCKS, targets).await;
            wire = fetched.wire;
            let outcomes = fetched.outcomes;
            let hits = outcomes.iter().take_while(|outcome| outcome.is_hit()).count();
            arrived += hits;
            if hits < outcomes.len() {
                tracing::info!(outcome = %outcomes[hits], "a cached block did not arrive; the rest is computed");
                break;
            }
        }
        (Some(staging), arrived, wire)
    }
}

impl PublishBatch {
    fn bytes(&self) -> usize {
        self.blocks.iter().map(|block| block.bytes.len()).sum()
    }
}

async fn publish_all(
    client: CacheClient,
    space: KeySpace,
    mut batches: mpsc::Receiver<PublishBatch>,
    queued: Arc<AtomicUsize>,
) {
    while let Some(batch) = batches.recv().await {
        queued.fetch_sub(batch.bytes(), Ordering::Relaxed);
        let outcomes = client.publish(&space, batch.parent, &batch.blocks).await;
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
