//! Sending blocks. The stream is pulled by the connection; a client that stops reading loses its blocks at the deadline,
//! so that it cannot hold memory in place for ever. Blocks on devices are brought ahead of their turn, a bounded number of bytes
//! at a time: the tail of a run is read while its head is sent.

use super::{Context, refused};
use crate::engine::{Engine, Read, ReadBlock, brought};
use crate::tiers::SlotBytes;
use bytes::Bytes;
use cairn_core::{LeaseId, SessionId};
use cairn_proto::{MissReason, limits, pb};
use cairn_transfer::store::Brought;
use cairn_transfer::{WireKind, pack};
use futures::{Stream, StreamExt, stream};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Poll, Waker};
use std::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tonic::Status;

/// Bytes of one fetch that are brought ahead from devices.
const AHEAD_BYTES: u64 = 32 << 20;

/// Blocks of one fetch that are brought ahead, however small.
const AHEAD_BLOCKS: u64 = 32;

type Chunks = Pin<Box<dyn Stream<Item = pb::FetchChunk> + Send>>;

/// Leased blocks, held in place.
pub(crate) fn begin(
    context: &Context,
    names: (SessionId, LeaseId),
    first: usize,
    count: usize,
) -> Result<Read, Status> {
    if count > limits::MAX_BLOCKS_PER_REQUEST {
        return Err(Status::invalid_argument(format!("at most {} blocks", limits::MAX_BLOCKS_PER_REQUEST)));
    }
    context.engine.read(names, first, count).map_err(refused)
}

pub(crate) fn stream(context: &Context, request: &pb::FetchRequest) -> Result<FetchStream, Status> {
    let names = (SessionId(request.session_id), LeaseId(request.lease_id));
    let read = begin(context, names, request.first as usize, request.count as usize)?;
    context.metrics.fetch_started(WireKind::Grpc);
    let state = Arc::new(Mutex::new(State { chunks: Some(chunks(&context.engine, read)), waker: None }));
    let revoke = {
        let (state, timeout) = (state.clone(), context.limits.fetch_timeout);
        tokio::spawn(async move {
            tokio::time::sleep(timeout).await;
            let (old, waker) = {
                let mut state = lock(&state);
                (state.chunks.take(), state.waker.take())
            };
            drop(old);
            waker.into_iter().for_each(Waker::wake);
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

/// The messages of a fetch. Each block keeps the read alive until it is sent or dropped.
fn chunks(engine: &Arc<Engine>, read: Read) -> Chunks {
    if read.blocks.iter().all(|block| block.bytes.is_some()) {
        let block = |block: ReadBlock| Some((block.position, Bytes::from_owner(block.bytes?)));
        let blocks: Vec<_> = read.blocks.into_iter().filter_map(block).collect();
        return Box::pin(stream::iter(
            pack(blocks.into_iter()).map(|pieces| pb::FetchChunk { pieces, losses: Vec::new() }),
        ));
    }
    let messages = |(block, brought): (u32, Result<Brought, MissReason>)| {
        stream::iter(messages(block, brought.map(|brought| brought.bytes)))
    };
    Box::pin(blocks(engine, read).flat_map(messages))
}

/// The blocks of a read in order, those on devices brought ahead.
pub(crate) fn blocks(
    engine: &Arc<Engine>,
    read: Read,
) -> impl Stream<Item = (u32, Result<Brought, MissReason>)> + Send + use<> {
    let source = read.source();
    let ahead = (AHEAD_BYTES / source.block_bytes().max(1)).clamp(1, AHEAD_BLOCKS) as usize;
    let engine = engine.clone();
    let blocks = read.blocks.into_iter().map(|block| (block.position, block.bytes));
    let bring = move |(position, bytes): (u32, Option<SlotBytes>)| {
        let (engine, source) = (engine.clone(), source.clone());
        async move {
            let block = match bytes {
                Some(bytes) => Ok(brought(bytes)),
                None => engine.bring(&source, position as usize).await,
            };
            (position, block)
        }
    };
    stream::iter(blocks).map(bring).buffered(ahead)
}

fn messages(block: u32, bytes: Result<Bytes, MissReason>) -> Vec<pb::FetchChunk> {
    match bytes {
        Ok(bytes) => {
            let pieces = pack(std::iter::once((block, bytes)));
            pieces.map(|pieces| pb::FetchChunk { pieces, losses: Vec::new() }).collect()
        }
        Err(reason) => {
            let loss = pb::BlockLoss { block, reason: pb::MissReason::from(reason).into() };
            vec![pb::FetchChunk { pieces: Vec::new(), losses: vec![loss] }]
        }
    }
}

/// One block of a lease, wherever it is.
pub(crate) async fn block_bytes(engine: &Arc<Engine>, read: Read) -> Result<Bytes, MissReason> {
    let (source, first) = (read.source(), read.first);
    match read.blocks.into_iter().next() {
        Some(ReadBlock { bytes: Some(bytes), .. }) => Ok(Bytes::from_owner(bytes)),
        _ => engine.bring(&source, first).await.map(|brought| brought.bytes),
    }
}

struct State {
    /// `None` once the blocks were taken away.
    chunks: Option<Chunks>,
    /// Who waits for the next message.
    waker: Option<Waker>,
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

    fn poll_next(self: Pin<&mut Self>, task: &mut std::task::Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = lock(&self.state);
        let item = match &mut state.chunks {
            None => Some(Err(Status::deadline_exceeded("the fetch took too long; its blocks are released"))),
            Some(chunks) => match chunks.as_mut().poll_next(task) {
                Poll::Ready(chunk) => chunk.map(Ok),
                Poll::Pending => {
                    state.waker = Some(task.waker().clone());
                    return Poll::Pending;
                }
            },
        };
        if let Some(Ok(chunk)) = &item {
            let bytes: usize = chunk.pieces.iter().map(|piece| piece.data.len()).sum();
            self.context.metrics.sent(WireKind::Grpc, bytes as u64);
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
