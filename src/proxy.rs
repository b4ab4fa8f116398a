//! The straight line of one request: guard, clean, authorize, send, relay.
//!
//! [`Proxy::accept`] and [`Proxy::forward`] are that line, read top to bottom; each step is a function of a module of its own. [`Proxy::handle`] wraps
//! it: opens the record of the exchange, turns an [`Error`] into a response, and leaves the rest to the body that goes downstream.

use std::future::{Future, ready};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use http::header::CONNECTION;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use tokio::sync::{Semaphore, watch};

use crate::config::{self, Replay};
use crate::metrics::WorkerMetrics;
use crate::server::clock::{Clock, Expired, Phase};
use crate::shutdown::{Stage, reached};
use crate::telemetry::AccessLog;
use crate::token::{ActiveToken, TokenReader, Verdict};
use crate::upstream::connect::ConnectError;
use crate::upstream::pool::{Evidence, ReplyBody, SendError, Upstream};

use body::ResponseBody;
use error::{Error, Reason};
use exchange::Exchange;
use guard::{Admitted, Guard, Verdict as Judgement};
use headers::Cleaned;
use replay::{Attempts, BodyFailure, RequestBody};

mod body;
pub mod error;
mod exchange;
pub mod guard;
pub mod headers;
pub mod policy;
pub mod replay;

/// Everything that the requests of one worker share.
pub struct Proxy {
    guard: Guard,
    tokens: TokenReader,
    upstream: Rc<Upstream<RequestBody>>,
    settings: Settings,
    /// `limits.max_in_flight`, of all workers.
    slots: Arc<Semaphore>,
    stage: watch::Receiver<Stage>,
    metrics: Arc<WorkerMetrics>,
}

/// The parts of the configuration that a request needs.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `limits.max_request_body`, in bytes.
    pub max_request_body: Option<u64>,
    /// `token.wait`
    pub wait: Duration,
    /// `token.replay`
    pub replay: Replay,
    /// `token.replay_buffer`, in bytes.
    pub replay_buffer: usize,
    /// `upstream.connect_timeout`
    pub connect_timeout: Duration,
    /// `log.access`
    pub access: AccessLog,
}

impl Settings {
    /// The proxy's part of the configuration.
    pub fn new(config: &config::Config) -> Self {
        Self {
            max_request_body: config.limits.max_request_body,
            wait: config.token.wait,
            replay: config.token.replay,
            replay_buffer: config.token.replay_buffer,
            connect_timeout: config.upstream.connect_timeout,
            access: AccessLog::new(config.log.access),
        }
    }
}

/// What becomes of a request that is not refused.
enum Accepted {
    Forward(Outbound),
    /// See [`Answer::Local`].
    AnswerLocally(Response<bytes::Bytes>),
}

/// A request on its way out, guarded and cleaned.
struct Outbound {
    admitted: Admitted,
    cleaned: Cleaned,
    attempts: Attempts,
}

/// How messages are delimited on the downstream connection.
#[derive(Clone, Copy)]
struct DownstreamFraming {
    /// HTTP/1.1.
    knows_chunks: bool,
    /// The request's body is chunked.
    chunked: bool,
}

impl DownstreamFraming {
    fn of(request: &Request<Incoming>) -> Self {
        Self { knows_chunks: request.version() != Version::HTTP_10, chunked: request.body().size_hint().exact().is_none() }
    }
}

/// How a request ends when nothing goes wrong.
enum Answer {
    Relayed(Relayed),
    /// `OPTIONS *` and its like, which no token is needed for.
    Local(Response<bytes::Bytes>),
}

struct Relayed {
    response: Response<ReplyBody<RequestBody>>,
    token: ActiveToken,
    wants_trailers: bool,
    request_bytes: u64,
}

impl Proxy {
    /// For one worker; must live on its thread.
    pub fn new(
        guard: Guard,
        tokens: TokenReader,
        upstream: Rc<Upstream<RequestBody>>,
        settings: Settings,
        slots: Arc<Semaphore>,
        stage: watch::Receiver<Stage>,
        metrics: Arc<WorkerMetrics>,
    ) -> Self {
        Self { guard, tokens, upstream, settings, slots, stage, metrics }
    }

    /// Answers one request, whatever happens. Dropped, which hyper does when the downstream leaves, it cancels the exchange upstream.
    ///
    /// Not an `async fn`: what is used up before the first wait would stay in its future, which is made anew for every request. Boxed,
    /// since held in place it would add its kilobyte to every idle connection.
    pub fn handle(self: Rc<Self>, request: Request<Incoming>, clock: Rc<Clock>) -> Pin<Box<dyn Future<Output = Response<ResponseBody>>>> {
        let slot = Arc::clone(&self.slots).try_acquire_owned();
        let is_overloaded = slot.is_err();
        let mut exchange = Exchange::open(&request, self.settings.access, &self.metrics, slot.ok(), Rc::clone(&clock));
        let framing = DownstreamFraming::of(&request);
        // Sheds at the limit, before any work.
        let accepted = if is_overloaded { Err(Error::Overloaded) } else { self.accept(request, &clock) };
        let answer = match accepted {
            Ok(Accepted::Forward(mut accepted)) => {
                return Box::pin(async move {
                    let answer = self.forward(&mut accepted, &clock, &mut exchange).await;
                    self.conclude(answer, framing, exchange, &clock)
                });
            }
            Ok(Accepted::AnswerLocally(response)) => Ok(Answer::Local(response)),
            Err(error) => Err(error),
        };
        Box::pin(ready(self.conclude(answer, framing, exchange, &clock)))
    }

