//! The token's life as an app and an operator see it (contract section 5): between the real binary and the simulated API.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use upsolver_auth_proxy::simulator::{Account, Action, Fault, Options, Received, Simulator};

use crate::support::proxy::{Builder, Proxy, canary, long_or};
use crate::support::raw::{PATIENCE, Raw};

fn account() -> Account {
    Account { email: format!("{}@example.com", canary("email")), password: canary("password") }
}

fn simulator(account: &Account) -> Simulator {
    Simulator::start(Options { accounts: vec![account.clone()], ..Options::default() }).expect("a free port")
}

/// A proxy that may mint as fast as a test revokes.
fn eager(simulator: &Simulator, account: &Account) -> Builder {
    Builder::to_simulator(simulator, account)
        .set("token.min_mint_interval=0s")
        .set("token.mint_budget=1000")
        .set("token.probe_interval=1ms")
}

fn mint_attempts(simulator: &Simulator) -> Vec<Received> {
    simulator.requests().into_iter().filter(|request| request.method == "POST" && request.path().starts_with("/api-tokens")).collect()
}

fn probes(simulator: &Simulator) -> usize {
    simulator.requests().iter().filter(|request| request.is("GET", "/users")).count()
}

fn the_token(simulator: &Simulator) -> String {
    let tokens = simulator.live_tokens();
    assert_eq!(tokens.len(), 1, "one live token");
    tokens[0].clone()
}

/// The main job: one mint with the pair in the headers, then each request with the token and without what the app sent as its own.
#[test]
fn mints_once_and_adds_the_token() {
    let account = account();
    let simulator = simulator(&account);
    let proxy = Builder::to_simulator(&simulator, &account).set("token.name=billing").start();
    proxy.wait_ready();
    let answer = proxy.exchange("GET /inputs/?page=1 HTTP/1.1\r\nHost: localhost\r\nAuthorization: unused\r\n\r\n");
    assert_eq!(answer.status(), 200, "{answer:?}");

    let mints = mint_attempts(&simulator);
    assert_eq!(mints.len(), 1);
    let mint = &mints[0];
    assert_eq!(mint.target, "/api-tokens/");
    assert_eq!(mint.header("x-api-email"), Some(account.email.as_str()));
    assert_eq!(mint.header("x-api-password"), Some(account.password.as_str()));
    assert_eq!(mint.header("content-type"), Some("application/json"));
    let body: serde_json::Value = serde_json::from_slice(&mint.body).expect("JSON");
    assert!(body["displayData"]["name"].as_str().is_some_and(|name| name.contains("billing")), "{body}");

    let token = the_token(&simulator);
    let requests = simulator.requests();
    let request = requests.iter().find(|request| request.path() == "/inputs/").expect("it was forwarded");
    assert_eq!(request.target, "/inputs/?page=1");
    assert_eq!(request.header("authorization"), Some(token.as_str()), "exactly one, ours");
    // C51: the password goes with the mint alone, and on a connection that carries nothing else.
    for other in requests.iter().filter(|request| !request.path().starts_with("/api-tokens")) {
        assert!(other.header_all("x-api-password").is_empty() && other.header_all("x-api-email").is_empty());
        assert_ne!(other.connection, mint.connection, "c51");
    }
    let status = proxy.status();
    assert_eq!(status["ready"], true, "{status}");
    assert_eq!(status["token"]["generation"], 1, "{status}");
    assert!(!status.to_string().contains(&token), "no secret in /status");
    assert!(!proxy.log().contains(&token), "no token in the log");
}

#[test]
fn c01_c02_an_unavailable_api_keeps_it_live_and_unready_until_it_heals() {
    let account = account();
    let simulator = simulator(&account);
    let fault = simulator.fault(Fault::at("/api-tokens/", Action::status(503)));
    let proxy = Builder::to_simulator(&simulator, &account).set("token.wait=50ms").start();
    proxy.wait_until("a failed mint", |_| simulator.strikes(fault) >= 2);
    assert_eq!(proxy.ask_admin("GET", "/liveness").status(), 200);
    assert_eq!(proxy.ask_admin("GET", "/startup").status(), 503);
    assert_eq!(proxy.ask_admin("GET", "/readiness").status(), 503);
    let answer = proxy.get("/inputs/");
    assert_eq!((answer.status(), answer.code().as_str()), (503, "token_unavailable"));
    assert!(answer.header("retry-after").is_some());
    simulator.remove_fault(fault);
    proxy.wait_ready();
    assert_eq!(proxy.ask_admin("GET", "/startup").status(), 200);
    assert_eq!(proxy.get("/inputs/").status(), 200);
    assert_eq!(simulator.mints().len(), 1);
}

