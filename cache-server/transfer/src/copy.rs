//! Copying a block and computing its checksum in one pass: each cache line is loaded once, stored and hashed from the same
//! register. So verification costs little beyond the copy, and what is checked is exactly what was stored, even if somebody
//! writes to the source meanwhile (a client's staging memory, or a slot whose lease ran out).
//!
//! The hash is XXH3-128 with a seed, for inputs of more than 240 bytes, from the algorithm's specification (Yann Collet,
//! `xxhash_spec.md`, version 0.2); shorter inputs are copied and handed to the library.

use cairn_proto::{BlockHash, Checksum, SpaceId};

/// Longest input that XXH3 treats in other ways.
const SHORT_BYTES: usize = 240;

const STRIPE_BYTES: usize = 64;
const SECRET_BYTES: usize = 192;
const STRIPES_PER_ROUND: usize = (SECRET_BYTES - STRIPE_BYTES) / 8;
const ROUND_BYTES: usize = STRIPES_PER_ROUND * STRIPE_BYTES;

/// Where the secrets of the last stripe and of the two halves of the result start.
const LAST_STRIPE_SECRET: usize = SECRET_BYTES - STRIPE_BYTES - 7;
const LOW_SECRET: usize = 11;
const HIGH_SECRET: usize = SECRET_BYTES - STRIPE_BYTES - 11;

const PRIME32_1: u64 = 0x9E37_79B1;
const PRIME32_2: u64 = 0x85EB_CA77;
const PRIME32_3: u64 = 0xC2B2_AE3D;
const PRIME64_1: u64 = 0x9E37_79B1_85EB_CA87;
const PRIME64_2: u64 = 0xC2B2_AE3D_27D4_EB4F;
const PRIME64_3: u64 = 0x1656_67B1_9E37_79F9;
const PRIME64_4: u64 = 0x85EB_CA77_C2B2_AE63;
const PRIME64_5: u64 = 0x27D4_EB2F_1656_67C5;
const AVALANCHE: u64 = 0x1656_6791_9E37_79F9;

type Lanes = [u64; 8];
type Secret = [u8; SECRET_BYTES];

const START: Lanes = [PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1];

/// The default secret of the specification.
#[rustfmt::skip]
const DEFAULT_SECRET: Secret = [
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
];

/// Copies `target.len()` bytes from `source` and returns the checksum of what is in the target afterwards.
///
/// # Safety
/// `source` must be readable for `target.len()` bytes and not overlap the target. It may change meanwhile: it is memory
/// shared with another process, which no reference covers.
pub unsafe fn copy_shared(
    space: &SpaceId,
    hash: &BlockHash,
    source: *const u8,
    target: &mut [u8],
) -> Checksum {
    if target.len() <= SHORT_BYTES {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(source, target.as_mut_ptr(), target.len()) };
        return Checksum::of(space, hash, target);
    }
    let secret = secret(Checksum::seed(space, hash));
    let rounds = (target.len() - 1) / ROUND_BYTES;
    let stripes = (target.len() - 1 - rounds * ROUND_BYTES) / STRIPE_BYTES;
    let done = rounds * ROUND_BYTES + stripes * STRIPE_BYTES;
    // SAFETY: rounds and stripes end before the last byte of the target, whole stripes each; then the rest is copied. Both
    // ranges are inside what the caller promised.
    let mut lanes = unsafe {
        let lanes = copy_stripes(source, target.as_mut_ptr(), (rounds, stripes), &secret);
        std::ptr::copy_nonoverlapping(source.add(done), target.as_mut_ptr().add(done), target.len() - done);
        lanes
    };
    let last: &[u8] = &target[target.len() - STRIPE_BYTES..];
    accumulate(&mut lanes, last, &secret[LAST_STRIPE_SECRET..]);
    finish(&lanes, target.len() as u64, &secret)
}

/// As [`copy_shared`], from memory that does not change.
pub fn copy(space: &SpaceId, hash: &BlockHash, source: &[u8], target: &mut [u8]) -> Checksum {
    assert_eq!(source.len(), target.len(), "a block is copied whole");
    // SAFETY: the source is as long as the target, and a mutable and a shared slice do not overlap.
    unsafe { copy_shared(space, hash, source.as_ptr(), target) }
}

/// The default secret with the seed added to and subtracted from its words.
fn secret(seed: u64) -> Secret {
    let mut secret = DEFAULT_SECRET;
    for (i, word) in secret.chunks_exact_mut(8).enumerate() {
        let value = read(word);
        let value = if i % 2 == 0 { value.wrapping_add(seed) } else { value.wrapping_sub(seed) };
        word.copy_from_slice(&value.to_le_bytes());
    }
    secret
}

