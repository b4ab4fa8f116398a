//! Drives mixed traffic through the real binary to the simulated API for a given time, and checks every byte that comes back (matrix D33):
//!
//! `cargo run --example soak -- --seconds 60 --clients 8`
//!
//! Downloads and uploads of all sizes, polls, and downloads that are abandoned half-way; meanwhile, every few seconds, the token is revoked, the password
//! changes, or the upstream ends all its connections, in order or by reset. An error that these explain is counted by its kind; wrong bytes, a request
//! without an answer and a proxy that dies are failures. The report ends with memory and descriptors over time. Exit status 1 where something was wrong.
#![allow(clippy::print_stdout, reason = "a program whose output is its report")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use clap::Parser;
use tokio::time::Instant;
use upsolver_auth_proxy::simulator::{self, End, Options, Simulator, byte_at};

/// Longer than anything takes that goes well, `token.wait` included.
const PATIENCE: Duration = Duration::from_mins(1);
/// Between two disturbances.
const DISTURBANCE: Duration = Duration::from_secs(3);
/// Memory and descriptors settle in this share of the time; the slope is taken over the rest.
const WARM_UP: f64 = 0.25;
/// Growth of resident memory after the warm-up that allocators explain, in bytes.
const TOLERATED_GROWTH: f64 = 4.0 * 1024.0 * 1024.0;

/// Drives mixed traffic through the proxy and checks every byte.
#[derive(Parser)]
struct Arguments {
    /// How long.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Apps at a time, each with a connection of its own.
    #[arg(long, default_value_t = 8)]
    clients: u64,
    /// The proxy's binary; by default the one that cargo built beside this.
    #[arg(long)]
    binary: Option<PathBuf>,
}

fn main() -> ExitCode {
    match soak(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing was wrong.
fn soak(arguments: &Arguments) -> anyhow::Result<bool> {
    let account = simulator::demo_credentials();
    let simulator = Simulator::start(Options { accounts: vec![account.clone()], record: false, ..Options::default() })?;
    let directory = tempfile::tempdir()?;
    let binary = arguments.binary.clone().map_or_else(beside_this, Ok)?;
    let mut proxy = Proxy::start(&binary, &simulator, directory.path(), &account)?;

    let started = Instant::now();
    let until = started + Duration::from_secs(arguments.seconds);
    let tally = Mutex::new(Tally::default());
    let stop = AtomicBool::new(false);
    let samples = std::thread::scope(|scope| {
        for _ in 0..arguments.clients {
            scope.spawn(|| client(proxy.address, until, &tally));
        }
        scope.spawn(|| disturb(&simulator, &account, directory.path(), &stop));
        let samples = watch(&proxy, started, until);
        stop.store(true, Ordering::Relaxed);
        samples
    });
    let tally = tally.into_inner().map_err(|_| anyhow!("a client panicked"))?;
    let alive = proxy.process.try_wait()?.is_none();
    let end = alive.then(|| proxy.sample()).transpose()?;
    Ok(report(&tally, &samples, end, simulator.mints().len(), alive))
}

/// `target/debug/upsolver-auth-proxy`, where this is `target/debug/examples/soak`.
fn beside_this() -> anyhow::Result<PathBuf> {
    let this = std::env::current_exe()?;
    let binary = this.parent().and_then(Path::parent).context("this program has no directory")?.join("upsolver-auth-proxy");
    ensure!(binary.exists(), "{} does not exist; run `cargo build` first or give --binary", binary.display());
    Ok(binary)
}

/// The proxy's process.
struct Proxy {
    process: Child,
    address: SocketAddr,
}

impl Proxy {
    fn start(binary: &Path, simulator: &Simulator, directory: &Path, account: &simulator::Account) -> anyhow::Result<Self> {
        let email = directory.join("email");
        std::fs::write(&email, &account.email)?;
        std::fs::write(directory.join("password"), &account.password)?;
        let ca = simulator.write_ca(directory)?;
        let settings = [
            "listen.address=127.0.0.1:0".to_owned(),
            "admin.address=off".to_owned(),
            "log.access=off".to_owned(),
            "log.format=json".to_owned(),
            // Each of these protects an account from what this program does on purpose.
            "token.min_mint_interval=0s".to_owned(),
            "token.mint_budget=3600".to_owned(),
            "token.probe_interval=1s".to_owned(),
            "credentials.poll_interval=1s".to_owned(),
            format!("upstream.url={}", simulator.url()),
            format!("upstream.ca_file={}", ca.display()),
            format!("credentials.email_file={}", email.display()),
            format!("credentials.password_file={}", directory.join("password").display()),
        ];
        let mut command = Command::new(binary);
        command.env_clear().arg("run").args(settings.iter().flat_map(|setting| ["--set", setting]));
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let stderr = process.stderr.take().context("it is piped")?;
        let (found, address) = std::sync::mpsc::channel();
        // Reads on for as long as the proxy lives: a full pipe would make it drop lines.
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let fields: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
                if fields["message"] == "listening"
                    && let Some(address) = fields["address"].as_str().and_then(|address| address.parse().ok())
                {
                    // Nobody waits any longer where the start failed.
                    let _ = found.send(address);
                } else if fields.is_null() || line.contains("panicked") {
                    // What is no log line says why it does not start.
                    println!("proxy: {line}");
                }
            }
        });
        let Ok(address) = address.recv_timeout(PATIENCE) else {
            // It goes no further without an address.
            let _ = process.kill();
            bail!("the proxy does not listen");
        };
        Ok(Self { process, address })
    }

    fn sample(&self) -> anyhow::Result<Sample> {
        let directory = PathBuf::from(format!("/proc/{}", self.process.id()));
        let status = std::fs::read_to_string(directory.join("status"))?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u32>().ok());
        Ok(Sample {
            resident: f64::from(resident.context("no VmRSS")?) * 1024.0,
            // Who may not list a hardened process's descriptors does without.
            descriptors: std::fs::read_dir(directory.join("fd")).map_or(0, Iterator::count),
        })
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The process at one moment.
#[derive(Clone, Copy)]
struct Sample {
    /// Bytes.
    resident: f64,
    descriptors: usize,
}

