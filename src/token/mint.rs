//! `POST /api-tokens/`, the probe and the revocation: what is asked, and what each answer or its absence means.
//!
//! Each goes on a connection of its own ([`single::send`]), never on one that carries requests of an app: the password is seen by the upstream's origin in
//! this one request and nowhere else.
//!
//! What a newcomer would get wrong: a mint that failed is not always a mint that did nothing. Each token lasts in the customer's account until a person
//! deletes it, so what counts is whether the attempt *may have left a token behind* ([`Outcome::may_have_left_a_token`]): a 2xx whatever its body, and a
//! request whose reply was lost. And nothing of a reply is ever quoted, since any of it can be the token.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{ACCEPT, ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue, USER_AGENT};
use http::{Method, Request, StatusCode};
use serde::Serialize;

use crate::credentials::Pair;
use crate::secret::{AuthorizationValue, Token};
use crate::upstream::connect::Connector;
use crate::upstream::single::{self, Error, Reply};

mod display;
mod reply;
mod retry_after;

pub use display::{Display, Environment};
pub(crate) use reply::is_safe_id;
#[cfg(fuzzing)]
pub(crate) use {reply::parse as parse_reply, retry_after::read as read_retry_after};

/// With the slash: without it, the API answers with a redirect, and redirects are not followed.
const MINT_PATH: &str = "/api-tokens/";
/// A longer reply to a mint or a revocation is not the API's. Of a longer reply to a probe, only the status matters.
const MAX_REPLY_BYTES: usize = 64 * 1024;
const USER_AGENT_VALUE: &str = concat!("upsolver-auth-proxy/", env!("CARGO_PKG_VERSION"));
const X_API_EMAIL: HeaderName = HeaderName::from_static("x-api-email");
const X_API_PASSWORD: HeaderName = HeaderName::from_static("x-api-password");

/// How one attempt to mint ended.
#[derive(Debug)]
pub enum Outcome {
    /// A token.
    Minted(Minted),
    /// Credentials or request are wrong, and trying again at once would change nothing: 3xx, and 4xx other than 408 and 429.
    Rejected {
        /// Of the reply.
        status: StatusCode,
    },
    /// Certainly no token was made, and a later attempt may succeed: not connected, 408, 429, 5xx.
    Retry {
        /// For people.
        reason: String,
        /// From the reply, between 1 s and 15 min.
        retry_after: Option<Duration>,
    },
    /// The request was sent and no complete reply came: perhaps a token was made that nobody knows.
    Lost {
        /// For people.
        reason: String,
    },
    /// 2xx, so probably a token was made, but the reply does not give it.
    Invalid {
        /// For people; quotes nothing of the reply.
        reason: String,
    },
}

/// A token as the upstream made it.
#[derive(Debug)]
pub struct Minted {
    /// The token.
    pub token: Token,
    /// Upsolver's id of it, where the reply has one that is safe in logs and paths.
    pub id: Option<String>,
    /// The display name that it was given.
    pub name: String,
}

impl Outcome {
    /// Whether the attempt counts against `min_mint_interval` and `mint_budget` (contract section 5, "Mint").
    pub fn may_have_left_a_token(&self) -> bool {
        match self {
            Self::Minted(_) | Self::Lost { .. } | Self::Invalid { .. } => true,
            Self::Rejected { .. } | Self::Retry { .. } => false,
        }
    }

    /// The label `result` of `token_mints_total`.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Minted(_) => "success",
            Self::Rejected { .. } => "rejected",
            Self::Retry { .. } => "failed",
            Self::Lost { .. } => "lost",
            Self::Invalid { .. } => "invalid",
        }
    }
}

/// Mints one token that is shown as `display` in the account. `timeout` covers everything, connecting included. Dropping the future closes the connection;
/// whether a token was made is then as unknown as with [`Outcome::Lost`].
pub async fn mint(connector: &Connector, pair: &Pair, display: &Display, timeout: Duration) -> Outcome {
    let request = mint_request(pair, display);
    let result = single::send(connector, request, MAX_REPLY_BYTES, timeout).await;
    interpret_mint(result, &display.name, SystemTime::now())
}

/// What the probe found out about a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeOutcome {
    /// 2xx: a good identity.
    Alive,
    /// 401 or 403: the token is dead.
    Dead,
    /// Anything else, with the reason for people.
    Inconclusive(String),
}

