//! The tier in the memory of GPUs: chunks of device memory, and the copies between them and host memory. Which block is where is the core's
//! business; a copy may fail, it never decides anew. Copies go straight between a GPU and the host arena, whose chunks are registered with
//! the driver when the first copy needs them.
//!
//! Workers open chunks over CUDA IPC, which cannot keep them from writing there: so a chunk stays with its first tenant for good (the
//! core sees to it), and whoever reads a block on a GPU verifies the bytes that it copied for itself.

use super::host::HostArena;
use super::nvme::{Memory, ReadError};
use crate::config::{Config, ConfigError};
use cairn_core::{GpuId, GpuSlot, GpuTierConfig, Record, SlotId};
use cairn_gpu::backend::cuda::{
    CudaDevice, CudaInfo, CudaMemory, CudaShared, CudaStream, IpcHandle, KernelFolders, probe,
};
use cairn_gpu::{Buffer, Copy, Device, DeviceError, Event, Priority, Region, Stream};
use cairn_proto::{BlockHash, Checksum, SpaceId};
use cairn_transfer::store::{GpuChunk, GpuUuid, Location};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// The number of a chunk, as clients see it, has the GPU above this many bits.
const CHUNK_BITS: u32 = 24;

/// Host memory that the driver would not pin is tried again after this long.
const REGISTER_AGAIN: Duration = Duration::from_secs(60);

/// One GPU in service.
struct Gpu {
    device: CudaDevice,
    /// To the GPU, and from it: the two directions of a bus do not wait for each other.
    up: CudaStream,
    down: CudaStream,
    chunks: Vec<Chunk>,
}

/// What the driver said to a chunk of host memory.
enum Registration {
    Pinned(CudaShared),
    Refused(Instant),
}

struct Chunk {
    memory: CudaMemory,
    /// For other processes; none where the driver does not share.
    handle: Option<IpcHandle>,
}

/// What the bytes of a block must be.
pub(crate) struct Promised {
    pub(crate) space: SpaceId,
    pub(crate) hash: BlockHash,
    pub(crate) checksum: Checksum,
    pub(crate) bytes: u64,
}

impl From<&Record> for Promised {
    fn from(record: &Record) -> Self {
        let Record { space, hash, checksum, block_bytes: bytes, .. } = *record;
        Self { space, hash, checksum, bytes }
    }
}

/// All GPUs of a server; without any there is no such tier.
pub(crate) struct GpuTier {
    gpus: Vec<Gpu>,
    arena: Arc<HostArena>,
    chunk_bytes: u64,
    policy: String,
    max_in_flight_bytes: u64,
    /// Chunks of host memory that the driver knows. Held only to look and to set: the core's lock may be held beside it.
    registered: Mutex<HashMap<u32, Registration>>,
    /// Held while the driver pins one, which can take long.
    registering: Mutex<()>,
    /// By GPU: it is out of service.
    gone: Vec<CancellationToken>,
    /// Something may be to do.
    pub(crate) wake: Notify,
    pub(crate) stop: CancellationToken,
}

impl GpuTier {
    /// Takes the memory. A GPU that cannot be used is no reason to serve nothing: what is wrong is logged, and the tier does without it.
    ///
    /// # Errors
    /// When a setting cannot work.
    pub(crate) fn open(config: &Config, arena: Arc<HostArena>) -> Result<Self, ConfigError> {
        let chunks = config.gpu_chunks()?;
        let mut tier = Self {
            gpus: Vec::new(),
            chunk_bytes: config.host.chunk_mib << 20,
            arena,
            policy: config.gpu.policy.clone(),
            max_in_flight_bytes: config.gpu.in_flight_mib << 20,
            registered: Mutex::default(),
            registering: Mutex::default(),
            gone: Vec::new(),
            wake: Notify::new(),
            stop: CancellationToken::new(),
        };
        if chunks == 0 {
            return Ok(tier);
        }
        let found = match probe() {
            Ok(found) => found,
            Err(absence) => {
                tracing::error!(%absence, "gpu.capacity_mib is set, but there is no GPU tier");
                return Ok(tier);
            }
        };
        let all: Vec<usize> = found.iter().map(|info| info.ordinal).collect();
        let wanted = if config.gpu.devices.is_empty() { &all } else { &config.gpu.devices };
        for ordinal in wanted {
            match Gpu::open(*ordinal, chunks, tier.chunk_bytes) {
                Ok(gpu) => {
                    let mib = config.gpu.capacity_mib;
                    tracing::info!(device = gpu.device.name(), mib, shared = gpu.is_shared(), "GPU tier");
                    tier.gpus.push(gpu);
                    tier.gone.push(CancellationToken::new());
                }
                Err(error @ DeviceError::OutOfMemory { .. }) => {
                    tracing::error!(device = ordinal, %error, "a GPU is not in service: lower gpu.capacity_mib, or leave it out of gpu.devices");
                }
                Err(error) => {
                    tracing::error!(device = ordinal, %error, "a GPU is not in service; gpu.devices says which are wanted");
                }
            }
        }
        Ok(tier)
    }

