//! Blocks between staging memory and a pool: one launch for many of them, and some or all of their layers.

use super::CudaDevice;
use super::memory::{CudaMemory, CudaPinned};
use super::programs::{Kernel, MoveKernels};
use super::stream::{CudaStream, Span, address, check_inside, check_writable, len};
use crate::{BlockMove, Buffer, DeviceError};
use cairn_kernels::cuda::{MoveEntry, MoveParams};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// Moves of one launch: the size of a stream's descriptor buffers.
const MOVES_PER_LAUNCH: usize = 4096;

/// Blocks of a launch that moves KV: each of its warps takes tasks until none is left.
const MOVE_BLOCKS: u32 = 2048;

/// The same where one side is host memory. Each has 32 KiB on its way, so these keep any bus busy; more would wait for it on every
/// multiprocessor, where the layers that are computed meanwhile want to be.
const HOST_MOVE_BLOCKS: u32 = 32;

/// Where the moves of one launch are written before and while it runs.
pub(super) struct Descriptors {
    host: CudaPinned,
    device: CudaMemory,
}

/// Returns descriptors to their stream when a launch has ended.
struct Borrowed(Option<Descriptors>, Arc<Mutex<Vec<Descriptors>>>);

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.1.lock().unwrap_or_else(PoisonError::into_inner).extend(self.0.take());
    }
}

impl CudaStream {
    fn borrow_descriptors(&self) -> Result<Descriptors, DeviceError> {
        if let Some(free) = self.descriptors.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(free);
        }
        let bytes = MOVES_PER_LAUNCH * size_of::<MoveEntry>();
        let device = CudaMemory::allocate(&self.raw.context, bytes)?;
        Ok(Descriptors { host: CudaPinned::allocate(&self.raw.context, bytes)?, device })
    }

    /// Issues the moves of some layers of blocks. See [`crate::Stream::scatter`].
    ///
    /// # Errors
    /// When a block or layer does not fit; nothing is issued then.
    pub fn scatter_layers(
        &self,
        kernels: &MoveKernels,
        layers: Range<usize>,
        staging: &Buffer<CudaDevice>,
        pool: &CudaMemory,
        moves: &[BlockMove],
    ) -> Result<(), DeviceError> {
        self.move_blocks(kernels, &kernels.scatter, layers, staging, pool, moves)
    }

    /// The inverse of [`Self::scatter_layers`].
    ///
    /// # Errors
    /// When a block or layer does not fit; nothing is issued then.
    pub fn gather_layers(
        &self,
        kernels: &MoveKernels,
        layers: Range<usize>,
        pool: &CudaMemory,
        staging: &Buffer<CudaDevice>,
        moves: &[BlockMove],
    ) -> Result<(), DeviceError> {
        check_writable(staging)?;
        self.move_blocks(kernels, &kernels.gather, layers, staging, pool, moves)
    }

    fn move_blocks(
        &self,
        kernels: &MoveKernels,
        kernel: &Kernel<MoveParams>,
        layers: Range<usize>,
        staging: &Buffer<CudaDevice>,
        pool: &CudaMemory,
        moves: &[BlockMove],
    ) -> Result<(), DeviceError> {
        let shape = &kernels.shape;
        check_moves(kernels, &layers, staging, pool, moves)?;
        for part in moves.chunks(MOVES_PER_LAUNCH) {
            let entry = |each: &BlockMove| MoveEntry {
                staging_offset: each.staging_offset as u64,
                slot: each.slot as u64,
            };
            let entries: Vec<MoveEntry> = part.iter().map(entry).collect();
            let bytes = bytemuck::cast_slice(&entries);
            let mut descriptors = self.borrow_descriptors()?;
            descriptors.host.as_mut()[..bytes.len()].copy_from_slice(bytes);
            let source = descriptors.host.address();
            let target = descriptors.device.address();
            let params = MoveParams {
                staging: address(staging),
                pool: pool.address(),
                moves: target,
                count: part.len() as u32,
                slots: shape.slots as u32,
                first_layer: layers.start as u32,
                layers: layers.len() as u32,
                all_layers: shape.layers as u32,
                padding: 0,
            };
            let tasks = part.len() * layers.len() * 2 * shape.kv_heads;
            let most = if matches!(staging, Buffer::Pinned(_)) { HOST_MOVE_BLOCKS } else { MOVE_BLOCKS };
            let blocks = (tasks.div_ceil(8) as u32).min(most);
            let copied = self.copy_spans(&[Span::new(source, target, bytes.len())]);
            // SAFETY: every block was checked to lie inside the staging memory and the pool; all of it is kept.
            let launched = copied.and_then(|()| unsafe { self.launch(kernel, [blocks, 1, 1], 256, &params) });
            let borrowed = Borrowed(Some(descriptors), self.descriptors.clone());
            self.keep((borrowed, staging.clone(), pool.clone()))?;
            launched?;
        }
        Ok(())
    }
}

fn check_moves(
    kernels: &MoveKernels,
    layers: &Range<usize>,
    staging: &Buffer<CudaDevice>,
    pool: &CudaMemory,
    moves: &[BlockMove],
) -> Result<(), DeviceError> {
    let shape = &kernels.shape;
    let block = kernels.wire_block_bytes();
    if shape.checked_pool_bytes() != Some(pool.len()) {
        return Err(DeviceError::SizeMismatch {
            from: shape.checked_pool_bytes().unwrap_or(usize::MAX),
            to: pool.len(),
        });
    }
    check_inside(layers.start, layers.len(), shape.layers)?;
    for each in moves {
        check_inside(each.staging_offset, block, len(staging))?;
        check_inside(each.slot, 1, shape.slots)?;
        if !each.staging_offset.is_multiple_of(16) || !address(staging).is_multiple_of(16) {
            return Err(DeviceError::Failed(
                "blocks in staging memory begin at multiples of 16 bytes".into(),
            ));
        }
    }
    Ok(())
}
