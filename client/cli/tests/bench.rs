//! `cairn bench` as people call it: tables, reports, differences, wrong arguments.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};

fn cairn(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cairn")).arg("bench").args(arguments).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_trace_is_made_replayed_and_compared() {
    let folder = tempfile::tempdir().unwrap();
    let [trace, one, two] = ["chat.jsonl.gz", "one", "two"].map(|name| folder.path().join(name));
    let made = cairn(&["workload", "--kind", "chat", "--requests", "200", "--out", path(&trace)]);
    assert!(made.status.success(), "{}", text(&made));
    let sizes = ["--capacity", "5%,50%", "--trace", path(&trace)];
    let replayed = cairn(&[&["hit-rate", "--report", path(&one)], &sizes[..]].concat());
    assert!(replayed.status.success(), "{}", text(&replayed));
    assert!(text(&replayed).lines().filter(|line| line.trim_start().starts_with("opt")).count() == 2);
    let again = cairn(&[&["hit-rate", "--json", "--report", path(&two)], &sizes[..]].concat());
    let report: serde_json::Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(report["outcomes"][0]["rows"].as_array().unwrap().len(), 2 * 9);
    assert_eq!(report["outcomes"][0]["complete"], true);
    for file in ["report.json", "rows.csv", "report.html", "chat-hit-rate.svg"] {
        assert!(one.join(file).metadata().unwrap().len() > 1000, "{file}");
    }
    let same = cairn(&["diff", path(&one), path(&two), "--bound", "0"]);
    assert!(same.status.success() && text(&same).contains("18 replays in both"), "{}", text(&same));
    // A worse one is told, and fails.
    let worse = std::fs::read_to_string(two.join("report.json")).unwrap();
    let best = report["outcomes"][0]["rows"][0]["hits"]["hit_tokens"].as_u64().unwrap();
    let worse = worse.replacen(&format!("\"hit_tokens\": {best},"), "\"hit_tokens\": 1,", 2);
    std::fs::write(two.join("report.json"), worse).unwrap();
    let worse = cairn(&["diff", path(&one), path(&two)]);
    assert!(!worse.status.success() && text(&worse).contains("worse"), "{}", text(&worse));
}

#[test]
fn two_tiers_show_wear() {
    let arguments = ["--workload", "rag", "--requests", "300", "--capacity", "2%", "--nvme", "20%"];
    let output = cairn(&[&["hit-rate", "--geometry", "32x8x128x2"], &arguments[..]].concat());
    assert!(output.status.success() && text(&output).contains("life, days"), "{}", text(&output));
}

fn json(output: &Output) -> serde_json::Value {
    assert!(output.status.success(), "{}", text(output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A measured table: its columns by name, row by row.
fn table(report: &serde_json::Value, name: &str) -> Vec<serde_json::Map<String, serde_json::Value>> {
    let sections = report["sections"].as_array().unwrap();
    let section =
        sections.iter().find(|section| section["name"] == name).unwrap_or_else(|| panic!("no {name}"));
    let columns: Vec<&str> = section["columns"]
        .as_array()
        .unwrap()
        .iter()
        .map(|column| column["name"].as_str().unwrap())
        .collect();
    let row = |row: &serde_json::Value| {
        let cells = row.as_array().unwrap();
        assert_eq!(cells.len(), columns.len());
        columns.iter().map(|name| name.to_string()).zip(cells.iter().cloned()).collect()
    };
    section["rows"].as_array().unwrap().iter().map(row).collect()
}

#[test]
fn a_real_server_agrees_with_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let [events, arrivals, out] = ["kv.jsonl", "times.csv", "out"].map(|name| folder.path().join(name));
    // A recording of vLLM's events: each request shares its first block with all others.
    let mut lines = String::new();
    for i in 0..40 {
        let time = 10 * i;
        let parent = if i == 0 { "null".into() } else { "1".to_owned() };
        let first = if i == 0 { "1, " } else { "" };
        lines += &format!(
            "[{time}.5, [[\"BlockStored\", [{first}{}, {}], {parent}, [], 16, null]], 0]\n",
            2 * i + 2,
            2 * i + 3
        );
    }
    std::fs::write(&events, lines).unwrap();
    let times: String = (0..30).map(|i| format!("{i},100,10\n")).collect();
    std::fs::write(&arrivals, format!("TIMESTAMP,ContextTokens,GeneratedTokens\n{times}")).unwrap();
    let base = ["replay", "--block-kib", "4", "--policy", "lru", "--dir", path(folder.path())];
    let sources = ["--trace", path(&events), "--arrivals", path(&arrivals)];
    let report = json(&cairn(&[&base[..], &sources, &["--capacity", "50%", "--json"]].concat()));
    let rows = table(&report, "agreement");
    assert_eq!(rows[0]["requests"], 30.0);
    assert_eq!(rows[0]["hit tokens"], 29.0 * 16.0);
    assert_eq!(rows[0]["hit tokens"], rows[1]["hit tokens"]);
    let made = ["--workload", "rag", "--requests", "50", "--capacity", "20%", "--report", path(&out)];
    let several = ["--workers", "3", "--speed", "100000", "--wire", "tls", "--nvme", "0"];
    let output = cairn(&[&base[..], &made, &several].concat());
    assert!(output.status.success() && text(&output).contains("tls"), "{}", text(&output));
    for file in ["report.html", "agreement.csv", "latency-distribution.svg", "agreement-tiers.svg"] {
        assert!(out.join(file).metadata().unwrap().len() > 50, "{file}");
    }
}

#[test]
fn wires_disks_and_peers_are_measured() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = [
        "--blocks",
        "64",
        "--batches",
        "2",
        "--clients",
        "1",
        "--seconds",
        "0.01",
        "--rounds",
        "1",
        "--json",
    ];
    let report = json(&cairn(&[&["transfer"], &tiny[..]].concat()));
    let rows = table(&report, "transfer");
    for what in ["memcpy", "raw tcp", "shm view", "shm get", "quic fetch", "tls put", "grpc get"] {
        let row = rows.iter().find(|row| row["what"] == what).unwrap_or_else(|| panic!("no {what}"));
        assert!(row["p50 us"].as_f64().unwrap() > 0.0, "{row:?}");
    }
    let disk = ["--disk-blocks", "64", "--depths", "2", "--disk-rounds", "1", "--megabytes", "4"];
    let report = json(&cairn(&[&["disk", "--json", "--dir", path(folder.path())], &disk[..]].concat()));
    assert!(table(&report, "disk")[0]["read GB/s"].as_f64().unwrap() > 0.0);
    assert_eq!(table(&report, "recovery").len(), 2);
    assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "nothing is left");
    // None is there: each is named, and ours are measured.
    let peers = ["compare", "--peers", "mooncake,foyer", "--peers-dir", path(folder.path())];
    let output = cairn(&[&peers, &tiny[..]].concat());
    let report = json(&output);
    assert!(text(&output).contains("peers setup mooncake") && text(&output).contains("peers setup foyer"));
    assert!(table(&report, "ratios").is_empty() && !table(&report, "transfer").is_empty());
}

