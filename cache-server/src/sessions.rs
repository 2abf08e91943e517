//! Open sessions beside the core's: whose they are, the key for their data connections, and which spaces they declared. What a
//! session holds is the core's business.

use crate::auth::{Identity, Right};
use cairn_core::SessionId;
use cairn_proto::SpaceId;
use cairn_transfer::store::{Hold, SessionKey};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Data connections of one session.
pub(crate) const MAX_CONNECTIONS: usize = 64;

pub(crate) struct Session {
    pub(crate) identity: Identity,
    key: SessionKey,
    spaces: Mutex<HashSet<SpaceId>>,
    room: Arc<Semaphore>,
    ended: CancellationToken,
}

#[derive(Default)]
pub(crate) struct Sessions(Mutex<HashMap<u64, Arc<Session>>>);

impl Sessions {
    /// Adds a session with a fresh key.
    ///
    /// # Errors
    /// When the system gives no random bytes.
    pub(crate) fn open(&self, id: SessionId, identity: Identity) -> Result<SessionKey, Status> {
        let mut key = SessionKey::default();
        let read = rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty());
        if read != Ok(key.len()) {
            return Err(Status::internal("the system gives no random bytes"));
        }
        let session = Session {
            identity,
            key,
            spaces: Mutex::default(),
            room: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            ended: CancellationToken::new(),
        };
        self.table().insert(id.0, Arc::new(session));
        Ok(key)
    }

    /// Sessions with the same token.
    pub(crate) fn count(&self, identity: &Identity) -> usize {
        self.table().values().filter(|session| session.identity.is_same(identity)).count()
    }

    /// Ends a session's data connections.
    pub(crate) fn end(&self, id: SessionId) {
        if let Some(session) = self.table().remove(&id.0) {
            session.ended.cancel();
        }
    }

    /// # Errors
    /// When there is no such session: the same words as for one of somebody else.
    pub(crate) fn find(&self, id: u64) -> Result<Arc<Session>, Status> {
        self.table().get(&id).cloned().ok_or_else(unknown)
    }

    /// The session, if it is this client's and may do that.
    ///
    /// # Errors
    /// When it is not, or may not.
    pub(crate) fn authorize(
        &self,
        id: u64,
        identity: &Identity,
        right: Right,
    ) -> Result<Arc<Session>, Status> {
        let session = self.authorize_any(id, identity)?;
        identity.require(right)?;
        Ok(session)
    }

    /// The session, if it is this client's.
    ///
    /// # Errors
    /// When it is not.
    pub(crate) fn authorize_any(&self, id: u64, identity: &Identity) -> Result<Arc<Session>, Status> {
        self.find(id).ok().filter(|session| session.identity.is_same(identity)).ok_or_else(unknown)
    }

    fn table(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Arc<Session>>> {
        // An insertion or removal is whole even if something else panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Session {
    pub(crate) fn declare(&self, space: SpaceId) {
        self.spaces.lock().unwrap_or_else(PoisonError::into_inner).insert(space);
    }

    /// # Errors
    /// When the session did not declare the space: the same words whether there is such a space or not.
    pub(crate) fn require_space(&self, space: &SpaceId) -> Result<(), Status> {
        if self.spaces.lock().unwrap_or_else(PoisonError::into_inner).contains(space) {
            return Ok(());
        }
        Err(Status::not_found(cairn_core::Refusal::UnknownSpace.to_string()))
    }

    /// The key, and a place for one more data connection.
    ///
    /// # Errors
    /// When there are too many.
    pub(crate) fn connect(&self) -> Result<(SessionKey, Hold), Status> {
        let place = self.room.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!("at most {MAX_CONNECTIONS} data connections of one session"))
        })?;
        Ok((self.key, Arc::new(place)))
    }

    /// Ends with the session.
    pub(crate) fn ended(&self) -> CancellationToken {
        self.ended.clone()
    }
}

fn unknown() -> Status {
    Status::not_found(cairn_core::Refusal::UnknownSession.to_string())
}
