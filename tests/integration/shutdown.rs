//! From the signal to the exit status (contract sections 2 and 3, `[shutdown]`): what goes on, what is refused, what is cut, and how the next start goes.

use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use upsolver_auth_proxy::simulator::{Account, Action, Fault, Options, Simulator};

use crate::support::proxy::{Builder, Proxy, canary};
use crate::support::raw::{Message, PATIENCE, Raw};
use crate::support::wire::{GET, LOCAL, OK, OK_KEPT, Wire};

/// The first part of a reply whose end nobody sends unless the test does.
const STREAMING: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n";

fn account() -> Account {
    Account { email: format!("{}@example.com", canary("email")), password: canary("password") }
}

fn simulator(account: &Account) -> Simulator {
    Simulator::start(Options { accounts: vec![account.clone()], ..Options::default() }).expect("a free port")
}

/// A request that the upstream holds: both ends of its way.
fn in_flight(wire: &Wire) -> (Raw, Raw) {
    let mut downstream = wire.proxy.connect();
    downstream.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    (downstream, upstream)
}

/// A request whose reply has begun.
fn streaming(wire: &Wire) -> (Raw, Raw) {
    let (mut downstream, mut upstream) = in_flight(wire);
    upstream.send(STREAMING);
    downstream.read_head().expect("the reply begins");
    (downstream, upstream)
}

/// A connection that was used and waits for its next request.
fn idle(proxy: &Proxy) -> Raw {
    let mut connection = proxy.connect();
    connection.send(LOCAL);
    assert_eq!(connection.read_response(false).expect("an answer").status(), 204);
    connection
}

fn refuses_connections(address: SocketAddr) -> bool {
    TcpStream::connect(address).is_err()
}

/// C44: idle connections close, the listener closes, and everything in flight gets to its end: streaming replies, a request that was not answered yet,
/// an upload that is half done.
#[test]
fn c44_what_is_in_flight_finishes_and_idle_connections_close() {
    let mut wire = Wire::set(&["shutdown.drain_timeout=60s"]);
    let mut replies: Vec<_> = (0..50).map(|_| streaming(&wire)).collect();
    let mut idlers: Vec<_> = (0..20).map(|_| idle(&wire.proxy)).collect();
    let mut fresh = wire.proxy.connect();
    let (mut unanswered, mut its_upstream) = in_flight(&wire);
    let mut uploading = wire.proxy.connect();
    uploading.send("POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\nfirst");
    let mut upload_upstream = wire.upstream.accept();
    let head = upload_upstream.read_head().expect("a request");
    assert_eq!(head.header("content-length"), Some("10"));
    // The fresh connection has to be accepted before the signal: the one behind it was served.
    assert_eq!(wire.proxy.ask_admin("GET", "/readiness").status(), 200);

    wire.proxy.signal(Signal::TERM);
    for connection in &mut idlers {
        assert!(connection.is_closed(), "an idle connection was told something");
    }
    assert!(fresh.is_closed(), "a connection without a request was told something");
    wire.proxy.wait_until("the listener to close", |proxy| refuses_connections(proxy.address));
    let readiness = wire.proxy.ask_admin("GET", "/readiness");
    assert_eq!(readiness.status(), 503);
    assert!(readiness.text().contains("draining"), "{}", readiness.text());
    assert_eq!(wire.proxy.ask_admin("GET", "/liveness").status(), 200, "a stop is no reason to be killed");

    its_upstream.send(OK_KEPT);
    let answer = unanswered.read_response(false).expect("an answer");
    assert_eq!((answer.status(), answer.header("connection")), (200, Some("close")), "the app is told not to send more here");
    assert!(unanswered.is_closed());
    uploading.send("again");
    assert_eq!(upload_upstream.take(10), b"firstagain");
    upload_upstream.send(OK);
    assert_eq!(uploading.read_response(false).expect("an answer").status(), 200);
    for (downstream, upstream) in &mut replies {
        upstream.send("6\r\nsecond\r\n0\r\n\r\n");
        assert_eq!(downstream.read_to_end(), b"5\r\nfirst\r\n6\r\nsecond\r\n0\r\n\r\n");
    }
    assert_eq!(wire.proxy.wait_exit().code(), Some(0), "drained");
}

