//! One streamed chat completion at an OpenAI-compatible endpoint, timed from the outside.

use crate::{BenchError, OrFail};
use futures::StreamExt;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Longest silence of an endpoint.
const SILENCE: Duration = Duration::from_secs(300);

/// Where requests go.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// As `http://host:port`, without `/v1`.
    pub url: String,
    /// The model to ask for; its first one if absent.
    pub model: Option<String>,
    /// A key for its bearer authentication.
    pub key: Option<String>,
    /// It is a worker of ours, which knows more fields.
    pub ours: bool,
}

/// A message of a conversation: role and content.
pub(super) type Message = (&'static str, String);

/// What came back, and when.
#[derive(Clone, Debug, Default)]
pub struct Answer {
    /// All of it.
    pub text: String,
    /// From sending the request to the first token.
    pub ttft_ms: f64,
    /// Between one token and the next.
    pub gaps_ms: Vec<f64>,
    /// Of the prompt.
    pub prompt_tokens: u64,
    /// Of the answer.
    pub answer_tokens: u64,
    /// Of the prompt, not computed.
    pub cached_tokens: u64,
    /// Of them, still in the worker's own pool. Only known of ours.
    pub local_tokens: u64,
    /// How the others came.
    pub wire: String,
    /// The worker computed rather than load.
    pub recomputed: bool,
    /// What it expected of loading and of computing, ms.
    pub forecast_ms: Option<[f64; 2]>,
}

impl Endpoint {
    /// One answer of at most so many tokens.
    ///
    /// # Errors
    /// When the endpoint cannot be reached, refuses, or ends before the first token.
    pub(super) async fn ask(
        &self,
        messages: &[Message],
        max_tokens: u32,
        use_cache: bool,
    ) -> Result<Answer, BenchError> {
        let messages: Vec<Value> =
            messages.iter().map(|(role, content)| json!({"role": role, "content": content})).collect();
        let mut body = json!({"messages": messages, "max_tokens": max_tokens, "temperature": 0, "stream": true,
            "stream_options": {"include_usage": true}});
        if let Some(model) = &self.model {
            body["model"] = json!(model);
        }
        if self.ours {
            body["ignore_eos"] = json!(true);
            body["cairn_cache"] = json!(use_cache);
        }
        let mut request =
            reqwest::Client::new().post(format!("{}/v1/chat/completions", self.url)).json(&body);
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let started = Instant::now();
        let response = tokio::time::timeout(SILENCE, request.send()).await.or_fail(&self.url)?;
        let response = response.or_fail(&self.url)?;
        if !response.status().is_success() {
            let status = response.status();
            let text = response.text().await.unwrap_or_default();
            return Err(BenchError(format!("{} answered {status}: {text}", self.url)));
        }
        let mut reading = Reading { answer: Answer::default(), started, last: None, ours: self.ours };
        let mut received = Vec::new();
        let mut stream = response.bytes_stream();
        while let Some(bytes) = tokio::time::timeout(SILENCE, stream.next()).await.or_fail(&self.url)? {
            // Lines may end in two characters.
            received.extend(bytes.or_fail(&self.url)?.iter().copied().filter(|byte| *byte != b'\r'));
            while let Some(end) = received.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = received.drain(..end + 2).collect();
                let text = String::from_utf8_lossy(&event);
                let Some(data) = text.trim().strip_prefix("data:").map(str::trim) else { continue };
                if data != "[DONE]" {
                    reading.event(&serde_json::from_str(data).or_fail(&self.url)?);
                }
            }
        }
        if reading.last.is_none() {
            return Err(BenchError(format!("{} ended its answer before the first token", self.url)));
        }
        Ok(reading.answer)
    }

    /// The name of the first model that it serves.
    ///
    /// # Errors
    /// When the endpoint cannot be reached or serves none.
    pub async fn first_model(&self) -> Result<String, BenchError> {
        let mut request = reqwest::Client::new().get(format!("{}/v1/models", self.url));
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let models: Value = request.send().await.or_fail(&self.url)?.json().await.or_fail(&self.url)?;
        let first = models["data"][0]["id"].as_str().map(str::to_owned);
        first.or_fail(&format!("{} serves no model", self.url))
    }
}

struct Reading {
    answer: Answer,
    started: Instant,
    last: Option<Instant>,
    ours: bool,
}

impl Reading {
    fn event(&mut self, event: &Value) {
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        let choice = &event["choices"][0];
        let text = choice["delta"]["content"].as_str().unwrap_or_default();
        // Of ours each event but the last is a token, even where it is not yet a whole character. Others begin with an event for the role.
        let empty_token =
            self.ours && choice["finish_reason"].is_null() && choice["delta"]["content"].is_string();
        if !text.is_empty() || empty_token {
            let now = Instant::now();
            match self.last.replace(now) {
                None => self.answer.ttft_ms = (now - self.started).as_secs_f64() * 1e3,
                Some(last) => self.answer.gaps_ms.push((now - last).as_secs_f64() * 1e3),
            }
            self.answer.text.push_str(text);
        }
        if let Some(usage) = event.get("usage").filter(|usage| usage.is_object()) {
            self.answer.prompt_tokens = number(&usage["prompt_tokens"]);
            self.answer.answer_tokens = number(&usage["completion_tokens"]);
            self.answer.cached_tokens = number(&usage["prompt_tokens_details"]["cached_tokens"]);
        }
        if let Some(own) = event.get("cairn") {
            self.answer.local_tokens = number(&own["local_tokens"]);
            self.answer.wire = own["wire"].as_str().unwrap_or_default().to_owned();
            let forecast = |name: &str| own[name].as_f64();
            self.answer.forecast_ms =
                forecast("forecast_load_ms").zip(forecast("forecast_compute_ms")).map(Into::into);
            self.answer.recomputed = own["recomputed"].as_bool().unwrap_or_default();
        }
    }
}
