//! The wiring, once, in order: harden, bind, enter the sandbox, start, serve, drain. The only file that knows all others.

use std::cell::RefCell;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::admin::{self, Command, Handles};
use crate::config::{Config, Credentials, CredentialsSource, ListenTls, Loaded, Sources};
use crate::credentials;
use crate::descriptors::{self, Room};
use crate::harden;
use crate::liveness;
use crate::metrics::{Metrics, TokenMetrics, WorkerMetrics};
use crate::proxy::guard::{CallerToken, Guard};
use crate::readiness::ReadinessReader;
use crate::sandbox::Needs;
use crate::secret::Token;
use crate::server::listen::{self, Bound};
use crate::shutdown::{Signal, Signals, Stage};
use crate::task;
use crate::telemetry::Telemetry;
use crate::token;
use crate::token::effects::{PatientStore, Requests};
use crate::token::store::Store;
use crate::upstream::connect::{ConnectError, Connector};
use crate::upstream::tls;
use crate::worker::{self, Worker};

pub use demo::demo;

mod demo;

/// Exit status for wrong usage or configuration; 0 is a clean end, 1 anything else.
pub(crate) const EXIT_USAGE: u8 = 2;
/// Settings whose new value takes effect on a reload; every other one needs a restart.
const LIVE: &[&str] = &["log.level"];
/// What a shutdown leaves for the token task: a mint in flight may finish, so that its token is known and not orphaned, and tokens may be revoked.
const TOKEN_GRACE: Duration = Duration::from_secs(5);
/// What connections with nothing in flight get to close, however short the drain is: closing them cuts nobody off.
const IDLE_CLOSE: Duration = Duration::from_millis(100);

