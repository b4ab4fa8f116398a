//! Every key of the configuration, in the order in which it is documented and printed: its default, and how text from the environment becomes a value.
//!
//! What a key's value must look like stands where it is read, in `sections`; a test there holds that each key of this list is read.

use toml::Value;

/// One key.
#[derive(Debug)]
pub(super) struct Key {
    /// Dotted, e.g. `token.store.type`.
    pub(super) name: &'static str,
    /// Its default and its shape.
    pub(super) preset: Preset,
    /// What of its value may be shown.
    pub(super) secrecy: Secrecy,
}

/// A key's default, which also tells how text from an environment variable or from `--set` is to be taken.
#[derive(Debug, Clone, Copy)]
pub(super) enum Preset {
    /// A string; text is taken as it is.
    Text(&'static str),
    /// A whole number.
    Number(i64),
    /// `true` or `false`.
    Flag(bool),
    /// An empty list; text is a TOML array or separated by commas.
    List,
    /// One string or a list of them; text as for a list.
    OneOrMore(&'static str),
}

/// What of a value may be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Secrecy {
    /// All of it.
    Open,
    /// Nothing: the value is a secret.
    Secret,
    /// All but the user information in front of the `@` of a URL.
    Url,
}

/// The whole schema (contract section 3).
pub(super) const KEYS: &[Key] = &[
    // Both loopbacks, since apps resolve localhost to either.
    key("listen.address", Preset::OneOrMore("localhost:8080")),
    // The owner and its group: an app of another user joins the group.
    key("listen.unix_mode", Preset::Text("0660")),
    key("listen.allow_non_loopback", Preset::Flag(false)),
    key("listen.allowed_hosts", Preset::List),
    key("listen.caller_token_file", Preset::Text("")),
    key("listen.max_connections", Preset::Number(4096)),
    key("listen.header_timeout", Preset::Text("10s")),
    // Longer than most clients keep an idle connection, so that the side which reuses it is the one which closes it.
    key("listen.idle_timeout", Preset::Text("75s")),
    key("listen.max_header_size", Preset::Text("64KiB")),
    key("listen.tls.certificate_file", Preset::Text("")),
    key("listen.tls.private_key_file", Preset::Text("")),
    key("listen.tls.client_ca_file", Preset::Text("")),
    key("admin.address", Preset::OneOrMore("localhost:9090")),
    secret("credentials.email"),
    key("credentials.email_file", Preset::Text("")),
    secret("credentials.password"),
    key("credentials.password_file", Preset::Text("")),
    key("credentials.token_file", Preset::Text("")),
    // Kubelet itself refreshes a Secret about once a minute; file watching is faster where it works.
    key("credentials.poll_interval", Preset::Text("15s")),
    key("token.name", Preset::Text("upsolver-auth-proxy")),
    key("token.description", Preset::Text("Minted by upsolver-auth-proxy {version} on {hostname}")),
    // Covers a mint with one retry; much longer and apps give up by themselves.
    key("token.wait", Preset::Text("10s")),
    // Tokens have no documented expiry, and each mint leaves a lasting one behind.
    key("token.max_age", Preset::Text("off")),
    key("token.min_mint_interval", Preset::Text("60s")),
    key("token.mint_budget", Preset::Number(6)),
    key("token.mint_timeout", Preset::Text("15s")),
    // 2xx for a good identity, 403 for a bad one, whatever its permissions.
    key("token.probe_path", Preset::Text("/users")),
    key("token.probe_interval", Preset::Text("30s")),
    key("token.replay", Preset::Text("all")),
    key("token.replay_buffer", Preset::Text("64KiB")),
    // Upsolver documents deletion in its UI only.
    key("token.revoke_path", Preset::Text("")),
    key("token.store.type", Preset::Text("memory")),
    key("token.store.path", Preset::Text("/var/lib/upsolver-auth-proxy/token.json")),
    key("token.store.namespace", Preset::Text("")),
    key("token.store.secret", Preset::Text("upsolver-auth-proxy-token")),
    key("token.store.lease", Preset::Text("upsolver-auth-proxy")),
    Key { name: "upstream.url", preset: Preset::Text("https://api.upsolver.com"), secrecy: Secrecy::Url },
    key("upstream.ca_file", Preset::Text("")),
    key("upstream.connect_timeout", Preset::Text("5s")),
    // Clients poll queries that run for 30 s and more.
    key("upstream.response_timeout", Preset::Text("120s")),
    key("upstream.body_idle_timeout", Preset::Text("60s")),
    // Below a load balancer's 60 s, so that it is the proxy which closes an idle connection.
    key("upstream.pool_idle_timeout", Preset::Text("25s")),
    key("upstream.max_connection_age", Preset::Text("10m")),
    key("upstream.http_version", Preset::Text("1.1")),
    Key { name: "upstream.proxy", preset: Preset::Text(""), secrecy: Secrecy::Url },
    key("upstream.resolve", Preset::Text("")),
    key("limits.max_in_flight", Preset::Number(1024)),
    key("limits.max_request_body", Preset::Text("off")),
    key("policy.rules", Preset::List),
    key("policy.default", Preset::Text("allow")),
    key("policy.dry_run", Preset::Flag(false)),
    key("policy.allow_minting", Preset::Flag(false)),
    key("log.level", Preset::Text("info")),
    key("log.format", Preset::Text("auto")),
    key("log.access", Preset::Text("all")),
    key("telemetry.otlp_endpoint", Preset::Text("")),
    key("runtime.workers", Preset::Number(0)),
    key("shutdown.delay", Preset::Text("0s")),
    // Below Kubernetes' default grace period of 30 s.
    key("shutdown.drain_timeout", Preset::Text("25s")),
];

/// Keys of features that do not exist yet, with the words for the feature: refused when set to anything but the default, so that nobody believes in
/// them. A feature that arrives takes its rows away.
pub(super) const NOT_BUILT: &[(&str, &str)] = &[
    ("token.store.namespace", "the Kubernetes token store"),
    ("token.store.secret", "the Kubernetes token store"),
    ("token.store.lease", "the Kubernetes token store"),
    ("telemetry.otlp_endpoint", "export to OpenTelemetry"),
];

const fn key(name: &'static str, preset: Preset) -> Key {
    Key { name, preset, secrecy: Secrecy::Open }
}

const fn secret(name: &'static str) -> Key {
    Key { name, preset: Preset::Text(""), secrecy: Secrecy::Secret }
}

/// The key of this dotted name.
pub(super) fn find(name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.name == name)
}

