//! The client's end of QUIC. Owns the connection, and how lanes find the fetch that waits for them.

use super::{LANE_HEAD_BYTES, MAX_LANES, QuicOptions, broken, endpoint_config, socket};
use crate::Arrivals;
use crate::frame::{Frame, Link, kind};
use crate::handshake;
use crate::store::SessionKey;
use crate::stream::{self, lost, publish};
use crate::wire::{FetchJob, Following, Found, PublishJob, Reader, Wire, WireKind};
use bytes::{Buf, BufMut, BytesMut};
use cairn_proto::{limits, pb};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use prost::Message;
use quinn::crypto::rustls::QuicClientConfig;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::io::Join;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

/// A QUIC connection to one server, for one session.
pub struct QuicWire {
    endpoint: quinn::Endpoint,
    connection: quinn::Connection,
    lanes: Arc<Lanes>,
    last_transfer: AtomicU64,
    _accepting: AbortOnDropHandle<()>,
}

/// Lanes find the fetch that waits for them.
#[derive(Default)]
struct Lanes(Mutex<HashMap<u64, mpsc::Sender<quinn::RecvStream>>>);

impl Lanes {
    /// A lane of a fetch that was given up is dropped, which tells the server.
    fn arrived(&self, transfer: u64, lane: quinn::RecvStream) {
        if let Some(fetch) = self.waiting().get(&transfer) {
            // There is room for all that a fetch may have.
            drop(fetch.try_send(lane));
        }
    }

    fn register(&self, transfer: u64) -> (Registered<'_>, mpsc::Receiver<quinn::RecvStream>) {
        let (sender, receiver) = mpsc::channel(MAX_LANES as usize);
        self.waiting().insert(transfer, sender);
        (Registered { lanes: self, transfer }, receiver)
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<u64, mpsc::Sender<quinn::RecvStream>>> {
        // An insertion or removal is whole even if something else panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets a fetch that ended, however it did.
struct Registered<'a> {
    lanes: &'a Lanes,
    transfer: u64,
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.lanes.waiting().remove(&self.transfer);
    }
}

impl QuicWire {
    /// Connects to `address`, whose certificate must be for `name`.
    ///
    /// # Errors
    /// When the server cannot be reached, is not who it should be, or does not know the session.
    pub async fn connect(
        tls: &rustls::ClientConfig,
        (address, name): (SocketAddr, &str),
        options: &QuicOptions,
        (session, key): (u64, SessionKey),
    ) -> Result<Self, Status> {
        let failed = |error: &dyn std::fmt::Display| Status::unavailable(format!("no QUIC: {error}"));
        let local: SocketAddr = if address.is_ipv4() {
            ([0, 0, 0, 0], 0).into()
        } else {
            (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
        };
        let socket = socket(local).map_err(|error| failed(&error))?;
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint = quinn::Endpoint::new(endpoint_config(), None, socket, runtime);
        let endpoint = endpoint.map_err(|error| failed(&error))?;
        let mut tls = tls.clone();
        tls.alpn_protocols = vec![crate::ALPN.to_vec()];
        tls.enable_early_data = false;
        let crypto = QuicClientConfig::try_from(tls).map_err(|error| failed(&error))?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(options.transport()));
        let connecting = endpoint.connect_with(config, address, name).map_err(|error| failed(&error))?;
        let connection = connecting.await.map_err(|error| failed(&error))?;
        let (send, receive) = connection.open_bi().await.map_err(broken)?;
        handshake::open(&mut Link::new(tokio::io::join(receive, send)), session, &key).await?;
        let lanes = Arc::new(Lanes::default());
        let accepting = tokio::spawn(accept_lanes(connection.clone(), lanes.clone()));
        let last_transfer = AtomicU64::new(0);
        Ok(Self { endpoint, connection, lanes, last_transfer, _accepting: AbortOnDropHandle::new(accepting) })
    }

    /// Moves the connection to another local port, as when a network changes.
    ///
    /// # Errors
    /// When there is no such port.
    pub fn rebind(&self) -> std::io::Result<()> {
        let local = self.endpoint.local_addr()?;
        self.endpoint.rebind(socket(SocketAddr::new(local.ip(), 0))?)
    }

    /// UDP payload in use.
    pub fn mtu(&self) -> u16 {
        self.connection.stats().path.current_mtu
    }

    async fn request(&self) -> Result<Link<Join<quinn::RecvStream, quinn::SendStream>>, Status> {
        let (send, receive) = self.connection.open_bi().await.map_err(broken)?;
        Ok(Link::new(tokio::io::join(receive, send)))
    }

    async fn ask<A: Message + Default>(
        &self,
        kind: u8,
        question: &impl Message,
        answer: u8,
    ) -> Result<A, Status> {
        stream::ask(&mut self.request().await?, kind, question, answer).await?
    }

