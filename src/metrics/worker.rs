//! What one worker counts.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use http::{Method, StatusCode};
use tokio::runtime::RuntimeMetrics;

use super::cells::{Histogram, Labelled, OTHER};

/// Where a response came from: the label `source`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResponseSource {
    /// Relayed.
    Upstream,
    /// The proxy's own answer.
    Proxy,
}

impl ResponseSource {
    /// The label value, in metrics and in the access log.
    pub fn label(self) -> &'static str {
        match self {
            Self::Upstream => "upstream",
            Self::Proxy => "proxy",
        }
    }
}

/// Values of the label `code` of `errors_total`: the codes of contract §4, and what is counted for a downstream that left before its answer.
pub const ERROR_CODES: [&str; 20] = [
    "bad_request",
    "cross_site_request",
    "caller_token_required",
    "method_not_allowed",
    "minting_denied",
    "policy_denied",
    "request_timeout",
    "body_too_large",
    "uri_too_long",
    "headers_too_large",
    "misdirected_request",
    "upstream_unreachable",
    "upstream_tls",
    "upstream_protocol",
    "token_unavailable",
    "overloaded",
    "draining",
    "upstream_timeout",
    "loop_detected",
    "downstream_closed",
];

/// Values of the label `result` of `replays_total`.
pub const REPLAY_RESULTS: [&str; 4] = ["success", "failure", "too_large", "not_allowed"];

/// Values of the label `result` of `upstream_connects_total`.
pub const CONNECT_RESULTS: [&str; 7] = ["success", "dns", "refused", "timeout", "tls", "proxy", "error"];

/// Values of the label `method` (the methods of RFC 9110 section 9.3 and PATCH); any other is `other`, so that a downstream cannot grow the set.
const METHODS: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"];

/// Status codes with a cell of their own; one more cell holds what lies outside, which RFC 9110 section 15 does not allow.
const STATUSES: std::ops::Range<u16> = 100..600;

/// From half a millisecond, what a fast API behind a short network path takes, to the default of `upstream.response_timeout`.
const REQUEST_SECONDS: [f64; 17] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// What one worker counts. Written by that worker alone and read when scraped, so that no line of memory is shared on the request path; hence also
/// the alignment: two cache lines, since processors fetch them in pairs.
#[derive(Debug)]
#[repr(align(128))]
pub struct WorkerMetrics {
    /// One cell per method × source × status. Those of a method are made with its first request: 8 KiB, where all would take 80.
    requests: [OnceLock<Box<[AtomicU64]>>; METHODS.len() + 1],
    pub(super) duration: Histogram<{ REQUEST_SECONDS.len() }>,
    in_flight: AtomicI64,
    pub(super) errors: Labelled<{ ERROR_CODES.len() }>,
    request_bytes: AtomicU64,
    response_bytes: AtomicU64,
    pub(super) replays: Labelled<{ REPLAY_RESULTS.len() }>,
    pub(super) connects: Labelled<{ CONNECT_RESULTS.len() }>,
    idle_connections: AtomicI64,
    active_connections: AtomicI64,
    /// A pair (denied, would have been denied) per rule, and a last pair for `default`.
    denials: Box<[[AtomicU64; 2]]>,
    /// Set once, when the worker starts.
    runtime: OnceLock<RuntimeMetrics>,
}

impl Default for WorkerMetrics {
    /// Without policy rules.
    fn default() -> Self {
        Self::new(0)
    }
}

/// Cells per method and source.
const STATUS_CELLS: usize = (STATUSES.end - STATUSES.start) as usize + 1;
/// Cells per method.
const METHOD_CELLS: usize = STATUS_CELLS * 2;

impl WorkerMetrics {
    /// `rules` is the number of policy rules, which bounds the label `rule`.
    pub fn new(rules: usize) -> Self {
        Self {
            requests: [const { OnceLock::new() }; METHODS.len() + 1],
            duration: Histogram::new(&REQUEST_SECONDS),
            in_flight: AtomicI64::new(0),
            errors: Labelled::new(&ERROR_CODES),
            request_bytes: AtomicU64::new(0),
            response_bytes: AtomicU64::new(0),
            replays: Labelled::new(&REPLAY_RESULTS),
            connects: Labelled::new(&CONNECT_RESULTS),
            idle_connections: AtomicI64::new(0),
            active_connections: AtomicI64::new(0),
            denials: (0..=rules).map(|_| [const { AtomicU64::new(0) }; 2]).collect(),
            runtime: OnceLock::new(),
        }
    }

