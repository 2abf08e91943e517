//! Causal attention of query rows over the paged pool, with grouped KV heads.
//!
//! A job is one KV head and a few rows of one sequence. Scores of sixteen keys at a time are one chain of fused
//! multiply-adds over the head's elements; the softmax is the exact two-pass one; values are added in token
//! order. None of this depends on which rows share a job, so prefill in any chunking and decode agree bit for bit.

use crate::lanes::{Isa, LANES, Lanes, Output, dispatch, exp, sum_lanes};
use crate::{KvType, PagedShape, Slot};
use half::{bf16, f16};
use rayon::prelude::*;

/// Query rows of one job and KV head: their scores must fit the second-level cache.
const JOB_ROWS: usize = 16;

/// Query heads whose scores are summed together.
const SCORE_ROWS: usize = 12;

/// Query heads whose values are summed together: four vectors each for a head of 64.
const VALUE_ROWS: usize = 4;

/// Vectors of a head's output that are summed at a time.
const VALUE_VECTORS: usize = 4;

/// Below this many multiply-adds one thread is faster than waking others.
const PARALLEL_MACS: usize = 1 << 21;

/// Heads of a model.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Query heads; a multiple of the KV heads.
    pub heads: usize,
    /// Factor on scores, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
}

/// The pool, as one layer reads it.
#[derive(Clone, Copy)]
pub struct KvView<'a> {
    /// Shape of the pool. `block_tokens` and `head_dim` are multiples of 16.
    pub shape: &'a PagedShape,
    /// The whole pool.
    pub pool: &'a [u8],
    /// Which layer.
    pub layer: usize,
}

/// One row of queries.
#[derive(Clone, Copy)]
pub struct QueryRow<'a> {
    /// Slots of the row's sequence, from its first block on.
    pub slots: &'a [Slot],
    /// Tokens that the row sees, itself included: its keys and values are in the pool already.
    pub context: usize,
}

