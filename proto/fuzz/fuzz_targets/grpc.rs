//! See `fuzz_targets::grpc`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz_targets::grpc::run(data));
