//! The server's end of RDMA: lets queue pairs in by ticket, and registers for each tenant what its clients may reach.

use super::registered::{Access, Domain, Region};
use super::verbs::{Listener, Queue, Request};
use super::{TICKET_BYTES, Ticket};
use crate::frame::{Frame, Link, decode, kind};
use crate::located::{Io, MAX_CHUNKS, Serve, locate, requests, take_offers};
use crate::map::{Map, memory};
use crate::store::{Hold, Store};
use crate::stream;
use crate::wire::WireKind;
use bytes::Bytes;
use cairn_proto::pb;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// Longest time from a ticket to its queue pair.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How often registrations of chunks that got other memory are given up, if nobody asks for more.
const SWEEP_PERIOD: Duration = Duration::from_secs(1);

/// Pause after the connection manager failed.
const PAUSE: Duration = Duration::from_millis(100);

const WIRE: WireKind = WireKind::Rdma;

/// Why there is no RDMA.
#[derive(Debug, Error)]
#[error(
    "no RDMA on {address}: {source}. The address must be that of a device's interface (`rdma link` lists them), and the process must be allowed to open /dev/infiniband"
)]
pub struct RdmaError {
    address: SocketAddr,
    source: io::Error,
}

/// Who waits for a queue pair.
struct Waiting {
    tenant: Option<Arc<str>>,
    give: oneshot::Sender<(Queue, Arc<Tenant>)>,
}

/// What the clients of one tenant may reach through one device. Ends with the last of them.
struct Tenant {
    domain: Arc<Domain>,
    /// Chunks by their numbers, for reading.
    chunks: Mutex<HashMap<u64, Region>>,
}

type Tenants = HashMap<(usize, Option<Arc<str>>), Weak<Tenant>>;

/// Lets clients in.
pub struct RdmaServer {
    listener: Listener,
    /// With the port that was taken.
    address: SocketAddr,
    waiting: Mutex<HashMap<Ticket, Waiting>>,
    tenants: Mutex<Tenants>,
}

impl RdmaServer {
    /// Listens on an address of an RDMA device. Port 0 takes a free one.
    ///
    /// # Errors
    /// When there is no such device, or the port is taken.
    pub fn bind(address: SocketAddr) -> Result<Self, RdmaError> {
        let listener = Listener::bind(address).map_err(|source| RdmaError { address, source })?;
        let address = SocketAddr::new(address.ip(), listener.port());
        Ok(Self { listener, address, waiting: Mutex::default(), tenants: Mutex::default() })
    }