/// Memory and descriptors, second by second.
fn watch(proxy: &Proxy, started: Instant, until: Instant) -> Vec<(f64, Sample)> {
    let mut samples = Vec::new();
    while Instant::now() < until {
        std::thread::sleep(Duration::from_secs(1));
        if let Ok(sample) = proxy.sample() {
            samples.push((started.elapsed().as_secs_f64(), sample));
        }
    }
    samples
}

/// Revokes, rotates and restarts in turn.
fn disturb(simulator: &Simulator, account: &simulator::Account, directory: &Path, stop: &AtomicBool) {
    for turn in 0_u64.. {
        let next = Instant::now() + DISTURBANCE;
        while Instant::now() < next {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        match turn % 5 {
            0 => drop(simulator.revoke_all()),
            1 => simulator.end_connections(End::Close),
            2 => {
                let password = format!("password-{turn}");
                simulator.change_password(&account.email, &password);
                let fresh = directory.join("password.new");
                let replaced = std::fs::write(&fresh, password).and_then(|()| std::fs::rename(&fresh, directory.join("password")));
                if let Err(error) = replaced {
                    println!("cannot rotate the password: {error}");
                }
            }
            3 => simulator.end_connections(End::Reset),
            _ => simulator.end_connections(End::Fin),
        }
    }
}

/// What happened to the requests.
#[derive(Default)]
struct Tally {
    /// Answered as it should be.
    right: u64,
    /// Abandoned on purpose.
    abandoned: u64,
    /// Explained by a disturbance, by kind.
    explained: BTreeMap<String, u64>,
    /// Not to be explained.
    wrong: Vec<String>,
}

/// How one request ended.
enum Outcome {
    Right,
    Abandoned,
    Explained(String),
}

/// One app: request after request on one connection, on a new one after an end.
fn client(address: SocketAddr, until: Instant, tally: &Mutex<Tally>) {
    let mut connection = None;
    while Instant::now() < until {
        let kind = fastrand::u32(..100);
        let outcome = exchange(&mut connection, address, kind);
        if !matches!(outcome, Ok(Outcome::Right)) {
            connection = None;
        }
        let Ok(mut tally) = tally.lock() else { return };
        match outcome {
            Ok(Outcome::Right) => tally.right += 1,
            Ok(Outcome::Abandoned) => tally.abandoned += 1,
            Ok(Outcome::Explained(reason)) => *tally.explained.entry(reason).or_default() += 1,
            Err(error) => tally.wrong.push(format!("{error:#}")),
        }
    }
}

/// One request of a random kind. An error is something that nothing explains.
fn exchange(connection: &mut Option<BufReader<TcpStream>>, address: SocketAddr, kind: u32) -> anyhow::Result<Outcome> {
    if connection.is_none() {
        let stream = TcpStream::connect(address).context("cannot connect to the proxy")?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        *connection = Some(BufReader::new(stream));
    }
    let stream = connection.as_mut().context("just made")?;
    match kind {
        0..2 => abandon(stream),
        2..40 => download(stream, size(), fastrand::bool()),
        40..60 => upload(stream, size()),
        _ => ask(stream, "GET /inputs/ HTTP/1.1\r\nHost: localhost\r\n\r\n", b"Orders from Kafka"),
    }
}

/// Most bodies are small, some are not.
fn size() -> u64 {
    match fastrand::u32(..100) {
        0..70 => fastrand::u64(..4096),
        70..95 => fastrand::u64(..200_000),
        _ => fastrand::u64(..4_000_000),
    }
}

fn download(stream: &mut BufReader<TcpStream>, length: u64, chunked: bool) -> anyhow::Result<Outcome> {
    let framing = if chunked { "?framing=chunked" } else { "" };
    let request = format!("GET /bytes/{length}{framing} HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let reply = match send(stream, request.as_bytes()).and_then(|()| read_reply(stream)) {
        Ok(reply) => reply,
        Err(error) => return broken(&error, "GET"),
    };
    if let Some(outcome) = refused(&reply, "GET")? {
        return Ok(outcome);
    }
    let wrong = reply.body.iter().zip(0..).find(|(byte, position)| **byte != byte_at(*position));
    ensure!(
        wrong.is_none() && reply.body.len() as u64 == length,
        "GET of {length} bytes: {} came, first wrong: {wrong:?}",
        reply.body.len()
    );
    Ok(Outcome::Right)
}

fn upload(stream: &mut BufReader<TcpStream>, length: u64) -> anyhow::Result<Outcome> {
    let body: Vec<u8> = (0..length).map(byte_at).collect();
    let mut request = format!("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n").into_bytes();
    request.extend_from_slice(&body);
    // An echo begins before the upload ends, so both go on at the same time.
    let writer = stream.get_ref().try_clone()?;
    let reply = std::thread::scope(|scope| {
        scope.spawn(|| send(&writer, &request));
        read_reply(stream)
    });
    let reply = match reply {
        Ok(reply) => reply,
        Err(error) => return broken(&error, "POST"),
    };
    if let Some(outcome) = refused(&reply, "POST")? {
        return Ok(outcome);
    }
    ensure!(reply.body == body, "an echo of {length} bytes has {} that are not the same", reply.body.len());
    Ok(Outcome::Right)
}

fn ask(stream: &mut BufReader<TcpStream>, request: &str, expected: &[u8]) -> anyhow::Result<Outcome> {
    let reply = match send(stream, request.as_bytes()).and_then(|()| read_reply(stream)) {
        Ok(reply) => reply,
        Err(error) => return broken(&error, "GET"),
    };
    if let Some(outcome) = refused(&reply, "GET")? {
        return Ok(outcome);
    }
    ensure!(reply.body.windows(expected.len()).any(|window| window == expected), "a wrong answer to {request:?}");
    Ok(Outcome::Right)
}

/// Reads a little of a long download and leaves.
fn abandon(stream: &mut BufReader<TcpStream>) -> anyhow::Result<Outcome> {
    let mut some = [0; 100];
    let read = send(stream, b"GET /bytes/50000000 HTTP/1.1\r\nHost: localhost\r\n\r\n").and_then(|()| stream.read_exact(&mut some));
    read.map_or_else(|error| broken(&error, "GET"), |()| Ok(Outcome::Abandoned))
}

/// A connection that ended inside an exchange: what an upstream that ends its connections makes of a reply that has begun.
fn broken(error: &io::Error, method: &str) -> anyhow::Result<Outcome> {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            Ok(Outcome::Explained(format!("{method}: cut with the upstream's connection")))
        }
        kind => bail!("{method}: {kind}: {error}"),
    }
}

