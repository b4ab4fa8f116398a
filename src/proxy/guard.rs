//! Who may ask for what: the first step of a request, before anything of it is changed or sent. Pure.
//!
//! Any process of the host can connect, and so can any web page in a developer's browser. A page cannot set `Host` to a name that it does not own, nor
//! hide its `Origin`; so the authority must be one that no attacker can point here (DNS rebinding, Ollama's CVE-2024-28224), and a foreign `Origin`
//! ends the request. Every check runs before the token is touched.
//!
//! Not seen from here: a `Content-Length` beside `Transfer-Encoding`, which hyper has dropped by now (it reads the body by the latter alone), and a
//! fragment of the target, which the `http` crate cuts off.

use std::sync::{Arc, PoisonError, RwLock};

use bytes::Bytes;
use http::header::{ALLOW, HeaderValue};
use http::uri::{Authority, Scheme};
use http::{HeaderMap, Method, Response, StatusCode, request};

use super::error::{Error, PROXIED_METHODS};
use super::headers::{self, PSEUDONYM, Upstream};
use super::policy::{Decision, Policy};
use crate::config::Config;
use crate::secret::Token;

use authority::Authorities;
pub(super) use authority::split_authority;
pub(crate) use minting::is_minting_path;

mod authority;
mod minting;

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
    scheme: &'static str,
    authority: Used,
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
    /// The scheme of the origin that the downstream used.
    pub fn scheme(&self) -> &'static str {
        self.scheme
    }

    /// The authority of the origin that the downstream used, as it wrote it.
    pub fn authority(&self) -> &[u8] {
        match &self.authority {
            Used::Host(host) => host.as_bytes(),
            Used::Target(authority) => authority.as_str().as_bytes(),
        }
    }
}

impl Guard {
    /// `ports` are those that the TCP listeners got; a Unix socket has none.
    pub fn new(config: &Config, ports: &[u16], caller_token: Option<CallerToken>) -> Self {
        Self {
            authorities: Arc::new(Authorities::new(&config.listen.allowed_hosts, ports, &config.upstream.origin)),
            upstream: Upstream::new(&config.upstream.origin),
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

    /// Judges a request by its head alone; its body is not looked at. Allocates nothing for a request that passes, unless there is something to decode.
    ///
    /// The framing comes first: where a message ends in doubt, nothing else about it can be trusted, and its connection must close.
    pub fn check(&self, head: &request::Parts) -> Result<Verdict, Error> {
        let fields = Fields::read(&head.headers);
        check_framing(fields.transfer_encoding)?;
        if matches!(head.method, Method::CONNECT | Method::TRACE) {
            // RFC 9110 section 9.3.8: a TRACE's answer would be an echo of the token.
            return Err(Error::MethodNotAllowed);
        }
        check_length(&head.uri)?;
        let (scheme, authority) = self.check_authority(head, fields.host)?;
        self.check_site(&fields)?;
        self.check_caller(fields.caller_token)?;
        if fields.has_passed_here {
            return Err(Error::LoopDetected);
        }
        if let Some(answer) = answer_locally(head) {
            return Ok(Verdict::AnswerLocally(answer));
        }
        let path = head.uri.path();
        if !path.starts_with('/') {
            return Err(NOT_A_TARGET);
        }
        if !self.allow_minting && is_minting_path(path) {
            return Err(Error::MintingDenied);
        }
        let would_deny = match self.policy.decide(&head.method, path)? {
            Decision::Allow => None,
            Decision::WouldDeny { rule } => Some(rule),
        };
        Ok(Verdict::Forward(Admitted { scheme, authority, would_deny }))
    }

    /// The origin that the downstream used, which must be one that the proxy answers to.
    ///
    /// In absolute-form the target's authority counts, and `Host` is only looked at for its form (RFC 9112 section 3.2.2).
    fn check_authority(&self, head: &request::Parts, host: Field) -> Result<(&'static str, Used), Error> {
        let host = match host {
            Field::Once(host) => host,
            Field::Absent => return Err(Error::BadRequest("the Host field is missing")),
            Field::Repeated => return Err(Error::BadRequest("the Host field is repeated")),
        };
        let Some(authority) = head.uri.authority() else {
            self.authorities.check(host.as_bytes())?;
            return Ok((if self.tls { "https" } else { "http" }, Used::Host(host.clone())));
        };
        if split_authority(host.as_bytes()).is_none() {
            return Err(Error::BadRequest("the Host field is not a host with an optional port"));
        }
        let scheme = match head.uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTP => "http",
            Some(scheme) if *scheme == Scheme::HTTPS => "https",
            _ => return Err(NOT_A_TARGET),
        };
        self.authorities.check(authority.as_str().as_bytes())?;
        Ok((scheme, Used::Target(authority.clone())))
    }

    /// A browser says of each request whence it comes: all of them say it by `Origin` where it matters, most by Fetch Metadata too.
    fn check_site(&self, fields: &Fields) -> Result<(), Error> {
        let own_origin = match fields.origin {
            Field::Absent => true,
            Field::Once(origin) => self.authorities.is_own_origin(origin.as_bytes()),
            Field::Repeated => false,
        };
        if own_origin && !fields.is_cross_site { Ok(()) } else { Err(Error::CrossSiteRequest) }
    }

    fn check_caller(&self, given: Field) -> Result<(), Error> {
        match (&self.caller_token, given) {
            (None, _) => Ok(()),
            (Some(expected), Field::Once(given)) if expected.accepts(given.as_bytes()) => Ok(()),
            (Some(_), _) => Err(Error::CallerTokenRequired),
        }
    }
}

const NOT_A_TARGET: Error = Error::BadRequest("the request target is neither a path nor an http URL");

/// A field that may occur once.
#[derive(Debug, Clone, Copy)]
enum Field<'a> {
    Absent,
    Once(&'a HeaderValue),
    Repeated,
}

impl<'a> Field<'a> {
    fn add(&mut self, value: &'a HeaderValue) {
        *self = match self {
            Self::Absent => Self::Once(value),
            Self::Once(_) | Self::Repeated => Self::Repeated,
        };
    }
}

/// All that the guard looks at, read in one pass over the head.
struct Fields<'a> {
    host: Field<'a>,
    transfer_encoding: Field<'a>,
    origin: Field<'a>,
    caller_token: Field<'a>,
    is_cross_site: bool,
    has_passed_here: bool,
}

