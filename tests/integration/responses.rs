//! What comes back: framing, bodies that must not be there, replies that break off, replies that are none (RFC 9112 section 6.3, contract section 4
//! "Relay").

use std::time::Duration;

use crate::support::raw::Message;
use crate::support::wire::{GET, OK, OK_KEPT, Wire};

const DATE: &str = "Date: Tue, 01 Jan 2030 00:00:00 GMT\r\n";

fn is_upstream_protocol(answer: &Message) -> bool {
    answer.status() == 502 && answer.code() == "upstream_protocol"
}

#[test]
fn a22_a_101_that_nobody_asked_for_is_an_error() {
    let wire = Wire::start();
    for request in [GET, "GET /x HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n"] {
        let mut downstream = wire.proxy.connect();
        downstream.send(request);
        let mut upstream = wire.upstream.accept();
        upstream.read_request().expect("a request");
        upstream.send("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\nraw bytes");
        let answer = downstream.read_response(false).expect("an answer");
        assert!(is_upstream_protocol(&answer), "{answer:?}");
        assert!(upstream.is_closed());
    }
}

#[test]
fn a21_no_upgrade_leaves_and_no_raw_bytes_behind_it() {
    let wire = Wire::start();
    for upgrade in [
        "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
        "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
        "Upgrade: foo\r\n",
    ] {
        let mut downstream = wire.proxy.connect();
        downstream.send(format!("GET /x HTTP/1.1\r\nHost: localhost\r\n{upgrade}\r\n\u{1}\u{2}raw bytes"));
        let mut upstream = wire.upstream.accept();
        let forwarded = upstream.read_request().expect("a request");
        for name in ["upgrade", "connection", "http2-settings"] {
            assert_eq!(forwarded.header(name), None, "{forwarded:?}");
        }
        upstream.send(OK);
        assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
        assert!(upstream.is_closed(), "raw bytes left");
        // The raw bytes are no request.
        let rest = downstream.read_to_end();
        assert!(rest.is_empty() || rest.starts_with(b"HTTP/1.1 400"), "{}", rest.escape_ascii());
        assert!(wire.upstream.saw_nothing());
    }
}

#[test]
fn a34_response_trailers_go_to_those_who_asked() {
    let wire = Wire::start();
    let reply = format!(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum, Authorization\r\nConnection: close\r\n\r\n5\r\nhello\r\n0\r\nX-Sum: 1\r\nAuthorization: {}\r\nContent-Length: 7\r\n\r\n",
        wire.token
    );
    for (asked, expected) in [("", None), ("TE: trailers\r\nConnection: te\r\n", Some("1"))] {
        let (_, answer) = wire.exchange(format!("GET /x HTTP/1.1\r\nHost: localhost\r\n{asked}\r\n"), &reply);
        assert_eq!((answer.body.as_slice(), answer.complete), (&b"hello"[..], true));
        let trailers: Vec<_> = answer.trailers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(trailers, expected.map(|value| ("x-sum", value)).into_iter().collect::<Vec<_>>());
        assert!(!String::from_utf8_lossy(&answer.head).contains("x-sum") || expected.is_some(), "{answer:?}");
    }
}

#[test]
fn a35_response_trailers_are_bounded() {
    let wire = Wire::start();
    for trailers in ["X-T: 1\r\n".repeat(10_000), format!("X-T: {}\r\n", "t".repeat(1024 * 1024))] {
        let reply = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n5\r\nhello\r\n0\r\n{trailers}\r\n");
        let answer = wire.answered(reply);
        assert!(!answer.complete, "{:?}", answer.head);
    }
    assert_eq!(wire.answered(OK).status(), 200);
}

#[test]
fn a36_interim_replies_end_here_and_the_final_one_arrives() {
    let wire = Wire::start();
    let interim = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n";
    for interims in [
        interim.to_owned(),
        interim.repeat(10),
        format!("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 199 Whatever\r\n\r\n{interim}"),
    ] {
        let answer = wire.answered(format!("{interims}{OK}"));
        assert_eq!((answer.status(), answer.body.as_slice(), answer.header("link")), (200, &b"ok"[..], None));
    }
}

#[test]
fn a36_endless_interim_replies_end_at_the_response_timeout() {
    let wire = Wire::set(&["upstream.response_timeout=300ms"]);
    let mut downstream = wire.proxy.connect();
    downstream.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    while upstream.try_send("HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n") {
        std::thread::sleep(Duration::from_millis(5));
    }
    let answer = downstream.read_response(false).expect("an answer");
    assert_eq!((answer.status(), answer.code().as_str()), (504, "upstream_timeout"));
}

