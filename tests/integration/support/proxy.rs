//! The proxy under test: the real binary, with everything it prints captured.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use upsolver_auth_proxy::simulator::{Account, Simulator};

use super::raw::{Message, PATIENCE, Raw, RawUpstream};

/// Settings that every test proxy starts from: ports chosen by the system, one worker, trace logs.
const BASE: &[&str] = &["listen.address=127.0.0.1:0", "admin.address=127.0.0.1:0", "runtime.workers=1"];

/// A secret made at run time, which must never show in anything that the proxy prints.
pub(crate) fn canary(kind: &str) -> String {
    let random: String = std::iter::repeat_with(fastrand::alphanumeric).take(24).collect();
    format!("canary{kind}{random}")
}

/// The acceptance figures with `UPSOLVER_LONG=1`; otherwise as much as a run of all tests has time for.
pub(crate) fn long_or<T>(long: T, short: T) -> T {
    if std::env::var_os("UPSOLVER_LONG").is_some() { long } else { short }
}

/// How to start the proxy.
pub(crate) struct Builder {
    overrides: Vec<String>,
    environment: Vec<(String, String)>,
    secrets: Vec<String>,
    directory: tempfile::TempDir,
    descriptors: Option<u32>,
}

/// A running proxy; killed when dropped, after its output was searched for secrets.
pub(crate) struct Proxy {
    child: Child,
    output: Arc<Output>,
    reader: Option<JoinHandle<()>>,
    secrets: Vec<String>,
    /// Where the first listener is; unspecified where that is a Unix socket.
    pub(crate) address: SocketAddr,
    /// Where the admin server is; unspecified where that is a Unix socket.
    pub(crate) admin: SocketAddr,
    directory: tempfile::TempDir,
    killed: bool,
}

