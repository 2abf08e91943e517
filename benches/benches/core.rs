//! The core's decisions: looking chains up, publishing, evicting. The limit beside them is what the same number of
//! dependent-free random reads costs in memory of the index's size. Hashing of tokens is measured too, and moving blocks between a paged pool
//! and canonical order, beside a memcpy.

use cairn_core::*;
use cairn_kernels::{KvType, PagedShape, gather_block, scatter_block};
use cairn_proto::*;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

const CHAIN: usize = 1024;
const SLOT: u64 = 4096;

/// Chains in the index: a small one that fits the caches and one of a million blocks. Tests run with few.
fn sizes() -> [usize; 2] {
    let measuring = std::env::args().any(|argument| argument == "--bench");
    if measuring { [16, 1024] } else { [2, 4] }
}

fn space() -> KeySpace {
    let layout = Layout::new(1, 1, 64, 16).expect("a valid layout");
    KeySpace::new(SpaceParts::new("bench", [0; 32], Dtype::Bf16, layout)).expect("a valid space")
}

struct Filled {
    core: Core,
    space: KeySpace,
    session: SessionId,
    chains: Vec<Vec<BlockHash>>,
}

fn hashes(space: &KeySpace, seed: u32) -> Vec<BlockHash> {
    let tokens: Vec<u32> = (0..16 * CHAIN as u32).map(|i| i ^ (seed << 16)).collect();
    chain(space, &tokens, |_| &[])
}

/// The default, and the one that all others are compared with.
const POLICIES: [PolicyKind; 2] = [PolicyKind::Cairn, PolicyKind::Lru];

/// A core that is full of `chains` chains.
fn filled(chains: usize, policy: PolicyKind) -> Filled {
    let blocks_per_chunk = 1024;
    let core = Core::new(CoreConfig {
        host_chunks: (chains * CHAIN).div_ceil(blocks_per_chunk) as u32,
        chunk_bytes: blocks_per_chunk as u64 * SLOT,
        slot_align_bytes: SLOT,
        policy,
        admission: cairn_core::Admission::Always,
        tenants: Vec::new(),
        history_entries: 65_536,
        max_leases_per_session: 16,
        max_reservations_per_session: 16,
        max_spaces: 4,
        hash_seed: [0x1234_5678, 0x9abc_def0],
    });
    let mut core = core.expect("valid settings");
    let space = space();
    let Reply::Session(session) = core.apply(Millis(0), Event::OpenSession).reply else { unreachable!() };
    core.apply(Millis(0), Event::OpenSpace { session, space: &space });
    let chains: Vec<_> = (0..chains as u32).map(|seed| hashes(&space, seed)).collect();
    let mut filled = Filled { core, space, session, chains: Vec::new() };
    for chain in &chains {
        publish(&mut filled, chain);
    }
    filled.chains = chains;
    filled
}

fn publish(filled: &mut Filled, hashes: &[BlockHash]) {
    let Filled { core, space, session, .. } = filled;
    let reserve = Event::Reserve { session: *session, space: space.id(), parent: None, hashes, ttl_ms: 1000 };
    let Reply::Reserved { reservation: Some(reservation), .. } = core.apply(Millis(1), reserve).reply else {
        unreachable!("there is always room or something to evict")
    };
    core.apply(Millis(1), Event::BeginFill { session: *session, reservation });
    for block in 0..hashes.len() {
        core.apply(Millis(1), Event::Commit { reservation, block, checksum: Checksum([0; 16]) });
    }
    core.apply(Millis(1), Event::EndFill(reservation));
}

