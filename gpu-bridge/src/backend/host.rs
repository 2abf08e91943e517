//! Host memory as a device: streams are threads, kernels are the CPU ones. It keeps the order rules of a real device, so
//! that what is wrong there is wrong here.

use crate::device::{BlockMove, Buffer, Copy, Device, DeviceError, Priority, Region, Stream};
use crate::event::Event;
use cairn_kernels::{PagedShape, gather_block, scatter_block};
use std::panic::AssertUnwindSafe;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;

/// Work that a stream holds before issuing blocks: deep enough to run ahead, bounded so that memory is.
const STREAM_DEPTH: usize = 1024;

/// See the module.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostDevice;

/// Memory of a [`HostDevice`], device and shared pinned alike. Aligned to 16 bytes.
#[derive(Clone)]
pub struct HostMemory {
    words: Arc<RwLock<Vec<u128>>>,
    bytes: usize,
}

impl HostMemory {
    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Lets CPU code read it.
    pub fn read<T>(&self, read: impl FnOnce(&[u8]) -> T) -> T {
        read(&bytemuck::cast_slice(&self.shared())[..self.bytes])
    }

    /// Lets CPU code change it.
    pub fn write<T>(&self, write: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut words = self.exclusive();
        write(&mut bytemuck::cast_slice_mut(&mut words)[..self.bytes])
    }

    /// Bytes are bytes, whoever panicked while holding them.
    fn shared(&self) -> RwLockReadGuard<'_, Vec<u128>> {
        self.words.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self) -> RwLockWriteGuard<'_, Vec<u128>> {
        self.words.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, offset: usize, bytes: usize) -> Result<(), DeviceError> {
        let end = offset.saturating_add(bytes);
        if end > self.bytes {
            return Err(DeviceError::OutOfBounds { offset, end, len: self.bytes });
        }
        Ok(())
    }
}

/// Pinned memory of a [`HostDevice`] in one holder's hands.
pub struct HostPinned {
    words: Vec<u128>,
    bytes: usize,
}

impl AsRef<[u8]> for HostPinned {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.bytes]
    }
}

impl AsMut<[u8]> for HostPinned {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.bytes]
    }
}

fn zeroed(bytes: usize) -> Result<Vec<u128>, DeviceError> {
    let count = bytes.div_ceil(size_of::<u128>());
    let mut words = Vec::new();
    words.try_reserve_exact(count).map_err(|_| DeviceError::OutOfMemory { bytes })?;
    words.resize(count, 0);
    Ok(words)
}

impl Device for HostDevice {
    type Memory = HostMemory;
    type PinnedBuffer = HostPinned;
    type Pinned = HostMemory;
    type Stream = HostStream;

    fn name(&self) -> String {
        "host".into()
    }

