//! The `Admin` service.

use super::{Context, refused, unexpected};
use cairn_core::{Event, Reply};
use cairn_proto::{MissReason, SpaceId, Tier, pb};
use tonic::{Request, Response, Status};

pub(crate) struct AdminService(pub(crate) Context);

#[tonic::async_trait]
impl pb::admin_server::Admin for AdminService {
    async fn stats(&self, _: Request<pb::StatsRequest>) -> Result<Response<pb::StatsResponse>, Status> {
        Ok(Response::new(stats(&self.0)))
    }

    async fn flush(&self, request: Request<pb::FlushRequest>) -> Result<Response<pb::FlushResponse>, Status> {
        let space = SpaceId::try_from(request.get_ref().space_id.as_ref())?;
        let reply = self.0.engine.apply(Event::Flush(space)).map_err(refused)?;
        let Reply::Flushed(removed_blocks) = reply else {
            return Err(unexpected());
        };
        tracing::info!(?space, removed_blocks, "space flushed");
        Ok(Response::new(pb::FlushResponse { removed_blocks }))
    }
}

fn stats(context: &Context) -> pb::StatsResponse {
    let read = |core: &cairn_core::Core| {
        (core.counters().clone(), core.usage(), core.spaces(), core.policy().name())
    };
    let (counters, usage, spaces, policy) = context.engine.inspect(read);
    let host = pb::TierStats {
        tier: pb::Tier::Host.into(),
        capacity_bytes: context.engine.capacity_bytes(),
        resident_bytes: usage.resident_bytes,
        resident_blocks: usage.resident_blocks as u64,
        hit_blocks: counters.hit_blocks[Tier::Host as usize],
        evicted_blocks: counters.evicted_blocks,
        policy: policy.to_owned(),
    };
    let misses = MissReason::ALL.iter().zip(counters.missed_blocks);
    let misses = misses
        .map(|(reason, blocks)| pb::ReasonCount { reason: pb::MissReason::from(*reason).into(), blocks });
    let space = |usage: cairn_core::SpaceUsage| pb::SpaceStats {
        space_id: usage.space.id().0.to_vec().into(),
        space: Some(without_salt(&usage.space)),
        block_bytes: usage.space.block_bytes(),
        resident_blocks: usage.resident_blocks,
    };
    pb::StatsResponse {
        version: env!("CARGO_PKG_VERSION").into(),
        server_epoch: context.engine.epoch(),
        uptime_ms: context.engine.uptime_ms(),
        sessions: usage.sessions as u32,
        leases: usage.leases as u32,
        reservations: usage.reservations as u32,
        asked_blocks: counters.asked_blocks,
        tiers: vec![host],
        misses: misses.filter(|count| count.blocks > 0).collect(),
        committed_blocks: counters.committed_blocks,
        duplicate_blocks: counters.duplicate_blocks,
        checksum_mismatches: context.metrics.checksum_mismatches.get(),
        quarantined_blocks: counters.quarantined_blocks,
        fetched_bytes: context.metrics.fetched_bytes.get(),
        published_bytes: context.metrics.published_bytes.get(),
        spaces: spaces.into_iter().map(space).collect(),
        busy_blocks: counters.busy_blocks,
    }
}

/// The salt is the tenant's secret.
fn without_salt(space: &cairn_proto::KeySpace) -> pb::KeySpace {
    pb::KeySpace { tenant_salt: Default::default(), ..pb::KeySpace::from(space) }
}
