//! The command line as a person meets it: each mistake is answered with words that say what to do, and with the exit status of the contract.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::proxy::{Builder, canary};
use crate::support::raw::{PATIENCE, RawUpstream};

/// Runs the binary to its end with nothing in its environment but `environment`.
fn run(arguments: &[&str], environment: &[(&str, &str)]) -> (i32, String) {
    let output: Output = Command::new(env!("CARGO_BIN_EXE_upsolver-auth-proxy"))
        .env_clear()
        .envs(environment.iter().copied())
        .args(arguments)
        .output()
        .expect("the binary runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    (output.status.code().expect("no signal"), text)
}

#[test]
fn every_mistake_is_answered_with_what_to_do() {
    /// Arguments, environment, exit status, words in the output.
    type Row<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], i32, &'a [&'a str]);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let token = directory.path().join("token");
    std::fs::write(&token, canary("token")).expect("a writable directory");
    let token = token.to_str().expect("UTF-8");
    let with_token = [("UPSOLVER_TOKEN_FILE", token)];
    let rows: &[Row] = &[
        (&["--version"], &[], 0, &["upsolver-auth-proxy ", "optional features"]),
        (&["--help"], &[], 0, &["run", "check", "config", "health", "wait", "shutdown", "demo", "completions"]),
        (&["completions", "bash"], &[], 0, &["upsolver-auth-proxy"]),
        (&["nope"], &[], 2, &["nope", "--help"]),
        (&["--bogus"], &[], 2, &["--bogus", "--help"]),
        (&["health", "bogus"], &[], 2, &["startup, readiness, liveness"]),
        (&["wait", "--timeout", "30"], &[], 2, &["--timeout"]),
        (&["run"], &[], 2, &["UPSOLVER_EMAIL", "UPSOLVER_TOKEN_FILE", "--config"]),
        (&["--config", "/nowhere.toml"], &[], 2, &["/nowhere.toml", "cannot be read"]),
        (&["check", "--set", "listen.adress=x"], &with_token, 2, &["did you mean listen.address?"]),
        (&["check"], &[("UPSOLVER_EMAIL", "me@example.com")], 2, &["UPSOLVER_PASSWORD_FILE"]),
        (&["check"], &with_token, 0, &["configuration is valid"]),
        (
            &["check", "--connect", "--set", "upstream.url=https://127.0.0.1:1"],
            &with_token,
            1,
            &["configuration is valid", "cannot connect to 127.0.0.1:1", "egress rules"],
        ),
        (
            &["check", "--connect", "--set", "upstream.url=https://upsolver.invalid"],
            &with_token,
            1,
            &["cannot resolve upsolver.invalid", "look at the name in upstream.url"],
        ),
        (
            &["check", "--connect", "--set", "upstream.url=https://upsolver.invalid", "--set", "upstream.proxy=http://127.0.0.1:1"],
            &with_token,
            1,
            &["egress proxy 127.0.0.1:1", "Connection refused", "look at upstream.proxy"],
        ),
        (&["health", "--set", "admin.address=off"], &[], 1, &["admin.address"]),
        (&["demo", "--set", "foo=1"], &[], 2, &["error: 1 problem in the configuration", "--set: foo: unknown key"]),
        (&["check", "--set", "listen=3"], &with_token, 2, &["--set: listen: a section, not a key", "--set listen.address="]),
        // Where a file that cannot be used was named.
        (
            &["check"],
            &[("UPSOLVER_TOKEN_FILE", "/nowhere")],
            2,
            &["environment variable UPSOLVER_TOKEN_FILE: credentials.token_file: /nowhere: No such"],
        ),
        (&["check", "--set", "upstream.ca_file=/nowhere"], &with_token, 2, &["error: --set: upstream.ca_file: /nowhere: "]),
        // Nothing is ever stored there.
        (
            &["check", "--set", "token.store.type=file", "--set", "token.store.path=/nowhere/token.json"],
            &with_token,
            0,
            &["warning: token.store.type: has no effect with credentials.token_file", "configuration is valid"],
        ),
    ];
    for (arguments, environment, status, words) in rows {
        let (code, text) = run(arguments, environment);
        assert_eq!(code, *status, "{arguments:?}:\n{text}");
        for word in *words {
            assert!(text.contains(word), "{arguments:?} does not say {word:?}:\n{text}");
        }
        assert!(!text.contains("canary"), "{arguments:?}:\n{text}");
    }
}

/// Contract section 2: files that the configuration names and that cannot be used are a wrong configuration, all of them reported with their keys.
#[test]
fn unusable_files_end_the_start_with_status_2_and_their_keys() {
    let upstream = RawUpstream::start();
    let (status, text) = Builder::to_raw(&upstream, &canary("token"))
        .set("upstream.url=https://localhost:1")
        .set("upstream.ca_file=/nowhere/ca.pem")
        .set("listen.caller_token_file=/nowhere/caller")
        .set("listen.tls.certificate_file=/nowhere/certificate")
        .set("listen.tls.private_key_file=/nowhere/key")
        .run_to_end();
    assert_eq!(status.code(), Some(2), "{text}");
    for key in [
        "upstream.ca_file: /nowhere/ca.pem",
        "listen.caller_token_file: /nowhere/caller",
        "listen.tls.certificate_file: /nowhere/cert",
        "listen.tls.private_key_file: /nowhere/key",
    ] {
        assert!(text.contains(&format!("--set: {key}")), "{key} in:\n{text}");
    }
}

/// An unknown key of any length leaves the message on one screen.
#[test]
fn a_long_unknown_key_is_shortened() {
    let long = "x".repeat(100_000);
    let variable = format!("UPSOLVER_AUTH_PROXY__{long}");
    let (code, text) = run(&["check", "--set", &format!("log.{long}=1")], &[("UPSOLVER_TOKEN_FILE", "/t"), (&variable, "1")]);
    assert!(code == 2 && text.len() < 1000 && text.matches("xxx…").count() == 2, "{code} {} bytes: {}", text.len(), &text[..200]);
}

