//! An answer on its way out: whole, or as server-sent events.

use super::api::CommonFields;
use super::text::TextStream;
use super::{Failure, Service};
use crate::engine::{Finish, Summary, Update, Updates};
use axum::Json;
use axum::http::StatusCode;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use cairn_client::WireKind;
use futures::stream;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

pub(super) struct Answer {
    service: Arc<Service>,
    updates: Updates,
    text: TextStream,
    chat: bool,
    with_ids: bool,
    /// Whether an event was sent: the first one names the role.
    begun: bool,
    id: String,
    created: u64,
}

/// What a part of an answer says.
enum Piece {
    Text(String, Vec<u32>),
    End { finish: &'static str, rest: String, summary: Summary },
}

impl Answer {
    pub(super) fn new(service: Arc<Service>, updates: Updates, fields: &CommonFields, chat: bool) -> Self {
        let kind = if chat { "chatcmpl" } else { "cmpl" };
        Self {
            service,
            updates,
            text: TextStream::new(fields.stops()),
            chat,
            with_ids: fields.return_token_ids,
            begun: false,
            id: format!("{kind}-{:016x}", rand::random::<u64>()),
            created: unix_seconds(),
        }
    }

    /// The next piece. The end comes exactly once; `None` after it, or when the engine ended.
    async fn next(&mut self) -> Option<Piece> {
        let tokenizer = &self.service.engine.model().tokenizer;
        match self.updates.recv().await? {
            // Tokens after a stop text were on their way already; nobody is to see them.
            Update::Token(_) if self.text.stopped() => Some(Piece::Text(String::new(), Vec::new())),
            Update::Token(id) => {
                let text = self.text.push(tokenizer, id);
                if self.text.stopped() {
                    self.updates.stop();
                }
                Some(Piece::Text(text, vec![id]))
            }
            Update::Finished(summary) => {
                let rest = self.text.finish(tokenizer);
                let length = summary.finish == Finish::Length && !self.text.stopped();
                let finish = if length { "length" } else { "stop" };
                Some(Piece::End { finish, rest, summary })
            }
        }
    }

    pub(super) async fn whole(mut self) -> Result<Response, Failure> {
        let (mut all, mut ids) = (String::new(), Vec::new());
        loop {
            match self.next().await {
                None => {
                    return Err(Failure(StatusCode::INTERNAL_SERVER_ERROR, "the engine ended".into()));
                }
                Some(Piece::Text(text, new)) => {
                    all.push_str(&text);
                    ids.extend(new);
                }
                Some(Piece::End { finish, rest, summary }) => {
                    all.push_str(&rest);
                    let mut choice = if self.chat {
                        json!({"index": 0, "message": {"role": "assistant", "content": all}, "logprobs": null,
                            "finish_reason": finish})
                    } else {
                        json!({"index": 0, "text": all, "logprobs": null, "finish_reason": finish})
                    };
                    if self.with_ids {
                        choice["token_ids"] = json!(ids);
                    }
                    let object = if self.chat { "chat.completion" } else { "text_completion" };
                    let mut body = self.envelope(object, vec![choice]);
                    add_usage(&mut body, &summary);
                    return Ok(Json(body).into_response());
                }
            }
        }
    }

    pub(super) fn stream(self, include_usage: bool) -> Response {
        let state = (Some(self), Vec::new());
        let events = stream::unfold(state, move |(answer, mut queued)| async move {
            if let Some(event) = queued.pop() {
                return Some((Ok::<Event, Infallible>(event), (answer, queued)));
            }
            let mut answer = answer?;
            let event = match answer.next().await? {
                Piece::Text(text, ids) => answer.event(&text, None, &ids),
                Piece::End { finish, rest, summary } => {
                    // In reverse: the last is popped first.
                    queued.push(Event::default().data("[DONE]"));
                    if include_usage {
                        queued.push(answer.usage_event(&summary));
                    }
                    let event = answer.event(&rest, Some(finish), &[]);
                    return Some((Ok(event), (None, queued)));
                }
            };
            Some((Ok(event), (Some(answer), queued)))
        });
        Sse::new(events).keep_alive(KeepAlive::default()).into_response()
    }

    fn event(&mut self, text: &str, finish: Option<&str>, ids: &[u32]) -> Event {
        let first = !std::mem::replace(&mut self.begun, true);
        let mut choice = if self.chat {
            let delta =
                if first { json!({"role": "assistant", "content": text}) } else { json!({"content": text}) };
            json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish})
        } else {
            json!({"index": 0, "text": text, "logprobs": null, "finish_reason": finish})
        };
        if self.with_ids {
            choice["token_ids"] = json!(ids);
        }
        Event::default().data(self.envelope(self.stream_object(), vec![choice]).to_string())
    }

    fn usage_event(&self, summary: &Summary) -> Event {
        let mut body = self.envelope(self.stream_object(), Vec::new());
        add_usage(&mut body, summary);
        Event::default().data(body.to_string())
    }

    fn stream_object(&self) -> &'static str {
        if self.chat { "chat.completion.chunk" } else { "text_completion" }
    }

    fn envelope(&self, object: &str, choices: Vec<Value>) -> Value {
        json!({"id": self.id, "object": object, "created": self.created, "model": self.service.model_name,
            "choices": choices})
    }
}

/// OpenAI's usage, and beside it what only this worker knows.
fn add_usage(body: &mut Value, summary: &Summary) {
    body["usage"] = json!({
        "prompt_tokens": summary.prompt_tokens,
        "completion_tokens": summary.generated_tokens,
        "total_tokens": summary.prompt_tokens + summary.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": summary.cached_tokens()},
    });
    body["cairn"] = json!({
        "local_tokens": summary.local_tokens,
        "loaded_tokens": summary.loaded_tokens,
        "gpu_tokens": summary.gpu_tokens,
        "device_verified_tokens": summary.device_verified_tokens,
        "loaded_bytes": summary.loaded_bytes,
        "wire": summary.wire.map(WireKind::name),
        "load_ms": summary.load_ms,
        "first_token_ms": summary.first_token_ms,
        "remote_prefill": summary.remote_prefill,
        "recomputed": summary.recomputed,
        "forecast_load_ms": summary.forecast_ms.map(|[load, _]| load),
        "forecast_compute_ms": summary.forecast_ms.map(|[_, compute]| compute),
    });
}

pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
