//! Layers of settings and how a higher one wins over a lower: default < file < environment < flag.

use std::collections::BTreeMap;

use toml::Value;
use zeroize::Zeroize;

use super::error::{Problem, Provenance};
use super::schema::KEYS;

/// Email and password, each as a value or in a file: one slot of two keys.
const SLOTS: [(&str, &str); 2] = [("credentials.email", "credentials.email_file"), ("credentials.password", "credentials.password_file")];
const TOKEN_FILE: &str = "credentials.token_file";

/// One key's value as it was written. Without `Debug`, since it may be a secret.
#[derive(Clone)]
pub(super) struct Setting {
    /// As written, not yet checked.
    pub(super) value: Value,
    /// Where it was set.
    pub(super) provenance: Provenance,
    /// The line of each element of a list that a file holds.
    pub(super) lines: Vec<usize>,
}

impl Setting {
    /// A setting whose elements have no lines of their own.
    pub(super) fn new(value: Value, provenance: Provenance) -> Self {
        Self { value, provenance, lines: Vec::new() }
    }

    /// The empty string turns an optional key off, as if it were not set.
    pub(super) fn is_empty(&self) -> bool {
        self.value.as_str() == Some("")
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Value::String(text) = &mut self.value {
            text.zeroize();
        }
    }
}

/// What one source sets, by dotted key.
pub(super) type Layer = BTreeMap<&'static str, Setting>;

/// Every key of the schema with the value that won.
pub(super) struct Settings(BTreeMap<&'static str, Setting>);

impl Settings {
    /// Lays `layers` over the defaults, the lowest first.
    ///
    /// The credentials are one choice: a layer that sets a credential's file drops the value that a lower layer gave it, and the other way round; the
    /// same holds between the token file and the pair. Within one layer such a choice is contradictory, and a problem.
    pub(super) fn merge(layers: impl IntoIterator<Item = Layer>, problems: &mut Vec<Problem>) -> Self {
        let mut merged = Self(KEYS.iter().map(|key| (key.name, Setting::new(key.default_value(), Provenance::Default))).collect());
        for layer in layers {
            problems.extend(contradictions(&layer));
            let sets = |key| layer.get(key).is_some_and(|setting: &Setting| !setting.is_empty());
            for (value, file) in SLOTS {
                for (set, dropped) in
                    [(value, file), (file, value), (value, TOKEN_FILE), (file, TOKEN_FILE), (TOKEN_FILE, value), (TOKEN_FILE, file)]
                {
                    if sets(set) {
                        merged.set(dropped, Setting::new(Value::from(""), Provenance::Default));
                    }
                }
            }
            merged.0.extend(layer);
        }
        merged
    }

    /// The setting of a key of the schema.
    pub(super) fn get(&self, key: &str) -> &Setting {
        self.0.get(key).expect("every key of the schema was given its default")
    }

    /// Replaces the setting of a key of the schema.
    pub(super) fn set(&mut self, key: &'static str, setting: Setting) {
        self.0.insert(key, setting);
    }
}

/// Credentials given twice within one layer, where neither wins.
fn contradictions(layer: &Layer) -> Vec<Problem> {
    let set = |key: &str| layer.get(key).filter(|setting| !setting.is_empty());
    let mut problems = Vec::new();
    let mut refuse = |key: &str, setting: &Setting, message: String| {
        problems.push(Problem { provenance: setting.provenance.clone(), key: Some(key.to_owned()), message });
    };
    for (value, file) in SLOTS {
        if let (Some(setting), Some(_)) = (set(value), set(file)) {
            refuse(value, setting, format!("given as a value and as a file; remove this or {file}"));
        }
    }
    let pair = SLOTS.into_iter().flat_map(|(value, file)| [value, file]).find(|key| set(key).is_some());
    if let (Some(setting), Some(other)) = (set(TOKEN_FILE), pair) {
        refuse(
            TOKEN_FILE,
            setting,
            format!("with a token file nothing is minted, so an email and a password have no use; remove this or {other}"),
        );
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    type Written<'a> = &'a [(&'static str, &'a str)];

    fn layer(settings: Written<'_>) -> Layer {
        settings.iter().map(|(key, value)| (*key, Setting::new(Value::from(*value), Provenance::Flag))).collect()
    }

    /// What is left of the credentials after merging.
    fn credentials(layers: &[Written<'_>]) -> Vec<String> {
        let mut problems = Vec::new();
        let settings = Settings::merge(layers.iter().map(|settings| layer(settings)), &mut problems);
        assert_eq!(problems, []);
        let keys = SLOTS.into_iter().flat_map(|(value, file)| [value, file]).chain([TOKEN_FILE]);
        keys.filter_map(|key| {
            let setting = settings.get(key);
            (!setting.is_empty()).then(|| format!("{}={}", key.trim_start_matches("credentials."), setting.value.as_str().unwrap()))
        })
        .collect()
    }

    #[test]
    fn a_higher_layer_decides_how_a_credential_is_given() {
        let rows: [(&[Written<'_>], &[&str]); 6] = [
            (&[&[("credentials.password", "a")], &[("credentials.password_file", "/b")]], &["password_file=/b"]),
            (&[&[("credentials.password_file", "/a")], &[("credentials.password", "b")]], &["password=b"]),
            (&[&[("credentials.password", "a")], &[("credentials.email_file", "/b")]], &["email_file=/b", "password=a"]),
            (&[&[("credentials.email", "a"), ("credentials.password", "a")], &[("credentials.token_file", "/t")]], &["token_file=/t"]),
            (&[&[("credentials.token_file", "/t")], &[("credentials.email", "a")]], &["email=a"]),
            (&[&[("credentials.password_file", "/a")], &[("credentials.password", "")]], &["password_file=/a"]),
        ];
        for (layers, expected) in rows {
            assert_eq!(credentials(layers), expected, "{layers:?}");
        }
    }

    #[test]
    fn within_one_layer_a_second_way_is_a_problem() {
        let rows: [(Written<'_>, &[&str]); 4] = [
            (&[("credentials.email", "a"), ("credentials.email_file", "/b")], &["credentials.email"]),
            (&[("credentials.email", "a"), ("credentials.token_file", "/b")], &["credentials.token_file"]),
            (&[("credentials.email", "a"), ("credentials.password_file", "/b")], &[]),
            (&[("credentials.email", "a"), ("credentials.email_file", "")], &[]),
        ];
        for (settings, expected) in rows {
            let problems = contradictions(&layer(settings));
            let keys: Vec<_> = problems.iter().filter_map(|problem| problem.key.as_deref()).collect();
            assert_eq!(keys, expected, "{settings:?}");
        }
    }
}