    fn allocate(&self, bytes: usize) -> Result<HostMemory, DeviceError> {
        Ok(HostMemory { words: Arc::new(RwLock::new(zeroed(bytes)?)), bytes })
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<HostPinned, DeviceError> {
        Ok(HostPinned { words: zeroed(bytes)?, bytes })
    }

    fn share(&self, buffer: HostPinned) -> HostMemory {
        HostMemory { words: Arc::new(RwLock::new(buffer.words)), bytes: buffer.bytes }
    }

    fn reclaim(&self, pinned: HostMemory) -> Result<HostPinned, HostMemory> {
        let HostMemory { words, bytes } = pinned;
        match Arc::try_unwrap(words) {
            Ok(lock) => {
                Ok(HostPinned { words: lock.into_inner().unwrap_or_else(PoisonError::into_inner), bytes })
            }
            Err(words) => Err(HostMemory { words, bytes }),
        }
    }

    fn stream(&self, priority: Priority) -> Result<HostStream, DeviceError> {
        let (sender, receiver) = sync_channel::<Work>(STREAM_DEPTH);
        let name = match priority {
            Priority::Foreground => "cairn-stream",
            Priority::Background => "cairn-stream-bg",
        };
        thread::Builder::new()
            .name(name.into())
            .spawn(move || {
                // Work that panics loses the stream: what was issued after it is dropped, and its events say so.
                receiver.into_iter().all(|work| std::panic::catch_unwind(AssertUnwindSafe(work)).is_ok())
            })
            .map_err(|error| DeviceError::Lost(error.to_string()))?;
        Ok(HostStream { sender })
    }
}

/// An event on its way through a stream; if the stream is lost first, the event completes with that.
struct Recorded(Event);

impl Drop for Recorded {
    fn drop(&mut self) {
        self.0.complete(Err(DeviceError::Lost("its stream ended early".into())));
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// A stream of a [`HostDevice`].
pub struct HostStream {
    sender: SyncSender<Work>,
}

impl HostStream {
    fn issue(&self, work: impl FnOnce() + Send + 'static) -> Result<(), DeviceError> {
        self.sender.send(Box::new(work)).map_err(|_| DeviceError::Lost("its thread ended".into()))
    }
}

impl Stream for HostStream {
    type Device = HostDevice;

    fn copy(&self, copies: Vec<Copy<HostDevice>>) -> Result<(), DeviceError> {
        for copy in &copies {
            check_region(&copy.source)?;
            check_region(&copy.target)?;
            let (from, to) = (copy.source.bytes, copy.target.bytes);
            if from != to {
                return Err(DeviceError::SizeMismatch { from, to });
            }
        }
        self.issue(move || copies.iter().for_each(copy_region))
    }

    fn scatter(
        &self,
        shape: PagedShape,
        staging: &Buffer<HostDevice>,
        pool: &HostMemory,
        moves: Vec<BlockMove>,
    ) -> Result<(), DeviceError> {
        check_moves(&shape, memory(staging), pool, &moves)?;
        let (staging, pool) = (memory(staging).clone(), pool.clone());
        self.issue(move || {
            with_both(&staging, &pool, |staging, pool| {
                for each in &moves {
                    let block = &staging[each.staging_offset..][..shape.block_bytes()];
                    scatter_block(&shape, block, pool, each.slot);
                }
            });
        })
    }

    fn gather(
        &self,
        shape: PagedShape,
        pool: &HostMemory,
        staging: &Buffer<HostDevice>,
        moves: Vec<BlockMove>,
    ) -> Result<(), DeviceError> {
        check_moves(&shape, memory(staging), pool, &moves)?;
        let (staging, pool) = (memory(staging).clone(), pool.clone());
        self.issue(move || {
            with_both(&pool, &staging, |pool, staging| {
                for each in &moves {
                    let block = &mut staging[each.staging_offset..][..shape.block_bytes()];
                    gather_block(&shape, pool, each.slot, block);
                }
            });
        })
    }

    fn record(&self) -> Result<Event, DeviceError> {
        let event = Event::pending();
        let recorded = Recorded(event.clone());
        self.issue(move || recorded.0.complete(Ok(())))?;
        Ok(event)
    }

    fn wait(&self, event: &Event) -> Result<(), DeviceError> {
        let event = event.clone();
        // A failure of the other stream is reported to whoever waits for its event.
        self.issue(move || drop(event.wait()))
    }
}

fn memory(buffer: &Buffer<HostDevice>) -> &HostMemory {
    match buffer {
        Buffer::Device(memory) | Buffer::Pinned(memory) => memory,
    }
}

fn check_region(region: &Region<HostDevice>) -> Result<(), DeviceError> {
    memory(&region.buffer).check(region.offset, region.bytes)
}

fn check_moves(
    shape: &PagedShape,
    staging: &HostMemory,
    pool: &HostMemory,
    moves: &[BlockMove],
) -> Result<(), DeviceError> {
    if pool.len() != shape.pool_bytes() {
        return Err(DeviceError::SizeMismatch { from: shape.pool_bytes(), to: pool.len() });
    }
    for each in moves {
        staging.check(each.staging_offset, shape.block_bytes())?;
        pool.check(each.slot.saturating_mul(shape.block_bytes()), shape.block_bytes())?;
    }
    Ok(())
}

/// Reads one memory and writes another. Locks are taken in address order, so that streams that copy both ways between the
/// same two cannot block each other.
fn with_both(source: &HostMemory, target: &HostMemory, work: impl FnOnce(&[u8], &mut [u8])) {
    let (shared, mut exclusive);
    if Arc::as_ptr(&source.words) < Arc::as_ptr(&target.words) {
        shared = source.shared();
        exclusive = target.exclusive();
    } else {
        exclusive = target.exclusive();
        shared = source.shared();
    }
    let source = &bytemuck::cast_slice(&shared)[..source.bytes];
    work(source, &mut bytemuck::cast_slice_mut(&mut exclusive)[..target.bytes]);
}

fn copy_region(copy: &Copy<HostDevice>) {
    let (source, target) = (memory(&copy.source.buffer), memory(&copy.target.buffer));
    let (from, to, bytes) = (copy.source.offset, copy.target.offset, copy.source.bytes);
    if Arc::ptr_eq(&source.words, &target.words) {
        source.write(|all| all.copy_within(from..from + bytes, to));
    } else {
        with_both(source, target, |source, target| {
            target[to..to + bytes].copy_from_slice(&source[from..from + bytes]);
        });
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_host_device_conforms() {
        crate::conformance::run(&crate::HostDevice);
    }
}
