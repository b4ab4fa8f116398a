//! The configuration in force, key by key with its origin: what `config` prints, and what a reload compares.

use std::fmt;

use super::error::Provenance;
use super::layer::Settings;
use super::schema::KEYS;

/// Every key with its value as it was given, secrets replaced, and where it was set. `Display` is TOML that parses again, with origins as comments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Effective(Vec<Entry>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    section: &'static str,
    leaf: &'static str,
    value: String,
    provenance: Provenance,
}

impl Effective {
    pub(super) fn new(settings: &Settings) -> Self {
        let entry = |key: &super::schema::Key| {
            let setting = settings.get(key.name);
            Entry { section: key.section(), leaf: key.leaf(), value: key.display(&setting.value), provenance: setting.provenance.clone() }
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
            let provenance = entry.provenance.to_string().escape_debug().to_string();
            writeln!(f, "{} = {}  # {provenance}", entry.leaf, entry.value)?;
        }
        Ok(())
    }
}
