//! The sandbox that the proxy puts itself into. Every other test of this binary runs in it too, where the kernel has Landlock.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use upsolver_auth_proxy::simulator::{Account, Options, Simulator};

use crate::support::proxy::{Builder, canary};
use crate::support::raw::RawUpstream;
use crate::support::wire::{GET, Wire};

/// Every thread took the step, those that were there before included: a sandboxed thread can gain no privileges, and says so.
#[test]
fn every_thread_is_sandboxed() {
    let wire = Wire::set(&["runtime.workers=2"]);
    wire.forwarded(GET);
    wire.proxy.wait_for_log("sandboxed");
    let mut names = Vec::new();
    for task in fs::read_dir(format!("/proc/{}/task", wire.proxy.pid())).expect("a running child") {
        // A thread may end meanwhile.
        let Ok(status) = fs::read_to_string(task.expect("an entry").path().join("status")) else { continue };
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned());
        let name = field("Name:").expect("a name");
        assert_eq!(field("NoNewPrivs:").as_deref(), Some("1"), "{name}");
        names.push(name);
    }
    for expected in ["log-writer", "worker-0", "worker-1"] {
        assert!(names.iter().any(|name| name == expected), "{names:?}");
    }
}

#[test]
fn the_environment_turns_the_sandbox_off() {
    let wire = Wire::with(|builder| builder.env("UPSOLVER_AUTH_PROXY_SANDBOX", "off"));
    wire.proxy.wait_for_log("not sandboxed: it is turned off");
    wire.forwarded(GET);

    let upstream = RawUpstream::start();
    let (status, text) = Builder::to_raw(&upstream, &canary("token")).env("UPSOLVER_AUTH_PROXY_SANDBOX", "0").run_to_end();
    assert_eq!(status.code(), Some(2), "{text}");
    assert!(text.contains("UPSOLVER_AUTH_PROXY_SANDBOX: must be"), "{text}");
}

/// What Kubernetes does to a volume: another directory with the token in it, and the link that leads there.
fn swap(volume: &Path, version: &str, token: &str) {
    fs::create_dir_all(volume.join(version)).expect("a directory");
    fs::write(volume.join(version).join("token"), token).expect("a file");
    symlink(version, volume.join("..data_tmp")).expect("a link");
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).expect("a rename");
}

/// Whatever becomes of the directories behind the sandbox, files are read as without it: a directory that comes later, what Kubernetes swaps in, a file
/// named through the link that is swapped.
#[test]
fn c35_credentials_are_read_wherever_they_come_from() {
    for named in ["volume/token", "volume/..data/token"] {
        let [first, second] = ["first", "second"].map(canary);
        let upstream = RawUpstream::start();
        let builder = Builder::new().set(format!("upstream.url=http://{}", upstream.address())).secret(&first).secret(&second);
        let file = builder.directory().join(named);
        let proxy = builder.set(format!("credentials.token_file={}", file.display())).set("credentials.poll_interval=100ms").start();
        let volume = proxy.directory().join("volume");
        swap(&volume, "..1", &first);
        symlink("..data/token", volume.join("token")).expect("a link");
        proxy.wait_ready();
        swap(&volume, "..2", &second);
        fs::remove_dir_all(volume.join("..1")).expect("a directory");
        proxy.wait_until("the second token", |proxy| proxy.log().matches("credentials read; they are new").count() == 2);
    }
}

/// The same where the volume is there from the start.
#[test]
fn c35_a_swap_is_followed_through_the_link_that_is_swapped() {
    for named in ["volume/token", "volume/..data/token"] {
        let [first, second] = ["first", "second"].map(canary);
        let upstream = RawUpstream::start();
        let builder = Builder::new().set(format!("upstream.url=http://{}", upstream.address())).secret(&first).secret(&second);
        let volume = builder.directory().join("volume");
        swap(&volume, "..1", &first);
        symlink("..data/token", volume.join("token")).expect("a link");
        let file = builder.directory().join(named);
        let proxy = builder.set(format!("credentials.token_file={}", file.display())).set("credentials.poll_interval=100ms").start();
        proxy.wait_ready();
        swap(&volume, "..2", &second);
        fs::remove_dir_all(volume.join("..1")).expect("a directory");
        proxy.wait_until("the second token", |proxy| proxy.log().matches("credentials read; they are new").count() == 2);
    }
}

/// A release is replaced by another one: the link's target is absolute, and its neighbour.
#[test]
fn c35_a_release_is_followed_through_its_link() {
    let [first, second] = ["first", "second"].map(canary);
    let upstream = RawUpstream::start();
    let builder = Builder::new().set(format!("upstream.url=http://{}", upstream.address())).secret(&first).secret(&second);
    let app = builder.directory().join("app");
    let release = |version: &str, token: &str| {
        let release = app.join("releases").join(version);
        fs::create_dir_all(&release).expect("a directory");
        fs::write(release.join("token"), token).expect("a file");
        symlink(release, app.join("next")).expect("a link");
        fs::rename(app.join("next"), app.join("current")).expect("a rename");
    };
    release("1", &first);
    let file = app.join("current/token");
    let proxy = builder.set(format!("credentials.token_file={}", file.display())).set("credentials.poll_interval=100ms").start();
    proxy.wait_ready();
    release("2", &second);
    proxy.wait_until("the second token", |proxy| proxy.log().matches("credentials read; they are new").count() == 2);
}

/// The names of tokens tell the host, which is looked up before the sandbox closes.
#[test]
fn the_host_is_known_to_a_mint() {
    let account = Account { email: format!("{}@example.com", canary("email")), password: canary("password") };
    let simulator = Simulator::start(Options { accounts: vec![account.clone()], ..Options::default() }).expect("a free port");
    let proxy = Builder::to_simulator(&simulator, &account).start();
    proxy.wait_ready();
    let requests = simulator.requests();
    let mint = requests.iter().find(|request| request.path().starts_with("/api-tokens")).expect("a mint");
    let body: serde_json::Value = serde_json::from_slice(&mint.body).expect("JSON");
    let host = fs::read_to_string("/proc/sys/kernel/hostname").expect("a host has a name");
    let description = body["displayData"]["description"].as_str().expect("a text");
    assert!(description.ends_with(&format!(" on {}", host.trim())), "{description}");
}

/// What the proxy does outside its own memory after the start: its configuration again, its token store, its sockets away.
#[test]
fn the_configuration_is_read_again_and_sockets_are_removed() {
    let token = canary("token");
    let upstream = RawUpstream::start();
    let builder = Builder::to_raw(&upstream, &token);
    let configuration = builder.file("proxy.toml", "[log]\nlevel = \"info\"\n");
    let socket = builder.directory().join("proxy.sock");
    let mut proxy = builder
        .env("RUST_LOG", "")
        .env("UPSOLVER_AUTH_PROXY_CONFIG", configuration.display().to_string())
        .set(format!("listen.address=unix:{}", socket.display()))
        .start();
    let successor = proxy.directory().join("successor");
    fs::write(&successor, "[log]\nlevel = \"info\"\n[limits]\nmax_in_flight = 7\n").expect("a file");
    fs::rename(successor, configuration).expect("a rename");
    let answer = proxy.ask_admin("POST", "/reload");
    assert!(answer.status() == 200 && answer.text().contains("limits.max_in_flight"), "{answer:?}");
    assert!(socket.exists());
    assert_eq!(proxy.stop().code(), Some(0));
    assert!(!socket.exists(), "the socket is left behind");
}
