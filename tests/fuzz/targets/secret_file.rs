//! A secret file gives its content, but for a byte order mark and one line end, as a legal field value; or it is refused in words that quote nothing of it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use upsolver_auth_proxy::fuzzing::secret_file;

fuzz_target!(|bytes: &[u8]| {
    match secret_file(bytes) {
        Ok(value) => {
            assert!(!value.is_empty() && value.bytes().all(|byte| (0x20..0x7f).contains(&byte)), "{value:?}");
            let content = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
            let ends = [&b""[..], b"\n", b"\r\n"];
            assert!(ends.iter().any(|end| content.strip_suffix(*end) == Some(value.as_bytes())), "{value:?} from {bytes:?}");
        }
        Err(reason) => assert!(!reason.contains("canary") && reason.len() < 200, "{reason:?}"),
    }
});
