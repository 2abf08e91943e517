//! Cores with GPUs on long random histories, and what is in every slot beside them: whoever may read a slot finds the block there that the core
//! says, for as long as the read goes on. Copies end late, out of order, or badly. `CAIRN_CORE_SEED` replays a history;
//! `CAIRN_CORE_EVENTS` makes it longer.

#![allow(clippy::unwrap_used)]

use cairn_core::*;
use cairn_proto::*;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IteratorRandom};
use std::collections::BTreeMap;

const DEFAULT_EVENTS: u64 = 40_000;
const AUDIT_EVERY: u64 = 7;

/// What is read is held in place: with more there would be no room.
const MOST_READS: usize = 2;
const MOST_LEASES: usize = 3;

/// Of the four on both GPUs, for one tenant.
const MOST_CHUNKS: usize = 2;

fn core(policy: PolicyKind) -> Core {
    let mut core = Core::new(CoreConfig {
        host_chunks: 4,
        chunk_bytes: 8 * 4096,
        slot_align_bytes: 4096,
        policy,
        admission: Admission::Always,
        tenants: Vec::new(),
        history_entries: 512,
        max_leases_per_session: 8,
        max_reservations_per_session: 8,
        max_spaces: 4,
        hash_seed: [1, 2],
    })
    .unwrap();
    let gpus = GpuTierConfig { gpus: 2, chunks_per_gpu: 2, max_chunks_per_tenant: MOST_CHUNKS, policy };
    core.apply(Millis(0), Event::Gpu(GpuEvent::Attach(&gpus)));
    core
}

type Content = Option<(SpaceId, BlockHash)>;

enum Going {
    Promote { copy: CopyId, from: SlotId, to: GpuSlot, block: (SpaceId, BlockHash) },
    Load { load: LoadId, from: Origin, to: Option<SlotId>, block: (SpaceId, BlockHash) },
    Move { id: MoveId, block: Option<(SpaceId, BlockHash)> },
}

struct Reading {
    lease: LeaseId,
    space: SpaceId,
    slots: Vec<ReadSlot>,
}

struct Run {
    core: Core,
    rng: StdRng,
    now: u64,
    spaces: Vec<KeySpace>,
    session: SessionId,
    device: Option<DeviceId>,
    going: Vec<Going>,
    leases: Vec<(LeaseId, SpaceId)>,
    reads: Vec<Reading>,
    host: BTreeMap<SlotId, Content>,
    gpu: BTreeMap<GpuSlot, Content>,
    /// Whose each chunk of a GPU was first.
    owners: BTreeMap<(GpuId, u32), String>,
    failures: bool,
}

impl Run {
    fn new(policy: PolicyKind, seed: u64, with_device: bool) -> Self {
        let mut core = core(policy);
        let space = |tenant, tokens| {
            let layout = Layout::new(1, 1, 64, tokens).unwrap();
            KeySpace::new(SpaceParts::new(tenant, [0; 32], Dtype::Bf16, layout)).unwrap()
        };
        // Two block sizes of one tenant, and another tenant.
        let spaces = vec![space("t", 16), space("t", 32), space("u", 16)];
        let Reply::Session(session) = core.apply(Millis(0), Event::OpenSession).reply else { panic!() };
        for space in &spaces {
            core.apply(Millis(0), Event::OpenSpace { session, space });
        }
        let mut run = Self {
            core,
            rng: StdRng::seed_from_u64(seed),
            now: 0,
            spaces,
            session,
            device: None,
            going: Vec::new(),
            leases: Vec::new(),
            reads: Vec::new(),
            host: BTreeMap::new(),
            gpu: BTreeMap::new(),
            owners: BTreeMap::new(),
            failures: true,
        };
        if with_device {
            let config = DeviceConfig {
                identity: 7,
                first_generation: 0,
                segment_bytes: 16 * 4096,
                segments: 6,
                policy,
                fill: 0.7,
                max_write_amplification: 2.0,
            };
            let Reply::Device(device) = run.apply(Event::AttachDevice(&config)).reply else { panic!() };
            run.apply(Event::RecoveryDone { device, sequence: 0 });
            run.device = Some(device);
        }
        run
    }

