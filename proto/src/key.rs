//! Key spaces: what must match for two workers to share bytes. A different layout, model or tenant is a different
//! space; bytes are never reinterpreted from one into another.

use crate::{BlockHash, Dtype, Invalid, Layout, Shard, limits};
use std::fmt;

/// Domain of [`SpaceId`].
pub const SPACE_ID_CONTEXT: &str = "cairn 2026-11 key space id v1";

/// BLAKE3 of a key space's canonical encoding.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpaceId(pub [u8; 32]);

/// How block hashes of a space are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HashProtocol {
    /// [`crate::BlockHasher`].
    CairnBlake3V1,
    /// The engine's own chained SHA-256.
    VllmSha256,
}

impl HashProtocol {
    /// Code in the canonical encoding and on the wire.
    pub const fn code(self) -> u8 {
        match self {
            Self::CairnBlake3V1 => 1,
            Self::VllmSha256 => 2,
        }
    }
}

/// Everything that must match for two workers to share bytes. Immutable; its id and block size are computed once.
#[derive(Clone, PartialEq, Eq)]
pub struct KeySpace {
    parts: SpaceParts,
    id: SpaceId,
    block_bytes: u64,
}

/// The parts of a [`KeySpace`], before they are checked.
#[derive(Clone, PartialEq, Eq)]
pub struct SpaceParts {
    /// Owner of the blocks.
    pub tenant: String,
    /// Secret of the tenant; zeros when there is none.
    pub tenant_salt: [u8; 32],
    /// BLAKE3 over whatever determines the model's numbers.
    pub model_fingerprint: [u8; 32],
    /// Number format of the bytes.
    pub dtype: Dtype,
    /// Shape of a block.
    pub layout: Layout,
    /// Part of the model.
    pub shard: Shard,
    /// How hashes are made.
    pub hash_protocol: HashProtocol,
}

impl SpaceParts {
    /// The usual space: the whole model in one shard, Cairn's own hashes, no salt.
    pub fn new(tenant: impl Into<String>, model_fingerprint: [u8; 32], dtype: Dtype, layout: Layout) -> Self {
        Self {
            tenant: tenant.into(),
            tenant_salt: [0; 32],
            model_fingerprint,
            dtype,
            shard: Shard::whole(&layout),
            layout,
            hash_protocol: HashProtocol::CairnBlake3V1,
        }
    }
}

impl KeySpace {
    /// Checks the parts and computes the id.
    ///
    /// # Errors
    /// When a name is too long, the shard leaves the model, or blocks would be too large.
    pub fn new(parts: SpaceParts) -> Result<Self, Invalid> {
        let name_bytes = parts.tenant.len();
        if name_bytes == 0 || name_bytes > limits::MAX_NAME_BYTES {
            return Err(Invalid::Length { field: "tenant", actual: name_bytes, expected: "1 to 256" });
        }
        parts.shard.check(&parts.layout)?;
        let block_bytes = parts.layout.block_bytes(parts.dtype)?;
        let id = SpaceId(blake3::derive_key(SPACE_ID_CONTEXT, &encode(&parts)));
        Ok(Self { parts, id, block_bytes })
    }

    /// Identity of the space.
    pub const fn id(&self) -> SpaceId {
        self.id
    }

    /// Bytes of every block of this space.
    pub const fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Shape of every block of this space.
    pub const fn layout(&self) -> &Layout {
        &self.parts.layout
    }

    /// Number format of every block of this space.
    pub const fn dtype(&self) -> Dtype {
        self.parts.dtype
    }

    /// All parts.
    pub const fn parts(&self) -> &SpaceParts {
        &self.parts
    }
}

/// Canonical encoding, integers `u32` little endian: tenant length, tenant, salt, fingerprint, dtype (1 byte), layers,
/// KV heads, head size, block tokens, order (1 byte, always 1), first layer, total layers, first KV head,
/// total KV heads, hash protocol (1 byte).
fn encode(parts: &SpaceParts) -> Vec<u8> {
    let mut out = Vec::with_capacity(160);
    out.extend((parts.tenant.len() as u32).to_le_bytes());
    out.extend(parts.tenant.as_bytes());
    out.extend(parts.tenant_salt);
    out.extend(parts.model_fingerprint);
    out.push(parts.dtype.code());
    let layout = &parts.layout;
    for axis in [layout.layers(), layout.kv_heads(), layout.head_dim(), layout.block_tokens()] {
        out.extend((axis as u32).to_le_bytes());
    }
    out.push(1);
    let shard = &parts.shard;
    for value in [shard.first_layer, shard.total_layers, shard.first_kv_head, shard.total_kv_heads] {
        out.extend(value.to_le_bytes());
    }
    out.push(parts.hash_protocol.code());
    out
}

/// Name of one block on a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockKey {
    /// Its space.
    pub space: SpaceId,
    /// Its hash inside the space.
    pub hash: BlockHash,
}

impl fmt::Debug for SpaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}…", hex::encode(&self.0[..6]))
    }
}

impl fmt::Display for SpaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for KeySpace {
    /// Leaves the salt out: it is a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let SpaceParts { tenant, dtype, layout, shard, .. } = &self.parts;
        f.debug_struct("KeySpace")
            .field("id", &self.id)
            .field("tenant", tenant)
            .field("dtype", dtype)
            .field("layout", layout)
            .field("shard", shard)
            .finish_non_exhaustive()
    }
}

impl TryFrom<&[u8]> for SpaceId {
    type Error = Invalid;

    fn try_from(bytes: &[u8]) -> Result<Self, Invalid> {
        bytes.try_into().map(Self).map_err(|_| Invalid::Length {
            field: "space_id",
            actual: bytes.len(),
            expected: "32",
        })
    }
}
