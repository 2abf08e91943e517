//! The kernels of a model, launched safely: every buffer is checked to hold what the kernel does there, and kept until it has ended.

use super::CudaDevice;
use super::batch::Batch;
use super::memory::{CudaMemory, Part};
use super::programs::Kernel;
use super::stream::CudaStream;
use crate::{DeviceError, PagedShape};
use cairn_kernels::KvType;
use cairn_kernels::cuda::{
    ATTENTION_THREADS, ActType, AttentionParams, EmbedParams, GateParams, HeadShape, NormParams, Program,
    RotateParams, SAMPLE_THREADS, SampleParams, SampleSetting,
};
use std::f32::consts::LOG2_E;

/// What the kernels of a model are specialised by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KernelSpec {
    /// Of what goes into matrix products.
    pub act: ActType,
    /// Of the pool.
    pub kv_type: KvType,
    /// Heads and blocks.
    pub shape: HeadShape,
    /// Attention without tensor cores.
    pub plain: bool,
}

/// The kernels of one model on one device.
pub struct ModelKernels {
    spec: KernelSpec,
    embed: Kernel<EmbedParams>,
    rms_norm: Kernel<NormParams>,
    rotate: Kernel<RotateParams>,
    gate: Kernel<GateParams>,
    prefill: Kernel<AttentionParams>,
    decode: Kernel<AttentionParams>,
    merge: Kernel<AttentionParams>,
    sample: Kernel<SampleParams>,
}

/// What `rotate` adds to heads and normalises them by: `f32`, where the model has it.
#[derive(Clone, Default)]
pub struct HeadExtras {
    /// For queries, keys and values in order.
    pub bias: Option<CudaMemory>,
    /// Weights of the norms of query and key heads.
    pub norms: Option<(CudaMemory, CudaMemory)>,
}

/// The pool and the layer that a kernel works in.
#[derive(Clone, Copy)]
pub struct PoolLayer<'a> {
    /// The whole pool.
    pub pool: &'a CudaMemory,
    /// Its shape.
    pub shape: &'a PagedShape,
    /// Which layer.
    pub layer: usize,
}

/// Room for partial results of [`ModelKernels::attend`], grown as needed.
#[derive(Default)]
pub struct Partials(Option<(CudaMemory, CudaMemory)>);

impl ModelKernels {
    /// Compiles or loads them.
    ///
    /// # Errors
    /// When the shape is not supported, or NVRTC or the driver refuses.
    pub fn load(device: &CudaDevice, spec: KernelSpec) -> Result<Self, DeviceError> {
        spec.shape.check().map_err(DeviceError::Failed)?;
        let (programs, context) = (&device.programs, device.context());
        let layers = Program::layers(spec.act, spec.kv_type, &spec.shape);
        let attention = Program::attention(spec.act, spec.kv_type, &spec.shape, spec.plain);
        Ok(Self {
            spec,
            embed: programs.kernel(context, &layers, c"embed")?,
            rms_norm: programs.kernel(context, &layers, c"rms_norm")?,
            rotate: programs.kernel(context, &layers, c"rotate")?,
            gate: programs.kernel(context, &layers, c"gate")?,
            prefill: programs.kernel(context, &attention, c"prefill")?,
            decode: programs.kernel(context, &attention, c"decode")?,
            merge: programs.kernel(context, &attention, c"merge")?,
            sample: programs.kernel(context, &Program::sampling(), c"sample")?,
        })
    }

    /// What they were made for.
    pub fn spec(&self) -> &KernelSpec {
        &self.spec
    }

    /// `out[r] = table[token of r]`, `f32`, for a table of the batch's vocabulary in the format of products.
    ///
    /// # Errors
    /// When a buffer is too small.
    pub fn embed(
        &self,
        stream: &CudaStream,
        table: &Part<'_>,
        width: usize,
        batch: &Batch,
        out: &Part<'_>,
    ) -> Result<(), DeviceError> {
        let rows = batch.plan().rows();
        let vocabulary = batch.plan().limits().vocabulary;
        let params = EmbedParams {
            table: table.holding(vocabulary * width * self.spec.act.bytes())?,
            tokens: batch.tokens(),
            out: out.holding(rows * width * 4)?,
            rows: rows as u32,
            width: eights(width)?,
        };
        // SAFETY: tokens are below the vocabulary; the buffers hold the rest and are kept.
        unsafe { stream.launch(&self.embed, [rows as u32, 1, 1], 128, &params)? };
        stream.keep((table.memory.clone(), batch.memory().clone(), out.memory.clone()))
    }

