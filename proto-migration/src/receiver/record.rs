//! What the target's store keeps of a migration, in the same transaction as the rows.

use bytes::Bytes;
use proto_common::ids::MAX_ID_LEN;
use proto_common::slots::SlotRange;
use proto_common::text::printable;

use crate::progress::REMEMBERED;
use crate::sealed::Kind;
use crate::spec::MigrationSpec;
use crate::target::StoredMigration;
use crate::v1::transfer_migration_data_response::Committed;
use crate::v1::{MigrationDecision, MigrationGate, MigrationProgress, MigrationState};

const KIND: Kind = Kind { name: *b"NMR", version: 1 };

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
    /// Holds specification, state, attempt, copy, source identity, times and counters. In memory it is beside this message.
    #[prost(message, optional, tag = "1")]
    progress: Option<MigrationProgress>,
    /// Session of the highest attempt.
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) session: Bytes,
    #[prost(uint64, tag = "3")]
    pub(super) base_seq: u64,
    /// Behind the last durable rows.
    #[prost(bytes = "bytes", tag = "4")]
    pub(super) cursor: Bytes,
    #[prost(bool, tag = "5")]
    pub(super) copied: bool,
    /// The watermark.
    #[prost(uint64, tag = "6")]
    pub(super) through_seq: u64,
    #[prost(message, optional, tag = "7")]
    pub(super) prepared: Option<PreparedAt>,
    #[prost(message, optional, tag = "8")]
    pub(super) committed: Option<Committed>,
    /// The commit of `prepared` was asked of decisions that are made elsewhere; their answer may not be known here yet.
    #[prost(bool, tag = "9")]
    pub(super) deciding: bool,
    /// Fence of the target shard that the source gave last.
    #[prost(message, optional, tag = "10")]
    pub(super) fence: Option<proto_common::v1::Fence>,
    /// Something was staged in this copy, if only tombstones.
    #[prost(bool, tag = "11")]
    pub(super) used: bool,
    /// Bytes that were staged when they were discarded.
    #[prost(uint64, tag = "12")]
    pub(super) discarded_bytes: u64,
}

/// A record that cannot be trusted.
#[derive(Debug, PartialEq)]
pub(super) struct Unread {
    /// What is wrong with it, as the end of a sentence that begins with "the record".
    pub(super) problem: String,
    /// Which migration and slots it says it is about, where that can be read.
    pub(super) told: Option<(String, SlotRange)>,
}

