//! Who may ask for what: minting paths, pages in a browser, caller tokens, policy, addresses to listen at (B16 to B33).

use crate::support::proxy::{Builder, canary};
use crate::support::raw::RawUpstream;
use crate::support::wire::{OK, Wire};

fn request(method: &str, target: &str, fields: &str) -> String {
    format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n")
}

/// Spellings of `/api-tokens` that some upstream, or something in front of it, could take for that path.
const SPELLINGS: &[&str] = &[
    "/api-tokens",
    "/api-tokens/",
    "/api-tokens/some-id",
    "/api-tokens?",
    "/api-tokens?x=y",
    "/api-tokens/?x",
    "//api-tokens",
    "///api-tokens//",
    "/./api-tokens",
    "/x/../api-tokens",
    "/x/y/../../api-tokens",
    "/../api-tokens",
    "/../../api-tokens",
    "/api-tokens/.",
    "/api-tokens/x/..",
    "/api-tokens/./",
    "/%61pi-tokens",
    "/api%2Dtokens",
    "/api%2dtokens",
    "/%61%70%69%2d%74%6f%6b%65%6e%73",
    "/%41PI-TOKENS",
    "/api-tokens%2f",
    "/api-tokens%2Fx",
    "/%2fapi-tokens",
    "/x%2f..%2fapi-tokens",
    "/x%2f%2e%2e%2fapi-tokens",
    "/%2e%2e/api-tokens",
    "/x/%2e%2e/api-tokens",
    "/x/.%2e/api-tokens",
    "/%2e/api-tokens",
    "/x/%252e%252e/api-tokens",
    "/%2561pi-tokens",
    "/%252561pi-tokens",
    "/api%252Dtokens",
    "/api%25252Dtokens",
    "/api-tokens%00",
    "/api-tokens%00/x",
    "/api-tokens%2500",
    "/api-tokens%20",
    "/api-tokens%09",
    "/api-tokens;x=1",
    "/api-tokens;",
    "/api-tokens;x/id",
    "/;x/api-tokens",
    "/x;y/../api-tokens",
    "/..;/api-tokens",
    "/x/..;/api-tokens",
    "/x/..;a=b/api-tokens",
    "/api-tokens%3bx",
    "/API-TOKENS",
    "/Api-Tokens/",
    "/aPi-ToKeNs",
    "/\\api-tokens",
    "/\\/api-tokens",
    "/x\\..\\api-tokens",
    "/x/..\\api-tokens",
    "/api-tokens\\",
    "/%5capi-tokens",
    "/x%5c..%5capi-tokens",
    "/api-tokens%5c",
    "/%255capi-tokens",
    "\\api-tokens",
    "/api-tokens#",
    "/api-tokens#x",
    "/x/../api-tokens#y",
    "/api-tokens%23",
    "/api-tokens%3f",
];

#[test]
fn b16_b18_no_spelling_of_the_minting_path_gets_through() {
    let wire = Wire::start();
    for spelling in SPELLINGS {
        for method in ["POST", "GET"] {
            let answer = wire.refused(request(method, spelling, "Content-Length: 0\r\n"));
            match answer.status() {
                405 => assert_eq!(answer.code(), "minting_denied", "{spelling}"),
                status => assert_eq!(status, 400, "{spelling}: {answer:?}"),
            }
        }
        if spelling.starts_with('/') {
            let absolute = format!("http://localhost{spelling}");
            assert!(matches!(wire.refused(request("POST", &absolute, "Content-Length: 0\r\n")).status(), 400 | 405), "{absolute}");
        }
    }
    for method in ["DELETE", "PUT", "PATCH", "HEAD", "OPTIONS", "post", "MINT"] {
        assert_eq!(wire.refused(request(method, "/api-tokens/", "")).status(), 405, "{method}");
    }
}

/// Counted and logged, so that an operator sees who tries.
#[test]
fn b18_a_denied_mint_is_counted_and_logged() {
    let wire = Wire::start();
    assert_eq!(wire.proxy.metric("upsolver_auth_proxy_errors_total{code=\"minting_denied\"}"), 0.0);
    let answer = wire.refused(request("POST", "/api-tokens/", "Content-Length: 2\r\n") + "{}");
    assert_eq!((answer.status(), answer.code().as_str()), (405, "minting_denied"));
    assert!(answer.headers.iter().any(|(name, _)| name == "allow"), "{answer:?}");
    wire.proxy.wait_until("the count", |proxy| proxy.metric("upsolver_auth_proxy_errors_total{code=\"minting_denied\"}") == 1.0);
    wire.proxy.wait_for_log("minting_denied");
}