#[test]
fn serving_is_measured_off_cold_and_warm() {
    let folder = tempfile::tempdir().unwrap();
    let (model, one, two) =
        (folder.path().join("model"), folder.path().join("one"), folder.path().join("two"));
    cairn_tests::write_checkpoint(&model, &cairn_tests::tiny_config());
    let traffic = ["serve", "--sessions", "2", "--turns", "2", "--words", "60", "--answer-tokens", "3"];
    let crossing =
        ["--crossover-words", "8,60", "--crossover-repeats", "1", "--links", "10", "--capacity-mib", "128"];
    let own = [&traffic[..], &crossing, &["--model", path(&model), "--report", path(&one)]].concat();
    let output = cairn(&own);
    assert!(output.status.success() && text(&output).contains("Answers identical: yes"), "{}", text(&output));
    let report = serde_json::from_slice(&std::fs::read(one.join("report.json")).unwrap()).unwrap();
    let rows = table(&report, "chat");
    let cached = |at: usize| rows[at]["cached %"].as_f64().unwrap();
    assert!(rows.len() == 3 && cached(0) == 0.0 && cached(2) > 50.0, "{rows:?}");
    for name in ["doc-qa", "agent-turns", "crossover-best-wire", "crossover-10-Mbit-s"] {
        assert!(!table(&report, name).is_empty(), "{name}");
    }
    // Any endpoint will do: here one of ours, asked like a stranger's.
    let mut worker = Command::new(env!("CARGO_BIN_EXE_cairn"))
        .args(["--log", "warn", "worker", "--listen", "127.0.0.1:0", "--model", path(&model), "--supervised"])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let announced = std::io::BufReader::new(worker.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut { announced }, &mut line).unwrap();
    let announced: serde_json::Value = serde_json::from_str(&line).unwrap();
    let url = format!("http://{}/v1", announced["address"].as_str().unwrap());
    let output =
        cairn(&[&traffic[..], &["--traffic", "doc-qa", "--url", &url, "--report", path(&two)]].concat());
    drop(worker.stdin.take());
    worker.wait().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let other = serde_json::from_slice(&std::fs::read(two.join("report.json")).unwrap()).unwrap();
    assert_eq!(table(&other, "doc-qa").len(), 2, "cold and warm");
    let same = cairn(&["diff", path(&one), path(&one)]);
    assert!(
        same.status.success() && text(&same).contains("measurements in both; 0 worse"),
        "{}",
        text(&same)
    );
}

#[test]
fn wrong_arguments_say_what_to_do() {
    for (arguments, expected) in [
        (&["hit-rate"][..], "--trace"),
        (&["hit-rate", "--trace", "/no/such/file"], "/no/such/file"),
        (&["hit-rate", "--workload", "weather"], "chat, rag, agent"),
        (&["hit-rate", "--workload", "chat", "--policies", "best"], "s3fifo"),
        (&["hit-rate", "--workload", "chat", "--capacity", "1GiB"], "--token-bytes"),
        (&["hit-rate", "--workload", "chat", "--capacity", "0%"], "share (5%)"),
        (&["hit-rate", "--workload", "chat", "--geometry", "32x8"], "32x8x128x2"),
        (&["hit-rate", "--workload", "chat", "--policies", "opt", "--nvme", "9%"], "another policy"),
        (&["diff", "/no/such/report", "/nor/this"], "/no/such/report"),
        (&["replay", "--workload", "chat", "--dir", "/no/such/folder"], "/no/such/folder"),
        (&["replay", "--workload", "chat", "--capacity", "1GiB"], "bytes"),
        (&["replay", "--workload", "chat", "--arrivals", "/no/such/times"], "/no/such/times"),
        (&["transfer", "--blocks", "63"], "even"),
        (&["disk", "--dir", "/no/such/folder"], "/no/such/folder"),
        (&["compare", "--peers", "memcached"], "redis, mooncake"),
        (&["serve", "--url", "http://127.0.0.1:9"], "127.0.0.1:9"),
        (&["serve", "--traffic", "video"], "doc-qa"),
    ] {
        let output = cairn(arguments);
        assert!(
            !output.status.success() && text(&output).contains(expected),
            "{arguments:?}: {}",
            text(&output)
        );
    }
}
