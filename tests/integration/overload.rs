//! More of everything than there is room for: B09 to B14 with the numbers of the matrix. Through all of it the admin server answers, memory stays bounded
//! and the processor idle.
//!
//! The numbers of the matrix with `UPSOLVER_LONG=1`, fewer otherwise; each test prints what it measured.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit};
use upsolver_auth_proxy::simulator::{Account, Options, Simulator};

use crate::support::proxy::{Builder, Proxy, canary};
use crate::support::raw::{PATIENCE, Raw};
use crate::support::wire::{GET, LOCAL, Wire};

/// Descriptors of a test's own, and of its proxy, beside the connections of a flood.
const BESIDE_FLOOD: usize = 400;
/// Over which processor time is measured.
const WINDOW: Duration = Duration::from_secs(2);

fn long_or(long: usize, short: usize) -> usize {
    if std::env::var_os("UPSOLVER_LONG").is_some() { long } else { short }
}

/// How many of `wanted` connections this process may hold, with its limit raised as far as it goes; `of_proxy` is what one costs the proxy, which has
/// the same limit.
fn affordable(wanted: usize, of_proxy: f64) -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // Where this fails, the old limit is judged.
    let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    let limit = rustix::process::getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| usize::try_from(limit).expect("64 bits"));
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a rough number
    let room = (limit.saturating_sub(BESIDE_FLOOD) as f64 / of_proxy) as usize;
    if room < wanted {
        eprintln!("SKIPPED {} of {wanted} connections: only {limit} files may be open here", wanted - room);
    }
    room.min(wanted)
}

/// Processor time of the proxy so far.
fn cpu_time(proxy: &Proxy) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", proxy.pid())).expect("a running child");
    let fields: Vec<_> = stat.rsplit(')').next().expect("split yields at least one").split_whitespace().collect();
    let ticks = fields[11].parse::<u64>().expect("utime") + fields[12].parse::<u64>().expect("stime");
    Duration::from_millis(ticks * 10)
}

/// The proxy does next to nothing over [`WINDOW`], whatever is open. What it does spend is its own time, which no neighbour lengthens.
fn assert_idle(proxy: &Proxy, what: &str) {
    let before = cpu_time(proxy);
    thread::sleep(WINDOW);
    let spent = cpu_time(proxy).saturating_sub(before);
    eprintln!("{what}: {spent:?} of processor time in {WINDOW:?}");
    assert!(spent < WINDOW / 5, "{what}: spun for {spent:?} of {WINDOW:?}");
}

/// Health and metrics, each on a connection of its own.
fn assert_answers(proxy: &Proxy) {
    for path in ["/liveness", "/readiness", "/metrics"] {
        assert_eq!(proxy.ask_admin("GET", path).status(), 200, "{path}");
    }
}

/// Resident bytes more than `before`.
fn grown(proxy: &Proxy, before: u64) -> u64 {
    proxy.resident_bytes().saturating_sub(before)
}

/// What `count` of something cost at most.
fn assert_cost(what: &str, count: usize, bytes: u64, limit: u64) {
    eprintln!("{what}: {count} cost {bytes} bytes, {} each", bytes / count as u64);
    assert!(bytes < limit, "{what}: grew by {bytes} bytes for {count}");
}

/// Of connections that the peer may close: what arrived so far, and whether it is closed.
fn received(stream: &mut TcpStream, into: &mut Vec<u8>) -> bool {
    let mut buffer = [0; 1024];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return true,
            Ok(count) => into.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
            Err(_) => return true,
        }
    }
}

fn nonblocking(proxy: &Proxy) -> TcpStream {
    let stream = TcpStream::connect(proxy.address).expect("the listener accepts");
    stream.set_nonblocking(true).expect("a socket");
    stream
}

