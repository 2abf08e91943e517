//! An engine that misbehaves on purpose: errors, short and torn writes, flipped bits, delays, a full or vanished device.
//! Everything follows from one seed. For tests; a server uses it only when its caller hands it over.

use super::io::{Done, Engine, Job, Memory, Operation, Pages, Request, perform, refuse};
use rustix::io::Errno;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Tears happen at multiples of this: what a disk writes whole.
const SECTOR_BYTES: usize = 512;

/// How often what goes wrong, each in one of so many requests; 0 means never.
#[derive(Clone, Copy, Debug, Default)]
pub struct FaultRates {
    /// A request fails and does nothing.
    pub error: u64,
    /// A write does its first part and fails.
    pub short_write: u64,
    /// A write does its first part and claims success.
    pub torn_write: u64,
    /// A read returns one wrong bit.
    pub flipped_read: u64,
    /// A request takes a few milliseconds.
    pub delay: u64,
    /// Taking room fails: the device is full.
    pub no_space: u64,
}

/// What is to go wrong, and what did.
#[derive(Debug, Default)]
pub struct Faults {
    state: Mutex<u64>,
    rates: Mutex<FaultRates>,
    gone: AtomicBool,
    flipped: AtomicU64,
    torn: AtomicU64,
}

impl Faults {
    /// Faults that follow from a seed.
    pub fn new(seed: u64, rates: FaultRates) -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(seed), rates: Mutex::new(rates), ..Self::default() })
    }

    /// From now on.
    pub fn set_rates(&self, rates: FaultRates) {
        *self.rates.lock().unwrap_or_else(PoisonError::into_inner) = rates;
    }

    /// The device is unplugged, or is back.
    pub fn set_gone(&self, gone: bool) {
        self.gone.store(gone, Ordering::SeqCst);
    }

    /// Reads that returned a wrong bit so far.
    pub fn flipped(&self) -> u64 {
        self.flipped.load(Ordering::SeqCst)
    }

    /// Writes that were torn and claimed success so far.
    pub fn torn(&self) -> u64 {
        self.torn.load(Ordering::SeqCst)
    }

    /// splitmix64.
    fn next(&self) -> u64 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn happens(&self, one_in: u64) -> bool {
        one_in > 0 && self.next().is_multiple_of(one_in)
    }
}

pub(crate) struct FaultyEngine {
    pub(crate) inner: Arc<dyn Engine>,
    pub(crate) faults: Arc<Faults>,
}

impl Engine for FaultyEngine {
    fn submit(&self, job: Job) {
        let (inner, faults) = (self.inner.clone(), self.faults.clone());
        tokio::spawn(async move { carry_out(inner, &faults, job).await });
    }

    fn name(&self) -> &'static str {
        "faulty"
    }
}

async fn carry_out(inner: Arc<dyn Engine>, faults: &Faults, job: Job) {
    let rates = *faults.rates.lock().unwrap_or_else(PoisonError::into_inner);
    if faults.happens(rates.delay) {
        tokio::time::sleep(Duration::from_millis(1 + faults.next() % 8)).await;
    }
    if faults.gone.load(Ordering::SeqCst) {
        return refuse(job, Errno::NODEV.into());
    }
    let operation = job.request.operation;
    if matches!(operation, Operation::Allocate(_)) && faults.happens(rates.no_space) {
        return refuse(job, Errno::NOSPC.into());
    }
    if faults.happens(rates.error) {
        return refuse(job, Errno::IO.into());
    }
    let Job { request, answer } = job;
    let short = operation == Operation::Write && faults.happens(rates.short_write);
    let torn = operation == Operation::Write && faults.happens(rates.torn_write);
    let (memory, result) = if short || torn {
        let at = faults.next() as usize;
        let (memory, result) = write_first_part(&*inner, request, at).await;
        if short {
            (memory, result.and(Err(io::ErrorKind::WriteZero.into())))
        } else {
            faults.torn.fetch_add(1, Ordering::SeqCst);
            (memory, result)
        }
    } else {
        perform(&*inner, request).await
    };
    let Some(mut memory) = memory else { return };
    if operation == Operation::Read
        && result.is_ok()
        && faults.happens(rates.flipped_read)
        && let Some(bytes) = memory.bytes_mut()
        && !bytes.is_empty()
    {
        let bit = faults.next() as usize % (bytes.len() * 8);
        bytes[bit / 8] ^= 1 << (bit % 8);
        faults.flipped.fetch_add(1, Ordering::SeqCst);
    }
    // Nobody waits: nothing to tell.
    let _ = answer.send(Done { memory, result });
}

/// Leaves what is in the file behind a sector boundary as it is.
async fn write_first_part(
    inner: &dyn Engine,
    request: Request,
    random: usize,
) -> (Option<Memory>, io::Result<()>) {
    let Request { operation, file, offset, memory } = request;
    let sectors = memory.len() / SECTOR_BYTES;
    let kept = (random % sectors.max(1)) * SECTOR_BYTES;
    let old = Memory::Pages(Pages::for_bytes(memory.len() as u64));
    let old = Request { operation: Operation::Read, file: file.clone(), offset, memory: old };
    let (Some(mut old), Ok(())) = perform(inner, old).await else {
        return (Some(memory), Err(Errno::IO.into()));
    };
    if let Some(bytes) = old.bytes_mut() {
        bytes[..kept].copy_from_slice(&memory.bytes()[..kept]);
    }
    let (_, result) = perform(inner, Request { operation, file, offset, memory: old }).await;
    (Some(memory), result)
}
