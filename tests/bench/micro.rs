//! What the steps of the straight line cost, one by one: guard, header cleaning and the copy for replay. Time and allocations of each.
//!
//! `cargo bench --bench micro`; as a test, each runs once. What divan is told to make anew for each run (the head that is cleaned) is not timed.

use std::sync::LazyLock;

use divan::{AllocProfiler, Bencher, black_box, counter::BytesCount};
use http::{Request, Response, StatusCode, request, response};
use http_body::SizeHint;
use upsolver_auth_proxy::config::Config;
use upsolver_auth_proxy::proxy::guard::{Admitted, Guard, Verdict};
use upsolver_auth_proxy::proxy::headers::{Cleaned, authorize, clean_request, clean_response};
use upsolver_auth_proxy::proxy::replay::BodyCopy;
use upsolver_auth_proxy::secret::{AuthorizationValue, Token};

#[global_allocator]
static ALLOCATOR: AllocProfiler = AllocProfiler::system();

/// Lines of policy: what a sidecar of one app may have.
const RULES: &str = r#"
policy.default = "deny"
policy.rules = [
    { action = "allow", methods = ["GET", "HEAD"], path = "/inputs/**" },
    { action = "allow", methods = ["POST"], path = "/query" },
    { action = "allow", methods = ["GET"], path = "/query/**" },
]
"#;

static OPEN: LazyLock<Guard> = LazyLock::new(|| guard(""));
static RESTRICTED: LazyLock<Guard> = LazyLock::new(|| guard(RULES));
static AUTHORIZATION: LazyLock<AuthorizationValue> = LazyLock::new(|| {
    let token = Token::new("bench0123456789abcdef0123456789ab".to_owned()).expect("a legal token");
    AuthorizationValue::new(&token)
});

fn main() {
    // Made here, so that nobody's first run pays for it.
    LazyLock::force(&OPEN);
    LazyLock::force(&RESTRICTED);
    LazyLock::force(&AUTHORIZATION);
    divan::main();
}

fn guard(policy: &str) -> Guard {
    let config = Config::from_toml(&format!("credentials.token_file = \"/token\"\n{policy}")).expect("a valid configuration");
    Guard::new(&config, &[8080], None)
}

/// What a plain HTTP library sends.
fn request() -> request::Parts {
    let head = Request::get("/inputs/5f2d8e3c/stats?from=2026-01-01")
        .header("host", "localhost:8080")
        .header("user-agent", "python-requests/2.32.3")
        .header("accept-encoding", "gzip, deflate")
        .header("accept", "*/*")
        .header("connection", "keep-alive")
        .header("authorization", "dummy");
    head.body(()).expect("a legal head").into_parts().0
}

/// What the API answers.
fn response(status: StatusCode) -> response::Parts {
    let mut head = Response::builder()
        .status(status)
        .header("server", "nginx")
        .header("date", "Thu, 01 Jan 1970 00:00:00 GMT")
        .header("content-type", "application/json")
        .header("content-length", "1024")
        .header("connection", "keep-alive")
        .header("x-api-requestid", "4ee0ac4c-5d5c-4f0c-8d3f-4f2d7a3b1c11");
    if status.is_redirection() {
        head = head.header("location", "https://api.upsolver.com/inputs/5f2d8e3c");
    }
    head.body(()).expect("a legal head").into_parts().0
}

fn admitted() -> Admitted {
    match OPEN.check(&request()) {
        Ok(Verdict::Forward(admitted)) => admitted,
        other => panic!("{other:?}"),
    }
}

/// Without policy rules.
#[divan::bench]
fn guard_open(bencher: Bencher) {
    let head = request();
    bencher.bench_local(|| OPEN.check(black_box(&head)));
}

/// With three.
#[divan::bench]
fn guard_with_policy(bencher: Bencher) {
    let head = request();
    bencher.bench_local(|| RESTRICTED.check(black_box(&head)));
}

/// `authorize` with it, as each attempt has it.
#[divan::bench]
fn clean_a_request(bencher: Bencher) {
    bencher.with_inputs(request).bench_local_refs(|head| {
        clean_request(head, &SizeHint::with_exact(0), OPEN.upstream());
        authorize(&mut head.headers, &AUTHORIZATION);
    });
}

/// A 302 has a `location` to rewrite.
#[divan::bench(args = [200, 302])]
fn clean_a_response(bencher: Bencher, status: u16) {
    let status = StatusCode::from_u16(status).expect("a legal status");
    let admitted = admitted();
    let cleaned = Cleaned { wants_trailers: false, to_head: false, from_http_1_0: false };
    bencher
        .with_inputs(|| response(status))
        .bench_local_refs(|head| clean_response(head, &admitted, cleaned, OPEN.upstream(), &AUTHORIZATION));
}

/// A body that comes in pieces of at most 8 KiB; the last does not fit the default buffer, and its copy is dropped on the way.
#[divan::bench(args = [500, 8 * 1024, 64 * 1024, 65 * 1024])]
fn copy_for_replay(bencher: Bencher, length: usize) {
    let body = vec![b'x'; length];
    bencher.counter(BytesCount::new(length)).bench_local(|| {
        let mut copy = BodyCopy::new(64 * 1024);
        for piece in black_box(&body).chunks(8 * 1024) {
            copy.add(piece);
        }
        copy
    });
}
