//! The gRPC services: parse at the door, one event into the core, pack the answer. No decision is made here.

mod admin;
mod cache;
pub(crate) mod fetch;
mod publish;
mod session;

pub(crate) use admin::AdminService;
pub(crate) use cache::CacheService;

use crate::auth::{Auth, Identity, Right};
use crate::engine::Engine;
use crate::metrics::Metrics;
use crate::sessions::{Session, Sessions};
use cairn_core::{Event, Grant, LeaseId, Refusal, Reply, SessionId};
use cairn_proto::{BlockHash, SpaceId, limits, pb, runs, wire};
use cairn_transfer::WireKind;
use cairn_transfer::store::Limits;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Status};

/// Believed of one report: more than any client reads between two of them.
const MAX_COPIED_BYTES: u64 = 1 << 40;

/// What every handler shares.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) engine: Arc<Engine>,
    pub(crate) metrics: Metrics,
    pub(crate) draining: CancellationToken,
    /// Transfers in progress; shutdown waits for them.
    pub(crate) transfers: TaskTracker,
    pub(crate) max_sessions: usize,
    pub(crate) max_sessions_per_token: usize,
    pub(crate) limits: Limits,
    pub(crate) auth: Arc<Auth>,
    pub(crate) sessions: Arc<Sessions>,
    /// MiB that clients may still have for staging.
    pub(crate) staging: Arc<Semaphore>,
    /// Data paths besides the API.
    pub(crate) wires: Arc<[pb::WireOffer]>,
}

impl Context {
    /// Refuses new work during shutdown.
    pub(crate) fn accepting(&self) -> Result<(), Status> {
        if self.draining.is_cancelled() {
            return Err(Status::unavailable("the server is shutting down"));
        }
        Ok(())
    }

    /// Who asks, for what does not belong to a session.
    pub(crate) fn identify<T>(&self, request: &Request<T>, right: Right) -> Result<Identity, Status> {
        let identity = self.auth.identify(request.metadata())?;
        identity.require(right)?;
        Ok(identity)
    }

    /// The session of a request, if it is the client's own and may do that.
    pub(crate) fn authorize<T>(
        &self,
        request: &Request<T>,
        session: u64,
        right: Right,
    ) -> Result<Arc<Session>, Status> {
        self.sessions.authorize(session, &self.auth.identify(request.metadata())?, right)
    }

    /// Answers a lookup of an authorized session.
    pub(crate) fn find(
        &self,
        session: &Session,
        id: SessionId,
        request: &pb::LookupRequest,
    ) -> Result<pb::LookupResponse, Status> {
        let started = Instant::now();
        self.accepting()?;
        let space = SpaceId::try_from(request.space_id.as_ref())?;
        let hashes = BlockHash::parse_list(&request.block_hashes)?;
        session.require_space(&space)?;
        self.copied(request.copied_bytes, request.rdma_bytes);
        self.release(id, &request.release_lease_ids)?;
        let ttl_ms = wire::clamp_ttl_ms(request.lease_ttl_ms);
        let event = Event::Lookup { session: id, space, hashes: &hashes, ttl_ms };
        let reply = self.engine.apply(event).map_err(refused)?;
        let Reply::Found { lease, outcomes, checksums } = reply else {
            return Err(unexpected());
        };
        self.metrics.observe("lookup", started);
        Ok(pb::LookupResponse {
            lease_id: lease.map_or(0, |lease| lease.0),
            lease_ttl_ms: ttl_ms,
            outcomes: wire::outcome_runs(&outcomes),
            checksums: checksums.iter().flat_map(|sum| sum.0).collect::<Vec<u8>>().into(),
            locations: Vec::new(),
        })
    }

    /// Answers a reservation of an authorized session.
    pub(crate) fn grant(
        &self,
        session: &Session,
        id: SessionId,
        request: &pb::ReserveRequest,
    ) -> Result<pb::ReserveResponse, Status> {
        let started = Instant::now();
        self.accepting()?;
        let hashes = BlockHash::parse_list(&request.block_hashes)?;
        let ttl_ms = wire::clamp_ttl_ms(request.ttl_ms);
        let space = SpaceId::try_from(request.space_id.as_ref())?;
        session.require_space(&space)?;
        let parent = wire::parse_parent(&request.parent_hash)?;
        let event = Event::Reserve { session: id, space, parent, hashes: &hashes, ttl_ms };
        let reply = self.engine.apply(event).map_err(refused)?;
        let Reply::Reserved { reservation, grants } = reply else {
            return Err(unexpected());
        };
        let grant = |grant| match grant {
            Grant::Granted => pb::Grant::Granted,
            Grant::AlreadyStored => pb::Grant::AlreadyStored,
            Grant::NoSpace => pb::Grant::NoSpace,
            Grant::ParentMissing => pb::Grant::ParentMissing,
        };
        let packed = runs(&grants).map(|(count, run)| pb::GrantRun { count, grant: grant(run).into() });
        self.metrics.observe("reserve", started);
        Ok(pb::ReserveResponse {
            reservation_id: reservation.map_or(0, |reservation| reservation.0),
            grants: packed.collect(),
            ttl_ms,
        })
    }

    /// Clients say what they read in shared memory and by RDMA; nothing but counters depends on it.
    pub(crate) fn copied(&self, shm_bytes: u64, rdma_bytes: u64) {
        self.metrics.sent(WireKind::Shm, shm_bytes.min(MAX_COPIED_BYTES));
        self.metrics.sent(WireKind::Rdma, rdma_bytes.min(MAX_COPIED_BYTES));
    }

    pub(crate) fn release(&self, session: SessionId, leases: &[u64]) -> Result<(), Status> {
        if leases.len() > limits::MAX_BLOCKS_PER_REQUEST {
            let max = limits::MAX_BLOCKS_PER_REQUEST;
            return Err(Status::invalid_argument(format!("at most {max} leases")));
        }
        for lease in leases {
            self.engine.apply(Event::Release { session, lease: LeaseId(*lease) }).map_err(refused)?;
        }
        Ok(())
    }
}

/// A refusal as the caller sees it: the code says what to do, the text says why.
pub(crate) fn refused(refusal: Refusal) -> Status {
    let text = refusal.to_string();
    match refusal {
        Refusal::UnknownSession
        | Refusal::UnknownSpace
        | Refusal::UnknownLease
        | Refusal::UnknownReservation => Status::not_found(text),
        Refusal::FillInProgress | Refusal::OutsideLease { .. } | Refusal::BlockTooLarge { .. } => {
            Status::invalid_argument(text)
        }
        Refusal::TooMany { .. } => Status::resource_exhausted(text),
        Refusal::UnknownTenant(_) => Status::permission_denied(text),
    }
}

/// An answer of the wrong kind: a defect in this server.
pub(crate) fn unexpected() -> Status {
    Status::internal("the core gave an answer of the wrong kind")
}
