//! Keeps the token and the history of mints across restarts, so that neither a restart nor a crash loop mints needlessly.
//!
//! A store is a convenience: where it fails, the token in memory serves on. Each operation therefore returns its error to the caller, who logs and
//! counts it ([`StoreError::operation`]) and goes on as if the store were empty. What was refused ([`StoreError::Refused`]) may then be replaced; what the
//! disk failed to read ([`StoreError::Io`]) must not be written over, since it may hold the history of all processes.
//!
//! How a mint is done with a store that others share: [`lock`](Store::lock) it, [`load`](Store::load) it again (somebody else may have minted meanwhile:
//! use that token), [`save`](Store::save) it with the attempt in its history *before* the request is sent (a process that dies in the middle has still
//! used up its share of the budget), mint, save the token, unlock. A fixed token (`credentials.token_file`) needs no store.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use std::{fmt, io};

use tokio::time::{Instant, sleep, timeout};

use crate::config::{self, Origin};
use crate::credentials::Pair;
use crate::secret::Token;

mod disk;
mod file;
mod format;
#[cfg(fuzzing)]
pub(crate) mod fuzzing;
mod mask;

use file::FileStore;

/// Attempts older than this are forgotten: the budget is per hour.
pub const ATTEMPTS_SPAN: Duration = Duration::from_hours(1);
/// At most this many attempts are kept, the latest ones, so that the file stays small whatever `mint_budget` says.
const MAX_ATTEMPTS: usize = 1000;
/// A disk that does not answer in this time has failed; the thread that waits for it is left behind.
const DISK_DEADLINE: Duration = Duration::from_secs(10);
/// Between two tries to get the lock, with jitter of as much again.
const LOCK_RETRY: Duration = Duration::from_millis(50);

/// What a store holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Contents {
    /// The token last minted. Whether it is alive, and belongs to these credentials at all, only the upstream can tell (see the module `mask`): probe it
    /// before its first use. Whether it is another one than that in hand is told by its name: loaded with other credentials, the same one looks different.
    pub token: Option<StoredToken>,
    /// When mints were attempted that may have left a token behind, within the last [`ATTEMPTS_SPAN`], oldest first. They may lie in the future, where the
    /// wall clock was set back since; the next save moves them into the present.
    pub attempts: Vec<SystemTime>,
}

/// What is kept of a time.
pub fn to_the_millisecond(time: SystemTime) -> SystemTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + since - Duration::from_nanos(u64::from(since.subsec_nanos() % 1_000_000))
}

/// A token as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredToken {
    /// The token.
    pub token: Token,
    /// Upsolver's id of it.
    pub id: Option<String>,
    /// The display name under which it was minted; no two tokens have the same.
    pub name: String,
    /// When it was minted; kept to the millisecond.
    pub created: SystemTime,
}

impl Contents {
    /// Drops attempts that no longer count.
    pub(super) fn forget_old(mut self, now: SystemTime) -> Self {
        self.attempts.retain(|attempt| now.duration_since(*attempt).map_or(true, |age| age < ATTEMPTS_SPAN));
        self
    }

    /// Whether a mint was attempted after the token was made.
    pub fn tried_since_token(&self) -> bool {
        self.token.as_ref().is_some_and(|token| self.attempts.iter().any(|attempt| *attempt > token.created))
    }

    /// Whether a wrong clock put something into the future.
    pub(super) fn lies_ahead_of(&self, now: SystemTime) -> bool {
        self.attempts.iter().chain(self.token.iter().map(|token| &token.created)).any(|at| *at > now)
    }

    /// What is written: without attempts that no longer count, and with everything moved into the present that a wrong clock put into the future.
    pub(super) fn prune(mut self, now: SystemTime) -> Self {
        self = self.forget_old(now);
        let tried_since = self.tried_since_token();
        for at in self.attempts.iter_mut().chain(self.token.iter_mut().map(|token| &mut token.created)) {
            *at = to_the_millisecond((*at).min(now));
        }
        if tried_since && let Some(token) = &mut self.token {
            // In the present all are alike; which came first is kept.
            token.created = token.created.min(to_the_millisecond(now) - Duration::from_millis(1));
        }
        self.attempts.sort_unstable();
        let superfluous = self.attempts.len().saturating_sub(MAX_ATTEMPTS);
        self.attempts.drain(..superfluous);
        self
    }
}

/// `[token.store]`
#[derive(Debug, Clone)]
pub enum Store {
    /// Keeps nothing: always empty, always unlocked.
    Memory,
    /// One file, possibly shared by several processes.
    File(Arc<FileStore>),
}

