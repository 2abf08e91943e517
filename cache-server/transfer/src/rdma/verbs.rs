//! The verbs library and the connection manager, as far as they are needed, with their order of destruction: a queue pair goes before
//! its completion queue, everything before its device. Everything unsafe
//! about them is here and in `registered`; what remains for callers is that registered memory changes under their hands.

use super::registered::{Domain, Region};
use super::{TICKET_BYTES, Ticket};
use rdma_sys::*;
use socket2::SockAddr;
use std::ffi::CStr;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::ptr::{null, null_mut};
use std::sync::{Arc, Once};
use tokio::io::unix::AsyncFd;

/// Pieces of one doorbell.
pub(super) const MAX_PIECES: usize = 64;

/// Two batches and what flushes them.
const QUEUE_DEPTH: u32 = 2 * (MAX_PIECES as u32 + 1);

/// Reads that a queue pair has in progress, if both devices can.
const MAX_READS: i32 = 16;

/// Longest search for an address or a route.
const RESOLVE_MS: i32 = 2000;

/// A packet is sent again after 4.096 µs × 2 to this power (0.54 s), and 7 times at most: a dead peer is noticed in seconds.
const ACK_TIMEOUT: u8 = 17;
const RETRIES: u8 = 7;

/// Of `rdma_set_option`, from `rdma_cma.h`.
const RDMA_OPTION_ID: i32 = 0;
const RDMA_OPTION_ID_ACK_TIMEOUT: i32 = 3;

/// Connection requests that wait.
const BACKLOG: i32 = 128;

fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Verbs return an error number where the connection manager sets `errno`.
fn check_verbs(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result.abs())) }
}

pub(super) fn check_pointer<T>(pointer: *mut T) -> io::Result<*mut T> {
    if pointer.is_null() { Err(io::Error::last_os_error()) } else { Ok(pointer) }
}

/// Makes, pins or gives up what belongs to a device, which takes milliseconds and more, where nobody waits for the thread.
pub(super) async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// A second descriptor of what the library waits on, so that neither depends on when the other is closed.
fn watch(fd: RawFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the caller has just made the channel, whose descriptor is open.
    let owned = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned()?;
    let flags = rustix::fs::fcntl_getfl(&owned)?;
    rustix::fs::fcntl_setfl(&owned, flags | rustix::fs::OFlags::NONBLOCK)?;
    // SAFETY: the descriptor belongs to the result, which never replaces or closes it before its own end.
    Ok(unsafe { AsyncFd::register_with_interest(owned, tokio::io::Interest::READABLE) }?)
}

/// Where the connection manager tells what happens.
struct Channel {
    /// Absent where nobody listens.
    watched: Option<AsyncFd<OwnedFd>>,
    raw: RawChannel,
}

struct RawChannel(*mut rdma_event_channel);

// SAFETY: librdmacm locks what threads share.
unsafe impl Send for RawChannel {}
// SAFETY: as above.
unsafe impl Sync for RawChannel {}

impl Drop for RawChannel {
    fn drop(&mut self) {
        // SAFETY: made by the library; all ids on it are gone (see the order of fields wherever one is kept).
        unsafe { rdma_destroy_event_channel(self.0) }
    }
}

enum Happening {
    /// Somebody wants a queue pair.
    Request(Request),
    /// An event of this kind, and its status.
    Other(rdma_cm_event_type::Type, i32),
}

impl Channel {
    /// One that nobody listens to: for an end that only has to be there.
    fn unread() -> io::Result<Self> {
        static SAFE_TO_FORK: Once = Once::new();
        SAFE_TO_FORK.call_once(|| {
            // SAFETY: no preconditions. On kernels before 5.12 a process that forks would else lose what devices write to it; where
            // it is refused it is not needed, or the device cannot be used anyway.
            unsafe { ibv_fork_init() };
        });
        // SAFETY: no preconditions.
        let raw = RawChannel(check_pointer(unsafe { rdma_create_event_channel() })?);
        Ok(Self { watched: None, raw })
    }

    fn new() -> io::Result<Self> {
        let mut channel = Self::unread()?;
        // SAFETY: the channel lives.
        channel.watched = Some(watch(unsafe { (*channel.raw.0).fd })?);
        Ok(channel)
    }

