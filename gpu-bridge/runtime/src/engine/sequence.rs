//! One request in progress.

use super::{Request, Work};
use crate::sampling::Sampler;
use cairn_client::WireKind;
use cairn_gpu::Slot;
use cairn_proto::{BlockHash, BlockHasher, Parent, SpaceId};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// News of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum Update {
    /// The next token.
    Token(u32),
    /// The last news.
    Finished(Summary),
}

/// Why a request ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Finish {
    /// An end token, or all that a prefill wanted.
    #[default]
    Stop,
    /// The limit that the request set.
    Length,
}

/// What a request did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Why it ended.
    pub finish: Finish,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    pub generated_tokens: usize,
    /// Tokens of the prompt whose state was still in this worker's pool.
    pub local_tokens: usize,
    /// Tokens of the prompt whose state came from the cache.
    pub loaded_tokens: usize,
    /// Of those, from the memory of a GPU.
    pub gpu_tokens: usize,
    /// Of `loaded_tokens`, those that were verified on the device.
    pub device_verified_tokens: usize,
    /// Bytes of that state.
    pub loaded_bytes: u64,
    /// How they came.
    pub wire: Option<WireKind>,
    /// Time to look it up and bring it here, a remote prefill included.
    pub load_ms: f64,
    /// What loading and computing the cacheable part of the prompt were expected to take, in ms, where that was known; and whether nothing was loaded
    /// because of it.
    pub forecast_ms: Option<[f64; 2]>,
    /// See `forecast_ms`.
    pub recomputed: bool,
    /// Whether another worker computed a part of it for this request.
    pub remote_prefill: bool,
    /// From submission to the first token.
    pub first_token_ms: f64,
    /// Blocks of the prompt that are in the cache at the end, as far as this worker knows.
    pub stored_blocks: usize,
    /// Blocks of the prompt that were computed here.
    pub computed_blocks: usize,
}

impl Summary {
    /// Tokens of the prompt that were not computed here.
    pub fn cached_tokens(&self) -> usize {
        self.local_tokens + self.loaded_tokens
    }
}

/// The receiving end of a request; dropping it cancels the request.
pub struct Updates {
    updates: mpsc::Receiver<Update>,
    stop: Arc<AtomicBool>,
}

impl Updates {
    /// The next news; `None` after the last, or when the engine ended.
    pub async fn recv(&mut self) -> Option<Update> {
        self.updates.recv().await
    }

    /// Asks for no more tokens. Those on their way still come, then the summary.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

pub(crate) struct Sequence {
    /// Prompt and answer so far.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt: usize,
    pub(crate) work: Work,
    pub(crate) use_cache: bool,
    pub(crate) sampler: Sampler,
    /// Of the full blocks of `tokens`.
    pub(crate) hashes: Vec<BlockHash>,
    /// Held slots, from the first block on.
    pub(crate) slots: Vec<Slot>,
    /// Tokens whose state is in the pool.
    pub(crate) computed: usize,
    /// Blocks that have a name in the pool.
    pub(crate) named: usize,
    /// Blocks that the cache has or was offered. `None`: the cache is not used for this sequence (any more).
    pub(crate) shared: Option<usize>,
    /// Blocks that the cache acknowledged, counted by the publisher.
    pub(crate) stored: Arc<AtomicUsize>,
    pub(crate) updates: mpsc::Sender<Update>,
    pub(crate) summary: Summary,
    /// The reader wants no more tokens, only the summary.
    pub(crate) stop: Arc<AtomicBool>,
    /// Set with the last token.
    pub(crate) ended: Option<Finish>,
    pub(crate) submitted: Instant,
    /// Its place among those in progress and waiting.
    _place: OwnedSemaphorePermit,
}

impl Sequence {
    pub(crate) fn new(request: Request, updates: mpsc::Sender<Update>, place: OwnedSemaphorePermit) -> Self {
        let prompt = request.tokens.len();
        Self {
            prompt,
            tokens: request.tokens,
            work: request.work,
            use_cache: request.use_cache,
            sampler: Sampler::new(request.sampling),
            hashes: Vec::new(),
            slots: Vec::new(),
            computed: 0,
            named: 0,
            shared: None,
            stored: Arc::default(),
            updates,
            summary: Summary { prompt_tokens: prompt, ..Summary::default() },
            stop: Arc::default(),
            ended: None,
            submitted: Instant::now(),
            _place: place,
        }
    }

    /// The reader's end, with the receiver of this sequence's updates.
    pub(crate) fn reader(&self, updates: mpsc::Receiver<Update>) -> Updates {
        Updates { updates, stop: self.stop.clone() }
    }

    /// Blocks of the tokens so far that may come from elsewhere. To generate, the last token must be computed here.
    pub(crate) fn reusable_blocks(&self, block_tokens: usize) -> usize {
        match self.work {
            Work::Prefill => self.tokens.len() / block_tokens,
            Work::Generate { .. } => (self.tokens.len() - 1) / block_tokens,
        }
    }

    /// Hashes the blocks that became full.
    pub(crate) fn extend_hashes(&mut self, hasher: &BlockHasher, space: &SpaceId, block_tokens: usize) {
        while (self.hashes.len() + 1) * block_tokens <= self.tokens.len() {
            let start = self.hashes.len() * block_tokens;
            let parent = self.hashes.last().map_or(Parent::Root(space), Parent::Block);
            let hash = hasher.hash(parent, &self.tokens[start..start + block_tokens], &[]);
            self.hashes.push(hash);
        }
    }

    /// Tokens that are known, wanted and not computed. A prefill wants full blocks only.
    pub(crate) fn remaining(&self, block_tokens: usize) -> usize {
        let wanted = match self.work {
            Work::Prefill => self.tokens.len() / block_tokens * block_tokens,
            Work::Generate { .. } => self.tokens.len(),
        };
        wanted.saturating_sub(self.computed)
    }

    pub(crate) fn cancelled(&self) -> bool {
        self.updates.is_closed()
    }
}
