//! The ready-made table of who may do what: by role, from the certificate or from an entry of its own.

use std::collections::HashMap;

use super::{Authorizer, Call, unauthenticated};
use crate::error::{CommonReason, Error};
use crate::ids::NodeId;
use crate::peer::{PeerIdentity, Role};

/// Methods that change nothing, as `SERVICE/METHOD`; every role may call them. A method that is in no list is refused to all.
pub const READS: &[&str] = &[
    "node.snapshot.v1.SplitSnapshotService/GetTransferProgress",
    "node.snapshot.v1.SplitSnapshotService/WatchTransferProgress",
    "node.snapshot.v1.SplitSnapshotService/ListTransfers",
    "node.migration.v1.MigrationService/GetMigrationProgress",
    "node.migration.v1.MigrationService/WatchMigrationProgress",
    "node.migration.v1.MigrationService/ListMigrations",
    "node.health.v1.HealthService/HealthCheck",
    "node.health.v1.HealthService/WatchHealth",
    "node.health.v1.HealthService/GetNodeStatus",
    "grpc.health.v1.Health/Check",
    "grpc.health.v1.Health/Watch",
    "grpc.health.v1.Health/List",
    "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
];

/// What nodes do to each other. Nodes do not order each other to start, complete, cancel or resolve migrations.
const NODE: &[&str] = &[
    "node.snapshot.v1.SplitSnapshotService/TransferSplitSnapshot",
    "node.snapshot.v1.SplitSnapshotService/CancelTransfer",
    "node.migration.v1.MigrationService/TransferMigrationData",
];

/// What operators do. They push snapshots under their own name, and never speak for the source of a migration.
const OPERATOR: &[&str] = &[
    "node.snapshot.v1.SplitSnapshotService/TransferSplitSnapshot",
    "node.snapshot.v1.SplitSnapshotService/CancelTransfer",
    "node.migration.v1.MigrationService/StartMigration",
    "node.migration.v1.MigrationService/CompleteMigration",
    "node.migration.v1.MigrationService/CancelMigration",
    "node.migration.v1.MigrationService/ResolveMigration",
];

/// Decides by role.
///
/// | role | may |
/// |---|---|
/// | observer | [`READS`] |
/// | node | that, send snapshots and migrations in its own name, cancel its own transfers |
/// | operator | [`READS`], push and cancel transfers, start, complete, cancel and resolve migrations |
///
/// A service of your own is in no list, whatever its methods are called. Shards and slots make no difference. Wrap it for either.
#[derive(Debug, Clone, Default)]
pub struct RoleTable {
    entries: HashMap<NodeId, Role>,
}

impl RoleTable {
    /// Everybody has the role that the certificate says.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whoever has the ID `id` has the role `role`, whatever its certificate says.
    #[must_use]
    pub fn assign(mut self, id: NodeId, role: Role) -> Self {
        self.entries.insert(id, role);
        self
    }

    /// The role of `id`, whose certificate says `role`.
    #[must_use]
    pub fn role(&self, id: &NodeId, role: Role) -> Role {
        self.entries.get(id).copied().unwrap_or(role)
    }
}

impl Authorizer for RoleTable {
    fn authorize(&self, call: &Call<'_>) -> Result<(), Error> {
        let identity = call.peer.identity().ok_or_else(unauthenticated)?;
        let role = Authorizer::role(self, identity);
        let more = match role {
            Role::Node => NODE,
            Role::Operator => OPERATOR,
            Role::Observer => &[],
        };
        let is_called = |name: &&str| name.split_once('/') == Some((call.service, call.method));
        if READS.iter().chain(more).any(is_called) {
            return Ok(());
        }
        let message = format!("{identity} is {role} here, and may not call {}", call.method);
        Err(Error::new(CommonReason::PermissionDenied, message)
            .metadata("method", call.method)
            .metadata("role", role.scheme()))
    }

    fn role(&self, identity: &PeerIdentity) -> Role {
        Self::role(self, &identity.id, identity.role)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::access::{Access, Caller};
    use crate::peer::Peer;

    #[test]
    fn an_assigned_role_decides_whose_tasks_may_be_touched() {
        let identity: PeerIdentity = "node://c1/backup".parse().unwrap();
        let caller = |table: RoleTable| Caller {
            peer: Peer::certified(Some(identity.clone()), None),
            access: Access::new(identity.cluster.clone(), table),
            service: "node.snapshot.v1.SplitSnapshotService",
            method: Arc::from("CancelTransfer"),
        };
        let refused = caller(RoleTable::new()).is_party("transfer t1", "n1").unwrap_err();
        assert!(refused.is(CommonReason::PermissionDenied), "{refused:?}");
        caller(RoleTable::new()).is_party("transfer t1", "backup").unwrap();
        let operator = RoleTable::new().assign(identity.id.clone(), Role::Operator);
        caller(operator).is_party("transfer t1", "n1").unwrap();
        // The other way round, too: an operator's certificate that is a node's here touches its own alone.
        let demoted = RoleTable::new().assign("alice".parse().unwrap(), Role::Node);
        let alice: PeerIdentity = "operator://c1/alice".parse().unwrap();
        let caller = Caller { peer: Peer::certified(Some(alice), None), ..caller(demoted) };
        assert!(caller.is_party("transfer t1", "n1").is_err());
    }
}
