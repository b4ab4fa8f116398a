//! Connections: how they are greeted, how they end, what is agreed on them.

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::time::Duration;

use super::client::{Client, LIMIT, Seen, start};
use crate::simulator::certificates::Variant;
use crate::simulator::{Action, Counters, End, Fault, Greeting, Options, Protocols, Simulator, Transport};

#[test]
fn a_client_that_leaves_a_hanging_request_is_noticed() {
    let simulator = start();
    simulator.fault(Fault::everywhere(Action::Hang));
    let mut client = Client::connect(&simulator);
    client.send("GET /users HTTP/1.1\r\nhost: x\r\n\r\n");
    simulator.wait_for(|requests| requests.len() == 1, LIMIT).unwrap();
    assert_eq!(simulator.counters(), Counters { accepted: 1, open: 1, cut: 0 });
    drop(client);
    assert_eq!(simulator.wait_for_connections(|counters| counters.open == 0, LIMIT).unwrap().accepted, 1);
}

#[test]
fn a_port_shuts_and_opens_and_new_connections_are_greeted_as_ordered() {
    let simulator = start();
    let mut before = Client::connect(&simulator);
    let until = |open: bool| {
        let tries = std::iter::repeat_with(|| TcpStream::connect(simulator.address()).is_ok()).take(100_000);
        assert!(tries.into_iter().any(|connected| connected == open), "the port never became {}", if open { "open" } else { "shut" });
    };
    simulator.refuse_connections(true);
    until(false);
    before.send("GET /users HTTP/1.1\r\nhost: x\r\n\r\n");
    assert!(before.reply().0.starts_with("HTTP/1.1 403 "), "what was open stays open");
    simulator.refuse_connections(false);
    until(true);

    let refused = |greeting| {
        simulator.greet(greeting);
        Client::try_connect(&simulator, &[]).err().map(|error| error.kind())
    };
    assert_eq!(refused(Greeting::Serve), None);
    assert_eq!(refused(Greeting::End(End::Reset)), Some(ErrorKind::ConnectionReset));
    assert!(refused(Greeting::End(End::Close)).is_some());

    simulator.greet(Greeting::Silence);
    let mut tcp = TcpStream::connect(simulator.address()).unwrap();
    tcp.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert_eq!(tcp.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    simulator.end_connections(End::Close);
    tcp.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(tcp.read(&mut [0]).unwrap(), 0);
}

#[test]
fn idle_connections_close_in_order_and_busy_ones_stay() {
    let simulator = start();
    simulator.ignore_authorization(true);
    let (mut idle, mut busy) = (Client::connect(&simulator), Client::connect(&simulator));
    simulator.fault(Fault::at("/users", Action::Hang));
    busy.send("GET /users HTTP/1.1\r\nhost: x\r\n\r\n");
    idle.send("GET /inputs/ HTTP/1.1\r\nhost: x\r\n\r\n");
    idle.reply();
    simulator.wait_for(|requests| requests.len() == 2, LIMIT).unwrap();
    simulator.idle_timeout(Duration::from_millis(50));
    assert_eq!(idle.rest(LIMIT), (Vec::new(), Seen::CloseNotify));
    assert_eq!(busy.rest(Duration::from_millis(200)), (Vec::new(), Seen::Open));

    simulator.end_connections(End::Fin);
    assert_eq!(busy.rest(LIMIT), (Vec::new(), Seen::Fin));
    simulator.wait_for_connections(|counters| counters.open == 0, LIMIT).unwrap();
}

#[test]
fn alpn_is_agreed_as_the_options_say() {
    let rows: [(Protocols, &[&str], &str); 6] = [
        (Protocols::Http1, &["h2", "http/1.1"], "http/1.1"),
        (Protocols::Http1, &["h2"], "refused"),
        (Protocols::Http1, &[], "nothing agreed"),
        (Protocols::Http2, &["h2", "http/1.1"], "h2"),
        (Protocols::Both, &["http/1.1"], "http/1.1"),
        (Protocols::Both, &["http/1.1", "h2"], "h2"),
    ];
    for (protocols, offered, expected) in rows {
        let simulator = Simulator::start(Options { protocols, ..Options::default() }).unwrap();
        let offered: Vec<&[u8]> = offered.iter().map(|protocol| protocol.as_bytes()).collect();
        let agreed = Client::try_connect(&simulator, &offered).map(|client| client.agreed());
        let agreed = agreed.map_or(b"refused".to_vec(), |agreed| agreed.unwrap_or(b"nothing agreed".to_vec()));
        assert_eq!(String::from_utf8_lossy(&agreed), expected, "{protocols:?} {offered:?}");
    }
}

/// D06: the certificate that the options order is the one that a client sees.
#[test]
fn d06_a_bad_certificate_is_presented_where_ordered() {
    let transport = Transport::Tls(Variant::Expired);
    let simulator = Simulator::start(Options { transport, ..Options::default() }).unwrap();
    let error = Client::try_connect(&simulator, &[]).err().unwrap().to_string();
    assert!(error.contains("certificate expired"), "{error}");
}

#[test]
fn dropping_it_ends_what_is_open() {
    let simulator = start();
    simulator.fault(Fault::everywhere(Action::Hang));
    let mut client = Client::connect(&simulator);
    client.send("GET /users HTTP/1.1\r\nhost: x\r\n\r\n");
    simulator.wait_for(|requests| requests.len() == 1, LIMIT).unwrap();
    let (control, address) = (simulator.control(), simulator.address());
    drop(simulator);
    assert_ne!(client.rest(LIMIT).1, Seen::Open);
    assert!(TcpStream::connect(address).is_err());
    assert_eq!(control.counters(), Counters { accepted: 1, open: 0, cut: 0 });
}
