//! One worker's connections to the upstream.
//!
//! HTTP/1.1 connections wait in a stack: the one used last is used next, so that a quiet proxy lets the others run into their idle timeout. An HTTP/2
//! connection is shared by its requests. Each connection is driven by a task of its own, not by the request that uses it. Everything here lives on one
//! thread: no lock, and a request never waits for another worker.
//!
//! A connection goes back on the stack only when hyper reports that both the request and the response are complete; in any other case, a cancelled
//! exchange included, it is closed. Nothing dirty is ever reused.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, TRANSFER_ENCODING};
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Request, Response, Uri};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::connect::{ConnectError, Connection, Connector};
use crate::config::{self, HttpVersion};
use crate::metrics::WorkerMetrics;
use crate::task;

/// An idle HTTP/2 connection is pinged this often and given up [`PING_TIMEOUT`] later: half-open ones are found within 20 s.
const PING_INTERVAL: Duration = Duration::from_secs(15);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Of a response head, in bytes; more is a broken upstream (502). So are more than 100 fields, which is hyper's default: with another number it would
/// allocate 12 KiB for each head.
///
/// It also bounds what each direction of an HTTP/1.1 connection buffers, where hyper's own limit of 408 KiB would cost a large body as much memory.
const MAX_RESPONSE_HEAD: usize = 64 * 1024;
/// Streams that one HTTP/2 connection carries before another is opened: the least that RFC 9113 section 6.5.2 recommends upstreams to allow. Where one
/// allows fewer, the rest queue inside h2, bounded by the response timeout.
const MAX_STREAMS: usize = 100;

/// What can be known of a request that brought no response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evidence {
    /// The upstream said that it did not process it (HTTP/2 `REFUSED_STREAM`, or a GOAWAY that leaves the stream out; RFC 9113 section 8.7).
    NotProcessed,
    /// A pooled connection closed before the first byte of the reply. It was probably closed before the request came, but nobody knows.
    ClosedBeforeReply,
}

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The request's own body failed; the cause lies downstream.
    #[error("the request body failed: {0}")]
    RequestBody(hyper::Error),
    /// The connection broke, or what came back is not HTTP.
    #[error("{}", describe(.0))]
    Protocol(hyper::Error),
}

/// A hyper error with its causes, for the log. Hyper quotes nothing of a message.
fn describe(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(current) = cause {
        text = format!("{text}: {current}");
        cause = current.source();
    }
    text
}

/// The pool of one worker. `B` is the request body.
pub struct Upstream<B: Body> {
    connector: Connector,
    authority: Authority,
    http1: http1::Builder,
    http2: http2::Builder<LocalExecutor>,
    /// False once it is known that all connections are HTTP/1.1.
    may_be_http2: Cell<bool>,
    prior_knowledge: bool,
    #[expect(clippy::vec_box, reason = "a connection moves in and out once per request, and its box is cheaper to move")]
    idle: RefCell<Vec<Box<Http1<B>>>>,
    shared: RefCell<Vec<Rc<Http2<B>>>>,
    /// Held while a connection is opened that may turn out to be shareable, so that a burst opens one.
    dialing: tokio::sync::Mutex<()>,
    idle_timeout: Duration,
    max_age: Duration,
    metrics: Arc<WorkerMetrics>,
}

/// An HTTP/1.1 connection that carries one request at a time. Boxed for its whole life, since it moves with every request and response.
struct Http1<B> {
    sender: http1::SendRequest<B>,
    driver: AbortHandle,
    received: Rc<Cell<u64>>,
    expires: Instant,
    idle_since: Instant,
}

/// An HTTP/2 connection that carries many.
struct Http2<B> {
    sender: http2::SendRequest<B>,
    expires: Instant,
    usage: Rc<Usage>,
    last_used: Cell<Instant>,
}

/// How many streams an HTTP/2 connection carries, which decides whether it counts as idle or as active.
struct Usage {
    streams: Cell<usize>,
    open: Cell<bool>,
    metrics: Arc<WorkerMetrics>,
}

impl Usage {
    fn opened(metrics: Arc<WorkerMetrics>) -> Rc<Self> {
        metrics.upstream_connections(1, 0);
        Rc::new(Self { streams: Cell::new(0), open: Cell::new(true), metrics })
    }

