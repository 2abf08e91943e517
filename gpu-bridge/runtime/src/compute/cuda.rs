//! On a CUDA device: passes on one stream, loads and gathers on two others, and the waits between them.
//!
//! Loads: blocks go from pinned memory into the pool layer by layer on the load stream; a pass waits before each layer for that
//! layer's part only. Gathers: a block that a pass completes leaves on the gather stream layer by layer, as soon as the layer has written it.
//! A slot whose block is still leaving is not written before it has left.

use super::{Gathered, Pass, heads, moves};
use crate::model::Model;
use bytes::Bytes;
use cairn_gpu::backend::cuda::{
    BatchRow, CudaDevice, CudaMemory, CudaPinned, CudaShared, CudaStream, Decoder, DecoderLoader,
    DecoderShape, Hooks, KernelFolders, KernelSpec, LayerSource, MoveKernels, NoHooks, Plan, Pool,
};
use cairn_gpu::{BlockMove, Buffer, Device, DeviceError, Event, KvType, PagedShape, Priority, Slot, Stream};
use cairn_kernels::PackedMatrix;
use cairn_kernels::WeightType;
use cairn_kernels::cuda::ActType;
use half::bf16;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// How long the last handle of a gather's memory may lag behind its event.
const LETTING_GO: Duration = Duration::from_millis(1);

pub(crate) struct CudaCompute {
    device: CudaDevice,
    decoder: Decoder,
    kernels: Arc<MoveKernels>,
    pool: CudaMemory,
    shape: PagedShape,
    loads: CudaStream,
    gathers: CudaStream,
    /// Of each layer, what passes have to wait for.
    loading: Vec<Vec<Event>>,
    /// Slots that are being read, by the event after which they are not.
    leaving: HashMap<Slot, Event>,
    /// Blocks that the last pass completed, by their slots.
    complete: Vec<(Vec<Slot>, Event, CudaShared)>,
}

/// Memory that a gather writes.
pub(crate) struct Leaving {
    device: CudaDevice,
    memory: CudaShared,
}

impl Leaving {
    /// The bytes, once the event behind the gather has completed.
    pub(super) async fn arrived(self) -> Result<Bytes, DeviceError> {
        let mut memory = self.memory;
        loop {
            match self.device.reclaim(memory) {
                Ok(pinned) => return Ok(Bytes::from_owner(Arrived(pinned))),
                Err(back) => memory = back,
            }
            tokio::time::sleep(LETTING_GO).await;
        }
    }
}

/// Pinned memory behind the bytes of blocks.
struct Arrived(CudaPinned);

impl AsRef<[u8]> for Arrived {
    fn as_ref(&self) -> &[u8] {
        self.0.as_ref()
    }
}

impl CudaCompute {
    pub(super) fn new(
        ordinal: usize,
        folders: KernelFolders,
        model: &Arc<Model>,
        shape: PagedShape,
        (rows, wanted): (usize, usize),
    ) -> Result<Self, DeviceError> {
        let device = CudaDevice::open(ordinal, folders)?;
        let stream = Arc::new(device.stream(Priority::Foreground)?);
        let decoder = load(&device, stream, model, &shape, (rows, wanted))?;
        let kernels = device.move_kernels(shape)?;
        let pool = device.allocate(shape.pool_bytes())?;
        tracing::info!(device = device.name(), pool_bytes = shape.pool_bytes(), "computing on CUDA");
        Ok(Self {
            decoder,
            kernels,
            pool,
            shape,
            loads: device.stream(Priority::Foreground)?,
            gathers: device.stream(Priority::Background)?,
            loading: vec![Vec::new(); shape.layers],
            leaving: HashMap::new(),
            complete: Vec::new(),
            device,
        })
    }

    pub(super) fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// Logits of the rows that want a token.
    pub(super) fn logits(&mut self, pass: &Pass<'_>) -> Result<Vec<f32>, DeviceError> {
        self.pass(pass)?;
        self.decoder.logits(pass.wanted.len())
    }

