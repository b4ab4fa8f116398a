//! The byte stream of a downstream connection: tells its [`Clock`] what moves, and comes back when hyper is done with it.

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::Sleep;
use tokio_rustls::server::TlsStream;

use super::clock::{Clock, Phase};

/// A downstream that closed its sending side may still be waiting for the response (RFC 9112 section 9.6), or it may be gone: TCP does not tell. It
/// gets this long to be answered; then the exchange is cancelled. Once the response flows, writing finds out.
const HALF_CLOSE_GRACE: Duration = Duration::from_secs(1);

/// Any accepted connection.
#[derive(Debug)]
pub enum Stream {
    /// Plain TCP.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
    /// TLS over TCP.
    Tls(Box<TlsStream<TcpStream>>),
}

macro_rules! each {
    ($self:expr, $stream:ident => $do:expr) => {
        match $self {
            Stream::Tcp($stream) => $do,
            Stream::Unix($stream) => $do,
            Stream::Tls($stream) => $do,
        }
    };
}

impl Stream {
    /// Closing resets the connection from now on. A TLS stream needs none: without its `close_notify` its end is known to be untimely. Nor can a Unix
    /// socket be reset.
    fn reset_when_dropped(&self) {
        if let Self::Tcp(stream) = self {
            // A socket that refuses the option is closed all the same, only less tellingly.
            let _ = stream.set_zero_linger();
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), stream => Pin::new(stream).poll_read(cx, buffer))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        each!(self.get_mut(), stream => Pin::new(stream).poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), stream => Pin::new(stream).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self.get_mut(), stream => Pin::new(stream).poll_shutdown(cx))
    }

    fn is_write_vectored(&self) -> bool {
        each!(self, stream => stream.is_write_vectored())
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        each!(self.get_mut(), stream => Pin::new(stream).poll_write_vectored(cx, slices))
    }
}

/// Where a [`Watched`] stream is left when it is dropped. Hyper's connection takes the stream for good, but what follows it, a 408 or a lingering
/// close, needs it back.
pub(super) type Returned = Rc<Cell<Option<Stream>>>;

/// A stream in hyper's hands.
pub(super) struct Watched {
    stream: Option<Stream>,
    clock: Rc<Clock>,
    returned: Returned,
    half_closed: Option<Pin<Box<Sleep>>>,
}

impl Watched {
    pub(super) fn new(stream: Stream, clock: Rc<Clock>, returned: Returned) -> Self {
        Self { stream: Some(stream), clock, returned, half_closed: None }
    }

    fn stream(&mut self) -> &mut Stream {
        self.stream.as_mut().expect("present until dropped")
    }

    /// Holds the end of the downstream's sending side back while its request is not yet answered. Whether the request is complete is not known here:
    /// hyper may have read the last of its body, and the upstream not yet have taken it. One that is not complete ends with the grace.
    fn poll_half_close(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.clock.phase() {
            Phase::Relay if !self.clock.is_upload_pending() => Poll::Pending,
            Phase::Waiting | Phase::Upload | Phase::Response | Phase::Relay => {
                self.half_closed.get_or_insert_with(|| Box::pin(tokio::time::sleep(HALF_CLOSE_GRACE))).as_mut().poll(cx)
            }
            Phase::Idle | Phase::Head => Poll::Ready(()),
        }
    }
}

impl Drop for Watched {
    /// Gives the stream back; unless the response has no end yet that its downstream could see, which then must not see one.
    fn drop(&mut self) {
        let stream = self.stream.take();
        if self.clock.is_open_ended() {
            stream.iter().for_each(Stream::reset_when_dropped);
        } else {
            self.returned.set(stream);
        }
    }
}

impl AsyncRead for Watched {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        ready!(Pin::new(this.stream()).poll_read(cx, buffer))?;
        if buffer.filled().len() > before {
            this.clock.received();
        } else {
            ready!(this.poll_half_close(cx));
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Watched {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(this.stream()).poll_write(cx, bytes))?;
        this.clock.sent();
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.get_mut().stream()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(self.get_mut().stream()).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.as_ref().is_some_and(AsyncWrite::is_write_vectored)
    }

    fn poll_write_vectored(self: Pin<&mut Self>, cx: &mut Context<'_>, slices: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = ready!(Pin::new(this.stream()).poll_write_vectored(cx, slices))?;
        this.clock.sent();
        Poll::Ready(Ok(written))
    }
}
