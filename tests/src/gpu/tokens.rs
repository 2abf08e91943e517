//! The runtime on the device against the runtime on the CPU, and against itself through a cache.

use crate::{config, server_and_client};
use cairn_client::{CacheClient, ClientOptions};
use cairn_gpu::Device;
use cairn_gpu::backend::cuda::CudaDevice;
use cairn_proto::KeySpace;
use cairn_runtime::*;
use cairn_server::Server;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Where the best logit leads by more than this, both must choose it; of logits whose spread is about one. The CPU keeps activations in single
/// precision, the device rounds what goes into a product to the format of the weights.
const MARGIN_BF16: f32 = 0.15;
const MARGIN_F32: f32 = 2e-3;

/// A small model of the heads that the kernels know.
pub(super) fn small() -> ModelConfig {
    ModelConfig {
        name: "small".into(),
        layers: 3,
        hidden: 128,
        intermediate: 192,
        heads: 6,
        kv_heads: 2,
        head_dim: 64,
        vocabulary: 256,
        rms_epsilon: 1e-5,
        max_positions: 2048,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        tied_embeddings: false,
    }
}

/// Such a model in files, with so many layers.
pub(super) fn small_checkpoint(layers: u64) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let mut model = crate::tiny_config();
    let sizes =
        [("hidden_size", 128), ("head_dim", 64), ("num_attention_heads", 6), ("num_hidden_layers", layers)];
    sizes.into_iter().for_each(|(key, value)| model[key] = value.into());
    crate::write_checkpoint(folder.path(), &model);
    folder
}

pub(super) fn prompt(length: usize, seed: u64) -> Vec<u32> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..length).map(|_| rng.random_range(0..256)).collect()
}

/// Every position of a prompt: logits close to the CPU's, and the same best token wherever it leads clearly.
///
/// # Panics
/// When they are not.
pub fn agree_with_the_cpu(device: &ComputeDevice, seed: u64) {
    for (weights, kv_type, margin) in [
        (WeightType::F32, KvType::F32, MARGIN_F32),
        (WeightType::Bf16, KvType::Bf16, MARGIN_BF16),
        (WeightType::Bf16, KvType::F16, MARGIN_BF16),
    ] {
        let config = small();
        let vocabulary = config.vocabulary;
        let shape = PagedShape {
            layers: config.layers,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            block_tokens: 16,
            slots: 8,
            kv_type,
        };
        let model = Model::synthetic(Synthetic::new(config.clone(), seed), config, weights).expect("a model");
        let model = Arc::new(model);
        let tokens = prompt(100, seed);
        let logits = |device| prompt_logits(&model, device, shape, &tokens).expect("computed");
        let (cpu, other) = (logits(&ComputeDevice::Cpu), logits(device));
        let (mut worst, mut decided) = (0f32, 0);
        for (cpu, other) in cpu.chunks_exact(vocabulary).zip(other.chunks_exact(vocabulary)) {
            let far = cpu.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            worst = worst.max(far);
            let (best, lead) = lead(cpu);
            if lead > margin {
                decided += 1;
                assert_eq!(
                    lead_of(other),
                    best,
                    "{weights:?} weights, {kv_type:?}: the best leads by {lead}"
                );
            }
        }
        assert!(worst < margin / 2.0, "{weights:?} weights, {kv_type:?}: a logit differs by {worst}");
        assert!(decided > tokens.len() / 2, "too few positions are decided: {decided}");
        println!(
            "tokens: {weights:?} weights, {kv_type:?} state: {decided} of {} positions lead by {margin} and agree; logits within {worst:.1e}",
            tokens.len()
        );
    }
}

fn lead_of(logits: &[f32]) -> usize {
    lead(logits).0
}

/// The best id, and by how much it leads.
fn lead(logits: &[f32]) -> (usize, f32) {
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    ids.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    (ids[0], logits[ids[0]] - logits[ids[1]])
}

/// A client that waits: an emulated device leaves little of the machine to others.
pub(super) fn patient(url: &str) -> ClientOptions {
    let mut client = ClientOptions::new(url);
    client.connect_timeout = Duration::from_secs(30);
    client.lookup_timeout = Duration::from_secs(30);
    client.fetch_timeout = Duration::from_secs(30);
    client.publish_timeout = Duration::from_secs(30);
    client
}

fn options(device: &ComputeDevice, folder: &Path, server: &Server) -> WorkerOptions {
    worker_options(device, folder, patient(&format!("http://{}", server.address())))
}