    async fn next(&self) -> io::Result<Happening> {
        let Some(watched) = &self.watched else { return Err(io::Error::other("nobody listens here")) };
        loop {
            let mut ready = watched.readable().await?;
            match self.take() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                result => return result,
            }
        }
    }

    /// Events are acknowledged at once, for an id with one that is not cannot be destroyed.
    fn take(&self) -> io::Result<Happening> {
        let mut event = null_mut();
        // SAFETY: the channel lives; `event` is a place for a pointer.
        check(unsafe { rdma_get_cm_event(self.raw.0, &mut event) })?;
        // SAFETY: the event is ours until it is acknowledged, and its private data with it. The parameters of a connection
        // request are those of `conn`.
        unsafe {
            let (id, kind, status) = ((*event).id, (*event).event, (*event).status);
            let mut request = None;
            if kind == rdma_cm_event_type::RDMA_CM_EVENT_CONNECT_REQUEST {
                let conn = (*event).param.conn;
                let mut ticket = [0; TICKET_BYTES];
                let enough = usize::from(conn.private_data_len) >= TICKET_BYTES;
                if enough && !conn.private_data.is_null() {
                    let data = conn.private_data.cast::<u8>();
                    std::ptr::copy_nonoverlapping(data, ticket.as_mut_ptr(), TICKET_BYTES);
                }
                request = Some((Id(id), ticket, conn.responder_resources));
            }
            rdma_ack_cm_event(event);
            let Some((id, ticket, reads)) = request else { return Ok(Happening::Other(kind, status)) };
            // Its later events are nobody's concern. Read here, by a thread that does not own the id, they would make the library change a
            // queue pair that its owner may be destroying.
            let own = Self::unread().and_then(|channel| {
                check(rdma_migrate_id(id.0, channel.raw.0))?;
                Ok(channel)
            });
            Ok(match own {
                Ok(channel) => Happening::Request(Request { end: End { id, channel }, ticket, reads }),
                // This one cannot be served; the next may.
                Err(error) => {
                    tracing::debug!(%error, "a request for a queue pair is dropped");
                    Happening::Other(kind, status)
                }
            })
        }
    }

    /// Waits for one kind of event; any other means failure.
    async fn await_event(&self, wanted: rdma_cm_event_type::Type) -> io::Result<()> {
        match self.next().await? {
            Happening::Other(kind, 0) if kind == wanted => Ok(()),
            Happening::Other(kind, status) => {
                // SAFETY: the library answers with a constant for any kind.
                let name = unsafe { CStr::from_ptr(rdma_event_str(kind)) }.to_string_lossy();
                Err(io::Error::other(format!("{name} ({status})")))
            }
            Happening::Request(_) => Err(io::Error::other("a connection request where none can come")),
        }
    }
}

/// An end of a connection, or what listens for some.
struct Id(*mut rdma_cm_id);

// SAFETY: an id has one owner, who alone reads its channel and changes its queue pair; the rest librdmacm locks.
unsafe impl Send for Id {}
// SAFETY: as above.
unsafe impl Sync for Id {}

impl Id {
    fn new(channel: &Channel) -> io::Result<Self> {
        let mut id = null_mut();
        // SAFETY: the channel lives, and outlives the id (order of fields).
        check(unsafe { rdma_create_id(channel.raw.0, &mut id, null_mut(), rdma_port_space::RDMA_PS_TCP) })?;
        Ok(Self(id))
    }

    /// Its device; absent as long as it has no address.
    fn device(&self) -> io::Result<*mut ibv_context> {
        // SAFETY: the id lives.
        let device = unsafe { (*self.0).verbs };
        if device.is_null() { Err(io::Error::other("no RDMA device")) } else { Ok(device) }
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        // SAFETY: made by the library and destroyed once; a queue pair on it is destroyed before (`Queue`).
        unsafe { rdma_destroy_id(self.0) };
    }
}

/// An end, and the channel that is its own. As long as one end on a device is there, the library keeps the device open.
pub(super) struct End {
    id: Id,
    channel: Channel,
}

impl End {
    /// A domain on its device.
    pub(super) fn domain(self: &Arc<Self>) -> io::Result<Domain> {
        Domain::new(self.id.device()?, self.clone())
    }
}

/// Listens for clients on one address.
pub(super) struct Listener {
    id: Id,
    channel: Channel,
}

impl Listener {
    pub(super) fn bind(address: SocketAddr) -> io::Result<Self> {
        let channel = Channel::new()?;
        let id = Id::new(&channel)?;
        let address = SockAddr::from(address);
        // SAFETY: the id lives; the library copies the address.
        check(unsafe { rdma_bind_addr(id.0, address.as_ptr().cast_mut().cast()) })?;
        // SAFETY: as above.
        check(unsafe { rdma_listen(id.0, BACKLOG) })?;
        Ok(Self { id, channel })
    }

    pub(super) fn port(&self) -> u16 {
        // SAFETY: the id lives.
        u16::from_be(unsafe { rdma_get_src_port(self.id.0) })
    }