/// Runs the proxy until a signal or a command stops it; with `sandboxed`, in a sandbox that this thread never leaves.
pub fn run(mut loaded: Loaded, sources: Sources, telemetry: &Telemetry, sandboxed: bool) -> ExitCode {
    let refused = harden::process();
    for reason in refused {
        tracing::warn!(reason, "cannot harden the process");
    }
    let room = descriptors::make_room(&mut loaded.config);
    for warning in loaded.warnings.iter().chain(&room.shortage) {
        tracing::warn!("{warning}");
    }
    let runtime = match Builder::new_current_thread().enable_all().build_local(LocalOptions::default()) {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "cannot start");
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(serve(loaded, sources, telemetry, sandboxed, &room));
    // A file read that hangs, on a dead network mount say, must not hold the process up.
    runtime.shutdown_background();
    match ended {
        Ok(Ended::Drained) => ExitCode::SUCCESS,
        Ok(Ended::Cut) => ExitCode::FAILURE,
        Err(error) => {
            if let Some(Misconfigured(problems)) = error.downcast_ref() {
                for problem in problems {
                    tracing::error!("{problem}");
                }
                return ExitCode::from(EXIT_USAGE);
            }
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// How the proxy ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    /// Everything in flight was finished.
    Drained,
    /// The drain timeout ran out, or a second signal came.
    Cut,
}

async fn serve(loaded: Loaded, sources: Sources, telemetry: &Telemetry, sandboxed: bool, room: &Room) -> anyhow::Result<Ended> {
    let started = SystemTime::now();
    let mut signals = Signals::listen().context("cannot listen for signals")?;
    let config = Arc::new(loaded.config.clone());
    let workers = config.runtime.workers.get();

    let sandbox = sandboxed.then(|| Needs::of(&config, loaded.file.as_deref()).prepare());
    let Files { tls, connector, caller_token } = Files::read(&loaded)?;
    // Sockets before all else: a busy port is found before anything is minted.
    let sockets = listen::bind(&config.listen.addresses, config.listen.unix_mode, workers).context("listen.address")?;
    let admin_sockets = listen::bind(&config.admin.addresses, config.listen.unix_mode, 1).context("admin.address")?;
    let requests = Requests::new(connector.clone(), config.token.clone());
    // After what is read and bound once, before the first thread that works with a secret or with what peers send.
    if let Some(sandbox) = sandbox {
        sandbox.enter().await;
    }

    let token_metrics = Arc::new(TokenMetrics::default());
    let worker_metrics: Vec<_> = (0..workers).map(|_| Arc::new(WorkerMetrics::new(config.policy.rules.len()))).collect();
    let metrics = Arc::new(Metrics::new(worker_metrics.clone(), Arc::clone(&token_metrics), telemetry.dropped_lines(), started));

    let credentials = credentials::Watch::start(config.credentials.clone(), Arc::clone(&token_metrics));
    let tokens = token::task::start(
        &config.token,
        requests,
        PatientStore::new(Store::new(&config.token.store, &config.upstream.origin), config.token.mint_timeout),
        credentials.receiver(),
        credentials.reloader(),
        Arc::clone(&token_metrics),
    );

    let (stage, stage_reader) = watch::channel(Stage::Serve);
    let (draining, draining_reader) = watch::channel(false);
    let ports: Vec<u16> = sockets.iter().flatten().filter_map(Bound::tcp_address).map(|address| address.port()).collect();
    let guard = Guard::new(&config, &ports, caller_token.clone());
    let caller_token = caller_token.map(|token| WatchedCallerToken::start(&config, token));
    let limits = worker::Limits::of(&config);
    let shared =
        worker::Shared { config: Arc::clone(&config), connector, tokens: tokens.tokens, guard, tls, stage: stage_reader.clone(), limits };
    let mut running = JoinSet::new();
    let pings = start_workers(sockets, worker_metrics, &shared, &mut running)?;

    let (commands, mut asked) = mpsc::channel(8);
    let handles = Handles {
        metrics,
        readiness: ReadinessReader::new(tokens.status, draining_reader),
        workers: pings,
        filter: telemetry.filter(),
        commands,
        upstream: config.upstream.origin.to_string(),
        started,
    };
    let admin = start_admin(admin_sockets.into_iter().flatten().collect(), handles, room.admin_connections, stage_reader)?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), upstream = %config.upstream.origin, workers, "started");
    notify(&[sd_notify::NotifyState::Ready]);

    // From here until something asks to stop.
    let control = Control { loaded: RefCell::new(loaded), sources, telemetry, credentials, tokens: tokens.control, caller_token };
    let why = loop {
        tokio::select! {
            signal = signals.next() => match signal {
                Signal::Stop(name) => break name,
                Signal::Reload => {
                    // Whatever is wrong with the new configuration was logged.
                    let _ = control.reload().await;
                }
            },
            Some(command) = asked.recv() => match command {
                Command::Quit => break "/quitquitquit",
                Command::Reload(reply) => {
                    // The asker may have gone.
                    let _ = reply.send(control.reload().await);
                }
                Command::Refresh(reply) => {
                    let tokens = control.tokens.clone();
                    task::spawn("refresh", async move { reply.send(tokens.refresh().await) });
                }
            },
            Some(worker) = running.join_next() => {
                stage.send_replace(Stage::Cut);
                return Err(anyhow!("a worker ended by itself: {worker:?}"));
            }
        }
    };

    tracing::info!(why, delay = ?config.shutdown.delay, drain_timeout = ?config.shutdown.drain_timeout, "stopping");
    notify(&[sd_notify::NotifyState::Stopping]);
    draining.send_replace(true);
    // Whoever still asks for something is told at once that it is too late.
    drop(asked);
    let cut = drain(&config, &stage, &mut running, &mut signals).await;
    control.tokens.shutdown().await;
    if tokio::time::timeout(TOKEN_GRACE, tokens.task).await.is_err() {
        tracing::warn!("the token task did not end in time");
    }
    stage.send_replace(Stage::Cut);
    if let Some(admin) = admin {
        // Its panic was logged; nothing is left to serve.
        let _ = admin.await;
    }
    if cut > 0 {
        tracing::warn!(connections = cut, "stopped; connections were cut");
        return Ok(Ended::Cut);
    }
    tracing::info!("stopped");
    Ok(Ended::Drained)
}

/// What the files of the configuration give, the credentials apart, which are waited for. Read before anything starts.
struct Files {
    tls: Option<Arc<ServerConfig>>,
    connector: Connector,
    caller_token: Option<CallerToken>,
}

/// Files that the configuration names cannot be used: one line for each, with its key and where that was set.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.join("\n"))]
struct Misconfigured(Vec<String>);

impl Files {
    /// All that is wrong with them, not only the first.
    fn read(loaded: &Loaded) -> Result<Self, Misconfigured> {
        let config = &loaded.config;
        let tls = config.listen.tls.as_ref().map(server_tls).transpose();
        let connector = Connector::new(&config.upstream);
        let caller_token = config.listen.caller_token_file.as_deref().map(read_caller_token).transpose();
        match (tls, connector, caller_token) {
            (Ok(tls), Ok(connector), Ok(caller_token)) => Ok(Self { tls, connector, caller_token }),
            (tls, connector, caller_token) => {
                let problems = tls.err().into_iter().flatten().chain(connector.err()).chain(caller_token.err());
                Err(Misconfigured(problems.map(|problem| loaded.effective.locate(&problem)).collect()))
            }
        }
    }
}

fn read_caller_token(path: &Path) -> Result<CallerToken, String> {
    let token = credentials::read_secret(path, Token::new).map_err(|reason| format!("listen.caller_token_file: {reason}"))?;
    Ok(CallerToken::new(token))
}

