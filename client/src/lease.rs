//! The right to read a run of blocks, released when dropped.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Leases waiting to be released. When it is full a lease is left to its deadline.
const QUEUE: usize = 4096;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Release {
    pub(crate) session: u64,
    pub(crate) lease: u64,
}

/// Leases that ended here and not yet at the server. The next lookup takes them along; if none comes soon, a call of their own does.
#[derive(Debug, Default)]
pub(crate) struct Releases {
    queue: Mutex<Vec<Release>>,
    pub(crate) some: Notify,
}

impl Releases {
    fn push(&self, release: Release) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.len() < QUEUE {
            queue.push(release);
        }
        self.some.notify_one();
    }

    /// All of one session.
    pub(crate) fn take(&self, session: u64) -> Vec<u64> {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let ours = queue.extract_if(.., |release| release.session == session);
        ours.map(|release| release.lease).collect()
    }

    /// A request that took them along failed.
    pub(crate) fn put_back(&self, session: u64, leases: Vec<u64>) {
        leases.into_iter().for_each(|lease| self.push(Release { session, lease }));
    }

    /// Those of sessions that ended are of no use any more.
    pub(crate) fn forget_others(&self, session: u64) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.retain(|release| release.session == session);
    }
}

/// While it lives, and before its deadline, the server keeps the leased blocks.
#[derive(Debug)]
pub struct Lease {
    release: Release,
    deadline: Instant,
    releases: Arc<Releases>,
}

impl Lease {
    /// `asked` is when the request left: the server's own deadline is not before this one.
    pub(crate) fn new(
        session: u64,
        lease: u64,
        (asked, ttl): (Instant, Duration),
        releases: Arc<Releases>,
    ) -> Self {
        Self { release: Release { session, lease }, deadline: asked + ttl, releases }
    }

    pub(crate) fn id(&self) -> u64 {
        self.release.lease
    }

    pub(crate) fn session(&self) -> u64 {
        self.release.session
    }

    /// How long the blocks stay readable, as far as this client knows.
    pub fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.releases.push(self.release);
    }
}
