//! A blocking TLS client that sees bytes and how its connection ends, and what most tests begin with.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::simulator::{Account, Options, Simulator};

pub(super) const LIMIT: Duration = Duration::from_secs(20);

fn account() -> Account {
    Account { email: "a@example.com".to_owned(), password: "first".to_owned() }
}

pub(super) fn start() -> Simulator {
    Simulator::start(Options { accounts: vec![account()], ..Options::default() }).unwrap()
}

/// A TLS client that reads and writes bytes.
pub(super) struct Client(StreamOwned<ClientConnection, TcpStream>);

/// How a client saw its connection end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    CloseNotify,
    Fin,
    Reset,
    /// Nothing came for a while.
    Open,
}

impl Client {
    pub(super) fn connect(simulator: &Simulator) -> Self {
        Self::try_connect(simulator, &[b"http/1.1"]).unwrap()
    }

    pub(super) fn try_connect(simulator: &Simulator, alpn: &[&[u8]]) -> io::Result<Self> {
        let mut connection =
            ClientConnection::new(Arc::new(client_config(simulator, alpn)), ServerName::try_from("localhost").unwrap()).unwrap();
        let mut tcp = TcpStream::connect(simulator.address())?;
        tcp.set_read_timeout(Some(LIMIT))?;
        while connection.is_handshaking() {
            connection.complete_io(&mut tcp)?;
        }
        Ok(Self(StreamOwned::new(connection, tcp)))
    }

    /// The protocol agreed by ALPN.
    pub(super) fn agreed(&self) -> Option<Vec<u8>> {
        self.0.conn.alpn_protocol().map(<[u8]>::to_vec)
    }

    pub(super) fn send(&mut self, request: &str) {
        self.0.write_all(request.as_bytes()).unwrap();
        self.0.flush().unwrap();
    }

    /// One reply with a `content-length`: head and content.
    pub(super) fn reply(&mut self) -> (String, String) {
        self.0.sock.set_read_timeout(Some(LIMIT)).unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.0.read_exact(&mut byte).unwrap();
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or(0, |length| length.parse().unwrap());
        let mut content = vec![0; length];
        self.0.read_exact(&mut content).unwrap();
        (head, String::from_utf8(content).unwrap())
    }

    /// Everything until the end of the connection, or until `quiet` passes without a byte.
    pub(super) fn rest(&mut self, quiet: Duration) -> (Vec<u8>, Seen) {
        self.rest_after(0, quiet)
    }

    /// The same; `quiet` counts from the moment when `least` bytes are there.
    pub(super) fn rest_after(&mut self, least: usize, quiet: Duration) -> (Vec<u8>, Seen) {
        let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
        loop {
            self.0.sock.set_read_timeout(Some(if bytes.len() < least { LIMIT } else { quiet })).unwrap();
            match self.0.read(&mut part) {
                Ok(0) => return (bytes, Seen::CloseNotify),
                Ok(read) => bytes.extend_from_slice(&part[..read]),
                Err(error) => match error.kind() {
                    ErrorKind::UnexpectedEof => return (bytes, Seen::Fin),
                    ErrorKind::ConnectionReset => return (bytes, Seen::Reset),
                    ErrorKind::WouldBlock => return (bytes, Seen::Open),
                    _ => panic!("{error}"),
                },
            }
        }
    }
}

fn client_config(simulator: &Simulator, alpn: &[&[u8]]) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(simulator.ca_pem().as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let mut config = versions.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config
}

/// One request on a connection of its own: status, head, content.
pub(super) fn ask(simulator: &Simulator, method: &str, target: &str, fields: &str, body: &str) -> (u16, String, String) {
    let mut client = Client::connect(simulator);
    let length = body.len();
    client.send(&format!("{method} {target} HTTP/1.1\r\nhost: x\r\n{fields}content-length: {length}\r\n\r\n{body}"));
    let (head, content) = client.reply();
    (head[9..12].parse().unwrap(), head, content)
}

pub(super) const MINT: &str = r#"{"displayData":{"name":"n","description":"d"}}"#;

pub(super) fn mint_fields(email: &str, password: &str) -> String {
    format!("content-type: application/json\r\nx-api-email: {email}\r\nx-api-password: {password}\r\n")
}

/// A reply as read: its head, and as much of its content as came, chunk framing removed.
pub(super) fn content(reply: &[u8]) -> (String, Vec<u8>) {
    let end = reply.windows(4).position(|four| four == b"\r\n\r\n").expect("a whole head") + 4;
    let (head, mut rest) = (String::from_utf8(reply[..end].to_vec()).unwrap(), &reply[end..]);
    if !head.contains("transfer-encoding: chunked") {
        return (head, rest.to_vec());
    }
    let mut content = Vec::new();
    while let Some(line) = rest.windows(2).position(|two| two == b"\r\n") {
        let size = usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
        assert!(size > 0, "the last chunk came");
        let chunk = &rest[line + 2..];
        content.extend_from_slice(&chunk[..size.min(chunk.len())]);
        rest = chunk.get(size + 2..).unwrap_or_default();
    }
    (head, content)
}
