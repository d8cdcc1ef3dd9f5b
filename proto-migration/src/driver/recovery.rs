//! What an earlier process left in the journal: gone on with where it can be, quarantined where it cannot.

use std::collections::BTreeSet;
use std::sync::Arc;

use proto_common::error::Error;
use proto_common::guard::{RangeGuard, RangeHold};
use proto_common::ids::{MigrationId, NodeId};
use proto_common::slots::SlotRange;

use super::calls::{given_away, taken_back};
use super::{Dial, Inner, acquire};
use crate::Reason;
use crate::hold::HoldMode;
use crate::journal::{DamagedFile, Journal, Recovered, SourceRecord, slots_of};
use crate::limits::TaskLimits;
use crate::source::MigrationSource;
use crate::spec::MigrationSpec;
use crate::v1::{MigrationGate, MigrationState};

/// A record of an earlier process that can be gone on with.
#[derive(Debug)]
pub struct SoundRecord {
    /// The migration.
    pub id: MigrationId,
    /// What it is.
    pub spec: MigrationSpec,
    /// What its file holds.
    pub record: SourceRecord,
    limits: TaskLimits,
    /// Its slots, unless it has ended.
    range: Option<RangeHold>,
}

/// Why a record cannot be gone on with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doubt {
    /// Its file cannot be trusted.
    Damaged,
    /// There is no file, while the store logs changes for it.
    Missing,
    /// Its file is whole, and holds what this version cannot go on with.
    NotUnderstood,
    /// Its file is whole, and somebody else has the slots, such as a damaged record: it is gone on with once that is settled.
    Held,
}

/// What cannot be gone on with, and its slots, which nobody gets as long as this lives.
#[derive(Debug)]
pub struct Doubtful {
    /// The file, be it there or not, and what is wrong with it.
    pub file: DamagedFile,
    /// The same in short.
    pub doubt: Doubt,
    ranges: Vec<RangeHold>,
}

/// What an earlier process left, sorted by what becomes of it.
#[derive(Debug, Default)]
pub struct Sorted {
    /// What is gone on with.
    pub sound: Vec<SoundRecord>,
    /// What is quarantined.
    pub doubtful: Vec<Doubtful>,
}

/// Judges what an earlier process left, as [`start`](super::MigrationDriverBuilder::start) does; for tools that look at a node that does not run,
/// too. `me` is the node; `logs` are the change logs that the store holds open ([`MigrationSource::logs`]); `guard` is that of the node, and of a tool a new one.
///
/// Quarantined are damaged files, records that hold what no migration can be gone on with, or that are another node's, records that have the ID of another one, or of a log
/// of other slots, records whose slots somebody else has, and migrations whose log is open while no file is there that could be theirs: they began, and whether they handed
/// over is not known.
#[must_use]
pub fn sort(
    recovered: Recovered,
    me: &NodeId,
    logs: &[(MigrationId, SlotRange)],
    guard: &RangeGuard,
) -> Sorted {
    let Recovered { active, damaged, finished: _ } = recovered;
    let (mut sound, mut doubtful) = (Vec::new(), Vec::new());
    let mut quarantine = |file: DamagedFile, doubt| {
        let why = why(&file, doubt);
        let ranges = file.slots.iter().map(|&slots| guard.quarantine(slots, &why)).collect();
        doubtful.push(Doubtful { file, doubt, ranges });
    };
    // Before the first record is judged: one that overlaps them is in doubt, too.
    for (id, slots) in logs {
        let names =
            |other: &DamagedFile| other.migration_id().as_ref() == Some(id) && other.slots.contains(slots);
        let whole = |(other, record): &(_, _)| other == id && slots_of(record) == Some(*slots);
        if !active.iter().any(whole) && !damaged.iter().any(names) {
            let problem = "is not there, while the store logs changes for it".to_owned();
            quarantine(file_of(id, Some(*slots), problem), Doubt::Missing);
        }
    }
    for file in damaged {
        quarantine(file, Doubt::Damaged);
    }
    let mut seen = BTreeSet::new();
    let twice: BTreeSet<_> =
        active.iter().filter(|(id, _)| !seen.insert(id)).map(|(id, _)| id.clone()).collect();
    let mut single = Vec::new();
    for (id, record) in active {
        let slots = slots_of(&record);
        let logged = logs.iter().find(|(other, logged)| *other == id && Some(*logged) != slots);
        let problem = match logged {
            // Which of them is that of the migration is not known here.
            _ if twice.contains(&id) => {
                "has the ID of another file, too; one of them does not belong here".to_owned()
            }
            Some((_, logged)) => format!(
                "is not that of the migration of this ID, for which the store logs changes of slots {logged}"
            ),
            None => {
                single.push((id, record));
                continue;
            }
        };
        quarantine(file_of(&id, slots, problem), Doubt::Damaged);
    }
    for (id, record) in single {
        match check(&id, me, &record, guard) {
            Ok((spec, limits, range)) => {
                sound.push(SoundRecord { id, spec, record, limits, range });
            }
            Err(Unfit { slots, doubt, error }) => {
                quarantine(file_of(&id, slots, format!("cannot be gone on with: {error}")), doubt);
            }
        }
    }
    Sorted { sound, doubtful }
}

/// The file of one migration, and what is wrong with it.
fn file_of(id: &MigrationId, slots: Option<SlotRange>, problem: String) -> DamagedFile {
    let file = slots.map_or_else(|| id.to_string(), |slots| Journal::file_of(slots, id));
    DamagedFile { file, slots: slots.into_iter().collect(), problem, is_copy: false }
}