    fn begin_stream(&self) {
        if self.streams.replace(self.streams.get() + 1) == 0 && self.open.get() {
            self.metrics.upstream_connections(-1, 1);
        }
    }

    fn end_stream(&self) {
        self.streams.set(self.streams.get() - 1);
        if self.streams.get() == 0 && self.open.get() {
            self.metrics.upstream_connections(1, -1);
        }
    }

    fn closed(&self) {
        self.open.set(false);
        let (idle, active) = if self.streams.get() == 0 { (-1, 0) } else { (0, -1) };
        self.metrics.upstream_connections(idle, active);
    }
}

/// Lets hyper start its HTTP/2 tasks on this thread.
#[derive(Debug, Clone, Copy)]
pub(super) struct LocalExecutor;

impl<F> hyper::rt::Executor<F> for LocalExecutor
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        task::spawn("upstream stream", future);
    }
}

impl<B> Upstream<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    /// Must be called on the worker's runtime: it starts the task that closes idle connections, which ends with the pool.
    pub fn start(connector: Connector, config: &config::Upstream, metrics: Arc<WorkerMetrics>) -> Rc<Self> {
        let mut http1 = http1::Builder::new();
        http1.max_header_size(MAX_RESPONSE_HEAD).max_buf_size(MAX_RESPONSE_HEAD);
        let mut http2 = http2::Builder::new(LocalExecutor);
        http2
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .max_header_list_size(u32::try_from(MAX_RESPONSE_HEAD).expect("a small constant"))
            .adaptive_window(true);
        let pool = Rc::new(Self {
            prior_knowledge: !connector.origin().tls && config.http_version == HttpVersion::Http2,
            may_be_http2: Cell::new(config.http_version != HttpVersion::Http1),
            authority: connector.origin().authority().parse().expect("an origin has a valid authority"),
            connector,
            http1,
            http2,
            idle: RefCell::default(),
            shared: RefCell::default(),
            dialing: tokio::sync::Mutex::default(),
            idle_timeout: config.pool_idle_timeout,
            max_age: config.max_connection_age,
            metrics,
        });
        task::spawn("pool reaper", reap(Rc::downgrade(&pool)));
        pool
    }

    /// Sends `request` and waits for the response head. Where the connection fails and nothing was sent, the same request goes to another one; where
    /// there is [`Evidence`] that it was not processed, `again` decides: once for each pooled connection that fails, at most once for a new one, and at
    /// most once where the upstream said so.
    ///
    /// Has no timeout but the connect timeout. Dropping the future closes the connection (HTTP/2: resets the stream). `now` is the time, which the
    /// caller has at hand; another reading of the clock costs a percent of a request.
    pub async fn send(
        self: &Rc<Self>,
        mut request: Request<B>,
        now: Instant,
        mut again: impl FnMut(Evidence) -> Option<Request<B>>,
    ) -> Result<Response<ReplyBody<B>>, SendError> {
        let (mut new_connection_failed, mut not_processed_before) = (false, false);
        loop {
            let (sent, reused) = match self.acquire(now).await? {
                Acquired::Http1 { connection, reused } => (self.send_http1(connection, request, reused).await, reused),
                Acquired::Http2 { connection, reused } => (self.send_http2(&connection, request, reused).await, reused),
            };
            let failure = match sent {
                Ok(response) => return Ok(response),
                Err(failure) => failure,
            };
            if !reused && std::mem::replace(&mut new_connection_failed, true) {
                return Err(failure.error);
            }
            request = match failure.what {
                Unsent::Returned(request) => *request,
                // Once: an HTTP/2 connection stays in the pool whatever becomes of its streams, and an upstream that refuses again wants to be left alone.
                Unsent::Evidence(Evidence::NotProcessed) if std::mem::replace(&mut not_processed_before, true) => return Err(failure.error),
                Unsent::Evidence(evidence) => match again(evidence) {
                    Some(request) => request,
                    None => return Err(failure.error),
                },
                Unsent::Unknown => return Err(failure.error),
            };
        }
    }

    /// The connection used last that can still be used, else a new one.
    async fn acquire(self: &Rc<Self>, now: Instant) -> Result<Acquired<B>, SendError> {
        match self.pooled(now) {
            Some(connection) => Ok(connection),
            // Rare and large: kept out of the future that every request moves.
            None => Box::pin(self.acquire_new()).await,
        }
    }

    async fn acquire_new(self: &Rc<Self>) -> Result<Acquired<B>, SendError> {
        if !self.may_be_http2.get() {
            return self.dial().await;
        }
        let _dialing = self.dialing.lock().await;
        match self.pooled(Instant::now()) {
            Some(connection) => Ok(connection),
            None => self.dial().await,
        }
    }

    fn pooled(&self, now: Instant) -> Option<Acquired<B>> {
        let mut shared = self.shared.borrow_mut();
        shared.retain(|connection| !connection.sender.is_closed() && connection.expires > now);
        if let Some(connection) = shared.iter().find(|connection| connection.usage.streams.get() < MAX_STREAMS) {
            connection.last_used.set(now);
            return Some(Acquired::Http2 { connection: Rc::clone(connection), reused: true });
        }
        let mut idle = self.idle.borrow_mut();
        while let Some(connection) = idle.pop() {
            self.metrics.upstream_connections(-1, 0);
            if connection.sender.is_ready() && connection.expires > now && now - connection.idle_since < self.idle_timeout {
                self.metrics.upstream_connections(0, 1);
                return Some(Acquired::Http1 { connection, reused: true });
            }
        }
        None
    }

    async fn dial(self: &Rc<Self>) -> Result<Acquired<B>, SendError> {
        let connection = self.connector.connect().await.inspect_err(|error| self.metrics.upstream_connect(error.label()))?;
        self.metrics.upstream_connect("success");
        // Up to a tenth less, so that connections opened together are not replaced together.
        let expires = Instant::now() + self.max_age.mul_f64(1.0 - 0.1 * fastrand::f64());
        if connection.is_http2() || self.prior_knowledge {
            self.start_http2(connection, expires).await
        } else {
            self.start_http1(connection, expires).await
        }
    }

    async fn start_http1(self: &Rc<Self>, connection: Connection, expires: Instant) -> Result<Acquired<B>, SendError> {
        self.may_be_http2.set(false);
        let received = connection.received();
        let (sender, connection) = self.http1.handshake(TokioIo::new(connection)).await.map_err(SendError::Protocol)?;
        let driver = task::spawn("upstream connection", async move {
            // Its error reaches the request that uses the connection; without one it only means that the upstream closed.
            let _ = connection.await;
        });
        self.metrics.upstream_connections(0, 1);
        let connection = Box::new(Http1 { sender, driver: driver.abort_handle(), received, expires, idle_since: Instant::now() });
        Ok(Acquired::Http1 { connection, reused: false })
    }

    async fn start_http2(self: &Rc<Self>, connection: Connection, expires: Instant) -> Result<Acquired<B>, SendError> {
        let (sender, connection) = self.http2.handshake(TokioIo::new(connection)).await.map_err(SendError::Protocol)?;
        let usage = Usage::opened(Arc::clone(&self.metrics));
        let until_closed = Rc::clone(&usage);
        task::spawn("upstream connection", async move {
            let _ = connection.await;
            until_closed.closed();
        });
        let connection = Rc::new(Http2 { sender, expires, usage, last_used: Cell::new(Instant::now()) });
        self.shared.borrow_mut().push(Rc::clone(&connection));
        Ok(Acquired::Http2 { connection, reused: false })
    }

    /// Hands the request to the connection at once, so that the future does not hold it.
    fn send_http1(
        self: &Rc<Self>,
        mut connection: Box<Http1<B>>,
        request: Request<B>,
        reused: bool,
    ) -> impl Future<Output = Result<Response<ReplyBody<B>>, Failure<B>>> + use<B> {
        let received_before = connection.received.get();
        let sent = connection.sender.try_send_request(request);
        let lease = Lease { pool: Rc::clone(self), connection: Some(connection) };
        async move {
            let mut error = match sent.await {
                Ok(response) => return Ok(response.map(|incoming| ReplyBody::new(incoming, Held::Http1(lease)))),
                Err(error) => error,
            };
            let returned = error.take_message();
            let error = error.into_error();
            let nothing_came = lease.connection.as_ref().is_some_and(|connection| connection.received.get() == received_before);
            let what = match returned {
                Some(request) => Unsent::Returned(Box::new(request)),
                None if reused && nothing_came && !error.is_user() && !error.is_parse() => Unsent::Evidence(Evidence::ClosedBeforeReply),
                None => Unsent::Unknown,
            };
            Err(Failure { what, error: classify(error) })
        }
    }

    async fn send_http2(&self, connection: &Rc<Http2<B>>, request: Request<B>, reused: bool) -> Result<Response<ReplyBody<B>>, Failure<B>> {
        let stream = StreamCount::new(Rc::clone(connection));
        match connection.sender.clone().try_send_request(self.to_http2(request)).await {
            Ok(response) => Ok(response.map(|incoming| ReplyBody::new(incoming, Held::Http2(stream)))),
            Err(mut error) => {
                let returned = error.take_message();
                let error = error.into_error();
                let what = match returned {
                    Some(request) => Unsent::Returned(Box::new(self.to_http1(request))),
                    None if not_processed(&error) => Unsent::Evidence(Evidence::NotProcessed),
                    // No head came on this stream, or this would be no error; and it was not the stream alone that ended.
                    None if reused && !error.is_user() && !is_reset(&error) => Unsent::Evidence(Evidence::ClosedBeforeReply),
                    None => Unsent::Unknown,
                };
                // Whatever broke this stream, a new request is better off elsewhere if the connection is going away.
                if connection.sender.is_closed() {
                    self.shared.borrow_mut().retain(|other| !Rc::ptr_eq(other, connection));
                }
                Err(Failure { what, error: classify(error) })
            }
        }
    }
}

