//! A mint's reply gives a token that is a legal field value, and an id that is safe in a path; or it is refused in words that quote nothing of it.
#![no_main]

use http::HeaderValue;
use libfuzzer_sys::fuzz_target;
use upsolver_auth_proxy::fuzzing::mint_reply;

/// Stands in seeds where a token would.
const CANARY: &str = "canary";

// A content type in a line of its own, or none; the body.
fuzz_target!(|bytes: &[u8]| {
    let line_end = bytes.iter().position(|byte| *byte == b'\n');
    let (content_type, body) = match line_end.map(|end| bytes.split_at(end)) {
        Some((line, rest)) if line.contains(&b'/') => (HeaderValue::from_bytes(line).ok(), &rest[1..]),
        _ => (None, bytes),
    };
    match mint_reply(content_type, body) {
        Ok((token, id)) => {
            assert!((1..=4096).contains(&token.len()) && token.bytes().all(|byte| (0x20..0x7f).contains(&byte)), "{token:?}");
            assert_eq!(token.trim(), token);
            if let Some(id) = id {
                assert!(!id.is_empty() && id != "." && id != "..", "{id:?}");
                assert!(id.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)), "{id:?}");
            }
        }
        Err(reason) => {
            assert!(!reason.contains(CANARY) && !reason.contains(|character: char| character.is_control()), "{reason:?}");
            assert!(reason.len() < 200, "{reason:?}");
        }
    }
});
