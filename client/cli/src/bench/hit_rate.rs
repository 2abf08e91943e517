//! `cairn bench hit-rate` and `cairn bench workload`.

use super::not_negative;
use crate::signals::termination;
use crate::{CliError, block_on};
use cairn_core::PolicyKind;
use cairn_core::replay::SecondTier;
use cairn_harness::arrivals;
use cairn_harness::hit_rate::{self, Below, Capacity, Contender, Outcome, Plan};
use cairn_harness::report::{Made, Report};
use cairn_harness::trace::Trace;
use cairn_harness::workload::{Workload, generate};
use clap::{Args, ValueEnum};
use comfy_table::Table;
use indicatif::{ProgressBar, ProgressStyle};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[derive(Args)]
pub(super) struct TraceArguments {
    /// A trace, plain or gzipped: JSON lines with input_length and hash_ids or runs, or batches of vLLM's KV-cache events. May be given more than once.
    #[arg(long, value_name = "FILE", required_unless_present = "workload")]
    trace: Vec<PathBuf>,
    /// Made-up traffic instead: chat, rag, agent or shared-prompt.
    #[arg(long, value_name = "KIND")]
    workload: Vec<Workload>,
    /// Requests of made-up traffic.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    requests: u32,
    /// Which made-up traffic of its kind.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Let requests arrive at the times in the first column of this CSV file (Azure's traces, say); later ones are left out.
    #[arg(long, value_name = "FILE")]
    arrivals: Option<PathBuf>,
    /// Tokens of a block [default: told from the lengths].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    block_tokens: Option<u64>,
}

#[derive(Args)]
pub(crate) struct HitRateArguments {
    #[command(flatten)]
    traces: TraceArguments,
    /// Policies, separated by commas: cairn, lru, fifo, lfu, s3fifo, sieve, arc, wtinylfu, opt; or all.
    #[arg(long, value_delimiter = ',', default_value = "all")]
    policies: Vec<String>,
    /// Sizes, separated by commas: shares of the different blocks (5%), blocks (2000) or bytes (16GiB).
    #[arg(long, value_delimiter = ',', value_name = "SIZE", default_value = "1%,5%,10%,25%,50%,100%")]
    capacity: Vec<Capacity>,
    /// So many sizes from a thousandth of the different blocks to all of them, instead.
    #[arg(long, value_name = "POINTS", value_parser = clap::value_parser!(u32).range(2..=200), conflicts_with = "capacity")]
    sweep: Option<u32>,
    /// Bytes that one token's state takes, for sizes in bytes and the life of a drive.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1 << 32), conflicts_with = "geometry")]
    token_bytes: Option<u64>,
    /// The same from a model: layers, KV heads, head size and bytes of a number, as 32x8x128x2.
    #[arg(long, value_name = "L,H,D,B", value_parser = geometry)]
    geometry: Option<u64>,
    /// Share of the requests that fill the caches before any is counted.
    #[arg(long, default_value_t = 0.0, value_parser = warm_up)]
    warm_up: f64,
    /// A second tier of this size below the first.
    #[arg(long, value_name = "SIZE")]
    nvme: Option<Capacity>,
    /// What the second tier does.
    #[arg(long, value_enum, default_value_t = Tier::WriteThrough, requires = "nvme")]
    second: Tier,
    /// What leaves it [default: as in the first tier].
    #[arg(long, value_name = "POLICY", requires = "nvme")]
    nvme_policy: Option<PolicyKind>,
    /// Blocks are written to it from this use on.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..), requires = "nvme")]
    admit: u32,
    /// What its drive can take in its life, in terabytes, as its data sheet says.
    #[arg(long, value_name = "TB", default_value_t = 3500.0, value_parser = not_negative)]
    endurance_tb: f64,
    /// A folder for JSON, CSV and a page with plots.
    #[arg(long, value_name = "DIR")]
    report: Option<PathBuf>,
    /// Print the report as JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// What a second tier does with what the first has.
#[derive(Clone, Copy, ValueEnum)]
enum Tier {
    /// Blocks go down when they leave memory, and up on a hit.
    Exclusive,
    /// As exclusive, but a copy stays below.
    Lazy,
    /// Blocks are written when they come, as the server does.
    WriteThrough,
}

#[derive(Args)]
pub(crate) struct WorkloadArguments {
    /// chat, rag, agent or shared-prompt.
    #[arg(long)]
    kind: Workload,
    /// How many requests.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    requests: u32,
    /// Which of its kind.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Where to write it.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

fn geometry(text: &str) -> Result<u64, String> {
    let wrong = || {
        format!(
            "{text:?} is no geometry: give layers, KV heads, head size and bytes of a number, as 32x8x128x2"
        )
    };
    let numbers = text.split('x').map(|part| part.parse::<u64>().map_err(|_| wrong()));
    match numbers.collect::<Result<Vec<_>, _>>()?[..] {
        [layers, heads, size, bytes] => {
            let product = [layers, heads, size, bytes, 2].into_iter().try_fold(1u64, u64::checked_mul);
            product.filter(|bytes| (1..=1 << 32).contains(bytes)).ok_or_else(wrong)
        }
        _ => Err(wrong()),
    }
}

fn warm_up(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..1.0).contains(share));
    share.ok_or_else(|| format!("{text:?} is no share of the requests: give a number from 0 to below 1"))
}

