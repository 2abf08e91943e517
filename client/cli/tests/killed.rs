//! A server that is killed in the middle of transfers over each wire, and started again: verified bytes or counted misses within
//! the deadline, and everything works again afterwards.

#![allow(clippy::unwrap_used)]

use cairn_client::{CacheClient, ClientOptions, Security, WireKind};
use cairn_proto::{MissReason, Outcome};
use cairn_tests::*;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn serve(listen: &str, config: &Path) -> (Child, String) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_cairn"))
        .args(["--log", "error", "serve", "--supervised", "--listen", listen, "--http-listen", "127.0.0.1:0"])
        .args(["--capacity-mib", "128", "--config", config.to_str().unwrap()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let announced: serde_json::Value = serde_json::from_str(&line).unwrap();
    (child, announced["address"].as_str().unwrap().to_owned())
}

fn kill(mut server: Child) {
    server.kill().unwrap();
    server.wait().unwrap();
}

const FETCH_TIMEOUT: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_server_costs_counted_misses_on_every_wire() {
    let folder = tempfile::tempdir().unwrap();
    let certs = cairn_tests::wires::certs(folder.path());
    let config = folder.path().join("cairn.toml");
    let text = format!(
        "[tls]\ncert_file = {:?}\nkey_file = {:?}\n[wires]\ndata_listen = \"127.0.0.1:0\"\n",
        certs.server.0, certs.server.1
    );
    std::fs::write(&config, text).unwrap();
    for wire in [WireKind::Shm, WireKind::Tls, WireKind::Quic, WireKind::Grpc] {
        let (server, address) = serve("127.0.0.1:0", &config);
        let mut options = ClientOptions::new(format!("https://{address}"));
        options.security = Security { ca_file: Some(certs.ca.clone()), ..Security::default() };
        options.wire = Some(wire);
        options.fetch_timeout = FETCH_TIMEOUT;
        let client = CacheClient::start(options).unwrap();
        let space = space("t");
        let chain = hashes(&space, 1, 60);
        let offered = blocks(&space, &chain);
        let stored = client.publish(&space, None, &offered).await;
        assert!(stored.iter().all(|stored| stored.is_stored()), "{wire}: {stored:?}");
        assert_eq!(fetch_verified(&client, &space, &chain).await, 60, "{wire}");
        let run = client.lookup(&space, &chain).await.run.unwrap();
        let view = client.fetch_view(&run, 0, 4).await;
        // Fetches and publishes go on while the server dies.
        let killer = tokio::task::spawn_blocking(move || {
            std::thread::sleep(Duration::from_millis(150));
            kill(server);
        });
        let mut missed = 0;
        for seed in 2.. {
            let started = Instant::now();
            let mut targets = vec![vec![0; space.block_bytes() as usize]; run.len()];
            let fetched = client.fetch(&run, 0, &mut targets).await;
            assert!(started.elapsed() < FETCH_TIMEOUT + Duration::from_secs(2), "{wire}");
            for ((outcome, target), hash) in fetched.iter().zip(&targets).zip(&chain) {
                match outcome {
                    Outcome::Hit(_) => assert!(*target == payload(&space, hash), "{wire}: wrong bytes"),
                    Outcome::Miss(MissReason::PeerDown | MissReason::LeaseLost | MissReason::Deadline) => {
                        missed += 1;
                    }
                    other => panic!("{wire}: {other:?}"),
                }
            }
            client.publish(&space, None, &blocks(&space, &hashes(&space, seed, 4))).await;
            if missed > 0 && killer.is_finished() {
                break;
            }
        }
        killer.await.unwrap();
        // What was mapped stays as it was.
        assert_eq!(view.wire() == Some(WireKind::Shm), wire == WireKind::Shm);
        if wire == WireKind::Shm {
            for (i, hash) in chain.iter().enumerate().take(4) {
                assert!(*view.block(i).unwrap() == payload(&space, hash));
            }
        }
        let (server, _) = serve(&address, &config);
        eventually("the client is back", || client.is_connected()).await;
        let mut targets = vec![vec![0; space.block_bytes() as usize]; run.len()];
        let old = client.fetch(&run, 0, &mut targets).await;
        assert!(
            old.iter().all(|outcome| *outcome == Outcome::Miss(MissReason::LeaseLost)),
            "{wire}: {old:?}"
        );
        client.publish(&space, None, &offered).await;
        assert_eq!(fetch_verified(&client, &space, &chain).await, 60, "{wire}: as before");
        drop((view, run, client));
        kill(server);
    }
}
