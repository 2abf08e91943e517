//! Blocks that are copied to this device as they are and verified on it: those that the cache server has in the memory of a GPU that is
//! reached from here, and those in its host memory, for which no CPU reads a byte then. Other processes of the tenant can write to the memory of
//! GPUs, so what counts is the checksum of the copy.

use super::lock;
use super::registered::Registered;
use cairn_client::{GpuChunk, GpuUuid, View};
use cairn_gpu::backend::cuda::{Checksums, CudaDevice, CudaMemory, CudaStream, IpcHandle, probe};
use cairn_gpu::{Buffer, Copy, Device, DeviceError, Priority, Region, Stream};
use cairn_proto::Checksum;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes of all copies at a time, and of memory for them that is kept from one load to the next: this part of the device's, but no less than
/// [`LEAST_BYTES`]. What does not fit comes by way of host memory.
const PART: usize = 64;
const LEAST_BYTES: usize = 1 << 30;

/// Room is counted in these.
const ROOM_UNIT: usize = 1 << 12;

/// After a GPU's memory could not be opened it is tried again after this long.
const TRY_AGAIN: Duration = Duration::from_secs(60);

/// How often chunks that no connection names any more are closed: the memory of a server that is gone is free only then.
const CLOSE_EVERY: Duration = Duration::from_secs(2);

/// The way to GPUs' memory. Clones share it.
#[derive(Clone)]
pub(crate) struct Near(Arc<Inner>);

/// Open chunks by handle; each with the chunk as its connection knows it, because another server may come to an equal handle.
type Opened = HashMap<[u8; 64], (Weak<GpuChunk>, CudaMemory)>;

struct Inner {
    device: CudaDevice,
    /// This one's, and those that it reaches directly.
    gpus: Vec<GpuUuid>,
    /// The server's host memory.
    registered: Arc<Registered>,
    stream: CudaStream,
    checksums: Checksums,
    opened: Mutex<Opened>,
    most_bytes: usize,
    room: Arc<Semaphore>,
    kept: Mutex<Vec<CudaMemory>>,
    /// GPUs whose memory could not be opened, and when.
    failed: Mutex<HashMap<GpuUuid, Instant>>,
}

/// Room for the copies of one load.
pub(crate) struct NearRoom {
    near: Near,
    blocks: usize,
    permit: Option<OwnedSemaphorePermit>,
}

/// Where a copy begins in the memory, and where it came from.
#[derive(Clone, Copy)]
struct Place {
    at: usize,
    from_gpu: bool,
}

/// Where a block is before it is copied.
struct Source {
    index: usize,
    memory: Buffer<CudaDevice>,
    offset: usize,
    from_gpu: bool,
}

/// Verified copies of blocks of a view.
pub(crate) struct NearBlocks {
    near: Near,
    room: Option<OwnedSemaphorePermit>,
    memory: Option<CudaMemory>,
    /// Where each block of the view begins in the memory, if it is there and right.
    places: Vec<Option<Place>>,
}

impl NearBlocks {
    /// Where a block is.
    pub(crate) fn place(&self, index: usize) -> Option<(CudaMemory, usize)> {
        let place = (*self.places.get(index)?)?;
        Some((self.memory.clone()?, place.at))
    }

    /// How many there are of the first so many blocks, and how many of these came from the memory of a GPU.
    pub(crate) fn count(&self, blocks: usize) -> (usize, usize) {
        let places = || self.places.iter().take(blocks).flatten();
        (places().count(), places().filter(|place| place.from_gpu).count())
    }
}

impl Drop for NearBlocks {
    fn drop(&mut self) {
        let mut kept = lock(&self.near.0.kept);
        let bytes: usize = kept.iter().map(CudaMemory::len).sum();
        if bytes + self.memory.as_ref().map_or(0, CudaMemory::len) <= self.near.0.most_bytes {
            kept.extend(self.memory.take());
        }
        // What does not fit is freed without the lock: the driver may wait for the device.
    }
}

