//! Who may ask for what: the first step of a request, before anything of it is changed or sent. Pure.
//!
//! Any process of the host can connect, and so can any web page in a developer's browser. A page cannot set `Host` to a name that it does not own, nor
//! hide its `Origin`; so the authority must be one that no attacker can point here (DNS rebinding, Ollama's CVE-2024-28224), and a foreign `Origin`
//! ends the request. Every check runs before the token is touched.

use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use http::header::{ALLOW, HOST, HeaderValue, TRANSFER_ENCODING};
use http::uri::Authority;
use http::{Method, Response, StatusCode, request};

use super::error::{Error, PROXIED_METHODS};
use super::headers::{self, PSEUDONYM, Upstream};
use super::policy::{Decision, Policy};
use crate::config::Config;
use crate::secret::Token;

/// The longest request target, in bytes; more is 414 (RFC 9110 section 15.5.15).
const MAX_TARGET_BYTES: usize = 16 * 1024;
/// The field that carries the content of `listen.caller_token_file`.
const CALLER_TOKEN: &str = "x-upsolver-auth-proxy-token";

/// Judges requests. Cheap to clone; one for each worker.
#[derive(Debug, Clone)]
pub struct Guard {
    authorities: Arc<Authorities>,
    upstream: Upstream,
    policy: Policy,
    allow_minting: bool,
    caller_token: Option<CallerToken>,
    tls: bool,
}

/// The content of `listen.caller_token_file`, which can be replaced while the proxy runs. Read by every request, written by a reload.
#[derive(Debug, Clone)]
pub struct CallerToken(Arc<RwLock<Token>>);

impl CallerToken {
    /// Requests must carry `token`.
    pub fn new(token: Token) -> Self {
        Self(Arc::new(RwLock::new(token)))
    }

    /// From now on they must carry this one.
    pub fn replace(&self, token: Token) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = token;
    }

    /// Compares in constant time, so that answers do not tell how much of a guess was right.
    fn accepts(&self, given: &[u8]) -> bool {
        let token = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let expected = token.expose().as_bytes();
        let difference = expected.iter().zip(given).fold(0, |difference, (a, b)| difference | (a ^ b));
        std::hint::black_box(difference) == 0 && expected.len() == given.len()
    }
}

/// What the guard says of a request that it does not refuse.
#[derive(Debug)]
pub enum Verdict {
    /// It may go on.
    Forward(Admitted),
    /// It concerns the proxy alone; no token is needed.
    AnswerLocally(Response<Bytes>),
}

/// A request that may be forwarded.
#[derive(Debug)]
pub struct Admitted {
    origin: Used,
    tls: bool,
    /// The policy rule that would have denied it, were it not for `policy.dry_run`.
    pub would_deny: Option<String>,
}

/// The authority that the downstream used, as it wrote it.
#[derive(Debug)]
enum Used {
    Host(HeaderValue),
    Target(Authority),
}

impl Admitted {
    /// The origin's scheme as the downstream knows it.
    pub fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }

    /// The origin's authority as the downstream knows it.
    pub fn authority(&self) -> &[u8] {
        match &self.origin {
            Used::Host(host) => host.as_bytes(),
            Used::Target(authority) => authority.as_str().as_bytes(),
        }
    }
}

impl Guard {
    /// `ports` are those that the TCP listeners got.
    pub fn new(config: &Config, ports: &[u16], caller_token: Option<CallerToken>) -> Self {
        let upstream = Upstream::new(&config.upstream.origin);
        let origin = &config.upstream.origin;
        Self {
            authorities: Arc::new(Authorities {
                listeners: ports.to_vec(),
                upstream_host: if origin.host.contains(':') { format!("[{}]", origin.host) } else { origin.host.clone() },
                upstream_ports: [443, 80, origin.port],
                configured: config.listen.allowed_hosts.iter().map(|host| host.to_ascii_lowercase()).collect(),
            }),
            upstream,
            policy: Policy::new(&config.policy),
            allow_minting: config.policy.allow_minting,
            caller_token,
            tls: config.listen.tls.is_some(),
        }
    }

