//! The payload checksum: XXH3-128 seeded with the block's identity, so that right bytes under a wrong name fail too.
//! It guards against accidents, not against an attacker who can write the store; identity is BLAKE3's job.

use crate::{BlockHash, Invalid, SpaceId};
use twox_hash::XxHash3_128;

/// XXH3-128 of a payload, bound to its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Checksum(pub [u8; 16]);

impl Checksum {
    /// Checksum of a whole payload.
    pub fn of(space: &SpaceId, hash: &BlockHash, payload: &[u8]) -> Self {
        Self(XxHash3_128::oneshot_with_seed(Self::seed(space, hash), payload).to_le_bytes())
    }

    /// The seed of a block's checksum: the first eight bytes of space id and block hash, little endian, xored.
    pub fn seed(space: &SpaceId, hash: &BlockHash) -> u64 {
        let first = |bytes: &[u8; 32]| {
            bytes[..8].iter().rev().fold(0u64, |value, byte| (value << 8) | u64::from(*byte))
        };
        first(&space.0) ^ first(&hash.0)
    }

    /// `n × 16` bytes from the wire.
    ///
    /// # Errors
    /// When there are not exactly `count` checksums.
    pub fn parse_list(bytes: &[u8], count: usize) -> Result<Vec<Self>, Invalid> {
        let (sums, rest) = bytes.as_chunks::<16>();
        if !rest.is_empty() || sums.len() != count {
            return Err(Invalid::Length {
                field: "checksums",
                actual: bytes.len(),
                expected: "16 for each leased block",
            });
        }
        Ok(sums.iter().map(|sum| Self(*sum)).collect())
    }
}

impl TryFrom<&[u8]> for Checksum {
    type Error = Invalid;

    fn try_from(bytes: &[u8]) -> Result<Self, Invalid> {
        bytes.try_into().map(Self).map_err(|_| Invalid::Length {
            field: "checksum",
            actual: bytes.len(),
            expected: "16",
        })
    }
}

/// Checks a block while it arrives in pieces, so that verification costs no second pass at the end.
pub struct StreamingChecksum(twox_hash::xxhash3_128::Hasher);

impl StreamingChecksum {
    /// Starts a block.
    pub fn new(space: &SpaceId, hash: &BlockHash) -> Self {
        Self(twox_hash::xxhash3_128::Hasher::with_seed(Checksum::seed(space, hash)))
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    /// The checksum of all bytes added so far.
    pub fn finish(&self) -> Checksum {
        Checksum(self.0.finish_128().to_le_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn streaming_equals_one_pass_and_any_flip_is_seen(
            payload in proptest::collection::vec(any::<u8>(), 1..5000),
            cut in any::<prop::sample::Index>(),
            bit in any::<prop::sample::Index>(),
        ) {
            let (space, hash) = (SpaceId([3; 32]), BlockHash([9; 32]));
            let whole = Checksum::of(&space, &hash, &payload);
            let (left, right) = payload.split_at(cut.index(payload.len()));
            let mut streaming = StreamingChecksum::new(&space, &hash);
            streaming.update(left);
            streaming.update(right);
            prop_assert_eq!(streaming.finish(), whole);
            let mut bad = payload.clone();
            let bit = bit.index(8 * payload.len());
            bad[bit / 8] ^= 1 << (bit % 8);
            prop_assert_ne!(Checksum::of(&space, &hash, &bad), whole);
            prop_assert_ne!(Checksum::of(&space, &BlockHash([8; 32]), &payload), whole);
        }
    }
}
