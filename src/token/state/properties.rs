//! C52: whatever happens in whatever order, the promises hold.
//!
//! A small world stands around the machine: an upstream that knows which tokens and credentials are good, a store, requests, an operator. proptest
//! draws what happens; after each step the world checks what [`World::check`] names.

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::*;
use crate::secret::{AuthorizationValue, Token};
use crate::token::{ActiveToken, Availability};

const INTERVAL: Duration = Duration::from_mins(1);
const BUDGET: u32 = 4;

/// What happens next.
#[derive(Debug, Clone)]
enum Happening {
    /// Time passes, in milliseconds; what falls due meanwhile is done.
    Pass(u64),
    /// What is under way towards another token ends, as the upstream sees fit.
    AcquisitionEnds,
    /// The probe of the token in use ends.
    ProbeEnds,
    /// A request runs; `honest`: a good token meets a 403 all the same. `unauthorized`: a bad one meets a 401 rather than a 403.
    Request { honest: bool, unauthorized: bool },
    /// A response arrives late that the first token ever used was rejected with.
    LateRejection,
    /// Somebody deletes the token in use.
    Revoke,
    /// The credentials change: one of three pairs or of two token files, or nothing readable.
    Rotate(u8),
    /// The upstream takes or refuses this pair or this file's token from now on.
    SetGood(u8, bool),
    /// The network or the upstream breaks, or heals.
    Weather(Weather),
    /// An operator asks for a successor.
    Refresh,
    /// The process is killed and starts again, with what the store holds.
    Restart,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Weather {
    Fine,
    NotConnected,
    RepliesLost,
    Garbage,
    Throttled,
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        6 => prop_oneof![0..2_000_u64, 0..100_000_u64, 0..4_000_000_u64].prop_map(Happening::Pass),
        8 => Just(Happening::AcquisitionEnds),
        5 => Just(Happening::ProbeEnds),
        8 => any::<(bool, bool)>().prop_map(|(honest, unauthorized)| Happening::Request { honest, unauthorized }),
        2 => Just(Happening::LateRejection),
        3 => Just(Happening::Revoke),
        2 => (0..6_u8).prop_map(Happening::Rotate),
        2 => (0..5_u8, any::<bool>()).prop_map(|(which, good)| Happening::SetGood(which, good)),
        2 => prop_oneof![Just(Weather::Fine), Just(Weather::NotConnected), Just(Weather::RepliesLost), Just(Weather::Garbage), Just(Weather::Throttled)]
            .prop_map(Happening::Weather),
        1 => Just(Happening::Refresh),
        1 => Just(Happening::Restart),
    ]
}

/// What the machine asked for and the world has not finished.
#[derive(Debug)]
enum UnderWay {
    ReadStore,
    Mint(CredentialsId),
    Verify(Arc<TokenRecord>),
}

struct World {
    machine: Machine,
    now: Instant,
    jitter: Jitter,
    settings: Settings,

    weather: Weather,
    good_credentials: [bool; 5],
    good_tokens: HashSet<String>,
    credentials: u8,

    stored: Option<Arc<TokenRecord>>,
    /// How many attempts were counted when it was stored, its own included.
    counted_when_stored: usize,
    /// When each mint was sent that may have left a token behind.
    counted: Vec<Instant>,
    /// Of the mint under way or the last one.
    minted_at: Instant,

    acquisition: Option<UnderWay>,
    probe: Option<(u64, Arc<TokenRecord>)>,
    waiting: HashSet<Ticket>,
    answered: HashSet<Ticket>,
    known_dead: HashSet<String>,
    generations: HashMap<u64, String>,
    tickets: u64,
    /// The interval does not hold for the next mint.
    exempt: bool,
    /// Nor if the stored token is dead: nobody tried since it was made, so perhaps it is of other credentials.
    perhaps_new: bool,
}