/// Whether `name` is a section: some key stands below it.
pub(super) fn is_section(name: &str) -> bool {
    KEYS.iter().any(|key| key.section() == name || key.section().strip_prefix(name).is_some_and(|rest| rest.starts_with('.')))
}

impl Key {
    /// Everything before the last dot.
    pub(super) fn section(&self) -> &'static str {
        self.name.rsplit_once('.').expect("every key stands in a section").0
    }

    /// The part after the last dot.
    pub(super) fn leaf(&self) -> &'static str {
        self.name.rsplit_once('.').expect("every key stands in a section").1
    }

    /// The default as a value.
    pub(super) fn default_value(&self) -> Value {
        match self.preset {
            Preset::Text(text) | Preset::OneOrMore(text) => Value::String(text.to_owned()),
            Preset::Number(number) => Value::Integer(number),
            Preset::Flag(flag) => Value::Boolean(flag),
            Preset::List => Value::Array(Vec::new()),
        }
    }

    /// The value of text from an environment variable or from `--set`. Text that does not fit stays text, and is refused where the key is read.
    pub(super) fn value_of(&self, text: &str) -> Value {
        let as_text = || Value::String(text.to_owned());
        match self.preset {
            Preset::Text(_) => as_text(),
            Preset::Number(_) => text.trim().parse().map_or_else(|_| as_text(), Value::Integer),
            Preset::Flag(_) => text.trim().parse().map_or_else(|_| as_text(), Value::Boolean),
            Preset::List | Preset::OneOrMore(_) => match text.trim().parse::<Value>() {
                Ok(array @ Value::Array(_)) => array,
                // `[::1]:8080` begins like an array, and is an address.
                _ => Value::Array(text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(Value::from).collect()),
            },
        }
    }

    /// `value` as TOML, with what must not be shown replaced.
    pub(super) fn display(&self, value: &Value) -> String {
        match (self.secrecy, value) {
            (_, Value::String(text)) if text.is_empty() => "\"\"".to_owned(),
            (Secrecy::Url, Value::String(url)) => Value::String(without_user_information(url)).to_string(),
            // What is no string may hold one with a password anywhere.
            (Secrecy::Secret | Secrecy::Url, _) => "\"[redacted]\"".to_owned(),
            (Secrecy::Open, _) => value.to_string(),
        }
    }
}

