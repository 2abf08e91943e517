//! What a KV block is, and what may be said about it: identity, layout, checksums, outcomes, limits and the API.
//! No IO, no clock. Generated message types are in [`pb`]; everything else is a domain type that cannot hold nonsense.

#![forbid(unsafe_code)]

mod checksum;
mod error;
mod hash;
mod key;
mod layout;
pub mod limits;
mod outcome;
mod tokens;
pub mod wire;

pub use checksum::{Checksum, StreamingChecksum};
pub use error::{ErrorKind, Invalid};
pub use hash::{BLOCK_HASH_CONTEXT, BlockHash, BlockHasher, ExtraKey, Parent};
pub use key::{BlockKey, HashProtocol, KeySpace, SPACE_ID_CONTEXT, SpaceId, SpaceParts};
pub use layout::{Dtype, Layout, Shard};
pub use outcome::{MissReason, Outcome, Tier, runs};
pub use tokens::chain;

/// Messages and services generated from `cairn/v1/*.proto`.
#[allow(missing_docs, clippy::all, clippy::pedantic)]
pub mod pb {
    tonic::include_proto!("cairn.v1");
}

#[cfg(test)]
pub(crate) mod testing {
    use crate::{Dtype, KeySpace, Layout, SpaceParts};

    pub(crate) fn space(tenant: &str, block_tokens: u32) -> KeySpace {
        let layout = Layout::new(2, 2, 8, block_tokens).unwrap();
        KeySpace::new(SpaceParts::new(tenant, [7; 32], Dtype::Bf16, layout)).unwrap()
    }
}