impl<'a> Fields<'a> {
    fn read(headers: &'a HeaderMap) -> Self {
        let mut fields = Self {
            host: Field::Absent,
            transfer_encoding: Field::Absent,
            origin: Field::Absent,
            caller_token: Field::Absent,
            is_cross_site: false,
            has_passed_here: false,
        };
        for (name, value) in headers {
            match name.as_str() {
                "host" => fields.host.add(value),
                "transfer-encoding" => fields.transfer_encoding.add(value),
                "origin" => fields.origin.add(value),
                CALLER_TOKEN => fields.caller_token.add(value),
                "sec-fetch-site" => fields.is_cross_site |= is_cross_site(value.as_bytes()),
                "via" => fields.has_passed_here |= names_this_proxy(value.as_bytes()),
                _ => {}
            }
        }
        fields
    }
}

/// Hyper takes anything that ends in `chunked`; the codings before it would be forwarded unnamed (RFC 9112 section 6.1, matrix A24).
fn check_framing(transfer_encoding: Field) -> Result<(), Error> {
    match transfer_encoding {
        Field::Absent => Ok(()),
        Field::Once(coding) if coding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked") => Ok(()),
        Field::Once(_) | Field::Repeated => Err(Error::BadRequest("the Transfer-Encoding field is not chunked alone")),
    }
}

fn check_length(target: &http::Uri) -> Result<(), Error> {
    let authority = target.authority().map_or(0, |authority| authority.as_str().len());
    let path_and_query = target.path_and_query().map_or(0, |path| path.as_str().len());
    if authority + path_and_query > MAX_TARGET_BYTES { Err(Error::UriTooLong) } else { Ok(()) }
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
/// forward left (RFC 9110 section 7.6.2). The `http` crate makes an empty path `/`, so that the absolute form with `/` is answered here as well.
fn answer_locally(head: &request::Parts) -> Option<Response<Bytes>> {
    let target = &head.uri;
    let asks_the_server = target.path() == "*" || (target.authority().is_some() && target.path() == "/" && target.query().is_none());
    if head.method != Method::OPTIONS || !(asks_the_server || headers::max_forwards(&head.headers) == Some(0)) {
        return None;
    }
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(PROXIED_METHODS));
    Some(response)
}

#[cfg(test)]
mod tests {
    use http::Request;

    use super::*;

    type Lines<'a> = &'a [(&'a str, &'a str)];

    fn guard(toml: &str) -> Guard {
        let config = Config::from_toml(&format!("[credentials]\ntoken_file = \"/token\"\n{toml}")).expect("a valid configuration");
        Guard::new(&config, &[8080], None)
    }

