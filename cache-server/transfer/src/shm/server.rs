//! The server's end of shared memory: a Unix socket for each client. Owns pins: a pinned block keeps its bytes until the client
//! lets go or its process ends, whatever becomes of its session, because it may be reading them.

use super::fds;
use crate::frame::{Frame, Link, decode, kind};
use crate::handshake;
use crate::located::{MAX_CHUNKS, Serve, locate, requests, take_offers};
use crate::map::{Map, memory};
use crate::store::{GpuChunk, GpuUuid, Hold, Reach, Store};
use crate::stream;
use crate::wire::WireKind;
use bytes::Bytes;
use cairn_proto::pb;
use futures::FutureExt;
use futures::future::BoxFuture;
use prost::Message;
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;

/// Clients' connections at a time, in all.
const MAX_CONNECTIONS: usize = 4096;

/// GPUs that one reader can reach; what it says beyond that is not heard.
const MAX_GPUS: usize = 64;

/// Pins of one connection.
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

/// Listens for clients on this host.
pub struct ShmServer {
    path: PathBuf,
    listener: UnixListener,
    store: Arc<dyn Store>,
    /// Users whose processes may connect, besides root and the server's own.
    users: Vec<u32>,
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
        let listener = listen(path, !users.is_empty()).map_err(|source| {
            let path = path.display().to_string();
            ShmServerError { path, source }
        })?;
        Ok(Self { path: path.to_owned(), listener, store, users })
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
        let mut link = Link::with_a_stranger(socket);
        let (session, _place) = handshake::accept(&mut link, &*self.store).await?;
        let (store, pins) = (self.store.clone(), HashMap::new());
        let mut connection = Connection { store, link, session, pins, staging: None };
        let ended = self.store.ended(session);
        let result = tokio::select! {
            () = ended => Ok(()),
            result = requests(&mut connection) => result,
        };
        if !connection.pins.is_empty() {
            connection.outlive().await;
        }
        result
    }
}

fn listen(path: &Path, for_others: bool) -> std::io::Result<UnixListener> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Some(folder) = folder.filter(|folder| !folder.exists()) {
        std::fs::create_dir_all(folder)?;
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700))?;
    }
    if let Some(folder) = folder {
        // Whoever can write there could put a socket of their own in this one's place.
        let found = std::fs::metadata(folder)?;
        let own = [0, rustix::process::geteuid().as_raw()].contains(&found.uid());
        if !own || found.mode() & 0o022 != 0 && found.mode() & 0o1000 == 0 {
            let text = format!("{} can be written by other users", folder.display());
            return Err(std::io::Error::other(text));
        }
    }
    if path.exists() {
        use std::os::unix::fs::FileTypeExt;
        let is_socket = std::fs::symlink_metadata(path)?.file_type().is_socket();
        if !is_socket || std::os::unix::net::UnixStream::connect(path).is_ok() {
            return Err(std::io::Error::from(std::io::ErrorKind::AddrInUse));
        }
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    // Who may connect at all; whoever does is asked for its user, and then for the session's key.
    let mode = if for_others { 0o666 } else { 0o600 };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// Removes sockets in a folder that nobody listens on any more: those of servers that were killed.
pub fn sweep(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let is_socket = path.extension().is_some_and(|extension| extension == "sock");
        let refused = |error: std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
        if is_socket && std::os::unix::net::UnixStream::connect(&path).is_err_and(refused) {
            // Somebody else may sweep, too.
            let _ = std::fs::remove_file(&path);
        }
    }
}

struct Connection {
    store: Arc<dyn Store>,
    link: Link<UnixStream>,
    session: u64,
    /// What this client may be looking at.
    pins: HashMap<u64, Hold>,
    staging: Option<Staging>,
}

/// What one client publishes from.
struct Staging {
    map: Map,
    _room: Hold,
}

impl Serve for Connection {
    type Io = UnixStream;

    fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    fn link(&mut self) -> &mut Link<UnixStream> {
        &mut self.link
    }

    fn answer(&mut self, kind: u8, body: Bytes) -> BoxFuture<'_, Result<(), Status>> {
        self.request(kind, body).boxed()
    }

    fn publish(&mut self, reservation: u64) -> BoxFuture<'_, Result<pb::PublishResponse, Status>> {
        let staging = self.staging.as_ref().map(|staging| &staging.map);
        take_offers(&self.store, &mut self.link, (WIRE, self.session), reservation, staging).boxed()
    }
}

