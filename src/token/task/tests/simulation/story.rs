//! What happens in a run, and when.

use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use fastrand::Rng;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::api::Weather;
use super::disk::Fault;
use super::process::{Content, Running};
use super::world::{Plan, Point, World, ms, pick};

/// After this much of good weather, with good credentials, every process has a token that works: an hour until rejected credentials are tried again or
/// the budget has room, then an hour more where the store holds what a wrong clock wrote, and a quarter for what was on its way and requests to notice.
const HEALS_WITHIN: Duration = Duration::from_mins(135);
const PASSWORDS: u8 = 5;
const TEN_YEARS: i64 = 10 * 365 * 24 * 3600;

/// What a happening leaves to be done later.
#[derive(Debug, Clone, Copy)]
enum Errand {
    Start(usize),
    Read(usize, (usize, Content)),
    EndPartition(usize),
    ClearWeather,
    MendDisk,
    Kill(usize),
    Accept(u8, bool),
}

pub(super) struct Story {
    world: Rc<World>,
    rng: Rng,
    to_kill: mpsc::UnboundedReceiver<usize>,
    errands: Vec<(Instant, Errand)>,
    running: Vec<Option<Running>>,
    lives: usize,
    /// What the files of each process hold, by the number of its change.
    files: Vec<(usize, Content)>,
    changes: usize,
    /// What somebody made in the UI, for token files.
    file_tokens: u8,
}

impl Story {
    pub(super) fn new(plan: Plan, rng: Rng) -> Self {
        let processes = plan.processes;
        let (world, to_kill) = World::new(plan);
        Self {
            world: Rc::new(world),
            rng,
            to_kill,
            errands: Vec::new(),
            running: (0..processes).map(|_| None).collect(),
            lives: 0,
            files: vec![(0, Content::Pair(0)); processes],
            changes: 0,
            file_tokens: 0,
        }
    }

    pub(super) fn world(&self) -> Rc<World> {
        Rc::clone(&self.world)
    }

    /// All of it. Stops where a promise is broken.
    pub(super) async fn play(&mut self) {
        self.world.note(&format!("{:?}", self.world.plan));
        self.world.api.accept(0, true);
        for process in 0..self.running.len() {
            let after = self.soon();
            self.later(after, Errand::Start(process));
        }
        for _ in 0..self.world.plan.happenings {
            let pause = match self.rng.u8(0..6) {
                0 | 1 => ms(&mut self.rng, 0..3000),
                2 | 3 => ms(&mut self.rng, 0..90_000),
                4 => ms(&mut self.rng, 0..600_000),
                _ => ms(&mut self.rng, 0..4_000_000),
            };
            self.pass(pause).await;
            if self.world.violation().is_some() {
                return;
            }
            self.something_happens().await;
        }
        self.heal().await;
    }

    fn soon(&mut self) -> Duration {
        match self.rng.u8(0..3) {
            0 => ms(&mut self.rng, 1..50),
            1 => ms(&mut self.rng, 1..15_000),
            _ => ms(&mut self.rng, 1..120_000),
        }
    }

    fn later(&mut self, after: Duration, errand: Errand) {
        self.errands.push((Instant::now() + after, errand));
    }

    /// Lets time pass, with the errands that fall due.
    async fn pass(&mut self, duration: Duration) {
        let until = Instant::now() + duration;
        while self.world.violation().is_none() {
            let next = self.errands.iter().enumerate().min_by_key(|(_, (due, _))| *due).map(|(index, (due, _))| (index, *due));
            let due = next.map_or(until, |(_, due)| due.min(until));
            tokio::select! {
                biased;
                Some(process) = self.to_kill.recv() => {
                    let after = self.soon();
                    self.kill(process, after);
                    continue;
                }
                () = sleep_until(due) => {}
            }
            for running in self.running.iter().flatten() {
                if running.has_ended() {
                    self.world.violated("the token task does not end by itself");
                }
            }
            match next {
                Some((index, due)) if due <= until => {
                    let (_, errand) = self.errands.swap_remove(index);
                    self.run(errand);
                }
                _ => return,
            }
        }
    }

