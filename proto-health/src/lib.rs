#![doc = include_str!("../README.md")]

#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "_rpc")]
pub mod codec;
pub mod grpc_health_v1;
#[cfg(feature = "_rpc")]
pub mod limits;
mod reason;
#[cfg(feature = "server")]
pub mod server;
pub mod v1;
mod words;

#[cfg(feature = "client")]
pub use client::PeerMonitor;
pub use reason::Reason;
#[cfg(feature = "server")]
pub use server::HealthRegistry;

/// The encoded `google.protobuf.FileDescriptorSet` of `node.health.v1` and its imports, for server
/// reflection. The standard's is [`grpc_health_v1::FILE_DESCRIPTOR_SET`].
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