impl Near {
    /// # Errors
    /// When the device has no stream or no kernels for it.
    pub(super) fn new(device: &CudaDevice, registered: Arc<Registered>) -> Result<Self, DeviceError> {
        let info = device.info();
        let most_bytes = (info.memory_bytes / PART).max(LEAST_BYTES);
        let all = probe().unwrap_or_default();
        let peers = all.iter().filter(|other| info.peers.contains(&other.ordinal)).map(|other| other.uuid);
        let inner = Arc::new(Inner {
            device: device.clone(),
            gpus: std::iter::once(info.uuid).chain(peers).collect(),
            registered,
            stream: device.stream(Priority::Foreground)?,
            checksums: Checksums::load(device)?,
            opened: Mutex::default(),
            most_bytes,
            room: Arc::new(Semaphore::new(most_bytes / ROOM_UNIT)),
            kept: Mutex::default(),
            failed: Mutex::default(),
        });
        let weak = Arc::downgrade(&inner);
        let closing = std::thread::Builder::new().name("cairn-gpu-close".into());
        closing
            .spawn(move || close_unnamed(&weak))
            .map_err(|error| DeviceError::Failed(format!("cannot start a thread: {error}")))?;
        Ok(Self(inner))
    }

    /// Room for copies of as many of so many blocks as there is room for at present: asked for before the server is asked where they are,
    /// because what is not copied from a GPU would have to be asked for anew.
    pub(crate) fn room(&self, blocks: usize, block_bytes: usize) -> NearRoom {
        let free = self.0.room.available_permits() * ROOM_UNIT;
        let fit = blocks.min(free / block_bytes.max(1));
        let permit = self.0.room.clone().try_acquire_many_owned(units(fit * block_bytes)).ok();
        NearRoom { near: self.clone(), blocks: if permit.is_some() { fit } else { 0 }, permit }
    }
}

impl NearRoom {
    /// GPUs whose memory can be opened here, as far as is known.
    pub(crate) fn gpus(&self) -> Vec<GpuUuid> {
        self.near.gpus()
    }

    /// How many blocks there is room for.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Copies the blocks of a view that are on GPUs, and where `host` says so as many of those in host memory as there is room for, and verifies
    /// the copies; the view knows which are right. Blocks the thread.
    ///
    /// # Errors
    /// When the memory cannot be opened or copied: the blocks have to come another way.
    pub(crate) fn copy(self, view: &View, block_bytes: usize, host: bool) -> Result<NearBlocks, DeviceError> {
        let Self { near, blocks: room, permit } = self;
        let places = vec![None; view.len()];
        let host = host && Checksums::can_be_made(block_bytes);
        let mut sources = Vec::new();
        for index in 0..view.len() {
            // Also what is not copied here: so the engine's thread finds it registered.
            let source = near.source(view, index)?;
            sources.extend(source.filter(|source| index < room && (host || source.from_gpu)));
        }
        let mut blocks = NearBlocks { near: near.clone(), room: permit, memory: None, places };
        let mut filled = near.fill(&mut blocks, view, block_bytes, &sources);
        if let Err(DeviceError::OutOfMemory { bytes }) = filled
            && sources.iter().any(|source| !source.from_gpu)
        {
            tracing::warn!(bytes, "no memory on the device to verify blocks there; the CPU does");
            sources.retain(|source| source.from_gpu);
            filled = near.fill(&mut blocks, view, block_bytes, &sources);
        }
        filled.map(|()| blocks)
    }
}

impl Near {
    /// GPUs whose memory can be opened here, as far as is known.
    fn gpus(&self) -> Vec<GpuUuid> {
        let failed = lock(&self.0.failed);
        let usable = |gpu: &&GpuUuid| failed.get(*gpu).is_none_or(|at| at.elapsed() > TRY_AGAIN);
        self.0.gpus.iter().filter(usable).copied().collect()
    }

    /// Where a block can be copied from, if anywhere.
    fn source(&self, view: &View, index: usize) -> Result<Option<Source>, DeviceError> {
        if let Some((chunk, offset)) = view.on_gpu(index) {
            let memory = Buffer::Device(self.open(chunk)?);
            return Ok(Some(Source { index, memory, offset: offset as usize, from_gpu: true }));
        }
        let Some((map, offset)) = view.mapping(index) else { return Ok(None) };
        let memory = self.0.registered.memory(&map, offset).map(Buffer::Pinned);
        Ok(memory.map(|memory| Source { index, memory, offset: offset as usize, from_gpu: false }))
    }

