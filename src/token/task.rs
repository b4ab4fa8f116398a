//! The one task that keeps the token: brings the state machine its events, carries out what it asks for, publishes what requests carry.
//!
//! It runs on the control plane's thread and owns the only senders of [`Availability`] and [`Status`]. Requests reach it through [`TokenReader`], the
//! admin server through [`Control`]. What it does to the world outside stands behind two traits in [`super::effects`].

mod attempt;
mod identities;
mod report;
mod revocation;
mod slot;
#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::{debug, info, warn};

use super::effects::{TokenStore, Upstream};
use super::mint::{Minted, Outcome, ProbeOutcome};
use super::state::{
    Action, Candidate, Credentials, CredentialsId, Event, Jitter, Machine, MintFailure, ProbeResult, Rejection, Settings, Subject, Ticket,
    TokenRecord, TokenSource,
};
use super::store::{Contents, StoredToken};
use super::{Availability, RefreshRefused, Status, TokenReader, Verdict};
use crate::config;
use crate::credentials::{Loaded, Pair};
use crate::metrics::TokenMetrics;
use crate::secret::AuthorizationValue;

use attempt::{Attempted, Order, Wall, age, attempt, read};
use identities::Identities;
use report::{Repetition, Report, StoreTrouble};
use revocation::Revoker;
use slot::{Panicked, Slot};

/// What [`start`] gives.
#[derive(Debug)]
pub struct Started {
    /// For the workers: one clone each.
    pub tokens: TokenReader,
    /// For the admin server and the shutdown.
    pub control: Control,
    /// For the admin server.
    pub status: watch::Receiver<Arc<Status>>,
    /// Ends after [`Control::shutdown`], or when all clones of `tokens` and `control` are gone.
    pub task: JoinHandle<()>,
}

/// Starts the task on this thread's runtime. `reload_credentials` asks whoever feeds `credentials` to read the files now.
pub fn start<U: Upstream, S: TokenStore>(
    config: &config::Token,
    upstream: U,
    store: S,
    credentials: watch::Receiver<Loaded>,
    reload_credentials: impl Fn() + 'static,
    metrics: Arc<TokenMetrics>,
) -> Started {
    start_at(Rc::new(SystemTime::now), config, upstream, store, credentials, reload_credentials, metrics)
}

/// Orders to the task.
#[derive(Debug, Clone)]
pub struct Control {
    commands: mpsc::Sender<Command>,
}

impl Control {
    /// Mints a successor now, `token.min_mint_interval` aside, within `token.mint_budget`. Says whether the mint was begun (or is under way already), not
    /// how it ends. Dropping the future does not stop the mint.
    pub async fn refresh(&self) -> Result<(), RefreshRefused> {
        let (answer, answered) = oneshot::channel();
        // If either fails, the task has ended.
        let _ = self.commands.send(Command::Refresh(answer)).await;
        answered.await.unwrap_or_else(|_| Err(RefreshRefused::NothingToMintWith { reason: "the proxy is stopping".to_owned() }))
    }

    /// Ends the task; its handle is to be awaited. To be called when no request is in flight any more: the own token may be revoked.
    ///
    /// Takes at most 4 s: a mint in flight gets 2 s, so that its token is known (C43), and revocations get 2 s.
    pub async fn shutdown(&self) {
        let _ = self.commands.send(Command::Shutdown).await; // else it has ended already
    }
}

/// What others ask of the task.
#[derive(Debug)]
pub(super) enum Command {
    /// A request was rejected.
    Reject { generation: u64, rejection: Rejection, answer: oneshot::Sender<Verdict> },
    /// An operator wants a successor.
    Refresh(oneshot::Sender<Result<(), RefreshRefused>>),
    /// The proxy stops.
    Shutdown,
}

/// Commands that may wait for the task. More wait in their senders.
const COMMANDS: usize = 1024;
/// What a mint in flight gets at a stop.
const MINT_GRACE_AT_STOP: Duration = Duration::from_secs(2);