impl HitRateArguments {
    fn plan(&self) -> Result<Plan, CliError> {
        let mut contenders = Vec::new();
        for name in &self.policies {
            match name.as_str() {
                "all" => contenders.extend(Contender::all()),
                name => contenders.push(name.parse().map_err(CliError::Usage)?),
            }
        }
        let mut once = Vec::new();
        contenders.retain(|one| {
            let new = !once.contains(one);
            once.push(*one);
            new
        });
        let kind = match self.second {
            Tier::Exclusive => SecondTier::Exclusive,
            Tier::Lazy => SecondTier::Lazy,
            Tier::WriteThrough => SecondTier::WriteThrough,
        };
        let below =
            self.nvme.map(|capacity| Below { kind, capacity, admit: self.admit, policy: self.nvme_policy });
        if below.is_some() && contenders.iter().all(|one| *one == Contender::Optimum) {
            return Err(CliError::Usage("the optimum is for one tier: name another policy".into()));
        }
        Ok(Plan {
            contenders,
            capacities: self.sweep.map_or_else(|| self.capacity.clone(), hit_rate::sweep),
            below,
            warm_up: self.warm_up,
            token_bytes: self.token_bytes.or(self.geometry),
            endurance_bytes: Some(self.endurance_tb * 1e12),
        })
    }
}

impl TraceArguments {
    /// Reads or makes them.
    pub(super) fn read(&self) -> Result<Vec<Trace>, CliError> {
        let read =
            self.trace.iter().map(|path| Trace::read(path, self.block_tokens).map_err(CliError::failed));
        let made = self.workload.iter().map(|kind| Ok(generate(kind, self.requests as usize, self.seed)));
        let mut traces = read.chain(made).collect::<Result<Vec<Trace>, CliError>>()?;
        if let Some(path) = &self.arrivals {
            let times = arrivals::read(path).map_err(CliError::failed)?;
            traces.iter_mut().for_each(|trace| *trace = trace.arriving(&times));
        }
        // Files of one name in two folders.
        for i in 1..traces.len() {
            let name = traces[i].name.clone();
            let before = traces[..i].iter().filter(|trace| trace.name == name).count();
            if before > 0 {
                traces[i].name = format!("{name}-{}", before + 1);
            }
        }
        Ok(traces)
    }
}

pub(super) fn hit_rates(arguments: &HitRateArguments) -> Result<(), CliError> {
    let plan = arguments.plan()?;
    let stop = Arc::new(AtomicBool::new(false));
    if let Some(folder) = &arguments.report {
        // Before the work, not after it.
        std::fs::create_dir_all(folder)
            .map_err(|error| CliError::Failed(format!("{}: {error}", folder.display())))?;
    }
    let mut outcomes = Vec::new();
    for trace in arguments.traces.read()? {
        outcomes.push(replay(trace, plan.clone(), &stop)?);
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    let command = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let report = Report::hit_rates(Made::here(env!("CARGO_PKG_VERSION"), command), outcomes);
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(CliError::failed)?);
    } else {
        report.outcomes.iter().for_each(print);
    }
    if let Some(folder) = &arguments.report {
        report.write(folder).map_err(CliError::failed)?;
        if !arguments.json {
            println!("report: {}", folder.join("report.html").display());
        }
    }
    // What there is was written.
    if stop.load(Ordering::Relaxed) { Err(CliError::Interrupted) } else { Ok(()) }
}

