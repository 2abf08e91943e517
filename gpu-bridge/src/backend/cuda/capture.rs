//! Work of a stream that is captured once and run again and again.

use super::context::{Context, check};
use super::stream::{CudaStream, Kept};
use crate::DeviceError;
use cudarc::driver::sys;
use std::sync::{Arc, Mutex, PoisonError};

impl CudaStream {
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
