//! The promises of contract §5, judged by what the world saw and by nothing that the program keeps.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

use super::disk::is_near;
use super::journal;
use super::process::{Content, Life};
use super::world::World;
use crate::token::mint::{Outcome, ProbeOutcome};

/// The window of `token.mint_budget`.
const HOUR: Duration = Duration::from_hours(1);
/// An attempt is written down before it is sent, by so much at most on the slowest disk here. Only those who learn of it from the store go by that.
const WRITTEN_BEFORE: Duration = Duration::from_secs(4);
/// The clock of timers has no finer steps.
const TICK: Duration = Duration::from_millis(2);
/// `retry-after` is honoured up to this.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(15);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    InFlight,
    /// It may have left a token behind.
    Counted,
    /// It certainly left none.
    Free,
    /// Its process was killed: it may have left a token behind.
    CutOff,
}

/// A mint that was begun.
#[derive(Debug)]
struct Attempt {
    name: String,
    life: usize,
    credentials: Option<usize>,
    start: Instant,
    /// None while it is in flight, and where it was cut off.
    end: Option<Instant>,
    state: State,
    /// Under the store's lock.
    locked: bool,
    /// The store's file has it, with this time of day.
    remembered: bool,
    /// It was in the file at some time; whoever damages the file can't make its process forget what was not.
    written: bool,
    wall: SystemTime,
}

/// A store's file lost the only trace of a token that still works.
struct Replaced {
    token: String,
    by: Rc<Life>,
    at: Instant,
}

#[derive(Default)]
pub(super) struct Judge {
    attempts: RefCell<Vec<Attempt>>,
    replaced: RefCell<Vec<Replaced>>,
    /// Mints whose reply did not come to a life that went on.
    lost: RefCell<Vec<(String, Rc<Life>)>>,
    lives: RefCell<Vec<Rc<Life>>>,
}

/// What the failures of a life ask for, until its credentials change.
#[derive(Debug, Default)]
pub(super) struct Pace {
    not_before: Option<(Instant, &'static str)>,
    rejections: u32,
}

/// A mint in flight; dropped before its end, it was cut off.
pub(super) struct Attempting {
    world: Rc<World>,
    life: Rc<Life>,
    index: usize,
    ended: bool,
}

impl World {
    pub(super) fn lives(&self, life: &Rc<Life>) {
        self.judge.lives.borrow_mut().push(Rc::clone(life));
    }

    pub(super) fn mint_begins(self: &Rc<Self>, life: &Rc<Life>, password: u8, name: &str) -> Attempting {
        self.observe(life);
        let now = Instant::now();
        let asked = life.refresh_asked.take().is_some_and(|at| at.elapsed() < Duration::from_mins(1));
        // None: they were replaced when the mint was about to be sent.
        let credentials = life.credentials.get().filter(|(_, content)| *content == Content::Pair(password)).map(|(change, _)| change);
        self.count("mints begun");
        self.note(&format!("{life} mints {name} with p{password}{}", if asked { ", as an operator asked" } else { "" }));
        self.judge_single_flight(life);
        self.judge_budget(life, now);
        self.judge_interval(life, credentials, asked, now);
        self.judge_need(life, password, asked);
        if self.plan.shared_store && !life.saved.get() && !life.save_failed.get() && !life.load_failed.get() {
            self.violated(&format!("an attempt is written down before it is sent: {name} is not"));
        }
        if let Some((not_before, why)) = life.pace.borrow().not_before
            && now + TICK < not_before
            && credentials.is_some()
            && !asked
        {
            self.violated(&format!("{why}: {life} is {:?} early", not_before - now));
        }
        let mut attempts = self.judge.attempts.borrow_mut();
        attempts.push(Attempt {
            name: name.to_owned(),
            life: life.number,
            credentials,
            start: now,
            end: None,
            state: State::InFlight,
            locked: life.locked.get(),
            remembered: life.saved.get(),
            written: life.saved.get(),
            wall: self.wall(life.process),
        });
        Attempting { world: Rc::clone(self), life: Rc::clone(life), index: attempts.len() - 1, ended: false }
    }

