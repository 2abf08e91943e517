//! The OpenAI-style HTTP API of a worker: completions, chat completions, models. Requests are checked here and handed to
//! the engine as tokens.

mod answer;
mod api;

mod text;

use crate::engine::{Engine, Request, SubmitError, Work};
use crate::model::{ChatMessage, TokenizerError};
use crate::sampling::Sampling;
use answer::Answer;
pub(crate) use answer::unix_seconds;
use api::{ChatRequest, CommonFields, CompletionRequest, Prompt};
use axum::extract::rejection::JsonRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::json;
use std::sync::Arc;

/// Bytes of a request body: a 262,144-token prompt of English text, with margin.
const MAX_BODY_BYTES: usize = 8 << 20;

pub(crate) struct Service {
    pub(crate) engine: Engine,
    pub(crate) model_name: String,
    pub(crate) started: u64,
}

pub(crate) fn router(service: Arc<Service>) -> Router {
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/models", get(models))
        .route("/healthz", get(|| async { "ok\n" }))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(service)
}

/// An error in OpenAI's form.
struct Failure(StatusCode, String);

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let kind = if self.0.is_server_error() { "server_error" } else { "invalid_request_error" };
        (self.0, Json(json!({"error": {"message": self.1, "type": kind, "code": null}}))).into_response()
    }
}

impl From<SubmitError> for Failure {
    fn from(error: SubmitError) -> Self {
        let status = match error {
            SubmitError::Busy | SubmitError::Stopped => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::BAD_REQUEST,
        };
        Self(status, error.to_string())
    }
}

impl From<TokenizerError> for Failure {
    fn from(error: TokenizerError) -> Self {
        Self(StatusCode::BAD_REQUEST, error.to_string())
    }
}

impl From<JsonRejection> for Failure {
    fn from(rejection: JsonRejection) -> Self {
        Self(rejection.status(), rejection.body_text())
    }
}

async fn models(State(service): State<Arc<Service>>) -> Json<serde_json::Value> {
    let model = json!({"id": service.model_name, "object": "model", "created": service.started, "owned_by": "cairn",
        "max_model_len": service.engine.limit()});
    Json(json!({"object": "list", "data": [model]}))
}

async fn completions(
    State(service): State<Arc<Service>>,
    request: Result<Json<CompletionRequest>, JsonRejection>,
) -> Result<Response, Failure> {
    let Json(request) = request?;
    let tokens = match request.prompt {
        Prompt::Text(text) => service.engine.model().tokenizer.encode(&text)?,
        Prompt::Tokens(tokens) => tokens,
    };
    const DEFAULT_MAX_TOKENS: usize = 16;
    let max_tokens = request.common.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
    answer(service, tokens, max_tokens, request.common, false).await
}

async fn chat(
    State(service): State<Arc<Service>>,
    request: Result<Json<ChatRequest>, JsonRejection>,
) -> Result<Response, Failure> {
    let Json(request) = request?;
    if request.messages.is_empty() {
        return Err(Failure(StatusCode::BAD_REQUEST, "messages is empty".into()));
    }
    let messages: Vec<ChatMessage> = request.messages;
    let tokens = service.engine.model().tokenizer.encode_chat(&messages)?;
    // A prompt that leaves no room is refused by the engine, which says so.
    let room = service.engine.limit().saturating_sub(tokens.len()).max(1);
    let max_tokens = request.max_completion_tokens.or(request.common.max_tokens).unwrap_or(room);
    answer(service, tokens, max_tokens, request.common, true).await
}

async fn answer(
    service: Arc<Service>,
    tokens: Vec<u32>,
    max_tokens: usize,
    fields: CommonFields,
    chat: bool,
) -> Result<Response, Failure> {
    fields.check().map_err(|text| Failure(StatusCode::BAD_REQUEST, text))?;
    if max_tokens == 0 {
        return Err(Failure(StatusCode::BAD_REQUEST, "max_tokens must be at least 1".into()));
    }
    let request = Request {
        tokens,
        work: Work::Generate { max_tokens, ignore_end: fields.ignore_eos },
        sampling: Sampling {
            temperature: fields.temperature.unwrap_or(1.0),
            top_p: fields.top_p.unwrap_or(1.0),
            seed: fields.seed.unwrap_or_else(rand::random),
        },
        use_cache: fields.cairn_cache,
    };
    let updates = service.engine.submit(request).await?;
    let answer = Answer::new(service, updates, &fields, chat);
    if fields.stream { Ok(answer.stream(fields.include_usage())) } else { answer.whole().await }
}
