//! Hides a token so that only its credentials bring it back, and so that the file tells nobody whether a guess at those credentials is right.
//!
//! The obvious ways do not hold. A digest of email and password beside the token, however slow and salted, is a verifier: who copies the file can try
//! passwords against it, offline, for ever. Encryption with a key made from the password is one as well: a wrong key is noticed, by a failed tag or by
//! nonsense in the place of the token. An upstream's password is worth more than the token, so the file must not be the way to it.
//!
//! So there is nothing here by which a right key differs from a wrong one:
//!
//! - A key is derived from email, password and upstream (PBKDF2-HMAC-SHA256 with a salt of its own for each token).
//! - Each character of the token is shifted inside its own range (`0-9`, `a-z`, `A-Z`, or the narrower `2-7`, `a-f`, `A-F` where all of the token's characters
//!   of that kind lie in it) by an unbiased stream of numbers from that key. Other characters stay. The ranges stand in the file: they say no more than the
//!   look of any token of this upstream.
//! - Unmasking with *any* credentials gives a token of the same look, one as likely as the other. The file's checksum covers the masked form alone.
//! - One token has one masked form for ever ([`super::file`] sees to it). Two copies of the file with two forms of it would betray the credentials: the right
//!   guess, and no other, unmasks both to the same token.
//!
//! Whether a guess is right therefore only the upstream can tell, one request for each guess, as at its own login. The price is that the proxy itself does
//! not know either: a stored token is probed once before its first use, and one that is dead was revoked or belongs to other credentials.
//!
//! What this does not give. It holds as far as tokens are random: a token with a fixed beginning, or one with structure (a JWT, the version digit of a UUID),
//! lets wrong guesses be sorted out, and so does knowing the token from elsewhere. (A guess that gives a token which would have called for narrower ranges
//! can always be sorted out; these are few.) For such cases there are the iterations, which make each guess cost some ten milliseconds. And it is no
//! protection against who has both file and password, for whom the token is no secret.

use std::num::NonZeroU32;

use ring::{hmac, pbkdf2};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::credentials::Pair;

/// Part of the file's format: another number is another version. (A fuzzer's build is too slow to wait for that.)
const ITERATIONS: NonZeroU32 = NonZeroU32::new(if cfg!(fuzzing) { 1 } else { 100_000 }).expect("it is not zero");
const KEY_BYTES: usize = 32;
/// Of the random salt, in bytes (NIST SP 800-132 section 5.1 asks for 16).
pub(super) const SALT_BYTES: usize = 16;

/// Characters that are shifted among themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Range {
    #[serde(rename = "2-7")]
    Base32Digits,
    #[serde(rename = "0-9")]
    Digits,
    #[serde(rename = "a-f")]
    LowerHex,
    #[serde(rename = "a-z")]
    Lower,
    #[serde(rename = "A-F")]
    UpperHex,
    #[serde(rename = "A-Z")]
    Upper,
}

impl Range {
    /// Each kind of character: the narrow range and the whole one.
    const KINDS: [(Self, Self); 3] = [(Self::Base32Digits, Self::Digits), (Self::LowerHex, Self::Lower), (Self::UpperHex, Self::Upper)];

    fn bounds(self) -> (u8, u8) {
        match self {
            Self::Base32Digits => (b'2', b'7'),
            Self::Digits => (b'0', b'9'),
            Self::LowerHex => (b'a', b'f'),
            Self::Lower => (b'a', b'z'),
            Self::UpperHex => (b'A', b'F'),
            Self::Upper => (b'A', b'Z'),
        }
    }

    fn contains(self, byte: u8) -> bool {
        let (first, last) = self.bounds();
        (first..=last).contains(&byte)
    }

    /// The ranges in which this token's characters are shifted.
    ///
    /// Were a token of hexadecimal digits shifted over the whole alphabet, each wrong guess would show by a letter beyond `f`.
    pub(super) fn of(token: &str) -> Vec<Self> {
        let fits = |narrow: Self, whole: Self| token.bytes().filter(|byte| whole.contains(*byte)).all(|byte| narrow.contains(byte));
        Self::KINDS.into_iter().map(|(narrow, whole)| if fits(narrow, whole) { narrow } else { whole }).collect()
    }
}

/// What masks and unmasks: made from credentials, upstream and salt.
pub(super) struct Mask(hmac::Key);

impl Mask {
    /// Computes for some ten milliseconds.
    pub(super) fn new(pair: &Pair, upstream: &str, salt: &[u8; SALT_BYTES]) -> Self {
        // The lengths keep the parts apart: `a` and `bc` give another key than `ab` and `c`.
        let mut secret = Zeroizing::new(Vec::with_capacity(16 + pair.email.expose().len() + pair.password.expose().len()));
        for part in [pair.email.expose(), pair.password.expose()] {
            secret.extend_from_slice(&(part.len() as u64).to_be_bytes());
            secret.extend_from_slice(part.as_bytes());
        }
        let salt = [salt.as_slice(), upstream.as_bytes()].concat();
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, ITERATIONS, &salt, &secret, key.as_mut_slice());
        Self(hmac::Key::new(hmac::HMAC_SHA256, key.as_slice()))
    }

    /// Hides `token`, whose characters are shifted in `ranges`.
    pub(super) fn mask(&self, token: &str, ranges: &[Range]) -> String {
        self.shift(token, ranges, |position, shift, size| (position + shift) % size)
    }

    /// Undoes [`mask`](Self::mask), where this is the same mask; else gives another token of the same look.
    pub(super) fn unmask(&self, masked: &str, ranges: &[Range]) -> Zeroizing<String> {
        Zeroizing::new(self.shift(masked, ranges, |position, shift, size| (position + size - shift) % size))
    }

    /// A shifted character stays in its range, so both directions draw the same numbers.
    fn shift(&self, text: &str, ranges: &[Range], moved: impl Fn(u8, u8, u8) -> u8) -> String {
        let mut stream = Stream::new(&self.0);
        let shifted = text.chars().map(|character| {
            let range = u8::try_from(character).ok().and_then(|byte| Some((byte, *ranges.iter().find(|range| range.contains(byte))?)));
            let Some((byte, range)) = range else { return character };
            let (first, last) = range.bounds();
            let size = last - first + 1;
            char::from(first + moved(byte - first, stream.below(size), size))
        });
        let mut result = String::with_capacity(text.len());
        result.extend(shifted);
        result
    }
}

