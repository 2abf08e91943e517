//! Every policy on real traces, against reference counts that must be met to the token. Needs `CAIRN_TRACES`.

#![allow(clippy::unwrap_used)]

use cairn_core::PolicyKind;
use cairn_core::replay::Replay;
use cairn_tests::traces::{self, Request};
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
