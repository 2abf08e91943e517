//! The client's end of RDMA: connections with a queue pair, and a buffer each through which bytes come and go, verified as
//! they are copied out of it while the next are on their way.

use super::Ticket;
use super::registered::{Access, Region};
use super::verbs::{MAX_PIECES, Piece, Queue, Way, aside};
use crate::Arrivals;
use crate::frame::{Link, kind, nonsense};
use crate::located::{self, Bring, MAX_CHUNKS, number, offset};
use crate::map::{Map, memory};
use crate::pool::Pool;
use crate::store::{Location, SessionKey};
use crate::stream::{self, is_refusal};
use crate::tls::{Dialer, TlsLink};
use crate::wire::{FetchJob, Offer, PublishJob, Wire, WireKind};
use cairn_proto::pb;
use futures::FutureExt;
use futures::future::BoxFuture;
use prost::Message;
use rustls::pki_types::ServerName;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::TcpStream;
use tonic::{Code, Status};

/// Registered memory of one connection.
const BUFFER_BYTES: u64 = 16 << 20;

/// Bytes behind it, for reads that only push what was written before them out of the way.
const SCRATCH_BYTES: u64 = 4096;

/// Enough to be ordered after every write.
const FLUSH_BYTES: u32 = 8;

/// Less staging memory would cut blocks into a multitude of parts.
const MIN_HALF_BYTES: u64 = 64 << 10;

/// Batches on their way at a time: one is copied while the other comes.
const HALVES: usize = 2;

type TlsStream = tokio_rustls::client::TlsStream<TcpStream>;

/// Queue pairs with one server, for one session.
pub struct RdmaWire {
    dialer: Dialer,
    pool: Pool<Connection>,
}

impl RdmaWire {
    /// Connects to the TLS data path of a server at `address`, whose certificate must be for `name`, and then to its RDMA device.
    ///
    /// # Errors
    /// When either cannot be reached from here, or the server does not know the session.
    pub async fn connect(
        config: Arc<rustls::ClientConfig>,
        to: (String, ServerName<'static>),
        session: u64,
        key: SessionKey,
    ) -> Result<Self, Status> {
        let wire = Self { dialer: Dialer::new(config, to, session, key), pool: Pool::new() };
        let first = wire.open().await?;
        wire.pool.give_back(first);
        Ok(wire)
    }

    async fn open(&self) -> Result<Connection, Status> {
        let mut link = self.dialer.open().await?;
        link.send(kind::QUEUE_PAIR, &()).await?;
        let offer: pb::QueuePairOffer = link.answer().await?.of_kind(kind::QUEUE_PAIR_AT)?;
        let ticket: Ticket = offer.ticket.as_ref().try_into().map_err(nonsense)?;
        let mut address: SocketAddr = offer.address.parse().map_err(nonsense)?;
        if address.ip().is_unspecified() {
            let peer = link.io().get_ref().0.peer_addr();
            address.set_ip(peer.map_err(|error| Status::unavailable(error.to_string()))?.ip());
        }
        let failed = |error| Status::unavailable(format!("no RDMA to {address}: {error}"));
        let queue = Queue::connect(address, ticket).await.map_err(failed)?;
        // The server has the other end, too: only now does it hear requests.
        link.answer().await?.of_kind::<()>(kind::READY)?;
        let (queue, buffer) =
            aside(move || Buffer::new(&queue).map(|buffer| (queue, buffer))).await.map_err(|error| {
                let text = "cannot register memory for RDMA (is the limit of locked memory high enough?)";
                Status::resource_exhausted(format!("{text}: {error}"))
            })?;
        Ok(Connection { queue, buffer, chunks: HashMap::new(), staging: None, link })
    }

    async fn connected(&self, idle: Option<Connection>) -> Result<Connection, Status> {
        match idle {
            Some(connection) => Ok(connection),
            None => self.open().await,
        }
    }

    async fn fetch_once(&self, job: &FetchJob, arrivals: &mut Arrivals<'_>) -> Result<(), Status> {
        let mut taken = self.pool.take().await?;
        let mut connection = self.connected(taken.connection()).await?;
        let result = located::fetch(&mut connection, job, arrivals).await;
        // What only the server can have said, in answer to one request, leaves the connection as it was.
        let refused = |status: &Status| matches!(status.code(), Code::NotFound | Code::ResourceExhausted);
        if connection.queue.is_idle() && result.as_ref().err().is_none_or(refused) {
            self.pool.give_back(connection);
        }
        result
    }

    async fn ask<A: Message + Default>(
        &self,
        kind: u8,
        question: &impl Message,
        answer: u8,
    ) -> Result<A, Status> {
        let mut taken = self.pool.take().await?;
        let mut connection = self.connected(taken.connection()).await?;
        let answer = stream::ask(&mut connection.link, kind, question, answer).await?;
        self.pool.give_back(connection);
        answer
    }
}

impl Wire for RdmaWire {
    fn kind(&self) -> WireKind {
        WireKind::Rdma
    }

