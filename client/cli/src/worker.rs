//! `cairn worker`, and the model arguments that other commands share.

use crate::connect::ConnectArguments;
use crate::signals::Supervision;
use crate::{CliError, block_on};
use cairn_runtime::{
    ComputeDevice, EngineOptions, KernelFolders, KvType, ModelPath, Role, WeightType, Worker, WorkerOptions,
};
use clap::{Args, ValueEnum};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Args)]
pub(crate) struct WorkerArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Address of the HTTP endpoint, and of prefill requests.
    #[arg(long, default_value = "127.0.0.1:8000", env = "CAIRN_WORKER_LISTEN")]
    listen: SocketAddr,
    /// Name under which the model is served [default: the model's own].
    #[arg(long)]
    model_name: Option<String>,
    /// What this worker does.
    #[arg(long, value_enum, default_value = "both")]
    role: RoleArgument,
    /// The cache server, as http://host:port or https://host:port. Without it this worker shares nothing.
    #[arg(long, env = "CAIRN_CACHE", value_name = "URL")]
    cache: Option<String>,
    #[command(flatten)]
    connect: ConnectArguments,
    /// The prefill worker of a decode worker, as http://host:port.
    #[arg(long, value_name = "URL")]
    prefill: Option<String>,
    /// After this long without the prefill worker's answer a decode worker computes by itself.
    #[arg(long, default_value_t = 30_000)]
    prefill_timeout_ms: u64,
    /// Fewer missing tokens than this a decode worker computes by itself anyway.
    #[arg(long, default_value_t = 128)]
    delegate_min_tokens: usize,
    /// Listen beyond loopback. There is no TLS and no authentication on this port.
    #[arg(long)]
    allow_insecure_network: bool,
    /// Forget attention state when its request ends, so that only the cache can bring it back: for measurements.
    #[arg(long)]
    no_local_reuse: bool,
    /// Load cached attention state even where computing it seems faster: for measurements.
    #[arg(long)]
    always_load: bool,
    #[command(flatten)]
    supervision: Supervision,
}

/// What determines a model's numbers and its key space.
#[derive(Args, Clone)]
pub(crate) struct ModelArguments {
    /// A GGUF file; a folder with config.json, *.safetensors and tokenizer.json; or synthetic:SEED.
    #[arg(long, env = "CAIRN_MODEL", value_name = "PATH")]
    pub(crate) model: ModelPath,
    /// Number format of weights in memory.
    #[arg(long, value_enum, default_value = "bf16")]
    weights: WeightArgument,
    /// Number format of attention state.
    #[arg(long, value_enum, default_value = "bf16")]
    kv: KvArgument,
    /// Tokens of a block; a multiple of 16.
    #[arg(long, default_value_t = 16)]
    pub(crate) block_tokens: usize,
    /// Tokens of attention state that this worker holds itself.
    #[arg(long, default_value_t = 16_384)]
    pool_tokens: usize,
    /// Tokens computed in one pass.
    #[arg(long, default_value_t = 512)]
    chunk_tokens: usize,
    /// Sequences in progress at a time.
    #[arg(long, default_value_t = 32)]
    max_sequences: usize,
    /// Tenant of the blocks.
    #[arg(long, default_value = "default", env = "CAIRN_TENANT")]
    tenant: String,
    /// Where to compute: auto, cpu, cuda, or cuda:N for another device than the first.
    #[arg(long, default_value = "auto", env = "CAIRN_DEVICE", value_name = "DEVICE")]
    device: DeviceArgument,
    /// Folder of CUDA kernels that were compiled ahead of time by `cairn kernels build`.
    #[arg(long, value_name = "FOLDER", env = "CAIRN_KERNELS")]
    kernels: Option<PathBuf>,
}

#[derive(Clone, Copy)]
enum DeviceArgument {
    Auto,
    Cpu,
    Cuda(usize),
}

