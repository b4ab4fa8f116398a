//! A stored file is read as what a save wrote, or refused in words that quote nothing of it; a payload that somebody else sealed does no harm either.
#![no_main]

use libfuzzer_sys::fuzz_target;
use upsolver_auth_proxy::fuzzing::{sealed_store_file, store_file, unmasked_token};

fuzz_target!(|bytes: &[u8]| {
    match store_file(bytes) {
        Ok(written) => assert_eq!(store_file(&written).as_ref(), Ok(&written), "what is written is read"),
        Err(reason) => assert!(!reason.contains("canary") && reason.len() < 200, "{reason:?}"),
    }
    if let Some(file) = sealed_store_file(bytes) {
        assert_eq!(store_file(&file).as_ref(), Ok(&file), "what is written is read");
        let cut = &file[..file.len() / 2];
        assert!(store_file(cut).is_err(), "a cut file is noticed");
        // Whatever ranges it names, unmasking is a shift and ends.
        drop(unmasked_token(&file));
    }
});
