//! The JSON documents about migrations. Names and meanings are stable: fields are only added.

use proto::common::error::Error;
use proto::common::slots::SlotRange;
use proto::common::text::hex;
use proto::node;
use serde::Serialize;

use crate::document::{ErrorDocument, direction_word, priority_word, word};

/// One migration, as one of the two nodes knows it.
#[derive(Debug, Serialize)]
pub(crate) struct MigrationDocument {
    pub(crate) migration_id: String,
    pub(crate) direction: String,
    pub(crate) state: String,
    pub(crate) finished: bool,
    pub(crate) gate: String,
    pub(crate) decision: String,
    pub(crate) slots: Option<String>,
    pub(crate) source_shard_id: String,
    pub(crate) target_shard_id: String,
    pub(crate) source_node_id: String,
    pub(crate) target_node_id: String,
    pub(crate) target_address: Option<String>,
    pub(crate) auto_complete: bool,
    pub(crate) value_format: String,
    pub(crate) reporter: Option<IdentityDocument>,
    pub(crate) peer: Option<IdentityDocument>,
    pub(crate) attempt: u64,
    pub(crate) connected: bool,
    pub(crate) copy: u64,
    pub(crate) copy_reason: Option<String>,
    pub(crate) keys_done: u64,
    pub(crate) keys_total: Option<u64>,
    pub(crate) bytes_done: u64,
    pub(crate) bytes_total: Option<u64>,
    pub(crate) total_is_estimate: bool,
    pub(crate) bytes_per_second: Option<u64>,
    pub(crate) eta_ms: Option<u64>,
    pub(crate) lag_entries: Option<u64>,
    pub(crate) lag_bytes: Option<u64>,
    pub(crate) lag_ms: Option<u64>,
    pub(crate) not_converging: bool,
    pub(crate) not_converging_since_unix_ms: Option<u64>,
    pub(crate) log_bytes: u64,
    pub(crate) log_bytes_cap: u64,
    pub(crate) writers_slowed_ms: u64,
    pub(crate) source_throttled_ms: u64,
    pub(crate) target_throttled_ms: u64,
    pub(crate) delta_entries: u64,
    pub(crate) delta_bytes: u64,
    pub(crate) wire_bytes: u64,
    pub(crate) durable_seq: u64,
    pub(crate) slot_epoch: u64,
    pub(crate) freeze_count: u64,
    pub(crate) max_freeze_ms: u64,
    pub(crate) freezes: Vec<FreezeDocument>,
    pub(crate) phases: Vec<StateDocument>,
    pub(crate) complete_deadline_unix_ms: Option<u64>,
    pub(crate) cancel_reason: Option<String>,
    pub(crate) cancelled_at_node_id: Option<String>,
    pub(crate) resolved_reason: Option<String>,
    pub(crate) mismatch: Option<MismatchDocument>,
    pub(crate) clock_skew_ms: Option<i64>,
    pub(crate) priority: String,
    pub(crate) limits: LimitsDocument,
    pub(crate) incidents: Vec<IncidentDocument>,
    pub(crate) started_unix_ms: u64,
    pub(crate) phase_started_unix_ms: u64,
    pub(crate) last_activity_unix_ms: u64,
    pub(crate) finished_unix_ms: Option<u64>,
    pub(crate) error: Option<ErrorDocument>,
}

/// Who a node is.
#[derive(Debug, Serialize)]
pub(crate) struct IdentityDocument {
    pub(crate) node_id: String,
    pub(crate) cluster_id: String,
    pub(crate) store_id: String,
    pub(crate) incarnation: u64,
    pub(crate) version: String,
}

/// One freeze of the moving slots.
#[derive(Debug, Serialize)]
pub(crate) struct FreezeDocument {
    pub(crate) freeze: u64,
    pub(crate) attempt: u64,
    pub(crate) started_unix_ms: u64,
    pub(crate) freeze_ms: Option<u64>,
    pub(crate) drain_ms: u64,
    pub(crate) flush_ms: u64,
    pub(crate) prepare_ms: u64,
    pub(crate) commit_ms: u64,
    pub(crate) held_requests: u64,
    pub(crate) final_seq: u64,
    pub(crate) outcome: String,
    pub(crate) error: Option<ErrorDocument>,
}

/// When a state began.
#[derive(Debug, Serialize)]
pub(crate) struct StateDocument {
    pub(crate) state: String,
    pub(crate) started_unix_ms: u64,
}

