//! What the fuzz targets in `tests/fuzz` reach that nobody else may: the private parsers, and one downstream connection on a stream of the target's own.
//!
//! Compiled only where cargo-fuzz builds (`cfg(fuzzing)`), so that the normal library stays as closed as it is. Every function is a thin way in; what must
//! hold is asserted by the target.

use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, DATE, HeaderMap, HeaderValue, RETRY_AFTER};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};

use crate::credentials::Pair;
use crate::secret::{Email, Password};
use crate::server::clock::{Clock, Limits};
use crate::server::stream::Stream;
use crate::server::{Refusal, Settings};
use crate::shutdown::Stage;
use crate::upstream::single::Reply;

pub use crate::upstream::http1::fuzzing::{UpstreamResponse, upstream_response};

/// Whether some upstream could take this path for the minting one.
pub fn is_minting_path(path: &str) -> bool {
    crate::proxy::guard::is_minting_path(path)
}

/// Token and id of a mint's reply, or the words that say what is wrong with it.
pub fn mint_reply(content_type: Option<HeaderValue>, body: &[u8]) -> Result<(String, Option<String>), String> {
    let headers = content_type.map(|value| (CONTENT_TYPE, value)).into_iter().collect();
    let reply = Reply { status: StatusCode::OK, headers, body: Bytes::copy_from_slice(body) };
    crate::token::mint::parse_reply(reply).map(|(token, id)| (token.expose().to_owned(), id))
}

/// How long a reply with these fields asks to wait.
pub fn retry_after(value: HeaderValue, date: Option<HeaderValue>, now: SystemTime) -> Option<Duration> {
    let mut headers = HeaderMap::new();
    headers.insert(RETRY_AFTER, value);
    headers.extend(date.map(|date| (DATE, date)));
    crate::token::mint::read_retry_after(&headers, now)
}

/// What a stored file says, written as a save would write it.
pub fn store_file(bytes: &[u8]) -> Result<Vec<u8>, String> {
    crate::token::store::fuzzing::decode(bytes)
}

/// A stored file around a payload in JSON, with the checksum that no fuzzer would guess; `None` where it is no payload.
pub fn sealed_store_file(payload: &[u8]) -> Option<Vec<u8>> {
    crate::token::store::fuzzing::seal(payload)
}

/// The token in a stored file, unmasked with fixed credentials and a fixed salt.
pub fn unmasked_token(file: &[u8]) -> Option<String> {
    let pair = || Pair {
        email: Email::new("a@example.com".to_owned()).expect("a legal value"),
        password: Password::new("p".to_owned()).expect("a legal value"),
        source: String::new(),
        read_again: true,
        loaded_at: SystemTime::UNIX_EPOCH,
    };
    crate::token::store::fuzzing::unmask(file, pair)
}

/// The value in a secret file.
pub fn secret_file(bytes: &[u8]) -> Result<String, String> {
    let text = crate::credentials::secret_text(bytes).map_err(ToOwned::to_owned)?;
    let secret = Password::new(text.to_owned()).map_err(|problem| problem.to_string())?;
    Ok(secret.expose().to_owned())
}

/// One downstream connection from its first byte to its last, with the limits that a proxy has by default.
pub async fn connection<S, F>(stream: UnixStream, service: S)
where
    S: Fn(Request<Incoming>, Rc<Clock>) -> F + 'static,
    F: Future<Output = Response<Full<Bytes>>> + 'static,
{
    let limit = Duration::from_secs(60);
    let refusal = Refusal { message: Bytes::new(), status: StatusCode::REQUEST_TIMEOUT, code: "request_timeout" };
    let settings = Settings {
        limits: Limits { idle: limit, head: limit, body_idle: limit, response: limit },
        max_header_size: 64 * 1024,
        connections: Arc::new(Semaphore::new(1)),
        max_refusals: 0,
        too_slow: refusal.clone(),
        too_many: refusal,
        metrics: Arc::default(),
    };
    // Kept until the connection ends: without it, the shutdown would begin.
    let (_stage, stage) = watch::channel(Stage::Serve);
    crate::server::connection(Stream::Unix(stream), None, Rc::new(settings), stage, service).await;
}
