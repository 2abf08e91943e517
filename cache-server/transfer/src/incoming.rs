//! The receiving end of a block, in a client's fetch and in a server's publish alike.

use cairn_proto::{BlockHash, Checksum, SpaceId, StreamingChecksum};
use thiserror::Error;

/// A piece that cannot belong to its block.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PieceError {
    /// Pieces of a block must follow each other without gap or overlap.
    #[error("piece at offset {offset} where {expected} was due")]
    OutOfOrder {
        /// Where the piece says it starts.
        offset: u64,
        /// Where the next piece must start.
        expected: u64,
    },
    /// A piece must carry something.
    #[error("an empty piece")]
    Empty,
    /// The pieces add up to more than the block.
    #[error("the pieces reach byte {end} of a block of {len} bytes")]
    TooLong {
        /// One past the last byte offered.
        end: u64,
        /// Size of the block.
        len: u64,
    },
}

/// One block on its way in.
pub struct Incoming {
    received: u64,
    checksum: StreamingChecksum,
}

impl Incoming {
    /// Nothing received yet.
    pub fn new(space: &SpaceId, hash: &BlockHash) -> Self {
        Self { received: 0, checksum: StreamingChecksum::new(space, hash) }
    }

    /// Stores one piece and adds it to the checksum while it is in the CPU cache.
    ///
    /// # Errors
    /// When the piece is not the next one, or too long; nothing is stored then.
    pub fn accept(&mut self, offset: u64, data: &[u8], target: &mut [u8]) -> Result<(), PieceError> {
        self.room(offset, data.len(), target)?.copy_from_slice(data);
        self.add(data);
        Ok(())
    }

    /// Where in the target the next piece goes: for a caller that reads it there and then calls [`Self::add`].
    ///
    /// # Errors
    /// When the piece is not the next one, or too long.
    pub fn room<'a>(
        &self,
        offset: u64,
        len: usize,
        target: &'a mut [u8],
    ) -> Result<&'a mut [u8], PieceError> {
        if len == 0 {
            return Err(PieceError::Empty);
        }
        if offset != self.received {
            return Err(PieceError::OutOfOrder { offset, expected: self.received });
        }
        let end = offset.saturating_add(len as u64);
        let whole = target.len() as u64;
        if end > whole {
            return Err(PieceError::TooLong { end, len: whole });
        }
        Ok(&mut target[offset as usize..end as usize])
    }

    /// Adds the next bytes of the block to the checksum.
    pub fn add(&mut self, data: &[u8]) {
        self.checksum.update(data);
        self.received += data.len() as u64;
    }

    /// Bytes so far.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// The checksum, once all `len` bytes arrived.
    pub fn finish(&self, len: u64) -> Option<Checksum> {
        (self.received == len).then(|| self.checksum.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack;
    use bytes::Bytes;
    use proptest::prelude::*;

    fn blocks() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let size = prop_oneof![1usize..2000, 900_000usize..2_500_000];
        proptest::collection::vec(size.prop_map(|n| (0..n).map(|i| (i * 31 % 251) as u8).collect()), 1..6)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20))]
        #[test]
        fn what_is_packed_arrives(blocks in blocks()) {
            let space = SpaceId([1; 32]);
            let hash = |i: usize| BlockHash([i as u8; 32]);
            let mut targets: Vec<Vec<u8>> = blocks.iter().map(|block| vec![0; block.len()]).collect();
            let mut incoming: Vec<_> = (0..blocks.len()).map(|i| Incoming::new(&space, &hash(i))).collect();
            let sent = blocks.iter().enumerate().map(|(i, block)| (i as u32, Bytes::from(block.clone())));
            for pieces in pack(sent) {
                let bytes: usize = pieces.iter().map(|piece| piece.data.len()).sum();
                prop_assert!(bytes <= cairn_proto::limits::CHUNK_BYTES);
                for piece in pieces {
                    let i = piece.block as usize;
                    incoming[i].accept(piece.offset, &piece.data, targets[i].as_mut_slice()).unwrap();
                }
            }
            for (i, block) in blocks.iter().enumerate() {
                prop_assert_eq!(&targets[i], block);
                prop_assert_eq!(incoming[i].finish(block.len() as u64), Some(Checksum::of(&space, &hash(i), block)));
            }
        }
    }

    #[test]
    fn gaps_overlaps_and_excess_are_refused_and_store_nothing() {
        let mut target = [0u8; 4];
        let mut incoming = Incoming::new(&SpaceId([0; 32]), &BlockHash([0; 32]));
        let early = incoming.accept(1, &[9], &mut target[..]);
        assert_eq!(early, Err(PieceError::OutOfOrder { offset: 1, expected: 0 }));
        let long = incoming.accept(0, &[9; 5], &mut target[..]);
        assert_eq!(long, Err(PieceError::TooLong { end: 5, len: 4 }));
        assert_eq!(target, [0; 4]);
        incoming.accept(0, &[1, 2, 3], &mut target[..]).unwrap();
        assert_eq!(incoming.finish(4), None);
        assert!(incoming.accept(2, &[7], &mut target[..]).is_err());
    }
}
