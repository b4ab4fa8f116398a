//! Email, password, token and the authorization value made from it: types that cannot be printed, serialized or sent by accident.
//!
//! Each is a newtype without `Display`, `Serialize`, `Deref` or a public field; `Debug` prints the type's name. The bytes are reached only through
//! `expose`, which is private to the crate and used in three places: the mint request, the making of the authorization value, the token store.
//! Memory is cleared on drop. The one exception is [`AuthorizationValue`]: an `http::HeaderValue` shares its bytes by reference count and offers no
//! way to clear them.
//!
//! ```compile_fail
//! let password = upsolver_auth_proxy::secret::Password::new("x".to_owned()).unwrap();
//! println!("{password}"); // no Display
//! ```
//! ```compile_fail
//! let token = upsolver_auth_proxy::secret::Token::new("x".to_owned()).unwrap();
//! serde_json::to_string(&token).unwrap(); // no Serialize
//! ```
//! ```compile_fail
//! let email = upsolver_auth_proxy::secret::Email::new("x".to_owned()).unwrap();
//! let text: &str = &email; // no Deref
//! ```
//! ```compile_fail
//! let token = upsolver_auth_proxy::secret::Token::new("x".to_owned()).unwrap();
//! println!("{}", upsolver_auth_proxy::secret::AuthorizationValue::new(&token)); // no Display
//! ```
//! ```compile_fail
//! let password = upsolver_auth_proxy::secret::Password::new("x".to_owned()).unwrap();
//! password.expose(); // private to the crate
//! ```

use std::fmt;

use http::HeaderValue;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// The longest secret that is accepted, in bytes. Upsolver's tokens have 32 characters; this leaves room and keeps request heads bounded.
pub const MAX_SECRET_BYTES: usize = 4096;

macro_rules! secret {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
        pub struct $name(String);

        impl $name {
            /// Takes a value that can be sent as an HTTP field value (RFC 9110 section 5.5). A refused value is cleared.
            pub fn new(value: String) -> Result<Self, InvalidSecret> {
                let value = Zeroizing::new(value);
                check(&value)?;
                Ok(Self(value.as_str().to_owned()))
            }

            /// The bytes themselves. Every caller is one of the three places that the module names.
            pub(crate) fn expose(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "([redacted])"))
            }
        }
    };
}

secret!(
    /// The email that mints tokens.
    Email
);
secret!(
    /// The password that mints tokens.
    Password
);
secret!(
    /// An API token, as `POST /api-tokens/` returned it or as a person made it in the UI.
    Token
);

/// The finished `authorization` value of a token: made once, marked sensitive, cloned by reference count for each request.
#[derive(Clone, PartialEq, Eq)]
pub struct AuthorizationValue(HeaderValue);

impl AuthorizationValue {
    /// The raw token, with no scheme word in front (Upsolver REST API, "Using the API token").
    pub fn new(token: &Token) -> Self {
        let mut value = HeaderValue::from_str(token.expose()).expect("a Token is a legal field value by construction");
        // HPACK sends a sensitive value as a never-indexed literal (RFC 7541 section 7.1.3), and `Debug` hides it.
        value.set_sensitive(true);
        Self(value)
    }

    /// The value to put into a request to the upstream.
    pub(crate) fn header(&self) -> HeaderValue {
        self.0.clone()
    }

    /// Whether `value` contains the token: such a response field must not reach the downstream.
    pub(crate) fn is_in(&self, value: &[u8]) -> bool {
        let token = self.0.as_bytes();
        // The first byte rules nearly every place out without a call to compare memory: this runs over every field of every response.
        value.windows(token.len()).any(|window| window[0] == token[0] && window == token)
    }
}

impl fmt::Debug for AuthorizationValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AuthorizationValue([redacted])")
    }
}

/// Why a value cannot be a secret. Never quotes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSecret {
    /// Nothing there.
    #[error("it is empty")]
    Empty,
    /// Over [`MAX_SECRET_BYTES`].
    #[error("it is longer than {MAX_SECRET_BYTES} bytes")]
    TooLong,
    /// HTTP strips white space around a field value, so the upstream would see another secret.
    #[error("it begins or ends with white space, which an HTTP header cannot carry")]
    OuterWhitespace,
    /// A control character or a character outside ASCII, which a field value cannot carry unchanged.
    #[error("it contains a control character or a character outside ASCII, which an HTTP header cannot carry")]
    IllegalCharacter,
}

fn check(value: &str) -> Result<(), InvalidSecret> {
    if value.is_empty() {
        return Err(InvalidSecret::Empty);
    }
    if value.len() > MAX_SECRET_BYTES {
        return Err(InvalidSecret::TooLong);
    }
    if !value.bytes().all(|byte| matches!(byte, 0x20..=0x7e)) {
        return Err(InvalidSecret::IllegalCharacter);
    }
    if value.starts_with(' ') || value.ends_with(' ') {
        return Err(InvalidSecret::OuterWhitespace);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C13, C33: what a header cannot carry is refused, inner spaces are kept.
    #[test]
    fn c13_only_legal_field_values_become_secrets() {
        let rows = [
            ("abc123", None),
            ("two words", None),
            ("", Some(InvalidSecret::Empty)),
            (" a", Some(InvalidSecret::OuterWhitespace)),
            ("a ", Some(InvalidSecret::OuterWhitespace)),
            ("a\rb", Some(InvalidSecret::IllegalCharacter)),
            ("a\nb", Some(InvalidSecret::IllegalCharacter)),
            ("a\0b", Some(InvalidSecret::IllegalCharacter)),
            ("a\tb", Some(InvalidSecret::IllegalCharacter)),
            ("pässword", Some(InvalidSecret::IllegalCharacter)),
        ];
        for (value, expected) in rows {
            assert_eq!(Password::new(value.to_owned()).err(), expected, "{value:?}");
        }
        assert_eq!(Token::new("a".repeat(MAX_SECRET_BYTES + 1)).err(), Some(InvalidSecret::TooLong));
    }

    /// B37: `Debug` shows a fixed mask, for the authorization value too.
    #[test]
    fn b37_debug_prints_a_mask() {
        let token = Token::new("canary".to_owned()).unwrap();
        let authorization = AuthorizationValue::new(&token);
        assert_eq!(format!("{token:?} {authorization:?}"), "Token([redacted]) AuthorizationValue([redacted])");
        assert_eq!(format!("{:?}", authorization.header()), "Sensitive");
    }

    /// B44: dropped, they are cleared; and no one can be copied without being asked for.
    #[test]
    fn b44_secrets_are_cleared_on_drop() {
        fn cleared<T: ZeroizeOnDrop>() {
            assert!(std::mem::needs_drop::<T>());
        }
        cleared::<Email>();
        cleared::<Password>();
        cleared::<Token>();
        let mut password = Password::new("canary".to_owned()).unwrap();
        password.zeroize();
        assert_eq!(password.expose(), "");
    }

    #[test]
    fn finds_the_token_inside_a_value() {
        let authorization = AuthorizationValue::new(&Token::new("canary".to_owned()).unwrap());
        assert!(authorization.is_in(b"x canary y") && authorization.is_in(b"canary"));
        assert!(!authorization.is_in(b"canar") && !authorization.is_in(b""));
    }
}
