//! The `Admin` service.

use super::{Context, refused, unexpected};
use crate::auth::Right;
use crate::devices::Attached;
use crate::engine::Engine;
use cairn_core::{DeviceCondition, Event, Reply};
use cairn_proto::{MissReason, SpaceId, Tier, pb};
use cairn_transfer::WireKind;
use std::path::Path;
use std::time::Duration;
use tonic::{Request, Response, Status};

/// Longest wait until a flush is durable on all devices, and how often to look.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(10);
const FLUSH_STEP: Duration = Duration::from_millis(2);

pub(crate) struct AdminService(pub(crate) Context);

#[tonic::async_trait]
impl pb::admin_server::Admin for AdminService {
    async fn stats(&self, request: Request<pb::StatsRequest>) -> Result<Response<pb::StatsResponse>, Status> {
        self.0.identify(&request, Right::Admin)?;
        Ok(Response::new(stats(&self.0)))
    }

    async fn attach_device(
        &self,
        request: Request<pb::AttachDeviceRequest>,
    ) -> Result<Response<pb::AttachDeviceResponse>, Status> {
        self.0.identify(&request, Right::Admin)?;
        let path = Path::new(&request.get_ref().path);
        let engine = &self.0.engine;
        engine
            .devices()
            .attach(engine, path)
            .map_err(|error| Status::failed_precondition(error.to_string()))?;
        Ok(Response::new(pb::AttachDeviceResponse {}))
    }

    async fn detach_device(
        &self,
        request: Request<pb::DetachDeviceRequest>,
    ) -> Result<Response<pb::DetachDeviceResponse>, Status> {
        self.0.identify(&request, Right::Admin)?;
        let path = Path::new(&request.get_ref().path);
        let detached = self.0.engine.devices().detach(&self.0.engine, path);
        detached.map_err(|error| Status::failed_precondition(error.to_string()))?;
        Ok(Response::new(pb::DetachDeviceResponse {}))
    }

    async fn flush(&self, request: Request<pb::FlushRequest>) -> Result<Response<pb::FlushResponse>, Status> {
        self.0.identify(&request, Right::Admin)?;
        let space = SpaceId::try_from(request.get_ref().space_id.as_ref())?;
        let reply = self.0.engine.apply(Event::Flush(space)).map_err(refused)?;
        let Reply::Flushed(removed_blocks) = reply else {
            return Err(unexpected());
        };
        let patience = tokio::time::Instant::now() + FLUSH_TIMEOUT;
        while self.0.engine.inspect(cairn_core::Core::pending_forgets) > 0 {
            if tokio::time::Instant::now() > patience {
                return Err(Status::deadline_exceeded(
                    "the blocks are gone from memory, but a device has not written that down: they may be back after a restart",
                ));
            }
            tokio::time::sleep(FLUSH_STEP).await;
        }
        tracing::info!(?space, removed_blocks, "space flushed");
        Ok(Response::new(pb::FlushResponse { removed_blocks }))
    }
}

fn device_stats(engine: &Engine) -> Vec<pb::DeviceStats> {
    let usages = engine.inspect(cairn_core::Core::devices);
    let device = |(path, attached): (std::path::PathBuf, Option<std::sync::Arc<Attached>>)| {
        let path = path.display().to_string();
        let usage =
            attached.as_ref().and_then(|attached| usages.iter().find(|usage| usage.device == attached.id));
        let (Some(attached), Some(usage)) = (&attached, usage) else {
            let state = DeviceCondition::Lost.name().into();
            return pb::DeviceStats { path, state, ..pb::DeviceStats::default() };
        };
        let counters = &usage.counters;
        pb::DeviceStats {
            path,
            state: usage.state.name().into(),
            engine: attached.engine_name.clone(),
            capacity_bytes: usage.capacity_bytes,
            live_bytes: usage.live_bytes,
            target_bytes: usage.target_bytes,
            live_blocks: usage.live_blocks,
            queued_blocks: usage.queued_blocks,
            free_segments: usage.free_segments,
            stored_blocks: counters.stored_blocks,
            stored_bytes: counters.stored_bytes,
            relocated_bytes: counters.relocated_bytes,
            read_blocks: counters.read_blocks,
            read_bytes: counters.read_bytes,
            evicted_blocks: counters.evicted_blocks,
            corrupt_blocks: counters.corrupt_blocks,
            errors: counters.errors,
            scrubbed_blocks: attached.scrubbed.load(std::sync::atomic::Ordering::Relaxed),
        }
    };
    engine.devices().all().into_iter().map(device).collect()
}

fn gpu_stats(engine: &Engine) -> Vec<pb::GpuStats> {
    let gpu = |usage: cairn_core::GpuUsage| {
        let (info, counters) = (engine.gpus().info(usage.gpu), usage.counters);
        pb::GpuStats {
            device: info.ordinal as u32,
            name: info.name.clone(),
            state: if usage.lost { "lost" } else { "ready" }.into(),
            capacity_bytes: usage.capacity_bytes,
            resident_bytes: usage.bytes,
            resident_blocks: usage.blocks,
            promoted_blocks: counters.promoted_blocks,
            promoted_bytes: counters.promoted_bytes,
            demoted_blocks: counters.demoted_blocks,
            dropped_blocks: counters.dropped_blocks,
            read_blocks: counters.read_blocks,
            read_bytes: counters.read_bytes,
            corrupt_blocks: counters.corrupt_blocks,
            errors: counters.errors,
            shared: engine.gpus().is_shared(usage.gpu),
        }
    };
    engine.inspect(cairn_core::Core::gpus).into_iter().map(gpu).collect()
}

