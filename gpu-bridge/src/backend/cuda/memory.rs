//! Memory of a device, pinned memory beside it, and host memory of others that was registered with it.
//!
//! A handle is an address and a length behind an `Arc`; the last one to go frees it. Streams keep a clone of every handle that work in
//! flight names, so nothing is freed under a copy. Device memory is never a Rust reference; pinned memory is one only
//! while a single holder has it.

use super::context::{Context, check};
use crate::DeviceError;
use cudarc::driver::sys;
use memmap2::MmapRaw;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// How an address came about, and so how it is given back.
enum Origin {
    Allocated,
    Pinned,
    /// Registered; the mapping is kept with it.
    Registered {
        writable: bool,
        _map: Arc<MmapRaw>,
    },
    /// Memory of another process's device allocation.
    Opened,
}

struct Area {
    context: Arc<Context>,
    address: u64,
    bytes: usize,
    origin: Origin,
}

impl Drop for Area {
    fn drop(&mut self) {
        if self.address == 0 || self.context.enter().is_err() {
            return;
        }
        let pointer = self.address as *mut c_void;
        // SAFETY: the address came from the call that belongs to its origin, and this is the last handle. A failure (of a lost device)
        // leaves nothing to do.
        let _ = unsafe {
            match &self.origin {
                Origin::Allocated => sys::cuMemFree_v2(self.address),
                Origin::Pinned => sys::cuMemFreeHost(pointer),
                Origin::Registered { .. } => sys::cuMemHostUnregister(pointer),
                Origin::Opened => sys::cuIpcCloseMemHandle(self.address),
            }
        };
    }
}

/// A handle to memory of a device; clones share it.
#[derive(Clone)]
pub struct CudaMemory(Arc<Area>);

/// What another process needs to reach device memory of this one: see `cuIpcGetMemHandle`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpcHandle(pub [u8; 64]);

impl CudaMemory {
    pub(super) fn allocate(context: &Arc<Context>, bytes: usize) -> Result<Self, DeviceError> {
        context.enter()?;
        let mut address = 0;
        // The driver refuses 0.
        // SAFETY: one address is written.
        match unsafe { sys::cuMemAlloc_v2(&mut address, bytes.max(1)) } {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(DeviceError::OutOfMemory { bytes }),
            code => check("cuMemAlloc", code)?,
        }
        Ok(Self(Arc::new(Area { context: context.clone(), address, bytes, origin: Origin::Allocated })))
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.bytes
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.0.bytes == 0
    }

    pub(super) fn address(&self) -> u64 {
        self.0.address
    }

    /// A part of it.
    ///
    /// # Errors
    /// When it is not inside.
    pub fn part(&self, range: Range<usize>) -> Result<Part<'_>, DeviceError> {
        if range.start > range.end || range.end > self.len() {
            return Err(DeviceError::OutOfBounds { offset: range.start, end: range.end, len: self.len() });
        }
        Ok(Part { memory: self, range })
    }

    /// All of it.
    pub fn all(&self) -> Part<'_> {
        Part { memory: self, range: 0..self.len() }
    }

    /// A handle for [`super::CudaDevice::open_shared`] of another process. The memory must outlive its use there: whoever hands the
    /// handle out keeps it.
    ///
    /// # Errors
    /// When the driver cannot share it.
    pub fn share(&self) -> Result<IpcHandle, DeviceError> {
        self.0.context.enter()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the address is a whole allocation; the handle is written.
        check("cuIpcGetMemHandle", unsafe { sys::cuIpcGetMemHandle(&mut handle, self.0.address) })?;
        Ok(IpcHandle(handle.reserved.map(|byte| byte as u8)))
    }

    pub(super) fn open_shared(
        context: &Arc<Context>,
        handle: IpcHandle,
        bytes: usize,
    ) -> Result<Self, DeviceError> {
        context.enter()?;
        let raw = sys::CUipcMemHandle { reserved: handle.0.map(|byte| byte as _) };
        let mut address = 0;
        let lazily = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: one address is written; the driver checks the handle.
        check("cuIpcOpenMemHandle", unsafe { sys::cuIpcOpenMemHandle_v2(&mut address, raw, lazily) })?;
        Ok(Self(Arc::new(Area { context: context.clone(), address, bytes, origin: Origin::Opened })))
    }
}

/// Consecutive bytes of device memory.
#[derive(Clone)]
pub struct Part<'a> {
    pub(super) memory: &'a CudaMemory,
    pub(super) range: Range<usize>,
}

impl Part<'_> {
    /// Its address, once it is known to hold so many bytes and to be aligned for sixteen at a time.
    pub(super) fn holding(&self, bytes: usize) -> Result<u64, DeviceError> {
        let len = self.range.len();
        if bytes > len {
            return Err(DeviceError::OutOfBounds { offset: 0, end: bytes, len });
        }
        let address = self.memory.address() + self.range.start as u64;
        if !address.is_multiple_of(16) {
            return Err(DeviceError::Failed(format!(
                "memory at {} is not aligned to 16 bytes",
                self.range.start
            )));
        }
        Ok(address)
    }
}

