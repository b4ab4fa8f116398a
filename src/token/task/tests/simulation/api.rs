//! The upstream: which passwords and tokens are good, and what the way there does to a request.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use fastrand::Rng;
use http::StatusCode;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

use super::process::{Host, Life};
use super::world::{Point, World, ms, pick};
use crate::credentials::Pair;
use crate::secret::{AuthorizationValue, Token};
use crate::token::effects::Upstream;
use crate::token::mint::{Display, Minted, Outcome, ProbeOutcome, RevokeError};
use crate::upstream::single;

/// `upstream.connect_timeout`
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// `token.mint_timeout`
const TIMEOUT: Duration = Duration::from_secs(15);

/// What the way to the upstream is like, and the upstream itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Weather {
    Fine,
    Refused,
    Partition,
    /// Some requests do not arrive, some replies do not come back.
    Losing,
    /// Up to 30 s each way.
    Slow,
    Throttled(Option<Duration>),
    Broken,
    /// Something in front answers 4xx other than 401 and 403.
    Refusing,
    /// 2xx, and a body that is of no use.
    Garbage,
    /// Each operation meets another one of these.
    Mixed,
}

impl Weather {
    pub(super) fn draw(rng: &mut Rng) -> Self {
        let seconds = pick(rng, &[0, 1, 30, 600, 100_000]);
        let asked = if rng.bool() { Some(Duration::from_secs(seconds)) } else { None };
        pick(
            rng,
            &[
                Self::Refused,
                Self::Partition,
                Self::Losing,
                Self::Losing,
                Self::Slow,
                Self::Throttled(asked),
                Self::Broken,
                Self::Refusing,
                Self::Garbage,
                Self::Mixed,
                Self::Mixed,
            ],
        )
    }
}

/// What becomes of one request.
enum Fate {
    NotConnected(Duration),
    /// It is sent. `there`: it arrives after this. `back`: so does its reply. Nothing comes when either is missing: a reset after a while, or silence.
    Sent {
        there: Option<Duration>,
        back: Option<Duration>,
        silence: Duration,
    },
    Status(StatusCode, Option<Duration>, Duration),
    Garbage {
        there: Duration,
    },
}

#[derive(Debug)]
struct TokenFacts {
    /// Of the pair that minted it; none for one made in the UI.
    password: Option<u8>,
    works_from: Instant,
    revoked: Option<Instant>,
}

pub(super) struct Api {
    pub(super) weather: Cell<Weather>,
    /// 401 from a gateway in front, whatever the token.
    pub(super) unauthorized: Cell<bool>,
    /// New tokens work at once.
    pub(super) all_is_well: Cell<bool>,
    partitioned: RefCell<Vec<bool>>,
    good: RefCell<BTreeSet<u8>>,
    tokens: RefCell<BTreeMap<String, TokenFacts>>,
    names: Cell<u32>,
}

/// The secret behind a token's name.
pub(super) fn secret(name: &str) -> Token {
    Token::new(format!("secret-of-{name}")).expect("it can be sent")
}

/// The name behind a token's secret.
pub(super) fn name_of(authorization: &AuthorizationValue) -> String {
    let value = authorization.header();
    value.to_str().expect("it is ASCII").trim_start_matches("secret-of-").to_owned()
}

/// Passwords are `p` and a number.
pub(super) fn number_of(pair: &Pair) -> u8 {
    pair.password.expose()[1..].parse().expect("the simulation made it")
}

fn unreachable() -> RevokeError {
    RevokeError::NoReply(single::Error::NotSent("no connection".to_owned()))
}

impl Api {
    pub(super) fn new(processes: usize) -> Self {
        Self {
            weather: Cell::new(Weather::Fine),
            unauthorized: Cell::new(false),
            all_is_well: Cell::new(false),
            partitioned: RefCell::new(vec![false; processes]),
            good: RefCell::default(),
            tokens: RefCell::default(),
            names: Cell::new(0),
        }
    }

    pub(super) fn partition(&self, process: usize, is: bool) {
        self.partitioned.borrow_mut()[process] = is;
    }

    pub(super) fn accept(&self, password: u8, good: bool) {
        if good {
            self.good.borrow_mut().insert(password);
        } else {
            self.good.borrow_mut().remove(&password);
        }
    }

    pub(super) fn accepts(&self, password: u8) -> bool {
        self.good.borrow().contains(&password)
    }

    pub(super) fn make(&self, name: &str, password: Option<u8>, works_from: Instant) {
        self.tokens.borrow_mut().insert(name.to_owned(), TokenFacts { password, works_from, revoked: None });
    }

    pub(super) fn revoke(&self, name: &str) {
        if let Some(token) = self.tokens.borrow_mut().get_mut(name) {
            token.revoked.get_or_insert_with(Instant::now);
        }
    }

    pub(super) fn names(&self) -> Vec<String> {
        self.tokens.borrow().keys().cloned().collect()
    }

