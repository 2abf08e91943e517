//! Blocks where the server has them, without a copy: on one host, in shared memory. Elsewhere a view is a copy, so that callers need
//! not care.

use crate::client::CacheClient;
use crate::connection::Connection;
use crate::fetch::{Fault, fault, patience, report};
use crate::lease::Lease;
use crate::lookup::Run;
use cairn_proto::{BlockHash, Checksum, MissReason, Outcome, SpaceId, Tier};
use cairn_transfer::shm::Pinned;
use cairn_transfer::store::{GpuChunk, Reach};
use cairn_transfer::{FetchJob, WireKind};
use memmap2::MmapRaw;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::time::Instant;
use tonic::Status;

/// Bytes to verify for which it is worth it to start one more thread, and the most threads.
const BYTES_PER_THREAD: usize = 8 << 20;
const MAX_THREADS: usize = 8;

enum Bytes {
    Pinned(Pinned),
    Copied(Vec<Vec<u8>>),
}

/// Blocks of a run for reading. While it lives they keep their bytes, whatever becomes of the lease.
pub struct View {
    first: usize,
    bytes: Bytes,
    /// What is known of each block; unset until it is verified.
    outcomes: Vec<OnceLock<Outcome>>,
    space: SpaceId,
    hashes: Vec<BlockHash>,
    checksums: Vec<Checksum>,
    tiers: Vec<Tier>,
    wire: Option<WireKind>,
    /// Whom to tell of a corrupt block.
    connection: Option<Connection>,
    lease: Arc<Lease>,
}

impl View {
    /// Blocks of the view.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.outcomes.len()
    }

    /// How its bytes came.
    pub fn wire(&self) -> Option<WireKind> {
        self.wire
    }

    /// The bytes of the `index`-th block. They are verified when first asked for, which reads them once; after that this costs
    /// nothing.
    ///
    /// # Errors
    /// The outcome of a block that is no hit.
    pub fn block(&self, index: usize) -> Result<&[u8], Outcome> {
        match self.outcomes[index].get_or_init(|| self.verify(index)) {
            Outcome::Hit(_) => self.bytes(index).map_err(Outcome::Miss),
            outcome => Err(*outcome),
        }
    }

    /// Verifies the blocks up to the first that is not right, on several threads where there is much to read, and says how many are. A block on
    /// a GPU is right if [`Self::accept`] said so before. Blocks the thread.
    pub fn verify_all(&self) -> usize {
        let right = |index: usize| match self.on_gpu(index) {
            Some(_) => matches!(self.outcomes[index].get(), Some(Outcome::Hit(_))),
            None => self.block(index).is_ok(),
        };
        let block_bytes = (0..self.len()).find_map(|index| Some(self.bytes(index).ok()?.len()));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let worth_it = block_bytes.unwrap_or(0) * self.len() / BYTES_PER_THREAD;
        let threads = worth_it.min(cores).min(MAX_THREADS);
        if threads > 1 {
            // What one thread has found wrong nobody looks beyond.
            let next = AtomicUsize::new(0);
            let work = || loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= self.len() {
                    return;
                }
                if !right(index) {
                    next.store(self.len(), Ordering::Relaxed);
                }
            };
            std::thread::scope(|scope| {
                for _ in 1..threads {
                    // Without a thread the others do its part.
                    let _ = std::thread::Builder::new().name("cairn-verify".into()).spawn_scoped(scope, work);
                }
                work();
            });
        }
        (0..self.len()).take_while(|index| right(*index)).count()
    }

    /// The mapping in which the `index`-th block lies, and where its bytes begin there, if it is in place: for letting a device read it. Its
    /// bytes are the block's only as long as `self`, and worth something only once [`Self::block`] has verified them.
    pub fn mapping(&self, index: usize) -> Option<(Arc<MmapRaw>, u64)> {
        match &self.bytes {
            Bytes::Pinned(pinned) => pinned.mapping(self.first + index),
            Bytes::Copied(_) => None,
        }
    }

    /// The memory of a GPU in which the `index`-th block lies, and where it begins there, for callers that asked with
    /// [`CacheClient::fetch_view_near`]. Such a block has no bytes here: copy them on the GPU, and tell [`Self::accept`] the checksum of
    /// the copy.
    pub fn on_gpu(&self, index: usize) -> Option<(&Arc<GpuChunk>, u64)> {
        match &self.bytes {
            Bytes::Pinned(pinned) => pinned.on_gpu(self.first + index),
            Bytes::Copied(_) => None,
        }
    }

    /// What the checksum of the `index`-th block is computed with: its seed.
    pub fn seed(&self, index: usize) -> u64 {
        Checksum::seed(&self.space, &self.hashes[index])
    }

    /// Decides on a block that the caller copied: whether the copy's checksum is the block's. The server is told if not.
    ///
    /// # Errors
    /// The outcome of a block that is no hit.
    pub fn accept(&self, index: usize, checksum: Checksum) -> Result<(), Outcome> {
        match self.outcomes[index].get_or_init(|| self.judge(index, checksum)) {
            Outcome::Hit(_) => Ok(()),
            outcome => Err(*outcome),
        }
    }

    fn bytes(&self, index: usize) -> Result<&[u8], MissReason> {
        match &self.bytes {
            Bytes::Pinned(pinned) => pinned.bytes(self.first + index),
            Bytes::Copied(copies) => Ok(&copies[index]),
        }
    }

    fn verify(&self, index: usize) -> Outcome {
        match self.bytes(index) {
            Err(reason) => Outcome::Miss(reason),
            Ok(bytes) => self.judge(index, Checksum::of(&self.space, &self.hashes[index], bytes)),
        }
    }

    fn judge(&self, index: usize, found: Checksum) -> Outcome {
        if found == self.checksums[index] {
            return Outcome::Hit(self.tiers[index]);
        }
        tracing::warn!(hash = ?self.hashes[index], "a block in shared memory is corrupt");
        if let Some(connection) = &self.connection {
            report(connection, self.lease.clone(), (self.first + index) as u32);
        }
        Outcome::Corrupt
    }
}

