//! QUIC. A request has a bidirectional stream of its own, and whole blocks come back on it: that is as fast as the connection. If ranges
//! (layers) are asked for, they come on several unidirectional streams (lanes), each block on one of them, the first range of every
//! block before the second of any: so a lost packet holds up one lane, and a consumer can use the first layer early.
//!
//! 0-RTT is off: a replayed request could take a lease or fill a reservation.

use crate::Arrivals;
use crate::frame::{Frame, Link, decode, kind};
use crate::handshake;
use crate::store::{Brought, Receiving, SessionKey, Store};
use crate::stream::{self, lost, publish, take_pieces, within};
use crate::wire::{FetchJob, PublishJob, Wire, WireKind};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use cairn_proto::{MissReason, limits, pb};
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use prost::Message;
use quinn::congestion::{BbrConfig, CubicConfig, NewRenoConfig};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::Join;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use tonic::Status;

/// Largest UDP payload. With segmentation offload ten packets leave in one call, and a call takes at most 65,507 bytes: with larger packets
/// quinn 0.11 stalls for ever.
pub const MAX_MTU: u16 = 6500;

/// Every path must carry this (RFC 9000, section 14).
pub const MIN_MTU: u16 = 1200;

/// Connections at a time, in all.
const MAX_CONNECTIONS: usize = 4096;

/// Requests of one connection at a time.
const MAX_REQUESTS: u32 = 64;

/// Lanes of one connection at a time.
const MAX_LANES: u32 = 256;

/// Socket buffers: bursts of packets fit, so that few are lost on a busy machine.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Whoever is silent for this long is gone; asked after each interval.
const IDLE_TIMEOUT_MS: u32 = 15_000;
const KEEPALIVE: Duration = Duration::from_secs(4);

/// Longest farewell at the end of a server.
const FAREWELL: Duration = Duration::from_millis(500);

/// Blocks of a fetch in ranges that are gathered before the first leaves, in bytes.
const GROUP_BYTES: usize = 256 << 20;

/// How a QUIC connection behaves.
#[derive(Clone, Copy, Debug)]
pub struct QuicOptions {
    /// UDP payload to start with. The path must carry it: 1200 always works, [`MAX_MTU`] wants loopback or jumbo frames.
    pub initial_mtu: u16,
    /// Largest UDP payload that is probed for, at most [`MAX_MTU`].
    pub max_mtu: u16,
    /// Bytes on their way in one stream, and in all together.
    pub window_bytes: u32,
    /// Who decides how fast to send.
    pub congestion: Congestion,
    /// Streams for the pieces of one fetch.
    pub lanes: u32,
}

/// Congestion controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Congestion {
    /// RFC 9438: the default.
    Cubic,
    /// RFC 6582.
    NewReno,
    /// For long paths with loss that is not congestion.
    Bbr,
}

impl std::str::FromStr for Congestion {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "cubic" => Ok(Self::Cubic),
            "newreno" => Ok(Self::NewReno),
            "bbr" => Ok(Self::Bbr),
            other => Err(format!("{other:?} is no congestion controller; known: cubic, newreno, bbr")),
        }
    }
}

impl Default for QuicOptions {
    fn default() -> Self {
        Self {
            initial_mtu: MIN_MTU,
            max_mtu: MAX_MTU,
            window_bytes: 8 << 20,
            congestion: Congestion::Cubic,
            lanes: 4,
        }
    }
}

