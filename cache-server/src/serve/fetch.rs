//! Sending blocks. The stream is pulled by the connection; a client that stops reading loses its blocks at the deadline,
//! so that it cannot hold memory in place for ever.

use super::{Context, refused};
use crate::engine::Read;
use bytes::Bytes;
use cairn_core::{LeaseId, SessionId};
use cairn_proto::{limits, pb};
use cairn_transfer::{Pack, pack};
use futures::Stream;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::Status;

type Blocks = Box<dyn Iterator<Item = (u32, Bytes)> + Send>;

pub(crate) fn stream(context: &Context, request: &pb::FetchRequest) -> Result<FetchStream, Status> {
    let (first, count) = (request.first as usize, request.count as usize);
    if count > limits::MAX_BLOCKS_PER_REQUEST {
        return Err(Status::invalid_argument(format!("at most {} blocks", limits::MAX_BLOCKS_PER_REQUEST)));
    }
    let names = (SessionId(request.session_id), LeaseId(request.lease_id));
    let read = context.engine.read(names, first, count).map_err(refused)?;
    let state = Arc::new(Mutex::new(State::Sending(pack(owned(read, request.first)))));
    let revoke = {
        let (state, timeout) = (state.clone(), context.fetch_timeout);
        tokio::spawn(async move {
            tokio::time::sleep(timeout).await;
            let old = std::mem::replace(&mut *lock(&state), State::Revoked);
            drop(old);
        })
    };
    Ok(FetchStream {
        state,
        started: Instant::now(),
        context: context.clone(),
        _revoke: AbortOnDropHandle::new(revoke),
        _transfer: context.transfers.token(),
    })
}

/// The blocks as reference-counted bytes: each keeps the read alive until it is sent or dropped.
fn owned(read: Read, first: u32) -> Blocks {
    let blocks = read.blocks.into_iter().enumerate();
    Box::new(blocks.map(move |(i, block)| (first + i as u32, Bytes::from_owner(block.bytes))))
}

enum State {
    Sending(Pack<Blocks>),
    Revoked,
}

pub(crate) struct FetchStream {
    state: Arc<Mutex<State>>,
    started: Instant,
    context: Context,
    _revoke: AbortOnDropHandle<()>,
    _transfer: TaskTrackerToken,
}

impl Stream for FetchStream {
    type Item = Result<pb::FetchChunk, Status>;

    fn poll_next(self: Pin<&mut Self>, _: &mut std::task::Context<'_>) -> Poll<Option<Self::Item>> {
        let item = match &mut *lock(&self.state) {
            State::Revoked => {
                Some(Err(Status::deadline_exceeded("the fetch took too long; its blocks are released")))
            }
            State::Sending(chunks) => chunks.next().map(|pieces| Ok(pb::FetchChunk { pieces })),
        };
        if let Some(Ok(chunk)) = &item {
            let bytes: usize = chunk.pieces.iter().map(|piece| piece.data.len()).sum();
            self.context.metrics.fetched_bytes.inc_by(bytes as u64);
        }
        Poll::Ready(item)
    }
}

impl Drop for FetchStream {
    fn drop(&mut self) {
        self.context.metrics.observe("fetch", self.started);
    }
}

/// The state is replaced whole, so a panic elsewhere cannot have left half of it.
fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
