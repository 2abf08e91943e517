//! The ways to one server, for one session: which are there, how they fare, and which to take now. Requests never connect; a
//! task in the background does, and tries again what failed.

use crate::fetch::{Fault, fault, patience};
use crate::options::{ClientOptions, Tls};
use cairn_proto::pb;
#[cfg(feature = "rdma")]
use cairn_transfer::RdmaWire;
use cairn_transfer::choose::{self, Candidate, Path, pause};
use cairn_transfer::store::SessionKey;
use cairn_transfer::{Api, GrpcWire, HAS_RDMA, QuicWire, ShmWire, TlsWire, Wire, WireKind};
use rustls::pki_types::ServerName;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use tonic::Status;

/// Longest pause of the task that connects, if nobody wakes it.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// One way, as it is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireReport {
    /// Which.
    pub kind: WireKind,
    /// Whether it is connected.
    pub connected: bool,
    /// Failures in a row.
    pub failures: u32,
    /// Fetches and publishes that went over it.
    pub transfers: u64,
    /// Block bytes that it carried.
    pub bytes: u64,
}

struct Slot {
    kind: WireKind,
    address: String,
    wire: Option<Arc<dyn Wire>>,
    failures: u32,
    failed_at: Option<Instant>,
    transfers: u64,
    bytes: u64,
}

#[derive(Default)]
struct State {
    slots: Vec<Slot>,
    path: Path,
}

pub(crate) struct Wires {
    state: Mutex<State>,
    /// Views need more than the trait.
    shm: Mutex<Option<Arc<ShmWire>>>,
    forced: Option<WireKind>,
    wake: Notify,
    unheard: Unheard,
}

/// Bytes that were read in the server's memory and that it has not heard of.
#[derive(Default)]
struct Unheard {
    shm: AtomicU64,
    rdma: AtomicU64,
}

/// What connecting takes.
pub(crate) struct Reach {
    pub(crate) host: String,
    pub(crate) tls: Option<Tls>,
    pub(crate) session: u64,
    pub(crate) key: SessionKey,
}

impl Wires {
    /// The API, and the server's offers.
    pub(crate) fn new(api: Api, offers: &[pb::WireOffer], forced: Option<WireKind>) -> Arc<Self> {
        let slot = |kind, address: &str, wire| Slot {
            kind,
            address: address.to_owned(),
            wire,
            failures: 0,
            failed_at: None,
            transfers: 0,
            bytes: 0,
        };
        let grpc: Arc<dyn Wire> = Arc::new(GrpcWire::new(api));
        let mut slots = vec![slot(WireKind::Grpc, "", Some(grpc))];
        for offer in offers {
            // A newer server may offer what this build does not know.
            match offer.wire.parse() {
                Ok(kind @ (WireKind::Shm | WireKind::Tls | WireKind::Quic)) => {
                    slots.push(slot(kind, &offer.address, None));
                }
                Ok(WireKind::Rdma) if HAS_RDMA => slots.push(slot(WireKind::Rdma, &offer.address, None)),
                _ => {}
            }
        }
        let state = Mutex::new(State { slots, path: Path::default() });
        Arc::new(Self {
            state,
            shm: Mutex::default(),
            forced,
            wake: Notify::new(),
            unheard: Unheard::default(),
        })
    }

    /// The wires to try now, best first.
    pub(crate) fn order(&self) -> Vec<Arc<dyn Wire>> {
        let state = self.state();
        let candidate = |slot: &Slot| Candidate {
            kind: slot.kind,
            connected: slot.wire.is_some(),
            failures: slot.failures,
            since_failure: slot.failed_at.map_or(Duration::ZERO, |at| at.elapsed()),
        };
        let candidates: Vec<Candidate> = state.slots.iter().map(candidate).collect();
        let order = choose::order(&candidates, state.path, self.forced);
        let wire = |kind: WireKind| state.slots.iter().find(|slot| slot.kind == kind)?.wire.clone();
        order.into_iter().filter_map(wire).collect()
    }

