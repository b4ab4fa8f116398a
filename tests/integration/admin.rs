//! The admin server of the real binary (contract section 6): each page, each verb, each metric, and who may do what.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use upsolver_auth_proxy::simulator::{Account, Action, Fault, Options, Simulator};

use crate::support::proxy::{Builder, Proxy, assert_no_secret, canary};
use crate::support::raw::{Message, PATIENCE, Raw};
use crate::support::wire::{GET, OK, Wire};

fn start(configure: impl FnOnce(Builder) -> Builder) -> (Simulator, Account, Proxy) {
    let account = Account { email: format!("{}@example.com", canary("email")), password: canary("password") };
    let simulator = Simulator::start(Options { accounts: vec![account.clone()], ..Options::default() }).expect("a free port");
    let proxy = configure(Builder::to_simulator(&simulator, &account)).start();
    proxy.wait_ready();
    (simulator, account, proxy)
}

/// One request with these fields and body.
fn ask(proxy: &Proxy, method: &str, path: &str, fields: &str, body: &str) -> Message {
    let mut connection = Raw::connect(proxy.admin);
    connection.send(format!("{method} {path} HTTP/1.1\r\n{fields}Content-Length: {}\r\n\r\n{body}", body.len()));
    connection.read_response(method == "HEAD").expect("an answer")
}

const HOST: &str = "Host: localhost\r\n";

const PAGES: &[&str] = &["/startup", "/readiness", "/readyz", "/liveness", "/livez", "/healthz", "/metrics", "/status", "/log-level"];
const VERBS: &[&str] = &["/quitquitquit", "/reload", "/token/refresh"];

#[test]
fn each_page_answers_get_and_head_and_no_other_method() {
    let (_simulator, _account, proxy) = start(|builder| builder);
    for path in PAGES {
        let get = ask(&proxy, "GET", path, HOST, "");
        assert_eq!((get.status(), get.complete), (200, true), "{path}");
        assert_eq!(get.header("cache-control"), Some("no-store"), "{path}");
        let head = ask(&proxy, "HEAD", path, HOST, "");
        assert_eq!((head.status(), head.header("content-type")), (200, get.header("content-type")), "{path}");
        for method in ["POST", "DELETE", "OPTIONS", "TRACE"] {
            let answer = ask(&proxy, method, path, HOST, "");
            assert_eq!(answer.status(), 405, "{method} {path}");
            assert!(answer.header("allow").is_some_and(|allow| allow.starts_with("GET, HEAD")), "{method} {path}");
        }
    }
    for path in VERBS {
        for method in ["GET", "HEAD", "PUT", "DELETE"] {
            let answer = ask(&proxy, method, path, HOST, "");
            assert_eq!((answer.status(), answer.header("allow")), (405, Some("POST")), "{method} {path}");
        }
    }
    assert_eq!(ask(&proxy, "GET", "/inputs/", HOST, "").status(), 404, "nothing is forwarded here");
    for path in ["/startup", "/readiness", "/liveness"] {
        let health: serde_json::Value = serde_json::from_slice(&ask(&proxy, "GET", path, HOST, "").body).expect("JSON");
        assert_eq!(health, serde_json::json!({ "status": "ok", "reasons": [] }), "{path}");
    }
}

/// A page in a browser, or a name that leads here (DNS rebinding), changes nothing.
#[test]
fn no_verb_is_for_a_web_page() {
    let (simulator, _account, proxy) = start(|builder| builder);
    for path in VERBS {
        for origin in ["http://evil.example", "http://localhost", "null"] {
            let answer = ask(&proxy, "POST", path, &format!("{HOST}Origin: {origin}\r\n"), "");
            assert_eq!(answer.status(), 403, "{path} {origin}");
        }
        let answer = ask(&proxy, "POST", path, "Host: evil.example\r\n", "");
        assert!(matches!(answer.status(), 403 | 421), "{path}: {}", answer.start);
    }
    assert_eq!(ask(&proxy, "PUT", "/log-level", &format!("{HOST}Origin: null\r\n"), "debug").status(), 403);
    assert_eq!(proxy.get("/inputs/").status(), 200, "it does not stop");
    assert_eq!((simulator.mints().len(), proxy.status()["token"]["generation"].as_u64()), (1, Some(1)));
    assert_eq!(ask(&proxy, "GET", "/log-level", HOST, "").text(), "trace\n");
}