/// A reply that is not the wanted one. Explained where the proxy says that the upstream ended or that there is no token yet, and where the token of an
/// upload that is too large to be kept was revoked.
fn refused(reply: &Reply, method: &str) -> anyhow::Result<Option<Outcome>> {
    let code = serde_json::from_slice::<serde_json::Value>(&reply.body).ok().and_then(|body| Some(body["code"].as_str()?.to_owned()));
    match (reply.status, code) {
        (200, _) => Ok(None),
        (502 | 503, Some(code)) => Ok(Some(Outcome::Explained(format!("{method}: {} {code}", reply.status)))),
        (403, _) => Ok(Some(Outcome::Explained(format!("{method}: 403 with a revoked token")))),
        (status, code) => bail!("{method}: {status} {code:?}"),
    }
}

struct Reply {
    status: u16,
    body: Vec<u8>,
}

fn send(stream: &(impl AsTcp + ?Sized), bytes: &[u8]) -> io::Result<()> {
    stream.as_tcp().write_all(bytes)
}

/// The socket under a reader.
trait AsTcp {
    fn as_tcp(&self) -> &TcpStream;
}

impl AsTcp for TcpStream {
    fn as_tcp(&self) -> &TcpStream {
        self
    }
}

impl AsTcp for BufReader<TcpStream> {
    fn as_tcp(&self) -> &TcpStream {
        self.get_ref()
    }
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

/// Prints everything; answers whether nothing was wrong.
fn report(tally: &Tally, samples: &[(f64, Sample)], end: Option<Sample>, mints: usize, alive: bool) -> bool {
    let explained: u64 = tally.explained.values().sum();
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(text, "requests     {}", tally.right + tally.abandoned + explained + tally.wrong.len() as u64);
    let _ = writeln!(text, "  right      {}\n  abandoned  {}\n  explained  {explained}", tally.right, tally.abandoned);
    for (kind, count) in &tally.explained {
        let _ = writeln!(text, "    {count:>7}  {kind}");
    }
    let _ = writeln!(text, "  wrong      {}", tally.wrong.len());
    for wrong in tally.wrong.iter().take(20) {
        let _ = writeln!(text, "    {wrong}");
    }
    let _ = writeln!(text, "mints        {mints}");
    let duration = samples.last().map_or(0.0, |(time, _)| *time);
    let settled: Vec<_> = samples.iter().filter(|(time, _)| *time >= duration * WARM_UP).collect();
    let growth = slope(&settled) * duration * (1.0 - WARM_UP);
    let mebibytes = |bytes: f64| bytes / 1024.0 / 1024.0;
    if let (Some((_, first)), Some((_, last))) = (settled.first(), settled.last()) {
        let _ = writeln!(
            text,
            "memory       {:.1} MiB after the warm-up, {:.1} MiB at the end, trend over that time {:+.2} MiB",
            mebibytes(first.resident),
            mebibytes(last.resident),
            mebibytes(growth)
        );
        let most = samples.iter().map(|(_, sample)| sample.descriptors).max().unwrap_or_default();
        let at_end = end.map_or(0, |sample| sample.descriptors);
        let _ = writeln!(text, "descriptors  {} after the warm-up, {most} at most, {at_end} without clients", first.descriptors);
    }
    let flat = growth <= TOLERATED_GROWTH;
    if !flat {
        text.push_str("FAILED: memory grows\n");
    }
    if !alive {
        text.push_str("FAILED: the proxy ended\n");
    }
    if !tally.wrong.is_empty() {
        text.push_str("FAILED: something was wrong that nothing explains\n");
    }
    if tally.right == 0 {
        text.push_str("FAILED: nothing was answered\n");
    }
    print!("{text}");
    flat && alive && tally.wrong.is_empty() && tally.right > 0
}

/// Least squares over memory, in bytes per second.
fn slope(samples: &[&(f64, Sample)]) -> f64 {
    let count = f64::from(u32::try_from(samples.len()).unwrap_or(u32::MAX)).max(1.0);
    let mean = |value: fn(&(f64, Sample)) -> f64| samples.iter().map(|sample| value(sample)).sum::<f64>() / count;
    let (time, memory) = (mean(|(time, _)| *time), mean(|(_, sample)| sample.resident));
    let covariance: f64 = samples.iter().map(|(at, sample)| (at - time) * (sample.resident - memory)).sum();
    let variance: f64 = samples.iter().map(|(at, _)| (at - time).powi(2)).sum();
    if variance > 0.0 { covariance / variance } else { 0.0 }
}
