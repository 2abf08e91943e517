//! A stream: work in order, and a thread that waits for its events.
//!
//! Whatever work names is kept until an event behind that work has completed; the thread that waits for the event lets it go. No
//! callback runs inside the driver, and a lost device ends every wait with its error.

use super::CudaDevice;
use super::context::{Context, check};
use super::memory::{CudaMemory, CudaPinned};
use super::programs::{Kernel, MoveKernels};
use crate::{BlockMove, Buffer, Copy, DeviceError, Event, PagedShape, Priority, Stream};
use cairn_kernels::cuda::{MoveEntry, MoveParams, Params};
use cudarc::driver::sys;
use std::any::Any;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;

/// Events that wait to complete; whoever records more waits for the oldest.
const EVENTS_AHEAD: usize = 4096;

/// Things that are kept for work before an event is recorded for their sake alone.
const KEPT_AHEAD: usize = 1024;

/// Moves of one launch: the size of a stream's descriptor buffers.
const MOVES_PER_LAUNCH: usize = 4096;

/// Blocks of a launch that moves KV: each of its warps takes tasks until none is left.
const MOVE_BLOCKS: u32 = 2048;

/// Something that work in flight needs.
type Kept = Box<dyn Any + Send>;

struct RawStream {
    context: Arc<Context>,
    raw: sys::CUstream,
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

/// A point of a stream, as CUDA knows it.
pub(super) struct RawEvent {
    context: Arc<Context>,
    raw: sys::CUevent,
}

// SAFETY: the driver lets any thread use an event.
unsafe impl Send for RawEvent {}
// SAFETY: as above.
unsafe impl Sync for RawEvent {}

impl RawEvent {
    fn new(context: &Arc<Context>, timed: bool) -> Result<Self, DeviceError> {
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

struct Completion {
    event: Arc<RawEvent>,
    notify: Option<Event>,
    kept: Option<Vec<Kept>>,
}

impl Completion {
    /// Waits, says so, and lets go.
    fn finish(mut self) {
        let outcome = self.event.wait();
        if let Some(event) = self.notify.take() {
            event.complete(outcome);
        }
        drop(self.kept.take());
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

/// A stream of a [`CudaDevice`].
pub struct CudaStream {
    device: CudaDevice,
    raw: Arc<RawStream>,
    kept: Mutex<Vec<Kept>>,
    /// Work is recorded into a graph instead of issued.
    capturing: Mutex<Option<ThreadId>>,
    descriptors: Arc<Mutex<Vec<Descriptors>>>,
    completions: SyncSender<Completion>,
}

/// Where the moves of one launch are written before and while it runs.
struct Descriptors {
    host: CudaPinned,
    device: CudaMemory,
}

/// Returns descriptors to their stream when a launch has ended.
struct Borrowed(Option<Descriptors>, Arc<Mutex<Vec<Descriptors>>>);

impl Drop for Borrowed {
    fn drop(&mut self) {
        self.1.lock().unwrap_or_else(PoisonError::into_inner).extend(self.0.take());
    }
}

/// One copy as the driver wants it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Span {
    source: u64,
    target: u64,
    bytes: usize,
    /// Where the memories begin of which these are parts: a copy must not cross from one into the next.
    within: [u64; 2],
}

impl Span {
    fn new(source: u64, target: u64, bytes: usize) -> Self {
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

    fn set_captured_by(&self, thread: Option<ThreadId>) {
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
    fn mark(&self, notify: Option<Event>) -> Result<Arc<RawEvent>, DeviceError> {
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

    /// Records the work that `issue` gives this stream, instead of running it. Only this thread may use the stream meanwhile, and `issue`
    /// must neither allocate nor wait.
    ///
    /// # Errors
    /// What `issue` fails with, or when something in it cannot be captured.
    pub(super) fn capture(
        &self,
        issue: impl FnOnce() -> Result<(), DeviceError>,
    ) -> Result<Graph, DeviceError> {
        // What was kept before belongs to work that runs.
        self.mark(None)?;
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(self.raw.raw, mode) })?;
        self.set_captured_by(Some(std::thread::current().id()));
        let issued = issue();
        let mut graph = std::ptr::null_mut();
        // SAFETY: capturing since above; the graph is written.
        let ended = check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(self.raw.raw, &mut graph) });
        self.set_captured_by(None);
        let kept = std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner));
        if let Err(error) = issued.and(ended) {
            if !graph.is_null() {
                // SAFETY: made above, and not used.
                let _ = unsafe { sys::cuGraphDestroy(graph) };
            }
            return Err(error);
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: the graph was just made; the executable form is written, and the graph itself is not needed after it.
        let made = unsafe {
            let made = check("cuGraphInstantiate", sys::cuGraphInstantiateWithFlags(&mut raw, graph, 0));
            let _ = sys::cuGraphDestroy(graph);
            made
        };
        made?;
        let context = self.raw.context.clone();
        Ok(Graph(Arc::new(RawGraph { context, raw, _kept: Mutex::new(kept) })))
    }

    /// Runs what was captured.
    pub(super) fn run(&self, graph: &Graph) -> Result<(), DeviceError> {
        self.enter()?;
        // SAFETY: the graph lives, and all that it names with it; it is kept until it has run.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(graph.0.raw, self.raw.raw) })?;
        self.keep(graph.0.clone())
    }

    fn copy_spans(&self, spans: &[Span]) -> Result<(), DeviceError> {
        self.enter()?;
        if spans.len() > 1 && self.raw.context.batched_copies && self.copy_batch(spans)? {
            return Ok(());
        }
        for span in spans {
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

    fn borrow_descriptors(&self) -> Result<Descriptors, DeviceError> {
        if let Some(free) = self.descriptors.lock().unwrap_or_else(PoisonError::into_inner).pop() {
            return Ok(free);
        }
        let bytes = MOVES_PER_LAUNCH * size_of::<MoveEntry>();
        let device = CudaMemory::allocate(&self.raw.context, bytes)?;
        Ok(Descriptors { host: CudaPinned::allocate(&self.raw.context, bytes)?, device })
    }

    /// Issues the moves of some layers of blocks. See [`Stream::scatter`].
    ///
    /// # Errors
    /// When a block or layer does not fit; nothing is issued then.
    pub fn scatter_layers(
        &self,
        kernels: &MoveKernels,
        layers: Range<usize>,
        staging: &Buffer<CudaDevice>,
        pool: &CudaMemory,
        moves: &[BlockMove],
    ) -> Result<(), DeviceError> {
        self.move_blocks(kernels, &kernels.scatter, layers, staging, pool, moves)
    }

    /// The inverse of [`Self::scatter_layers`].
    ///
    /// # Errors
    /// When a block or layer does not fit; nothing is issued then.
    pub fn gather_layers(
        &self,
        kernels: &MoveKernels,
        layers: Range<usize>,
        pool: &CudaMemory,
        staging: &Buffer<CudaDevice>,
        moves: &[BlockMove],
    ) -> Result<(), DeviceError> {
        check_writable(staging)?;
        self.move_blocks(kernels, &kernels.gather, layers, staging, pool, moves)
    }

    fn move_blocks(
        &self,
        kernels: &MoveKernels,
        kernel: &Kernel<MoveParams>,
        layers: Range<usize>,
        staging: &Buffer<CudaDevice>,
        pool: &CudaMemory,
        moves: &[BlockMove],
    ) -> Result<(), DeviceError> {
        let shape = &kernels.shape;
        check_moves(kernels, &layers, staging, pool, moves)?;
        for part in moves.chunks(MOVES_PER_LAUNCH) {
            let entry = |each: &BlockMove| MoveEntry {
                staging_offset: each.staging_offset as u64,
                slot: each.slot as u64,
            };
            let entries: Vec<MoveEntry> = part.iter().map(entry).collect();
            let bytes = bytemuck::cast_slice(&entries);
            let mut descriptors = self.borrow_descriptors()?;
            descriptors.host.as_mut()[..bytes.len()].copy_from_slice(bytes);
            let source = descriptors.host.address();
            let target = descriptors.device.address();
            let params = MoveParams {
                staging: address(staging),
                pool: pool.address(),
                moves: target,
                count: part.len() as u32,
                slots: shape.slots as u32,
                first_layer: layers.start as u32,
                layers: layers.len() as u32,
                all_layers: shape.layers as u32,
                padding: 0,
            };
            let tasks = part.len() * layers.len() * 2 * shape.kv_heads;
            let blocks = (tasks.div_ceil(8) as u32).min(MOVE_BLOCKS);
            let copied = self.copy_spans(&[Span::new(source, target, bytes.len())]);
            // SAFETY: every block was checked to lie inside the staging memory and the pool; all of it is kept.
            let launched = copied.and_then(|()| unsafe { self.launch(kernel, [blocks, 1, 1], 256, &params) });
            let borrowed = Borrowed(Some(descriptors), self.descriptors.clone());
            self.keep((borrowed, staging.clone(), pool.clone()))?;
            launched?;
        }
        Ok(())
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

fn complete(stream: Arc<RawStream>, completions: Receiver<Completion>) {
    for completion in completions {
        // What is woken or dropped here is others' code; its panic must not end the waiting.
        let finished = std::panic::catch_unwind(AssertUnwindSafe(|| completion.finish()));
        if finished.is_err() {
            tracing::error!("something that a stream kept, or a waker, panicked");
        }
    }
    drop(stream);
}

fn address(buffer: &Buffer<CudaDevice>) -> u64 {
    match buffer {
        Buffer::Device(memory) => memory.address(),
        Buffer::Pinned(pinned) => pinned.address(),
    }
}

fn len(buffer: &Buffer<CudaDevice>) -> usize {
    match buffer {
        Buffer::Device(memory) => memory.len(),
        Buffer::Pinned(pinned) => pinned.len(),
    }
}

fn check_writable(target: &Buffer<CudaDevice>) -> Result<(), DeviceError> {
    match target {
        Buffer::Pinned(pinned) if !pinned.is_writable() => {
            Err(DeviceError::Failed("memory that is registered for reading only".into()))
        }
        _ => Ok(()),
    }
}

fn check_inside(offset: usize, bytes: usize, len: usize) -> Result<(), DeviceError> {
    let end = offset.saturating_add(bytes);
    if end > len { Err(DeviceError::OutOfBounds { offset, end, len }) } else { Ok(()) }
}

fn check_moves(
    kernels: &MoveKernels,
    layers: &Range<usize>,
    staging: &Buffer<CudaDevice>,
    pool: &CudaMemory,
    moves: &[BlockMove],
) -> Result<(), DeviceError> {
    let shape = &kernels.shape;
    let block = kernels.wire_block_bytes();
    if shape.checked_pool_bytes() != Some(pool.len()) {
        return Err(DeviceError::SizeMismatch {
            from: shape.checked_pool_bytes().unwrap_or(usize::MAX),
            to: pool.len(),
        });
    }
    check_inside(layers.start, layers.len(), shape.layers)?;
    for each in moves {
        check_inside(each.staging_offset, block, len(staging))?;
        check_inside(each.slot, 1, shape.slots)?;
        if !each.staging_offset.is_multiple_of(16) || !address(staging).is_multiple_of(16) {
            return Err(DeviceError::Failed(
                "blocks in staging memory begin at multiples of 16 bytes".into(),
            ));
        }
    }
    Ok(())
}

/// Copies that continue each other on both sides, as one.
fn merge(mut spans: Vec<Span>) -> Vec<Span> {
    spans.retain(|span| span.bytes > 0);
    let mut merged: Vec<Span> = Vec::with_capacity(spans.len());
    for span in spans {
        match merged.last_mut() {
            Some(last)
                if last.within == span.within
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

struct RawGraph {
    context: Arc<Context>,
    raw: sys::CUgraphExec,
    /// Everything that its work names.
    _kept: Mutex<Vec<Kept>>,
}

// SAFETY: the driver lets any thread use a graph.
unsafe impl Send for RawGraph {}
// SAFETY: as above.
unsafe impl Sync for RawGraph {}

impl Drop for RawGraph {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: made in `CudaStream::capture`; whoever runs it keeps it.
            let _ = unsafe { sys::cuGraphExecDestroy(self.raw) };
        }
    }
}

/// Work that was captured, to be run again and again.
pub(super) struct Graph(Arc<RawGraph>);

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
        if !super::context::has_call(b"cuEventElapsedTime_v2\0") {
            return Err(DeviceError::Failed("taking times needs a driver of CUDA 12.8 or later".into()));
        }
        // SAFETY: both events have completed; one number is written.
        check("cuEventElapsedTime", unsafe {
            sys::cuEventElapsedTime_v2(&mut ms, self.start.raw, self.end.raw)
        })?;
        Ok(f64::from(ms) / 1e3)
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
    }
}
