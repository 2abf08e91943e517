//! A worker process: a model, an engine, the way to the cache, and one port for HTTP and for prefill requests.

use crate::engine::{Engine, EngineError, EngineOptions};
use crate::http::{self, Service};
use crate::model::{Model, ModelError, ModelPath};
use crate::peer::{PrefillPeer, PrefillService};
use crate::share::{Delegate, Share};
use axum::serve::ListenerExt;
use cairn_client::{CacheClient, ClientError, ClientOptions};
use cairn_gpu::KvType;
use cairn_kernels::WeightType;
use cairn_proto::{Dtype, Invalid, KeySpace, Layout, SpaceParts, limits, pb};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Longest wait for answers in progress at shutdown.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

/// Domain of fingerprints of models that are not computed on the CPU.
const DEVICE_CONTEXT: &str = "cairn 2026-11 model on a device v1";

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Computes prompts for decode workers and publishes them.
    Prefill,
    /// Answers requests; lets a prefill worker compute what the cache lacks.
    Decode,
    /// Answers requests and computes everything itself.
    Both,
}

/// Settings of a worker.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// Address of its one port. Port 0 picks a free one.
    pub listen: SocketAddr,
    /// The model.
    pub model: ModelPath,
    /// The name under which it is served; the model's own if absent.
    pub model_name: Option<String>,
    /// Number format of weights in memory.
    pub weight_type: WeightType,
    /// What it does.
    pub role: Role,
    /// The cache server, as `http://host:port`. `None`: no cache.
    pub cache: Option<ClientOptions>,
    /// The prefill worker of a decode worker, as `http://host:port`.
    pub prefill: Option<String>,
    /// After this long without its answer the decode worker computes by itself.
    pub prefill_timeout: Duration,
    /// Fewer missing tokens than this a decode worker computes by itself anyway.
    pub delegate_min_tokens: usize,
    /// Tenant of its blocks.
    pub tenant: String,
    /// Secret of the tenant; zeros when there is none.
    pub tenant_salt: [u8; 32],
    /// The engine's settings.
    pub engine: EngineOptions,
}