    pub(super) fn pass(&mut self, pass: &Pass<'_>) -> Result<Vec<u32>, DeviceError> {
        self.complete.clear();
        self.wait_for_leaving(pass)?;
        let rows: Vec<BatchRow<'_>> = pass
            .rows
            .iter()
            .map(|row| BatchRow { token: row.token, position: row.position, slots: row.slots })
            .collect();
        let wanted: Vec<usize> = pass.wanted.iter().map(|(row, _)| *row).collect();
        let settings: Vec<_> = pass.wanted.iter().map(|(_, setting)| *setting).collect();
        let plan =
            Plan::new(self.decoder.spec().shape, self.decoder.limits(self.shape.slots), &rows, &wanted)?;
        let pool = Pool { memory: &self.pool, shape: &self.shape };
        let idle = self.loading.iter().all(Vec::is_empty) && pass.completes.is_empty();
        if pass.answers && idle {
            self.decoder.forward_answers(pool, plan)?;
            return self.decoder.sample(&settings);
        }
        let begin = |slots: &Vec<Slot>| Ok((self.begin_gather(slots)?, moves(&self.shape, slots)));
        let leaving = pass.completes.iter().map(begin).collect::<Result<Vec<_>, DeviceError>>()?;
        let mut overlap = Overlap {
            loading: &mut self.loading,
            gathers: &self.gathers,
            kernels: &self.kernels,
            pool: &self.pool,
            leaving: &leaving,
        };
        if idle {
            self.decoder.forward(pool, plan, &mut NoHooks)?;
        } else {
            self.decoder.forward(pool, plan, &mut overlap)?;
        }
        for (slots, (memory, _)) in pass.completes.iter().zip(leaving) {
            let event = self.end_gather(slots)?;
            self.complete.push((slots.clone(), event, memory));
        }
        self.decoder.sample(&settings)
    }

    /// Before a slot is written again its block must have left.
    fn wait_for_leaving(&mut self, pass: &Pass<'_>) -> Result<(), DeviceError> {
        self.leaving.retain(|_, event| event.outcome().is_none());
        for row in pass.rows {
            let slot = row.slots[row.position / self.shape.block_tokens];
            if let Some(event) = self.leaving.remove(&slot) {
                self.decoder.stream().wait(&event)?;
            }
        }
        Ok(())
    }

    pub(super) fn place(&mut self, staging: CudaPinned, slots: &[Slot]) -> Result<(), DeviceError> {
        for slot in slots {
            if let Some(event) = self.leaving.remove(slot) {
                self.loads.wait(&event)?;
            }
        }
        let staging = Buffer::Pinned(self.device.share(staging));
        let moves = moves(&self.shape, slots);
        for layer in 0..self.shape.layers {
            self.loads.scatter_layers(&self.kernels, layer..layer + 1, &staging, &self.pool, &moves)?;
            self.loading[layer].push(self.loads.record()?);
        }
        Ok(())
    }

    pub(super) fn gather(&mut self, slots: &[Slot]) -> Result<Gathered, DeviceError> {
        if let Some(ready) = self.complete.iter().position(|(complete, ..)| complete == slots) {
            let (_, event, memory) = self.complete.swap_remove(ready);
            return Ok(Gathered::Later(event, Leaving { device: self.device.clone(), memory }));
        }
        // Passes end before anything is gathered; loads may still be on their way.
        for layer in &self.loading {
            layer.iter().try_for_each(|event| self.gathers.wait(event))?;
        }
        let memory = self.begin_gather(slots)?;
        let staging = Buffer::Pinned(memory.clone());
        let moves = moves(&self.shape, slots);
        self.gathers.gather_layers(&self.kernels, 0..self.shape.layers, &self.pool, &staging, &moves)?;
        let event = self.end_gather(slots)?;
        Ok(Gathered::Later(event, Leaving { device: self.device.clone(), memory }))
    }

