//! The core against a naive model that keeps everything in plain lists, on long random histories. A failing history
//! prints its seed; `CAIRN_CORE_SEED` replays it and `CAIRN_CORE_EVENTS` makes histories longer.

#![allow(clippy::unwrap_used)]

use cairn_core::*;
use cairn_proto::*;
use rand::{Rng, SeedableRng, rngs::StdRng};
use std::collections::{BTreeMap, VecDeque};

const SLOTS: usize = 24;
const DEFAULT_EVENTS: u64 = 300_000;
const AUDIT_EVERY: u64 = 7;

fn config(policy: PolicyKind, quota: Option<u64>) -> CoreConfig {
    CoreConfig {
        host_chunks: 3,
        chunk_bytes: 8 * 4096,
        slot_align_bytes: 4096,
        policy,
        admission: Admission::Always,
        tenants: vec![TenantQuota { name: "t".into(), max_blocks: quota, max_chunks: None }],
        history_entries: 64,
        max_leases_per_session: 4,
        max_reservations_per_session: 3,
        max_spaces: 4,
        hash_seed: [1, 2],
    }
}

fn space() -> KeySpace {
    let layout = Layout::new(1, 1, 64, 16).unwrap();
    KeySpace::new(SpaceParts::new("t", [0; 32], Dtype::Bf16, layout)).unwrap()
}

/// A block of the model: its path from the root, as a small string of branch numbers.
type Path = Vec<u8>;

fn hash(path: &[u8]) -> BlockHash {
    let tokens: Vec<u32> = path.iter().map(|branch| u32::from(*branch)).collect();
    BlockHasher::default().hash(Parent::Root(&SpaceId([0; 32])), &tokens, &[])
}

fn sum(path: &[u8], copy: u64) -> Checksum {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&copy.to_le_bytes());
    bytes[8] = path.len() as u8;
    Checksum(bytes)
}

#[derive(Default)]
struct Model {
    /// Oldest first.
    order: VecDeque<Path>,
    sums: BTreeMap<Path, Checksum>,
    leases: BTreeMap<LeaseId, (SessionId, u64, Vec<Path>)>,
    gone: BTreeMap<Path, MissReason>,
    fifo: bool,
    capacity: usize,
}

impl Model {
    fn touch(&mut self, path: &Path) {
        if self.fifo {
            return;
        }
        let position = self.order.iter().position(|p| p == path).unwrap();
        let path = self.order.remove(position).unwrap();
        self.order.push_back(path);
    }

    fn pinned(&self, path: &Path, also: &[Path]) -> bool {
        also.contains(path) || self.leases.values().any(|(_, _, run)| run.contains(path))
    }

    fn remove(&mut self, path: &Path, reason: MissReason) {
        self.order.retain(|p| p != path);
        self.sums.remove(path);
        self.gone.insert(path.clone(), reason);
    }

    fn expire(&mut self, now: u64) {
        let due: Vec<_> = self.leases.iter().filter(|(_, l)| l.1 <= now).map(|(id, _)| *id).collect();
        for id in due {
            self.leases.remove(&id);
        }
    }
}

struct Run {
    core: Core,
    model: Model,
    space: KeySpace,
    sessions: Vec<SessionId>,
    now: u64,
    copies: u64,
    rng: StdRng,
}

impl Run {
    fn apply(&mut self, event: Event<'_>) -> Effects {
        self.core.apply(Millis(self.now), event)
    }

    fn random_path(&mut self) -> Path {
        let length = self.rng.random_range(1..=6);
        (0..length).map(|_| self.rng.random_range(0..2)).collect()
    }

    fn step(&mut self) {
        self.now += self.rng.random_range(0..3);
        self.model.expire(self.now);
        let session = self.sessions[self.rng.random_range(0..self.sessions.len())];
        match self.rng.random_range(0..100) {
            0..45 => self.lookup(session),
            45..80 => self.publish(session),
            80..92 => self.release(),
            92..95 => self.quarantine(),
            95..97 => self.renew(),
            _ => self.reconnect(session),
        }
    }

    fn chain(path: &[u8]) -> Vec<BlockHash> {
        (1..=path.len()).map(|n| hash(&path[..n])).collect()
    }

