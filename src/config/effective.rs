//! The configuration in force, key by key with its origin: what `config` prints, and what a reload compares.

use std::fmt;

use super::Config;
use super::error::Provenance;
use super::layer::Settings;
use super::schema::KEYS;

/// Every key with its value as it was given, secrets replaced, and where it was set. A default that gave way to the memory limit is shown as it is in force. `Display` is TOML that parses again, with origins as comments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective(Vec<Entry>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    section: &'static str,
    leaf: &'static str,
    value: String,
    origin: String,
}

impl Effective {
    pub(super) fn new(settings: &Settings, config: &Config) -> Self {
        let limits = [("listen.max_connections", config.listen.max_connections), ("limits.max_in_flight", config.limits.max_in_flight)];
        let entry = |key: &super::schema::Key| {
            let setting = settings.get(key.name);
            let (mut value, mut origin) = (key.display(&setting.value), setting.provenance.to_string());
            if setting.provenance == Provenance::Default
                && let Some((_, in_force)) = limits.iter().find(|(name, in_force)| *name == key.name && value != in_force.to_string())
            {
                value = in_force.to_string();
                origin = format!("{origin}, lowered to fit the memory limit");
            }
            Entry { section: key.section(), leaf: key.leaf(), value, origin }
        };
        Self(KEYS.iter().map(entry).collect())
    }

    /// The keys whose value differs from `old`'s, wherever it was set. A secret that stayed a secret is not compared: its values are not kept here.
    pub fn changed_keys(&self, old: &Self) -> Vec<String> {
        let pairs = self.0.iter().zip(&old.0);
        pairs.filter(|(new, old)| new.value != old.value).map(|(new, _)| format!("{}.{}", new.section, new.leaf)).collect()
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
            writeln!(f, "{} = {}  # {}", entry.leaf, entry.value, entry.origin.escape_debug())?;
        }
        Ok(())
    }
}
