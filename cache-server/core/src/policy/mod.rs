//! Which block leaves when there is no room. One algorithm a file.
//!
//! A policy orders the blocks of one slot class. It keeps its per-block state in [`Nodes`], which all policies share and
//! which is indexed by entry id. The core calls it in chain order, deepest block first, on every touch: that
//! makes leaves older than their parents under any recency order.

mod fifo;
mod list;
mod lru;

use crate::index::EntryId;
pub use list::{List, Node, Nodes};

/// The choice of an algorithm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PolicyKind {
    /// Least recently used first.
    #[default]
    Lru,
    /// Oldest insertion first.
    Fifo,
}

impl PolicyKind {
    /// All kinds.
    pub const ALL: [Self; 2] = [Self::Lru, Self::Fifo];

    /// The name used in config, metrics and tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Fifo => "fifo",
        }
    }

    /// An empty policy of this kind.
    pub fn build(self) -> Box<dyn Policy> {
        match self {
            Self::Lru => Box::new(lru::Lru::default()),
            Self::Fifo => Box::new(fifo::Fifo::default()),
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

/// An eviction order over the blocks of one slot class.
pub trait Policy: Send {
    /// A block became resident.
    fn insert(&mut self, nodes: &mut Nodes, id: EntryId);

    /// A resident block was used.
    fn touch(&mut self, nodes: &mut Nodes, id: EntryId);

    /// A block left, whoever decided that.
    fn remove(&mut self, nodes: &mut Nodes, id: EntryId);

    /// The block that should leave next, among those that may. It stays until [`Self::remove`].
    fn victim(&self, nodes: &Nodes, may_leave: &dyn Fn(EntryId) -> bool) -> Option<EntryId>;

    /// Blocks in the order.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
