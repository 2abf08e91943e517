//! Attention against the reference, and against itself: the same rows in any chunking and by any of its kernels are the same bits.

use super::layers::KINDS;
use super::{Bench, Format, close};
use cairn_gpu::backend::cuda::{
    Batch, BatchLimits, BatchRow, CudaMemory, KernelSpec, ModelKernels, Partials, Plan, PoolLayer,
};
use cairn_gpu::{PagedShape, Slot};
use cairn_kernels::KvType;
use cairn_kernels::cuda::HeadShape;
use cairn_kernels::reference;
use rand::seq::SliceRandom;

struct Case {
    kernels: ModelKernels,
    format: Format,
    shape: PagedShape,
    group: usize,
    pool: CudaMemory,
    /// The numbers in it.
    numbers: Vec<f32>,
    /// Keys of the longest context.
    most: usize,
    scale: f32,
}

pub(super) fn check(bench: &mut Bench, case: usize) {
    let (act, kv_type, format) = KINDS[case % KINDS.len()];
    let shape = HeadShape {
        kv_heads: 1 + bench.below(2),
        group: [1, 3, 4, 7, 8, 16][bench.below(6)],
        head_dim: [64, 128][bench.below(2)],
        block_tokens: [16, 32][bench.below(2)],
    };
    let plain = case % 4 == 3 || kv_type == KvType::F32;
    let kernels =
        ModelKernels::load(&bench.device, KernelSpec { act, kv_type, shape, plain }).expect("kernels");
    let HeadShape { kv_heads, group, head_dim, block_tokens } = shape;
    // Beyond four splits `decode` needs a second block; as often as time allows on an emulator.
    let most = if case.is_multiple_of(3) { 1400 } else { 800 };
    let slots = (most + 1100) / block_tokens;
    let shape = PagedShape { layers: 2, kv_heads, head_dim, block_tokens, slots, kv_type };
    let numbers = format.round(&bench.numbers(shape.pool_bytes() / kv_type.bytes(), 1.0));
    let pool = bench.poisoned(shape.pool_bytes());
    let scale = 1.0 / (head_dim as f32).sqrt();
    let case = Case { kernels, format, shape, group, pool, numbers, most, scale };
    exact(bench, &case);
    identical(bench, &case);
    println!(
        "attention: {act:?}, group {group}, heads of {head_dim}, plain {plain}: close to exact, and alike in any cut"
    );
}

/// Slots of a sequence with room for so many tokens, none twice.
fn slots(bench: &mut Bench, case: &Case, tokens: usize) -> Vec<Slot> {
    let mut all: Vec<Slot> = (0..case.shape.slots as u32).map(Slot).collect();
    all.shuffle(&mut bench.rng);
    all.truncate(tokens.div_ceil(case.shape.block_tokens));
    all
}

