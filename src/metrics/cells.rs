//! What a metric is made of: counters by label value and a histogram, as plain atomics of a fixed size.
//!
//! All are `Relaxed`: each number stands for itself, and a scrape that sees one a moment before another is as good as one a moment later.
//! `prometheus-client`'s own `Family` is not used, since it takes a lock for each lookup; this program knows all label values beforehand.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// The label value of what no list names.
pub(super) const OTHER: &str = "other";

/// A counter per value of one label. The values are fixed, so that each exists with 0 from the start and alerts can be written on it.
#[derive(Debug)]
pub(super) struct Labelled<const N: usize> {
    values: &'static [&'static str; N],
    counts: [AtomicU64; N],
    /// Values that are not in the list: a mistake in this program, which must cost neither a panic nor the count.
    other: AtomicU64,
}

impl<const N: usize> Labelled<N> {
    pub(super) fn new(values: &'static [&'static str; N]) -> Self {
        Self { values, counts: [const { AtomicU64::new(0) }; N], other: AtomicU64::new(0) }
    }

    /// Counts one for `value`. The lists have at most two dozen entries and none is touched by a request that simply succeeds, hence no hashing.
    pub(super) fn increment(&self, value: &str) {
        let position = self.values.iter().position(|known| *known == value);
        position.map_or(&self.other, |index| &self.counts[index]).fetch_add(1, Relaxed);
    }

    /// Every value with its count; `other` only where something was counted there.
    pub(super) fn read(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let other = self.other.load(Relaxed);
        let known = self.values.iter().zip(&self.counts).map(|(value, count)| (*value, count.load(Relaxed)));
        known.chain((other > 0).then_some((OTHER, other)))
    }
}

/// A histogram of durations with fixed bounds in seconds, ascending; one more bucket holds what is longer than all.
#[derive(Debug)]
pub(super) struct Histogram<const N: usize> {
    bounds: &'static [f64; N],
    buckets: [AtomicU64; N],
    longer: AtomicU64,
    /// Nanoseconds: exact to add up, and good for 584 years.
    sum: AtomicU64,
}

impl<const N: usize> Histogram<N> {
    pub(super) fn new(bounds: &'static [f64; N]) -> Self {
        Self { bounds, buckets: [const { AtomicU64::new(0) }; N], longer: AtomicU64::new(0), sum: AtomicU64::new(0) }
    }

    pub(super) fn observe(&self, duration: Duration) {
        let seconds = duration.as_secs_f64();
        let bucket = self.bounds.iter().position(|bound| seconds <= *bound);
        bucket.map_or(&self.longer, |index| &self.buckets[index]).fetch_add(1, Relaxed);
        self.sum.fetch_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX), Relaxed);
    }

    pub(super) fn read(&self) -> HistogramSnapshot {
        let finite = self.bounds.iter().copied().zip(self.buckets.iter().map(|count| count.load(Relaxed)));
        HistogramSnapshot {
            buckets: finite.chain([(f64::INFINITY, self.longer.load(Relaxed))]).collect(),
            sum: Duration::from_nanos(self.sum.load(Relaxed)),
        }
    }
}

/// What a [`Histogram`] held when it was read. Several with the same bounds add up.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct HistogramSnapshot {
    /// Upper bound in seconds, inclusive, and how many fell between it and the bound before: not cumulative.
    pub(super) buckets: Vec<(f64, u64)>,
    pub(super) sum: Duration,
}

impl HistogramSnapshot {
    pub(super) fn count(&self) -> u64 {
        self.buckets.iter().map(|(_, count)| count).sum()
    }

    pub(super) fn add(mut self, other: &Self) -> Self {
        for (mine, theirs) in self.buckets.iter_mut().zip(&other.buckets) {
            mine.1 += theirs.1;
        }
        self.sum += other.sum;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_by_value_and_keeps_what_no_list_names() {
        let labelled = Labelled::new(&["a", "b"]);
        labelled.increment("b");
        labelled.increment("b");
        assert_eq!(labelled.read().collect::<Vec<_>>(), [("a", 0), ("b", 2)]);
        labelled.increment("c");
        assert_eq!(labelled.read().collect::<Vec<_>>(), [("a", 0), ("b", 2), (OTHER, 1)]);
    }

    #[test]
    fn a_bound_is_inclusive_and_nothing_is_too_long() {
        let histogram = Histogram::new(&[0.001, 1.0]);
        for millis in [0, 1, 2, 1000, 1001, 1_000_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let snapshot = histogram.read();
        assert_eq!(snapshot.buckets, [(0.001, 2), (1.0, 2), (f64::INFINITY, 2)]);
        assert_eq!(snapshot.sum, Duration::from_millis(1_002_004));

        let twice = snapshot.clone().add(&snapshot);
        assert_eq!(twice.buckets, [(0.001, 4), (1.0, 4), (f64::INFINITY, 4)]);
        assert_eq!((twice.count(), twice.sum), (12, Duration::from_millis(2_004_008)));
    }
}