/// Numbers from a key: HMAC-SHA256 of a counter, byte by byte.
struct Stream<'a> {
    key: &'a hmac::Key,
    blocks: u64,
    block: Option<hmac::Tag>,
    used: usize,
}

impl<'a> Stream<'a> {
    fn new(key: &'a hmac::Key) -> Self {
        Self { key, blocks: 0, block: None, used: 0 }
    }

    fn next(&mut self) -> u8 {
        loop {
            if let Some(byte) = self.block.as_ref().and_then(|block| block.as_ref().get(self.used)) {
                self.used += 1;
                return *byte;
            }
            self.block = Some(hmac::sign(self.key, &self.blocks.to_be_bytes()));
            self.blocks += 1;
            self.used = 0;
        }
    }

    /// Evenly from 0 to `size` - 1: bytes beyond the last whole multiple of `size` are left out, for they would make small numbers likelier.
    fn below(&mut self, size: u8) -> u8 {
        let multiples = 256 / u16::from(size) * u16::from(size);
        loop {
            let byte = self.next();
            if u16::from(byte) < multiples {
                return byte % size;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::secret::{Email, Password};

    const SALT: [u8; SALT_BYTES] = *b"0123456789abcdef";
    const UPSTREAM: &str = "https://api.upsolver.com";

    fn pair(email: &str, password: &str) -> Pair {
        Pair {
            email: Email::new(email.to_owned()).unwrap(),
            password: Password::new(password.to_owned()).unwrap(),
            source: "a test".to_owned(),
            read_again: true,
            loaded_at: SystemTime::now(),
        }
    }

    fn look(token: &str) -> String {
        let kind = |character: char| match character {
            '0'..='9' => '9',
            'a'..='z' => 'a',
            'A'..='Z' => 'A',
            other => other,
        };
        token.chars().map(kind).collect()
    }

    #[test]
    fn c30_only_the_same_credentials_upstream_and_salt_bring_a_token_back() {
        let token = "aZ09-kQ7_tR2.mmmmmMMMMM0123456789";
        let ranges = Range::of(token);
        let mask = Mask::new(&pair("ab", "c"), UPSTREAM, &SALT);
        let masked = mask.mask(token, &ranges);
        assert_eq!(mask.unmask(&masked, &ranges).as_str(), token);
        assert_ne!(masked, token);
        let others = [
            Mask::new(&pair("ab", "d"), UPSTREAM, &SALT),
            Mask::new(&pair("a", "bc"), UPSTREAM, &SALT),
            Mask::new(&pair("ab", "c"), "https://other.example", &SALT),
            Mask::new(&pair("ab", "c"), UPSTREAM, &[0; SALT_BYTES]),
        ];
        for other in others {
            let unmasked = other.unmask(&masked, &ranges);
            assert_ne!(unmasked.as_str(), token);
            assert_eq!(look(&unmasked), look(token), "nothing tells that it is another one");
            assert_eq!(Range::of(&unmasked), ranges);
        }
    }

    #[test]
    fn c30_ranges_fit_the_token_so_that_no_wrong_guess_stands_out() {
        use Range::{Base32Digits, Digits, Lower, LowerHex, Upper, UpperHex};
        let rows = [
            ("0123456789abcdef", [Digits, LowerHex, UpperHex]),
            ("0123456789ABCDEF", [Digits, LowerHex, UpperHex]),
            ("ABCXYZ234567", [Base32Digits, LowerHex, Upper]),
            ("0aA9zZ", [Digits, Lower, Upper]),
            ("-_.", [Base32Digits, LowerHex, UpperHex]),
        ];
        for (token, expected) in rows {
            assert_eq!(Range::of(token), expected, "{token}");
        }
        let hex = "0123456789abcdef".repeat(4);
        let ranges = Range::of(&hex);
        let masked = Mask::new(&pair("a", "b"), UPSTREAM, &SALT).mask(&hex, &ranges);
        let guessed = Mask::new(&pair("a", "wrong"), UPSTREAM, &SALT).unmask(&masked, &ranges);
        assert!(guessed.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)), "{guessed:?}");
    }

    /// Each shift is as likely as any other: over many draws none is off by more than chance allows.
    #[test]
    fn c30_shifts_are_even() {
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"a test");
        let mut stream = Stream::new(&key);
        for size in [6_u8, 10, 26] {
            let draws = 260_000;
            let mut counts = vec![0_u32; usize::from(size)];
            for _ in 0..draws {
                counts[usize::from(stream.below(size))] += 1;
            }
            let expected = f64::from(draws) / f64::from(size);
            let worst = counts.iter().map(|count| (f64::from(*count) - expected).abs() / expected).fold(0.0, f64::max);
            assert!(worst < 0.05, "range of {size}: {counts:?}");
        }
    }

    #[test]
    fn what_is_no_letter_or_digit_stays() {
        let mask = Mask::new(&pair("a", "b"), UPSTREAM, &SALT);
        let token = "~!\" ü€";
        assert_eq!(mask.mask(token, &Range::of(token)), token);
    }
}