    fn fetch<'a>(
        &'a self,
        job: &'a FetchJob,
        arrivals: &'a mut Arrivals<'_>,
    ) -> BoxFuture<'a, Result<(), Status>> {
        let work = async move {
            match self.fetch_once(job, arrivals).await {
                // A place that was told before its chunk changed hands: the server knows where the block is now, if anywhere.
                Err(status) if status.code() == Code::Aborted => {
                    tracing::debug!(error = status.message(), "a key is no longer good; the server is asked");
                    self.fetch_once(&FetchJob { locations: Arc::from([]), ..job.clone() }, arrivals).await
                }
                result => result,
            }
        };
        work.boxed()
    }

    fn publish<'a>(&'a self, job: &'a PublishJob) -> BoxFuture<'a, Result<Vec<pb::BlockCommit>, Status>> {
        let work = async move {
            let mut taken = self.pool.take().await?;
            let mut connection = self.connected(taken.connection()).await?;
            let staging = match connection.staging().await {
                Err(status) if is_refusal(&status) => {
                    self.pool.give_back(connection);
                    return Err(status);
                }
                staging => staging?,
            };
            let commits = connection.publish(job, staging).await?;
            self.pool.give_back(connection);
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

    fn reserve<'a>(
        &'a self,
        request: &'a pb::ReserveRequest,
    ) -> Option<BoxFuture<'a, Result<pb::ReserveResponse, Status>>> {
        Some(self.ask(kind::RESERVE, request, kind::RESERVED).boxed())
    }
}

/// Memory that the device can reach.
struct Buffer {
    region: Arc<Region>,
    map: Arc<Map>,
}

impl Buffer {
    fn new(queue: &Queue) -> io::Result<Self> {
        let bytes = BUFFER_BYTES + SCRATCH_BYTES;
        let map = Arc::new(Map::writable(memory(c"cairn-rdma", bytes)?, bytes)?);
        // SAFETY: the hold is the mapping, which is for writing, and its bytes are reached by pointer only.
        let region =
            unsafe { Region::new(queue.domain(), (map.address(), bytes), Access::Local, map.clone()) };
        Ok(Self { region: Arc::new(region?), map })
    }
}

/// A chunk of the server that this connection can read.
struct Chunk {
    chunk: u64,
    bytes: u64,
    rkey: u32,
}

struct Connection {
    /// First, so that the device is done when the rest goes.
    queue: Queue,
    buffer: Buffer,
    /// By number.
    chunks: HashMap<u64, Chunk>,
    staging: Option<pb::StagedMemory>,
    link: TlsLink,
}

/// Bytes of one block that move at once.
#[derive(Clone, Copy)]
struct Part {
    /// Position of the block in its run, or of the offer in its job.
    block: usize,
    /// In the block.
    offset: u64,
    bytes: u64,
    /// In the buffer.
    at: u64,
}

/// Cuts blocks into parts of at most half the buffer, and those into batches that each fit a half; every other batch is for the same
/// half.
fn batches(blocks: impl Iterator<Item = (usize, u64)>, half_bytes: u64) -> Vec<Vec<Part>> {
    let mut batches: Vec<Vec<Part>> = Vec::new();
    let mut filled = half_bytes;
    for (block, block_bytes) in blocks {
        let mut offset = 0;
        while offset < block_bytes {
            let bytes = half_bytes.min(block_bytes - offset);
            let full = batches.last().is_none_or(|batch| batch.len() == MAX_PIECES);
            if full || filled + bytes > half_bytes {
                batches.push(Vec::new());
                filled = 0;
            }
            let at = ((batches.len() - 1) % HALVES) as u64 * half_bytes + filled;
            if let Some(batch) = batches.last_mut() {
                batch.push(Part { block, offset, bytes, at });
            }
            filled += bytes;
            offset += bytes;
        }
    }
    batches
}

/// A key that is no longer good has a code of its own.
fn broken(error: io::Error) -> Status {
    let code = match error.kind() {
        io::ErrorKind::PermissionDenied => Code::Aborted,
        _ => Code::Unavailable,
    };
    Status::new(code, format!("RDMA: {error}"))
}

impl Bring for Connection {
    type Io = TlsStream;

    fn link(&mut self) -> &mut Link<TlsStream> {
        &mut self.link
    }

