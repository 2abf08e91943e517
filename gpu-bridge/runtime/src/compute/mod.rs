//! Where a worker computes: the engine's passes, its pool, and the copies between the pool and canonical blocks, on the CPU or on a CUDA
//! device. The engine decides; nothing here does.

mod cuda;
mod host;
mod near;
mod registered;

use crate::forward::Row;
use crate::model::{Model, ModelConfig};
use bytes::Bytes;
use cairn_client::View;
use cairn_gpu::backend::cuda::{CudaInfo, KernelFolders, cublaslt_is_here, nvrtc_version, probe};
use cairn_gpu::{BlockMove, Device, DeviceError, Event, HostDevice, HostPinned, PagedShape, Slot};
use cairn_kernels::KvType;
use cairn_kernels::cuda::{HeadShape, LEAST_ARCHITECTURE, Program, SampleSetting, WireType};
use cuda::CudaCompute;
use host::HostCompute;
pub(crate) use near::{Near, NearBlocks, NearRoom};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Where a worker computes.
#[derive(Clone, Debug, Default)]
pub enum ComputeDevice {
    /// On the CPU, in host memory.
    #[default]
    Cpu,
    /// On a device of CUDA.
    Cuda {
        /// Which, from 0.
        ordinal: usize,
        /// Where compiled kernels are.
        folders: KernelFolders,
    },
    /// On the first device of CUDA that can run the model, or else on the CPU.
    Auto {
        /// Where compiled kernels are.
        folders: KernelFolders,
    },
}

impl ComputeDevice {
    /// What is meant for a model, and why.
    pub fn resolve(&self, config: &ModelConfig, block_tokens: usize) -> (Self, String) {
        let Self::Auto { folders } = self else {
            return (self.clone(), "as asked for".into());
        };
        match usable(config, block_tokens, folders) {
            Ok(device) => {
                (Self::Cuda { ordinal: device.ordinal, folders: folders.clone() }, device.name.clone())
            }
            Err(why) => (Self::Cpu, why),
        }
    }

    /// Mixed into the fingerprint of a model: state that was computed elsewhere differs in its last bits.
    pub(crate) fn tag(&self, config: &ModelConfig, block_tokens: usize) -> Option<&'static str> {
        match self.resolve(config, block_tokens).0 {
            Self::Cuda { .. } => Some("cuda"),
            _ => None,
        }
    }
}

/// The first CUDA device on which a model can be computed.
fn usable(
    config: &ModelConfig,
    block_tokens: usize,
    folders: &KernelFolders,
) -> Result<&'static CudaInfo, String> {
    let devices = probe().map_err(|absence| absence.to_string())?;
    heads(config, block_tokens).check()?;
    if !cublaslt_is_here() {
        return Err("libcublasLt is not here".into());
    }
    if folders.ahead.is_none() {
        nvrtc_version().map_err(|error| error.to_string())?;
    }
    let recent = devices.iter().find(|device| device.architecture >= LEAST_ARCHITECTURE);
    recent.ok_or_else(|| format!("no CUDA device of compute capability {LEAST_ARCHITECTURE} or later"))
}

/// The logits after every token of a prompt, computed in one pass: `tokens × vocabulary`. For comparing devices.
///
/// # Errors
/// When the device refuses.
pub fn prompt_logits(
    model: &Arc<Model>,
    device: &ComputeDevice,
    shape: PagedShape,
    tokens: &[u32],
) -> Result<Vec<f32>, DeviceError> {
    let mut compute = Compute::new(device, model, shape, (tokens.len(), tokens.len()))?;
    let slots: Vec<Slot> = (0..tokens.len().div_ceil(shape.block_tokens) as u32).map(Slot).collect();
    let row = |(position, token): (usize, &u32)| Row { token: *token, position, slots: &slots };
    let rows: Vec<Row<'_>> = tokens.iter().enumerate().map(row).collect();
    let greedy = SampleSetting { temperature: 0.0, top_p: 1.0, uniform: 0.0 };
    let wanted: Vec<(usize, SampleSetting)> = (0..rows.len()).map(|row| (row, greedy)).collect();
    let pass = Pass { rows: &rows, wanted: &wanted, completes: &[], answers: false };
    match &mut compute {
        Compute::Host(compute) => Ok(compute.logits(&pass)),
        Compute::Cuda(compute) => compute.logits(&pass),
    }
}