    /// Lets queue pairs in until `stop`.
    pub async fn run(self: Arc<Self>, store: Arc<dyn Store>, stop: CancellationToken) {
        let mut sweep = tokio::time::interval(SWEEP_PERIOD);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = sweep.tick() => self.sweep(&*store),
                request = self.listener.request() => match request {
                    Ok(request) => self.admit(request),
                    Err(error) => {
                        tracing::warn!(%error, "the RDMA connection manager");
                        tokio::time::sleep(PAUSE).await;
                    }
                }
            }
        }
    }

    fn admit(&self, request: Request) {
        let waiting = self.waiting().remove(&request.ticket);
        let Some(Waiting { tenant, give }) = waiting else {
            tracing::debug!("an RDMA connection without a good ticket");
            return request.refuse();
        };
        let accepted = self.tenant(&request, tenant).and_then(|tenant| {
            let queue = request.accept(tenant.domain.clone())?;
            Ok((queue, tenant))
        });
        match accepted {
            // Whoever waited may be gone: then the queue pair goes with it.
            Ok(accepted) => drop(give.send(accepted)),
            Err(error) => tracing::warn!(%error, "an RDMA connection cannot be accepted"),
        }
    }

    fn tenant(&self, request: &Request, name: Option<Arc<str>>) -> io::Result<Arc<Tenant>> {
        let mut tenants = self.tenants();
        let key = (request.device(), name);
        if let Some(tenant) = tenants.get(&key).and_then(Weak::upgrade) {
            return Ok(tenant);
        }
        let tenant = Arc::new(Tenant { domain: Arc::new(request.domain()?), chunks: Mutex::default() });
        tenants.retain(|_, tenant| tenant.strong_count() > 0);
        tenants.insert(key, Arc::downgrade(&tenant));
        Ok(tenant)
    }

    fn sweep(&self, store: &dyn Store) {
        let tenants: Vec<_> = self.tenants().values().filter_map(Weak::upgrade).collect();
        tenants.iter().for_each(|tenant| tenant.sweep(store));
    }

    /// Serves the rest of a data connection whose client asked for a queue pair.
    pub(crate) async fn serve<S: Io>(
        &self,
        store: &Arc<dyn Store>,
        link: &mut Link<S>,
        session: u64,
    ) -> Result<(), Status> {
        let ticket = ticket()?;
        let (give, given) = oneshot::channel();
        self.waiting().insert(ticket, Waiting { tenant: store.tenant(session)?, give });
        let _withdraw = Withdraw { server: self, ticket };
        let offer = pb::QueuePairOffer { address: self.address.to_string(), ticket: ticket.to_vec().into() };
        link.send(kind::QUEUE_PAIR_AT, &offer).await?;
        let given = tokio::time::timeout(CONNECT_TIMEOUT, given).await;
        let late = || Status::unavailable("no queue pair came");
        let (queue, tenant) = given.map_err(|_| late())?.map_err(|_| late())?;
        let (store, staging) = (store.clone(), None);
        let mut connection = Connection { _queue: queue, tenant, staging, store, link, session };
        requests(&mut connection).await
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<Ticket, Waiting>> {
        // An insertion or removal is whole even if something else panicked.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tenants(&self) -> MutexGuard<'_, Tenants> {
        self.tenants.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A ticket is good as long as somebody waits.
struct Withdraw<'a> {
    server: &'a RdmaServer,
    ticket: Ticket,
}

impl Drop for Withdraw<'_> {
    fn drop(&mut self) {
        self.server.waiting().remove(&self.ticket);
    }
}

fn ticket() -> Result<Ticket, Status> {
    let mut ticket = [0; TICKET_BYTES];
    match rustix::rand::getrandom(&mut ticket, rustix::rand::GetRandomFlags::empty()) {
        Ok(TICKET_BYTES) => Ok(ticket),
        _ => Err(Status::internal("the system gives no random bytes")),
    }
}

impl Tenant {
    fn sweep(&self, store: &dyn Store) {
        // Pages that are given up are unpinned without the lock.
        let gone: Vec<Region> = {
            let mut chunks = self.chunks();
            chunks.extract_if(|chunk, _| !store.is_current(*chunk)).map(|(_, region)| region).collect()
        };
        drop(gone);
    }

    /// The key to a chunk and its size, for a client that has a lease on a block in it.
    fn register(
        &self,
        store: &dyn Store,
        (session, lease): (u64, u64),
        chunk: u64,
    ) -> Result<(u32, u64), Status> {
        let memory = store.chunk(session, lease, chunk)?;
        if let Some(region) = self.chunks().get(&chunk) {
            return Ok((region.rkey(), memory.bytes));
        }
        let place = (memory.address, memory.bytes);
        // SAFETY: the chunk is mapped while the hold lives. Only devices read it through this registration, and its slots are never
        // borrowed for writing while a lease keeps a block in them.
        let region = unsafe { Region::new(&self.domain, place, Access::RemoteRead, memory.hold) };
        let region = region.map_err(|error| {
            let text = "cannot register host memory for RDMA (is the limit of locked memory high enough?)";
            Status::unavailable(format!("{text}: {error}"))
        })?;
        // The lease was held before and is held now, so the pages that were registered are this chunk's, not those of what came
        // after it.
        store.chunk(session, lease, chunk)?;
        // Another connection may have been faster; its key stays good.
        Ok((self.chunks().entry(chunk).or_insert(region).rkey(), memory.bytes))
    }