pub(super) fn worker_options(device: &ComputeDevice, folder: &Path, cache: ClientOptions) -> WorkerOptions {
    WorkerOptions {
        listen: ([127, 0, 0, 1], 0).into(),
        model: ModelPath::Files(folder.into()),
        model_name: Some("small".into()),
        weight_type: WeightType::Bf16,
        role: Role::Both,
        cache: Some(cache),
        prefill: None,
        prefill_timeout: Duration::from_secs(20),
        delegate_min_tokens: 64,
        tenant: "t".into(),
        tenant_salt: [0; 32],
        engine: EngineOptions {
            pool_tokens: 2048,
            chunk_tokens: 64,
            device: device.clone(),
            always_load: true,
            ..EngineOptions::default()
        },
    }
}

pub(super) struct Answer {
    pub(super) tokens: Vec<u32>,
    /// From the cache for this request.
    pub(super) loaded: u64,
    /// Of these, from the memory of a GPU.
    pub(super) from_gpu: u64,
    /// Of these, verified on the device.
    verified_there: u64,
    /// In all: also what another request had loaded or computed already.
    cached: u64,
}

pub(super) async fn ask(worker: &Worker, prompt: &[u32], cache: bool, temperature: f64) -> Answer {
    let url = format!("http://{}/v1/completions", worker.address());
    let body = json!({"prompt": prompt, "max_tokens": 24, "temperature": temperature, "seed": 5, "ignore_eos": true,
        "return_token_ids": true, "cairn_cache": cache});
    let response = reqwest::Client::new().post(url).json(&body).send().await.expect("an answer");
    let body: Value = response.json().await.expect("an answer in JSON");
    let ids = body["choices"][0]["token_ids"].as_array().unwrap_or_else(|| panic!("no tokens in {body}"));
    Answer {
        tokens: ids.iter().map(|id| id.as_u64().expect("an id") as u32).collect(),
        loaded: body["cairn"]["loaded_tokens"].as_u64().expect("a number"),
        from_gpu: body["cairn"]["gpu_tokens"].as_u64().expect("a number"),
        verified_there: body["cairn"]["device_verified_tokens"].as_u64().expect("a number"),
        cached: body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("a number"),
    }
}

/// The same tokens with the cache off, cold and warm; alone, beside others, and over the answer's own blocks in a next turn.
///
/// # Panics
/// When they differ, or the cache was not used.
pub fn identical_through_the_cache(device: &ComputeDevice, seed: u64) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(through_the_cache(device, seed));
}

/// Whether the device copies out of memory that it must not write.
fn reads_in_place(device: &ComputeDevice) -> bool {
    let ComputeDevice::Cuda { ordinal, folders } = device else { return false };
    let device = CudaDevice::open(*ordinal, folders.clone()).expect("the device");
    // The system may refuse what the driver could do.
    let file = tempfile::tempfile().expect("a file");
    file.set_len(1 << 16).expect("its size");
    let map = memmap2::MmapOptions::new().map_raw_read_only(&file).expect("mapped");
    device.registers_read_only() && device.register(Arc::new(map), false).is_ok()
}

async fn through_the_cache(device: &ComputeDevice, seed: u64) {
    let folder = small_checkpoint(3);
    let (server, client) = server_and_client(config(4096)).await;
    let start = || Worker::start(options(device, folder.path(), &server));
    let first = start().await.expect("a worker");
    let prompt = prompt(403, seed);
    let off = ask(&first, &prompt, false, 0.0).await;
    let cold = ask(&first, &prompt, true, 0.0).await;
    assert!(off.tokens == cold.tokens && cold.loaded == 0, "cold differs from off");
    crate::eventually("the blocks are in the cache", || server.usage().resident_blocks >= 25).await;
    let second = start().await.expect("a worker");
    let warm = ask(&second, &prompt, true, 0.0).await;
    assert_eq!(warm.loaded, 400, "everything but the last tokens is loaded");
    assert_eq!(warm.tokens, off.tokens, "warm differs from off");
    let there = if reads_in_place(device) { 400 } else { 0 };
    assert_eq!(warm.verified_there, there, "little is left to compute: no CPU reads the blocks");
    other_ends(device, folder.path(), (&server, &client), &first, (&prompt, &off.tokens)).await;
    // The next turn, over the answer's own blocks, beside three others; one of them is drawn with a temperature.
    let mut longer = prompt.clone();
    longer.extend(&off.tokens);
    longer.extend([1, 2, 3]);
    let others: Vec<Vec<u32>> = (1..3).map(|i| self::prompt(90 * i, seed + i as u64)).collect();
    let apart: Vec<Vec<u32>> = {
        let mut all = vec![
            ask(&first, &longer, false, 0.0).await.tokens,
            ask(&first, &longer, false, 0.9).await.tokens,
        ];
        for other in &others {
            all.push(ask(&first, other, false, 0.0).await.tokens);
        }
        all
    };
    found(&client, first.space(), &longer[..longer.len() - 3]).await;
    let third = start().await.expect("a worker");
    let (a, b, c, d) = tokio::join!(
        ask(&third, &longer, true, 0.0),
        ask(&third, &longer, true, 0.9),
        ask(&third, &others[0], true, 0.0),
        ask(&third, &others[1], true, 0.0),
    );
    // Whichever of the two came first loaded them; the other may have found them in the worker's pool.
    assert!(a.loaded.max(b.loaded) > 400, "the answer's blocks are loaded: {} and {}", a.loaded, b.loaded);
    assert!(a.cached.min(b.cached) > 400, "and nothing of them is computed: {} and {}", a.cached, b.cached);
    for (i, (together, apart)) in [a, b, c, d].iter().zip(&apart).enumerate() {
        assert_eq!(
            &together.tokens, apart,
            "answer {i} together differs from apart; {} tokens loaded",
            together.loaded
        );
    }
    server.audit().expect("the server's books are in order");
    likeliest(device, &first, &[prompt, off.tokens].concat());
    println!("tokens: the same with the cache off, cold and warm, alone and beside others");
}