/// # Safety
/// Source and target are valid for `rounds × 1024 + stripes × 64` bytes and do not overlap.
unsafe fn copy_stripes(source: *const u8, target: *mut u8, count: (usize, usize), secret: &Secret) -> Lanes {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq") {
            // SAFETY: the caller's promise; the CPU has the instructions.
            return unsafe { avx512::copy_stripes(source, target, count, secret) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the caller's promise; the CPU has the instructions.
            return unsafe { avx2::copy_stripes(source, target, count, secret) };
        }
    }
    // SAFETY: the caller's promise.
    unsafe { portable(source, target, count, secret) }
}

/// # Safety
/// As [`copy_stripes`].
unsafe fn portable(
    source: *const u8,
    target: *mut u8,
    (rounds, stripes): (usize, usize),
    secret: &Secret,
) -> Lanes {
    let mut lanes = START;
    for stripe in 0..rounds * STRIPES_PER_ROUND + stripes {
        let (at, step) = (stripe * STRIPE_BYTES, stripe % STRIPES_PER_ROUND);
        let mut line = [0u8; STRIPE_BYTES];
        // SAFETY: the stripe is inside what the caller promised; `line` is this function's own.
        unsafe {
            std::ptr::copy_nonoverlapping(source.add(at), line.as_mut_ptr(), STRIPE_BYTES);
            std::ptr::copy_nonoverlapping(line.as_ptr(), target.add(at), STRIPE_BYTES);
        }
        accumulate(&mut lanes, &line, &secret[8 * step..]);
        if step == STRIPES_PER_ROUND - 1 {
            scramble(&mut lanes, &secret[SECRET_BYTES - STRIPE_BYTES..]);
        }
    }
    lanes
}

