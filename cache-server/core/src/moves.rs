//! What has to be done to devices, and what came of it. Plain data: no behaviour.

use crate::{EntryId, SlotId};
use cairn_proto::{BlockHash, Checksum, MissReason, SpaceId};
use std::sync::Arc;

/// A device, by the order in which it was attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub u32);

/// One piece of work on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MoveId(pub u64);

/// One block on its way from a device or a GPU into a host slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LoadId(pub u64);

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskPlace {
    /// On this device.
    pub device: DeviceId,
    /// In this segment, counted on the device.
    pub segment: u32,
    /// In this life of the segment.
    pub generation: u64,
    /// From this page of it on.
    pub page: u32,
}

/// All that a record's header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The space that it belongs to.
    pub space: SpaceId,
    /// The tenant of that space.
    pub tenant: Arc<str>,
    /// Bytes of the block.
    pub block_bytes: u64,
    /// Its name.
    pub hash: BlockHash,
    /// The block before it.
    pub parent: Option<BlockHash>,
    /// Of its bytes.
    pub checksum: Checksum,
    /// Blocks before it in its chain, as far as they can be told apart.
    pub depth: u16,
    /// Later records of a device have higher numbers.
    pub sequence: u64,
}

/// Where the bytes of a record come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A host slot, which keeps them until the move ends.
    Slot(SlotId),
    /// Another record, which stays until the move ends.
    Disk(DiskPlace),
}

/// Where a block is loaded from. It keeps its bytes until the load ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A record on a device.
    Disk(DiskPlace),
    /// A slot on a GPU.
    Gpu(GpuSlot),
}

/// A GPU, by its position in the configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GpuId(pub u32);

/// A slot in the memory of a GPU: the `index`-th of a chunk, as in host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GpuSlot {
    /// On this GPU.
    pub gpu: GpuId,
    /// In this chunk, counted on the GPU.
    pub chunk: u32,
    /// Which slot of it.
    pub index: u32,
}

/// One block on its way to a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CopyId(pub u64);

/// A copy between host memory and a GPU. Both slots are held in place until its end was told.
#[derive(Clone, Debug, PartialEq)]
pub enum GpuWork {
    /// To the GPU. Ends with [`crate::GpuEvent::EndCopy`].
    Promote {
        /// To name it when it ends.
        copy: CopyId,
        /// What it is.
        record: Record,
        /// From here.
        from: SlotId,
        /// To here.
        to: GpuSlot,
    },
    /// To host memory, because the GPU needs the room and nothing else has the block. Ends with [`crate::Event::EndLoad`].
    Demote {
        /// To name it when it ends.
        load: LoadId,
        /// What it should be.
        record: Record,
        /// From here.
        from: GpuSlot,
        /// To here.
        to: SlotId,
    },
}

/// Totals of one GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuCounters {
    /// Blocks copied to it, and their bytes.
    pub promoted_blocks: u64,
    /// See `promoted_blocks`.
    pub promoted_bytes: u64,
    /// Only copies of a block that made room by moving to host memory.
    pub demoted_blocks: u64,
    /// Copies that made room and were elsewhere, too.
    pub dropped_blocks: u64,
    /// Blocks copied to host memory for readers that cannot reach the GPU, and their bytes.
    pub read_blocks: u64,
    /// See `read_blocks`.
    pub read_bytes: u64,
    /// Blocks whose bytes were wrong.
    pub corrupt_blocks: u64,
    /// Copies that failed.
    pub errors: u64,
}

/// One GPU, for administrators.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GpuUsage {
    /// Which.
    pub gpu: GpuId,
    /// Out of service after errors.
    pub lost: bool,
    /// Room for blocks.
    pub capacity_bytes: u64,
    /// Blocks that can be read there.
    pub blocks: u64,
    /// Bytes of their slots.
    pub bytes: u64,
    /// Its totals.
    pub counters: GpuCounters,
}

/// Work on a device, to be started in this order.
#[derive(Clone, Debug, PartialEq)]
pub struct Move {
    /// To name it when it ends.
    pub id: MoveId,
    /// What to do.
    pub work: Work,
}

