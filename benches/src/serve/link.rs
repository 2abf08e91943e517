//! A slow network on one machine: a TCP relay that lets only so many bytes a second through.

use crate::{BenchError, OrFail};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// Bytes that go through at once.
const PIECE: usize = 16 << 10;

/// Idle time does not count as credit beyond this.
const BURST: Duration = Duration::from_millis(2);

/// A relay; it ends when dropped.
pub struct Link {
    address: SocketAddr,
    task: AbortHandle,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Link {
    /// Between its own address and the target, so many megabits a second each way and connection.
    ///
    /// # Errors
    /// When loopback cannot be listened on.
    pub async fn start(target: SocketAddr, megabits: u32) -> Result<Self, BenchError> {
        let listener = TcpListener::bind("127.0.0.1:0").await.or_fail("a free port")?;
        let address = listener.local_addr().or_fail("a free port")?;
        let byte = Duration::from_secs_f64(8e-6 / f64::from(megabits));
        let task = tokio::spawn(async move {
            let mut relays = tokio::task::JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                while relays.try_join_next().is_some() {}
                relays.spawn(async move {
                    let Ok(far) = TcpStream::connect(target).await else { return };
                    let _ = (near.set_nodelay(true), far.set_nodelay(true));
                    let (near_read, near_write) = near.into_split();
                    let (far_read, far_write) = far.into_split();
                    // One way ends with the other.
                    tokio::select! {
                        () = relay(near_read, far_write, byte) => {}
                        () = relay(far_read, near_write, byte) => {}
                    }
                });
            }
        });
        Ok(Self { address, task: task.abort_handle() })
    }

    /// Where to connect to instead of the target.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn relay(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, byte: Duration) {
    let mut piece = vec![0; PIECE];
    let mut free = Instant::now();
    while let Ok(count) = from.read(&mut piece).await {
        if count == 0 {
            return;
        }
        free = free.max(Instant::now() - BURST) + byte * count as u32;
        tokio::time::sleep_until(free).await;
        if to.write_all(&piece[..count]).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn bytes_come_whole_and_not_faster() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let link = Link::start(listener.local_addr().unwrap(), 80).await.unwrap();
        let sent: Vec<u8> = (0..1_000_000u32).map(|i| (i % 251) as u8).collect();
        let expected = sent.clone();
        let server = tokio::spawn(async move {
            let (mut socket, _) = listener.accept().await.unwrap();
            socket.write_all(&sent).await.unwrap();
        });
        let started = Instant::now();
        let mut socket = TcpStream::connect(link.address()).await.unwrap();
        let mut received = Vec::new();
        socket.read_to_end(&mut received).await.unwrap();
        server.await.unwrap();
        assert!(received == expected);
        // A lower bound only: a loaded machine may take any time longer.
        assert!(started.elapsed() >= Duration::from_millis(95), "1 MB at 80 Mbit/s");
    }
}