impl From<String> for Unread {
    fn from(problem: String) -> Self {
        Self { problem, told: None }
    }
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
        Self { spec, progress, kept: Kept::default() }
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
        KIND.seal(&Kept { progress: Some(progress), ..self.kept.clone() }).into()
    }

    /// Reads what lies in the store.
    pub(super) fn decode(stored: &StoredMigration) -> Result<Self, Unread> {
        let mut kept: Kept = KIND.open(&stored.record)?;
        let mut progress = kept.progress.take().ok_or_else(|| "holds no progress".to_owned())?;
        let told = progress.spec.as_ref().and_then(|spec| SlotRange::from_wire(spec.slots).ok());
        let told = told.map(|slots| (progress.migration_id.clone(), slots));
        let unread = |problem| Unread { problem, told: told.clone() };
        if progress.migration_id != stored.id.as_str() {
            let other = printable(&progress.migration_id, MAX_ID_LEN);
            return Err(unread(format!("is that of migration {other}")));
        }
        let spec = MigrationSpec::from_wire(progress.spec.clone(), "spec", None)
            .map_err(|error| unread(format!("holds no valid specification: {error}")))?;
        if let Some(staged) = stored.slots.filter(|&staged| staged != spec.slots) {
            let problem = format!("is about slots {}, while rows of slots {staged} are staged", spec.slots);
            return Err(unread(problem));
        }
        let consistent = match progress.state() {
            MigrationState::Receiving | MigrationState::Cancelled => true,
            MigrationState::Prepared => kept.prepared.is_some(),
            MigrationState::Committed => kept.committed.is_some(),
            _ => false,
        };
        if !consistent {
            let state = progress.state().short_name();
            return Err(unread(format!("is in state {state}, which it does not fit")));
        }
        progress.connected = false;
        progress.phases.truncate(REMEMBERED);
        Ok(Self { spec, progress, kept })
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use proto_common::ids::{MigrationId, NodeId, ShardId};

    use super::*;
    use crate::sealed::damages;
    use crate::target::Staged;

    fn slots() -> SlotRange {
        SlotRange::new(5, 10).unwrap()
    }

    fn record() -> Record {
        let spec = MigrationSpec {
            slots: slots(),
            source_shard: ShardId::new("s1").unwrap(),
            target_shard: ShardId::new("s2").unwrap(),
            source_node: NodeId::new("n1").unwrap(),
            target_node: NodeId::new("n2").unwrap(),
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

    /// One in each state that is kept.
    fn records() -> [Record; 4] {
        let receiving = record();
        let mut prepared = record();
        prepared.kept.prepared = Some(PreparedAt { freeze: 1, final_seq: 12, new_slot_epoch: 5, attempt: 7 });
        prepared.enter(MigrationState::Prepared);
        let mut committed = prepared.clone();
        committed.kept.committed = Some(Committed { attempt: 7, freeze: 1, ..Committed::default() });
        committed.enter(MigrationState::Committed);
        let mut cancelled = record();
        cancelled.kept.discarded_bytes = 99;
        cancelled.enter(MigrationState::Cancelled);
        [receiving, prepared, committed, cancelled]
    }

    fn stored(record: impl Into<Bytes>, slots: Option<SlotRange>) -> StoredMigration {
        let id = MigrationId::new("m1").unwrap();
        StoredMigration { id, record: record.into(), staged: Staged::default(), slots }
    }

    #[test]
    fn what_was_saved_is_read_back() {
        for before in records() {
            assert_eq!(Record::decode(&stored(before.encode(), None)).unwrap(), before);
            assert_eq!(Record::decode(&stored(before.encode(), Some(slots()))).unwrap(), before);
        }
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found_in_every_state() {
        for record in records() {
            for (how, damaged) in damages(&record.encode()) {
                let found = Record::decode(&stored(damaged, Some(slots())));
                let unread = found.expect_err(&format!("{how} in {:?}", record.state()));
                assert_eq!(unread.told, None, "{how}: nothing of it is believed");
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_not_trusted() {
        let (of, other_slots) = ("m1".to_owned(), SlotRange::new(5, 11).unwrap());
        let mut unprepared = record();
        unprepared.progress.set_state(MigrationState::Prepared);
        let mut uncommitted = record();
        uncommitted.progress.set_state(MigrationState::Committed);
        let mut of_a_source = record();
        of_a_source.progress.set_state(MigrationState::Copying);
        let mut other_id = record();
        other_id.progress.migration_id = "m2".to_owned();
        let mut no_slots = record();
        no_slots.progress.spec.as_mut().unwrap().slots = None;
        let told = Some((of, slots()));
        let of_a_file = Kind { name: *b"NMJ", ..KIND }.seal(&record().progress);
        let of_another_version = Kind { version: 2, ..KIND }.seal(&Kept::default());
        for (bad, staged, problem, told) in [
            (unprepared.encode(), None, "PREPARED", told.clone()),
            (uncommitted.encode(), None, "COMMITTED", told.clone()),
            (of_a_source.encode(), None, "COPYING", told.clone()),
            (other_id.encode(), None, "is that of migration m2", Some(("m2".to_owned(), slots()))),
            (record().encode(), Some(other_slots), "while rows of slots 5-10 are staged", told),
            (no_slots.encode(), Some(slots()), "no valid specification", None),
            (KIND.seal(&Kept::default()).into(), None, "holds no progress", None),
            (of_a_file.into(), None, "does not begin like a record", None),
            (of_another_version.into(), None, "has version 2", None),
            (record().progress.encode_to_vec().into(), None, "does not begin like a record", None),
            (Bytes::new(), None, "has 0 bytes", None),
        ] {
            let unread = Record::decode(&stored(bad, staged)).unwrap_err();
            assert!(unread.problem.contains(problem), "{unread:?}");
            assert_eq!(unread.told, told, "{unread:?}");
        }
    }
}
