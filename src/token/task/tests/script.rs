//! An upstream and a store that do as they are told, and remember what was asked of them.

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::StatusCode;
use tokio::sync::{Mutex, OwnedMutexGuard, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

use super::super::{Control, Started, Wall, start_at};
use crate::config;
use crate::credentials::{FixedToken, Loaded, Pair};
use crate::metrics::TokenMetrics;
use crate::secret::{AuthorizationValue, Email, Password, Token};
use crate::token::effects::{TokenStore, Upstream};
use crate::token::mint::{Display, Minted, Outcome, ProbeOutcome, RevokeError};
use crate::token::store::{Contents, Operation, StoreError};
use crate::token::{Status, TokenReader};

/// What was asked of the upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Deed {
    /// A mint, with so many tokens minted before it.
    Mint(usize),
    /// A probe of the token of this name.
    Probe(&'static str),
    /// The first was revoked by the authority of the second.
    Revoke(&'static str, &'static str),
}

/// How mints end.
#[derive(Debug, Clone, Copy)]
pub(super) enum Mint {
    Succeeds,
    Rejected,
    Retry(&'static str, Option<Duration>),
    Lost,
    Panics,
}

/// Names that a test may use for tokens: minted ones in order, those of token files, and what a foreign store entry unmasks to.
const NAMES: [&str; 11] = ["t1", "t2", "t3", "t4", "t5", "t6", "t7", "t8", "f1", "f2", "garbage"];

/// All that the processes of one test share.
pub(super) struct World {
    started: Instant,
    mint: Cell<Mint>,
    mint_takes: Cell<Duration>,
    minted: Cell<usize>,
    dead: RefCell<HashSet<String>>,
    revocable: Cell<bool>,
    deeds: RefCell<Vec<(Instant, Deed)>>,

    persists: Cell<bool>,
    broken: RefCell<Vec<Operation>>,
    save_takes: Cell<Duration>,
    stored: RefCell<Option<(Password, Contents)>>,
    lock: Arc<Mutex<()>>,
}

impl World {
    pub(super) fn new() -> Rc<Self> {
        Rc::new(Self {
            started: Instant::now(),
            mint: Cell::new(Mint::Succeeds),
            mint_takes: Cell::new(Duration::ZERO),
            minted: Cell::new(0),
            dead: RefCell::new(HashSet::from(["garbage".to_owned()])),
            revocable: Cell::new(false),
            deeds: RefCell::default(),
            persists: Cell::new(false),
            broken: RefCell::default(),
            save_takes: Cell::new(Duration::ZERO),
            stored: RefCell::default(),
            lock: Arc::default(),
        })
    }

    pub(super) fn mints_are(&self, mint: Mint) {
        self.mint.set(mint);
    }

    pub(super) fn mint_takes(&self, duration: Duration) {
        self.mint_takes.set(duration);
    }

    /// Somebody deletes the token.
    pub(super) fn kill(&self, name: &str) {
        self.dead.borrow_mut().insert(name.to_owned());
    }

    /// Somebody deletes every token there is.
    pub(super) fn kill_all(&self) {
        (1..=self.minted.get()).for_each(|number| self.kill(&format!("t{number}")));
    }

    pub(super) fn allow_revocation(&self) {
        self.revocable.set(true);
    }

    /// The store outlives the process.
    pub(super) fn persist(&self) {
        self.persists.set(true);
    }

    /// These fail from now on, the others work.
    pub(super) fn break_store(&self, broken: &[Operation]) {
        self.broken.replace(broken.to_vec());
    }

    pub(super) fn save_takes(&self, duration: Duration) {
        self.save_takes.set(duration);
    }

    /// What another process put into the store with this password.
    pub(super) fn store(&self, password: &str, contents: Contents) {
        self.stored.replace(Some((Password::new(password.to_owned()).unwrap(), contents)));
    }

    /// The times of the attempts in the store.
    pub(super) fn stored_attempts(&self) -> Vec<SystemTime> {
        self.stored.borrow().iter().flat_map(|(_, contents)| contents.attempts.clone()).collect()
    }

    /// As another process takes it.
    pub(super) fn lock(&self) -> OwnedMutexGuard<()> {
        Arc::clone(&self.lock).try_lock_owned().expect("it is free")
    }

    /// The time of day, which goes on with the paused clock.
    pub(super) fn today(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_hours(500_000) + self.started.elapsed()
    }

    pub(super) fn deeds(&self) -> Vec<Deed> {
        self.deeds.borrow().iter().map(|(_, deed)| *deed).collect()
    }

    pub(super) fn forget_deeds(&self) {
        self.deeds.borrow_mut().clear();
    }

    pub(super) fn times(&self, wanted: Deed) -> Vec<Instant> {
        self.deeds.borrow().iter().filter(|(_, deed)| *deed == wanted).map(|(at, _)| *at).collect()
    }

    pub(super) fn mint_times(&self) -> Vec<Instant> {
        self.deeds.borrow().iter().filter(|(_, deed)| matches!(deed, Deed::Mint(_))).map(|(at, _)| *at).collect()
    }

    fn is_dead(&self, value: &AuthorizationValue) -> bool {
        self.dead.borrow().iter().any(|name| authorization(name) == *value)
    }

    fn note(&self, deed: Deed) {
        self.deeds.borrow_mut().push((Instant::now(), deed));
    }

    fn check(&self, operation: Operation) -> Result<(), StoreError> {
        let error =
            || StoreError::Io { operation, path: "/state/token.json".into(), source: std::io::ErrorKind::ReadOnlyFilesystem.into() };
        if self.broken.borrow().contains(&operation) { Err(error()) } else { Ok(()) }
    }
}

fn secret(name: &str) -> Token {
    Token::new(format!("secret-of-{name}")).unwrap()
}

/// What requests carry with the token of this name.
pub(super) fn authorization(name: &str) -> AuthorizationValue {
    AuthorizationValue::new(&secret(name))
}

fn name_of(value: &AuthorizationValue) -> &'static str {
    NAMES.into_iter().find(|name| authorization(name) == *value).unwrap_or("another")
}

pub(super) fn pair(password: &str) -> Loaded {
    Loaded::Pair(Arc::new(Pair {
        email: Email::new("somebody@example.com".to_owned()).unwrap(),
        password: Password::new(password.to_owned()).unwrap(),
        source: format!("file of {password}"),
        read_again: true,
        loaded_at: SystemTime::now(),
    }))
}

pub(super) fn token_file(name: &str) -> Loaded {
    Loaded::Token(Arc::new(FixedToken { token: secret(name), source: "/secrets/token".to_owned(), loaded_at: SystemTime::now() }))
}

/// The world as one process sees it.
struct Seen(Rc<World>);

impl Upstream for Seen {
    fn display(&self) -> Display {
        Display { name: format!("t{}", self.0.minted.get() + 1), description: String::new() }
    }

    async fn mint(&self, _: &Pair, display: &Display) -> Outcome {
        let world = &self.0;
        world.note(Deed::Mint(world.minted.get()));
        sleep(world.mint_takes.get()).await;
        match world.mint.get() {
            Mint::Succeeds => {
                world.minted.set(world.minted.get() + 1);
                let name = display.name.clone();
                Outcome::Minted(Minted { token: secret(&name), id: Some(name.clone()), name })
            }
            Mint::Rejected => Outcome::Rejected { status: StatusCode::FORBIDDEN },
            Mint::Retry(reason, retry_after) => Outcome::Retry { reason: reason.to_owned(), retry_after },
            Mint::Lost => Outcome::Lost { reason: "connection reset".to_owned() },
            Mint::Panics => panic!("a fault, as the test wants it"),
        }
    }

    async fn probe(&self, authorization: &AuthorizationValue) -> ProbeOutcome {
        self.0.note(Deed::Probe(name_of(authorization)));
        sleep(Duration::from_millis(20)).await;
        if self.0.is_dead(authorization) { ProbeOutcome::Dead } else { ProbeOutcome::Alive }
    }

    fn can_revoke(&self) -> bool {
        self.0.revocable.get()
    }

    async fn revoke(&self, id: &str, authorization: &AuthorizationValue) -> Result<(), RevokeError> {
        self.0.note(Deed::Revoke(NAMES.into_iter().find(|name| *name == id).unwrap(), name_of(authorization)));
        self.0.kill(id);
        Ok(())
    }
}

impl TokenStore for Seen {
    type Lock = Option<OwnedMutexGuard<()>>;

    async fn lock(&self) -> Result<Self::Lock, StoreError> {
        self.0.check(Operation::Lock)?;
        if !self.0.persists.get() {
            return Ok(None);
        }
        Ok(Some(Arc::clone(&self.0.lock).lock_owned().await))
    }

    async fn load(&self, pair: &Pair) -> Result<Contents, StoreError> {
        self.0.check(Operation::Read)?;
        Ok(match &*self.0.stored.borrow() {
            None => Contents::default(),
            Some((password, stored)) => {
                let mut stored = stored.clone();
                if let Some(token) = &mut stored.token
                    && *password != pair.password
                {
                    token.token = secret("garbage");
                }
                stored
            }
        })
    }

    async fn save(&self, contents: Contents, pair: &Pair) -> Result<(), StoreError> {
        sleep(self.0.save_takes.get()).await;
        self.0.check(Operation::Write)?;
        if self.0.persists.get() {
            let mut stored = self.0.stored.borrow_mut();
            let mut next = (pair.password.clone(), contents.prune(self.0.today()));
            // A token is masked once.
            if let (Some((password, Contents { token: Some(old), .. })), Some(new)) = (&*stored, &mut next.1.token)
                && old.name == new.name
            {
                (next.0, new.token) = (password.clone(), old.token.clone());
            }
            *stored = Some(next);
        }
        Ok(())
    }

    fn is_persistent(&self) -> bool {
        self.0.persists.get()
    }
}

/// One process.
pub(super) struct Rig {
    pub(super) tokens: TokenReader,
    pub(super) control: Control,
    pub(super) task: JoinHandle<()>,
    pub(super) credentials: watch::Sender<Loaded>,
    /// How often the files were to be read again.
    pub(super) reloads: Rc<Cell<u32>>,
    status: watch::Receiver<Arc<Status>>,
}

impl Rig {
    pub(super) fn start(world: &Rc<World>, first: Loaded) -> Self {
        let (credentials, loaded) = watch::channel(first);
        let reloads = Rc::new(Cell::new(0));
        let count = Rc::clone(&reloads);
        let reload = move || count.set(count.get() + 1);
        let clock = Rc::clone(world);
        let wall: Wall = Rc::new(move || clock.today());
        let (upstream, store) = (Seen(Rc::clone(world)), Seen(Rc::clone(world)));
        let started = start_at(wall, &configuration(), upstream, store, loaded, reload, Arc::new(TokenMetrics::default()));
        let Started { tokens, control, status, task } = started;
        Self { tokens, control, task, credentials, reloads, status }
    }

    pub(super) fn status(&self) -> Arc<Status> {
        self.status.borrow().clone()
    }
}

/// The defaults of the contract.
pub(super) fn configuration() -> config::Token {
    config::Token {
        name: "upsolver-auth-proxy".to_owned(),
        description: String::new(),
        wait: Duration::from_secs(10),
        max_age: None,
        min_mint_interval: Duration::from_mins(1),
        mint_budget: 6,
        mint_timeout: Duration::from_secs(15),
        probe_path: "/users".to_owned(),
        probe_interval: Duration::from_secs(30),
        replay: config::Replay::All,
        replay_buffer: 64 << 10,
        revoke_path: None,
        store: config::Store::Memory,
    }
}