impl QuicOptions {
    fn transport(&self) -> quinn::TransportConfig {
        let mut transport = quinn::TransportConfig::default();
        let mut discovery = quinn::MtuDiscoveryConfig::default();
        let max_mtu = self.max_mtu.clamp(MIN_MTU, MAX_MTU);
        discovery.upper_bound(max_mtu);
        transport
            .initial_mtu(self.initial_mtu.clamp(MIN_MTU, max_mtu))
            .mtu_discovery_config(Some(discovery))
            .stream_receive_window(self.window_bytes.into())
            .receive_window(self.window_bytes.saturating_mul(2).into())
            .send_window(u64::from(self.window_bytes) * 2)
            .max_concurrent_bidi_streams(MAX_REQUESTS.into())
            .max_concurrent_uni_streams(MAX_LANES.into())
            .keep_alive_interval(Some(KEEPALIVE))
            .max_idle_timeout(Some(quinn::VarInt::from_u32(IDLE_TIMEOUT_MS).into()));
        match self.congestion {
            Congestion::Cubic => transport.congestion_controller_factory(Arc::new(CubicConfig::default())),
            Congestion::NewReno => {
                transport.congestion_controller_factory(Arc::new(NewRenoConfig::default()))
            }
            Congestion::Bbr => transport.congestion_controller_factory(Arc::new(BbrConfig::default())),
        };
        transport
    }
}

fn endpoint_config() -> quinn::EndpointConfig {
    let mut config = quinn::EndpointConfig::default();
    // Refused only below 1200.
    let _ = config.max_udp_payload_size(MAX_MTU);
    config
}

fn socket(address: SocketAddr) -> std::io::Result<std::net::UdpSocket> {
    let socket = std::net::UdpSocket::bind(address)?;
    // The system may allow less: that is fine.
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES);
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES);
    Ok(socket)
}

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

    fn expect(&self, transfer: u64) -> (Expected<'_>, mpsc::Receiver<quinn::RecvStream>) {
        let (sender, receiver) = mpsc::channel(MAX_LANES as usize);
        self.waiting().insert(transfer, sender);
        (Expected { lanes: self, transfer }, receiver)
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<u64, mpsc::Sender<quinn::RecvStream>>> {
        // An insertion or removal is whole even if something else panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Forgets a fetch that ended, however it did.
struct Expected<'a> {
    lanes: &'a Lanes,
    transfer: u64,
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        self.lanes.waiting().remove(&self.transfer);
    }
}