    fn head(method: &str, target: &str, fields: Lines) -> request::Parts {
        let mut request = Request::builder().method(method).uri(target);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).expect("a valid request").into_parts().0
    }

    /// The `code` of the refusal, `local`, or the origin with which the request is admitted.
    fn judge(guard: &Guard, head: &request::Parts) -> String {
        match guard.check(head) {
            Ok(Verdict::Forward(admitted)) => format!("{}://{}", admitted.scheme(), admitted.authority().escape_ascii()),
            Ok(Verdict::AnswerLocally(answer)) => {
                assert_eq!((answer.status(), answer.headers()[ALLOW].to_str().unwrap()), (StatusCode::NO_CONTENT, PROXIED_METHODS));
                "local".to_owned()
            }
            Err(error) => error.code().to_owned(),
        }
    }

    #[test]
    fn requests_are_admitted_refused_or_answered() {
        const HOST: (&str, &str) = ("host", "LocalHost:8080");
        let guard = guard("");
        let rows: &[(&str, &str, Lines, &str)] = &[
            ("GET", "/inputs/", &[HOST], "http://LocalHost:8080"),
            ("GET", "/inputs/", &[("host", "api.upsolver.com")], "http://api.upsolver.com"),
            // A11, A12
            ("GET", "/", &[], "bad_request"),
            ("GET", "/", &[HOST, HOST], "bad_request"),
            ("GET", "/", &[("host", "localhost, localhost")], "bad_request"),
            ("GET", "/", &[("host", "")], "bad_request"),
            // A14, A15, B26
            ("GET", "http://api.upsolver.com/x", &[("host", "evil.example")], "http://api.upsolver.com"),
            ("GET", "https://api.upsolver.com/x", &[HOST], "https://api.upsolver.com"),
            ("GET", "http://api.upsolver.com/x", &[("host", "a, b")], "bad_request"),
            ("GET", "http://api.upsolver.com/x", &[], "bad_request"),
            ("GET", "http://evil.example/x", &[HOST], "misdirected_request"),
            ("GET", "http://169.254.169.254/", &[HOST], "misdirected_request"),
            ("GET", "http://user@localhost/", &[HOST], "bad_request"),
            ("GET", "ftp://localhost/", &[HOST], "bad_request"),
            ("GET", "/", &[("host", "evil.example:8080")], "misdirected_request"),
            // A16, A17, A18
            ("GET", "*", &[HOST], "bad_request"),
            ("GET", "localhost:443", &[HOST], "bad_request"),
            ("OPTIONS", "*", &[HOST], "local"),
            ("OPTIONS", "http://localhost", &[HOST], "local"),
            ("OPTIONS", "http://localhost?x", &[HOST], "http://localhost"),
            ("OPTIONS", "/", &[HOST], "http://LocalHost:8080"),
            ("OPTIONS", "/x", &[HOST, ("max-forwards", "0")], "local"),
            ("OPTIONS", "/x", &[HOST, ("max-forwards", "1")], "http://LocalHost:8080"),
            ("OPTIONS", "/x", &[HOST, ("max-forwards", "none")], "http://LocalHost:8080"),
            ("GET", "/x", &[HOST, ("max-forwards", "0")], "http://LocalHost:8080"),
            // A19, A20, B17
            ("CONNECT", "api.upsolver.com:443", &[HOST], "method_not_allowed"),
            ("TRACE", "/", &[HOST], "method_not_allowed"),
            ("trace", "/", &[HOST], "http://LocalHost:8080"),
            ("PROPFIND", "/", &[HOST], "http://LocalHost:8080"),
            // A24
            ("POST", "/", &[HOST, ("transfer-encoding", " Chunked\t")], "http://LocalHost:8080"),
            ("POST", "/", &[HOST, ("transfer-encoding", "gzip, chunked")], "bad_request"),
            ("POST", "/", &[HOST, ("transfer-encoding", "chunked, chunked")], "bad_request"),
            ("POST", "/", &[HOST, ("transfer-encoding", ", chunked")], "bad_request"),
            ("POST", "/", &[HOST, ("transfer-encoding", "identity")], "bad_request"),
            ("POST", "/", &[HOST, ("transfer-encoding", "\"chunked\"")], "bad_request"),
            ("POST", "/", &[HOST, ("transfer-encoding", "")], "bad_request"),
            ("POST", "/", &[HOST, ("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")], "bad_request"),
            // Ambiguous framing closes the connection, whatever else is wrong.
            ("TRACE", "/api-tokens", &[("transfer-encoding", "gzip, chunked")], "bad_request"),
            // A10
            ("GET", "/", &[HOST, ("via", "1.0 fred, HTTP/1.1  Upsolver-Auth-Proxy (x)")], "loop_detected"),
            ("GET", "/", &[HOST, ("via", "1.0 fred"), ("via", "1.1 upsolver-auth-proxy")], "loop_detected"),
            ("GET", "/", &[HOST, ("via", "1.1 my-upsolver-auth-proxy, 1.1 x (upsolver-auth-proxy)")], "http://LocalHost:8080"),
            // B28 to B30
            ("GET", "/", &[HOST, ("sec-fetch-site", "cross-site")], "cross_site_request"),
            ("GET", "/", &[HOST, ("sec-fetch-site", " Same-Site ")], "cross_site_request"),
            ("GET", "/", &[HOST, ("sec-fetch-site", "none"), ("sec-fetch-site", "cross-site")], "cross_site_request"),
            ("GET", "/", &[HOST, ("sec-fetch-site", "same-origin")], "http://LocalHost:8080"),
            ("GET", "/", &[HOST, ("origin", "http://localhost:8080")], "http://LocalHost:8080"),
            ("GET", "/", &[HOST, ("origin", "http://localhost:3000")], "cross_site_request"),
            ("GET", "/", &[HOST, ("origin", "null")], "cross_site_request"),
            ("GET", "/", &[HOST, ("origin", "http://localhost"), ("origin", "http://localhost")], "cross_site_request"),
            ("OPTIONS", "/x", &[HOST, ("origin", "https://evil.example"), ("access-control-request-method", "POST")], "cross_site_request"),
            ("OPTIONS", "*", &[HOST, ("origin", "https://evil.example")], "cross_site_request"),
            // B16, B18
            ("POST", "/api-tokens/", &[HOST], "minting_denied"),
            ("GET", "/x/%2e%2e/API-tokens?x", &[HOST], "minting_denied"),
            ("GET", "http://api.upsolver.com/api-tokens", &[HOST], "minting_denied"),
            ("GET", "/inputs?path=/api-tokens", &[HOST], "http://LocalHost:8080"),
        ];
        for (method, target, fields, expected) in rows {
            assert_eq!(judge(&guard, &head(method, target, fields)), *expected, "{method} {target} {fields:?}");
        }
    }

    #[test]
    fn b18_minting_is_opt_in() {
        let guard = guard("[policy]\nallow_minting = true");
        assert_eq!(judge(&guard, &head("POST", "/api-tokens/", &[("host", "localhost")])), "http://localhost");
    }

    #[test]
    fn b13_the_longest_target_has_16_kib() {
        let guard = guard("");
        let target = |length: usize| format!("/{}", "x".repeat(length - 1));
        assert_eq!(judge(&guard, &head("GET", &target(16_384), &[("host", "localhost")])), "http://localhost");
        assert_eq!(judge(&guard, &head("GET", &target(16_385), &[("host", "localhost")])), "uri_too_long");
    }

    #[test]
    fn b31_the_caller_token_is_demanded_once_and_exactly_and_can_be_replaced() {
        const HOST: (&str, &str) = ("host", "localhost");
        let secret = |value: &str| Token::new(value.to_owned()).expect("a legal secret");
        let caller_token = CallerToken::new(secret("right"));
        let guard = Guard { caller_token: Some(caller_token.clone()), ..guard("") };
        let code = |fields: Lines| judge(&guard, &head("GET", "/", fields));
        assert_eq!(code(&[HOST, (CALLER_TOKEN, "right")]), "http://localhost");
        // Of the last one two bytes differ, both in the same bit.
        for given in ["", "wrong", "righ", "rightx", "RIGHT", "RIght"] {
            assert_eq!(code(&[HOST, (CALLER_TOKEN, given)]), "caller_token_required", "{given}");
        }
        assert_eq!(code(&[HOST]), "caller_token_required");
        assert_eq!(code(&[HOST, (CALLER_TOKEN, "right"), (CALLER_TOKEN, "right")]), "caller_token_required");
        assert_eq!(code(&[HOST, ("x_upsolver_auth_proxy_token", "right")]), "caller_token_required");
        caller_token.replace(secret("other"));
        assert_eq!(code(&[HOST, (CALLER_TOKEN, "right")]), "caller_token_required");
        assert_eq!(code(&[HOST, (CALLER_TOKEN, "other")]), "http://localhost");
    }
}
