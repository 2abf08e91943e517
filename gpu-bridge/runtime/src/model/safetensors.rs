//! Hugging Face checkpoints: a folder with `config.json` and one or more `*.safetensors` files.

use super::ModelError;
use super::source::{Part, TensorId, TensorSource};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};
use std::path::Path;

/// All shards of a checkpoint, in memory.
pub struct Checkpoint {
    shards: Vec<Vec<u8>>,
}

impl Checkpoint {
    /// Reads every `*.safetensors` file of a folder, in name order.
    ///
    /// # Errors
    /// When there is none, or one cannot be read.
    pub fn open(folder: &Path) -> Result<Self, ModelError> {
        let failed = |error| ModelError::Read(folder.display().to_string(), error);
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                paths.push(path);
            }
        }
        paths.sort();
        if paths.is_empty() {
            return Err(ModelError::Invalid(format!("{} has no *.safetensors file", folder.display())));
        }
        let read = |path: &std::path::PathBuf| {
            std::fs::read(path).map_err(|error| ModelError::Read(path.display().to_string(), error))
        };
        let shards = paths.iter().map(read).collect::<Result<Vec<_>, _>>()?;
        for (shard, path) in shards.iter().zip(&paths) {
            SafeTensors::deserialize(shard)
                .map_err(|error| ModelError::Invalid(format!("{}: {error}", path.display())))?;
        }
        Ok(Self { shards })
    }

    /// The files' bytes, for the model's fingerprint.
    pub fn shards(&self) -> impl Iterator<Item = &[u8]> {
        self.shards.iter().map(Vec::as_slice)
    }
}

impl TensorSource for Checkpoint {
    fn tensor(&self, id: TensorId) -> Result<Option<Vec<f32>>, ModelError> {
        let name = tensor_name(id);
        for shard in &self.shards {
            let Ok(tensors) = SafeTensors::deserialize(shard) else {
                continue;
            };
            let Ok(view) = tensors.tensor(&name) else { continue };
            let data = view.data();
            return match view.dtype() {
                Dtype::F32 => Ok(data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()),
                Dtype::F16 => {
                    Ok(data.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect())
                }
                Dtype::BF16 => {
                    Ok(data.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect())
                }
                other => Err(ModelError::Unsupported(format!("dtype {other:?} of tensor {name}"))),
            }
            .map(Some);
        }
        Ok(None)
    }
}

fn tensor_name(id: TensorId) -> String {
    let (layer, part) = match id {
        TensorId::Embedding => return "model.embed_tokens.weight".into(),
        TensorId::FinalNorm => return "model.norm.weight".into(),
        TensorId::Output => return "lm_head.weight".into(),
        TensorId::Layer(layer, part) => (layer, part),
    };
    let part = match part {
        Part::InputNorm => "input_layernorm.weight",
        Part::Query => "self_attn.q_proj.weight",
        Part::Key => "self_attn.k_proj.weight",
        Part::Value => "self_attn.v_proj.weight",
        Part::QueryBias => "self_attn.q_proj.bias",
        Part::KeyBias => "self_attn.k_proj.bias",
        Part::ValueBias => "self_attn.v_proj.bias",
        Part::QueryNorm => "self_attn.q_norm.weight",
        Part::KeyNorm => "self_attn.k_norm.weight",
        Part::AttentionOutput => "self_attn.o_proj.weight",
        Part::PostNorm => "post_attention_layernorm.weight",
        Part::Gate => "mlp.gate_proj.weight",
        Part::Up => "mlp.up_proj.weight",
        Part::Down => "mlp.down_proj.weight",
    };
    format!("model.layers.{layer}.{part}")
}
