//! `cairn bench serve`: traffic at workers of ours, started for it, or at an endpoint that is there.

use super::measured::{OutputArguments, Seen, measure};
use super::positive;
use crate::CliError;
use crate::fleet::{Process, Secure};
use crate::model::{PullOptions, choose};
use cairn_bench::serve::crossover::{self, Workers};
use cairn_bench::serve::{
    Endpoint, Kind, Link, Load, Pass, Session, Shape, Slo, pass, same_answers, tables, traffic,
};
use cairn_bench::{BenchError, OrFail, Watch};
use cairn_client::CacheClient;
use cairn_harness::section::Section;
use cairn_proto::{Tier, pb};
use clap::Args;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

#[derive(Args)]
pub(crate) struct ServeArguments {
    /// An OpenAI-compatible endpoint, as http://host:port, instead of workers of our own: then there is no pass with the cache off, and no crossover.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// The name of its model [default: the first that it serves].
    #[arg(long, value_name = "NAME", requires = "url")]
    model_name: Option<String>,
    /// A file with a key for its bearer authentication.
    #[arg(long, value_name = "FILE", requires = "url")]
    key_file: Option<std::path::PathBuf>,
    #[command(flatten)]
    pull: PullOptions,
    /// Another model for our own workers: a GGUF file, a checkpoint folder, or synthetic:SEED.
    #[arg(long, value_name = "PATH", conflicts_with = "url")]
    model: Option<String>,
    /// Traffic, separated by commas: chat, doc-qa, agent.
    #[arg(long, value_delimiter = ',', default_value = "chat,doc-qa,agent")]
    traffic: Vec<Kind>,
    /// Users, or documents.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    sessions: u32,
    /// Requests of each.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=100))]
    turns: u32,
    /// Words of a document; system prompts and turns have fixed shares of it.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(8..=100_000))]
    words: u32,
    /// Tokens of an answer.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(2..=4096))]
    answer_tokens: u32,
    /// Sessions at a time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    concurrency: u32,
    /// The first token within so many ms counts as served well,
    #[arg(long, default_value_t = 500.0, value_parser = positive)]
    slo_ttft_ms: f64,
    /// if each further one takes no longer than this on average.
    #[arg(long, default_value_t = 50.0, value_parser = positive)]
    slo_itl_ms: f64,
    /// Lengths of prompts, in words, at which loading is held against computing.
    #[arg(long, value_delimiter = ',', default_value = "10,20,40,80,160,320,640", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    crossover_words: Vec<u32>,
    /// Different prompts of each.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    crossover_repeats: u32,
    /// Slow links to measure that on, in Mbit/s, besides the best way that there is.
    #[arg(long, value_delimiter = ',', default_value = "1000,100", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    links: Vec<u32>,
    /// Memory of the cache server, in MiB.
    #[arg(long, default_value_t = 2048, value_parser = clap::value_parser!(u64).range(64..))]
    capacity_mib: u64,
    /// Which of its kind [default: 1; for an endpoint that was there before, another each time, so that cold is cold].
    #[arg(long)]
    seed: Option<u64>,
    #[command(flatten)]
    output: OutputArguments,
}

/// Longest wait for what a worker publishes: steps, and how long each is.
const SETTLE_STEPS: u32 = 600;
const SETTLE_STEP: Duration = Duration::from_millis(50);

/// The totals must stand still so many times.
const SETTLED: u32 = 4;

/// Of the workers' blocks, as they are by default.
const BLOCK_TOKENS: u64 = 16;

/// Tokens that a worker holds itself.
const POOL_TOKENS: &str = "32768";

pub(super) fn run(arguments: &ServeArguments) -> Result<(), CliError> {
    arguments.output.prepare()?;
    let ((sections, complete, differ), _) = match &arguments.url {
        Some(url) if url.starts_with("https:") => {
            return Err(CliError::Usage(
                "--url speaks plain HTTP: give an http:// address, of a proxy say".into(),
            ));
        }
        Some(url) => {
            let key = arguments.key_file.as_ref().map(std::fs::read_to_string).transpose();
            let endpoint = Endpoint {
                url: url.trim_end_matches('/').trim_end_matches("/v1").to_owned(),
                model: arguments.model_name.clone(),
                key: key.map_err(CliError::failed)?.map(|key| key.trim().to_owned()),
                ours: false,
            };
            measure(|_, seen| async move { foreign(arguments, endpoint, &seen).await })?
        }
        None => {
            let model = choose(arguments.model.as_deref(), &arguments.pull, true)?;
            measure(|_, seen| async move { own(arguments, &model, &seen).await })?
        }
    };
    arguments.output.finish("serve", sections, complete)?;
    match differ {
        false => Ok(()),
        true => Err(CliError::Failed(
            "answers differ with and without the cache: this is a defect in Cairn, please report it".into(),
        )),
    }
}

