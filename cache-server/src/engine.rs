//! The core behind its lock, beside the memory it decides about. Guards tie the life of bytes to the core's promises:
//! while a [`ReadGuard`] or [`FillGuard`] lives, the core does not reuse the slots it names.

use crate::SLOT_ALIGN_BYTES;
use crate::config::{Config, ConfigError};
use crate::devices::{Devices, ended};
use crate::gpus;
use crate::tiers::gpu::GpuTier;
use crate::tiers::nvme::fault::Faults;
use crate::tiers::nvme::{Memory, Pages, ReadError};
use crate::tiers::{ArenaError, HostArena, SlotBytes, SlotWriter};
use bytes::Bytes;
use cairn_core::{
    CommitOutcome, Core, Effects, Ended, Event, GpuEvent, GpuSlot, LeaseId, Load, LoadId, Millis, Origin,
    Record, Refusal, Reply, ReservationId, SessionId, SlotId,
};
use cairn_proto::{BlockHash, Checksum, MissReason, SpaceId};
use cairn_transfer::store::{Brought, Hold};
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;
use thiserror::Error;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_util::task::TaskTracker;

/// Bytes at a time, in MiB, of blocks that are read past a full host tier.
const THROUGH_MIB: usize = 64;

/// Why an engine cannot start.
#[derive(Debug, Error)]
pub enum EngineError {
    /// A setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Memory.
    #[error(transparent)]
    Arena(#[from] ArenaError),
}

/// Decisions and memory of one server.
pub struct Engine {
    core: Mutex<Core>,
    arena: Arc<HostArena>,
    devices: Devices,
    gpus: Arc<GpuTier>,
    /// A block arrived from a device or a GPU, or did not.
    loaded: Notify,
    /// Background work; ends before the server does.
    tasks: TaskTracker,
    /// Room for blocks that are read for one reader, for want of host slots.
    through: Arc<Semaphore>,
    started: Instant,
    epoch: u64,
    capacity_bytes: u64,
}

impl Engine {
    /// An empty engine.
    ///
    /// # Errors
    /// When a setting cannot work or memory cannot be had.
    pub fn new(config: &Config, faults: Option<Arc<Faults>>) -> Result<Arc<Self>, EngineError> {
        let random = RandomState::new();
        let core_config = config.core([random.hash_one(1u8), random.hash_one(2u8)])?;
        let arena = HostArena::new(core_config.host_chunks, core_config.chunk_bytes)?;
        let capacity_bytes = u64::from(core_config.host_chunks) * core_config.chunk_bytes;
        let mut core = Core::new(core_config).map_err(ConfigError::from)?;
        let arena = Arc::new(arena);
        let gpus = Arc::new(GpuTier::open(config, arena.clone())?);
        if let Some(gpus) = gpus.config(config.tenant.len()) {
            core.apply(Millis(0), Event::Gpu(GpuEvent::Attach(&gpus)));
        }
        Ok(Arc::new(Self {
            core: Mutex::new(core),
            arena,
            gpus,
            devices: Devices::new(config.nvme.clone(), config.devices()?, faults),
            loaded: Notify::new(),
            tasks: TaskTracker::new(),
            through: Arc::new(Semaphore::new(THROUGH_MIB)),
            started: Instant::now(),
            epoch: random.hash_one(3u8),
            capacity_bytes,
        }))
    }

    /// Differs between any two starts.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Since the start.
    pub fn uptime_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Of the host tier.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// The host tier's memory.
    pub fn arena(&self) -> &Arc<HostArena> {
        &self.arena
    }

    /// Applies one event now.
    ///
    /// # Errors
    /// When the core refuses it.
    pub fn apply(&self, event: Event<'_>) -> Result<Reply, Refusal> {
        let (works, copies) = (gives_work(&event), gives_copies(&event));
        let Effects { reply, removed, lost, lost_gpus, stale } = {
            let mut core = self.core();
            // Read under the lock, so that time never goes backwards for the core.
            let now = Millis(self.uptime_ms());
            let effects = core.apply(now, event);
            // Before anybody else hears of a slot there.
            effects.stale.iter().for_each(|chunk| self.replace(*chunk));
            effects
        };
        if !stale.is_empty() {
            tracing::debug!(chunks = stale.len(), "memory that another tenant mapped was replaced");
        }
        for block in &removed {
            tracing::trace!(hash = ?block.hash, reason = block.reason.name(), "block removed");
        }
        lost.into_iter().for_each(|device| self.devices.lost(device));
        for gpu in lost_gpus {
            let device = self.gpus.info(gpu).ordinal;
            tracing::error!(device, "a GPU is out of service; blocks that were only there are missed");
            // Whoever waits for what comes from there gets it from elsewhere now, or hears that it is lost.
            self.gpus.gone(gpu).cancel();
            self.arrived();
        }
        if works {
            self.devices.wake();
        }
        if copies {
            self.gpus.wake.notify_one();
        }
        match reply {
            Reply::Refused(refusal) => Err(refusal),
            reply => Ok(reply),
        }
    }

