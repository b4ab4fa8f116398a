//! `health`, `wait` and `shutdown`: questions to the running proxy's admin server, from a process of their own.
//!
//! The address comes from the same configuration that the proxy runs with. What is asked and answered goes to stderr, for the person or the kubelet
//! event that looks at it; scripts need the result alone.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use bytes::Bytes;
use http::header::HOST;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::config::{self, Config, ListenAddress};

/// For one question, connecting included: below the admin server's own deadlines, since whoever runs `health` has one too.
const DEADLINE: Duration = Duration::from_secs(2);
/// Between two questions of [`wait`].
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Answers are a line or two; this bounds what anything else at that address may send.
const MAX_ANSWER_BYTES: usize = 64 << 10;

/// What `health` asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// Whether the first token was obtained.
    Startup,
    /// Whether a usable token is there and the proxy is not stopping.
    Readiness,
    /// Whether every worker answers.
    Liveness,
}

impl Kind {
    fn path(self) -> &'static str {
        match self {
            Self::Startup => "/startup",
            Self::Readiness => "/readiness",
            Self::Liveness => "/liveness",
        }
    }
}

/// Asks once, for an exec probe. `false` where the answer is no; an error where there is none, or the admin server is off.
pub fn health(config: &Config, kind: Kind) -> anyhow::Result<bool> {
    let targets = targets(&config.admin)?;
    let answer = block_on(ask_first(&targets, &Method::GET, kind.path()))??;
    say(&answer.to_string());
    Ok(answer.code == StatusCode::OK)
}

/// Asks for the readiness every 100 ms until it is there, or for `patience`. `false` where it is not there by then; a proxy that does not listen yet
/// is waited for like one that is not ready.
pub fn wait(config: &Config, patience: Duration) -> anyhow::Result<bool> {
    let targets = targets(&config.admin)?;
    block_on(wait_for(&targets, patience))
}

/// Asks the proxy to stop gracefully, and returns without waiting for its end. `false` where it refuses.
pub fn shutdown(config: &Config) -> anyhow::Result<bool> {
    let targets = targets(&config.admin)?;
    let answer = block_on(ask_first(&targets, &Method::POST, "/quitquitquit"))??;
    say(&answer.to_string());
    Ok(answer.code == StatusCode::OK)
}

async fn wait_for(targets: &[Target], patience: Duration) -> bool {
    // A patience that no clock can express is as good as for ever.
    let deadline = Instant::now().checked_add(patience);
    let mut last = "no answer yet".to_owned();
    let ready = async {
        loop {
            match ask_first(targets, &Method::GET, Kind::Readiness.path()).await {
                Ok(answer) if answer.code == StatusCode::OK => return,
                Ok(answer) => last = answer.to_string(),
                Err(error) => last = format!("{error:#}"),
            }
            sleep(POLL_INTERVAL).await;
        }
    };
    let in_time = if let Some(deadline) = deadline {
        timeout_at(deadline, ready).await.is_ok()
    } else {
        ready.await;
        true
    };
    if !in_time {
        say(&format!("not ready within {}; the last answer: {last}", humantime::format_duration(patience)));
    }
    in_time
}

/// Where a running proxy with this configuration can be asked.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Target {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "http://{address}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// In the order in which they are tried. An error where the admin server is off.
fn targets(admin: &config::Admin) -> anyhow::Result<Vec<Target>> {
    if admin.addresses.is_empty() {
        bail!(
            "the admin server is off (admin.address = \"off\"), so the running proxy cannot be asked; set admin.address, e.g. \"localhost:9090\""
        );
    }
    Ok(admin.addresses.iter().flat_map(reachable_at).collect())
}

fn reachable_at(address: &ListenAddress) -> Vec<Target> {
    let tcp = |ip: IpAddr, port| Target::Tcp(SocketAddr::new(ip, port));
    let (v4, v6) = (IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST));
    match address {
        ListenAddress::Localhost(port) => vec![tcp(v4, *port), tcp(v6, *port)],
        // A wildcard is for listening; the loopback address is for local verbs, too.
        ListenAddress::Socket(SocketAddr::V4(address)) if address.ip().is_unspecified() => vec![tcp(v4, address.port())],
        ListenAddress::Socket(SocketAddr::V6(address)) if address.ip().is_unspecified() => {
            vec![tcp(v6, address.port()), tcp(v4, address.port())]
        }
        ListenAddress::Socket(address) => vec![Target::Tcp(*address)],
        ListenAddress::Unix(path) => vec![Target::Unix(path.clone())],
    }
}

