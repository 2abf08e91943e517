//! The one command that people type. Each subcommand is a file; what it does is in the libraries.

#![forbid(unsafe_code)]

mod bench;
mod certs;
mod completions;
mod connect;
mod demo;
mod disk;
mod doctor;
mod fleet;
mod inspect;
mod kernels;
mod model;
mod serve;
mod signals;
mod telemetry;
mod worker;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Cairn: KV-cache storage and transfer for LLM inference.
#[derive(Parser)]
#[command(name = "cairn", version, about, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    telemetry: telemetry::LogOptions,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Start a server and two workers, run a real model, and show what the cache saves.
    Demo(demo::DemoOptions),
    /// Run a cache server.
    Serve(serve::ServeOptions),
    /// Run an inference worker with an OpenAI-style HTTP endpoint.
    Worker(worker::WorkerArguments),
    /// Fetch models.
    #[command(subcommand)]
    Model(model::ModelCommand),
    /// Ask a server how much of a prompt it has.
    Lookup(inspect::PromptOptions),
    /// Ask a server where the blocks of a prompt are, or what became of them.
    Explain(inspect::PromptOptions),
    /// Show a server's totals.
    Stats(inspect::StatsOptions),
    /// Compile the CUDA kernels ahead of time, or check them.
    #[command(subcommand)]
    Kernels(kernels::KernelsCommand),
    /// Look after directories of the NVMe tier.
    #[command(subcommand)]
    Disk(disk::DiskCommand),
    /// Say what this machine has, what Cairn makes of it, and what would mend what is missing.
    Doctor(doctor::DoctorArguments),
    /// Measure what a cache would do, what this one does, and others beside it.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Make a development authority and certificates for TLS.
    Certs(certs::CertsArguments),
    /// Make a bearer token.
    Token(certs::TokenArguments),
    /// Print a completion script for a shell.
    Completions(completions::CompletionOptions),
}

/// Exit status of a wrong use, as clap has it.
const USAGE_ERROR: u8 = 2;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // The servers that a bench starts are not news.
    let usual = if matches!(cli.command, Command::Bench(_)) { "warn" } else { "info" };
    telemetry::start(&cli.telemetry, usual);
    let result = match cli.command {
        Command::Demo(options) => demo::run(options),
        Command::Serve(options) => serve::run(options),
        Command::Worker(options) => worker::run(options),
        Command::Model(command) => model::run(command),
        Command::Lookup(options) => inspect::lookup(options),
        Command::Explain(options) => inspect::explain(options),
        Command::Stats(options) => inspect::stats(options),
        Command::Kernels(command) => kernels::run(command),
        Command::Disk(command) => disk::run(command),
        Command::Doctor(arguments) => doctor::run(&arguments),
        Command::Bench(command) => bench::run(command),
        Command::Certs(arguments) => certs::certs(arguments),
        Command::Token(arguments) => certs::token(arguments),
        Command::Completions(options) => {
            completions::run(&options);
            Ok(())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(CliError::Interrupted) => ExitCode::from(130),
        Err(error) => {
            eprintln!("cairn: {error}");
            ExitCode::from(if matches!(error, CliError::Usage(_)) { USAGE_ERROR } else { 1 })
        }
    }
}

/// What ends a command early.
#[derive(Debug, thiserror::Error)]
enum CliError {
    /// Wrong arguments that clap cannot see.
    #[error("{0}")]
    Usage(String),
    /// Anything else, in words for people.
    #[error("{0}")]
    Failed(String),
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

impl CliError {
    fn failed(error: impl std::fmt::Display) -> Self {
        Self::Failed(error.to_string())
    }
}

/// Longest wait for background work once a command is over.
const SHUTDOWN_TIMEOUT: std::time::Duration = std::time::Duration::from_millis(200);

/// Runs a command's future to its end.
fn block_on<T>(future: impl Future<Output = Result<T, CliError>>) -> Result<T, CliError> {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(CliError::failed)?;
    let result = runtime.block_on(future);
    // A blocking read of standard input, or a model still being loaded, must not hold the process up.
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    result
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn no_two_arguments_of_a_command_are_confused() {
        super::Cli::command().debug_assert();
    }
}
