//! Least frequently used first; among equals, least recently used. Counts start at 1 when a block comes and are lost
//! when it leaves.

use super::{Blocks, Left, List, Member, Nodes, Policy};
use crate::index::EntryId;
use std::collections::BTreeMap;

#[derive(Default)]
pub(super) struct Lfu {
    /// Lists by count; none is empty.
    by_count: BTreeMap<u32, List>,
    len: usize,
}

impl Lfu {
    fn unlink(&mut self, nodes: &mut Nodes, id: EntryId) -> u32 {
        let count = nodes[id].count();
        if let Some(list) = self.by_count.get_mut(&count) {
            list.unlink(nodes, id);
            if list.is_empty() {
                self.by_count.remove(&count);
            }
        }
        count
    }

    fn link(&mut self, nodes: &mut Nodes, id: EntryId, count: u32) {
        nodes[id].set_count(count);
        self.by_count.entry(count).or_default().push_newest(nodes, id);
    }
}

impl Policy for Lfu {
    fn insert(&mut self, nodes: &mut Nodes, member: Member) {
        nodes.reset(member.id);
        self.link(nodes, member.id, 1);
        self.len += 1;
    }

    fn touch(&mut self, nodes: &mut Nodes, member: Member) {
        let count = self.unlink(nodes, member.id);
        self.link(nodes, member.id, count.saturating_add(1));
    }

    fn remove(&mut self, nodes: &mut Nodes, member: Member, _left: Left) {
        self.unlink(nodes, member.id);
        self.len -= 1;
    }

    fn victim(&mut self, nodes: &mut Nodes, blocks: &dyn Blocks) -> Option<EntryId> {
        self.by_count.values().find_map(|list| list.oldest_leaving(nodes, blocks))
    }

    fn len(&self) -> usize {
        self.len
    }
}