#[derive(Default)]
struct Output {
    lines: Mutex<Vec<String>>,
    changed: Condvar,
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self {
            overrides: BASE.iter().map(ToString::to_string).collect(),
            environment: vec![("RUST_LOG".to_owned(), "trace".to_owned())],
            secrets: Vec::new(),
            directory: tempfile::tempdir().expect("a temporary directory"),
            descriptors: None,
        }
    }

    /// Against a raw upstream, with a token from a file, so that nothing but the test's requests reaches it.
    pub(crate) fn to_raw(upstream: &RawUpstream, token: &str) -> Self {
        let mut builder = Self::new().set(format!("upstream.url=http://{}", upstream.address())).secret(token);
        let file = builder.file("token", token);
        builder = builder.set(format!("credentials.token_file={}", file.display()));
        builder
    }

    /// Against the simulated API, minting with `account`.
    pub(crate) fn to_simulator(simulator: &Simulator, account: &Account) -> Self {
        let builder = Self::to_simulator_without_credentials(simulator);
        builder
            .env("UPSOLVER_EMAIL", &account.email)
            .env("UPSOLVER_PASSWORD", &account.password)
            .secret(&account.email)
            .secret(&account.password)
    }

    /// Against the simulated API; where the credentials come from is the test's matter.
    pub(crate) fn to_simulator_without_credentials(simulator: &Simulator) -> Self {
        let builder = Self::new();
        let ca = simulator.write_ca(builder.directory()).expect("a writable directory");
        builder.set(format!("upstream.url={}", simulator.url())).set(format!("upstream.ca_file={}", ca.display()))
    }

    /// One `section.key=value`, as `--set` takes it.
    pub(crate) fn set(mut self, value: impl Into<String>) -> Self {
        self.overrides.push(value.into());
        self
    }

    /// One environment variable.
    pub(crate) fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    /// How many descriptors the process may have.
    pub(crate) fn descriptors(mut self, limit: u32) -> Self {
        self.descriptors = Some(limit);
        self
    }

    /// A string that must not show in the output.
    pub(crate) fn secret(mut self, secret: impl Into<String>) -> Self {
        self.secrets.push(secret.into());
        self
    }

    /// Writes a file into the proxy's own temporary directory.
    pub(crate) fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::write(&path, content).expect("a writable directory");
        path
    }

    /// The proxy's own temporary directory.
    pub(crate) fn directory(&self) -> &std::path::Path {
        self.directory.path()
    }

    /// The command line and environment, output piped: for tests that start the process by themselves.
    pub(crate) fn command(&self) -> Command {
        let binary = env!("CARGO_BIN_EXE_upsolver-auth-proxy");
        let mut command = match self.descriptors {
            None => Command::new(binary),
            // The process is not dumpable, so nobody can set its limits from outside once it runs.
            Some(limit) => {
                let mut shell = Command::new("/bin/sh");
                shell.args(["-c", &format!("ulimit -n {limit} && exec \"$0\" \"$@\""), binary]);
                shell
            }
        };
        command.env_clear().env("PATH", "/usr/bin:/bin").envs(self.environment.iter().cloned());
        command.arg("run");
        for value in &self.overrides {
            command.args(["--set", value]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs it to its end, for configurations that do not start: exit status and everything printed.
    pub(crate) fn run_to_end(self) -> (ExitStatus, String) {
        let output = self.command().output().expect("the binary runs");
        let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert_no_secret(&self.secrets, &text);
        (output.status, text)
    }

    /// Starts it and waits until it listens.
    pub(crate) fn start(self) -> Proxy {
        let mut child = self.command().spawn().expect("the binary runs");
        let output = Arc::new(Output::default());
        let streams: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stderr.take().expect("piped")), Box::new(child.stdout.take().expect("piped"))];
        let readers = streams.map(|stream| {
            let output = Arc::clone(&output);
            std::thread::spawn(move || {
                for line in BufReader::new(stream).lines().map_while(Result::ok) {
                    output.lines.lock().expect("no reader panics").push(line);
                    output.changed.notify_all();
                }
            })
        });
        let reader = std::thread::spawn(move || readers.into_iter().for_each(|reader| reader.join().expect("readers do not panic")));
        let mut proxy = Proxy {
            child,
            output,
            reader: Some(reader),
            secrets: self.secrets,
            address: SocketAddr::from(([0, 0, 0, 0], 0)),
            admin: SocketAddr::from(([0, 0, 0, 0], 0)),
            directory: self.directory,
            killed: false,
        };
        // A Unix socket has no such address; a test that starts with one connects by itself.
        let parse = |address: String| address.parse().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
        proxy.admin = parse(proxy.wait_for_field("admin server listening", "address"));
        proxy.address = parse(proxy.wait_for_field("listening", "address"));
        proxy
    }
}

impl Proxy {
    /// A raw connection to it.
    pub(crate) fn connect(&self) -> Raw {
        Raw::connect(self.address)
    }

    /// Sends bytes on a new connection and reads one response.
    pub(crate) fn exchange(&self, request: impl AsRef<[u8]>) -> Message {
        let mut connection = self.connect();
        connection.send(request.as_ref());
        connection.read_response(request.as_ref().starts_with(b"HEAD ")).expect("a response")
    }

    /// A plain GET.
    pub(crate) fn get(&self, path: &str) -> Message {
        self.exchange(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    }

    /// A request to the admin server.
    pub(crate) fn ask_admin(&self, method: &str, path: &str) -> Message {
        let mut connection = Raw::connect(self.admin);
        connection.send(format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"));
        connection.read_response(method == "HEAD").expect("a response")
    }

    /// `/status`, parsed.
    pub(crate) fn status(&self) -> serde_json::Value {
        serde_json::from_slice(&self.ask_admin("GET", "/status").body).expect("JSON")
    }

    /// The value of a sample of `/metrics`, named as it stands there, labels included; 0 where it is absent.
    pub(crate) fn metric(&self, sample: &str) -> f64 {
        let page = self.ask_admin("GET", "/metrics").text();
        assert_no_secret(&self.secrets, &page);
        page.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' ')?.split(' ').next()?.parse().ok()).unwrap_or(0.0)
    }

