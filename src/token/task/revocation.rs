//! Superseded tokens: named in the log, so that a person can delete them, or deleted where `token.revoke_path` is set.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{info, warn};

use super::slot::Slot;
use crate::secret::AuthorizationValue;
use crate::token::Availability;
use crate::token::effects::Upstream;
use crate::token::mint::RevokeError;
use crate::token::state::{TokenRecord, TokenSource};

/// A superseded token lives on for as long: a request that took it just before the switch may still be connecting (`upstream.connect_timeout` is 5 s).
const GRACE: Duration = Duration::from_secs(6);
/// At a stop, for all revocations together.
const GRACE_AT_STOP: Duration = Duration::from_secs(2);

pub(super) struct Revoker<U> {
    upstream: Rc<U>,
    /// Whose authority a revocation is made with: the token in use, since the revoked one may have lost its own.
    in_use: watch::Receiver<Availability>,
    waiting: VecDeque<(Instant, Arc<TokenRecord>)>,
    under_way: Slot<()>,
}

impl<U: Upstream> Revoker<U> {
    pub(super) fn new(upstream: Rc<U>, in_use: watch::Receiver<Availability>) -> Self {
        Self { upstream, in_use, waiting: VecDeque::new(), under_way: Slot::empty() }
    }

    /// `token` is no longer used.
    pub(super) fn supersede(&mut self, token: Arc<TokenRecord>, proven_dead: bool) {
        let (id, name) = (token.id.as_deref(), token.name.as_deref());
        if proven_dead {
            info!(id, name, "the token that the upstream refused was replaced");
        } else if token.source == TokenSource::TokenFile {
            info!("the content of credentials.token_file was replaced; the old token still works until somebody deletes it");
        } else if self.upstream.can_revoke() && token.id.is_some() {
            info!(id, name, "superseded token will be revoked");
            self.waiting.push_back((Instant::now() + GRACE, token));
        } else {
            info!(id, name, "superseded token still works; delete it in Upsolver under More > API Tokens");
        }
    }

    /// Revokes what is due, one after the other, for ever. Dropping the future loses nothing: all its state is in `self`.
    pub(super) async fn run(&mut self) -> Infallible {
        loop {
            if self.under_way.is_empty() {
                match self.waiting.front() {
                    None => std::future::pending().await,
                    Some((due, _)) => sleep_until(*due).await,
                }
                if let Some((_, token)) = self.waiting.pop_front() {
                    let authorization = self.authority(&token);
                    self.under_way.fill(revoke(Rc::clone(&self.upstream), token, authorization));
                }
            }
            // A panic has been reported by the panic hook; the next revocation is not to blame.
            let _ = self.under_way.finished().await;
        }
    }

    /// At a stop: revokes what is still waiting, and `own`, the token in use, last.
    pub(super) async fn finish(mut self, own: Option<Arc<TokenRecord>>) {
        let own = own.filter(|_| self.upstream.can_revoke());
        let all = async {
            if !self.under_way.is_empty() {
                let _ = self.under_way.finished().await;
            }
            while let Some(token) = self.waiting.pop_front().map(|(_, token)| token) {
                let authorization = self.authority(&token);
                revoke(Rc::clone(&self.upstream), token, authorization).await;
            }
            if let Some(token) = own {
                let authorization = token.authorization.clone();
                revoke(Rc::clone(&self.upstream), token, authorization).await;
            }
        };
        if timeout(GRACE_AT_STOP, all).await.is_err() {
            warn!("stopped before all superseded tokens were revoked; the log names them");
        }
    }

    fn authority(&self, token: &TokenRecord) -> AuthorizationValue {
        match &*self.in_use.borrow() {
            Availability::Usable(active) => active.authorization.clone(),
            Availability::Unavailable { .. } => token.authorization.clone(),
        }
    }
}

async fn revoke<U: Upstream>(upstream: Rc<U>, token: Arc<TokenRecord>, authorization: AuthorizationValue) {
    let (name, Some(id)) = (token.name.as_deref(), token.id.as_deref()) else { return };
    match upstream.revoke(id, &authorization).await {
        Ok(()) => info!(id, name, "token revoked"),
        Err(RevokeError::NotFound(status)) => warn!(
            id,
            name,
            status = status.as_u16(),
            "the upstream found no token to revoke: either it is deleted already, or token.revoke_path is wrong; look in Upsolver under More > API Tokens"
        ),
        Err(error) => warn!(id, name, reason = %error, "token could not be revoked; delete it in Upsolver under More > API Tokens"),
    }
}