/// The content of `listen.caller_token_file`, watched as the credentials are: whatever happens to the file, the last good content stays in force.
struct WatchedCallerToken {
    watch: credentials::Watch,
    _following: JoinSet<()>,
}

impl WatchedCallerToken {
    fn start(config: &Config, token: CallerToken) -> Self {
        let source = config.listen.caller_token_file.clone().map_or(CredentialsSource::Unconfigured, CredentialsSource::TokenFile);
        let watched = Credentials { source, poll_interval: config.credentials.poll_interval };
        // Its readings are none of the upstream's credentials, and count nowhere.
        let watch = credentials::Watch::start(watched, Arc::new(TokenMetrics::default()));
        let mut receiver = watch.receiver();
        let mut following = JoinSet::new();
        following.spawn_local(async move {
            while receiver.changed().await.is_ok() {
                if let credentials::Loaded::Token(read) = &*receiver.borrow_and_update() {
                    token.replace(read.token.clone());
                }
            }
        });
        Self { watch, _following: following }
    }
}

/// `shutdown.delay`, then `shutdown.drain_timeout`; a second signal skips what is left. Returns how many connections were cut.
async fn drain(
    config: &Config,
    stage: &watch::Sender<Stage>,
    running: &mut JoinSet<Result<usize, String>>,
    signals: &mut Signals,
) -> usize {
    let hurried = tokio::select! {
        () = tokio::time::sleep(config.shutdown.delay) => false,
        () = stop_again(signals) => true,
    };
    stage.send_replace(Stage::Drain);
    let mut cut = 0;
    let mut collect = async || {
        while let Some(worker) = running.join_next().await {
            cut += match worker {
                Ok(Ok(connections)) => connections,
                // Nobody knows how many it had; it was logged.
                Ok(Err(_)) | Err(_) => 1,
            };
        }
    };
    let patience = if hurried { IDLE_CLOSE } else { config.shutdown.drain_timeout.max(IDLE_CLOSE) };
    tokio::select! {
        () = collect() => {}
        () = tokio::time::sleep(patience) => {}
        () = stop_again(signals) => {}
    }
    stage.send_replace(Stage::Cut);
    collect().await;
    cut
}

/// The next signal that asks to stop; a reload is pointless by now.
async fn stop_again(signals: &mut Signals) {
    while signals.next().await == Signal::Reload {}
}

/// One worker for each list of sockets; `running` waits for them.
fn start_workers(
    sockets: Vec<Vec<Bound>>,
    metrics: Vec<Arc<WorkerMetrics>>,
    shared: &worker::Shared,
    running: &mut JoinSet<Result<usize, String>>,
) -> anyhow::Result<Vec<liveness::WorkerPing>> {
    for socket in sockets.first().into_iter().flatten() {
        tracing::info!(address = %socket, "listening");
    }
    let mut pings = Vec::new();
    for (index, (sockets, metrics)) in sockets.into_iter().zip(metrics).enumerate() {
        let (ping, asked) = liveness::channel();
        let worker = worker::start(index, sockets, shared.clone(), metrics, asked).context("cannot start a worker")?;
        pings.push(ping);
        running.spawn_local(ended(worker));
    }
    Ok(pings)
}

/// Waits for a worker: how many connections it cut, or that it panicked.
async fn ended(mut worker: Worker) -> Result<usize, String> {
    let cut = (&mut worker.ended).await;
    let joined = tokio::task::spawn_blocking(move || worker.join()).await;
    match (cut, joined) {
        (Ok(cut), Ok(Ok(()))) => Ok(cut),
        _ => Err("its thread panicked".to_owned()),
    }
}

/// What SIGHUP and the admin server's verbs act on.
struct Control<'a> {
    loaded: RefCell<Loaded>,
    sources: Sources,
    telemetry: &'a Telemetry,
    credentials: credentials::Watch,
    tokens: token::task::Control,
    caller_token: Option<WatchedCallerToken>,
}

impl Control<'_> {
    /// Reads the configuration file and the credential files again. A configuration that is wrong leaves the running one in force. Returns the keys
    /// whose new value needs a restart, or why the configuration was not taken.
    async fn reload(&self) -> Result<Vec<String>, String> {
        self.credentials.reload();
        if let Some(token) = &self.caller_token {
            token.watch.reload();
        }
        let sources = self.sources.clone();
        let read = tokio::task::spawn_blocking(move || Config::load(&sources)).await;
        let new = match read {
            Ok(Ok(new)) => new,
            Ok(Err(problems)) => {
                tracing::warn!("the configuration is not taken, the old one stays in force: {problems}");
                return Err(problems.to_string());
            }
            Err(panic) => return Err(panic.to_string()),
        };
        let changed = new.effective.changed_keys(&self.loaded.borrow().effective);
        for key in changed.iter().filter(|key| LIVE.contains(&key.as_str())) {
            tracing::info!(key, "the new value is in force");
        }
        if let Err(error) = self.telemetry.filter().set(&new.config.log.level) {
            tracing::warn!(%error, "log.level is not taken");
        }
        let (_, stale): (Vec<_>, Vec<_>) = changed.into_iter().partition(|key| LIVE.contains(&key.as_str()));
        for key in &stale {
            tracing::warn!(key, "the new value needs a restart");
        }
        tracing::info!("configuration and credentials were read again");
        Ok(stale)
    }
}

