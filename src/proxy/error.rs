//! Everything that the proxy itself answers instead of a relayed response: whose problem, which status, which code, which public words.
//!
//! Never 401 or 403: Upsolver's clients read those as a bad token.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderName, RETRY_AFTER};
use http::{HeaderValue, Method, Response, StatusCode};

/// What went wrong upstream.
#[derive(Debug)]
pub struct Reason {
    /// For the log.
    pub text: String,
    /// For the downstream: the error type that RFC 9209 section 2.3 registers for it.
    pub error_type: &'static str,
}

impl Reason {
    /// Words for the log, and a registered error type.
    pub fn new(text: impl Into<String>, error_type: &'static str) -> Self {
        Self { text: text.into(), error_type }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// One of the proxy's own answers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Malformed or ambiguous request; the text is fixed and quotes nothing of it.
    #[error("bad request: {0}")]
    BadRequest(&'static str),
    /// A browser's cross-site request.
    #[error("cross-site request")]
    CrossSiteRequest,
    /// `listen.caller_token_file` is set and the request does not carry its content.
    #[error("caller token missing or wrong")]
    CallerTokenRequired,
    /// CONNECT or TRACE.
    #[error("method not allowed")]
    MethodNotAllowed,
    /// `/api-tokens` in any spelling.
    #[error("minting denied")]
    MintingDenied,
    /// A policy rule denied it; `allow` holds the methods that the policy lets pass for this path.
    #[error("policy denied")]
    PolicyDenied {
        /// Value of the `allow` field.
        allow: Vec<Method>,
        /// The rule's index, or `default`.
        rule: String,
    },
    /// Head or body not received in time.
    #[error("request timeout")]
    RequestTimeout,
    /// Over `limits.max_request_body`.
    #[error("body too large")]
    BodyTooLarge,
    /// Target over 16 KiB.
    #[error("URI too long")]
    UriTooLong,
    /// Head over `listen.max_header_size`.
    #[error("headers too large")]
    HeadersTooLarge,
    /// The target's authority is not allowed.
    #[error("misdirected request")]
    MisdirectedRequest,
    /// Resolving or connecting failed.
    #[error("upstream unreachable: {0}")]
    UpstreamUnreachable(Reason),
    /// The TLS handshake or the certificate failed.
    #[error("upstream TLS: {0}")]
    UpstreamTls(Reason),
    /// The response broke HTTP or broke off.
    #[error("upstream protocol: {0}")]
    UpstreamProtocol(Reason),
    /// No usable token within `token.wait`.
    #[error("no usable token")]
    TokenUnavailable {
        /// For `retry-after`.
        retry_after: Duration,
    },
    /// A limit is reached.
    #[error("overloaded")]
    Overloaded,
    /// The proxy is stopping.
    #[error("draining")]
    Draining,
    /// Connect or response timeout.
    #[error("upstream timeout: {0}")]
    UpstreamTimeout(Reason),
    /// The request already passed this proxy.
    #[error("loop detected")]
    LoopDetected,
    /// The downstream went away, or closed its sending side in the middle of its body.
    #[error("downstream closed")]
    DownstreamClosed,
}

/// Whose problem an error is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The request is at fault.
    Downstream,
    /// The upstream, or the way to it.
    Upstream,
    /// The proxy cannot serve it now.
    Ourselves,
}

impl Error {
    /// Whose problem it is.
    pub fn origin(&self) -> Origin {
        match self {
            Self::BadRequest(_)
            | Self::CrossSiteRequest
            | Self::CallerTokenRequired
            | Self::MethodNotAllowed
            | Self::MintingDenied
            | Self::PolicyDenied { .. }
            | Self::RequestTimeout
            | Self::BodyTooLarge
            | Self::UriTooLong
            | Self::HeadersTooLarge
            | Self::MisdirectedRequest
            | Self::LoopDetected
            | Self::DownstreamClosed => Origin::Downstream,
            Self::UpstreamUnreachable(_) | Self::UpstreamTls(_) | Self::UpstreamProtocol(_) | Self::UpstreamTimeout(_) => Origin::Upstream,
            Self::TokenUnavailable { .. } | Self::Overloaded | Self::Draining => Origin::Ourselves,
        }
    }

