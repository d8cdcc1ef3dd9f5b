#![doc = include_str!("../README.md")]

#[cfg(feature = "server")]
mod bulk;
#[cfg(feature = "server")]
pub mod decisions;
#[cfg(feature = "_rpc")]
pub mod digest;
#[cfg(all(feature = "client", feature = "server"))]
pub mod driver;
#[cfg(feature = "_rpc")]
pub mod entry;
#[cfg(feature = "server")]
mod failpoint;
#[cfg(feature = "server")]
pub mod hold;
#[cfg(feature = "server")]
pub mod journal;
#[cfg(feature = "_rpc")]
pub mod limits;
#[cfg(feature = "server")]
pub mod migrations;
#[cfg(feature = "server")]
mod progress;
mod reason;
#[cfg(feature = "server")]
pub mod receiver;
#[cfg(feature = "server")]
mod sealed;
#[cfg(feature = "server")]
pub mod service;
#[cfg(all(feature = "client", feature = "server"))]
pub mod source;
mod spec;
mod state;
#[cfg(feature = "server")]
pub mod target;
pub mod v1;

#[cfg(feature = "server")]
pub use decisions::Decisions;
#[cfg(all(feature = "client", feature = "server"))]
pub use driver::MigrationDriver;
#[cfg(feature = "server")]
pub use receiver::MigrationReceiver;
#[cfg(all(feature = "client", feature = "server"))]
pub use source::MigrationSource;
#[cfg(feature = "server")]
pub use target::MigrationTarget;

pub use reason::Reason;
pub use spec::{MAX_VALUE_FORMAT_LEN, MigrationSpec};

/// The encoded `google.protobuf.FileDescriptorSet` of `node.migration.v1` and its imports, for server
/// reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
