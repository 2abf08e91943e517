//! `cairn bench replay`.

use super::hit_rate::TraceArguments;
use super::measured::{OutputArguments, measure};
use super::positive;
use crate::{CliError, connect};
use cairn_bench::replay::{self, Options, Pace};
use cairn_client::WireKind;
use cairn_core::PolicyKind;
use cairn_harness::hit_rate::Capacity;
use clap::Args;
use std::path::PathBuf;

#[derive(Args)]
pub(crate) struct ReplayArguments {
    #[command(flatten)]
    traces: TraceArguments,
    /// Only the first so many requests.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    first: Option<u32>,
    /// Real size of a block in KiB, whatever it stands for.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=65_536))]
    block_kib: u32,
    /// Host memory of the server: a share of the different blocks (5%) or blocks (2000).
    #[arg(long, value_name = "SIZE", default_value = "5%")]
    capacity: Capacity,
    /// Its NVMe tier, likewise; 0 for none.
    #[arg(long, value_name = "SIZE", default_value = "25%")]
    nvme: String,
    /// Where the NVMe tier is put while it lasts [default: the system's temporary folder].
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// What leaves host memory when there is no room. With lru or fifo in both tiers the server and the model agree to the token.
    #[arg(long, default_value = "cairn")]
    policy: PolicyKind,
    /// What leaves the NVMe tier.
    #[arg(long, default_value = "lru")]
    nvme_policy: PolicyKind,
    /// The only way for block bytes: shm, quic, tls or grpc [default: the best that works].
    #[arg(long, value_name = "WIRE", value_parser = connect::wire)]
    wire: Option<WireKind>,
    /// Clients at a time. One waits for the NVMe tier after each request, so that its hits depend on nothing but the trace; several wait only
    /// while much is to be written.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    workers: u32,
    /// Follow the trace's timestamps, so many times as fast [default: one request after the other].
    #[arg(long, value_name = "TIMES", value_parser = positive)]
    speed: Option<f64>,
    #[command(flatten)]
    output: OutputArguments,
}

pub(super) fn run(arguments: &ReplayArguments) -> Result<(), CliError> {
    arguments.output.prepare()?;
    let nvme = match arguments.nvme.as_str() {
        "0" => None,
        size => Some(size.parse::<Capacity>().map_err(CliError::Usage)?),
    };
    let in_bytes =
        [Some(arguments.capacity), nvme].into_iter().flatten().any(|size| matches!(size, Capacity::Bytes(_)));
    if in_bytes {
        return Err(CliError::Usage(
            "give sizes as a share of the different blocks (5%) or in blocks (2000), not in bytes".into(),
        ));
    }
    if arguments.block_kib % 2 == 1 {
        let odd = arguments.block_kib;
        return Err(CliError::Usage(format!(
            "a block of {odd} KiB cannot be made here: give an even number"
        )));
    }
    let folder = arguments.dir.clone().unwrap_or_else(std::env::temp_dir);
    let mut sections = Vec::new();
    let (mut complete, mut apart) = (true, Vec::new());
    let traces = arguments.traces.read()?;
    let several = traces.len() > 1;
    for trace in traces {
        let trace = arguments.first.map_or_else(|| trace.clone(), |count| trace.head(count as usize));
        let name = trace.name.clone();
        let options = Options {
            trace,
            block_kib: arguments.block_kib,
            host: arguments.capacity,
            nvme,
            folder: folder.clone(),
            policies: [arguments.policy, arguments.nvme_policy],
            wire: arguments.wire,
            workers: arguments.workers as usize,
            pace: arguments.speed.map_or(Pace::Closed, Pace::Timestamps),
        };
        let (mut replayed, _) =
            measure(|servers, seen| async move { replay::run(options, &servers, &*seen).await })?;
        if let Some([below, above]) = replayed.bounds.filter(|_| !replayed.agrees()) {
            apart.push(format!("{name}: {:+.3} points, not {below:+.2} to {above:+.2}", replayed.points));
        }
        complete &= replayed.complete;
        if several {
            replayed
                .sections
                .iter_mut()
                .for_each(|section| section.name = format!("{name}-{}", section.name));
        }
        sections.extend(replayed.sections);
        if !complete {
            break;
        }
    }
    arguments.output.finish("replay", sections, complete)?;
    match apart.is_empty() {
        true => Ok(()),
        false => {
            Err(CliError::Failed(format!("the server and the model do not agree: {}", apart.join("; "))))
        }
    }
}
