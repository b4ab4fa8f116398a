//! When the next mint may be sent: the log of those that may have left a token behind, and what the last failure asks for.
//!
//! Two things slow a mint down, and they are kept apart because they end differently. The [`MintLog`] protects the customer's account: it counts
//! attempts that may have left a token behind, whatever caused them, and nothing empties it but time. [`Pacing`] adds courtesy towards the upstream
//! (backoff, `retry-after`, rejected credentials), and new credentials start it afresh.
//!
//! Instants are only ever added to: each entry is kept as the instant at which it *stops* to matter, so that no arithmetic reaches before the clock's
//! start. Ages that come from a wall clock (the token store) are clamped on the way in.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

use crate::backoff::Backoff;

/// The window of `token.mint_budget`.
pub const BUDGET_WINDOW: Duration = Duration::from_hours(1);

/// `retry-after` beyond this is cut, and so is the jitter on top of it (contract §5, "Mint").
const MAX_RETRY_AFTER: Duration = Duration::from_mins(15);
/// The shortest pause that a `retry-after` can ask for: 0 would be a busy loop.
const MIN_RETRY_AFTER: Duration = Duration::from_secs(1);
/// After a first rejection of the credentials, one confirming try.
const CONFIRM_AFTER: Duration = Duration::from_mins(1);
/// After the second, and all others, until the credentials change: slow enough not to lock the account.
const REJECTED_RETRY: Duration = Duration::from_hours(1);

/// A random number in 0..=1, made by the caller: nothing in this module draws one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Jitter(f64);

impl Jitter {
    /// Cuts `value` to 0..=1; what is not a number becomes 1, the longest pause.
    pub fn new(value: f64) -> Self {
        Self(if value.is_nan() { 1.0 } else { value.clamp(0.0, 1.0) })
    }

    /// Between 0 and `whole`.
    fn of(self, whole: Duration) -> Duration {
        whole.mul_f64(self.0)
    }
}

/// `token.min_mint_interval` and `token.mint_budget`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MintLimits {
    /// Between two counted attempts; zero for none.
    pub interval: Duration,
    /// Counted attempts within any [`BUDGET_WINDOW`]; with 0 nothing is ever minted.
    pub budget: u32,
}

/// The attempts that may have left a token behind, as far back as they matter.
#[derive(Debug, Clone)]
pub struct MintLog {
    limits: MintLimits,
    /// When each attempt leaves the budget's window; ascending.
    leaves: VecDeque<Instant>,
    interval_ends: Option<Instant>,
}

impl MintLog {
    /// Nothing was minted yet.
    pub fn new(limits: MintLimits) -> Self {
        Self { limits, leaves: VecDeque::new(), interval_ends: None }
    }

    /// What a store remembers: how long ago, at `now`, each attempt was made. An attempt from the future (the wall clock was set back) has the age zero.
    pub fn from_ages(limits: MintLimits, ages: &[Duration], now: Instant) -> Self {
        let mut leaves: Vec<_> = ages.iter().map(|age| now + BUDGET_WINDOW.saturating_sub(*age)).collect();
        leaves.sort_unstable();
        let interval_ends = ages.iter().min().map(|age| now + limits.interval.saturating_sub(*age));
        Self { limits, leaves: leaves.into(), interval_ends }
    }

    /// An attempt that may have left a token behind ended at `now`.
    pub fn record(&mut self, now: Instant) {
        while self.leaves.front().is_some_and(|leaves| *leaves <= now) {
            self.leaves.pop_front();
        }
        self.leaves.push_back(now + BUDGET_WINDOW);
        self.interval_ends = Some(now + self.limits.interval);
    }

    /// When the interval since the last attempt ends, or `now` where it has.
    pub fn interval_allows(&self, now: Instant) -> Instant {
        self.interval_ends.map_or(now, |ends| ends.max(now))
    }

    /// When the budget has room for one more, or `now` where it has. With a budget of 0 that never comes.
    pub fn budget_allows(&self, now: Instant) -> Instant {
        let counted = self.leaves.iter().filter(|leaves| **leaves > now);
        match counted.clone().count().checked_sub(self.limits.budget as usize) {
            None => now,
            Some(surplus) => counted.copied().nth(surplus).unwrap_or(now + BUDGET_WINDOW),
        }
    }

    /// When the next attempt leaves the window.
    pub fn grows(&self, now: Instant) -> Option<Instant> {
        self.leaves.iter().find(|leaves| **leaves > now).copied()
    }

    /// How many attempts the budget leaves at `now`.
    pub fn left(&self, now: Instant) -> u32 {
        let counted = self.leaves.iter().filter(|leaves| **leaves > now).count();
        self.limits.budget.saturating_sub(u32::try_from(counted).unwrap_or(u32::MAX))
    }
}

