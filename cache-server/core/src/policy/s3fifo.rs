//! S3-FIFO (Yang and others, SOSP 2023): a small queue that most blocks leave unused, a main queue with second chances, and a
//! memory of what left the small queue.

use super::{Blocks, Ghosts, Left, List, Member, Nodes, Policy};
use crate::index::EntryId;

const SMALL: u8 = 0;
const MAIN: u8 = 1;

/// Uses beyond this are not told apart.
const MAX_COUNT: u32 = 3;

enum Step {
    Victim(EntryId),
    Moved,
    Nothing,
}

pub(super) struct S3Fifo {
    lists: [List; 2],
    ghosts: Ghosts,
    small_capacity: usize,
    ghost_capacity: usize,
}

impl S3Fifo {
    pub(super) fn new(capacity: usize) -> Self {
        let (small_capacity, ghost_capacity) = shares(capacity);
        Self { lists: Default::default(), ghosts: Ghosts::default(), small_capacity, ghost_capacity }
    }

    /// A step in the small queue: its oldest block that may leave, unless that was used again and moves to the main queue.
    fn leaving_small(&mut self, nodes: &mut Nodes, blocks: &dyn Blocks) -> Step {
        let Some(id) = self.lists[SMALL as usize].oldest_leaving(nodes, blocks) else { return Step::Nothing };
        if nodes[id].count() <= 1 {
            return Step::Victim(id);
        }
        self.lists[SMALL as usize].unlink(nodes, id);
        let node = &mut nodes[id];
        node.set_count(0);
        node.set_list(MAIN);
        self.lists[MAIN as usize].push_newest(nodes, id);
        Step::Moved
    }

    /// Gives used blocks another round until an unused one can leave.
    fn leaving_main(&mut self, nodes: &mut Nodes, blocks: &dyn Blocks) -> Option<EntryId> {
        let list = &mut self.lists[MAIN as usize];
        let mut next = list.oldest();
        // Each round takes one use of each block.
        for _ in 0..list.len() * (MAX_COUNT as usize + 1) {
            let id = next?;
            next = nodes.newer(id);
            if !blocks.may_leave(id) {
                continue;
            }
            if nodes[id].count() == 0 {
                return Some(id);
            }
            let count = nodes[id].count();
            nodes[id].set_count(count - 1);
            list.renew(nodes, id);
            next = next.or(list.oldest());
        }
        None
    }
}

/// A tenth for the small queue, and as many ghosts as the main queue has blocks.
fn shares(capacity: usize) -> (usize, usize) {
    let small = (capacity / 10).max(1);
    (small, capacity.saturating_sub(small))
}

impl Policy for S3Fifo {
    fn resize(&mut self, capacity: usize) {
        (self.small_capacity, self.ghost_capacity) = shares(capacity);
        self.ghosts.trim(self.ghost_capacity);
    }

    fn insert(&mut self, nodes: &mut Nodes, member: Member) {
        let list = if self.ghosts.take(member.key) { MAIN } else { SMALL };
        nodes.reset(member.id).set_list(list);
        self.lists[list as usize].push_newest(nodes, member.id);
    }

    fn touch(&mut self, nodes: &mut Nodes, member: Member) {
        let node = &mut nodes[member.id];
        node.set_count((node.count() + 1).min(MAX_COUNT));
    }

    fn remove(&mut self, nodes: &mut Nodes, member: Member, left: Left) {
        let list = nodes[member.id].list();
        self.lists[list as usize].unlink(nodes, member.id);
        if list == SMALL && left == Left::Evicted {
            self.ghosts.push(member.key);
            self.ghosts.trim(self.ghost_capacity);
        }
    }

    fn victim(&mut self, nodes: &mut Nodes, blocks: &dyn Blocks) -> Option<EntryId> {
        loop {
            let small_first = self.lists[SMALL as usize].len() > self.small_capacity;
            let small = if small_first { self.leaving_small(nodes, blocks) } else { Step::Nothing };
            let step = match small {
                Step::Nothing => self
                    .leaving_main(nodes, blocks)
                    .map_or_else(|| self.leaving_small(nodes, blocks), Step::Victim),
                step => step,
            };
            match step {
                Step::Victim(id) => return Some(id),
                Step::Moved => {}
                Step::Nothing => return None,
            }
        }
    }

    fn len(&self) -> usize {
        self.lists.iter().map(List::len).sum()
    }
}