    fn bring<'a>(
        &'a mut self,
        lease: u64,
        places: &'a [(u32, Location)],
        arrivals: &'a mut Arrivals<'_>,
    ) -> BoxFuture<'a, Result<(), Status>> {
        let work = async move {
            self.map(lease, places).await?;
            self.read(places, arrivals).await
        };
        work.boxed()
    }
}

impl Connection {
    fn is_known(&self, place: Location) -> bool {
        self.chunks.get(&number(place)).is_some_and(|chunk| chunk.chunk == place.chunk())
    }

    /// Asks for the keys of chunks that are not known.
    async fn map(&mut self, lease: u64, places: &[(u32, Location)]) -> Result<(), Status> {
        let unknown = places.iter().filter(|(_, place)| !self.is_known(*place));
        let mut unknown: Vec<u64> = unknown.map(|(_, place)| place.chunk()).collect();
        unknown.sort_unstable();
        unknown.dedup();
        for chunks in unknown.chunks(MAX_CHUNKS) {
            let request = pb::MapRequest { lease_id: lease, chunks: chunks.to_vec() };
            self.link.send(kind::MAP, &request).await?;
            for wanted in chunks {
                let mapped: pb::MappedChunk = self.link.answer().await?.of_kind(kind::MAPPED)?;
                if mapped.chunk != *wanted {
                    return Err(nonsense("another chunk than was asked for"));
                }
                let chunk = Chunk { chunk: *wanted, bytes: mapped.bytes, rkey: mapped.rkey };
                self.chunks.insert(number(Location::new(*wanted, 0)), chunk);
            }
        }
        Ok(())
    }

    async fn read(&mut self, places: &[(u32, Location)], arrivals: &mut Arrivals<'_>) -> Result<(), Status> {
        let block_bytes = arrivals.promise().block_bytes;
        let blocks = (0..places.len()).map(|i| (i, block_bytes));
        let (mut coming, mut tag) = (VecDeque::new(), 0);
        for batch in batches(blocks, BUFFER_BYTES / HALVES as u64) {
            if coming.len() == HALVES {
                self.arrived(&mut coming, places, arrivals).await?;
            }
            let pieces = batch.iter().map(|part| self.piece(part, places[part.block].1, block_bytes));
            let pieces = pieces.collect::<Result<Vec<_>, _>>()?;
            tag += 1;
            self.queue.post(&self.buffer.region, &pieces, tag).map_err(broken)?;
            coming.push_back((tag, batch));
        }
        while !coming.is_empty() {
            self.arrived(&mut coming, places, arrivals).await?;
        }
        Ok(())
    }

    fn piece(&self, part: &Part, place: Location, block_bytes: u64) -> Result<Piece, Status> {
        let chunk = self.chunks.get(&number(place)).filter(|chunk| chunk.chunk == place.chunk());
        let chunk = chunk.ok_or_else(|| nonsense("a block in no chunk"))?;
        let start = offset(place, block_bytes);
        if start.saturating_add(block_bytes) > chunk.bytes {
            return Err(nonsense("a block outside its chunk"));
        }
        Ok(Piece {
            way: Way::Read,
            local: part.at,
            remote: start + part.offset,
            len: part.bytes as u32,
            rkey: chunk.rkey,
        })
    }

    /// The next batch is in the buffer: copies it out, and verifies it.
    async fn arrived(
        &mut self,
        coming: &mut VecDeque<(u64, Vec<Part>)>,
        places: &[(u32, Location)],
        arrivals: &mut Arrivals<'_>,
    ) -> Result<(), Status> {
        let Some((tag, batch)) = coming.pop_front() else { return Ok(()) };
        if self.queue.done().await.map_err(broken)? != tag {
            return Err(nonsense("completions out of order"));
        }
        let block_bytes = arrivals.promise().block_bytes;
        for Part { block, offset, bytes, at } in batch {
            let block = places[block].0;
            let source = self.buffer.map.at(at, bytes);
            let source = source.ok_or_else(|| Status::internal("a part outside its buffer"))?;
            if bytes == block_bytes {
                // SAFETY: the part is inside the buffer, and the caller's targets are not.
                unsafe { arrivals.copy(block, source)? };
                continue;
            }
            let target = arrivals.room(block, offset, bytes as usize)?;
            // SAFETY: as above; the target has this length.
            unsafe { std::ptr::copy_nonoverlapping(source, target.as_mut_ptr(), bytes as usize) };
            arrivals.added(block, bytes as usize)?;
        }
        Ok(())
    }