#[test]
fn c03_early_requests_wait_with_their_bodies_unread() {
    let account = account();
    let simulator = simulator(&account);
    simulator.fault(Fault::at("/api-tokens/", Action::Delay(Duration::from_millis(300))).once());
    let proxy = Builder::to_simulator(&simulator, &account).start();
    let mut connection = proxy.connect();
    // A 100 would say that the body is wanted already.
    connection.send("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n");
    let interim = connection.read_head().expect("an interim response");
    assert_eq!(interim.status(), 100);
    assert_eq!(simulator.mints().len(), 1, "the 100 came after the mint");
    connection.send("hello");
    let answer = connection.read_response(false).expect("an answer");
    assert_eq!((answer.status(), answer.text().as_str()), (200, "hello"));
}

#[test]
fn c04_wrong_credentials_are_not_tried_again_until_they_change() {
    let account = account();
    let simulator = simulator(&account);
    let builder =
        Builder::to_simulator_without_credentials(&simulator).set("token.wait=50ms").secret(&account.email).secret(&account.password);
    let wrong = canary("wrongpassword");
    let email = builder.file("email", &account.email);
    let password = builder.file("password", &wrong);
    let proxy = builder
        .secret(&wrong)
        .set(format!("credentials.email_file={}", email.display()))
        .set(format!("credentials.password_file={}", password.display()))
        .set("credentials.poll_interval=50ms")
        .start();
    let line = proxy.wait_for_log("rejected");
    assert!(line.contains("password"), "the log names the files: {line}");
    assert!(line.contains("read again by themselves") && !line.contains("restart"), "{line}");
    proxy.wait_until("the rejection in /status", |proxy| proxy.status()["last_mint"]["result"] == "rejected");
    assert_eq!(proxy.get("/inputs/").code(), "token_unavailable");
    assert_eq!(mint_attempts(&simulator).len(), 1, "the same bytes are not tried again");
    assert_eq!(proxy.ask_admin("GET", "/liveness").status(), 200);
    std::fs::write(&password, format!("{}\r\n", account.password)).expect("writable");
    proxy.wait_ready();
    assert_eq!(mint_attempts(&simulator).len(), 2);
    assert_eq!(proxy.get("/inputs/").status(), 200);
}

/// Contract section 5, "Mint": "credentials or request are wrong". Which of them is told by the status, and what mends it.
#[test]
fn c04_c06_a_rejected_mint_says_what_to_correct() {
    let rows = [
        (400, "rejected the credentials", "restart"),
        (401, "rejected the credentials", "restart"),
        (403, "rejected the credentials", "restart"),
        (307, "refused the request for a token", "upstream.url"),
        (404, "refused the request for a token", "upstream.url"),
        (405, "refused the request for a token", "upstream.url"),
        (422, "refused the request for a token", "upstream.url"),
    ];
    for (status, what, remedy) in rows {
        let account = account();
        let simulator = simulator(&account);
        simulator.fault(Fault::at("/api-tokens/", Action::status(status)));
        let proxy = Builder::to_simulator(&simulator, &account).start();
        let line = proxy.wait_for_log(what);
        for part in ["WARN", remedy, &status.to_string()] {
            assert!(line.contains(part), "{status}: {part}: {line}");
        }
        // These come from the environment, which nobody reads a second time.
        assert!(!line.contains("by themselves"), "{status}: {line}");
        proxy.wait_until("the status", |proxy| proxy.status()["last_mint"]["result"] == "rejected");
        let page = proxy.status();
        let reasons = page["reasons"].to_string();
        for part in [what, remedy, &format!("HTTP {status}")] {
            assert!(reasons.contains(part), "{status}: {part}: {reasons}");
        }
        assert_eq!(page["token"]["state"], "credentials_rejected", "{status}");
    }
}

