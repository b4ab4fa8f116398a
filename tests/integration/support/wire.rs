//! A proxy between two raw sockets, and the three questions that most tests ask of it: what leaves for the upstream, what comes back to the
//! downstream, what is refused. No HTTP library on either side (matrix E01).

use std::time::Duration;

use super::proxy::{Builder, Proxy, canary};
use super::raw::{Message, Raw, RawUpstream};

/// An answer that ends its connection, so that the next request comes on another.
pub(crate) const OK: &str = "HTTP/1.1 200 OK\r\nDate: Tue, 01 Jan 2030 00:00:00 GMT\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";

/// An answer after which the connection may be used again.
pub(crate) const OK_KEPT: &str = "HTTP/1.1 200 OK\r\nDate: Tue, 01 Jan 2030 00:00:00 GMT\r\nContent-Length: 2\r\n\r\nok";

/// A plain request.
pub(crate) const GET: &str = "GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// A request that the proxy answers by itself with 204 and that leaves the connection open.
pub(crate) const LOCAL: &str = "OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n";

/// A proxy with a token from a file, so that the upstream sees the test's requests and nothing else.
pub(crate) struct Wire {
    pub(crate) upstream: RawUpstream,
    pub(crate) proxy: Proxy,
    pub(crate) token: String,
}

impl Wire {
    pub(crate) fn start() -> Self {
        Self::with(|builder| builder)
    }

    /// With settings, each as `--set` takes it.
    pub(crate) fn set(settings: &[&str]) -> Self {
        Self::with(|builder| settings.iter().fold(builder, |builder, setting| builder.set(*setting)))
    }

    pub(crate) fn with(configure: impl FnOnce(Builder) -> Builder) -> Self {
        let upstream = RawUpstream::start();
        let token = canary("token");
        let proxy = configure(Builder::to_raw(&upstream, &token)).start();
        Self { upstream, proxy, token }
    }

    /// One request on a connection of its own, answered with `reply`: what the upstream got, and what the downstream got. `reply` has to end the
    /// upstream's connection in some way, else the next request may be sent where nobody listens any more.
    pub(crate) fn exchange(&self, request: impl AsRef<[u8]>, reply: impl AsRef<[u8]>) -> (Message, Message) {
        let request = request.as_ref();
        let mut downstream = self.proxy.connect();
        downstream.try_send(request);
        let mut upstream = self.upstream.accept();
        let forwarded = upstream.read_request().unwrap_or_else(|| panic!("no request came of {}", request.escape_ascii()));
        assert!(forwarded.complete, "only a part came of {}: {forwarded:?}", request.escape_ascii());
        upstream.try_send(reply);
        let to_head = request.starts_with(b"HEAD ");
        let answer = downstream.read_response(to_head).unwrap_or_else(|| panic!("no answer came to {}", request.escape_ascii()));
        (forwarded, answer)
    }

    /// What leaves: exactly one well-formed request, and not a byte behind it.
    pub(crate) fn forwarded(&self, request: impl AsRef<[u8]>) -> Message {
        let request = request.as_ref();
        let mut downstream = self.proxy.connect();
        downstream.try_send(request);
        let mut upstream = self.upstream.accept();
        let forwarded = upstream.read_request().unwrap_or_else(|| panic!("no request came of {}", request.escape_ascii()));
        assert!(forwarded.complete, "only a part came of {}: {forwarded:?}", request.escape_ascii());
        upstream.send(OK);
        let answer = downstream.read_response(request.starts_with(b"HEAD ")).expect("an answer");
        assert_eq!(answer.status(), 200, "{}", request.escape_ascii());
        assert!(upstream.is_closed(), "more than one request left for {}", request.escape_ascii());
        self.assert_ours(&forwarded);
        forwarded
    }

    /// What comes back for a plain GET. `reply` has to end the upstream's connection, as in [`Wire::exchange`].
    pub(crate) fn answered(&self, reply: impl AsRef<[u8]>) -> Message {
        self.exchange(GET, reply).1
    }

    /// An answer of the proxy itself, while nothing leaves.
    pub(crate) fn refused(&self, request: impl AsRef<[u8]>) -> Message {
        self.refused_on(&mut self.proxy.connect(), request)
    }

    /// The same on a connection at hand.
    pub(crate) fn refused_on(&self, downstream: &mut Raw, request: impl AsRef<[u8]>) -> Message {
        let request = request.as_ref();
        downstream.try_send(request);
        // Looks at the upstream meanwhile: what leaves would wait for a reply that nobody gives.
        while downstream.is_silent_for(Duration::from_millis(10)) {
            assert!(self.upstream.saw_nothing(), "something left for {}", request.escape_ascii());
        }
        let answer =
            downstream.read_response(request.starts_with(b"HEAD ")).unwrap_or_else(|| panic!("no answer to {}", request.escape_ascii()));
        assert!(self.upstream.saw_nothing(), "something left for {}", request.escape_ascii());
        assert_own_answer(&answer);
        answer
    }

