//! Matrix products: close to exact, and each row the same bits whatever is computed with it.

use super::{Bench, Format, close};
use cairn_gpu::backend::cuda::Gemm;
use cairn_kernels::cuda::ActType;
use cairn_kernels::reference;

/// Numbers of rows that are compared with all rows at once: on both sides of what algorithms are chosen by.
const CUTS: [usize; 11] = [1, 2, 7, 63, 64, 65, 255, 256, 300, 512, 2048];

/// As many of them as the emulator has the time for.
const FEW_CUTS: usize = 9;

/// `(outputs, inputs)` of real models, where libraries are tempted to split sums; on the emulator, which is not, small ones.
const LARGE: [(usize, usize); 4] = [(4096, 4096), (1024, 14_336), (28_672, 2048), (2048, 8192)];
const SMALL: [(usize, usize); 2] = [(48, 200), (96, 64)];

/// Products that tensor cores add at a time.
const STEP: usize = 16;

/// Tensor cores truncate their sum in single precision after every step, always toward zero: the errors add up in one direction.
fn close_sum(got: f32, x: &[f32], w: &[f32]) {
    let (mut sum, mut largest) = (0f64, 0f64);
    for (x, w) in x.iter().zip(w) {
        sum += f64::from(*x) * f64::from(*w);
        largest = largest.max(sum.abs());
    }
    let steps = (x.len() / STEP + 4) as f64;
    let allowed = steps * f64::from(f32::EPSILON) * largest;
    assert!(
        (f64::from(got) - sum).abs() <= allowed,
        "a product of {} is {got}, not {sum} within {allowed}",
        x.len()
    );
}

pub(super) fn check(bench: &mut Bench, case: usize) {
    let (act, format) =
        [(ActType::Bf16, Format::Bf16), (ActType::F32, Format::F32), (ActType::F16, Format::F16)][case % 3];
    let emulated = bench.is_emulated();
    let (outputs, inputs) = if emulated { SMALL[case % SMALL.len()] } else { LARGE[case % LARGE.len()] };
    let cuts = if emulated { &CUTS[..FEW_CUTS] } else { &CUTS[..] };
    let rows = cuts[cuts.len() - 1];
    let gemm = Gemm::new(bench.stream.clone(), act).expect("cuBLASLt");
    let x = format.round(&bench.numbers(rows * inputs, 1.0));
    let w = format.round(&bench.numbers(outputs * inputs, 1.0));
    let weight = gemm.weight(bench.put(&format.encode(&w)), outputs, inputs).expect("an algorithm");
    let width = format.encode(&[0.0]).len();
    let multiply = |first: usize, count: usize| {
        let from = bench.put(&format.encode(&x[first * inputs..(first + count) * inputs]));
        let to = bench.poisoned(count * outputs * 4);
        assert_eq!(from.len(), count * inputs * width);
        gemm.multiply(&weight, &from.all(), count, &to.all()).expect("issued");
        bench.get_f32(&to)
    };
    let all = multiply(0, rows);
    for count in cuts.iter().copied() {
        let first = rows - count;
        let some = multiply(first, count);
        assert!(
            some == all[first * outputs..],
            "{act:?} {outputs} x {inputs}: {count} rows alone differ from {rows} together"
        );
    }
    // All outputs of two rows against the exact sums.
    for row in [0, rows - 1] {
        let (x, got) = (&x[row * inputs..][..inputs], &all[row * outputs..][..outputs]);
        match act {
            ActType::F32 => {
                let exact = reference::matmul(x, &w, inputs);
                close("a product", got, &exact, 2e-6 * (inputs as f64).sqrt());
            }
            _ => got.iter().zip(w.chunks_exact(inputs)).for_each(|(got, w)| close_sum(*got, x, w)),
        }
    }
    // The emulator has an algorithm for many rows that adds in the order of that for few, and one that does not.
    assert!(!emulated || weight.has_two(), "no second algorithm for many rows");
    let second = if weight.has_two() { ", with a second algorithm" } else { "" };
    println!(
        "products: {act:?}, {outputs} x {inputs}: exact to rounding, and each row the same in {cuts:?}{second}"
    );
}
