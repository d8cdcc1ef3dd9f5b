//! The JSON documents. Names and meanings are stable: fields are only added. `README.md` describes them.

use std::collections::BTreeMap;
use std::time::Duration;

use proto::common::error::Error;
use proto::common::slots::SlotRange;
use proto::node;
use serde::Serialize;

/// One transfer. Unknown numbers are `null`, times are milliseconds since the Unix epoch.
#[derive(Debug, Serialize)]
pub(crate) struct TransferDocument {
    pub(crate) transfer_id: String,
    pub(crate) direction: String,
    pub(crate) phase: String,
    pub(crate) finished: bool,
    pub(crate) source_shard_id: String,
    pub(crate) target_shard_id: String,
    pub(crate) source_node_id: Option<String>,
    pub(crate) target_node_id: Option<String>,
    /// First and last, as `--slots` takes it.
    pub(crate) slots: Option<String>,
    pub(crate) snapshot_index: u64,
    pub(crate) snapshot_term: u64,
    pub(crate) priority: String,
    pub(crate) attempt: u64,
    pub(crate) connections: u32,
    pub(crate) lanes: u32,
    pub(crate) bytes_done: u64,
    pub(crate) bytes_total: Option<u64>,
    pub(crate) files_done: u64,
    pub(crate) files_total: Option<u64>,
    pub(crate) bytes_per_second: Option<u64>,
    pub(crate) eta_ms: Option<u64>,
    pub(crate) wire_bytes: u64,
    pub(crate) reused_bytes: u64,
    pub(crate) throttled_ms: u64,
    pub(crate) started_unix_ms: u64,
    pub(crate) phase_started_unix_ms: u64,
    pub(crate) last_activity_unix_ms: u64,
    pub(crate) finished_unix_ms: Option<u64>,
    pub(crate) expires_unix_ms: Option<u64>,
    pub(crate) phases: Vec<PhaseDocument>,
    pub(crate) error: Option<ErrorDocument>,
}

/// When a phase began.
#[derive(Debug, Serialize)]
pub(crate) struct PhaseDocument {
    pub(crate) phase: String,
    pub(crate) started_unix_ms: u64,
}

/// An error; programs decide by `reason`.
#[derive(Debug, Serialize)]
pub(crate) struct ErrorDocument {
    pub(crate) code: String,
    pub(crate) reason: String,
    pub(crate) message: String,
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) retryable: bool,
    pub(crate) retry_after_ms: Option<u64>,
}

/// `nodectl transfers`.
#[derive(Debug, Serialize)]
pub(crate) struct ListDocument {
    pub(crate) transfers: Vec<TransferDocument>,
}

/// A line of something that runs: `event` is `progress` or `installed`.
#[derive(Debug, Serialize)]
pub(crate) struct EventDocument {
    pub(crate) event: &'static str,
    #[serde(flatten)]
    pub(crate) transfer: TransferDocument,
    #[serde(flatten)]
    pub(crate) installed: Option<InstalledDocument>,
}

/// What `installed` says beside the transfer.
#[derive(Debug, Serialize)]
pub(crate) struct InstalledDocument {
    pub(crate) already_installed: bool,
    pub(crate) installed_unix_ms: u64,
    pub(crate) elapsed_ms: u64,
}

/// First line of a push.
#[derive(Debug, Serialize)]
pub(crate) struct StartedDocument<'a> {
    pub(crate) event: &'static str,
    pub(crate) transfer_id: &'a str,
    pub(crate) address: &'a str,
    pub(crate) files_total: u64,
    pub(crate) bytes_total: Option<u64>,
    pub(crate) resume: &'a str,
}

/// The node is away.
#[derive(Debug, Serialize)]
pub(crate) struct WaitingDocument<'a> {
    pub(crate) event: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) transfer_id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) migration_id: Option<&'a str>,
    pub(crate) address: &'a str,
    pub(crate) error: ErrorDocument,
    pub(crate) next_try_ms: Option<u64>,
}

/// Last document of a command that did not succeed.
#[derive(Debug, Serialize)]
pub(crate) struct FailureDocument<'a> {
    pub(crate) event: &'static str,
    pub(crate) transfer_id: Option<&'a str>,
    pub(crate) migration_id: Option<&'a str>,
    pub(crate) error: ErrorDocument,
    pub(crate) help: Option<&'a str>,
    pub(crate) resume: Option<&'a str>,
}

impl From<&Error> for ErrorDocument {
    fn from(error: &Error) -> Self {
        Self {
            code: error.code().name().to_ascii_lowercase(),
            reason: error.reason().to_owned(),
            message: error.message().to_owned(),
            metadata: error.metadata_map().clone(),
            retryable: error.is_retryable(),
            retry_after_ms: error.retry_after_hint().map(millis),
        }
    }
}