    /// The worker runs on this runtime.
    pub fn runs_on(&self, runtime: RuntimeMetrics) {
        // Each worker says it once.
        let _ = self.runtime.set(runtime);
    }

    /// A request head arrived. Each call is matched by one of [`request_finished`](Self::request_finished).
    pub fn request_started(&self) {
        self.in_flight.fetch_add(1, Relaxed);
    }

    /// The last byte of a response left, or the exchange ended otherwise; `duration` since the head arrived.
    pub fn request_finished(&self, method: &Method, status: StatusCode, source: ResponseSource, duration: Duration) {
        self.in_flight.fetch_sub(1, Relaxed);
        self.count(cell(method.as_str(), status, source));
        self.duration.observe(duration);
    }

    /// A connection that brought no request was answered with this status and code, one of [`ERROR_CODES`], or closed for want of one it would understand.
    pub fn refused(&self, status: StatusCode, code: &'static str) {
        self.count(cell(OTHER, status, ResponseSource::Proxy));
        self.error(code);
    }

    fn count(&self, (method, cell): (usize, usize)) {
        let cells = self.requests[method].get_or_init(|| (0..METHOD_CELLS).map(|_| AtomicU64::new(0)).collect());
        cells[cell].fetch_add(1, Relaxed);
    }

    /// The proxy answered with this code of `proxy::error`, one of [`ERROR_CODES`].
    pub fn error(&self, code: &'static str) {
        self.errors.increment(code);
    }

    /// Bytes of request bodies, as they pass.
    pub fn request_bytes(&self, bytes: u64) {
        self.request_bytes.fetch_add(bytes, Relaxed);
    }

    /// Bytes of response bodies, as they pass.
    pub fn response_bytes(&self, bytes: u64) {
        self.response_bytes.fetch_add(bytes, Relaxed);
    }

    /// A request was sent again after a rejection, or could not be: one of [`REPLAY_RESULTS`].
    pub fn replay(&self, result: &'static str) {
        self.replays.increment(result);
    }

    /// A connection attempt to the upstream ended: one of [`CONNECT_RESULTS`].
    pub fn upstream_connect(&self, result: &'static str) {
        self.connects.increment(result);
    }

    /// A connection to the upstream opened (+1) or closed (-1), and went in or out of use.
    pub fn upstream_connections(&self, idle_change: i64, active_change: i64) {
        self.idle_connections.fetch_add(idle_change, Relaxed);
        self.active_connections.fetch_add(active_change, Relaxed);
    }

    /// A policy rule (its index, or `default`) denied a request, or would have. Anything that is not a rule's index counts as `default`.
    pub fn policy_denial(&self, rule: &str, dry_run: bool) {
        let default = self.denials.len() - 1;
        let rule = rule.parse().ok().filter(|index| *index < default).unwrap_or(default);
        self.denials[rule][usize::from(dry_run)].fetch_add(1, Relaxed);
    }

    /// Requests between [`request_started`](Self::request_started) and [`request_finished`](Self::request_finished).
    pub(super) fn in_flight(&self) -> i64 {
        self.in_flight.load(Relaxed)
    }

