//! How long to wait after failures: exponential, with full jitter, valid by construction.
//!
//! Full jitter draws from the whole range up to the ceiling, so that a fleet that failed at one moment does not come back at one moment
//! (AWS Architecture Blog, "Exponential Backoff And Jitter"). The random source is handed in: the same seed gives the same delays.

use std::time::Duration;

/// A lower and an upper ceiling, the lower one not zero and not above the upper one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    min: Duration,
    max: Duration,
}

/// Why two durations make no [`Backoff`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidBackoff {
    /// Retries would follow each other without a pause.
    #[error("the shortest backoff is zero")]
    ZeroMin,
    /// There is nothing between them.
    #[error("the shortest backoff is longer than the longest")]
    MinAboveMax,
}

impl Backoff {
    /// Between mints that failed without leaving a token behind: 0.5 s to 60 s (contract section 5, "Mint").
    pub const MINT: Self = match Self::new(Duration::from_millis(500), Duration::from_mins(1)) {
        Ok(backoff) => backoff,
        Err(_) => panic!("half a second is more than zero and less than a minute"),
    };

    /// `min` is the ceiling after the first failure; it doubles with each further one until it reaches `max`.
    pub const fn new(min: Duration, max: Duration) -> Result<Self, InvalidBackoff> {
        if min.is_zero() {
            return Err(InvalidBackoff::ZeroMin);
        }
        if min.as_nanos() > max.as_nanos() {
            return Err(InvalidBackoff::MinAboveMax);
        }
        Ok(Self { min, max })
    }

    /// The longest delay after `failures` failures in a row; zero failures count as one.
    pub fn ceiling(self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1);
        let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
        self.min.saturating_mul(factor).min(self.max)
    }

    /// A delay after `failures` failures in a row, drawn evenly from (0, [`ceiling`](Self::ceiling)]; never zero.
    pub fn delay(self, failures: u32, random: &mut fastrand::Rng) -> Duration {
        let ceiling = self.ceiling(failures);
        // `f64()` is in [0, 1): turned round, zero is the one that cannot come.
        ceiling.mul_f64(1.0 - random.f64()).clamp(Duration::from_nanos(1), ceiling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sensible_bounds_make_a_backoff() {
        let second = Duration::from_secs(1);
        let rows = [
            (Duration::ZERO, second, Some(InvalidBackoff::ZeroMin)),
            (second, second / 2, Some(InvalidBackoff::MinAboveMax)),
            (second, second, None),
            (second, Duration::MAX, None),
        ];
        for (min, max, expected) in rows {
            assert_eq!(Backoff::new(min, max).err(), expected, "{min:?} to {max:?}");
        }
    }

    #[test]
    fn ceilings_double_up_to_the_longest_and_never_overflow() {
        let rows = [(0, 500), (1, 500), (2, 1_000), (3, 2_000), (7, 32_000), (8, 60_000), (9, 60_000), (33, 60_000), (u32::MAX, 60_000)];
        for (failures, milliseconds) in rows {
            assert_eq!(Backoff::MINT.ceiling(failures), Duration::from_millis(milliseconds), "after {failures} failures");
        }
        let endless = Backoff::new(Duration::from_secs(1), Duration::MAX).unwrap();
        assert_eq!(endless.ceiling(u32::MAX), Duration::from_secs(u64::from(u32::MAX)));
    }

    /// C01, C09: full jitter uses the whole range, ends included as far as they can be drawn, and nothing outside it.
    #[test]
    fn c01_c09_delays_spread_over_the_whole_range() {
        let mut random = fastrand::Rng::with_seed(7);
        for failures in [1, 5, 20] {
            let ceiling = Backoff::MINT.ceiling(failures);
            let delays: Vec<_> = (0..1000).map(|_| Backoff::MINT.delay(failures, &mut random)).collect();
            assert!(delays.iter().all(|delay| *delay > Duration::ZERO && *delay <= ceiling));
            assert!(delays.iter().any(|delay| *delay < ceiling / 20) && delays.iter().any(|delay| *delay > ceiling * 19 / 20));
        }
    }

    #[test]
    fn one_seed_gives_one_sequence() {
        let delays = |seed| {
            let mut random = fastrand::Rng::with_seed(seed);
            (1..10).map(|failures| Backoff::MINT.delay(failures, &mut random)).collect::<Vec<_>>()
        };
        assert_eq!(delays(1), delays(1));
        assert_ne!(delays(1), delays(2));
    }
}