impl World {
    fn new(max_age: Option<Duration>) -> Self {
        let limits = MintLimits { interval: INTERVAL, budget: BUDGET };
        let settings = Settings { max_age, probe_interval: Duration::from_secs(30), limits };
        let now = Instant::now();
        let mut world = Self {
            machine: Machine::new(settings),
            now,
            jitter: Jitter::new(0.5),
            settings,
            weather: Weather::Fine,
            good_credentials: [true; 5],
            good_tokens: (3..5).map(file_token).collect(),
            credentials: 0,
            stored: None,
            counted_when_stored: 0,
            counted: Vec::new(),
            minted_at: now,
            acquisition: None,
            probe: None,
            waiting: HashSet::new(),
            answered: HashSet::new(),
            known_dead: HashSet::new(),
            generations: HashMap::new(),
            tickets: 0,
            exempt: false,
            perhaps_new: false,
        };
        world.step(credentials(0));
        world
    }

    /// The token that requests carry, by name.
    fn in_use(&self) -> Option<String> {
        match self.machine.availability(self.now) {
            Availability::Usable(_) => self.machine.token().unwrap().name.clone(),
            Availability::Unavailable { .. } => None,
        }
    }

    fn works(&self, name: &str) -> bool {
        self.good_tokens.contains(name)
    }

    fn step(&mut self, event: Event) {
        let before = self.in_use();
        let asked = self.machine.step(event, self.now, self.jitter);
        for action in asked {
            self.perform(action);
        }
        self.check(before.as_deref());
    }

    fn perform(&mut self, action: Action) {
        match action {
            Action::ReadStore(_) => self.begin(UnderWay::ReadStore),
            Action::Mint { credentials, pause_after } => {
                let hour_ago = |at: &&Instant| self.now < **at + BUDGET_WINDOW;
                let within_the_hour = self.counted.iter().filter(hour_ago).count();
                assert!(within_the_hour < BUDGET as usize, "the budget is kept");
                let interval_is_over = self.counted.last().is_none_or(|last| *last + INTERVAL <= self.now);
                assert!(
                    interval_is_over || ((self.exempt || self.perhaps_new) && pause_after != PauseAfter::All),
                    "only new credentials and operators set the interval aside"
                );
                self.minted_at = self.now;
                self.begin(UnderWay::Mint(credentials));
            }
            Action::Probe(Subject::Candidate, token) => self.begin(UnderWay::Verify(token)),
            Action::Probe(Subject::InUse(generation), token) => self.probe = Some((generation, token)),
            Action::Answer(ticket, verdict) => {
                assert!(self.waiting.remove(&ticket), "{ticket:?} was asked");
                assert!(self.answered.insert(ticket), "{ticket:?} is answered once");
                if let Verdict::Replay(ActiveToken { generation, .. }) = verdict {
                    assert_eq!(generation, self.machine.generation(), "replayed with the newest token");
                }
            }
            Action::AnswerRefresh(_) | Action::Supersede { .. } | Action::ReloadCredentials => {}
        }
    }

    fn begin(&mut self, what: UnderWay) {
        assert!(self.acquisition.is_none(), "at most one at a time: {what:?} beside {:?}", self.acquisition);
        self.acquisition = Some(what);
    }

    /// The promises that hold at any time.
    fn check(&mut self, before: Option<&str>) {
        let now_used = self.in_use();
        if let Some(name) = &now_used {
            assert!(!self.known_dead.contains(name), "{name} is known to be dead and is not sent");
            let known = self.generations.entry(self.machine.generation()).or_insert_with(|| name.clone());
            assert_eq!(known, name, "another token, another generation");
        }
        assert!(self.generations.keys().all(|generation| *generation <= self.machine.generation()), "the generation grows");
        if let Some(before) = before
            && self.works(before)
        {
            let name = now_used.expect("a token that works is not lost");
            assert!(name == before || self.works(&name), "a token that works is not swapped for {name}, which does not");
        }
        if self.acquisition.is_none() && self.probe.is_none() {
            assert!(self.waiting.is_empty(), "nothing is under way that {:?} could wait for", self.waiting);
        }
    }