/// Pinned memory in one holder's hands.
pub struct CudaPinned(Area);

impl CudaPinned {
    pub(super) fn allocate(context: &Arc<Context>, bytes: usize) -> Result<Self, DeviceError> {
        context.enter()?;
        let mut pointer: *mut c_void = std::ptr::null_mut();
        // Readable at full speed (not write-combined), and by every device.
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: one pointer is written.
        match unsafe { sys::cuMemHostAlloc(&mut pointer, bytes.max(1), flags) } {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(DeviceError::OutOfMemory { bytes }),
            code => check("cuMemHostAlloc", code)?,
        }
        // SAFETY: so many bytes were just allocated and nobody else knows them.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, bytes) };
        Ok(Self(Area { context: context.clone(), address: pointer as u64, bytes, origin: Origin::Pinned }))
    }
}

impl AsRef<[u8]> for CudaPinned {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: initialised when it was allocated; no copy has it while a holder does.
        unsafe { std::slice::from_raw_parts(self.0.address as *const u8, self.0.bytes) }
    }
}

impl AsMut<[u8]> for CudaPinned {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the holder is the only one.
        unsafe { std::slice::from_raw_parts_mut(self.0.address as *mut u8, self.0.bytes) }
    }
}

/// Pinned memory in the hands of copies, or registered memory of others.
#[derive(Clone)]
pub struct CudaShared(Arc<Area>);

impl CudaShared {
    pub(super) fn new(buffer: CudaPinned) -> Self {
        Self(Arc::new(buffer.0))
    }

    /// The memory again, if this is the last handle and it was pinned here.
    pub(super) fn reclaim(self) -> Result<CudaPinned, Self> {
        if !matches!(self.0.origin, Origin::Pinned) {
            return Err(self);
        }
        Arc::try_unwrap(self.0).map(CudaPinned).map_err(Self)
    }

    pub(super) fn register(
        context: &Arc<Context>,
        map: Arc<MmapRaw>,
        writable: bool,
    ) -> Result<Self, DeviceError> {
        context.enter()?;
        let mut flags = sys::CU_MEMHOSTREGISTER_PORTABLE;
        if !writable {
            flags |= sys::CU_MEMHOSTREGISTER_READ_ONLY;
        }
        let (pointer, bytes) = (map.as_mut_ptr().cast::<c_void>(), map.len());
        // SAFETY: mapped as long as `map`, which is kept with the registration; it gives out pointers only, so no reference covers what copies
        // write. A mapping that cannot be written is refused by the driver unless it is registered as such.
        check("cuMemHostRegister", unsafe { sys::cuMemHostRegister_v2(pointer, bytes, flags) })?;
        let (address, origin) = (pointer as u64, Origin::Registered { writable, _map: map });
        Ok(Self(Arc::new(Area { context: context.clone(), address, bytes, origin })))
    }

    /// Whether copies may write it.
    pub(super) fn is_writable(&self) -> bool {
        !matches!(self.0.origin, Origin::Registered { writable: false, .. })
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.bytes
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.0.bytes == 0
    }

    pub(super) fn address(&self) -> u64 {
        self.0.address
    }
}

/// Largest buffer that is kept for the next use, and the smallest that is made.
const LENT_BYTES: usize = 1 << 20;
const LEAST_LENT_BYTES: usize = 4 << 10;

/// Pinned buffers for small copies, by the power of two of their size: pinning takes longer than what they are used for.
#[derive(Default)]
pub(super) struct PinnedPool(Mutex<Vec<CudaPinned>>);

impl PinnedPool {
    pub(super) fn lend(self: &Arc<Self>, context: &Arc<Context>, bytes: usize) -> Result<Lent, DeviceError> {
        let size = bytes.max(LEAST_LENT_BYTES);
        let size = if size <= LENT_BYTES { size.next_power_of_two() } else { size };
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found =
            free.iter().position(|buffer| buffer.0.bytes == size).map(|place| free.swap_remove(place));
        drop(free);
        let buffer = found.map_or_else(|| CudaPinned::allocate(context, size), Ok)?;
        Ok(Lent { buffer: Some(buffer), bytes, pool: self.clone() })
    }
}

/// A pinned buffer that goes back to its pool.
pub(super) struct Lent {
    buffer: Option<CudaPinned>,
    bytes: usize,
    pool: Arc<PinnedPool>,
}

impl Lent {
    pub(super) fn address(&self) -> u64 {
        self.buffer.as_ref().map_or(0, |buffer| buffer.0.address)
    }

    /// Its bytes. Only while no copy has it.
    pub(super) fn bytes(&self) -> &[u8] {
        self.buffer.as_ref().map_or(&[], |buffer| &buffer.as_ref()[..self.bytes])
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        let bytes = self.bytes;
        self.buffer.as_mut().map_or(&mut [], |buffer| &mut buffer.as_mut()[..bytes])
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let small = self.buffer.take().filter(|buffer| buffer.0.bytes <= LENT_BYTES);
        self.pool.0.lock().unwrap_or_else(PoisonError::into_inner).extend(small);
    }
}
