//! Connections: who closes when, what a close does to the other side, and that no exchange sees bytes of another.

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crate::support::raw::Raw;
use crate::support::wire::{GET, OK, OK_KEPT, Wire};

/// What ends the upstream's side of an early reply.
#[derive(Debug, Clone, Copy)]
enum End {
    Open,
    HalfClosed,
    Reset,
}

/// The upstream refuses an upload before it has seen it. The downstream writes on, reads late, and still gets every byte of the reply.
#[test]
fn a50_an_early_reply_arrives_whole_while_the_upload_goes_on() {
    let wire = Wire::start();
    let upload = 16 * 1024 * 1024;
    for framing in ["Content-Length: 16777216", "Transfer-Encoding: chunked"] {
        for end in [End::Open, End::HalfClosed, End::Reset] {
            // A reset overtakes what the network still holds; what it cannot overtake is a reply that has arrived.
            let reply = "r".repeat(if matches!(end, End::Reset) { 100 } else { 300_000 });
            let mut downstream = wire.proxy.connect();
            downstream.send(format!("POST /x HTTP/1.1\r\nHost: localhost\r\n{framing}\r\n\r\n"));
            let mut writing = downstream.stream().try_clone().expect("a socket");
            let writer = thread::spawn(move || {
                let chunk = format!("10000\r\n{}\r\n", "u".repeat(65536));
                // Ends when the proxy takes no more, or with the upload.
                (0..upload / 65536).all(|_| {
                    writing.write_all(if framing.starts_with('T') { chunk.as_bytes() } else { &chunk.as_bytes()[7..65543] }).is_ok()
                })
            });
            let mut upstream = wire.upstream.accept();
            upstream.read_head().expect("a head");
            upstream.take(100_000);
            upstream.send(format!("HTTP/1.1 413 Content Too Large\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{reply}", reply.len()));
            match end {
                End::Open => {}
                End::HalfClosed => upstream.half_close(),
                // With unread bytes, closing is a reset.
                End::Reset => drop(upstream),
            }
            writer.join().expect("writing does not panic");
            let answer = downstream.read_response(false).expect("an answer");
            assert_eq!((answer.status(), answer.text() == reply, answer.complete), (413, true, true), "{framing} {end:?}");
            assert!(downstream.is_closed(), "left open in the middle of a body");
        }
    }
}

#[test]
fn a50_a_refusal_of_the_proxy_arrives_whole_while_the_upload_goes_on() {
    let wire = Wire::set(&["limits.max_request_body=1MiB"]);
    let body = "u".repeat(8 * 1024 * 1024);
    let mut downstream = wire.proxy.connect();
    downstream.send(format!("POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", body.len()));
    downstream.try_send(&body);
    let answer = downstream.read_response(false).expect("an answer");
    assert_eq!((answer.status(), answer.code().as_str()), (413, "body_too_large"));
    assert!(wire.upstream.saw_nothing());
    assert!(downstream.is_closed());
}

#[test]
fn a51_a_downstream_that_half_closes_gets_its_answer() {
    let wire = Wire::start();
    for request in [GET, "POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello"] {
        let mut downstream = wire.proxy.connect();
        downstream.send(request).half_close();
        let mut upstream = wire.upstream.accept();
        upstream.read_request().expect("a request");
        upstream.send(OK);
        let answer = downstream.read_response(false).expect("an answer");
        assert_eq!((answer.status(), answer.text().as_str()), (200, "ok"));
        assert!(downstream.is_closed());
    }
}

#[test]
fn a52_pipelined_requests_are_answered_in_order_one_at_a_time() {
    let wire = Wire::start();
    let mut downstream = wire.proxy.connect();
    downstream.send(
        "GET /1 HTTP/1.1\r\nHost: localhost\r\n\r\nGET /2 HTTP/1.1\r\nHost: localhost\r\n\r\nPOST /3 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhelloGARBAGE\r\n\r\n",
    );
    for (start, body) in [("GET /1 HTTP/1.1", ""), ("GET /2 HTTP/1.1", ""), ("POST /3 HTTP/1.1", "hello")] {
        let mut upstream = wire.upstream.accept();
        let forwarded = upstream.read_request().expect("a request");
        assert_eq!((forwarded.start.as_str(), forwarded.text().as_str()), (start, body));
        assert!(wire.upstream.saw_nothing(), "the next one left before this one was answered");
        upstream.send(format!("HTTP/1.1 200 OK\r\nX-Start: {start}\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"));
        let answer = downstream.read_response(false).expect("an answer");
        assert_eq!((answer.status(), answer.header("x-start")), (200, Some(start)));
    }
    assert_eq!(downstream.read_response(false).expect("an answer to the garbage").status(), 400);
    assert!(downstream.is_closed());
}

