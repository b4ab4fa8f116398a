//! One app: request after request on one connection, on a new one after an end.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::LazyLock;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tokio::time::Instant;
use upsolver_auth_proxy::simulator::byte_at;

/// Longer than anything takes that goes well, `token.wait` included.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);
/// An app that hears that the upstream cannot be reached, or that its connection ended, asks again after this.
const PAUSE: Duration = Duration::from_millis(20);
/// Longer uploads need somebody who reads meanwhile, since an echo begins before the upload ends.
const FITS_SOCKETS: usize = 16 * 1024;
const LARGEST: u64 = 4_000_000;

/// The bytes that downloads consist of, and uploads are made of.
static PATTERN: LazyLock<Vec<u8>> = LazyLock::new(|| (0..LARGEST + 1000).map(byte_at).collect());

/// What happened to the requests.
#[derive(Default)]
pub(crate) struct Tally {
    /// Answered as it should be.
    pub(crate) right: u64,
    /// Left by the app, on purpose.
    pub(crate) abandoned: u64,
    /// Not answered as it should be; to be explained.
    pub(crate) failures: Vec<Failure>,
    /// Not to be explained by anything.
    pub(crate) wrong: Vec<String>,
}

impl Tally {
    pub(crate) fn add(&mut self, other: Self) {
        self.right += other.right;
        self.abandoned += other.abandoned;
        self.failures.extend(other.failures);
        self.wrong.extend(other.wrong);
    }
}

/// A request that got an error, or no whole answer.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    /// Its `x-request-id`.
    pub(crate) id: String,
    pub(crate) method: &'static str,
    /// Of the request's body.
    pub(crate) length: u64,
    pub(crate) what: Symptom,
    pub(crate) from: Instant,
    pub(crate) to: Instant,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Symptom {
    /// The connection ended inside the reply, or before it.
    Cut,
    /// Another status than 200, with the proxy's `code` where it has one.
    Status(u16, Option<String>),
}

/// Asks until the time is over.
pub(crate) fn run(number: u64, address: SocketAddr, until: Instant) -> Tally {
    let mut tally = Tally::default();
    let mut connection = None;
    for request in 0_u64.. {
        let from = Instant::now();
        if from >= until {
            break;
        }
        let ask = Ask::random(format!("{number}-{request}"));
        match exchange(&mut connection, address, &ask) {
            Ok(Outcome::Right) => {
                tally.right += 1;
                continue;
            }
            Ok(Outcome::Abandoned) => tally.abandoned += 1,
            Ok(Outcome::Failed(what)) => {
                let (method, length) = (ask.kind.method(), ask.kind.upload());
                tally.failures.push(Failure { id: ask.id, method, length, what, from, to: Instant::now() });
                std::thread::sleep(PAUSE);
            }
            Err(error) => tally.wrong.push(format!("{} {:?}: {error:#}", ask.id, ask.kind)),
        }
        connection = None;
    }
    tally
}

enum Outcome {
    Right,
    Abandoned,
    Failed(Symptom),
}

struct Ask {
    id: String,
    kind: Kind,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Poll,
    Download {
        length: u64,
        chunked: bool,
    },
    Upload {
        length: u64,
    },
    /// Leaves without reading the reply.
    LeaveAtOnce,
    /// Leaves a long download after its first bytes.
    LeaveReading,
    /// Leaves in the middle of an upload.
    LeaveWriting,
}

impl Kind {
    fn method(self) -> &'static str {
        match self {
            Self::Upload { .. } | Self::LeaveWriting => "POST",
            Self::Poll | Self::Download { .. } | Self::LeaveAtOnce | Self::LeaveReading => "GET",
        }
    }

    fn upload(self) -> u64 {
        match self {
            Self::Upload { length } => length,
            _ => 0,
        }
    }
}

impl Ask {
    fn random(id: String) -> Self {
        let kind = match fastrand::u32(..200) {
            0 => Kind::LeaveAtOnce,
            1 => Kind::LeaveReading,
            2 => Kind::LeaveWriting,
            3..70 => Kind::Download { length: size(), chunked: fastrand::bool() },
            70..110 => Kind::Upload { length: size() },
            _ => Kind::Poll,
        };
        Self { id, kind }
    }

    fn head(&self, start: &str, length: Option<u64>) -> Vec<u8> {
        let length = length.map(|length| format!("Content-Length: {length}\r\n")).unwrap_or_default();
        format!("{start} HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: {}\r\n{length}\r\n", self.id).into_bytes()
    }
}

/// Most bodies are small, some are not.
fn size() -> u64 {
    match fastrand::u32(..1000) {
        0..800 => fastrand::u64(..4096),
        800..990 => fastrand::u64(..200_000),
        _ => fastrand::u64(..LARGEST),
    }
}

fn pattern(length: u64) -> &'static [u8] {
    &PATTERN[..usize::try_from(length).expect("at most LARGEST")]
}

