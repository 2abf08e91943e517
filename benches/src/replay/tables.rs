//! What a replay found, beside the model.

use super::{Pace, Replayed, Went, Work, record_bytes};
use crate::{BenchError, OrFail};
use cairn_core::PolicyKind;
use cairn_core::replay::{SecondTier, TwoTiers};
use cairn_harness::hit_rate::{self, Below, Capacity, Contender, Outcome, Plan, Row};
use cairn_harness::section::{Bar, Bars, Cell, Column, Lines, Plot, Role, Section, distribution, quantile};
use cairn_harness::trace::{Request, Trace};
use cairn_proto::pb;
use std::collections::VecDeque;
use std::sync::atomic::AtomicBool;

/// Points of token hit rate that concurrent workers may be beyond what the model says of requests one by one, and of as many at a time as there
/// are workers; and as much as two requests of each worker.
pub const CONCURRENT_POINTS: f64 = 1.0;

/// Policies whose order the server keeps exactly as the model does. The others hear of a request's blocks in smaller groups.
const EXACT: [PolicyKind; 2] = [PolicyKind::Lru, PolicyKind::Fifo];

/// Points of token hit rate for those.
pub const INEXACT_POINTS: f64 = 2.0;

/// Longest wait until everything is on the device./// The tables and plots of a replay that took so long, and how far it is from the model.
pub(super) fn summary(
    work: &Work,
    went: &[Went],
    (block_slots, stats): (u64, &pb::StatsResponse),
    (wall, cpu): (f64, f64),
) -> Result<Replayed, BenchError> {
    let options = &work.options;
    let trace = options.trace.head(went.len());
    let second = stats.devices.first().map(|device| device.target_bytes / record_bytes(&work.space));
    let model = model(&trace, options.policies, (block_slots, second))?;
    let row = model.rows.first().or_fail("the trace has no requests")?;
    let real: u64 =
        trace.requests().iter().zip(went).map(|(request, went)| tokens(&trace, request, went.hits)).sum();
    let points = 100.0 * (real as f64 - row.hits.hit_tokens as f64) / row.hits.tokens.max(1) as f64;
    let tiers = if second.is_some() { 2 } else { 1 };
    let exact = options.policies[..tiers].iter().all(|policy| EXACT.contains(policy));
    let inexact = if exact { 0.0 } else { INEXACT_POINTS };
    let bounds = if options.pace != Pace::Closed {
        None
    } else if options.workers == 1 {
        Some([-inexact, inexact])
    } else {
        let overlapped = overlapped(&trace, options.policies, (block_slots, second), options.workers);
        let lost = row.hits.hit_tokens.saturating_sub(overlapped) as f64;
        let lost = 100.0 * lost / row.hits.tokens.max(1) as f64;
        // Whole requests change places.
        let places = 100.0 * (2 * options.workers) as f64 / went.len().max(1) as f64;
        let more = inexact + places + CONCURRENT_POINTS;
        Some([-lost - more, more])
    };
    let mut agreement = agreement(&trace, row, (went, real), stats);
    let sizes = second.map_or(format!("{block_slots} blocks in host memory"), |second| {
        format!("{block_slots} blocks in host memory and {second} on NVMe")
    });
    let policies: Vec<&str> = options.policies[..tiers].iter().map(|policy| policy.name()).collect();
    agreement.notes.push(format!(
        "{sizes}, of {} different ones; blocks of {} tokens as {} KiB; policy {}; {} worker(s), {}. Every byte of every hit was compared. The hit \
         tokens are {points:+.3} points from the model's{}.",
        trace.unique(),
        trace.block_tokens,
        options.block_kib,
        policies.join(" and "),
        options.workers,
        match options.pace {
            Pace::Closed => "each one request after the other".to_owned(),
            Pace::Timestamps(speed) => format!("by timestamps, {speed} times as fast"),
        },
        bounds.map_or(String::new(), |[below, above]| format!("; allowed are {below:+.2} to {above:+.2}"))
    ));
    agreement.plots.push(tier_bars(&trace, &model, (policies[0], went)));
    let complete = went.len() == options.trace.requests().len();
    let sections = vec![agreement, times(work, went), throughput(work, went, stats, (wall, cpu))];
    Ok(Replayed { sections, complete, points, bounds })
}

fn model(
    trace: &Trace,
    policies: [PolicyKind; 2],
    (block_slots, second): (u64, Option<u64>),
) -> Result<Outcome, BenchError> {
    let below = second.map(|blocks| Below {
        kind: SecondTier::WriteThrough,
        capacity: Capacity::Blocks(blocks.max(1)),
        admit: 1,
        policy: Some(policies[1]),
    });
    let plan = Plan {
        contenders: vec![Contender::Policy(policies[0])],
        capacities: vec![Capacity::Blocks(block_slots)],
        below,
        warm_up: 0.0,
        token_bytes: None,
        endurance_bytes: None,
    };
    hit_rate::run(trace, &plan, &AtomicBool::new(false), || ()).map_err(BenchError)
}

