//! Request bodies. Fields of OpenAI's API that this worker does not honour are refused, not ignored, where ignoring them
//! would change what the caller gets.

use crate::model::ChatMessage;
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
pub(super) struct CompletionRequest {
    pub(super) prompt: Prompt,
    #[serde(flatten)]
    pub(super) common: CommonFields,
}

#[derive(Deserialize)]
#[serde(untagged)]
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
}

#[derive(Deserialize)]
pub(super) struct ChatRequest {
    pub(super) messages: Vec<ChatMessage>,
    pub(super) max_completion_tokens: Option<usize>,
    #[serde(flatten)]
    pub(super) common: CommonFields,
}

#[derive(Deserialize)]
pub(super) struct CommonFields {
    pub(super) max_tokens: Option<usize>,
    pub(super) temperature: Option<f32>,
    pub(super) top_p: Option<f32>,
    pub(super) seed: Option<u64>,
    #[serde(default, deserialize_with = "nullable")]
    pub(super) stream: bool,
    stream_options: Option<StreamOptions>,
    #[serde(default)]
    stop: Stop,
    n: Option<u32>,
    best_of: Option<Value>,
    echo: Option<Value>,
    frequency_penalty: Option<Value>,
    functions: Option<Value>,
    logit_bias: Option<Value>,
    logprobs: Option<Value>,
    min_p: Option<Value>,
    presence_penalty: Option<Value>,
    response_format: Option<Value>,
    suffix: Option<Value>,
    tools: Option<Value>,
    top_k: Option<Value>,
    top_logprobs: Option<Value>,
    /// Go on past end tokens (as in vLLM): for measurements.
    #[serde(default)]
    pub(super) ignore_eos: bool,
    /// Give token ids too (as in vLLM).
    #[serde(default)]
    pub(super) return_token_ids: bool,
    /// Cairn's own: `false` keeps this request away from every cache.
    #[serde(default = "yes")]
    pub(super) cairn_cache: bool,
}

fn yes() -> bool {
    true
}

/// `null` is absent.
fn nullable<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<bool, D::Error> {
    Option::<bool>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// Whether a value asks for nothing: absent, null, false, zero, empty, or the plain text format.
fn neutral(value: &Option<Value>) -> bool {
    match value {
        None | Some(Value::Null | Value::Bool(false)) => true,
        Some(Value::Number(number)) => number.as_f64() == Some(0.0),
        Some(Value::String(text)) => text.is_empty(),
        Some(Value::Array(values)) => values.is_empty(),
        Some(Value::Object(fields)) => fields.is_empty() || fields.get("type").is_some_and(|t| t == "text"),
        Some(Value::Bool(true)) => false,
    }
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Default, Deserialize)]
#[serde(untagged)]
enum Stop {
    #[default]
    None,
    One(String),
    Many(Vec<String>),
}

impl CommonFields {
    /// # Errors
    /// Says which value is out of range.
    pub(super) fn check(&self) -> Result<(), String> {
        let unserved = [
            ("echo", &self.echo),
            ("frequency_penalty", &self.frequency_penalty),
            ("functions", &self.functions),
            ("logit_bias", &self.logit_bias),
            ("logprobs", &self.logprobs),
            ("min_p", &self.min_p),
            ("presence_penalty", &self.presence_penalty),
            ("response_format", &self.response_format),
            ("suffix", &self.suffix),
            ("tools", &self.tools),
            ("top_k", &self.top_k),
            ("top_logprobs", &self.top_logprobs),
        ];
        if let Some((name, _)) = unserved.iter().find(|(_, value)| !neutral(value)) {
            return Err(format!("{name} is not served by this worker"));
        }
        if self.best_of.as_ref().is_some_and(|best_of| !best_of.is_null() && *best_of != 1) {
            return Err("best_of: only 1 is served".into());
        }
        if self.n.is_some_and(|n| n != 1) {
            return Err("n: only 1 is served".into());
        }
        if self.temperature.is_some_and(|t| !(0.0..=2.0).contains(&t)) {
            return Err("temperature must be from 0 to 2".into());
        }
        if self.top_p.is_some_and(|p| !(p > 0.0 && p <= 1.0)) {
            return Err("top_p must be above 0 and at most 1".into());
        }
        if self.stops().iter().any(String::is_empty) {
            return Err("stop must not be an empty text".into());
        }
        Ok(())
    }

    pub(super) fn include_usage(&self) -> bool {
        self.stream_options.as_ref().is_some_and(|options| options.include_usage)
    }

    pub(super) fn stops(&self) -> Vec<String> {
        match &self.stop {
            Stop::None => Vec::new(),
            Stop::One(text) => vec![text.clone()],
            Stop::Many(texts) => texts.clone(),
        }
    }
}
