//! Two workers share attention state over each wire by force: the tokens are those of a worker without a cache.

#![allow(clippy::unwrap_used)]

use cairn_client::{ClientOptions, WireKind};
use cairn_runtime::*;
use cairn_tests::wires::{Site, options, wires};
use cairn_tests::*;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

fn worker(folder: &Path, cache: ClientOptions) -> WorkerOptions {
    WorkerOptions {
        listen: ([127, 0, 0, 1], 0).into(),
        model: ModelPath::Files(folder.into()),
        model_name: Some("tiny".into()),
        weight_type: WeightType::Bf16,
        role: Role::Both,
        cache: Some(cache),
        prefill: None,
        prefill_timeout: Duration::from_secs(60),
        delegate_min_tokens: 64,
        tenant: "t".into(),
        tenant_salt: [0; 32],
        engine: EngineOptions { pool_tokens: 2048, chunk_tokens: 64, ..EngineOptions::default() },
    }
}

async fn ask(worker: &Worker, cache: bool) -> Value {
    let prompt: Vec<u32> = (0..403).map(|i| (i * i * 31 + i * 7) % 256).collect();
    let body = json!({"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true, "cairn_cache": cache});
    let url = format!("http://{}/v1/completions", worker.address());
    let response = reqwest::Client::new().post(url).json(&body).send().await.unwrap();
    assert_eq!(response.status(), 200);
    response.json().await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_the_same_over_every_wire() {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), &tiny_config());
    for kind in wires().into_iter().filter(|kind| *kind != WireKind::Mem) {
        let site = Site::start(512).await;
        let mut cache = options(&site.server, &site.certs.ca);
        cache.wire = Some(kind);
        cache.lookup_timeout = Duration::from_secs(20);
        let first = Worker::start(worker(folder.path(), cache.clone())).await.unwrap();
        let second = Worker::start(worker(folder.path(), cache)).await.unwrap();
        let cold = ask(&first, false).await;
        ask(&first, true).await;
        eventually("the first worker's blocks are in the cache", || {
            site.server.usage().resident_blocks >= 403 / 16
        })
        .await;
        let warm = ask(&second, true).await;
        assert_eq!(warm["cairn"]["loaded_tokens"], 400, "{kind}: {warm}");
        assert_eq!(warm["cairn"]["wire"], kind.name(), "{warm}");
        assert_eq!(warm["choices"][0]["token_ids"], cold["choices"][0]["token_ids"], "{kind}");
        drop((first, second));
        site.server.audit().unwrap();
        site.server.shutdown().await.unwrap();
    }
}