/// Tables, whether nothing is missing, and whether answers differed.
type Served = (Vec<Section>, bool, bool);

impl ServeArguments {
    fn load(&self, use_cache: bool) -> Load {
        Load { concurrency: self.concurrency as usize, answer_tokens: self.answer_tokens, use_cache }
    }

    fn sessions(&self, kind: Kind) -> Vec<Session> {
        let (sessions, turns, words) = (self.sessions as usize, self.turns as usize, self.words as usize);
        traffic(kind, Shape { sessions, turns, words, seed: self.seed() })
    }

    fn seed(&self) -> u64 {
        let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let other = || if self.url.is_some() { now().map_or(1, |since| since.as_secs()) } else { 1 };
        self.seed.unwrap_or_else(other)
    }

    fn slo(&self) -> Slo {
        Slo { ttft_ms: self.slo_ttft_ms, gap_ms: self.slo_itl_ms }
    }

    fn requests(&self, passes: usize) -> usize {
        self.traffic.len() * (self.sessions * self.turns) as usize * passes
    }
}

async fn foreign(
    arguments: &ServeArguments,
    mut endpoint: Endpoint,
    seen: &Arc<Seen>,
) -> Result<Served, BenchError> {
    if endpoint.model.is_none() {
        endpoint.model = Some(endpoint.first_model().await?);
    }
    seen.begin(arguments.requests(2));
    // Once, so that both passes send the same.
    let seed = arguments.seed();
    let (mut sections, mut complete) = (Vec::new(), true);
    for kind in arguments.traffic.iter().copied() {
        let sessions = arguments.sessions(kind);
        let mut passes = Vec::new();
        for name in ["cold", "warm"] {
            passes.push(pass(name, &endpoint, (&sessions, arguments.load(true)), &**seen).await?);
        }
        complete &= passes.iter().all(|pass| pass.complete);
        let mut tables = tables(kind.name(), &passes, arguments.slo());
        if let Some(totals) = tables.first_mut() {
            totals
                .notes
                .push(format!("cold: these prompts for the first time (--seed {seed}). warm: again."));
        }
        sections.extend(tables);
    }
    Ok((sections, complete, false))
}

/// A cache server, and workers as they are needed.
struct Fleet<'a> {
    arguments: &'a ServeArguments,
    model: &'a str,
    secure: Secure,
    server: Process,
    client: CacheClient,
}

fn bench_error(error: CliError) -> BenchError {
    BenchError(error.to_string())
}

impl<'a> Fleet<'a> {
    async fn start(arguments: &'a ServeArguments, model: &'a str) -> Result<Self, BenchError> {
        let secure = Secure::new(None).map_err(bench_error)?;
        let capacity = arguments.capacity_mib.to_string();
        let serve =
            ["serve", "--config", &secure.config, "--listen", "127.0.0.1:0", "--http-listen", "127.0.0.1:0"];
        let serve = [&serve[..], &["--capacity-mib", &capacity]].concat();
        let server = Process::start("cache server", &serve).await.map_err(bench_error)?.with_tls();
        let options = secure.connect().and_then(|connect| connect.options(&server.url()));
        let client = CacheClient::start(options.map_err(bench_error)?).or_fail("a client")?;
        Ok(Self { arguments, model, secure, server, client })
    }

    /// A worker, behind a link if there is one.
    async fn worker(&self, link: Option<&Link>, more: &[&str]) -> Result<(Process, Endpoint), BenchError> {
        let cache = link.map_or(self.server.url(), |link| format!("https://{}", link.address()));
        let base = ["worker", "--listen", "127.0.0.1:0", "--model", self.model, "--cache", &cache];
        let mut words = [&base[..], &["--pool-tokens", POOL_TOKENS], more].concat();
        words.extend(self.secure.arguments.iter().map(String::as_str));
        if link.is_some() {
            // The one wire that needs nothing but this port.
            words.extend(["--wire", "grpc"]);
        }
        let process = Process::start("worker", &words).await.map_err(bench_error)?;
        let endpoint = Endpoint { url: process.url(), model: None, key: None, ours: true };
        Ok((process, endpoint))
    }

    async fn stats(&self) -> Result<pb::StatsResponse, BenchError> {
        self.client.stats().await.or_fail("the server's totals")
    }

