//! The settings of a server: one typed tree, read here and nowhere else. `deploy/cairn.toml` shows all of it.

mod gpu;
mod network;

pub use gpu::GpuConfig;
pub use network::{TlsConfig, TokenConfig, WiresConfig};

use crate::tiers::nvme::{DeviceOptions, KEY_BYTES};
use cairn_core::{CoreConfig, PolicyKind, TenantQuota};
use serde::Deserialize;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use thiserror::Error;

const MIB: u64 = 1 << 20;

/// Segments of a device: one open, one for reclaiming to go on, and something to reclaim.
const MIN_SEGMENTS: u64 = 4;

/// All settings.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the server listens and how it ends.
    pub server: ServerConfig,
    /// The host memory tier.
    pub host: HostConfig,
    /// The tier in the memory of GPUs. Without `capacity_mib` there is none.
    pub gpu: GpuConfig,
    /// The NVMe tier. Without a device there is none.
    pub nvme: NvmeConfig,
    /// TLS for every network path.
    pub tls: TlsConfig,
    /// Data paths besides gRPC.
    pub wires: WiresConfig,
    /// Bounds on what clients may hold.
    pub limits: LimitsConfig,
    /// Who may do what. Empty: everybody everything, on loopback only.
    pub token: Vec<TokenConfig>,
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
    /// Let metrics and health listen beyond loopback. They are plain HTTP and tell how busy the server is; nothing of what it
    /// holds.
    pub allow_insecure_http: bool,
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
    /// What leaves when there is no room: `cairn`, `lru`, `fifo`, `lfu`, `s3fifo`, `sieve`, `arc` or `wtinylfu`.
    pub policy: String,
    /// Touch all memory in the background at start: steady first writes, at the price of taking all of it at once.
    pub prefault: bool,
    /// Removed blocks that `explain` remembers. 40 bytes each.
    pub history_entries: usize,
}

/// The NVMe tier.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NvmeConfig {
    /// Its directories, best one a device. Blocks are spread over them in turn.
    pub device: Vec<DeviceEntry>,
    /// What leaves a device when there is no room. Same names as `host.policy`.
    pub policy: String,
    /// Which blocks are written: `always`, `second_use` or `predicted_reuse`. The latter two wear the device less and hit less.
    pub admission: String,
    /// Size of a segment file, for new directories. A device has at least four. Small ones are reclaimed in smaller steps; large
    /// ones keep large blocks together.
    pub segment_mib: u64,
    /// Share of each device that blocks may not use. More of it makes reclaiming cheaper.
    pub over_provision_percent: u8,
    /// Bytes written for each byte stored, at most; beyond it blocks leave early instead.
    pub max_write_amplification: f64,
    /// Bytes being written to one device at a time. A read waits for no more than these.
    pub write_in_flight_mib: u64,
    /// Background writing to one device. 0: no limit.
    pub write_mib_per_s: u64,
    /// Background checking of what one device holds. 0: none.
    pub scrub_mib_per_s: u64,
    /// Longest time that a written block can be lost to a power failure.
    pub sync_interval_ms: u64,
    /// How bytes are moved: `auto`, `io_uring` or `threads`.
    pub io: String,
}

/// One directory of the NVMe tier.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceEntry {
    /// The directory. It must exist and be empty, or be Cairn's.
    pub path: PathBuf,
    /// All that it may hold.
    pub capacity_mib: u64,
}

/// Bounds on what clients may hold.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Connections to the gRPC port at a time.
    pub max_connections: usize,
    /// Clients at a time.
    pub max_sessions: usize,
    /// Of them, those with the same token.
    pub max_sessions_per_token: usize,
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
    /// Longest step of a connection until it is known whose it is: TLS, the proof of a session's key, a queue pair, the first call.
    pub handshake_ms: u64,
}

