//! Sentences of the documented behaviour that no other module holds, each mended after it was found broken from outside.

use upsolver_auth_proxy::simulator::{Account, Options, Simulator};

use crate::support::proxy::{Builder, canary};
use crate::support::raw::{ClosedPort, Message, RawUpstream};
use crate::support::wire::{GET, Wire};

fn account() -> Account {
    Account { email: canary("email"), password: canary("password") }
}

/// B46: `POST /token/refresh` is open to every local process; it must not get the account locked.
#[test]
fn b46_refresh_does_not_present_rejected_credentials_again() {
    let simulator = Simulator::start(Options { accounts: vec![account()], ..Options::default() }).expect("a free port");
    let proxy = Builder::to_simulator(&simulator, &account()).start();
    proxy.wait_for_log("rejected the credentials");
    for _ in 0..20 {
        let answer = proxy.ask_admin("POST", "/token/refresh");
        assert_eq!(answer.status(), 429, "{answer:?}");
        let seconds: u64 = answer.header("retry-after").and_then(|value| value.parse().ok()).expect("seconds");
        assert!((1..=60).contains(&seconds), "{seconds}");
        assert!(answer.text().contains("rejected the credentials"), "{answer:?}");
    }
    let presented = simulator.requests().iter().filter(|request| request.path().starts_with("/api-tokens")).count();
    assert_eq!(presented, 1, "one presentation of the wrong password");
}

/// `listen.caller_token_file` changes live, without a reload; a file that is emptied leaves the last content in force.
#[test]
fn the_caller_token_follows_its_file() {
    let account = account();
    let simulator = Simulator::start(Options { accounts: vec![account.clone()], ..Options::default() }).expect("a free port");
    let builder = Builder::to_simulator(&simulator, &account);
    let (first, second) = (canary("first"), canary("second"));
    let file = builder.file("caller", &first);
    let proxy = builder.secret(&first).secret(&second).set(format!("listen.caller_token_file={}", file.display())).start();
    proxy.wait_ready();
    let asks = |token: &str| {
        proxy
            .exchange(format!(
                "GET /inputs/ HTTP/1.1\r\nHost: localhost\r\nX-Upsolver-Auth-Proxy-Token: {token}\r\nConnection: close\r\n\r\n"
            ))
            .status()
    };
    assert_eq!((asks(&first), asks(&second)), (200, 400));
    std::fs::write(&file, "").expect("a writable directory");
    std::fs::write(&file, &second).expect("a writable directory");
    proxy.wait_until("the new caller token", |_| asks(&second) == 200);
    assert_eq!(asks(&first), 400);
}

/// A31: a body whose chunks are broken is the request's fault, and is said so.
#[test]
fn a31_broken_chunks_are_a_bad_request() {
    let upstream = RawUpstream::start();
    let proxy = Builder::to_raw(&upstream, &canary("token")).start();
    proxy.wait_ready();
    for chunk in ["zz\r\n", "FFFFFFFFFFFFFFFFF\r\n", "5\r\nabcdeXX"] {
        let answer = proxy.exchange(format!("POST /x HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n{chunk}"));
        assert_eq!((answer.status(), answer.code().as_str()), (400, "bad_request"), "{chunk:?}");
    }
}

/// B49: `proxy-status` names the registered error type (RFC 9209 section 2.3) that says what happened.
#[test]
fn b49_the_error_type_says_what_happened() {
    let error_type =
        |answer: &Message| answer.header("proxy-status").and_then(|value| value.split_once("error=")).map(|(_, name)| name.to_owned());
    let nobody = ClosedPort::reserve();
    let silent = RawUpstream::start();
    let simulator = Simulator::start(Options { accounts: vec![account()], ..Options::default() }).expect("a free port");
    for (settings, status, expected) in [
        (vec![format!("upstream.url=http://{}", nobody.address())], 502, "connection_refused"),
        (vec!["upstream.url=https://upsolver.invalid".to_owned()], 502, "dns_error"),
        (vec![format!("upstream.url={}", simulator.url())], 502, "tls_certificate_error"),
        (
            vec![format!("upstream.url=https://{}", silent.address()), "upstream.connect_timeout=200ms".to_owned()],
            504,
            "connection_timeout",
        ),
    ] {
        let builder = settings.iter().fold(Builder::to_raw(&silent, &canary("token")), Builder::set);
        let answer = builder.start().get("/x");
        assert_eq!((answer.status(), error_type(&answer).as_deref()), (status, Some(expected)), "{settings:?}");
    }
    let wire = Wire::set(&["upstream.response_timeout=200ms"]);
    for (reply, status, expected) in [
        (Some(""), 502, "connection_terminated"),
        (Some("HTTP/1.1 200 OK\r\nContent-Le"), 502, "connection_terminated"),
        (Some("nonsense\r\n\r\n"), 502, "http_protocol_error"),
        (Some("HTTP/1.1 200 OK\r\nContent-Length: 1, 2\r\n\r\n"), 502, "http_protocol_error"),
        (None, 504, "http_response_timeout"),
    ] {
        let mut downstream = wire.proxy.connect();
        downstream.send(GET);
        let mut upstream = wire.upstream.accept();
        upstream.read_request().expect("a request");
        if let Some(reply) = reply {
            upstream.send(reply).half_close();
        }
        let answer = downstream.read_response(false).expect("an answer");
        assert_eq!((answer.status(), error_type(&answer).as_deref()), (status, Some(expected)), "{reply:?}");
    }
}

/// B05: an app that closes its sending side in the middle of its body is told so, with a documented code, and nothing more is taken on the connection.
#[test]
fn b05_a_body_that_ends_early_is_a_bad_request() {
    let wire = Wire::start();
    let mut downstream = wire.proxy.connect();
    downstream.send("POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc").half_close();
    let answer = downstream.read_response(false).expect("an answer");
    assert_eq!((answer.status(), answer.code().as_str(), answer.header("connection")), (400, "bad_request", Some("close")), "{answer:?}");
}
