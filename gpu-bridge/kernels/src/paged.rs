//! The paged KV pool of a worker, and the copies between it and canonical blocks.
//!
//! Canonical block (tiers and wires): `[layer][key, value][token][kv head][element]`.
//! Pool (what attention reads): for each layer and slot, keys as `[kv head][element][token]` and values as
//! `[kv head][token][element]`: attention then loads the keys of sixteen tokens with one instruction, and no
//! value needs to be moved. Bytes are re-laid here, once, at the worker's edge.

use half::{bf16, f16};

/// A place for one block in the pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

/// Number format of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvType {
    /// Exact.
    F32,
    /// Half the memory.
    F16,
    /// Half the memory, full range.
    Bf16,
}

impl KvType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// Shape of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PagedShape {
    /// Transformer layers.
    pub layers: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Tokens of a block.
    pub block_tokens: usize,
    /// Blocks of the pool.
    pub slots: usize,
    /// Number format.
    pub kv_type: KvType,
}

impl PagedShape {
    /// Elements of the keys (or values) of one layer of one block.
    pub const fn plane(&self) -> usize {
        self.kv_heads * self.head_dim * self.block_tokens
    }

    /// Elements of one block.
    pub const fn block(&self) -> usize {
        2 * self.layers * self.plane()
    }

    /// Bytes of one block.
    pub const fn block_bytes(&self) -> usize {
        self.block() * self.kv_type.bytes()
    }

    /// Bytes of the pool.
    pub const fn pool_bytes(&self) -> usize {
        self.slots * self.block_bytes()
    }

    /// [`Self::pool_bytes`], or `None` if that number is too large to be one. All offsets in a pool are below it.
    pub fn checked_pool_bytes(&self) -> Option<usize> {
        [self.layers, self.kv_heads, self.head_dim, self.block_tokens, self.slots, self.kv_type.bytes()]
            .into_iter()
            .try_fold(2usize, |product, factor| product.checked_mul(factor))
    }

    /// First element of the keys of `slot` in `layer`; its values follow them.
    pub const fn keys_at(&self, layer: usize, slot: usize) -> usize {
        (layer * self.slots + slot) * 2 * self.plane()
    }

    const fn key_in_plane(&self, token: usize, head: usize, element: usize) -> usize {
        (head * self.head_dim + element) * self.block_tokens + token
    }

    const fn value_in_plane(&self, token: usize, head: usize, element: usize) -> usize {
        (head * self.block_tokens + token) * self.head_dim + element
    }
}

/// Copies one canonical block into a slot of the pool.
///
/// # Panics
/// When a length does not fit the shape.
pub fn scatter_block(shape: &PagedShape, canonical: &[u8], pool: &mut [u8], slot: usize) {
    check(shape, canonical.len(), pool.len(), slot);
    match shape.kv_type {
        KvType::F32 => scatter::<u32>(shape, canonical, bytemuck::cast_slice_mut(pool), slot),
        KvType::F16 | KvType::Bf16 => scatter::<u16>(shape, canonical, bytemuck::cast_slice_mut(pool), slot),
    }
}

/// Copies a slot of the pool out as one canonical block: the inverse of [`scatter_block`].
///
/// # Panics
/// When a length does not fit the shape.
pub fn gather_block(shape: &PagedShape, pool: &[u8], slot: usize, canonical: &mut [u8]) {
    check(shape, canonical.len(), pool.len(), slot);
    match shape.kv_type {
        KvType::F32 => gather::<u32>(shape, bytemuck::cast_slice(pool), slot, canonical),
        KvType::F16 | KvType::Bf16 => gather::<u16>(shape, bytemuck::cast_slice(pool), slot, canonical),
    }
}

fn check(shape: &PagedShape, canonical: usize, pool: usize, slot: usize) {
    assert_eq!(canonical, shape.block_bytes(), "a canonical block has another size");
    assert_eq!(pool, shape.pool_bytes(), "the pool has another size");
    assert!(slot < shape.slots, "slot {slot} of {}", shape.slots);
}

/// One canonical plane is `[token][kv head][element]`.
fn scatter<T: bytemuck::Pod>(shape: &PagedShape, canonical: &[u8], pool: &mut [T], slot: usize) {
    let row = shape.kv_heads * shape.head_dim;
    let planes = canonical.chunks_exact(shape.plane() * size_of::<T>());
    for (index, plane) in planes.enumerate() {
        let (layer, values) = (index / 2, index % 2 == 1);
        let start = shape.keys_at(layer, slot) + if values { shape.plane() } else { 0 };
        let target = &mut pool[start..][..shape.plane()];
        for (token, bytes) in plane.chunks_exact(row * size_of::<T>()).enumerate() {
            for (head, bytes) in bytes.chunks_exact(shape.head_dim * size_of::<T>()).enumerate() {
                if values {
                    let at = shape.value_in_plane(token, head, 0);
                    bytemuck::cast_slice_mut(&mut target[at..][..shape.head_dim]).copy_from_slice(bytes);
                } else {
                    for (element, bytes) in bytes.chunks_exact(size_of::<T>()).enumerate() {
                        target[shape.key_in_plane(token, head, element)] =
                            bytemuck::pod_read_unaligned(bytes);
                    }
                }
            }
        }
    }
}

