//! A request that may be sent more than once: its head, kept, and its body, streamed while a bounded copy is taken.
//!
//! A request without a body is never copied, only its head is. A body longer than the limit is not copied either: as soon as that is known the copy
//! is dropped, and the request is sent once. What the copy holds is what was already streamed; a second attempt sends the copy and then goes on with
//! the rest of the live body, so that an early rejection needs no complete upload.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{Method, request};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::headers;
use crate::metrics::WorkerMetrics;
use crate::secret::AuthorizationValue;
use crate::server::clock::Clock;
use crate::upstream::http1::RequestHead;

/// A cleaned request with its body, ready to be sent, and to be sent again.
pub(super) struct Attempts {
    /// With the authorization of the attempt made last.
    head: RequestHead,
    source: Rc<Source>,
    bodyless: bool,
}

/// The one live body and what was copied of it.
struct Source {
    incoming: RefCell<Incoming>,
    copy: RefCell<BodyCopy>,
    /// Bytes received so far.
    received: Cell<u64>,
    limit: Option<u64>,
    failure: Cell<Option<BodyFailure>>,
    /// Counts attempts; the body of an earlier one, which a closing connection may still hold, gets nothing more.
    attempt: Cell<u32>,
    clock: Rc<Clock>,
    metrics: Arc<WorkerMetrics>,
}

/// What was received of a body, kept for the second attempt.
pub enum BodyCopy {
    /// Everything received so far, and how much it may become, in bytes.
    Kept {
        /// Never longer than `limit`.
        bytes: Vec<u8>,
        /// `token.replay_buffer`
        limit: usize,
    },
    /// Not wanted, too large, or used up.
    Gone,
}

impl BodyCopy {
    /// Of a body of which nothing was received yet.
    pub fn new(limit: usize) -> Self {
        Self::Kept { bytes: Vec::new(), limit }
    }

    /// Adds what was just received; what would be longer than the limit is dropped as a whole.
    pub fn add(&mut self, data: &[u8]) {
        if let Self::Kept { bytes, limit } = self {
            if bytes.len() + data.len() > *limit {
                *self = Self::Gone;
            } else {
                bytes.extend_from_slice(data);
            }
        }
    }
}

/// Why a request body ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BodyFailure {
    /// Over `limits.max_request_body`.
    TooLarge,
    /// Its framing is broken (RFC 9112 section 7.1).
    Malformed,
    /// The downstream went away.
    Closed,
}

impl Attempts {
    /// `keep` is the longest body to copy, in bytes; nothing where the request will not be sent again after a rejection.
    pub(super) fn new(
        head: request::Parts,
        incoming: Incoming,
        keep: Option<usize>,
        limit: Option<u64>,
        clock: Rc<Clock>,
        metrics: Arc<WorkerMetrics>,
    ) -> Self {
        let bodyless = incoming.is_end_stream();
        let announced = incoming.size_hint().exact();
        let copy = match keep {
            Some(limit) if !bodyless && announced.is_none_or(|length| length <= limit as u64) => BodyCopy::new(limit),
            _ => BodyCopy::Gone,
        };
        let source = Source {
            incoming: RefCell::new(incoming),
            copy: RefCell::new(copy),
            received: Cell::new(0),
            limit,
            failure: Cell::new(None),
            attempt: Cell::new(0),
            clock,
            metrics,
        };
        let target = head.uri.into_parts().path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"));
        let head = RequestHead { method: head.method, target, headers: head.headers };
        Self { head, source: Rc::new(source), bodyless }
    }

    /// The head, as it goes to the upstream.
    pub(super) fn head(&self) -> &RequestHead {
        &self.head
    }

    /// From now on the request carries this token.
    pub(super) fn authorize(&mut self, authorization: &AuthorizationValue) {
        headers::authorize(&mut self.head.headers, authorization);
    }

    /// The body, for the first time.
    pub(super) fn first(&self) -> RequestBody {
        self.body(Vec::new())
    }

