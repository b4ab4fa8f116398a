//! From the upstream's head to the one that goes downstream (contract section 4, "Relay").

use http::header::{CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderValue, LOCATION};
use http::{StatusCode, Version, response};
use hyper::ext::ReasonPhrase;

use super::request::Cleaned;
use super::{Upstream, is_hop_by_hop, remove_nominated, remove_where};
use crate::config::Origin;
use crate::proxy::error::{Error, Reason};
use crate::proxy::guard::{Admitted, split_authority};
use crate::secret::AuthorizationValue;
use crate::upstream::http1::{self, Framing};

/// Makes an upstream's head into the one that goes downstream. Fails where its framing contradicts itself or it switches protocols unasked.
///
/// `content-length` goes wherever there is a body: hyper's server would believe it more than the body and cut that at its end, and sets it by itself. It
/// stays in the answer to a HEAD (RFC 9110 section 8.6), where the body must be an ended one, as the upstream's connection delivers it. A 304 and a 204 get none.
pub fn clean_response(
    head: &mut response::Parts,
    admitted: &Admitted,
    request: Cleaned,
    upstream: &Upstream,
    authorization: &AuthorizationValue,
) -> Result<(), Error> {
    if head.status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Error::UpstreamProtocol(Reason::new("it switched protocols unasked (101)", "http_protocol_error")));
    }
    let headers = &mut head.headers;
    let framing = http1::framing(headers).map_err(|reason| Error::UpstreamProtocol(Reason::new(reason, "http_protocol_error")))?;

    remove_nominated(headers);
    remove_where(headers, |name| {
        (is_hop_by_hop(name) && !(request.wants_trailers && name == "trailer")) || is_misleading(name) || name == "content-length"
    });
    remove_token(headers, authorization);

    let may_have_body = !matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    match framing {
        Framing::Length(length) if may_have_body && request.to_head => {
            headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
        Framing::Chunked | Framing::None if may_have_body && !request.to_head && request.from_http_1_0 => {
            // HTTP/1.0 knows no chunks, so that the end of the connection ends this body; hyper would promise to keep it (RFC 9112 section 9.3).
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        Framing::Length(_) | Framing::Chunked | Framing::None => {}
    }
    rewrite_location(headers, admitted, &upstream.origin);
    // The reason phrase is the upstream's, unless it has the token in it; anything else in there is hyper's own matter with that connection.
    let reason = head.extensions.remove::<ReasonPhrase>();
    head.extensions.clear();
    if let Some(reason) = reason
        && !authorization.is_in(reason.as_bytes())
    {
        head.extensions.insert(reason);
    }
    head.version = Version::HTTP_11;
    Ok(())
}

/// Trailer fields may carry neither framing nor anything of a hop, nor credentials (RFC 9110 section 6.5.1).
pub fn clean_trailers(trailers: &mut HeaderMap, authorization: &AuthorizationValue) {
    remove_where(trailers, |name| {
        is_hop_by_hop(name)
            || is_misleading(name)
            || matches!(name, "content-length" | "host" | "authorization" | "location" | "set-cookie")
    });
    remove_token(trailers, authorization);
}

/// Fields that speak about the upstream's origin, which is not the one that the downstream sees: CORS permissions (no page may get at this proxy, matrix
/// B29) and alternative services (which would lead around it).
fn is_misleading(name: &str) -> bool {
    name.starts_with("access-control-") || name == "alt-svc"
}

/// B25: a response field that contains the token would hand it to the downstream. Others of its name stay: an app needs its other cookies.
fn remove_token(headers: &mut HeaderMap, authorization: &AuthorizationValue) {
    while let Some(name) = headers.iter().find(|(_, value)| authorization.is_in(value.as_bytes())).map(|(name, _)| name.clone()) {
        tracing::warn!(field = %name, "the upstream's response contains the token; the field is dropped");
        let others: Vec<_> = headers.get_all(&name).iter().filter(|value| !authorization.is_in(value.as_bytes())).cloned().collect();
        headers.remove(&name);
        for value in others {
            headers.append(name.clone(), value);
        }
    }
}

/// A `location` at the upstream's origin gets the origin that the downstream used; otherwise a redirect would lead the downstream, and its dummy token,
/// around the proxy (matrix B24). What follows the authority stays as it is.
fn rewrite_location(headers: &mut HeaderMap, admitted: &Admitted, upstream: &Origin) {
    let Some(rest) = headers.get(LOCATION).and_then(|location| at_origin(location.as_bytes(), upstream)) else { return };
    let rewritten = [admitted.scheme().as_bytes(), b"://", admitted.authority(), rest].concat();
    headers.insert(LOCATION, HeaderValue::from_bytes(&rewritten).expect("parts of legal field values"));
}

/// What follows the authority of an absolute or scheme-relative reference, if that authority is the origin's. User information makes it another.
fn at_origin<'a>(location: &'a [u8], origin: &Origin) -> Option<&'a [u8]> {
    let relative = match location.split_at_checked(origin.scheme().len()) {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case(origin.scheme().as_bytes()) => rest.strip_prefix(b":")?,
        _ => location,
    };
    let after_scheme = relative.strip_prefix(b"//")?;
    // A backslash ends the authority for browsers alone; here it makes it malformed.
    let end = after_scheme.iter().position(|byte| matches!(byte, b'/' | b'?' | b'#')).unwrap_or(after_scheme.len());
    let (authority, rest) = after_scheme.split_at(end);
    let (host, port) = split_authority(authority)?;
    let host = host.strip_prefix(b"[").and_then(|host| host.strip_suffix(b"]")).unwrap_or(host);
    let same = host.eq_ignore_ascii_case(origin.host.as_bytes()) && port.unwrap_or(origin.default_port()) == origin.port;
    same.then_some(rest)
}

