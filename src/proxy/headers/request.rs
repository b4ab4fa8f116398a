//! From the downstream's head to the one that goes to the upstream, in the order of contract section 4, "Clean": what `Connection` names and what is
//! hop-by-hop goes, then what a downstream may not send, and only then is anything written; `authorization` last.

use http::header::{
    AUTHORIZATION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, MAX_FORWARDS, TE, TRANSFER_ENCODING, VIA,
};
use http::{Method, Uri, Version, request};
use http_body::SizeHint;

use super::{Upstream, is_hop_by_hop, remove_nominated, remove_where};
use crate::secret::AuthorizationValue;

const VIA_ENTRY: HeaderValue = HeaderValue::from_static("1.1 upsolver-auth-proxy");
/// No name of [`is_reserved`] is longer, in bytes.
const LONGEST_RESERVED: usize = 27;

/// What the response's cleaning must know of the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cleaned {
    /// The downstream takes trailers (`TE: trailers`, RFC 9110 section 10.1.4).
    pub wants_trailers: bool,
    /// The request is a HEAD: its response has a length but no body.
    pub to_head: bool,
    /// The downstream speaks HTTP/1.0.
    pub from_http_1_0: bool,
}

/// Makes a downstream's head into the one that goes to the upstream, all but `authorization`, which each attempt gets from [`authorize`].
/// `body` is the size that its framing announced.
pub fn clean_request(head: &mut request::Parts, body: &SizeHint, upstream: &Upstream) -> Cleaned {
    let headers = &mut head.headers;
    let cleaned = Cleaned {
        wants_trailers: lists(headers, &TE, b"trailers"),
        to_head: head.method == Method::HEAD,
        from_http_1_0: head.version == Version::HTTP_10,
    };
    let had_length = headers.contains_key(CONTENT_LENGTH);

    remove_nominated(headers);
    remove_where(headers, |name| is_hop_by_hop(name) || name == "content-length" || is_reserved(name) || is_reserved_twin(name));

    set_request_framing(headers, body, had_length);
    headers.insert(HOST, upstream.host.clone());
    headers.append(VIA, VIA_ENTRY);
    if cleaned.wants_trailers {
        // Now it is the proxy that can take them. Not named in `Connection`, which HTTP/2 does not know; an upstream that passes it on does no harm.
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if head.method == Method::OPTIONS {
        decrement_max_forwards(headers);
    }
    if cleaned.from_http_1_0 || (body.exact() == Some(0) && expects_continue(headers)) {
        // RFC 9110 section 10.1.1: an HTTP/1.0 request's expectation is ignored; it must not come alive on the way. And no client may expect a 100 for a
        // body that it does not have: some servers wait for one.
        headers.remove(EXPECT);
    }
    head.version = Version::HTTP_11;
    if head.uri.authority().is_some() {
        head.uri = origin_form(&head.uri);
    }
    head.extensions.clear();
    cleaned
}

/// The last step of a request's head: exactly one `authorization`, ours.
pub fn authorize(headers: &mut HeaderMap, authorization: &AuthorizationValue) {
    headers.insert(AUTHORIZATION, authorization.header());
}

/// Fields that a downstream may not send: the proxy's own, and those by which a server could take the request for one with another method.
fn is_reserved(name: &str) -> bool {
    matches!(
        name,
        "authorization"
            | "proxy-authorization"
            | "x-api-email"
            | "x-api-password"
            | "x-upsolver-auth-proxy-token"
            | "x-http-method-override"
            | "x-http-method"
            | "x-method-override"
    )
}

/// Whether a CGI-like server could take the name for a reserved one: it reads `_` for `-` (oauth2-proxy's CVE-2025-64484), and may trim it.
fn is_reserved_twin(name: &str) -> bool {
    if !name.contains('_') {
        return false;
    }
    let name = name.trim_matches(['_', '-']).as_bytes();
    let mut dashed = [0; LONGEST_RESERVED];
    let Some(dashed) = dashed.get_mut(..name.len()) else { return false };
    for (to, from) in dashed.iter_mut().zip(name) {
        *to = if *from == b'_' { b'-' } else { *from };
    }
    std::str::from_utf8(dashed).is_ok_and(is_reserved)
}

/// Framing from the body, never copied (RFC 9112 section 6). A zero that was announced stays one. A body of unknown length is said to be chunked,
/// a GET's too (matrix A53, A59).
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

fn expects_continue(headers: &HeaderMap) -> bool {
    headers.get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// RFC 9110 section 7.6.2. The guard answers a zero; what is no number is no limit.
fn decrement_max_forwards(headers: &mut HeaderMap) {
    if let Some(left) = max_forwards(headers) {
        headers.insert(MAX_FORWARDS, HeaderValue::from(left.saturating_sub(1)));
    }
}

/// The value of `max-forwards`, where it is one number.
pub(in crate::proxy) fn max_forwards(headers: &HeaderMap) -> Option<u64> {
    let value = headers.get(MAX_FORWARDS)?.to_str().ok()?;
    if value.bytes().all(|byte| byte.is_ascii_digit()) { value.parse().ok() } else { None }
}

/// The path and query alone, byte for byte: scheme and authority are the connection's matter, never the request's. The absolute form may leave the path
/// out, the origin form may not (RFC 9112 section 3.2.1, RFC 9113 section 8.3.1).
fn origin_form(target: &Uri) -> Uri {
    let Some(path) = target.path_and_query() else { return Uri::default() };
    if path.as_str().starts_with('/') {
        return Uri::from(path.clone());
    }
    format!("/{}", path.as_str()).parse().expect("a query behind a slash is a target")
}

/// Whether a list field contains a member, parameters aside.
fn lists(headers: &HeaderMap, name: &HeaderName, member: &[u8]) -> bool {
    let mut items = headers.get_all(name).iter().flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    items.any(|item| item.split(|byte| *byte == b';').next().is_some_and(|item| item.trim_ascii().eq_ignore_ascii_case(member)))
}

#[cfg(test)]
mod tests {
    use http::Request;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;
    use crate::config::Origin;
    use crate::secret::Token;

    type Lines<'a> = &'a [(&'a str, &'a [u8])];

    fn upstream() -> Upstream {
        Upstream::new(&Origin { tls: true, host: "api.upsolver.com".to_owned(), port: 443 })
    }

    fn bodyless() -> SizeHint {
        SizeHint::with_exact(0)
    }

    fn head(method: &str, target: &str, lines: Lines) -> request::Parts {
        let mut request = Request::builder().method(method).uri(target).header("host", "localhost:8080");
        for (name, value) in lines {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap().into_parts().0
    }

    /// The field lines after cleaning, but for `host` and `via`, which are always there.
    fn cleaned(mut head: request::Parts, body: &SizeHint) -> Vec<String> {
        clean_request(&mut head, body, &upstream());
        assert_eq!(head.headers.get_all(HOST).iter().collect::<Vec<_>>(), ["api.upsolver.com"]);
        assert_eq!(head.headers.get_all(VIA).iter().next_back().unwrap(), "1.1 upsolver-auth-proxy");
        let lines = head.headers.iter().filter(|(name, _)| !matches!(*name, &HOST | &VIA));
        lines.map(|(name, value)| format!("{name}: {}", value.as_bytes().escape_ascii())).collect()
    }

    #[test]
    fn what_ends_here_goes_and_everything_else_stays() {
        let rows: &[(Lines, &[&str])] = &[
            // A01, A02
            (&[("connection", b"close, X-Foo"), ("x-foo", b"1"), ("x-bar", b"2")], &["x-bar: 2"]),
            (&[("connection", b"authorization, host, via, content-type"), ("content-type", b"x"), ("via", b"1.0 fred")], &[]),
            // A05
            (
                &[
                    ("keep-alive", b"1"),
                    ("proxy-connection", b"1"),
                    ("proxy-authorization", b"1"),
                    ("proxy-authenticate", b"1"),
                    ("te", b"gzip"),
                    ("trailer", b"x"),
                    ("upgrade", b"h2c"),
                    ("http2-settings", b"x"),
                ],
                &[],
            ),
            // A08
            (
                &[("x-r", b"b"), ("cookie", b"a=b"), ("x-r", b"a"), ("x-obs", b"caf\xe9"), ("x-empty", b""), ("x-r", b"c, d")],
                &["x-r: b", "x-r: a", "x-r: c, d", "cookie: a=b", "x-obs: caf\\xe9", "x-empty: "],
            ),
            // B17, B19 to B21
            (&[("x-http-method-override", b"POST"), ("x-http-method", b"POST"), ("x-method-override", b"POST")], &[]),
            (&[("authorization", b"a"), ("authorization", b"b"), ("x-api-email", b"a"), ("x-api-password", b"b")], &[]),
            (&[("x_api_password", b"a"), ("x-api_email", b"b"), ("authorization_", b"c"), ("proxy_authorization", b"d")], &[]),
            (&[("x_upsolver_auth_proxy_token", b"a"), ("x_upsolver-auth_proxy-token_", b"b"), ("_authorization", b"c")], &[]),
            (&[("x_custom", b"1"), ("x-api-password-hint", b"2"), ("_", b"3")], &["x_custom: 1", "x-api-password-hint: 2", "_: 3"]),
            // B32
            (&[("x-forwarded-for", b"1.2.3.4"), ("forwarded", b"for=x")], &["x-forwarded-for: 1.2.3.4", "forwarded: for=x"]),
        ];
        for (lines, expected) in rows {
            assert_eq!(cleaned(head("GET", "/x", lines), &bodyless()), *expected, "{lines:?}");
        }
    }

    #[test]
    fn a09_via_is_added_behind_what_is_there() {
        let mut head = head("GET", "/", &[("via", b"1.0 fred"), ("via", b"1.1 ethel")]);
        clean_request(&mut head, &bodyless(), &upstream());
        assert_eq!(head.headers.get_all(VIA).iter().collect::<Vec<_>>(), ["1.0 fred", "1.1 ethel", "1.1 upsolver-auth-proxy"]);
    }

    /// A23, A53, A54, A59: framing comes from the body, whatever the downstream's fields said.
    #[test]
    fn a53_a54_a59_framing_is_rebuilt() {
        let (exact, unknown) = (SizeHint::with_exact(5), SizeHint::new());
        let rows: &[(&str, Lines, &SizeHint, &[&str])] = &[
            ("GET", &[], &bodyless(), &[]),
            ("POST", &[], &bodyless(), &[]),
            ("POST", &[("content-length", b"0")], &bodyless(), &["content-length: 0"]),
            ("POST", &[("content-length", b"5")], &exact, &["content-length: 5"]),
            ("GET", &[("content-length", b"5")], &exact, &["content-length: 5"]),
            ("POST", &[("content-length", b"7"), ("connection", b"content-length")], &exact, &["content-length: 5"]),
            ("POST", &[("transfer-encoding", b"chunked")], &unknown, &["transfer-encoding: chunked"]),
            ("GET", &[("transfer-encoding", b"chunked")], &unknown, &["transfer-encoding: chunked"]),
            ("HEAD", &[("transfer-encoding", b"Chunked"), ("content-length", b"3")], &unknown, &["transfer-encoding: chunked"]),
        ];
        for (method, lines, body, expected) in rows {
            assert_eq!(cleaned(head(method, "/", lines), body), *expected, "{method} {lines:?}");
        }
    }

    #[test]
    fn a07_te_goes_on_as_trailers_or_not_at_all() {
        for (value, expected) in
            [("trailers", true), ("gzip;q=0.5, TRAILERS;x=y", true), ("gzip", false), ("trailers2", false), ("", false)]
        {
            let mut head = head("GET", "/", &[("te", value.as_bytes()), ("connection", b"te")]);
            assert_eq!(clean_request(&mut head, &bodyless(), &upstream()).wants_trailers, expected, "{value}");
            assert_eq!(head.headers.get(TE).map(HeaderValue::as_bytes), expected.then_some(&b"trailers"[..]), "{value}");
        }
    }

    #[test]
    fn a14_a22_only_the_path_leaves_and_it_leaves_as_it_came() {
        for (target, expected) in [
            ("/a%2Fb/../c//d;e?f=%00&g=//h", "/a%2Fb/../c//d;e?f=%00&g=//h"),
            ("//evil.example/x", "//evil.example/x"),
            ("http://api.upsolver.com/x?", "/x?"),
            ("http://api.upsolver.com", "/"),
            ("https://api.upsolver.com?q", "/?q"),
        ] {
            let mut head = head("GET", target, &[]);
            clean_request(&mut head, &bodyless(), &upstream());
            assert_eq!((head.uri.to_string().as_str(), head.uri.authority()), (expected, None));
            // What is printed has a slash in any case; HTTP/2 sends what is held (RFC 9113 section 8.3.1).
            assert_eq!(head.uri.path_and_query().map(http::uri::PathAndQuery::as_str), Some(expected));
        }
    }

    #[test]
    fn a18_max_forwards_is_counted_down_for_options_alone() {
        for (method, value, expected) in [
            ("OPTIONS", "1", "0"),
            ("OPTIONS", "10", "9"),
            ("OPTIONS", "99999999999999999999", "99999999999999999999"),
            ("OPTIONS", "+5", "+5"),
            ("OPTIONS", "none", "none"),
            ("GET", "1", "1"),
        ] {
            let lines = cleaned(head(method, "/x", &[("max-forwards", value.as_bytes())]), &bodyless());
            assert_eq!(lines, [format!("max-forwards: {expected}")], "{method}");
        }
    }

    #[test]
    fn a41_a48_the_response_is_told_what_its_request_was() {
        let plain = Cleaned { wants_trailers: false, to_head: false, from_http_1_0: false };
        for (method, version, te, expected) in [
            ("GET", Version::HTTP_11, "", plain),
            ("HEAD", Version::HTTP_11, "", Cleaned { to_head: true, ..plain }),
            ("GET", Version::HTTP_10, "", Cleaned { from_http_1_0: true, ..plain }),
            ("GET", Version::HTTP_11, "trailers", Cleaned { wants_trailers: true, ..plain }),
        ] {
            let mut head = head(method, "/", &[("te", te.as_bytes())]);
            head.version = version;
            assert_eq!(clean_request(&mut head, &bodyless(), &upstream()), expected, "{method} {version:?}");
        }
    }

    #[test]
    fn a40_a57_http_1_0_leaves_as_http_1_1_without_its_expectation() {
        let mut head = head("POST", "/", &[("expect", b"100-continue")]);
        head.version = Version::HTTP_10;
        clean_request(&mut head, &bodyless(), &upstream());
        assert_eq!((head.version, head.headers.get(EXPECT)), (Version::HTTP_11, None));
    }

    /// Names of all kinds that matter here.
    fn name() -> impl Strategy<Value = String> {
        let known = select(vec![
            "connection",
            "keep-alive",
            "te",
            "trailer",
            "upgrade",
            "proxy-authorization",
            "authorization",
            "authorization_",
            "x_api_password",
            "x-api-email",
            "content-length",
            "transfer-encoding",
            "host",
            "via",
            "x-a",
            "x-b",
            "accept",
        ]);
        prop_oneof![4 => known.prop_map(str::to_owned), 1 => "[a-z_-]{1,30}"]
    }

    proptest! {
        /// A02, A05, B20: whatever comes, exactly one authorization leaves, ours, one host, and nothing of a hop; cleaning again only adds to `via`.
        #[test]
        fn a02_a05_b20_any_head_becomes_clean(
            fields in proptest::collection::vec((name(), prop_oneof![name(), "[ -~]{0,20}", Just("x-a, authorization, host,, via".to_owned())]), 0..20),
            length in proptest::option::of(0..10_u64),
        ) {
            let body = length.map_or_else(SizeHint::new, SizeHint::with_exact);
            let lines: Vec<_> = fields.iter().map(|(name, value)| (name.as_str(), value.as_bytes())).collect();
            let mut head = head("POST", "/x", &lines);
            let authorization = AuthorizationValue::new(&Token::new("ours".to_owned()).unwrap());
            clean_request(&mut head, &body, &upstream());
            authorize(&mut head.headers, &authorization);
            prop_assert_eq!(head.headers.get_all(AUTHORIZATION).iter().collect::<Vec<_>>(), ["ours"]);
            prop_assert_eq!(head.headers.get_all(HOST).iter().collect::<Vec<_>>(), ["api.upsolver.com"]);
            prop_assert!(head.headers.get(TE).is_none_or(|te| te == "trailers"));
            let framing = head.headers.get_all(CONTENT_LENGTH).iter().chain(head.headers.get_all(TRANSFER_ENCODING)).count();
            prop_assert!(framing == usize::from(length.is_none_or(|length| length > 0)) || length == Some(0) && framing == 1);
            for name in head.headers.keys().map(HeaderName::as_str) {
                prop_assert!(matches!(name, "transfer-encoding" | "te") || !is_hop_by_hop(name), "{name}");
                prop_assert!(name == "authorization" || !is_reserved(name) && !is_reserved_twin(name), "{name}");
            }
            let mut again = head.clone();
            clean_request(&mut again, &body, &upstream());
            authorize(&mut again.headers, &authorization);
            again.headers.remove(VIA);
            head.headers.remove(VIA);
            prop_assert_eq!(again.headers, head.headers);
        }
    }
}