/// Where the two sides differ.
#[derive(Debug, Serialize)]
pub(crate) struct MismatchDocument {
    pub(crate) slot: u32,
    pub(crate) source_keys: Option<u64>,
    pub(crate) target_keys: Option<u64>,
    pub(crate) slots_differing: u32,
}

/// Limits in force.
#[derive(Debug, Serialize)]
pub(crate) struct LimitsDocument {
    pub(crate) max_bytes_per_second: Option<u64>,
    pub(crate) freeze_timeout_ms: Option<u64>,
    pub(crate) ready_lag_entries: Option<u64>,
    pub(crate) ready_lag_ms: Option<u64>,
    pub(crate) log_bytes_cap: Option<u64>,
    pub(crate) slow_writers: Option<bool>,
    pub(crate) accept_timeout_ms: Option<u64>,
}

/// An error that the migration survived.
#[derive(Debug, Serialize)]
pub(crate) struct IncidentDocument {
    pub(crate) at_unix_ms: u64,
    pub(crate) state: String,
    pub(crate) attempt: u64,
    pub(crate) error: Option<ErrorDocument>,
}

/// `nodectl migrate list`.
#[derive(Debug, Serialize)]
pub(crate) struct MigrationListDocument {
    pub(crate) migrations: Vec<MigrationDocument>,
}

/// A line of a migration that is followed: `event` is `started`, `joined` or `progress`.
#[derive(Debug, Serialize)]
pub(crate) struct MigrationEventDocument {
    pub(crate) event: &'static str,
    #[serde(flatten)]
    pub(crate) migration: MigrationDocument,
}

fn given(text: String) -> Option<String> {
    Some(text).filter(|text| !text.is_empty())
}

fn error(error: Option<node::TaskError>) -> Option<ErrorDocument> {
    error.map(|error| (&Error::from(error)).into())
}

impl From<node::NodeIdentity> for IdentityDocument {
    fn from(identity: node::NodeIdentity) -> Self {
        let node::NodeIdentity { node_id, cluster_id, store_id, incarnation, version } = identity;
        Self { node_id, cluster_id, store_id: hex(&store_id), incarnation, version }
    }
}

impl From<node::FreezeAttempt> for FreezeDocument {
    fn from(attempt: node::FreezeAttempt) -> Self {
        Self {
            freeze: attempt.freeze,
            attempt: attempt.attempt,
            started_unix_ms: attempt.started_unix_ms,
            freeze_ms: attempt.freeze_ms,
            drain_ms: attempt.drain_ms,
            flush_ms: attempt.flush_ms,
            prepare_ms: attempt.prepare_ms,
            commit_ms: attempt.commit_ms,
            held_requests: attempt.held_requests,
            final_seq: attempt.final_seq,
            outcome: outcome_word(attempt.outcome),
            error: error(attempt.error),
        }
    }
}

impl From<node::MigrationLimits> for LimitsDocument {
    fn from(limits: node::MigrationLimits) -> Self {
        let node::MigrationLimits {
            max_bytes_per_second,
            freeze_timeout_ms,
            ready_lag_entries,
            ready_lag_ms,
            log_bytes_cap,
            slow_writers,
            accept_timeout_ms,
        } = limits;
        Self {
            max_bytes_per_second,
            freeze_timeout_ms,
            ready_lag_entries,
            ready_lag_ms,
            log_bytes_cap,
            slow_writers,
            accept_timeout_ms,
        }
    }
}