/// What holds a mint back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeldBackBy {
    /// Backoff or `retry-after` of a failed attempt.
    Failure,
    /// The upstream rejected the credentials.
    Rejection,
    /// `token.min_mint_interval`.
    Interval,
    /// `token.mint_budget`.
    Budget,
}

/// The log, and what the last failure asks for.
#[derive(Debug, Clone)]
pub(super) struct Pacing {
    pub(super) log: MintLog,
    /// The next counted attempt is the first one with new credentials: the interval does not hold it back, the budget does.
    exempt: bool,
    /// Failures in a row.
    failures: u32,
    /// Rejections of these credentials, with no success in between.
    rejections: u32,
    not_before: Option<Instant>,
}

impl Pacing {
    pub(super) fn new(limits: MintLimits) -> Self {
        Self { log: MintLog::new(limits), exempt: false, failures: 0, rejections: 0, not_before: None }
    }

    /// Other credentials came: what the old ones met with no longer counts. `exempt`: a mint is needed for them.
    pub(super) fn start_afresh(&mut self, exempt: bool) {
        *self = Self { log: self.log.clone(), exempt, failures: 0, rejections: 0, not_before: None };
    }

    /// A token was obtained with the credentials in force.
    pub(super) fn succeeded(&mut self) {
        self.start_afresh(false);
    }

    /// The exemption of new credentials is used up.
    pub(super) fn spend_exemption(&mut self) {
        self.exempt = false;
    }

    /// Backs off after a failure: exponentially with full jitter between its bounds, or as long as the upstream asked for and a little more, so that
    /// a fleet which was told the same number does not come back at once.
    pub(super) fn failed(&mut self, now: Instant, retry_after: Option<Duration>, jitter: Jitter) {
        self.failures = self.failures.saturating_add(1);
        // No pause is shorter than the first ceiling, so the range to draw from begins with the second.
        let (least, most) = (Backoff::MINT.ceiling(1), Backoff::MINT.ceiling(self.failures.saturating_add(1)));
        let backoff = least + jitter.of(most.saturating_sub(least));
        let asked = retry_after.map(|asked| {
            let asked = asked.clamp(MIN_RETRY_AFTER, MAX_RETRY_AFTER);
            (asked + jitter.of(asked / 10)).min(MAX_RETRY_AFTER)
        });
        self.not_before = Some(now + asked.unwrap_or(backoff).max(backoff));
    }

    /// The upstream said that the credentials are wrong: one confirming try, then hourly.
    pub(super) fn rejected(&mut self, now: Instant) {
        self.rejections = self.rejections.saturating_add(1);
        self.failures = 0;
        self.not_before = Some(now + if self.rejections == 1 { CONFIRM_AFTER } else { REJECTED_RETRY });
    }

    /// Another process that shares the store used up the interval or the budget.
    pub(super) fn defer(&mut self, until: Instant) {
        self.not_before = Some(until);
    }

    /// Whether the last answer that concerned these credentials was a rejection.
    pub(super) fn is_rejected(&self) -> bool {
        self.rejections > 0
    }

    /// When a mint may be sent; `now` where nothing holds it back.
    pub(super) fn mint_allowed(&self, now: Instant) -> Instant {
        self.constraints(now).map(|(at, _)| at).into_iter().fold(now, Instant::max)
    }

    /// When the upstream may be asked for something that leaves no token behind: the log has no say.
    pub(super) fn try_allowed(&self, now: Instant) -> Instant {
        self.not_before.map_or(now, |at| at.max(now))
    }

    /// What holds a mint back longest, if anything.
    pub(super) fn held_back_by(&self, now: Instant) -> Option<HeldBackBy> {
        self.constraints(now).into_iter().filter(|(at, _)| *at > now).max_by_key(|(at, _)| *at).map(|(_, by)| by)
    }

    fn constraints(&self, now: Instant) -> [(Instant, HeldBackBy); 3] {
        let failure = if self.is_rejected() { HeldBackBy::Rejection } else { HeldBackBy::Failure };
        let interval = if self.exempt { now } else { self.log.interval_allows(now) };
        [(self.try_allowed(now), failure), (interval, HeldBackBy::Interval), (self.log.budget_allows(now), HeldBackBy::Budget)]
    }

