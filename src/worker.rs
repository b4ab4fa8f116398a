//! One worker: a thread with a runtime, listening sockets and an upstream pool of its own. Requests of different workers share nothing that is written
//! per request, but for two counters: a limit of the proxy is one of all workers together, however the kernel spreads connections over them.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;

use rustls::ServerConfig;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio_rustls::TlsAcceptor;

use crate::config::Config;
use crate::liveness::WorkerPings;
use crate::metrics::WorkerMetrics;
use crate::proxy::error::Error;
use crate::proxy::guard::Guard;
use crate::proxy::{self, Proxy};
use crate::server::listen::Bound;
use crate::server::{self, clock};
use crate::shutdown::Stage;
use crate::task;
use crate::token::TokenReader;
use crate::upstream::connect::Connector;
use crate::upstream::pool::Upstream;

/// Threads that may wait in `getaddrinfo`; the resolver caps itself at fewer.
const MAX_BLOCKING_THREADS: usize = 8;

/// What all workers get a copy of.
#[derive(Clone)]
pub struct Shared {
    /// The whole configuration.
    pub config: Arc<Config>,
    /// Opens connections to the upstream.
    pub connector: Connector,
    /// Gives requests the token in use.
    pub tokens: TokenReader,
    /// Who may ask for what.
    pub guard: Guard,
    /// TLS towards the downstream.
    pub tls: Option<Arc<ServerConfig>>,
    /// How far the shutdown is.
    pub stage: watch::Receiver<Stage>,
    /// What all workers together may do at a time.
    pub limits: Limits,
}

/// What there may be at a time, over all workers.
#[derive(Debug, Clone)]
pub struct Limits {
    connections: Arc<Semaphore>,
    requests: Arc<Semaphore>,
}

impl Limits {
    /// `listen.max_connections` and `limits.max_in_flight`.
    pub fn of(config: &Config) -> Self {
        let at_most = |limit: std::num::NonZeroUsize| Arc::new(Semaphore::new(limit.get()));
        Self { connections: at_most(config.listen.max_connections), requests: at_most(config.limits.max_in_flight) }
    }
}

/// A running worker.
pub struct Worker {
    /// Ends with the number of connections that the shutdown had to cut.
    pub ended: oneshot::Receiver<usize>,
    thread: JoinHandle<()>,
}

impl Worker {
    /// Waits for the thread, which has ended when [`Worker::ended`] resolved. An error means that it panicked.
    pub fn join(self) -> std::thread::Result<()> {
        self.thread.join()
    }
}

/// Starts worker number `index` on its sockets.
pub fn start(index: usize, sockets: Vec<Bound>, shared: Shared, metrics: Arc<WorkerMetrics>, pings: WorkerPings) -> io::Result<Worker> {
    let (end, ended) = oneshot::channel();
    let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        let runtime =
            Builder::new_current_thread().enable_all().max_blocking_threads(MAX_BLOCKING_THREADS).build_local(LocalOptions::default());
        match runtime {
            Ok(runtime) => {
                metrics.runs_on(runtime.metrics());
                let cut = runtime.block_on(serve(sockets, shared, metrics, pings));
                // Whoever started the worker may be gone; then nobody counts.
                let _ = end.send(cut);
                // A hung name lookup must not hold the process up.
                runtime.shutdown_background();
            }
            Err(error) => tracing::error!(%error, "a worker cannot start its runtime"),
        }
    })?;
    Ok(Worker { ended, thread })
}

async fn serve(sockets: Vec<Bound>, shared: Shared, metrics: Arc<WorkerMetrics>, pings: WorkerPings) -> usize {
    let config = &shared.config;
    let mut listeners = Vec::new();
    for socket in sockets {
        let name = socket.to_string();
        match socket.into_listener() {
            Ok(listener) => listeners.push(listener),
            Err(error) => tracing::error!(%error, address = name, "cannot accept connections"),
        }
    }
    let upstream = Upstream::start(shared.connector, &config.upstream, Arc::clone(&metrics));
    let settings = server_settings(config, shared.limits.connections, &metrics);
    let proxy_settings = proxy::Settings::new(config);
    let proxy =
        Rc::new(Proxy::new(shared.guard, shared.tokens, upstream, proxy_settings, shared.limits.requests, shared.stage.clone(), metrics));
    let answering = task::spawn("ping", pings.answer());
    let tls = shared.tls.map(TlsAcceptor::from);
    let service = move |request, clock| Rc::clone(&proxy).handle(request, clock);
    let cut = server::run(listeners, tls, settings, shared.stage, service).await;
    answering.abort();
    // The pool is gone, and the tasks of HTTP/2 connections, which nobody holds any more, get a turn to say goodbye.
    tokio::task::yield_now().await;
    cut
}

/// The server's part of the configuration.
fn server_settings(config: &Config, connections: Arc<Semaphore>, metrics: &Arc<WorkerMetrics>) -> server::Settings {
    let share = config.listen.max_connections.get().div_ceil(config.runtime.workers.get());
    server::Settings {
        limits: clock::Limits {
            idle: config.listen.idle_timeout,
            head: config.listen.header_timeout,
            body_idle: config.upstream.body_idle_timeout,
            response: config.upstream.response_timeout,
        },
        max_header_size: config.listen.max_header_size,
        connections,
        max_refusals: share / 8,
        too_slow: refusal(&Error::RequestTimeout),
        too_many: refusal(&Error::Overloaded),
        metrics: Arc::clone(metrics),
    }
}

/// A whole HTTP/1.1 message that closes its connection, for where no request was read that hyper could answer.
fn refusal(error: &Error) -> server::Refusal {
    let response = error.response();
    let status = response.status();
    let mut message = format!("HTTP/1.1 {} {}\r\n", status.as_u16(), status.canonical_reason().unwrap_or_default()).into_bytes();
    for (name, value) in response.headers() {
        message.extend_from_slice(name.as_str().as_bytes());
        message.extend_from_slice(b": ");
        message.extend_from_slice(value.as_bytes());
        message.extend_from_slice(b"\r\n");
    }
    message.extend_from_slice(format!("content-length: {}\r\nconnection: close\r\n\r\n", response.body().len()).as_bytes());
    message.extend_from_slice(response.body());
    server::Refusal { message: message.into(), status, code: error.code() }
}
