//! The receiving end of a fetch: where each block's bytes go, what has arrived, and whether it is what was promised. A
//! block counts only once all its bytes are there and their checksum is right, whatever wire they came over.

use crate::copy::copy_shared;
use crate::incoming::Incoming;
use cairn_proto::{BlockHash, Checksum, MissReason, SpaceId};
use std::ops::Range;
use tonic::Status;

/// What became of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// In its target, verified.
    Whole,
    /// Its bytes are not what was promised; the target holds them all the same.
    Corrupt,
    /// The server cannot send it.
    Lost(MissReason),
}

/// What is known of the blocks before any byte arrives.
#[derive(Clone, Copy, Debug)]
pub struct Promise<'a> {
    /// Of all of them.
    pub space: SpaceId,
    /// Bytes of each.
    pub block_bytes: u64,
    /// Their names, for the whole leased run.
    pub hashes: &'a [BlockHash],
    /// What their bytes must add up to, likewise.
    pub checksums: &'a [Checksum],
}

/// Hears of every piece: position in the run, and the bytes of that block so far.
pub type Progress<'a> = &'a mut (dyn FnMut(usize, &[u8]) + Send);

/// Blocks on their way into the caller's memory.
pub struct Arrivals<'a> {
    promise: Promise<'a>,
    first: usize,
    targets: Vec<&'a mut [u8]>,
    open: Vec<Option<Incoming>>,
    found: Vec<Option<Arrival>>,
    progress: Option<Progress<'a>>,
}

impl<'a> Arrivals<'a> {
    /// Nothing has arrived of blocks `first..first + targets.len()` of the run.
    pub fn new(promise: Promise<'a>, first: usize, targets: Vec<&'a mut [u8]>) -> Self {
        let count = targets.len();
        let open = (0..count).map(|_| None).collect();
        Self { promise, first, targets, open, found: vec![None; count], progress: None }
    }

    /// Reports every piece to `progress`: position in the run, and bytes of that block so far. They are not verified before
    /// the block is whole.
    #[must_use]
    pub fn watched(mut self, progress: Progress<'a>) -> Self {
        self.progress = Some(progress);
        self
    }

    /// What is known of the blocks.
    pub fn promise(&self) -> &Promise<'a> {
        &self.promise
    }

    /// The next consecutive positions that nothing is decided about, and forgets what arrived of them in part.
    pub fn undecided(&mut self) -> Option<Range<usize>> {
        let start = self.found.iter().position(Option::is_none)?;
        let count = self.found[start..].iter().take_while(|found| found.is_none()).count();
        self.open[start..start + count].iter_mut().for_each(|open| *open = None);
        Some(self.first + start..self.first + start + count)
    }

    /// What became of each block so far.
    pub fn found(&self) -> &[Option<Arrival>] {
        &self.found
    }

    /// Where the next `len` bytes of a block go. [`Self::added`] must follow once they are there.
    ///
    /// # Errors
    /// When the piece is not what can come next.
    pub fn room(&mut self, block: u32, offset: u64, len: usize) -> Result<&mut [u8], Status> {
        let index = self.index(block)?;
        if self.found[index].is_some() {
            return Err(Status::internal("bytes of a block that is complete"));
        }
        let Promise { space, hashes, .. } = self.promise;
        let hash = &hashes[self.first + index];
        let incoming = self.open[index].get_or_insert_with(|| Incoming::new(&space, hash));
        incoming
            .room(offset, len, &mut *self.targets[index])
            .map_err(|error| Status::internal(error.to_string()))
    }

    /// `len` bytes were stored where [`Self::room`] said.
    ///
    /// # Errors
    /// When there was no such room.
    pub fn added(&mut self, block: u32, len: usize) -> Result<(), Status> {
        let index = self.index(block)?;
        let Some(incoming) = &mut self.open[index] else {
            return Err(Status::internal("bytes without room"));
        };
        let start = incoming.received() as usize;
        incoming.add(&self.targets[index][start..start + len]);
        let (received, finished) = (incoming.received(), incoming.finish(self.promise.block_bytes));
        if let Some(checksum) = finished {
            self.open[index] = None;
            self.decide(index, checksum);
        }
        if let Some(progress) = &mut self.progress {
            progress(self.first + index, &self.targets[index][..received as usize]);
        }
        Ok(())
    }

    /// Stores one piece.
    ///
    /// # Errors
    /// When the piece is not what can come next.
    pub fn accept(&mut self, block: u32, offset: u64, data: &[u8]) -> Result<(), Status> {
        self.room(block, offset, data.len())?.copy_from_slice(data);
        self.added(block, data.len())
    }

    /// Copies and checks a whole block in one pass.
    ///
    /// # Errors
    /// When the block is not asked for or decided.
    ///
    /// # Safety
    /// `source` must be readable for the bytes of a block and not overlap its target; it may change meanwhile.
    pub unsafe fn copy(&mut self, block: u32, source: *const u8) -> Result<(), Status> {
        let index = self.index(block)?;
        if self.found[index].is_some() {
            return Err(Status::internal("bytes of a block that is complete"));
        }
        let hash = &self.promise.hashes[self.first + index];
        // SAFETY: the caller's promise; targets have the size of a block.
        let checksum = unsafe { copy_shared(&self.promise.space, hash, source, self.targets[index]) };
        self.open[index] = None;
        self.decide(index, checksum);
        if let Some(progress) = &mut self.progress {
            progress(self.first + index, self.targets[index]);
        }
        Ok(())
    }

    /// As [`Self::copy`], from memory that does not change.
    ///
    /// # Errors
    /// When the block is not asked for or decided, or has another size.
    pub fn copy_from(&mut self, block: u32, source: &[u8]) -> Result<(), Status> {
        if source.len() as u64 != self.promise.block_bytes {
            return Err(Status::internal("a block of another size"));
        }
        // SAFETY: the source has the bytes of a block, and a mutable and a shared slice do not overlap.
        unsafe { self.copy(block, source.as_ptr()) }
    }

    /// The server cannot send a block.
    ///
    /// # Errors
    /// When the block was not asked for.
    pub fn lost(&mut self, block: u32, reason: MissReason) -> Result<(), Status> {
        let index = self.index(block)?;
        self.found[index].get_or_insert(Arrival::Lost(reason));
        Ok(())
    }

    /// A block that was found corrupt may be asked for once more.
    pub fn forget_corrupt(&mut self) {
        for found in &mut self.found {
            if *found == Some(Arrival::Corrupt) {
                *found = None;
            }
        }
    }

    fn decide(&mut self, index: usize, checksum: Checksum) {
        let right = checksum == self.promise.checksums[self.first + index];
        self.found[index] = Some(if right { Arrival::Whole } else { Arrival::Corrupt });
    }

    fn index(&self, block: u32) -> Result<usize, Status> {
        let index = (block as usize).checked_sub(self.first).filter(|index| *index < self.targets.len());
        index.ok_or_else(|| Status::internal("a block that was not asked for"))
    }
}
