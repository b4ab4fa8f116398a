//! One test for each row of the tables in `super`'s documentation, named after the rows of the reliability matrix.

use super::*;
use crate::secret::{AuthorizationValue, Token};
use crate::token::Availability;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_mins(1);
const HOUR: Duration = Duration::from_hours(1);
const A: CredentialsId = CredentialsId(1);
const B: CredentialsId = CredentialsId(2);
const FORBIDDEN: Rejection = Rejection::Forbidden;
const UNAUTHORIZED: Rejection = Rejection::Unauthorized;
const RETRY: MintFailure = MintFailure::Retry { retry_after: None };

fn settings() -> Settings {
    let limits = MintLimits { interval: MINUTE, budget: 3 };
    Settings { max_age: None, probe_interval: 30 * SECOND, limits }
}

fn token(text: &str, source: TokenSource) -> Arc<TokenRecord> {
    let authorization = AuthorizationValue::new(&Token::new(text.to_owned()).unwrap());
    let created = std::time::SystemTime::UNIX_EPOCH;
    Arc::new(TokenRecord { authorization, id: None, name: Some(text.to_owned()), created, source })
}

fn minted(text: &str) -> Event {
    Event::Minted(token(text, TokenSource::Minted))
}

fn stored(text: &str) -> Candidate {
    Candidate { token: token(text, TokenSource::Store), age: Duration::ZERO }
}

fn pair(id: CredentialsId) -> Event {
    Event::CredentialsChanged(Credentials::Pair(id))
}

fn token_file(id: CredentialsId, text: &str) -> Event {
    Event::CredentialsChanged(Credentials::FixedToken(id, token(text, TokenSource::TokenFile)))
}

fn failed(failure: MintFailure) -> Event {
    Event::MintFailed(failure)
}

fn candidate_is(result: ProbeResult) -> Event {
    Event::Probed(Subject::Candidate, result)
}

/// The machine and its clock.
struct Rig {
    machine: Machine,
    now: Instant,
    tickets: u64,
}

impl Rig {
    fn new(settings: Settings) -> Self {
        Self { machine: Machine::new(settings), now: Instant::now(), tickets: 0 }
    }

    /// Credentials A, an empty store, a mint in flight.
    fn minting() -> Self {
        Self::minting_with(settings())
    }

    fn minting_with(settings: Settings) -> Self {
        let mut rig = Self::new(settings);
        assert_eq!(rig.on(pair(A)), ["read store with 1"]);
        assert_eq!(rig.on(Event::StoreRead { token: None, attempt_ages: vec![], tried_since: false }), ["mint with 1"]);
        rig
    }

    /// In use: `t1`, minted with A long ago.
    fn usable() -> Self {
        let mut rig = Self::minting();
        assert_eq!(rig.on(minted("t1")), [""; 0]);
        rig.after(2 * HOUR);
        rig
    }

    /// `t1` is suspected by one 403.
    fn probing() -> Self {
        let mut rig = Self::usable();
        assert_eq!(rig.reject(1, FORBIDDEN), ["probe generation 1"]);
        rig
    }

    /// What the machine asks for, in words.
    fn on(&mut self, event: Event) -> Vec<String> {
        self.machine.step(event, self.now, Jitter::new(0.0)).iter().map(words).collect()
    }

    /// Rejects a request of this generation; its ticket is the next number.
    fn reject(&mut self, generation: u64, rejection: Rejection) -> Vec<String> {
        self.tickets += 1;
        self.on(Event::Rejected { ticket: Ticket(self.tickets), generation, rejection })
    }

    fn probed(&mut self, generation: u64, result: ProbeResult) -> Vec<String> {
        self.on(Event::Probed(Subject::InUse(generation), result))
    }

    fn after(&mut self, duration: Duration) -> Vec<String> {
        self.now += duration;
        self.on(Event::TimerFired)
    }

    /// Nothing is begun before `duration` is over; then this is.
    fn waits(&mut self, duration: Duration, then: &str) {
        let due = self.now + duration;
        assert_eq!(self.machine.deadline(self.now), Some(due), "in {}", self.machine.situation().label());
        assert_eq!(self.after(duration.saturating_sub(Duration::from_millis(1))), [""; 0]);
        self.now = due;
        assert_eq!(self.on(Event::TimerFired), [then]);
    }

    fn sees(&self) -> (&'static str, Option<String>, u64) {
        let name = match self.machine.availability(self.now) {
            Availability::Usable(active) => {
                assert_eq!(active.generation, self.machine.generation());
                assert_eq!(active.authorization, self.machine.token().unwrap().authorization);
                self.machine.token().unwrap().name.clone()
            }
            Availability::Unavailable { .. } => None,
        };
        (self.machine.situation().label(), name, self.machine.generation())
    }
}

fn using(state: &'static str, name: &str, generation: u64) -> (&'static str, Option<String>, u64) {
    (state, Some(name.to_owned()), generation)
}