/// Waits until all of a prompt is in the cache.
async fn found(client: &CacheClient, space: &KeySpace, prompt: &[u32]) {
    let names = cairn_proto::chain(space, prompt, |_| &[]);
    for _ in 0..crate::PATIENCE {
        if client.lookup(space, &names).await.resident() == names.len() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not after half a minute: {} blocks in the cache", names.len());
}

/// The prompt's blocks with another end, and then with one of them gone bad.
async fn other_ends(
    device: &ComputeDevice,
    folder: &Path,
    (server, client): (&Server, &CacheClient),
    first: &Worker,
    (prompt, answer): (&[u32], &[u32]),
) {
    let start = || Worker::start(options(device, folder, server));
    // Long enough that copies overlap with computing it.
    let fork = [&prompt[..200], &self::prompt(150, 9)].concat();
    let apart = ask(first, &fork, false, 0.0).await;
    let warm = ask(&start().await.expect("a worker"), &fork, true, 0.0).await;
    assert_eq!((warm.loaded, warm.verified_there), (192, 0), "loaded in place");
    assert_eq!(warm.tokens, apart.tokens, "warm with another end differs from off");
    let space = first.space();
    let names = cairn_proto::chain(space, prompt, |_| &[]);
    let run = client.lookup(space, &names).await.run.expect("they are there");
    let mut block = [vec![0; space.block_bytes() as usize]];
    assert!(client.fetch(&run, 7, &mut block).await.iter().all(|outcome| outcome.is_hit()));
    drop(run);
    crate::corrupt_in_memory(&block[0]);
    let noticed = ask(&start().await.expect("a worker"), prompt, true, 0.0).await;
    let there = if reads_in_place(device) { 112 } else { 0 };
    assert_eq!(
        (noticed.loaded, noticed.verified_there),
        (112, there),
        "what is right before the wrong block"
    );
    assert_eq!(noticed.tokens, answer, "tokens of wrong bytes");
    crate::eventually("it is quarantined", || server.counters().quarantined_blocks == 1).await;
    // Who finds it missing brings it back.
    let again = ask(&start().await.expect("a worker"), prompt, true, 0.0).await;
    assert_eq!((again.loaded, &again.tokens[..]), (112, answer), "after the wrong block left");
    found(client, space, prompt).await;
}

/// A device that was filled up after the worker started: blocks are verified by the CPU, and loaded all the same. Only for the emulator.
///
/// # Panics
/// When they are not.
pub fn identical_without_room(cuda: &CudaDevice, device: &ComputeDevice) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let folder = small_checkpoint(3);
        let (server, client) = server_and_client(config(512)).await;
        let worker = Worker::start(options(device, folder.path(), &server)).await.expect("a worker");
        let prompt = prompt(403, 1);
        let off = ask(&worker, &prompt, false, 0.0).await;
        let other = Worker::start(options(device, folder.path(), &server)).await.expect("a worker");
        // What a first load takes of the device is there before it is full.
        let short = self::prompt(67, 2);
        for prompt in [&short, &prompt] {
            ask(&other, prompt, true, 0.0).await;
            found(&client, worker.space(), prompt).await;
        }
        let first = ask(&worker, &short, true, 0.0).await;
        assert_eq!((first.loaded, first.verified_there), (64, 64), "there is room yet");
        let mut filled = Vec::new();
        for bytes in [1 << 20, 1 << 16] {
            filled.extend(std::iter::from_fn(|| cuda.allocate(bytes).ok()));
        }
        // What describes copies needs a little.
        filled.truncate(filled.len() - 4);
        let fetches = async || {
            let stats = client.stats().await.expect("stats");
            stats.wires.iter().find(|wire| wire.wire == "shm").map_or(0, |wire| wire.fetches)
        };
        let before = fetches().await;
        let warm = ask(&worker, &prompt, true, 0.0).await;
        assert_eq!((warm.loaded, warm.verified_there), (400, 0), "{} pieces of memory taken", filled.len());
        assert_eq!(fetches().await, before + 1, "pinned once");
        assert_eq!(warm.tokens, off.tokens, "warm differs from off");
        drop(filled);
        println!("tokens: the same where no memory is left on the device");
    });
}

