//! The cache server as the wires see it: one [`Store`] for all of them.

use crate::auth::Right;
use crate::engine::FillBlock;
use crate::serve::{Context, fetch, refused, unexpected};
use cairn_core::{CommitOutcome, Event, GpuEvent, LeaseId, ReservationId, SessionId};
use cairn_proto::{BlockHash, Checksum, SpaceId, pb};
use cairn_transfer::WireKind;
use cairn_transfer::store::{
    ChunkMemory, Filling, GpuChunk, Hold, Limits, Owner, Reach, Reading, SessionKey, Slot, Store,
};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use tonic::Status;

impl Store for Context {
    fn limits(&self) -> Limits {
        self.limits
    }

    fn connect(&self, session: u64) -> Result<(SessionKey, Hold), Status> {
        self.accepting()?;
        self.sessions.find(session)?.connect()
    }

    fn ended(&self, session: u64) -> BoxFuture<'static, ()> {
        match self.sessions.find(session) {
            Ok(session) => session.ended().cancelled_owned().boxed(),
            Err(_) => std::future::ready(()).boxed(),
        }
    }

    fn lookup(
        &self,
        session: u64,
        request: &pb::LookupRequest,
        locate: bool,
    ) -> Result<pb::LookupResponse, Status> {
        let found = self.sessions.find(session)?;
        found.identity.require(Right::Read)?;
        let mut response = self.find(&found, SessionId(session), request)?;
        if locate && response.lease_id != 0 {
            let lease = LeaseId(response.lease_id);
            let slots = self.engine.inspect(|core| core.slots(SessionId(session), lease));
            let arena = self.engine.arena();
            let place =
                |slot: Option<_>| slot.and_then(|slot| arena.location(slot)).map_or(0, |place| place.0);
            response.locations = slots.into_iter().map(place).collect();
        }
        Ok(response)
    }

    fn reserve(&self, session: u64, request: &pb::ReserveRequest) -> Result<pb::ReserveResponse, Status> {
        let found = self.sessions.find(session)?;
        found.identity.require(Right::Publish)?;
        self.grant(&found, SessionId(session), request)
    }

    fn read(
        &self,
        wire: WireKind,
        session: u64,
        lease: u64,
        (first, count): (usize, usize),
        reach: Reach<'_>,
    ) -> Result<Reading, Status> {
        let identity = self.sessions.find(session)?.identity.clone();
        identity.require(Right::Read)?;
        let mut read = fetch::begin(self, (SessionId(session), LeaseId(lease)), first, count)?;
        let (mut on_gpu, block_bytes) = (Vec::new(), read.block_bytes());
        // Who opens the memory of a GPU can write there.
        if self.engine.gpus().reaches(reach.gpus) && identity.require(Right::Publish).is_ok() {
            // Refused only if the lease ended since: then there is nothing to want.
            let (session, lease) = (SessionId(session), LeaseId(lease));
            self.engine.apply(Event::Gpu(GpuEvent::Want { session, lease, first, count })).ok();
            let wanted = first..first + reach.blocks.min(count);
            read.blocks.retain(|block| {
                let slot = block.gpu.filter(|_| wanted.contains(&(block.position as usize)));
                let place = slot.and_then(|slot| self.engine.gpus().location(slot, reach.gpus));
                on_gpu.extend(place.map(|place| (block.position, place)));
                place.is_none()
            });
        }
        self.metrics.fetch_started(wire);
        let (hold, token) = (read.hold(), self.transfers.token());
        // Memory of a GPU goes with the server, whoever reads there: readers are waited for, as transfers are.
        let hold: Hold = if on_gpu.is_empty() { hold } else { Arc::new((hold, self.transfers.token())) };
        let blocks = fetch::blocks(&self.engine, read).inspect(move |_| {
            // A transfer is in progress as long as its stream lives.
            let _ = &token;
        });
        Ok(Reading { blocks: blocks.boxed(), on_gpu, block_bytes, hold })
    }

    fn fill(&self, wire: WireKind, session: u64, reservation: u64) -> Result<Filling, Status> {
        self.sessions.find(session)?.identity.require(Right::Publish)?;
        let fill = self.engine.fill(SessionId(session), ReservationId(reservation)).map_err(refused)?;
        let hold: Hold = Arc::new((fill.hold, self.transfers.token()));
        let slot = |block: FillBlock| {
            let position = block.block as u32;
            let slot = ReservedSlot { context: self.clone(), block, wire };
            (position, Box::new(slot) as Box<dyn Slot>)
        };
        Ok(Filling { space: fill.space, slots: fill.blocks.into_iter().map(slot).collect(), hold })
    }

    fn export(&self, session: u64, lease: u64, chunk: u64) -> Result<(OwnedFd, u64), Status> {
        self.leased_chunk(session, lease, chunk)?;
        let exported = self.engine.arena().export(chunk);
        exported.map_err(|error| Status::resource_exhausted(error.to_string()))?.ok_or_else(lease_gone)
    }

    fn chunk(&self, session: u64, lease: u64, chunk: u64) -> Result<ChunkMemory, Status> {
        let index = self.leased_chunk(session, lease, chunk)?;
        let (first, len) = self.engine.arena().chunk_range(index);
        Ok(ChunkMemory {
            address: first.expose_provenance(),
            bytes: len as u64,
            hold: Arc::new(self.engine.arena().clone()),
        })
    }

    fn gpu_chunk(&self, session: u64, lease: u64, chunk: u64) -> Result<GpuChunk, Status> {
        self.sessions.find(session)?.identity.require(Right::Publish)?;
        let gpus = self.engine.gpus();
        let place = gpus.find(chunk).ok_or_else(lease_gone)?;
        let held =
            self.engine.inspect(|core| core.is_in_gpu_chunk(SessionId(session), LeaseId(lease), place));
        if held { gpus.share(place).ok_or_else(lease_gone) } else { Err(lease_gone()) }
    }

    fn is_current(&self, chunk: u64) -> bool {
        self.engine.arena().find(chunk).is_some()
    }

    fn owner(&self, session: u64) -> Result<Owner, Status> {
        let found = self.sessions.find(session)?;
        let may = |right| found.identity.require(right).is_ok();
        let tenant = found.identity.tenant();
        Ok(Owner { tenant, reads: may(Right::Read), publishes: may(Right::Publish) })
    }

    fn staging(&self, bytes: u64) -> Result<Hold, Status> {
        let mib = bytes.div_ceil(1 << 20) as u32;
        let room = self.staging.clone().try_acquire_many_owned(mib);
        let room = room.map_err(|_| {
            Status::resource_exhausted("no more staging memory for clients; raise wires.staging_total_mib")
        })?;
        Ok(Arc::new(room))
    }

    fn sent(&self, wire: WireKind, bytes: u64) {
        self.metrics.sent(wire, bytes);
    }

    fn mismatch(&self, space: &SpaceId, hash: &BlockHash) {
        self.metrics.checksum_mismatches.inc();
        tracing::warn!(?space, ?hash, "published bytes do not match their checksum");
    }
}

