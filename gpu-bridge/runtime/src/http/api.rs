//! Request bodies. Fields of OpenAI's API that this worker does not honour are refused, not ignored, where ignoring them
//! would change what the caller gets.

use crate::model::ChatMessage;
use serde::Deserialize;

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
    #[serde(default)]
    pub(super) stream: bool,
    stream_options: Option<StreamOptions>,
    #[serde(default)]
    stop: Stop,
    n: Option<u32>,
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
