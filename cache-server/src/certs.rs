//! A development authority: enough certificates to run everything with TLS on one's own machines. A real deployment brings its
//! own.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use thiserror::Error;

/// What to make.
#[derive(Clone, Debug)]
pub struct CertsOptions {
    /// The folder; made if need be.
    pub dir: PathBuf,
    /// Names and addresses that the server is reached by.
    pub hosts: Vec<String>,
    /// From now on, for so long.
    pub valid: Duration,
}

/// The files that were made.
#[derive(Clone, Debug)]
pub struct Certs {
    /// Whom clients and servers trust.
    pub ca: PathBuf,
    /// The server's certificate and key.
    pub server: (PathBuf, PathBuf),
    /// One client's, for mutual TLS.
    pub client: (PathBuf, PathBuf),
}

/// Why there are no certificates.
#[derive(Debug, Error)]
pub enum CertsError {
    /// A name that no certificate can carry.
    #[error("no certificate can be made: {0}")]
    Make(#[from] rcgen::Error),
    /// A file is there already.
    #[error("{0} is there already: move it away, or choose another folder")]
    Exists(PathBuf),
    /// The folder cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// Where.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Makes an authority, a server's certificate and a client's. The authority's own key is not kept: a new set of certificates comes
/// from a new authority.
///
/// # Errors
/// When a file exists or cannot be written, or a host is no name.
pub fn make(options: &CertsOptions) -> Result<Certs, CertsError> {
    let path = |name: &str| options.dir.join(name);
    let certs = Certs {
        ca: path("ca.pem"),
        server: (path("server.pem"), path("server.key")),
        client: (path("client.pem"), path("client.key")),
    };
    let (server, client) = (&certs.server, &certs.client);
    for file in [&certs.ca, &server.0, &server.1, &client.0, &client.1] {
        if file.exists() {
            return Err(CertsError::Exists(file.clone()));
        }
    }
    let mut ca = CertificateParams::new(Vec::new())?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    ca.distinguished_name.push(DnType::CommonName, "Cairn development authority");
    limit(&mut ca, options.valid);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;
    let folder = |source| CertsError::Write { path: options.dir.clone(), source };
    std::fs::create_dir_all(&options.dir).map_err(folder)?;
    write(&certs.ca, &ca.pem(), 0o644)?;
    let leaves = [
        (server, options.hosts.clone(), "cairn server", ExtendedKeyUsagePurpose::ServerAuth),
        (client, vec!["cairn-client".into()], "cairn client", ExtendedKeyUsagePurpose::ClientAuth),
    ];
    for ((cert_file, key_file), names, common_name, purpose) in leaves {
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.extended_key_usages = vec![purpose];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        limit(&mut params, options.valid);
        let key = KeyPair::generate()?;
        write(cert_file, &params.signed_by(&key, &ca)?.pem(), 0o644)?;
        write(key_file, &key.serialize_pem(), 0o600)?;
    }
    Ok(certs)
}

/// A little into the past, for clocks that are behind.
fn limit(params: &mut CertificateParams, valid: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - Duration::from_secs(3600)).into();
    params.not_after = (now + valid).into();
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), CertsError> {
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|source| CertsError::Write { path: path.to_owned(), source })
}

/// What a server keeps of a token.
pub fn token_hash(token: &str) -> String {
    blake3::hash(token.as_bytes()).to_hex().to_string()
}
