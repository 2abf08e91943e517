//! The devices of a running server: attaching them, carrying out what the core plans for them, checking what they hold, and
//! bringing blocks back. The mover may fail; it never decides anew.

use crate::config::NvmeConfig;
use crate::engine::Engine;
use crate::tiers::nvme::fault::{Faults, FaultyEngine};
use crate::tiers::nvme::{
    self, Device, DeviceError, DeviceOptions, Dropped, Engine as IoEngine, Memory, Pages, Pool, ReadError,
    Uring,
};
use cairn_core::{
    DeviceConfig, DeviceId, DiskPlace, Ended, Event, LoadId, Move, PAGE_BYTES, Record, Reply, Room, Source,
    Work, record_pages,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// How often a device is looked at when nothing calls for it.
const MOVER_TICK: Duration = Duration::from_millis(100);

/// Segments read at a time when a device is attached.
const RECOVERY_WIDTH: usize = 4;

/// Moves of one device at a time: each is a few requests, and the engines hold many times as many.
const MAX_MOVES_IN_FLIGHT: usize = 256;

/// Segments in a row that cannot be read before a device is not taken into service.
const MAX_UNREADABLE_SEGMENTS: u32 = 3;

/// How long the scrubber rests after it saw everything.
const SCRUB_PAUSE: Duration = Duration::from_secs(2);

/// One device in service.
pub(crate) struct Attached {
    pub(crate) id: DeviceId,
    pub(crate) device: Arc<Device>,
    pub(crate) engine_name: String,
    /// Something may be to do.
    pub(crate) wake: Notify,
    pub(crate) scrubbed: AtomicU64,
    pub(crate) stop: CancellationToken,
}

/// One configured directory, in service or not.
pub(crate) struct Place {
    options: DeviceOptions,
    /// Held only to look and to set: every lookup does.
    attached: Mutex<Option<Arc<Attached>>>,
    /// Held while a directory is opened, which can take long.
    attaching: Mutex<()>,
}

/// All devices of a server.
#[derive(Default)]
pub(crate) struct Devices {
    places: Vec<Place>,
    config: NvmeConfig,
    uring: Mutex<Vec<Weak<Uring>>>,
    faults: Option<Arc<Faults>>,
    chunks_ready: AtomicU64,
}

impl Devices {
    pub(crate) fn new(config: NvmeConfig, options: Vec<DeviceOptions>, faults: Option<Arc<Faults>>) -> Self {
        let place = |options| Place { options, attached: Mutex::default(), attaching: Mutex::default() };
        Self { places: options.into_iter().map(place).collect(), config, faults, ..Self::default() }
    }

    /// Every configured directory, with its device if it is in service or was.
    pub(crate) fn all(&self) -> Vec<(PathBuf, Option<Arc<Attached>>)> {
        let place = |place: &Place| (place.options.path.clone(), place.current());
        self.places.iter().map(place).collect()
    }

    /// Name of the tier's policy.
    pub(crate) fn policy(&self) -> &str {
        &self.config.policy
    }

    fn find(&self, id: DeviceId) -> Option<Arc<Attached>> {
        self.places.iter().filter_map(Place::current).find(|attached| attached.id == id)
    }

    /// The first `count` chunks of the arena are in memory for good.
    pub(crate) fn chunks_ready(&self, count: u64) {
        self.chunks_ready.store(count, Ordering::Release);
        let rings = self.uring.lock().unwrap_or_else(PoisonError::into_inner);
        rings.iter().filter_map(Weak::upgrade).for_each(|ring| ring.chunks_ready(count));
    }

    /// Something changed that may give devices work.
    pub(crate) fn wake(&self) {
        self.places.iter().filter_map(Place::current).for_each(|attached| attached.wake.notify_one());
    }

    fn io_engine(&self, engine: &Engine) -> std::io::Result<Arc<dyn IoEngine>> {
        let inner: Arc<dyn IoEngine> = match self.config.io.as_str() {
            "threads" => Arc::new(Pool::start()?),
            choice => match Uring::start(engine.arena().clone()) {
                Ok(ring) => {
                    let ring = Arc::new(ring);
                    ring.chunks_ready(self.chunks_ready.load(Ordering::Acquire));
                    let mut rings = self.uring.lock().unwrap_or_else(PoisonError::into_inner);
                    rings.retain(|ring| ring.strong_count() > 0);
                    rings.push(Arc::downgrade(&ring));
                    ring
                }
                Err(error) if choice == "io_uring" => return Err(error),
                Err(error) => {
                    tracing::info!(%error, "io_uring is not available; threads move the bytes");
                    Arc::new(Pool::start()?)
                }
            },
        };
        Ok(match &self.faults {
            Some(faults) => Arc::new(FaultyEngine { inner, faults: faults.clone() }),
            None => inner,
        })
    }

    /// Takes a configured directory into service. Returns at once; what it holds comes in as it is read.
    ///
    /// # Errors
    /// When it cannot be used, or is in service.
    pub(crate) fn attach(&self, engine: &Arc<Engine>, path: &Path) -> Result<(), DeviceError> {
        let io = |source| DeviceError::Io { path: path.to_owned(), source };
        let place = self.places.iter().find(|place| place.options.path == path);
        let place = place.ok_or_else(|| DeviceError::NotConfigured { path: path.to_owned() })?;
        let _one_at_a_time = place.attaching.lock().unwrap_or_else(PoisonError::into_inner);
        let old = place.set(None, |old| old.stop.is_cancelled());
        if old.as_ref().is_some_and(|attached| !attached.stop.is_cancelled()) {
            return Err(DeviceError::InService { path: path.to_owned() });
        }
        // It holds the directory's lock until its last work ended.
        drop(old);
        let device = Device::open(&place.options, self.io_engine(engine).map_err(io)?)?;
        let config = DeviceConfig {
            identity: device.identity(),
            first_generation: device.first_generation(),
            segment_bytes: device.segment_bytes(),
            segments: device.segments(),
            policy: self.config.policy.parse().unwrap_or_default(),
            fill: 1.0 - f64::from(self.config.over_provision_percent) / 100.0,
            max_write_amplification: self.config.max_write_amplification,
        };
        let Ok(Reply::Device(id)) = engine.apply(Event::AttachDevice(&config)) else {
            return Err(io(std::io::Error::other("the core refused the device")));
        };
        let engine_name = device.engine_name();
        tracing::info!(path = %path.display(), engine = engine_name, segments = device.segments(), "device attached");
        let attached = Arc::new(Attached {
            id,
            device: Arc::new(device),
            engine_name,
            wake: Notify::new(),
            scrubbed: AtomicU64::new(0),
            stop: CancellationToken::new(),
        });
        place.set(Some(attached.clone()), |_| true);
        let config = self.config.clone();
        engine.tasks().spawn(run(engine.clone(), attached, config));
        Ok(())
    }

    /// Takes a directory out of service.
    ///
    /// # Errors
    /// When it is not in service.
    pub(crate) fn detach(&self, engine: &Engine, path: &Path) -> Result<(), DeviceError> {
        let place = self.places.iter().find(|place| place.options.path == path);
        let attached = place.and_then(Place::current).filter(|attached| !attached.stop.is_cancelled());
        let attached = attached.ok_or_else(|| DeviceError::NotInService { path: path.to_owned() })?;
        // The core never refuses this.
        let _ = engine.apply(Event::LoseDevice(attached.id));
        Ok(())
    }

    /// The core gave a device up.
    pub(crate) fn lost(&self, id: DeviceId) {
        if let Some(attached) = self.find(id) {
            let path = attached.device.path().display().to_string();
            tracing::error!(path, "a device is out of service; blocks that were only there are missed");
            attached.stop.cancel();
        }
    }

    /// Ends all background work.
    pub(crate) fn stop(&self) {
        self.places.iter().filter_map(Place::current).for_each(|attached| attached.stop.cancel());
    }

    /// Reads one record into `memory`, verified.
    pub(crate) async fn read(
        &self,
        record: &Record,
        from: DiskPlace,
        memory: Memory,
    ) -> Result<Memory, ReadError> {
        let gone = || ReadError::Io(std::io::ErrorKind::NotFound.into());
        let attached = self.find(from.device).ok_or_else(gone)?;
        attached.device.read_record(record, from, memory).await
    }
}

impl Place {
    /// Replaces the device if `may` the old one; returns the old one.
    fn set(&self, new: Option<Arc<Attached>>, may: impl FnOnce(&Attached) -> bool) -> Option<Arc<Attached>> {
        let mut current = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let old = current.clone();
        if old.as_deref().is_none_or(may) {
            *current = new;
        }
        old
    }

    fn current(&self) -> Option<Arc<Attached>> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// How a read went, for the core; what people should know of it is logged.
pub(crate) fn ended(result: &Result<Memory, ReadError>, record: &Record) -> Ended {
    match result {
        Ok(_) => Ended::Done,
        Err(ReadError::Corrupt) => {
            tracing::error!(space = ?record.space, hash = ?record.hash, "a block on a device is corrupt");
            Ended::Corrupt
        }
        Err(ReadError::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => Ended::Cancelled,
        Err(ReadError::Io(error)) => {
            tracing::error!(%error, "a device cannot be read");
            Ended::Failed
        }
    }
}

/// The life of one device: reading what it holds, then moving and checking, until it is stopped.
async fn run(engine: Arc<Engine>, attached: Arc<Attached>, config: NvmeConfig) {
    let stop = attached.stop.clone();
    let recovered = stop.run_until_cancelled(recover(&engine, &attached)).await;
    if recovered != Some(true) {
        return;
    }
    let scrub = scrub(&engine, &attached, config.scrub_mib_per_s);
    let moves = Mover::new(engine.clone(), attached.clone(), &config).run();
    tokio::join!(moves, stop.run_until_cancelled(scrub));
}

async fn recover(engine: &Arc<Engine>, attached: &Arc<Attached>) -> bool {
    use futures::StreamExt;
    let started = Instant::now();
    let (mut blocks, mut segments, mut dropped) = (0u64, 0u64, Dropped::default());
    let mut sequence = attached.device.last_forgotten();
    let mut unreadable_segments = 0;
    let all = (0..attached.device.segments()).map(|number| {
        let device = attached.device.clone();
        async move { nvme::read_segment(&device, number).await }
    });
    let mut all = futures::stream::iter(all).buffered(RECOVERY_WIDTH);
    while let Some(segment) = all.next().await {
        let nvme::Segment { number, generation, sealed, found, dropped: more, last_sequence } = match segment
        {
            Ok(None) => continue,
            Ok(Some(segment)) => segment,
            Err(error) => {
                tracing::error!(%error, path = %attached.device.path().display(), "a segment cannot be read");
                unreadable_segments += 1;
                if unreadable_segments < MAX_UNREADABLE_SEGMENTS
                    && error.kind() != std::io::ErrorKind::InvalidData
                {
                    continue;
                }
                // Never refused.
                let _ = engine.apply(Event::LoseDevice(attached.id));
                return false;
            }
        };
        unreadable_segments = 0;
        sequence = sequence.max(last_sequence);
        blocks += found.len() as u64;
        segments += 1;
        dropped.add(more);
        let device = attached.id;
        // Never refused.
        let _ = engine.apply(Event::Recovered { device, segment: number, generation, sealed, found: &found });
    }
    // Never refused.
    let _ = engine.apply(Event::RecoveryDone { device: attached.id, sequence });
    attached.wake.notify_one();
    let Dropped { torn, forgotten, unreadable } = dropped;
    let ms = started.elapsed().as_millis() as u64;
    tracing::info!(blocks, segments, torn, forgotten, unreadable, ms, "device recovered");
    true
}

struct Mover {
    engine: Arc<Engine>,
    attached: Arc<Attached>,
    going: JoinSet<(cairn_core::MoveId, Ended, u64)>,
    in_flight_bytes: u64,
    max_in_flight_bytes: u64,
    sync_interval: Duration,
    bucket: Bucket,
}

impl Mover {
    fn new(engine: Arc<Engine>, attached: Arc<Attached>, config: &NvmeConfig) -> Self {
        Self {
            engine,
            attached,
            going: JoinSet::new(),
            in_flight_bytes: 0,
            max_in_flight_bytes: config.write_in_flight_mib << 20,
            sync_interval: Duration::from_millis(config.sync_interval_ms),
            bucket: Bucket::new(config.write_mib_per_s << 20),
        }
    }

    /// Until the device is stopped; then what is going on is waited for.
    async fn run(mut self) {
        let mut synced = Instant::now();
        let mut tick = tokio::time::interval(MOVER_TICK.min(self.sync_interval));
        while !self.attached.stop.is_cancelled() {
            let sync = synced.elapsed() >= self.sync_interval;
            if sync {
                synced = Instant::now();
            }
            self.start(sync).await;
            tokio::select! {
                () = self.attached.stop.cancelled() => break,
                () = self.attached.wake.notified() => {}
                Some(ended) = self.going.join_next() => self.end(ended),
                _ = tick.tick() => {}
            }
        }
        while let Some(ended) = self.going.join_next().await {
            self.end(ended);
        }
        // What was written becomes durable, and what was flushed stays so, if the device is still there.
        self.start_within(Room { bytes: 0, blocks: 0, idle: false }, true).await;
        while let Some(ended) = self.going.join_next().await {
            self.end(ended);
        }
    }

    async fn start(&mut self, sync: bool) {
        let bytes =
            self.max_in_flight_bytes.saturating_sub(self.in_flight_bytes).min(self.bucket.available());
        let blocks = MAX_MOVES_IN_FLIGHT.saturating_sub(self.going.len());
        let room = Room { bytes, blocks, idle: self.in_flight_bytes == 0 };
        self.start_within(room, sync).await;
    }

    async fn start_within(&mut self, room: Room, sync: bool) {
        let device = self.attached.id;
        let Ok(Reply::Moves(moves)) = self.engine.apply(Event::PlanMoves { device, room, sync }) else {
            return;
        };
        let mut unopened = None;
        for Move { id, work } in moves {
            if matches!(&work, Work::Write { to, .. } if unopened == Some(to.segment)) {
                self.finish(id, Ended::Cancelled, 0);
                continue;
            }
            let bytes = match &work {
                Work::Write { record, .. } => u64::from(record_pages(record.block_bytes)) * PAGE_BYTES,
                _ => 0,
            };
            self.in_flight_bytes += bytes;
            self.bucket.take(bytes);
            let opens = match &work {
                Work::Open { segment, .. } => Some(*segment),
                _ => None,
            };
            let work = carry_out(self.engine.clone(), self.attached.clone(), work);
            if opens.is_some() {
                let ended = work.await;
                if ended != Ended::Done {
                    unopened = opens;
                }
                self.finish(id, ended, bytes);
            } else {
                self.going.spawn(async move { (id, work.await, bytes) });
            }
        }
    }

    fn end(&mut self, ended: Result<(cairn_core::MoveId, Ended, u64), tokio::task::JoinError>) {
        match ended {
            Ok((id, ended, bytes)) => self.finish(id, ended, bytes),
            Err(error) => {
                // The core waits for this move for ever: whoever watches the process starts a new one.
                tracing::error!(%error, "a move panicked: this is a defect in Cairn; ending");
                std::process::abort()
            }
        }
    }

    fn finish(&mut self, id: cairn_core::MoveId, ended: Ended, bytes: u64) {
        self.in_flight_bytes -= bytes;
        // Never refused.
        let _ = self.engine.apply(Event::EndMove { id, ended });
    }
}

async fn carry_out(engine: Arc<Engine>, attached: Arc<Attached>, work: Work) -> Ended {
    let device = &attached.device;
    let result = match work {
        Work::Open { segment, generation } => device.open_segment(segment, generation).await,
        Work::Write { record, source, to } => {
            let payload = match source {
                Source::Slot(slot) => Memory::Block(engine.moving_bytes(slot, record.block_bytes)),
                Source::Disk(from) => {
                    let memory = Memory::Pages(Pages::for_bytes(record.block_bytes));
                    let read = device.read_record(&record, from, memory).await;
                    match (ended(&read, &record), read) {
                        (Ended::Done, Ok(memory)) => memory,
                        (ended, _) => return ended,
                    }
                }
            };
            device.write_record(record, payload, to).await
        }
        Work::Seal { segment, generation, pages } => device.seal_segment(segment, generation, pages).await,
        Work::Free { segment } => device.free_segment(segment).await,
        Work::Erase(place) => device.erase(place).await,
        Work::Forget { space, sequence } => {
            let device = device.clone();
            let forget = tokio::task::spawn_blocking(move || device.forget(space, sequence)).await;
            forget.unwrap_or_else(|error| Err(std::io::Error::other(error)))
        }
        Work::Sync { segments } => {
            let all = segments.into_iter().map(|segment| device.sync(segment));
            futures::future::try_join_all(all).await.map(|_| ())
        }
    };
    match result {
        Ok(()) => Ended::Done,
        // Too much at once: a matter of this process.
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ended::Cancelled,
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded
            ) =>
        {
            tracing::warn!(path = %device.path().display(), "the file system of a device is full: it stays smaller than configured");
            Ended::NoRoom
        }
        Err(error) => {
            tracing::error!(%error, path = %device.path().display(), "a device cannot be written");
            Ended::Failed
        }
    }
}

/// Reads every block again and again, at a bounded rate.
async fn scrub(engine: &Arc<Engine>, attached: &Arc<Attached>, mib_per_s: u64) {
    if mib_per_s == 0 {
        return std::future::pending().await;
    }
    let mut bucket = Bucket::new(mib_per_s << 20);
    let mut after = None;
    loop {
        let device = attached.id;
        let Ok(Reply::Scrub(item)) = engine.apply(Event::BeginScrub { device, after }) else { return };
        let Some(item) = item else {
            after = None;
            tokio::time::sleep(SCRUB_PAUSE).await;
            continue;
        };
        after = Some(item.block);
        let mut guard = ScrubGuard { engine: engine.clone(), load: item.load, ended: Ended::Cancelled };
        let memory = Memory::Pages(Pages::for_bytes(item.record.block_bytes));
        let read = attached.device.read_record(&item.record, item.from, memory).await;
        guard.ended = ended(&read, &item.record);
        drop(guard);
        attached.scrubbed.fetch_add(1, Ordering::Relaxed);
        bucket.take(item.record.block_bytes);
        bucket.refill().await;
    }
}

/// A check that is cut off ends too.
struct ScrubGuard {
    engine: Arc<Engine>,
    load: LoadId,
    ended: Ended,
}

impl Drop for ScrubGuard {
    fn drop(&mut self) {
        // Never refused.
        let _ = self.engine.apply(Event::EndScrub { load: self.load, ended: self.ended });
        self.engine.arrived();
    }
}

/// A token bucket: so many bytes a second, a quarter of a second's worth at once.
struct Bucket {
    bytes_per_s: u64,
    tokens: f64,
    filled: Instant,
}

impl Bucket {
    /// 0 means no limit.
    fn new(bytes_per_s: u64) -> Self {
        Self { bytes_per_s, tokens: bytes_per_s as f64 / 4.0, filled: Instant::now() }
    }

    fn available(&mut self) -> u64 {
        if self.bytes_per_s == 0 {
            return u64::MAX;
        }
        let rate = self.bytes_per_s as f64;
        self.tokens = (self.tokens + self.filled.elapsed().as_secs_f64() * rate).min(rate / 4.0);
        self.filled = Instant::now();
        // It may be overdrawn by what is taken at once, so that blocks of any size get through.
        if self.tokens > 0.0 { u64::MAX } else { 0 }
    }

    fn take(&mut self, bytes: u64) {
        self.tokens -= bytes as f64;
    }

    /// Waits until it is not overdrawn.
    async fn refill(&mut self) {
        if self.bytes_per_s > 0 && self.available() == 0 {
            let missing = 1.0 - self.tokens;
            tokio::time::sleep(Duration::from_secs_f64(missing / self.bytes_per_s as f64)).await;
        }
    }
}
