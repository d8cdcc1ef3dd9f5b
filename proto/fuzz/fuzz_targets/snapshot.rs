//! See `fuzz_targets::snapshot`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::snapshot::run(data));
