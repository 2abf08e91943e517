//! `cairn bench`: what a cache would do on given traffic, what this one does, and how that compares. The work is in `cairn-harness` and
//! `cairn-bench`; here are arguments, progress and tables.

mod compare;
mod diff;
mod hit_rate;
mod measured;
mod replay;
mod serve;
mod transfer;

use crate::CliError;
use clap::Subcommand;

#[derive(Subcommand)]
pub(crate) enum BenchCommand {
    /// Replay traces through every eviction policy and the optimum, at many sizes.
    HitRate(Box<hit_rate::HitRateArguments>),
    /// Send a trace through a real server, check every byte, and hold the hits against the model.
    Replay(Box<replay::ReplayArguments>),
    /// Move blocks over every wire, beside what the machine can do.
    Transfer(transfer::TransferArguments),
    /// Time to the first token with the cache off, cold and warm, here or at any OpenAI-compatible endpoint.
    Serve(Box<serve::ServeArguments>),
    /// Write and read the NVMe tier, beside a bare io_uring loop.
    Disk(transfer::DiskArguments),
    /// Measure other stores beside this one, in one run.
    Compare(compare::CompareArguments),
    /// Install what `compare` measures.
    #[command(subcommand)]
    Peers(compare::PeersCommand),
    /// Make a trace to replay, for those who have none.
    Workload(hit_rate::WorkloadArguments),
    /// Compare two reports.
    Diff(diff::DiffArguments),
}

pub(crate) fn run(command: BenchCommand) -> Result<(), CliError> {
    match command {
        BenchCommand::HitRate(arguments) => hit_rate::hit_rates(&arguments),
        BenchCommand::Replay(arguments) => replay::run(&arguments),
        BenchCommand::Transfer(arguments) => transfer::transfer(&arguments),
        BenchCommand::Serve(arguments) => serve::run(&arguments),
        BenchCommand::Disk(arguments) => transfer::disk(&arguments),
        BenchCommand::Compare(arguments) => compare::run(&arguments),
        BenchCommand::Peers(command) => compare::peers(command),
        BenchCommand::Workload(arguments) => hit_rate::workload(&arguments),
        BenchCommand::Diff(arguments) => diff::run(&arguments),
    }
}

fn not_negative(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number >= 0.0);
    number.ok_or_else(|| format!("{text:?} must be a number, not below 0"))
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|number: &f64| number.is_finite() && *number > 0.0);
    number.ok_or_else(|| format!("{text:?} must be a number above 0"))
}
