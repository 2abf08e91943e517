//! Scatter and gather, with and without casts, against the definition of both layouts, byte for byte.

use super::{Bench, Format, POISON};
use cairn_gpu::{BlockMove, Buffer, Device, PagedShape};
use cairn_kernels::KvType;
use cairn_kernels::cuda::WireType;
use cairn_kernels::reference::{cuda_pool_at, e4m3_decode, e4m3_encode};
use rand::seq::SliceRandom;

const FORMATS: [(KvType, Format); 3] =
    [(KvType::F32, Format::F32), (KvType::F16, Format::F16), (KvType::Bf16, Format::Bf16)];

fn format(kv_type: KvType) -> Format {
    FORMATS.iter().find(|(kind, _)| *kind == kv_type).expect("all are listed").1
}

pub(super) fn check(bench: &mut Bench, case: usize) {
    let combinations = [
        (WireType::Kv(KvType::Bf16), KvType::Bf16),
        (WireType::E4m3, KvType::Bf16),
        (WireType::Kv(KvType::F32), KvType::F16),
        (WireType::Kv(KvType::Bf16), KvType::F32),
        (WireType::E4m3, KvType::F32),
        (WireType::Kv(KvType::F16), KvType::Bf16),
    ];
    let (wire, kv_type) = combinations[case % combinations.len()];
    let shape = PagedShape {
        layers: 1 + bench.below(4),
        kv_heads: 1 + bench.below(3),
        head_dim: [16, 64, 128][bench.below(3)],
        block_tokens: [16, 32][bench.below(2)],
        slots: 3 + bench.below(4),
        kv_type,
    };
    one(bench, shape, wire);
    println!("scatter, gather: {wire:?} blocks, {kv_type:?} pool: exact");
}

fn one(bench: &mut Bench, shape: PagedShape, wire: WireType) {
    let kernels = bench.device.cast_kernels(shape, wire).expect("kernels");
    let block_bytes = kernels.wire_block_bytes();
    let mut slots: Vec<usize> = (0..shape.slots).collect();
    slots.shuffle(&mut bench.rng);
    let count = 1 + bench.below(shape.slots - 1);
    let first_layer = bench.below(shape.layers);
    let layers = first_layer..first_layer + 1 + bench.below(shape.layers - first_layer);

    let numbers: Vec<Vec<f32>> = (0..count).map(|_| bench.numbers(shape.block(), 3.0)).collect();
    let blocks: Vec<Vec<u8>> = numbers.iter().map(|block| encode(&shape, wire, block)).collect();
    // Not side by side: a gap of sixteen bytes after each block.
    let stride = (block_bytes + 16).next_multiple_of(16);
    let mut staged = vec![POISON; count * stride];
    for (block, bytes) in blocks.iter().enumerate() {
        staged[block * stride..][..block_bytes].copy_from_slice(bytes);
    }
    let moves: Vec<BlockMove> =
        (0..count).map(|block| BlockMove { staging_offset: block * stride, slot: slots[block] }).collect();

    // Into the pool: from pinned memory or from the device.
    let pool = bench.poisoned(shape.pool_bytes());
    let staging = if bench.below(2) == 0 {
        Buffer::Device(bench.put(&staged))
    } else {
        let mut pinned = bench.device.allocate_pinned(staged.len()).expect("pinned memory");
        pinned.as_mut().copy_from_slice(&staged);
        Buffer::Pinned(bench.device.share(pinned))
    };
    bench.stream.scatter_layers(&kernels, layers.clone(), &staging, &pool, &moves).expect("issued");
    let got = bench.get(&pool);
    let mut expected = vec![POISON; shape.pool_bytes()];
    let width = shape.kv_type.bytes();
    for (block, each) in moves.iter().enumerate() {
        let decoded = decode(&shape, wire, &blocks[block]);
        for_each_element(&shape, |at, canonical| {
            if layers.contains(&at[0]) {
                let place = cuda_pool_at(&shape, [at[0], each.slot, at[1], at[2], at[3], at[4]]);
                let bytes = format(shape.kv_type).encode(&decoded[canonical..=canonical]);
                expected[place * width..][..width].copy_from_slice(&bytes);
            }
        });
    }
    assert!(got == expected, "scatter of {wire:?} into {shape:?}, layers {layers:?}");

    // And out again, into poisoned memory.
    let out = bench.poisoned(staged.len());
    bench
        .stream
        .gather_layers(&kernels, 0..shape.layers, &pool, &Buffer::Device(out.clone()), &moves)
        .expect("issued");
    let got = bench.get(&out);
    let mut expected = vec![POISON; staged.len()];
    let pool_numbers = format(shape.kv_type).decode(&bench.get(&pool));
    for each in &moves {
        let mut block = vec![0.0; shape.block()];
        for_each_element(&shape, |at, canonical| {
            block[canonical] =
                pool_numbers[cuda_pool_at(&shape, [at[0], each.slot, at[1], at[2], at[3], at[4]])];
        });
        expected[each.staging_offset..][..block_bytes].copy_from_slice(&encode(&shape, wire, &block));
    }
    assert!(got == expected, "gather of {wire:?} from {shape:?}");
}

/// Calls with `[layer, side, head, token, element]` and the place in a canonical block.
fn for_each_element(shape: &PagedShape, mut visit: impl FnMut([usize; 5], usize)) {
    let PagedShape { layers, kv_heads, head_dim, block_tokens, .. } = *shape;
    let mut canonical = 0;
    for plane in 0..2 * layers {
        for token in 0..block_tokens {
            for head in 0..kv_heads {
                for element in 0..head_dim {
                    visit([plane / 2, plane % 2, head, token, element], canonical);
                    canonical += 1;
                }
            }
        }
    }
}

fn encode(shape: &PagedShape, wire: WireType, block: &[f32]) -> Vec<u8> {
    let kv_type = match wire {
        WireType::Kv(kv_type) => return format(kv_type).encode(block),
        WireType::E4m3 => shape.kv_heads,
    };
    let mut largest = vec![0f32; 2 * shape.layers * kv_type];
    let scale_of = |at: [usize; 5]| (at[0] * 2 + at[1]) * shape.kv_heads + at[2];
    for_each_element(shape, |at, canonical| {
        let scale = &mut largest[scale_of(at)];
        *scale = scale.max(block[canonical].abs());
    });
    let scales: Vec<f32> = largest.iter().map(|max| if *max > 0.0 { max / 448.0 } else { 1.0 }).collect();
    let mut bytes = vec![0; block.len()];
    for_each_element(shape, |at, canonical| {
        bytes[canonical] = e4m3_encode(block[canonical] * (1.0 / scales[scale_of(at)]));
    });
    bytes.extend(scales.iter().flat_map(|scale| scale.to_le_bytes()));
    bytes
}

fn decode(shape: &PagedShape, wire: WireType, bytes: &[u8]) -> Vec<f32> {
    if let WireType::Kv(kv_type) = wire {
        return format(kv_type).decode(bytes);
    }
    let scales: Vec<f32> = bytemuck::pod_collect_to_vec(&bytes[shape.block()..]);
    let mut block = vec![0.0; shape.block()];
    for_each_element(shape, |at, canonical| {
        let scale = scales[(at[0] * 2 + at[1]) * shape.kv_heads + at[2]];
        block[canonical] = e4m3_decode(bytes[canonical]) * scale;
    });
    block
}
