//! What came of what was under way, put into the state machine's words; counted and logged on the way.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use tracing::{debug, info, warn};

use super::attempt::{Attempted, age};
use super::report::ToCorrect;
use super::slot::Panicked;
use super::{Acquired, Task};
use crate::secret::AuthorizationValue;
use crate::token::effects::{TokenStore, Upstream};
use crate::token::mint::{Minted, Outcome, ProbeOutcome};
use crate::token::state::{Candidate, Event, MintFailure, ProbeResult, Subject, TokenRecord, TokenSource};
use crate::token::store::{Contents, StoredToken};

/// Topic of [`super::report::Repetition`].
const MINT: &str = "mint";
/// What people are told after a panic; the panic hook told the rest.
const FAULT: &str = "a fault in the proxy";

impl<U: Upstream, S: TokenStore> Task<U, S> {
    pub(super) fn probed(&mut self, probed: Result<(u64, ProbeOutcome), Panicked>) {
        // A panic was reported by the panic hook. Its waiters are answered by the next step, as after any probe that told nothing.
        let (generation, outcome) =
            probed.unwrap_or_else(|Panicked| (self.machine.generation(), ProbeOutcome::Inconclusive(FAULT.to_owned())));
        let result = self.probe_result(outcome, "the token in use");
        if let (ProbeResult::Alive, Some(token)) = (result, self.machine.token().filter(|_| generation == self.machine.generation())) {
            self.seen.borrow_mut().proven(token);
        }
        self.step(Event::Probed(Subject::InUse(generation), result));
    }

    fn probe_result(&mut self, outcome: ProbeOutcome, whose: &'static str) -> ProbeResult {
        let (result, label, reason) = match outcome {
            ProbeOutcome::Alive => (ProbeResult::Alive, "alive", String::new()),
            ProbeOutcome::Dead => (ProbeResult::Dead, "dead", String::new()),
            ProbeOutcome::Inconclusive(reason) => (ProbeResult::Inconclusive, "inconclusive", reason),
        };
        self.metrics.probe(label);
        // An app that polls what it may not see causes a probe every `probe_interval`, always with the same result.
        if self.repetition.is_news(whose, &format!("{label} {reason}")) {
            info!(whose, result = label, reason, generation = self.machine.generation(), "probed");
        } else {
            debug!(whose, result = label, reason, generation = self.machine.generation(), "probed");
        }
        result
    }

    pub(super) fn acquired(&mut self, acquired: Result<Acquired, Panicked>) {
        let event = match acquired {
            Ok(Acquired::Read(stored)) => self.store_read(stored),
            Ok(Acquired::Attempted(Attempted::Ended { name, outcome, took })) => self.mint_ended(&name, outcome, took),
            Ok(Acquired::Attempted(Attempted::Adopted(token))) => {
                info!(id = token.id, name = token.name, "another process stored a token: trying that one instead of minting");
                Event::StoreAdopted(self.candidate(token))
            }
            Ok(Acquired::Attempted(Attempted::Deferred(wait))) => {
                info!(?wait, "no mint yet: the token store remembers those of other processes");
                self.report.facts.failure = Some("other processes that share the token store minted lately".to_owned());
                Event::MintFailed(MintFailure::Deferred { wait })
            }
            // The machine begins anew with those in force.
            Ok(Acquired::Attempted(Attempted::Outdated)) => Event::MintFailed(MintFailure::Deferred { wait: Duration::ZERO }),
            Ok(Acquired::Attempted(Attempted::LockBusy)) => {
                self.failed("another process holds the token store's lock".to_owned());
                Event::MintFailed(MintFailure::Retry { retry_after: None })
            }
            Ok(Acquired::Verified(token, outcome)) => {
                match &outcome {
                    ProbeOutcome::Alive => {
                        self.succeeded();
                        self.seen.borrow_mut().proven(&token);
                    }
                    ProbeOutcome::Dead => {
                        self.seen.borrow_mut().known(&token);
                        self.candidate_is_dead(&token);
                    }
                    ProbeOutcome::Inconclusive(reason) => {
                        self.report.facts.failure = Some(format!("a token could not be verified: {reason}"));
                    }
                }
                let result = self.probe_result(outcome, "a token before its first use");
                Event::Probed(Subject::Candidate, result)
            }
            Err(Panicked) => self.acquisition_panicked(),
        };
        self.report.stale();
        self.step(event);
    }

