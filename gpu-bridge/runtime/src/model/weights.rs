//! Weights packed for the kernels: queries, keys and values in one matrix, gates and ups in one.

use super::ModelError;
use super::config::ModelConfig;
use super::source::{Part, TensorId, TensorSource};
use cairn_kernels::{PackedMatrix, WeightType};

/// One layer.
pub struct LayerWeights {
    /// Before attention.
    pub input_norm: Vec<f32>,
    /// Rows of queries, then keys, then values.
    pub qkv: PackedMatrix,
    /// Added to their result (Qwen2).
    pub qkv_bias: Option<Vec<f32>>,
    /// Norms of each query and key head (Qwen3).
    pub qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    /// From heads to the hidden state.
    pub attention_output: PackedMatrix,
    /// Before the feed-forward block.
    pub post_norm: Vec<f32>,
    /// Rows of gates, then ups.
    pub gate_up: PackedMatrix,
    /// Back to the hidden state.
    pub down: PackedMatrix,
}

/// A whole model.
pub struct Weights {
    /// A row for each token.
    pub embedding: PackedMatrix,
    /// In order.
    pub layers: Vec<LayerWeights>,
    /// Before the output.
    pub final_norm: Vec<f32>,
    /// `None` when the embedding serves.
    pub output: Option<PackedMatrix>,
}

impl Weights {
    /// Reads and packs every tensor.
    ///
    /// # Errors
    /// When one is missing or has another size than the config says.
    pub fn load(
        config: &ModelConfig,
        source: &dyn TensorSource,
        format: WeightType,
    ) -> Result<Self, ModelError> {
        let loader = Loader { config, source, format };
        let hidden = config.hidden;
        let layers = (0..config.layers).map(|layer| loader.layer(layer)).collect::<Result<_, _>>()?;
        let output = match config.tied_embeddings {
            true => None,
            false => Some(loader.matrix(&[(TensorId::Output, config.vocabulary)], hidden)?),
        };
        Ok(Self {
            embedding: loader.matrix(&[(TensorId::Embedding, config.vocabulary)], hidden)?,
            layers,
            final_norm: loader.vector(TensorId::FinalNorm, hidden)?,
            output,
        })
    }

    /// The matrix from hidden state to logits.
    pub fn output(&self) -> &PackedMatrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// Bytes of all packed matrices.
    pub fn bytes(&self) -> usize {
        let of_layer = |layer: &LayerWeights| {
            layer.qkv.bytes() + layer.attention_output.bytes() + layer.gate_up.bytes() + layer.down.bytes()
        };
        let layers: usize = self.layers.iter().map(of_layer).sum();
        layers + self.embedding.bytes() + self.output.as_ref().map_or(0, PackedMatrix::bytes)
    }
}

struct Loader<'a> {
    config: &'a ModelConfig,
    source: &'a dyn TensorSource,
    format: WeightType,
}

impl Loader<'_> {
    fn layer(&self, layer: usize) -> Result<LayerWeights, ModelError> {
        let c = self.config;
        let (queries, keys) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let id = |part| TensorId::Layer(layer, part);
        let qkv = [(id(Part::Query), queries), (id(Part::Key), keys), (id(Part::Value), keys)];
        let biases = [(id(Part::QueryBias), queries), (id(Part::KeyBias), keys), (id(Part::ValueBias), keys)];
        Ok(LayerWeights {
            input_norm: self.vector(id(Part::InputNorm), c.hidden)?,
            qkv: self.matrix(&qkv, c.hidden)?,
            qkv_bias: self.optional(&biases)?,
            qk_norm: match self.optional(&[(id(Part::QueryNorm), c.head_dim)])? {
                None => None,
                Some(queries) => Some((queries, self.vector(id(Part::KeyNorm), c.head_dim)?)),
            },
            attention_output: self.matrix(&[(id(Part::AttentionOutput), c.hidden)], queries)?,
            post_norm: self.vector(id(Part::PostNorm), c.hidden)?,
            gate_up: self
                .matrix(&[(id(Part::Gate), c.intermediate), (id(Part::Up), c.intermediate)], c.hidden)?,
            down: self.matrix(&[(id(Part::Down), c.hidden)], c.intermediate)?,
        })
    }

    /// The given tensors, rows on rows, packed.
    fn matrix(&self, parts: &[(TensorId, usize)], inputs: usize) -> Result<PackedMatrix, ModelError> {
        let mut rows = Vec::new();
        for (id, outputs) in parts {
            rows.extend(self.vector(*id, outputs * inputs)?);
        }
        Ok(PackedMatrix::pack(&rows, inputs, self.format))
    }

    fn vector(&self, id: TensorId, elements: usize) -> Result<Vec<f32>, ModelError> {
        let tensor = self.source.tensor(id)?;
        let tensor = tensor.ok_or_else(|| ModelError::Invalid(format!("the model has no tensor {id:?}")))?;
        sized(id, tensor, elements)
    }

    /// The given vectors one after the other, if the first exists.
    fn optional(&self, parts: &[(TensorId, usize)]) -> Result<Option<Vec<f32>>, ModelError> {
        if self.source.tensor(parts[0].0)?.is_none() {
            return Ok(None);
        }
        let mut all = Vec::new();
        for (id, elements) in parts {
            all.extend(self.vector(*id, *elements)?);
        }
        Ok(Some(all))
    }
}

fn sized(id: TensorId, tensor: Vec<f32>, elements: usize) -> Result<Vec<f32>, ModelError> {
    if tensor.len() == elements {
        return Ok(tensor);
    }
    let text = format!("tensor {id:?} has {} elements where the config says {elements}", tensor.len());
    Err(ModelError::Invalid(text))
}
