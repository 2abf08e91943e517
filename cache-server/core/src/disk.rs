//! Room on devices: segments, what is in them, and what waits to be done. A device is a bounded log of equal
//! segments; records are appended to the open one, and a segment is used again only when nothing in it is wanted any
//! more. Bytes and files are elsewhere.

use crate::index::EntryRef;
use crate::moves::{DeviceCounters, DeviceId, DiskPlace, MoveId};
use crate::policy::Policy;
use crate::{Millis, PolicyKind};
use cairn_proto::SpaceId;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Unit of places and sizes on a device: the alignment that direct IO needs everywhere.
pub const PAGE_BYTES: u64 = 4096;

/// Pages of a record before its payload.
pub const HEADER_PAGES: u32 = 1;

/// Where a record is. Segments are numbered across all devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) segment: u32,
    pub(crate) page: u32,
}

impl Place {
    pub(crate) const NONE: Self = Self { segment: u32::MAX, page: 0 };
}

/// The shape of a device, and how it is to be used.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceConfig {
    /// The same whenever the same device comes back.
    pub identity: u64,
    /// Higher than any generation that its segments had before.
    pub first_generation: u64,
    /// Bytes of one segment; a multiple of [`PAGE_BYTES`].
    pub segment_bytes: u64,
    /// Segments that it may have.
    pub segments: u32,
    /// What leaves when there is no room.
    pub policy: PolicyKind,
    /// Share of the room that is left to blocks; the rest is what reclaiming works with.
    pub fill: f64,
    /// Bytes written for each byte stored, at most: beyond it, blocks leave instead of being moved.
    pub max_write_amplification: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SegmentState {
    /// Nothing in it is wanted.
    Free,
    /// Records are appended.
    Open,
    /// Full; its writes are not all done.
    Closing,
    /// Its summary is being written, or is there.
    Sealed,
    /// What is left in it is being moved away.
    Reclaiming,
    /// It is being given back to the file system.
    Freeing,
    /// The device cannot provide it.
    Unusable,
}

pub(crate) struct Segment {
    pub(crate) device: usize,
    pub(crate) state: SegmentState,
    pub(crate) generation: u64,
    /// Pages given out, those of failed writes included.
    pub(crate) used_pages: u32,
    /// Pages of records that are wanted.
    pub(crate) live_pages: u32,
    /// Writes of any kind in progress: nothing may use the room of the segment for something else.
    pub(crate) writes: u32,
    /// Records were moved out of it; it stays until a sync that began this late has made their copies durable.
    pub(crate) wait_sync: u64,
    /// The file system had no room for it: freeing it gives none.
    pub(crate) no_room: bool,
    /// Records by page. Those that left since are found out by their entry.
    pub(crate) records: Vec<(u32, EntryRef)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeviceState {
    /// What it holds is being read; nothing may be written.
    Recovering,
    Ready,
    /// Out of service.
    Lost,
}

pub(crate) struct Device {
    pub(crate) config: DeviceConfig,
    pub(crate) state: DeviceState,
    pub(crate) policy: Box<dyn Policy>,
    first_segment: u32,
    pub(crate) free: BTreeSet<u32>,
    pub(crate) open: Option<u32>,
    pub(crate) live_pages: u64,
    pub(crate) live_blocks: u64,
    /// Of the live pages, those of copies that reclaiming makes, and those of blocks that leave when it is done with them.
    pub(crate) moving_pages: u64,
    pub(crate) leaving_pages: u64,
    /// Admitted blocks, oldest first.
    pub(crate) queue: VecDeque<EntryRef>,
    pub(crate) erases: Vec<Place>,
    pub(crate) forgets: Vec<(SpaceId, u64)>,
    pub(crate) sequence: u64,
    pub(crate) generation: u64,
    /// Written, but not yet durable.
    pub(crate) unsynced: Vec<(EntryRef, Place)>,
    /// Syncs begun, and the last that succeeded.
    pub(crate) syncs_begun: u64,
    pub(crate) synced: u64,
    /// Spaces that were emptied while the device was away: what it has of them is not wanted.
    pub(crate) skip: BTreeSet<SpaceId>,
    pub(crate) errors_in_row: u32,
    /// The file system had no room for a segment; it is asked again then, or when a segment was freed.
    pub(crate) full_until: Millis,
    /// One segment is to be given up for that.
    pub(crate) needs_room: bool,
    pub(crate) counters: DeviceCounters,
}

impl Device {
    pub(crate) fn usable_segments(&self, segments: &[Segment]) -> usize {
        let usable = |segment: &&Segment| segment.state != SegmentState::Unusable;
        self.segments(segments).iter().filter(usable).count()
    }