fn broken(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("the QUIC connection broke: {error}"))
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
        stream::ask(&mut self.request().await?, kind, question, answer).await
    }

    async fn fetch(&self, job: &FetchJob, arrivals: &mut Arrivals<'_>) -> Result<(), Status> {
        if job.range_bytes == 0 {
            return stream::fetch(&mut self.request().await?, job, arrivals).await;
        }
        let transfer = self.last_transfer.fetch_add(1, Ordering::Relaxed) + 1;
        let (_expected, streams) = self.lanes.expect(transfer);
        let mut link = self.request().await?;
        link.send(kind::FETCH, &pb::FetchRequest { transfer, ..job.request() }).await?;
        let pb::DataLanes { lanes } = link.answer().await?.expect(kind::LANES)?;
        if lanes > MAX_LANES {
            return Err(Status::internal("more lanes than a server may use"));
        }
        let arrivals = tokio::sync::Mutex::new(arrivals);
        let control = async {
            loop {
                match link.answer().await? {
                    Frame::Message(kind::LOST, body) => lost(&mut *arrivals.lock().await, body)?,
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

const LANE_HEAD_BYTES: usize = 16;

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

    fn reserve<'a>(
        &'a self,
        request: &'a pb::ReserveRequest,
    ) -> Option<BoxFuture<'a, Result<pb::ReserveResponse, Status>>> {
        Some(self.ask(kind::RESERVE, request, kind::RESERVED).boxed())
    }
}

/// Listens for QUIC clients.
pub struct QuicServer {
    endpoint: quinn::Endpoint,
    store: Arc<dyn Store>,
    lanes: u32,
}

impl QuicServer {
    /// Binds a UDP port.
    ///
    /// # Errors
    /// When the address or the TLS settings cannot be used.
    pub fn bind(
        address: SocketAddr,
        tls: &rustls::ServerConfig,
        options: &QuicOptions,
        store: Arc<dyn Store>,
    ) -> std::io::Result<Self> {
        let mut tls = tls.clone();
        tls.alpn_protocols = vec![crate::ALPN.to_vec()];
        tls.max_early_data_size = 0;
        let crypto = QuicServerConfig::try_from(tls).map_err(std::io::Error::other)?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::new(options.transport()));
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint = quinn::Endpoint::new(endpoint_config(), Some(config), socket(address)?, runtime)?;
        let lanes = options.lanes.clamp(1, MAX_LANES);
        Ok(Self { endpoint, store, lanes })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the socket does not say.
    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Serves until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let server = Arc::new(self);
        let (room, tasks) = (Arc::new(Semaphore::new(MAX_CONNECTIONS)), TaskTracker::new());
        while let Some(Some(incoming)) = stop.run_until_cancelled(server.endpoint.accept()).await {
            // An address that is not proven to be the client's costs the server nothing but one small packet.
            if !incoming.remote_address_validated() && room.available_permits() < MAX_CONNECTIONS / 2 {
                let _ = incoming.retry();
                continue;
            }
            let Ok(permit) = room.clone().try_acquire_owned() else {
                incoming.refuse();
                continue;
            };
            let (server, stop) = (server.clone(), stop.clone());
            tasks.spawn(async move {
                let work = async {
                    let connection = incoming.await.map_err(broken)?;
                    server.serve(connection).await
                };
                if let Some(Err(status)) = stop.run_until_cancelled(work).await {
                    tracing::debug!(error = status.message(), "a QUIC connection ended");
                }
                drop(permit);
            });
        }
        tasks.close();
        tasks.wait().await;
        let endpoint = server.endpoint.clone();
        drop(server);
        endpoint.close(0u32.into(), b"the server is shutting down");
        // So that clients hear of it. Those that vanished would take three probe timeouts.
        let _ = tokio::time::timeout(FAREWELL, endpoint.wait_idle()).await;
    }

    async fn serve(self: &Arc<Self>, connection: quinn::Connection) -> Result<(), Status> {
        let first = connection.accept_bi();
        let first = tokio::time::timeout(Duration::from_secs(5), first).await;
        let (send, receive) =
            first.map_err(|_| Status::deadline_exceeded("no handshake"))?.map_err(broken)?;
        let mut link = Link::new(tokio::io::join(receive, send));
        let (session, _place) = handshake::accept(&mut link, &*self.store).await?;
        let mut requests = tokio::task::JoinSet::new();
        let ended = self.store.ended(session);
        tokio::pin!(ended);
        loop {
            tokio::select! {
                () = &mut ended => return Ok(()),
                accepted = connection.accept_bi() => {
                    let (send, receive) = accepted.map_err(broken)?;
                    let (server, connection) = (self.clone(), connection.clone());
                    requests.spawn(async move {
                        let given_up = send.stopped();
                        let mut link = Link::new(tokio::io::join(receive, send));
                        let result = tokio::select! {
                            result = server.request(&mut link, &connection, session) => result,
                            // The client does not want the answer any more.
                            _ = given_up => return,
                        };
                        if let Err(status) = result {
                            tracing::debug!(error = status.message(), "a QUIC request ended early");
                            // The client may be gone.
                            let _ = link.fail(&status).await;
                        }
                    });
                }
                Some(_) = requests.join_next(), if !requests.is_empty() => {}
            }
        }
    }

    async fn request(
        &self,
        link: &mut Link<Join<quinn::RecvStream, quinn::SendStream>>,
        connection: &quinn::Connection,
        session: u64,
    ) -> Result<(), Status> {
        let limits = self.store.limits();
        match within(limits.idle_timeout, link.answer()).await? {
            Frame::Message(kind::FETCH, body) => {
                let request: pb::FetchRequest = decode(body)?;
                if request.range_bytes == 0 {
                    let work = stream::send(&self.store, link, WireKind::Quic, session, &request);
                    return within(limits.fetch_timeout, work).await;
                }
                within(limits.fetch_timeout, self.send(link, connection, session, request)).await
            }
            Frame::Message(kind @ (kind::LOOKUP | kind::RESERVE), body) => {
                stream::answer(&self.store, link, session, (kind, body)).await
            }
            Frame::Message(kind::PUBLISH, body) => {
                let request: pb::PublishHeader = decode(body)?;
                let filling = self.store.fill(WireKind::Quic, session, request.reservation_id)?;
                let mut receiving = Receiving::new(self.store.clone(), filling);
                take_pieces(link, limits.idle_timeout, &mut receiving).await?;
                link.send(kind::COMMITS, &receiving.finish()).await
            }
            other => Err(other.unexpected()),
        }
    }

    async fn send(
        &self,
        link: &mut Link<Join<quinn::RecvStream, quinn::SendStream>>,
        connection: &quinn::Connection,
        session: u64,
        request: pb::FetchRequest,
    ) -> Result<(), Status> {
        let positions = (request.first as usize, request.count as usize);
        let mut reading = self.store.read(WireKind::Quic, session, request.lease_id, positions)?;
        let count = self.lanes.min(request.count.max(1));
        link.send(kind::LANES, &pb::DataLanes { lanes: count }).await?;
        let mut lanes = Vec::new();
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..count {
            let mut lane = connection.open_uni().await.map_err(broken)?;
            lane.write_all(&request.transfer.to_le_bytes()).await.map_err(broken)?;
            let (pieces, queue) = mpsc::channel(4);
            tasks.spawn(send_lane(lane, queue));
            lanes.push(pieces);
        }
        let mut group = Group { range_bytes: request.range_bytes as usize, blocks: Vec::new(), bytes: 0 };
        let mut sent = 0;
        while let Some((block, brought)) = reading.blocks.next().await {
            match brought {
                Ok(Brought { bytes, .. }) => {
                    sent += bytes.len() as u64;
                    group.add(block, bytes);
                    if group.is_full() {
                        group.send(&lanes).await?;
                    }
                }
                Err(reason) => lose(link, block, reason),
            }
        }
        group.send(&lanes).await?;
        drop(lanes);
        while let Some(ended) = tasks.join_next().await {
            ended.map_err(broken)??;
        }
        self.store.sent(WireKind::Quic, sent);
        link.send(kind::END, &()).await
    }
}

