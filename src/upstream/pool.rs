//! One worker's connections to the upstream.
//!
//! HTTP/1.1 connections wait in a stack: the one used last is used next, so that a quiet proxy lets the others run into their idle timeout. An HTTP/2
//! connection is shared by its requests and driven by a task of its own. Everything here lives on one thread: no lock, and a request never waits for
//! another worker.
//!
//! An HTTP/1.1 connection goes back on the stack only when both the request and the response are complete; in any other case, a cancelled exchange
//! included, it is closed. Nothing dirty is ever reused.

use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, TRANSFER_ENCODING};
use http::uri::{Authority, Scheme};
use http::{Request, Response, Uri};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::connect::{ConnectError, Connection, Connector};
use super::departures::Departures;
use super::http1::{self, Http1, RequestHead};
use crate::config::{self, HttpVersion};
use crate::metrics::WorkerMetrics;
use crate::task;

/// An idle HTTP/2 connection is pinged this often and given up [`PING_TIMEOUT`] later: half-open ones are found within 20 s.
const PING_INTERVAL: Duration = Duration::from_secs(15);
const PING_TIMEOUT: Duration = Duration::from_secs(5);
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

/// Why there is no response. The texts are for the log and quote nothing of a message.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// No connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The request's own body failed; the cause lies downstream.
    #[error("the request body failed")]
    RequestBody,
    /// The connection ended, or broke.
    #[error("{0}")]
    Closed(String),
    /// What came back is not HTTP.
    #[error("{0}")]
    Protocol(String),
}

impl From<http1::Error> for SendError {
    fn from(error: http1::Error) -> Self {
        match error {
            http1::Error::RequestBody => Self::RequestBody,
            http1::Error::NotSent | http1::Error::Closed | http1::Error::Io(_) => Self::Closed(error.to_string()),
            http1::Error::Malformed(_) => Self::Protocol(error.to_string()),
        }
    }
}

impl From<hyper::Error> for SendError {
    fn from(error: hyper::Error) -> Self {
        // Hyper calls what its user gives it the user's error.
        if error.is_user() {
            Self::RequestBody
        } else if error.is_closed() || error.is_canceled() || http2_cause(&error).is_some_and(h2::Error::is_io) {
            Self::Closed(describe(&error))
        } else {
            Self::Protocol(describe(&error))
        }
    }
}

/// A hyper error with its causes, for the log. They quote nothing of a message, but for h2, which repeats the words of a GOAWAY: these are the upstream's,
/// and may hold anything.
fn describe(error: &hyper::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(current) = cause {
        let go_away = current.downcast_ref::<h2::Error>().filter(|error| error.is_go_away()).and_then(h2::Error::reason);
        text = match go_away {
            Some(reason) => format!("{text}: GOAWAY: {reason}"),
            None => format!("{text}: {current}"),
        };
        cause = current.source();
    }
    text
}

/// The pool of one worker. `B` is the request body.
pub struct Upstream<B> {
    connector: Connector,
    authority: Authority,
    http2: http2::Builder<LocalExecutor>,
    /// False once it is known that all connections are HTTP/1.1.
    may_be_http2: Cell<bool>,
    prior_knowledge: bool,
    departures: Departures<B>,
    idle: RefCell<Vec<Idle<B>>>,
    shared: RefCell<Vec<Rc<Http2<B>>>>,
    /// Held while a connection is opened that may turn out to be shareable, so that a burst opens one.
    dialing: tokio::sync::Mutex<()>,
    idle_timeout: Duration,
    max_age: Duration,
    metrics: Arc<WorkerMetrics>,
}

/// An HTTP/1.1 connection that waits for its next request.
struct Idle<B> {
    connection: Shared<Http1<B>>,
    expires: Instant,
    since: Instant,
}

