//! Servers and workers run as a deployment should: TLS everywhere, and a token. Certificates and token live in a folder that goes with them.

use crate::CliError;
use crate::certs::new_token;
use crate::connect::ConnectArguments;
use cairn_client::WireKind;
use cairn_server::certs::{CertsOptions, make};
use clap::Parser;
use std::net::Ipv4Addr;
use std::time::Duration;
use tempfile::TempDir;

/// Longer than any of it.
const VALID: Duration = Duration::from_secs(86_400);

pub(crate) struct Secure {
    /// Of the server.
    pub(crate) config: String,
    /// Of everybody who connects to it.
    pub(crate) arguments: Vec<String>,
    /// Removed at the end.
    _folder: TempDir,
}

/// Parses the same arguments as the workers do.
#[derive(Parser)]
struct Connect {
    #[command(flatten)]
    arguments: ConnectArguments,
}

impl Secure {
    /// With one wire only, or the best.
    pub(crate) fn new(wire: Option<WireKind>) -> Result<Self, CliError> {
        let folder = tempfile::tempdir().map_err(CliError::failed)?;
        let path = |name: &str| folder.path().join(name).display().to_string();
        let hosts = vec!["127.0.0.1".into()];
        let options_of = CertsOptions { dir: folder.path().to_owned(), hosts, valid: VALID };
        let certs = make(&options_of).map_err(CliError::failed)?;
        let token = path("token");
        new_token(token.as_ref())?;
        let config = path("cairn.toml");
        let rdma = match wire {
            Some(WireKind::Rdma) => format!("rdma_listen = \"{}:0\"\n", rdma_address()?),
            _ => String::new(),
        };
        let text = format!(
            "[tls]\ncert_file = {:?}\nkey_file = {:?}\n[wires]\ndata_listen = \"127.0.0.1:0\"\n{rdma}\
             [[token]]\ntenant = \"default\"\nrights = [\"read\", \"publish\", \"admin\"]\nfile = {token:?}\n",
            certs.server.0.display().to_string(),
            certs.server.1.display().to_string(),
        );
        std::fs::write(&config, text).map_err(CliError::failed)?;
        let mut arguments =
            vec!["--ca".to_owned(), certs.ca.display().to_string(), "--token-file".into(), token];
        if let Some(wire) = wire {
            arguments.extend(["--wire".into(), wire.to_string()]);
        }
        Ok(Self { config, arguments, _folder: folder })
    }

    /// For questions of one's own to the server.
    pub(crate) fn connect(&self) -> Result<ConnectArguments, CliError> {
        let arguments = std::iter::once("cairn").chain(self.arguments.iter().map(String::as_str));
        Connect::try_parse_from(arguments).map(|connect| connect.arguments).map_err(CliError::failed)
    }
}

fn rdma_address() -> Result<Ipv4Addr, CliError> {
    let found = cairn_client::rdma_addresses().into_iter().next();
    found.ok_or_else(|| {
        CliError::Failed(
            "there is no RDMA device with an IPv4 address on this machine (`rdma link` lists devices)".into(),
        )
    })
}