    fn lookup(&mut self, session: SessionId) {
        let path = self.random_path();
        let ttl_ms = self.rng.random_range(1..40);
        let hashes = Self::chain(&path);
        let id = self.space.id();
        let reply = self.apply(Event::Lookup { session, space: id, hashes: &hashes, ttl_ms }).reply;
        let Reply::Found { lease, outcomes, checksums } = reply else { panic!("{reply:?}") };
        let run = (1..=path.len()).take_while(|n| self.model.sums.contains_key(&path[..*n])).count();
        let busy = self.model.leases.values().filter(|l| l.0 == session).count() >= 4;
        let hit = if busy { Outcome::Busy } else { Outcome::Hit(Tier::Host) };
        assert!(outcomes[..run].iter().all(|outcome| *outcome == hit));
        if let Some(hole) = outcomes.get(run) {
            let known = self.model.gone.get(&path[..=run]).copied();
            let expected = known.unwrap_or(MissReason::NeverStored);
            assert_eq!(*hole, Outcome::Miss(expected), "{path:?} at {run}");
        }
        for rest in outcomes.iter().skip(run + 1) {
            assert_eq!(*rest, Outcome::Miss(MissReason::ParentMissing));
        }
        assert_eq!(lease.is_some(), run > 0 && !busy);
        if let Some(lease) = lease {
            let run: Vec<Path> = (1..=run).map(|n| path[..n].to_vec()).collect();
            let expected: Vec<_> = run.iter().map(|path| self.model.sums[path]).collect();
            assert_eq!(checksums, expected);
            run.iter().rev().for_each(|path| self.model.touch(path));
            self.model.leases.insert(lease, (session, self.now + u64::from(ttl_ms), run));
        }
    }

    /// One whole reserve, fill, commit and end, with some blocks never committed.
    fn publish(&mut self, session: SessionId) {
        let path = self.random_path();
        let start = self.rng.random_range(0..path.len());
        let (id, hashes) = (self.space.id(), Self::chain(&path)[start..].to_vec());
        let parent = (start > 0).then(|| hash(&path[..start]));
        let reserve = Event::Reserve { session, space: id, parent, hashes: &hashes, ttl_ms: 50 };
        let reply = self.apply(reserve).reply;
        let Reply::Reserved { reservation, grants } = reply else { panic!("{reply:?}") };
        let expected = self.model_reserve(&path, start);
        assert_eq!(grants, expected, "{path:?} from {start}");
        let Some(reservation) = reservation else {
            return;
        };
        let reply = self.apply(Event::BeginFill { session, reservation }).reply;
        let Reply::Fill { slots, .. } = reply else { panic!("{reply:?}") };
        let give_up_at = if self.rng.random_bool(0.2) { self.rng.random_range(0..grants.len()) } else { 99 };
        let mut broken = false;
        let mut committed = Vec::new();
        for (block, grant) in grants.iter().enumerate() {
            let path = path[..=start + block].to_vec();
            let skipped = block == give_up_at;
            if *grant != Grant::Granted || skipped {
                broken = *grant != Grant::AlreadyStored;
                continue;
            }
            assert!(slots.iter().any(|slot| slot.block == block && slot.hash == hash(&path)));
            self.copies += 1;
            let checksum = sum(&path, self.copies);
            let reply = self.apply(Event::Commit { reservation, block, checksum }).reply;
            if broken {
                assert_eq!(reply, Reply::Committed(CommitOutcome::ParentMissing));
                continue;
            }
            assert_eq!(reply, Reply::Committed(CommitOutcome::Committed));
            self.model.sums.insert(path.clone(), checksum);
            committed.push(path);
        }
        self.apply(Event::EndFill(reservation));
        self.model_end(&path, start, &grants, &committed);
    }

    /// What the core should grant, and whom it should evict for it.
    fn model_reserve(&mut self, path: &Path, start: usize) -> Vec<Grant> {
        let grants = path.len() - start;
        if start > 0 {
            let parent = path[..start].to_vec();
            if !self.model.sums.contains_key(&parent) {
                return vec![Grant::ParentMissing; grants];
            }
            self.model_touch_up(path, start);
        }
        let mut pinned: Vec<Path> = (start > 0).then(|| path[..start].to_vec()).into_iter().collect();
        let mut reserved = 0;
        let mut full = false;
        let mut expected = Vec::new();
        for n in start + 1..=path.len() {
            let block = path[..n].to_vec();
            if self.model.sums.contains_key(&block) {
                pinned.push(block);
                expected.push(Grant::AlreadyStored);
                continue;
            }
            if !full && self.model.sums.len() + reserved >= self.model.capacity {
                let order = self.model.order.clone();
                match order.iter().find(|candidate| !self.model.pinned(candidate, &pinned)) {
                    Some(victim) => self.model.remove(victim, MissReason::Evicted),
                    None => full = true,
                }
            }
            if full {
                self.model.gone.insert(block, MissReason::NotAdmitted);
                expected.push(Grant::NoSpace);
            } else {
                reserved += 1;
                expected.push(Grant::Granted);
            }
        }
        if !expected.contains(&Grant::Granted) {
            self.model_end(path, start, &expected, &[]);
        }
        expected
    }