fn words(action: &Action) -> String {
    let name = |token: &TokenRecord| token.name.clone().unwrap();
    match action {
        Action::ReadStore(id) => format!("read store with {}", id.0),
        Action::Mint { credentials, pause_after: PauseAfter::All } => format!("mint with {} in its turn", credentials.0),
        Action::Mint { credentials, pause_after: PauseAfter::Unseen } => format!("mint with {}", credentials.0),
        Action::Mint { credentials, pause_after: PauseAfter::None } => format!("mint with {} as asked", credentials.0),
        Action::Probe(Subject::InUse(generation), _) => format!("probe generation {generation}"),
        Action::Probe(Subject::Candidate, token) => format!("verify {}", name(token)),
        Action::Answer(ticket, Verdict::Relay) => format!("{}: relay", ticket.0),
        Action::Answer(ticket, Verdict::Replay(token)) => format!("{}: replay with {}", ticket.0, token.generation),
        Action::AnswerRefresh(Ok(())) => "refresh begins".to_owned(),
        Action::AnswerRefresh(Err(RefreshRefused::TooMany { retry_after })) => format!("refresh in {} s", retry_after.as_secs()),
        Action::AnswerRefresh(Err(RefreshRefused::CredentialsRejected { retry_after })) => {
            format!("rejected for {} s", retry_after.as_secs())
        }
        Action::AnswerRefresh(Err(RefreshRefused::NothingToMintWith { reason })) => reason.clone(),
        Action::Supersede { token, proven_dead: true } => format!("bury {}", name(token)),
        Action::Supersede { token, proven_dead: false } => format!("supersede {}", name(token)),
        Action::ReloadCredentials => "reload".to_owned(),
    }
}

/// What the task and `/status` ask besides the state's word.
#[test]
fn what_can_be_seen_follows_from_the_state() {
    fn seen(rig: &Rig) -> (&'static str, bool, bool, bool) {
        let machine = &rig.machine;
        (machine.situation().label(), machine.is_minting(), machine.is_verifying(), machine.token_is_dead())
    }
    let mut rig = Rig::new(settings());
    assert_eq!(seen(&rig), ("waiting_for_credentials", false, false, false));
    let _ = rig.on(pair(A));
    let _ = rig.on(Event::StoreRead { token: Some(stored("s")), attempt_ages: vec![], tried_since: false });
    assert_eq!(seen(&rig), ("verifying", false, true, false));
    let _ = rig.on(candidate_is(ProbeResult::Alive));
    assert_eq!(seen(&rig), ("usable", false, false, false));
    let _ = rig.reject(1, FORBIDDEN);
    let _ = rig.probed(1, ProbeResult::Dead);
    assert_eq!(seen(&rig), ("minting", true, false, true));
    assert_eq!(rig.machine.held_back_by(rig.now), None, "what is under way is not held back");
    let _ = rig.on(minted("t2"));
    assert_eq!(seen(&rig), ("usable", false, false, false));
    assert_eq!(rig.machine.held_back_by(rig.now), None, "what nobody wants is not held back");
    assert_eq!(
        [TokenSource::Minted, TokenSource::Store, TokenSource::TokenFile].map(TokenSource::label),
        ["minted", "store", "token_file"]
    );
}

/// `/status` shows the budget anew when an attempt leaves its window.
#[test]
fn the_budget_grows_when_the_oldest_attempt_is_an_hour_old() {
    let mut rig = Rig::minting();
    assert_eq!(rig.machine.budget_grows(rig.now), None);
    let first = rig.now;
    let _ = rig.on(minted("t1"));
    rig.now += MINUTE;
    let _ = rig.on(Event::RefreshRequested);
    let _ = rig.on(minted("t2"));
    assert_eq!((rig.machine.budget_grows(rig.now), rig.machine.mints_left(rig.now)), (Some(first + HOUR), 1));
    rig.now = first + HOUR;
    assert_eq!((rig.machine.budget_grows(rig.now), rig.machine.mints_left(rig.now)), (Some(first + HOUR + MINUTE), 2));
    rig.now += MINUTE;
    assert_eq!((rig.machine.budget_grows(rig.now), rig.machine.mints_left(rig.now)), (None, 3));
}

// ---- start ----

#[test]
fn c34_waits_for_credentials() {
    let mut rig = Rig::new(settings());
    assert_eq!(rig.on(Event::CredentialsChanged(Credentials::Missing)), [""; 0]);
    assert_eq!((rig.sees(), rig.machine.deadline(rig.now)), (("waiting_for_credentials", None, 0), None));
    assert_eq!(rig.on(pair(A)), ["read store with 1"]);
    assert_eq!(rig.sees().0, "starting");
}

/// C10: a stored token is used without minting, once a probe did not find it dead.
#[test]
fn c10_a_stored_token_is_verified_then_used() {
    for result in [ProbeResult::Alive, ProbeResult::Inconclusive] {
        let mut rig = Rig::new(settings());
        let _ = rig.on(pair(A));
        let read = Event::StoreRead { token: Some(stored("s")), attempt_ages: vec![SECOND], tried_since: false };
        assert_eq!(rig.on(read), ["verify s"]);
        assert_eq!(rig.sees(), ("verifying", None, 0));
        assert_eq!(rig.on(candidate_is(result)), [""; 0]);
        assert_eq!(rig.sees(), using("usable", "s", 1), "{result:?}");
        assert_eq!(rig.machine.deadline(rig.now), None);
    }
}

