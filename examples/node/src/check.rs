//! `node check`: what a stopped node has on record of migrations, what of it cannot be read, and the way to be rid of that.

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use proto::common::durable::{create_dir_all, free_path, write_atomic};
use proto::common::guard::RangeGuard;
use proto::common::ids::MigrationId;
use proto::common::text::printable;
use proto::migration::driver::{Doubt, Doubtful, Sorted, SoundRecord, sort};
use proto::migration::journal::{DamagedFile, Journal, Recovered};
use proto::migration::limits::Limits;
use proto::migration::receiver::{UnreadRecord, read_records};
use serde::Serialize;

use crate::common::{NodeId, SlotRange};
use crate::store::{Ownership, Store, StoreOptions};

/// Below the journal's directory: what was dropped of the database.
const DROPPED: &str = "dropped";

/// What to look at, and what to drop.
#[derive(Debug, Clone)]
pub struct CheckOptions {
    /// The data directory.
    pub data: PathBuf,
    /// Of the database.
    pub store: StoreOptions,
    /// The damaged record to drop, by the name that is shown.
    pub drop: Option<String>,
    /// The operator says that the target of it has discarded the migration.
    pub target_discarded: bool,
    /// For programs.
    pub json: bool,
}

/// Which end of a migration a record is that of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Side {
    Source,
    Target,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Source => "source",
            Self::Target => "target",
        })
    }
}

/// A record of a migration.
#[derive(Debug, Clone, Serialize)]
struct Record {
    /// What it is called in `--drop`: of a source, its file; of a target, the migration's ID.
    record: String,
    side: Side,
    migration_id: Option<String>,
    /// Of a target: those that are staged, and of one that is damaged those that it tells. Of a source that is damaged: all that it may be about; none: nobody knows.
    #[serde(serialize_with = "shown")]
    slots: Vec<SlotRange>,
    /// `None` if it is damaged.
    state: Option<String>,
    /// What is wrong with it.
    problem: Option<String>,
    /// What to do about that.
    advice: Option<String>,
    /// Of a target: keys that are staged.
    staged_keys: Option<u64>,
    /// Whether this node owns some of the slots; `None`: nobody knows which they are, and it owns some.
    owned: Option<bool>,
    /// What is wrong with a source's.
    #[serde(skip)]
    doubt: Option<Doubt>,
}

/// What was dropped.
#[derive(Debug, Clone, Serialize)]
struct Dropped {
    record: String,
    /// Where it lies now, if there was anything of it.
    kept_as: Option<PathBuf>,
    /// Keys that were staged for it.
    staged_keys: u64,
    /// Keys of slots that another node owns, which it left here.
    left_keys: u64,
}

/// All that `node check` has to say.
#[derive(Debug, Serialize)]
struct Report {
    node: String,
    records: Vec<Record>,
    /// Other files of the journal in which something was damaged; the node starts without that.
    cut: Vec<String>,
    dropped: Option<Dropped>,
}

fn shown<S: serde::Serializer>(slots: &[SlotRange], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(slots.iter().map(ToString::to_string))
}

/// Looks at the data directory of a stopped node, and drops what it is told to. Returns whether all that is left can be read.
///
/// # Errors
///
/// The directory is in use, or cannot be read; what was to be dropped is not there, can be read, or must not be dropped as things are. Nothing was
/// changed.
pub async fn check(options: CheckOptions) -> anyhow::Result<bool> {
    let CheckOptions { data, store, drop, target_discarded, json } = options;
    let (opened, verified) = (data.clone(), store);
    let opening = tokio::task::spawn_blocking(move || Store::open_existing(&opened, &verified));
    let (store, identity) = opening.await??;
    let checked = async {
        let mut node =
            Stopped { data, store: store.clone(), node: identity.node, ownership: identity.ownership };
        let dropped = match &drop {
            Some(name) => Some(node.drop(name, target_discarded).await?),
            None => None,
        };
        let (records, cut) = node.records().await?;
        Ok::<_, anyhow::Error>(Report { node: node.node.to_string(), records, cut, dropped })
    };
    let report = checked.await;
    tokio::task::spawn_blocking(move || store.close()).await?;
    let report = report?;
    let mut out = std::io::stdout();
    if json {
        serde_json::to_writer_pretty(&mut out, &report)?;
        writeln!(out)?;
    } else {
        write!(out, "{report}")?;
    }
    Ok(report.records.iter().all(|record| record.problem.is_none()))
}

