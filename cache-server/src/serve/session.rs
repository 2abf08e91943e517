//! The life of a session: its stream. When the stream ends, for whatever reason, the session ends.

use super::{Context, refused, unexpected};
use crate::auth::Identity;
use crate::engine::Engine;
use crate::sessions::Sessions;
use cairn_core::{Event, Reply, SessionId};
use cairn_proto::{limits, pb};
use futures::{Stream, StreamExt, stream};
use std::sync::Arc;
use tonic::Status;

struct SessionGuard {
    engine: Arc<Engine>,
    sessions: Arc<Sessions>,
    id: SessionId,
}

impl Drop for SessionGuard {
    fn drop(&mut self) {
        self.sessions.end(self.id);
        // Refused only when the session is unknown, and then there is nothing to end.
        let _ = self.engine.apply(Event::EndSession(self.id));
        tracing::debug!(session = self.id.0, "session ended");
    }
}

pub(crate) fn open(
    context: &Context,
    identity: Identity,
    request: &pb::SessionRequest,
) -> Result<impl Stream<Item = Result<pb::SessionEvent, Status>> + Send + use<>, Status> {
    context.accepting()?;
    if request.api_version != limits::API_VERSION {
        let (asked, spoken) = (request.api_version, limits::API_VERSION);
        return Err(Status::failed_precondition(format!(
            "the client speaks API version {asked}, this server {spoken}: use matching releases"
        )));
    }
    if request.client_name.len() > limits::MAX_NAME_BYTES {
        return Err(Status::invalid_argument("client_name is too long"));
    }
    if context.engine.inspect(|core| core.usage().sessions) >= context.max_sessions {
        let max = context.max_sessions;
        return Err(Status::resource_exhausted(format!("at most {max} sessions; raise limits.max_sessions")));
    }
    identity.require_any()?;
    let own = context.sessions.count(&identity);
    if own >= context.max_sessions_per_token && identity.has_token() {
        let max = context.max_sessions_per_token;
        let text = format!("at most {max} sessions with one token; raise limits.max_sessions_per_token");
        return Err(Status::resource_exhausted(text));
    }
    let Reply::Session(id) = context.engine.apply(Event::OpenSession).map_err(refused)? else {
        return Err(unexpected());
    };
    tracing::debug!(session = id.0, client = request.client_name, "session opened");
    let guard = SessionGuard { engine: context.engine.clone(), sessions: context.sessions.clone(), id };
    let key = context.sessions.open(id, identity)?;
    let opened = pb::session_event::Event::Opened(pb::SessionOpened {
        session_id: id.0,
        server_epoch: context.engine.epoch(),
        max_blocks_per_request: limits::MAX_BLOCKS_PER_REQUEST as u32,
        max_block_bytes: limits::MAX_BLOCK_BYTES,
        max_lease_ttl_ms: limits::MAX_TTL_MS,
        wires: context.wires.to_vec(),
        session_key: key.to_vec().into(),
    });
    let (draining, transfers) = (context.draining.clone(), context.transfers.clone());
    let drained = async move {
        draining.cancelled_owned().await;
        pb::session_event::Event::Draining(pb::SessionDraining {})
    };
    let finished = async move { transfers.wait().await };
    let events = stream::once(async { opened })
        .chain(stream::once(drained))
        .map(|event| Ok(pb::SessionEvent { event: Some(event) }))
        .chain(stream::once(finished).filter_map(|()| async { None }));
    Ok(Guarded { events: Box::pin(events), _guard: guard })
}

/// The events, and the session that ends with them.
struct Guarded<S> {
    events: std::pin::Pin<Box<S>>,
    _guard: SessionGuard,
}

impl<S: Stream> Stream for Guarded<S> {
    type Item = S::Item;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<S::Item>> {
        self.events.as_mut().poll_next(context)
    }
}