    fn judge_single_flight(&self, life: &Life) {
        for other in self.judge.attempts.borrow().iter().filter(|attempt| attempt.state == State::InFlight) {
            if other.life == life.number || (other.locked && life.locked.get()) {
                self.violated(&format!("one mint at a time per process and store: {} is in flight", other.name));
            }
        }
    }

    /// Whether the attempt counts, was made by this life, and is younger than `span` by the monotonic clock.
    fn is_own(attempt: &Attempt, life: &Life, span: Duration, now: Instant) -> bool {
        attempt.state != State::Free && attempt.life == life.number && now - attempt.start + TICK < span
    }

    /// Whether the attempt counts, `life` has read of it in the store, and it is younger than `span` also by the wall clock.
    fn is_shared(&self, attempt: &Attempt, life: &Life, span: Duration, now: Instant) -> bool {
        let age = now - attempt.start;
        let by_wall_clock = self.wall(life.process).duration_since(attempt.wall).unwrap_or_default();
        let was_read = attempt.remembered && life.loaded.get() && attempt.start <= life.read_at.get();
        attempt.state != State::Free && was_read && age.max(by_wall_clock) + WRITTEN_BEFORE < span
    }

    fn judge_budget(&self, life: &Life, now: Instant) {
        let attempts = self.judge.attempts.borrow();
        let is_own = |attempt: &Attempt| Self::is_own(attempt, life, HOUR, now);
        let own = attempts.iter().filter(|attempt| is_own(attempt)).count();
        let unwritten = |attempt: &Attempt| is_own(attempt) && !attempt.written;
        let shared = attempts.iter().filter(|attempt| self.is_shared(attempt, life, HOUR, now) || unwritten(attempt)).count();
        let counted = own.max(shared);
        if counted >= self.plan.mint_budget as usize {
            self.violated(&format!("token.mint_budget: {life} begins a mint after {counted} within the hour"));
        }
    }

    fn judge_interval(&self, life: &Life, credentials: Option<usize>, asked: bool, now: Instant) {
        let attempts = self.judge.attempts.borrow();
        let first_with_these = !attempts
            .iter()
            .any(|attempt| attempt.life == life.number && attempt.state == State::Counted && attempt.start >= life.credentials_since.get());
        let last_counted = attempts.iter().rev().find(|attempt| attempt.state != State::Free && attempt.remembered);
        let span = self.plan.min_mint_interval;
        let holds_back = |attempt: &&Attempt| Self::is_own(attempt, life, span, now) || self.is_shared(attempt, life, span, now);
        for attempt in attempts.iter().filter(holds_back) {
            // What it knew of before its credentials changed can't have been made with them, as far as it can tell.
            let known_before = attempt.start <= life.knew_until.get();
            let new_credentials = first_with_these && (attempt.credentials != credentials || known_before);
            // A process that starts and finds the stored token dead can't tell whether its credentials are new. It may take them for new as long as
            // nobody tried since that token was made.
            let found_dead = |last: &Attempt| life.told_dead.borrow().iter().any(|dead| dead.starts_with(&last.name));
            let perhaps_new = attempt.life != life.number && first_with_these && last_counted.is_some_and(found_dead);
            if !(asked || new_credentials || perhaps_new) {
                let ago = now - attempt.start;
                self.violated(&format!("token.min_mint_interval: {life} begins a mint {ago:?} after {}", attempt.name));
            }
        }
    }

    /// A needless mint is the worst thing that the program can do.
    fn judge_need(&self, life: &Life, password: u8, asked: bool) {
        if asked || self.plan.max_age.is_some() {
            return;
        }
        let serves = |name: &str| self.api.is_alive(name) && self.api.password_of(name) == Some(password) && !life.thinks_dead(name);
        if let Some((_, name)) = &*life.in_use.borrow()
            && serves(name)
        {
            self.violated(&format!("no needless mint: {life} has {name}, which works"));
        }
        if let Some((name, _)) = self.disk.token()
            && life.loaded.get()
            && serves(&name)
            && !life.ever_used.borrow().contains(&name)
        {
            self.violated(&format!("no needless mint: {life} has read {name} in the store, which works"));
        }
    }

