//! How a client behaves. Every time is a bound that the caller feels.

use crate::client::ClientError;
use cairn_proto::ErrorKind;
use cairn_transfer::quic::Congestion;
use cairn_transfer::{QuicOptions, WireKind};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Settings of a [`crate::CacheClient`].
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// Where the server is, as `http://host:port`, or `https://host:port` for TLS.
    pub endpoint: String,
    /// For the server's logs.
    pub name: String,
    /// Who this client is, and whom it trusts.
    pub security: Security,
    /// The only way for block bytes; `None` takes the best that works.
    pub wire: Option<WireKind>,
    /// How QUIC connections behave.
    pub quic: QuicOptions,
    /// Longest wait for a connection and its session.
    pub connect_timeout: Duration,
    /// Longest wait for a lookup; after it every block is a miss.
    pub lookup_timeout: Duration,
    /// Longest wait for the bytes of one fetch; after it what has not arrived is a miss.
    pub fetch_timeout: Duration,
    /// Longest wait for one publish; after it what is not acknowledged counts as not stored.
    pub publish_timeout: Duration,
    /// How long found blocks stay readable.
    pub lease_ttl: Duration,
}

/// Who a client is, and whom it trusts.
#[derive(Clone, Default)]
pub struct Security {
    /// A bearer token.
    pub token: Option<String>,
    /// Certificates of the authority that the server's must come from, PEM. Needed for `https://`.
    pub ca_file: Option<PathBuf>,
    /// The client's certificate chain, PEM, where the server requires one.
    pub cert_file: Option<PathBuf>,
    /// Its private key, PEM.
    pub key_file: Option<PathBuf>,
}

impl fmt::Debug for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Security")
            .field("token", &self.token.as_ref().map(|_| "..."))
            .field("ca_file", &self.ca_file)
            .field("cert_file", &self.cert_file)
            .field("key_file", &self.key_file)
            .finish()
    }
}

impl ClientOptions {
    /// Defaults for a server at `endpoint`.
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            name: "cairn-client".into(),
            security: Security::default(),
            wire: None,
            quic: QuicOptions { congestion: Congestion::Cubic, ..QuicOptions::default() },
            connect_timeout: Duration::from_secs(2),
            lookup_timeout: Duration::from_secs(1),
            fetch_timeout: Duration::from_secs(10),
            publish_timeout: Duration::from_secs(10),
            lease_ttl: Duration::from_secs(30),
        }
    }
}

/// TLS for both kinds of connection: gRPC's and the data paths'.
#[derive(Clone)]
pub(crate) struct Tls {
    pub(crate) data: Arc<rustls::ClientConfig>,
    pub(crate) grpc: tonic::transport::ClientTlsConfig,
}

impl Security {
    pub(crate) fn tls(&self) -> Result<Tls, ClientError> {
        let Some(ca_file) = &self.ca_file else {
            return Err(wrong("an https:// endpoint needs the certificate of its authority: set a CA file"));
        };
        let ca = read(ca_file)?;
        let mut roots = rustls::RootCertStore::empty();
        for certificate in certificates(ca_file, &ca)? {
            roots.add(certificate).map_err(|error| cannot_use(ca_file, &error))?;
        }
        let builder =
            rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .map_err(|error| wrong(error.to_string()))?
                .with_root_certificates(roots);
        let mut grpc = tonic::transport::ClientTlsConfig::new()
            .ca_certificate(tonic::transport::Certificate::from_pem(&ca));
        let mut data = match (&self.cert_file, &self.key_file) {
            (None, None) => builder.with_no_client_auth(),
            (Some(cert_file), Some(key_file)) => {
                let (cert, key) = (read(cert_file)?, read(key_file)?);
                grpc = grpc.identity(tonic::transport::Identity::from_pem(&cert, &key));
                let chain = certificates(cert_file, &cert)?;
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes());
                let key = key.map_err(|error| cannot_use(key_file, &error))?;
                builder.with_client_auth_cert(chain, key).map_err(|error| cannot_use(cert_file, &error))?
            }
            _ => return Err(wrong("a client certificate needs both its file and its key's")),
        };
        data.alpn_protocols = vec![cairn_transfer::ALPN.to_vec()];
        Ok(Tls { data: Arc::new(data), grpc })
    }
}

fn wrong(message: impl Into<String>) -> ClientError {
    ClientError { kind: ErrorKind::FixInput, message: message.into() }
}

fn cannot_use(path: &Path, error: &dyn fmt::Display) -> ClientError {
    wrong(format!("{} cannot be used for TLS: {error}", path.display()))
}

fn read(path: &Path) -> Result<String, ClientError> {
    std::fs::read_to_string(path).map_err(|error| wrong(format!("cannot read {}: {error}", path.display())))
}

fn certificates(path: &Path, text: &str) -> Result<Vec<CertificateDer<'static>>, ClientError> {
    let parsed = CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<Vec<_>, _>>();
    match parsed {
        Ok(chain) if !chain.is_empty() => Ok(chain),
        _ => Err(wrong(format!("{} holds no certificate in PEM", path.display()))),
    }
}