    fn apply(&mut self, event: Event<'_>) -> Effects {
        let effects = self.core.apply(Millis(self.now), event);
        // Chunks of host memory that change hands are other memory.
        for chunk in &effects.stale {
            self.host.retain(|slot, _| slot.chunk != *chunk);
        }
        effects
    }

    fn chain(&mut self) -> (usize, Vec<BlockHash>) {
        let mut parent = Parent::Root(&SpaceId([0; 32]));
        let mut chain = Vec::new();
        for _ in 0..self.rng.random_range(1..=7) {
            let token = self.rng.random_range(0..3u32);
            chain.push(BlockHasher::default().hash(parent, &[token], &[]));
            parent = Parent::Block(chain.last().unwrap());
        }
        (self.rng.random_range(0..3), chain)
    }

    fn step(&mut self) {
        self.now += self.rng.random_range(0..3);
        match self.rng.random_range(0..100) {
            0..20 => self.lookup(),
            20..22 => self.write_to_device(true),
            _ if self.device.is_some() && self.rng.random_bool(0.1) => self.write_to_device(false),
            22..42 => self.publish(),
            42..60 => self.read(),
            60..72 => self.plan(),
            72..88 => self.end_some_move(),
            88..94 => self.end_some_read(),
            94..97 => self.release(),
            97 => {
                let (space, chain) = self.chain();
                let (space, hash) = (self.spaces[space].id(), *chain.last().unwrap());
                self.apply(Event::Quarantine { space, hash });
            }
            98 => {
                // One that a device writes or moves at present, if there is any.
                let (space, chain) = self.chain();
                let other = (self.spaces[space].id(), *chain.last().unwrap());
                let moves = self.going.iter().filter_map(|going| match going {
                    Going::Move { block, .. } => *block,
                    _ => None,
                });
                let (space, hash) = moves.choose(&mut self.rng).unwrap_or(other);
                self.apply(Event::Gpu(GpuEvent::Spoil { space, hash }));
            }
            _ if self.rng.random_bool(0.02) => {
                let space = self.spaces[self.rng.random_range(0..3)].id();
                self.apply(Event::Flush(space));
            }
            _ => {}
        }
    }

    fn lookup(&mut self) {
        let (space, chain) = self.chain();
        let (session, space) = (self.session, self.spaces[space].id());
        let event = Event::Lookup { session, space, hashes: &chain, ttl_ms: 200 };
        let Reply::Found { lease, outcomes, .. } = self.core.apply(Millis(self.now), event).reply else {
            panic!()
        };
        assert_eq!(outcomes.len(), chain.len());
        self.leases.extend(lease.map(|lease| (lease, space)));
        if self.leases.len() > MOST_LEASES {
            let (lease, _) = self.leases.remove(0);
            self.apply(Event::Release { session, lease });
        }
    }

    fn publish(&mut self) {
        let (space, chain) = self.chain();
        let (session, space) = (self.session, self.spaces[space].id());
        let event = Event::Reserve { session, space, parent: None, hashes: &chain, ttl_ms: 50 };
        let Reply::Reserved { reservation: Some(reservation), .. } = self.apply(event).reply else { return };
        let Reply::Fill { slots, .. } = self.apply(Event::BeginFill { session, reservation }).reply else {
            panic!()
        };
        for slot in slots {
            self.host.insert(slot.slot, Some((space, slot.hash)));
            let checksum = Checksum([1; 16]);
            self.apply(Event::Commit { reservation, block: slot.block, checksum });
        }
        self.apply(Event::EndFill(reservation));
    }

