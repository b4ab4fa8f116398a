//! One accepted connection below hyper: the place where faults cut, replace or end what is written.
//!
//! hyper holds a [`Tap`] and believes it to be the connection. The connection's driver and the request handlers hold the same [`Wire`], so that
//! they can put a limit on the output, or take the stream away from hyper and end it as they like. All of it lives on one thread.

use std::cell::{Cell, RefCell};
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use http::{HeaderMap, HeaderValue};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;

use super::control::Interrupted;
use super::faults::End;
use super::heads::Heads;

/// A connection as the simulator accepted it.
pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Stream {
    /// Writes the last bytes and ends the connection. Errors mean that the client was faster.
    pub(super) async fn end(mut self, ending: Ending) -> io::Result<()> {
        self.write_all(&ending.bytes).await?;
        self.flush().await?;
        match ending.end {
            End::Close => self.shutdown().await,
            End::Fin => self.tcp().shutdown().await,
            End::Reset => self.tcp().set_zero_linger(),
            End::Stay => {
                let mut unread = [0; 4096];
                while self.read(&mut unread).await? > 0 {}
                Ok(())
            }
        }
    }

    fn tcp(&mut self) -> &mut TcpStream {
        match self {
            Self::Plain(tcp) => tcp,
            Self::Tls(tls) => tls.get_mut().0,
        }
    }
}

/// How a connection ends, and what is written before.
#[derive(Debug)]
pub(super) struct Ending {
    pub(super) bytes: Vec<u8>,
    pub(super) end: End,
}

impl From<End> for Ending {
    fn from(end: End) -> Self {
        Self { bytes: Vec::new(), end }
    }
}

/// What the driver, the handlers and hyper's [`Tap`] of one connection share.
pub(super) struct Wire {
    /// `None` once the connection was taken away from hyper.
    stream: RefCell<Option<Stream>>,
    heads: Option<RefCell<Heads>>,
    output: Cell<Output>,
    ending: RefCell<Option<Ending>>,
    ended: Notify,
    /// How many requests came so far.
    requests: Cell<u64>,
    /// Those without a complete reply.
    in_flight: RefCell<Vec<InFlight>>,
    idle_since: Cell<Instant>,
    cut: Cell<bool>,
}

/// A request whose reply has not left.
struct InFlight {
    number: u64,
    /// `x-request-id`
    id: Option<HeaderValue>,
    /// Its reply is with hyper, and not yet with the kernel.
    replied: bool,
}

#[derive(Debug, Clone, Copy, Default)]
enum Output {
    #[default]
    Free,
    /// So many more bytes, then the end.
    AtMost(usize, End),
    /// The end comes with the next flush.
    AfterFlush(End),
    /// Nothing more is written.
    Over,
}

impl Wire {
    /// Takes over an accepted connection; `heads` where request heads shall be kept as they arrive (HTTP/1.1).
    pub(super) fn new(stream: Stream, heads: Option<Heads>) -> Rc<Self> {
        Rc::new(Self {
            stream: RefCell::new(Some(stream)),
            heads: heads.map(RefCell::new),
            output: Cell::default(),
            ending: RefCell::default(),
            ended: Notify::new(),
            requests: Cell::new(0),
            in_flight: RefCell::default(),
            idle_since: Cell::new(Instant::now()),
            cut: Cell::new(false),
        })
    }

    /// The bytes of the oldest request head that nobody took yet.
    pub(super) fn take_head(&self) -> Option<Vec<u8>> {
        self.heads.as_ref()?.borrow_mut().take()
    }

    /// Asks the driver to end the connection. The first wish counts.
    pub(super) fn end(&self, ending: Ending) {
        self.output.set(Output::Over);
        self.ending.borrow_mut().get_or_insert(ending);
        self.ended.notify_one();
    }

    /// A new request begins: a limit that the reply before it did not reach is over.
    pub(super) fn begin_request(&self) {
        if let Output::AtMost(..) = self.output.get() {
            self.output.set(Output::Free);
        }
    }

    /// Lets at most `bytes` more of the reply leave, then ends the connection.
    pub(super) fn end_after(&self, bytes: usize, end: End) {
        self.output.set(Output::AtMost(bytes, end));
    }

    /// Ends the connection when what is about to be written has left.
    pub(super) fn end_after_flush(&self, end: End) {
        self.output.set(Output::AfterFlush(end));
    }

