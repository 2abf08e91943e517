//! The numbers that shape a core. Checked once, by [`crate::Core::new`].

use crate::{Admission, PolicyKind};
use thiserror::Error;

/// Settings of a [`crate::Core`].
#[derive(Clone, Debug)]
pub struct CoreConfig {
    /// Chunks of the host arena. A chunk belongs to one tenant and one slot size at a time.
    pub host_chunks: u32,
    /// Bytes of one chunk. Larger chunks waste less at their end; smaller ones move faster between slot sizes.
    pub chunk_bytes: u64,
    /// Slots are multiples of this, so that later tiers can use direct IO on them.
    pub slot_align_bytes: u64,
    /// What leaves when there is no room.
    pub policy: PolicyKind,
    /// Which blocks are written to devices.
    pub admission: Admission,
    /// Tenants and how many blocks each may hold in host memory. Empty: any tenant, no quota.
    pub tenants: Vec<TenantQuota>,
    /// Removed blocks that `Explain` remembers. 40 bytes each.
    pub history_entries: usize,
    /// Leases that one session may hold at a time.
    pub max_leases_per_session: usize,
    /// Reservations that one session may hold at a time.
    pub max_reservations_per_session: usize,
    /// Key spaces in all.
    pub max_spaces: usize,
    /// Secret mixed into index positions, so that clients cannot choose colliding hashes.
    pub hash_seed: [u64; 2],
}

/// One tenant's share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TenantQuota {
    /// The tenant's name in its key spaces.
    pub name: String,
    /// Blocks that it may hold, reserved ones included. `None`: no quota.
    pub max_blocks: Option<u64>,
    /// Chunks that its blocks may be in at a time.
    pub max_chunks: Option<usize>,
}

/// A setting that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ConfigError {
    /// A size is zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// Chunks must hold whole aligned slots.
    #[error("chunk_bytes ({chunk_bytes}) must be a multiple of slot_align_bytes ({slot_align_bytes})")]
    Alignment {
        /// The configured chunk size.
        chunk_bytes: u64,
        /// The configured alignment.
        slot_align_bytes: u64,
    },
    /// Two quotas for one tenant.
    #[error("tenant {0:?} is listed twice")]
    DuplicateTenant(String),
}

impl CoreConfig {
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        let positive = [
            ("host_chunks", u64::from(self.host_chunks)),
            ("chunk_bytes", self.chunk_bytes),
            ("slot_align_bytes", self.slot_align_bytes),
            ("history_entries", self.history_entries as u64),
            ("max_leases_per_session", self.max_leases_per_session as u64),
            ("max_reservations_per_session", self.max_reservations_per_session as u64),
            ("max_spaces", self.max_spaces as u64),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero(name));
        }
        let Self { chunk_bytes, slot_align_bytes, .. } = *self;
        if !chunk_bytes.is_multiple_of(slot_align_bytes) {
            return Err(ConfigError::Alignment { chunk_bytes, slot_align_bytes });
        }
        for (i, tenant) in self.tenants.iter().enumerate() {
            if self.tenants[..i].iter().any(|other| other.name == tenant.name) {
                return Err(ConfigError::DuplicateTenant(tenant.name.clone()));
            }
        }
        Ok(())
    }
}
