//! What a source must not forget: one file per migration that runs, and the history of those that ended.
//!
//! | path | content |
//! |---|---|
//! | `active/<first slot>-<last slot>.<id>.task` | one migration, with a checksum, replaced atomically |
//! | `history` | the last that ended, in either direction |
//! | `dropped/` | damaged files that an operator has [set aside](Journal::set_aside); nothing reads them |
//!
//! The slots are part of a file's name, so that a file whose content is damaged still says which slots must not be served until somebody has
//! looked: whether they were handed over is what it would have told.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use prost::Message as _;
use proto_common::durable::{History, create_dir_all, free_path, sync_dir, write_atomic};
use proto_common::error::Error;
use proto_common::ids::MigrationId;
use proto_common::slots::SlotRange;
use proto_common::v1::Fence;

use crate::Reason;
use crate::failpoint::reached;
use crate::sealed::{HEADER_LEN, Kind};
use crate::v1::MigrationProgress;

const KIND: Kind = Kind { name: *b"NMJ", version: 1 };
/// What the names of the files of migrations that run begin with.
const ACTIVE: &str = "active/";
/// The name of the file of those that ended.
const HISTORY: &str = "history";
/// Largest record. What a progress remembers is bounded far below it.
const MAX_RECORD_BYTES: usize = 4 << 20;

/// Everything that a source persists of one migration.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SourceRecord {
    /// What is shown of it, its state and attempt included.
    #[prost(message, optional, tag = "1")]
    pub progress: Option<MigrationProgress>,
    /// Sequence behind which the log of the present copy starts.
    #[prost(uint64, tag = "2")]
    pub base_seq: u64,
    /// Fence of the source shard that the caller gave.
    #[prost(message, optional, tag = "3")]
    pub fence: Option<Fence>,
    /// The state that NEEDS_OPERATOR was entered from, as a `MigrationState`.
    #[prost(int32, tag = "4")]
    pub stopped_in: i32,
    /// The epoch at which an operator took the slots back; 0 if none did.
    #[prost(uint64, tag = "5")]
    pub claim_epoch: u64,
    /// An error that no retry helps has ended it, or is about to.
    #[prost(bool, tag = "6")]
    pub failed: bool,
    /// It has ended here, and the target has not been told.
    #[prost(bool, tag = "7")]
    pub untold: bool,
}

/// A file of the journal that cannot be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DamagedFile {
    /// The file's name, below the journal's directory.
    pub file: String,
    /// The slots that it may be about: those that its name says and those that its content says, where either can be read. Of a file of a
    /// migration (see [`is_of_a_migration`](Self::is_of_a_migration)), empty means that nobody knows, not that there are none.
    pub slots: Vec<SlotRange>,
    /// What is wrong with it.
    pub problem: String,
    /// Whether it is a copy of the file of a migration, which lies beside it and is whole: no slots are in doubt because of it.
    pub is_copy: bool,
}

impl DamagedFile {
    /// Whether it may be all that is left of a migration: it lies where only their files do, and is no [copy](Self::is_copy).
    #[must_use]
    pub fn is_of_a_migration(&self) -> bool {
        self.file.starts_with(ACTIVE) && !self.is_copy
    }

    /// The file's name without a directory: what peers and clients are told.
    #[must_use]
    pub fn name(&self) -> &str {
        self.file.strip_prefix(ACTIVE).unwrap_or(&self.file)
    }

    /// The migration that the file's name says.
    #[must_use]
    pub fn migration_id(&self) -> Option<MigrationId> {
        Some(parse_name(self.file.strip_prefix(ACTIVE)?)?.1)
    }
}

/// What an earlier process left.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Migrations that had not ended.
    pub active: Vec<(MigrationId, SourceRecord)>,
    /// Migrations that had, oldest first.
    pub finished: Vec<MigrationProgress>,
    /// Files that cannot be trusted. They stay where they are.
    pub damaged: Vec<DamagedFile>,
}

