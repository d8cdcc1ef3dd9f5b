//! What of an answer is taken. An empty entry within an entry is two or three bytes of an answer and up to 216 of memory, so the size of a page does not bound what it
//! takes; and what one page takes, hundreds of pages take in sum.

use std::collections::HashMap;

use proto::health::limits::{PAGE, REMOVAL_BLOCKERS};
use proto::node::{
    ComponentHealth, HealthReport, MigrationProgress, NodeStatus, TaskError, TransferProgress,
};
use tonic::Status;

/// `MigrationProgress.phases`, `freezes` and `incidents`, each, as `migration.proto` has it.
const REMEMBERED: usize = 64;
/// `TransferProgress.phases`, as `snapshot.proto` has it.
const PHASES: usize = 32;
/// `ShardStatus.slots`, as `health.proto` has it.
const SHARD_RANGES: usize = 128;
/// The same of all shards of a node. Those of shards that are not being split are disjoint, so they are 16384 at most.
const RANGES: usize = 1 << 16;
/// Transfers and migrations of a node's status, which are those that are active: 264 by default.
const TASKS: usize = 10_000;
/// `MachineStatus.disks`; an honest node has one for each directory.
const DISKS: usize = 64;
/// `ComponentHealth.probes`, of which there are three.
const PROBES: usize = 16;
/// Facts of an error that are kept. Errors of ours have fewer; one that an honest node was told by another one may have more.
const FACTS: usize = 16;

/// An entry of a list.
pub(crate) trait Listed {
    /// Leaves out what is not needed. Refuses what no honest node tells.
    fn bound(&mut self) -> Result<(), Status>;
}

impl Listed for MigrationProgress {
    fn bound(&mut self) -> Result<(), Status> {
        for (what, told) in [
            ("phases", self.phases.len()),
            ("freezes", self.freezes.len()),
            ("incidents", self.incidents.len()),
        ] {
            few(told, REMEMBERED, || format!("{what} of migration {}", self.migration_id))?;
        }
        // A list does without them: 64 of each in each of a thousand entries would still be much.
        (self.phases, self.freezes, self.incidents) = Default::default();
        facts(self.progress.as_mut().and_then(|progress| progress.error.as_mut()));
        Ok(())
    }
}

impl Listed for TransferProgress {
    fn bound(&mut self) -> Result<(), Status> {
        few(self.phases.len(), PHASES, || format!("phases of transfer {}", self.transfer_id))?;
        facts(self.progress.as_mut().and_then(|progress| progress.error.as_mut()));
        Ok(())
    }
}

/// What was told of a node's status so far, on all pages.
#[derive(Debug, Default)]
pub(crate) struct Told {
    ranges: usize,
    tasks: usize,
}

impl Told {
    /// Takes the next page.
    pub(crate) fn add(&mut self, page: &mut NodeStatus) -> Result<(), Status> {
        let NodeStatus {
            health,
            removal_blockers,
            machine,
            shards,
            slot_owners,
            transfers,
            migrations,
            peers,
            ..
        } = page;
        let entries = shards.len() + slot_owners.len() + transfers.len() + migrations.len() + peers.len();
        if entries > PAGE {
            return Err(Status::out_of_range(format!(
                "a page of {entries} entries, where a node gives {PAGE}"
            )));
        }
        few(removal_blockers.len(), REMOVAL_BLOCKERS, || "removal_blockers".to_owned())?;
        few(machine.as_ref().map_or(0, |machine| machine.disks.len()), DISKS, || "disks".to_owned())?;
        health.as_mut().map_or(Ok(()), report)?;
        for shard in shards {
            few(shard.slots.len(), SHARD_RANGES, || format!("slots of shard {}", shard.shard_id))?;
            self.ranges += shard.slots.len();
        }
        few(self.ranges, RANGES, || "slots of all shards".to_owned())?;
        self.tasks += transfers.len() + migrations.len();
        few(self.tasks, TASKS, || "transfers and migrations".to_owned())?;
        for task in transfers.iter_mut().chain(migrations) {
            facts(task.progress.as_mut().and_then(|progress| progress.error.as_mut()));
        }
        Ok(())
    }
}

/// A node's health, bounded.
pub(crate) fn report(report: &mut HealthReport) -> Result<(), Status> {
    few(report.components.len(), PAGE, || "components".to_owned())?;
    for ComponentHealth { name, probes, last_error, .. } in &mut report.components {
        few(probes.len(), PROBES, || format!("probes of component {name}"))?;
        facts(last_error.as_mut());
    }
    Ok(())
}

fn few(told: usize, most: usize, what: impl FnOnce() -> String) -> Result<(), Status> {
    if told <= most {
        return Ok(());
    }
    Err(Status::out_of_range(format!("{told} {}, where a node tells of {most} at most", what())))
}

