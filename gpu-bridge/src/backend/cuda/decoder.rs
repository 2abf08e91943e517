//! A Llama-family decoder on a device: one pass of a batch of tokens, eagerly for prompts and as a captured graph for answers.
//!
//! The order of work is that of the runtime's CPU pass. The residual stream is single precision; what goes into matrix products and
//! the pool is rounded to their formats. Every row's bits follow from its sequence alone (see `gemm` and the attention kernels), so it does not
//! matter how rows are batched, cut or captured.

use super::CudaDevice;
use super::batch::{Batch, BatchLimits, Plan};
use super::capture::Graph;
use super::gemm::{Gemm, Weight};
use super::kernels::{HeadExtras, KernelSpec, ModelKernels, Partials, PoolLayer};
use super::memory::{CudaMemory, Part};
use super::stream::CudaStream;
use crate::{DeviceError, PagedShape};
use cairn_kernels::cuda::{SPLIT_KEYS, SampleSetting};
use std::collections::HashMap;
use std::sync::Arc;

/// Rows up to which a pass of answers is captured; more are issued eagerly, where launches cost little beside the work.
const GRAPH_ROWS: usize = 64;

/// Graphs that are kept: each is a few hundred launches.
const GRAPHS: usize = 64;

/// Everything about a model that its kernels do not know.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DecoderShape {
    /// Transformer layers.
    pub layers: usize,
    /// Elements of a hidden state.
    pub hidden: usize,
    /// Elements between the two products of a feed-forward block.
    pub intermediate: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Longest sequence.
    pub positions: usize,
    /// Of the norms.
    pub epsilon: f32,
    /// Rows of a pass, at most.
    pub rows: usize,
    /// Rows whose logits are wanted, at most.
    pub chosen: usize,
}

/// Numbers of a matrix or vector, row after row, on the host.
pub type Numbers<'a> = &'a [f32];

/// One layer on the host; the bytes of matrices are in the format of products.
pub struct LayerSource<'a> {
    /// Before attention.
    pub input_norm: Numbers<'a>,
    /// Rows of queries, then keys, then values.
    pub qkv: Vec<u8>,
    /// Added to their result.
    pub qkv_bias: Option<Numbers<'a>>,
    /// Norms of query and key heads.
    pub qk_norm: Option<(Numbers<'a>, Numbers<'a>)>,
    /// From heads to the hidden state.
    pub attention_output: Vec<u8>,
    /// Before the feed-forward block.
    pub post_norm: Numbers<'a>,
    /// Rows of gates, then ups.
    pub gate_up: Vec<u8>,
    /// Back to the hidden state.
    pub down: Vec<u8>,
}

struct Layer {
    input_norm: CudaMemory,
    qkv: Weight,
    extras: HeadExtras,
    attention_output: Weight,
    post_norm: CudaMemory,
    gate_up: Weight,
    down: Weight,
}

/// Buffers between the kernels of a pass.
struct Scratch {
    hidden: CudaMemory,
    normed: CudaMemory,
    qkv: CudaMemory,
    queries: CudaMemory,
    attended: CudaMemory,
    gate_up: CudaMemory,
    gated: CudaMemory,
    delta: CudaMemory,
    logits: CudaMemory,
    tokens: CudaMemory,
    settings: CudaMemory,
}

/// A model on a device, with one stream's buffers.
pub struct Decoder {
    stream: Arc<CudaStream>,
    kernels: ModelKernels,
    gemm: Arc<Gemm>,
    shape: DecoderShape,
    embedding: CudaMemory,
    layers: Vec<Layer>,
    final_norm: CudaMemory,
    /// None: the embedding serves.
    output: Weight,
    rope: CudaMemory,
    scratch: Scratch,
    partials: Partials,
    /// Counts passes of answers.
    clock: u64,
    /// Where the last eager pass had its batch.
    last_batch: Option<CudaMemory>,
    graphs: HashMap<GraphKey, Captured>,
}

/// Rows, splits, and the pool.
type GraphKey = (usize, usize, u64, PagedShape);

struct Captured {
    /// When it ran last.
    used: u64,
    batch: Batch,
    graph: Graph,
}

/// The pool that a pass reads and writes.
#[derive(Clone, Copy)]
pub struct Pool<'a> {
    /// Its memory.
    pub memory: &'a CudaMemory,
    /// Its shape.
    pub shape: &'a PagedShape,
}

/// What is done between the layers of an eager pass.
pub trait Hooks {
    /// Before a layer reads the pool: let the stream wait for what is loaded into it.
    ///
    /// # Errors
    /// Ends the pass.
    fn before_layer(&mut self, stream: &CudaStream, layer: usize) -> Result<(), DeviceError>;

