//! Takes the settings apart key by key, and notes every problem on the way instead of stopping at the first.

use toml::Value;

use super::error::{Problem, Provenance, shorten};
use super::layer::Settings;
use super::schema::{self, Key, Secrecy};
use super::value::Checked;

/// Where a value is wrong it answers the default, so that reading goes on: the problem is noted, and nobody sees the result.
pub(super) struct Reader<'a> {
    settings: &'a Settings,
    problems: &'a mut Vec<Problem>,
    #[cfg(test)]
    pub(super) seen: std::collections::BTreeSet<&'static str>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(settings: &'a Settings, problems: &'a mut Vec<Problem>) -> Self {
        Self {
            settings,
            problems,
            #[cfg(test)]
            seen: std::collections::BTreeSet::new(),
        }
    }

    /// The value of `name`, as `check` understands it.
    pub(super) fn read<T>(&mut self, name: &'static str, check: impl Fn(&Value) -> Checked<T>) -> T {
        let key = self.key(name);
        match check(&self.settings.get(name).value) {
            Ok(value) => value,
            Err(rule) => {
                self.refuse_value(key, name.to_owned(), self.provenance(name), &rule, &self.settings.get(name).value);
                check(&key.default_value()).expect("defaults are valid; a test reads them all")
            }
        }
    }

    /// The elements of the list `name`, as `check` understands each; one string is a list of one, the empty string one of none.
    pub(super) fn read_list<T>(&mut self, name: &'static str, check: impl Fn(&Value) -> Checked<T>) -> Vec<T> {
        let key = self.key(name);
        let setting = self.settings.get(name);
        let one = std::slice::from_ref(&setting.value);
        let (items, is_list): (&[Value], bool) = match &setting.value {
            Value::Array(items) => (items, true),
            Value::String(text) if text.is_empty() => (&[], false),
            _ => (one, false),
        };
        let mut values = Vec::new();
        for (index, item) in items.iter().enumerate() {
            match check(item) {
                Ok(value) => values.push(value),
                Err(rule) => {
                    let place = if is_list { format!("{name}[{index}]") } else { name.to_owned() };
                    let provenance = match (self.provenance(name), setting.lines.get(index)) {
                        (Provenance::File { path, .. }, Some(line)) => Provenance::File { path, line: *line },
                        (provenance, _) => provenance,
                    };
                    self.refuse_value(key, place, provenance, &rule, item);
                }
            }
        }
        values
    }

    /// Notes that the value of `name`, fine in itself, does not go with the rest.
    pub(super) fn refuse(&mut self, name: &'static str, message: impl Into<String>) {
        self.problems.push(Problem { provenance: self.provenance(name), key: Some(name.to_owned()), message: message.into() });
    }

    /// Notes that something is missing from `section`.
    pub(super) fn refuse_section(&mut self, section: &str, message: &str) {
        self.problems.push(Problem { provenance: Provenance::Default, key: Some(section.to_owned()), message: message.to_owned() });
    }

    /// Whether something under `name`, a key or a section, is already known to be wrong, or may stand in a line of the file that is not TOML: what seems
    /// to be missing then is only a consequence.
    pub(super) fn has_problem_with(&self, name: &str) -> bool {
        self.problems.iter().any(|problem| match &problem.key {
            Some(key) => key.starts_with(name),
            None => matches!(problem.provenance, Provenance::File { .. }),
        })
    }

    /// Where `name` was set.
    pub(super) fn provenance(&self, name: &str) -> Provenance {
        self.settings.get(name).provenance.clone()
    }

    /// Whether `name` has another value than its default.
    pub(super) fn differs_from_default(&mut self, name: &'static str) -> bool {
        self.settings.get(name).value != self.key(name).default_value()
    }

    // `&mut` for the sake of the test that every key is asked for.
    #[cfg_attr(not(test), expect(clippy::needless_pass_by_ref_mut, clippy::unused_self, reason = "used in tests"))]
    fn key(&mut self, name: &'static str) -> &'static Key {
        #[cfg(test)]
        self.seen.insert(name);
        schema::find(name).expect("only keys of the schema are read")
    }

    fn refuse_value(&mut self, key: &Key, place: String, provenance: Provenance, rule: &str, value: &Value) {
        let message = match (key.secrecy, value) {
            (Secrecy::Secret, _) => rule.to_owned(),
            (Secrecy::Open, _) | (Secrecy::Url, Value::String(_)) => format!("{rule}, got {}", shorten(&key.display(value))),
            (Secrecy::Url, _) => format!("{rule}, got a TOML {}", value.type_str()),
        };
        self.problems.push(Problem { provenance, key: Some(place), message });
    }
}
