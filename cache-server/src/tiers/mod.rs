//! Where block bytes are. Which block is where is the core's business.

pub(crate) mod gpu;
pub(crate) mod host;
pub mod nvme;

pub use host::{ArenaError, HostArena, SlotBytes, SlotWriter};