impl std::str::FromStr for DeviceArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:").and_then(|ordinal| ordinal.parse().ok())) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(ordinal)) => Ok(Self::Cuda(ordinal)),
            _ => Err("write auto, cpu, cuda or cuda:N".into()),
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum RoleArgument {
    /// Computes prompts for decode workers.
    Prefill,
    /// Answers; a prefill worker computes what the cache lacks.
    Decode,
    /// Answers, and computes everything itself.
    Both,
}

#[derive(Clone, Copy, ValueEnum)]
enum WeightArgument {
    F32,
    Bf16,
}

#[derive(Clone, Copy, ValueEnum)]
enum KvArgument {
    F32,
    F16,
    Bf16,
}

impl ModelArguments {
    fn device(&self) -> ComputeDevice {
        // Without a home kernels are compiled at each start.
        let cache = crate::model::cache_folder().ok().map(|folder| folder.join("kernels"));
        let folders = KernelFolders { cache, ahead: self.kernels.clone() };
        match self.device {
            DeviceArgument::Auto => ComputeDevice::Auto { folders },
            DeviceArgument::Cpu => ComputeDevice::Cpu,
            DeviceArgument::Cuda(ordinal) => ComputeDevice::Cuda { ordinal, folders },
        }
    }

    /// Options of a worker that shares nothing and listens nowhere yet.
    pub(crate) fn options(&self) -> WorkerOptions {
        WorkerOptions {
            listen: ([127, 0, 0, 1], 0).into(),
            model: self.model.clone(),
            model_name: None,
            weight_type: match self.weights {
                WeightArgument::F32 => WeightType::F32,
                WeightArgument::Bf16 => WeightType::Bf16,
            },
            role: Role::Both,
            cache: None,
            prefill: None,
            prefill_timeout: Duration::ZERO,
            delegate_min_tokens: 0,
            tenant: self.tenant.clone(),
            tenant_salt: [0; 32],
            engine: EngineOptions {
                kv_type: match self.kv {
                    KvArgument::F32 => KvType::F32,
                    KvArgument::F16 => KvType::F16,
                    KvArgument::Bf16 => KvType::Bf16,
                },
                block_tokens: self.block_tokens,
                pool_tokens: self.pool_tokens,
                chunk_tokens: self.chunk_tokens,
                max_sequences: self.max_sequences,
                device: self.device(),
                ..EngineOptions::default()
            },
        }
    }
}

pub(crate) fn run(arguments: WorkerArguments) -> Result<(), CliError> {
    if !arguments.listen.ip().is_loopback() && !arguments.allow_insecure_network {
        return Err(CliError::Usage(format!(
            "--listen {} is beyond loopback, and this port has no TLS and no authentication: use a loopback address \
             (behind a proxy), or --allow-insecure-network",
            arguments.listen
        )));
    }
    let mut options = WorkerOptions {
        listen: arguments.listen,
        model_name: arguments.model_name,
        role: match arguments.role {
            RoleArgument::Prefill => Role::Prefill,
            RoleArgument::Decode => Role::Decode,
            RoleArgument::Both => Role::Both,
        },
        cache: arguments.cache.map(|endpoint| arguments.connect.options(&endpoint)).transpose()?,
        prefill: arguments.prefill,
        prefill_timeout: Duration::from_millis(arguments.prefill_timeout_ms),
        delegate_min_tokens: arguments.delegate_min_tokens,
        ..arguments.model.options()
    };
    options.engine.local_reuse = !arguments.no_local_reuse;
    options.engine.always_load = arguments.always_load;
    let supervision = arguments.supervision;
    block_on(async move {
        let worker = tokio::select! {
            worker = Worker::start(options) => worker.map_err(CliError::failed)?,
            end = supervision.end() => return end.and(Err(CliError::Interrupted)),
        };
        supervision.announce(&[("address", worker.address())])?;
        supervision.end().await?;
        worker.shutdown().await;
        Ok(())
    })
}
