//! Every metric in one list.

use std::time::{Duration, SystemTime};

use http::{Method, StatusCode};

/// Where a response came from: the label `source`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResponseSource {
    /// Relayed.
    Upstream,
    /// The proxy's own answer.
    Proxy,
}

/// What one worker counts. Written by that worker alone, read when scraped, so that no line of memory is shared on the request path.
#[derive(Debug, Default)]
pub struct WorkerMetrics {}

impl WorkerMetrics {
    /// A request head arrived.
    pub fn request_started(&self) {}
    /// The last byte of a response left, or the exchange ended otherwise.
    pub fn request_finished(&self, _method: &Method, _status: StatusCode, _source: ResponseSource, _duration: Duration) {}
    /// The proxy answered with this code of `proxy::error`.
    pub fn error(&self, _code: &'static str) {}
    /// Bytes of request bodies.
    pub fn request_bytes(&self, _bytes: u64) {}
    /// Bytes of response bodies.
    pub fn response_bytes(&self, _bytes: u64) {}
    /// A request was sent again after a rejection: `success`, `failure`, `too_large`, `not_allowed`.
    pub fn replay(&self, _result: &'static str) {}
    /// A connection attempt to the upstream ended: `success`, `dns`, `refused`, `timeout`, `tls`, `proxy`, `error`.
    pub fn upstream_connect(&self, _result: &'static str) {}
    /// A connection to the upstream opened (+1) or closed (-1), and went in or out of use.
    pub fn upstream_connections(&self, _idle_change: i64, _active_change: i64) {}
    /// A policy rule (its index, or `default`) denied a request, or would have.
    pub fn policy_denial(&self, _rule: &str, _dry_run: bool) {}
}

/// What the control plane counts.
#[derive(Debug, Default)]
pub struct TokenMetrics {}

impl TokenMetrics {
    /// A mint ended: `success`, `rejected`, `failed`, `invalid`, `lost`.
    pub fn mint(&self, _result: &'static str, _duration: Duration) {}
    /// Another token is in use.
    pub fn generation(&self, _generation: u64, _created: SystemTime) {}
    /// Whether a usable token is there.
    pub fn usable(&self, _usable: bool) {}
    /// A request of the current generation was rejected with this status.
    pub fn rejection(&self, _status: StatusCode) {}
    /// A probe ended: `alive`, `dead`, `inconclusive`.
    pub fn probe(&self, _result: &'static str) {}
    /// The token store failed at `read`, `write` or `lock`.
    pub fn store_error(&self, _operation: &'static str) {}
    /// Credentials were read again: `changed`, `unchanged`, `failed`.
    pub fn credentials_reload(&self, _result: &'static str) {}
    /// New credentials are there, but were rejected.
    pub fn pending_rejected(&self, _pending: bool) {}
}
