//! Response bodies: deterministic bytes of any length, slow ones, and the wrapper that cuts a body at a given byte.

use std::convert::Infallible;
use std::error::Error as StdError;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderValue};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt, Full, StreamBody};

use super::faults::End;
use super::stream::{Busy, Wire};

/// Any body that a reply may have. It stays on its thread.
pub(super) type Body = Pin<Box<dyn http_body::Body<Data = Bytes, Error = BodyError>>>;

/// Why a body broke off; only an echoed request body can.
pub(super) type BodyError = Box<dyn StdError + Send + Sync>;

pub(super) fn full(bytes: impl Into<Bytes>) -> Body {
    boxed(Full::new(bytes.into()))
}

pub(super) fn boxed<B>(body: B) -> Body
where
    B: http_body::Body<Data = Bytes> + 'static,
    B::Error: Into<BodyError>,
{
    Box::pin(body.map_err(Into::into))
}

/// The content of `GET /bytes/{n}`: what stands at `position`. The period is a prime, so that a lost or doubled buffer shows.
pub fn byte_at(position: u64) -> u8 {
    u8::try_from(position % PERIOD).expect("the remainder is below 251")
}

const PERIOD: u64 = 251;
const FRAME: u64 = 16 * 1024;

/// So many bytes of [`byte_at`]. With `known` the length is announced (`content-length`), else the framing is chunked.
pub(super) fn pattern(length: u64, known: bool) -> Body {
    let period = (0..FRAME + PERIOD).map(byte_at).collect();
    boxed(Pattern { period, position: 0, length, known })
}

struct Pattern {
    /// One frame from any position of the period is a slice of this.
    period: Bytes,
    position: u64,
    length: u64,
    known: bool,
}

impl http_body::Body for Pattern {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let size = FRAME.min(self.length - self.position);
        if size == 0 {
            return Poll::Ready(None);
        }
        let start = usize::from(byte_at(self.position));
        self.position += size;
        let size = usize::try_from(size).expect("at most one frame");
        Poll::Ready(Some(Ok(Frame::data(self.period.slice(start..start + size)))))
    }

    fn is_end_stream(&self) -> bool {
        self.known && self.position == self.length
    }

    fn size_hint(&self) -> SizeHint {
        if self.known { SizeHint::with_exact(self.length - self.position) } else { SizeHint::default() }
    }
}

/// `lines` numbered lines, one each `interval`; the first at once.
pub(super) fn slow(lines: u32, interval: Duration) -> Body {
    boxed(StreamBody::new(Box::pin(stream::unfold(0, move |line| async move {
        if line == lines {
            return None;
        }
        if line > 0 {
            tokio::time::sleep(interval).await;
        }
        Some((Ok::<_, Infallible>(Frame::data(Bytes::from(format!("line {line}\n")))), line + 1))
    }))))
}

/// A short chunked body with the trailer `x-checksum`.
pub(super) fn with_trailers() -> Body {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-checksum", HeaderValue::from_static("simulated"));
    let frames = [Frame::data(Bytes::from_static(b"content\n")), Frame::trailers(trailers)];
    boxed(StreamBody::new(stream::iter(frames.map(Ok::<_, Infallible>))))
}

/// A body on its way out: marks its connection busy until its end, and cuts it where a fault says so.
pub(super) struct Outgoing {
    inner: Body,
    wire: Rc<Wire>,
    cut: Option<(u64, End)>,
    _busy: Busy,
}

impl Outgoing {
    /// `cut`: after so many bytes of content, in this way.
    pub(super) fn new(inner: Body, wire: Rc<Wire>, busy: Busy, cut: Option<(u64, End)>) -> Self {
        Self { inner, wire, cut, _busy: busy }
    }

    /// The bytes that still belong before the cut are about to be written.
    fn arm(&self, end: End) {
        if end != End::Stay {
            self.wire.end_after_flush(end);
        }
    }
}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some((left, end)) = self.cut else {
            return self.inner.as_mut().poll_frame(cx);
        };
        if left == 0 {
            self.arm(end);
            return Poll::Pending;
        }
        let polled = self.inner.as_mut().poll_frame(cx);
        let Poll::Ready(Some(Ok(frame))) = polled else {
            return polled;
        };
        let data = match frame.into_data() {
            Ok(data) => data,
            Err(trailers) => return Poll::Ready(Some(Ok(trailers))), // the body was shorter than the cut
        };
        let data = data.slice(..data.len().min(usize::try_from(left).unwrap_or(usize::MAX)));
        let left = left - data.len() as u64;
        self.cut = Some((left, end));
        if left == 0 {
            self.arm(end);
        }
        Poll::Ready(Some(Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        // An ended body lets hyper announce the end of the stream; a body that will be cut must not look like one.
        self.cut.is_none() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