impl<B: Body> Upstream<B> {
    /// HTTP/2 carries scheme and authority in the target and has no `host` (RFC 9113 section 8.3.1), nor a `transfer-encoding` (section 8.2.2).
    fn to_http2(&self, mut request: Request<B>) -> Request<B> {
        let mut target = std::mem::take(request.uri_mut()).into_parts();
        target.scheme = Some(if self.connector.origin().tls { Scheme::HTTPS } else { Scheme::HTTP });
        target.authority = Some(self.authority.clone());
        *request.uri_mut() = Uri::from_parts(target).expect("scheme, authority and path are all there");
        request.headers_mut().remove(HOST);
        request.headers_mut().remove(TRANSFER_ENCODING);
        request
    }

    /// The way back, for a request that HTTP/2 did not take: origin-form, `host`, and the framing that hyper would not choose by itself.
    fn to_http1(&self, mut request: Request<B>) -> Request<B> {
        let path = std::mem::take(request.uri_mut()).into_parts().path_and_query;
        *request.uri_mut() = path.map_or_else(Uri::default, Uri::from);
        let host = HeaderValue::from_str(self.authority.as_str()).expect("an authority is a legal field value");
        request.headers_mut().insert(HOST, host);
        if !request.body().is_end_stream() && request.body().size_hint().exact().is_none() {
            request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        request
    }
}

enum Acquired<B> {
    Http1 { connection: Box<Http1<B>>, reused: bool },
    Http2 { connection: Rc<Http2<B>>, reused: bool },
}

struct Failure<B> {
    what: Unsent<B>,
    error: SendError,
}

enum Unsent<B> {
    /// Hyper gave the request back untouched.
    Returned(Box<Request<B>>),
    Evidence(Evidence),
    Unknown,
}

fn classify(error: hyper::Error) -> SendError {
    if error.is_user() { SendError::RequestBody(error) } else { SendError::Protocol(error) }
}

fn http2_cause(error: &hyper::Error) -> Option<&h2::Error> {
    std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<h2::Error>())
}