#[cfg(test)]
mod tests {
    use http::{HeaderName, Request, Response};
    use http_body::SizeHint;

    use super::*;
    use crate::config::Config;
    use crate::proxy::guard::{Guard, Verdict};
    use crate::proxy::headers::clean_request;
    use crate::secret::Token;

    type Lines<'a> = &'a [(&'a str, &'a str)];

    const GET: Cleaned = Cleaned { wants_trailers: false, to_head: false, from_http_1_0: false };
    const HEAD: Cleaned = Cleaned { to_head: true, ..GET };

    fn authorization() -> AuthorizationValue {
        AuthorizationValue::new(&Token::new("canary-token".to_owned()).unwrap())
    }

    /// The upstream and how a request with this target and `Host` was admitted.
    fn admitted(upstream: &str, target: &str, host: &str) -> (Upstream, Admitted) {
        let config = Config::from_toml(&format!("credentials.token_file = \"/token\"\nupstream.url = \"{upstream}\"")).unwrap();
        let guard = Guard::new(&config, &[8080], None);
        let mut head = Request::builder().uri(target).header("host", host).body(()).unwrap().into_parts().0;
        let Ok(Verdict::Forward(admitted)) = guard.check(&head) else { panic!("{target} is refused") };
        clean_request(&mut head, &SizeHint::with_exact(0), guard.upstream());
        (guard.upstream().clone(), admitted)
    }

    fn clean(status: u16, request: Cleaned, lines: Lines) -> Result<HeaderMap, Error> {
        let mut response = Response::builder().status(status);
        for (name, value) in lines {
            response = response.header(*name, *value);
        }
        let mut head = response.body(()).unwrap().into_parts().0;
        let (upstream, admitted) = admitted("https://api.upsolver.com", "/x", "localhost:8080");
        clean_response(&mut head, &admitted, request, &upstream, &authorization())?;
        Ok(head.headers)
    }

    fn lines(headers: &HeaderMap) -> Vec<String> {
        headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect()
    }

    #[test]
    fn what_ends_here_goes_and_everything_else_stays() {
        let rows: &[(Lines, &[&str])] = &[
            // A06
            (
                &[
                    ("connection", "close, X-Bar"),
                    ("x-bar", "1"),
                    ("keep-alive", "1"),
                    ("proxy-connection", "1"),
                    ("upgrade", "h2c"),
                    ("x-kept", "1"),
                ],
                &["x-kept: 1"],
            ),
            (&[("trailer", "x-sum"), ("te", "x"), ("proxy-authenticate", "x"), ("transfer-encoding", "chunked")], &[]),
            // A08, A49
            (
                &[
                    ("x-r", "2"),
                    ("set-cookie", "a"),
                    ("x-r", "1"),
                    ("set-cookie", "b"),
                    ("www-authenticate", "x"),
                    ("strict-transport-security", "x"),
                ],
                &["x-r: 2", "x-r: 1", "set-cookie: a", "set-cookie: b", "www-authenticate: x", "strict-transport-security: x"],
            ),
            // B25
            (
                &[("x-echo", "authorization=canary-token;"), ("set-cookie", "a"), ("set-cookie", "t=canary-token"), ("x-kept", "canary")],
                &["x-kept: canary", "set-cookie: a"],
            ),
            // B29, D39
            (&[("access-control-allow-origin", "*"), ("access-control-allow-private-network", "true"), ("alt-svc", "h3=\":443\"")], &[]),
        ];
        for (upstream, expected) in rows {
            assert_eq!(lines(&clean(200, GET, upstream).unwrap()), *expected, "{upstream:?}");
        }
    }

