//! `cairn lookup`, `cairn explain` and `cairn stats`: questions to a server, answered as a table or as JSON.

use crate::connect::ConnectArguments;
use crate::worker::ModelArguments;
use crate::{CliError, block_on};
use cairn_client::CacheClient;
use cairn_proto::{BlockHash, KeySpace, MissReason, Tier, chain, pb, runs};
use cairn_runtime::{Model, key_space};
use clap::Args;
use comfy_table::{Table, presets};
use serde_json::json;
use std::path::PathBuf;

#[derive(Args)]
pub(crate) struct PromptOptions {
    #[command(flatten)]
    server: ServerOptions,
    #[command(flatten)]
    model: ModelArguments,
    /// The prompt.
    #[arg(long, conflicts_with = "prompt_file", required_unless_present = "prompt_file")]
    prompt: Option<String>,
    /// A file with the prompt.
    #[arg(long, value_name = "PATH")]
    prompt_file: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct StatsOptions {
    #[command(flatten)]
    server: ServerOptions,
}

#[derive(Args)]
pub(crate) struct ServerOptions {
    /// The cache server.
    #[arg(long, default_value = "http://127.0.0.1:7077", env = "CAIRN_CACHE", value_name = "URL")]
    cache: String,
    #[command(flatten)]
    connect: ConnectArguments,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl ServerOptions {
    pub(crate) fn client(&self) -> Result<CacheClient, CliError> {
        let mut options = self.connect.options(&self.cache)?;
        options.name = "cairn cli".into();
        CacheClient::start(options).map_err(CliError::failed)
    }
}

impl PromptOptions {
    fn chain(&self) -> Result<(KeySpace, usize, Vec<BlockHash>), CliError> {
        let options = self.model.options();
        let model = Model::load(&options.model, options.weight_type).map_err(CliError::failed)?;
        let text = match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => text.clone(),
            (None, Some(path)) => std::fs::read_to_string(path)
                .map_err(|error| CliError::Failed(format!("cannot read {}: {error}", path.display())))?,
            (None, None) => String::new(),
        };
        let tokens = model.tokenizer.encode(&text).map_err(CliError::failed)?;
        let space = key_space(&model, &options).map_err(CliError::failed)?;
        let hashes = chain(&space, &tokens, |_| &[]);
        Ok((space, tokens.len(), hashes))
    }
}

pub(crate) fn lookup(options: PromptOptions) -> Result<(), CliError> {
    let (space, tokens, hashes) = options.chain()?;
    block_on(async move {
        let client = options.server.client()?;
        client.open_space(&space).await.map_err(CliError::failed)?;
        let found = client.lookup(&space, &hashes).await;
        let block_tokens = space.layout().block_tokens();
        let resident = found.resident();
        if options.server.json {
            let outcomes: Vec<_> = runs(&found.outcomes)
                .map(|(count, outcome)| json!({"blocks": count, "outcome": outcome.to_string()}))
                .collect();
            let body = json!({"tokens": tokens, "blocks": hashes.len(), "resident_blocks": resident,
                "resident_tokens": resident * block_tokens, "space": space.id().to_string(), "outcomes": outcomes});
            println!("{body}");
            return Ok(());
        }
        println!(
            "{tokens} tokens, {} full blocks of {block_tokens}; {resident} resident ({} tokens)",
            hashes.len(),
            resident * block_tokens
        );
        for (count, outcome) in runs(&found.outcomes) {
            println!("  {count:6} blocks  {outcome}");
        }
        Ok(())
    })
}

pub(crate) fn explain(options: PromptOptions) -> Result<(), CliError> {
    let (space, _, hashes) = options.chain()?;
    block_on(async move {
        let client = options.server.client()?;
        client.open_space(&space).await.map_err(CliError::failed)?;
        let explained = client.explain(space.id(), &hashes).await.map_err(CliError::failed)?;
        let mut table = Table::new();
        table.load_preset(presets::NOTHING).set_header(["block", "hash", "state", "detail"]);
        let mut rows = Vec::new();
        for (block, (hash, explanation)) in hashes.iter().zip(&explained).enumerate() {
            let (state, detail) = describe(explanation);
            if options.server.json {
                rows.push(
                    json!({"block": block, "hash": hash.to_string(), "state": state, "detail": detail}),
                );
            } else {
                table.add_row([block.to_string(), format!("{hash:?}"), state, detail]);
            }
        }
        if options.server.json {
            println!("{}", serde_json::Value::Array(rows));
        } else {
            println!("{table}");
        }
        Ok(())
    })
}

fn describe(explanation: &pb::BlockExplanation) -> (String, String) {
    use pb::block_explanation::State;
    match &explanation.state {
        Some(State::Resident(block)) => {
            let tier = Tier::try_from(block.tier()).map_or("unknown", Tier::name);
            let reach = if block.reachable { "" } else { ", unreachable: an ancestor is missing" };
            let (leases, idle) = (block.leases, block.idle_ms);
            let durable = if block.durable { ", durable" } else { "" };
            (format!("resident:{tier}"), format!("{leases} leases, idle {idle} ms{durable}{reach}"))
        }
        Some(State::Absent(block)) => {
            let reason = MissReason::try_from(block.reason()).map_or("unknown", MissReason::name);
            let by = if block.policy.is_empty() { String::new() } else { format!(" by {}", block.policy) };
            let when = if block.ago_ms == 0 { String::new() } else { format!("{} ms ago{by}", block.ago_ms) };
            (format!("absent:{reason}"), when)
        }
        None => ("unknown".into(), String::new()),
    }
}

pub(crate) fn stats(options: StatsOptions) -> Result<(), CliError> {
    block_on(async move {
        let client = options.server.client()?;
        let stats = client.stats().await.map_err(CliError::failed)?;
        if options.server.json {
            println!("{}", stats_json(&stats));
            return Ok(());
        }
        print_stats(&stats);
        Ok(())
    })
}

fn named_misses(stats: &pb::StatsResponse) -> Vec<(&'static str, u64)> {
    let name =
        |reason: &pb::ReasonCount| MissReason::try_from(reason.reason()).map_or("unknown", MissReason::name);
    stats.misses.iter().map(|reason| (name(reason), reason.blocks)).collect()
}

pub(crate) fn stats_json(stats: &pb::StatsResponse) -> serde_json::Value {
    let tier = |tier: &pb::TierStats| {
        json!({"tier": Tier::try_from(tier.tier()).map_or("unknown", Tier::name), "policy": tier.policy,
            "capacity_bytes": tier.capacity_bytes, "resident_bytes": tier.resident_bytes,
            "resident_blocks": tier.resident_blocks, "hit_blocks": tier.hit_blocks,
            "evicted_blocks": tier.evicted_blocks})
    };
    let misses: serde_json::Map<String, serde_json::Value> =
        named_misses(stats).into_iter().map(|(name, blocks)| (name.to_owned(), blocks.into())).collect();
    json!({"version": stats.version, "uptime_ms": stats.uptime_ms, "sessions": stats.sessions,
        "leases": stats.leases, "reservations": stats.reservations, "asked_blocks": stats.asked_blocks,
        "tiers": stats.tiers.iter().map(tier).collect::<Vec<_>>(),
        "gpus": stats.gpus.iter().map(gpu_json).collect::<Vec<_>>(), "gpu_queued_blocks": stats.gpu_queued_blocks,
        "devices": stats.devices.iter().map(device_json).collect::<Vec<_>>(), "missed_blocks": misses,
        "committed_blocks": stats.committed_blocks, "duplicate_blocks": stats.duplicate_blocks,
        "checksum_mismatches": stats.checksum_mismatches, "quarantined_blocks": stats.quarantined_blocks,
        "fetched_bytes": stats.fetched_bytes, "published_bytes": stats.published_bytes,
        "wires": used_wires(stats).map(wire_json).collect::<Vec<_>>()})
}

/// Those that carried anything.
fn used_wires(stats: &pb::StatsResponse) -> impl Iterator<Item = &pb::WireStats> {
    stats.wires.iter().filter(|wire| wire.fetches + wire.fetched_bytes + wire.published_bytes > 0)
}

fn wire_json(wire: &pb::WireStats) -> serde_json::Value {
    json!({"wire": wire.wire, "fetches": wire.fetches, "fetched_bytes": wire.fetched_bytes,
        "published_bytes": wire.published_bytes})
}

fn gpu_json(gpu: &pb::GpuStats) -> serde_json::Value {
    json!({"device": gpu.device, "name": gpu.name, "state": gpu.state, "shared": gpu.shared,
        "capacity_bytes": gpu.capacity_bytes, "resident_bytes": gpu.resident_bytes,
        "resident_blocks": gpu.resident_blocks, "promoted_blocks": gpu.promoted_blocks,
        "promoted_bytes": gpu.promoted_bytes, "demoted_blocks": gpu.demoted_blocks,
        "dropped_blocks": gpu.dropped_blocks, "read_blocks": gpu.read_blocks, "read_bytes": gpu.read_bytes,
        "corrupt_blocks": gpu.corrupt_blocks, "errors": gpu.errors})
}

fn print_gpus(gpus: &[pb::GpuStats]) {
    if gpus.is_empty() {
        return;
    }
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "GPU",
        "name",
        "state",
        "shared",
        "resident",
        "of",
        "blocks",
        "promoted",
        "demoted",
        "dropped",
        "read back",
        "corrupt",
        "errors",
    ]);
    for gpu in gpus {
        table.add_row([
            gpu.device.to_string(),
            gpu.name.clone(),
            gpu.state.clone(),
            if gpu.shared { "yes" } else { "no" }.into(),
            mib(gpu.resident_bytes),
            mib(gpu.capacity_bytes),
            gpu.resident_blocks.to_string(),
            mib(gpu.promoted_bytes),
            gpu.demoted_blocks.to_string(),
            gpu.dropped_blocks.to_string(),
            mib(gpu.read_bytes),
            gpu.corrupt_blocks.to_string(),
            gpu.errors.to_string(),
        ]);
    }
    println!("{table}");
}

