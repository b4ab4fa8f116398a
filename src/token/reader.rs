//! The token as a worker sees it: the one in use, at the cost of an atomic load.

use std::cell::RefCell;
use std::time::Duration;

use http::StatusCode;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};

use super::state::Rejection;
use super::task::Command;
use super::{ActiveToken, Availability, Unavailable, Verdict};

/// Bounds of [`Unavailable::retry_after`].
const MIN_RETRY_AFTER: Duration = Duration::from_secs(1);
const MAX_RETRY_AFTER: Duration = Duration::from_mins(1);

/// Gives requests the token in use and takes their rejections. Each worker thread has a clone of its own.
#[derive(Debug, Clone)]
pub struct TokenReader {
    seen: RefCell<Seen>,
    commands: mpsc::Sender<Command>,
}

/// What was published, and a copy of the token in it that takes no lock to read.
#[derive(Debug, Clone)]
struct Seen {
    published: watch::Receiver<Availability>,
    token: Option<ActiveToken>,
}

impl TokenReader {
    pub(super) fn new(published: watch::Receiver<Availability>, commands: mpsc::Sender<Command>) -> Self {
        let token = published.borrow().usable();
        Self { seen: RefCell::new(Seen { published, token }), commands }
    }

    /// The token in use, if there is one. Neither locks nor waits unless another one was published since the last call.
    pub fn current(&self) -> Option<ActiveToken> {
        let mut seen = self.seen.borrow_mut();
        // An error says that the token task has ended; what it published last stays in force.
        if seen.published.has_changed().unwrap_or(true) {
            let token = seen.published.borrow_and_update().usable();
            seen.token = token;
        }
        seen.token.clone()
    }

    /// The token in use, or the next one, waiting for it no longer than `limit` (`token.wait`). Dropping the future loses nothing: what is under way to
    /// get a token goes on.
    pub async fn wait(&self, limit: Duration) -> Result<ActiveToken, Unavailable> {
        if let Some(token) = self.current() {
            return Ok(token);
        }
        let mut published = self.seen.borrow().published.clone();
        let usable = async {
            let availability = published.wait_for(|availability| availability.usable().is_some()).await.ok()?;
            availability.usable()
        };
        match timeout(limit, usable).await {
            Ok(Some(token)) => Ok(token),
            // Out of time, or the token task has ended and no token will come.
            Ok(None) | Err(_) => Err(self.unavailable()),
        }
    }

    /// Asks what becomes of a response with `status` to a request that carried `token`. `has_request_id`: it has the field `x-api-requestid`.
    ///
    /// Waits for the shared probe and, if the token is dead, for its successor, but no longer than `limit`; then the response is to be relayed. Dropping
    /// the future loses nothing: the probe and the mint belong to all.
    pub async fn reject(&self, token: &ActiveToken, status: StatusCode, has_request_id: bool, limit: Duration) -> Verdict {
        let Some(rejection) = Rejection::of(status, has_request_id) else { return Verdict::Relay };
        let (answer, verdict) = oneshot::channel();
        let command = Command::Reject { generation: token.generation, rejection, answer };
        let asked = async {
            // A full channel is waited for: a thousand rejections at once all get their verdict.
            self.commands.send(command).await.ok()?;
            verdict.await.ok()
        };
        timeout(limit, asked).await.ok().flatten().unwrap_or(Verdict::Relay)
    }

    fn unavailable(&self) -> Unavailable {
        let retry_after = match &*self.seen.borrow().published.borrow() {
            Availability::Unavailable { next_attempt: Some(at) } => at.saturating_duration_since(Instant::now()),
            Availability::Unavailable { next_attempt: None } | Availability::Usable(_) => MIN_RETRY_AFTER,
        };
        Unavailable { retry_after: retry_after.clamp(MIN_RETRY_AFTER, MAX_RETRY_AFTER) }
    }
}

