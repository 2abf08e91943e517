//! Offering blocks to the cache.

use crate::client::{CacheClient, reason, until};
use crate::connection::Connection;
use bytes::Bytes;
use cairn_proto::{BlockHash, Checksum, KeySpace, MissReason, pb, wire};
use cairn_transfer::pack;
use pb::publish_chunk::Chunk;
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
        let hashes: Vec<BlockHash> = blocks.iter().map(|block| block.hash).collect();
        let request = pb::ReserveRequest {
            session_id: connection.session,
            space_id: space.id().0.to_vec().into(),
            parent_hash: parent.map(|hash| hash.0.to_vec()).unwrap_or_default().into(),
            block_hashes: BlockHash::concat(&hashes),
            ttl_ms: u32::try_from(self.options().publish_timeout.as_millis()).unwrap_or(u32::MAX),
        };
        let failed = |status: Status| {
            tracing::debug!(error = status.message(), "a publish failed");
            reason(&status)
        };
        let answer = until(deadline, connection.grpc.clone().reserve(request)).await.map_err(failed)?;
        let grants =
            wire::parse_grants(&answer.grants, blocks.len()).map_err(|error| failed(error.into()))?;
        let mut granted = Vec::new();
        for (position, grant) in grants.iter().enumerate() {
            stored[position] = match grant {
                pb::Grant::AlreadyStored => Stored::AlreadyStored,
                pb::Grant::NoSpace => Stored::NoSpace,
                pb::Grant::ParentMissing => Stored::ParentMissing,
                pb::Grant::Granted | pb::Grant::Unspecified => {
                    granted.push((position as u32, blocks[position].clone()));
                    Stored::Failed(MissReason::PeerDown)
                }
            };
        }
        if granted.is_empty() {
            return Ok(());
        }
        let commits = send(&connection, answer.reservation_id, granted, deadline).await.map_err(failed)?;
        for commit in commits {
            if let Some(place) = stored.get_mut(commit.block as usize) {
                *place = outcome(commit.commit());
            }
        }
        Ok(())
    }
}

async fn send(
    connection: &Connection,
    reservation_id: u64,
    granted: Vec<(u32, Block)>,
    deadline: Instant,
) -> Result<Vec<pb::BlockCommit>, Status> {
    let header = pb::PublishHeader { session_id: connection.session, reservation_id };
    let sums: Vec<(u32, usize, Checksum)> =
        granted.iter().map(|(position, block)| (*position, block.bytes.len(), block.checksum)).collect();
    let mut sums = sums.into_iter().peekable();
    let pieces = pack(granted.into_iter().map(|(position, block)| (position, block.bytes)));
    let messages = pieces.map(move |pieces| {
        let ended = |piece: &pb::BlockPiece| {
            let end = piece.offset as usize + piece.data.len();
            let (position, _, checksum) =
                sums.next_if(|(position, len, _)| *position == piece.block && *len == end)?;
            Some(pb::BlockSeal { block: position, checksum: checksum.0.to_vec().into() })
        };
        let seals = pieces.iter().filter_map(ended).collect();
        Chunk::Pieces(pb::PublishPieces { pieces, seals })
    });
    let messages = std::iter::once(Chunk::Header(header)).chain(messages);
    let messages = messages.map(|chunk| pb::PublishChunk { chunk: Some(chunk) });
    let mut grpc = connection.grpc.clone();
    let answer = until(deadline, grpc.publish(tokio_stream::iter(messages))).await?;
    Ok(answer.commits)
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