fn device_json(device: &pb::DeviceStats) -> serde_json::Value {
    json!({"path": device.path, "state": device.state, "engine": device.engine,
        "capacity_bytes": device.capacity_bytes, "live_bytes": device.live_bytes, "target_bytes": device.target_bytes, "live_blocks": device.live_blocks,
        "queued_blocks": device.queued_blocks, "free_segments": device.free_segments,
        "stored_blocks": device.stored_blocks, "stored_bytes": device.stored_bytes,
        "relocated_bytes": device.relocated_bytes, "read_blocks": device.read_blocks,
        "read_bytes": device.read_bytes, "evicted_blocks": device.evicted_blocks,
        "corrupt_blocks": device.corrupt_blocks, "errors": device.errors,
        "scrubbed_blocks": device.scrubbed_blocks})
}

fn print_devices(devices: &[pb::DeviceStats]) {
    if devices.is_empty() {
        return;
    }
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "device",
        "state",
        "engine",
        "live",
        "of",
        "blocks",
        "queued",
        "stored",
        "relocated",
        "read",
        "evicted",
        "corrupt",
        "errors",
        "checked",
    ]);
    for device in devices {
        table.add_row([
            device.path.clone(),
            device.state.clone(),
            device.engine.clone(),
            mib(device.live_bytes),
            mib(device.capacity_bytes),
            device.live_blocks.to_string(),
            device.queued_blocks.to_string(),
            mib(device.stored_bytes),
            mib(device.relocated_bytes),
            mib(device.read_bytes),
            device.evicted_blocks.to_string(),
            device.corrupt_blocks.to_string(),
            device.errors.to_string(),
            device.scrubbed_blocks.to_string(),
        ]);
    }
    println!("{table}");
}

