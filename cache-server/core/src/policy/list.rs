//! Intrusive doubly linked lists over entry ids: constant time, no allocation a block.

use crate::index::EntryId;

const NONE: u32 = u32::MAX;

/// The links of one block.
#[derive(Clone, Copy, Debug)]
pub struct Node {
    older: u32,
    newer: u32,
}

/// Links of all blocks, indexed by entry id.
#[derive(Default)]
pub struct Nodes(Vec<Node>);

impl Nodes {
    fn slot(&mut self, id: u32) -> &mut Node {
        let needed = id as usize + 1;
        if self.0.len() < needed {
            self.0.resize(needed, Node { older: NONE, newer: NONE });
        }
        &mut self.0[id as usize]
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
        *nodes.slot(id.0) = Node { older: self.newest, newer: NONE };
        match self.newest {
            NONE => self.oldest = id.0,
            newest => nodes.0[newest as usize].newer = id.0,
        }
        self.newest = id.0;
        self.len += 1;
    }

    /// Takes a block out that is in this list.
    pub fn unlink(&mut self, nodes: &mut Nodes, id: EntryId) {
        let Node { older, newer } = nodes.0[id.0 as usize];
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

    /// From oldest to newest.
    pub fn iter<'a>(&self, nodes: &'a Nodes) -> impl Iterator<Item = EntryId> + use<'a> {
        let first = (self.oldest != NONE).then_some(self.oldest);
        std::iter::successors(first, |id| {
            let newer = nodes.0[*id as usize].newer;
            (newer != NONE).then_some(newer)
        })
        .map(EntryId)
    }
}