    /// The next request for a queue pair.
    ///
    /// # Errors
    /// When the device went away, among others: then this listener hears nothing any more.
    pub(super) async fn request(&self) -> io::Result<Request> {
        loop {
            match self.channel.next().await? {
                Happening::Request(request) => return Ok(request),
                Happening::Other(rdma_cm_event_type::RDMA_CM_EVENT_DEVICE_REMOVAL, _) => {
                    return Err(io::Error::other("the device was removed"));
                }
                Happening::Other(..) => {}
            }
        }
    }
}

/// A client that wants a queue pair. Dropping it refuses.
pub(super) struct Request {
    end: End,
    pub(super) ticket: Ticket,
    /// Reads that it wants to have in progress.
    reads: u8,
}

impl Request {
    /// Tells devices apart.
    pub(super) fn device(&self) -> usize {
        self.end.id.device().map_or(0, |device| device.addr())
    }

    /// Lets it in, into the domain that is found for its end. This end posts nothing: its completion queue stays empty.
    pub(super) fn accept(
        self,
        domain: impl FnOnce(&Arc<End>) -> io::Result<Arc<Domain>>,
    ) -> io::Result<Queue> {
        let (reads, end) = (self.reads, Arc::new(self.end));
        let domain = domain(&end)?;
        let device = end.id.device()?;
        let completions = Completions { watched: None, raw: RawCompletions::new(device, 1, null_mut())? };
        let queue = Queue::new(end, completions, domain, 1)?;
        let limits = attributes(device)?;
        let mut parameters = parameters(&[], limits.max_qp_rd_atom.min(i32::from(reads)), 0);
        // SAFETY: the id is a request that nobody answered.
        check(unsafe { rdma_accept(queue.end.id.0, &mut parameters) })?;
        Ok(queue)
    }

    pub(super) fn refuse(self) {
        // SAFETY: the id is a request that nobody answered. If the refusal cannot be sent, the client waits in vain.
        unsafe { rdma_reject(self.end.id.0, null(), 0) };
    }
}

fn attributes(device: *mut ibv_context) -> io::Result<ibv_device_attr> {
    // SAFETY: plain numbers, for which zero is a value.
    let mut attributes: ibv_device_attr = unsafe { std::mem::zeroed() };
    // SAFETY: the device is open: an id is bound to it.
    check_verbs(unsafe { ibv_query_device(device, &mut attributes) })?;
    Ok(attributes)
}

fn parameters(ticket: &[u8], responds: i32, initiates: i32) -> rdma_conn_param {
    // SAFETY: plain numbers and a pointer, for which zero is a value.
    let mut parameters: rdma_conn_param = unsafe { std::mem::zeroed() };
    parameters.private_data = ticket.as_ptr().cast();
    parameters.private_data_len = ticket.len() as u8;
    parameters.responder_resources = responds.clamp(1, MAX_READS) as u8;
    parameters.initiator_depth = initiates.clamp(0, MAX_READS) as u8;
    parameters.retry_count = RETRIES;
    parameters.rnr_retry_count = RETRIES;
    parameters
}

struct RawCompletions {
    queue: *mut ibv_cq,
    channel: *mut ibv_comp_channel,
}

// SAFETY: libibverbs locks what threads share.
unsafe impl Send for RawCompletions {}
// SAFETY: as above.
unsafe impl Sync for RawCompletions {}

impl RawCompletions {
    fn new(device: *mut ibv_context, depth: i32, channel: *mut ibv_comp_channel) -> io::Result<Self> {
        // SAFETY: the device is open; the channel is null or lives.
        let queue = unsafe { ibv_create_cq(device, depth, null_mut(), channel, 0) };
        match check_pointer(queue) {
            Ok(queue) => Ok(Self { queue, channel }),
            Err(error) => {
                if !channel.is_null() {
                    // SAFETY: nothing uses it.
                    unsafe { ibv_destroy_comp_channel(channel) };
                }
                Err(error)
            }
        }
    }
}

impl Drop for RawCompletions {
    fn drop(&mut self) {
        // SAFETY: the queue pair on it is gone (order in `Queue`), and every event was acknowledged.
        unsafe {
            ibv_destroy_cq(self.queue);
            if !self.channel.is_null() {
                ibv_destroy_comp_channel(self.channel);
            }
        }
    }
}

/// Where work that is done is told.
struct Completions {
    /// Absent at an end that posts nothing.
    watched: Option<AsyncFd<OwnedFd>>,
    raw: RawCompletions,
}

