//! Checksums of blocks in device memory, for bytes that came from memory that others can write.

use super::CudaDevice;
use super::memory::CudaMemory;
use super::programs::Kernel;
use super::stream::{CudaStream, check_inside};
use crate::DeviceError;
use cairn_kernels::cuda::{ChecksumBlock, ChecksumParams, Program};
use std::sync::{Mutex, PoisonError};

/// Bytes whose state is scrambled together.
const CHUNK_BYTES: usize = 1024;

/// Chunks that one block of threads sums up.
const CHUNKS_AT_ONCE: usize = 8;

/// Shorter inputs have other checksums.
const LEAST_BYTES: usize = 256;

/// Blocks of one launch, and bytes of what is between the two kernels.
const BLOCKS_AT_ONCE: usize = 1024;
const SUMS_BYTES: usize = 32 << 20;

/// The kernels, and their memory from one use to the next.
pub struct Checksums {
    sums: Kernel<ChecksumParams>,
    chain: Kernel<ChecksumParams>,
    scratch: Mutex<Option<CudaMemory>>,
}

impl Checksums {
    /// Compiles or loads them.
    ///
    /// # Errors
    /// When NVRTC or the driver refuses.
    pub fn load(device: &CudaDevice) -> Result<Self, DeviceError> {
        let (programs, context, program) = (&device.programs, device.context(), Program::checksum());
        Ok(Self {
            sums: programs.kernel(context, &program, c"checksum_sums")?,
            chain: programs.kernel(context, &program, c"checksum_chain")?,
            scratch: Mutex::default(),
        })
    }

    /// Whether [`Self::of`] takes blocks of so many bytes.
    pub const fn can_be_made(bytes: usize) -> bool {
        bytes >= LEAST_BYTES && bytes.is_multiple_of(16)
    }

    /// XXH3-128 of blocks of `bytes` each, given where each begins in `data` and its seed; little endian. Blocks the thread until all that
    /// was issued to the stream has ended.
    ///
    /// # Errors
    /// When a block is not inside, its size or place is no multiple of 16, it is too short, or the device fails.
    pub fn of(
        &self,
        stream: &CudaStream,
        data: &CudaMemory,
        bytes: usize,
        blocks: &[(usize, u64)],
    ) -> Result<Vec<[u8; 16]>, DeviceError> {
        if !Self::can_be_made(bytes) {
            return Err(DeviceError::Failed(format!(
                "no checksum of {bytes} bytes: at least {LEAST_BYTES}, and a multiple of 16"
            )));
        }
        for (offset, _) in blocks {
            check_inside(*offset, bytes, data.len())?;
            if !offset.is_multiple_of(16) {
                return Err(DeviceError::Failed("a block at no multiple of 16 bytes".into()));
            }
        }
        let chunks = (bytes - 1) / CHUNK_BYTES;
        let at_once = (SUMS_BYTES / (chunks * 64).max(1)).clamp(1, BLOCKS_AT_ONCE);
        let mut found = Vec::with_capacity(blocks.len());
        for part in blocks.chunks(at_once) {
            found.extend(self.part(stream, data, (bytes, chunks), part)?);
        }
        Ok(found)
    }

    fn part(
        &self,
        stream: &CudaStream,
        data: &CudaMemory,
        (bytes, chunks): (usize, usize),
        blocks: &[(usize, u64)],
    ) -> Result<Vec<[u8; 16]>, DeviceError> {
        let count = blocks.len();
        // What comes back is first.
        let (entries, sums) = (16 * count, 32 * count);
        let scratch = self.scratch(stream, sums + count * chunks * 64)?;
        let block = |(offset, seed): &(usize, u64)| ChecksumBlock { offset: *offset as u64, seed: *seed };
        let described: Vec<ChecksumBlock> = blocks.iter().map(block).collect();
        stream.upload(bytemuck::cast_slice(&described), &scratch, entries)?;
        let params = ChecksumParams {
            data: data.address(),
            blocks: scratch.address() + entries as u64,
            sums: scratch.address() + sums as u64,
            out: scratch.address(),
            bytes: bytes as u64,
            count: count as u32,
            chunks: chunks as u32,
        };
        let summing = [chunks.div_ceil(CHUNKS_AT_ONCE) as u32, count as u32, 1];
        // SAFETY: every block was checked to lie inside the data, the scratch memory has room for the rest, and both are kept.
        let launched = unsafe {
            let sums = stream.launch(&self.sums, summing, 256, &params);
            sums.and_then(|()| stream.launch(&self.chain, [count as u32, 1, 1], 32, &params))
        };
        stream.keep((data.clone(), scratch.clone()))?;
        launched?;
        let out = stream.download(&scratch, entries)?;
        *self.scratch.lock().unwrap_or_else(PoisonError::into_inner) = Some(scratch);
        let (sums, _) = out.as_chunks::<16>();
        Ok(sums.to_vec())
    }

    /// Nobody else's meanwhile.
    fn scratch(&self, stream: &CudaStream, bytes: usize) -> Result<CudaMemory, DeviceError> {
        let kept = self.scratch.lock().unwrap_or_else(PoisonError::into_inner).take();
        match kept.filter(|kept| kept.len() >= bytes) {
            Some(kept) => Ok(kept),
            None => CudaMemory::allocate(stream.device().context(), bytes),
        }
    }
}
