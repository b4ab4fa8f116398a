//! Everything that the proxy itself answers instead of a relayed response: whose problem, which status, which code, which public words.
//!
//! Never 401 or 403: Upsolver's clients read those as a bad token.

use std::time::Duration;

use http::Method;

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
    UpstreamUnreachable(String),
    /// The TLS handshake or the certificate failed.
    #[error("upstream TLS: {0}")]
    UpstreamTls(String),
    /// The response broke HTTP or broke off.
    #[error("upstream protocol: {0}")]
    UpstreamProtocol(String),
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
    UpstreamTimeout(&'static str),
    /// The request already passed this proxy.
    #[error("loop detected")]
    LoopDetected,
    /// The downstream went away; nobody reads this answer.
    #[error("downstream closed")]
    DownstreamClosed,
}