    /// Where admitted requests go.
    pub fn upstream(&self) -> &Upstream {
        &self.upstream
    }

    /// Judges a request by its head alone; its body is not looked at.
    pub fn check(&self, head: &request::Parts) -> Result<Verdict, Error> {
        if matches!(head.method, Method::CONNECT | Method::TRACE) {
            // RFC 9110 section 9.3.8: a TRACE's answer would be an echo of the token.
            return Err(Error::MethodNotAllowed);
        }
        let fields = self.read_fields(head)?;
        let target = &head.uri;
        let path = target.path();
        if path.len() + target.query().map_or(0, str::len) > MAX_TARGET_BYTES {
            return Err(Error::UriTooLong);
        }
        let (host, port) = split_authority(fields.host.as_bytes()).ok_or(Error::BadRequest("the Host field is not a host and a port"))?;
        let origin = match target.authority() {
            None => {
                self.authorities.check(host, port)?;
                Used::Host(fields.host.clone())
            }
            // Absolute-form: the target's authority counts, Host is only looked at for its form (RFC 9112 section 3.2.2).
            Some(authority) => {
                if !matches!(target.scheme_str(), Some("http" | "https")) {
                    return Err(Error::BadRequest("the request target is neither a path nor an http URL"));
                }
                let (host, port) = split_authority(authority.as_str().as_bytes())
                    .ok_or(Error::BadRequest("the target's authority is not a host and a port"))?;
                self.authorities.check(host, port)?;
                Used::Target(authority.clone())
            }
        };
        if fields.cross_site {
            return Err(Error::CrossSiteRequest);
        }
        if let Some(expected) = &self.caller_token
            && !fields.caller_token.is_some_and(|given| expected.accepts(given.as_bytes()))
        {
            return Err(Error::CallerTokenRequired);
        }
        if fields.is_loop {
            return Err(Error::LoopDetected);
        }
        if let Some(answer) = answer_locally(head) {
            return Ok(Verdict::AnswerLocally(answer));
        }
        if !path.starts_with('/') {
            return Err(Error::BadRequest("the request target is neither a path nor an http URL"));
        }
        if !self.allow_minting && is_minting(path) {
            return Err(Error::MintingDenied);
        }
        let would_deny = match self.policy.decide(&head.method, path)? {
            Decision::Allow => None,
            Decision::WouldDeny { rule } => Some(rule),
        };
        Ok(Verdict::Forward(Admitted { origin, tls: self.tls, would_deny }))
    }

    /// One pass over the fields, for all that the guard looks at.
    fn read_fields<'a>(&self, head: &'a request::Parts) -> Result<Fields<'a>, Error> {
        let mut host = None;
        let mut coding = None;
        let (mut cross_site, mut is_loop, mut caller_token) = (false, false, None);
        for (name, value) in &head.headers {
            if name == HOST {
                if host.replace(value).is_some() {
                    return Err(Error::BadRequest("the Host field is repeated"));
                }
            } else if name == TRANSFER_ENCODING {
                // Hyper takes anything that ends in "chunked"; the codings before it would be forwarded unnamed (RFC 9112 section 6.1).
                if coding.replace(value).is_some() || !value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked") {
                    return Err(Error::BadRequest("Transfer-Encoding is not chunked alone"));
                }
            } else {
                match name.as_str() {
                    "sec-fetch-site" => cross_site |= is_cross_site(value.as_bytes()),
                    "origin" => cross_site |= !self.authorities.is_own_origin(value.as_bytes()),
                    "via" => is_loop |= names_this_proxy(value.as_bytes()),
                    CALLER_TOKEN => {
                        if caller_token.replace(value).is_some() {
                            return Err(Error::BadRequest("the x-upsolver-auth-proxy-token field is repeated"));
                        }
                    }
                    _ => {}
                }
            }
        }
        let host = host.ok_or(Error::BadRequest("the Host field is missing"))?;
        Ok(Fields { host, cross_site, caller_token, is_loop })
    }
}