fn read(bytes: &[u8]) -> u64 {
    bytes[..8].iter().rev().fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

fn accumulate(lanes: &mut Lanes, stripe: &[u8], secret: &[u8]) {
    for i in 0..8 {
        let data = read(&stripe[8 * i..]);
        let keyed = data ^ read(&secret[8 * i..]);
        lanes[i ^ 1] = lanes[i ^ 1].wrapping_add(data);
        lanes[i] = lanes[i].wrapping_add((keyed & 0xFFFF_FFFF).wrapping_mul(keyed >> 32));
    }
}

fn scramble(lanes: &mut Lanes, secret: &[u8]) {
    for (i, lane) in lanes.iter_mut().enumerate() {
        *lane = (*lane ^ (*lane >> 47) ^ read(&secret[8 * i..])).wrapping_mul(PRIME32_1);
    }
}

fn finish(lanes: &Lanes, len: u64, secret: &Secret) -> Checksum {
    let low = merge(lanes, &secret[LOW_SECRET..], len.wrapping_mul(PRIME64_1));
    let high = merge(lanes, &secret[HIGH_SECRET..], !len.wrapping_mul(PRIME64_2));
    Checksum(((u128::from(high) << 64) | u128::from(low)).to_le_bytes())
}

fn merge(lanes: &Lanes, secret: &[u8], start: u64) -> u64 {
    let folded = lanes.chunks_exact(2).zip(secret.chunks_exact(16)).fold(start, |sum, (pair, key)| {
        let product = u128::from(pair[0] ^ read(key)) * u128::from(pair[1] ^ read(&key[8..]));
        sum.wrapping_add(product as u64 ^ (product >> 64) as u64)
    });
    let mixed = (folded ^ (folded >> 37)).wrapping_mul(AVALANCHE);
    mixed ^ (mixed >> 32)
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    //! Eight lanes in one register.

    use super::{Lanes, PRIME32_1, SECRET_BYTES, START, STRIPE_BYTES, STRIPES_PER_ROUND, Secret};
    use std::arch::x86_64::*;

    /// # Safety
    /// As `super::copy_stripes`, on a CPU with AVX-512 F and DQ.
    #[target_feature(enable = "avx512f,avx512dq")]
    pub(super) unsafe fn copy_stripes(
        source: *const u8,
        target: *mut u8,
        (rounds, stripes): (usize, usize),
        secret: &Secret,
    ) -> Lanes {
        // SAFETY: every stripe is inside what the caller promised, every key inside the secret.
        unsafe {
            let key = |at: usize| _mm512_loadu_si512(secret.as_ptr().add(at).cast());
            let prime = _mm512_set1_epi64(PRIME32_1 as i64);
            let mut lanes = _mm512_loadu_si512(START.as_ptr().cast());
            let mut at = 0;
            for round in 0..=rounds {
                let count = if round < rounds { STRIPES_PER_ROUND } else { stripes };
                for stripe in 0..count {
                    let data = _mm512_loadu_si512(source.add(at).cast());
                    _mm512_storeu_si512(target.add(at).cast(), data);
                    let keyed = _mm512_xor_si512(data, key(8 * stripe));
                    let product = _mm512_mul_epu32(keyed, _mm512_srli_epi64::<32>(keyed));
                    let swapped = _mm512_shuffle_epi32::<0x4E>(data);
                    lanes = _mm512_add_epi64(lanes, _mm512_add_epi64(product, swapped));
                    at += STRIPE_BYTES;
                }
                if round < rounds {
                    let mixed = _mm512_xor_si512(lanes, _mm512_srli_epi64::<47>(lanes));
                    let mixed = _mm512_xor_si512(mixed, key(SECRET_BYTES - STRIPE_BYTES));
                    lanes = _mm512_mullo_epi64(mixed, prime);
                }
            }
            let mut result = START;
            _mm512_storeu_si512(result.as_mut_ptr().cast(), lanes);
            result
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    //! Eight lanes in two registers.

    use super::{Lanes, PRIME32_1, SECRET_BYTES, START, STRIPE_BYTES, STRIPES_PER_ROUND, Secret};
    use std::arch::x86_64::*;

    /// # Safety
    /// As `super::copy_stripes`, on a CPU with AVX2.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn copy_stripes(
        source: *const u8,
        target: *mut u8,
        (rounds, stripes): (usize, usize),
        secret: &Secret,
    ) -> Lanes {
        // SAFETY: every stripe is inside what the caller promised, every key inside the secret.
        unsafe {
            let key = |at: usize| _mm256_loadu_si256(secret.as_ptr().add(at).cast());
            let prime = _mm256_set1_epi64x(PRIME32_1 as i64);
            let mut lanes = [0, 4].map(|i| _mm256_loadu_si256(START.as_ptr().add(i).cast()));
            let mut at = 0;
            for round in 0..=rounds {
                let count = if round < rounds { STRIPES_PER_ROUND } else { stripes };
                for stripe in 0..count {
                    for (half, lanes) in lanes.iter_mut().enumerate() {
                        let data = _mm256_loadu_si256(source.add(at + 32 * half).cast());
                        _mm256_storeu_si256(target.add(at + 32 * half).cast(), data);
                        let keyed = _mm256_xor_si256(data, key(8 * stripe + 32 * half));
                        let product = _mm256_mul_epu32(keyed, _mm256_srli_epi64::<32>(keyed));
                        let swapped = _mm256_shuffle_epi32::<0x4E>(data);
                        *lanes = _mm256_add_epi64(*lanes, _mm256_add_epi64(product, swapped));
                    }
                    at += STRIPE_BYTES;
                }
                if round < rounds {
                    for (half, lanes) in lanes.iter_mut().enumerate() {
                        let mixed = _mm256_xor_si256(*lanes, _mm256_srli_epi64::<47>(*lanes));
                        let mixed = _mm256_xor_si256(mixed, key(SECRET_BYTES - STRIPE_BYTES + 32 * half));
                        // A 64-bit product with a 32-bit prime, out of two 32-bit ones.
                        let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(mixed), prime);
                        let low = _mm256_mul_epu32(mixed, prime);
                        *lanes = _mm256_add_epi64(low, _mm256_slli_epi64::<32>(high));
                    }
                }
            }
            let mut result = START;
            for (half, lanes) in lanes.iter().enumerate() {
                _mm256_storeu_si256(result.as_mut_ptr().add(4 * half).cast(), *lanes);
            }
            result
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn payload(len: usize, salt: u64) -> Vec<u8> {
        (0..len as u64).map(|i| (i.wrapping_mul(0x9E37_79B9).wrapping_add(salt) >> 7) as u8).collect()
    }

    proptest! {
        #[test]
        fn one_pass_equals_copy_and_checksum(
            len in prop_oneof![1usize..600, 900usize..5000, 100_000usize..140_000],
            space in any::<[u8; 32]>(),
            hash in any::<[u8; 32]>(),
        ) {
            let (space, hash) = (SpaceId(space), BlockHash(hash));
            let source = payload(len, u64::from(space.0[0]));
            let mut target = vec![0xAA; len];
            let found = copy(&space, &hash, &source, &mut target);
            prop_assert_eq!(&target, &source);
            prop_assert_eq!(found, Checksum::of(&space, &hash, &source));
        }

        #[test]
        fn every_way_to_compute_it_agrees(rounds in 0usize..5, stripes in 0usize..16, seed in any::<u64>()) {
            let source = payload(rounds * ROUND_BYTES + stripes * STRIPE_BYTES, seed);
            let secret = secret(seed);
            type Way = unsafe fn(*const u8, *mut u8, (usize, usize), &Secret) -> Lanes;
            let mut ways: Vec<Way> = vec![portable];
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq") {
                    ways.push(avx512::copy_stripes);
                }
                if is_x86_feature_detected!("avx2") {
                    ways.push(avx2::copy_stripes);
                }
            }
            let mut results = Vec::new();
            for way in ways {
                let mut target = vec![0; source.len()];
                // SAFETY: both are as long as the stripes, and the CPU has the instructions.
                results.push(unsafe { way(source.as_ptr(), target.as_mut_ptr(), (rounds, stripes), &secret) });
                prop_assert_eq!(&target, &source);
            }
            prop_assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
        }
    }
}
