//! A stream: work in order, and a thread that waits for its events.
//!
//! Whatever work names is kept until an event behind that work has completed; the thread that waits for the event lets it go. No
//! callback runs inside the driver, and a lost device ends every wait with its error.

use super::CudaDevice;
use super::context::{Context, check};
use super::event::{Completion, RawEvent, complete};
use super::memory::CudaMemory;
use super::moves::Descriptors;
use super::programs::Kernel;
use crate::{BlockMove, Buffer, Copy, DeviceError, Event, PagedShape, Priority, Stream};
use cairn_kernels::cuda::Params;
use cudarc::driver::sys;
use std::any::Any;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;

/// Events that wait to complete; whoever records more waits for the oldest.
const EVENTS_AHEAD: usize = 4096;

/// Things that are kept for work before an event is recorded for their sake alone.
const KEPT_AHEAD: usize = 1024;

/// Copies of one call to the driver: some have failed to end with tens of thousands.
const MAX_BATCH: usize = 1024;

/// Something that work in flight needs.
pub(super) type Kept = Box<dyn Any + Send>;

pub(super) struct RawStream {
    pub(super) context: Arc<Context>,
    pub(super) raw: sys::CUstream,
}

// SAFETY: the driver lets any thread use a stream.
unsafe impl Send for RawStream {}
// SAFETY: as above.
unsafe impl Sync for RawStream {}

impl Drop for RawStream {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made in `CudaStream::new`; what it was given still runs to its end.
            let _ = unsafe { sys::cuStreamDestroy_v2(self.raw) };
        }
    }
}

/// A stream of a [`CudaDevice`].
pub struct CudaStream {
    device: CudaDevice,
    pub(super) raw: Arc<RawStream>,
    pub(super) kept: Mutex<Vec<Kept>>,
    /// Work is recorded into a graph instead of issued.
    capturing: Mutex<Option<ThreadId>>,
    pub(super) descriptors: Arc<Mutex<Vec<Descriptors>>>,
    completions: SyncSender<Completion>,
}

/// One copy as the driver wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    source: u64,
    target: u64,
    bytes: usize,
    /// Where the memories begin of which these are parts: a copy must not cross from one into the next.
    within: [u64; 2],
}

impl Span {
    pub(super) fn new(source: u64, target: u64, bytes: usize) -> Self {
        Self { source, target, bytes, within: [source, target] }
    }
}

impl CudaStream {
    pub(super) fn new(device: CudaDevice, priority: Priority) -> Result<Self, DeviceError> {
        let context = device.context();
        context.enter()?;
        let (least, greatest) = context.priorities;
        let urgency = match priority {
            Priority::Foreground => greatest,
            Priority::Background => least,
        };
        let mut raw = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the stream is written.
        check("cuStreamCreate", unsafe { sys::cuStreamCreateWithPriority(&mut raw, flags, urgency) })?;
        let raw = Arc::new(RawStream { context: context.clone(), raw });
        let (completions, receiver) = sync_channel(EVENTS_AHEAD);
        // The thread has the stream too: it is destroyed after the last of its events.
        let of_thread = raw.clone();
        std::thread::Builder::new()
            .name("cairn-cuda-wait".into())
            .spawn(move || complete(of_thread, receiver))
            .map_err(|error| DeviceError::Failed(format!("cannot start a thread: {error}")))?;
        Ok(Self {
            device,
            raw,
            kept: Mutex::default(),
            capturing: Mutex::default(),
            descriptors: Arc::default(),
            completions,
        })
    }

    /// The device it belongs to.
    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    pub(super) fn raw(&self) -> sys::CUstream {
        self.raw.raw
    }

    /// Before every call: while a thread captures, no other may put work here.
    pub(super) fn enter(&self) -> Result<(), DeviceError> {
        if self.captured_by().is_some_and(|thread| thread != std::thread::current().id()) {
            return Err(DeviceError::Failed("another thread captures this stream".into()));
        }
        self.raw.context.enter()
    }

