//! MigrationService (`node.migration.v1`): Migrating slot ranges between the nodes of a sharded store under live writes: messages, client and server.

pub mod v1;

/// The encoded `google.protobuf.FileDescriptorSet` of `node.migration.v1` and its imports, for server
/// reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
