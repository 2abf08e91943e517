//! Block identity: 32-byte hashes chained along a prefix. A hash names all tokens from the start of the prompt up to
//! and including its block. Not here: which spaces exist (`key`), how tokens are cut (`tokens`).

use crate::{Invalid, SpaceId, limits};
use std::fmt;

/// Domain of [`BlockHash`]; a changed rule gets a new context, so that old and new hashes can never meet.
pub const BLOCK_HASH_CONTEXT: &str = "cairn 2026-11 block hash v1";

/// Identity of one block: everything from the start of its prefix, inside one key space.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub [u8; 32]);

/// Something besides its tokens that changes a block's attention state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExtraKey {
    /// Name of the LoRA adapter in use.
    Lora(String),
    /// Content hash of an image, sound or video that placeholder tokens in this block stand for.
    Media(Vec<u8>),
    /// Anything else that the caller mixes in (a cache salt of one request, say).
    Salt(Vec<u8>),
}

impl ExtraKey {
    fn tag_and_bytes(&self) -> (u8, &[u8]) {
        match self {
            Self::Lora(name) => (1, name.as_bytes()),
            Self::Media(hash) => (2, hash),
            Self::Salt(salt) => (3, salt),
        }
    }
}

/// Computes block hashes; holds the initialised domain so that each block costs one or two compressions.
#[derive(Clone)]
pub struct BlockHasher {
    domain: blake3::Hasher,
}

impl Default for BlockHasher {
    fn default() -> Self {
        Self { domain: blake3::Hasher::new_derive_key(BLOCK_HASH_CONTEXT) }
    }
}

impl BlockHasher {
    /// `H(parent ‖ token count ‖ tokens ‖ extra key count ‖ (tag ‖ length ‖ bytes)…)`, all integers `u32` little
    /// endian except the one-byte tag. The parent of a first block is the id of its key space.
    pub fn hash(&self, parent: Parent, tokens: &[u32], extra_keys: &[ExtraKey]) -> BlockHash {
        let mut hasher = self.domain.clone();
        hasher.update(parent.bytes());
        let mut buffer = Vec::with_capacity(4 * tokens.len() + 8);
        buffer.extend((tokens.len() as u32).to_le_bytes());
        for token in tokens {
            buffer.extend(token.to_le_bytes());
        }
        buffer.extend((extra_keys.len() as u32).to_le_bytes());
        for key in extra_keys {
            let (tag, bytes) = key.tag_and_bytes();
            buffer.push(tag);
            buffer.extend((bytes.len() as u32).to_le_bytes());
            buffer.extend(bytes);
        }
        hasher.update(&buffer);
        BlockHash(*hasher.finalize().as_bytes())
    }
}

/// What a block hash is chained to.
#[derive(Clone, Copy, Debug)]
pub enum Parent<'a> {
    /// The block is the first of its prompt.
    Root(&'a SpaceId),
    /// The block before it.
    Block(&'a BlockHash),
}

impl<'a> Parent<'a> {
    fn bytes(self) -> &'a [u8; 32] {
        match self {
            Self::Root(space) => &space.0,
            Self::Block(hash) => &hash.0,
        }
    }
}

impl BlockHash {
    /// Splits `n × 32` bytes from the wire.
    ///
    /// # Errors
    /// When the length is no multiple of 32, or there are more than [`limits::MAX_BLOCKS_PER_REQUEST`].
    pub fn parse_list(bytes: &[u8]) -> Result<Vec<Self>, Invalid> {
        let (hashes, rest) = bytes.as_chunks::<32>();
        if !rest.is_empty() {
            return Err(Invalid::Length {
                field: "block_hashes",
                actual: bytes.len(),
                expected: "a multiple of 32",
            });
        }
        if hashes.len() > limits::MAX_BLOCKS_PER_REQUEST {
            let expected = format!("at most {}; split the request", limits::MAX_BLOCKS_PER_REQUEST);
            return Err(Invalid::range("number of block_hashes", hashes.len() as u64, expected));
        }
        Ok(hashes.iter().map(|hash| Self(*hash)).collect())
    }

    /// The inverse of [`Self::parse_list`].
    pub fn concat(hashes: &[Self]) -> bytes::Bytes {
        let mut all = Vec::with_capacity(32 * hashes.len());
        for hash in hashes {
            all.extend(hash.0);
        }
        all.into()
    }
}

impl fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}…", hex::encode(&self.0[..6]))
    }
}

impl fmt::Display for BlockHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl TryFrom<&[u8]> for BlockHash {
    type Error = Invalid;

    fn try_from(bytes: &[u8]) -> Result<Self, Invalid> {
        bytes.try_into().map(Self).map_err(|_| Invalid::Length {
            field: "block hash",
            actual: bytes.len(),
            expected: "32",
        })
    }
}