    fn happens(&mut self, happening: &Happening) {
        match *happening {
            Happening::Pass(milliseconds) => self.pass(Duration::from_millis(milliseconds)),
            Happening::AcquisitionEnds => self.acquisition_ends(),
            Happening::ProbeEnds => self.probe_ends(),
            Happening::Request { honest, unauthorized } => self.request(honest, unauthorized),
            Happening::LateRejection => {
                if self.machine.generation() > 1 {
                    self.reject(1, Rejection::Forbidden);
                }
            }
            Happening::Revoke => {
                if let Some(name) = self.in_use() {
                    self.good_tokens.remove(&name);
                }
            }
            Happening::Rotate(which) => {
                // Whether the machine was told and took it for a change, or not: the world allows an exempt mint only after a real one.
                if which < 5 && which != self.credentials {
                    self.credentials = which;
                    self.exempt = true;
                    // Who puts an old token back wants it to be tried.
                    self.known_dead.remove(&file_token(which));
                }
                self.step(credentials(which));
            }
            Happening::SetGood(which, good) => self.set_good(which, good),
            Happening::Weather(weather) => self.weather = weather,
            Happening::Refresh => {
                self.exempt = true;
                self.step(Event::RefreshRequested);
            }
            Happening::Restart => self.restart(),
        }
    }

    /// A pair may be taken again; a deleted token never is.
    fn set_good(&mut self, which: u8, good: bool) {
        self.good_credentials[usize::from(which)] = good;
        if !good {
            self.good_tokens.remove(&file_token(which));
        }
    }

    fn pass(&mut self, duration: Duration) {
        let until = self.now + duration;
        for _ in 0..10_000 {
            match self.machine.deadline(self.now) {
                Some(due) if due <= until => {
                    self.now = self.now.max(due);
                    self.step(Event::TimerFired);
                }
                _ => {
                    self.now = until;
                    return;
                }
            }
        }
        panic!("the timer fires for ever");
    }

    fn acquisition_ends(&mut self) {
        let Some(under_way) = self.acquisition.take() else { return };
        let event = match under_way {
            UnderWay::ReadStore => self.read_store(),
            UnderWay::Mint(by) => self.mint_ends(by),
            UnderWay::Verify(token) => {
                let result = self.ask_about(&token);
                self.perhaps_new &= result == ProbeResult::Dead;
                Event::Probed(Subject::Candidate, result)
            }
        };
        self.step(event);
    }

    fn read_store(&mut self) -> Event {
        let tried_since = self.stored.is_some() && self.counted.len() > self.counted_when_stored;
        self.perhaps_new = self.stored.is_some() && !tried_since;
        let token = self.stored.clone().map(|token| Candidate { token, age: Duration::ZERO });
        Event::StoreRead { token, attempt_ages: self.counted.iter().map(|at| self.now - *at).collect(), tried_since }
    }

    fn mint_ends(&mut self, by: CredentialsId) -> Event {
        let good = self.good_credentials[usize::try_from(by.0).unwrap()];
        let failure = match self.weather {
            Weather::Fine if good => {
                self.count(by);
                let name = format!("t{}", self.counted.len());
                self.good_tokens.insert(name.clone());
                let token = record(&name, TokenSource::Minted);
                self.stored = Some(record(&name, TokenSource::Store));
                self.counted_when_stored = self.counted.len();
                return Event::Minted(token);
            }
            Weather::Fine => MintFailure::Rejected,
            Weather::NotConnected => MintFailure::Retry { retry_after: None },
            Weather::Throttled => MintFailure::Retry { retry_after: Some(Duration::from_secs(100)) },
            Weather::RepliesLost => MintFailure::Lost,
            Weather::Garbage => MintFailure::Invalid,
        };
        if failure.may_have_left_a_token() {
            self.count(by);
        }
        Event::MintFailed(failure)
    }

    fn count(&mut self, by: CredentialsId) {
        self.counted.push(self.minted_at);
        // The attempt of replaced credentials is not the first one of the new ones.
        self.exempt &= by.0 != u64::from(self.credentials);
        self.perhaps_new = false;
    }

