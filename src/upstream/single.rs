//! One request on a connection of its own, its reply collected under a limit: for mint, probe and revocation.

use std::cell::Cell;
use std::fmt;
use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioIo;
use tokio::task::AbortHandle;

use super::connect::Connector;
use super::pool::LocalExecutor;
use crate::task;

/// A complete reply. That to a mint holds the token, so `Debug` shows the status alone.
pub struct Reply {
    /// Status.
    pub status: StatusCode,
    /// Head.
    pub headers: HeaderMap,
    /// Whole body, at most as long as asked for.
    pub body: Bytes,
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply").field("status", &self.status).finish_non_exhaustive()
    }
}

/// Why there is no complete reply.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nothing was sent: resolving, connecting or TLS failed.
    #[error("not sent: {0}")]
    NotSent(String),
    /// The request may have been processed, but no complete reply came. `status` where at least the head arrived.
    #[error("reply lost: {reason}")]
    Lost {
        /// Of the reply head, where it arrived.
        status: Option<StatusCode>,
        /// For people; holds nothing of the reply.
        reason: String,
    },
    /// The body is longer than asked for.
    #[error("the reply's body is longer than {limit} bytes")]
    TooLarge {
        /// Of the reply.
        status: StatusCode,
        /// In bytes.
        limit: usize,
    },
}

/// Sends `request` (origin-form target; `host` is set here) on a new connection, and collects the reply. `deadline` covers everything, connecting included.
/// Redirects are not followed. Dropping the future closes the connection.
pub async fn send(connector: &Connector, request: Request<Bytes>, max_body: usize, deadline: Duration) -> Result<Reply, Error> {
    // What is known when the deadline strikes decides between "not sent" and "lost".
    let progress = Cell::new(Progress::Connecting);
    let exchange = exchange(connector, request, max_body, deadline, &progress);
    tokio::time::timeout(deadline, exchange).await.unwrap_or_else(|_| {
        let reason = format!("no complete reply within {}", humantime::format_duration(deadline));
        Err(match progress.get() {
            Progress::Connecting => Error::NotSent(reason),
            Progress::Sent => Error::Lost { status: None, reason },
            Progress::Head(status) => Error::Lost { status: Some(status), reason },
        })
    })
}

#[derive(Clone, Copy)]
enum Progress {
    Connecting,
    Sent,
    Head(StatusCode),
}

async fn exchange(
    connector: &Connector,
    request: Request<Bytes>,
    max_body: usize,
    deadline: Duration,
    progress: &Cell<Progress>,
) -> Result<Reply, Error> {
    let connection = connector.connect().await.map_err(|error| Error::NotSent(error.to_string()))?;
    let http2 = connection.is_http2();
    let (mut parts, body) = request.into_parts();
    let not_sent = |error: hyper::Error| Error::NotSent(error.to_string());
    let lost = |status, error: hyper::Error| Error::Lost { status, reason: error.to_string() };
    progress.set(Progress::Sent);
    let (response, driver) = if http2 {
        parts.uri = absolute(connector, &parts.uri)?;
        let (mut sender, driver) = http2::Builder::new(LocalExecutor).handshake(TokioIo::new(connection)).await.map_err(not_sent)?;
        let driver = Driver::start(driver, deadline);
        (sender.send_request(Request::from_parts(parts, Full::new(body))).await, driver)
    } else {
        let host = HeaderValue::from_str(&connector.origin().authority()).expect("an origin is a legal field value");
        parts.headers.insert(HOST, host);
        let (mut sender, driver) = http1::handshake(TokioIo::new(connection)).await.map_err(not_sent)?;
        let driver = Driver::start(driver, deadline);
        (sender.send_request(Request::from_parts(parts, Full::new(body))).await, driver)
    };
    let response = response.map_err(|error| lost(None, error))?;
    let status = response.status();
    progress.set(Progress::Head(status));
    let (head, body) = response.into_parts();
    match Limited::new(body, max_body).collect().await {
        Ok(body) => {
            driver.end_in_order();
            Ok(Reply { status, headers: head.headers, body: body.to_bytes() })
        }
        Err(error) if error.is::<LengthLimitError>() => Err(Error::TooLarge { status, limit: max_body }),
        Err(error) => Err(Error::Lost { status: Some(status), reason: error.to_string() }),
    }
}

/// HTTP/2 wants scheme and authority in the target (RFC 9113 section 8.3.1).
fn absolute(connector: &Connector, target: &Uri) -> Result<Uri, Error> {
    let path = target.path_and_query().map_or("/", PathAndQuery::as_str);
    format!("{}{path}", connector.origin()).parse().map_err(|error| Error::NotSent(format!("{path}: {error}")))
}

/// Moves the connection, and closes it when the exchange is over.
struct Driver(Option<AbortHandle>);

impl Driver {
    /// For `deadline` at most.
    fn start(connection: impl Future<Output = hyper::Result<()>> + 'static, deadline: Duration) -> Self {
        let task = task::spawn("single exchange", async move {
            // Its error also reaches the request.
            let _ = tokio::time::timeout(deadline, connection).await;
        });
        Self(Some(task.abort_handle()))
    }

    /// The exchange is complete: hyper says goodbye and closes, which nobody has to wait for.
    fn end_in_order(mut self) {
        self.0 = None;
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}
