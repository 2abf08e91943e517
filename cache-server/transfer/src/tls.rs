//! TLS 1.3 over TCP: the network wire where packets are small. On a path with 1500-byte packets QUIC takes about three times the
//! CPU for the same bytes, because every packet is encrypted, sent and acknowledged by itself in user space.

use crate::Arrivals;
use crate::frame::{Link, kind};
use crate::handshake;
use crate::pool::{Pool, Taken};
use crate::rdma::RdmaServer;
use crate::store::{SessionKey, Store};
use crate::stream;
use crate::wire::{FetchJob, Following, Found, PublishJob, Reader, Wire, WireKind};
use cairn_proto::pb;
use futures::FutureExt;
use futures::future::BoxFuture;
use prost::Message;
use rustls::pki_types::ServerName;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

/// Connections at a time, in all.
const MAX_CONNECTIONS: usize = 4096;

/// Pause when no more connections can be accepted (descriptors, say).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

pub(crate) type TlsLink = Link<client::TlsStream<TcpStream>>;

/// How to open data connections to one server, for one session.
pub(crate) struct Dialer {
    connector: TlsConnector,
    /// `host:port`.
    address: String,
    name: ServerName<'static>,
    session: u64,
    key: SessionKey,
}

impl Dialer {
    pub(crate) fn new(
        config: Arc<rustls::ClientConfig>,
        (address, name): (String, ServerName<'static>),
        session: u64,
        key: SessionKey,
    ) -> Self {
        Self { connector: TlsConnector::from(config), address, name, session, key }
    }

    pub(crate) async fn open(&self) -> Result<TlsLink, Status> {
        let failed =
            |error: std::io::Error| Status::unavailable(format!("cannot reach {}: {error}", self.address));
        let socket = TcpStream::connect(&self.address).await.map_err(failed)?;
        socket.set_nodelay(true).map_err(failed)?;
        let stream = self.connector.connect(self.name.clone(), socket).await.map_err(failed)?;
        let mut link = Link::new(stream);
        handshake::open(&mut link, self.session, &self.key).await?;
        Ok(link)
    }
}

/// TLS connections to one server, for one session.
pub struct TlsWire {
    dialer: Dialer,
    pool: Pool<TlsLink>,
    segment_bytes: Option<u32>,
    resumed: bool,
}

impl TlsWire {
    /// Connects to `address`, whose certificate must be for `name`.
    ///
    /// # Errors
    /// When the server cannot be reached, is not who it should be, or does not know the session.
    pub async fn connect(
        config: Arc<rustls::ClientConfig>,
        to: (String, ServerName<'static>),
        session: u64,
        key: SessionKey,
    ) -> Result<Self, Status> {
        let dialer = Dialer::new(config, to, session, key);
        let mut first = dialer.open().await?;
        let segment_bytes = segment_bytes(first.io().get_ref().0);
        let resumed = first.io().get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed);
        let pool = Pool::new();
        pool.give_back(first);
        Ok(Self { dialer, pool, segment_bytes, resumed })
    }

    /// Payload of one TCP segment on the way to the server: what a packet can carry.
    pub fn segment_bytes(&self) -> Option<u32> {
        self.segment_bytes
    }

    /// Whether the first connection went on from an earlier TLS session, without certificates crossing again.
    pub fn is_resumed(&self) -> bool {
        self.resumed
    }

    async fn ask<A: Message + Default>(
        &self,
        kind: u8,
        question: &impl Message,
        answer: u8,
    ) -> Result<A, Status> {
        let mut taken = self.pool.take().await?;
        let mut link = self.taken(taken.connection()).await?;
        let answer = stream::ask(&mut link, kind, question, answer).await?;
        self.pool.give_back(link);
        answer
    }

    async fn taken(&self, idle: Option<TlsLink>) -> Result<TlsLink, Status> {
        match idle {
            Some(link) => Ok(link),
            None => self.dialer.open().await,
        }
    }
}

/// Blocks that follow on a connection that was taken for them.
struct Coming<'a> {
    taken: Taken<'a, TlsLink>,
    link: TlsLink,
}

impl Following for Coming<'_> {
    fn receive<'a>(mut self: Box<Self>, arrivals: &'a mut Arrivals<'_>) -> BoxFuture<'a, Result<(), Status>>
    where
        Self: 'a,
    {
        let work = async move {
            stream::receive(&mut self.link, arrivals).await?;
            self.taken.put_back(self.link);
            Ok(())
        };
        work.boxed()
    }
}

