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
    poll_fn(|cx| -> Poll<()> {
        for connection in waiting.connections.borrow_mut().drain(..) {
            // One held here alone was given up meanwhile.
            if Rc::strong_count(&connection) > 1 {
                connection.borrow_mut().depart();
            }
        }
        *waiting.task.borrow_mut() = Some(cx.waker().clone());
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::pin::Pin;
    use std::task::Context;

    use http::uri::PathAndQuery;
    use http::{HeaderMap, Method};
    use http_body::Frame;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::upstream::connect::Connection;
    use crate::upstream::http1::{self, RequestHead};

    /// A body that nobody may poll here.
    struct Panics;

    impl Body for Panics {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            panic!("a body that panics")
        }
    }

    async fn connection(listener: &TcpListener) -> (Rc<RefCell<Http1<Panics>>>, TcpStream) {
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let connection = Rc::new(RefCell::new(Http1::new(Connection::plain(stream))));
        let head = RequestHead { method: Method::POST, target: PathAndQuery::from_static("/x"), headers: HeaderMap::new() };
        connection.borrow_mut().begin(&head, Panics);
        (connection, listener.accept().await.unwrap().0)
    }

    async fn arrives(stream: &mut TcpStream) -> Vec<u8> {
        let mut received = vec![0; 100];
        let length = stream.read(&mut received).await.unwrap();
        received.truncate(length);
        received
    }

    #[tokio::test(flavor = "local")]
    async fn what_nobody_waits_for_any_more_is_not_sent() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let departures = Departures::start();
        let (connection, mut upstream) = connection(&listener).await;
        departures.add(connection);
        assert_eq!(arrives(&mut upstream).await, b"", "the connection closes");
    }

    /// D11: a connection that ends, or speaks first, before the request departs has not got it: any method may go elsewhere, with its body.
    #[tokio::test(flavor = "local")]
    async fn d11_what_comes_before_the_departure_is_no_answer() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        for bytes in ["", "HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n"] {
            let (connection, mut upstream) = connection(&listener).await;
            upstream.write_all(bytes.as_bytes()).await.unwrap();
            drop(upstream);
            let came = poll_fn(|cx| connection.borrow_mut().poll_head(cx)).await;
            assert!(matches!(came, Err(http1::Error::NotSent)), "{bytes:?}: {came:?}");
            assert!(connection.borrow_mut().take_back().is_some());
        }
    }
}
