//! Least recently used first.

use super::{List, Nodes, Policy};
use crate::index::EntryId;

#[derive(Default)]
pub(super) struct Lru(List);

impl Policy for Lru {
    fn insert(&mut self, nodes: &mut Nodes, id: EntryId) {
        self.0.push_newest(nodes, id);
    }

    fn touch(&mut self, nodes: &mut Nodes, id: EntryId) {
        self.0.unlink(nodes, id);
        self.0.push_newest(nodes, id);
    }

    fn remove(&mut self, nodes: &mut Nodes, id: EntryId) {
        self.0.unlink(nodes, id);
    }

    fn victim(&self, nodes: &Nodes, may_leave: &dyn Fn(EntryId) -> bool) -> Option<EntryId> {
        self.0.iter(nodes).find(|id| may_leave(*id))
    }

    fn len(&self) -> usize {
        self.0.len()
    }
}