#[test]
fn status_has_the_fields_of_the_contract() {
    let (simulator, _account, proxy) = start(|builder| builder);
    let status = proxy.status();
    let fields: Vec<_> = status.as_object().expect("an object").keys().map(String::as_str).collect();
    let mut expected = [
        "version",
        "uptime_seconds",
        "ready",
        "reasons",
        "upstream",
        "workers",
        "requests_in_flight",
        "token",
        "last_mint",
        "next_attempt",
        "mints_left",
        "credentials",
    ];
    expected.sort_unstable();
    assert_eq!(fields, expected);
    assert_eq!((&status["ready"], &status["workers"], &status["upstream"]), (&true.into(), &1.into(), &simulator.url().into()));
    assert_eq!((&status["token"]["source"], &status["token"]["generation"]), (&"minted".into(), &1.into()));
    assert_eq!(status["token"]["id"], simulator.mints()[0].id.as_str());
    assert_eq!(status["last_mint"]["result"], "success");
    assert_eq!(status["mints_left"], 5);
}

#[test]
fn token_refresh_mints_within_the_budget() {
    let (simulator, _account, proxy) = start(|builder| builder.set("token.mint_budget=2"));
    let old = simulator.mints()[0].token.clone();
    assert_eq!(proxy.ask_admin("POST", "/token/refresh").status(), 202);
    proxy.wait_until("the successor", |proxy| proxy.status()["token"]["generation"] == 2);
    assert_eq!(proxy.get("/inputs/").status(), 200);
    let request = simulator.requests().into_iter().rfind(|request| request.path() == "/inputs/").expect("it was forwarded");
    assert_ne!(request.header("authorization"), Some(old.as_str()), "the successor is used");
    let refused = proxy.ask_admin("POST", "/token/refresh");
    assert_eq!(refused.status(), 429);
    assert!(refused.header("retry-after").is_some_and(|seconds| seconds.parse::<u32>().is_ok_and(|seconds| seconds > 0)), "{refused:?}");
    assert_eq!(simulator.mints().len(), 2);
}

#[test]
fn log_level_is_read_and_set() {
    let (_simulator, _account, proxy) = start(|builder| builder);
    assert_eq!(ask(&proxy, "PUT", "/log-level", HOST, "no such,,level=[").status(), 400);
    // A misspelt level would be the name of a module, and everything else silent: refused with the words of the configuration.
    for (filter, hint) in
        [("inof", "did you mean \"info\"?"), ("verbose", "verbose is no level"), ("info,debgu", "did you mean \"debug\"?")]
    {
        let answer = ask(&proxy, "PUT", "/log-level", HOST, filter);
        let body: serde_json::Value = serde_json::from_slice(&answer.body).expect("JSON");
        assert!(answer.status() == 400 && body["reasons"][0].as_str().is_some_and(|reason| reason.contains(hint)), "{filter}: {answer:?}");
    }
    assert_eq!(ask(&proxy, "GET", "/log-level", HOST, "").text(), "trace\n", "unchanged");
    assert_eq!(ask(&proxy, "PUT", "/log-level", HOST, "off").status(), 200);
    assert_eq!(ask(&proxy, "GET", "/log-level", HOST, "").text(), "off\n");
    assert_eq!(proxy.get("/while/off").status(), 404);
    assert_eq!(ask(&proxy, "PUT", "/log-level", HOST, "info").status(), 200);
    assert_eq!(proxy.get("/while/on").status(), 404);
    proxy.wait_for_log("/while/on");
    assert!(!proxy.log().contains("/while/off"), "{}", proxy.log());
}