/// For each row: `out = softmax(scale × q · K) · V` over its context, head by head. `queries` and `out` have
/// `heads × head_dim` elements a row.
///
/// # Panics
/// When lengths do not fit, or a head or block is not a multiple of 16.
pub fn paged_attention(
    shape: AttentionShape,
    kv: KvView<'_>,
    rows: &[QueryRow<'_>],
    queries: &[f32],
    out: &mut [f32],
) {
    attention_on(Isa::detect(), shape, kv, rows, queries, out);
}

fn attention_on(
    isa: Isa,
    shape: AttentionShape,
    kv: KvView<'_>,
    rows: &[QueryRow<'_>],
    queries: &[f32],
    out: &mut [f32],
) {
    let PagedShape { kv_heads, head_dim, block_tokens, slots, .. } = *kv.shape;
    let width = shape.heads * head_dim;
    assert!(head_dim.is_multiple_of(LANES) && block_tokens.is_multiple_of(LANES), "multiples of 16 only");
    assert!(shape.heads.is_multiple_of(kv_heads), "query heads must be a multiple of KV heads");
    assert_eq!(Some(kv.pool.len()), kv.shape.checked_pool_bytes(), "the pool has another size");
    assert!(kv.pool.as_ptr().cast::<f32>().is_aligned(), "the pool must be aligned to its elements");
    assert!(kv.layer < kv.shape.layers, "no such layer");
    assert!(queries.len() == rows.len() * width && out.len() == queries.len(), "whole rows");
    for row in rows {
        assert!(
            row.context > 0 && row.context <= row.slots.len() * block_tokens,
            "context outside its blocks"
        );
        assert!(row.slots.iter().all(|slot| (slot.0 as usize) < slots), "slot outside the pool");
    }
    let groups = row_groups(rows);
    let out = Output(out.as_mut_ptr());
    let job = |task: usize| {
        let (first, last) = groups[task / kv_heads];
        Job { isa, shape, kv, rows, queries, out, first, last, kv_head: task % kv_heads }.run();
    };
    let macs: usize = rows.iter().map(|row| 2 * row.context * width).sum();
    if macs < PARALLEL_MACS || rayon::current_num_threads() == 1 {
        (0..groups.len() * kv_heads).for_each(job);
    } else {
        (0..groups.len() * kv_heads).into_par_iter().for_each(job);
    }
}

/// Runs of at most [`JOB_ROWS`] rows of the same sequence.
fn row_groups(rows: &[QueryRow<'_>]) -> Vec<(usize, usize)> {
    let mut groups = Vec::new();
    let mut first = 0;
    for row in 1..=rows.len() {
        let ends = row == rows.len()
            || row - first == JOB_ROWS
            || !std::ptr::eq(rows[row].slots.as_ptr(), rows[first].slots.as_ptr());
        if ends {
            groups.push((first, row));
            first = row;
        }
    }
    groups
}

struct Job<'a> {
    isa: Isa,
    shape: AttentionShape,
    kv: KvView<'a>,
    rows: &'a [QueryRow<'a>],
    queries: &'a [f32],
    out: Output,
    first: usize,
    last: usize,
    kv_head: usize,
}

/// One query head of one row.
#[derive(Clone, Copy)]
struct Query {
    /// Its first element in `queries` and in the output.
    at: usize,
    context: usize,
}

impl Job<'_> {
    fn run(&self) {
        let job = self;
        // SAFETY: the instruction set was detected (tests pass only detected ones) and `attention_on` checked every
        // length, slot and context that the kernels rely on.
        unsafe {
            match self.kv.shape.kv_type {
                KvType::F32 => dispatch!(self.isa, run_f32(job: &Job<'_>)),
                KvType::F16 => dispatch!(self.isa, run_f16(job: &Job<'_>)),
                KvType::Bf16 => dispatch!(self.isa, run_bf16(job: &Job<'_>)),
            }
        }
    }

    /// All query heads of the job that read its KV head.
    fn query_heads(&self) -> Vec<Query> {
        let head_dim = self.kv.shape.head_dim;
        let group = self.shape.heads / self.kv.shape.kv_heads;
        let of_row = |row: usize| {
            (0..group).map(move |g| Query {
                at: (row * self.shape.heads + self.kv_head * group + g) * head_dim,
                context: self.rows[row].context,
            })
        };
        (self.first..self.last).flat_map(of_row).collect()
    }
}

#[inline(always)]
unsafe fn run_f32<L: Lanes>(job: &Job<'_>) {
    // SAFETY: passed on.
    unsafe { run::<L, f32>(job, |from| L::load(from)) }
}

#[inline(always)]
unsafe fn run_f16<L: Lanes>(job: &Job<'_>) {
    // SAFETY: passed on.
    unsafe { run::<L, f16>(job, |from| L::load_f16(from)) }
}

#[inline(always)]
unsafe fn run_bf16<L: Lanes>(job: &Job<'_>) {
    // SAFETY: passed on.
    unsafe { run::<L, bf16>(job, |from| L::load_bf16(from)) }
}

/// # Safety
/// The machine must have the instructions of `L`; the job must have passed the checks of `attention_on`.
#[inline(always)]
unsafe fn run<L: Lanes, T>(job: &Job<'_>, load: impl Fn(*const T) -> L + Copy) {
    let queries = job.query_heads();
    let longest = job.rows[job.first..job.last].iter().map(|row| row.context).max().unwrap_or(0);
    let stride = longest.next_multiple_of(LANES);
    let mut scores = vec![0f32; stride * queries.len()];
    let planes = Planes::<T>::new(job);
    // SAFETY: passed on; `scores` has `stride` elements for each query.
    unsafe {
        let mut q = 0;
        while q < queries.len() {
            let count = (queries.len() - q).min(SCORE_ROWS);
            let (part, out) = (&queries[q..q + count], &mut scores[q * stride..(q + count) * stride]);
            match count {
                1 => score::<L, T, 1>(job, &planes, part, out, stride, load),
                2 => score::<L, T, 2>(job, &planes, part, out, stride, load),
                3 => score::<L, T, 3>(job, &planes, part, out, stride, load),
                4..6 => score_each::<L, T, 4>(job, &planes, part, out, stride, load),
                6..12 => score_each::<L, T, 6>(job, &planes, part, out, stride, load),
                _ => score::<L, T, 12>(job, &planes, part, out, stride, load),
            }
            q += count;
        }
        for (query, scores) in queries.iter().zip(scores.chunks_exact_mut(stride)) {
            softmax::<L>(&mut scores[..query.context.next_multiple_of(LANES)], query.context);
        }
        weigh_all::<L, T>(job, &planes, &queries, &scores, stride, load);
    }
}

/// Where the keys and values of the job's KV head are.
struct Planes<T> {
    pool: *const T,
    block_tokens: usize,
    head_dim: usize,
    /// First element of the head's keys in the slot of each block of the sequence.
    keys: Vec<usize>,
    /// From a head's keys to its values in the same slot.
    to_values: usize,
}

impl<T> Planes<T> {
    fn new(job: &Job<'_>) -> Self {
        let shape = job.kv.shape;
        let head = job.kv_head * shape.head_dim * shape.block_tokens;
        let slots = job.rows[job.first].slots;
        Self {
            pool: job.kv.pool.as_ptr().cast(),
            block_tokens: shape.block_tokens,
            head_dim: shape.head_dim,
            keys: slots.iter().map(|slot| shape.keys_at(job.kv.layer, slot.0 as usize) + head).collect(),
            to_values: shape.plane(),
        }
    }

    /// The keys of sixteen tokens from `token` on, first element; the next element is `block_tokens` further.
    ///
    /// # Safety
    /// `token` must be a multiple of 16 inside the sequence's blocks.
    #[inline(always)]
    unsafe fn keys(&self, token: usize) -> *const T {
        let block = self.keys[token / self.block_tokens];
        // SAFETY: inside the slot's key plane.
        unsafe { self.pool.add(block + token % self.block_tokens) }
    }

    /// The value of one token, first element.
    ///
    /// # Safety
    /// `token` must be inside the sequence's blocks.
    #[inline(always)]
    unsafe fn value(&self, token: usize) -> *const T {
        let block = self.keys[token / self.block_tokens] + self.to_values;
        // SAFETY: inside the slot's value plane.
        unsafe { self.pool.add(block + token % self.block_tokens * self.head_dim) }
    }
}

/// [`score`] in groups of `R`, then one by one.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn score_each<L: Lanes, T, const R: usize>(
    job: &Job<'_>,
    planes: &Planes<T>,
    queries: &[Query],
    scores: &mut [f32],
    stride: usize,
    load: impl Fn(*const T) -> L + Copy,
) {
    let whole = queries.len() / R * R;
    // SAFETY: passed on.
    unsafe {
        score::<L, T, R>(job, planes, &queries[..whole], &mut scores[..whole * stride], stride, load);
        for i in whole..queries.len() {
            score::<L, T, 1>(job, planes, &queries[i..=i], &mut scores[i * stride..][..stride], stride, load);
        }
    }
}

/// Scores of `R` queries against all keys up to the longest context among them. Keys past a query's own context give
/// numbers that nobody reads.
///
/// # Safety
/// As [`run`]; there must be `R` queries and `R × stride` scores.
#[inline(always)]
unsafe fn score<L: Lanes, T, const R: usize>(
    job: &Job<'_>,
    planes: &Planes<T>,
    queries: &[Query],
    scores: &mut [f32],
    stride: usize,
    load: impl Fn(*const T) -> L,
) {
    assert!(queries.len() == R && scores.len() == R * stride);
    let longest = queries.iter().map(|query| query.context).max().unwrap_or(0);
    let input = job.queries.as_ptr();
    let out = scores.as_mut_ptr();
    // SAFETY: tokens stay below `longest` rounded up to 16, which is inside the blocks; scores below `stride`.
    unsafe {
        let scale = L::splat(job.shape.scale);
        for token in (0..longest).step_by(LANES) {
            let keys = planes.keys(token);
            let mut sums = [L::splat(0.0); R];
            for element in 0..planes.head_dim {
                let key = load(keys.add(element * planes.block_tokens));
                for (sum, query) in sums.iter_mut().zip(queries) {
                    *sum = sum.fma(L::splat(*input.add(query.at + element)), key);
                }
            }
            for (r, sum) in sums.into_iter().enumerate() {
                sum.mul(scale).store(out.add(r * stride + token));
            }
        }
    }
}

/// Exact softmax of the first `context` scores; the rest, up to a whole vector, becomes 0.
///
/// # Safety
/// The machine must have the instructions of `L`.
#[inline(always)]
unsafe fn softmax<L: Lanes>(scores: &mut [f32], context: usize) {
    for score in &mut scores[context..] {
        *score = f32::NEG_INFINITY;
    }
    let mut max = f32::NEG_INFINITY;
    for score in &scores[..context] {
        max = max.max(*score);
    }
    let (at, len) = (scores.as_mut_ptr(), scores.len());
    // SAFETY: `len` is a multiple of 16.
    unsafe {
        let shift = L::splat(-max);
        let mut sums = L::splat(0.0);
        for i in (0..len).step_by(LANES) {
            let weight = exp(L::load(at.add(i)).add(shift));
            weight.store(at.add(i));
            if i + LANES <= context {
                sums = sums.add(weight);
            }
        }
        let whole = context / LANES * LANES;
        let mut sum = sum_lanes(sums);
        for i in whole..context {
            sum += *at.add(i);
        }
        let factor = L::splat(1.0 / sum);
        for i in (0..len).step_by(LANES) {
            L::load(at.add(i)).mul(factor).store(at.add(i));
        }
    }
    for score in &mut scores[context..] {
        *score = 0.0;
    }
}

/// Weighted sums of values for all queries.
///
/// # Safety
/// As [`run`].
#[inline(always)]
unsafe fn weigh_all<L: Lanes, T>(
    job: &Job<'_>,
    planes: &Planes<T>,
    queries: &[Query],
    weights: &[f32],
    stride: usize,
    load: impl Fn(*const T) -> L + Copy,
) {
    let width = VALUE_VECTORS * LANES;
    for element in (0..planes.head_dim).step_by(width) {
        let vectors = ((planes.head_dim - element) / LANES).min(VALUE_VECTORS);
        let mut q = 0;
        while q < queries.len() {
            let count = if queries.len() - q >= VALUE_ROWS { VALUE_ROWS } else { 1 };
            let (part, w) = (&queries[q..q + count], &weights[q * stride..]);
            // SAFETY: passed on; `element + vectors × 16` is inside the head.
            unsafe {
                match (vectors, count) {
                    (4, VALUE_ROWS) => {
                        weigh::<L, T, VALUE_ROWS, 4>(job, planes, part, w, stride, element, load)
                    }
                    (4, _) => weigh::<L, T, 1, 4>(job, planes, part, w, stride, element, load),
                    (_, VALUE_ROWS) => {
                        for vector in 0..vectors {
                            let at = element + vector * LANES;
                            weigh::<L, T, VALUE_ROWS, 1>(job, planes, part, w, stride, at, load);
                        }
                    }
                    _ => {
                        for vector in 0..vectors {
                            weigh::<L, T, 1, 1>(job, planes, part, w, stride, element + vector * LANES, load);
                        }
                    }
                }
            }
            q += count;
        }
    }
}

/// `R` queries, `V` vectors of their output from `element` on: values in token order.
///
/// # Safety
/// As [`run`]; there must be `R` queries, and `element + 16 V` must be inside the head.
#[inline(always)]
unsafe fn weigh<L: Lanes, T, const R: usize, const V: usize>(
    job: &Job<'_>,
    planes: &Planes<T>,
    queries: &[Query],
    weights: &[f32],
    stride: usize,
    element: usize,
    load: impl Fn(*const T) -> L + Copy,
) {
    assert!(queries.len() == R && weights.len() >= R * stride);
    let common = queries.iter().map(|query| query.context).min().unwrap_or(0);
    let weights = weights.as_ptr();
    // SAFETY: tokens stay inside each query's context; the output is this job's (see `Output`).
    unsafe {
        let mut sums = [[L::splat(0.0); V]; R];
        for token in 0..common {
            let value = planes.value(token).add(element);
            let value: [L; V] = std::array::from_fn(|v| load(value.add(v * LANES)));
            for (r, sums) in sums.iter_mut().enumerate() {
                let weight = L::splat(*weights.add(r * stride + token));
                for (sum, value) in sums.iter_mut().zip(value) {
                    *sum = sum.fma(weight, value);
                }
            }
        }
        for (r, (query, sums)) in queries.iter().zip(&mut sums).enumerate() {
            // Values past the shared context may be anything, NaN included, so they are not added with weight 0.
            for token in common..query.context {
                let value = planes.value(token).add(element);
                let weight = L::splat(*weights.add(r * stride + token));
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = sum.fma(weight, load(value.add(v * LANES)));
                }
            }
            for (v, sum) in sums.iter().enumerate() {
                sum.store(job.out.0.add(query.at + element + v * LANES));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{reference, write_rows};
    use proptest::prelude::*;

    struct Case {
        shape: PagedShape,
        storage: Vec<u64>,
        slots: Vec<Slot>,
        keys: Vec<Vec<f32>>,
        values: Vec<Vec<f32>>,
    }

    /// A sequence of `tokens` in shuffled slots; what it does not write is NaN.
    fn case(kv_type: KvType, kv_heads: usize, head_dim: usize, tokens: usize, seed: u32) -> Case {
        let (block_tokens, layers) = (16, 2);
        let blocks = tokens.div_ceil(block_tokens);
        let shape = PagedShape { layers, kv_heads, head_dim, block_tokens, slots: blocks + 3, kv_type };
        let mut storage = vec![u64::MAX; shape.pool_bytes().div_ceil(8)];
        let slots: Vec<Slot> = (0..blocks as u32).rev().map(|slot| Slot(slot + 2)).collect();
        let next = |i: usize, salt: u32| {
            let hash = (i as u32 ^ seed ^ salt).wrapping_mul(0x9e37_79b9);
            let value = (hash ^ (hash >> 13)).wrapping_mul(0x85eb_ca6b) as f32 / u32::MAX as f32;
            bf16::from_f32(4.0 * value - 2.0).to_f32()
        };
        let width = kv_heads * head_dim;
        let keys: Vec<f32> = (0..tokens * width).map(|i| f16::from_f32(next(i, 1)).to_f32()).collect();
        let values: Vec<f32> = (0..tokens * width).map(|i| f16::from_f32(next(i, 2)).to_f32()).collect();
        let places: Vec<(Slot, usize)> = (0..tokens).map(|t| (slots[t / 16], t % 16)).collect();
        let pool = &mut bytemuck::cast_slice_mut(&mut storage)[..shape.pool_bytes()];
        write_rows(&shape, pool, 1, &places, &keys, &values);
        let rows = |all: &[f32]| all.chunks_exact(width).map(<[f32]>::to_vec).collect();
        Case { keys: rows(&keys), values: rows(&values), shape, storage, slots }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn agrees_with_the_reference_and_is_invariant(
            kv_heads in 1usize..3, group in 1usize..4, vectors in 1usize..6,
            tokens in 1usize..90, queries in 1usize..40, seed: u32,
            kv_type in prop_oneof![Just(KvType::F32), Just(KvType::F16), Just(KvType::Bf16)],
        ) {
            let head_dim = 16 * vectors;
            let case = case(kv_type, kv_heads, head_dim, tokens, seed);
            let heads = kv_heads * group;
            let pool = &bytemuck::cast_slice(&case.storage)[..case.shape.pool_bytes()];
            let kv = KvView { shape: &case.shape, pool, layer: 1 };
            let shape = AttentionShape { heads, scale: 1.0 / (head_dim as f32).sqrt() };
            let queries = queries.min(tokens);
            let row = |r: usize| QueryRow { slots: &case.slots, context: tokens - queries + r + 1 };
            let rows: Vec<QueryRow<'_>> = (0..queries).map(row).collect();
            let width = heads * head_dim;
            let q: Vec<f32> = (0..queries * width).map(|i| ((i * 7919 + seed as usize % 97) % 31) as f32 / 16.0 - 1.0).collect();
            let mut out = vec![f32::NAN; q.len()];
            paged_attention(shape, kv, &rows, &q, &mut out);
            for (r, row) in rows.iter().enumerate() {
                for head in 0..heads {
                    let part = |all: &[Vec<f32>]| -> Vec<Vec<f32>> {
                        let at = head / group * head_dim;
                        all[..row.context].iter().map(|row| row[at..at + head_dim].to_vec()).collect()
                    };
                    let at = r * width + head * head_dim;
                    let exact = reference::attention(
                        &q[at..at + head_dim], &part(&case.keys), &part(&case.values), f64::from(shape.scale));
                    for (got, exact) in out[at..at + head_dim].iter().zip(exact) {
                        prop_assert!((f64::from(*got) - exact).abs() < 2e-5, "{got} is not {exact}");
                    }
                }
                let mut alone = vec![f32::NAN; width];
                paged_attention(shape, kv, &rows[r..=r], &q[r * width..][..width], &mut alone);
                prop_assert_eq!(&alone, &out[r * width..][..width], "row {} depends on its batch", r);
            }
            let mut plain = vec![f32::NAN; q.len()];
            attention_on(Isa::Portable, shape, kv, &rows, &q, &mut plain);
            prop_assert_eq!(&plain, &out, "instruction sets differ");
        }
    }
}
