//! The core behind its lock, beside the memory it decides about. Guards tie the life of bytes to the core's promises:
//! while a [`ReadGuard`] or [`FillGuard`] lives, the core does not reuse the slots it names.

use crate::SLOT_ALIGN_BYTES;
use crate::config::{Config, ConfigError};
use crate::tiers::{ArenaError, HostArena, SlotBytes, SlotWriter};
use cairn_core::{
    CommitOutcome, Core, Effects, Event, LeaseId, Millis, Refusal, Reply, ReservationId, SessionId,
};
use cairn_proto::{BlockHash, Checksum, SpaceId};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;
use thiserror::Error;

/// Why an engine cannot start.
#[derive(Debug, Error)]
pub enum EngineError {
    /// A setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Memory.
    #[error(transparent)]
    Arena(#[from] ArenaError),
}

/// Decisions and memory of one server.
pub struct Engine {
    core: Mutex<Core>,
    arena: Arc<HostArena>,
    started: Instant,
    epoch: u64,
    capacity_bytes: u64,
}

impl Engine {
    /// An empty engine.
    ///
    /// # Errors
    /// When a setting cannot work or memory cannot be had.
    pub fn new(config: &Config) -> Result<Arc<Self>, EngineError> {
        let random = RandomState::new();
        let core_config = config.core([random.hash_one(1u8), random.hash_one(2u8)])?;
        let arena = HostArena::new(core_config.host_chunks, core_config.chunk_bytes)?;
        let capacity_bytes = u64::from(core_config.host_chunks) * core_config.chunk_bytes;
        let core = Core::new(core_config).map_err(ConfigError::from)?;
        Ok(Arc::new(Self {
            core: Mutex::new(core),
            arena: Arc::new(arena),
            started: Instant::now(),
            epoch: random.hash_one(3u8),
            capacity_bytes,
        }))
    }

    /// Differs between any two starts.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Since the start.
    pub fn uptime_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Of the host tier.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// The host tier's memory.
    pub fn arena(&self) -> &Arc<HostArena> {
        &self.arena
    }

    /// Applies one event now.
    ///
    /// # Errors
    /// When the core refuses it.
    pub fn apply(&self, event: Event<'_>) -> Result<Reply, Refusal> {
        let Effects { reply, removed } = {
            let mut core = self.core();
            // Read under the lock, so that time never goes backwards for the core.
            let now = Millis(self.uptime_ms());
            core.apply(now, event)
        };
        for block in &removed {
            tracing::trace!(hash = ?block.hash, reason = block.reason.name(), "block removed");
        }
        match reply {
            Reply::Refused(refusal) => Err(refusal),
            reply => Ok(reply),
        }
    }

    /// Reads from the core's counters.
    pub fn inspect<T>(&self, read: impl FnOnce(&Core) -> T) -> T {
        read(&self.core())
    }

    /// Starts to read leased blocks. Each comes with the checksum it was committed with.
    ///
    /// # Errors
    /// When the lease ended or the positions are outside it.
    pub fn read(
        self: &Arc<Self>,
        (session, lease): (SessionId, LeaseId),
        first: usize,
        count: usize,
    ) -> Result<Read, Refusal> {
        let reply = self.apply(Event::BeginRead { session, lease, first, count })?;
        let Reply::Read { space, slots } = reply else {
            return Err(Refusal::UnknownLease);
        };
        let guard = Arc::new(ReadGuard { engine: self.clone(), lease });
        let len = self.block_bytes(&space)?;
        let block = |slot: &cairn_core::ReadSlot| ReadBlock {
            hash: slot.hash,
            checksum: slot.checksum,
            bytes: self.arena.bytes(slot.slot, len, guard.clone()),
        };
        Ok(Read { space, blocks: slots.iter().map(block).collect() })
    }

    /// Starts to fill a reservation.
    ///
    /// # Errors
    /// When the reservation ended or is being filled already.
    pub fn fill(self: &Arc<Self>, session: SessionId, reservation: ReservationId) -> Result<Fill, Refusal> {
        let reply = self.apply(Event::BeginFill { session, reservation })?;
        let Reply::Fill { space, slots } = reply else {
            return Err(Refusal::UnknownReservation);
        };
        let guard = Arc::new(FillGuard { engine: self.clone(), reservation });
        let len = self.block_bytes(&space)?;
        let block = |slot: &cairn_core::FillSlot| FillBlock {
            block: slot.block,
            hash: slot.hash,
            writer: self.arena.writer(slot.slot, len, guard.clone()),
            guard: guard.clone(),
        };
        Ok(Fill { space, block_bytes: len, blocks: slots.iter().map(block).collect(), _guard: guard.clone() })
    }

    fn block_bytes(&self, space: &SpaceId) -> Result<u64, Refusal> {
        let core = self.core();
        let (space, slot_bytes) = core.space(space).ok_or(Refusal::UnknownSpace)?;
        debug_assert_eq!(slot_bytes, space.block_bytes().next_multiple_of(SLOT_ALIGN_BYTES));
        Ok(space.block_bytes())
    }

    /// A panic inside the core is a defect in it, and its state could be anything: serving on would risk wrong bytes. The
    /// process ends at once, so that whoever watches it starts a new one.
    fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(|_| {
            tracing::error!("the core panicked: this is a defect in Cairn; ending");
            std::process::abort()
        })
    }
}

/// Leased blocks, held in place.
pub struct Read {
    /// Of all of them.
    pub space: SpaceId,
    /// In run order.
    pub blocks: Vec<ReadBlock>,
}

/// One block to read.
pub struct ReadBlock {
    /// Its name.
    pub hash: BlockHash,
    /// What its bytes must add up to.
    pub checksum: Checksum,
    /// Its bytes.
    pub bytes: SlotBytes,
}

/// A reservation being filled. Dropping it gives up what was not committed.
pub struct Fill {
    /// Of all blocks.
    pub space: SpaceId,
    /// Of each.
    pub block_bytes: u64,
    /// The granted blocks.
    pub blocks: Vec<FillBlock>,
    /// The fill goes on while any block is missing, even if the others are done.
    _guard: Arc<FillGuard>,
}

/// One block to fill.
pub struct FillBlock {
    /// Position in the reservation.
    pub block: usize,
    /// Its name.
    pub hash: BlockHash,
    /// The right to write it.
    pub writer: SlotWriter,
    guard: Arc<FillGuard>,
}

impl FillBlock {
    /// Ends the writing and makes the block visible. The checksum must be that of the bytes written.
    pub fn commit(self, checksum: Checksum) -> CommitOutcome {
        let Self { block, writer, guard, .. } = self;
        drop(writer);
        match guard.engine.apply(Event::Commit { reservation: guard.reservation, block, checksum }) {
            Ok(Reply::Committed(outcome)) => outcome,
            _ => CommitOutcome::NotReserved,
        }
    }
}

/// While it lives, the slots of a read keep their bytes.
pub struct ReadGuard {
    engine: Arc<Engine>,
    lease: LeaseId,
}

impl Drop for ReadGuard {
    fn drop(&mut self) {
        // EndRead has no answer and cannot be refused.
        let _ = self.engine.apply(Event::EndRead(self.lease));
    }
}

/// While it lives, the slots of a fill belong to it.
pub struct FillGuard {
    engine: Arc<Engine>,
    reservation: ReservationId,
}

impl Drop for FillGuard {
    fn drop(&mut self) {
        // EndFill has no answer and cannot be refused.
        let _ = self.engine.apply(Event::EndFill(self.reservation));
    }
}
