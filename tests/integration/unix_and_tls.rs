//! Where the proxy listens (contract section 3, `[listen]`): several addresses, both loopbacks, Unix sockets, TLS with and without client certificates.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use upsolver_auth_proxy::simulator::certificates::{Authority, Identity, Variant};

use crate::support::proxy::{Builder, canary};
use crate::support::raw::{PATIENCE, Raw, RawUpstream};
use crate::support::wire::{GET, LOCAL, OK, Wire};

/// A request that the proxy answers by itself, and that ends its connection.
const LAST: &[u8] = b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

/// The addresses that a proxy says it listens at, in order.
fn listening(wire: &Wire) -> Vec<String> {
    wire.proxy.wait_for_log("\"started\"");
    let log = wire.proxy.log();
    let lines = log.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    lines.filter(|line| line["message"] == "listening").filter_map(|line| line["address"].as_str().map(str::to_owned)).collect()
}

/// D36, B27: `localhost` is both loopbacks at one port, and a list is a list.
#[test]
fn d36_every_address_is_served() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("proxy.sock");
    for workers in [1, 2] {
        let mut wire = Wire::set(&[
            &format!("listen.address=[\"localhost:0\", \"127.0.0.2:0\", \"unix:{}\"]", socket.display()),
            &format!("runtime.workers={workers}"),
        ]);
        let addresses = listening(&wire);
        let tcp: Vec<SocketAddr> = addresses.iter().filter_map(|address| address.parse().ok()).collect();
        let port = tcp[0].port();
        assert_eq!(tcp[..2], [SocketAddr::from(([127, 0, 0, 1], port)), SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, port))]);
        assert_eq!((tcp.len(), addresses.len()), (3, 4), "{addresses:?}");
        for address in tcp {
            for host in ["localhost".to_owned(), format!("localhost:{}", address.port()), "[::1]".to_owned(), "127.0.0.1".to_owned()] {
                let mut downstream = Raw::connect(address);
                downstream.send(format!("GET /x HTTP/1.1\r\nHost: {host}\r\n\r\n"));
                let mut upstream = wire.upstream.accept();
                upstream.read_request().expect("a request");
                upstream.send(OK);
                assert_eq!(downstream.read_response(false).expect("an answer").status(), 200, "{address} {host}");
            }
        }
        assert!(UnixStream::connect(&socket).is_ok());
        assert_eq!(wire.proxy.stop().code(), Some(0));
    }
}

/// B35: a socket that a killed proxy left is replaced; one that is in use, or a file, is not touched.
#[test]
fn b35_a_stale_socket_is_replaced_and_nothing_else() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("proxy.sock");
    let setting = format!("listen.address=unix:{}", socket.display());
    let served = || {
        let mut connection = UnixStream::connect(&socket).expect("the listener accepts");
        connection.set_read_timeout(Some(PATIENCE)).expect("a socket");
        connection.write_all(LAST).expect("a writable socket");
        let mut answer = String::new();
        connection.read_to_string(&mut answer).expect("an answer");
        answer.starts_with("HTTP/1.1 204 ")
    };
    let mut killed = Wire::set(&[&setting]);
    assert_eq!(std::fs::metadata(&socket).expect("a socket").permissions().mode() & 0o777, 0o660, "the default");
    assert!(served());
    killed.proxy.kill();
    assert!(socket.exists(), "the test shows nothing: no socket was left behind");

    let mut running = Wire::set(&[&setting]);
    assert!(served());
    let second = |setting: &str| {
        let upstream = RawUpstream::start();
        Builder::to_raw(&upstream, &canary("token")).set(setting).run_to_end()
    };
    let (status, text) = second(&setting);
    assert_eq!(status.code(), Some(1), "{text}");
    assert!(text.contains("another process uses it"), "{text}");
    assert!(served(), "the first one goes on");
    assert_eq!(running.proxy.stop().code(), Some(0));
    assert!(!socket.exists(), "the socket stayed behind");

    std::fs::write(&socket, "mine").expect("a writable directory");
    let (status, text) = second(&setting);
    assert_eq!(status.code(), Some(1), "{text}");
    assert_eq!(std::fs::read(&socket).expect("still there"), b"mine");
}

