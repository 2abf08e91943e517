//! The benches behind `cairn bench` that measure: each beside the physical limit, in the same rounds. And what the micro benches share.

pub mod disk;
mod error;
mod limits;
pub mod peers;
pub mod ratios;
mod raw_disk;
pub mod replay;
pub mod serve;
pub mod transfer;
mod watch;
mod wire;

pub use error::{BenchError, OrFail};
pub use watch::{Unwatched, Watch};

use rayon::prelude::*;
use std::hint::black_box;
use std::time::Instant;

/// Keeps a value from being optimised away.
pub struct Sample(pub f32);

/// Whether this is a test run, which only shows that the bench works: `cargo bench` says so in the arguments.
pub fn tiny() -> bool {
    !std::env::args().any(|argument| argument == "--bench")
}

/// The median time of `runs` calls, after one that is not counted.
pub fn median_seconds(runs: usize, mut work: impl FnMut()) -> f64 {
    work();
    let mut times: Vec<f64> = (0..runs)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Single-precision rate of independent multiply-adds in registers, on all threads of the pool: a matrix product
/// of a cache-resident 12 × 256 × 32 tile, which is as close to that as the kernels' own code generation gets.
pub fn peak_gflops(runs: usize) -> f64 {
    let weights = vec![0.5; 32 * 256];
    let packed = cairn_kernels::PackedMatrix::pack(&weights, 256, cairn_kernels::WeightType::F32);
    let threads = rayon::current_num_threads();
    let repeats = if tiny() { 20 } else { 20_000 };
    let seconds = median_seconds(runs, || {
        (0..threads).into_par_iter().with_max_len(1).for_each(|_| {
            let x = vec![0.25f32; 12 * 256];
            let mut y = vec![0f32; 12 * 32];
            for _ in 0..repeats {
                cairn_kernels::matmul(black_box(&x), &packed, black_box(&mut y));
            }
        });
    });
    (threads * repeats * 2 * 12 * 256 * 32) as f64 / seconds / 1e9
}

/// CPU time of this process so far, in seconds.
pub(crate) fn cpu_seconds() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Bytes a second that all threads of the pool read from memory together.
pub fn read_bandwidth(runs: usize) -> f64 {
    let words = vec![1u64; if tiny() { 1 << 20 } else { 32 << 20 }];
    let seconds = median_seconds(runs, || {
        let sum: u64 =
            words.par_chunks(1 << 18).map(|part| part.iter().fold(0u64, |a, b| a.wrapping_add(*b))).sum();
        black_box(sum);
    });
    (words.len() * 8) as f64 / seconds / 1e9
}
