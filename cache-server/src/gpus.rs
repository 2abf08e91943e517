//! The GPUs of a running server: carrying out what the core plans for them. A copy may fail; it never decides anew.

use crate::engine::{Engine, LoadGuard};
use crate::tiers::gpu::{CopyError, Promised};
use crate::tiers::nvme::{Memory, Pages, ReadError};
use cairn_core::{
    CopyId, Ended, Event, GpuEvent, GpuId, GpuSlot, GpuUsage, GpuWork, Record, Reply, Room, SlotId,
};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

/// How often the core is asked when nothing calls for it.
const TICK: Duration = Duration::from_millis(100);

/// How often GPUs are asked whether they are there: clients read without the server's help, so it may have nothing else to notice by.
const HEALTH_INTERVAL: Duration = Duration::from_secs(1);

/// One that does not answer for twice so long is given up: a host that was paused finds the first time over when it wakes.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(5);

/// Blocks on their way to or from GPUs at a time.
const MAX_BLOCKS_IN_FLIGHT: usize = 1024;

/// Promotions to one GPU that are issued and awaited together.
type Promotions = Vec<(CopyGuard, SlotId, GpuSlot, u64)>;

/// A copy to a GPU that ends whatever happens.
struct CopyGuard {
    engine: Arc<Engine>,
    copy: CopyId,
    ended: Ended,
}

impl Drop for CopyGuard {
    fn drop(&mut self) {
        // Never refused.
        let _ = self.engine.apply(Event::Gpu(GpuEvent::EndCopy { copy: self.copy, ended: self.ended }));
    }
}

/// Until the server stops; then what is going on is waited for.
pub(crate) async fn run(engine: Arc<Engine>) {
    let tier = engine.gpus();
    let mut going = Going::default();
    let mut tick = tokio::time::interval(TICK);
    let health: Vec<_> = engine.inspect(cairn_core::Core::gpus).iter().map(|usage| usage.gpu).collect();
    let _health: Vec<_> = health
        .into_iter()
        .map(|gpu| AbortOnDropHandle::new(tokio::spawn(watch(engine.clone(), gpu))))
        .collect();
    while !tier.stop.is_cancelled() {
        let (blocks, bytes) = going.taken(&engine.inspect(cairn_core::Core::gpus));
        let room = Room {
            bytes: tier.max_in_flight_bytes().saturating_sub(bytes),
            blocks: MAX_BLOCKS_IN_FLIGHT.saturating_sub(blocks),
            idle: blocks == 0,
        };
        if room.blocks > 0
            && room.bytes > 0
            && let Ok(Reply::Copies(work)) = engine.apply(Event::Gpu(GpuEvent::Plan(room)))
        {
            start(&engine, work, &mut going);
        }
        tokio::select! {
            () = tier.stop.cancelled() => break,
            () = tier.wake.notified() => {}
            _ = tick.tick() => {}
            () = going.next(), if !going.room.is_empty() => {}
        }
    }
    while going.taken(&engine.inspect(cairn_core::Core::gpus)).0 > 0 {
        going.next().await;
    }
}

/// Asks one GPU again and again whether it is there.
async fn watch(engine: Arc<Engine>, gpu: GpuId) {
    loop {
        tokio::time::sleep(HEALTH_INTERVAL).await;
        let tier = engine.gpus().clone();
        let (answer, mut answered) = tokio::sync::oneshot::channel();
        // A thread of its own: a driver that hangs must take nothing of the server's with it, nor keep it from ending.
        let asking = std::thread::Builder::new().name("cairn-gpu-health".into());
        if asking.spawn(move || answer.send(tier.is_gone(gpu))).is_err() {
            // No threads at present says nothing about the GPU.
            continue;
        }
        let mut gone = tokio::time::timeout(HEALTH_TIMEOUT, &mut answered).await;
        if gone.is_err() {
            gone = tokio::time::timeout(HEALTH_TIMEOUT, &mut answered).await;
        }
        if !matches!(gone, Ok(Ok(false))) {
            // Never refused.
            engine.apply(Event::Gpu(GpuEvent::Lose(gpu))).ok();
            return;
        }
    }
}

/// Copies that are going on, and what each has of the room.
#[derive(Default)]
struct Going {
    tasks: JoinSet<()>,
    room: HashMap<tokio::task::Id, Taken>,
}

/// Blocks and bytes on their way to or from one GPU.
struct Taken {
    gpu: GpuId,
    blocks: usize,
    bytes: u64,
}

impl Going {
    fn spawn(&mut self, taken: Taken, task: impl Future<Output = ()> + Send + 'static) {
        let id = self.tasks.spawn(task).id();
        self.room.insert(id, taken);
    }

    /// Blocks and bytes on their way. Those of a GPU that is lost may never arrive, and take nothing from the others.
    fn taken(&self, gpus: &[GpuUsage]) -> (usize, u64) {
        let counts = |taken: &&Taken| gpus.iter().any(|usage| usage.gpu == taken.gpu && !usage.lost);
        let all = self.room.values().filter(counts);
        all.fold((0, 0), |(blocks, bytes), taken| (blocks + taken.blocks, bytes + taken.bytes))
    }

