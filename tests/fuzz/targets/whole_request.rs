//! Any bytes on a downstream connection, through the server and the guard: each request that would leave is one well-formed request with our authorization,
//! and what comes back is a sequence of well-formed responses, one for each request and at most one more, the refusal of what was none.
#![no_main]

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, request};
use http_body::Body as _;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::runtime::{Builder, Runtime};
use upsolver_auth_proxy::fuzzing::{connection, is_minting_path};
use upsolver_auth_proxy::proxy::guard::Verdict;
use upsolver_auth_proxy::proxy::headers::{authorize, clean_request};
use upsolver_auth_proxy::server::clock::{Clock, Phase};
use upsolver_auth_proxy_fuzz::{AUTHORIZATION, GUARD, HOP_BY_HOP, TOKEN, UPSTREAM};

/// Nothing here waits for anything but bytes that are there already.
const HANG: Duration = Duration::from_secs(10);

thread_local! {
    static RUNTIME: Runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
}

/// What the service saw, for each request: its method, and whether its body came to its end.
type Seen = Rc<RefCell<Vec<Method>>>;

fuzz_target!(|bytes: &[u8]| {
    let seen = Seen::default();
    let answered = RUNTIME.with(|runtime| runtime.block_on(exchange(bytes, &seen)));
    check_responses(&answered, &seen.borrow());
});

async fn exchange(bytes: &[u8], seen: &Seen) -> Vec<u8> {
    let (near, far) = UnixStream::pair().expect("a socket pair");
    let (mut from_proxy, mut to_proxy) = near.into_split();
    let seen = Rc::clone(seen);
    let server = connection(far, move |request, clock| serve(request, clock, Rc::clone(&seen)));
    let send = async {
        // The proxy may close before it has read everything.
        let _ = to_proxy.write_all(bytes).await;
        drop(to_proxy);
    };
    let mut answered = Vec::new();
    let receive = async {
        let _ = from_proxy.read_to_end(&mut answered).await;
    };
    tokio::time::timeout(HANG, async { tokio::join!(server, send, receive) }).await.expect("the connection hangs");
    answered
}

async fn serve(request: Request<Incoming>, clock: Rc<Clock>, seen: Seen) -> Response<Full<Bytes>> {
    seen.borrow_mut().push(request.method().clone());
    let response = answer(request, &clock).await;
    // Every answer is complete: a downstream that has closed its sending side need not be waited for.
    clock.enter(Phase::Idle);
    response
}

async fn answer(request: Request<Incoming>, clock: &Clock) -> Response<Full<Bytes>> {
    let (mut head, body) = request.into_parts();
    match GUARD.check(&head) {
        Ok(Verdict::Forward(_)) => {}
        Ok(Verdict::AnswerLocally(response)) => return response.map(Full::new),
        Err(error) => return error.response().map(Full::new),
    }
    let size = body.size_hint();
    clean_request(&mut head, &size, GUARD.upstream());
    authorize(&mut head.headers, &AUTHORIZATION);
    let Ok(body) = body.collect().await else {
        // Its framing broke: the exchange upstream would be cut, never completed.
        let mut response = Response::new(Full::new(Bytes::new()));
        *response.status_mut() = StatusCode::BAD_REQUEST;
        return response;
    };
    clock.uploaded();
    check_request(&head, size.exact(), &body.to_bytes());
    Response::new(Full::new(Bytes::from_static(b"answer")))
}

fn check_request(head: &request::Parts, announced: Option<u64>, body: &[u8]) {
    assert!(head.method != Method::CONNECT && head.method != Method::TRACE);
    let target = head.uri.path_and_query().expect("a path");
    assert!(head.uri.authority().is_none() && target.as_str().starts_with('/') && !is_minting_path(target.path()), "{target}");
    assert!(target.as_str().bytes().all(|byte| byte > b' ' && byte != 0x7f), "{target}");
    assert_eq!(head.headers.get_all("authorization").iter().collect::<Vec<_>>(), [TOKEN]);
    assert_eq!(head.headers.get_all("host").iter().collect::<Vec<_>>(), [UPSTREAM]);
    for (name, value) in &head.headers {
        assert!(!value.as_bytes().iter().any(|byte| matches!(byte, b'\r' | b'\n' | 0)), "{name}");
        assert!(!HOP_BY_HOP.contains(&name.as_str()) || name == "te", "{name}");
    }
    let lengths: Vec<_> = head.headers.get_all("content-length").iter().collect();
    if let Some(announced) = announced {
        assert_eq!(announced, body.len() as u64);
        assert!(!head.headers.contains_key("transfer-encoding") && lengths.len() <= 1);
        assert!(lengths.first().map_or(body.is_empty(), |length| **length == *body.len().to_string()));
    } else {
        assert!(lengths.is_empty() && head.headers["transfer-encoding"] == "chunked");
    }
}

/// Reads what was answered as a strict client would.
fn check_responses(mut bytes: &[u8], seen: &[Method]) {
    let mut final_responses = 0;
    while !bytes.is_empty() {
        let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").expect("a whole head");
        let head = std::str::from_utf8(&bytes[..end]).expect("the proxy's own fields are ASCII");
        bytes = &bytes[end + 4..];
        let status: u16 =
            head.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)).and_then(|status| status.parse().ok()).expect("a status");
        if status == 100 {
            continue;
        }
        let length =
            head.to_ascii_lowercase().lines().find_map(|line| line.strip_prefix("content-length: ").and_then(|length| length.parse().ok()));
        let to_head = seen.get(final_responses) == Some(&Method::HEAD);
        let length = if to_head || status == 204 { 0 } else { length.unwrap_or_else(|| panic!("no length: {head}")) };
        bytes = bytes.get(length..).expect("a whole body");
        final_responses += 1;
    }
    // Fewer, where the downstream left before its body was complete.
    assert!(final_responses <= seen.len() + 1, "{final_responses} responses to {} requests", seen.len());
}
