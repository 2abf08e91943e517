//! The invariants of a core, recounted from scratch. Costs time in proportion to everything held: for tests.

use crate::arena::{ClassId, Occupant};
use crate::disk::{DeviceState, Going, SegmentState};
use crate::index::{EntryId, EntryState};
use crate::reserve::PendingState;
use crate::state::Core;
use std::collections::BTreeMap;

impl Core {
    /// Recounts everything that is counted incrementally.
    ///
    /// # Errors
    /// Names the first invariant that does not hold.
    pub fn audit(&self) -> Result<(), String> {
        self.audit_slots()?;
        self.audit_pins()?;
        self.audit_classes()?;
        self.audit_owners()?;
        self.audit_devices()?;
        self.audit_gpus()?;
        ensure(self.counters.balanced(), || format!("counters do not add up: {:?}", self.counters))
    }

    /// Every slot is held by exactly one entry or one pending block.
    fn audit_slots(&self) -> Result<(), String> {
        let mut entries = 0;
        for (id, entry) in self.index.occupied() {
            if let Some(slot) = entry.slot() {
                entries += 1;
                let occupant = self.arena.occupants(slot.chunk).get(slot.index as usize);
                ensure(occupant == Some(&Occupant::Block(id)), || {
                    format!("{id:?} is not in its slot: {occupant:?}")
                })?;
            }
            let somewhere = entry.slot().is_some() || entry.place().is_some() || self.on_gpu(id).is_some();
            ensure(somewhere || entry.state == EntryState::Doomed, || format!("{id:?} is nowhere"))?;
            let needed = entry.state != EntryState::Doomed || entry.disk.loading || entry.disk.writing();
            ensure(needed || entry.place().is_none(), || format!("{id:?} is gone, and its record is not"))?;
            let found = self.index.find(entry.space, &entry.hash);
            ensure((entry.state == EntryState::Resident) == (found == Some(id)), || {
                format!("{id:?} is {:?} but the table finds {found:?}", entry.state)
            })?;
        }
        let blocks = self.reservations.values().flat_map(|reservation| &reservation.blocks);
        let pending = blocks.filter(|block| matches!(block.state, PendingState::Slot(_))).count();
        let pending = pending + self.loads.values().filter(|load| load.slot.is_some()).count();
        let recount = self.arena.recount();
        ensure(recount == (pending, entries), || {
            format!("slots {recount:?}, held {:?}", (pending, entries))
        })?;
        let used = self.arena.used_slots();
        ensure(used == pending + entries, || format!("{used} slots counted, {} held", pending + entries))
    }

    /// Pins equal the leases and reservations that name the entry; only pinned entries are doomed or unordered.
    fn audit_pins(&self) -> Result<(), String> {
        let mut pins: BTreeMap<EntryId, u32> = BTreeMap::new();
        for id in self.leases.values().flat_map(|lease| &lease.run) {
            *pins.entry(*id).or_default() += 1;
        }
        for reservation in self.reservations.values() {
            let pinned = |block: &crate::reserve::Pending| match block.state {
                PendingState::Pinned(reference) => Some(reference),
                _ => None,
            };
            for reference in reservation.blocks.iter().filter_map(pinned).chain(reservation.parent) {
                *pins.entry(reference.id).or_default() += 1;
            }
        }
        let writes = self.disks.moves.values().filter_map(|going| match going {
            Going::Write { entry, .. } => Some(*entry),
            _ => None,
        });
        let moves = writes.chain(self.loads.values().map(|load| load.entry));
        for reference in moves.chain(self.gpus.filling.values().copied()) {
            *pins.entry(reference.id).or_default() += 1;
        }
        for (id, entry) in self.index.occupied() {
            let expected = pins.remove(&id).unwrap_or(0);
            ensure(entry.pins == expected, || format!("{id:?} has {} pins, not {expected}", entry.pins))?;
            let at_rest = entry.ordered == entry.slot().is_some() && entry.state == EntryState::Resident;
            ensure(at_rest || entry.pins > 0, || format!("{id:?} is {:?} with no pin", entry.state))?;
        }
        ensure(pins.is_empty(), || format!("pins on entries that are gone: {pins:?}"))
    }

    fn audit_classes(&self) -> Result<(), String> {
        let mut bytes = 0;
        let mut resident = 0;
        for (position, class) in self.spaces.classes.iter().enumerate() {
            let of_class = |space: u32| self.spaces[space].class == ClassId(position as u32);
            let blocks = self.index.occupied().map(|(_, entry)| entry);
            let blocks: Vec<_> =
                blocks.filter(|e| e.state == EntryState::Resident && of_class(e.space)).collect();
            resident += blocks.len();
            let blocks: Vec<_> = blocks.into_iter().filter(|entry| entry.slot().is_some()).collect();
            let ordered = blocks.iter().filter(|entry| entry.ordered).count();
            ensure(class.policy.len() == ordered, || {
                format!("class {position}: the policy orders {}, not {ordered}", class.policy.len())
            })?;
            let evictable = blocks.iter().filter(|entry| entry.pins == 0).count();
            ensure(class.evictable == evictable, || {
                format!("class {position}: {} evictable, not {evictable}", class.evictable)
            })?;
            ensure(class.blocks == blocks.len(), || {
                format!("class {position}: {} blocks, not {}", class.blocks, blocks.len())
            })?;
            bytes += blocks.len() as u64 * class.slot_bytes;
        }
        ensure(bytes == self.resident_bytes, || {
            format!("{} resident bytes, not {bytes}", self.resident_bytes)
        })?;
        ensure(resident == self.index.len(), || format!("{} indexed, {resident} resident", self.index.len()))
    }