    fn fill(
        &self,
        blocks: &mut NearBlocks,
        view: &View,
        block_bytes: usize,
        sources: &[Source],
    ) -> Result<(), DeviceError> {
        let bytes = sources.len() * block_bytes;
        // The rest is for others.
        blocks.room = blocks.room.take().and_then(|mut room| room.split(units(bytes) as usize));
        if sources.is_empty() {
            return Ok(());
        }
        let memory = self.memory(bytes)?;
        let mut copies = Vec::with_capacity(sources.len());
        let mut seeds = Vec::with_capacity(sources.len());
        for (i, source) in sources.iter().enumerate() {
            let region = |buffer, offset| Region { buffer, offset, bytes: block_bytes };
            copies.push(Copy {
                source: region(source.memory.clone(), source.offset),
                target: region(Buffer::Device(memory.clone()), i * block_bytes),
            });
            seeds.push((i * block_bytes, view.seed(source.index)));
        }
        let copied = self.0.stream.copy(copies);
        let sums = copied.and_then(|()| self.0.checksums.of(&self.0.stream, &memory, block_bytes, &seeds));
        if sums.is_err() {
            // What was issued may still read blocks that are let go as soon as this returns, and keeps the memory.
            self.0.stream.synchronize().ok();
        }
        let sums = sums?;
        for (i, (source, sum)) in sources.iter().zip(sums).enumerate() {
            let right = view.accept(source.index, Checksum(sum)).is_ok();
            let place = Place { at: i * block_bytes, from_gpu: source.from_gpu };
            blocks.places[source.index] = right.then_some(place);
        }
        blocks.memory = Some(memory);
        Ok(())
    }

    fn memory(&self, bytes: usize) -> Result<CudaMemory, DeviceError> {
        let in_the_way = {
            let mut kept = lock(&self.0.kept);
            // Not the largest for the smallest: what is taken counts for no more than what is asked for.
            if let Some(fits) = kept.iter().position(|memory| (bytes..=2 * bytes).contains(&memory.len())) {
                return Ok(kept.swap_remove(fits));
            }
            let all: usize = kept.iter().map(CudaMemory::len).sum();
            if all + bytes > self.0.most_bytes { std::mem::take(&mut *kept) } else { Vec::new() }
        };
        // Without the lock, because the driver may wait for the device before it frees anything.
        drop(in_the_way);
        match self.0.device.allocate(bytes) {
            Err(DeviceError::OutOfMemory { .. }) if self.let_go() => self.0.device.allocate(bytes),
            allocated => allocated,
        }
    }

    /// Frees memory that is only kept for copies to come; says whether there was any.
    pub(super) fn let_go(&self) -> bool {
        let kept = std::mem::take(&mut *lock(&self.0.kept));
        !kept.is_empty()
    }

    fn open(&self, chunk: &Arc<GpuChunk>) -> Result<CudaMemory, DeviceError> {
        let mut opened = lock(&self.0.opened);
        if let Some((known, memory)) = opened.get(&chunk.handle) {
            if known.upgrade().is_some_and(|known| Arc::ptr_eq(&known, chunk)) {
                return Ok(memory.clone());
            }
            // Of another connection: closed before it is opened anew.
            opened.remove(&chunk.handle);
        }
        let bytes = usize::try_from(chunk.bytes).unwrap_or(usize::MAX);
        match self.0.device.open_shared(IpcHandle(chunk.handle), bytes) {
            Ok(memory) => {
                opened.insert(chunk.handle, (Arc::downgrade(chunk), memory.clone()));
                lock(&self.0.failed).remove(&chunk.gpu);
                Ok(memory)
            }
            Err(error) => {
                lock(&self.0.failed).insert(chunk.gpu, Instant::now());
                tracing::warn!(%error, "the cache server's GPU memory cannot be opened here; blocks come by way of host memory");
                Err(error)
            }
        }
    }
}

/// Until nothing else has the way to GPUs any more.
fn close_unnamed(near: &Weak<Inner>) {
    loop {
        std::thread::sleep(CLOSE_EVERY);
        let Some(near) = near.upgrade() else { return };
        lock(&near.opened).retain(|_, (chunk, _)| chunk.strong_count() > 0);
    }
}

fn units(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(ROOM_UNIT)).unwrap_or(u32::MAX)
}
