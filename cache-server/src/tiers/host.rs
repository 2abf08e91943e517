//! The host memory tier: an arena of chunks, each its own memory file, so that a chunk can later be handed to another
//! process by descriptor. This file owns the bytes and all access to them; which slot is whose is the core's
//! business, and the guards of `engine` carry the core's promise to here.

use cairn_core::SlotId;
use cairn_transfer::store::Location;
use memmap2::{Advice, MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use thiserror::Error;

/// Memory that cannot be had.
#[derive(Debug, Error)]
pub enum ArenaError {
    /// More than the machine has.
    #[error(
        "host.capacity_mib asks for {wanted_mib} MiB, but this machine has {total_mib} MiB of memory in all"
    )]
    TooLarge {
        /// What the config asks for.
        wanted_mib: u64,
        /// What there is.
        total_mib: u64,
    },
    /// The system refused.
    #[error("cannot make chunk {chunk} of the host arena: {source}")]
    Chunk {
        /// Which chunk.
        chunk: u32,
        /// Why.
        source: std::io::Error,
    },
}

/// The number of a chunk, as clients see it, has its generation above this many bits.
const CHUNK_BITS: u32 = 24;

struct Chunk {
    map: Arc<MmapRaw>,
    file: Mutex<File>,
    /// Grows, from 1, with every replacement of its memory.
    generation: AtomicU64,
}

/// Something whose life is the core's promise about a slot: that a read keeps its bytes, or that nobody else uses it.
pub(crate) type Guard = Arc<dyn std::any::Any + Send + Sync>;

/// All host memory for blocks.
pub struct HostArena {
    chunks: Vec<Chunk>,
    chunk_bytes: u64,
}

impl HostArena {
    /// Maps `chunks × chunk_bytes`. The memory is taken page by page as it is first written.
    ///
    /// # Errors
    /// When the machine has less memory than that, or refuses.
    pub fn new(chunks: u32, chunk_bytes: u64) -> Result<Self, ArenaError> {
        let total = total_memory_bytes();
        let wanted = u64::from(chunks).saturating_mul(chunk_bytes);
        if total.is_some_and(|total| wanted > total) {
            let total_mib = total.unwrap_or_default() >> 20;
            return Err(ArenaError::TooLarge { wanted_mib: wanted >> 20, total_mib });
        }
        let make = |chunk| Chunk::new(chunk_bytes).map_err(|source| ArenaError::Chunk { chunk, source });
        let chunks = (0..chunks).map(make).collect::<Result<_, _>>()?;
        Ok(Self { chunks, chunk_bytes })
    }

    /// Takes all memory now, chunk by chunk, until done or `stop`; `ready` hears how many chunks are there. Returns the
    /// bytes taken.
    pub fn prefault(&self, stop: &AtomicBool, mut ready: impl FnMut(u64)) -> std::io::Result<u64> {
        let mut bytes = 0;
        for (done, chunk) in (1..).zip(&self.chunks) {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            chunk.map.advise(Advice::PopulateWrite)?;
            bytes += self.chunk_bytes;
            ready(done);
        }
        Ok(bytes)
    }

    /// Chunks in all.
    pub(crate) fn chunk_count(&self) -> u32 {
        self.chunks.len() as u32
    }

    /// Where clients that map chunks find a slot; `None` for the few that a location cannot name (a chunk that changed hands
    /// 65,535 times, say): clients get copies of those.
    pub(crate) fn location(&self, slot: SlotId) -> Option<Location> {
        let named = slot.chunk < 1 << CHUNK_BITS && slot.index < 1 << Location::INDEX_BITS;
        let fresh = self.generation(slot.chunk) <= u64::from(u16::MAX);
        (named && fresh).then(|| Location::new(self.number(slot.chunk), slot.index))
    }

    fn number(&self, chunk: u32) -> u64 {
        self.generation(chunk) << CHUNK_BITS | u64::from(chunk)
    }