impl From<&node::TransferProgress> for TransferDocument {
    fn from(transfer: &node::TransferProgress) -> Self {
        let node::TransferProgress {
            transfer_id,
            progress,
            phase,
            source_shard_id,
            target_shard_id,
            source_node_id,
            target_node_id,
            slots,
            snapshot_index,
            snapshot_term,
            attempt,
            lanes,
            wire_bytes,
            reused_bytes,
            connections,
            priority,
            expires_unix_ms,
            phases,
            // Opaque, and for the node alone.
            specification: _,
        } = transfer.clone();
        let node::Progress {
            direction,
            bytes_done,
            bytes_total,
            items_done,
            items_total,
            total_is_estimate: _,
            bytes_per_second,
            eta_ms,
            started_unix_ms,
            phase_started_unix_ms,
            last_activity_unix_ms,
            finished_unix_ms,
            throttled_ms,
            error,
        } = progress.unwrap_or_default();
        Self {
            transfer_id,
            direction: direction_word(direction),
            phase: phase_word(phase),
            finished: finished_unix_ms.is_some(),
            source_shard_id,
            target_shard_id,
            source_node_id: Some(source_node_id).filter(|id| !id.is_empty()),
            target_node_id: Some(target_node_id).filter(|id| !id.is_empty()),
            slots: SlotRange::from_wire(slots).ok().map(|slots| slots.to_string()),
            snapshot_index,
            snapshot_term,
            priority: priority_word(priority),
            attempt,
            connections,
            lanes,
            bytes_done,
            bytes_total,
            files_done: items_done,
            files_total: items_total,
            bytes_per_second,
            eta_ms,
            wire_bytes,
            reused_bytes,
            throttled_ms,
            started_unix_ms,
            phase_started_unix_ms,
            last_activity_unix_ms,
            finished_unix_ms,
            expires_unix_ms,
            phases: phases
                .into_iter()
                .map(|start| PhaseDocument {
                    phase: phase_word(start.phase),
                    started_unix_ms: start.started_unix_ms,
                })
                .collect(),
            error: error.map(|error| (&Error::from(error)).into()),
        }
    }
}

/// The lower-case word for a phase; one that this version does not know is kept by its number.
pub(crate) fn phase_word(phase: i32) -> String {
    word(node::TransferPhase::try_from(phase).ok().map(|phase| phase.as_str_name()), "TRANSFER_PHASE_", phase)
}

/// `in`, `out` or `unspecified`.
pub(crate) fn direction_word(direction: i32) -> String {
    word(
        node::Direction::try_from(direction).ok().map(|direction| direction.as_str_name()),
        "DIRECTION_",
        direction,
    )
}

/// The lower-case word for a priority.
pub(crate) fn priority_word(priority: i32) -> String {
    word(
        node::Priority::try_from(priority).ok().map(|priority| priority.as_str_name()),
        "PRIORITY_",
        priority,
    )
}

/// The name of an enum's value without its prefix, in lower case; `unknown_7` for one that this version does not know.
pub(crate) fn word(name: Option<&'static str>, prefix: &str, number: i32) -> String {
    name.map_or_else(
        || format!("unknown_{number}"),
        |name| name.trim_start_matches(prefix).to_ascii_lowercase(),
    )
}

/// Whole milliseconds.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enums_are_words_and_unknown_is_null() {
        let transfer = node::TransferProgress {
            transfer_id: "t1".to_owned(),
            phase: node::TransferPhase::Interrupted.into(),
            slots: Some(node::SlotRange { start: 0, end: 8192 }),
            progress: Some(node::Progress {
                direction: node::Direction::In.into(),
                error: Some(node::TaskError {
                    code: 14,
                    reason: "SHUTTING_DOWN".to_owned(),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let json = serde_json::to_value(TransferDocument::from(&transfer)).unwrap();
        assert_eq!(json["phase"], "interrupted");
        assert_eq!(json["direction"], "in");
        assert_eq!(json["priority"], "unspecified");
        assert_eq!(json["slots"], "0-8191");
        assert_eq!(json["bytes_done"], 0);
        assert_eq!(json["finished"], false);
        for unknown in ["bytes_total", "eta_ms", "target_node_id", "finished_unix_ms"] {
            assert!(json[unknown].is_null(), "{unknown}");
        }
        assert_eq!(json["error"]["code"], "unavailable");
        assert_eq!(json["error"]["reason"], "SHUTTING_DOWN");
        assert_eq!(json["error"]["retryable"], true);
        assert_eq!(phase_word(99), "unknown_99");
    }
}