#[test]
fn b16_other_paths_are_not_minting() {
    let wire = Wire::start();
    for target in [
        "/api-tokensx",
        "/api-token",
        "/inputs/api-tokens-list",
        "/x/api-tokens",
        "/?path=/api-tokens",
        "/x?../api-tokens",
        "/api_tokens",
        "/api-tokens-old/",
        "/query",
        "/a%20b/%C3%A9",
    ] {
        assert_eq!(wire.forwarded(request("GET", target, "")).start, format!("GET {target} HTTP/1.1"));
    }
}

#[test]
fn b18_minting_through_the_proxy_is_opt_in() {
    let wire = Wire::set(&["policy.allow_minting=true"]);
    let forwarded = wire.forwarded(request("POST", "/api-tokens/", "X-Api-Email: a\r\nX-Api-Password: b\r\nContent-Length: 2\r\n") + "{}");
    assert_eq!(forwarded.start, "POST /api-tokens/ HTTP/1.1");
    assert_eq!((forwarded.header("x-api-email"), forwarded.header("x-api-password")), (None, None));
}

#[test]
fn b28_b29_b30_pages_in_a_browser_are_refused() {
    let wire = Wire::start();
    let port = wire.proxy.address.port();
    for fields in [
        "Origin: https://evil.example\r\n".to_owned(),
        "Origin: null\r\n".to_owned(),
        "Origin: http://localhost.evil.example\r\n".to_owned(),
        format!("Origin: http://localhost:{}\r\n", port ^ 1),
        "Origin: http://localhost\r\nOrigin: https://evil.example\r\n".to_owned(),
        "Origin: file://\r\n".to_owned(),
        "Origin: http://user@localhost\r\n".to_owned(),
        "Origin: chrome-extension://abcdef\r\n".to_owned(),
        "Origin:\r\n".to_owned(),
        "Sec-Fetch-Site: cross-site\r\n".to_owned(),
        "Sec-Fetch-Site: same-site\r\n".to_owned(),
        "Sec-Fetch-Site: Cross-Site\r\n".to_owned(),
        "Sec-Fetch-Site: none\r\nSec-Fetch-Site: cross-site\r\n".to_owned(),
        "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\nSec-Fetch-Dest: image\r\n".to_owned(),
        "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\n".to_owned(),
        "Origin: https://evil.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            .to_owned(),
        "Origin: https://evil.example\r\nAccept: text/event-stream\r\n".to_owned(),
    ] {
        for method in ["GET", "POST", "HEAD", "DELETE"] {
            let answer = wire.refused(request(method, "/inputs/", &format!("{fields}Content-Length: 0\r\n")));
            assert_eq!(answer.status(), 400, "{method} {fields}");
            if method != "HEAD" {
                assert_eq!(answer.code(), "cross_site_request", "{fields}");
            }
        }
    }
    for preflight in ["/inputs/", "*"] {
        let fields =
            "Origin: https://evil.example\r\nAccess-Control-Request-Method: POST\r\nAccess-Control-Request-Private-Network: true\r\n";
        assert_eq!(wire.refused(request("OPTIONS", preflight, fields)).code(), "cross_site_request");
    }
}

#[test]
fn b28_what_is_no_cross_site_request_passes() {
    let wire = Wire::start();
    let port = wire.proxy.address.port();
    for fields in [
        String::new(),
        "Origin: http://localhost\r\n".to_owned(),
        format!("Origin: http://localhost:{port}\r\n"),
        format!("Origin: http://127.0.0.1:{port}\r\n"),
        "Sec-Fetch-Site: same-origin\r\n".to_owned(),
        "Sec-Fetch-Site: none\r\n".to_owned(),
    ] {
        wire.forwarded(request("GET", "/inputs/", &fields));
    }
}