impl Availability {
    fn usable(&self) -> Option<ActiveToken> {
        match self {
            Self::Usable(token) => Some(token.clone()),
            Self::Unavailable { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::{AuthorizationValue, Token};

    fn usable(generation: u64) -> Availability {
        let authorization = AuthorizationValue::new(&Token::new(format!("t{generation}")).unwrap());
        Availability::Usable(ActiveToken { generation, authorization })
    }

    fn reader(first: Availability) -> (TokenReader, watch::Sender<Availability>, mpsc::Receiver<Command>) {
        let (publish, published) = watch::channel(first);
        let (commands, asked) = mpsc::channel(1);
        (TokenReader::new(published, commands), publish, asked)
    }

    const NONE: Availability = Availability::Unavailable { next_attempt: None };

    #[test]
    fn current_follows_what_is_published() {
        let (reader, publish, _asked) = reader(NONE);
        let generation = || reader.current().map(|token| token.generation);
        assert_eq!(generation(), None);
        publish.send_replace(usable(1));
        assert_eq!((generation(), generation()), (Some(1), Some(1)));
        publish.send_replace(NONE);
        assert_eq!(generation(), None, "a token known to be dead is not sent");
        publish.send_replace(usable(2));
        drop(publish);
        assert_eq!((generation(), generation()), (Some(2), Some(2)), "the last token outlives the task");
    }

    #[test]
    fn a_clone_is_at_home_on_another_thread() {
        let (reader, publish, _asked) = reader(usable(1));
        let clone = reader.clone();
        publish.send_replace(usable(2));
        let there = std::thread::spawn(move || clone.current().unwrap().generation).join().unwrap();
        assert_eq!((there, reader.current().unwrap().generation), (2, 2));
    }

    /// C03: a request waits, then gets the 503 with a `retry-after` between its bounds.
    #[tokio::test(start_paused = true)]
    async fn c03_waits_for_the_token_and_no_longer() {
        let limit = Duration::from_secs(10);
        for (next_attempt, expected) in [(None, 1), (Some(0), 1), (Some(25), 15), (Some(3600), 60)] {
            let next_attempt = next_attempt.map(|seconds| Instant::now() + Duration::from_secs(seconds));
            let (reader, _publish, _asked) = reader(Availability::Unavailable { next_attempt });
            let started = Instant::now();
            let retry_after = Duration::from_secs(expected);
            assert_eq!(reader.wait(limit).await.err(), Some(Unavailable { retry_after }), "{next_attempt:?}");
            assert_eq!(started.elapsed().as_secs(), 10);
        }
        let (reader, publish, _asked) = reader(NONE);
        let (token, ()) = tokio::join!(reader.wait(limit), async {
            tokio::time::sleep(Duration::from_secs(9)).await;
            publish.send_replace(usable(1));
        });
        assert_eq!(token.unwrap().generation, 1);
    }

    #[tokio::test(start_paused = true)]
    async fn with_the_task_gone_nobody_waits() {
        let (reader, publish, asked) = reader(NONE);
        drop((publish, asked));
        let started = Instant::now();
        assert!(reader.wait(Duration::from_secs(10)).await.is_err());
        let token = ActiveToken { generation: 1, authorization: AuthorizationValue::new(&Token::new("t".to_owned()).unwrap()) };
        let verdict = reader.reject(&token, StatusCode::UNAUTHORIZED, false, Duration::from_secs(10)).await;
        assert!(matches!(verdict, Verdict::Relay));
        assert_eq!(started.elapsed(), Duration::ZERO);
    }

    /// C25, and the bound of a verdict.
    #[tokio::test(start_paused = true)]
    async fn a_verdict_is_waited_for_no_longer_than_allowed() {
        let (reader, _publish, mut asked) = reader(usable(1));
        let token = reader.current().unwrap();
        let limit = Duration::from_secs(5);
        assert!(matches!(reader.reject(&token, StatusCode::FORBIDDEN, false, limit).await, Verdict::Relay));
        assert!(asked.try_recv().is_err(), "a 403 without a request id is nobody's business");

        let started = Instant::now();
        assert!(matches!(reader.reject(&token, StatusCode::FORBIDDEN, true, limit).await, Verdict::Relay));
        assert_eq!(started.elapsed(), limit);
        let Command::Reject { generation: 1, rejection: Rejection::Forbidden, .. } = asked.try_recv().unwrap() else {
            panic!("another command")
        };
    }
}
