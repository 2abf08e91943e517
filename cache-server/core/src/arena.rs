//! Room in the host arena: chunks, the slot classes that own them, and which slot holds what. A chunk belongs to one
//! (tenant, slot size) at a time and goes back to the common pool when its last slot is freed. Bytes are elsewhere.

use crate::index::EntryId;
use std::collections::BTreeSet;

/// One slot: the `index`-th of its chunk. Its byte offset there is `index ×` the slot size of its space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId {
    /// Which chunk.
    pub chunk: u32,
    /// Which slot of it.
    pub index: u32,
}

impl SlotId {
    /// No slot.
    pub(crate) const NONE: Self = Self { chunk: u32::MAX, index: 0 };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ClassId(pub(crate) u32);

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Occupant {
    Free,
    Reserved,
    Block(EntryId),
}

#[derive(Default)]
struct Chunk {
    class: Option<ClassId>,
    occupants: Vec<Occupant>,
    free: Vec<u32>,
    /// Whose bytes are in its memory, which clients of this tenant may have mapped: nobody else may use it as it is.
    tenant: Option<usize>,
    retired: bool,
}

struct Class {
    tenant: usize,
    slots_per_chunk: u32,
    chunks: BTreeSet<u32>,
    /// Chunks with a free slot.
    open: BTreeSet<u32>,
}

pub(crate) struct Arena {
    chunk_bytes: u64,
    chunks: Vec<Chunk>,
    free_chunks: BTreeSet<u32>,
    classes: Vec<Class>,
    used_slots: usize,
    /// Chunks that the classes of each tenant own together.
    tenant_chunks: Vec<usize>,
    /// Chunks that need other memory before anything is written to them.
    stale: Vec<u32>,
    /// Chunks that one tenant may ever have, where a chunk stays with its first tenant.
    keeps: Option<usize>,
}

impl Arena {
    pub(crate) fn new(chunks: u32, chunk_bytes: u64) -> Self {
        Self {
            chunk_bytes,
            chunks: (0..chunks).map(|_| Chunk::default()).collect(),
            free_chunks: (0..chunks).collect(),
            classes: Vec::new(),
            used_slots: 0,
            tenant_chunks: Vec::new(),
            stale: Vec::new(),
            keeps: None,
        }
    }

    /// A chunk stays with its first tenant for good: its memory cannot be replaced, and nobody can say who still has it mapped. None of
    /// them gets more than so many.
    pub(crate) fn keeping_tenants(mut self, max_chunks: usize) -> Self {
        self.keeps = Some(max_chunks);
        self
    }

    /// None of the tenants gets more than so many chunks from now on.
    pub(crate) fn keep_at_most(&mut self, max_chunks: usize) {
        self.keeps = self.keeps.map(|_| max_chunks);
    }

    /// Whether something may be put into a chunk.
    pub(crate) fn in_service(&self, chunk_id: u32) -> bool {
        !self.chunks[chunk_id as usize].retired
    }

    /// Nothing is put into a chunk any more. What is there stays until it is given back.
    pub(crate) fn retire(&mut self, chunk_id: u32) {
        let chunk = &mut self.chunks[chunk_id as usize];
        chunk.retired = true;
        self.free_chunks.remove(&chunk_id);
        if let Some(class) = chunk.class {
            self.classes[class.0 as usize].open.remove(&chunk_id);
        }
    }

    /// `slot_bytes` must be at most a chunk.
    pub(crate) fn add_class(&mut self, tenant: usize, slot_bytes: u64) -> ClassId {
        let slots_per_chunk = u32::try_from(self.chunk_bytes / slot_bytes).unwrap_or(u32::MAX);
        let tenants = self.tenant_chunks.len().max(tenant + 1);
        self.tenant_chunks.resize(tenants, 0);
        self.classes.push(Class { tenant, slots_per_chunk, chunks: BTreeSet::new(), open: BTreeSet::new() });
        ClassId(self.classes.len() as u32 - 1)
    }

    /// A slot, marked as reserved, from the class's own chunks or from the pool.
    pub(crate) fn take(&mut self, class_id: ClassId) -> Option<SlotId> {
        let tenant = self.classes[class_id.0 as usize].tenant;
        let fresh = self.classes[class_id.0 as usize].open.is_empty().then(|| self.free_chunk(tenant));
        let class = &mut self.classes[class_id.0 as usize];
        let chunk_id = match class.open.first() {
            Some(chunk) => *chunk,
            None => {
                let chunk_id = fresh.flatten()?;
                let chunk = &mut self.chunks[chunk_id as usize];
                chunk.class = Some(class_id);
                chunk.occupants = vec![Occupant::Free; class.slots_per_chunk as usize];
                chunk.free = (0..class.slots_per_chunk).rev().collect();
                class.chunks.insert(chunk_id);
                class.open.insert(chunk_id);
                self.tenant_chunks[tenant] += 1;
                chunk_id
            }
        };
        let chunk = &mut self.chunks[chunk_id as usize];
        let index = chunk.free.pop()?;
        if chunk.free.is_empty() {
            class.open.remove(&chunk_id);
        }
        chunk.occupants[index as usize] = Occupant::Reserved;
        self.used_slots += 1;
        Some(SlotId { chunk: chunk_id, index })
    }

