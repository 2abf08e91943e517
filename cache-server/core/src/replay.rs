//! Caches that only count: one tier or two, driven by request traces. They use the very policies of the server, with the
//! semantics that published simulators of prefix caches share, so that hit rates can be compared to the block.
//!
//! A request is a chain of block keys, each naming its whole prefix. Its hits are its longest resident prefix, looked at
//! before anything changes. Then its first blocks (at most as many as fit) are touched or inserted, deepest first, and
//! the policy evicts until everything fits; blocks of the request itself stay.

use crate::PolicyKind;
use crate::index::EntryId;
use crate::policy::{Blocks, Left, Member, Nodes, Policy};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// One tier that counts.
pub struct Replay {
    policy: Box<dyn Policy>,
    nodes: Nodes,
    capacity: usize,
    resident: HashMap<u64, EntryId, BuildHasherDefault<Spread>>,
    slots: Slots,
    free: Vec<EntryId>,
}

/// Keys are spread already, or small numbers: one multiplication is enough.
#[derive(Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = crate::policy::spread(self.0 ^ key);
    }
}

#[derive(Default)]
struct Slots {
    keys: Vec<u64>,
    /// The request that last used each block; those of the present one stay.
    used: Vec<u64>,
    request: u64,
}

impl Blocks for Slots {
    fn may_leave(&self, id: EntryId) -> bool {
        self.used[id.0 as usize] != self.request
    }

    fn may_be_refused(&self, _id: EntryId) -> bool {
        true
    }

    fn key(&self, id: EntryId) -> u64 {
        self.keys[id.0 as usize]
    }
}

impl Replay {
    /// An empty tier of `capacity` blocks.
    pub fn new(kind: PolicyKind, capacity: usize) -> Self {
        Self {
            policy: kind.build(capacity),
            nodes: Nodes::default(),
            capacity,
            resident: HashMap::default(),
            slots: Slots::default(),
            free: Vec::new(),
        }
    }

    /// Blocks of the longest resident prefix.
    pub fn lookup(&self, chain: &[u64]) -> usize {
        chain.iter().take_while(|key| self.resident.contains_key(*key)).count()
    }

    /// Whether a block is resident.
    pub fn contains(&self, key: u64) -> bool {
        self.resident.contains_key(&key)
    }

    /// Resident blocks.
    pub fn len(&self) -> usize {
        self.resident.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.resident.is_empty()
    }

    /// Replays one request; returns the blocks that it hit. `evicted` gets what had to leave.
    pub fn request(&mut self, chain: &[u64], evicted: &mut Vec<u64>) -> usize {
        let hits = self.lookup(chain);
        self.begin();
        for key in chain.iter().take(self.capacity).rev() {
            self.put(*key);
        }
        self.shrink(evicted);
        self.policy.settle(&mut self.nodes);
        hits
    }

    /// A new request: blocks of the one before may leave.
    fn begin(&mut self) {
        self.slots.request += 1;
    }

    fn put(&mut self, key: u64) {
        if let Some(id) = self.resident.get(&key).copied() {
            self.slots.used[id.0 as usize] = self.slots.request;
            self.policy.touch(&mut self.nodes, Member { id, key });
            return;
        }
        let id = self.free.pop().unwrap_or(EntryId(self.slots.keys.len() as u32));
        let Slots { keys, used, request } = &mut self.slots;
        if id.0 as usize == keys.len() {
            keys.push(key);
            used.push(*request);
        }
        (keys[id.0 as usize], used[id.0 as usize]) = (key, *request);
        self.resident.insert(key, id);
        self.policy.insert(&mut self.nodes, Member { id, key });
    }

    fn shrink(&mut self, evicted: &mut Vec<u64>) {
        while self.resident.len() > self.capacity
            && let Some(id) = self.policy.victim(&mut self.nodes, &self.slots)
        {
            self.drop_block(id, Left::Evicted);
            evicted.push(self.slots.key(id));
        }
    }

    fn drop_block(&mut self, id: EntryId, left: Left) {
        let key = self.slots.key(id);
        self.policy.remove(&mut self.nodes, Member { id, key }, left);
        self.resident.remove(&key);
        self.free.push(id);
    }
}
