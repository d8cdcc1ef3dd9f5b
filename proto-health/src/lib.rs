#![doc = include_str!("../README.md")]

mod reason;
pub mod v1;

pub use reason::Reason;

/// The encoded `google.protobuf.FileDescriptorSet` of `node.health.v1` and its imports, for server
/// reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
