//! See `fuzz_targets::ids`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::ids::run(data));
