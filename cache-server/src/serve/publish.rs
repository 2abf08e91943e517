//! Receiving blocks: straight from the message into the reserved slot, checksum on the way, commit when both agree.

use super::Context;
use crate::auth::{Identity, Right};
use cairn_proto::{limits, pb};
use cairn_transfer::{Receiving, Store, WireKind};
use futures::{Stream, StreamExt};
use pb::publish_chunk::Chunk;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tonic::Status;

/// Runs one publish stream to its end. When it fails in the middle, what was committed stays and the rest is given up.
pub(crate) async fn receive(
    context: &Context,
    identity: &Identity,
    mut chunks: impl Stream<Item = Result<pb::PublishChunk, Status>> + Unpin,
) -> Result<pb::PublishResponse, Status> {
    let _transfer = context.transfers.token();
    // No reservation lasts longer, so nothing that comes later could be committed.
    let end = Instant::now() + Duration::from_millis(u64::from(limits::MAX_TTL_MS));
    let Some(Chunk::Header(header)) = next(context, end, &mut chunks).await? else {
        return Err(Status::invalid_argument("the first message of a publish must be its header"));
    };
    context.sessions.authorize(header.session_id, identity, Right::Publish)?;
    let store: Arc<dyn Store> = Arc::new(context.clone());
    let filling = store.fill(WireKind::Grpc, header.session_id, header.reservation_id)?;
    let mut receiver = Receiving::new(store, filling);
    while let Some(chunk) = next(context, end, &mut chunks).await? {
        let Chunk::Pieces(message) = chunk else {
            return Err(Status::invalid_argument("a publish has one header"));
        };
        for piece in &message.pieces {
            receiver.accept(piece)?;
        }
        for seal in &message.seals {
            receiver.seal(seal)?;
        }
    }
    Ok(receiver.finish())
}

async fn next(
    context: &Context,
    end: Instant,
    chunks: &mut (impl Stream<Item = Result<pb::PublishChunk, Status>> + Unpin),
) -> Result<Option<Chunk>, Status> {
    let deadline = end.min(Instant::now() + context.limits.idle_timeout);
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