    fn begin_gather(&self, slots: &[Slot]) -> Result<CudaShared, DeviceError> {
        let bytes = slots.len() * self.shape.block_bytes();
        Ok(self.device.share(self.device.allocate_pinned(bytes)?))
    }

    fn end_gather(&mut self, slots: &[Slot]) -> Result<Event, DeviceError> {
        let event = self.gathers.record()?;
        self.leaving.extend(slots.iter().map(|slot| (*slot, event.clone())));
        Ok(event)
    }
}

/// What happens beside the layers of a pass.
struct Overlap<'a> {
    loading: &'a mut [Vec<Event>],
    gathers: &'a CudaStream,
    kernels: &'a MoveKernels,
    pool: &'a CudaMemory,
    leaving: &'a [(CudaShared, Vec<BlockMove>)],
}

impl Hooks for Overlap<'_> {
    fn before_layer(&mut self, stream: &CudaStream, layer: usize) -> Result<(), DeviceError> {
        std::mem::take(&mut self.loading[layer]).iter().try_for_each(|event| stream.wait(event))
    }

    fn after_layer(&mut self, stream: &CudaStream, layer: usize) -> Result<(), DeviceError> {
        if self.leaving.is_empty() {
            return Ok(());
        }
        self.gathers.wait(&stream.record()?)?;
        for (memory, moves) in self.leaving {
            let staging = Buffer::Pinned(memory.clone());
            self.gathers.gather_layers(self.kernels, layer..layer + 1, self.pool, &staging, moves)?;
        }
        Ok(())
    }
}

fn act_type(weights: WeightType) -> ActType {
    match weights {
        WeightType::F32 => ActType::F32,
        WeightType::Bf16 => ActType::Bf16,
    }
}

/// A matrix as the device wants it: row after row, in the format of products.
fn rows_of(matrix: &PackedMatrix, act: ActType) -> Vec<u8> {
    let mut row = vec![0.0; matrix.inputs()];
    let mut bytes = Vec::with_capacity(matrix.outputs() * matrix.inputs() * act.bytes());
    for index in 0..matrix.outputs() {
        matrix.row(index, &mut row);
        match act {
            ActType::F32 => bytes.extend_from_slice(bytemuck::cast_slice(&row)),
            ActType::Bf16 => bytes.extend(row.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes())),
            ActType::F16 => bytes.extend(row.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes())),
        }
    }
    bytes
}

fn load(
    device: &CudaDevice,
    stream: Arc<CudaStream>,
    model: &Model,
    shape: &PagedShape,
    (rows, wanted): (usize, usize),
) -> Result<Decoder, DeviceError> {
    let config = &model.config;
    let act = act_type(model.weights.embedding.format());
    let spec = KernelSpec {
        act,
        kv_type: shape.kv_type,
        shape: heads(config, shape.block_tokens),
        plain: shape.kv_type == KvType::F32,
    };
    let of_model = DecoderShape {
        layers: config.layers,
        hidden: config.hidden,
        intermediate: config.intermediate,
        vocabulary: config.vocabulary,
        positions: config.max_positions,
        epsilon: config.rms_epsilon,
        rows,
        chosen: wanted,
    };
    let mut loader = DecoderLoader::new(device, stream, spec, of_model)?;
    for layer in &model.weights.layers {
        let norms = layer.qk_norm.as_ref().map(|(query, key)| (query.as_slice(), key.as_slice()));
        loader.layer(LayerSource {
            input_norm: &layer.input_norm,
            qkv: rows_of(&layer.qkv, act),
            qkv_bias: layer.qkv_bias.as_deref(),
            qk_norm: norms,
            attention_output: rows_of(&layer.attention_output, act),
            post_norm: &layer.post_norm,
            gate_up: rows_of(&layer.gate_up, act),
            down: rows_of(&layer.down, act),
        })?;
    }
    let embedding = rows_of(&model.weights.embedding, act);
    let output = model.weights.output.as_ref().map(|output| rows_of(output, act));
    loader.finish(&embedding, output.as_deref(), &model.weights.final_norm, model.rope.numbers())
}