fn is_reset(error: &hyper::Error) -> bool {
    http2_cause(error).is_some_and(h2::Error::is_reset)
}

/// RFC 9113 section 8.7: `REFUSED_STREAM`, and a GOAWAY whose last stream id is below this stream's (h2 fails only those with it).
fn not_processed(error: &hyper::Error) -> bool {
    http2_cause(error).is_some_and(|error| {
        error.is_remote()
            && ((error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM))
                || (error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR)))
    })
}

/// Counts a stream for as long as it lives.
struct StreamCount<B>(Rc<Http2<B>>);

impl<B> StreamCount<B> {
    fn new(connection: Rc<Http2<B>>) -> Self {
        connection.usage.begin_stream();
        Self(connection)
    }
}

impl<B> Drop for StreamCount<B> {
    fn drop(&mut self) {
        self.0.usage.end_stream();
        self.0.last_used.set(Instant::now());
    }
}

/// An HTTP/1.1 connection in use. Ends by [`Lease::finish`], or by being dropped, which closes the connection.
struct Lease<B: Body> {
    pool: Rc<Upstream<B>>,
    connection: Option<Box<Http1<B>>>,
}

impl<B: Body> Lease<B> {
    /// The response is complete. Hyper is ready for the next request only if the request was sent completely too.
    fn finish(mut self) {
        if let Some(mut connection) = self.connection.take_if(|connection| connection.sender.is_ready()) {
            connection.idle_since = Instant::now();
            self.pool.metrics.upstream_connections(1, -1);
            self.pool.idle.borrow_mut().push(connection);
        }
    }
}