    /// The straight line, as far as nothing has to be waited for: guard, clean.
    fn accept(&self, request: Request<Incoming>, clock: &Rc<Clock>) -> Result<Accepted, Error> {
        let (mut head, body) = request.into_parts();
        let admitted = match self.guard.check(&head)? {
            Judgement::Forward(admitted) => admitted,
            Judgement::AnswerLocally(response) => return Ok(Accepted::AnswerLocally(response)),
        };
        self.count_would_be_denial(&head, &admitted);
        self.check_announced_length(&body)?;

        let cleaned = headers::clean_request(&mut head, &body.size_hint(), self.guard.upstream());
        let attempts = self.attempts(head, body, clock);
        Ok(Accepted::Forward(Outbound { admitted, cleaned, attempts }))
    }

    /// The rest of the straight line: authorize, send, relay.
    async fn forward(&self, request: &mut Outbound, clock: &Rc<Clock>, exchange: &mut Exchange) -> Result<Answer, Error> {
        let Outbound { admitted, cleaned, attempts } = request;
        let mut token = self.token().await?;

        let body = attempts.first();
        let mut response = self.send(attempts, body, &token, clock, exchange).await?;
        if let Some(successor) = self.rejected(&response, &token, clock).await
            && let Some(body) = self.again(attempts)
        {
            drop(response);
            token = successor;
            // Rare, and twice the room: kept out of the future of those that are sent once.
            response = Box::pin(self.send(attempts, body, &token, clock, exchange)).await?;
            self.metrics.replay(if is_rejection(response.status()) { "failure" } else { "success" });
        }

        let (mut head, body) = response.into_parts();
        headers::clean_response(&mut head, admitted, *cleaned, self.guard.upstream(), &token.authorization)?;
        Ok(Answer::Relayed(Relayed {
            response: Response::from_parts(head, body),
            token,
            wants_trailers: cleaned.wants_trailers,
            request_bytes: attempts.received_bytes(),
        }))
    }

