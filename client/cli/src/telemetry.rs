//! Logging: where it goes and how it looks.

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

#[derive(Args)]
pub(crate) struct LogOptions {
    /// What to log: error, warn, info, debug or trace, or a filter such as cairn_server=debug.
    /// [default: info; for benches warn]
    #[arg(long, global = true, env = "CAIRN_LOG", value_name = "FILTER")]
    log: Option<String>,
    /// How to log it.
    #[arg(long, global = true, default_value = "text", value_enum)]
    log_format: LogFormat,
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Logs go to standard error; standard output is for results.
pub(crate) fn start(options: &LogOptions, usual: &str) {
    let log = options.log.as_deref().unwrap_or(usual);
    let filter = EnvFilter::try_new(log).unwrap_or_else(|error| {
        eprintln!("cairn: --log {log:?} is not a filter ({error}); logging {usual}");
        EnvFilter::new(usual)
    });
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match options.log_format {
        LogFormat::Text => {
            builder.with_target(false).with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).init()
        }
        LogFormat::Json => builder.json().init(),
    }
}
