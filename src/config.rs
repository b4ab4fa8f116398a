//! The configuration, as the rest of the program sees it: one type a section.
//!
//! Values here are valid by construction: they come out of [`Config::load`] or not at all, and nothing checks them again.
//!
//! | I want to know | open |
//! |---|---|
//! | which keys exist, with what defaults and why | `config/schema.rs` |
//! | what a key's value must look like, and which keys must go together | `config/sections.rs` |
//! | which source wins | `config/layer.rs` |
//! | what becomes of the file, the environment, `--set` | `config/file.rs`, `config/environment.rs` |

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::uri::Authority;

use crate::secret::{Email, Password};

mod address;
mod effective;
mod environment;
mod error;
mod file;
mod layer;
mod load;
mod memory;
mod policy;
mod reader;
mod schema;
mod sections;
mod suggest;
mod value;

pub use effective::Effective;
pub use error::{Problem, Problems, Provenance};
pub use load::{Loaded, Need, Sources};
pub(crate) use value::parse_log_filter;

/// Everything the proxy was told.
#[derive(Debug, Clone)]
pub struct Config {
    /// `[listen]`
    pub listen: Listen,
    /// `[admin]`
    pub admin: Admin,
    /// `[credentials]`
    pub credentials: Credentials,
    /// `[token]`
    pub token: Token,
    /// `[upstream]`
    pub upstream: Upstream,
    /// `[limits]`
    pub limits: Limits,
    /// `[policy]`
    pub policy: Policy,
    /// `[log]`
    pub log: Log,
    /// `[runtime]`
    pub runtime: Runtime,
    /// `[shutdown]`
    pub shutdown: Shutdown,
}

/// `[listen]`: where local apps reach the proxy.
#[derive(Debug, Clone, PartialEq)]
pub struct Listen {
    /// One or several; never empty.
    pub addresses: Vec<ListenAddress>,
    /// Permission bits of a Unix socket.
    pub unix_mode: u32,
    /// Whether an address outside loopback was allowed explicitly.
    pub allow_non_loopback: bool,
    /// Further `Host` values, lower case, with a port only where one was configured.
    pub allowed_hosts: Vec<String>,
    /// A file whose content requests must carry as `x-upsolver-auth-proxy-token`.
    pub caller_token_file: Option<PathBuf>,
    /// Connections at a time, over all workers.
    pub max_connections: NonZeroUsize,
    /// To receive a request head, from its first byte.
    pub header_timeout: Duration,
    /// Keep-alive without a request.
    pub idle_timeout: Duration,
    /// Of a request head, in bytes.
    pub max_header_size: usize,
    /// TLS towards the downstream.
    pub tls: Option<ListenTls>,
}

/// One place to listen at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// `localhost:PORT`: 127.0.0.1 and, where the host has IPv6, `::1`.
    Localhost(u16),
    /// An IP address and a port.
    Socket(SocketAddr),
    /// `unix:/path`.
    Unix(PathBuf),
}

/// `[listen.tls]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListenTls {
    /// PEM chain.
    pub certificate_file: PathBuf,
    /// PEM key.
    pub private_key_file: PathBuf,
    /// Demands and verifies client certificates against these roots.
    pub client_ca_file: Option<PathBuf>,
}

/// `[admin]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admin {
    /// Empty: the admin server is off.
    pub addresses: Vec<ListenAddress>,
}

/// `[credentials]`
#[derive(Debug, Clone, PartialEq)]
pub struct Credentials {
    /// Where they come from.
    pub source: CredentialsSource,
    /// How often files are read again although no change was reported.
    pub poll_interval: Duration,
}

/// Where the credentials come from.
#[derive(Debug, Clone, PartialEq)]
pub enum CredentialsSource {
    /// Mint tokens with an email and a password.
    Pair {
        /// The email.
        email: Source<Email>,
        /// The password.
        password: Source<Password>,
    },
    /// Use the token in this file; nothing is ever minted.
    TokenFile(PathBuf),
    /// None; only where the configuration was loaded with [`Need::Nothing`].
    Unconfigured,
}

/// A secret as a value or in a file.
#[derive(Debug, Clone, PartialEq)]
pub enum Source<T> {
    /// Written in the configuration or the environment; cannot rotate. `origin` tells people where, e.g. `environment variable UPSOLVER_EMAIL`.
    Value {
        /// The secret.
        value: T,
        /// Where it was written, for messages.
        origin: String,
    },
    /// Read from a file, and again when it changes.
    File(PathBuf),
}

impl<T> Source<T> {
    /// Where the value was written; `None` for a file.
    pub fn origin(&self) -> Option<&str> {
        match self {
            Self::Value { origin, .. } => Some(origin),
            Self::File(_) => None,
        }
    }
}

/// `[token]`
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Display name of a minted token, placeholders unexpanded.
    pub name: String,
    /// Description of a minted token, placeholders unexpanded.
    pub description: String,
    /// How long a request waits for a usable token.
    pub wait: Duration,
    /// Mint a successor when the token is older.
    pub max_age: Option<Duration>,
    /// Between two mints.
    pub min_mint_interval: Duration,
    /// Mints per hour.
    pub mint_budget: u32,
    /// For one mint, connect included.
    pub mint_timeout: Duration,
    /// Path asked to tell a rejected token from a lack of permission.
    pub probe_path: String,
    /// Between two probes of one token.
    pub probe_interval: Duration,
    /// Which requests are sent again after a proven rejection.
    pub replay: Replay,
    /// Larger requests are not kept for replay, in bytes.
    pub replay_buffer: usize,
    /// Path that is `DELETE`d for a superseded token, with `{id}`.
    pub revoke_path: Option<String>,
    /// `[token.store]`
    pub store: Store,
}

