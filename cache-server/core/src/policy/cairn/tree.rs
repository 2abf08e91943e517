//! The tree of resident blocks that segments are runs of: planting, cutting, and what happens when a block goes.

use super::segments::NONE;
use super::{Cairn, How};
use crate::index::EntryId;
use crate::policy::{Member, Node, Nodes};

impl Cairn {
    /// A request takes blocks from the top of segments, as they follow each other there. Where it does not (parts of the chain are
    /// elsewhere, or came back one by one), the segment is cut up first, and its blocks follow the request from now on.
    pub(super) fn straighten(&mut self, nodes: &mut Nodes, chain: &[(Member, How)]) {
        for (at, (member, how)) in chain.iter().enumerate() {
            if *how == How::Inserted {
                continue;
            }
            let before = at.checked_sub(1).map(|before| chain[before].0.id);
            let parent = nodes.parent(member.id);
            let segment = nodes[member.id].segment();
            let follows = match (parent, before) {
                (Some(parent), Some(before)) => parent == before,
                // The first of its segment may hang anywhere.
                (Some(parent), None) => nodes[parent].segment() != segment,
                (None, before) => before.is_none(),
            };
            let same_as_before = before
                .is_some_and(|before| chain[at - 1].1 != How::Inserted && nodes[before].segment() == segment);
            let top = parent.is_none_or(|parent| nodes[parent].segment() != segment);
            if follows && (top || same_as_before) {
                continue;
            }
            self.cut_out(nodes, segment, member.id);
            if let Some(before) = before {
                self.hang(nodes, member.id, before);
            }
        }
    }

    /// Makes a block of a segment a segment of its own, and what is below it another.
    fn cut_out(&mut self, nodes: &mut Nodes, segment: u32, id: EntryId) {
        self.cut_below(nodes, segment, id);
        if self.segments[segment].resident == 1 {
            return;
        }
        // Now it is the deepest of the segment, and what is above it becomes another.
        let Some(above) = nodes.parent(id) else { return };
        let rest = self.segments[segment].resident - 1;
        let upper = self.clone_of(segment, (above, rest));
        let mut next = Some(above);
        while let Some(block) = next.filter(|block| nodes[*block].segment() == segment) {
            nodes[block].set_segment(upper);
            next = nodes.parent(block);
        }
    }

    /// A segment with the past of another, from which it takes blocks. They were used when the other was, as far as anybody can
    /// tell later: as of now.
    fn clone_of(&mut self, segment: u32, (bottom, blocks): (EntryId, u16)) -> u32 {
        let new = self.segments.create(self.now);
        let old = self.segments[segment];
        let place = &mut self.segments[new];
        (place.uses, place.class, place.len, place.resident) = (old.uses, old.class, old.len, blocks);
        place.set_gap(old.gap());
        place.set_marks(old.kind().marks[0], false);
        place.set_recent(true);
        place.set_bottom(bottom);
        self.segments.recent_blocks += u64::from(blocks);
        if old.recent() {
            self.segments.recent_blocks -= u64::from(blocks);
        }
        self.segments[segment].resident -= blocks;
        new
    }

    /// What is below a block in its segment becomes a segment of its own, with the ghost; the block is the deepest of its segment
    /// then.
    fn cut_below(&mut self, nodes: &mut Nodes, segment: u32, id: EntryId) {
        let Some(bottom) = self.segments[segment].bottom().filter(|bottom| *bottom != id) else { return };
        let mut below = Vec::new();
        let mut next = Some(bottom);
        while let Some(block) = next.filter(|block| *block != id) {
            below.push(block);
            next = nodes.parent(block).filter(|parent| nodes[*parent].segment() == segment);
        }
        debug_assert!(next.is_some(), "a block that is not on the path of its segment");
        let deep = self.clone_of(segment, (bottom, below.len() as u16));
        below.iter().for_each(|block| nodes[*block].set_segment(deep));
        if self.segments[segment].is_leaf() {
            self.segments.remove_leaf(segment);
            self.segments.add_leaf(deep);
        }
        self.segments[segment].set_bottom(id);
    }

