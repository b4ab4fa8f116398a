//! One process of a run, from a start to a kill or a stop, and the applications that send requests through it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fastrand::Rng;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use http::StatusCode;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tracing::info_span;

use super::super::script::{configuration, pair};
use super::super::{Control, Started, Wall, start_at};
use super::api::{name_of, secret};
use super::judge::Pace;
use super::world::World;
use crate::credentials::{FixedToken, Loaded};
use crate::metrics::TokenMetrics;
use crate::token::{ActiveToken, Status, TokenReader, Verdict};

/// `token.wait`
const WAIT: Duration = Duration::from_secs(10);
/// The clock of timers has no finer steps.
const TICK: Duration = Duration::from_millis(2);

/// What the credential files of a process hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    Pair(u8),
    TokenFile(u8),
    Unreadable,
}

impl Content {
    pub(super) fn file_token(number: u8) -> String {
        format!("file{number}")
    }

    fn loaded(self) -> Loaded {
        match self {
            Self::Pair(number) => pair(&format!("p{number}")),
            Self::TokenFile(number) => {
                let token = secret(&Self::file_token(number));
                Loaded::Token(Arc::new(FixedToken { token, source: "/secrets/token".to_owned(), loaded_at: SystemTime::UNIX_EPOCH }))
            }
            Self::Unreadable => Loaded::Missing { reason: "/secrets/password: it is empty".to_owned() },
        }
    }
}

/// One life of a process, as the world knows it.
pub(super) struct Life {
    pub(super) process: usize,
    /// Among all lives of all processes.
    pub(super) number: usize,
    pub(super) rng: RefCell<Rng>,

    /// The content of the credential files, by the number of their change, and since when; what is unreadable is none.
    pub(super) credentials: Cell<Option<(usize, Content)>>,
    pub(super) credentials_since: Cell<Instant>,
    pub(super) refresh_asked: Cell<Option<Instant>>,

    /// Since the attempt (or the first look) began: the lock was had, the store was read, the disk failed to read it, it was written, and could not be
    /// written.
    pub(super) locked: Cell<bool>,
    pub(super) loaded: Cell<bool>,
    pub(super) load_failed: Cell<bool>,
    pub(super) saved: Cell<bool>,
    pub(super) save_failed: Cell<bool>,
    pub(super) read_at: Cell<Instant>,
    /// When the store was last read before the credentials changed.
    pub(super) knew_until: Cell<Instant>,

    /// What probes and 401s told this life.
    pub(super) told_dead: RefCell<BTreeSet<String>>,
    pub(super) presumed_dead: RefCell<BTreeSet<String>>,
    pub(super) pace: RefCell<Pace>,
    pub(super) in_use: RefCell<Option<(u64, String)>>,
    pub(super) ever_used: RefCell<BTreeSet<String>>,
    pub(super) stopping: Cell<bool>,
    pub(super) killed: Cell<Option<Instant>>,
    tokens: RefCell<Option<TokenReader>>,
}

impl fmt::Display for Life {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.process, self.number)
    }
}

impl Life {
    /// An attempt to mint begins, or the first look into the store.
    pub(super) fn attempt_begins(&self) {
        self.locked.set(false);
        self.loaded.set(false);
        self.load_failed.set(false);
        self.saved.set(false);
        self.save_failed.set(false);
    }

    /// What requests carry now.
    pub(super) fn carried(&self) -> Option<(u64, String)> {
        let tokens = self.tokens.borrow();
        let token = tokens.as_ref()?.current()?;
        Some((token.generation, name_of(&token.authorization)))
    }

    pub(super) fn thinks_dead(&self, name: &str) -> bool {
        self.told_dead.borrow().contains(name) || self.presumed_dead.borrow().contains(name)
    }
}

/// The world as one life of a process meets it.
pub(super) struct Host {
    pub(super) world: Rc<World>,
    pub(super) life: Rc<Life>,
}

/// A process that is running.
pub(super) struct Running {
    pub(super) life: Rc<Life>,
    pub(super) control: Control,
    task: JoinHandle<()>,
    credentials: watch::Sender<Loaded>,
    bursts: mpsc::UnboundedSender<usize>,
    helpers: Vec<JoinHandle<()>>,
}

impl Running {
    pub(super) fn start(world: &Rc<World>, process: usize, number: usize, credentials: (usize, Content), mut rng: Rng) -> Self {
        let now = Instant::now();
        let life = Rc::new(Life {
            process,
            number,
            rng: RefCell::new(rng.fork()),
            credentials: Cell::new(Some(credentials).filter(|(_, content)| *content != Content::Unreadable)),
            credentials_since: Cell::new(now),
            refresh_asked: Cell::new(None),
            locked: Cell::new(false),
            loaded: Cell::new(false),
            load_failed: Cell::new(false),
            saved: Cell::new(false),
            save_failed: Cell::new(false),
            read_at: Cell::new(now),
            knew_until: Cell::new(world.started()),
            told_dead: RefCell::default(),
            presumed_dead: RefCell::default(),
            pace: RefCell::new(Pace::default()),
            in_use: RefCell::new(None),
            ever_used: RefCell::default(),
            stopping: Cell::new(false),
            killed: Cell::new(None),
            tokens: RefCell::new(None),
        });
        world.note(&format!("{life} starts with {:?}", credentials.1));
        let wall: Wall = {
            let world = Rc::clone(world);
            Rc::new(move || world.wall(process))
        };
        let mut config = configuration();
        config.max_age = world.plan.max_age;
        config.min_mint_interval = world.plan.min_mint_interval;
        config.mint_budget = world.plan.mint_budget;
        let host = || Host { world: Rc::clone(world), life: Rc::clone(&life) };
        let (credentials, loaded) = watch::channel(credentials.1.loaded());
        let span = info_span!("process", process, number);
        let started = span.in_scope(|| start_at(wall, &config, host(), host(), loaded, || {}, Arc::new(TokenMetrics::default())));
        let Started { tokens, control, status, task } = started;
        life.tokens.replace(Some(tokens.clone()));
        let (bursts, burst) = mpsc::unbounded_channel();
        let helpers = vec![
            crate::task::spawn("observer", observe(host(), status)),
            crate::task::spawn("traffic", traffic(host(), tokens, burst, rng)),
        ];
        Self { life, control, task, credentials, bursts, helpers }
    }

