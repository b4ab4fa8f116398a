//! E21: Upsolver's own clients, unmodified, through the proxy against the simulated API.
//!
//! They are installed from `PyPI` into `target/` by pip, pinned. Where python3 or `PyPI` cannot be had the tests say so loudly and pass; `.ci/run` sets
//! `UPSOLVER_CLIENTS=required`, which makes that a failure.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use upsolver_auth_proxy::simulator::{Account, Options, Simulator};

use crate::support::proxy::{Builder, Proxy, canary};

const PACKAGES: &[&str] = &["upsolver-sdk-python==0.1.12", "upsolver-cli==0.6.4"];

/// The folder of the clients' executables, installed once.
fn clients() -> Option<&'static Path> {
    static CLIENTS: OnceLock<Option<PathBuf>> = OnceLock::new();
    CLIENTS
        .get_or_init(|| match install() {
            Ok(path) => Some(path),
            Err(reason) if std::env::var_os("UPSOLVER_CLIENTS").is_some_and(|value| value == "required") => {
                panic!("Upsolver's Python clients cannot be installed: {reason}")
            }
            Err(reason) => {
                eprintln!("SKIPPED: Upsolver's Python clients cannot be installed: {reason}");
                None
            }
        })
        .as_deref()
}

fn install() -> Result<PathBuf, String> {
    let environment = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-clients");
    let bin = environment.join("bin");
    let run = |command: &mut Command| match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(error) => Err(error.to_string()),
    };
    if !environment.join("complete").exists() {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&environment))?;
        run(Command::new(bin.join("python")).args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(PACKAGES))?;
        std::fs::write(environment.join("complete"), PACKAGES.join("\n")).map_err(|error| error.to_string())?;
    }
    Ok(bin)
}

fn start() -> (Simulator, Proxy) {
    let account = Account { email: format!("{}@example.com", canary("email")), password: canary("password") };
    let options = Options { accounts: vec![account.clone()], pending_polls: 3, pages: 4, ..Options::default() };
    let simulator = Simulator::start(options).expect("a free port");
    let proxy = Builder::to_simulator(&simulator, &account).start();
    (simulator, proxy)
}

/// Runs a client and returns what it printed; panics with it where it failed.
fn output(command: &mut Command) -> String {
    let output = command.output().expect("the client starts");
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed:\n{text}");
    text
}

#[test]
fn e21_the_sdk_runs_a_pending_and_paged_query() {
    let Some(bin) = clients() else { return };
    let (simulator, proxy) = start();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/sdk.py");
    let text = output(Command::new(bin.join("python")).arg(script).arg(format!("http://{}", proxy.address)).arg("8"));
    assert_eq!(text.trim(), "8 rows");
    let requests = simulator.requests();
    let polls = requests.iter().filter(|request| request.method == "GET" && request.path().starts_with("/query/")).count();
    assert!(polls >= 5, "polls and pages went through the proxy: {polls}");
    assert!(requests.iter().all(|request| request.header("authorization") != Some("unused")), "the dummy token never leaves");
}

#[test]
fn e21_the_cli_executes_with_api_url() {
    let Some(bin) = clients() else { return };
    let (_simulator, proxy) = start();
    let home = tempfile::tempdir().expect("a temporary directory");
    let url = format!("http://{}", proxy.address);
    let text = output(Command::new(bin.join("upsolver")).env("HOME", home.path()).args([
        "execute",
        "--token",
        "unused",
        "--api-url",
        &url,
        "-c",
        "select * from orders",
    ]));
    assert!(text.contains("page 3"), "the last page was printed: {text}");
}
