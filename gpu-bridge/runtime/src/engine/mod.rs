//! The engine: continuous batching of sequences over one paged pool, on a thread of its own. Callers submit requests and
//! receive updates; the cache is reached through [`crate::share`], never from this thread.

mod costs;
mod run;
mod sequence;

pub(crate) use sequence::Sequence;
pub use sequence::{Finish, Summary, Update, Updates};

use crate::compute::{Compute, ComputeDevice};
use crate::model::Model;
use crate::sampling::Sampling;
use crate::share::{Loaded, Share};
use cairn_gpu::{DeviceError, KvType, PagedShape};
use std::sync::Arc;
use thiserror::Error;
use tokio::sync::mpsc;

/// Requests and finished loads on their way to the engine.
const COMMAND_QUEUE: usize = 1024;

/// Settings of an engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Number format of the pool and of published blocks.
    pub kv_type: KvType,
    /// Tokens of a block; a multiple of 16.
    pub block_tokens: usize,
    /// Tokens that the pool holds.
    pub pool_tokens: usize,
    /// Tokens computed in one pass: more is faster in all, less lets running answers go on sooner.
    pub chunk_tokens: usize,
    /// Sequences in progress at a time.
    pub max_sequences: usize,
    /// Requests waiting beyond those; more are refused.
    pub max_waiting: usize,
    /// Keep the blocks of ended sequences for later ones while there is room.
    pub local_reuse: bool,
    /// Where to compute.
    pub device: ComputeDevice,
    /// Load cached blocks even where computing them seems faster: for measurements.
    pub always_load: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            kv_type: KvType::Bf16,
            block_tokens: 16,
            pool_tokens: 16_384,
            chunk_tokens: 512,
            max_sequences: 32,
            max_waiting: 256,
            local_reuse: true,
            device: ComputeDevice::Cpu,
            always_load: false,
        }
    }
}

/// What a request wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// New tokens.
    Generate {
        /// At most this many.
        max_tokens: usize,
        /// Go on past end tokens.
        ignore_end: bool,
    },
    /// The prompt's full blocks in the cache, nothing else.
    Prefill,
}

/// One request.
#[derive(Clone, Debug)]
pub struct Request {
    /// The prompt.
    pub tokens: Vec<u32>,
    /// What to do with it.
    pub work: Work,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Whether attention state may come from, and go to, anywhere but this request.
    pub use_cache: bool,
}

/// A request that cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SubmitError {
    /// Nothing to compute.
    #[error("the prompt has no tokens, or the answer may have none")]
    Empty,
    /// Longer than the model or the pool.
    #[error(
        "the prompt has {tokens} tokens and asks for {wanted} more; {limit} is the most that this worker serves"
    )]
    TooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Tokens asked for.
        wanted: usize,
        /// The limit on their sum.
        limit: usize,
    },
    /// Not in the vocabulary.
    #[error("token id {0} is not in the model's vocabulary")]
    UnknownToken(u32),
    /// Too much is waiting already.
    #[error("too many requests are waiting; try again later")]
    Busy,
    /// The engine is gone.
    #[error("the worker is shutting down")]
    Stopped,
}

/// An engine that cannot start.
#[derive(Debug, Error)]
pub enum EngineError {
    /// A setting.
    #[error("{0}")]
    Options(String),
    /// Memory or a stream.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The thread.
    #[error("cannot start the engine's thread: {0}")]
    Thread(#[from] std::io::Error),
}

pub(crate) enum Command {
    Submit(Box<Sequence>),
    Loaded(Loaded),
}

/// A running engine; it ends when the last handle is dropped.
#[derive(Clone)]
pub struct Engine {
    commands: mpsc::Sender<Command>,
    waiting: Arc<tokio::sync::Semaphore>,
    model: Arc<Model>,
    limit: usize,
}

impl Engine {
    /// Takes the pool's memory, measures what a token costs where that matters (up to a second), and starts the thread.
    ///
    /// # Errors
    /// When a setting cannot work or memory cannot be had.
    pub fn start(
        model: Arc<Model>,
        options: EngineOptions,
        share: Option<Share>,
    ) -> Result<Self, EngineError> {
        let shape = pool_shape(&model, &options)?;
        let at_most = (options.chunk_tokens, options.max_sequences.min(options.chunk_tokens));
        let compute = Compute::new(&options.device, &model, shape, at_most)?;
        let (commands, receiver) = mpsc::channel(COMMAND_QUEUE);
        let limit = model.config.max_positions.min(shape.slots * shape.block_tokens);
        let places = options.max_sequences + options.max_waiting;
        let loads = commands.downgrade();
        let mut state = run::Loop::new(model.clone(), options, shape, compute, share, loads);
        state.calibrate()?;
        std::thread::Builder::new().name("cairn-engine".into()).spawn(move || state.run(receiver))?;
        Ok(Self { commands, waiting: Arc::new(tokio::sync::Semaphore::new(places)), model, limit })
    }

    /// Tokens of a prompt and its answer together, at most.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// The model it computes.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Hands a request in. Its updates come on the receiver; dropping that cancels it.
    ///
    /// # Errors
    /// When the request cannot be served.
    pub async fn submit(&self, request: Request) -> Result<Updates, SubmitError> {
        let wanted = match request.work {
            Work::Generate { max_tokens, .. } => max_tokens,
            Work::Prefill => 0,
        };
        let tokens = request.tokens.len();
        if tokens == 0 || matches!(request.work, Work::Generate { max_tokens: 0, .. }) {
            return Err(SubmitError::Empty);
        }
        if tokens.saturating_add(wanted) > self.limit {
            return Err(SubmitError::TooLong { tokens, wanted, limit: self.limit });
        }
        let vocabulary = self.model.config.vocabulary as u32;
        if let Some(unknown) = request.tokens.iter().find(|token| **token >= vocabulary) {
            return Err(SubmitError::UnknownToken(*unknown));
        }
        let place = self.waiting.clone().try_acquire_owned().map_err(|_| SubmitError::Busy)?;
        // Room for every token and the summary, so that the engine never waits for a reader.
        let (sender, receiver) = mpsc::channel(wanted + 1);
        let sequence = Box::new(Sequence::new(request, sender, place));
        let updates = sequence.reader(receiver);
        self.commands.send(Command::Submit(sequence)).await.map_err(|_| SubmitError::Stopped)?;
        Ok(updates)
    }
}

/// The pool that the options ask for.
///
/// # Errors
/// When a block does not suit the kernels or the pool holds none.
pub fn pool_shape(model: &Model, options: &EngineOptions) -> Result<PagedShape, EngineError> {
    let EngineOptions { block_tokens, pool_tokens, .. } = *options;
    if block_tokens == 0 || !block_tokens.is_multiple_of(16) {
        let text = format!("block_tokens is {block_tokens}; it must be a multiple of 16");
        return Err(EngineError::Options(text));
    }
    if options.chunk_tokens == 0 || options.max_sequences == 0 {
        return Err(EngineError::Options("chunk_tokens and max_sequences must be at least 1".into()));
    }
    let slots = pool_tokens / block_tokens;
    if slots == 0 || u32::try_from(slots).is_err() {
        let text = format!("pool_tokens is {pool_tokens}; it must hold at least one block of {block_tokens}");
        return Err(EngineError::Options(text));
    }
    let config = &model.config;
    let (layers, kv_heads, head_dim) = (config.layers, config.kv_heads, config.head_dim);
    Ok(PagedShape { layers, kv_heads, head_dim, block_tokens, slots, kv_type: options.kv_type })
}