    /// The counts of [`request_finished`](Self::request_finished), in a fixed order; [`request_labels`] names them.
    pub(super) fn requests(&self) -> impl Iterator<Item = u64> + '_ {
        self.requests
            .iter()
            .map(OnceLock::get)
            .flat_map(|cells| (0..METHOD_CELLS).map(move |cell| cells.map_or(0, |cells| cells[cell].load(Relaxed))))
    }

    pub(super) fn bytes(&self) -> (u64, u64) {
        (self.request_bytes.load(Relaxed), self.response_bytes.load(Relaxed))
    }

    /// Tasks that have not ended.
    pub(super) fn tasks(&self) -> usize {
        self.runtime.get().map_or(0, RuntimeMetrics::num_alive_tasks)
    }

    /// (idle, active)
    pub(super) fn connections(&self) -> (i64, i64) {
        (self.idle_connections.load(Relaxed), self.active_connections.load(Relaxed))
    }

    /// (denied, would have been denied) per rule, `default` last.
    pub(super) fn denials(&self) -> impl Iterator<Item = [u64; 2]> + '_ {
        self.denials.iter().map(|[denied, dry_run]| [denied.load(Relaxed), dry_run.load(Relaxed)])
    }
}

/// Where a request is counted: which method, and which cell of it. [`request_labels`] is its inverse.
fn cell(method: &str, status: StatusCode, source: ResponseSource) -> (usize, usize) {
    let method = METHODS.iter().position(|known| *known == method).unwrap_or(METHODS.len());
    let source = usize::from(source == ResponseSource::Proxy);
    let status = if STATUSES.contains(&status.as_u16()) { status.as_u16() - STATUSES.start } else { STATUSES.end - STATUSES.start };
    (method, source * STATUS_CELLS + usize::from(status))
}

/// The labels `method`, `status` and `source` of the count at `index` of [`WorkerMetrics::requests`].
pub(super) fn request_labels(index: usize) -> [(&'static str, String); 3] {
    let method = METHODS.get(index / METHOD_CELLS).unwrap_or(&OTHER);
    let source = if index % METHOD_CELLS < STATUS_CELLS { ResponseSource::Upstream } else { ResponseSource::Proxy };
    let status = usize::from(STATUSES.start) + index % STATUS_CELLS;
    let status = if status < usize::from(STATUSES.end) { status.to_string() } else { OTHER.to_owned() };
    [("method", (*method).to_owned()), ("status", status), ("source", source.label().to_owned())]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// B47: whatever a downstream sends, the labels stay within the fixed sets, and each combination has a cell of its own.
    #[test]
    fn b47_requests_are_counted_under_bounded_labels() {
        let rows = [
            ("GET", 200, ResponseSource::Upstream, ["GET", "200", "upstream"]),
            ("GET", 200, ResponseSource::Proxy, ["GET", "200", "proxy"]),
            ("POST", 100, ResponseSource::Upstream, ["POST", "100", "upstream"]),
            ("PATCH", 599, ResponseSource::Proxy, ["PATCH", "599", "proxy"]),
            ("TRACE", 600, ResponseSource::Upstream, ["TRACE", "other", "upstream"]),
            ("HEAD", 999, ResponseSource::Proxy, ["HEAD", "other", "proxy"]),
            ("BREW", 418, ResponseSource::Upstream, ["other", "418", "upstream"]),
            ("get", 999, ResponseSource::Proxy, ["other", "other", "proxy"]),
        ];
        for (method, status, source, expected) in rows {
            let metrics = WorkerMetrics::default();
            metrics.request_started();
            metrics.request_finished(
                &Method::from_bytes(method.as_bytes()).unwrap(),
                StatusCode::from_u16(status).unwrap(),
                source,
                Duration::from_millis(3),
            );
            let counted: Vec<_> = metrics.requests().enumerate().filter(|(_, count)| *count > 0).collect();
            let [(index, 1)] = counted[..] else { panic!("{method} {status}: {counted:?}") };
            assert_eq!(request_labels(index).map(|(_, value)| value), expected, "{method} {status}");
            assert_eq!((metrics.in_flight(), metrics.duration.read().count()), (0, 1));
        }
    }

    #[test]
    fn a_denial_counts_for_its_rule_or_for_the_default() {
        let metrics = WorkerMetrics::new(2);
        for (rule, dry_run) in [("0", false), ("1", true), ("default", false), ("2", true), ("-1", false)] {
            metrics.policy_denial(rule, dry_run);
        }
        assert_eq!(metrics.denials().collect::<Vec<_>>(), [[1, 0], [0, 1], [2, 1]]);
    }
}
