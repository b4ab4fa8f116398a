//! After cleaning, no `location` leads a downstream around the proxy to the upstream, one that leads elsewhere is untouched, and the path survives.
#![no_main]

use http::{HeaderValue, Uri};
use http_body::SizeHint;
use libfuzzer_sys::fuzz_target;
use upsolver_auth_proxy::proxy::guard::Verdict;
use upsolver_auth_proxy::proxy::headers::{clean_request, clean_response};
use upsolver_auth_proxy_fuzz::{AUTHORIZATION, GUARD, TOKEN, UPSTREAM, request_head, response_head};

const OURS: &str = "http://localhost:8080";

fuzz_target!(|bytes: &[u8]| {
    let Ok(location) = HeaderValue::from_bytes(bytes) else { return };
    let mut request = request_head(b"GET /inputs/\nhost: localhost:8080").expect("a valid head");
    let Ok(Verdict::Forward(admitted)) = GUARD.check(&request) else { unreachable!("an admitted request") };
    let cleaned = clean_request(&mut request, &SizeHint::with_exact(0), GUARD.upstream());
    let mut head = response_head(b"302").expect("a valid head");
    head.headers.insert("location", location.clone());
    clean_response(&mut head, &admitted, cleaned, GUARD.upstream(), &AUTHORIZATION).expect("nothing else is wrong with it");
    let Some(after) = head.headers.get("location") else {
        assert!(bytes.windows(TOKEN.len()).any(|window| window == TOKEN.as_bytes()), "only a token makes it go");
        return;
    };
    // The http crate's own reading decides what leads to the upstream.
    let before = Uri::try_from(location.as_bytes()).ok().filter(|uri| uri.scheme_str() == Some("https"));
    let leads_to_upstream = before.as_ref().is_some_and(|uri| {
        let authority = uri.authority().expect("a URI with a scheme has an authority").as_str().to_ascii_lowercase();
        authority == UPSTREAM || authority == format!("{UPSTREAM}:443")
    });
    if leads_to_upstream {
        let uri = before.expect("it was read");
        assert!(after.as_bytes().starts_with(OURS.as_bytes()), "{location:?} became {after:?}");
        let rewritten = Uri::try_from(after.as_bytes()).expect("still a URI");
        assert_eq!((rewritten.path(), rewritten.query()), (uri.path(), uri.query()));
    } else if *after != location {
        // Scheme-relative, or an authority that the http crate refuses: then what follows it must be what followed it.
        let rest = after.as_bytes().strip_prefix(OURS.as_bytes()).expect("only ever rewritten to ours");
        assert!(location.as_bytes().ends_with(rest), "{location:?} became {after:?}");
        let cut = location.as_bytes()[..location.len() - rest.len()].to_ascii_lowercase();
        let authority = cut.strip_prefix(b"https:").unwrap_or(&cut).strip_prefix(b"//").expect("it had an authority");
        let (host, port) = authority.split_at(UPSTREAM.len());
        assert_eq!(host, UPSTREAM.as_bytes(), "only the upstream's own name is rewritten");
        let port = port.strip_prefix(b":").unwrap_or(b"443");
        assert_eq!(std::str::from_utf8(port).ok().and_then(|port| port.trim_start_matches('0').parse().ok()), Some(443));
    }
});
