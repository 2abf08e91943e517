//! On a CUDA device: passes on one stream, loads and gathers on two others, and the waits between them.
//!
//! Loads: blocks go from pinned memory into the pool layer by layer on the load stream; a pass waits before each layer for that
//! layer's part only. Gathers: a block that a pass completes leaves on the gather stream layer by layer, as soon as the layer has written it.
//! A slot whose block is still leaving is not written before it has left.

use super::registered::Registered;
use super::{Gathered, Near, NearBlocks, Pass, Stager, heads, moves};
use crate::model::Model;
use bytes::Bytes;
use cairn_client::View;
use cairn_gpu::backend::cuda::{
    BatchRow, CudaDevice, CudaMemory, CudaPinned, CudaShared, CudaStream, Decoder, DecoderLoader,
    DecoderShape, Hooks, KernelFolders, KernelSpec, LayerSource, MoveKernels, Plan, Pool,
};
use cairn_gpu::{BlockMove, Buffer, Device, DeviceError, Event, KvType, PagedShape, Priority, Slot, Stream};
use cairn_kernels::PackedMatrix;
use cairn_kernels::WeightType;
use cairn_kernels::cuda::ActType;
use half::bf16;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Rows for which passes of answers are captured.
const GRAPH_ROWS: [usize; 10] = [1, 2, 4, 8, 12, 16, 24, 32, 48, 64];

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
    /// Rows of a pass, and results, at most.
    most_rows: usize,
    /// Slots that are being read, by the event after which they are not.
    leaving: HashMap<Slot, Event>,
    /// The cache server's host memory.
    registered: Arc<Registered>,
    /// For copies that are verified here.
    near: Option<Near>,
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
        let registered = Arc::new(Registered::new(&device));
        let near = Near::new(&device, registered.clone());
        let near = near
            .inspect_err(|error| tracing::warn!(%error, "no blocks are verified on the device; those on GPUs come by way of host memory"))
            .ok();
        tracing::info!(device = device.name(), pool_bytes = shape.pool_bytes(), "computing on CUDA");
        Ok(Self {
            decoder,
            kernels,
            pool,
            shape,
            loads: device.stream(Priority::Foreground)?,
            gathers: device.stream(Priority::Background)?,
            loading: vec![Vec::new(); shape.layers],
            most_rows: rows.min(wanted),
            leaving: HashMap::new(),
            registered,
            near,
            complete: Vec::new(),
            device,
        })
    }

    pub(super) fn stager(&self) -> Stager {
        Stager::Cuda(self.device.clone(), self.near.clone())
    }

    /// Logits of the rows that want a token.
    pub(super) fn logits(&mut self, pass: &Pass<'_>) -> Result<Vec<f32>, DeviceError> {
        self.pass(pass)?;
        self.decoder.logits(pass.wanted.len())
    }

    pub(super) fn pass(&mut self, pass: &Pass<'_>) -> Result<Vec<u32>, DeviceError> {
        match self.try_pass(pass) {
            // It stores the same once more, behind what was issued already.
            Err(DeviceError::OutOfMemory { .. }) if self.near.as_ref().is_some_and(Near::let_go) => {
                self.try_pass(pass)
            }
            passed => passed,
        }
    }

    fn try_pass(&mut self, pass: &Pass<'_>) -> Result<Vec<u32>, DeviceError> {
        self.complete.clear();
        self.wait_for_leaving(pass)?;
        self.loading.iter_mut().for_each(|layer| layer.retain(|event| event.outcome().is_none()));
        let mut rows: Vec<BatchRow<'_>> = pass
            .rows
            .iter()
            .map(|row| BatchRow { token: row.token, position: row.position, slots: row.slots })
            .collect();
        let mut wanted: Vec<usize> = pass.wanted.iter().map(|(row, _)| *row).collect();
        let settings: Vec<_> = pass.wanted.iter().map(|(_, setting)| *setting).collect();
        let captured = pass.answers && !self.is_loading();
        if captured {
            self.pad(&mut rows, &mut wanted);
        }
        let plan =
            Plan::new(self.decoder.spec().shape, self.decoder.limits(self.shape.slots), &rows, &wanted)?;
        let pool = Pool { memory: &self.pool, shape: &self.shape };
        if captured {
            // What it completes leaves afterwards.
            self.decoder.forward_answers(pool, plan)?;
            return self.decoder.sample(&settings);
        }
        // What finds no memory to go to now is gathered when it is asked for, or not at all.
        let mut leaving: Vec<Leaves<'_>> = Vec::new();
        for slots in pass.completes {
            if let Ok(memory) = self.begin_gather(slots) {
                leaving.push((slots, memory, moves(&self.shape, slots)));
            }
        }
        let mut overlap = Overlap {
            loading: &mut self.loading,
            gathers: &self.gathers,
            kernels: &self.kernels,
            pool: &self.pool,
            leaving: &leaving,
        };
        self.decoder.forward(pool, plan, &mut overlap)?;
        for (slots, memory, _) in leaving {
            let event = self.end_gather(slots)?;
            self.complete.push((slots.clone(), event, memory));
        }
        self.decoder.sample(&settings)
    }

    /// Whether passes have to wait for blocks that are on their way.
    pub(super) fn is_loading(&self) -> bool {
        self.loading.iter().flatten().any(|event| event.outcome().is_none())
    }

    /// The last row again, until a captured graph has the number of rows: it computes and stores the same once more.
    fn pad(&self, rows: &mut Vec<BatchRow<'_>>, wanted: &mut Vec<usize>) {
        let Some(last) = rows.last().copied() else { return };
        let padded = GRAPH_ROWS.into_iter().find(|padded| *padded >= rows.len());
        if let Some(padded) = padded.filter(|padded| *padded <= self.most_rows && wanted.len() == rows.len())
        {
            // Each with a result of its own: no row is chosen twice.
            wanted.extend(rows.len()..padded);
            rows.resize(padded, last);
        }
    }

    /// Before a slot is written again its block must have left.
    fn wait_for_leaving(&mut self, pass: &Pass<'_>) -> Result<(), DeviceError> {
        self.leaving.retain(|_, event| event.outcome().is_none());
        for row in pass.rows {
            let slot = row.slots[row.position / self.shape.block_tokens];
            if let Some(event) = self.leaving.get(&slot) {
                self.decoder.stream().wait(event)?;
            }
        }
        Ok(())
    }

    pub(super) fn place(&mut self, staging: CudaPinned, slots: &[Slot]) -> Result<(), DeviceError> {
        let staging = Buffer::Pinned(self.device.share(staging));
        self.scatter(&[(staging, moves(&self.shape, slots))], None)
    }

    /// Places verified blocks: those that were copied here, the others straight out of the cache server's host memory, or by way of one more copy
    /// where that cannot be registered.
    pub(super) fn place_view(
        &mut self,
        view: View,
        near: Option<NearBlocks>,
        slots: &[Slot],
    ) -> Result<(), DeviceError> {
        let mut sources: Vec<(Buffer<CudaDevice>, Vec<BlockMove>)> = Vec::new();
        let mut copied: Vec<(usize, Slot)> = Vec::new();
        let mut last: Option<(usize, usize)> = None;
        let mut copies_near: Option<(Buffer<CudaDevice>, Vec<BlockMove>)> = None;
        for (index, slot) in slots.iter().enumerate() {
            if let Some((memory, staging_offset)) = near.as_ref().and_then(|near| near.place(index)) {
                let (_, moves) = copies_near.get_or_insert_with(|| (Buffer::Device(memory), Vec::new()));
                moves.push(BlockMove { staging_offset, slot: slot.0 as usize });
                continue;
            }
            let found = view.mapping(index);
            let found =
                found.and_then(|(map, offset)| Some((self.registered.memory(&map, offset)?, map, offset)));
            let Some((memory, map, offset)) = found else {
                copied.push((index, *slot));
                continue;
            };
            let address = map.as_ptr().addr();
            let place = match last.filter(|(at, _)| *at == address) {
                Some((_, place)) => place,
                None => {
                    sources.push((Buffer::Pinned(memory), Vec::new()));
                    sources.len() - 1
                }
            };
            last = Some((address, place));
            sources[place].1.push(BlockMove { staging_offset: offset as usize, slot: slot.0 as usize });
        }
        if !copied.is_empty() {
            let bytes = self.shape.block_bytes();
            let mut staging = self.device.lend_pinned(copied.len() * bytes)?;
            for ((index, _), to) in copied.iter().zip(staging.as_mut().chunks_exact_mut(bytes)) {
                let block = view.block(*index).map_err(|outcome| DeviceError::Failed(outcome.to_string()))?;
                to.copy_from_slice(block);
            }
            let slots: Vec<Slot> = copied.into_iter().map(|(_, slot)| slot).collect();
            sources.push((Buffer::Pinned(self.device.share(staging)), moves(&self.shape, &slots)));
        }
        sources.extend(copies_near);
        self.scatter(&sources, Some((view, near)))
    }

    /// Issues the moves, layer by layer. Until the device has read them the blocks of `view` stay as they are.
    fn scatter(
        &mut self,
        sources: &[(Buffer<CudaDevice>, Vec<BlockMove>)],
        mut view: Option<(View, Option<NearBlocks>)>,
    ) -> Result<(), DeviceError> {
        for each in sources.iter().flat_map(|(_, moves)| moves) {
            if let Some(event) = self.leaving.get(&Slot(each.slot as u32)) {
                self.loads.wait(event)?;
            }
        }
        let scattered = self.scatter_layers(sources, &mut view);
        if scattered.is_err() {
            // What was issued may still read the blocks, and write the slots: both are others' as soon as this returns.
            self.loads.synchronize().ok();
        }
        scattered
    }

    fn scatter_layers(
        &mut self,
        sources: &[(Buffer<CudaDevice>, Vec<BlockMove>)],
        view: &mut Option<(View, Option<NearBlocks>)>,
    ) -> Result<(), DeviceError> {
        for layer in 0..self.shape.layers {
            for (staging, moves) in sources {
                self.loads.scatter_layers(&self.kernels, layer..layer + 1, staging, &self.pool, moves)?;
            }
            if layer + 1 == self.shape.layers {
                self.loads.keep(view.take())?;
            }
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
        Ok(self.device.share(self.device.lend_pinned(bytes)?))
    }

    fn end_gather(&mut self, slots: &[Slot]) -> Result<Event, DeviceError> {
        let event = self.gathers.record()?;
        self.leaving.extend(slots.iter().map(|slot| (*slot, event.clone())));
        Ok(event)
    }
}

/// Blocks that leave: their slots, the memory they go to, and where each has its place.
type Leaves<'a> = (&'a Vec<Slot>, CudaShared, Vec<BlockMove>);

/// What happens beside the layers of a pass.
struct Overlap<'a> {
    loading: &'a mut [Vec<Event>],
    gathers: &'a CudaStream,
    kernels: &'a MoveKernels,
    pool: &'a CudaMemory,
    leaving: &'a [Leaves<'a>],
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
        for (_, memory, moves) in self.leaving {
            let staging = Buffer::Pinned(memory.clone());
            self.gathers.gather_layers(self.kernels, layer..layer + 1, self.pool, &staging, moves)?;
        }
        Ok(())
    }
}

pub(super) fn act_type(weights: WeightType) -> ActType {
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
