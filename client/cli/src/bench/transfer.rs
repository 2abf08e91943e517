//! `cairn bench transfer` and `cairn bench disk`.

use super::measured::{OutputArguments, measure};
use super::positive;
use crate::CliError;
use cairn_bench::{disk, transfer};
use cairn_transfer::quic::{MAX_MTU, MIN_MTU};
use clap::Args;
use std::path::PathBuf;

/// Memory of the server that is measured: room for the largest batches of all clients, several times.
const CAPACITY_MIB: u64 = 1536;

/// For small sizes.
const SMALL_CAPACITY_MIB: u64 = 64;

#[derive(Args)]
pub(crate) struct TransferArguments {
    #[command(flatten)]
    pub(super) sizes: SizeArguments,
    #[command(flatten)]
    pub(super) output: OutputArguments,
}

#[derive(Args)]
pub(super) struct SizeArguments {
    /// Sizes of a block in KiB, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "64,256,1024,4096", value_parser = clap::value_parser!(u32).range(2..=16_384))]
    blocks: Vec<u32>,
    /// Blocks of a request, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64", value_parser = clap::value_parser!(u32).range(1..=1024))]
    batches: Vec<u32>,
    /// Clients at a time, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "1,4", value_parser = clap::value_parser!(u32).range(1..=64))]
    clients: Vec<u32>,
    /// Length of one round of one of them.
    #[arg(long, default_value_t = 0.25, value_parser = seconds)]
    seconds: f64,
    /// Rounds of each, interleaved.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// The largest packets of QUIC, in bytes.
    #[arg(long, value_parser = clap::value_parser!(u16).range(i64::from(MIN_MTU)..=i64::from(MAX_MTU)))]
    mtu: Option<u16>,
}

/// Longest round: leases do not last for ever.
const MAX_SECONDS: f64 = 60.0;

fn seconds(text: &str) -> Result<f64, String> {
    let number = positive(text)?;
    if number <= MAX_SECONDS {
        Ok(number)
    } else {
        Err(format!("a round takes at most {MAX_SECONDS} seconds"))
    }
}

impl SizeArguments {
    pub(super) fn options(&self) -> Result<transfer::Options, CliError> {
        if let Some(odd) = self.blocks.iter().find(|kib| *kib % 2 == 1) {
            return Err(CliError::Usage(format!(
                "a block of {odd} KiB cannot be made here: give even numbers"
            )));
        }
        let most = |numbers: &[u32]| u64::from(numbers.iter().copied().max().unwrap_or(1));
        let at_once = most(&self.blocks) * most(&self.batches) * (most(&self.clients) + 1) / 1024;
        let wanted = if at_once < 8 { SMALL_CAPACITY_MIB } else { CAPACITY_MIB.max(2 * at_once) };
        let numbers = |numbers: &[u32]| numbers.iter().map(|number| *number as usize).collect();
        Ok(transfer::Options {
            blocks_kib: self.blocks.clone(),
            batches: numbers(&self.batches),
            clients: numbers(&self.clients),
            seconds: self.seconds,
            rounds: self.rounds as usize,
            mtu: self.mtu,
            peers: Vec::new(),
            capacity_mib: wanted,
        })
    }
}

pub(super) fn transfer(arguments: &TransferArguments) -> Result<(), CliError> {
    arguments.output.prepare()?;
    let options = arguments.sizes.options()?;
    let ((section, complete), _) =
        measure(|servers, seen| async move { transfer::run(&options, &servers, &*seen).await })?;
    arguments.output.finish("transfer", vec![section], complete)
}

#[derive(Args)]
pub(crate) struct DiskArguments {
    #[command(flatten)]
    pub(super) disk: DiskSizes,
    #[command(flatten)]
    output: OutputArguments,
}

#[derive(Args)]
pub(super) struct DiskSizes {
    /// A folder on the disk to measure [default: the system's temporary folder].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Sizes of a block in KiB, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "256,1024,4096", value_parser = clap::value_parser!(u32).range(4..=65_536))]
    disk_blocks: Vec<u32>,
    /// Requests at a time, separated by commas.
    #[arg(long, value_delimiter = ',', default_value = "1,8,16", value_parser = clap::value_parser!(u32).range(1..=256))]
    depths: Vec<u32>,
    /// Rounds of each, interleaved.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    disk_rounds: u32,
    /// Bytes of one round, in millions.
    #[arg(long, default_value_t = 768, value_parser = clap::value_parser!(u64).range(1..))]
    megabytes: u64,
}

impl DiskSizes {
    pub(super) fn options(&self, foyer: Option<PathBuf>) -> disk::Options {
        disk::Options {
            folder: self.dir.clone().unwrap_or_else(std::env::temp_dir),
            blocks_kib: self.disk_blocks.clone(),
            depths: self.depths.iter().map(|depth| *depth as usize).collect(),
            rounds: self.disk_rounds as usize,
            megabytes: self.megabytes,
            foyer,
        }
    }
}

pub(super) fn disk(arguments: &DiskArguments) -> Result<(), CliError> {
    arguments.output.prepare()?;
    let options = arguments.disk.options(None);
    let ((sections, complete), _) = measure(|_, seen| async move { disk::run(&options, &*seen).await })?;
    arguments.output.finish("disk", sections, complete)
}
