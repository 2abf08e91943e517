//! Where generated types stop: conversions between messages and domain types. Nothing here decides anything.

use crate::{
    BlockHash, Dtype, HashProtocol, Invalid, KeySpace, Layout, MissReason, Outcome, Shard, SpaceParts, Tier,
    limits, outcome::runs, pb,
};

impl TryFrom<&pb::KeySpace> for KeySpace {
    type Error = Invalid;

    fn try_from(message: &pb::KeySpace) -> Result<Self, Invalid> {
        let layout = message.layout.as_ref().ok_or(Invalid::Missing { field: "layout" })?;
        if layout.order() != pb::LayoutOrder::LayerKvTokenHead {
            return Err(Invalid::Missing { field: "layout.order" });
        }
        let shard = message.shard.as_ref().ok_or(Invalid::Missing { field: "shard" })?;
        Self::new(SpaceParts {
            tenant: message.tenant.clone(),
            tenant_salt: array("tenant_salt", &message.tenant_salt)?,
            model_fingerprint: array("model_fingerprint", &message.model_fingerprint)?,
            dtype: dtype(message.dtype())?,
            layout: Layout::new(layout.layers, layout.kv_heads, layout.head_dim, layout.block_tokens)?,
            shard: Shard {
                first_layer: shard.first_layer,
                total_layers: shard.total_layers,
                first_kv_head: shard.first_kv_head,
                total_kv_heads: shard.total_kv_heads,
            },
            hash_protocol: match message.hash_protocol() {
                pb::HashProtocol::CairnBlake3V1 => HashProtocol::CairnBlake3V1,
                pb::HashProtocol::VllmSha256 => HashProtocol::VllmSha256,
                pb::HashProtocol::Unspecified => {
                    return Err(Invalid::Missing { field: "hash_protocol" });
                }
            },
        })
    }
}

impl From<&KeySpace> for pb::KeySpace {
    fn from(space: &KeySpace) -> Self {
        let parts = space.parts();
        let layout = &parts.layout;
        Self {
            tenant: parts.tenant.clone(),
            tenant_salt: parts.tenant_salt.to_vec().into(),
            model_fingerprint: parts.model_fingerprint.to_vec().into(),
            dtype: i32::from(parts.dtype.code()),
            layout: Some(pb::Layout {
                layers: layout.layers() as u32,
                kv_heads: layout.kv_heads() as u32,
                head_dim: layout.head_dim() as u32,
                block_tokens: layout.block_tokens() as u32,
                order: pb::LayoutOrder::LayerKvTokenHead.into(),
            }),
            shard: Some(pb::Shard {
                first_layer: parts.shard.first_layer,
                total_layers: parts.shard.total_layers,
                first_kv_head: parts.shard.first_kv_head,
                total_kv_heads: parts.shard.total_kv_heads,
            }),
            hash_protocol: i32::from(parts.hash_protocol.code()),
        }
    }
}

fn dtype(value: pb::Dtype) -> Result<Dtype, Invalid> {
    match value {
        pb::Dtype::F32 => Ok(Dtype::F32),
        pb::Dtype::F16 => Ok(Dtype::F16),
        pb::Dtype::Bf16 => Ok(Dtype::Bf16),
        pb::Dtype::Fp8E4m3 => Ok(Dtype::Fp8E4m3),
        pb::Dtype::Unspecified => Err(Invalid::Missing { field: "dtype" }),
    }
}

fn array(field: &'static str, bytes: &[u8]) -> Result<[u8; 32], Invalid> {
    bytes.try_into().map_err(|_| Invalid::Length { field, actual: bytes.len(), expected: "32" })
}

impl From<Tier> for pb::Tier {
    fn from(tier: Tier) -> Self {
        match tier {
            Tier::Gpu => Self::Gpu,
            Tier::Host => Self::Host,
            Tier::Nvme => Self::Nvme,
            Tier::Remote => Self::Remote,
        }
    }
}

impl TryFrom<pb::Tier> for Tier {
    type Error = Invalid;

    fn try_from(tier: pb::Tier) -> Result<Self, Invalid> {
        match tier {
            pb::Tier::Gpu => Ok(Self::Gpu),
            pb::Tier::Host => Ok(Self::Host),
            pb::Tier::Nvme => Ok(Self::Nvme),
            pb::Tier::Remote => Ok(Self::Remote),
            pb::Tier::Unspecified => Err(Invalid::Missing { field: "tier" }),
        }
    }
}

