//! Workers and the cache together, in one process over real sockets: the same tokens with the cache off, cold and warm, in
//! any batch and chunking, and after every fault; and the same bytes in the cache whoever computed them.

#![allow(clippy::unwrap_used)]

use cairn_proto::chain;
use cairn_runtime::*;
use cairn_server::Server;
use cairn_tests::*;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

const BLOCK: usize = 16;

fn options(folder: &Path, server: Option<&Server>) -> WorkerOptions {
    WorkerOptions {
        listen: ([127, 0, 0, 1], 0).into(),
        model: ModelPath::Files(folder.into()),
        model_name: Some("tiny".into()),
        weight_type: WeightType::Bf16,
        role: Role::Both,
        cache: server.map(|server| cairn_client::ClientOptions::new(format!("http://{}", server.address()))),
        prefill: None,
        prefill_timeout: Duration::from_secs(20),
        delegate_min_tokens: 64,
        tenant: "t".into(),
        tenant_salt: [0; 32],
        engine: EngineOptions { pool_tokens: 2048, chunk_tokens: 64, ..EngineOptions::default() },
    }
}

fn checkpoint() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &tiny_config());
    folder
}

fn prompt(length: usize, seed: u32) -> Vec<u32> {
    (0..length as u32).map(|i| (i * i * 31 + i * 7 + seed * 13) % 256).collect()
}

#[derive(Debug)]
struct Answer {
    tokens: Vec<u64>,
    cached: u64,
    loaded: u64,
    remote_prefill: bool,
}

