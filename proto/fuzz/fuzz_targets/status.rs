//! See `fuzz_targets::status`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::status::run(data));