    /// Shared memory, if it is what would be taken now.
    pub(crate) fn shm(&self) -> Option<Arc<ShmWire>> {
        self.order().first().filter(|wire| wire.kind() == WireKind::Shm)?;
        self.shm.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A request went over a wire.
    pub(crate) fn worked(&self, kind: WireKind, bytes: u64) {
        if let Some(slot) = self.state().slots.iter_mut().find(|slot| slot.kind == kind) {
            slot.failures = 0;
            slot.failed_at = None;
            slot.transfers += 1;
            slot.bytes += bytes;
        }
    }

    /// A wire failed: it is left alone for a while, and then made anew, for its other connections are no better. (Views keep
    /// theirs.)
    pub(crate) fn failed(&self, kind: WireKind, status: &Status) {
        tracing::info!(wire = kind.name(), error = status.message(), "a wire failed; the next one is tried");
        if let Some(slot) = self.state().slots.iter_mut().find(|slot| slot.kind == kind) {
            slot.failures = slot.failures.saturating_add(1);
            slot.failed_at = Some(Instant::now());
            if kind != WireKind::Grpc {
                slot.wire = None;
            }
        }
        if kind == WireKind::Shm {
            *self.shm.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        self.wake.notify_one();
    }

    /// A question over a wire. `None` when the wire failed and another way should be taken.
    pub(crate) async fn ask<T>(
        &self,
        kind: WireKind,
        answer: impl Future<Output = Result<T, Status>>,
        deadline: Instant,
    ) -> Result<Option<T>, Status> {
        self.ask_until(kind, answer, patience(deadline, false)).await
    }

    /// As [`Self::ask`], until this very moment.
    pub(crate) async fn ask_until<T>(
        &self,
        kind: WireKind,
        answer: impl Future<Output = Result<T, Status>>,
        until: Instant,
    ) -> Result<Option<T>, Status> {
        let answer = tokio::time::timeout_at(until, answer).await;
        match answer.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time"))) {
            Ok(answer) => Ok(Some(answer)),
            Err(status) if fault(&status) == Fault::Wire => {
                self.failed(kind, &status);
                Ok(None)
            }
            Err(status) => Err(status),
        }
    }

    /// All ways, as they are now.
    pub(crate) fn report(&self) -> Vec<WireReport> {
        let report = |slot: &Slot| WireReport {
            kind: slot.kind,
            connected: slot.wire.is_some(),
            failures: slot.failures,
            transfers: slot.transfers,
            bytes: slot.bytes,
        };
        self.state().slots.iter().map(report).collect()
    }

    /// What must be there before the first request: shared memory, which takes no time, and what is forced.
    pub(crate) async fn connect_first(&self, reach: &Reach, options: &ClientOptions) {
        for kind in [Some(WireKind::Shm), options.wire] {
            if let Some(kind) = kind.filter(|kind| self.is_due(*kind)) {
                self.connect(kind, reach, options).await;
            }
        }
    }

    /// Connects what is worth it, and again what broke, for ever.
    pub(crate) async fn maintain(&self, reach: Reach, options: ClientOptions) {
        loop {
            // RDMA last: where its fabric swallows packets, nothing waits for it to find out.
            for kind in [WireKind::Shm, WireKind::Tls, WireKind::Quic, WireKind::Rdma] {
                if self.is_wanted(kind) && self.is_due(kind) {
                    self.connect(kind, &reach, &options).await;
                }
            }
            // Woken or not, it looks again.
            let _ = tokio::time::timeout(LOOK_AGAIN, self.wake.notified()).await;
        }
    }

    /// On one host the network is only for when shared memory fails; where there is RDMA, the rest only for when that fails; QUIC
    /// is for large packets.
    fn is_wanted(&self, kind: WireKind) -> bool {
        if let Some(forced) = self.forced {
            return forced == kind;
        }
        let state = self.state();
        let works = |kind: WireKind| {
            state.slots.iter().any(|slot| slot.kind == kind && slot.wire.is_some() && slot.failures == 0)
        };
        match kind {
            WireKind::Shm => true,
            WireKind::Rdma => !works(WireKind::Shm),
            WireKind::Tls => !works(WireKind::Shm) && !works(WireKind::Rdma),
            WireKind::Quic => {
                let large =
                    state.path.segment_bytes.is_some_and(|bytes| bytes >= choose::LARGE_SEGMENT_BYTES);
                !works(WireKind::Shm) && !works(WireKind::Rdma) && (large || !works(WireKind::Tls))
            }
            _ => false,
        }
    }

    /// Offered, not connected, and not failed too recently.
    fn is_due(&self, kind: WireKind) -> bool {
        let due = |slot: &Slot| {
            slot.kind == kind
                && slot.wire.is_none()
                && slot.failed_at.is_none_or(|at| at.elapsed() >= pause(slot.failures))
        };
        self.state().slots.iter().any(due)
    }

    async fn connect(&self, kind: WireKind, reach: &Reach, options: &ClientOptions) {
        let address =
            self.state().slots.iter().find(|slot| slot.kind == kind).map(|slot| slot.address.clone());
        let Some(address) = address else { return };
        let made =
            tokio::time::timeout(options.connect_timeout, self.make(kind, &address, reach, options)).await;
        let made = made.unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer in time")));
        let mut state = self.state();
        let Some(slot) = state.slots.iter_mut().find(|slot| slot.kind == kind) else { return };
        match made {
            Ok(wire) => {
                tracing::debug!(wire = kind.name(), address, "connected");
                slot.wire = Some(wire);
            }
            Err(status) => {
                if kind == WireKind::Rdma && slot.failures == 0 {
                    tracing::info!(error = status.message(), "no RDMA from here; the next wire is taken");
                }
                // On another host there is no such socket: not worth a line.
                tracing::debug!(wire = kind.name(), address, error = status.message(), "not available");
                slot.failures = slot.failures.saturating_add(1);
                slot.failed_at = Some(Instant::now());
            }
        }
    }

    async fn make(
        &self,
        kind: WireKind,
        address: &str,
        reach: &Reach,
        options: &ClientOptions,
    ) -> Result<Arc<dyn Wire>, Status> {
        if kind == WireKind::Shm {
            let wire = ShmWire::connect(&PathBuf::from(address), reach.session, reach.key).await?;
            let wire = Arc::new(wire);
            *self.shm.lock().unwrap_or_else(PoisonError::into_inner) = Some(wire.clone());
            return Ok(wire);
        }
        let tls = reach.tls.as_ref();
        let tls = tls.ok_or_else(|| Status::failed_precondition("TLS needs an https:// endpoint"))?;
        let full = match address.strip_prefix(':') {
            Some(port) if reach.host.contains(':') => format!("[{}]:{port}", reach.host),
            Some(port) => format!("{}:{port}", reach.host),
            None => address.to_owned(),
        };
        if matches!(kind, WireKind::Tls | WireKind::Rdma) {
            let name = ServerName::try_from(reach.host.clone());
            let name = name.map_err(|error| Status::invalid_argument(error.to_string()))?;
            #[cfg(feature = "rdma")]
            if kind == WireKind::Rdma {
                let to = (full, name);
                let wire = RdmaWire::connect(tls.data.clone(), to, reach.session, reach.key).await?;
                return Ok(Arc::new(wire));
            }
            let wire = TlsWire::connect(tls.data.clone(), (full, name), reach.session, reach.key).await?;
            self.state().path = Path { segment_bytes: wire.segment_bytes() };
            return Ok(Arc::new(wire));
        }
        let found = tokio::net::lookup_host(&full).await.map_err(|e| Status::unavailable(e.to_string()))?;
        let mut last = Status::unavailable(format!("{full} is nowhere"));
        for socket in found {
            let keys = (reach.session, reach.key);
            match QuicWire::connect(&tls.data, (socket, &reach.host), &options.quic, keys).await {
                Ok(wire) => return Ok(Arc::new(wire)),
                Err(status) => last = status,
            }
        }
        Err(last)
    }

    /// Bytes came over a wire. Where the server does not see that, it is told with the next request.
    pub(crate) fn came(&self, kind: WireKind, bytes: u64) {
        match kind {
            WireKind::Shm => self.unheard.shm.fetch_add(bytes, Ordering::Relaxed),
            WireKind::Rdma => self.unheard.rdma.fetch_add(bytes, Ordering::Relaxed),
            _ => bytes,
        };
    }

    /// What the server should hear of, over shared memory and RDMA.
    pub(crate) fn take_unheard(&self) -> (u64, u64) {
        (self.unheard.shm.swap(0, Ordering::Relaxed), self.unheard.rdma.swap(0, Ordering::Relaxed))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Every change is whole even if something else panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