struct Fields<'a> {
    host: &'a HeaderValue,
    cross_site: bool,
    caller_token: Option<&'a HeaderValue>,
    is_loop: bool,
}

/// The authorities that the proxy answers to.
#[derive(Debug)]
struct Authorities {
    listeners: Vec<u16>,
    upstream_host: String,
    upstream_ports: [u16; 3],
    configured: Vec<String>,
}

impl Authorities {
    fn check(&self, host: &[u8], port: Option<u16>) -> Result<(), Error> {
        let own_port = port.is_none_or(|port| self.listeners.contains(&port));
        let allowed = (is_loopback_name(host) && own_port)
            || (host.eq_ignore_ascii_case(self.upstream_host.as_bytes())
                && (own_port || port.is_some_and(|port| self.upstream_ports.contains(&port))))
            || self.configured.iter().any(|configured| match split_authority(configured.as_bytes()) {
                Some((name, None)) => host.eq_ignore_ascii_case(name) && own_port,
                Some((name, exactly)) => host.eq_ignore_ascii_case(name) && port == exactly,
                None => false,
            });
        if allowed { Ok(()) } else { Err(Error::MisdirectedRequest) }
    }

    /// Whether an `Origin` is of a host that the proxy answers to, whatever its port; `null` and what is malformed is not.
    fn is_own_origin(&self, origin: &[u8]) -> bool {
        let authority = origin.strip_prefix(b"http://").or_else(|| origin.strip_prefix(b"https://"));
        authority.and_then(split_authority).is_some_and(|(host, _)| self.check(host, None).is_ok() || self.is_configured_host(host))
    }

    fn is_configured_host(&self, host: &[u8]) -> bool {
        self.configured
            .iter()
            .filter_map(|configured| split_authority(configured.as_bytes()))
            .any(|(name, _)| host.eq_ignore_ascii_case(name))
    }
}

/// Names that an attacker cannot point anywhere else.
fn is_loopback_name(host: &[u8]) -> bool {
    host.eq_ignore_ascii_case(b"localhost") || host == b"127.0.0.1" || host == b"[::1]"
}

/// `same-site` is another origin too: another port of localhost, say (Fetch Metadata section 2.3).
fn is_cross_site(value: &[u8]) -> bool {
    let value = value.trim_ascii();
    value.eq_ignore_ascii_case(b"cross-site") || value.eq_ignore_ascii_case(b"same-site")
}

/// Whether a `Via` line has this proxy among its members: `1.1 upsolver-auth-proxy`, perhaps with a comment (RFC 9110 section 7.6.3).
fn names_this_proxy(via: &[u8]) -> bool {
    via.split(|byte| *byte == b',').any(|member| {
        let mut words = member.split(|byte| matches!(byte, b' ' | b'\t')).filter(|word| !word.is_empty());
        words.nth(1).is_some_and(|received_by| received_by.eq_ignore_ascii_case(PSEUDONYM.as_bytes()))
    })
}

/// `OPTIONS` for the proxy itself: for `*` (RFC 9112 section 3.2.4), for the absolute form with an empty path, which means the same, or with no
/// forward left (RFC 9110 section 7.6.2).
fn answer_locally(head: &request::Parts) -> Option<Response<Bytes>> {
    let target = &head.uri;
    let asks_the_server = target.path() == "*" || (target.authority().is_some() && target.path_and_query().is_none_or(|path| path == "/"));
    if head.method != Method::OPTIONS || !(asks_the_server || headers::max_forwards(&head.headers) == Some(0)) {
        return None;
    }
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(PROXIED_METHODS));
    Some(response)
}

