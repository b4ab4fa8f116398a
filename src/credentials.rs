//! Reads the credentials as one consistent pair, watches their files, publishes changes.

use std::sync::Arc;
use std::time::SystemTime;

use crate::secret::{Email, Password, Token};

/// What the token task works with; published on a watch channel, last good kept.
#[derive(Debug, Clone)]
pub enum Loaded {
    /// Nothing usable has been read yet; the reason is for people and quotes no secret.
    Missing {
        /// E.g. `/var/run/secrets/upsolver/password: is empty`.
        reason: String,
    },
    /// Email and password, read as one pair.
    Pair(Arc<Pair>),
    /// A token made in the UI.
    Token(Arc<FixedToken>),
}

/// Email and password.
#[derive(Debug)]
pub struct Pair {
    /// The email.
    pub email: Email,
    /// The password.
    pub password: Password,
    /// Where they came from, for people.
    pub source: String,
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