    /// A08: a reason phrase of the upstream's own goes through.
    #[test]
    fn a08_the_reason_phrase_is_kept_and_no_other_extension() {
        let (upstream, admitted) = admitted("https://api.upsolver.com", "/x", "localhost");
        let mut head =
            Response::builder().extension(ReasonPhrase::from_static(b"Quite All Right")).extension(1_u8).body(()).unwrap().into_parts().0;
        clean_response(&mut head, &admitted, GET, &upstream, &authorization()).unwrap();
        assert_eq!(head.extensions.get::<ReasonPhrase>().map(ReasonPhrase::as_bytes), Some(&b"Quite All Right"[..]));
        assert_eq!(head.extensions.len(), 1);
    }

    /// B25: no way back for the token, this one included.
    #[test]
    fn b25_a_reason_phrase_with_the_token_is_dropped() {
        let (upstream, admitted) = admitted("https://api.upsolver.com", "/x", "localhost");
        let echo = ReasonPhrase::try_from(["no ".as_bytes(), authorization().header().as_bytes()].concat()).unwrap();
        let mut head = Response::builder().extension(echo).body(()).unwrap().into_parts().0;
        clean_response(&mut head, &admitted, GET, &upstream, &authorization()).unwrap();
        assert_eq!(head.extensions.get::<ReasonPhrase>(), None);
    }

    #[test]
    fn a34_the_announcement_of_trailers_stays_for_those_who_want_them() {
        let wanting = Cleaned { wants_trailers: true, ..GET };
        assert_eq!(lines(&clean(200, wanting, &[("trailer", "x-sum")]).unwrap()), ["trailer: x-sum"]);
    }

    #[test]
    fn a41_a42_only_the_answer_to_a_head_keeps_its_length() {
        let rows = [
            (200, GET, "5", None),
            (200, HEAD, "1234", Some("1234")),
            (200, HEAD, "0", Some("0")),
            (204, GET, "0", None),
            (204, HEAD, "0", None),
            (205, GET, "0", None),
            (304, GET, "1234", None),
            (304, HEAD, "1234", None),
        ];
        for (status, request, length, expected) in rows {
            let headers = clean(status, request, &[("content-length", length)]).unwrap();
            assert_eq!(headers.get(CONTENT_LENGTH).map(|length| length.to_str().unwrap()), expected, "{status} {request:?}");
        }
        assert!(clean(200, HEAD, &[("transfer-encoding", "chunked")]).unwrap().is_empty());
        // Said twice, told once.
        assert_eq!(lines(&clean(200, HEAD, &[("content-length", "5"), ("content-length", "5")]).unwrap()), ["content-length: 5"]);
    }

    #[test]
    fn a48_a_body_of_unknown_length_ends_the_connection_of_http_1_0() {
        let old = Cleaned { from_http_1_0: true, ..GET };
        let old_head = Cleaned { to_head: true, ..old };
        let rows: [(u16, Cleaned, Lines, &[&str]); 6] = [
            (200, old, &[("transfer-encoding", "chunked")], &["connection: close"]),
            (200, old, &[], &["connection: close"]),
            (200, old, &[("content-length", "5")], &[]),
            (200, old_head, &[], &[]),
            (304, old, &[], &[]),
            (200, GET, &[("transfer-encoding", "chunked")], &[]),
        ];
        for (status, request, upstream, expected) in rows {
            assert_eq!(lines(&clean(status, request, upstream).unwrap()), *expected, "{status} {request:?} {upstream:?}");
        }
    }

