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
    /// The policy may turn away blocks of the present request too.
    all_may_leave: bool,
}

impl Blocks for Slots {
    fn may_leave(&self, id: EntryId) -> bool {
        self.all_may_leave || self.used[id.0 as usize] != self.request
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
        let policy = kind.build(capacity);
        let slots = Slots { all_may_leave: policy.bypasses(), ..Slots::default() };
        Self {
            policy,
            nodes: Nodes::default(),
            capacity,
            resident: HashMap::default(),
            slots,
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
        for (depth, key) in chain.iter().enumerate().take(self.capacity).rev() {
            self.put(*key, u16::try_from(depth).unwrap_or(u16::MAX));
        }
        self.policy.requested(&mut self.nodes, chain.len());
        self.shrink(evicted);
        self.policy.settle(&mut self.nodes);
        hits
    }

    /// A new request: blocks of the one before may leave.
    fn begin(&mut self) {
        self.slots.request += 1;
    }

    fn put(&mut self, key: u64, depth: u16) {
        if let Some(id) = self.resident.get(&key).copied() {
            self.slots.used[id.0 as usize] = self.slots.request;
            self.policy.touch(&mut self.nodes, Member { id, key, depth });
            return;
        }
        let id = self.free.pop().unwrap_or(EntryId(self.slots.keys.len() as u32));
        let Slots { keys, used, request, .. } = &mut self.slots;
        if id.0 as usize == keys.len() {
            keys.push(key);
            used.push(*request);
        }
        (keys[id.0 as usize], used[id.0 as usize]) = (key, *request);
        self.resident.insert(key, id);
        self.policy.insert(&mut self.nodes, Member { id, key, depth });
    }

    fn shrink(&mut self, evicted: &mut Vec<u64>) {
        while self.resident.len() > self.capacity
            && let Some(id) = self.policy.victim(&mut self.nodes, &self.slots)
        {
            self.drop_block(id, Left::Evicted);
            evicted.push(self.slots.key(id));
        }
    }

    fn remove(&mut self, key: u64) {
        if let Some(id) = self.resident.get(&key).copied() {
            self.drop_block(id, Left::Removed);
        }
    }

    fn drop_block(&mut self, id: EntryId, left: Left) {
        let key = self.slots.key(id);
        self.policy.remove(&mut self.nodes, Member { id, key, depth: 0 }, left);
        self.resident.remove(&key);
        self.free.push(id);
    }
}

/// What a second tier does with what the first has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecondTier {
    /// A block that leaves the first tier is written down; a hit moves up.
    Exclusive,
    /// As before, but a hit is copied up and its copy stays: its next way down is free.
    Lazy,
    /// A block is written when it first comes.
    WriteThrough,
}

/// Two tiers that count.
pub struct TwoTiers {
    kind: SecondTier,
    first: Replay,
    second: Replay,
    /// A block is written from this use on.
    admit: u32,
    uses: HashMap<u64, u32, BuildHasherDefault<Spread>>,
    evicted: Vec<u64>,
    /// Blocks read from the second tier.
    pub reads: u64,
    /// Blocks written to it.
    pub writes: u64,
}

impl TwoTiers {
    /// Two empty tiers of so many blocks, the first one first.
    pub fn new(kind: SecondTier, policies: [PolicyKind; 2], capacities: [usize; 2], admit: u32) -> Self {
        Self {
            kind,
            first: Replay::new(policies[0], capacities[0]),
            second: Replay::new(policies[1], capacities[1]),
            admit,
            uses: HashMap::default(),
            evicted: Vec::new(),
            reads: 0,
            writes: 0,
        }
    }

    /// Blocks of the longest prefix that is in either tier.
    pub fn lookup(&self, chain: &[u64]) -> usize {
        chain.iter().take_while(|key| self.first.contains(**key) || self.second.contains(**key)).count()
    }

    /// Replays one request; returns the blocks that it hit in the first tier, and in both together.
    pub fn request(&mut self, chain: &[u64]) -> [usize; 2] {
        let first = self.first.lookup(chain);
        let hits = self.lookup(chain);
        chain.iter().for_each(|key| *self.uses.entry(*key).or_default() += 1);
        let from_second: Vec<u64> =
            chain[..hits].iter().copied().filter(|key| !self.first.contains(*key)).collect();
        self.reads += from_second.len() as u64;
        self.second.begin();
        match self.kind {
            SecondTier::Exclusive => from_second.iter().for_each(|key| self.second.remove(*key)),
            SecondTier::Lazy => self.touch_second(chain),
            SecondTier::WriteThrough => self.write_through(chain),
        }
        self.evicted.clear();
        let mut evicted = std::mem::take(&mut self.evicted);
        self.first.request(chain, &mut evicted);
        if self.kind != SecondTier::WriteThrough {
            self.write_down(&evicted);
        }
        self.evicted = evicted;
        [first, hits]
    }

    fn write_through(&mut self, chain: &[u64]) {
        let kept = chain.len().min(self.second.capacity);
        for key in chain[..kept].iter().rev() {
            self.write(*key);
        }
        self.second.shrink(&mut Vec::new());
    }

    fn write_down(&mut self, evicted: &[u64]) {
        for key in evicted {
            self.write(*key);
            self.second.shrink(&mut Vec::new());
        }
    }

    /// A use counts in every tier that has the block.
    fn touch_second(&mut self, chain: &[u64]) {
        for key in chain.iter().rev().filter(|key| self.second.contains(**key)).copied().collect::<Vec<_>>() {
            self.second.put(key, 0);
        }
    }

    /// What is there already costs nothing.
    fn write(&mut self, key: u64) {
        let there = self.second.contains(key);
        if there && self.kind == SecondTier::WriteThrough {
            self.second.put(key, 0);
        }
        if !there && self.uses.get(&key).is_some_and(|uses| *uses >= self.admit) {
            self.writes += 1;
            self.second.put(key, 0);
        }
    }
}
