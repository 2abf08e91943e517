//! The GPUs of a running server: carrying out what the core plans for them. A copy may fail; it never decides anew.

use crate::engine::{Engine, LoadGuard};
use crate::tiers::gpu::Promised;
use crate::tiers::nvme::{Memory, Pages, ReadError};
use cairn_core::{CopyId, Ended, Event, GpuEvent, GpuId, GpuSlot, GpuWork, Record, Reply, Room, SlotId};
use cairn_gpu::DeviceError;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// How often the core is asked when nothing calls for it.
const TICK: Duration = Duration::from_millis(100);

/// How often GPUs are asked whether they are there: clients read without the server's help, so it may have nothing else to notice by.
const HEALTH_INTERVAL: Duration = Duration::from_secs(1);

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
    let mut going: JoinSet<(usize, u64)> = JoinSet::new();
    let (mut blocks, mut bytes) = (0, 0);
    let mut tick = tokio::time::interval(TICK);
    let mut asked = tokio::time::Instant::now();
    while !tier.stop.is_cancelled() {
        if asked.elapsed() >= HEALTH_INTERVAL {
            asked = tokio::time::Instant::now();
            for gpu in tier.gone() {
                // Never refused.
                engine.apply(Event::Gpu(GpuEvent::Lose(gpu))).ok();
            }
        }
        let room = Room {
            bytes: tier.max_in_flight_bytes().saturating_sub(bytes),
            blocks: MAX_BLOCKS_IN_FLIGHT.saturating_sub(blocks),
            idle: blocks == 0,
        };
        if room.blocks > 0
            && room.bytes > 0
            && let Ok(Reply::Copies(work)) = engine.apply(Event::Gpu(GpuEvent::Plan(room)))
        {
            for (task_blocks, task_bytes) in start(&engine, work, &mut going) {
                blocks += task_blocks;
                bytes += task_bytes;
            }
        }
        tokio::select! {
            () = tier.stop.cancelled() => break,
            () = tier.wake.notified() => {}
            _ = tick.tick() => {}
            Some(ended) = going.join_next() => {
                let (ended_blocks, ended_bytes) = ended.unwrap_or_default();
                blocks -= ended_blocks;
                bytes -= ended_bytes;
            }
        }
    }
    while going.join_next().await.is_some() {}
}

/// Starts planned copies; says how many blocks and bytes each task has.
fn start(engine: &Arc<Engine>, work: Vec<GpuWork>, going: &mut JoinSet<(usize, u64)>) -> Vec<(usize, u64)> {
    let mut promotions: BTreeMap<GpuId, Promotions> = BTreeMap::new();
    let mut started = Vec::new();
    for work in work {
        match work {
            GpuWork::Promote { copy, record, from, to } => {
                let guard = CopyGuard { engine: engine.clone(), copy, ended: Ended::Cancelled };
                promotions.entry(to.gpu).or_default().push((guard, from, to, record.block_bytes));
            }
            GpuWork::Demote { load, record, from, to } => {
                let guard = LoadGuard::new(engine, load);
                let task = (1, record.block_bytes);
                started.push(task);
                let demotion = demote(engine.clone(), (guard, record), from, to);
                going.spawn(async move {
                    demotion.await;
                    task
                });
            }
        }
    }
    for (gpu, promotions) in promotions {
        let task = (promotions.len(), promotions.iter().map(|(.., bytes)| bytes).sum());
        started.push(task);
        let promotion = promote(engine.clone(), gpu, promotions);
        going.spawn(async move {
            promotion.await;
            task
        });
    }
    started
}

async fn promote(engine: Arc<Engine>, gpu: GpuId, mut promotions: Promotions) {
    let copies: Vec<_> = promotions.iter().map(|(_, from, to, bytes)| (*from, *to, *bytes)).collect();
    let copied = match engine.gpus().promote(gpu, &copies) {
        Ok(event) => event.await,
        Err(error) => Err(error),
    };
    match &copied {
        Ok(()) => promotions.iter_mut().for_each(|(guard, ..)| guard.ended = Ended::Done),
        Err(error) => {
            let ordinal = engine.gpus().info(gpu).ordinal;
            tracing::error!(%error, gpu = ordinal, blocks = copies.len(), "blocks could not be copied to a GPU");
            // One failure, however many blocks share it.
            promotions.iter_mut().take(1).for_each(|(guard, ..)| guard.ended = Ended::Failed);
        }
    }
    drop(promotions);
    if let Err(DeviceError::Lost(_)) = copied {
        // Never refused.
        let _ = engine.apply(Event::Gpu(GpuEvent::Lose(gpu)));
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
            Ended::Failed
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