/// C30: a stored token of other credentials is forgotten; the attempts that the store remembers still count.
#[test]
fn c30_a_dead_stored_token_makes_way_for_a_mint() {
    let mut rig = Rig::new(settings());
    let _ = rig.on(pair(A));
    let _ = rig.on(Event::StoreRead { token: Some(stored("s")), attempt_ages: vec![20 * SECOND], tried_since: false });
    // It was minted with other credentials, as far as anyone can tell: these are new ones, whatever the store remembers.
    assert_eq!(rig.on(candidate_is(ProbeResult::Dead)), ["mint with 1"]);
}

/// C10: they are new for one attempt alone, and not at all where the token could not be asked about: else a crash loop beside a dead token never paused.
#[test]
fn c10_a_dead_stored_token_sets_the_interval_aside_once() {
    let read = |tried_since| Event::StoreRead { token: Some(stored("s")), attempt_ages: vec![20 * SECOND], tried_since };
    let mut rig = Rig::new(settings());
    let _ = rig.on(pair(A));
    let _ = rig.on(read(true));
    assert_eq!(rig.on(candidate_is(ProbeResult::Dead)), [""; 0]);
    rig.waits(40 * SECOND, "mint with 1 in its turn");

    let mut rig = Rig::new(settings());
    let _ = rig.on(pair(A));
    let _ = rig.on(read(false));
    let _ = rig.on(candidate_is(ProbeResult::Inconclusive));
    let _ = rig.reject(1, Rejection::Unauthorized);
    assert_eq!(rig.probed(1, ProbeResult::Dead), ["1: relay"]);
    rig.waits(40 * SECOND, "mint with 1 in its turn");
}

/// A stored token that was used in doubt, and reads differently with the right credentials, is one token still: it is not superseded by itself.
#[test]
fn c30_another_reading_of_a_token_does_not_supersede_it() {
    let mut rig = Rig::new(settings());
    let _ = rig.on(pair(A));
    let _ = rig.on(Event::StoreRead { token: Some(stored("s")), attempt_ages: vec![], tried_since: false });
    let _ = rig.on(candidate_is(ProbeResult::Inconclusive));
    assert_eq!(rig.on(pair(B)), ["mint with 2"]);
    let TokenRecord { created, source, .. } = *token("s", TokenSource::Store);
    let authorization = AuthorizationValue::new(&Token::new("its-right-reading".to_owned()).unwrap());
    let right = Arc::new(TokenRecord { authorization, id: None, name: Some("s".to_owned()), created, source });
    assert_eq!(rig.on(Event::StoreAdopted(Candidate { token: right, age: Duration::ZERO })), ["verify s"]);
    assert_eq!(rig.on(candidate_is(ProbeResult::Alive)), [""; 0]);
    assert_eq!(rig.sees(), using("usable", "s", 2));
}

/// A crash loop with a store stays inside the budget.
#[test]
fn c10_the_budget_survives_a_restart() {
    let mut rig = Rig::new(settings());
    let _ = rig.on(pair(A));
    let ages = [10, 20, 50].map(|minutes| minutes * MINUTE).to_vec();
    assert_eq!(rig.on(Event::StoreRead { token: None, attempt_ages: ages, tried_since: false }), [""; 0]);
    assert_eq!((rig.machine.held_back_by(rig.now), rig.machine.mints_left(rig.now)), (Some(HeldBackBy::Budget), 0));
    rig.waits(10 * MINUTE, "mint with 1 in its turn");
}

#[test]
fn a_store_read_with_replaced_credentials_is_read_again() {
    let mut rig = Rig::new(settings());
    let _ = rig.on(pair(A));
    assert_eq!(rig.on(pair(B)), [""; 0]);
    assert_eq!(
        rig.on(Event::StoreRead { token: Some(stored("garbage")), attempt_ages: vec![], tried_since: false }),
        ["read store with 2"]
    );
}

// ---- mint ----

/// C01: what certainly left no token is paced by backoff alone, for ever.
#[test]
fn c01_network_failures_are_retried_for_ever() {
    let mut rig = Rig::minting();
    for _ in 0..50 {
        let _ = rig.on(failed(RETRY));
        assert_eq!((rig.machine.situation().label(), rig.machine.held_back_by(rig.now)), ("waiting_to_mint", Some(HeldBackBy::Failure)));
        rig.waits(Duration::from_millis(500), "mint with 1");
    }
    assert_eq!(rig.machine.mints_left(rig.now), 3);
}

/// C04, C06: one confirming try after 60 s, then hourly, at once when the credentials change.
#[test]
fn c04_rejected_credentials() {
    let mut rig = Rig::minting();
    for pause in [MINUTE, HOUR, HOUR] {
        let _ = rig.on(failed(MintFailure::Rejected));
        assert_eq!(rig.sees(), ("credentials_rejected", None, 0));
        assert!(!rig.machine.is_pending_rejected(), "no token serves on");
        rig.waits(pause, "mint with 1");
    }
    let _ = rig.on(failed(MintFailure::Rejected));
    assert_eq!(rig.on(pair(A)), [""; 0], "the same content again is no change");
    assert_eq!(rig.on(pair(B)), ["mint with 2"]);
    assert_eq!(rig.machine.mints_left(rig.now), 3);
}

