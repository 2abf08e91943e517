//! Oldest insertion first; use does not matter.

use super::{List, Nodes, Policy};
use crate::index::EntryId;

#[derive(Default)]
pub(super) struct Fifo(List);

impl Policy for Fifo {
    fn insert(&mut self, nodes: &mut Nodes, id: EntryId) {
        self.0.push_newest(nodes, id);
    }

    fn touch(&mut self, _nodes: &mut Nodes, _id: EntryId) {}

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
