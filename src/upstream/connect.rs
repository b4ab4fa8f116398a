//! Connecting to the upstream: name, TCP with happy eyeballs, egress proxy, verified TLS, all within one deadline.
//!
//! The authority that is dialled comes from the configuration alone; nothing of a request gets here.

use std::error::Error as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::Uri;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tower::Service;

use super::resolve::{ResolveError, Resolver};
use super::tls;
use crate::config::{self, Origin};

/// After this long without an answer from the first address family the other is tried too (RFC 8305 section 5 recommends 250 ms).
const HAPPY_EYEBALLS: Duration = Duration::from_millis(250);
/// A silent connection is probed after this, so that a half-open one is found within [`USER_TIMEOUT`] and not after hours.
const KEEP_ALIVE: Duration = Duration::from_secs(15);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEP_ALIVE_RETRIES: u32 = 2;
/// Sent data that stays unacknowledged for this long ends the connection (RFC 5482).
const USER_TIMEOUT: Duration = Duration::from_secs(25);
/// Plaintext that rustls may hold back while the socket is full. Its default is unlimited, which copies large uploads twice.
const TLS_BUFFER_LIMIT: usize = 32 * 1024;

/// Opens verified connections to the configured upstream. Cheap to clone; shared by all threads.
#[derive(Debug, Clone)]
pub struct Connector {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    origin: Origin,
    tls: Option<(TlsConnectorDebug, ServerName<'static>)>,
    http: HttpConnector<Resolver>,
    /// What TCP connects to: the upstream, `upstream.resolve`, or nothing where a tunnel does it.
    target: Uri,
    proxy: Option<config::EgressProxy>,
    timeout: Duration,
}

struct TlsConnectorDebug(TlsConnector);

impl std::fmt::Debug for TlsConnectorDebug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsConnector")
    }
}

/// Why there is no connection. The text is for the log.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ConnectError {
    /// The name does not resolve.
    #[error("{0}")]
    Dns(String),
    /// Refused, unreachable, reset.
    #[error("cannot connect to {target}: {reason}")]
    Unreachable {
        /// Host and port.
        target: String,
        /// From the system.
        reason: String,
        /// Whether it was refused.
        refused: bool,
    },
    /// `upstream.connect_timeout` ran out.
    #[error("no connection to {target} within {}", humantime::format_duration(*.within))]
    Timeout {
        /// Host and port.
        target: String,
        /// The limit.
        within: Duration,
    },
    /// The handshake or the certificate failed.
    #[error("TLS with {target}: {reason}")]
    Tls {
        /// Host and port.
        target: String,
        /// From rustls, with a hint.
        reason: String,
        /// Whether it is the certificate that is at fault.
        certificate: bool,
    },
    /// The egress proxy refused the tunnel.
    #[error("egress proxy {proxy}: {reason}")]
    Proxy {
        /// Host and port of the egress proxy.
        proxy: String,
        /// What it did.
        reason: String,
    },
}

impl ConnectError {
    /// The label `result` of `upstream_connects_total`.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Dns(_) => "dns",
            Self::Unreachable { .. } => "refused",
            Self::Timeout { .. } => "timeout",
            Self::Tls { .. } => "tls",
            Self::Proxy { .. } => "proxy",
        }
    }

    /// The error type that RFC 9209 section 2.3 registers for it.
    pub fn error_type(&self) -> &'static str {
        match self {
            Self::Dns(_) => "dns_error",
            Self::Unreachable { refused: true, .. } => "connection_refused",
            Self::Unreachable { refused: false, .. } | Self::Proxy { .. } => "destination_unavailable",
            Self::Timeout { .. } => "connection_timeout",
            Self::Tls { certificate: true, .. } => "tls_certificate_error",
            Self::Tls { certificate: false, .. } => "tls_protocol_error",
        }
    }
}

