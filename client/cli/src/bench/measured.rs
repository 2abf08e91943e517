//! What the measuring benches share on a terminal: progress, Ctrl-C, tables, reports.

use crate::signals::termination;
use crate::{CliError, block_on};
use cairn_bench::{BenchError, Watch};
use cairn_harness::report::{Made, Report};
use cairn_harness::section::{Role, Section};
use clap::Args;
use comfy_table::{CellAlignment, Table};
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::runtime::Handle;

/// Threads of the far ends, and of the near ones: as in two processes.
const THREADS: usize = 2;

#[derive(Args)]
pub(super) struct OutputArguments {
    /// A folder for JSON, CSV and a page with plots.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Print the report as JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// A bar on the terminal; Ctrl-C ends the bench at its next step, a second one at once.
pub(super) struct Seen {
    bar: ProgressBar,
    stop: AtomicBool,
}

impl Seen {
    fn new() -> Self {
        let bar = ProgressBar::new(1);
        if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} ({elapsed})") {
            bar.set_style(style);
        }
        Self { bar, stop: AtomicBool::new(false) }
    }
}

impl Watch for Seen {
    fn begin(&self, steps: usize) {
        self.bar.set_length(steps as u64);
        self.bar.set_position(0);
    }

    fn step(&self, what: &str) {
        self.bar.set_message(what.to_owned());
        self.bar.inc(1);
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Runs a bench, with the far ends on a runtime of their own. Returns also whether it was ended early.
pub(super) fn measure<T, F>(bench: impl FnOnce(Handle, Arc<Seen>) -> F) -> Result<(T, bool), CliError>
where
    F: Future<Output = Result<T, BenchError>>,
{
    let far = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build();
    let far = far.map_err(CliError::failed)?;
    let seen = Arc::new(Seen::new());
    let result = block_on(async {
        let bench = bench(far.handle().clone(), seen.clone());
        tokio::pin!(bench);
        let result = tokio::select! {
            result = &mut bench => result,
            heard = termination() => {
                heard?;
                seen.stop.store(true, Ordering::Relaxed);
                seen.bar.set_message("ending; once more to end at once");
                tokio::select! {
                    result = &mut bench => result,
                    heard = termination() => {
                        heard?;
                        return Err(CliError::Interrupted);
                    }
                }
            }
        };
        result.map_err(CliError::failed)
    });
    seen.bar.finish_and_clear();
    far.shutdown_background();
    Ok((result?, seen.stopped()))
}

impl OutputArguments {
    /// Before the work, not after it.
    pub(super) fn prepare(&self) -> Result<(), CliError> {
        let Some(folder) = &self.report else { return Ok(()) };
        std::fs::create_dir_all(folder)
            .map_err(|error| CliError::Failed(format!("{}: {error}", folder.display())))
    }

    /// Prints and writes what there is.
    pub(super) fn finish(&self, kind: &str, sections: Vec<Section>, complete: bool) -> Result<(), CliError> {
        let command = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
        let made = Made::here(env!("CARGO_PKG_VERSION"), command);
        self.show(&Report::measured(kind, made, sections, complete))
    }

    fn show(&self, report: &Report) -> Result<(), CliError> {
        if self.json {
            println!("{}", serde_json::to_string_pretty(report).map_err(CliError::failed)?);
        } else {
            report.sections.iter().for_each(print);
        }
        if let Some(folder) = &self.report {
            report.write(folder).map_err(CliError::failed)?;
            if !self.json {
                println!("report: {}", folder.join("report.html").display());
            }
        }
        if report.complete { Ok(()) } else { Err(CliError::Interrupted) }
    }
}

/// As a table.
pub(super) fn print(section: &Section) {
    println!("{}", section.title);
    let mut table = Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(section.columns.iter().map(|column| column.name.clone()));
    for row in &section.rows {
        table.add_row(section.columns.iter().zip(row).map(|(column, cell)| cell.show(column.decimals)));
    }
    let words = section.columns.iter().map(|column| column.role == Role::Key);
    let aligned = table.column_iter_mut().zip(words);
    aligned
        .filter(|(_, words)| !words)
        .for_each(|(column, _)| column.set_cell_alignment(CellAlignment::Right));
    println!("{table}");
    section.notes.iter().for_each(|note| println!("{note}"));
    println!();
}