fn lose(link: &mut Link<Join<quinn::RecvStream, quinn::SendStream>>, block: u32, reason: MissReason) {
    link.push(kind::LOST, &pb::BlockLoss { block, reason: pb::MissReason::from(reason).into() });
}

type Piece = (u32, u64, Bytes);

/// Blocks that are sent together, range by range.
struct Group {
    range_bytes: usize,
    blocks: Vec<(u32, Bytes)>,
    bytes: usize,
}

impl Group {
    fn add(&mut self, block: u32, bytes: Bytes) {
        self.bytes += bytes.len();
        self.blocks.push((block, bytes));
    }

    fn is_full(&self) -> bool {
        self.bytes >= GROUP_BYTES
    }

    async fn send(&mut self, lanes: &[mpsc::Sender<Piece>]) -> Result<(), Status> {
        let longest = self.blocks.iter().map(|(_, bytes)| bytes.len()).max().unwrap_or(0);
        // A piece is never larger than others may send.
        let step = self.range_bytes.clamp(1, limits::CHUNK_BYTES);
        for start in (0..longest).step_by(step) {
            for (block, bytes) in &self.blocks {
                let end = bytes.len().min(start + step);
                // A block stays on one lane, so that its pieces arrive in order.
                let lane = &lanes[*block as usize % lanes.len()];
                let piece = (*block, start as u64, bytes.slice(start.min(end)..end));
                lane.send(piece).await.map_err(|_| broken("a lane ended"))?;
            }
        }
        self.blocks.clear();
        self.bytes = 0;
        Ok(())
    }
}

async fn send_lane(mut lane: quinn::SendStream, mut pieces: mpsc::Receiver<Piece>) -> Result<(), Status> {
    while let Some((block, offset, bytes)) = pieces.recv().await {
        let mut head = BytesMut::with_capacity(LANE_HEAD_BYTES);
        head.put_u32_le(block);
        head.put_u32_le(bytes.len() as u32);
        head.put_u64_le(offset);
        lane.write_all_chunks(&mut [head.freeze(), bytes]).await.map_err(broken)?;
    }
    lane.finish().map_err(broken)
}
