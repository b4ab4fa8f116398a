//! One request on a connection of its own, its reply collected under a limit: for mint, probe and revocation.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};

use super::connect::Connector;

/// A complete reply.
#[derive(Debug)]
pub struct Reply {
    /// Status.
    pub status: StatusCode,
    /// Head.
    pub headers: HeaderMap,
    /// Whole body, at most as long as asked for.
    pub body: Bytes,
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
    let _ = (connector, request, max_body, deadline);
    Err(Error::NotSent("not built yet".to_owned()))
}
