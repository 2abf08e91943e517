//! Other stores, where they are installed: asked in the same run, with the same sizes. Each lives in a folder of its own below the peers'
//! folder, where [`setup`] puts it.

mod redis;
mod setup;

pub(crate) use redis::Redis;
pub use setup::{Kind, setup};

use crate::{BenchError, OrFail};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A store to measure beside Cairn.
#[derive(Clone, Debug)]
pub enum Peer {
    /// A server of Redis or Valkey, at a port of loopback.
    Redis {
        /// As it is called in tables.
        name: String,
        /// Of loopback.
        port: u16,
    },
    /// Stores that are driven by a script of ours, with the Python that has their package.
    Script {
        /// As it is called in messages.
        kind: Kind,
        /// With the package.
        python: PathBuf,
    },
}

/// What one mode of a script measured.
pub(crate) struct Mode {
    /// As it is called in tables.
    pub(crate) name: String,
    pub(crate) gb_per_s: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
}

/// A process of ours that is killed at the end.
pub struct Server(Child);

impl Server {
    fn start(mut command: Command, program: &Path) -> Result<Self, BenchError> {
        // Ctrl-C at the terminal is not for it.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        Ok(Self(command.spawn().or_fail(&program.display().to_string())?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ended already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Peers that are ready to be measured.
#[derive(Default)]
pub struct Found {
    /// To measure over the network or shared memory.
    pub peers: Vec<Peer>,
    /// The program that drives foyer, for disks.
    pub foyer: Option<PathBuf>,
    /// What is left out, and why.
    pub skipped: Vec<String>,
    /// Kept as long as they are needed.
    pub servers: Vec<Server>,
}

/// Starts or finds everything that is installed in `folder`.
///
/// # Errors
/// When something that is installed does not start.
pub async fn find(folder: &Path, wanted: &[Kind]) -> Result<Found, BenchError> {
    let mut found = Found::default();
    for kind in wanted.iter().copied() {
        let Some(program) = setup::program(folder, kind) else {
            let hint = format!("{}: not installed (cairn bench peers setup {})", kind.name(), kind.name());
            found.skipped.push(hint);
            continue;
        };
        match kind {
            Kind::Redis => {
                let (server, port) = redis::serve(&program, setup::libraries(folder).as_deref()).await?;
                found.servers.push(server);
                found.peers.push(Peer::Redis { name: "redis".into(), port });
            }
            Kind::Mooncake | Kind::LmCache => found.peers.push(Peer::Script { kind, python: program }),
            Kind::Foyer => found.foyer = Some(program),
        }
    }
    Ok(found)
}

/// Runs the script of a kind with its Python: blocks of `bytes`, `batch` at a time, by so many clients.
pub(crate) async fn run_script(
    kind: Kind,
    python: &Path,
    (bytes, batch, clients): (usize, usize, usize),
    seconds: f64,
) -> Result<Vec<Mode>, BenchError> {
    let script = tempfile::Builder::new().suffix(".py").tempfile().or_fail("a temporary file")?;
    std::fs::write(script.path(), kind.script()).or_fail("a temporary file")?;
    let numbers = [bytes.to_string(), batch.to_string(), clients.to_string(), seconds.to_string()];
    let mut command = tokio::process::Command::new(python);
    command.arg(script.path()).args(numbers).stdin(Stdio::null()).process_group(0).kill_on_drop(true);
    let output = command.output().await.or_fail(&python.display().to_string())?;
    let text = String::from_utf8_lossy(&output.stdout);
    let modes: Vec<Mode> = text.lines().filter_map(mode).collect();
    if modes.is_empty() {
        let why = String::from_utf8_lossy(&output.stderr);
        let last = why.lines().last().unwrap_or("it said nothing");
        return Err(BenchError(format!("{} was not measured: {last}", kind.name())));
    }
    Ok(modes)
}

fn mode(line: &str) -> Option<Mode> {
    let mut parts = line.strip_prefix("RESULT ")?.split('\t');
    let name = parts.next()?.to_owned();
    let mut number = || parts.next()?.parse().ok();
    Some(Mode { name, gb_per_s: number()?, p50_us: number()?, p99_us: number()? })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn results_of_scripts_are_read() {
        let found = mode("RESULT mooncake tcp get\t1.5\t20\t30.25").unwrap();
        assert_eq!((found.name.as_str(), found.gb_per_s, found.p99_us), ("mooncake tcp get", 1.5, 30.25));
        assert!(mode("RESULT half\t1").is_none() && mode("a warning").is_none());
    }

    #[tokio::test]
    async fn what_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let found = find(folder.path(), &[Kind::Mooncake, Kind::Foyer]).await.unwrap();
        assert!(found.peers.is_empty() && found.foyer.is_none());
        assert!(found.skipped[0].contains("peers setup mooncake"), "{:?}", found.skipped);
        let python = Path::new("/no/such/python");
        let error = run_script(Kind::Mooncake, python, (1, 1, 1), 0.1).await.err().unwrap();
        assert!(error.to_string().contains("/no/such/python"));
    }
}
