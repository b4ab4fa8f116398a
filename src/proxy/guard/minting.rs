//! Whether a path leads to `/api-tokens` or below, in any spelling that an upstream could take for it (contract section 4, "Guard"; matrix B16, B18).
//!
//! Nobody knows how many servers stand between here and the API, which of them decode or normalise a path, how often and in which order: one reads
//! `/api-tokens;%2f..%2fx` as `/x`, another as `/api-tokens`. So there is no one normal form to compare. Instead the path is decoded as far as it goes
//! ([`normalise`]), and then refused if any reading of its segments begins with `api-tokens` ([`begins_with_api_tokens`]); what is in doubt is refused.
//!
//! Left alone on purpose: full-width letters and other look-alikes, which no HTTP server folds to ASCII.

/// The first segment of the minting path.
const API_TOKENS: &[u8] = b"api-tokens";

/// Whether some upstream could take `path` (without the query) for `/api-tokens` or a path below it. Allocates only where there is something to decode.
pub(crate) fn is_minting_path(path: &str) -> bool {
    let path = path.as_bytes();
    if path.iter().any(|byte| matches!(byte, b'%' | b'\\' | 0x80..)) {
        begins_with_api_tokens(&normalise(path))
    } else {
        begins_with_api_tokens(path)
    }
}

/// The path decoded until nothing is left to decode, in lower case, with backslashes as slashes. Segments stay as they are.
///
/// Runs in linear time whatever the depth of the encoding: a byte that a decoding step produces is looked at again together with what stands before it,
/// so `%2525…` costs a step for each of its characters, not a pass for each of its levels.
fn normalise(path: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(path.len());
    for &byte in path {
        decoded.push(fold(byte));
        while let Some((byte, length)) = encoded_at_end(&decoded) {
            decoded.truncate(decoded.len() - length);
            decoded.push(fold(byte));
        }
    }
    decoded
}

fn fold(byte: u8) -> u8 {
    if byte == b'\\' { b'/' } else { byte.to_ascii_lowercase() }
}

