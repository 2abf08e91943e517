//! Cores with devices on long random histories: every decision is carried out late, out of order, or not at all, and all
//! invariants are recounted on the way. `CAIRN_CORE_SEED` replays a history; `CAIRN_CORE_EVENTS` makes it longer.

#![allow(clippy::unwrap_used)]

use cairn_core::*;
use cairn_proto::*;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::collections::BTreeMap;

const DEFAULT_EVENTS: u64 = 40_000;
const AUDIT_EVERY: u64 = 11;

fn core(host_chunks: u32, policy: PolicyKind, admission: Admission) -> Core {
    Core::new(CoreConfig {
        host_chunks,
        chunk_bytes: 8 * 4096,
        slot_align_bytes: 4096,
        policy,
        admission,
        tenants: Vec::new(),
        history_entries: 512,
        max_leases_per_session: 8,
        max_reservations_per_session: 8,
        max_spaces: 4,
        hash_seed: [1, 2],
    })
    .unwrap()
}

fn device(policy: PolicyKind) -> DeviceConfig {
    // 16 pages: a header, six records of two pages, a summary of two.
    DeviceConfig {
        identity: 7,
        first_generation: 0,
        segment_bytes: 16 * 4096,
        segments: 6,
        policy,
        fill: 0.7,
        max_write_amplification: 1.5,
    }
}

struct Run {
    core: Core,
    rng: StdRng,
    now: u64,
    space: KeySpace,
    session: SessionId,
    devices: Vec<DeviceId>,
    moves: Vec<Move>,
    loads: Vec<LoadId>,
    scrubs: Vec<LoadId>,
    leases: Vec<LeaseId>,
    reads: Vec<(LeaseId, usize)>,
    /// What each device holds, as a crash would find it: by segment, generation and page.
    written: BTreeMap<(DeviceId, u32), (u64, BTreeMap<u32, Record>)>,
    config: DeviceConfig,
    /// How often a move fails, in percent.
    failures: u32,
}

impl Run {
    fn new((host_chunks, config): (u32, DeviceConfig), admission: Admission, seed: u64) -> Self {
        let mut core = core(host_chunks, config.policy, admission);
        let layout = Layout::new(1, 1, 64, 16).unwrap();
        let space = KeySpace::new(SpaceParts::new("t", [0; 32], Dtype::Bf16, layout)).unwrap();
        let Reply::Session(session) = core.apply(Millis(0), Event::OpenSession).reply else { panic!() };
        core.apply(Millis(0), Event::OpenSpace { session, space: &space });
        let mut run = Self {
            core,
            rng: StdRng::seed_from_u64(seed),
            now: 0,
            space,
            session,
            devices: Vec::new(),
            moves: Vec::new(),
            loads: Vec::new(),
            scrubs: Vec::new(),
            leases: Vec::new(),
            reads: Vec::new(),
            written: BTreeMap::new(),
            config,
            failures: 1,
        };
        run.attach();
        run.attach();
        run
    }

    fn apply(&mut self, event: Event<'_>) -> Effects {
        self.core.apply(Millis(self.now), event)
    }

    fn attach(&mut self) {
        let config = self.config.clone();
        let Reply::Device(device) = self.apply(Event::AttachDevice(&config)).reply else { panic!() };
        self.apply(Event::RecoveryDone { device, sequence: 0 });
        self.devices.push(device);
    }

    fn chain(&mut self) -> Vec<BlockHash> {
        let mut parent = Parent::Root(&SpaceId([0; 32]));
        let mut chain = Vec::new();
        for _ in 0..self.rng.random_range(1..=7) {
            let token = self.rng.random_range(0..3u32);
            let hash = BlockHasher::default().hash(parent, &[token], &[]);
            chain.push(hash);
            parent = Parent::Block(chain.last().unwrap());
        }
        chain
    }

    fn step(&mut self) {
        self.now += self.rng.random_range(0..3);
        match self.rng.random_range(0..100) {
            0..25 => {
                let chain = self.chain();
                self.lookup(&chain);
            }
            25..50 => {
                let chain = self.chain();
                self.publish(&chain);
            }
            50..62 => self.end_some_move(),
            62..72 => self.plan(),
            72..82 => self.read(),
            82..90 => self.end_some_load(),
            90..94 => self.release(),
            94..97 => self.scrub(),
            97 => self.quarantine(),
            98 => {
                let space = self.space.id();
                if self.rng.random_bool(0.1) {
                    self.apply(Event::Flush(space));
                }
            }
            _ => {
                if self.rng.random_bool(0.02) {
                    let device = self.devices.remove(0);
                    self.apply(Event::LoseDevice(device));
                    self.attach();
                }
            }
        }
    }

    /// How many blocks of a chain are there.
    fn lookup(&mut self, chain: &[BlockHash]) -> usize {
        let (session, space) = (self.session, self.space.id());
        let event = Event::Lookup { session, space, hashes: chain, ttl_ms: 200 };
        let reply = self.core.apply(Millis(self.now), event).reply;
        let Reply::Found { lease, checksums, .. } = reply else { panic!() };
        self.leases.extend(lease);
        checksums.len()
    }