/// Contract section 5: what can't change live is told, secrets included, and none of them is shown.
#[test]
fn a_changed_secret_needs_a_restart() {
    let [old, new] = ["old", "new"].map(canary);
    let text = |secret: &str| {
        format!(
            "[credentials]\nemail = '{secret}@example.com'\npassword = '{secret}'\n[upstream]\nproxy = 'http://me:{secret}@127.0.0.1:1'\n"
        )
    };
    let builder = Builder::new().secret(&old).secret(&new);
    let file = builder.file("proxy.toml", text(&old));
    let proxy = builder.env("UPSOLVER_AUTH_PROXY_CONFIG", file.display().to_string()).start();
    assert!(proxy.ask_admin("POST", "/reload").text().contains("\"needs_restart\":[]"));
    std::fs::write(file, text(&new)).expect("a writable directory");
    let answer = proxy.ask_admin("POST", "/reload");
    let expected = r#""needs_restart":["credentials.email","credentials.password","upstream.proxy"]"#;
    assert!(answer.text().contains(expected) && !answer.text().contains(&new), "{answer:?}");
    proxy.wait_until("a line for each", |proxy| proxy.log().matches("the new value needs a restart").count() == 3);
}

/// Everything that the contract names is on the page from the start, but for what has no value yet; and each moves when its thing happens.
#[test]
fn each_metric_of_the_contract_is_there_and_moves() {
    let (simulator, account, proxy) = start(|builder| {
        builder
            .set("token.min_mint_interval=0s")
            .set("token.probe_interval=1ms")
            .set("policy.rules=[{ action = \"deny\", path = \"/denied\" }]")
    });
    let answer = proxy.ask_admin("GET", "/metrics");
    assert_eq!(answer.header("content-type"), Some("application/openmetrics-text; version=1.0.0; charset=utf-8"));
    let page = answer.text();
    assert!(page.ends_with("# EOF\n"));
    for (name, kind) in [
        ("requests", "counter"),
        ("request_duration_seconds", "histogram"),
        ("requests_in_flight", "gauge"),
        ("errors", "counter"),
        ("upstream_connections", "gauge"),
        ("upstream_connects", "counter"),
        ("request_bytes", "counter"),
        ("response_bytes", "counter"),
        ("replays", "counter"),
        ("token_mints", "counter"),
        ("token_mint_duration_seconds", "histogram"),
        ("token_generation", "gauge"),
        ("token_created_timestamp_seconds", "gauge"),
        ("token_usable", "gauge"),
        ("token_rejections", "counter"),
        ("token_probes", "counter"),
        ("token_store_errors", "counter"),
        ("credentials_reloads", "counter"),
        ("credentials_pending_rejected", "gauge"),
        ("policy_denials", "counter"),
        ("build", "info"),
    ] {
        assert!(page.contains(&format!("# TYPE upsolver_auth_proxy_{name} {kind}\n")), "{name} {kind} in:\n{page}");
    }
    assert!(page.contains(&format!("upsolver_auth_proxy_build_info{{version=\"{}\"}} 1\n", env!("CARGO_PKG_VERSION"))), "{page}");

    let metric = |sample: &str| proxy.metric(&format!("upsolver_auth_proxy_{sample}"));
    assert_eq!((metric("token_generation"), metric("token_usable"), metric("token_mints_total{result=\"success\"}")), (1.0, 1.0, 1.0));
    assert!(metric("token_created_timestamp_seconds") > 1e9);
    assert_eq!(metric("token_mint_duration_seconds_count"), 1.0);

    let mut upload = proxy.connect();
    upload.send("POST /sink HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n").send([b'x'; 1000]);
    assert_eq!(upload.read_response(false).expect("an answer").status(), 200);
    assert_eq!(proxy.get("/bytes/5000").body.len(), 5000);
    assert_eq!(proxy.get("/denied").status(), 405);
    assert_eq!(proxy.exchange("BREW /bytes/1 HTTP/1.1\r\nHost: localhost\r\n\r\n").status(), 404);
    proxy.wait_until("the counts", |_| metric("requests_total{method=\"other\",status=\"404\",source=\"upstream\"}") >= 1.0);
    assert_eq!(metric("requests_total{method=\"POST\",status=\"200\",source=\"upstream\"}"), 1.0);
    assert_eq!(metric("requests_total{method=\"GET\",status=\"200\",source=\"upstream\"}"), 1.0);
    assert_eq!(metric("requests_total{method=\"GET\",status=\"405\",source=\"proxy\"}"), 1.0);
    assert_eq!(metric("request_duration_seconds_count"), 4.0);
    assert_eq!(metric("errors_total{code=\"policy_denied\"}"), 1.0);
    assert_eq!(metric("policy_denials_total{rule=\"0\",dry_run=\"false\"}"), 1.0);
    assert_eq!(metric("request_bytes_total"), 1000.0);
    assert!(metric("response_bytes_total") >= 5000.0);
    assert!(metric("upstream_connects_total{result=\"success\"}") >= 1.0);
    assert_eq!(metric("upstream_connections{state=\"active\"}"), 0.0);
    assert!(metric("upstream_connections{state=\"idle\"}") >= 1.0);

    // A revoked token: rejection, probe, mint, replay.
    simulator.revoke_all();
    assert_eq!(proxy.get("/inputs/").status(), 200);
    assert_eq!(metric("token_rejections_total{status=\"403\"}"), 1.0);
    assert_eq!(metric("token_probes_total{result=\"dead\"}"), 1.0);
    assert_eq!((metric("token_mints_total{result=\"success\"}"), metric("token_generation")), (2.0, 2.0));
    assert_eq!(metric("replays_total{result=\"success\"}"), 1.0);
    // A mint that fails.
    simulator.fault(Fault::at("/api-tokens/", Action::status(503)));
    assert_eq!(proxy.ask_admin("POST", "/token/refresh").status(), 202);
    proxy.wait_until("a failed mint", |_| proxy.status()["last_mint"]["result"] != "success");
    assert_eq!((metric("token_usable"), metric("token_mints_total{result=\"success\"}")), (1.0, 2.0));
    let failed: f64 = proxy
        .ask_admin("GET", "/metrics")
        .text()
        .lines()
        .filter(|line| line.starts_with("upsolver_auth_proxy_token_mints_total{") && !line.contains("success"))
        .map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<f64>().ok()).expect("a value"))
        .sum();
    assert!(failed >= 1.0);
    // An exchange that hangs is in flight, and its connection in use.
    simulator.fault(Fault::at("/hang", Action::hang_after_body()));
    let mut hanging = proxy.connect();
    hanging.send("GET /hang HTTP/1.1\r\nHost: localhost\r\n\r\n");
    simulator.wait_for(|requests| requests.iter().any(|request| request.path() == "/hang"), PATIENCE).expect("it was forwarded");
    assert_eq!((metric("requests_in_flight"), metric("upstream_connections{state=\"active\"}")), (1.0, 1.0));
    drop(hanging);
    proxy.wait_until("the end", |_| metric("requests_in_flight") == 0.0 && metric("upstream_connections{state=\"active\"}") == 0.0);

    let secrets = [account.email, account.password, simulator.live_tokens()[0].clone()];
    for path in PAGES {
        assert_no_secret(&secrets, &proxy.ask_admin("GET", path).text());
    }
}

