//! What the admin server answers: which paths there are, what each says (contract §6).

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body::Body;
use http_body_util::{BodyExt, Full, Limited};
use serde::Serialize;
use tokio::sync::oneshot;

use super::peer::{is_safe, may_ask};
use super::status::Page;
use super::{Command, Handles, RefreshRefused};
use crate::liveness::{Pulse, WorkerPing};
use crate::metrics;
use crate::readiness::Phase;
use crate::server::listen::Peer;

/// The longest filter that `PUT /log-level` takes, in bytes.
const MAX_FILTER_BYTES: usize = 4096;

pub(super) type Answer = Response<Full<Bytes>>;

/// Answers one request of `peer`. Never fails: what goes wrong is an answer too.
pub(super) async fn answer<B>(handles: &Handles, peer: &Peer, request: Request<B>) -> Answer
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (head, body) = request.into_parts();
    if let Err((code, reason)) = may_ask(&head, peer) {
        return refuse(code, reason);
    }
    let Some(resource) = Resource::at(head.uri.path()) else {
        return refuse(StatusCode::NOT_FOUND, "no such page; there are /startup, /readiness, /liveness, /status, /metrics and /log-level");
    };
    let allow = resource.methods();
    if !allow.split(", ").any(|method| method == head.method.as_str()) {
        let mut answer = refuse(StatusCode::METHOD_NOT_ALLOWED, &format!("this page takes {allow}"));
        answer.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
        return answer;
    }
    if !is_safe(&head.method) {
        tracing::info!(path = head.uri.path(), %peer, "admin command");
    }
    match resource {
        Resource::Startup => startup(handles),
        Resource::Readiness => readiness(handles),
        Resource::Liveness => liveness(handles).await,
        Resource::Metrics => text(StatusCode::OK, metrics::CONTENT_TYPE, handles.metrics.encode()),
        Resource::Status => json(StatusCode::OK, &Page::new(handles, SystemTime::now())),
        Resource::Quit => quit(handles).await,
        Resource::Reload => reload(handles).await,
        Resource::Refresh => refresh(handles).await,
        Resource::LogLevel if head.method == Method::PUT => set_log_level(handles, body).await,
        Resource::LogLevel => log_level(handles),
    }
}

/// What there is to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resource {
    Startup,
    Readiness,
    Liveness,
    Metrics,
    Status,
    Quit,
    Reload,
    Refresh,
    LogLevel,
}

impl Resource {
    fn at(path: &str) -> Option<Self> {
        Some(match path {
            "/startup" => Self::Startup,
            "/readiness" | "/readyz" => Self::Readiness,
            "/liveness" | "/livez" | "/healthz" => Self::Liveness,
            "/metrics" => Self::Metrics,
            "/status" => Self::Status,
            "/quitquitquit" => Self::Quit,
            "/reload" => Self::Reload,
            "/token/refresh" => Self::Refresh,
            "/log-level" => Self::LogLevel,
            _ => return None,
        })
    }

    /// As in `allow`.
    fn methods(self) -> &'static str {
        match self {
            Self::Startup | Self::Readiness | Self::Liveness | Self::Metrics | Self::Status => "GET, HEAD",
            Self::Quit | Self::Reload | Self::Refresh => "POST",
            Self::LogLevel => "GET, HEAD, PUT",
        }
    }
}

/// Stays 200 for good once there was a token; what comes later is the readiness's business.
fn startup(handles: &Handles) -> Answer {
    if handles.readiness.token().started {
        return health(StatusCode::OK, "ok", Vec::new());
    }
    unavailable(Phase::Starting.label(), handles.readiness.now().reasons)
}

fn readiness(handles: &Handles) -> Answer {
    let readiness = handles.readiness.now();
    match readiness.phase {
        Phase::Ready => health(StatusCode::OK, "ok", Vec::new()),
        Phase::Starting | Phase::NotReady | Phase::Draining => unavailable(readiness.phase.label(), readiness.reasons),
    }
}

async fn liveness(handles: &Handles) -> Answer {
    let draining = handles.readiness.draining();
    let pulses = futures_util::future::join_all(handles.workers.iter().map(WorkerPing::ask)).await;
    let reasons: Vec<_> = pulses
        .into_iter()
        .enumerate()
        .filter_map(|(worker, pulse)| match pulse {
            Pulse::Alive => None,
            Pulse::Stuck => Some(format!("worker {worker} does not answer")),
            // A worker whose requests are finished has nothing more to do.
            Pulse::Ended if draining => None,
            Pulse::Ended => Some(format!("worker {worker} has ended")),
        })
        .collect();
    if reasons.is_empty() { health(StatusCode::OK, "ok", reasons) } else { unavailable("not_live", reasons) }
}

