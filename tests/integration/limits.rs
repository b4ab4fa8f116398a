//! Limits in number, size and time: B09 to B15. With many more connections: `overload`.

use std::thread;
use std::time::Duration;

use upsolver_auth_proxy::simulator::{Account, Action, Fault, Options, Received, Simulator};

use crate::support::proxy::{Builder, canary};
use crate::support::raw::PATIENCE;
use crate::support::wire::{GET, LOCAL, OK, OK_KEPT, Wire};

/// How many connections a test opens where the matrix speaks of thousands.
const MANY: usize = 100;

#[test]
fn b09_a_head_that_does_not_come_ends_the_connection() {
    let wire = Wire::set(&["listen.header_timeout=300ms"]);
    for sent in ["", "G", "GET / HTTP/1.1\r\nHost: loc", "GET / HTTP/1.1\r\nHost: localhost\r\n"] {
        let mut connections: Vec<_> = (0..MANY).map(|_| wire.proxy.connect()).collect();
        for connection in &mut connections {
            connection.send(sent);
        }
        for connection in &mut connections {
            let answer = connection.read_response(false).expect("an answer before the close");
            assert_eq!((answer.status(), answer.code().as_str()), (408, "request_timeout"), "{sent:?}");
            assert_eq!(answer.header("connection"), Some("close"));
            assert!(connection.is_closed());
        }
    }
    assert!(wire.upstream.saw_nothing());
}

/// One byte after the other: bytes do not move the deadline.
#[test]
fn b09_a_slow_head_ends_the_connection() {
    let wire = Wire::set(&["listen.header_timeout=300ms"]);
    let mut connection = wire.proxy.connect();
    let drip = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ".iter().chain(std::iter::repeat(&b's'));
    for byte in drip {
        if !connection.is_silent_for(Duration::from_millis(20)) {
            break;
        }
        connection.try_send([*byte]);
    }
    assert_eq!(connection.read_response(false).expect("an answer").status(), 408);
}

/// The second head of a connection has the same deadline, counted from its first byte.
#[test]
fn b09_a_later_head_that_does_not_come_ends_the_connection() {
    let wire = Wire::set(&["listen.header_timeout=300ms"]);
    let mut connection = wire.proxy.connect();
    connection.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    upstream.send(OK);
    assert_eq!(connection.read_response(false).expect("an answer").status(), 200);
    connection.send("GET /y HTTP/1.1\r\n");
    assert_eq!(connection.read_response(false).expect("an answer").status(), 408);
    assert!(connection.is_closed());
}

#[test]
fn b10_a_body_that_stops_ends_both_legs() {
    let wire = Wire::set(&["upstream.body_idle_timeout=300ms"]);
    for body in [
        "Content-Length: 100\r\n\r\nh",
        "Content-Length: 100\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n64\r\nh",
        "Transfer-Encoding: chunked\r\n\r\n",
    ] {
        let mut downstream = wire.proxy.connect();
        downstream.send(format!("POST /x HTTP/1.1\r\nHost: localhost\r\n{body}"));
        let mut upstream = wire.upstream.accept();
        upstream.read_head().expect("a head");
        let answer = downstream.read_response(false).expect("an answer");
        assert_eq!((answer.status(), answer.code().as_str()), (408, "request_timeout"), "{body:?}");
        assert!(downstream.is_closed());
        assert!(!upstream.read_to_end().ends_with(b"0\r\n\r\n"));
    }
}

/// The upstream stops reading: that is not the downstream's fault.
#[test]
fn b10_an_upstream_that_stops_reading_is_a_504() {
    let wire = Wire::set(&["upstream.body_idle_timeout=300ms"]);
    let mut downstream = wire.proxy.connect();
    downstream.send("POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n");
    let mut upstream = wire.upstream.accept();
    upstream.read_head().expect("a head");
    let block = vec![b'u'; 1 << 20];
    let mut writing = downstream.stream().try_clone().expect("a socket");
    let writer = thread::spawn(move || while std::io::Write::write_all(&mut writing, &block).is_ok() {});
    let answer = downstream.read_response(false).expect("an answer");
    assert_eq!((answer.status(), answer.code().as_str()), (504, "upstream_timeout"));
    drop((downstream, upstream));
    writer.join().expect("writing does not panic");
}

