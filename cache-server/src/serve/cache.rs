//! The `Cache` service.

use super::{Context, fetch, publish, refused, session, unexpected};
use crate::auth::Right;
use crate::gpus;
use crate::tiers::gpu::Promised;
use cairn_core::{BlockState, Event, LeaseId, Reply, ReservationId, SessionId};
use cairn_proto::{BlockHash, Checksum, KeySpace, SpaceId, pb, wire};
use futures::Stream;
use std::pin::Pin;
use std::time::Instant;
use tonic::{Request, Response, Status, Streaming};

type Answer<T> = Result<Response<T>, Status>;

pub(crate) struct CacheService(pub(crate) Context);

#[tonic::async_trait]
impl pb::cache_server::Cache for CacheService {
    type SessionStream = Pin<Box<dyn Stream<Item = Result<pb::SessionEvent, Status>> + Send>>;
    type FetchStream = fetch::FetchStream;

    async fn session(&self, request: Request<pb::SessionRequest>) -> Answer<Self::SessionStream> {
        let identity = self.0.auth.identify(request.metadata())?;
        Ok(Response::new(Box::pin(session::open(&self.0, identity, request.get_ref())?)))
    }

    async fn open_space(&self, request: Request<pb::OpenSpaceRequest>) -> Answer<pb::OpenSpaceResponse> {
        let identity = self.0.auth.identify(request.metadata())?;
        let request = request.into_inner();
        let session = self.0.sessions.authorize_any(request.session_id, &identity)?;
        let space = request.space.as_ref().ok_or_else(|| Status::invalid_argument("space is missing"))?;
        let space = KeySpace::try_from(space)?;
        identity.require_tenant(&space)?;
        let event = Event::OpenSpace { session: SessionId(request.session_id), space: &space };
        self.0.engine.apply(event).map_err(refused)?;
        session.declare(space.id());
        Ok(Response::new(pb::OpenSpaceResponse {
            space_id: space.id().0.to_vec().into(),
            block_bytes: space.block_bytes(),
        }))
    }

    async fn lookup(&self, request: Request<pb::LookupRequest>) -> Answer<pb::LookupResponse> {
        let id = request.get_ref().session_id;
        let session = self.0.authorize(&request, id, Right::Read)?;
        self.0.find(&session, SessionId(id), request.get_ref()).map(Response::new)
    }

    async fn fetch(&self, request: Request<pb::FetchRequest>) -> Answer<Self::FetchStream> {
        self.0.authorize(&request, request.get_ref().session_id, Right::Read)?;
        fetch::stream(&self.0, request.get_ref()).map(Response::new)
    }

    async fn reserve(&self, request: Request<pb::ReserveRequest>) -> Answer<pb::ReserveResponse> {
        let id = request.get_ref().session_id;
        let session = self.0.authorize(&request, id, Right::Publish)?;
        self.0.grant(&session, SessionId(id), request.get_ref()).map(Response::new)
    }

    async fn publish(&self, request: Request<Streaming<pb::PublishChunk>>) -> Answer<pb::PublishResponse> {
        let started = Instant::now();
        let identity = self.0.identify(&request, Right::Publish)?;
        let response = publish::receive(&self.0, &identity, request.into_inner()).await?;
        self.0.metrics.observe("publish", started);
        Ok(Response::new(response))
    }

    async fn abort(&self, request: Request<pb::AbortRequest>) -> Answer<pb::AbortResponse> {
        self.0.authorize(&request, request.get_ref().session_id, Right::Publish)?;
        let pb::AbortRequest { session_id, reservation_id } = request.into_inner();
        let reservation = ReservationId(reservation_id);
        let event = Event::Abort { session: SessionId(session_id), reservation };
        self.0.engine.apply(event).map_err(refused)?;
        Ok(Response::new(pb::AbortResponse {}))
    }

    async fn renew_lease(&self, request: Request<pb::RenewLeaseRequest>) -> Answer<pb::RenewLeaseResponse> {
        self.0.authorize(&request, request.get_ref().session_id, Right::Read)?;
        let request = request.into_inner();
        let ttl_ms = wire::clamp_ttl_ms(request.ttl_ms);
        let (session, lease) = (SessionId(request.session_id), LeaseId(request.lease_id));
        self.0.engine.apply(Event::Renew { session, lease, ttl_ms }).map_err(refused)?;
        Ok(Response::new(pb::RenewLeaseResponse { ttl_ms }))
    }