#[test]
fn c07_a_thousand_first_requests_share_one_mint() {
    let account = account();
    let simulator = simulator(&account);
    simulator.fault(Fault::at("/api-tokens/", Action::Delay(Duration::from_millis(500))).once());
    let proxy = Builder::to_simulator(&simulator, &account).set("limits.max_in_flight=2000").set("log.level=info").start();
    let mut connections: Vec<Raw> = (0..500).map(|_| proxy.connect()).collect();
    for connection in &mut connections {
        connection.send("GET /inputs/ HTTP/1.1\r\nHost: localhost\r\n\r\n");
    }
    // Some give up while they wait; that cancels nothing for the others.
    drop(connections.drain(..50));
    for connection in &mut connections {
        assert_eq!(connection.read_response(false).expect("an answer").status(), 200);
    }
    assert_eq!(mint_attempts(&simulator).len(), 1);
}

#[test]
fn c11_a_lost_reply_is_logged_with_its_name_and_counted() {
    let account = account();
    let simulator = simulator(&account);
    simulator.fault(Fault::at("/api-tokens/", Action::drop_reply()).once());
    let proxy = Builder::to_simulator(&simulator, &account).set("token.min_mint_interval=200ms").set("token.name=orphan").start();
    proxy.wait_ready();
    let mints = simulator.mints();
    assert_eq!(mints.len(), 2, "the lost one and its successor");
    let log = proxy.log();
    assert!(
        log.lines().any(|line| line.contains(&mints[0].name) && line.contains("WARN")),
        "the orphan's name is logged: {}",
        mints[0].name
    );
    assert_eq!(proxy.metric("upsolver_auth_proxy_token_mints_total{result=\"lost\"}"), 1.0);
    assert_eq!(proxy.status()["mints_left"], 4, "six less two");
}

#[test]
fn c12_c13_an_unusable_reply_is_never_used_and_never_quoted() {
    let replies = [
        ("", "empty"),
        ("not JSON at all", "no JSON"),
        ("[]", "an array"),
        ("{\"token\":\"x\"}", "no apiToken"),
        ("{\"apiToken\":null}", "null"),
        ("{\"apiToken\":123456789}", "a number"),
        ("{\"apiToken\":\"\"}", "empty token"),
        ("{\"apiToken\":\"canaryreply\\r\\nx: y\"}", "CR LF"),
        ("{\"apiToken\":\"canaryreply\\u0000\"}", "NUL"),
        ("{\"apiToken\":\"canaryreply ", "truncated"),
    ];
    let account = account();
    for (reply, what) in replies {
        let simulator = simulator(&account);
        let fault = simulator.fault(Fault::at("/api-tokens/", Action::json(200, reply)));
        let proxy = Builder::to_simulator(&simulator, &account).secret("canaryreply").set("token.wait=20ms").start();
        proxy.wait_until(what, |proxy| proxy.metric("upsolver_auth_proxy_token_mints_total{result=\"invalid\"}") >= 1.0);
        assert_eq!(simulator.strikes(fault), 1, "{what}: paced by min_mint_interval, since it may have left a token");
        assert_eq!(proxy.get("/inputs/").code(), "token_unavailable", "{what}");
        assert!(!simulator.requests().iter().any(|request| request.path() == "/inputs/"), "{what}: nothing leaves");
    }
}

/// C14: a mint's reply that drips, or stops after its head, ends at `token.mint_timeout`; it may have left a token, so it counts.
#[test]
fn c14_a_dripping_mint_reply_ends_at_the_deadline() {
    let account = account();
    let simulator = simulator(&account);
    simulator.fault(Fault::at("/api-tokens/", Action::stall_body(3)).once());
    let proxy = Builder::to_simulator(&simulator, &account).set("token.mint_timeout=300ms").set("token.min_mint_interval=100ms").start();
    proxy.wait_ready();
    assert_eq!(proxy.metric("upsolver_auth_proxy_token_mints_total{result=\"lost\"}"), 1.0);
    assert_eq!(simulator.mints().len(), 2);
}

/// The same load as below with the default pacing: the budget holds, and the log says why nothing is minted.
#[test]
fn revocations_with_the_default_pacing_stay_within_the_interval_and_say_so() {
    let account = account();
    let simulator = simulator(&account);
    let proxy = Builder::to_simulator(&simulator, &account).set("token.wait=20ms").start();
    proxy.wait_ready();
    for _ in 0..5 {
        simulator.revoke_all();
        for _ in 0..10 {
            assert!(matches!(proxy.get("/inputs/").status(), 403 | 503));
        }
    }
    assert_eq!(simulator.mints().len(), 1, "min_mint_interval is 60 s");
    let reasons = proxy.status()["reasons"].to_string();
    assert!(reasons.contains("min_mint_interval") || reasons.contains("interval"), "{reasons}");
}