fn agreement(trace: &Trace, model: &Row, (went, real): (&[Went], u64), stats: &pb::StatsResponse) -> Section {
    let mut section = Section::new(
        "agreement",
        &format!("{}: the server beside the model", trace.name),
        vec![
            Column::key("what"),
            Column::new("requests", Role::Fact, 0),
            Column::new("hit tokens", Role::Higher, 0),
            Column::new("token hit %", Role::Higher, 2),
            Column::new("hit blocks, host", Role::Fact, 0),
            Column::new("hit blocks, NVMe", Role::Fact, 0),
            Column::new("written to NVMe", Role::Lower, 0),
            Column::new("lost on the way", Role::Lower, 0),
            Column::new("not stored", Role::Lower, 0),
        ],
    );
    let sum = |value: fn(&Went) -> usize| Cell::Number(went.iter().map(value).sum::<usize>() as f64);
    let number = |value: u64| Cell::Number(value as f64);
    let percent = |tokens: u64| Cell::number(100.0 * tokens as f64 / model.hits.tokens.max(1) as f64);
    let written = stats.devices.iter().map(|device| device.stored_blocks).reduce(|sum, more| sum + more);
    section.rows.push(vec![
        Cell::text("server"),
        number(went.len() as u64),
        number(real),
        percent(real),
        sum(|one| one.host),
        sum(|one| one.nvme),
        written.map_or(Cell::Nothing, number),
        sum(|one| one.lost),
        sum(|one| one.refused),
    ]);
    let reads = model.below.as_ref().map(|below| below.reads);
    section.rows.push(vec![
        Cell::text("model"),
        number(model.hits.requests),
        number(model.hits.hit_tokens),
        percent(model.hits.hit_tokens),
        number(model.hits.hit_blocks - reads.unwrap_or(0)),
        reads.map_or(Cell::Nothing, number),
        model.below.as_ref().map_or(Cell::Nothing, |below| number(below.writes)),
        Cell::Nothing,
        Cell::Nothing,
    ]);
    section
}

fn tier_bars(trace: &Trace, model: &Outcome, (policy, went): (&str, &[Went])) -> Plot {
    let share = |blocks: u64| 100.0 * blocks as f64 / trace.references().max(1) as f64;
    let hits = |value: fn(&Went) -> usize| share(went.iter().map(value).sum::<usize>() as u64);
    Plot::Bars(Bars {
        name: "tiers".into(),
        title: format!("{}: where hit blocks were, and the ceiling", trace.name),
        x: "blocks, % of those asked for".into(),
        parts: vec!["host".into(), "nvme".into()],
        bars: vec![Bar {
            name: policy.into(),
            parts: vec![hits(|one| one.host), hits(|one| one.nvme)],
            limit: Some(share(model.ceiling.hit_blocks)),
        }],
    })
}

fn tokens(trace: &Trace, request: &Request, hits: usize) -> u64 {
    (hits as u64 * trace.block_tokens).min(request.input_tokens)
}

/// Hit tokens if always so many requests are looked up before the first of them is stored: what workers in step would get.
fn overlapped(
    trace: &Trace,
    policies: [PolicyKind; 2],
    (host, second): (u64, Option<u64>),
    workers: usize,
) -> u64 {
    let host = host as usize;
    // Without a second tier it is as large as the first, and has the same.
    let capacities = [host, second.map_or(host, |blocks| blocks as usize)];
    let mut tiers = TwoTiers::new(SecondTier::WriteThrough, policies, capacities, 1);
    let mut going = VecDeque::new();
    let mut hit = 0;
    for request in trace.requests() {
        let chain: Vec<u64> = trace.chain(request).map(u64::from).collect();
        hit += tokens(trace, request, tiers.lookup(&chain));
        going.push_back(chain);
        if going.len() >= workers
            && let Some(first) = going.pop_front()
        {
            tiers.request(&first);
        }
    }
    hit
}

