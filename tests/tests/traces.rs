//! Every policy on real traces, against reference counts that must be met to the token. Needs `CAIRN_TRACES`.

#![allow(clippy::unwrap_used)]

use cairn_core::PolicyKind;
use cairn_core::replay::{Replay, SecondTier, TwoTiers};
use cairn_tests::traces::{self, Request};
use std::collections::BTreeSet;
use std::path::Path;

struct Row {
    policy: String,
    capacity: usize,
    hit_tokens: u64,
}

/// The single-tier rows of a reference table.
fn rows(path: &Path) -> Vec<Row> {
    let text = std::fs::read_to_string(path).unwrap();
    let rows = text.lines().filter(|line| !line.starts_with(['#', 'p'])).map(|line| {
        let fields: Vec<&str> = line.split(',').collect();
        (fields[0] != "tier").then(|| Row {
            policy: fields[0].to_owned(),
            capacity: fields[2].parse().unwrap(),
            hit_tokens: fields[6].parse().unwrap(),
        })
    });
    rows.flatten().collect()
}

fn hit_tokens(trace: &[Request], block_tokens: u64, kind: PolicyKind, capacity: usize) -> u64 {
    let mut cache = Replay::new(kind, capacity);
    let mut evicted = Vec::new();
    let hits = |request: &Request| {
        evicted.clear();
        let hits = cache.request(&request.chain, &mut evicted) as u64;
        (hits * block_tokens).min(request.input_tokens)
    };
    trace.iter().map(hits).sum()
}

fn check(name: &str, block_tokens: u64) {
    let Some(folder) = traces::folder() else {
        eprintln!("SKIPPED: CAIRN_TRACES is not set, so {name} cannot be replayed");
        return;
    };
    let trace = traces::read(&folder.join(format!("{name}.jsonl.gz")));
    let mut wrong = Vec::new();
    let mut compared = 0;
    for row in rows(&folder.join(format!("expected/{name}.csv"))) {
        let Ok(kind) = row.policy.parse::<PolicyKind>() else {
            assert_eq!(row.policy, "opt", "a policy that this project does not have");
            continue;
        };
        let hits = hit_tokens(&trace, block_tokens, kind, row.capacity);
        compared += 1;
        if hits != row.hit_tokens {
            let Row { policy, capacity, hit_tokens } = row;
            wrong.push(format!("{policy} at {capacity}: {hits}, not {hit_tokens}"));
        }
    }
    assert!(compared > 30, "only {compared} rows in the reference table");
    assert!(wrong.is_empty(), "{name}:\n{}", wrong.join("\n"));
}

/// Goals of the default policy: nowhere below the best of all others, and so much of the optimum at the named capacities.
fn goals(name: &str, block_tokens: u64, shares_of_optimum: &[(usize, f64)]) {
    let Some(folder) = traces::folder() else {
        eprintln!("SKIPPED: CAIRN_TRACES is not set, so {name} cannot be replayed");
        return;
    };
    let trace = traces::read(&folder.join(format!("{name}.jsonl.gz")));
    let rows = rows(&folder.join(format!("expected/{name}.csv")));
    let capacities: BTreeSet<usize> = rows.iter().map(|row| row.capacity).collect();
    let mut missed = Vec::new();
    for capacity in capacities {
        let here = || rows.iter().filter(|row| row.capacity == capacity);
        let best = here().filter(|row| row.policy != "opt").max_by_key(|row| row.hit_tokens).unwrap();
        let optimum = here().find(|row| row.policy == "opt").unwrap().hit_tokens as f64;
        let hits = hit_tokens(&trace, block_tokens, PolicyKind::Cairn, capacity);
        let share = hits as f64 / optimum;
        println!(
            "{name} {capacity}: {hits} = {:.2} % of the optimum; {} {:.2} %",
            100.0 * share,
            best.policy,
            100.0 * best.hit_tokens as f64 / optimum
        );
        let goal = shares_of_optimum.iter().find(|(at, _)| *at == capacity).map_or(0.0, |(_, goal)| *goal);
        if hits < best.hit_tokens || share < goal {
            missed.push(format!(
                "{capacity}: {hits}, {share:.4} of the optimum; {} {}",
                best.policy, best.hit_tokens
            ));
        }
    }
    assert!(missed.is_empty(), "{name}:\n{}", missed.join("\n"));
}

#[test]
fn cairn_on_conversations() {
    goals("mooncake_conversation", 512, &[(1827, 0.45), (9139, 0.62)]);
}

#[test]
fn cairn_on_coding_agents() {
    goals("weka_u64_warm75_b512", 512, &[(4166, 0.70)]);
}

#[test]
fn cairn_on_short_blocks() {
    goals("lmcache_agents_b16", 16, &[]);
}

#[test]
fn conversations() {
    check("mooncake_conversation", 512);
}

#[test]
fn coding_agents() {
    check("weka_u64_warm75_b512", 512);
}

#[test]
fn short_blocks() {
    check("lmcache_agents_b16", 16);
}

struct TierRow {
    kind: SecondTier,
    admit: u32,
    capacities: [usize; 2],
    /// As printed: four digits.
    token_hit: f64,
    reads: u64,
    writes: u64,
}

fn tier_rows(path: &Path) -> Vec<TierRow> {
    let text = std::fs::read_to_string(path).unwrap();
    let rows = text.lines().filter(|line| line.starts_with("tier,")).map(|line| {
        let fields: Vec<&str> = line.split(',').collect();
        let value = |name: &str| {
            let field = fields.iter().find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
            field.unwrap().to_owned()
        };
        TierRow {
            kind: match fields[1] {
                "exclusive" => SecondTier::Exclusive,
                "lazy" => SecondTier::Lazy,
                _ => SecondTier::WriteThrough,
            },
            admit: value("admit").parse().unwrap(),
            capacities: [fields[4].parse().unwrap(), fields[5].parse().unwrap()],
            token_hit: value("token_hit").parse().unwrap(),
            reads: value("nvme_reads").parse().unwrap(),
            writes: value("nvme_writes").parse().unwrap(),
        }
    });
    rows.collect()
}

#[test]
fn two_tiers() {
    let Some(folder) = traces::folder() else {
        eprintln!("SKIPPED: CAIRN_TRACES is not set, so two tiers cannot be replayed");
        return;
    };
    let trace = traces::read(&folder.join("mooncake_conversation.jsonl.gz"));
    let tokens: u64 = trace.iter().map(|request| request.input_tokens).sum();
    let mut wrong = Vec::new();
    let rows = tier_rows(&folder.join("expected/tiers_mooncake_conversation.csv"));
    assert_eq!(rows.len(), 18);
    for row in rows {
        let mut tiers = TwoTiers::new(row.kind, PolicyKind::Lru, row.capacities, row.admit);
        let hits =
            |request: &Request| (tiers.request(&request.chain)[1] as u64 * 512).min(request.input_tokens);
        let hits: u64 = trace.iter().map(hits).sum();
        let token_hit = (hits as f64 / tokens as f64 * 1e4).round() / 1e4;
        if (token_hit, tiers.reads, tiers.writes) != (row.token_hit, row.reads, row.writes) {
            wrong.push(format!(
                "{:?} admit {} {:?}: hit {token_hit} reads {} writes {}, not {} {} {}",
                row.kind,
                row.admit,
                row.capacities,
                tiers.reads,
                tiers.writes,
                row.token_hit,
                row.reads,
                row.writes
            ));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
