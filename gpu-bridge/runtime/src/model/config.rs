//! The shape of a Llama-family decoder, from a Hugging Face `config.json` or GGUF metadata.

use super::ModelError;
use serde::Deserialize;

/// Everything about a model but its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// For people.
    pub name: String,
    /// Transformer layers.
    pub layers: usize,
    /// Elements of a hidden state.
    pub hidden: usize,
    /// Elements between the two products of a feed-forward block.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Of the norms.
    pub rms_epsilon: f32,
    /// Longest sequence.
    pub max_positions: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How they are stretched.
    pub rope_scaling: RopeScaling,
    /// The output matrix is the embedding.
    pub tied_embeddings: bool,
}

/// Stretching of rotary frequencies for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// All frequencies divided by a factor.
    Linear(f64),
    /// Llama 3.1: low frequencies divided, high ones kept, those between blended.
    Llama3 {
        /// Divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_positions / low_frequency_factor` are low.
        low_frequency_factor: f64,
        /// Wavelengths below `original_positions / high_frequency_factor` are high.
        high_frequency_factor: f64,
        /// Context of the original training.
        original_positions: f64,
    },
    /// A divisor for each frequency, as GGUF files carry them.
    PerFrequency(Vec<f64>),
}

impl ModelConfig {
    /// The rotary frequencies of half a head, in radians a position.
    pub fn inverse_frequencies(&self) -> Vec<f64> {
        let half = self.head_dim / 2;
        let base = |i: usize| self.rope_theta.powf(-(2.0 * i as f64) / self.head_dim as f64);
        let scaled = |i: usize| match &self.rope_scaling {
            RopeScaling::None => base(i),
            RopeScaling::Linear(factor) => base(i) / factor,
            RopeScaling::PerFrequency(divisors) => base(i) / divisors[i],
            RopeScaling::Llama3 {
                factor,
                low_frequency_factor,
                high_frequency_factor,
                original_positions,
            } => {
                let wavelength = 2.0 * std::f64::consts::PI / base(i);
                let turns = original_positions / wavelength;
                let blend = (turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor);
                let blend = blend.clamp(0.0, 1.0);
                (1.0 - blend) * base(i) / factor + blend * base(i)
            }
        };
        (0..half).map(scaled).collect()
    }

    /// # Errors
    /// When the numbers contradict each other, or need what this runtime lacks.
    pub(crate) fn check(mut self) -> Result<Self, ModelError> {
        let positive = [
            ("layers", self.layers),
            ("hidden size", self.hidden),
            ("intermediate size", self.intermediate),
            ("heads", self.heads),
            ("KV heads", self.kv_heads),
            ("head size", self.head_dim),
            ("vocabulary size", self.vocabulary),
            ("context length", self.max_positions),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(ModelError::Invalid(format!("the model's {name} is 0 or missing")));
        }
        self.max_positions = self.max_positions.min(MAX_POSITIONS);
        if !self.heads.is_multiple_of(self.kv_heads) {
            let text = format!("{} query heads are not a multiple of {} KV heads", self.heads, self.kv_heads);
            return Err(ModelError::Invalid(text));
        }
        if !self.head_dim.is_multiple_of(16) {
            return Err(ModelError::Unsupported(format!(
                "head size {}: only multiples of 16",
                self.head_dim
            )));
        }
        if let RopeScaling::PerFrequency(divisors) = &self.rope_scaling
            && divisors.len() != self.head_dim / 2
        {
            return Err(ModelError::Invalid("rope_freqs does not have half a head's elements".into()));
        }
        Ok(self)
    }
}

/// Longest context that is served, whatever a model claims: its rotary table takes half a kilobyte a position.
const MAX_POSITIONS: usize = 1 << 18;

#[derive(Deserialize)]
struct HfConfig {
    model_type: String,
    num_hidden_layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    rms_norm_eps: f64,
    max_position_embeddings: usize,
    rope_theta: Option<f64>,
    rope_scaling: Option<HfRope>,
    rope_parameters: Option<HfRope>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    use_sliding_window: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    hidden_act: Option<String>,
    partial_rotary_factor: Option<f64>,
}

#[derive(Clone, Deserialize)]
struct HfRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

/// Architectures of Hugging Face that this runtime computes.
const HF_TYPES: [&str; 3] = ["llama", "qwen2", "qwen3"];

/// Default of Hugging Face when a config names no base.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;