    /// Another tenant could read what is written there: without other memory the server must not go on.
    fn replace(&self, chunk: u32) {
        self.gpus.forget(chunk);
        if let Err(error) = self.arena.replace(chunk) {
            tracing::error!(%error, "no memory to separate two tenants with: ending");
            std::process::abort();
        }
    }

    /// Reads from the core's counters.
    pub fn inspect<T>(&self, read: impl FnOnce(&Core) -> T) -> T {
        read(&self.core())
    }

    /// Starts to read leased blocks. Each comes with the checksum it was committed with.
    ///
    /// # Errors
    /// When the lease ended or the positions are outside it.
    pub fn read(
        self: &Arc<Self>,
        (session, lease): (SessionId, LeaseId),
        first: usize,
        count: usize,
    ) -> Result<Read, Refusal> {
        let reply = self.apply(Event::BeginRead { session, lease, first, count })?;
        let Reply::Read { space, slots } = reply else {
            return Err(Refusal::UnknownLease);
        };
        let guard = Arc::new(ReadGuard { engine: self.clone(), lease });
        let len = self.block_bytes(&space)?;
        let block = |(position, slot): (usize, &cairn_core::ReadSlot)| ReadBlock {
            position: (first + position) as u32,
            hash: slot.hash,
            checksum: slot.checksum,
            bytes: slot.slot.map(|slot| self.arena.bytes(slot, len, guard.clone())),
            gpu: slot.gpu,
        };
        let blocks = slots.iter().enumerate().map(block).collect();
        Ok(Read { space, blocks, first, block_bytes: len, guard })
    }

    /// Brings one block of a read from its device or GPU, into host memory if there is room.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub async fn bring(
        self: &Arc<Self>,
        source: &ReadSource,
        position: usize,
    ) -> Result<Brought, MissReason> {
        loop {
            // Made before the core is asked, so that no arrival is missed.
            let arrival = self.loaded.notified();
            let event = Event::Load { lease: source.guard.lease, position };
            let Ok(Reply::Load(load)) = self.apply(event) else { return Err(MissReason::LeaseLost) };
            match load {
                Load::Ready(slot) => {
                    let bytes = self.arena.bytes(slot, source.block_bytes, source.guard.clone());
                    return Ok(brought(bytes));
                }
                Load::Wait => arrival.await,
                Load::Promote { load, from, record, slot } => {
                    let guard = Arc::new(LoadGuard::new(self, load));
                    let memory = Memory::Slot(self.arena.writer(slot, record.block_bytes, guard.clone()));
                    let read = self.tasks.spawn(self.clone().promote(guard, record, from, memory));
                    // A reader that goes away leaves the move to its end: the next one finds the block in memory.
                    let read = tokio::select! {
                        read = read => read,
                        () = self.lost(&from) => continue,
                    };
                    if let Ok(Err(error)) = read
                        && is_no_room(&error)
                    {
                        return Err(MissReason::DeviceLost);
                    }
                }
                Load::Through { load, from, record } => {
                    let guard = Arc::new(LoadGuard::new(self, load));
                    let mib = through_mib(record.block_bytes);
                    let Ok(room) = self.through.clone().try_acquire_many_owned(mib) else {
                        // Not holding the block while waiting: others may have room for it.
                        guard.end(Ended::Cancelled);
                        let _ = self.through.acquire_many(mib).await;
                        continue;
                    };
                    let read = self.clone().read_through((guard, room), record, from);
                    let read = self.tasks.spawn(read);
                    let read = tokio::select! {
                        read = read => read,
                        () = self.lost(&from) => continue,
                    };
                    match read {
                        Ok(Ok(bytes)) => return Ok(Brought { bytes, location: None }),
                        // A device may have it, too: the copy on the GPU is out of the way.
                        Ok(Err(error)) if matches!(from, Origin::Gpu(_)) && !is_no_room(&error) => {}
                        Ok(Err(ReadError::Corrupt)) => return Err(MissReason::Quarantined),
                        _ => return Err(MissReason::DeviceLost),
                    }
                }
                Load::Lost(reason) => return Err(reason),
            }
        }
    }

    /// What went wrong was told to the core already, and logged.
    async fn promote(
        self: Arc<Self>,
        guard: Arc<LoadGuard>,
        record: Record,
        from: Origin,
        memory: Memory,
    ) -> Result<(), ReadError> {
        self.read_source(&guard, &record, from, memory).await.map(drop)
    }

