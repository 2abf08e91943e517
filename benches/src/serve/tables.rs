//! What passes over the same traffic measured, side by side.

use super::{Answer, Pass};
use cairn_harness::section::{Bar, Bars, Cell, Column, Lines, Plot, Role, Section, distribution, quantile};

/// What counts as served well enough.
#[derive(Clone, Copy, Debug)]
pub struct Slo {
    /// First token within.
    pub ttft_ms: f64,
    /// And each further one, on average, within.
    pub gap_ms: f64,
}

impl Slo {
    fn met(&self, answer: &Answer) -> bool {
        answer.ttft_ms <= self.ttft_ms && mean(&answer.gaps_ms) <= self.gap_ms
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn share(part: u64, whole: u64) -> f64 {
    100.0 * part as f64 / whole.max(1) as f64
}

/// Totals, by turn, and by tier. `kind` names the traffic.
pub fn tables(kind: &str, passes: &[Pass], slo: Slo) -> Vec<Section> {
    let mut sections = vec![totals(kind, passes, slo), by_turn(kind, passes)];
    if passes.iter().any(|pass| !pass.tiers.is_empty()) {
        sections.push(by_tier(kind, passes));
    }
    sections
}

fn totals(kind: &str, passes: &[Pass], slo: Slo) -> Section {
    let columns = vec![
        Column::key("cache"),
        Column::new("requests", Role::Fact, 0),
        Column::new("prompt tokens", Role::Fact, 0),
        Column::new("cached %", Role::Higher, 1),
        Column::new("TTFT p50 ms", Role::Lower, 0),
        Column::new("p95", Role::Lower, 0),
        Column::new("p99", Role::Lower, 0),
        Column::new("off / this", Role::Higher, 2),
        Column::new("ITL p50 ms", Role::Lower, 1),
        Column::new("ITL p95", Role::Lower, 1),
        Column::new("answer tokens/s", Role::Higher, 1),
        Column::new("within SLO %", Role::Higher, 1),
        Column::new("goodput req/s", Role::Higher, 2),
    ];
    let mut section = Section::new(kind, &format!("{kind}: time to the first token and after"), columns);
    let times = |pass: &Pass| pass.turns.iter().map(|turn| turn.answer.ttft_ms).collect::<Vec<_>>();
    let off = passes.iter().find(|pass| pass.name == "off").map(|pass| quantile(&times(pass), 0.5));
    for pass in passes.iter().filter(|pass| !pass.turns.is_empty()) {
        let answers = || pass.turns.iter().map(|turn| &turn.answer);
        let sum = |value: fn(&Answer) -> u64| answers().map(value).sum::<u64>();
        let gaps: Vec<f64> = answers().flat_map(|answer| answer.gaps_ms.iter().copied()).collect();
        let ttft = times(pass);
        let met = answers().filter(|answer| slo.met(answer)).count();
        // An event may carry several tokens; the endpoint's own count is better, where there is one.
        let tokens: f64 = answers()
            .map(|answer| (answer.answer_tokens as f64).max(1.0 + answer.gaps_ms.len() as f64))
            .sum();
        let count = pass.turns.len() as f64;
        section.rows.push(vec![
            Cell::text(&pass.name),
            Cell::Number(count),
            Cell::number(sum(|answer| answer.prompt_tokens) as f64),
            Cell::number(share(sum(|answer| answer.cached_tokens), sum(|answer| answer.prompt_tokens))),
            Cell::number(quantile(&ttft, 0.5)),
            Cell::number(quantile(&ttft, 0.95)),
            Cell::number(quantile(&ttft, 0.99)),
            off.map_or(Cell::Nothing, |off| Cell::number(off / quantile(&ttft, 0.5))),
            Cell::number(quantile(&gaps, 0.5)),
            Cell::number(quantile(&gaps, 0.95)),
            Cell::number(tokens / pass.wall_s),
            Cell::number(100.0 * met as f64 / count),
            Cell::number(met as f64 / pass.wall_s),
        ]);
    }
    section.notes.push(format!(
        "SLO: first token within {} ms, each further one within {} ms on average. ITL: time between tokens.",
        slo.ttft_ms, slo.gap_ms
    ));
    section.plots.push(Plot::Lines(Lines {
        name: "ttft".into(),
        title: format!("{kind}: time to the first token"),
        x: "ms (log)".into(),
        y: "requests that took no longer, %".into(),
        lines: passes.iter().map(|pass| distribution(&pass.name, &times(pass))).collect(),
        level: None,
    }));
    section
}

fn by_turn(kind: &str, passes: &[Pass]) -> Section {
    let mut columns = vec![Column::key("turn"), Column::new("prompt tokens", Role::Fact, 0)];
    for pass in passes {
        columns.push(Column::new(&format!("{} TTFT p50 ms", pass.name), Role::Lower, 0));
        columns.push(Column::new(&format!("{} cached %", pass.name), Role::Higher, 1));
    }
    let name = format!("{kind}-turns");
    let mut section = Section::new(&name, &format!("{kind}: by turn"), columns);
    let turns = passes.iter().flat_map(|pass| &pass.turns).map(|turn| turn.turn + 1).max().unwrap_or(0);
    for turn in 0..turns {
        let of = |pass: &Pass| -> Vec<Answer> {
            let those = pass.turns.iter().filter(|that| that.turn == turn);
            those.map(|that| that.answer.clone()).collect()
        };
        let prompts: Vec<f64> = passes
            .first()
            .map_or(Vec::new(), |pass| of(pass).iter().map(|answer| answer.prompt_tokens as f64).collect());
        let mut row = vec![Cell::Number(turn as f64 + 1.0), Cell::number(quantile(&prompts, 0.5))];
        for pass in passes {
            let answers = of(pass);
            let ttft: Vec<f64> = answers.iter().map(|answer| answer.ttft_ms).collect();
            let sum = |value: fn(&Answer) -> u64| answers.iter().map(value).sum::<u64>();
            row.push(if ttft.is_empty() { Cell::Nothing } else { Cell::number(quantile(&ttft, 0.5)) });
            row.push(Cell::number(share(sum(|one| one.cached_tokens), sum(|one| one.prompt_tokens))));
        }
        section.rows.push(row);
    }
    section
}

fn by_tier(kind: &str, passes: &[Pass]) -> Section {
    let columns = vec![
        Column::key("cache"),
        Column::key("where cached tokens were"),
        Column::new("%", Role::Fact, 1),
        Column::new("blocks", Role::Fact, 0),
    ];
    let name = format!("{kind}-tiers");
    let mut section = Section::new(&name, &format!("{kind}: where cached tokens were"), columns);
    let mut bars = Vec::new();
    let mut names: Vec<String> = vec!["worker's own pool".into()];
    for pass in passes {
        let sum = |value: fn(&Answer) -> u64| pass.turns.iter().map(|turn| value(&turn.answer)).sum::<u64>();
        let prompt = sum(|answer| answer.prompt_tokens);
        let local = sum(|answer| answer.local_tokens);
        let loaded = sum(|answer| answer.cached_tokens) - local;
        let blocks: u64 = pass.tiers.iter().map(|(_, blocks)| blocks).sum();
        section.rows.push(vec![
            Cell::text(&pass.name),
            Cell::text("worker's own pool"),
            Cell::number(share(local, prompt)),
            Cell::Nothing,
        ]);
        let mut parts = vec![share(local, prompt)];
        for (tier, found) in &pass.tiers {
            // Of what was loaded, as the server's tiers had it.
            let percent = share(loaded, prompt) * *found as f64 / blocks.max(1) as f64;
            section.rows.push(vec![
                Cell::text(&pass.name),
                Cell::text(tier),
                Cell::number(percent),
                Cell::Number(*found as f64),
            ]);
            let at = names.iter().position(|name| name == tier).unwrap_or_else(|| {
                names.push(tier.clone());
                names.len() - 1
            });
            parts.resize(parts.len().max(at + 1), 0.0);
            parts[at] += percent;
        }
        bars.push(Bar { name: pass.name.clone(), parts, limit: None });
    }
    section
        .notes
        .push("In percent of all prompt tokens. Blocks are those that the cache server found.".into());
    section.plots.push(Plot::Bars(Bars {
        name: "tiers".into(),
        title: format!("{kind}: where cached tokens were"),
        x: "% of prompt tokens".into(),
        parts: names,
        bars,
    }));
    section
}