/// The answer at the end of a sequence is what the logits of one pass over all of it say.
fn likeliest(device: &ComputeDevice, worker: &Worker, tokens: &[u32]) {
    let config = &worker.model().config;
    let shape = PagedShape {
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        block_tokens: 16,
        slots: tokens.len().div_ceil(16),
        kv_type: KvType::Bf16,
    };
    let logits = prompt_logits(worker.model(), device, shape, tokens).expect("computed");
    let best: Vec<u32> =
        logits.chunks_exact(config.vocabulary).map(|logits| lead_of(logits) as u32).collect();
    let answer = tokens.len() - 24;
    assert_eq!(best[answer - 1..tokens.len() - 1], tokens[answer..], "the answer is not what the logits say");
}

/// A pool that is too small for what is asked at once: sequences are put back, slots are used again while blocks still leave, requests are
/// cancelled while blocks arrive; and still every answer is what it is alone.
///
/// # Panics
/// When one is not.
pub fn identical_in_a_crowd(device: &ComputeDevice, seed: u64) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(crowd(device, seed));
}

async fn crowd(device: &ComputeDevice, seed: u64) {
    let folder = small_checkpoint(2);
    let (server, _) = server_and_client(config(4096)).await;
    let prompts: Vec<Vec<u32>> = (0..6).map(|i| prompt(150 + 33 * i, seed + i as u64 / 2)).collect();
    let start = |pool_tokens, chunk_tokens, local_reuse| {
        let mut options = options(device, folder.path(), &server);
        options.engine.pool_tokens = pool_tokens;
        options.engine.chunk_tokens = chunk_tokens;
        options.engine.local_reuse = local_reuse;
        Worker::start(options)
    };
    let roomy = start(2048, 2048, true).await.expect("a worker");
    let mut alone = Vec::new();
    for prompt in &prompts {
        alone.push(ask(&roomy, prompt, false, 0.0).await.tokens);
    }
    let tight = start(480, 48, false).await.expect("a worker");
    for _ in 0..2 {
        let leaves = prompts.iter().map(|prompt| {
            let (ask, seed) = (ask(&tight, prompt, true, 0.0), seed);
            async move { drop(tokio::time::timeout(Duration::from_millis(20 + seed % 30), ask).await) }
        });
        futures::future::join_all(leaves).await;
        let all = prompts.iter().map(|prompt| ask(&tight, prompt, true, 0.0));
        let answers = futures::future::join_all(all).await;
        for (i, (answer, alone)) in answers.iter().zip(&alone).enumerate() {
            assert_eq!(&answer.tokens, alone, "prompt {i} in a crowd");
        }
    }
    assert!(server.usage().resident_blocks > 20, "blocks were published meanwhile");
    server.audit().expect("the server's books are in order");
    println!("tokens: the same in a crowd that a small pool cannot hold");
}

/// A worker whose device is lost ends the answers in progress with an error, and refuses what comes after. Only for the emulator.
///
/// # Panics
/// When it waits, or answers.
pub fn answers_end_with_the_device(device: &ComputeDevice) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let folder = small_checkpoint(3);
        let (server, _) = server_and_client(config(512)).await;
        let worker = Worker::start(options(device, folder.path(), &server)).await.expect("a worker");
        let url = format!("http://{}/v1/completions", worker.address());
        let ask = |body: Value| reqwest::Client::new().post(&url).json(&body).send();
        let body = json!({"prompt": prompt(50, 1), "max_tokens": 1500, "ignore_eos": true, "temperature": 0});
        let first = tokio::time::timeout(Duration::from_secs(60), ask(body.clone()))
            .await
            .expect("no answer for ever");
        let first = first.expect("an HTTP answer").status();
        assert!(first.is_server_error(), "an answer by a lost device: {first}");
        let next = tokio::time::timeout(Duration::from_secs(5), ask(body)).await.expect("no answer for ever");
        let next = next.expect("an HTTP answer").status();
        assert!(next.is_server_error(), "an answer after the device was lost: {next}");
        println!("lost: the answer in progress ended with {first}, the next with {next}");
    });
}
