//! The invariants of a core, recounted from scratch. Costs time in proportion to everything held: for tests.

use crate::arena::{ClassId, Occupant};
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
        ensure(self.counters.balanced(), || format!("counters do not add up: {:?}", self.counters))
    }

    /// Every slot is held by exactly one entry or one pending block.
    fn audit_slots(&self) -> Result<(), String> {
        let mut entries = 0;
        for (id, entry) in self.index.occupied() {
            entries += 1;
            let occupant = self.arena.occupants(entry.slot.chunk).get(entry.slot.index as usize);
            ensure(occupant == Some(&Occupant::Block(id)), || {
                format!("{id:?} is not in its slot: {occupant:?}")
            })?;
            let found = self.index.find(entry.space, &entry.hash);
            ensure((entry.state == EntryState::Resident) == (found == Some(id)), || {
                format!("{id:?} is {:?} but the table finds {found:?}", entry.state)
            })?;
        }
        let blocks = self.reservations.values().flat_map(|reservation| &reservation.blocks);
        let pending = blocks.filter(|block| matches!(block.state, PendingState::Slot(_))).count();
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
        for (id, entry) in self.index.occupied() {
            let expected = pins.remove(&id).unwrap_or(0);
            ensure(entry.pins == expected, || format!("{id:?} has {} pins, not {expected}", entry.pins))?;
            let at_rest = entry.ordered && entry.state == EntryState::Resident;
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
            let ordered = blocks.iter().filter(|entry| entry.ordered).count();
            ensure(class.policy.len() == ordered, || {
                format!("class {position}: the policy orders {}, not {ordered}", class.policy.len())
            })?;
            let evictable = blocks.iter().filter(|entry| entry.pins == 0).count();
            ensure(class.evictable == evictable, || {
                format!("class {position}: {} evictable, not {evictable}", class.evictable)
            })?;
            bytes += blocks.len() as u64 * class.slot_bytes;
            resident += blocks.len();
        }
        ensure(bytes == self.resident_bytes, || {
            format!("{} resident bytes, not {bytes}", self.resident_bytes)
        })?;
        ensure(resident == self.index.len(), || format!("{} indexed, {resident} resident", self.index.len()))
    }

    /// Tenants, sessions and timers agree with what exists.
    fn audit_owners(&self) -> Result<(), String> {
        let mut slots = vec![0u64; self.spaces.tenants.len()];
        let tenant = |space: u32| self.spaces.classes[self.spaces[space].class.0 as usize].tenant;
        for (_, entry) in self.index.occupied() {
            slots[tenant(entry.space)] += 1;
        }
        for reservation in self.reservations.values() {
            let pending = reservation.blocks.iter().filter(|b| matches!(b.state, PendingState::Slot(_)));
            slots[tenant(reservation.space)] += pending.count() as u64;
        }
        for (tenant, slots) in self.spaces.tenants.iter().zip(slots) {
            ensure(tenant.slots == slots, || format!("a tenant has {} slots, not {slots}", tenant.slots))?;
            let within = tenant.max_blocks.is_none_or(|max| tenant.slots <= max);
            ensure(within, || format!("a tenant has {} slots of {:?}", tenant.slots, tenant.max_blocks))?;
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