fn start_admin(
    sockets: Vec<Bound>,
    handles: Handles,
    max_connections: usize,
    mut stage: watch::Receiver<Stage>,
) -> anyhow::Result<Option<tokio::task::JoinHandle<()>>> {
    let mut listeners = Vec::new();
    for socket in sockets {
        tracing::info!(address = %socket, "admin server listening");
        listeners.push(socket.into_listener().context("cannot start the admin server")?);
    }
    if listeners.is_empty() {
        return Ok(None);
    }
    let stopped = async move { crate::shutdown::reached(&mut stage, Stage::Cut).await };
    Ok(Some(task::spawn("admin server", admin::serve(listeners, handles, max_connections, stopped))))
}

/// Tells systemd, where it started this process. Nobody listening is no error.
fn notify(state: &[sd_notify::NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::debug!(%error, "cannot notify the service manager");
    }
}

/// TLS towards the downstream, for a shared gateway. Where it cannot be: all that is wrong with the files, each with its key.
pub(crate) fn server_tls(files: &ListenTls) -> Result<Arc<ServerConfig>, Vec<String>> {
    let certificates = tls::read_certificates(&files.certificate_file).map_err(|reason| format!("listen.tls.certificate_file: {reason}"));
    let key = PrivateKeyDer::from_pem_file(&files.private_key_file)
        .map_err(|error| format!("listen.tls.private_key_file: {}: no usable PEM key: {error}", files.private_key_file.display()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = match &files.client_ca_file {
        None => Ok(WebPkiClientVerifier::no_client_auth()),
        Some(path) => client_verifier(path, &provider).map_err(|reason| format!("listen.tls.client_ca_file: {reason}")),
    };
    let (certificates, key, verifier) = match (certificates, key, verifier) {
        (Ok(certificates), Ok(key), Ok(verifier)) => (certificates, key, verifier),
        (certificates, key, verifier) => return Err([certificates.err(), key.err(), verifier.err()].into_iter().flatten().collect()),
    };
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring supports TLS 1.2 and 1.3")
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificates, key)
        .map_err(|error| {
            vec![format!("listen.tls.certificate_file: {} and its key do not fit: {error}", files.certificate_file.display())]
        })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Demands client certificates that these roots vouch for.
fn client_verifier(path: &Path, provider: &Arc<CryptoProvider>) -> Result<Arc<dyn ClientCertVerifier>, String> {
    let in_file = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
    let mut roots = RootCertStore::empty();
    for certificate in tls::read_certificates(path)? {
        roots.add(certificate).map_err(|error| in_file(&error))?;
    }
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider)).build().map_err(|error| in_file(&error))
}

/// `check --connect`: resolves, connects and verifies TLS, with the words for either outcome.
pub fn check_connect(config: &Config) -> Result<String, String> {
    let connector = Connector::new(&config.upstream)?;
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).map_err(|error| error.to_string())?;
    let connected = runtime.block_on(connector.connect());
    runtime.shutdown_background();
    match connected {
        Ok(connection) => {
            let protocol = if connection.is_http2() { "HTTP/2" } else { "HTTP/1.1" };
            let verified = if config.upstream.origin.tls { ", its certificate is trusted" } else { "" };
            Ok(format!("{} answers{verified} ({protocol})", config.upstream.origin))
        }
        Err(error) => Err(format!("{error}{}", advice(&error))),
    }
}

/// What to look at, where the error does not say it by itself.
fn advice(error: &ConnectError) -> &'static str {
    match error {
        ConnectError::Dns(_) => "; look at the name in upstream.url, and at the DNS of this host",
        ConnectError::Unreachable { .. } => "; look at host and port in upstream.url, and at egress rules and firewalls on the way",
        ConnectError::Timeout { .. } => "; egress rules or a firewall may drop the packets: is upstream.proxy needed?",
        ConnectError::Proxy { .. } => "; look at upstream.proxy, or at HTTPS_PROXY where that is empty",
        ConnectError::Tls { .. } => "",
    }
}
