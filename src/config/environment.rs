//! Settings from environment variables and from `--set`, and the few well-known variables of other programs that are honoured.

use hyper_util::client::proxy::matcher::Matcher;
use toml::Value;

use super::error::{Problem, Provenance};
use super::layer::{Layer, Setting, Settings};
use super::schema::{self, Key, Secrecy};
use super::{address, suggest};

/// In front of every key's variable; nesting is a double underscore, so that keys may hold single ones.
const PREFIX: &str = "UPSOLVER_AUTH_PROXY__";

/// The short names of the credentials. An empty one counts as not set: container files often pass on variables that nobody filled.
const SHORT: [(&str, &str); 5] = [
    ("UPSOLVER_EMAIL", "credentials.email"),
    ("UPSOLVER_PASSWORD", "credentials.password"),
    ("UPSOLVER_EMAIL_FILE", "credentials.email_file"),
    ("UPSOLVER_PASSWORD_FILE", "credentials.password_file"),
    ("UPSOLVER_TOKEN_FILE", "credentials.token_file"),
];

/// Whether a variable may matter to the configuration; all others are not even copied.
pub(super) fn is_relevant(name: &str) -> bool {
    name.starts_with("UPSOLVER_") || ["RUST_LOG", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", OTEL].contains(&name)
}

/// The standard variable that would turn the export to OpenTelemetry on.
const OTEL: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// The layer of the environment.
pub(super) fn environment(variables: &[(String, String)], problems: &mut Vec<Problem>) -> Layer {
    let mut layer = Layer::new();
    for (name, text) in variables {
        let provenance = Provenance::Environment(name.clone());
        let key = if let Some((_, key)) = SHORT.iter().find(|(short, _)| short == name) {
            if text.is_empty() {
                continue;
            }
            schema::find(key)
        } else if name.starts_with(PREFIX) {
            schema::KEYS.iter().find(|key| variable(key) == *name)
        } else {
            continue;
        };
        let Some(key) = key else {
            let dotted = name[PREFIX.len()..].to_ascii_lowercase().replace("__", ".");
            let meant = suggest::key(&dotted).and_then(schema::find).map(|key| format!("; did you mean {}?", variable(key)));
            problems.push(Problem { provenance, key: None, message: format!("no such key{}", meant.unwrap_or_default()) });
            continue;
        };
        let setting = Setting::new(key.value_of(text), provenance.clone());
        if let Some(other) = layer.insert(key.name, setting) {
            let message = format!("also set by the {}; remove one", other.provenance);
            problems.push(Problem { provenance, key: Some(key.name.to_owned()), message });
        }
    }
    layer
}

/// The variable of a key, e.g. `UPSOLVER_AUTH_PROXY__TOKEN__STORE__TYPE`.
fn variable(key: &Key) -> String {
    format!("{PREFIX}{}", key.name.replace('.', "__").to_ascii_uppercase())
}

/// Variables that look like a setting and are none, and such of other programs that are not honoured yet.
pub(super) fn warnings(variables: &[(String, String)]) -> Vec<String> {
    let one_underscore = |name: &str| name.replace("__", "_");
    let mut warnings = Vec::new();
    for (name, text) in variables {
        if name == OTEL && !text.is_empty() {
            warnings.push(format!("environment variable {OTEL} is ignored: export to OpenTelemetry is not built yet"));
        }
        // No error: Kubernetes makes variables such as UPSOLVER_AUTH_PROXY_PORT for a Service of this name.
        if !name.starts_with(PREFIX)
            && let Some(key) = schema::KEYS.iter().find(|key| one_underscore(&variable(key)) == one_underscore(name))
        {
            warnings.push(format!("environment variable {name} is ignored; did you mean {}, with double underscores?", variable(key)));
        }
    }
    warnings
}

/// The layer of `--set section.key=value`; the last of several for one key wins. No secret is taken from there: the command line of a process is
/// visible to every other (B42).
pub(super) fn flags(overrides: &[String], problems: &mut Vec<Problem>) -> Layer {
    let mut layer = Layer::new();
    for text in overrides {
        let mut refuse = |key: Option<&str>, message: String| {
            problems.push(Problem { provenance: Provenance::Flag, key: key.map(ToOwned::to_owned), message });
        };
        // What has no `=` is not quoted: it may be a secret after a misspelt key.
        let Some((name, text)) = text.split_once('=') else {
            refuse(None, "takes section.key=value, e.g. --set log.level=debug".to_owned());
            continue;
        };
        let name = name.trim();
        let Some(key) = schema::find(name) else {
            if let Some(key) = schema::KEYS.iter().find(|key| schema::is_section(name) && key.name.starts_with(&format!("{name}."))) {
                refuse(Some(name), format!("a section, not a key; set one of its keys, as in --set {}=…", key.name));
                continue;
            }
            let meant = suggest::key(name).map(|key| format!("; did you mean {key}?")).unwrap_or_default();
            refuse(Some(name), format!("unknown key{meant}"));
            continue;
        };
        if key.secrecy == Secrecy::Secret {
            refuse(Some(name), format!("a secret on the command line is visible to every process; use {name}_file or the environment"));
        } else if key.secrecy == Secrecy::Url && text.contains('@') {
            refuse(Some(name), format!("a password on the command line is visible to every process; use the file or {}", variable(key)));
        } else {
            layer.insert(key.name, Setting::new(key.value_of(text), Provenance::Flag));
        }
    }
    layer
}

/// Applies the well-known variables: `RUST_LOG` wins over `log.level`; `HTTPS_PROXY` and `NO_PROXY` stand in for an empty `upstream.proxy`. No others are
/// honoured, `ALL_PROXY`, `HTTP_PROXY`, `SSL_CERT_FILE` and `SSLKEYLOGFILE` in particular (B45).
pub(super) fn apply_well_known(settings: &mut Settings, variables: &[(String, String)]) {
    let first = |names: &[&'static str]| {
        let value = |name: &&'static str| {
            variables.iter().find(|(other, text)| other == name && !text.is_empty()).map(|(_, text)| (*name, text.as_str()))
        };
        names.iter().find_map(value)
    };
    let setting = |name: &str, text: &str| Setting::new(Value::from(text), Provenance::Environment(name.to_owned()));
    if let Some((name, filter)) = first(&["RUST_LOG"]) {
        settings.set("log.level", setting(name, filter));
    }
    if settings.get("upstream.proxy").is_empty()
        && let Some((name, proxy)) = first(&["HTTPS_PROXY", "https_proxy"])
        && let Ok(origin) = address::origin(&settings.get("upstream.url").value)
        // A proxy elsewhere would reach its own loopback, not this one.
        && !address::is_loopback_host(&origin.host)
    {
        let no_proxy = first(&["NO_PROXY", "no_proxy"]).map_or("", |(_, text)| text);
        // The matcher decides about the exceptions alone; it would silently ignore a proxy URL that it cannot use.
        let exceptions = Matcher::builder().https("http://proxy:1").no(no_proxy).build();
        if origin.to_string().parse().is_ok_and(|url| exceptions.intercept(&url).is_some()) {
            settings.set("upstream.proxy", setting(name, proxy));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Pairs<'a> = &'a [(&'a str, &'a str)];

    fn variables(pairs: Pairs<'_>) -> Vec<(String, String)> {
        pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    fn shown(layer: &Layer) -> Vec<String> {
        layer.iter().map(|(key, setting)| format!("{key}={}", setting.value)).collect()
    }

    #[test]
    fn variables_set_keys_of_any_depth() {
        let mut problems = Vec::new();
        let layer = environment(
            &variables(&[
                ("UPSOLVER_AUTH_PROXY__TOKEN__STORE__TYPE", "file"),
                ("UPSOLVER_AUTH_PROXY__LISTEN__TLS__CERTIFICATE_FILE", "/c"),
                ("UPSOLVER_AUTH_PROXY__RUNTIME__WORKERS", "2"),
                ("UPSOLVER_EMAIL_FILE", "/e"),
                ("UPSOLVER_PASSWORD", ""),
                ("UPSOLVER_AUTH_PROXY_SERVICE_HOST", "10.0.0.1"),
                ("UPSOLVER_AUTH_PROXY_CONFIG", "/x"),
            ]),
            &mut problems,
        );
        assert_eq!(problems, []);
        let expected =
            ["credentials.email_file=\"/e\"", "listen.tls.certificate_file=\"/c\"", "runtime.workers=2", "token.store.type=\"file\""];
        assert_eq!(shown(&layer), expected);
    }

    #[test]
    fn unknown_variables_of_ours_are_problems() {
        let mut problems = Vec::new();
        environment(
            &variables(&[
                ("UPSOLVER_AUTH_PROXY__TOKEN__WIAT", "canary"),
                ("UPSOLVER_AUTH_PROXY__", "canary"),
                ("UPSOLVER_EMAIL", "canary"),
                ("UPSOLVER_AUTH_PROXY__CREDENTIALS__EMAIL", "canary"),
            ]),
            &mut problems,
        );
        let expected = [
            "environment variable UPSOLVER_AUTH_PROXY__TOKEN__WIAT: no such key; did you mean UPSOLVER_AUTH_PROXY__TOKEN__WAIT?",
            "environment variable UPSOLVER_AUTH_PROXY__: no such key",
            "environment variable UPSOLVER_AUTH_PROXY__CREDENTIALS__EMAIL: credentials.email: also set by the environment variable UPSOLVER_EMAIL; \
             remove one",
        ];
        assert_eq!(problems.iter().map(ToString::to_string).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_only_looks_like_a_setting_is_warned_of() {
        let warnings = warnings(&variables(&[
            ("UPSOLVER_AUTH_PROXY_LOG_LEVEL", "debug"),
            ("UPSOLVER_AUTH_PROXY_TOKEN__WAIT", "1s"),
            ("UPSOLVER_AUTH_PROXY_PORT", "x"),
            ("UPSOLVER_AUTH_PROXY__LOG__LEVEL", "debug"),
            (OTEL, "http://collector"),
        ]));
        assert_eq!(warnings.len(), 3, "{warnings:?}");
        assert!(warnings[0].contains("did you mean UPSOLVER_AUTH_PROXY__LOG__LEVEL"));
        assert!(warnings[2].contains("not built yet"));
    }

    /// B42: no flag takes a secret, and a refused one is not repeated.
    #[test]
    fn b42_set_takes_no_secret() {
        let overrides = [
            "log.level=a=b",
            "log.level = debug,hyper=info",
            "credentials.password=canary",
            "credentials.email=canary",
            "credentials.pasword=canary",
            "credentials.password:canary",
            "upstream.proxy=http://me:canary@proxy",
        ];
        let mut problems = Vec::new();
        let layer = flags(&overrides.map(ToOwned::to_owned), &mut problems);
        assert_eq!(shown(&layer), [r#"log.level=" debug,hyper=info""#]);
        let text: Vec<_> = problems.iter().map(ToString::to_string).collect();
        assert_eq!(text.len(), 5, "{text:?}");
        assert!(!text.concat().contains("canary"), "{text:?}");
        assert_eq!(text[2], "--set: credentials.pasword: unknown key; did you mean credentials.password?");
    }

    /// B45: `HTTPS_PROXY` and `NO_PROXY` are honoured, nothing else is.
    #[test]
    fn b45_only_https_proxy_and_no_proxy_are_honoured() {
        let proxy = |upstream: &str, own: &str, pairs: &[(&str, &str)]| {
            let overrides = [format!("upstream.url={upstream}"), format!("upstream.proxy={own}")];
            let mut settings = Settings::merge([flags(&overrides, &mut Vec::new())], &mut Vec::new());
            apply_well_known(&mut settings, &variables(pairs));
            settings.get("upstream.proxy").value.as_str().unwrap().to_owned()
        };
        let https = ("HTTPS_PROXY", "http://p:1");
        let api = "https://api.upsolver.com";
        let rows: [(&str, &str, Pairs<'_>, &str); 12] = [
            (api, "", &[https], "http://p:1"),
            (api, "", &[("https_proxy", "http://q:1")], "http://q:1"),
            (api, "", &[("HTTPS_PROXY", ""), ("https_proxy", "http://q:1")], "http://q:1"),
            (api, "http://own:2", &[https, ("NO_PROXY", "*")], "http://own:2"),
            (api, "", &[https, ("NO_PROXY", "example.com, upsolver.com")], ""),
            (api, "", &[https, ("no_proxy", "*")], ""),
            (api, "", &[https, ("NO_PROXY", "solver.com")], "http://p:1"),
            ("https://10.1.2.3", "", &[https, ("NO_PROXY", "10.0.0.0/8")], ""),
            ("https://[fd00::1]:8443", "", &[https], "http://p:1"),
            ("https://localhost:8443", "", &[https], ""),
            (api, "", &[("ALL_PROXY", "http://p:1"), ("HTTP_PROXY", "http://p:1"), ("all_proxy", "http://p:1")], ""),
            (api, "", &[("HTTPS_PROXY", "socks5://p:1")], "socks5://p:1"),
        ];
        for (upstream, own, pairs, expected) in rows {
            assert_eq!(proxy(upstream, own, pairs), expected, "{upstream} {own} {pairs:?}");
        }
    }
}
