//! Blocks that a client reads itself, in memory that it mapped or registered: the server only tells where they are, and sends those
//! that are nowhere there. Both ends of that, for shared memory and RDMA.

use crate::Arrivals;
use crate::copy::copy_shared;
use crate::frame::{Frame, Link, decode, kind, nonsense};
use crate::map::Map;
use crate::store::{Hold, Location, Reach, Receiving, Store};
use crate::stream::{LONGEST_PUBLISH, drain, is_refusal, lost, send_block, within};
use crate::wire::{FetchJob, WireKind};
use bytes::Bytes;
use cairn_proto::{Checksum, MissReason, limits, pb};
use futures::StreamExt;
use futures::future::BoxFuture;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::Status;

/// Chunks of one request: each is a descriptor, or a registration.
pub(crate) const MAX_CHUNKS: usize = 64;

/// A byte stream under a link.
pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// Where a block starts in its chunk.
pub(crate) fn offset(place: Location, block_bytes: u64) -> u64 {
    place.index() * block_bytes.next_multiple_of(limits::SLOT_ALIGN_BYTES)
}

/// The number of a chunk without its generation.
pub(crate) fn number(place: Location) -> u64 {
    place.chunk() & 0xFF_FFFF
}

/// The places in a job that a lookup told.
pub(crate) fn told(job: &FetchJob) -> Vec<(u32, Location)> {
    let known = |block: &usize| job.locations.get(*block).is_some_and(|place| *place != 0);
    let place = |block: usize| (block as u32, Location(job.locations[block]));
    job.blocks.clone().filter(known).map(place).collect()
}

/// A client's end that can reach into a server's chunks.
pub(crate) trait Bring: Send {
    type Io: Io;

    fn link(&mut self) -> &mut Link<Self::Io>;

    /// Reads blocks where they are.
    fn bring<'a>(
        &'a mut self,
        lease: u64,
        places: &'a [(u32, Location)],
        arrivals: &'a mut Arrivals<'_>,
    ) -> BoxFuture<'a, Result<(), Status>>;
}

/// Brings the blocks of a job: first those whose places are known, then what the server says of the others.
pub(crate) async fn fetch<B: Bring>(
    reader: &mut B,
    job: &FetchJob,
    arrivals: &mut Arrivals<'_>,
) -> Result<(), Status> {
    let block_bytes = arrivals.promise().block_bytes;
    reader.bring(job.lease, &told(job), arrivals).await?;
    while let Some(rest) = arrivals.undecided() {
        let request = FetchJob { blocks: rest.clone(), ..job.clone() }.request();
        reader.link().send(kind::FETCH, &request).await?;
        let mut answer = Located { block_bytes, asked: rest.clone(), ..Located::default() };
        answer.receive(reader.link(), Some(arrivals)).await?;
        reader.bring(job.lease, &answer.places, arrivals).await?;
        if arrivals.undecided() == Some(rest) {
            return Err(Status::internal("the server says nothing about blocks that were asked for"));
        }
    }
    Ok(())
}

/// What a server says about blocks that were asked for.
#[derive(Default)]
pub(crate) struct Located {
    pub(crate) block_bytes: u64,
    /// Only these may be spoken of.
    pub(crate) asked: Range<usize>,
    pub(crate) places: Vec<(u32, Location)>,
    pub(crate) on_gpu: Vec<(u32, Location)>,
    pub(crate) copies: BTreeMap<u32, Vec<u8>>,
    pub(crate) lost: BTreeMap<u32, MissReason>,
}

impl Located {
    /// Until the end of the answer. Bytes of blocks without a place go to `arrivals`, or are kept.
    pub(crate) async fn receive<S: Io>(
        &mut self,
        link: &mut Link<S>,
        mut arrivals: Option<&mut Arrivals<'_>>,
    ) -> Result<(), Status> {
        loop {
            match (link.answer().await?, &mut arrivals) {
                (Frame::Message(kind::LOCATED, body), _) => {
                    let located: pb::LocatedBlocks = decode(body)?;
                    let told = |blocks: Vec<u32>, places: Vec<u64>| {
                        let places = blocks.into_iter().zip(places.into_iter().map(Location));
                        places
                            .filter(|(block, _)| self.asked.contains(&(*block as usize)))
                            .collect::<Vec<_>>()
                    };
                    let here = told(located.blocks, located.locations);
                    let on_gpu = told(located.gpu_blocks, located.gpu_locations);
                    self.places.extend(here);
                    self.on_gpu.extend(on_gpu);
                    if self.places.len() + self.on_gpu.len() > self.asked.len() {
                        return Err(nonsense("more places than blocks"));
                    }
                }
                (Frame::Message(kind::LOST, body), Some(arrivals)) => lost(arrivals, body)?,
                (Frame::Message(kind::LOST, body), None) => {
                    let loss: pb::BlockLoss = decode(body)?;
                    self.known(loss.block)?;
                    self.lost.insert(loss.block, MissReason::try_from(loss.reason()).map_err(nonsense)?);
                }
                (Frame::Message(kind::END, _), _) => return Ok(()),
                (Frame::Piece { block, offset, len }, Some(arrivals)) => {
                    link.fill(arrivals.room(block, offset, len)?).await?;
                    arrivals.added(block, len)?;
                }
                (Frame::Piece { block, offset, len }, None) => {
                    self.known(block)?;
                    let copy = self.copies.entry(block).or_insert_with(|| vec![0; self.block_bytes as usize]);
                    let end = (offset as usize).saturating_add(len);
                    let target = copy.get_mut(offset as usize..end);
                    link.fill(target.ok_or_else(|| Status::internal("bytes outside a block"))?).await?;
                }
                (other, _) => return Err(other.unexpected()),
            }
        }
    }

