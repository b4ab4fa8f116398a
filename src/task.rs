//! The one way to start a task: named, local to its thread, and awaited by whoever holds the handle; and a way for one to let others go first.

use std::future::{Future, poll_fn};
use std::task::Poll;

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

/// Lets every task that is ready now run first. Unlike tokio's `yield_now` it does not wait until the system was asked for events.
pub(crate) async fn step_back() {
    let mut stepped_back = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut stepped_back, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
