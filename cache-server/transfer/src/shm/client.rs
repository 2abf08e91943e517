//! The client's end of shared memory. Owns the mappings: each chunk once, for as long as its generation is current.

use super::MAX_OFFERS;
use super::fds::FdStream;
use crate::Arrivals;
use crate::frame::{Link, kind, nonsense};
use crate::handshake;
use crate::located::{self, Bring, Located, MAX_CHUNKS, number, offset, told};
use crate::map::Map;
use crate::pool::Pool;
use crate::store::{GpuChunk, Location, Reach, SessionKey};
use crate::stream::{self, is_refusal};
use crate::wire::{FetchJob, Offer, PublishJob, Wire, WireKind};
use cairn_proto::{BlockHash, Checksum, MissReason, SpaceId, pb};
use futures::FutureExt;
use futures::future::BoxFuture;
use memmap2::MmapRaw;
use prost::Message;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::UnixStream;
use tonic::Status;

/// Longest time to give a pin up; after that it ends with its connection.
const UNPIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes copied before other tasks of this thread get a turn.
const COPY_TURN_BYTES: u64 = 16 << 20;

/// Shared memory with one server, for one session.
pub struct ShmWire(Arc<Inner>);

struct Inner {
    path: PathBuf,
    session: u64,
    key: SessionKey,
    pool: Pool<Connection>,
    chunks: Mutex<HashMap<u64, (u64, Arc<Map>)>>,
    /// Chunks of GPUs, which stay what they are as long as the server runs.
    gpu_chunks: Mutex<HashMap<u64, Arc<GpuChunk>>>,
    /// Where views are pinned at present.
    pins: tokio::sync::Mutex<Option<Arc<PinConnection>>>,
    runtime: tokio::runtime::Handle,
}

/// A connection that only pins: the server keeps a pin for as long as this is open, so every view holds it.
struct PinConnection {
    connection: tokio::sync::Mutex<Connection>,
    /// False while a request is in progress, and for good if it did not end well: then nothing more is sent, and what is pinned
    /// stays until the last view is gone.
    idle: AtomicBool,
    last_pin: AtomicU64,
}

struct Connection {
    link: Link<FdStream>,
    staging: Option<(Map, u64)>,
}

/// A connection that is used by a fetch.
struct Reader<'a> {
    wire: &'a Inner,
    connection: &'a mut Connection,
}

impl Bring for Reader<'_> {
    type Io = FdStream;

    fn link(&mut self) -> &mut Link<FdStream> {
        &mut self.connection.link
    }

    fn bring<'a>(
        &'a mut self,
        lease: u64,
        places: &'a [(u32, Location)],
        arrivals: &'a mut Arrivals<'_>,
    ) -> BoxFuture<'a, Result<(), Status>> {
        let work = async move {
            self.wire.map(self.connection, lease, places.iter().map(|(_, place)| *place)).await?;
            self.wire.copy(places, arrivals).await
        };
        work.boxed()
    }
}

impl ShmWire {
    /// Connects to the socket of a server on this host.
    ///
    /// # Errors
    /// When there is no such socket here, or whoever listens on it does not know the session.
    pub async fn connect(path: &Path, session: u64, key: SessionKey) -> Result<Self, Status> {
        let inner = Inner {
            path: path.to_owned(),
            session,
            key,
            pool: Pool::new(),
            chunks: Mutex::default(),
            gpu_chunks: Mutex::default(),
            pins: tokio::sync::Mutex::default(),
            runtime: tokio::runtime::Handle::current(),
        };
        let first = inner.connect().await?;
        inner.pool.give_back(first);
        Ok(Self(Arc::new(inner)))
    }

