//! Configurations as files: the examples in `config/`, and accepted and refused ones in `tests/configs/`, each refused one with its message beside it.

use std::path::{Path, PathBuf};

use upsolver_auth_proxy::config::{Config, CredentialsSource, ListenAddress, Loaded, Need, Problems, Source, Sources};

/// The TOML files of a directory, by name; at least one.
fn toml_files(directory: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).expect("a directory").map(|entry| entry.expect("a readable directory").path());
    let mut files: Vec<_> = entries.filter(|path| path.extension().is_some_and(|extension| extension == "toml")).collect();
    files.sort();
    assert!(!files.is_empty(), "no TOML file in {directory}");
    files
}

fn load(file: &Path, need: Need) -> Result<Loaded, Problems> {
    Config::load(&Sources { file: Some(file.to_owned()), need, ..Sources::default() })
}

/// What the environment and the flags make of it, without a file.
fn layered(file: Option<&Path>, environment: &[(&str, &str)], overrides: &[&str]) -> Result<Loaded, Problems> {
    Config::load(&Sources {
        file: file.map(Path::to_owned),
        environment: environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        overrides: overrides.iter().map(ToString::to_string).collect(),
        need: Need::Credentials,
    })
}

#[test]
fn every_example_is_accepted_and_complete() {
    for file in toml_files("config").into_iter().chain([PathBuf::from("deploy/kubernetes/config.toml")]) {
        // The reference is every default, and there are no default credentials.
        let need = if file.ends_with("reference.toml") { Need::Nothing } else { Need::Credentials };
        load(&file, need).unwrap_or_else(|problems| panic!("{problems}"));
    }
}

/// Each block of the README is a complete configuration, so that it can be copied as it stands.
#[test]
fn every_block_of_the_readme_is_accepted() {
    let readme = std::fs::read_to_string("README.md").unwrap();
    let blocks: Vec<_> = readme.split("\n```toml\n").skip(1).filter_map(|rest| rest.split_once("\n```")).map(|(block, _)| block).collect();
    assert!(!blocks.is_empty(), "no TOML block in the README");
    for block in blocks {
        Config::from_toml(block).unwrap_or_else(|problems| panic!("{problems}\n{block}"));
    }
}

/// Every key stands in the reference, with the default as its value.
#[test]
fn the_reference_is_the_defaults() {
    let defaults = Config::load(&Sources { need: Need::Nothing, ..Sources::default() }).unwrap().effective;
    let reference = load(Path::new("config/reference.toml"), Need::Nothing).unwrap().effective;
    assert_eq!(reference.changed_keys(&defaults), [""; 0]);
    let from_elsewhere: Vec<_> = reference.to_string().lines().filter(|line| line.ends_with("# default")).map(str::to_owned).collect();
    assert_eq!(from_elsewhere, [""; 0], "missing from config/reference.toml");
}

#[test]
fn accepted_configurations_are_accepted() {
    for file in toml_files("tests/configs/accepted") {
        let loaded = load(&file, Need::Credentials).unwrap_or_else(|problems| panic!("{problems}"));
        // What `config` prints parses again.
        let printed = loaded.effective.to_string();
        let table: toml::Table = printed.parse().unwrap_or_else(|error| panic!("{error}\n{printed}"));
        assert!(table.contains_key("shutdown"));
    }
}

/// All problems in one run, each with file, line, key, what is allowed and what was given; no secret (B37, B42).
#[test]
fn refused_configurations_say_why() {
    for file in toml_files("tests/configs/refused") {
        let problems = load(&file, Need::Credentials).expect_err(&format!("{} is accepted", file.display())).to_string();
        let expected_file = file.with_extension("expected");
        let expected = std::fs::read_to_string(&expected_file).unwrap_or_default();
        assert_eq!(problems.trim_end(), expected.trim_end(), "{}", expected_file.display());
        assert!(!problems.contains("canary") && !problems.contains("12345678"), "{problems}");
    }
}

