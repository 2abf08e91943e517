//! A device of CUDA, found or cleanly absent, and how its errors become ours.
//!
//! libcuda is loaded at run time; nothing of CUDA is called before [`probe`] has found the library and initialised it. Calls that
//! older drivers lack are looked up before they are made.

use crate::DeviceError;
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use thiserror::Error;

/// Why there is no CUDA here.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Absence {
    /// No driver.
    #[error("no libcuda: there is no NVIDIA driver on this host")]
    NoLibrary,
    /// A driver without a card.
    #[error("libcuda is here, but no device")]
    NoDevice,
    /// A driver that does not work.
    #[error("libcuda does not work: {0}")]
    Broken(DeviceError),
}

/// What is known of a device before it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaInfo {
    /// As CUDA counts them.
    pub ordinal: usize,
    /// Of the card.
    pub name: String,
    /// Compute capability, as `90` for 9.0.
    pub architecture: u32,
    /// Bytes of its memory.
    pub memory_bytes: usize,
    /// PCI address, for the nearest NUMA node.
    pub pci: String,
    /// Identity of the card in every process.
    pub uuid: [u8; 16],
    /// Devices whose memory it reaches directly.
    pub peers: Vec<usize>,
}

/// Codes after which a context is of no use any more, whatever is called.
fn is_fatal(code: sys::CUresult) -> bool {
    use sys::CUresult::*;
    matches!(
        code,
        CUDA_ERROR_DEINITIALIZED
            | CUDA_ERROR_DEVICE_UNAVAILABLE
            | CUDA_ERROR_ECC_UNCORRECTABLE
            | CUDA_ERROR_NVLINK_UNCORRECTABLE
            | CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_CONTEXT_IS_DESTROYED
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
            | CUDA_ERROR_CONTAINED
            | CUDA_ERROR_EXTERNAL_DEVICE
            | CUDA_ERROR_TENSOR_MEMORY_LEAK
            | CUDA_ERROR_MPS_CLIENT_TERMINATED
            | CUDA_ERROR_UNKNOWN
    )
}

/// The result of a call as ours.
pub(super) fn check(operation: &'static str, code: sys::CUresult) -> Result<(), DeviceError> {
    if code == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text = std::ptr::null();
    // SAFETY: the library is loaded, or there would be no code; the string it gives is static.
    let known =
        unsafe { sys::cuGetErrorName(code, &mut text) } == sys::CUresult::CUDA_SUCCESS && !text.is_null();
    let name = if known {
        // SAFETY: as above.
        unsafe { CStr::from_ptr(text) }.to_string_lossy()
    } else {
        "an unknown error".into()
    };
    let text = format!("{operation}: {name} ({})", code as u32);
    Err(if is_fatal(code) { DeviceError::Lost(text) } else { DeviceError::Failed(text) })
}

/// Whether the driver has a call of this name (ending with a zero byte), for those that came late.
pub(super) fn has_call(name: &[u8]) -> bool {
    // SAFETY: the library is loaded before a device exists; the symbol is only looked up.
    unsafe { sys::culib().get::<unsafe extern "C" fn()>(name).is_ok() }
}

/// The devices of this host, or why there are none. The answer is found once.
///
/// # Errors
/// See [`Absence`].
pub fn probe() -> Result<&'static [CudaInfo], Absence> {
    static FOUND: OnceLock<Result<Vec<CudaInfo>, Absence>> = OnceLock::new();
    match FOUND.get_or_init(find) {
        Ok(devices) => Ok(devices),
        Err(absence) => Err(absence.clone()),
    }
}

fn find() -> Result<Vec<CudaInfo>, Absence> {
    // SAFETY: loads a library by name, as a process linked with it would.
    if !unsafe { sys::is_culib_present() } {
        return Err(Absence::NoLibrary);
    }
    // SAFETY: the library is there; this is the first call.
    match unsafe { sys::cuInit(0) } {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => return Err(Absence::NoDevice),
        code => check("cuInit", code).map_err(Absence::Broken)?,
    }
    let mut count: c_int = 0;
    // SAFETY: CUDA is initialised; `count` is written.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) }).map_err(Absence::Broken)?;
    if count == 0 {
        return Err(Absence::NoDevice);
    }
    (0..count).map(|ordinal| describe(ordinal, count).map_err(Absence::Broken)).collect()
}

