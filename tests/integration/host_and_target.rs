//! Whom a request is for: `Host`, the forms of a request target (RFC 9112 section 3.2), and methods that mean the proxy itself.

use crate::support::wire::{OK, Wire};

fn request(start: &str, host_lines: &str) -> String {
    format!("{start} HTTP/1.1\r\n{host_lines}\r\n")
}

#[test]
fn a10_a_request_that_passed_this_proxy_is_a_loop() {
    let wire = Wire::start();
    for via in [
        "Via: 1.1 upsolver-auth-proxy",
        "Via: 1.0 fred, 1.1 upsolver-auth-proxy, 1.1 other",
        "Via: 1.0 fred\r\nVia: HTTP/1.1 UPSOLVER-AUTH-PROXY (comment)",
    ] {
        let answer = wire.refused(request("GET /x", &format!("Host: localhost\r\n{via}\r\n")));
        assert_eq!((answer.status(), answer.code().as_str()), (508, "loop_detected"), "{via}");
    }
    // A name that only contains ours is somebody else.
    wire.forwarded(request("GET /x", "Host: localhost\r\nVia: 1.1 my-upsolver-auth-proxy, 1.1 upsolver-auth-proxy-2\r\n"));
}

/// A proxy that is its own upstream: one 508 comes back, nothing circles.
#[test]
fn a10_a_proxy_in_front_of_itself_answers_508() {
    let inner = Wire::start();
    let outer = crate::support::proxy::Builder::new()
        .set(format!("upstream.url=http://{}", inner.proxy.address))
        .env("UPSOLVER_TOKEN_FILE", inner.proxy.directory().join("token").to_str().expect("UTF-8"))
        .start();
    let answer = outer.get("/x");
    assert_eq!((answer.status(), answer.code().as_str()), (508, "loop_detected"));
    assert!(inner.upstream.saw_nothing());
}

#[test]
fn a11_a_request_without_host_is_refused() {
    let wire = Wire::start();
    for head in ["GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\nX-Host: localhost\r\n\r\n"] {
        let answer = wire.refused(head);
        assert_eq!((answer.status(), answer.code().as_str()), (400, "bad_request"), "{head:?}");
    }
}

#[test]
fn a12_a_repeated_or_invalid_host_is_refused() {
    let wire = Wire::start();
    for host in [
        "Host: localhost\r\nHost: localhost",
        "Host: localhost\r\nHost: evil.example",
        "Host: localhost, localhost",
        "Host: localhost,evil.example",
        "Host: local host",
        "Host: user@localhost",
        "Host: localhost/",
        "Host: localhost/x",
        "Host: localhost?x",
        "Host: localhost#x",
        "Host: http://localhost",
        "Host: localhost:",
        "Host: localhost:x",
        "Host: localhost:-1",
        "Host: localhost:+80",
        "Host: localhost:99999",
        "Host: localhost:80:80",
        "Host: [::1",
        "Host: ::1",
        "Host: [::1]x",
        "Host: [::g]",
        "Host: [localhost]",
        "Host: localhost\\evil",
        "Host: loc\u{e9}alhost",
        "Host: \"localhost\"",
        "Host:",
        "Host: :8080",
    ] {
        let answer = wire.refused(request("GET /", &format!("{host}\r\n")));
        // An empty port is legal (RFC 3986 section 3.2.3) and so is an empty host, but neither is one of the allowed names.
        let allowed: &[u16] = if matches!(host, "Host: localhost:" | "Host:") { &[400, 421] } else { &[400] };
        assert!(allowed.contains(&answer.status()), "{host}: {answer:?}");
        answer.code();
    }
}

#[test]
fn a13_the_upstream_is_the_configured_one_whatever_the_downstream_says() {
    let wire = Wire::start();
    let port = wire.proxy.address.port();
    for target in [
        request("GET /x", "Host: LOCALHOST\r\n"),
        request("GET /x", &format!("Host: 127.0.0.1:{port}\r\n")),
        request(&format!("GET http://{}/x", wire.upstream.address()), "Host: localhost\r\n"),
        request(&format!("GET http://localhost:{port}/x"), "Host: evil.example\r\n"),
    ] {
        // `forwarded` checks the authority.
        assert_eq!(wire.forwarded(target).start, "GET /x HTTP/1.1");
    }
}

#[test]
fn a14_an_app_may_use_the_proxy_as_its_http_proxy() {
    let wire = Wire::start();
    let upstream = wire.upstream.address();
    for (target, expected) in [
        (format!("http://{upstream}/x?a=b"), "GET /x?a=b HTTP/1.1"),
        (format!("http://{upstream}"), "GET / HTTP/1.1"),
        (format!("http://{upstream}?q"), "GET /?q HTTP/1.1"),
        (format!("HTTP://{upstream}//x/%2F"), "GET //x/%2F HTTP/1.1"),
        (format!("https://{upstream}/x"), "GET /x HTTP/1.1"),
    ] {
        let forwarded = wire.forwarded(request(&format!("GET {target}"), &format!("Host: {upstream}\r\nProxy-Connection: keep-alive\r\n")));
        assert_eq!(forwarded.start, expected);
        assert!(!String::from_utf8_lossy(&forwarded.head).contains("proxy-connection"));
    }
}

