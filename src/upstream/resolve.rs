//! Name resolution that cannot hold the proxy up.
//!
//! `getaddrinfo` blocks its thread for as long as it likes, so at most [`MAX_LOOKUPS`] of them run in the process, however many requests wait; a
//! waiting request is bounded by its connect timeout. An answer is shared for a second, so that a burst of new connections asks once.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::client::legacy::connect::dns::Name;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tower::Service;

/// Threads that may hang in `getaddrinfo` at a time.
const MAX_LOOKUPS: usize = 4;
/// How long one answer serves further connections. Far below any DNS time to live that matters to `upstream.max_connection_age`.
const SHARED_FOR: Duration = Duration::from_secs(1);

/// Resolves names for all workers. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct Resolver {
    lookups: Arc<Semaphore>,
    last: Arc<Mutex<Option<Answer>>>,
}

#[derive(Debug, Clone)]
struct Answer {
    name: String,
    at: Instant,
    addresses: Vec<SocketAddr>,
}

/// The name could not be resolved; told apart from other connect errors by its type.
#[derive(Debug, thiserror::Error)]
#[error("cannot resolve {name}: {source}")]
pub(super) struct ResolveError {
    name: String,
    source: io::Error,
}

impl Resolver {
    pub(super) fn new() -> Self {
        Self { lookups: Arc::new(Semaphore::new(MAX_LOOKUPS)), last: Arc::new(Mutex::new(None)) }
    }

    /// Cancelled, it leaves at most one thread behind, which ends when `getaddrinfo` does and keeps its place among [`MAX_LOOKUPS`] until then.
    async fn lookup(self, name: String) -> Result<Vec<SocketAddr>, ResolveError> {
        let permit = Arc::clone(&self.lookups).acquire_owned().await.expect("the semaphore is never closed");
        if let Some(addresses) = self.recent(&name) {
            return Ok(addresses);
        }
        let question = name.clone();
        let looked_up = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            // The port is set by the connector; 0 asks for any.
            (question.as_str(), 0).to_socket_addrs().map(Iterator::collect::<Vec<_>>)
        })
        .await
        .unwrap_or_else(|panic| Err(io::Error::other(panic)));
        let addresses = match looked_up {
            Ok(addresses) if addresses.is_empty() => Err(io::Error::new(io::ErrorKind::NotFound, "the answer holds no address")),
            other => other,
        };
        let addresses = addresses.map_err(|source| ResolveError { name: name.clone(), source })?;
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Answer { name, at: Instant::now(), addresses: addresses.clone() });
        Ok(addresses)
    }

    fn recent(&self, name: &str) -> Option<Vec<SocketAddr>> {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        last.as_ref().filter(|answer| answer.name == name && answer.at.elapsed() < SHARED_FOR).map(|answer| answer.addresses.clone())
    }
}

impl Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = ResolveError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let resolver = self.clone();
        Box::pin(async move { resolver.lookup(name.as_str().to_owned()).await.map(Vec::into_iter) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn d01_an_unknown_name_is_an_error_that_names_it() {
        let error = Resolver::new().lookup("no-such-host.invalid".to_owned()).await.unwrap_err();
        assert!(error.to_string().contains("cannot resolve no-such-host.invalid"), "{error}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_shared_for_a_second() {
        let resolver = Resolver::new();
        let addresses = resolver.clone().lookup("localhost".to_owned()).await.unwrap();
        assert_eq!(resolver.recent("localhost"), Some(addresses));
        assert_eq!(resolver.recent("other"), None);
        tokio::time::advance(SHARED_FOR).await;
        assert_eq!(resolver.recent("localhost"), None);
    }

    /// D01: hung lookups cannot take more threads than allowed; the next waits for a place instead.
    #[tokio::test]
    async fn d01_lookups_are_capped() {
        let resolver = Resolver::new();
        let held = Arc::clone(&resolver.lookups).acquire_many_owned(u32::try_from(MAX_LOOKUPS).unwrap()).await.unwrap();
        let mut waiting = Box::pin(resolver.lookup("localhost".to_owned()));
        assert!(futures_util::poll!(waiting.as_mut()).is_pending());
        drop(held);
        assert!(waiting.await.is_ok());
    }
}