/// C11, C12: an attempt that may have left a token behind counts.
#[test]
fn c11_lost_and_invalid_mints_count() {
    for failure in [MintFailure::Lost, MintFailure::Invalid] {
        let mut rig = Rig::minting();
        let _ = rig.on(failed(failure));
        assert_eq!(rig.machine.mints_left(rig.now), 2, "{failure:?}");
        rig.waits(MINUTE, "mint with 1 in its turn");
        let _ = rig.on(failed(failure));
        rig.waits(MINUTE, "mint with 1 in its turn");
        let _ = rig.on(failed(failure));
        assert_eq!(rig.machine.held_back_by(rig.now), Some(HeldBackBy::Budget));
        rig.waits(58 * MINUTE, "mint with 1 in its turn");
    }
}

#[test]
fn without_an_interval_lost_mints_back_off_alone() {
    let limits = MintLimits { interval: Duration::ZERO, budget: 3 };
    let mut rig = Rig::minting_with(Settings { limits, ..settings() });
    let _ = rig.on(failed(MintFailure::Lost));
    rig.waits(Duration::from_millis(500), "mint with 1 in its turn");
}

/// One mint for several processes on one store: the others take what the first one stored.
#[test]
fn c31_another_process_minted() {
    let mut rig = Rig::minting();
    assert_eq!(rig.on(Event::StoreAdopted(stored("theirs"))), ["verify theirs"]);
    let _ = rig.on(candidate_is(ProbeResult::Alive));
    assert_eq!((rig.sees(), rig.machine.mints_left(rig.now)), (using("usable", "theirs", 1), 3));

    let mut rig = Rig::minting();
    let _ = rig.on(Event::StoreAdopted(stored("garbage")));
    assert_eq!(rig.on(candidate_is(ProbeResult::Dead)), ["mint with 1"]);
    let _ = rig.on(failed(MintFailure::Deferred { wait: 7 * SECOND }));
    rig.waits(7 * SECOND, "mint with 1");
}

/// A renewal does not swap a token that works for one that nobody could ask about.
#[test]
fn an_unverified_token_does_not_replace_a_working_one() {
    let mut rig = Rig::usable();
    let _ = rig.on(pair(B));
    let _ = rig.on(Event::StoreAdopted(stored("theirs")));
    let _ = rig.on(candidate_is(ProbeResult::Inconclusive));
    assert_eq!(rig.sees(), using("usable", "t1", 1));
    rig.waits(Duration::from_millis(500), "verify theirs");
    let _ = rig.on(candidate_is(ProbeResult::Inconclusive));
    // The old token dies: the other one is asked about at once, and used in doubt.
    let _ = rig.reject(1, FORBIDDEN);
    assert_eq!(rig.probed(1, ProbeResult::Dead), ["verify theirs"]);
    assert_eq!(rig.on(candidate_is(ProbeResult::Inconclusive)), ["bury t1", "1: replay with 2"]);
    assert_eq!(rig.sees(), using("usable", "theirs", 2));
}

/// Asked about at once when the old token dies, and dead as well: the new credentials keep their exemption.
#[test]
fn an_unverified_token_that_is_dead_makes_way_for_a_mint() {
    let mut rig = Rig::minting();
    let _ = rig.on(minted("t1"));
    let _ = rig.on(pair(B));
    let _ = rig.on(Event::StoreAdopted(stored("theirs")));
    let _ = rig.on(candidate_is(ProbeResult::Inconclusive));
    let _ = rig.reject(1, FORBIDDEN);
    assert_eq!(rig.probed(1, ProbeResult::Dead), ["verify theirs"]);
    assert_eq!(rig.on(candidate_is(ProbeResult::Dead)), ["mint with 2"]);
}

/// To ask about a token leaves none behind: the interval has no say.
#[test]
fn an_unverified_token_is_asked_about_within_the_interval() {
    let mut rig = Rig::minting_with(Settings { max_age: Some(10 * MINUTE), ..settings() });
    let _ = rig.on(minted("t1"));
    rig.waits(10 * MINUTE, "mint with 1 in its turn");
    let _ = rig.on(failed(MintFailure::Lost));
    assert_eq!(rig.on(Event::RefreshRequested), ["mint with 1 as asked", "refresh begins"]);
    assert_eq!(rig.on(Event::StoreAdopted(stored("theirs"))), ["verify theirs"]);
    let _ = rig.on(candidate_is(ProbeResult::Inconclusive));
    rig.waits(Duration::from_millis(500), "verify theirs");
}

// ---- rejection ----

/// C18, C19: an honest 403 is relayed; the next probe waits.
#[test]
fn c18_an_honest_403_is_relayed_and_holds() {
    let mut rig = Rig::probing();
    assert_eq!(rig.reject(1, FORBIDDEN), [""; 0], "shares the probe");
    assert_eq!(rig.sees(), using("probing", "t1", 1));
    assert_eq!(rig.probed(1, ProbeResult::Alive), ["1: relay", "2: relay"]);
    rig.now += 29 * SECOND;
    assert_eq!(rig.reject(1, FORBIDDEN), ["3: relay"]);
    assert_eq!(rig.reject(1, UNAUTHORIZED), ["4: relay"]);
    rig.now += SECOND;
    assert_eq!(rig.reject(1, FORBIDDEN), ["probe generation 1"]);
}

