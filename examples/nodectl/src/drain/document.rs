//! The JSON documents of a drain.

use proto::common::ids::NodeId;
use proto::node::{MigrationProgress, NodeStatus};
use serde::Serialize;

use super::plan::Move;

/// What will be done, once for each look at the node.
#[derive(Debug, Serialize)]
pub(super) struct DrainPlanDocument {
    event: &'static str,
    node_id: String,
    slots_owned: u32,
    /// IDs of migrations that run already.
    running: Vec<String>,
    moves: Vec<MoveDocument>,
}

/// A migration that is to be started.
#[derive(Debug, Serialize)]
struct MoveDocument {
    slots: String,
    target_node_id: String,
    target_address: String,
}

impl DrainPlanDocument {
    pub(super) fn new(
        node_id: &NodeId,
        status: &NodeStatus,
        running: &[MigrationProgress],
        moves: &[Move<'_>],
    ) -> Self {
        Self {
            event: "plan",
            node_id: node_id.to_string(),
            slots_owned: status.slots_owned,
            running: running.iter().map(|migration| migration.migration_id.clone()).collect(),
            moves: moves
                .iter()
                .map(|one| MoveDocument {
                    slots: one.slots.to_string(),
                    target_node_id: one.target.node.to_string(),
                    target_address: one.target.address.to_string(),
                })
                .collect(),
        }
    }
}

/// The node can be stopped.
#[derive(Debug, Serialize)]
pub(super) struct DrainDocument<'a> {
    pub(super) event: &'static str,
    pub(super) node_id: &'a str,
    pub(super) safe_to_remove: bool,
}