#[test]
fn the_environment_alone_is_enough() {
    let loaded = layered(None, &[("UPSOLVER_EMAIL", "me@example.com"), ("UPSOLVER_PASSWORD", "canary")], &[]).unwrap();
    let CredentialsSource::Pair { email: Source::Value { origin, .. }, password: Source::Value { .. } } = &loaded.config.credentials.source
    else {
        panic!("{:?}", loaded.config.credentials)
    };
    assert_eq!(origin, "environment variable UPSOLVER_EMAIL");
    assert_eq!(loaded.config.upstream.origin.to_string(), "https://api.upsolver.com");
    assert_eq!(loaded.config.listen.addresses, [ListenAddress::Localhost(8080)]);
    // They work, and it is said that they cannot rotate (B42).
    assert_eq!(loaded.warnings.iter().filter(|warning| warning.contains("cannot rotate")).count(), 2);
    // B37: nothing shows the password.
    let shown = format!("{loaded:?}{:#?}{}{:?}", loaded.config, loaded.effective, loaded.warnings);
    assert!(shown.contains("[redacted]") && !shown.contains("canary"), "{shown}");
}

/// Default < file < environment < flag, and `RUST_LOG` above all.
#[test]
fn a_higher_layer_wins() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("c.toml");
    std::fs::write(&file, "[credentials]\npassword = 'canary'\nemail = 'me'\n[token]\nname = 'file'\n[log]\nlevel = 'warn'\n").unwrap();
    let name = |environment: &[(&str, &str)], overrides: &[&str]| {
        layered(Some(&file), environment, overrides).unwrap_or_else(|problems| panic!("{problems}")).config.token.name
    };
    let variable = ("UPSOLVER_AUTH_PROXY__TOKEN__NAME", "environment");
    assert_eq!(name(&[], &[]), "file");
    assert_eq!(name(&[variable], &[]), "environment");
    assert_eq!(name(&[variable], &["token.name=flag"]), "flag");

    let loaded = layered(Some(&file), &[("RUST_LOG", "debug"), ("UPSOLVER_PASSWORD_FILE", "/p")], &["log.level=error"]).unwrap();
    assert_eq!(loaded.config.log.level, "debug");
    let printed = loaded.effective.to_string();
    for line in [
        "level = \"debug\"  # environment variable RUST_LOG".to_owned(),
        format!("name = \"file\"  # {}:5", file.display()),
        "password = \"\"  # default".to_owned(),
        "password_file = \"/p\"  # environment variable UPSOLVER_PASSWORD_FILE".to_owned(),
    ] {
        assert!(printed.lines().any(|printed| printed == line), "{line}\n{printed}");
    }
}

/// A file that cannot be read, or is no TOML, hides nothing that is wrong elsewhere.
#[test]
fn every_source_is_checked_in_one_run() {
    let missing =
        layered(Some(Path::new("/nonexistent/c.toml")), &[("UPSOLVER_AUTH_PROXY__TOKEN__WAIT", "soon")], &["log.lvl=info"]).unwrap_err();
    let lines: Vec<_> = missing.to_string().lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 4, "{missing}");
    assert!(lines[1].starts_with("  /nonexistent/c.toml: cannot be read: "), "{missing}");
    assert!(lines[2].starts_with("  environment variable UPSOLVER_AUTH_PROXY__TOKEN__WAIT: token.wait: must be a duration"), "{missing}");
    assert_eq!(lines[3], "  --set: log.lvl: unknown key; did you mean log.level?");
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { cases: 128, failure_persistence: None, ..Default::default() })]

    /// No text in any place makes loading panic, and none of it ends in more than a screen.
    #[test]
    fn whatever_is_written_has_an_answer(
        index in 0..KEYS_BOUND,
        text in "[ -~\\n]{0,40}",
        file in "([a-z.]{1,12}( = |=)?[\"'\\[\\]{}a-z0-9:/]{0,20}\\n){0,5}",
    ) {
        let reference = std::fs::read_to_string("config/reference.toml").unwrap();
        let keys: Vec<_> = reference.lines().filter(|line| !line.is_empty() && !line.starts_with('#')).collect();
        let line = keys[index % keys.len()];
        let written = match line.split_once('=') {
            Some((key, _)) => reference.replace(line, &format!("{key} = {text}")),
            None => reference.replace(line, &text),
        };
        for toml in [written, file] {
            if let Err(problems) = Config::from_toml(&toml) {
                proptest::prop_assert!(problems.to_string().lines().count() <= 14);
            }
        }
    }
}