#[test]
fn c18_c19_an_honest_403_is_relayed_untouched_with_one_probe_and_no_mint() {
    let account = account();
    let simulator = simulator(&account);
    let proxy = Builder::to_simulator(&simulator, &account).start();
    proxy.wait_ready();
    let direct = proxy.get("/forbidden/1");
    assert_eq!(direct.status(), 403);
    assert!(direct.text().contains("ForbiddenException"));
    assert!(direct.header("x-api-requestid").is_some());
    let began = Instant::now();
    thread::scope(|scope| {
        for _ in 0..5 {
            scope.spawn(|| {
                for _ in 0..long_or(600, 20) {
                    assert_eq!(proxy.get("/forbidden/1").status(), 403);
                    thread::sleep(long_or(Duration::from_millis(100), Duration::ZERO));
                }
            });
        }
    });
    let intervals = usize::try_from(began.elapsed().as_secs() / 30).expect("a small number");
    assert!(probes(&simulator) <= 1 + intervals, "one probe in each probe_interval, 30 s");
    assert_eq!(simulator.mints().len(), 1, "no mint but the first");
    assert_eq!(proxy.status()["token"]["generation"], 1);
}

#[test]
fn c17_c20_a_revoked_token_is_replaced_and_the_request_sent_again() {
    let account = account();
    let simulator = simulator(&account);
    let proxy = eager(&simulator, &account).start();
    proxy.wait_ready();
    let old = the_token(&simulator);
    assert!(simulator.revoke(&old));
    let answer = proxy.get("/inputs/");
    assert_eq!(answer.status(), 200, "the app sees no error");
    assert_eq!(simulator.mints().len(), 2);
    assert_eq!(probes(&simulator), 1);
    assert_eq!(proxy.status()["token"]["generation"], 2);
    assert_eq!(proxy.metric("upsolver_auth_proxy_replays_total{result=\"success\"}"), 1.0);
}

#[test]
fn c21_a_post_is_sent_again_with_its_body_and_safe_relays_the_403() {
    let account = account();
    for (replay, size, framing, expected) in [
        ("all", 1000, "length", 200),
        ("all", 60_000, "chunked", 200),
        ("all", 70_000, "length", 403),
        ("all", 70_000, "chunked", 403),
        ("safe", 1000, "length", 403),
        ("off", 1000, "length", 403),
    ] {
        let simulator = simulator(&account);
        let proxy = eager(&simulator, &account).set(format!("token.replay={replay}")).start();
        proxy.wait_ready();
        simulator.revoke_all();
        let body: Vec<u8> = (0..size).map(|i| u8::try_from(i % 251).expect("small")).collect();
        let mut connection = proxy.connect();
        if framing == "length" {
            connection.send(format!("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"));
            connection.send(&body);
        } else {
            connection.send("POST /echo HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n");
            for chunk in body.chunks(1000) {
                connection.send(format!("{:x}\r\n", chunk.len())).send(chunk).send("\r\n");
            }
            connection.send("0\r\n\r\n");
        }
        let answer = connection.read_response(false).expect("an answer");
        assert_eq!(answer.status(), expected, "replay={replay} {size} bytes {framing}");
        if expected == 200 {
            assert!(answer.body == body, "replay={replay} {size} bytes {framing}: the whole body arrived");
        }
        proxy.wait_until("the replacement", |proxy| proxy.status()["token"]["generation"] == 2);
        // C47: what could not be replayed was relayed; the next request works.
        assert_eq!(proxy.get("/inputs/").status(), 200);
        assert_eq!(simulator.mints().len(), 2);
    }
}

#[test]
fn c22_parallel_rejections_share_one_probe_and_one_mint() {
    let account = account();
    let simulator = simulator(&account);
    let proxy = eager(&simulator, &account).start();
    proxy.wait_ready();
    simulator.revoke_all();
    thread::scope(|scope| {
        for _ in 0..100 {
            scope.spawn(|| assert_eq!(proxy.get("/inputs/").status(), 200));
        }
    });
    assert_eq!(simulator.mints().len(), 2);
    assert_eq!(probes(&simulator), 1);
}