    /// After a layer has written its keys and values.
    ///
    /// # Errors
    /// Ends the pass.
    fn after_layer(&mut self, stream: &CudaStream, layer: usize) -> Result<(), DeviceError>;
}

/// Nothing between layers.
pub struct NoHooks;

impl Hooks for NoHooks {
    fn before_layer(&mut self, _: &CudaStream, _: usize) -> Result<(), DeviceError> {
        Ok(())
    }

    fn after_layer(&mut self, _: &CudaStream, _: usize) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Uploads weights as they come, so that the host never holds more than one layer twice.
pub struct DecoderLoader {
    device: CudaDevice,
    stream: Arc<CudaStream>,
    kernels: ModelKernels,
    gemm: Arc<Gemm>,
    shape: DecoderShape,
    layers: Vec<Layer>,
}

impl DecoderLoader {
    /// Compiles the kernels.
    ///
    /// # Errors
    /// When the shape is not supported, or something of CUDA is missing.
    pub fn new(
        device: &CudaDevice,
        stream: Arc<CudaStream>,
        spec: KernelSpec,
        shape: DecoderShape,
    ) -> Result<Self, DeviceError> {
        let kernels = ModelKernels::load(device, spec)?;
        let gemm = Gemm::new(stream.clone(), spec.act)?;
        Ok(Self { device: device.clone(), stream, kernels, gemm, shape, layers: Vec::new() })
    }

    fn upload(&self, bytes: &[u8]) -> Result<CudaMemory, DeviceError> {
        let memory = CudaMemory::allocate(self.device.context(), bytes.len())?;
        self.stream.upload(bytes, &memory, 0)?;
        Ok(memory)
    }

    fn vector(&self, numbers: Numbers<'_>, elements: usize) -> Result<CudaMemory, DeviceError> {
        if numbers.len() != elements {
            return Err(DeviceError::SizeMismatch { from: numbers.len(), to: elements });
        }
        self.upload(bytemuck::cast_slice(numbers))
    }

    fn matrix(&self, bytes: &[u8], outputs: usize, inputs: usize) -> Result<Weight, DeviceError> {
        let expected = outputs * inputs * self.kernels.spec().act.bytes();
        if bytes.len() != expected {
            return Err(DeviceError::SizeMismatch { from: bytes.len(), to: expected });
        }
        self.gemm.weight(self.upload(bytes)?, outputs, inputs)
    }

    /// The next layer.
    ///
    /// # Errors
    /// When a tensor has another size than the shape says, or memory is short.
    pub fn layer(&mut self, source: LayerSource<'_>) -> Result<(), DeviceError> {
        let heads = self.kernels.spec().shape;
        let (queries, all) = (heads.kv_heads * heads.group, heads.kv_heads * (heads.group + 2));
        let d = heads.head_dim;
        let DecoderShape { hidden, intermediate, .. } = self.shape;
        let norms = match source.qk_norm {
            None => None,
            Some((query, key)) => Some((self.vector(query, d)?, self.vector(key, d)?)),
        };
        let bias = source.qkv_bias.map(|bias| self.vector(bias, all * d)).transpose()?;
        let layer = Layer {
            input_norm: self.vector(source.input_norm, hidden)?,
            qkv: self.matrix(&source.qkv, all * d, hidden)?,
            extras: HeadExtras { bias, norms },
            attention_output: self.matrix(&source.attention_output, hidden, queries * d)?,
            post_norm: self.vector(source.post_norm, hidden)?,
            gate_up: self.matrix(&source.gate_up, 2 * intermediate, hidden)?,
            down: self.matrix(&source.down, hidden, intermediate)?,
        };
        self.layers.push(layer);
        // The pinned copies of this layer go before the next is made.
        self.stream.synchronize()
    }

    /// The rest: `embedding` and `output` (none: the embedding again) in the format of products; `rope` with cosines and sines of every position.
    ///
    /// # Errors
    /// As [`Self::layer`], or when layers are missing.
    pub fn finish(
        self,
        embedding: &[u8],
        output: Option<&[u8]>,
        final_norm: Numbers<'_>,
        rope: Numbers<'_>,
    ) -> Result<Decoder, DeviceError> {
        let DecoderShape { hidden, vocabulary, positions, .. } = self.shape;
        if self.layers.len() != self.shape.layers {
            return Err(DeviceError::SizeMismatch { from: self.layers.len(), to: self.shape.layers });
        }
        let head_dim = self.kernels.spec().shape.head_dim;
        let rope = self.vector(rope, positions * head_dim)?;
        let final_norm = self.vector(final_norm, hidden)?;
        let embedded = self.matrix(embedding, vocabulary, hidden)?;
        let memory = embedded.memory().clone();
        let output = output.map_or(Ok(embedded), |output| self.matrix(output, vocabulary, hidden))?;
        let scratch = self.scratch()?;
        self.stream.synchronize()?;
        let Self { stream, kernels, gemm, shape, layers, .. } = self;
        let (partials, graphs) = (Partials::default(), HashMap::new());
        Ok(Decoder {
            stream,
            kernels,
            gemm,
            shape,
            embedding: memory,
            layers,
            final_norm,
            output,
            rope,
            scratch,
            partials,
            clock: 0,
            last_batch: None,
            graphs,
        })
    }

