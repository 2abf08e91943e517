//! Models: their shape, their weights, their tokenizer. Loading ends in a [`Model`] whose weights are packed for the
//! kernels.

mod config;
mod gguf;
mod safetensors;
mod source;
mod synthetic;
mod tokenizer;
mod weights;

pub use config::{ModelConfig, RopeScaling};
pub(crate) use source::TensorSource;
pub use synthetic::Synthetic;
pub use tokenizer::{ChatMessage, TextTokenizer, TokenizerError};
pub use weights::{LayerWeights, Weights};

use cairn_kernels::{RopeTable, WeightType};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// A model that cannot be used.
#[derive(Debug, Error)]
pub enum ModelError {
    /// A file cannot be read.
    #[error("cannot read the model file {0}: {1}")]
    Read(String, std::io::Error),
    /// A file is broken or contradicts itself.
    #[error("the model is not valid: {0}")]
    Invalid(String),
    /// The model needs what this runtime lacks.
    #[error("the model is not supported: {0}")]
    Unsupported(String),
    /// The tokenizer is missing or broken.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// Where a model is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelPath {
    /// A GGUF file, or a folder with `config.json`, `*.safetensors` and `tokenizer.json`.
    Files(PathBuf),
    /// Random weights in the shape of SmolLM2-135M, from this seed.
    Synthetic(u64),
}

impl std::str::FromStr for ModelPath {
    type Err = String;

    /// `synthetic:SEED`, or a path.
    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("synthetic:") {
            None => Ok(Self::Files(text.into())),
            Some(seed) => seed.parse().map(Self::Synthetic).map_err(|_| "write synthetic:SEED".into()),
        }
    }
}

impl std::fmt::Display for ModelPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Files(path) => path.display().fmt(f),
            Self::Synthetic(seed) => write!(f, "synthetic:{seed}"),
        }
    }
}

/// A model, ready to compute with.
pub struct Model {
    /// Its shape.
    pub config: ModelConfig,
    /// Its numbers.
    pub weights: Weights,
    /// Rotary positions.
    pub rope: RopeTable,
    /// Its text side.
    pub tokenizer: TextTokenizer,
    /// BLAKE3 of everything that determines its numbers.
    pub fingerprint: [u8; 32],
}

/// Domain of model fingerprints. Changes when kernels change in a way that changes bits.
const FINGERPRINT_CONTEXT: &str = "cairn 2026-11 model fingerprint v1";

impl Model {
    /// Reads a model and packs its weights.
    ///
    /// # Errors
    /// When a file is missing, broken or not supported.
    pub fn load(path: &ModelPath, weight_type: WeightType) -> Result<Self, ModelError> {
        match path {
            ModelPath::Synthetic(seed) => {
                Self::synthetic(Synthetic::new(smollm2_shape(), *seed), smollm2_shape(), weight_type)
            }
            ModelPath::Files(path) if path.is_dir() => Self::load_folder(path, weight_type),
            ModelPath::Files(path) => Self::load_gguf(path, weight_type),
        }
    }

    /// A model with random weights and one token for each byte.
    ///
    /// # Errors
    /// When the shape is not supported.
    pub fn synthetic(
        source: Synthetic,
        config: ModelConfig,
        weight_type: WeightType,
    ) -> Result<Self, ModelError> {
        let description = source.description();
        let fingerprint = fingerprint(std::iter::once(description.as_bytes()), weight_type);
        Self::build(config.check()?, &source, TextTokenizer::bytes()?, fingerprint, weight_type)
    }

    fn load_gguf(path: &Path, weight_type: WeightType) -> Result<Self, ModelError> {
        let file = gguf::Gguf::open(path)?;
        let tokenizer = tokenizer::from_gguf(&file)?;
        let fingerprint = fingerprint(std::iter::once(file.bytes()), weight_type);
        Self::build(file.config()?, &file, tokenizer, fingerprint, weight_type)
    }

    fn load_folder(folder: &Path, weight_type: WeightType) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let json =
            std::fs::read(&path).map_err(|error| ModelError::Read(path.display().to_string(), error))?;
        let name = folder.file_name().map_or("model".into(), |name| name.to_string_lossy());
        let config = config::from_hf(&name, &json)?;
        let checkpoint = safetensors::Checkpoint::open(folder)?;
        let tokenizer = tokenizer::from_folder(folder)?;
        let fingerprint =
            fingerprint(std::iter::once(json.as_slice()).chain(checkpoint.shards()), weight_type);
        Self::build(config, &checkpoint, tokenizer, fingerprint, weight_type)
    }

    fn build(
        config: ModelConfig,
        source: &dyn TensorSource,
        tokenizer: TextTokenizer,
        fingerprint: [u8; 32],
        weight_type: WeightType,
    ) -> Result<Self, ModelError> {
        let weights = Weights::load(&config, source, weight_type)?;
        let rope = RopeTable::new(&config.inverse_frequencies(), config.max_positions);
        Ok(Self { config, weights, rope, tokenizer, fingerprint })
    }
}

fn fingerprint<'a>(parts: impl Iterator<Item = &'a [u8]>, weight_type: WeightType) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(FINGERPRINT_CONTEXT);
    hasher.update(&[match weight_type {
        WeightType::F32 => 1,
        WeightType::Bf16 => 2,
    }]);
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    *hasher.finalize().as_bytes()
}

/// The shape of SmolLM2-135M.
pub fn smollm2_shape() -> ModelConfig {
    ModelConfig {
        name: "synthetic-135m".into(),
        layers: 30,
        hidden: 576,
        intermediate: 1536,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocabulary: 49_152,
        rms_epsilon: 1e-5,
        max_positions: 8192,
        rope_theta: 100_000.0,
        rope_scaling: RopeScaling::None,
        tied_embeddings: true,
    }
}