#[test]
fn a58_a_close_of_the_downstream_leaves_the_pool_alone() {
    let wire = Wire::start();
    let mut downstream = wire.proxy.connect();
    downstream.send("GET /1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    let mut upstream = wire.upstream.accept();
    let forwarded = upstream.read_request().expect("a request");
    assert_eq!(forwarded.header("connection"), None);
    upstream.send(OK_KEPT);
    assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
    assert!(downstream.is_closed());
    let mut downstream = wire.proxy.connect();
    downstream.send(GET);
    assert!(upstream.read_request().is_some(), "the connection was given up");
    // And this one ends here.
    upstream.send(OK);
    assert_eq!(downstream.read_response(false).expect("an answer").header("connection"), None);
    assert!(upstream.is_closed());
    downstream.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request on a new connection");
    upstream.send(OK);
    assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
}

/// Many spellings of `Connection: close`, over several lines.
#[test]
fn a58_a_close_is_heard_in_every_spelling() {
    let wire = Wire::start();
    for connection in [
        "Connection: Close",
        "Connection: keep-alive, close",
        "Connection: close\r\nConnection: keep-alive",
        "Connection: keep-alive\r\nConnection: x, CLOSE",
    ] {
        let mut downstream = wire.proxy.connect();
        downstream.send(format!("GET /x HTTP/1.1\r\nHost: localhost\r\n{connection}\r\n\r\n"));
        let mut upstream = wire.upstream.accept();
        upstream.read_request().expect("a request");
        upstream.send(OK);
        assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
        assert!(downstream.is_closed(), "{connection}");
    }
}

#[test]
fn a_downstream_that_leaves_before_its_answer_is_counted() {
    let wire = Wire::start();
    let mut downstream = wire.proxy.connect();
    downstream.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    drop(downstream);
    wire.proxy.wait_until("the count", |proxy| proxy.metric("upsolver_auth_proxy_errors_total{code=\"downstream_closed\"}") == 1.0);
}

#[test]
fn a_downstream_that_leaves_cancels_its_exchange_upstream() {
    let wire = Wire::start();
    // While the upstream thinks.
    let mut downstream = wire.proxy.connect();
    downstream.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    downstream.reset();
    assert!(upstream.is_closed());
    // While the reply flows.
    let mut downstream = wire.proxy.connect();
    downstream.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    upstream.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
    downstream.read_head().expect("a head");
    downstream.reset();
    while upstream.try_send("5\r\nhello\r\n") {
        thread::sleep(Duration::from_millis(1));
    }
}

/// Half a request of A, then B: the connection that carried the half is never used again.
#[test]
fn b05_an_aborted_upload_reaches_nobody_else() {
    let wire = Wire::start();
    for body in [
        "Content-Length: 100\r\n\r\nhalf",
        "Transfer-Encoding: chunked\r\n\r\n64\r\nhalf",
        "Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ] {
        for reset in [false, true] {
            let mut a = wire.proxy.connect();
            a.send(format!("POST /a HTTP/1.1\r\nHost: localhost\r\n{body}"));
            let mut upstream_a = wire.upstream.accept();
            upstream_a.read_head().expect("a head");
            if reset {
                a.reset();
            } else {
                drop(a);
            }
            let rest = upstream_a.read_to_end();
            assert!(!rest.ends_with(b"0\r\n\r\n"), "the half was sent as a whole: {}", rest.escape_ascii());
            upstream_a.try_send("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfor a");
            let mut b = wire.proxy.connect();
            b.send(GET);
            let mut upstream_b = wire.upstream.accept();
            assert_eq!(upstream_b.read_request().expect("a request").start, "GET /x HTTP/1.1");
            upstream_b.send(OK);
            assert_eq!(b.read_response(false).expect("an answer").text(), "ok");
        }
    }
}

/// The upload ends early on the downstream's side only: no upstream may take the half for a whole.
#[test]
fn b05_a_half_closed_upload_is_no_whole() {
    let wire = Wire::start();
    for body in ["Content-Length: 100\r\n\r\nhalf", "Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n"] {
        let mut downstream = wire.proxy.connect();
        downstream.send(format!("POST /a HTTP/1.1\r\nHost: localhost\r\n{body}")).half_close();
        let mut upstream = wire.upstream.accept();
        upstream.read_head().expect("a head");
        assert!(!upstream.read_to_end().ends_with(b"0\r\n\r\n"));
    }
}

/// Serves connections of an upstream that answers each request with its own path.
fn echo(connection: &mut Raw) {
    while let Some(request) = connection.read_request() {
        if !request.complete {
            break;
        }
        let path = request.start.split(' ').nth(1).expect("a target").to_owned();
        let body = format!("{path} {}", request.text());
        let reply = if path.ends_with('7') {
            format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{body}\r\n0\r\n\r\n", body.len())
        } else {
            format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        };
        if !connection.try_send(reply) {
            break;
        }
    }
}

#[test]
fn b06_every_reply_matches_its_request() {
    const APPS: usize = 4;
    const REQUESTS: usize = 2_500;
    // 10,000 requests at level trace would be a gigabyte of log.
    let Wire { upstream, proxy, .. } = Wire::with(|builder| {
        // Idle connections end soon, and with them the threads that serve them.
        builder.env("RUST_LOG", "info").set("log.access=off").set("upstream.pool_idle_timeout=1s")
    });
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let (upstream, proxy, done) = (&upstream, &proxy, &done);
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                match upstream.try_accept() {
                    Some(mut connection) => drop(scope.spawn(move || echo(&mut connection))),
                    None => thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        let apps: Vec<_> = (0..APPS)
            .map(|app| {
                scope.spawn(move || {
                    let mut connection = proxy.connect();
                    for number in 0..REQUESTS {
                        let id = format!("{app}-{number}");
                        let method = if number % 3 == 0 { "POST" } else { "GET" };
                        let body = if method == "POST" { id.as_str() } else { "" };
                        connection
                            .send(format!("{method} /{id} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
                        match fastrand::u8(..) {
                            // Leaves without waiting for the reply.
                            0..4 => connection = proxy.connect(),
                            4..8 => std::mem::replace(&mut connection, proxy.connect()).reset(),
                            // Leaves in the middle of another request.
                            8..12 => {
                                connection.send(format!("POST /half-{id} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nhalf"));
                                connection = proxy.connect();
                            }
                            _ => {
                                let answer = connection.read_response(false).expect("an answer");
                                assert_eq!((answer.status(), answer.text(), answer.complete), (200, format!("/{id} {body}"), true));
                            }
                        }
                    }
                })
            })
            .collect();
        let results: Vec<_> = apps.into_iter().map(thread::ScopedJoinHandle::join).collect();
        done.store(true, Ordering::Relaxed);
        for result in results {
            result.expect("every reply matches");
        }
    });
}

#[test]
fn b35_a_unix_socket_is_a_listener_too() {
    let path = tempfile::tempdir().expect("a temporary directory");
    let socket = path.path().join("proxy.sock");
    let wire = Wire::with(|builder| {
        builder.set(format!("listen.address=[\"127.0.0.1:0\", \"unix:{}\"]", socket.display())).set("listen.unix_mode=0600")
    });
    assert_eq!(std::fs::metadata(&socket).expect("a socket").permissions().mode() & 0o777, 0o600);
    let mut downstream = UnixStream::connect(&socket).expect("the listener accepts");
    downstream.write_all(b"GET /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").expect("a writable socket");
    let mut upstream = wire.upstream.accept();
    wire.assert_ours(&upstream.read_request().expect("a request"));
    upstream.send(OK);
    let mut answer = String::new();
    downstream.read_to_string(&mut answer).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.ends_with("\r\n\r\nok"), "{answer}");
    let mut wire = wire;
    wire.proxy.stop();
    assert!(!socket.exists(), "the socket stayed behind");
}
