//! The JSON documents about nodes. Names and meanings are stable: fields are only added. `README.md` describes them.

use proto::common::error::Error;
use proto::common::slots::SlotRange;
use proto::node;
use serde::Serialize;

use crate::document::{ErrorDocument, direction_word, word};
use crate::nodes::Answered;

/// `nodectl health`.
#[derive(Debug, Serialize)]
pub(crate) struct HealthListDocument {
    pub(crate) healthy: bool,
    pub(crate) nodes: Vec<NodeHealthDocument>,
}

/// How one node is.
#[derive(Debug, Default, Serialize)]
pub(crate) struct NodeHealthDocument {
    pub(crate) address: String,
    pub(crate) reachable: bool,
    pub(crate) node_id: Option<String>,
    pub(crate) incarnation: Option<u64>,
    pub(crate) state: Option<String>,
    pub(crate) status: Option<String>,
    pub(crate) message: Option<String>,
    pub(crate) since_unix_ms: Option<u64>,
    pub(crate) components: Vec<ComponentDocument>,
    /// Why it did not answer.
    pub(crate) error: Option<ErrorDocument>,
}

/// One component.
#[derive(Debug, Serialize)]
pub(crate) struct ComponentDocument {
    pub(crate) name: String,
    pub(crate) status: String,
    pub(crate) message: String,
    pub(crate) critical: bool,
    pub(crate) since_unix_ms: u64,
    pub(crate) age_ms: Option<u64>,
    pub(crate) stale: bool,
    pub(crate) last_result: Option<String>,
    pub(crate) timed_out: bool,
    pub(crate) panicked: bool,
    pub(crate) consecutive_failures: u32,
    pub(crate) failure_threshold: u32,
    pub(crate) value: Option<f64>,
    pub(crate) unit: Option<String>,
    pub(crate) last_error: Option<ErrorDocument>,
}

/// `nodectl status`.
#[derive(Debug, Serialize)]
pub(crate) struct StatusListDocument {
    pub(crate) nodes: Vec<NodeStatusDocument>,
}

/// What one node is, has and does.
#[derive(Debug, Serialize)]
pub(crate) struct NodeStatusDocument {
    #[serde(flatten)]
    pub(crate) health: NodeHealthDocument,
    #[serde(flatten)]
    pub(crate) status: Option<StatusDocument>,
}

/// Of a node that answered.
#[derive(Debug, Serialize)]
pub(crate) struct StatusDocument {
    pub(crate) cluster_id: Option<String>,
    pub(crate) version: String,
    pub(crate) state_reason: String,
    pub(crate) state_since_unix_ms: u64,
    pub(crate) started_unix_ms: u64,
    pub(crate) uptime_ms: u64,
    pub(crate) node_address: String,
    pub(crate) client_address: String,
    pub(crate) slots_owned: u32,
    pub(crate) keys: Option<u64>,
    pub(crate) bytes: Option<u64>,
    pub(crate) safe_to_remove: bool,
    pub(crate) removal_blockers: Vec<BlockerDocument>,
    pub(crate) cpu_percent: Option<f64>,
    pub(crate) process_cpu_percent: Option<f64>,
    pub(crate) memory_total_bytes: Option<u64>,
    pub(crate) memory_available_bytes: Option<u64>,
    pub(crate) process_memory_bytes: Option<u64>,
    pub(crate) disks: Vec<DiskDocument>,
    pub(crate) open_watches: u32,
    pub(crate) shards: Vec<ShardDocument>,
    pub(crate) slot_owners: Vec<OwnerDocument>,
    pub(crate) transfers: Vec<TaskDocument>,
    pub(crate) migrations: Vec<TaskDocument>,
    pub(crate) peers: Vec<PeerDocument>,
}

/// Why a node can't be removed.
#[derive(Debug, Serialize)]
pub(crate) struct BlockerDocument {
    pub(crate) kind: String,
    pub(crate) subject: String,
    pub(crate) message: String,
}

/// One disk.
#[derive(Debug, Serialize)]
pub(crate) struct DiskDocument {
    pub(crate) name: String,
    pub(crate) total_bytes: u64,
    pub(crate) available_bytes: u64,
    pub(crate) sync_latency_ms: Option<f64>,
    pub(crate) writable: Option<bool>,
}

/// One shard.
#[derive(Debug, Serialize)]
pub(crate) struct ShardDocument {
    pub(crate) shard_id: String,
    pub(crate) slots: Vec<String>,
    pub(crate) role: String,
    pub(crate) epoch: u64,
    pub(crate) term: u64,
    pub(crate) keys: Option<u64>,
    pub(crate) bytes: Option<u64>,
    pub(crate) applied_index: u64,
    pub(crate) lag_entries: Option<u64>,
}