    /// `life` has written the store's file, in which the token `before` was until now.
    pub(super) fn stored(&self, life: &Rc<Life>, before: Option<&str>, today: SystemTime) {
        life.saved.set(true);
        if life.load_failed.get() {
            self.violated(&format!("what could not be read is not written over: {life} does"));
        }
        let now = Instant::now();
        let mut attempts = self.judge.attempts.borrow_mut();
        for attempt in attempts.iter_mut() {
            let own = attempt.life == life.number && attempt.start >= life.read_at.get();
            if own {
                // The one that just ended; it was written down anew.
                attempt.remembered = true;
                attempt.written = true;
                attempt.wall = today;
                continue;
            }
            // Who found the file damaged has replaced what was put there meanwhile; who has no lock may do so too. What by the clock is over is left out,
            // and what by the clock lies ahead is moved into the present.
            let over = today.duration_since(attempt.wall).is_ok_and(|age| age >= HOUR);
            attempt.remembered &= life.loaded.get() && attempt.start <= life.read_at.get() && !over;
            attempt.wall = attempt.wall.min(today);
        }
        // What the disk did not take before is in it now, unless this only moved what lay in the future.
        let known: Vec<_> = attempts.iter().filter(|attempt| attempt.remembered).map(|attempt| attempt.wall).collect();
        for attempt in attempts.iter_mut().filter(|attempt| attempt.life == life.number && !attempt.written) {
            let Some(end) = attempt.end else { continue };
            attempt.wall = today - (now - end);
            attempt.written = self.disk.attempts_near(attempt.wall) > known.iter().filter(|at| is_near(**at, attempt.wall)).count();
            attempt.remembered = attempt.written;
        }
        let after = self.disk.token().map(|(name, _)| name);
        if let Some(before) = before
            && after.as_deref() != Some(before)
            && life.loaded.get()
            && self.api.is_alive(before)
            && !life.thinks_dead(before)
        {
            self.judge.replaced.borrow_mut().push(Replaced { token: before.to_owned(), by: Rc::clone(life), at: now });
        }
    }

    /// The file is gone, and the memory of all attempts with it.
    pub(super) fn store_lost(&self) {
        self.judge.attempts.borrow_mut().iter_mut().for_each(|attempt| attempt.remembered = false);
    }

    pub(super) fn probed(&self, life: &Life, name: &str, outcome: &ProbeOutcome) {
        self.note(&format!("{life} is told that {name} is {outcome:?}"));
        match outcome {
            ProbeOutcome::Alive => {
                life.told_dead.borrow_mut().remove(name);
                life.pace.replace(Pace::default());
            }
            ProbeOutcome::Dead => {
                self.count("found dead");
                life.told_dead.borrow_mut().insert(name.to_owned());
            }
            ProbeOutcome::Inconclusive(_) => self.count("inconclusive probes"),
        }
    }

    pub(super) fn revocation(&self, life: &Life, token: &str) {
        self.count("revocations");
        self.note(&format!("{life} revokes {token}"));
        let in_use = life.carried().is_some_and(|(_, name)| name == token);
        if in_use && !life.stopping.get() {
            self.violated(&format!("{life} revokes {token}, which it uses"));
        }
    }

    /// Looks at what requests of `life` carry.
    pub(super) fn observe(&self, life: &Life) {
        let now = life.carried();
        let before = life.in_use.replace(now.clone());
        if before == now {
            return;
        }
        let shown = now.as_ref().map_or_else(|| "no token".to_owned(), |(generation, name)| format!("{name} (generation {generation})"));
        self.note(&format!("{life} uses {shown}"));
        if let Some((_, name)) = &now {
            life.ever_used.borrow_mut().insert(name.clone());
        }
        let Some((generation, name)) = before else { return };
        let lost = self.api.is_alive(&name) && !life.thinks_dead(&name);
        match now {
            None if lost => self.violated(&format!("a working token is never lost: {life} had {name}")),
            None => {}
            Some((next, _)) if next <= generation => self.violated("another token, a higher generation"),
            Some((_, successor)) => {
                if lost && !self.api.was_alive_within(&successor, Duration::from_mins(1)) {
                    self.violated(&format!("a working token is never lost: {life} uses {successor} instead of {name}"));
                }
                let is_minted = name.starts_with('t') && name.ends_with('-');
                if is_minted && successor != name && !is_named(&name) {
                    self.violated(&format!("superseded tokens are logged: {life} says nothing of {name}"));
                }
            }
        }
    }