fn print_stats(stats: &pb::StatsResponse) {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    println!(
        "cairn {} up {:.0} s: {} sessions, {} leases, {} reservations",
        stats.version,
        stats.uptime_ms as f64 / 1e3,
        stats.sessions,
        stats.leases,
        stats.reservations
    );
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "tier",
        "policy",
        "capacity",
        "resident",
        "blocks",
        "hit blocks",
        "evicted",
    ]);
    for tier in &stats.tiers {
        table.add_row([
            Tier::try_from(tier.tier()).map_or("unknown", Tier::name).to_owned(),
            tier.policy.clone(),
            mib(tier.capacity_bytes),
            mib(tier.resident_bytes),
            tier.resident_blocks.to_string(),
            tier.hit_blocks.to_string(),
            tier.evicted_blocks.to_string(),
        ]);
    }
    println!("{table}");
    print_gpus(&stats.gpus);
    print_devices(&stats.devices);
    println!("blocks asked for: {}", stats.asked_blocks);
    for (name, blocks) in named_misses(stats) {
        println!("  missed, {name}: {blocks}");
    }
    println!(
        "committed {}, duplicates {}, quarantined {}, checksum mismatches {}; sent {}, received {}",
        stats.committed_blocks,
        stats.duplicate_blocks,
        stats.quarantined_blocks,
        stats.checksum_mismatches,
        mib(stats.fetched_bytes),
        mib(stats.published_bytes)
    );
    for wire in used_wires(stats) {
        println!(
            "  over {}: sent {}, received {}",
            wire.wire,
            mib(wire.fetched_bytes),
            mib(wire.published_bytes)
        );
    }
}