    fn run(&mut self, errand: Errand) {
        match errand {
            Errand::Start(process) => self.start(process),
            Errand::Read(process, files) => self.read(process, files),
            Errand::EndPartition(process) => self.world.api.partition(process, false),
            Errand::ClearWeather => self.clear(),
            Errand::MendDisk => self.world.disk.fault.set(Fault::None),
            Errand::Kill(process) => {
                let after = self.soon();
                self.kill(process, after);
            }
            Errand::Accept(password, good) => self.world.api.accept(password, good),
        }
    }

    fn clear(&mut self) {
        self.world.note("the weather clears");
        self.world.api.weather.set(Weather::Fine);
        self.world.api.unauthorized.set(false);
    }

    fn start(&mut self, process: usize) {
        if self.running[process].is_none() {
            let running = Running::start(&self.world, process, self.lives, self.files[process], self.rng.fork());
            self.lives += 1;
            self.world.lives(&running.life);
            self.running[process] = Some(running);
        }
    }

    fn kill(&mut self, process: usize, and_start_after: Duration) {
        if let Some(running) = self.running[process].take() {
            self.world.count("kills");
            self.world.note(&format!("{} is killed", running.life));
            running.kill();
            self.later(and_start_after, Errand::Start(process));
        }
    }

    fn read(&mut self, process: usize, files: (usize, Content)) {
        if files.0 < self.files[process].0 {
            return; // a newer change has overtaken it
        }
        self.files[process] = files;
        if let Some(running) = &self.running[process] {
            running.credentials(&self.world, files);
        }
    }

    fn any(&mut self) -> usize {
        self.rng.usize(..self.running.len())
    }

    async fn something_happens(&mut self) {
        let process = self.any();
        match self.rng.u8(0..40) {
            0..=6 => self.weather_changes(),
            7..=9 => {
                self.world.note(&format!("process {process} is cut off"));
                self.world.api.partition(process, true);
                let span = pick(&mut self.rng, &[10_000, 300_000, 10_000_000]);
                let after = ms(&mut self.rng, 1..span);
                self.later(after, Errand::EndPartition(process));
            }
            10..=14 => self.somebody_deletes_tokens(),
            15..=19 => self.credentials_change(),
            20 => {
                let (change, content) = self.files[process];
                let again = self.rng.bool();
                if let Some(running) = &self.running[process] {
                    running.credentials(&self.world, if again { (change, content) } else { (change, Content::Unreadable) });
                }
            }
            21 => {
                let used = self.running.iter().flatten().next().is_some();
                if used {
                    let change = self.new_token_file();
                    self.read(process, change);
                }
            }
            22 | 23 => {
                if let Some(running) = &mut self.running[process] {
                    running.refresh(&self.world);
                }
            }
            24 | 25 => {
                let after = self.soon();
                self.kill(process, after);
            }
            26..=28 => {
                let point = pick(&mut self.rng, &Point::ALL);
                self.world.arm(Some((process, point)));
            }
            29 => self.crash_loop(process),
            30 => {
                if let Some(running) = self.running[process].take() {
                    self.world.arm(None);
                    running.stop(&self.world).await;
                    let after = self.soon();
                    self.later(after, Errand::Start(process));
                }
            }
            31..=33 => self.clocks_jump(),
            34 | 35 => {
                let fault = pick(&mut self.rng, &[Fault::Full, Fault::ReadOnly, Fault::Flaky, Fault::Slow]);
                self.world.note(&format!("disk: {fault:?}"));
                self.world.disk.fault.set(fault);
                let after = ms(&mut self.rng, 1..2_000_000);
                self.later(after, Errand::MendDisk);
            }
            36 => {
                self.world.note("the store's file is damaged");
                self.world.disk.damage();
                self.world.store_lost();
            }
            _ => {
                let requests = self.rng.usize(1..30);
                if let Some(running) = &self.running[process] {
                    running.burst(requests);
                }
            }
        }
    }

    fn weather_changes(&mut self) {
        let weather = Weather::draw(&mut self.rng);
        self.world.note(&format!("weather: {weather:?}"));
        self.world.api.weather.set(weather);
        self.world.api.unauthorized.set(self.rng.u8(0..5) == 0);
        let span = pick(&mut self.rng, &[20_000, 300_000, 10_000_000]);
        let after = ms(&mut self.rng, 1..span);
        self.later(after, Errand::ClearWeather);
    }

