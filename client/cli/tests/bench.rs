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
    ] {
        let output = cairn(arguments);
        assert!(
            !output.status.success() && text(&output).contains(expected),
            "{arguments:?}: {}",
            text(&output)
        );
    }
}
