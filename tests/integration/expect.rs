//! `Expect: 100-continue` (RFC 9110 section 10.1.1): a refusal comes without a 100, and nobody waits for ever.

use crate::support::proxy::Builder;
use crate::support::raw::{Message, Raw, RawUpstream};
use crate::support::wire::{OK, Wire};

const EXPECTING: &str = "POST /x HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n";

/// The final answer, and whether a 100 came before it.
fn final_answer(downstream: &mut Raw) -> (bool, Message) {
    let first = downstream.read_response(false).expect("an answer");
    if first.status() == 100 { (true, downstream.read_response(false).expect("a final answer")) } else { (false, first) }
}

#[test]
fn a37_a_refusal_comes_without_a_100() {
    let wire = Wire::set(&["limits.max_request_body=10B"]);
    for (target, host, length, status) in
        [("/api-tokens/", "localhost", 5, 405), ("/x", "evil.example", 5, 421), ("/x", "localhost", 11, 413)]
    {
        let answer =
            wire.refused(format!("POST {target} HTTP/1.1\r\nHost: {host}\r\nExpect: 100-continue\r\nContent-Length: {length}\r\n\r\n"));
        assert_eq!(answer.status(), status);
    }
}

#[test]
fn a37_a_proxy_without_a_token_refuses_without_a_100() {
    let upstream = RawUpstream::start();
    let mut builder = Builder::new().set(format!("upstream.url=http://{}", upstream.address())).set("token.wait=100ms");
    let absent = builder.directory().join("token");
    builder = builder.set(format!("credentials.token_file={}", absent.display()));
    let proxy = builder.start();
    let mut downstream = proxy.connect();
    downstream.send(EXPECTING);
    let (continued, answer) = final_answer(&mut downstream);
    assert!(!continued);
    assert_eq!((answer.status(), answer.code().as_str()), (503, "token_unavailable"));
    assert!(answer.header("retry-after").is_some_and(|seconds| seconds.parse::<u32>().is_ok()), "{answer:?}");
    assert!(upstream.saw_nothing());
}

#[test]
fn a38_an_early_refusal_of_the_upstream_reaches_the_downstream() {
    let wire = Wire::start();
    for status in ["417 Expectation Failed", "413 Content Too Large", "403 Forbidden", "400 Bad Request"] {
        let mut downstream = wire.proxy.connect();
        downstream.send(EXPECTING);
        let mut upstream = wire.upstream.accept();
        upstream.read_head().expect("a head");
        upstream.send(format!("HTTP/1.1 {status}\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"));
        // The body is never sent.
        let (_, answer) = final_answer(&mut downstream);
        assert_eq!((answer.start, answer.body.as_slice()), (format!("HTTP/1.1 {status}"), &b"no"[..]));
    }
}

#[test]
fn a39_the_downstream_gets_its_100_from_the_proxy() {
    let wire = Wire::start();
    let mut downstream = wire.proxy.connect();
    downstream.send(EXPECTING);
    let interim = downstream.read_response(false).expect("an interim answer");
    assert_eq!(interim.start, "HTTP/1.1 100 Continue");
    downstream.send("hello");
    let mut upstream = wire.upstream.accept();
    let forwarded = upstream.read_request().expect("a request");
    assert_eq!(forwarded.body, b"hello");
    upstream.send(OK);
    assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
}

/// The upstream's own 100 is not a second answer.
#[test]
fn a39_a_100_of_the_upstream_ends_here() {
    let wire = Wire::start();
    let mut downstream = wire.proxy.connect();
    downstream.send(EXPECTING);
    let mut upstream = wire.upstream.accept();
    upstream.read_head().expect("a head");
    upstream.send("HTTP/1.1 100 Continue\r\n\r\n");
    assert_eq!(downstream.read_response(false).expect("an interim answer").status(), 100);
    downstream.send("hello");
    assert_eq!(upstream.take(5), b"hello");
    upstream.send(OK);
    assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
}

#[test]
fn a40_other_expectations_are_refused_or_passed_on() {
    let wire = Wire::start();
    let mut downstream = wire.proxy.connect();
    downstream.send("POST /x HTTP/1.1\r\nHost: localhost\r\nExpect: banana\r\nContent-Length: 5\r\n\r\nhello");
    let mut upstream = wire.upstream.accept();
    assert_eq!(upstream.read_request().expect("a request").header("expect"), Some("banana"));
    upstream.send(OK);
    assert_eq!(final_answer(&mut downstream).1.status(), 200);

    // HTTP/1.0 knows no 100.
    let mut downstream = wire.proxy.connect();
    downstream.send("POST /x HTTP/1.0\r\nHost: localhost\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello");
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    upstream.send(OK);
    let (continued, answer) = final_answer(&mut downstream);
    assert_eq!((continued, answer.status()), (false, 200));
}

/// A39, B03: a bodyless request has nothing to continue with. Nobody says 100, and the expectation ends here: a server that takes it for the promise of a
/// body would wait for one, and the next request on the connection be in its place.
#[test]
fn a39_b03_no_expectation_without_a_body() {
    let wire = Wire::start();
    for (method, fields) in [
        ("GET", "Expect: 100-continue\r\n"),
        ("POST", "Expect: 100-Continue\r\nContent-Length: 0\r\n"),
        ("HEAD", "Expect: 100-continue\r\nExpect: 100-continue\r\n"),
    ] {
        let mut downstream = wire.proxy.connect();
        downstream.send(format!("{method} /x HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n"));
        let mut upstream = wire.upstream.accept();
        let forwarded = upstream.read_request().expect("a request");
        assert_eq!(forwarded.all("expect"), [""; 0], "{method}");
        upstream.send(OK);
        assert_eq!(downstream.read_head().expect("an answer").status(), 200, "{method}");
    }
}