    #[test]
    fn a44_a60_contradictory_framing_is_an_error() {
        let rows: &[Lines] = &[
            &[("content-length", "5"), ("transfer-encoding", "chunked")],
            &[("transfer-encoding", "chunked"), ("content-length", "5")],
            &[("content-length", "5"), ("content-length", "6")],
            &[("content-length", "5, 5")],
            &[("content-length", "+5")],
            &[("content-length", "-5")],
            &[("content-length", "0x5")],
            &[("content-length", "")],
            &[("content-length", "99999999999999999999")],
            &[("transfer-encoding", "gzip")],
            &[("transfer-encoding", "gzip, chunked")],
            &[("transfer-encoding", "chunked, chunked")],
            &[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")],
            &[("transfer-encoding", "xchunked")],
        ];
        for upstream in rows {
            for request in [GET, HEAD] {
                assert!(matches!(clean(200, request, upstream), Err(Error::UpstreamProtocol(_))), "{upstream:?}");
            }
        }
    }

    #[test]
    fn a22_an_unasked_switch_of_protocols_is_an_error() {
        assert!(matches!(clean(101, GET, &[("upgrade", "websocket")]), Err(Error::UpstreamProtocol(_))));
    }

    #[test]
    fn b24_a_location_at_the_upstream_leads_to_the_proxy() {
        let rows = [
            ("https://api.upsolver.com", "/x", "localhost:8080", "https://api.upsolver.com/a/b?c=d#e", "http://localhost:8080/a/b?c=d#e"),
            ("https://api.upsolver.com", "/x", "[::1]", "HTTPS://API.upsolver.com:443/%2F//x/../y", "http://[::1]/%2F//x/../y"),
            ("https://api.upsolver.com", "/x", "localhost", "//api.upsolver.com?q", "http://localhost?q"),
            ("https://api.upsolver.com", "/x", "localhost", "https://api.upsolver.com", "http://localhost"),
            (
                "https://api.upsolver.com",
                "http://api.upsolver.com/x",
                "localhost",
                "https://api.upsolver.com/y",
                "http://api.upsolver.com/y",
            ),
            (
                "https://api.upsolver.com",
                "https://api.upsolver.com/x",
                "localhost",
                "https://api.upsolver.com/y",
                "https://api.upsolver.com/y",
            ),
            ("https://api.example:8443", "/x", "localhost", "https://api.example:8443/y", "http://localhost/y"),
            ("http://[::1]:9", "/x", "localhost", "http://[::1]:9/y", "http://localhost/y"),
        ];
        for (upstream, target, host, location, expected) in rows {
            let (upstream, admitted) = admitted(upstream, target, host);
            let mut headers = HeaderMap::from_iter([(LOCATION, HeaderValue::from_static(location))]);
            rewrite_location(&mut headers, &admitted, &upstream.origin);
            assert_eq!(headers[LOCATION], expected, "{location}");
        }
    }

    #[test]
    fn b23_b24_any_other_location_is_left_alone() {
        for location in [
            "",
            "/a/b",
            "a/b",
            "?q",
            "https",
            "https:",
            "https://",
            "https:/api.upsolver.com/",
            "https:api.upsolver.com",
            "https://evil.example/",
            "https://evil.api.upsolver.com/",
            "https://api.upsolver.com.evil.example/",
            "https://api.upsolver.com@evil.example/",
            "https://user@api.upsolver.com/",
            "https://api.upsolver.com\\@evil.example/",
            "https://api.upsolver.com:444/",
            "https://api.upsolver.com.:443/",
            "http://api.upsolver.com/",
            "https:\\\\api.upsolver.com/",
            "///api.upsolver.com/",
            "//evil.example/https://api.upsolver.com/",
            "mailto:a@b",
        ] {
            let headers = clean(302, GET, &[("location", location)]).unwrap();
            assert_eq!(headers[LOCATION], location);
        }
    }

    #[test]
    fn a34_b25_trailers_carry_neither_framing_nor_credentials() {
        let names =
            ["x-sum", "authorization", "content-length", "transfer-encoding", "connection", "trailer", "host", "set-cookie", "x-echo"];
        let mut trailers: HeaderMap = names.iter().map(|name| (HeaderName::from_static(name), HeaderValue::from_static("1"))).collect();
        trailers.insert("x-echo", HeaderValue::from_static("token: canary-token"));
        clean_trailers(&mut trailers, &authorization());
        assert_eq!(lines(&trailers), ["x-sum: 1"]);
    }
}
