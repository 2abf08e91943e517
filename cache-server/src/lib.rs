//! The cache server: memory, wires and administration around the decisions of `cairn-core`.

mod config;
mod devices;
mod engine;
mod metrics;
mod serve;
mod server;
mod tiers;

pub use tiers::nvme;

pub use config::{
    Config, ConfigError, DeviceEntry, HostConfig, LimitsConfig, NvmeConfig, ServerConfig, TenantConfig,
};
pub use server::{Server, ServerError};

/// Slots start on pages, so that later tiers can use direct IO on them.
pub(crate) const SLOT_ALIGN_BYTES: u64 = 4096;
