//! What every wire does, seen from the client: bring leased blocks, take blocks to publish.

use crate::Arrivals;
use bytes::Bytes;
use cairn_proto::{BlockHash, Checksum, SpaceId, pb};
use futures::future::BoxFuture;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::Arc;
use tonic::Status;

/// The ways that block bytes can travel, best first where all are possible.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WireKind {
    /// Both ends in one process.
    Mem,
    /// Shared memory, on one host.
    Shm,
    /// One-sided verbs.
    Rdma,
    /// QUIC streams.
    Quic,
    /// TLS over TCP.
    Tls,
    /// The API itself: always there.
    Grpc,
}

impl WireKind {
    /// All of them, best first.
    pub const ALL: [Self; 6] = [Self::Mem, Self::Shm, Self::Rdma, Self::Quic, Self::Tls, Self::Grpc];

    /// The name used in settings, metrics and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Mem => "mem",
            Self::Shm => "shm",
            Self::Rdma => "rdma",
            Self::Quic => "quic",
            Self::Tls => "tls",
            Self::Grpc => "grpc",
        }
    }
}

impl fmt::Display for WireKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for WireKind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let known = Self::ALL.into_iter().find(|kind| kind.name() == name);
        known.ok_or_else(|| format!("{name:?} is no wire; known: shm, rdma, quic, tls, grpc"))
    }
}

/// Leased blocks to bring.
#[derive(Clone, Debug)]
pub struct FetchJob {
    /// Whose lease.
    pub session: u64,
    /// Which.
    pub lease: u64,
    /// Positions in its run.
    pub blocks: Range<usize>,
    /// Where the blocks of the run are in shared memory, as far as a lookup said; 0 where it did not.
    pub locations: Arc<[u64]>,
    /// Bytes of the ranges (layers, say) that should come in turn: the first of all blocks before the second of any. 0: whole blocks,
    /// one after the other. A wire that cannot do it sends whole blocks.
    pub range_bytes: u64,
}

impl FetchJob {
    pub(crate) fn request(&self) -> pb::FetchRequest {
        pb::FetchRequest {
            session_id: self.session,
            lease_id: self.lease,
            first: self.blocks.start as u32,
            count: self.blocks.len() as u32,
            range_bytes: self.range_bytes,
            transfer: 0,
        }
    }
}

/// Blocks to fill a reservation with.
#[derive(Clone, Debug)]
pub struct PublishJob {
    /// Whose reservation.
    pub session: u64,
    /// Which.
    pub reservation: u64,
    /// Of all blocks.
    pub space: SpaceId,
    /// The granted ones.
    pub blocks: Vec<Offer>,
}

/// One block of a [`PublishJob`].
#[derive(Clone, Debug)]
pub struct Offer {
    /// Position in the reservation.
    pub position: u32,
    /// Its name.
    pub hash: BlockHash,
    /// Its bytes.
    pub bytes: Bytes,
    /// Made where they were produced.
    pub checksum: Checksum,
}

/// The blocks that were found, on their way.
pub trait Following: Send {
    /// Brings them into their targets; as [`Wire::fetch`].
    fn receive<'a>(self: Box<Self>, arrivals: &'a mut Arrivals<'_>) -> BoxFuture<'a, Result<(), Status>>
    where
        Self: 'a;
}

/// What a read finds, and the blocks that follow, if any do.
pub type Found<'a> = (pb::LookupResponse, Option<Box<dyn Following + 'a>>);

/// A wire whose server can send blocks unasked.
pub trait Reader: Send + Sync {
    /// A lookup whose blocks follow its answer.
    fn read<'a>(&'a self, request: &'a pb::ReadRequest) -> BoxFuture<'a, Result<Found<'a>, Status>>;
}

/// The client's end of a wire. Dropping a future cancels what it does and leaves nothing half-used behind.
pub trait Wire: Send + Sync {
    /// Which.
    fn kind(&self) -> WireKind;

    /// Brings blocks into their targets. On an error, what arrived whole counts and the rest can be asked for over another
    /// wire.
    fn fetch<'a>(
        &'a self,
        job: &'a FetchJob,
        arrivals: &'a mut Arrivals<'_>,
    ) -> BoxFuture<'a, Result<(), Status>>;

    /// Sends blocks; says what became of each that was decided.
    fn publish<'a>(&'a self, job: &'a PublishJob) -> BoxFuture<'a, Result<Vec<pb::BlockCommit>, Status>>;

    /// A lookup that is faster over this wire than over gRPC, if it can do one.
    fn lookup<'a>(
        &'a self,
        _request: &'a pb::LookupRequest,
    ) -> Option<BoxFuture<'a, Result<pb::LookupResponse, Status>>> {
        None
    }

    /// Where a fetch costs a round trip that a lookup can save.
    fn reader(&self) -> Option<&dyn Reader> {
        None
    }

    /// A reservation that is faster over this wire than over gRPC, if it can do one.
    fn reserve<'a>(
        &'a self,
        _request: &'a pb::ReserveRequest,
    ) -> Option<BoxFuture<'a, Result<pb::ReserveResponse, Status>>> {
        None
    }
}
