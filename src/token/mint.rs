//! The three requests of the control plane: the mint, the probe, the revocation. What is sent, and what each reply or failure means.
//!
//! Every mint leaves a lasting credential in the customer's account (contract section 1), so an outcome says above all whether it may have left one.
//! Nothing of a reply is ever quoted: it may hold the token, and a parser's error quotes what it could not parse.

use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, USER_AGENT};
use http::{HeaderMap, Method, Request, StatusCode};

use crate::credentials::Pair;
use crate::secret::{AuthorizationValue, Token};
use crate::upstream::connect::Connector;
use crate::upstream::single;

pub mod display;
mod reply;

pub use display::Display;

/// With the slash (Upsolver REST API, "Create an API Token using a POST request").
const MINT_PATH: &str = "/api-tokens/";
const PRODUCT: &str = concat!("upsolver-auth-proxy/", env!("CARGO_PKG_VERSION"));
/// Of a mint's reply, in bytes; Upsolver's own have some 500.
const MAX_MINT_REPLY: usize = 64 * 1024;
/// Of a probe's or a revocation's reply, of which only the status matters.
const MAX_OTHER_REPLY: usize = 1024 * 1024;
/// `retry-after` is honoured up to this, and at least for [`MIN_RETRY_AFTER`].
const MAX_RETRY_AFTER: Duration = Duration::from_secs(15 * 60);
const MIN_RETRY_AFTER: Duration = Duration::from_secs(1);

/// How a mint ended.
#[derive(Debug)]
pub enum Outcome {
    /// A token, ready for use.
    Minted {
        /// The token itself.
        token: Token,
        /// Upsolver's id of it, where the reply told one that is fit for logs and paths.
        id: Option<String>,
    },
    /// The credentials or the request are wrong: a 4xx other than 408 and 429, or a 3xx, which is never followed.
    Rejected {
        /// What the upstream said.
        status: StatusCode,
    },
    /// It certainly left no token and may work later: not connected, 408, 429, 5xx.
    Retry {
        /// For the log.
        reason: String,
        /// What the upstream asked for, clamped to 1 s to 15 min.
        retry_after: Option<Duration>,
    },
    /// It was sent and no complete reply came: it may have left a token that nobody knows.
    Lost {
        /// For the log.
        reason: String,
    },
    /// 2xx with an unusable body: it has left a token that nobody can use.
    Invalid {
        /// For the log; quotes nothing of the reply.
        reason: String,
    },
}

/// Makes one `POST /api-tokens/` on a connection of its own. Dropped, it leaves the outcome unknown.
pub async fn mint(connector: &Connector, pair: &Pair, display: &Display, timeout: Duration) -> Outcome {
    let body = serde_json::json!({ "displayData": { "name": display.name, "description": display.description } });
    let mut request = Request::new(Bytes::from(body.to_string()));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = http::Uri::from_static(MINT_PATH);
    let headers = request.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    headers.insert(USER_AGENT, HeaderValue::from_static(PRODUCT));
    headers.insert(HeaderName::from_static("x-api-email"), secret_value(pair.email.expose()));
    headers.insert(HeaderName::from_static("x-api-password"), secret_value(pair.password.expose()));
    interpret(single::send(connector, request, MAX_MINT_REPLY, timeout).await)
}

fn interpret(result: Result<single::Reply, single::Error>) -> Outcome {
    let reply = match result {
        Ok(reply) => reply,
        Err(single::Error::NotSent(reason)) => return Outcome::Retry { reason, retry_after: None },
        Err(single::Error::TooLarge { status, limit }) if status.is_success() => {
            return Outcome::Invalid { reason: format!("the reply's body is longer than {limit} bytes") };
        }
        Err(single::Error::Lost { status: None, reason }) => return Outcome::Lost { reason },
        Err(single::Error::Lost { status: Some(status), reason }) if status.is_success() => return Outcome::Lost { reason },
        // The head said that there is no token; its body does not matter.
        Err(single::Error::Lost { status: Some(status), .. } | single::Error::TooLarge { status, .. }) => {
            return refused(status, &HeaderMap::new());
        }
    };
    if !reply.status.is_success() {
        return refused(reply.status, &reply.headers);
    }
    match reply::parse(&reply.body) {
        Ok(reply::Parsed { token, id }) => Outcome::Minted { token, id },
        Err(reason) => Outcome::Invalid { reason },
    }
}

fn refused(status: StatusCode, headers: &HeaderMap) -> Outcome {
    let may_work_later = status.is_server_error() || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS);
    if may_work_later {
        Outcome::Retry { reason: format!("the upstream answered {}", status.as_u16()), retry_after: retry_after(headers) }
    } else {
        Outcome::Rejected { status }
    }
}

/// Seconds or a date (RFC 9110 section 10.2.3), clamped; what is neither is not there.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = headers.get(http::header::RETRY_AFTER)?.to_str().ok()?.trim();
    let after = match value.parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) => MAX_RETRY_AFTER,
        Err(_) => httpdate::parse_http_date(value).ok()?.duration_since(std::time::SystemTime::now()).unwrap_or_default(),
    };
    Some(after.clamp(MIN_RETRY_AFTER, MAX_RETRY_AFTER))
}

/// What `token.probe_path` said of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// 2xx: the identity is good.
    Alive,
    /// 401 or 403.
    Dead {
        /// Which.
        status: StatusCode,
    },
    /// Anything else, no answer included; the reason is for the log.
    Inconclusive(String),
}

