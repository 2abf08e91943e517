//! One streamed completion, timed from the outside.

use crate::CliError;
use futures::StreamExt;
use serde_json::{Value, json};
use std::time::Instant;

/// What came back.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) token_ids: Vec<u64>,
    /// From sending the request to the first token.
    pub(super) first_token_ms: f64,
    pub(super) prompt_tokens: u64,
    pub(super) cached_tokens: u64,
    pub(super) loaded_bytes: u64,
    /// How they came.
    pub(super) wire: String,
}

pub(super) async fn ask(
    url: String,
    prompt: String,
    max_tokens: u32,
    use_cache: bool,
) -> Result<Answer, CliError> {
    let body = json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": true,
        "stream_options": {"include_usage": true}, "return_token_ids": true, "ignore_eos": true,
        "cairn_cache": use_cache});
    let started = Instant::now();
    let response = reqwest::Client::new().post(format!("{url}/v1/completions")).json(&body).send().await;
    let response = response.map_err(CliError::failed)?;
    if !response.status().is_success() {
        let text = response.text().await.unwrap_or_default();
        return Err(CliError::Failed(format!("the decode worker refused the request: {text}")));
    }
    let mut answer = Answer {
        text: String::new(),
        token_ids: Vec::new(),
        first_token_ms: 0.0,
        prompt_tokens: 0,
        cached_tokens: 0,
        loaded_bytes: 0,
        wire: String::new(),
    };
    let mut received = Vec::new();
    let mut stream = response.bytes_stream();
    while let Some(bytes) = stream.next().await {
        received.extend(bytes.map_err(CliError::failed)?);
        while let Some(end) = received.windows(2).position(|two| two == b"\n\n") {
            let event: Vec<u8> = received.drain(..end + 2).collect();
            let text = String::from_utf8_lossy(&event);
            let Some(data) = text.trim().strip_prefix("data: ").filter(|data| *data != "[DONE]") else {
                continue;
            };
            let value: Value = serde_json::from_str(data).map_err(CliError::failed)?;
            add(&mut answer, &value, started);
        }
    }
    if answer.token_ids.is_empty() {
        return Err(CliError::Failed("the decode worker ended the answer before its first token".into()));
    }
    Ok(answer)
}

fn add(answer: &mut Answer, value: &Value, started: Instant) {
    let choice = &value["choices"][0];
    if let Some(ids) = choice["token_ids"].as_array().filter(|ids| !ids.is_empty()) {
        if answer.token_ids.is_empty() {
            answer.first_token_ms = started.elapsed().as_secs_f64() * 1e3;
        }
        answer.token_ids.extend(ids.iter().filter_map(Value::as_u64));
    }
    answer.text.push_str(choice["text"].as_str().unwrap_or_default());
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    if let Some(usage) = value.get("usage") {
        answer.prompt_tokens = number(&usage["prompt_tokens"]);
        answer.cached_tokens = number(&usage["prompt_tokens_details"]["cached_tokens"]);
        answer.loaded_bytes = number(&value["cairn"]["loaded_bytes"]);
        answer.wire = value["cairn"]["wire"].as_str().unwrap_or_default().to_owned();
    }
}
