//! Bringing leased blocks into the caller's memory, verified.

use crate::client::{CacheClient, reason, until};
use crate::connection::Connection;
use crate::lease::Lease;
use crate::lookup::Run;
use cairn_proto::{MissReason, Outcome, pb};
use cairn_transfer::Incoming;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tonic::Status;

/// The server reads the block once to check it.
const REPORT_TIMEOUT: Duration = Duration::from_secs(10);

impl CacheClient {
    /// Reads blocks `first..first + targets.len()` of the run, each into its target, which must have exactly the size of
    /// a block. A target's bytes may be used only if its outcome is a hit; otherwise they are unspecified.
    ///
    /// # Panics
    /// When a target has the wrong size or the positions are outside the run.
    pub async fn fetch<T: AsMut<[u8]>>(&self, run: &Run, first: usize, targets: &mut [T]) -> Vec<Outcome> {
        assert!(first + targets.len() <= run.len(), "positions outside the run");
        for target in targets.iter_mut() {
            let len = target.as_mut().len() as u64;
            assert_eq!(len, run.space.block_bytes(), "a target must have the size of a block");
        }
        let deadline = Instant::now() + self.options().fetch_timeout;
        let mut outcomes = vec![Outcome::Miss(MissReason::PeerDown); targets.len()];
        let connection = match self.connection(deadline).await {
            Ok(connection) if connection.session == run.lease.session() => connection,
            Ok(_) => return vec![Outcome::Miss(MissReason::LeaseLost); targets.len()],
            Err(reason) => return vec![Outcome::Miss(reason); targets.len()],
        };
        let receiver = Receiver { run, first, targets, outcomes: &mut outcomes };
        if let Err(status) = receiver.run(&connection, deadline).await {
            tracing::debug!(error = status.message(), "a fetch ended early");
            let missing = Outcome::Miss(reason(&status));
            for outcome in outcomes.iter_mut().filter(|o| **o == Outcome::Miss(MissReason::PeerDown)) {
                *outcome = missing;
            }
        }
        outcomes
    }
}

struct Receiver<'a, T> {
    run: &'a Run,
    first: usize,
    targets: &'a mut [T],
    outcomes: &'a mut [Outcome],
}

impl<T: AsMut<[u8]>> Receiver<'_, T> {
    async fn run(mut self, connection: &Connection, deadline: Instant) -> Result<(), Status> {
        let request = pb::FetchRequest {
            session_id: connection.session,
            lease_id: self.run.lease.id(),
            first: self.first as u32,
            count: self.targets.len() as u32,
        };
        let mut chunks = until(deadline, connection.grpc.clone().fetch(request)).await?;
        let mut open: Vec<Option<Incoming>> = (0..self.targets.len()).map(|_| None).collect();
        loop {
            let chunk = tokio::time::timeout_at(deadline, chunks.message()).await;
            let chunk =
                chunk.map_err(|_| Status::deadline_exceeded("the bytes did not arrive in time"))??;
            let Some(chunk) = chunk else { return Ok(()) };
            for piece in &chunk.pieces {
                if let Some(corrupt) = self.accept(piece, &mut open)? {
                    report(connection, self.run.lease.clone(), corrupt);
                }
            }
            for loss in &chunk.losses {
                let index = self.index(loss.block)?;
                self.outcomes[index] = Outcome::Miss(MissReason::try_from(loss.reason())?);
            }
        }
    }

    /// Where a block of the run is among the targets.
    fn index(&self, block: u32) -> Result<usize, Status> {
        let index = (block as usize).checked_sub(self.first).filter(|index| *index < self.targets.len());
        index.ok_or_else(|| Status::internal("a block that was not asked for"))
    }

    /// Stores one piece. Returns the position of a block that is complete and wrong.
    fn accept(
        &mut self,
        piece: &pb::BlockPiece,
        open: &mut [Option<Incoming>],
    ) -> Result<Option<u32>, Status> {
        let position = piece.block as usize;
        let index = self.index(piece.block)?;
        let target = self.targets[index].as_mut();
        let incoming = open[index]
            .get_or_insert_with(|| Incoming::new(&self.run.space.id(), &self.run.hashes[position]));
        let accepted = incoming.accept(piece.offset, &piece.data, target);
        accepted.map_err(|error| Status::internal(error.to_string()))?;
        let Some(found) = incoming.finish(self.run.space.block_bytes()) else {
            return Ok(None);
        };
        if found == self.run.checksums[position] {
            self.outcomes[index] = Outcome::Hit(self.run.tiers[position]);
            return Ok(None);
        }
        tracing::warn!(hash = ?self.run.hashes[position], "a fetched block is corrupt");
        self.outcomes[index] = Outcome::Corrupt;
        Ok(Some(piece.block))
    }
}

/// Tells the server in the background: the caller has its outcome already.
fn report(connection: &Connection, lease: Arc<Lease>, block: u32) {
    let mut grpc = connection.grpc.clone();
    let request = pb::ReportCorruptRequest { session_id: connection.session, lease_id: lease.id(), block };
    tokio::spawn(async move {
        let answer = until(Instant::now() + REPORT_TIMEOUT, grpc.report_corrupt(request)).await;
        drop(lease);
        if let Err(status) = answer {
            tracing::debug!(error = status.message(), "a corrupt block could not be reported");
        }
    });
}