impl ProbeOutcome {
    /// The label `result` of `token_probes_total`.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Dead => "dead",
            Self::Inconclusive(_) => "inconclusive",
        }
    }
}

/// Asks `path` (`token.probe_path`) with the token, to tell a rejected token from a lack of permission. `timeout` covers everything. Dropping the future
/// closes the connection and changes nothing.
pub async fn probe(connector: &Connector, path: &str, authorization: &AuthorizationValue, timeout: Duration) -> ProbeOutcome {
    let request = authorized_request(Method::GET, path, authorization);
    interpret_probe(single::send(connector, request, MAX_REPLY_BYTES, timeout).await)
}

/// Why a token was not revoked. The text is for the log.
#[derive(Debug, thiserror::Error)]
pub enum RevokeError {
    /// 404 or 410: the token is gone already, or the path is none of the API's. The answer doesn't tell which.
    #[error("the upstream answered {0}")]
    NotFound(StatusCode),
    /// The upstream refused.
    #[error("the upstream answered {0}")]
    Refused(StatusCode),
    /// No complete reply.
    #[error(transparent)]
    NoReply(Error),
}

/// Revokes the token with this `id` by `DELETE` on `revoke_path`, in which `{id}` stands for it. `authorization` is that of a token that still works,
/// which may be the one to be revoked.
pub async fn revoke(
    connector: &Connector,
    revoke_path: &str,
    id: &str,
    authorization: &AuthorizationValue,
    timeout: Duration,
) -> Result<(), RevokeError> {
    // An id is made of unreserved characters alone, so that it needs no encoding and cannot leave its segment.
    let request = authorized_request(Method::DELETE, &revoke_path.replace("{id}", id), authorization);
    interpret_revocation(single::send(connector, request, MAX_REPLY_BYTES, timeout).await)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MintBody<'a> {
    display_data: &'a Display,
}

fn mint_request(pair: &Pair, display: &Display) -> Request<Bytes> {
    let body = serde_json::to_vec(&MintBody { display_data: display }).expect("two strings always serialize");
    let mut request = Request::new(Bytes::from(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = http::Uri::from_static(MINT_PATH);
    let length = HeaderValue::from(request.body().len());
    let headers = request.headers_mut();
    set_common_headers(headers);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CONTENT_LENGTH, length);
    headers.insert(X_API_EMAIL, sensitive(pair.email.expose()));
    headers.insert(X_API_PASSWORD, sensitive(pair.password.expose()));
    request
}

fn authorized_request(method: Method, path: &str, authorization: &AuthorizationValue) -> Request<Bytes> {
    let mut request = Request::new(Bytes::new());
    *request.method_mut() = method;
    *request.uri_mut() = path.parse().expect("the configuration accepts only legal paths, and ids are legal segments");
    set_common_headers(request.headers_mut());
    request.headers_mut().insert(AUTHORIZATION, authorization.header());
    request
}

fn set_common_headers(headers: &mut http::HeaderMap) {
    headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    headers.insert(USER_AGENT, HeaderValue::from_static(USER_AGENT_VALUE));
}

fn sensitive(secret: &str) -> HeaderValue {
    let mut value = HeaderValue::from_str(secret).expect("a secret is a legal field value by construction");
    value.set_sensitive(true);
    value
}

fn interpret_mint(result: Result<Reply, Error>, name: &str, now: SystemTime) -> Outcome {
    // Where the head of a reply arrived, its status decides; a body is of interest with 2xx alone.
    let (status, body) = match result {
        Ok(reply) if reply.status.is_success() => {
            return match reply::parse(reply) {
                Ok((token, id)) => Outcome::Minted(Minted { token, id, name: name.to_owned() }),
                Err(reason) => Outcome::Invalid { reason },
            };
        }
        Ok(reply) => (reply.status, Some(reply.headers)),
        Err(Error::NotSent(reason)) => return Outcome::Retry { reason, retry_after: None },
        Err(error @ Error::TooLarge { status, .. }) if status.is_success() => return Outcome::Invalid { reason: error.to_string() },
        Err(Error::Lost { status: Some(status), .. } | Error::TooLarge { status, .. }) if !status.is_success() => (status, None),
        Err(error) => return Outcome::Lost { reason: error.to_string() },
    };
    if status.is_server_error() || status == StatusCode::REQUEST_TIMEOUT || status == StatusCode::TOO_MANY_REQUESTS {
        let retry_after = body.and_then(|headers| retry_after::read(&headers, now));
        return Outcome::Retry { reason: format!("the upstream answered {status}"), retry_after };
    }
    if status.is_informational() {
        // A 101 to a request that asked for no other protocol: whatever answered, it did not say what became of the mint.
        return Outcome::Lost { reason: format!("the upstream answered {status}") };
    }
    Outcome::Rejected { status }
}

fn interpret_probe(result: Result<Reply, Error>) -> ProbeOutcome {
    let status = match result {
        Ok(Reply { status, .. }) | Err(Error::TooLarge { status, .. } | Error::Lost { status: Some(status), .. }) => status,
        Err(error) => return ProbeOutcome::Inconclusive(error.to_string()),
    };
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ProbeOutcome::Dead,
        status if status.is_success() => ProbeOutcome::Alive,
        status => ProbeOutcome::Inconclusive(format!("the upstream answered {status}")),
    }
}

