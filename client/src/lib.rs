//! The Rust client of a cache server.
//!
//! Its promise to the model above it: a dead, slow or lying server costs a miss within the deadline, never a hang, never
//! an error, never a wrong byte. So [`CacheClient::lookup`], [`CacheClient::fetch`] and [`CacheClient::publish`] return
//! outcomes, not results. What an operator asks ([`CacheClient::explain`], [`CacheClient::stats`]) returns results.

#![forbid(unsafe_code)]

mod admin;
mod client;
mod connection;
mod fetch;
mod lease;
mod lookup;
mod options;
mod publish;
mod read;
mod view;
mod wires;

pub use cairn_transfer::store::{GpuChunk, GpuUuid, Reach};
pub use cairn_transfer::{HAS_RDMA, QuicOptions, WireKind, rdma_addresses};
pub use client::{CacheClient, ClientError};
pub use fetch::Fetched;
pub use lease::Lease;
pub use lookup::{Lookup, Run};
pub use options::{ClientOptions, Security};
pub use publish::{Block, Stored};
pub use view::View;
pub use wires::WireReport;