    /// As `kill -9` does it.
    pub(super) fn kill(&self) {
        self.life.killed.set(Some(Instant::now()));
        self.task.abort();
        self.helpers.iter().for_each(JoinHandle::abort);
    }

    /// The token task ends without being asked to only by a panic.
    pub(super) fn has_ended(&self) -> bool {
        self.task.is_finished()
    }

    /// As SIGTERM does it, once the last request has its answer.
    pub(super) async fn stop(self, world: &World) {
        world.note(&format!("{} stops", self.life));
        self.life.stopping.set(true);
        self.life.killed.set(Some(Instant::now()));
        self.helpers.iter().for_each(JoinHandle::abort);
        let started = Instant::now();
        self.control.shutdown().await;
        if self.task.await.is_err() {
            world.violated("the token task ends without a panic");
        }
        if started.elapsed() > Duration::from_secs(4) + TICK {
            world.violated("a stop takes no longer than 4 s");
        }
    }

    /// Other content in the files, by the number of its change; the same number means the same content again (SIGHUP).
    pub(super) fn credentials(&self, world: &World, credentials: (usize, Content)) {
        world.note(&format!("{} reads {:?}", self.life, credentials.1));
        let life = &self.life;
        if credentials.1 != Content::Unreadable {
            let before = life.credentials.replace(Some(credentials)).map(|(_, content)| content);
            if before != Some(credentials.1) {
                life.credentials_since.set(Instant::now());
                life.knew_until.set(life.read_at.get());
                life.pace.replace(Pace::default());
            }
            if let Content::TokenFile(number) = credentials.1 {
                // Who puts an old token back wants it to be tried.
                life.told_dead.borrow_mut().remove(&Content::file_token(number));
            }
        }
        self.credentials.send_replace(credentials.1.loaded());
    }

    pub(super) fn burst(&self, requests: usize) {
        let _ = self.bursts.send(requests); // else it has ended
    }

    /// An operator asks for a successor.
    pub(super) fn refresh(&mut self, world: &Rc<World>) {
        let (world, control, life) = (Rc::clone(world), self.control.clone(), Rc::clone(&self.life));
        life.refresh_asked.set(Some(Instant::now()));
        self.helpers.push(crate::task::spawn("refresh", async move {
            let result = control.refresh().await;
            world.note(&format!("{life} is asked for a successor: {result:?}"));
            if result.is_err() {
                life.refresh_asked.set(None);
            }
        }));
    }
}

/// Looks whenever anything about the token changes.
async fn observe(host: Host, mut status: watch::Receiver<Arc<Status>>) {
    loop {
        host.world.observe(&host.life);
        if status.changed().await.is_err() {
            return;
        }
    }
}

async fn traffic(host: Host, tokens: TokenReader, mut bursts: mpsc::UnboundedReceiver<usize>, mut rng: Rng) {
    let mut in_flight = FuturesUnordered::new();
    let mean = u64::try_from(host.world.plan.between_requests.as_millis()).expect("it is short");
    let mut next = Instant::now();
    loop {
        let requests = tokio::select! {
            biased;
            Some(()) = in_flight.next() => 0,
            Some(burst) = bursts.recv() => burst,
            () = tokio::time::sleep_until(next) => {
                next = Instant::now() + Duration::from_millis(rng.u64(1..2 * mean));
                1
            }
        };
        for _ in 0..requests {
            in_flight.push(request(&host, &tokens, rng.fork()));
        }
    }
}

/// One request, as `crate::proxy` treats it.
async fn request(host: &Host, tokens: &TokenReader, mut rng: Rng) {
    let Host { world, life } = host;
    let started = Instant::now();
    world.count("requests");
    let token = tokens.wait(WAIT).await;
    if started.elapsed() > WAIT + TICK {
        world.violated("a request waits for a token no longer than token.wait");
    }
    let Ok(token) = token else { return world.count("requests without a token") };
    let Some((status, has_id)) = send(host, &token, &mut rng).await else { return };
    if status == StatusCode::UNAUTHORIZED {
        life.presumed_dead.borrow_mut().insert(name_of(&token.authorization));
    }
    let asked = Instant::now();
    let verdict = tokens.reject(&token, status, has_id, WAIT).await;
    if asked.elapsed() > WAIT + TICK {
        world.violated("a verdict takes no longer than token.wait");
    }
    if let Verdict::Replay(successor) = verdict {
        if successor.generation <= token.generation {
            world.violated("a request is sent again with a newer token");
        }
        world.count("replays");
        let _ = send(host, &successor, &mut rng).await; // its answer is relayed, whatever it is
    }
}

async fn send(host: &Host, token: &ActiveToken, rng: &mut Rng) -> Option<(StatusCode, bool)> {
    let name = name_of(&token.authorization);
    if host.life.told_dead.borrow().contains(&name) {
        host.world.violated(&format!("no request leaves with a token known to be dead: {} sends {name}", host.life));
    }
    // Requests that woke together go apart, so that their order is the seed's and not that of the runtime's wakers.
    sleep(Duration::from_millis(rng.u64(0..500))).await;
    host.world.request(&host.life, &name, rng).await
}
