//! `cairn completions`.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

#[derive(Args)]
pub(crate) struct CompletionOptions {
    /// Which shell.
    #[arg(value_enum)]
    shell: Shell,
}

pub(crate) fn run(options: &CompletionOptions) {
    clap_complete::generate(options.shell, &mut crate::Cli::command(), "cairn", &mut std::io::stdout());
}
