//! Intrusive doubly linked lists over entry ids, and the few words that a policy remembers of each block: constant
//! time, no allocation a block.

use crate::index::EntryId;

const NONE: u32 = u32::MAX;

/// What a policy keeps of one block. Its meaning belongs to the policy.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    older: u32,
    newer: u32,
    /// Uses, or what stands for them.
    pub count: u32,
    /// Which list of its policy the block is in.
    pub list: u8,
}

const EMPTY: Node = Node { older: NONE, newer: NONE, count: 0, list: 0 };

/// Nodes of all blocks, indexed by entry id.
#[derive(Default)]
pub struct Nodes(Vec<Node>);

impl Nodes {
    fn slot(&mut self, id: u32) -> &mut Node {
        let needed = id as usize + 1;
        if self.0.len() < needed {
            self.0.resize(needed, EMPTY);
        }
        &mut self.0[id as usize]
    }

    /// Forgets what was kept of an earlier block with this id.
    pub fn reset(&mut self, id: EntryId) -> &mut Node {
        let node = self.slot(id.0);
        *node = EMPTY;
        node
    }

    /// The block that entered its list right after this one.
    pub fn newer(&self, id: EntryId) -> Option<EntryId> {
        let newer = self[id].newer;
        (newer != NONE).then_some(EntryId(newer))
    }
}

impl std::ops::Index<EntryId> for Nodes {
    type Output = Node;

    fn index(&self, id: EntryId) -> &Node {
        &self.0[id.0 as usize]
    }
}

impl std::ops::IndexMut<EntryId> for Nodes {
    fn index_mut(&mut self, id: EntryId) -> &mut Node {
        &mut self.0[id.0 as usize]
    }
}

/// A list from oldest to newest.
pub struct List {
    oldest: u32,
    newest: u32,
    len: usize,
}

impl Default for List {
    fn default() -> Self {
        Self { oldest: NONE, newest: NONE, len: 0 }
    }
}

impl List {
    /// Blocks in the list.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Adds a block that is in no list.
    pub fn push_newest(&mut self, nodes: &mut Nodes, id: EntryId) {
        let node = nodes.slot(id.0);
        (node.older, node.newer) = (self.newest, NONE);
        match self.newest {
            NONE => self.oldest = id.0,
            newest => nodes.0[newest as usize].newer = id.0,
        }
        self.newest = id.0;
        self.len += 1;
    }

    /// Takes a block out that is in this list.
    pub fn unlink(&mut self, nodes: &mut Nodes, id: EntryId) {
        let Node { older, newer, .. } = nodes[id];
        match older {
            NONE => self.oldest = newer,
            older => nodes.0[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => nodes.0[newer as usize].older = older,
        }
        self.len -= 1;
    }

    /// Makes a block of this list its newest.
    pub fn renew(&mut self, nodes: &mut Nodes, id: EntryId) {
        self.unlink(nodes, id);
        self.push_newest(nodes, id);
    }

    /// The oldest block.
    pub fn oldest(&self) -> Option<EntryId> {
        (self.oldest != NONE).then_some(EntryId(self.oldest))
    }

    /// From oldest to newest.
    pub fn iter<'a>(&self, nodes: &'a Nodes) -> impl Iterator<Item = EntryId> + use<'a> {
        std::iter::successors(self.oldest(), |id| nodes.newer(*id))
    }

    /// The oldest block that may leave.
    pub fn oldest_leaving(&self, nodes: &Nodes, blocks: &dyn super::Blocks) -> Option<EntryId> {
        self.iter(nodes).find(|id| blocks.may_leave(*id))
    }
}
