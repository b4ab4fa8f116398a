//! The stored file as text: versioned JSON with a checksum, so that damage is noticed and never taken for a token.

use ring::digest;
use serde::{Deserialize, Serialize};

use super::mask::{Range, SALT_BYTES};

/// Of this format. A file of another version is refused, and replaced by the next save.
const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    /// SHA-256 of `payload` as it is written here. It finds bit flips; it is no secret and proves nothing about who wrote the file.
    checksum: String,
    payload: Payload,
}

/// Read before anything else: whatever another version looks like, it has one of these.
#[derive(Debug, Deserialize)]
struct Versioned {
    version: u32,
}

/// What the file says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Payload {
    /// Origin of the upstream that the token is for.
    pub(super) upstream: String,
    pub(super) token: Option<TokenEntry>,
    /// Milliseconds since the epoch.
    pub(super) attempts_unix_ms: Vec<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TokenEntry {
    pub(super) masked: Masked,
    pub(super) id: Option<String>,
    pub(super) name: String,
    /// Milliseconds since the epoch.
    pub(super) created_unix_ms: u64,
}

/// A token that only its credentials bring back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Masked {
    pub(super) text: String,
    pub(super) ranges: Vec<Range>,
    pub(super) salt: Salt,
}

/// Written as hexadecimal digits, lower case.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(super) struct Salt(pub(super) [u8; SALT_BYTES]);

impl From<Salt> for String {
    fn from(salt: Salt) -> Self {
        hex(&salt.0)
    }
}

impl TryFrom<String> for Salt {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        const PROBLEM: &str = "a salt is 32 hexadecimal digits";
        let mut salt = [0; SALT_BYTES];
        if text.len() != 2 * SALT_BYTES || !text.is_ascii() {
            return Err(PROBLEM);
        }
        for (index, byte) in salt.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|_| PROBLEM)?;
        }
        Ok(Self(salt))
    }
}

pub(super) fn encode(payload: Payload) -> Vec<u8> {
    let document = Document { version: VERSION, checksum: checksum(&payload), payload };
    let mut text = serde_json::to_vec(&document).expect("texts and numbers always serialize");
    text.push(b'\n');
    text
}

/// The error is for people and quotes nothing.
pub(super) fn decode(bytes: &[u8]) -> Result<Payload, String> {
    let damaged = |error: serde_json::Error| format!("it is damaged (line {}, column {})", error.line(), error.column());
    let Versioned { version } = serde_json::from_slice(bytes).map_err(damaged)?;
    if version != VERSION {
        return Err(format!("its format has version {version}, this program knows version {VERSION}"));
    }
    let Document { checksum: expected, payload, .. } = serde_json::from_slice(bytes).map_err(damaged)?;
    // What was read is written again: the same text comes out, or something in it was not what a save writes.
    if checksum(&payload) != expected {
        return Err("it is damaged (its checksum does not match)".to_owned());
    }
    Ok(payload)
}

fn checksum(payload: &Payload) -> String {
    let text = serde_json::to_vec(payload).expect("texts and numbers always serialize");
    hex(digest::digest(&digest::SHA256, &text).as_ref())
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]).map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn payload() -> Payload {
        let token = TokenEntry {
            masked: Masked { text: "kQ7tR2".to_owned(), ranges: Range::of("aB1"), salt: Salt([7; SALT_BYTES]) },
            id: Some("t-1".to_owned()),
            name: "a \"näme\"".to_owned(),
            created_unix_ms: 1_700_000_000_123,
        };
        Payload { upstream: "https://api.upsolver.com".to_owned(), token: Some(token), attempts_unix_ms: vec![1, u64::MAX] }
    }

    #[test]
    fn c27_what_is_written_is_read() {
        for payload in [payload(), Payload { token: None, attempts_unix_ms: Vec::new(), ..payload() }] {
            assert_eq!(decode(&encode(payload.clone())), Ok(payload));
        }
    }

    /// C27: cut anywhere, or any one bit flipped: refused, or (a flip in the white space at the end) harmless; never another content.
    #[test]
    fn c27_damage_at_every_bit_is_noticed() {
        let whole = encode(payload());
        for length in 0..whole.len() - 1 {
            decode(&whole[..length]).expect_err("a cut file");
        }
        for index in 0..whole.len() {
            for bit in 0..8 {
                let mut damaged = whole.clone();
                damaged[index] ^= 1 << bit;
                if let Ok(read) = decode(&damaged) {
                    assert_eq!((read, index), (payload(), whole.len() - 1), "bit {bit}");
                }
            }
        }
    }

    #[test]
    fn c27_another_version_is_named_whatever_else_it_holds() {
        let problem = decode(br#"{"version":7,"shape":["other"]}"#).expect_err("version 7");
        assert_eq!(problem, "its format has version 7, this program knows version 1");
    }

    proptest! {
        /// C27: any bytes are safe.
        #[test]
        fn c27_any_bytes_are_safe(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(decode(&bytes).is_err());
        }
    }
}
