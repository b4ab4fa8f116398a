//! A request is sent again only if the upstream certainly or, for the plainest ones, very probably did not process it (contract section 4, "Send").

use crate::support::raw::Raw;
use crate::support::wire::{GET, OK, OK_KEPT, Wire};

/// Serves one request and leaves a connection in the proxy's pool.
fn pooled(wire: &Wire) -> Raw {
    let mut downstream = wire.proxy.connect();
    downstream.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    upstream.send(OK_KEPT);
    assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
    wire.proxy.wait_until("a pooled connection", |proxy| proxy.metric("upsolver_auth_proxy_upstream_connections{state=\"idle\"}") == 1.0);
    upstream
}

#[test]
fn a_pooled_connection_is_used_again() {
    let wire = Wire::start();
    let mut upstream = pooled(&wire);
    let mut downstream = wire.proxy.connect();
    downstream.send("POST /y HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello");
    assert_eq!(upstream.read_request().expect("a request on the same connection").start, "POST /y HTTP/1.1");
    upstream.send(OK);
    assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
    assert!(wire.upstream.saw_nothing());
}

/// D09: on raw sockets.
#[test]
fn a_bodyless_get_is_repeated_when_a_pooled_connection_closes_before_the_reply() {
    let wire = Wire::start();
    for method in ["GET", "HEAD", "OPTIONS"] {
        for reset in [false, true] {
            let mut stale = pooled(&wire);
            let mut downstream = wire.proxy.connect();
            downstream.send(format!("{method} /again HTTP/1.1\r\nHost: localhost\r\n\r\n"));
            stale.read_request().expect("the first try");
            if reset {
                stale.reset();
            } else {
                drop(stale);
            }
            let mut upstream = wire.upstream.accept();
            let forwarded = upstream.read_request().expect("the second try");
            assert_eq!(forwarded.start, format!("{method} /again HTTP/1.1"));
            wire.assert_ours(&forwarded);
            upstream.send(OK);
            assert_eq!(downstream.read_response(method == "HEAD").expect("an answer").status(), 200);
        }
    }
}

/// D10: what may have been processed is not sent again.
#[test]
fn anything_else_is_not_repeated_when_a_pooled_connection_closes() {
    let wire = Wire::start();
    for (head, body) in [
        ("POST /once HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n", "hello"),
        ("POST /once HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n", ""),
        ("GET /once HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n", "hello"),
        ("DELETE /once HTTP/1.1\r\nHost: localhost\r\n\r\n", ""),
        ("PUT /once HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n", "5\r\nhello\r\n0\r\n\r\n"),
        ("get /once HTTP/1.1\r\nHost: localhost\r\n\r\n", ""),
    ] {
        let mut stale = pooled(&wire);
        let mut downstream = wire.proxy.connect();
        downstream.send(format!("{head}{body}"));
        assert!(stale.read_request().expect("the only try").complete);
        drop(stale);
        let answer = downstream.read_response(false).expect("an answer");
        assert_eq!((answer.status(), answer.code().as_str()), (502, "upstream_protocol"), "{head}");
        assert!(wire.upstream.saw_nothing(), "{head} was sent twice");
    }
}

/// Nothing of the request was written, so any method may take another connection.
/// D11: a POST of which nothing was sent goes to another connection.
#[test]
fn a_post_takes_a_new_connection_where_the_pooled_one_was_closed() {
    let wire = Wire::start();
    for _ in 0..3 {
        let mut stale = pooled(&wire);
        stale.half_close();
        let mut downstream = wire.proxy.connect();
        downstream.send("POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello");
        let mut upstream = wire.upstream.accept();
        let forwarded = upstream.read_request().expect("a request");
        assert_eq!(forwarded.body, b"hello");
        upstream.send(OK);
        assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
        assert!(stale.is_closed(), "bytes went to a connection that had ended");
    }
}

#[test]
fn nothing_is_repeated_once_a_reply_began() {
    let wire = Wire::start();
    for begun in ["H", "HTTP/1.1 200 OK\r\nContent-Le", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n", "garbage"] {
        let mut stale = pooled(&wire);
        let mut downstream = wire.proxy.connect();
        downstream.send(GET);
        stale.read_request().expect("the only try");
        stale.send(begun);
        drop(stale);
        let answer = downstream.read_response(false).expect("an answer");
        assert_eq!((answer.status(), answer.code().as_str()), (502, "upstream_protocol"), "{begun:?}");
        assert!(wire.upstream.saw_nothing());
    }
}

/// A connection made for this very request: its closing says nothing about an idle timeout.
#[test]
fn nothing_is_repeated_when_a_new_connection_closes() {
    let wire = Wire::start();
    let mut downstream = wire.proxy.connect();
    downstream.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("the only try");
    drop(upstream);
    assert_eq!(downstream.read_response(false).expect("an answer").code(), "upstream_protocol");
    assert!(wire.upstream.saw_nothing());
}

#[test]
fn answers_of_the_upstream_are_never_a_reason_to_repeat() {
    let wire = Wire::start();
    for status in [408, 421, 425, 429, 500, 502, 503, 504] {
        let answer = wire.answered(format!(
            "HTTP/1.1 {status} Whatever\r\nRetry-After: 0\r\nX-Api-Requestid: 1\r\nContent-Length: 4\r\nConnection: close\r\n\r\nlate"
        ));
        assert_eq!((answer.status(), answer.body.as_slice(), answer.header("retry-after")), (status, &b"late"[..], Some("0")));
        assert!(wire.upstream.saw_nothing(), "{status} was a reason to repeat");
    }
}
