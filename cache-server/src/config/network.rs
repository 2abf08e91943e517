//! Settings of everything that others can connect to: TLS, tokens, data paths.

use super::ConfigError;
use cairn_transfer::QuicOptions;
use cairn_transfer::quic::{MAX_MTU, MIN_MTU};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// TLS for every network path.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsConfig {
    /// The server's certificate chain, PEM.
    pub cert_file: Option<PathBuf>,
    /// Its private key, PEM.
    pub key_file: Option<PathBuf>,
    /// Certificates of this authority (PEM) are required of clients: mutual TLS.
    pub client_ca_file: Option<PathBuf>,
}

/// Data paths besides gRPC.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WiresConfig {
    /// Offer shared memory to clients on this host.
    pub shm: bool,
    /// Its Unix socket. Absent: one in a folder of this user.
    pub shm_path: Option<PathBuf>,
    /// User ids whose processes may connect to it, besides root and the server's own.
    pub shm_users: Vec<u32>,
    /// Memory of one client connection to publish from.
    pub staging_mib: u64,
    /// Of all together.
    pub staging_total_mib: usize,
    /// Address of the TLS (TCP) and QUIC (UDP) data paths; they need `[tls]`. Port 0 picks a free one. Absent: port 7079 at the address of
    /// `server.listen`.
    pub data_listen: Option<SocketAddr>,
    /// Offer TLS over TCP.
    pub tls: bool,
    /// Offer QUIC.
    pub quic: bool,
    /// Address of an RDMA device, for clients that have one too; needs `[tls]` and a build with the feature `rdma`. Block bytes are not
    /// encrypted on that path. Port 0 picks a free one. Absent: no RDMA.
    pub rdma_listen: Option<SocketAddr>,
    /// UDP payload that QUIC starts with. Larger ones are found by probing.
    pub quic_initial_mtu: u16,
    /// Largest UDP payload that QUIC probes for.
    pub quic_max_mtu: u16,
    /// Bytes on their way in one stream; twice as many in all streams of a connection.
    pub quic_window_mib: u32,
    /// `cubic`, `newreno` or `bbr`.
    pub quic_congestion: String,
    /// Streams that carry the blocks of one fetch.
    pub quic_lanes: u32,
}

/// A bearer token.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenConfig {
    /// Whose spaces it opens.
    pub tenant: String,
    /// `read`, `publish`, `admin`. The last one concerns the whole server, and all tenants.
    pub rights: Vec<String>,
    /// The token's BLAKE3 hash in hexadecimal: the token itself need not be on the server.
    pub blake3: Option<String>,
    /// Or a file with the token.
    pub file: Option<PathBuf>,
}

impl std::fmt::Debug for TokenConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TokenConfig")
            .field("tenant", &self.tenant)
            .field("rights", &self.rights)
            .finish_non_exhaustive()
    }
}

impl Default for WiresConfig {
    fn default() -> Self {
        Self {
            shm: true,
            shm_path: None,
            shm_users: Vec::new(),
            staging_mib: 16,
            staging_total_mib: 1024,
            data_listen: None,
            tls: true,
            quic: true,
            rdma_listen: None,
            quic_initial_mtu: MIN_MTU,
            quic_max_mtu: MAX_MTU,
            quic_window_mib: 8,
            quic_congestion: "cubic".into(),
            quic_lanes: 4,
        }
    }
}

/// Beside the gRPC port's default.
const DATA_PORT: u16 = 7079;

impl WiresConfig {
    /// Where the data paths of a server listen whose API listens there.
    pub(crate) fn data_address(&self, listen: SocketAddr) -> SocketAddr {
        self.data_listen.unwrap_or(SocketAddr::new(listen.ip(), DATA_PORT))
    }

    /// Where clients on this host connect. The name differs between any two starts.
    pub(crate) fn shm_path(&self, epoch: u64) -> PathBuf {
        let folder = || {
            let user = rustix::process::geteuid().as_raw();
            std::env::temp_dir().join(format!("cairn-{user}")).join(format!("{epoch:016x}.sock"))
        };
        self.shm_path.clone().unwrap_or_else(folder)
    }

