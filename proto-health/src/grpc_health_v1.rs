//! The standard protocol: generated from `standard/grpc/health/v1/health.proto`.

#[allow(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::restriction
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/grpc.health.v1.rs"));
}

pub use generated::*;

/// The encoded `google.protobuf.FileDescriptorSet` of `grpc.health.v1`, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/standard.bin"));
