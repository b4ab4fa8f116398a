//! Ways into the file's format for the fuzz target `store_file`.

use std::sync::OnceLock;

use super::format;
use super::mask::{Mask, SALT_BYTES};
use crate::credentials::Pair;

/// Reads a file and writes it again.
pub(crate) fn decode(bytes: &[u8]) -> Result<Vec<u8>, String> {
    format::decode(bytes).map(format::encode)
}

/// A whole file around a payload.
pub(crate) fn seal(payload: &[u8]) -> Option<Vec<u8>> {
    serde_json::from_slice(payload).ok().map(format::encode)
}

/// Unmasks the token of a file with one mask for all inputs.
pub(crate) fn unmask(file: &[u8], pair: impl Fn() -> Pair) -> Option<String> {
    static MASK: OnceLock<Mask> = OnceLock::new();
    let mask = MASK.get_or_init(|| Mask::new(&pair(), "https://api.upsolver.com", &[7; SALT_BYTES]));
    let masked = format::decode(file).ok()?.token?.masked;
    Some(mask.unmask(&masked.text, &masked.ranges).as_str().to_owned())
}
