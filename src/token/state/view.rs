//! What can be seen of the machine. All of it follows from the state, so nothing here can be forgotten when the state changes.

use std::sync::Arc;

use tokio::time::Instant;

use super::holding::{Acquiring, Holding};
use super::{Credentials, CredentialsId, HeldBackBy, Machine, TokenRecord};
use crate::token::Availability;

/// The state as an operator sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Situation {
    /// No credentials could be read yet.
    WaitingForCredentials,
    /// The token store is being read.
    Starting,
    /// A token that this process did not mint is asked about, and there is no other.
    Verifying,
    /// A mint is in flight, and there is no token.
    Minting,
    /// There is no token, and no mint is allowed yet.
    WaitingToMint,
    /// There is no token, since the upstream rejected the credentials.
    CredentialsRejected,
    /// The token of `credentials.token_file` is dead.
    TokenRejected,
    /// Requests carry the token.
    Usable,
    /// Requests carry the token still, while a probe asks whether it is dead.
    Probing,
    /// Requests carry the token while a successor is under way.
    Renewing,
}

impl Situation {
    /// The word in `/status`.
    pub fn label(self) -> &'static str {
        match self {
            Self::WaitingForCredentials => "waiting_for_credentials",
            Self::Starting => "starting",
            Self::Verifying => "verifying",
            Self::Minting => "minting",
            Self::WaitingToMint => "waiting_to_mint",
            Self::CredentialsRejected => "credentials_rejected",
            Self::TokenRejected => "token_rejected",
            Self::Usable => "usable",
            Self::Probing => "probing",
            Self::Renewing => "renewing",
        }
    }
}

impl Machine {
    /// What requests are told.
    pub fn availability(&self, now: Instant) -> Availability {
        match self.holding.usable() {
            Some(held) => Availability::Usable(held.token.active(held.generation)),
            None => Availability::Unavailable { next_attempt: self.deadline(now) },
        }
    }

    /// When [`super::Event::TimerFired`] is due: the next mint or probe that the machine begins by itself. None while one is under way or none is planned.
    pub fn deadline(&self, now: Instant) -> Option<Instant> {
        if self.stopping || !self.acquiring.is_idle() {
            return None;
        }
        let id = self.credentials.id()?;
        let allowed = match &self.credentials {
            Credentials::Pair(_) if self.unverified.is_none() => self.pacing.mint_allowed(now),
            Credentials::Missing | Credentials::Pair(_) | Credentials::FixedToken(..) => self.pacing.try_allowed(now),
        };
        match self.holding.usable() {
            Some(held) if held.by == id => held.renew_at.map(|at| at.max(allowed)),
            Some(_) | None => Some(allowed),
        }
    }

    /// When the token in use reaches `token.max_age`, where that is still to come. Nothing needs to begin then, but [`Machine::held_back_by`] has news.
    pub fn renewal_due(&self, now: Instant) -> Option<Instant> {
        let renew_at = self.holding.usable()?.renew_at?;
        (renew_at > now && !self.stopping).then_some(renew_at)
    }

    /// Both halves of the state in one word.
    pub fn situation(&self) -> Situation {
        match (&self.holding, &self.acquiring) {
            (Holding::Probing(_), _) => Situation::Probing,
            (Holding::Usable(_), Acquiring::Minting(_) | Acquiring::Verifying { .. }) => Situation::Renewing,
            (Holding::Usable(_), Acquiring::Idle | Acquiring::ReadingStore(_)) => Situation::Usable,
            (Holding::Nothing | Holding::Dead { .. }, Acquiring::ReadingStore(_)) => Situation::Starting,
            (Holding::Nothing | Holding::Dead { .. }, Acquiring::Minting(_)) => Situation::Minting,
            (Holding::Nothing | Holding::Dead { .. }, Acquiring::Verifying { .. }) => Situation::Verifying,
            (Holding::Nothing | Holding::Dead { .. }, Acquiring::Idle) => match self.credentials {
                Credentials::Missing => Situation::WaitingForCredentials,
                Credentials::FixedToken(..) => Situation::TokenRejected,
                Credentials::Pair(_) if self.pacing.is_rejected() => Situation::CredentialsRejected,
                Credentials::Pair(_) => Situation::WaitingToMint,
            },
        }
    }

    /// The credentials in force.
    pub fn credentials(&self) -> Option<CredentialsId> {
        self.credentials.id()
    }

    /// The present token, dead or not.
    pub fn token(&self) -> Option<&Arc<TokenRecord>> {
        self.holding.held().map(|held| &held.token)
    }

    /// Of the token in use or last used; 0 before the first.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether a usable token is there.
    pub fn is_usable(&self) -> bool {
        self.holding.usable().is_some()
    }

    /// Whether the present token was found dead.
    pub fn token_is_dead(&self) -> bool {
        matches!(self.holding, Holding::Dead { .. })
    }

    /// Whether the upstream rejected the credentials in force while a token serves on.
    pub fn is_pending_rejected(&self) -> bool {
        self.is_usable() && self.pacing.is_rejected()
    }

    /// Whether a mint is in flight.
    pub fn is_minting(&self) -> bool {
        matches!(self.acquiring, Acquiring::Minting(_))
    }

    /// Whether a token is asked about before its first use.
    pub fn is_verifying(&self) -> bool {
        matches!(self.acquiring, Acquiring::Verifying { .. })
    }

    /// Whether what is under way was begun with credentials that were replaced since.
    pub fn is_outdated(&self) -> bool {
        self.acquiring.by().is_some_and(|by| self.credentials.id() != Some(by))
    }

    /// What holds back the mint that is wanted, if one is.
    pub fn held_back_by(&self, now: Instant) -> Option<HeldBackBy> {
        if self.acquiring.is_idle() && self.is_wanted(now) { self.pacing.held_back_by(now) } else { None }
    }

    /// What the budget leaves.
    pub fn mints_left(&self, now: Instant) -> u32 {
        self.pacing.log.left(now)
    }

    /// When [`Machine::mints_left`] grows next.
    pub fn budget_grows(&self, now: Instant) -> Option<Instant> {
        self.pacing.log.grows(now)
    }

    /// Whether the machine may still compare or use these credentials. Those for which this is false can be cleared from memory.
    pub fn refers_to(&self, id: CredentialsId) -> bool {
        [self.credentials.id(), self.acquiring.by(), self.holding.held().map(|held| held.by)].contains(&Some(id))
    }
}