#[test]
fn a41_a_head_keeps_the_length_and_has_no_body() {
    let wire = Wire::start();
    let head = "HEAD /x HTTP/1.1\r\nHost: localhost\r\n\r\n";
    for (reply, length) in [
        ("Content-Length: 1234\r\n", Some("1234")),
        ("Content-Length: 0\r\n", Some("0")),
        ("Transfer-Encoding: chunked\r\n", None),
        ("", None),
    ] {
        let mut downstream = wire.proxy.connect();
        downstream.send(head);
        let mut upstream = wire.upstream.accept();
        upstream.read_request().expect("a request");
        upstream.send(format!("HTTP/1.1 200 OK\r\n{reply}Connection: close\r\n\r\n"));
        let answer = downstream.read_response(true).expect("an answer");
        assert_eq!((answer.status(), answer.header("content-length")), (200, length), "{answer:?}");
        // Nothing behind the head: the next answer on this connection begins where it should.
        drop(upstream);
        downstream.send(GET);
        let mut upstream = wire.upstream.accept();
        upstream.read_request().expect("a request");
        upstream.send(OK);
        assert_eq!(downstream.read_response(false).expect("an answer").text(), "ok");
    }
}

/// The next request does not get what was left of the reply before.
fn stray_bytes_poison_nothing(request: &str, reply: &str) {
    let wire = Wire::start();
    let mut first = wire.proxy.connect();
    first.send(request);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    upstream.send(reply);
    let answer = first.read_response(request.starts_with("HEAD")).expect("an answer");
    assert!(!answer.text().contains("stray"), "{answer:?}");
    assert!(upstream.is_closed(), "a connection with stray bytes was kept");
    for downstream in [&mut first, &mut wire.proxy.connect()] {
        downstream.send(GET);
        let mut upstream = wire.upstream.accept();
        upstream.read_request().expect("a request");
        upstream.send(OK);
        let answer = downstream.read_response(false).expect("an answer");
        assert_eq!((answer.status(), answer.text().as_str()), (200, "ok"));
    }
}

#[test]
fn a41_a_body_behind_the_reply_to_a_head_poisons_nothing() {
    stray_bytes_poison_nothing("HEAD /x HTTP/1.1\r\nHost: localhost\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray");
}

