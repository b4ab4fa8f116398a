//! The real upstream and the real store behind the token task's two traits: thin, so that everything worth a test stands on one side or the other.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::mint::{self, Display, Environment, Outcome};
use super::store::{self, Store};
use super::task::effects::{LockError, MintOutcome, ProbeOutcome, StoreError, Stored, StoredToken, TokenStore, Upstream};
use crate::config;
use crate::credentials::Pair;
use crate::secret::AuthorizationValue;
use crate::upstream::connect::Connector;

/// Mints, probes and revokes at the configured upstream, each time on a connection of its own.
#[derive(Debug)]
pub struct Live {
    connector: Connector,
    config: config::Token,
    environment: Environment,
}

impl Live {
    /// Looks up where this process runs, for the display names.
    pub fn new(connector: Connector, config: config::Token) -> Self {
        Self { connector, config, environment: Environment::detect() }
    }

    fn display(&self) -> Display {
        self.environment.display(&self.config.name, &self.config.description, SystemTime::now(), fastrand::u32(..))
    }
}

impl Upstream for Live {
    fn display_name(&self) -> String {
        self.display().name
    }

    async fn mint(&self, pair: &Pair, name: &str) -> MintOutcome {
        let display = Display { name: name.to_owned(), ..self.display() };
        match mint::mint(&self.connector, pair, &display, self.config.mint_timeout).await {
            Outcome::Minted(minted) => MintOutcome::Minted { token: minted.token, id: minted.id },
            Outcome::Rejected { status } => MintOutcome::Rejected { status },
            Outcome::Retry { reason, retry_after } => MintOutcome::Retry { reason, retry_after },
            Outcome::Lost { reason } => MintOutcome::Lost { reason },
            Outcome::Invalid { reason } => MintOutcome::Invalid { reason },
        }
    }

    async fn probe(&self, authorization: &AuthorizationValue) -> ProbeOutcome {
        match mint::probe(&self.connector, &self.config.probe_path, authorization, self.config.mint_timeout).await {
            mint::ProbeOutcome::Alive => ProbeOutcome::Alive,
            mint::ProbeOutcome::Dead => ProbeOutcome::Dead,
            mint::ProbeOutcome::Inconclusive(reason) => ProbeOutcome::Inconclusive(reason),
        }
    }

    fn can_revoke(&self) -> bool {
        self.config.revoke_path.is_some()
    }

    async fn revoke(&self, id: &str, authorization: &AuthorizationValue) -> Result<(), String> {
        let Some(path) = &self.config.revoke_path else { return Err("token.revoke_path is not set".to_owned()) };
        let revoked = mint::revoke(&self.connector, path, id, authorization, self.config.mint_timeout).await;
        revoked.map_err(|error| error.to_string())
    }
}

/// The configured store, which waits for another process's mint as long as one can take.
#[derive(Debug)]
pub struct Kept {
    store: Store,
    patience: Duration,
}

impl Kept {
    /// `upstream` is what the store's contents are bound to.
    pub fn new(config: &config::Token, upstream: &config::Origin) -> Self {
        // Its reply must still be written after the mint's own timeout.
        Self { store: Store::new(&config.store, upstream), patience: config.mint_timeout + Duration::from_secs(5) }
    }
}

impl TokenStore for Kept {
    type Lock = store::Lock;

    async fn lock(&self) -> Result<store::Lock, LockError> {
        self.store.lock(self.patience).await.map_err(|error| match error {
            store::StoreError::Busy { .. } => LockError::Busy,
            error => LockError::Failed(explain(&error)),
        })
    }

    async fn load(&self, pair: &Arc<Pair>) -> Result<Stored, StoreError> {
        let contents = self.store.load(pair).await.map_err(|error| explain(&error))?;
        let token = contents.token.map(|stored| StoredToken {
            token: stored.token,
            id: stored.id,
            name: stored.name.unwrap_or_default(),
            created: stored.created,
        });
        Ok(Stored { token, attempts: contents.attempts })
    }

    async fn save(&self, pair: &Arc<Pair>, stored: &Stored) -> Result<(), StoreError> {
        let token = stored.token.clone().map(|token| store::StoredToken {
            token: token.token,
            id: token.id,
            name: Some(token.name),
            created: token.created,
        });
        let contents = store::Contents { token, attempts: stored.attempts.clone() };
        self.store.save(contents, pair).await.map_err(|error| explain(&error))
    }

    fn persists(&self) -> bool {
        self.store.is_persistent()
    }
}

/// With its cause, which says what the system had against it.
fn explain(error: &store::StoreError) -> StoreError {
    let cause = std::error::Error::source(error).map(|cause| format!(": {cause}")).unwrap_or_default();
    StoreError(format!("{error}{cause}"))
}
