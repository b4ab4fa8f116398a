//! The access log: what one line says about one request.

use std::time::Duration;

use http::{Method, StatusCode};

use crate::config;
use crate::metrics::ResponseSource;

/// The tracing target of access lines, to be named in a filter such as `info,access=off`.
pub const TARGET: &str = "access";

/// The longest method and path that are shown, in bytes; a downstream may send 64 KiB of either.
const MAX_METHOD_BYTES: usize = 32;
const MAX_PATH_BYTES: usize = 512;

/// What is said about one request. Nothing else of it is logged: no query, which may hold data, no header field, no body (contract §7).
#[derive(Debug, Clone, Copy)]
pub struct AccessRecord<'a> {
    /// As received.
    pub method: &'a Method,
    /// Of the request target, as received; a query is cut off.
    pub path: &'a str,
    /// What the downstream got.
    pub status: StatusCode,
    /// From whom.
    pub source: ResponseSource,
    /// Code of the proxy's own answer.
    pub code: Option<&'static str>,
    /// From the request head to the last byte of the response.
    pub duration: Duration,
    /// Body bytes that came from the downstream.
    pub request_bytes: u64,
    /// Body bytes that went to the downstream.
    pub response_bytes: u64,
    /// How often the request was sent to the upstream.
    pub attempts: u32,
    /// Generation of the token of the last attempt; 0 where none was sent.
    pub generation: u64,
}

/// Writes the lines that `log.access` asks for.
#[derive(Debug, Clone, Copy)]
pub struct AccessLog(config::AccessLog);

impl AccessLog {
    /// For one value of `log.access`.
    pub fn new(which: config::AccessLog) -> Self {
        Self(which)
    }

    /// Writes the line of one request, where it is asked for; otherwise formats nothing.
    pub fn record(self, record: &AccessRecord<'_>) {
        let wanted = match self.0 {
            config::AccessLog::All => true,
            config::AccessLog::Errors => record.status.is_client_error() || record.status.is_server_error(),
            config::AccessLog::Off => false,
        };
        if !wanted || !tracing::enabled!(target: TARGET, tracing::Level::INFO) {
            return;
        }
        let path = record.path.split(['?', '#']).next().unwrap_or_default();
        tracing::info!(
            target: TARGET,
            method = truncate(record.method.as_str(), MAX_METHOD_BYTES),
            path = truncate(path, MAX_PATH_BYTES),
            status = record.status.as_u16(),
            source = record.source.label(),
            code = record.code,
            duration_ms = (record.duration.as_secs_f64() * 1e6).round() / 1e3,
            request_bytes = record.request_bytes,
            response_bytes = record.response_bytes,
            attempts = record.attempts,
            generation = record.generation,
        );
    }
}

/// The beginning of `text`, at most `limit` bytes of it.
fn truncate(text: &str, limit: usize) -> &str {
    &text[..text.floor_char_boundary(limit)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn truncates_between_characters() {
        for (text, limit, expected) in [("abc", 3, "abc"), ("abc", 2, "ab"), ("aä", 2, "a"), ("ä", 1, ""), ("", 5, "")] {
            assert_eq!(truncate(text, limit), expected, "{text:?}");
        }
    }
}