    /// Makes one block the parent of another.
    fn hang(&mut self, nodes: &mut Nodes, id: EntryId, parent: EntryId) {
        if let Some(old) = nodes.parent(id)
            && nodes.lose_child(old) == 0
        {
            let segment = nodes[old].segment();
            if segment != NONE && self.segments[segment].bottom() == Some(old) {
                self.segments.add_leaf(segment);
            }
        }
        nodes.adopt(id, parent);
        let segment = nodes[parent].segment();
        if segment != NONE && self.segments[segment].bottom() == Some(parent) {
            self.segments.remove_leaf(segment);
        }
    }

    /// The deepest block of a segment left for want of room: it becomes part of the segment's ghost.
    pub(super) fn shorten(&mut self, nodes: &mut Nodes, segment: u32, member: Member) {
        if self.segments[segment].ghosts > 0 {
            self.segments.unindex(segment);
        }
        let key = member.key as u32;
        let place = &mut self.segments[segment];
        if place.ghosts == 0 {
            place.last_ghost = key;
        }
        place.first_ghost = key;
        place.ghosts += 1;
        place.resident -= 1;
        let left = place.resident;
        self.segments.ghost_blocks += 1;
        self.segments.index(segment);
        self.uproot(nodes, (segment, left), member.id);
        if left == 0 {
            self.segments.remove_leaf(segment);
            self.segments.list_ghost(segment);
        }
    }

    /// The deepest block of a segment is gone: its parent may be a leaf now.
    fn uproot(&mut self, nodes: &mut Nodes, (segment, left): (u32, u16), id: EntryId) {
        let parent = nodes.parent(id);
        if nodes[id].children() > 0 {
            nodes.orphan_children(id);
        }
        nodes.clear(id);
        let children = parent.map(|parent| nodes.lose_child(parent));
        match (parent, left) {
            (Some(parent), 1..) => {
                self.segments[segment].set_bottom(parent);
                if children != Some(0) {
                    self.segments.remove_leaf(segment);
                }
            }
            (Some(parent), 0) if children == Some(0) => self.segments.add_leaf(nodes[parent].segment()),
            _ => {}
        }
    }

    /// A block is gone for another reason than want of room: what is below it becomes a segment of its own, without parent.
    pub(super) fn take_away(&mut self, nodes: &mut Nodes, segment: u32, id: EntryId) {
        self.cut_below(nodes, segment, id);
        if self.segments[segment].recent() {
            self.segments.recent_blocks -= 1;
        }
        self.segments[segment].resident -= 1;
        let left = self.segments[segment].resident;
        self.uproot(nodes, (segment, left), id);
        if left == 0 {
            self.segments.empty(segment);
        }
    }
}

/// What a block keeps: its segment, its parent, and how many resident blocks follow it.
impl Nodes {
    pub(super) fn plant(&mut self, id: EntryId, parent: Option<EntryId>) {
        self.clear(id);
        if let Some(parent) = parent {
            self.adopt(id, parent);
        }
    }

    pub(super) fn adopt(&mut self, id: EntryId, parent: EntryId) {
        self[id].newer = parent.0;
        self[parent].word += 1;
    }

    /// Looks at every block: for the rare one that goes before its children.
    fn orphan_children(&mut self, id: EntryId) {
        let children = self.all_mut().filter(|node| node.newer == id.0 && node.segment() != NONE);
        children.for_each(|node| node.newer = NONE);
    }

    pub(super) fn clear(&mut self, id: EntryId) {
        let node = self.reset(id);
        (node.older, node.newer) = (NONE, NONE);
    }

    pub(super) fn parent(&self, id: EntryId) -> Option<EntryId> {
        let parent = self[id].newer;
        (parent != NONE).then_some(EntryId(parent))
    }

    /// Children that are left.
    fn lose_child(&mut self, id: EntryId) -> u32 {
        self[id].word -= 1;
        self[id].word
    }
}

impl Node {
    pub(super) fn segment(&self) -> u32 {
        self.older
    }

    pub(super) fn set_segment(&mut self, segment: u32) {
        self.older = segment;
    }

    pub(super) fn children(&self) -> u32 {
        self.word
    }
}
