//! Reads the credentials as one consistent pair, watches their files, publishes changes.
//!
//! [`read`] looks once: are the files there, do email and password belong together, can they be sent? [`Watch`] looks again and again, and decides
//! what is published: the last good credentials stay in force whatever happens to the files.
//!
//! What a newcomer would get wrong: a change is found by content alone. Modification times lie (a restored backup, a `touch`, two writes within
//! one tick of the clock), and file events get lost; both only tell *when* to look.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use crate::config::{CredentialsSource, Source};
use crate::secret::{Email, InvalidSecret, Password, Token};

mod events;
mod file;
mod settle;
mod volume;
mod watch;

#[cfg(fuzzing)]
pub(crate) use file::text as secret_text;
use volume::Resolver;
pub use watch::Watch;

/// What the token task works with; published on a watch channel, last good kept.
#[derive(Debug, Clone)]
pub enum Loaded {
    /// Nothing usable has been read yet; the reason is for people and quotes no secret.
    Missing {
        /// E.g. `/var/run/secrets/upsolver/password: it is empty`.
        reason: String,
    },
    /// Email and password, read as one pair.
    Pair(Arc<Pair>),
    /// A token made in the UI.
    Token(Arc<FixedToken>),
}

/// Email and password.
#[derive(Debug, Clone)]
pub struct Pair {
    /// The email.
    pub email: Email,
    /// The password.
    pub password: Password,
    /// Where they came from, for people.
    pub source: String,
    /// Whether both came from files: then a correction is found without a restart.
    pub read_again: bool,
    /// When they were read.
    pub loaded_at: SystemTime,
}

/// The content of `credentials.token_file`.
#[derive(Debug)]
pub struct FixedToken {
    /// The token.
    pub token: Token,
    /// Where it came from, for people.
    pub source: String,
    /// When it was read.
    pub loaded_at: SystemTime,
}

/// Reads the credentials once. Blocks on files; never on a FIFO or a device, but a dead network mount can hold it up for as long as it likes.
pub fn read(source: &CredentialsSource) -> Loaded {
    match Reading::take(source).content {
        Ok(content) => content.into_loaded(source, SystemTime::now()),
        Err(reason) => Loaded::Missing { reason },
    }
}

/// Reads one secret from a file of its own, as the credentials are read: the same limits, the same line end taken off. The error names the file.
pub(crate) fn read_secret<T>(path: &Path, new: fn(String) -> Result<T, InvalidSecret>) -> Result<T, String> {
    file::read(path, &Resolver::default(), new)
}

/// Names the files or variables that the credentials come from, for messages.
pub(crate) fn describe(source: &CredentialsSource) -> String {
    fn name<T>(source: &Source<T>) -> String {
        match source {
            Source::Value { origin, .. } => origin.clone(),
            Source::File(path) => path.display().to_string(),
        }
    }
    match source {
        CredentialsSource::Unconfigured => "no credentials are configured".to_owned(),
        CredentialsSource::TokenFile(path) => path.display().to_string(),
        CredentialsSource::Pair { email, password } => {
            let (email, password) = (name(email), name(password));
            if email == password { email } else { format!("{email} and {password}") }
        }
    }
}

/// Whether all of it comes from files. A value, from the configuration or the environment, is read at the start alone.
fn is_read_again(source: &CredentialsSource) -> bool {
    match source {
        CredentialsSource::Unconfigured => false,
        CredentialsSource::TokenFile(_) => true,
        CredentialsSource::Pair { email, password } => matches!((email, password), (Source::File(_), Source::File(_))),
    }
}

/// The files that the credentials come from; none where both are values.
fn files(source: &CredentialsSource) -> Vec<&Path> {
    fn file<T>(source: &Source<T>) -> Option<&Path> {
        match source {
            Source::Value { .. } => None,
            Source::File(path) => Some(path),
        }
    }
    match source {
        CredentialsSource::Unconfigured => Vec::new(),
        CredentialsSource::TokenFile(path) => vec![path],
        CredentialsSource::Pair { email, password } => file(email).into_iter().chain(file(password)).collect(),
    }
}

/// The secrets themselves; two readings are compared by them.
#[derive(Debug, Clone, PartialEq)]
enum Content {
    Pair { email: Email, password: Password },
    Token(Token),
}

