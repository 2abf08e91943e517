//! Time to the first token of a long prompt: computed, and with its state from each tier of a cache server in another process.

use super::remote::Remote;
use super::speed::{Figure, median};
use cairn_client::{CacheClient, ClientOptions};
use cairn_proto::pb;
use cairn_runtime::*;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What is measured.
pub struct Size {
    config: ModelConfig,
    tokens: usize,
    /// Of the server's tiers.
    host_mib: u64,
    gpu_mib: u64,
    chunk_mib: u64,
}

impl Size {
    /// A model of the 1B class and 8,192 tokens.
    pub fn large() -> Self {
        Self { config: one_billion(), tokens: 8192, host_mib: 2048, gpu_mib: 1024, chunk_mib: 64 }
    }

    /// To see that the measurement works; its times say nothing.
    pub fn small() -> Self {
        Self { config: super::tokens::small(), tokens: 400, host_mib: 64, gpu_mib: 16, chunk_mib: 2 }
    }

    fn blocks(&self) -> usize {
        // The last token is computed in any case, and so is its block.
        self.tokens / 16 - 1
    }

    fn server(&self, more: &str) -> String {
        let Self { host_mib, chunk_mib, .. } = self;
        format!("[host]\ncapacity_mib = {host_mib}\nchunk_mib = {chunk_mib}\n{more}")
    }
}

/// The shape of Llama 3.2 1B, with a smaller vocabulary.
fn one_billion() -> ModelConfig {
    ModelConfig {
        name: "synthetic-1b".into(),
        layers: 16,
        hidden: 2048,
        intermediate: 8192,
        heads: 32,
        kv_heads: 8,
        head_dim: 64,
        vocabulary: 256,
        rms_epsilon: 1e-5,
        max_positions: 16_384,
        rope_theta: 500_000.0,
        rope_scaling: RopeScaling::None,
        tied_embeddings: true,
    }
}

/// The figures; with a line for what cannot be measured here. `folder` is on the disk that stands for NVMe, `child` the arguments of a process
/// that serves a configuration.
///
/// # Panics
/// When something is not loaded from where it should be.
pub fn figures(device: &ComputeDevice, size: &Size, folder: &Path, child: &[&str]) -> Vec<Figure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let bench = Bench::new(device, size);
        let computing = bench.engine(None).await;
        let mut cold = Vec::new();
        for _ in 0..3 {
            cold.push(time_to_first(&computing, &bench.prompt, false).await.0);
        }
        drop(computing);
        let cold = 1e3 * median(cold);
        let figure = |from: &str, warm: f64, goal| Figure {
            what: format!("first token of {} with state from {from}", size.tokens),
            value: 1e3 * warm,
            unit: "ms",
            limit: (cold, "computed"),
            goal,
        };
        let mut figures = Vec::new();
        figures.extend(bench.with_gpu(child).await.map(|warm| figure("the GPU tier", warm, None)));
        figures.push(figure("host memory", bench.with_host(child).await, Some(0.1)));
        figures.extend(bench.with_disk(folder, child).await.map(|warm| figure("NVMe", warm, None)));
        figures
    })
}

struct Bench<'a> {
    device: &'a ComputeDevice,
    size: &'a Size,
    model: Arc<Model>,
    prompt: Vec<u32>,
}

impl<'a> Bench<'a> {
    fn new(device: &'a ComputeDevice, size: &'a Size) -> Self {
        let config = size.config.clone();
        let model = Model::synthetic(Synthetic::new(config.clone(), 1), config, WeightType::Bf16);
        let prompt = (0..size.tokens as u32).map(|i| (i * i * 31 + i * 7) % 256).collect();
        Self { device, size, model: Arc::new(model.expect("a model")), prompt }
    }

    async fn engine(&self, cache: Option<ClientOptions>) -> Engine {
        let options = EngineOptions {
            pool_tokens: self.size.tokens + 64,
            chunk_tokens: 2048,
            device: self.device.clone(),
            local_reuse: false,
            always_load: true,
            ..EngineOptions::default()
        };
        let share = match cache {
            Some(client) => Some(share(client, &self.model, &options).await),
            None => None,
        };
        let model = self.model.clone();
        let started = tokio::task::spawn_blocking(move || Engine::start(model, options, share)).await;
        started.expect("started").expect("an engine")
    }

    /// An engine with the prompt in the cache, and whoever asks the server about it.
    async fn publish(&self, remote: &Remote) -> (Engine, CacheClient) {
        let (engine, client) = (self.engine(Some(remote.options())).await, remote.client());
        time_to_first(&engine, &self.prompt, true).await;
        let blocks = self.size.blocks() as u64;
        until(&client, "the prompt is in the cache", |stats| stats.committed_blocks >= blocks).await;
        (engine, client)
    }

    /// Median of several loads; `right` says whether one came from where it should.
    async fn warm(&self, engine: &Engine, right: impl Fn(&Summary) -> bool) -> f64 {
        let mut times = Vec::new();
        for _ in 0..5 {
            let (seconds, summary) = time_to_first(engine, &self.prompt, true).await;
            assert!(right(&summary), "not loaded as it should be: {summary:?}");
            times.push(seconds);
        }
        median(times)
    }