    /// Waits until somebody asked for the end. Cancelling it loses nothing.
    pub(super) async fn ending(&self) -> Ending {
        loop {
            if let Some(ending) = self.ending.borrow_mut().take() {
                return ending;
            }
            self.ended.notified().await;
        }
    }

    /// Takes the stream away from hyper and ends it.
    pub(super) async fn finish(&self, ending: Ending) {
        let stream = self.stream.borrow_mut().take();
        if let Some(stream) = stream
            && let Err(error) = stream.end(ending).await
        {
            tracing::debug!(%error, "the client left first");
        }
    }

    /// Marks a request as in flight until the guard is dropped.
    pub(super) fn busy(self: &Rc<Self>, headers: &HeaderMap) -> Busy {
        let number = self.requests.get() + 1;
        self.requests.set(number);
        self.in_flight.borrow_mut().push(InFlight { number, id: headers.get("x-request-id").cloned(), replied: false });
        Busy(Rc::clone(self), number)
    }

    /// Since when no request is in flight; `None` while one is.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        self.in_flight.borrow().iter().all(|request| request.replied).then(|| self.idle_since.get())
    }

    /// How many requests came so far.
    pub(super) fn requests(&self) -> u64 {
        self.requests.get()
    }

    /// Whether the client ended it without a `close_notify`.
    pub(super) fn was_cut(&self) -> bool {
        self.cut.get()
    }

    /// What an end would interrupt now.
    pub(super) fn interrupted(&self) -> Vec<Interrupted> {
        let id = |request: &InFlight| request.id.as_ref()?.to_str().ok().map(str::to_owned);
        self.in_flight.borrow().iter().map(|request| Interrupted { id: id(request), first: request.number == 1 }).collect()
    }

    fn poll_stream<T>(&self, poll: impl FnOnce(Pin<&mut Stream>) -> Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        match self.stream.borrow_mut().as_mut() {
            Some(stream) => poll(Pin::new(stream)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

/// A request in flight on its connection.
pub(super) struct Busy(Rc<Wire>, u64);

impl Drop for Busy {
    fn drop(&mut self) {
        for request in self.0.in_flight.borrow_mut().iter_mut().filter(|request| request.number == self.1) {
            request.replied = true;
        }
        self.0.idle_since.set(Instant::now());
    }
}

/// hyper's end of the connection.
pub(super) struct Tap(pub(super) Rc<Wire>);

impl AsyncRead for Tap {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let wire = &self.0;
        let before = buf.filled().len();
        let polled = wire.poll_stream(|stream| stream.poll_read(cx, buf));
        if let Some(heads) = &wire.heads {
            heads.borrow_mut().received(&buf.filled()[before..]);
        }
        if let Poll::Ready(Err(error)) = &polled {
            wire.cut.set(error.kind() == io::ErrorKind::UnexpectedEof);
        }
        polled
    }
}

impl AsyncWrite for Tap {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let wire = &self.0;
        match wire.output.get() {
            // Pending without a waker: the driver drops hyper's side of the connection next.
            Output::Over => Poll::Pending,
            Output::AtMost(0, end) => {
                wire.end(end.into());
                Poll::Pending
            }
            Output::AtMost(left, end) => {
                let polled = wire.poll_stream(|stream| stream.poll_write(cx, &bytes[..bytes.len().min(left)]));
                if let Poll::Ready(Ok(written)) = polled {
                    wire.output.set(Output::AtMost(left - written, end));
                }
                polled
            }
            Output::Free | Output::AfterFlush(_) => wire.poll_stream(|stream| stream.poll_write(cx, bytes)),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let wire = &self.0;
        let polled = wire.poll_stream(|stream| stream.poll_flush(cx));
        if polled.is_ready() {
            wire.in_flight.borrow_mut().retain(|request| !request.replied);
        }
        if matches!(polled, Poll::Ready(Ok(())))
            && let Output::AfterFlush(end) | Output::AtMost(0, end) = wire.output.get()
        {
            wire.end(end.into());
        }
        polled
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.0.output.get() {
            Output::Over => Poll::Pending,
            _ => self.0.poll_stream(|stream| stream.poll_shutdown(cx)),
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Tls(tls) => Pin::new(tls).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write(cx, bytes),
            Self::Tls(tls) => Pin::new(tls).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Tls(tls) => Pin::new(tls).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
        }
    }
}
