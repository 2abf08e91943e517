//! Offering blocks to the cache.

use crate::client::{CacheClient, reason, until};
use crate::connection::Connection;
use crate::fetch::{Fault, fault, patience};
use bytes::Bytes;
use cairn_proto::{BlockHash, Checksum, KeySpace, MissReason, pb, wire};
use cairn_transfer::{Offer, PublishJob};
use tokio::time::Instant;
use tonic::Status;

/// A block to publish.
#[derive(Clone, Debug)]
pub struct Block {
    /// Its name.
    pub hash: BlockHash,
    /// Its bytes, in canonical layout.
    pub bytes: Bytes,
    /// Made where the bytes were produced, so that whatever happens to them later is noticed.
    pub checksum: Checksum,
}

/// What became of a block that was offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stored {
    /// It is in the cache now.
    Committed,
    /// It was there before, or another copy came first.
    AlreadyStored,
    /// No room at the moment.
    NoSpace,
    /// The block before it is not in the cache.
    ParentMissing,
    /// The bytes do not match their checksum.
    Corrupt,
    /// The request failed; it may or may not be in the cache.
    Failed(MissReason),
}

impl Stored {
    /// Whether the block is in the cache.
    pub const fn is_stored(self) -> bool {
        matches!(self, Self::Committed | Self::AlreadyStored)
    }
}

impl CacheClient {
    /// Publishes consecutive blocks of one chain; `parent` is the block before the first. Only bytes that the server
    /// lacks are sent. Offer at most [`cairn_proto::limits::MAX_BLOCKS_PER_REQUEST`] at a time.
    pub async fn publish(
        &self,
        space: &KeySpace,
        parent: Option<BlockHash>,
        blocks: &[Block],
    ) -> Vec<Stored> {
        if blocks.is_empty() {
            return Vec::new();
        }
        let mut stored = vec![Stored::Failed(MissReason::PeerDown); blocks.len()];
        if let Err(reason) = self.try_publish(space, parent, blocks, &mut stored).await {
            for open in stored.iter_mut().filter(|s| matches!(s, Stored::Failed(_))) {
                *open = Stored::Failed(reason);
            }
        }
        stored
    }

    async fn try_publish(
        &self,
        space: &KeySpace,
        parent: Option<BlockHash>,
        blocks: &[Block],
        stored: &mut [Stored],
    ) -> Result<(), MissReason> {
        let (connection, deadline) = self.connection_for(space, self.options().publish_timeout).await?;
        let mut wires = connection.wires.order().into_iter().peekable();
        while let Some(wire) = wires.next() {
            let Some(job) = reserve(&connection, space, (parent, blocks), stored, deadline).await? else {
                return Ok(());
            };
            let until = patience(deadline, wires.peek().is_none());
            let sent = match tokio::time::timeout_at(until, wire.publish(&job)).await {
                Ok(sent) => sent,
                Err(_) => Err(Status::deadline_exceeded("the blocks were not taken in time")),
            };
            match sent {
                Ok(commits) => {
                    for commit in commits {
                        if let Some(place) = stored.get_mut(commit.block as usize) {
                            *place = outcome(commit.commit());
                        }
                    }
                    let bytes: usize = job.blocks.iter().map(|offer| offer.bytes.len()).sum();
                    connection.wires.worked(wire.kind(), bytes as u64);
                    return Ok(());
                }
                Err(status) => {
                    if fault(&status) == Fault::Wire {
                        connection.wires.failed(wire.kind(), &status);
                    }
                    if fault(&status) == Fault::Final || wires.peek().is_none() {
                        return Err(failed(&status));
                    }
                    // What arrived is stored, the rest is reserved anew.
                }
            }
        }
        Err(MissReason::PeerDown)
    }
}

fn failed(status: &Status) -> MissReason {
    tracing::debug!(error = status.message(), "a publish failed");
    reason(status)
}

/// Over the best wire if it can, else as a call.
async fn ask(
    connection: &Connection,
    request: pb::ReserveRequest,
    deadline: Instant,
) -> Result<pb::ReserveResponse, Status> {
    if let Some(wire) = connection.wires.order().first()
        && let Some(answer) = wire.reserve(&request)
        && let Some(answer) = connection.wires.ask(wire.kind(), answer, deadline).await?
    {
        return Ok(answer);
    }
    until(deadline, connection.grpc.clone().reserve(request)).await
}

/// Room for what is not stored yet; `None` when there is nothing to send.
async fn reserve(
    connection: &Connection,
    space: &KeySpace,
    (parent, blocks): (Option<BlockHash>, &[Block]),
    stored: &mut [Stored],
    deadline: Instant,
) -> Result<Option<PublishJob>, MissReason> {
    let hashes: Vec<BlockHash> = blocks.iter().map(|block| block.hash).collect();
    let left = deadline.saturating_duration_since(Instant::now());
    let request = pb::ReserveRequest {
        session_id: connection.session,
        space_id: space.id().0.to_vec().into(),
        parent_hash: parent.map(|hash| hash.0.to_vec()).unwrap_or_default().into(),
        block_hashes: BlockHash::concat(&hashes),
        ttl_ms: u32::try_from(left.as_millis()).unwrap_or(u32::MAX).max(1),
    };
    let answer = ask(connection, request, deadline).await;
    let answer = answer.map_err(|status| failed(&status))?;
    let grants = wire::parse_grants(&answer.grants, blocks.len());
    let grants = grants.map_err(|error| failed(&error.into()))?;
    let mut granted = Vec::new();
    for (position, grant) in grants.iter().enumerate() {
        let block = &blocks[position];
        stored[position] = match grant {
            pb::Grant::AlreadyStored => Stored::AlreadyStored,
            pb::Grant::NoSpace => Stored::NoSpace,
            pb::Grant::ParentMissing => Stored::ParentMissing,
            pb::Grant::Granted | pb::Grant::Unspecified => {
                let Block { hash, bytes, checksum } = block.clone();
                granted.push(Offer { position: position as u32, hash, bytes, checksum });
                Stored::Failed(MissReason::PeerDown)
            }
        };
    }
    let (session, reservation) = (connection.session, answer.reservation_id);
    let job = PublishJob { session, reservation, space: space.id(), blocks: granted };
    Ok((!job.blocks.is_empty()).then_some(job))
}

fn outcome(commit: pb::Commit) -> Stored {
    match commit {
        pb::Commit::Committed => Stored::Committed,
        pb::Commit::Duplicate => Stored::AlreadyStored,
        pb::Commit::ChecksumMismatch => Stored::Corrupt,
        pb::Commit::ParentMissing => Stored::ParentMissing,
        pb::Commit::Incomplete | pb::Commit::Expired => Stored::Failed(MissReason::Expired),
        pb::Commit::Unspecified => Stored::Failed(MissReason::PeerDown),
    }
}