/// Where `bytes`, already in lower case, end with an encoded byte: that byte, and the length of its encoding.
fn encoded_at_end(bytes: &[u8]) -> Option<(u8, usize)> {
    match *bytes {
        // `%u0061`, as IIS reads it.
        [.., b'%', b'u', b'0', b'0', high, low] => Some((hex(high)? << 4 | hex(low)?, 6)),
        [.., b'%', high, low] => Some((hex(high)? << 4 | hex(low)?, 3)),
        // Overlong UTF-8 (RFC 3629 section 3), which a lenient decoder takes for ASCII.
        [.., 0xf0, 0x80, middle @ 0x80..=0x81, last @ 0x80..=0xbf] => Some(((middle & 1) << 6 | (last & 0x3f), 4)),
        [.., 0xe0, middle @ 0x80..=0x81, last @ 0x80..=0xbf] => Some(((middle & 1) << 6 | (last & 0x3f), 3)),
        [.., first @ 0xc0..=0xc1, last @ 0x80..=0xbf] => Some(((first & 1) << 6 | (last & 0x3f), 2)),
        // The letters outside ASCII that become ASCII when their case is changed: the Kelvin sign, the long s, the dotted and the dotless i.
        [.., 0xe2, 0x84, 0xaa] => Some((b'k', 3)),
        [.., 0xc5, 0xbf] => Some((b's', 2)),
        [.., 0xc4, 0xb0 | 0xb1] => Some((b'i', 2)),
        _ => None,
    }
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

/// Whether a path without encoding has a reading whose first segment is `api-tokens`.
///
/// Segments that may vanish do not make a later one the second: empty ones and `.` always may, all before a `..` may, and behind a `;` everything may,
/// since a server that cuts parameters before it decodes cuts away slashes that were encoded.
fn begins_with_api_tokens(path: &[u8]) -> bool {
    let mut at_root = true;
    let mut in_doubt = false;
    for segment in path.split(|&byte| byte == b'/') {
        if (at_root || in_doubt) && is_api_tokens(segment) {
            return true;
        }
        at_root = match name(segment) {
            Name::Vanishes => at_root,
            Name::Parent => true,
            Name::Other => false,
        };
        in_doubt |= segment.contains(&b';');
    }
    false
}

/// Whether a server could take the segment for `api-tokens`: white space and control characters are skipped, and what follows behind one of them, behind a
/// parameter, a decoded `?` or `#`, or a suffix such as `.json` is left out.
fn is_api_tokens(segment: &[u8]) -> bool {
    let mut expected = API_TOKENS.iter();
    for &byte in segment {
        if expected.as_slice().is_empty() {
            return is_blank(byte) || ends_name(byte) || byte == b'.';
        }
        if !is_blank(byte) && expected.next() != Some(&byte.to_ascii_lowercase()) {
            return false;
        }
    }
    expected.as_slice().is_empty()
}

/// What a segment does to those before it.
enum Name {
    /// Empty or `.`: nothing.
    Vanishes,
    /// `..`: takes them away.
    Parent,
    /// Adds one.
    Other,
}

fn name(segment: &[u8]) -> Name {
    let mut dots = 0;
    for &byte in segment.iter().take_while(|&&byte| !ends_name(byte)).filter(|&&byte| !is_blank(byte)) {
        if byte != b'.' {
            return Name::Other;
        }
        dots += 1;
    }
    match dots {
        0 | 1 => Name::Vanishes,
        2 => Name::Parent,
        _ => Name::Other,
    }
}

/// What a server may strip, or take for the end of a string.
fn is_blank(byte: u8) -> bool {
    matches!(byte, 0..=0x20 | 0x7f)
}

fn ends_name(byte: u8) -> bool {
    matches!(byte, b';' | b'?' | b'#')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;

    #[test]
    fn b16_every_spelling_is_found() {
        let spellings = [
            "/api-tokens",
            "/api-tokens/",
            "/api-tokens/some-id",
            "/API-Tokens",
            "//api-tokens",
            "/./api-tokens",
            "/../api-tokens",
            "/x/../api-tokens",
            "/x/y/../../api-tokens",
            "/api-tokens/.",
            "/api-tokens/x/..",
            "/api-tokens/../x",
            "/%61pi-tokens",
            "/api%2Dtokens",
            "/api%2dtokens",
            "/api-tokens%2f",
            "/api-tokens%2f..%2fx",
            "/%2fapi-tokens",
            "/x%2f..%2fapi-tokens",
            "/a%2fb/../api-tokens",
            "/%2e%2e/api-tokens",
            "/%252e%252E/api-tokens",
            "/%25252561pi-tokens",
            "/%%361pi-tokens",
            "/%u0061pi-tokens",
            "/api-tokens%00",
            "/api-tokens%00x",
            "/%00/api-tokens",
            "/api-tokens%20",
            "/%20api-tokens",
            "/api%0d%0a-tokens",
            "/api-tokens%09x",
            "/api-tokens;x=1",
            "/api-tokens%3bx",
            "/api-tokens;%2f..%2fx",
            "/;x/api-tokens",
            "/;a%2fb/api-tokens",
            "/..;/api-tokens",
            "/x/..;a=b/api-tokens",
            "/x/.%00./api-tokens",
            "/api-tokens%3fx",
            "/api-tokens%23x",
            "/api-tokens.json",
            "/\\api-tokens",
            "\\api-tokens",
            "/x\\..\\api-tokens",
            "/x%5c..%5capi-tokens",
            "/x%c0%af..%c0%afapi-tokens",
            "/x%e0%80%af..%e0%80%afapi-tokens",
            "/x%f0%80%80%af..%f0%80%80%afapi-tokens",
            "/%c1%a1pi-tokens",
            "/%e0%81%a1pi-tokens",
            "/%f0%80%81%a1pi-tokens",
            "/api-to%e2%84%aaens",
            "/api-to\u{212a}en\u{17f}",
            "/ap\u{131}-tokens",
        ];
        for spelling in spellings {
            assert!(is_minting_path(spelling), "{spelling}");
        }
    }

    #[test]
    fn b16_other_paths_pass() {
        let paths = [
            "/",
            "",
            "/inputs",
            "/api-token",
            "/api-tokensx",
            "/api-tokens-old/",
            "/apitokens",
            "/xapi-tokens",
            "/inputs/api-tokens-list",
            "/x/api-tokens",
            "/x//api-tokens",
            "/x/./api-tokens",
            "/inputs/a%20b",
            "/inputs/a%2fapi-tokens",
            "/x%2fapi-tokens",
            "/100%",
            "/%zz/x",
            "/\u{e9}t\u{e9}",
            "/%c3%a9t%c3%a9",
            "/\u{ff41}pi-tokens",
            "/.../api-tokens",
            "/x;v=1/y",
        ];
        for path in paths {
            assert!(!is_minting_path(path), "{path}");
        }
    }

    /// An attacker's deepest encoding is decoded in one pass; level by level this would take minutes.
    #[test]
    fn b16_deep_encoding_is_decoded_in_linear_time() {
        let deep = format!("/%{}61pi-tokens", "25".repeat(4_000_000));
        assert!(is_minting_path(&deep));
    }

    /// One segment of the path, obscured in one of the ways that the module names.
    fn obscured(text: &'static str) -> impl Strategy<Value = String> {
        let letters = text.chars().map(|letter| {
            prop_oneof![
                4 => Just(letter.to_string()),
                1 => Just(letter.to_ascii_uppercase().to_string()),
                1 => (0..4_usize).prop_map(move |depth| format!("%{}{:02x}", "25".repeat(depth), letter as u32)),
                1 => Just(format!("%{:02X}", letter as u32)),
            ]
        });
        letters.collect::<Vec<_>>().prop_map(|letters| letters.concat())
    }

    fn slash() -> impl Strategy<Value = &'static str> {
        select(vec!["/", "//", "\\", "/./", "%2f", "%2F", "%252f", "%5c", "/;a=b/", "/%2e/", "/x/../", "/x/%2e%2e%2f", "/..;/", "/%00/"])
    }

    fn tail() -> impl Strategy<Value = &'static str> {
        select(vec!["", "/", "/id", "%2f", ";x=1", "%00", "%20", "/..", "/../x", "%2f..%2fx", "\\x", ";%2f..%2fx", "%3fx"])
    }

    proptest! {
        /// B16: no combination of the tricks gets through.
        #[test]
        fn b16_random_spellings_are_found(slash in slash(), name in obscured("api-tokens"), tail in tail()) {
            let path = format!("/{slash}{name}{tail}");
            prop_assert!(is_minting_path(&path), "{}", path);
        }

        /// E06: the decision does not depend on whether somebody in front decoded already, and a second normalisation changes nothing.
        #[test]
        fn b16_the_decision_is_the_same_for_the_normalised_path(path in "[/\\\\%;.a-z0-9\u{e9}\u{212a}-]{0,40}|(/|%2f|%252e|api-tokens|\\.\\.|;|%5c|%c0%af|x){0,10}") {
            let normalised = normalise(path.as_bytes());
            prop_assert_eq!(normalise(&normalised), normalised.clone());
            prop_assert_eq!(is_minting_path(&path), begins_with_api_tokens(&normalised));
        }

        /// The fast path, which does not decode, decides as the slow one.
        #[test]
        fn b16_the_fast_path_agrees_with_the_slow_one(path in "(/|\\.|api-tokens|API-tokens|;|x|\\?){0,12}") {
            prop_assert_eq!(begins_with_api_tokens(path.as_bytes()), begins_with_api_tokens(&normalise(path.as_bytes())));
        }
    }
}
