//! What the control plane counts: the token's life and its credentials.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, SystemTime};

use http::StatusCode;

use super::cells::{Histogram, Labelled};

/// Values of the label `result` of `token_mints_total`: minted; refused with a 4xx or 3xx; not sent, or answered 408, 429 or 5xx; answered with
/// something unusable; sent, and the reply lost.
pub const MINT_RESULTS: [&str; 5] = ["success", "rejected", "failed", "invalid", "lost"];

/// Values of the label `result` of `token_probes_total`.
pub const PROBE_RESULTS: [&str; 3] = ["alive", "dead", "inconclusive"];

/// Values of the label `operation` of `token_store_errors_total`.
pub const STORE_OPERATIONS: [&str; 3] = ["read", "write", "lock"];

/// Values of the label `result` of `credentials_reloads_total`.
pub const RELOAD_RESULTS: [&str; 3] = ["changed", "unchanged", "failed"];

/// The statuses that reject a token (contract §5).
const REJECTIONS: [&str; 2] = ["401", "403"];

/// Up to twice the default of `token.mint_timeout`.
const MINT_SECONDS: [f64; 10] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0];

/// What the control plane counts. Written by the token task and its helpers, read when scraped.
#[derive(Debug)]
pub struct TokenMetrics {
    pub(super) mints: Labelled<{ MINT_RESULTS.len() }>,
    pub(super) mint_duration: Histogram<{ MINT_SECONDS.len() }>,
    generation: AtomicU64,
    /// Milliseconds since the epoch; 0 before the first token.
    created: AtomicU64,
    usable: AtomicBool,
    pub(super) rejections: Labelled<{ REJECTIONS.len() }>,
    pub(super) probes: Labelled<{ PROBE_RESULTS.len() }>,
    pub(super) store_errors: Labelled<{ STORE_OPERATIONS.len() }>,
    pub(super) reloads: Labelled<{ RELOAD_RESULTS.len() }>,
    pending_rejected: AtomicBool,
}

impl Default for TokenMetrics {
    fn default() -> Self {
        Self {
            mints: Labelled::new(&MINT_RESULTS),
            mint_duration: Histogram::new(&MINT_SECONDS),
            generation: AtomicU64::new(0),
            created: AtomicU64::new(0),
            usable: AtomicBool::new(false),
            rejections: Labelled::new(&REJECTIONS),
            probes: Labelled::new(&PROBE_RESULTS),
            store_errors: Labelled::new(&STORE_OPERATIONS),
            reloads: Labelled::new(&RELOAD_RESULTS),
            pending_rejected: AtomicBool::new(false),
        }
    }
}

impl TokenMetrics {
    /// A mint ended: one of [`MINT_RESULTS`]; `duration` from the decision to mint to the end of the reply, connecting included.
    pub fn mint(&self, result: &'static str, duration: Duration) {
        self.mints.increment(result);
        self.mint_duration.observe(duration);
    }

    /// Another token is in use, minted (or its file read) at `created`.
    pub fn generation(&self, generation: u64, created: SystemTime) {
        let since_epoch = created.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.generation.store(generation, Relaxed);
        self.created.store(u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    /// Whether a usable token is there.
    pub fn usable(&self, usable: bool) {
        self.usable.store(usable, Relaxed);
    }

    /// A request of the current generation was rejected with this status.
    pub fn rejection(&self, status: StatusCode) {
        self.rejections.increment(status.as_str());
    }

    /// A probe ended: one of [`PROBE_RESULTS`].
    pub fn probe(&self, result: &'static str) {
        self.probes.increment(result);
    }

    /// The token store failed at one of [`STORE_OPERATIONS`].
    pub fn store_error(&self, operation: &'static str) {
        self.store_errors.increment(operation);
    }

    /// Credentials were read again: one of [`RELOAD_RESULTS`].
    pub fn credentials_reload(&self, result: &'static str) {
        self.reloads.increment(result);
    }

    /// New credentials are there, but were rejected; or no longer.
    pub fn pending_rejected(&self, pending: bool) {
        self.pending_rejected.store(pending, Relaxed);
    }

    pub(super) fn current_generation(&self) -> u64 {
        self.generation.load(Relaxed)
    }

    /// Seconds since the epoch, to the millisecond; none before the first token.
    pub(super) fn created(&self) -> Option<f64> {
        let millis = self.created.load(Relaxed);
        (millis > 0).then(|| Duration::from_millis(millis).as_secs_f64())
    }

    pub(super) fn is_usable(&self) -> bool {
        self.usable.load(Relaxed)
    }

    pub(super) fn is_pending_rejected(&self) -> bool {
        self.pending_rejected.load(Relaxed)
    }
}
