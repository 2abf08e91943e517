//! The server's end of shared memory: a Unix socket for each client. Owns pins: a pinned block keeps its bytes until the client
//! lets go or its process ends, whatever becomes of its session, because it may be reading them.

use super::fds;
use super::map::{Map, memory};
use crate::copy::copy_shared;
use crate::frame::{Frame, Link, decode, kind};
use crate::handshake;
use crate::store::{Hold, Receiving, Store};
use crate::stream::{drain, is_refusal, send_block, within};
use crate::wire::WireKind;
use cairn_proto::{Checksum, pb};
use futures::StreamExt;
use prost::Message;
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

/// Clients' connections at a time, in all.
const MAX_CONNECTIONS: usize = 4096;

/// Pins of one session.
const MAX_PINS: usize = 4096;

const WIRE: WireKind = WireKind::Shm;

/// Why there is no shared memory.
#[derive(Debug, Error)]
#[error(
    "cannot listen on {path} for clients on this host: {source}. Choose another path with wires.shm_path, or \"off\""
)]
pub struct ShmServerError {
    path: String,
    source: std::io::Error,
}

type Pins = Mutex<HashMap<u64, Hold>>;

/// Listens for clients on this host.
pub struct ShmServer {
    path: PathBuf,
    listener: UnixListener,
    store: Arc<dyn Store>,
    /// Users whose processes may connect, besides root and the server's own.
    users: Vec<u32>,
    /// Of sessions with a connection.
    pins: Mutex<HashMap<u64, Weak<Pins>>>,
}

impl Drop for ShmServer {
    fn drop(&mut self) {
        // A socket file left behind is removed by the next start.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl ShmServer {
    /// Binds the socket. A socket left behind by a server that is gone is replaced; the folder is made if need be, for
    /// this user only.
    ///
    /// # Errors
    /// When the path cannot be bound.
    pub fn bind(path: &Path, users: Vec<u32>, store: Arc<dyn Store>) -> Result<Self, ShmServerError> {
        let listener = listen(path).map_err(|source| {
            let path = path.display().to_string();
            ShmServerError { path, source }
        })?;
        Ok(Self { path: path.to_owned(), listener, store, users, pins: Mutex::default() })
    }

    /// Serves until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        let server = Arc::new(self);
        let (room, tasks) = (Arc::new(Semaphore::new(MAX_CONNECTIONS)), TaskTracker::new());
        while let Some(accepted) = stop.run_until_cancelled(server.listener.accept()).await {
            let socket = match accepted {
                Ok((socket, _)) => socket,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a client of shared memory");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(permit) = room.clone().try_acquire_owned() else {
                tracing::warn!(max = MAX_CONNECTIONS, "too many clients of shared memory");
                continue;
            };
            let (server, stop) = (server.clone(), stop.clone());
            tasks.spawn(async move {
                // At the end of the server its memory stays readable for those who mapped it.
                let result = stop.run_until_cancelled(server.serve(socket)).await;
                if let Some(Err(status)) = result {
                    tracing::debug!(error = status.message(), "a client of shared memory");
                }
                drop(permit);
            });
        }
        tasks.close();
        tasks.wait().await;
    }

    async fn serve(&self, socket: UnixStream) -> Result<(), Status> {
        let peer = socket.peer_cred().map_err(|error| Status::unavailable(error.to_string()))?;
        let own = rustix::process::geteuid().as_raw();
        if ![0, own].contains(&peer.uid()) && !self.users.contains(&peer.uid()) {
            let uid = peer.uid();
            return Err(Status::permission_denied(format!("user {uid} may not use shared memory")));
        }
        let mut link = Link::new(socket);
        let (session, _place) = handshake::accept(&mut link, &*self.store).await?;
        let pins = self.pins_of(session);
        let mut connection = Connection { store: self.store.clone(), link, session, pins, staging: None };
        let ended = self.store.ended(session);
        let result = tokio::select! {
            () = ended => Ok(()),
            result = connection.requests() => result,
        };
        if !lock(&connection.pins).is_empty() {
            connection.outlive().await;
        }
        result
    }

    /// Shared by all connections of a session; gone with the last.
    fn pins_of(&self, session: u64) -> Arc<Pins> {
        let mut sessions = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        sessions.retain(|_, pins| pins.strong_count() > 0);
        if let Some(pins) = sessions.get(&session).and_then(Weak::upgrade) {
            return pins;
        }
        let pins = Arc::new(Pins::default());
        sessions.insert(session, Arc::downgrade(&pins));
        pins
    }
}