/// Asks `path` with the token, on a connection of its own.
pub async fn probe(connector: &Connector, path: &str, authorization: &AuthorizationValue, timeout: Duration) -> ProbeOutcome {
    let status = match send_with(connector, Method::GET, path, authorization, timeout).await {
        Ok(status) => status,
        Err(reason) => return ProbeOutcome::Inconclusive(reason),
    };
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ProbeOutcome::Dead { status },
        status if status.is_success() => ProbeOutcome::Alive,
        status => ProbeOutcome::Inconclusive(format!("the upstream answered {}", status.as_u16())),
    }
}

/// Deletes the token `id` at `path`, in which `{id}` stands for it; 404 means that it is gone already.
pub async fn revoke(
    connector: &Connector,
    path: &str,
    id: &str,
    authorization: &AuthorizationValue,
    timeout: Duration,
) -> Result<(), String> {
    let status = send_with(connector, Method::DELETE, &path.replace("{id}", id), authorization, timeout).await?;
    if status.is_success() || status == StatusCode::NOT_FOUND { Ok(()) } else { Err(format!("the upstream answered {}", status.as_u16())) }
}

async fn send_with(
    connector: &Connector,
    method: Method,
    path: &str,
    authorization: &AuthorizationValue,
    timeout: Duration,
) -> Result<StatusCode, String> {
    let mut request = Request::new(Bytes::new());
    *request.method_mut() = method;
    *request.uri_mut() = path.parse().map_err(|error| format!("{path}: {error}"))?;
    request.headers_mut().insert(USER_AGENT, HeaderValue::from_static(PRODUCT));
    request.headers_mut().insert(AUTHORIZATION, authorization.header());
    match single::send(connector, request, MAX_OTHER_REPLY, timeout).await {
        Ok(reply) => Ok(reply.status),
        // The status is all that was wanted.
        Err(single::Error::Lost { status: Some(status), .. } | single::Error::TooLarge { status, .. }) => Ok(status),
        Err(error) => Err(error.to_string()),
    }
}

fn secret_value(secret: &str) -> HeaderValue {
    let mut value = HeaderValue::from_str(secret).expect("a secret is a legal field value by construction");
    value.set_sensitive(true);
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(status: u16, body: &str, headers: &[(&'static str, &str)]) -> Result<single::Reply, single::Error> {
        let headers = headers.iter().map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap())).collect();
        Ok(single::Reply { status: StatusCode::from_u16(status).unwrap(), headers, body: Bytes::copy_from_slice(body.as_bytes()) })
    }

    /// C04, C05, C06, C11, C16: what each reply means.
    #[test]
    fn c04_c06_c11_c16_what_each_reply_means() {
        let token = r#"{"apiToken":"abc"}"#;
        let kind = |outcome: Outcome| match outcome {
            Outcome::Minted { .. } => "minted",
            Outcome::Rejected { .. } => "rejected",
            Outcome::Retry { .. } => "retry",
            Outcome::Lost { .. } => "lost",
            Outcome::Invalid { .. } => "invalid",
        };
        for (status, body, expected) in [
            (200, token, "minted"),
            (201, token, "minted"),
            (202, token, "minted"),
            (202, "", "invalid"),
            (204, "", "invalid"),
            (200, "<html>", "invalid"),
            (301, token, "rejected"),
            (307, "", "rejected"),
            (400, token, "rejected"),
            (401, "", "rejected"),
            (403, "", "rejected"),
            (404, "", "rejected"),
            (405, "", "rejected"),
            (408, "", "retry"),
            (415, "", "rejected"),
            (429, "", "retry"),
            (500, token, "retry"),
            (503, "", "retry"),
        ] {
            assert_eq!(kind(interpret(reply(status, body, &[]))), expected, "{status}");
        }
        let status = |code| StatusCode::from_u16(code).unwrap();
        let lost = |code: Option<u16>| single::Error::Lost { status: code.map(status), reason: String::new() };
        for (error, expected) in [
            (single::Error::NotSent(String::new()), "retry"),
            (lost(None), "lost"),
            (lost(Some(200)), "lost"),
            (lost(Some(403)), "rejected"),
            (lost(Some(500)), "retry"),
            (single::Error::TooLarge { status: status(200), limit: 1 }, "invalid"),
            (single::Error::TooLarge { status: status(403), limit: 1 }, "rejected"),
        ] {
            assert_eq!(kind(interpret(Err(error))), expected);
        }
    }

    #[test]
    fn c05_retry_after_is_clamped_and_garbage_ignored() {
        let seconds = |value: &str| match interpret(reply(503, "", &[("retry-after", value)])) {
            Outcome::Retry { retry_after, .. } => retry_after.map(|after| after.as_secs()),
            other => panic!("{other:?}"),
        };
        assert_eq!(seconds("30"), Some(30));
        assert_eq!(seconds("0"), Some(1));
        assert_eq!(seconds("315360000"), Some(900));
        assert_eq!(seconds("99999999999999999999999999"), Some(900));
        assert_eq!(seconds("-5"), None);
        assert_eq!(seconds("soon"), None);
        assert_eq!(seconds("Sun, 06 Nov 1994 08:49:37 GMT"), Some(1), "a date in the past");
        let later = httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(120));
        assert!(seconds(&later).is_some_and(|after| (100..=120).contains(&after)));
    }
}
