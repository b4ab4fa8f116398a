//! The token store that all processes of a run share: what is durable at each instant, its lock, and how it fails.
//!
//! A replacement is atomic, as `store::disk` makes it and its own tests show: a process that is killed leaves the old content or the new one. What
//! is stored is bound to the credentials that it was first stored with; to others it reads as another token.

use std::cell::{Cell, RefCell};
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::time::{Instant, sleep, timeout};

use super::process::Host;
use super::world::{Point, ms};
use crate::credentials::Pair;
use crate::token::effects::TokenStore;
use crate::token::store::{Contents, Operation, StoreError};

use super::api;

/// As long as a mint takes at most, and a little.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// Writes fail with ENOSPC, and so does a lock file that is not there yet.
    Full,
    /// Nothing can be written, locked or made.
    ReadOnly,
    /// Each operation fails half of the time.
    Flaky,
    /// Operations take seconds.
    Slow,
}

#[derive(Debug)]
pub(super) struct Disk {
    pub(super) fault: Cell<Fault>,
    lock: Arc<Mutex<()>>,
    content: RefCell<Content>,
}

/// The program dates what it could not write by the end of the save that failed, the judge by the end of the mint before.
pub(super) fn is_near(one: SystemTime, other: SystemTime) -> bool {
    one.duration_since(other).unwrap_or_else(|error| error.duration()) <= Duration::from_millis(100)
}

#[derive(Debug, Default)]
struct Content {
    contents: Contents,
    /// Of the token in it.
    password: Option<u8>,
    damaged: bool,
}

impl Default for Disk {
    fn default() -> Self {
        Self { fault: Cell::new(Fault::None), lock: Arc::default(), content: RefCell::default() }
    }
}

impl Disk {
    /// Somebody or something overwrites the file with what is no store.
    pub(super) fn damage(&self) {
        *self.content.borrow_mut() = Content { damaged: true, ..Content::default() };
    }

    /// The token that is durable now: its name, and whose it is.
    pub(super) fn token(&self) -> Option<(String, u8)> {
        let content = self.content.borrow();
        Some((content.contents.token.as_ref()?.name.clone(), content.password?))
    }

    /// How many attempts of this time of day are durable.
    pub(super) fn attempts_near(&self, wall: SystemTime) -> usize {
        self.content.borrow().contents.attempts.iter().filter(|at| is_near(**at, wall)).count()
    }

    fn read(&self, pair: &Pair, today: SystemTime) -> Result<Contents, StoreError> {
        let content = self.content.borrow();
        if content.damaged {
            let reason = "it is damaged".to_owned();
            return Err(StoreError::Refused { operation: Operation::Read, path: "/state/token.json".into(), reason });
        }
        let mut contents = content.contents.clone();
        let reader = api::number_of(pair);
        if let Some(token) = &mut contents.token
            && content.password != Some(reader)
        {
            token.token = api::secret(&format!("{}-to-p{reader}", token.name));
        }
        Ok(contents.forget_old(today))
    }

    fn replace(&self, contents: Contents, pair: &Pair, today: SystemTime) {
        let mut content = self.content.borrow_mut();
        let mut contents = contents.prune(today);
        let same = match (&mut contents.token, &content.contents.token) {
            (Some(new), Some(old)) if new.name == old.name => {
                new.token = old.token.clone(); // a token is masked once
                true
            }
            _ => false,
        };
        let password = if same { content.password } else { Some(api::number_of(pair)) };
        *content = Content { contents, password, damaged: false };
    }
}

impl Host {
    /// What the operation costs, and whether it works.
    async fn operate(&self, operation: Operation) -> Result<(), StoreError> {
        let (takes, fails) = {
            let mut rng = self.life.rng.borrow_mut();
            let (takes, coin) = (ms(&mut rng, 1..30), rng.bool());
            match (self.world.disk.fault.get(), operation) {
                (Fault::Slow, _) => (ms(&mut rng, 500..3000), false),
                (Fault::Flaky, _) | (Fault::Full, Operation::Lock) => (takes, coin),
                (Fault::ReadOnly, Operation::Write | Operation::Lock) | (Fault::Full, Operation::Write) => (takes, true),
                (Fault::None, _) | (Fault::ReadOnly | Fault::Full, Operation::Read) => (takes, false),
            }
        };
        sleep(takes).await;
        if !fails {
            return Ok(());
        }
        self.world.count("store errors");
        self.world.note(&format!("{} the disk fails: {operation}", self.life));
        let source = io::ErrorKind::StorageFull.into();
        Err(StoreError::Io { operation, path: "/state/token.json".into(), source })
    }
}

impl TokenStore for Host {
    type Lock = Option<OwnedMutexGuard<()>>;

    async fn lock(&self) -> Result<Self::Lock, StoreError> {
        if !self.world.plan.shared_store {
            return Ok(None);
        }
        self.life.attempt_begins();
        self.operate(Operation::Lock).await?;
        let lock = Arc::clone(&self.world.disk.lock);
        let Ok(guard) = timeout(PATIENCE, lock.lock_owned()).await else {
            self.world.count("lock busy");
            return Err(StoreError::Busy { path: "/state/token.json".into(), patience: PATIENCE });
        };
        self.life.locked.set(true);
        Ok(Some(guard))
    }

    async fn load(&self, pair: &Pair) -> Result<Contents, StoreError> {
        if !self.world.plan.shared_store {
            return Ok(Contents::default());
        }
        let worked = self.operate(Operation::Read).await;
        self.life.read_at.set(Instant::now());
        self.life.load_failed.set(worked.is_err());
        worked?;
        let contents = self.world.disk.read(pair, self.world.wall(self.life.process))?;
        self.life.loaded.set(true);
        Ok(contents)
    }

    async fn save(&self, contents: Contents, pair: &Pair) -> Result<(), StoreError> {
        if !self.world.plan.shared_store {
            return Ok(());
        }
        let worked = self.operate(Operation::Write).await;
        self.life.save_failed.set(self.life.save_failed.get() || worked.is_err());
        worked?;
        self.world.pass(&self.life, Point::BeforeRename).await;
        let before = self.world.disk.token().map(|(name, _)| name);
        let today = self.world.wall(self.life.process);
        self.world.disk.replace(contents, pair, today);
        self.world.stored(&self.life, before.as_deref(), today);
        self.world.pass(&self.life, Point::AfterRename).await;
        sleep(Duration::from_millis(1)).await;
        Ok(())
    }

    fn is_persistent(&self) -> bool {
        self.world.plan.shared_store
    }
}
