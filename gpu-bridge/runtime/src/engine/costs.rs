//! Whether loading cached blocks is faster than computing them, learnt from what both took lately.
//!
//! Loading is taken to cost a fixed time and a time for each byte: a straight line through past loads, fitted by least squares whose weights
//! fall by a constant factor with each further load (recursive least squares with forgetting, as in any textbook on adaptive filters).
//! Computing is taken to cost a time for each token: an exponential mean over passes. Neither knows of what else will go on meanwhile, so only a
//! clear difference counts, and now and then a load is made although it seems slow, to notice when it no longer is.

use std::time::Duration;

/// Weight of all that was known before, when one more load is known.
const FORGETTING: f64 = 0.9;

/// Loads that must be known before any is left out.
const ENOUGH_LOADS: u32 = 4;

/// Weight of one more pass in the mean.
const NEW_PASS: f64 = 0.2;

/// Passes with fewer new tokens say little about the cost of each: they take as long as reading the weights does.
const LEAST_TOKENS: usize = 64;

/// Loading is left out when it seems to take longer than this many times computing.
const CLEAR: f64 = 1.1;

/// Of the loads that seem too slow, each so many-th is made anyway.
const RETRY: u32 = 16;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Costs {
    loads: u32,
    /// Weighted sums over loads: of 1, bytes, bytes squared, seconds, and bytes times seconds.
    sums: [f64; 5],
    /// Of computing one token; none before the first pass.
    token_s: Option<f64>,
    left_out: u32,
}

/// What loading and computing would take, as far as can be told.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Forecast {
    /// Of loading, seconds.
    pub(super) load_s: f64,
    /// Of computing, seconds.
    pub(super) compute_s: f64,
    /// It is worth while to load, or to try.
    pub(super) load: bool,
}

impl Costs {
    /// A load brought so many bytes.
    pub(super) fn loaded(&mut self, bytes: u64, took: Duration) {
        let (bytes, seconds) = (bytes as f64, took.as_secs_f64());
        let more = [1.0, bytes, bytes * bytes, seconds, bytes * seconds];
        for (sum, more) in self.sums.iter_mut().zip(more) {
            *sum = FORGETTING * *sum + more;
        }
        self.loads += 1;
    }

    /// A pass computed so many new tokens of prompts.
    pub(super) fn computed(&mut self, tokens: usize, took: Duration) {
        if tokens < LEAST_TOKENS {
            return;
        }
        let token_s = took.as_secs_f64() / tokens as f64;
        self.token_s = Some(self.token_s.map_or(token_s, |mean| mean + NEW_PASS * (token_s - mean)));
    }

    /// What is to be expected of so many tokens and the bytes of their state; `None` as long as too little is known.
    pub(super) fn forecast(&mut self, tokens: usize, bytes: u64) -> Option<Forecast> {
        let token_s = self.token_s.filter(|_| self.loads >= ENOUGH_LOADS)?;
        let (load_s, compute_s) = (self.load_s(bytes as f64), token_s * tokens as f64);
        let mut load = load_s <= CLEAR * compute_s;
        if !load {
            self.left_out += 1;
            load = self.left_out.is_multiple_of(RETRY);
        }
        Some(Forecast { load_s, compute_s, load })
    }

    fn load_s(&self, bytes: f64) -> f64 {
        let [n, x, xx, y, xy] = self.sums;
        let spread = n * xx - x * x;
        // Loads of one size say nothing about a fixed part: all of it is for the bytes then. Neither part is below nothing.
        let slope = if spread > 1e-9 * n * xx { (n * xy - x * y) / spread } else { y / x.max(1.0) };
        let (slope, fixed) = match slope {
            slope if slope <= 0.0 => (0.0, y / n),
            slope if y < slope * x => (y / x.max(1.0), 0.0),
            slope => (slope, (y - slope * x) / n),
        };
        fixed + slope * bytes
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const MB: u64 = 1_000_000;

    fn known(fixed_ms: f64, mb_per_s: f64, token_ms: f64) -> Costs {
        let mut costs = Costs::default();
        for i in 0..20u64 {
            let bytes = (1 + i % 5) * MB;
            let seconds = fixed_ms / 1e3 + bytes as f64 / mb_per_s / 1e6;
            costs.loaded(bytes, Duration::from_secs_f64(seconds));
            costs.computed(100, Duration::from_secs_f64(0.1 * token_ms));
        }
        costs
    }

    #[test]
    fn a_straight_line_is_found() {
        let forecast = known(20.0, 100.0, 1.0).forecast(1000, 30 * MB).unwrap();
        assert!((forecast.load_s - 0.32).abs() < 0.001 && (forecast.compute_s - 1.0).abs() < 0.001);
        assert!(forecast.load);
    }

    #[test]
    fn short_prompts_are_computed_where_loading_has_a_fixed_cost() {
        let mut costs = known(20.0, 100.0, 1.0);
        assert!(!costs.forecast(16, MB / 2).unwrap().load);
        assert!(costs.forecast(64, 2 * MB).unwrap().load);
    }

    #[test]
    fn what_seemed_slow_is_tried_again_and_believed() {
        let mut costs = known(0.0, 10.0, 1.0);
        let tries =
            |costs: &mut Costs| (0..RETRY).filter(|_| costs.forecast(1000, 22 * MB).unwrap().load).count();
        assert_eq!(tries(&mut costs), 1, "22 MB at 10 MB/s against one second");
        for _ in 0..30 {
            costs.loaded(22 * MB, Duration::from_millis(50));
        }
        assert_eq!(tries(&mut costs), RETRY as usize);
    }

    #[test]
    fn nothing_is_left_out_before_enough_is_known() {
        let mut costs = Costs::default();
        costs.computed(100, Duration::from_millis(1));
        costs.computed(2, Duration::from_secs(9));
        for _ in 0..ENOUGH_LOADS - 1 {
            costs.loaded(MB, Duration::from_secs(9));
        }
        assert_eq!(costs.forecast(100, MB), None);
        costs.loaded(MB, Duration::from_secs(9));
        assert!(!costs.forecast(100, MB).unwrap().load);
    }
}