fn listen(path: &Path) -> std::io::Result<UnixListener> {
    if let Some(folder) = path.parent().filter(|folder| !folder.exists()) {
        std::fs::create_dir_all(folder)?;
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))?;
    }
    if path.exists() {
        use std::os::unix::fs::FileTypeExt;
        let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
        if !is_socket || std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(std::io::Error::from(std::io::ErrorKind::AddrInUse));
        }
        std::fs::remove_file(path)?;
    }
    UnixListener::bind(path)
}

fn lock(pins: &Pins) -> std::sync::MutexGuard<'_, HashMap<u64, Hold>> {
    // An insertion or removal is whole even if something else panicked.
    pins.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Connection {
    store: Arc<dyn Store>,
    link: Link<UnixStream>,
    session: u64,
    pins: Arc<Pins>,
    staging: Option<Staging>,
}

/// What one client publishes from.
struct Staging {
    map: Map,
    _room: Hold,
}

impl Connection {
    async fn requests(&mut self) -> Result<(), Status> {
        while let Some(frame) = self.link.next().await? {
            let Frame::Message(kind, body) = frame else { return Err(frame.unexpected()) };
            let result = match kind {
                kind::LOOKUP => self.lookup(&decode(body)?).await,
                kind::RESERVE => self.reserve(&decode(body)?).await,
                kind::MAP => self.map(decode(body)?).await,
                kind::FETCH => {
                    let pb::FetchRequest { lease_id, first, count, .. } = decode(body)?;
                    self.locate((lease_id, first, count), None).await
                }
                kind::PIN => {
                    let pb::PinRequest { pin, lease_id, first, count } = decode(body)?;
                    self.locate((lease_id, first, count), Some(pin)).await
                }
                kind::UNPIN => {
                    let pb::UnpinRequest { pin } = decode(body)?;
                    let hold = lock(&self.pins).remove(&pin);
                    drop(hold);
                    Ok(())
                }
                kind::STAGING => self.give_staging().await,
                kind::PUBLISH => {
                    let pb::PublishHeader { reservation_id, .. } = decode(body)?;
                    match self.publish(reservation_id).await {
                        Ok(response) => self.link.send(kind::COMMITS, &response).await,
                        Err(status) => {
                            self.link.fail(&status).await?;
                            let idle = self.store.limits().idle_timeout;
                            drain(&mut self.link, idle).await
                        }
                    }
                }
                _ => Err(Frame::Message(kind, body).unexpected()),
            };
            match result {
                Err(status) if is_refusal(&status) => self.link.fail(&status).await?,
                result => result?,
            }
        }
        Ok(())
    }

    async fn lookup(&mut self, request: &pb::LookupRequest) -> Result<(), Status> {
        let response = self.store.lookup(self.session, request, true)?;
        self.link.send(kind::FOUND, &response).await
    }

    async fn reserve(&mut self, request: &pb::ReserveRequest) -> Result<(), Status> {
        let response = self.store.reserve(self.session, request)?;
        self.link.send(kind::RESERVED, &response).await
    }

    async fn map(&mut self, request: pb::MapRequest) -> Result<(), Status> {
        let export = |chunk: &u64| self.store.export(self.session, request.lease_id, *chunk);
        let exports = request.chunks.iter().map(export).collect::<Result<Vec<_>, _>>()?;
        for (chunk, (fd, bytes)) in request.chunks.iter().zip(exports) {
            self.send_memory(kind::MAPPED, &pb::MappedChunk { chunk: *chunk, bytes }, &fd).await?;
        }
        Ok(())
    }

    async fn send_memory(&mut self, kind: u8, message: &impl Message, fd: &OwnedFd) -> Result<(), Status> {
        self.link.flush().await?;
        let body = message.encode_to_vec();
        let mut frame = (body.len() as u32).to_le_bytes().to_vec();
        frame.push(kind);
        frame.extend(body);
        let sent = fds::send(self.link.io(), &frame, fd.as_fd()).await;
        sent.map_err(|error| Status::unavailable(error.to_string()))
    }

