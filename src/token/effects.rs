//! What the token task does to the world outside: the requests of the proxy's own to the upstream, and the token store.
//!
//! Two traits, so that the task's tests can script both; [`Requests`] and [`Store`] are what they stand for in the running proxy.
//!
//! Futures are cancelled by dropping them, which the task does to a probe whose token was replaced, and to all of them when it ends.

use std::future::Future;
use std::time::{Duration, SystemTime};

use super::mint::{self, Display, Environment, Outcome, ProbeOutcome, RevokeError};
use super::store::{Contents, Lock, Store, StoreError};
use crate::config;
use crate::credentials::Pair;
use crate::secret::AuthorizationValue;
use crate::upstream::connect::Connector;

/// The requests of the proxy's own. Each has a deadline and never waits for ever.
pub trait Upstream: 'static {
    /// How the next mint is shown in the account; never the same name twice, so that a token whose mint reply was lost can be found.
    fn display(&self) -> Display;

    /// One `POST /api-tokens/`. Dropping the future may leave a token behind.
    fn mint(&self, pair: &Pair, display: &Display) -> impl Future<Output = Outcome>;

    /// Asks `token.probe_path` with this token.
    fn probe(&self, authorization: &AuthorizationValue) -> impl Future<Output = ProbeOutcome>;

    /// Whether `token.revoke_path` is set. Else [`Upstream::revoke`] is not called.
    fn can_revoke(&self) -> bool;

    /// Deletes the token with this id, by the authority of `authorization`.
    fn revoke(&self, id: &str, authorization: &AuthorizationValue) -> impl Future<Output = Result<(), RevokeError>>;
}

/// Where a token and the history of mints outlive the process; see [`Store`] for the promises. Trouble costs the cache, not the service: the task logs and
/// counts an error and goes on without.
pub trait TokenStore: 'static {
    /// Held while a mint is under way; dropping it lets the next process go on.
    type Lock: 'static;

    /// Keeps other processes that share the store from minting; [`StoreError::Busy`] where one of them has held the lock for longer than a mint takes.
    fn lock(&self) -> impl Future<Output = Result<Self::Lock, StoreError>>;

    /// What the store holds, its token unmasked with `pair`.
    fn load(&self, pair: &Pair) -> impl Future<Output = Result<Contents, StoreError>>;

    /// Replaces what the store holds, bound to `pair`.
    fn save(&self, contents: Contents, pair: &Pair) -> impl Future<Output = Result<(), StoreError>>;

    /// Whether a token outlives the process here.
    fn is_persistent(&self) -> bool;
}

/// Requests to the configured upstream, each on a connection of its own.
#[derive(Debug)]
pub struct Requests {
    connector: Connector,
    environment: Environment,
    config: config::Token,
}

impl Requests {
    /// Looks at the environment once, for the names of tokens. Sends nothing.
    pub fn new(connector: Connector, config: config::Token) -> Self {
        Self { connector, environment: Environment::detect(), config }
    }
}

impl Upstream for Requests {
    fn display(&self) -> Display {
        self.environment.display(&self.config.name, &self.config.description, SystemTime::now(), fastrand::u32(..))
    }

    async fn mint(&self, pair: &Pair, display: &Display) -> Outcome {
        mint::mint(&self.connector, pair, display, self.config.mint_timeout).await
    }

    /// `token.mint_timeout` bounds this too: a probe stands between a rejected request and its answer as a mint does.
    async fn probe(&self, authorization: &AuthorizationValue) -> ProbeOutcome {
        mint::probe(&self.connector, &self.config.probe_path, authorization, self.config.mint_timeout).await
    }

    fn can_revoke(&self) -> bool {
        self.config.revoke_path.is_some()
    }

    async fn revoke(&self, id: &str, authorization: &AuthorizationValue) -> Result<(), RevokeError> {
        let Some(path) = &self.config.revoke_path else { return Ok(()) };
        mint::revoke(&self.connector, path, id, authorization, self.config.mint_timeout).await
    }
}

/// A [`Store`] whose lock is waited for as long as another process may need it: for one mint, and the disk around it.
#[derive(Debug)]
pub struct PatientStore {
    store: Store,
    patience: Duration,
}

/// What reading and writing the store adds to the duration of a mint under its lock.
const DISK_ALLOWANCE: Duration = Duration::from_secs(5);

impl PatientStore {
    /// `mint_timeout`: of every process that shares the store.
    pub fn new(store: Store, mint_timeout: Duration) -> Self {
        Self { store, patience: mint_timeout.saturating_add(DISK_ALLOWANCE) }
    }
}

impl TokenStore for PatientStore {
    type Lock = Lock;

    async fn lock(&self) -> Result<Lock, StoreError> {
        self.store.lock(self.patience).await
    }

    async fn load(&self, pair: &Pair) -> Result<Contents, StoreError> {
        self.store.load(pair).await
    }

    async fn save(&self, contents: Contents, pair: &Pair) -> Result<(), StoreError> {
        self.store.save(contents, pair).await
    }

    fn is_persistent(&self) -> bool {
        self.store.is_persistent()
    }
}
