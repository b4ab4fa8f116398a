//! What is done under the store's lock: the first look into it, and an attempt to mint. Another process may have minted already, or used up the budget
//! that all of them share.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::report::StoreTrouble;
use crate::credentials::Pair;
use crate::token::effects::{TokenStore, Upstream};
use crate::token::mint::{Minted, Outcome};
use crate::token::state::{BUDGET_WINDOW, MintLimits, MintLog};
use crate::token::store::{Contents, StoreError, StoredToken};

/// Tells the time of day; a function so that tests can tell another one.
pub(super) type Wall = Rc<dyn Fn() -> SystemTime>;

/// What an attempt needs beside the upstream and the store.
pub(super) struct Order {
    pub(super) limits: MintLimits,
    /// Whether `token.min_mint_interval` holds for this attempt.
    pub(super) interval_applies: bool,
    /// Name of the token that this process last saw in the store: any other one was put there by another process since.
    pub(super) last_stored: Option<String>,
    pub(super) wall: Wall,
    pub(super) trouble: StoreTrouble,
    /// Display name of the mint, as long as its reply may still come: for the log if the attempt is cut off.
    pub(super) sent: Rc<RefCell<Option<String>>>,
}

/// How it ended.
#[derive(Debug)]
pub(super) enum Attempted {
    /// Nothing was sent: another process stored this token meanwhile.
    Adopted(StoredToken),
    /// Nothing was sent: by the store's history no mint is allowed for so long.
    Deferred(Duration),
    /// Nothing was sent: another process is minting.
    LockBusy,
    /// A mint was sent, or could not be.
    Ended { name: String, outcome: Outcome, took: Duration },
}

/// The first look into the store. It takes the lock too, so that of many processes that start together all but one wait for the token of that one,
/// instead of finding its unfinished attempt.
pub(super) async fn read<S: TokenStore>(store: Rc<S>, pair: &Pair, trouble: StoreTrouble) -> Contents {
    let _lock = lock(&*store, &trouble).await;
    load(&*store, pair, &trouble).await
}

/// Locks, looks, mints, stores.
///
/// The attempt is written down *before* it is sent and struck out after one that certainly left no token. A process that is killed in between has
/// counted a mint too many rather than one too few, so a crash loop stays inside the budget.
pub(super) async fn attempt<U: Upstream, S: TokenStore>(upstream: Rc<U>, store: Rc<S>, pair: &Pair, order: Order) -> Attempted {
    // Held to the end: the next process finds the new token in the store.
    let Ok(_lock) = lock(&*store, &order.trouble).await else { return Attempted::LockBusy };
    let mut stored = load(&*store, pair, &order.trouble).await;
    if let Some(theirs) = stored.token.take_if(|token| Some(&token.name) != order.last_stored.as_ref()) {
        return Attempted::Adopted(theirs);
    }
    let (now, today) = (Instant::now(), (order.wall)());
    if let Some(wait) = held_back(&order, &stored, now, today) {
        return Attempted::Deferred(wait);
    }

    stored.attempts.retain(|attempt| age(*attempt, today) < BUDGET_WINDOW);
    stored.attempts.push(today);
    save(&*store, pair, &stored, &order).await;

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
    save(&*store, pair, &stored, &order).await;
    Attempted::Ended { name: display.name, outcome, took }
}

/// Since `then`; zero where that lies in the future since the wall clock was set back.
pub(super) fn age(then: SystemTime, today: SystemTime) -> Duration {
    today.duration_since(then).unwrap_or_default()
}

/// How long the history in the store asks to wait, if at all. The task's own pacing let this attempt pass, but does not know what other processes did.
fn held_back(order: &Order, stored: &Contents, now: Instant, today: SystemTime) -> Option<Duration> {
    let ages: Vec<_> = stored.attempts.iter().map(|attempt| age(*attempt, today)).collect();
    let log = MintLog::from_ages(order.limits, &ages, now);
    let interval = if order.interval_applies { log.interval_allows(now) } else { now };
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

async fn load<S: TokenStore>(store: &S, pair: &Pair, trouble: &StoreTrouble) -> Contents {
    store.load(pair).await.unwrap_or_else(|error| {
        trouble.tell(&error);
        Contents::default()
    })
}

async fn save<S: TokenStore>(store: &S, pair: &Pair, stored: &Contents, order: &Order) {
    if let Err(error) = store.save(stored.clone(), pair).await {
        order.trouble.tell(&error);
    }
}
