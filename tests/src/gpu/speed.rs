//! What the device does in a second, each figure beside its limit, measured in the same run: copies against one raw pinned copy, moves against a
//! device copy, attention against bandwidth and against a bare product.

use super::{Bench, Format};
use cairn_gpu::backend::cuda::{
    Batch, BatchLimits, BatchRow, CudaMemory, Gemm, KernelSpec, ModelKernels, Partials, Plan, PoolLayer,
    Stopwatch,
};
use cairn_gpu::{BlockMove, Buffer, Copy, Device, PagedShape, Region, Slot, Stream};
use cairn_kernels::KvType;
use cairn_kernels::cuda::{ActType, HeadShape};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Times that each figure is taken; the median counts.
const ROUNDS: usize = 9;

/// Bytes after which random numbers come again.
const SAME: usize = 1 << 20;

/// Bytes of one canonical block in the benches: sixteen tokens of an 8B-class model.
const BLOCK: usize = 2 << 20;
const BLOCKS: usize = 256;

/// One figure.
pub struct Figure {
    /// What was measured.
    pub what: String,
    /// How much of it.
    pub value: f64,
    /// GB/s, TFLOP/s or ms.
    pub unit: &'static str,
    /// The same for what it is compared with, and what that is.
    pub limit: (f64, &'static str),
    /// Least share of the limit that is wanted; or, for times, the largest.
    pub goal: Option<f64>,
}

impl Figure {
    /// The share of the limit.
    pub fn ratio(&self) -> f64 {
        self.value / self.limit.0
    }