    fn scratch(&self) -> Result<Scratch, DeviceError> {
        let spec = self.kernels.spec();
        let DecoderShape { hidden, intermediate, vocabulary, rows, chosen, .. } = self.shape;
        let d = spec.shape.head_dim;
        let (queries, all) =
            (spec.shape.kv_heads * spec.shape.group * d, spec.shape.kv_heads * (spec.shape.group + 2) * d);
        let act = spec.act.bytes();
        let make = |bytes: usize| CudaMemory::allocate(self.device.context(), bytes);
        Ok(Scratch {
            hidden: make(rows * hidden * 4)?,
            normed: make(rows.max(chosen) * hidden * act)?,
            qkv: make(rows * all * 4)?,
            queries: make(rows * queries * spec.kv_type.bytes())?,
            attended: make(rows * queries * act)?,
            gate_up: make(rows * 2 * intermediate * 4)?,
            gated: make(rows * intermediate * act)?,
            delta: make(rows * hidden * 4)?,
            logits: make(chosen * vocabulary * 4)?,
            tokens: make(chosen * 4)?,
            settings: make(chosen * size_of::<SampleSetting>())?,
        })
    }
}

impl Decoder {
    /// The limits that its batches must be made with, for a pool of so many slots.
    pub fn limits(&self, slots: usize) -> BatchLimits {
        BatchLimits { vocabulary: self.shape.vocabulary, positions: self.shape.positions, slots }
    }

    /// What its kernels were made for.
    pub fn spec(&self) -> &KernelSpec {
        self.kernels.spec()
    }

    /// The stream that passes run on.
    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    fn check(&self, plan: &Plan) -> Result<(), DeviceError> {
        let (rows, chosen) = (plan.rows(), plan.chosen());
        if rows > self.shape.rows || chosen > self.shape.chosen {
            let text = format!(
                "a pass of {rows} rows and {chosen} results; {} and {} at most",
                self.shape.rows, self.shape.chosen
            );
            return Err(DeviceError::Failed(text));
        }
        Ok(())
    }

    /// Computes the rows of a plan, and stores their keys and values in the pool; leaves the logits of the chosen rows for
    /// [`Self::sample`] and [`Self::logits`]. Returns as soon as the work is issued.
    ///
    /// # Errors
    /// When the plan is too large, or the device refuses.
    pub fn forward(&mut self, pool: Pool<'_>, plan: Plan, hooks: &mut dyn Hooks) -> Result<(), DeviceError> {
        self.check(&plan)?;
        let batch = Batch::reusing(&self.stream, plan, self.last_batch.take())?;
        self.last_batch = Some(batch.memory().clone());
        let mut partials = std::mem::take(&mut self.partials);
        let result = self.issue(pool, &batch, &mut partials, hooks);
        self.partials = partials;
        result
    }

    /// As [`Self::forward`] for answers, each row a sequence of its own: the launches are captured once for a number of rows and a length of
    /// contexts, and run again.
    ///
    /// # Errors
    /// As there.
    pub fn forward_answers(&mut self, pool: Pool<'_>, plan: Plan) -> Result<(), DeviceError> {
        self.check(&plan)?;
        if !plan.is_decode() || plan.rows() > GRAPH_ROWS {
            return self.forward(pool, plan, &mut NoHooks);
        }
        let splits = plan.splits().next_power_of_two();
        let plan = plan.with_splits(splits);
        let key = (plan.rows(), splits, pool.memory.address(), *pool.shape);
        if self.graphs.get(&key).is_none_or(|captured| !captured.batch.takes(&plan)) {
            let captured = self.capture(pool, plan.clone())?;
            if self.graphs.len() >= GRAPHS {
                let oldest =
                    self.graphs.iter().min_by_key(|(_, captured)| captured.used).map(|(key, _)| *key);
                oldest.and_then(|key| self.graphs.remove(&key));
            }
            self.graphs.insert(key, captured);
        }
        let Some(captured) = self.graphs.get_mut(&key) else {
            return Err(DeviceError::Failed("a graph was captured and is gone".into()));
        };
        self.clock += 1;
        captured.used = self.clock;
        captured.batch.refill(&self.stream, plan)?;
        self.stream.run(&captured.graph)
    }