/// A proxy with a certificate of `authority`.
fn tls_wire(authority: &Authority, client_authority: Option<&Authority>) -> Wire {
    let identity = authority.issue(&["localhost"], Variant::Good).expect("a certificate");
    Wire::with(|builder| {
        let certificate = builder.file("tls.crt", identity.certificate_pem());
        let key = builder.file("tls.key", identity.key_pem());
        let builder = builder
            .set(format!("listen.tls.certificate_file={}", certificate.display()))
            .set(format!("listen.tls.private_key_file={}", key.display()));
        match client_authority {
            None => builder,
            Some(authority) => {
                let ca = builder.file("client-ca.crt", authority.pem());
                builder.set(format!("listen.tls.client_ca_file={}", ca.display()))
            }
        }
    })
}

type Tls = StreamOwned<ClientConnection, TcpStream>;

fn tls_connect(address: SocketAddr, authority: &Authority, client: Option<&Identity>) -> Tls {
    let mut roots = RootCertStore::empty();
    roots.add(authority.der()).expect("a certificate");
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring supports TLS 1.2 and 1.3")
        .with_root_certificates(roots);
    let mut config = match client {
        None => builder.with_no_client_auth(),
        Some(identity) => builder.with_client_auth_cert(vec![identity.certificate()], identity.key()).expect("a fitting key"),
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let stream = TcpStream::connect(address).expect("the listener accepts");
    stream.set_read_timeout(Some(PATIENCE)).expect("a TCP socket");
    let name = ServerName::try_from("localhost").expect("a name");
    StreamOwned::new(ClientConnection::new(Arc::new(config), name).expect("a valid configuration"), stream)
}

/// What the proxy answers to `LAST` by TLS, or why there is no answer.
fn asked(address: SocketAddr, authority: &Authority, client: Option<&Identity>) -> std::io::Result<String> {
    let mut stream = tls_connect(address, authority, client);
    stream.write_all(LAST)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn listen_tls_serves_https_and_nothing_in_the_clear() {
    let authority = Authority::new().expect("an authority");
    let mut wire = tls_wire(&authority, None);
    let mut stream = tls_connect(wire.proxy.address, &authority, None);
    stream.write_all(b"GET /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").expect("a handshake");
    let mut upstream = wire.upstream.accept();
    wire.assert_ours(&upstream.read_request().expect("a request"));
    // The origin that the app used is an https one.
    upstream.send(format!(
        "HTTP/1.1 302 Found\r\nLocation: http://{}/y\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        wire.upstream.address()
    ));
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer, and a close_notify behind it");
    assert!(answer.starts_with("HTTP/1.1 302 "), "{answer}");
    assert!(answer.contains("\r\nlocation: https://localhost/y\r\n"), "{answer}");
    assert_eq!(stream.conn.alpn_protocol(), Some(&b"http/1.1"[..]));

    let mut clear = wire.proxy.connect();
    clear.send(LOCAL);
    let told = clear.read_to_end();
    assert!(!told.starts_with(b"HTTP/"), "{}", told.escape_ascii());
    assert!(wire.upstream.saw_nothing());

    // A handshake that never comes, and an idle connection, hold nothing up.
    let _silent = wire.proxy.connect();
    let mut idle = tls_connect(wire.proxy.address, &authority, None);
    idle.write_all(LOCAL.as_bytes()).expect("a handshake");
    assert!(idle.read(&mut [0; 1024]).expect("an answer") > 0);
    let begun = Instant::now();
    assert_eq!(wire.proxy.stop().code(), Some(0));
    assert!(begun.elapsed() < Duration::from_secs(5), "took {:?}", begun.elapsed());
    assert_eq!(idle.read(&mut [0; 16]).expect("a close_notify"), 0);
}

#[test]
fn client_certificates_are_demanded_and_verified() {
    let (authority, clients) = (Authority::new().expect("an authority"), Authority::new().expect("an authority"));
    let wire = tls_wire(&authority, Some(&clients));
    let client = |variant| clients.issue(&["app"], variant).expect("a certificate");
    let answer = asked(wire.proxy.address, &authority, Some(&client(Variant::Good))).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 204 "), "{answer}");
    let foreign = authority.issue(&["app"], Variant::Good).expect("a certificate");
    for (name, refused) in [
        ("none", None),
        ("of another authority", Some(&foreign)),
        ("expired", Some(&client(Variant::Expired))),
        ("of an unknown authority", Some(&client(Variant::UnknownAuthority))),
        ("of its own", Some(&client(Variant::SelfSigned))),
    ] {
        let answer = asked(wire.proxy.address, &authority, refused);
        assert!(answer.is_err(), "{name}: {answer:?}");
    }
}

/// What cannot be used is told at the start, with the key of the setting.
#[test]
fn unusable_tls_files_end_the_start() {
    let authority = Authority::new().expect("an authority");
    let (one, other) = (
        authority.issue(&["localhost"], Variant::Good).expect("a certificate"),
        authority.issue(&["localhost"], Variant::Good).expect("a certificate"),
    );
    for (certificate, key, ca, named) in [
        (one.certificate_pem(), other.key_pem(), None, "listen.tls"),
        ("nothing", one.key_pem(), None, "listen.tls.certificate_file"),
        (one.certificate_pem(), "nothing", None, "listen.tls.private_key_file"),
        (one.certificate_pem(), one.key_pem(), Some("nothing"), "listen.tls.client_ca_file"),
    ] {
        let upstream = RawUpstream::start();
        let mut builder = Builder::to_raw(&upstream, &canary("token"));
        for (setting, content) in [("certificate_file", Some(certificate)), ("private_key_file", Some(key)), ("client_ca_file", ca)] {
            if let Some(content) = content {
                let file = builder.file(setting, content);
                builder = builder.set(format!("listen.tls.{setting}={}", file.display()));
            }
        }
        let (status, text) = builder.secret(one.key_pem()).run_to_end();
        assert!(matches!(status.code(), Some(1 | 2)), "{named}: {text}");
        assert!(text.contains(named), "{named}: {text}");
    }
}

/// B31: a new caller token is demanded without a restart, and a file that cannot be used leaves the old one in force.
#[test]
fn b31_the_caller_token_can_change_live() {
    let (first, second) = (canary("caller"), canary("caller"));
    let wire = Wire::with(|builder| {
        let file = builder.file("caller", &first);
        builder.set(format!("listen.caller_token_file={}", file.display())).secret(&first).secret(&second)
    });
    let file = wire.proxy.directory().join("caller");
    // Refused for its path, once the caller is known.
    let asked = |secret: &str| {
        let fields = format!("Host: localhost\r\nX-Upsolver-Auth-Proxy-Token: {secret}\r\nContent-Length: 0\r\n");
        wire.proxy.exchange(format!("POST /api-tokens/ HTTP/1.1\r\n{fields}\r\n")).code()
    };
    assert_eq!((asked(&first).as_str(), asked(&second).as_str()), ("minting_denied", "caller_token_required"));
    std::fs::write(&file, "").expect("a writable file");
    assert_eq!(wire.proxy.ask_admin("POST", "/reload").status(), 200);
    assert_eq!(asked(&first), "minting_denied");
    std::fs::write(&file, format!("{second}\n")).expect("a writable file");
    assert_eq!(wire.proxy.ask_admin("POST", "/reload").status(), 200);
    wire.proxy.wait_until("the new caller token", |_| asked(&second) == "minting_denied");
    assert_eq!(asked(&first), "caller_token_required");
    assert_eq!(wire.refused(GET).code(), "caller_token_required");
}
