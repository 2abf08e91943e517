//! Both ends of every wire that moves block bytes, side by side, so that they change together.
//!
//! A wire carries *pieces*: consecutive bytes of one block. [`pack`] cuts blocks into messages; [`Incoming`] puts a block
//! together again, checking order and size and computing its checksum on the way.

#![forbid(unsafe_code)]

mod incoming;
mod pack;

pub use incoming::{Incoming, PieceError, Target};
pub use pack::{Pack, pack};
