//! The simulated Upsolver API: `demo`, tests and benchmarks all use this one.
//!
//! A [`Simulator`] listens on a loopback port, speaks TLS with a certificate of its own authority, mints and checks tokens, answers what Upsolver's
//! clients ask, and records what it received. Through [`Control`], to which it dereferences, a test makes accounts and tokens come and go and
//! orders faults. It runs on a thread and runtime of its own, so blocking tests can use it, and a paused clock of a test does not reach it.
//!
//! Reading order: `api` answers, `query` with it; `faults` says what can go wrong; `control` holds the state; `record` and `heads` keep what came
//! in; `connection` accepts and applies the faults, `stream` and `body` carry them out.
//!
//! It simulates the protocol, not the product: there is one organization, and every live token may do everything that is not called `/forbidden`.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::oneshot;
use tokio_rustls::TlsAcceptor;

use self::certificates::{Authority, Variant};
use self::connection::{Port, Service};
use self::control::alphanumeric;

mod api;
mod body;
pub mod certificates;
mod connection;
mod control;
mod faults;
mod heads;
mod query;
mod record;
mod stream;
#[cfg(test)]
mod tests;

pub use self::body::byte_at;
pub use self::control::{Control, Counters, Ended, Greeting, Interrupted, Mint, TimedOut};
pub use self::faults::{Action, End, Fault, FaultId, Point};
pub use self::record::{MAX_RECORDED_BODY, Received};

/// How a simulator starts. The default is TLS with HTTP/1.1 on a free port, no account, and everything recorded.
#[derive(Clone)]
pub struct Options {
    /// Where it listens. Port 0, the default on 127.0.0.1, takes a free one.
    pub address: SocketAddr,
    /// TLS or plain TCP.
    pub transport: Transport,
    /// The protocols it speaks.
    pub protocols: Protocols,
    /// Who may mint.
    pub accounts: Vec<Account>,
    /// Whether requests are kept for [`Control::requests`]. Off for benchmarks and the demo, which would keep everything for ever.
    pub record: bool,
    /// How many answers to a new query are "pending": the first one 201, the others 202. 0: its first answer is its first page.
    pub pending_polls: u32,
    /// How many pages a query's result has.
    pub pages: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            address: (Ipv4Addr::LOCALHOST, 0).into(),
            transport: Transport::Tls(Variant::Good),
            protocols: Protocols::Http1,
            accounts: Vec::new(),
            record: true,
            pending_polls: 2,
            pages: 2,
        }
    }
}

/// What the API is spoken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Plain TCP, for `http://` upstreams on loopback.
    Plain,
    /// TLS with a certificate for `localhost`, `api.upsolver.com` and 127.0.0.1, good or bad.
    Tls(Variant),
}

/// Which HTTP the simulator speaks. Over plain TCP, [`Protocols::Http2`] means prior knowledge (RFC 9113 section 3.3) and the others HTTP/1.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocols {
    /// Offers `http/1.1` by ALPN.
    Http1,
    /// Offers `h2` alone.
    Http2,
    /// Offers `h2`, then `http/1.1`.
    Both,
}

impl Protocols {
    fn alpn(self) -> &'static [&'static [u8]] {
        match self {
            Self::Http1 => &[b"http/1.1"],
            Self::Http2 => &[b"h2"],
            Self::Both => &[b"h2", b"http/1.1"],
        }
    }
}

/// An email and a password that may mint. Known to the simulator alone, so it is not one of the crate's secrets.
#[derive(Clone, PartialEq, Eq)]
pub struct Account {
    /// The value of `x-api-email`.
    pub email: String,
    /// The value of `x-api-password`.
    pub password: String,
}

/// An account made up at run time, for the demo: no password stands in the code, where somebody could use it elsewhere.
pub fn demo_credentials() -> Account {
    Account { email: format!("demo-{}@example.com", alphanumeric(8).to_lowercase()), password: alphanumeric(24) }
}

/// A running simulated API. Dropping it ends all connections and waits for its thread; a panic there becomes the dropping thread's.
pub struct Simulator {
    control: Control,
    address: SocketAddr,
    transport: Transport,
    ca_pem: String,
    /// Dropped to stop the thread.
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

impl Simulator {
    /// Makes an authority and a certificate, opens the port and starts the thread. The port accepts connections when this returns.
    pub fn start(options: Options) -> io::Result<Self> {
        let authority = Authority::new().map_err(io::Error::other)?;
        let port = Port::reserve(options.address)?;
        let listener = port.open()?;
        let address = port.address();
        let tls = match options.transport {
            Transport::Plain => None,
            Transport::Tls(variant) => {
                let names = ["localhost", "api.upsolver.com", "127.0.0.1"];
                let identity = authority.issue(&names, variant).map_err(io::Error::other)?;
                let config = identity.server_config(options.protocols.alpn()).map_err(io::Error::other)?;
                Some(TlsAcceptor::from(Arc::new(config)))
            }
        };
        let (transport, protocols) = (options.transport, options.protocols);
        let control = Control::new(options, format!("localhost:{}", address.port()));
        let service = Service { control: control.clone(), tls, protocols };
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new().name("simulated-upsolver".to_owned()).spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
            runtime.block_on(connection::accept(port, listener, service, stopped))
        })?;
        Ok(Self { control, address, transport, ca_pem: authority.pem(), stop: Some(stop), thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its base URL with the name `localhost`, without a final slash: a value for `upstream.url`.
    pub fn url(&self) -> String {
        let scheme = if self.transport == Transport::Plain { "http" } else { "https" };
        format!("{scheme}://localhost:{}", self.address.port())
    }

    /// The certificate of its authority. A client trusts it to accept the simulator.
    pub fn ca_pem(&self) -> &str {
        &self.ca_pem
    }

    /// Writes [`ca_pem`](Self::ca_pem) into a directory and returns the file: a value for `upstream.ca_file`.
    pub fn write_ca(&self, directory: &Path) -> io::Result<PathBuf> {
        let path = directory.join("simulated-upsolver-ca.pem");
        fs::write(&path, &self.ca_pem)?;
        Ok(path)
    }

    /// A handle that outlives borrows of the simulator and goes to other threads.
    pub fn control(&self) -> Control {
        self.control.clone()
    }
}

impl Deref for Simulator {
    type Target = Control;

    fn deref(&self) -> &Control {
        &self.control
    }
}

impl Drop for Simulator {
    fn drop(&mut self) {
        drop(self.stop.take());
        let result = self.thread.take().map(JoinHandle::join);
        if thread::panicking() {
            return; // a second panic would abort the test run and hide the first
        }
        match result {
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            Some(Ok(Err(error))) => tracing::error!(%error, "the simulated API stopped early"),
            Some(Ok(Ok(()))) | None => {}
        }
    }
}