/// `None` when the system does not say.
fn segment_bytes(socket: &TcpStream) -> Option<u32> {
    socket2::SockRef::from(socket).tcp_mss().ok()
}

impl Reader for TlsWire {
    fn read<'a>(&'a self, request: &'a pb::ReadRequest) -> BoxFuture<'a, Result<Found<'a>, Status>> {
        let work = async move {
            let mut taken = self.pool.take().await?;
            let mut link = self.taken(taken.connection()).await?;
            match stream::find(&mut link, request).await? {
                Ok((found, true)) => {
                    Ok((found, Some(Box::new(Coming { taken, link }) as Box<dyn Following + 'a>)))
                }
                Ok((found, false)) => {
                    taken.put_back(link);
                    Ok((found, None))
                }
                Err(refusal) => {
                    taken.put_back(link);
                    Err(refusal)
                }
            }
        };
        work.boxed()
    }
}

impl Wire for TlsWire {
    fn kind(&self) -> WireKind {
        WireKind::Tls
    }

    fn fetch<'a>(
        &'a self,
        job: &'a FetchJob,
        arrivals: &'a mut Arrivals<'_>,
    ) -> BoxFuture<'a, Result<(), Status>> {
        let work = async move {
            let mut taken = self.pool.take().await?;
            let mut link = self.taken(taken.connection()).await?;
            stream::fetch(&mut link, job, arrivals).await?;
            self.pool.give_back(link);
            Ok(())
        };
        work.boxed()
    }

    fn publish<'a>(&'a self, job: &'a PublishJob) -> BoxFuture<'a, Result<Vec<pb::BlockCommit>, Status>> {
        let work = async move {
            let mut taken = self.pool.take().await?;
            let mut link = self.taken(taken.connection()).await?;
            let commits = stream::publish(&mut link, job).await?;
            self.pool.give_back(link);
            Ok(commits)
        };
        work.boxed()
    }

    fn lookup<'a>(
        &'a self,
        request: &'a pb::LookupRequest,
    ) -> Option<BoxFuture<'a, Result<pb::LookupResponse, Status>>> {
        Some(self.ask(kind::LOOKUP, request, kind::FOUND).boxed())
    }

    fn reader(&self) -> Option<&dyn Reader> {
        Some(self)
    }

    fn reserve<'a>(
        &'a self,
        request: &'a pb::ReserveRequest,
    ) -> Option<BoxFuture<'a, Result<pb::ReserveResponse, Status>>> {
        Some(self.ask(kind::RESERVE, request, kind::RESERVED).boxed())
    }
}

/// Serves TLS clients until `stop`; those that ask for it get queue pairs of `rdma`.
pub async fn serve(
    store: Arc<dyn Store>,
    (listener, config): (TcpListener, Arc<rustls::ServerConfig>),
    rdma: Option<Arc<RdmaServer>>,
    stop: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(config);
    let (room, tasks) = (Arc::new(Semaphore::new(MAX_CONNECTIONS)), TaskTracker::new());
    while let Some(accepted) = stop.run_until_cancelled(listener.accept()).await {
        let (socket, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a TLS data connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Ok(permit) = room.clone().try_acquire_owned() else {
            tracing::warn!(max = MAX_CONNECTIONS, "too many TLS data connections");
            continue;
        };
        let (store, acceptor, rdma, stop) = (store.clone(), acceptor.clone(), rdma.clone(), stop.clone());
        tasks.spawn(async move {
            let work = async {
                let stream = accept(&acceptor, socket, store.limits().handshake_timeout).await?;
                stream::serve(store, stream, rdma).await
            };
            if let Some(Err(status)) = stop.run_until_cancelled(work).await {
                tracing::debug!(%peer, error = status.message(), "a TLS data connection ended");
            }
            drop(permit);
        });
    }
    tasks.close();
    tasks.wait().await;
}

async fn accept(
    acceptor: &TlsAcceptor,
    socket: TcpStream,
    patience: Duration,
) -> Result<server::TlsStream<TcpStream>, Status> {
    let failed = |error: std::io::Error| Status::unavailable(format!("no TLS: {error}"));
    socket.set_nodelay(true).map_err(failed)?;
    let accepted = tokio::time::timeout(patience, acceptor.accept(socket)).await;
    accepted.map_err(|_| Status::deadline_exceeded("the TLS handshake took too long"))?.map_err(failed)
}
