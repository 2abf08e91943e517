//! Least recently used first.

use super::{Blocks, Left, List, Member, Nodes, Policy};
use crate::index::EntryId;

#[derive(Default)]
pub(super) struct Lru(List);

impl Policy for Lru {
    fn insert(&mut self, nodes: &mut Nodes, member: Member) {
        self.0.push_newest(nodes, member.id);
    }

    fn touch(&mut self, nodes: &mut Nodes, member: Member) {
        self.0.renew(nodes, member.id);
    }

    fn remove(&mut self, nodes: &mut Nodes, member: Member, _left: Left) {
        self.0.unlink(nodes, member.id);
    }

    fn victim(&mut self, nodes: &mut Nodes, blocks: &dyn Blocks) -> Option<EntryId> {
        self.0.oldest_leaving(nodes, blocks)
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}