    /// Whether `token.min_mint_interval` has a say in the next attempt.
    pub(super) fn interval_applies(&self) -> bool {
        !self.exempt
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: MintLimits = MintLimits { interval: Duration::from_mins(1), budget: 2 };
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn the_budget_is_a_sliding_window() {
        let start = Instant::now();
        let mut log = MintLog::new(LIMITS);
        assert_eq!((log.budget_allows(start), log.interval_allows(start), log.left(start)), (start, start, 2));

        log.record(start);
        let later = start + 100 * SECOND;
        assert_eq!(log.interval_allows(start + SECOND), start + 60 * SECOND);
        assert_eq!((log.budget_allows(later), log.interval_allows(later), log.left(later)), (later, later, 1));

        log.record(later);
        let full = later + SECOND;
        assert_eq!((log.budget_allows(full), log.left(full)), (start + BUDGET_WINDOW, 0), "the first of the two leaves first");
        let after = start + BUDGET_WINDOW;
        assert_eq!((log.budget_allows(after), log.left(after)), (after, 1));
    }

    #[test]
    fn a_budget_of_zero_never_allows() {
        let now = Instant::now();
        let log = MintLog::new(MintLimits { budget: 0, ..LIMITS });
        assert!(log.budget_allows(now) > now && log.budget_allows(now + 10 * BUDGET_WINDOW) > now + 10 * BUDGET_WINDOW);
    }

    /// C26: ages from a wall clock that jumped, and more of them than the budget.
    #[test]
    fn c26_remembers_what_a_store_tells() {
        let now = Instant::now();
        let age = |seconds| Duration::from_secs(seconds);
        for (ages, left, budget_in, interval_in) in [
            (vec![], 2, 0, 0),
            (vec![age(3600), age(90_000_000)], 2, 0, 0),
            (vec![age(10)], 1, 0, 50),
            (vec![age(0), age(3000)], 0, 600, 60),
            (vec![age(1), age(2), age(3)], 0, 3598, 59),
        ] {
            let log = MintLog::from_ages(LIMITS, &ages, now);
            assert_eq!(log.left(now), left, "{ages:?}");
            assert_eq!(log.budget_allows(now), now + age(budget_in), "{ages:?}");
            assert_eq!(log.interval_allows(now), now + age(interval_in), "{ages:?}");
        }
    }

    /// C01: 0.5 s to 60 s, for ever.
    #[test]
    fn c01_backs_off_between_its_bounds() {
        let now = Instant::now();
        let mut pacing = Pacing::new(LIMITS);
        let mut ceilings = Vec::new();
        for _ in 0..100 {
            let mut least = pacing.clone();
            least.failed(now, None, Jitter::new(0.0));
            assert_eq!(least.mint_allowed(now), now + SECOND / 2);
            pacing.failed(now, None, Jitter::new(1.0));
            ceilings.push((pacing.mint_allowed(now) - now).as_secs());
        }
        assert_eq!(ceilings[..8], [1, 2, 4, 8, 16, 32, 60, 60]);
        assert!(ceilings[8..].iter().all(|ceiling| *ceiling == 60));
        pacing.succeeded();
        assert_eq!(pacing.mint_allowed(now), now);
    }

    /// C05: `retry-after` is honoured between 1 s and 15 min, jitter included, and never shortens the backoff.
    #[test]
    fn c05_honours_retry_after() {
        let now = Instant::now();
        let rows = [(0, 1000, 1100), (5, 5000, 5500), (850, 850_000, 900_000), (900, 900_000, 900_000), (315_360_000, 900_000, 900_000)];
        for (asked, least, most) in rows {
            for (jitter, expected) in [(0.0, least), (1.0, most)] {
                let mut pacing = Pacing::new(LIMITS);
                pacing.failed(now, Some(Duration::from_secs(asked)), Jitter::new(jitter));
                assert_eq!(pacing.mint_allowed(now), now + Duration::from_millis(expected), "{asked} s, jitter {jitter}");
            }
        }
        let mut pacing = Pacing::new(LIMITS);
        (0..20).for_each(|_| pacing.failed(now, Some(SECOND), Jitter::new(1.0)));
        assert_eq!(pacing.mint_allowed(now), now + 60 * SECOND);
    }

    /// C04: one confirming try after a minute, then hourly, at once with other credentials.
    #[test]
    fn c04_rejected_credentials_are_tried_hourly() {
        let now = Instant::now();
        let mut pacing = Pacing::new(LIMITS);
        for minutes in [1, 60, 60, 60] {
            pacing.rejected(now);
            assert_eq!(pacing.mint_allowed(now), now + Duration::from_mins(minutes));
            assert_eq!(pacing.held_back_by(now), Some(HeldBackBy::Rejection));
        }
        pacing.start_afresh(true);
        assert_eq!((pacing.mint_allowed(now), pacing.is_rejected()), (now, false));
    }

    #[test]
    fn new_credentials_are_exempt_from_the_interval_but_not_from_the_budget() {
        let now = Instant::now();
        let mut pacing = Pacing::new(LIMITS);
        pacing.log.record(now);
        assert_eq!(pacing.held_back_by(now), Some(HeldBackBy::Interval));
        pacing.start_afresh(true);
        assert_eq!(pacing.held_back_by(now), None);
        pacing.log.record(now);
        assert_eq!(pacing.held_back_by(now), Some(HeldBackBy::Budget));
    }
}
