//! The right to read a run of blocks, released when dropped.

use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;

#[derive(Clone, Copy, Debug)]
pub(crate) struct Release {
    pub(crate) session: u64,
    pub(crate) lease: u64,
}

/// While it lives, and before its deadline, the server keeps the leased blocks.
#[derive(Debug)]
pub struct Lease {
    release: Release,
    deadline: Instant,
    releases: mpsc::Sender<Release>,
}

impl Lease {
    pub(crate) fn new(session: u64, lease: u64, ttl: Duration, releases: mpsc::Sender<Release>) -> Self {
        Self { release: Release { session, lease }, deadline: Instant::now() + ttl, releases }
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
        // If the queue is full the lease ends by its deadline instead.
        let _ = self.releases.try_send(self.release);
    }
}