#[test]
fn a15_b26_an_authority_that_is_not_allowed_is_misdirected() {
    let wire = Wire::start();
    for (target, host) in [
        ("http://evil.example/x", "localhost"),
        ("https://169.254.169.254/latest", "localhost"),
        ("http://localhost.evil.example/", "localhost"),
        ("http://evil.example:80/", "evil.example"),
        ("/x", "evil.example"),
        ("/x", "evil.example:8080"),
        ("/x", "169.254.169.254"),
    ] {
        let answer = wire.refused(request(&format!("GET {target}"), &format!("Host: {host}\r\n")));
        assert_eq!((answer.status(), answer.code().as_str()), (421, "misdirected_request"), "{target} {host}");
    }
    for target in ["http://user@localhost/", "http://user:pass@localhost/", "ftp://localhost/", "http:///x", "localhost/x"] {
        let answer = wire.refused(request(&format!("GET {target}"), "Host: localhost\r\n"));
        assert!(matches!(answer.status(), 400 | 421), "{target}: {answer:?}");
    }
}

#[test]
fn a16_targets_that_are_none_are_refused() {
    let wire = Wire::start();
    for line in [
        "GET * HTTP/1.1",
        "GET localhost:443 HTTP/1.1",
        "OPTIONS */x HTTP/1.1",
        "OPTIONS *?x HTTP/1.1",
        "GET  HTTP/1.1",
        "GET HTTP/1.1",
        "GET /a b HTTP/1.1",
        "GET /a\tb HTTP/1.1",
        "GET\t/ HTTP/1.1",
        "GET /a\u{1}b HTTP/1.1",
        "GET /a\u{7f}b HTTP/1.1",
        "GET /a\0b HTTP/1.1",
        "GET x HTTP/1.1",
        "GET ! HTTP/1.1",
        "GET ?x HTTP/1.1",
    ] {
        let answer = wire.refused(format!("{line}\r\nHost: localhost\r\n\r\n"));
        assert_eq!(answer.status(), 400, "{line:?}");
    }
}

#[test]
fn a17_options_of_the_proxy_itself_is_answered_here() {
    let wire = Wire::start();
    for target in ["*", "http://localhost"] {
        let answer = wire.refused(request(&format!("OPTIONS {target}"), "Host: localhost\r\n"));
        assert_eq!(answer.status(), 204, "{target}");
        assert!(answer.header("allow").is_some_and(|allow| allow.contains("GET") && allow.contains("OPTIONS")), "{answer:?}");
        assert!(!String::from_utf8_lossy(&answer.head).contains(&wire.token));
    }
    // A path makes it the upstream's.
    assert_eq!(wire.forwarded(request("OPTIONS /", "Host: localhost\r\n")).start, "OPTIONS / HTTP/1.1");
}

#[test]
fn a18_max_forwards_is_counted_down() {
    let wire = Wire::start();
    let options = |value: &str| request("OPTIONS /x", &format!("Host: localhost\r\nMax-Forwards: {value}\r\n"));
    assert!(matches!(wire.refused(options("0")).status(), 200 | 204));
    assert_eq!(wire.forwarded(options("1")).header("max-forwards"), Some("0"));
    assert_eq!(wire.forwarded(options("10")).header("max-forwards"), Some("9"));
    for invalid in ["garbage", "99999999999999999999", "-1"] {
        assert_eq!(wire.forwarded(options(invalid)).header("max-forwards"), Some(invalid));
    }
    assert_eq!(wire.forwarded(request("OPTIONS /x", "Host: localhost\r\n")).header("max-forwards"), None);
    assert_eq!(wire.forwarded(request("GET /x", "Host: localhost\r\nMax-Forwards: 0\r\n")).header("max-forwards"), Some("0"));
}

