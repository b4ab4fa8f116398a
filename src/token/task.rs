//! The one task that keeps the token: brings the state machine its events, carries out what it asks for, publishes what requests carry.
//!
//! It runs on the control plane's thread and owns the only senders of [`Availability`] and [`Status`]. Requests reach it through [`TokenReader`], the
//! admin server through [`Control`]. What it does to the world outside stands behind two traits in [`super::effects`].

mod attempt;
mod identities;
mod outcomes;
mod report;
mod revocation;
mod slot;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::pending;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::warn;

use super::effects::{TokenStore, Upstream};
use super::mint::ProbeOutcome;
use super::state::{
    Action, Credentials, CredentialsId, Event, Jitter, Machine, Rejection, Settings, Subject, Ticket, TokenRecord, TokenSource,
};
use super::store::Contents;
use super::{Availability, RefreshRefused, Status, TokenReader, Verdict};
use crate::config;
use crate::credentials::{Loaded, Pair};
use crate::metrics::TokenMetrics;
use crate::secret::AuthorizationValue;

use attempt::{Attempted, Order, Seen, Wall, attempt, read};
use identities::Identities;
use report::{Repetition, Report, StoreTrouble};
use revocation::Revoker;
use slot::Slot;

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
        in_force: Rc::default(),
        seen: Rc::default(),
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
    /// The credentials that the machine goes by, for attempts under way.
    in_force: Rc<Cell<Option<CredentialsId>>>,
    /// What this process knows of the store's content.
    seen: Rc<RefCell<Seen>>,
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
    Verified(Arc<TokenRecord>, ProbeOutcome),
}

impl<U: Upstream, S: TokenStore> Task<U, S> {
    async fn run(mut self, mut credentials: watch::Receiver<Loaded>, mut commands: mpsc::Receiver<Command>) {
        let first = credentials.borrow_and_update().clone();
        self.credentials_read(&first);
        let mut credentials_may_change = true;
        loop {
            let now = Instant::now();
            let (deadline, budget_grows) = (self.machine.deadline(now), self.machine.budget_grows(now));
            let renewal_due = self.machine.renewal_due(now);
            // Whichever branch wins, the others lose nothing: channels keep what was sent, the slots and the revoker keep their futures, and the instants
            // are reckoned anew. In order, so that a flood of rejections does not delay what ends it; the runtime's own choice would also make no two
            // runs of the simulation the same.
            tokio::select! {
                biased;
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
                // What is due and held back has a later deadline, and must be told all the same.
                () = until(renewal_due) => self.report.publish(&self.machine, Instant::now()),
                () = until(budget_grows) => self.report.publish(&self.machine, Instant::now()),
                never = self.revoker.run() => match never {},
                command = commands.recv() => match command {
                    Some(Command::Reject { generation, rejection, answer }) => self.rejected(generation, rejection, answer),
                    Some(Command::Refresh(answer)) => {
                        self.refresh = Some(answer);
                        self.step(Event::RefreshRequested);
                    }
                    Some(Command::Shutdown) | None => break,
                },
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
        self.in_force.set(self.machine.credentials());
        if let Some(token) = self.machine.token() {
            self.seen.borrow_mut().known(token);
        }
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

    // ---- actions out ----

    fn perform(&mut self, action: Action) {
        match action {
            Action::ReadStore(credentials) => {
                let (store, pair, wall) = (Rc::clone(&self.store), self.pair(credentials), Rc::clone(&self.wall));
                let (seen, trouble) = (Rc::clone(&self.seen), self.trouble.clone());
                self.acquisition.fill(async move { Acquired::Read(read(store, &pair, wall, seen, trouble).await) });
            }
            Action::Mint { credentials, pause_after } => {
                let (upstream, store, pair) = (Rc::clone(&self.upstream), Rc::clone(&self.store), self.pair(credentials));
                let order = Order {
                    limits: self.settings.limits,
                    credentials,
                    in_force: Rc::clone(&self.in_force),
                    pause_after,
                    seen: Rc::clone(&self.seen),
                    wall: Rc::clone(&self.wall),
                    trouble: self.trouble.clone(),
                    sent: Rc::clone(&self.mint_sent),
                };
                self.acquisition.fill(async move { Acquired::Attempted(attempt(upstream, store, &pair, order).await) });
            }
            Action::Probe(Subject::Candidate, token) => {
                let upstream = Rc::clone(&self.upstream);
                self.acquisition.fill(async move {
                    let outcome = upstream.probe(&token.authorization).await;
                    Acquired::Verified(token, outcome)
                });
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

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => pending().await,
    }
}
