//! What happens to the header fields of a request and of a response in passing. Pure.
//!
//! The order of the steps is the point (contract section 4, step 2): what a downstream names in `Connection` goes first, what it may not send goes
//! next, and only then is anything written. So nothing that it names can remove what the proxy sets (Apache's CVE-2022-31813 was that).

use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderName, HeaderValue, LOCATION, MAX_FORWARDS, TE, TRANSFER_ENCODING, VIA,
};
use http::{HeaderMap, Method, StatusCode, Uri, Version, request, response};
use http_body::SizeHint;

use super::error::Error;
use super::guard::Admitted;
use crate::config::Origin;
use crate::secret::AuthorizationValue;

/// This proxy's name in `Via` (RFC 9110 section 7.6.3) and `Proxy-Status` (RFC 9209). No host name: those tell about the inside of a cluster.
pub const PSEUDONYM: &str = "upsolver-auth-proxy";
const VIA_ENTRY: HeaderValue = HeaderValue::from_static("1.1 upsolver-auth-proxy");

/// Where requests go, as their heads need it.
#[derive(Debug, Clone)]
pub struct Upstream {
    /// Scheme, host and port.
    pub origin: Origin,
    /// The value of `host`.
    pub host: HeaderValue,
}

impl Upstream {
    /// Made once.
    pub fn new(origin: &Origin) -> Self {
        let host = HeaderValue::from_str(&origin.authority()).expect("an authority is a legal field value");
        Self { origin: origin.clone(), host }
    }
}

/// What the response's cleaning must know of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cleaned {
    /// The downstream takes trailers (`TE: trailers`, RFC 9110 section 10.1.4).
    pub wants_trailers: bool,
    /// The request is a HEAD: its response has a length but no body.
    pub to_head: bool,
}

/// Makes a downstream's head into the one that goes to the upstream, all but `authorization`, which each attempt gets from [`authorize`].
/// `body` is the size that its framing announced.
pub fn clean_request(head: &mut request::Parts, body: &SizeHint, upstream: &Upstream) -> Cleaned {
    let headers = &mut head.headers;
    let cleaned = Cleaned { wants_trailers: lists(headers, &TE, "trailers"), to_head: head.method == Method::HEAD };
    let had_length = headers.contains_key(CONTENT_LENGTH);

    remove_nominated(headers);
    remove_where(headers, |name| is_hop_by_hop(name) || is_reserved(name));

    set_request_framing(headers, body, had_length);
    headers.insert(HOST, upstream.host.clone());
    headers.append(VIA, VIA_ENTRY);
    if head.method == Method::OPTIONS {
        decrement_max_forwards(headers);
    }
    if head.version == Version::HTTP_10 {
        // RFC 9110 section 10.1.1: an HTTP/1.0 request's expectation is ignored; it must not come alive on the way.
        headers.remove(EXPECT);
    }
    head.version = Version::HTTP_11;
    head.uri = origin_form(&head.uri);
    head.extensions.clear();
    cleaned
}

/// The last step of a request's head: exactly one `authorization`, ours.
pub fn authorize(headers: &mut HeaderMap, authorization: &AuthorizationValue) {
    headers.insert(AUTHORIZATION, authorization.header());
}

/// The path and query alone, byte for byte: scheme and authority are the connection's matter, never the request's.
fn origin_form(target: &Uri) -> Uri {
    target.path_and_query().cloned().map_or_else(Uri::default, Uri::from)
}

