//! What the task does to the world outside, as two traits: the upstream and the token store. The tests script both.
//!
//! Futures are cancelled by dropping them, which the task does to a probe whose token was replaced, and to all of them when it ends.

use std::future::Future;
use std::time::{Duration, SystemTime};

use http::StatusCode;

use crate::credentials::Pair;
use crate::secret::{AuthorizationValue, Token};

/// The requests of the proxy's own: mint, probe, revocation. Each has a deadline of its own and never waits for ever.
pub trait Upstream: 'static {
    /// A display name for the next mint, never the same twice, so that a token whose mint reply was lost can be found in the UI.
    fn display_name(&self) -> String;

    /// One `POST /api-tokens/`. Dropping the future may leave a token behind.
    fn mint(&self, pair: &Pair, name: &str) -> impl Future<Output = MintOutcome>;

    /// Asks `token.probe_path` with this token.
    fn probe(&self, authorization: &AuthorizationValue) -> impl Future<Output = ProbeOutcome>;

    /// Whether `token.revoke_path` is set. Else [`Upstream::revoke`] is not called.
    fn can_revoke(&self) -> bool;

    /// Deletes the token with this id, as `authorization`. The error is for people.
    fn revoke(&self, id: &str, authorization: &AuthorizationValue) -> impl Future<Output = Result<(), String>>;
}

/// How a mint ended. Reasons are for people and quote nothing of the reply.
#[derive(Debug)]
pub enum MintOutcome {
    /// A token.
    Minted {
        /// The token.
        token: Token,
        /// Upsolver's id of it, where the reply had one.
        id: Option<String>,
    },
    /// A 4xx other than 408 and 429, or a 3xx: credentials or request are wrong.
    Rejected {
        /// Of the reply.
        status: StatusCode,
    },
    /// It certainly left no token: not connected, 408, 429, 5xx.
    Retry {
        /// Why.
        reason: String,
        /// What the upstream asked for.
        retry_after: Option<Duration>,
    },
    /// It was sent, and the reply did not come.
    Lost {
        /// Why.
        reason: String,
    },
    /// 2xx with an unusable body.
    Invalid {
        /// Why.
        reason: String,
    },
}

impl MintOutcome {
    /// Whether the attempt counts towards the interval and the budget.
    pub fn may_have_left_a_token(&self) -> bool {
        matches!(self, Self::Minted { .. } | Self::Lost { .. } | Self::Invalid { .. })
    }
}

/// How a probe ended.
#[derive(Debug)]
pub enum ProbeOutcome {
    /// 2xx.
    Alive,
    /// 401 or 403.
    Dead,
    /// Anything else; the reason is for people.
    Inconclusive(String),
}

/// Where a token and the history of mints outlive the process. Trouble costs the cache, not the service: each error is logged and counted, and the
/// task goes on without.
pub trait TokenStore: 'static {
    /// Held while a mint is under way; dropping it lets the next process go on.
    type Lock: 'static;

    /// Keeps other processes that share the store from minting. Waits no longer than a mint can take.
    fn lock(&self) -> impl Future<Output = Result<Self::Lock, LockError>>;

    /// What the store holds, its token unmasked with `pair`; that may be another token than was stored if `pair` is another pair than was stored with.
    fn load(&self, pair: &Pair) -> impl Future<Output = Result<Stored, StoreError>>;

    /// Replaces what the store holds, bound to `pair`.
    fn save(&self, pair: &Pair, stored: &Stored) -> impl Future<Output = Result<(), StoreError>>;

    /// Whether a token outlives the process here.
    fn persists(&self) -> bool;
}

/// What a store holds.
#[derive(Debug, Clone, Default)]
pub struct Stored {
    /// The last token that was minted.
    pub token: Option<StoredToken>,
    /// When the attempts of the last hour were made that may have left a token behind.
    pub attempts: Vec<SystemTime>,
}

/// A token in a store.
#[derive(Debug, Clone)]
pub struct StoredToken {
    /// The token.
    pub token: Token,
    /// Upsolver's id of it.
    pub id: Option<String>,
    /// Display name under which it was minted.
    pub name: Option<String>,
    /// When it was minted.
    pub created: SystemTime,
}

/// Why there is no lock.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has held it all the time.
    #[error("another process holds the token store's lock")]
    Busy,
    /// Locking does not work here.
    #[error(transparent)]
    Failed(#[from] StoreError),
}

/// The store does not work. The text is for people and quotes nothing that the store holds.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StoreError(pub String);
