//! Embedding, norms, rotary positions and gated units against their references.

use super::{Bench, Format, close};
use cairn_gpu::backend::cuda::{
    Batch, BatchLimits, BatchRow, HeadExtras, KernelSpec, ModelKernels, Plan, PoolLayer,
};
use cairn_gpu::{KvType, PagedShape, Slot};
use cairn_kernels::cuda::{ActType, HeadShape};
use cairn_kernels::reference;

/// A format for products and a pool, as both are called.
pub(super) const KINDS: [(ActType, KvType, Format); 3] = [
    (ActType::Bf16, KvType::Bf16, Format::Bf16),
    (ActType::F16, KvType::F16, Format::F16),
    (ActType::F32, KvType::F32, Format::F32),
];

/// Relative error of a kernel: a few roundings in single precision, and one of the output.
fn tolerance(format: Format) -> f64 {
    format.unit() + 4e-6
}

struct Case {
    kernels: ModelKernels,
    format: Format,
    shape: HeadShape,
    limits: BatchLimits,
}

pub(super) fn check(bench: &mut Bench, case: usize) {
    let (act, kv_type, format) = KINDS[case % KINDS.len()];
    let shape =
        HeadShape { kv_heads: 1 + bench.below(3), group: 1 + bench.below(5), head_dim: 64, block_tokens: 16 };
    let spec = KernelSpec { act, kv_type, shape, plain: false };
    let kernels = ModelKernels::load(&bench.device, spec).expect("kernels");
    let limits = BatchLimits { vocabulary: 40, positions: 100, slots: 5 };
    let case = Case { kernels, format, shape, limits };
    embed(bench, &case);
    norm(bench, &case, false);
    norm(bench, &case, true);
    rotate(bench, &case);
    gate(bench, &case);
    println!("embed, rms_norm, rotate, gate: {act:?}: within {:.1e}", tolerance(format));
}

/// Rows of two sequences, the slots of which are given.
fn rows<'a>(bench: &mut Bench, case: &Case, slots: &'a [Vec<Slot>; 2]) -> Vec<BatchRow<'a>> {
    let mut rows = Vec::new();
    for slots in slots {
        let room = slots.len() * case.shape.block_tokens;
        let first = bench.below(room - 1);
        let count = 1 + bench.below((room - first).min(9));
        rows.extend((first..first + count).map(|position| {
            let token = bench.below(case.limits.vocabulary) as u32;
            BatchRow { token, position, slots }
        }));
    }
    rows
}

fn slots() -> [Vec<Slot>; 2] {
    [vec![Slot(4), Slot(0)], vec![Slot(2)]]
}