    /// Waits for one to end, well or not.
    async fn next(&mut self) {
        let ended = match self.tasks.join_next_with_id().await {
            Some(Ok((id, ()))) => id,
            Some(Err(error)) => error.id(),
            None => return,
        };
        self.room.remove(&ended);
    }
}

/// Starts planned copies.
fn start(engine: &Arc<Engine>, work: Vec<GpuWork>, going: &mut Going) {
    let mut promotions: BTreeMap<GpuId, Promotions> = BTreeMap::new();
    for work in work {
        match work {
            GpuWork::Promote { copy, record, from, to } => {
                let guard = CopyGuard { engine: engine.clone(), copy, ended: Ended::Cancelled };
                promotions.entry(to.gpu).or_default().push((guard, from, to, record.block_bytes));
            }
            GpuWork::Demote { load, record, from, to } => {
                let guard = LoadGuard::new(engine, load);
                let taken = Taken { gpu: from.gpu, blocks: 1, bytes: record.block_bytes };
                going.spawn(taken, demote(engine.clone(), (guard, record), from, to));
            }
        }
    }
    for (gpu, promotions) in promotions {
        let (blocks, bytes) = (promotions.len(), promotions.iter().map(|(.., bytes)| bytes).sum());
        going.spawn(Taken { gpu, blocks, bytes }, promote(engine.clone(), gpu, promotions));
    }
}

async fn promote(engine: Arc<Engine>, gpu: GpuId, mut promotions: Promotions) {
    let copies: Vec<_> = promotions.iter().map(|(_, from, to, bytes)| (*from, *to, *bytes)).collect();
    let copied = engine.gpus().promote(gpu, copies).await;
    match &copied {
        Ok(()) => promotions.iter_mut().for_each(|(guard, ..)| guard.ended = Ended::Done),
        Err(error) => {
            let (ordinal, blocks) = (engine.gpus().info(gpu).ordinal, promotions.len());
            tracing::error!(%error, gpu = ordinal, blocks, "blocks could not be copied to a GPU");
            // One failure, however many blocks share it; and none of the GPU's if nothing was begun.
            let failures = usize::from(!matches!(error, CopyError::NotStarted(_)));
            promotions.iter_mut().take(failures).for_each(|(guard, ..)| guard.ended = Ended::Failed);
        }
    }
    // The deepest first, as policies want it.
    while promotions.pop().is_some() {}
    if let Err(CopyError::Lost(_)) = copied {
        // Never refused.
        engine.apply(Event::Gpu(GpuEvent::Lose(gpu))).ok();
    }
}

async fn demote(engine: Arc<Engine>, (guard, record): (LoadGuard, Record), from: GpuSlot, to: SlotId) {
    let guard = Arc::new(guard);
    let memory = Memory::Slot(engine.arena().writer(to, record.block_bytes, guard.clone()));
    read(&engine, &guard, (&record, from), memory).await.ok();
}

/// Reads a block from a GPU and tells the core how that ended, once the memory may be used.
pub(crate) async fn read(
    engine: &Arc<Engine>,
    guard: &Arc<LoadGuard>,
    (record, from): (&Record, GpuSlot),
    memory: Memory,
) -> Result<Memory, ReadError> {
    let read = engine.gpus().read(&record.into(), from, memory).await;
    guard.end(match &read {
        Ok(_) => Ended::Done,
        Err(ReadError::Corrupt) => {
            tracing::error!(space = ?record.space, hash = ?record.hash, "a block on a GPU is corrupt");
            Ended::Corrupt
        }
        Err(ReadError::Io(error)) => {
            tracing::error!(%error, gpu = engine.gpus().info(from.gpu).ordinal, "a GPU cannot be read");
            if error.kind() == std::io::ErrorKind::OutOfMemory { Ended::NoRoom } else { Ended::Failed }
        }
    });
    if let Err(ReadError::Io(error)) = &read
        && error.kind() == std::io::ErrorKind::NotConnected
    {
        // Never refused.
        let _ = engine.apply(Event::Gpu(GpuEvent::Lose(from.gpu)));
    }
    read
}

/// Whether the copy of a block that a reader holds in place on a GPU is wrong, as it says; then nobody gets it any more.
pub(crate) async fn is_corrupt(engine: &Arc<Engine>, block: &Promised, from: GpuSlot) -> bool {
    let _room = engine.room_through(block.bytes).await;
    let memory = Memory::Pages(Pages::for_bytes(block.bytes));
    let read = engine.gpus().read(block, from, memory).await;
    let corrupt = matches!(read, Err(ReadError::Corrupt));
    if corrupt {
        tracing::error!(space = ?block.space, hash = ?block.hash, "a block on a GPU is corrupt: its copy there is given up");
        // Refused only if the space is unknown.
        engine.apply(Event::Gpu(GpuEvent::Spoil { space: block.space, hash: block.hash })).ok();
    }
    corrupt
}
