//! ARC (Megiddo and Modha, FAST 2003): blocks used once and blocks used more often in two recency lists, whose shares follow
//! the returns of what left each of them. Victims are chosen when room is needed, not at each insertion, so that one
//! request counts as one.

use super::{Blocks, Ghosts, Left, List, Member, Nodes, Policy};
use crate::index::EntryId;

const ONCE: u8 = 0;
const OFTEN: u8 = 1;

pub(super) struct Arc {
    lists: [List; 2],
    /// What left each list.
    ghosts: [Ghosts; 2],
    capacity: usize,
    /// Blocks that the first list should have.
    target: f64,
}

impl Arc {
    pub(super) fn new(capacity: usize) -> Self {
        Self { lists: Default::default(), ghosts: Default::default(), capacity, target: 0.0 }
    }

    /// Moves the target towards the list whose leaver came back. Says whether one did.
    fn came_back(&mut self, key: u64) -> bool {
        let [once, often] = [self.ghosts[0].len() as f64, self.ghosts[1].len() as f64];
        if self.ghosts[ONCE as usize].take(key) {
            self.target = (self.target + (often / once).max(1.0)).min(self.capacity as f64);
            return true;
        }
        if self.ghosts[OFTEN as usize].take(key) {
            self.target = (self.target - (once / often).max(1.0)).max(0.0);
            return true;
        }
        false
    }
}

impl Policy for Arc {
    fn resize(&mut self, capacity: usize) {
        self.capacity = capacity;
        self.target = self.target.min(capacity as f64);
    }

    fn insert(&mut self, nodes: &mut Nodes, member: Member) {
        let list = if self.came_back(member.key) { OFTEN } else { ONCE };
        nodes.reset(member.id).set_list(list);
        self.lists[list as usize].push_newest(nodes, member.id);
    }

    fn touch(&mut self, nodes: &mut Nodes, member: Member) {
        let list = nodes[member.id].list();
        nodes[member.id].set_list(OFTEN);
        self.lists[list as usize].unlink(nodes, member.id);
        self.lists[OFTEN as usize].push_newest(nodes, member.id);
    }

    fn remove(&mut self, nodes: &mut Nodes, member: Member, left: Left) {
        let list = nodes[member.id].list() as usize;
        self.lists[list].unlink(nodes, member.id);
        if left == Left::Evicted {
            self.ghosts[list].push(member.key);
            // As many as the other list's share: no more returns could be told from chance.
            self.ghosts[ONCE as usize].trim(self.capacity - self.target as usize);
            self.ghosts[OFTEN as usize].trim(self.capacity);
        }
    }

    fn victim(&mut self, nodes: &mut Nodes, blocks: &dyn Blocks) -> Option<EntryId> {
        let [once, often] = &self.lists;
        let first = if once.len() as f64 > self.target { [once, often] } else { [often, once] };
        first.iter().find_map(|list| list.oldest_leaving(nodes, blocks))
    }

    fn len(&self) -> usize {
        self.lists.iter().map(List::len).sum()
    }
}
