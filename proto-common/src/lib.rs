//! Messages and building blocks that the node-to-node protocol crates share.
//!
//! | always there | with any of `client`, `server`, `channel`, `listen` | with one feature |
//! |---|---|---|
//! | [`v1`], [`ids`], [`slots`], [`fence`], [`error`], [`path`], [`peer`], [`guard`], [`clock`], [`text`] | `status`, `bulk`, `checksum`, `rate`, `retry`, `meter`, `pace`, `refusals`, `registry`, `shares` | `connect` (`client`), `dial` (`client` and `channel`), `access`, `durable`, `prompt` and `refusal` (`server`), `limits` and `listen` (`listen`), `tuning` (`channel` or `listen`), `tls`, `codegen` |

#[cfg(feature = "server")]
pub mod access;
#[cfg(feature = "_rpc")]
pub mod bulk;
#[cfg(feature = "_rpc")]
pub mod checksum;
pub mod clock;
#[cfg(feature = "codegen")]
pub mod codegen;
#[cfg(feature = "client")]
pub mod connect;
#[cfg(all(feature = "client", feature = "channel"))]
pub mod dial;
#[cfg(feature = "server")]
pub mod durable;
pub mod error;
pub mod fence;
pub mod guard;
pub mod ids;
#[cfg(feature = "listen")]
pub mod limits;
#[cfg(feature = "listen")]
pub mod listen;
#[cfg(feature = "_rpc")]
pub mod meter;
#[cfg(all(feature = "client", feature = "channel"))]
mod near;
#[cfg(feature = "_rpc")]
pub mod pace;
pub mod path;
pub mod peer;
#[cfg(feature = "server")]
pub mod prompt;
#[cfg(feature = "_rpc")]
pub mod rate;
#[cfg(feature = "server")]
pub mod refusal;
#[cfg(feature = "_rpc")]
pub mod refusals;
#[cfg(feature = "_rpc")]
pub mod registry;
#[cfg(feature = "_rpc")]
pub mod retry;
#[cfg(feature = "_rpc")]
pub mod shares;
pub mod slots;
#[cfg(feature = "_rpc")]
pub mod status;
pub mod text;
#[cfg(all(feature = "tls", any(feature = "listen", all(feature = "client", feature = "channel"))))]
pub mod tls;
#[cfg(any(feature = "channel", feature = "listen"))]
pub mod tuning;
pub mod v1;

pub use error::Error;

/// The encoded `google.protobuf.FileDescriptorSet` of `node.common.v1`.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptor.bin"));