    /// For the report.
    pub fn json(&self) -> Value {
        json!({"what": self.what, "value": self.value, "unit": self.unit, "limit": self.limit.0, "limit_is": self.limit.1,
            "ratio": self.ratio(), "goal": self.goal})
    }
}

pub(super) fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Times that something is issued between two looks at the clock, so that the device works on while the next is issued.
const ISSUES: usize = 8;

/// A device that was idle first runs slowly.
const WARM_UP: Duration = Duration::from_millis(100);

/// Median seconds of what `issue` puts on the stream, once the device is awake.
fn seconds(bench: &Bench, mut issue: impl FnMut()) -> f64 {
    let started = Instant::now();
    while started.elapsed() < WARM_UP {
        issue();
        bench.stream.synchronize().expect("no failure");
    }
    let turn = |_| {
        let watch = Stopwatch::start(&bench.stream).expect("a watch");
        (0..ISSUES).for_each(|_| issue());
        watch.stop(&bench.stream).expect("no failure") / ISSUES as f64
    };
    median((0..ROUNDS).map(turn).collect())
}

/// Device memory with numbers between -1 and 1 in bf16: on zeros a card needs less power, and runs faster than it ever will.
fn numbers(bench: &mut Bench, bytes: usize) -> CudaMemory {
    let some = Format::Bf16.encode(&bench.numbers(SAME.min(bytes) / 2, 1.0));
    let memory = bench.device.allocate(bytes).expect("device memory");
    for offset in (0..bytes).step_by(SAME) {
        bench.stream.upload(&some[..SAME.min(bytes - offset)], &memory, offset).expect("issued");
    }
    bench.stream.synchronize().expect("uploaded");
    memory
}

fn region(
    buffer: Buffer<cairn_gpu::backend::cuda::CudaDevice>,
    offset: usize,
    bytes: usize,
) -> Region<cairn_gpu::backend::cuda::CudaDevice> {
    Region { buffer, offset, bytes }
}

/// Copies between host and device: blocks in a batch, against one copy of as many bytes.
pub fn copies(bench: &Bench) -> Vec<Figure> {
    let all = BLOCK * BLOCKS;
    let host = Buffer::Pinned(bench.device.share(bench.device.allocate_pinned(all).expect("pinned memory")));
    let device = Buffer::Device(bench.device.allocate(all).expect("device memory"));
    let mut figures = Vec::new();
    for (what, limit, source, target) in [
        ("blocks to the device", "one copy to the device", &host, &device),
        ("blocks to the host", "one copy to the host", &device, &host),
    ] {
        // In another order at each end, so that no two can be merged.
        let batch = || -> Vec<_> {
            let copy = |i: usize| Copy {
                source: region(source.clone(), i * BLOCK, BLOCK),
                target: region(target.clone(), (BLOCKS - 1 - i) * BLOCK, BLOCK),
            };
            (0..BLOCKS).map(copy).collect()
        };
        let one =
            || vec![Copy { source: region(source.clone(), 0, all), target: region(target.clone(), 0, all) }];
        let ours = seconds(bench, || bench.stream.copy(batch()).expect("issued"));
        let raw = seconds(bench, || bench.stream.copy(one()).expect("issued"));
        let rate = |seconds| all as f64 / seconds / 1e9;
        figures.push(Figure {
            what: what.into(),
            value: rate(ours),
            unit: "GB/s",
            limit: (rate(raw), limit),
            goal: Some(0.9),
        });
    }
    figures
}

/// Scatter and gather of blocks on the device against a device copy of as many bytes, and out of host memory against a copy from there.
pub fn moves(bench: &Bench) -> Vec<Figure> {
    let shape = PagedShape {
        layers: 32,
        kv_heads: 8,
        head_dim: 128,
        block_tokens: 16,
        slots: BLOCKS,
        kv_type: KvType::Bf16,
    };
    let all = shape.pool_bytes();
    let kernels = bench.device.move_kernels(shape).expect("kernels");
    let memory = || bench.device.allocate(all).expect("device memory");
    let (staging, pool, other) = (memory(), memory(), memory());
    let host = Buffer::Pinned(bench.device.share(bench.device.allocate_pinned(all).expect("pinned memory")));
    let on_device = Buffer::Device(staging.clone());
    let block = shape.block_bytes();
    let moves: Vec<BlockMove> =
        (0..BLOCKS).map(|i| BlockMove { staging_offset: i * block, slot: (i * 37 + 5) % BLOCKS }).collect();
    let raw = |from: &Buffer<_>, to: &Buffer<_>| {
        let copy = || vec![Copy { source: region(from.clone(), 0, all), target: region(to.clone(), 0, all) }];
        seconds(bench, || bench.stream.copy(copy()).expect("issued"))
    };
    let device_copy = raw(&on_device, &Buffer::Device(other));
    let (to_device, to_host) = (raw(&host, &on_device), raw(&on_device, &host));
    let scatter = |from: &Buffer<_>| {
        seconds(bench, || bench.stream.scatter_layers(&kernels, 0..32, from, &pool, &moves).expect("issued"))
    };
    let gather = |to: &Buffer<_>| {
        seconds(bench, || bench.stream.gather_layers(&kernels, 0..32, &pool, to, &moves).expect("issued"))
    };
    let rate = |seconds: f64| all as f64 / seconds / 1e9;
    let figure = |what: &str, seconds, limit, name, goal| Figure {
        what: what.into(),
        value: rate(seconds),
        unit: "GB/s",
        limit: (rate(limit), name),
        goal,
    };
    vec![
        figure("scatter on the device", scatter(&on_device), device_copy, "device copy", Some(0.8)),
        figure("gather on the device", gather(&on_device), device_copy, "device copy", Some(0.8)),
        figure("scatter out of host memory", scatter(&host), to_device, "one copy to the device", None),
        figure("gather into host memory", gather(&host), to_host, "one copy to the host", None),
    ]
}

struct Attention {
    kernels: ModelKernels,
    shape: PagedShape,
    pool: CudaMemory,
}

fn attention(bench: &mut Bench, slots: usize) -> Attention {
    let shape = HeadShape { kv_heads: 8, group: 4, head_dim: 128, block_tokens: 16 };
    let spec = KernelSpec { act: ActType::Bf16, kv_type: KvType::Bf16, shape, plain: false };
    let kernels = ModelKernels::load(&bench.device, spec).expect("kernels");
    let shape =
        PagedShape { layers: 1, kv_heads: 8, head_dim: 128, block_tokens: 16, slots, kv_type: KvType::Bf16 };
    let pool = numbers(bench, shape.pool_bytes());
    Attention { kernels, shape, pool }
}

impl Attention {
    fn seconds(&self, bench: &mut Bench, rows: &[BatchRow<'_>]) -> f64 {
        let limits = BatchLimits { vocabulary: 1, positions: 1 << 20, slots: self.shape.slots };
        let plan = Plan::new(self.kernels.spec().shape, limits, rows, &[]).expect("a plan");
        let batch = Batch::upload(&bench.stream, plan).expect("uploaded");
        let bytes = rows.len() * 32 * 128 * 2;
        let (queries, out) = (numbers(bench, bytes), bench.device.allocate(bytes).expect("device memory"));
        let at = PoolLayer { pool: &self.pool, shape: &self.shape, layer: 0 };
        let mut partials = Partials::default();
        seconds(bench, || {
            self.kernels
                .attend(&bench.stream, &queries.all(), 0.09, &batch, at, &mut partials, &out.all())
                .expect("issued");
        })
    }
}

/// Decode attention of sixteen sequences of 8,192 tokens against what a device copy reads and writes in a second.
pub fn decode(bench: &mut Bench) -> Figure {
    const SEQUENCES: usize = 16;
    const CONTEXT: usize = 8192;
    let attention = attention(bench, SEQUENCES * CONTEXT / 16);
    let tables: Vec<Vec<Slot>> = (0..SEQUENCES)
        .map(|s| (0..CONTEXT / 16).map(|i| Slot((i * SEQUENCES + s) as u32)).collect())
        .collect();
    let rows: Vec<BatchRow> =
        tables.iter().map(|slots| BatchRow { token: 0, position: CONTEXT - 1, slots }).collect();
    let took = attention.seconds(bench, &rows);
    let bytes = attention.shape.pool_bytes();
    let memory = || Buffer::Device(bench.device.allocate(bytes).expect("device memory"));
    let (from, to) = (memory(), memory());
    let copy = || vec![Copy { source: region(from.clone(), 0, bytes), target: region(to.clone(), 0, bytes) }];
    let copied = seconds(bench, || bench.stream.copy(copy()).expect("issued"));
    Figure {
        what: format!("decode attention, {SEQUENCES} x {CONTEXT} tokens"),
        value: bytes as f64 / took / 1e9,
        unit: "GB/s",
        limit: (2.0 * bytes as f64 / copied / 1e9, "read and write of a device copy"),
        goal: Some(0.6),
    }
}

/// Prefill attention of a chunk behind a cached prefix against a bare product.
pub fn prefill(bench: &mut Bench) -> Vec<Figure> {
    const CONTEXT: usize = 8192;
    const CHUNK: usize = 2048;
    let attention = attention(bench, CONTEXT / 16);
    let slots: Vec<Slot> = (0..CONTEXT as u32 / 16).map(Slot).collect();
    let rows: Vec<BatchRow> =
        (CONTEXT - CHUNK..CONTEXT).map(|position| BatchRow { token: 0, position, slots: &slots }).collect();
    let took = attention.seconds(bench, &rows);
    // Two products of head_dim for each query head, row and key that it sees.
    let seen: usize = rows.iter().map(|row| row.position + 1).sum();
    let work = 4.0 * 128.0 * 32.0 * seen as f64;
    let n = 4096;
    let gemm = Gemm::new(bench.stream.clone(), ActType::Bf16).expect("cuBLASLt");
    let weight = gemm.weight(numbers(bench, n * n * 2), n, n).expect("an algorithm");
    let free = gemm.weight_for(numbers(bench, n * n * 2), n, n, n).expect("an algorithm");
    let (x, y) = (numbers(bench, n * n * 2), bench.device.allocate(n * n * 4).expect("device memory"));
    let product = |weight| {
        let took = seconds(bench, || gemm.multiply(weight, &x.all(), n, &y.all()).expect("issued"));
        2.0 * (n as f64).powi(3) / took / 1e12
    };
    let (ours, best) = (product(&weight), product(&free));
    let figure = |what: String, value, limit| Figure { what, value, unit: "TFLOP/s", limit, goal: None };
    vec![
        figure(
            format!("prefill attention, {CHUNK} rows of {CONTEXT}"),
            work / took / 1e12,
            (best, "a product of 4096 x 4096 x 4096"),
        ),
        figure(
            "that product, its rows alike in any batch".into(),
            ours,
            (best, "by the algorithm for so many rows"),
        ),
    ]
}
