#![doc = include_str!("../README.md")]

mod reason;
mod spec;
mod state;
pub mod v1;

pub use reason::Reason;
pub use spec::{MAX_VALUE_FORMAT_LEN, MigrationSpec};

/// The encoded `google.protobuf.FileDescriptorSet` of `node.migration.v1` and its imports, for server
/// reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