    fn captured_by(&self) -> Option<ThreadId> {
        *self.capturing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_captured_by(&self, thread: Option<ThreadId>) {
        *self.capturing.lock().unwrap_or_else(PoisonError::into_inner) = thread;
    }

    /// Keeps something until what was issued before now has ended.
    ///
    /// # Errors
    /// When the device is lost.
    pub fn keep(&self, kept: impl Any + Send) -> Result<(), DeviceError> {
        let mut all = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        all.push(Box::new(kept));
        let many = all.len() >= KEPT_AHEAD && self.captured_by().is_none();
        drop(all);
        if many { self.mark(None).map(drop) } else { Ok(()) }
    }

    /// An event behind all that was issued, with what that needs.
    pub(super) fn mark(&self, notify: Option<Event>) -> Result<Arc<RawEvent>, DeviceError> {
        self.enter()?;
        if self.captured_by().is_some() {
            return Err(DeviceError::Failed("events are not captured".into()));
        }
        let event = Arc::new(RawEvent::new(&self.raw.context, false)?);
        // Taken first: what is kept later may belong to work behind the event.
        let kept = std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner));
        // SAFETY: both live.
        let recorded = check("cuEventRecord", unsafe { sys::cuEventRecord(event.raw, self.raw.raw) });
        if let Err(error) = recorded {
            // On a lost device nothing runs any more and what was kept may go; else it may still be needed.
            if !matches!(error, DeviceError::Lost(_)) {
                self.kept.lock().unwrap_or_else(PoisonError::into_inner).extend(kept);
            }
            return Err(error);
        }
        let completion = Completion { event: event.clone(), notify, kept: Some(kept) };
        self.completions
            .send(completion)
            .map_err(|_| DeviceError::Lost("the thread that waits for its events ended".into()))?;
        Ok(event)
    }

    /// Blocks the thread until all that was issued has ended.
    ///
    /// # Errors
    /// When any of it failed.
    pub fn synchronize(&self) -> Result<(), DeviceError> {
        self.enter()?;
        let kept = std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner));
        // SAFETY: the stream lives.
        let ended = check("cuStreamSynchronize", unsafe { sys::cuStreamSynchronize(self.raw.raw) });
        match &ended {
            Ok(()) | Err(DeviceError::Lost(_)) => drop(kept),
            Err(_) => self.kept.lock().unwrap_or_else(PoisonError::into_inner).extend(kept),
        }
        ended
    }

    /// Launches a kernel; none where the grid is empty.
    ///
    /// # Safety
    /// Every address in `params` must be of memory that is large enough for what the kernel does there, and that `self` keeps.
    pub(super) unsafe fn launch<P: Params>(
        &self,
        kernel: &Kernel<P>,
        grid: [u32; 3],
        threads: u32,
        params: &P,
    ) -> Result<(), DeviceError> {
        if grid.contains(&0) {
            return Ok(());
        }
        if !kernel.is_of(&self.raw.context) {
            return Err(DeviceError::Failed("a kernel of another device".into()));
        }
        self.enter()?;
        let mut arguments = [std::ptr::from_ref(params) as *mut std::ffi::c_void];
        let [x, y, z] = grid;
        // SAFETY: the kernel takes one parameter of this size (checked when it was loaded), which the driver copies now; the caller
        // vouches for what is in it.
        check("cuLaunchKernel", unsafe {
            sys::cuLaunchKernel(
                kernel.raw(),
                x,
                y,
                z,
                threads,
                1,
                1,
                0,
                self.raw.raw,
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        })
    }

    /// Copies bytes of this process to the device, by way of pinned memory that is kept until they are there.
    ///
    /// # Errors
    /// When they do not fit.
    pub fn upload(&self, bytes: &[u8], target: &CudaMemory, offset: usize) -> Result<(), DeviceError> {
        check_inside(offset, bytes.len(), target.len())?;
        if bytes.is_empty() {
            return Ok(());
        }
        let mut lent = self.device.lend_pinned(bytes.len())?;
        lent.as_mut().copy_from_slice(bytes);
        let target_at = target.address() + offset as u64;
        let copied = self.copy_spans(&[Span::new(lent.address(), target_at, bytes.len())]);
        self.keep((lent, target.clone()))?;
        copied
    }

    /// The first bytes of device memory, once all that was issued has ended.
    ///
    /// # Errors
    /// When there are fewer, or anything that was issued failed.
    pub fn download(&self, source: &CudaMemory, bytes: usize) -> Result<Vec<u8>, DeviceError> {
        check_inside(0, bytes, source.len())?;
        let lent = self.device.lend_pinned(bytes)?;
        let span = Span::new(source.address(), lent.address(), bytes);
        let copied = self.copy_spans(&[span]).and_then(|()| self.synchronize());
        if let Err(error) = copied {
            // It may still be written.
            self.keep(lent)?;
            return Err(error);
        }
        Ok(lent.as_ref().to_vec())
    }

    pub(super) fn copy_spans(&self, spans: &[Span]) -> Result<(), DeviceError> {
        self.enter()?;
        let mut rest = spans;
        while rest.len() > 1 && self.raw.context.batched_copies {
            let (batch, after) = rest.split_at(rest.len().min(MAX_BATCH));
            if !self.copy_batch(batch)? {
                break;
            }
            rest = after;
        }
        for span in rest {
            // SAFETY: the regions were checked; what they are part of is kept.
            check("cuMemcpyAsync", unsafe {
                sys::cuMemcpyAsync(span.target, span.source, span.bytes, self.raw.raw)
            })?;
        }
        Ok(())
    }

    /// One call for all; says whether the driver does that.
    fn copy_batch(&self, spans: &[Span]) -> Result<bool, DeviceError> {
        let mut targets: Vec<u64> = spans.iter().map(|span| span.target).collect();
        let mut sources: Vec<u64> = spans.iter().map(|span| span.source).collect();
        let mut sizes: Vec<usize> = spans.iter().map(|span| span.bytes).collect();
        let nowhere =
            sys::CUmemLocation_st { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
        let mut attributes = sys::CUmemcpyAttributes_st {
            srcAccessOrder: sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
            srcLocHint: nowhere,
            dstLocHint: nowhere,
            flags: 0,
        };
        let mut first = 0usize;
        // SAFETY: three arrays of one length; one attribute, for all from the first on; the regions were checked and are kept.
        let code = unsafe {
            sys::cuMemcpyBatchAsync_v2(
                targets.as_mut_ptr(),
                sources.as_mut_ptr(),
                sizes.as_mut_ptr(),
                spans.len(),
                &mut attributes,
                &mut first,
                1,
                self.raw.raw,
            )
        };
        use sys::CUresult::{CUDA_ERROR_NOT_FOUND, CUDA_ERROR_NOT_SUPPORTED};
        if [CUDA_ERROR_NOT_FOUND, CUDA_ERROR_NOT_SUPPORTED].contains(&code) {
            return Ok(false);
        }
        check("cuMemcpyBatchAsync", code)?;
        Ok(true)
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        let kept = !self.kept.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        if kept && let Err(error) = self.mark(None) {
            let kept = std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner));
            // On a lost device nothing runs any more. Else it may still be in use: better leaked than freed.
            if !matches!(error, DeviceError::Lost(_)) {
                std::mem::forget(kept);
            }
        }
    }
}

