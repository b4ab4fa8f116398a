//! The downstream side: accepts connections, speaks HTTP/1 on them, bounds them in number, size and time, drains them. For any service.
//!
//! Leaves to the service everything that a request means. Two things hyper does not do are done here: every timeout ([`clock`]), and a close that
//! does not destroy the response (a lingering close, RFC 9112 section 9.6).

use std::cell::Cell;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use http::{Request, Response, StatusCode};
use http_body::Body;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::metrics::WorkerMetrics;
use crate::shutdown::{Stage, reached};
use clock::{Clock, Phase};
use listen::{Listener, Peer};
use stream::{Returned, Stream, Watched};

pub mod clock;
pub mod listen;
pub mod stream;

/// Bytes that each direction of a connection may buffer, unless a head needs more. Hyper's own limit of 408 KiB, which it reaches with every large body,
/// would cost a request in flight a megabyte, and no transfer is the faster for it.
const MIN_BUFFER: usize = 64 * 1024;
/// What a lingering close reads at a time, in bytes.
const LINGER_BUFFER: usize = 8192;
/// A lingering close waits this long for the next byte, and for the end, of what the downstream still sends.
const LINGER_IDLE: Duration = Duration::from_secs(5);
const LINGER: Duration = Duration::from_secs(30);
/// Bounds of [`Settings::max_refusals`].
pub(crate) const MIN_REFUSALS: usize = 2;
const MAX_REFUSALS: usize = 64;
/// After a failed accept, typically for lack of descriptors: time for some to be freed, without spinning.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How connections are served.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Timeouts.
    pub limits: clock::Limits,
    /// Of a request head, in bytes; more is 431.
    pub max_header_size: usize,
    /// Connections at a time, of all that share this.
    pub connections: Arc<Semaphore>,
    /// Connections over the limit that are told so at a time; more are closed without a word. Kept within bounds.
    pub max_refusals: usize,
    /// For a head that did not arrive in time.
    pub too_slow: Refusal,
    /// For a connection over the limit.
    pub too_many: Refusal,
    /// Where refusals are counted. Whatever becomes a request is counted by the service.
    pub metrics: Arc<WorkerMetrics>,
}

/// What a connection is told that brought no request for the service.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// A complete HTTP message.
    pub message: Bytes,
    /// Its status.
    pub status: StatusCode,
    /// Its code in the metrics.
    pub code: &'static str,
}

/// Serves until the shutdown begins, then lets the connections finish until it cuts them. Returns how many were cut.
///
/// Cancelled, it closes everything.
pub async fn run<S, F, B>(
    listeners: Vec<Listener>,
    tls: Option<TlsAcceptor>,
    settings: Settings,
    mut stage: watch::Receiver<Stage>,
    service: S,
) -> usize
where
    S: Fn(Request<Incoming>, Rc<Clock>) -> F + Clone + 'static,
    F: Future<Output = Response<B>> + 'static,
    B: Body<Data = Bytes> + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let settings = Rc::new(settings);
    let max_refusals = settings.max_refusals.clamp(MIN_REFUSALS, MAX_REFUSALS);
    let mut connections = JoinSet::new();
    let mut refusals = JoinSet::new();
    loop {
        tokio::select! {
            biased;
            () = reached(&mut stage, Stage::Drain) => break,
            // A finished connection only makes room; a panic in it was reported by the panic hook.
            Some(_) = connections.join_next() => {}
            Some(_) = refusals.join_next() => {}
            accepted = accept(&listeners) => match accepted {
                Ok((stream, _)) => {
                    if let Ok(slot) = Arc::clone(&settings.connections).try_acquire_owned() {
                        let connection = connection(stream, tls.clone(), Rc::clone(&settings), stage.clone(), service.clone());
                        connections.spawn_local(connection.map(|()| drop(slot)));
                        continue;
                    }
                    settings.metrics.refused(settings.too_many.status, settings.too_many.code);
                    if refusals.len() < max_refusals && tls.is_none() {
                        let message = settings.too_many.message.clone();
                        refusals.spawn_local(async move { say(stream, &message).await });
                    }
                }
                Err(error) => {
                    // The connection that failed may be one that its peer gave up; a lack of descriptors stays for a while.
                    if !matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted) {
                        tracing::warn!(%error, "cannot accept a connection; pausing");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                }
            },
        }
    }
    drop(listeners);
    loop {
        tokio::select! {
            next = connections.join_next() => if next.is_none() { return 0 },
            () = reached(&mut stage, Stage::Cut) => break,
        }
    }
    let cut = connections.len();
    connections.shutdown().await;
    cut
}

/// The next connection on any of the listeners; never, where there is none. Cancel safe, as accepting is.
pub async fn accept(listeners: &[Listener]) -> io::Result<(Stream, Peer)> {
    match listeners {
        [] => std::future::pending().await,
        [only] => only.accept().await,
        several => futures_util::future::select_all(several.iter().map(|listener| Box::pin(listener.accept()))).await.0,
    }
}

