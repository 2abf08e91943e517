//! Greedy and nucleus sampling against their references.

use super::Bench;
use cairn_gpu::KvType;
use cairn_gpu::backend::cuda::{KernelSpec, ModelKernels};
use cairn_kernels::cuda::{ActType, HeadShape, SampleSetting};
use cairn_kernels::reference;

/// Single precision sums of so many weights are this wrong at most.
const SLACK: f64 = 2e-5;

pub(super) fn check(bench: &mut Bench) {
    let shape = HeadShape { kv_heads: 1, group: 1, head_dim: 64, block_tokens: 16 };
    let spec = KernelSpec { act: ActType::F32, kv_type: KvType::F32, shape, plain: true };
    let kernels = ModelKernels::load(&bench.device, spec).expect("kernels");
    let (rows, width) = (6, 1 + bench.below(5000));
    let mut logits = bench.numbers(rows * width, 6.0);
    // A tie for the largest, to go to the lower id.
    let (low, high) = (bench.below(width), width - 1);
    for id in [low, high] {
        logits[id] = 7.0;
    }
    let settings: Vec<SampleSetting> = (0..rows)
        .map(|row| SampleSetting {
            temperature: if row % 3 == 0 { 0.0 } else { [0.3, 1.0, 2.0][bench.below(3)] },
            top_p: [0.1, 0.5, 0.9, 1.0][bench.below(4)],
            uniform: bench.below(1 << 20) as f32 / (1 << 20) as f32,
        })
        .collect();
    let (on_device, out) = (bench.put_f32(&logits), bench.poisoned(rows * 4));
    let on_device_settings = bench.put(bytemuck::cast_slice(&settings));
    kernels
        .sample(&bench.stream, &on_device.all(), (rows, width), &on_device_settings.all(), &out.all())
        .expect("issued");
    let chosen: Vec<u32> = bytemuck::pod_collect_to_vec(&bench.get(&out));
    for (row, (setting, chosen)) in settings.iter().zip(&chosen).enumerate() {
        let logits = &logits[row * width..][..width];
        let SampleSetting { temperature, top_p, uniform } = *setting;
        let allowed = if temperature == 0.0 {
            let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            vec![logits.iter().position(|logit| *logit == best).expect("a largest")]
        } else {
            reference::nucleus(logits, temperature, f64::from(top_p), f64::from(uniform), SLACK)
        };
        assert!(
            allowed.contains(&(*chosen as usize)),
            "row {row}: {chosen} is not of {allowed:?} for {setting:?}"
        );
    }
    println!("sample: {rows} rows of {width}: as the reference");
}