    /// `x += delta`, then `out = x / rms(x) * weight` in the format of products; of all `rows` of `x`, or of those that the batch chose.
    ///
    /// # Errors
    /// When a buffer is too small.
    #[allow(clippy::too_many_arguments)] // Each is one operand of the formula.
    pub fn rms_norm(
        &self,
        stream: &CudaStream,
        x: &Part<'_>,
        delta: Option<&Part<'_>>,
        weight: &Part<'_>,
        (rows, chosen): (usize, Option<&Batch>),
        (width, epsilon): (usize, f32),
        out: &Part<'_>,
    ) -> Result<(), DeviceError> {
        if chosen.is_some_and(|batch| batch.plan().rows() > rows) {
            return Err(DeviceError::Failed("rows are chosen from a larger batch".into()));
        }
        let results = chosen.map_or(rows, |batch| batch.plan().chosen());
        let params = NormParams {
            x: x.holding(rows * width * 4)?,
            delta: delta.map_or(Ok(0), |delta| delta.holding(rows * width * 4))?,
            weight: weight.holding(width * 4)?,
            chosen: chosen.map_or(0, Batch::chosen),
            out: out.holding(results * width * self.spec.act.bytes())?,
            width: eights(width)?,
            epsilon,
        };
        // SAFETY: chosen rows are rows of the batch, and so of `x`; the buffers hold the rest and are kept.
        unsafe { stream.launch(&self.rms_norm, [results as u32, 1, 1], 256, &params)? };
        let of_batch = chosen.map(|batch| batch.memory().clone());
        stream.keep((
            x.memory.clone(),
            delta.map(|delta| delta.memory.clone()),
            weight.memory.clone(),
            of_batch,
            out.memory.clone(),
        ))
    }

    /// Biases, norms and rotary positions of `qkv`'s heads (`f32`); queries to `queries`, keys and values into the pool. `rope` has
    /// `head_dim` numbers for each position of the batch's limits.
    ///
    /// # Errors
    /// When a buffer is too small, or the pool has another shape.
    #[allow(clippy::too_many_arguments)] // Each is one operand.
    pub fn rotate(
        &self,
        stream: &CudaStream,
        qkv: &Part<'_>,
        (extras, epsilon): (&HeadExtras, f32),
        rope: &Part<'_>,
        batch: &Batch,
        queries: &Part<'_>,
        at: PoolLayer<'_>,
    ) -> Result<(), DeviceError> {
        let HeadShape { kv_heads, group, head_dim, .. } = self.spec.shape;
        self.check_pool(&at, batch)?;
        let (heads, rows) = (kv_heads * group, batch.plan().rows());
        let all = heads + 2 * kv_heads;
        let norm = |which: fn(&(CudaMemory, CudaMemory)) -> &CudaMemory| {
            extras.norms.as_ref().map_or(Ok(0), |norms| which(norms).all().holding(head_dim * 4))
        };
        let params = RotateParams {
            qkv: qkv.holding(rows * all * head_dim * 4)?,
            bias: extras.bias.as_ref().map_or(Ok(0), |bias| bias.all().holding(all * head_dim * 4))?,
            query_norm: norm(|norms| &norms.0)?,
            key_norm: norm(|norms| &norms.1)?,
            rope: rope.holding(batch.plan().limits().positions * head_dim * 4)?,
            positions: batch.positions(),
            tables: batch.tables(),
            starts: batch.starts(),
            queries: queries.holding(rows * heads * head_dim * self.spec.kv_type.bytes())?,
            pool: at.pool.address(),
            rows: rows as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            layer: at.layer as u32,
            slots: at.shape.slots as u32,
            epsilon,
        };
        let blocks = (rows * all).div_ceil(8) as u32;
        // SAFETY: positions and slots of the batch are in range for the table and the pool; the buffers hold the rest and are kept.
        unsafe { stream.launch(&self.rotate, [blocks, 1, 1], 256, &params)? };
        stream.keep((
            (qkv.memory.clone(), extras.clone(), rope.memory.clone()),
            (batch.memory().clone(), queries.memory.clone(), at.pool.clone()),
        ))
    }

    /// `out = silu(gate) * up` for rows of gates and then ups (`f32`), in the format of products.
    ///
    /// # Errors
    /// When a buffer is too small.
    pub fn gate(
        &self,
        stream: &CudaStream,
        gate_up: &Part<'_>,
        (rows, width): (usize, usize),
        out: &Part<'_>,
    ) -> Result<(), DeviceError> {
        let params = GateParams {
            gate_up: gate_up.holding(rows * 2 * width * 4)?,
            out: out.holding(rows * width * self.spec.act.bytes())?,
            rows: rows as u32,
            width: eights(width)?,
        };
        let blocks = (rows * width / 8).div_ceil(256).min(4096) as u32;
        // SAFETY: the buffers hold all rows and are kept.
        unsafe { stream.launch(&self.gate, [blocks, 1, 1], 256, &params)? };
        stream.keep((gate_up.memory.clone(), out.memory.clone()))
    }

