//! A cleaned request carries exactly one `authorization` and one `host`, ours; no field of a hop and no second framing; everything else, in order. Cleaning
//! is idempotent but for `via`. A cleaned response carries no field of a hop and no token.
#![no_main]

use http::{HeaderMap, request};
use http_body::SizeHint;
use libfuzzer_sys::fuzz_target;
use upsolver_auth_proxy::proxy::guard::Verdict;
use upsolver_auth_proxy::proxy::headers::{authorize, clean_request, clean_response, clean_trailers};
use upsolver_auth_proxy_fuzz::{AUTHORIZATION, GUARD, HOP_BY_HOP, TOKEN, UPSTREAM, request_head, response_head};

/// What a downstream may not send, and its twins with underscores (oauth2-proxy's CVE-2025-64484).
const RESERVED: [&str; 5] = ["authorization", "proxy-authorization", "x-api-email", "x-api-password", "x-upsolver-auth-proxy-token"];

// The first byte says of what length the body is; the head follows.
fuzz_target!(|bytes: &[u8]| {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let size = if first.is_ascii_digit() { SizeHint::with_exact(u64::from(first - b'0')) } else { SizeHint::new() };
    if let Some(head) = request_head(bytes) {
        clean_a_request(head, &size);
    }
    clean_a_response(bytes);
});

fn clean_a_request(original: request::Parts, size: &SizeHint) {
    let mut head = original.clone();
    clean_request(&mut head, size, GUARD.upstream());
    authorize(&mut head.headers, &AUTHORIZATION);
    let headers = &head.headers;

    assert_eq!(headers.get_all("authorization").iter().collect::<Vec<_>>(), [TOKEN]);
    assert_eq!(headers.get_all("host").iter().collect::<Vec<_>>(), [UPSTREAM]);
    assert_eq!(headers.get_all("via").iter().next_back().expect("a via"), "1.1 upsolver-auth-proxy");
    for name in headers.keys().map(|name| name.as_str()).filter(|name| *name != "authorization") {
        let dashed = name.replace('_', "-");
        assert!(!RESERVED.contains(&dashed.trim_matches('-')), "{name}");
        assert!(!HOP_BY_HOP.contains(&name) || name == "te", "{name}");
    }
    assert!(headers.get_all("te").iter().all(|te| te == "trailers") && headers.get_all("te").iter().count() <= 1);
    let lengths: Vec<_> = headers.get_all("content-length").iter().collect();
    let codings: Vec<_> = headers.get_all("transfer-encoding").iter().collect();
    match size.exact() {
        Some(length) => {
            assert!(codings.is_empty() && lengths.len() <= 1);
            assert!(lengths.first().map_or(length == 0, |written| **written == *length.to_string()));
        }
        None => assert!(lengths.is_empty() && codings == ["chunked"]),
    }

    let nominated = nominated(&original.headers);
    for name in original.headers.keys().filter(|name| passes(name.as_str()) && !nominated.contains(&name.as_str().to_owned())) {
        let values = |headers: &HeaderMap| headers.get_all(name).iter().cloned().collect::<Vec<_>>();
        assert_eq!(values(&original.headers), values(headers), "{name}");
    }

    let mut again = head.clone();
    clean_request(&mut again, size, GUARD.upstream());
    authorize(&mut again.headers, &AUTHORIZATION);
    assert_eq!(again.headers.get_all("via").iter().count(), headers.get_all("via").iter().count() + 1);
    for name in headers.keys().filter(|name| !matches!(name.as_str(), "via" | "max-forwards" | "te")) {
        assert!(headers.get_all(name).iter().eq(again.headers.get_all(name)), "{name}");
    }
}

/// Fields of which the proxy has no opinion.
fn passes(name: &str) -> bool {
    const OPINIONS: [&str; 9] = [
        "host",
        "via",
        "content-length",
        "transfer-encoding",
        "max-forwards",
        "expect",
        "x-http-method-override",
        "x-http-method",
        "x-method-override",
    ];
    let is_hop = HOP_BY_HOP.contains(&name) || name == "proxy-authentication-info";
    !is_hop && !name.contains('_') && !RESERVED.contains(&name) && !OPINIONS.contains(&name)
}

fn nominated(headers: &HeaderMap) -> Vec<String> {
    let lines = headers.get_all("connection").iter().map(|line| String::from_utf8_lossy(line.as_bytes()).into_owned());
    lines.flat_map(|line| line.split(',').map(|member| member.trim().to_ascii_lowercase()).collect::<Vec<_>>()).collect()
}

fn clean_a_response(bytes: &[u8]) {
    let Some(mut head) = response_head(bytes) else { return };
    let mut request = request_head(b"GET /inputs/\nhost: localhost:8080").expect("a valid head");
    let Ok(Verdict::Forward(admitted)) = GUARD.check(&request) else { unreachable!("an admitted request") };
    let cleaned = clean_request(&mut request, &SizeHint::with_exact(0), GUARD.upstream());
    let mut trailers = head.headers.clone();
    clean_trailers(&mut trailers, &AUTHORIZATION);
    check_response_fields(&trailers);
    let codings = head.headers.get_all("transfer-encoding").iter().count();
    let lengths = head.headers.get_all("content-length").iter().count();
    if clean_response(&mut head, &admitted, cleaned, GUARD.upstream(), &AUTHORIZATION).is_ok() {
        assert!(codings <= 1 && (codings == 0 || lengths == 0), "contradicting framing is refused");
        check_response_fields(&head.headers);
    }
}

fn check_response_fields(headers: &HeaderMap) {
    for (name, value) in headers {
        assert!(!HOP_BY_HOP.contains(&name.as_str()) && name != "transfer-encoding" && name != "content-length", "{name}");
        assert!(!name.as_str().starts_with("access-control-"), "{name}");
        assert!(!value.as_bytes().windows(TOKEN.len()).any(|window| window == TOKEN.as_bytes()), "{name} holds the token");
    }
}