pub(super) fn address(buffer: &Buffer<CudaDevice>) -> u64 {
    match buffer {
        Buffer::Device(memory) => memory.address(),
        Buffer::Pinned(pinned) => pinned.address(),
    }
}

pub(super) fn len(buffer: &Buffer<CudaDevice>) -> usize {
    match buffer {
        Buffer::Device(memory) => memory.len(),
        Buffer::Pinned(pinned) => pinned.len(),
    }
}

pub(super) fn check_writable(target: &Buffer<CudaDevice>) -> Result<(), DeviceError> {
    match target {
        Buffer::Pinned(pinned) if !pinned.is_writable() => {
            Err(DeviceError::Failed("memory that is registered for reading only".into()))
        }
        _ => Ok(()),
    }
}

pub(super) fn check_inside(offset: usize, bytes: usize, len: usize) -> Result<(), DeviceError> {
    let end = offset.saturating_add(bytes);
    if end > len { Err(DeviceError::OutOfBounds { offset, end, len }) } else { Ok(()) }
}

/// Copies are made one no further than this: a small copy of another stream waits for the one that is going on, a fraction of a millisecond then.
const MERGED_BYTES: usize = 8 << 20;

/// Copies that continue each other on both sides, as one.
fn merge(mut spans: Vec<Span>) -> Vec<Span> {
    spans.retain(|span| span.bytes > 0);
    let mut merged: Vec<Span> = Vec::with_capacity(spans.len());
    for span in spans {
        match merged.last_mut() {
            Some(last)
                if last.within == span.within
                    && last.bytes + span.bytes <= MERGED_BYTES
                    && last.source + last.bytes as u64 == span.source
                    && last.target + last.bytes as u64 == span.target =>
            {
                last.bytes += span.bytes;
            }
            _ => merged.push(span),
        }
    }
    merged
}

