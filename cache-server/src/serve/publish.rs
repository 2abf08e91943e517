//! Receiving blocks: straight from the message into the reserved slot, checksum on the way, commit when both agree.

use super::{Context, refused};
use crate::engine::{Fill, FillBlock};
use cairn_core::{CommitOutcome, ReservationId, SessionId};
use cairn_proto::{Checksum, SpaceId, limits, pb};
use cairn_transfer::Incoming;
use futures::{Stream, StreamExt};
use pb::publish_chunk::Chunk;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;
use tonic::Status;

/// Runs one publish stream to its end. When it fails in the middle, what was committed stays and the rest is given up.
pub(crate) async fn receive(
    context: &Context,
    mut chunks: impl Stream<Item = Result<pb::PublishChunk, Status>> + Unpin,
) -> Result<pb::PublishResponse, Status> {
    let _transfer = context.transfers.token();
    // No reservation lasts longer, so nothing that comes later could be committed.
    let end = Instant::now() + Duration::from_millis(u64::from(limits::MAX_TTL_MS));
    let Some(Chunk::Header(header)) = next(context, end, &mut chunks).await? else {
        return Err(Status::invalid_argument("the first message of a publish must be its header"));
    };
    let names = (SessionId(header.session_id), ReservationId(header.reservation_id));
    let fill = context.engine.fill(names.0, names.1).map_err(refused)?;
    let mut receiver = Receiver::new(fill);
    while let Some(chunk) = next(context, end, &mut chunks).await? {
        let Chunk::Pieces(message) = chunk else {
            return Err(Status::invalid_argument("a publish has one header"));
        };
        for piece in &message.pieces {
            receiver.accept(piece)?;
        }
        for seal in &message.seals {
            receiver.seal(context, seal)?;
        }
    }
    Ok(receiver.finish())
}

async fn next(
    context: &Context,
    end: Instant,
    chunks: &mut (impl Stream<Item = Result<pb::PublishChunk, Status>> + Unpin),
) -> Result<Option<Chunk>, Status> {
    let deadline = end.min(Instant::now() + context.publish_idle);
    let message = tokio::time::timeout_at(deadline, chunks.next()).await;
    let message =
        message.map_err(|_| Status::deadline_exceeded("a publish paused or went on for too long"))?;
    match message.transpose()? {
        None => Ok(None),
        Some(pb::PublishChunk { chunk: Some(chunk) }) => Ok(Some(chunk)),
        Some(pb::PublishChunk { chunk: None }) => {
            Err(Status::invalid_argument("an empty message in a publish"))
        }
    }
}

struct Receiver {
    space: SpaceId,
    block_bytes: u64,
    open: BTreeMap<u32, (FillBlock, Incoming)>,
    commits: Vec<pb::BlockCommit>,
    /// Keeps the fill going until the stream ends.
    _fill: Fill,
}

impl Receiver {
    fn new(mut fill: Fill) -> Self {
        let blocks = std::mem::take(&mut fill.blocks).into_iter();
        let open = blocks.map(|block| {
            let incoming = Incoming::new(&fill.space, &block.hash);
            (block.block as u32, (block, incoming))
        });
        Self {
            space: fill.space,
            block_bytes: fill.block_bytes,
            open: open.collect(),
            commits: Vec::new(),
            _fill: fill,
        }
    }

    fn accept(&mut self, piece: &pb::BlockPiece) -> Result<(), Status> {
        let Some((block, incoming)) = self.open.get_mut(&piece.block) else {
            let text = format!("block {} was not granted, or is already sealed", piece.block);
            return Err(Status::invalid_argument(text));
        };
        let accepted = incoming.accept(piece.offset, &piece.data, &mut block.writer);
        accepted.map_err(|error| Status::invalid_argument(format!("block {}: {error}", piece.block)))
    }

    fn seal(&mut self, context: &Context, seal: &pb::BlockSeal) -> Result<(), Status> {
        let promised = Checksum::try_from(seal.checksum.as_ref())?;
        let Some((block, incoming)) = self.open.remove(&seal.block) else {
            let text = format!("block {} was not granted, or is already sealed", seal.block);
            return Err(Status::invalid_argument(text));
        };
        let commit = match incoming.finish(self.block_bytes) {
            None => pb::Commit::Incomplete,
            Some(found) if found != promised => {
                context.metrics.checksum_mismatches.inc();
                tracing::warn!(space = ?self.space, hash = ?block.hash, "published bytes do not match their checksum");
                pb::Commit::ChecksumMismatch
            }
            Some(found) => match block.commit(found) {
                CommitOutcome::Committed => {
                    context.metrics.published_bytes.inc_by(self.block_bytes);
                    pb::Commit::Committed
                }
                CommitOutcome::Duplicate => pb::Commit::Duplicate,
                // Nothing of this reservation can be committed any more; its room is wanted.
                CommitOutcome::Expired => return Err(Status::deadline_exceeded("the reservation ran out")),
                CommitOutcome::ParentMissing => pb::Commit::ParentMissing,
                CommitOutcome::NotReserved => return Err(super::unexpected()),
            },
        };
        self.commits.push(pb::BlockCommit { block: seal.block, commit: commit.into() });
        Ok(())
    }

    fn finish(mut self) -> pb::PublishResponse {
        let unsealed = self.open.keys();
        let incomplete =
            |block: &u32| pb::BlockCommit { block: *block, commit: pb::Commit::Incomplete.into() };
        self.commits.extend(unsealed.map(incomplete));
        pb::PublishResponse { commits: self.commits }
    }
}
