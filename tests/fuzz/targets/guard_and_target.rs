//! Whatever the guard admits is meant for the upstream, by a plain reading of RFC 9110 and 9112, and is no spelling of the minting path.
#![no_main]

use http::{Method, request};
use http_body::SizeHint;
use libfuzzer_sys::fuzz_target;
use upsolver_auth_proxy::proxy::guard::Verdict;
use upsolver_auth_proxy::proxy::headers::clean_request;
use upsolver_auth_proxy_fuzz::{GUARD, UPSTREAM, request_head};

fuzz_target!(|bytes: &[u8]| {
    let Some(mut head) = request_head(bytes) else { return };
    let Ok(Verdict::Forward(admitted)) = GUARD.check(&head) else { return };
    assert!(head.method != Method::CONNECT && head.method != Method::TRACE);
    assert!(is_allowed(admitted.authority()), "{:?}", admitted.authority().escape_ascii().to_string());
    assert_eq!(head.headers.get_all("host").iter().count(), 1);
    assert!(is_from_no_other_site(&head));
    let target = head.uri.path_and_query().expect("an admitted target has a path").clone();
    assert!(!is_minting(target.path()), "{target}");
    clean_request(&mut head, &SizeHint::with_exact(0), GUARD.upstream());
    assert_eq!((head.uri.scheme(), head.uri.authority()), (None, None));
    assert_eq!(head.uri.path_and_query(), Some(&target), "what is forwarded is what was judged");
    assert_eq!(head.headers.get_all("host").iter().collect::<Vec<_>>(), [UPSTREAM]);
});

fn is_allowed(authority: &[u8]) -> bool {
    let authority = authority.to_ascii_lowercase();
    let allowed = ["localhost", "127.0.0.1", "[::1]", UPSTREAM].into_iter().flat_map(|host| [host.to_owned(), format!("{host}:8080")]);
    allowed.chain([format!("{UPSTREAM}:443"), format!("{UPSTREAM}:80")]).any(|allowed| allowed.as_bytes() == authority)
}

fn is_from_no_other_site(head: &request::Parts) -> bool {
    let sites = head.headers.get_all("sec-fetch-site").iter();
    let mut origins = head.headers.get_all("origin").iter();
    sites.map(|site| site.as_bytes()).all(|site| !site.ends_with(b"cross-site") && !site.ends_with(b"same-site"))
        && origins.all(|origin| {
            origin.to_str().ok().and_then(|origin| origin.split_once("://")).is_some_and(|(_, host)| is_allowed(host.as_bytes()))
        })
}

/// Reads the path as servers do: decoded up to four times, with `;` parameters cut before or after decoding, repeated slashes and dot segments resolved.
fn is_minting(path: &str) -> bool {
    let mut decoded = path.as_bytes().to_vec();
    for _ in 0..4 {
        if resolves_to_minting(&decoded) || resolves_to_minting(&without_parameters(&decoded)) {
            return true;
        }
        let parameters_first = decode(&without_parameters(&decoded));
        if resolves_to_minting(&parameters_first) {
            return true;
        }
        decoded = decode(&decoded);
    }
    false
}

fn without_parameters(path: &[u8]) -> Vec<u8> {
    path.split(|byte| *byte == b'/')
        .map(|segment| segment.split(|byte| *byte == b';').next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join(&b'/')
}

fn decode(path: &[u8]) -> Vec<u8> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16).map(|digit| digit as u8);
    let mut decoded = Vec::new();
    let mut rest = path;
    while let [byte, after @ ..] = rest {
        rest = after;
        match (byte, after) {
            (b'%', [high, low, after @ ..]) if digit(high).is_some() && digit(low).is_some() => {
                decoded.push(digit(high).unwrap_or_default() << 4 | digit(low).unwrap_or_default());
                rest = after;
            }
            _ => decoded.push(*byte),
        }
    }
    decoded
}

fn resolves_to_minting(path: &[u8]) -> bool {
    let mut resolved: Vec<&[u8]> = Vec::new();
    for segment in path.split(|byte| matches!(byte, b'/' | b'\\')) {
        match segment {
            b"" | b"." => {}
            b".." => drop(resolved.pop()),
            name => resolved.push(name),
        }
    }
    resolved.first().is_some_and(|first| first.eq_ignore_ascii_case(b"api-tokens"))
}
