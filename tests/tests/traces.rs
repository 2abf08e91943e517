//! Every policy on real traces, against reference counts that must be met to the token. Needs `CAIRN_TRACES`.

#![allow(clippy::unwrap_used)]

use cairn_core::PolicyKind;
use cairn_core::replay::SecondTier;
use cairn_harness::hit_rate::{self, Below, Capacity, Contender, Plan};
use cairn_harness::trace::Trace;
use cairn_tests::traces;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::AtomicBool;

struct Row {
    policy: String,
    capacity: usize,
    /// Of blocks, of tokens, and the mean over requests: as printed, four digits.
    rates: [f64; 3],
    hit_tokens: u64,
    inserted: u64,
}

/// The single-tier rows of a reference table.
fn rows(path: &Path) -> Vec<Row> {
    let text = std::fs::read_to_string(path).unwrap();
    let rows = text.lines().filter(|line| !line.starts_with(['#', 'p'])).map(|line| {
        let fields: Vec<&str> = line.split(',').collect();
        (fields[0] != "tier").then(|| Row {
            policy: fields[0].to_owned(),
            capacity: fields[2].parse().unwrap(),
            rates: [3, 4, 5].map(|i| fields[i].parse().unwrap()),
            hit_tokens: fields[6].parse().unwrap(),
            inserted: fields[7].parse().unwrap(),
        })
    });
    rows.flatten().collect()
}

fn hit_tokens(trace: &Trace, kind: PolicyKind, capacity: usize) -> u64 {
    let plan = plan(vec![Contender::Policy(kind)], &[capacity]);
    let outcome = hit_rate::run(trace, &plan, &AtomicBool::new(false), || ()).unwrap();
    outcome.rows[0].hits.hit_tokens
}

fn plan(contenders: Vec<Contender>, capacities: &[usize]) -> Plan {
    Plan {
        contenders,
        capacities: capacities.iter().map(|blocks| Capacity::Blocks(*blocks as u64)).collect(),
        below: None,
        warm_up: 0.0,
        token_bytes: None,
        endurance_bytes: None,
    }
}

/// Whether a printed share is this one.
fn is_printed(printed: f64, share: f64) -> bool {
    (printed - share).abs() <= 0.000_050_1
}

/// Every row and column of a reference table, the optimum's too.
fn check(name: &str) {
    let Some(folder) = traces::folder() else {
        eprintln!("SKIPPED: CAIRN_TRACES is not set, so {name} cannot be replayed");
        return;
    };
    let trace = traces::read(&folder.join(format!("{name}.jsonl.gz")));
    let rows = rows(&folder.join(format!("expected/{name}.csv")));
    let capacities: BTreeSet<usize> = rows.iter().map(|row| row.capacity).collect();
    let capacities: Vec<usize> = capacities.into_iter().collect();
    let plan = plan(Contender::all(), &capacities);
    let outcome = hit_rate::run(&trace, &plan, &AtomicBool::new(false), || ()).unwrap();
    let mut wrong = Vec::new();
    for Row { policy, capacity, rates, hit_tokens, inserted } in &rows {
        let found = outcome.rows.iter().find(|found| {
            (found.policy.as_str(), found.capacity_blocks as usize) == (policy.as_str(), *capacity)
        });
        let found = found.expect("a policy that this project has");
        let hits = &found.hits;
        let share = |part: u64, whole: u64| part as f64 / whole as f64;
        let shares =
            [share(hits.hit_blocks, hits.blocks), share(hits.hit_tokens, hits.tokens), hits.request_mean];
        let same = rates.iter().zip(shares).all(|(printed, share)| is_printed(*printed, share));
        if hits.hit_tokens != *hit_tokens || found.inserted != Some(*inserted) || !same {
            wrong.push(format!("{policy} at {capacity}: {found:?}, not {hit_tokens} {inserted} {rates:?}"));
        }
    }
    assert!(rows.len() > 30, "only {} rows in the reference table", rows.len());
    assert!(wrong.is_empty(), "{name}:\n{}", wrong.join("\n"));
}

/// Goals of the default policy: nowhere below the best of all others, and so much of the optimum at the named capacities.
fn goals(name: &str, shares_of_optimum: &[(usize, f64)]) {
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
        let hits = hit_tokens(&trace, PolicyKind::Cairn, capacity);
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
    goals("mooncake_conversation", &[(1827, 0.45), (9139, 0.62)]);
}

#[test]
fn cairn_on_coding_agents() {
    goals("weka_u64_warm75_b512", &[(4166, 0.70)]);
}

#[test]
fn cairn_on_short_blocks() {
    goals("lmcache_agents_b16", &[]);
}

#[test]
fn conversations() {
    check("mooncake_conversation");
}

#[test]
fn coding_agents() {
    check("weka_u64_warm75_b512");
}

#[test]
fn short_blocks() {
    check("lmcache_agents_b16");
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
    let mut wrong = Vec::new();
    let rows = tier_rows(&folder.join("expected/tiers_mooncake_conversation.csv"));
    assert_eq!(rows.len(), 18);
    for row in rows {
        let [first, second] = row.capacities;
        let mut plan = plan(vec![Contender::Policy(PolicyKind::Lru)], &[first]);
        let capacity = Capacity::Blocks(second as u64);
        plan.below = Some(Below { kind: row.kind, capacity, admit: row.admit, policy: None });
        let outcome = hit_rate::run(&trace, &plan, &AtomicBool::new(false), || ()).unwrap();
        let (hits, below) = (outcome.rows[0].hits, outcome.rows[0].below.clone().unwrap());
        let token_hit = hits.hit_tokens as f64 / hits.tokens as f64;
        if !is_printed(row.token_hit, token_hit) || (below.reads, below.writes) != (row.reads, row.writes) {
            wrong.push(format!(
                "{:?} admit {} {:?}: {token_hit} {below:?}, not {} {} {}",
                row.kind, row.admit, row.capacities, row.token_hit, row.reads, row.writes
            ));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
