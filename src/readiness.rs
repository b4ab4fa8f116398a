//! Starting, ready, not ready or draining: what the token task and the shutdown say, put together.
//!
//! Local knowledge only. Readiness that asked the upstream would take the app down with it, although a token in hand works on through any outage
//! (contract §5).

use std::sync::Arc;

use tokio::sync::watch;

use crate::token::Status;

/// Whether the proxy can take traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// There was no usable token yet.
    Starting,
    /// A usable token is there.
    Ready,
    /// There was a usable token, but now there is none.
    NotReady,
    /// The proxy is stopping. Goes before all others.
    Draining,
}

impl Phase {
    /// The word in answers of the admin server.
    pub fn label(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ok",
            Self::NotReady => "not_ready",
            Self::Draining => "draining",
        }
    }
}

/// A phase and what there is to say about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Readiness {
    /// Whether the proxy can take traffic.
    pub phase: Phase,
    /// For people: why it can't; never empty unless ready, and while ready what an operator should look at all the same.
    pub reasons: Vec<String>,
}

impl Readiness {
    /// What follows from the token's status and a shutdown.
    pub fn of(token: &Status, draining: bool) -> Self {
        let phase = match (draining, token.usable, token.started) {
            (true, _, _) => Phase::Draining,
            (false, true, _) => Phase::Ready,
            (false, false, true) => Phase::NotReady,
            (false, false, false) => Phase::Starting,
        };
        let mut reasons = token.reasons.clone();
        if phase == Phase::Draining {
            reasons.insert(0, "the proxy is stopping".to_owned());
        }
        if reasons.is_empty() && phase != Phase::Ready {
            reasons.push(format!("no usable token (token state: {})", token.state));
        }
        Self { phase, reasons }
    }
}

/// Follows the readiness. Cloning makes another reader.
#[derive(Debug, Clone)]
pub struct ReadinessReader {
    token: watch::Receiver<Arc<Status>>,
    draining: watch::Receiver<bool>,
}

impl ReadinessReader {
    /// Reads what the token task and the shutdown publish; after either ended, its last word holds.
    pub fn new(token: watch::Receiver<Arc<Status>>, draining: watch::Receiver<bool>) -> Self {
        Self { token, draining }
    }

    /// The token's status as last published.
    pub fn token(&self) -> Arc<Status> {
        Arc::clone(&self.token.borrow())
    }

    /// Whether the proxy is stopping.
    pub fn draining(&self) -> bool {
        *self.draining.borrow()
    }

    /// The readiness now.
    pub fn now(&self) -> Readiness {
        Readiness::of(&self.token.borrow(), *self.draining.borrow())
    }

    /// Returns when the proxy first can take traffic; never, where it stops before. May be cancelled.
    pub async fn ready(&mut self) {
        // While it starts, only the token task can change that; once it drains, nothing can.
        if self.token.wait_for(|status| status.usable).await.is_err() || self.draining() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A status before anything happened.
    pub(crate) fn status() -> Status {
        Status {
            state: "minting",
            started: false,
            usable: false,
            reasons: Vec::new(),
            id: None,
            name: None,
            generation: 0,
            source: "none",
            created: None,
            last_mint: None,
            next_attempt: None,
            mints_left: 6,
            credentials_source: "environment variables UPSOLVER_EMAIL and UPSOLVER_PASSWORD".to_owned(),
            credentials_loaded_at: None,
            pending_rejected: false,
        }
    }

    #[test]
    fn follows_from_token_and_shutdown() {
        let rows = [
            (false, false, false, Phase::Starting, "no usable token (token state: minting)"),
            (true, true, false, Phase::Ready, ""),
            (true, false, false, Phase::NotReady, "no usable token (token state: minting)"),
            (true, true, true, Phase::Draining, "the proxy is stopping"),
            (false, false, true, Phase::Draining, "the proxy is stopping"),
        ];
        for (started, usable, draining, phase, reason) in rows {
            let readiness = Readiness::of(&Status { started, usable, ..status() }, draining);
            assert_eq!((readiness.phase, readiness.reasons.join("; ").as_str()), (phase, reason), "{started} {usable} {draining}");
        }
        let told = Readiness::of(&Status { reasons: vec!["the credentials were rejected".to_owned()], ..status() }, true);
        assert_eq!(told.reasons, ["the proxy is stopping", "the credentials were rejected"]);
    }

    #[tokio::test]
    async fn ready_waits_for_the_first_token() {
        let (token, reader) = watch::channel(Arc::new(status()));
        let (_draining, draining) = watch::channel(false);
        let mut reader = ReadinessReader::new(reader, draining);
        let publish = async { token.send_replace(Arc::new(Status { usable: true, started: true, ..status() })) };
        tokio::join!(biased; async { reader.ready().await }, publish);
        assert_eq!(reader.now().phase, Phase::Ready);
    }
}