/// Who owns a range.
#[derive(Debug, Serialize)]
pub(crate) struct OwnerDocument {
    pub(crate) slots: Option<String>,
    pub(crate) epoch: u64,
    pub(crate) node_id: String,
    pub(crate) node_address: String,
    pub(crate) client_address: String,
}

/// A task that moves data.
#[derive(Debug, Serialize)]
pub(crate) struct TaskDocument {
    pub(crate) kind: String,
    pub(crate) id: String,
    pub(crate) phase: String,
    pub(crate) direction: String,
    pub(crate) peer_node_id: String,
    pub(crate) slots: Option<String>,
    pub(crate) bytes_done: u64,
    pub(crate) bytes_total: Option<u64>,
    pub(crate) needs_operator: bool,
}

/// What a node thinks of another.
#[derive(Debug, Serialize)]
pub(crate) struct PeerDocument {
    pub(crate) node_id: String,
    pub(crate) address: String,
    pub(crate) state: String,
    pub(crate) since_unix_ms: u64,
    pub(crate) message: String,
    pub(crate) phi: Option<f64>,
    pub(crate) round_trip_ms: Option<f64>,
    pub(crate) last_reply_unix_ms: Option<u64>,
    pub(crate) last_heard_from_unix_ms: Option<u64>,
    pub(crate) self_doubt: bool,
}

/// The word for a status.
pub(crate) fn status_word(status: i32) -> String {
    word(node::HealthStatus::try_from(status).ok().map(|one| one.as_str_name()), "HEALTH_STATUS_", status)
}

/// The word for a node's state.
pub(crate) fn state_word(state: i32) -> String {
    word(node::NodeState::try_from(state).ok().map(|one| one.as_str_name()), "NODE_STATE_", state)
}

