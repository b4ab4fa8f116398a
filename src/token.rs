//! The token's life as the rest of the program sees it: a [`TokenReader`] gives requests the token in use and takes their rejections; a [`Status`]
//! tells the admin server everything that an operator may ask.

use std::time::SystemTime;

use tokio::time::Instant;

use crate::secret::AuthorizationValue;

pub mod mint;
pub mod state;
pub mod store;
pub mod task;

/// The token in use, as requests carry it. Cloning copies a reference count.
#[derive(Debug, Clone)]
pub struct ActiveToken {
    /// Grows by one each time the proxy starts using another token.
    pub generation: u64,
    /// The value of `authorization`.
    pub authorization: AuthorizationValue,
}

/// What the token task publishes to requests.
#[derive(Debug, Clone)]
pub enum Availability {
    /// Requests carry this token.
    Usable(ActiveToken),
    /// No usable token; requests wait up to `token.wait`.
    Unavailable {
        /// When the next mint may be tried, where known: the `retry-after` of the 503.
        next_attempt: Option<Instant>,
    },
}

/// What becomes of a response that rejected the token.
#[derive(Debug, Clone)]
pub enum Verdict {
    /// An honest answer, or nothing better can be had: relay it untouched.
    Relay,
    /// The token was dead and this one replaced it: send the request once more.
    Replay(ActiveToken),
}

/// A snapshot for `/status` and the health endpoints; holds no secret.
#[derive(Debug, Clone)]
pub struct Status {
    /// Name of the state machine's state: `starting`, `usable`, `probing`, …
    pub state: &'static str,
    /// Whether a first token was ever obtained.
    pub started: bool,
    /// Whether a usable token is there.
    pub usable: bool,
    /// Why not, for people; empty while usable and nothing is wrong.
    pub reasons: Vec<String>,
    /// Upsolver's id of the token in use, where the mint reply told it.
    pub id: Option<String>,
    /// Display name under which it was minted.
    pub name: Option<String>,
    /// Number of the token in use; 0 before the first.
    pub generation: u64,
    /// `minted`, `store`, `token_file` or `none`.
    pub source: &'static str,
    /// When it was minted (or its file read).
    pub created: Option<SystemTime>,
    /// How the last mint ended: `success`, `rejected`, …
    pub last_mint: Option<(&'static str, SystemTime)>,
    /// When the next mint or probe is due.
    pub next_attempt: Option<SystemTime>,
    /// What the budget leaves in this hour.
    pub mints_left: u32,
    /// Where the credentials come from, for people: file names or the names of environment variables.
    pub credentials_source: String,
    /// When they were last read successfully.
    pub credentials_loaded_at: Option<SystemTime>,
    /// New credentials are there, but the upstream rejected them; the old token serves on.
    pub pending_rejected: bool,
}

pub struct Unavailable {
    pub retry_after: std::time::Duration,
}
#[derive(Clone)]
pub struct TokenSource(ActiveToken);
pub struct TokenReader(ActiveToken);
impl TokenSource {
    pub fn reader(&self) -> TokenReader {
        TokenReader(self.0.clone())
    }
}
impl TokenReader {
    pub fn current(&self) -> Option<ActiveToken> {
        Some(self.0.clone())
    }
    pub async fn wait(&self, _: std::time::Duration) -> Result<ActiveToken, Unavailable> {
        Ok(self.0.clone())
    }
    pub async fn reject(&self, _: &ActiveToken, _: http::StatusCode, _: bool, _: std::time::Duration) -> Verdict {
        Verdict::Relay
    }
}
#[derive(Clone)]
pub struct Control(ActiveToken, tokio::sync::watch::Receiver<std::sync::Arc<Status>>);
impl Control {
    pub fn source(&self) -> TokenSource {
        TokenSource(self.0.clone())
    }
    pub fn status(&self) -> tokio::sync::watch::Receiver<std::sync::Arc<Status>> {
        self.1.clone()
    }
    pub async fn refresh(&self) -> Result<(), crate::admin::RefreshRefused> {
        Ok(())
    }
    pub async fn shutdown(&self) {}
}
pub async fn start(
    _: &crate::config::Config,
    _: crate::upstream::connect::Connector,
    c: tokio::sync::watch::Receiver<crate::credentials::Loaded>,
    _: std::sync::Arc<crate::metrics::TokenMetrics>,
) -> Control {
    let crate::credentials::Loaded::Token(t) = c.borrow().clone() else { panic!("temp") };
    let s = Status {
        state: "usable",
        started: true,
        usable: true,
        reasons: vec![],
        id: None,
        name: None,
        generation: 1,
        source: "token_file",
        created: None,
        last_mint: None,
        next_attempt: None,
        mints_left: 6,
        credentials_source: String::new(),
        credentials_loaded_at: None,
        pending_rejected: false,
    };
    Control(
        ActiveToken { generation: 1, authorization: AuthorizationValue::new(&t.token) },
        tokio::sync::watch::channel(std::sync::Arc::new(s)).1,
    )
}