    pub(crate) fn segment_pages(&self) -> u32 {
        (self.config.segment_bytes / PAGE_BYTES) as u32
    }

    fn segments<'a>(&self, all: &'a [Segment]) -> &'a [Segment] {
        let first = self.first_segment as usize;
        &all[first..first + self.config.segments as usize]
    }

    pub(crate) fn segment_range(&self) -> std::ops::Range<u32> {
        self.first_segment..self.first_segment + self.config.segments
    }

    /// A segment's number on its own device.
    pub(crate) fn local(&self, segment: u32) -> u32 {
        segment - self.first_segment
    }
}

/// What a move in progress will change when it ends.
pub(crate) enum Going {
    Open { segment: u32, generation: u64 },
    Write { entry: EntryRef, to: Place, pages: u32, relocation: bool, from_disk: bool },
    Seal { segment: u32 },
    Free { segment: u32 },
    Sync { device: usize, number: u64, written: Vec<(EntryRef, Place)> },
    Erase { segment: u32 },
    Forget { device: usize, space: SpaceId, sequence: u64 },
}

#[derive(Default)]
pub(crate) struct Disks {
    pub(crate) devices: Vec<Device>,
    pub(crate) segments: Vec<Segment>,
    pub(crate) moves: BTreeMap<MoveId, Going>,
    last_move: u64,
    next_device: usize,
    /// Spaces emptied since the start, and which of them each device that was ever here has missed.
    flushed: BTreeSet<SpaceId>,
    missed: BTreeMap<u64, BTreeSet<SpaceId>>,
}

impl Disks {
    /// Records that are being written to a device.
    pub(crate) fn writes_to(&self, device: usize) -> usize {
        let to = |going: &&Going| match going {
            Going::Write { to, .. } => self.segments[to.segment as usize].device == device,
            _ => false,
        };
        self.moves.values().filter(to).count()
    }

    pub(crate) fn attach(&mut self, config: DeviceConfig) -> DeviceId {
        let first_segment = self.segments.len() as u32;
        let device = self.devices.len();
        self.segments.extend((0..config.segments).map(|_| Segment {
            device,
            state: SegmentState::Free,
            generation: 0,
            used_pages: 0,
            live_pages: 0,
            writes: 0,
            wait_sync: 0,
            no_room: false,
            records: Vec::new(),
        }));
        let skip = self.missed_by(config.identity);
        self.devices.push(Device {
            policy: config.policy.build(0),
            state: DeviceState::Recovering,
            first_segment,
            free: (first_segment..first_segment + config.segments).collect(),
            open: None,
            live_pages: 0,
            live_blocks: 0,
            moving_pages: 0,
            leaving_pages: 0,
            queue: VecDeque::new(),
            erases: Vec::new(),
            forgets: Vec::new(),
            sequence: 0,
            generation: config.first_generation,
            unsynced: Vec::new(),
            syncs_begun: 0,
            synced: 0,
            skip,
            errors_in_row: 0,
            full_until: Millis(0),
            needs_room: false,
            counters: DeviceCounters::default(),
            config,
        });
        DeviceId(device as u32)
    }

    pub(crate) fn next_move(&mut self, going: Going) -> MoveId {
        self.last_move += 1;
        let id = MoveId(self.last_move);
        self.moves.insert(id, going);
        id
    }

    /// The device for the next block, of so many pages: in turn, among those that are not lost and can hold it.
    pub(crate) fn next_device(&mut self, pages: u32) -> Option<usize> {
        let count = self.devices.len();
        let needed = 1 + pages + summary_pages(1);
        let holds = |device: &usize| {
            let device = &self.devices[*device];
            device.state != DeviceState::Lost && needed <= device.segment_pages()
        };
        let device = (0..count).map(|i| (self.next_device + i) % count).find(holds)?;
        self.next_device = device + 1;
        Some(device)
    }