    /// The body once more, with what was streamed of it put in front; nothing where that is no longer at hand or the downstream is gone.
    pub(super) fn again(&self) -> Option<RequestBody> {
        if self.bodyless {
            return Some(self.body(Vec::new()));
        }
        if self.source.failure.get().is_some() {
            return None;
        }
        match std::mem::replace(&mut *self.source.copy.borrow_mut(), BodyCopy::Gone) {
            BodyCopy::Kept { bytes, .. } => Some(self.body(bytes)),
            BodyCopy::Gone => None,
        }
    }

    /// Whether it may be sent again although nobody knows whether the upstream processed it (RFC 9110 section 9.2.2), which is left to the plainest case.
    pub(super) fn is_repeatable(&self) -> bool {
        self.bodyless && matches!(self.head.method, Method::GET | Method::HEAD | Method::OPTIONS)
    }

    /// Why the body ended early, if it did.
    pub(super) fn body_failure(&self) -> Option<BodyFailure> {
        self.source.failure.get()
    }

    /// Bytes of the body received so far.
    pub(super) fn received_bytes(&self) -> u64 {
        self.source.received.get()
    }

    fn body(&self, copied: Vec<u8>) -> RequestBody {
        let attempt = self.source.attempt.get() + 1;
        self.source.attempt.set(attempt);
        RequestBody { source: Rc::clone(&self.source), attempt, copied: Bytes::from(copied) }
    }
}

/// The body of one attempt.
pub struct RequestBody {
    source: Rc<Source>,
    attempt: u32,
    copied: Bytes,
}

/// What a connection gets to hear when a request body ends early. The reason is kept beside it, for the answer to the downstream.
#[derive(Debug, thiserror::Error)]
#[error("the downstream's body ended early")]
pub struct BodyEnded;

impl Source {
    /// The next bytes from the downstream, counted, checked and copied.
    fn poll_data(&self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, BodyFailure>>> {
        loop {
            let frame = Pin::new(&mut *self.incoming.borrow_mut()).poll_frame(cx);
            self.clock.uploading(frame.is_pending());
            let data = match ready!(frame) {
                None => {
                    self.clock.uploaded();
                    return Poll::Ready(None);
                }
                Some(Err(error)) => {
                    return Poll::Ready(Some(Err(if is_malformed(&error) { BodyFailure::Malformed } else { BodyFailure::Closed })));
                }
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => data,
                    // Trailers could smuggle fields past the cleaning; they are dropped (RFC 9110 section 6.5.1 allows it).
                    Err(_trailers) => {
                        self.clock.trailers();
                        continue;
                    }
                },
            };
            self.received.set(self.received.get() + data.len() as u64);
            self.metrics.request_bytes(data.len() as u64);
            if self.limit.is_some_and(|limit| self.received.get() > limit) {
                return Poll::Ready(Some(Err(BodyFailure::TooLarge)));
            }
            self.copy.borrow_mut().add(&data);
            if self.incoming.borrow().is_end_stream() {
                self.clock.uploaded();
            }
            return Poll::Ready(Some(Ok(data)));
        }
    }
}

/// Hyper reports broken chunks as an I/O error of its decoder; the end of the stream, or a reset, has another kind.
fn is_malformed(error: &hyper::Error) -> bool {
    let io = std::error::Error::source(error).and_then(|cause| cause.downcast_ref::<std::io::Error>());
    error.is_parse() || io.is_some_and(|io| matches!(io.kind(), std::io::ErrorKind::InvalidInput | std::io::ErrorKind::InvalidData))
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BodyEnded;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyEnded>>> {
        if self.attempt != self.source.attempt.get() || self.source.failure.get().is_some() {
            return Poll::Ready(Some(Err(BodyEnded)));
        }
        if !self.copied.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut self.copied)))));
        }
        Poll::Ready(ready!(self.source.poll_data(cx)).map(|data| match data {
            Ok(data) => Ok(Frame::data(data)),
            Err(failure) => {
                self.source.failure.set(Some(failure));
                Err(BodyEnded)
            }
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.copied.is_empty() && self.source.incoming.borrow().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let copied = self.copied.len() as u64;
        let rest = self.source.incoming.borrow().size_hint();
        rest.exact().map_or_else(SizeHint::new, |rest| SizeHint::with_exact(copied + rest))
    }
}
