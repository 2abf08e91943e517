//! Which block leaves when there is no room. One algorithm a file.
//!
//! A policy orders the blocks of one slot class. It keeps its per-block state in [`Nodes`], which all policies of a tier share and
//! which is indexed by entry id. The core calls it in chain order, deepest block first, on every touch: that
//! makes leaves older than their parents under any recency order.

mod arc;
mod cairn;
mod fifo;
mod ghosts;
mod lfu;
mod list;
mod lru;
mod s3fifo;
mod sieve;
mod wtinylfu;

use crate::index::EntryId;
pub use ghosts::{Ghosts, spread};
pub use list::{List, Node, Nodes};

/// The choice of an algorithm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PolicyKind {
    /// By expected reuse of prefix segments, with LRU as a guard.
    #[default]
    Cairn,
    /// Least recently used first.
    Lru,
    /// Oldest insertion first.
    Fifo,
    /// Least frequently used first.
    Lfu,
    /// S3-FIFO.
    S3Fifo,
    /// SIEVE.
    Sieve,
    /// Adaptive replacement.
    Arc,
    /// Windowed TinyLFU.
    WTinyLfu,
}

impl PolicyKind {
    /// All kinds.
    pub const ALL: [Self; 8] =
        [Self::Cairn, Self::Lru, Self::Fifo, Self::Lfu, Self::S3Fifo, Self::Sieve, Self::Arc, Self::WTinyLfu];

    /// The name used in config, metrics and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cairn => "cairn",
            Self::Lru => "lru",
            Self::Fifo => "fifo",
            Self::Lfu => "lfu",
            Self::S3Fifo => "s3fifo",
            Self::Sieve => "sieve",
            Self::Arc => "arc",
            Self::WTinyLfu => "wtinylfu",
        }
    }

    /// An empty policy of this kind for about so many blocks.
    pub fn build(self, capacity: usize) -> Box<dyn Policy> {
        match self {
            Self::Cairn => Box::new(cairn::Cairn::new(capacity)),
            Self::Lru => Box::new(lru::Lru::default()),
            Self::Fifo => Box::new(fifo::Fifo::default()),
            Self::Lfu => Box::new(lfu::Lfu::default()),
            Self::S3Fifo => Box::new(s3fifo::S3Fifo::new(capacity)),
            Self::Sieve => Box::new(sieve::Sieve::default()),
            Self::Arc => Box::new(arc::Arc::new(capacity)),
            Self::WTinyLfu => Box::new(wtinylfu::WTinyLfu::new(capacity)),
        }
    }
}

impl std::str::FromStr for PolicyKind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|kind| kind.name()).collect();
            format!("unknown policy {name:?}; known: {}", known.join(", "))
        })
    }
}

/// A block as a policy sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its place in [`Nodes`].
    pub id: EntryId,
    /// Its name, shortened; the same whenever the block comes back.
    pub key: u64,
    /// Blocks before it in its chain, as far as they can be told apart.
    pub depth: u16,
}

/// Why a block left its policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// The policy chose it.
    Evicted,
    /// Something else removed it: it is no sign of a want of room.
    Removed,
}

/// What a policy may ask about blocks while it looks for a victim.
pub trait Blocks {
    /// Whether nothing holds the block in place.
    fn may_leave(&self, id: EntryId) -> bool;

    /// Whether a newcomer may be turned away.
    fn may_be_refused(&self, id: EntryId) -> bool {
        self.may_leave(id)
    }

    /// The block's key.
    fn key(&self, id: EntryId) -> u64;
}

/// An eviction order over the blocks of one slot class.
pub trait Policy: Send {
    /// There is room for about so many blocks now.
    fn resize(&mut self, _capacity: usize) {}

    /// A block became resident.
    fn insert(&mut self, nodes: &mut Nodes, member: Member);

    /// A resident block was used.
    fn touch(&mut self, nodes: &mut Nodes, member: Member);

    /// A block is part of the chain that a block was just added to; its use was counted before.
    fn refresh(&mut self, nodes: &mut Nodes, member: Member) {
        self.touch(nodes, member);
    }

    /// A request was told of, block by block, deepest first. `asked` is its length, those blocks included that are not there
    /// (yet); it is 0 when a request that was counted before stores its blocks.
    fn requested(&mut self, _nodes: &mut Nodes, _asked: usize) {}

    /// Whether blocks of a request may leave at once, to make room for what is worth more.
    fn bypasses(&self) -> bool {
        false
    }

    /// A block left, whoever decided that.
    fn remove(&mut self, nodes: &mut Nodes, member: Member, left: Left);

    /// The block that should leave next, among those that may. It stays until [`Self::remove`].
    fn victim(&mut self, nodes: &mut Nodes, blocks: &dyn Blocks) -> Option<EntryId>;

    /// A request is over: all its blocks were inserted or touched, and what had to leave left.
    fn settle(&mut self, _nodes: &mut Nodes) {}

    /// Blocks in the order.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
