//! What became of a block that was asked for. Every block asked for ends as exactly one outcome; a miss is a value,
//! never an error.

use std::fmt;

/// Where a block was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tier {
    /// Device memory.
    Gpu,
    /// Host memory.
    Host,
    /// Flash.
    Nvme,
    /// Another node.
    Remote,
}

/// Why a block was not found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MissReason {
    /// Nothing is remembered of it.
    NeverStored,
    /// It was stored and had to make room.
    Evicted,
    /// It was offered and refused.
    NotAdmitted,
    /// Its reservation ran out before its bytes were complete.
    Expired,
    /// Its bytes were found to be wrong.
    Quarantined,
    /// A block before it in the chain is missing, so it cannot be used.
    ParentMissing,
    /// The lease ended before the bytes were read.
    LeaseLost,
    /// The server could not be reached.
    PeerDown,
    /// The answer did not arrive in time.
    Deadline,
    /// An administrator removed it.
    Removed,
    /// The device that held it is out of service.
    DeviceLost,
}

impl MissReason {
    /// All reasons, in wire order.
    pub const ALL: [Self; 11] = [
        Self::NeverStored,
        Self::Evicted,
        Self::NotAdmitted,
        Self::Expired,
        Self::Quarantined,
        Self::ParentMissing,
        Self::LeaseLost,
        Self::PeerDown,
        Self::Deadline,
        Self::Removed,
        Self::DeviceLost,
    ];

    /// The name used in metrics and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NeverStored => "never_stored",
            Self::Evicted => "evicted",
            Self::NotAdmitted => "not_admitted",
            Self::Expired => "expired",
            Self::Quarantined => "quarantined",
            Self::ParentMissing => "parent_missing",
            Self::LeaseLost => "lease_lost",
            Self::PeerDown => "peer_down",
            Self::Deadline => "deadline",
            Self::Removed => "removed",
            Self::DeviceLost => "device_lost",
        }
    }
}

impl Tier {
    /// All tiers, fastest first.
    pub const ALL: [Self; 4] = [Self::Gpu, Self::Host, Self::Nvme, Self::Remote];

    /// The name used in metrics and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gpu => "gpu",
            Self::Host => "host",
            Self::Nvme => "nvme",
            Self::Remote => "remote",
        }
    }
}

/// What became of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// Found in this tier.
    Hit(Tier),
    /// Not usable, and why.
    Miss(MissReason),
    /// Cannot be served at the moment.
    Busy,
    /// Failed verification; not used.
    Corrupt,
}

impl Outcome {
    /// Whether the block's bytes can be used.
    pub const fn is_hit(self) -> bool {
        matches!(self, Self::Hit(_))
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hit(tier) => write!(f, "hit:{}", tier.name()),
            Self::Miss(reason) => write!(f, "miss:{}", reason.name()),
            Self::Busy => f.write_str("busy"),
            Self::Corrupt => f.write_str("corrupt"),
        }
    }
}

/// Runs of equal values, as outcomes and grants cross the wire.
pub fn runs<T: PartialEq + Copy>(values: &[T]) -> impl Iterator<Item = (u32, T)> + '_ {
    values.chunk_by(|a, b| a == b).map(|run| (run.len() as u32, run[0]))
}
