//! What a run leaves behind: JSON for programs, CSV for spreadsheets, a page with plots for people. The page needs nothing else.

use crate::hit_rate::{Outcome, Row};
use crate::plot;
use crate::section::{Cell, Plot, Section};
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Of the JSON form; changes when a reader would have to.
pub const SCHEMA: u32 = 1;

/// Where and how a run was made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Made {
    /// Of Cairn.
    pub version: String,
    /// What was typed.
    pub command: Vec<String>,
    /// Seconds since 1970.
    pub unix_time: u64,
    /// Model of the CPU.
    pub cpu: String,
    /// Its threads.
    pub threads: usize,
    /// Of the machine.
    pub memory_mib: u64,
}

/// All of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The bench: `hit-rate`, `replay`, `transfer` and so on.
    pub kind: String,
    /// Where and how.
    pub made: Made,
    /// Of hit rates: one for each trace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outcomes: Vec<Outcome>,
    /// Of everything else.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sections: Vec<Section>,
    /// It was not ended early.
    #[serde(default = "yes")]
    pub complete: bool,
}

fn yes() -> bool {
    true
}

/// A report that cannot be written or read.
#[derive(Debug, Error)]
pub enum ReportError {
    /// A file.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is not one of ours.
    #[error("{path} is not a report of cairn bench: {what}")]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A plot.
    #[error("a plot cannot be drawn: {0}")]
    Plot(String),
}

impl Made {
    /// Of this machine, now.
    pub fn here(version: &str, command: Vec<String>) -> Self {
        let field = |file: &str, name: &str| {
            let text = std::fs::read_to_string(file).unwrap_or_default();
            let line = text.lines().find(|line| line.starts_with(name)).map(str::to_owned);
            line.and_then(|line| Some(line.split_once(':')?.1.trim().to_owned())).unwrap_or_default()
        };
        let memory = field("/proc/meminfo", "MemTotal");
        let memory_kib: u64 = memory.trim_end_matches("kB").trim().parse().unwrap_or(0);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            version: version.into(),
            command,
            unix_time: now.map_or(0, |since| since.as_secs()),
            cpu: field("/proc/cpuinfo", "model name"),
            threads: std::thread::available_parallelism().map_or(0, usize::from),
            memory_mib: memory_kib / 1024,
        }
    }
}

impl Report {
    /// Of hit rates.
    pub fn hit_rates(made: Made, outcomes: Vec<Outcome>) -> Self {
        let complete = outcomes.iter().all(|outcome| outcome.complete);
        Self { schema: SCHEMA, kind: "hit-rate".into(), made, outcomes, sections: Vec::new(), complete }
    }

    /// Of measurements.
    pub fn measured(kind: &str, made: Made, sections: Vec<Section>, complete: bool) -> Self {
        Self { schema: SCHEMA, kind: kind.into(), made, outcomes: Vec::new(), sections, complete }
    }

    /// Reads the JSON form: the file, or a folder with it.
    ///
    /// # Errors
    /// When it is not there, or not a report of this schema.
    pub fn read(path: &Path) -> Result<Self, ReportError> {
        let path = if path.is_dir() { path.join("report.json") } else { path.to_owned() };
        let text = std::fs::read_to_string(&path);
        let text = text.map_err(|source| ReportError::File { path: path.clone(), source })?;
        let report: Self = serde_json::from_str(&text)
            .map_err(|error| ReportError::Content { path: path.clone(), what: error.to_string() })?;
        if report.schema != SCHEMA {
            let what = format!("its schema is {}, not {SCHEMA}", report.schema);
            return Err(ReportError::Content { path, what });
        }
        Ok(report)
    }