/// More than there are keys.
const KEYS_BOUND: usize = 200;

/// B45: the egress proxy of the environment is taken, with its password out of sight.
#[test]
fn b45_https_proxy_becomes_the_egress_proxy() {
    let loaded = layered(None, &[("UPSOLVER_TOKEN_FILE", "/t"), ("https_proxy", "http://me:canary@proxy:3128")], &[]).unwrap();
    let proxy = loaded.config.upstream.proxy.as_ref().unwrap();
    assert_eq!(proxy.authority, "proxy:3128");
    assert!(proxy.authorization.as_ref().is_some_and(http::HeaderValue::is_sensitive));
    assert!(loaded.effective.to_string().contains("proxy = \"http://[redacted]@proxy:3128\"  # environment variable https_proxy"));
    assert!(!format!("{loaded:?}").contains("canary"));
    let refused =
        layered(None, &[("UPSOLVER_TOKEN_FILE", "/t"), ("HTTPS_PROXY", "socks5://me:canary@proxy:1080")], &[]).unwrap_err().to_string();
    assert!(refused.contains("HTTPS_PROXY: upstream.proxy: must be an HTTP proxy") && !refused.contains("canary"), "{refused}");
}

/// What a reload compares.
#[test]
fn changed_keys_are_those_with_another_value() {
    let effective = |overrides: &[&str]| layered(None, &[("UPSOLVER_TOKEN_FILE", "/t")], overrides).unwrap().effective;
    let old = effective(&[]);
    // Set, but to the default.
    assert_eq!(effective(&["log.level=info"]).changed_keys(&old), [""; 0]);
    assert_eq!(effective(&["token.store.type=file", "log.level=debug"]).changed_keys(&old), ["token.store.type", "log.level"]);
}

/// A secret is compared although it is not kept: a new one needs a restart as any other value does (contract section 5). Nothing shows that it is compared.
#[test]
fn a_changed_secret_is_a_changed_key() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("c.toml");
    let effective = |email: &str, password: &str, proxy: &str| {
        let text = format!("[credentials]\nemail = '{email}'\npassword = '{password}'\n[upstream]\nproxy = 'http://{proxy}@proxy:3128'\n");
        std::fs::write(&file, text).unwrap();
        load(&file, Need::Credentials).unwrap().effective
    };
    let old = effective("canary@one", "canary1", "me:canary1");
    assert_eq!(effective("canary@one", "canary1", "me:canary1").changed_keys(&old), [""; 0]);
    assert_eq!(effective("canary@two", "canary1", "me:canary1").changed_keys(&old), ["credentials.email"]);
    assert_eq!(effective("canary@one", "canary2", "me:canary1").changed_keys(&old), ["credentials.password"]);
    let new = effective("canary@one", "canary1", "me:canary2");
    assert_eq!(new.changed_keys(&old), ["upstream.proxy"]);
    // As long as the secrets are alike, all that is shown is.
    let same_lines = |shown: String| shown.replace("fingerprint: Some(Fingerprint)", "");
    assert_eq!((old.to_string(), same_lines(format!("{old:?}"))), (new.to_string(), same_lines(format!("{new:?}"))));
    assert!(!format!("{new:?}{new}").contains("canary"));
}