    fn chunks(&self) -> MutexGuard<'_, HashMap<u64, Region>> {
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one client publishes from.
struct Staging {
    _region: Region,
    map: Arc<Map>,
    _room: Hold,
}

struct Connection<'a, S> {
    /// First, so that the client reaches nothing any more when the rest goes.
    _queue: Queue,
    staging: Option<Staging>,
    tenant: Arc<Tenant>,
    store: Arc<dyn Store>,
    link: &'a mut Link<S>,
    session: u64,
}

impl<S: Io> Serve for Connection<'_, S> {
    type Io = S;

    fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    fn link(&mut self) -> &mut Link<S> {
        self.link
    }

    fn answer(&mut self, kind: u8, body: Bytes) -> BoxFuture<'_, Result<(), Status>> {
        self.request(kind, body).boxed()
    }

    fn publish(&mut self, reservation: u64) -> BoxFuture<'_, Result<pb::PublishResponse, Status>> {
        let staging = self.staging.as_ref().map(|staging| &*staging.map);
        take_offers(&self.store, self.link, (WIRE, self.session), reservation, staging).boxed()
    }
}

impl<S: Io> Connection<'_, S> {
    async fn request(&mut self, kind: u8, body: Bytes) -> Result<(), Status> {
        match kind {
            kind::LOOKUP | kind::RESERVE => {
                stream::answer(&self.store, self.link, self.session, (kind, body), true).await
            }
            kind::MAP => self.map(decode(body)?).await,
            kind::FETCH => {
                let pb::FetchRequest { lease_id, first, count, .. } = decode(body)?;
                let blocks = (lease_id, first, count);
                locate(&self.store, self.link, (WIRE, self.session), blocks).await?;
                self.link.send(kind::END, &()).await
            }
            kind::STAGING => self.give_staging().await,
            _ => Err(Frame::Message(kind, body).unexpected()),
        }
    }

    async fn map(&mut self, request: pb::MapRequest) -> Result<(), Status> {
        if request.chunks.len() > MAX_CHUNKS {
            return Err(Status::invalid_argument(format!("at most {MAX_CHUNKS} chunks in one request")));
        }
        self.tenant.sweep(&*self.store);
        let leased = (self.session, request.lease_id);
        for chunk in request.chunks {
            // Takes the pages of the whole chunk: milliseconds, once.
            let (tenant, store) = (self.tenant.clone(), self.store.clone());
            let work = tokio::task::spawn_blocking(move || tenant.register(&*store, leased, chunk));
            let registered = work.await.map_err(|error| Status::internal(error.to_string()))?;
            let (rkey, bytes) = registered?;
            self.link.push(kind::MAPPED, &pb::MappedChunk { chunk, bytes, rkey });
        }
        self.link.flush().await
    }

    async fn give_staging(&mut self) -> Result<(), Status> {
        let bytes = self.store.limits().staging_bytes;
        let failed = |error: io::Error| Status::resource_exhausted(format!("no staging memory: {error}"));
        let room = self.store.staging(bytes)?;
        let fd = memory(c"cairn-staging", bytes).map_err(failed)?;
        let map = Arc::new(Map::writable(fd, bytes).map_err(failed)?);
        let place = (map.address(), bytes);
        // SAFETY: the hold is the mapping, which is for writing, and its bytes are reached by pointer only.
        let region = unsafe { Region::new(&self.tenant.domain, place, Access::RemoteWrite, map.clone()) };
        let region = region.map_err(failed)?;
        let rkey = region.rkey();
        self.staging = Some(Staging { _region: region, map, _room: room });
        self.link.send(kind::STAGED, &pb::StagedMemory { bytes, rkey }).await
    }
}
