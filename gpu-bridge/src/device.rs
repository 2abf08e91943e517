//! What a device is.

use crate::Event;
use cairn_kernels::PagedShape;
use thiserror::Error;

/// A device operation that failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum DeviceError {
    /// No memory of that size is left.
    #[error("the device cannot give {bytes} bytes")]
    OutOfMemory {
        /// What was asked for.
        bytes: usize,
    },
    /// A region reaches past its buffer.
    #[error("bytes {offset}..{end} are outside a buffer of {len} bytes")]
    OutOfBounds {
        /// First byte.
        offset: usize,
        /// One past the last byte.
        end: usize,
        /// Size of the buffer.
        len: usize,
    },
    /// The two sides of a copy differ in size.
    #[error("a copy of {from} bytes into {to} bytes")]
    SizeMismatch {
        /// Bytes of the source.
        from: usize,
        /// Bytes of the target.
        to: usize,
    },
    /// A call that the device or its driver refused; what was there before is as it was.
    #[error("{0}")]
    Failed(String),
    /// The device or its stream is gone; everything on it is lost.
    #[error("the device is lost: {0}")]
    Lost(String),
}

/// How urgent a stream's work is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Priority {
    /// Something waits for it now.
    Foreground,
    /// It may give way.
    Background,
}

/// A device and the memory beside it.
pub trait Device: Send + Sync + 'static {
    /// A handle to device memory; clones share it, and the memory is freed with the last one.
    type Memory: Clone + Send + Sync + 'static;
    /// Host memory that the device copies from and to directly, owned by one holder who may read and write it.
    type PinnedBuffer: AsRef<[u8]> + AsMut<[u8]> + Send + Sync + 'static;
    /// The same memory while copies may be using it: shared, and out of the CPU's reach.
    type Pinned: Clone + Send + Sync + 'static;
    /// A stream of this device.
    type Stream: Stream<Device = Self>;

    /// For logs and tables.
    fn name(&self) -> String;

    /// Zeroed device memory.
    ///
    /// # Errors
    /// When there is not enough.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory, DeviceError>;

    /// Zeroed pinned memory.
    ///
    /// # Errors
    /// When there is not enough.
    fn allocate_pinned(&self, bytes: usize) -> Result<Self::PinnedBuffer, DeviceError>;

    /// Hands pinned memory to copies.
    fn share(&self, buffer: Self::PinnedBuffer) -> Self::Pinned;

    /// Takes pinned memory back.
    ///
    /// # Errors
    /// Gives the handle back while another handle, or a copy in progress, has the memory.
    fn reclaim(&self, pinned: Self::Pinned) -> Result<Self::PinnedBuffer, Self::Pinned>;

    /// A new stream.
    ///
    /// # Errors
    /// When the device has no more.
    fn stream(&self, priority: Priority) -> Result<Self::Stream, DeviceError>;
}

/// Device or pinned memory of device `D`.
pub enum Buffer<D: Device + ?Sized> {
    /// On the device.
    Device(D::Memory),
    /// Beside it.
    Pinned(D::Pinned),
}

impl<D: Device + ?Sized> Clone for Buffer<D> {
    fn clone(&self) -> Self {
        match self {
            Self::Device(memory) => Self::Device(memory.clone()),
            Self::Pinned(pinned) => Self::Pinned(pinned.clone()),
        }
    }
}

/// Consecutive bytes of a buffer.
pub struct Region<D: Device + ?Sized> {
    /// Of this buffer.
    pub buffer: Buffer<D>,
    /// From here.
    pub offset: usize,
    /// This many.
    pub bytes: usize,
}

/// One copy of a batch.
pub struct Copy<D: Device + ?Sized> {
    /// From here.
    pub source: Region<D>,
    /// To here; of equal size and not overlapping.
    pub target: Region<D>,
}

/// A canonical block in a staging buffer and the pool slot that it belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockMove {
    /// First byte in the staging buffer.
    pub staging_offset: usize,
    /// Slot of the pool.
    pub slot: usize,
}

/// A queue of work that runs in order. Dropping it lets what was issued finish.
pub trait Stream: Send + Sync + 'static {
    /// Whose stream it is.
    type Device: Device;

    /// Issues a batch of copies. They may run in any order among themselves.
    ///
    /// # Errors
    /// When a region does not fit; nothing is issued then. Failures while copying are reported by the next event.
    fn copy(&self, copies: Vec<Copy<Self::Device>>) -> Result<(), DeviceError>;

    /// Issues the re-laying of canonical blocks into pool slots.
    ///
    /// # Errors
    /// When a block does not fit; nothing is issued then.
    fn scatter(
        &self,
        shape: PagedShape,
        staging: &Buffer<Self::Device>,
        pool: &<Self::Device as Device>::Memory,
        moves: Vec<BlockMove>,
    ) -> Result<(), DeviceError>;

    /// Issues the inverse of [`Self::scatter`].
    ///
    /// # Errors
    /// When a block does not fit; nothing is issued then.
    fn gather(
        &self,
        shape: PagedShape,
        pool: &<Self::Device as Device>::Memory,
        staging: &Buffer<Self::Device>,
        moves: Vec<BlockMove>,
    ) -> Result<(), DeviceError>;

    /// An event that completes when everything issued before it has ended.
    ///
    /// # Errors
    /// When the stream is lost.
    fn record(&self) -> Result<Event, DeviceError>;

    /// Lets later work on this stream wait for an event of any stream.
    ///
    /// # Errors
    /// When the stream is lost.
    fn wait(&self, event: &Event) -> Result<(), DeviceError>;
}