/// Many connections that send a byte now and then: none of them outlives the deadline of a head.
#[test]
fn b09_slowloris_ends_and_costs_little() {
    let count = affordable(long_or(2000, 200), 1.2);
    let wire = Wire::with(|builder| builder.set("listen.header_timeout=3s").env("RUST_LOG", "info"));
    wire.forwarded(GET);
    let before = wire.proxy.resident_bytes();
    let spent_before = cpu_time(&wire.proxy);
    let began = Instant::now();
    let mut slow: Vec<_> = (0..count).map(|_| (nonblocking(&wire.proxy), Vec::new(), false)).collect();
    let head = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ".iter().chain(std::iter::repeat(&b's'));
    let mut most = 0;
    for byte in head {
        let mut open = 0;
        for (stream, answer, closed) in &mut slow {
            // A byte to a connection that was just closed is lost, as it should be.
            let _ = stream.write(std::slice::from_ref(byte));
            *closed = *closed || received(stream, answer);
            open += usize::from(!*closed);
        }
        most = most.max(grown(&wire.proxy, before));
        assert_answers(&wire.proxy);
        if open == 0 {
            break;
        }
        assert!(began.elapsed() < PATIENCE * 2, "{open} are still open");
        thread::sleep(Duration::from_millis(250));
    }
    let spent = cpu_time(&wire.proxy).saturating_sub(spent_before);
    eprintln!("slowloris: {spent:?} of processor time in {:?}", began.elapsed());
    assert!(spent < began.elapsed() / 2, "{spent:?}");
    for (_, answer, _) in &slow {
        assert!(answer.starts_with(b"HTTP/1.1 408 "), "{}", answer.escape_ascii());
    }
    // hyper's read buffer of 8 KiB is most of it.
    assert_cost("slowloris", count, most, 24 * 1024 * count as u64 + (8 << 20));
    wire.forwarded(GET);
}

/// Many downstreams that stop reading a reply of a gigabyte: each costs buffers, none of them for long.
#[test]
fn b11_slow_readers_cost_buffers_only() {
    let count = affordable(long_or(200, 20), 3.2);
    let wire = Wire::with(|builder| builder.set("upstream.body_idle_timeout=2s").env("RUST_LOG", "info"));
    wire.forwarded(GET);
    let before = wire.proxy.resident_bytes();
    let readers: Vec<_> = (0..count)
        .map(|_| {
            let mut downstream = wire.proxy.connect();
            downstream.send(GET);
            let mut upstream = wire.upstream.accept();
            upstream.read_request().expect("a request");
            upstream.send("HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n");
            let stream = upstream.stream().try_clone().expect("a socket");
            stream.set_nonblocking(true).expect("a socket");
            (downstream, upstream, stream)
        })
        .collect();
    let block = vec![b'd'; 1 << 20];
    let began = Instant::now();
    let (mut most, mut open) = (0, count);
    while open > 0 {
        open = 0;
        for (_, _, stream) in &readers {
            let mut stream = stream;
            let closed = loop {
                match stream.write(&block) {
                    Ok(written) => assert!(written > 0),
                    Err(error) => break error.kind() != ErrorKind::WouldBlock,
                }
            };
            open += usize::from(!closed);
        }
        most = most.max(grown(&wire.proxy, before));
        assert_answers(&wire.proxy);
        assert!(began.elapsed() < PATIENCE * 2, "{open} are still open");
        thread::sleep(Duration::from_millis(100));
    }
    assert_cost("slow readers", count, most, (count as u64) << 20);
    drop(readers);
    assert_idle(&wire.proxy, "after the slow readers");
}

/// Connections without a request: they cost a little memory and no processor time, and nobody else anything.
#[test]
fn b12_thousands_of_idle_connections_cost_little() {
    let count = affordable(long_or(10_000, 1000), 1.3);
    let wire =
        Wire::with(|builder| builder.set(format!("listen.max_connections={count}")).set("listen.idle_timeout=1h").env("RUST_LOG", "info"));
    wire.forwarded(GET);
    let before = wire.proxy.resident_bytes();
    // One place is left for the request at the end.
    let mut connections: Vec<Raw> = (1..count)
        .map(|_| {
            let mut connection = wire.proxy.connect();
            connection.send(LOCAL);
            assert_eq!(connection.read_response(false).expect("an answer").status(), 204);
            connection
        })
        .collect();
    assert_cost("idle connections", count, grown(&wire.proxy, before), 24 * 1024 * count as u64 + (8 << 20));
    assert_idle(&wire.proxy, "idle connections");
    assert_answers(&wire.proxy);
    wire.forwarded(GET);
    let last = connections.last_mut().expect("there are some");
    last.send(LOCAL);
    assert_eq!(last.read_response(false).expect("an answer").status(), 204);
}

