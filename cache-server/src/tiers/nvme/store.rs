//! The tier's data path alone: one directory and a few host slots, without a core or a server. For benches, which put it beside the
//! raw device.

use super::device::{Device, DeviceError, DeviceOptions};
use super::io::{Engine, Memory};
use super::pool::Pool;
use super::uring::Uring;
use super::{Depth, Survey, survey};
use crate::tiers::host::HostArena;
use cairn_core::{DeviceId, DiskPlace, PAGE_BYTES, Record, SlotId, record_pages, summary_pages};
use cairn_proto::{BlockHash, Checksum, SpaceId};
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// See the head of this file.
pub struct Store {
    device: Device,
    arena: Arc<HostArena>,
    block_bytes: u64,
    /// Of each slot's bytes.
    checksums: Vec<Checksum>,
    per_segment: u32,
}

impl Store {
    /// Opens a directory, with `slots` host slots that hold known bytes. `threads`: without io_uring.
    ///
    /// # Errors
    /// When the directory cannot be used or memory cannot be had.
    pub fn open(
        options: &DeviceOptions,
        block_bytes: u64,
        slots: u32,
        threads: bool,
    ) -> Result<Self, DeviceError> {
        let fail = |source| DeviceError::Io { path: options.path.clone(), source };
        let arena = HostArena::new(slots, block_bytes.next_multiple_of(crate::SLOT_ALIGN_BYTES));
        let arena = Arc::new(arena.map_err(|error| fail(io::Error::other(error)))?);
        arena.prefault(&AtomicBool::new(false), |_| ()).map_err(fail)?;
        let engine: Arc<dyn Engine> = if threads {
            Arc::new(Pool::start().map_err(fail)?)
        } else {
            let ring = Uring::start(arena.clone()).map_err(fail)?;
            ring.chunks_ready(u64::from(slots));
            Arc::new(ring)
        };
        let device = Device::open(options, engine)?;
        let pages = device.segment_pages() - 1;
        let mut per_segment = pages / record_pages(block_bytes);
        while per_segment * record_pages(block_bytes) + summary_pages(per_segment as usize) > pages {
            per_segment -= 1;
        }
        let mut store = Self { device, arena, block_bytes, checksums: Vec::new(), per_segment };
        store.checksums = (0..slots).map(|slot| store.fill(slot)).collect();
        Ok(store)
    }

    fn fill(&self, slot: u32) -> Checksum {
        let bytes: Vec<u8> = (0..self.block_bytes).map(|i| (i * 31 % 251) as u8 ^ slot as u8).collect();
        self.arena.writer(place_of(slot), self.block_bytes, Arc::new(())).as_mut().copy_from_slice(&bytes);
        Checksum::of(&space(), &name(slot), &bytes)
    }

    /// Blocks that fit.
    pub fn capacity(&self) -> u32 {
        self.per_segment * self.device.segments()
    }

    /// Takes room for the first `blocks`.
    ///
    /// # Errors
    /// When the file system has none.
    pub async fn prepare(&self, blocks: u32) -> io::Result<()> {
        for segment in 0..blocks.div_ceil(self.per_segment) {
            self.device.open_segment(segment, 1).await?;
        }
        Ok(())
    }

    /// Writes a slot as a whole record.
    ///
    /// # Errors
    /// When the device returns one.
    pub async fn write(&self, block: u32, slot: u32) -> io::Result<()> {
        let bytes = Memory::Block(self.arena.bytes(place_of(slot), self.block_bytes, Arc::new(())));
        self.device.write_record(self.record(block, slot), bytes, self.place(block)).await
    }

    /// Reads a record that was written from `from` into `slot`, verified. The caller uses a slot once at a time.
    ///
    /// # Errors
    /// When the device returns one, or other bytes.
    pub async fn read(&self, block: u32, from: u32, slot: u32) -> io::Result<()> {
        let memory = Memory::Slot(self.arena.writer(place_of(slot), self.block_bytes, Arc::new(())));
        let read = self.device.read_record(&self.record(block, from), self.place(block), memory).await;
        read.map(|_| ()).map_err(|error| io::Error::other(format!("{error:?}")))
    }

    /// Makes everything written durable.
    ///
    /// # Errors
    /// When the device returns one.
    pub async fn sync(&self, blocks: u32) -> io::Result<()> {
        for segment in 0..blocks.div_ceil(self.per_segment) {
            self.device.sync(segment).await?;
        }
        Ok(())
    }

    /// Writes the summaries of the first segments.
    ///
    /// # Errors
    /// When the device returns one.
    pub async fn seal(&self, blocks: u32) -> io::Result<()> {
        for segment in 0..blocks.div_ceil(self.per_segment) {
            let first = segment * self.per_segment;
            let last = (first + self.per_segment).min(blocks);
            let pages = (first..last).map(|block| self.place(block).page).collect();
            self.device.seal_segment(segment, 1, pages).await?;
        }
        Ok(())
    }

    /// Reads everything in, as a server does when it starts.
    ///
    /// # Errors
    /// See [`survey`].
    pub async fn recover(path: &Path) -> Result<Survey, DeviceError> {
        survey(path, HashMap::new(), Depth::Headers).await
    }

    fn place(&self, block: u32) -> DiskPlace {
        let page = 1 + block % self.per_segment * record_pages(self.block_bytes);
        debug_assert!(u64::from(page) * PAGE_BYTES < self.device.segment_bytes());
        DiskPlace { device: DeviceId(0), segment: block / self.per_segment, generation: 1, page }
    }

    fn record(&self, block: u32, slot: u32) -> Record {
        Record {
            space: space(),
            tenant: "bench".into(),
            block_bytes: self.block_bytes,
            hash: name(slot),
            parent: None,
            checksum: self.checksums[slot as usize],
            depth: 0,
            sequence: u64::from(block) + 1,
        }
    }
}

/// One slot a chunk.
fn place_of(slot: u32) -> SlotId {
    SlotId { chunk: slot, index: 0 }
}

fn space() -> SpaceId {
    SpaceId([7; 32])
}

fn name(slot: u32) -> BlockHash {
    let mut hash = [1; 32];
    hash[..4].copy_from_slice(&slot.to_le_bytes());
    BlockHash(hash)
}