/// What the proxy said, with the question.
#[derive(Debug)]
struct Answer {
    question: String,
    code: StatusCode,
    body: String,
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} {}", self.question, self.code.as_u16(), self.body.trim_end().replace(char::is_control, " "))
    }
}

/// The answer of the first target that can be connected to. The error names each that was tried.
async fn ask_first(targets: &[Target], method: &Method, path: &str) -> anyhow::Result<Answer> {
    let mut unreachable = Vec::new();
    for target in targets {
        let question = format!("{method} {target}{}{path}", if matches!(target, Target::Unix(_)) { " " } else { "" });
        match timeout(DEADLINE, ask(target, method, path)).await {
            Ok(Ok((code, body))) => return Ok(Answer { question, code, body }),
            Ok(Err(Failure::Connect(error))) => unreachable.push(format!("{target} ({error})")),
            Ok(Err(Failure::Exchange(error))) => {
                return Err(error).with_context(|| format!("{question}: no proper answer; is it the proxy that listens there?"));
            }
            Err(_) => {
                bail!("{question}: no answer within {}; the proxy is overloaded, stopped or stuck", humantime::format_duration(DEADLINE))
            }
        }
    }
    bail!("{method} {path}: the proxy cannot be reached at {}; is it running, with the same admin.address?", unreachable.join(" or "))
}

/// Why there is no answer.
enum Failure {
    /// Another target may do better.
    Connect(std::io::Error),
    /// Somebody is there, but does not answer properly.
    Exchange(anyhow::Error),
}

async fn ask(target: &Target, method: &Method, path: &str) -> Result<(StatusCode, String), Failure> {
    // The admin server takes a verb only under a name that needs no DNS.
    let request = |host: String| Request::builder().method(method).uri(path).header(HOST, host).body(Empty::new());
    match target {
        Target::Tcp(address) => {
            let stream = TcpStream::connect(address).await.map_err(Failure::Connect)?;
            exchange(stream, request(address.to_string())).await
        }
        Target::Unix(path) => {
            let stream = UnixStream::connect(path).await.map_err(Failure::Connect)?;
            exchange(stream, request("localhost".to_owned())).await
        }
    }
    .map_err(Failure::Exchange)
}

/// One request and its whole answer on a connection of its own.
async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    request: http::Result<Request<Empty<Bytes>>>,
) -> anyhow::Result<(StatusCode, String)> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let answered = async move {
        let response = sender.send_request(request?).await?;
        let code = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect().await.map_err(anyhow::Error::from_boxed)?;
        anyhow::Ok((code, String::from_utf8_lossy(&body.to_bytes()).into_owned()))
    };
    // The connection ends with the sender, which `answered` takes along; how it ended is told by `answered`.
    let (answer, _) = tokio::join!(answered, connection);
    answer
}

/// These commands run before and without the proxy's own threads.
fn block_on<T>(future: impl Future<Output = T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start")?;
    Ok(runtime.block_on(future))
}

