//! Redis or Valkey, read by a bare client: one MGET for a batch.

use super::Server;
use crate::{BenchError, OrFail};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// Longest start of a server.
const START: Duration = Duration::from_secs(10);

/// One connection.
pub(crate) struct Redis {
    socket: BufReader<TcpStream>,
}

/// Starts a server on a free port of loopback, without persistence.
pub(super) async fn serve(program: &Path, libraries: Option<&Path>) -> Result<(Server, u16), BenchError> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").or_fail("a free port")?;
    let port = listener.local_addr().or_fail("a free port")?.port();
    drop(listener);
    let mut command = Command::new(program);
    command.args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--port", &port.to_string()]);
    if let Some(libraries) = libraries {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    let server = Server::start(command, program)?;
    let started = Instant::now();
    while TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        if started.elapsed() > START {
            return Err(BenchError(format!("{} does not listen", program.display())));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok((server, port))
}

impl Redis {
    /// Connects, and stores a batch of values.
    pub(crate) async fn connect(port: u16, bytes: usize, batch: usize) -> Result<Self, BenchError> {
        let socket = TcpStream::connect(("127.0.0.1", port)).await.or_fail("a Redis or Valkey server")?;
        socket.set_nodelay(true).or_fail("a Redis or Valkey server")?;
        let mut redis = Self { socket: BufReader::new(socket) };
        for i in 0..batch {
            redis.set(&format!("block{i}"), &vec![7u8; bytes]).await?;
        }
        Ok(redis)
    }

    async fn set(&mut self, key: &str, value: &[u8]) -> Result<(), BenchError> {
        let head = format!("*3\r\n$3\r\nSET\r\n${}\r\n{key}\r\n${}\r\n", key.len(), value.len());
        for part in [head.as_bytes(), value, b"\r\n"] {
            self.socket.write_all(part).await.or_fail("asking Redis")?;
        }
        self.expect("+OK").await
    }

    async fn line(&mut self) -> Result<String, BenchError> {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            line.push(self.socket.read_u8().await.or_fail("an answer of Redis")?);
        }
        Ok(String::from_utf8_lossy(&line[..line.len() - 2]).into_owned())
    }

    async fn expect(&mut self, expected: &str) -> Result<(), BenchError> {
        let line = self.line().await?;
        if line == expected {
            return Ok(());
        }
        Err(BenchError(format!("Redis answered {line:?}, not {expected:?}")))
    }

    /// One MGET of as many values as there are targets.
    pub(crate) async fn get(&mut self, targets: &mut [Vec<u8>]) -> Result<(), BenchError> {
        let mut request = format!("*{}\r\n$4\r\nMGET\r\n", targets.len() + 1);
        for i in 0..targets.len() {
            let key = format!("block{i}");
            request.push_str(&format!("${}\r\n{key}\r\n", key.len()));
        }
        self.socket.write_all(request.as_bytes()).await.or_fail("asking Redis")?;
        self.expect(&format!("*{}", targets.len())).await?;
        for target in targets {
            self.expect(&format!("${}", target.len())).await?;
            self.socket.read_exact(target).await.or_fail("an answer of Redis")?;
            self.line().await?;
        }
        Ok(())
    }
}
