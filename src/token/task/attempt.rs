//! What is done under the store's lock: the first look into it, and an attempt to mint. Another process may have minted already, or used up the budget
//! that all of them share.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::report::StoreTrouble;
use crate::credentials::Pair;
use crate::secret::AuthorizationValue;
use crate::token::effects::{TokenStore, Upstream};
use crate::token::mint::{Minted, Outcome};
use crate::token::state::{BUDGET_WINDOW, CredentialsId, MintLimits, MintLog, PauseAfter, TokenRecord, TokenSource};
use crate::token::store::{Contents, StoreError, StoredToken, to_the_millisecond};

/// Tells the time of day; a function so that tests can tell another one.
pub(super) type Wall = Rc<dyn Fn() -> SystemTime>;

/// What an attempt needs beside the upstream and the store.
pub(super) struct Order {
    pub(super) limits: MintLimits,
    pub(super) credentials: CredentialsId,
    /// Those in force now, which may be others by the time that the lock is had.
    pub(super) in_force: Rc<Cell<Option<CredentialsId>>>,
    pub(super) pause_after: PauseAfter,
    pub(super) seen: Rc<RefCell<Seen>>,
    pub(super) wall: Wall,
    pub(super) trouble: StoreTrouble,
    /// Display name of the mint, as long as its reply may still come: for the log if the attempt is cut off.
    pub(super) sent: Rc<RefCell<Option<String>>>,
}

/// What this process knows of the store's content, and what it could not put there.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Name of the token that was last seen in it: any other one was put there by another process since.
    token: Option<String>,
    /// Whether that token is known to work with credentials that this process had.
    proven: bool,
    /// How that token read with each of the credentials with which it was used in doubt, or found dead. With others it may read as one that works.
    readings: Vec<AuthorizationValue>,
    /// The latest attempt that was last seen in it: where there is another one, another process made it since.
    attempt: Option<SystemTime>,
    /// Own attempts that count and could not be written down: for the next save.
    unsaved: Vec<Instant>,
}

impl Seen {
    /// This token is in use, or found dead: as it reads with these credentials, nobody need look at it again.
    pub(super) fn known(&mut self, token: &TokenRecord) {
        if token.source == TokenSource::Store && token.name == self.token && !self.readings.contains(&token.authorization) {
            self.readings.push(token.authorization.clone());
        }
    }

    /// This token works: with other credentials it can but read wrong.
    pub(super) fn proven(&mut self, token: &TokenRecord) {
        self.proven |= token.name.is_some() && token.name == self.token;
    }

    fn is_new(&self, stored: &StoredToken) -> bool {
        let is_known = || self.proven || self.readings.contains(&AuthorizationValue::new(&stored.token));
        self.token.as_ref() != Some(&stored.name) || !is_known()
    }

    /// All of it is known now.
    fn look(&mut self, stored: &Contents) {
        self.look_at_token(stored);
        // As it will be loaded.
        self.attempt = stored.attempts.iter().max().copied().map(to_the_millisecond);
    }

    fn look_at_token(&mut self, stored: &Contents) {
        let name = stored.token.as_ref().map(|token| &token.name);
        if self.token.as_ref() != name {
            self.token = name.cloned();
            self.proven = false;
            self.readings.clear();
        }
    }
}

/// How it ended.
#[derive(Debug)]
pub(super) enum Attempted {
    /// Nothing was sent: another process stored this token meanwhile.
    Adopted(StoredToken),
    /// Nothing was sent: by the store's history no mint is allowed for so long.
    Deferred(Duration),
    /// Nothing was sent: the credentials were replaced meanwhile.
    Outdated,
    /// Nothing was sent: another process is minting.
    LockBusy,
    /// A mint was sent, or could not be.
    Ended { name: String, outcome: Outcome, took: Duration },
}

/// The first look into the store. It takes the lock too, so that of many processes that start together all but one wait for the token of that one,
/// instead of finding its unfinished attempt.
pub(super) async fn read<S: TokenStore>(store: Rc<S>, pair: &Pair, wall: Wall, seen: Rc<RefCell<Seen>>, trouble: StoreTrouble) -> Contents {
    let lock = lock(&*store, &trouble).await;
    let Some(mut stored) = load(&*store, pair, &trouble).await else { return Contents::default() };
    if lock.is_ok() {
        settle(&*store, pair, &mut stored, wall(), &trouble).await;
    }
    seen.borrow_mut().look(&stored);
    stored
}