fn upload(bench: &Bench, case: &Case, rows: &[BatchRow<'_>], chosen: &[usize]) -> Batch {
    let plan = Plan::new(case.shape, case.limits, rows, chosen).expect("a valid batch");
    Batch::upload(&bench.stream, plan).expect("uploaded")
}

fn embed(bench: &mut Bench, case: &Case) {
    let width = 8 * (1 + bench.below(40));
    let (slots, format) = (slots(), case.format);
    let rows = rows(bench, case, &slots);
    let table = format.round(&bench.numbers(case.limits.vocabulary * width, 2.0));
    let batch = upload(bench, case, &rows, &[]);
    let (on_device, out) = (bench.put(&format.encode(&table)), bench.poisoned(rows.len() * width * 4));
    case.kernels.embed(&bench.stream, &on_device.all(), width, &batch, &out.all()).expect("issued");
    let expected: Vec<f32> =
        rows.iter().flat_map(|row| &table[row.token as usize * width..][..width]).copied().collect();
    assert!(bench.get_f32(&out) == expected, "embedding");
}

fn norm(bench: &mut Bench, case: &Case, choose: bool) {
    let width = 8 * (1 + bench.below(300));
    let slots = slots();
    let rows = rows(bench, case, &slots);
    let chosen: Vec<usize> = (0..rows.len()).filter(|i| i % 2 == 1).chain([0]).collect();
    let batch = upload(bench, case, &rows, &chosen);
    let (x, delta) = (bench.numbers(rows.len() * width, 30.0), bench.numbers(rows.len() * width, 3.0));
    let weight = bench.numbers(width, 1.5);
    let results = if choose { chosen.clone() } else { (0..rows.len()).collect() };
    let with_delta = choose || bench.below(2) == 0;
    let (dx, dd, dw) = (bench.put_f32(&x), bench.put_f32(&delta), bench.put_f32(&weight));
    let out = bench.poisoned(results.len() * width * case.format.encode(&[0.0]).len());
    let add = dd.all();
    case.kernels
        .rms_norm(
            &bench.stream,
            &dx.all(),
            with_delta.then_some(&add),
            &dw.all(),
            (rows.len(), choose.then_some(&batch)),
            (width, 1e-5),
            &out.all(),
        )
        .expect("issued");
    let sum: Vec<f32> = x.iter().zip(&delta).map(|(x, d)| if with_delta { x + d } else { *x }).collect();
    let expected: Vec<f64> = results
        .iter()
        .flat_map(|row| reference::rms_norm(&sum[row * width..][..width], &weight, 1e-5))
        .collect();
    let got = case.format.decode(&bench.get(&out));
    close("rms_norm", &got, &expected, tolerance(case.format));
    let kept = bench.get_f32(&dx);
    for row in results {
        assert!(
            kept[row * width..][..width] == sum[row * width..][..width],
            "the sum is kept for what follows"
        );
    }
}

fn rotate(bench: &mut Bench, case: &Case) {
    let HeadShape { kv_heads, group, head_dim, block_tokens } = case.shape;
    let (heads, all, half) = (kv_heads * group, kv_heads * (group + 2), head_dim / 2);
    let slots = slots();
    let rows = rows(bench, case, &slots);
    let batch = upload(bench, case, &rows, &[]);
    let qkv = bench.numbers(rows.len() * all * head_dim, 2.0);
    let bias = bench.numbers(all * head_dim, 0.5);
    let norms = [bench.numbers(head_dim, 1.5), bench.numbers(head_dim, 1.5)];
    let (with_bias, with_norms) = (bench.below(2) == 0, bench.below(2) == 0);
    let extras = HeadExtras {
        bias: with_bias.then(|| bench.put_f32(&bias)),
        norms: with_norms.then(|| (bench.put_f32(&norms[0]), bench.put_f32(&norms[1]))),
    };
    let frequencies: Vec<f64> = (0..half).map(|i| 1e4f64.powf(-(i as f64) / half as f64)).collect();
    let table = rope_table(&frequencies, case.limits.positions);
    let shape = PagedShape {
        layers: 2,
        kv_heads,
        head_dim,
        block_tokens,
        slots: case.limits.slots,
        kv_type: case.kernels.spec().kv_type,
    };
    let (pool, rope) = (bench.poisoned(shape.pool_bytes()), bench.put_f32(&table));
    let before = bench.get(&pool);
    let width = shape.kv_type.bytes();
    let queries = bench.poisoned(rows.len() * heads * head_dim * width);
    let at = PoolLayer { pool: &pool, shape: &shape, layer: 1 };
    let on_device = bench.put_f32(&qkv);
    case.kernels
        .rotate(&bench.stream, &on_device.all(), (&extras, 1e-5), &rope.all(), &batch, &queries.all(), at)
        .expect("issued");
    let (queries, after) = (case.format.decode(&bench.get(&queries)), bench.get(&pool));
    let mut untouched = vec![true; after.len()];
    for (r, row) in rows.iter().enumerate() {
        for head in 0..all {
            let from = (r * all + head) * head_dim;
            let mut x: Vec<f32> = qkv[from..from + head_dim].to_vec();
            if with_bias {
                x.iter_mut().zip(&bias[head * head_dim..]).for_each(|(x, bias)| *x += bias);
            }
            let value = head >= heads + kv_heads;
            if with_norms && !value {
                let weight = &norms[usize::from(head >= heads)];
                x = reference::rms_norm(&x, weight, 1e-5).iter().map(|x| *x as f32).collect();
            }
            let exact: Vec<f64> = if value {
                x.iter().map(|x| f64::from(*x)).collect()
            } else {
                reference::rope(&frequencies, row.position, &x)
            };
            // A rotation may cancel: errors are relative to the head's numbers, which the norm's weights and biases keep below five.
            let relative = 5.0 * (tolerance(case.format) + 2e-5);
            if head < heads {
                close(
                    "rotate, a query",
                    &queries[(r * heads + head) * head_dim..][..head_dim],
                    &exact,
                    relative,
                );
                continue;
            }
            let kv_head = if value { head - heads - kv_heads } else { head - heads };
            let slot = row.slots[row.position / block_tokens].0 as usize;
            let token = row.position % block_tokens;
            let place =
                reference::cuda_pool_at(&shape, [1, slot, usize::from(value), kv_head, token, 0]) * width;
            let got = case.format.decode(&after[place..][..head_dim * width]);
            close("rotate, the pool", &got, &exact, relative);
            untouched[place..][..head_dim * width].fill(false);
        }
    }
    let changed = (0..after.len()).find(|i| untouched[*i] && after[*i] != before[*i]);
    assert_eq!(changed, None, "rotate writes the rows' places in the pool, nothing else");
}

/// As the model makes it: for each position the cosines, then the sines.
pub(super) fn rope_table(frequencies: &[f64], positions: usize) -> Vec<f32> {
    let at = |position: usize, turn: fn(f64) -> f64| {
        frequencies.iter().map(move |frequency| turn(position as f64 * frequency) as f32)
    };
    (0..positions).flat_map(|position| at(position, f64::cos).chain(at(position, f64::sin))).collect()
}

fn gate(bench: &mut Bench, case: &Case) {
    let (rows, width) = (1 + bench.below(9), 8 * (1 + bench.below(100)));
    let gate_up = bench.numbers(rows * 2 * width, 95.0);
    let out = bench.poisoned(rows * width * case.format.encode(&[0.0]).len());
    let on_device = bench.put_f32(&gate_up);
    case.kernels.gate(&bench.stream, &on_device.all(), (rows, width), &out.all()).expect("issued");
    let expected: Vec<f64> =
        gate_up.chunks_exact(2 * width).flat_map(|row| reference::swiglu(row, width)).collect();
    close("gate", &case.format.decode(&bench.get(&out)), &expected, tolerance(case.format) + 1e-5);
}
