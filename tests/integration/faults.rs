//! Group D: what the network and the upstream can do to a request, over TLS against the simulated API.

use std::io::Read;
use std::thread;
use std::time::{Duration, Instant};

use upsolver_auth_proxy::simulator::certificates::Variant;
use upsolver_auth_proxy::simulator::{Account, Action, End, Fault, Greeting, Options, Protocols, Simulator, Transport, byte_at};

use crate::support::proxy::{Builder, Proxy, canary, long_or};
use crate::support::raw::{ClosedPort, PATIENCE};

fn account() -> Account {
    Account { email: format!("{}@example.com", canary("email")), password: canary("password") }
}

fn start(protocols: Protocols, adjust: impl FnOnce(Builder) -> Builder) -> (Simulator, Proxy) {
    let account = account();
    let options = Options { accounts: vec![account.clone()], protocols, ..Options::default() };
    let simulator = Simulator::start(options).expect("a free port");
    let version = match protocols {
        Protocols::Http1 => "1.1",
        Protocols::Http2 => "2",
        Protocols::Both => "auto",
    };
    let proxy = adjust(Builder::to_simulator(&simulator, &account).set(format!("upstream.http_version={version}"))).start();
    proxy.wait_ready();
    (simulator, proxy)
}

const VERSIONS: [Protocols; 3] = [Protocols::Http1, Protocols::Http2, Protocols::Both];

