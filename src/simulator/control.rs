//! The state of the simulated API and the handle by which tests change and watch it while it runs.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::faults::{End, Fault, FaultId, Faults};
use super::query::Query;
use super::record::{Log, Received};
use super::{Account, Options};

/// Changes and watches a running simulator, from any thread. Cloning copies a reference; the simulator's end does not invalidate it.
#[derive(Clone)]
pub struct Control {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    /// For blocking waits and for asynchronous ones.
    changed: Condvar,
    changes: watch::Sender<()>,
    settings: watch::Sender<Settings>,
    record: bool,
}

/// All that requests read and change.
pub(super) struct State {
    pub(super) organization: String,
    /// Password by email.
    pub(super) accounts: HashMap<String, String>,
    pub(super) tokens: Vec<LiveToken>,
    pub(super) mints: Vec<Mint>,
    pub(super) faults: Faults,
    pub(super) log: Log,
    pub(super) counters: Counters,
    ended: Vec<Ended>,
    pub(super) refused: Vec<String>,
    pub(super) queries: BTreeMap<u64, Query>,
    pub(super) pending_polls: u32,
    pub(super) pages: u32,
    pub(super) api_host: String,
    pub(super) ignore_authorization: bool,
}

/// A token that requests may carry.
pub(super) struct LiveToken {
    pub(super) id: String,
    pub(super) token: String,
}

/// One successful mint. It is noted even if its reply was lost.
#[derive(Clone)]
pub struct Mint {
    /// The id that `DELETE /api-tokens/{id}` takes.
    pub id: String,
    /// The token itself.
    pub token: String,
    /// `displayData.name` of the request.
    pub name: String,
    /// `displayData.description` of the request.
    pub description: String,
    /// The account that it was minted for.
    pub email: String,
    /// When it was minted.
    pub time: SystemTime,
}

/// For failure messages; shows no token.
impl fmt::Debug for Mint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mint").field("id", &self.id).field("name", &self.name).field("time", &self.time).finish_non_exhaustive()
    }
}

/// Connections of the simulator's life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Accepted by the kernel's queue and taken from it, whatever the greeting.
    pub accepted: u64,
    /// Open now.
    pub open: u64,
    /// Ended by the client without a TLS `close_notify` (RFC 8446 section 6.1), so that nobody knows whether all that it sent has come.
    pub cut: u64,
}

/// What one call of [`Control::end_connections`] ended. It fills up in the moments after the call.
#[derive(Debug, Clone, Default)]
pub struct Ended {
    /// Connections in their TLS handshake.
    pub handshakes: u64,
    /// All others, in whatever state.
    pub connections: u64,
    /// Of these, connections on which no request had come yet.
    pub fresh: u64,
    /// Of these, used connections without a request in flight. The reply to the last one, or the next request, may be on its way.
    pub at_rest: u64,
    /// Requests without a complete reply.
    pub interrupted: Vec<Interrupted>,
}

/// A request whose connection was ended before its reply was complete.
#[derive(Debug, Clone)]
pub struct Interrupted {
    /// Its `x-request-id`.
    pub id: Option<String>,
    /// Whether it was the first one on its connection.
    pub first: bool,
}

impl Ended {
    /// Counts one connection that had so many requests. One at rest may have a reply that did not leave yet.
    pub(super) fn connection(&mut self, requests: u64, at_rest: bool, interrupted: Vec<Interrupted>) {
        self.connections += 1;
        match (requests, at_rest) {
            (0, _) => self.fresh += 1,
            (_, true) => self.at_rest += 1,
            (_, false) => {}
        }
        self.interrupted.extend(interrupted);
    }
}

impl State {
    /// The record of the `number`th order to end all connections.
    pub(super) fn ended(&mut self, number: u64) -> &mut Ended {
        let index = usize::try_from(number - 1).expect("orders of one process");
        if self.ended.len() <= index {
            self.ended.resize_with(index + 1, Ended::default);
        }
        &mut self.ended[index]
    }
}

/// What concerns connections rather than requests; each connection watches it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Settings {
    pub(super) greeting: Greeting,
    pub(super) idle_timeout: Option<Duration>,
    /// How many times all connections were ended, and how the last time.
    pub(super) ended: (u64, End),
}

/// What becomes of a new connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Greeting {
    /// It is served.
    Serve,
    /// Nobody listens: the kernel refuses it. The port stays reserved.
    Refuse,
    /// It is accepted, and then nothing happens: the TLS handshake stalls.
    Silence,
    /// It is accepted and ended at once.
    End(End),
}

/// A wait that ran out of time.
#[derive(Debug, thiserror::Error)]
#[error("not so within {limit:?}; {seen}")]
pub struct TimedOut {
    limit: Duration,
    seen: String,
}

