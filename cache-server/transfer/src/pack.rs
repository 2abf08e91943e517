//! The sending end of the gRPC wire: blocks become messages of bounded size, without copying their bytes.

use bytes::Bytes;
use cairn_proto::{limits, pb};

/// Packs `(position, bytes)` blocks into messages of at most [`limits::CHUNK_BYTES`] of payload: large blocks are split,
/// small ones share a message.
pub fn pack<I: Iterator<Item = (u32, Bytes)>>(blocks: I) -> Pack<I> {
    Pack { blocks, rest: None }
}

/// See [`pack`].
pub struct Pack<I> {
    blocks: I,
    /// A block that is partly sent: position, next offset, remaining bytes.
    rest: Option<(u32, u64, Bytes)>,
}

impl<I: Iterator<Item = (u32, Bytes)>> Iterator for Pack<I> {
    type Item = Vec<pb::BlockPiece>;

    fn next(&mut self) -> Option<Vec<pb::BlockPiece>> {
        let mut pieces = Vec::new();
        let mut room = limits::CHUNK_BYTES;
        while room > 0 {
            let next =
                self.rest.take().or_else(|| self.blocks.next().map(|(block, bytes)| (block, 0, bytes)));
            let Some((block, offset, mut bytes)) = next else {
                break;
            };
            let data = bytes.split_to(bytes.len().min(room));
            room -= data.len();
            let after = offset + data.len() as u64;
            pieces.push(pb::BlockPiece { block, offset, data });
            if !bytes.is_empty() {
                self.rest = Some((block, after, bytes));
            }
        }
        (!pieces.is_empty()).then_some(pieces)
    }
}