    /// A reader that can use GPUs, or one that cannot.
    fn read(&mut self) {
        if self.leases.is_empty() {
            return;
        }
        if self.reads.len() >= MOST_READS {
            self.end_some_read();
        }
        let (lease, space) = self.leases[self.rng.random_range(0..self.leases.len())];
        let session = self.session;
        let count = self.core.slots(session, lease).len();
        let begun = self.apply(Event::BeginRead { session, lease, first: 0, count }).reply;
        let Reply::Read { slots, .. } = begun else { return };
        self.reads.push(Reading { lease, space, slots });
        self.check_reads();
        if self.rng.random_bool(0.7) {
            self.apply(Event::Gpu(GpuEvent::Want { session, lease, first: 0, count }));
            return;
        }
        for position in 0..count {
            let hash = self.reads.last().unwrap().slots[position].hash;
            self.load(lease, position, (space, hash));
        }
    }

    /// Begins to load a block, if that is needed; says whether the reader has to wait for a load that is going on.
    fn load(&mut self, lease: LeaseId, position: usize, block: (SpaceId, BlockHash)) -> bool {
        match self.apply(Event::Load { lease, position }).reply {
            Reply::Load(Load::Promote { load, from, slot, .. }) => {
                self.going.push(Going::Load { load, from, to: Some(slot), block });
            }
            Reply::Load(Load::Through { load, from, .. }) => {
                self.going.push(Going::Load { load, from, to: None, block });
            }
            Reply::Load(Load::Ready(slot)) => assert_eq!(self.host[&slot], Some(block)),
            Reply::Load(Load::Wait) => return true,
            Reply::Load(Load::Lost(_)) => {}
            other => panic!("{other:?}"),
        }
        false
    }

    /// Positions in reads of blocks that are on their way from a GPU.
    fn awaited_from(&self, gpu: GpuId) -> Vec<(LeaseId, usize, (SpaceId, BlockHash))> {
        let coming = |block: (SpaceId, BlockHash)| {
            self.going.iter().any(|going| match going {
                Going::Load { from: Origin::Gpu(from), block: other, .. } => {
                    from.gpu == gpu && *other == block
                }
                _ => false,
            })
        };
        let of_read = |read: &Reading| {
            let blocks = read.slots.iter().map(|slot| (read.space, slot.hash)).enumerate();
            let lease = read.lease;
            blocks.map(move |(position, block)| (lease, position, block)).collect::<Vec<_>>()
        };
        self.reads.iter().flat_map(of_read).filter(|(.., block)| coming(*block)).collect()
    }

    /// A GPU whose copies may never end is gone. Whoever waits for them gets the blocks from elsewhere, or hears that they are lost.
    fn lose(&mut self, gpu: GpuId) -> usize {
        let before = self.core.gpus()[gpu.0 as usize].lost;
        let awaited = self.awaited_from(gpu);
        // Some of them are of no use any more when they come, if they come.
        for (.., (space, hash)) in &awaited {
            if self.rng.random_bool(0.3) {
                self.apply(Event::Quarantine { space: *space, hash: *hash });
            }
        }
        let effects = self.apply(Event::Gpu(GpuEvent::Lose(gpu)));
        assert_eq!(effects.lost_gpus == [gpu], !before, "told of once");
        assert!(self.core.gpus()[gpu.0 as usize].lost);
        for (i, (lease, position, block)) in awaited.iter().enumerate() {
            let waits = self.load(*lease, *position, *block);
            // One of them may be awaited twice: then the first has begun another load.
            let again = awaited[..i].iter().any(|(.., other)| other == block);
            assert!(!waits || again, "a reader waits for ever");
        }
        awaited.len()
    }

    /// Every slot that is being read has the block that it had.
    fn check_reads(&self) {
        for read in &self.reads {
            for slot in &read.slots {
                let block = Some((read.space, slot.hash));
                if let Some(place) = slot.slot {
                    assert_eq!(self.host[&place], block, "a reader in host memory finds another block");
                }
                if let Some(place) = slot.gpu {
                    assert_eq!(self.gpu[&place], block, "a reader on a GPU finds another block");
                }
            }
        }
    }

    fn plan(&mut self) {
        let bytes = self.rng.random_range(0..10) * 4096;
        self.plan_in(Room { bytes, blocks: 5, idle: false });
    }