/// The journal of a node, in a directory of its own. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Journal {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    directory: PathBuf,
    active: PathBuf,
    history: History,
}

impl Journal {
    /// Opens the journal in `directory`, makes it where there is none, and reads what is there. Remembers the last `finished` migrations that
    /// ended. Blocks.
    ///
    /// # Errors
    ///
    /// Those of the file system, with the path. A damaged file is none, nor is a history that cannot be read: they are reported in
    /// [`Recovered::damaged`].
    pub fn open(directory: impl AsRef<Path>, finished: usize) -> io::Result<(Self, Recovered)> {
        let directory = directory.as_ref();
        let active = directory.join("active");
        create_dir_all(&active).map_err(at(&active))?;
        let history = History::new(directory.join(HISTORY), finished);
        let mut recovered = Recovered::default();
        // No slots are in doubt without it, and what ends from now on is put into it once it can be read.
        let (records, problem) = match history.load() {
            Ok((records, cut)) => (records, cut.map(|cut| cut.to_string())),
            Err(error) => (Vec::new(), Some(format!("cannot be read: {error}"))),
        };
        recovered.finished =
            records.iter().filter_map(|record| MigrationProgress::decode(record.as_slice()).ok()).collect();
        let unread = records.len() - recovered.finished.len();
        let unread = (unread > 0).then(|| {
            format!("{unread} of {} records match their checksums, and are no migrations", records.len())
        });
        recovered.damaged.extend(problem.into_iter().chain(unread).map(|problem| DamagedFile {
            file: HISTORY.to_owned(),
            slots: Vec::new(),
            problem,
            is_copy: false,
        }));
        let names = fs::read_dir(&active)
            .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.file_name())).collect());
        let mut names: Vec<_> = names.map_err(at(&active))?;
        names.sort();
        let mut doubtful = Vec::new();
        for name in names {
            let shown = name.to_string_lossy().into_owned();
            let path = active.join(&name);
            if shown.ends_with(".task.tmp") {
                // The process died while it replaced a file, which is whole. What cannot be removed is not of that, and in nobody's way.
                if let Err(error) = fs::remove_file(&path) {
                    tracing::warn!(file = file_shown(&name), %error, "cannot remove what is left of a replaced file");
                }
                continue;
            }
            let named = parse_name(&shown);
            let content = read(&path);
            // Whole, it says which slots are in doubt, whatever became of its name.
            let told = content.as_ref().ok().and_then(|record| Some((id_of(record)?, slots_of(record)?)));
            let read = match &named {
                None => Err("is not named like a migration".to_owned()),
                Some((slots, id)) => content.and_then(|record| consistent(record, *slots, id)),
            };
            match (read, named) {
                (Ok(record), Some((_, id))) => recovered.active.push((id, record)),
                (Ok(_), None) => {}
                (Err(problem), named) => {
                    doubtful.push((file_shown(&name), named.map(|(slots, _)| slots), told, problem));
                }
            }
        }
        for (file, named, told, problem) in doubtful {
            let original = told.as_ref().filter(|(id, slots)| {
                recovered.active.iter().any(|(other, record)| other == id && slots_of(record) == Some(*slots))
            });
            let damaged = match (named, original) {
                (None, Some((id, slots))) => DamagedFile {
                    problem: format!(
                        "is a copy of {}, which is whole: move it away",
                        Self::file_of(*slots, id)
                    ),
                    slots: Vec::new(),
                    is_copy: true,
                    file,
                },
                (named, original) => {
                    // Those of an original are its own.
                    let told = told.as_ref().filter(|_| original.is_none()).map(|(_, slots)| *slots);
                    let mut slots: Vec<_> = named.into_iter().chain(told).collect();
                    slots.dedup();
                    DamagedFile { file, slots, problem, is_copy: false }
                }
            };
            recovered.damaged.push(damaged);
        }
        let directory = directory.to_path_buf();
        Ok((Self { shared: Arc::new(Shared { directory, active, history }) }, recovered))
    }

    /// The name of a migration's file below the journal's directory, as in [`DamagedFile::file`].
    #[must_use]
    pub fn file_of(slots: SlotRange, id: &MigrationId) -> String {
        format!("{ACTIVE}{}", file_name(slots, id))
    }

    /// Moves a [damaged file](DamagedFile) to `dropped/`, durably, and returns its path there: the next start knows nothing of the migration, and
    /// its slots belong to whoever the store says owns them. What lies in `dropped/` already stays. For a node that does not run. Blocks.
    ///
    /// Whoever calls this knows from the target that the migration was discarded, or from the store that the slots were given up; otherwise both
    /// nodes may serve them.
    ///
    /// # Errors
    ///
    /// Those of the file system, with the path; of kind `NotFound` if no file of a migration is shown as `file`, `InvalidInput` if more than one is.
    pub fn set_aside(&self, file: &str) -> io::Result<PathBuf> {
        let Shared { directory, active, .. } = &*self.shared;
        // Looked for by what is shown of it: a name may hold what cannot be shown, and nothing but a name that is there is believed.
        let mut found = Vec::new();
        for entry in fs::read_dir(active).map_err(at(active))? {
            let name = entry.map_err(at(active))?.file_name();
            if file_shown(&name) == file {
                found.push(name);
            }
        }
        let name = match found.as_slice() {
            [name] => name,
            [] => {
                return Err(io::Error::new(io::ErrorKind::NotFound, "there is no such file of a migration"));
            }
            _ => return Err(io::Error::new(io::ErrorKind::InvalidInput, "more than one file is shown so")),
        };
        let dropped = directory.join("dropped");
        create_dir_all(&dropped).map_err(at(&dropped))?;
        let kept_as = free_path(&dropped, name).map_err(at(&dropped))?;
        fs::rename(active.join(name), &kept_as).map_err(at(&kept_as))?;
        sync_dir(&dropped).map_err(at(&dropped))?;
        sync_dir(active).map_err(at(active))?;
        Ok(kept_as)
    }

    /// Makes `record` what is known of `id`, durably and as a whole.
    ///
    /// Calls for one migration come one after the other. Not cancel safe: a dropped future leaves open which record is there.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`; the old or the new record is there. `INTERNAL` for a record of more than 4 MiB, which would not be read back: the old
    /// one is there.
    pub async fn save(&self, id: &MigrationId, slots: SlotRange, record: &SourceRecord) -> Result<(), Error> {
        let path = self.shared.active.join(file_name(slots, id));
        let content = KIND.seal(record);
        let bytes = content.len() - HEADER_LEN;
        if bytes > MAX_RECORD_BYTES {
            return Err(Reason::Internal.error(format!(
                "the record of migration {id} would have {bytes} bytes, more than any record"
            )));
        }
        let state = record.progress.as_ref().map(MigrationProgress::state).unwrap_or_default();
        reached("save.before", state);
        blocking("save a migration", move || write_atomic(path, &content)).await?;
        reached("save.after", state);
        Ok(())
    }

    /// Takes the record of a migration away, durably, if it is there: of one that has not begun, or that the history has.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`: a crash may leave it there. Call it again.
    pub(crate) async fn withdraw(&self, id: &MigrationId, slots: SlotRange) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        let path = shared.active.join(file_name(slots, id));
        blocking("drop the record of a migration", move || {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                // Where it is gone, an earlier call may have got no further.
                _ => sync_dir(&shared.active),
            }
        })
        .await
    }

    /// Puts a migration into this node that ended into the history. Its record is the store's; the journal may have one of another migration, out of this
    /// node, that has the same ID and the same slots.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`; call it again.
    pub async fn remember(&self, progress: &MigrationProgress) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        let content = progress.encode_to_vec();
        let state = progress.state();
        reached("finish.before", state);
        blocking("record a migration that ended", move || shared.history.add(&content)).await?;
        reached("finish.between", state);
        Ok(())
    }

    /// Puts a migration that ended into the history, and drops its record if it has one. Repeated after a crash.
    ///
    /// # Errors
    ///
    /// `STORAGE_FAILED`; call it again.
    pub async fn finish(
        &self,
        id: &MigrationId,
        slots: SlotRange,
        progress: &MigrationProgress,
    ) -> Result<(), Error> {
        self.remember(progress).await?;
        self.withdraw(id, slots).await
    }
}

