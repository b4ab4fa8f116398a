//! What operators see of the token: the status, the metrics, the log. Nothing here decides anything.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::StatusCode;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::attempt::Wall;
use crate::config;
use crate::credentials::Loaded;
use crate::metrics::TokenMetrics;
use crate::token::Status;
use crate::token::state::{HeldBackBy, Machine, Settings, Situation};
use crate::token::store::StoreError;

/// The same trouble is logged again after this.
const REMIND_AFTER: Duration = Duration::from_mins(10);

/// Keeps a failure that repeats from flooding the log.
#[derive(Debug, Default)]
pub(super) struct Repetition(HashMap<&'static str, (String, Instant)>);

impl Repetition {
    /// Whether `text` is worth a line: it is another than the last one on this topic, or that is long ago.
    pub(super) fn is_news(&mut self, topic: &'static str, text: &str) -> bool {
        let now = Instant::now();
        let is_news = self.0.get(topic).is_none_or(|(last, at)| last != text || now.duration_since(*at) >= REMIND_AFTER);
        if is_news {
            self.0.insert(topic, (text.to_owned(), now));
        }
        is_news
    }

    /// It is over; the next one is news.
    pub(super) fn forget(&mut self, topic: &'static str) {
        self.0.remove(topic);
    }
}

/// Logs and counts failures of the token store. Shared with the futures that use it.
#[derive(Debug, Clone)]
pub(super) struct StoreTrouble {
    repetition: Rc<RefCell<Repetition>>,
    metrics: Arc<TokenMetrics>,
}

impl StoreTrouble {
    pub(super) fn new(metrics: Arc<TokenMetrics>) -> Self {
        Self { repetition: Rc::default(), metrics }
    }

    pub(super) fn tell(&self, error: &StoreError) {
        let operation = error.operation().label();
        self.metrics.store_error(operation);
        let reason = error.reason();
        let is_news = self.repetition.borrow_mut().is_news(operation, &reason);
        match error {
            StoreError::Refused { .. } if is_news => warn!(operation, reason, "the token store: {}", StoreError::REPLACED),
            _ if is_news => warn!(operation, reason, "the token store does not work; the proxy goes on without it"),
            _ => debug!(operation, reason, "the token store still does not work"),
        }
    }
}

/// Everything that the state machine does not know and an operator asks for.
#[derive(Debug)]
pub(super) struct Facts {
    /// Result of the last mint, one of the words of `token_mints_total`.
    pub(super) last_mint: Option<(&'static str, SystemTime)>,
    /// Why the last mint or verification failed; none after a success.
    pub(super) failure: Option<String>,
    /// With which the credentials were rejected.
    pub(super) rejected_with: Option<StatusCode>,
    /// Why there are no credentials.
    missing: String,
    credentials_source: String,
    /// Whether a correction of them is found without a restart.
    credentials_read_again: bool,
    credentials_loaded_at: Option<SystemTime>,
}

/// What is to be corrected after a mint was rejected, as far as the status of its reply tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ToCorrect {
    /// The files with the credentials, which are read again by themselves.
    Files,
    /// The credentials, of which at least one half is a value and read at the start alone.
    Values,
    /// Most likely where the request goes: no credentials bring a redirect or a 404 about.
    Address,
}

/// Publishes the status and keeps the gauges.
pub(super) struct Report {
    pub(super) facts: Facts,
    status: watch::Sender<Arc<Status>>,
    metrics: Arc<TokenMetrics>,
    budget: u32,
    wall: Wall,
    shown: Option<Shown>,
    started: bool,
}

/// What the status was made from. Rejections that change nothing must not cost a new status each.
#[derive(Debug, PartialEq)]
struct Shown {
    situation: Situation,
    generation: u64,
    deadline: Option<Instant>,
    held_back_by: Option<HeldBackBy>,
    mints_left: u32,
    pending_rejected: bool,
}

impl Report {
    pub(super) fn new(config: &config::Token, metrics: Arc<TokenMetrics>, wall: Wall) -> (Self, watch::Receiver<Arc<Status>>) {
        let facts = Facts {
            last_mint: None,
            failure: None,
            rejected_with: None,
            missing: String::new(),
            credentials_source: String::new(),
            credentials_read_again: false,
            credentials_loaded_at: None,
        };
        let machine = Machine::new(Settings::new(config));
        let (status, reader) = watch::channel(Arc::new(Status {
            state: machine.situation().label(),
            started: false,
            usable: false,
            reasons: vec!["the proxy is starting".to_owned()],
            id: None,
            name: None,
            generation: 0,
            source: "none",
            created: None,
            last_mint: None,
            next_attempt: None,
            mints_left: config.mint_budget,
            credentials_source: String::new(),
            credentials_loaded_at: None,
            pending_rejected: false,
        }));
        (Self { facts, status, metrics, budget: config.mint_budget, wall, shown: None, started: false }, reader)
    }

    /// The credentials were read.
    pub(super) fn credentials(&mut self, loaded: &Loaded) {
        let (source, read_again, loaded_at) = match loaded {
            Loaded::Missing { reason } => {
                self.facts.missing.clone_from(reason);
                info!(reason, "waiting for the credentials");
                self.stale();
                return;
            }
            Loaded::Pair(pair) => (&pair.source, pair.read_again, pair.loaded_at),
            Loaded::Token(token) => (&token.source, true, token.loaded_at),
        };
        self.facts.credentials_source.clone_from(source);
        self.facts.credentials_read_again = read_again;
        self.facts.credentials_loaded_at = Some(loaded_at);
        self.stale();
    }

    /// Where the credentials came from, for people.
    pub(super) fn credentials_source(&self) -> &str {
        &self.facts.credentials_source
    }

    /// Whoever reads that the credentials are wrong while the address is, looks for the fault in the wrong place.
    pub(super) fn to_correct(&self, status: StatusCode) -> ToCorrect {
        match status {
            StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if self.facts.credentials_read_again => {
                ToCorrect::Files
            }
            StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ToCorrect::Values,
            _ => ToCorrect::Address,
        }
    }

    /// A fact changed: the next [`Report::publish`] makes a new status although the machine may look the same.
    pub(super) fn stale(&mut self) {
        self.shown = None;
    }

    /// Publishes the status if something in it changed.
    pub(super) fn publish(&mut self, machine: &Machine, now: Instant) {
        let shown = Shown {
            situation: machine.situation(),
            generation: machine.generation(),
            deadline: machine.deadline(now).filter(|at| *at > now),
            held_back_by: machine.held_back_by(now),
            mints_left: machine.mints_left(now),
            pending_rejected: machine.is_pending_rejected(),
        };
        if self.shown.as_ref() == Some(&shown) {
            return;
        }
        let before = self.status.borrow().clone();
        let held_back_before = self.shown.as_ref().and_then(|shown| shown.held_back_by);
        let usable = machine.is_usable();
        self.started |= usable;
        self.metrics.usable(usable);
        self.metrics.pending_rejected(shown.pending_rejected);

        let token = machine.token();
        if let Some(token) = token
            && before.generation != shown.generation
        {
            self.metrics.generation(shown.generation, token.created);
            let (id, name, source) = (token.id.as_deref(), token.name.as_deref(), token.source.label());
            info!(generation = shown.generation, id, name, source, "another token is in use");
        }
        if before.usable && !usable {
            warn!(generation = shown.generation, "the token in use is dead: not ready until there is another one");
        }
        if shown.held_back_by == Some(HeldBackBy::Budget) && held_back_before != Some(HeldBackBy::Budget) {
            let until = shown.deadline.map(|at| self.clock(at, now));
            warn!(
                budget = self.budget,
                until, usable, "token.mint_budget is spent: nothing is minted, whatever the cause, before it has room again"
            );
        }

        let status = Status {
            state: shown.situation.label(),
            started: self.started,
            usable,
            reasons: self.reasons(machine, &shown, now),
            id: token.and_then(|token| token.id.clone()),
            name: token.and_then(|token| token.name.clone()),
            generation: shown.generation,
            source: token.map_or("none", |token| token.source.label()),
            created: token.map(|token| token.created),
            last_mint: self.facts.last_mint,
            next_attempt: shown.deadline.map(|at| self.day(at, now)),
            mints_left: shown.mints_left,
            credentials_source: self.facts.credentials_source.clone(),
            credentials_loaded_at: self.facts.credentials_loaded_at,
            pending_rejected: shown.pending_rejected,
        };
        self.status.send_replace(Arc::new(status));
        self.shown = Some(shown);
    }

    /// Why there is no usable token, or no successor although one is wanted.
    fn reasons(&self, machine: &Machine, shown: &Shown, now: Instant) -> Vec<String> {
        let next = |what: &str| shown.deadline.map_or_else(String::new, |at| format!("; next {what} at {}", self.clock(at, now)));
        let failure = |prefix: &str| self.facts.failure.as_deref().map_or_else(String::new, |failure| format!("{prefix}{failure}"));
        let source = self.credentials_source();
        let usable = machine.is_usable();

        let mut reasons = Vec::new();
        if machine.token_is_dead() {
            reasons.push("the upstream does not accept the token any more".to_owned());
        }
        let rejected = self.rejected();
        match shown.situation {
            Situation::WaitingForCredentials => reasons.push(format!("waiting for the credentials: {}", self.facts.missing)),
            Situation::TokenRejected => reasons.push(format!("waiting for another token in {source}{}", next("check of this one"))),
            Situation::Starting => reasons.push("the token store is being read".to_owned()),
            Situation::Verifying => reasons.push("a stored token is being verified".to_owned()),
            Situation::Minting => reasons.push(format!("a token is being minted{}", failure("; before that: "))),
            Situation::CredentialsRejected => reasons.push(format!("{rejected}{}", next("try"))),
            Situation::WaitingToMint | Situation::Usable | Situation::Probing | Situation::Renewing => {}
        }
        if shown.pending_rejected {
            reasons.push(format!("{rejected}; the token in hand stays in use{}", next("try")));
        }
        // Where a mint failed, that is what to mend; the limits only say when.
        let cause = self.facts.failure.as_deref().map_or_else(String::new, |failure| format!("{failure}; "));
        let what = if usable { "no successor yet" } else { "no token yet" };
        match shown.held_back_by {
            Some(HeldBackBy::Failure) => reasons.push(format!("{what}{}{}", failure(": "), next("try"))),
            Some(HeldBackBy::Interval) => {
                reasons.push(format!("{what}: {cause}token.min_mint_interval is not over{}", next("mint")));
            }
            Some(HeldBackBy::Budget) => {
                reasons.push(format!("{what}: {cause}token.mint_budget ({} per hour) is spent{}", self.budget, next("mint")));
            }
            Some(HeldBackBy::Rejection) | None => {}
        }
        reasons
    }

    /// What the upstream rejected, and what mends it where that is not plain.
    fn rejected(&self) -> String {
        let credentials = format!("the upstream rejected the credentials from {}", self.credentials_source());
        // A token from a file was rejected by a probe, and no mint was.
        let Some(status) = self.facts.rejected_with else { return credentials };
        let number = status.as_u16();
        match self.to_correct(status) {
            ToCorrect::Files => format!("{credentials} (HTTP {number})"),
            ToCorrect::Values => format!("{credentials} (HTTP {number}), and other values need a restart"),
            ToCorrect::Address => format!("the upstream refused the request for a token (HTTP {number}): check upstream.url"),
        }
    }

    /// The time of day at `at`.
    fn day(&self, at: Instant, now: Instant) -> SystemTime {
        (self.wall)() + at.saturating_duration_since(now)
    }

    fn clock(&self, at: Instant, now: Instant) -> String {
        humantime::format_rfc3339_seconds(self.day(at, now)).to_string()
    }
}