/// One connection, from its first byte to its last.
pub(crate) async fn connection<S, F, B>(
    stream: Stream,
    tls: Option<TlsAcceptor>,
    settings: Rc<Settings>,
    mut stage: watch::Receiver<Stage>,
    service: S,
) where
    S: Fn(Request<Incoming>, Rc<Clock>) -> F + 'static,
    F: Future<Output = Response<B>> + 'static,
    B: Body<Data = Bytes> + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    // A handshake is no request: the drain does not wait for it.
    let stream = tokio::select! {
        biased;
        stream = handshake(stream, tls, settings.limits.head) => stream,
        () = reached(&mut stage, Stage::Drain) => None,
    };
    let Some(stream) = stream else { return };
    let clock = Rc::new(Clock::new(settings.limits));
    let returned: Returned = Rc::default();
    let end = {
        let io = TokioIo::new(Watched::new(stream, Rc::clone(&clock), Rc::clone(&returned)));
        let clock = Rc::clone(&clock);
        let exchange_clock = Rc::clone(&clock);
        let service = service_fn(move |request: Request<Incoming>| {
            exchange_clock.begin(!http_body::Body::is_end_stream(request.body()));
            // Not an `async` block, which would hold the future twice: as its capture and as what it awaits.
            service(request, Rc::clone(&exchange_clock)).map(Ok::<_, Infallible>)
        });
        // A head has at most 100 fields; more are 431 (RFC 6585 section 5). That is hyper's default; said aloud, it would cost a slower way of parsing.
        let buffer = settings.max_header_size.max(MIN_BUFFER);
        let mut http =
            pin!(http1::Builder::new().max_header_size(settings.max_header_size).max_buf_size(buffer).serve_connection(io, service));
        let draining = Cell::new(false);
        let mut served = pin!(async {
            loop {
                tokio::select! {
                    biased;
                    result = http.as_mut() => break match result {
                        Ok(()) => End::Closed,
                        // The response's body broke off: hyper calls what its user gives it the user's error.
                        Err(error) if error.is_user() => End::Cut,
                        Err(error) => {
                            // What hyper refuses by itself, with a bare status, because it is no request.
                            if error.is_parse() {
                                let (status, code) = refused_by_parser(&error);
                                settings.metrics.refused(status, code);
                            }
                            End::Broken
                        }
                    },
                    phase = clock.watch() => break End::Expired(phase),
                    // Finishes the exchange in flight, or closes an idle connection.
                    () = reached(&mut stage, Stage::Drain), if !draining.get() => {
                        draining.set(true);
                        http.as_mut().graceful_shutdown();
                    }
                }
            }
        });
        poll_fn(|cx| clock.turn(|| served.as_mut().poll(cx))).await
    };
    let Some(stream) = returned.take() else { return };
    match end {
        End::Expired(Phase::Head) => {
            let Refusal { message, status, code } = &settings.too_slow;
            settings.metrics.refused(*status, code);
            say(stream, message).await;
        }
        End::Closed | End::Broken if clock.is_upload_pending() || matches!(end, End::Broken) => linger(stream).await,
        End::Cut | End::Expired(Phase::Relay) => cut(stream),
        End::Closed | End::Broken | End::Expired(_) => {}
    }
}

/// Hyper says 414 for a target over 65,534 bytes, and 431 for a head over the limits; only its words tell the two apart.
fn refused_by_parser(error: &hyper::Error) -> (StatusCode, &'static str) {
    if error.is_parse_too_large() && error.to_string().contains("URI") {
        (StatusCode::URI_TOO_LONG, "uri_too_long")
    } else if error.is_parse_too_large() {
        (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large")
    } else {
        (StatusCode::BAD_REQUEST, "bad_request")
    }
}

/// How hyper's part of a connection ended.
enum End {
    /// In good order.
    Closed,
    /// By what the downstream sent, or because it left.
    Broken,
    /// In the middle of a response.
    Cut,
    Expired(Phase),
}

/// Ends a connection so that nobody can take what was sent for the whole: a response to HTTP/1.0 may end with its connection, and only a reset tells
/// that from a clean end (RFC 9112 section 8). TLS has no `close_notify` then, which says the same.
fn cut(stream: Stream) {
    if let Stream::Tcp(stream) = &stream {
        // A socket that refuses is closed all the same.
        let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
    }
    drop(stream);
}

/// TLS where it is configured, within `limit`. A failed handshake is the downstream's to notice.
async fn handshake(stream: Stream, tls: Option<TlsAcceptor>, limit: Duration) -> Option<Stream> {
    match (tls, stream) {
        (Some(acceptor), Stream::Tcp(stream)) => {
            // On the heap: inside this future its kilobyte would stay with every connection, plain ones too, to its end.
            let accepted = Box::pin(acceptor.accept(stream));
            match tokio::time::timeout(limit, accepted).await {
                Ok(Ok(stream)) => Some(Stream::Tls(Box::new(stream))),
                Ok(Err(error)) => {
                    tracing::debug!(%error, "a TLS handshake failed");
                    None
                }
                Err(_) => None,
            }
        }
        (_, stream) => Some(stream),
    }
}

/// Writes a complete message and closes.
async fn say(mut stream: Stream, message: &[u8]) {
    // A downstream that does not read it, or is gone, misses nothing but the message.
    if let Ok(Ok(())) = tokio::time::timeout(LINGER_IDLE, stream.write_all(message)).await {
        linger(stream).await;
    }
}

/// Says that nothing more comes, and reads what the downstream still sends until it has read the response and closes. Closing at once would make TCP
/// answer those bytes with a reset, which can destroy the response on its way (RFC 9112 section 9.6).
async fn linger(mut stream: Stream) {
    let drained = tokio::time::timeout(LINGER, async {
        if stream.shutdown().await.is_err() {
            return;
        }
        // On the heap: inside this future it would make every connection so much larger, from its beginning.
        let mut discarded = vec![0; LINGER_BUFFER];
        while let Ok(Ok(1..)) = tokio::time::timeout(LINGER_IDLE, stream.read(&mut discarded)).await {}
    });
    // Whether it read everything or time ran out, the connection is closed now.
    let _ = drained.await;
}
