//! `cairn demo`: a server, a prefill worker and a decode worker as processes of their own, a real model, and requests that
//! share a long prefix. Each prompt is answered three times: with every cache off (cold), with the prefill worker
//! computing what is missing (fill, the first prompt only), and from the cache (warm). With an NVMe tier, a fourth time after the
//! server was killed and started again.

mod prompts;
mod report;
mod requests;

use crate::fleet::{Process, Secure};
use crate::model::{PullOptions, choose};
use crate::{CliError, block_on, connect, inspect, signals};
use cairn_client::{CacheClient, WireKind};
use cairn_proto::pb;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use report::{Report, Row};
use requests::{Answer, ask};
use std::path::Path;
use std::time::Duration;

#[derive(Args)]
pub(crate) struct DemoOptions {
    #[command(flatten)]
    pull: PullOptions,
    /// Another model than SmolLM2-135M: a GGUF file, a checkpoint folder, or synthetic:SEED.
    #[arg(long, value_name = "PATH")]
    model: Option<String>,
    /// Different questions about the shared text.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    requests: u32,
    /// Lines of the shared text, of about 15 tokens each.
    #[arg(long, default_value_t = 120, value_parser = clap::value_parser!(u32).range(1..=400))]
    shared_lines: u32,
    /// Tokens of each answer.
    #[arg(long, default_value_t = 24, value_parser = clap::value_parser!(u32).range(1..=512))]
    max_tokens: u32,
    /// Memory of the cache server, in MiB.
    #[arg(long, default_value_t = 512)]
    capacity_mib: u64,
    /// Give the server an NVMe tier, kill it without warning after the warm requests, start it again, and ask once more.
    #[arg(long)]
    nvme: bool,
    /// The only way for block bytes: shm, quic, tls or grpc [default: the best that works].
    #[arg(long, value_name = "WIRE", value_parser = connect::wire)]
    wire: Option<WireKind>,
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// Tokens that each worker holds itself: several prompts of the demo's length.
const POOL_TOKENS: &str = "32768";

/// The NVMe tier of the demo, in MiB, and its segments.
const NVME_MIB: &str = "1025";
const NVME_SEGMENT_MIB: &str = "32";

/// Longest wait for the server to come to rest: steps, and how long each is.
const SETTLE_STEPS: u32 = 600;
const SETTLE_STEP: Duration = Duration::from_millis(50);

pub(crate) fn run(options: DemoOptions) -> Result<(), CliError> {
    let model = choose(options.model.as_deref(), &options.pull, !options.json)?;
    let report = block_on(async {
        tokio::select! {
            report = demonstrate(&options, &model) => report,
            signal = signals::termination() => signal.and(Err(CliError::Interrupted)),
        }
    })?;
    if options.json {
        println!("{}", report.json());
    } else {
        report.print();
    }
    if report.identical() {
        return Ok(());
    }
    Err(CliError::Failed("answers differ: this is a defect in Cairn, please report it".into()))
}

/// The processes of the demo, in the order in which they end.
struct Fleet {
    decode: Process,
    prefill: Process,
    server: Process,
}

impl Fleet {
    async fn start(
        options: &DemoOptions,
        secure: &Secure,
        (model, nvme): (&str, Option<&Path>),
        progress: &Progress,
    ) -> Result<Self, CliError> {
        let loopback = "127.0.0.1:0";
        progress.doing("starting a cache server");
        let server = start_server(options, secure, loopback, nvme).await?;
        progress.say(&server);
        progress.doing("loading the model into a prefill worker and a decode worker");
        let cache = server.url();
        let mut worker = vec![
            "worker",
            "--listen",
            loopback,
            "--model",
            model,
            "--cache",
            &cache,
            "--pool-tokens",
            POOL_TOKENS,
        ];
        worker.extend(secure.arguments.iter().map(String::as_str));
        let prefill =
            Process::start("prefill worker", &[&worker[..], &["--role", "prefill"]].concat()).await?;
        progress.say(&prefill);
        let peer = prefill.url();
        let decode = ["--role", "decode", "--prefill", &peer, "--no-local-reuse"];
        let decode = Process::start("decode worker", &[&worker[..], &decode].concat()).await?;
        progress.say(&decode);
        Ok(Self { decode, prefill, server })
    }