    async fn with_host(&self, child: &[&str]) -> f64 {
        let remote = Remote::start(child, &self.size.server(""), &[]);
        let (engine, _client) = self.publish(&remote).await;
        let all = 16 * self.size.blocks();
        let warm =
            self.warm(&engine, |summary| summary.loaded_tokens >= all && summary.gpu_tokens == 0).await;
        drop(engine);
        remote.end();
        warm
    }

    async fn with_gpu(&self, child: &[&str]) -> Option<f64> {
        let tier = format!("[gpu]\ncapacity_mib = {}\n", self.size.gpu_mib);
        let remote = Remote::start(child, &self.size.server(&tier), &[]);
        let (engine, client) = self.publish(&remote).await;
        let shared = client.stats().await.expect("stats").gpus.first().is_some_and(|gpu| gpu.shared);
        let mut warm = None;
        if shared && matches!(self.device, ComputeDevice::Cuda { .. }) {
            // Read once, they are worth a copy.
            time_to_first(&engine, &self.prompt, true).await;
            let blocks = self.size.blocks() as u64;
            until(&client, "the prompt is on the GPU", |stats| stats.gpus[0].resident_blocks >= blocks).await;
            let all = 16 * self.size.blocks();
            warm = Some(self.warm(&engine, |summary| summary.gpu_tokens >= all).await);
        } else {
            println!("SKIPPED: first token from the GPU tier: no device memory is shared here");
        }
        drop(engine);
        remote.end();
        warm
    }

    /// Each load is the first of a server that was just started: nothing is in host memory yet.
    async fn with_disk(&self, folder: &Path, child: &[&str]) -> Option<f64> {
        let folder = tempfile::tempdir_in(folder).expect("a folder on the disk");
        let device = format!(
            "[nvme]\nsegment_mib = {}\n[[nvme.device]]\npath = {:?}\ncapacity_mib = {}\n",
            self.size.chunk_mib,
            folder.path(),
            8 * self.size.chunk_mib.max(256) + 1
        );
        let config = self.size.server(&device);
        let remote = Remote::start(child, &config, &[]);
        let (engine, client) = self.publish(&remote).await;
        let usable = client.stats().await.expect("stats").devices.first().is_some_and(|d| d.state != "lost");
        if !usable {
            println!("SKIPPED: first token from NVMe: {} cannot be a device", folder.path().display());
            drop(engine);
            remote.end();
            return None;
        }
        let blocks = self.size.blocks() as u64;
        let stored = |stats: &pb::StatsResponse| stats.devices[0].stored_blocks >= blocks;
        until(&client, "the prompt is on the disk", stored).await;
        drop(engine);
        remote.end();
        let mut times = Vec::new();
        for _ in 0..3 {
            let remote = Remote::start(child, &config, &[]);
            let (engine, client) = (self.engine(Some(remote.options())).await, remote.client());
            let read = |stats: &pb::StatsResponse| {
                stats.devices[0].state == "ready" && stats.devices[0].live_blocks >= blocks
            };
            until(&client, "the disk is read in", read).await;
            // The device has its kernels loaded before the clock runs.
            time_to_first(&engine, &self.prompt, false).await;
            let (seconds, summary) = time_to_first(&engine, &self.prompt, true).await;
            assert!(summary.loaded_tokens >= 16 * self.size.blocks(), "not loaded: {summary:?}");
            times.push(seconds);
            drop(engine);
            remote.end();
        }
        Some(median(times))
    }
}

async fn until(client: &CacheClient, what: &str, holds: impl Fn(&pb::StatsResponse) -> bool) {
    for _ in 0..6000 {
        if holds(&client.stats().await.expect("stats")) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not after a minute: {what}");
}

async fn share(client: ClientOptions, model: &Model, options: &EngineOptions) -> Share {
    let worker = WorkerOptions {
        listen: ([127, 0, 0, 1], 0).into(),
        model: ModelPath::Synthetic(1),
        model_name: None,
        weight_type: WeightType::Bf16,
        role: Role::Both,
        cache: None,
        prefill: None,
        prefill_timeout: Duration::ZERO,
        delegate_min_tokens: 0,
        tenant: "bench".into(),
        tenant_salt: [0; 32],
        engine: options.clone(),
    };
    let space = key_space(model, &worker).expect("a key space");
    let client = cairn_client::CacheClient::start(client).expect("a client");
    client.open_space(&space).await.expect("the space is opened");
    Share::new(client, space, None)
}

/// Seconds to the first token, and what became of the request.
async fn time_to_first(engine: &Engine, prompt: &[u32], use_cache: bool) -> (f64, Summary) {
    let request = Request {
        tokens: prompt.to_vec(),
        work: Work::Generate { max_tokens: 1, ignore_end: true },
        sampling: Sampling { temperature: 0.0, top_p: 1.0, seed: 0 },
        use_cache,
    };
    let began = Instant::now();
    let mut updates = engine.submit(request).await.expect("submitted");
    let (mut first, mut summary) = (None, Summary::default());
    while let Some(update) = updates.recv().await {
        match update {
            Update::Token(_) => drop(first.get_or_insert_with(|| began.elapsed())),
            Update::Finished(ended) => summary = ended,
        }
    }
    (first.expect("a token").as_secs_f64(), summary)
}
