//! Blocks that the cache server has in the memory of a GPU this worker reaches: copied from there to here without the host, and verified on
//! the device. Other processes of the tenant can write to that memory, so what counts is the checksum of the copy.

use cairn_client::{GpuChunk, GpuUuid, View};
use cairn_gpu::backend::cuda::{Checksums, CudaDevice, CudaMemory, CudaStream, IpcHandle, probe};
use cairn_gpu::{Buffer, Copy, Device, DeviceError, Priority, Region, Stream};
use cairn_proto::Checksum;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Memory for copies that is kept from one load to the next.
const KEPT: usize = 4;

/// Chunks of the server's that are open at a time.
const OPENED: usize = 1024;

/// The way to GPUs' memory. Clones share it.
#[derive(Clone)]
pub(crate) struct Near(Arc<Inner>);

struct Inner {
    device: CudaDevice,
    /// This one's, and those that it reaches directly.
    gpus: Vec<GpuUuid>,
    stream: CudaStream,
    checksums: Checksums,
    opened: Mutex<HashMap<[u8; 64], CudaMemory>>,
    kept: Mutex<Vec<CudaMemory>>,
    /// False once the server's memory could not be opened.
    works: AtomicBool,
}

/// Verified copies of blocks of a view.
pub(crate) struct NearBlocks {
    near: Near,
    memory: Option<CudaMemory>,
    /// Where each block of the view begins in the memory, if it is there and right.
    places: Vec<Option<usize>>,
}

impl NearBlocks {
    /// Where a block is.
    pub(crate) fn place(&self, index: usize) -> Option<(CudaMemory, usize)> {
        Some((self.memory.clone()?, self.places.get(index).copied().flatten()?))
    }

    /// How many there are of the first so many blocks.
    pub(crate) fn count(&self, blocks: usize) -> usize {
        self.places.iter().take(blocks).flatten().count()
    }
}

impl Drop for NearBlocks {
    fn drop(&mut self) {
        let mut kept = lock(&self.near.0.kept);
        if kept.len() < KEPT {
            kept.extend(self.memory.take());
        }
    }
}

impl Near {
    /// # Errors
    /// When the device has no stream or no kernels for it.
    pub(super) fn new(device: &CudaDevice) -> Result<Self, DeviceError> {
        let info = device.info();
        let all = probe().unwrap_or_default();
        let peers = all.iter().filter(|other| info.peers.contains(&other.ordinal)).map(|other| other.uuid);
        Ok(Self(Arc::new(Inner {
            device: device.clone(),
            gpus: std::iter::once(info.uuid).chain(peers).collect(),
            stream: device.stream(Priority::Foreground)?,
            checksums: Checksums::load(device)?,
            opened: Mutex::default(),
            kept: Mutex::default(),
            works: AtomicBool::new(true),
        })))
    }

    /// GPUs whose memory can be opened here.
    pub(crate) fn gpus(&self) -> &[GpuUuid] {
        if self.0.works.load(Ordering::Relaxed) { &self.0.gpus } else { &[] }
    }

    /// Copies the blocks of a view that are on GPUs, and verifies the copies; the view knows which are right. Blocks the thread.
    ///
    /// # Errors
    /// When the memory cannot be opened or copied: the blocks have to come another way.
    pub(crate) fn copy(&self, view: &View, block_bytes: usize) -> Result<NearBlocks, DeviceError> {
        let mut blocks = NearBlocks { near: self.clone(), memory: None, places: vec![None; view.len()] };
        let places: Vec<_> = (0..view.len()).filter_map(|index| Some((index, view.on_gpu(index)?))).collect();
        if places.is_empty() {
            return Ok(blocks);
        }
        let memory = self.memory(places.len() * block_bytes)?;
        let mut copies = Vec::with_capacity(places.len());
        let mut seeds = Vec::with_capacity(places.len());
        for (i, (index, (chunk, offset))) in places.iter().enumerate() {
            let source = self.open(chunk)?;
            let region = |buffer, offset| Region { buffer, offset, bytes: block_bytes };
            copies.push(Copy {
                source: region(Buffer::Device(source), *offset as usize),
                target: region(Buffer::Device(memory.clone()), i * block_bytes),
            });
            seeds.push((i * block_bytes, view.seed(*index)));
        }
        self.0.stream.copy(copies)?;
        let sums = self.0.checksums.of(&self.0.stream, &memory, block_bytes, &seeds)?;
        for (i, ((index, _), sum)) in places.iter().zip(sums).enumerate() {
            let right = view.accept(*index, Checksum(sum)).is_ok();
            blocks.places[*index] = right.then_some(i * block_bytes);
        }
        blocks.memory = Some(memory);
        Ok(blocks)
    }

    fn memory(&self, bytes: usize) -> Result<CudaMemory, DeviceError> {
        let mut kept = lock(&self.0.kept);
        let fits = kept.iter().position(|memory| memory.len() >= bytes);
        match fits {
            Some(fits) => Ok(kept.swap_remove(fits)),
            None => {
                // Too small ones make room.
                kept.clear();
                self.0.device.allocate(bytes)
            }
        }
    }

    fn open(&self, chunk: &GpuChunk) -> Result<CudaMemory, DeviceError> {
        let mut opened = lock(&self.0.opened);
        if let Some(memory) = opened.get(&chunk.handle) {
            return Ok(memory.clone());
        }
        if opened.len() >= OPENED {
            // Those of servers that are gone, most likely; the others are opened again.
            opened.clear();
        }
        let bytes = usize::try_from(chunk.bytes).unwrap_or(usize::MAX);
        match self.0.device.open_shared(IpcHandle(chunk.handle), bytes) {
            Ok(memory) => Ok(opened.entry(chunk.handle).or_insert(memory).clone()),
            Err(error) => {
                self.0.works.store(false, Ordering::Relaxed);
                tracing::warn!(%error, "the cache server's GPU memory cannot be opened here; blocks come by way of host memory");
                Err(error)
            }
        }
    }
}

/// Every change is a single insertion or removal, so a panic elsewhere leaves the whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