    async fn read_source(
        self: &Arc<Self>,
        guard: &Arc<LoadGuard>,
        record: &Record,
        from: Origin,
        memory: Memory,
    ) -> Result<Memory, ReadError> {
        let from = match from {
            Origin::Gpu(from) => return gpus::read(self, guard, (record, from), memory).await,
            Origin::Disk(from) => from,
        };
        let read = self.devices.read(record, from, memory).await;
        guard.end(ended(&read, record));
        read
    }

    async fn read_through(
        self: Arc<Self>,
        (guard, room): (Arc<LoadGuard>, OwnedSemaphorePermit),
        record: Record,
        from: Origin,
    ) -> Result<Bytes, ReadError> {
        let memory = Memory::Pages(Pages::for_bytes(record.block_bytes));
        match self.read_source(&guard, &record, from, memory).await? {
            Memory::Pages(pages) => {
                let owned = OwnBlock { pages, _room: room };
                Ok(Bytes::from_owner(owned).slice(..record.block_bytes as usize))
            }
            _ => Err(ReadError::Corrupt),
        }
    }

    /// Waits for a share of the memory for blocks that have no place in the host tier.
    pub(crate) async fn room_through(&self, block_bytes: u64) -> Option<OwnedSemaphorePermit> {
        self.through.clone().acquire_many_owned(through_mib(block_bytes)).await.ok()
    }

    /// The bytes of a slot that a move holds in place until it ends.
    pub(crate) fn moving_bytes(&self, slot: SlotId, block_bytes: u64) -> SlotBytes {
        self.arena.bytes(slot, block_bytes, Arc::new(()))
    }

    /// The directories of the NVMe tier.
    pub(crate) fn devices(&self) -> &Devices {
        &self.devices
    }

    /// The tier in the memory of GPUs.
    pub(crate) fn gpus(&self) -> &Arc<GpuTier> {
        &self.gpus
    }

    /// Waits until what comes from there may never come.
    async fn lost(&self, from: &Origin) {
        match from {
            Origin::Gpu(slot) => self.gpus.gone(slot.gpu).cancelled().await,
            Origin::Disk(_) => std::future::pending().await,
        }
    }

    /// A block arrived from a device or a GPU, or did not: whoever waits for it looks again.
    pub(crate) fn arrived(&self) {
        self.loaded.notify_waiters();
    }

    /// Background work.
    pub(crate) fn tasks(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Starts to fill a reservation.
    ///
    /// # Errors
    /// When the reservation ended or is being filled already.
    pub fn fill(self: &Arc<Self>, session: SessionId, reservation: ReservationId) -> Result<Fill, Refusal> {
        let reply = self.apply(Event::BeginFill { session, reservation })?;
        let Reply::Fill { space, slots } = reply else {
            return Err(Refusal::UnknownReservation);
        };
        let guard = Arc::new(FillGuard { engine: self.clone(), reservation });
        let len = self.block_bytes(&space)?;
        let block = |slot: &cairn_core::FillSlot| FillBlock {
            block: slot.block,
            hash: slot.hash,
            writer: self.arena.writer(slot.slot, len, guard.clone()),
            guard: guard.clone(),
        };
        Ok(Fill { space, blocks: slots.iter().map(block).collect(), hold: guard.clone() })
    }

    fn block_bytes(&self, space: &SpaceId) -> Result<u64, Refusal> {
        let (block_bytes, slot_bytes) = self.core().block_bytes(space).ok_or(Refusal::UnknownSpace)?;
        debug_assert_eq!(slot_bytes, block_bytes.next_multiple_of(SLOT_ALIGN_BYTES));
        Ok(block_bytes)
    }

    /// A panic inside the core is a defect in it, and its state could be anything: serving on would risk wrong bytes. The
    /// process ends at once, so that whoever watches it starts a new one.
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(|_| {
            tracing::error!("the core panicked: this is a defect in Cairn; ending");
            std::process::abort()
        })
    }
}

fn through_mib(block_bytes: u64) -> u32 {
    (block_bytes.div_ceil(1 << 20) as usize).min(THROUGH_MIB) as u32
}

/// Nothing is wrong with the block, nor with where it is: to try again at once would fail again.
fn is_no_room(error: &ReadError) -> bool {
    matches!(error, ReadError::Io(error) if error.kind() == std::io::ErrorKind::OutOfMemory)
}

/// A block as it lies in host memory.
pub(crate) fn brought(bytes: SlotBytes) -> Brought {
    let location = bytes.location();
    Brought { bytes: Bytes::from_owner(bytes), location }
}

