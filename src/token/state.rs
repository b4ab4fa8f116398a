//! When a token is obtained, kept, replaced and dropped: the state machine behind contract §5.
//!
//! Pure: [`Machine::step`] takes an event, the instant and a random number, changes the state and says what is to be done. No I/O, no clock, no async.
//! `token::task` brings the events and carries the actions out.
//!
//! The state has two halves, because two things go on at once. *Holding* is the token that requests carry; *acquiring* is the way to another one. A
//! renewal is both halves together, `Usable` and `Minting`: the old token stays where it is until `Machine::switch_to` puts the new one there, and
//! that is the only function that does. So a failed mint, which touches the other half alone, can't lose a token that works.
//!
//! | event ↓ holding → | `Nothing` | `Usable` | `Probing` | `Dead` |
//! |---|---|---|---|---|
//! | rejected, this generation | – | probe, → `Probing`; within the hold: relay (a 401 after an inconclusive probe: → `Dead`) | wait for the probe | wait for the successor if one is on its way, else relay |
//! | rejected, older generation | as `Dead` | replay with the newer token | wait for the probe | as above |
//! | probe: alive | – | – | → `Usable`, relay, hold | – |
//! | probe: dead | – | – | → `Dead`, mint if allowed now | – |
//! | probe: inconclusive | – | – | after a 401 → `Dead`; else → `Usable`, relay, hold | – |
//! | another token is obtained | → `Usable` | → `Usable`, supersede | → `Usable`, supersede, replay | → `Usable`, replay |
//!
//! | event ↓ acquiring → | `Idle` | `ReadingStore` | `Minting` | `Verifying` |
//! |---|---|---|---|---|
//! | wanted and allowed (checked after every event) | first pair: read the store; pair: mint; token file: verify | – | – | – |
//! | store read | – | token found: → `Verifying`; else → `Idle`. A mint was tried since that token, or without one: the pair is not new | – | – |
//! | minted | – | – | → `Idle`, use it | – |
//! | mint failed | – | – | → `Idle`, paced by the failure's kind | – |
//! | another process minted | – | – | → `Verifying` | – |
//! | candidate alive | – | – | – | → `Idle`, use it |
//! | candidate dead | – | – | – | → `Idle`; a token file's is paced as rejected |
//! | candidate inconclusive | – | – | – | → `Idle`; use it unless a usable token is held, which then stays; verify again |
//! | other credentials | start afresh | result is read again | the result may still serve | the result may still serve |
//! | refresh requested | mint within the budget and unless the credentials were rejected, else refuse | join | join | join |
//! | shutdown | stop | stop | stop; the result is still taken | stop; the result is still taken |
//!
//! *Wanted* is a token while none is usable, while the one in use belongs to other credentials, and while it is older than `token.max_age`. *Allowed*
//! is what `pacing` says.
//!
//! A stored token is verified before its first use since the store can't tell whether it belongs to these credentials (`token::store` says why).

mod event;
mod holding;
mod pacing;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod tests;
mod view;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::config;
use crate::token::{RefreshRefused, Verdict};

pub use event::{
    Action, Candidate, Credentials, CredentialsId, Event, MintFailure, PauseAfter, ProbeResult, Rejection, Subject, Ticket, TokenRecord,
    TokenSource,
};
pub use pacing::{BUDGET_WINDOW, HeldBackBy, Jitter, MintLimits, MintLog};
pub use view::Situation;

use holding::{Acquiring, Held, Holding, LastProbe, Waiter};
use pacing::Pacing;

/// What the configuration decides.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// `token.max_age`
    pub max_age: Option<Duration>,
    /// `token.probe_interval`
    pub probe_interval: Duration,
    /// `token.min_mint_interval` and `token.mint_budget`
    pub limits: MintLimits,
}

impl Settings {
    /// The part of `[token]` that the machine goes by. The configuration takes no duration over a year, so that none overflows an instant.
    pub fn new(config: &config::Token) -> Self {
        Self {
            max_age: config.max_age,
            probe_interval: config.probe_interval,
            limits: MintLimits { interval: config.min_mint_interval, budget: config.mint_budget },
        }
    }
}