/// C20, C22: a dead token is never sent again; one mint replaces it, all who saw it are replayed.
#[test]
fn c20_a_dead_token_is_replaced_and_the_requests_replayed() {
    let mut rig = Rig::probing();
    let _ = rig.reject(1, UNAUTHORIZED);
    assert_eq!(rig.probed(1, ProbeResult::Dead), ["mint with 1 in its turn"]);
    assert_eq!(rig.sees(), ("minting", None, 1));
    assert_eq!(rig.reject(1, FORBIDDEN), [""; 0], "waits for the successor");
    assert_eq!(rig.on(minted("t2")), ["bury t1", "1: replay with 2", "2: replay with 2", "3: replay with 2"]);
    assert_eq!(rig.sees(), using("usable", "t2", 2));
    assert_eq!(rig.reject(1, FORBIDDEN), ["4: replay with 2"], "a late one mints nothing");
}

/// A late rejection waits where the newer token is itself in doubt.
#[test]
fn c22_a_late_rejection_waits_for_the_probe() {
    for (result, expected) in [
        (ProbeResult::Alive, &["1: relay", "2: replay with 2"][..]),
        (ProbeResult::Inconclusive, &["1: relay", "2: replay with 2"]),
        (ProbeResult::Dead, &["mint with 1 in its turn"]),
    ] {
        let mut rig = Rig::usable();
        let _ = rig.on(Event::RefreshRequested);
        assert_eq!(rig.on(minted("t2")), ["supersede t1"]);
        rig.now += HOUR;
        assert_eq!(rig.reject(2, FORBIDDEN), ["probe generation 2"]);
        assert_eq!(rig.reject(1, UNAUTHORIZED), [""; 0]);
        assert_eq!(rig.probed(2, result), expected);
    }
}

#[test]
fn c24_an_inconclusive_probe_keeps_the_token_after_a_403() {
    let mut rig = Rig::probing();
    assert_eq!(rig.probed(1, ProbeResult::Inconclusive), ["1: relay"]);
    assert_eq!(rig.sees(), using("usable", "t1", 1));
    assert_eq!(rig.reject(1, FORBIDDEN), ["2: relay"], "holds");
    // A 401 within the hold counts as it would have counted for the probe.
    assert_eq!(rig.reject(1, UNAUTHORIZED), ["mint with 1 in its turn"]);
}

#[test]
fn c17_an_inconclusive_probe_after_a_401_counts_as_dead() {
    let mut rig = Rig::probing();
    let _ = rig.reject(1, UNAUTHORIZED);
    assert_eq!(rig.probed(1, ProbeResult::Inconclusive), ["1: relay", "mint with 1 in its turn"]);
    assert_eq!(rig.on(minted("t2")), ["supersede t1", "2: replay with 2"], "not proven dead, so it may be worth revoking");
}

/// C23: rejected within the interval of its mint.
#[test]
fn c23_a_young_token_is_not_replaced_before_its_turn() {
    let mut rig = Rig::minting();
    let _ = rig.on(minted("t1"));
    rig.now += 10 * SECOND;
    let _ = rig.reject(1, FORBIDDEN);
    assert_eq!(rig.probed(1, ProbeResult::Dead), ["1: relay"]);
    assert_eq!(rig.sees(), ("waiting_to_mint", None, 1));
    assert_eq!(rig.reject(1, FORBIDDEN), ["2: relay"]);
    rig.waits(50 * SECOND, "mint with 1 in its turn");
    assert_eq!(rig.reject(1, FORBIDDEN), [""; 0]);
    assert_eq!(rig.on(minted("t2")), ["bury t1", "3: replay with 2"]);
}

#[test]
fn c23_with_the_budget_spent_a_dead_token_waits() {
    let mut rig = Rig::minting();
    for generation in 1..=3 {
        let _ = rig.on(minted(&format!("t{generation}")));
        rig.now += 2 * MINUTE;
        let _ = rig.reject(generation, FORBIDDEN);
        let _ = rig.probed(generation, ProbeResult::Dead);
    }
    assert_eq!((rig.sees(), rig.machine.held_back_by(rig.now)), (("waiting_to_mint", None, 3), Some(HeldBackBy::Budget)));
    rig.waits(54 * MINUTE, "mint with 1 in its turn");
}

#[test]
fn a_failed_mint_relays_to_those_who_waited() {
    let mut rig = Rig::probing();
    let _ = rig.probed(1, ProbeResult::Dead);
    assert_eq!(rig.on(failed(RETRY)), ["1: relay"]);
}

#[test]
fn the_probe_of_a_replaced_token_says_nothing() {
    let mut rig = Rig::probing();
    let _ = rig.on(pair(B));
    assert_eq!(rig.on(minted("t2")), ["supersede t1", "1: replay with 2"]);
    assert_eq!(rig.probed(1, ProbeResult::Dead), [""; 0]);
    assert_eq!(rig.sees(), using("usable", "t2", 2));
    assert_eq!(rig.reject(2, FORBIDDEN), ["probe generation 2"]);
    assert_eq!(rig.probed(1, ProbeResult::Dead), [""; 0]);
    assert_eq!(rig.sees(), using("probing", "t2", 2));
}

