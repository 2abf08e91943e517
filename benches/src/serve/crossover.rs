//! From which prompt length on loading is faster than computing, and whether the worker knows it.

use super::Endpoint;
use super::traffic::words;
use crate::{BenchError, Watch};
use cairn_harness::section::{Cell, Column, Line, Lines, Plot, Role, Section, quantile};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// Loads from which a worker may learn before it is measured.
const LESSONS: usize = 6;

/// A choice counts as right if it costs at most so many times the better one.
const CLOSE: f64 = 1.25;

/// The workers that are measured. None keeps state of its own.
#[derive(Clone, Debug)]
pub struct Workers {
    /// Computes prompts and stores them.
    pub filler: Endpoint,
    /// Always loads what the cache has.
    pub loads: Endpoint,
    /// Chooses.
    pub chooses: Endpoint,
}

/// Lengths and repetitions.
#[derive(Clone, Debug)]
pub struct Options {
    /// Words of a prompt, rising.
    pub words: Vec<usize>,
    /// Different prompts of each length.
    pub repeats: usize,
    /// Which prompts.
    pub seed: u64,
    /// Of a block.
    pub block_tokens: u64,
}

/// What was found on one link.
#[derive(Clone, Debug)]
pub struct Crossover {
    /// The table and its plot.
    pub section: Section,
    /// Tokens from which on loading was faster at every length; `None`: at none.
    pub tokens: Option<u64>,
    /// Choices that were made, and those that cost clearly more than the better one would have.
    pub choices: [usize; 2],
}

#[derive(Default)]
struct Times {
    tokens: u64,
    computed: Vec<f64>,
    loaded: Vec<f64>,
    chosen: Vec<f64>,
    recomputed: usize,
    /// Prompts that did not come from the cache as a whole.
    missing: usize,
    /// Of loading and of computing, as the worker saw them.
    forecasts: [Vec<f64>; 2],
}

/// Measures every length. `stored` waits until what the filler computed is in the cache.
///
/// # Errors
/// When a request fails.
pub async fn run<F: Future<Output = Result<(), BenchError>>>(
    name: &str,
    workers: &Workers,
    options: &Options,
    stored: impl Fn() -> F,
    watch: &dyn Watch,
) -> Result<Crossover, BenchError> {
    let mut random = StdRng::seed_from_u64(options.seed);
    let mut prompt = |count: usize| vec![("user", words(&mut random, count))];
    // Lessons first, long and short ones.
    let lessons: Vec<_> =
        (0..LESSONS).filter_map(|i| Some(prompt(*options.words.iter().rev().cycle().nth(i)?))).collect();
    let measured: Vec<Vec<_>> =
        options.words.iter().map(|count| (0..options.repeats).map(|_| prompt(*count)).collect()).collect();
    for prompt in lessons.iter().chain(measured.iter().flatten()) {
        if watch.stopped() {
            break;
        }
        workers.filler.ask(prompt, 1, true).await?;
        watch.step(&format!("{name}: filling"));
    }
    stored().await?;
    for prompt in &lessons {
        workers.chooses.ask(prompt, 1, true).await?;
    }
    let mut all = Vec::new();
    for prompts in &measured {
        let mut times = Times::default();
        for prompt in prompts {
            if watch.stopped() {
                break;
            }
            let computed = workers.loads.ask(prompt, 1, false).await?;
            let loaded = workers.loads.ask(prompt, 1, true).await?;
            let chosen = workers.chooses.ask(prompt, 1, true).await?;
            watch.step(name);
            times.tokens = computed.prompt_tokens;
            times.computed.push(computed.ttft_ms);
            // Whole blocks but the last token; what was evicted or late was computed, and says nothing.
            let whole = (loaded.prompt_tokens - 1) / options.block_tokens * options.block_tokens;
            match loaded.cached_tokens >= whole {
                true => times.loaded.push(loaded.ttft_ms),
                false => times.missing += 1,
            }
            times.chosen.push(chosen.ttft_ms);
            times.recomputed += usize::from(chosen.recomputed);
            if let Some([load, compute]) = chosen.forecast_ms {
                times.forecasts[0].push(load);
                times.forecasts[1].push(compute);
            }
        }
        if !times.computed.is_empty() {
            all.push(times);
        }
    }
    Ok(found(name, &all))
}

