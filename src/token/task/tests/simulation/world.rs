//! What all processes of one run share: the plan, the clocks, the log, and what was found to break a promise.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use fastrand::Rng;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::api::Api;
use super::disk::Disk;
use super::journal;
use super::judge::Judge;
use super::process::Life;

/// What is the same for a whole run.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) processes: usize,
    /// All processes share one store that outlives them; else each has its memory alone.
    pub(super) shared_store: bool,
    pub(super) min_mint_interval: Duration,
    pub(super) mint_budget: u32,
    pub(super) max_age: Option<Duration>,
    pub(super) can_revoke: bool,
    /// Between two requests of one process, on average.
    pub(super) between_requests: Duration,
    pub(super) happenings: usize,
}

impl Plan {
    pub(super) fn draw(rng: &mut Rng) -> Self {
        let shared_store = rng.u8(0..3) > 0;
        Self {
            processes: if shared_store { rng.usize(1..4) } else { 1 },
            shared_store,
            min_mint_interval: pick(rng, &[Duration::from_mins(1), Duration::from_mins(1), Duration::from_mins(10), Duration::ZERO]),
            mint_budget: pick(rng, &[6, 6, 3, 1]),
            max_age: pick(rng, &[None, None, None, Some(Duration::from_mins(30))]),
            can_revoke: rng.u8(0..4) == 0,
            between_requests: pick(rng, &[Duration::from_secs(15), Duration::from_mins(1), Duration::from_mins(5)]),
            happenings: rng.usize(20..60),
        }
    }
}

pub(super) fn pick<T: Clone>(rng: &mut Rng, from: &[T]) -> T {
    from[rng.usize(..from.len())].clone()
}

/// A duration in milliseconds from this range.
pub(super) fn ms(rng: &mut Rng, range: std::ops::Range<u64>) -> Duration {
    Duration::from_millis(rng.u64(range))
}

/// An instant in the life of an operation at which a process can be killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Point {
    /// The new file is written, but not yet in its place.
    BeforeRename,
    /// It is in its place, and the process does not know yet.
    AfterRename,
    /// The mint is on its way.
    MintSent,
    /// The upstream has made the token, and the reply is on its way.
    ReplyUnderWay,
    /// The upstream is asked about a token.
    ProbeSent,
}

impl Point {
    pub(super) const ALL: [Self; 5] = [Self::BeforeRename, Self::AfterRename, Self::MintSent, Self::ReplyUnderWay, Self::ProbeSent];
}

pub(super) struct World {
    pub(super) plan: Plan,
    pub(super) api: Api,
    pub(super) disk: Disk,
    pub(super) judge: Judge,
    started: Instant,
    /// How far the wall clock of each process's machine is off, in seconds.
    off: RefCell<Vec<i64>>,
    armed: Cell<Option<(usize, Point)>>,
    killed: mpsc::UnboundedSender<usize>,
    violation: RefCell<Option<String>>,
    counts: RefCell<BTreeMap<&'static str, u64>>,
}

impl World {
    /// The receiver is told which process is to be killed now.
    pub(super) fn new(plan: Plan) -> (Self, mpsc::UnboundedReceiver<usize>) {
        let (killed, to_kill) = mpsc::unbounded_channel();
        let world = Self {
            api: Api::new(plan.processes),
            disk: Disk::default(),
            judge: Judge::default(),
            started: Instant::now(),
            off: RefCell::new(vec![0; plan.processes]),
            armed: Cell::new(None),
            killed,
            violation: RefCell::default(),
            counts: RefCell::default(),
            plan,
        };
        (world, to_kill)
    }

    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// The time of day on the machine of `process`.
    pub(super) fn wall(&self, process: usize) -> SystemTime {
        let true_time = SystemTime::UNIX_EPOCH + Duration::from_hours(500_000) + self.started.elapsed();
        let off = self.off.borrow()[process];
        if off < 0 { true_time - Duration::from_secs(off.unsigned_abs()) } else { true_time + Duration::from_secs(off.unsigned_abs()) }
    }

    pub(super) fn set_off(&self, process: usize, seconds: i64) {
        self.off.borrow_mut()[process] = seconds;
    }

    /// A line for whoever reads a failed run; what comes after the first broken promise is noise.
    pub(super) fn note(&self, line: &str) {
        if self.violation.borrow().is_none() {
            journal::note(line);
        }
    }

    /// The first one ends the run.
    pub(super) fn violated(&self, promise: &str) {
        self.note(&format!("VIOLATED: {promise}"));
        self.violation.borrow_mut().get_or_insert_with(|| promise.to_owned());
    }

    pub(super) fn violation(&self) -> Option<String> {
        self.violation.borrow().clone()
    }

    /// For the proof that the runs go where they should.
    pub(super) fn count(&self, what: &'static str) {
        *self.counts.borrow_mut().entry(what).or_default() += 1;
    }

    pub(super) fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.counts.borrow().clone()
    }

    /// Kills `process` as soon as it comes by `point`.
    pub(super) fn arm(&self, armed: Option<(usize, Point)>) {
        self.armed.set(armed);
    }

    /// The process comes by; if it is to be killed here, it does not get any further.
    pub(super) async fn pass(&self, life: &Life, point: Point) {
        if self.armed.get() == Some((life.process, point)) {
            self.armed.set(None);
            self.count("killed at a point");
            self.note(&format!("process {} is killed: {point:?}", life.process));
            let _ = self.killed.send(life.process); // else the run is over
            std::future::pending::<()>().await;
        }
    }
}
