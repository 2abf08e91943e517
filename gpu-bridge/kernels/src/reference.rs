//! The oracle: every kernel again, in the plainest form and in double precision.

use crate::{KvType, PagedShape};
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

/// Where an element is in the pool of a CUDA device, in elements: `[layer][slot][key, value][kv head][token][element]`, unlike the
/// pool of a CPU, whose keys are transposed.
pub fn cuda_pool_at(shape: &PagedShape, [layer, slot, side, head, token, element]: [usize; 6]) -> usize {
    let plane = ((layer * shape.slots + slot) * 2 + side) * shape.kv_heads + head;
    (plane * shape.block_tokens + token) * shape.head_dim + element
}

/// The number that eight bits mean: sign, four bits of exponent with bias 7, three of mantissa; all ones is not a number and
/// there is no infinity ("OCP 8-bit Floating Point Specification", E4M3).
pub fn e4m3_decode(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => mantissa / 8.0 * 2f64.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    };
    (if code & 128 == 0 { magnitude } else { -magnitude }) as f32
}

/// The nearest of those numbers, ties to the even code; 448 for all that is larger.
pub fn e4m3_encode(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 128 } else { 0 };
    if x.is_nan() {
        return sign | 127;
    }
    let magnitude = f64::from(x.abs().min(448.0));
    let distance = |code: u8| (f64::from(e4m3_decode(code)) - magnitude).abs();
    let nearest = (0..127u8).min_by(|a, b| distance(*a).total_cmp(&distance(*b)).then((a % 2).cmp(&(b % 2))));
    sign | nearest.unwrap_or(0)
}

/// Ids that nucleus sampling may choose at `uniform`, given how wrong its sums may be: the most likely tokens that together have `top_p`, and among
/// them, in the order of ids, those at which the running sum passes `uniform` of their total.
pub fn nucleus(logits: &[f32], temperature: f32, top_p: f64, uniform: f64, slack: f64) -> Vec<usize> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> =
        logits.iter().map(|logit| (f64::from(logit - max) / f64::from(temperature)).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut sorted = weights.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    // The least weight that counts, a little above and a little below what is exact.
    let least = |wanted: f64| {
        let mut sum = 0.0;
        sorted.iter().copied().find(|weight| {
            sum += weight;
            sum >= wanted
        })
    };
    let [high, low] = [top_p - slack, top_p + slack].map(|share| least(total * share).unwrap_or(0.0));
    let mut found = Vec::new();
    for least in [high, low] {
        let kept: f64 = weights.iter().filter(|weight| **weight >= least).sum();
        let mut sum = 0.0;
        for (id, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight >= least) {
            let before = sum / kept;
            sum += weight;
            if before <= uniform + slack && sum / kept >= uniform - slack {
                found.push(id);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn eight_bit_numbers_are_those_of_the_specification() {
        let largest = e4m3_decode(0x7e);
        assert_eq!((largest, e4m3_decode(0x08), e4m3_decode(0x01)), (448.0, 0.015625, 0.001953125));
        assert!(e4m3_decode(0x7f).is_nan() && e4m3_decode(0xff).is_nan());
        for code in (0..=255u8).filter(|code| code & 127 != 127) {
            assert_eq!(e4m3_encode(e4m3_decode(code)), code, "code {code}");
        }
        assert_eq!([500.0, f32::INFINITY, -1e9].map(e4m3_encode), [0x7e, 0x7e, 0xfe]);
        // Halfway between 1 and 1.125, and between 1.125 and 1.25: to the even mantissa.
        assert_eq!([1.0625, 1.1875].map(e4m3_encode), [0x38, 0x3a]);
    }

    proptest! {
        #[test]
        fn the_nearest_is_no_farther_than_half_a_step(x in -448f32..448.0) {
            let back = e4m3_decode(e4m3_encode(x));
            prop_assert!((back - x).abs() <= (x.abs() / 16.0).max(0.001));
        }

        #[test]
        fn a_nucleus_holds_the_likeliest_and_follows_the_draw(
            logits in proptest::collection::vec(-5f32..5.0, 1..50), top_p in 0.05f64..1.0, uniform in 0f64..1.0,
        ) {
            let found = nucleus(&logits, 1.0, top_p, uniform, 1e-9);
            prop_assert!(!found.is_empty());
            let all = nucleus(&logits, 1.0, 1.0, uniform, 1e-9);
            prop_assert!(all.len() <= 4, "one draw, one token, but for ties at the edges");
            let best = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let greedy = nucleus(&logits, 1.0, 1e-6, uniform, 0.0);
            prop_assert!(greedy.iter().all(|id| logits[*id] == best));
        }
    }
}