/// A node that does not run.
struct Stopped {
    data: PathBuf,
    store: Store,
    node: NodeId,
    ownership: Ownership,
}

impl Stopped {
    fn journal(&self) -> PathBuf {
        self.data.join("migrations")
    }

    fn owns(&self, slots: SlotRange) -> bool {
        self.ownership.ranges_of(&self.node).any(|own| own.overlaps(slots))
    }

    /// Whether this node owns some of the slots that a damaged record may be about.
    fn may_own(&self, slots: &[SlotRange]) -> Option<bool> {
        if slots.is_empty() {
            // Whichever they are, it owns none of them.
            self.ownership.ranges_of(&self.node).next().is_none().then_some(false)
        } else {
            Some(slots.iter().any(|&slots| self.owns(slots)))
        }
    }

    /// What the node would find at its start, sorted as it would.
    async fn sorted(&self) -> anyhow::Result<(Sorted, Vec<DamagedFile>)> {
        let directory = self.journal();
        // A node that never ran has none, and gets none by being looked at.
        let mut recovered = if directory.exists() {
            let opening = tokio::task::spawn_blocking(move || open(directory));
            opening.await?.context("cannot read the journal of migrations")?.1
        } else {
            Recovered::default()
        };
        let others = recovered.damaged.extract_if(.., |file| !file.is_of_a_migration()).collect();
        let guard = RangeGuard::new();
        // Splits have their slots before migrations are gone on with.
        let splits = self.store.splits()?;
        let held: Vec<_> = splits
            .iter()
            .filter_map(|split| {
                let slots = SlotRange::new(split.start, split.end).ok()?;
                guard.try_acquire(slots, &format!("transfer {}", split.transfer)).ok()
            })
            .collect();
        let sorted = sort(recovered, &self.node, &self.store.open_logs(), &guard);
        drop(held);
        Ok((sorted, others))
    }

    /// All records, those of this node as a source first; and what else is damaged in the journal.
    async fn records(&self) -> anyhow::Result<(Vec<Record>, Vec<String>)> {
        let (Sorted { sound, doubtful }, others) = self.sorted().await?;
        let cut = others.into_iter().map(|file| format!("{}: {}", file.file, file.problem)).collect();
        let mut records = Vec::new();
        for SoundRecord { id, spec, record, .. } in sound {
            let progress = record.progress.unwrap_or_default();
            records.push(Record {
                record: Journal::file_of(spec.slots, &id),
                side: Side::Source,
                migration_id: Some(id.to_string()),
                slots: vec![spec.slots],
                state: Some(progress.state().short_name().to_owned()),
                problem: None,
                advice: None,
                staged_keys: None,
                owned: Some(self.owns(spec.slots)),
                doubt: None,
            });
        }
        for Doubtful { file, doubt, .. } in doubtful {
            let owned = self.may_own(&file.slots);
            let id = file.migration_id();
            records.push(Record {
                side: Side::Source,
                advice: Some(self.advice_for_source(&file.file, id.as_ref(), doubt, owned)),
                migration_id: id.map(|id| id.to_string()),
                slots: file.slots,
                state: None,
                problem: Some(file.problem),
                staged_keys: None,
                owned,
                doubt: Some(doubt),
                record: file.file,
            });
        }
        for (stored, read) in read_records(self.store.stored_migrations().await?) {
            let id = stored.id.to_string();
            let (slots, state, problem) = match read {
                Ok(progress) => {
                    (stored.slots.into_iter().collect(), Some(progress.state().short_name().to_owned()), None)
                }
                Err(UnreadRecord { problem, slots }) => (slots, None, Some(problem)),
            };
            records.push(Record {
                side: Side::Target,
                migration_id: Some(id.clone()),
                advice: problem.is_some().then(|| self.advice_for_target(&id, stored.slots.is_some())),
                owned: Some(slots.iter().any(|&slots| self.owns(slots))),
                slots,
                state,
                problem,
                staged_keys: stored.slots.map(|_| stored.staged.keys),
                doubt: None,
                record: id,
            });
        }
        Ok((records, cut))
    }