fn some(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

fn slots(range: Option<node::SlotRange>) -> Option<String> {
    SlotRange::from_wire(range).ok().map(|range| range.to_string())
}

impl NodeHealthDocument {
    fn answered(
        address: &str,
        origin: Option<node::ReplyOrigin>,
        health: Option<node::HealthReport>,
    ) -> Self {
        let origin = origin.unwrap_or_default();
        let state = state_word(origin.state);
        let identity = origin.identity.unwrap_or_default();
        let mut document = Self {
            address: address.to_owned(),
            reachable: true,
            node_id: some(identity.node_id),
            incarnation: Some(identity.incarnation),
            state: Some(state),
            ..Self::default()
        };
        if let Some(health) = health {
            document.status = Some(status_word(health.status));
            document.message = Some(health.message);
            document.since_unix_ms = Some(health.since_unix_ms);
            document.components = health.components.into_iter().map(ComponentDocument::from).collect();
        }
        document
    }

    fn unreachable(address: &str, error: &Error) -> Self {
        Self { address: address.to_owned(), error: Some(error.into()), ..Self::default() }
    }
}

impl From<&Answered<node::HealthCheckResponse>> for NodeHealthDocument {
    fn from(one: &Answered<node::HealthCheckResponse>) -> Self {
        match &one.answer {
            Ok(answer) => Self::answered(&one.address, answer.origin.clone(), answer.health.clone()),
            Err(error) => Self::unreachable(&one.address, error),
        }
    }
}

impl From<node::ComponentHealth> for ComponentDocument {
    fn from(component: node::ComponentHealth) -> Self {
        let last_result = (component.checked_unix_ms.is_some()).then(|| status_word(component.last_result));
        Self {
            name: component.name,
            status: status_word(component.status),
            message: component.message,
            critical: component.critical,
            since_unix_ms: component.since_unix_ms,
            age_ms: component.age_ms,
            stale: component.stale,
            last_result,
            timed_out: component.timed_out,
            panicked: component.panicked,
            consecutive_failures: component.consecutive_failures,
            failure_threshold: component.failure_threshold,
            value: component.measurement.as_ref().map(|one| one.value),
            unit: component.measurement.map(|one| one.unit),
            last_error: component.last_error.map(|error| (&Error::from(error)).into()),
        }
    }
}

impl From<&Answered<node::GetNodeStatusResponse>> for NodeStatusDocument {
    fn from(one: &Answered<node::GetNodeStatusResponse>) -> Self {
        let answer = match &one.answer {
            Ok(answer) => answer.clone(),
            Err(error) => {
                return Self { health: NodeHealthDocument::unreachable(&one.address, error), status: None };
            }
        };
        let status = answer.status.unwrap_or_default();
        let origin = answer.origin.unwrap_or_default();
        Self {
            health: NodeHealthDocument::answered(&one.address, Some(origin.clone()), status.health.clone()),
            status: Some(StatusDocument::new(origin, status)),
        }
    }
}

/// The lower-case word for what stands in the way of a removal.
pub(crate) fn blocker_word(kind: i32) -> String {
    let name = node::RemovalBlockerKind::try_from(kind).ok().map(|kind| kind.as_str_name());
    word(name, "REMOVAL_BLOCKER_KIND_", kind)
}

impl StatusDocument {
    fn new(origin: node::ReplyOrigin, status: node::NodeStatus) -> Self {
        let identity = origin.identity.unwrap_or_default();
        let machine = status.machine.unwrap_or_default();
        let role = |value: i32| {
            word(node::ShardRole::try_from(value).ok().map(|one| one.as_str_name()), "SHARD_ROLE_", value)
        };
        let peer = |value: i32| {
            word(node::PeerState::try_from(value).ok().map(|one| one.as_str_name()), "PEER_STATE_", value)
        };
        Self {
            cluster_id: some(identity.cluster_id),
            version: identity.version,
            state_reason: status.state_reason,
            state_since_unix_ms: status.state_since_unix_ms,
            started_unix_ms: status.started_unix_ms,
            uptime_ms: origin.uptime_ms,
            node_address: status.node_address,
            client_address: status.client_address,
            slots_owned: status.slots_owned,
            keys: status.keys,
            bytes: status.bytes,
            safe_to_remove: status.safe_to_remove,
            removal_blockers: status
                .removal_blockers
                .into_iter()
                .map(|one| BlockerDocument {
                    kind: blocker_word(one.kind),
                    subject: one.subject,
                    message: one.message,
                })
                .collect(),
            cpu_percent: machine.cpu_percent,
            process_cpu_percent: machine.process_cpu_percent,
            memory_total_bytes: machine.memory_total_bytes,
            memory_available_bytes: machine.memory_available_bytes,
            process_memory_bytes: machine.process_memory_bytes,
            disks: machine
                .disks
                .into_iter()
                .map(|disk| DiskDocument {
                    name: disk.name,
                    total_bytes: disk.total_bytes,
                    available_bytes: disk.available_bytes,
                    sync_latency_ms: disk.sync_latency_ms,
                    writable: disk.writable,
                })
                .collect(),
            open_watches: status.open_watches,
            shards: status
                .shards
                .into_iter()
                .map(|shard| ShardDocument {
                    shard_id: shard.shard_id,
                    slots: shard.slots.into_iter().filter_map(|range| slots(Some(range))).collect(),
                    role: role(shard.role),
                    epoch: shard.fence.map_or(0, |fence| fence.epoch),
                    term: shard.fence.map_or(0, |fence| fence.term),
                    keys: shard.keys,
                    bytes: shard.bytes,
                    applied_index: shard.applied_index,
                    lag_entries: shard.lag_entries,
                })
                .collect(),
            slot_owners: status
                .slot_owners
                .into_iter()
                .map(|owner| OwnerDocument {
                    slots: slots(owner.slots),
                    epoch: owner.epoch,
                    node_id: owner.node_id,
                    node_address: owner.node_address,
                    client_address: owner.client_address,
                })
                .collect(),
            transfers: status.transfers.into_iter().map(TaskDocument::from).collect(),
            migrations: status.migrations.into_iter().map(TaskDocument::from).collect(),
            peers: status
                .peers
                .into_iter()
                .map(|one| PeerDocument {
                    node_id: one.node_id,
                    address: one.address,
                    state: peer(one.state),
                    since_unix_ms: one.since_unix_ms,
                    message: one.message,
                    phi: one.phi,
                    round_trip_ms: one.round_trip_ms,
                    last_reply_unix_ms: one.last_reply_unix_ms,
                    last_heard_from_unix_ms: one.last_heard_from_unix_ms,
                    self_doubt: one.self_doubt,
                })
                .collect(),
        }
    }
}

impl From<node::ActiveTask> for TaskDocument {
    fn from(task: node::ActiveTask) -> Self {
        let kind = word(
            node::TaskKind::try_from(task.kind).ok().map(|one| one.as_str_name()),
            "TASK_KIND_",
            task.kind,
        );
        let progress = task.progress.unwrap_or_default();
        Self {
            kind,
            id: task.id,
            phase: task.phase.to_ascii_lowercase(),
            direction: direction_word(progress.direction),
            peer_node_id: task.peer_node_id,
            slots: slots(task.slots),
            bytes_done: progress.bytes_done,
            bytes_total: progress.bytes_total,
            needs_operator: task.needs_operator,
        }
    }
}
