//! The timeouts of one downstream connection, all on one timer.
//!
//! HTTP/1 carries one exchange at a time, so a connection is always in exactly one [`Phase`], and each phase has one limit. Whoever moves the
//! connection on stores the time in a cell; nothing is registered with the runtime's timer for a request. A [watchdog](Clock::watch) beside the
//! connection sleeps for the shortest limit at most, and looks.
//!
//! | phase | from | to | limit | at its end |
//! |---|---|---|---|---|
//! | `Idle` | the last byte moved | the next request's first byte | `listen.idle_timeout` | the connection is closed |
//! | `Head` | a head's first byte | its last | `listen.header_timeout`, a deadline | 408, closed |
//! | `Waiting` | the head | the request goes to the upstream | none here: token and connect have their own | |
//! | `Upload` | then | the request's last byte; each byte restarts it | `upstream.body_idle_timeout` | 408 or 504 |
//! | `Response` | then | the response head | `upstream.response_timeout`, a deadline | 504 |
//! | `Relay` | then | the response's last byte; each byte restarts it | `upstream.body_idle_timeout` | the connection is cut |

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};
use std::time::Duration;

use tokio::time::Instant;

/// Where a downstream connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Between two requests.
    Idle,
    /// A request head is arriving.
    Head,
    /// The proxy is busy with the request before it goes to the upstream.
    Waiting,
    /// The request is going to the upstream.
    Upload,
    /// The upstream owes the response head.
    Response,
    /// The response is going to the downstream.
    Relay,
}

/// One limit for each phase that has one.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Keep-alive without a request.
    pub idle: Duration,
    /// To receive a request head.
    pub head: Duration,
    /// No byte of a body moved.
    pub body_idle: Duration,
    /// From the request's end to the response head.
    pub response: Duration,
}

impl Limits {
    fn of(&self, phase: Phase) -> Option<Duration> {
        match phase {
            Phase::Idle => Some(self.idle),
            Phase::Head => Some(self.head),
            Phase::Waiting => None,
            Phase::Upload | Phase::Relay => Some(self.body_idle),
            Phase::Response => Some(self.response),
        }
    }

    /// The watchdog sleeps no longer, so that a phase which begins meanwhile cannot outlive its limit unseen.
    fn shortest(&self) -> Duration {
        self.idle.min(self.head).min(self.body_idle).min(self.response)
    }
}

/// The clock of one downstream connection; shared by its byte stream, its exchange and its watchdog, all on one thread.
#[derive(Debug)]
pub struct Clock {
    limits: Limits,
    phase: Cell<Phase>,
    since: Cell<Instant>,
    /// Whether the request's body has not been read to its end.
    upload_pending: Cell<bool>,
    /// Whether the request's body had trailers.
    trailers: Cell<bool>,
    /// Whether the upstream has taken all that the downstream sent so far and waits for more.
    starving: Cell<bool>,
    /// Whether the response under way has no end but the connection's.
    open_ended: Cell<bool>,
    expired: Cell<Option<Expired>>,
    waiter: RefCell<Option<Waker>>,
    turn: Cell<Turn>,
}

/// Whether the connection is being polled, and what was read from the system's clock since that began.
#[derive(Debug, Clone, Copy)]
enum Turn {
    Out,
    In(Option<Instant>),
}

/// Which limit of an exchange ran out, and whose fault it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expired {
    /// The downstream sent no byte of its body.
    Downstream,
    /// The upstream took no byte of the body.
    UpstreamRead,
    /// The upstream sent no response head.
    UpstreamResponse,
}

