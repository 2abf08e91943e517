//! Where block bytes are. Which block is where is the core's business.

mod host;

pub use host::{ArenaError, HostArena, SlotBytes, SlotWriter};
