//! Which wire to take: a table, without state or clock of its own. Same host: shared memory. Verbs at both ends: RDMA. Else QUIC where
//! packets are large, TLS over TCP where they are small. Else the API. What failed is left alone for a while and then tried again.

use crate::wire::WireKind;
use std::time::Duration;

/// How long a wire is left alone after its first failure; doubled with each further one.
pub const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// Longest time that a wire is left alone.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// From this TCP segment size on, packets are large enough for QUIC.
pub const LARGE_SEGMENT_BYTES: u32 = 6000;

/// What is known of one wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub kind: WireKind,
    /// Both ends have it.
    pub connected: bool,
    /// Failures in a row, and the time since the last.
    pub failures: u32,
    /// Since the last failure.
    pub since_failure: Duration,
}

impl Candidate {
    /// Whether it may be used: there, and not failed too recently.
    pub fn is_usable(&self) -> bool {
        self.connected && (self.failures == 0 || self.since_failure >= pause(self.failures))
    }
}

/// How long a wire is left alone after this many failures in a row.
pub fn pause(failures: u32) -> Duration {
    LONGEST_PAUSE.min(FIRST_PAUSE * 2u32.saturating_pow(failures.saturating_sub(1).min(16)))
}

/// What the way to the server is like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// Payload of a TCP segment, if known.
    pub segment_bytes: Option<u32>,
}

/// The order in which to try wires, best first. The API is always last and always there.
pub fn order(candidates: &[Candidate], path: Path, forced: Option<WireKind>) -> Vec<WireKind> {
    if let Some(kind) = forced {
        return vec![kind];
    }
    let large = path.segment_bytes.is_some_and(|bytes| bytes >= LARGE_SEGMENT_BYTES);
    let rank = |kind: WireKind| match kind {
        WireKind::Mem => 0,
        WireKind::Shm => 1,
        WireKind::Rdma => 2,
        WireKind::Quic if large => 3,
        WireKind::Tls => 4,
        WireKind::Quic => 5,
        WireKind::Grpc => 6,
    };
    let mut usable: Vec<WireKind> =
        candidates.iter().filter(|candidate| candidate.is_usable()).map(|candidate| candidate.kind).collect();
    usable.sort_by_key(|kind| rank(*kind));
    if !usable.contains(&WireKind::Grpc) {
        usable.push(WireKind::Grpc);
    }
    usable
}

#[cfg(test)]
mod tests {
    use super::*;
    use WireKind::{Grpc, Quic, Rdma, Shm, Tls};

    fn there(kind: WireKind) -> Candidate {
        Candidate { kind, connected: true, failures: 0, since_failure: Duration::ZERO }
    }

    fn failed(kind: WireKind, failures: u32, ago_ms: u64) -> Candidate {
        Candidate { failures, since_failure: Duration::from_millis(ago_ms), ..there(kind) }
    }

    /// What both ends have, the path's segment size, and the order that follows.
    #[test]
    fn the_table() {
        let absent = |kind| Candidate { connected: false, ..there(kind) };
        let cases: [(&str, Vec<Candidate>, u32, &[WireKind]); 8] = [
            (
                "one host",
                vec![there(Grpc), there(Shm), there(Quic), there(Tls)],
                65_483,
                &[Shm, Quic, Tls, Grpc],
            ),
            ("verbs at both ends", vec![there(Quic), there(Rdma), there(Grpc)], 8948, &[Rdma, Quic, Grpc]),
            ("large packets", vec![there(Tls), there(Quic), there(Grpc)], 8948, &[Quic, Tls, Grpc]),
            ("small packets", vec![there(Tls), there(Quic), there(Grpc)], 1448, &[Tls, Quic, Grpc]),
            ("small packets, UDP only", vec![absent(Tls), there(Quic), there(Grpc)], 1448, &[Quic, Grpc]),
            ("nothing but the API", vec![absent(Shm), absent(Tls)], 1448, &[Grpc]),
            ("just failed", vec![failed(Shm, 1, 999), there(Tls), there(Grpc)], 1448, &[Tls, Grpc]),
            ("tried again", vec![failed(Shm, 1, 1000), there(Tls), there(Grpc)], 1448, &[Shm, Tls, Grpc]),
        ];
        for (name, candidates, segment, expected) in cases {
            let path = Path { segment_bytes: Some(segment) };
            assert_eq!(order(&candidates, path, None), expected, "{name}");
        }
        let unknown = order(&[there(Tls), there(Quic)], Path::default(), None);
        assert_eq!(unknown, [Tls, Quic, Grpc], "an unknown path is taken for a small one");
        let forced = order(&[there(Shm)], Path::default(), Some(Quic));
        assert_eq!(forced, [Quic], "what is forced is never replaced");
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        assert_eq!([1, 2, 3, 7, 100].map(|n| pause(n).as_secs()), [1, 2, 4, 60, 60]);
    }
}
