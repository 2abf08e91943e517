//! Blocks as frames on a byte stream: what TLS over TCP and QUIC's bidirectional streams have in common. One request at a time.

use crate::Arrivals;
use crate::frame::{Frame, Link, decode, kind, nonsense};
use crate::handshake;
use crate::located::Io;
use crate::rdma::RdmaServer;
use crate::store::{Reach, Receiving, Store};
use crate::wire::{FetchJob, PublishJob, WireKind};
use bytes::Bytes;
use cairn_proto::{MissReason, limits, pb};
use futures::StreamExt;
use prost::Message;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::Status;

/// No reservation lasts longer, so nothing that comes later could be committed.
pub(crate) const LONGEST_PUBLISH: Duration = Duration::from_millis(limits::MAX_TTL_MS as u64);

/// Of a block, in lists.
const CHECKSUM_BYTES: usize = 16;

/// Read at once of what nobody wants.
const DRAIN_BYTES: usize = 64 << 10;

/// The client's side of a fetch whose pieces come on the same stream.
pub(crate) async fn fetch<S: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<S>,
    job: &FetchJob,
    arrivals: &mut Arrivals<'_>,
) -> Result<(), Status> {
    link.send(kind::FETCH, &job.request()).await?;
    receive(link, arrivals).await
}

/// Pieces and losses until the end.
pub(crate) async fn receive<S: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<S>,
    arrivals: &mut Arrivals<'_>,
) -> Result<(), Status> {
    loop {
        match link.answer().await? {
            Frame::Piece { block, offset, len } => {
                link.fill(arrivals.room(block, offset, len)?).await?;
                arrivals.added(block, len)?;
            }
            Frame::Message(kind::LOST, body) => lost(arrivals, body)?,
            Frame::Message(kind::END, _) => return Ok(()),
            other => return Err(other.unexpected()),
        }
    }
}

pub(crate) fn lost(arrivals: &mut Arrivals<'_>, body: Bytes) -> Result<(), Status> {
    let loss: pb::BlockLoss = decode(body)?;
    arrivals.lost(loss.block, MissReason::try_from(loss.reason()).map_err(nonsense)?)
}

/// The client's side of a publish.
pub(crate) async fn publish<S: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<S>,
    job: &PublishJob,
) -> Result<Vec<pb::BlockCommit>, Status> {
    let sent = send_offers(link, job).await;
    // The server may have said why before it stopped reading.
    let answer = match (link.answer().await, sent) {
        (Ok(answer), _) => answer,
        (Err(_), Err(status)) | (Err(status), Ok(())) => return Err(status),
    };
    let response: pb::PublishResponse = answer.of_kind(kind::COMMITS)?;
    Ok(response.commits)
}

async fn send_offers<S: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<S>,
    job: &PublishJob,
) -> Result<(), Status> {
    link.push(kind::PUBLISH, &pb::PublishHeader { session_id: job.session, reservation_id: job.reservation });
    for offer in &job.blocks {
        send_block(link, offer.position, &offer.bytes).await?;
        let checksum = offer.checksum.0.to_vec().into();
        link.push(kind::SEAL, &pb::BlockSeal { block: offer.position, checksum });
    }
    link.send(kind::END, &()).await
}

/// All pieces of one block.
pub(crate) async fn send_block<S: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<S>,
    block: u32,
    bytes: &Bytes,
) -> Result<(), Status> {
    for start in (0..bytes.len()).step_by(limits::CHUNK_BYTES) {
        let end = bytes.len().min(start + limits::CHUNK_BYTES);
        link.piece(block, start as u64, bytes.slice(start..end)).await?;
    }
    Ok(())
}

/// Serves one authenticated connection until it or its session ends.
pub(crate) async fn serve<S: Io>(
    store: Arc<dyn Store>,
    io: S,
    rdma: Option<Arc<RdmaServer>>,
) -> Result<(), Status> {
    let mut link = Link::with_a_stranger(io);
    let (session, _place) = handshake::accept(&mut link, &*store).await?;
    tokio::select! {
        () = store.ended(session) => Ok(()),
        result = requests(&store, &mut link, rdma.as_deref(), session) => result,
    }
}

