//! The gRPC services: parse at the door, one event into the core, pack the answer. No decision is made here.

mod admin;
mod cache;
mod fetch;
mod publish;
mod session;

pub(crate) use admin::AdminService;
pub(crate) use cache::CacheService;

use crate::engine::Engine;
use crate::metrics::Metrics;
use cairn_core::Refusal;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

/// What every handler shares.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) engine: Arc<Engine>,
    pub(crate) metrics: Metrics,
    pub(crate) draining: CancellationToken,
    /// Transfers in progress; shutdown waits for them.
    pub(crate) transfers: TaskTracker,
    pub(crate) max_sessions: usize,
    pub(crate) fetch_timeout: Duration,
    pub(crate) publish_idle: Duration,
}

impl Context {
    /// Refuses new work during shutdown.
    pub(crate) fn accepting(&self) -> Result<(), Status> {
        if self.draining.is_cancelled() {
            return Err(Status::unavailable("the server is shutting down"));
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
