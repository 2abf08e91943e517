//! The settings of a server: one typed tree, read here and nowhere else. `deploy/cairn.toml` shows all of it.

use cairn_core::{CoreConfig, PolicyKind, TenantQuota};
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::Path;
use thiserror::Error;

const MIB: u64 = 1 << 20;

/// All settings.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the server listens and how it ends.
    pub server: ServerConfig,
    /// The host memory tier.
    pub host: HostConfig,
    /// Bounds on what clients may hold.
    pub limits: LimitsConfig,
    /// Tenants and their shares. Empty: any tenant may come, without quota.
    pub tenant: Vec<TenantConfig>,
}

/// Where the server listens and how it ends.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Address of the gRPC services. Port 0 picks a free one.
    pub listen: SocketAddr,
    /// Address of metrics and health. Port 0 picks a free one.
    pub http_listen: SocketAddr,
    /// Listen beyond loopback without TLS and authentication. Anybody who reaches the port can then read and fill the
    /// cache.
    pub allow_insecure_network: bool,
    /// Longest wait for transfers in progress at shutdown.
    pub shutdown_grace_ms: u64,
}

/// The host memory tier.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostConfig {
    /// Memory for blocks. It is taken for good as it fills (or at start, see `prefault`).
    pub capacity_mib: u64,
    /// Unit in which memory moves between tenants and block sizes. A block must fit; each (tenant, block size) wastes up
    /// to one.
    pub chunk_mib: u64,
    /// What leaves when there is no room: `lru` or `fifo`.
    pub policy: String,
    /// Touch all memory in the background at start: steady first writes, at the price of taking all of it at once.
    pub prefault: bool,
    /// Removed blocks that `explain` remembers. 40 bytes each.
    pub history_entries: usize,
}

/// Bounds on what clients may hold.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Clients at a time.
    pub max_sessions: usize,
    /// Leases of one client at a time.
    pub max_leases_per_session: usize,
    /// Reservations of one client at a time.
    pub max_reservations_per_session: usize,
    /// Key spaces in all.
    pub max_spaces: usize,
    /// Longest that one fetch may hold its blocks in place.
    pub fetch_timeout_ms: u64,
    /// Longest pause between two messages of a publish.
    pub publish_idle_ms: u64,
}

/// One tenant's share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantConfig {
    /// The name in its key spaces.
    pub name: String,
    /// Blocks that it may hold at a time. Absent: no quota.
    pub max_blocks: Option<u64>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: ([127, 0, 0, 1], 7077).into(),
            http_listen: ([127, 0, 0, 1], 7078).into(),
            allow_insecure_network: false,
            shutdown_grace_ms: 10_000,
        }
    }
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            capacity_mib: 1024,
            chunk_mib: 64,
            policy: "lru".into(),
            prefault: true,
            history_entries: 65_536,
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            max_sessions: 1024,
            max_leases_per_session: 256,
            max_reservations_per_session: 256,
            max_spaces: 1024,
            fetch_timeout_ms: 30_000,
            publish_idle_ms: 10_000,
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the config file {path}: {source}")]
    Read {
        /// Which file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not valid.
    #[error("the config file {path} is not valid: {source}")]
    Parse {
        /// Which file.
        path: String,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value cannot work.
    #[error("{0}")]
    Value(String),
    /// A value cannot work, says the core.
    #[error(transparent)]
    Core(#[from] cairn_core::ConfigError),
}

impl Config {
    /// Reads a TOML file; absent keys keep their defaults, unknown ones are errors.
    ///
    /// # Errors
    /// When the file cannot be read or parsed.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let shown = path.display().to_string();
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: shown.clone(), source })?;
        toml::from_str(&text).map_err(|source| ConfigError::Parse { path: shown, source: Box::new(source) })
    }

    /// The core's settings. `hash_seed` should be fresh for each start.
    ///
    /// # Errors
    /// When a value cannot work.
    pub fn core(&self, hash_seed: [u64; 2]) -> Result<CoreConfig, ConfigError> {
        self.check_listen()?;
        let HostConfig { capacity_mib, chunk_mib, .. } = self.host;
        if chunk_mib == 0 || capacity_mib < chunk_mib {
            let text = format!(
                "host.capacity_mib ({capacity_mib}) must hold at least one host.chunk_mib ({chunk_mib})"
            );
            return Err(ConfigError::Value(text));
        }
        let host_chunks = u32::try_from(capacity_mib / chunk_mib)
            .map_err(|_| ConfigError::Value("host.capacity_mib / host.chunk_mib is too large".into()))?;
        let chunk_bytes = chunk_mib
            .checked_mul(MIB)
            .ok_or_else(|| ConfigError::Value("host.chunk_mib is too large".into()))?;
        let policy: PolicyKind = self.host.policy.parse().map_err(ConfigError::Value)?;
        let quota = |t: &TenantConfig| TenantQuota { name: t.name.clone(), max_blocks: t.max_blocks };
        Ok(CoreConfig {
            host_chunks,
            chunk_bytes,
            slot_align_bytes: crate::SLOT_ALIGN_BYTES,
            policy,
            tenants: self.tenant.iter().map(quota).collect(),
            history_entries: self.host.history_entries,
            max_leases_per_session: self.limits.max_leases_per_session,
            max_reservations_per_session: self.limits.max_reservations_per_session,
            max_spaces: self.limits.max_spaces,
            hash_seed,
        })
    }

    fn check_listen(&self) -> Result<(), ConfigError> {
        let ServerConfig { listen, http_listen, allow_insecure_network, .. } = self.server;
        for (name, address) in [("server.listen", listen), ("server.http_listen", http_listen)] {
            if !address.ip().is_loopback() && !allow_insecure_network {
                return Err(ConfigError::Value(format!(
                    "{name} is {address}: listening beyond loopback without TLS and authentication lets anybody on the \
                     network read and fill the cache. Use a loopback address, or set server.allow_insecure_network"
                )));
            }
        }
        Ok(())
    }
}