    /// Devices count what the index says they hold; only wanted copies are in their orders.
    fn audit_devices(&self) -> Result<(), String> {
        let mut pages: BTreeMap<u32, u32> = BTreeMap::new();
        let mut ordered = vec![0; self.disks.devices.len()];
        for (id, entry) in self.index.occupied() {
            let Some(place) = entry.place() else { continue };
            *pages.entry(place.segment).or_default() += self.record_pages(entry.space);
            let segment = &self.disks.segments[place.segment as usize];
            ordered[segment.device] += usize::from(entry.disk.ordered);
            let listed = segment.records.contains(&(place.page, self.index.reference(id)));
            ensure(listed, || format!("{id:?} is not among the records of its segment"))?;
            let lost = self.disks.devices[segment.device].state == DeviceState::Lost;
            ensure(!lost || entry.state == EntryState::Doomed, || format!("{id:?} is on a lost device"))?;
        }
        for going in self.disks.moves.values() {
            if let Going::Write { to, pages: more, relocation: true, .. } = going {
                *pages.entry(to.segment).or_default() += more;
            }
        }
        for (number, segment) in self.disks.segments.iter().enumerate() {
            let live = pages.get(&(number as u32)).copied().unwrap_or(0);
            ensure(segment.live_pages == live, || {
                format!("segment {number} counts {} live pages, not {live}", segment.live_pages)
            })?;
            let free = self.disks.devices[segment.device].free.contains(&(number as u32));
            ensure(free == (segment.state == SegmentState::Free), || {
                format!("segment {number} is {:?}, free: {free}", segment.state)
            })?;
        }
        for (number, device) in self.disks.devices.iter().enumerate() {
            let (mut moving, mut leaving) = (0, 0);
            for going in self.disks.moves.values() {
                if let Going::Write { entry, to, pages, relocation: true, .. } = going
                    && self.disks.segments[to.segment as usize].device == number
                {
                    moving += u64::from(*pages);
                    let leaves = self.index[entry.id].disk.copying.leaves();
                    leaving += if leaves { u64::from(*pages) } else { 0 };
                }
            }
            ensure((device.moving_pages, device.leaving_pages) == (moving, leaving), || {
                let counted = (device.moving_pages, device.leaving_pages);
                format!("device {number} counts {counted:?} pages on the move, not {:?}", (moving, leaving))
            })?;
            ensure(device.policy.len() == ordered[number], || {
                format!("device {number} orders {}, not {}", device.policy.len(), ordered[number])
            })?;
        }
        Ok(())
    }

    /// Tenants, sessions and timers agree with what exists.
    fn audit_owners(&self) -> Result<(), String> {
        let mut slots = vec![0u64; self.spaces.tenants.len()];
        let tenant = |space: u32| self.spaces.classes[self.spaces[space].class.0 as usize].tenant;
        for (_, entry) in self.index.occupied().filter(|(_, entry)| entry.slot().is_some()) {
            slots[tenant(entry.space)] += 1;
        }
        for load in self.loads.values().filter(|load| load.slot.is_some()) {
            slots[tenant(self.index[load.entry.id].space)] += 1;
        }
        for reservation in self.reservations.values() {
            let pending = reservation.blocks.iter().filter(|b| matches!(b.state, PendingState::Slot(_)));
            slots[tenant(reservation.space)] += pending.count() as u64;
        }
        for (position, (tenant, slots)) in self.spaces.tenants.iter().zip(slots).enumerate() {
            ensure(tenant.slots == slots, || format!("a tenant has {} slots, not {slots}", tenant.slots))?;
            let within = tenant.max_blocks.is_none_or(|max| tenant.slots <= max);
            ensure(within, || format!("a tenant has {} slots of {:?}", tenant.slots, tenant.max_blocks))?;
            let classes = (0..).map(ClassId).zip(&self.spaces.classes);
            let own = classes.filter(|(_, class)| class.tenant == position);
            let chunks: usize = own.map(|(id, _)| self.arena.chunk_count(id)).sum();
            let counted = self.arena.chunks_of_tenant(position);
            ensure(chunks == counted, || format!("a tenant has {chunks} chunks, not {counted}"))?;
            let within = tenant.max_chunks.is_none_or(|max| chunks <= max);
            ensure(within, || format!("a tenant has {chunks} chunks of {:?}", tenant.max_chunks))?;
        }
        let leases = self.leases.values().filter(|lease| !lease.ended).count();
        let reservations = self.reservations.values().filter(|reservation| !reservation.dead).count();
        let timers = self.timers.len();
        ensure(timers == leases + reservations, || format!("{timers} timers for {leases} + {reservations}"))?;
        let held: usize = self.sessions.values().map(|s| s.leases.len() + s.reservations.len()).sum();
        ensure(held == leases + reservations, || format!("sessions hold {held} of {leases} + {reservations}"))
    }
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(what()) }
}