    fn plan_in(&mut self, room: Room) {
        let Reply::Copies(work) = self.apply(Event::Gpu(GpuEvent::Plan(room))).reply else { panic!() };
        let bytes: u64 = work.iter().map(|work| record(work).block_bytes.next_multiple_of(4096)).sum();
        let fits = bytes <= room.bytes || room.idle && work.len() == 1;
        assert!(fits && work.len() <= room.blocks, "no more than there is room for");
        for work in work {
            let block = (record(&work).space, record(&work).hash);
            match work {
                GpuWork::Promote { copy, from, to, .. } => {
                    assert_eq!(self.host[&from], Some(block));
                    let tenant = self.core.tenant(&block.0).unwrap().to_owned();
                    let fresh = !self.owners.contains_key(&(to.gpu, to.chunk));
                    let owner = self.owners.entry((to.gpu, to.chunk)).or_insert_with(|| tenant.clone());
                    assert_eq!(*owner, tenant, "a chunk of a GPU changed hands");
                    let gpus = self.core.gpus();
                    let here = |((gpu, _), owner): &(&(GpuId, u32), &String)| {
                        **owner == tenant && !gpus[gpu.0 as usize].lost
                    };
                    let chunks = self.owners.iter().filter(here).count();
                    // What it had before its share became smaller it keeps.
                    let in_service = gpus.iter().filter(|gpu| !gpu.lost).count();
                    let most =
                        if fresh { (MOST_CHUNKS * in_service).div_ceil(gpus.len()) } else { MOST_CHUNKS };
                    assert!(chunks <= most, "a tenant has {chunks} chunks");
                    // Half of it is there already.
                    self.gpu.insert(to, None);
                    self.going.push(Going::Promote { copy, from, to, block });
                }
                GpuWork::Demote { load, from, to, .. } => {
                    self.going.push(Going::Load { load, from: Origin::Gpu(from), to: Some(to), block });
                }
            }
        }
        self.check_reads();
    }

    fn end_some_move(&mut self) {
        if self.going.is_empty() {
            return;
        }
        let at = self.rng.random_range(0..self.going.len());
        let going = self.going.swap_remove(at);
        let ended = match self.rng.random_range(0..100) {
            0 if self.failures => Ended::Corrupt,
            1 if self.failures => Ended::Failed,
            2 if self.failures => Ended::Cancelled,
            _ => Ended::Done,
        };
        self.end(going, ended);
    }

    fn end(&mut self, going: Going, ended: Ended) {
        match going {
            Going::Promote { copy, from, to, block } => {
                assert_eq!(self.host[&from], Some(block), "the source of a copy changed");
                assert_eq!(self.gpu[&to], None, "two copies into one slot");
                self.gpu.insert(to, (ended == Ended::Done).then_some(block));
                self.apply(Event::Gpu(GpuEvent::EndCopy { copy, ended }));
            }
            Going::Load { load, from, to, block } => {
                if let Origin::Gpu(from) = from {
                    assert_eq!(self.gpu[&from], Some(block), "the source of a load changed");
                }
                if let Some(to) = to {
                    self.host.insert(to, (ended == Ended::Done).then_some(block));
                }
                self.apply(Event::EndLoad { load, ended });
            }
            // How devices behave when their moves fail is another test's business.
            Going::Move { id, .. } => {
                self.apply(Event::EndMove { id, ended: Ended::Done });
            }
        }
        self.check_reads();
    }

    fn end_some_read(&mut self) {
        if !self.reads.is_empty() {
            let at = self.rng.random_range(0..self.reads.len());
            let read = self.reads.swap_remove(at);
            self.apply(Event::EndRead(read.lease));
        }
    }

    fn release(&mut self) {
        if let Some((lease, _)) = self.leases.pop() {
            let session = self.session;
            self.apply(Event::Release { session, lease });
        }
    }

