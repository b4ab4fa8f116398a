//! The name and description under which a minted token shows in Upsolver's UI. A person who cleans up must be able to tell from them which proxy left
//! a token, and the log must be able to name one whose reply was lost; so each mint's name is unique.

use std::path::Path;
use std::time::SystemTime;

/// The longest name, in bytes.
const MAX_NAME_BYTES: usize = 200;
/// The longest description, in bytes.
const MAX_DESCRIPTION_BYTES: usize = 500;
/// Where Kubernetes tells a Pod its namespace.
const NAMESPACE_FILE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";

/// What one mint's token will be called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Display {
    /// Unique per mint.
    pub name: String,
    /// For people.
    pub description: String,
}

/// Where this process runs, as far as it is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    /// `{hostname}`
    pub hostname: Option<String>,
    /// `{pod}`, from `POD_NAME`; in a Pod without it, the host name.
    pub pod: Option<String>,
    /// `{namespace}`, from `POD_NAMESPACE` or the service account.
    pub namespace: Option<String>,
    /// `{node}`, from `NODE_NAME`.
    pub node: Option<String>,
}

impl Place {
    /// Looks it up in the environment that the deployment gives (the downward API in Kubernetes).
    pub fn find() -> Self {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let hostname = rustix::system::uname().nodename().to_str().ok().map(str::to_owned).filter(|name| !name.is_empty());
        let in_pod = variable("KUBERNETES_SERVICE_HOST").is_some();
        let namespace = || std::fs::read_to_string(Path::new(NAMESPACE_FILE)).ok().map(|name| name.trim().to_owned());
        Self {
            pod: variable("POD_NAME").or_else(|| hostname.clone().filter(|_| in_pod)),
            namespace: variable("POD_NAMESPACE").or_else(namespace),
            node: variable("NODE_NAME"),
            hostname,
        }
    }

    /// Replaces what is known; a placeholder that is not is left out.
    fn expand(&self, template: &str) -> String {
        let values = [
            ("{hostname}", &self.hostname),
            ("{pod}", &self.pod),
            ("{namespace}", &self.namespace),
            ("{node}", &self.node),
            ("{version}", &Some(env!("CARGO_PKG_VERSION").to_owned())),
        ];
        values
            .iter()
            .fold(template.to_owned(), |text, (placeholder, value)| text.replace(placeholder, value.as_deref().unwrap_or_default()))
    }
}

impl Display {
    /// The configured name, then where it runs where the name does not say so itself, then when, then something unique:
    /// `billing/shop/web-7d4f/20261124T101500Z-k3x9`.
    pub fn new(name: &str, description: &str, place: &Place, now: SystemTime) -> Self {
        let mut full = place.expand(name);
        for (placeholder, value) in [("{namespace}", &place.namespace), ("{pod}", &place.pod)] {
            if let Some(value) = value
                && !name.contains(placeholder)
            {
                full.push('/');
                full.push_str(value);
            }
        }
        let nonce: String = std::iter::repeat_with(fastrand::alphanumeric).take(6).collect::<String>().to_lowercase();
        let time: String = humantime::format_rfc3339_seconds(now).to_string().chars().filter(|c| !matches!(c, '-' | ':')).collect();
        let suffix = format!("/{time}-{nonce}");
        let kept = shorten(&full, MAX_NAME_BYTES - suffix.len());
        Self { name: format!("{kept}{suffix}"), description: shorten(&place.expand(description), MAX_DESCRIPTION_BYTES).to_owned() }
    }
}

/// The longest prefix of at most so many bytes that ends between characters.
fn shorten(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place() -> Place {
        Place { hostname: Some("h1".into()), pod: Some("web-1".into()), namespace: Some("shop".into()), node: None }
    }

    /// C50: says where it runs, is unique, is capped; unknown placeholders are left out.
    #[test]
    fn c50_names_tell_where_and_are_unique() {
        let at = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_795_515_300);
        let one = Display::new("billing", "by {version} on {hostname}{node}", &place(), at);
        assert!(one.name.starts_with("billing/shop/web-1/20261124T") && one.name.contains("Z-"), "{}", one.name);
        assert_eq!(one.description, format!("by {} on h1", env!("CARGO_PKG_VERSION")));
        assert_ne!(one.name, Display::new("billing", "", &place(), at).name);
        let named = Display::new("{pod} of {namespace}", "", &place(), at);
        assert!(named.name.starts_with("web-1 of shop/2026"), "{}", named.name);
        let long = Display::new(&"ä".repeat(300), &"ä".repeat(600), &place(), at);
        assert!(long.name.len() <= MAX_NAME_BYTES && long.description.len() <= MAX_DESCRIPTION_BYTES && long.name.contains("Z-"));
    }
}