/// A worker that cannot run.
#[derive(Debug, Error)]
pub enum WorkerError {
    /// The model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The shape of its blocks.
    #[error(transparent)]
    Space(#[from] Invalid),
    /// The cache server.
    #[error(transparent)]
    Cache(#[from] ClientError),
    /// A setting.
    #[error("{0}")]
    Options(String),
    /// The address.
    #[error("cannot listen on {address}: {source}. Choose another with --listen")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
}

/// A worker that is serving.
pub struct Worker {
    address: SocketAddr,
    model: Arc<Model>,
    space: KeySpace,
    stop: CancellationToken,
    serving: JoinHandle<std::io::Result<()>>,
}

impl Worker {
    /// Loads the model, binds the port and serves.
    ///
    /// # Errors
    /// When the model, a setting or the address cannot be used. A cache server that cannot be reached is no error: the
    /// worker computes everything until it can.
    pub async fn start(options: WorkerOptions) -> Result<Self, WorkerError> {
        if options.role == Role::Decode && options.prefill.is_none() {
            return Err(WorkerError::Options("a decode worker needs --prefill http://host:port".into()));
        }
        if options.role == Role::Prefill && options.cache.is_none() {
            return Err(WorkerError::Options("a prefill worker needs --cache http://host:port".into()));
        }
        let listener = TcpListener::bind(options.listen).await;
        let listener = listener.map_err(|source| WorkerError::Listen { address: options.listen, source })?;
        let address = listener.local_addr().unwrap_or(options.listen);
        let (path, weight_type) = (options.model.clone(), options.weight_type);
        let model = tokio::task::spawn_blocking(move || Model::load(&path, weight_type)).await;
        let model = Arc::new(model.map_err(|error| WorkerError::Options(error.to_string()))??);
        let space = key_space(&model, &options)?;
        let share = share(&options, &space).await?;
        let (of_engine, engine_options) = (model.clone(), options.engine.clone());
        let engine =
            tokio::task::spawn_blocking(move || Engine::start(of_engine, engine_options, share)).await;
        let engine = engine.map_err(|error| WorkerError::Options(error.to_string()))??;
        let stop = CancellationToken::new();
        let name = options.model_name.clone().unwrap_or_else(|| model.config.name.clone());
        let router = routes(engine, &options, &space, name);
        // Without this the last segment of every answer may wait for the caller's delayed acknowledgement: 40 ms.
        let listener = listener.tap_io(|socket| drop(socket.set_nodelay(true)));
        let serving = axum::serve(listener, router).with_graceful_shutdown(stop.clone().cancelled_owned());
        let serving = tokio::spawn(async move { serving.await });
        tracing::info!(%address, role = ?options.role, model = model.config.name, "serving");
        Ok(Self { address, model, space, stop, serving })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The model it computes.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The key space of its blocks.
    pub fn space(&self) -> &KeySpace {
        &self.space
    }

    /// Stops accepting, lets answers in progress finish for a while, and ends.
    pub async fn shutdown(mut self) {
        self.stop.cancel();
        if tokio::time::timeout(SHUTDOWN_GRACE, &mut self.serving).await.is_err() {
            tracing::warn!("answers in progress were cut off");
            self.serving.abort();
        }
    }
}

fn routes(engine: Engine, options: &WorkerOptions, space: &KeySpace, model_name: String) -> axum::Router {
    let service = Arc::new(Service { engine: engine.clone(), model_name, started: http::unix_seconds() });
    let router = http::router(service);
    if options.cache.is_none() {
        return router;
    }
    let prefill = pb::prefill_server::PrefillServer::new(PrefillService { engine, space: space.id() })
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES);
    router.merge(tonic::service::Routes::new(prefill).into_axum_router().reset_fallback())
}

async fn share(options: &WorkerOptions, space: &KeySpace) -> Result<Option<Share>, WorkerError> {
    let Some(mut client) = options.cache.clone() else {
        return Ok(None);
    };
    client.name = format!("worker {:?}", options.role);
    let client = CacheClient::start(client)?;
    // A server that refuses the space would refuse every block of it: better to know at start.
    match client.open_space(space).await {
        Err(error) if error.kind == cairn_proto::ErrorKind::FixInput => return Err(error.into()),
        Err(error) => tracing::warn!(%error, "starting without the cache; it is used once it can be reached"),
        Ok(()) => {}
    }
    let delegate = match &options.prefill {
        None => None,
        Some(endpoint) => {
            let peer = PrefillPeer::new(endpoint, options.prefill_timeout).map_err(WorkerError::Options)?;
            Some(Delegate { peer, min_tokens: options.delegate_min_tokens })
        }
    };
    Ok(Some(Share::new(client, space.clone(), delegate)))
}

/// The key space of a worker's blocks.
///
/// # Errors
/// When the blocks would be too large.
pub fn key_space(model: &Model, options: &WorkerOptions) -> Result<KeySpace, Invalid> {
    let config = &model.config;
    let layout = Layout::new(
        config.layers as u32,
        config.kv_heads as u32,
        config.head_dim as u32,
        options.engine.block_tokens as u32,
    )?;
    let dtype = match options.engine.kv_type {
        KvType::F32 => Dtype::F32,
        KvType::F16 => Dtype::F16,
        KvType::Bf16 => Dtype::Bf16,
    };
    let fingerprint = match options.engine.device.tag(config, options.engine.block_tokens) {
        None => model.fingerprint,
        Some(tag) => *blake3::Hasher::new_derive_key(DEVICE_CONTEXT)
            .update(&model.fingerprint)
            .update(tag.as_bytes())
            .finalize()
            .as_bytes(),
    };
    let parts = SpaceParts::new(&options.tenant, fingerprint, dtype, layout);
    KeySpace::new(SpaceParts { tenant_salt: options.tenant_salt, ..parts })
}
