//! The cache server: memory, wires and administration around the decisions of `cairn-core`.

mod auth;
pub mod certs;
mod config;
mod data;
mod devices;
mod engine;
mod gpus;
mod listen;
mod metrics;
mod serve;
mod server;
mod sessions;
mod tiers;
mod wires;

pub use tiers::nvme;

pub use config::{
    Config, ConfigError, DeviceEntry, GpuConfig, HostConfig, LimitsConfig, NvmeConfig, ServerConfig,
    TenantConfig, TlsConfig, TokenConfig, WiresConfig,
};
pub use server::{Server, ServerError};

/// Slots start on pages, so that later tiers can use direct IO on them.
pub(crate) use cairn_proto::limits::SLOT_ALIGN_BYTES;
