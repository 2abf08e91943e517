//! Room on devices: segments, what is in them, and what waits to be done. A device is a bounded log of equal
//! segments; records are appended to the open one, and a segment is used again only when nothing in it is wanted any
//! more. Bytes and files are elsewhere.

use crate::index::EntryRef;
use crate::moves::{DeviceCounters, DeviceId, DiskPlace, MoveId};
use crate::policy::Policy;
use crate::{Millis, PolicyKind};
use cairn_proto::SpaceId;
use std::collections::{BTreeSet, VecDeque};

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
    /// Writes in progress.
    pub(crate) writes: u32,
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
    /// Admitted blocks, oldest first.
    pub(crate) queue: VecDeque<EntryRef>,
    pub(crate) erases: Vec<Place>,
    pub(crate) forgets: Vec<(SpaceId, u64)>,
    pub(crate) sequence: u64,
    pub(crate) generation: u64,
    /// Written, but not yet durable.
    pub(crate) unsynced: Vec<EntryRef>,
    pub(crate) errors_in_row: u32,
    /// The file system had no room for a segment; it is asked again then.
    pub(crate) full_until: Millis,
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
    Open {
        segment: u32,
        generation: u64,
    },
    Write {
        entry: EntryRef,
        to: Place,
        pages: u32,
        relocation: bool,
    },
    Seal {
        segment: u32,
    },
    Free {
        segment: u32,
    },
    Sync {
        device: usize,
        written: Vec<EntryRef>,
    },
    /// Erasures and tombstones: nothing changes here.
    Mark {
        device: usize,
    },
}

#[derive(Default)]
pub(crate) struct Disks {
    pub(crate) devices: Vec<Device>,
    pub(crate) segments: Vec<Segment>,
    pub(crate) moves: std::collections::BTreeMap<MoveId, Going>,
    last_move: u64,
    next_device: usize,
}

impl Disks {
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
            records: Vec::new(),
        }));
        self.devices.push(Device {
            policy: config.policy.build(0),
            state: DeviceState::Recovering,
            first_segment,
            free: (first_segment..first_segment + config.segments).collect(),
            open: None,
            live_pages: 0,
            live_blocks: 0,
            queue: VecDeque::new(),
            erases: Vec::new(),
            forgets: Vec::new(),
            sequence: 0,
            generation: 0,
            unsynced: Vec::new(),
            errors_in_row: 0,
            full_until: Millis(0),
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

    /// The device for the next block: in turn, among those in service.
    pub(crate) fn next_device(&mut self) -> Option<usize> {
        let count = self.devices.len();
        let turn = (0..count).map(|i| (self.next_device + i) % count);
        let mut turn = turn;
        let device = turn.find(|device| self.devices[*device].state == DeviceState::Ready)?;
        self.next_device = device + 1;
        Some(device)
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
