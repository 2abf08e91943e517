//! The index: which blocks are resident, by (space, hash). Entries live in a slab; ids are reused, so every stored
//! reference to an entry carries its generation.

use crate::disk::Place;
use crate::policy::{Blocks, Member};
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

/// One committed block: in host memory, on a device, on a GPU, or on several of them.
pub(crate) struct Entry {
    pub(crate) hash: BlockHash,
    /// The block before it; `None` at the start of a prompt. A hash, not a reference: the parent may leave and return.
    pub(crate) parent: Option<BlockHash>,
    pub(crate) checksum: Checksum,
    pub(crate) touched: Millis,
    slot: SlotId,
    place: Place,
    pub(crate) space: u32,
    /// Leases, reservations and moves that hold the block in place.
    pub(crate) pins: u32,
    generation: u32,
    pub(crate) state: EntryState,
    /// Whether the host tier's policy knows it. It does not while the fill that committed it goes on.
    pub(crate) ordered: bool,
    pub(crate) disk: DiskState,
    /// Blocks before it in its chain, as far as they can be told apart.
    pub(crate) depth: u16,
}

/// What goes on between a block and the devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct DiskState {
    /// Whether a device's policy knows it.
    pub(crate) ordered: bool,
    /// It waits to be written.
    pub(crate) queued: bool,
    /// A copy of it is being written.
    pub(crate) copying: Copying,
    /// Its copy is being read into a host slot.
    pub(crate) loading: bool,
    /// Its copy survives a loss of power.
    pub(crate) durable: bool,
    /// It was found at least once.
    pub(crate) reused: bool,
    /// How often it was found on its device, as far as that is told apart, less once for each time reclaiming moved it.
    pub(crate) uses: u8,
}

/// Whether a copy of a block is being written, and what for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Copying {
    #[default]
    No,
    /// The first on its device.
    First,
    /// To replace one that is in the way of reclaiming.
    Relocating,
    /// The same, but the block leaves its device as soon as that is done.
    Leaving,
    /// It was used since, and is written again after that.
    Returning,
}

impl Copying {
    /// The block leaves its device when the copy is done.
    pub(crate) fn leaves(self) -> bool {
        matches!(self, Self::Leaving | Self::Returning)
    }
}

impl DiskState {
    /// A copy of it is being written.
    pub(crate) fn writing(&self) -> bool {
        self.copying != Copying::No
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EntryState {
    /// The slab position is unused.
    Free,
    /// In the table.
    Resident,
    /// Out of the table; what it holds is freed when the last pin is gone.
    Doomed,
}

impl Entry {
    /// Where it is in host memory.
    pub(crate) fn slot(&self) -> Option<SlotId> {
        (self.slot != SlotId::NONE).then_some(self.slot)
    }

    pub(crate) fn set_slot(&mut self, slot: Option<SlotId>) {
        self.slot = slot.unwrap_or(SlotId::NONE);
    }

    /// Where it is on a device.
    pub(crate) fn place(&self) -> Option<Place> {
        (self.place != Place::NONE).then_some(self.place)
    }

    pub(crate) fn set_place(&mut self, place: Option<Place>) {
        self.place = place.unwrap_or(Place::NONE);
    }

    /// The block as policies see it.
    pub(crate) fn member(&self, id: EntryId) -> Member {
        let [first, ..] = self.hash.0.as_chunks::<8>().0 else { unreachable!("a hash has 32 bytes") };
        let space = u64::from(self.space).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Member { id, key: u64::from_le_bytes(*first) ^ space, depth: self.depth }
    }
}

impl Blocks for Index {
    fn may_leave(&self, id: EntryId) -> bool {
        self[id].pins == 0
    }

    fn key(&self, id: EntryId) -> u64 {
        self[id].member(id).key
    }
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

    /// Adds a resident block that is not there yet. It is nowhere, until somebody says where.
    pub(crate) fn insert(
        &mut self,
        (space, hash): (u32, BlockHash),
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
            slot: SlotId::NONE,
            place: Place::NONE,
            space,
            pins: 0,
            generation,
            state: EntryState::Resident,
            ordered: false,
            disk: DiskState::default(),
            depth: 0,
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

    /// The entry, if it is still the same, in the table or not.
    pub(crate) fn occupied_by(&self, reference: EntryRef) -> Option<EntryId> {
        let entry = &self[reference.id];
        let same = entry.generation == reference.generation && entry.state != EntryState::Free;
        same.then_some(reference.id)
    }

    /// Resident and doomed entries, from one position on.
    pub(crate) fn occupied_from(&self, first: u32) -> impl Iterator<Item = (EntryId, &Entry)> {
        let rest = self.entries.iter().enumerate().skip(first as usize);
        rest.filter(|(_, entry)| entry.state != EntryState::Free).map(|(i, entry)| (EntryId(i as u32), entry))
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

/// The index as a device's policy sees it.
pub(crate) struct OnDisk<'a>(pub(crate) &'a Index);

impl Blocks for OnDisk<'_> {
    /// A copy may go if nobody reads or writes it, and nobody counts on it.
    fn may_leave(&self, id: EntryId) -> bool {
        let entry = &self.0[id];
        let relocating = entry.disk.copying == Copying::Relocating;
        // To be moved is no reason to stay: the coldest blocks are those that reclaiming moves.
        let held = entry.pins > u32::from(relocating) && entry.slot().is_none();
        entry.place().is_some() && !entry.disk.loading && (!entry.disk.writing() || relocating) && !held
    }

    fn key(&self, id: EntryId) -> u64 {
        self.0.key(id)
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
        let node = size_of::<crate::policy::Node>() as f64;
        let bytes = table + size_of::<Entry>() as f64 + node + 4.0;
        assert!(bytes <= 160.0, "{bytes} bytes a block");
        // On a device as well: a second policy node, and the segment's list of records.
        let bytes = bytes + node + 8.0;
        assert!(bytes <= 184.0, "{bytes} bytes a block with a device");
    }
}