    /// All there is, at once; or a little that ends at any time.
    fn write_to_device(&mut self, at_once: bool) {
        let Some(device) = self.device else { return };
        for _ in 0..if at_once { 20 } else { 1 } {
            let room = Room { bytes: 1 << 20, blocks: 99, idle: true };
            let Reply::Moves(moves) = self.apply(Event::PlanMoves { device, room, sync: true }).reply else {
                panic!()
            };
            for planned in moves {
                let block = match &planned.work {
                    Work::Write { record, .. } => Some((record.space, record.hash)),
                    _ => None,
                };
                let going = Going::Move { id: planned.id, block };
                if at_once { self.end(going, Ended::Done) } else { self.going.push(going) }
            }
        }
    }

    /// Ends everything that is going on.
    fn finish(&mut self) {
        self.failures = false;
        for read in std::mem::take(&mut self.reads) {
            self.apply(Event::EndRead(read.lease));
        }
        self.now += 1000;
        self.apply(Event::Tick);
        for _ in 0..1000 {
            for going in std::mem::take(&mut self.going) {
                self.end(going, Ended::Done);
            }
            // Room for less than a demotion and the promotion that it is for.
            self.plan_in(Room { bytes: 4096, blocks: 1, idle: true });
            if self.going.is_empty() {
                break;
            }
        }
        assert_eq!(self.core.gpu_queue(), 0, "the queue never ends");
    }
}

fn record(work: &GpuWork) -> &Record {
    match work {
        GpuWork::Promote { record, .. } | GpuWork::Demote { record, .. } => record,
    }
}

/// What the GPUs did, and for how many blocks on their way from the one that was lost somebody waited.
fn history(policy: PolicyKind, seed: u64, events: u64, with_device: bool) -> (GpuCounters, usize) {
    let mut run = Run::new(policy, seed, with_device);
    // Long before the end one GPU goes, so that most of the history has both and some of it one.
    let (lost, mut awaited) = (events * 9 / 10, 0);
    for event in 0..events {
        run.step();
        // At a time when somebody waits for it, if there is one.
        let now = !run.core.gpus()[0].lost && event >= lost;
        let now = now && (!run.awaited_from(GpuId(0)).is_empty() || event + 1 == events);
        if now {
            awaited += run.lose(GpuId(0));
        }
        if event % AUDIT_EVERY == 0 || now {
            let audit = run.core.audit();
            audit.unwrap_or_else(|broken| panic!("{policy:?}, seed {seed}, after event {event}: {broken}"));
        }
    }
    run.finish();
    run.core.audit().unwrap();
    let usage = run.core.usage();
    assert_eq!((usage.leases, usage.used_slots), (0, usage.host_blocks));
    let gpus = run.core.gpus();
    assert!(gpus[0].lost && gpus[0].blocks == 0);
    let mut sum = GpuCounters::default();
    for GpuUsage { counters, .. } in gpus {
        sum.promoted_blocks += counters.promoted_blocks;
        sum.demoted_blocks += counters.demoted_blocks;
        sum.dropped_blocks += counters.dropped_blocks;
        sum.read_blocks += counters.read_blocks;
        sum.corrupt_blocks += counters.corrupt_blocks;
    }
    (sum, awaited)
}

#[test]
fn readers_find_their_blocks_whatever_copies_do() {
    let number = |name| std::env::vars().find(|(key, _)| key == name).map(|(_, v)| v.parse::<u64>().unwrap());
    let seed = number("CAIRN_CORE_SEED").unwrap_or_else(rand::random);
    let events = number("CAIRN_CORE_EVENTS").unwrap_or(DEFAULT_EVENTS);
    println!("CAIRN_CORE_SEED={seed}");
    let mut awaited = 0;
    for policy in PolicyKind::ALL {
        for with_device in [false, true] {
            let (sum, waiting) = history(policy, seed, events, with_device);
            awaited += waiting;
            println!("{policy:?}: {sum:?}");
            assert!(sum.promoted_blocks > events / 400, "the history must promote: {sum:?}");
            assert!(sum.dropped_blocks > 0 && sum.read_blocks > 10, "and read, and drop: {sum:?}");
            assert!(with_device || sum.demoted_blocks > 10, "and demote: {sum:?}");
        }
    }
    assert!(awaited > 0, "nobody ever waited for a GPU that was lost");
}