/// The state. What can be seen of it is in `view`.
#[derive(Debug)]
pub struct Machine {
    settings: Settings,
    credentials: Credentials,
    holding: Holding,
    acquiring: Acquiring,
    pacing: Pacing,
    /// Of the token in use or last used; 0 before the first.
    generation: u64,
    /// Another process's token that could not be verified yet: to be asked about again before anything is minted.
    unverified: Option<Candidate>,
    /// The store is read once, with the first pair.
    store_was_read: bool,
    /// Rejected requests without a verdict.
    waiters: Vec<Waiter>,
    stopping: bool,
}

impl Machine {
    /// Nothing is known yet; the first event is the credentials.
    pub fn new(settings: Settings) -> Self {
        Self {
            settings,
            credentials: Credentials::Missing,
            holding: Holding::Nothing,
            acquiring: Acquiring::Idle,
            pacing: Pacing::new(settings.limits),
            generation: 0,
            unverified: None,
            store_was_read: false,
            waiters: Vec::new(),
            stopping: false,
        }
    }

    /// Takes `event`, which happened at `now`, and says what is to be done, in order. `now` never runs backwards; `jitter` is drawn anew for each step.
    ///
    /// An event that does not belong to the present state (the end of a mint that was never begun) changes nothing.
    #[must_use]
    pub fn step(&mut self, event: Event, now: Instant, jitter: Jitter) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::CredentialsChanged(credentials) => self.credentials_changed(credentials, &mut actions),
            Event::StoreRead { token, attempt_ages, tried_since } => self.store_read(token, &attempt_ages, tried_since, now, &mut actions),
            Event::Minted(token) => self.minted(&token, now, &mut actions),
            Event::MintFailed(failure) => self.mint_failed(failure, now, jitter),
            Event::StoreAdopted(candidate) => self.store_adopted(candidate, &mut actions),
            Event::Rejected { ticket, generation, rejection } => {
                self.waiters.push(Waiter { ticket, generation, rejection });
                if generation == self.generation {
                    self.suspect(rejection, now, &mut actions);
                }
            }
            Event::Probed(Subject::InUse(generation), result) => self.probed(generation, result, now, &mut actions),
            Event::Probed(Subject::Candidate, result) => self.verified(result, now, jitter, &mut actions),
            Event::TimerFired => {} // `proceed` below looks at what is due
            Event::RefreshRequested => {
                let answer = self.refresh(now, &mut actions);
                actions.push(Action::AnswerRefresh(answer));
            }
            Event::Shutdown => self.stopping = true,
        }
        self.proceed(now, &mut actions);
        self.answer_waiters(&mut actions);
        actions
    }

    // ---- the way to another token ----

    /// Begins what is wanted and allowed.
    fn proceed(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.stopping || !self.acquiring.is_idle() || !self.is_wanted(now) {
            return;
        }
        match &self.credentials {
            Credentials::Missing => {}
            Credentials::FixedToken(id, token) => {
                if self.pacing.try_allowed(now) <= now {
                    let (id, candidate) = (*id, Candidate { token: Arc::clone(token), age: Duration::ZERO });
                    self.verify(candidate, id, actions);
                }
            }
            Credentials::Pair(id) => {
                let id = *id;
                if !self.store_was_read {
                    self.acquiring = Acquiring::ReadingStore(id);
                    actions.push(Action::ReadStore(id));
                } else if let Some(candidate) = &self.unverified {
                    if self.pacing.try_allowed(now) <= now {
                        let candidate = candidate.clone();
                        self.verify(candidate, id, actions);
                    }
                } else if self.pacing.mint_allowed(now) <= now {
                    let pause_after = if self.pacing.interval_applies() { PauseAfter::All } else { PauseAfter::Unseen };
                    self.mint(id, pause_after, actions);
                }
            }
        }
    }

    fn is_wanted(&self, now: Instant) -> bool {
        match (self.credentials.id(), self.holding.usable()) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(id), Some(held)) => held.by != id || held.renew_at.is_some_and(|at| at <= now),
        }
    }

    fn mint(&mut self, credentials: CredentialsId, pause_after: PauseAfter, actions: &mut Vec<Action>) {
        self.acquiring = Acquiring::Minting(credentials);
        actions.push(Action::Mint { credentials, pause_after });
    }

    fn verify(&mut self, candidate: Candidate, by: CredentialsId, actions: &mut Vec<Action>) {
        actions.push(Action::Probe(Subject::Candidate, Arc::clone(&candidate.token)));
        self.acquiring = Acquiring::Verifying { candidate, by };
    }

    fn credentials_changed(&mut self, credentials: Credentials, actions: &mut Vec<Action>) {
        let Some(id) = credentials.id() else { return }; // last good kept
        if self.credentials.id() == Some(id) {
            return;
        }
        self.credentials = credentials;
        self.unverified = None;
        // Back to the credentials that minted the token in use: no mint is needed, so none is exempt either.
        let serve_already = self.holding.usable().is_some_and(|held| held.by == id);
        self.pacing.start_afresh(!serve_already);
        // A token file's content can be used unseen where there is nothing to lose. The content that was found dead is not tried on requests again.
        if let Credentials::FixedToken(_, token) = &self.credentials
            && self.holding.usable().is_none()
            && self.holding.held().is_none_or(|dead| dead.by != id)
        {
            let token = Arc::clone(token);
            self.switch_to(&token, id, None, actions);
        }
    }

    fn store_read(
        &mut self,
        token: Option<Candidate>,
        attempt_ages: &[Duration],
        tried_since: bool,
        now: Instant,
        actions: &mut Vec<Action>,
    ) {
        let Acquiring::ReadingStore(by) = self.acquiring else { return };
        self.acquiring = Acquiring::Idle;
        self.pacing.log = MintLog::from_ages(self.settings.limits, attempt_ages, now);
        if self.credentials.id() != Some(by) {
            return; // read with other credentials, it shows another token: `proceed` reads it again
        }
        self.store_was_read = true;
        // As far as anyone can tell, these are the credentials of the attempts that the store remembers: not new ones. Only a token in it can show
        // otherwise, by being dead; not if somebody tried since it was made, else a crash loop beside a dead token would never pause.
        if !attempt_ages.is_empty() && (token.is_none() || tried_since) {
            self.pacing.spend_exemption();
        }
        if let Some(candidate) = token
            && !self.stopping
        {
            self.verify(candidate, by, actions);
        }
    }

    fn minted(&mut self, token: &Arc<TokenRecord>, now: Instant, actions: &mut Vec<Action>) {
        let Acquiring::Minting(by) = self.acquiring else { return };
        self.acquiring = Acquiring::Idle;
        self.pacing.log.record(now);
        self.obtained(&Candidate { token: Arc::clone(token), age: Duration::ZERO }, by, now, actions);
    }

    fn mint_failed(&mut self, failure: MintFailure, now: Instant, jitter: Jitter) {
        let Acquiring::Minting(by) = self.acquiring else { return };
        self.acquiring = Acquiring::Idle;
        if failure.may_have_left_a_token() {
            self.pacing.log.record(now);
        }
        if self.credentials.id() != Some(by) {
            return; // what the replaced credentials met with says nothing about the new ones
        }
        match failure {
            MintFailure::Rejected => self.pacing.rejected(now),
            MintFailure::Retry { retry_after } => self.pacing.failed(now, retry_after, jitter),
            MintFailure::Lost | MintFailure::Invalid => {
                self.pacing.spend_exemption();
                self.pacing.failed(now, None, jitter);
            }
            MintFailure::Deferred { wait } => self.pacing.defer(now + wait),
        }
    }

    fn store_adopted(&mut self, candidate: Candidate, actions: &mut Vec<Action>) {
        let Acquiring::Minting(by) = self.acquiring else { return };
        self.acquiring = Acquiring::Idle;
        if self.stopping {
            return;
        }
        self.verify(candidate, by, actions);
    }

    fn verified(&mut self, result: ProbeResult, now: Instant, jitter: Jitter, actions: &mut Vec<Action>) {
        let Acquiring::Verifying { candidate, by } = std::mem::replace(&mut self.acquiring, Acquiring::Idle) else { return };
        let outdated = self.credentials.id() != Some(by);
        self.unverified = None;
        match result {
            ProbeResult::Alive => self.obtained(&candidate, by, now, actions),
            ProbeResult::Dead | ProbeResult::Inconclusive if outdated => {}
            // A stored token that is dead makes way for a mint; the content of a token file can only be tried again.
            ProbeResult::Dead => {
                if matches!(self.credentials, Credentials::FixedToken(..)) {
                    self.pacing.rejected(now);
                }
            }
            // In doubt a token in hand is used, unless one is in use that works, or this is the content of a token file that was found dead before.
            ProbeResult::Inconclusive => {
                let found_dead = self.pacing.is_rejected() || self.holding.held().is_some_and(|held| held.by == by);
                if self.holding.usable().is_some() || (candidate.token.source == TokenSource::TokenFile && found_dead) {
                    self.verify_later(candidate, now, jitter);
                } else {
                    // In doubt the credentials are not new either.
                    self.pacing.spend_exemption();
                    self.switch_to(&candidate.token, by, self.renew_at(&candidate, now), actions);
                }
            }
        }
    }

    fn verify_later(&mut self, candidate: Candidate, now: Instant, jitter: Jitter) {
        self.pacing.failed(now, None, jitter);
        if matches!(self.credentials, Credentials::Pair(_)) {
            self.unverified = Some(candidate);
        }
    }

    /// A token that works came in, by credentials that may have been replaced since.
    fn obtained(&mut self, candidate: &Candidate, by: CredentialsId, now: Instant, actions: &mut Vec<Action>) {
        let in_force = self.credentials.id();
        if in_force == Some(by) {
            self.pacing.succeeded();
        } else if self.holding.usable().is_some_and(|held| Some(held.by) == in_force) {
            // The credentials went there and back while it was made: the token in use is the better one.
            if candidate.token.source == TokenSource::Minted {
                actions.push(Action::Supersede { token: Arc::clone(&candidate.token), proven_dead: false });
            }
            return;
        }
        self.switch_to(&candidate.token, by, self.renew_at(candidate, now), actions);
    }

    fn renew_at(&self, candidate: &Candidate, now: Instant) -> Option<Instant> {
        let of_a_file = candidate.token.source == TokenSource::TokenFile;
        self.settings.max_age.filter(|_| !of_a_file).map(|max_age| now + max_age.saturating_sub(candidate.age))
    }

    /// The one place where the token in use changes.
    fn switch_to(&mut self, token: &Arc<TokenRecord>, by: CredentialsId, renew_at: Option<Instant>, actions: &mut Vec<Action>) {
        self.generation += 1;
        self.unverified = None;
        let held = Held { token: Arc::clone(token), generation: self.generation, by, renew_at, last_probe: None };
        let (old, proven_dead) = match std::mem::replace(&mut self.holding, Holding::Usable(held)) {
            Holding::Nothing => return,
            Holding::Usable(old) | Holding::Probing(old) => (old, false),
            Holding::Dead { held: old, proven } => (old, proven),
        };
        // The same token can read differently with other credentials.
        let is_same = old.token.authorization == token.authorization || (token.name.is_some() && old.token.name == token.name);
        if !is_same {
            actions.push(Action::Supersede { token: old.token, proven_dead });
        }
    }

    fn refresh(&mut self, now: Instant, actions: &mut Vec<Action>) -> Result<(), RefreshRefused> {
        let nothing = |reason: &str| Err(RefreshRefused::NothingToMintWith { reason: reason.to_owned() });
        let Credentials::Pair(id) = self.credentials else {
            return match self.credentials {
                Credentials::FixedToken(..) => nothing("credentials.token_file is set: nothing is ever minted"),
                _ => nothing("no credentials could be read yet"),
            };
        };
        if self.stopping {
            return nothing("the proxy is stopping");
        }
        if !self.acquiring.is_idle() {
            return Ok(()); // a token is on its way already
        }
        if !self.store_was_read {
            return Ok(()); // only with a first pair, for which `proceed` begins
        }
        let next_try = self.pacing.try_allowed(now);
        if self.pacing.is_rejected() && next_try > now {
            return Err(RefreshRefused::CredentialsRejected { retry_after: next_try - now });
        }
        let allowed = self.pacing.log.budget_allows(now);
        if allowed > now {
            return Err(RefreshRefused::TooMany { retry_after: allowed - now });
        }
        self.mint(id, PauseAfter::None, actions);
        Ok(())
    }

    // ---- the token in use ----

    /// A request of the present generation was rejected.
    fn suspect(&mut self, rejection: Rejection, now: Instant, actions: &mut Vec<Action>) {
        self.holding = match std::mem::replace(&mut self.holding, Holding::Nothing) {
            Holding::Usable(held) => match (held.hold(now), rejection) {
                (None, _) => {
                    actions.push(Action::Probe(Subject::InUse(held.generation), Arc::clone(&held.token)));
                    Holding::Probing(held)
                }
                // The probe could not tell, so the 401 has the last word, as it would have had then.
                (Some(ProbeResult::Inconclusive), Rejection::Unauthorized) => self.found_dead(held, false, now, actions),
                (Some(_), _) => Holding::Usable(held),
            },
            other @ (Holding::Nothing | Holding::Probing(_) | Holding::Dead { .. }) => other,
        };
    }

    fn probed(&mut self, generation: u64, result: ProbeResult, now: Instant, actions: &mut Vec<Action>) {
        self.holding = match std::mem::replace(&mut self.holding, Holding::Nothing) {
            Holding::Probing(mut held) if held.generation == generation => {
                let unauthorized = |waiter: &Waiter| waiter.generation == generation && waiter.rejection == Rejection::Unauthorized;
                match result {
                    ProbeResult::Dead => self.found_dead(held, true, now, actions),
                    ProbeResult::Inconclusive if self.waiters.iter().any(unauthorized) => {
                        // The 401 counts, a 403 does not: its request would not be sent again on no more than a guess.
                        let forbidden = |waiter: &mut Waiter| waiter.generation == generation && waiter.rejection == Rejection::Forbidden;
                        actions.extend(self.waiters.extract_if(.., forbidden).map(|waiter| waiter.answer(Verdict::Relay)));
                        self.found_dead(held, false, now, actions)
                    }
                    ProbeResult::Alive | ProbeResult::Inconclusive => {
                        held.last_probe = Some(LastProbe { result, holds_until: now + self.settings.probe_interval });
                        Holding::Usable(held)
                    }
                }
            }
            other => other, // of a token that was replaced while it was asked about
        };
    }

    fn found_dead(&mut self, held: Held, proven: bool, now: Instant, actions: &mut Vec<Action>) -> Holding {
        let by_these = self.credentials.id() == Some(held.by);
        match &self.credentials {
            // Nothing can be minted: the file may hold another token by now, and this one may be asked about again.
            Credentials::FixedToken(..) if by_these => {
                self.pacing.rejected(now);
                actions.push(Action::ReloadCredentials);
            }
            // A token that could not be verified is better than none: ask again at once, use it in doubt.
            _ if self.unverified.is_some() || matches!(self.credentials, Credentials::FixedToken(..)) => {
                if !self.pacing.is_rejected() {
                    self.pacing.start_afresh(!self.pacing.interval_applies());
                }
            }
            Credentials::Missing | Credentials::Pair(_) | Credentials::FixedToken(..) => {}
        }
        Holding::Dead { held, proven }
    }

    /// Answers every waiter for whom the state holds an answer; the others wait for the end of a probe or of an acquisition, which both do end.
    fn answer_waiters(&mut self, actions: &mut Vec<Action>) {
        let token_is_coming = !self.acquiring.is_idle() && !self.stopping;
        let verdict = |waiter: &Waiter| match &self.holding {
            Holding::Usable(held) if waiter.generation < held.generation => Some(Verdict::Replay(held.token.active(held.generation))),
            Holding::Probing(_) if !self.stopping => None,
            Holding::Nothing | Holding::Dead { .. } if token_is_coming => None,
            Holding::Nothing | Holding::Usable(_) | Holding::Probing(_) | Holding::Dead { .. } => Some(Verdict::Relay),
        };
        self.waiters.retain(|waiter| {
            let verdict = verdict(waiter);
            actions.extend(verdict.iter().map(|verdict| waiter.answer(verdict.clone())));
            verdict.is_none()
        });
    }
}
