//! What a node takes of its peers, in one value.
//!
//! Each part goes to the builder or listener that keeps it; nothing reads the whole. `docs/limits.md` in the repository is the
//! table of all of them: defaults, and how a peer that goes beyond sees that.

/// All limits of a node. The defaults are safe for a node with 4 GiB of memory.
///
#[cfg_attr(all(feature = "snapshot", feature = "listen", feature = "server"), doc = "```rust")]
#[cfg_attr(not(all(feature = "snapshot", feature = "listen", feature = "server")), doc = "```rust,ignore")]
/// let mut limits = proto::limits::Limits::default();
/// limits.connections.connections = 256;
/// limits.snapshot.transfers_per_peer = 16;
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Limits {
    /// Connections, for [`tune_server_within`](crate::common::tuning::tune_server_within) and
    /// [`incoming_within`](crate::common::tuning::incoming_within).
    #[cfg(feature = "listen")]
    pub connections: crate::common::limits::ConnectionLimits,
    /// TLS handshakes, for [`TlsIncoming`](crate::common::tls::TlsIncoming).
    #[cfg(all(feature = "listen", feature = "tls"))]
    pub handshakes: crate::common::tls::TlsLimits,
    /// For the builder of a [`SnapshotReceiver`](crate::snapshot::SnapshotReceiver).
    #[cfg(all(feature = "snapshot", feature = "server"))]
    pub snapshot: crate::snapshot::limits::Limits,
    /// For the builders of a [`MigrationDriver`](crate::migration::MigrationDriver) (with `client`) and a
    /// [`MigrationReceiver`](crate::migration::MigrationReceiver).
    #[cfg(all(feature = "migration", feature = "server"))]
    pub migration: crate::migration::limits::Limits,
    /// For the builder of a [`HealthRegistry`](crate::health::HealthRegistry).
    #[cfg(all(feature = "health", feature = "server"))]
    pub health: crate::health::limits::Limits,
}
