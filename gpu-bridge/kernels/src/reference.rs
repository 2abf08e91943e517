//! The oracle: every kernel again, in the plainest form and in double precision.

use crate::KvType;
use half::{bf16, f16};

/// `x · wᵀ` for rows of `inputs` elements.
pub fn matmul(x: &[f32], w: &[f32], inputs: usize) -> Vec<f64> {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
    x.chunks_exact(inputs).flat_map(|x| w.chunks_exact(inputs).map(move |w| dot(x, w))).collect()
}

/// One row of root-mean-square normalisation.
pub fn rms_norm(x: &[f32], weight: &[f32], epsilon: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / x.len() as f64;
    let rms = (mean + epsilon).sqrt();
    x.iter().zip(weight).map(|(x, w)| f64::from(*x) / rms * f64::from(*w)).collect()
}

/// One row of gated units.
pub fn swiglu(gate_up: &[f32], width: usize) -> Vec<f64> {
    let unit = |i: usize| {
        let (gate, up) = (f64::from(gate_up[i]), f64::from(gate_up[width + i]));
        gate / (1.0 + (-gate).exp()) * up
    };
    (0..width).map(unit).collect()
}

/// One head rotated to its position.
pub fn rope(inverse_frequencies: &[f64], position: usize, head: &[f32]) -> Vec<f64> {
    let half = head.len() / 2;
    let rotate = |i: usize| {
        let (a, b) = (f64::from(head[i % half]), f64::from(head[i % half + half]));
        let angle = position as f64 * inverse_frequencies[i % half];
        if i < half { a * angle.cos() - b * angle.sin() } else { b * angle.cos() + a * angle.sin() }
    };
    (0..head.len()).map(rotate).collect()
}

/// One query head over keys and values of `head.len()` elements each.
pub fn attention(head: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>], scale: f64) -> Vec<f64> {
    let score = |key: &Vec<f32>| {
        scale * head.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>()
    };
    let scores: Vec<f64> = keys.iter().map(score).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    let element =
        |i: usize| weights.iter().zip(values).map(|(w, value)| w * f64::from(value[i])).sum::<f64>() / total;
    (0..head.len()).map(element).collect()
}

/// The numbers of a canonical block.
pub fn decode(kv_type: KvType, bytes: &[u8]) -> Vec<f32> {
    match kv_type {
        KvType::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        KvType::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        KvType::Bf16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
    }
}
