//! Gives each content of the credentials a number, so that the state machine can compare them without seeing them.

use std::sync::Arc;

use crate::credentials::{Loaded, Pair};
use crate::token::state::CredentialsId;

/// The credentials that are still referred to. All others are dropped, and so cleared from memory.
#[derive(Debug, Default)]
pub(super) struct Identities {
    last: u64,
    known: Vec<(CredentialsId, Loaded)>,
}

impl Identities {
    /// The number of this content; the same for the same content while it is known. None where there is none.
    pub(super) fn of(&mut self, loaded: &Loaded) -> Option<CredentialsId> {
        if let Loaded::Missing { .. } = loaded {
            return None;
        }
        let known = self.known.iter_mut().find(|(_, known)| same_content(known, loaded));
        if let Some((id, known)) = known {
            *known = loaded.clone(); // where it came from may have changed
            return Some(*id);
        }
        self.last += 1;
        let id = CredentialsId(self.last);
        self.known.push((id, loaded.clone()));
        Some(id)
    }

    /// The pair of this number.
    pub(super) fn pair(&self, id: CredentialsId) -> Option<Arc<Pair>> {
        self.known.iter().find_map(|(known, loaded)| match loaded {
            Loaded::Pair(pair) if *known == id => Some(Arc::clone(pair)),
            _ => None,
        })
    }

    /// Drops the others.
    pub(super) fn keep(&mut self, is_needed: impl Fn(CredentialsId) -> bool) {
        self.known.retain(|(id, _)| is_needed(*id));
    }
}

fn same_content(one: &Loaded, other: &Loaded) -> bool {
    match (one, other) {
        (Loaded::Pair(one), Loaded::Pair(other)) => one.email == other.email && one.password == other.password,
        (Loaded::Token(one), Loaded::Token(other)) => one.token == other.token,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::credentials::FixedToken;
    use crate::secret::{Email, Password, Token};

    fn pair(email: &str, password: &str, source: &str) -> Loaded {
        Loaded::Pair(Arc::new(Pair {
            email: Email::new(email.to_owned()).unwrap(),
            password: Password::new(password.to_owned()).unwrap(),
            source: source.to_owned(),
            read_again: true,
            loaded_at: SystemTime::now(),
        }))
    }

    fn token(token: &str) -> Loaded {
        let token = Token::new(token.to_owned()).unwrap();
        Loaded::Token(Arc::new(FixedToken { token, source: "f".to_owned(), loaded_at: SystemTime::now() }))
    }

    /// C37: content alone tells credentials apart.
    #[test]
    fn c37_the_same_content_has_the_same_number() {
        let mut identities = Identities::default();
        let rows = [
            (pair("e", "p", "here"), 1),
            (pair("e", "q", "here"), 2),
            (pair("e", "p", "there"), 1),
            (pair("d", "p", "here"), 3),
            (token("p"), 4),
            (token("q"), 5),
            (token("p"), 4),
        ];
        for (loaded, expected) in rows {
            assert_eq!(identities.of(&loaded), Some(CredentialsId(expected)), "{loaded:?}");
        }
        assert_eq!(identities.of(&Loaded::Missing { reason: "empty".to_owned() }), None);
        assert_eq!(identities.pair(CredentialsId(1)).unwrap().source, "there");
        assert!(identities.pair(CredentialsId(4)).is_none());

        identities.keep(|id| id.0 == 2);
        assert_eq!(identities.known.len(), 1, "forgotten secrets are cleared");
        assert_eq!(identities.of(&pair("e", "p", "here")), Some(CredentialsId(6)));
    }
}
