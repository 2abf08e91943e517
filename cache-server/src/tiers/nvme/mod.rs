//! The NVMe tier: directories that each hold a bounded log of segment files. What is written where is the core's business;
//! here is how bytes get there and back, and how a directory is read after a stop.

mod cipher;
mod device;
pub mod fault;
pub mod format;
mod identity;
mod io;
mod pool;
mod recover;
mod store;
mod survey;
mod uring;

pub use cipher::KEY_BYTES;
pub(crate) use device::{Device, ReadError};
pub use device::{DeviceError, DeviceOptions, METADATA_BYTES};
pub(crate) use io::{Engine, Memory, Pages};
pub(crate) use pool::Pool;
pub use recover::Dropped;
pub(crate) use recover::{Segment, read_segment};
pub use store::Store;
pub use survey::{Depth, SpaceSurvey, Survey, survey};
pub(crate) use uring::Uring;
pub use uring::io_uring_works;
