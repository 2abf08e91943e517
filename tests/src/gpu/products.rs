//! Matrix products: close to exact, and each row the same bits whatever is computed with it.

use super::{Bench, Format, close};
use cairn_gpu::backend::cuda::Gemm;
use cairn_kernels::cuda::ActType;
use cairn_kernels::reference;

/// Numbers of rows that are compared with all rows at once: on both sides of what algorithms are chosen by.
const CUTS: [usize; 7] = [1, 2, 7, 63, 64, 65, 200];

/// `(outputs, inputs)` of real models, where libraries are tempted to split sums; on the emulator, which is not, small ones.
const LARGE: [(usize, usize); 4] = [(4096, 4096), (1024, 14_336), (28_672, 2048), (2048, 8192)];
const SMALL: [(usize, usize); 2] = [(48, 200), (96, 64)];

pub(super) fn check(bench: &mut Bench, case: usize) {
    let (act, format) =
        [(ActType::Bf16, Format::Bf16), (ActType::F32, Format::F32), (ActType::F16, Format::F16)][case % 3];
    let emulated = bench.is_emulated();
    let (outputs, inputs) = if emulated { SMALL[case % SMALL.len()] } else { LARGE[case % LARGE.len()] };
    let rows = CUTS[CUTS.len() - 1];
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
    for count in CUTS {
        let first = rows - count;
        let some = multiply(first, count);
        assert!(
            some == all[first * outputs..],
            "{act:?} {outputs} x {inputs}: {count} rows alone differ from {rows} together"
        );
    }
    // All outputs of two rows against the exact sums.
    for row in [0, rows - 1] {
        let exact = reference::matmul(&x[row * inputs..][..inputs], &w, inputs);
        close("a product", &all[row * outputs..][..outputs], &exact, 2e-6 * (inputs as f64).sqrt());
    }
    println!("products: {act:?}, {outputs} x {inputs}: exact to rounding, and each row the same in {CUTS:?}");
}
