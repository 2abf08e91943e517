//! Bringing leased blocks into the caller's memory, verified, over whatever wire works.

use crate::client::{CacheClient, reason, until};
use crate::connection::Connection;
use crate::lease::Lease;
use crate::lookup::Run;
use cairn_proto::{MissReason, Outcome, pb};
use cairn_transfer::{Arrival, Arrivals, FetchJob, Progress, Promise, WireKind};
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tonic::{Code, Status};

/// The server reads the block once to check it.
const REPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// What became of the blocks of a fetch, and how they came.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// One for each target.
    pub outcomes: Vec<Outcome>,
    /// The wire that was used last; `None` when there was none to use.
    pub wire: Option<WireKind>,
}

impl Deref for Fetched {
    type Target = [Outcome];

    fn deref(&self) -> &[Outcome] {
        &self.outcomes
    }
}

impl Fetched {
    pub(crate) fn missed(count: usize, reason: MissReason) -> Self {
        Self { outcomes: vec![Outcome::Miss(reason); count], wire: None }
    }
}

impl CacheClient {
    /// Reads blocks `first..first + targets.len()` of the run, each into its target, which must have exactly the size of
    /// a block. A target's bytes may be used only if its outcome is a hit; otherwise they are unspecified.
    ///
    /// # Panics
    /// When a target has the wrong size or the positions are outside the run.
    pub async fn fetch<T: AsMut<[u8]>>(&self, run: &Run, first: usize, targets: &mut [T]) -> Fetched {
        self.fetch_until(run, first, targets, (self.fetch_deadline(), None)).await
    }

