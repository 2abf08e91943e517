//! `cairn bench diff`.

use super::not_negative;
use crate::CliError;
use cairn_harness::diff;
use cairn_harness::report::Report;
use clap::Args;
use std::path::PathBuf;

#[derive(Args)]
pub(crate) struct DiffArguments {
    /// A report, or the folder with it.
    before: PathBuf,
    /// Another.
    after: PathBuf,
    /// Points of token hit rate (of a hundred) that count as a change. Replays are exact: 0 shows everything.
    #[arg(long, default_value_t = 0.05, value_parser = not_negative)]
    bound: f64,
    /// Percent by which a measurement must change to count, if the ranges of its rounds do not overlap. Single measurements have no
    /// range: any change beyond this counts.
    #[arg(long, default_value_t = 10.0, value_parser = not_negative)]
    noise: f64,
}

pub(super) fn run(arguments: &DiffArguments) -> Result<(), CliError> {
    let read = |path: &PathBuf| Report::read(path).map_err(CliError::failed);
    let (before, after) = (read(&arguments.before)?, read(&arguments.after)?);
    let (changes, alone) = diff::compare(&before, &after);
    let moved = diff::measurements(&before, &after);
    if changes.is_empty() && moved.is_empty() {
        return Err(CliError::Failed("the reports have nothing in common".into()));
    }
    let mut worse = 0;
    if !changes.is_empty() {
        worse += replays(arguments, (&changes, alone));
    }
    if !moved.is_empty() {
        worse += measurements(arguments, &moved);
    }
    if worse > 0 { Err(CliError::Failed(format!("{worse} became worse"))) } else { Ok(()) }
}

fn replays(arguments: &DiffArguments, (changes, alone): (&[diff::Change], usize)) -> usize {
    let mut worse = 0;
    for change in changes.iter().filter(|change| change.points().abs() > arguments.bound) {
        let points = change.points();
        worse += usize::from(points < 0.0);
        let (before, after) = (100.0 * change.before, 100.0 * change.after);
        println!("{points:+.2} points  {}  {before:.2} % -> {after:.2} %", change.what);
    }
    println!(
        "{} replays in both, {alone} in one only; {worse} worse by more than {} points",
        changes.len(),
        arguments.bound
    );
    worse
}

fn measurements(arguments: &DiffArguments, moved: &[diff::Moved]) -> usize {
    let mut worse = 0;
    let beyond = |one: &&diff::Moved| one.beyond_noise && 100.0 * one.better.abs() > arguments.noise;
    for one in moved.iter().filter(beyond) {
        worse += usize::from(one.better < 0.0);
        let word = if one.better < 0.0 { "worse" } else { "better" };
        let percent = 100.0 * one.better.abs();
        println!("{percent:.0} % {word}  {}  {:.3} -> {:.3}", one.what, one.before, one.after);
    }
    println!("{} measurements in both; {worse} worse beyond noise and {} %", moved.len(), arguments.noise);
    worse
}