/// The death of a token does not cut short what a failed renewal asked for.
#[test]
fn a_dead_token_waits_for_the_backoff_of_its_renewal() {
    let mut rig = Rig::minting_with(Settings { max_age: Some(2 * HOUR), ..settings() });
    let _ = rig.on(minted("t1"));
    rig.waits(2 * HOUR, "mint with 1 in its turn");
    let _ = rig.on(failed(MintFailure::Retry { retry_after: Some(MINUTE) }));
    let _ = rig.reject(1, FORBIDDEN);
    assert_eq!(rig.probed(1, ProbeResult::Dead), ["1: relay"]);
    rig.waits(MINUTE, "mint with 1 in its turn");
}

// ---- rotation, renewal, refresh ----

/// C40: make before break, at once although the interval is not over.
#[test]
fn c40_new_credentials_mint_a_successor_while_the_old_token_serves() {
    let mut rig = Rig::minting();
    let _ = rig.on(minted("t1"));
    assert_eq!(rig.on(pair(B)), ["mint with 2"]);
    assert_eq!(rig.sees(), using("renewing", "t1", 1));
    let _ = rig.on(failed(RETRY));
    assert_eq!(rig.sees(), using("usable", "t1", 1));
    rig.waits(Duration::from_millis(500), "mint with 2");
    assert_eq!(rig.on(minted("t2")), ["supersede t1"]);
    assert_eq!(rig.sees(), using("usable", "t2", 2));
    // The exemption is used up.
    let _ = rig.reject(2, FORBIDDEN);
    assert_eq!(rig.probed(2, ProbeResult::Dead), ["1: relay"]);
}

/// C41: rejected new credentials leave the old token in use.
#[test]
fn c41_rejected_new_credentials_are_pending() {
    let mut rig = Rig::usable();
    let _ = rig.on(pair(B));
    let _ = rig.on(failed(MintFailure::Rejected));
    assert_eq!((rig.sees(), rig.machine.is_pending_rejected()), (using("usable", "t1", 1), true));
    rig.waits(MINUTE, "mint with 2");
    let _ = rig.on(failed(MintFailure::Rejected));
    assert_eq!(rig.on(Event::CredentialsChanged(Credentials::Missing)), [""; 0]);

    // Then the old token dies: nothing is left, and the rejected credentials keep their pace.
    let _ = rig.reject(1, FORBIDDEN);
    assert_eq!(rig.probed(1, ProbeResult::Dead), ["1: relay"]);
    assert_eq!(rig.sees(), ("credentials_rejected", None, 1));
    rig.waits(HOUR, "mint with 2");
}

#[test]
fn c41_back_to_the_credentials_of_the_token_in_use() {
    let mut rig = Rig::usable();
    let _ = rig.on(pair(B));
    let _ = rig.on(failed(MintFailure::Rejected));
    assert!(rig.machine.refers_to(A), "the token in use is theirs");
    assert_eq!(rig.on(pair(A)), [""; 0], "no mint is needed");
    assert!(!rig.machine.is_pending_rejected() && !rig.machine.refers_to(B));
    assert_eq!(rig.machine.deadline(rig.now), None);
}

/// There and back while a mint is in flight: its token is the worse one.
#[test]
fn a_token_of_replaced_credentials_is_used_only_in_need() {
    let mut rig = Rig::usable();
    let _ = rig.on(pair(B));
    let _ = rig.on(pair(A));
    assert!(rig.machine.refers_to(B), "the mint in flight is theirs");
    assert_eq!(rig.on(minted("t2")), ["supersede t2"]);
    assert!(!rig.machine.refers_to(B));
    assert_eq!(rig.sees(), using("usable", "t1", 1));

    let mut rig = Rig::minting();
    let _ = rig.on(pair(B));
    assert_eq!(rig.on(minted("t1")), ["mint with 2"]);
    assert_eq!(rig.sees(), using("renewing", "t1", 1));
}

#[test]
fn the_failure_of_replaced_credentials_does_not_slow_the_new_ones() {
    for failure in [MintFailure::Rejected, RETRY, MintFailure::Lost, MintFailure::Deferred { wait: HOUR }] {
        let mut rig = Rig::minting();
        let _ = rig.on(pair(B));
        assert_eq!(rig.on(failed(failure)), ["mint with 2"], "{failure:?}");
    }
}

#[test]
fn a_token_over_max_age_is_renewed_while_it_serves() {
    let mut rig = Rig::minting_with(Settings { max_age: Some(10 * MINUTE), ..settings() });
    let _ = rig.on(minted("t1"));
    rig.waits(10 * MINUTE, "mint with 1 in its turn");
    assert_eq!(rig.sees(), using("renewing", "t1", 1));
    let _ = rig.on(failed(MintFailure::Lost));
    rig.waits(MINUTE, "mint with 1 in its turn");
    assert_eq!(rig.on(minted("t2")), ["supersede t1"]);

    let mut old = Rig::new(Settings { max_age: Some(10 * MINUTE), ..settings() });
    let _ = old.on(pair(A));
    let token = Candidate { age: 8 * MINUTE, ..stored("s") };
    let _ = old.on(Event::StoreRead { token: Some(token), attempt_ages: vec![8 * MINUTE], tried_since: false });
    let _ = old.on(candidate_is(ProbeResult::Alive));
    old.waits(2 * MINUTE, "mint with 1 in its turn");
}

