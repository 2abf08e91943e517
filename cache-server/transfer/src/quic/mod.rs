//! QUIC. A request has a bidirectional stream of its own, and whole blocks come back on it: that is as fast as the connection. If ranges
//! (layers) are asked for, they come on several unidirectional streams (lanes), each block on one of them, the first range of every
//! block before the second of any: so a lost packet holds up one lane, and a consumer can use the first layer early.
//!
//! 0-RTT is off: a replayed request could take a lease or fill a reservation.

mod client;
mod server;

pub use client::QuicWire;
pub use server::QuicServer;

use quinn::congestion::{BbrConfig, CubicConfig, NewRenoConfig};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tonic::Status;

/// Largest UDP payload. With segmentation offload ten packets leave in one call, and a call takes at most 65,507 bytes: with larger packets
/// quinn 0.11 stalls for ever.
pub const MAX_MTU: u16 = 6500;

/// Every path must carry this (RFC 9000, section 14).
pub const MIN_MTU: u16 = 1200;

/// Requests of one connection at a time.
const MAX_REQUESTS: u32 = 64;

/// Lanes of one connection at a time.
const MAX_LANES: u32 = 256;

/// Socket buffers: bursts of packets fit, so that few are lost on a busy machine.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Whoever is silent for this long is gone; asked after each interval.
const IDLE_TIMEOUT_MS: u32 = 15_000;
const KEEPALIVE: Duration = Duration::from_secs(4);

/// How a QUIC connection behaves.
#[derive(Clone, Copy, Debug)]
pub struct QuicOptions {
    /// UDP payload to start with. The path must carry it: 1200 always works, [`MAX_MTU`] wants loopback or jumbo frames.
    pub initial_mtu: u16,
    /// Largest UDP payload that is probed for, at most [`MAX_MTU`].
    pub max_mtu: u16,
    /// Bytes on their way in one stream, and in all together.
    pub window_bytes: u32,
    /// Who decides how fast to send.
    pub congestion: Congestion,
    /// Streams for the pieces of one fetch.
    pub lanes: u32,
}

/// Congestion controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Congestion {
    /// RFC 9438: the default.
    Cubic,
    /// RFC 6582.
    NewReno,
    /// For long paths with loss that is not congestion.
    Bbr,
}

impl std::str::FromStr for Congestion {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "cubic" => Ok(Self::Cubic),
            "newreno" => Ok(Self::NewReno),
            "bbr" => Ok(Self::Bbr),
            other => Err(format!("{other:?} is no congestion controller; known: cubic, newreno, bbr")),
        }
    }
}

impl Default for QuicOptions {
    fn default() -> Self {
        Self {
            initial_mtu: MIN_MTU,
            max_mtu: MAX_MTU,
            window_bytes: 8 << 20,
            congestion: Congestion::Cubic,
            lanes: 4,
        }
    }
}

impl QuicOptions {
    fn transport(&self) -> quinn::TransportConfig {
        let mut transport = quinn::TransportConfig::default();
        let mut discovery = quinn::MtuDiscoveryConfig::default();
        let max_mtu = self.max_mtu.clamp(MIN_MTU, MAX_MTU);
        discovery.upper_bound(max_mtu);
        transport
            .initial_mtu(self.initial_mtu.clamp(MIN_MTU, max_mtu))
            .mtu_discovery_config(Some(discovery))
            .stream_receive_window(self.window_bytes.into())
            .receive_window(self.window_bytes.saturating_mul(2).into())
            .send_window(u64::from(self.window_bytes) * 2)
            .max_concurrent_bidi_streams(MAX_REQUESTS.into())
            .max_concurrent_uni_streams(MAX_LANES.into())
            .keep_alive_interval(Some(KEEPALIVE))
            .max_idle_timeout(Some(quinn::VarInt::from_u32(IDLE_TIMEOUT_MS).into()));
        match self.congestion {
            Congestion::Cubic => transport.congestion_controller_factory(Arc::new(CubicConfig::default())),
            Congestion::NewReno => {
                transport.congestion_controller_factory(Arc::new(NewRenoConfig::default()))
            }
            Congestion::Bbr => transport.congestion_controller_factory(Arc::new(BbrConfig::default())),
        };
        transport
    }
}

fn endpoint_config() -> quinn::EndpointConfig {
    let mut config = quinn::EndpointConfig::default();
    // Refused only below 1200.
    let _ = config.max_udp_payload_size(MAX_MTU);
    config
}

fn socket(address: SocketAddr) -> std::io::Result<std::net::UdpSocket> {
    let socket = std::net::UdpSocket::bind(address)?;
    // The system may allow less: that is fine.
    let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER_BYTES);
    let _ = rustix::net::sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER_BYTES);
    Ok(socket)
}

/// Of each piece on a lane: block (u32), length (u32), offset (u64).
const LANE_HEAD_BYTES: usize = 16;

fn broken(error: impl std::fmt::Display) -> Status {
    Status::unavailable(format!("the QUIC connection broke: {error}"))
}
