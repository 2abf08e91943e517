//! Tiny seeded checkpoints, byte for byte those that `tests/python/tiny_models.py` makes.

use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Writes `config.json` and `model.safetensors` for a Hugging Face config.
///
/// # Panics
/// When the folder cannot be written or the config lacks a number.
pub fn write_checkpoint(folder: &Path, config: &Value) {
    std::fs::create_dir_all(folder).expect("a folder");
    std::fs::write(folder.join("config.json"), config.to_string()).expect("written");
    let tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = shapes(config)
        .into_iter()
        .map(|(name, shape)| (name.clone(), (shape.clone(), bytes(&name, &shape))))
        .collect();
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name.as_str(), view.expect("shape and bytes agree"))
    });
    let file = safetensors::serialize(views, None).expect("serialised");
    std::fs::write(folder.join("model.safetensors"), file).expect("written");
}

/// A model for tests of the runtime: byte-level tokens and room for some thousand of them.
pub fn tiny_config() -> Value {
    serde_json::json!({
        "model_type": "llama", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": true,
    })
}

fn shapes(config: &Value) -> Vec<(String, Vec<usize>)> {
    let number = |key: &str| config[key].as_u64().unwrap_or_else(|| panic!("{key}")) as usize;
    let (hidden, inner, vocabulary) =
        (number("hidden_size"), number("intermediate_size"), number("vocab_size"));
    let head = number("head_dim");
    let (queries, keys) = (head * number("num_attention_heads"), head * number("num_key_value_heads"));
    let kind = config["model_type"].as_str().expect("model_type");
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocabulary, hidden]),
        ("model.norm.weight".to_owned(), vec![hidden]),
    ];
    if config["tie_word_embeddings"] == false {
        shapes.push(("lm_head.weight".to_owned(), vec![vocabulary, hidden]));
    }
    for layer in 0..number("num_hidden_layers") {
        let mut add =
            |part: &str, shape: Vec<usize>| shapes.push((format!("model.layers.{layer}.{part}"), shape));
        add("input_layernorm.weight", vec![hidden]);
        add("post_attention_layernorm.weight", vec![hidden]);
        for (part, rows) in [("q_proj", queries), ("k_proj", keys), ("v_proj", keys)] {
            add(&format!("self_attn.{part}.weight"), vec![rows, hidden]);
            if kind == "qwen2" {
                add(&format!("self_attn.{part}.bias"), vec![rows]);
            }
        }
        if kind == "qwen3" {
            add("self_attn.q_norm.weight", vec![head]);
            add("self_attn.k_norm.weight", vec![head]);
        }
        add("self_attn.o_proj.weight", vec![hidden, queries]);
        add("mlp.gate_proj.weight", vec![inner, hidden]);
        add("mlp.up_proj.weight", vec![inner, hidden]);
        add("mlp.down_proj.weight", vec![hidden, inner]);
    }
    shapes
}

fn bytes(name: &str, shape: &[usize]) -> Vec<u8> {
    let count = shape.iter().product();
    let scale = (3.0 / shape[shape.len() - 1] as f64).sqrt() as f32;
    let value = |raw: f32| match name {
        _ if name.ends_with("norm.weight") => 1.0 + 0.1 * raw,
        _ if name.ends_with(".bias") => 0.1 * raw,
        _ => raw * scale,
    };
    values(name, count).into_iter().flat_map(|raw| value(raw).to_le_bytes()).collect()
}

/// Numbers in [-1, 1) from a name: FNV-1a of the name, then xorshift64* a number.
fn values(name: &str, count: usize) -> Vec<f32> {
    let start = name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |state, byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3)
    });
    let mut state = start;
    let next = |_| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let bits = state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40;
        (bits as f64 / f64::from(1 << 23) - 1.0) as f32
    };
    (0..count).map(next).collect()
}