impl CacheClient {
    /// Whether the server's memory is mapped here, so that views are no copies.
    pub async fn shares_memory(&self) -> bool {
        let deadline = Instant::now() + self.options().fetch_timeout;
        self.connection(deadline).await.is_ok_and(|connection| connection.wires.shm().is_some())
    }

    /// Blocks `first..first + count` of the run, in place if the server's memory can be mapped here, else copied.
    ///
    /// # Panics
    /// When the positions are outside the run.
    pub async fn fetch_view(&self, run: &Run, first: usize, count: usize) -> View {
        self.fetch_view_near(run, first, count, Reach::default()).await
    }

    /// As [`Self::fetch_view`], for callers that can open the memory of GPUs: of the first `reach.blocks`, those that are there stay there, see
    /// [`View::on_gpu`]; those in host memory are copied to a GPU for the next reader.
    ///
    /// # Panics
    /// When the positions are outside the run.
    pub async fn fetch_view_near(&self, run: &Run, first: usize, count: usize, reach: Reach<'_>) -> View {
        assert!(first + count <= run.len(), "positions outside the run");
        let deadline = Instant::now() + self.options().fetch_timeout;
        if let Ok(connection) = self.connection(deadline).await
            && connection.session == run.lease.session()
            && let Some(shm) = connection.wires.shm()
        {
            let job = FetchJob {
                session: connection.session,
                lease: run.lease.id(),
                blocks: first..first + count,
                locations: run.locations.clone(),
                range_bytes: 0,
            };
            let pin = shm.pin(&job, run.space.block_bytes(), reach);
            let pinned = tokio::time::timeout_at(patience(deadline, false), pin).await;
            match pinned.unwrap_or_else(|_| Err(Status::deadline_exceeded("no pin in time"))) {
                Ok(pinned) => {
                    connection.wires.worked(WireKind::Shm, count as u64 * run.space.block_bytes());
                    let outcomes = (0..count).map(|_| OnceLock::new()).collect();
                    let wire = Some(WireKind::Shm);
                    return view(run, first, Bytes::Pinned(pinned), outcomes, (wire, Some(connection)));
                }
                Err(status) if fault(&status) == Fault::Wire => {
                    connection.wires.failed(WireKind::Shm, &status);
                }
                Err(_) => {}
            }
        }
        let mut copies = vec![vec![0; run.space.block_bytes() as usize]; count];
        let fetched = self.fetch_until(run, first, &mut copies, (deadline, None)).await;
        let outcomes = fetched.outcomes.into_iter().map(OnceLock::from).collect();
        view(run, first, Bytes::Copied(copies), outcomes, (fetched.wire, None))
    }
}

fn view(
    run: &Run,
    first: usize,
    bytes: Bytes,
    outcomes: Vec<OnceLock<Outcome>>,
    (wire, connection): (Option<WireKind>, Option<Connection>),
) -> View {
    let range = first..first + outcomes.len();
    View {
        first,
        bytes,
        outcomes,
        space: run.space.id(),
        hashes: run.hashes[range.clone()].to_vec(),
        checksums: run.checksums[range.clone()].to_vec(),
        tiers: run.tiers[range].to_vec(),
        wire,
        connection,
        lease: run.lease.clone(),
    }
}
