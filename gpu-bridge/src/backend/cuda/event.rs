//! Points of a stream: their completion, the thread that waits for it, and the time between two of them.

use super::context::{Context, check, has_call};
use super::stream::{CudaStream, Kept, RawStream};
use crate::{DeviceError, Event};
use cudarc::driver::sys;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

/// A point of a stream, as CUDA knows it.
pub(super) struct RawEvent {
    context: Arc<Context>,
    pub(super) raw: sys::CUevent,
}

// SAFETY: the driver lets any thread use an event.
unsafe impl Send for RawEvent {}
// SAFETY: as above.
unsafe impl Sync for RawEvent {}

impl RawEvent {
    pub(super) fn new(context: &Arc<Context>, timed: bool) -> Result<Self, DeviceError> {
        let mut raw = std::ptr::null_mut();
        let untimed = if timed { 0 } else { sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32 };
        let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32 | untimed;
        // SAFETY: the event is written.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut raw, flags) })?;
        Ok(Self { context: context.clone(), raw })
    }

    fn wait(&self) -> Result<(), DeviceError> {
        self.context.enter()?;
        // SAFETY: the event lives.
        check("cuEventSynchronize", unsafe { sys::cuEventSynchronize(self.raw) })
    }
}

impl Drop for RawEvent {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made in `new`; the driver keeps what still waits for it.
            let _ = unsafe { sys::cuEventDestroy_v2(self.raw) };
        }
    }
}

/// What is done when an event has completed.
pub(super) struct Completion {
    pub(super) event: Arc<RawEvent>,
    pub(super) notify: Option<Event>,
    pub(super) kept: Option<Vec<Kept>>,
}

impl Completion {
    /// Waits, lets go, and says so: whoever hears of it finds that nothing is kept for it any more.
    fn finish(mut self) {
        let outcome = self.event.wait();
        let kept = self.kept.take();
        let let_go = std::panic::catch_unwind(AssertUnwindSafe(|| drop(kept)));
        if let Some(event) = self.notify.take() {
            event.complete(outcome);
        }
        if let Err(panic) = let_go {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for Completion {
    /// Nobody waited: what is kept may be in use for ever.
    fn drop(&mut self) {
        std::mem::forget(self.kept.take());
        if let Some(event) = self.notify.take() {
            event.complete(Err(DeviceError::Lost("nobody waits for its events any more".into())));
        }
    }
}

/// Waits for one completion after the other, until the stream is dropped and all have come.
pub(super) fn complete(stream: Arc<RawStream>, completions: Receiver<Completion>) {
    for completion in completions {
        // What is woken or dropped here is others' code; its panic must not end the waiting.
        let finished = std::panic::catch_unwind(AssertUnwindSafe(|| completion.finish()));
        if finished.is_err() {
            tracing::error!("something that a stream kept, or a waker, panicked");
        }
    }
    drop(stream);
}

/// Two points of a stream between which time is taken, for benches.
pub struct Stopwatch {
    start: RawEvent,
    end: RawEvent,
}

impl Stopwatch {
    /// Starts here in the stream.
    ///
    /// # Errors
    /// When the device refuses.
    pub fn start(stream: &CudaStream) -> Result<Self, DeviceError> {
        stream.enter()?;
        let context = &stream.raw.context;
        let watch = Self { start: RawEvent::new(context, true)?, end: RawEvent::new(context, true)? };
        // SAFETY: both live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(watch.start.raw, stream.raw.raw) })?;
        Ok(watch)
    }

    /// Ends here, waits, and gives the seconds between.
    ///
    /// # Errors
    /// When anything between failed.
    pub fn stop(self, stream: &CudaStream) -> Result<f64, DeviceError> {
        stream.enter()?;
        // SAFETY: both live.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.end.raw, stream.raw.raw) })?;
        self.end.wait()?;
        let mut ms = 0f32;
        if !has_call(b"cuEventElapsedTime_v2\0") {
            return Err(DeviceError::Failed("taking times needs a driver of CUDA 12.8 or later".into()));
        }
        // SAFETY: both events have completed; one number is written.
        check("cuEventElapsedTime", unsafe {
            sys::cuEventElapsedTime_v2(&mut ms, self.start.raw, self.end.raw)
        })?;
        Ok(f64::from(ms) / 1e3)
    }
}
