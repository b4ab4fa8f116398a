//! From the port to the answer: accepts connections, lets hyper serve them, and applies faults around the honest answer.

use std::convert::Infallible;
use std::future::{Future, pending};
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

use super::Protocols;
use super::api::{self, drain};
use super::body::{Body, Outgoing, full};
use super::control::{Control, Greeting, Settings};
use super::faults::{Action, End, Point, Verdict};
use super::heads::Heads;
use super::record::RecordedBody;
use super::stream::{Ending, Stream, Tap, Wire};
use crate::task;

/// A port of this process, open or shut. A bound socket that does not listen reserves it, so that nobody else gets it while it is shut.
pub(super) struct Port {
    address: SocketAddr,
    _reservation: Socket,
}

impl Port {
    /// Binds the address; port 0 takes a free one.
    pub(super) fn reserve(address: SocketAddr) -> io::Result<Self> {
        let reservation = bind(address)?;
        let address = reservation.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { address, _reservation: reservation })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Opens the port. It is shut when the listener is dropped.
    pub(super) fn open(&self) -> io::Result<std::net::TcpListener> {
        let socket = bind(self.address)?;
        socket.listen(1024)?;
        socket.set_nonblocking(true)?;
        Ok(socket.into())
    }
}

fn bind(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_port(true)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// What connections are served with.
#[derive(Clone)]
pub(super) struct Service {
    pub(super) control: Control,
    /// `None`: plain TCP.
    pub(super) tls: Option<TlsAcceptor>,
    pub(super) protocols: Protocols,
}

/// Accepts and serves until `stop` resolves, which its sender's drop does too. Ends with the panic of any connection that panicked.
pub(super) async fn accept(port: Port, first: std::net::TcpListener, service: Service, mut stop: oneshot::Receiver<()>) -> io::Result<()> {
    let mut settings = service.control.settings();
    let mut connections = FuturesUnordered::new();
    let mut listener = Some(TcpListener::from_std(first)?);
    loop {
        // What one branch loses when another wins: a connection that was not yet taken from the kernel stays in its queue.
        tokio::select! {
            _ = &mut stop => return Ok(()),
            _ = settings.changed() => {
                let greeting = settings.borrow_and_update().greeting;
                listener = match (greeting, listener) {
                    (Greeting::Refuse, _) => None,
                    (_, Some(open)) => Some(open),
                    (_, None) => Some(TcpListener::from_std(port.open()?)?),
                };
            }
            Some(ended) = connections.next() => if let Err(error) = ended {
                match tokio::task::JoinError::try_into_panic(error) {
                    Ok(panic) => std::panic::resume_unwind(panic),
                    Err(cancelled) => tracing::debug!(%cancelled, "simulated connection"),
                }
            },
            accepted = next(listener.as_ref()) => match accepted {
                Ok((tcp, _)) => {
                    let number = service.control.change(|state| {
                        state.counters.accepted += 1;
                        state.counters.open += 1;
                        state.counters.accepted
                    });
                    connections.push(task::spawn("simulated-connection", service.clone().connection(tcp, number)));
                }
                // Out of file descriptors: the connection stays queued, others may end meanwhile.
                Err(error) => {
                    tracing::warn!(%error, "the simulated API cannot accept");
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            },
        }
    }
}

async fn next(listener: Option<&TcpListener>) -> io::Result<(TcpStream, SocketAddr)> {
    match listener {
        Some(listener) => listener.accept().await,
        None => pending().await,
    }
}

impl Service {
    async fn connection(self, tcp: TcpStream, number: u64) {
        let _open = Open(self.control.clone());
        let mut settings = self.control.settings();
        let greeting = settings.borrow().greeting;
        let greeted = tokio::select! {
            greeted = self.greet(tcp, greeting) => greeted,
            (number, _) = order(&mut settings) => {
                self.control.change(|state| state.ended(number).handshakes += 1);
                return;
            }
        };
        match greeted {
            Ok(Some((stream, is_http2))) => self.serve(stream, is_http2, number, settings).await,
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, "handshake with the simulated API"),
        }
    }

    /// The TLS handshake where configured, unless the greeting is another. The second value tells whether HTTP/2 was agreed; `None`: it is over.
    async fn greet(&self, tcp: TcpStream, greeting: Greeting) -> io::Result<Option<(Stream, bool)>> {
        let ends = match greeting {
            Greeting::Serve => None,
            Greeting::End(end) => Some(end),
            // `Refuse` here: it was accepted just before the port was shut.
            Greeting::Refuse => Some(End::Reset),
            Greeting::Silence => Some(End::Stay),
        };
        if let Some(end) = ends {
            return Stream::Plain(tcp).end(end.into()).await.map(|()| None);
        }
        tcp.set_nodelay(true)?;
        let Some(acceptor) = &self.tls else {
            return Ok(Some((Stream::Plain(tcp), self.protocols == Protocols::Http2)));
        };
        let tls = acceptor.accept(tcp).await?;
        let agreed = tls.get_ref().1.alpn_protocol();
        let is_http2 = agreed == Some(b"h2") || (agreed.is_none() && self.protocols == Protocols::Http2);
        Ok(Some((Stream::Tls(Box::new(tls)), is_http2)))
    }

    /// Serves one connection until the client leaves, a fault ends it, or it idles too long.
    async fn serve(&self, stream: Stream, is_http2: bool, number: u64, mut settings: watch::Receiver<Settings>) {
        let heads = (self.control.records() && !is_http2).then(Heads::default);
        let wire = Wire::new(stream, heads);
        let ending = {
            let io = TokioIo::new(Tap(Rc::clone(&wire)));
            let service = service_fn(|request| handle(self.control.clone(), Rc::clone(&wire), number, request));
            let http = async {
                let served = if is_http2 {
                    http2::Builder::new(LocalExecutor).timer(TokioTimer::new()).serve_connection(io, service).await
                } else {
                    http1::Builder::new().timer(TokioTimer::new()).serve_connection(io, service).await
                };
                if let Err(error) = served {
                    tracing::debug!(%error, "simulated connection");
                }
            };
            // Whichever branch wins, hyper's side is dropped here and the wire decides about the rest.
            tokio::select! {
                biased;
                ending = wire.ending() => ending,
                () = http => {
                    self.control.change(|state| state.counters.cut += u64::from(wire.was_cut()));
                    return;
                }
                (number, end) = order(&mut settings) => {
                    self.control.change(|state| state.ended(number).connection(wire.requests(), wire.idle_since().is_some(), wire.interrupted()));
                    end.into()
                }
                () = idle(&wire, self.control.settings()) => End::Close.into(),
            }
        };
        wire.finish(ending).await;
    }
}

/// Waits until all connections are told to end: for the how manieth time, and how.
async fn order(settings: &mut watch::Receiver<Settings>) -> (u64, End) {
    let before = settings.borrow().ended.0;
    match settings.wait_for(|settings| settings.ended.0 > before).await {
        Ok(settings) => settings.ended,
        Err(_) => pending().await, // the simulator is gone, and this task with it
    }
}

/// Waits until the connection had no request for the idle timeout.
async fn idle(wire: &Rc<Wire>, mut settings: watch::Receiver<Settings>) {
    loop {
        let timeout = settings.borrow_and_update().idle_timeout;
        let now = Instant::now();
        // As with nginx's keepalive_timeout, the first request of a connection may take its time.
        let since = wire.idle_since().filter(|_| wire.requests() > 0);
        let deadline = match (timeout, since) {
            (Some(timeout), Some(since)) if since + timeout <= now => return,
            (Some(timeout), since) => Some(since.unwrap_or(now) + timeout),
            (None, _) => None,
        };
        let due = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline).await,
                None => pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            changed = settings.changed() => if changed.is_err() { pending::<()>().await },
        }
    }
}

