//! Messages and building blocks that the node-to-node protocol crates share.

#[cfg(feature = "codegen")]
pub mod codegen;
pub mod v1;

/// The encoded `google.protobuf.FileDescriptorSet` of `node.common.v1`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