    /// A chunk out of the pool, best one whose memory this tenant may use as it is.
    fn free_chunk(&mut self, tenant: usize) -> Option<u32> {
        let usable = |chunk: &&u32| self.chunks[**chunk as usize].tenant.is_none_or(|owner| owner == tenant);
        let chunk = match self.keeps {
            None => *self.free_chunks.iter().find(usable).or(self.free_chunks.first())?,
            Some(max) => {
                let may_have_more = self.kept_by(tenant) < max;
                let own = |chunk: &&u32| self.chunks[**chunk as usize].tenant == Some(tenant);
                let own = self.free_chunks.iter().find(own);
                *own.or_else(|| self.free_chunks.iter().find(usable).filter(|_| may_have_more))?
            }
        };
        self.free_chunks.remove(&chunk);
        let before = self.chunks[chunk as usize].tenant.replace(tenant);
        if before.is_some_and(|owner| owner != tenant) {
            self.stale.push(chunk);
        }
        Some(chunk)
    }

    /// Chunks that a tenant has for good.
    fn kept_by(&self, tenant: usize) -> usize {
        self.chunks.iter().filter(|chunk| chunk.tenant == Some(tenant) && !chunk.retired).count()
    }

    /// Chunks that changed hands since the last call and need other memory.
    pub(crate) fn take_stale(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.stale)
    }

    /// A reserved slot now holds a block.
    pub(crate) fn occupy(&mut self, slot: SlotId, id: EntryId) {
        self.chunks[slot.chunk as usize].occupants[slot.index as usize] = Occupant::Block(id);
    }

    /// A slot holds nothing any more.
    pub(crate) fn give_back(&mut self, slot: SlotId) {
        let chunk = &mut self.chunks[slot.chunk as usize];
        let Some(class_id) = chunk.class else { return };
        chunk.occupants[slot.index as usize] = Occupant::Free;
        chunk.free.push(slot.index);
        self.used_slots -= 1;
        let class = &mut self.classes[class_id.0 as usize];
        if chunk.free.len() == chunk.occupants.len() {
            let retired = chunk.retired;
            *chunk = Chunk { tenant: chunk.tenant, retired, ..Chunk::default() };
            class.chunks.remove(&slot.chunk);
            class.open.remove(&slot.chunk);
            self.tenant_chunks[class.tenant] -= 1;
            if !retired {
                self.free_chunks.insert(slot.chunk);
            }
        } else if !chunk.retired {
            class.open.insert(slot.chunk);
        }
    }

    /// Chunks that a class owns.
    pub(crate) fn chunks_of(&self, class: ClassId) -> impl Iterator<Item = u32> + '_ {
        self.classes[class.0 as usize].chunks.iter().copied()
    }

    /// Chunks that all classes of a tenant own.
    pub(crate) fn chunks_of_tenant(&self, tenant: usize) -> usize {
        self.tenant_chunks.get(tenant).copied().unwrap_or(0)
    }

    pub(crate) fn chunk_count(&self, class: ClassId) -> usize {
        self.classes[class.0 as usize].chunks.len()
    }

    /// Whether a class has a free slot in its own chunks.
    pub(crate) fn has_open_chunk(&self, class: ClassId) -> bool {
        !self.classes[class.0 as usize].open.is_empty()
    }

    /// Slots that a class has or could have if nobody else took a free chunk, of which it may take `room`.
    pub(crate) fn reach(&self, class: ClassId, room: usize) -> usize {
        let class = &self.classes[class.0 as usize];
        let Some(max) = self.keeps else {
            return (class.chunks.len() + self.free_chunks.len().min(room)) * class.slots_per_chunk as usize;
        };
        let in_service = class.chunks.iter().filter(|chunk| !self.chunks[**chunk as usize].retired).count();
        let free = |owner: Option<usize>| {
            self.free_chunks.iter().filter(|chunk| self.chunks[**chunk as usize].tenant == owner).count()
        };
        let more = free(None).min(max.saturating_sub(self.kept_by(class.tenant)));
        (in_service + free(Some(class.tenant)) + more) * class.slots_per_chunk as usize
    }

    pub(crate) fn occupants(&self, chunk: u32) -> &[Occupant] {
        &self.chunks[chunk as usize].occupants
    }

    pub(crate) fn total_chunks(&self) -> usize {
        self.chunks.len()
    }

    pub(crate) fn free_chunks(&self) -> usize {
        self.free_chunks.len()
    }

    pub(crate) fn used_slots(&self) -> usize {
        self.used_slots
    }

    pub(crate) fn chunk_bytes(&self) -> u64 {
        self.chunk_bytes
    }

    /// Reserved slots and slots with blocks, recounted.
    pub(crate) fn recount(&self) -> (usize, usize) {
        let all = self.chunks.iter().flat_map(|chunk| &chunk.occupants);
        all.fold((0, 0), |(reserved, blocks), occupant| match occupant {
            Occupant::Free => (reserved, blocks),
            Occupant::Reserved => (reserved + 1, blocks),
            Occupant::Block(_) => (reserved, blocks + 1),
        })
    }
}
