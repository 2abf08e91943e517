//! What the server's end of a wire needs of the cache server, whichever it is. Refusals are gRPC statuses on every wire: one
//! vocabulary for what a caller should do.

use crate::incoming::Incoming;
use crate::wire::WireKind;
use bytes::Bytes;
use cairn_proto::{BlockHash, Checksum, MissReason, SpaceId, pb};
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use std::any::Any;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tonic::Status;

/// Secret bytes of a session.
pub type SessionKey = [u8; 32];

/// Kept until whoever holds it is done.
pub type Hold = Arc<dyn Any + Send + Sync>;

/// Bounds on what one request may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest that one fetch may hold its blocks in place.
    pub fetch_timeout: Duration,
    /// Longest pause of a client in the middle of a request.
    pub idle_timeout: Duration,
    /// Longest step of a connection until it is known whose it is, so that strangers cannot hold connections open.
    pub handshake_timeout: Duration,
    /// Staging memory of one connection, in bytes.
    pub staging_bytes: u64,
}

/// The cache server behind a wire.
pub trait Store: Send + Sync + 'static {
    /// Bounds.
    fn limits(&self) -> Limits;

    /// The key of a session that is open, and one of its places for connections, which the hold keeps.
    ///
    /// # Errors
    /// When there is no such session or place.
    fn connect(&self, session: u64) -> Result<(SessionKey, Hold), Status>;

    /// Waits until the session ended.
    fn ended(&self, session: u64) -> BoxFuture<'static, ()>;

    /// Answers a lookup; with the places of the blocks, if asked for.
    ///
    /// # Errors
    /// See the API.
    fn lookup(
        &self,
        session: u64,
        request: &pb::LookupRequest,
        locate: bool,
    ) -> Result<pb::LookupResponse, Status>;

    /// Answers a reservation.
    ///
    /// # Errors
    /// See the API.
    fn reserve(&self, session: u64, request: &pb::ReserveRequest) -> Result<pb::ReserveResponse, Status>;

    /// Starts to read leased blocks. What is in the memory of a GPU that the reader reaches is only told of.
    ///
    /// # Errors
    /// See the API.
    fn read(
        &self,
        wire: WireKind,
        session: u64,
        lease: u64,
        positions: (usize, usize),
        reach: Reach<'_>,
    ) -> Result<Reading, Status>;

    /// A chunk of a GPU's memory that holds a block of this lease.
    ///
    /// # Errors
    /// When the lease ended or has no block there.
    fn gpu_chunk(&self, session: u64, lease: u64, chunk: u64) -> Result<GpuChunk, Status>;

    /// Starts to fill a reservation.
    ///
    /// # Errors
    /// See the API.
    fn fill(&self, wire: WireKind, session: u64, reservation: u64) -> Result<Filling, Status>;

    /// The memory of a chunk that holds a block of this lease, for reading.
    ///
    /// # Errors
    /// When the lease ended or has no block there.
    fn export(&self, session: u64, lease: u64, chunk: u64) -> Result<(OwnedFd, u64), Status>;

    /// The same memory where it is in this process. As long as the lease goes on it is the chunk's; later it may become another's:
    /// who keeps the pages must ask again.
    ///
    /// # Errors
    /// When the lease ended or has no block there.
    fn chunk(&self, session: u64, lease: u64, chunk: u64) -> Result<ChunkMemory, Status>;

    /// Whether a chunk has this memory still.
    fn is_current(&self, chunk: u64) -> bool;

    /// Whose session it is.
    ///
    /// # Errors
    /// When it ended.
    fn owner(&self, session: u64) -> Result<Owner, Status>;

    /// Memory from which one client publishes, while the hold lives.
    ///
    /// # Errors
    /// When all that clients may have together is in use.
    fn staging(&self, bytes: u64) -> Result<Hold, Status>;

    /// Block bytes went out over a wire.
    fn sent(&self, wire: WireKind, bytes: u64);

    /// Bytes came in that do not match their checksum.
    fn mismatch(&self, space: &SpaceId, hash: &BlockHash);
}

/// Who has a session, as far as memory goes.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// `None` where nobody is asked.
    pub tenant: Option<Arc<str>>,
    /// May read blocks.
    pub reads: bool,
    /// May publish blocks.
    pub publishes: bool,
}

/// A chunk of host memory.
#[derive(Clone)]
pub struct ChunkMemory {
    /// Its first byte.
    pub address: usize,
    /// Size in bytes.
    pub bytes: u64,
    /// The address is mapped while this lives.
    pub hold: Hold,
}

/// Where a block is in shared memory: see `data.proto`. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location(pub u64);

impl Location {
    /// Below the chunk.
    pub const INDEX_BITS: u32 = 24;

    /// The `index`-th slot of a chunk; `chunk` is never 0.
    pub const fn new(chunk: u64, index: u32) -> Self {
        Self((chunk << Self::INDEX_BITS) | index as u64)
    }

    /// Which chunk.
    pub const fn chunk(self) -> u64 {
        self.0 >> Self::INDEX_BITS
    }

    /// Which slot of it.
    pub const fn index(self) -> u64 {
        self.0 & ((1 << Self::INDEX_BITS) - 1)
    }
}

/// One block that can be sent.
pub struct Brought {
    /// Its bytes; they do not change while this lives.
    pub bytes: Bytes,
    /// Where they are, if clients can map it.
    pub location: Option<Location>,
}

/// Leased blocks being read.
pub struct Reading {
    /// In run order, each as it is in memory, or why it cannot be had.
    pub blocks: BoxStream<'static, (u32, Result<Brought, MissReason>)>,
    /// Those that are on a GPU instead.
    pub on_gpu: Vec<(u32, Location)>,
    /// Bytes of each block.
    pub block_bytes: u64,
    /// Keeps those bytes in place that have a location.
    pub hold: Hold,
}