impl Content {
    fn into_loaded(self, source: &CredentialsSource, loaded_at: SystemTime) -> Loaded {
        let (read_again, source) = (is_read_again(source), describe(source));
        match self {
            Self::Pair { email, password } => Loaded::Pair(Arc::new(Pair { email, password, source, read_again, loaded_at })),
            Self::Token(token) => Loaded::Token(Arc::new(FixedToken { token, source, loaded_at })),
        }
    }
}

/// What one look at the source gave.
#[derive(Debug, Clone, PartialEq)]
struct Reading {
    /// The reason names file and problem, never the value.
    content: Result<Content, String>,
    /// The files came out of one directory that is only ever replaced as a whole: nobody can have been in the middle of writing them.
    atomic: bool,
}

impl Reading {
    fn take(source: &CredentialsSource) -> Self {
        let (content, atomic) = volume::consistently(&files(source), |resolver| read_content(source, resolver));
        Self { content, atomic }
    }
}

fn read_content(source: &CredentialsSource, resolver: &Resolver) -> Result<Content, String> {
    match source {
        CredentialsSource::Unconfigured => Err("no credentials are configured".to_owned()),
        CredentialsSource::TokenFile(path) => file::read(path, resolver, Token::new).map(Content::Token),
        CredentialsSource::Pair { email, password } => {
            let email = match email {
                Source::Value { value, .. } => Ok(value.clone()),
                Source::File(path) => file::read(path, resolver, Email::new),
            };
            let password = match password {
                Source::Value { value, .. } => Ok(value.clone()),
                Source::File(path) => file::read(path, resolver, Password::new),
            };
            match (email, password) {
                (Ok(email), Ok(password)) => Ok(Content::Pair { email, password }),
                // Whoever mends one file wants to know of the other too.
                (Err(first), Err(second)) => Err(format!("{first}; {second}")),
                (Err(reason), Ok(_)) | (Ok(_), Err(reason)) => Err(reason),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    fn pair_of(email: PathBuf, password: PathBuf) -> CredentialsSource {
        CredentialsSource::Pair { email: Source::File(email), password: Source::File(password) }
    }

    /// C33, C49: what is read tells where it came from; secrets do not show.
    #[test]
    fn c49_a_pair_and_a_fixed_token_name_their_files() {
        let directory = tempfile::tempdir().unwrap();
        let [email, password, token] = ["email", "password", "token"].map(|name| directory.path().join(name));
        fs::write(&email, "me@example.com\n").unwrap();
        fs::write(&password, "canary\r\n").unwrap();
        fs::write(&token, "\u{feff}canary").unwrap();
        let Loaded::Pair(pair) = read(&pair_of(email.clone(), password.clone())) else { panic!("both files are good") };
        assert_eq!((pair.email.expose(), pair.password.expose()), ("me@example.com", "canary"));
        assert_eq!((&pair.source, pair.read_again), (&format!("{} and {}", email.display(), password.display()), true));
        let Loaded::Token(fixed) = read(&CredentialsSource::TokenFile(token.clone())) else { panic!("the file is good") };
        assert_eq!((fixed.token.expose(), fixed.source.as_str()), ("canary", token.display().to_string().as_str()));
        let shown = format!("{:?} {:?}", Loaded::Pair(pair), Loaded::Token(fixed));
        assert!(!shown.contains("canary") && !shown.contains("example.com"), "{shown}");
    }

    /// Half a correction would be found.
    #[test]
    fn a_value_beside_a_file_needs_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("password");
        fs::write(&file, "secret").unwrap();
        let email = Source::Value { value: Email::new("me@example.com".to_owned()).unwrap(), origin: "UPSOLVER_EMAIL".to_owned() };
        let Loaded::Pair(pair) = read(&CredentialsSource::Pair { email, password: Source::File(file) }) else { panic!("both are good") };
        assert!(!pair.read_again);
    }

    /// C34: one message for both files, so that one look at the log is enough.
    #[test]
    fn c34_two_bad_files_are_both_named() {
        let directory = tempfile::tempdir().unwrap();
        let [email, password] = ["email", "password"].map(|name| directory.path().join(name));
        fs::write(&password, "").unwrap();
        let Loaded::Missing { reason } = read(&pair_of(email, password)) else { panic!("nothing usable is there") };
        assert!(reason.contains("email: No such file") && reason.ends_with("password: it is empty"), "{reason}");
    }
}
