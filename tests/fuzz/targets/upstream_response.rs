//! Whatever the upstream sends, in whatever pieces: one response comes of it or an error, the same as if it had come at once, with no more body than its framing
//! says; and nothing behind it is lost or made up.
#![no_main]

use http::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use libfuzzer_sys::fuzz_target;
use upsolver_auth_proxy::fuzzing::{UpstreamResponse, upstream_response};

// The request was a HEAD where the first byte is odd; how many bytes come at a time; what comes.
fuzz_target!(|bytes: &[u8]| {
    let [first, step, bytes @ ..] = bytes else { return };
    let to_head = first % 2 == 1;
    let at_once = upstream_response(to_head, [bytes]);
    // Each piece makes an unfinished head be read again from its start: byte by byte, long inputs would take all the time.
    let step = usize::from(*step).max(bytes.len() / 256).max(1);
    let in_pieces = upstream_response(to_head, bytes.chunks(step));
    assert_eq!(at_once, in_pieces);

    let Ok(Some(UpstreamResponse { status, headers, body, trailers, leftover, ended, reusable })) = at_once else { return };
    assert!(body.len() + leftover.len() < bytes.len());
    assert!(bytes.ends_with(&leftover));
    let length = headers.get(CONTENT_LENGTH).map(|value| value.to_str().expect("digits").parse::<u64>().expect("a number"));
    let chunked = headers.contains_key(TRANSFER_ENCODING);
    assert!(!(chunked && length.is_some()), "two framings");
    if to_head || matches!(status, 100..200 | 204 | 304) {
        assert!(ended && body.is_empty() && trailers.is_none());
        assert!(!reusable || status != 204 || !(chunked || length.is_some_and(|length| length > 0)));
    } else if let Some(length) = length {
        assert!(body.len() as u64 <= length && ended == (body.len() as u64 == length));
    } else if !chunked {
        assert!(!ended && !reusable && leftover.is_empty(), "it has no end but the connection's");
    }
    assert!(chunked || trailers.is_none());
    assert!(status != 101 || !reusable);
});
