//! From logits to a token.

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

    /// Chooses a token. Ties go to the lower id.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        if self.sampling.temperature <= 0.0 {
            return argmax(logits);
        }
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: &f32| f64::from((logit - max) / self.sampling.temperature).exp();
        let mut candidates: Vec<(u32, f64)> =
            logits.iter().enumerate().map(|(id, logit)| (id as u32, weight(logit))).collect();
        candidates.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut kept = 0.0;
        let nucleus = total * f64::from(self.sampling.top_p.clamp(0.0, 1.0));
        let mut count = 0;
        for (_, weight) in &candidates {
            kept += weight;
            count += 1;
            if kept >= nucleus {
                break;
            }
        }
        let mut point = self.rng.random::<f64>() * kept;
        for (id, weight) in &candidates[..count] {
            point -= weight;
            if point <= 0.0 {
                return *id;
            }
        }
        candidates[count - 1].0
    }
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
        assert_eq!(sampling(0.0, 1.0, 1).choose(&logits), 1);
        let draw = |seed| -> Vec<u32> {
            let mut sampler = sampling(1.0, 1.0, seed);
            (0..50).map(|_| sampler.choose(&logits)).collect()
        };
        assert_eq!(draw(5), draw(5));
        assert_ne!(draw(5), draw(6));
        assert!(draw(5).contains(&0) && draw(5).contains(&2));
        let mut narrow = sampling(1.0, 0.6, 3);
        assert!((0..50).all(|_| [1, 3].contains(&narrow.choose(&logits))), "the nucleus holds the two best");
    }
}