/// What holds a renewal back can be told from the moment at which it is due, although nothing is to be done then.
#[test]
fn a_renewal_that_is_held_back_is_due_all_the_same() {
    let limits = MintLimits { interval: Duration::ZERO, budget: 1 };
    let mut rig = Rig::minting_with(Settings { max_age: Some(10 * MINUTE), limits, ..settings() });
    assert_eq!(rig.machine.renewal_due(rig.now), None, "no token is in use");
    let _ = rig.on(minted("t1"));
    let due = rig.now + 10 * MINUTE;
    assert_eq!((rig.machine.renewal_due(rig.now), rig.machine.deadline(rig.now)), (Some(due), Some(rig.now + HOUR)));
    assert_eq!(rig.machine.held_back_by(rig.now), None);
    rig.now = due;
    assert_eq!((rig.machine.renewal_due(rig.now), rig.machine.held_back_by(rig.now)), (None, Some(HeldBackBy::Budget)));
    assert_eq!(rig.sees(), using("usable", "t1", 1));
    let _ = rig.on(Event::Shutdown);
    assert_eq!(rig.machine.renewal_due(due - MINUTE), None, "nothing new is begun");
}

#[test]
fn refresh_sets_the_interval_aside_but_not_the_budget() {
    let mut rig = Rig::minting();
    assert_eq!(rig.on(Event::RefreshRequested), ["refresh begins"], "joins the mint in flight");
    let _ = rig.on(minted("t1"));
    for name in ["t2", "t3"] {
        assert_eq!(rig.on(Event::RefreshRequested), ["mint with 1 as asked", "refresh begins"]);
        let _ = rig.on(minted(name));
    }
    rig.now += MINUTE;
    assert_eq!(rig.on(Event::RefreshRequested), ["refresh in 3540 s"]);
    assert_eq!(rig.sees(), using("usable", "t3", 3));
}

/// B46: whoever reaches the admin server cannot have a wrong password presented until the account is locked.
#[test]
fn b46_refresh_does_not_present_rejected_credentials_again() {
    let mut rig = Rig::minting();
    let _ = rig.on(failed(MintFailure::Rejected));
    rig.now += MINUTE / 2;
    assert_eq!(rig.on(Event::RefreshRequested), ["rejected for 30 s"]);
    assert_eq!(rig.on(pair(B)), ["mint with 2"], "other credentials are tried at once");
    let _ = rig.on(minted("t1"));
    assert_eq!(rig.on(Event::RefreshRequested), ["mint with 2 as asked", "refresh begins"]);
    let _ = rig.on(failed(MintFailure::Rejected));
    rig.now += MINUTE;
    assert_eq!(rig.on(Event::RefreshRequested), ["mint with 2 as asked", "refresh begins"], "the confirming try is due");
}

#[test]
fn refresh_sets_the_backoff_aside() {
    let mut rig = Rig::minting();
    let _ = rig.on(failed(RETRY));
    assert_eq!(rig.on(Event::RefreshRequested), ["mint with 1 as asked", "refresh begins"]);
}

#[test]
fn refresh_needs_something_to_mint_with() {
    let mut rig = Rig::new(settings());
    assert_eq!(rig.on(Event::RefreshRequested), ["no credentials could be read yet"]);
    let _ = rig.on(token_file(A, "f"));
    assert_eq!(rig.on(Event::RefreshRequested), ["credentials.token_file is set: nothing is ever minted"]);
}

// ---- token file ----

/// C49: never mints; a dead one is "token rejected" until its file changes.
#[test]
fn c49_a_token_file_never_mints() {
    let mut rig = Rig::new(settings());
    assert_eq!(rig.on(token_file(A, "f1")), [""; 0]);
    assert_eq!(rig.sees(), using("usable", "f1", 1), "used unseen at start");
    let _ = rig.reject(1, FORBIDDEN);
    assert_eq!(rig.probed(1, ProbeResult::Dead), ["reload", "1: relay"]);
    assert_eq!(rig.sees(), ("token_rejected", None, 1));
    assert_eq!(rig.on(token_file(A, "f1")), [""; 0], "the same content");
    rig.waits(MINUTE, "verify f1");
    let _ = rig.on(candidate_is(ProbeResult::Inconclusive));
    assert_eq!(rig.sees(), ("token_rejected", None, 1), "no news about a token known to be dead");
    rig.waits(Duration::from_millis(500), "verify f1");
    let _ = rig.on(candidate_is(ProbeResult::Dead));
    rig.waits(HOUR, "verify f1");
    assert_eq!(rig.on(token_file(B, "f2")), ["bury f1"], "used at once");
    assert_eq!(rig.sees(), using("renewing", "f2", 2), "the old content is still being asked about");
    assert_eq!(rig.on(candidate_is(ProbeResult::Alive)), [""; 0]);
    assert_eq!(rig.sees(), using("usable", "f2", 2));
}