    async fn release_lease(
        &self,
        request: Request<pb::ReleaseLeaseRequest>,
    ) -> Answer<pb::ReleaseLeaseResponse> {
        self.0.authorize(&request, request.get_ref().session_id, Right::Read)?;
        let request = request.into_inner();
        self.0.copied(request.copied_bytes, request.rdma_bytes);
        self.0.release(SessionId(request.session_id), &request.lease_ids)?;
        Ok(Response::new(pb::ReleaseLeaseResponse {}))
    }

    async fn report_corrupt(
        &self,
        request: Request<pb::ReportCorruptRequest>,
    ) -> Answer<pb::ReportCorruptResponse> {
        self.0.authorize(&request, request.get_ref().session_id, Right::Read)?;
        let request = request.into_inner();
        let names = (SessionId(request.session_id), LeaseId(request.lease_id));
        let read = self.0.engine.read(names, request.block as usize, 1).map_err(refused)?;
        let block = read.blocks.first().ok_or_else(unexpected)?;
        let (space, hash, checksum) = (read.space, block.hash, block.checksum);
        let on_gpu = match block.gpu {
            Some(slot) => {
                let promised = Promised { space, hash, checksum, bytes: read.block_bytes() };
                gpus::is_corrupt(&self.0.engine, &promised, slot).await
            }
            None => false,
        };
        // What is on a device is verified as it is brought, and quarantined there.
        let bytes = fetch::block_bytes(&self.0.engine, read).await;
        let stored = bytes.is_ok_and(|bytes| Checksum::of(&space, &hash, &bytes) != checksum);
        if stored {
            tracing::error!(?space, ?hash, "a stored block is corrupt: quarantined");
            self.0.engine.apply(Event::Quarantine { space, hash }).map_err(refused)?;
        } else if !on_gpu {
            tracing::warn!(?space, ?hash, "a block was corrupted on its way to a client");
        }
        let quarantined = stored || on_gpu;
        Ok(Response::new(pb::ReportCorruptResponse { quarantined }))
    }

    async fn explain(&self, request: Request<pb::ExplainRequest>) -> Answer<pb::ExplainResponse> {
        let identity = self.0.identify(&request, Right::Read)?;
        let request = request.into_inner();
        let space = SpaceId::try_from(request.space_id.as_ref())?;
        let own =
            self.0.engine.inspect(|core| core.tenant(&space).is_some_and(|name| identity.is_tenant(name)));
        if !own {
            return Err(refused(cairn_core::Refusal::UnknownSpace));
        }
        let hashes = BlockHash::parse_list(&request.block_hashes)?;
        let reply = self.0.engine.apply(Event::Explain { space, hashes: &hashes }).map_err(refused)?;
        let Reply::Explained(states) = reply else { return Err(unexpected()) };
        let policy = self.0.engine.inspect(|core| core.policy().name());
        let blocks = states.into_iter().map(|state| explanation(state, policy)).collect();
        Ok(Response::new(pb::ExplainResponse { blocks }))
    }
}

fn explanation(state: BlockState, policy: &str) -> pb::BlockExplanation {
    use pb::block_explanation::State;
    let state = match state {
        BlockState::Resident { tier, durable, bytes, leases, idle_ms, checksum, reachable } => {
            State::Resident(pb::ResidentBlock {
                tier: pb::Tier::from(tier).into(),
                bytes,
                leases,
                idle_ms,
                checksum: checksum.0.to_vec().into(),
                reachable,
                durable,
            })
        }
        BlockState::Absent { reason, ago_ms } => {
            let decided = reason == cairn_proto::MissReason::Evicted;
            State::Absent(pb::AbsentBlock {
                reason: pb::MissReason::from(reason).into(),
                ago_ms,
                policy: if decided { policy.to_owned() } else { String::new() },
            })
        }
    };
    pb::BlockExplanation { state: Some(state) }
}
