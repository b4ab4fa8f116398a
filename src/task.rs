//! The one way to start a task: named, local to its thread, and awaited by whoever holds the handle.

use std::future::Future;

use tokio::task::JoinHandle;
use tracing::Instrument;

/// Starts `future` on the current thread's runtime; its log lines carry `name`. A panic ends this task alone and reaches whoever awaits the handle.
#[allow(clippy::disallowed_methods)] // the wrapper that the ban points to
pub fn spawn<F>(name: &'static str, future: F) -> JoinHandle<F::Output>
where
    F: Future + 'static,
    F::Output: 'static,
{
    tokio::task::spawn_local(future.instrument(tracing::debug_span!("task", name)))
}
