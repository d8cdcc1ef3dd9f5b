//! See `fuzz_targets::staging`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::staging::run(data));