/// See [`Move`].
#[derive(Clone, Debug, PartialEq)]
pub enum Work {
    /// Begin a segment: must be done before any later move is started.
    Open {
        /// Which.
        segment: u32,
        /// Its new generation.
        generation: u64,
    },
    /// Write a record.
    Write {
        /// Its header.
        record: Record,
        /// Its bytes.
        source: Source,
        /// Where to.
        to: DiskPlace,
    },
    /// Write the summary of a full segment, and make all of it durable.
    Seal {
        /// Which.
        segment: u32,
        /// Its generation.
        generation: u64,
        /// Where its wanted records are.
        pages: Vec<u32>,
    },
    /// Give a segment's room back to the file system.
    Free {
        /// Which.
        segment: u32,
    },
    /// Make all finished writes durable.
    Sync {
        /// Segments written to since the last time.
        segments: Vec<u32>,
    },
    /// Make a record unreadable: its bytes were found to be wrong.
    Erase(DiskPlace),
    /// Remember for good that a space's records up to a number are not wanted.
    Forget {
        /// Whose.
        space: SpaceId,
        /// The last of them.
        sequence: u64,
    },
}

/// How work on a device ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// As wanted.
    Done,
    /// The bytes to move do not match their checksum.
    Corrupt,
    /// The file system has no room.
    NoRoom,
    /// The device returned an error.
    Failed,
    /// It was given up before it was done.
    Cancelled,
}

/// A record that was found on a device at its attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where in its segment.
    pub page: u32,
    /// What its header says.
    pub record: Record,
}

/// How to get at one leased block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Load {
    /// It is in host memory.
    Ready(SlotId),
    /// Somebody is bringing it there.
    Wait,
    /// Bring it there, then say so.
    Promote {
        /// To name it when it ends.
        load: LoadId,
        /// From here.
        from: Origin,
        /// What it should be.
        record: Record,
        /// To here.
        slot: SlotId,
    },
    /// There is no room in host memory: read it for this one reader, then say so.
    Through {
        /// To name it when it ends.
        load: LoadId,
        /// From here.
        from: Origin,
        /// What it should be.
        record: Record,
    },
    /// It is gone, and why.
    Lost(MissReason),
}

/// A block to check on its device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScrubItem {
    /// To name it when it is checked.
    pub load: LoadId,
    /// To ask for the one after it.
    pub block: EntryId,
    /// Where it is.
    pub from: DiskPlace,
    /// What it should be.
    pub record: Record,
}

/// Totals of one device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceCounters {
    /// Blocks written for the first time, and their bytes.
    pub stored_blocks: u64,
    /// See `stored_blocks`.
    pub stored_bytes: u64,
    /// Bytes of blocks that were moved out of the way of reclaiming.
    pub relocated_bytes: u64,
    /// Blocks read into host memory or for one reader.
    pub read_blocks: u64,
    /// See `read_blocks`.
    pub read_bytes: u64,
    /// Copies that made room.
    pub evicted_blocks: u64,
    /// Blocks whose bytes were wrong.
    pub corrupt_blocks: u64,
    /// Segments reclaimed.
    pub reclaimed_segments: u64,
    /// Errors that the device returned.
    pub errors: u64,
}

impl DeviceCounters {
    /// Bytes written for each byte stored.
    pub fn write_amplification(&self) -> f64 {
        if self.stored_bytes == 0 {
            return 1.0;
        }
        (self.stored_bytes + self.relocated_bytes) as f64 / self.stored_bytes as f64
    }
}

/// One device, for administrators.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceUsage {
    /// Which.
    pub device: DeviceId,
    /// Whether it takes part.
    pub state: DeviceCondition,
    /// Room for records.
    pub capacity_bytes: u64,
    /// Bytes of wanted records.
    pub live_bytes: u64,
    /// Beyond so many of them copies leave. Follows from the sizes of the blocks that are there.
    pub target_bytes: u64,
    /// Wanted records.
    pub live_blocks: u64,
    /// Blocks that wait to be written, or are being written.
    pub queued_blocks: u64,
    /// Segments with nothing in them.
    pub free_segments: u64,
    /// Its totals.
    pub counters: DeviceCounters,
}

/// Whether a device takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceCondition {
    /// What it holds is being read in; blocks found so far are served.
    Recovering,
    /// In service.
    Ready,
    /// Out of service after errors.
    Lost,
}

impl DeviceCondition {
    /// The name used in tables and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Recovering => "recovering",
            Self::Ready => "ready",
            Self::Lost => "lost",
        }
    }
}