impl<B: Body> Drop for Lease<B> {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.pool.metrics.upstream_connections(0, -1);
            // Dropping the sender alone would let hyper finish sending the request.
            connection.driver.abort();
        }
    }
}

enum Held<B: Body> {
    Http1(Lease<B>),
    Http2(#[expect(dead_code, reason = "held to be dropped")] StreamCount<B>),
}

/// Why a response body broke off.
#[derive(Debug, thiserror::Error)]
pub enum ReplyError {
    /// The connection or the stream broke, or what came is not HTTP.
    #[error("{}", describe(.0))]
    Broken(hyper::Error),
    /// HTTP/2: the stream was reset before its end. With `NO_ERROR` that is legal behind a complete response only (RFC 9113 section 8.1), but hyper
    /// takes it for the end wherever it comes.
    #[error("the upstream reset the stream before the end of the response")]
    Reset,
}

/// A response body on its way from the upstream. At its end the connection returns to the pool; dropped before, the connection is closed (HTTP/2: the
/// stream is reset).
pub struct ReplyBody<B: Body> {
    incoming: Incoming,
    held: Option<Held<B>>,
}

impl<B: Body> ReplyBody<B> {
    fn new(incoming: Incoming, held: Held<B>) -> Self {
        let mut body = Self { incoming, held: Some(held) };
        if body.incoming.is_end_stream() {
            body.finish();
        }
        body
    }

    fn finish(&mut self) {
        if let Some(Held::Http1(lease)) = self.held.take() {
            lease.finish();
        }
    }
}

impl<B: Body> Body for ReplyBody<B> {
    type Data = Bytes;
    type Error = ReplyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ReplyError>>> {
        let frame = ready!(Pin::new(&mut self.incoming).poll_frame(cx));
        let ended = self.incoming.is_end_stream();
        if frame.is_none() && !ended && matches!(self.held, Some(Held::Http2(_))) {
            self.finish();
            return Poll::Ready(Some(Err(ReplyError::Reset)));
        }
        if frame.is_none() || ended {
            self.finish();
        }
        Poll::Ready(frame.map(|frame| frame.map_err(ReplyError::Broken)))
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

/// Closes connections that were idle for too long or are too old, so that an upstream or a load balancer in between need not. Ends with the pool.
async fn reap<B>(pool: Weak<Upstream<B>>)
where
    B: Body + 'static,
{
    loop {
        let Some(period) = pool.upgrade().map(|pool| pool.idle_timeout.min(pool.max_age) / 4) else { return };
        tokio::time::sleep(period.clamp(Duration::from_millis(10), Duration::from_secs(5))).await;
        let Some(pool) = pool.upgrade() else { return };
        let now = Instant::now();
        let stale = |expires: Instant, used: Instant| now >= expires || now - used >= pool.idle_timeout;
        pool.idle.borrow_mut().retain(|connection| {
            let keep = !connection.sender.is_closed() && !stale(connection.expires, connection.idle_since);
            if !keep {
                pool.metrics.upstream_connections(-1, 0);
            }
            keep
        });
        pool.shared.borrow_mut().retain(|connection| {
            !connection.sender.is_closed() && (connection.usage.streams.get() > 0 || !stale(connection.expires, connection.last_used.get()))
        });
    }
}
