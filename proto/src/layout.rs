//! The shape of a block and the size that follows from it, with arithmetic that cannot overflow.
//! Canonical axis order, slowest first: layer, key|value, token, KV head, head element.

use crate::{Invalid, limits};

/// Number format of keys and values in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// 8-bit float, 4 exponent bits, 3 mantissa bits.
    Fp8E4m3,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Fp8E4m3 => 1,
        }
    }

    /// Code in canonical encodings and on the wire.
    pub const fn code(self) -> u8 {
        match self {
            Self::F32 => 1,
            Self::F16 => 2,
            Self::Bf16 => 3,
            Self::Fp8E4m3 => 4,
        }
    }
}

/// Shape of one block. Every axis is at least 1 and the block is at most [`limits::MAX_BLOCK_BYTES`] for any dtype
/// it was checked with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    layers: u32,
    kv_heads: u32,
    head_dim: u32,
    block_tokens: u32,
}

impl Layout {
    /// A layout of `layers × 2 × block_tokens × kv_heads × head_dim` elements.
    ///
    /// # Errors
    /// When an axis is 0 or above its limit.
    pub fn new(layers: u32, kv_heads: u32, head_dim: u32, block_tokens: u32) -> Result<Self, Invalid> {
        let axes = [
            ("layout.layers", layers, limits::MAX_LAYOUT_AXIS),
            ("layout.kv_heads", kv_heads, limits::MAX_LAYOUT_AXIS),
            ("layout.head_dim", head_dim, limits::MAX_LAYOUT_AXIS),
            ("layout.block_tokens", block_tokens, limits::MAX_BLOCK_TOKENS),
        ];
        for (field, value, max) in axes {
            if value == 0 || value > max {
                return Err(Invalid::range(field, u64::from(value), format!("from 1 to {max}")));
            }
        }
        Ok(Self { layers, kv_heads, head_dim, block_tokens })
    }

    /// Transformer layers that the block covers.
    pub const fn layers(&self) -> usize {
        self.layers as usize
    }

    /// KV heads that the block covers.
    pub const fn kv_heads(&self) -> usize {
        self.kv_heads as usize
    }

    /// Elements of one head.
    pub const fn head_dim(&self) -> usize {
        self.head_dim as usize
    }

    /// Tokens of one block.
    pub const fn block_tokens(&self) -> usize {
        self.block_tokens as usize
    }

    /// Elements of one token in one layer, of keys or of values.
    pub const fn row_elements(&self) -> usize {
        self.kv_heads as usize * self.head_dim as usize
    }

    /// Bytes of the keys (or the values) of one layer of a block: the contiguous unit of copies.
    pub const fn plane_bytes(&self, dtype: Dtype) -> usize {
        self.block_tokens() * self.row_elements() * dtype.bytes()
    }

    /// Bytes of one block.
    ///
    /// # Errors
    /// When the block would be larger than [`limits::MAX_BLOCK_BYTES`].
    pub fn block_bytes(&self, dtype: Dtype) -> Result<u64, Invalid> {
        let factors = [self.layers, 2, self.block_tokens, self.kv_heads, self.head_dim, dtype.bytes() as u32];
        let bytes = factors
            .iter()
            .try_fold(1u64, |product, factor| product.checked_mul(u64::from(*factor)))
            .unwrap_or(u64::MAX);
        if bytes > limits::MAX_BLOCK_BYTES {
            let expected = format!("at most {} bytes: use fewer tokens in a block", limits::MAX_BLOCK_BYTES);
            return Err(Invalid::range("block size", bytes, expected));
        }
        Ok(bytes)
    }
}

/// Which part of the model's state a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    /// First layer covered.
    pub first_layer: u32,
    /// Layers of the whole model.
    pub total_layers: u32,
    /// First KV head covered.
    pub first_kv_head: u32,
    /// KV heads of the whole model.
    pub total_kv_heads: u32,
}

impl Shard {
    /// The whole model in one shard.
    pub const fn whole(layout: &Layout) -> Self {
        Self {
            first_layer: 0,
            total_layers: layout.layers,
            first_kv_head: 0,
            total_kv_heads: layout.kv_heads,
        }
    }

    /// # Errors
    /// When the ranges that this shard and `layout` describe leave the model.
    pub fn check(&self, layout: &Layout) -> Result<(), Invalid> {
        let ranges = [
            ("shard.first_layer", self.first_layer, layout.layers, self.total_layers),
            ("shard.first_kv_head", self.first_kv_head, layout.kv_heads, self.total_kv_heads),
        ];
        for (field, first, count, total) in ranges {
            if total > limits::MAX_LAYOUT_AXIS || u64::from(first) + u64::from(count) > u64::from(total) {
                let expected = format!("such that {first} + {count} ≤ {total} ≤ {}", limits::MAX_LAYOUT_AXIS);
                return Err(Invalid::range(field, u64::from(first), expected));
            }
        }
        Ok(())
    }
}