fn gather<T: bytemuck::Pod>(shape: &PagedShape, pool: &[T], slot: usize, canonical: &mut [u8]) {
    let row = shape.kv_heads * shape.head_dim;
    let planes = canonical.chunks_exact_mut(shape.plane() * size_of::<T>());
    for (index, plane) in planes.enumerate() {
        let (layer, values) = (index / 2, index % 2 == 1);
        let start = shape.keys_at(layer, slot) + if values { shape.plane() } else { 0 };
        let source = &pool[start..][..shape.plane()];
        for (token, bytes) in plane.chunks_exact_mut(row * size_of::<T>()).enumerate() {
            for (head, bytes) in bytes.chunks_exact_mut(shape.head_dim * size_of::<T>()).enumerate() {
                if values {
                    let at = shape.value_in_plane(token, head, 0);
                    bytes.copy_from_slice(bytemuck::cast_slice(&source[at..][..shape.head_dim]));
                } else {
                    for (element, bytes) in bytes.chunks_exact_mut(size_of::<T>()).enumerate() {
                        let value = source[shape.key_in_plane(token, head, element)];
                        bytes.copy_from_slice(bytemuck::bytes_of(&value));
                    }
                }
            }
        }
    }
}

/// Stores the new keys and values of rows (`kv heads × head_dim` each) in one layer, rounded to the pool's format.
/// `places[r]` is the slot and the token position inside it of row `r`.
///
/// # Panics
/// When a length does not fit the shape.
pub fn write_rows(
    shape: &PagedShape,
    pool: &mut [u8],
    layer: usize,
    places: &[(Slot, usize)],
    keys: &[f32],
    values: &[f32],
) {
    let row = shape.kv_heads * shape.head_dim;
    assert!(
        keys.len() == places.len() * row && values.len() == keys.len(),
        "keys and values must be whole rows"
    );
    for (r, (slot, token)) in places.iter().enumerate() {
        let (keys, values) = (&keys[r * row..][..row], &values[r * row..][..row]);
        let at = Place { layer, slot: slot.0 as usize, token: *token };
        match shape.kv_type {
            KvType::F32 => write_row(shape, bytemuck::cast_slice_mut(pool), &at, keys, values, |x| x),
            KvType::F16 => write_row(shape, bytemuck::cast_slice_mut(pool), &at, keys, values, f16::from_f32),
            KvType::Bf16 => {
                write_row(shape, bytemuck::cast_slice_mut(pool), &at, keys, values, bf16::from_f32)
            }
        }
    }
}

struct Place {
    layer: usize,
    slot: usize,
    token: usize,
}

fn write_row<T: Copy>(
    shape: &PagedShape,
    pool: &mut [T],
    at: &Place,
    keys: &[f32],
    values: &[f32],
    round: impl Fn(f32) -> T,
) {
    let start = shape.keys_at(at.layer, at.slot);
    let (key_plane, value_plane) = pool[start..][..2 * shape.plane()].split_at_mut(shape.plane());
    for head in 0..shape.kv_heads {
        for element in 0..shape.head_dim {
            let i = head * shape.head_dim + element;
            key_plane[shape.key_in_plane(at.token, head, element)] = round(keys[i]);
            value_plane[shape.value_in_plane(at.token, head, element)] = round(values[i]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use proptest::prelude::*;

    fn kv_type() -> impl Strategy<Value = KvType> {
        prop_oneof![Just(KvType::F32), Just(KvType::F16), Just(KvType::Bf16)]
    }

    proptest! {
        #[test]
        fn gather_is_the_inverse_of_scatter_and_touches_one_slot(
            layers in 1usize..4, kv_heads in 1usize..4, head_dim in 1usize..9, block_tokens in 1usize..20,
            slots in 1usize..5, kv_type in kv_type(), slot: prop::sample::Index, seed: u64,
        ) {
            let shape = PagedShape { layers, kv_heads, head_dim, block_tokens, slots, kv_type };
            let slot = slot.index(slots);
            let block: Vec<u8> = (0..shape.block_bytes()).map(|i| (seed >> (i % 56)) as u8 ^ i as u8).collect();
            let mut storage = vec![0xAAAA_AAAA_AAAA_AAAAu64; shape.pool_bytes().div_ceil(8)];
            let pool = &mut bytemuck::cast_slice_mut(&mut storage)[..shape.pool_bytes()];
            scatter_block(&shape, &block, pool, slot);
            let mut back = vec![0; shape.block_bytes()];
            gather_block(&shape, pool, slot, &mut back);
            prop_assert_eq!(&back, &block);
            for other in (0..slots).filter(|other| *other != slot) {
                gather_block(&shape, pool, other, &mut back);
                prop_assert!(back.iter().all(|byte| *byte == 0xAA));
            }
        }

        #[test]
        fn written_rows_come_out_in_canonical_order(token in 0usize..16, kv_type in kv_type()) {
            let (layers, kv_heads, head_dim, block_tokens) = (2, 2, 4, 16);
            let shape = PagedShape { layers, kv_heads, head_dim, block_tokens, slots: 2, kv_type };
            let mut storage = vec![0u64; shape.pool_bytes().div_ceil(8)];
            let pool = &mut bytemuck::cast_slice_mut(&mut storage)[..shape.pool_bytes()];
            let keys: Vec<f32> = (0..8).map(|i| i as f32 + 1.0).collect();
            let values: Vec<f32> = keys.iter().map(|x| -x).collect();
            write_rows(&shape, pool, 1, &[(Slot(1), token)], &keys, &values);
            let mut block = vec![0; shape.block_bytes()];
            gather_block(&shape, pool, 1, &mut block);
            let decoded = reference::decode(kv_type, &block);
            for (i, value) in decoded.iter().enumerate() {
                let (plane, rest) = (i / shape.plane(), i % shape.plane());
                let expected = match (plane, rest / 8 == token) {
                    (2, true) => keys[rest % 8],
                    (3, true) => values[rest % 8],
                    _ => 0.0,
                };
                prop_assert_eq!(*value, expected, "element {}", i);
            }
        }
    }
}
