//! Any file, environment and flags give a configuration or a list of problems: no panic, no empty list, and the value of a secret key in none of them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use upsolver_auth_proxy::config::{Config, Need, Sources};

const SECRET: &str = "canary-secret-of-the-environment";

// The text is a file; its lines are flags as well, and environment variables.
fuzz_target!(|text: &str| {
    if let Err(problems) = Config::from_toml(text) {
        assert!(!problems.to_string().trim().is_empty());
    }
    let overrides: Vec<String> = text.lines().map(str::to_owned).collect();
    let variable = |line: &str| {
        let (key, value) = line.split_once('=')?;
        Some((format!("UPSOLVER_AUTH_PROXY__{}", key.trim().to_uppercase().replace('.', "__")), value.trim().to_owned()))
    };
    let environment: Vec<_> = text.lines().filter_map(variable).collect();
    // Wherever the password comes from, and whatever else is wrong, it shows nowhere. (In a file, where a line may not even be TOML, see above.)
    let with_secret = |key: &str| [(key.to_owned(), SECRET.to_owned())].into_iter();
    let sources = [
        Sources { overrides, ..nothing() },
        Sources { environment: environment.into_iter().chain(with_secret("UPSOLVER_PASSWORD")).collect(), ..nothing() },
    ];
    for sources in sources {
        let (shown, effective) = match Config::load(&sources) {
            Ok(loaded) => (format!("{:?} {:?}", loaded.config, loaded.warnings), format!("{:?}", loaded.effective)),
            Err(problems) => (format!("{problems} {problems:?}"), String::new()),
        };
        assert!(!shown.trim().is_empty() && !shown.contains(SECRET) && !effective.contains(SECRET), "{shown}");
    }
});

fn nothing() -> Sources {
    Sources { need: Need::Nothing, ..Sources::default() }
}