async fn post(worker: &Worker, body: Value) -> (u16, Value) {
    let url = format!("http://{}/v1/completions", worker.address());
    let response = reqwest::Client::new().post(url).json(&body).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

async fn ask(worker: &Worker, prompt: &[u32], cache: bool) -> Answer {
    let body = json!({"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true, "cairn_cache": cache});
    let (status, body) = post(worker, body).await;
    assert_eq!(status, 200, "{body}");
    Answer {
        tokens: body["choices"][0]["token_ids"]
            .as_array()
            .unwrap()
            .iter()
            .map(|id| id.as_u64().unwrap())
            .collect(),
        cached: body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap(),
        loaded: body["cairn"]["loaded_tokens"].as_u64().unwrap(),
        remote_prefill: body["cairn"]["remote_prefill"].as_bool().unwrap(),
    }
}

async fn stored(server: &Server, blocks: usize) {
    eventually("the worker's blocks are in the cache", || server.usage().resident_blocks >= blocks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_workers_state_serves_another_with_the_same_tokens() {
    let folder = checkpoint();
    let (server, _) = server_and_client(config(512)).await;
    let first = Worker::start(options(folder.path(), Some(&server))).await.unwrap();
    let second = Worker::start(options(folder.path(), Some(&server))).await.unwrap();
    let prompt = prompt(403, 1);
    let off = ask(&first, &prompt, false).await;
    assert_eq!((off.cached, server.counters().asked_blocks), (0, 0), "off means off");
    let cold = ask(&first, &prompt, true).await;
    assert_eq!(cold.cached, 0);
    stored(&server, 403 / BLOCK).await;
    let local = ask(&first, &prompt, true).await;
    assert_eq!((local.cached, local.loaded), (400, 0));
    let warm = ask(&second, &prompt, true).await;
    assert_eq!((warm.cached, warm.loaded), (400, 400));
    for answer in [cold, local, warm] {
        assert_eq!(answer.tokens, off.tokens);
    }
    let mut longer = prompt.clone();
    longer.extend(off.tokens.iter().map(|id| *id as u32));
    longer.extend([1, 2, 3]);
    eventually("generated blocks are stored too", || server.usage().resident_blocks > 403 / BLOCK).await;
    let third = Worker::start(options(folder.path(), Some(&server))).await.unwrap();
    let next_turn = ask(&third, &longer, true).await;
    assert!(next_turn.loaded > 400, "the answer's own blocks are reused: {next_turn:?}");
    assert_eq!(next_turn.tokens, ask(&third, &longer, false).await.tokens);
    server.audit().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocks_bytes_do_not_depend_on_batch_or_chunking() {
    let folder = checkpoint();
    let space = {
        let options = options(folder.path(), None);
        key_space(&Model::load(&options.model, options.weight_type).unwrap(), &options).unwrap()
    };
    let prompts: Vec<Vec<u32>> = (0..5).map(|seed| prompt(150 + 37 * seed, seed as u32)).collect();
    let mut contents: Vec<Vec<Vec<u8>>> = Vec::new();
    let mut answers: Vec<Vec<Vec<u64>>> = Vec::new();
    for (chunk_tokens, together) in [(512, false), (16, false), (33, true), (64, true)] {
        let (server, client) = server_and_client(config(512)).await;
        let mut options = options(folder.path(), Some(&server));
        options.engine.chunk_tokens = chunk_tokens;
        let worker = Worker::start(options).await.unwrap();
        answers.push(if together {
            let all = prompts.iter().map(|prompt| ask(&worker, prompt, true));
            futures::future::join_all(all).await.into_iter().map(|answer| answer.tokens).collect()
        } else {
            let mut all = Vec::new();
            for prompt in &prompts {
                all.push(ask(&worker, prompt, true).await.tokens);
            }
            all
        });
        let blocks: usize = prompts.iter().map(|prompt| prompt.len() / BLOCK).sum();
        stored(&server, blocks).await;
        let mut content = Vec::new();
        for prompt in &prompts {
            let hashes = chain(&space, prompt, |_| &[]);
            let run = client.lookup(&space, &hashes).await.run.unwrap();
            assert_eq!(run.len(), hashes.len());
            let mut targets = vec![vec![0u8; space.block_bytes() as usize]; run.len()];
            assert!(client.fetch(&run, 0, &mut targets).await.iter().all(|outcome| outcome.is_hit()));
            content.extend(targets);
        }
        contents.push(content);
        worker.shutdown().await;
    }
    for other in 1..contents.len() {
        assert!(contents[other] == contents[0], "run {other} published other bytes");
        assert_eq!(answers[other], answers[0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prefill_and_decode_workers_split_the_work_and_survive_each_other() {
    let folder = checkpoint();
    let (server, _) = server_and_client(config(512)).await;
    let mut prefill = options(folder.path(), Some(&server));
    prefill.role = Role::Prefill;
    let prefill = Worker::start(prefill).await.unwrap();
    let mut decode = options(folder.path(), Some(&server));
    decode.role = Role::Decode;
    decode.engine.local_reuse = false;
    decode.prefill = Some(format!("http://{}", prefill.address()));
    let decode = Worker::start(decode).await.unwrap();
    let prompt = prompt(300, 4);
    let off = ask(&decode, &prompt, false).await;
    let split = ask(&decode, &prompt, true).await;
    assert!(split.remote_prefill && split.loaded == 288, "{split:?}");
    let warm = ask(&decode, &prompt, true).await;
    assert!(!warm.remote_prefill && warm.loaded == 288, "{warm:?}");
    prefill.shutdown().await;
    let other = self::prompt(300, 5);
    let alone = ask(&decode, &other, true).await;
    assert!(!alone.remote_prefill, "the prefill worker is gone: {alone:?}");
    assert_eq!(alone.tokens, ask(&decode, &other, false).await.tokens);
    eventually("no lease is left", || server.usage().leases == 0).await;
    server.shutdown().await.unwrap();
    let without = ask(&decode, &prompt, true).await;
    assert_eq!((without.cached, without.loaded), (0, 0));
    for answer in [split, warm, without] {
        assert_eq!(answer.tokens, off.tokens);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_cache_and_a_small_pool_change_nothing_but_speed() {
    let folder = checkpoint();
    // The cache holds 8 MiB of blocks, the pool two sequences; five compete.
    let (server, _) = server_and_client(config(32)).await;
    let mut options = options(folder.path(), Some(&server));
    options.engine.pool_tokens = 1024;
    let worker = Worker::start(options).await.unwrap();
    let prompts: Vec<Vec<u32>> = (0..6).map(|seed| prompt(400, seed)).collect();
    let mut expected = Vec::new();
    for prompt in &prompts {
        expected.push(ask(&worker, prompt, false).await.tokens);
    }
    for _ in 0..3 {
        let all = prompts.iter().map(|prompt| ask(&worker, prompt, true));
        let answers = futures::future::join_all(all).await;
        for (answer, expected) in answers.iter().zip(&expected) {
            assert_eq!(&answer.tokens, expected);
        }
    }
    server.audit().unwrap();
    eventually("nothing is held", || {
        let usage = server.usage();
        usage.leases == 0 && usage.reservations == 0 && usage.used_slots == usage.resident_blocks
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_cannot_be_served_say_why() {
    let folder = checkpoint();
    let worker = Worker::start(options(folder.path(), None)).await.unwrap();
    let refused = [
        (json!({"prompt": prompt(3000, 0), "max_tokens": 1}), "2048 is the most"),
        (json!({"prompt": [7], "max_tokens": 4000}), "2048 is the most"),
        (json!({"prompt": [999]}), "999 is not in the model's vocabulary"),
        (json!({"prompt": []}), "no tokens"),
        (json!({"prompt": [1], "temperature": 9}), "temperature"),
        (json!({"prompt": [1], "n": 3}), "n: only 1"),
        (json!({"prompt": [1], "logprobs": 2}), "logprobs is not served"),
        (json!({"prompt": [1], "tools": [{"type": "function"}]}), "tools is not served"),
        (json!({"prompt": [1], "max_tokens": 0}), "max_tokens"),
        (json!({"max_tokens": 3}), "prompt"),
    ];
    for (body, expected) in refused {
        let (status, answer) = post(&worker, body).await;
        assert!((400..500).contains(&status), "{answer}");
        let message = answer["error"]["message"].as_str().unwrap();
        assert!(message.contains(expected), "{message:?} does not say {expected:?}");
    }
    let start =
        |options| async { Worker::start(options).await.err().expect("it must not start").to_string() };
    let mut missing = options(folder.path(), None);
    missing.model = ModelPath::Files("/nonexistent/model.gguf".into());
    assert!(start(missing).await.contains("/nonexistent/model.gguf"));
    let garbage = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(garbage.path(), b"this is no model").unwrap();
    let mut unreadable = options(folder.path(), None);
    unreadable.model = ModelPath::Files(garbage.path().into());
    assert!(start(unreadable).await.contains("not a GGUF file"));
    let mut uneven = options(folder.path(), None);
    uneven.engine.block_tokens = 10;
    assert!(start(uneven).await.contains("multiple of 16"));
    let mut lonely = options(folder.path(), None);
    lonely.role = Role::Decode;
    assert!(start(lonely).await.contains("--prefill"));
    let mut taken = options(folder.path(), None);
    taken.listen = worker.address();
    assert!(start(taken).await.contains("--listen"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_http_api_streams_stops_chats_and_counts() {
    let folder = checkpoint();
    let worker = Worker::start(options(folder.path(), None)).await.unwrap();
    let url = |path: &str| format!("http://{}{path}", worker.address());
    let client = reqwest::Client::new();
    let models: Value = client.get(url("/v1/models")).send().await.unwrap().json().await.unwrap();
    assert_eq!(models["data"][0]["id"], "tiny");

    let body = json!({"prompt": "abc", "max_tokens": 6, "temperature": 0, "ignore_eos": true});
    let (_, whole) = post(&worker, body.clone()).await;
    assert_eq!(whole["usage"]["prompt_tokens"], 3);
    assert_eq!(whole["usage"]["completion_tokens"], 6);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({"include_usage": true});
    let text =
        client.post(url("/v1/completions")).json(&streamed).send().await.unwrap().text().await.unwrap();
    let events: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(*events.last().unwrap(), "[DONE]");
    let events: Vec<Value> =
        events[..events.len() - 1].iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let joined: String = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    assert_eq!(joined, whole["choices"][0]["text"].as_str().unwrap());
    assert_eq!(events.last().unwrap()["usage"], whole["usage"]);

    let full = whole["choices"][0]["text"].as_str().unwrap();
    let stop: String = full.chars().skip(2).take(2).collect();
    let mut stopped = body;
    stopped["stop"] = stop.clone().into();
    let (_, answer) = post(&worker, stopped).await;
    let text = answer["choices"][0]["text"].as_str().unwrap();
    assert!(full.starts_with(text) && !text.contains(&stop), "{text:?} of {full:?} stops at {stop:?}");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["prompt_tokens"], 3, "a stopped answer has its usage too");

    let sampled = json!({"prompt": "abc", "max_tokens": 8, "temperature": 1.0, "top_p": 0.9, "seed": 7, "ignore_eos": true});
    assert_eq!(post(&worker, sampled.clone()).await.1["choices"], post(&worker, sampled).await.1["choices"]);

    let chat = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "temperature": 0});
    let answer: Value =
        client.post(url("/v1/chat/completions")).json(&chat).send().await.unwrap().json().await.unwrap();
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
    let bad = client.post(url("/v1/chat/completions")).body("{").send().await.unwrap();
    assert!(bad.status().is_client_error());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_leaves_frees_the_workers_slots() {
    let folder = checkpoint();
    let model = Model::load(&ModelPath::Files(folder.path().into()), WeightType::Bf16).unwrap();
    let options = EngineOptions { pool_tokens: 512, ..EngineOptions::default() };
    let engine = Engine::start(model.into(), options, None).unwrap();
    let request = |tokens: usize| Request {
        tokens: prompt(tokens, 1),
        work: Work::Generate { max_tokens: 512 - tokens, ignore_end: true },
        sampling: Sampling { temperature: 0.0, top_p: 1.0, seed: 0 },
        use_cache: false,
    };
    for _ in 0..20 {
        let mut updates = engine.submit(request(300)).await.unwrap();
        assert!(matches!(updates.recv().await, Some(Update::Token(_))));
    }
    let mut updates = engine.submit(request(500)).await.unwrap();
    let mut last = None;
    while let Some(update) = updates.recv().await {
        last = Some(update);
    }
    assert!(matches!(last, Some(Update::Finished(summary)) if summary.generated_tokens == 12));
}
