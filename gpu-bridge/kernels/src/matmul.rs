//! `y = x · Wᵀ` for weight matrices packed once at load. Every element of `y` is one chain of fused multiply-adds over the
//! columns in order, whatever the number of rows: that is what makes it batch-invariant.
//!
//! Weights are packed in panels of 32 outputs, column by column, so that a tile streams them in order. Converting bf16 on
//! the way costs two instructions a vector and halves the memory traffic that bounds decoding.

use crate::lanes::{Isa, LANES, Lanes, Output, dispatch};
use half::bf16;
use rayon::prelude::*;

/// Outputs of one panel: two vectors.
const PANEL: usize = 2 * LANES;

/// Rows whose inputs stay in the second-level cache while panels stream by.
const ROW_BLOCK: usize = 96;

/// Below this many multiply-adds one thread is faster than waking others.
const PARALLEL_MACS: usize = 1 << 22;

/// Number format of packed weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightType {
    /// As computed with: exact.
    F32,
    /// Half the memory; products and sums are still in single precision.
    Bf16,
}

enum Panels {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// A weight matrix of `outputs × inputs`, packed.
pub struct PackedMatrix {
    outputs: usize,
    inputs: usize,
    panels: Panels,
}

impl PackedMatrix {
    /// Packs rows of `inputs` weights each, in row-major order.
    ///
    /// # Panics
    /// When `weights` is not a whole number of rows.
    pub fn pack(weights: &[f32], inputs: usize, format: WeightType) -> Self {
        assert!(inputs > 0 && weights.len().is_multiple_of(inputs), "weights must be whole rows");
        let outputs = weights.len() / inputs;
        let padded = outputs.next_multiple_of(PANEL) * inputs;
        let at = |i: usize| {
            let (panel, rest) = (i / (PANEL * inputs), i % (PANEL * inputs));
            let (column, row) = (rest / PANEL, panel * PANEL + rest % PANEL);
            if row < outputs { weights[row * inputs + column] } else { 0.0 }
        };
        let panels = match format {
            WeightType::F32 => Panels::F32((0..padded).into_par_iter().map(at).collect()),
            WeightType::Bf16 => {
                Panels::Bf16((0..padded).into_par_iter().map(|i| bf16::from_f32(at(i))).collect())
            }
        };
        Self { outputs, inputs, panels }
    }

    /// Rows of the matrix: elements of a result row.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of the matrix: elements of an input row.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Number format of the weights.
    pub fn format(&self) -> WeightType {
        match &self.panels {
            Panels::F32(_) => WeightType::F32,
            Panels::Bf16(_) => WeightType::Bf16,
        }
    }

    /// One row, as it is computed with.
    pub fn row(&self, row: usize, out: &mut [f32]) {
        let start = row / PANEL * PANEL * self.inputs + row % PANEL;
        for (column, value) in out[..self.inputs].iter_mut().enumerate() {
            *value = match &self.panels {
                Panels::F32(panels) => panels[start + column * PANEL],
                Panels::Bf16(panels) => panels[start + column * PANEL].to_f32(),
            };
        }
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        match &self.panels {
            Panels::F32(panels) => size_of_val(panels.as_slice()),
            Panels::Bf16(panels) => size_of_val(panels.as_slice()),
        }
    }
}

/// `y[r] = W · x[r]` for every row of `x`.
///
/// # Panics
/// When the lengths of `x` and `y` are not those of the same number of rows.
pub fn matmul(x: &[f32], weights: &PackedMatrix, y: &mut [f32]) {
    matmul_on(Isa::detect(), x, weights, y);
}

fn matmul_on(isa: Isa, x: &[f32], weights: &PackedMatrix, y: &mut [f32]) {
    let rows = x.len() / weights.inputs;
    assert_eq!(x.len(), rows * weights.inputs, "x must be whole rows");
    assert_eq!(y.len(), rows * weights.outputs, "y must have as many rows as x");
    let panels = weights.outputs.div_ceil(PANEL);
    let blocks = rows.div_ceil(ROW_BLOCK);
    let out = Output(y.as_mut_ptr());
    let job = |task: usize| Job {
        isa,
        x,
        weights,
        y: out,
        first: task / panels * ROW_BLOCK,
        last: rows.min((task / panels + 1) * ROW_BLOCK),
        panel: task % panels,
    };
    let macs = rows * weights.inputs * weights.outputs;
    if macs < PARALLEL_MACS || rayon::current_num_threads() == 1 {
        (0..blocks * panels).for_each(|task| job(task).run());
    } else {
        // A few tasks for each thread: enough to even out, few enough not to pay for the handing out.
        let grain = (blocks * panels / (4 * rayon::current_num_threads())).max(1);
        (0..blocks * panels).into_par_iter().with_min_len(grain).for_each(|task| job(task).run());
    }
}

/// One panel for a block of rows.
struct Job<'a> {
    isa: Isa,
    x: &'a [f32],
    weights: &'a PackedMatrix,
    y: Output,
    first: usize,
    last: usize,
    panel: usize,
}

