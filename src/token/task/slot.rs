//! Room for one future that goes on while other things are waited for.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;

use futures_util::FutureExt;

/// The future panicked.
#[derive(Debug)]
pub(super) struct Panicked;

/// Holds at most one future, so that what is at most one at a time is so by construction.
pub(super) struct Slot<T>(Option<Guarded<T>>);

type Guarded<T> = Pin<Box<dyn Future<Output = Result<T, Panicked>>>>;

impl<T> Slot<T> {
    pub(super) fn empty() -> Self {
        Self(None)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Puts `future` in; one that is there already is dropped, and so cancelled.
    ///
    /// A panic of the future ends it alone. Whoever waits for the token would wait in vain if it ended the task.
    pub(super) fn fill(&mut self, future: impl Future<Output = T> + 'static) {
        // Nothing that the future shares with the task is left half-changed: it shares reference counts and a cell that is written whole.
        let future = AssertUnwindSafe(future).catch_unwind().map(|result| result.map_err(|_| Panicked));
        self.0 = Some(Box::pin(future));
    }

    /// Waits for the end of the future; for ever while the slot is empty. Dropping this loses nothing: the future stays in the slot.
    pub(super) async fn finished(&mut self) -> Result<T, Panicked> {
        let Some(future) = &mut self.0 else { return std::future::pending().await };
        let result = future.await;
        self.0 = None;
        result
    }
}