    fn capture(&mut self, pool: Pool<'_>, plan: Plan) -> Result<Captured, DeviceError> {
        // Room for the slots of contexts as long as the splits allow.
        let blocks = plan.splits() * SPLIT_KEYS / self.spec().shape.block_tokens;
        let words = plan.words() + plan.rows() * blocks;
        let batch = Batch::with_room(&self.stream, plan, words)?;
        // All graphs of the stream have their partial results in the same place; those that were captured before it grew keep the old one. A first
        // pass makes the room, and shows errors where they happen.
        let mut partials = std::mem::take(&mut self.partials);
        let before = partials.bytes();
        let issued =
            self.issue(pool, &batch, &mut partials, &mut NoHooks).and_then(|()| self.stream.synchronize());
        if partials.bytes() > before {
            self.graphs.clear();
        }
        let graph = issued
            .and_then(|()| self.stream.capture(|| self.issue(pool, &batch, &mut partials, &mut NoHooks)));
        self.partials = partials;
        Ok(Captured { used: self.clock, batch, graph: graph? })
    }

    fn issue(
        &self,
        pool: Pool<'_>,
        batch: &Batch,
        partials: &mut Partials,
        hooks: &mut dyn Hooks,
    ) -> Result<(), DeviceError> {
        let (stream, rows) = (&*self.stream, batch.plan().rows());
        let DecoderShape { hidden, intermediate, epsilon, .. } = self.shape;
        let s = &self.scratch;
        let scale = 1.0 / (self.spec().shape.head_dim as f32).sqrt();
        self.kernels.embed(stream, &self.embedding.all(), hidden, batch, &s.hidden.all())?;
        let delta = s.delta.all();
        let norm = |delta: Option<&Part<'_>>, weight: &CudaMemory| {
            let (x, out) = (s.hidden.all(), s.normed.all());
            self.kernels.rms_norm(stream, &x, delta, &weight.all(), (rows, None), (hidden, epsilon), &out)
        };
        for (index, layer) in self.layers.iter().enumerate() {
            norm((index > 0).then_some(&delta), &layer.input_norm)?;
            self.gemm.multiply(&layer.qkv, &s.normed.all(), rows, &s.qkv.all())?;
            hooks.before_layer(stream, index)?;
            let at = PoolLayer { pool: pool.memory, shape: pool.shape, layer: index };
            let extras = (&layer.extras, epsilon);
            self.kernels.rotate(
                stream,
                &s.qkv.all(),
                extras,
                &self.rope.all(),
                batch,
                &s.queries.all(),
                at,
            )?;
            hooks.after_layer(stream, index)?;
            self.kernels.attend(stream, &s.queries.all(), scale, batch, at, partials, &s.attended.all())?;
            self.gemm.multiply(&layer.attention_output, &s.attended.all(), rows, &delta)?;
            norm(Some(&delta), &layer.post_norm)?;
            self.gemm.multiply(&layer.gate_up, &s.normed.all(), rows, &s.gate_up.all())?;
            self.kernels.gate(stream, &s.gate_up.all(), (rows, intermediate), &s.gated.all())?;
            self.gemm.multiply(&layer.down, &s.gated.all(), rows, &delta)?;
        }
        let chosen = batch.plan().chosen();
        if chosen == 0 {
            return Ok(());
        }
        self.kernels.rms_norm(
            stream,
            &s.hidden.all(),
            Some(&delta),
            &self.final_norm.all(),
            (rows, Some(batch)),
            (hidden, epsilon),
            &s.normed.all(),
        )?;
        self.gemm.multiply(&self.output, &s.normed.all(), chosen, &s.logits.all())
    }

    /// Chooses a token for each of the last pass's chosen rows, and waits for all that was issued.
    ///
    /// # Errors
    /// When anything since the last wait failed.
    pub fn sample(&self, settings: &[SampleSetting]) -> Result<Vec<u32>, DeviceError> {
        if settings.is_empty() {
            self.stream.synchronize()?;
            return Ok(Vec::new());
        }
        let s = &self.scratch;
        let width = self.shape.vocabulary;
        self.stream.upload(bytemuck::cast_slice(settings), &s.settings, 0)?;
        let of = (settings.len(), width);
        self.kernels.sample(&self.stream, &s.logits.all(), of, &s.settings.all(), &s.tokens.all())?;
        let bytes = self.stream.download(&s.tokens, settings.len() * 4)?;
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }

    /// The logits of so many of the last pass's chosen rows, once all that was issued has ended.
    ///
    /// # Errors
    /// When anything since the last wait failed.
    pub fn logits(&self, rows: usize) -> Result<Vec<f32>, DeviceError> {
        let bytes = self.stream.download(&self.scratch.logits, rows * self.shape.vocabulary * 4)?;
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }
}