fn found(name: &str, all: &[Times]) -> Crossover {
    let columns = vec![
        Column::key("prompt tokens"),
        Column::new("computed ms", Role::Lower, 1),
        Column::new("loaded ms", Role::Lower, 1),
        Column::new("computed / loaded", Role::Fact, 2),
        Column::new("faster", Role::Fact, 0),
        Column::new("forecast: load ms", Role::Fact, 1),
        Column::new("compute ms", Role::Fact, 1),
        Column::new("chosen: load", Role::Fact, 0),
        Column::new("chosen: compute", Role::Fact, 0),
        Column::new("as chosen ms", Role::Lower, 1),
    ];
    let title = format!("Load or compute: time to the first token, {name}");
    let mut section = Section::new(&format!("crossover-{}", name.replace([' ', '/'], "-")), &title, columns);
    let (mut tokens, mut choices) = (None, [0, 0]);
    let median = |values: &[f64]| quantile(values, 0.5);
    for times in all {
        let (computed, loaded) = (median(&times.computed), median(&times.loaded));
        let loads = times.chosen.len() - times.recomputed;
        // A length at which loading loses is below the crossover, whatever shorter ones did.
        if times.loaded.is_empty() {
            continue;
        }
        tokens = if loaded < computed { tokens.or(Some(times.tokens)) } else { None };
        choices[0] += times.chosen.len();
        choices[1] += if loaded > CLOSE * computed { loads } else { 0 };
        choices[1] += if computed > CLOSE * loaded { times.recomputed } else { 0 };
        section.rows.push(vec![
            Cell::Number(times.tokens as f64),
            Cell::rounds(&times.computed),
            Cell::rounds(&times.loaded),
            Cell::number(computed / loaded),
            Cell::text(if loaded < computed { "load" } else { "compute" }),
            Cell::rounds(&times.forecasts[0]),
            Cell::rounds(&times.forecasts[1]),
            Cell::Number(loads as f64),
            Cell::Number(times.recomputed as f64),
            Cell::rounds(&times.chosen),
        ]);
    }
    section.notes.push(match tokens {
        Some(tokens) => format!("Loading is faster from prompts of {tokens} tokens on."),
        None => "Loading is not faster at the longest prompt: the worker should compute.".into(),
    });
    section.notes.push(format!(
        "Of {} choices, {} cost over {CLOSE} times what the other would have.",
        choices[0], choices[1]
    ));
    section.notes.extend(left_out(all));
    let line = |name: &str, value: fn(&Times) -> &Vec<f64>, strong: bool| Line {
        name: name.into(),
        points: all.iter().map(|times| (times.tokens as f64, median(value(times)))).collect(),
        strong,
        reference: false,
    };
    section.plots.push(Plot::Lines(Lines {
        name: "ttft".into(),
        title,
        x: "prompt tokens (log)".into(),
        y: "ms to the first token".into(),
        lines: vec![
            line("computed", |times| &times.computed, false),
            line("loaded", |times| &times.loaded, false),
            line("as the worker chose", |times| &times.chosen, true),
        ],
        level: None,
    }));
    Crossover { section, tokens, choices }
}

fn left_out(all: &[Times]) -> Option<String> {
    let missing: usize = all.iter().map(|times| times.missing).sum();
    let note = "prompts did not come from the cache as a whole (evicted, or later than the worker waits) and are left out.";
    (missing > 0).then(|| format!("{missing} {note}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crossover_counts_only_if_nothing_longer_loses() {
        let times = |tokens, computed: f64, loaded: f64, recomputed| Times {
            tokens,
            computed: vec![computed; 3],
            loaded: vec![loaded; 3],
            chosen: vec![computed.min(loaded); 3],
            recomputed,
            forecasts: Default::default(),
            missing: 0,
        };
        let found = |all: &[Times]| super::found("here", all);
        let all = [times(16, 1.0, 2.0, 3), times(32, 2.0, 2.1, 0), times(64, 4.0, 2.2, 1)];
        let crossover = found(&all);
        assert_eq!((crossover.tokens, crossover.choices), (Some(64), [9, 1]));
        let all = [times(16, 2.0, 1.0, 0), times(32, 2.0, 3.0, 0)];
        assert_eq!((found(&all).tokens, found(&all).choices), (None, [6, 3]));
    }
}
