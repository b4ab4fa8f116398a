//! Requests that came together go together.
//!
//! A write wakes whoever reads at the other end, and on one host that costs as much as the write itself. An upstream, or what stands for it on this
//! host, that gets one request between two of this thread's reads falls asleep after each; one that gets several in a row is woken for the first alone.
//! So what is to be sent waits until everything that is ready now was read, a few microseconds, and is then sent at once.

use std::cell::RefCell;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

use bytes::Bytes;
use http_body::Body;
use tokio::task::AbortHandle;

use super::http1::Http1;
use crate::task;

/// The requests of one pool that wait to be sent. Its task ends with it.
pub(super) struct Departures<B> {
    waiting: Rc<Waiting<B>>,
    task: AbortHandle,
}

struct Waiting<B> {
    connections: RefCell<Vec<Rc<RefCell<Http1<B>>>>>,
    task: RefCell<Option<Waker>>,
}

impl<B> Departures<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
{
    /// Must be called on the worker's runtime.
    pub(super) fn start() -> Self {
        let waiting = Rc::new(Waiting { connections: RefCell::default(), task: RefCell::default() });
        let task = task::spawn("departures", depart(Rc::clone(&waiting))).abort_handle();
        Self { waiting, task }
    }

    /// Sends the request that was begun on `connection` behind everything that is ready now; unless nobody else holds the connection by then.
    pub(super) fn add(&self, connection: Rc<RefCell<Http1<B>>>) {
        self.waiting.connections.borrow_mut().push(connection);
        if let Some(task) = self.waiting.task.take() {
            task.wake();
        }
    }
}

impl<B> Drop for Departures<B> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Runs whenever it was woken, which puts it at the end of the runtime's queue.
async fn depart<B>(waiting: Rc<Waiting<B>>)
where
    B: Body<Data = Bytes> + Unpin + 'static,
{
    poll_fn(|cx| {
        for connection in waiting.connections.borrow_mut().drain(..) {
            // One held here alone was given up meanwhile.
            if Rc::strong_count(&connection) > 1 {
                connection.borrow_mut().depart();
            }
        }
        *waiting.task.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    })
    .await
}