    fn known(&self, block: u32) -> Result<(), Status> {
        match self.asked.contains(&(block as usize)) {
            true => Ok(()),
            false => Err(nonsense("a block that was not asked for")),
        }
    }
}

/// A server's end that lets a client reach into its chunks.
pub(crate) trait Serve: Send {
    type Io: Io;

    fn store(&self) -> &Arc<dyn Store>;

    fn link(&mut self) -> &mut Link<Self::Io>;

    /// Answers everything that is not a publish.
    fn answer(&mut self, kind: u8, body: Bytes) -> BoxFuture<'_, Result<(), Status>>;

    /// Takes what a client publishes.
    fn publish(&mut self, reservation: u64) -> BoxFuture<'_, Result<pb::PublishResponse, Status>>;
}

/// One request after the other, until the client goes.
pub(crate) async fn requests<C: Serve>(connection: &mut C) -> Result<(), Status> {
    let limits = connection.store().limits();
    while let Some(frame) = connection.link().request(limits.idle_timeout).await? {
        let Frame::Message(kind, body) = frame else { return Err(frame.unexpected()) };
        if kind == kind::PUBLISH {
            let pb::PublishHeader { reservation_id, .. } = decode(body)?;
            match within(LONGEST_PUBLISH, connection.publish(reservation_id)).await {
                Ok(response) => {
                    let answer = connection.link().send(kind::COMMITS, &response);
                    within(limits.idle_timeout, answer).await?;
                }
                Err(status) => {
                    connection.link().fail(&status).await?;
                    if !is_refusal(&status) {
                        return Err(status);
                    }
                    drain(connection.link(), limits.idle_timeout).await?;
                }
            }
            continue;
        }
        match within(limits.fetch_timeout, connection.answer(kind, body)).await {
            Err(status) if is_refusal(&status) => connection.link().fail(&status).await?,
            result => result?,
        }
    }
    Ok(())
}

/// Tells where blocks are, and sends those that are nowhere in memory. Returns what keeps the former in place, and the bytes of all;
/// the caller says when they count as sent.
pub(crate) async fn locate<S: Io>(
    store: &Arc<dyn Store>,
    link: &mut Link<S>,
    (wire, session): (WireKind, u64),
    (lease, first, count): (u64, u32, u32),
    reach: Reach<'_>,
) -> Result<(Hold, u64), Status> {
    let mut reading = store.read(wire, session, lease, (first as usize, count as usize), reach)?;
    let mut bytes = reading.on_gpu.len() as u64 * reading.block_bytes;
    let mut located = pb::LocatedBlocks::default();
    (located.gpu_blocks, located.gpu_locations) =
        reading.on_gpu.iter().map(|(block, place)| (*block, place.0)).unzip();
    while let Some((block, brought)) = reading.blocks.next().await {
        match brought {
            Ok(brought) => {
                bytes += brought.bytes.len() as u64;
                if let Some(location) = brought.location {
                    located.blocks.push(block);
                    located.locations.push(location.0);
                } else {
                    send_block(link, block, &brought.bytes).await?;
                }
            }
            Err(reason) => {
                let reason = pb::MissReason::from(reason).into();
                link.push(kind::LOST, &pb::BlockLoss { block, reason });
            }
        }
    }
    link.push(kind::LOCATED, &located);
    Ok((reading.hold, bytes))
}

/// Takes what a client offers in its staging memory, until it is done.
pub(crate) async fn take_offers<S: Io>(
    store: &Arc<dyn Store>,
    link: &mut Link<S>,
    (wire, session): (WireKind, u64),
    reservation: u64,
    staging: Option<&Map>,
) -> Result<pb::PublishResponse, Status> {
    let idle = store.limits().idle_timeout;
    let mut receiving = Receiving::new(store.clone(), store.fill(wire, session, reservation)?);
    loop {
        match within(idle, link.answer()).await? {
            Frame::Message(kind::OFFER, body) => {
                take(&mut receiving, &decode(body)?, staging)?;
                link.send(kind::TAKEN, &pb::TakenPieces { count: 1 }).await?;
            }
            Frame::Message(kind::END, _) => return Ok(receiving.finish()),
            other => return Err(other.unexpected()),
        }
    }
}

/// Copies what the client offers. The client can change it meanwhile: what counts is what was copied.
fn take(receiving: &mut Receiving, offer: &pb::OfferedPiece, staging: Option<&Map>) -> Result<(), Status> {
    let place = staging.and_then(|staging| staging.at(offer.at, offer.bytes));
    let source = place.ok_or_else(|| Status::invalid_argument("an offer outside the staging memory"))?;
    let promised = match offer.checksum.is_empty() {
        true => None,
        false => Some(Checksum::try_from(offer.checksum.as_ref())?),
    };
    if offer.offset == 0
        && let Some(promised) = promised
    {
        return receiving.whole(offer.block, promised, |space, hash, target| {
            if target.len() as u64 != offer.bytes {
                return Err(Status::invalid_argument("a block is offered whole, or piece by piece"));
            }
            // SAFETY: the place is inside the mapping for the bytes of the target, which is no part of it.
            Ok(unsafe { copy_shared(space, hash, source, target) })
        });
    }
    let len = offer.bytes as usize;
    let target = receiving.room(offer.block, offer.offset, len)?;
    // SAFETY: as above.
    unsafe { std::ptr::copy_nonoverlapping(source, target.as_mut_ptr(), len) };
    receiving.added(offer.block, len)?;
    match promised {
        Some(_) => receiving.seal(&pb::BlockSeal { block: offer.block, checksum: offer.checksum.clone() }),
        None => Ok(()),
    }
}