    /// The status of the answer (contract section 4).
    pub fn status(&self) -> StatusCode {
        match self {
            Self::BadRequest(_) | Self::CrossSiteRequest | Self::CallerTokenRequired | Self::DownstreamClosed => StatusCode::BAD_REQUEST,
            Self::MethodNotAllowed | Self::MintingDenied | Self::PolicyDenied { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::RequestTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::UriTooLong => StatusCode::URI_TOO_LONG,
            Self::HeadersTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::MisdirectedRequest => StatusCode::MISDIRECTED_REQUEST,
            Self::UpstreamUnreachable(_) | Self::UpstreamTls(_) | Self::UpstreamProtocol(_) => StatusCode::BAD_GATEWAY,
            Self::TokenUnavailable { .. } | Self::Overloaded | Self::Draining => StatusCode::SERVICE_UNAVAILABLE,
            Self::UpstreamTimeout(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::LoopDetected => StatusCode::LOOP_DETECTED,
        }
    }

    /// The `code` of the answer, and the label of `errors_total`: a fixed set, which never carries error text.
    pub fn code(&self) -> &'static str {
        match self {
            Self::BadRequest(_) | Self::DownstreamClosed => "bad_request",
            Self::CrossSiteRequest => "cross_site_request",
            Self::CallerTokenRequired => "caller_token_required",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::MintingDenied => "minting_denied",
            Self::PolicyDenied { .. } => "policy_denied",
            Self::RequestTimeout => "request_timeout",
            Self::BodyTooLarge => "body_too_large",
            Self::UriTooLong => "uri_too_long",
            Self::HeadersTooLarge => "headers_too_large",
            Self::MisdirectedRequest => "misdirected_request",
            Self::UpstreamUnreachable(_) => "upstream_unreachable",
            Self::UpstreamTls(_) => "upstream_tls",
            Self::UpstreamProtocol(_) => "upstream_protocol",
            Self::TokenUnavailable { .. } => "token_unavailable",
            Self::Overloaded => "overloaded",
            Self::Draining => "draining",
            Self::UpstreamTimeout(_) => "upstream_timeout",
            Self::LoopDetected => "loop_detected",
        }
    }

    /// What the downstream gets to read: fixed words, nothing of the request, of the upstream or of its error.
    pub fn public_message(&self) -> &'static str {
        match self {
            Self::BadRequest(what) => what,
            Self::CrossSiteRequest => {
                "a web page of another site made this request; the proxy serves local programs only (listen.allowed_hosts adds names)"
            }
            Self::CallerTokenRequired => "send the content of listen.caller_token_file as x-upsolver-auth-proxy-token",
            Self::MethodNotAllowed => "CONNECT and TRACE are not proxied",
            Self::MintingDenied => "API tokens are the proxy's own matter; policy.allow_minting = true would let this through",
            Self::PolicyDenied { .. } => "a rule of [policy] denies this request",
            Self::RequestTimeout => "the request was not received in time (listen.header_timeout, upstream.body_idle_timeout)",
            Self::BodyTooLarge => "the body is larger than limits.max_request_body",
            Self::UriTooLong => "the request target is longer than 16 KiB",
            Self::HeadersTooLarge => "the request head is larger than listen.max_header_size",
            Self::MisdirectedRequest => "this proxy does not serve that host; listen.allowed_hosts adds names",
            Self::UpstreamUnreachable(_) => "the Upsolver API cannot be reached; the proxy's log says why",
            Self::UpstreamTls(_) => "no trusted TLS connection to the Upsolver API; the proxy's log says why",
            Self::UpstreamProtocol(_) => "the Upsolver API's response is broken or broke off; the proxy's log says how",
            Self::TokenUnavailable { .. } => "there is no usable API token; the admin server's /status says why",
            Self::Overloaded => "a limit of the proxy is reached (limits.max_in_flight, listen.max_connections)",
            Self::Draining => "the proxy is stopping",
            Self::UpstreamTimeout(_) => "the Upsolver API did not answer in time (upstream.connect_timeout, upstream.response_timeout)",
            Self::LoopDetected => "the request already passed this proxy: upstream.url leads back to it",
            Self::DownstreamClosed => "the request's body ended early",
        }
    }

