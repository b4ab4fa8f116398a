//! Where a secret could show, and what of a request may be told to whom: B36 to B50.

use upsolver_auth_proxy::simulator::{Account, Options, Protocols, Simulator};

use crate::support::proxy::{Builder, assert_no_secret, canary};
use crate::support::raw::{ClosedPort, Message, RawUpstream};
use crate::support::wire::{GET, OK, Wire};

/// Everything that an operator or a neighbour can read of a running proxy.
fn assert_nothing_shows(wire: &Wire, secrets: &[String]) {
    for path in ["/metrics", "/status", "/startup", "/readiness", "/liveness", "/log-level", "/nothing"] {
        let answer = wire.proxy.ask_admin("GET", path);
        assert_no_secret(secrets, &String::from_utf8_lossy(&answer.head));
        assert_no_secret(secrets, &answer.text());
    }
    for file in ["cmdline", "comm"] {
        assert_no_secret(secrets, &std::fs::read_to_string(format!("/proc/{}/{file}", wire.proxy.pid())).expect("a running child"));
    }
    assert_no_secret(secrets, &wire.proxy.log());
}

/// What the app sends and what the upstream sends back is as secret as the token, and a faulty peer gets no further in showing it.
#[test]
fn b36_b39_nothing_that_travels_shows_in_any_output() {
    let mine: Vec<_> = ["authorization", "password", "cookie", "query", "body", "reply"].map(canary).into();
    let wire = Wire::with(|builder| {
        let builder = builder.env("RUST_LOG", "trace,hyper=trace,h2=trace,rustls=trace,hyper_util=trace,tokio=trace,mio=trace");
        mine.iter().fold(builder, super::support::proxy::Builder::secret)
    });
    let [authorization, password, cookie, query, body, reply] = mine.as_slice() else { unreachable!("six were made") };
    let request = format!(
        "POST /x?q={query} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {authorization}\r\nX-Api-Password: {password}\r\nCookie: {cookie}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let token = wire.token.clone();
    for answer in [
        OK.to_owned(),
        format!(
            "HTTP/1.1 500 Oops\r\nX-Echo: {token}\r\nSet-Cookie: {reply}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{token}",
            token.len()
        ),
        format!("HTTP/1.1 200 OK\r\nBroken {token} {reply}\r\n\r\n"),
        format!("{token} {reply}\r\n\r\n"),
        format!("HTTP/1.1 200 OK\r\nContent-Length: {token}\r\n\r\n"),
        format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: {token}\r\n\r\n"),
        format!("HTTP/1.1 101 {reply}\r\nUpgrade: {token}\r\n\r\n"),
        format!("HTTP/1.1 302 Found\r\nLocation: http://{token}.example/{reply}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"),
    ] {
        let (_, answer) = wire.exchange(&request, answer);
        let head = String::from_utf8_lossy(&answer.head).into_owned();
        assert_no_secret(std::slice::from_ref(&token), &head);
        if answer.status() == 502 {
            assert_no_secret(&mine, &answer.text());
            assert_no_secret(std::slice::from_ref(&token), &answer.text());
        }
    }
    // Requests that are refused, with secrets in every place that an error could quote.
    for broken in [
        format!("GET /x?{query} HTTP/1.1\r\nHost: {cookie}\r\n\r\n"),
        format!("GET /x?{query} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: {password}\r\n\r\n"),
        format!("GET /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: {password}\r\n\r\n"),
        format!("GET /x HTTP/1.1\r\nHost: localhost\r\n{password}\r\n\r\n"),
        format!("GET /x HTTP/1.1\r\nHost: localhost\r\nOrigin: http://{cookie}\r\n\r\n"),
        format!("GET http://user:{password}@localhost/ HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        format!("POST /api-tokens/?{query} HTTP/1.1\r\nHost: localhost\r\nX-Api-Password: {password}\r\nContent-Length: 0\r\n\r\n"),
    ] {
        let answer = wire.refused(broken);
        assert_no_secret(&mine, &answer.text());
    }
    let everything: Vec<_> = mine.iter().cloned().chain([token]).collect();
    assert_nothing_shows(&wire, &everything);
    let mut files = std::fs::read_dir(wire.proxy.directory()).expect("a directory").map(|entry| entry.expect("an entry").file_name());
    assert_eq!(files.next().as_deref(), Some(std::ffi::OsStr::new("token")));
    assert!(files.next().is_none(), "the proxy wrote a file");
}

/// The same with TLS and over both versions of HTTP, with the mint, a rejection and the second mint, whatever the filter says. The proxy's log is searched
/// for email and password as with every test.
#[test]
fn b36_b39_no_library_tells_what_travels_over_tls() {
    for version in ["1.1", "2"] {
        let account = Account { email: format!("{}@example.com", canary("email")), password: canary("password") };
        let options = Options { accounts: vec![account.clone()], protocols: Protocols::Both, ..Options::default() };
        let simulator = Simulator::start(options).expect("a free port");
        let [cookie, body] = ["cookie", "body"].map(canary);
        let proxy = Builder::to_simulator(&simulator, &account)
            .env(
                "RUST_LOG",
                "trace,hyper=trace,hyper_util=trace,h2=trace,rustls=trace,tokio_rustls=trace,tokio=trace,mio=trace,notify=trace",
            )
            .set(format!("upstream.http_version={version}"))
            .set("token.min_mint_interval=0s")
            .set("token.probe_interval=1ms")
            .secret(&cookie)
            .secret(&body)
            .start();
        proxy.wait_ready();
        let mut secrets = simulator.live_tokens();
        assert_eq!(simulator.revoke_all(), 1);
        let answer = proxy.exchange(format!(
            "POST /query HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ));
        assert_ne!(answer.status(), 401, "sent again with the second token");
        secrets.extend(simulator.live_tokens());
        assert_eq!(secrets.len(), 2);
        assert_eq!(proxy.metric("upsolver_auth_proxy_token_generation"), 2.0);
        assert!(proxy.ask_admin("GET", "/log-level").text().contains("h2=trace"), "the filter is in force");
        assert_no_secret(&secrets, &proxy.log());
    }
}

/// Replies to a mint that are none: what they hold may be the token, so nothing of it is told.
#[test]
fn b38_a_mint_reply_that_cannot_be_used_is_not_quoted() {
    for reply in [
        "\"TOKEN\"",
        "{\"apiToken\":123,\"id\":\"TOKEN\"}",
        "{\"apiToken\":[\"TOKEN\"]}",
        "{\"apiToken\":{\"TOKEN\":1}}",
        "{\"apiToken\":\"TOKEN",
        "{\"apiToken\":\"TOKEN\\u000a\"}",
        "TOKEN",
        "{\"token\":\"TOKEN\"}",
    ] {
        let [email, password, token] = ["email", "password", "token"].map(canary);
        let upstream = RawUpstream::start();
        let proxy = Builder::new()
            .set(format!("upstream.url=http://{}", upstream.address()))
            .env("UPSOLVER_EMAIL", &email)
            .env("UPSOLVER_PASSWORD", &password)
            .secret(&password)
            .secret(&token)
            .start();
        let mut connection = upstream.accept();
        let mint = connection.read_request().expect("a mint");
        assert_eq!((mint.start.as_str(), mint.header("x-api-password")), ("POST /api-tokens/ HTTP/1.1", Some(password.as_str())));
        let body = reply.replace("TOKEN", &token);
        connection.send(format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        ));
        proxy.wait_until("the failed mint", |proxy| !proxy.status()["last_mint"]["result"].is_null());
        let secrets = [password, token];
        assert_no_secret(&secrets, &proxy.status().to_string());
        assert_ne!(proxy.ask_admin("GET", "/readiness").status(), 200, "{reply}");
        proxy.metric("upsolver_auth_proxy_token_usable");
        assert_no_secret(&secrets, &proxy.log());
    }
}

/// B23 for the mint: a redirect would take the password elsewhere.
#[test]
fn b23_a_redirected_mint_is_not_followed() {
    for status in [301, 302, 303, 307, 308] {
        let [email, password] = ["email", "password"].map(canary);
        let upstream = RawUpstream::start();
        let elsewhere = RawUpstream::start();
        let proxy = Builder::new()
            .set(format!("upstream.url=http://{}", upstream.address()))
            .env("UPSOLVER_EMAIL", &email)
            .env("UPSOLVER_PASSWORD", &password)
            .secret(&password)
            .start();
        let mut connection = upstream.accept();
        connection.read_request().expect("a mint");
        connection.send(format!(
            "HTTP/1.1 {status} Moved\r\nLocation: http://{}/api-tokens/\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            elsewhere.address()
        ));
        proxy.wait_until("the failed mint", |proxy| !proxy.status()["last_mint"]["result"].is_null());
        assert!(elsewhere.saw_nothing(), "{status} was followed");
    }
}

#[test]
fn b41_what_a_request_puts_into_a_log_line_is_escaped_and_cut() {
    let secret = canary("query");
    let wire = Wire::with(|builder| builder.secret(&secret).set("log.access=all"));
    wire.forwarded(format!("GET /quoted\"{{}}%1b[31m%0a?{secret} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: \u{9b}31m\r\n\r\n"));
    let line = wire.proxy.wait_for_log("/quoted");
    let parsed: serde_json::Value = serde_json::from_str(&line).expect("a line is one JSON object");
    assert_eq!(parsed["path"], "/quoted\"{}%1b[31m%0a", "{line}");
    let long = format!("/long{}", "x".repeat(14 * 1024));
    wire.forwarded(format!("GET {long} HTTP/1.1\r\nHost: localhost\r\n\r\n"));
    let line = wire.proxy.wait_for_log("\"/long");
    assert!(line.len() < 2048, "{} bytes", line.len());
    // Bytes that a terminal would obey, in places that only an error message could show.
    for request in [
        "\u{1b}]0;x\u{7} / HTTP/1.1\r\n\r\n",
        "GET /\u{1b}[2J HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: \u{1b}[2J\r\n\r\n",
    ] {
        wire.refused(request);
    }
    assert!(!wire.proxy.log().contains('\u{1b}'));
}

#[test]
fn b42_no_flag_takes_a_secret() {
    for command in [&["--help"][..], &["run", "--help"], &["check", "--help"]] {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_upsolver-auth-proxy")).args(command).output().expect("the binary runs");
        let help = String::from_utf8_lossy(&output.stdout).to_ascii_lowercase();
        assert!(help.contains("--config"), "{help}");
        assert!(!help.contains("--password") && !help.contains("--token") && !help.contains("--email"), "{help}");
    }
    // By the generic one neither: it would show in the process list.
    let password = canary("password");
    let (status, text) = Builder::new()
        .set("upstream.url=http://127.0.0.1:1")
        .env("UPSOLVER_EMAIL", "a@example.com")
        .set(format!("credentials.password={password}"))
        .secret(&password)
        .run_to_end();
    assert_eq!(status.code(), Some(2), "{text}");
}

/// Credentials from the environment work, and the log says what they cannot do.
#[test]
fn b42_credentials_from_the_environment_are_warned_about() {
    let [email, password] = ["email", "password"].map(canary);
    let upstream = RawUpstream::start();
    let proxy = Builder::new()
        .set(format!("upstream.url=http://{}", upstream.address()))
        .env("UPSOLVER_EMAIL", &email)
        .env("UPSOLVER_PASSWORD", &password)
        .secret(&email)
        .secret(&password)
        .start();
    let warning = proxy.wait_for_log("environment");
    assert!(warning.contains("WARN"), "{warning}");
}

/// The admin server's paths mean nothing on the data port, whoever asks.
#[test]
fn b46_the_path_space_belongs_to_the_api() {
    let wire = Wire::start();
    for target in [
        "/metrics",
        "/readyz",
        "/readiness",
        "/startup",
        "/liveness",
        "/healthz",
        "/ping",
        "/status",
        "/log-level",
        "/token/refresh",
        "/reload",
        "/quitquitquit",
    ] {
        for method in ["GET", "POST"] {
            let forwarded = wire.forwarded(format!(
                "{method} {target} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: kube-probe/1.30\r\nContent-Length: 0\r\n\r\n"
            ));
            assert_eq!(forwarded.start, format!("{method} {target} HTTP/1.1"));
        }
    }
    let probe = "GET /x HTTP/1.1\r\nHost: evil.example\r\nUser-Agent: kube-probe/1.30\r\n\r\n";
    assert_eq!(wire.refused(probe).code(), "misdirected_request");
    assert_eq!(wire.proxy.ask_admin("GET", "/liveness").status(), 200);
}

#[test]
fn b47_metrics_do_not_grow_with_what_is_asked() {
    let wire = Wire::start();
    let page = |wire: &Wire| wire.proxy.ask_admin("GET", "/metrics").text();
    let ask = |number: usize| {
        wire.forwarded(format!("M{number} /path{number} HTTP/1.1\r\nHost: localhost\r\nX-{number}: 1\r\n\r\n"));
        wire.refused(format!("GET /path{number} HTTP/1.1\r\nHost: host{number}.example\r\n\r\n"));
        wire.exchange(GET, format!("HTTP/1.1 {} Odd\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", 600 + number % 300));
    };
    ask(0);
    let before = page(&wire);
    (1..100).for_each(ask);
    let after = page(&wire);
    assert!(!after.contains("/path") && !after.contains("host1") && !after.contains("\"M1\""), "{after}");
    // Statuses are three digits at most; whatever an upstream invents, the number of series stays in the hundreds.
    assert!(after.lines().count() < before.lines().count() + 120, "{} lines, then {}", before.lines().count(), after.lines().count());
}

/// Fixed strings: the same answer to the same mistake, whatever the request held.
#[test]
fn b49_b50_the_proxys_own_answers_are_fixed_and_echo_nothing() {
    let wire = Wire::set(&["limits.max_request_body=10B"]);
    let same = |requests: [String; 2], status: u16| {
        let answers: Vec<Message> = requests.iter().map(|request| wire.refused(request)).collect();
        for answer in &answers {
            assert_eq!(answer.status(), status);
            answer.code();
            assert!(!answer.text().contains("marker") && !String::from_utf8_lossy(&answer.head).contains("marker"), "{answer:?}");
        }
        assert_eq!(answers[0].body, answers[1].body);
    };
    let pair = |make: &dyn Fn(&str) -> String| ["marker-one", "marker-two"].map(make);
    same(pair(&|x| format!("GET /{x} HTTP/1.1\r\nHost: {x}.example\r\n\r\n")), 421);
    same(pair(&|x| format!("GET /{x} HTTP/1.1\r\nHost: {x}@localhost\r\n\r\n")), 400);
    same(pair(&|x| format!("GET /{x} HTTP/1.1\r\nHost: localhost\r\nOrigin: http://{x}\r\n\r\n")), 400);
    same(pair(&|x| format!("POST /api-tokens/{x} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")), 405);
    same(pair(&|x| format!("TRACE /{x} HTTP/1.1\r\nHost: localhost\r\n\r\n")), 405);
    same(pair(&|x| format!("POST /{x} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{x}")), 413);
    same(pair(&|x| format!("GET /{x}{} HTTP/1.1\r\nHost: localhost\r\n\r\n", "x".repeat(20_000))), 414);
    same(pair(&|x| format!("GET /{x} HTTP/1.1\r\nHost: localhost\r\nVia: 1.1 upsolver-auth-proxy ({x})\r\n\r\n")), 508);
    // Those that an upstream causes.
    for reply in ["marker garbage\r\n\r\n", "HTTP/1.1 200 OK\r\nmarker\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: marker\r\n\r\n"] {
        let answer = wire.answered(reply);
        assert_eq!((answer.status(), answer.code().as_str()), (502, "upstream_protocol"));
        assert!(!answer.text().contains("marker"), "{answer:?}");
    }
}

#[test]
fn b49_an_upstream_that_is_not_there_is_told_without_its_name() {
    let closed = ClosedPort::reserve();
    let address = closed.address();
    let builder = Builder::new().set(format!("upstream.url=http://{address}"));
    let token = builder.file("token", canary("token"));
    let proxy = builder.set(format!("credentials.token_file={}", token.display())).start();
    let answer = proxy.get("/x");
    assert_eq!((answer.status(), answer.code().as_str()), (502, "upstream_unreachable"));
    assert!(!answer.text().contains(&address.port().to_string()) && !answer.text().contains("127.0.0.1"), "{answer:?}");
    assert!(answer.header("proxy-status").is_some_and(|status| !status.contains(&address.port().to_string())), "{answer:?}");
}

/// B37, as far as a test from outside can: the types that hold secrets print none, in whatever form they are asked.
#[test]
fn b37_debug_output_holds_no_secret() {
    use upsolver_auth_proxy::secret::{Password, Token};

    let secret = canary("debug");
    let password = Password::new(secret.clone()).expect("a valid password");
    let token = Token::new(secret.clone()).expect("a valid token");
    for text in [
        format!("{password:?}"),
        format!("{password:#?}"),
        format!("{token:?}"),
        format!("{token:#?}"),
        format!("{:?}", Some(vec![token.clone()])),
    ] {
        assert_no_secret(std::slice::from_ref(&secret), &text);
    }
}