#[test]
fn b31_a_caller_token_is_demanded_where_one_is_configured() {
    let secret = canary("caller");
    let wire = Wire::with(|builder| {
        let file = builder.file("caller", format!("{secret}\n"));
        builder.set(format!("listen.caller_token_file={}", file.display())).secret(&secret)
    });
    let field = |value: &str| format!("X-Upsolver-Auth-Proxy-Token: {value}\r\n");
    for fields in [
        String::new(),
        field(""),
        field("wrong"),
        field(&secret[1..]),
        field(&format!("{secret}x")),
        field(&secret.to_uppercase()),
        field(&secret) + &field(&secret),
        field(&secret) + &field("wrong"),
        format!("X_Upsolver_Auth_Proxy_Token: {secret}\r\n"),
        format!("Authorization: {secret}\r\n"),
    ] {
        let answer = wire.refused(request("GET", "/inputs/", &fields));
        assert_eq!((answer.status(), answer.code().as_str()), (400, "caller_token_required"), "{}", fields.replace(&secret, "…"));
    }
    let forwarded = wire.forwarded(request("GET", "/inputs/", &field(&secret)));
    assert!(!String::from_utf8_lossy(&forwarded.head).contains(&secret), "the caller's token left");
}

#[test]
fn policy_rules_decide_in_order() {
    let wire = Wire::set(&[
        "policy.rules=[{ action = \"allow\", methods = [\"GET\"], path = \"/inputs/**\" }, { action = \"deny\", path = \"/inputs/**\" }, { action = \"deny\", methods = [\"DELETE\"], path = \"/**\" }]",
    ]);
    wire.forwarded(request("GET", "/inputs/a/b", ""));
    wire.forwarded(request("POST", "/query", "Content-Length: 0\r\n"));
    for (method, target) in
        [("POST", "/inputs/a"), ("DELETE", "/inputs/a"), ("DELETE", "/query"), ("POST", "//inputs/a"), ("POST", "/%69nputs/a")]
    {
        let answer = wire.refused(request(method, target, "Content-Length: 0\r\n"));
        assert_eq!((answer.status(), answer.code().as_str()), (405, "policy_denied"), "{method} {target}");
        assert!(answer.headers.iter().any(|(name, _)| name == "allow"), "{answer:?}");
    }
    // What cannot be decided is not guessed.
    for target in ["/x/../inputs/a", "/inputs%2fa", "/x/%2e%2e/inputs/a", "/inputs\\a", "/inputs%5ca", "/inputs%00", "/%2569nputs/a"] {
        let answer = wire.refused(request("POST", target, "Content-Length: 0\r\n"));
        assert_eq!((answer.status(), answer.code().as_str()), (400, "bad_request"), "{target}");
    }
    wire.proxy
        .wait_until("the count", |proxy| proxy.metric("upsolver_auth_proxy_policy_denials_total{rule=\"1\",dry_run=\"false\"}") >= 2.0);
}

#[test]
fn a_policy_in_dry_run_denies_nothing_and_counts() {
    let wire = Wire::set(&["policy.dry_run=true", "policy.default=deny"]);
    wire.forwarded(request("DELETE", "/inputs/a", ""));
    let page = wire.proxy.ask_admin("GET", "/metrics").text();
    let counted = page.lines().any(|line| {
        line.starts_with("upsolver_auth_proxy_policy_denials_total{") && line.contains("dry_run=\"true\"") && line.ends_with(" 1")
    });
    assert!(counted, "{page}");
}

#[test]
fn b33_an_address_that_others_can_reach_is_refused() {
    for address in ["0.0.0.0:0", "[::]:0", "10.0.0.1:0", "192.168.1.1:8080"] {
        let upstream = RawUpstream::start();
        let (status, text) = Builder::to_raw(&upstream, &canary("token")).set(format!("listen.address={address}")).run_to_end();
        assert_eq!(status.code(), Some(2), "{address}: {text}");
        assert!(text.contains("listen.address") && text.contains("allow_non_loopback"), "{address}: {text}");
    }
}

#[test]
fn b33_with_the_flag_callers_have_to_prove_themselves() {
    let secret = canary("caller");
    let wire = Wire::with(|builder| {
        let file = builder.file("caller", &secret);
        builder
            .set("listen.address=0.0.0.0:0")
            .set("listen.allow_non_loopback=true")
            .set(format!("listen.caller_token_file={}", file.display()))
            .secret(&secret)
    });
    let port = wire.proxy.address.port();
    let mut downstream = crate::support::raw::Raw::connect(([127, 0, 0, 1], port).into());
    downstream.send(request("GET", "/x", ""));
    assert_eq!(downstream.read_response(false).expect("an answer").code(), "caller_token_required");
    downstream.send(request("GET", "/x", &format!("x-upsolver-auth-proxy-token: {secret}\r\n")));
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    upstream.send(OK);
    assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
}