    /// Writes all forms into a folder, which is made if need be.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), ReportError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| ReportError::File { path, source }
        };
        std::fs::create_dir_all(folder).map_err(failed(folder))?;
        let json = serde_json::to_string_pretty(self)
            .map_err(|error| ReportError::Content { path: folder.to_owned(), what: error.to_string() })?;
        let mut files = vec![("report.json".to_owned(), json)];
        if !self.outcomes.is_empty() {
            files.push(("rows.csv".into(), self.csv()));
        }
        let of_sections = self.sections.iter().map(|section| (section.name.clone(), section.plots.clone()));
        let of_outcomes =
            self.outcomes.iter().map(|outcome| (outcome.trace.clone(), plot::of_hit_rates(outcome)));
        let mut pictures = Vec::new();
        for (owner, plots) in of_outcomes.chain(of_sections) {
            let drawn = plots.iter().filter_map(|plot: &Plot| plot::draw(plot).transpose());
            for picture in drawn {
                let (name, svg) = picture.map_err(ReportError::Plot)?;
                files.push((format!("{owner}-{name}.svg"), svg.clone()));
                pictures.push((owner.clone(), svg));
            }
        }
        for section in &self.sections {
            files.push((format!("{}.csv", section.name), section.csv()));
        }
        files.push(("report.html".into(), self.html(&pictures)));
        for (name, text) in files {
            let path = folder.join(name);
            std::fs::write(&path, text).map_err(failed(&path))?;
        }
        Ok(())
    }

    /// One line for each replay.
    pub fn csv(&self) -> String {
        let mut csv = "trace,policy,capacity_blocks,capacity_share,requests,tokens,hit_tokens,token_hit,blocks,hit_blocks,block_hit,\
                       request_mean_hit,inserted,evicted,share_of_optimum,share_of_ceiling,nvme_capacity_blocks,nvme_hit_tokens,\
                       nvme_reads,nvme_writes,written_per_hit,life_days\n"
            .to_owned();
        for row in self.outcomes.iter().flat_map(|outcome| &outcome.rows) {
            let Row { hits, below, .. } = row;
            let optional = |value: Option<f64>| value.map_or(String::new(), |value| format!("{value:.6}"));
            let counted = |value: Option<u64>| value.map_or(String::new(), |value| value.to_string());
            let below = below.as_ref().map_or(",,,,,".to_owned(), |below| {
                format!(
                    "{},{},{},{},{},{}",
                    below.capacity_blocks,
                    below.hit_tokens,
                    below.reads,
                    below.writes,
                    optional(below.written_per_hit),
                    optional(below.life_days)
                )
            });
            let trace = row.trace.replace(['"', ',', '\n'], "_");
            // Writing to a string does not fail.
            let _ = writeln!(
                csv,
                "{trace},{},{},{:.6},{},{},{},{:.6},{},{},{:.6},{:.6},{},{},{},{:.6},{below}",
                row.policy,
                row.capacity_blocks,
                row.capacity_share,
                hits.requests,
                hits.tokens,
                hits.hit_tokens,
                share(hits.hit_tokens, hits.tokens),
                hits.blocks,
                hits.hit_blocks,
                share(hits.hit_blocks, hits.blocks),
                hits.request_mean,
                counted(row.inserted),
                counted(row.evicted),
                optional(row.share_of_optimum),
                row.share_of_ceiling,
            );
        }
        csv
    }

    fn html(&self, plots: &[(String, String)]) -> String {
        let mut page = String::new();
        let (made, kind) = (&self.made, escape(&self.kind));
        let command = made.command.iter().map(|word| escape(word)).collect::<Vec<_>>().join(" ");
        let _ = write!(
            page,
            "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Cairn: {kind}</title><style>{STYLE}</style>\
             <h1>cairn bench {kind}</h1><p class=\"made\"><code>{command}</code><br>Cairn {}, {}, {} threads, {} MiB of memory, \
             Unix time {}{}</p>",
            escape(&made.version),
            escape(&made.cpu),
            made.threads,
            made.memory_mib,
            made.unix_time,
            if self.complete { "" } else { "<br><strong>Interrupted: this is what there was.</strong>" }
        );
        for section in &self.sections {
            page.push_str(&measured(section));
            for (_, svg) in plots.iter().filter(|(owner, _)| *owner == section.name) {
                let _ = write!(page, "<figure>{svg}</figure>");
            }
        }
        for outcome in &self.outcomes {
            let ceiling = &outcome.ceiling;
            let _ = write!(
                page,
                "<h2>{}</h2><p>{} requests, {} blocks of {} tokens asked for, {} of them different. A cache without bounds \
                 hits {:.2} % of the tokens ({:.2} % of a request on average): the ceiling.{}</p>",
                escape(&outcome.trace),
                outcome.requests,
                outcome.references,
                outcome.block_tokens,
                outcome.unique,
                100.0 * share(ceiling.hit_tokens, ceiling.tokens),
                100.0 * ceiling.request_mean,
                if outcome.complete { "" } else { " <strong>Interrupted: not all replays ended.</strong>" }
            );
            for (_, svg) in plots.iter().filter(|(trace, _)| *trace == outcome.trace) {
                let _ = write!(page, "<figure>{svg}</figure>");
            }
            page.push_str(&table(outcome));
        }
        page.push_str("</html>\n");
        page
    }
}