    /// Tells where blocks are, or sends those that are nowhere in shared memory.
    async fn locate(
        &mut self,
        (lease, first, count): (u64, u32, u32),
        pin: Option<u64>,
    ) -> Result<(), Status> {
        let positions = (first as usize, count as usize);
        let mut reading = self.store.read(WIRE, self.session, lease, positions)?;
        let timeout = self.store.limits().fetch_timeout;
        let mut sent = 0;
        let link = &mut self.link;
        let work = async {
            let mut located = pb::LocatedBlocks::default();
            while let Some((block, brought)) = reading.blocks.next().await {
                match brought {
                    Ok(brought) => {
                        sent += brought.bytes.len() as u64;
                        if let Some(location) = brought.location {
                            located.blocks.push(block);
                            located.locations.push(location.0);
                        } else {
                            send_block(link, block, &brought.bytes).await?;
                        }
                    }
                    Err(reason) => {
                        let reason = pb::MissReason::from(reason).into();
                        link.push(kind::LOST, &pb::BlockLoss { block, reason });
                    }
                }
            }
            link.push(kind::LOCATED, &located);
            Ok(())
        };
        within(timeout, work).await?;
        self.store.sent(WIRE, sent);
        if let Some(pin) = pin {
            let mut pins = lock(&self.pins);
            if pins.len() >= MAX_PINS {
                return Err(Status::resource_exhausted(format!("at most {MAX_PINS} views of one client")));
            }
            pins.insert(pin, reading.hold.clone());
        }
        self.link.send(kind::END, &()).await
    }

    async fn give_staging(&mut self) -> Result<(), Status> {
        let bytes = self.store.limits().staging_bytes;
        let failed =
            |error: std::io::Error| Status::resource_exhausted(format!("no staging memory: {error}"));
        let room = self.store.staging(bytes)?;
        let fd = memory(c"cairn-staging", bytes).map_err(failed)?;
        let own = fd.try_clone().map_err(failed)?;
        self.staging = Some(Staging { map: Map::read_only(own, bytes).map_err(failed)?, _room: room });
        self.send_memory(kind::STAGED, &pb::StagedMemory { bytes }, &fd).await
    }

    async fn publish(&mut self, reservation: u64) -> Result<pb::PublishResponse, Status> {
        let idle = self.store.limits().idle_timeout;
        let filling = self.store.fill(WIRE, self.session, reservation)?;
        let mut receiving = Receiving::new(self.store.clone(), filling);
        loop {
            match within(idle, self.link.answer()).await? {
                Frame::Message(kind::OFFER, body) => {
                    self.take(&mut receiving, &decode(body)?)?;
                    self.link.send(kind::TAKEN, &pb::TakenPieces { count: 1 }).await?;
                }
                Frame::Message(kind::END, _) => return Ok(receiving.finish()),
                other => return Err(other.unexpected()),
            }
        }
    }

    /// Copies what the client offers. The client can change it meanwhile: what counts is what was copied.
    fn take(&self, receiving: &mut Receiving, offer: &pb::OfferedPiece) -> Result<(), Status> {
        let place = self.staging.as_ref().and_then(|staging| staging.map.at(offer.at, offer.bytes));
        let source = place.ok_or_else(|| Status::invalid_argument("an offer outside the staging memory"))?;
        let promised = match offer.checksum.is_empty() {
            true => None,
            false => Some(Checksum::try_from(offer.checksum.as_ref())?),
        };
        if offer.offset == 0
            && let Some(promised) = promised
        {
            return receiving.whole(offer.block, promised, |space, hash, target| {
                if target.len() as u64 != offer.bytes {
                    return Err(Status::invalid_argument("a block is offered whole, or piece by piece"));
                }
                // SAFETY: the place is inside the mapping for the bytes of the target, which is no part of it.
                Ok(unsafe { copy_shared(space, hash, source, target) })
            });
        }
        let len = offer.bytes as usize;
        let target = receiving.room(offer.block, offer.offset, len)?;
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(source, target.as_mut_ptr(), len) };
        receiving.added(offer.block, len)?;
        match promised {
            Some(_) => {
                receiving.seal(&pb::BlockSeal { block: offer.block, checksum: offer.checksum.clone() })
            }
            None => Ok(()),
        }
    }

    /// The session is over, but the client may still read what it pinned: until its process closes the socket, or lets go.
    async fn outlive(&mut self) {
        while let Ok(Some(frame)) = self.link.next().await {
            if let Frame::Message(kind::UNPIN, body) = frame
                && let Ok(pb::UnpinRequest { pin }) = decode(body)
            {
                let hold = lock(&self.pins).remove(&pin);
                drop(hold);
            }
            if lock(&self.pins).is_empty() {
                return;
            }
        }
    }
}