/// C44: during `shutdown.delay` readiness says no, and everything else goes on as before, on old connections and new ones.
#[test]
fn c44_the_delay_keeps_serving_and_a_second_signal_ends_it() {
    let mut wire = Wire::set(&["shutdown.delay=10m"]);
    let mut old = idle(&wire.proxy);
    wire.proxy.signal(Signal::TERM);
    wire.proxy.wait_until("unreadiness", |proxy| proxy.ask_admin("GET", "/readiness").status() == 503);
    assert_eq!(wire.proxy.status()["ready"], false);
    assert_eq!(wire.proxy.ask_admin("GET", "/liveness").status(), 200);
    wire.forwarded(GET);
    old.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    upstream.send(OK_KEPT);
    let answer = old.read_response(false).expect("an answer");
    assert_eq!((answer.status(), answer.header("connection")), (200, None), "not yet told to close");

    // Nothing is in flight: the second signal cuts nothing, and that is a clean stop.
    wire.proxy.signal(Signal::TERM);
    assert_eq!(wire.proxy.wait_exit().code(), Some(0));
    assert!(old.is_closed());
}

/// What an operator asks for once the proxy is stopping is answered at once.
#[test]
fn c44_commands_come_too_late_while_it_stops() {
    let wire = Wire::set(&["shutdown.delay=10m"]);
    wire.proxy.signal(Signal::TERM);
    wire.proxy.wait_for_log("stopping");
    for path in ["/reload", "/token/refresh"] {
        let begun = Instant::now();
        let answer = wire.proxy.ask_admin("POST", path);
        assert_eq!(answer.status(), 503, "{path}");
        assert!(answer.text().contains("the proxy is stopping"), "{path}: {}", answer.text());
        assert!(begun.elapsed() < Duration::from_secs(3), "{path} took {:?}", begun.elapsed());
    }
    assert_eq!(wire.proxy.ask_admin("POST", "/quitquitquit").status(), 200, "it does stop");
}

/// C44: what does not end within `shutdown.drain_timeout` is cut, in a way that no client takes for the end of the reply, and the exit status tells.
#[test]
fn c44_the_drain_timeout_cuts_visibly_and_exits_1() {
    let mut wire = Wire::set(&["shutdown.drain_timeout=300ms"]);
    let (mut chunked, _upstream) = streaming(&wire);
    let (mut unanswered, _its_upstream) = in_flight(&wire);
    // A reply to HTTP/1.0 ends with its connection; only a reset says that it is not whole.
    let mut until_close = wire.proxy.connect();
    until_close.send("GET /x HTTP/1.0\r\nHost: localhost\r\n\r\n");
    let mut its_upstream = wire.upstream.accept();
    its_upstream.read_request().expect("a request");
    its_upstream.send(STREAMING);
    until_close.read_head().expect("the reply begins");
    assert_eq!(until_close.take(5), b"first");
    let mut with_length = wire.proxy.connect();
    with_length.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfirst");
    with_length.read_head().expect("the reply begins");
    assert_eq!(wire.proxy.stop().code(), Some(1), "cut");
    assert_eq!(chunked.read_to_end(), b"5\r\nfirst\r\n", "no last chunk");
    assert_eq!(with_length.read_to_end(), b"first");
    assert_eq!(unanswered.read_to_end(), b"");
    let end = until_close.stream().read(&mut [0; 16]).expect_err("a clean end");
    assert_eq!(end.kind(), ErrorKind::ConnectionReset);
    wire.proxy.wait_for_log("connections were cut");
}

/// C45: somebody insists.
#[test]
fn c45_a_second_signal_ends_the_drain_at_once() {
    for (first, second) in [(Signal::TERM, Signal::TERM), (Signal::INT, Signal::TERM), (Signal::TERM, Signal::INT)] {
        let mut wire = Wire::set(&["shutdown.drain_timeout=10m"]);
        let (mut downstream, _upstream) = streaming(&wire);
        wire.proxy.signal(first);
        wire.proxy.wait_until("the listener to close", |proxy| refuses_connections(proxy.address));
        // Reading the files again is no way to insist.
        wire.proxy.signal(Signal::HUP);
        assert_eq!(wire.proxy.ask_admin("GET", "/liveness").status(), 200);
        let begun = Instant::now();
        wire.proxy.signal(second);
        assert_eq!(wire.proxy.wait_exit().code(), Some(1), "{first:?} {second:?}");
        assert!(begun.elapsed() < Duration::from_secs(5), "took {:?}", begun.elapsed());
        assert_eq!(downstream.read_to_end(), b"5\r\nfirst\r\n", "no last chunk");
    }
}