fn start_at<U: Upstream, S: TokenStore>(
    wall: Wall,
    config: &config::Token,
    upstream: U,
    store: S,
    credentials: watch::Receiver<Loaded>,
    reload_credentials: impl Fn() + 'static,
    metrics: Arc<TokenMetrics>,
) -> Started {
    let (publish, published) = watch::channel(Availability::Unavailable { next_attempt: None });
    let (sender, commands) = mpsc::channel(COMMANDS);
    let (report, status) = Report::new(config, Arc::clone(&metrics), Rc::clone(&wall));
    let settings = Settings::new(config);
    let upstream = Rc::new(upstream);
    let task = Task {
        machine: Machine::new(settings),
        settings,
        revoker: Revoker::new(Rc::clone(&upstream), published.clone()),
        upstream,
        store: Rc::new(store),
        wall,
        random: fastrand::Rng::new(),
        identities: Identities::default(),
        reload_credentials: Box::new(reload_credentials),
        acquisition: Slot::empty(),
        probe: Slot::empty(),
        last_stored: None,
        mint_sent: Rc::default(),
        publish,
        report,
        trouble: StoreTrouble::new(Arc::clone(&metrics)),
        metrics,
        repetition: Repetition::default(),
        waiting: HashMap::new(),
        last_ticket: 0,
        refresh: None,
    };
    let control = Control { commands: sender.clone() };
    let task = crate::task::spawn("token", task.run(credentials, commands));
    Started { tokens: TokenReader::new(published, sender), control, status, task }
}

struct Task<U, S> {
    machine: Machine,
    settings: Settings,
    upstream: Rc<U>,
    store: Rc<S>,
    wall: Wall,
    random: fastrand::Rng,

    identities: Identities,
    reload_credentials: Box<dyn Fn()>,

    /// The way to another token: at most one at a time.
    acquisition: Slot<Acquired>,
    /// The probe of the token in use.
    probe: Slot<(u64, ProbeOutcome)>,
    revoker: Revoker<U>,
    /// Name of the token that this process last saw in the store.
    last_stored: Option<String>,
    /// Name of the mint that was sent and has no reply yet.
    mint_sent: Rc<RefCell<Option<String>>>,

    publish: watch::Sender<Availability>,
    report: Report,
    metrics: Arc<TokenMetrics>,
    trouble: StoreTrouble,
    repetition: Repetition,

    waiting: HashMap<Ticket, oneshot::Sender<Verdict>>,
    last_ticket: u64,
    /// Who asked for the successor that the machine is being asked for.
    refresh: Option<oneshot::Sender<Result<(), RefreshRefused>>>,
}

/// What the way to another token came to.
enum Acquired {
    Read(Contents),
    Attempted(Attempted),
    Verified(ProbeOutcome),
}