async fn blocking(
    action: &'static str,
    work: impl FnOnce() -> io::Result<()> + Send + 'static,
) -> Result<(), Error> {
    // The log has the rest: a peer has no use for what the system says, which may name paths.
    let failed = |error: io::Error| {
        tracing::warn!(error = &error as &dyn std::error::Error, "cannot {action}");
        let sentence = format!("cannot {action}: {}; it is tried again", error.kind());
        Reason::StorageFailed.error(sentence).caused_by(error)
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(failed),
        Err(error) => Err(failed(io::Error::other(error))),
    }
}

/// An operator who reads of an error has to know where. Peers are told none of these.
fn at(path: &Path) -> impl Fn(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// How a file in `active/` is called for people, whatever its name holds.
fn file_shown(name: &OsStr) -> String {
    format!("{ACTIVE}{}", proto_common::text::printable(&name.to_string_lossy(), 200))
}

/// The migration of a record.
fn id_of(record: &SourceRecord) -> Option<MigrationId> {
    MigrationId::new(record.progress.as_ref()?.migration_id.as_str()).ok()
}

/// The slots of a record.
pub(crate) fn slots_of(record: &SourceRecord) -> Option<SlotRange> {
    SlotRange::from_wire(record.progress.as_ref()?.spec.as_ref()?.slots).ok()
}

fn file_name(slots: SlotRange, id: &MigrationId) -> String {
    format!("{:05}-{:05}.{id}.task", slots.start(), slots.end() - 1)
}

fn parse_name(name: &str) -> Option<(SlotRange, MigrationId)> {
    let (slots, id) = name.strip_suffix(".task")?.split_once('.')?;
    let (first, last) = slots.split_once('-')?;
    let number = |text: &str| (text.len() == 5).then(|| text.parse::<u16>().ok()).flatten();
    let slots = SlotRange::new(number(first)?, number(last)?.checked_add(1)?).ok()?;
    let id = MigrationId::new(id).ok()?;
    // Under any other name, such as one with +0099, it is never saved or withdrawn.
    (file_name(slots, &id) == name).then_some((slots, id))
}

fn read(path: &Path) -> Result<SourceRecord, String> {
    let found = fs::metadata(path).map_err(|error| error.to_string())?;
    // To open a pipe would wait for whoever writes into it.
    if !found.is_file() {
        return Err("is no file".to_owned());
    }
    let len = found.len();
    if len > (MAX_RECORD_BYTES + HEADER_LEN) as u64 {
        return Err(format!("has {len} bytes, more than any record"));
    }
    let file = fs::read(path).map_err(|error| error.to_string())?;
    KIND.open(&file)
}

/// A file that was renamed by hand would be believed for other slots.
fn consistent(record: SourceRecord, slots: SlotRange, id: &MigrationId) -> Result<SourceRecord, String> {
    let progress = record.progress.as_ref().ok_or("holds no progress")?;
    progress.spec.as_ref().ok_or("holds no specification")?;
    if progress.migration_id != id.as_str() || slots_of(&record) != Some(slots) {
        return Err("holds another migration than its name says".to_owned());
    }
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1;

    fn slots() -> SlotRange {
        SlotRange::new(100, 200).unwrap()
    }

    fn id(text: &str) -> MigrationId {
        MigrationId::new(text).unwrap()
    }

    fn progress(id: &str, attempt: u64) -> MigrationProgress {
        let spec = v1::MigrationSpec { slots: Some(slots().into()), ..Default::default() };
        MigrationProgress { migration_id: id.to_owned(), spec: Some(spec), attempt, ..Default::default() }
    }

    fn record(id: &str, attempt: u64) -> SourceRecord {
        SourceRecord { progress: Some(progress(id, attempt)), base_seq: 7, ..Default::default() }
    }

    #[tokio::test]
    async fn the_last_record_is_read_back_until_the_migration_ends() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, recovered) = Journal::open(dir.path(), 10).unwrap();
        assert!(recovered.active.is_empty());
        journal.save(&id("m1"), slots(), &record("m1", 1)).await.unwrap();
        journal.save(&id("m1"), slots(), &record("m1", 2)).await.unwrap();
        journal.save(&id("m2.tmp"), slots(), &record("m2.tmp", 9)).await.unwrap();
        // A crash while a file was replaced.
        fs::write(dir.path().join("active/00100-00199.m1.task.tmp"), b"half").unwrap();
        let (journal, recovered) = Journal::open(dir.path(), 10).unwrap();
        assert_eq!(recovered.damaged, []);
        assert_eq!(recovered.active, [(id("m1"), record("m1", 2)), (id("m2.tmp"), record("m2.tmp", 9))]);
        journal.finish(&id("m1"), slots(), &progress("m1", 3)).await.unwrap();
        journal.finish(&id("m1"), slots(), &progress("m1", 3)).await.unwrap();
        let (_, recovered) = Journal::open(dir.path(), 10).unwrap();
        assert_eq!(recovered.active.len(), 1);
        assert_eq!(recovered.finished.last(), Some(&progress("m1", 3)));
    }

    #[tokio::test]
    async fn the_end_of_one_into_this_node_drops_no_record_of_one_out_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path(), 10).unwrap();
        journal.save(&id("m1"), slots(), &record("m1", 2)).await.unwrap();
        journal.remember(&progress("m1", 1)).await.unwrap();
        let (_, recovered) = Journal::open(dir.path(), 10).unwrap();
        assert_eq!(recovered.active, [(id("m1"), record("m1", 2))]);
        assert_eq!(recovered.finished, [progress("m1", 1)]);
    }

    #[tokio::test]
    async fn a_damaged_file_is_set_aside_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path(), 10).unwrap();
        journal.save(&id("m1"), slots(), &record("m1", 1)).await.unwrap();
        let path = dir.path().join(Journal::file_of(slots(), &id("m1")));
        fs::write(&path, b"damaged").unwrap();
        let (journal, recovered) = Journal::open(dir.path(), 10).unwrap();
        let [damaged] = recovered.damaged.as_slice() else { panic!("{recovered:?}") };
        assert_eq!(damaged.migration_id(), Some(id("m1")));
        for none in
            ["m1", "active/../history", "active/", "active/..", "history", "active/00100-00199.m2.task"]
        {
            assert!(journal.set_aside(none).is_err(), "{none}");
        }
        let kept_as = journal.set_aside(&damaged.file).unwrap();
        assert_eq!(fs::read(kept_as).unwrap(), b"damaged");
        let (_, recovered) = Journal::open(dir.path(), 10).unwrap();
        assert!(recovered.damaged.is_empty() && recovered.active.is_empty(), "{recovered:?}");
    }

    #[tokio::test]
    async fn every_flipped_bit_and_every_cut_is_found_and_the_slots_are_known() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path(), 10).unwrap();
        journal.save(&id("m1"), slots(), &record("m1", 1)).await.unwrap();
        let path = dir.path().join("active/00100-00199.m1.task");
        let good = fs::read(&path).unwrap();
        for (how, content) in crate::sealed::damages(&good) {
            fs::write(&path, &content).unwrap();
            let (_, recovered) = Journal::open(dir.path(), 10).unwrap();
            assert_eq!(recovered.active, [], "{how}");
            let damaged = &recovered.damaged[0];
            assert_eq!(
                (damaged.file.as_str(), damaged.slots.as_slice()),
                ("active/00100-00199.m1.task", &[slots()][..]),
                "{how}"
            );
            assert_eq!(fs::read(&path).unwrap(), content, "what is damaged stays for whoever looks");
        }
    }

    #[tokio::test]
    async fn a_history_that_cannot_be_read_is_told_by_name_and_keeps_no_journal_shut() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path(), 10).unwrap();
        journal.save(&id("m1"), slots(), &record("m1", 1)).await.unwrap();
        let path = dir.path().join("history");
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        let (journal, recovered) = Journal::open(dir.path(), 10).unwrap();
        assert_eq!(recovered.active, [(id("m1"), record("m1", 1))]);
        assert_eq!(recovered.finished, []);
        let [damaged] = recovered.damaged.as_slice() else { panic!("{recovered:?}") };
        assert_eq!((damaged.file.as_str(), damaged.slots.as_slice()), ("history", &[][..]));
        assert!(damaged.problem.starts_with("cannot be read: "), "{damaged:?}");
        assert!(!damaged.is_of_a_migration());
        // What ends waits for somebody to put that right, and is added then.
        let failed = journal.finish(&id("m1"), slots(), &progress("m1", 1)).await.unwrap_err();
        assert!(failed.is(Reason::StorageFailed), "{failed:?}");
        fs::remove_dir(&path).unwrap();
        journal.finish(&id("m1"), slots(), &progress("m1", 1)).await.unwrap();
        let (_, recovered) = Journal::open(dir.path(), 10).unwrap();
        assert_eq!((recovered.finished, recovered.damaged), (vec![progress("m1", 1)], vec![]));
    }

    #[test]
    fn what_the_history_has_that_is_no_migration_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let history = History::new(dir.path().join(HISTORY), 10);
        history.add(&progress("m1", 1).encode_to_vec()).unwrap();
        history.add(b"\xff of something else").unwrap();
        let (_, recovered) = Journal::open(dir.path(), 10).unwrap();
        assert_eq!(recovered.finished, [progress("m1", 1)]);
        let [file] = recovered.damaged.as_slice() else { panic!("{recovered:?}") };
        assert_eq!(
            (file.file.as_str(), file.problem.as_str()),
            ("history", "1 of 2 records match their checksums, and are no migrations")
        );
    }

    #[test]
    fn a_history_whose_damage_cannot_be_set_aside_is_told_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("history");
        // A whole record of one byte, whose checksum is wrong.
        let damaged = [[1, 0, 0, 0].as_slice(), &[7; 9]].concat();
        fs::write(&path, &damaged).unwrap();
        fs::create_dir(dir.path().join("history.damaged")).unwrap();
        let (_, recovered) = Journal::open(dir.path(), 10).unwrap();
        let [file] = recovered.damaged.as_slice() else { panic!("{recovered:?}") };
        assert_eq!(file.file, "history");
        assert_eq!(fs::read(&path).unwrap(), damaged, "it stays");
    }

    #[test]
    fn what_keeps_a_journal_shut_is_told_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let active = dir.path().join("active");
        fs::write(&active, b"in the way").unwrap();
        let error = Journal::open(dir.path(), 10).unwrap_err();
        assert!(error.to_string().starts_with(active.to_str().unwrap()), "{error}");
    }

    #[tokio::test]
    async fn a_failure_names_no_path() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path(), 10).unwrap();
        fs::remove_dir(dir.path().join("active")).unwrap();
        fs::write(dir.path().join("active"), b"in the way").unwrap();
        fs::remove_file(dir.path().join("history")).unwrap();
        fs::create_dir(dir.path().join("history")).unwrap();
        let saved = journal.save(&id("m1"), slots(), &record("m1", 1)).await.unwrap_err();
        let finished = journal.finish(&id("m1"), slots(), &progress("m1", 1)).await.unwrap_err();
        for error in [saved, finished] {
            assert!(error.is(Reason::StorageFailed), "{error:?}");
            assert!(!error.message().contains('/'), "{error}");
        }
    }

    #[tokio::test]
    async fn a_file_that_was_renamed_is_not_believed_and_all_its_slots_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path(), 10).unwrap();
        let range = |start, end| SlotRange::new(start, end).unwrap();
        for (other, told) in [
            ("00300-00399.m1.task", vec![range(300, 400), slots()]),
            ("00100-00199.m9.task", vec![slots()]),
            ("+0100-00199.m1.task", vec![slots()]),
            ("notes.txt", vec![slots()]),
            (".00100-00199.m1.task.swp", vec![slots()]),
            ("\u{1b}[2J.task", vec![slots()]),
        ] {
            journal.save(&id("m1"), slots(), &record("m1", 1)).await.unwrap();
            fs::rename(dir.path().join("active/00100-00199.m1.task"), dir.path().join("active").join(other))
                .unwrap();
            let (_, recovered) = Journal::open(dir.path(), 10).unwrap();
            assert_eq!(recovered.active, [], "{other}");
            let [damaged] = recovered.damaged.as_slice() else { panic!("{other}: {recovered:?}") };
            assert_eq!(damaged.slots, told, "{other}");
            assert!(damaged.is_of_a_migration(), "{other}");
            // Whatever it is called, it can be set aside by the name that is shown.
            journal.set_aside(&damaged.file).unwrap();
            assert_eq!(fs::read_dir(dir.path().join("active")).unwrap().count(), 0, "{other}");
        }
        // Neither name nor content: nobody knows.
        fs::write(dir.path().join("active/notes.txt"), b"notes").unwrap();
        let (_, recovered) = Journal::open(dir.path(), 10).unwrap();
        assert_eq!(recovered.damaged[0].slots, []);
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn what_is_no_file_is_told_and_keeps_nobody_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path(), 10).unwrap();
        journal.save(&id("m1"), slots(), &record("m1", 1)).await.unwrap();
        let at = |name: &str| dir.path().join("active").join(name);
        let (here, mode) = (rustix::fs::CWD, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR);
        rustix::fs::mkfifoat(here, at("00300-00399.m3.task"), mode).unwrap();
        fs::create_dir(at("00400-00499.m4.task")).unwrap();
        std::os::unix::fs::symlink(dir.path(), at("00500-00599.m5.task")).unwrap();
        fs::create_dir(at("00600-00699.m6.task.tmp")).unwrap();
        let path = dir.path().to_owned();
        let opening = tokio::task::spawn_blocking(move || Journal::open(path, 10).unwrap());
        let (_, recovered) =
            tokio::time::timeout(std::time::Duration::from_secs(20), opening).await.unwrap().unwrap();
        assert_eq!(recovered.active, [(id("m1"), record("m1", 1))]);
        let told: Vec<_> =
            recovered.damaged.iter().map(|file| (file.slots[0].start(), &*file.problem)).collect();
        assert_eq!(told, [(300, "is no file"), (400, "is no file"), (500, "is no file")]);
        assert_eq!(fs::read_dir(dir.path().join("active")).unwrap().count(), 5, "all stay");
    }

    #[tokio::test]
    async fn what_was_set_aside_before_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, _) = Journal::open(dir.path(), 10).unwrap();
        let file = Journal::file_of(slots(), &id("m1"));
        let kept: Vec<_> = ["first", "second", "third"]
            .map(|content| {
                fs::write(dir.path().join(&file), content).unwrap();
                (journal.set_aside(&file).unwrap(), content)
            })
            .into();
        for (path, content) in kept {
            assert_eq!(fs::read_to_string(path).unwrap(), content);
        }
    }
}
