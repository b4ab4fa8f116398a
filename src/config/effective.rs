//! The configuration in force, key by key with its origin: what `config` prints, and what a reload compares.

use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

use toml::Value;
use zeroize::Zeroizing;

use super::Config;
use super::error::Provenance;
use super::layer::Settings;
use super::schema::{KEYS, Secrecy};

/// Every key with its value as it was given, secrets replaced, and where it was set. A default that gave way to the memory limit is shown as it is in
/// force. `Display` is TOML that parses again, with origins as comments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective(Vec<Entry>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    section: &'static str,
    leaf: &'static str,
    value: String,
    /// Of a value that is not shown as it is.
    fingerprint: Option<Fingerprint>,
    provenance: Provenance,
    /// Whether the default gave way to the memory limit.
    is_lowered: bool,
}

/// Tells two secrets apart without keeping either: a hash under a key that this process drew at random and shows to nobody, so that it means nothing
/// outside of it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Fingerprint(u64);

impl Fingerprint {
    fn of(value: &Value) -> Self {
        static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
        match value {
            Value::String(text) => Self(KEY.hash_one(text)),
            // Refused where the key is read; complete all the same.
            other => Self(KEY.hash_one(&*Zeroizing::new(other.to_string()))),
        }
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fingerprint")
    }
}

impl Effective {
    pub(super) fn new(settings: &Settings, config: &Config) -> Self {
        let limits = [("listen.max_connections", config.listen.max_connections), ("limits.max_in_flight", config.limits.max_in_flight)];
        let entry = |key: &super::schema::Key| {
            let setting = settings.get(key.name);
            let written = key.display(&setting.value);
            let in_force = limits.iter().find(|(name, _)| *name == key.name).map(|(_, in_force)| in_force.to_string());
            let lowered = in_force.filter(|in_force| setting.provenance == Provenance::Default && *in_force != written);
            let (is_lowered, value) = (lowered.is_some(), lowered.unwrap_or(written));
            let fingerprint = match key.secrecy {
                Secrecy::Open => None,
                Secrecy::Secret | Secrecy::Url => Some(Fingerprint::of(&setting.value)),
            };
            Entry { section: key.section(), leaf: key.leaf(), value, fingerprint, provenance: setting.provenance.clone(), is_lowered }
        };
        Self(KEYS.iter().map(entry).collect())
    }

    /// The keys whose value differs from `old`'s, wherever it was set. Secrets are compared too, by what is left of them here, their fingerprints.
    pub fn changed_keys(&self, old: &Self) -> Vec<String> {
        let pairs = self.0.iter().zip(&old.0);
        let differs = |new: &Entry, old: &Entry| new.value != old.value || new.fingerprint != old.fingerprint;
        pairs.filter(|(new, old)| differs(new, old)).map(|(new, _)| new.name()).collect()
    }

    /// What was found wrong with the value of a key, `section.key: what`, with where it was set in front, as in every [`Problem`](super::Problem). Anything
    /// else, and a default, which was set nowhere, stays as it is.
    pub fn locate(&self, message: &str) -> String {
        let name = message.split_once(": ").map_or(message, |(name, _)| name);
        match self.0.iter().find(|entry| entry.provenance != Provenance::Default && entry.name() == name) {
            Some(entry) => format!("{}: {message}", entry.provenance),
            None => message.to_owned(),
        }
    }
}

impl Entry {
    fn name(&self) -> String {
        format!("{}.{}", self.section, self.leaf)
    }
}

impl fmt::Display for Effective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut section = "";
        for entry in &self.0 {
            if entry.section != section {
                let gap = if section.is_empty() { "" } else { "\n" };
                section = entry.section;
                writeln!(f, "{gap}[{section}]")?;
            }
            // A comment ends with its line, so a path with a line end in it must not.
            let origin = entry.provenance.to_string();
            let remark = if entry.is_lowered { ", lowered to fit the memory limit" } else { "" };
            writeln!(f, "{} = {}  # {}{remark}", entry.leaf, entry.value, origin.escape_debug())?;
        }
        Ok(())
    }
}
