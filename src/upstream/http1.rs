//! One HTTP/1.1 connection to the upstream, and one exchange at a time on it (RFC 9112).
//!
//! Hyper speaks HTTP downstream and HTTP/2; here it is done without it. Hyper's client wants a task that drives the connection, with a channel for
//! requests, one for the response and one for its body, each of which wakes somebody; half of what a request cost was that. Here whoever waits for the
//! response moves the connection, and nothing is woken but by the socket. The grammar of heads and chunk sizes is httparse's, as it is hyper's.
//!
//! What a newcomer would get wrong: the upload goes on while the response is awaited *and* while it is relayed (RFC 9112 section 9.5). While a head is
//! awaited [`Http1::poll_head`] does both; once there is one, the response is moved by its reader, who may be slower than the upload, so that what is
//! left of the upload must be moved by somebody else ([`Http1::poll_upload`]).

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice, Write as _};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes, BytesMut};
use http::uri::PathAndQuery;
use http::{HeaderMap, Method, StatusCode, response};
use http_body::{Body, Frame, SizeHint};
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::task::coop;

use super::connect::Connection;
use decode::Decoder;

pub(super) use head::MAX_BYTES as MAX_HEAD_BYTES;
pub(crate) use head::{Framing, framing};

mod decode;
#[cfg(fuzzing)]
pub mod fuzzing;
mod head;
#[cfg(test)]
mod tests;

/// What is read at a time, in bytes: enough for a head and a small body,
const MIN_READ: usize = 4 * 1024;
/// and up to this when reads fill what they get.
const MAX_READ: usize = 64 * 1024;

/// The head of a request as it goes to the upstream: origin-form target, `host` and framing among its fields. Nothing is added to it here.
#[derive(Debug)]
pub struct RequestHead {
    /// Method.
    pub method: Method,
    /// Path and query.
    pub target: PathAndQuery,
    /// All fields.
    pub headers: HeaderMap,
}

/// Why an exchange failed. Nothing of a message is quoted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection ended, or something came on it, before it took a byte of the request.
    #[error("the connection ended, or something came on it, before the request was sent")]
    NotSent,
    /// The request's own body failed; the cause lies downstream.
    #[error("the request body failed")]
    RequestBody,
    /// The upstream closed the connection before the response was complete.
    #[error("it closed the connection before the response was complete")]
    Closed,
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[from] io::Error),
    /// What came is not HTTP/1, or contradicts itself.
    #[error("{0}")]
    Malformed(&'static str),
}

/// A connection; between exchanges it waits in the pool. `B` is the request's body.
pub(super) struct Http1<B> {
    io: Connection,
    /// Received and not yet taken.
    received: BytesMut,
    /// How much to read at a time, in bytes.
    read_size: usize,
    /// Whether anything was received since the exchange began.
    anything_came: bool,
    upload: Upload<B>,
    response: Decoder,
    keep_alive: bool,
    /// Who waits for the response; to be told when the upload needs it, or fails under it.
    reader: Option<Waker>,
}

/// The request on its way.
struct Upload<B> {
    /// To be sent: the head, or a chunk's size;
    encoded: Vec<u8>,
    /// behind it a piece of the body;
    data: Bytes,
    /// behind that the chunk's end.
    behind: &'static [u8],
    body: Rest<B>,
    /// Whether it waits for [`Http1::depart`].
    held: bool,
    /// Whether the connection took a byte of the request.
    begun: bool,
    flushed: bool,
}

/// What is left of a request's body.
enum Rest<B> {
    Nothing,
    /// As much as `content-length` said, in bytes.
    Length {
        body: B,
        left: u64,
    },
    Chunked(B),
    Failed,
}