    async fn staging(&mut self) -> Result<pb::StagedMemory, Status> {
        if let Some(staging) = self.staging {
            return Ok(staging);
        }
        self.link.send(kind::STAGING, &()).await?;
        let staging: pb::StagedMemory = self.link.answer().await?.of_kind(kind::STAGED)?;
        self.staging = Some(staging);
        Ok(staging)
    }

    async fn publish(
        &mut self,
        job: &PublishJob,
        staging: pb::StagedMemory,
    ) -> Result<Vec<pb::BlockCommit>, Status> {
        let half = staging.bytes.min(BUFFER_BYTES) / HALVES as u64;
        if half < MIN_HALF_BYTES {
            return Err(nonsense("staging memory of no use"));
        }
        let header = pb::PublishHeader { session_id: job.session, reservation_id: job.reservation };
        self.link.push(kind::PUBLISH, &header);
        let blocks = job.blocks.iter().enumerate().map(|(i, offer)| (i, offer.bytes.len() as u64));
        // How many offers there are up to the last batch of each half, and how many the server took.
        let (mut upto, mut offered, mut taken) = ([0; HALVES], 0, 0);
        for (i, batch) in batches(blocks, half).into_iter().enumerate() {
            self.taken(&mut taken, upto[i % HALVES]).await?;
            self.write(&batch, job, staging.rkey, i as u64).await?;
            for part in &batch {
                self.link.push(kind::OFFER, &offer(part, &job.blocks[part.block]));
            }
            self.link.flush().await?;
            offered += batch.len() as u64;
            upto[i % HALVES] = offered;
        }
        self.link.send(kind::END, &()).await?;
        // After a failure here the connection is not used again: it may still be owed an answer.
        self.taken(&mut taken, offered).await?;
        let response: pb::PublishResponse = self.link.answer().await?.of_kind(kind::COMMITS)?;
        Ok(response.commits)
    }

    /// Puts a batch into the staging memory, and makes sure that it is there: a write that is complete here may still be on its way
    /// into the other side's memory, but no read overtakes it.
    async fn write(&mut self, batch: &[Part], job: &PublishJob, rkey: u32, tag: u64) -> Result<(), Status> {
        let mut pieces = Vec::with_capacity(batch.len() + 1);
        for Part { block, offset, bytes, at } in batch.iter().copied() {
            let data = &job.blocks[block].bytes[offset as usize..(offset + bytes) as usize];
            self.buffer.map.write(at, data).map_err(broken)?;
            pieces.push(Piece { way: Way::Write, local: at, remote: at, len: bytes as u32, rkey });
        }
        let Some(last) = pieces.last() else { return Ok(()) };
        let end = last.remote + u64::from(last.len);
        let len = FLUSH_BYTES.min(last.len);
        let remote = end - u64::from(len);
        pieces.push(Piece { way: Way::Read, local: BUFFER_BYTES, remote, len, rkey });
        self.queue.post(&self.buffer.region, &pieces, tag).map_err(broken)?;
        match self.queue.done().await.map_err(broken)? {
            done if done == tag => Ok(()),
            _ => Err(nonsense("completions out of order")),
        }
    }

    /// Until the server copied this many offers.
    async fn taken(&mut self, taken: &mut u64, wanted: u64) -> Result<(), Status> {
        while *taken < wanted {
            let answer: pb::TakenPieces = self.link.answer().await?.of_kind(kind::TAKEN)?;
            *taken += u64::from(answer.count);
        }
        Ok(())
    }
}

fn offer(part: &Part, offer: &Offer) -> pb::OfferedPiece {
    let is_last = part.offset + part.bytes == offer.bytes.len() as u64;
    pb::OfferedPiece {
        block: offer.position,
        offset: part.offset,
        bytes: part.bytes,
        at: part.at,
        checksum: if is_last { offer.checksum.0.to_vec().into() } else { Default::default() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte once, in order, inside its half, never more pieces than fit a doorbell.
    #[test]
    fn batches_cover_all_blocks() {
        for (half, sizes) in [
            (4096, vec![1, 4095, 4096, 4097, 3, 9000, 12_288]),
            (100, vec![100; 7]),
            (1 << 20, vec![10; 1000]),
            (64, vec![]),
        ] {
            let mut next = vec![0; sizes.len()];
            for (i, batch) in batches(sizes.iter().copied().enumerate(), half).iter().enumerate() {
                assert!(!batch.is_empty() && batch.len() <= MAX_PIECES);
                let start = (i % HALVES) as u64 * half;
                let mut at = start;
                for part in batch {
                    assert_eq!((part.at, part.offset), (at, next[part.block]));
                    assert!(part.bytes > 0);
                    at += part.bytes;
                    next[part.block] += part.bytes;
                }
                assert!(at <= start + half);
            }
            assert_eq!(next, sizes);
        }
    }
}
