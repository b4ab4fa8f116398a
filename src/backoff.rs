//! Exponential backoff with full jitter: each delay is drawn evenly between nothing and a limit that doubles. Proxies that failed together do not
//! come back together (AWS Builders' Library, "Timeouts, retries and backoff with jitter").

use std::time::Duration;

/// A range of delays, valid by construction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    first: Duration,
    most: Duration,
}

impl Backoff {
    /// Delays up to `first` after the first failure, up to twice that after the second, and never more than `most`. Nothing where `first` is zero or
    /// greater than `most`.
    pub const fn new(first: Duration, most: Duration) -> Option<Self> {
        if first.is_zero() || first.as_nanos() > most.as_nanos() { None } else { Some(Self { first, most }) }
    }

    /// The delay after so many failures in a row, at least one; `fraction` in `0.0..1.0` is the jitter. At least a tenth of the first limit, so
    /// that even the luckiest draw is a pause.
    pub fn delay(&self, failures: u32, fraction: f64) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        let limit = self.first.saturating_mul(1 << doublings).min(self.most);
        limit.mul_f64(fraction.clamp(0.0, 1.0)).max(self.first / 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// C01: 0.5 s to 60 s, doubling, jittered, and no overflow however long the outage.
    #[test]
    fn c01_doubles_up_to_the_most() {
        let backoff = Backoff::new(SECOND / 2, 60 * SECOND).unwrap();
        let limits: Vec<_> = (1..=9).map(|failures| backoff.delay(failures, 1.0).as_secs_f64()).collect();
        assert_eq!(limits, [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]);
        assert_eq!(backoff.delay(u32::MAX, 1.0), 60 * SECOND);
        assert_eq!(backoff.delay(3, 0.5), SECOND);
        assert_eq!(backoff.delay(7, 0.0), SECOND / 20, "even the luckiest draw pauses");
        assert_eq!(backoff.delay(0, 1.0), SECOND / 2);
    }

    #[test]
    fn impossible_ranges_do_not_exist() {
        assert_eq!(Backoff::new(Duration::ZERO, SECOND), None);
        assert_eq!(Backoff::new(2 * SECOND, SECOND), None);
    }
}