#[test]
fn c23_a_token_that_dies_young_is_not_replaced_until_it_may_be() {
    let account = account();
    let simulator = simulator(&account);
    let proxy = Builder::to_simulator(&simulator, &account).set("token.wait=50ms").start();
    proxy.wait_ready();
    simulator.revoke_all();
    let answer = proxy.get("/inputs/");
    assert_eq!(answer.status(), 403, "the request that saw the rejection gets it");
    assert_eq!(proxy.ask_admin("GET", "/readiness").status(), 503);
    let sent = simulator.requests().len();
    assert_eq!(proxy.get("/inputs/").code(), "token_unavailable");
    assert_eq!(simulator.requests().len(), sent, "none is sent with a token known to be dead");
    assert_eq!(simulator.mints().len(), 1);
}

#[test]
fn c24_c25_what_proves_nothing_mints_nothing() {
    let account = account();
    for probe in [404, 500, 429] {
        let simulator = simulator(&account);
        simulator.fault(Fault::at("/users", Action::status(probe)));
        let proxy = eager(&simulator, &account).start();
        proxy.wait_ready();
        assert_eq!(proxy.get("/forbidden/1").status(), 403, "probe {probe}");
        assert_eq!(simulator.mints().len(), 1, "probe {probe}");
        // A firewall in front answers for itself: no request id, no probe.
        let before = probes(&simulator);
        simulator.fault(Fault::at("/waf", Action::status(403)));
        assert_eq!(proxy.get("/waf").status(), 403);
        assert_eq!(probes(&simulator), before, "no request id, no probe");
    }
}

#[test]
fn c06_b23_a_redirected_mint_is_not_followed() {
    let account = account();
    let simulator = simulator(&account);
    let redirect = http::Response::builder().status(307).header("location", "/elsewhere").body(bytes::Bytes::new()).expect("valid");
    simulator.fault(Fault::at("/api-tokens/", Action::Reply(redirect)));
    let proxy = Builder::to_simulator(&simulator, &account).start();
    proxy.wait_until("the failed mint", |proxy| proxy.status()["last_mint"]["result"] == "rejected");
    assert!(simulator.requests().iter().all(|request| request.path() == "/api-tokens/"));
}