    async fn fetch(&self, job: &FetchJob, arrivals: &mut Arrivals<'_>) -> Result<(), Status> {
        if job.range_bytes == 0 {
            return stream::fetch(&mut self.request().await?, job, arrivals).await;
        }
        let transfer = self.last_transfer.fetch_add(1, Ordering::Relaxed) + 1;
        let (_registered, streams) = self.lanes.register(transfer);
        let mut link = self.request().await?;
        link.send(kind::FETCH, &pb::FetchRequest { transfer, ..job.request() }).await?;
        let pb::DataLanes { lanes } = link.answer().await?.of_kind(kind::LANES)?;
        if lanes > MAX_LANES {
            return Err(Status::internal("more lanes than a server may use"));
        }
        let arrivals = tokio::sync::Mutex::new(arrivals);
        let control = async {
            loop {
                match link.answer().await? {
                    Frame::Message(kind::LOST, body) => lost(*arrivals.lock().await, body)?,
                    Frame::Message(kind::END, _) => return Ok(()),
                    other => return Err(other.unexpected()),
                }
            }
        };
        tokio::try_join!(control, receive_lanes(streams, lanes, &arrivals))?;
        Ok(())
    }
}

impl Drop for QuicWire {
    fn drop(&mut self) {
        self.connection.close(0u32.into(), b"done");
    }
}

async fn accept_lanes(connection: quinn::Connection, lanes: Arc<Lanes>) {
    while let Ok(mut lane) = connection.accept_uni().await {
        let lanes = lanes.clone();
        tokio::spawn(async move {
            let mut number = [0; 8];
            if lane.read_exact(&mut number).await.is_ok() {
                lanes.arrived(u64::from_le_bytes(number), lane);
            }
        });
    }
}

/// All lanes of a fetch at once. The arrivals are locked for one chunk at a time, never across a wait.
async fn receive_lanes(
    mut streams: mpsc::Receiver<quinn::RecvStream>,
    count: u32,
    arrivals: &tokio::sync::Mutex<&mut Arrivals<'_>>,
) -> Result<(), Status> {
    let mut running = FuturesUnordered::new();
    let mut started = 0;
    while started < count || !running.is_empty() {
        tokio::select! {
            lane = streams.recv(), if started < count => {
                let lane = lane.ok_or_else(|| broken("a lane is missing"))?;
                started += 1;
                running.push(receive_lane(lane, arrivals));
            }
            Some(result) = running.next(), if !running.is_empty() => result?,
        }
    }
    Ok(())
}

/// Pieces on a lane: block (u32), length (u32), offset (u64), bytes.
async fn receive_lane(
    mut lane: quinn::RecvStream,
    arrivals: &tokio::sync::Mutex<&mut Arrivals<'_>>,
) -> Result<(), Status> {
    let mut head = BytesMut::with_capacity(LANE_HEAD_BYTES);
    let (mut block, mut offset, mut len, mut left) = (0, 0, 0, 0);
    while let Some(chunk) = lane.read_chunk(limits::CHUNK_BYTES, true).await.map_err(broken)? {
        let mut bytes = chunk.bytes;
        while !bytes.is_empty() {
            if left == 0 {
                head.put(bytes.split_to(bytes.len().min(LANE_HEAD_BYTES - head.len())));
                if head.len() == LANE_HEAD_BYTES {
                    (block, len, offset) = (head.get_u32_le(), head.get_u32_le() as usize, head.get_u64_le());
                    left = len;
                }
                continue;
            }
            let part = bytes.split_to(bytes.len().min(left));
            let mut arrivals = arrivals.lock().await;
            // Packets are small: the checksum is computed when the piece is whole, while it is still in the cache.
            let start = len - left;
            arrivals.room(block, offset, len)?[start..start + part.len()].copy_from_slice(&part);
            left -= part.len();
            if left == 0 {
                arrivals.added(block, len)?;
            }
        }
    }
    match left == 0 && head.is_empty() {
        true => Ok(()),
        false => Err(broken("a lane ended in the middle of a piece")),
    }
}

/// Blocks that follow on a stream of their own.
struct Coming(Link<Join<quinn::RecvStream, quinn::SendStream>>);

impl Following for Coming {
    fn receive<'a>(mut self: Box<Self>, arrivals: &'a mut Arrivals<'_>) -> BoxFuture<'a, Result<(), Status>>
    where
        Self: 'a,
    {
        async move { stream::receive(&mut self.0, arrivals).await }.boxed()
    }
}

impl Reader for QuicWire {
    fn read<'a>(&'a self, request: &'a pb::ReadRequest) -> BoxFuture<'a, Result<Found<'a>, Status>> {
        let work = async move {
            let mut link = self.request().await?;
            let (found, follows) = stream::find(&mut link, request).await??;
            let blocks = follows.then(|| Box::new(Coming(link)) as Box<dyn Following + 'a>);
            Ok((found, blocks))
        };
        work.boxed()
    }
}

impl Wire for QuicWire {
    fn kind(&self) -> WireKind {
        WireKind::Quic
    }

    fn fetch<'a>(
        &'a self,
        job: &'a FetchJob,
        arrivals: &'a mut Arrivals<'_>,
    ) -> BoxFuture<'a, Result<(), Status>> {
        Self::fetch(self, job, arrivals).boxed()
    }

    fn publish<'a>(&'a self, job: &'a PublishJob) -> BoxFuture<'a, Result<Vec<pb::BlockCommit>, Status>> {
        let work = async move { publish(&mut self.request().await?, job).await };
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
