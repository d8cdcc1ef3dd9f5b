//! `node check`: what a stopped node has on record of migrations, what of it cannot be read, and the way to be rid of that.

use std::fmt;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use proto::common::ids::MigrationId;
use proto::migration::journal::{Journal, Recovered};
use proto::migration::limits::Limits;
use proto::migration::receiver::read_record;
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
    #[serde(serialize_with = "shown")]
    slots: Option<SlotRange>,
    /// `None` if it is damaged.
    state: Option<String>,
    /// What is wrong with it.
    problem: Option<String>,
    /// What to do about that.
    advice: Option<String>,
    /// Of a target: keys that are staged.
    staged_keys: Option<u64>,
    /// Whether this node owns some of the slots.
    owned: bool,
}

/// What was dropped.
#[derive(Debug, Clone, Serialize)]
struct Dropped {
    record: String,
    /// Where it lies now.
    kept_as: PathBuf,
    staged_keys: u64,
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

fn shown<S: serde::Serializer>(slots: &Option<SlotRange>, serializer: S) -> Result<S::Ok, S::Error> {
    match slots {
        Some(slots) => serializer.collect_str(slots),
        None => serializer.serialize_none(),
    }
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

    /// All records, those of this node as a source first; and what else is damaged in the journal.
    async fn records(&self) -> anyhow::Result<(Vec<Record>, Vec<String>)> {
        let (mut records, mut cut) = (Vec::new(), Vec::new());
        let directory = self.journal();
        // A node that never ran has none, and gets none by being looked at.
        if directory.exists() {
            let opening = tokio::task::spawn_blocking(move || open(directory));
            let (_, recovered) = opening.await?.context("cannot read the journal of migrations")?;
            for (id, record) in recovered.active {
                let progress = record.progress.unwrap_or_default();
                let slots = progress.spec.as_ref().and_then(|spec| SlotRange::from_wire(spec.slots).ok());
                records.push(Record {
                    record: slots.map_or_else(|| id.to_string(), |slots| Journal::file_of(slots, &id)),
                    side: Side::Source,
                    migration_id: Some(id.to_string()),
                    slots,
                    state: Some(progress.state().short_name().to_owned()),
                    problem: None,
                    advice: None,
                    staged_keys: None,
                    owned: slots.is_some_and(|slots| self.owns(slots)),
                });
            }
            for damaged in recovered.damaged {
                if !damaged.file.starts_with("active/") {
                    cut.push(format!("{}: {}", damaged.file, damaged.problem));
                    continue;
                }
                let owned = damaged.slots.is_some_and(|slots| self.owns(slots));
                let id = damaged.migration_id();
                records.push(Record {
                    record: damaged.file.clone(),
                    side: Side::Source,
                    advice: Some(self.advice_for_source(&damaged.file, id.as_ref(), owned)),
                    migration_id: id.map(|id| id.to_string()),
                    slots: damaged.slots,
                    state: None,
                    problem: Some(damaged.problem),
                    staged_keys: None,
                    owned,
                });
            }
        }
        for stored in self.store.stored_migrations().await? {
            let read = read_record(&stored);
            let id = stored.id.to_string();
            records.push(Record {
                side: Side::Target,
                migration_id: Some(id.clone()),
                slots: stored.slots,
                state: read.as_ref().ok().map(|progress| progress.state().short_name().to_owned()),
                advice: read.is_err().then(|| self.advice_for_target(&id, stored.slots.is_some())),
                problem: read.err(),
                staged_keys: stored.slots.map(|_| stored.staged.keys),
                owned: stored.slots.is_some_and(|slots| self.owns(slots)),
                record: id,
            });
        }
        Ok((records, cut))
    }

    fn command(&self, name: &str) -> String {
        format!("node check --data {} --drop {name}", self.data.display())
    }

    fn advice_for_source(&self, file: &str, id: Option<&MigrationId>, owned: bool) -> String {
        let command = self.command(file);
        if !owned {
            return format!("this node owns none of the slots any more, so nothing depends on it: {command}");
        }
        let id = id.map_or("ID", MigrationId::as_str);
        format!(
            "restore the file. If it is lost, ask the target: nodectl migrate progress {id} --at TARGET. If that is committed or completed, let this \
             node run until its CLUSTER SLOTS names the target, then stop it and drop the record. If not, nodectl migrate cancel {id} --at TARGET, \
             then {command} --target-discarded"
        )
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
                if record.owned && !target_discarded {
                    bail!(
                        "this node still owns slots of {name}; if the target has taken them over, both would serve them. {}",
                        record.advice.unwrap_or_default()
                    );
                }
                if let Some(id) = record.migration_id {
                    // Nobody would release the changes of its slots any more. Before the file: repeated after a crash.
                    self.store.keep_migrated(&MigrationId::new(id)?, None).await?;
                }
                let (directory, file) = (self.journal(), name.to_owned());
                let moving = move || open(directory)?.0.set_aside(&file);
                let kept_as = tokio::task::spawn_blocking(moving).await?;
                let kept_as = kept_as.with_context(|| format!("cannot move {name} aside"))?;
                Ok(Dropped { record: name.to_owned(), kept_as, staged_keys: 0 })
            }
            Side::Target => {
                let id = MigrationId::new(name)?;
                let stored = self.store.stored_migrations().await?.into_iter().find(|stored| stored.id == id);
                let bytes = stored.map(|stored| stored.record).unwrap_or_default();
                let kept_as = self.journal().join(DROPPED).join(format!("{id}.record"));
                let path = kept_as.clone();
                tokio::task::spawn_blocking(move || keep(&path, &bytes)).await??;
                self.store.drop_migration(&id).await?;
                Ok(Dropped { record: name.to_owned(), kept_as, staged_keys: record.staged_keys.unwrap_or(0) })
            }
        }
    }
}

/// The journal, as the node opens it.
fn open(directory: PathBuf) -> std::io::Result<(Journal, Recovered)> {
    Journal::open(directory, Limits::default().history)
}

/// Writes a file that is there after a crash.
fn keep(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let failed = || format!("cannot write {}", path.display());
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).with_context(failed)?;
        if let Some(parent) = directory.parent() {
            proto::common::durable::sync_dir(parent).with_context(failed)?;
        }
    }
    proto::common::durable::write_atomic(path, bytes).with_context(failed)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, records, cut, dropped } = self;
        if let Some(Dropped { record, kept_as, staged_keys }) = dropped {
            write!(f, "dropped {record}")?;
            if *staged_keys > 0 {
                write!(f, " and {staged_keys} keys that were staged")?;
            }
            writeln!(f, "; what could not be read is kept as {}", kept_as.display())?;
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
            let slots = record.slots.map_or_else(|| "no slots".to_owned(), |slots| slots.to_string());
            write!(f, "  {:width$}  {}  {slots:11}  ", record.record, record.side)?;
            match &record.problem {
                Some(problem) => writeln!(f, "DAMAGED: {problem}")?,
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