/// Framing from the body, never copied (RFC 9112 section 6). A zero that was announced stays one. A body of unknown length is said to be chunked even
/// where hyper's client would not say so: it would send none of a GET's.
fn set_request_framing(headers: &mut HeaderMap, body: &SizeHint, had_length: bool) {
    match body.exact() {
        Some(0) if !had_length => {}
        Some(length) => {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
        None => {
            headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
    }
}

/// RFC 9110 section 7.6.2. The guard answers a zero; what is no number is no limit.
fn decrement_max_forwards(headers: &mut HeaderMap) {
    if let Some(left) = max_forwards(headers) {
        headers.insert(MAX_FORWARDS, HeaderValue::from(left.saturating_sub(1)));
    }
}

/// The value of `max-forwards`, where it is one number.
pub(super) fn max_forwards(headers: &HeaderMap) -> Option<u64> {
    headers.get(MAX_FORWARDS)?.to_str().ok()?.parse().ok()
}

/// Makes an upstream's head into the one that goes downstream. Fails where its framing contradicts itself or it switches protocols unasked.
///
/// `content-length` is removed wherever there is a body, since hyper sets it from the body; it stays where it describes a body that is not sent
/// (RFC 9110 section 8.6).
pub fn clean_response(
    head: &mut response::Parts,
    admitted: &Admitted,
    request: Cleaned,
    upstream: &Upstream,
    authorization: &AuthorizationValue,
) -> Result<(), Error> {
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Error::UpstreamProtocol("it switched protocols unasked (101)".to_owned()));
    }
    check_response_framing(&head.headers)?;
    let headers = &mut head.headers;
    let length = headers.get(CONTENT_LENGTH).cloned();

    remove_nominated(headers);
    remove_where(headers, |name| is_hop_by_hop(name) && !(request.wants_trailers && name == "trailer") || is_for_browsers(name));
    remove_token(headers, authorization);

    match length {
        Some(length) if request.to_head || head.status == StatusCode::NOT_MODIFIED => {
            headers.insert(CONTENT_LENGTH, length);
        }
        _ => {
            headers.remove(CONTENT_LENGTH);
        }
    }
    rewrite_location(headers, admitted, &upstream.origin);
    head.extensions.clear();
    head.version = Version::HTTP_11;
    Ok(())
}

/// Trailer fields may carry neither framing nor anything of a hop, nor the token.
pub fn clean_trailers(trailers: &mut HeaderMap, authorization: &AuthorizationValue) {
    remove_where(trailers, |name| is_hop_by_hop(name) || is_reserved(name) || name == CONTENT_LENGTH || name == HOST);
    remove_token(trailers, authorization);
}

