//! The two halves of the state, and who waits for them to change.

use std::sync::Arc;

use tokio::time::Instant;

use super::event::{Action, Candidate, CredentialsId, ProbeResult, Rejection, Ticket, TokenRecord};
use crate::token::Verdict;

/// The token that requests carry.
#[derive(Debug)]
pub(super) enum Holding {
    /// There was none yet.
    Nothing,
    /// Requests carry it.
    Usable(Held),
    /// Requests carry it still, while a probe asks whether it is dead.
    Probing(Held),
    /// It must not be sent any more. `proven` by a probe, or presumed after a 401.
    Dead { held: Held, proven: bool },
}

impl Holding {
    /// What requests may carry.
    pub(super) fn usable(&self) -> Option<&Held> {
        match self {
            Self::Usable(held) | Self::Probing(held) => Some(held),
            Self::Nothing | Self::Dead { .. } => None,
        }
    }

    /// The present token, dead or not.
    pub(super) fn held(&self) -> Option<&Held> {
        match self {
            Self::Usable(held) | Self::Probing(held) | Self::Dead { held, .. } => Some(held),
            Self::Nothing => None,
        }
    }
}

/// A token in use, or last in use.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) token: Arc<TokenRecord>,
    pub(super) generation: u64,
    /// The credentials that it belongs to.
    pub(super) by: CredentialsId,
    /// When it reaches `token.max_age`.
    pub(super) renew_at: Option<Instant>,
    pub(super) last_probe: Option<LastProbe>,
}

/// A probe that did not find the token dead.
#[derive(Debug)]
pub(super) struct LastProbe {
    pub(super) result: ProbeResult,
    /// Until `token.probe_interval` is over.
    pub(super) holds_until: Instant,
}

impl Held {
    /// The result of the last probe, as long as it stands for a new one.
    pub(super) fn hold(&self, now: Instant) -> Option<ProbeResult> {
        self.last_probe.as_ref().filter(|probe| now < probe.holds_until).map(|probe| probe.result)
    }
}

/// The way to another token.
#[derive(Debug)]
pub(super) enum Acquiring {
    /// Nothing is under way.
    Idle,
    /// The store is being read.
    ReadingStore(CredentialsId),
    /// A mint is in flight.
    Minting(CredentialsId),
    /// A probe asks whether a token works that this process did not mint.
    Verifying { candidate: Candidate, by: CredentialsId },
}

impl Acquiring {
    pub(super) fn is_idle(&self) -> bool {
        matches!(self, Self::Idle)
    }

    /// The credentials that it was begun with.
    pub(super) fn by(&self) -> Option<CredentialsId> {
        match self {
            Self::Idle => None,
            Self::ReadingStore(by) | Self::Minting(by) | Self::Verifying { by, .. } => Some(*by),
        }
    }
}

/// A rejected request without a verdict.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) ticket: Ticket,
    /// Of the token that it carried.
    pub(super) generation: u64,
    pub(super) rejection: Rejection,
}

impl Waiter {
    pub(super) fn answer(&self, verdict: Verdict) -> Action {
        Action::Answer(self.ticket, verdict)
    }
}
