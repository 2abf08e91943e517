//! The fast engine: one thread with an io_uring. Requests arrive through a bounded channel; an eventfd that the ring itself
//! reads wakes the thread. Chunks of the host arena are registered once they are in memory, so that the kernel need
//! not look up their pages for every request.

use super::io::{Done, Engine, Job, Operation, refuse, short};
use super::pool::{allocate, punch};
use crate::tiers::host::HostArena;
use io_uring::{IoUring, opcode, squeue, types};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use slab::Slab;
use std::collections::HashSet;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, sync_channel};

/// Requests in the ring at a time.
const DEPTH: u32 = 128;

/// Requests waiting at a time; callers bound theirs well below.
const QUEUE: usize = 1024;

/// Marks the ring's own read of the wake-up descriptor.
const WAKE: u64 = u64::MAX;

/// See the head of this file.
pub(crate) struct Uring {
    jobs: Option<SyncSender<Job>>,
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    wake: OwnedFd,
    /// The thread will look at the channel again before it sleeps.
    awake: AtomicBool,
    /// Chunks of the arena that are in memory for good, and so may be registered.
    ready_chunks: AtomicU64,
}

/// Whether the kernel lets this process use it, with all that the tier needs.
///
/// # Errors
/// When the kernel refuses (too old, or forbidden).
pub fn io_uring_works() -> io::Result<()> {
    let ring = IoUring::builder().setup_single_issuer().build(DEPTH).or_else(|_| IoUring::new(DEPTH))?;
    let mut probe = io_uring::Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE];
    match needed.iter().all(|code| probe.is_supported(*code)) {
        true => Ok(()),
        false => Err(io::ErrorKind::Unsupported.into()),
    }
}

impl Uring {
    /// Starts the thread. It ends when the engine is dropped and all its requests are answered.
    ///
    /// # Errors
    /// When the kernel refuses (too old, or forbidden).
    pub(crate) fn start(arena: Arc<HostArena>) -> io::Result<Self> {
        io_uring_works()?;
        let (jobs, queue) = sync_channel(QUEUE);
        let shared = Arc::new(Shared {
            wake: eventfd(0, EventfdFlags::CLOEXEC)?,
            awake: AtomicBool::new(false),
            ready_chunks: AtomicU64::new(0),
        });
        let of_thread = shared.clone();
        let run = move || match Ring::new(queue, of_thread, arena) {
            Ok(mut ring) => ring.run(),
            Err(error) => tracing::error!(%error, "io_uring cannot be set up"),
        };
        let thread = std::thread::Builder::new().name("cairn-uring".into()).spawn(run)?;
        Ok(Self { jobs: Some(jobs), shared, thread: Some(thread) })
    }

    /// The first `count` chunks of the arena are in memory for good.
    pub(crate) fn chunks_ready(&self, count: u64) {
        self.shared.ready_chunks.store(count, Ordering::Release);
    }
}