/// Heads that are too large, from many connections at once: each is refused, and nothing of them stays.
#[test]
fn b13_many_header_bombs_leave_memory_flat() {
    let rounds = long_or(20, 3);
    let wire = Wire::with(|builder| builder.env("RUST_LOG", "info"));
    wire.forwarded(GET);
    let bomb = format!("GET / HTTP/1.1\r\nHost: localhost\r\n{}\r\n", format!("X-A: {}\r\n", "x".repeat(5000)).repeat(100));
    let mut after_first = 0;
    for round in 0..rounds {
        let mut connections: Vec<_> = (0..50).map(|_| wire.proxy.connect()).collect();
        for connection in &mut connections {
            connection.try_send(&bomb);
        }
        assert_answers(&wire.proxy);
        for connection in &mut connections {
            assert_eq!(connection.read_response(false).expect("an answer").status(), 431);
        }
        drop(connections);
        if round == 0 {
            after_first = wire.proxy.resident_bytes();
        }
    }
    assert_cost("header bombs after the first round", (rounds - 1) * 50, grown(&wire.proxy, after_first), 4 << 20);
    assert_idle(&wire.proxy, "after the header bombs");
}

fn with_minting(descriptors: u32) -> (Simulator, Proxy) {
    let account = Account { email: format!("{}@example.com", canary("email")), password: canary("password") };
    let simulator = Simulator::start(Options { accounts: vec![account.clone()], ..Options::default() }).expect("a free port");
    let builder = Builder::to_simulator(&simulator, &account).set("token.min_mint_interval=0s").env("RUST_LOG", "info");
    let store = builder.directory().join("store.json");
    let builder = builder.set("token.store.type=file").set(format!("token.store.path={}", store.display()));
    let proxy = builder.descriptors(descriptors).start();
    proxy.wait_ready();
    (simulator, proxy)
}

/// Far more apps than descriptors: those over the room are told so, and all that the proxy needs files for goes on.
#[test]
fn b14_few_descriptors_leave_the_admin_server_and_mints_working() {
    let (_simulator, proxy) = with_minting(64);
    let shortage = proxy.wait_for_log("only 64 files may be open");
    assert!(shortage.contains("WARN"), "{shortage}");
    let mut crowd: Vec<_> = (0..300).map(|_| (nonblocking(&proxy), Vec::new(), false)).collect();
    for (index, (stream, _, _)) in crowd.iter_mut().enumerate() {
        // A third is silent, a third slow, a third asks for something; who was refused may be gone.
        let sent: &[u8] = [b"".as_slice(), b"GET / HTTP/1.1\r\nHo", b"GET /inputs/ HTTP/1.1\r\nHost: localhost\r\n\r\n"][index % 3];
        let _ = stream.write(sent);
    }
    proxy.wait_until("a refusal", |_| {
        crowd.iter_mut().any(|(stream, answer, closed)| {
            *closed = *closed || received(stream, answer);
            answer.starts_with(b"HTTP/1.1 503 ") && answer.windows(10).any(|window| window == b"overloaded")
        })
    });
    for _ in 0..20 {
        assert_answers(&proxy);
    }
    for generation in 2..5 {
        assert_eq!(proxy.ask_admin("POST", "/token/refresh").status(), 202);
        proxy.wait_until("another token", |proxy| proxy.status()["token"]["generation"] == generation);
    }
    assert_eq!(proxy.ask_admin("POST", "/reload").status(), 200);
    assert_idle(&proxy, "descriptors are short");
    assert_answers(&proxy);
    // Refusals linger for a while, so that a slow downstream gets to read its answer; then they make room.
    drop(crowd);
    proxy.wait_until("room", |proxy| {
        let mut connection = proxy.connect();
        connection.try_send("GET /inputs/ HTTP/1.1\r\nHost: localhost\r\n\r\n");
        connection.read_response(false).is_some_and(|answer| answer.status() == 200)
    });
    assert_eq!(proxy.metric("upsolver_auth_proxy_token_store_errors_total{operation=\"write\"}"), 0.0);
    let log = proxy.log();
    assert!(!log.contains("cannot accept a connection"), "{log}");
}

/// So few descriptors that not even the least fits, or the whole host has none left: the proxy neither exits nor spins, and goes on as soon as it can.
#[test]
fn b14_running_out_of_descriptors_passes() {
    let open = {
        let wire = Wire::start();
        wire.proxy.wait_ready();
        // The least, when the connections of earlier questions are closed. It counts two for the question itself, which one request takes as well.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // a small count
        let counts = (0..20).map(|_| wire.proxy.metric("process_open_fds") as u32);
        counts.min().expect("there are some")
    };
    let wire = Wire::with(|builder| builder.descriptors(open));
    wire.forwarded(GET);
    let held: Vec<Raw> = (0..60).map(|_| wire.proxy.connect()).collect();
    wire.proxy.wait_for_log("cannot accept a connection");
    assert_idle(&wire.proxy, "no descriptors are left");
    drop(held);
    wire.forwarded(GET);
}