    /// The registered error type of RFC 9209 section 2.3 that says the most.
    fn error_type(&self) -> &'static str {
        match self {
            Self::BadRequest(_)
            | Self::RequestTimeout
            | Self::BodyTooLarge
            | Self::UriTooLong
            | Self::HeadersTooLarge
            | Self::DownstreamClosed => "http_request_error",
            Self::CrossSiteRequest
            | Self::CallerTokenRequired
            | Self::MethodNotAllowed
            | Self::MintingDenied
            | Self::PolicyDenied { .. }
            | Self::MisdirectedRequest => "http_request_denied",
            Self::UpstreamUnreachable(reason)
            | Self::UpstreamTls(reason)
            | Self::UpstreamProtocol(reason)
            | Self::UpstreamTimeout(reason) => reason.error_type,
            Self::TokenUnavailable { .. } | Self::Draining => "proxy_internal_response",
            Self::Overloaded => "connection_limit_reached",
            Self::LoopDetected => "proxy_loop_detected",
        }
    }

    /// The answer as `application/problem+json` (RFC 9457).
    pub fn response(&self) -> Response<Bytes> {
        let status = self.status();
        let title = status.canonical_reason().unwrap_or("Error");
        let problem = serde_json::json!({
            "type": "about:blank",
            "title": title,
            "status": status.as_u16(),
            "detail": self.public_message(),
            "code": self.code(),
        });
        let mut response = Response::new(Bytes::from(problem.to_string()));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        let proxy_status =
            HeaderValue::from_str(&format!("upsolver-auth-proxy; error={}", self.error_type())).expect("registered names are tokens");
        headers.insert(HeaderName::from_static("proxy-status"), proxy_status);
        if status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(ALLOW, self.allow());
        }
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, self.retry_after());
        }
        if self.ends_connection() {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// Whether what follows on the connection cannot be trusted: behind an ambiguous framing the body could be read as the next request (RFC 9112
    /// section 6.3), and behind a CONNECT it is no HTTP. Or that nothing more is taken on it, since the proxy stops or nothing more can come. Where only a
    /// body stays unread, the server closes of itself.
    fn ends_connection(&self) -> bool {
        match self {
            Self::BadRequest(_) | Self::MethodNotAllowed | Self::Draining | Self::DownstreamClosed => true,
            Self::CrossSiteRequest
            | Self::CallerTokenRequired
            | Self::MintingDenied
            | Self::PolicyDenied { .. }
            | Self::RequestTimeout
            | Self::BodyTooLarge
            | Self::UriTooLong
            | Self::HeadersTooLarge
            | Self::MisdirectedRequest
            | Self::UpstreamUnreachable(_)
            | Self::UpstreamTls(_)
            | Self::UpstreamProtocol(_)
            | Self::TokenUnavailable { .. }
            | Self::Overloaded
            | Self::UpstreamTimeout(_)
            | Self::LoopDetected => false,
        }
    }

    /// RFC 9110 section 15.5.6: a 405 names what would be allowed.
    fn allow(&self) -> HeaderValue {
        match self {
            Self::PolicyDenied { allow, .. } => {
                let methods: Vec<&str> = allow.iter().map(Method::as_str).collect();
                HeaderValue::from_str(&methods.join(", ")).expect("methods are tokens")
            }
            // Whatever the path, these are; where nothing is, an empty list says so (RFC 9110 section 10.2.1).
            Self::MethodNotAllowed => HeaderValue::from_static(PROXIED_METHODS),
            _ => HeaderValue::from_static(""),
        }
    }

    /// Seconds, rounded up: RFC 9110 section 10.2.3 knows no fractions.
    fn retry_after(&self) -> HeaderValue {
        let after = match self {
            Self::TokenUnavailable { retry_after } => *retry_after,
            _ => Duration::from_secs(1),
        };
        let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
        HeaderValue::from(seconds.max(1))
    }
}