/// Reads a `config.json`.
///
/// # Errors
/// When it is no valid JSON, or a model that this runtime does not compute.
pub fn from_hf(name: &str, json: &[u8]) -> Result<ModelConfig, ModelError> {
    let hf: HfConfig =
        serde_json::from_slice(json).map_err(|error| ModelError::Invalid(format!("config.json: {error}")))?;
    if !HF_TYPES.contains(&hf.model_type.as_str()) {
        let text = format!("model_type {:?}: known are {}", hf.model_type, HF_TYPES.join(", "));
        return Err(ModelError::Unsupported(text));
    }
    // What would load and then compute something else.
    let unsupported = [
        ("use_sliding_window", hf.use_sliding_window),
        ("attention_bias", hf.attention_bias && hf.model_type != "qwen2"),
        ("mlp_bias", hf.mlp_bias),
        ("hidden_act other than silu", hf.hidden_act.as_ref().is_some_and(|act| act != "silu")),
        ("partial_rotary_factor", hf.partial_rotary_factor.is_some_and(|factor| factor != 1.0)),
    ];
    if let Some((name, _)) = unsupported.iter().find(|(_, found)| *found) {
        return Err(ModelError::Unsupported((*name).into()));
    }
    let rope = hf.rope_parameters.or(hf.rope_scaling);
    let theta = hf.rope_theta.or(rope.as_ref().and_then(|rope| rope.rope_theta));
    ModelConfig {
        name: name.to_owned(),
        layers: hf.num_hidden_layers,
        hidden: hf.hidden_size,
        intermediate: hf.intermediate_size,
        heads: hf.num_attention_heads,
        kv_heads: hf.num_key_value_heads.unwrap_or(hf.num_attention_heads),
        head_dim: hf.head_dim.unwrap_or(hf.hidden_size / hf.num_attention_heads.max(1)),
        vocabulary: hf.vocab_size,
        rms_epsilon: hf.rms_norm_eps as f32,
        max_positions: hf.max_position_embeddings,
        rope_theta: theta.unwrap_or(DEFAULT_ROPE_THETA),
        rope_scaling: rope.map_or(Ok(RopeScaling::None), |rope| hf_scaling(&rope))?,
        tied_embeddings: hf.tie_word_embeddings,
    }
    .check()
}

fn hf_scaling(rope: &HfRope) -> Result<RopeScaling, ModelError> {
    let need = |value: Option<f64>, name: &str| {
        value.ok_or_else(|| ModelError::Invalid(format!("rope scaling lacks {name}")))
    };
    match rope.rope_type.as_deref() {
        None | Some("default") => Ok(RopeScaling::None),
        Some("linear") => Ok(RopeScaling::Linear(need(rope.factor, "factor")?)),
        Some("llama3") => Ok(RopeScaling::Llama3 {
            factor: need(rope.factor, "factor")?,
            low_frequency_factor: need(rope.low_freq_factor, "low_freq_factor")?,
            high_frequency_factor: need(rope.high_freq_factor, "high_freq_factor")?,
            original_positions: need(
                rope.original_max_position_embeddings,
                "original_max_position_embeddings",
            )?,
        }),
        Some(other) => Err(ModelError::Unsupported(format!("rope scaling {other:?}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QWEN3: &str = r#"{"model_type":"qwen3","num_hidden_layers":2,"hidden_size":64,"intermediate_size":96,
        "num_attention_heads":4,"num_key_value_heads":2,"head_dim":32,"vocab_size":100,"rms_norm_eps":1e-6,
        "max_position_embeddings":512,"rope_theta":1000000.0,"tie_word_embeddings":true}"#;

    #[test]
    fn variants_are_read_and_what_is_not_supported_is_named() {
        let qwen3 = from_hf("q", QWEN3.as_bytes()).unwrap();
        assert_eq!((qwen3.head_dim, qwen3.kv_heads, qwen3.tied_embeddings), (32, 2, true));
        let mamba = QWEN3.replace("qwen3", "mamba");
        assert!(from_hf("m", mamba.as_bytes()).unwrap_err().to_string().contains("mamba"));
        let yarn = QWEN3.replace("\"head_dim\"", "\"rope_scaling\":{\"rope_type\":\"yarn\"},\"head_dim\"");
        assert!(from_hf("y", yarn.as_bytes()).unwrap_err().to_string().contains("yarn"));
        let uneven = QWEN3.replace("\"num_key_value_heads\":2", "\"num_key_value_heads\":3");
        assert!(from_hf("u", uneven.as_bytes()).unwrap_err().to_string().contains("multiple"));
    }

    #[test]
    fn llama3_scaling_keeps_high_and_divides_low_frequencies() {
        let scaling = r#""rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,
            "high_freq_factor":4.0,"original_max_position_embeddings":8192},"head_dim""#;
        let scaled = from_hf("l", QWEN3.replace("\"head_dim\"", scaling).as_bytes()).unwrap();
        let plain = from_hf("q", QWEN3.as_bytes()).unwrap();
        let (scaled, plain) = (scaled.inverse_frequencies(), plain.inverse_frequencies());
        assert_eq!(scaled[0], plain[0]);
        assert!((scaled[15] - plain[15] / 8.0).abs() < 1e-15);
        assert!(scaled.iter().zip(&plain).all(|(s, p)| s <= p && *s >= p / 8.0));
    }
}
