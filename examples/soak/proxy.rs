//! The proxy's process, and what its metrics say.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use tokio::time::Instant;
use upsolver_auth_proxy::simulator::{Account, Simulator};

use crate::client::PATIENCE;

/// Warnings that are kept for the report of a failure.
const WARNINGS: usize = 30;

/// `target/debug/upsolver-auth-proxy`, where this is `target/debug/examples/soak`.
pub(crate) fn beside_this() -> anyhow::Result<PathBuf> {
    let this = std::env::current_exe()?;
    let binary = this.parent().and_then(Path::parent).context("this program has no directory")?.join("upsolver-auth-proxy");
    ensure!(binary.exists(), "{} does not exist; run `cargo build` first or give --binary", binary.display());
    Ok(binary)
}

/// A running proxy; killed when dropped.
pub(crate) struct Proxy {
    pub(crate) process: Child,
    pub(crate) address: SocketAddr,
    admin: SocketAddr,
    warnings: Arc<Mutex<VecDeque<String>>>,
}

impl Proxy {
    pub(crate) fn start(binary: &Path, simulator: &Simulator, directory: &Path, account: &Account, http2: bool) -> anyhow::Result<Self> {
        let email = directory.join("email");
        std::fs::write(&email, &account.email)?;
        std::fs::write(directory.join("password"), &account.password)?;
        let ca = simulator.write_ca(directory)?;
        let settings = [
            "listen.address=127.0.0.1:0".to_owned(),
            "admin.address=127.0.0.1:0".to_owned(),
            "log.access=off".to_owned(),
            "log.format=json".to_owned(),
            // Each of these protects an account from what this program does on purpose.
            "token.min_mint_interval=0s".to_owned(),
            "token.mint_budget=3600".to_owned(),
            "token.probe_interval=1s".to_owned(),
            "credentials.poll_interval=1s".to_owned(),
            // So that the wait for rest at the end is short.
            "upstream.pool_idle_timeout=5s".to_owned(),
            format!("upstream.http_version={}", if http2 { "2" } else { "1.1" }),
            format!("upstream.url={}", simulator.url()),
            format!("upstream.ca_file={}", ca.display()),
            format!("credentials.email_file={}", email.display()),
            format!("credentials.password_file={}", directory.join("password").display()),
        ];
        let mut command = Command::new(binary);
        command.env_clear().arg("run").args(settings.iter().flat_map(|setting| ["--set", setting]));
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
        let stderr = process.stderr.take().context("it is piped")?;
        let warnings = Arc::new(Mutex::new(VecDeque::new()));
        let kept = Arc::clone(&warnings);
        let (found, addresses) = std::sync::mpsc::channel();
        // Reads on for as long as the proxy lives: a full pipe would make it drop lines.
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let fields: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
                if let Some(name @ ("listening" | "admin server listening")) = fields["message"].as_str()
                    && let Some(address) = fields["address"].as_str().and_then(|address| address.parse::<SocketAddr>().ok())
                {
                    // Nobody waits any longer where the start failed.
                    let _ = found.send((name == "listening", address));
                } else if fields["level"] != "INFO" {
                    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.push_back(line);
                    if kept.len() > WARNINGS {
                        kept.pop_front();
                    }
                }
            }
        });
        let mut proxy = Self { process, address: ([0, 0, 0, 0], 0).into(), admin: ([0, 0, 0, 0], 0).into(), warnings };
        for _ in 0..2 {
            match addresses.recv_timeout(PATIENCE) {
                Ok((true, address)) => proxy.address = address,
                Ok((false, address)) => proxy.admin = address,
                Err(_) => bail!("the proxy does not listen:\n{}", proxy.warnings()),
            }
        }
        let ready = Instant::now() + PATIENCE;
        while !proxy.ask("/readiness")?.starts_with("HTTP/1.1 200 ") {
            ensure!(Instant::now() < ready, "the proxy does not get ready:\n{}", proxy.warnings());
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(proxy)
    }

    /// The last lines of its log that are more than information.
    pub(crate) fn warnings(&self) -> String {
        let warnings = self.warnings.lock().unwrap_or_else(PoisonError::into_inner);
        warnings.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    fn ask(&self, path: &str) -> anyhow::Result<String> {
        let mut connection = TcpStream::connect(self.admin)?;
        connection.set_read_timeout(Some(PATIENCE))?;
        write!(connection, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        connection.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// What the metrics say now.
    pub(crate) fn sample(&self) -> anyhow::Result<Sample> {
        let page = self.ask("/metrics")?;
        let value = |name: &str| {
            let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.and_then(|value| value.parse().ok()).with_context(|| format!("no metric {name}"))
        };
        Ok(Sample {
            resident: value("process_resident_memory_bytes")?,
            descriptors: value("process_open_fds")?,
            tasks: value("upsolver_auth_proxy_tasks")?,
            in_flight: value("upsolver_auth_proxy_requests_in_flight")?,
        })
    }

    /// The first sample without a request that has no more descriptors and tasks than `baseline`, or the last one within `limit`.
    pub(crate) fn at_rest(&self, baseline: Option<&Sample>, limit: Duration) -> anyhow::Result<Sample> {
        let deadline = Instant::now() + limit;
        loop {
            let sample = self.sample()?;
            if sample.is_at_rest(baseline) || Instant::now() > deadline {
                return Ok(sample);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to kill.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The process at one moment. All are numbers of a metrics page, so all are floating.
#[derive(Clone, Copy)]
pub(crate) struct Sample {
    /// Bytes.
    pub(crate) resident: f64,
    pub(crate) descriptors: f64,
    /// Of the workers.
    pub(crate) tasks: f64,
    pub(crate) in_flight: f64,
}

impl Sample {
    pub(crate) fn is_at_rest(&self, baseline: Option<&Self>) -> bool {
        let no_more = |baseline: &Self| self.descriptors <= baseline.descriptors && self.tasks <= baseline.tasks;
        self.in_flight == 0.0 && baseline.is_none_or(no_more)
    }
}
