//! Raw sockets on both sides: no HTTP library stands between a test and the bytes.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// How long a test waits for bytes that must come. Generous: it ends a failing test, never a passing one.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// A connection of which a test reads and writes the bytes.
pub(crate) struct Raw {
    stream: TcpStream,
    /// Received, but not yet taken by a reading method.
    buffered: Vec<u8>,
}

/// A message, taken apart no further than a test needs.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    /// Request line or status line.
    pub(crate) start: String,
    /// Names in lower case, values trimmed, in order.
    pub(crate) headers: Vec<(String, String)>,
    /// The head exactly as received, the empty line included.
    pub(crate) head: Vec<u8>,
    /// Decoded where it was chunked.
    pub(crate) body: Vec<u8>,
    /// Trailer fields of a chunked body.
    pub(crate) trailers: Vec<(String, String)>,
    /// Whether the body had the end that its framing promised.
    pub(crate) complete: bool,
}

impl Message {
    /// The values of all fields of this name, in order.
    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        self.headers.iter().filter(|(field, _)| field == name).map(|(_, value)| value.as_str()).collect()
    }

    /// The value of the only field of this name.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let all = self.all(name);
        assert!(all.len() <= 1, "{name} appears {} times in {:?}", all.len(), self.headers);
        all.first().copied()
    }

    /// Of a response.
    pub(crate) fn status(&self) -> u16 {
        self.start.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("not a status line: {:?}", self.start))
    }

    /// The `code` of one of the proxy's own answers; checks their common form on the way.
    pub(crate) fn code(&self) -> String {
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{self:?}");
        assert_eq!(self.header("cache-control"), Some("no-store"), "{self:?}");
        assert!(self.header("proxy-status").is_some_and(|value| value.starts_with("upsolver-auth-proxy")), "{self:?}");
        let problem: serde_json::Value = serde_json::from_slice(&self.body).expect("a problem is JSON");
        assert_eq!(problem["status"], self.status(), "{problem}");
        for field in ["type", "title", "detail"] {
            assert!(problem[field].is_string(), "{field} in {problem}");
        }
        problem["code"].as_str().expect("a code").to_owned()
    }

    /// The body as text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

impl Raw {
    pub(crate) fn connect(address: SocketAddr) -> Self {
        Self::new(TcpStream::connect(address).expect("the listener accepts"))
    }

    pub(crate) fn new(stream: TcpStream) -> Self {
        stream.set_nodelay(true).expect("a TCP socket");
        stream.set_read_timeout(Some(PATIENCE)).expect("a TCP socket");
        stream.set_write_timeout(Some(PATIENCE)).expect("a TCP socket");
        Self { stream, buffered: Vec::new() }
    }

