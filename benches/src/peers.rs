//! Other stores, where they are installed: asked in the same run, with the same sizes.

use std::process::{Command, Stdio};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// A bare client of Redis or Valkey, at a port of loopback.
pub struct Redis {
    socket: BufReader<TcpStream>,
}

impl Redis {
    /// Connects, and stores a batch of values.
    ///
    /// # Panics
    /// When there is no such server.
    pub async fn connect(port: u16, bytes: usize, batch: usize) -> Self {
        let socket = TcpStream::connect(("127.0.0.1", port)).await.expect("a Redis or Valkey server");
        socket.set_nodelay(true).expect("an option");
        let mut redis = Self { socket: BufReader::new(socket) };
        let value = vec![7u8; bytes];
        for i in 0..batch {
            let key = format!("block{i}");
            let head = format!("*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${bytes}\r\n", key.len());
            redis.socket.write_all(head.as_bytes()).await.expect("sent");
            redis.socket.write_all(&value).await.expect("sent");
            redis.socket.write_all(b"\r\n").await.expect("sent");
            assert_eq!(redis.line().await, "+OK");
        }
        redis
    }

    async fn line(&mut self) -> String {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            line.push(self.socket.read_u8().await.expect("an answer"));
        }
        String::from_utf8_lossy(&line[..line.len() - 2]).into_owned()
    }

    /// One MGET of as many values as there are targets.
    ///
    /// # Panics
    /// When the answer is not the values.
    pub async fn get(&mut self, targets: &mut [Vec<u8>]) {
        let mut request = format!("*{}\r\n$4\r\nMGET\r\n", targets.len() + 1);
        for i in 0..targets.len() {
            let key = format!("block{i}");
            request.push_str(&format!("${}\r\n{key}\r\n", key.len()));
        }
        self.socket.write_all(request.as_bytes()).await.expect("sent");
        assert_eq!(self.line().await, format!("*{}", targets.len()));
        for target in targets {
            assert_eq!(self.line().await, format!("${}", target.len()));
            self.socket.read_exact(target).await.expect("a value");
            self.line().await;
        }
    }
}

/// Mooncake Store, through the Python package `mooncake-transfer-engine-non-cuda`.
pub struct Mooncake;

impl Mooncake {
    /// Runs `benches/contenders/mooncake_store.py` with this Python: name, GB/s, p50 and p99 in µs of each mode.
    ///
    /// # Panics
    /// When the script fails.
    pub fn run(
        python: &str,
        bytes: usize,
        batch: usize,
        clients: usize,
        seconds: f64,
    ) -> Vec<(String, f64, f64, f64)> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/contenders/mooncake_store.py");
        let numbers = [bytes.to_string(), batch.to_string(), clients.to_string(), seconds.to_string()];
        let output =
            Command::new(python).arg(script).args(numbers).stderr(Stdio::inherit()).output().expect("Python");
        let text = String::from_utf8_lossy(&output.stdout);
        let lines = text.lines().filter_map(|line| line.strip_prefix("RESULT "));
        lines
            .map(|line| {
                let parts: Vec<&str> = line.split('\t').collect();
                let number = |i: usize| parts[i].parse::<f64>().expect("a number");
                (parts[0].to_owned(), number(1), number(2), number(3))
            })
            .collect()
    }
}