/// A connection belongs to the exchange on it, but its upload may need a task of its own. Never borrowed across an `await`.
type Shared<T> = Rc<RefCell<T>>;

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
        let mut http2 = http2::Builder::new(LocalExecutor);
        http2
            .timer(TokioTimer::new())
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .keep_alive_while_idle(true)
            .max_header_list_size(u32::try_from(http1::MAX_HEAD_BYTES).expect("a small constant"))
            .adaptive_window(true);
        let pool = Rc::new(Self {
            prior_knowledge: !connector.origin().tls && config.http_version == HttpVersion::Http2,
            may_be_http2: Cell::new(config.http_version != HttpVersion::Http1),
            authority: connector.origin().authority().parse().expect("an origin has a valid authority"),
            connector,
            http2,
            departures: Departures::start(),
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

    /// Sends a request and waits for the response head. Where the connection fails and nothing was sent, the same request goes to another one; where
    /// there is [`Evidence`] that it was not processed, `again` decides, by giving the body once more: once for each pooled connection that fails, at
    /// most once for a new one, and at most once where the upstream said so.
    ///
    /// Has no timeout but the connect timeout. Dropping the future closes the connection (HTTP/2: resets the stream). `now` is the time, which the
    /// caller has at hand; another reading of the clock costs a percent of a request.
    pub async fn send(
        self: &Rc<Self>,
        request: &RequestHead,
        mut body: B,
        now: Instant,
        mut again: impl FnMut(Evidence) -> Option<B>,
    ) -> Result<Response<ReplyBody<B>>, SendError> {
        let (mut new_connection_failed, mut not_processed_before) = (false, false);
        loop {
            let acquired = self.acquire(now).await?;
            let (sent, reused) = match acquired {
                Acquired::Http1 { lease, reused } => (lease.send(request, body, reused).await, reused),
                // Large: kept out of the future of those that need none of it.
                Acquired::Http2 { connection, reused } => (Box::pin(self.send_http2(&connection, request, body, reused)).await, reused),
            };
            let failure = match sent {
                Ok(response) => return Ok(response),
                Err(failure) => failure,
            };
            if !reused && std::mem::replace(&mut new_connection_failed, true) {
                return Err(failure.error);
            }
            body = match failure.what {
                Unsent::Returned(body) => body,
                // Once: an HTTP/2 connection stays in the pool whatever becomes of its streams, and an upstream that refuses again wants to be left alone.
                Unsent::Evidence(Evidence::NotProcessed) if std::mem::replace(&mut not_processed_before, true) => return Err(failure.error),
                Unsent::Evidence(evidence) => match again(evidence) {
                    Some(body) => body,
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

    fn pooled(self: &Rc<Self>, now: Instant) -> Option<Acquired<B>> {
        let mut shared = self.shared.borrow_mut();
        shared.retain(|connection| !connection.sender.is_closed() && connection.expires > now);
        if let Some(connection) = shared.iter().find(|connection| connection.usage.streams.get() < MAX_STREAMS) {
            connection.last_used.set(now);
            return Some(Acquired::Http2 { connection: Rc::clone(connection), reused: true });
        }
        let mut idle = self.idle.borrow_mut();
        while let Some(Idle { connection, expires, since }) = idle.pop() {
            self.metrics.upstream_connections(-1, 0);
            if expires > now && now - since < self.idle_timeout && connection.borrow_mut().is_quiet() {
                self.metrics.upstream_connections(0, 1);
                return Some(Acquired::Http1 { lease: Lease::new(self, connection, expires), reused: true });
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
            self.may_be_http2.set(false);
            self.metrics.upstream_connections(0, 1);
            let connection = Rc::new(RefCell::new(Http1::new(connection)));
            Ok(Acquired::Http1 { lease: Lease::new(self, connection, expires), reused: false })
        }
    }

    async fn start_http2(self: &Rc<Self>, connection: Connection, expires: Instant) -> Result<Acquired<B>, SendError> {
        let (sender, connection) = self.http2.handshake(TokioIo::new(connection)).await?;
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

    async fn send_http2(
        &self,
        connection: &Rc<Http2<B>>,
        request: &RequestHead,
        body: B,
        reused: bool,
    ) -> Result<Response<ReplyBody<B>>, Failure<B>> {
        let stream = StreamCount::new(Rc::clone(connection));
        match connection.sender.clone().try_send_request(self.http2_request(request, body)).await {
            Ok(response) => Ok(response.map(|incoming| ReplyBody(Reply::Http2 { incoming, stream: Some(stream) }))),
            Err(mut error) => {
                let returned = error.take_message();
                let error = error.into_error();
                let what = match returned {
                    Some(request) => Unsent::Returned(request.into_body()),
                    None if not_processed(&error) => Unsent::Evidence(Evidence::NotProcessed),
                    // No head came on this stream, or this would be no error; and it was not the stream alone that ended.
                    None if reused && !error.is_user() && !is_reset(&error) => Unsent::Evidence(Evidence::ClosedBeforeReply),
                    None => Unsent::Unknown,
                };
                // Whatever broke this stream, a new request is better off elsewhere if the connection is going away.
                if connection.sender.is_closed() {
                    self.shared.borrow_mut().retain(|other| !Rc::ptr_eq(other, connection));
                }
                Err(Failure { what, error: error.into() })
            }
        }
    }
}

impl<B> Upstream<B> {
    /// HTTP/2 carries scheme and authority in the target and has no `host` (RFC 9113 section 8.3.1), nor a `transfer-encoding` (section 8.2.2).
    fn http2_request(&self, head: &RequestHead, body: B) -> Request<B> {
        let mut request = Request::new(body);
        let mut target = Uri::from(head.target.clone()).into_parts();
        target.scheme = Some(if self.connector.origin().tls { Scheme::HTTPS } else { Scheme::HTTP });
        target.authority = Some(self.authority.clone());
        *request.uri_mut() = Uri::from_parts(target).expect("scheme, authority and path are all there");
        *request.method_mut() = head.method.clone();
        *request.headers_mut() = head.headers.clone();
        request.headers_mut().remove(HOST);
        request.headers_mut().remove(TRANSFER_ENCODING);
        request
    }
}

enum Acquired<B> {
    Http1 { lease: Lease<B>, reused: bool },
    Http2 { connection: Rc<Http2<B>>, reused: bool },
}

struct Failure<B> {
    what: Unsent<B>,
    error: SendError,
}

enum Unsent<B> {
    /// Nothing of the request was sent, and its body comes back unread.
    Returned(B),
    Evidence(Evidence),
    Unknown,
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
struct Lease<B> {
    pool: Rc<Upstream<B>>,
    /// Nothing once it is finished.
    connection: Option<Shared<Http1<B>>>,
    expires: Instant,
    /// What moves the rest of the upload while the response is relayed.
    upload: Option<AbortHandle>,
}

impl<B> Lease<B> {
    fn new(pool: &Rc<Upstream<B>>, connection: Shared<Http1<B>>, expires: Instant) -> Self {
        Self { pool: Rc::clone(pool), connection: Some(connection), expires, upload: None }
    }
}

impl<B> Lease<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
{
    /// Hands the request to the connection at once, so that the future does not hold it.
    fn send(
        mut self,
        request: &RequestHead,
        body: B,
        reused: bool,
    ) -> impl Future<Output = Result<Response<ReplyBody<B>>, Failure<B>>> + use<B> {
        let connection = Rc::clone(self.connection.as_ref().expect("present until finished"));
        connection.borrow_mut().begin(request, body);
        self.pool.departures.add(Rc::clone(&connection));
        async move {
            match poll_fn(|cx| connection.borrow_mut().poll_head(cx)).await {
                Ok(head) => {
                    if !connection.borrow().is_upload_complete() {
                        self.upload = Some(drive_upload(connection));
                    }
                    Ok(Response::from_parts(head, ReplyBody::http1(self)))
                }
                Err(error) => {
                    let mut connection = connection.borrow_mut();
                    let what = match &error {
                        http1::Error::NotSent => connection.take_back().map_or(Unsent::Unknown, Unsent::Returned),
                        http1::Error::Closed | http1::Error::Io(_) if reused && !connection.has_received() => {
                            Unsent::Evidence(Evidence::ClosedBeforeReply)
                        }
                        _ => Unsent::Unknown,
                    };
                    Err(Failure { what, error: error.into() })
                }
            }
        }
    }

    /// The response is complete. The connection can carry another request only if the request is complete too.
    fn finish(mut self) {
        if let Some(connection) = self.connection.take_if(|connection| connection.borrow().is_complete()) {
            self.pool.metrics.upstream_connections(1, -1);
            self.pool.idle.borrow_mut().push(Idle { connection, expires: self.expires, since: Instant::now() });
        }
    }
}

impl<B> Drop for Lease<B> {
    fn drop(&mut self) {
        if let Some(upload) = &self.upload {
            upload.abort();
        }
        if self.connection.is_some() {
            self.pool.metrics.upstream_connections(0, -1);
        }
    }
}

/// An upload goes on after the response began (RFC 9112 section 9.5), and its reader may be slower than it. Rare, hence the task.
fn drive_upload<B>(connection: Shared<Http1<B>>) -> AbortHandle
where
    B: Body<Data = Bytes> + Unpin + 'static,
{
    let upload = task::spawn("upload", async move {
        // A failure reaches the reader of the response.
        let _ = poll_fn(|cx| connection.borrow_mut().poll_upload(cx)).await;
    });
    upload.abort_handle()
}

/// Why a response body broke off.
#[derive(Debug, thiserror::Error)]
pub enum ReplyError {
    /// The connection or the stream broke, or what came is not HTTP.
    #[error("{0}")]
    Broken(String),
    /// HTTP/2: the stream was reset before its end. With `NO_ERROR` that is legal behind a complete response only (RFC 9113 section 8.1), but hyper
    /// takes it for the end wherever it comes.
    #[error("the upstream reset the stream before the end of the response")]
    Reset,
}

/// A response body on its way from the upstream. At its end the connection returns to the pool; dropped before, the connection is closed (HTTP/2: the
/// stream is reset).
pub struct ReplyBody<B>(Reply<B>);

enum Reply<B> {
    Http1(Lease<B>),
    Http2 {
        incoming: Incoming,
        /// Nothing once it ended.
        stream: Option<StreamCount<B>>,
    },
    Ended,
}

impl<B> ReplyBody<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
{
    fn http1(lease: Lease<B>) -> Self {
        let mut body = Self(Reply::Http1(lease));
        body.finish_if_ended();
        body
    }

    fn finish_if_ended(&mut self) {
        if self.is_end_stream()
            && let Reply::Http1(lease) = std::mem::replace(&mut self.0, Reply::Ended)
        {
            lease.finish();
        }
    }
}

impl<B> Body for ReplyBody<B>
where
    B: Body<Data = Bytes> + Unpin + 'static,
{
    type Data = Bytes;
    type Error = ReplyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ReplyError>>> {
        let frame = match &mut self.0 {
            Reply::Ended => None,
            Reply::Http1(lease) => {
                let connection = lease.connection.as_ref().expect("present until finished");
                let frame = ready!(connection.borrow_mut().poll_body(cx));
                frame.map(|frame| frame.map_err(|error| ReplyError::Broken(error.to_string())))
            }
            Reply::Http2 { incoming, stream } => {
                let frame = ready!(Pin::new(&mut *incoming).poll_frame(cx));
                match frame {
                    None if stream.take().is_some() && !incoming.is_end_stream() => Some(Err(ReplyError::Reset)),
                    frame => frame.map(|frame| frame.map_err(|error| ReplyError::Broken(describe(&error)))),
                }
            }
        };
        self.finish_if_ended();
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Reply::Ended => true,
            Reply::Http1(lease) => lease.connection.as_ref().is_none_or(|connection| connection.borrow().is_end_of_body()),
            Reply::Http2 { incoming, .. } => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Reply::Ended => SizeHint::with_exact(0),
            Reply::Http1(lease) => lease.connection.as_ref().map_or_else(SizeHint::new, |connection| connection.borrow().body_size()),
            Reply::Http2 { incoming, .. } => incoming.size_hint(),
        }
    }
}

/// Closes connections that were idle for too long or are too old, so that an upstream or a load balancer in between need not, and those that were
/// closed. Ends with the pool.
async fn reap<B>(pool: Weak<Upstream<B>>)
where
    B: Body<Data = Bytes> + Unpin + 'static,
{
    loop {
        let Some(period) = pool.upgrade().map(|pool| pool.idle_timeout.min(pool.max_age) / 4) else { return };
        tokio::time::sleep(period.clamp(Duration::from_millis(10), Duration::from_secs(5))).await;
        let Some(pool) = pool.upgrade() else { return };
        let now = Instant::now();
        let stale = |expires: Instant, used: Instant| now >= expires || now - used >= pool.idle_timeout;
        pool.idle.borrow_mut().retain(|idle| {
            let mut connection = idle.connection.borrow_mut();
            let keep = !stale(idle.expires, idle.since) && connection.is_quiet();
            if keep {
                connection.shrink();
            } else {
                pool.metrics.upstream_connections(-1, 0);
            }
            keep
        });
        pool.shared.borrow_mut().retain(|connection| {
            !connection.sender.is_closed() && (connection.usage.streams.get() > 0 || !stale(connection.expires, connection.last_used.get()))
        });
    }
}