    fn ask_about(&self, token: &TokenRecord) -> ProbeResult {
        match self.weather {
            Weather::Fine if self.works(token.name.as_deref().unwrap()) => ProbeResult::Alive,
            Weather::Fine => ProbeResult::Dead,
            _ => ProbeResult::Inconclusive,
        }
    }

    fn probe_ends(&mut self) {
        let Some((generation, token)) = self.probe.take() else { return };
        let result = self.ask_about(&token);
        if result == ProbeResult::Dead && generation == self.machine.generation() {
            self.known_dead.insert(token.name.clone().unwrap());
        }
        self.step(Event::Probed(Subject::InUse(generation), result));
    }

    fn request(&mut self, honest: bool, unauthorized: bool) {
        let Some(name) = self.in_use() else { return };
        let generation = self.machine.generation();
        match (self.works(&name), honest, unauthorized) {
            (true, false, _) => {}
            (true, true, _) | (false, _, false) => self.reject(generation, Rejection::Forbidden),
            (false, _, true) => self.reject(generation, Rejection::Unauthorized),
        }
    }

    fn reject(&mut self, generation: u64, rejection: Rejection) {
        self.tickets += 1;
        let ticket = Ticket(self.tickets);
        self.waiting.insert(ticket);
        self.step(Event::Rejected { ticket, generation, rejection });
    }

    fn restart(&mut self) {
        self.step(Event::Shutdown);
        assert!(self.waiting.is_empty(), "a shutdown leaves nobody waiting");
        // A mint under way is cut off: the store counted it before it was sent.
        if let Some(UnderWay::Mint(by)) = self.acquisition {
            self.count(by);
        }
        self.machine = Machine::new(self.settings);
        self.acquisition = None;
        self.probe = None;
        self.generations.clear();
        // What is known to be dead dies with the process; the stored token is asked about again.
        self.known_dead.clear();
        self.exempt = false;
        self.perhaps_new = false;
        self.step(credentials(self.credentials));
    }

    /// The upstream heals and takes the credentials: a token that works is in use before long, as soon as requests notice that the old one does not.
    fn heals(&mut self) {
        self.weather = Weather::Fine;
        if self.credentials >= 3 {
            self.happens(&Happening::Rotate(0));
        }
        self.good_credentials = [true; 5];
        for _ in 0..60 {
            self.acquisition_ends();
            self.probe_ends();
            self.acquisition_ends();
            if self.in_use().is_some_and(|name| self.works(&name)) {
                return;
            }
            self.request(false, false);
            self.pass(Duration::from_mins(5));
        }
        panic!("no token that works five hours after all is well: {:?}", self.machine);
    }
}

/// 0 to 2 are pairs, 3 and 4 token files, all else is unreadable.
fn credentials(which: u8) -> Event {
    let id = CredentialsId(u64::from(which));
    Event::CredentialsChanged(match which {
        0..3 => Credentials::Pair(id),
        3..5 => Credentials::FixedToken(id, record(&file_token(which), TokenSource::TokenFile)),
        _ => Credentials::Missing,
    })
}

fn file_token(which: u8) -> String {
    format!("file{which}")
}

fn record(name: &str, source: TokenSource) -> Arc<TokenRecord> {
    let authorization = AuthorizationValue::new(&Token::new(name.to_owned()).unwrap());
    Arc::new(TokenRecord { authorization, id: None, name: Some(name.to_owned()), created: std::time::SystemTime::UNIX_EPOCH, source })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn c52_the_promises_hold_whatever_happens(
        max_age in prop_oneof![Just(None), Just(Some(Duration::from_mins(20)))],
        happenings in prop::collection::vec((happening(), 0.0..=1.0), 1..120),
    ) {
        let mut world = World::new(max_age);
        for (happening, jitter) in happenings {
            world.jitter = Jitter::new(jitter);
            world.happens(&happening);
        }
        world.heals();
    }
}
