//! Intrusive doubly linked lists over entry ids, and the few words that a policy remembers of each block: constant
//! time, no allocation a block.

use crate::index::EntryId;

const NONE: u32 = u32::MAX;

/// What a policy keeps of one block. Its meaning belongs to the policy.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    pub(super) older: u32,
    pub(super) newer: u32,
    /// A count and a list, for policies that are made of lists.
    pub(super) word: u32,
}

const EMPTY: Node = Node { older: NONE, newer: NONE, word: 0 };

/// Counts end here.
const MAX_COUNT: u32 = (1 << 24) - 1;

impl Node {
    /// Uses, or what stands for them.
    pub const fn count(&self) -> u32 {
        self.word >> 8
    }

    /// Sets the count, as far as it goes.
    pub fn set_count(&mut self, count: u32) {
        self.word = count.min(MAX_COUNT) << 8 | self.word & 0xff;
    }

    /// Which list of its policy the block is in.
    pub const fn list(&self) -> u8 {
        self.word as u8
    }

    /// Sets the list.
    pub fn set_list(&mut self, list: u8) {
        self.word = self.word & !0xff | list as u32;
    }
}

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

    /// All of them, those without a block included.
    pub(super) fn all_mut(&mut self) -> impl Iterator<Item = &mut Node> {
        self.0.iter_mut()
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
