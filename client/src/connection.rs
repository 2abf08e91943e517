//! One session at a time, opened anew whenever it ends. Requests never reconnect by themselves: they use the session that
//! is there, or fail at once.

use crate::client::{AdminGrpc, Grpc, until};
use crate::lease::Releases;
use crate::options::{ClientOptions, Tls};
use crate::wires::{Reach, Wires};
use cairn_proto::{KeySpace, SpaceId, limits, pb};
use cairn_transfer::Bearer;
use pb::session_event::Event;
use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};

const MIN_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(2);

/// A server that does not answer this long after a ping is gone.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);

const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;

/// Leases that ended wait this long for a lookup that takes them along.
const RELEASE_DELAY: Duration = Duration::from_millis(2);

#[derive(Clone)]
pub(crate) enum Link {
    /// The first attempt, or one after a session ended, has not been decided.
    Connecting,
    Up(Box<Connection>),
    /// The last attempt failed, for this reason; the next one comes after a pause.
    Down(String),
}

#[derive(Clone)]
pub(crate) struct Connection {
    pub(crate) session: u64,
    pub(crate) grpc: Grpc,
    pub(crate) admin: AdminGrpc,
    pub(crate) wires: Arc<Wires>,
    pub(crate) runtime: tokio::runtime::Handle,
    declared: Arc<Mutex<HashSet<SpaceId>>>,
}

impl Connection {
    /// Declares a space once in each session.
    pub(crate) async fn open_space(&self, space: &KeySpace, deadline: Instant) -> Result<(), Status> {
        let id = space.id();
        // The set is only ever inserted into, so it is whole even after a panic elsewhere.
        if self.declared.lock().unwrap_or_else(PoisonError::into_inner).contains(&id) {
            return Ok(());
        }
        let request = pb::OpenSpaceRequest { session_id: self.session, space: Some(space.into()) };
        let answer = until(deadline, self.grpc.clone().open_space(request)).await?;
        if answer.space_id.as_ref() != id.0 || answer.block_bytes != space.block_bytes() {
            return Err(Status::internal(
                "the server computes another id for this key space: use matching releases",
            ));
        }
        self.declared.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
        Ok(())
    }
}

/// What opening a session takes.
pub(crate) struct Opening {
    pub(crate) endpoint: Endpoint,
    pub(crate) options: ClientOptions,
    pub(crate) bearer: Bearer,
    pub(crate) tls: Option<Tls>,
}

/// Keeps a session open until the client is dropped.
pub(crate) async fn maintain(opening: Opening, link: watch::Sender<Link>, releases: Arc<Releases>) {
    let options = opening.options.clone();
    let mut backoff = MIN_BACKOFF;
    loop {
        match open(&opening).await {
            Ok((connection, events, reach)) => {
                tracing::debug!(session = connection.session, endpoint = options.endpoint, "session opened");
                releases.forget_others(connection.session);
                connection.wires.connect_first(&reach, &options).await;
                link.send_replace(Link::Up(Box::new(connection.clone())));
                let why = tokio::select! {
                    why = hold(&connection, events, &link, &releases) => why,
                    () = connection.wires.maintain(reach, options.clone()) => continue,
                };
                tracing::info!(endpoint = options.endpoint, why, "session ended");
                link.send_replace(Link::Connecting);
                backoff = MIN_BACKOFF;
            }
            Err(status) => {
                tracing::debug!(endpoint = options.endpoint, error = status.message(), "cannot connect");
                link.send_replace(Link::Down(status.message().to_owned()));
                tokio::time::sleep(backoff).await;
                backoff = MAX_BACKOFF.min(2 * backoff);
            }
        }
    }
}

async fn open(opening: &Opening) -> Result<(Connection, Streaming<pb::SessionEvent>, Reach), Status> {
    let options = &opening.options;
    let deadline = Instant::now() + options.connect_timeout;
    let endpoint = opening
        .endpoint
        .clone()
        .connect_timeout(options.connect_timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
    let channel: Channel = match tokio::time::timeout_at(deadline, endpoint.connect()).await {
        Err(_) => return Err(Status::deadline_exceeded("no answer in time")),
        Ok(channel) => channel.map_err(|error| Status::unavailable(root_cause(&error)))?,
    };
    let mut grpc = Grpc::new(InterceptedService::new(channel.clone(), opening.bearer.clone()))
        .max_decoding_message_size(limits::MAX_MESSAGE_BYTES)
        .max_encoding_message_size(limits::MAX_MESSAGE_BYTES);
    let request = pb::SessionRequest { client_name: options.name.clone(), api_version: limits::API_VERSION };
    let mut events = until(deadline, grpc.session(request)).await?;
    let first = tokio::time::timeout_at(deadline, events.message()).await;
    let first = first.map_err(|_| Status::deadline_exceeded("no session in time"))??;
    let Some(pb::SessionEvent { event: Some(Event::Opened(opened)) }) = first else {
        return Err(Status::internal("the server did not open a session"));
    };
    let admin = AdminGrpc::new(InterceptedService::new(channel, opening.bearer.clone()));
    let session = opened.session_id;
    let key = opened.session_key.as_ref().try_into();
    let key = key.map_err(|_| Status::internal("the server gives no session key: use matching releases"))?;
    let host = opening.endpoint.uri().host().unwrap_or_default();
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let wires = Wires::new(grpc.clone(), &opened.wires, options.wire);
    let reach = Reach { host, tls: opening.tls.clone(), session, key };
    Ok((
        Connection {
            session,
            grpc,
            admin,
            wires,
            runtime: tokio::runtime::Handle::current(),
            declared: Arc::default(),
        },
        events,
        reach,
    ))
}

/// Until the session ends; says why it did.
async fn hold(
    connection: &Connection,
    mut events: Streaming<pb::SessionEvent>,
    link: &watch::Sender<Link>,
    releases: &Releases,
) -> String {
    loop {
        tokio::select! {
            event = events.message() => match event {
                Ok(Some(pb::SessionEvent { event: Some(Event::Draining(_)) })) => {
                    link.send_replace(Link::Down("the server is shutting down".into()));
                }
                Ok(Some(_)) => {}
                Ok(None) => return "the server ended it".into(),
                Err(status) => return status.message().to_owned(),
            },
            () = releases.some.notified() => {
                tokio::time::sleep(RELEASE_DELAY).await;
                release(connection, releases.take(connection.session));
            }
        }
    }
}

fn release(connection: &Connection, lease_ids: Vec<u64>) {
    let (copied_bytes, rdma_bytes) = connection.wires.take_unheard();
    if lease_ids.is_empty() && (copied_bytes, rdma_bytes) == (0, 0) {
        return;
    }
    let session_id = connection.session;
    let request = pb::ReleaseLeaseRequest { session_id, lease_ids, copied_bytes, rdma_bytes };
    let mut grpc = connection.grpc.clone();
    tokio::spawn(async move {
        // A release that is lost costs the server some memory until the lease's deadline.
        let _ = until(Instant::now() + KEEPALIVE_TIMEOUT, grpc.release_lease(request)).await;
    });
}

fn root_cause(error: &tonic::transport::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