/// The connections of HTTP/2 are idle while no request uses them, as those of HTTP/1.1 are.
#[test]
fn an_http2_connection_is_idle_between_requests() {
    let account = Account { email: format!("{}@example.com", canary("email")), password: canary("password") };
    let protocols = upsolver_auth_proxy::simulator::Protocols::Http2;
    let simulator = Simulator::start(Options { accounts: vec![account.clone()], protocols, ..Options::default() }).expect("a free port");
    let proxy = Builder::to_simulator(&simulator, &account).set("upstream.http_version=2").start();
    proxy.wait_ready();
    assert_eq!(proxy.get("/inputs/").status(), 200);
    let connections = |state| proxy.metric(&format!("upsolver_auth_proxy_upstream_connections{{state=\"{state}\"}}"));
    proxy.wait_until("an idle connection", |_| (connections("idle"), connections("active")) == (1.0, 0.0));
    let mut hanging = proxy.connect();
    hanging.send("GET /slow/1000 HTTP/1.1\r\nHost: localhost\r\n\r\n");
    hanging.read_head().expect("the reply begins");
    assert_eq!((connections("idle"), connections("active")), (0.0, 1.0));
    drop(hanging);
    proxy.wait_until("an idle connection", |_| (connections("idle"), connections("active")) == (1.0, 0.0));
    simulator.end_connections(upsolver_auth_proxy::simulator::End::Close);
    proxy.wait_until("no connection", |_| (connections("idle"), connections("active")) == (0.0, 0.0));
}