/// `token.replay`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replay {
    /// Any method.
    All,
    /// GET, HEAD, OPTIONS.
    Safe,
    /// None.
    Off,
}

/// `[token.store]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Store {
    /// Nothing survives the process.
    Memory,
    /// One file.
    File(PathBuf),
}

/// `[upstream]`
#[derive(Debug, Clone, PartialEq)]
pub struct Upstream {
    /// Scheme, host and port of the API.
    pub origin: Origin,
    /// PEM roots trusted beside the built-in ones.
    pub ca_file: Option<PathBuf>,
    /// Name resolution, TCP, proxy tunnel and TLS together.
    pub connect_timeout: Duration,
    /// From the request's end to the response head.
    pub response_timeout: Duration,
    /// No byte of a body moved, in either direction.
    pub body_idle_timeout: Duration,
    /// An idle connection is closed after this.
    pub pool_idle_timeout: Duration,
    /// A connection is not used for new requests after this, less up to a tenth of jitter.
    pub max_connection_age: Duration,
    /// Protocol towards the upstream.
    pub http_version: HttpVersion,
    /// Egress proxy.
    pub proxy: Option<EgressProxy>,
    /// Connect here instead of resolving the name.
    pub resolve: Option<SocketAddr>,
}

/// An egress HTTP CONNECT proxy, from `upstream.proxy` or from the environment (`NO_PROXY` already applied).
#[derive(Clone, PartialEq)]
pub struct EgressProxy {
    /// Host and port.
    pub authority: Authority,
    /// Value of `proxy-authorization`, where the URL had user information; marked sensitive.
    pub authorization: Option<http::HeaderValue>,
}

impl Config {
    /// The file of the token store, where there is one. With a token file nothing is ever minted, and so nothing stored.
    pub(crate) fn store_file(&self) -> Option<&Path> {
        match (&self.credentials.source, &self.token.store) {
            (CredentialsSource::TokenFile(_), _) | (_, Store::Memory) => None,
            (CredentialsSource::Pair { .. } | CredentialsSource::Unconfigured, Store::File(path)) => Some(path),
        }
    }
}

impl std::fmt::Debug for EgressProxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EgressProxy").field("authority", &self.authority.as_str()).finish_non_exhaustive()
    }
}

/// Scheme, host and port of the upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// `https`, or `http` where the host is loopback.
    pub tls: bool,
    /// Name or IP address, lower case; an IPv6 address without brackets.
    pub host: String,
    /// Explicit or the scheme's default.
    pub port: u16,
}

impl Origin {
    /// `host` or `host:port`, the default port left out, an IPv6 address in brackets: the value of `Host`.
    pub fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        if self.port == self.default_port() { host } else { format!("{host}:{}", self.port) }
    }

    /// 443 or 80.
    pub fn default_port(&self) -> u16 {
        if self.tls { 443 } else { 80 }
    }

    /// `https` or `http`.
    pub fn scheme(&self) -> &'static str {
        if self.tls { "https" } else { "http" }
    }
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://{}", self.scheme(), self.authority())
    }
}

/// `upstream.http_version`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HttpVersion {
    /// HTTP/1.1 only.
    Http1,
    /// HTTP/2 only.
    Http2,
    /// What ALPN chooses.
    Auto,
}

/// `[limits]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Requests at a time, over all workers.
    pub max_in_flight: NonZeroUsize,
    /// Of a request body, in bytes.
    pub max_request_body: Option<u64>,
}

/// `[policy]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// First match wins.
    pub rules: Vec<Rule>,
    /// Where none matches.
    pub default: Action,
    /// Count and log, deny nothing.
    pub dry_run: bool,
    /// Whether a local app may reach `/api-tokens`.
    pub allow_minting: bool,
}

/// One of `policy.rules`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// What to do on a match.
    pub action: Action,
    /// Upper-case methods; empty: any.
    pub methods: Vec<String>,
    /// A glob over the decoded path (`*` within a segment, `**` across).
    pub path: String,
}

/// What a policy rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Let pass.
    Allow,
    /// Answer 405 `policy_denied`.
    Deny,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// A tracing filter.
    pub level: String,
    /// How lines look.
    pub format: LogFormat,
    /// Which requests get a line.
    pub access: AccessLog,
}

/// `log.format`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// JSON unless stderr is a terminal.
    Auto,
    /// One JSON object a line.
    Json,
    /// For people.
    Pretty,
}

/// `log.access`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessLog {
    /// Each request.
    All,
    /// Those answered 4xx or 5xx.
    Errors,
    /// None.
    Off,
}

/// `[runtime]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runtime {
    /// Threads that serve requests; already resolved against the CPU quota where 0 was configured.
    pub workers: NonZeroUsize,
}

/// `[shutdown]`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shutdown {
    /// After SIGTERM, new requests are served for this long.
    pub delay: Duration,
    /// Then those in flight may finish for at most this long.
    pub drain_timeout: Duration,
}