    /// What the core should know; none where there is no GPU.
    pub(crate) fn config(&self, tenants: usize) -> Option<GpuTierConfig> {
        let chunks = self.gpus.first()?.chunks.len();
        let all = chunks * self.gpus.len();
        Some(GpuTierConfig {
            gpus: self.gpus.len() as u32,
            chunks_per_gpu: chunks as u32,
            // A chunk is its first tenant's for good: those who come first leave the others their share.
            max_chunks_per_tenant: all.div_ceil(tenants.max(1)),
            policy: self.policy.parse().unwrap_or_default(),
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.gpus.is_empty()
    }

    pub(crate) fn policy(&self) -> &str {
        &self.policy
    }

    pub(crate) fn max_in_flight_bytes(&self) -> u64 {
        self.max_in_flight_bytes
    }

    pub(crate) fn info(&self, gpu: GpuId) -> &CudaInfo {
        self.gpus[gpu.0 as usize].device.info()
    }

    /// When that is cancelled, the GPU is out of service, and its copies may never end.
    pub(crate) fn gone(&self, gpu: GpuId) -> &CancellationToken {
        &self.gone[gpu.0 as usize]
    }

    /// Whether workers can open a GPU's memory.
    pub(crate) fn is_shared(&self, gpu: GpuId) -> bool {
        self.gpus[gpu.0 as usize].is_shared()
    }

    /// Whether somebody who reaches these GPUs could read in this tier.
    pub(crate) fn reaches(&self, gpus: &[GpuUuid]) -> bool {
        self.gpus.iter().any(|gpu| gpu.is_shared() && gpus.contains(&gpu.device.info().uuid))
    }

    /// Where clients that open chunks find a slot, if they can reach its GPU: they are on one of these.
    pub(crate) fn location(&self, slot: GpuSlot, reachable: &[GpuUuid]) -> Option<Location> {
        let gpu = self.gpus.get(slot.gpu.0 as usize)?;
        let shared = gpu.chunks.get(slot.chunk as usize)?.handle.is_some();
        let named = slot.chunk < 1 << CHUNK_BITS
            && slot.index < 1 << Location::INDEX_BITS
            && slot.gpu.0 < u32::from(u16::MAX);
        let number = u64::from(slot.gpu.0 + 1) << CHUNK_BITS | u64::from(slot.chunk);
        (shared && named && reachable.contains(&gpu.device.info().uuid))
            .then(|| Location::new(number, slot.index))
    }

    /// The chunk that a client means.
    pub(crate) fn find(&self, number: u64) -> Option<(GpuId, u32)> {
        let gpu = u32::try_from(number >> CHUNK_BITS).ok()?.checked_sub(1)?;
        let chunk = (number & ((1 << CHUNK_BITS) - 1)) as u32;
        let known = self.gpus.get(gpu as usize).is_some_and(|gpu| (chunk as usize) < gpu.chunks.len());
        known.then_some((GpuId(gpu), chunk))
    }

    /// Whether a GPU does not answer any more. Blocks the thread, for ever if its driver does.
    pub(crate) fn is_gone(&self, gpu: GpuId) -> bool {
        let gpu = &self.gpus[gpu.0 as usize];
        matches!(gpu.device.memory(), Err(DeviceError::Lost(_)))
    }

    /// For another process.
    pub(crate) fn share(&self, (gpu, chunk): (GpuId, u32)) -> Option<GpuChunk> {
        let gpu = self.gpus.get(gpu.0 as usize)?;
        let handle = gpu.chunks.get(chunk as usize)?.handle?;
        Some(GpuChunk { handle: handle.0, bytes: self.chunk_bytes, gpu: gpu.device.info().uuid })
    }

    /// Host memory of a chunk is about to become other memory. Nothing copies from or to it any more; the driver may take its time to let go of
    /// the old pages, and may not take the new ones until it has.
    pub(crate) fn forget(&self, chunk: u32) {
        if let Some(Registration::Pinned(memory)) = self.registered().remove(&chunk) {
            // Without a thread it takes its time here.
            let letting_go = std::thread::Builder::new().name("cairn-gpu-unpin".into());
            let _ = letting_go.spawn(move || drop(memory));
        }
    }

    fn registered(&self) -> std::sync::MutexGuard<'_, HashMap<u32, Registration>> {
        self.registered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A host slot as copies name it; none where the driver does not take its memory. May block the thread for as long as pinning a chunk
    /// takes.
    fn host(&self, gpu: &Gpu, slot: SlotId, bytes: u64) -> Result<Option<Region<CudaDevice>>, DeviceError> {
        // What is known of a chunk: its memory, or that there is none at present.
        let known = || match self.registered().get(&slot.chunk) {
            Some(Registration::Pinned(memory)) => Some(Some(memory.clone())),
            Some(Registration::Refused(at)) if at.elapsed() < REGISTER_AGAIN => Some(None),
            _ => None,
        };
        let memory = match known() {
            Some(memory) => memory,
            None => match self.registering.try_lock() {
                // Another chunk is being pinned, which may take for ever: this one is for later.
                Err(TryLockError::WouldBlock) => None,
                _one_at_a_time => match known() {
                    Some(memory) => memory,
                    None => self.register(gpu, slot.chunk)?,
                },
            },
        };
        let offset = self.arena.range(slot, bytes);
        Ok(memory.map(|memory| Region { buffer: Buffer::Pinned(memory), offset, bytes: bytes as usize }))
    }

    fn register(&self, gpu: &Gpu, chunk: u32) -> Result<Option<CudaShared>, DeviceError> {
        match gpu.device.register(self.arena.map(chunk), true) {
            Ok(memory) => {
                self.registered().insert(chunk, Registration::Pinned(memory.clone()));
                Ok(Some(memory))
            }
            Err(error @ DeviceError::Lost(_)) => Err(error),
            Err(error) => {
                tracing::warn!(%error, chunk, "a chunk of host memory cannot be registered with the driver; its blocks are copied once more");
                self.registered().insert(chunk, Registration::Refused(Instant::now()));
                Ok(None)
            }
        }
    }

    /// A host slot that is only read, or a copy of it.
    fn source(&self, gpu: &Gpu, slot: SlotId, bytes: u64) -> Result<Region<CudaDevice>, DeviceError> {
        if let Some(region) = self.host(gpu, slot, bytes)? {
            return Ok(region);
        }
        let mut lent = gpu.device.lend_pinned(bytes as usize)?;
        // The copy that this is for keeps the slot as it is.
        lent.as_mut().copy_from_slice(self.arena.bytes(slot, bytes, Arc::new(())).as_ref());
        Ok(Region { buffer: Buffer::Pinned(gpu.device.share(lent)), offset: 0, bytes: bytes as usize })
    }

    fn on_gpu(&self, slot: GpuSlot, bytes: u64) -> Result<(&Gpu, Region<CudaDevice>), CopyError> {
        let gone = || CopyError::Lost(DeviceError::Lost(format!("there is no GPU {}", slot.gpu.0)));
        let gpu = self.gpus.get(slot.gpu.0 as usize).ok_or_else(gone)?;
        let memory = gpu.chunks.get(slot.chunk as usize).ok_or_else(gone)?.memory.clone();
        let offset = slot.index as usize * bytes.next_multiple_of(crate::SLOT_ALIGN_BYTES) as usize;
        Ok((gpu, Region { buffer: Buffer::Device(memory), offset, bytes: bytes as usize }))
    }

    /// Copies blocks from host memory to one GPU.
    ///
    /// # Errors
    /// When they are not there; whatever was begun has ended.
    pub(crate) async fn promote(
        self: &Arc<Self>,
        gpu: GpuId,
        copies: Vec<(SlotId, GpuSlot, u64)>,
    ) -> Result<(), CopyError> {
        let tier = self.clone();
        let issue = move || {
            let mut all = Vec::with_capacity(copies.len());
            for (from, to, bytes) in copies {
                let (gpu, target) = tier.on_gpu(to, bytes)?;
                let source = tier.source(gpu, from, bytes).map_err(CopyError::not_started)?;
                all.push(Copy { source, target });
            }
            let gone = || CopyError::Lost(DeviceError::Lost("there is no such GPU".into()));
            issue(&tier.gpus.get(gpu.0 as usize).ok_or_else(gone)?.up, all)
        };
        blocking(issue).await?.await.map_err(CopyError::after)
    }

    /// Brings a block from a GPU into host memory, verified.
    pub(crate) async fn read(
        self: &Arc<Self>,
        block: &Promised,
        from: GpuSlot,
        memory: Memory,
    ) -> Result<Memory, ReadError> {
        let (tier, bytes) = (self.clone(), block.bytes);
        let issue = move || {
            let (gpu, source) = tier.on_gpu(from, bytes)?;
            let straight = match &memory {
                Memory::Slot(writer) => {
                    tier.host(gpu, writer.slot(), bytes).map_err(CopyError::not_started)?
                }
                _ => None,
            };
            let (target, lent) = match straight {
                Some(target) => (target, None),
                None => {
                    let lent = gpu.device.lend_pinned(bytes as usize).map(|lent| gpu.device.share(lent));
                    let lent = lent.map_err(CopyError::not_started)?;
                    let buffer = Buffer::Pinned(lent.clone());
                    (Region { buffer, offset: 0, bytes: bytes as usize }, Some(lent))
                }
            };
            Ok((issue(&gpu.down, vec![Copy { source, target }])?, lent, memory))
        };
        let (event, lent, mut memory) = blocking(issue).await.map_err(read_error)?;
        event.await.map_err(|error| read_error(CopyError::after(error)))?;
        if let Some(lent) = lent {
            let lent = back(&self.gpus[from.gpu.0 as usize], lent).await;
            match &mut memory {
                Memory::Slot(writer) => writer.as_mut().copy_from_slice(lent.as_ref()),
                Memory::Pages(pages) => pages.as_mut()[..bytes as usize].copy_from_slice(lent.as_ref()),
                Memory::Block(_) => {}
            }
        }
        let Promised { space, hash, checksum, .. } = *block;
        let verified = tokio::task::spawn_blocking(move || {
            let right = Checksum::of(&space, &hash, &memory.bytes()[..bytes as usize]) == checksum;
            (memory, right)
        });
        match verified.await {
            Ok((memory, true)) => Ok(memory),
            Ok((_, false)) => Err(ReadError::Corrupt),
            Err(error) => Err(read_error(CopyError::NotStarted(DeviceError::Failed(error.to_string())))),
        }
    }
}

/// Why blocks were not copied.
pub(crate) enum CopyError {
    /// Nothing was begun, for want of something beside the GPU.
    NotStarted(DeviceError),
    /// The GPU did not do it.
    Failed(DeviceError),
    /// The GPU is gone.
    Lost(DeviceError),
}

impl CopyError {
    fn not_started(error: DeviceError) -> Self {
        if matches!(error, DeviceError::Lost(_)) { Self::Lost(error) } else { Self::NotStarted(error) }
    }

    fn after(error: DeviceError) -> Self {
        if matches!(error, DeviceError::Lost(_)) { Self::Lost(error) } else { Self::Failed(error) }
    }
}

impl std::fmt::Display for CopyError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (Self::NotStarted(error) | Self::Failed(error) | Self::Lost(error)) = self;
        error.fmt(f)
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, CopyError> + Send + 'static,
) -> Result<T, CopyError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(CopyError::NotStarted(DeviceError::Failed(error.to_string()))))
}

