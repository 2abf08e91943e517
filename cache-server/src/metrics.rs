//! What a server tells Prometheus. Counters that the core keeps are read at each scrape; what only the server sees
//! (bytes moved, corrupt arrivals, latencies) is counted here.

use crate::devices::Attached;
use crate::engine::Engine;
use cairn_core::{Counters, DeviceCondition, DeviceUsage, GpuUsage, Usage};
use cairn_proto::{MissReason, Tier};
use cairn_transfer::WireKind;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

type Labels = [(&'static str, &'static str); 1];

/// Counted by the server itself.
#[derive(Clone, Debug)]
pub struct Metrics {
    wires: Arc<WireCounters>,
    /// Blocks that arrived with bytes that did not match their checksum.
    pub checksum_mismatches: Counter,
    latency: Family<Labels, Histogram>,
}

impl Metrics {
    /// Counters at zero, and the registry that shows them and the engine's.
    pub fn new(engine: &Arc<Engine>) -> (Self, Registry) {
        let latency = Family::new_with_constructor(latency_histogram as fn() -> Histogram);
        let metrics = Self { wires: Arc::default(), checksum_mismatches: Counter::default(), latency };
        let mut registry = Registry::with_prefix("cairn");
        let Self { wires, checksum_mismatches, latency } = metrics.clone();
        registry.register_collector(Box::new(WireCollector(wires)));
        let help = "Blocks whose bytes did not match their checksum on arrival";
        registry.register("checksum_mismatches", help, checksum_mismatches);
        registry.register_with_unit("request_duration", "Time to answer", Unit::Seconds, latency);
        registry.register_collector(Box::new(CoreCollector(engine.clone())));
        (metrics, registry)
    }

    /// A fetch began over a wire.
    pub fn fetch_started(&self, wire: WireKind) {
        self.wires.fetches[wire as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Block bytes were sent over a wire, or read by a client in shared memory.
    pub fn sent(&self, wire: WireKind, bytes: u64) {
        self.wires.fetched_bytes[wire as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    /// Block bytes arrived over a wire and were committed.
    pub fn received(&self, wire: WireKind, bytes: u64) {
        self.wires.published_bytes[wire as usize].fetch_add(bytes, Ordering::Relaxed);
    }

    /// What each wire carried: fetches, bytes out, bytes in.
    pub fn wires(&self) -> impl Iterator<Item = (WireKind, [u64; 3])> {
        let WireCounters { fetches, fetched_bytes, published_bytes } = &*self.wires;
        let read =
            |counters: &[AtomicU64; 6], kind: WireKind| counters[kind as usize].load(Ordering::Relaxed);
        WireKind::ALL
            .into_iter()
            .map(move |kind| (kind, [fetches, fetched_bytes, published_bytes].map(|all| read(all, kind))))
    }

    /// Records how long one request took.
    pub fn observe(&self, request: &'static str, since: std::time::Instant) {
        self.latency.get_or_create(&[("request", request)]).observe(since.elapsed().as_secs_f64());
    }
}

#[derive(Debug, Default)]
struct WireCounters {
    fetches: [AtomicU64; 6],
    fetched_bytes: [AtomicU64; 6],
    published_bytes: [AtomicU64; 6],
}

#[derive(Debug)]
struct WireCollector(Arc<WireCounters>);

impl Collector for WireCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let WireCounters { fetches, fetched_bytes, published_bytes } = &*self.0;
        let families = [
            ("fetches", "Fetches that the server took part in, by wire", fetches),
            ("fetched_bytes", "Block bytes sent, or read in shared memory, by wire", fetched_bytes),
            ("published_bytes", "Block bytes stored, by wire", published_bytes),
        ];
        for (name, help, counters) in families {
            let values = WireKind::ALL.iter().zip(counters);
            let values = values.map(|(kind, value)| (kind.name(), value.load(Ordering::Relaxed)));
            labelled(&mut encoder, name, help, "wire", values)?;
        }
        Ok(())
    }
}

/// From 20 µs to 10 s.
fn latency_histogram() -> Histogram {
    Histogram::new(exponential_buckets(20e-6, 2.0, 20))
}

struct CoreCollector(Arc<Engine>);

impl std::fmt::Debug for CoreCollector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CoreCollector")
    }
}