    /// Makes the response that goes downstream, and the end of its body the end of the exchange.
    fn conclude(
        &self,
        answer: Result<Answer, Error>,
        framing: DownstreamFraming,
        mut exchange: Exchange,
        clock: &Clock,
    ) -> Response<ResponseBody> {
        clock.enter(Phase::Relay);
        let mut response = match answer {
            Ok(Answer::Relayed(relayed)) => {
                let Relayed { response, token, wants_trailers, request_bytes } = relayed;
                exchange.answered(response.status(), request_bytes);
                if response.status() == StatusCode::RESET_CONTENT {
                    // RFC 9110 section 15.3.6: a 205 has no content. What the upstream sent behind it goes with its connection.
                    response.map(|_| ResponseBody::own(bytes::Bytes::new(), exchange))
                } else {
                    clock.set_open_ended(!framing.knows_chunks && response.body().size_hint().exact().is_none());
                    response.map(|body| ResponseBody::relayed(body, token.authorization, wants_trailers, exchange))
                }
            }
            Ok(Answer::Local(response)) => {
                exchange.answered_locally(response.status(), None);
                response.map(|body| ResponseBody::own(body, exchange))
            }
            Err(error) => {
                if let Error::PolicyDenied { rule, .. } = &error {
                    self.metrics.policy_denial(rule, false);
                }
                let response = error.response();
                exchange.answered_locally(response.status(), Some(&error));
                response.map(|body| ResponseBody::own(body, exchange))
            }
        };
        if framing.chunked && clock.is_end_of_chunks_uncertain() {
            // Nothing behind it is taken for a request.
            response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    /// `policy.dry_run`: what a rule would have denied is counted and logged, and passes.
    fn count_would_be_denial(&self, head: &http::request::Parts, admitted: &Admitted) {
        if let Some(rule) = &admitted.would_deny {
            self.metrics.policy_denial(rule, true);
            tracing::warn!(rule, method = %head.method, path = head.uri.path(), "policy.dry_run: this request would be denied");
        }
    }

    /// A body whose length says that it is too large is refused before any of it is read; any other is counted in passing.
    fn check_announced_length(&self, body: &Incoming) -> Result<(), Error> {
        let announced = body.size_hint().exact();
        match self.settings.max_request_body {
            Some(limit) if announced.is_some_and(|length| length > limit) => Err(Error::BodyTooLarge),
            _ => Ok(()),
        }
    }

    fn attempts(&self, head: http::request::Parts, body: Incoming, clock: &Rc<Clock>) -> Attempts {
        let keep = self.may_replay(&head.method).then_some(self.settings.replay_buffer);
        Attempts::new(head, body, keep, self.settings.max_request_body, Rc::clone(clock), Arc::clone(&self.metrics))
    }

    fn may_replay(&self, method: &Method) -> bool {
        match self.settings.replay {
            Replay::All => true,
            Replay::Safe => matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS),
            Replay::Off => false,
        }
    }

    /// The token in use, or the first to come within `token.wait`. The body stays unread meanwhile.
    async fn token(&self) -> Result<ActiveToken, Error> {
        if let Some(token) = self.tokens.current() {
            return Ok(token);
        }
        let mut stage = self.stage.clone();
        // Rare and large: kept out of the future that every request moves.
        Box::pin(async {
            tokio::select! {
                token = self.tokens.wait(self.settings.wait) => {
                    token.map_err(|unavailable| Error::TokenUnavailable { retry_after: unavailable.retry_after })
                }
                () = reached(&mut stage, Stage::Drain) => Err(Error::Draining),
            }
        })
        .await
    }

    /// Sends one attempt and waits for the response head, within the timeouts of the exchange's clock.
    async fn send(
        &self,
        attempts: &mut Attempts,
        body: RequestBody,
        token: &ActiveToken,
        clock: &Clock,
        exchange: &mut Exchange,
    ) -> Result<Response<ReplyBody<RequestBody>>, Error> {
        exchange.attempted(token.generation);
        clock.send();
        attempts.authorize(&token.authorization);
        let attempts = &*attempts;
        let again = |evidence| match evidence {
            Evidence::NotProcessed => attempts.again(),
            Evidence::ClosedBeforeReply if attempts.is_repeatable() => Some(attempts.first()),
            Evidence::ClosedBeforeReply => None,
        };
        // When the clock wins, the exchange upstream is cancelled: its connection closes.
        tokio::select! {
            biased;
            sent = self.upstream.send(attempts.head(), body, clock.now(), again) => sent.map_err(|error| explain(&error, attempts)),
            expired = clock.expired() => Err(match expired {
                Expired::Downstream => Error::RequestTimeout,
                Expired::UpstreamRead => Error::UpstreamTimeout(Reason::new("it stopped reading the request", "connection_write_timeout")),
                Expired::UpstreamResponse => Error::UpstreamTimeout(Reason::new("no response head in time", "http_response_timeout")),
            }),
        }
    }

    /// Where `response` rejects the token and the token is proven dead: the token that replaces it.
    async fn rejected<B>(&self, response: &Response<B>, token: &ActiveToken, clock: &Clock) -> Option<ActiveToken> {
        if !is_rejection(response.status()) {
            return None;
        }
        clock.enter(Phase::Waiting);
        let from_api = has_request_id(response.headers());
        // Rare and large: kept out of the future that every request moves.
        match Box::pin(self.tokens.reject(token, response.status(), from_api, self.settings.wait)).await {
            Verdict::Relay => None,
            Verdict::Replay(successor) => Some(successor),
        }
    }

    /// The body for the second time, where the configuration and its copy allow it.
    fn again(&self, attempts: &Attempts) -> Option<RequestBody> {
        if !self.may_replay(&attempts.head().method) {
            self.metrics.replay("not_allowed");
            return None;
        }
        let again = attempts.again();
        if again.is_none() {
            self.metrics.replay("too_large");
        }
        again
    }
}

fn is_rejection(status: StatusCode) -> bool {
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

/// Answers of the API itself carry this field; one without comes from something in front of it (contract section 1).
fn has_request_id(headers: &HeaderMap) -> bool {
    headers.contains_key("x-api-requestid")
}

/// A request that brought no response, in the words that the downstream gets.
fn explain(error: &SendError, attempts: &Attempts) -> Error {
    // The body's own failure explains whatever else went wrong with its exchange.
    match attempts.body_failure() {
        Some(BodyFailure::TooLarge) => return Error::BodyTooLarge,
        Some(BodyFailure::Malformed) => return Error::BadRequest("the body's chunks are malformed"),
        Some(BodyFailure::Closed) => return Error::DownstreamClosed,
        None => {}
    }
    let because = |error_type| Reason::new(error.to_string(), error_type);
    match error {
        SendError::Connect(connect) => match connect {
            ConnectError::Timeout { .. } => Error::UpstreamTimeout(because(connect.error_type())),
            ConnectError::Tls { .. } => Error::UpstreamTls(because(connect.error_type())),
            ConnectError::Dns(_) | ConnectError::Unreachable { .. } | ConnectError::Proxy { .. } => {
                Error::UpstreamUnreachable(because(connect.error_type()))
            }
        },
        SendError::Closed(_) => Error::UpstreamProtocol(because("connection_terminated")),
        SendError::RequestBody | SendError::Protocol(_) => Error::UpstreamProtocol(because("http_protocol_error")),
    }
}