/// What the proxy forwards, unless a policy says otherwise.
pub(super) const PROXIED_METHODS: &str = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Error> {
        vec![
            Error::BadRequest("x"),
            Error::CrossSiteRequest,
            Error::CallerTokenRequired,
            Error::MethodNotAllowed,
            Error::MintingDenied,
            Error::PolicyDenied { allow: vec![Method::GET, Method::HEAD], rule: "0".to_owned() },
            Error::RequestTimeout,
            Error::BodyTooLarge,
            Error::UriTooLong,
            Error::HeadersTooLarge,
            Error::MisdirectedRequest,
            Error::UpstreamUnreachable(Reason::new("canary", "dns_error")),
            Error::UpstreamTls(Reason::new("canary", "tls_certificate_error")),
            Error::UpstreamProtocol(Reason::new("canary", "http_protocol_error")),
            Error::TokenUnavailable { retry_after: Duration::from_millis(1500) },
            Error::Overloaded,
            Error::Draining,
            Error::UpstreamTimeout(Reason::new("canary", "http_response_timeout")),
            Error::LoopDetected,
            Error::DownstreamClosed,
        ]
    }

    /// B49, B50: every answer has the common form, quotes nothing and is never 401 or 403; every code is a label of `errors_total`.
    #[test]
    fn b49_b50_answers_have_one_form_and_quote_nothing() {
        for error in all() {
            let response = error.response();
            assert!(!matches!(response.status().as_u16(), 401 | 403), "{error}");
            assert_eq!(response.headers()["content-type"], "application/problem+json");
            assert_eq!(response.headers()["cache-control"], "no-store");
            assert!(response.headers()["proxy-status"].to_str().unwrap().starts_with("upsolver-auth-proxy; error="));
            let problem: serde_json::Value = serde_json::from_slice(response.body()).unwrap();
            assert_eq!(problem["status"], response.status().as_u16());
            assert_eq!(problem["code"], error.code());
            assert!(!problem.to_string().contains("canary"), "{problem}");
            assert!(crate::metrics::ERROR_CODES.contains(&error.code()), "{}", error.code());
            assert_eq!(response.headers().contains_key("allow"), response.status() == 405);
            assert_eq!(response.headers().contains_key("retry-after"), response.status() == 503);
            assert_eq!(error.origin() == Origin::Ourselves, response.status() == 503);
        }
    }

    /// A24: what follows an ambiguous message is not read as another one.
    #[test]
    fn a19_a24_ambiguity_ends_the_connection() {
        assert_eq!(Error::BadRequest("x").response().headers()["connection"], "close");
        assert_eq!(Error::MethodNotAllowed.response().headers()["connection"], "close");
        assert!(!Error::MintingDenied.response().headers().contains_key("connection"));
    }

    #[test]
    fn retry_after_is_whole_seconds_rounded_up() {
        let response = Error::TokenUnavailable { retry_after: Duration::from_millis(1500) }.response();
        assert_eq!(response.headers()["retry-after"], "2");
        assert_eq!(Error::TokenUnavailable { retry_after: Duration::ZERO }.response().headers()["retry-after"], "1");
    }

    #[test]
    fn a_denial_names_what_the_policy_allows() {
        let response = Error::PolicyDenied { allow: vec![Method::GET, Method::HEAD], rule: "0".to_owned() }.response();
        assert_eq!(response.headers()["allow"], "GET, HEAD");
    }
}
