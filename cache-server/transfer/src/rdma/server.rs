//! The server's end of RDMA: lets queue pairs in by ticket, and registers for each tenant what its clients may reach.

use super::registered::{Access, Domain, Region};
use super::verbs::{End, Listener, Queue, Request};
use super::{TICKET_BYTES, Ticket};
use crate::frame::{Frame, Link, decode, kind};
use crate::located::{Io, MAX_CHUNKS, Serve, locate, requests, take_offers};
use crate::map::{Map, memory};
use crate::store::{Hold, Owner, Store};
use crate::stream;
use crate::wire::WireKind;
use bytes::Bytes;
use cairn_proto::pb;
use futures::FutureExt;
use futures::future::BoxFuture;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::Status;

/// How often registrations of chunks that got other memory are given up, if nobody asks for more.
const SWEEP_PERIOD: Duration = Duration::from_secs(1);

/// Pause between attempts to listen again.
const PAUSE: Duration = Duration::from_secs(1);

/// What fails then, and why most likely.
const NO_MEMORY: &str =
    "cannot register memory for RDMA (is the server's limit of locked memory high enough?)";

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
    owner: Owner,
    give: oneshot::Sender<(Queue, Arc<Tenant>)>,
}

/// What clients of one tenant with the same rights may reach through one device. Ends with the last of them.
struct Tenant {
    owner: Owner,
    domain: Arc<Domain>,
    /// Chunks by their numbers, for reading.
    chunks: Mutex<HashMap<u64, Region>>,
}

type Tenants = HashMap<(usize, Owner), Weak<Tenant>>;

/// Lets clients in.
pub struct RdmaServer {
    /// Until it is run.
    listener: Mutex<Option<Listener>>,
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
        let listener = Mutex::new(Some(listener));
        Ok(Self { listener, address, waiting: Mutex::default(), tenants: Mutex::default() })
    }

    /// Lets queue pairs in until `stop`.
    pub async fn run(self: Arc<Self>, store: Arc<dyn Store>, stop: CancellationToken) {
        let mut listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut sweep = tokio::time::interval(SWEEP_PERIOD);
        loop {
            let Some(current) = &listener else {
                if stop.run_until_cancelled(tokio::time::sleep(PAUSE)).await.is_none() {
                    return;
                }
                // A device that was reset comes back.
                listener = Listener::bind(self.address).ok();
                continue;
            };
            tokio::select! {
                () = stop.cancelled() => return,
                _ = sweep.tick() => {
                    // Pages are given back in the time that takes, which others need not wait for.
                    let (server, store) = (self.clone(), store.clone());
                    tokio::task::spawn_blocking(move || server.sweep(&*store));
                }
                request = current.request() => match request {
                    Ok(request) => self.admit(request),
                    Err(error) => {
                        tracing::warn!(%error, "the RDMA connection manager; listening anew");
                        listener = None;
                    }
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, request: Request) {
        let waiting = self.waiting().remove(&request.ticket);
        let Some(Waiting { owner, give }) = waiting else {
            tracing::debug!("an RDMA connection without a good ticket");
            return request.refuse();
        };
        let server = self.clone();
        tokio::task::spawn_blocking(move || {
            let (device, mut found) = (request.device(), None);
            let accepted = request.accept(|end| {
                let tenant = server.tenant((device, owner), end)?;
                found = Some(tenant.clone());
                Ok(tenant.domain.clone())
            });
            match (accepted, found) {
                // Whoever waited may be gone: then the queue pair goes with it.
                (Ok(queue), Some(tenant)) => drop(give.send((queue, tenant))),
                (Err(error), _) => tracing::warn!(%error, "an RDMA connection cannot be accepted"),
                (Ok(_), None) => {}
            }
        });
    }

    fn tenant(&self, key: (usize, Owner), end: &Arc<End>) -> io::Result<Arc<Tenant>> {
        let mut tenants = self.tenants();
        if let Some(tenant) = tenants.get(&key).and_then(Weak::upgrade) {
            return Ok(tenant);
        }
        let (owner, domain) = (key.1.clone(), Arc::new(end.domain()?));
        let tenant = Arc::new(Tenant { owner, domain, chunks: Mutex::default() });
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
        self.waiting().insert(ticket, Waiting { owner: store.owner(session)?, give });
        let _withdraw = Withdraw { server: self, ticket };
        let offer = pb::QueuePairOffer { address: self.address.to_string(), ticket: ticket.to_vec().into() };
        link.send(kind::QUEUE_PAIR_AT, &offer).await?;
        // The client resolves an address and a route first, each in its own time.
        let given = tokio::time::timeout(2 * store.limits().handshake_timeout, given).await;
        let Ok(Ok((queue, tenant))) = given else {
            let late = Status::unavailable("no queue pair came");
            link.fail(&late).await?;
            return Err(late);
        };
        let reach = Some(Reach { _queue: queue, staging: None, tenant });
        link.send(kind::READY, &()).await?;
        let mut connection = Connection { reach, store: store.clone(), link, session };
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
            tracing::warn!(%error, "{NO_MEMORY}");
            Status::resource_exhausted(format!("{NO_MEMORY}: {error}"))
        })?;
        // The lease was held before and is held now, so the pages that were registered are this chunk's, not those of what came
        // after it.
        store.chunk(session, lease, chunk)?;
        // Another connection may have been faster; its key stays good, and this one's pages are given back without the lock.
        let (rkey, _late) = match self.chunks().entry(chunk) {
            Entry::Occupied(entry) => (entry.get().rkey(), Some(region)),
            Entry::Vacant(entry) => (entry.insert(region).rkey(), None),
        };
        Ok((rkey, memory.bytes))
    }

    fn chunks(&self) -> MutexGuard<'_, HashMap<u64, Region>> {
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one client publishes from.
struct Staging {
    region: Region,
    map: Arc<Map>,
    _room: Hold,
}

impl Staging {
    fn new(domain: &Arc<Domain>, bytes: u64, room: Hold) -> io::Result<Self> {
        let map = Arc::new(Map::writable(memory(c"cairn-staging", bytes)?, bytes)?);
        // SAFETY: the hold is the mapping, which is for writing, and its bytes are reached by pointer only.
        let region = unsafe { Region::new(domain, (map.address(), bytes), Access::RemoteWrite, map.clone()) };
        Ok(Self { region: region?, map, _room: room })
    }
}

/// What a client reaches, in the order in which it must go: the queue pair first.
struct Reach {
    _queue: Queue,
    staging: Option<Staging>,
    tenant: Arc<Tenant>,
}

struct Connection<'a, S> {
    /// There until the end.
    reach: Option<Reach>,
    store: Arc<dyn Store>,
    link: &'a mut Link<S>,
    session: u64,
}