/// C46: what ends it in order, and what does not end it.
#[test]
fn c46_signals() {
    for signal in [Signal::TERM, Signal::INT, Signal::QUIT] {
        let mut wire = Wire::start();
        wire.proxy.signal(Signal::PIPE);
        wire.forwarded(GET);
        wire.proxy.signal(signal);
        assert_eq!(wire.proxy.wait_exit().code(), Some(0), "{signal:?}");
    }
}

/// C46: a log pipe whose reader is gone costs the log, not the service.
#[test]
fn c46_a_closed_log_pipe_ends_nothing() {
    let account = account();
    let simulator = simulator(&account);
    let builder = Builder::to_simulator(&simulator, &account);
    let mut child = builder.command().spawn().expect("the binary runs");
    let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok);
    let address: SocketAddr = lines
        .find_map(|line| {
            let line: serde_json::Value = serde_json::from_str(&line).ok()?;
            (line["message"] == "listening").then(|| line["address"].as_str()?.parse().ok())?
        })
        .expect("it listens");
    drop(lines);
    drop(child.stdout.take());
    for _ in 0..20 {
        let mut connection = Raw::connect(address);
        connection.send("GET /inputs/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        assert_eq!(connection.read_response(false).expect("an answer").status(), 200);
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), Signal::TERM).expect("a running child");
    assert_eq!(child.wait().expect("a child").code(), Some(0));
}

/// C43: a mint in flight gets its reply, so that the token is known and the next start needs no other; those who wait for it are answered at once.
#[test]
fn c43_a_stop_during_a_mint_loses_no_token() {
    let account = account();
    let simulator = simulator(&account);
    let held = simulator.fault(Fault::at("/api-tokens/", Action::Hold).once());
    let directory = tempfile::tempdir().expect("a temporary directory");
    let store = directory.path().join("token.json");
    let start = || {
        let builder = Builder::to_simulator(&simulator, &account);
        builder.set("token.store.type=file").set(format!("token.store.path={}", store.display())).start()
    };
    let mut proxy = start();
    simulator.wait_for(|requests| requests.iter().any(|request| request.is("POST", "/api-tokens/")), PATIENCE).expect("a mint");
    let mut waiting = proxy.connect();
    waiting.send(GET);
    proxy.wait_until("the request to wait", |proxy| proxy.status()["requests_in_flight"] == 1);
    proxy.signal(Signal::TERM);
    let answer = waiting.read_response(false).expect("an answer");
    assert_eq!((answer.status(), answer.code().as_str()), (503, "draining"));
    assert!(answer.header("retry-after").is_some() && answer.header("connection") == Some("close"), "{answer:?}");
    assert_eq!(simulator.mints().len(), 0, "it did not wait for the mint");
    simulator.remove_fault(held);
    assert_eq!(proxy.wait_exit().code(), Some(0));
    assert_eq!(simulator.mints().len(), 1);
    assert!(!proxy.log().contains("may be left behind"), "the reply came in time: {}", proxy.log());
    drop(proxy);

    let proxy = start();
    proxy.wait_ready();
    assert_eq!(proxy.get("/inputs/").status(), 200);
    assert_eq!(simulator.mints().len(), 1, "the token of the last run is used");
}

/// C43: a mint that gets no reply is given up, and its name is told.
#[test]
fn c43_a_stop_does_not_wait_for_a_mint_for_ever() {
    let account = account();
    let simulator = simulator(&account);
    simulator.fault(Fault::at("/api-tokens/", Action::hang_after_body()));
    let mut proxy = Builder::to_simulator(&simulator, &account).set("token.name=hanging").start();
    simulator
        .wait_for(|requests| requests.iter().any(|request| request.is("POST", "/api-tokens/") && request.complete), PATIENCE)
        .expect("a mint");
    let begun = Instant::now();
    assert_eq!(proxy.stop().code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(10), "took {:?}", begun.elapsed());
    assert!(proxy.wait_for_log("may be left behind").contains("hanging"));
}