    /// Tells the person who has to do something about it. The verdict on credentials that were replaced meanwhile is nobody's concern.
    fn candidate_is_dead(&self, token: &TokenRecord) {
        if self.machine.is_outdated() {
            return;
        }
        let credentials = self.report.credentials_source();
        match token.source {
            TokenSource::TokenFile if self.machine.is_usable() => warn!(
                credentials,
                "the upstream rejected the new token in this file: the token in hand stays in use; correct the file, it is read again by itself"
            ),
            // The next save writes over it, and whatever it told of a token that may work still.
            TokenSource::Store => warn!(
                id = token.id,
                name = token.name,
                credentials,
                "the stored token does not work with these credentials and is replaced. Where it was minted with other ones, it still works: delete it in \
                 Upsolver under More > API Tokens once nobody uses it"
            ),
            TokenSource::TokenFile | TokenSource::Minted => {}
        }
    }

    /// A fault in the proxy's own code (C08). The machine is told the most cautious thing about whatever was under way.
    fn acquisition_panicked(&mut self) -> Event {
        self.failed(FAULT.to_owned());
        if let Some(name) = self.mint_sent.take() {
            return self.mint_ended(&name, Outcome::Lost { reason: FAULT.to_owned() }, Duration::ZERO);
        }
        if self.machine.is_minting() {
            Event::MintFailed(MintFailure::Retry { retry_after: None })
        } else if self.machine.is_verifying() {
            Event::Probed(Subject::Candidate, ProbeResult::Inconclusive)
        } else {
            Event::StoreRead { token: None, attempt_ages: Vec::new(), tried_since: false }
        }
    }

    fn store_read(&mut self, stored: Contents) -> Event {
        let today = (self.wall)();
        let attempt_ages = stored.attempts.iter().map(|attempt| age(*attempt, today)).collect();
        let tried_since = stored.tried_since_token();
        Event::StoreRead { token: stored.token.map(|token| self.candidate(token)), attempt_ages, tried_since }
    }

    fn candidate(&self, stored: StoredToken) -> Candidate {
        let token = TokenRecord {
            authorization: AuthorizationValue::new(&stored.token),
            id: stored.id,
            name: Some(stored.name),
            created: stored.created,
            source: TokenSource::Store,
        };
        Candidate { token: Arc::new(token), age: age(stored.created, (self.wall)()) }
    }

    fn mint_ended(&mut self, name: &str, outcome: Outcome, took: Duration) -> Event {
        let (label, event) = match outcome {
            Outcome::Minted(Minted { token, id, name }) => {
                info!(id, name, "token minted");
                self.succeeded();
                let authorization = AuthorizationValue::new(&token);
                let record = TokenRecord { authorization, id, name: Some(name), created: (self.wall)(), source: TokenSource::Minted };
                self.seen.borrow_mut().proven(&record);
                ("success", Event::Minted(Arc::new(record)))
            }
            Outcome::Rejected { status } => {
                self.mint_rejected(status);
                self.report.facts.rejected_with = Some(status);
                self.report.facts.failure = None; // of an earlier mint
                ("rejected", Event::MintFailed(MintFailure::Rejected))
            }
            Outcome::Retry { reason, retry_after } => {
                self.failed(reason);
                ("failed", Event::MintFailed(MintFailure::Retry { retry_after }))
            }
            Outcome::Lost { reason } => {
                warn!(
                    name,
                    reason, "the reply to a mint was lost: a token of this name may be left behind in Upsolver under More > API Tokens"
                );
                self.report.facts.failure = Some(reason);
                ("lost", Event::MintFailed(MintFailure::Lost))
            }
            Outcome::Invalid { reason } => {
                warn!(
                    name,
                    reason, "the reply to a mint was unusable: a token of this name may be left behind in Upsolver under More > API Tokens"
                );
                self.report.facts.failure = Some(reason);
                ("invalid", Event::MintFailed(MintFailure::Invalid))
            }
        };
        self.metrics.mint(label, took);
        self.report.facts.last_mint = Some((label, (self.wall)()));
        event
    }

    fn mint_rejected(&self, status: StatusCode) {
        let (credentials, to_correct, status) = (self.report.credentials_source(), self.report.to_correct(status), status.as_u16());
        match to_correct {
            ToCorrect::Files => {
                warn!(status, credentials, "the upstream rejected the credentials: correct them; they are read again by themselves");
            }
            ToCorrect::Values => {
                warn!(
                    status,
                    credentials, "the upstream rejected the credentials: correct them and restart the proxy, which read them at its start"
                );
            }
            ToCorrect::Address => warn!(
                status,
                credentials,
                "the upstream refused the request for a token: check upstream.url; a redirect or a 404 usually means a wrong address or a gateway in between"
            ),
        }
    }

    fn succeeded(&mut self) {
        self.report.facts.failure = None;
        self.report.facts.rejected_with = None;
        self.repetition.forget(MINT);
    }

    /// A failure that will be tried again and again: one line for all of its kind.
    fn failed(&mut self, reason: String) {
        if self.repetition.is_news(MINT, &reason) {
            warn!(reason, "no token could be minted; trying again");
        } else {
            debug!(reason, "still no token could be minted");
        }
        self.report.facts.failure = Some(reason);
    }
}
