//! Name and description under which a token is shown in the account.
//!
//! A name is never used twice: `<token.name>/<namespace>/<pod>/<time>/<random>`. Where a mint's reply is lost, its name in the log is all that a person has to
//! find the token by; and a name tells of any token which proxy left it. Nothing of the credentials is in it.

use std::path::Path;
use std::time::SystemTime;

use serde::Serialize;

/// Of a display name, in characters. What makes it unique is never cut.
const MAX_NAME: usize = 200;
/// Of a description, in characters.
const MAX_DESCRIPTION: usize = 500;
/// Of a host, pod, namespace or node, in characters: the longest that DNS and Kubernetes allow.
const MAX_PART: usize = 253;
/// Stands for a placeholder whose value is not known, so that the text around it still reads.
const UNKNOWN: &str = "unknown";
const HOST_NAME_FILE: &str = "/proc/sys/kernel/hostname";
const NAMESPACE_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// `displayData` of one mint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Display {
    /// Unique.
    pub name: String,
    /// `token.description`, placeholders replaced.
    pub description: String,
}

/// Where this proxy runs, as far as it can tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    hostname: Option<String>,
    pod: Option<String>,
    namespace: Option<String>,
    node: Option<String>,
}

impl Environment {
    /// Looks around once. `POD_NAME`, `POD_NAMESPACE` and `NODE_NAME` come from the Downward API; without them a pod's name is its host name, and the namespace
    /// stands beside the service account's token.
    pub fn detect() -> Self {
        Self::from(|name| std::env::var(name).ok(), |path| std::fs::read_to_string(path).ok())
    }

    fn from(variable: impl Fn(&str) -> Option<String>, file: impl Fn(&Path) -> Option<String>) -> Self {
        let file = |path| file(Path::new(path)).and_then(|value| clean(&value));
        let variable = |name| variable(name).and_then(|value| clean(&value));
        let hostname = file(HOST_NAME_FILE).or_else(|| variable("HOSTNAME"));
        let in_kubernetes = variable("KUBERNETES_SERVICE_HOST").is_some();
        Self {
            pod: variable("POD_NAME").or_else(|| hostname.clone().filter(|_| in_kubernetes)),
            namespace: variable("POD_NAMESPACE").or_else(|| file(NAMESPACE_FILE)),
            node: variable("NODE_NAME"),
            hostname,
        }
    }

    /// Name and description for the next mint, from `token.name` and `token.description`. `now` and the random number make the name unique.
    pub fn display(&self, name: &str, description: &str, now: SystemTime, random: u32) -> Display {
        let place = [("{namespace}", self.namespace.as_ref()), ("{pod}", self.pod.as_ref().or(self.hostname.as_ref()))];
        let mut prefix = self.expand(name);
        for (placeholder, value) in place {
            // Where the operator named it already, once is enough.
            if let Some(value) = value.filter(|_| !name.contains(placeholder)) {
                prefix.push('/');
                prefix.push_str(value);
            }
        }
        let time = humantime::format_rfc3339_seconds(now).to_string().replace(['-', ':'], "");
        let unique = format!("/{time}/{random:08x}");
        Display { name: cut(&prefix, MAX_NAME - unique.len()) + &unique, description: cut(&self.expand(description), MAX_DESCRIPTION) }
    }

    /// Replaces each placeholder once; what was put in is not looked at again.
    fn expand(&self, template: &str) -> String {
        let known = |value: &Option<String>| value.clone().unwrap_or_else(|| UNKNOWN.to_owned());
        let mut expanded = String::new();
        let mut rest = template;
        while let Some((before, after)) = rest.split_once('{') {
            expanded.push_str(before);
            let value = after.split_once('}').and_then(|(placeholder, after)| {
                let value = match placeholder {
                    "hostname" => known(&self.hostname),
                    "pod" => known(&self.pod),
                    "namespace" => known(&self.namespace),
                    "node" => known(&self.node),
                    "version" => env!("CARGO_PKG_VERSION").to_owned(),
                    _ => return None,
                };
                Some((value, after))
            });
            if let Some((value, after)) = value {
                expanded.push_str(&value);
                rest = after;
            } else {
                // Some other brace: it stays.
                expanded.push('{');
                rest = after;
            }
        }
        expanded + rest
    }
}