    fn model_end(&mut self, path: &Path, start: usize, grants: &[Grant], committed: &[Path]) {
        for (block, grant) in grants.iter().enumerate().rev() {
            let path = path[..=start + block].to_vec();
            if committed.contains(&path) {
                self.model.order.push_back(path);
            } else if *grant == Grant::AlreadyStored {
                self.model.touch(&path);
            }
        }
        self.model_touch_up(path, start);
    }

    /// Touches the ancestors from depth `from` up to the first hole.
    fn model_touch_up(&mut self, path: &Path, from: usize) {
        for n in (1..=from).rev() {
            let ancestor = path[..n].to_vec();
            if !self.model.sums.contains_key(&ancestor) {
                return;
            }
            self.model.touch(&ancestor);
        }
    }

    fn any_lease(&mut self) -> Option<(LeaseId, SessionId)> {
        let all: Vec<_> = self.model.leases.iter().map(|(id, lease)| (*id, lease.0)).collect();
        (!all.is_empty()).then(|| all[self.rng.random_range(0..all.len())])
    }

    fn release(&mut self) {
        let Some((lease, session)) = self.any_lease() else {
            return;
        };
        self.apply(Event::Release { session, lease });
        self.model.leases.remove(&lease);
    }

    fn renew(&mut self) {
        let Some((lease, session)) = self.any_lease() else {
            return;
        };
        assert_eq!(self.apply(Event::Renew { session, lease, ttl_ms: 30 }).reply, Reply::Done);
        self.model.leases.get_mut(&lease).unwrap().1 = self.now + 30;
    }

    /// Removes a block that nobody holds: pinned removals are covered by the named tests below.
    fn quarantine(&mut self) {
        let path = self.random_path();
        if self.model.pinned(&path, &[]) {
            return;
        }
        let space = self.space.id();
        self.apply(Event::Quarantine { space, hash: hash(&path) });
        if self.model.sums.contains_key(&path) {
            self.model.remove(&path, MissReason::Quarantined);
        }
    }

    fn reconnect(&mut self, session: SessionId) {
        assert_eq!(self.apply(Event::EndSession(session)).reply, Reply::Done);
        self.model.leases.retain(|_, lease| lease.0 != session);
        let Reply::Session(new) = self.apply(Event::OpenSession).reply else { panic!() };
        self.sessions.retain(|old| *old != session);
        self.sessions.push(new);
    }
}

fn history(policy: PolicyKind, quota: Option<u64>, seed: u64, events: u64) {
    let mut core = Core::new(CoreConfig { history_entries: 4096, ..config(policy, quota) }).unwrap();
    let space = space();
    let sessions: Vec<_> = (0..3)
        .map(|_| match core.apply(Millis(0), Event::OpenSession).reply {
            Reply::Session(id) => id,
            other => panic!("{other:?}"),
        })
        .collect();
    core.apply(Millis(0), Event::OpenSpace { session: sessions[0], space: &space });
    let capacity = quota.map_or(SLOTS, |quota| SLOTS.min(quota as usize));
    let model = Model { fifo: policy == PolicyKind::Fifo, capacity, ..Model::default() };
    let rng = StdRng::seed_from_u64(seed);
    let mut run = Run { core, model, space, sessions, now: 0, copies: 0, rng };
    for event in 0..events {
        run.step();
        if event % AUDIT_EVERY == 0 {
            run.core.audit().unwrap_or_else(|broken| panic!("after event {event}: {broken}"));
            assert_eq!(run.core.usage().resident_blocks, run.model.sums.len());
        }
    }
    for session in run.sessions.clone() {
        run.apply(Event::EndSession(session));
    }
    let usage = run.core.usage();
    assert_eq!((usage.leases, usage.reservations), (0, 0));
    assert_eq!(usage.used_slots, usage.resident_blocks);
    run.core.audit().unwrap();
    assert!(run.core.counters().evicted_blocks > events / 100, "the history must exercise eviction");
}

#[test]
fn the_core_behaves_like_the_naive_model() {
    let number = |name| std::env::vars().find(|(key, _)| key == name).map(|(_, v)| v.parse::<u64>().unwrap());
    let seed = number("CAIRN_CORE_SEED").unwrap_or_else(rand::random);
    let events = number("CAIRN_CORE_EVENTS").unwrap_or(DEFAULT_EVENTS);
    println!("CAIRN_CORE_SEED={seed}");
    for policy in [PolicyKind::Lru, PolicyKind::Fifo] {
        history(policy, None, seed, events);
        history(policy, Some(13), seed.wrapping_add(1), events);
    }
}