impl Connector {
    /// Fails where `upstream.ca_file` cannot be used, with words for people.
    pub fn new(config: &config::Upstream) -> Result<Self, String> {
        let origin = config.origin.clone();
        let tls = if origin.tls {
            let client_config = tls::client_config(config.ca_file.as_deref(), config.http_version)
                .map_err(|reason| format!("upstream.ca_file: {reason}"))?;
            let name = ServerName::try_from(origin.host.clone()).map_err(|error| format!("upstream.url: {}: {error}", origin.host))?;
            Some((TlsConnectorDebug(TlsConnector::from(client_config)), name))
        } else {
            None
        };
        let mut http = HttpConnector::new_with_resolver(Resolver::new());
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(config.connect_timeout));
        http.set_happy_eyeballs_timeout(Some(HAPPY_EYEBALLS));
        http.set_keepalive(Some(KEEP_ALIVE));
        http.set_keepalive_interval(Some(KEEP_ALIVE_INTERVAL));
        http.set_keepalive_retries(Some(KEEP_ALIVE_RETRIES));
        http.set_tcp_user_timeout(Some(USER_TIMEOUT));
        let target = match config.resolve {
            Some(address) => format!("http://{address}"),
            None => format!("http://{}", host_and_port(&origin)),
        };
        let target = target.parse().map_err(|error| format!("upstream.url: {error}"))?;
        Ok(Self { shared: Arc::new(Shared { origin, tls, http, target, proxy: config.proxy.clone(), timeout: config.connect_timeout }) })
    }

    /// The upstream's scheme, host and port.
    pub fn origin(&self) -> &Origin {
        &self.shared.origin
    }

    /// A new connection, ready for HTTP. Bounded by `upstream.connect_timeout`; dropping the future closes what was opened.
    pub async fn connect(&self) -> Result<Connection, ConnectError> {
        let shared = &*self.shared;
        let connected = tokio::time::timeout(shared.timeout, async {
            let stream = self.open().await?;
            match &shared.tls {
                None => Ok(Connection::plain(stream)),
                Some((connector, name)) => self.handshake(&connector.0, name.clone(), stream).await,
            }
        });
        connected.await.unwrap_or_else(|_| Err(ConnectError::Timeout { target: self.name(), within: shared.timeout }))
    }

    fn name(&self) -> String {
        host_and_port(&self.shared.origin)
    }

    /// TCP, through the egress proxy where one is configured.
    async fn open(&self) -> Result<TcpStream, ConnectError> {
        let shared = &*self.shared;
        let mut http = shared.http.clone();
        let Some(proxy) = &shared.proxy else {
            let stream = http.call(shared.target.clone()).await.map_err(|error| self.explain(&error))?;
            return Ok(stream.into_inner());
        };
        let refused = |reason: String| ConnectError::Proxy { proxy: proxy.authority.to_string(), reason };
        let address = format!("http://{}", proxy.authority).parse().map_err(|error: http::uri::InvalidUri| refused(error.to_string()))?;
        let mut tunnel = Tunnel::new(address, http);
        if let Some(authorization) = &proxy.authorization {
            tunnel = tunnel.with_auth(authorization.clone());
        }
        let stream = tunnel.call(shared.target.clone()).await.map_err(|error| {
            let (mut reason, mut cause) = (error.to_string(), error.source());
            while let Some(current) = cause {
                reason = format!("{reason}: {current}");
                cause = current.source();
            }
            refused(reason)
        })?;
        Ok(stream.into_inner())
    }

    fn explain(&self, error: &(dyn std::error::Error + 'static)) -> ConnectError {
        let target = self.shared.target.authority().map_or_else(|| self.name(), ToString::to_string);
        let mut cause = Some(error);
        let (mut reason, mut refused) = (error.to_string(), false);
        while let Some(current) = cause {
            if current.is::<ResolveError>() {
                return ConnectError::Dns(current.to_string());
            }
            match current.downcast_ref::<io::Error>().map(io::Error::kind) {
                Some(io::ErrorKind::TimedOut) => return ConnectError::Timeout { target, within: self.shared.timeout },
                Some(io::ErrorKind::ConnectionRefused) => refused = true,
                _ => {}
            }
            reason = current.to_string();
            cause = current.source();
        }
        ConnectError::Unreachable { target, reason, refused }
    }

    /// What TLS itself has against the upstream is told from a connection that broke meanwhile.
    fn explain_handshake(&self, error: &io::Error) -> ConnectError {
        let target = self.name();
        if let Some(reason) = tls::explain(error) {
            return ConnectError::Tls { target, reason, certificate: tls::is_about_certificate(error) };
        }
        let reason = format!("it ended the connection during the TLS handshake: {error}");
        ConnectError::Unreachable { target, reason, refused: false }
    }

    async fn handshake(&self, tls: &TlsConnector, name: ServerName<'static>, stream: TcpStream) -> Result<Connection, ConnectError> {
        let mut stream = tls.connect(name, stream).await.map_err(|error| self.explain_handshake(&error))?;
        let session = stream.get_mut().1;
        session.set_buffer_limit(Some(TLS_BUFFER_LIMIT));
        let http2 = session.alpn_protocol() == Some(b"h2");
        Ok(Connection::new(Stream::Tls(Box::new(stream)), http2))
    }
}

