//! The runtime's prefill and decode rates beside what the same cores could do: multiply-adds for prefill, reading the
//! weights once a token for decode. `cargo bench -p cairn-bench --bench runtime -- --model PATH` takes a real model;
//! `RAYON_NUM_THREADS=1` measures one thread. `benches/llama_rates.py` gives llama.cpp's rates for the same model.

use cairn_bench::{peak_gflops, read_bandwidth, tiny};
use cairn_gpu::Slot;
use cairn_runtime::*;
use std::time::Instant;

/// Tokens computed in one pass while prefilling.
const CHUNK: usize = 512;

fn main() {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--model").skip(1);
    let path = arguments.next().unwrap_or_else(|| "synthetic:1".into());
    let (prompt, generated, runs) = if tiny() { (32, 2, 1) } else { (1024, 64, 5) };
    let path: ModelPath = path.parse().expect("a path or synthetic:SEED");
    let model = Model::load(&path, WeightType::Bf16).expect("a model");
    let options = EngineOptions { pool_tokens: prompt + generated + 16, ..EngineOptions::default() };
    let shape = pool_shape(&model, &options).expect("a pool");
    let slots: Vec<Slot> = (0..shape.slots as u32).map(Slot).collect();
    let mut words = vec![0u128; shape.pool_bytes().div_ceil(16)];
    let pool = &mut bytemuck::cast_slice_mut(&mut words)[..shape.pool_bytes()];
    let mut scratch = Scratch::default();
    let token = |position: usize| (position * 7919 % model.config.vocabulary.min(40_000)) as u32;
    let mut pass = |first: usize, count: usize| {
        let row = |position| Row { token: token(position), position, slots: &slots };
        let rows: Vec<Row<'_>> = (first..first + count).map(row).collect();
        model.forward(&shape, pool, &rows, &[count - 1], &mut scratch)
    };
    let (mut prefills, mut decodes) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        let start = Instant::now();
        for first in (0..prompt).step_by(CHUNK) {
            pass(first, CHUNK.min(prompt - first));
        }
        prefills.push(prompt as f64 / start.elapsed().as_secs_f64());
        let start = Instant::now();
        for position in prompt..prompt + generated {
            pass(position, 1);
        }
        decodes.push(generated as f64 / start.elapsed().as_secs_f64());
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let (prefill, decode) = (median(&mut prefills), median(&mut decodes));
    let (peak, bandwidth) = (peak_gflops(runs), read_bandwidth(runs));
    let layers = 2 * (model.weights.bytes() - 2 * model.config.vocabulary * model.config.hidden) / 2;
    let gflops = prefill * layers as f64 / 1e9;
    let gbytes = decode * model.weights.bytes() as f64 / 1e9;
    println!("{}, bf16 weights, {} threads, medians of {runs} runs", path, rayon::current_num_threads());
    println!(
        "prefill of {prompt} tokens: {prefill:7.0} tokens/s, {gflops:5.0} GFLOP/s in matrix products ({:.2} of {peak:.0})",
        gflops / peak
    );
    println!(
        "decode at {prompt} tokens:  {decode:7.1} tokens/s, {gbytes:5.1} GB/s of weights ({:.2} of {bandwidth:.1})",
        gbytes / bandwidth
    );
}