    /// As [`Self::fetch`], layer by layer where the wire can (QUIC): layer 0 of all blocks before layer 1 of any. `arrived` is called
    /// once for each layer of each block, in the order of its layers, with the block's position in the run, the layer and its bytes. So a
    /// model can begin with its first layer while the last is on its way; but only the outcome says whether a block is right, so nothing that was computed from
    /// it may leave before that. If a wire fails in the middle, layers that were reported are not reported again when the block comes over
    /// the next one.
    ///
    /// # Panics
    /// As [`Self::fetch`].
    pub async fn fetch_layers<T: AsMut<[u8]>>(
        &self,
        run: &Run,
        first: usize,
        targets: &mut [T],
        arrived: &mut (dyn FnMut(usize, usize, &[u8]) + Send),
    ) -> Fetched {
        let layers = run.space.layout().layers() as u64;
        let layer_bytes = run.space.block_bytes() / layers;
        let mut told = vec![0; targets.len()];
        let mut watch = |block: usize, bytes: &[u8]| {
            let whole = bytes.len() / layer_bytes as usize;
            for layer in told[block - first]..whole {
                let start = layer * layer_bytes as usize;
                arrived(block, layer, &bytes[start..start + layer_bytes as usize]);
            }
            told[block - first] = whole.max(told[block - first]);
        };
        let watch = Some((layer_bytes, &mut watch as Progress<'_>));
        self.fetch_until(run, first, targets, (self.fetch_deadline(), watch)).await
    }

    pub(crate) fn fetch_deadline(&self) -> Instant {
        Instant::now() + self.options().fetch_timeout
    }

    pub(crate) async fn fetch_until<T: AsMut<[u8]>>(
        &self,
        run: &Run,
        first: usize,
        targets: &mut [T],
        (deadline, watch): (Instant, Option<(u64, Progress<'_>)>),
    ) -> Fetched {
        let count = targets.len();
        assert!(first + count <= run.len(), "positions outside the run");
        let targets: Vec<&mut [u8]> = targets.iter_mut().map(AsMut::as_mut).collect();
        let right = targets.iter().all(|target| target.len() as u64 == run.space.block_bytes());
        assert!(right, "a target must have the size of a block");
        let connection = match self.connection(deadline).await {
            Ok(connection) if connection.session == run.lease.session() => connection,
            Ok(_) => return Fetched::missed(count, MissReason::LeaseLost),
            Err(reason) => return Fetched::missed(count, reason),
        };
        let mut arrivals = Arrivals::new(promise(run), first, targets);
        let mut range_bytes = 0;
        if let Some((bytes, progress)) = watch {
            range_bytes = bytes;
            arrivals = arrivals.watched(progress);
        }
        let (wire, missing) = bring(&connection, run, range_bytes, &mut arrivals, deadline).await;
        Fetched { outcomes: outcomes(&connection, run, first, &arrivals, missing), wire }
    }
}

/// What became of blocks from `first` on, and why those are missing that nothing is known of. Reports corrupt ones.
pub(crate) fn outcomes(
    connection: &Connection,
    run: &Run,
    first: usize,
    arrivals: &Arrivals<'_>,
    missing: MissReason,
) -> Vec<Outcome> {
    let outcome = |(i, found): (usize, &Option<Arrival>)| match found {
        Some(Arrival::Whole) => Outcome::Hit(run.tiers[first + i]),
        Some(Arrival::Lost(reason)) => Outcome::Miss(*reason),
        // Its slot may have been given to another block before it was read.
        Some(Arrival::Corrupt) if run.lease.remaining().is_zero() => Outcome::Miss(MissReason::LeaseLost),
        Some(Arrival::Corrupt) => {
            tracing::warn!(hash = ?run.hashes[first + i], "a fetched block is corrupt");
            report(connection, run.lease.clone(), (first + i) as u32);
            Outcome::Corrupt
        }
        None => Outcome::Miss(missing),
    };
    arrivals.found().iter().enumerate().map(outcome).collect()
}

pub(crate) fn promise(run: &Run) -> Promise<'_> {
    Promise {
        space: run.space.id(),
        block_bytes: run.space.block_bytes(),
        hashes: &run.hashes,
        checksums: &run.checksums,
    }
}

/// Tries one wire after the other until every block is decided. Says which was the last, and why what is missing is.
pub(crate) async fn bring(
    connection: &Connection,
    run: &Run,
    range_bytes: u64,
    arrivals: &mut Arrivals<'_>,
    deadline: Instant,
) -> (Option<WireKind>, MissReason) {
    let (mut last, mut missing) = (None, MissReason::PeerDown);
    let mut wires = connection.wires.order().into_iter().peekable();
    while let Some(wire) = wires.next() {
        last = Some(wire.kind());
        let until = patience(deadline, wires.peek().is_none());
        let before = whole(arrivals);
        let mut result = Ok(());
        while let (Ok(()), Some(blocks)) = (&result, arrivals.undecided()) {
            let (session, lease) = (connection.session, run.lease.id());
            // What a lookup said holds as long as the lease does.
            let locations =
                if run.lease.remaining().is_zero() { Arc::from([]) } else { run.locations.clone() };
            let job = FetchJob { session, lease, blocks, locations, range_bytes };
            result = match tokio::time::timeout_at(until, wire.fetch(&job, arrivals)).await {
                Ok(Ok(())) if arrivals.undecided() == Some(job.blocks) => {
                    Err(Status::internal("the server says nothing about blocks that were asked for"))
                }
                Ok(result) => result,
                Err(_) => Err(Status::deadline_exceeded("the bytes did not arrive in time")),
            };
        }
        let bytes = (whole(arrivals) - before) * run.space.block_bytes();
        connection.wires.came(wire.kind(), bytes);
        let Err(status) = result else {
            connection.wires.worked(wire.kind(), bytes);
            return (last, missing);
        };
        tracing::debug!(wire = wire.kind().name(), error = status.message(), "a fetch ended early");
        missing = reason(&status);
        match fault(&status) {
            Fault::Final => return (last, missing),
            Fault::Busy => {}
            Fault::Wire => connection.wires.failed(wire.kind(), &status),
        }
    }
    (last, missing)
}

pub(crate) fn whole(arrivals: &Arrivals<'_>) -> u64 {
    arrivals.found().iter().filter(|found| **found == Some(Arrival::Whole)).count() as u64
}

/// Whose fault an error is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The server's last word, on whatever wire.
    Final,
    /// This wire has no room at the moment; another may.
    Busy,
    /// Something is wrong with the wire.
    Wire,
}

pub(crate) fn fault(status: &Status) -> Fault {
    match status.code() {
        Code::NotFound
        | Code::InvalidArgument
        | Code::PermissionDenied
        | Code::OutOfRange
        | Code::FailedPrecondition => Fault::Final,
        Code::ResourceExhausted => Fault::Busy,
        _ => Fault::Wire,
    }
}

/// When to give up on a wire: one that stalls must leave time for the next.
pub(crate) fn patience(deadline: Instant, is_last: bool) -> Instant {
    let now = Instant::now();
    if is_last { deadline } else { now + deadline.saturating_duration_since(now) / 2 }
}

/// Tells the server in the background: the caller has its outcome already.
pub(crate) fn report(connection: &Connection, lease: Arc<Lease>, block: u32) {
    // Views are read on any thread.
    let runtime = connection.runtime.clone();
    let mut grpc = connection.grpc.clone();
    let request = pb::ReportCorruptRequest { session_id: connection.session, lease_id: lease.id(), block };
    runtime.spawn(async move {
        let answer = until(Instant::now() + REPORT_TIMEOUT, grpc.report_corrupt(request)).await;
        drop(lease);
        if let Err(status) = answer {
            tracing::debug!(error = status.message(), "a corrupt block could not be reported");
        }
    });
}