/// Leased blocks, held in place.
pub struct Read {
    /// Of all of them.
    pub space: SpaceId,
    /// In run order.
    pub blocks: Vec<ReadBlock>,
    /// Position of the first in the run.
    pub first: usize,
    block_bytes: u64,
    guard: Arc<ReadGuard>,
}

impl Read {
    /// What [`Engine::bring`] needs.
    pub fn source(&self) -> ReadSource {
        ReadSource { block_bytes: self.block_bytes, guard: self.guard.clone() }
    }

    /// Of each block.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Keeps the blocks in place.
    pub fn hold(&self) -> Hold {
        self.guard.clone()
    }
}

/// A read in progress.
#[derive(Clone)]
pub struct ReadSource {
    block_bytes: u64,
    guard: Arc<ReadGuard>,
}

impl ReadSource {
    /// Of each block.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }
}

/// A block in memory of its own.
struct OwnBlock {
    pages: Pages,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for OwnBlock {
    fn as_ref(&self) -> &[u8] {
        self.pages.as_ref()
    }
}

/// A load that ends whatever happens.
pub(crate) struct LoadGuard {
    engine: Arc<Engine>,
    load: LoadId,
    ended: AtomicBool,
}

impl LoadGuard {
    pub(crate) fn new(engine: &Arc<Engine>, load: LoadId) -> Self {
        Self { engine: engine.clone(), load, ended: AtomicBool::new(false) }
    }

    pub(crate) fn end(&self, ended: Ended) {
        if !self.ended.swap(true, Ordering::AcqRel) {
            // Never refused.
            let _ = self.engine.apply(Event::EndLoad { load: self.load, ended });
            self.engine.arrived();
        }
    }
}

impl Drop for LoadGuard {
    fn drop(&mut self) {
        self.end(Ended::Cancelled);
    }
}

/// Events after which devices may have something to do.
fn gives_work(event: &Event<'_>) -> bool {
    matches!(
        event,
        Event::EndFill(_)
            | Event::Lookup { .. }
            | Event::Quarantine { .. }
            | Event::Flush(_)
            | Event::EndLoad { .. }
    )
}

/// Events after which there may be copies to make to or from GPUs.
fn gives_copies(event: &Event<'_>) -> bool {
    matches!(
        event,
        Event::Gpu(GpuEvent::Want { .. } | GpuEvent::EndCopy { .. })
            | Event::EndLoad { .. }
            | Event::EndRead(_)
    )
}

/// One block to read.
pub struct ReadBlock {
    /// In the run.
    pub position: u32,
    /// Its name.
    pub hash: BlockHash,
    /// What its bytes must add up to.
    pub checksum: Checksum,
    /// Its bytes; `None` when they must be brought from a device or a GPU.
    pub bytes: Option<SlotBytes>,
    /// Where it is on a GPU, held in place like the rest.
    pub gpu: Option<GpuSlot>,
}

/// A reservation being filled. Dropping it gives up what was not committed.
pub struct Fill {
    /// Of all blocks.
    pub space: SpaceId,
    /// The granted blocks.
    pub blocks: Vec<FillBlock>,
    /// The fill goes on while any block is missing, even if the others are done.
    pub hold: Hold,
}

/// One block to fill.
pub struct FillBlock {
    /// Position in the reservation.
    pub block: usize,
    /// Its name.
    pub hash: BlockHash,
    /// The right to write it.
    pub writer: SlotWriter,
    guard: Arc<FillGuard>,
}

impl FillBlock {
    /// Ends the writing and makes the block visible. The checksum must be that of the bytes written.
    pub fn commit(self, checksum: Checksum) -> CommitOutcome {
        let Self { block, writer, guard, .. } = self;
        drop(writer);
        match guard.engine.apply(Event::Commit { reservation: guard.reservation, block, checksum }) {
            Ok(Reply::Committed(outcome)) => outcome,
            _ => CommitOutcome::NotReserved,
        }
    }
}

/// While it lives, the slots of a read keep their bytes.
pub struct ReadGuard {
    engine: Arc<Engine>,
    lease: LeaseId,
}

impl Drop for ReadGuard {
    fn drop(&mut self) {
        // EndRead has no answer and cannot be refused.
        let _ = self.engine.apply(Event::EndRead(self.lease));
    }
}

/// While it lives, the slots of a fill belong to it.
pub struct FillGuard {
    engine: Arc<Engine>,
    reservation: ReservationId,
}

impl Drop for FillGuard {
    fn drop(&mut self) {
        // EndFill has no answer and cannot be refused.
        let _ = self.engine.apply(Event::EndFill(self.reservation));
    }
}