/// The CUDA programs that a worker of this model compiles.
///
/// # Errors
/// When the kernels do not suit the model, in words.
pub fn kernel_programs(model: &Model, kv_type: KvType, block_tokens: usize) -> Result<Vec<Program>, String> {
    let shape = heads(&model.config, block_tokens);
    shape.check()?;
    let act = cuda::act_type(model.weights.embedding.format());
    let paged = Program::paged(WireType::Kv(kv_type), kv_type, shape.kv_heads, shape.head_dim, block_tokens);
    let plain = kv_type == KvType::F32;
    let attention = Program::attention(act, kv_type, &shape, plain);
    let layers = Program::layers(act, kv_type, &shape);
    Ok(vec![paged, layers, attention, Program::sampling(), Program::checksum()])
}

/// Heads and blocks of a model, as CUDA kernels see them.
pub(crate) fn heads(config: &ModelConfig, block_tokens: usize) -> HeadShape {
    let (kv_heads, head_dim) = (config.kv_heads, config.head_dim);
    HeadShape { kv_heads, group: config.heads / kv_heads.max(1), head_dim, block_tokens }
}

/// One pass.
pub(crate) struct Pass<'a> {
    /// Tokens to compute.
    pub(crate) rows: &'a [Row<'a>],
    /// Rows after which a token is wanted, and how it is chosen.
    pub(crate) wanted: &'a [(usize, SampleSetting)],
    /// Slots whose blocks this pass completes and that are gathered right after it, in the groups in which they will be.
    pub(crate) completes: &'a [Vec<Slot>],
    /// Each row is the next token of an answer.
    pub(crate) answers: bool,
}

/// The pool and the model, on some device.
pub(crate) enum Compute {
    Host(Box<HostCompute>),
    Cuda(Box<CudaCompute>),
}

/// Memory into which cached blocks are loaded.
pub(crate) enum Staging {
    Host(HostPinned),
    Cuda(cairn_gpu::backend::cuda::CudaPinned),
}

impl AsRef<[u8]> for Staging {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Host(memory) => memory.as_ref(),
            Self::Cuda(memory) => memory.as_ref(),
        }
    }
}

impl AsMut<[u8]> for Staging {
    fn as_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Host(memory) => memory.as_mut(),
            Self::Cuda(memory) => memory.as_mut(),
        }
    }
}

/// Verified blocks that are to be placed.
pub(crate) enum LoadedBlocks {
    /// One after the other.
    Staged(Staging),
    /// Where the cache server has them; those on a GPU copied already.
    InPlace(Box<View>, Option<NearBlocks>),
}

/// Gives staging memory to loads, from any thread.
#[derive(Clone)]
pub(crate) enum Stager {
    Host,
    Cuda(cairn_gpu::backend::cuda::CudaDevice, Option<Near>),
}

impl Stager {
    /// Whether the device copies out of memory that others have mapped, or opened to it.
    pub(crate) fn reads_in_place(&self) -> bool {
        self.near().is_some() || matches!(self, Self::Cuda(device, _) if device.registers_read_only())
    }

    /// The way to the memory of GPUs, if there is one.
    pub(crate) fn near(&self) -> Option<&Near> {
        match self {
            Self::Cuda(_, near) => near.as_ref(),
            Self::Host => None,
        }
    }

    pub(crate) fn allocate(&self, bytes: usize) -> Result<Staging, DeviceError> {
        match self {
            Self::Host => HostDevice.allocate_pinned(bytes).map(Staging::Host),
            Self::Cuda(device, _) => device.lend_pinned(bytes).map(Staging::Cuda),
        }
    }
}

