//! HealthService (`node.health.v1`): Health and status between the nodes of a sharded store: messages, client and server.

pub mod v1;

/// The encoded `google.protobuf.FileDescriptorSet` of `node.health.v1` and its imports, for server
/// reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