fn device(ordinal: c_int) -> Result<sys::CUdevice, DeviceError> {
    let mut device = 0;
    // SAFETY: `device` is written.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, ordinal) })?;
    Ok(device)
}

fn attribute(which: sys::CUdevice_attribute, device: sys::CUdevice) -> Result<u32, DeviceError> {
    let mut value: c_int = 0;
    // SAFETY: `value` is written.
    check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, which, device) })?;
    Ok(value.unsigned_abs())
}

fn describe(ordinal: c_int, count: c_int) -> Result<CudaInfo, DeviceError> {
    use sys::CUdevice_attribute::*;
    let device = device(ordinal)?;
    let mut name = [0u8; 128];
    // SAFETY: at most so many bytes are written, a zero at the end.
    check("cuDeviceGetName", unsafe {
        sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as c_int, device)
    })?;
    let mut memory_bytes = 0;
    // SAFETY: one number is written.
    check("cuDeviceTotalMem", unsafe { sys::cuDeviceTotalMem_v2(&mut memory_bytes, device) })?;
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: sixteen bytes are written.
    check("cuDeviceGetUuid", unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device) })?;
    let major = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)?;
    let minor = attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)?;
    let domain = attribute(CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID, device)?;
    let bus = attribute(CU_DEVICE_ATTRIBUTE_PCI_BUS_ID, device)?;
    let slot = attribute(CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID, device)?;
    let peers = (0..count).filter(|other| *other != ordinal && reaches(ordinal, *other)).map(|i| i as usize);
    Ok(CudaInfo {
        ordinal: ordinal as usize,
        name: CStr::from_bytes_until_nul(&name)
            .map_or("?".into(), |name| name.to_string_lossy().into_owned()),
        architecture: 10 * major + minor,
        memory_bytes,
        pci: format!("{domain:04x}:{bus:02x}:{slot:02x}.0"),
        uuid: uuid.bytes.map(|byte| byte as u8),
        peers: peers.collect(),
    })
}

fn same_addresses(device: sys::CUdevice) -> Result<bool, DeviceError> {
    let same = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM;
    Ok(attribute(same, device)? != 0)
}

fn read_only(device: sys::CUdevice) -> Result<ReadOnly, DeviceError> {
    use sys::CUdevice_attribute::*;
    if attribute(CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED, device)? != 0 {
        return Ok(ReadOnly::Flag);
    }
    let plain = attribute(CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES, device)? != 0;
    Ok(if plain { ReadOnly::Plain } else { ReadOnly::No })
}

fn reaches(from: c_int, to: c_int) -> bool {
    let mut can: c_int = 0;
    let (Ok(from), Ok(to)) = (device(from), device(to)) else { return false };
    // SAFETY: one number is written.
    unsafe { sys::cuDeviceCanAccessPeer(&mut can, from, to) == sys::CUresult::CUDA_SUCCESS && can != 0 }
}

/// Version of CUDA that the driver brings, as 13000 for 13.0.
pub(super) fn driver_version() -> u32 {
    let mut version: c_int = 0;
    // SAFETY: a device exists, so the library is loaded; one number is written.
    let code = unsafe { sys::cuDriverGetVersion(&mut version) };
    if code == sys::CUresult::CUDA_SUCCESS { version.unsigned_abs() } else { 0 }
}

/// The primary context of a device, retained. Everything that CUDA gives for it is dropped before it is.
pub(super) struct Context {
    pub(super) info: CudaInfo,
    raw: sys::CUcontext,
    device: sys::CUdevice,
    /// For what is done to new memory before anybody has it.
    setup: sys::CUstream,
    /// Lowest and highest urgency of streams.
    pub(super) priorities: (c_int, c_int),
    /// `cuMemcpyBatchAsync` in the form of CUDA 13.
    pub(super) batched_copies: bool,
    /// How mappings that cannot be written are registered.
    pub(super) read_only: ReadOnly,
    /// Whether registered host memory is used under its host address.
    pub(super) same_addresses: bool,
    /// Pinned memory that is free, by its size.
    pinned: Mutex<Pinned>,
}

/// How mappings that cannot be written are registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadOnly {
    /// By a flag of the driver's.
    Flag,
    /// Like any other: the device follows the host's page tables.
    Plain,
    /// Not at all.
    No,
}

