//! What can happen to a core, and what follows. Plain data: no behaviour.

use crate::moves::{
    CopyId, DeviceId, Ended, Found, GpuId, GpuSlot, GpuWork, Load, LoadId, Move, MoveId, ScrubItem,
};
use crate::{DeviceConfig, EntryId, GpuTierConfig, SlotId};
use cairn_proto::{BlockHash, Checksum, KeySpace, MissReason, Outcome, SpaceId, Tier};
use thiserror::Error;

/// Milliseconds since an arbitrary start. Never goes backwards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub u64);

impl Millis {
    /// This many milliseconds later.
    #[must_use]
    pub const fn plus(self, ms: u64) -> Self {
        Self(self.0.saturating_add(ms))
    }

    /// Milliseconds since `earlier`.
    pub const fn since(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// One client's presence. Everything it holds ends with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

/// A right to read a run of blocks until a deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

/// A right to fill slots until a deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReservationId(pub u64);

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event<'a> {
    /// A client arrived.
    OpenSession,
    /// A client left or was lost.
    EndSession(SessionId),
    /// A client declares a key space.
    OpenSpace {
        /// Who.
        session: SessionId,
        /// What.
        space: &'a KeySpace,
    },
    /// A client asks for the longest resident run of a chain.
    Lookup {
        /// Who.
        session: SessionId,
        /// Where.
        space: SpaceId,
        /// The chain, first block first.
        hashes: &'a [BlockHash],
        /// How long the run stays readable.
        ttl_ms: u32,
    },
    /// A client wants its lease to last longer.
    Renew {
        /// Who.
        session: SessionId,
        /// Which.
        lease: LeaseId,
        /// From now.
        ttl_ms: u32,
    },
    /// A client is done with a lease. Unknown leases are ignored: they may just have expired.
    Release {
        /// Who.
        session: SessionId,
        /// Which.
        lease: LeaseId,
    },
    /// The server is about to read leased slots. They keep their bytes until the matching [`Event::EndRead`], even if
    /// the lease ends before.
    BeginRead {
        /// Who.
        session: SessionId,
        /// Which.
        lease: LeaseId,
        /// First position in the run.
        first: usize,
        /// How many.
        count: usize,
    },
    /// The server finished a read.
    EndRead(LeaseId),
    /// A client wants room for the blocks of a chain.
    Reserve {
        /// Who.
        session: SessionId,
        /// Where.
        space: SpaceId,
        /// The block before the first; `None` at the start of a prompt.
        parent: Option<BlockHash>,
        /// The blocks, in chain order.
        hashes: &'a [BlockHash],
        /// How long the room is kept.
        ttl_ms: u32,
    },
    /// The server is about to write reserved slots. They are not reused until the matching [`Event::EndFill`].
    BeginFill {
        /// Who.
        session: SessionId,
        /// Which.
        reservation: ReservationId,
    },
    /// All bytes of one reserved block arrived and matched their checksum.
    Commit {
        /// Which reservation, in a fill.
        reservation: ReservationId,
        /// Which of its blocks.
        block: usize,
        /// Checksum of the bytes in the slot.
        checksum: Checksum,
    },
    /// The server finished writing; what was not committed is given up.
    EndFill(ReservationId),
    /// A client gives up a reservation.
    Abort {
        /// Who.
        session: SessionId,
        /// Which.
        reservation: ReservationId,
    },
    /// The server found that the bytes of a resident block do not match their checksum.
    Quarantine {
        /// Where.
        space: SpaceId,
        /// Which.
        hash: BlockHash,
    },
    /// An administrator removes all blocks of a space.
    Flush(SpaceId),
    /// Somebody asks where blocks are.
    Explain {
        /// Where.
        space: SpaceId,
        /// Which, best in chain order: what is known of one block then serves for the next.
        hashes: &'a [BlockHash],
    },
    /// A reader in [`Event::BeginRead`] needs one block that is not in host memory.
    Load {
        /// Which lease.
        lease: LeaseId,
        /// Position in its run.
        position: usize,
    },
    /// A block arrived from a device and matches its checksum, or not.
    EndLoad {
        /// Which.
        load: LoadId,
        /// How.
        ended: Ended,
    },
    /// A device is there; what it holds is not known yet.
    AttachDevice(&'a DeviceConfig),
    /// One segment of a device being attached was read.
    Recovered {
        /// Which device.
        device: DeviceId,
        /// Which segment of it.
        segment: u32,
        /// The segment's generation.
        generation: u64,
        /// Whether it has a summary.
        sealed: bool,
        /// Its records.
        found: &'a [Found],
    },
    /// All segments of a device were read.
    RecoveryDone {
        /// Which.
        device: DeviceId,
        /// Numbers up to this one were used.
        sequence: u64,
    },
    /// A device is gone or taken away.
    LoseDevice(DeviceId),
    /// A device can take more work.
    PlanMoves {
        /// Which.
        device: DeviceId,
        /// What may be written in addition to what is going on.
        room: Room,
        /// Whether to make finished writes durable now.
        sync: bool,
    },
    /// A move ended.
    EndMove {
        /// Which.
        id: MoveId,
        /// How.
        ended: Ended,
    },
    /// The scrubber wants the next block of a device.
    BeginScrub {
        /// Which device.
        device: DeviceId,
        /// The block before; `None` for the first.
        after: Option<EntryId>,
    },
    /// The scrubber checked a block.
    EndScrub {
        /// Which.
        load: LoadId,
        /// With what result.
        ended: Ended,
    },
    /// Something about GPUs.
    Gpu(GpuEvent<'a>),
    /// Time went by.
    Tick,
}

/// See [`Event::Gpu`].
#[derive(Clone, Debug)]
pub enum GpuEvent<'a> {
    /// The GPUs of this server, once and before all else that is about them.
    Attach(&'a GpuTierConfig),
    /// A reader that can use copies on a GPU reads blocks of its lease.
    Want {
        /// Who.
        session: SessionId,
        /// Which.
        lease: LeaseId,
        /// First position in the run.
        first: usize,
        /// How many.
        count: usize,
    },
    /// More can be copied to and from GPUs.
    Plan(Room),
    /// A copy to a GPU ended.
    EndCopy {
        /// Which.
        copy: CopyId,
        /// How.
        ended: Ended,
    },
    /// The server found that the copy of a block on a GPU does not match its checksum.
    Spoil {
        /// Where.
        space: SpaceId,
        /// Which.
        hash: BlockHash,
    },
    /// A GPU is gone.
    Lose(GpuId),
}

/// How much more a device can take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Bytes.
    pub bytes: u64,
    /// Records.
    pub blocks: usize,
    /// Nothing is being written: one record may be larger than the rest of this says.
    pub idle: bool,
}

impl Room {
    /// Takes room for one record; says whether there was any.
    pub(crate) fn take(&mut self, bytes: u64) -> bool {
        let fits = self.blocks > 0 && (self.idle && self.bytes > 0 || bytes <= self.bytes);
        if fits {
            self.blocks -= 1;
            self.bytes = self.bytes.saturating_sub(bytes);
            self.idle = false;
        }
        fits
    }
}

/// What follows from one event.
#[derive(Debug, Default)]
pub struct Effects {
    /// The answer to whoever caused the event.
    pub reply: Reply,
    /// Blocks that left the index.
    pub removed: Vec<Removed>,
    /// Devices that went out of service.
    pub lost: Vec<DeviceId>,
    /// GPUs that went out of service.
    pub lost_gpus: Vec<GpuId>,
    /// Chunks that go from one tenant to another: what is in their memory is the first one's, whose clients may have mapped it. They
    /// need other memory before anything is written to them.
    pub stale: Vec<u32>,
}

/// A block that left the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Removed {
    /// Its hash.
    pub hash: BlockHash,
    /// Why.
    pub reason: MissReason,
}

/// The answer to one event.
#[derive(Debug, Default, PartialEq)]
pub enum Reply {
    /// Nothing to say.
    #[default]
    Done,
    /// To [`Event::OpenSession`].
    Session(SessionId),
    /// To [`Event::Lookup`].
    Found {
        /// Present when at least one block is resident.
        lease: Option<LeaseId>,
        /// One for each block asked for.
        outcomes: Vec<Outcome>,
        /// One for each leased block.
        checksums: Vec<Checksum>,
    },
    /// To [`Event::BeginRead`].
    Read {
        /// The space of all of them.
        space: SpaceId,
        /// In run order.
        slots: Vec<ReadSlot>,
    },
    /// To [`Event::Reserve`].
    Reserved {
        /// Present when at least one block was granted.
        reservation: Option<ReservationId>,
        /// One for each block asked for.
        grants: Vec<Grant>,
    },
    /// To [`Event::BeginFill`].
    Fill {
        /// The space of all of them.
        space: SpaceId,
        /// The granted blocks.
        slots: Vec<FillSlot>,
    },
    /// To [`Event::Load`].
    Load(Load),
    /// To [`Event::AttachDevice`].
    Device(DeviceId),
    /// To [`Event::PlanMoves`].
    Moves(Vec<Move>),
    /// To [`GpuEvent::Plan`]: to be started in any order.
    Copies(Vec<GpuWork>),
    /// To [`Event::BeginScrub`]: `None` after the last block.
    Scrub(Option<ScrubItem>),
    /// To [`Event::Commit`].
    Committed(CommitOutcome),
    /// To [`Event::Flush`]: how many blocks left the index.
    Flushed(u64),
    /// To [`Event::Explain`].
    Explained(Vec<BlockState>),
    /// The event was not applied.
    Refused(Refusal),
}

/// A slot to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadSlot {
    /// Where the bytes are; `None` when they must be loaded first.
    pub slot: Option<SlotId>,
    /// Where they are on a GPU, too.
    pub gpu: Option<GpuSlot>,
    /// Whose they are.
    pub hash: BlockHash,
    /// What they must add up to.
    pub checksum: Checksum,
}

