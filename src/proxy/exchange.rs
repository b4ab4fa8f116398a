//! The record of one exchange: opened with the request head, closed with the last byte of the response, or whenever the downstream leaves. Nothing
//! else counts or logs a request, so each has exactly one line and one count.

use std::rc::Rc;
use std::sync::Arc;

use http::uri::PathAndQuery;
use http::{Method, Request, StatusCode};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

use super::error::Error;
use crate::metrics::{ResponseSource, WorkerMetrics};
use crate::server::clock::{Clock, Phase};
use crate::telemetry::{AccessLog, AccessRecord};
use crate::upstream::pool::ReplyError;

/// What the log says of a downstream that left before its response began; nginx's number for it, never sent.
const DOWNSTREAM_CLOSED: u16 = 499;

/// One exchange. Its end is its drop.
pub(super) struct Exchange {
    started: Instant,
    method: Method,
    target: Option<PathAndQuery>,
    status: StatusCode,
    source: ResponseSource,
    code: Option<&'static str>,
    attempts: u32,
    generation: u64,
    request_bytes: u64,
    response_bytes: u64,
    log: AccessLog,
    metrics: Arc<WorkerMetrics>,
    /// Of its connection.
    clock: Rc<Clock>,
    /// Among `limits.max_in_flight`; none where the limit was reached.
    _slot: Option<OwnedSemaphorePermit>,
}

impl Exchange {
    pub(super) fn open<B>(
        request: &Request<B>,
        log: AccessLog,
        metrics: &Arc<WorkerMetrics>,
        slot: Option<OwnedSemaphorePermit>,
        clock: Rc<Clock>,
    ) -> Self {
        metrics.request_started();
        Self {
            started: clock.now(),
            method: request.method().clone(),
            target: request.uri().path_and_query().cloned(),
            status: StatusCode::from_u16(DOWNSTREAM_CLOSED).expect("a three-digit number"),
            source: ResponseSource::Proxy,
            code: Some("downstream_closed"),
            attempts: 0,
            generation: 0,
            request_bytes: 0,
            response_bytes: 0,
            log,
            metrics: Arc::clone(metrics),
            clock,
            _slot: slot,
        }
    }

    /// The request was sent, once more or for the first time, with a token of this generation.
    pub(super) fn attempted(&mut self, generation: u64) {
        self.attempts += 1;
        self.generation = generation;
    }

    /// The upstream answered and its response is relayed.
    pub(super) fn answered(&mut self, status: StatusCode, request_bytes: u64) {
        self.status = status;
        self.source = ResponseSource::Upstream;
        self.code = None;
        self.request_bytes = request_bytes;
    }

    /// The proxy answers by itself.
    pub(super) fn answered_locally(&mut self, status: StatusCode, error: Option<&Error>) {
        self.status = status;
        self.source = ResponseSource::Proxy;
        self.code = error.map(Error::code);
        if let Some(error) = error {
            self.metrics.error(error.code());
            if status.is_server_error() {
                tracing::warn!(code = error.code(), method = %self.method, %error, "a request failed");
            }
        }
    }

    /// The upstream's response has come to its end.
    pub(super) fn complete(&self) {
        self.clock.set_open_ended(false);
    }

    /// Bytes of the response body went on.
    pub(super) fn relayed(&mut self, bytes: u64) {
        self.response_bytes += bytes;
        self.metrics.response_bytes(bytes);
    }

    /// The upstream's body broke off; the downstream's is broken off too.
    pub(super) fn broke_off(&mut self, error: &ReplyError) {
        self.code = Some("upstream_protocol");
        self.metrics.error("upstream_protocol");
        tracing::warn!(code = "upstream_protocol", method = %self.method, status = self.status.as_u16(), %error, "the upstream's response broke off");
    }

    /// The response did not get to its end.
    pub(super) fn cut_short(&mut self) {
        self.code.get_or_insert("downstream_closed");
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.clock.enter(Phase::Idle);
        if self.status.as_u16() == DOWNSTREAM_CLOSED {
            self.metrics.error("downstream_closed");
        }
        let duration = self.clock.now() - self.started;
        self.metrics.request_finished(&self.method, self.status, self.source, duration);
        self.log.record(&AccessRecord {
            method: &self.method,
            path: self.target.as_ref().map_or("", PathAndQuery::path),
            status: self.status,
            source: self.source,
            code: self.code,
            duration,
            request_bytes: self.request_bytes,
            response_bytes: self.response_bytes,
            attempts: self.attempts,
            generation: self.generation,
        });
    }
}