/// On threads of its own, so that Ctrl-C is heard; then what there is counts.
fn replay(trace: Trace, plan: Plan, stop: &Arc<AtomicBool>) -> Result<Outcome, CliError> {
    let bar = ProgressBar::new((plan.capacities.len() * plan.contenders.len()) as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} replays ({elapsed})") {
        bar.set_style(style);
    }
    bar.set_message(trace.name.clone());
    let stop = stop.clone();
    let outcome = block_on(async move {
        let (told, ticks) = (stop.clone(), bar.clone());
        let work = move || hit_rate::run(&trace, &plan, &told, || ticks.inc(1));
        let mut work = tokio::task::spawn_blocking(work);
        let done = tokio::select! {
            done = &mut work => done,
            heard = termination() => {
                heard?;
                stop.store(true, Ordering::Relaxed);
                tokio::select! {
                    done = &mut work => done,
                    heard = termination() => return heard.and(Err(CliError::Interrupted)),
                }
            }
        };
        bar.finish_and_clear();
        done.map_err(CliError::failed)
    });
    outcome?.map_err(CliError::Usage)
}

fn percent(part: u64, whole: u64) -> String {
    format!("{:.2} %", 100.0 * part as f64 / whole.max(1) as f64)
}

fn print(outcome: &Outcome) {
    println!(
        "{}: {} requests, {} blocks of {} tokens asked for, {} of them different; ceiling {} of the tokens{}",
        outcome.trace,
        outcome.requests,
        outcome.references,
        outcome.block_tokens,
        outcome.unique,
        percent(outcome.ceiling.hit_tokens, outcome.ceiling.tokens),
        if outcome.complete { "" } else { " (interrupted: not all replays ended)" }
    );
    let tiers = outcome.rows.iter().any(|row| row.below.is_some());
    let mut table = Table::new();
    // Many rows: no lines between them.
    table.load_preset(comfy_table::presets::NOTHING);
    let mut heading = vec![
        "policy",
        "blocks",
        "of all",
        "hit tokens",
        "token hit",
        "block hit",
        "request mean",
        "of optimum",
        "of ceiling",
    ];
    heading.extend(if tiers {
        &["NVMe reads", "NVMe writes", "written per hit", "life, days"][..]
    } else {
        &["evicted"]
    });
    table.set_header(heading);
    for row in &outcome.rows {
        let share = |share: f64| format!("{:.2} %", 100.0 * share);
        let mut cells = vec![
            row.policy.clone(),
            row.capacity_blocks.to_string(),
            share(row.capacity_share),
            row.hits.hit_tokens.to_string(),
            percent(row.hits.hit_tokens, row.hits.tokens),
            percent(row.hits.hit_blocks, row.hits.blocks),
            share(row.hits.request_mean),
            row.share_of_optimum.map_or("-".into(), share),
            share(row.share_of_ceiling),
        ];
        match &row.below {
            Some(below) => {
                let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.2}"));
                cells.extend([below.reads.to_string(), below.writes.to_string()]);
                cells.extend([number(below.written_per_hit), number(below.life_days)]);
            }
            None => cells.push(row.evicted.map_or("-".into(), |evicted| evicted.to_string())),
        }
        table.add_row(cells);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(comfy_table::CellAlignment::Right);
    }
    println!("{table}\n");
}

pub(super) fn workload(arguments: &WorkloadArguments) -> Result<(), CliError> {
    if arguments.out.exists() {
        let out = arguments.out.display();
        return Err(CliError::Usage(format!("{out} exists already: remove it, or name another file")));
    }
    let trace = generate(&arguments.kind, arguments.requests as usize, arguments.seed);
    trace.write(&arguments.out).map_err(CliError::failed)?;
    println!(
        "{}: {} requests, {} blocks of {} tokens, {} of them different",
        arguments.out.display(),
        trace.requests().len(),
        trace.references(),
        trace.block_tokens,
        trace.unique()
    );
    Ok(())
}
