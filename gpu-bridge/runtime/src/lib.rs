//! The bundled inference runtime: Llama-family models, a paged KV cache, continuous batching, and workers that share
//! attention state through a cache server. It uses the cache like anybody else, through `cairn-client`.
//!
//! A [`Worker`] is what runs in a process: an [`Engine`] behind an OpenAI-style HTTP API, in one of three [`Role`]s.

#![forbid(unsafe_code)]

mod compute;
mod engine;
mod forward;
mod http;
mod model;
mod peer;
mod sampling;
mod share;
mod worker;

pub use cairn_gpu::backend::cuda::KernelFolders;
pub use cairn_gpu::{KvType, PagedShape};
pub use cairn_kernels::{Isa, WeightType};
pub use compute::{ComputeDevice, kernel_programs, prompt_logits};
pub use engine::{
    Engine, EngineError, EngineOptions, Finish, Request, SubmitError, Summary, Update, Updates, Work,
    pool_shape,
};
pub use forward::{Row, Scratch};
pub use model::{
    ChatMessage, Model, ModelConfig, ModelError, ModelPath, RopeScaling, Synthetic, TextTokenizer,
    smollm2_shape,
};
pub use peer::PrefillPeer;
pub use sampling::{Sampler, Sampling, choose};
pub use share::{Delegate, Share};
pub use worker::{Role, Worker, WorkerError, WorkerOptions, key_space};
