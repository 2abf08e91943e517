//! The decisions of a cache server: which blocks are resident, who may read or fill which slot, what has to go.
//!
//! [`Core::apply`] takes one event and the time it happened and returns what follows from it. There is no IO, no clock,
//! no randomness and no thread in this package, so any history can be replayed. Bytes are elsewhere: the core
//! hands out [`SlotId`]s and never sees what is in them.

#![forbid(unsafe_code)]

mod arena;
mod attach;
mod audit;
mod config;
mod counters;
mod disk;
mod event;
mod gpu;
mod history;
mod index;
mod lease;
mod load;
mod moves;
mod nvme;
pub mod policy;
mod promote;
mod reclaim;
pub mod replay;
mod reserve;
mod reuse;
mod spaces;
mod state;
mod timers;

pub use arena::SlotId;
pub use config::{ConfigError, CoreConfig, TenantQuota};
pub use counters::{Counters, Usage};
pub use disk::{DeviceConfig, HEADER_PAGES, PAGE_BYTES, SUMMARY_RECORD_BYTES, record_pages, summary_pages};
pub use event::{
    BlockState, CommitOutcome, Effects, Event, FillSlot, GpuEvent, Grant, LeaseId, Millis, ReadSlot, Refusal,
    Removed, Reply, ReservationId, Room, SessionId, SpaceUsage,
};
pub use gpu::GpuTierConfig;
pub use index::EntryId;
pub use moves::{
    CopyId, DeviceCondition, DeviceCounters, DeviceId, DeviceUsage, DiskPlace, Ended, Found, GpuCounters,
    GpuId, GpuSlot, GpuUsage, GpuWork, Load, LoadId, Move, MoveId, Origin, Record, ScrubItem, Source, Work,
};
pub use nvme::Admission;
pub use policy::PolicyKind;
pub use state::Core;