/// One tenant's share.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantConfig {
    /// The name in its key spaces.
    pub name: String,
    /// Blocks that it may hold in host memory at a time. Absent: no quota.
    pub max_blocks: Option<u64>,
    /// Host memory that its blocks may take, in whole chunks. Shares that add up to no more than `host.capacity_mib` cannot be
    /// taken by others. Absent: no quota.
    pub max_mib: Option<u64>,
    /// A file with 32 bytes in hexadecimal: blocks of this tenant are encrypted on devices. Without the same key they cannot be
    /// read again.
    pub encryption_key_file: Option<PathBuf>,
    /// A command, and its arguments, that prints such a key.
    pub encryption_key_command: Option<Vec<String>>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: ([127, 0, 0, 1], 7077).into(),
            http_listen: ([127, 0, 0, 1], 7078).into(),
            allow_insecure_network: false,
            allow_insecure_http: false,
            shutdown_grace_ms: 10_000,
        }
    }
}

impl Default for HostConfig {
    fn default() -> Self {
        Self {
            capacity_mib: 1024,
            chunk_mib: 64,
            policy: "cairn".into(),
            prefault: true,
            history_entries: 65_536,
        }
    }
}

impl Default for NvmeConfig {
    fn default() -> Self {
        Self {
            device: Vec::new(),
            policy: "lru".into(),
            admission: "always".into(),
            segment_mib: 256,
            over_provision_percent: 10,
            max_write_amplification: 1.5,
            write_in_flight_mib: 32,
            write_mib_per_s: 0,
            scrub_mib_per_s: 16,
            sync_interval_ms: 100,
            io: "auto".into(),
        }
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            max_connections: 4096,
            max_sessions: 1024,
            max_sessions_per_token: 256,
            max_leases_per_session: 256,
            max_reservations_per_session: 256,
            max_spaces: 1024,
            fetch_timeout_ms: 30_000,
            publish_idle_ms: 10_000,
            handshake_ms: 5_000,
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
        self.wires.check(&self.tls)?;
        if self.limits.handshake_ms == 0 {
            return Err(ConfigError::Value(
                "limits.handshake_ms must be at least 1: nobody could connect".into(),
            ));
        }
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
        let quota = |t: &TenantConfig| TenantQuota {
            name: t.name.clone(),
            max_blocks: t.max_blocks,
            max_chunks: t.max_mib.map(|mib| usize::try_from(mib / chunk_mib).unwrap_or(usize::MAX)),
        };
        if let Some(tenant) = self.tenant.iter().find(|t| t.max_mib.is_some_and(|mib| mib < chunk_mib)) {
            let text =
                format!("tenant {:?}: max_mib must be at least host.chunk_mib ({chunk_mib})", tenant.name);
            return Err(ConfigError::Value(text));
        }
        Ok(CoreConfig {
            host_chunks,
            chunk_bytes,
            slot_align_bytes: crate::SLOT_ALIGN_BYTES,
            policy,
            admission: self.nvme.admission.parse().map_err(ConfigError::Value)?,
            tenants: self.tenant.iter().map(quota).collect(),
            history_entries: self.host.history_entries,
            max_leases_per_session: self.limits.max_leases_per_session,
            max_reservations_per_session: self.limits.max_reservations_per_session,
            max_spaces: self.limits.max_spaces,
            hash_seed,
        })
    }

    /// The directories of the NVMe tier.
    ///
    /// # Errors
    /// When a value cannot work or a key cannot be had.
    pub fn devices(&self) -> Result<Vec<DeviceOptions>, ConfigError> {
        self.check_nvme()?;
        let mut keys = HashMap::new();
        for tenant in &self.tenant {
            if let Some(key) = tenant.key()? {
                keys.insert(tenant.name.clone(), key);
            }
        }
        let options = |entry: &DeviceEntry| DeviceOptions {
            path: entry.path.clone(),
            capacity_bytes: entry.capacity_mib * MIB,
            segment_bytes: self.nvme.segment_mib * MIB,
            keys: keys.clone(),
            read_only: false,
        };
        Ok(self.nvme.device.iter().map(options).collect())
    }