    /// Nobody deleted it. It may not work yet.
    pub(super) fn is_alive(&self, name: &str) -> bool {
        self.tokens.borrow().get(name).is_some_and(|token| token.revoked.is_none())
    }

    pub(super) fn was_alive_within(&self, name: &str, span: Duration) -> bool {
        self.tokens.borrow().get(name).is_some_and(|token| token.revoked.is_none_or(|at| at.elapsed() <= span))
    }

    pub(super) fn password_of(&self, name: &str) -> Option<u8> {
        self.tokens.borrow().get(name)?.password
    }

    fn works(&self, name: &str) -> bool {
        let now = Instant::now();
        self.tokens.borrow().get(name).is_some_and(|token| token.revoked.is_none() && token.works_from <= now)
    }

    fn fate(&self, process: usize, rng: &mut Rng) -> Fate {
        let weather = match self.weather.get() {
            _ if self.partitioned.borrow()[process] => Weather::Partition,
            Weather::Mixed if rng.bool() => Weather::Fine,
            Weather::Mixed => Weather::draw(rng),
            weather => weather,
        };
        let there = ms(rng, 1..60);
        match weather {
            Weather::Fine | Weather::Mixed => Fate::Sent { there: Some(there), back: Some(ms(rng, 1..140)), silence: TIMEOUT },
            Weather::Refused => Fate::NotConnected(there),
            Weather::Partition => Fate::NotConnected(CONNECT_TIMEOUT),
            Weather::Losing => {
                let there = (rng.u8(0..4) > 0).then_some(there);
                let back = rng.bool().then(|| ms(rng, 1..140));
                let silence = if rng.bool() { TIMEOUT * 2 } else { ms(rng, 60..1000) };
                Fate::Sent { there, back, silence }
            }
            Weather::Slow => Fate::Sent { there: Some(ms(rng, 1..30_000)), back: Some(ms(rng, 1..30_000)), silence: TIMEOUT * 2 },
            Weather::Throttled(retry_after) => Fate::Status(StatusCode::TOO_MANY_REQUESTS, retry_after, there),
            Weather::Broken => Fate::Status(pick(rng, &[StatusCode::BAD_GATEWAY, StatusCode::INTERNAL_SERVER_ERROR]), None, there),
            Weather::Refusing => Fate::Status(pick(rng, &[StatusCode::BAD_REQUEST, StatusCode::NOT_FOUND]), None, there),
            Weather::Garbage => Fate::Garbage { there },
        }
    }
}

/// A request on its way: `arrive` is what it does there, whether or not the process lives to see the reply. None: no reply came.
async fn exchange<T: 'static>(
    there: Option<Duration>,
    back: Option<Duration>,
    silence: Duration,
    arrive: impl FnOnce() -> T + 'static,
) -> Option<T> {
    let (reply, replied) = oneshot::channel();
    drop(crate::task::spawn("exchange", async move {
        let Some(there) = there else { return sleep(silence).await };
        sleep(there).await;
        let result = arrive();
        let Some(back) = back else { return sleep(silence).await };
        sleep(back).await;
        let _ = reply.send(result); // who asked may be gone
    }));
    replied.await.ok()
}

impl Upstream for Host {
    fn display(&self) -> Display {
        let number = self.world.api.names.get() + 1;
        self.world.api.names.set(number);
        Display { name: format!("t{number}-"), description: String::new() }
    }

    async fn mint(&self, pair: &Pair, display: &Display) -> Outcome {
        let password = number_of(pair);
        let attempt = self.world.mint_begins(&self.life, password, &display.name);
        let outcome = self.mint_meets_its_fate(password, &display.name).await;
        attempt.ended(&outcome);
        outcome
    }

    async fn probe(&self, authorization: &AuthorizationValue) -> ProbeOutcome {
        let name = name_of(authorization);
        self.world.note(&format!("{} asks about {name}", self.life));
        let outcome = self.probe_meets_its_fate(&name).await;
        self.world.probed(&self.life, &name, &outcome);
        outcome
    }

    fn can_revoke(&self) -> bool {
        self.world.plan.can_revoke
    }

    async fn revoke(&self, id: &str, authorization: &AuthorizationValue) -> Result<(), RevokeError> {
        self.world.revocation(&self.life, id);
        let fate = self.world.api.fate(self.life.process, &mut self.life.rng.borrow_mut());
        let Fate::Sent { there, back, silence } = fate else { return Err(unreachable()) };
        let (world, id, by) = (Rc::clone(&self.world), id.to_owned(), name_of(authorization));
        let arrive = move || {
            if world.api.works(&by) {
                world.api.revoke(&id);
            }
        };
        match timeout(TIMEOUT, exchange(there, back, silence, arrive)).await {
            Ok(Some(())) => Ok(()),
            Ok(None) | Err(_) => Err(unreachable()),
        }
    }
}