    /// How often a chunk got other memory, plus one.
    pub(crate) fn generation(&self, chunk: u32) -> u64 {
        self.chunks[chunk as usize].generation.load(Ordering::Acquire)
    }

    /// Which chunk a client means, if it is the current memory of one.
    pub(crate) fn find(&self, number: u64) -> Option<u32> {
        let chunk = (number & ((1 << CHUNK_BITS) - 1)) as u32;
        ((chunk as usize) < self.chunks.len() && self.number(chunk) == number).then_some(chunk)
    }

    /// The memory of a chunk, and its size; `None` when it got other memory since. Nobody who gets it can write to it: it is
    /// sealed.
    pub(crate) fn export(&self, number: u64) -> std::io::Result<Option<(OwnedFd, u64)>> {
        let Some(chunk) = self.find(number) else { return Ok(None) };
        let file = self.chunks[chunk as usize].file.lock().unwrap_or_else(PoisonError::into_inner);
        // Replaced only under the same lock.
        if self.number(chunk) != number {
            return Ok(None);
        }
        Ok(Some((file.try_clone()?.into(), self.chunk_bytes)))
    }

    /// Gives a chunk that holds nothing other memory, at the same address. Clients that mapped the old one keep it, and
    /// see nothing of what comes.
    ///
    /// # Errors
    /// When there is no memory; then the chunk must not be used.
    pub(crate) fn replace(&self, chunk: u32) -> std::io::Result<()> {
        let chunk = &self.chunks[chunk as usize];
        let (pointer, len) = (chunk.map.as_mut_ptr(), chunk.map.len());
        let file = memory(self.chunk_bytes)?;
        let mut current = chunk.file.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the range is a whole mapping of this arena and is mapped again in one step. The core says that no slot of the chunk is
        // in use, so no pointer into it is being followed.
        unsafe {
            let flags = MapFlags::SHARED | MapFlags::FIXED;
            mmap(pointer.cast(), len, ProtFlags::READ | ProtFlags::WRITE, flags, &file, 0)?;
        }
        fcntl_add_seals(&file, SealFlags::FUTURE_WRITE | SealFlags::SEAL)?;
        *current = file;
        chunk.generation.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// The mapping of one chunk, for registering it with a GPU's driver. It stays where it is, but [`Self::replace`] puts other memory under it.
    pub(crate) fn map(&self, chunk: u32) -> Arc<MmapRaw> {
        self.chunks[chunk as usize].map.clone()
    }

    /// Memory of one chunk, for registering it with the kernel.
    pub(crate) fn chunk_range(&self, chunk: u32) -> (*mut u8, usize) {
        (self.chunks[chunk as usize].map.as_mut_ptr(), self.chunk_bytes as usize)
    }

    /// The bytes of a slot that a read holds in place.
    pub(crate) fn bytes(self: &Arc<Self>, slot: SlotId, len: u64, guard: Guard) -> SlotBytes {
        self.range(slot, len);
        SlotBytes { arena: self.clone(), slot, len, _guard: guard }
    }

    /// The right to write a slot that a fill holds. The engine makes one for each slot of a fill.
    pub(crate) fn writer(self: &Arc<Self>, slot: SlotId, len: u64, guard: Guard) -> SlotWriter {
        self.range(slot, len);
        let slot_bytes = len.next_multiple_of(crate::SLOT_ALIGN_BYTES);
        // SAFETY: the whole slot is inside the mapping (`range`), and belongs to this writer alone (see `SlotWriter::as_mut`). What is behind
        // the block may be written to a device with it, and must not be another tenant's.
        unsafe { self.pointer(slot, len).add(len as usize).write_bytes(0, (slot_bytes - len) as usize) };
        SlotWriter { arena: self.clone(), slot, len, _guard: guard }
    }

    /// First byte of a slot in its chunk. Slots are `len` rounded up to the alignment that the core uses.
    pub(crate) fn range(&self, slot: SlotId, len: u64) -> usize {
        let slot_bytes = len.next_multiple_of(crate::SLOT_ALIGN_BYTES);
        let start = u64::from(slot.index) * slot_bytes;
        assert!(start + slot_bytes <= self.chunk_bytes, "{slot:?} of {len} bytes is outside its chunk");
        start as usize
    }

    fn pointer(&self, slot: SlotId, len: u64) -> *mut u8 {
        let start = self.range(slot, len);
        // SAFETY: `range` keeps the offset inside the chunk's mapping, which lives as long as `self`.
        unsafe { self.chunks[slot.chunk as usize].map.as_mut_ptr().add(start) }
    }
}

impl Chunk {
    fn new(bytes: u64) -> std::io::Result<Self> {
        let file = memory(bytes)?;
        let len = usize::try_from(bytes).map_err(std::io::Error::other)?;
        let map = MmapOptions::new().len(len).map_raw(&file)?;
        fcntl_add_seals(&file, SealFlags::FUTURE_WRITE | SealFlags::SEAL)?;
        // Huge pages are a matter of speed only; most systems forbid them for shared memory.
        let _ = map.advise(Advice::HugePage);
        Ok(Self { map: Arc::new(map), file: Mutex::new(file), generation: AtomicU64::new(1) })
    }
}

/// Once this is mapped for writing, it is sealed against any further writer: clients get descriptors of it, and with one they could
/// otherwise open it again with all rights.
fn memory(bytes: u64) -> std::io::Result<File> {
    let file = memfd_create(c"cairn-host-chunk", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, bytes)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
    Ok(File::from(file))
}

/// The bytes of one committed block, unchanging for as long as this value lives.
pub struct SlotBytes {
    arena: Arc<HostArena>,
    slot: SlotId,
    len: u64,
    _guard: Guard,
}

impl SlotBytes {
    /// Size of the slot, which is what direct IO writes.
    pub(crate) fn padded_len(&self) -> usize {
        self.len.next_multiple_of(crate::SLOT_ALIGN_BYTES) as usize
    }