/// Replaces what stands before the last `@` and after the scheme; that is where the user information of a URL ends, however malformed it is.
pub(super) fn without_user_information(url: &str) -> String {
    match url.rsplit_once('@') {
        None => url.to_owned(),
        Some((before, after)) => {
            let scheme = before.find("://").map_or("", |at| &before[..at + 3]);
            format!("{scheme}[redacted]@{after}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_becomes_the_value_that_the_key_holds() {
        let rows = [
            ("log.level", "debug", r#""debug""#),
            ("log.level", "[x]", r#""[x]""#),
            ("runtime.workers", " 3 ", "3"),
            ("runtime.workers", "three", r#""three""#),
            ("policy.dry_run", "true", "true"),
            ("policy.dry_run", "yes", r#""yes""#),
            ("listen.allowed_hosts", "a, b,", r#"["a", "b"]"#),
            ("listen.allowed_hosts", r#"["a"]"#, r#"["a"]"#),
            ("listen.allowed_hosts", "", "[]"),
            ("listen.address", "[::1]:8080", r#"["[::1]:8080"]"#),
            ("policy.rules", r#"[{action = "deny", path = "/x"}]"#, r#"[{ action = "deny", path = "/x" }]"#),
        ];
        for (name, text, expected) in rows {
            assert_eq!(find(name).unwrap().value_of(text).to_string(), expected, "{name} {text:?}");
        }
    }

    /// B37: what a key's value may show.
    #[test]
    fn b37_secrets_are_not_displayed() {
        let rows = [
            ("credentials.password", Value::from("canary"), r#""[redacted]""#),
            ("credentials.password", Value::from(12345), r#""[redacted]""#),
            ("credentials.password", Value::from(""), r#""""#),
            ("upstream.proxy", Value::from("http://me:canary@proxy:3128"), r#""http://[redacted]@proxy:3128""#),
            ("upstream.proxy", Value::from("me:can@ary@proxy:3128"), r#""[redacted]@proxy:3128""#),
            ("upstream.proxy", Value::from("http://proxy:3128"), r#""http://proxy:3128""#),
            ("upstream.proxy", Value::from(vec!["http://me:canary@proxy"]), r#""[redacted]""#),
            ("upstream.url", Value::from(vec!["https://me:canary@api"]), r#""[redacted]""#),
            ("log.level", Value::from("info"), r#""info""#),
        ];
        for (name, value, expected) in rows {
            assert_eq!(find(name).unwrap().display(&value), expected);
        }
    }

    #[test]
    fn sections_are_what_keys_stand_below() {
        assert!(is_section("listen") && is_section("listen.tls") && is_section("token.store"));
        assert!(!is_section("list") && !is_section("listen.address") && !is_section(""));
    }
}