impl Completions {
    fn watched(device: *mut ibv_context) -> io::Result<Self> {
        // SAFETY: the device is open.
        let channel = check_pointer(unsafe { ibv_create_comp_channel(device) })?;
        let raw = RawCompletions::new(device, QUEUE_DEPTH as i32, channel)?;
        // SAFETY: the channel was just made.
        let watched = Some(watch(unsafe { (*channel).fd })?);
        Ok(Self { watched, raw })
    }

    /// One completion, if there is one: the tag of its batch.
    fn poll(&self) -> io::Result<Option<u64>> {
        // SAFETY: plain numbers, for which zero is a value.
        let mut done: ibv_wc = unsafe { std::mem::zeroed() };
        // SAFETY: the queue lives; there is room for one.
        match unsafe { ibv_poll_cq(self.raw.queue, 1, &mut done) } {
            0 => Ok(None),
            1 if done.status == ibv_wc_status::IBV_WC_SUCCESS => Ok(Some(done.wr_id)),
            1 => {
                // SAFETY: the library answers with a constant for any status.
                let text = unsafe { CStr::from_ptr(ibv_wc_status_str(done.status)) };
                let text = format!("the transfer failed: {}", text.to_string_lossy());
                let kind = match done.status {
                    // A key that is no longer good.
                    ibv_wc_status::IBV_WC_REM_ACCESS_ERR => io::ErrorKind::PermissionDenied,
                    _ => io::ErrorKind::Other,
                };
                Err(io::Error::new(kind, text))
            }
            error => Err(io::Error::from_raw_os_error(error.abs())),
        }
    }

    async fn next(&self) -> io::Result<u64> {
        let Some(watched) = &self.watched else { return Err(io::Error::other("nothing is posted here")) };
        loop {
            if let Some(tag) = self.poll()? {
                return Ok(tag);
            }
            // SAFETY: the queue lives.
            check_verbs(unsafe { ibv_req_notify_cq(self.raw.queue, 0) })?;
            // What came before the notification was asked for is not notified.
            if let Some(tag) = self.poll()? {
                return Ok(tag);
            }
            let mut ready = watched.readable().await?;
            let (mut queue, mut context) = (null_mut(), null_mut());
            // SAFETY: the channel lives; both are places for pointers.
            if unsafe { ibv_get_cq_event(self.raw.channel, &mut queue, &mut context) } == 0 {
                // SAFETY: one event was taken, of this queue: it is the only one on the channel.
                unsafe { ibv_ack_cq_events(queue, 1) };
            } else {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::WouldBlock {
                    return Err(error);
                }
                ready.clear_ready();
            }
        }
    }
}

/// Which way bytes go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// From there to here.
    Read,
    /// From here to there.
    Write,
}

/// Bytes to move between registered memory here and there.
#[derive(Clone, Copy)]
pub(super) struct Piece {
    pub(super) way: Way,
    pub(super) local: u64,
    pub(super) remote: u64,
    pub(super) len: u32,
    pub(super) rkey: u32,
}

/// A queue pair that is connected.
pub(super) struct Queue {
    completions: Completions,
    end: Arc<End>,
    domain: Arc<Domain>,
    /// Batches that were posted and not yet told done.
    posted: u32,
    /// Where the device puts what is read; kept longer than the queue pair.
    buffers: Vec<Arc<Region>>,
}

impl Queue {
    fn new(end: Arc<End>, completions: Completions, domain: Arc<Domain>, depth: u32) -> io::Result<Self> {
        // SAFETY: plain numbers and pointers, for which zero is a value.
        let mut wanted: ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        wanted.send_cq = completions.raw.queue;
        wanted.recv_cq = completions.raw.queue;
        wanted.qp_type = ibv_qp_type::IBV_QPT_RC;
        wanted.cap = ibv_qp_cap {
            max_send_wr: depth,
            max_recv_wr: 1,
            max_send_sge: 1,
            max_recv_sge: 1,
            max_inline_data: 0,
        };
        // SAFETY: id, domain and completion queue live, on one device.
        check(unsafe { rdma_create_qp(end.id.0, domain.raw, &mut wanted) })?;
        Ok(Self { completions, end, domain, posted: 0, buffers: Vec::new() })
    }