    fn check_nvme(&self) -> Result<(), ConfigError> {
        let nvme = &self.nvme;
        let wrong = |text: String| Err(ConfigError::Value(text));
        nvme.policy.parse::<PolicyKind>().map_err(ConfigError::Value)?;
        if !["auto", "io_uring", "threads"].contains(&nvme.io.as_str()) {
            return wrong(format!("nvme.io is {:?}; known: auto, io_uring, threads", nvme.io));
        }
        if !(1..=1 << 20).contains(&nvme.segment_mib) {
            return wrong(format!("nvme.segment_mib is {}; it must be 1 to 1048576", nvme.segment_mib));
        }
        if nvme.over_provision_percent > 90 {
            return wrong("nvme.over_provision_percent must be at most 90".into());
        }
        if nvme.max_write_amplification.is_nan() || nvme.max_write_amplification < 1.0 {
            return wrong("nvme.max_write_amplification must be at least 1".into());
        }
        if nvme.write_in_flight_mib == 0 || nvme.sync_interval_ms == 0 {
            return wrong("nvme.write_in_flight_mib and nvme.sync_interval_ms must be at least 1".into());
        }
        for (i, entry) in nvme.device.iter().enumerate() {
            let path = entry.path.display();
            let least = MIN_SEGMENTS * nvme.segment_mib + 1;
            if entry.capacity_mib < least || entry.capacity_mib > u64::MAX / MIB {
                return wrong(format!(
                    "nvme.device {path}: capacity_mib is {}; with segments of {} MiB it must be at least {least}",
                    entry.capacity_mib, nvme.segment_mib
                ));
            }
            if nvme.device[..i].iter().any(|other| other.path == entry.path) {
                return wrong(format!("nvme.device {path} is listed twice"));
            }
        }
        Ok(())
    }

    fn check_listen(&self) -> Result<(), ConfigError> {
        let ServerConfig { listen, http_listen, allow_insecure_network, allow_insecure_http, .. } =
            self.server;
        let secure = self.tls.cert_file.is_some() && !self.token.is_empty();
        let data = ("wires.data_listen", self.wires.data_address(listen));
        let rdma = self.wires.rdma_listen.map(|address| ("wires.rdma_listen", address));
        for (name, address) in [("server.listen", listen), data].into_iter().chain(rdma) {
            if !address.ip().is_loopback() && !secure && !allow_insecure_network {
                return Err(ConfigError::Value(format!(
                    "{name} is {address}: listening beyond loopback without TLS and authentication lets anybody on the \
                     network read and fill the cache. Set tls.cert_file and tls.key_file (`cairn certs` makes some) and a \
                     [[token]] (`cairn token` makes one), use a loopback address, or set server.allow_insecure_network"
                )));
            }
        }
        if !http_listen.ip().is_loopback() && !allow_insecure_network && !allow_insecure_http {
            return Err(ConfigError::Value(format!(
                "server.http_listen is {http_listen}: metrics and health are plain HTTP. Use a loopback address, or set \
                 server.allow_insecure_http"
            )));
        }
        Ok(())
    }
}

impl TenantConfig {
    /// The key that its blocks are encrypted with.
    fn key(&self) -> Result<Option<[u8; KEY_BYTES]>, ConfigError> {
        let wrong = |text: String| ConfigError::Value(format!("tenant {:?}: {text}", self.name));
        let text = match (&self.encryption_key_file, &self.encryption_key_command) {
            (None, None) => return Ok(None),
            (Some(_), Some(_)) => {
                return Err(wrong("give encryption_key_file or encryption_key_command, not both".into()));
            }
            (Some(file), None) => std::fs::read_to_string(file)
                .map_err(|error| wrong(format!("cannot read {}: {error}", file.display())))?,
            (None, Some(command)) => {
                let (program, arguments) =
                    command.split_first().ok_or_else(|| wrong("encryption_key_command is empty".into()))?;
                let output = std::process::Command::new(program).args(arguments).output();
                let output = output.map_err(|error| wrong(format!("cannot run {program}: {error}")))?;
                if !output.status.success() {
                    return Err(wrong(format!("{program} ended with {}", output.status)));
                }
                String::from_utf8_lossy(&output.stdout).into_owned()
            }
        };
        let mut key = [0; KEY_BYTES];
        hex::decode_to_slice(text.trim(), &mut key)
            .map_err(|_| wrong(format!("its key must be {KEY_BYTES} bytes in hexadecimal")))?;
        Ok(Some(key))
    }
}