async fn requests<S: Io>(
    store: &Arc<dyn Store>,
    link: &mut Link<S>,
    rdma: Option<&RdmaServer>,
    session: u64,
) -> Result<(), Status> {
    let wire = WireKind::Tls;
    let idle = store.limits().idle_timeout;
    while let Some(frame) = link.request(idle).await? {
        match frame {
            Frame::Message(kind @ (kind::LOOKUP | kind::RESERVE), body) => {
                match within(idle, answer(store, link, session, (kind, body), false)).await {
                    Err(status) if is_refusal(&status) => link.fail(&status).await?,
                    result => result?,
                }
            }
            Frame::Message(kind::READ, body) => {
                let work = find_and_send(store, link, (wire, session), decode(body)?);
                match within(store.limits().fetch_timeout, work).await {
                    Err(status) if is_refusal(&status) => link.fail(&status).await?,
                    result => result?,
                }
            }
            Frame::Message(kind::FETCH, body) => {
                let request: pb::FetchRequest = decode(body)?;
                let timeout = store.limits().fetch_timeout;
                match within(timeout, send(store, link, wire, session, &request)).await {
                    Err(status) if is_refusal(&status) => link.fail(&status).await?,
                    result => result?,
                }
            }
            Frame::Message(kind::PUBLISH, body) => {
                let request: pb::PublishHeader = decode(body)?;
                match take(store, link, wire, (session, request.reservation_id)).await {
                    Ok(response) => link.send(kind::COMMITS, &response).await?,
                    Err(status) => {
                        link.fail(&status).await?;
                        if !is_refusal(&status) {
                            return Err(status);
                        }
                        // The client sends all it has before it looks. Where the next frame starts is known.
                        drain(link, store.limits().idle_timeout).await?;
                    }
                }
            }
            Frame::Message(kind::QUEUE_PAIR, _) => match rdma {
                Some(rdma) => return rdma.serve(store, link, session).await,
                None => link.fail(&Status::unimplemented("no RDMA at this server")).await?,
            },
            other => {
                let status = other.unexpected();
                link.fail(&status).await?;
                return Err(status);
            }
        }
    }
    Ok(())
}

/// What takes one message to ask and one to answer. A lookup tells where blocks are if `locate`.
pub(crate) async fn answer<S: AsyncRead + AsyncWrite + Unpin>(
    store: &Arc<dyn Store>,
    link: &mut Link<S>,
    session: u64,
    (kind, body): (u8, Bytes),
    locate: bool,
) -> Result<(), Status> {
    if kind == kind::LOOKUP {
        let found = store.lookup(session, &decode(body)?, locate)?;
        return link.send(kind::FOUND, &found).await;
    }
    let reserved = store.reserve(session, &decode(body)?)?;
    link.send(kind::RESERVED, &reserved).await
}

/// The client's side of that: the answer, or the server's refusal, which leaves the connection as it was. An error of the outer
/// kind does not.
pub(crate) async fn ask<S: AsyncRead + AsyncWrite + Unpin, A: Message + Default>(
    link: &mut Link<S>,
    kind: u8,
    question: &impl Message,
    answer: u8,
) -> Result<Result<A, Status>, Status> {
    link.send(kind, question).await?;
    match link.answer().await? {
        refused @ Frame::Message(kind::FAILED, _) => Ok(Err(refused.unexpected())),
        frame => frame.of_kind(answer).map(Ok),
    }
}

/// A lookup, and at once the blocks that it finds.
pub(crate) async fn find_and_send<S: AsyncRead + AsyncWrite + Unpin>(
    store: &Arc<dyn Store>,
    link: &mut Link<S>,
    (wire, session): (WireKind, u64),
    request: pb::ReadRequest,
) -> Result<(), Status> {
    let lookup = request.lookup.ok_or_else(|| Status::invalid_argument("a read without its lookup"))?;
    let found = store.lookup(session, &lookup, false)?;
    let lease_id = found.lease_id;
    let count = following(&found, request.first, request.count);
    // At once: the first block may have to come from a device.
    link.send(kind::FOUND, &found).await?;
    if count == 0 {
        return Ok(());
    }
    let wanted = pb::FetchRequest { lease_id, first: request.first, count, ..Default::default() };
    send(store, link, wire, session, &wanted).await
}

/// How many blocks follow an answer to a read; both ends know. If it is none, nothing follows at all.
fn following(found: &pb::LookupResponse, first: u32, count: u32) -> u32 {
    let hits = (found.checksums.len() / CHECKSUM_BYTES) as u32;
    if found.lease_id == 0 { 0 } else { hits.saturating_sub(first).min(count) }
}

