//! The runtime against Hugging Face transformers: logits and greedy tokens of tiny seeded models of every supported
//! kind. The golden file was made by `tests/python/tiny_models.py`.

#![allow(clippy::unwrap_used)]

use cairn_runtime::*;
use cairn_tests::write_checkpoint;
use serde_json::Value;
use std::sync::Arc;

/// Largest difference of a logit; they are of the order of 1, and sums are in single precision on both sides.
const TOLERANCE: f64 = 2e-4;

fn golden() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/tiny_models.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32).collect()
}

fn model(config: &Value) -> Arc<Model> {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), config);
    Arc::new(Model::load(&ModelPath::Files(folder.path().into()), WeightType::F32).unwrap())
}

fn options() -> EngineOptions {
    EngineOptions { kv_type: KvType::F32, pool_tokens: 256, chunk_tokens: 24, ..EngineOptions::default() }
}

#[test]
fn logits_agree_with_transformers() {
    let golden = golden();
    let prompt = numbers(&golden["prompt"]);
    for (kind, expected) in golden["models"].as_object().unwrap() {
        let model = model(&expected["config"]);
        let shape = pool_shape(&model, &options()).unwrap();
        let slots: Vec<cairn_gpu::Slot> = (0..shape.slots as u32).map(cairn_gpu::Slot).collect();
        let mut pool = vec![0u8; shape.pool_bytes()];
        let rows: Vec<Row<'_>> = prompt
            .iter()
            .enumerate()
            .map(|(position, token)| Row { token: *token, position, slots: &slots })
            .collect();
        for (row, expected) in expected["logits"].as_object().unwrap() {
            let row: usize = row.parse().unwrap();
            let logits = model.forward(&shape, &mut pool, &rows, &[row], &mut Scratch::default());
            let expected = expected.as_array().unwrap();
            assert_eq!(logits.len(), expected.len());
            for (token, (got, expected)) in logits.iter().zip(expected).enumerate() {
                let difference = (f64::from(*got) - expected.as_f64().unwrap()).abs();
                assert!(difference < TOLERANCE, "{kind}, row {row}, token {token}: {got} is not {expected}");
            }
        }
    }
}

#[tokio::test]
async fn greedy_tokens_agree_with_transformers() {
    let golden = golden();
    for (kind, expected) in golden["models"].as_object().unwrap() {
        let expected_tokens = numbers(&expected["greedy"]);
        let engine = Engine::start(model(&expected["config"]), options(), None).unwrap();
        let request = Request {
            tokens: numbers(&golden["prompt"]),
            work: Work::Generate { max_tokens: expected_tokens.len(), ignore_end: true },
            sampling: Sampling { temperature: 0.0, top_p: 1.0, seed: 0 },
            use_cache: true,
        };
        let mut updates = engine.submit(request).await.unwrap();
        let mut tokens = Vec::new();
        while let Some(update) = updates.recv().await {
            if let Update::Token(token) = update {
                tokens.push(token);
            }
        }
        assert_eq!(tokens, expected_tokens, "{kind}");
    }
}