#[test]
fn a19_connect_opens_no_tunnel() {
    let wire = Wire::start();
    let upstream = wire.upstream.address();
    for request in [
        "CONNECT api.upsolver.com:443 HTTP/1.1\r\nHost: api.upsolver.com:443\r\n\r\n".to_owned(),
        format!("CONNECT {upstream} HTTP/1.1\r\nHost: {upstream}\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        "CONNECT localhost:80 HTTP/1.1\r\nHost: localhost:80\r\nContent-Length: 5\r\n\r\nhello".to_owned(),
    ] {
        let answer = wire.refused_and_closed(request);
        assert_eq!((answer.status(), answer.code().as_str()), (405, "method_not_allowed"));
        assert!(answer.header("allow").is_some_and(|allow| !allow.contains("CONNECT")), "{answer:?}");
    }
}

#[test]
fn a20_trace_would_echo_the_token() {
    let wire = Wire::start();
    let answer = wire.refused(request("TRACE /", "Host: localhost\r\n"));
    assert_eq!((answer.status(), answer.code().as_str()), (405, "method_not_allowed"));
    assert!(answer.header("allow").is_some_and(|allow| !allow.contains("TRACE")), "{answer:?}");
}

#[test]
fn b17_methods_are_compared_exactly_and_unknown_ones_pass() {
    let wire = Wire::start();
    for method in ["PROPFIND", "post", "trace", "PATCH", "DELETE", "PUT", "M-SEARCH"] {
        assert_eq!(wire.forwarded(request(&format!("{method} /x"), "Host: localhost\r\n")).start, format!("{method} /x HTTP/1.1"));
    }
}

/// The target leaves as it came: what was judged is what is sent.
#[test]
fn b22_d35_no_target_changes_the_authority_and_every_path_goes_through_byte_for_byte() {
    let wire = Wire::start();
    for target in [
        "/@evil.example/",
        "//evil.example/x",
        "///evil.example",
        "/:8443@evil.example/",
        "/\\@evil.example",
        "/http://evil.example/",
        "/a%2Fb/%2e%2e/../c/./d//e",
        "/x?a=b&c=%zz&d=http://evil.example/?",
        "/x?",
        "/%",
        "/x;a=b?;",
        "/~-._!$&'()*+,;=:@",
        "/{}|^\"",
        "/?a=%00%0d%0aX:y",
    ] {
        let forwarded = wire.forwarded(request(&format!("GET {target}"), "Host: localhost\r\n"));
        assert_eq!(forwarded.start, format!("GET {target} HTTP/1.1"));
    }
    for target in ["@evil.example/", ":8443@evil.example/", "\\@evil.example", "evil.example"] {
        let answer = wire.refused(request(&format!("GET {target}"), "Host: localhost\r\n"));
        assert!(matches!(answer.status(), 400 | 421), "{target}: {answer:?}");
    }
}

#[test]
fn b27_allowed_hosts_are_exact() {
    let wire = Wire::set(&["listen.allowed_hosts=[\"proxy.internal\", \"other.internal:9\"]"]);
    let port = wire.proxy.address.port();
    let upstream = wire.upstream.address();
    let allowed = [
        "localhost".to_owned(),
        format!("localhost:{port}"),
        "LocalHost".to_owned(),
        "127.0.0.1".to_owned(),
        format!("127.0.0.1:{port}"),
        "[::1]".to_owned(),
        format!("[::1]:{port}"),
        upstream.to_string(),
        "proxy.internal".to_owned(),
        "PROXY.internal".to_owned(),
        format!("proxy.internal:{port}"),
        "other.internal:9".to_owned(),
    ];
    for host in allowed {
        wire.forwarded(request("GET /x", &format!("Host: {host}\r\n")));
    }
    let refused = [
        "0.0.0.0".to_owned(),
        format!("0.0.0.0:{port}"),
        "127.0.0.1.nip.io".to_owned(),
        "localhost.evil.example".to_owned(),
        "evil-localhost".to_owned(),
        "[::ffff:7f00:1]".to_owned(),
        "127.0.0.2".to_owned(),
        "127.1".to_owned(),
        "2130706433".to_owned(),
        "localhost.".to_owned(),
        "127.0.0.1.".to_owned(),
        "localhost:1".to_owned(),
        "proxy.internal:1".to_owned(),
        "x.proxy.internal".to_owned(),
        "other.internal:90".to_owned(),
        "api.upsolver.com".to_owned(),
    ];
    for host in refused {
        let answer = wire.refused(request("GET /x", &format!("Host: {host}\r\n")));
        assert_eq!((answer.status(), answer.code().as_str()), (421, "misdirected_request"), "{host}");
    }
}

/// The upstream's own name is allowed with the ports an app would write, so that it may be the app's `http_proxy`.
#[test]
fn b27_the_upstreams_name_is_allowed_with_the_usual_ports() {
    let upstream = crate::support::raw::RawUpstream::start();
    let token = crate::support::proxy::canary("token");
    let proxy = crate::support::proxy::Builder::to_raw(&upstream, &token)
        .set(format!("upstream.url=http://localhost:{}", upstream.address().port()))
        .set(format!("upstream.resolve={}", upstream.address()))
        .start();
    for host in ["localhost:443", "localhost:80", &format!("localhost:{}", upstream.address().port())] {
        let mut downstream = proxy.connect();
        downstream.send(request("GET /x", &format!("Host: {host}\r\n")));
        let mut connection = upstream.accept();
        assert_eq!(connection.read_request().expect("a request").all("host"), [format!("localhost:{}", upstream.address().port())]);
        connection.send(OK);
        assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
    }
    assert_eq!(proxy.exchange(request("GET /x", "Host: localhost:444\r\n")).code(), "misdirected_request");
}
