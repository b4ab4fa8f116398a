//! Whatever `Retry-After` and `Date` say, nobody waits less than a second or more than a quarter of an hour; plain seconds within are taken as they are.
#![no_main]

use std::time::{Duration, SystemTime};

use http::HeaderValue;
use libfuzzer_sys::fuzz_target;
use upsolver_auth_proxy::fuzzing::retry_after;

/// 19 January 2038: half of all 32-bit times lie before it.
const NOW: Duration = Duration::from_secs(0x7fff_ffff);

// The value in a line of its own, then the reply's date.
fuzz_target!(|bytes: &[u8]| {
    let mut lines = bytes.splitn(2, |byte| *byte == b'\n');
    let bytes = lines.next().unwrap_or_default();
    let Ok(value) = HeaderValue::from_bytes(bytes) else { return };
    let date = lines.next().and_then(|date| HeaderValue::from_bytes(date).ok());
    let asked = retry_after(value, date, SystemTime::UNIX_EPOCH + NOW);
    assert!(asked.is_none_or(|asked| (Duration::from_secs(1)..=Duration::from_mins(15)).contains(&asked)), "{asked:?}");
    let plain = std::str::from_utf8(bytes).ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    if let Some(seconds) = plain.and_then(|text| text.parse::<u64>().ok()) {
        assert_eq!(asked, Some(Duration::from_secs(seconds.clamp(1, 900))));
    }
});