/// C40: the old token serves until the new credentials have minted a successor; no request fails.
#[test]
fn c35_c40_a_rotated_secret_volume_costs_no_request() {
    let account = account();
    let simulator = simulator(&account);
    let builder = Builder::to_simulator_without_credentials(&simulator);
    let volume = SecretVolume::new(builder.directory(), &account);
    let proxy = builder
        .secret(&account.password)
        .set(format!("credentials.email_file={}", volume.file("email")))
        .set(format!("credentials.password_file={}", volume.file("password")))
        .set("credentials.poll_interval=100ms")
        .set("token.min_mint_interval=0s")
        .set("token.mint_budget=1000")
        .start();
    proxy.wait_ready();
    let stop = AtomicBool::new(false);
    let served = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    assert_eq!(proxy.get("/inputs/").status(), 200);
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for generation in 2..long_or(62, 6) {
            let next = Account { email: account.email.clone(), password: canary("password") };
            simulator.change_password(&next.email, &next.password);
            volume.swap(&next);
            proxy.wait_until("the rotation", |proxy| proxy.status()["token"]["generation"] == generation);
            thread::sleep(long_or(Duration::from_secs(1), Duration::ZERO));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(served.load(Ordering::Relaxed) > 0);
    assert_eq!(simulator.mints().len(), long_or(61, 5));
}

#[test]
fn c41_bad_new_credentials_leave_the_old_token_in_use_and_say_so() {
    let account = account();
    let simulator = simulator(&account);
    let builder = Builder::to_simulator_without_credentials(&simulator);
    let volume = SecretVolume::new(builder.directory(), &account);
    let proxy = builder
        .set(format!("credentials.email_file={}", volume.file("email")))
        .set(format!("credentials.password_file={}", volume.file("password")))
        .set("credentials.poll_interval=100ms")
        .start();
    proxy.wait_ready();
    volume.swap(&Account { email: account.email.clone(), password: canary("wrong") });
    proxy.wait_until("the rejection", |proxy| proxy.status()["credentials"]["pending_rejected"] == true);
    assert_eq!(proxy.ask_admin("GET", "/readiness").status(), 200);
    assert_eq!(proxy.get("/inputs/").status(), 200);
    assert_eq!(proxy.metric("upsolver_auth_proxy_credentials_pending_rejected"), 1.0);
    assert_eq!(mint_attempts(&simulator).len(), 2);
    volume.swap(&account);
    proxy.wait_until("the way back", |proxy| proxy.status()["credentials"]["pending_rejected"] == false);
    assert_eq!(proxy.get("/inputs/").status(), 200);
}

#[test]
fn c42_sighup_mints_nothing_and_ends_nothing() {
    let account = account();
    let simulator = simulator(&account);
    let proxy = Builder::to_simulator(&simulator, &account).start();
    proxy.wait_ready();
    for _ in 0..20 {
        proxy.signal(rustix::process::Signal::HUP);
    }
    proxy.wait_for_log("were read again");
    assert_eq!(proxy.ask_admin("POST", "/reload").status(), 200);
    assert_eq!(proxy.get("/inputs/").status(), 200);
    assert_eq!(simulator.mints().len(), 1);
}

#[test]
fn c49_a_fixed_token_is_never_minted_and_its_file_can_rotate() {
    let account = account();
    let simulator = simulator(&account);
    let first = simulator.make_token();
    let builder = Builder::to_simulator_without_credentials(&simulator).secret(&first).set("token.wait=100ms");
    let file = builder.file("token", format!("{first}\n"));
    let proxy = builder.set(format!("credentials.token_file={}", file.display())).set("credentials.poll_interval=50ms").start();
    proxy.wait_ready();
    assert_eq!(proxy.get("/inputs/").status(), 200);
    simulator.revoke(&first);
    assert_eq!(proxy.get("/inputs/").status(), 403);
    assert_eq!(proxy.ask_admin("GET", "/readiness").status(), 503);
    let second = simulator.make_token();
    std::fs::write(&file, &second).expect("writable");
    proxy.wait_ready();
    assert_eq!(proxy.get("/inputs/").status(), 200);
    assert_eq!(mint_attempts(&simulator).len(), 0);
}

/// Contract section 5, "Rotation": a new content of the token file that the upstream refuses takes nothing away, and the log says so.
#[test]
fn c49_a_rejected_new_token_file_leaves_the_old_token_in_use_and_says_so() {
    let account = account();
    let simulator = simulator(&account);
    let (first, wrong) = (simulator.make_token(), canary("wrong"));
    let builder = Builder::to_simulator_without_credentials(&simulator).secret(&first).secret(&wrong).set("token.wait=100ms");
    let file = builder.file("token", &first);
    let proxy = builder.set(format!("credentials.token_file={}", file.display())).set("credentials.poll_interval=50ms").start();
    proxy.wait_ready();
    std::fs::write(&file, &wrong).expect("writable");
    let line = proxy.wait_for_log("the token in hand stays in use");
    assert!(line.contains("WARN") && line.contains(&file.display().to_string()), "{line}");
    proxy.wait_until("the metric", |proxy| proxy.metric("upsolver_auth_proxy_credentials_pending_rejected") == 1.0);
    assert_eq!(proxy.ask_admin("GET", "/readiness").status(), 200);
    assert_eq!(proxy.get("/inputs/").status(), 200);
}

#[test]
fn a_refresh_mints_a_successor_within_the_budget() {
    let account = account();
    let simulator = simulator(&account);
    let proxy = Builder::to_simulator(&simulator, &account).set("token.mint_budget=2").start();
    proxy.wait_ready();
    assert!(matches!(proxy.ask_admin("POST", "/token/refresh").status(), 200 | 202));
    proxy.wait_until("the successor", |proxy| proxy.status()["token"]["generation"] == 2);
    let refused = proxy.ask_admin("POST", "/token/refresh");
    assert_eq!(refused.status(), 429);
    assert_eq!(simulator.mints().len(), 2);
    assert_eq!(proxy.status()["mints_left"], 0);
    assert_eq!(proxy.ask_admin("GET", "/readiness").status(), 200, "ready with the budget spent");
}

/// Contract section 3, `mint_budget`: "past it: no mint, and loud", also where nothing but `token.max_age` asks for a mint.
#[test]
fn a_renewal_without_budget_is_told_once_while_the_token_serves_on() {
    let account = account();
    let simulator = simulator(&account);
    let proxy = Builder::to_simulator(&simulator, &account)
        .set("token.max_age=300ms")
        .set("token.min_mint_interval=0s")
        .set("token.mint_budget=2")
        .start();
    let told = "token.mint_budget is spent";
    let line = proxy.wait_for_log(told);
    assert!(line.contains("WARN"), "{line}");
    let reason = "no successor yet: token.mint_budget (2 per hour) is spent";
    proxy.wait_until("the reason in /status", |proxy| proxy.status()["reasons"].to_string().contains(reason));
    for _ in 0..5 {
        thread::sleep(Duration::from_millis(200));
        assert_eq!(proxy.ask_admin("GET", "/readiness").status(), 200);
        assert_eq!(proxy.get("/inputs/").status(), 200);
    }
    assert_eq!(proxy.log().matches(told).count(), 1, "once, not as often as the token is looked at");
    assert_eq!(simulator.mints().len(), 2);
}

#[test]
fn superseded_tokens_are_revoked_where_a_path_is_set() {
    let account = account();
    let simulator = simulator(&account);
    let mut proxy = eager(&simulator, &account).set("token.revoke_path=/api-tokens/{id}").start();
    proxy.wait_ready();
    let first = the_token(&simulator);
    assert!(matches!(proxy.ask_admin("POST", "/token/refresh").status(), 200 | 202));
    proxy.wait_until("the revocation", |_| !simulator.live_tokens().contains(&first));
    assert_eq!(proxy.get("/inputs/").status(), 200);
    // No store keeps its own token, so a clean stop revokes that one too.
    assert!(proxy.stop().success());
    assert_eq!(simulator.live_tokens(), Vec::<String>::new());
}

/// A wrong `token.revoke_path` is answered with the 404 that a deleted token is answered with: that proves nothing.
#[test]
fn a_revocation_that_finds_nothing_is_no_success() {
    for status in [404, 410] {
        let account = account();
        let simulator = simulator(&account);
        simulator.fault(Fault::below("/elsewhere/", Action::status(status)));
        let mut proxy = eager(&simulator, &account).set("token.revoke_path=/elsewhere/{id}").start();
        proxy.wait_ready();
        assert!(proxy.stop().success());
        let mint = &simulator.mints()[0];
        let line = proxy.wait_for_log("token.revoke_path is wrong");
        for part in ["WARN", &status.to_string(), &mint.id, &mint.name] {
            assert!(line.contains(part), "{part}: {line}");
        }
        assert!(!proxy.log().contains("token revoked"));
    }
}

/// Contract section 5, "Store": one mint for many starts, however they end.
#[test]
fn c10_a_file_store_survives_kills_with_one_mint() {
    let account = account();
    let simulator = simulator(&account);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("token.json");
    for round in 0..long_or(100, 20) {
        let mut proxy = with_store(&simulator, &account, &path).start();
        proxy.wait_ready();
        assert_eq!(proxy.get("/inputs/").status(), 200, "round {round}");
        proxy.kill();
    }
    assert_eq!(simulator.mints().len(), 1);
    let stored = std::fs::read_to_string(&path).expect("the store");
    for secret in [&account.email, &account.password, &the_token(&simulator)] {
        assert!(!stored.contains(secret.as_str()), "no secret in clear");
    }
}

#[test]
fn c30_a_store_of_other_credentials_is_not_used() {
    let account = account();
    let simulator = simulator(&account);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("token.json");
    {
        let proxy = with_store(&simulator, &account, &path).start();
        proxy.wait_ready();
    }
    let other = Account { email: account.email.clone(), password: canary("other") };
    simulator.change_password(&other.email, &other.password);
    let proxy = with_store(&simulator, &other, &path).start();
    proxy.wait_ready();
    assert_eq!(proxy.get("/inputs/").status(), 200);
    let mints = simulator.mints();
    assert_eq!(mints.len(), 2);
    // It works still, and its store was written over: this is the last place that can name it.
    let line = proxy.wait_for_log("the stored token does not work with these credentials");
    assert!(line.contains("WARN") && line.contains(&mints[0].id) && line.contains(&mints[0].name), "{line}");
}

#[test]
fn c31_proxies_that_share_a_store_share_one_mint() {
    let account = account();
    let simulator = simulator(&account);
    simulator.fault(Fault::at("/api-tokens/", Action::Delay(Duration::from_millis(300))).once());
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("token.json");
    let proxies: Vec<Proxy> = (0..6).map(|_| with_store(&simulator, &account, &path).start()).collect();
    for proxy in &proxies {
        proxy.wait_ready();
        assert_eq!(proxy.get("/inputs/").status(), 200);
    }
    assert_eq!(simulator.mints().len(), 1);
}

/// C28: the log says what becomes of a file that is refused, and a place where others can put files is left alone.
#[test]
fn c28_a_refused_file_is_replaced_and_a_refused_directory_is_not_used() {
    use std::os::unix::fs::PermissionsExt;

    let account = account();
    let simulator = simulator(&account);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let path = directory.path().join("token.json");
    let mode = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("one's own");
    };
    std::fs::write(&path, "{}").expect("a writable directory");
    mode(&path, 0o644);
    {
        let proxy = with_store(&simulator, &account, &path).start();
        proxy.wait_ready();
        let line = proxy.wait_for_log("what it holds is not used; the next token minted replaces it");
        assert!(line.contains("refused: its mode is 0644"), "{line}");
        assert!(!proxy.log().contains("the token store does not work"), "{}", proxy.log());
    }
    let stored = std::fs::metadata(&path).expect("it was replaced");
    assert!(stored.permissions().mode() & 0o7777 == 0o600 && stored.len() > 2, "{stored:?}");

    std::fs::remove_file(&path).expect("one's own");
    std::fs::remove_file(directory.path().join("token.json.lock")).expect("one's own");
    mode(directory.path(), 0o777);
    let proxy = with_store(&simulator, &account, &path).start();
    proxy.wait_ready();
    let line = proxy.wait_for_log("the token store does not work; the proxy goes on without it");
    assert!(line.contains("any user may replace files in its directory"), "{line}");
    assert_eq!(std::fs::read_dir(directory.path()).expect("a directory").count(), 0, "nothing is left there");
}