impl Host {
    async fn mint_meets_its_fate(&self, password: u8, name: &str) -> Outcome {
        let (fate, works_after) = {
            let mut rng = self.life.rng.borrow_mut();
            let fate = self.world.api.fate(self.life.process, &mut rng);
            // Now and then a new token takes a while to be known everywhere (C23).
            let works_after =
                if rng.u8(0..20) == 0 && !self.world.api.all_is_well.get() { ms(&mut rng, 0..20_000) } else { Duration::ZERO };
            (fate, works_after)
        };
        let lost = |reason: &str| Outcome::Lost { reason: reason.to_owned() };
        let mint = {
            let (world, name) = (Rc::clone(&self.world), name.to_owned());
            move || {
                let good = world.api.accepts(password);
                if good {
                    world.api.make(&name, Some(password), Instant::now() + works_after);
                }
                good
            }
        };
        match fate {
            Fate::NotConnected(after) => {
                sleep(after).await;
                Outcome::Retry { reason: "not sent: no connection".to_owned(), retry_after: None }
            }
            Fate::Status(status, retry_after, after) => {
                sleep(after).await;
                if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
                    Outcome::Retry { reason: format!("HTTP {status}"), retry_after }
                } else {
                    Outcome::Rejected { status }
                }
            }
            Fate::Garbage { there } => {
                if exchange(Some(there), Some(there), TIMEOUT, mint).await == Some(true) {
                    Outcome::Invalid { reason: "the reply is not JSON".to_owned() }
                } else {
                    Outcome::Rejected { status: StatusCode::FORBIDDEN }
                }
            }
            Fate::Sent { there, back, silence } => {
                self.world.pass(&self.life, Point::MintSent).await;
                let world = Rc::clone(&self.world);
                let life = Rc::clone(&self.life);
                let reply = async {
                    let reply = exchange(there, back, silence, mint).await;
                    world.pass(&life, Point::ReplyUnderWay).await;
                    reply
                };
                match timeout(TIMEOUT, reply).await {
                    Err(_) => lost("no complete reply within 15s"),
                    Ok(None) => lost("connection reset"),
                    Ok(Some(false)) => Outcome::Rejected { status: StatusCode::FORBIDDEN },
                    Ok(Some(true)) => {
                        let name = name.to_owned();
                        Outcome::Minted(Minted { token: secret(&name), id: Some(name.clone()), name })
                    }
                }
            }
        }
    }

    async fn probe_meets_its_fate(&self, name: &str) -> ProbeOutcome {
        let inconclusive = |reason: &str| ProbeOutcome::Inconclusive(reason.to_owned());
        let fate = self.world.api.fate(self.life.process, &mut self.life.rng.borrow_mut());
        self.world.pass(&self.life, Point::ProbeSent).await;
        match fate {
            Fate::NotConnected(after) => {
                sleep(after).await;
                inconclusive("no connection")
            }
            Fate::Status(_, _, after) => {
                sleep(after).await;
                inconclusive("another status")
            }
            Fate::Garbage { there } => self.asked(name, Some(there), Some(there), TIMEOUT).await,
            Fate::Sent { there, back, silence } => self.asked(name, there, back, silence).await,
        }
    }

    async fn asked(&self, name: &str, there: Option<Duration>, back: Option<Duration>, silence: Duration) -> ProbeOutcome {
        let (world, name) = (Rc::clone(&self.world), name.to_owned());
        match timeout(TIMEOUT, exchange(there, back, silence, move || world.api.works(&name))).await {
            Ok(Some(true)) => ProbeOutcome::Alive,
            Ok(Some(false)) => ProbeOutcome::Dead,
            Ok(None) | Err(_) => ProbeOutcome::Inconclusive("no reply".to_owned()),
        }
    }
}

impl World {
    /// A request of an application with this token: the status of its response and whether it bears `x-api-requestid`. None where there is none.
    pub(super) async fn request(self: &Rc<Self>, life: &Life, name: &str, rng: &mut Rng) -> Option<(StatusCode, bool)> {
        let honest_403 = rng.u8(0..25) == 0;
        let fate = self.api.fate(life.process, rng);
        if self.api.unauthorized.get() && rng.bool() {
            return Some((StatusCode::UNAUTHORIZED, false));
        }
        let (there, back, silence) = match fate {
            Fate::NotConnected(after) => {
                sleep(after).await;
                return None;
            }
            Fate::Status(status, _, after) => {
                sleep(after).await;
                return Some((status, false));
            }
            Fate::Garbage { there } => (Some(there), Some(there), TIMEOUT),
            Fate::Sent { there, back, silence } => (there, back, silence),
        };
        let (world, name) = (Rc::clone(self), name.to_owned());
        let works = exchange(there, back, silence, move || world.api.works(&name)).await?;
        Some((if works && !honest_403 { StatusCode::OK } else { StatusCode::FORBIDDEN }, true))
    }
}
