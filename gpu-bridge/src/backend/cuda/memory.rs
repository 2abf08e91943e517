//! Memory of a device, pinned memory beside it, and host memory of others that was registered with it.
//!
//! A handle is an address and a length behind an `Arc`; the last one to go frees it. Streams keep a clone of every handle that work in
//! flight names, so nothing is freed under a copy. Device memory is never a Rust reference; pinned memory is one only
//! while a single holder has it.

use super::context::{Context, ReadOnly, check};
use crate::DeviceError;
use cudarc::driver::sys;
use memmap2::MmapRaw;
use std::ffi::c_void;
use std::ops::Range;
use std::sync::Arc;

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
    /// What was allocated; more than `bytes` for pinned memory.
    capacity: usize,
    origin: Origin,
}

impl Drop for Area {
    fn drop(&mut self) {
        if self.address == 0 || self.context.enter().is_err() {
            return;
        }
        if matches!(self.origin, Origin::Pinned) && self.context.give_back(self.address, self.capacity) {
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
        Ok(Self(Arc::new(Area {
            context: context.clone(),
            address,
            bytes,
            capacity: bytes,
            origin: Origin::Allocated,
        })))
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

    pub(super) fn is_of(&self, context: &Arc<Context>) -> bool {
        Arc::ptr_eq(&self.0.context, context)
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
    /// handle out keeps it. CUDA shares whole granules of 2 MiB: smaller allocations take their neighbours with them.
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
        let (mut base, mut size) = (0, 0);
        let opened =
            Area { context: context.clone(), address, bytes, capacity: bytes, origin: Origin::Opened };
        // SAFETY: the address is of memory that was just opened; two numbers are written.
        let code = unsafe { sys::cuMemGetAddressRange_v2(&mut base, &mut size, address) };
        use sys::CUresult::{CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_FOUND};
        if [CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_FOUND].contains(&code) {
            tracing::warn!(
                bytes,
                "the driver does not say how large opened memory is; whoever gave it out is believed"
            );
            return Ok(Self(Arc::new(opened)));
        }
        check("cuMemGetAddressRange", code)?;
        let end = (address.saturating_sub(base) as usize).saturating_add(bytes);
        if end > size {
            return Err(DeviceError::OutOfBounds { offset: 0, end, len: size });
        }
        Ok(Self(Arc::new(opened)))
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

/// Pinned memory is cut in classes of a power of two and quarters of it, so that it can be used again: pinning takes longer than most of what
/// it is used for, and freeing it may wait for the device.
fn class(bytes: usize) -> usize {
    let bytes = bytes.max(LEAST_PINNED_BYTES);
    let step = (bytes.next_power_of_two() / 8).max(LEAST_PINNED_BYTES);
    bytes.next_multiple_of(step)
}

const LEAST_PINNED_BYTES: usize = 4 << 10;

impl CudaPinned {
    /// Zeroed.
    pub(super) fn allocate(context: &Arc<Context>, bytes: usize) -> Result<Self, DeviceError> {
        let mut memory = Self::lend(context, bytes)?;
        memory.as_mut().fill(0);
        Ok(memory)
    }

    /// With whatever was in it before.
    pub(super) fn lend(context: &Arc<Context>, bytes: usize) -> Result<Self, DeviceError> {
        let capacity = class(bytes);
        let area =
            |address| Area { context: context.clone(), address, bytes, capacity, origin: Origin::Pinned };
        if let Some(address) = context.take_pinned(capacity) {
            return Ok(Self(area(address)));
        }
        context.enter()?;
        let mut pointer: *mut c_void = std::ptr::null_mut();
        // Readable at full speed (not write-combined), and by every device.
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: one pointer is written.
        match unsafe { sys::cuMemHostAlloc(&mut pointer, capacity, flags) } {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Err(DeviceError::OutOfMemory { bytes }),
            code => check("cuMemHostAlloc", code)?,
        }
        // SAFETY: so many bytes were just allocated and nobody else knows them.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, capacity) };
        Ok(Self(area(pointer as u64)))
    }

    pub(super) fn address(&self) -> u64 {
        self.0.address
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

    /// Whether this is the only handle.
    pub fn is_alone(&self) -> bool {
        Arc::strong_count(&self.0) == 1
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
        if !context.same_addresses {
            let text =
                "the device knows host memory by other addresses than the host, so copies cannot go straight";
            return Err(DeviceError::Failed(text.into()));
        }
        context.enter()?;
        let mut flags = sys::CU_MEMHOSTREGISTER_PORTABLE;
        match (writable, context.read_only) {
            (true, _) | (false, ReadOnly::Plain) => {}
            (false, ReadOnly::Flag) => flags |= sys::CU_MEMHOSTREGISTER_READ_ONLY,
            (false, ReadOnly::No) => {
                return Err(DeviceError::Failed(
                    "the device cannot read mappings that cannot be written".into(),
                ));
            }
        }
        let (pointer, bytes) = (map.as_mut_ptr().cast::<c_void>(), map.len());
        // SAFETY: mapped as long as `map`, which is kept with the registration; it gives out pointers only, so no reference covers what copies
        // write. A mapping that cannot be written is refused by the driver unless it is registered as such.
        let code = unsafe { sys::cuMemHostRegister_v2(pointer, bytes, flags) };
        if code == sys::CUresult::CUDA_ERROR_UNKNOWN {
            // Here it is the operating system that refused, not the end of the device.
            return Err(DeviceError::Failed("cuMemHostRegister: the system does not pin this memory".into()));
        }
        check("cuMemHostRegister", code)?;
        let (address, origin) = (pointer as u64, Origin::Registered { writable, _map: map });
        Ok(Self(Arc::new(Area { context: context.clone(), address, bytes, capacity: bytes, origin })))
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
