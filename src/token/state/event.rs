//! What the machine is told and what it asks for: closed sets, so that a new case is a compile error wherever it matters.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::StatusCode;

use crate::secret::AuthorizationValue;
use crate::token::{ActiveToken, RefreshRefused, Verdict};

/// Names one content of the credentials. Equal contents have equal names as long as [`super::Machine::refers_to`] says so; the machine never sees an
/// email or a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CredentialsId(pub u64);

/// The credentials in force.
#[derive(Debug, Clone)]
pub enum Credentials {
    /// Nothing usable was read yet.
    Missing,
    /// Email and password.
    Pair(CredentialsId),
    /// `credentials.token_file`.
    FixedToken(CredentialsId, Arc<TokenRecord>),
}

impl Credentials {
    /// None while missing.
    pub fn id(&self) -> Option<CredentialsId> {
        match self {
            Self::Missing => None,
            Self::Pair(id) | Self::FixedToken(id, _) => Some(*id),
        }
    }
}

/// A token and what is known about it.
#[derive(Debug)]
pub struct TokenRecord {
    /// The value that requests carry.
    pub authorization: AuthorizationValue,
    /// Upsolver's id, where the mint reply told it.
    pub id: Option<String>,
    /// Display name under which it was minted.
    pub name: Option<String>,
    /// When it was minted, or its file read. For people; the machine reckons with [`Candidate::age`].
    pub created: SystemTime,
    /// How the proxy came by it.
    pub source: TokenSource,
}

/// How the proxy came by a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenSource {
    /// This process minted it.
    Minted,
    /// The token store had it.
    Store,
    /// `credentials.token_file`.
    TokenFile,
}

impl TokenSource {
    /// The word in `/status`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Minted => "minted",
            Self::Store => "store",
            Self::TokenFile => "token_file",
        }
    }
}

/// A token that is to be verified before its first use.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The token.
    pub token: Arc<TokenRecord>,
    /// Since its mint; zero where the clock says that it comes from the future.
    pub age: Duration,
}

/// Names a request that waits for a verdict; given by the caller, who never uses one twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket(pub u64);

/// A response that speaks against the token (contract §5, "Rejection").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rejection {
    /// 401, from whomever.
    Unauthorized,
    /// 403 of the API itself: a bad token or an honest lack of permission.
    Forbidden,
}

impl Rejection {
    /// None for a response that says nothing about the token. That includes a 403 without `x-api-requestid`: it comes from something in front of the
    /// API, which does not know tokens.
    pub fn of(status: StatusCode, has_request_id: bool) -> Option<Self> {
        match (status, has_request_id) {
            (StatusCode::UNAUTHORIZED, _) => Some(Self::Unauthorized),
            (StatusCode::FORBIDDEN, true) => Some(Self::Forbidden),
            _ => None,
        }
    }

    /// The status of the response.
    pub fn status(self) -> StatusCode {
        match self {
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
        }
    }
}

/// How a mint ended without a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MintFailure {
    /// The upstream says that the credentials or the request are wrong: a 4xx other than 408 and 429, or a 3xx.
    Rejected,
    /// It certainly left no token, and may work later: not connected, 408, 429, 5xx.
    Retry {
        /// What the upstream asked for.
        retry_after: Option<Duration>,
    },
    /// It was sent and the reply did not come: it may have left a token.
    Lost,
    /// 2xx with an unusable body: it has left a token that nobody can use.
    Invalid,
    /// Nothing was sent: another process that shares the store used up the interval or the budget for so long.
    Deferred {
        /// Until the store's history allows a mint.
        wait: Duration,
    },
}

impl MintFailure {
    /// Whether the attempt counts towards the interval and the budget.
    pub fn may_have_left_a_token(self) -> bool {
        matches!(self, Self::Lost | Self::Invalid)
    }
}

/// Whose probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// The token in use, by its generation.
    InUse(u64),
    /// A token that is to be verified before its first use.
    Candidate,
}

