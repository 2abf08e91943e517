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
mod located;
mod map;
mod mem;
mod pack;
mod pool;
pub mod quic;
#[cfg(feature = "rdma")]
pub mod rdma;
#[cfg(not(feature = "rdma"))]
#[path = "no_rdma.rs"]
pub mod rdma;
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
pub use rdma::RdmaServer;
#[cfg(feature = "rdma")]
pub use rdma::RdmaWire;
pub use shm::{ShmServer, ShmServerError, ShmWire};
pub use store::{Receiving, Store};
pub use tls::TlsWire;
pub use wire::{FetchJob, Following, Found, Offer, PublishJob, Reader, Wire, WireKind};

/// Whether this build has RDMA.
pub const HAS_RDMA: bool = cfg!(feature = "rdma");

/// IPv4 addresses of this machine's RDMA devices: those in their GID tables, mapped to IPv6, as RoCE has them.
pub fn rdma_addresses() -> Vec<std::net::Ipv4Addr> {
    let entries = |path: &std::path::Path| std::fs::read_dir(path).into_iter().flatten().flatten();
    let devices = entries("/sys/class/infiniband".as_ref());
    let ports = devices.flat_map(|device| entries(&device.path().join("ports")).collect::<Vec<_>>());
    let gids = ports.flat_map(|port| entries(&port.path().join("gids")).collect::<Vec<_>>());
    let address = |gid: std::fs::DirEntry| {
        let text = std::fs::read_to_string(gid.path()).ok()?;
        text.trim().parse::<std::net::Ipv6Addr>().ok()?.to_ipv4_mapped()
    };
    let mut addresses: Vec<_> = gids.filter_map(address).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

/// Names the protocol of data connections in TLS handshakes.
pub const ALPN: &[u8] = b"cairn-data/1";