impl Context {
    /// The index of a chunk that holds a block of this lease.
    fn leased_chunk(&self, session: u64, lease: u64, chunk: u64) -> Result<u32, Status> {
        let index = self.engine.arena().find(chunk).ok_or_else(lease_gone)?;
        let held = self.engine.inspect(|core| core.is_in_chunk(SessionId(session), LeaseId(lease), index));
        if held { Ok(index) } else { Err(lease_gone()) }
    }
}

fn lease_gone() -> Status {
    refused(cairn_core::Refusal::UnknownLease)
}

struct ReservedSlot {
    context: Context,
    block: FillBlock,
    wire: WireKind,
}

impl Slot for ReservedSlot {
    fn hash(&self) -> BlockHash {
        self.block.hash
    }

    fn bytes(&mut self) -> &mut [u8] {
        self.block.writer.as_mut()
    }

    fn commit(self: Box<Self>, checksum: Checksum) -> Result<pb::Commit, Status> {
        let Self { context, mut block, wire } = *self;
        let bytes = block.writer.as_mut().len() as u64;
        match block.commit(checksum) {
            CommitOutcome::Committed => {
                context.metrics.received(wire, bytes);
                Ok(pb::Commit::Committed)
            }
            CommitOutcome::Duplicate => Ok(pb::Commit::Duplicate),
            // Nothing of this reservation can be committed any more; its room is wanted.
            CommitOutcome::Expired => Err(Status::deadline_exceeded("the reservation ran out")),
            CommitOutcome::ParentMissing => Ok(pb::Commit::ParentMissing),
            CommitOutcome::NotReserved => Err(unexpected()),
        }
    }
}