    async fn stop(self) {
        for process in [self.decode, self.prefill, self.server] {
            process.stop().await;
        }
    }
}

async fn start_server(
    options: &DemoOptions,
    secure: &Secure,
    listen: &str,
    nvme: Option<&Path>,
) -> Result<Process, CliError> {
    let capacity = options.capacity_mib.to_string();
    let mut serve = vec!["serve", "--config", &secure.config, "--listen", listen];
    serve.extend(["--http-listen", "127.0.0.1:0", "--capacity-mib", &capacity]);
    let folder = nvme.map(|folder| folder.display().to_string());
    if let Some(folder) = &folder {
        serve.extend(["--nvme-dir", folder, "--nvme-mib", NVME_MIB, "--nvme-segment-mib", NVME_SEGMENT_MIB]);
    }
    Ok(Process::start("cache server", &serve).await?.with_tls())
}

/// Kills the server once everything it holds is on its device, and starts it again on the same address.
async fn restart(
    options: &DemoOptions,
    secure: &Secure,
    fleet: &mut Fleet,
    (nvme, progress): (&Path, &Progress),
) -> Result<(), CliError> {
    progress.doing("waiting until everything is on the device");
    let address = fleet.server.address().to_owned();
    let client = question(secure, fleet)?;
    settled(&client, |stats| {
        let stored: u64 = stats.devices.iter().map(|device| device.stored_blocks).sum();
        stats.committed_blocks > 0 && stored >= stats.committed_blocks
    })
    .await?;
    progress.doing("killing the server, and starting it again");
    fleet.server.kill().await;
    fleet.server = start_server(options, secure, &address, Some(nvme)).await?;
    progress.say(&fleet.server);
    // Both workers and this client are back.
    settled(&client, |stats| {
        stats.sessions >= 3 && stats.devices.iter().all(|device| device.state == "ready")
    })
    .await
}

/// A client for the demo's own questions.
fn question(secure: &Secure, fleet: &Fleet) -> Result<CacheClient, CliError> {
    let options = secure.connect()?.options(&fleet.server.url())?;
    CacheClient::start(options).map_err(CliError::failed)
}

async fn settled(client: &CacheClient, is: impl Fn(&pb::StatsResponse) -> bool) -> Result<(), CliError> {
    for _ in 0..SETTLE_STEPS {
        if let Ok(stats) = client.stats().await
            && is(&stats)
        {
            return Ok(());
        }
        tokio::time::sleep(SETTLE_STEP).await;
    }
    Err(CliError::Failed("the cache server did not come to rest in time".into()))
}

async fn demonstrate(options: &DemoOptions, model: &str) -> Result<Report, CliError> {
    let progress = Progress::new(options.json);
    let folder = if options.nvme { Some(tempfile::tempdir().map_err(CliError::failed)?) } else { None };
    let nvme = folder.as_ref().map(tempfile::TempDir::path);
    let secure = Secure::new(options.wire)?;
    let mut fleet = Fleet::start(options, &secure, (model, nvme), &progress).await?;
    let prompts = prompts::prompts(options.shared_lines, options.requests);
    let url = fleet.decode.url();
    let ask = |prompt: &str, use_cache| ask(url.clone(), prompt.to_owned(), options.max_tokens, use_cache);
    ask("Hello", false).await?;
    let mut cold: Vec<Answer> = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        progress.doing(&format!("request {} of {}, no cache", i + 1, prompts.len()));
        cold.push(ask(prompt, false).await?);
    }
    progress.doing("request 1, computed and published by the prefill worker");
    let fill = ask(&prompts[0], true).await?;
    let mut warm = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        progress.doing(&format!("request {} of {}, from the cache", i + 1, prompts.len()));
        warm.push(ask(prompt, true).await?);
    }
    let mut restarted = Vec::new();
    if let Some(nvme) = nvme {
        restart(options, &secure, &mut fleet, (nvme, &progress)).await?;
        for (i, prompt) in prompts.iter().enumerate() {
            progress.doing(&format!("request {} of {}, after the restart", i + 1, prompts.len()));
            restarted.push(Some(ask(prompt, true).await?));
        }
    }
    restarted.resize(prompts.len(), None);
    let client = question(&secure, &fleet)?;
    let stats = client.stats().await.map_err(CliError::failed)?;
    drop(client);
    fleet.stop().await;
    progress.spinner.finish_and_clear();
    let rows = cold.into_iter().zip(warm).zip(restarted);
    let rows = rows.map(|((cold, warm), restarted)| Row { cold, warm, restarted }).collect();
    Ok(Report { model: model.to_owned(), rows, fill, stats: inspect::stats_json(&stats) })
}

/// What the demo shows while it runs: nothing when its output is for machines.
struct Progress {
    spinner: ProgressBar,
    quiet: bool,
}

impl Progress {
    fn new(quiet: bool) -> Self {
        if quiet {
            return Self { spinner: ProgressBar::hidden(), quiet };
        }
        let spinner = ProgressBar::new_spinner();
        let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})");
        spinner.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
        spinner.enable_steady_tick(Duration::from_millis(120));
        Self { spinner, quiet }
    }

    fn doing(&self, what: &str) {
        self.spinner.set_message(what.to_owned());
    }

    fn say(&self, process: &Process) {
        if !self.quiet {
            let line = format!("{:15} {}  (process {})", process.name(), process.url(), process.id());
            self.spinner.suspend(|| println!("{line}"));
        }
    }
}