    fn publish(&mut self, chain: &[BlockHash]) {
        let (session, space) = (self.session, self.space.id());
        let event = Event::Reserve { session, space, parent: None, hashes: chain, ttl_ms: 50 };
        let reply = self.core.apply(Millis(self.now), event).reply;
        let Reply::Reserved { reservation: Some(reservation), .. } = reply else { return };
        let Reply::Fill { slots, .. } = self.apply(Event::BeginFill { session, reservation }).reply else {
            panic!()
        };
        for slot in slots {
            let mut checksum = Checksum([0; 16]);
            checksum.0.copy_from_slice(&slot.hash.0[..16]);
            self.apply(Event::Commit { reservation, block: slot.block, checksum });
        }
        self.apply(Event::EndFill(reservation));
    }

    fn plan(&mut self) {
        let device = self.devices[self.rng.random_range(0..self.devices.len())];
        let room = Room { bytes: self.rng.random_range(0..10) * 8192, blocks: 5, idle: false };
        let sync = self.rng.random_bool(0.3);
        let reply = self.apply(Event::PlanMoves { device, room, sync }).reply;
        let Reply::Moves(moves) = reply else { panic!() };
        for planned in &moves {
            self.note(device, &planned.work);
        }
        self.moves.extend(moves);
    }

    /// A plan must never overwrite what is wanted.
    fn note(&mut self, device: DeviceId, work: &Work) {
        match work {
            Work::Open { segment, generation } => {
                self.written.insert((device, *segment), (*generation, BTreeMap::new()));
            }
            Work::Write { record, to, .. } => {
                assert_eq!(to.device, device);
                let (generation, pages) = self.written.get_mut(&(device, to.segment)).unwrap();
                assert_eq!(*generation, to.generation);
                let end = to.page + record_pages(record.block_bytes);
                assert!(to.page > 0 && pages.range(to.page..end).next().is_none(), "records overlap");
                pages.insert(to.page, record.clone());
                let summary = summary_pages(pages.len());
                assert!(end + summary <= 16, "no room for the summary");
            }
            _ => {}
        }
    }

    fn end_some_move(&mut self) {
        if self.moves.is_empty() {
            return;
        }
        let ended = match self.rng.random_range(0..100) {
            n if n < self.failures && self.now.is_multiple_of(5) => Ended::Failed,
            99 => Ended::NoRoom,
            98 => Ended::Corrupt,
            _ => Ended::Done,
        };
        let at = self.rng.random_range(0..self.moves.len());
        let id = self.moves.swap_remove(at).id;
        let lost = self.apply(Event::EndMove { id, ended }).lost;
        for device in lost {
            self.devices.retain(|other| *other != device);
            self.attach();
        }
    }

    fn read(&mut self) {
        if self.leases.is_empty() {
            return;
        }
        let lease = self.leases[self.rng.random_range(0..self.leases.len())];
        let session = self.session;
        let reply = self.apply(Event::BeginRead { session, lease, first: 0, count: 1 }).reply;
        let Reply::Read { .. } = reply else { return };
        self.reads.push((lease, 0));
        loop {
            let (_, position) = self.reads.last_mut().unwrap();
            let at = *position;
            *position += 1;
            match self.apply(Event::Load { lease, position: at }).reply {
                Reply::Load(Load::Promote { load, .. } | Load::Through { load, .. }) => self.loads.push(load),
                Reply::Load(_) => {}
                _ => return,
            }
        }
    }

    fn end_some_load(&mut self) {
        if !self.loads.is_empty() {
            let at = self.rng.random_range(0..self.loads.len());
            let load = self.loads.swap_remove(at);
            let ended = match self.rng.random_range(0..30) {
                0 => Ended::Corrupt,
                1 => Ended::Failed,
                _ => Ended::Done,
            };
            let lost = self.apply(Event::EndLoad { load, ended }).lost;
            for device in lost {
                self.devices.retain(|other| *other != device);
                self.attach();
            }
        }
        if !self.reads.is_empty() && self.rng.random_bool(0.5) {
            let at = self.rng.random_range(0..self.reads.len());
            let (lease, _) = self.reads.swap_remove(at);
            self.apply(Event::EndRead(lease));
        }
    }

    fn release(&mut self) {
        if let Some(lease) = self.leases.pop() {
            let session = self.session;
            self.apply(Event::Release { session, lease });
        }
    }

    fn scrub(&mut self) {
        if let Some(load) = self.scrubs.pop() {
            let ended = if self.rng.random_bool(0.02) { Ended::Corrupt } else { Ended::Done };
            self.apply(Event::EndScrub { load, ended });
            return;
        }
        let device = self.devices[0];
        let reply = self.apply(Event::BeginScrub { device, after: None }).reply;
        let Reply::Scrub(item) = reply else { panic!() };
        self.scrubs.extend(item.map(|item| item.load));
    }