    /// An administrator empties a space: every device is told, now or when it is back.
    pub(crate) fn forget(&mut self, space: SpaceId) {
        self.flushed.insert(space);
        let ready: BTreeSet<u64> = self
            .devices
            .iter()
            .filter(|device| device.state == DeviceState::Ready)
            .map(|device| device.config.identity)
            .collect();
        for device in &mut self.devices {
            match device.state {
                DeviceState::Ready => device.forgets.push((space, device.sequence)),
                DeviceState::Recovering => {
                    device.skip.insert(space);
                }
                DeviceState::Lost => {}
            }
        }
        for (identity, missed) in &mut self.missed {
            if !ready.contains(identity) {
                missed.insert(space);
            }
        }
    }

    /// What a device does not know of that was emptied since the start. One that was here before has missed only what came since.
    fn missed_by(&mut self, identity: u64) -> BTreeSet<SpaceId> {
        let missed = self.missed.entry(identity).or_insert_with(|| self.flushed.clone());
        std::mem::take(missed)
    }

    /// A device goes: what it was not yet told, it has missed.
    pub(crate) fn remember_missed(&mut self, device: usize) {
        let device = &mut self.devices[device];
        let missed = self.missed.entry(device.config.identity).or_default();
        missed.extend(std::mem::take(&mut device.forgets).into_iter().map(|(space, _)| space));
        missed.append(&mut device.skip);
    }

    /// Tombstones that are not yet written.
    pub(crate) fn pending_forgets(&self) -> usize {
        let waiting = |device: &Device| {
            let lost = device.state == DeviceState::Lost;
            if lost { 0 } else { device.forgets.len() + device.skip.len() }
        };
        let going = self.moves.values().filter(|going| matches!(going, Going::Forget { .. })).count();
        going + self.devices.iter().map(waiting).sum::<usize>()
    }

    pub(crate) fn device_of(&mut self, place: Place) -> &mut Device {
        &mut self.devices[self.segments[place.segment as usize].device]
    }

    /// Takes room for a record in the open segment, if it has any and the segment's summary will still fit behind it.
    pub(crate) fn append(&mut self, device: usize, pages: u32, entry: EntryRef) -> Option<Place> {
        let limit = self.devices[device].segment_pages();
        let open = self.devices[device].open?;
        let segment = &mut self.segments[open as usize];
        let summary = summary_pages(segment.records.len() + 1);
        if segment.used_pages + pages + summary > limit {
            return None;
        }
        let page = segment.used_pages;
        segment.used_pages += pages;
        segment.writes += 1;
        let place = Place { segment: open, page };
        self.add_live(place, pages, entry);
        Some(place)
    }

    /// A record that is wanted from now on.
    pub(crate) fn add_live(&mut self, place: Place, pages: u32, entry: EntryRef) {
        let segment = &mut self.segments[place.segment as usize];
        segment.live_pages += pages;
        segment.records.push((place.page, entry));
        let device = &mut self.devices[segment.device];
        device.live_pages += u64::from(pages);
        device.live_blocks += 1;
    }

    /// A record that nobody wants any more.
    pub(crate) fn drop_live(&mut self, place: Place, pages: u32) {
        let segment = &mut self.segments[place.segment as usize];
        segment.live_pages -= pages;
        let device = &mut self.devices[segment.device];
        device.live_pages -= u64::from(pages);
        device.live_blocks -= 1;
    }

    /// The place as the outside names it.
    pub(crate) fn outside(&self, place: Place) -> DiskPlace {
        let segment = &self.segments[place.segment as usize];
        DiskPlace {
            device: DeviceId(segment.device as u32),
            segment: self.devices[segment.device].local(place.segment),
            generation: segment.generation,
            page: place.page,
        }
    }
}

/// Bytes of one record in a segment's summary, and of the trailer behind them.
pub const SUMMARY_RECORD_BYTES: u64 = 512;

/// Pages that the summary of so many records takes, trailer included.
pub fn summary_pages(records: usize) -> u32 {
    ((records as u64 * SUMMARY_RECORD_BYTES).div_ceil(PAGE_BYTES) + 1) as u32
}

/// Pages of a whole record with a payload of so many bytes.
pub fn record_pages(payload_bytes: u64) -> u32 {
    HEADER_PAGES + payload_bytes.div_ceil(PAGE_BYTES) as u32
}
