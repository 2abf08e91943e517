//! Seeded random weights: a model of any shape without any file. Its tokens mean nothing, but they are reproducible, and
//! its attention state behaves like that of a real model of the shape.

use super::ModelError;
use super::config::ModelConfig;
use super::source::{Part, TensorId, TensorSource};
use rand::{Rng, SeedableRng, rngs::StdRng};

/// See the module.
pub struct Synthetic {
    config: ModelConfig,
    seed: u64,
}

impl Synthetic {
    /// Weights for `config` from `seed`.
    pub fn new(config: ModelConfig, seed: u64) -> Self {
        Self { config, seed }
    }

    /// What determines the weights, for the model's fingerprint.
    pub fn description(&self) -> String {
        format!("{:?} seed {}", self.config, self.seed)
    }
}

impl TensorSource for Synthetic {
    fn tensor(&self, id: TensorId) -> Result<Option<Vec<f32>>, ModelError> {
        let c = &self.config;
        let (queries, keys) = (c.heads * c.head_dim, c.kv_heads * c.head_dim);
        let (rows, columns) = match id {
            TensorId::Embedding => (c.vocabulary, c.hidden),
            TensorId::Output if c.tied_embeddings => return Ok(None),
            TensorId::Output => (c.vocabulary, c.hidden),
            TensorId::FinalNorm | TensorId::Layer(_, Part::InputNorm | Part::PostNorm) => {
                return Ok(Some(vec![1.0; c.hidden]));
            }
            TensorId::Layer(_, Part::Query) => (queries, c.hidden),
            TensorId::Layer(_, Part::Key | Part::Value) => (keys, c.hidden),
            TensorId::Layer(_, Part::AttentionOutput) => (c.hidden, queries),
            TensorId::Layer(_, Part::Gate | Part::Up) => (c.intermediate, c.hidden),
            TensorId::Layer(_, Part::Down) => (c.hidden, c.intermediate),
            TensorId::Layer(..) => return Ok(None),
        };
        let salt = match id {
            TensorId::Embedding => 0,
            TensorId::Output => 1,
            TensorId::FinalNorm => 2,
            TensorId::Layer(layer, part) => 1000 + 100 * layer as u64 + part as u64,
        };
        let mut rng = StdRng::seed_from_u64(self.seed ^ (salt << 20));
        let bound = (3.0 / columns as f32).sqrt();
        Ok(Some((0..rows * columns).map(|_| rng.random_range(-bound..bound)).collect()))
    }
}