/// One request. An error is something that nothing explains.
fn exchange(connection: &mut Option<BufReader<TcpStream>>, address: SocketAddr, ask: &Ask) -> anyhow::Result<Outcome> {
    if connection.is_none() {
        let stream = TcpStream::connect(address).context("cannot connect to the proxy")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        *connection = Some(BufReader::with_capacity(64 * 1024, stream));
    }
    let stream = connection.as_mut().context("just made")?;
    match ask.kind {
        Kind::Poll => {
            let reply = send(stream, &ask.head("GET /inputs/", None)).and_then(|()| read_reply(stream));
            judge(reply, |body| body.starts_with(b"[{") && body.ends_with(b"}]"))
        }
        Kind::Download { length, chunked } => {
            let framing = if chunked { "?framing=chunked" } else { "" };
            let head = ask.head(&format!("GET /bytes/{length}{framing}"), None);
            judge(send(stream, &head).and_then(|()| read_reply(stream)), |body| body == pattern(length))
        }
        Kind::Upload { length } => {
            // Begins with its own name, so that another one's echo shows.
            let body = [ask.id.as_bytes(), pattern(length)].concat();
            let request = [ask.head("POST /echo", Some(body.len() as u64)), body].concat();
            let body = &request[request.len() - ask.id.len() - pattern(length).len()..];
            judge(converse(stream, &request), |reply| reply == body)
        }
        Kind::LeaveAtOnce => leave(stream, &ask.head("GET /bytes/100000", None), 0),
        Kind::LeaveReading => leave(stream, &ask.head("GET /bytes/50000000", None), 100),
        Kind::LeaveWriting => {
            let request = [ask.head("POST /sink", Some(1_000_000)), pattern(fastrand::u64(..200_000)).to_vec()].concat();
            leave(stream, &request, 0)
        }
    }
}

/// Sends a request and reads its reply, both at the same time where the request is long.
fn converse(stream: &mut BufReader<TcpStream>, request: &[u8]) -> io::Result<Reply> {
    if request.len() <= FITS_SOCKETS {
        return send(stream, request).and_then(|()| read_reply(stream));
    }
    let mut writer = stream.get_ref().try_clone()?;
    std::thread::scope(|scope| {
        // What becomes of the writing shows in the reply.
        scope.spawn(move || drop(writer.write_all(request)));
        read_reply(stream)
    })
}

/// Sends, reads a little and leaves.
fn leave(stream: &mut BufReader<TcpStream>, request: &[u8], read: usize) -> anyhow::Result<Outcome> {
    let left = send(stream, request).and_then(|()| stream.read_exact(&mut vec![0; read]));
    match left {
        Ok(()) => Ok(Outcome::Abandoned),
        Err(error) => broken(&error),
    }
}

fn judge(reply: io::Result<Reply>, is_right: impl FnOnce(&[u8]) -> bool) -> anyhow::Result<Outcome> {
    let reply = match reply {
        Ok(reply) => reply,
        Err(error) => return broken(&error),
    };
    if reply.status != 200 {
        let body = serde_json::from_slice::<serde_json::Value>(&reply.body).unwrap_or_default();
        return Ok(Outcome::Failed(Symptom::Status(reply.status, body["code"].as_str().map(str::to_owned))));
    }
    ensure!(is_right(&reply.body), "{} wrong bytes", reply.body.len());
    Ok(Outcome::Right)
}

/// A connection that ended inside an exchange is to be explained; silence and malformed replies cannot be.
fn broken(error: &io::Error) -> anyhow::Result<Outcome> {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Ok(Outcome::Failed(Symptom::Cut)),
        kind => bail!("{kind}: {error}"),
    }
}

struct Reply {
    status: u16,
    body: Vec<u8>,
}

fn send(stream: &BufReader<TcpStream>, bytes: &[u8]) -> io::Result<()> {
    stream.get_ref().write_all(bytes)
}

/// Reads one response by its framing. A body that ends early is an [`io::ErrorKind::UnexpectedEof`], malformed framing [`io::ErrorKind::InvalidData`].
fn read_reply(stream: &mut BufReader<TcpStream>) -> io::Result<Reply> {
    let malformed = || io::Error::from(io::ErrorKind::InvalidData);
    let status = line(stream)?.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(malformed)?;
    let (mut length, mut chunked) = (None, false);
    loop {
        let field = line(stream)?.to_ascii_lowercase();
        if field.is_empty() {
            break;
        }
        if let Some(value) = field.strip_prefix("content-length: ") {
            length = Some(value.parse::<u64>().map_err(|_| malformed())?);
        }
        chunked |= field == "transfer-encoding: chunked";
    }
    let mut body = Vec::new();
    if chunked {
        loop {
            let size = u64::from_str_radix(&line(stream)?, 16).map_err(|_| malformed())?;
            read_exactly(stream, size, &mut body)?;
            if !line(stream)?.is_empty() {
                return Err(malformed());
            }
            if size == 0 {
                break;
            }
        }
    } else {
        read_exactly(stream, length.ok_or_else(malformed)?, &mut body)?;
    }
    Ok(Reply { status, body })
}

fn line(stream: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    stream.read_line(&mut line)?;
    line.strip_suffix("\r\n").map(str::to_owned).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

fn read_exactly(stream: &mut BufReader<TcpStream>, length: u64, body: &mut Vec<u8>) -> io::Result<()> {
    if stream.by_ref().take(length).read_to_end(body)? as u64 == length { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