fn interpret_revocation(result: Result<Reply, Error>) -> Result<(), RevokeError> {
    let status = match result {
        Ok(Reply { status, .. }) | Err(Error::TooLarge { status, .. } | Error::Lost { status: Some(status), .. }) => status,
        Err(error) => return Err(RevokeError::NoReply(error)),
    };
    match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => Err(RevokeError::NotFound(status)),
        status if status.is_success() => Ok(()),
        status => Err(RevokeError::Refused(status)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::{Email, Password};

    fn pair() -> Pair {
        Pair {
            email: Email::new("canary@example.com".to_owned()).unwrap(),
            password: Password::new("canary password".to_owned()).unwrap(),
            source: "a test".to_owned(),
            read_again: true,
            loaded_at: SystemTime::now(),
        }
    }

    // Beside failures in the tables.
    #[allow(clippy::unnecessary_wraps)]
    fn reply(status: u16, body: &str) -> Result<Reply, Error> {
        let status = StatusCode::from_u16(status).unwrap();
        Ok(Reply { status, headers: http::HeaderMap::new(), body: Bytes::copy_from_slice(body.as_bytes()) })
    }

    fn lost(status: Option<u16>) -> Result<Reply, Error> {
        Err(Error::Lost { status: status.map(|status| StatusCode::from_u16(status).unwrap()), reason: "cut".to_owned() })
    }

    fn too_large(status: u16) -> Result<Reply, Error> {
        Err(Error::TooLarge { status: StatusCode::from_u16(status).unwrap(), limit: MAX_REPLY_BYTES })
    }

    fn not_sent() -> Result<Reply, Error> {
        Err(Error::NotSent("refused".to_owned()))
    }

    /// Contract section 1: path, fields and body of a mint. B05, B37: email and password are marked, and show in no debug output.
    #[test]
    fn b37_the_mint_request_is_what_the_api_documents() {
        let display = Display { name: "a \"name\"".to_owned(), description: "text".to_owned() };
        let request = mint_request(&pair(), &display);
        assert_eq!((request.method(), request.uri().to_string().as_str()), (&Method::POST, "/api-tokens/"));
        assert_eq!(request.body(), r#"{"displayData":{"name":"a \"name\"","description":"text"}}"#.as_bytes());
        let rows = [
            ("content-type", "application/json"),
            ("content-length", "58"),
            ("accept", "application/json"),
            ("x-api-email", "canary@example.com"),
            ("x-api-password", "canary password"),
        ];
        for (name, expected) in rows {
            assert_eq!(request.headers()[name], expected, "{name}");
        }
        assert!(!format!("{request:?}").contains("canary"), "{request:?}");
        assert!(request.headers()["x-api-email"].is_sensitive() && request.headers()["x-api-password"].is_sensitive());
    }

    /// C51: neither probe nor revocation carries email or password.
    #[test]
    fn c51_other_requests_carry_the_token_alone() {
        let authorization = AuthorizationValue::new(&Token::new("canary".to_owned()).unwrap());
        let request = authorized_request(Method::GET, "/users?x=1", &authorization);
        assert_eq!((request.method(), request.uri().to_string().as_str()), (&Method::GET, "/users?x=1"));
        assert_eq!(request.headers()[AUTHORIZATION], "canary");
        assert!(request.headers().keys().all(|name| !name.as_str().starts_with("x-api-")));
    }

    /// C16 and contract section 5: which outcome each status is, and whether it counts.
    #[test]
    fn c16_each_status_has_its_outcome() {
        const TOKEN: &str = r#"{"apiToken":"canary"}"#;
        let rows = [
            (reply(200, TOKEN), "success", true),
            (reply(201, TOKEN), "success", true),
            (reply(202, TOKEN), "success", true),
            (reply(202, ""), "invalid", true),
            (reply(204, ""), "invalid", true),
            (reply(101, TOKEN), "lost", true),
            (reply(301, TOKEN), "rejected", false),
            (reply(307, ""), "rejected", false),
            (reply(400, ""), "rejected", false),
            (reply(401, ""), "rejected", false),
            (reply(403, TOKEN), "rejected", false),
            (reply(404, ""), "rejected", false),
            (reply(408, ""), "failed", false),
            (reply(422, ""), "rejected", false),
            (reply(429, ""), "failed", false),
            (reply(500, TOKEN), "failed", false),
            (reply(503, ""), "failed", false),
            (reply(599, ""), "failed", false),
            (not_sent(), "failed", false),
            (lost(None), "lost", true),
            (lost(Some(200)), "lost", true),
            (lost(Some(403)), "rejected", false),
            (lost(Some(502)), "failed", false),
            (too_large(200), "invalid", true),
            (too_large(404), "rejected", false),
            (too_large(500), "failed", false),
        ];
        for (result, label, counts) in rows {
            let shown = format!("{result:?}");
            let outcome = interpret_mint(result, "name", SystemTime::now());
            assert_eq!((outcome.label(), outcome.may_have_left_a_token()), (label, counts), "{shown}");
            assert!(!shown.contains("canary") && !format!("{outcome:?}").contains("canary"), "{shown} {outcome:?}");
        }
    }

    #[test]
    fn a_retry_carries_what_the_reply_asked_for() {
        let mut result = reply(429, "");
        result.as_mut().unwrap().headers.insert("retry-after", HeaderValue::from_static("7"));
        let outcome = interpret_mint(result, "name", SystemTime::now());
        assert!(matches!(outcome, Outcome::Retry { retry_after: Some(after), .. } if after == Duration::from_secs(7)), "{outcome:?}");
    }

    #[test]
    fn c15_a_minted_token_has_its_id_and_name() {
        let body = r#"{"organizationId":"o","id":"t-1","displayData":{"name":"x"},"apiToken":"canary","createdBy":null}"#;
        let Outcome::Minted(minted) = interpret_mint(reply(200, body), "name", SystemTime::now()) else { panic!("it is a good reply") };
        assert_eq!((minted.token.expose(), minted.id.as_deref(), minted.name.as_str()), ("canary", Some("t-1"), "name"));
    }

    /// C17, contract section 5: 2xx is alive, 401 and 403 are dead, all else tells nothing.
    #[test]
    fn c17_what_a_probe_means() {
        let rows = [
            (reply(200, "[]"), "alive"),
            (reply(204, ""), "alive"),
            (too_large(200), "alive"),
            (lost(Some(200)), "alive"),
            (reply(401, ""), "dead"),
            (reply(403, ""), "dead"),
            (lost(Some(403)), "dead"),
            (reply(302, ""), "inconclusive"),
            (reply(404, ""), "inconclusive"),
            (reply(429, ""), "inconclusive"),
            (reply(503, ""), "inconclusive"),
            (lost(None), "inconclusive"),
            (not_sent(), "inconclusive"),
        ];
        for (result, expected) in rows {
            let shown = format!("{result:?}");
            assert_eq!(interpret_probe(result).label(), expected, "{shown}");
        }
    }

    /// 404 and 410 may come from a wrong path as well as for a token that is gone.
    #[test]
    fn only_a_2xx_says_that_a_token_was_revoked() {
        let rows = [
            (reply(200, ""), "revoked"),
            (reply(204, ""), "revoked"),
            (reply(404, ""), "not found"),
            (lost(Some(404)), "not found"),
            (reply(410, ""), "not found"),
            (reply(403, ""), "refused"),
            (reply(405, ""), "refused"),
            (reply(500, ""), "refused"),
            (lost(None), "no reply"),
            (not_sent(), "no reply"),
        ];
        for (result, expected) in rows {
            let shown = format!("{result:?}");
            let found = match interpret_revocation(result) {
                Ok(()) => "revoked",
                Err(RevokeError::NotFound(_)) => "not found",
                Err(RevokeError::Refused(_)) => "refused",
                Err(RevokeError::NoReply(_)) => "no reply",
            };
            assert_eq!(found, expected, "{shown}");
        }
    }
}