impl Store {
    /// Touches nothing yet. Contents are bound to `origin`, the upstream.
    pub fn new(config: &config::Store, origin: &Origin) -> Self {
        match config {
            config::Store::Memory => Self::Memory,
            config::Store::File(path) => Self::File(Arc::new(FileStore::new(path.clone(), origin.to_string()))),
        }
    }

    /// Whether what is saved outlives the process: then its token is not revoked at a clean stop.
    pub fn is_persistent(&self) -> bool {
        matches!(self, Self::File(_))
    }

    /// Whether what is there could be used at all, with whichever credentials. Blocks, and changes nothing.
    pub fn inspect(&self) -> Result<(), StoreError> {
        match self {
            Self::Memory => Ok(()),
            Self::File(store) => store.inspect(),
        }
    }

    /// Reads the contents; empty where nothing was saved yet. With other credentials than those it was saved with, the token that comes out is another one.
    /// Dropping the future leaves the reading to its thread.
    pub async fn load(&self, pair: &Pair) -> Result<Contents, StoreError> {
        let Self::File(store) = self else { return Ok(Contents::default()) };
        let (worker, pair) = (Arc::clone(store), pair.clone());
        blocking(Operation::Read, store.path(), move || worker.load(&pair, SystemTime::now())).await
    }

    /// Replaces the contents, at once and durably. Dropping the future does not stop a replacement that was begun.
    pub async fn save(&self, contents: Contents, pair: &Pair) -> Result<(), StoreError> {
        let Self::File(store) = self else { return Ok(()) };
        let (worker, pair) = (Arc::clone(store), pair.clone());
        blocking(Operation::Write, store.path(), move || worker.save(contents, &pair, SystemTime::now())).await
    }

    /// Keeps other processes from minting until the result is dropped, or this process ends in whatever way. Waits for up to `patience` while another one
    /// holds it. Dropping the future gives the lock up, also one that it was just getting.
    pub async fn lock(&self, patience: Duration) -> Result<Lock, StoreError> {
        let Self::File(store) = self else { return Ok(Lock { _held: None }) };
        let deadline = Instant::now() + patience;
        loop {
            let worker = Arc::clone(store);
            if let Some(held) = blocking(Operation::Lock, store.path(), move || worker.try_lock()).await? {
                return Ok(Lock { _held: Some(held) });
            }
            if Instant::now() >= deadline {
                return Err(StoreError::Busy { path: store.path().to_owned(), patience });
            }
            sleep(LOCK_RETRY.mul_f64(1.0 + fastrand::f64())).await;
        }
    }
}

/// The right to mint, among the processes that share a store; given up on drop.
#[derive(Debug)]
pub struct Lock {
    _held: Option<disk::HeldLock>,
}

/// What was being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// [`Store::load`]
    Read,
    /// [`Store::save`]
    Write,
    /// [`Store::lock`]
    Lock,
}

impl Operation {
    /// The label `operation` of `token_store_errors_total`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Lock => "lock",
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// Why a store could not be used. The text is for the log and holds no secret.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file is there, but it cannot be trusted: damaged, foreign, linked, open to others. A save replaces it.
    #[error("{}: refused: {reason}", path.display())]
    Refused {
        /// What was being done.
        operation: Operation,
        /// The file.
        path: PathBuf,
        /// For people.
        reason: String,
    },
    /// The place is none for a store: nothing is read there, and nothing written.
    #[error("{}: cannot be used: {reason}", path.display())]
    Unusable {
        /// What was being done.
        operation: Operation,
        /// The file.
        path: PathBuf,
        /// For people.
        reason: String,
    },
    /// The disk failed.
    #[error("{}: cannot {operation} it", path.display())]
    Io {
        /// What was being done.
        operation: Operation,
        /// The file.
        path: PathBuf,
        /// From the system.
        source: io::Error,
    },
    /// Another process held the lock all the time.
    #[error("{}: another process holds its lock since more than {}", path.display(), humantime::format_duration(*patience))]
    Busy {
        /// The file that the lock protects.
        path: PathBuf,
        /// How long was waited.
        patience: Duration,
    },
}

impl StoreError {
    /// What becomes of a file that is refused.
    pub const REPLACED: &str = "what it holds is not used; the next token minted replaces it";

    /// With what the system said.
    pub fn reason(&self) -> String {
        std::error::Error::source(self).map_or_else(|| self.to_string(), |source| format!("{self}: {source}"))
    }

