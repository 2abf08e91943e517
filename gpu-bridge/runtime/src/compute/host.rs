//! On the CPU.

use super::{Pass, moves};
use crate::forward::Scratch;
use crate::model::Model;
use crate::sampling::choose;
use bytes::Bytes;
use cairn_gpu::{
    Buffer, Device, DeviceError, HostDevice, HostMemory, HostPinned, HostStream, PagedShape, Priority, Slot,
    Stream,
};
use std::sync::Arc;

pub(crate) struct HostCompute {
    model: Arc<Model>,
    shape: PagedShape,
    pool: HostMemory,
    stream: HostStream,
    scratch: Scratch,
}

impl HostCompute {
    pub(super) fn new(model: Arc<Model>, shape: PagedShape) -> Result<Self, DeviceError> {
        let pool = HostDevice.allocate(shape.pool_bytes())?;
        let stream = HostDevice.stream(Priority::Foreground)?;
        Ok(Self { model, shape, pool, stream, scratch: Scratch::default() })
    }

    /// Logits of the rows that want a token.
    pub(super) fn logits(&mut self, pass: &Pass<'_>) -> Vec<f32> {
        let wanted: Vec<usize> = pass.wanted.iter().map(|(row, _)| *row).collect();
        let Self { model, shape, pool, scratch, .. } = self;
        pool.write(|pool| model.forward(shape, pool, pass.rows, &wanted, scratch))
    }

    pub(super) fn pass(&mut self, pass: &Pass<'_>) -> Vec<u32> {
        let logits = self.logits(pass);
        let rows = logits.chunks_exact(self.model.config.vocabulary);
        rows.zip(pass.wanted).map(|(logits, (_, setting))| choose(logits, setting)).collect()
    }

    pub(super) fn place(&self, staging: HostPinned, slots: &[Slot]) -> Result<(), DeviceError> {
        let staging = Buffer::Pinned(HostDevice.share(staging));
        self.stream.scatter(self.shape, &staging, &self.pool, moves(&self.shape, slots))?;
        self.stream.record()?.wait()
    }

    pub(super) fn gather(&self, slots: &[Slot]) -> Bytes {
        let block = self.shape.block_bytes();
        let mut bytes = vec![0; slots.len() * block];
        self.pool.read(|pool| {
            for (slot, bytes) in slots.iter().zip(bytes.chunks_exact_mut(block)) {
                cairn_kernels::gather_block(&self.shape, pool, slot.0 as usize, bytes);
            }
        });
        Bytes::from(bytes)
    }
}
