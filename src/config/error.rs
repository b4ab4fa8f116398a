//! What is wrong with a configuration: at which file, line and key, what is allowed, what was given. Never the value of a secret.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// How many problems are shown: the message stays within one screen (contract section 2).
const SHOWN: usize = 12;
/// Longer keys and values are cut, for the same reason. No key of the schema is as long, nor is a variable's name.
const MAX_SHOWN_CHARS: usize = 60;

/// Where a value was set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Provenance {
    /// Nowhere: the built-in default.
    Default,
    /// In the configuration file.
    File {
        /// As it was given on the command line.
        path: Arc<Path>,
        /// Counted from 1; 0 for the file as a whole.
        line: usize,
    },
    /// In the environment variable of this name.
    Environment(String),
    /// By `--set` on the command line.
    Flag,
}

impl fmt::Display for Provenance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File { path, line: 0 } => write!(f, "{}", path.display()),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Environment(name) => write!(f, "environment variable {}", shorten(name)),
            Self::Flag => f.write_str("--set"),
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Where; [`Provenance::Default`] where something is missing.
    pub provenance: Provenance,
    /// The dotted key, where it is about one.
    pub key: Option<String>,
    /// What is wrong and what to do.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.provenance != Provenance::Default {
            write!(f, "{}: ", self.provenance)?;
        }
        if let Some(key) = &self.key {
            write!(f, "{}: ", shorten(key))?;
        }
        f.write_str(&self.message)
    }
}

/// At most [`MAX_SHOWN_CHARS`] characters of `text` on one line.
pub(super) fn shorten(text: &str) -> String {
    let mut characters = text.chars().map(|character| if character.is_control() { ' ' } else { character });
    let head: String = characters.by_ref().take(MAX_SHOWN_CHARS).collect();
    if characters.next().is_some() { format!("{head}…") } else { head }
}

/// Everything that is wrong, file by line first, then environment, then flags. `Display` shows one line each and stays within one screen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// Sorts them for reading. `None` where there is none.
    pub(super) fn new(mut problems: Vec<Problem>) -> Option<Self> {
        // What is missing comes last: it is often the consequence of what comes before.
        problems.sort_by_cached_key(|problem| (problem.provenance == Provenance::Default, problem.provenance.clone()));
        problems.dedup();
        (!problems.is_empty()).then_some(Self(problems))
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.0.len();
        write!(f, "{count} problem{} in the configuration", if count == 1 { "" } else { "s" })?;
        for problem in self.0.iter().take(SHOWN) {
            write!(f, "\n  {problem}")?;
        }
        if count > SHOWN {
            write!(f, "\n  and {} more", count - SHOWN)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(provenance: Provenance, key: &str) -> Problem {
        Problem { provenance, key: Some(key.to_owned()), message: "is wrong".to_owned() }
    }

    #[test]
    fn problems_come_in_reading_order() {
        let path: Arc<Path> = Path::new("a.toml").into();
        let line = |line| Provenance::File { path: Arc::clone(&path), line };
        let problems = Problems::new(vec![
            problem(Provenance::Default, "missing"),
            problem(Provenance::Flag, "flag"),
            problem(line(10), "ten"),
            problem(Provenance::Environment("X".to_owned()), "variable"),
            problem(line(9), "nine"),
        ]);
        let expected = "5 problems in the configuration\n  a.toml:9: nine: is wrong\n  a.toml:10: ten: is wrong\n  \
                        environment variable X: variable: is wrong\n  --set: flag: is wrong\n  missing: is wrong";
        assert_eq!(problems.unwrap().to_string(), expected);
        assert_eq!(Problems::new(Vec::new()), None);
    }

    /// Keys that a person wrote may be of any length; those of the schema are shown whole, with their variables.
    #[test]
    fn long_names_are_cut() {
        let long = "x".repeat(1000);
        let text = problem(Provenance::Environment(long.clone()), &long).to_string();
        assert_eq!(text, format!("environment variable {0}…: {0}…: is wrong", "x".repeat(MAX_SHOWN_CHARS)));
        let longest = super::super::schema::KEYS.iter().map(|key| key.name.len()).max().unwrap();
        assert!(longest + "UPSOLVER_AUTH_PROXY__".len() + 2 <= MAX_SHOWN_CHARS, "{longest}");
    }

    #[test]
    fn a_screen_is_enough_for_any_number() {
        let problems = (0..1000).map(|index| problem(Provenance::Flag, &index.to_string())).collect();
        let text = Problems::new(problems).unwrap().to_string();
        assert_eq!(text.lines().count(), SHOWN + 2);
        assert!(text.ends_with("and 988 more"), "{text}");
    }
}