#[test]
fn c49_a_new_token_file_is_verified_while_the_old_one_works() {
    let mut rig = Rig::new(settings());
    let _ = rig.on(token_file(A, "f1"));
    assert_eq!(rig.on(token_file(B, "f2")), ["verify f2"]);
    assert_eq!(rig.on(candidate_is(ProbeResult::Dead)), [""; 0]);
    assert_eq!((rig.sees(), rig.machine.is_pending_rejected()), (using("usable", "f1", 1), true));
    rig.waits(MINUTE, "verify f2");
    assert_eq!(rig.on(candidate_is(ProbeResult::Alive)), ["supersede f1"]);
    assert_eq!((rig.sees(), rig.machine.is_pending_rejected()), (using("usable", "f2", 2), false));
}

/// What was found about the old content says nothing about the new one.
#[test]
fn c49_the_verdict_on_a_replaced_token_file_is_dropped() {
    for result in [ProbeResult::Dead, ProbeResult::Inconclusive] {
        let mut rig = Rig::new(settings());
        let _ = rig.on(token_file(A, "f1"));
        assert_eq!(rig.on(token_file(B, "f2")), ["verify f2"]);
        assert!(!rig.machine.is_outdated());
        assert_eq!(rig.on(token_file(CredentialsId(3), "f3")), [""; 0]);
        assert!(rig.machine.is_outdated());
        assert_eq!(rig.on(candidate_is(result)), ["verify f3"], "{result:?}");
        assert!(!rig.machine.is_outdated());
        assert_eq!((rig.sees(), rig.machine.is_pending_rejected()), (using("renewing", "f1", 1), false));
    }
}

/// The old content dies before the new one could be asked about: it is asked about again at once, and used in doubt.
#[test]
fn c49_a_new_token_file_in_doubt_is_used_once_the_old_one_is_dead() {
    let mut rig = Rig::new(settings());
    let _ = rig.on(token_file(A, "f1"));
    let _ = rig.on(token_file(B, "f2"));
    let _ = rig.on(candidate_is(ProbeResult::Inconclusive));
    assert_eq!(rig.sees(), using("usable", "f1", 1));
    let _ = rig.reject(1, FORBIDDEN);
    assert_eq!(rig.probed(1, ProbeResult::Dead), ["verify f2"]);
    assert_eq!(rig.on(candidate_is(ProbeResult::Inconclusive)), ["bury f1", "1: replay with 2"]);
    assert_eq!(rig.sees(), using("usable", "f2", 2));
}

/// A new content that was found dead stays what it is when the old one dies too.
#[test]
fn c49_a_rejected_token_file_keeps_its_pace() {
    let mut rig = Rig::new(settings());
    let _ = rig.on(token_file(A, "f1"));
    let _ = rig.on(token_file(B, "f2"));
    let _ = rig.on(candidate_is(ProbeResult::Dead));
    let _ = rig.reject(1, FORBIDDEN);
    assert_eq!(rig.probed(1, ProbeResult::Dead), ["1: relay"]);
    rig.waits(MINUTE, "verify f2");
    let _ = rig.on(candidate_is(ProbeResult::Inconclusive));
    assert_eq!(rig.sees(), ("token_rejected", None, 1));
}

#[test]
fn from_a_pair_to_a_token_file_and_back() {
    let mut rig = Rig::usable();
    assert_eq!(rig.on(token_file(B, "f")), ["verify f"]);
    assert_eq!(rig.on(candidate_is(ProbeResult::Alive)), ["supersede t1"]);
    assert_eq!(rig.on(pair(A)), ["mint with 1"]);
    assert_eq!(rig.on(minted("t2")), ["supersede f"]);
    assert_eq!(rig.sees(), using("usable", "t2", 3));
}

// ---- shutdown ----

/// C43: nothing new is begun, waiters are answered, a mint in flight is still taken.
#[test]
fn c43_shutdown_answers_the_waiters_and_takes_the_mint_in_flight() {
    let mut rig = Rig::probing();
    let _ = rig.probed(1, ProbeResult::Dead);
    assert_eq!(rig.on(Event::Shutdown), ["1: relay"]);
    assert_eq!(rig.reject(1, FORBIDDEN), ["2: relay"]);
    assert_eq!(rig.on(minted("t2")), ["bury t1"]);
    assert_eq!(rig.sees(), using("usable", "t2", 2));
    assert_eq!(rig.on(pair(B)), [""; 0]);
    assert_eq!(rig.on(Event::RefreshRequested), ["the proxy is stopping"]);

    let mut rig = Rig::probing();
    assert_eq!(rig.on(Event::Shutdown), ["1: relay"]);

    let mut rig = Rig::minting();
    let _ = rig.on(Event::Shutdown);
    assert_eq!(rig.on(failed(RETRY)), [""; 0]);
    assert_eq!(rig.machine.deadline(rig.now), None);
}

/// A result that nobody asked for changes nothing.
#[test]
fn stray_events_change_nothing() {
    let mut rig = Rig::usable();
    for event in [
        minted("x"),
        failed(MintFailure::Rejected),
        candidate_is(ProbeResult::Alive),
        Event::StoreAdopted(stored("x")),
        Event::StoreRead { token: Some(stored("x")), attempt_ages: vec![SECOND; 9], tried_since: false },
        Event::Probed(Subject::InUse(1), ProbeResult::Dead),
        Event::TimerFired,
    ] {
        assert_eq!(rig.on(event.clone()), [""; 0], "{event:?}");
        assert_eq!((rig.sees(), rig.machine.mints_left(rig.now)), (using("usable", "t1", 1), 3));
    }
}