/// A slot to fill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FillSlot {
    /// Position in the reservation.
    pub block: usize,
    /// Where the bytes go.
    pub slot: SlotId,
    /// Whose they are.
    pub hash: BlockHash,
}

/// What a client may do about one block that it offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Send the bytes.
    Granted,
    /// Nothing to do.
    AlreadyStored,
    /// No room at the moment.
    NoSpace,
    /// The chain is broken before this block.
    ParentMissing,
}

/// What became of a filled block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitOutcome {
    /// It is visible now.
    Committed,
    /// An earlier copy stays; this one was dropped.
    Duplicate,
    /// The reservation ran out.
    Expired,
    /// The block before it is gone or was never committed.
    ParentMissing,
    /// There is no such block in the reservation, or it was committed already.
    NotReserved,
}

/// Where a block is, or what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// Resident.
    Resident {
        /// In this tier, or in this and slower ones.
        tier: Tier,
        /// Whether a copy of it survives a loss of power.
        durable: bool,
        /// Size of its slot.
        bytes: u64,
        /// Leases on it now.
        leases: u32,
        /// Since it was last touched.
        idle_ms: u64,
        /// Of its bytes.
        checksum: Checksum,
        /// Whether all blocks before it are resident.
        reachable: bool,
    },
    /// Not resident.
    Absent {
        /// Why.
        reason: MissReason,
        /// Since when; 0 when never stored.
        ago_ms: u64,
    },
}

