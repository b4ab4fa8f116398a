//! The token's life as the rest of the program sees it: a [`TokenReader`] gives requests the token in use and takes their rejections; a [`Status`]
//! tells the admin server everything that an operator may ask.

use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use crate::secret::AuthorizationValue;

pub mod effects;
pub mod mint;
mod reader;
pub mod state;
pub mod store;
pub mod task;

pub use reader::TokenReader;

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

/// There was no usable token for as long as the request could wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no usable token")]
pub struct Unavailable {
    /// For `retry-after`: until the next attempt, between 1 s and 60 s. The upper bound is there since a person may mend the cause at any time.
    pub retry_after: Duration,
}

/// Why no successor is minted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RefreshRefused {
    /// `token.mint_budget` is spent.
    #[error("token.mint_budget is spent")]
    TooMany {
        /// Until the budget has room again.
        retry_after: Duration,
    },
    /// The upstream rejected a mint with these very credentials; presented again and again they get the account locked.
    #[error("the upstream rejected the credentials or the request for a token; the log and /status say what to correct")]
    CredentialsRejected {
        /// Until they are tried again anyway.
        retry_after: Duration,
    },
    /// There is nothing to mint with: a `token_file`, or no credentials that could be read; or the proxy is stopping.
    #[error("{reason}")]
    NothingToMintWith {
        /// For people.
        reason: String,
    },
}

/// A snapshot for `/status` and the health endpoints; holds no secret.
#[derive(Debug, Clone)]
pub struct Status {
    /// Name of the state machine's state: `starting`, `usable`, `probing`, …; all are in [`state::Situation`]
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
