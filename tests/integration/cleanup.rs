//! Nothing stays behind an exchange that ended badly: no descriptor, no connection, no slot (A58, B05, D24); and what the kernel is told about the process
//! (B43).

use std::os::unix::fs::MetadataExt;

use upsolver_auth_proxy::simulator::{Account, Action, End, Fault, Options, Point, Protocols, Simulator};

use crate::support::proxy::{Builder, Proxy, canary};
use crate::support::raw::PATIENCE;
use crate::support::wire::Wire;

/// Exchanges of each kind.
const MANY: usize = 30;

/// A way in which an exchange ends badly.
type Kind = (&'static str, fn(&Proxy, &Simulator));

/// Requests for `path` that reached the simulator.
fn arrived(simulator: &Simulator, path: &str, count: usize) {
    simulator
        .wait_for(|requests| requests.iter().filter(|request| request.path() == path).count() >= count, PATIENCE)
        .unwrap_or_else(|error| panic!("{path}: {error}"));
}

/// The downstream leaves while the request waits for its reply.
fn left_waiting(proxy: &Proxy, simulator: &Simulator) {
    let connections: Vec<_> = (0..MANY)
        .map(|_| {
            let mut connection = proxy.connect();
            connection.send("GET /hang HTTP/1.1\r\nHost: localhost\r\n\r\n");
            connection
        })
        .collect();
    arrived(simulator, "/hang", MANY);
    drop(connections);
}

/// The downstream leaves, or resets, in the middle of its upload.
fn left_uploading(proxy: &Proxy, simulator: &Simulator) {
    let connections: Vec<_> = (0..MANY)
        .map(|_| {
            let mut connection = proxy.connect();
            connection.send("POST /sink HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\nonly this");
            connection
        })
        .collect();
    arrived(simulator, "/sink", MANY);
    for (index, connection) in connections.into_iter().enumerate() {
        if index % 2 == 0 { connection.reset() } else { drop(connection) }
    }
}

/// The downstream leaves, or resets, in the middle of the reply.
fn left_downloading(proxy: &Proxy, _simulator: &Simulator) {
    let connections: Vec<_> = (0..MANY)
        .map(|_| {
            let mut connection = proxy.connect();
            connection.send("GET /slow/10000?every=20 HTTP/1.1\r\nHost: localhost\r\n\r\n");
            connection.read_head().expect("the reply begins");
            connection
        })
        .collect();
    for (index, connection) in connections.into_iter().enumerate() {
        if index % 2 == 0 { connection.reset() } else { drop(connection) }
    }
}

/// The downstream says nothing, or a part of a head, and leaves.
fn never_asked(proxy: &Proxy, _simulator: &Simulator) {
    for index in 0..MANY {
        let mut connection = proxy.connect();
        if index % 2 == 0 {
            connection.send("GET /x HTTP/1.1\r\nHo");
        }
    }
}

/// The downstream breaks the framing of its body.
fn broke_the_framing(proxy: &Proxy, _simulator: &Simulator) {
    for _ in 0..MANY {
        let mut connection = proxy.connect();
        connection.send("POST /sink HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n");
        connection.read_to_end();
    }
}

/// The upstream breaks its reply off.
fn cut_replies(proxy: &Proxy, simulator: &Simulator) {
    for end in [End::Fin, End::Reset, End::Close] {
        simulator.fault(Fault::below("/bytes", Action::Cut(Point::Body(1000), end)).times(u32::try_from(MANY).expect("a small number")));
        for _ in 0..MANY {
            let mut connection = proxy.connect();
            connection.send("GET /bytes/500000 HTTP/1.1\r\nHost: localhost\r\n\r\n");
            assert!(connection.read_response(false).is_none_or(|answer| !answer.complete || answer.status() == 502));
        }
        simulator.clear_faults();
        simulator.fault(Fault::at("/hang", Action::Hang));
    }
}

/// The upstream gives no reply at all.
fn no_replies(proxy: &Proxy, simulator: &Simulator) {
    for action in [Action::close_before_reply(), Action::reset_after_body(), Action::reset()] {
        let fault = simulator.fault(Fault::at("/nothing", action));
        for _ in 0..MANY {
            assert_eq!(proxy.get("/nothing").status(), 502);
        }
        simulator.remove_fault(fault);
    }
}

/// Nobody listens upstream.
fn no_upstream(proxy: &Proxy, simulator: &Simulator) {
    simulator.refuse_connections(true);
    simulator.end_connections(End::Reset);
    proxy.wait_until("the refusal", |proxy| proxy.get("/inputs/").status() == 502);
    for _ in 0..MANY {
        assert_eq!(proxy.get("/inputs/").status(), 502);
    }
    simulator.refuse_connections(false);
    proxy.wait_until("the way back", |proxy| proxy.get("/inputs/").status() == 200);
}

#[test]
fn d24_b05_nothing_stays_behind_an_aborted_exchange() {
    for protocols in [Protocols::Http1, Protocols::Http2] {
        let account = Account { email: format!("{}@example.com", canary("email")), password: canary("password") };
        let simulator =
            Simulator::start(Options { accounts: vec![account.clone()], protocols, ..Options::default() }).expect("a free port");
        let proxy = Builder::to_simulator(&simulator, &account)
            .env("RUST_LOG", "info")
            .set(format!("upstream.http_version={}", if protocols == Protocols::Http1 { "1.1" } else { "2" }))
            .set("upstream.pool_idle_timeout=200ms")
            .start();
        proxy.wait_ready();
        simulator.fault(Fault::at("/hang", Action::Hang));
        let open = || proxy.metric("process_open_fds");
        let connections = |state| proxy.metric(&format!("upsolver_auth_proxy_upstream_connections{{state=\"{state}\"}}"));
        let at_rest = || proxy.status()["requests_in_flight"] == 0 && (connections("idle"), connections("active")) == (0.0, 0.0);
        assert_eq!(proxy.get("/inputs/").status(), 200);
        proxy.wait_until("the pool to empty", |_| at_rest());
        let baseline = open();
        assert!(baseline > 0.0, "no such metric");
        let kinds: [Kind; 8] = [
            ("left while waiting", left_waiting),
            ("left while uploading", left_uploading),
            ("left while downloading", left_downloading),
            ("never asked", never_asked),
            ("broke the framing", broke_the_framing),
            ("cut replies", cut_replies),
            ("no replies", no_replies),
            ("no upstream", no_upstream),
        ];
        for (kind, go) in kinds {
            go(&proxy, &simulator);
            proxy.wait_until(&format!("{protocols:?}, {kind}: rest"), |_| at_rest());
            proxy.wait_until(&format!("{protocols:?}, {kind}: {baseline} descriptors again"), |_| open() <= baseline);
            assert_eq!(proxy.get("/inputs/").status(), 200, "{protocols:?}, {kind}");
            simulator.clear_requests();
        }
    }
}

/// B43: no core file, and `/proc/PID` belongs to root, as that of a process that is not dumpable does. (Run by root it always does; that the process is
/// not dumpable is asked of the kernel in `harden`.)
#[test]
fn b43_the_process_leaves_no_core_and_is_nobodys_to_look_into() {
    let wire = Wire::start();
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", wire.proxy.pid())).expect("a running child");
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).expect("a line");
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"], "{core}");
    let owner = std::fs::metadata(format!("/proc/{}/environ", wire.proxy.pid())).expect("a running child").uid();
    assert_eq!(owner, 0);
}
