//! The node-to-node data plane of a sharded, replicated store: moving split snapshots, migrating slot
//! ranges under live writes, telling health and status. It stands beside the store's consensus protocol,
//! never inside it.
//!
//! - [`node`] has all messages, clients and servers of all enabled services, flat.
//! - [`common`], `snapshot`, `migration` and `health` are the crates behind it: the same messages, and the
//!   runtimes and building blocks beside them.
//! - `limits` has all that a node bounds, in one value, and `refusals` counts what was refused, by reason, for your metrics.
//!
//! # A server
//!
//! Our services are ordinary tonic services and share a server and its port with any other:
//!
#![cfg_attr(all(feature = "snapshot", feature = "server", feature = "listen"), doc = "```rust,no_run")]
#![cfg_attr(not(all(feature = "snapshot", feature = "server", feature = "listen")), doc = "```rust,ignore")]
//! use proto::common::tuning::server;
//! use proto::node::split_snapshot_service_server::{SplitSnapshotService, SplitSnapshotServiceServer};
//! // The store's own consensus protocol, or any other service.
//! use raft::raft_service_server::{RaftService, RaftServiceServer};
//!
//! async fn serve(
//!     snapshots: impl SplitSnapshotService,
//!     raft: impl RaftService,
//! ) -> Result<(), Box<dyn std::error::Error>> {
//!     let (mut server, incoming) = server(([127, 0, 0, 1], 7101).into())?;
//!     server
//!         .add_service(SplitSnapshotServiceServer::new(snapshots))
//!         .add_service(RaftServiceServer::new(raft))
//!         .serve_with_incoming(incoming)
//!         .await?;
//!     Ok(())
//! }
//! ```
//!
//! # A client
//!
#![cfg_attr(all(feature = "snapshot", feature = "client", feature = "channel"), doc = "```rust,no_run")]
#![cfg_attr(not(all(feature = "snapshot", feature = "client", feature = "channel")), doc = "```rust,ignore")]
//! use proto::common::tuning::endpoint;
//! use proto::node::split_snapshot_service_client::SplitSnapshotServiceClient;
//! use proto::node::{GetTransferProgressRequest, TransferProgress};
//!
//! async fn progress(address: &str, id: &str) -> Result<Option<TransferProgress>, Box<dyn std::error::Error>> {
//!     let mut client = SplitSnapshotServiceClient::new(endpoint(address)?.connect().await?);
//!     let request = GetTransferProgressRequest { transfer_id: id.to_owned(), ..Default::default() };
//!     Ok(client.get_transfer_progress(request).await?.into_inner().transfer)
//! }
//! ```
//!
//! # Features
//!
//! | feature | default | adds |
//! |---|---|---|
//! | `snapshot` | yes | the crate `snapshot`: SplitSnapshotService |
//! | `migration` | yes | the crate `migration`: MigrationService |
//! | `health` | yes | the crate `health`: HealthService |
//! | `client` | yes | generated clients and the runtimes on top of them, generic over the channel; no transport |
//! | `server` | yes | generated server traits and services, and the runtimes behind them; no transport |
//! | `machine` | no | cpu, memory and disks in the node status of `health`; brings its `server` |
//! | `failpoints` | no | for tests of crashes only: the environment can have the process die at a chosen place of a `migration` |
//! | `channel` | by `transport` | tonic's channel, tuned for bulk |
//! | `listen` | by `transport` | tonic's `Server`, tuned for bulk |
//! | `transport` | yes | `channel` and `listen` |
//! | `tls` | no | rustls on whichever of `channel` and `listen` is on |
//!
//! Without any of them there are messages and border types, and neither tonic nor tokio.

#[cfg(any(feature = "server", feature = "listen"))]
pub mod limits;

pub use proto_common as common;
#[cfg(any(feature = "client", feature = "server", feature = "channel", feature = "listen"))]
pub use proto_common::refusals;
#[cfg(feature = "health")]
pub use proto_health as health;
#[cfg(feature = "migration")]
pub use proto_migration as migration;
#[cfg(feature = "snapshot")]
pub use proto_snapshot as snapshot;

/// All messages, clients and servers of all enabled services, flat.
///
/// Names are unique over all services, so nothing shadows anything.
///
#[cfg_attr(all(feature = "snapshot", feature = "client", feature = "server"), doc = "```rust")]
#[cfg_attr(not(all(feature = "snapshot", feature = "client", feature = "server")), doc = "```rust,ignore")]
/// use proto::node::{
///     split_snapshot_service_server::{SplitSnapshotService, SplitSnapshotServiceServer},
///     split_snapshot_service_client::SplitSnapshotServiceClient,
///     TransferSplitSnapshotRequest,
///     TransferSplitSnapshotResponse,
/// };
/// ```
pub mod node {
    pub use proto_common::v1::*;
    #[cfg(feature = "health")]
    pub use proto_health::v1::*;
    #[cfg(feature = "migration")]
    pub use proto_migration::v1::*;
    #[cfg(feature = "snapshot")]
    pub use proto_snapshot::v1::*;
}

/// The examples of the README, compiled.
#[cfg(all(
    doctest,
    feature = "snapshot",
    feature = "health",
    feature = "client",
    feature = "server",
    feature = "transport"
))]
#[doc = include_str!("../../README.md")]
struct ReadmeExamples;