/// The GPU tier as a whole; absent when there is none.
fn gpu_tier(
    engine: &Engine,
    gpus: &[pb::GpuStats],
    counters: &cairn_core::Counters,
) -> Option<pb::TierStats> {
    let in_service = || gpus.iter().filter(|gpu| gpu.state == "ready");
    (!gpus.is_empty()).then(|| pb::TierStats {
        tier: pb::Tier::Gpu.into(),
        capacity_bytes: in_service().map(|gpu| gpu.capacity_bytes).sum(),
        resident_bytes: in_service().map(|gpu| gpu.resident_bytes).sum(),
        resident_blocks: in_service().map(|gpu| gpu.resident_blocks).sum(),
        hit_blocks: counters.hit_blocks[Tier::Gpu as usize],
        evicted_blocks: gpus.iter().map(|gpu| gpu.dropped_blocks + gpu.demoted_blocks).sum(),
        policy: engine.gpus().policy().to_owned(),
    })
}

/// The NVMe tier as a whole; absent when there is none.
fn nvme_stats(
    engine: &Engine,
    devices: &[pb::DeviceStats],
    counters: &cairn_core::Counters,
) -> Option<pb::TierStats> {
    let sum = |of: fn(&pb::DeviceStats) -> u64| {
        devices.iter().filter(|device| device.state != DeviceCondition::Lost.name()).map(of).sum()
    };
    (!devices.is_empty()).then(|| pb::TierStats {
        tier: pb::Tier::Nvme.into(),
        capacity_bytes: sum(|device| device.capacity_bytes),
        resident_bytes: sum(|device| device.live_bytes),
        resident_blocks: sum(|device| device.live_blocks),
        hit_blocks: counters.hit_blocks[Tier::Nvme as usize],
        evicted_blocks: sum(|device| device.evicted_blocks),
        policy: engine.devices().policy().to_owned(),
    })
}

fn stats(context: &Context) -> pb::StatsResponse {
    let read = |core: &cairn_core::Core| {
        (core.counters().clone(), core.usage(), core.spaces(), core.policy().name())
    };
    let (counters, usage, spaces, policy) = context.engine.inspect(read);
    let wire = |(kind, [fetches, fetched_bytes, published_bytes]): (WireKind, [u64; 3])| pb::WireStats {
        wire: kind.name().into(),
        fetches,
        fetched_bytes,
        published_bytes,
    };
    let wires: Vec<_> = context.metrics.wires().map(wire).collect();
    let host = pb::TierStats {
        tier: pb::Tier::Host.into(),
        capacity_bytes: context.engine.capacity_bytes(),
        resident_bytes: usage.resident_bytes,
        resident_blocks: usage.host_blocks as u64,
        hit_blocks: counters.hit_blocks[Tier::Host as usize],
        evicted_blocks: counters.evicted_blocks + counters.demoted_blocks,
        policy: policy.to_owned(),
    };
    let devices = device_stats(&context.engine);
    let gpus = gpu_stats(&context.engine);
    let gpu_tier = gpu_tier(&context.engine, &gpus, &counters);
    let nvme = nvme_stats(&context.engine, &devices, &counters);
    let misses = MissReason::ALL.iter().zip(counters.missed_blocks);
    let misses = misses
        .map(|(reason, blocks)| pb::ReasonCount { reason: pb::MissReason::from(*reason).into(), blocks });
    let space = |usage: cairn_core::SpaceUsage| pb::SpaceStats {
        space_id: usage.id.0.to_vec().into(),
        space: usage.space.as_ref().map(without_salt),
        block_bytes: usage.block_bytes,
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
        tiers: gpu_tier.into_iter().chain([host]).chain(nvme).collect(),
        misses: misses.filter(|count| count.blocks > 0).collect(),
        committed_blocks: counters.committed_blocks,
        duplicate_blocks: counters.duplicate_blocks,
        checksum_mismatches: context.metrics.checksum_mismatches.get(),
        quarantined_blocks: counters.quarantined_blocks,
        fetched_bytes: wires.iter().map(|wire| wire.fetched_bytes).sum(),
        published_bytes: wires.iter().map(|wire| wire.published_bytes).sum(),
        wires,
        spaces: spaces.into_iter().map(space).collect(),
        busy_blocks: counters.busy_blocks,
        devices,
        gpus,
        gpu_queued_blocks: context.engine.inspect(cairn_core::Core::gpu_queue) as u64,
    }
}

/// The salt is the tenant's secret.
fn without_salt(space: &cairn_proto::KeySpace) -> pb::KeySpace {
    pb::KeySpace { tenant_salt: Default::default(), ..pb::KeySpace::from(space) }
}
