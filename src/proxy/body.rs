//! A response body in passing, and the record of its exchange, which ends with it.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};

use super::exchange::Exchange;
use super::headers;
use super::replay::RequestBody;
use crate::secret::AuthorizationValue;
use crate::upstream::pool::ReplyBody;

/// What the downstream reads: a relayed body or one of the proxy's own answers. Holds the exchange open until the last byte.
pub struct ResponseBody {
    content: Content,
    exchange: Exchange,
}

enum Content {
    Own(Option<Bytes>),
    Relayed {
        body: ReplyBody<RequestBody>,
        /// The token that was sent, which no trailer may carry back.
        authorization: AuthorizationValue,
        wants_trailers: bool,
    },
    BrokenOff,
}

/// The upstream's body broke off; so does the downstream's, without a clean end (RFC 9112 section 8).
#[derive(Debug, thiserror::Error)]
#[error("the upstream's response broke off")]
pub struct BrokenOff;

impl ResponseBody {
    /// One of the proxy's own answers.
    pub(super) fn own(bytes: Bytes, exchange: Exchange) -> Self {
        Self { content: Content::Own(Some(bytes).filter(|bytes| !bytes.is_empty())), exchange }
    }

    /// The upstream's.
    pub(super) fn relayed(
        body: ReplyBody<RequestBody>,
        authorization: AuthorizationValue,
        wants_trailers: bool,
        exchange: Exchange,
    ) -> Self {
        Self { content: Content::Relayed { body, authorization, wants_trailers }, exchange }
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        let this = &mut *self;
        let (body, authorization, wants_trailers) = match &mut this.content {
            Content::Own(bytes) => {
                let bytes = bytes.take();
                this.exchange.relayed(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64));
                return Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))));
            }
            Content::BrokenOff => return Poll::Ready(Some(Err(BrokenOff))),
            Content::Relayed { body, authorization, wants_trailers } => (body, authorization, *wants_trailers),
        };
        loop {
            return Poll::Ready(match ready!(Pin::new(&mut *body).poll_frame(cx)) {
                None => {
                    this.exchange.complete();
                    None
                }
                Some(Err(error)) => {
                    this.exchange.broke_off(&error);
                    this.content = Content::BrokenOff;
                    // Hyper drops what it has not sent when a body fails: it gets one turn to send what came before the break.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        this.exchange.relayed(data.len() as u64);
                        if body.is_end_stream() {
                            this.exchange.complete();
                        }
                        Some(Ok(Frame::data(data)))
                    }
                    Err(frame) => match frame.into_trailers() {
                        Ok(mut trailers) if wants_trailers => {
                            this.exchange.complete();
                            headers::clean_trailers(&mut trailers, authorization);
                            Some(Ok(Frame::trailers(trailers)))
                        }
                        _ => continue,
                    },
                },
            });
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Own(bytes) => bytes.is_none(),
            Content::BrokenOff => false,
            Content::Relayed { body, .. } => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Own(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64)),
            Content::BrokenOff => SizeHint::new(),
            Content::Relayed { body, .. } => body.size_hint(),
        }
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        if !self.is_end_stream() {
            self.exchange.cut_short();
        }
    }
}