    /// Connects to a server that knows the ticket.
    pub(super) async fn connect(address: SocketAddr, ticket: Ticket) -> io::Result<Self> {
        let channel = Channel::new()?;
        let id = Id::new(&channel)?;
        let address = SockAddr::from(address);
        // SAFETY: the id lives; the library copies the address.
        check(unsafe {
            rdma_resolve_addr(id.0, null_mut(), address.as_ptr().cast_mut().cast(), RESOLVE_MS)
        })?;
        channel.await_event(rdma_cm_event_type::RDMA_CM_EVENT_ADDR_RESOLVED).await?;
        let mut timeout = ACK_TIMEOUT;
        // SAFETY: the id lives; the option is one byte. A library that does not know it has its own timeout.
        unsafe {
            let value = (&raw mut timeout).cast();
            rdma_set_option(id.0, RDMA_OPTION_ID, RDMA_OPTION_ID_ACK_TIMEOUT, value, 1);
        }
        // SAFETY: the id lives and has an address.
        check(unsafe { rdma_resolve_route(id.0, RESOLVE_MS) })?;
        channel.await_event(rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_RESOLVED).await?;
        let queue = aside(move || Self::call(End { id, channel }, &ticket)).await?;
        queue.end.channel.await_event(rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED).await?;
        Ok(queue)
    }

    /// Asks the other side to let this end in.
    fn call(end: End, ticket: &Ticket) -> io::Result<Self> {
        let end = Arc::new(end);
        let device = end.id.device()?;
        let limits = attributes(device)?;
        let domain = Arc::new(end.domain()?);
        let queue = Self::new(end, Completions::watched(device)?, domain, QUEUE_DEPTH)?;
        let mut parameters = parameters(ticket, 1, limits.max_qp_init_rd_atom);
        // SAFETY: the id lives, has a route and a queue pair; the library copies the ticket.
        check(unsafe { rdma_connect(queue.end.id.0, &mut parameters) })?;
        Ok(queue)
    }

    pub(super) fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// Moves pieces, in their order, with one doorbell; [`Self::done`] tells the tag when all are. At most two batches may be on their way.
    ///
    /// # Errors
    /// When a piece is outside the buffer, or the device refuses; then the queue pair is of no use any more.
    pub(super) fn post(&mut self, buffer: &Arc<Region>, pieces: &[Piece], tag: u64) -> io::Result<()> {
        let inside = |piece: &Piece| piece.local.saturating_add(u64::from(piece.len)) <= buffer.bytes();
        if pieces.is_empty() || pieces.len() > MAX_PIECES + 1 || !pieces.iter().all(inside) {
            return Err(io::Error::other("a batch that is empty, too long or outside its buffer"));
        }
        if !self.buffers.iter().any(|known| Arc::ptr_eq(known, buffer)) {
            self.buffers.push(buffer.clone());
        }
        let part = |piece: &Piece| ibv_sge { addr: piece.local, length: piece.len, lkey: buffer.lkey() };
        let mut parts: Vec<ibv_sge> = pieces.iter().map(part).collect();
        let request = |(piece, part): (&Piece, &mut ibv_sge)| {
            // SAFETY: plain numbers and pointers, for which zero is a value.
            let mut request: ibv_send_wr = unsafe { std::mem::zeroed() };
            request.sg_list = part;
            request.num_sge = 1;
            request.wr_id = tag;
            request.opcode = match piece.way {
                Way::Read => ibv_wr_opcode::IBV_WR_RDMA_READ,
                Way::Write => ibv_wr_opcode::IBV_WR_RDMA_WRITE,
            };
            request.wr.rdma = rdma_t { remote_addr: piece.remote, rkey: piece.rkey };
            request
        };
        let mut requests: Vec<ibv_send_wr> = pieces.iter().zip(&mut parts).map(request).collect();
        // Work of one queue pair completes in order: the last one tells of all.
        if let Some(last) = requests.last_mut() {
            last.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        }
        let first = requests.as_mut_ptr();
        for i in 1..requests.len() {
            // SAFETY: both are inside the list.
            unsafe { (*first.add(i - 1)).next = first.add(i) };
        }
        let mut refused = null_mut();
        // SAFETY: the queue pair lives, and the list until the call ends. What the device writes to is kept by `self.buffers` until
        // after the queue pair is destroyed, and lies inside.
        check_verbs(unsafe { ibv_post_send((*self.end.id.0).qp, first, &mut refused) })?;
        self.posted += 1;
        Ok(())
    }

    /// The tag of the next batch that is done.
    pub(super) async fn done(&mut self) -> io::Result<u64> {
        let tag = self.completions.next().await?;
        self.posted -= 1;
        Ok(tag)
    }

    /// Whether nothing is on its way.
    pub(super) fn is_idle(&self) -> bool {
        self.posted == 0
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: the id lives and has a queue pair. After this the device touches none of its memory. Whether the other end hears of it
        // makes no difference here.
        unsafe {
            rdma_disconnect(self.end.id.0);
            rdma_destroy_qp(self.end.id.0);
        }
    }
}