/// The client's side of a read, up to the blocks: what was found, and whether any block follows.
pub(crate) async fn find<S: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<S>,
    request: &pb::ReadRequest,
) -> Result<Result<(pb::LookupResponse, bool), Status>, Status> {
    let found: Result<pb::LookupResponse, Status> = ask(link, kind::READ, request, kind::FOUND).await?;
    Ok(found.map(|found| {
        let follows = following(&found, request.first, request.count) > 0;
        (found, follows)
    }))
}

/// Whether the connection is fine and only the request is not.
pub(crate) fn is_refusal(status: &Status) -> bool {
    !matches!(status.code(), tonic::Code::Unavailable | tonic::Code::DeadlineExceeded)
}

/// A client that stops reading or writing is cut off.
pub(crate) async fn within<T>(
    timeout: Duration,
    work: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(timeout, work).await {
        Ok(result) => result,
        Err(_) => Err(Status::deadline_exceeded("the transfer took too long; its blocks are released")),
    }
}

pub(crate) async fn send<S: AsyncRead + AsyncWrite + Unpin>(
    store: &Arc<dyn Store>,
    link: &mut Link<S>,
    wire: WireKind,
    session: u64,
    request: &pb::FetchRequest,
) -> Result<(), Status> {
    let positions = (request.first as usize, request.count as usize);
    let mut reading = store.read(wire, session, request.lease_id, positions, Reach::default())?;
    let mut bytes = 0;
    while let Some((block, brought)) = reading.blocks.next().await {
        match brought {
            Ok(brought) => {
                send_block(link, block, &brought.bytes).await?;
                bytes += brought.bytes.len() as u64;
            }
            Err(reason) => {
                let reason = pb::MissReason::from(reason).into();
                link.push(kind::LOST, &pb::BlockLoss { block, reason });
            }
        }
    }
    link.send(kind::END, &()).await?;
    store.sent(wire, bytes);
    Ok(())
}

async fn take<S: AsyncRead + AsyncWrite + Unpin>(
    store: &Arc<dyn Store>,
    link: &mut Link<S>,
    wire: WireKind,
    (session, reservation): (u64, u64),
) -> Result<pb::PublishResponse, Status> {
    let mut receiving = Receiving::new(store.clone(), store.fill(wire, session, reservation)?);
    take_pieces(link, store.limits().idle_timeout, &mut receiving).await?;
    Ok(receiving.finish())
}

async fn skip<S: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<S>,
    idle: Duration,
    mut len: usize,
) -> Result<(), Status> {
    let mut nowhere = vec![0; DRAIN_BYTES.min(len)];
    while len > 0 {
        let part = len.min(nowhere.len());
        within(idle, link.fill(&mut nowhere[..part])).await?;
        len -= part;
    }
    Ok(())
}

/// Throws away the rest of a publish that failed, so that the connection can be used again.
pub(crate) async fn drain<S: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<S>,
    idle: Duration,
) -> Result<(), Status> {
    loop {
        match within(idle, link.answer()).await? {
            Frame::Piece { len, .. } => skip(link, idle, len).await?,
            Frame::Message(kind::END, _) => return Ok(()),
            Frame::Message(..) => {}
        }
    }
}

/// Until the end of a publish.
pub(crate) async fn take_pieces<S: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<S>,
    idle: Duration,
    receiving: &mut Receiving,
) -> Result<(), Status> {
    let work = pieces(link, idle, receiving);
    within(LONGEST_PUBLISH, work).await
}

async fn pieces<S: AsyncRead + AsyncWrite + Unpin>(
    link: &mut Link<S>,
    idle: Duration,
    receiving: &mut Receiving,
) -> Result<(), Status> {
    loop {
        match within(idle, link.answer()).await? {
            Frame::Piece { block, offset, len } => {
                match receiving.room(block, offset, len) {
                    Ok(target) => within(idle, link.fill(target)).await?,
                    Err(status) => {
                        skip(link, idle, len).await?;
                        return Err(status);
                    }
                }
                receiving.added(block, len)?;
            }
            Frame::Message(kind::SEAL, body) => receiving.seal(&decode(body)?)?,
            Frame::Message(kind::END, _) => return Ok(()),
            other => return Err(other.unexpected()),
        }
    }
}
