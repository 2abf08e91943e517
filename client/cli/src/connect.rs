//! How commands reach a server: arguments that they share.

use crate::CliError;
use cairn_client::{ClientOptions, Security, WireKind};
use clap::Args;
use std::path::PathBuf;

#[derive(Args, Clone)]
pub(crate) struct ConnectArguments {
    /// Certificates of the authority that the server's comes from, PEM. Needed for https://.
    #[arg(long, env = "CAIRN_CA", value_name = "PATH")]
    ca: Option<PathBuf>,
    /// A client certificate, PEM, where the server requires one.
    #[arg(long, env = "CAIRN_CERT", value_name = "PATH", requires = "key")]
    cert: Option<PathBuf>,
    /// Its private key, PEM.
    #[arg(long, env = "CAIRN_KEY", value_name = "PATH", requires = "cert")]
    key: Option<PathBuf>,
    /// A file with a bearer token.
    #[arg(long, env = "CAIRN_TOKEN_FILE", value_name = "PATH")]
    token_file: Option<PathBuf>,
    /// The only way for block bytes: shm, rdma, quic, tls or grpc [default: the best that works].
    #[arg(long, env = "CAIRN_WIRE", value_name = "WIRE", value_parser = wire)]
    wire: Option<WireKind>,
    /// MiB on their way in one QUIC stream: more for long paths.
    #[arg(long, env = "CAIRN_QUIC_WINDOW_MIB", value_name = "MIB", default_value_t = 8,
        value_parser = clap::value_parser!(u32).range(1..=1024))]
    quic_window_mib: u32,
}

/// The wires that a person can ask for in this build.
pub(crate) fn wire(name: &str) -> Result<WireKind, String> {
    match name.parse()? {
        WireKind::Mem => Err("mem is for servers inside the same process".into()),
        WireKind::Rdma if !cairn_client::HAS_RDMA => {
            Err("this build has no RDMA; cargo build --release --features rdma makes one that has".into())
        }
        kind => Ok(kind),
    }
}

impl ConnectArguments {
    /// Options for a server at `endpoint`.
    pub(crate) fn options(&self, endpoint: &str) -> Result<ClientOptions, CliError> {
        let token = match &self.token_file {
            None => None,
            Some(path) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|error| CliError::Failed(format!("cannot read {}: {error}", path.display())))?;
                Some(text.trim().to_owned())
            }
        };
        let mut options = ClientOptions::new(endpoint);
        options.security = Security {
            token,
            ca_file: self.ca.clone(),
            cert_file: self.cert.clone(),
            key_file: self.key.clone(),
        };
        options.wire = self.wire;
        options.quic.window_bytes = self.quic_window_mib << 20;
        Ok(options)
    }
}
