//! `cairn demo`: a server, a prefill worker and a decode worker as processes of their own, a real model, and requests that
//! share a long prefix. Each prompt is answered three times: with every cache off (cold), with the prefill worker
//! computing what is missing (fill, the first prompt only), and from the cache (warm).

mod process;
mod prompts;
mod report;
mod requests;

use crate::model::{PullOptions, pull};
use crate::{CliError, block_on, inspect, signals};
use cairn_client::{CacheClient, ClientOptions};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use process::Process;
use report::{Report, Row};
use requests::{Answer, ask};
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
    /// Print JSON instead of tables.
    #[arg(long)]
    json: bool,
}

/// Used when the real model cannot be had.
const FALLBACK_MODEL: &str = "synthetic:1";

/// Tokens that each worker holds itself: several prompts of the demo's length.
const POOL_TOKENS: &str = "32768";

pub(crate) fn run(options: DemoOptions) -> Result<(), CliError> {
    let model = choose_model(&options)?;
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
    Err(CliError::Failed(
        "answers differ: this is a defect in Cairn, please report it".into(),
    ))
}

fn choose_model(options: &DemoOptions) -> Result<String, CliError> {
    if let Some(model) = &options.model {
        return Ok(model.clone());
    }
    match pull(&options.pull, !options.json) {
        Ok(path) => Ok(path.display().to_string()),
        Err(error) => {
            eprintln!("cairn: {error}");
            eprintln!("cairn: going on with random weights of the same shape; answers will be gibberish");
            Ok(FALLBACK_MODEL.into())
        }
    }
}

async fn demonstrate(options: &DemoOptions, model: &str) -> Result<Report, CliError> {
    let spinner = spinner(options.json);
    let say = |text: String| match options.json {
        true => {}
        false => spinner.suspend(|| println!("{text}")),
    };
    spinner.set_message("starting a cache server");
    let capacity = options.capacity_mib.to_string();
    let loopback = "127.0.0.1:0";
    let server = Process::start(
        "cache server",
        &[
            "serve",
            "--listen",
            loopback,
            "--http-listen",
            loopback,
            "--capacity-mib",
            &capacity,
        ],
    )
    .await?;
    say(format!(
        "cache server    {}  (process {})",
        server.url(),
        server.id()
    ));
    let cache = server.url();
    spinner.set_message("loading the model into a prefill worker and a decode worker");
    let worker = [
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
    let prefill = Process::start("prefill worker", &[&worker[..], &["--role", "prefill"]].concat()).await?;
    say(format!(
        "prefill worker  {}  (process {})",
        prefill.url(),
        prefill.id()
    ));
    let peer = prefill.url();
    let only_decode = ["--role", "decode", "--prefill", &peer, "--no-local-reuse"];
    let decode = Process::start("decode worker", &[&worker[..], &only_decode].concat()).await?;
    say(format!(
        "decode worker   {}  (process {})",
        decode.url(),
        decode.id()
    ));

    let prompts = prompts::prompts(options.shared_lines, options.requests);
    let ask = |prompt: &str, use_cache| ask(decode.url(), prompt.to_owned(), options.max_tokens, use_cache);
    ask("Hello", false).await?;
    let mut cold: Vec<Answer> = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        spinner.set_message(format!("request {} of {}, no cache", i + 1, prompts.len()));
        cold.push(ask(prompt, false).await?);
    }
    spinner.set_message("request 1, computed and published by the prefill worker");
    let fill = ask(&prompts[0], true).await?;
    let mut warm = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        spinner.set_message(format!("request {} of {}, from the cache", i + 1, prompts.len()));
        // The first time a question is asked its own few blocks are not in the cache yet; ask once more so that all
        // rows show the same thing.
        if i > 0 {
            ask(prompt, true).await?;
        }
        warm.push(ask(prompt, true).await?);
    }
    spinner.finish_and_clear();
    let rows = cold
        .into_iter()
        .zip(warm)
        .map(|(cold, warm)| Row { cold, warm })
        .collect();
    let client = CacheClient::start(ClientOptions::new(&cache)).map_err(CliError::failed)?;
    let stats = client.stats().await.map_err(CliError::failed)?;
    for process in [decode, prefill, server] {
        process.stop().await;
    }
    Ok(Report {
        model: model.to_owned(),
        rows,
        fill,
        stats: inspect::stats_json(&stats),
    })
}

fn spinner(hidden: bool) -> ProgressBar {
    if hidden {
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner();
    let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})");
    spinner.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    spinner.enable_steady_tick(Duration::from_millis(120));
    spinner
}