/// Set, it makes the device copy block by block, to tell whether a driver's batches are to blame for something.
const ONE_BY_ONE: &str = "CAIRN_CUDA_ONE_BY_ONE";

/// Bytes of free pinned memory that are kept.
const FREE_PINNED_BYTES: usize = 1 << 30;

#[derive(Default)]
struct Pinned {
    free: HashMap<usize, Vec<u64>>,
    bytes: usize,
}

// SAFETY: a context may be made current in any number of threads; handles are plain values.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub(super) fn open(ordinal: usize) -> Result<Arc<Self>, DeviceError> {
        let devices = probe().map_err(|absence| DeviceError::Failed(absence.to_string()))?;
        let info = devices.get(ordinal).cloned().ok_or_else(|| {
            DeviceError::Failed(format!("device {ordinal} of {}: count from 0", devices.len()))
        })?;
        let device = device(ordinal as c_int)?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the context is written; it is released in `drop`.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&mut raw, device) })?;
        let setup = std::ptr::null_mut();
        let (priorities, batched_copies, pinned) = ((0, 0), false, Mutex::default());
        let same_addresses = same_addresses(device)?;
        let read_only = if same_addresses { read_only(device)? } else { ReadOnly::No };
        let mut context =
            Self { info, raw, device, setup, priorities, batched_copies, read_only, same_addresses, pinned };
        context.enter()?;
        let (mut least, mut greatest) = (0, 0);
        // SAFETY: two numbers are written.
        check("cuCtxGetStreamPriorityRange", unsafe {
            sys::cuCtxGetStreamPriorityRange(&mut least, &mut greatest)
        })?;
        context.priorities = (least, greatest);
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the stream is written; it is destroyed in `drop`.
        check("cuStreamCreate", unsafe {
            sys::cuStreamCreateWithPriority(&mut context.setup, flags, greatest)
        })?;
        let wanted = std::env::var_os(ONE_BY_ONE).is_none();
        context.batched_copies = wanted && has_call(b"cuMemcpyBatchAsync_v2\0");
        Ok(Arc::new(context))
    }

    /// Free pinned memory of a size, if there is some.
    pub(super) fn take_pinned(&self, capacity: usize) -> Option<u64> {
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        let address = pinned.free.get_mut(&capacity)?.pop()?;
        pinned.bytes -= capacity;
        Some(address)
    }

    /// Keeps pinned memory that nobody uses any more; says whether there was room.
    pub(super) fn give_back(&self, address: u64, capacity: usize) -> bool {
        let mut pinned = self.pinned.lock().unwrap_or_else(PoisonError::into_inner);
        let room = pinned.bytes + capacity <= FREE_PINNED_BYTES;
        if room {
            pinned.bytes += capacity;
            pinned.free.entry(capacity).or_default().push(address);
        }
        room
    }

    /// Makes it the calling thread's: before every call that needs one.
    pub(super) fn enter(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained as long as `self` lives.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.raw) })
    }

    /// Sets new memory to zeros and waits for it.
    ///
    /// # Safety
    /// So many bytes of device memory begin at `address`.
    pub(super) unsafe fn clear(&self, address: u64, bytes: usize) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: as the caller says; the stream lives.
        unsafe {
            check("cuMemsetD8Async", sys::cuMemsetD8Async(address, 0, bytes, self.setup))?;
            check("cuStreamSynchronize", sys::cuStreamSynchronize(self.setup))
        }
    }

    /// Lets this device read and write the memory of another.
    pub(super) fn reach(&self, other: &Self) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: both contexts live.
        match unsafe { sys::cuCtxEnablePeerAccess(other.raw, 0) } {
            sys::CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED => Ok(()),
            code => check("cuCtxEnablePeerAccess", code),
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`, and the stream was made there; the free memory was pinned and given back. A failure leaves nothing to do.
        let _ = unsafe {
            if !self.setup.is_null() && self.enter().is_ok() {
                let _ = sys::cuStreamDestroy_v2(self.setup);
                let pinned = self.pinned.get_mut().unwrap_or_else(PoisonError::into_inner);
                for address in pinned.free.drain().flat_map(|(_, addresses)| addresses) {
                    let _ = sys::cuMemFreeHost(address as *mut c_void);
                }
            }
            sys::cuDevicePrimaryCtxRelease_v2(self.device)
        };
    }
}
