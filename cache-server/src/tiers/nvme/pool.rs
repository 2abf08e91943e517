//! The portable engine: threads that read and write at offsets.

use super::io::{Done, Engine, Job, Memory, Operation, Request, refuse, short};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

/// Requests in progress at a time.
const THREADS: usize = 8;

/// Requests waiting at a time; callers bound theirs well below.
const QUEUE: usize = 1024;

/// See the head of this file.
pub(crate) struct Pool {
    jobs: SyncSender<Job>,
}

impl Pool {
    /// Starts the threads. They end when the pool is dropped and all its requests are answered.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(crate) fn start() -> io::Result<Self> {
        let (jobs, queue) = sync_channel(QUEUE);
        let queue = Arc::new(Mutex::new(queue));
        for i in 0..THREADS {
            let queue = queue.clone();
            std::thread::Builder::new().name(format!("cairn-io-{i}")).spawn(move || work(&queue))?;
        }
        Ok(Self { jobs })
    }
}

impl Engine for Pool {
    fn submit(&self, job: Job) {
        match self.jobs.try_send(job) {
            Ok(()) => {}
            Err(TrySendError::Full(job)) => refuse(job, io::ErrorKind::WouldBlock.into()),
            Err(TrySendError::Disconnected(job)) => refuse(job, io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn name(&self) -> &'static str {
        "threads"
    }
}

fn work(queue: &Mutex<Receiver<Job>>) {
    loop {
        let next = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { request, answer }) = next else { return };
        let Request { operation, file, offset, mut memory } = request;
        let result = match operation {
            Operation::Sync => file.sync_data(),
            Operation::Write => file.write_all_at(memory.bytes(), offset),
            Operation::Read => read(&file, offset, &mut memory),
            Operation::Allocate(bytes) => allocate(&file, bytes),
            Operation::Punch(bytes) => punch(&file, bytes),
        };
        // Nobody waits: nothing to tell.
        let _ = answer.send(Done { memory, result });
    }
}

/// File systems without allocation get the room by writing.
pub(super) fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(bytes),
        result => Ok(result?),
    }
}

/// File systems without holes keep the room, for the next use of the file.
pub(super) fn punch(file: &File, bytes: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 0, bytes) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        result => Ok(result?),
    }
}

fn read(file: &File, offset: u64, memory: &mut Memory) -> io::Result<()> {
    let wanted = memory.len();
    let Some(bytes) = memory.bytes_mut() else {
        return Err(short(Operation::Read, 0, wanted));
    };
    file.read_exact_at(bytes, offset)
}