fn lookups(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("lookup of a 1024-block chain");
    group.throughput(Throughput::Elements(CHAIN as u64));
    for chains in sizes() {
        for policy in POLICIES {
            let mut filled = filled(chains, policy);
            let mut next = 0;
            let name = format!("{}, {} blocks in the index", policy.name(), chains * CHAIN);
            group.bench_function(name, |bencher| {
                bencher.iter(|| {
                    next = (next + 7) % chains;
                    let Filled { core, space, session, chains } = &mut filled;
                    let lookup = Event::Lookup {
                        session: *session,
                        space: space.id(),
                        hashes: &chains[next],
                        ttl_ms: 1000,
                    };
                    let Reply::Found { lease: Some(lease), .. } = core.apply(Millis(2), lookup).reply else {
                        unreachable!("everything is resident")
                    };
                    core.apply(Millis(2), Event::Release { session: *session, lease });
                });
            });
        }
        // What 1024 random reads of one cache line each cost in memory as large as the index.
        let lines = (chains * CHAIN * 144 / 64).next_power_of_two();
        let memory = vec![1u64; lines * 8];
        let mut state = 1usize;
        group.bench_function(format!("limit: random reads, {} MiB", (lines * 64) >> 20), |bencher| {
            bencher.iter(|| {
                let mut sum = 0u64;
                for _ in 0..CHAIN {
                    state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                    sum = sum.wrapping_add(memory[(state >> 33) % lines * 8]);
                }
                black_box(sum)
            });
        });
    }
    group.finish();
}

fn publishes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("publish of a 1024-block chain");
    group.throughput(Throughput::Elements(CHAIN as u64));
    let chains = sizes()[1];
    for policy in POLICIES {
        let mut filled = filled(chains, policy);
        let mut seed = chains as u32;
        group.bench_function(format!("{}, into a full index, evicting as many", policy.name()), |bencher| {
            let space = filled.space.clone();
            bencher.iter_batched(
                || {
                    seed += 1;
                    hashes(&space, seed)
                },
                |hashes| publish(&mut filled, &hashes),
                BatchSize::LargeInput,
            );
        });
        filled.core.audit().expect("the invariants hold");
    }
    group.finish();
}

fn identity(criterion: &mut Criterion) {
    let space = space();
    let tokens: Vec<u32> = (0..16 * CHAIN as u32).collect();
    let mut group = criterion.benchmark_group("identity");
    group.throughput(Throughput::Elements(CHAIN as u64));
    group.bench_function("hashing 1024 blocks of 16 tokens", |bencher| {
        bencher.iter(|| chain(&space, black_box(&tokens), |_| &[]));
    });
    let payload = vec![7u8; 1 << 20];
    group.throughput(Throughput::Bytes(payload.len() as u64));
    let (id, hash) = (space.id(), BlockHash([1; 32]));
    group.bench_function("checksum of 1 MiB", |bencher| {
        bencher.iter(|| Checksum::of(&id, &hash, black_box(&payload)))
    });
    let mut copy = vec![0u8; 1 << 20];
    group.bench_function("limit: memcpy of 1 MiB", |bencher| {
        bencher.iter(|| black_box(&mut copy).copy_from_slice(black_box(&payload)));
    });
    group.finish();
}

/// Blocks of an 8B-class model: 2 MiB each.
fn paging(criterion: &mut Criterion) {
    const SLOTS: usize = 64;
    let shape = PagedShape {
        layers: 32,
        kv_heads: 8,
        head_dim: 128,
        block_tokens: 16,
        slots: SLOTS,
        kv_type: KvType::Bf16,
    };
    let bytes = shape.block_bytes();
    let mut pool = vec![3u8; shape.pool_bytes()];
    let mut block = vec![0u8; bytes];
    let mut slot = 0;
    let mut next = move || {
        slot = (slot + 37) % SLOTS;
        slot
    };
    let mut group = criterion.benchmark_group("paged pool");
    group.throughput(Throughput::Bytes(bytes as u64));
    group.bench_function("gather of 2 MiB", |bencher| {
        bencher.iter(|| gather_block(&shape, black_box(&pool), next(), black_box(&mut block)));
    });
    group.bench_function("scatter of 2 MiB", |bencher| {
        bencher.iter(|| scatter_block(&shape, black_box(&block), black_box(&mut pool), next()));
    });
    group.bench_function("limit: memcpy of 2 MiB", |bencher| {
        bencher.iter(|| {
            let from = next() * bytes;
            black_box(&mut block).copy_from_slice(black_box(&pool[from..from + bytes]));
        });
    });
    group.finish();
}

criterion_group!(benches, lookups, publishes, identity, paging);
criterion_main!(benches);