impl Control {
    pub(super) fn new(options: Options, api_host: String) -> Self {
        let state = State {
            organization: uuid(),
            accounts: options.accounts.into_iter().map(|account| (account.email, account.password)).collect(),
            tokens: Vec::new(),
            mints: Vec::new(),
            faults: Faults::default(),
            log: Log::default(),
            counters: Counters::default(),
            ended: Vec::new(),
            refused: Vec::new(),
            queries: BTreeMap::new(),
            pending_polls: options.pending_polls,
            pages: options.pages,
            api_host,
            ignore_authorization: false,
        };
        let settings = Settings { greeting: Greeting::Serve, idle_timeout: None, ended: (0, End::Close) };
        let shared = Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            changes: watch::Sender::new(()),
            settings: watch::Sender::new(settings),
            record: options.record,
        };
        Self { shared: Arc::new(shared) }
    }

    /// Lets this pair mint, in addition to the others. A known email gets the new password.
    pub fn add_account(&self, account: Account) {
        self.change(|state| state.accounts.insert(account.email, account.password));
    }

    /// The email mints with this password from now on; its tokens live on.
    pub fn change_password(&self, email: &str, password: &str) {
        self.change(|state| state.accounts.insert(email.to_owned(), password.to_owned()));
    }

    /// The email mints no longer; its tokens live on.
    pub fn remove_account(&self, email: &str) {
        self.change(|state| state.accounts.remove(email));
    }

    /// Makes a token without a mint, as a person does in the UI.
    pub fn make_token(&self) -> String {
        let token = alphanumeric(32);
        self.change(|state| state.tokens.push(LiveToken { id: uuid(), token: token.clone() }));
        token
    }

    /// Deletes a token, as a person does in the UI. False where it was not live.
    pub fn revoke(&self, token: &str) -> bool {
        self.change(|state| {
            let before = state.tokens.len();
            state.tokens.retain(|live| live.token != token);
            state.tokens.len() < before
        })
    }

    /// Deletes all tokens and says how many there were.
    pub fn revoke_all(&self) -> usize {
        self.change(|state| std::mem::take(&mut state.tokens).len())
    }

    /// All tokens that requests may carry, oldest first.
    pub fn live_tokens(&self) -> Vec<String> {
        self.state().tokens.iter().map(|live| live.token.clone()).collect()
    }

    /// All mints so far, oldest first.
    pub fn mints(&self) -> Vec<Mint> {
        self.state().mints.clone()
    }

    /// Adds a fault behind those already there.
    pub fn fault(&self, fault: Fault) -> FaultId {
        self.change(|state| state.faults.add(fault))
    }

    /// Takes a fault away; requests that it struck stay struck.
    pub fn remove_fault(&self, id: FaultId) {
        self.change(|state| state.faults.remove(id));
    }

    /// Takes all faults away.
    pub fn clear_faults(&self) {
        self.change(|state| state.faults.clear());
    }

    /// How many requests a fault struck; 0 after its removal.
    pub fn strikes(&self, id: FaultId) -> u64 {
        self.state().faults.strikes(id)
    }

    /// Serves requests whatever their `authorization`.
    pub fn ignore_authorization(&self, ignore: bool) {
        self.change(|state| state.ignore_authorization = ignore);
    }

    /// What `GET /environments/local-api` answers. At first it is the simulator's own address.
    pub fn set_api_host(&self, host: &str) {
        self.change(|state| host.clone_into(&mut state.api_host));
    }

    /// How new queries behave: so many answers are "pending", then so many pages of results follow.
    pub fn queries(&self, pending_polls: u32, pages: u32) {
        self.change(|state| (state.pending_polls, state.pages) = (pending_polls, pages));
    }

    /// What becomes of new connections. [`Greeting::Refuse`] and the way back take effect a moment later.
    pub fn greet(&self, greeting: Greeting) {
        self.shared.settings.send_modify(|settings| settings.greeting = greeting);
    }

    /// Shuts or opens the port; connections that are open stay open.
    pub fn refuse_connections(&self, refuse: bool) {
        self.greet(if refuse { Greeting::Refuse } else { Greeting::Serve });
    }

    /// Closes in order each connection that had no request for so long, as a load balancer does. `None`, as at first: never.
    pub fn idle_timeout(&self, timeout: impl Into<Option<Duration>>) {
        let timeout = timeout.into();
        self.shared.settings.send_modify(|settings| settings.idle_timeout = timeout);
    }

    /// Ends all connections that are open now, whatever they are doing. New ones are welcome.
    pub fn end_connections(&self, end: End) {
        self.shared.settings.send_modify(|settings| settings.ended = (settings.ended.0 + 1, end));
    }

    /// What each call of [`Control::end_connections`] ended, in order; one that found no connection may be missing at the end.
    pub fn ended(&self) -> Vec<Ended> {
        self.state().ended.clone()
    }

    /// The `x-request-id` of requests that were refused for their token.
    pub fn refused(&self) -> Vec<String> {
        self.state().refused.clone()
    }

    /// Connections so far and now.
    pub fn counters(&self) -> Counters {
        self.state().counters
    }

    /// All requests received since the start or the last clearing, in order; empty where `Options::record` is off.
    pub fn requests(&self) -> Vec<Received> {
        self.state().log.received().to_vec()
    }

    /// Forgets the requests received so far.
    pub fn clear_requests(&self) {
        self.change(|state| state.log.clear());
    }

    /// Blocks until `done` is true of the requests received, and returns them. `done` runs under the simulator's lock: it must not use this handle.
    pub fn wait_for(&self, done: impl FnMut(&[Received]) -> bool, limit: Duration) -> Result<Vec<Received>, TimedOut> {
        let mut done = done;
        self.wait(|state| done(state.log.received()).then(|| state.log.received().to_vec()), limit)
    }

    /// As [`wait_for`](Self::wait_for), for asynchronous callers. Cancelling it changes nothing.
    pub async fn wait_for_async(&self, done: impl FnMut(&[Received]) -> bool, limit: Duration) -> Result<Vec<Received>, TimedOut> {
        let mut done = done;
        self.wait_async(|state| done(state.log.received()).then(|| state.log.received().to_vec()), limit).await
    }

    /// Blocks until `done` is true of the connection counters, and returns them. `done` must not use this handle.
    pub fn wait_for_connections(&self, done: impl FnMut(Counters) -> bool, limit: Duration) -> Result<Counters, TimedOut> {
        let mut done = done;
        self.wait(|state| done(state.counters).then_some(state.counters), limit)
    }

    /// As [`wait_for_connections`](Self::wait_for_connections), for asynchronous callers. Cancelling it changes nothing.
    pub async fn wait_for_connections_async(&self, done: impl FnMut(Counters) -> bool, limit: Duration) -> Result<Counters, TimedOut> {
        let mut done = done;
        self.wait_async(|state| done(state.counters).then_some(state.counters), limit).await
    }

    fn wait<T>(&self, mut found: impl FnMut(&State) -> Option<T>, limit: Duration) -> Result<T, TimedOut> {
        let mut result = None;
        let waiting = |state: &mut State| {
            result = found(state);
            result.is_none()
        };
        let (state, _) = self.shared.changed.wait_timeout_while(self.state(), limit, waiting).unwrap_or_else(PoisonError::into_inner);
        result.ok_or_else(|| TimedOut::new(&state, limit))
    }

    async fn wait_async<T>(&self, mut found: impl FnMut(&State) -> Option<T>, limit: Duration) -> Result<T, TimedOut> {
        let mut changes = self.shared.changes.subscribe();
        let search = async {
            loop {
                if let Some(found) = found(&self.state()) {
                    return found;
                }
                changes.changed().await.expect("the sender lives in self");
            }
        };
        tokio::time::timeout(limit, search).await.map_err(|_| TimedOut::new(&self.state(), limit))
    }

    /// Waits until a fault is no longer in force.
    pub(super) async fn until_removed(&self, fault: FaultId) {
        let mut changes = self.shared.changes.subscribe();
        while self.state().faults.is_in_force(fault) {
            changes.changed().await.expect("the sender lives in self");
        }
    }

    /// Whether requests are recorded.
    pub(super) fn records(&self) -> bool {
        self.shared.record
    }

    /// What concerns connections, and its changes.
    pub(super) fn settings(&self) -> watch::Receiver<Settings> {
        self.shared.settings.subscribe()
    }

    /// Reads the state. The lock is never held across an `await`.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // A test's closure may have panicked under the lock; the state is whole at every such point.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state and wakes whoever waits for a change.
    pub(super) fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.state());
        self.shared.changed.notify_all();
        self.shared.changes.send_replace(());
        result
    }
}

impl TimedOut {
    fn new(state: &State, limit: Duration) -> Self {
        let seen = format!("{:?}; requests: {:#?}", state.counters, state.log.received());
        Self { limit, seen }
    }
}

/// So many random letters and digits, from the thread's generator: good for tests and the demo, not for real secrets.
pub(super) fn alphanumeric(length: usize) -> String {
    std::iter::repeat_with(fastrand::alphanumeric).take(length).collect()
}

/// A random identifier in the usual form (RFC 9562, version 4).
pub(super) fn uuid() -> String {
    let bits = fastrand::u128(..) & !(0xf000_c000 << 48) | (0x4000_8000 << 48);
    let hex = format!("{bits:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_have_the_form_of_a_random_uuid() {
        for _ in 0..100 {
            let id = uuid();
            let parts: Vec<usize> = id.split('-').map(str::len).collect();
            assert_eq!(parts, [8, 4, 4, 4, 12], "{id}");
            assert!(id[14..].starts_with('4') && matches!(id.as_bytes()[19], b'8' | b'9' | b'a' | b'b'), "{id}");
        }
    }
}