/// Contract section 6: the way out for Jobs, where no signal can be sent.
#[test]
fn quitquitquit_is_a_graceful_stop() {
    let mut wire = Wire::start();
    let (mut downstream, mut upstream) = streaming(&wire);
    let mut idler = idle(&wire.proxy);
    let answer = wire.proxy.ask_admin("POST", "/quitquitquit");
    assert_eq!(answer.status(), 200, "{answer:?}");
    assert!(idler.is_closed());
    upstream.send("0\r\n\r\n");
    assert_eq!(downstream.read_to_end(), b"5\r\nfirst\r\n0\r\n\r\n");
    assert_eq!(wire.proxy.wait_exit().code(), Some(0));
}

/// Connections in `TIME_WAIT` (state 06, proc(5)) that have this local port.
fn in_time_wait(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/net/tcp").expect("proc");
    table.lines().filter(|line| line.contains(&format!(":{port:04X} ")) && line.split_whitespace().nth(3) == Some("06")).count()
}

/// D37: the next start takes the port at once, though connections of the last one are in `TIME_WAIT`.
#[test]
fn d37_a_restart_takes_the_port_again() {
    for workers in [1, 2] {
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port();
        let settings = [format!("listen.address=127.0.0.1:{port}"), format!("runtime.workers={workers}")];
        let settings: Vec<_> = settings.iter().map(String::as_str).collect();
        for _ in 0..2 {
            let mut wire = Wire::set(&settings);
            assert_eq!(wire.proxy.address.port(), port);
            wire.forwarded(GET);
            let _idlers: Vec<_> = (0..5).map(|_| idle(&wire.proxy)).collect();
            assert_eq!(wire.proxy.stop().code(), Some(0));
        }
        assert!(in_time_wait(port) > 0, "the test shows nothing: no connection is in TIME_WAIT");
    }
}

/// D37: a port that is taken is a message and status 1, before anything is minted.
#[test]
fn d37_a_busy_port_is_told_before_anything_is_minted() {
    let account = account();
    let simulator = simulator(&account);
    let other = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let busy = other.local_addr().expect("a bound socket");
    for (setting, workers) in [("listen.address", 1), ("listen.address", 2), ("admin.address", 1)] {
        let builder = Builder::to_simulator(&simulator, &account);
        let (status, text) = builder.set(format!("{setting}={busy}")).set(format!("runtime.workers={workers}")).run_to_end();
        assert_eq!(status.code(), Some(1), "{setting}: {text}");
        assert!(text.contains(&busy.to_string()) && text.contains("another process uses it"), "{setting}: {text}");
    }
    assert!(simulator.requests().is_empty());
}

/// A stop under load: whoever got a connection gets whole answers; nobody gets half of one.
#[test]
fn c44_a_stop_under_load_breaks_no_answer() {
    let account = account();
    let simulator = simulator(&account);
    let mut proxy = Builder::to_simulator(&simulator, &account).set("runtime.workers=2").env("RUST_LOG", "info").start();
    proxy.wait_ready();
    let address = proxy.address;
    let apps: Vec<_> = (0..8)
        .map(|_| {
            thread::spawn(move || {
                let mut answered = 0;
                while let Ok(stream) = TcpStream::connect(address) {
                    let mut connection = Raw::new(stream);
                    loop {
                        if !connection.try_send("GET /bytes/20000 HTTP/1.1\r\nHost: localhost\r\n\r\n") {
                            break;
                        }
                        let Some(answer): Option<Message> = connection.read_response(false) else { break };
                        assert!(answer.complete && answer.status() == 200 && answer.body.len() == 20_000, "{}", answer.start);
                        answered += 1;
                        if answer.header("connection") == Some("close") {
                            break;
                        }
                    }
                }
                answered
            })
        })
        .collect();
    proxy.wait_until("traffic", |proxy| {
        proxy.metric("upsolver_auth_proxy_requests_total{method=\"GET\",status=\"200\",source=\"upstream\"}") > 200.0
    });
    assert_eq!(proxy.stop().code(), Some(0));
    let answered: usize = apps.into_iter().map(|app| app.join().expect("every answer is whole")).sum();
    assert!(answered > 200);
}