const STYLE: &str = "body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}\
    .made{color:#57606a}figure{margin:1.5rem 0}svg{max-width:100%;height:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
    td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #d8dee4}td:first-child,th:first-child{text-align:left}";

fn measured(section: &Section) -> String {
    let mut html = format!("<h2>{}</h2>", escape(&section.title));
    html.push_str("<table><tr>");
    section.columns.iter().for_each(|column| {
        let _ = write!(html, "<th>{}", escape(&column.name));
    });
    for row in &section.rows {
        html.push_str("<tr>");
        for (column, cell) in section.columns.iter().zip(row) {
            let shown = escape(&cell.show(column.decimals));
            let decimals = column.decimals;
            let _ = match cell {
                Cell::Range { low, high, .. } => {
                    write!(html, "<td title=\"{low:.decimals$} to {high:.decimals$}\">{shown}")
                }
                _ => write!(html, "<td>{shown}"),
            };
        }
    }
    html.push_str("</table>");
    section.notes.iter().for_each(|note| {
        let _ = write!(html, "<p>{}</p>", escape(note));
    });
    html
}

fn table(outcome: &Outcome) -> String {
    let two = outcome.rows.iter().any(|row| row.below.is_some());
    let mut table = "<table><tr><th>policy<th>blocks<th>of all<th>token hit<th>block hit<th>request mean<th>of optimum<th>of ceiling".to_owned();
    if two {
        table.push_str("<th>NVMe blocks<th>NVMe reads<th>NVMe writes<th>written per hit<th>life, days");
    }
    for row in &outcome.rows {
        let percent = |value: f64| format!("{:.2} %", 100.0 * value);
        let hits = &row.hits;
        let _ = write!(
            table,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}",
            escape(&row.policy),
            row.capacity_blocks,
            percent(row.capacity_share),
            percent(share(hits.hit_tokens, hits.tokens)),
            percent(share(hits.hit_blocks, hits.blocks)),
            percent(hits.request_mean),
            row.share_of_optimum.map_or("-".into(), percent),
            percent(row.share_of_ceiling)
        );
        if let Some(below) = &row.below {
            let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
            let _ = write!(
                table,
                "<td>{}<td>{}<td>{}<td>{}<td>{}",
                below.capacity_blocks,
                below.reads,
                below.writes,
                number(below.written_per_hit),
                number(below.life_days)
            );
        }
    }
    table.push_str("</table>");
    table
}

/// 0 of nothing is 0.
pub(crate) fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::hit_rate::{Contender, Plan, run};
    use std::sync::atomic::AtomicBool;

    #[test]
    fn what_is_written_can_be_read() {
        let trace = crate::workload::generate(&"rag".parse().unwrap(), 200, 3);
        let plan = Plan {
            contenders: Contender::all(),
            capacities: crate::hit_rate::sweep(5),
            below: None,
            warm_up: 0.1,
            token_bytes: None,
            endurance_bytes: None,
        };
        let outcome = run(&trace, &plan, &AtomicBool::new(false), || ()).unwrap();
        let made = Made::here("0.0.0", vec!["cairn".into(), "<b>".into()]);
        let report = Report::hit_rates(made, vec![outcome]);
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("new/folder");
        report.write(&out).unwrap();
        assert_eq!(Report::read(&out).unwrap().csv(), report.csv());
        let csv = std::fs::read_to_string(out.join("rows.csv")).unwrap();
        let columns: Vec<usize> = csv.lines().map(|line| line.split(',').count()).collect();
        assert!(columns.len() == 1 + 5 * 9 && columns.iter().all(|count| *count == 22), "{columns:?}");
        let page = std::fs::read_to_string(out.join("report.html")).unwrap();
        assert!(page.contains("<svg") && page.contains("&lt;b&gt;") && !page.contains("<b>"));
        assert!(!page.contains("http://") || !page.contains("src="), "the page needs nothing else");
        std::fs::write(out.join("report.json"), "{}").unwrap();
        assert!(Report::read(&out).unwrap_err().to_string().contains("not a report"));
    }
}
