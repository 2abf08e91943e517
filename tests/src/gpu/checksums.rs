//! Checksums on the device against those that servers and clients make.

use super::Bench;
use cairn_gpu::backend::cuda::Checksums;
use cairn_proto::{BlockHash, Checksum, SpaceId};
use rand::Rng;

/// Random blocks at random places; a changed bit anywhere changes the checksum.
///
/// # Panics
/// When one differs.
pub(super) fn check(bench: &mut Bench, case: usize) {
    let kernels = Checksums::load(&bench.device).expect("the kernels");
    // Ends of chunks and stripes are where mistakes hide.
    let edges = [256, 1008, 1024, 1040, 1088, 2048, 2064, 8192 + 1024, 16 * 1024 + 16];
    let bytes = match edges.get(case) {
        Some(edge) => *edge,
        None => 16 * (16 + bench.below(2000)),
    };
    let (count, gap) = (1 + bench.below(5), 16 * bench.below(3));
    let data: Vec<u8> = (0..count * (bytes + gap)).map(|_| bench.rng.random()).collect();
    let space = SpaceId(bench.rng.random());
    let hashes: Vec<BlockHash> = (0..count).map(|_| BlockHash(bench.rng.random())).collect();
    let offset = |i: usize| i * (bytes + gap);
    let places: Vec<(usize, u64)> =
        hashes.iter().enumerate().map(|(i, hash)| (offset(i), Checksum::seed(&space, hash))).collect();
    let memory = bench.put(&data);
    let found = kernels.of(&bench.stream, &memory, bytes, &places).expect("computed");
    for (i, (hash, found)) in hashes.iter().zip(&found).enumerate() {
        let expected = Checksum::of(&space, hash, &data[offset(i)..offset(i) + bytes]);
        assert_eq!(Checksum(*found), expected, "block {i} of {count} with {bytes} bytes");
    }
    let (block, bit) = (bench.below(count), bench.below(8 * bytes));
    let mut changed = data.clone();
    changed[offset(block) + bit / 8] ^= 1 << (bit % 8);
    let memory = bench.put(&changed);
    let now = kernels.of(&bench.stream, &memory, bytes, &places).expect("computed");
    for (i, (before, now)) in found.iter().zip(&now).enumerate() {
        assert_eq!(before == now, i != block, "bit {bit} of block {block} is changed");
    }
    assert!(kernels.of(&bench.stream, &memory, bytes, &[(data.len(), 0)]).is_err(), "outside");
    assert!(kernels.of(&bench.stream, &memory, 240, &places).is_err(), "too short");
}