/// A line for people. A stderr that is gone changes nothing about the result.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;
    use tokio::sync::oneshot;
    use tokio::task::LocalSet;

    use super::*;
    use crate::admin::tests::Proxy;
    use crate::admin::{Command, serve};
    use crate::readiness::tests::status;
    use crate::server::listen;
    use crate::token::Status;

    fn socket(address: &str) -> ListenAddress {
        ListenAddress::Socket(address.parse().unwrap())
    }

    #[test]
    fn a_listen_address_tells_where_to_ask() {
        let rows = [
            (ListenAddress::Localhost(9090), "http://127.0.0.1:9090 http://[::1]:9090"),
            (socket("0.0.0.0:9090"), "http://127.0.0.1:9090"),
            (socket("[::]:9090"), "http://[::1]:9090 http://127.0.0.1:9090"),
            (socket("10.1.2.3:80"), "http://10.1.2.3:80"),
            (ListenAddress::Unix("/run/admin.sock".into()), "unix:/run/admin.sock"),
        ];
        for (address, expected) in rows {
            let targets = targets(&config::Admin { addresses: vec![address.clone()] }).unwrap();
            assert_eq!(targets.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "), expected, "{address:?}");
        }
        let off = targets(&config::Admin { addresses: Vec::new() }).unwrap_err().to_string();
        assert!(off.contains("admin.address"), "{off}");
    }

    /// The real admin server at both kinds of address: `health` and `shutdown` over each, `wait` before and after the first token.
    #[tokio::test]
    async fn asks_the_running_proxy() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let bound = listen::bind(&[socket("127.0.0.1:0"), ListenAddress::Unix(path.clone())], 0o600, 1).unwrap();
        let bound: Vec<_> = bound.into_iter().flatten().collect();
        let targets = [Target::Tcp(bound[0].tcp_address().unwrap()), Target::Unix(path.clone())];
        let listeners = bound.into_iter().map(|bound| bound.into_listener().unwrap()).collect();
        let (stop, stopped) = oneshot::channel::<()>();
        let Proxy { handles, token, mut commands, .. } = Proxy::new();

        let server = serve(listeners, handles, crate::admin::MAX_CONNECTIONS, async { drop(stopped.await) });
        let person = async {
            for target in &targets {
                let target = std::slice::from_ref(target);
                let answer = ask_first(target, &Method::GET, Kind::Liveness.path()).await.unwrap();
                assert_eq!(answer.to_string(), format!("{}: 200 {{\"status\":\"ok\",\"reasons\":[]}}", answer.question));
                let answer = ask_first(target, &Method::POST, "/quitquitquit").await.unwrap();
                assert_eq!(answer.code, StatusCode::OK, "{answer}");
                assert!(matches!(commands.recv().await, Some(Command::Quit)));
            }
            assert!(!wait_for(&targets, Duration::ZERO).await);
            token.send_replace(Arc::new(Status { started: true, usable: true, ..status() }));
            assert!(wait_for(&targets, Duration::MAX).await);
            stop.send(()).unwrap();
        };
        LocalSet::new().run_until(async { tokio::join!(server, person) }).await;
    }

    /// The first address that somebody listens at is asked, again and again until the answer is yes.
    #[tokio::test]
    async fn waits_through_a_no() {
        let folder = tempfile::tempdir().unwrap();
        let (nobody, path) = (folder.path().join("nobody.sock"), folder.path().join("admin.sock"));
        let listener = UnixListener::bind(&path).unwrap();
        let proxy = async {
            for answer in ["503 Service Unavailable", "503 Service Unavailable", "200 OK"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.read_u8().await.unwrap();
                stream.write_all(format!("HTTP/1.1 {answer}\r\ncontent-length: 0\r\n\r\n").as_bytes()).await.unwrap();
            }
        };
        let targets = [Target::Unix(nobody), Target::Unix(path)];
        let (ready, ()) = tokio::join!(wait_for(&targets, Duration::from_secs(30)), proxy);
        assert!(ready);
    }

    /// Where nobody listens, or somebody else does: the message names the place and says what to look at.
    #[tokio::test]
    async fn says_what_to_do_where_there_is_no_answer() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let error = ask_first(&[Target::Unix(path.clone())], &Method::GET, "/startup").await.unwrap_err().to_string();
        assert!(error.contains(&format!("unix:{}", path.display())) && error.contains("admin.address"), "{error}");

        let listener = UnixListener::bind(&path).unwrap();
        let somebody_else = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.read_u8().await.unwrap();
            stream.write_all(b"220 mail.example ESMTP\r\n").await.unwrap();
        };
        let targets = [Target::Unix(path)];
        let (answer, ()) = tokio::join!(ask_first(&targets, &Method::GET, "/startup"), somebody_else);
        let error = answer.unwrap_err().to_string();
        assert!(error.contains("is it the proxy that listens there"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn gives_up_on_a_proxy_that_is_stuck() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("admin.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        let began = Instant::now();
        let error = ask_first(&[Target::Unix(path)], &Method::GET, "/startup").await.unwrap_err().to_string();
        assert!(error.contains("no answer within 2s") && began.elapsed() >= DEADLINE, "{error}");
    }
}
