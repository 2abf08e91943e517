//! A device of CUDA: memory, streams, events, copies and kernels of an NVIDIA card, loaded at run time.
//!
//! All that is unsafe about CUDA is in this folder. What keeps it sound: every address that reaches the driver comes from a handle that
//! was checked to hold what is done there; whatever work names is kept until an event behind that work has completed; the parameter of a
//! kernel has the size that the kernel was compiled for; indices that a kernel follows (slots, tokens, positions) are checked on
//! the host before they are uploaded. Device memory is never a Rust reference.

mod batch;
mod capture;
mod checksum;
mod context;
mod decoder;
mod event;
mod gemm;
mod kernels;
mod memory;
mod moves;
mod programs;
mod stream;

pub use batch::{Batch, BatchLimits, BatchRow, Plan};
pub use checksum::Checksums;
pub use context::{Absence, CudaInfo, probe};
pub use decoder::{Decoder, DecoderLoader, DecoderShape, Hooks, LayerSource, NoHooks, Numbers, Pool};
pub use event::Stopwatch;
pub use gemm::{Gemm, Weight, cublaslt_is_here};
pub use kernels::{HeadExtras, KernelSpec, ModelKernels, Partials, PoolLayer};
pub use memory::{CudaMemory, CudaPinned, CudaShared, IpcHandle, Part};
pub use programs::{
    Compiled, KernelFolders, MoveKernels, Usage, compile, compile_ahead, nvrtc_version, usage,
};
pub use stream::CudaStream;

use crate::{Device, DeviceError, PagedShape, Priority};
use cairn_kernels::cuda::WireType;
use context::{Context, ReadOnly};
use memmap2::MmapRaw;
use programs::Programs;
use std::sync::Arc;

/// A device; clones share it.
#[derive(Clone)]
pub struct CudaDevice {
    context: Arc<Context>,
    programs: Arc<Programs>,
}

impl CudaDevice {
    /// Opens a device of [`probe`]'s list.
    ///
    /// # Errors
    /// When there is none of that number, or it cannot be used.
    pub fn open(ordinal: usize, folders: KernelFolders) -> Result<Self, DeviceError> {
        Ok(Self { context: Context::open(ordinal)?, programs: Arc::new(Programs::new(folders)) })
    }

    /// What is known of it.
    pub fn info(&self) -> &CudaInfo {
        &self.context.info
    }

    /// Free and all bytes of its memory.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn memory(&self) -> Result<(usize, usize), DeviceError> {
        self.context.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: two numbers are written.
        context::check("cuMemGetInfo", unsafe {
            cudarc::driver::sys::cuMemGetInfo_v2(&mut free, &mut total)
        })?;
        Ok((free, total))
    }

    /// Lets this device read and write another's memory directly.
    ///
    /// # Errors
    /// When the hardware does not, see [`CudaInfo::peers`].
    pub fn reach(&self, other: &Self) -> Result<(), DeviceError> {
        self.context.reach(&other.context)
    }

    /// Device memory that another process shares, see [`CudaMemory::share`].
    ///
    /// # Errors
    /// When the handle is of this process, or of none that lives.
    pub fn open_shared(&self, handle: IpcHandle, bytes: usize) -> Result<CudaMemory, DeviceError> {
        CudaMemory::open_shared(&self.context, handle, bytes)
    }

    /// Registers mapped memory of this process, a cache server's chunk for example, so that copies go there and back without the CPU. Only
    /// a `writable` mapping may be the target of one.
    ///
    /// # Errors
    /// When it is not whole pages, already registered, or the driver cannot pin it.
    pub fn register(&self, map: Arc<MmapRaw>, writable: bool) -> Result<CudaShared, DeviceError> {
        CudaShared::register(&self.context, map, writable)
    }

    /// The kernels that move blocks of a pool's own format.
    ///
    /// # Errors
    /// When they cannot be compiled or loaded.
    pub fn move_kernels(&self, shape: PagedShape) -> Result<Arc<MoveKernels>, DeviceError> {
        self.cast_kernels(shape, WireType::Kv(shape.kv_type))
    }

    /// The kernels that move blocks of another format, with a cast on the way.
    ///
    /// # Errors
    /// When they cannot be compiled or loaded.
    pub fn cast_kernels(&self, shape: PagedShape, wire: WireType) -> Result<Arc<MoveKernels>, DeviceError> {
        self.programs.moves(&self.context, shape, wire)
    }

    /// Pinned memory with whatever was in it before, for those who write all of it.
    ///
    /// # Errors
    /// When there is not enough.
    pub fn lend_pinned(&self, bytes: usize) -> Result<CudaPinned, DeviceError> {
        CudaPinned::lend(&self.context, bytes)
    }

    /// Whether copies can go straight out of mappings that cannot be written.
    pub fn registers_read_only(&self) -> bool {
        self.context.read_only != ReadOnly::No
    }

    fn context(&self) -> &Arc<Context> {
        &self.context
    }
}

impl Device for CudaDevice {
    type Memory = CudaMemory;
    type PinnedBuffer = CudaPinned;
    type Pinned = CudaShared;
    type Stream = CudaStream;

    fn name(&self) -> String {
        format!("cuda:{} ({})", self.info().ordinal, self.info().name)
    }

    fn allocate(&self, bytes: usize) -> Result<CudaMemory, DeviceError> {
        let memory = CudaMemory::allocate(&self.context, bytes)?;
        if bytes > 0 {
            // SAFETY: so many bytes were just allocated and nobody else knows them.
            unsafe { self.context.clear(memory.address(), bytes)? };
        }
        Ok(memory)
    }

    fn allocate_pinned(&self, bytes: usize) -> Result<CudaPinned, DeviceError> {
        CudaPinned::allocate(&self.context, bytes)
    }

    fn share(&self, buffer: CudaPinned) -> CudaShared {
        CudaShared::new(buffer)
    }

    fn reclaim(&self, pinned: CudaShared) -> Result<CudaPinned, CudaShared> {
        pinned.reclaim()
    }

    fn stream(&self, priority: Priority) -> Result<CudaStream, DeviceError> {
        CudaStream::new(self.clone(), priority)
    }
}