/// What a reader can open.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reach<'a> {
    /// These GPUs.
    pub gpus: &'a [GpuUuid],
    /// It has room for copies from there of so many of the first blocks.
    pub blocks: usize,
}

/// Identity of a GPU in every process.
pub type GpuUuid = [u8; 16];

/// What a process needs to open a chunk of a GPU's memory. Others of its tenant can write there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuChunk {
    /// For CUDA IPC.
    pub handle: [u8; 64],
    /// Size in bytes.
    pub bytes: u64,
    /// Of this GPU.
    pub gpu: GpuUuid,
}

/// One reserved slot.
pub trait Slot: Send {
    /// Whose.
    fn hash(&self) -> BlockHash;

    /// Its memory, as long as the block.
    fn bytes(&mut self) -> &mut [u8];

    /// Makes the block visible. The checksum must be that of the bytes.
    ///
    /// # Errors
    /// When nothing more of the reservation can be committed.
    fn commit(self: Box<Self>, checksum: Checksum) -> Result<pb::Commit, Status>;
}

/// A reservation being filled. Dropping it gives up what is not committed.
pub struct Filling {
    /// Of all blocks.
    pub space: SpaceId,
    /// The reserved slots by position.
    pub slots: BTreeMap<u32, Box<dyn Slot>>,
    /// The fill goes on while this lives.
    pub hold: Hold,
}

/// Puts published blocks together and commits them.
pub struct Receiving {
    store: Arc<dyn Store>,
    space: SpaceId,
    open: BTreeMap<u32, (Box<dyn Slot>, Incoming)>,
    commits: Vec<pb::BlockCommit>,
    _hold: Hold,
}

impl Receiving {
    /// Nothing has arrived.
    pub fn new(store: Arc<dyn Store>, filling: Filling) -> Self {
        let Filling { space, slots, hold } = filling;
        let open = slots.into_iter().map(|(block, slot)| {
            let incoming = Incoming::new(&space, &slot.hash());
            (block, (slot, incoming))
        });
        let open = open.collect();
        Self { store, space, open, commits: Vec::new(), _hold: hold }
    }

    /// Where the next piece goes; [`Self::added`] must follow.
    ///
    /// # Errors
    /// When the piece is not what can come next.
    pub fn room(&mut self, block: u32, offset: u64, len: usize) -> Result<&mut [u8], Status> {
        let Some((slot, incoming)) = self.open.get_mut(&block) else { return Err(not_open(block)) };
        incoming
            .room(offset, len, slot.bytes())
            .map_err(|error| Status::invalid_argument(format!("block {block}: {error}")))
    }

    /// `len` bytes were stored where [`Self::room`] said.
    ///
    /// # Errors
    /// When there was no such room.
    pub fn added(&mut self, block: u32, len: usize) -> Result<(), Status> {
        let Some((slot, incoming)) = self.open.get_mut(&block) else { return Err(not_open(block)) };
        let start = incoming.received() as usize;
        incoming.add(&slot.bytes()[start..start + len]);
        Ok(())
    }

    /// Stores one piece.
    ///
    /// # Errors
    /// When the piece is not what can come next.
    pub fn accept(&mut self, piece: &pb::BlockPiece) -> Result<(), Status> {
        self.room(piece.block, piece.offset, piece.data.len())?.copy_from_slice(&piece.data);
        self.added(piece.block, piece.data.len())
    }

    /// The whole of a block is copied by `copy`, which returns the checksum of what it stored.
    ///
    /// # Errors
    /// When the block is not open or has arrived in part.
    pub fn whole(
        &mut self,
        block: u32,
        promised: Checksum,
        copy: impl FnOnce(&SpaceId, &BlockHash, &mut [u8]) -> Result<Checksum, Status>,
    ) -> Result<(), Status> {
        let Some((mut slot, _)) = self.open.remove(&block) else { return Err(not_open(block)) };
        let hash = slot.hash();
        let found = copy(&self.space, &hash, slot.bytes())?;
        self.decide(block, slot, Some(found), promised)
    }

    /// Ends one block.
    ///
    /// # Errors
    /// When the block is not open, or nothing more of the reservation can be committed.
    pub fn seal(&mut self, seal: &pb::BlockSeal) -> Result<(), Status> {
        let promised = Checksum::try_from(seal.checksum.as_ref())?;
        let Some((mut slot, incoming)) = self.open.remove(&seal.block) else {
            return Err(not_open(seal.block));
        };
        let found = incoming.finish(slot.bytes().len() as u64);
        self.decide(seal.block, slot, found, promised)
    }

    fn decide(
        &mut self,
        block: u32,
        slot: Box<dyn Slot>,
        found: Option<Checksum>,
        promised: Checksum,
    ) -> Result<(), Status> {
        let commit = match found {
            None => pb::Commit::Incomplete,
            Some(found) if found != promised => {
                self.store.mismatch(&self.space, &slot.hash());
                pb::Commit::ChecksumMismatch
            }
            Some(found) => slot.commit(found)?,
        };
        self.commits.push(pb::BlockCommit { block, commit: commit.into() });
        Ok(())
    }

    /// What became of each block; those that are not complete are given up.
    pub fn finish(mut self) -> pb::PublishResponse {
        let unsealed = self.open.keys();
        let incomplete =
            |block: &u32| pb::BlockCommit { block: *block, commit: pb::Commit::Incomplete.into() };
        self.commits.extend(unsealed.map(incomplete));
        pb::PublishResponse { commits: self.commits }
    }
}

fn not_open(block: u32) -> Status {
    Status::invalid_argument(format!("block {block} was not granted, or is already sealed"))
}