    /// Polls until `condition` holds, the more rarely the longer it takes: where there is little processor time, asking must not take it all.
    pub(crate) fn wait_until(&self, what: &str, mut condition: impl FnMut(&Self) -> bool) {
        let begun = Instant::now();
        while !condition(self) {
            let waited = begun.elapsed();
            assert!(waited < PATIENCE, "{what} did not happen within {PATIENCE:?}; log:\n{}", self.log());
            std::thread::sleep((waited / 20).clamp(Duration::from_millis(10), Duration::from_millis(500)));
        }
    }

    /// Blocks until the proxy can take traffic.
    pub(crate) fn wait_ready(&self) {
        self.wait_until("readiness", |proxy| proxy.ask_admin("GET", "/readiness").status() == 200);
    }

    /// Waits for a log line whose message is `message` and returns one of its fields.
    pub(crate) fn wait_for_field(&self, message: &str, field: &str) -> String {
        self.wait_for_line(message, |line| {
            let line: serde_json::Value = serde_json::from_str(line).ok()?;
            (line["message"] == message).then(|| line[field].as_str().map(str::to_owned))?
        })
    }

    /// Waits for a log line that contains `text`.
    pub(crate) fn wait_for_log(&self, text: &str) -> String {
        self.wait_for_line(text, |line| line.contains(text).then(|| line.to_owned()))
    }

    fn wait_for_line(&self, what: &str, mut find: impl FnMut(&str) -> Option<String>) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut lines = self.output.lines.lock().expect("no reader panics");
        let mut seen = 0;
        loop {
            if let Some(found) = lines[seen..].iter().find_map(|line| find(line)) {
                return found;
            }
            seen = lines.len();
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                // The drop prints the log, and needs the lock for it.
                drop(lines);
                panic!("no log line {what:?} within {PATIENCE:?}");
            }
            lines = self.output.changed.wait_timeout(lines, left).expect("no reader panics").0;
        }
    }

    /// Everything printed so far.
    pub(crate) fn log(&self) -> String {
        self.output.lines.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }

    /// Process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by number.
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(i32::try_from(self.child.id()).expect("a pid")).expect("a running child");
        rustix::process::kill_process(pid, signal).expect("a running child");
    }

    /// Waits for the process to end by itself.
    pub(crate) fn wait_exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                return status;
            }
            assert!(Instant::now() < deadline, "the proxy did not end within {PATIENCE:?}; log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// SIGTERM, then the exit status.
    pub(crate) fn stop(&mut self) -> ExitStatus {
        self.signal(rustix::process::Signal::TERM);
        self.wait_exit()
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        self.child.kill().expect("a running child");
        self.child.wait().expect("a child");
        self.killed = true;
    }

    /// The proxy's own temporary directory.
    pub(crate) fn directory(&self) -> &std::path::Path {
        self.directory.path()
    }

    /// Resident memory, in bytes.
    pub(crate) fn resident_bytes(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// The most resident memory that there ever was, in bytes.
    pub(crate) fn peak_bytes(&self) -> u64 {
        self.memory("VmHWM:")
    }

    fn memory(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).expect("a running child");
        let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("a field of proc(5)");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let status = self.child.try_wait().ok().flatten();
        if status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
        if std::thread::panicking() {
            eprintln!("--- log of the proxy:\n{}", self.log());
            return;
        }
        let log = self.log();
        assert_no_secret(&self.secrets, &log);
        assert!(!log.contains("panicked at"), "the proxy panicked:\n{log}");
        let crashed = status.and_then(|status| status.signal()).filter(|_| !self.killed);
        assert_eq!(crashed, None, "the proxy was ended by a signal:\n{log}");
    }
}

/// B36, E22: fails the test where a secret shows.
pub(crate) fn assert_no_secret(secrets: &[String], text: &str) {
    for secret in secrets {
        assert!(!text.contains(secret.as_str()), "a secret shows in:\n{}", text.replace(secret.as_str(), "<<<SECRET>>>"));
    }
}