/// Issues copies; if that fails, what was begun all the same has ended when this returns: nobody may use the slots before.
fn issue(stream: &CudaStream, copies: Vec<Copy<CudaDevice>>) -> Result<Event, CopyError> {
    let issued = stream.copy(copies).and_then(|()| stream.record());
    issued.map_err(|error| match stream.synchronize() {
        Ok(()) => CopyError::after(error),
        // What cannot be waited for may still be going on; on a lost device nothing is.
        Err(error) => CopyError::Lost(error),
    })
}

/// How long the last handle of a copy's memory may lag behind its event.
const LETTING_GO: Duration = Duration::from_millis(1);

async fn back(gpu: &Gpu, mut lent: CudaShared) -> <CudaDevice as Device>::PinnedBuffer {
    loop {
        match gpu.device.reclaim(lent) {
            Ok(lent) => return lent,
            Err(still) => lent = still,
        }
        tokio::time::sleep(LETTING_GO).await;
    }
}

/// What it was is told by the kind.
fn read_error(error: CopyError) -> ReadError {
    let kind = match &error {
        CopyError::NotStarted(_) => std::io::ErrorKind::OutOfMemory,
        CopyError::Failed(_) => std::io::ErrorKind::Other,
        CopyError::Lost(_) => std::io::ErrorKind::NotConnected,
    };
    ReadError::Io(std::io::Error::new(kind, error.to_string()))
}

impl Gpu {
    fn open(ordinal: usize, chunks: u32, chunk_bytes: u64) -> Result<Self, DeviceError> {
        let device = CudaDevice::open(ordinal, KernelFolders::default())?;
        let chunk = |_| {
            let memory = device.allocate(chunk_bytes as usize)?;
            let handle = memory.share();
            let handle = handle
                .inspect_err(|error| tracing::warn!(%error, "device memory cannot be shared with workers"));
            Ok(Chunk { memory, handle: handle.ok() })
        };
        let chunks = (0..chunks).map(chunk).collect::<Result<_, DeviceError>>()?;
        let (up, down) = (device.stream(Priority::Background)?, device.stream(Priority::Background)?);
        Ok(Self { up, down, chunks, device })
    }

    /// Whether workers can open its memory.
    fn is_shared(&self) -> bool {
        self.chunks.iter().all(|chunk| chunk.handle.is_some())
    }
}
