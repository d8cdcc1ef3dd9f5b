//! What an earlier process left in the journal: gone on with where it can be, quarantined where it cannot.

use std::sync::Arc;

use proto_common::error::Error;
use proto_common::guard::RangeHold;
use proto_common::ids::MigrationId;
use proto_common::slots::SlotRange;

use super::{Dial, Inner, lock};
use crate::hold::HoldMode;
use crate::journal::{DamagedFile, Journal, SourceRecord};
use crate::limits::TaskLimits;
use crate::source::MigrationSource;
use crate::spec::MigrationSpec;
use crate::v1::{FreezeOutcome, MigrationGate, MigrationState};

/// A record of an earlier process that can be gone on with, and its slots unless it has ended.
struct CheckedRecord {
    spec: MigrationSpec,
    limits: TaskLimits,
    range: Option<RangeHold>,
}

impl<S: MigrationSource, D: Dial> Inner<S, D> {
    /// Goes on with what can be, and quarantines the rest.
    pub(super) async fn take_up_all(
        self: &Arc<Self>,
        damaged_files: Vec<DamagedFile>,
        active: Vec<(MigrationId, SourceRecord)>,
    ) -> Result<(), Error> {
        for damaged in damaged_files {
            self.quarantine(&damaged).await?;
        }
        for (id, record) in active {
            match self.check_record(&id, &record) {
                Ok(checked) => self.take_up(id, record, checked).await?,
                Err((slots, error)) => {
                    let file = slots.map_or_else(|| id.to_string(), |slots| Journal::file_of(slots, &id));
                    let problem = format!("cannot be gone on with: {error}");
                    self.quarantine(&DamagedFile { file, slots, problem }).await?;
                }
            }
        }
        Ok(())
    }

    /// Holds the slots of a record that cannot be trusted, as long as this process lives.
    async fn quarantine(&self, damaged: &DamagedFile) -> Result<(), Error> {
        let DamagedFile { file, slots, problem } = damaged;
        let shown = slots.map_or_else(|| "unknown".to_owned(), |slots| slots.to_string());
        tracing::error!(file, problem, slots = shown, "the journal is damaged");
        let Some(slots) = *slots else { return Ok(()) };
        let why = format!("the damaged record {file}");
        let hold = self.source.quarantine(slots, &why).await?;
        let range = self.guard.quarantine(slots, &why);
        lock(&self.held).push((hold, Some(range)));
        Ok(())
    }

    /// What has to hold before a record of an earlier process is gone on with; its slots, where it does not.
    fn check_record(
        &self,
        id: &MigrationId,
        record: &SourceRecord,
    ) -> Result<CheckedRecord, (Option<SlotRange>, Error)> {
        let progress = record.progress.clone().unwrap_or_default();
        let slots = progress.spec.as_ref().and_then(|spec| SlotRange::from_wire(spec.slots).ok());
        let blame = |error: Error| (slots, error);
        let final_state = progress.state().is_final();
        let spec = MigrationSpec::from_wire(progress.spec, "spec", None).map_err(blame)?;
        let limits = TaskLimits::from_wire(progress.limits, "limits").map_err(blame)?;
        let range = if final_state { None } else { Some(self.acquire(id, &spec).map_err(blame)?) };
        Ok(CheckedRecord { spec, limits, range })
    }

    async fn take_up(
        self: &Arc<Self>,
        id: MigrationId,
        mut record: SourceRecord,
        checked: CheckedRecord,
    ) -> Result<(), Error> {
        let Some(progress) = record.progress.as_mut() else { return Ok(()) };
        let CheckedRecord { spec, limits, range } = checked;
        progress.reporter = Some(self.identity.clone());
        progress.connected = false;
        if matches!(progress.state(), MigrationState::Ready | MigrationState::Freezing) {
            // Nothing is held after a restart, and how far behind the target is has to be seen first.
            progress.enter(MigrationState::CatchingUp);
            progress.set_gate(MigrationGate::Open);
        }
        let state = progress.state();
        let closed = state == MigrationState::Committing || progress.gate() == MigrationGate::Closed;
        let hold = if closed { Some(self.source.hold(spec.slots, HoldMode::All).await?) } else { None };
        let claim = record.claim_epoch;
        let mut task = self.task(id, spec, limits, record, hold, range)?;
        if state != MigrationState::Committing {
            task.end_freeze(FreezeOutcome::Interrupted, None);
        }
        if claim > 0 && state != MigrationState::Cancelled {
            // An operator took the slots back, and the crash came before that was recorded.
            self.source.keep(&task.id, task.spec.slots, Some(claim)).await?;
            task.change().enter(MigrationState::Cancelled);
            task.change().set_gate(MigrationGate::Open);
            task.open_gate();
        }
        task.show();
        self.tasks.spawn(task.run());
        Ok(())
    }
}