#[test]
fn d32_bodies_stream_both_ways_with_every_protocol() {
    for protocols in VERSIONS {
        let (simulator, proxy) = start(protocols, |builder| builder);
        let answer = proxy.get("/bytes/3000000");
        assert!(answer.complete && answer.body.len() == 3_000_000, "{protocols:?}");
        assert!(answer.body.iter().enumerate().all(|(i, byte)| *byte == byte_at(i as u64)), "{protocols:?}: byte for byte");
        let answer = proxy.get("/bytes/300000?framing=chunked");
        assert!(answer.complete && answer.body.len() == 300_000, "{protocols:?}");
        let body = vec![b'x'; 200_000];
        let mut connection = proxy.connect();
        connection.send("POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
        for chunk in body.chunks(5000) {
            connection.send(format!("{:x}\r\n", chunk.len())).send(chunk).send("\r\n");
        }
        connection.send("0\r\n\r\n");
        let answer = connection.read_response(false).expect("an answer");
        assert!(answer.status() == 200 && answer.body == body, "{protocols:?}");
        assert!(simulator.requests().iter().all(|request| request.complete));
    }
}

#[test]
fn d01_d05_d06_what_keeps_a_connection_from_coming_up_has_its_own_code() {
    let unreachable = |set: &str| {
        let builder = Builder::new().set(set);
        let file = builder.file("token", "sometoken");
        builder.set(format!("credentials.token_file={}", file.display())).set("upstream.connect_timeout=300ms").start()
    };
    // D01
    let answer = unreachable("upstream.url=https://no-such-host.invalid").get("/");
    assert!(matches!((answer.status(), answer.code().as_str()), (502, "upstream_unreachable") | (504, "upstream_timeout")), "{answer:?}");
    // D05: nobody listens.
    let closed = ClosedPort::reserve();
    let answer = unreachable(&format!("upstream.url=https://{}", closed.address())).get("/");
    assert_eq!((answer.status(), answer.code().as_str()), (502, "upstream_unreachable"));
    assert!(
        answer
            .header("proxy-status")
            .is_some_and(|value| value.contains("connection_refused") || value.contains("destination_unavailable"))
    );
    // D06, a stalled handshake
    let simulator = Simulator::start(Options::default()).expect("a free port");
    simulator.greet(Greeting::Silence);
    let answer = unreachable(&format!("upstream.url={}", simulator.url())).get("/");
    assert_eq!((answer.status(), answer.code().as_str()), (504, "upstream_timeout"));
}

#[test]
fn b51_d06_no_bad_certificate_is_trusted_and_nothing_is_sent_in_plain() {
    for variant in [Variant::Expired, Variant::NotYetValid, Variant::WrongName, Variant::SelfSigned, Variant::UnknownAuthority] {
        let simulator = Simulator::start(Options { transport: Transport::Tls(variant), ..Options::default() }).expect("a free port");
        let builder = Builder::to_simulator_without_credentials(&simulator);
        let file = builder.file("token", "sometoken");
        let proxy = builder.set(format!("credentials.token_file={}", file.display())).start();
        let answer = proxy.get("/inputs/");
        assert_eq!((answer.status(), answer.code().as_str()), (502, "upstream_tls"), "{variant:?}");
        assert!(!answer.text().contains("ertificate expired"), "no detail for the downstream: {}", answer.text());
        assert_eq!(simulator.requests().len(), 0, "{variant:?}");
        let line = proxy.wait_for_log("upstream_tls");
        assert!(line.contains("ertificate"), "full detail in the log: {line}");
    }
}

/// D15 to D19: a body that breaks off upstream breaks off downstream, in either framing and protocol, whatever the way it breaks.
#[test]
fn d15_d16_d17_d18_a_cut_body_is_cut_downstream() {
    for protocols in [Protocols::Http1, Protocols::Http2] {
        let (simulator, proxy) = start(protocols, |builder| builder);
        for end in [End::Fin, End::Reset, End::Close] {
            for path in ["/bytes/500000", "/bytes/500000?framing=chunked"] {
                simulator.fault(Fault::below("/bytes", Action::Cut(upsolver_auth_proxy::simulator::Point::Body(100_000), end)).once());
                let mut connection = proxy.connect();
                connection.send(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
                match connection.read_response(false) {
                    Some(answer) if answer.status() == 502 => {}
                    Some(answer) => {
                        assert_eq!(answer.status(), 200);
                        assert!(!answer.complete, "{protocols:?} {end:?} {path}: {} bytes look complete", answer.body.len());
                    }
                    None => {}
                }
            }
        }
        assert_eq!(proxy.get("/bytes/10").status(), 200, "the next request is fine");
    }
}

#[test]
fn d18_a_close_delimited_reply_without_close_notify_is_truncated() {
    let (simulator, proxy) = start(Protocols::Http1, |builder| builder);
    let reply = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhalf of it";
    simulator.fault(Fault::at("/cut", Action::Raw(reply.to_vec(), End::Fin)));
    simulator.fault(Fault::at("/whole", Action::Raw(reply.to_vec(), End::Close)));
    let answer = proxy.get("/whole");
    assert!(answer.complete && answer.text() == "half of it", "{answer:?}");
    let mut connection = proxy.connect();
    connection.send("GET /cut HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let answer = connection.read_response(false);
    assert!(answer.is_none_or(|answer| !answer.complete), "a truncated reply looks complete");
}

#[test]
fn d20_d21_an_upstream_that_goes_silent_is_given_up() {
    let (simulator, proxy) =
        start(Protocols::Http1, |builder| builder.set("upstream.response_timeout=200ms").set("upstream.body_idle_timeout=200ms"));
    simulator.fault(Fault::at("/hang", Action::hang_after_body()));
    let answer = proxy.get("/hang");
    assert_eq!((answer.status(), answer.code().as_str()), (504, "upstream_timeout"));
    simulator.fault(Fault::below("/bytes", Action::stall_body(1000)).once());
    let answer = proxy.get("/bytes/5000");
    assert!(answer.status() == 200 && !answer.complete);
    // The slot is free again and the stalled connection gone.
    assert_eq!(proxy.get("/bytes/10").status(), 200);
    proxy.wait_until("in-flight back to zero", |proxy| proxy.status()["requests_in_flight"] == 0);
}

/// D21: a long response that keeps moving lives, though it takes much longer than the idle timeout.
#[test]
fn d21_a_slow_but_moving_body_lives() {
    let (_simulator, proxy) = start(Protocols::Http1, |builder| builder.set("upstream.body_idle_timeout=1s"));
    let answer = proxy.get("/slow/15?every=100");
    assert!(answer.status() == 200 && answer.complete, "{answer:?}");
}

#[test]
fn d24_a_downstream_that_leaves_cancels_its_exchange_upstream() {
    let (simulator, proxy) = start(Protocols::Http1, |builder| builder);
    let open = simulator.counters().open;
    simulator.fault(Fault::at("/hang", Action::hang_after_body()));
    let mut connection = proxy.connect();
    connection.send("GET /hang HTTP/1.1\r\nHost: localhost\r\n\r\n");
    simulator.wait_for(|requests| requests.iter().any(|request| request.path() == "/hang"), PATIENCE).expect("it was forwarded");
    drop(connection);
    simulator.wait_for_connections(|counters| counters.open <= open, PATIENCE).expect("the connection upstream closes");
    // During an upload, and in the middle of a reply.
    let mut connection = proxy.connect();
    connection.send("POST /sink HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nonly this");
    simulator.wait_for(|requests| requests.iter().any(|request| request.path() == "/sink"), PATIENCE).expect("it was forwarded");
    drop(connection);
    simulator.wait_for_connections(|counters| counters.open <= open, PATIENCE).expect("the connection upstream closes");
    let sink = simulator.requests().into_iter().find(|request| request.path() == "/sink").expect("recorded");
    assert!(!sink.complete, "an aborted upload is never completed");
    let mut connection = proxy.connect();
    connection.send("GET /slow/1000?every=10 HTTP/1.1\r\nHost: localhost\r\n\r\n");
    connection.read_head().expect("the reply began");
    connection.reset();
    simulator.wait_for_connections(|counters| counters.open <= open, PATIENCE).expect("the connection upstream closes");
    assert_eq!(proxy.get("/inputs/").status(), 200);
    proxy.wait_until("in-flight back to zero", |proxy| proxy.status()["requests_in_flight"] == 0);
}

/// D09, D34: an upstream that closes idle connections; a GET never notices.
#[test]
fn d09_d34_polling_across_idle_closes_has_no_errors() {
    for protocols in [Protocols::Http1, Protocols::Http2] {
        let (simulator, proxy) = start(protocols, |builder| builder);
        // Long enough for a new connection to get its first request on a busy machine.
        simulator.idle_timeout(Duration::from_millis(100));
        let mut connection = proxy.connect();
        for round in 0..30 {
            connection.send("GET /inputs/ HTTP/1.1\r\nHost: localhost\r\n\r\n");
            let answer = connection.read_response(false).expect("an answer");
            assert_eq!(answer.status(), 200, "{protocols:?} round {round}: {answer:?}");
            // Around the moment at which the upstream closes.
            thread::sleep(Duration::from_millis(95 + round % 10));
        }
    }
}

/// When and how an app of the next test asks.
struct Poller {
    method: &'static str,
    /// Between two requests.
    every: Duration,
    /// Requests at a time, each on a connection of its own.
    at_once: u32,
}

/// What became of one app's requests.
#[derive(Debug, Default)]
struct Polled {
    asked: u32,
    /// Target and answer of those that failed.
    failed: Vec<(String, String)>,
}

impl Poller {
    fn run(&self, proxy: &Proxy, until: Instant) -> Polled {
        let mut polled = Polled::default();
        let mut connections: Vec<_> = (0..self.at_once).map(|_| proxy.connect()).collect();
        while Instant::now() < until {
            let targets: Vec<_> = connections.iter().map(|_| format!("/sink?{}", canary(""))).collect();
            for (connection, target) in connections.iter_mut().zip(&targets) {
                match self.method {
                    "GET" => connection.send(format!("GET {} HTTP/1.1\r\nHost: localhost\r\n\r\n", target.replace("sink", "inputs"))),
                    _ => connection.send(format!("POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nbody")),
                };
            }
            for (connection, target) in connections.iter_mut().zip(targets) {
                let answer = connection.read_response(false).expect("an answer");
                polled.asked += 1;
                if answer.status() != 200 {
                    polled.failed.push((target, format!("{} {}", answer.status(), answer.code())));
                }
            }
            // Around the moment at which the upstream closes, where that is after `every`.
            thread::sleep(self.every + Duration::from_millis(fastrand::u64(..8)));
        }
        polled
    }
}

/// D34, D10: apps that poll, some of them just when the upstream closes what idles. A GET never fails. A POST fails only where the upstream closed the
/// connection while the POST was on its way, so that it was not processed, which the proxy cannot know: 502, and it is not sent again.
///
/// With `UPSOLVER_LONG=1`: an app that asks every 100 ms, for minutes, and an upstream that closes after 5 s.
#[test]
fn d34_d10_polling_across_idle_closes() {
    let (idle, every, duration) = long_or((5_000, 100, 240), (100, 10, 4));
    let (idle, every, duration) = (Duration::from_millis(idle), Duration::from_millis(every), Duration::from_secs(duration));
    let (simulator, proxy) = start(Protocols::Http1, |builder| builder.env("RUST_LOG", "info"));
    simulator.idle_timeout(idle);
    let close = idle.saturating_sub(Duration::from_millis(4));
    let pollers = [
        Poller { method: "GET", every, at_once: 1 },
        Poller { method: "POST", every, at_once: 1 },
        Poller { method: "GET", every: close, at_once: 8 },
        Poller { method: "POST", every: close, at_once: 8 },
    ];
    let until = Instant::now() + duration;
    let results = thread::scope(|scope| {
        let proxy = &proxy;
        let apps: Vec<_> = pollers.iter().map(|poller| scope.spawn(move || poller.run(proxy, until))).collect();
        apps.into_iter().map(|app| app.join().expect("every request is answered")).collect::<Vec<_>>()
    });
    let processed = simulator.requests();
    for (poller, polled) in pollers.iter().zip(&results) {
        eprintln!("{} every {:?}: {} asked, {} failed", poller.method, poller.every, polled.asked, polled.failed.len());
        assert!(polled.asked > 0);
        assert!(poller.method != "GET" || polled.failed.is_empty(), "{:?}", polled.failed);
        for (target, answer) in &polled.failed {
            assert_eq!(answer, "502 upstream_protocol");
            assert!(processed.iter().all(|request| request.target != *target), "{target} was processed, or sent again");
        }
    }
}

/// D10: with a pool that gives its connections up before the upstream does, as by default and behind any load balancer, no POST fails either.
#[test]
fn d10_a_pool_that_closes_first_costs_no_post() {
    let (simulator, proxy) = start(Protocols::Http1, |builder| builder.set("upstream.pool_idle_timeout=100ms").env("RUST_LOG", "info"));
    // So far behind that no machine is slow enough to matter.
    let idle = Duration::from_secs(5);
    simulator.idle_timeout(idle);
    let until = Instant::now() + long_or(Duration::from_mins(2), Duration::from_secs(2));
    let poller = Poller { method: "POST", every: Duration::from_millis(96), at_once: 8 };
    let results = poller.run(&proxy, until);
    eprintln!("POST every {:?}: {} asked, {} failed", poller.every, results.asked, results.failed.len());
    assert_eq!(results.failed, []);
}

#[test]
fn d30_errors_of_the_api_are_relayed_and_never_retried() {
    let (simulator, proxy) = start(Protocols::Http1, |builder| builder);
    for status in [429, 500, 502, 503, 504] {
        let path = format!("/status/{status}");
        let fault = simulator.fault(Fault::at(&path, Action::json(status, "{\"clazz\":\"X\"}")));
        let answer = proxy.get(&path);
        assert_eq!((answer.status(), answer.text().as_str()), (status, "{\"clazz\":\"X\"}"));
        assert_eq!(simulator.strikes(fault), 1);
    }
}

#[test]
fn d29_an_outage_heals_without_a_restart_and_readiness_stays() {
    let (simulator, proxy) = start(Protocols::Http1, |builder| builder);
    simulator.refuse_connections(true);
    simulator.end_connections(End::Reset);
    // A connection that was on its way when the listener closed is neither refused nor accepted, and times out.
    let answer = proxy.get("/inputs/");
    assert!(matches!((answer.status(), answer.code().as_str()), (502, "upstream_unreachable") | (504, "upstream_timeout")), "{answer:?}");
    assert_eq!(proxy.ask_admin("GET", "/readiness").status(), 200, "a token in hand keeps it ready");
    assert_eq!(proxy.ask_admin("GET", "/liveness").status(), 200);
    simulator.refuse_connections(false);
    proxy.wait_until("the first answer", |proxy| proxy.get("/inputs/").status() == 200);
    assert_eq!(simulator.mints().len(), 1);
}

/// D25, B11: a downstream that does not read is a matter of buffers, not of memory.
#[test]
fn d25_b11_a_stalled_reader_holds_little_memory_and_is_cut() {
    let (_simulator, proxy) = start(Protocols::Http1, |builder| builder.set("upstream.body_idle_timeout=2s").env("RUST_LOG", "info"));
    proxy.get("/bytes/5000000");
    let before = proxy.resident_bytes();
    let mut connections: Vec<_> = (0..8).map(|_| proxy.connect()).collect();
    for connection in &mut connections {
        connection.send("GET /bytes/200000000 HTTP/1.1\r\nHost: localhost\r\n\r\n");
        connection.read_head().expect("the reply begins");
    }
    proxy.wait_until("the stalled exchanges to be cut", |proxy| proxy.status()["requests_in_flight"] == 0);
    let grown = proxy.resident_bytes().saturating_sub(before);
    assert!(grown < 8 * 2 * 1024 * 1024, "grew by {grown} bytes for 8 stalled readers");
}

/// Issue "One command": a large body up and down with flat memory. A gibibyte with `UPSOLVER_BIG=1`, else 64 MiB.
#[test]
fn d26_large_bodies_stream_with_flat_memory() {
    let size: u64 = if std::env::var_os("UPSOLVER_BIG").is_some() { 1 << 30 } else { 64 << 20 };
    let account = account();
    let options = Options { accounts: vec![account.clone()], record: false, ..Options::default() };
    let simulator = Simulator::start(options).expect("a free port");
    let proxy = Builder::to_simulator(&simulator, &account).env("RUST_LOG", "info").start();
    proxy.wait_ready();
    proxy.get("/bytes/5000000");
    let before = proxy.resident_bytes();
    let mut connection = proxy.connect();
    connection.send(format!("GET /bytes/{size} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"));
    let head = connection.read_head().expect("a reply");
    assert_eq!(head.header("content-length"), Some(size.to_string().as_str()));
    let mut read = connection.take(0).len() as u64;
    let mut chunk = vec![0; 1 << 16];
    loop {
        let part = connection.take_some(&mut chunk);
        if part == 0 {
            break;
        }
        read += part as u64;
    }
    assert_eq!(read, size);
    let mut connection = proxy.connect();
    connection.send(format!("POST /sink HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"));
    let block = vec![7; 1 << 20];
    for _ in 0..size >> 20 {
        connection.send(&block);
    }
    let answer = connection.read_response(false).expect("an answer");
    assert!(answer.text().contains(&size.to_string()), "{}", answer.text());
    let grown = proxy.resident_bytes().saturating_sub(before);
    assert!(grown < 16 << 20, "grew by {grown} bytes");
}

/// A connection that waits for its reply can be told from one that left only by reading; used by the tests above through `Raw`.
#[test]
fn a51_a_half_closed_downstream_still_gets_its_reply() {
    let (_simulator, proxy) = start(Protocols::Http1, |builder| builder);
    let mut connection = proxy.connect();
    connection.send("GET /bytes/2000000 HTTP/1.1\r\nHost: localhost\r\n\r\n");
    connection.half_close();
    let answer = connection.read_response(false).expect("a reply");
    assert!(answer.complete && answer.body.len() == 2_000_000);
    let mut rest = Vec::new();
    assert_eq!(connection.stream().try_clone().expect("a socket").read_to_end(&mut rest).ok(), Some(0), "and the connection closes");
}

/// A connection that is not needed any more is closed in order, so that no upstream has to log that a request may have been cut off (RFC 8446 section 6.1).
#[test]
fn d18_what_is_idle_ends_with_a_close_notify() {
    for protocols in VERSIONS {
        for (ends, settings) in
            [("idles too long", "upstream.pool_idle_timeout=100ms"), ("the proxy stops", "upstream.pool_idle_timeout=1h")]
        {
            let (simulator, mut proxy) = start(protocols, |builder| builder.set(settings));
            assert_eq!(proxy.get("/inputs/").status(), 200);
            if settings.ends_with("1h") {
                proxy.stop();
            }
            let counters = simulator.wait_for_connections(|counters| counters.open == 0, PATIENCE).expect("it closes");
            assert_eq!(counters.cut, 0, "{protocols:?}, {ends}: {counters:?}");
        }
    }
}