impl Job<'_> {
    fn run(&self) {
        let job = self;
        // SAFETY: `isa` was detected (tests pass only detected ones), and `panel_rows` stays inside the slices whose
        // lengths `matmul_on` checked.
        unsafe {
            match &self.weights.panels {
                Panels::F32(panels) => dispatch!(self.isa, panel_rows_f32(job: &Job<'_>, panels: &[f32])),
                Panels::Bf16(panels) => dispatch!(self.isa, panel_rows_bf16(job: &Job<'_>, panels: &[bf16])),
            }
        }
    }
}

#[inline(always)]
unsafe fn panel_rows_f32<L: Lanes>(job: &Job<'_>, panels: &[f32]) {
    // SAFETY: passed on.
    unsafe { panel_rows::<L, f32>(job, panels, |from| L::load(from)) }
}

#[inline(always)]
unsafe fn panel_rows_bf16<L: Lanes>(job: &Job<'_>, panels: &[bf16]) {
    // SAFETY: passed on.
    unsafe { panel_rows::<L, bf16>(job, panels, |from| L::load_bf16(from)) }
}

/// # Safety
/// The machine must have the instructions of `L`; the job must lie inside its slices.
#[inline(always)]
unsafe fn panel_rows<L: Lanes, W>(job: &Job<'_>, panels: &[W], load: impl Fn(*const W) -> L + Copy) {
    let inputs = job.weights.inputs;
    let panel = &panels[job.panel * PANEL * inputs..][..PANEL * inputs];
    let mut row = job.first;
    while row < job.last {
        let rows = (job.last - row).min(L::TILE_ROWS);
        let x = &job.x[row * inputs..][..rows * inputs];
        // SAFETY: `x` has `rows` rows and `panel` has all its columns; the caller vouches for the instructions.
        unsafe {
            match rows {
                1 => tile::<L, W, 1>(job, row, x, panel, load),
                2 => tile::<L, W, 2>(job, row, x, panel, load),
                3 => tile::<L, W, 3>(job, row, x, panel, load),
                4 => tile::<L, W, 4>(job, row, x, panel, load),
                5 => tile::<L, W, 5>(job, row, x, panel, load),
                6 => tile::<L, W, 6>(job, row, x, panel, load),
                7 => tile::<L, W, 7>(job, row, x, panel, load),
                8 => tile::<L, W, 8>(job, row, x, panel, load),
                9 => tile::<L, W, 9>(job, row, x, panel, load),
                10 => tile::<L, W, 10>(job, row, x, panel, load),
                11 => tile::<L, W, 11>(job, row, x, panel, load),
                _ => tile::<L, W, 12>(job, row, x, panel, load),
            }
        }
        row += rows;
    }
}

/// `R` rows times one panel.
///
/// # Safety
/// `x` must have `R` rows, `panel` all columns; the machine must have the instructions of `L`.
#[inline(always)]
unsafe fn tile<L: Lanes, W, const R: usize>(
    job: &Job<'_>,
    row: usize,
    x: &[f32],
    panel: &[W],
    load: impl Fn(*const W) -> L,
) {
    let inputs = job.weights.inputs;
    assert!(x.len() >= R * inputs && panel.len() >= PANEL * inputs);
    let (x, panel) = (x.as_ptr(), panel.as_ptr());
    // SAFETY: all offsets are below the lengths asserted above.
    unsafe {
        let mut sums = [[L::splat(0.0); 2]; R];
        for column in 0..inputs {
            let at = panel.add(column * PANEL);
            let (left, right) = (load(at), load(at.add(LANES)));
            for (r, sum) in sums.iter_mut().enumerate() {
                let value = L::splat(*x.add(r * inputs + column));
                sum[0] = sum[0].fma(value, left);
                sum[1] = sum[1].fma(value, right);
            }
        }
        for (r, sum) in sums.into_iter().enumerate() {
            store(job, row + r, sum);
        }
    }
}

/// Writes one row's part of a panel; the last panel may be narrower than its padding.
///
/// # Safety
/// The row must be one of the job's; the machine must have the instructions of `L`.
#[inline(always)]
unsafe fn store<L: Lanes>(job: &Job<'_>, row: usize, sum: [L; 2]) {
    let outputs = job.weights.outputs;
    let (start, width) = (job.panel * PANEL, (outputs - job.panel * PANEL).min(PANEL));
    let mut values = [0f32; PANEL];
    // SAFETY: `values` has two vectors; the target is row `row`, outputs `start..start + width`, which only this job
    // writes (see `Output`).
    unsafe {
        sum[0].store(values.as_mut_ptr());
        sum[1].store(values.as_mut_ptr().add(LANES));
        std::ptr::copy_nonoverlapping(values.as_ptr(), job.y.0.add(row * outputs + start), width);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use proptest::prelude::*;

    fn values(n: usize, seed: u32) -> Vec<f32> {
        let next = |i: usize| {
            let hash = (i as u32 ^ seed).wrapping_mul(0x9e37_79b9);
            (hash ^ (hash >> 15)).wrapping_mul(0x85eb_ca6b) as f32 / u32::MAX as f32 - 0.5
        };
        (0..n).map(next).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn agrees_with_the_reference_and_is_invariant(
            rows in 1usize..130, inputs in 1usize..80, outputs in 1usize..120, seed: u32,
        ) {
            let (x, w) = (values(rows * inputs, seed), values(outputs * inputs, !seed));
            for format in [WeightType::F32, WeightType::Bf16] {
                let packed = PackedMatrix::pack(&w, inputs, format);
                let mut y = vec![f32::NAN; rows * outputs];
                matmul(&x, &packed, &mut y);
                let mut row = vec![0.0; inputs];
                let unpacked: Vec<f32> = (0..outputs)
                    .flat_map(|r| { packed.row(r, &mut row); row.clone() })
                    .collect();
                if format == WeightType::F32 { prop_assert_eq!(&unpacked, &w); }
                let exact = reference::matmul(&x, &unpacked, inputs);
                for (got, exact) in y.iter().zip(&exact) {
                    prop_assert!((f64::from(*got) - exact).abs() < 1e-5 * (1.0 + exact.abs()), "{got} {exact}");
                }
                for r in 0..rows {
                    let mut alone = vec![f32::NAN; outputs];
                    matmul(&x[r * inputs..][..inputs], &packed, &mut alone);
                    prop_assert_eq!(&alone, &y[r * outputs..][..outputs], "row {} depends on its batch", r);
                }
                let mut plain = vec![f32::NAN; rows * outputs];
                matmul_on(Isa::Portable, &x, &packed, &mut plain);
                prop_assert_eq!(&plain, &y, "instruction sets differ");
            }
        }
    }
}