impl Stream for CudaStream {
    type Device = CudaDevice;

    fn copy(&self, copies: Vec<Copy<CudaDevice>>) -> Result<(), DeviceError> {
        let mut spans = Vec::with_capacity(copies.len());
        for Copy { source, target } in &copies {
            check_inside(source.offset, source.bytes, len(&source.buffer))?;
            check_inside(target.offset, target.bytes, len(&target.buffer))?;
            check_writable(&target.buffer)?;
            let (from, to) = (source.bytes, target.bytes);
            if from != to {
                return Err(DeviceError::SizeMismatch { from, to });
            }
            spans.push(Span {
                source: address(&source.buffer) + source.offset as u64,
                target: address(&target.buffer) + target.offset as u64,
                bytes: from,
                within: [address(&source.buffer), address(&target.buffer)],
            });
        }
        let copied = self.copy_spans(&merge(spans));
        // Some may have been issued whatever came after them.
        self.keep(
            copies.into_iter().map(|copy| (copy.source.buffer, copy.target.buffer)).collect::<Vec<_>>(),
        )?;
        copied
    }

    fn scatter(
        &self,
        shape: PagedShape,
        staging: &Buffer<CudaDevice>,
        pool: &CudaMemory,
        moves: Vec<BlockMove>,
    ) -> Result<(), DeviceError> {
        let kernels = self.device.move_kernels(shape)?;
        self.scatter_layers(&kernels, 0..shape.layers, staging, pool, &moves)
    }

    fn gather(
        &self,
        shape: PagedShape,
        pool: &CudaMemory,
        staging: &Buffer<CudaDevice>,
        moves: Vec<BlockMove>,
    ) -> Result<(), DeviceError> {
        let kernels = self.device.move_kernels(shape)?;
        self.gather_layers(&kernels, 0..shape.layers, pool, staging, &moves)
    }

    fn record(&self) -> Result<Event, DeviceError> {
        let event = Event::pending();
        let raw = self.mark(Some(event.clone()))?;
        event.attach(raw);
        Ok(event)
    }

    /// An event of another kind of device cannot be waited for by a stream of this one: the calling thread waits then.
    fn wait(&self, event: &Event) -> Result<(), DeviceError> {
        let Some(raw) = event.attached::<RawEvent>() else {
            let _ = event.wait();
            return Ok(());
        };
        self.enter()?;
        // SAFETY: both live.
        check("cuStreamWaitEvent", unsafe { sys::cuStreamWaitEvent(self.raw.raw, raw.raw, 0) })?;
        self.keep(raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_that_continue_each_other_are_one() {
        let span = |source, target, bytes| Span { source, target, bytes, within: [0, 100] };
        let merged =
            merge(vec![span(0, 100, 8), span(8, 108, 8), span(16, 200, 4), span(20, 0, 0), span(20, 204, 4)]);
        assert_eq!(merged, [span(0, 100, 16), span(16, 200, 8)]);
        let next = Span { within: [8, 100], ..span(8, 108, 8) };
        assert_eq!(merge(vec![span(0, 100, 8), next]).len(), 2, "not across two memories");
        let long = MERGED_BYTES as u64;
        assert_eq!(merge(vec![span(0, 0, MERGED_BYTES), span(long, long, 4)]).len(), 2, "not without end");
    }
}