impl From<MissReason> for pb::MissReason {
    fn from(reason: MissReason) -> Self {
        match reason {
            MissReason::NeverStored => Self::NeverStored,
            MissReason::Evicted => Self::Evicted,
            MissReason::NotAdmitted => Self::NotAdmitted,
            MissReason::Expired => Self::Expired,
            MissReason::Quarantined => Self::Quarantined,
            MissReason::ParentMissing => Self::ParentMissing,
            MissReason::LeaseLost => Self::LeaseLost,
            MissReason::PeerDown => Self::PeerDown,
            MissReason::Deadline => Self::Deadline,
            MissReason::Removed => Self::Removed,
            MissReason::DeviceLost => Self::DeviceLost,
        }
    }
}

impl TryFrom<pb::MissReason> for MissReason {
    type Error = Invalid;

    fn try_from(reason: pb::MissReason) -> Result<Self, Invalid> {
        Self::ALL
            .into_iter()
            .find(|known| pb::MissReason::from(*known) == reason)
            .ok_or(Invalid::Missing { field: "miss reason" })
    }
}

/// Packs outcomes for the wire.
pub fn outcome_runs(outcomes: &[Outcome]) -> Vec<pb::OutcomeRun> {
    let pack = |(count, outcome)| {
        let mut run = pb::OutcomeRun { count, ..Default::default() };
        match outcome {
            Outcome::Hit(tier) => {
                run.set_kind(pb::OutcomeKind::Hit);
                run.set_tier(tier.into());
            }
            Outcome::Miss(reason) => {
                run.set_kind(pb::OutcomeKind::Miss);
                run.set_reason(reason.into());
            }
            Outcome::Busy => run.set_kind(pb::OutcomeKind::Busy),
            Outcome::Corrupt => run.set_kind(pb::OutcomeKind::Corrupt),
        }
        run
    };
    runs(outcomes).map(pack).collect()
}

/// Unpacks outcomes of exactly `count` blocks.
///
/// # Errors
/// When a run is unknown or the counts do not add up.
pub fn parse_outcomes(message: &[pb::OutcomeRun], count: usize) -> Result<Vec<Outcome>, Invalid> {
    let mut outcomes = Vec::with_capacity(count);
    for run in message {
        let outcome = match run.kind() {
            pb::OutcomeKind::Hit => Outcome::Hit(run.tier().try_into()?),
            pb::OutcomeKind::Miss => Outcome::Miss(run.reason().try_into()?),
            pb::OutcomeKind::Busy => Outcome::Busy,
            pb::OutcomeKind::Corrupt => Outcome::Corrupt,
            pb::OutcomeKind::Unspecified => {
                return Err(Invalid::Missing { field: "outcome kind" });
            }
        };
        extend_run(&mut outcomes, outcome, run.count, count, "outcomes")?;
    }
    complete(outcomes, count, "outcomes")
}

/// Unpacks grants of exactly `count` blocks.
///
/// # Errors
/// When a run is unknown or the counts do not add up.
pub fn parse_grants(message: &[pb::GrantRun], count: usize) -> Result<Vec<pb::Grant>, Invalid> {
    let mut grants = Vec::with_capacity(count);
    for run in message {
        if run.grant() == pb::Grant::Unspecified {
            return Err(Invalid::Missing { field: "grant" });
        }
        extend_run(&mut grants, run.grant(), run.count, count, "grants")?;
    }
    complete(grants, count, "grants")
}

fn extend_run<T: Copy>(
    out: &mut Vec<T>,
    value: T,
    run: u32,
    max: usize,
    field: &'static str,
) -> Result<(), Invalid> {
    let total = out.len().saturating_add(run as usize);
    if total > max {
        return Err(Invalid::range(field, total as u64, format!("{max}, as many as were asked for")));
    }
    out.resize(total, value);
    Ok(())
}

fn complete<T>(values: Vec<T>, count: usize, field: &'static str) -> Result<Vec<T>, Invalid> {
    if values.len() == count {
        return Ok(values);
    }
    Err(Invalid::range(field, values.len() as u64, format!("{count}, as many as were asked for")))
}

/// The lease or reservation time to use for a requested one: 0 asks for the default.
pub fn clamp_ttl_ms(requested: u32) -> u32 {
    match requested {
        0 => limits::DEFAULT_TTL_MS,
        other => other.min(limits::MAX_TTL_MS),
    }
}

/// An optional parent hash: empty bytes mean the start of a prompt.
///
/// # Errors
/// When the length is neither 0 nor 32.
pub fn parse_parent(bytes: &[u8]) -> Result<Option<BlockHash>, Invalid> {
    if bytes.is_empty() { Ok(None) } else { BlockHash::try_from(bytes).map(Some) }
}
