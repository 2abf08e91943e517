//! The command as people use it, as real processes: the demo, three terminals, wrong arguments, and servers killed without
//! warning.

#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

fn cairn() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cairn"));
    command.env_remove("CAIRN_CACHE").env_remove("CAIRN_MODEL").args(["--log", "warn"]);
    command
}

/// A process that ends with the test.
struct Running {
    child: Child,
    address: String,
}

impl Running {
    fn start(arguments: &[&str]) -> Self {
        let mut child = cairn()
            .args(arguments)
            .arg("--supervised")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the command starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
        let announced: Value =
            serde_json::from_str(&line).unwrap_or_else(|_| panic!("no address in {line:?}"));
        Self { child, address: announced["address"].as_str().expect("an address").to_owned() }
    }

    fn server() -> Self {
        Self::start(&[
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--http-listen",
            "127.0.0.1:0",
            "--capacity-mib",
            "128",
        ])
    }

    fn worker(model: &Path, more: &[&str]) -> Self {
        let model = model.to_str().expect("a path");
        Self::start(
            &[&["worker", "--listen", "127.0.0.1:0", "--model", model, "--pool-tokens", "4096"][..], more]
                .concat(),
        )
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// SIGKILL: no farewell.
    fn kill(mut self) {
        self.child.kill().expect("killed");
        self.child.wait().expect("ended");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Already ended is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn checkpoint() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    cairn_tests::write_checkpoint(folder.path(), &cairn_tests::tiny_config());
    folder
}

async fn ask(worker: &Running, length: u32, seed: u32, cache: bool) -> (Vec<u64>, u64) {
    let prompt: Vec<u32> = (0..length).map(|i| (i * i * 17 + i * 5 + seed * 29) % 256).collect();
    let body = json!({"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": true,
        "return_token_ids": true, "cairn_cache": cache});
    let url = format!("{}/v1/completions", worker.url());
    let response = reqwest::Client::new().post(url).json(&body).send().await.expect("an answer");
    let body: Value = response.json().await.expect("JSON");
    let ids = body["choices"][0]["token_ids"].as_array().unwrap_or_else(|| panic!("{body}"));
    let cached = body["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().expect("usage");
    (ids.iter().map(|id| id.as_u64().expect("an id")).collect(), cached)
}

fn text(output: &Output) -> (String, String) {
    (String::from_utf8_lossy(&output.stdout).into(), String::from_utf8_lossy(&output.stderr).into())
}

fn alive(id: &str) -> bool {
    Path::new("/proc").join(id).exists()
}

#[test]
fn the_demo_ends_with_its_table_and_leaves_nothing_running() {
    let folder = checkpoint();
    let model = folder.path().to_str().expect("a path");
    let arguments =
        ["demo", "--model", model, "--shared-lines", "20", "--requests", "2", "--max-tokens", "8"];
    let output = cairn().args(arguments).arg("--json").output().expect("it runs");
    let (stdout, stderr) = text(&output);
    assert!(output.status.success(), "{stderr}");
    let report: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!(report["tokens_identical"], true);
    assert_eq!(report["requests"].as_array().expect("rows").len(), 2);
    for row in report["requests"].as_array().expect("rows") {
        let (prompt, cached) =
            (row["prompt_tokens"].as_u64().unwrap(), row["cached_tokens"].as_u64().unwrap());
        assert!(cached * 10 > prompt * 7 && cached < prompt, "{row}");
        assert!(row["loaded_bytes"].as_u64().unwrap() > 0);
    }
    let output = cairn().args(arguments).output().expect("it runs");
    let (stdout, stderr) = text(&output);
    assert!(output.status.success(), "{stderr}");
    assert!(stdout.contains("tokens identical") && stdout.contains("hit rate by tier: host"), "{stdout}");
    let ids = stdout.lines().filter_map(|line| line.split("(process ").nth(1)?.strip_suffix(')'));
    let ids: Vec<&str> = ids.collect();
    assert_eq!(ids.len(), 3);
    assert!(ids.iter().all(|id| !alive(id)), "processes are left");
}

#[test]
fn an_interrupted_demo_leaves_nothing_running() {
    let folder = checkpoint();
    let model = folder.path().to_str().expect("a path");
    for signal in ["-INT", "-KILL"] {
        let mut demo = cairn()
            .args([
                "demo",
                "--model",
                model,
                "--shared-lines",
                "60",
                "--requests",
                "64",
                "--max-tokens",
                "64",
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");
        let lines = BufReader::new(demo.stdout.take().expect("a pipe")).lines();
        let process = |line: std::io::Result<String>| {
            let line = line.ok()?;
            Some(line.split("(process ").nth(1)?.strip_suffix(')')?.to_owned())
        };
        let ids: Vec<String> = lines.filter_map(process).take(3).collect();
        assert_eq!(ids.len(), 3);
        Command::new("kill").args([signal, &demo.id().to_string()]).status().expect("kill runs");
        let status = demo.wait().expect("it ends");
        assert!(signal == "-KILL" || status.code() == Some(130), "{status}");
        let deadline = Instant::now() + Duration::from_secs(10);
        while ids.iter().any(|id| alive(id)) {
            assert!(Instant::now() < deadline, "still running after {signal}: {ids:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn three_terminals_share_state_and_a_killed_server_costs_only_speed() {
    let folder = checkpoint();
    let server = Running::server();
    let first = Running::worker(folder.path(), &["--cache", &server.url()]);
    let second = Running::worker(folder.path(), &["--cache", &server.url(), "--no-local-reuse"]);
    let (expected, _) = ask(&first, 500, 1, false).await;
    let (cold, cached) = ask(&first, 500, 1, true).await;
    assert_eq!((&cold, cached), (&expected, 0));
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let (warm, cached) = ask(&second, 500, 1, true).await;
        assert_eq!(warm, expected);
        if cached == 496 {
            break;
        }
        assert!(Instant::now() < deadline, "{cached} cached tokens");
    }
    let stats = cairn().args(["stats", "--json", "--cache", &server.url()]).output().expect("it runs");
    let stats: Value = serde_json::from_str(&text(&stats).0).expect("JSON");
    assert!(stats["tiers"][0]["hit_blocks"].as_u64().unwrap() >= 31);

    // Killed while requests publish and fetch.
    let questions = (2..10).map(|seed| ask(&first, 900, seed, true));
    let more = (2..10).map(|seed| ask(&second, 900, seed, true));
    let killer = async {
        tokio::time::sleep(Duration::from_millis(30)).await;
        server.kill();
    };
    let (answers, others, ()) =
        tokio::join!(futures::future::join_all(questions), futures::future::join_all(more), killer);
    for (seed, (answer, other)) in (2..10).zip(answers.iter().zip(&others)) {
        let (expected, _) = ask(&first, 900, seed, false).await;
        assert_eq!((&answer.0, &other.0), (&expected, &expected));
    }
    let (without, cached) = ask(&second, 500, 1, true).await;
    assert_eq!((without, cached), (expected, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_prefill_worker_costs_only_speed() {
    let folder = checkpoint();
    let server = Running::server();
    let prefill = Running::worker(folder.path(), &["--cache", &server.url(), "--role", "prefill"]);
    let peer = prefill.url();
    let decode =
        Running::worker(folder.path(), &["--cache", &server.url(), "--role", "decode", "--prefill", &peer]);
    let (expected, _) = ask(&decode, 600, 1, false).await;
    let (split, cached) = ask(&decode, 600, 1, true).await;
    assert_eq!((&split, cached), (&expected, 592));
    let questions = (2..6).map(|seed| ask(&decode, 1500, seed, true));
    let killer = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        prefill.kill();
    };
    let (answers, ()) = tokio::join!(futures::future::join_all(questions), killer);
    for (seed, answer) in (2..6).zip(answers) {
        assert_eq!(answer.0, ask(&decode, 1500, seed, false).await.0);
    }
}

#[test]
fn lookups_and_explanations_are_for_people_and_machines() {
    let folder = checkpoint();
    let server = Running::server();
    let model = folder.path().to_str().expect("a path");
    let cache = server.url();
    let prompt = "a prompt of more than sixteen bytes";
    let arguments = ["--cache", &cache, "--model", model, "--prompt", prompt];
    let output = cairn().arg("lookup").args(arguments).output().expect("it runs");
    assert!(text(&output).0.starts_with("35 tokens, 2 full blocks of 16; 0 resident"), "{output:?}");
    let output = cairn().arg("lookup").args(arguments).arg("--json").output().expect("it runs");
    let body: Value = serde_json::from_str(&text(&output).0).expect("JSON");
    assert_eq!(body["outcomes"][0]["outcome"], "miss:never_stored");
    let output = cairn().arg("explain").args(arguments).output().expect("it runs");
    assert!(text(&output).0.contains("absent:never_stored"), "{output:?}");
    let output = cairn().args(["stats", "--cache", &cache]).output().expect("it runs");
    assert!(text(&output).0.contains("blocks asked for: 4"), "{output:?}");
}

#[test]
fn mistakes_get_a_clear_message_and_a_failure() {
    let server = Running::server();
    let taken = server.address.clone();
    let cases: [(&[&str], &str); 9] = [
        (&["serve", "--listen", &taken, "--http-listen", "127.0.0.1:0"], "--listen"),
        (&["serve", "--listen", "0.0.0.0:0"], "allow_insecure_network"),
        (&["serve", "--config", "/nonexistent.toml"], "/nonexistent.toml"),
        (&["serve", "--policy", "magic", "--listen", "127.0.0.1:0"], "known: cairn, lru, fifo"),
        (&["worker", "--model", "/nonexistent.gguf", "--listen", "127.0.0.1:0"], "/nonexistent.gguf"),
        (&["worker", "--model", "synthetic:x"], "synthetic:SEED"),
        (&["worker", "--model", "synthetic:1", "--listen", "0.0.0.0:0"], "loopback"),
        (&["stats", "--cache", "http://127.0.0.1:9"], "cannot be reached"),
        (&["stats", "--cache", "not a url"], "http://host:port"),
    ];
    for (arguments, expected) in cases {
        let output = cairn().args(arguments).stdin(Stdio::null()).output().expect("it runs");
        let (_, stderr) = text(&output);
        assert!(!output.status.success(), "{arguments:?} must fail");
        assert!(stderr.contains(expected), "{arguments:?} says {stderr:?}, not {expected:?}");
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
    let pull = ["model", "pull", "--python", "/nonexistent/python", "--model-cache"];
    let folder = tempfile::tempdir().expect("a folder");
    let output = cairn().args(pull).arg(folder.path()).output().expect("it runs");
    assert!(text(&output).1.contains("cannot run /nonexistent/python"));
    let output = cairn().args(["completions", "bash"]).output().expect("it runs");
    assert!(text(&output).0.contains("_cairn"));
}