    /// Leased blocks as they lie in the server's memory, kept as they are until the result is dropped. A block that is
    /// nowhere in memory is brought as a copy. A block that is in the memory of a GPU that the caller reaches stays there:
    /// see [`Pinned::on_gpu`].
    ///
    /// # Errors
    /// When the lease ended or the connection broke.
    pub async fn pin(&self, job: &FetchJob, block_bytes: u64, reach: Reach<'_>) -> Result<Pinned, Status> {
        let pins = self.0.pin_connection().await?;
        let mut connection = pins.connection.lock().await;
        let pin = pins.last_pin.fetch_add(1, Ordering::Relaxed) + 1;
        let request = pb::PinRequest {
            pin,
            lease_id: job.lease,
            first: job.blocks.start as u32,
            count: job.blocks.len() as u32,
            gpus: reach.gpus.iter().map(|gpu| gpu.to_vec().into()).collect(),
            most_on_gpu: reach.blocks as u32,
        };
        pins.idle.store(false, Ordering::Release);
        connection.link.send(kind::PIN, &request).await?;
        let mut answer = Located { block_bytes, asked: job.blocks.clone(), ..Located::default() };
        if let Err(status) = answer.receive(&mut connection.link, None).await {
            // A refusal leaves the connection as it was.
            pins.idle.store(is_refusal(&status), Ordering::Release);
            return Err(status);
        }
        let (wire, blocks) = (self.0.clone(), BTreeMap::new());
        let mut pinned = Pinned { wire, pins: pins.clone(), pin, block_bytes, blocks };
        self.0.map(&mut connection, job.lease, answer.places.iter().map(|(_, place)| *place)).await?;
        let chunks = answer.on_gpu.iter().map(|(_, place)| place.chunk());
        if let Err(status) = self.0.open(&mut connection, job.lease, chunks).await {
            // As above: the pin is given up with what was pinned.
            pins.idle.store(is_refusal(&status), Ordering::Release);
            return Err(status);
        }
        for (block, place) in answer.on_gpu {
            let found = self.0.gpu_place(place, block_bytes);
            let (chunk, offset) =
                found.ok_or_else(|| Status::internal("a block outside its chunk on a GPU"))?;
            pinned.blocks.insert(block as usize, View::OnGpu(chunk, offset));
        }
        for (block, place) in answer.places {
            let found = self.0.place(place, block_bytes);
            let (map, offset) = found.ok_or_else(|| Status::internal("a block outside its chunk"))?;
            pinned.blocks.insert(block as usize, View::Mapped(map, offset));
        }
        let copies = answer.copies.into_iter().map(|(block, bytes)| (block as usize, View::Copied(bytes)));
        pinned.blocks.extend(copies);
        let lost = answer.lost.into_iter().map(|(block, reason)| (block as usize, View::Lost(reason)));
        pinned.blocks.extend(lost);
        pins.idle.store(true, Ordering::Release);
        Ok(pinned)
    }
}

impl Inner {
    async fn pin_connection(&self) -> Result<Arc<PinConnection>, Status> {
        let mut current = self.pins.lock().await;
        if let Some(pins) = current.as_ref().filter(|pins| pins.is_usable()) {
            return Ok(pins.clone());
        }
        let pins = Arc::new(PinConnection {
            connection: tokio::sync::Mutex::new(self.connect().await?),
            idle: AtomicBool::new(true),
            last_pin: AtomicU64::new(0),
        });
        *current = Some(pins.clone());
        Ok(pins)
    }

    async fn connect(&self) -> Result<Connection, Status> {
        let path = self.path.display();
        let socket = UnixStream::connect(&self.path).await;
        let socket = socket.map_err(|error| Status::unavailable(format!("cannot reach {path}: {error}")))?;
        let mut link = Link::new(FdStream::new(socket));
        handshake::open(&mut link, self.session, &self.key).await?;
        Ok(Connection { link, staging: None })
    }

    async fn connected(&self, idle: Option<Connection>) -> Result<Connection, Status> {
        match idle {
            Some(connection) => Ok(connection),
            None => self.connect().await,
        }
    }

    /// Where a block is in this process, if its chunk is mapped.
    fn place(&self, location: Location, block_bytes: u64) -> Option<(Arc<Map>, u64)> {
        let chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        let (current, map) = chunks.get(&number(location))?;
        if *current != location.chunk() {
            return None;
        }
        let offset = offset(location, block_bytes);
        map.at(offset, block_bytes)?;
        Some((map.clone(), offset))
    }

    /// Maps the chunks of these places that are not mapped yet.
    async fn map(
        &self,
        connection: &mut Connection,
        lease: u64,
        places: impl Iterator<Item = Location>,
    ) -> Result<(), Status> {
        let mut missing: Vec<u64> = {
            let chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
            let current = |place: &Location| {
                chunks.get(&number(*place)).is_some_and(|(chunk, _)| *chunk == place.chunk())
            };
            places.filter(|place| !current(place)).map(Location::chunk).collect()
        };
        missing.sort_unstable();
        missing.dedup();
        if missing.is_empty() {
            return Ok(());
        }
        for part in missing.chunks(MAX_CHUNKS) {
            self.map_part(connection, lease, part).await?;
        }
        Ok(())
    }