    /// As [`Wire::refused`], and the connection is closed behind the answer: nobody knows where the next request would begin.
    pub(crate) fn refused_and_closed(&self, request: impl AsRef<[u8]>) -> Message {
        let request = request.as_ref();
        let mut downstream = self.proxy.connect();
        let answer = self.refused_on(&mut downstream, request);
        assert!(downstream.is_closed(), "left open behind {}", request.escape_ascii());
        assert!(self.upstream.saw_nothing(), "something left for {}", request.escape_ascii());
        answer
    }

    /// A request that is broken in its body. Its head may be on its way already, but no complete request may reach the upstream; the downstream gets an
    /// error (its status is returned) or nothing, and its connection is closed.
    pub(crate) fn never_completed(&self, request: impl AsRef<[u8]>) -> Option<u16> {
        let request = request.as_ref();
        let mut downstream = self.proxy.connect();
        downstream.try_send(request);
        let answer = downstream.read_response(false);
        assert!(downstream.is_closed(), "left open behind {}", request.escape_ascii());
        while let Some(mut upstream) = self.upstream.try_accept() {
            let received = upstream.read_to_end();
            assert!(!is_complete(&received), "a complete request left for {}: {}", request.escape_ascii(), received.escape_ascii());
        }
        answer.inspect(assert_own_answer).map(|answer| answer.status())
    }

    /// Checks what holds of every request that leaves: the configured authority, one credential, ours, and one framing.
    pub(crate) fn assert_ours(&self, forwarded: &Message) {
        assert_eq!(forwarded.all("host"), [self.upstream.address().to_string()], "{forwarded:?}");
        assert_eq!(forwarded.all("authorization"), [self.token.as_str()], "{forwarded:?}");
        assert!(forwarded.all("content-length").len() + forwarded.all("transfer-encoding").len() <= 1, "{forwarded:?}");
        assert!(forwarded.start.ends_with(" HTTP/1.1"), "{forwarded:?}");
    }

    /// Checks a whole request head, byte by byte, apart from the order of fields: `expected` are the lines that the proxy does not add to every request.
    pub(crate) fn assert_head(&self, forwarded: &Message, start: &str, expected: &[&[u8]]) {
        assert_eq!(forwarded.start, start);
        let host = format!("host: {}", self.upstream.address()).into_bytes();
        let authorization = format!("authorization: {}", self.token).into_bytes();
        let own: [&[u8]; 3] = [&host, &authorization, b"via: 1.1 upsolver-auth-proxy"];
        assert_eq!(field_lines(forwarded), sorted(expected.iter().chain(&own).map(|line| line.to_vec())));
    }
}

/// Checks what holds of every answer that the proxy makes itself: never 401 or 403 (B50), and no CORS field (B29).
pub(crate) fn assert_own_answer(answer: &Message) {
    assert!(answer.complete, "{answer:?}");
    assert!(!matches!(answer.status(), 401 | 403), "{answer:?}");
    assert!(!answer.headers.iter().any(|(name, _)| name.starts_with("access-control-")), "{answer:?}");
}

/// The field lines of a head as they were on the wire, sorted; readable where they are not ASCII.
pub(crate) fn field_lines(message: &Message) -> Vec<String> {
    let head = message.head.strip_suffix(b"\r\n\r\n").expect("a head ends with an empty line");
    sorted(head.split(|byte| *byte == b'\n').skip(1).map(|line| line.strip_suffix(b"\r").unwrap_or(line).to_vec()))
}

fn sorted(lines: impl Iterator<Item = Vec<u8>>) -> Vec<String> {
    let mut lines: Vec<_> = lines.map(|line| line.escape_ascii().to_string()).collect();
    lines.sort();
    lines
}

/// Whether these bytes begin with a complete request, by the framing that they declare.
fn is_complete(bytes: &[u8]) -> bool {
    let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else { return false };
    let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
    let body = &bytes[end + 4..];
    let length = head.split("\r\n").find_map(|line| line.strip_prefix("content-length:"));
    if head.contains("\r\ntransfer-encoding:") {
        body.ends_with(b"0\r\n\r\n")
    } else {
        length.is_none_or(|length| length.trim().parse::<usize>().is_ok_and(|length| body.len() >= length))
    }
}
