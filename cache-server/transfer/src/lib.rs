//! Both ends of every wire that moves block bytes, side by side, so that they change together.
//!
//! A client's end is a [`Wire`]; a server's end serves a [`Store`]. Whatever the wire, a block that arrives is put together by
//! [`Arrivals`] (at a client) or [`Receiving`] (at a server), which check order, size and checksum.

mod arrivals;
pub mod choose;
pub mod copy;
mod frame;
mod grpc;
mod handshake;
mod incoming;
mod mem;
mod pack;
mod pool;
pub mod quic;
pub mod shm;
pub mod store;
mod stream;
pub mod tls;
mod wire;

pub use arrivals::{Arrival, Arrivals, Progress, Promise};
pub use grpc::{Api, Bearer, GrpcWire};
pub use incoming::{Incoming, PieceError};
pub use mem::MemWire;
pub use pack::{Pack, pack};
pub use quic::{QuicOptions, QuicServer, QuicWire};
pub use shm::{ShmServer, ShmServerError, ShmWire};
pub use store::{Receiving, Store};
pub use tls::TlsWire;
pub use wire::{FetchJob, Offer, PublishJob, Wire, WireKind};

/// Names the protocol of data connections in TLS handshakes.
pub const ALPN: &[u8] = b"cairn-data/1";