/// Connections that say nothing keep no probe from its answer, however many they are.
#[test]
fn b12_silent_connections_do_not_keep_probes_out() {
    let (_simulator, _account, proxy) = start(|builder| builder);
    let silent: Vec<_> = (0..60).map(|_| Raw::connect(proxy.admin)).collect();
    assert_eq!(proxy.ask_admin("GET", "/liveness").status(), 200);
    drop(silent);
    assert_eq!(proxy.ask_admin("GET", "/readiness").status(), 200);
}

#[test]
fn the_admin_server_may_be_a_unix_socket() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("admin.sock");
    let mut wire = Wire::with(|builder| builder.set(format!("admin.address=unix:{}", socket.display())));
    let ask = |method: &str, path: &str| {
        let mut connection = UnixStream::connect(&socket).expect("the listener accepts");
        connection.set_read_timeout(Some(PATIENCE)).expect("a socket");
        write!(connection, "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n").expect("a writable socket");
        let mut answer = String::new();
        connection.read_to_string(&mut answer).expect("an answer");
        answer
    };
    assert!(ask("GET", "/liveness").starts_with("HTTP/1.1 200 "));
    let mut downstream = wire.proxy.connect();
    downstream.send(GET);
    let mut upstream = wire.upstream.accept();
    upstream.read_request().expect("a request");
    upstream.send(OK);
    assert_eq!(downstream.read_response(false).expect("an answer").status(), 200);
    assert!(ask("POST", "/quitquitquit").starts_with("HTTP/1.1 200 "));
    assert_eq!(wire.proxy.wait_exit().code(), Some(0));
    assert!(!socket.exists(), "the socket stayed behind");
}

/// C02: whatever the upstream does, the proxy stays live; a restart would only lead to more mints.
#[test]
fn c02_liveness_has_nothing_to_do_with_the_upstream() {
    let (simulator, _account, proxy) = start(|builder| builder.set("token.min_mint_interval=1h").set("token.wait=50ms"));
    simulator.revoke_all();
    simulator.fault(Fault::everywhere(Action::Delay(Duration::from_millis(100))));
    assert_eq!(proxy.get("/inputs/").status(), 403, "the mint has to wait, so this request gets the rejection");
    proxy.wait_until("unreadiness", |proxy| proxy.ask_admin("GET", "/readiness").status() == 503);
    assert_eq!(proxy.get("/inputs/").code(), "token_unavailable");
    for path in ["/liveness", "/livez", "/healthz", "/startup"] {
        assert_eq!(proxy.ask_admin("GET", path).status(), 200, "{path}");
    }
    assert_eq!(simulator.mints().len(), 1);
}