/// Locks, looks, mints, stores.
///
/// The attempt is written down *before* it is sent and struck out after one that certainly left no token. A process that is killed in between has
/// counted a mint too many rather than one too few, so a crash loop stays inside the budget. A store that the disk fails to read is done without, and
/// left as it is.
pub(super) async fn attempt<U: Upstream, S: TokenStore>(upstream: Rc<U>, store: Rc<S>, pair: &Pair, order: Order) -> Attempted {
    // Held to the end: the next process finds the new token in the store.
    let Ok(_lock) = lock(&*store, &order.trouble).await else { return Attempted::LockBusy };
    let loaded = load(&*store, pair, &order.trouble).await;
    // The lock of another process can last as long as its mint. A token of replaced credentials would be made to be thrown away.
    if order.in_force.get() != Some(order.credentials) {
        return Attempted::Outdated;
    }
    let (now, today) = (Instant::now(), (order.wall)());
    // What could not be read is not written over, for it holds what other processes did. This attempt waits in `unsaved` for the next one.
    let is_readable = loaded.is_some();
    let mut stored = loaded.unwrap_or_default();
    settle(&*store, pair, &mut stored, today, &order.trouble).await;
    let adopted = stored.token.clone().filter(|token| order.seen.borrow().is_new(token));
    if let Some(theirs) = adopted {
        // Whoever made it may have tried with the same new credentials: that attempt is no less new for its token being dead.
        order.seen.borrow_mut().look_at_token(&stored);
        return Attempted::Adopted(theirs);
    }
    let is_unseen = is_readable && stored.attempts.iter().max() != order.seen.borrow().attempt.as_ref();
    stored.attempts.extend(order.seen.borrow().unsaved.iter().filter_map(|at| today.checked_sub(now.saturating_duration_since(*at))));
    if let Some(wait) = held_back(&order, &stored, is_unseen, now, today) {
        return Attempted::Deferred(wait);
    }

    stored.attempts.retain(|attempt| age(*attempt, today) < BUDGET_WINDOW);
    stored.attempts.push(today);
    // An operator's mint may pass by what other processes did; it does not make that known to the next one of its own accord.
    let passed_by = is_unseen && order.pause_after == PauseAfter::None;
    let is_written = is_readable && save(&*store, pair, &stored, &order, passed_by).await;

    let display = upstream.display();
    order.sent.replace(Some(display.name.clone()));
    let outcome = upstream.mint(pair, &display).await;
    order.sent.replace(None);
    let took = now.elapsed();

    // Counted from its end, so that the pause between two mints is a pause. One that left no token is struck out.
    stored.attempts.pop();
    let today = (order.wall)();
    if outcome.may_have_left_a_token() {
        stored.attempts.push(today);
    }
    if let Outcome::Minted(Minted { token, id, name }) = &outcome {
        stored.token = Some(StoredToken { token: token.clone(), id: id.clone(), name: name.clone(), created: today });
    }
    let is_saved = is_readable && save(&*store, pair, &stored, &order, passed_by).await;
    if !is_saved && !is_written && outcome.may_have_left_a_token() {
        let unsaved = &mut order.seen.borrow_mut().unsaved;
        unsaved.retain(|at| at.elapsed() < BUDGET_WINDOW);
        unsaved.push(Instant::now());
    }
    Attempted::Ended { name: display.name, outcome, took }
}

/// Since `then`; zero where that lies in the future since the wall clock was set back.
pub(super) fn age(then: SystemTime, today: SystemTime) -> Duration {
    today.duration_since(then).unwrap_or_default()
}

/// How long the history in the store asks to wait, if at all. The task's own pacing let this attempt pass, but does not know what other processes did.
fn held_back(order: &Order, stored: &Contents, is_unseen: bool, now: Instant, today: SystemTime) -> Option<Duration> {
    let ages: Vec<_> = stored.attempts.iter().map(|attempt| age(*attempt, today)).collect();
    let log = MintLog::from_ages(order.limits, &ages, now);
    let pauses = match order.pause_after {
        PauseAfter::All => true,
        PauseAfter::Unseen => is_unseen,
        PauseAfter::None => false,
    };
    let interval = if pauses { log.interval_allows(now) } else { now };
    let wait = log.budget_allows(now).max(interval) - now;
    (!wait.is_zero()).then_some(wait)
}

/// Another process that holds the lock all the time is an error; a lock that does not work is done without.
async fn lock<S: TokenStore>(store: &S, trouble: &StoreTrouble) -> Result<Option<S::Lock>, Busy> {
    match store.lock().await {
        Ok(lock) => Ok(Some(lock)),
        Err(StoreError::Busy { .. }) => Err(Busy),
        Err(error) => {
            trouble.tell(&error);
            Ok(None)
        }
    }
}

struct Busy;

/// None where the disk failed, so that nobody knows what the store holds. What is refused (damaged, foreign) holds nothing, and may be replaced.
async fn load<S: TokenStore>(store: &S, pair: &Pair, trouble: &StoreTrouble) -> Option<Contents> {
    match store.load(pair).await {
        Ok(contents) => Some(contents),
        Err(error) => {
            trouble.tell(&error);
            matches!(error, StoreError::Refused { .. }).then(Contents::default)
        }
    }
}

/// Whether it worked. Then it holds all that this process had to put there, and is what it last saw; except for the attempts that were `passed_by`.
async fn save<S: TokenStore>(store: &S, pair: &Pair, stored: &Contents, order: &Order, passed_by: bool) -> bool {
    match store.save(stored.clone(), pair).await {
        Ok(()) => {
            let mut seen = order.seen.borrow_mut();
            if passed_by {
                seen.look_at_token(stored);
            } else {
                seen.look(stored);
            }
            seen.unsaved.clear();
            true
        }
        Err(error) => {
            order.trouble.tell(&error);
            false
        }
    }
}

/// A wall clock that was set back leaves things in the future, which are taken for just made. Written down as such they grow older from now on; else
/// they would hold mints back until the clock comes by.
async fn settle<S: TokenStore>(store: &S, pair: &Pair, stored: &mut Contents, today: SystemTime, trouble: &StoreTrouble) {
    if stored.lies_ahead_of(today) {
        *stored = std::mem::take(stored).prune(today);
        if let Err(error) = store.save(stored.clone(), pair).await {
            trouble.tell(&error);
        }
    }
}