#[test]
fn b11_a_downstream_that_stops_reading_is_cut_and_costs_buffers_only() {
    let wire = Wire::with(|builder| builder.set("upstream.body_idle_timeout=500ms").env("RUST_LOG", "info"));
    wire.forwarded(GET);
    let before = wire.proxy.resident_bytes();
    let mut downstream = wire.proxy.connect();
    downstream.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n");
    let block = vec![b'd'; 1 << 20];
    // Goes on until the proxy gives up.
    while upstream.try_send(&block) {}
    let grown = wire.proxy.resident_bytes().saturating_sub(before);
    assert!(grown < 8 << 20, "grew by {grown} bytes for one stalled reader");
    assert!(downstream.read_to_end().len() < 1_000_000_000);
}

#[test]
fn b12_idle_connections_end_and_cost_nobody_else_anything() {
    let wire = Wire::set(&["listen.idle_timeout=500ms", "listen.max_connections=100"]);
    let mut connections: Vec<_> = (0..MANY)
        .map(|_| {
            let mut connection = wire.proxy.connect();
            connection.send(LOCAL);
            assert_eq!(connection.read_response(false).expect("an answer").status(), 204);
            connection
        })
        .collect();
    assert_eq!(wire.proxy.ask_admin("GET", "/liveness").status(), 200);
    for connection in &mut connections {
        assert!(connection.is_closed(), "an idle connection was told something");
    }
    wire.forwarded(GET);
}

