//! The proxy and its upstream with a bad network between them: later, slower, in pieces, and not at all, but never wrong.

use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use upsolver_auth_proxy::simulator::{Account, Options, Protocols, Simulator, byte_at};

use crate::support::link::{Accident, Conditions, Link};
use crate::support::proxy::{Builder, Proxy, canary};
use crate::support::raw::Message;

/// Apps at a time.
const APPS: u32 = 6;

fn start(protocols: Protocols, settings: &[&str]) -> (Simulator, Link, Proxy) {
    let account = Account { email: format!("{}@example.com", canary("email")), password: canary("password") };
    let simulator = Simulator::start(Options { accounts: vec![account.clone()], protocols, ..Options::default() }).expect("a free port");
    let link = Link::to(simulator.address());
    let version = if protocols == Protocols::Http2 { "2" } else { "1.1" };
    let builder = Builder::to_simulator(&simulator, &account)
        .env("RUST_LOG", "info")
        .set(link.setting())
        .set(format!("upstream.http_version={version}"))
        // A connection keeps the network that it began with.
        .set("upstream.pool_idle_timeout=50ms");
    let proxy = settings.iter().fold(builder, |builder, setting| builder.set(*setting)).start();
    proxy.wait_ready();
    (simulator, link, proxy)
}

/// Sets the network, for connections from then on, and lets those of before end.
fn under(link: &Link, proxy: &Proxy, conditions: Conditions) {
    link.set(conditions);
    proxy.wait_until("the old connections to end", |proxy| {
        let open = |state| proxy.metric(&format!("upsolver_auth_proxy_upstream_connections{{state=\"{state}\"}}"));
        open("idle") + open("active") == 0.0
    });
}

/// Nothing where the connection ended before the reply's head.
fn ask(proxy: &Proxy, request: &[u8]) -> Option<Message> {
    let mut connection = proxy.connect();
    connection.try_send(request);
    connection.read_response(false)
}

/// Downloads in both framings and echoes of uploads: how many came whole. What came must be right, and what did not must show it.
fn converse(proxy: &Proxy, rounds: u32) -> u32 {
    let whole = AtomicU32::new(0);
    thread::scope(|scope| {
        for app in 0..APPS {
            let whole = &whole;
            scope.spawn(move || {
                for round in 0..rounds {
                    let length = fastrand::usize(..20_000);
                    let pattern: Vec<u8> = (0..length as u64).map(byte_at).collect();
                    let (request, expected) = match round % 3 {
                        0 => (format!("GET /bytes/{length} HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes(), pattern),
                        1 => (format!("GET /bytes/{length}?framing=chunked HTTP/1.1\r\nHost: localhost\r\n\r\n").into_bytes(), pattern),
                        _ => {
                            let body = [format!("{app} {round} ").as_bytes(), &pattern].concat();
                            let head = format!("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n", body.len());
                            ([head.as_bytes(), &body].concat(), body)
                        }
                    };
                    match ask(proxy, &request) {
                        Some(answer) if answer.status() == 200 && answer.complete => {
                            assert!(answer.body == expected, "app {app}, round {round}: {} bytes are wrong", answer.body.len());
                            whole.fetch_add(1, Ordering::Relaxed);
                        }
                        Some(answer) if answer.status() == 200 => assert!(expected.starts_with(&answer.body), "a part that is wrong"),
                        Some(answer) => assert!(
                            matches!(
                                (answer.status(), answer.code().as_str()),
                                (502, "upstream_protocol" | "upstream_unreachable") | (504, "upstream_timeout")
                            ),
                            "{answer:?}"
                        ),
                        None => {}
                    }
                }
            });
        }
    });
    whole.into_inner()
}

/// D28: high latency with jitter, a thin pipe and tiny segments cost time and nothing else.
#[test]
fn d28_d27_a_slow_network_makes_no_answer_wrong() {
    for protocols in [Protocols::Http1, Protocols::Http2] {
        let (_simulator, link, proxy) = start(protocols, &[]);
        let milliseconds = Duration::from_millis;
        for conditions in [
            Conditions { delay: milliseconds(50), jitter: milliseconds(50), ..Conditions::default() },
            Conditions { bytes_per_second: 200_000, ..Conditions::default() },
            Conditions { segment: 40, ..Conditions::default() },
            Conditions { segment: 1, ..Conditions::default() },
        ] {
            let name = format!("{protocols:?} {conditions:?}");
            under(&link, &proxy, conditions);
            assert_eq!(converse(&proxy, 3), 3 * APPS, "{name}");
        }
    }
}

/// D28, D15, D16: connections that break anywhere, in the handshake, in a head, in a body, break their exchanges and no other, and never look whole.
#[test]
fn d28_d15_d16_a_network_that_breaks_connections_makes_no_answer_wrong() {
    for protocols in [Protocols::Http1, Protocols::Http2] {
        let (_simulator, link, proxy) = start(protocols, &[]);
        let mut whole = 0;
        for accident in [Accident::Reset, Accident::Fin] {
            for at in [0, 300, 1_500, 3_000, 6_000, 15_000] {
                under(&link, &proxy, Conditions { after: Some((at, accident)), segment: 2_000, ..Conditions::default() });
                whole += converse(&proxy, 3);
            }
        }
        assert!(whole > 0 && whole < 2 * 6 * 3 * APPS, "{protocols:?}: {whole} came whole, so nothing is shown");
        under(&link, &proxy, Conditions::default());
        assert_eq!(converse(&proxy, 3), 3 * APPS, "{protocols:?}: it does not heal");
        proxy.wait_until("rest", |proxy| proxy.status()["requests_in_flight"] == 0);
    }
}

/// D20, D21: a network that goes silent in the middle is given up; one that stalls and comes back is waited for.
#[test]
fn d20_d21_silence_is_given_up_and_a_stall_is_waited_for() {
    for protocols in [Protocols::Http1, Protocols::Http2] {
        let (_simulator, link, proxy) = start(protocols, &["upstream.response_timeout=400ms", "upstream.body_idle_timeout=400ms"]);
        let silent = |at| Conditions { after: Some((at, Accident::Silence)), ..Conditions::default() };
        // Behind the handshake and the request, which take less; and in the body.
        for at in [8_000, 30_000] {
            under(&link, &proxy, silent(at));
            match ask(&proxy, b"GET /bytes/200000 HTTP/1.1\r\nHost: localhost\r\n\r\n") {
                Some(answer) if answer.status() == 200 => assert!(!answer.complete, "{protocols:?} {at}"),
                answer => assert!(answer.is_none_or(|answer| answer.status() == 504), "{protocols:?} {at}"),
            }
            link.set(Conditions::default());
        }
        let (_simulator, link, proxy) = start(protocols, &[]);
        under(&link, &proxy, Conditions { after: Some((20_000, Accident::Stall(Duration::from_millis(500)))), ..Conditions::default() });
        let answer = proxy.get("/bytes/200000");
        assert!(answer.status() == 200 && answer.complete && answer.body.len() == 200_000, "{protocols:?}");
    }
}
