//! What happens to a row between matrix products: normalisation, rotary positions, gating, residuals. Each row's sums are
//! taken in one fixed order.

use crate::lanes::{Isa, LANES, Lanes, dispatch, exp, sum_lanes};

/// `out = x / rms(x) × weight`, with `rms(x) = sqrt(mean(x²) + epsilon)`, for each row of `weight.len()` elements.
/// Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
///
/// # Panics
/// When `x` and `out` are not whole rows of equal number.
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let width = weight.len();
    assert!(width > 0 && x.len() == out.len() && x.len().is_multiple_of(width), "x must be whole rows");
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
        let mut sum = 0f32;
        let (from, count) = (x.as_ptr(), x.len());
        let to: *mut f32 = &mut sum;
        // SAFETY: `from` has `count` elements, `to` one; the instruction set was detected.
        unsafe { dispatch!(Isa::detect(), sum_of_squares(from: *const f32, count: usize, to: *mut f32)) };
        let scale = 1.0 / (sum / width as f32 + epsilon).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

/// # Safety
/// `x` must have `count` elements; the machine must have the instructions of `L`.
#[inline(always)]
unsafe fn sum_of_squares<L: Lanes>(x: *const f32, count: usize, out: *mut f32) {
    let whole = count / LANES * LANES;
    // SAFETY: all reads are below `count`.
    unsafe {
        let mut sums = L::splat(0.0);
        for i in (0..whole).step_by(LANES) {
            let value = L::load(x.add(i));
            sums = sums.fma(value, value);
        }
        let mut sum = sum_lanes(sums);
        for i in whole..count {
            sum = (*x.add(i)).mul_add(*x.add(i), sum);
        }
        *out = sum;
    }
}

/// `gate = silu(gate) × up`, element by element, for rows that hold the gates and then the ups. `silu(x) = x / (1 + e^-x)`.
/// Source: Shazeer, GLU Variants Improve Transformer, 2020.
///
/// # Panics
/// When the lengths are not those of the same number of rows.
pub fn swiglu(gate_up: &[f32], width: usize, out: &mut [f32]) {
    assert!(
        gate_up.len() == 2 * out.len() && out.len().is_multiple_of(width),
        "rows of 2 × width and of width"
    );
    for (row, out) in gate_up.chunks_exact(2 * width).zip(out.chunks_exact_mut(width)) {
        let (gate, up) = row.split_at(width);
        // e^-x first, lane by lane; then the divisions, which round alike in any form.
        let (from, to, count) = (gate.as_ptr(), out.as_mut_ptr(), width);
        // SAFETY: both have `count` elements; the instruction set was detected.
        unsafe { dispatch!(Isa::detect(), exp_of_negated(from: *const f32, to: *mut f32, count: usize)) };
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate / (1.0 + *out) * up;
        }
    }
}

/// # Safety
/// `x` and `out` must have `count` elements; the machine must have the instructions of `L`.
#[inline(always)]
unsafe fn exp_of_negated<L: Lanes>(x: *const f32, out: *mut f32, count: usize) {
    let whole = count / LANES * LANES;
    let mut rest = [0f32; LANES];
    // SAFETY: all accesses are below `count`, or in the array of sixteen.
    unsafe {
        let minus = L::splat(-1.0);
        for i in (0..whole).step_by(LANES) {
            exp(clamp(L::load(x.add(i)).mul(minus))).store(out.add(i));
        }
        if whole < count {
            std::ptr::copy_nonoverlapping(x.add(whole), rest.as_mut_ptr(), count - whole);
            exp(clamp(L::load(rest.as_ptr()).mul(minus))).store(rest.as_mut_ptr());
            std::ptr::copy_nonoverlapping(rest.as_ptr(), out.add(whole), count - whole);
        }
    }
}

/// Keeps e^x finite: silu of anything below -87 is 0 in single precision anyway.
///
/// # Safety
/// As [`Lanes`].
#[inline(always)]
unsafe fn clamp<L: Lanes>(x: L) -> L {
    // min(x, 87) by way of max.
    // SAFETY: the caller vouches for the instructions.
    unsafe { x.mul(L::splat(-1.0)).max(L::splat(-87.0)).mul(L::splat(-1.0)) }
}

/// `x += y`, element by element.
pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

/// Cosines and sines of rotary position embedding for every position of a model.
/// Source: Su et al., RoFormer, 2021; the halves are paired `(i, i + d/2)`, as Hugging Face does.
pub struct RopeTable {
    half: usize,
    /// For each position: `half` cosines, then `half` sines.
    table: Vec<f32>,
}

impl RopeTable {
    /// For `positions` positions and these inverse frequencies (half a head each).
    pub fn new(inverse_frequencies: &[f64], positions: usize) -> Self {
        let half = inverse_frequencies.len();
        let mut table = Vec::with_capacity(2 * half * positions);
        for position in 0..positions {
            let angle = |frequency: &f64| position as f64 * frequency;
            table.extend(inverse_frequencies.iter().map(|f| angle(f).cos() as f32));
            table.extend(inverse_frequencies.iter().map(|f| angle(f).sin() as f32));
        }
        Self { half, table }
    }

    /// For each position half a head of cosines, then half a head of sines.
    pub fn numbers(&self) -> &[f32] {
        &self.table
    }

    /// Positions that the table covers.
    pub fn positions(&self) -> usize {
        self.table.len() / (2 * self.half)
    }
}

/// Rotates every head of a row (`n × head_dim` elements) to its position.
///
/// # Panics
/// When the position is outside the table or the row is not whole heads.
pub fn apply_rope(table: &RopeTable, position: usize, row: &mut [f32]) {
    let half = table.half;
    assert!(row.len().is_multiple_of(2 * half), "a row must be whole heads");
    let (cosines, sines) = table.table[2 * half * position..][..2 * half].split_at(half);
    for head in row.chunks_exact_mut(2 * half) {
        let (left, right) = head.split_at_mut(half);
        for i in 0..half {
            let (a, b) = (left[i], right[i]);
            left[i] = a * cosines[i] - b * sines[i];
            right[i] = b * cosines[i] + a * sines[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use proptest::prelude::*;

    fn close(got: &[f32], exact: &[f64], tolerance: f64) -> Result<(), String> {
        for (i, (got, exact)) in got.iter().zip(exact).enumerate() {
            let error = (f64::from(*got) - exact).abs();
            if error > tolerance * (1.0 + exact.abs()) {
                return Err(format!("element {i}: {got} is not {exact}"));
            }
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn norm_gate_and_rope_agree_with_the_reference(
            row in proptest::collection::vec(-90f32..90.0, 2..70), position in 0usize..100,
        ) {
            let weight: Vec<f32> = row.iter().map(|x| x / 50.0 + 1.0).collect();
            let mut out = vec![0.0; row.len()];
            rms_norm(&row, &weight, 1e-5, &mut out);
            close(&out, &reference::rms_norm(&row, &weight, 1e-5), 2e-6).unwrap();

            let width = row.len() / 2;
            let mut out = vec![0.0; width];
            swiglu(&row[..2 * width], width, &mut out);
            close(&out, &reference::swiglu(&row[..2 * width], width), 3e-6).unwrap();

            let frequencies: Vec<f64> = (0..width).map(|i| 1e4f64.powf(-(i as f64) / width as f64)).collect();
            let mut rotated = row[..2 * width].to_vec();
            apply_rope(&RopeTable::new(&frequencies, 100), position, &mut rotated);
            close(&rotated, &reference::rope(&frequencies, position, &row[..2 * width]), 2e-5).unwrap();
        }
    }
}