    async fn map_part(&self, connection: &mut Connection, lease: u64, part: &[u64]) -> Result<(), Status> {
        let request = pb::MapRequest { lease_id: lease, chunks: part.to_vec() };
        connection.link.send(kind::MAP, &request).await?;
        for wanted in part.iter().copied() {
            let mapped: pb::MappedChunk = connection.link.answer().await?.of_kind(kind::MAPPED)?;
            let fd = connection.link.io().take();
            let fd = fd.filter(|_| mapped.chunk == wanted);
            let fd = fd.ok_or_else(|| Status::internal("a chunk without its descriptor"))?;
            let map =
                Map::read_only(fd, mapped.bytes).map_err(|error| Status::internal(error.to_string()))?;
            let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
            chunks.insert(number(Location::new(wanted, 0)), (wanted, Arc::new(map)));
        }
        Ok(())
    }

    /// Asks for the chunks of GPUs that are not known yet.
    async fn open(
        &self,
        connection: &mut Connection,
        lease: u64,
        chunks: impl Iterator<Item = u64>,
    ) -> Result<(), Status> {
        let known = |chunk: &u64| self.known_gpu_chunks().contains_key(chunk);
        let mut missing: Vec<u64> = chunks.filter(|chunk| !known(chunk)).collect();
        missing.sort_unstable();
        missing.dedup();
        for part in missing.chunks(MAX_CHUNKS) {
            let request = pb::MapRequest { lease_id: lease, chunks: part.to_vec() };
            connection.link.send(kind::OPEN, &request).await?;
            for wanted in part {
                let opened: pb::OpenedChunk = connection.link.answer().await?.of_kind(kind::OPENED)?;
                let (handle, gpu) = (opened.handle.as_ref().try_into(), opened.gpu.as_ref().try_into());
                let (Ok(handle), Ok(gpu)) = (handle, gpu) else {
                    return Err(nonsense("a chunk of a GPU without its handle"));
                };
                if opened.chunk != *wanted {
                    return Err(nonsense("another chunk of a GPU than was asked for"));
                }
                let chunk = GpuChunk { handle, bytes: opened.bytes, gpu };
                self.known_gpu_chunks().insert(*wanted, Arc::new(chunk));
            }
        }
        Ok(())
    }

