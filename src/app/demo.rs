//! `demo`: the proxy in front of a simulated Upsolver API, for whoever wants to see it work without an account.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context;

use super::{EXIT_USAGE, run};
use crate::config::{Config, ListenAddress, Loaded, Need, Problems, Sources};
use crate::simulator::{self, Options, Simulator};
use crate::telemetry;

/// `demo`: a simulated Upsolver API on loopback, and the proxy in front of it at the configured addresses. Whatever upstream and credentials are
/// configured are left alone; the account is made up for this run.
pub fn demo(mut sources: Sources) -> ExitCode {
    match start_demo(&mut sources) {
        // The simulator serves until the proxy has stopped.
        // No sandbox: the simulator and the removal of its directory are none of the proxy's business.
        Ok((_simulator, _directory, loaded)) => match telemetry::init(&loaded.config.log, false) {
            Ok(telemetry) => run(loaded, sources, &telemetry, false),
            Err(error) => fail(&error),
        },
        Err(error) => fail(&error),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    // A closed stderr leaves nobody to tell.
    let _ = writeln!(std::io::stderr(), "error: {error:#}");
    if error.is::<Problems>() { ExitCode::from(EXIT_USAGE) } else { ExitCode::FAILURE }
}

fn start_demo(sources: &mut Sources) -> anyhow::Result<(Simulator, tempfile::TempDir, Loaded)> {
    let account = simulator::demo_credentials();
    let options = Options { accounts: vec![account.clone()], record: false, ..Options::default() };
    let simulator = Simulator::start(options).context("cannot start the simulated API")?;
    let directory = tempfile::tempdir().context("cannot keep the simulated API's certificate")?;
    let ca = simulator.write_ca(directory.path()).context("cannot keep the simulated API's certificate")?;

    // In files, as in earnest: whoever wants to see a rotation changes them.
    let [email, password] = [("email", &account.email), ("password", &account.password)].map(|(name, secret)| {
        let path = directory.path().join(name);
        write_private(&path, secret).map(|()| path.display().to_string())
    });
    let (email, password) = (email.context("cannot keep the demo's email")?, password.context("cannot keep the demo's password")?);

    sources.need = Need::Credentials;
    let is_kept = |name: &str| {
        name == "RUST_LOG" || name.starts_with("UPSOLVER_AUTH_PROXY__") && !name.starts_with("UPSOLVER_AUTH_PROXY__CREDENTIALS__")
    };
    sources.environment.retain(|(name, _)| is_kept(name));
    sources.environment.extend([("UPSOLVER_EMAIL_FILE".to_owned(), email), ("UPSOLVER_PASSWORD_FILE".to_owned(), password)]);
    sources.overrides.extend([
        format!("upstream.url={}", simulator.url()),
        format!("upstream.ca_file={}", ca.display()),
        "upstream.resolve=".to_owned(),
        "upstream.proxy=".to_owned(),
        "token.store.type=memory".to_owned(),
    ]);
    let loaded = Config::load(sources)?;
    // A closed stdout is no reason not to serve.
    let _ = writeln!(std::io::stdout(), "{}", welcome(&simulator.url(), &loaded.config));
    Ok((simulator, directory, loaded))
}

fn write_private(path: &Path, text: &str) -> std::io::Result<()> {
    std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(text.as_bytes())
}

/// What a person can try, with the addresses that this demo listens at.
fn welcome(upstream: &str, config: &Config) -> String {
    let at = config.listen.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ");
    let scheme = if config.listen.tls.is_some() { "https" } else { "http" };
    let mut tries = Vec::new();
    if let Some(address) = config.listen.addresses.first() {
        tries.push((format!("curl {}", curl_target(scheme, address, "/inputs/")), "no credentials: the proxy adds its token"));
        tries.push((format!("curl -i {}", curl_target(scheme, address, "/api-tokens")), "refused: tokens are the proxy's matter"));
    }
    if let Some(address) = config.admin.addresses.first() {
        tries.push((format!("curl {}", curl_target("http", address, "/status")), "which token, since when, from which credentials"));
        tries.push((format!("curl {}", curl_target("http", address, "/metrics")), "what it did, in numbers"));
    }
    let width = tries.iter().map(|(command, _)| command.len()).max().unwrap_or(0);
    let tries: Vec<String> = tries.iter().map(|(command, what)| format!("    {command:width$}    # {what}")).collect();
    let tries = tries.join("\n");
    format!(
        "A simulated Upsolver API runs at {upstream}, and upsolver-auth-proxy in front of it at {at}.\n\
         Nothing leaves this machine; the account is made up. Try:\n\n{tries}\n\n\
         Ctrl-C stops both. The log follows.\n"
    )
}

/// The arguments with which curl asks for `path` at an address.
fn curl_target(scheme: &str, address: &ListenAddress, path: &str) -> String {
    match address {
        ListenAddress::Unix(socket) => format!("--unix-socket {} {scheme}://localhost{path}", socket.display()),
        ListenAddress::Localhost(_) | ListenAddress::Socket(_) => format!("{scheme}://{address}{path}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_demo_says_what_can_be_typed() {
        let config = |toml: &str| Config::from_toml(&format!("[credentials]\ntoken_file = \"/t\"\n{toml}")).unwrap();
        let text = welcome("https://localhost:1", &config(""));
        assert!(text.contains("    curl http://localhost:8080/inputs/          # no credentials"), "{text}");
        assert!(text.contains("    curl http://localhost:9090/status           # which token"), "{text}");

        let text = welcome(
            "https://localhost:1",
            &config("[listen]\naddress = [\"unix:/run/p.sock\", \"localhost:1\"]\n[admin]\naddress = \"off\""),
        );
        assert!(text.contains(" at unix:/run/p.sock and localhost:1.") && !text.contains("/status"), "{text}");
        assert!(text.contains("    curl --unix-socket /run/p.sock http://localhost/inputs/ "), "{text}");
    }
}