    fn command(&self, name: &str) -> String {
        format!("node check --data {} --drop {name}", self.data.display())
    }

    fn advice_for_source(
        &self,
        file: &str,
        id: Option<&MigrationId>,
        doubt: Doubt,
        owned: Option<bool>,
    ) -> String {
        let command = self.command(file);
        let first = match doubt {
            Doubt::Held => {
                return "the file is whole, and is gone on with once nobody else has its slots: settle that first, as the problem says who".to_owned();
            }
            Doubt::NotUnderstood => "if another version of the program wrote it, start that one",
            Doubt::Damaged | Doubt::Missing => {
                "restore the file as it was when the node stopped, from no older copy"
            }
        };
        match owned {
            Some(false) => {
                format!("this node owns none of the slots any more, so nothing depends on it: {command}")
            }
            None => format!(
                "neither its name nor its content says which slots it is about, so none are refused because of it. If it is a file of something else, move it \
                 away. If not, {first}, under its name. If it is lost, compare with what other nodes know of migrations from here, nodectl migrate list \
                 --at NODE, and settle those that are not shown here as you would those whose record is missing; then {command} --target-discarded"
            ),
            Some(true) => {
                let id = id.map_or("ID", MigrationId::as_str);
                format!(
                    "{first}. If it is lost, ask the target: nodectl migrate progress {id} --at TARGET. If that is committed or completed, let this node run \
                     until its CLUSTER SLOTS names the target, then stop it and {command}. If not, nodectl migrate cancel {id} --at TARGET, then {command} \
                     --target-discarded"
                )
            }
        }
    }

    fn advice_for_target(&self, id: &str, staged: bool) -> String {
        let command = self.command(id);
        if staged {
            format!(
                "if another version of the program wrote it, start that one. Otherwise drop it, with the rows that are staged; they are the source's, \
                 which copies them again, or waits for nodectl migrate resolve if it does not know whether it committed: {command}"
            )
        } else {
            format!(
                "if another version of the program wrote it, start that one. Nothing is staged, so it was committed, or given up. See at the source that it \
                 has ended, nodectl migrate progress {id} --at SOURCE, or decide there with nodectl migrate resolve; then {command}"
            )
        }
    }

    /// Drops a record that cannot be read; its bytes are kept.
    async fn drop(&mut self, name: &str, target_discarded: bool) -> anyhow::Result<Dropped> {
        let (records, _) = self.records().await?;
        let Some(record) = records.into_iter().find(|record| record.record == name) else {
            bail!(
                "there is no record {name:?} here; node check --data {} shows those that are",
                self.data.display()
            );
        };
        if record.problem.is_none() {
            bail!(
                "the record {name} can be read, so the node goes on with the migration; to end it, start the node and use nodectl migrate cancel"
            );
        }
        match record.side {
            Side::Source => {
                let advice = record.advice.unwrap_or_default();
                if record.doubt == Some(Doubt::Held) {
                    bail!(
                        "the record {name} is not damaged: it {}. {advice}",
                        record.problem.unwrap_or_default()
                    );
                }
                match record.owned {
                    Some(true) if !target_discarded => bail!(
                        "this node still owns slots of {name}; if the target has taken them over, both would serve them. {advice}"
                    ),
                    None if !target_discarded => bail!(
                        "this node may own slots of {name}; if a target has taken them over, both would serve them. {advice}"
                    ),
                    _ => {}
                }
                let id = record.migration_id.map(MigrationId::new).transpose()?;
                // Nobody would release the changes of its slots any more, nor give up what is not this node's. Before the file: a crash in between
                // leaves that, so that this is done again.
                let left_keys = self.store.give_up_lost(&self.node, id.as_ref(), &record.slots).await?;
                let kept_as = if record.doubt == Some(Doubt::Missing) {
                    None
                } else {
                    let (directory, file) = (self.journal(), name.to_owned());
                    let moving = move || open(directory)?.0.set_aside(&file);
                    let moved = tokio::task::spawn_blocking(moving).await?;
                    Some(moved.with_context(|| format!("cannot move {name} aside"))?)
                };
                Ok(Dropped { record: name.to_owned(), kept_as, staged_keys: 0, left_keys })
            }
            Side::Target => {
                let id = MigrationId::new(name)?;
                let stored = self.store.stored_migrations().await?.into_iter().find(|stored| stored.id == id);
                let bytes = stored.map(|stored| stored.record).unwrap_or_default();
                let (directory, file) = (self.journal().join(DROPPED), format!("{id}.record"));
                let kept_as = tokio::task::spawn_blocking(move || keep(&directory, &file, &bytes)).await??;
                self.store.drop_migration(&id).await?;
                let staged_keys = record.staged_keys.unwrap_or(0);
                Ok(Dropped { record: name.to_owned(), kept_as: Some(kept_as), staged_keys, left_keys: 0 })
            }
        }
    }
}