/// RFC 9112 section 6.3: one framing, said once. Hyper's client prefers one of two silently; its server would then believe the other.
fn check_response_framing(headers: &HeaderMap) -> Result<(), Error> {
    let contradiction = |what: &str| Err(Error::UpstreamProtocol(format!("its framing is ambiguous: {what}")));
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    let mut lengths = headers.get_all(CONTENT_LENGTH).iter();
    let (coding, length) = (codings.next(), lengths.next());
    if let Some(coding) = coding
        && (!coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked") || codings.next().is_some())
    {
        return contradiction("transfer-encoding is not chunked alone");
    }
    if coding.is_some() && length.is_some() {
        return contradiction("both transfer-encoding and content-length");
    }
    if let Some(length) = length {
        if !length.as_bytes().iter().all(u8::is_ascii_digit) || length.is_empty() {
            return contradiction("content-length is not a number");
        }
        if lengths.any(|other| other != length) {
            return contradiction("several content-lengths");
        }
    }
    Ok(())
}

/// Every field that any `Connection` line names (RFC 9110 section 7.6.1). Lines are one list; empty members and odd bytes name nothing.
fn remove_nominated(headers: &mut HeaderMap) {
    let mut lines = headers.get_all(CONNECTION).iter().peekable();
    if lines.peek().is_none() {
        return;
    }
    let nominated: Vec<HeaderName> = lines
        .flat_map(|line| line.as_bytes().split(|byte| *byte == b','))
        .filter_map(|member| HeaderName::from_bytes(member.trim_ascii()).ok())
        .collect();
    for name in nominated {
        headers.remove(name);
    }
}

fn remove_where(headers: &mut HeaderMap, unwanted: impl Fn(&HeaderName) -> bool) {
    // Most heads hold few that go, so that nothing is allocated for most.
    while let Some(name) = headers.keys().find(|name| unwanted(name)).cloned() {
        headers.remove(name);
    }
}

/// Fields that end at this proxy whether or not `Connection` names them (RFC 9110 section 7.6.1, RFC 9113 section 8.2.2).
fn is_hop_by_hop(name: &HeaderName) -> bool {
    matches!(
        name.as_str(),
        "connection"
            | "keep-alive"
            | "proxy-connection"
            | "proxy-authenticate"
            | "proxy-authorization"
            | "proxy-authentication-info"
            | "te"
            | "trailer"
            | "transfer-encoding"
            | "upgrade"
            | "http2-settings"
    )
}

/// Fields that a downstream may not send: the proxy's own, and those by which a server could take the request for another one. Framing is among them,
/// since it is made anew.
const RESERVED: &[&str] = &[
    "authorization",
    "proxy-authorization",
    "x-api-email",
    "x-api-password",
    "x-upsolver-auth-proxy-token",
    "x-http-method-override",
    "x-http-method",
    "x-method-override",
];

fn is_reserved(name: &HeaderName) -> bool {
    let name = name.as_str();
    name == "content-length"
        || RESERVED.contains(&name)
        || (name.contains('_') && RESERVED.iter().any(|reserved| are_twins(name, reserved)))
}

/// CGI-like servers take `_` for `-` (oauth2-proxy's CVE-2025-64484), and may trim it.
fn are_twins(name: &str, reserved: &str) -> bool {
    let name = name.trim_matches(['_', '-']);
    name.len() == reserved.len() && name.bytes().zip(reserved.bytes()).all(|(a, b)| a == b || (a == b'_' && b == b'-'))
}

/// Fields that speak to browsers about the upstream's origin, which is not the one that the downstream sees: CORS permissions (a page must never get
/// at this proxy) and alternative services (which would lead around it).
fn is_for_browsers(name: &HeaderName) -> bool {
    let name = name.as_str();
    name.starts_with("access-control-") || name == "alt-svc"
}

/// B25: a response field that contains the token would hand it to the downstream.
fn remove_token(headers: &mut HeaderMap, authorization: &AuthorizationValue) {
    while let Some(name) = headers.iter().find(|(_, value)| authorization.is_in(value.as_bytes())).map(|(name, _)| name.clone()) {
        tracing::warn!(field = %name, "the upstream's response contains the token; the field is dropped");
        headers.remove(name);
    }
}

/// A `location` at the upstream's origin gets the origin that the downstream used; otherwise a redirect would lead the downstream, and its dummy token,
/// around the proxy.
fn rewrite_location(headers: &mut HeaderMap, admitted: &Admitted, upstream: &Origin) {
    let Some(rest) = headers.get(LOCATION).and_then(|location| at_origin(location.as_bytes(), upstream)) else { return };
    let mut rewritten = Vec::with_capacity(32 + rest.len());
    rewritten.extend_from_slice(admitted.scheme().as_bytes());
    rewritten.extend_from_slice(b"://");
    rewritten.extend_from_slice(admitted.authority());
    rewritten.extend_from_slice(rest);
    if let Ok(value) = HeaderValue::from_bytes(&rewritten) {
        headers.insert(LOCATION, value);
    }
}

/// What follows the authority of an absolute (or scheme-relative) reference, if that authority is the origin's.
fn at_origin<'a>(location: &'a [u8], origin: &Origin) -> Option<&'a [u8]> {
    let scheme_length = origin.scheme().len();
    let after_scheme = match location {
        [b'/', b'/', rest @ ..] => rest,
        _ if location.len() > scheme_length + 3
            && location[..scheme_length].eq_ignore_ascii_case(origin.scheme().as_bytes())
            && &location[scheme_length..scheme_length + 3] == b"://" =>
        {
            &location[scheme_length + 3..]
        }
        _ => return None,
    };
    let end = after_scheme.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#' | b'\\')).unwrap_or(after_scheme.len());
    let (authority, rest) = after_scheme.split_at(end);
    let (host, port) = super::guard::split_authority(authority)?;
    let same = host.eq_ignore_ascii_case(origin.host.as_bytes()) && port.unwrap_or(origin.default_port()) == origin.port;
    same.then_some(rest)
}

/// Whether a list field contains a member, parameters aside.
fn lists(headers: &HeaderMap, name: &HeaderName, member: &str) -> bool {
    headers
        .get_all(name)
        .iter()
        .flat_map(|line| line.as_bytes().split(|byte| *byte == b','))
        .any(|item| item.split(|byte| *byte == b';').next().is_some_and(|item| item.trim_ascii().eq_ignore_ascii_case(member.as_bytes())))
}