#[test]
fn b12_connections_over_the_limit_are_told_so() {
    let wire = Wire::set(&["listen.max_connections=10"]);
    wire.proxy.wait_ready();
    let mut connections: Vec<_> = (0..10).map(|_| wire.proxy.connect()).collect();
    for connection in &mut connections {
        // Answered locally, and the connection stays.
        connection.send("OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(connection.read_response(false).expect("an answer").status(), 204);
    }
    for _ in 0..3 {
        let mut refused = wire.proxy.connect();
        refused.send(GET);
        let answer = refused.read_response(false).expect("an answer");
        assert_eq!((answer.status(), answer.code().as_str()), (503, "overloaded"));
        assert!(answer.header("retry-after").is_some());
        assert!(refused.is_closed());
    }
    assert_eq!(wire.proxy.ask_admin("GET", "/readiness").status(), 200);
    // One that leaves makes room.
    drop(connections.pop());
    wire.proxy.wait_until("room", |proxy| {
        let mut connection = proxy.connect();
        connection.try_send("TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n");
        connection.read_response(false).expect("an answer").status() == 405
    });
}

#[test]
fn b13_heads_over_the_limits_are_refused() {
    let wire = Wire::with(|builder| builder.env("RUST_LOG", "info"));
    wire.forwarded(GET);
    let before = wire.proxy.resident_bytes();
    let head = |target: &str, fields: &str| format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n{fields}\r\n");
    let long = |length: usize| "x".repeat(length);
    for _ in 0..10 {
        for (request, allowed) in [
            (head("/", &"X-A: 1\r\n".repeat(100)), &[431][..]),
            (head("/", &format!("X-A: {}\r\n", long(64 * 1024))), &[431]),
            (head("/", &format!("{}: 1\r\n", long(70_000))), &[431, 400]),
            (head("/", &format!("X-A: {}\r\n", long(500 * 1024))), &[431]),
            (head("/", &format!("X-A: {}\r\n", long(500)).repeat(99)), &[200]),
            (head(&format!("/{}", long(20 * 1024)), ""), &[414]),
            (head(&format!("/?{}", long(100 * 1024)), ""), &[414, 431]),
        ] {
            if allowed == [200] {
                wire.forwarded(request);
            } else {
                let answer = wire.refused(&request);
                assert!(allowed.contains(&answer.status()), "{} for {}…", answer.start, &request[..60]);
            }
        }
    }
    let grown = wire.proxy.resident_bytes().saturating_sub(before);
    assert!(grown < 8 << 20, "grew by {grown} bytes");
}

#[test]
fn b13_the_size_of_a_head_can_be_set() {
    let wire = Wire::set(&["listen.max_header_size=8KiB"]);
    let head = |length: usize| format!("GET / HTTP/1.1\r\nHost: localhost\r\nX-A: {}\r\n\r\n", "x".repeat(length));
    wire.forwarded(head(7_500));
    assert_eq!(wire.refused_and_closed(head(8_500)).status(), 431);
}

#[test]
fn bodies_over_the_limit_are_refused() {
    let wire = Wire::set(&["limits.max_request_body=10B"]);
    assert_eq!(wire.forwarded("POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n0123456789").body.len(), 10);
    assert_eq!(wire.refused("POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 11\r\n\r\n01234567890").code(), "body_too_large");
    // Without a length it shows in passing; the upstream never gets the whole.
    let endless = "6\r\n567890\r\n".repeat(100_000);
    let status =
        wire.never_completed(format!("POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n01234\r\n{endless}"));
    assert_eq!(status, Some(413));
}

/// B15: limits are those of the proxy, however the kernel spreads connections over its workers: up to them nobody is refused, beyond them everybody.
#[test]
fn b15_limits_are_those_of_all_workers_together() {
    let account = Account { email: format!("{}@example.com", canary("email")), password: canary("password") };
    let simulator = Simulator::start(Options { accounts: vec![account.clone()], ..Options::default() }).expect("a free port");
    let limits = |builder: Builder| builder.set("runtime.workers=4").set("limits.max_in_flight=20").set("listen.max_connections=40");
    let proxy = limits(Builder::to_simulator(&simulator, &account)).start();
    proxy.wait_ready();
    let held = simulator.fault(Fault::at("/inputs/", Action::Hold));
    let mut connections: Vec<_> = (0..40).map(|_| proxy.connect()).collect();
    for connection in &mut connections[..20] {
        connection.send("GET /inputs/ HTTP/1.1\r\nHost: localhost\r\n\r\n");
    }
    let arrived = |requests: &[Received]| requests.iter().filter(|request| request.path() == "/inputs/").count();
    simulator.wait_for(|requests| arrived(requests) == 20, PATIENCE).expect("none is shed");
    for connection in &mut connections[20..] {
        connection.send("GET /inputs/ HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(connection.read_response(false).expect("an answer").code(), "overloaded");
    }
    assert_eq!(proxy.connect().read_response(false).expect("an answer").code(), "overloaded");
    assert_eq!(proxy.metric("upsolver_auth_proxy_errors_total{code=\"overloaded\"}"), 21.0);
    simulator.remove_fault(held);
    for connection in &mut connections[..20] {
        assert_eq!(connection.read_response(false).expect("an answer").status(), 200);
    }
    // Over, and at once.
    proxy.wait_until("rest", |proxy| proxy.status()["requests_in_flight"] == 0);
    for connection in &mut connections {
        connection.send("GET /inputs/ HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(connection.read_response(false).expect("an answer").status(), 200);
    }
}

/// Whatever the proxy refuses is counted, though it never was a request.
#[test]
fn b15_what_is_no_request_is_counted_too() {
    let wire = Wire::set(&["listen.header_timeout=300ms", "listen.max_header_size=256KiB"]);
    let long = |target: usize, field: usize| {
        format!("GET /{} HTTP/1.1\r\nHost: localhost\r\nX-A: {}\r\n\r\n", "x".repeat(target), "x".repeat(field))
    };
    for (bytes, status, code) in [
        ("GET / HTT".to_owned(), 408, "request_timeout"),
        ("GET / HTTP/1.1\r\nHost : localhost\r\n\r\n".to_owned(), 400, "bad_request"),
        (long(0, 300_000), 431, "headers_too_large"),
        (long(70_000, 0), 414, "uri_too_long"),
    ] {
        let mut connection = wire.proxy.connect();
        connection.try_send(bytes);
        assert_eq!(connection.read_response(false).expect("an answer").status(), status);
        let refused = format!("upsolver_auth_proxy_requests_total{{method=\"other\",status=\"{status}\",source=\"proxy\"}}");
        wire.proxy.wait_until("the count", |proxy| proxy.metric(&refused) == 1.0);
        assert_eq!(wire.proxy.metric(&format!("upsolver_auth_proxy_errors_total{{code=\"{code}\"}}")), 1.0);
    }
}

#[test]
fn b15_requests_over_the_limit_are_shed_at_once() {
    let wire = Wire::set(&["limits.max_in_flight=4"]);
    let mut parked: Vec<_> = (0..4)
        .map(|_| {
            let mut downstream = wire.proxy.connect();
            downstream.send(GET);
            let mut upstream = wire.upstream.accept();
            upstream.read_request().expect("a request");
            (downstream, upstream)
        })
        .collect();
    for _ in 0..MANY {
        let answer = wire.refused(GET);
        assert_eq!((answer.status(), answer.code().as_str()), (503, "overloaded"));
        assert!(answer.header("retry-after").is_some_and(|seconds| seconds.parse::<u32>().is_ok()), "{answer:?}");
    }
    assert_eq!(wire.proxy.ask_admin("GET", "/readiness").status(), 200);
    for (downstream, upstream) in &mut parked {
        upstream.send(OK_KEPT);
        assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
    }
    wire.proxy.wait_until("room", |proxy| proxy.status()["requests_in_flight"] == 0);
    let mut downstream = wire.proxy.connect();
    downstream.send(GET);
    // On one of the connections that were kept.
    let (_, upstream) = parked.last_mut().expect("four");
    upstream.read_request().expect("a request");
    upstream.send(OK_KEPT);
    assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
}
