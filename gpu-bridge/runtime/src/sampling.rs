//! From logits to a token.

use cairn_kernels::cuda::SampleSetting;
use rand::{Rng, SeedableRng, rngs::StdRng};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; larger values flatten the distribution.
    pub temperature: f32,
    /// Only the most likely tokens that together have this probability are in play.
    pub top_p: f32,
    /// The same seed and logits give the same tokens.
    pub seed: u64,
}

/// The sampler of one sequence.
pub struct Sampler {
    sampling: Sampling,
    rng: StdRng,
}

impl Sampler {
    /// Starts from the seed.
    pub fn new(sampling: Sampling) -> Self {
        Self { sampling, rng: StdRng::seed_from_u64(sampling.seed) }
    }

    /// What decides about the next token beside its logits.
    pub fn draw(&mut self) -> SampleSetting {
        let Sampling { temperature, top_p, .. } = self.sampling;
        let uniform = if temperature > 0.0 { self.rng.random() } else { 0.0 };
        SampleSetting { temperature, top_p, uniform }
    }
}

/// Chooses a token as the CUDA kernel does: the most likely tokens that together have `top_p` are in play (all that are as likely as the least of
/// them, too), and the one is taken at which their weights, summed in the order of ids, pass the drawn share. Ties for the largest go to
/// the lower id.
pub fn choose(logits: &[f32], setting: &SampleSetting) -> u32 {
    if setting.temperature <= 0.0 {
        return argmax(logits);
    }
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> =
        logits.iter().map(|logit| f64::from((logit - max) / setting.temperature).exp()).collect();
    let mut sorted = weights.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let wanted = weights.iter().sum::<f64>() * f64::from(setting.top_p.clamp(0.0, 1.0));
    let mut sum = 0.0;
    let mut least = 0.0;
    for weight in sorted {
        sum += weight;
        least = weight;
        if sum >= wanted {
            break;
        }
    }
    let counts = |weight: &f64| *weight >= least;
    let target = weights.iter().filter(|weight| counts(weight)).sum::<f64>() * f64::from(setting.uniform);
    let mut sum = 0.0;
    let mut last = 0;
    for (id, weight) in weights.iter().enumerate().filter(|(_, weight)| counts(weight)) {
        sum += weight;
        last = id as u32;
        if sum > target {
            break;
        }
    }
    last
}

fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_is_greedy_and_seeds_repeat() {
        let logits = [0.0, 2.0, 1.0, 2.0];
        let sampling = |temperature, top_p, seed| Sampler::new(Sampling { temperature, top_p, seed });
        let next = |sampler: &mut Sampler| choose(&logits, &sampler.draw());
        assert_eq!(next(&mut sampling(0.0, 1.0, 1)), 1);
        let draw = |seed| -> Vec<u32> {
            let mut sampler = sampling(1.0, 1.0, seed);
            (0..50).map(|_| next(&mut sampler)).collect()
        };
        assert_eq!(draw(5), draw(5));
        assert_ne!(draw(5), draw(6));
        assert!(draw(5).contains(&0) && draw(5).contains(&2));
        let mut narrow = sampling(1.0, 0.6, 3);
        assert!((0..50).all(|_| [1, 3].contains(&next(&mut narrow))), "the nucleus holds the two best");
    }
}
