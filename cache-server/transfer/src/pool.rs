//! Connections that are open and idle. A request takes one for itself and gives it back only when it ended well: a
//! connection in an unknown state is closed.

use std::sync::{Mutex, PoisonError};
use tokio::sync::{Semaphore, SemaphorePermit};
use tonic::Status;

/// Connections of one wire at a time; further requests wait for one.
pub(crate) const MAX_CONNECTIONS: usize = 16;

pub(crate) struct Pool<C> {
    idle: Mutex<Vec<C>>,
    room: Semaphore,
}

/// One connection, taken.
pub(crate) struct Taken<'a, C> {
    connection: Option<C>,
    pool: &'a Pool<C>,
    _permit: SemaphorePermit<'a>,
}

impl<C> Pool<C> {
    pub(crate) fn new() -> Self {
        Self { idle: Mutex::new(Vec::new()), room: Semaphore::new(MAX_CONNECTIONS) }
    }

    /// A place for one request, with the connection used last if there is one.
    pub(crate) async fn take(&self) -> Result<Taken<'_, C>, Status> {
        let permit = self.room.acquire().await;
        let permit = permit.map_err(|_| Status::unavailable("the wire is closed"))?;
        Ok(Taken { connection: self.idle().pop(), pool: self, _permit: permit })
    }

    /// For the next request.
    pub(crate) fn give_back(&self, connection: C) {
        self.idle().push(connection);
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<C>> {
        // A push or a pop is whole even if something else panicked.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<C> Taken<'_, C> {
    /// For the next request, by whoever took it.
    pub(crate) fn put_back(self, connection: C) {
        self.pool.give_back(connection);
    }

    pub(crate) fn connection(&mut self) -> Option<C> {
        self.connection.take()
    }
}