#[test]
fn a43_bytes_behind_a_reply_poison_nothing() {
    stray_bytes_poison_nothing(GET, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokstray");
    stray_bytes_poison_nothing(GET, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray");
    stray_bytes_poison_nothing(
        GET,
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray",
    );
}

#[test]
fn a42_bytes_behind_a_bodyless_reply_poison_nothing() {
    for status in [204, 304] {
        stray_bytes_poison_nothing(GET, &format!("HTTP/1.1 {status} None\r\nContent-Length: 5\r\n\r\nstray"));
        stray_bytes_poison_nothing(GET, &format!("HTTP/1.1 {status} None\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nstray\r\n0\r\n\r\n"));
        stray_bytes_poison_nothing(GET, &format!("HTTP/1.1 {status} None\r\n\r\nstray"));
    }
}

#[test]
fn a43_a_reply_before_its_request_poisons_nothing() {
    let wire = Wire::start();
    let mut downstream = wire.proxy.connect();
    downstream.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    upstream.send(OK_KEPT);
    assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray");
    assert!(upstream.is_closed(), "an idle connection that spoke was kept");
    downstream.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    upstream.send(OK);
    assert_eq!(downstream.read_response(false).expect("an answer").text(), "ok");
}

#[test]
fn a42_replies_without_a_body_have_none() {
    let wire = Wire::start();
    for status in [204, 205, 304] {
        for framing in ["Content-Length: 0\r\n", "", "Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n"] {
            let body = match (status, framing) {
                (205, "Content-Length: 5\r\n") => "stray",
                (205, "Transfer-Encoding: chunked\r\n") => "5\r\nstray\r\n0\r\n\r\n",
                _ => "",
            };
            let mut downstream = wire.proxy.connect();
            downstream.send(GET);
            let mut upstream = wire.upstream.accept();
            upstream.read_request().expect("a request");
            upstream.send(format!("HTTP/1.1 {status} None\r\n{DATE}ETag: \"x\"\r\n{framing}Connection: close\r\n\r\n{body}"));
            drop(upstream);
            let answer = downstream.read_response(status != 205).expect("an answer");
            assert_eq!((answer.status(), answer.header("etag"), answer.text().as_str()), (status, Some("\"x\""), ""), "{framing}");
            match status {
                204 => assert_eq!((answer.header("content-length"), answer.header("transfer-encoding")), (None, None), "{answer:?}"),
                // Upstream's own may stay, it describes what a 200 would have; nothing may be invented.
                304 => {
                    assert_eq!(answer.header("transfer-encoding"), None, "{answer:?}");
                    let original = framing.strip_prefix("Content-Length: ").map(str::trim_end);
                    assert!(answer.header("content-length").is_none_or(|length| Some(length) == original), "{framing}: {answer:?}");
                }
                _ => assert!(answer.complete, "{answer:?}"),
            }
            // The connection is where it should be.
            downstream.send(GET);
            let mut upstream = wire.upstream.accept();
            upstream.read_request().expect("a request");
            upstream.send(OK);
            assert_eq!(downstream.read_response(false).expect("an answer").text(), "ok", "{status} {framing}");
        }
    }
}

#[test]
fn a44_a60_contradictory_framing_is_an_error() {
    let wire = Wire::start();
    let hundred = "h".repeat(100);
    let chunked = format!("64\r\n{hundred}\r\n0\r\n\r\n");
    for (version, framing, body) in [
        ("1.1", "Content-Length: 5\r\nTransfer-Encoding: chunked", chunked.as_str()),
        ("1.1", "Transfer-Encoding: chunked\r\nContent-Length: 5", &chunked),
        ("1.1", "Content-Length: 5\r\nContent-Length: 6", "hello!"),
        ("1.1", "Content-Length: 5, 6", "hello!"),
        ("1.1", "Content-Length: +5", "hello"),
        ("1.1", "Content-Length: -5", "hello"),
        ("1.1", "Content-Length: 0x5", "hello"),
        ("1.1", "Content-Length: five", "hello"),
        ("1.1", "Content-Length: 99999999999999999999", "hello"),
        ("1.1", "Transfer-Encoding: gzip", "hello"),
        ("1.1", "Transfer-Encoding: gzip, chunked", &chunked),
        ("1.1", "Transfer-Encoding: chunked, gzip", "hello"),
        ("1.1", "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", &chunked),
        ("1.1", "Transfer-Encoding: chunked, chunked", &chunked),
        ("1.1", "Transfer-Encoding: identity", "hello"),
        ("1.1", "Transfer-Encoding: xchunked", &chunked),
        ("1.0", "Transfer-Encoding: chunked", &chunked),
    ] {
        let mut downstream = wire.proxy.connect();
        downstream.send(GET);
        let mut upstream = wire.upstream.accept();
        upstream.read_request().expect("a request");
        upstream.send(format!("HTTP/{version} 200 OK\r\n{framing}\r\n\r\n{body}"));
        let answer = downstream.read_response(false).expect("an answer");
        assert!(is_upstream_protocol(&answer), "{framing}: {answer:?}");
        assert!(upstream.is_closed(), "the connection was kept behind {framing}");
    }
}

#[test]
fn a44_an_empty_length_is_an_error() {
    let answer = Wire::start().answered("HTTP/1.1 200 OK\r\nContent-Length:\r\n\r\nhello");
    assert!(is_upstream_protocol(&answer), "{answer:?}");
}

#[test]
fn a45_heads_that_are_none_are_an_error() {
    let wire = Wire::start();
    for head in [
        &b"HTTP/1.1 200 OK\r\nX-A: 1\r\n folded\r\nContent-Length: 2\r\n\r\nok"[..],
        b"HTTP/1.1 200 OK\r\nX-A : 1\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX-A: a\rb\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nX-A: a\0b\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nno colon\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\n: x\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.1 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/2 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"HTTP/1.2 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"ICY 200 OK\r\nContent-Length: 2\r\n\r\nok",
        b"<html>not HTTP at all</html>",
        b"\x15\x03\x03\x00\x02\x02\x28",
    ] {
        let mut downstream = wire.proxy.connect();
        downstream.send(GET);
        let mut upstream = wire.upstream.accept();
        upstream.read_request().expect("a request");
        upstream.send(head);
        drop(upstream);
        let answer = downstream.read_response(false).expect("an answer");
        assert!(is_upstream_protocol(&answer), "{}: {answer:?}", head.escape_ascii());
    }
}

#[test]
fn a45_d31_a_head_that_is_too_large_is_an_error() {
    let wire = Wire::start();
    for fields in ["X-T: 1\r\n".repeat(90), format!("X-T: {}\r\n", "t".repeat(60 * 1024))] {
        let answer = wire.answered(format!("HTTP/1.1 200 OK\r\n{fields}Content-Length: 2\r\nConnection: close\r\n\r\nok"));
        assert_eq!((answer.status(), answer.text().as_str()), (200, "ok"));
    }
    let long = |length: usize| format!("X-T: {}\r\n", "t".repeat(length));
    for fields in ["X-T: 1\r\n".repeat(110), "X-T: 1\r\n".repeat(10_000), long(70 * 1024), long(1024 * 1024)] {
        let mut downstream = wire.proxy.connect();
        downstream.send(GET);
        let mut upstream = wire.upstream.accept();
        upstream.read_request().expect("a request");
        upstream.try_send(format!("HTTP/1.1 200 OK\r\n{fields}Content-Length: 2\r\n\r\nok"));
        let answer = downstream.read_response(false).expect("an answer");
        assert!(is_upstream_protocol(&answer), "{answer:?}");
    }
    assert_eq!(wire.answered(OK).status(), 200);
}

#[test]
fn a46_encoded_line_ends_stay_encoded() {
    let wire = Wire::start();
    let (forwarded, answer) = wire.exchange(
        "GET /x?a=%0d%0aX-Injected:%201 HTTP/1.1\r\nHost: localhost\r\nX-A: %0d%0aX-Injected: 1\r\n\r\n",
        "HTTP/1.1 302 Found\r\nLocation: /y?a=%0d%0aX-Injected:%201\r\nX-A: %0D%0AX-Injected: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    );
    assert_eq!(forwarded.start, "GET /x?a=%0d%0aX-Injected:%201 HTTP/1.1");
    assert_eq!((forwarded.header("x-injected"), answer.header("x-injected")), (None, None));
    assert_eq!((answer.header("location"), answer.header("x-a")), (Some("/y?a=%0d%0aX-Injected:%201"), Some("%0D%0AX-Injected: 1")));
}

#[test]
fn a47_a_date_is_added_where_none_is() {
    let wire = Wire::start();
    let answer = wire.answered("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    assert!(answer.header("date").is_some_and(|date| httpdate::parse_http_date(date).is_ok()), "{answer:?}");
    assert_eq!(wire.answered(OK).header("date"), Some("Tue, 01 Jan 2030 00:00:00 GMT"));
}

#[test]
fn a48_http_1_0_never_gets_chunks() {
    let wire = Wire::start();
    for connection in ["", "Connection: keep-alive\r\n"] {
        let mut downstream = wire.proxy.connect();
        downstream.send(format!("GET /x HTTP/1.0\r\nHost: localhost\r\n{connection}\r\n"));
        let mut upstream = wire.upstream.accept();
        upstream.read_request().expect("a request");
        upstream.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n");
        let answer = downstream.read_response(false).expect("an answer");
        assert_eq!((answer.header("transfer-encoding"), answer.text().as_str()), (None, "hello world"));
        if answer.header("content-length").is_none() {
            assert_ne!(answer.header("connection"), Some("keep-alive"), "a body that only the end of the connection ends");
        }
    }
}

/// A reply in HTTP/1.0 does not make the downstream's connection one.
#[test]
fn a57_a_reply_in_http_1_0_leaves_in_1_1() {
    let wire = Wire::start();
    let mut downstream = wire.proxy.connect();
    for (reply, body) in [("Content-Length: 5\r\n\r\nhello", "hello"), ("\r\nuntil the end", "until the end")] {
        downstream.send(GET);
        let mut upstream = wire.upstream.accept();
        upstream.read_request().expect("a request");
        upstream.send(format!("HTTP/1.0 200 OK\r\n{reply}"));
        drop(upstream);
        let answer = downstream.read_response(false).expect("an answer");
        assert_eq!((answer.start.as_str(), answer.text().as_str(), answer.complete), ("HTTP/1.1 200 OK", body, true));
    }
}

#[test]
fn a_reply_that_breaks_off_breaks_off_downstream() {
    let wire = Wire::start();
    let version_1_0 = "GET /x HTTP/1.0\r\nHost: localhost\r\n\r\n";
    for (request, reply) in [
        (GET, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"),
        (GET, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"),
        (GET, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"),
        (GET, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel"),
        (GET, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n"),
        (GET, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nXX\r\n"),
        (GET, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
        (version_1_0, "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello"),
    ] {
        for reset in [false, true] {
            let mut downstream = wire.proxy.connect();
            downstream.send(request);
            let mut upstream = wire.upstream.accept();
            upstream.read_request().expect("a request");
            upstream.send(reply);
            let head = downstream.read_head().expect("a head");
            assert_eq!(head.status(), 200);
            if reset {
                upstream.reset();
            } else {
                drop(upstream);
            }
            let rest = downstream.read_to_end();
            let complete = match (head.header("content-length"), head.header("transfer-encoding")) {
                (Some(length), _) => rest.len() >= length.parse().expect("a number"),
                (None, Some("chunked")) => rest.ends_with(b"0\r\n\r\n"),
                _ => true,
            };
            assert!(!complete, "{reply:?} arrived as complete: {}", rest.escape_ascii());
        }
    }
}

/// HTTP/1.0 has no framing that could show the break but the connection itself: it has to be reset, whether the upstream leaves or falls silent. A
/// whole reply still ends in order.
#[test]
fn a_chunked_reply_that_breaks_off_does_not_end_cleanly_in_http_1_0() {
    use std::io::{ErrorKind, Read};

    let wire = Wire::set(&["upstream.body_idle_timeout=500ms"]);
    let begin = || {
        let mut downstream = wire.proxy.connect();
        downstream.send("GET /x HTTP/1.0\r\nHost: localhost\r\n\r\n");
        let mut upstream = wire.upstream.accept();
        upstream.read_request().expect("a request");
        upstream.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
        assert!(downstream.read_head().expect("a head").header("content-length").is_none());
        assert_eq!(downstream.take(5), b"hello");
        (downstream, upstream)
    };
    let end = |downstream: crate::support::raw::Raw| downstream.stream().read(&mut [0; 16]).map_err(|error| error.kind());

    let (downstream, upstream) = begin();
    drop(upstream);
    assert_eq!(end(downstream), Err(ErrorKind::ConnectionReset), "the upstream left");

    let (downstream, _silent) = begin();
    assert_eq!(end(downstream), Err(ErrorKind::ConnectionReset), "the upstream fell silent");

    let (downstream, mut upstream) = begin();
    upstream.send("0\r\n\r\n");
    assert_eq!(end(downstream), Ok(0), "the reply is whole");
}

#[test]
fn b25_a_reply_that_carries_the_token_loses_that_field() {
    let wire = Wire::start();
    let token = &wire.token;
    let answer = wire.answered(format!(
        "HTTP/1.1 200 OK\r\nAuthorization: {token}\r\nX-Echo: Bearer {token}; x\r\nSet-Cookie: t={token}\r\nSet-Cookie: u=1\r\nX-Kept: 1\r\nLocation: /x?t={token}\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
    ));
    assert!(!String::from_utf8_lossy(&answer.head).contains(token.as_str()), "{answer:?}");
    assert_eq!((answer.header("x-kept"), answer.text().as_str()), (Some("1"), "ok"));
    assert_eq!(answer.all("set-cookie"), ["u=1"], "other lines of its name stay");
}

#[test]
fn b29_cors_fields_of_a_reply_end_here() {
    let answer = Wire::start().answered(
        "HTTP/1.1 200 OK\r\nAccess-Control-Allow-Origin: *\r\nAccess-Control-Allow-Credentials: true\r\nAccess-Control-Expose-Headers: X-A\r\nAccess-Control-Allow-Private-Network: true\r\nX-A: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    );
    assert!(!answer.headers.iter().any(|(name, _)| name.starts_with("access-control-")), "{answer:?}");
    assert_eq!(answer.header("x-a"), Some("1"));
}

/// Bodies stream: the first bytes arrive before the last ones were sent, both ways.
#[test]
fn bodies_stream_in_both_directions() {
    let wire = Wire::start();
    let mut downstream = wire.proxy.connect();
    downstream.send("POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n");
    let mut upstream = wire.upstream.accept();
    upstream.read_head().expect("a head");
    assert_eq!(upstream.take(10), b"5\r\nfirst\r\n");
    upstream.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nreply\r\n");
    let head = downstream.read_head().expect("a head before the request is complete");
    assert_eq!(head.header("transfer-encoding"), Some("chunked"));
    assert_eq!(downstream.take(10), b"5\r\nreply\r\n");
    downstream.send("4\r\nlast\r\n0\r\n\r\n");
    assert_eq!(upstream.take(14), b"4\r\nlast\r\n0\r\n\r\n");
    upstream.send("0\r\n\r\n");
    assert_eq!(downstream.take(5), b"0\r\n\r\n");
}