impl<B> Http1<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    pub(super) fn new(io: Connection) -> Self {
        Self {
            io,
            received: BytesMut::new(),
            read_size: MIN_READ,
            anything_came: false,
            upload: Upload {
                encoded: Vec::new(),
                data: Bytes::new(),
                body: Rest::Nothing,
                behind: b"",
                held: false,
                begun: false,
                flushed: true,
            },
            response: Decoder::Ended,
            keep_alive: true,
            reader: None,
        }
    }

    /// Whether the exchange is complete in both directions and the connection stays open for another.
    pub(super) fn is_complete(&self) -> bool {
        self.keep_alive
            && self.response.is_ended()
            && self.is_upload_complete()
            && self.received.is_empty()
            && !self.io.is_closed_for_writing()
    }

    /// Whether nothing came since the last exchange: neither a close nor bytes, which nobody asked for and which could pass for the next response
    /// (RFC 9112 section 6.3). What TLS alone has to say is read and is nothing.
    pub(super) fn is_quiet(&mut self) -> bool {
        // Out of budget, which other work of this task may have used up, tokio would say that there is nothing.
        let arrival =
            pin!(coop::unconstrained(poll_fn(|cx| { if self.io.is_quiet(cx) { Poll::Pending } else { self.poll_receive(cx).map(drop) } })));
        arrival.poll(&mut Context::from_waker(Waker::noop())).is_pending()
    }

    /// Gives back the memory that an idle connection does not need.
    pub(super) fn shrink(&mut self) {
        self.received = BytesMut::new();
        self.read_size = MIN_READ;
        self.upload.encoded = Vec::new();
    }

    /// Begins an exchange. Nothing is sent before [`depart`](Self::depart).
    pub(super) fn begin(&mut self, request: &RequestHead, body: B) {
        head::encode(&mut self.upload.encoded, request);
        self.upload.body = match body.size_hint().exact() {
            Some(left) => Rest::Length { body, left },
            None => Rest::Chunked(body),
        };
        self.upload.held = true;
        self.upload.begun = false;
        self.upload.flushed = false;
        self.response = Decoder::awaiting_head(request.method == Method::HEAD);
        self.anything_came = false;
    }

    /// Sends a request without a body, and leaves any other to whoever waits for its response: what many depart with polls nobody's body.
    pub(super) fn depart(&mut self) {
        self.upload.held = false;
        let is_sent = matches!(self.upload.body, Rest::Nothing | Rest::Length { left: 0, .. })
            && matches!(self.poll_upload(&mut Context::from_waker(Waker::noop())), Poll::Ready(Ok(())));
        if !is_sent {
            self.wake_reader();
        }
    }

    fn wake_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    /// Ends an exchange of which nothing was sent: the body comes back, unread.
    pub(super) fn take_back(&mut self) -> Option<B> {
        match std::mem::replace(&mut self.upload.body, Rest::Failed) {
            Rest::Length { body, .. } | Rest::Chunked(body) => Some(body),
            Rest::Nothing | Rest::Failed => None,
        }
    }

    /// Whether anything was received since the exchange began.
    pub(super) fn has_received(&self) -> bool {
        self.anything_came
    }

    /// Sends the request and receives the head of the response; interim ones (RFC 9110 section 15.2) are skipped. Cancel safe.
    pub(super) fn poll_head(&mut self, cx: &mut Context<'_>) -> Poll<Result<response::Parts, Error>> {
        if self.upload.held {
            self.reader = Some(cx.waker().clone());
        } else if let Poll::Ready(Err(error)) = self.poll_upload(cx) {
            return Poll::Ready(Err(error));
        }
        loop {
            match head::take(&mut self.received)? {
                Some(head) if is_interim(head.parts.status) => {}
                Some(head) => {
                    let delimited = self.response.begin(&head.parts)?;
                    self.keep_alive = delimited && head.keep_alive;
                    return Poll::Ready(Ok(head.parts));
                }
                None => {
                    let received = ready!(self.poll_receive(cx));
                    if !self.upload.begun {
                        // Whatever it is, it is no answer: as with a connection that is not quiet any more.
                        return Poll::Ready(Err(Error::NotSent));
                    }
                    if received? == 0 {
                        return Poll::Ready(Err(Error::Closed));
                    }
                }
            }
        }
    }

    /// The next frame of the response's body. Cancel safe.
    pub(super) fn poll_body(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        loop {
            if matches!(self.upload.body, Rest::Failed) {
                return Poll::Ready(Some(Err(Error::RequestBody)));
            }
            if self.response.is_ended() {
                return Poll::Ready(None);
            }
            match self.response.decode(&mut self.received) {
                Ok(Some(frame)) => return Poll::Ready(Some(Ok(frame))),
                Ok(None) if self.response.is_ended() => return Poll::Ready(None),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Some(Err(error))),
            }
            if !self.upload.flushed {
                self.reader = Some(cx.waker().clone());
            }
            match ready!(self.poll_receive(cx)) {
                Ok(0) => {
                    return Poll::Ready(match self.response.end_of_connection() {
                        Ok(()) => None,
                        Err(error) => Some(Err(error)),
                    });
                }
                Ok(_) => {}
                Err(error) => return Poll::Ready(Some(Err(error.into()))),
            }
        }
    }

    /// Whether [`poll_body`](Self::poll_body) has nothing more to give.
    pub(super) fn is_end_of_body(&self) -> bool {
        self.response.is_ended()
    }

    /// How much of the response's body is still to come, where that is known.
    pub(super) fn body_size(&self) -> SizeHint {
        self.response.size_hint()
    }

    /// Whether all of the request is sent.
    pub(super) fn is_upload_complete(&self) -> bool {
        self.upload.flushed
    }

    /// Sends what is left of the request. An upstream that takes no more of it ends nothing: its response will tell. Cancel safe.
    pub(super) fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        while !self.upload.flushed {
            ready!(self.poll_send(cx))?;
            match self.upload.poll_encode(cx) {
                Poll::Ready(Ok(true)) => {}
                Poll::Ready(Ok(false)) => {
                    ready!(Pin::new(&mut self.io).poll_flush(cx))?;
                    self.upload.flushed = true;
                    self.reader = None;
                }
                Poll::Ready(Err(error)) => {
                    self.upload.body = Rest::Failed;
                    self.wake_reader();
                    return Poll::Ready(Err(error));
                }
                Poll::Pending => {
                    // TLS holds back what the socket did not take.
                    let _ = Pin::new(&mut self.io).poll_flush(cx)?;
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Error>> {
        let Upload { encoded, data, behind, begun, .. } = &mut self.upload;
        while !(encoded.is_empty() && data.is_empty() && behind.is_empty()) {
            let io = Pin::new(&mut self.io);
            let sent = ready!(if data.is_empty() && behind.is_empty() {
                io.poll_write(cx, encoded)
            } else {
                io.poll_write_vectored(cx, &[IoSlice::new(encoded), IoSlice::new(data), IoSlice::new(behind)])
            })?;
            if sent == 0 {
                return Poll::Ready(Err(Error::Io(io::ErrorKind::WriteZero.into())));
            }
            if !*begun && self.io.is_closed_for_writing() {
                return Poll::Ready(Err(Error::NotSent));
            }
            *begun = true;
            let sent_encoded = sent.min(encoded.len());
            let sent_data = (sent - sent_encoded).min(data.len());
            encoded.drain(..sent_encoded);
            data.advance(sent_data);
            *behind = &behind[sent - sent_encoded - sent_data..];
        }
        Poll::Ready(Ok(()))
    }

    /// Reads once; zero is the end of the connection.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        self.received.reserve(self.read_size);
        let read = ready!(pin!(self.io.read_buf(&mut self.received)).poll(cx))?;
        self.anything_came |= read > 0;
        if read >= self.read_size {
            self.read_size = (self.read_size * 2).min(MAX_READ);
        }
        Poll::Ready(Ok(read))
    }
}

/// Between exchanges it says goodbye (RFC 8446 section 6.1), without waiting for anything. An exchange that is given up ends without: it was not whole.
impl<B> Drop for Http1<B> {
    fn drop(&mut self) {
        if self.response.is_ended() && self.upload.flushed {
            // A socket that is full takes no TLS alert; then the end comes without it.
            let _ = Pin::new(&mut self.io).poll_shutdown(&mut Context::from_waker(Waker::noop()));
        }
    }
}

impl<B> Upload<B>
where
    B: Body<Data = Bytes> + Unpin,
{
    /// Takes the next piece of the body and encodes what stands around it (RFC 9112 section 7.1). False at the body's end.
    fn poll_encode(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Error>> {
        let body = match &mut self.body {
            Rest::Nothing | Rest::Length { left: 0, .. } => {
                self.body = Rest::Nothing;
                return Poll::Ready(Ok(false));
            }
            Rest::Failed => return Poll::Ready(Err(Error::RequestBody)),
            Rest::Length { body, .. } | Rest::Chunked(body) => body,
        };
        let data = match ready!(Pin::new(body).poll_frame(cx)) {
            None => None,
            // Trailers end here (RFC 9110 section 6.5.1 allows it); an empty piece would pass for the last chunk.
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) if !data.is_empty() => Some(data),
                Ok(_) | Err(_) => return Poll::Ready(Ok(true)),
            },
            Some(Err(_)) => return Poll::Ready(Err(Error::RequestBody)),
        };
        match (&mut self.body, data) {
            (Rest::Length { left, .. }, Some(data)) => {
                // The announced length is what delimits the request; a body that differs must not be sent to its end.
                *left = left.checked_sub(data.len() as u64).ok_or(Error::RequestBody)?;
                self.data = data;
            }
            (Rest::Length { .. }, None) => return Poll::Ready(Err(Error::RequestBody)),
            (Rest::Chunked(_), Some(data)) => {
                // A Vec takes everything.
                let _ = write!(self.encoded, "{:x}\r\n", data.len());
                self.data = data;
                self.behind = b"\r\n";
            }
            (Rest::Chunked(_), None) => {
                self.encoded.extend_from_slice(b"0\r\n\r\n");
                self.body = Rest::Nothing;
            }
            (Rest::Nothing | Rest::Failed, _) => {}
        }
        Poll::Ready(Ok(true))
    }
}

/// An interim response, of which any number may come before the final one. A 101 is not one: it is the last thing that HTTP says on a connection.
fn is_interim(status: StatusCode) -> bool {
    status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS
}