impl Collector for CoreCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let (counters, usage) = self.0.inspect(|core| (core.counters().clone(), core.usage()));
        encode_lookups(&mut encoder, &counters)?;
        encode_totals(&mut encoder, &counters)?;
        encode_usage(&mut encoder, &usage, self.0.capacity_bytes())?;
        encode_devices(&mut encoder, &self.0)?;
        encode_gpus(&mut encoder, &self.0)
    }
}

/// asked = hits by tier + misses by reason + busy.
fn encode_lookups(encoder: &mut DescriptorEncoder<'_>, counters: &Counters) -> Result<(), std::fmt::Error> {
    let tiers = Tier::ALL.iter().zip(counters.hit_blocks).map(|(tier, n)| (tier.name(), n));
    labelled(encoder, "hit_blocks", "Blocks found, by tier", "tier", tiers)?;
    let reasons = MissReason::ALL.iter().zip(counters.missed_blocks).map(|(reason, n)| (reason.name(), n));
    labelled(encoder, "missed_blocks", "Blocks not found, by reason", "reason", reasons)
}

fn labelled(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    label: &str,
    values: impl Iterator<Item = (&'static str, u64)>,
) -> Result<(), std::fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (value, count) in values {
        let labels = [(label, value)];
        ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn encode_totals(encoder: &mut DescriptorEncoder<'_>, counters: &Counters) -> Result<(), std::fmt::Error> {
    let totals = [
        ("asked_blocks", "Blocks asked for in lookups", counters.asked_blocks),
        ("busy_blocks", "Blocks found but not leased for want of lease room", counters.busy_blocks),
        ("committed_blocks", "Blocks made visible", counters.committed_blocks),
        ("duplicate_blocks", "Blocks offered again and dropped", counters.duplicate_blocks),
        ("evicted_blocks", "Blocks that made room", counters.evicted_blocks),
        (
            "demoted_blocks",
            "Blocks that left host memory and stayed on a device or a GPU",
            counters.demoted_blocks,
        ),
        ("quarantined_blocks", "Blocks removed because their bytes were wrong", counters.quarantined_blocks),
        ("refused_blocks", "Blocks offered and not given room", counters.refused_blocks),
        ("expired_leases", "Leases ended by their deadline", counters.expired_leases),
        ("expired_reservations", "Reservations ended by their deadline", counters.expired_reservations),
    ];
    for (name, help, value) in totals {
        let counter = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        ConstCounter::new(value).encode(counter)?;
    }
    Ok(())
}

fn encode_usage(
    encoder: &mut DescriptorEncoder<'_>,
    usage: &Usage,
    capacity_bytes: u64,
) -> Result<(), std::fmt::Error> {
    let gauges = [
        ("sessions", "Clients connected", usage.sessions as u64),
        ("leases", "Leases held", usage.leases as u64),
        ("reservations", "Reservations held", usage.reservations as u64),
        ("resident_blocks", "Blocks in the index", usage.resident_blocks as u64),
        ("host_blocks", "Blocks in host memory", usage.host_blocks as u64),
        ("gpu_blocks", "Blocks that can be read on a GPU", usage.gpu_blocks as u64),
        ("resident_bytes", "Bytes of their slots", usage.resident_bytes),
        ("used_slots", "Slots that hold anything", usage.used_slots as u64),
        ("free_chunks", "Chunks that nobody owns", usage.free_chunks as u64),
        ("capacity_bytes", "Bytes of the host tier", capacity_bytes),
    ];
    for (name, help, value) in gauges {
        let gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(gauge)?;
    }
    Ok(())
}

type DeviceGauge = (&'static str, &'static str, fn(&DeviceUsage) -> u64);

/// `device_in_service` is the one to alarm on.
fn encode_devices(encoder: &mut DescriptorEncoder<'_>, engine: &Engine) -> Result<(), std::fmt::Error> {
    let usages = engine.inspect(cairn_core::Core::devices);
    let places = engine.devices().all();
    let usage = |attached: &Option<Arc<Attached>>| {
        attached.as_ref().and_then(|attached| usages.iter().find(|usage| usage.device == attached.id))
    };
    let in_service = |usage: &DeviceUsage| u64::from(usage.state != DeviceCondition::Lost);
    let gauges: [DeviceGauge; 6] = [
        ("device_in_service", "1 while the device takes part", in_service),
        ("device_capacity_bytes", "Room for records", |usage| usage.capacity_bytes),
        ("device_live_bytes", "Bytes of wanted records", |usage| usage.live_bytes),
        ("device_target_bytes", "Bytes of wanted records beyond which copies leave", |usage| {
            usage.target_bytes
        }),
        ("device_live_blocks", "Wanted records", |usage| usage.live_blocks),
        ("device_queued_blocks", "Blocks that wait to be written, or are being written", |usage| {
            usage.queued_blocks
        }),
    ];
    let counters: [DeviceGauge; 6] = [
        ("device_stored_bytes", "Bytes written for the first time", |usage| usage.counters.stored_bytes),
        ("device_relocated_bytes", "Bytes written again to free segments", |usage| {
            usage.counters.relocated_bytes
        }),
        ("device_read_bytes", "Block bytes read", |usage| usage.counters.read_bytes),
        ("device_evicted_blocks", "Copies that made room", |usage| usage.counters.evicted_blocks),
        ("device_corrupt_blocks", "Blocks whose bytes were wrong", |usage| usage.counters.corrupt_blocks),
        ("device_errors", "Errors that the device returned", |usage| usage.counters.errors),
    ];
    for (kind, metrics) in [(MetricType::Gauge, &gauges[..]), (MetricType::Counter, &counters[..])] {
        for (name, help, value) in metrics {
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for (path, attached) in &places {
                let value = usage(attached).map_or(0, value);
                let labels = [("device", path.display().to_string())];
                let metric = family.encode_family(&labels)?;
                match kind {
                    MetricType::Counter => ConstCounter::new(value).encode(metric)?,
                    _ => ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(metric)?,
                }
            }
        }
    }
    Ok(())
}

type GpuGauge = (&'static str, &'static str, fn(&GpuUsage) -> u64);

/// `gpu_in_service` is the one to alarm on.
fn encode_gpus(encoder: &mut DescriptorEncoder<'_>, engine: &Engine) -> Result<(), std::fmt::Error> {
    let usages = engine.inspect(cairn_core::Core::gpus);
    if usages.is_empty() {
        return Ok(());
    }
    let gauges: [GpuGauge; 3] = [
        ("gpu_in_service", "1 while the GPU takes part", |usage| u64::from(!usage.lost)),
        ("gpu_capacity_bytes", "Room for blocks", |usage| usage.capacity_bytes),
        ("gpu_resident_bytes", "Bytes of slots with blocks that can be read there", |usage| usage.bytes),
    ];
    let counters: [GpuGauge; 7] = [
        ("gpu_promoted_blocks", "Blocks copied there", |usage| usage.counters.promoted_blocks),
        ("gpu_promoted_bytes", "Bytes of these", |usage| usage.counters.promoted_bytes),
        ("gpu_demoted_blocks", "Only copies that moved to host memory", |usage| {
            usage.counters.demoted_blocks
        }),
        ("gpu_dropped_blocks", "Copies that made room and were elsewhere, too", |usage| {
            usage.counters.dropped_blocks
        }),
        ("gpu_read_bytes", "Block bytes copied to host memory for readers that cannot reach it", |usage| {
            usage.counters.read_bytes
        }),
        ("gpu_corrupt_blocks", "Blocks whose bytes were wrong", |usage| usage.counters.corrupt_blocks),
        ("gpu_errors", "Copies that failed", |usage| usage.counters.errors),
    ];
    for (kind, metrics) in [(MetricType::Gauge, &gauges[..]), (MetricType::Counter, &counters[..])] {
        for (name, help, value) in metrics {
            let mut family = encoder.encode_descriptor(name, help, None, kind)?;
            for usage in &usages {
                let labels = [("gpu", engine.gpus().info(usage.gpu).ordinal.to_string())];
                let metric = family.encode_family(&labels)?;
                match kind {
                    MetricType::Counter => ConstCounter::new(value(usage)).encode(metric)?,
                    _ => ConstGauge::new(i64::try_from(value(usage)).unwrap_or(i64::MAX)).encode(metric)?,
                }
            }
        }
    }
    let queued = engine.inspect(cairn_core::Core::gpu_queue) as i64;
    let help = "Blocks that wait to be copied to a GPU";
    ConstGauge::new(queued).encode(encoder.encode_descriptor(
        "gpu_queued_blocks",
        help,
        None,
        MetricType::Gauge,
    )?)
}
