//! The routes of the simulated API: what each path answers when nothing goes wrong.
//!
//! The API proper is what Upsolver documents and its clients use. Beside it stand a few paths for tests, behind the same authorization:
//!
//! | path | answers |
//! |---|---|
//! | `GET /forbidden…` | 403 with a good token too: an honest lack of permission |
//! | `GET /bytes/{n}` | n bytes of [`byte_at`](super::byte_at); `?framing=chunked` hides the length |
//! | `GET /slow/{n}` | n lines, one each 100 ms; `?every=20` sets the milliseconds |
//! | `GET /trailers` | a chunked body with the trailer `x-checksum` |
//! | `POST /echo` | the request's body, both streaming at once |
//! | `POST /sink` | `{"bytes":…,"sha256":"…"}` of the request's body |

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use http_body_util::BodyExt;
use serde_json::{Value, json};

use super::body::{Body, boxed, full, pattern, slow, with_trailers};
use super::control::{Control, LiveToken, Mint, alphanumeric, uuid};
use super::query;
use super::record::RecordedBody;

/// So much of a request's body is looked at, where it is looked at.
const MAX_BODY: usize = 1024 * 1024;

/// Answers one request as the API does. The request's body is read to its end before the answer begins, except by `/echo`.
pub(super) async fn respond(control: &Control, head: &Parts, mut body: RecordedBody) -> Response<Body> {
    let path = head.uri.path();
    if matches!(path, "/api-tokens" | "/api-tokens/") && head.method == Method::POST {
        return mint(control, &head.headers, &read(&mut body).await);
    }
    if !is_authorized(control, &head.headers) {
        if let Some(id) = only(&head.headers, "x-request-id") {
            control.change(|state| state.refused.push(id.to_owned()));
        }
        drain(&mut body).await;
        return forbidden("the API token is missing, unknown or deleted");
    }
    let mut segments = path.trim_matches('/').splitn(2, '/');
    let (first, rest) = (segments.next().unwrap_or_default(), segments.next().unwrap_or_default());
    match (head.method.as_str(), first) {
        ("POST", "echo") => return echo(&head.headers, body),
        ("POST" | "PUT", "sink") => return sink(&mut body).await,
        _ => {}
    }
    let content = read(&mut body).await;
    let query = head.uri.query().unwrap_or_default();
    match (head.method.as_str(), first, rest) {
        (_, "query", rest) => query::respond(control, &head.method, rest, &content),
        ("DELETE", "api-tokens", id) => delete(control, id),
        ("GET" | "HEAD", "users", "") => json(StatusCode::OK, &users(control)),
        ("GET" | "HEAD", "inputs", "") => json(StatusCode::OK, &inputs()),
        ("GET", "environments", "local-api") => json(StatusCode::OK, &json!({ "dnsInfo": { "name": control.state().api_host } })),
        ("GET", first, _) if first.starts_with("forbidden") => forbidden("the user has no permission for this resource"),
        ("GET" | "HEAD", "bytes", length) => match length.parse() {
            Ok(length) => octets(pattern(length, parameter(query, "framing") != Some("chunked"))),
            Err(_) => no_such_path(),
        },
        ("GET", "slow", lines) => match lines.parse() {
            Ok(lines) => {
                octets(slow(lines, Duration::from_millis(parameter(query, "every").and_then(|ms| ms.parse().ok()).unwrap_or(100))))
            }
            Err(_) => no_such_path(),
        },
        ("GET", "trailers", "") => {
            let mut response = octets(with_trailers());
            response.headers_mut().insert(header::TRAILER, HeaderValue::from_static("x-checksum"));
            response
        }
        _ => no_such_path(),
    }
}

/// `POST /api-tokens/`: the header check, the body check, the token.
fn mint(control: &Control, headers: &HeaderMap, body: &[u8]) -> Response<Body> {
    let is_json = only(headers, "content-type").is_some_and(|value| value.split(';').next() == Some("application/json"));
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    let display = &body["displayData"];
    let (Some(name), Some(description), true) = (display["name"].as_str(), display["description"].as_str(), is_json) else {
        let detail = "wanted: content-type application/json and a body {\"displayData\":{\"name\":…,\"description\":…}}";
        return refuse(StatusCode::BAD_REQUEST, "BadRequestException", detail);
    };
    let (Some(email), Some(password)) = (only(headers, "x-api-email"), only(headers, "x-api-password")) else {
        return forbidden("email or password is missing");
    };
    if control.state().accounts.get(email).is_none_or(|known| known != password) {
        return forbidden("email or password is wrong");
    }

    let time = SystemTime::now();
    let (id, token) = (uuid(), alphanumeric(32));
    let answer = json!({
        "id": id,
        "organizationId": control.state().organization,
        "displayData": {
            "name": name,
            "description": description,
            "statusMessage": "ok",
            "statusType": "ok",
            "creationTime": humantime::format_rfc3339_millis(time).to_string(),
            "createdBy": format!("Simulated User ({email})"),
        },
        "apiToken": token,
        "createdBy": email,
    });
    let (name, description, email) = (name.to_owned(), description.to_owned(), email.to_owned());
    control.change(|state| {
        state.tokens.push(LiveToken { id: id.clone(), token: token.clone() });
        state.mints.push(Mint { id, token, name, description, email, time });
    });
    json(StatusCode::OK, &answer)
}

