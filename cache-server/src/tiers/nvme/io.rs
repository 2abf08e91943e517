//! Moving bytes between memory and files. An engine takes requests and answers each exactly once; the memory of a request
//! belongs to it until then, whatever becomes of the one who asked.

use crate::tiers::host::{SlotBytes, SlotWriter};
use std::fs::File;
use std::io;
use std::sync::Arc;
use tokio::sync::oneshot;

/// What direct IO needs of addresses, offsets and lengths.
pub(crate) const ALIGN: usize = cairn_core::PAGE_BYTES as usize;

/// One aligned page of memory.
#[derive(Clone)]
#[repr(align(4096))]
#[expect(dead_code, reason = "only seen as bytes, through pointers")]
struct Page([u8; ALIGN]);

/// Aligned memory of its own.
#[derive(Clone)]
pub(crate) struct Pages {
    pages: Vec<Page>,
}

impl Pages {
    /// Zeros.
    pub(crate) fn new(count: usize) -> Self {
        Self { pages: vec![Page([0; ALIGN]); count] }
    }

    /// Enough for so many bytes.
    pub(crate) fn for_bytes(bytes: u64) -> Self {
        Self::new((bytes as usize).div_ceil(ALIGN))
    }

    /// The bytes, as pages.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Self {
        let mut pages = Self::for_bytes(bytes.len() as u64);
        pages.as_mut()[..bytes.len()].copy_from_slice(bytes);
        pages
    }
}

impl AsRef<[u8]> for Pages {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: pages are plain bytes, one after the other without gaps (their size is their alignment).
        unsafe { std::slice::from_raw_parts(self.pages.as_ptr().cast(), self.pages.len() * ALIGN) }
    }
}

impl AsMut<[u8]> for Pages {
    fn as_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the borrow is unique.
        unsafe { std::slice::from_raw_parts_mut(self.pages.as_mut_ptr().cast(), self.pages.len() * ALIGN) }
    }
}

/// Memory that a request reads from or writes to.
pub(crate) enum Memory {
    /// Bytes of a block, only read.
    Block(SlotBytes),
    /// A host slot, written.
    Slot(SlotWriter),
    /// A buffer.
    Pages(Pages),
}

impl Memory {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Block(bytes) => bytes.padded_len(),
            Self::Slot(writer) => writer.padded_len(),
            Self::Pages(pages) => pages.as_ref().len(),
        }
    }

    /// First byte, for the engine.
    pub(super) fn pointer(&self) -> *mut u8 {
        match self {
            Self::Block(bytes) => bytes.pointer(),
            Self::Slot(writer) => writer.pointer(),
            Self::Pages(pages) => pages.as_ref().as_ptr().cast_mut(),
        }
    }

    /// The arena chunk it is in.
    pub(super) fn chunk(&self) -> Option<u32> {
        match self {
            Self::Block(bytes) => Some(bytes.chunk()),
            Self::Slot(writer) => Some(writer.chunk()),
            Self::Pages(_) => None,
        }
    }

    fn writable(&self) -> bool {
        !matches!(self, Self::Block(_))
    }

    /// All of it.
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: the range is mapped for the life of `self`. Blocks do not change; slots and buffers are written only
        // through `self`, which is borrowed here.
        unsafe { std::slice::from_raw_parts(self.pointer(), self.len()) }
    }

    /// All of it, unless it is a block.
    pub(crate) fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        // SAFETY: as above; only this request may write here, and `self` is borrowed uniquely.
        self.writable().then(|| unsafe { std::slice::from_raw_parts_mut(self.pointer(), self.len()) })
    }
}

/// What to do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Fill the memory.
    Read,
    /// Write the memory.
    Write,
    /// Make everything written durable.
    Sync,
    /// Take room on the file system for the first bytes of the file.
    Allocate(u64),
    /// Give room back to the file system.
    Punch(u64),
}

/// One request.
pub(crate) struct Request {
    pub(crate) operation: Operation,
    pub(crate) file: Arc<File>,
    pub(crate) offset: u64,
    pub(crate) memory: Memory,
}

/// A request that ended.
pub(crate) struct Done {
    pub(crate) memory: Memory,
    pub(crate) result: io::Result<()>,
}

/// A request on its way.
pub(crate) struct Job {
    pub(crate) request: Request,
    pub(crate) answer: oneshot::Sender<Done>,
}

/// Something that carries out requests.
pub(crate) trait Engine: Send + Sync {
    /// Takes a request; it is answered later, or at once when it cannot be taken.
    fn submit(&self, job: Job);

    /// For people.
    fn name(&self) -> &'static str;
}

/// Carries out one request.
pub(crate) async fn perform(engine: &dyn Engine, request: Request) -> (Option<Memory>, io::Result<()>) {
    let (answer, done) = oneshot::channel();
    engine.submit(Job { request, answer });
    match done.await {
        Ok(Done { memory, result }) => (Some(memory), result),
        Err(_) => (None, Err(io::Error::other("the IO engine ended"))),
    }
}

/// The answer to a request that was not carried out.
pub(super) fn refuse(job: Job, error: io::Error) {
    // Nobody waits: nothing to tell.
    let _ = job.answer.send(Done { memory: job.request.memory, result: Err(error) });
}

/// A transfer that moved less than it should.
pub(super) fn short(operation: Operation, moved: usize, wanted: usize) -> io::Error {
    let kind = match operation {
        Operation::Read => io::ErrorKind::UnexpectedEof,
        _ => io::ErrorKind::WriteZero,
    };
    io::Error::new(kind, format!("{moved} of {wanted} bytes moved"))
}