impl From<&node::MigrationProgress> for MigrationDocument {
    fn from(migration: &node::MigrationProgress) -> Self {
        let node::MigrationProgress {
            migration_id,
            progress,
            spec,
            state,
            gate,
            reporter,
            peer,
            target_address,
            attempt,
            connected,
            copy,
            copy_reason,
            phases,
            lag,
            not_converging,
            not_converging_since_unix_ms,
            log_bytes,
            log_bytes_cap,
            writers_slowed_ms,
            source_throttled_ms,
            target_throttled_ms,
            delta_entries,
            delta_bytes,
            wire_bytes,
            durable_seq,
            freeze_count,
            freezes,
            max_freeze_ms,
            complete_deadline_unix_ms,
            cancel_reason,
            cancelled_at_node_id,
            decision,
            slot_epoch,
            mismatch,
            resolved_reason,
            clock_skew_ms,
            limits,
            priority,
            incidents,
        } = migration.clone();
        let node::Progress {
            direction,
            bytes_done,
            bytes_total,
            items_done,
            items_total,
            total_is_estimate,
            bytes_per_second,
            eta_ms,
            started_unix_ms,
            phase_started_unix_ms,
            last_activity_unix_ms,
            finished_unix_ms,
            // `source_throttled_ms` and `target_throttled_ms` tell the two apart.
            throttled_ms: _,
            error: failed,
        } = progress.unwrap_or_default();
        let node::MigrationSpec {
            slots,
            source_shard_id,
            target_shard_id,
            source_node_id,
            target_node_id,
            auto_complete,
            value_format,
        } = spec.unwrap_or_default();
        let node::MigrationLag { entries, bytes, age_ms } = lag.unwrap_or_default();
        Self {
            migration_id,
            direction: direction_word(direction),
            state: state_word(state),
            finished: finished_unix_ms.is_some(),
            gate: gate_word(gate),
            decision: decision_word(decision),
            slots: SlotRange::from_wire(slots).ok().map(|slots| slots.to_string()),
            source_shard_id,
            target_shard_id,
            source_node_id,
            target_node_id,
            target_address: given(target_address),
            auto_complete,
            value_format,
            reporter: reporter.map(Into::into),
            peer: peer.map(Into::into),
            attempt,
            connected,
            copy,
            copy_reason: given(copy_reason),
            keys_done: items_done,
            keys_total: items_total,
            bytes_done,
            bytes_total,
            total_is_estimate,
            bytes_per_second,
            eta_ms,
            lag_entries: entries,
            lag_bytes: bytes,
            lag_ms: age_ms,
            not_converging,
            not_converging_since_unix_ms,
            log_bytes,
            log_bytes_cap,
            writers_slowed_ms,
            source_throttled_ms,
            target_throttled_ms,
            delta_entries,
            delta_bytes,
            wire_bytes,
            durable_seq,
            slot_epoch,
            freeze_count,
            max_freeze_ms,
            freezes: freezes.into_iter().map(Into::into).collect(),
            phases: phases
                .into_iter()
                .map(|start| StateDocument {
                    state: state_word(start.state),
                    started_unix_ms: start.started_unix_ms,
                })
                .collect(),
            complete_deadline_unix_ms,
            cancel_reason: given(cancel_reason),
            cancelled_at_node_id: given(cancelled_at_node_id),
            resolved_reason,
            mismatch: mismatch.map(|mismatch| MismatchDocument {
                slot: mismatch.slot,
                source_keys: mismatch.source.map(|side| side.keys),
                target_keys: mismatch.target.map(|side| side.keys),
                slots_differing: mismatch.slots_differing,
            }),
            clock_skew_ms,
            priority: priority_word(priority),
            limits: limits.unwrap_or_default().into(),
            incidents: incidents
                .into_iter()
                .map(|incident| IncidentDocument {
                    at_unix_ms: incident.at_unix_ms,
                    state: state_word(incident.state),
                    attempt: incident.attempt,
                    error: error(incident.error),
                })
                .collect(),
            started_unix_ms,
            phase_started_unix_ms,
            last_activity_unix_ms,
            finished_unix_ms,
            error: error(failed),
        }
    }
}

/// The lower-case word for a state; one that this version does not know is kept by its number.
pub(crate) fn state_word(state: i32) -> String {
    let name = node::MigrationState::try_from(state).ok().map(|state| state.as_str_name());
    word(name, "MIGRATION_STATE_", state)
}

/// `open`, `writes_held`, `closed` or `moved`.
pub(crate) fn gate_word(gate: i32) -> String {
    let name = node::MigrationGate::try_from(gate).ok().map(|gate| gate.as_str_name());
    word(name, "MIGRATION_GATE_", gate)
}

/// `undecided`, `committed` or `discarded`.
pub(crate) fn decision_word(decision: i32) -> String {
    let name = node::MigrationDecision::try_from(decision).ok().map(|decision| decision.as_str_name());
    word(name, "MIGRATION_DECISION_", decision)
}

/// How a freeze ended.
pub(crate) fn outcome_word(outcome: i32) -> String {
    let name = node::FreezeOutcome::try_from(outcome).ok().map(|outcome| outcome.as_str_name());
    word(name, "FREEZE_OUTCOME_", outcome)
}