    fn quarantine(&mut self) {
        let hash = *self.chain().last().unwrap();
        let space = self.space.id();
        self.apply(Event::Quarantine { space, hash });
    }

    /// Ends everything that is going on.
    fn finish(&mut self) {
        self.failures = 0;
        for load in std::mem::take(&mut self.loads) {
            self.apply(Event::EndLoad { load, ended: Ended::Done });
        }
        for load in std::mem::take(&mut self.scrubs) {
            self.apply(Event::EndScrub { load, ended: Ended::Done });
        }
        for (lease, _) in std::mem::take(&mut self.reads) {
            self.apply(Event::EndRead(lease));
        }
        self.now += 1000;
        self.apply(Event::Tick);
        self.settle();
    }

    /// Lets devices do all they have to do.
    fn settle(&mut self) {
        for _ in 0..1000 {
            for moved in std::mem::take(&mut self.moves) {
                self.apply(Event::EndMove { id: moved.id, ended: Ended::Done });
            }
            for device in self.devices.clone() {
                let plan = Event::PlanMoves {
                    device,
                    room: Room { bytes: 1 << 20, blocks: 99, idle: true },
                    sync: true,
                };
                let Reply::Moves(moves) = self.apply(plan).reply else { panic!() };
                self.moves.extend(moves);
            }
            if self.moves.is_empty() {
                return;
            }
        }
        panic!("devices never come to rest");
    }
}

fn history(policy: PolicyKind, admission: Admission, seed: u64, events: u64) {
    let mut run = Run::new((3, device(policy)), admission, seed);
    for event in 0..events {
        run.step();
        if event % AUDIT_EVERY == 0 {
            let audit = run.core.audit();
            audit.unwrap_or_else(|broken| panic!("{policy:?} {admission:?}, after event {event}: {broken}"));
        }
    }
    run.finish();
    run.core.audit().unwrap();
    let usage = run.core.usage();
    assert_eq!((usage.leases, usage.reservations), (0, 0));
    assert_eq!(usage.used_slots, usage.host_blocks);
    let devices = run.core.devices();
    let total = |of: fn(&DeviceCounters) -> u64| devices.iter().map(|d| of(&d.counters)).sum::<u64>();
    assert!(total(|c| c.stored_blocks) > events / 50, "the history must write");
    assert!(total(|c| c.reclaimed_segments) > 10, "the history must reclaim");
    if admission == Admission::Always {
        assert!(total(|c| c.evicted_blocks) > 10, "the history must evict");
    }
    for device in devices.iter().filter(|device| device.counters.stored_bytes > 1 << 20) {
        // Two segments' worth beyond the bound, and what must stay is moved all the same.
        let amplification = device.counters.write_amplification();
        assert!(amplification < 1.7, "a write amplification of {amplification}");
    }
}

#[test]
fn every_policy_keeps_its_books_whatever_devices_do() {
    let number = |name| std::env::vars().find(|(key, _)| key == name).map(|(_, v)| v.parse::<u64>().unwrap());
    let seed = number("CAIRN_CORE_SEED").unwrap_or_else(rand::random);
    let events = number("CAIRN_CORE_EVENTS").unwrap_or(DEFAULT_EVENTS);
    println!("CAIRN_CORE_SEED={seed}");
    for policy in PolicyKind::ALL {
        for admission in Admission::ALL {
            history(policy, admission, seed, events);
        }
    }
}

/// A chain that begins with this number and is like no other.
fn numbered(first: u32, length: u32) -> Vec<BlockHash> {
    let mut parent = Parent::Root(&SpaceId([0; 32]));
    let mut chain = Vec::new();
    for token in first..first + length {
        chain.push(BlockHasher::default().hash(parent, &[token], &[]));
        parent = Parent::Block(chain.last().unwrap());
    }
    chain
}

#[test]
fn where_moving_is_scarce_blocks_in_use_stay_and_others_leave() {
    // As full as can be: nearly every segment that is emptied holds blocks to move, more than the bound lets.
    let scarce = DeviceConfig { fill: 1.0, max_write_amplification: 1.3, ..device(PolicyKind::Lru) };
    let mut run = Run::new((2, scarce), Admission::Always, 1);
    let hot = numbered(0, 6);
    run.publish(&hot);
    run.settle();
    for round in 1..2000 {
        let length = run.rng.random_range(11..=13);
        // Memory has room for 16 blocks: most lookups find what only a device has.
        run.publish(&numbered(round * 100, length));
        assert_eq!(run.lookup(&hot), hot.len(), "round {round}");
        run.release();
        run.settle();
    }
    for device in run.core.devices() {
        let amplification = device.counters.write_amplification();
        assert!((1.29..1.31).contains(&amplification), "the bound must bind: {amplification}");
    }
    run.core.audit().unwrap();
}
