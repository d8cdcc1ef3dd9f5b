//! See `fuzz_targets::migration`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::migration::run(data));