/// Leaves out what is too much, the later ones by name, and says so.
fn facts(error: Option<&mut TaskError>) {
    let Some(error) = error else { return };
    let omitted = error.metadata.len().saturating_sub(FACTS);
    if omitted == 0 {
        return;
    }
    let mut facts: Vec<_> = std::mem::take(&mut error.metadata).into_iter().collect();
    facts.sort_unstable();
    facts.truncate(FACTS);
    // A new one: the old one keeps its room.
    error.metadata = HashMap::from_iter(facts);
    error.metadata.insert("omitted_details".to_owned(), format!("{omitted} of metadata"));
}

#[cfg(test)]
mod tests {
    use proto::node::{
        ActiveTask, DiskStatus, FreezeAttempt, HealthProbe, MachineStatus, MigrationIncident,
        MigrationPhaseStart, Progress, RemovalBlocker, ShardStatus, SlotRange,
    };

    use super::*;

    fn failed(facts: usize) -> Option<Progress> {
        let metadata = (0..facts).map(|number| (format!("k{number:04}"), String::new())).collect();
        let error = Some(TaskError { metadata, ..TaskError::default() });
        Some(Progress { error, ..Progress::default() })
    }

    fn kept(progress: Option<&Progress>) -> Vec<&str> {
        let error = progress.and_then(|progress| progress.error.as_ref()).unwrap();
        let mut names: Vec<&str> = error.metadata.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn an_entry_of_a_list_has_no_more_than_was_promised() {
        let migration = |phases: usize, freezes: usize, incidents: usize| MigrationProgress {
            migration_id: "m1".to_owned(),
            phases: vec![MigrationPhaseStart::default(); phases],
            freezes: vec![FreezeAttempt::default(); freezes],
            incidents: vec![MigrationIncident::default(); incidents],
            progress: failed(17),
            ..MigrationProgress::default()
        };
        let mut most = migration(64, 64, 64);
        most.bound().unwrap();
        assert_eq!((most.phases.capacity(), most.freezes.capacity(), most.incidents.capacity()), (0, 0, 0));
        let names = kept(most.progress.as_ref());
        assert_eq!((names.len(), names[0], names[15], names[16]), (17, "k0000", "k0015", "omitted_details"));
        for (mut more, field) in [
            (migration(65, 0, 0), "phases"),
            (migration(0, 65, 0), "freezes"),
            (migration(0, 0, 65), "incidents"),
        ] {
            let refused = more.bound().unwrap_err();
            let says = format!("65 {field} of migration m1, where a node tells of 64 at most");
            assert_eq!(refused.message(), says);
        }
        let transfer = |phases| TransferProgress {
            phases: vec![proto::node::PhaseStart::default(); phases],
            progress: failed(16),
            ..TransferProgress::default()
        };
        let mut most = transfer(32);
        most.bound().unwrap();
        assert_eq!((most.phases.len(), kept(most.progress.as_ref()).len()), (32, 16));
        transfer(33).bound().unwrap_err();
    }

    #[test]
    fn a_status_has_no_more_than_was_promised() {
        let shards = |count: usize, slots: usize| NodeStatus {
            shards: vec![
                ShardStatus { slots: vec![SlotRange::default(); slots], ..ShardStatus::default() };
                count
            ],
            ..NodeStatus::default()
        };
        let tasks = |count: usize| NodeStatus {
            transfers: vec![ActiveTask { progress: failed(17), ..ActiveTask::default() }; count],
            ..NodeStatus::default()
        };
        let blockers = |count| NodeStatus {
            removal_blockers: vec![RemovalBlocker::default(); count],
            ..NodeStatus::default()
        };
        let disks = |count| NodeStatus {
            machine: Some(MachineStatus {
                disks: vec![DiskStatus::default(); count],
                ..MachineStatus::default()
            }),
            ..NodeStatus::default()
        };
        let healthy = |components: usize, probes: usize| NodeStatus {
            health: Some(HealthReport {
                components: vec![
                    ComponentHealth {
                        probes: vec![HealthProbe::Liveness.into(); probes],
                        ..ComponentHealth::default()
                    };
                    components
                ],
                ..HealthReport::default()
            }),
            ..NodeStatus::default()
        };
        for (mut most, mut more) in [
            (shards(1000, 60), shards(1001, 60)),
            (shards(1, 128), shards(1, 129)),
            (blockers(64), blockers(65)),
            (disks(64), disks(65)),
            (healthy(1000, 16), healthy(1001, 0)),
            (healthy(1, 16), healthy(1, 17)),
        ] {
            Told::default().add(&mut most).unwrap();
            Told::default().add(&mut more).unwrap_err();
        }
        // And on all pages together.
        for (page, most) in [(shards(512, 128), 1), (tasks(1000), 10)] {
            let mut told = Told::default();
            for _ in 0..most {
                let mut page = page.clone();
                told.add(&mut page).unwrap();
                let errors = page.transfers.iter().map(|task| kept(task.progress.as_ref()).len());
                assert!(errors.into_iter().all(|facts| facts == 17));
            }
            told.add(&mut page.clone()).unwrap_err();
        }
    }
}
