//! `cairn doctor`: what this machine has, what Cairn makes of it, what is missing, what that costs, and what mends it. Nothing is changed.

mod gpus;
mod probes;

use crate::CliError;
use clap::Args;
use comfy_table::{Table, presets};
use probes::Machine;
use serde::Serialize;
use std::path::PathBuf;

#[derive(Args)]
pub(crate) struct DoctorArguments {
    /// A folder on the disk that the NVMe tier would use.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    /// As it should be.
    Good,
    /// It is not here, and nothing depends on it.
    Absent,
    /// It costs speed.
    Slow,
    /// Something will not work.
    Bad,
}

/// One thing about this machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// What it is about.
    what: &'static str,
    /// As it is here.
    here: String,
    verdict: Verdict,
    /// What Cairn makes of it.
    means: String,
    /// What mends it.
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Finding {
    fn new(what: &'static str, here: impl Into<String>, verdict: Verdict, means: impl Into<String>) -> Self {
        Self { what, here: here.into(), verdict, means: means.into(), fix: None }
    }

    fn mended_by(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }
}

pub(crate) fn run(arguments: &DoctorArguments) -> Result<(), CliError> {
    if let Some(folder) = &arguments.dir
        && !folder.is_dir()
    {
        return Err(CliError::Usage(format!("--dir {} is not a folder", folder.display())));
    }
    let findings = Machine::this().examine(arguments.dir.as_deref());
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&findings).map_err(CliError::failed)?);
    } else {
        print(&findings);
    }
    let bad = findings.iter().filter(|finding| finding.verdict == Verdict::Bad).count();
    if bad > 0 { Err(CliError::Failed(format!("{bad} thing(s) will not work here"))) } else { Ok(()) }
}

fn print(findings: &[Finding]) {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(["", "here", "", "what Cairn makes of it"]);
    for finding in findings {
        let word = match finding.verdict {
            Verdict::Good => "ok",
            Verdict::Absent => "-",
            Verdict::Slow => "slow",
            Verdict::Bad => "BAD",
        };
        table.add_row([finding.what, &finding.here, word, &finding.means]);
    }
    println!("{table}");
    let fixes: Vec<(&str, &str)> =
        findings.iter().filter_map(|finding| Some((finding.what, finding.fix.as_deref()?))).collect();
    if !fixes.is_empty() {
        println!("\nTo mend:");
        fixes.iter().for_each(|(what, fix)| println!("  {what}: {fix}"));
    }
}