/// One space's share, for administrators.
#[derive(Clone, Debug)]
pub struct SpaceUsage {
    /// Its id.
    pub id: SpaceId,
    /// The space, once a client declared it.
    pub space: Option<KeySpace>,
    /// Bytes of one block.
    pub block_bytes: u64,
    /// Its blocks.
    pub resident_blocks: u64,
}

/// Why an event was not applied.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The session ended, or belongs to an earlier start of the server.
    #[error("unknown session: open a new one")]
    UnknownSession,
    /// The space was not declared.
    #[error("unknown key space: call OpenSpace first")]
    UnknownSpace,
    /// The lease ended.
    #[error("unknown or expired lease: look the blocks up again")]
    UnknownLease,
    /// The reservation ended or never was.
    #[error("unknown or expired reservation: call Reserve before Publish")]
    UnknownReservation,
    /// Another stream is filling this reservation.
    #[error("the reservation is being filled by another stream")]
    FillInProgress,
    /// The positions are outside the lease.
    #[error("positions {first}..{end} are outside the lease, which has {blocks} blocks")]
    OutsideLease {
        /// First position asked for.
        first: usize,
        /// One past the last.
        end: usize,
        /// Blocks of the lease.
        blocks: usize,
    },
    /// A limit of the session or server is reached.
    #[error("at most {max} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// The tenant is not configured.
    #[error("tenant {0:?} is not configured on this server")]
    UnknownTenant(String),
    /// No chunk can hold such a block.
    #[error("blocks of {block_bytes} bytes do not fit chunks of {chunk_bytes} bytes: raise chunk_mib")]
    BlockTooLarge {
        /// Bytes of a slot of this space.
        block_bytes: u64,
        /// Bytes of a chunk.
        chunk_bytes: u64,
    },
}