/// What a probe of `token.probe_path` told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeResult {
    /// 2xx.
    Alive,
    /// 401 or 403.
    Dead,
    /// Anything else, no answer included.
    Inconclusive,
}

/// What happened.
#[derive(Debug, Clone)]
pub enum Event {
    /// The credentials were read. The same content again changes nothing, nor does `Missing` after a good one.
    CredentialsChanged(Credentials),
    /// [`Action::ReadStore`] ended.
    StoreRead {
        /// None also where the store is broken.
        token: Option<Candidate>,
        /// How long ago each remembered attempt was made that may have left a token behind.
        attempt_ages: Vec<Duration>,
        /// Whether one of them was made after that token.
        tried_since: bool,
    },
    /// [`Action::Mint`] ended well.
    Minted(Arc<TokenRecord>),
    /// [`Action::Mint`] ended without a token.
    MintFailed(MintFailure),
    /// [`Action::Mint`] sent nothing: meanwhile another process put this token into the store.
    StoreAdopted(Candidate),
    /// A request came back with a rejection and waits for a verdict.
    Rejected {
        /// Names the request.
        ticket: Ticket,
        /// Of the token that the request carried.
        generation: u64,
        /// What the upstream said.
        rejection: Rejection,
    },
    /// [`Action::Probe`] ended.
    Probed(Subject, ProbeResult),
    /// The instant of [`super::Machine::deadline`] has come.
    TimerFired,
    /// An operator wants a successor now.
    RefreshRequested,
    /// The proxy stops: nothing new is begun.
    Shutdown,
}

/// After which of the earlier attempts that a store remembers `token.min_mint_interval` holds a mint back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PauseAfter {
    /// After each.
    All,
    /// The credentials are new: only after those that this process has not seen yet. Another process made them since, most likely with the same new
    /// credentials, and so was the first with them.
    Unseen,
    /// After none: an operator asked.
    None,
}

/// What is to be done. [`Action::ReadStore`], [`Action::Mint`] and the probe of a candidate are one at a time, all three together; the probe of the
/// token in use is apart, and a new one replaces an unfinished one.
#[derive(Debug, Clone)]
pub enum Action {
    /// Read the token store with these credentials.
    ReadStore(CredentialsId),
    /// Mint with these credentials.
    Mint {
        /// Names the pair.
        credentials: CredentialsId,
        /// What the store's history has to say.
        pause_after: PauseAfter,
    },
    /// Ask `token.probe_path` with this token.
    Probe(Subject, Arc<TokenRecord>),
    /// Answer the request.
    Answer(Ticket, Verdict),
    /// Answer the operator; follows an [`Event::RefreshRequested`] at once.
    AnswerRefresh(Result<(), RefreshRefused>),
    /// This token is no longer used, or was never.
    Supersede {
        /// The token.
        token: Arc<TokenRecord>,
        /// Whether a probe proved that it is dead.
        proven_dead: bool,
    },
    /// Read the credential files now rather than at the next poll.
    ReloadCredentials,
}

impl TokenRecord {
    /// As requests carry it.
    pub(super) fn active(&self, generation: u64) -> ActiveToken {
        ActiveToken { generation, authorization: self.authorization.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C17, C25: which responses speak against the token.
    #[test]
    fn c25_a_403_without_a_request_id_is_no_rejection() {
        for (status, has_request_id, expected) in [
            (401, true, Some(Rejection::Unauthorized)),
            (401, false, Some(Rejection::Unauthorized)),
            (403, true, Some(Rejection::Forbidden)),
            (403, false, None),
            (200, true, None),
            (404, true, None),
            (407, true, None),
            (500, true, None),
        ] {
            let rejection = Rejection::of(StatusCode::from_u16(status).unwrap(), has_request_id);
            assert_eq!(rejection, expected, "{status} {has_request_id}");
            assert!(rejection.is_none_or(|rejection| rejection.status() == status), "{status}");
        }
    }
}
