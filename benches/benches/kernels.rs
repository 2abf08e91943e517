//! Kernels of the bundled runtime beside their limits: matrix products against a loop of nothing but multiply-adds on
//! the same cores, one-row products against the memory bandwidth of a plain read. Medians of interleaved runs.

use cairn_bench::{Sample, median_seconds, peak_gflops, read_bandwidth};
use cairn_kernels::{PackedMatrix, WeightType, matmul};

fn main() {
    let tiny = cairn_bench::tiny();
    let runs = if tiny { 1 } else { 15 };
    println!("threads: {}", rayon::current_num_threads());
    let peak = peak_gflops(runs);
    let bandwidth = read_bandwidth(runs);
    println!("limit: {peak:.0} GFLOP/s (multiply-adds only), {bandwidth:.1} GB/s (reading memory)");
    for (rows, inputs, outputs) in [
        (1, 576, 1536),
        (1, 1536, 576),
        (1, 576, 49152),
        (4, 576, 3072),
        (64, 576, 3072),
        (512, 576, 960),
        (512, 576, 3072),
        (512, 1536, 576),
    ] {
        let weights = vec![0.01; inputs * outputs];
        let packed = PackedMatrix::pack(&weights, inputs, WeightType::Bf16);
        let x = vec![0.5f32; rows * inputs];
        let mut y = vec![0f32; rows * outputs];
        let repeats = if tiny { 1 } else { (200_000_000 / (rows * inputs * outputs)).max(1) };
        let seconds = median_seconds(runs, || {
            for _ in 0..repeats {
                matmul(&x, &packed, &mut y);
            }
        }) / repeats as f64;
        let gflops = 2.0 * (rows * inputs * outputs) as f64 / seconds / 1e9;
        let gbytes = packed.bytes() as f64 / seconds / 1e9;
        println!(
            "matmul {rows:4} × {inputs:5} × {outputs:5}: {:9.1} µs  {gflops:7.1} GFLOP/s ({:.2} of limit)  weights {gbytes:5.1} GB/s ({:.2} of limit)",
            seconds * 1e6,
            gflops / peak,
            gbytes / bandwidth
        );
        std::hint::black_box(Sample(y[0]));
    }
}
