//! The handle that callers hold, and what all requests share.

use crate::connection::{Connection, Link, Opening, maintain};
use crate::lease::Releases;
use crate::options::ClientOptions;
use crate::wires::WireReport;
use cairn_proto::{ErrorKind, KeySpace, MissReason, pb};
use cairn_transfer::{Api, Bearer, WireKind};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tonic::{Response, Status};

/// A request that an operator made and that failed.
#[derive(Clone, Debug, Error)]
#[error("{message}")]
pub struct ClientError {
    /// What to do about it.
    pub kind: ErrorKind,
    /// What happened.
    pub message: String,
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        Self { kind: ErrorKind::from(&status), message: status.message().to_owned() }
    }
}

/// A connection to one cache server that heals itself. Clones share it; dropping the last one ends the session.
#[derive(Clone)]
pub struct CacheClient(Arc<Inner>);

struct Inner {
    options: ClientOptions,
    link: watch::Receiver<Link>,
    releases: Arc<Releases>,
    task: AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl CacheClient {
    /// Starts to connect, in the background and for ever. Needs a tokio runtime.
    ///
    /// # Errors
    /// When the endpoint is not a valid `http://host:port` or `https://host:port`, or what TLS needs cannot be used.
    pub fn start(options: ClientOptions) -> Result<Self, ClientError> {
        let endpoint = tonic::transport::Endpoint::from_shared(options.endpoint.clone());
        let wrong = || ClientError {
            kind: ErrorKind::FixInput,
            message: format!(
                "{:?} is not an endpoint: write http://host:port, or https://host:port for TLS",
                options.endpoint
            ),
        };
        let mut endpoint = endpoint.map_err(|_| wrong())?;
        let tls = match endpoint.uri().scheme_str() {
            Some("http") => None,
            Some("https") => Some(options.security.tls()?),
            _ => return Err(wrong()),
        };
        if let Some(tls) = &tls {
            endpoint = endpoint.tls_config(tls.grpc.clone()).map_err(|error| ClientError {
                kind: ErrorKind::FixInput,
                message: format!("TLS cannot be used: {error}"),
            })?;
        }
        if tls.is_none()
            && let Some(wire @ (WireKind::Tls | WireKind::Quic)) = options.wire
        {
            let message = format!("the wire {wire} needs TLS: write https://host:port");
            return Err(ClientError { kind: ErrorKind::FixInput, message });
        }
        let bearer = Bearer::new(options.security.token.as_deref())?;
        let (link_sender, link) = watch::channel(Link::Connecting);
        let releases = Arc::new(Releases::default());
        let opening = Opening { endpoint, options: options.clone(), bearer, tls };
        let task = tokio::spawn(maintain(opening, link_sender, releases.clone())).abort_handle();
        Ok(Self(Arc::new(Inner { options, link, releases, task })))
    }

    /// The settings in use.
    pub fn options(&self) -> &ClientOptions {
        &self.0.options
    }

    /// Whether there is a session at this moment.
    pub fn is_connected(&self) -> bool {
        matches!(*self.0.link.borrow(), Link::Up(_))
    }

    /// Declares a space now rather than at its first use, to learn early whether the server takes it.
    ///
    /// # Errors
    /// When the server cannot be reached or refuses the space.
    pub async fn open_space(&self, space: &KeySpace) -> Result<(), ClientError> {
        let deadline = Instant::now() + self.0.options.connect_timeout;
        let connection = self.connection(deadline).await.map_err(|_| self.unreachable())?;
        Ok(connection.open_space(space, deadline).await?)
    }

    pub(crate) fn unreachable(&self) -> ClientError {
        let why = match &*self.0.link.borrow() {
            Link::Down(why) => why.clone(),
            _ => "no answer in time".into(),
        };
        let message = format!("the cache server at {} cannot be reached: {why}", self.0.options.endpoint);
        ClientError { kind: ErrorKind::Retry, message }
    }

    /// The ways for block bytes, as they are now; none without a session.
    pub fn wires(&self) -> Vec<WireReport> {
        match &*self.0.link.borrow() {
            Link::Up(connection) => connection.wires.report(),
            _ => Vec::new(),
        }
    }

    pub(crate) fn releases(&self) -> Arc<Releases> {
        self.0.releases.clone()
    }

    /// The session in use. Waits only while the first attempt to connect, or to reconnect, is in progress.
    pub(crate) async fn connection(&self, deadline: Instant) -> Result<Connection, MissReason> {
        let mut link = self.0.link.clone();
        let decided = link.wait_for(|link| !matches!(link, Link::Connecting));
        match tokio::time::timeout_at(deadline, decided).await {
            Err(_) => Err(MissReason::Deadline),
            Ok(Err(_)) => Err(MissReason::PeerDown),
            Ok(Ok(link)) => match &*link {
                Link::Up(connection) => Ok(Connection::clone(connection)),
                _ => Err(MissReason::PeerDown),
            },
        }
    }

    /// A session in which `space` is declared, or why there is none.
    pub(crate) async fn connection_for(
        &self,
        space: &KeySpace,
        timeout: Duration,
    ) -> Result<(Connection, Instant), MissReason> {
        let deadline = Instant::now() + timeout;
        let connection = self.connection(deadline).await?;
        match connection.open_space(space, deadline).await {
            Ok(()) => Ok((connection, deadline)),
            Err(status) => {
                tracing::warn!(?space, error = status.message(), "the cache server refuses the key space");
                Err(reason(&status))
            }
        }
    }
}

/// Waits for an answer until the deadline.
pub(crate) async fn until<T>(
    deadline: Instant,
    request: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout_at(deadline, request).await {
        Ok(answer) => answer.map(Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded("no answer in time")),
    }
}

/// The miss that a failed request amounts to.
pub(crate) fn reason(status: &Status) -> MissReason {
    match status.code() {
        tonic::Code::DeadlineExceeded | tonic::Code::Cancelled => MissReason::Deadline,
        tonic::Code::NotFound => MissReason::LeaseLost,
        tonic::Code::ResourceExhausted | tonic::Code::InvalidArgument | tonic::Code::PermissionDenied => {
            MissReason::NotAdmitted
        }
        _ => MissReason::PeerDown,
    }
}

pub(crate) type Grpc = Api;
pub(crate) type AdminGrpc = pb::admin_client::AdminClient<
    tonic::service::interceptor::InterceptedService<tonic::transport::Channel, Bearer>,
>;
