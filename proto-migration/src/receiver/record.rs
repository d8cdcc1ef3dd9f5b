//! What the target's store keeps of a migration, in the same transaction as the rows.

use bytes::Bytes;
use prost::Message as _;
use proto_common::ids::MigrationId;

use crate::progress::REMEMBERED;
use crate::spec::MigrationSpec;
use crate::v1::transfer_migration_data_response::Committed;
use crate::v1::{MigrationDecision, MigrationGate, MigrationProgress, MigrationState};

/// Version of the encoding. A record of another one is not read: what it says could be misunderstood.
const VERSION: u32 = 1;

/// Incidents that are kept across a restart; each `apply` writes them again.
const KEPT_INCIDENTS: usize = 4;

/// The `Prepare` that was found to be in order.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub(super) struct PreparedAt {
    #[prost(uint64, tag = "1")]
    pub(super) freeze: u64,
    #[prost(uint64, tag = "2")]
    pub(super) final_seq: u64,
    #[prost(uint64, tag = "3")]
    pub(super) new_slot_epoch: u64,
    #[prost(uint64, tag = "4")]
    pub(super) attempt: u64,
}

/// The encoding of a [`Record`].
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Kept {
    #[prost(uint32, tag = "1")]
    version: u32,
    /// Holds specification, state, attempt, copy, source identity, times and counters. In memory it is beside this message.
    #[prost(message, optional, tag = "2")]
    progress: Option<MigrationProgress>,
    /// Session of the highest attempt.
    #[prost(bytes = "bytes", tag = "3")]
    pub(super) session: Bytes,
    #[prost(uint64, tag = "4")]
    pub(super) base_seq: u64,
    /// Behind the last durable rows.
    #[prost(bytes = "bytes", tag = "5")]
    pub(super) cursor: Bytes,
    #[prost(bool, tag = "6")]
    pub(super) copied: bool,
    /// The watermark.
    #[prost(uint64, tag = "7")]
    pub(super) through_seq: u64,
    #[prost(message, optional, tag = "8")]
    pub(super) prepared: Option<PreparedAt>,
    #[prost(message, optional, tag = "9")]
    pub(super) committed: Option<Committed>,
    /// The commit of `prepared` was asked of decisions that are made elsewhere; their answer may not be known here yet.
    #[prost(bool, tag = "10")]
    pub(super) deciding: bool,
    /// Fence of the target shard that the source gave last.
    #[prost(message, optional, tag = "11")]
    pub(super) fence: Option<proto_common::v1::Fence>,
    /// Something was staged in this copy, if only tombstones.
    #[prost(bool, tag = "12")]
    pub(super) used: bool,
    /// Bytes that were staged when they were discarded.
    #[prost(uint64, tag = "13")]
    pub(super) discarded_bytes: u64,
}

/// All that is known of one migration.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Record {
    pub(super) spec: MigrationSpec,
    pub(super) progress: MigrationProgress,
    pub(super) kept: Kept,
}

impl Record {
    pub(super) fn new(spec: MigrationSpec, progress: MigrationProgress) -> Self {
        Self { spec, progress, kept: Kept { version: VERSION, ..Kept::default() } }
    }

    pub(super) fn state(&self) -> MigrationState {
        self.progress.state()
    }

    /// Enters a state, with what follows from it.
    pub(super) fn enter(&mut self, state: MigrationState) {
        self.progress.enter(state);
        let (gate, decision) = match state {
            MigrationState::Prepared => (MigrationGate::Closed, MigrationDecision::Undecided),
            MigrationState::Committed | MigrationState::Completed => {
                (MigrationGate::Open, MigrationDecision::Committed)
            }
            MigrationState::Cancelled => (MigrationGate::Moved, MigrationDecision::Discarded),
            _ => (MigrationGate::Moved, MigrationDecision::Undecided),
        };
        self.progress.set_gate(gate);
        self.progress.set_decision(decision);
    }

    /// Takes the `Prepare` back.
    pub(super) fn unprepare(&mut self) {
        self.kept.prepared = None;
        self.kept.deciding = false;
        self.enter(MigrationState::Receiving);
    }

    pub(super) fn encode(&self) -> Bytes {
        let mut progress = self.progress.clone();
        let incidents = progress.incidents.len().saturating_sub(KEPT_INCIDENTS);
        progress.incidents.drain(..incidents);
        Kept { progress: Some(progress), ..self.kept.clone() }.encode_to_vec().into()
    }

    /// Reads a record of `id`; an error says what is wrong with it.
    pub(super) fn decode(id: &MigrationId, record: Bytes) -> Result<Self, String> {
        let mut kept = Kept::decode(record).map_err(|error| format!("does not decode: {error}"))?;
        if kept.version != VERSION {
            return Err(format!("has version {}; this node reads {VERSION}", kept.version));
        }
        let mut progress = kept.progress.take().ok_or("holds no progress")?;
        if progress.migration_id != id.as_str() {
            return Err(format!("is that of migration {}", progress.migration_id));
        }
        let spec = MigrationSpec::from_wire(progress.spec.clone(), "spec", None)
            .map_err(|error| format!("holds no valid specification: {error}"))?;
        let consistent = match progress.state() {
            MigrationState::Receiving | MigrationState::Cancelled => true,
            MigrationState::Prepared => kept.prepared.is_some(),
            MigrationState::Committed => kept.committed.is_some(),
            _ => false,
        };
        if !consistent {
            return Err(format!("is in state {}, which it does not fit", progress.state().short_name()));
        }
        progress.connected = false;
        progress.phases.truncate(REMEMBERED);
        Ok(Self { spec, progress, kept })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        let spec = MigrationSpec {
            slots: proto_common::slots::SlotRange::new(5, 10).unwrap(),
            source_shard: proto_common::ids::ShardId::new("s1").unwrap(),
            target_shard: proto_common::ids::ShardId::new("s2").unwrap(),
            source_node: proto_common::ids::NodeId::new("n1").unwrap(),
            target_node: proto_common::ids::NodeId::new("n2").unwrap(),
            auto_complete: false,
            value_format: String::new(),
        };
        let progress = MigrationProgress {
            migration_id: "m1".to_owned(),
            spec: Some(spec.clone().into()),
            attempt: 7,
            ..MigrationProgress::default()
        };
        let mut record = Record::new(spec, progress);
        record.kept.cursor = Bytes::from_static(b"here");
        record.enter(MigrationState::Receiving);
        record
    }

    #[test]
    fn what_was_saved_is_read_back() {
        let (id, before) = (MigrationId::new("m1").unwrap(), record());
        assert_eq!(Record::decode(&id, before.encode()).unwrap(), before);
    }

    #[test]
    fn what_does_not_fit_is_not_trusted() {
        let id = MigrationId::new("m1").unwrap();
        let mut other_version = record();
        other_version.kept.version = 2;
        let mut unprepared = record();
        unprepared.progress.set_state(MigrationState::Prepared);
        let mut uncommitted = record();
        uncommitted.progress.set_state(MigrationState::Committed);
        let mut other_id = record();
        other_id.progress.migration_id = "m2".to_owned();
        for (bad, problem) in [
            (other_version.encode(), "version 2"),
            (unprepared.encode(), "PREPARED"),
            (uncommitted.encode(), "COMMITTED"),
            (other_id.encode(), "m2"),
            (Bytes::from_static(b"\xff\xff\xff"), "decode"),
            (Bytes::new(), "version 0"),
        ] {
            let error = Record::decode(&id, bad).unwrap_err();
            assert!(error.contains(problem), "{error}");
        }
    }
}