fn run(bench: &Bench, case: &Case, rows: &[BatchRow<'_>], queries: &[f32]) -> Vec<u8> {
    fill(bench, case, rows);
    let limits = BatchLimits { vocabulary: 1, positions: 4000, slots: case.shape.slots };
    let plan = Plan::new(case.kernels.spec().shape, limits, rows, &[]).expect("a valid batch");
    let batch = Batch::upload(&bench.stream, plan).expect("uploaded");
    let queries = bench.put(&case.format.encode(queries));
    let out = bench.poisoned(queries.len());
    let at = PoolLayer { pool: &case.pool, shape: &case.shape, layer: 1 };
    let mut partials = Partials::default();
    case.kernels
        .attend(&bench.stream, &queries.all(), case.scale, &batch, at, &mut partials, &out.all())
        .expect("issued");
    bench.get(&out)
}

/// The pool holds the contexts of these rows; everything else is not a number.
fn fill(bench: &Bench, case: &Case, rows: &[BatchRow<'_>]) {
    let PagedShape { kv_heads, head_dim, block_tokens, .. } = case.shape;
    let mut numbers = vec![f32::NAN; case.numbers.len()];
    for row in rows {
        for token in 0..=row.position {
            let slot = row.slots[token / block_tokens].0 as usize;
            for (side, head) in (0..2 * kv_heads).map(|i| (i % 2, i / 2)) {
                let at = reference::cuda_pool_at(&case.shape, [1, slot, side, head, token % block_tokens, 0]);
                numbers[at..at + head_dim].copy_from_slice(&case.numbers[at..at + head_dim]);
            }
        }
    }
    bench.stream.upload(&case.format.encode(&numbers), &case.pool, 0).expect("issued");
}

fn row(position: usize, slots: &[Slot]) -> BatchRow<'_> {
    BatchRow { token: 0, position, slots }
}

fn exact(bench: &mut Bench, case: &Case) {
    // A prompt's chunk, a lone answer with a long context, and one at its very first token.
    let start = bench.below(300);
    let count = 2 + bench.below(20);
    let of_prompt = slots(bench, case, start + count);
    let context = 1 + bench.below(case.most - 100);
    let of_answer = slots(bench, case, context);
    let of_first = slots(bench, case, 1);
    let mut rows: Vec<BatchRow> = (start..start + count).map(|position| row(position, &of_prompt)).collect();
    rows.push(row(context - 1, &of_answer));
    rows.push(row(0, &of_first));
    let (heads, d) = (case.shape.kv_heads * case.group, case.shape.head_dim);
    // Some rows see one key almost alone: there the running maximum moves.
    let mut queries = bench.numbers(rows.len() * heads * d, 2.0);
    queries.chunks_exact_mut(3 * d).for_each(|some| some[..d].iter_mut().for_each(|x| *x *= 12.0));
    let queries = case.format.round(&queries);
    let got = case.format.decode(&run(bench, case, &rows, &queries));
    // Weights are rounded to the pool's format before they meet the values, which are below one.
    let relative = 3.0 * case.format.unit() + 2e-5;
    for (r, row) in rows.iter().enumerate() {
        for head in 0..heads {
            let of = |side| -> Vec<Vec<f32>> {
                (0..=row.position)
                    .map(|token| stored(case, row.slots, side, head / case.group, token))
                    .collect()
            };
            let at = (r * heads + head) * d;
            let expected = reference::attention(&queries[at..][..d], &of(0), &of(1), f64::from(case.scale));
            let what = format!("row at {} head {head} of {:?}", row.position, case.kernels.spec());
            close(&what, &got[at..][..d], &expected, relative);
        }
    }
}

fn stored(case: &Case, slots: &[Slot], side: usize, kv_head: usize, token: usize) -> Vec<f32> {
    let block = case.shape.block_tokens;
    let slot = slots[token / block].0 as usize;
    let at = reference::cuda_pool_at(&case.shape, [1, slot, side, kv_head, token % block, 0]);
    case.numbers[at..][..case.shape.head_dim].to_vec()
}

/// The last rows of a context that crosses splits: all at once, in two cuts, and one by one.
fn identical(bench: &mut Bench, case: &Case) {
    // The rows lie across a place where the context is cut.
    let count = 9;
    // Where there is time for it, so far behind that a few rows are spread.
    let splits = if case.most > 1300 { 5 } else { 2 + bench.below((case.most - 500) / 256 + 1) };
    let context = 256 * splits + 1 + bench.below(count - 1);
    let slots = slots(bench, case, context);
    let width = case.shape.kv_heads * case.group * case.shape.head_dim;
    let queries = bench.numbers(count * width, 2.0);
    let rows: Vec<BatchRow> = (context - count..context).map(|position| row(position, &slots)).collect();
    let together = run(bench, case, &rows, &queries);
    let cut = 1 + bench.below(count - 1);
    let first = run(bench, case, &rows[..cut], &queries[..cut * width]);
    let second = run(bench, case, &rows[cut..], &queries[cut * width..]);
    assert!([first, second].concat() == together, "a cut after {cut} of {count} rows changes bits");
    let alone: Vec<u8> =
        (0..count).flat_map(|i| run(bench, case, &rows[i..=i], &queries[i * width..][..width])).collect();
    assert!(alone == together, "rows one by one differ from rows together");
}