impl Shared {
    fn wake(&self) {
        if !self.awake.swap(true, Ordering::AcqRel) {
            // Fails only when the counter is full, and then the thread is awake.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }
}

impl Engine for Uring {
    fn submit(&self, job: Job) {
        let Some(jobs) = &self.jobs else { return };
        match jobs.try_send(job) {
            Ok(()) => self.shared.wake(),
            Err(TrySendError::Full(job)) => refuse(job, io::ErrorKind::WouldBlock.into()),
            Err(TrySendError::Disconnected(job)) => refuse(job, io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn name(&self) -> &'static str {
        "io_uring"
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.jobs = None;
        // Whatever the thread is doing: it reads this, finds the channel closed, and ends.
        let _ = rustix::io::write(&self.shared.wake, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            // The last owner may have been memory of a request, dropped by the thread itself.
            && thread.thread().id() != std::thread::current().id()
        {
            // The thread does not panic; if it did, there is nothing left to wait for.
            let _ = thread.join();
        }
    }
}

struct Ring {
    ring: IoUring,
    queue: Receiver<Job>,
    shared: Arc<Shared>,
    arena: Arc<HostArena>,
    going: Slab<Job>,
    /// Chunks registered; `None` when the kernel refuses to.
    registered: Option<u64>,
    /// Chunks whose memory is another one since.
    replaced: HashSet<u32>,
    /// Where the kernel puts the counter of the wake-up descriptor.
    woken: Box<[u8; 8]>,
    listening: bool,
    ending: bool,
}

impl Ring {
    fn new(queue: Receiver<Job>, shared: Arc<Shared>, arena: Arc<HostArena>) -> io::Result<Self> {
        let ring = IoUring::builder().setup_single_issuer().build(DEPTH).or_else(|_| IoUring::new(DEPTH))?;
        let sparse = ring.submitter().register_buffers_sparse(arena.chunk_count());
        if let Err(error) = &sparse {
            tracing::info!(%error, "buffers cannot be registered with io_uring; it works without, at more CPU");
        }
        Ok(Self {
            ring,
            queue,
            shared,
            arena,
            going: Slab::new(),
            registered: sparse.is_ok().then_some(0),
            replaced: HashSet::new(),
            woken: Box::new([0; 8]),
            listening: false,
            ending: false,
        })
    }

    fn run(&mut self) {
        loop {
            self.register();
            self.take_jobs();
            if self.ending && self.going.is_empty() && !self.listening {
                return;
            }
            self.listen();
            if let Err(error) = self.ring.submit_and_wait(1) {
                let again = [Errno::INTR, Errno::BUSY, Errno::AGAIN, Errno::NOMEM];
                if !again.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error())) {
                    // The kernel may still write to memory of requests that nobody could wait for any more.
                    tracing::error!(%error, "io_uring failed with requests in progress; ending");
                    std::process::abort();
                }
            }
            self.reap();
        }
    }

    /// Whether a registered chunk still has the memory that was registered. The memory of one that does not is let go; its
    /// new memory is used without being registered.
    fn is_current(&mut self, chunk: u32) -> bool {
        if self.arena.generation(chunk) == 1 {
            return true;
        }
        if self.replaced.insert(chunk) {
            let nothing = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
            // SAFETY: an empty range takes the place of the old memory, which the kernel keeps until requests on it end.
            let result = unsafe { self.ring.submitter().register_buffers_update(chunk, &[nothing], None) };
            if let Err(error) = result {
                tracing::info!(%error, chunk, "memory that was replaced stays registered with io_uring");
            }
        }
        false
    }

    /// Registers chunks that are in memory since the last time.
    fn register(&mut self) {
        let ready = self.shared.ready_chunks.load(Ordering::Acquire);
        while let Some(chunk) = self.registered.filter(|done| *done < ready) {
            let (pointer, len) = self.arena.chunk_range(chunk as u32);
            let range = libc::iovec { iov_base: pointer.cast(), iov_len: len };
            // SAFETY: the range is the whole mapping of a chunk. It stays mapped as long as `self.arena`, which is dropped after
            // the ring (fields are dropped in order).
            let result =
                unsafe { self.ring.submitter().register_buffers_update(chunk as u32, &[range], None) };
            self.registered = match result {
                Ok(_) => Some(chunk + 1),
                Err(error) => {
                    tracing::info!(%error, "no more buffers can be registered with io_uring: is RLIMIT_MEMLOCK too low?");
                    None
                }
            };
        }
    }

    /// Keeps one read of the wake-up descriptor in the ring.
    fn listen(&mut self) {
        if self.listening || self.ending {
            return;
        }
        let fd = types::Fd(self.shared.wake.as_raw_fd());
        let read = opcode::Read::new(fd, self.woken.as_mut_ptr(), 8).build().user_data(WAKE);
        self.listening = self.push(&read);
    }

    fn take_jobs(&mut self) {
        loop {
            while self.going.len() < DEPTH as usize - 1 {
                match self.queue.try_recv() {
                    Ok(job) => self.start(job),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        self.ending = true;
                        return;
                    }
                }
            }
            if self.going.len() >= DEPTH as usize - 1 {
                // Completions come first; the channel is looked at after them.
                return;
            }
            // From here on a sender wakes the ring; one that came just before is found by looking once more.
            self.shared.awake.store(false, Ordering::SeqCst);
            match self.queue.try_recv() {
                Ok(job) => {
                    self.shared.awake.store(true, Ordering::SeqCst);
                    self.start(job);
                }
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.ending = true;
                    return;
                }
            }
        }
    }

    fn start(&mut self, job: Job) {
        let request = &job.request;
        let fd = types::Fd(request.file.as_raw_fd());
        let pointer = request.memory.pointer();
        let Ok(len) = u32::try_from(request.memory.len()) else {
            return refuse(job, io::ErrorKind::InvalidInput.into());
        };
        let registered = self.registered.unwrap_or(0);
        let fixed = request.memory.chunk().filter(|chunk| u64::from(*chunk) < registered);
        let fixed = fixed.filter(|chunk| self.is_current(*chunk));
        let fixed = fixed.and_then(|chunk| u16::try_from(chunk).ok());
        let entry = match (request.operation, fixed) {
            (Operation::Read, None) => opcode::Read::new(fd, pointer, len).offset(request.offset).build(),
            (Operation::Read, Some(index)) => {
                opcode::ReadFixed::new(fd, pointer, len, index).offset(request.offset).build()
            }
            (Operation::Write, None) => opcode::Write::new(fd, pointer, len).offset(request.offset).build(),
            (Operation::Write, Some(index)) => {
                opcode::WriteFixed::new(fd, pointer, len, index).offset(request.offset).build()
            }
            (Operation::Allocate(bytes), _) => opcode::Fallocate::new(fd, bytes).build(),
            (Operation::Punch(bytes), _) => {
                let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                opcode::Fallocate::new(fd, bytes).mode(mode.bits() as i32).build()
            }
            (Operation::Sync, _) => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        };
        let key = self.going.insert(job);
        if !self.push(&entry.user_data(key as u64)) {
            refuse(self.going.remove(key), io::ErrorKind::WouldBlock.into());
        }
    }

    fn push(&mut self, entry: &squeue::Entry) -> bool {
        for _ in 0..2 {
            // SAFETY: the entry's memory and file are owned by a job in `going` (or are `woken` and `wake`, owned by `self`)
            // until the completion was reaped.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                return true;
            }
            if self.ring.submit().is_err() {
                return false;
            }
        }
        false
    }