    fn known_gpu_chunks(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<GpuChunk>>> {
        self.gpu_chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where a block is on a GPU, if its chunk is known.
    fn gpu_place(&self, location: Location, block_bytes: u64) -> Option<(Arc<GpuChunk>, u64)> {
        let chunk = self.known_gpu_chunks().get(&location.chunk())?.clone();
        let offset = offset(location, block_bytes);
        (offset.checked_add(block_bytes)? <= chunk.bytes).then_some((chunk, offset))
    }

    async fn fetch(&self, job: &FetchJob, arrivals: &mut Arrivals<'_>) -> Result<(), Status> {
        let places = told(job);
        let block_bytes = arrivals.promise().block_bytes;
        if places.len() == job.blocks.len()
            && places.iter().all(|(_, place)| self.place(*place, block_bytes).is_some())
        {
            return self.copy(&places, arrivals).await;
        }
        let mut taken = self.pool.take().await?;
        let mut connection = self.connected(taken.connection()).await?;
        located::fetch(&mut Reader { wire: self, connection: &mut connection }, job, arrivals).await?;
        self.pool.give_back(connection);
        Ok(())
    }

    async fn copy(&self, places: &[(u32, Location)], arrivals: &mut Arrivals<'_>) -> Result<(), Status> {
        let block_bytes = arrivals.promise().block_bytes;
        let mut turn = 0;
        for (block, place) in places {
            let place = self.place(*place, block_bytes);
            let (map, offset) = place.ok_or_else(|| Status::internal("a block outside its chunk"))?;
            let source = map.at(offset, block_bytes);
            let source = source.ok_or_else(|| Status::internal("a block outside its chunk"))?;
            // SAFETY: the bytes of the block are inside the mapping, which lives until the end of the loop's body, and targets are
            // the caller's own memory.
            unsafe { arrivals.copy(*block, source)? };
            turn += block_bytes;
            if turn >= COPY_TURN_BYTES {
                turn = 0;
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// One question, one answer.
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

    async fn publish(&self, job: &PublishJob) -> Result<Vec<pb::BlockCommit>, Status> {
        let mut taken = self.pool.take().await?;
        let Connection { mut link, staging } = self.connected(taken.connection()).await?;
        let (map, bytes) = match staging {
            Some(staging) => staging,
            None => get_staging(&mut link).await?,
        };
        let header = pb::PublishHeader { session_id: job.session, reservation_id: job.reservation };
        link.push(kind::PUBLISH, &header);
        let mut ring = Ring { link: &mut link, map: &map, bytes, offered: 0, taken: 0 };
        for offer in &job.blocks {
            ring.offer(offer).await?;
        }
        ring.link.send(kind::END, &()).await?;
        // After a failure here the connection is not used again: it may still be owed an answer.
        ring.wait(ring.offered).await?;
        let response: pb::PublishResponse = link.answer().await?.of_kind(kind::COMMITS)?;
        self.pool.give_back(Connection { link, staging: Some((map, bytes)) });
        Ok(response.commits)
    }
}

impl PinConnection {
    /// Whether another pin can be asked for here: nothing is in progress, or what is in progress will end.
    fn is_usable(&self) -> bool {
        self.idle.load(Ordering::Acquire) || self.connection.try_lock().is_err()
    }

    async fn unpin(&self, pin: u64) -> Result<(), Status> {
        let mut connection = self.connection.lock().await;
        if !self.idle.swap(false, Ordering::AcqRel) {
            return Err(Status::unavailable("the pins end with their last view"));
        }
        connection.link.send(kind::UNPIN, &pb::UnpinRequest { pin }).await?;
        self.idle.store(true, Ordering::Release);
        Ok(())
    }
}

async fn get_staging(link: &mut Link<FdStream>) -> Result<(Map, u64), Status> {
    link.send(kind::STAGING, &()).await?;
    let staged: pb::StagedMemory = link.answer().await?.of_kind(kind::STAGED)?;
    let fd = link.io().take().ok_or_else(|| Status::internal("staging memory without its descriptor"))?;
    let map = Map::writable(fd, staged.bytes).map_err(|error| Status::internal(error.to_string()))?;
    Ok((map, staged.bytes))
}

/// The staging memory, cut in equal places that are used in turn.
struct Ring<'a> {
    link: &'a mut Link<FdStream>,
    map: &'a Map,
    bytes: u64,
    offered: u64,
    taken: u64,
}

impl Ring<'_> {
    async fn offer(&mut self, offer: &Offer) -> Result<(), Status> {
        let len = offer.bytes.len() as u64;
        // Two at least: one is filled while the other is copied.
        let piece = len.min(self.bytes / 2).max(1);
        let places = (self.bytes / piece).min(MAX_OFFERS as u64);
        for start in (0..len).step_by(piece as usize) {
            let end = len.min(start + piece);
            self.wait((self.offered + 1).saturating_sub(places)).await?;
            let at = self.offered % places * piece;
            let data = &offer.bytes[start as usize..end as usize];
            self.map.write(at, data).map_err(|error| Status::internal(error.to_string()))?;
            let checksum = if end == len { offer.checksum.0.to_vec() } else { Vec::new() };
            let message = pb::OfferedPiece {
                block: offer.position,
                offset: start,
                bytes: end - start,
                at,
                checksum: checksum.into(),
            };
            self.link.send(kind::OFFER, &message).await?;
            self.offered += 1;
        }
        Ok(())
    }

    /// Until the server copied this many offers.
    async fn wait(&mut self, taken: u64) -> Result<(), Status> {
        while self.taken < taken {
            let answer: pb::TakenPieces = self.link.answer().await?.of_kind(kind::TAKEN)?;
            self.taken += u64::from(answer.count);
        }
        Ok(())
    }
}

impl Wire for ShmWire {
    fn kind(&self) -> WireKind {
        WireKind::Shm
    }

    fn fetch<'a>(
        &'a self,
        job: &'a FetchJob,
        arrivals: &'a mut Arrivals<'_>,
    ) -> BoxFuture<'a, Result<(), Status>> {
        self.0.fetch(job, arrivals).boxed()
    }

    fn publish<'a>(&'a self, job: &'a PublishJob) -> BoxFuture<'a, Result<Vec<pb::BlockCommit>, Status>> {
        self.0.publish(job).boxed()
    }

    fn lookup<'a>(
        &'a self,
        request: &'a pb::LookupRequest,
    ) -> Option<BoxFuture<'a, Result<pb::LookupResponse, Status>>> {
        Some(self.0.ask(kind::LOOKUP, request, kind::FOUND).boxed())
    }

    fn reserve<'a>(
        &'a self,
        request: &'a pb::ReserveRequest,
    ) -> Option<BoxFuture<'a, Result<pb::ReserveResponse, Status>>> {
        Some(self.0.ask(kind::RESERVE, request, kind::RESERVED).boxed())
    }
}