/// `DELETE /api-tokens/{id}`: what `token.revoke_path` calls. Upsolver documents deletion in its UI only.
fn delete(control: &Control, id: &str) -> Response<Body> {
    let deleted = control.change(|state| {
        let before = state.tokens.len();
        state.tokens.retain(|live| live.id != id);
        state.tokens.len() < before
    });
    if !deleted {
        return no_such_path();
    }
    let mut response = json(StatusCode::NO_CONTENT, &Value::Null);
    *response.body_mut() = full(Bytes::new());
    response.headers_mut().remove(header::CONTENT_TYPE);
    response
}

fn users(control: &Control) -> Value {
    let mut emails: Vec<String> = control.state().accounts.keys().cloned().collect();
    emails.sort();
    emails.iter().map(|email| json!({ "email": email, "displayData": { "name": "Simulated User" } })).collect()
}

fn inputs() -> Value {
    let input = |id: &str, name: &str| json!({ "id": id, "displayData": { "name": name, "description": "", "statusType": "ok" } });
    json!([
        input("3f0e9b52-4c4e-4a53-9d6f-7c1b7a3b0a01", "Orders from Kafka"),
        input("3f0e9b52-4c4e-4a53-9d6f-7c1b7a3b0a02", "Clicks from S3"),
    ])
}

fn echo(headers: &HeaderMap, body: RecordedBody) -> Response<Body> {
    let mut response = octets(boxed(body));
    if let Some(content_type) = headers.get(header::CONTENT_TYPE) {
        response.headers_mut().insert(header::CONTENT_TYPE, content_type.clone());
    }
    response
}

async fn sink(body: &mut RecordedBody) -> Response<Body> {
    let mut sum = ring::digest::Context::new(&ring::digest::SHA256);
    let mut bytes = 0;
    while let Some(Ok(frame)) = body.frame().await {
        if let Some(data) = frame.data_ref() {
            sum.update(data);
            bytes += data.len();
        }
    }
    let digest = sum.finish();
    let nibbles = digest.as_ref().iter().flat_map(|byte| [byte >> 4, byte & 15]);
    let sum: String = nibbles.filter_map(|nibble| char::from_digit(nibble.into(), 16)).collect();
    json(StatusCode::OK, &json!({ "bytes": bytes, "sha256": sum }))
}

/// Exactly one `authorization`, equal to a live token: no scheme word, no second field.
fn is_authorized(control: &Control, headers: &HeaderMap) -> bool {
    let state = control.state();
    state.ignore_authorization || only(headers, "authorization").is_some_and(|value| state.tokens.iter().any(|live| live.token == value))
}

/// The only value of a field; `None` where it is missing, repeated or not text.
fn only<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

fn parameter<'q>(query: &'q str, name: &str) -> Option<&'q str> {
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

/// Reads a body to its end, or until the client leaves; keeps at most [`MAX_BODY`] bytes.
async fn read(body: &mut RecordedBody) -> Vec<u8> {
    let mut content = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        if let Some(data) = frame.data_ref() {
            let room = MAX_BODY - content.len();
            content.extend_from_slice(&data[..data.len().min(room)]);
        }
    }
    content
}

/// Reads a body to its end, or until the client leaves.
pub(super) async fn drain(body: &mut RecordedBody) {
    while let Some(Ok(_)) = body.frame().await {}
}

fn forbidden(detail: &str) -> Response<Body> {
    refuse(StatusCode::FORBIDDEN, "ForbiddenException", detail)
}

pub(super) fn no_such_path() -> Response<Body> {
    refuse(StatusCode::NOT_FOUND, "NotFoundException", "the simulated API has no such resource")
}

/// An error as the API words it.
pub(super) fn refuse(status: StatusCode, class: &str, detail: &str) -> Response<Body> {
    json(status, &json!({ "clazz": class, "detailMessage": detail }))
}

/// A reply of the API itself: JSON, with a request id.
pub(super) fn json(status: StatusCode, value: &Value) -> Response<Body> {
    let mut response = octets(full(value.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn octets(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    let id = HeaderValue::try_from(uuid()).expect("hexadecimal digits and hyphens");
    response.headers_mut().insert("x-api-requestid", id);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    response
}
