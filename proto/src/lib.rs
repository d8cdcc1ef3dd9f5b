//! The node-to-node data plane of a sharded, replicated store.

pub use proto_common as common;
#[cfg(feature = "health")]
pub use proto_health as health;
#[cfg(feature = "migration")]
pub use proto_migration as migration;
#[cfg(feature = "snapshot")]
pub use proto_snapshot as snapshot;

/// All messages, clients and servers of all enabled services, flat.
///
/// Names are unique over all services, so nothing shadows anything.
pub mod node {
    pub use proto_common::v1::*;
    #[cfg(feature = "health")]
    pub use proto_health::v1::*;
    #[cfg(feature = "migration")]
    pub use proto_migration::v1::*;
    #[cfg(feature = "snapshot")]
    pub use proto_snapshot::v1::*;
}
