//! `cairn serve`.

use crate::signals::Supervision;
use crate::{CliError, block_on};
use cairn_server::{Config, DeviceEntry, Server};
use clap::Args;
use std::net::SocketAddr;
use std::path::PathBuf;

#[derive(Args)]
pub(crate) struct ServeOptions {
    /// TOML file with all settings; see deploy/cairn.toml.
    #[arg(long, env = "CAIRN_CONFIG")]
    config: Option<PathBuf>,
    /// Address of the gRPC services [default: 127.0.0.1:7077].
    #[arg(long, env = "CAIRN_LISTEN")]
    listen: Option<SocketAddr>,
    /// Address of metrics and health [default: 127.0.0.1:7078].
    #[arg(long, env = "CAIRN_HTTP_LISTEN")]
    http_listen: Option<SocketAddr>,
    /// Host memory for blocks, in MiB [default: 1024].
    #[arg(long, env = "CAIRN_CAPACITY_MIB")]
    capacity_mib: Option<u64>,
    /// What leaves memory when there is no room: cairn, lru, fifo, lfu, s3fifo, sieve, arc or wtinylfu [default: cairn].
    #[arg(long)]
    policy: Option<String>,
    /// A directory for the NVMe tier; it must exist, and be empty or Cairn's. For more than one, see the config file.
    #[arg(long, env = "CAIRN_NVME_DIR", value_name = "PATH", requires = "nvme_mib")]
    nvme_dir: Option<PathBuf>,
    /// All that this directory may hold, in MiB.
    #[arg(long, env = "CAIRN_NVME_MIB", value_name = "MIB", requires = "nvme_dir")]
    nvme_mib: Option<u64>,
    /// Size of its segment files, in MiB [default: 256].
    #[arg(long, value_name = "MIB")]
    nvme_segment_mib: Option<u64>,
    /// Memory of each GPU for the blocks that are read most there, in MiB; 0: none [default: 0]. Which GPUs: see the config file.
    #[arg(long, env = "CAIRN_GPU_MIB", value_name = "MIB")]
    gpu_mib: Option<u64>,
    /// Listen beyond loopback without TLS and authentication.
    #[arg(long)]
    allow_insecure_network: bool,
    #[command(flatten)]
    supervision: Supervision,
}

impl ServeOptions {
    fn config(self) -> Result<Config, CliError> {
        let mut config = match &self.config {
            Some(path) => Config::from_file(path).map_err(CliError::failed)?,
            None => Config::default(),
        };
        let server = &mut config.server;
        server.listen = self.listen.unwrap_or(server.listen);
        server.http_listen = self.http_listen.unwrap_or(server.http_listen);
        server.allow_insecure_network |= self.allow_insecure_network;
        config.host.capacity_mib = self.capacity_mib.unwrap_or(config.host.capacity_mib);
        config.host.policy = self.policy.unwrap_or(config.host.policy);
        config.nvme.segment_mib = self.nvme_segment_mib.unwrap_or(config.nvme.segment_mib);
        config.gpu.capacity_mib = self.gpu_mib.unwrap_or(config.gpu.capacity_mib);
        if let (Some(path), Some(capacity_mib)) = (self.nvme_dir, self.nvme_mib) {
            config.nvme.device.push(DeviceEntry { path, capacity_mib });
        }
        Ok(config)
    }
}

pub(crate) fn run(options: ServeOptions) -> Result<(), CliError> {
    let supervision = options.supervision.clone();
    let config = options.config()?;
    block_on(async move {
        let mut server = Server::start(config).await.map_err(CliError::failed)?;
        let addresses = [("address", server.address()), ("http_address", server.http_address())];
        supervision.announce(&addresses)?;
        tokio::select! {
            failed = server.failed() => return failed.map_err(CliError::failed),
            end = supervision.end() => end?,
        }
        server.shutdown().await.map_err(CliError::failed)
    })
}