    /// # Errors
    /// When a value cannot work.
    pub(crate) fn quic(&self) -> Result<QuicOptions, ConfigError> {
        let wrong = |text: String| Err(ConfigError::Value(text));
        let (initial, max) = (self.quic_initial_mtu, self.quic_max_mtu);
        if initial < MIN_MTU || max < initial || max > MAX_MTU {
            return wrong(format!(
                "wires.quic_initial_mtu is {initial} and quic_max_mtu {max}; they must be {MIN_MTU} to {MAX_MTU}, in this order"
            ));
        }
        if !(1..=1024).contains(&self.quic_window_mib) {
            return wrong(format!("wires.quic_window_mib is {}; it must be 1 to 1024", self.quic_window_mib));
        }
        if !(1..=64).contains(&self.quic_lanes) {
            return wrong(format!("wires.quic_lanes is {}; it must be 1 to 64", self.quic_lanes));
        }
        Ok(QuicOptions {
            initial_mtu: initial,
            max_mtu: max,
            window_bytes: self.quic_window_mib << 20,
            congestion: self.quic_congestion.parse().map_err(ConfigError::Value)?,
            lanes: self.quic_lanes,
        })
    }

    pub(super) fn check(&self, tls: &TlsConfig) -> Result<(), ConfigError> {
        self.quic()?;
        if self.rdma_listen.is_some() {
            let wrong = |text: &str| Err(ConfigError::Value(format!("wires.rdma_listen {text}")));
            if !cairn_transfer::HAS_RDMA {
                return wrong("needs a build with RDMA (cargo build --release --features rdma)");
            }
            if tls.cert_file.is_none() {
                return wrong("needs [tls]: clients are let in over a TLS data connection");
            }
        }
        if !self.shm_users.is_empty() && self.shm_path.is_none() {
            let text =
                "wires.shm_users needs wires.shm_path: the default folder is for the server's user only";
            return Err(ConfigError::Value(text.into()));
        }
        let total = self.staging_total_mib as u64;
        if self.staging_mib == 0 || self.staging_mib > total || total > u64::from(u32::MAX) {
            let text = format!(
                "wires.staging_mib ({}) must be at least 1, and at most wires.staging_total_mib ({total})",
                self.staging_mib
            );
            return Err(ConfigError::Value(text));
        }
        Ok(())
    }
}

impl TokenConfig {
    /// What the server compares with.
    pub(crate) fn hash(&self) -> Result<blake3::Hash, ConfigError> {
        let wrong = |text: String| ConfigError::Value(format!("a token of tenant {:?}: {text}", self.tenant));
        match (&self.blake3, &self.file) {
            (Some(hex), None) => blake3::Hash::from_hex(hex.trim())
                .map_err(|_| wrong("blake3 must be 64 hexadecimal digits".into())),
            (None, Some(file)) => {
                let text = read(file)?;
                match text.trim() {
                    "" => Err(wrong(format!("{} is empty", file.display()))),
                    token => Ok(blake3::hash(token.as_bytes())),
                }
            }
            _ => Err(wrong("give blake3 or file, one of them".into())),
        }
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.display().to_string(), source })
}

impl TlsConfig {
    /// What the server shows and requires; `None` when TLS is not configured.
    ///
    /// # Errors
    /// When a file cannot be read or does not hold what it should.
    pub(crate) fn server(&self) -> Result<Option<rustls::ServerConfig>, ConfigError> {
        let (cert_file, key_file) = match (&self.cert_file, &self.key_file) {
            (None, None) if self.client_ca_file.is_none() => return Ok(None),
            (Some(cert_file), Some(key_file)) => (cert_file, key_file),
            _ => return Err(ConfigError::Value("tls needs both cert_file and key_file".into())),
        };
        let wrong = |path: &Path, error: &dyn std::fmt::Display| {
            ConfigError::Value(format!("{} cannot be used for TLS: {error}", path.display()))
        };
        let chain = certificates(cert_file)?;
        let key = PrivateKeyDer::from_pem_slice(read(key_file)?.as_bytes());
        let key = key.map_err(|error| wrong(key_file, &error))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| wrong(cert_file, &error))?;
        let builder = match &self.client_ca_file {
            None => builder.with_no_client_auth(),
            Some(file) => {
                let mut roots = rustls::RootCertStore::empty();
                for certificate in certificates(file)? {
                    roots.add(certificate).map_err(|error| wrong(file, &error))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
                builder.with_client_cert_verifier(verifier.build().map_err(|error| wrong(file, &error))?)
            }
        };
        let config = builder.with_single_cert(chain, key).map_err(|error| wrong(cert_file, &error))?;
        Ok(Some(config))
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let text = read(path)?;
    let parsed = CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<Vec<_>, _>>();
    match parsed {
        Ok(chain) if !chain.is_empty() => Ok(chain),
        _ => Err(ConfigError::Value(format!("{} holds no certificate in PEM", path.display()))),
    }
}
