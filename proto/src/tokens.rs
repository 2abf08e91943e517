//! From token ids to the chain of block hashes: the only place where tokens are cut into blocks.

use crate::{BlockHash, BlockHasher, ExtraKey, KeySpace, Parent};

/// The chain of a prompt: one hash for each *full* block; the tail that fills no block has none.
///
/// `extra_keys(i)` gives the extra keys of block `i`. Workers that use neither LoRA nor media pass `|_| &[]`.
pub fn chain<'a>(
    space: &KeySpace,
    tokens: &[u32],
    mut extra_keys: impl FnMut(usize) -> &'a [ExtraKey],
) -> Vec<BlockHash> {
    let hasher = BlockHasher::default();
    let id = space.id();
    let mut hashes: Vec<BlockHash> = Vec::with_capacity(tokens.len() / space.layout().block_tokens());
    for (index, block) in tokens.chunks_exact(space.layout().block_tokens()).enumerate() {
        let parent = hashes.last().map_or(Parent::Root(&id), Parent::Block);
        hashes.push(hasher.hash(parent, block, extra_keys(index)));
    }
    hashes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::space;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn chains_agree_exactly_on_the_shared_full_blocks(
            shared in proptest::collection::vec(0u32..50_000, 0..200),
            left in proptest::collection::vec(0u32..50_000, 0..60),
            right in proptest::collection::vec(50_000u32..60_000, 1..60),
        ) {
            let space = space("t", 16);
            let a: Vec<u32> = shared.iter().chain(&left).copied().collect();
            let b: Vec<u32> = shared.iter().chain(&right).copied().collect();
            let (a, b) = (chain(&space, &a, |_| &[]), chain(&space, &b, |_| &[]));
            let common = a.iter().zip(&b).take_while(|(x, y)| x == y).count();
            prop_assert_eq!(common, (shared.len() / 16).min(a.len()).min(b.len()));
            for (x, y) in a.iter().zip(&b).skip(common) {
                prop_assert_ne!(x, y);
            }
        }
    }

    #[test]
    fn everything_that_matters_changes_the_hash() {
        let tokens: Vec<u32> = (0..16).collect();
        let base = chain(&space("t", 16), &tokens, |_| &[])[0];
        let other_tenant = chain(&space("u", 16), &tokens, |_| &[])[0];
        let lora = [ExtraKey::Lora("x".into())];
        let media = [ExtraKey::Media(b"x".to_vec())];
        let with_lora = chain(&space("t", 16), &tokens, |_| &lora)[0];
        let with_media = chain(&space("t", 16), &tokens, |_| &media)[0];
        let all = [base, other_tenant, with_lora, with_media];
        for (i, x) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|y| x != y));
        }
    }
}