/// How long requests took, by the slowest tier in them.
fn times(work: &Work, went: &[Went]) -> Section {
    let mut section = Section::new(
        "latency",
        "Lookup and fetch, by the slowest tier in the request",
        vec![
            Column::key("tier"),
            Column::new("requests", Role::Fact, 0),
            Column::new("blocks", Role::Fact, 0),
            Column::new("p50 ms", Role::Lower, 3),
            Column::new("p95 ms", Role::Lower, 3),
            Column::new("p99 ms", Role::Lower, 3),
            Column::new("GB/s in it", Role::Higher, 2),
        ],
    );
    let mut lines = Vec::new();
    type Is = fn(&Went) -> bool;
    let classes: [(&str, Is); 4] = [
        ("host", |one| one.host > 0 && one.nvme == 0),
        ("nvme", |one| one.nvme > 0),
        ("nothing found", |one| one.hits == 0),
        ("all", |_| true),
    ];
    for (name, is) in classes {
        let those: Vec<&Went> = went.iter().filter(|one| is(one)).collect();
        if those.is_empty() {
            continue;
        }
        let ms: Vec<f64> = those.iter().map(|one| 1e3 * one.fetch_s).collect();
        let blocks: usize = those.iter().map(|one| one.hits).sum();
        let seconds: f64 = those.iter().map(|one| one.fetch_s).sum();
        let bytes = blocks as f64 * work.space.block_bytes() as f64;
        section.rows.push(vec![
            Cell::text(name),
            Cell::Number(those.len() as f64),
            Cell::Number(blocks as f64),
            Cell::number(quantile(&ms, 0.5)),
            Cell::number(quantile(&ms, 0.95)),
            Cell::number(quantile(&ms, 0.99)),
            if blocks == 0 { Cell::Nothing } else { Cell::number(bytes / seconds / 1e9) },
        ]);
        lines.push(distribution(name, &ms));
    }
    section.plots.push(Plot::Lines(Lines {
        name: "distribution".into(),
        title: "lookup and fetch".into(),
        x: "ms (log)".into(),
        y: "requests that took no longer, %".into(),
        lines,
        level: None,
    }));
    section
}

fn throughput(work: &Work, went: &[Went], stats: &pb::StatsResponse, (wall, cpu): (f64, f64)) -> Section {
    let mut section = Section::new(
        "throughput",
        "Bytes and CPU",
        vec![
            Column::key("what"),
            Column::new("GB", Role::Fact, 3),
            Column::new("GB/s while it went", Role::Higher, 2),
            Column::new("of a memcpy", Role::Higher, 2),
        ],
    );
    let block_bytes = work.space.block_bytes() as f64;
    let copy = memcpy_gb_per_s(block_bytes as usize);
    let blocks = |value: fn(&Went) -> usize| went.iter().map(value).sum::<usize>() as f64 * block_bytes / 1e9;
    let seconds = |value: fn(&Went) -> f64| went.iter().map(value).sum::<f64>();
    let rows = [
        ("fetched", blocks(|one| one.hits), seconds(|one| if one.hits > 0 { one.fetch_s } else { 0.0 })),
        ("published", blocks(|one| one.stored), seconds(|one| one.publish_s)),
    ];
    for (name, gigabytes, seconds) in rows {
        let rate = if seconds > 0.0 { gigabytes / seconds } else { f64::NAN };
        let cells = [Cell::number(gigabytes), Cell::number(rate), Cell::number(rate / copy)];
        section.rows.push([vec![Cell::text(name)], cells.to_vec()].concat());
    }
    let wires: Vec<String> = stats
        .wires
        .iter()
        .filter(|wire| wire.fetched_bytes > 0)
        .map(|wire| format!("{} {:.3} GB", wire.wire, wire.fetched_bytes as f64 / 1e9))
        .collect();
    let late: Vec<f64> = went.iter().map(|one| 1e3 * one.late_s).collect();
    let lateness = match work.options.pace {
        Pace::Closed => String::new(),
        Pace::Timestamps(_) => format!(
            " Requests began {:.1} ms (p50) and {:.1} ms (p99) after their time.",
            quantile(&late, 0.5),
            quantile(&late, 0.99)
        ),
    };
    section.notes.push(format!(
        "{wall:.1} s in all, {cpu:.1} CPU-s of server and workers together, making and comparing the bytes included; a memcpy of blocks moves {copy:.1} GB/s. \
         Fetched over: {}.{lateness}",
        if wires.is_empty() { "nothing".into() } else { wires.join(", ") }
    ));
    section
}

/// The limit: blocks copied within memory, far more than a cache holds.
fn memcpy_gb_per_s(block_bytes: usize) -> f64 {
    const BYTES: usize = 256 << 20;
    let blocks = (BYTES / block_bytes).max(1);
    let source = vec![1u8; blocks * block_bytes];
    let mut target = vec![0u8; blocks * block_bytes];
    let seconds = crate::median_seconds(3, || {
        for (target, source) in target.chunks_exact_mut(block_bytes).zip(source.chunks_exact(block_bytes)) {
            std::hint::black_box(target).copy_from_slice(std::hint::black_box(source));
        }
    });
    (blocks * block_bytes) as f64 / seconds / 1e9
}