    fn reap(&mut self) {
        for completion in self.ring.completion() {
            if completion.user_data() == WAKE {
                self.listening = false;
                continue;
            }
            let Some(Job { request, answer }) = self.going.try_remove(completion.user_data() as usize) else {
                continue;
            };
            let (operation, wanted) = (request.operation, request.memory.len());
            let result = match usize::try_from(completion.result()) {
                Err(_) => {
                    let error = io::Error::from_raw_os_error(-completion.result());
                    otherwise(operation, &request.file, error)
                }
                Ok(_) if !matches!(operation, Operation::Read | Operation::Write) => Ok(()),
                Ok(moved) if moved == wanted => Ok(()),
                Ok(moved) => Err(short(operation, moved, wanted)),
            };
            // Nobody waits: nothing to tell.
            let _ = answer.send(Done { memory: request.memory, result });
        }
    }
}

/// What file systems may lack has a substitute; anything else stays an error.
fn otherwise(operation: Operation, file: &std::fs::File, error: io::Error) -> io::Result<()> {
    let lacking = [rustix::io::Errno::OPNOTSUPP, rustix::io::Errno::NOSYS, rustix::io::Errno::INVAL];
    let lacking = lacking.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()));
    match operation {
        Operation::Allocate(bytes) if lacking => allocate(file, bytes),
        Operation::Punch(bytes) if lacking => punch(file, bytes),
        _ => Err(error),
    }
}
