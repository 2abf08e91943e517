//! SIEVE (Zhang and others, NSDI 2024): insertion order, and a hand that walks from old to new; it spares a block that was
//! used since it last came by, once.

use super::{Blocks, Left, List, Member, Nodes, Policy};
use crate::index::EntryId;

#[derive(Default)]
pub(super) struct Sieve {
    list: List,
    /// Where the hand looks next; at the oldest block when absent.
    hand: Option<EntryId>,
}

impl Policy for Sieve {
    fn insert(&mut self, nodes: &mut Nodes, member: Member) {
        nodes.reset(member.id);
        self.list.push_newest(nodes, member.id);
    }

    fn touch(&mut self, nodes: &mut Nodes, member: Member) {
        nodes[member.id].set_count(1);
    }

    fn remove(&mut self, nodes: &mut Nodes, member: Member, _left: Left) {
        if self.hand == Some(member.id) {
            self.hand = nodes.newer(member.id);
        }
        self.list.unlink(nodes, member.id);
    }

    fn victim(&mut self, nodes: &mut Nodes, blocks: &dyn Blocks) -> Option<EntryId> {
        // Once round to clear every mark, once more to find a block without one.
        for _ in 0..2 * self.list.len() {
            let id = self.hand.or(self.list.oldest())?;
            let leaves = blocks.may_leave(id);
            if leaves && nodes[id].count() == 0 {
                self.hand = Some(id);
                return Some(id);
            }
            if leaves {
                nodes[id].set_count(0);
            }
            self.hand = nodes.newer(id);
        }
        None
    }

    fn len(&self) -> usize {
        self.list.len()
    }
}