impl<U: Upstream, S: TokenStore> Task<U, S> {
    async fn run(mut self, mut credentials: watch::Receiver<Loaded>, mut commands: mpsc::Receiver<Command>) {
        let first = credentials.borrow_and_update().clone();
        self.credentials_read(&first);
        let mut credentials_may_change = true;
        loop {
            let now = Instant::now();
            let (deadline, budget_grows) = (self.machine.deadline(now), self.machine.budget_grows(now));
            // Whichever branch wins, the others lose nothing: channels keep what was sent, the slots and the revoker keep their futures, and the instants
            // are reckoned anew.
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Reject { generation, rejection, answer }) => self.rejected(generation, rejection, answer),
                    Some(Command::Refresh(answer)) => {
                        self.refresh = Some(answer);
                        self.step(Event::RefreshRequested);
                    }
                    Some(Command::Shutdown) | None => break,
                },
                changed = credentials.changed(), if credentials_may_change => match changed {
                    Ok(()) => {
                        let loaded = credentials.borrow_and_update().clone();
                        self.credentials_read(&loaded);
                    }
                    Err(_) => credentials_may_change = false, // the last ones stay in force
                },
                acquired = self.acquisition.finished() => self.acquired(acquired),
                probed = self.probe.finished() => self.probed(probed),
                () = until(deadline) => self.step(Event::TimerFired),
                () = until(budget_grows) => self.report.publish(&self.machine, Instant::now()),
                never = self.revoker.run() => match never {},
            }
        }
        self.stop().await;
    }

    /// Nothing new is begun; what is under way gets its time.
    async fn stop(mut self) {
        self.step(Event::Shutdown);
        if self.machine.is_minting() {
            // A mint that is cut off may leave a token that nobody knows.
            match timeout(MINT_GRACE_AT_STOP, self.acquisition.finished()).await {
                Ok(acquired) => self.acquired(acquired),
                Err(_) => {
                    if let Some(name) = self.mint_sent.take() {
                        self.metrics.mint("lost", MINT_GRACE_AT_STOP);
                        warn!(name, "stopped before the reply to a mint came: a token of this name may be left behind");
                    }
                }
            }
        }
        let own = self
            .machine
            .token()
            .filter(|token| !self.machine.token_is_dead() && token.source == TokenSource::Minted && !self.store.is_persistent());
        self.revoker.finish(own.cloned()).await;
    }

    // ---- events in ----

    fn step(&mut self, event: Event) {
        let now = Instant::now();
        let actions = self.machine.step(event, now, Jitter::new(self.random.f64()));
        self.identities.keep(|id| self.machine.refers_to(id));
        // Before anybody is answered: who is told to replay with a token finds it in use.
        self.publish_availability(now);
        for action in actions {
            self.perform(action);
        }
        self.report.publish(&self.machine, now);
    }

    fn credentials_read(&mut self, loaded: &Loaded) {
        self.report.credentials(loaded);
        let id = self.identities.of(loaded);
        let credentials = match (loaded, id) {
            (Loaded::Missing { .. }, _) | (_, None) => Credentials::Missing,
            (Loaded::Pair(_), Some(id)) => Credentials::Pair(id),
            (Loaded::Token(fixed), Some(id)) => {
                let record = TokenRecord {
                    authorization: AuthorizationValue::new(&fixed.token),
                    id: None,
                    name: None,
                    created: fixed.loaded_at,
                    source: TokenSource::TokenFile,
                };
                Credentials::FixedToken(id, Arc::new(record))
            }
        };
        self.step(Event::CredentialsChanged(credentials));
    }

    fn rejected(&mut self, generation: u64, rejection: Rejection, answer: oneshot::Sender<Verdict>) {
        if generation == self.machine.generation() {
            self.metrics.rejection(rejection.status());
        }
        self.last_ticket += 1;
        let ticket = Ticket(self.last_ticket);
        self.waiting.insert(ticket, answer);
        self.step(Event::Rejected { ticket, generation, rejection });
    }

    fn probed(&mut self, probed: Result<(u64, ProbeOutcome), Panicked>) {
        // A panic was reported by the panic hook. Its waiters are answered by the next step, as after any probe that told nothing.
        let (generation, outcome) =
            probed.unwrap_or_else(|Panicked| (self.machine.generation(), ProbeOutcome::Inconclusive(FAULT.to_owned())));
        let result = self.probe_result(outcome, "the token in use");
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

    fn acquired(&mut self, acquired: Result<Acquired, Panicked>) {
        let event = match acquired {
            Ok(Acquired::Read(stored)) => self.store_read(stored),
            Ok(Acquired::Attempted(Attempted::Ended { name, outcome, took })) => self.mint_ended(name, outcome, took),
            Ok(Acquired::Attempted(Attempted::Adopted(token))) => {
                info!(id = token.id, name = token.name, "another process stored a token: trying that one instead of minting");
                Event::StoreAdopted(self.candidate(token))
            }
            Ok(Acquired::Attempted(Attempted::Deferred(wait))) => {
                info!(?wait, "no mint yet: the token store remembers those of other processes");
                self.report.facts.failure = Some("other processes that share the token store minted lately".to_owned());
                Event::MintFailed(MintFailure::Deferred { wait })
            }
            Ok(Acquired::Attempted(Attempted::LockBusy)) => {
                self.failed("another process holds the token store's lock".to_owned());
                Event::MintFailed(MintFailure::Retry { retry_after: None })
            }
            Ok(Acquired::Verified(outcome)) => {
                match &outcome {
                    ProbeOutcome::Alive => self.succeeded(),
                    ProbeOutcome::Dead => {}
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

    /// A fault in the proxy's own code (C08). The machine is told the most cautious thing about whatever was under way.
    fn acquisition_panicked(&mut self) -> Event {
        self.failed(FAULT.to_owned());
        if let Some(name) = self.mint_sent.take() {
            return self.mint_ended(name, Outcome::Lost { reason: FAULT.to_owned() }, Duration::ZERO);
        }
        if self.machine.is_minting() {
            Event::MintFailed(MintFailure::Retry { retry_after: None })
        } else if self.machine.is_verifying() {
            Event::Probed(Subject::Candidate, ProbeResult::Inconclusive)
        } else {
            Event::StoreRead { token: None, attempt_ages: Vec::new() }
        }
    }

    fn store_read(&mut self, stored: Contents) -> Event {
        let today = (self.wall)();
        let attempt_ages = stored.attempts.iter().map(|attempt| age(*attempt, today)).collect();
        Event::StoreRead { token: stored.token.map(|token| self.candidate(token)), attempt_ages }
    }

    fn candidate(&mut self, stored: StoredToken) -> Candidate {
        self.last_stored = Some(stored.name.clone());
        let token = TokenRecord {
            authorization: AuthorizationValue::new(&stored.token),
            id: stored.id,
            name: Some(stored.name),
            created: stored.created,
            source: TokenSource::Store,
        };
        Candidate { token: Arc::new(token), age: age(stored.created, (self.wall)()) }
    }

    fn mint_ended(&mut self, name: String, outcome: Outcome, took: Duration) -> Event {
        let (label, event) = match outcome {
            Outcome::Minted(Minted { token, id, name }) => {
                info!(id, name, "token minted");
                self.succeeded();
                self.last_stored = Some(name.clone());
                let authorization = AuthorizationValue::new(&token);
                let record = TokenRecord { authorization, id, name: Some(name), created: (self.wall)(), source: TokenSource::Minted };
                ("success", Event::Minted(Arc::new(record)))
            }
            Outcome::Rejected { status } => {
                let source = self.report.credentials_source();
                warn!(
                    status = status.as_u16(),
                    credentials = source,
                    "the upstream rejected the credentials: correct them; they are read again by themselves"
                );
                self.report.facts.rejected_with = Some(status);
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

    // ---- actions out ----

    fn perform(&mut self, action: Action) {
        match action {
            Action::ReadStore(credentials) => {
                let (store, pair, trouble) = (Rc::clone(&self.store), self.pair(credentials), self.trouble.clone());
                self.acquisition.fill(async move { Acquired::Read(read(store, &pair, trouble).await) });
            }
            Action::Mint { credentials, interval_applies } => {
                let (upstream, store, pair) = (Rc::clone(&self.upstream), Rc::clone(&self.store), self.pair(credentials));
                let order = Order {
                    limits: self.settings.limits,
                    interval_applies,
                    last_stored: self.last_stored.clone(),
                    wall: Rc::clone(&self.wall),
                    trouble: self.trouble.clone(),
                    sent: Rc::clone(&self.mint_sent),
                };
                self.acquisition.fill(async move { Acquired::Attempted(attempt(upstream, store, &pair, order).await) });
            }
            Action::Probe(Subject::Candidate, token) => {
                let upstream = Rc::clone(&self.upstream);
                self.acquisition.fill(async move { Acquired::Verified(upstream.probe(&token.authorization).await) });
            }
            Action::Probe(Subject::InUse(generation), token) => {
                let upstream = Rc::clone(&self.upstream);
                self.probe.fill(async move { (generation, upstream.probe(&token.authorization).await) });
            }
            Action::Answer(ticket, verdict) => {
                if let Some(answer) = self.waiting.remove(&ticket) {
                    let _ = answer.send(verdict); // who asked may have left
                }
            }
            Action::AnswerRefresh(result) => {
                if let Some(answer) = self.refresh.take() {
                    let _ = answer.send(result);
                }
            }
            Action::Supersede { token, proven_dead } => self.revoker.supersede(token, proven_dead),
            Action::ReloadCredentials => (self.reload_credentials)(),
        }
    }

    fn pair(&self, id: CredentialsId) -> Arc<Pair> {
        self.identities.pair(id).expect("the machine refers to the credentials that it acts with, and names a pair where one is needed")
    }

    /// Wakes requests only if there is news for them.
    fn publish_availability(&self, now: Instant) {
        let next = self.machine.availability(now);
        self.publish.send_if_modified(|shown| {
            let is_news = match (&*shown, &next) {
                (Availability::Usable(shown), Availability::Usable(next)) => shown.generation != next.generation,
                (Availability::Unavailable { next_attempt: shown }, Availability::Unavailable { next_attempt: next }) => shown != next,
                (Availability::Usable(_), Availability::Unavailable { .. })
                | (Availability::Unavailable { .. }, Availability::Usable(_)) => true,
            };
            if is_news {
                *shown = next;
            }
            is_news
        });
    }
}

/// Topic of [`Repetition`].
const MINT: &str = "mint";
/// What people are told after a panic; the panic hook told the rest.
const FAULT: &str = "a fault in the proxy";

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}