/// The journal, as the node opens it.
fn open(directory: PathBuf) -> std::io::Result<(Journal, Recovered)> {
    Journal::open(directory, Limits::default().history)
}

/// Writes a file that is there after a crash, beside what lies there already, and returns its path.
fn keep(directory: &Path, name: &str, bytes: &[u8]) -> anyhow::Result<PathBuf> {
    let failed = || format!("cannot write {}", directory.join(name).display());
    create_dir_all(directory).with_context(failed)?;
    let path = free_path(directory, name).with_context(failed)?;
    write_atomic(&path, bytes).with_context(failed)?;
    Ok(path)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, records, cut, dropped } = self;
        if let Some(Dropped { record, kept_as, staged_keys, left_keys }) = dropped {
            write!(f, "dropped {record}")?;
            if *staged_keys > 0 {
                write!(f, " and {staged_keys} keys that were staged")?;
            }
            if *left_keys > 0 {
                write!(f, " and {left_keys} keys of slots that another node owns")?;
            }
            match kept_as {
                Some(kept_as) => writeln!(f, "; what could not be read is kept as {}", kept_as.display())?,
                None => writeln!(f)?,
            }
        }
        let damaged = records.iter().filter(|record| record.problem.is_some()).count();
        match (records.len(), damaged) {
            (0, _) => writeln!(f, "{node}: the database is whole, no migration is under way")?,
            (all, 0) => {
                writeln!(f, "{node}: the database is whole, all records of migrations can be read: {all}")?
            }
            (all, damaged) => {
                writeln!(
                    f,
                    "{node}: the database is whole, records of migrations that cannot be read: {damaged} of {all}"
                )?;
            }
        }
        let width = records.iter().map(|record| record.record.len()).max().unwrap_or(0);
        for record in records {
            let slots: Vec<_> = record.slots.iter().map(ToString::to_string).collect();
            let slots = match (slots.is_empty(), record.side) {
                (false, _) => slots.join(","),
                (true, Side::Source) => "any slots".to_owned(),
                (true, Side::Target) => "no slots".to_owned(),
            };
            write!(f, "  {:width$}  {}  {slots:11}  ", record.record, record.side)?;
            match &record.problem {
                Some(problem) => {
                    let how = match record.doubt {
                        None | Some(Doubt::Damaged | Doubt::NotUnderstood) => "DAMAGED",
                        Some(Doubt::Missing) => "MISSING",
                        Some(Doubt::Held) => "HELD",
                    };
                    writeln!(f, "{how}: {}", printable(problem, 512))?;
                }
                None => writeln!(f, "{}", record.state.as_deref().unwrap_or_default())?,
            }
        }
        for cut in cut {
            writeln!(f, "  {cut}; the node starts without it")?;
        }
        for record in records {
            if let Some(advice) = &record.advice {
                writeln!(f, "{}: {advice}", record.record)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