    pub(crate) fn pointer(&self) -> *mut u8 {
        self.arena.pointer(self.slot, self.len)
    }

    pub(crate) fn chunk(&self) -> u32 {
        self.slot.chunk
    }

    /// Where clients find it.
    pub(crate) fn location(&self) -> Option<Location> {
        self.arena.location(self.slot)
    }
}

impl AsRef<[u8]> for SlotBytes {
    fn as_ref(&self) -> &[u8] {
        let pointer = self.arena.pointer(self.slot, self.len);
        // SAFETY: the range is inside the mapping. Nobody writes to it: the core gives a slot to a writer only when it
        // holds no block, and the slot of this block is not freed before the guard is dropped (`Event::EndRead`).
        unsafe { std::slice::from_raw_parts(pointer, self.len as usize) }
    }
}

/// The only right to write one slot.
pub struct SlotWriter {
    arena: Arc<HostArena>,
    slot: SlotId,
    len: u64,
    _guard: Guard,
}

impl SlotWriter {
    /// Size of the slot, which is what direct IO fills.
    pub(crate) fn padded_len(&self) -> usize {
        self.len.next_multiple_of(crate::SLOT_ALIGN_BYTES) as usize
    }

    pub(crate) fn pointer(&self) -> *mut u8 {
        self.arena.pointer(self.slot, self.len)
    }

    pub(crate) fn chunk(&self) -> u32 {
        self.slot.chunk
    }

    pub(crate) fn slot(&self) -> SlotId {
        self.slot
    }
}

impl AsMut<[u8]> for SlotWriter {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: the range is inside the slot and so inside the mapping. No other thread reads or writes it: the core hands a
        // reserved slot to one fill at a time, the engine makes one writer for each slot of a fill, a commit consumes it, and the
        // slot is not reused before the guard is dropped. Clients of the tenant that mapped the chunk can look at it; they cannot write.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(), self.len as usize) }
    }
}

/// Of the machine, from the kernel; `None` when it does not say.
fn total_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