impl<S> Drop for Connection<'_, S> {
    fn drop(&mut self) {
        // The last connection of a tenant gives back all its pages: seconds, where there are many.
        let reach = self.reach.take();
        tokio::task::spawn_blocking(move || drop(reach));
    }
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
        let staging = self.reach.as_ref().and_then(|reach| reach.staging.as_ref());
        let staging = staging.map(|staging| &*staging.map);
        take_offers(&self.store, self.link, (WIRE, self.session), reservation, staging).boxed()
    }
}

impl<S: Io> Connection<'_, S> {
    fn reach(&mut self) -> Result<&mut Reach, Status> {
        self.reach.as_mut().ok_or_else(|| Status::unavailable("the connection ended"))
    }

    async fn request(&mut self, kind: u8, body: Bytes) -> Result<(), Status> {
        match kind {
            kind::LOOKUP | kind::RESERVE => {
                stream::answer(&self.store, self.link, self.session, (kind, body), true).await
            }
            kind::MAP => self.map(decode(body)?).await,
            kind::FETCH => {
                let pb::FetchRequest { lease_id, first, count, .. } = decode(body)?;
                let blocks = (lease_id, first, count);
                locate(&self.store, self.link, (WIRE, self.session), blocks, crate::store::Reach::default())
                    .await?;
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
        let leased = (self.session, request.lease_id);
        for chunk in request.chunks {
            // Takes the pages of the whole chunk: milliseconds, once.
            let (tenant, store) = (self.reach()?.tenant.clone(), self.store.clone());
            let work = tokio::task::spawn_blocking(move || tenant.register(&*store, leased, chunk));
            let registered = work.await.map_err(|error| Status::internal(error.to_string()))?;
            let (rkey, bytes) = registered?;
            self.link.push(kind::MAPPED, &pb::MappedChunk { chunk, bytes, rkey });
        }
        self.link.flush().await
    }

    async fn give_staging(&mut self) -> Result<(), Status> {
        let tenant = self.reach()?.tenant.clone();
        if !tenant.owner.publishes {
            return Err(Status::permission_denied("the token has no right to publish"));
        }
        let bytes = self.store.limits().staging_bytes;
        let room = self.store.staging(bytes)?;
        let staging = tokio::task::spawn_blocking(move || Staging::new(&tenant.domain, bytes, room)).await;
        let staging = staging.map_err(|error| Status::internal(error.to_string()))?;
        let staging = staging.map_err(|error| {
            tracing::warn!(%error, "{NO_MEMORY}");
            Status::resource_exhausted(format!("{NO_MEMORY}: {error}"))
        })?;
        let rkey = staging.region.rkey();
        self.reach()?.staging = Some(staging);
        self.link.send(kind::STAGED, &pb::StagedMemory { bytes, rkey }).await
    }
}
