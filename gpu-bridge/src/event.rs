//! The completion of a point in a stream, as a value: poll it, block on it or await it.

use crate::DeviceError;
use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

type Outcome = Result<(), DeviceError>;

#[derive(Default)]
struct State {
    outcome: Option<Outcome>,
    wakers: Vec<Waker>,
    /// The same point as the device knows it.
    native: Option<Arc<dyn Any + Send + Sync>>,
}

/// Clones name the same point.
#[derive(Clone, Default)]
pub struct Event(Arc<(Mutex<State>, Condvar)>);

impl Event {
    /// An event that nothing has completed yet.
    pub fn pending() -> Self {
        Self::default()
    }

    /// Completes it, once; later calls change nothing.
    pub fn complete(&self, outcome: Outcome) {
        let wakers = {
            let mut state = self.state();
            state.outcome.get_or_insert(outcome);
            std::mem::take(&mut state.wakers)
        };
        self.0.1.notify_all();
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Says what the point is called on the device, so that its streams can wait for it there.
    pub(crate) fn attach(&self, native: Arc<dyn Any + Send + Sync>) {
        self.state().native = Some(native);
    }

    /// What the point is called on a device of this kind.
    pub(crate) fn attached<T: Any + Send + Sync>(&self) -> Option<Arc<T>> {
        self.state().native.clone()?.downcast().ok()
    }

    /// The outcome, if it is known.
    pub fn outcome(&self) -> Option<Outcome> {
        self.state().outcome.clone()
    }

    /// Blocks the thread until it completes.
    ///
    /// # Errors
    /// What failed before this point of the stream.
    pub fn wait(&self) -> Outcome {
        let mut state = self.state();
        loop {
            if let Some(outcome) = &state.outcome {
                return outcome.clone();
            }
            state = self.0.1.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Every change of the state is a single assignment, so a panic elsewhere leaves it whole.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Future for Event {
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        let mut state = self.state();
        if let Some(outcome) = &state.outcome {
            return Poll::Ready(outcome.clone());
        }
        if !state.wakers.iter().any(|waker| waker.will_wake(context.waker())) {
            state.wakers.push(context.waker().clone());
        }
        Poll::Pending
    }
}