/// C28: what the proxy would do with the file of the token store is told by the code that does it, and in the same words.
#[test]
fn c28_check_judges_the_token_store_as_the_proxy_does() {
    /// What is done to the file `token.json` of a directory, the exit status, words in the output.
    type Row<'a> = (&'a dyn Fn(&Path), i32, &'a [&'a str]);
    let mode = |path: &Path, mode| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).expect("one's own");
    let written = |file: &Path, bits| {
        std::fs::write(file, "{}").expect("a writable directory");
        mode(file, bits);
    };
    let replaced = "what it holds is not used; the next token minted replaces it";
    let rows: &[Row] = &[
        (&|_| {}, 0, &["configuration is valid"]),
        (&|file| written(file, 0o644), 0, &["refused: its mode is 0644", replaced, "configuration is valid"]),
        (&|file| written(file, 0o600), 0, &["refused: it is damaged", replaced]),
        (&|file| symlink("/nowhere", file).expect("a link"), 0, &["refused: it is a symbolic link", replaced]),
        (&|file| std::fs::create_dir(file).expect("a directory"), 2, &["cannot be used: it is a directory", "each start would mint"]),
        (
            &|file| mode(file.parent().expect("it has one"), 0o777),
            2,
            &["cannot be used: any user may replace files in its directory, whose mode is 0777; chmod o-w it", "each start would mint"],
        ),
        (&|file| mode(file.parent().expect("it has one"), 0o1777), 0, &["configuration is valid"]),
    ];
    for (prepare, status, words) in rows {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let file = directory.path().join("token.json");
        prepare(&file);
        let path = format!("token.store.path={}", file.display());
        let pair = [("UPSOLVER_EMAIL", "me@example.com"), ("UPSOLVER_PASSWORD", "canary")];
        let (code, text) = run(&["check", "--set", "token.store.type=file", "--set", &path], &pair);
        assert_eq!(code, *status, "{words:?}:\n{text}");
        for word in *words {
            assert!(text.contains(word), "{word:?} in:\n{text}");
        }
        assert_eq!(text.contains("--set: token.store.path: "), words.len() > 1, "{text}");
    }
}

#[test]
fn a_busy_port_is_named_once_with_its_key() {
    for key in ["listen.address", "admin.address"] {
        let busy = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = busy.local_addr().expect("bound");
        let upstream = RawUpstream::start();
        let (status, text) = Builder::to_raw(&upstream, &canary("token")).set(format!("{key}={address}")).run_to_end();
        assert_eq!(status.code(), Some(1), "{text}");
        assert!(text.contains(&format!("{key}: cannot listen at {address}")) && text.contains("another process uses it"), "{text}");
        assert_eq!(text.matches("Address already in use").count(), 1, "{text}");
    }
}

/// The demo speaks of nothing that its user did not do, and its commands can be typed as they stand.
#[test]
fn the_demo_serves_what_it_promises() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let socket = directory.path().join("proxy.sock");
    let output = directory.path().join("output");
    let file = std::fs::File::create(&output).expect("a writable directory");
    let mut child = Command::new(env!("CARGO_BIN_EXE_upsolver-auth-proxy"))
        .env_clear()
        .args(["demo", "--set", "admin.address=off", "--set"])
        .arg(format!("listen.address=unix:{}", socket.display()))
        .stdout(file.try_clone().expect("a file"))
        .stderr(file)
        .spawn()
        .expect("the binary runs");
    let said = || std::fs::read_to_string(&output).expect("the output");
    let deadline = Instant::now() + PATIENCE;
    while !said().contains("another token is in use") && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = rustix::process::Pid::from_raw(i32::try_from(child.id()).expect("a pid")).expect("a running child");
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("a running child");
    let status = child.wait().expect("a child");
    let text = said();
    assert_eq!(status.code(), Some(0), "{text}");
    assert!(text.contains("another token is in use"), "{text}");
    assert!(text.contains(&format!("curl --unix-socket {} http://localhost/inputs/", socket.display())), "{text}");
    assert!(!text.contains("UPSOLVER_EMAIL") && !text.contains("WARN"), "{text}");
}

/// B14: the soft limit of open files is raised to the hard one; where that is not enough for what is configured, the log says so.
#[test]
fn b14_open_files_are_made_room_for() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let token = directory.path().join("token");
    std::fs::write(&token, canary("token")).expect("a writable directory");
    for (limit, is_short) in [("ulimit -S -n 64", false), ("ulimit -n 100", true)] {
        // 20 connections and as many requests fit into the first one's hard limit, not into the second one's.
        let mut child = Command::new("/bin/sh")
            .env_clear()
            .env("UPSOLVER_TOKEN_FILE", &token)
            .args(["-c", &format!("{limit} && exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_upsolver-auth-proxy")])
            .args(["run", "--set", "listen.address=127.0.0.1:0", "--set", "admin.address=off", "--set", "upstream.url=http://127.0.0.1:1"])
            .args(["--set", "listen.max_connections=20", "--set", "limits.max_in_flight=20"])
            .stderr(Stdio::piped())
            .spawn()
            .expect("a shell");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok);
        let mut log = String::new();
        for line in lines.by_ref() {
            log += &line;
            if line.contains("\"started\"") {
                break;
            }
        }
        child.kill().expect("a running child");
        child.wait().expect("a child");
        assert!(log.contains("\"started\""), "{limit}: {log}");
        assert_eq!(log.contains("files may be open"), is_short, "{limit}: {log}");
    }
}
