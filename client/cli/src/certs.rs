//! `cairn certs` and `cairn token`: what a server needs to listen beyond loopback.

use crate::CliError;
use cairn_server::certs::{CertsOptions, make};
use clap::{Args, ValueEnum};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const SECONDS_OF_A_DAY: u64 = 86_400;

/// Random bytes of a token.
const TOKEN_BYTES: usize = 32;

#[derive(Args)]
pub(crate) struct CertsArguments {
    /// The folder for the files; made if need be.
    #[arg(long, default_value = "certs", value_name = "PATH")]
    dir: PathBuf,
    /// A name or address that the server is reached by; may be repeated.
    #[arg(long, default_values = ["localhost", "127.0.0.1", "::1"], value_name = "HOST")]
    host: Vec<String>,
    /// How long the certificates are good for.
    #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u64).range(1..=3650))]
    days: u64,
}

#[derive(Args)]
pub(crate) struct TokenArguments {
    /// Whose key spaces it opens.
    #[arg(long, default_value = "default")]
    tenant: String,
    /// What it allows; may be repeated.
    #[arg(long, value_enum, default_values = ["read", "publish"])]
    right: Vec<RightArgument>,
    /// Where to write the token, for this user only.
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum RightArgument {
    Read,
    Publish,
    Admin,
}

pub(crate) fn certs(arguments: CertsArguments) -> Result<(), CliError> {
    let valid = Duration::from_secs(arguments.days * SECONDS_OF_A_DAY);
    let options = CertsOptions { dir: arguments.dir, hosts: arguments.host, valid };
    let certs = make(&options).map_err(CliError::failed)?;
    println!("# For the server's config file:");
    println!("[tls]");
    println!("cert_file = {:?}", certs.server.0.display().to_string());
    println!("key_file = {:?}", certs.server.1.display().to_string());
    println!("# Require certificates of clients, too:");
    println!("#client_ca_file = {:?}", certs.ca.display().to_string());
    println!("# For clients: --ca {}", certs.ca.display());
    println!("# and then: --cert {} --key {}", certs.client.0.display(), certs.client.1.display());
    Ok(())
}

pub(crate) fn token(arguments: TokenArguments) -> Result<(), CliError> {
    let hash = new_token(&arguments.out)?;
    let rights: Vec<String> = arguments
        .right
        .iter()
        .filter_map(|right| right.to_possible_value())
        .map(|right| format!("{:?}", right.get_name()))
        .collect();
    println!("# For the server's config file; the token itself stays in {}", arguments.out.display());
    println!("[[token]]");
    println!("tenant = {:?}", arguments.tenant);
    println!("rights = [{}]", rights.join(", "));
    println!("blake3 = {hash:?}");
    Ok(())
}

/// Writes a random token to a new file; returns its hash, which is all that a server needs.
pub(crate) fn new_token(path: &Path) -> Result<String, CliError> {
    let mut secret = [0u8; TOKEN_BYTES];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut random| std::io::Read::read_exact(&mut random, &mut secret))
        .map_err(|error| CliError::Failed(format!("no random bytes: {error}")))?;
    let token = hex::encode(secret);
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    file.and_then(|mut file| writeln!(file, "{token}"))
        .map_err(|error| CliError::Failed(format!("cannot write {}: {error}", path.display())))?;
    Ok(cairn_server::certs::token_hash(&token))
}