    /// Writes all bytes; panics where the peer does not take them.
    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) -> &mut Self {
        self.stream.write_all(bytes.as_ref()).expect("the peer takes the bytes");
        self
    }

    /// Writes what the peer takes; for peers that may close meanwhile.
    pub(crate) fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(bytes.as_ref()).is_ok()
    }

    /// Ends the sending side.
    pub(crate) fn half_close(&mut self) {
        self.stream.shutdown(Shutdown::Write).expect("an open socket");
    }

    /// Closes with a TCP reset.
    pub(crate) fn reset(self) {
        socket2::SockRef::from(&self.stream).set_linger(Some(Duration::ZERO)).expect("a TCP socket");
    }

    pub(crate) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Reads until the buffer holds `needle`; the position behind it, or nothing where the peer closed before.
    fn fill_until(&mut self, needle: &[u8]) -> Option<usize> {
        loop {
            if let Some(at) = self.buffered.windows(needle.len()).position(|window| window == needle) {
                return Some(at + needle.len());
            }
            if !self.fill() {
                return None;
            }
        }
    }

    /// Reads some more; false at the end of the stream, an orderly one or a reset.
    fn fill(&mut self) -> bool {
        let mut chunk = vec![0; 65536];
        match self.stream.read(&mut chunk) {
            Ok(0) => false,
            Ok(read) => {
                self.buffered.extend_from_slice(&chunk[..read]);
                true
            }
            Err(error) if error.kind() == ErrorKind::ConnectionReset => false,
            Err(error) => panic!("nothing came within {PATIENCE:?} ({error}); so far: {:?}", String::from_utf8_lossy(&self.buffered)),
        }
    }

    /// Exactly `count` bytes, or fewer where the peer closed.
    pub(crate) fn take(&mut self, count: usize) -> Vec<u8> {
        while self.buffered.len() < count && self.fill() {}
        let end = count.min(self.buffered.len());
        self.buffered.drain(..end).collect()
    }

    /// The next bytes, at most as many as fit; 0 at the end. For bodies too large to keep.
    pub(crate) fn take_some(&mut self, into: &mut [u8]) -> usize {
        if self.buffered.is_empty() {
            return self.stream.read(into).expect("the peer sends");
        }
        let count = into.len().min(self.buffered.len());
        into[..count].copy_from_slice(&self.buffered[..count]);
        self.buffered.drain(..count);
        count
    }

    /// Everything until the peer closes.
    pub(crate) fn read_to_end(&mut self) -> Vec<u8> {
        while self.fill() {}
        std::mem::take(&mut self.buffered)
    }

    /// Whether the peer closed (or reset) without sending anything more. Waits for it.
    pub(crate) fn is_closed(&mut self) -> bool {
        self.buffered.is_empty() && !self.fill()
    }

    /// Whether nothing arrives, not even the end, for `time`: for proofs that something is NOT sent. Keep `time` short; it is always waited for.
    pub(crate) fn is_silent_for(&mut self, time: Duration) -> bool {
        self.stream.set_read_timeout(Some(time)).expect("a TCP socket");
        let mut byte = [0];
        let silent = self.buffered.is_empty()
            && matches!(self.stream.peek(&mut byte), Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut));
        self.stream.set_read_timeout(Some(PATIENCE)).expect("a TCP socket");
        silent
    }

    /// The head of a message, or nothing where the peer closed before it.
    pub(crate) fn read_head(&mut self) -> Option<Message> {
        let end = self.fill_until(b"\r\n\r\n")?;
        let head: Vec<u8> = self.buffered.drain(..end).collect();
        let text = String::from_utf8_lossy(&head).into_owned();
        let mut lines = text.trim_end_matches("\r\n").split("\r\n");
        let start = lines.next().expect("split yields at least one").to_owned();
        let headers = lines
            .map(|line| {
                let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("no colon in {line:?}"));
                (name.to_ascii_lowercase(), value.trim_matches([' ', '\t']).to_owned())
            })
            .collect();
        Some(Message { start, headers, head, body: Vec::new(), trailers: Vec::new(), complete: false })
    }

    /// A request with its body, read strictly: both framings at once are a failure of the test.
    pub(crate) fn read_request(&mut self) -> Option<Message> {
        let mut message = self.read_head()?;
        self.read_body(&mut message, false);
        Some(message)
    }

    /// A response with its body. `to_head` where it answers a HEAD. Interim responses are returned as messages of their own.
    pub(crate) fn read_response(&mut self, to_head: bool) -> Option<Message> {
        let mut message = self.read_head()?;
        let status = message.status();
        if to_head || status < 200 || status == 204 || status == 304 {
            message.complete = true;
        } else {
            self.read_body(&mut message, true);
        }
        Some(message)
    }

    fn read_body(&mut self, message: &mut Message, until_close: bool) {
        let length = message.header("content-length").map(|value| value.parse::<usize>().expect("a number"));
        let chunked = message.all("transfer-encoding");
        match (length, chunked.as_slice()) {
            (Some(length), []) => {
                message.body = self.take(length);
                message.complete = message.body.len() == length;
            }
            (None, ["chunked"]) => message.complete = self.read_chunks(message).is_some(),
            (None, []) if until_close => {
                message.body = self.read_to_end();
                message.complete = true;
            }
            (None, []) => message.complete = true,
            other => panic!("contradictory framing: {other:?}"),
        }
    }

    fn read_chunks(&mut self, message: &mut Message) -> Option<()> {
        loop {
            let line = self.read_line()?;
            let size = usize::from_str_radix(line.split(';').next().expect("split yields at least one").trim(), 16).expect("a chunk size");
            if size == 0 {
                break;
            }
            let data = self.take(size);
            let whole = data.len() == size;
            message.body.extend_from_slice(&data);
            if !whole {
                return None;
            }
            assert_eq!(self.read_line()?, "", "a chunk ends with its line");
        }
        loop {
            let line = self.read_line()?;
            let Some((name, value)) = line.split_once(':') else { return Some(()) };
            message.trailers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    fn read_line(&mut self) -> Option<String> {
        let end = self.fill_until(b"\r\n")?;
        let line: Vec<u8> = self.buffered.drain(..end).collect();
        Some(String::from_utf8_lossy(&line[..end - 2]).into_owned())
    }
}

/// A port at which nobody listens. It is bound for as long as this lives: one that was only free a moment ago may be another test's by now, and what is
/// sent there arrives in that test.
pub(crate) struct ClosedPort(socket2::Socket);

impl ClosedPort {
    pub(crate) fn reserve() -> Self {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).expect("a socket");
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).expect("a free port");
        Self(socket)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.0.local_addr().ok().and_then(|address| address.as_socket()).expect("a bound socket")
    }
}

/// A plain-HTTP upstream on loopback of which the test writes every byte.
pub(crate) struct RawUpstream {
    listener: TcpListener,
}

impl RawUpstream {
    pub(crate) fn start() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").expect("a free port") }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local_addr().expect("a bound socket")
    }

    /// The next connection from the proxy.
    pub(crate) fn accept(&self) -> Raw {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(connection) = self.try_accept() {
                return connection;
            }
            assert!(Instant::now() < deadline, "the proxy did not connect within {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// A connection that the proxy made already, if it did.
    pub(crate) fn try_accept(&self) -> Option<Raw> {
        self.listener.set_nonblocking(true).expect("a TCP socket");
        let (stream, _) = self.listener.accept().ok()?;
        stream.set_nonblocking(false).expect("a TCP socket");
        Some(Raw::new(stream))
    }

    /// Whether the proxy has not connected: for proofs that nothing leaves. To be asked after the downstream got its answer.
    pub(crate) fn saw_nothing(&self) -> bool {
        self.try_accept().is_none()
    }
}