/// Host and port of an authority; nothing where it is not exactly that (RFC 9110 section 4.2.3: user information is refused, too).
pub(super) fn split_authority(authority: &[u8]) -> Option<(&[u8], Option<u16>)> {
    let host_end = match authority {
        [b'[', rest @ ..] => rest.iter().position(|byte| *byte == b']')? + 2,
        _ => authority.iter().position(|byte| *byte == b':').unwrap_or(authority.len()),
    };
    let (host, port) = authority.split_at(host_end);
    let valid = match host {
        [b'[', address @ .., b']'] => std::str::from_utf8(address).is_ok_and(|address| address.parse::<std::net::Ipv6Addr>().is_ok()),
        [] => false,
        // RFC 3986 section 3.2.2, less the comma: a list of hosts is not a host.
        name => name.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-._~%!$&'()*+;=".contains(byte)),
    };
    if !valid {
        return None;
    }
    match port {
        [] => Some((host, None)),
        [b':', digits @ ..] if !digits.is_empty() && digits.iter().all(u8::is_ascii_digit) => {
            Some((host, Some(std::str::from_utf8(digits).ok()?.parse().ok()?)))
        }
        _ => None,
    }
}

/// Whether a path is `/api-tokens` or below in any spelling that some server could take for it. In doubt it is.
///
/// Servers differ in what they decode, and when: percent-encoding once or more, backslashes, `;` parameters, dot segments, repeated slashes, case,
/// what follows a NUL. So the path is taken apart in the most generous way, and it is enough that it passes through `/api-tokens` at any moment.
pub fn is_minting(path: &str) -> bool {
    let plain =
        !path.bytes().any(|byte| matches!(byte, b'%' | b'\\' | b';' | b'.') || byte <= b' ' || byte >= 0x7f) && !path.contains("//");
    if plain {
        return path.strip_prefix('/').is_some_and(|path| path.split('/').next().is_some_and(|first| first.eq_ignore_ascii_case(TOKENS)));
    }
    let mut depth: Vec<bool> = Vec::new();
    for segment in decode_fully(path.as_bytes()).split(|byte| matches!(byte, b'/' | b'\\')) {
        match essence(segment) {
            b"" | b"." => {}
            b".." => {
                depth.pop();
            }
            segment => {
                let is_tokens = segment.eq_ignore_ascii_case(TOKENS.as_bytes());
                if depth.is_empty() && is_tokens {
                    return true;
                }
                depth.push(is_tokens);
            }
        }
    }
    false
}

const TOKENS: &str = "api-tokens";

/// A segment without what a server may cut off or ignore: parameters, a query that was encoded, what follows a control character, outer spaces.
fn essence(segment: &[u8]) -> &[u8] {
    let segment = segment.trim_ascii_start();
    let end = segment.iter().position(|byte| matches!(byte, b';' | b'?' | b'#') || byte.is_ascii_control()).unwrap_or(segment.len());
    segment[..end].trim_ascii()
}

/// Percent-decodes until nothing changes; overlong two-byte UTF-8 of an ASCII character counts as that character, as it did with old servers.
fn decode_fully(path: &[u8]) -> Vec<u8> {
    let mut current = path.to_vec();
    loop {
        let decoded: Vec<u8> = percent_encoding::percent_decode(&current).collect();
        if decoded == current {
            return shorten_overlong(&decoded);
        }
        current = decoded;
    }
}

fn shorten_overlong(bytes: &[u8]) -> Vec<u8> {
    let mut shortened = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&first, tail)) = rest.split_first() {
        match (first, tail) {
            (0xc0 | 0xc1, [second @ 0x80..=0xbf, after @ ..]) => {
                shortened.push((first & 1) << 6 | (second & 0x3f));
                rest = after;
            }
            _ => {
                shortened.push(first);
                rest = tail;
            }
        }
    }
    shortened
}