/// Records one request and answers it, honestly or as a fault says.
async fn handle(control: Control, wire: Rc<Wire>, connection: u64, request: Request<Incoming>) -> Result<Response<Outgoing>, Infallible> {
    let (head, body) = request.into_parts();
    let busy = wire.busy(&head.headers);
    wire.begin_request();
    let record = control.records().then(|| {
        let bytes = wire.take_head().unwrap_or_default();
        (control.clone(), control.change(|state| state.log.head(connection, &head, bytes)))
    });
    let mut body = RecordedBody::new(body, record);

    let Verdict { delay, holds, action } = control.change(|state| state.faults.decide(&head.method, head.uri.path()));
    if !delay.is_zero() {
        tokio::time::sleep(delay).await;
    }
    for fault in holds {
        control.until_removed(fault).await;
    }
    let (response, cut) = match action {
        None | Some(Action::Delay(_) | Action::Hold) => (api::respond(&control, &head, body).await, None),
        Some(Action::Reply(reply)) => {
            drain(&mut body).await;
            (reply.map(full), None)
        }
        Some(Action::ReplyEarly(reply)) => (reply.map(full), None),
        Some(Action::Hang) => pending().await,
        Some(Action::Break(end)) => {
            wire.end(end.into());
            pending().await
        }
        Some(Action::Raw(bytes, end)) => {
            drain(&mut body).await;
            wire.end(Ending { bytes, end });
            pending().await
        }
        Some(Action::Cut(point, end)) => {
            let response = api::respond(&control, &head, body).await;
            match point {
                Point::Reply(bytes) => {
                    wire.end_after(bytes, end);
                    (response, None)
                }
                Point::Body(bytes) => (response, Some((bytes, end))),
            }
        }
    };
    Ok(response.map(|body: Body| Outgoing::new(body, wire, busy, cut)))
}

/// Counts a connection as open until it is dropped.
struct Open(Control);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.change(|state| state.counters.open -= 1);
    }
}

/// Runs hyper's HTTP/2 streams on this thread. They end with their connection.
#[derive(Clone)]
struct LocalExecutor;

impl<F> hyper::rt::Executor<F> for LocalExecutor
where
    F: Future + 'static,
    F::Output: 'static,
{
    fn execute(&self, stream: F) {
        task::spawn("simulated-stream", stream);
    }
}