enum View {
    Mapped(Arc<Map>, u64),
    Copied(Vec<u8>),
    OnGpu(Arc<GpuChunk>, u64),
    Lost(MissReason),
}

/// Blocks in place. Dropping it lets the server reuse them.
pub struct Pinned {
    wire: Arc<Inner>,
    /// Open for as long as anything is pinned through it.
    pins: Arc<PinConnection>,
    pin: u64,
    block_bytes: u64,
    blocks: BTreeMap<usize, View>,
}

impl Pinned {
    /// The bytes of a block that was pinned, not verified; or why it is not there. A block on a GPU has none here.
    ///
    /// # Errors
    /// Why the server cannot give it.
    pub fn bytes(&self, block: usize) -> Result<&[u8], MissReason> {
        match self.blocks.get(&block) {
            None => Err(MissReason::LeaseLost),
            Some(View::OnGpu(..)) => Err(MissReason::DeviceLost),
            Some(View::Lost(reason)) => Err(*reason),
            Some(View::Copied(bytes)) => Ok(bytes),
            Some(View::Mapped(map, offset)) => {
                let Some(start) = map.at(*offset, self.block_bytes) else {
                    return Err(MissReason::PeerDown);
                };
                // SAFETY: the range is inside the mapping, which `self` keeps. The server writes a slot only while nothing reads it,
                // and counts this pin as a reader until it is given up or `self.pins` is closed, both after the borrow ends.
                Ok(unsafe { std::slice::from_raw_parts(start, self.block_bytes as usize) })
            }
        }
    }

    /// The mapping in which a block lies, and where its bytes begin there, if they are the server's own. The mapping may be kept; the bytes
    /// are the block's only as long as `self`.
    pub fn mapping(&self, block: usize) -> Option<(Arc<MmapRaw>, u64)> {
        match self.blocks.get(&block) {
            Some(View::Mapped(map, offset)) => Some((map.raw().clone(), *offset)),
            _ => None,
        }
    }

    /// The chunk of a GPU's memory in which a block lies, and where its bytes begin there. They are the block's as long as `self`, unless
    /// another process of the tenant wrote there: copy first, then verify the copy.
    pub fn on_gpu(&self, block: usize) -> Option<(&Arc<GpuChunk>, u64)> {
        match self.blocks.get(&block) {
            Some(View::OnGpu(chunk, offset)) => Some((chunk, *offset)),
            _ => None,
        }
    }

    /// Whether a block's bytes are the server's own, rather than a copy.
    pub fn in_place(&self, block: usize) -> bool {
        matches!(self.blocks.get(&block), Some(View::Mapped(..)))
    }

    /// Compares a block with what it must be.
    ///
    /// # Errors
    /// Why it is not there, or [`MissReason::Quarantined`] when it is something else.
    pub fn verify(
        &self,
        block: usize,
        (space, hash): (&SpaceId, &BlockHash),
        promised: Checksum,
    ) -> Result<(), MissReason> {
        match Checksum::of(space, hash, self.bytes(block)?) == promised {
            true => Ok(()),
            false => Err(MissReason::Quarantined),
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let (pins, pin) = (self.pins.clone(), self.pin);
        self.wire.runtime.spawn(async move {
            let result = tokio::time::timeout(UNPIN_TIMEOUT, pins.unpin(pin)).await;
            if let Ok(Err(status)) = result {
                tracing::debug!(error = status.message(), "a pin ends with its connection");
            }
        });
    }
}
