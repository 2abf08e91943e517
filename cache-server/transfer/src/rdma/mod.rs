//! RDMA: a client reads blocks out of the server's chunks, and writes what it publishes into staging memory of its own at the
//! server, with one-sided verbs over a reliable connection (RC). The server's CPU moves no byte of a fetch.
//!
//! A TLS data connection comes first and stays: it proves who the client is, carries lookups, places and keys, and hands out a
//! ticket that lets one queue pair in. Block bytes on the fabric are not encrypted.
//!
//! What a client can reach is bounded by the protection domain of its tenant: chunks of that tenant, for reading, registered
//! when a client with a lease asks for them and until they get other memory; and staging memory, for writing. Clients never
//! write into chunks, where they could change a block after its commit.
//!
//! Only classic verbs are used (`ibv_post_send`, `ibv_poll_cq`): the extended ones of `rdma-sys` 0.3 do not work on 64-bit machines.

mod client;
mod registered;
mod server;
#[cfg(test)]
mod tests;
mod verbs;

pub use client::RdmaWire;
pub use server::{RdmaError, RdmaServer};

/// Random bytes that let a queue pair in, once.
const TICKET_BYTES: usize = 32;

type Ticket = [u8; TICKET_BYTES];
