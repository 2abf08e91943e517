//! The server's end of QUIC: a task for each connection, one for each request, one for each lane.

use super::{LANE_HEAD_BYTES, MAX_LANES, MAX_REQUESTS, QuicOptions, broken, endpoint_config, socket};
use crate::frame::{Frame, Link, decode, kind};
use crate::handshake;
use crate::store::{Brought, Hold, Reach, Receiving, Store};
use crate::stream::{self, take_pieces, within};
use crate::wire::WireKind;
use bytes::{BufMut, Bytes, BytesMut};
use cairn_proto::{MissReason, limits, pb};
use futures::StreamExt;
use quinn::crypto::rustls::QuicServerConfig;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Join;
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

/// Connections at a time, in all.
const MAX_CONNECTIONS: usize = 4096;

/// Window of a connection before it is known whose it is.
const STRANGER_WINDOW_BYTES: u32 = 64 << 10;

/// Smallest range that is sent by itself.
const MIN_RANGE_BYTES: usize = 4096;

/// Longest farewell at the end of a server.
const FAREWELL: Duration = Duration::from_millis(500);

/// Blocks of a fetch in ranges that are gathered before the first leaves, in bytes.
const GROUP_BYTES: usize = 256 << 20;

/// Listens for QUIC clients.
pub struct QuicServer {
    endpoint: quinn::Endpoint,
    store: Arc<dyn Store>,
    lanes: u32,
    /// Of a connection, once it is known whose it is.
    window: u32,
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
        let mut transport = options.transport();
        transport
            .max_concurrent_bidi_streams(1u32.into())
            .max_concurrent_uni_streams(0u32.into())
            .receive_window(STRANGER_WINDOW_BYTES.into());
        config.transport_config(Arc::new(transport));
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint = quinn::Endpoint::new(endpoint_config(), Some(config), socket(address)?, runtime)?;
        let lanes = options.lanes.clamp(1, MAX_LANES);
        let window = options.window_bytes.saturating_mul(2);
        Ok(Self { endpoint, store, lanes, window })
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
                    let patience = server.store.limits().handshake_timeout;
                    let opened = tokio::time::timeout(patience, server.open(incoming)).await;
                    let opened = opened.map_err(|_| Status::deadline_exceeded("no handshake"))?;
                    let (connection, session, _place) = opened?;
                    server.serve(connection, session).await
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

    /// From the first packet to the proof. Until then the client has one stream, and a small window.
    async fn open(&self, incoming: quinn::Incoming) -> Result<(quinn::Connection, u64, Hold), Status> {
        let connection = incoming.await.map_err(broken)?;
        let (send, receive) = connection.accept_bi().await.map_err(broken)?;
        let mut link = Link::with_a_stranger(tokio::io::join(receive, send));
        let (session, place) = handshake::accept(&mut link, &*self.store).await?;
        connection.set_max_concurrent_bi_streams(MAX_REQUESTS.into());
        connection.set_receive_window(self.window.into());
        Ok((connection, session, place))
    }

    async fn serve(self: &Arc<Self>, connection: quinn::Connection, session: u64) -> Result<(), Status> {
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
            Frame::Message(kind::READ, body) => {
                let who = (WireKind::Quic, session);
                let work = stream::find_and_send(&self.store, link, who, decode(body)?);
                within(limits.fetch_timeout, work).await
            }
            Frame::Message(kind @ (kind::LOOKUP | kind::RESERVE), body) => {
                stream::answer(&self.store, link, session, (kind, body), false).await
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
        let mut reading =
            self.store.read(WireKind::Quic, session, request.lease_id, positions, Reach::default())?;
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
                Ok(Brought { bytes, location }) => {
                    sent += bytes.len() as u64;
                    group.add(block, bytes);
                    // A block that was read past host memory holds room that the next one may need.
                    if group.is_full() || location.is_none() {
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
        let step = self.range_bytes.clamp(MIN_RANGE_BYTES, limits::CHUNK_BYTES);
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