fn host_and_port(origin: &Origin) -> String {
    if origin.host.contains(':') { format!("[{}]:{}", origin.host, origin.port) } else { format!("{}:{}", origin.host, origin.port) }
}

/// An open connection: bytes in, bytes out.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    http2: bool,
    /// The upstream takes nothing more; see [`Connection::unless_closed`].
    closed_for_writing: bool,
    /// What a write met that a read must still tell; see [`Connection::unless_broken`].
    broken: Option<io::ErrorKind>,
}

#[derive(Debug)]
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connection {
    fn new(stream: Stream, http2: bool) -> Self {
        Self { stream, http2, closed_for_writing: false, broken: None }
    }

    /// Until there is something to read, an end or an error included.
    #[cfg(test)]
    pub(super) async fn wait_for_reading(&self) {
        if let Stream::Plain(stream) = &self.stream {
            stream.readable().await.expect("a socket of this runtime");
        }
    }

    /// Without TLS.
    pub(super) fn plain(stream: TcpStream) -> Self {
        Self::new(Stream::Plain(stream), false)
    }

    /// Whether ALPN chose HTTP/2.
    pub fn is_http2(&self) -> bool {
        self.http2
    }

    /// An upstream that refuses an upload answers and closes, and the rest of the upload meets a closed connection. The answer has arrived by then, so a
    /// failed write must not end the exchange (RFC 9112 section 9.5): from then on what is written is dropped, and reading tells how it ended.
    fn unless_closed(&mut self, written: Poll<io::Result<usize>>, length: usize) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Err(error)) = &written
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            self.broken = Some(error.kind());
        }
        match written {
            Poll::Ready(Err(error)) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
                self.closed_for_writing = true;
                Poll::Ready(Ok(length))
            }
            other => other,
        }
    }

    /// Whether nothing can be read, neither bytes nor their end, as far as the runtime knows: a cheaper way to learn it than to read.
    pub(super) fn is_quiet(&self, cx: &mut Context<'_>) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.poll_read_ready(cx).is_pending(),
            // TLS wants nothing while it holds something back.
            Stream::Tls(stream) => {
                let (stream, session) = stream.get_ref();
                session.wants_read() && stream.poll_read_ready(cx).is_pending()
            }
        }
    }

    /// The system reports a reset once. Where a write met it, reading would end without an error behind what had arrived, and a response that only the
    /// end of the connection delimits would pass for complete. (Behind the stream's end a reset is a broken pipe, and the response was complete.)
    fn unless_broken(&self, read: Poll<io::Result<()>>, is_end: bool) -> Poll<io::Result<()>> {
        match (self.broken, &read) {
            (Some(kind), Poll::Ready(Ok(()))) if is_end => Poll::Ready(Err(kind.into())),
            _ => read,
        }
    }

    /// Whether the upstream takes nothing more; what is written is dropped.
    pub fn is_closed_for_writing(&self) -> bool {
        self.closed_for_writing
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        match &mut this.stream {
            Stream::Plain(stream) => {
                let before = buffer.filled().len();
                let read = Pin::new(stream).poll_read(cx, buffer);
                this.unless_broken(read, buffer.filled().len() == before)
            }
            // Its end is told by TLS itself.
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.closed_for_writing {
            return Poll::Ready(Ok(bytes.len()));
        }
        let written = match &mut this.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        };
        this.unless_closed(written, bytes.len())
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.closed_for_writing {
            return Poll::Ready(Ok(()));
        }
        let flushed = match &mut this.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        };
        // Nothing is counted here, so any length will do.
        this.unless_closed(flushed.map_ok(|()| 0), 0).map_ok(|_| ())
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.get_mut().stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let length = slices.iter().map(|slice| slice.len()).sum();
        if this.closed_for_writing {
            return Poll::Ready(Ok(length));
        }
        let written = match &mut this.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        };
        this.unless_closed(written, length)
    }
}