/// For peers, clients and operators. Of the server's paths it names the file alone, without which an operator could not settle it.
fn why(file: &DamagedFile, doubt: Doubt) -> String {
    let how = match doubt {
        Doubt::Damaged | Doubt::NotUnderstood => "damaged",
        Doubt::Missing => "missing",
        Doubt::Held => "held",
    };
    format!("the {how} record {}", file.name())
}

/// What is wrong with a whole record, and its slots.
struct Unfit {
    slots: Option<SlotRange>,
    doubt: Doubt,
    error: Error,
}

/// What has to hold before a record of an earlier process is gone on with.
fn check(
    id: &MigrationId,
    me: &NodeId,
    record: &SourceRecord,
    guard: &RangeGuard,
) -> Result<(MigrationSpec, TaskLimits, Option<RangeHold>), Unfit> {
    let progress = record.progress.clone().unwrap_or_default();
    let slots = progress.spec.as_ref().and_then(|spec| SlotRange::from_wire(spec.slots).ok());
    let unfit = |doubt| move |error: Error| Unfit { slots, doubt, error };
    let state = progress.state();
    if !is_of_a_source(state) {
        let problem = format!("state {} is none of a source", progress.state);
        return Err(unfit(Doubt::NotUnderstood)(Reason::InvalidField.field("state", problem)));
    }
    let spec = MigrationSpec::from_wire(progress.spec, "spec", None).map_err(unfit(Doubt::NotUnderstood))?;
    if spec.source_node != *me {
        // A file of another node was put here. Its slots may be this one's to serve, or not, but not for this.
        let problem = format!("is {}; this node is {me}", spec.source_node);
        return Err(unfit(Doubt::NotUnderstood)(Reason::WrongNode.field("spec.source_node_id", problem)));
    }
    let limits = TaskLimits::from_wire(progress.limits, "limits").map_err(unfit(Doubt::NotUnderstood))?;
    let range =
        if state.is_final() { None } else { Some(acquire(guard, id, &spec).map_err(unfit(Doubt::Held))?) };
    Ok((spec, limits, range))
}

/// One that a later version made up is none: what follows from it is not known here.
fn is_of_a_source(state: MigrationState) -> bool {
    match state {
        MigrationState::Pending
        | MigrationState::Copying
        | MigrationState::CatchingUp
        | MigrationState::Ready
        | MigrationState::Freezing
        | MigrationState::Committing
        | MigrationState::Cancelling
        | MigrationState::NeedsOperator
        | MigrationState::Completed
        | MigrationState::Cancelled
        | MigrationState::Failed => true,
        MigrationState::Unspecified
        | MigrationState::Receiving
        | MigrationState::Prepared
        | MigrationState::Committed => false,
    }
}

impl<S: MigrationSource, D: Dial> Inner<S, D> {
    /// Goes on with what can be, and quarantines the rest.
    pub(super) async fn take_up_all(self: &Arc<Self>, recovered: Recovered) -> Result<(), Error> {
        let Sorted { sound, doubtful } = sort(recovered, &self.me, &self.source.logs().await?, &self.guard);
        for doubtful in doubtful {
            self.quarantine(doubtful).await?;
        }
        for record in sound {
            self.take_up(record).await?;
        }
        Ok(())
    }

    /// Holds the slots of a record that cannot be trusted, as long as this process lives.
    async fn quarantine(&self, doubtful: Doubtful) -> Result<(), Error> {
        let Doubtful { file, doubt, ranges } = doubtful;
        if file.is_copy {
            tracing::warn!(file = file.file, problem = file.problem, "the journal has a file too many");
            return Ok(());
        }
        let shown: Vec<_> = file.slots.iter().map(ToString::to_string).collect();
        let shown = if shown.is_empty() { "unknown".to_owned() } else { shown.join(" and ") };
        tracing::error!(file = file.file, problem = file.problem, slots = shown, "the journal is damaged");
        let why = why(&file, doubt);
        for range in ranges {
            let hold = self.source.quarantine(range.range(), &why).await?;
            self.keep_held(hold, Some(range));
        }
        Ok(())
    }

    async fn take_up(self: &Arc<Self>, sound: SoundRecord) -> Result<(), Error> {
        let SoundRecord { id, spec, mut record, limits, range } = sound;
        // An operator took the slots back, and the store may not have claimed them: nobody is served at the epoch from before.
        let taken_back = taken_back(&record);
        let Some(progress) = record.progress.as_mut() else { return Ok(()) };
        progress.reporter = Some(self.identity.clone());
        progress.connected = false;
        if matches!(progress.state(), MigrationState::Ready | MigrationState::Freezing) {
            // Nothing is held after a restart, and how far behind the target is has to be seen first.
            progress.enter(MigrationState::CatchingUp);
            progress.set_gate(MigrationGate::Open);
        }
        let closed = progress.state() == MigrationState::Committing
            || progress.gate() == MigrationGate::Closed
            || given_away(progress)
            || taken_back;
        let hold = if closed { Some(self.source.hold(spec.slots, HoldMode::All).await?) } else { None };
        let tracker = self.migrations.readopt(progress.clone())?;
        let mut task = self.task(id, spec, limits, record, tracker);
        (task.hold, task.range) = (hold, range);
        // Where clients are held still, it lasts.
        if !closed {
            task.lose_freeze();
        }
        task.show();
        self.tasks.spawn(task.run());
        Ok(())
    }
}
