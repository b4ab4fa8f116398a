//! What the simulator received, for tests to look at: each request with its bytes, the connection it came on and whether it was complete.

use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::request::Parts;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use super::control::Control;
use super::heads::fields;

/// So much of a body is kept; beyond it only [`Received::body_length`] grows.
pub const MAX_RECORDED_BODY: usize = 1024 * 1024;

/// One request as it arrived. It is recorded as soon as its head is there; the body fields grow while it comes in.
#[derive(Clone)]
pub struct Received {
    /// Counts the requests of this simulator from 1.
    pub number: u64,
    /// The connection that it came on, counted from 1.
    pub connection: u64,
    /// HTTP/1.0, 1.1 or 2.
    pub version: http::Version,
    /// The method, in its exact case.
    pub method: String,
    /// The request target exactly as sent; with HTTP/2 its `:path`.
    pub target: String,
    /// The head byte for byte, request line and final empty line included; empty with HTTP/2.
    pub head: Vec<u8>,
    /// The fields in order of arrival, names in the case that was sent, white space around values removed. With HTTP/2 names are lower-case and
    /// pseudo-fields missing.
    pub headers: Vec<(String, Vec<u8>)>,
    /// The content without its framing, at most [`MAX_RECORDED_BODY`] bytes of it.
    pub body: Vec<u8>,
    /// Bytes of content in all.
    pub body_length: u64,
    /// Trailer fields.
    pub trailers: Vec<(String, Vec<u8>)>,
    /// Whether the body arrived to its end. Stays false where the simulator did not read it.
    pub complete: bool,
}

impl Received {
    /// All values of a field, whatever the case of its name, in order.
    pub fn header_all(&self, name: &str) -> Vec<&[u8]> {
        self.headers.iter().filter(|(field, _)| field.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_slice()).collect()
    }

    /// The only value of a field as text; `None` where it is missing, repeated or not UTF-8.
    pub fn header(&self, name: &str) -> Option<&str> {
        match self.header_all(name)[..] {
            [value] => std::str::from_utf8(value).ok(),
            _ => None,
        }
    }

    /// The target without its query.
    pub fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// Whether this is `method` for `path`, the query aside.
    pub fn is(&self, method: &str, path: &str) -> bool {
        self.method == method && self.path() == path
    }
}

/// One line for failure messages. Field values are left out: tokens and passwords are among them.
impl fmt::Debug for Received {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { number, connection, method, target, body_length, complete, .. } = self;
        let state = if *complete { "complete" } else { "incomplete" };
        write!(f, "#{number} on connection {connection}: {method} {target}, {body_length} bytes of body, {state}")
    }
}

/// All requests received so far.
#[derive(Default)]
pub(super) struct Log {
    last_number: u64,
    received: Vec<Received>,
}

impl Log {
    pub(super) fn received(&self) -> &[Received] {
        &self.received
    }

    pub(super) fn clear(&mut self) {
        self.received.clear();
    }

    /// Records a request head and returns the number of the record.
    pub(super) fn head(&mut self, connection: u64, parts: &Parts, head: Vec<u8>) -> u64 {
        self.last_number += 1;
        self.received.push(Received {
            number: self.last_number,
            connection,
            version: parts.version,
            method: parts.method.to_string(),
            target: target(parts, &head),
            headers: headers(parts, &head),
            head,
            body: Vec::new(),
            body_length: 0,
            trailers: Vec::new(),
            complete: false,
        });
        self.last_number
    }

    /// The record of a request, unless it was cleared away.
    fn get(&mut self, number: u64) -> Option<&mut Received> {
        let index = self.received.binary_search_by_key(&number, |received| received.number).ok()?;
        self.received.get_mut(index)
    }

    fn frame(&mut self, number: u64, frame: &Frame<Bytes>) {
        let Some(record) = self.get(number) else { return };
        if let Some(data) = frame.data_ref() {
            let room = MAX_RECORDED_BODY - record.body.len();
            record.body.extend_from_slice(&data[..data.len().min(room)]);
            record.body_length += data.len() as u64;
        } else if let Some(trailers) = frame.trailers_ref() {
            record.trailers = trailers.iter().map(|(name, value)| (name.to_string(), value.as_bytes().to_vec())).collect();
        }
    }

    fn complete(&mut self, number: u64) {
        if let Some(record) = self.get(number) {
            record.complete = true;
        }
    }
}

fn target(parts: &Parts, head: &[u8]) -> String {
    let line = head.split(|&byte| byte == b'\r').next().unwrap_or_default();
    match line.split(|&byte| byte == b' ').nth(1) {
        Some(target) => String::from_utf8_lossy(target).into_owned(),
        None => parts.uri.path_and_query().map_or_else(|| parts.uri.to_string(), ToString::to_string),
    }
}

fn headers(parts: &Parts, head: &[u8]) -> Vec<(String, Vec<u8>)> {
    if head.is_empty() {
        return parts.headers.iter().map(|(name, value)| (name.to_string(), value.as_bytes().to_vec())).collect();
    }
    fields(head).map(|(name, value)| (String::from_utf8_lossy(name).into_owned(), value.to_vec())).collect()
}

/// A request body that is recorded while it is read.
pub(super) struct RecordedBody {
    inner: Incoming,
    /// `None` where nothing is recorded.
    record: Option<(Control, u64)>,
}

impl RecordedBody {
    pub(super) fn new(inner: Incoming, record: Option<(Control, u64)>) -> Self {
        let body = Self { inner, record };
        if body.inner.is_end_stream() {
            body.update(Log::complete);
        }
        body
    }

    fn update(&self, change: impl FnOnce(&mut Log, u64)) {
        if let Some((control, number)) = &self.record {
            control.change(|state| change(&mut state.log, *number));
        }
    }
}

impl Body for RecordedBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let polled = Pin::new(&mut self.inner).poll_frame(cx);
        match &polled {
            Poll::Ready(Some(Ok(frame))) => {
                self.update(|log, number| log.frame(number, frame));
                if self.inner.is_end_stream() {
                    self.update(Log::complete);
                }
            }
            Poll::Ready(None) => self.update(Log::complete),
            Poll::Ready(Some(Err(_))) | Poll::Pending => {}
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