async fn quit(handles: &Handles) -> Answer {
    // Nobody listens any more where the proxy is stopping already, which is what was asked for.
    let _ = handles.commands.send(Command::Quit).await;
    health(StatusCode::OK, Phase::Draining.label(), Vec::new())
}

async fn reload(handles: &Handles) -> Answer {
    #[derive(Serialize)]
    struct Reloaded {
        status: &'static str,
        reasons: [&'static str; 0],
        needs_restart: Vec<String>,
    }

    match command(handles, Command::Reload).await {
        Some(Ok(needs_restart)) => json(StatusCode::OK, &Reloaded { status: "ok", reasons: [], needs_restart }),
        Some(Err(reason)) => refuse(StatusCode::UNPROCESSABLE_ENTITY, &reason),
        None => stopping(),
    }
}

async fn refresh(handles: &Handles) -> Answer {
    match command(handles, Command::Refresh).await {
        Some(Ok(())) => health(StatusCode::ACCEPTED, "accepted", Vec::new()),
        Some(Err(refused @ (RefreshRefused::TooMany { retry_after } | RefreshRefused::CredentialsRejected { retry_after }))) => {
            let mut answer = refuse(StatusCode::TOO_MANY_REQUESTS, &refused.to_string());
            answer.headers_mut().insert(RETRY_AFTER, HeaderValue::from(whole_seconds(retry_after)));
            answer
        }
        Some(Err(refused @ RefreshRefused::NothingToMintWith { .. })) => refuse(StatusCode::CONFLICT, &refused.to_string()),
        None => stopping(),
    }
}

fn log_level(handles: &Handles) -> Answer {
    text(StatusCode::OK, "text/plain; charset=utf-8", handles.filter.current() + "\n")
}

async fn set_log_level<B>(handles: &Handles, body: B) -> Answer
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let Ok(body) = Limited::new(body, MAX_FILTER_BYTES).collect().await else {
        return refuse(StatusCode::PAYLOAD_TOO_LARGE, &format!("the body broke off or is longer than {MAX_FILTER_BYTES} bytes"));
    };
    let body = body.to_bytes();
    let Ok(filter) = std::str::from_utf8(&body) else {
        return refuse(StatusCode::BAD_REQUEST, "the body is not UTF-8; send a log filter such as debug");
    };
    match handles.filter.set(filter) {
        Ok(()) => log_level(handles),
        Err(error) => refuse(StatusCode::BAD_REQUEST, &error.to_string()),
    }
}