impl Connection {
    async fn request(&mut self, kind: u8, body: Bytes) -> Result<(), Status> {
        match kind {
            kind::LOOKUP | kind::RESERVE => {
                stream::answer(&self.store, &mut self.link, self.session, (kind, body), true).await
            }
            kind::MAP => self.map(decode(body)?).await,
            kind::OPEN => self.open(decode(body)?).await,
            kind::FETCH => {
                let pb::FetchRequest { lease_id, first, count, .. } = decode(body)?;
                self.locate((lease_id, first, count), None, Reach::default()).await
            }
            kind::PIN => {
                let pb::PinRequest { pin, lease_id, first, count, gpus, most_on_gpu } = decode(body)?;
                let gpus = gpus.iter().take(MAX_GPUS).map(|gpu| GpuUuid::try_from(gpu.as_ref()));
                let gpus: Vec<GpuUuid> = gpus
                    .collect::<Result<_, _>>()
                    .map_err(|_| Status::invalid_argument("the UUID of a GPU has 16 bytes"))?;
                let reach = Reach { gpus: &gpus, blocks: most_on_gpu as usize };
                self.locate((lease_id, first, count), Some(pin), reach).await
            }
            kind::UNPIN => {
                let pb::UnpinRequest { pin } = decode(body)?;
                self.pins.remove(&pin);
                Ok(())
            }
            kind::STAGING => self.give_staging().await,
            _ => Err(Frame::Message(kind, body).unexpected()),
        }
    }

    async fn map(&mut self, request: pb::MapRequest) -> Result<(), Status> {
        if request.chunks.len() > MAX_CHUNKS {
            return Err(Status::invalid_argument(format!("at most {MAX_CHUNKS} chunks in one request")));
        }
        for chunk in request.chunks {
            let (fd, bytes) = self.store.export(self.session, request.lease_id, chunk)?;
            self.send_memory(kind::MAPPED, &pb::MappedChunk { chunk, bytes, rkey: 0 }, &fd).await?;
        }
        Ok(())
    }

    async fn open(&mut self, request: pb::MapRequest) -> Result<(), Status> {
        if request.chunks.len() > MAX_CHUNKS {
            return Err(Status::invalid_argument(format!("at most {MAX_CHUNKS} chunks in one request")));
        }
        for chunk in request.chunks {
            let GpuChunk { handle, bytes, gpu } =
                self.store.gpu_chunk(self.session, request.lease_id, chunk)?;
            let (handle, gpu) = (handle.to_vec().into(), gpu.to_vec().into());
            self.link.push(kind::OPENED, &pb::OpenedChunk { chunk, bytes, handle, gpu });
        }
        self.link.flush().await
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

    async fn locate(
        &mut self,
        blocks: (u64, u32, u32),
        pin: Option<u64>,
        reach: Reach<'_>,
    ) -> Result<(), Status> {
        if pin.is_some() && self.pins.len() >= MAX_PINS {
            return Err(Status::resource_exhausted(format!("at most {MAX_PINS} views on one connection")));
        }
        let (hold, bytes) = locate(&self.store, &mut self.link, (WIRE, self.session), blocks, reach).await?;
        // If the client does not hear of the pin, the connection and all its pins are over. What it copies it tells itself.
        if let Some(pin) = pin {
            self.store.sent(WIRE, bytes);
            self.pins.insert(pin, hold);
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
        self.send_memory(kind::STAGED, &pb::StagedMemory { bytes, rkey: 0 }, &fd).await
    }

    /// The session is over, but the client may still read what it pinned: until its process closes the socket, or lets go.
    async fn outlive(&mut self) {
        while let Ok(Some(frame)) = self.link.next().await {
            if let Frame::Message(kind::UNPIN, body) = frame
                && let Ok(pb::UnpinRequest { pin }) = decode(body)
            {
                self.pins.remove(&pin);
            }
            if self.pins.is_empty() {
                return;
            }
        }
        // Whatever it says now makes no sense, but it may still be looking.
        self.link.closed().await;
    }
}