impl Clock {
    /// A connection that was just accepted: the first head is due within the header timeout, as nothing was ever sent on it.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            phase: Cell::new(Phase::Head),
            since: Cell::new(Instant::now()),
            upload_pending: Cell::new(false),
            trailers: Cell::new(false),
            starving: Cell::new(false),
            open_ended: Cell::new(false),
            expired: Cell::new(None),
            waiter: RefCell::new(None),
            turn: Cell::new(Turn::Out),
        }
    }

    /// Runs one poll of the connection, in which time stands still: several steps of an exchange happen in each, and one reading serves them all.
    pub(super) fn turn<T>(&self, poll: impl FnOnce() -> T) -> T {
        self.turn.set(Turn::In(None));
        let result = poll();
        self.turn.set(Turn::Out);
        result
    }

    /// The time. Within a poll of the connection always the same.
    pub fn now(&self) -> Instant {
        match self.turn.get() {
            Turn::Out => Instant::now(),
            Turn::In(Some(read)) => read,
            Turn::In(None) => {
                let now = Instant::now();
                self.turn.set(Turn::In(Some(now)));
                now
            }
        }
    }

    /// Where the connection stands.
    pub fn phase(&self) -> Phase {
        self.phase.get()
    }

    /// The exchange moves on.
    pub fn enter(&self, phase: Phase) {
        self.phase.set(phase);
        self.since.set(self.now());
    }

    /// A request head is complete; `has_body` where its body is still to be read.
    pub(super) fn begin(&self, has_body: bool) {
        self.phase.set(Phase::Waiting);
        self.upload_pending.set(has_body);
        self.trailers.set(false);
        self.expired.set(None);
    }

    /// The request goes to the upstream.
    pub fn send(&self) {
        self.enter(if self.upload_pending.get() { Phase::Upload } else { Phase::Response });
    }

    /// The request's body was polled: `starving` where the downstream has nothing more at the moment.
    pub fn uploading(&self, starving: bool) {
        self.starving.set(starving);
    }

    /// The request's body was read to its end.
    pub fn uploaded(&self) {
        self.upload_pending.set(false);
        if self.phase.get() == Phase::Upload {
            self.enter(Phase::Response);
        }
    }

    /// The request's body has trailers.
    pub fn trailers(&self) {
        self.trailers.set(true);
    }

    /// Whether another reader of a chunked request could find its end elsewhere. Hyper takes a bare LF among trailers for a part of them, RFC 9112
    /// section 2.2 allows to take it for the end of a line; and of chunks that were not read nobody knows.
    pub fn is_end_of_chunks_uncertain(&self) -> bool {
        self.upload_pending.get() || self.trailers.get()
    }

    /// Whether the request's body was not read to its end: what the downstream still sends must be drained before the connection closes, else a TCP
    /// reset could take the response with it (RFC 9112 section 9.6).
    pub fn is_upload_pending(&self) -> bool {
        self.upload_pending.get()
    }

    /// Says whether the response under way has bytes to come and no end but the connection's (HTTP/1.0 knows no chunks). Meanwhile an orderly close would
    /// make a whole of a part; only a reset tells (RFC 9112 section 8).
    pub fn set_open_ended(&self, open_ended: bool) {
        self.open_ended.set(open_ended);
    }

    /// See [`Clock::set_open_ended`].
    pub(super) fn is_open_ended(&self) -> bool {
        self.open_ended.get()
    }

    /// Bytes came from the downstream.
    pub(super) fn received(&self) {
        match self.phase.get() {
            Phase::Idle => self.enter(Phase::Head),
            Phase::Upload | Phase::Relay => self.since.set(self.now()),
            // Deadlines: bytes do not move them.
            Phase::Head | Phase::Waiting | Phase::Response => {}
        }
    }

    /// Bytes went to the downstream.
    pub(super) fn sent(&self) {
        if matches!(self.phase.get(), Phase::Relay | Phase::Idle) {
            self.since.set(self.now());
        }
    }

    /// Resolves when a limit of the exchange runs out ([`Phase::Upload`], [`Phase::Response`]). For one waiter at a time.
    pub async fn expired(&self) -> Expired {
        poll_fn(|cx| {
            if let Some(expired) = self.expired.take() {
                return Poll::Ready(expired);
            }
            let mut waiter = self.waiter.borrow_mut();
            if !waiter.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                *waiter = Some(cx.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    /// The watchdog: resolves with the phase whose limit ran out when the connection itself has to go. Tells the exchange where it is the one to end.
    pub(super) async fn watch(&self) -> Phase {
        let tick = self.limits.shortest();
        let sleep = tokio::time::sleep(tick);
        tokio::pin!(sleep);
        loop {
            let now = self.now();
            let phase = self.phase.get();
            let deadline = self.limits.of(phase).map(|limit| self.since.get() + limit);
            if deadline.is_some_and(|deadline| deadline <= now) {
                match phase {
                    Phase::Idle | Phase::Head | Phase::Waiting | Phase::Relay => return phase,
                    Phase::Upload if self.starving.get() => self.expire(Expired::Downstream),
                    Phase::Upload => self.expire(Expired::UpstreamRead),
                    Phase::Response => self.expire(Expired::UpstreamResponse),
                }
            }
            let wake = deadline.filter(|deadline| *deadline > now).map_or(now + tick, |deadline| deadline.min(now + tick));
            sleep.as_mut().reset(wake);
            sleep.as_mut().await;
        }
    }

    fn expire(&self, expired: Expired) {
        self.phase.set(Phase::Waiting);
        self.expired.set(Some(expired));
        if let Some(waiter) = self.waiter.borrow_mut().take() {
            waiter.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;

    use super::*;

    fn clock() -> Clock {
        let limits = Limits {
            idle: Duration::from_secs(75),
            head: Duration::from_secs(10),
            body_idle: Duration::from_mins(1),
            response: Duration::from_mins(2),
        };
        Clock::new(limits)
    }

    /// Runs the watchdog for `seconds` and tells how it ended, if it did.
    async fn after(clock: &Clock, seconds: u64) -> Option<Phase> {
        tokio::time::timeout(Duration::from_secs(seconds), clock.watch()).await.ok()
    }

    /// B09: a connection that sends nothing, or a head byte by byte, ends at the header timeout.
    #[tokio::test(start_paused = true)]
    async fn b09_a_head_has_a_deadline_that_bytes_do_not_move() {
        let clock = clock();
        assert_eq!(after(&clock, 9).await, None);
        clock.received();
        assert_eq!(after(&clock, 2).await, Some(Phase::Head));
    }

    /// B12: idle connections end, and a byte of a new head ends the idling.
    #[tokio::test(start_paused = true)]
    async fn b12_idle_ends_at_the_idle_timeout_and_a_byte_begins_a_head() {
        let clock = clock();
        clock.enter(Phase::Idle);
        assert_eq!(after(&clock, 74).await, None);
        clock.received();
        assert_eq!(clock.phase(), Phase::Head);
        assert_eq!(after(&clock, 9).await, None);
        assert_eq!(after(&clock, 2).await, Some(Phase::Head));
        clock.enter(Phase::Idle);
        assert_eq!(after(&clock, 76).await, Some(Phase::Idle));
    }

    /// B10, D26: an upload that stands still is told to the exchange, with whose fault it is; bytes keep it alive.
    #[tokio::test(start_paused = true)]
    async fn b10_an_upload_expires_only_while_no_byte_moves() {
        for (starving, expected) in [(true, Expired::Downstream), (false, Expired::UpstreamRead)] {
            let clock = clock();
            clock.begin(true);
            clock.send();
            clock.uploading(starving);
            assert_eq!(after(&clock, 59).await, None);
            clock.received();
            assert_eq!(after(&clock, 59).await, None);
            let mut expired = Box::pin(clock.expired());
            assert!(poll!(expired.as_mut()).is_pending());
            assert_eq!(after(&clock, 2).await, None, "the exchange ends, not the connection");
            assert_eq!(expired.await, expected);
        }
    }

    /// D20: the response head is due within the response timeout, counted from the request's end.
    #[tokio::test(start_paused = true)]
    async fn d20_the_response_deadline_starts_at_the_requests_end() {
        let clock = clock();
        clock.begin(true);
        clock.send();
        assert_eq!(after(&clock, 50).await, None);
        clock.uploaded();
        assert_eq!(after(&clock, 119).await, None);
        assert!(clock.expired.take().is_none());
        assert_eq!(after(&clock, 2).await, None);
        assert_eq!(clock.expired().await, Expired::UpstreamResponse);
    }

    /// B11, D21: a relay that stands still cuts the connection; bytes keep it alive for ever.
    #[tokio::test(start_paused = true)]
    async fn d21_a_relay_expires_only_while_no_byte_moves() {
        let clock = clock();
        clock.enter(Phase::Relay);
        for _ in 0..10 {
            assert_eq!(after(&clock, 59).await, None);
            clock.sent();
        }
        assert_eq!(after(&clock, 61).await, Some(Phase::Relay));
    }

    /// The proxy's own waiting (token, connect) has limits of its own.
    #[tokio::test(start_paused = true)]
    async fn waiting_has_no_limit_here() {
        let clock = clock();
        clock.begin(false);
        assert_eq!(after(&clock, 3600).await, None);
    }
}
