#![doc = include_str!("../README.md")]

#[cfg(any(feature = "client", feature = "server"))]
mod books;
#[cfg(any(feature = "client", feature = "server"))]
mod bulk;
#[cfg(feature = "_rpc")]
pub mod extent;
#[cfg(feature = "server")]
pub mod hook;
#[cfg(feature = "_rpc")]
pub mod limits;
#[cfg(any(feature = "client", feature = "server"))]
mod memory;
pub mod reason;
#[cfg(feature = "server")]
pub mod receiver;
#[cfg(feature = "_rpc")]
mod runs;
#[cfg(feature = "client")]
pub mod sender;
#[cfg(feature = "client")]
pub mod source;
pub mod spec;
#[cfg(feature = "server")]
pub mod store;
#[cfg(any(feature = "client", feature = "server"))]
pub mod transfers;
pub mod v1;

pub use reason::Reason;
#[cfg(feature = "server")]
pub use receiver::SnapshotReceiver;
#[cfg(feature = "client")]
pub use sender::SnapshotSender;
#[cfg(feature = "client")]
pub use source::{DirectorySource, FileSource, SnapshotSource, StreamSource};
#[cfg(feature = "server")]
pub use store::{FileSnapshotStore, SnapshotStore};

/// The encoded `google.protobuf.FileDescriptorSet` of `node.snapshot.v1` and its imports, for server
/// reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