fn with_store(simulator: &Simulator, account: &Account, path: &std::path::Path) -> Builder {
    Builder::to_simulator(simulator, account).set("token.store.type=file").set(format!("token.store.path={}", path.display()))
}

/// Issue "Token life": full load while the token is revoked again and again; not one request fails, one mint for each revocation.
#[test]
fn revocations_under_load_fail_no_request() {
    let account = account();
    let simulator = simulator(&account);
    let proxy = eager(&simulator, &account).set("log.access=off").env("RUST_LOG", "info").start();
    proxy.wait_ready();
    let stop = AtomicBool::new(false);
    let served = AtomicU64::new(0);
    let rounds = long_or(30, 5);
    thread::scope(|scope| {
        for _ in 0..long_or(64, 16) {
            scope.spawn(|| {
                let mut connection = proxy.connect();
                while !stop.load(Ordering::Relaxed) {
                    connection.send("POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nbody");
                    let answer = connection.read_response(false).expect("an answer");
                    assert_eq!((answer.status(), answer.text().as_str()), (200, "body"));
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 1..=rounds {
            let before = served.load(Ordering::Relaxed);
            simulator.revoke_all();
            let deadline = Instant::now() + PATIENCE;
            while simulator.mints().len() < round + 1 || served.load(Ordering::Relaxed) < before + 100 {
                assert!(Instant::now() < deadline, "stuck in round {round}");
                thread::sleep(Duration::from_millis(5));
            }
            thread::sleep(long_or(Duration::from_secs(2), Duration::ZERO));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(simulator.mints().len(), rounds + 1, "one mint for each revocation");
}

/// A Kubernetes Secret volume: files are links into `..data`, which is a link that is swapped atomically (kubernetes `atomic_writer.go`).
struct SecretVolume {
    path: std::path::PathBuf,
}

impl SecretVolume {
    fn new(parent: &std::path::Path, account: &Account) -> Self {
        let path = parent.join("secret");
        std::fs::create_dir(&path).expect("a writable directory");
        let volume = Self { path };
        volume.swap(account);
        for name in ["email", "password"] {
            std::os::unix::fs::symlink(format!("..data/{name}"), volume.path.join(name)).expect("a link");
        }
        volume
    }

    fn file(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }

    fn swap(&self, account: &Account) {
        let data = format!("..{}", canary("version"));
        let old = std::fs::read_link(self.path.join("..data")).ok();
        std::fs::create_dir(self.path.join(&data)).expect("a directory");
        std::fs::write(self.path.join(&data).join("email"), &account.email).expect("a file");
        std::fs::write(self.path.join(&data).join("password"), &account.password).expect("a file");
        std::os::unix::fs::symlink(&data, self.path.join("..data_tmp")).expect("a link");
        std::fs::rename(self.path.join("..data_tmp"), self.path.join("..data")).expect("an atomic swap");
        if let Some(old) = old {
            std::fs::remove_dir_all(self.path.join(old)).expect("the old version goes");
        }
    }
}
