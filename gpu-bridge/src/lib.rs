//! Bytes on or beside the device: devices, streams, events, batched copies, and the block pool of a worker.
//!
//! [`Device`] is implemented by [`HostDevice`] (host memory as device; everything above is built and tested with it) and by
//! [`backend::cuda::CudaDevice`], where there is a card. It is shaped after what CUDA offers: streams run in order and beside each other, events are awaitable completions,
//! copies come in batches, and memory stays alive until the last copy that names it has ended. Every implementation
//! passes [`conformance::run`].

#![deny(unsafe_code)]

pub mod backend;
pub mod conformance;
mod device;
mod event;
mod pool;

pub use backend::host::{HostDevice, HostMemory, HostPinned, HostStream};
pub use cairn_kernels::{KvType, PagedShape, Slot};
pub use device::{BlockMove, Buffer, Copy, Device, DeviceError, Priority, Region, Stream};
pub use event::Event;
pub use pool::BlockPool;