/// Names of machines go into logs and into somebody's account: nothing but what DNS and Kubernetes allow gets through.
fn clean(value: &str) -> Option<String> {
    let legal = |character: char| character.is_ascii_alphanumeric() || "-._".contains(character);
    let value: String = value.trim().chars().map(|character| if legal(character) { character } else { '-' }).take(MAX_PART).collect();
    (!value.is_empty()).then_some(value)
}

fn cut(text: &str, characters: usize) -> String {
    text.chars().take(characters).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    fn environment(hostname: Option<&str>, pod: Option<&str>, namespace: Option<&str>, node: Option<&str>) -> Environment {
        let owned = |value: Option<&str>| value.map(str::to_owned);
        Environment { hostname: owned(hostname), pod: owned(pod), namespace: owned(namespace), node: owned(node) }
    }

    /// C50: the configured name, where it runs, when, and something unique.
    #[test]
    fn c50_names_say_where_and_when_and_are_unique() {
        let pod = environment(Some("web-1"), Some("web-1"), Some("shop"), Some("n1"));
        let laptop = environment(Some("laptop"), None, None, None);
        let rows = [
            (&pod, "upsolver-auth-proxy", "upsolver-auth-proxy/shop/web-1/19700101T000000Z/0000002a"),
            (&pod, "{pod}@{node}", "web-1@n1/shop/19700101T000000Z/0000002a"),
            (&pod, "{namespace}-{pod}", "shop-web-1/19700101T000000Z/0000002a"),
            (&laptop, "mine", "mine/laptop/19700101T000000Z/0000002a"),
            (&laptop, "mine {node}", "mine unknown/laptop/19700101T000000Z/0000002a"),
            (&Environment::default(), "bare", "bare/19700101T000000Z/0000002a"),
        ];
        for (environment, template, expected) in rows {
            assert_eq!(environment.display(template, "", NOW, 42).name, expected, "{template}");
        }
        assert_ne!(pod.display("x", "", NOW, 1).name, pod.display("x", "", NOW, 2).name);
        assert_ne!(pod.display("x", "", NOW, 1).name, pod.display("x", "", NOW + Duration::from_secs(1), 1).name);
    }

    /// C50: a long name loses its end, never what makes it unique; characters are not cut in half.
    #[test]
    fn c50_long_names_are_capped() {
        let display = Environment::default().display(&"ä".repeat(500), &"ö".repeat(5000), NOW, 42);
        assert_eq!(display.name.chars().count(), MAX_NAME);
        assert!(display.name.starts_with("ää") && display.name.ends_with("/19700101T000000Z/0000002a"), "{}", display.name);
        assert_eq!(display.description.chars().count(), MAX_DESCRIPTION);
    }

    #[test]
    fn placeholders_are_replaced_once_and_other_braces_stay() {
        let environment = environment(Some("{pod}"), None, Some("shop"), None);
        let version = env!("CARGO_PKG_VERSION");
        let rows = [
            ("v{version} in {namespace}", format!("v{version} in shop")),
            ("{hostname}", "{pod}".to_owned()),
            ("{other} {{pod}} {", "{other} {unknown} {".to_owned()),
            ("", String::new()),
        ];
        for (template, expected) in rows {
            assert_eq!(environment.expand(template), expected, "{template}");
        }
    }

    /// C50: the Downward API goes before the host name, and what is odd in a name is replaced.
    #[test]
    fn c50_where_it_runs() {
        let hostname = |path: &Path| (path == Path::new(HOST_NAME_FILE)).then(|| "web-1\n".to_owned());
        let namespace = |path: &Path| (path == Path::new(NAMESPACE_FILE)).then(|| "shop".to_owned()).or_else(|| hostname(path));
        let kubernetes = |name: &str| (name == "KUBERNETES_SERVICE_HOST").then(|| "10.0.0.1".to_owned());
        let downward = |name: &str| match name {
            "POD_NAME" => Some("api 7\n\"".to_owned()),
            "POD_NAMESPACE" => Some("billing".to_owned()),
            "NODE_NAME" => Some("n1".to_owned()),
            _ => None,
        };
        assert_eq!(Environment::from(|_| None, |_| None), Environment::default());
        assert_eq!(Environment::from(|_| None, hostname), environment(Some("web-1"), None, None, None));
        assert_eq!(Environment::from(kubernetes, namespace), environment(Some("web-1"), Some("web-1"), Some("shop"), None));
        assert_eq!(Environment::from(downward, namespace), environment(Some("web-1"), Some("api-7--"), Some("billing"), Some("n1")));
    }
}
