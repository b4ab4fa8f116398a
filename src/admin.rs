//! The admin server: health, metrics, status, the few verbs (contract §6).
//!
//! It shares nothing with the listener of the apps, so that a probe is answered however busy that is. It shows no secret, and it answers from local
//! knowledge: no request here ever causes one to the upstream, but for a mint that an operator asks for.

mod peer;
mod routes;
mod status;

use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http::{Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tower::{BoxError, Service, ServiceBuilder, ServiceExt};

use crate::liveness::WorkerPing;
use crate::metrics::Metrics;
use crate::readiness::ReadinessReader;
use crate::server;
use crate::server::listen::{Listener, Peer};
use crate::telemetry::LogFilter;
use crate::token::RefreshRefused;

use routes::Answer;

/// What the admin server shows and whom it tells.
#[derive(Debug)]
pub struct Handles {
    /// For `/metrics`, and the requests in flight in `/status`.
    pub metrics: Arc<Metrics>,
    /// For `/startup`, `/readiness` and `/status`.
    pub readiness: ReadinessReader,
    /// For `/liveness`; one per worker.
    pub workers: Vec<WorkerPing>,
    /// For `/log-level`.
    pub filter: LogFilter,
    /// Takes what the verbs ask for.
    pub commands: mpsc::Sender<Command>,
    /// The upstream's origin, for `/status`.
    pub upstream: String,
    /// When the process started.
    pub started: SystemTime,
}

/// What an operator asks for. Whoever receives it answers by the enclosed channel; dropping that says that the proxy is stopping.
#[derive(Debug)]
pub enum Command {
    /// Do as on SIGHUP. The result: the keys whose new value needs a restart, or why the configuration was not taken, for people.
    Reload(oneshot::Sender<Result<Vec<String>, String>>),
    /// Mint a successor now. The result says whether the mint was begun, not how it ended.
    Refresh(oneshot::Sender<Result<(), RefreshRefused>>),
    /// Stop gracefully.
    Quit,
}

/// Connections at a time, where the process may open enough files; more wait in the kernel's queue until one of these ends, which none can put off for
/// longer than [`CONNECTION_DEADLINE`].
pub(crate) const MAX_CONNECTIONS: usize = 64;
/// Requests at a time, over all connections.
const MAX_REQUESTS: usize = 32;
/// For one answer; longer than `liveness::DEADLINE`.
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
/// To receive a request head.
const HEADER_DEADLINE: Duration = Duration::from_secs(5);
/// For a connection from accept to close: head, answer, and a slow reader.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(15);
/// How long [`serve`] lets connections finish when it ends.
const FINISH_DEADLINE: Duration = Duration::from_secs(2);
/// Of a request head, in bytes, and its fields.
const MAX_HEADER_BYTES: usize = 16 << 10;
const MAX_HEADER_FIELDS: usize = 64;
/// After an accept that failed, as it does when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `shutdown` is ready, then lets the connections finish for a moment. Cancelling it stops accepting; what is answered at that time ends
/// with its own deadline. To be run on a runtime for local tasks.
pub async fn serve(listeners: Vec<Listener>, handles: Handles, max_connections: usize, shutdown: impl Future<Output = ()>) {
    let service = stack(handles);
    let mut connections = FuturesUnordered::new();
    tokio::pin!(shutdown);
    loop {
        // Cancel-safe: nothing was accepted or taken out of `connections` when another branch wins.
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.next() => {}
            accepted = server::accept(&listeners), if connections.len() < max_connections => match accepted {
                Ok((stream, peer)) => connections.push(crate::task::spawn("admin connection", connection(stream, peer, service.clone()))),
                Err(error) => {
                    tracing::warn!(%error, "the admin server cannot accept a connection");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    drop(listeners);
    if timeout(FINISH_DEADLINE, async { while connections.next().await.is_some() {} }).await.is_err() {
        connections.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// The service of one request, the limits around it.
fn stack(
    handles: Handles,
) -> impl Service<(Peer, Request<Incoming>), Response = Answer, Error = BoxError, Future: 'static> + Clone + 'static {
    let handles = Rc::new(handles);
    ServiceBuilder::new()
        // Refuses at once what the limit below would let wait: a probe is better told than kept.
        .load_shed()
        // At most this many at a time, counted over all clones.
        .concurrency_limit(MAX_REQUESTS)
        // Gives up on a body that does not come, or on a command that nobody takes.
        .timeout(REQUEST_DEADLINE)
        .service_fn(move |(peer, request)| {
            let handles = Rc::clone(&handles);
            async move { Ok::<_, BoxError>(routes::answer(&handles, &peer, request).await) }
        })
}

/// Serves one request on `stream` and closes it. One only: keep-alive would let idle connections keep probes out, and saves nothing at a few
/// requests a minute.
async fn connection<S>(stream: impl AsyncRead + AsyncWrite + Unpin, peer: Peer, service: S)
where
    S: Service<(Peer, Request<Incoming>), Response = Answer, Error = BoxError, Future: 'static> + Clone + 'static,
{
    let answer = service_fn(move |request| {
        let service = service.clone();
        async move { Ok::<_, Infallible>(service.oneshot((peer, request)).await.unwrap_or_else(|error| not_served(&error))) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new()) // Without it the next line does nothing.
        .header_read_timeout(HEADER_DEADLINE)
        .max_headers(MAX_HEADER_FIELDS)
        .max_header_size(MAX_HEADER_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    match timeout(CONNECTION_DEADLINE, served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%peer, %error, "an admin connection ended early"),
        Err(_) => tracing::debug!(%peer, "an admin connection took too long"),
    }
}

/// The answer in place of one that the limits refused.
fn not_served(error: &BoxError) -> Answer {
    let reason = if error.is::<tower::load_shed::error::Overloaded>() { "too many requests at a time" } else { "no answer in time" };
    routes::refuse(StatusCode::SERVICE_UNAVAILABLE, reason)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::atomic::AtomicU64;

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tokio::net::{TcpStream, UnixStream};
    use tokio::sync::watch;
    use tokio::task::LocalSet;

    use super::*;
    use crate::config::ListenAddress;
    use crate::liveness;
    use crate::metrics::{TokenMetrics, WorkerMetrics};
    use crate::readiness::tests::status;
    use crate::server::listen;
    use crate::token::Status;

    /// A proxy without anything but its admin server; the fields are what the rest of the proxy would hold.
    pub(crate) struct Proxy {
        pub(crate) handles: Handles,
        pub(crate) token: watch::Sender<Arc<Status>>,
        pub(crate) draining: watch::Sender<bool>,
        pub(crate) commands: mpsc::Receiver<Command>,
        /// The log of `handles.filter`.
        _log: tracing::Dispatch,
    }

    impl Proxy {
        /// With one worker that answers, log level info, and no token yet. To be called on a runtime.
        #[allow(clippy::disallowed_methods)] // these tests have no runtime for local tasks
        pub(crate) fn new() -> Self {
            let (token, token_reader) = watch::channel(Arc::new(status()));
            let (draining, draining_reader) = watch::channel(false);
            let (sender, commands) = mpsc::channel(1);
            let (ping, pings) = liveness::channel();
            drop(tokio::task::spawn(pings.answer()));
            let (log, filter) = crate::telemetry::unseen("info");
            let workers = vec![Arc::new(WorkerMetrics::default())];
            let started = SystemTime::now();
            let handles = Handles {
                metrics: Arc::new(Metrics::new(workers, Arc::new(TokenMetrics::default()), Arc::new(AtomicU64::new(0)), started)),
                readiness: ReadinessReader::new(token_reader, draining_reader),
                workers: vec![ping],
                filter,
                commands: sender,
                upstream: "https://api.upsolver.com".to_owned(),
                started,
            };
            Self { handles, token, draining, commands, _log: log }
        }
    }

    /// Everything until the other end closes.
    async fn read_all(mut stream: impl AsyncRead + Unpin) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    /// A connection to `service` without a socket.
    fn open(
        service: &(impl Service<(Peer, Request<Incoming>), Response = Answer, Error = BoxError, Future: 'static> + Clone + 'static),
    ) -> DuplexStream {
        let (near, far) = tokio::io::duplex(64 << 10);
        drop(crate::task::spawn("test connection", connection(far, Peer::Unix, service.clone())));
        near
    }

    #[tokio::test]
    async fn serves_tcp_and_unix_until_it_is_told_to_stop() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let at = [ListenAddress::Socket("127.0.0.1:0".parse().unwrap()), ListenAddress::Unix(path.clone())];
        let bound: Vec<_> = listen::bind(&at, 0o600, 1).unwrap().into_iter().flatten().collect();
        let address = bound[0].tcp_address().unwrap();
        let listeners = bound.into_iter().map(|bound| bound.into_listener().unwrap()).collect();
        let (stop, stopped) = oneshot::channel::<()>();
        let proxy = Proxy::new();

        let server = serve(listeners, proxy.handles, MAX_CONNECTIONS, async { drop(stopped.await) });
        let visitor = async {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /liveness HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
            let answer = read_all(stream).await;
            assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("connection: close\r\n"), "{answer}");
            assert!(
                answer.contains("cache-control: no-store\r\n") && answer.ends_with("\r\n\r\n{\"status\":\"ok\",\"reasons\":[]}\n"),
                "{answer}"
            );

            let mut stream = UnixStream::connect(&path).await.unwrap();
            stream.write_all(b"HEAD /startup HTTP/1.0\r\n\r\n").await.unwrap();
            let answer = read_all(stream).await;
            assert!(answer.starts_with("HTTP/1.0 503 ") && answer.contains("content-length: ") && answer.ends_with("\r\n\r\n"), "{answer}");
            stop.send(()).unwrap();
        };
        LocalSet::new().run_until(async { tokio::join!(server, visitor) }).await;
        assert!(TcpStream::connect(address).await.is_err(), "the listener is closed");
    }

    /// B12 for the admin server: whoever sends nothing, half a head or half a body is cut off.
    #[tokio::test(start_paused = true)]
    async fn b12_slow_peers_are_cut_off() {
        let rows = [
            ("", ""),
            ("GET /startup HTTP/1.1\r\nhost:", ""),
            ("PUT /log-level HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\n\r\nde", "HTTP/1.1 503 "),
        ];
        let proxy = Proxy::new();
        let local = LocalSet::new();
        let visitors = local.run_until(async {
            let service = stack(proxy.handles);
            for (sent, expected) in rows {
                let began = tokio::time::Instant::now();
                let mut stream = open(&service);
                stream.write_all(sent.as_bytes()).await.unwrap();
                let answer = read_all(stream).await;
                assert!(began.elapsed() <= CONNECTION_DEADLINE, "{sent:?} after {:?}", began.elapsed());
                assert!(if expected.is_empty() { !answer.contains(" 200 ") } else { answer.starts_with(expected) }, "{sent:?} {answer}");
            }
        });
        visitors.await;
    }

    /// With as many requests under way as are allowed the next is told at once, and served again when one has ended.
    #[tokio::test]
    async fn requests_over_the_limit_are_shed() {
        const UNFINISHED: &[u8] = b"PUT /log-level HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n";
        const QUICK: &[u8] = b"GET /liveness HTTP/1.1\r\nhost: localhost\r\n\r\n";
        let proxy = Proxy::new();
        let local = LocalSet::new();
        let visitors = local.run_until(async {
            let service = stack(proxy.handles);
            let mut unfinished = Vec::new();
            for _ in 0..MAX_REQUESTS {
                let mut stream = open(&service);
                stream.write_all(UNFINISHED).await.unwrap();
                // The 100 says that the body is being waited for.
                let mut answer = [0; 25];
                stream.read_exact(&mut answer).await.unwrap();
                assert_eq!(answer, *b"HTTP/1.1 100 Continue\r\n\r\n");
                unfinished.push(stream);
            }
            let mut stream = open(&service);
            stream.write_all(QUICK).await.unwrap();
            let answer = read_all(stream).await;
            assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("too many requests"), "{answer}");

            let mut finished = unfinished.pop().unwrap();
            finished.write_all(b"debug").await.unwrap();
            assert!(read_all(finished).await.ends_with("debug\n"));
            let mut stream = open(&service);
            stream.write_all(QUICK).await.unwrap();
            assert!(read_all(stream).await.starts_with("HTTP/1.1 200 "));
        });
        visitors.await;
    }
}