/// Sends a command with the way back for its result; none where nobody takes commands any more.
async fn command<T>(handles: &Handles, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Option<T> {
    let (result, received) = oneshot::channel();
    handles.commands.send(command(result)).await.ok()?;
    received.await.ok()
}

/// Rounded up, so that whoever waits that long does not come too early.
fn whole_seconds(duration: Duration) -> u64 {
    (duration.as_secs() + u64::from(duration.subsec_nanos() > 0)).max(1)
}

fn stopping() -> Answer {
    refuse(StatusCode::SERVICE_UNAVAILABLE, "the proxy is stopping")
}

fn unavailable(status: &'static str, reasons: Vec<String>) -> Answer {
    health(StatusCode::SERVICE_UNAVAILABLE, status, reasons)
}

/// An answer that says only why not.
pub(super) fn refuse(code: StatusCode, reason: &str) -> Answer {
    health(code, "error", vec![reason.to_owned()])
}

/// The shape of all short answers: `{"status":"…","reasons":["…"]}`.
fn health(code: StatusCode, status: &'static str, reasons: Vec<String>) -> Answer {
    #[derive(Serialize)]
    struct Health {
        status: &'static str,
        reasons: Vec<String>,
    }
    json(code, &Health { status, reasons })
}

fn json(code: StatusCode, body: &impl Serialize) -> Answer {
    let body = serde_json::to_string(body).expect("strings, numbers and lists of them have a JSON form");
    text(code, "application/json", body + "\n")
}

fn text(code: StatusCode, content_type: &'static str, body: String) -> Answer {
    let mut answer = Response::new(Full::from(body));
    *answer.status_mut() = code;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use http::header::HOST;

    use crate::admin::tests::Proxy;
    use crate::liveness;
    use crate::readiness::tests::status;
    use crate::token::Status;

    use super::*;

    fn request(method: &str, path: &str, body: &str) -> Request<Full<Bytes>> {
        let request = Request::builder().method(method).uri(path).header(HOST, "localhost:9090");
        request.body(Full::from(body.to_owned())).unwrap()
    }

    async fn told(answer: Answer) -> (u16, String) {
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    async fn ask(proxy: &Proxy, method: &str, path: &str, body: &str) -> (u16, String) {
        told(answer(&proxy.handles, &Peer::Unix, request(method, path, body)).await).await
    }

    /// C01, C02: while nothing can be minted the proxy is live and not ready; once there was a token it has started for good.
    #[tokio::test]
    async fn c01_health_follows_the_token_and_the_drain() {
        const NO_TOKEN: &str = "[\"no usable token (token state: minting)\"]";
        const STOPPING: &str = "[\"the proxy is stopping\"]";
        let rows = [
            (false, false, false, (503, "starting", NO_TOKEN), (503, "starting", NO_TOKEN)),
            (true, true, false, (200, "ok", "[]"), (200, "ok", "[]")),
            (true, false, false, (200, "ok", "[]"), (503, "not_ready", NO_TOKEN)),
            (true, true, true, (200, "ok", "[]"), (503, "draining", STOPPING)),
        ];
        let proxy = Proxy::new();
        for (started, usable, draining, startup, readiness) in rows {
            proxy.token.send_replace(Arc::new(Status { started, usable, ..status() }));
            proxy.draining.send_replace(draining);
            for (path, (code, word, reasons)) in
                [("/startup", startup), ("/readiness", readiness), ("/readyz", readiness), ("/liveness", (200, "ok", "[]"))]
            {
                let expected = format!("{{\"status\":\"{word}\",\"reasons\":{reasons}}}\n");
                assert_eq!(ask(&proxy, "GET", path, "").await, (code, expected), "{path} {started} {usable} {draining}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn liveness_names_the_worker_that_does_not_answer() {
        let mut proxy = Proxy::new();
        let (stuck, _pings) = liveness::channel();
        let (ended, _) = liveness::channel();
        proxy.handles.workers.push(stuck);
        proxy.handles.workers.push(ended);
        for path in ["/liveness", "/livez", "/healthz"] {
            let expected = "{\"status\":\"not_live\",\"reasons\":[\"worker 1 does not answer\",\"worker 2 has ended\"]}\n";
            assert_eq!(ask(&proxy, "GET", path, "").await, (503, expected.to_owned()));
        }
        proxy.draining.send_replace(true);
        assert!(!ask(&proxy, "GET", "/liveness", "").await.1.contains("worker 2"), "a drained worker may end");
    }

    #[tokio::test]
    async fn each_page_has_its_methods() {
        let proxy = Proxy::new();
        let pages = [
            ("GET, HEAD", &["/startup", "/readiness", "/readyz", "/liveness", "/livez", "/healthz", "/metrics", "/status"][..]),
            ("POST", &["/quitquitquit", "/reload", "/token/refresh"]),
            ("GET, HEAD, PUT", &["/log-level"]),
        ];
        for (allow, paths) in pages {
            for path in paths {
                for method in
                    ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"].iter().filter(|method| !allow.split(", ").any(|m| m == **method))
                {
                    let answer = answer(&proxy.handles, &Peer::Unix, request(method, path, "")).await;
                    assert_eq!(
                        (answer.status(), &answer.headers()[ALLOW]),
                        (StatusCode::METHOD_NOT_ALLOWED, &HeaderValue::from_static(allow))
                    );
                }
            }
        }
        for path in ["/", "/startup/", "/Startup", "/api-tokens/", "//status"] {
            assert_eq!(ask(&proxy, "GET", path, "").await.0, 404, "{path}");
        }
        assert_eq!(ask(&proxy, "GET", "/status?pretty", "").await.0, 200);
    }

    /// B46: a refused command reaches nobody.
    #[tokio::test]
    async fn b46_a_refused_command_is_not_passed_on() {
        let mut proxy = Proxy::new();
        let remote = Peer::Tcp("10.0.0.5:40000".parse().unwrap());
        for path in ["/quitquitquit", "/reload", "/token/refresh"] {
            let (code, body) = told(answer(&proxy.handles, &remote, request("POST", path, "")).await).await;
            assert!(code == 403 && body.contains("another host"), "{path}: {code} {body}");
        }
        assert_eq!(told(answer(&proxy.handles, &remote, request("PUT", "/log-level", "trace")).await).await.0, 403);
        assert_eq!(proxy.handles.filter.current(), "info");
        assert!(proxy.commands.try_recv().is_err());
    }

    #[tokio::test]
    async fn commands_report_how_they_ended() {
        type Reply = Box<dyn FnOnce(Command)>;
        fn reload(result: Result<Vec<String>, String>) -> impl FnOnce(Command) {
            |command| {
                let Command::Reload(reply) = command else { panic!("{command:?}") };
                reply.send(result).unwrap();
            }
        }
        fn refresh(result: Result<(), RefreshRefused>) -> impl FnOnce(Command) {
            |command| {
                let Command::Refresh(reply) = command else { panic!("{command:?}") };
                reply.send(result).unwrap();
            }
        }
        let too_many = RefreshRefused::TooMany { retry_after: Duration::from_millis(1500) };
        let nothing = RefreshRefused::NothingToMintWith { reason: "credentials.token_file is set".to_owned() };
        let rows: [(_, Reply, _, _); 7] = [
            ("/reload", Box::new(reload(Ok(Vec::new()))), 200, "{\"status\":\"ok\",\"reasons\":[],\"needs_restart\":[]}\n"),
            ("/reload", Box::new(reload(Ok(vec!["listen.address".to_owned()]))), 200, "\"needs_restart\":[\"listen.address\"]}\n"),
            ("/reload", Box::new(reload(Err("log.level: unknown".to_owned()))), 422, "\"reasons\":[\"log.level: unknown\"]}\n"),
            ("/token/refresh", Box::new(refresh(Ok(()))), 202, "{\"status\":\"accepted\",\"reasons\":[]}\n"),
            ("/token/refresh", Box::new(refresh(Err(too_many))), 429, "mint_budget is spent\"]}\n"),
            ("/token/refresh", Box::new(refresh(Err(nothing))), 409, "\"reasons\":[\"credentials.token_file is set\"]}\n"),
            ("/token/refresh", Box::new(drop), 503, "the proxy is stopping\"]}\n"),
        ];
        let mut proxy = Proxy::new();
        for (path, reply, code, body) in rows {
            let operator = answer(&proxy.handles, &Peer::Unix, request("POST", path, ""));
            let app = async { reply(proxy.commands.recv().await.unwrap()) };
            let (answer, ()) = tokio::join!(operator, app);
            let retry_after = answer.headers().get(RETRY_AFTER).map(|value| value.to_str().unwrap().to_owned());
            assert_eq!(retry_after.as_deref(), (code == 429).then_some("2"), "{path} {code}");
            let (status, told) = told(answer).await;
            assert!(status == code && told.ends_with(body), "{path}: {status} {told}");
        }
        proxy.commands.close();
        assert_eq!(ask(&proxy, "POST", "/reload", "").await.0, 503);
        assert_eq!(ask(&proxy, "POST", "/quitquitquit", "").await.0, 200, "it is stopping already, as asked");
    }

    #[tokio::test]
    async fn the_log_filter_is_read_and_set() {
        let proxy = Proxy::new();
        assert_eq!(ask(&proxy, "GET", "/log-level", "").await, (200, "info\n".to_owned()));
        assert_eq!(ask(&proxy, "PUT", "/log-level", "debug\n").await, (200, "debug\n".to_owned()));
        assert_eq!(ask(&proxy, "PUT", "/log-level", "a=b=c").await.0, 400);
        assert_eq!(ask(&proxy, "PUT", "/log-level", "").await.0, 400);
        assert_eq!(ask(&proxy, "PUT", "/log-level", &"x".repeat(MAX_FILTER_BYTES + 1)).await.0, 413);
        assert_eq!(ask(&proxy, "GET", "/log-level", "").await, (200, "debug\n".to_owned()), "an invalid filter changes nothing");
    }

    #[tokio::test]
    async fn metrics_are_openmetrics() {
        let proxy = Proxy::new();
        let answer = answer(&proxy.handles, &Peer::Unix, request("GET", "/metrics", "")).await;
        assert_eq!(answer.headers()[CONTENT_TYPE], metrics::CONTENT_TYPE);
        assert!(told(answer).await.1.ends_with("# EOF\n"));
    }
}
