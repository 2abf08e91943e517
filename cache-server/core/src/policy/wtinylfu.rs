//! W-TinyLFU (Einziger and others, ACM TOS 2017): a small recency window in front of a segmented main cache; a block that leaves
//! the window takes a place in the main cache only if it was asked for more often than the one that it would
//! replace. Frequencies are exact and halved after ten touches for each block of capacity.

use super::ghosts::spread;
use super::{Blocks, Left, List, Member, Nodes, Policy};
use crate::index::EntryId;
use hashbrown::HashTable;

const WINDOW: u8 = 0;
const PROBATION: u8 = 1;
const PROTECTED: u8 = 2;

/// Touches between two halvings, for each block of capacity.
const SAMPLE: u64 = 10;

pub(super) struct WTinyLfu {
    lists: [List; 3],
    capacity: usize,
    frequencies: HashTable<(u64, u32)>,
    touches: u64,
}

impl WTinyLfu {
    pub(super) fn new(capacity: usize) -> Self {
        Self { lists: Default::default(), capacity, frequencies: HashTable::new(), touches: 0 }
    }

    fn window_capacity(&self) -> usize {
        (self.capacity / 100).max(1)
    }

    fn protected_capacity(&self) -> usize {
        self.capacity.saturating_sub(self.window_capacity()) * 4 / 5
    }

    fn count(&mut self, key: u64) {
        match self.frequencies.find_mut(spread(key), |(other, _)| *other == key) {
            Some((_, count)) => *count += 1,
            None => {
                self.frequencies.insert_unique(spread(key), (key, 1), |(key, _)| spread(*key));
            }
        }
        self.touches += 1;
    }

    fn frequency(&self, key: u64) -> u32 {
        self.frequencies.find(spread(key), |(other, _)| *other == key).map_or(0, |(_, count)| *count)
    }

    fn shift(&mut self, nodes: &mut Nodes, id: EntryId, to: u8) {
        let from = nodes[id].list();
        nodes[id].set_list(to);
        self.lists[from as usize].unlink(nodes, id);
        self.lists[to as usize].push_newest(nodes, id);
    }
}

impl Policy for WTinyLfu {
    fn resize(&mut self, capacity: usize) {
        self.capacity = capacity;
    }

    fn insert(&mut self, nodes: &mut Nodes, member: Member) {
        self.count(member.key);
        nodes.reset(member.id).set_list(WINDOW);
        self.lists[WINDOW as usize].push_newest(nodes, member.id);
    }

    fn touch(&mut self, nodes: &mut Nodes, member: Member) {
        self.count(member.key);
        match nodes[member.id].list() {
            WINDOW => self.shift(nodes, member.id, WINDOW),
            _ => self.shift(nodes, member.id, PROTECTED),
        }
        while self.lists[PROTECTED as usize].len() > self.protected_capacity()
            && let Some(id) = self.lists[PROTECTED as usize].oldest()
        {
            self.shift(nodes, id, PROBATION);
        }
    }

    fn remove(&mut self, nodes: &mut Nodes, member: Member, _left: Left) {
        let list = nodes[member.id].list();
        self.lists[list as usize].unlink(nodes, member.id);
    }

    fn victim(&mut self, nodes: &mut Nodes, blocks: &dyn Blocks) -> Option<EntryId> {
        let [window, probation, protected] = &self.lists;
        let main = probation.oldest_leaving(nodes, blocks);
        let main = main.or_else(|| protected.oldest_leaving(nodes, blocks));
        let full = window.len() > self.window_capacity();
        let candidate = window.iter(nodes).find(|id| blocks.may_be_refused(*id));
        match (candidate.filter(|_| full), main) {
            (Some(candidate), Some(main)) => {
                if self.frequency(blocks.key(candidate)) > self.frequency(blocks.key(main)) {
                    self.shift(nodes, candidate, PROBATION);
                    return Some(main);
                }
                Some(candidate)
            }
            (candidate, main) => {
                candidate.or(main).or_else(|| self.lists[WINDOW as usize].oldest_leaving(nodes, blocks))
            }
        }
    }

    fn settle(&mut self, nodes: &mut Nodes) {
        while self.lists[WINDOW as usize].len() > self.window_capacity()
            && let Some(id) = self.lists[WINDOW as usize].oldest()
        {
            self.shift(nodes, id, PROBATION);
        }
        if self.touches >= SAMPLE * self.capacity as u64 {
            self.touches = 0;
            self.frequencies.retain(|(_, count)| {
                *count /= 2;
                *count > 0
            });
        }
    }

    fn len(&self) -> usize {
        self.lists.iter().map(List::len).sum()
    }
}
