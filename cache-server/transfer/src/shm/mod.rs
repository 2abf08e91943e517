//! Shared memory: the server's chunks are memory files that a client maps and reads itself, so that a fetch costs the server no
//! byte copy and, once the chunks are mapped, no message either. A Unix socket carries lookups, descriptors and pins.
//!
//! A client gets only chunks that hold blocks it has a lease on, mapped for reading; the files are sealed, so that it cannot get
//! write access in any other way. It publishes from staging memory of its own, from which the server copies and checks in one pass.

mod client;
mod fds;
mod server;

pub use client::{Pinned, ShmWire};
pub use server::{ShmServer, ShmServerError, sweep};

/// Offers of one publish that wait to be copied; more than fit the staging memory are pointless.
const MAX_OFFERS: usize = 64;