/// Exit status, stdout and stderr of the program; its environment is `environment` alone.
fn program(arguments: &[&str], environment: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_upsolver-auth-proxy"));
    let output = command.args(arguments).env_clear().envs(environment.iter().copied()).output().expect("the program runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it prints UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// Contract section 2: 2 for wrong usage or configuration, on whichever way it comes.
#[test]
fn the_exit_status_says_whose_fault_it_was() {
    type Row<'a> = (&'a [&'a str], &'a [(&'a str, &'a str)], i32);
    let credentials = ("UPSOLVER_TOKEN_FILE", "/nonexistent");
    let rows: [Row<'_>; 18] = [
        (&["--version"], &[], 0),
        (&["--help"], &[], 0),
        (&["completions", "bash"], &[], 0),
        (&["config"], &[], 0),
        (&["--set", "log.level=debug", "config"], &[], 0),
        (&["nonsense"], &[], 2),
        (&["run", "--nonsense"], &[], 2),
        (&[], &[], 2),
        (&["run", "--set", "listen.adress=x"], &[credentials], 2),
        (&["check"], &[credentials], 2),
        (&["check"], &[("UPSOLVER_AUTH_PROXY_CONFIG", "/nonexistent")], 2),
        (&["demo", "--set", "foo=1"], &[], 2),
        (&["demo", "--set", "token.wait=x"], &[], 2),
        (&["demo", "--set", "listen.address=1.2.3.4:80"], &[], 2),
        (&["demo", "--config", "/nonexistent"], &[], 2),
        (&["demo"], &[("RUST_LOG", "inof")], 2),
        (&["demo"], &[("UPSOLVER_AUTH_PROXY__TOKEN__WIAT", "1s")], 2),
        // Nobody answers there: no fault of the configuration.
        (&["health", "--set", "admin.address=unix:/nonexistent"], &[], 1),
    ];
    for (arguments, environment, expected) in rows {
        let (status, stdout, stderr) = program(arguments, environment);
        assert_eq!(status, Some(expected), "{arguments:?}\n{stdout}\n{stderr}");
        assert_eq!(stderr.is_empty(), expected == 0, "{arguments:?}\n{stderr}");
    }
}

#[test]
fn check_says_that_all_is_well_and_what_to_mind() {
    let (status, stdout, stderr) = program(&["check"], &[("UPSOLVER_EMAIL", "me@example.com"), ("UPSOLVER_PASSWORD", "canary")]);
    assert_eq!((status, stdout.as_str()), (Some(0), "configuration is valid\n"));
    assert!(stderr.contains("warning: credentials.password: from the environment variable UPSOLVER_PASSWORD"), "{stderr}");
    assert!(!stderr.contains("canary"));
}

/// What `config` prints is read again by the program itself, and holds no secret.
#[test]
fn config_prints_what_can_be_read_again() {
    let variables = [("UPSOLVER_EMAIL", "canary@example.com"), ("UPSOLVER_PASSWORD", "canary"), ("UPSOLVER_AUTH_PROXY__TOKEN__WAIT", "5s")];
    let (_, printed, _) = program(&["config", "--set", "listen.allowed_hosts=a,b"], &variables);
    assert!(!printed.contains("canary"), "{printed}");
    for line in [
        "wait = \"5s\"  # environment variable UPSOLVER_AUTH_PROXY__TOKEN__WAIT",
        "allowed_hosts = [\"a\", \"b\"]  # --set",
        "password = \"[redacted]\"  # environment variable UPSOLVER_PASSWORD",
        "max_age = \"off\"  # default",
    ] {
        assert!(printed.lines().any(|printed| printed == line), "{line}\n{printed}");
    }
    let config = Config::from_toml(&printed).unwrap();
    assert_eq!(config.token.wait, std::time::Duration::from_secs(5));
    assert_eq!(config.listen.allowed_hosts, ["a", "b"]);
}

/// B14: limits that do not fit under that of open files are told where the configuration is looked at, too.
#[test]
fn b14_config_warns_of_too_few_open_files() {
    let program = env!("CARGO_BIN_EXE_upsolver-auth-proxy");
    let output =
        std::process::Command::new("sh").args(["-c", "ulimit -n 128 && exec \"$0\" config", program]).env_clear().output().unwrap();
    let warnings = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{warnings}");
    assert!(warnings.contains("warning: only 128 files may be open") && warnings.contains("LimitNOFILE="), "{warnings}");
}
