//! See `fuzz_targets::answers`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::answers::run(data));
