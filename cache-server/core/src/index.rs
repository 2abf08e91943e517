//! The index: which blocks are resident, by (space, hash). Entries live in a slab; ids are reused, so every stored
//! reference to an entry carries its generation.

use crate::{Millis, SlotId};
use cairn_proto::{BlockHash, Checksum};
use hashbrown::HashTable;

/// Position in the slab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntryId(pub u32);

/// A reference that notices when its entry was reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EntryRef {
    pub(crate) id: EntryId,
    generation: u32,
}

/// One committed block.
pub(crate) struct Entry {
    pub(crate) hash: BlockHash,
    /// The block before it; `None` at the start of a prompt. A hash, not a reference: the parent may leave and return.
    pub(crate) parent: Option<BlockHash>,
    pub(crate) checksum: Checksum,
    pub(crate) touched: Millis,
    pub(crate) slot: SlotId,
    pub(crate) space: u32,
    /// Leases and reservations that hold the block in place.
    pub(crate) pins: u32,
    generation: u32,
    pub(crate) state: EntryState,
    /// Whether the eviction policy knows it. It does not while the fill that committed it goes on.
    pub(crate) ordered: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryState {
    /// The slab position is unused.
    Free,
    /// In the table.
    Resident,
    /// Out of the table; its slot is freed when the last lease ends.
    Doomed,
}

pub(crate) struct Index {
    table: HashTable<u32>,
    entries: Vec<Entry>,
    free: Vec<u32>,
    seed: [u64; 2],
}

impl Index {
    pub(crate) fn new(seed: [u64; 2]) -> Self {
        Self { table: HashTable::new(), entries: Vec::new(), free: Vec::new(), seed }
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn find(&self, space: u32, hash: &BlockHash) -> Option<EntryId> {
        let matches = |id: &u32| {
            let entry = &self.entries[*id as usize];
            entry.hash == *hash && entry.space == space
        };
        self.table.find(mix(self.seed, space, hash), matches).map(|id| EntryId(*id))
    }

    /// Adds a resident block that is not there yet.
    pub(crate) fn insert(
        &mut self,
        (space, hash): (u32, BlockHash),
        slot: SlotId,
        checksum: Checksum,
        parent: Option<BlockHash>,
    ) -> EntryId {
        let id = self.free.pop().unwrap_or(self.entries.len() as u32);
        let generation = self.entries.get(id as usize).map_or(0, |old| old.generation);
        let entry = Entry {
            hash,
            checksum,
            touched: Millis(0),
            parent,
            slot,
            space,
            pins: 0,
            generation,
            state: EntryState::Resident,
            ordered: false,
        };
        match self.entries.get_mut(id as usize) {
            Some(place) => *place = entry,
            None => self.entries.push(entry),
        }
        let Self { table, entries, seed, .. } = self;
        table.insert_unique(mix(*seed, space, &hash), id, |id| {
            let entry = &entries[*id as usize];
            mix(*seed, entry.space, &entry.hash)
        });
        EntryId(id)
    }

    /// Takes a block out of the table. Its entry stays until [`Self::free`].
    pub(crate) fn doom(&mut self, id: EntryId) {
        let entry = &mut self.entries[id.0 as usize];
        entry.state = EntryState::Doomed;
        let position = mix(self.seed, entry.space, &entry.hash);
        if let Ok(occupied) = self.table.find_entry(position, |other| *other == id.0) {
            occupied.remove();
        }
    }

    /// Gives a doomed entry's place back; references to it go stale.
    pub(crate) fn free(&mut self, id: EntryId) {
        let entry = &mut self.entries[id.0 as usize];
        entry.state = EntryState::Free;
        entry.generation = entry.generation.wrapping_add(1);
        self.free.push(id.0);
    }

    pub(crate) fn reference(&self, id: EntryId) -> EntryRef {
        EntryRef { id, generation: self[id].generation }
    }

    /// The entry, if it is still the same and resident.
    pub(crate) fn resident(&self, reference: EntryRef) -> Option<EntryId> {
        let entry = &self[reference.id];
        let same = entry.generation == reference.generation && entry.state == EntryState::Resident;
        same.then_some(reference.id)
    }

    /// Resident and doomed entries.
    pub(crate) fn occupied(&self) -> impl Iterator<Item = (EntryId, &Entry)> {
        let occupied = |(i, entry)| (EntryId(i as u32), entry);
        self.entries
            .iter()
            .enumerate()
            .map(occupied)
            .filter(|(_, e): &(_, &Entry)| e.state != EntryState::Free)
    }
}

impl std::ops::Index<EntryId> for Index {
    type Output = Entry;

    fn index(&self, id: EntryId) -> &Entry {
        &self.entries[id.0 as usize]
    }
}

impl std::ops::IndexMut<EntryId> for Index {
    fn index_mut(&mut self, id: EntryId) -> &mut Entry {
        &mut self.entries[id.0 as usize]
    }
}

/// Seeded position of a key: two folded 64×64→128 bit products, as in wyhash.
fn mix(seed: [u64; 2], space: u32, hash: &BlockHash) -> u64 {
    let (words, _) = hash.0.as_chunks::<8>();
    let word = |i: usize| u64::from_le_bytes(words[i]);
    let fold = |a: u64, b: u64| {
        let product = u128::from(a) * u128::from(b);
        (product as u64) ^ ((product >> 64) as u64)
    };
    fold(word(0) ^ seed[0], word(1) ^ seed[1]) ^ fold(word(2) ^ seed[1], word(3) ^ seed[0] ^ u64::from(space))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_keeps_to_its_budget() {
        // Table position and control byte at the lowest load factor (7/16), entry, policy node, slot occupant.
        let table = 5.0 * 16.0 / 7.0;
        let bytes = table + size_of::<Entry>() as f64 + size_of::<crate::policy::Node>() as f64 + 4.0;
        assert!(bytes <= 160.0, "{bytes} bytes a block");
    }
}