    /// What was being done when it failed.
    pub fn operation(&self) -> Operation {
        match self {
            Self::Refused { operation, .. } | Self::Unusable { operation, .. } | Self::Io { operation, .. } => *operation,
            Self::Busy { .. } => Operation::Lock,
        }
    }
}

/// Runs `work` on a thread of its own, since disks block and PBKDF2 computes.
async fn blocking<T, F>(operation: Operation, path: &Path, work: F) -> Result<T, StoreError>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T, StoreError> + Send + 'static,
{
    let failed = |source| StoreError::Io { operation, path: path.to_owned(), source };
    match timeout(DISK_DEADLINE, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(result)) => result,
        Ok(Err(panic)) => Err(failed(io::Error::other(panic))),
        Err(_) => Err(failed(io::Error::from(io::ErrorKind::TimedOut))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::{Email, Password};

    fn pair() -> Pair {
        Pair {
            email: Email::new("me@example.com".to_owned()).unwrap(),
            password: Password::new("secret".to_owned()).unwrap(),
            source: "a test".to_owned(),
            read_again: true,
            loaded_at: SystemTime::now(),
        }
    }

    fn store(path: PathBuf) -> Store {
        Store::new(&config::Store::File(path), &Origin { tls: true, host: "api.upsolver.com".to_owned(), port: 443 })
    }

    fn contents() -> Contents {
        let created = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let token = Token::new("abc".to_owned()).unwrap();
        Contents { token: Some(StoredToken { token, id: None, name: "upsolver-auth-proxy/x".to_owned(), created }), attempts: Vec::new() }
    }

    #[tokio::test]
    async fn memory_keeps_nothing_and_is_never_locked() {
        let store = Store::Memory;
        store.save(contents(), &pair()).await.unwrap();
        assert_eq!(store.load(&pair()).await.unwrap(), Contents::default());
        let _one = store.lock(Duration::ZERO).await.unwrap();
        let _two = store.lock(Duration::ZERO).await.unwrap();
        assert!(!store.is_persistent());
    }

    #[tokio::test]
    async fn c10_a_file_outlives_the_store_that_wrote_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token.json");
        assert_eq!(store(path.clone()).load(&pair()).await.unwrap(), Contents::default());
        store(path.clone()).save(contents(), &pair()).await.unwrap();
        assert_eq!(store(path).load(&pair()).await.unwrap(), contents());
    }

    /// C31: two openings of one file, as two processes have them: the second gets its turn when the first is done, or gives up in time.
    #[tokio::test]
    async fn c31_one_lock_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token.json");
        let held = store(path.clone()).lock(Duration::ZERO).await.unwrap();
        let error = store(path.clone()).lock(Duration::from_millis(1)).await.unwrap_err();
        assert!(matches!(error, StoreError::Busy { .. }), "{error}");
        assert_eq!(error.operation().label(), "lock");
        let other = store(path);
        let waiting = other.lock(Duration::from_mins(1));
        tokio::pin!(waiting);
        assert!(timeout(LOCK_RETRY * 3, &mut waiting).await.is_err(), "it is held");
        drop(held);
        waiting.await.expect("it is free");
    }

    /// C26, C27: a clock that was wrong neither frees the budget nor blocks it for ever.
    #[test]
    fn c26_attempts_are_kept_for_an_hour_and_never_lie_in_the_future() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let second = Duration::from_secs(1);
        let attempts =
            vec![now + ATTEMPTS_SPAN * 9000, now - second, now - ATTEMPTS_SPAN, now - ATTEMPTS_SPAN + second, SystemTime::UNIX_EPOCH];
        let pruned = Contents { token: None, attempts }.prune(now);
        assert_eq!(pruned.attempts, [now - ATTEMPTS_SPAN + second, now - second, now]);
        let raw = Contents { token: None, attempts: vec![now + second] };
        assert!(raw.lies_ahead_of(now) && raw.clone().forget_old(now) == raw && !raw.prune(now).lies_ahead_of(now));
        // What came first is kept where all is moved to one instant.
        let mut ahead = contents();
        ahead.token.as_mut().unwrap().created = now + second;
        ahead.attempts = vec![now + second];
        assert!(!ahead.clone().prune(now).tried_since_token(), "its own attempt");
        ahead.attempts.push(now + 2 * second);
        assert!(ahead.prune(now).tried_since_token());
        let many = Contents { token: None, attempts: vec![now; MAX_ATTEMPTS + 5] }.prune(now);
        assert_eq!(many.attempts.len(), MAX_ATTEMPTS);
    }
}