/// Blocks on their way out of the pool, one after the other in canonical order.
pub(crate) enum Gathered {
    /// They are here.
    Ready(Bytes),
    /// They are once the event has completed.
    Later(Event, cuda::Leaving),
}

impl Gathered {
    /// Waits for the blocks.
    pub(crate) async fn bytes(self) -> Result<Bytes, DeviceError> {
        match self {
            Self::Ready(bytes) => Ok(bytes),
            Self::Later(event, leaving) => {
                event.await?;
                leaving.arrived().await
            }
        }
    }
}

impl Compute {
    /// Takes the pool's memory, and brings the model to the device.
    ///
    /// `rows` and `wanted`: of a pass, at most.
    pub(crate) fn new(
        device: &ComputeDevice,
        model: &Arc<Model>,
        shape: PagedShape,
        (rows, wanted): (usize, usize),
    ) -> Result<Self, DeviceError> {
        let (device, why) = device.resolve(&model.config, shape.block_tokens);
        match device {
            ComputeDevice::Cuda { ordinal, folders } => {
                let made = CudaCompute::new(ordinal, folders, model, shape, (rows, wanted))?;
                Ok(Self::Cuda(Box::new(made)))
            }
            ComputeDevice::Cpu | ComputeDevice::Auto { .. } => {
                tracing::info!(why, "computing on the CPU");
                Ok(Self::Host(Box::new(HostCompute::new(model.clone(), shape)?)))
            }
        }
    }

    /// For loads.
    pub(crate) fn stager(&self) -> Stager {
        match self {
            Self::Host(_) => Stager::Host,
            Self::Cuda(compute) => compute.stager(),
        }
    }

    /// Computes a pass: a token for each row that wants one.
    pub(crate) fn pass(&mut self, pass: &Pass<'_>) -> Result<Vec<u32>, DeviceError> {
        match self {
            Self::Host(compute) => Ok(compute.pass(pass)),
            Self::Cuda(compute) => compute.pass(pass),
        }
    }

    /// Whether the next pass waits for blocks that are on their way: then its time is not that of computing.
    pub(crate) fn is_loading(&self) -> bool {
        match self {
            Self::Host(_) => false,
            Self::Cuda(compute) => compute.is_loading(),
        }
    }

    /// Puts loaded blocks into slots of the pool. On a device this is issued and overlaps with the passes that follow: each of their
    /// layers waits for its own part.
    pub(crate) fn place(&mut self, blocks: LoadedBlocks, slots: &[Slot]) -> Result<(), DeviceError> {
        use LoadedBlocks::{InPlace, Staged};
        match (self, blocks) {
            (Self::Host(compute), Staged(Staging::Host(staging))) => compute.place(staging, slots),
            (Self::Cuda(compute), Staged(Staging::Cuda(staging))) => compute.place(staging, slots),
            (Self::Cuda(compute), InPlace(view, near)) => compute.place_view(*view, near, slots),
            _ => Err(DeviceError::Failed("staging memory of another device".into())),
        }
    }

    /// Takes complete blocks out of the pool.
    pub(crate) fn gather(&mut self, slots: &[Slot]) -> Result<Gathered, DeviceError> {
        match self {
            Self::Host(compute) => Ok(Gathered::Ready(compute.gather(slots))),
            Self::Cuda(compute) => compute.gather(slots),
        }
    }
}

/// Blocks one after the other, and the slots they belong to.
fn moves(shape: &PagedShape, slots: &[Slot]) -> Vec<BlockMove> {
    let bytes = shape.block_bytes();
    let place = |(i, slot): (usize, &Slot)| BlockMove { staging_offset: i * bytes, slot: slot.0 as usize };
    slots.iter().enumerate().map(place).collect()
}

/// For maps and lists that loads share: every change is a single insertion or removal, so a panic elsewhere leaves the whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