    /// Until nothing more is published.
    async fn settled(&self) -> Result<(), BenchError> {
        let (mut before, mut still) = (None, 0);
        for _ in 0..SETTLE_STEPS {
            let stats = self.stats().await?;
            let now = (stats.committed_blocks, stats.published_bytes, stats.reservations);
            still = if before == Some(now) && stats.reservations == 0 { still + 1 } else { 0 };
            if still >= SETTLED {
                return Ok(());
            }
            before = Some(now);
            tokio::time::sleep(SETTLE_STEP).await;
        }
        Err(BenchError("the cache server did not come to rest".into()))
    }

    /// Sends all sessions, and says what the server found meanwhile.
    async fn pass(
        &self,
        name: &str,
        endpoint: &Endpoint,
        (sessions, load): (&[Session], Load),
        seen: &Arc<Seen>,
    ) -> Result<Pass, BenchError> {
        let found = |stats: &pb::StatsResponse| -> BTreeMap<String, u64> {
            let name =
                |tier: &pb::TierStats| Tier::try_from(tier.tier()).map_or("unknown", Tier::name).to_owned();
            stats.tiers.iter().map(|tier| (name(tier), tier.hit_blocks)).collect()
        };
        let before = found(&self.stats().await?);
        let mut pass = pass(name, endpoint, (sessions, load), &**seen).await?;
        self.settled().await?;
        let after = found(&self.stats().await?);
        pass.tiers = after
            .into_iter()
            .map(|(tier, blocks)| (tier.clone(), blocks - before.get(&tier).copied().unwrap_or(0)))
            .filter(|(_, blocks)| *blocks > 0)
            .collect();
        Ok(pass)
    }

    async fn crossover(
        &self,
        filler: &Endpoint,
        link: Option<u32>,
        seen: &Arc<Seen>,
    ) -> Result<Section, BenchError> {
        let arguments = self.arguments;
        let seed = arguments.seed();
        let target = self.server.address().parse().or_fail("the server's address")?;
        let relay = match link {
            Some(megabits) => Some(Link::start(target, megabits).await?),
            None => None,
        };
        let (loader, loads) = self.worker(relay.as_ref(), &["--no-local-reuse", "--always-load"]).await?;
        let (chooser, chooses) = self.worker(relay.as_ref(), &["--no-local-reuse"]).await?;
        let workers = Workers { filler: filler.clone(), loads, chooses };
        let options = crossover::Options {
            words: arguments.crossover_words.iter().map(|words| *words as usize).collect(),
            repeats: arguments.crossover_repeats as usize,
            seed: seed + u64::from(link.unwrap_or(0)) + 1000,
            block_tokens: BLOCK_TOKENS,
        };
        let name = link.map_or("best wire".into(), |megabits| format!("{megabits} Mbit/s"));
        let found = crossover::run(&name, &workers, &options, || self.settled(), &**seen).await?;
        loader.stop().await;
        chooser.stop().await;
        Ok(found.section)
    }
}

async fn own(arguments: &ServeArguments, model: &str, seen: &Arc<Seen>) -> Result<Served, BenchError> {
    let mut crossings: Vec<Option<u32>> = vec![None];
    crossings.extend(arguments.links.iter().copied().map(Some));
    let prompts = arguments.crossover_words.len() * arguments.crossover_repeats as usize;
    seen.begin(arguments.requests(3) + crossings.len() * (2 * prompts + 6));
    let fleet = Fleet::start(arguments, model).await?;
    let (first, cold) = fleet.worker(None, &[]).await?;
    let (second, warm) = fleet.worker(None, &["--no-local-reuse"]).await?;
    let (mut sections, mut complete, mut differ) = (Vec::new(), true, false);
    for kind in arguments.traffic.iter().copied() {
        let sessions = arguments.sessions(kind);
        let mut passes = Vec::new();
        for (name, endpoint, use_cache) in
            [("off", &cold, false), ("cold", &cold, true), ("warm", &warm, true)]
        {
            let load = arguments.load(use_cache);
            passes.push(fleet.pass(name, endpoint, (&sessions, load), seen).await?);
        }
        complete &= passes.iter().all(|pass| pass.complete);
        differ |= passes.iter().any(|pass| !same_answers(&passes[0], pass));
        let mut tables = tables(kind.name(), &passes, arguments.slo());
        if let Some(totals) = tables.first_mut() {
            totals.notes.push(format!(
                "off: no cache at all. cold: a worker with its own pool, and an empty cache server. warm: another worker, which keeps nothing itself; \
                 all that it does not compute comes from the cache server. Answers identical: {}.",
                if differ { "NO" } else { "yes" }
            ));
        }
        sections.extend(tables);
    }
    for link in crossings {
        if !seen.stopped() {
            sections.push(fleet.crossover(&cold, link, seen).await?);
        }
    }
    complete &= !seen.stopped();
    drop(fleet.client);
    for process in [second, first, fleet.server] {
        process.stop().await;
    }
    Ok((sections, complete, differ))
}