    /// At the end: whether people were told of every token that nobody knows any more.
    pub(super) fn judge_traces(&self) {
        let lives = self.judge.lives.borrow();
        for Replaced { token, by, at } in self.judge.replaced.borrow().iter() {
            let cut_short = by.killed.get().is_some_and(|killed| killed < *at + Duration::from_mins(1));
            let known = lives.iter().any(|life| {
                let uses = life.in_use.borrow().as_ref().is_some_and(|(_, name)| name == token);
                uses || (life.killed.get().is_some() && life.ever_used.borrow().contains(token))
            });
            if !cut_short && !known && self.api.is_alive(token) && !is_named(token) {
                self.violated(&format!("superseded tokens are logged: {by} replaced {token} in the store and says nothing of it"));
            }
        }
        for (name, life) in self.judge.lost.borrow().iter() {
            if life.killed.get().is_none() && !journal::has(&format!("name=\"{name}\""), "may be left behind") {
                self.violated(&format!("a mint whose reply was lost is logged: {name}"));
            }
        }
    }

    /// What is wrong with `life`, long after all is well.
    pub(super) fn unhealed(&self, life: &Life) -> Option<String> {
        let Some((_, name)) = life.carried() else { return Some(format!("{life} has no token")) };
        let expected = match life.credentials.get() {
            Some((_, Content::Pair(number))) => self.api.password_of(&name) == Some(number),
            Some((_, Content::TokenFile(number))) => name == Content::file_token(number),
            _ => false,
        };
        if !self.api.is_alive(&name) {
            return Some(format!("{life} uses {name}, which is dead"));
        }
        (!expected).then(|| format!("{life} uses {name}, which is not of its credentials"))
    }
}

/// Whether the program told people of the token when it left it.
fn is_named(token: &str) -> bool {
    let name = format!("name=\"{token}\"");
    ["superseded", "was replaced", "another token took its place"].iter().any(|words| journal::has(&name, words))
}

impl Attempting {
    pub(super) fn ended(mut self, outcome: &Outcome) {
        self.ended = true;
        let (world, life) = (&self.world, &self.life);
        world.note(&format!("{life}'s mint ends: {}", outcome.label()));
        world.count(outcome.label());
        let now = Instant::now();
        let mut attempts = world.judge.attempts.borrow_mut();
        let attempt = &mut attempts[self.index];
        attempt.end = Some(now);
        attempt.state = match outcome {
            Outcome::Minted(_) | Outcome::Lost { .. } | Outcome::Invalid { .. } => State::Counted,
            Outcome::Rejected { .. } | Outcome::Retry { .. } => State::Free,
        };
        if let Outcome::Lost { .. } | Outcome::Invalid { .. } = outcome {
            world.judge.lost.borrow_mut().push((attempt.name.clone(), Rc::clone(life)));
        }
        if attempt.credentials.is_none() || life.credentials.get().map(|(change, _)| change) != attempt.credentials {
            return; // what replaced credentials met with says nothing about the new ones
        }
        let mut pace = life.pace.borrow_mut();
        let half_a_second = Duration::from_millis(500);
        match outcome {
            Outcome::Minted(_) => *pace = Pace::default(),
            Outcome::Rejected { .. } => {
                pace.rejections += 1;
                let wait = if pace.rejections == 1 { Duration::from_mins(1) } else { HOUR };
                pace.not_before = Some((now + wait, "rejected credentials are tried after a minute, then hourly"));
            }
            Outcome::Retry { retry_after, .. } => {
                let asked = retry_after.map_or(Duration::ZERO, |asked| asked.clamp(Duration::from_secs(1), MAX_RETRY_AFTER));
                pace.not_before = Some((now + asked.max(half_a_second), "backoff and retry-after are honoured"));
            }
            Outcome::Lost { .. } | Outcome::Invalid { .. } => {
                pace.not_before = Some((now + half_a_second, "there is a pause after a failure"));
            }
        }
    }
}

impl Drop for Attempting {
    fn drop(&mut self) {
        if !self.ended {
            self.world.note(&format!("{}'s mint is cut off", self.life));
            self.world.judge.attempts.borrow_mut()[self.index].state = State::CutOff;
        }
    }
}