    /// `out = softmax(scale * q . K) . V` for every row of the batch over its context in the pool.
    ///
    /// # Errors
    /// When a buffer is too small, or the pool has another shape.
    #[allow(clippy::too_many_arguments)] // Each is one operand.
    pub fn attend(
        &self,
        stream: &CudaStream,
        queries: &Part<'_>,
        scale: f32,
        batch: &Batch,
        at: PoolLayer<'_>,
        partials: &mut Partials,
        out: &Part<'_>,
    ) -> Result<(), DeviceError> {
        let HeadShape { kv_heads, group, head_dim, .. } = self.spec.shape;
        self.check_pool(&at, batch)?;
        let elements = batch.plan().rows() * kv_heads * group * head_dim;
        let (prefill, decode) = (batch.prefill(), batch.decode());
        let splits = batch.plan().splits();
        let places = decode.count as usize * kv_heads * splits * group;
        let (partial, partial_ml) = partials.holding(stream, places * head_dim * 4, places * 8)?;
        let params = AttentionParams {
            queries: queries.holding(elements * self.spec.kv_type.bytes())?,
            out: out.holding(elements * self.spec.act.bytes())?,
            pool: at.pool.address(),
            tables: batch.tables(),
            tiles: prefill.address,
            partial: partial.address(),
            partial_ml: partial_ml.address(),
            count: prefill.count,
            splits: splits as u32,
            layer: at.layer as u32,
            slots: at.shape.slots as u32,
            scale: scale * LOG2_E,
            padding: 0,
        };
        let heads = kv_heads as u32;
        let alone = AttentionParams { tiles: decode.address, count: decode.count, ..params };
        let warps = (heads * group as u32).div_ceil(4);
        // SAFETY: the tiles of the batch name its rows, their slots are of the pool, partial results have their room, and all is kept.
        let launched = unsafe {
            let together = [prefill.count.div_ceil(4), heads, 1];
            let spread = [(splits as u32).div_ceil(4), heads, decode.count];
            stream
                .launch(&self.prefill, together, ATTENTION_THREADS, &params)
                .and_then(|()| stream.launch(&self.decode, spread, ATTENTION_THREADS, &alone))
                .and_then(|()| {
                    stream.launch(&self.merge, [warps, decode.count, 1], ATTENTION_THREADS, &alone)
                })
        };
        stream.keep((
            (queries.memory.clone(), batch.memory().clone(), at.pool.clone()),
            (partial, partial_ml, out.memory.clone()),
        ))?;
        launched
    }

    /// A token for each of so many rows of logits (`f32`), to `out` (`u32`); `settings` holds a [`SampleSetting`] for each.
    ///
    /// # Errors
    /// When a buffer is too small.
    pub fn sample(
        &self,
        stream: &CudaStream,
        logits: &Part<'_>,
        (rows, width): (usize, usize),
        settings: &Part<'_>,
        out: &Part<'_>,
    ) -> Result<(), DeviceError> {
        if width == 0 {
            return Err(DeviceError::Failed("no logits to choose from".into()));
        }
        let params = SampleParams {
            logits: logits.holding(rows * width * 4)?,
            settings: settings.holding(rows * size_of::<SampleSetting>())?,
            out: out.holding(rows * 4)?,
            width: width as u32,
            padding: 0,
        };
        // SAFETY: the buffers hold all rows and are kept.
        unsafe { stream.launch(&self.sample, [rows as u32, 1, 1], SAMPLE_THREADS, &params)? };
        stream.keep((logits.memory.clone(), settings.memory.clone(), out.memory.clone()))
    }

    fn check_pool(&self, at: &PoolLayer<'_>, batch: &Batch) -> Result<(), DeviceError> {
        let HeadShape { kv_heads, head_dim, block_tokens, .. } = self.spec.shape;
        let PagedShape { layers, kv_heads: h, head_dim: d, block_tokens: t, slots, kv_type } = *at.shape;
        let fits = (h, d, t, kv_type) == (kv_heads, head_dim, block_tokens, self.spec.kv_type);
        if !fits || *batch.plan().shape() != self.spec.shape {
            return Err(DeviceError::Failed("the kernels were compiled for another shape".into()));
        }
        if at.layer >= layers || batch.plan().limits().slots > slots {
            return Err(DeviceError::OutOfBounds { offset: at.layer, end: at.layer + 1, len: layers });
        }
        if at.shape.checked_pool_bytes() != Some(at.pool.len()) {
            let from = at.shape.checked_pool_bytes().unwrap_or(usize::MAX);
            return Err(DeviceError::SizeMismatch { from, to: at.pool.len() });
        }
        Ok(())
    }
}

impl Partials {
    pub(super) fn bytes(&self) -> usize {
        self.0.as_ref().map_or(0, |(a, b)| a.len() + b.len())
    }

    fn holding(
        &mut self,
        stream: &CudaStream,
        outputs: usize,
        sums: usize,
    ) -> Result<(CudaMemory, CudaMemory), DeviceError> {
        if let Some((a, b)) = &self.0
            && a.len() >= outputs
            && b.len() >= sums
        {
            return Ok((a.clone(), b.clone()));
        }
        let context = stream.device().context();
        // Half again as much: contexts grow token by token.
        let make = |bytes: usize| CudaMemory::allocate(context, (bytes + bytes / 2).next_multiple_of(256));
        let made = (make(outputs)?, make(sums)?);
        self.0 = Some(made.clone());
        Ok(made)
    }
}

/// A width that the kernels can walk eight elements at a time.
fn eights(width: usize) -> Result<u32, DeviceError> {
    match u32::try_from(width) {
        Ok(narrow) if width.is_multiple_of(8) && width > 0 => Ok(narrow),
        _ => Err(DeviceError::Failed(format!("rows of {width} elements; multiples of 8 only"))),
    }
}
