//! How a long-running command begins and ends: Ctrl-C, the service manager's request, or the end of whoever started it.

use crate::CliError;
use clap::Args;
use std::io::Write;
use std::net::SocketAddr;
use tokio::io::AsyncReadExt;
use tokio::signal::unix::{SignalKind, signal};

/// For processes that another one starts and ends.
#[derive(Args, Clone)]
pub(crate) struct Supervision {
    /// Print the bound addresses as one JSON line when ready, and end when standard input closes.
    #[arg(long)]
    supervised: bool,
}

impl Supervision {
    /// Tells the supervisor, if there is one, where this process listens.
    pub(crate) fn announce(&self, addresses: &[(&str, SocketAddr)]) -> Result<(), CliError> {
        if !self.supervised {
            return Ok(());
        }
        let fields = addresses.iter().map(|(name, address)| ((*name).to_owned(), address.to_string().into()));
        let line = serde_json::Value::Object(fields.collect());
        let mut out = std::io::stdout().lock();
        writeln!(out, "{line}").and_then(|()| out.flush()).map_err(CliError::failed)
    }

    /// Completes when this process should end.
    pub(crate) async fn end(&self) -> Result<(), CliError> {
        tokio::select! {
            signal = termination() => signal,
            () = input_closed(), if self.supervised => Ok(()),
        }
    }
}

/// Completes at the first SIGINT or SIGTERM.
pub(crate) async fn termination() -> Result<(), CliError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(CliError::failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(CliError::failed)?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

async fn input_closed() {
    let mut input = tokio::io::stdin();
    let mut byte = [0];
    // Any failure to read means that nobody holds the other end.
    while input.read(&mut byte).await.is_ok_and(|count| count > 0) {}
}