    fn somebody_deletes_tokens(&mut self) {
        let used: BTreeSet<_> = self.running.iter().flatten().filter_map(|running| running.life.carried()).map(|(_, name)| name).collect();
        let names = match self.rng.u8(0..3) {
            0 => self.world.api.names(),
            _ => used.into_iter().collect(),
        };
        for name in names.iter().filter(|name| self.world.api.is_alive(name)) {
            self.world.note(&format!("somebody deletes {name}"));
            self.world.api.revoke(name);
        }
    }

    /// A new password is made known to the upstream and to each process, in whatever order and with whatever delay; it may be wrong at first.
    fn credentials_change(&mut self) {
        let password = self.rng.u8(0..PASSWORDS);
        self.world.note(&format!("the password becomes p{password}"));
        let good = self.rng.u8(0..4) > 0;
        let after = self.soon();
        if good {
            self.world.api.accept(password, true);
        } else if self.rng.bool() {
            self.later(after * 20, Errand::Accept(password, true));
        } else {
            self.world.api.accept(password, false);
        }
        if self.rng.bool() {
            for other in (0..PASSWORDS).filter(|other| *other != password) {
                self.world.api.accept(other, false);
            }
        }
        self.changes += 1;
        let files = (self.changes, Content::Pair(password));
        for process in 0..self.running.len() {
            if self.files[process].1 != files.1 {
                let after = self.soon();
                self.later(after, Errand::Read(process, files));
            }
        }
    }

    fn new_token_file(&mut self) -> (usize, Content) {
        self.file_tokens += 1;
        let content = Content::TokenFile(self.file_tokens);
        if self.rng.u8(0..3) > 0 {
            self.world.api.make(&Content::file_token(self.file_tokens), None, Instant::now());
        }
        self.changes += 1;
        (self.changes, content)
    }

    fn crash_loop(&mut self, process: usize) {
        let mut after = Duration::ZERO;
        for _ in 0..10 {
            after += ms(&mut self.rng, 100..6000);
            self.later(after, Errand::Kill(process));
            let started = after + ms(&mut self.rng, 1..100);
            self.later(started, Errand::Start(process));
        }
    }

    fn clocks_jump(&mut self) {
        let seconds = pick(&mut self.rng, &[TEN_YEARS, -3600, 2, -2, 0]);
        let one = self.any();
        let all = self.rng.bool();
        for process in 0..self.running.len() {
            if all || process == one {
                self.world.note(&format!("the wall clock of process {process} is off by {seconds} s"));
                self.world.set_off(process, seconds);
            }
        }
    }

    /// All is well from now on, and stays so: the promises end in every process having a token that works.
    async fn heal(&mut self) {
        self.world.note("all is well from now on");
        self.world.arm(None);
        self.world.api.all_is_well.set(true);
        self.errands.clear();
        self.clear();
        self.world.disk.fault.set(Fault::None);
        for process in 0..self.running.len() {
            self.world.api.partition(process, false);
            self.world.set_off(process, 0);
            self.start(process);
        }
        let mut good = self.files.iter().map(|(_, content)| *content).max_by_key(|content| matches!(content, Content::Pair(_)));
        if !matches!(good, Some(Content::Pair(_))) {
            good = Some(Content::Pair(0));
        }
        let Some(Content::Pair(password)) = good else { return };
        self.world.api.accept(password, true);
        self.changes += 1;
        for process in 0..self.running.len() {
            if self.files[process].1 != Content::Pair(password) {
                self.read(process, (self.changes, Content::Pair(password)));
            }
        }
        let healed = Instant::now();
        let mut wrong;
        loop {
            wrong = self.running.iter().flatten().find_map(|running| self.world.unhealed(&running.life));
            if wrong.is_none() || healed.elapsed() > HEALS_WITHIN || self.world.violation().is_some() {
                break;
            }
            self.pass(Duration::from_secs(20)).await;
        }
        if let Some(wrong) = wrong {
            self.world.violated(&format!("ready within {HEALS_WITHIN:?} after all is well: {wrong}"));
        }
        self.pass(Duration::from_mins(2)).await;
        self.world.judge_traces();
    }
}
