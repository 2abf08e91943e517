//! A running server: listeners, background tasks, and an orderly end.

use crate::auth::Auth;
use crate::config::Config;
use crate::engine::{Engine, EngineError};
use crate::listen::{self, Connection, Known};
use crate::metrics::Metrics;
use crate::serve::{AdminService, CacheService, Context};
use crate::tiers::nvme::fault::Faults;
use crate::wires::Wires;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use cairn_core::Event;
use cairn_proto::{limits, pb};
use cairn_transfer::ShmServerError;
use cairn_transfer::store::Limits;
use prometheus_client::registry::Registry;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::service::interceptor::InterceptedService;

/// How often expired leases and reservations are collected when nothing else happens.
const TICK: Duration = Duration::from_millis(100);

/// A client that does not answer this long after a ping is gone, and its session with it.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Calls on one connection at a time: bounds what one client can have in progress.
const MAX_STREAMS_PER_CONNECTION: u32 = 256;

/// Flow-control windows of one call and of one connection: a few chunks in flight.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;

/// Why a server cannot run.
#[derive(Debug, Error)]
pub enum ServerError {
    /// A setting or the memory for it.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// An address is taken or not ours.
    #[error("cannot listen on {address} ({what}): {source}. Choose another with --{what}")]
    Listen {
        /// Which setting.
        what: &'static str,
        /// Which address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// No shared memory.
    #[error(transparent)]
    Shm(#[from] ShmServerError),
    /// The gRPC server failed while running.
    #[error("the gRPC server failed: {0}")]
    Grpc(#[from] tonic::transport::Error),
    /// A task of the server panicked.
    #[error("a task of the server panicked: {0}")]
    Panicked(#[from] tokio::task::JoinError),
}

/// A server that is bound to its addresses and serving.
pub struct Server {
    address: SocketAddr,
    http_address: SocketAddr,
    data_ip: std::net::IpAddr,
    context: Context,
    stop: CancellationToken,
    /// Ends the data connections, once the transfers in progress are over.
    data: CancellationToken,
    grace: Duration,
    grpc: JoinHandle<Result<(), tonic::transport::Error>>,
    background: TaskTracker,
}

impl Server {
    /// Binds, maps memory and starts serving.
    ///
    /// # Errors
    /// When a setting cannot work, memory cannot be had or an address is taken.
    pub async fn start(config: Config) -> Result<Self, ServerError> {
        Self::start_with(config, None).await
    }

    /// As [`Self::start`], with devices that misbehave as told. For tests.
    ///
    /// # Errors
    /// See [`Self::start`].
    pub async fn start_with(config: Config, faults: Option<Arc<Faults>>) -> Result<Self, ServerError> {
        raise_descriptor_limit();
        let auth = Arc::new(Auth::new(&config.token).map_err(EngineError::from)?);
        let tls = config.tls.server().map_err(EngineError::from)?.map(Arc::new);
        let engine = Engine::new(&config, faults)?;
        let listener = bind("listen", config.server.listen).await?;
        let http_listener = bind("http-listen", config.server.http_listen).await?;
        let local = |listener: &TcpListener, asked| listener.local_addr().unwrap_or(asked);
        let address = local(&listener, config.server.listen);
        let http_address = local(&http_listener, config.server.http_listen);
        let mut wires = Wires::bind(&config, engine.epoch(), tls.clone()).await?;
        let (metrics, registry) = Metrics::new(&engine);
        let stop = CancellationToken::new();
        let mut context = Context {
            engine: engine.clone(),
            metrics,
            draining: stop.clone(),
            transfers: TaskTracker::new(),
            max_sessions: config.limits.max_sessions,
            max_sessions_per_token: config.limits.max_sessions_per_token,
            limits: Limits {
                fetch_timeout: Duration::from_millis(config.limits.fetch_timeout_ms),
                idle_timeout: Duration::from_millis(config.limits.publish_idle_ms),
                handshake_timeout: Duration::from_millis(config.limits.handshake_ms),
                staging_bytes: config.wires.staging_mib << 20,
            },
            auth,
            sessions: Arc::default(),
            staging: Arc::new(Semaphore::new(config.wires.staging_total_mib)),
            wires: Arc::from([]),
        };
        for (path, _) in engine.devices().all() {
            // A device that cannot be used is no reason to serve nothing.
            if let Err(error) = engine.devices().attach(&engine, &path) {
                tracing::error!(%error, "a device of the NVMe tier is not in service");
            }
        }
        if !engine.gpus().is_empty() {
            engine.tasks().spawn(crate::gpus::run(engine.clone()));
        }
        let (background, data) = (TaskTracker::new(), CancellationToken::new());
        context.wires = wires.start(&config, &context, (&data, &background))?.into();
        background.spawn(tick(engine.clone(), stop.clone()));
        background.spawn(serve_http(http_listener, registry, stop.clone()));
        if config.host.prefault {
            prefault(engine, stop.clone(), &background);
        }
        background.close();
        let bounds = (config.limits.max_connections, context.limits.handshake_timeout);
        let connections = listen::accept(listener, tls.map(for_grpc), bounds, stop.clone());
        let grpc = tokio::spawn(serve_grpc(context.clone(), connections));
        tracing::info!(%address, %http_address, capacity_mib = config.host.capacity_mib, "serving");
        let grace = Duration::from_millis(config.server.shutdown_grace_ms);
        let data_ip = config.wires.data_address(config.server.listen).ip();
        Ok(Self { address, http_address, data_ip, context, stop, data, grace, grpc, background })
    }

    /// Where the gRPC services listen.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the TLS and QUIC data paths listen, if there are any.
    pub fn data_address(&self) -> Option<SocketAddr> {
        let offers = self.context.wires.iter();
        let port = offers.filter_map(|offer| offer.address.strip_prefix(':')?.parse().ok()).next()?;
        Some(SocketAddr::new(self.data_ip, port))
    }

    /// Where metrics and health listen.
    pub fn http_address(&self) -> SocketAddr {
        self.http_address
    }

    /// The server as wires see it, for those inside this process.
    pub fn store(&self) -> Arc<dyn cairn_transfer::Store> {
        Arc::new(self.context.clone())
    }

    /// Slots, leases and the like that are held now.
    pub fn usage(&self) -> cairn_core::Usage {
        self.context.engine.inspect(cairn_core::Core::usage)
    }

    /// Totals since the start.
    pub fn counters(&self) -> cairn_core::Counters {
        self.context.engine.inspect(|core| core.counters().clone())
    }

    /// Every device in service, or lost since the start.
    pub fn devices(&self) -> Vec<cairn_core::DeviceUsage> {
        self.context.engine.inspect(cairn_core::Core::devices)
    }

    /// Every GPU of the tier.
    pub fn gpus(&self) -> Vec<cairn_core::GpuUsage> {
        self.context.engine.inspect(cairn_core::Core::gpus)
    }

    /// Checks every invariant of the core. For tests: takes time in proportion to what is stored.
    ///
    /// # Errors
    /// Names the first invariant that does not hold.
    pub fn audit(&self) -> Result<(), String> {
        self.context.engine.inspect(cairn_core::Core::audit)
    }

    /// Waits until the server fails on its own.
    ///
    /// # Errors
    /// Why it failed.
    pub async fn failed(&mut self) -> Result<(), ServerError> {
        Ok((&mut self.grpc).await??)
    }

    /// Stops accepting work, waits for transfers in progress (at most the configured grace), and ends.
    ///
    /// # Errors
    /// When the gRPC server failed.
    pub async fn shutdown(mut self) -> Result<(), ServerError> {
        tracing::info!("shutting down");
        self.stop.cancel();
        self.context.transfers.close();
        let end = tokio::time::Instant::now() + self.grace;
        let ended = tokio::time::timeout_at(end, &mut self.grpc).await;
        self.grpc.abort();
        if tokio::time::timeout_at(end, self.context.transfers.wait()).await.is_err() {
            tracing::warn!("some readers had not let go of their blocks at the end of the grace");
        }
        self.data.cancel();
        let engine = &self.context.engine;
        engine.devices().stop();
        engine.gpus().stop.cancel();
        engine.tasks().close();
        if tokio::time::timeout(self.grace, engine.tasks().wait()).await.is_err() {
            tracing::warn!("work on devices was cut off at the end of the grace");
        }
        if tokio::time::timeout(self.grace, self.background.wait()).await.is_err() {
            tracing::warn!("a connection to the metrics port stayed open");
        }
        match ended {
            Ok(result) => Ok(result??),
            Err(_) => {
                tracing::warn!(
                    grace_ms = self.grace.as_millis() as u64,
                    "transfers were cut off at the end of the grace"
                );
                Ok(())
            }
        }
    }
}

/// Each segment file is a descriptor, and each client: as many as the system allows.
fn raise_descriptor_limit() {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let wanted = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    // Refused is fine: what is there is used.
    let _ = rustix::process::setrlimit(rustix::process::Resource::Nofile, wanted);
}

pub(crate) async fn bind(what: &'static str, address: SocketAddr) -> Result<TcpListener, ServerError> {
    TcpListener::bind(address).await.map_err(|source| ServerError::Listen { what, address, source })
}

fn for_grpc(config: Arc<rustls::ServerConfig>) -> Arc<rustls::ServerConfig> {
    let mut config = rustls::ServerConfig::clone(&config);
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

async fn serve_grpc(
    context: Context,
    mut connections: mpsc::Receiver<std::io::Result<Connection>>,
) -> Result<(), tonic::transport::Error> {
    let stop = context.draining.clone();
    // Before anything of a message is read.
    let door = {
        let auth = context.auth.clone();
        move |request: tonic::Request<()>| {
            auth.identify(request.metadata())?;
            if let Some(known) = request.extensions().get::<Known>() {
                known.set();
            }
            Ok(request)
        }
    };
    let cache = pb::cache_server::CacheServer::new(CacheService(context.clone()))
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
    let admin = pb::admin_server::AdminServer::new(AdminService(context))
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES);
    let cache = InterceptedService::new(cache, door.clone());
    let admin = InterceptedService::new(admin, door);
    let incoming = futures::stream::poll_fn(move |task| connections.poll_recv(task));
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .max_concurrent_streams(Some(MAX_STREAMS_PER_CONNECTION))
        .initial_stream_window_size(Some(STREAM_WINDOW_BYTES))
        .initial_connection_window_size(Some(CONNECTION_WINDOW_BYTES))
        .add_service(cache)
        .add_service(admin)
        .serve_with_incoming_shutdown(incoming, stop.cancelled_owned())
        .await
}

async fn tick(engine: Arc<Engine>, stop: CancellationToken) {
    let mut interval = tokio::time::interval(TICK);
    while stop.run_until_cancelled(interval.tick()).await.is_some() {
        // A tick has no answer and cannot be refused.
        let _ = engine.apply(Event::Tick);
    }
}

fn prefault(engine: Arc<Engine>, stop: CancellationToken, background: &TaskTracker) {
    let cancelled = Arc::new(AtomicBool::new(false));
    let flag = cancelled.clone();
    let work = background.spawn_blocking(move || {
        match engine.arena().prefault(&cancelled, |count| engine.devices().chunks_ready(count)) {
            Ok(bytes) => tracing::debug!(mib = bytes >> 20, "host arena prefaulted"),
            Err(error) => {
                tracing::warn!(%error, "cannot take the host arena's memory at once; it is taken as it fills")
            }
        }
    });
    background.spawn(async move {
        tokio::select! {
            () = stop.cancelled() => flag.store(true, Ordering::Relaxed),
            _ = work => {}
        }
    });
}

async fn serve_http(listener: TcpListener, registry: Registry, stop: CancellationToken) {
    let ready = stop.clone();
    let router = Router::new()
        .route("/metrics", get(metrics_page))
        .with_state(Arc::new(registry))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(move || async move { readiness(&ready) }));
    let serving = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned());
    if let Err(error) = serving.await {
        tracing::error!(%error, "the metrics server failed");
    }
}

fn readiness(stop: &CancellationToken) -> (StatusCode, &'static str) {
    match stop.is_cancelled() {
        false => (StatusCode::OK, "ready\n"),
        true => (StatusCode::SERVICE_UNAVAILABLE, "draining\n"),
    }
}

async fn metrics_page(State(registry): State<Arc<Registry>>) -> impl IntoResponse {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
