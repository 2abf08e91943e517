//! A process that ends with this one, however this one ends: by request, by Ctrl-C, or by being killed (the process
//! notices that its standard input closed).

use crate::CliError;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

/// Loading a large model from a slow disk.
const START_TIMEOUT: Duration = Duration::from_secs(300);

/// After this long a process that was asked to end is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) struct Process {
    name: &'static str,
    child: Child,
    address: String,
    scheme: &'static str,
}

impl Process {
    /// Starts this same program with other arguments and waits until it listens.
    pub(crate) async fn start(name: &'static str, arguments: &[&str]) -> Result<Self, CliError> {
        let program = std::env::current_exe().map_err(CliError::failed)?;
        let mut child = Command::new(program)
            .args(["--log", "warn"])
            .args(arguments)
            .arg("--supervised")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C at the terminal is for this process, which ends the others in its own time.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| CliError::Failed(format!("cannot start the {name}: {error}")))?;
        let output = child.stdout.take().ok_or_else(|| CliError::Failed("no pipe".into()))?;
        let mut line = String::new();
        let mut output = BufReader::new(output);
        let read = tokio::time::timeout(START_TIMEOUT, output.read_line(&mut line)).await;
        read.map_err(|_| CliError::Failed(format!("the {name} did not start in time")))?
            .map_err(CliError::failed)?;
        let announced: serde_json::Value = serde_json::from_str(&line).map_err(|_| {
            CliError::Failed(format!("the {name} ended before it was ready; its message is above"))
        })?;
        let address = announced["address"].as_str().unwrap_or_default().to_owned();
        Ok(Self { name, child, address, scheme: "http" })
    }

    pub(crate) fn name(&self) -> &'static str {
        self.name
    }

    /// It speaks TLS.
    pub(crate) fn with_tls(self) -> Self {
        Self { scheme: "https", ..self }
    }

    pub(crate) fn url(&self) -> String {
        format!("{}://{}", self.scheme, self.address)
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// SIGKILL: no farewell.
    pub(crate) async fn kill(&mut self) {
        // Already ended is fine.
        let _ = self.child.kill().await;
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    /// Asks it to end, and sees to it.
    pub(crate) async fn stop(mut self) {
        drop(self.child.stdin.take());
        if tokio::time::timeout(STOP_TIMEOUT, self.child.wait()).await.is_err() {
            eprintln!("cairn: the {} did not end by itself and is killed", self.name);
            // It is killed when dropped, too; here its end is awaited.
            let _ = self.child.kill().await;
        }
    }
}
