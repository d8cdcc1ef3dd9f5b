//! What an earlier process left: read with suspicion. Damage to one file costs what that file says and nothing else.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use proto_common::durable::{RecordLog, sync_dir, write_atomic};
use proto_common::ids::{ShardId, TransferId};
use proto_common::path::FileName;

use crate::spec::TransferPlan;
use crate::store::{Claim, Recovered, StagingState, StoreError};

use super::install::{all_names, names};
use super::layout::{Area, CURRENT, MANIFEST_SUFFIX};
use super::record::{self, ClaimRecord, Kind, PlanRecord, SealedRecord, Shard, ShardRecord};
use super::runs::Durable;
use super::space::Amount;
use super::staging::{FileStaging, Parts, read_records};
use super::write::{FileSpace, dirs_on_disk, needed, no_link_at, open_file};
use super::{Shared, exists, lock, unix_ms};

/// Damaged staging areas that are kept for a look at them, without their files.
const QUARANTINED: usize = 16;

/// Names that are nothing of the store's and told of one by one.
const STRAYS: usize = 16;

/// Damaged files and records of a staging area that are told of one by one: there may be 131,072, and the rest of the log is needed, too.
const WRONG: usize = 16;

/// What is wrong with a staging area that can be used all the same.
#[derive(Default)]
struct Wrong {
    named: Vec<String>,
    more: usize,
}

impl Wrong {
    fn put(&mut self, what: String) {
        if self.named.len() < WRONG {
            self.named.push(what);
        } else {
            self.more += 1;
        }
    }
}

/// A staging area that cannot be used, and why.
enum Unusable {
    /// Its files are damaged.
    Damaged(String),
    Failed(StoreError),
}

impl From<StoreError> for Unusable {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Damaged { .. } => Self::Damaged(error.to_string()),
            error => Self::Failed(error),
        }
    }
}

fn failed(error: io::Error) -> StoreError {
    StoreError::io("read what is staged", error)
}

impl Shared {
    pub(super) fn recover(self: &Arc<Self>) -> Result<Recovered<FileStaging>, StoreError> {
        let mut damage = lock(&self.repaired).take().into_iter().collect::<Vec<_>>();
        let mut staged = Vec::new();
        let root = self.layout.staging_root();
        let mut half = Vec::new();
        // Those that end here: what is left of them tells nothing of their shards.
        let mut ended = HashSet::new();
        // What is found here may be there in memory only: the process that made it may have been killed before it synced that.
        sync_dir(&root).map_err(|error| self.failed_at(&root, &error))?;
        for name in self.names_in(&root)? {
            if let Some(id) = name.strip_prefix(".new.").or_else(|| name.strip_prefix(".gone.")) {
                half.push((id.to_owned(), name));
                continue;
            }
            let Ok(id) = TransferId::new(&name) else { continue };
            match self.recover_staging(&id, &mut damage) {
                Ok(staging) => {
                    lock(&self.live).insert(id);
                    staged.push(Arc::new(staging));
                }
                // The disk may answer tomorrow, so it is not thrown away.
                Err(Unusable::Failed(error)) => damage.push(self.block(&name, &name, &error)),
                Err(Unusable::Damaged(what)) => match self.quarantine(&id) {
                    Ok(()) => {
                        damage.push(format!("staging/{id} was set aside: {what}"));
                        ended.insert(id);
                    }
                    Err(error) => {
                        damage.push(format!("staging/{id}: {what}"));
                        damage.push(self.block(&name, &name, &failed(error)));
                    }
                },
            }
        }
        // Now that all are known whose files must stay. Until they are removed, those that were placed and never current are under way.
        let is_removed = |(id, name): &(String, String)| {
            let id = TransferId::new(id).ok().filter(|_| name.starts_with(".gone."))?;
            lock(&self.live).insert(id.clone()).then_some(id)
        };
        let removed: HashSet<TransferId> = half.iter().filter_map(is_removed).collect();
        // Before anything of a shard is removed.
        self.doubt_shards(&ended, &mut damage)?;
        for (id, name) in half {
            if let Err(error) = self.finish_removal(&name, &removed) {
                damage.push(self.block(&id, &name, &error));
            } else if let Ok(id) = TransferId::new(&id)
                && removed.contains(&id)
            {
                lock(&self.live).remove(&id);
                ended.insert(id);
            }
        }
        for name in self.names_in(&self.layout.shards_root())? {
            if let Ok(shard) = ShardId::new(&name)
                && let Err(error) = self.recover_shard(&shard, &ended, &mut damage)
            {
                damage.push(format!("shards/{shard} cannot be used: {}", described(&error)));
            }
        }
        for name in self.names_in(&self.layout.installed_root())? {
            if let Ok(shard) = ShardId::new(&name)
                && let Err(error) = self.report_unclaimed(&shard, &mut damage)
            {
                damage.push(format!("installed/{shard} cannot be read: {}", described(&error)));
            }
        }
        let strays = self.strays()?;
        for stray in strays.iter().take(STRAYS) {
            damage.push(format!("{stray:?} is nothing of the store's; it was left alone"));
        }
        if let Some(more) = strays.len().checked_sub(STRAYS).filter(|more| *more > 0) {
            damage.push(format!("{more} more names in {:?} are nothing of the store's", self.layout.root()));
        }
        let (finished, cut) = self.history.load().unwrap_or_else(|error| {
            damage.push(format!("history cannot be read: {error}"));
            Default::default()
        });
        damage.extend(cut.map(|cut| format!("history: {cut}")));
        Ok(Recovered { staged, finished, damage })
    }

    fn names_in(&self, dir: &Path) -> Result<Vec<String>, StoreError> {
        names(dir).map_err(|error| self.failed_at(dir, &error))
    }

    /// What nothing goes on without, so the log has to say where it is.
    fn failed_at(&self, path: &Path, error: &io::Error) -> StoreError {
        failed(at(&self.layout.shown(path), error))
    }

    /// Removes what was half made, or half removed with all that belongs to it.
    fn finish_removal(&self, name: &str, removed: &HashSet<TransferId>) -> Result<(), StoreError> {
        let dir = self.layout.staging_root().join(name);
        no_link_at(&dir).map_err(failed)?;
        // Files of the store's layout, so those of a snapshot cannot be mistaken for it. Once it is deleted, the rest was.
        let meta = record::read::<PlanRecord>(&self.layout, &Area::new(dir.clone()).meta(), Kind::Meta);
        if name.starts_with(".gone.")
            && let Some((plan, _)) = meta.ok().flatten().and_then(PlanRecord::decode_plan)
            && removed.contains(&plan.spec.transfer_id)
        {
            self.discard(&plan.spec.target_shard, &plan.spec.transfer_id)?;
        }
        fs::remove_dir_all(dir).map_err(failed)
    }

    /// Leaves `staging/<name>` as it is and refuses new transfers of that ID, so that they do not fall over it. Returns what to
    /// say about it.
    fn block(&self, id: &str, name: &str, error: &StoreError) -> String {
        let what = format!("cannot be used: {}", described(error));
        let said = format!("staging/{name} {what}; it was left as it is, and its ID is refused");
        if let Ok(id) = TransferId::new(id) {
            // What may be installed of it is kept, too.
            lock(&self.live).insert(id.clone());
            lock(&self.blocked).insert(id, (format!("staging/{name}"), what));
        }
        said
    }

    fn recover_staging(
        self: &Arc<Self>,
        id: &TransferId,
        damage: &mut Vec<String>,
    ) -> Result<FileStaging, Unusable> {
        let area = Area::new(self.layout.staging(id));
        let shown = |path: &Path| self.layout.shown(path);
        // What is found to be damaged is deleted, and the log of records is cut: never where a link leads.
        no_link_at(&area.dir).map_err(failed)?;
        if is_link(&area.records()).map_err(failed)? {
            let error = io::Error::other(format!("{} is a link", shown(&area.records())));
            return Err(Unusable::Failed(failed(error)));
        }
        let meta: Option<PlanRecord> = record::read(&self.layout, &area.meta(), Kind::Meta)?;
        let plan = meta.and_then(PlanRecord::decode_plan).map(|(plan, _)| plan);
        let plan = plan.filter(|plan| plan.spec.transfer_id == *id);
        let plan = plan
            .ok_or_else(|| Unusable::Damaged(format!("{} is missing or of another", shown(&area.meta()))))?;
        let claim: Option<ClaimRecord> = record::read(&self.layout, &area.claim(), Kind::Claim)?;
        let claim = match claim {
            None => Claim { attempt: 0, session: [0; 16] },
            Some(claim) => claim.claim(id).ok_or_else(|| {
                Unusable::Damaged(format!("{} is of another transfer", shown(&area.claim())))
            })?,
        };
        let target = self.layout.installed(&plan.spec.target_shard, id);
        let placed = !exists(&area.tree).map_err(failed)? && exists(&target).map_err(failed)?;
        // The log of a placed snapshot no longer matters, but it is there. Opening it syncs the directory: the tree, the claim and the
        // seal, too, may have been there in memory only, and what is acknowledged from here on needs them.
        let (mut log, records, cut) = RecordLog::open(area.records()).map_err(failed)?;
        let (mut wrong, in_log) = (Wrong::default(), shown(&area.records()));
        if let Some(cut) = cut {
            wrong.put(format!("{in_log}: {cut}"));
        }
        let mut durable = read_records(&plan, &records, |what| wrong.put(format!("{in_log}: {what}")));
        let found = Found::look(&plan, &area).map_err(failed)?;
        if !placed
            && found.drop_missing(&plan, &mut durable, |what| wrong.put(format!("staging/{id}: {what}")))
        {
            let all = durable.records();
            log.rewrite(record::encode_extents(&all)).map_err(failed)?;
        }
        damage.append(&mut wrong.named);
        if wrong.more > 0 {
            damage.push(format!("staging/{id}: {} more of its files or records are damaged", wrong.more));
        }
        let state = self.recover_state(&area, &plan, placed, &found, damage)?;
        let current = self
            .read_shard(&plan.spec.target_shard)
            .is_ok_and(|shard| shard.state.current.as_ref() == Some(id) || shard.previous.contains(id));
        let (promised, outstanding) = match (current, placed) {
            (true, _) => Default::default(),
            (false, true) => (found.promised(&plan).0, Amount::default()),
            (false, false) => found.promised(&plan),
        };
        let parts = Parts {
            last_activity: modified_unix_ms(&area.records()),
            reservation: self.space.adopt(&plan.spec.source_node, promised, outstanding),
            space: found.space,
            dirs: found.dirs,
            plan,
            area,
            state,
            claim,
            // There may be many, and most are never gone on with.
            log: None,
            inherited: true,
            durable,
        };
        Ok(FileStaging::open(self, parts)?)
    }

    /// Whether the area was sealed. A seal that cannot be believed is taken back: the sender is asked for the totals again.
    fn recover_state(
        &self,
        area: &Area,
        plan: &TransferPlan,
        placed: bool,
        found: &Found,
        damage: &mut Vec<String>,
    ) -> Result<StagingState, Unusable> {
        let path = area.sealed();
        let shown = self.layout.shown(&path);
        let problem = match record::read::<SealedRecord>(&self.layout, &path, Kind::Sealed) {
            Ok(None) => None,
            Ok(Some(sealed)) => {
                let complete = sealed.totals(&plan.spec.transfer_id).is_some_and(|totals| {
                    let mut files = totals.iter().zip(&found.sizes);
                    totals.len() == plan.manifest.files().len()
                        && (placed || files.all(|(total, size)| *size == Some(total.size)))
                });
                if complete {
                    return Ok(StagingState::Sealed);
                }
                Some(format!("{shown} does not match the files, or is of another transfer"))
            }
            Err(StoreError::Damaged { what, .. }) => Some(format!("{shown} {what}")),
            Err(error) => return Err(Unusable::Failed(error)),
        };
        if placed || !(found.tree || problem.is_none()) {
            return Err(Unusable::Damaged(
                problem.unwrap_or_else(|| format!("its files were moved, but {shown} is missing")),
            ));
        }
        if let Some(problem) = problem {
            damage.push(format!("{problem}; it is taken back"));
            fs::remove_file(&path).and_then(|()| sync_dir(&area.dir)).map_err(failed)?;
        }
        Ok(StagingState::Open)
    }

    /// Sets the records of a staging area aside and deletes its files, which are nothing without them.
    fn quarantine(&self, id: &TransferId) -> io::Result<()> {
        let area = Area::new(self.layout.staging(id));
        no_link_at(&area.dir)?;
        self.trash.take(&area.tree)?;
        self.trash.take(&area.reuse())?;
        let dir = self.layout.quarantine();
        // One that was set aside in the same millisecond, or after the clock was set back, is in the way.
        let place = |at: u64| dir.join(format!("{at:016x}.{id}"));
        let mut at = unix_ms();
        while exists(&place(at))? {
            at += 1;
        }
        fs::rename(&area.dir, place(at))?;
        sync_dir(&dir)?;
        sync_dir(self.layout.staging_root())?;
        let mut kept = names(&dir)?;
        kept.sort_unstable();
        for oldest in kept.iter().take(kept.len().saturating_sub(QUARANTINED)) {
            self.trash.take(&dir.join(oldest))?;
        }
        Ok(())
    }

    /// Finds shards whose record is whole and wrong. They are refused, and nothing of them is removed. What cannot be read is told of where the shard is recovered.
    fn doubt_shards(&self, ended: &HashSet<TransferId>, damage: &mut Vec<String>) -> Result<(), StoreError> {
        let root = self.layout.shards_root();
        for name in all_names(&root).map_err(|error| self.failed_at(&root, &error))? {
            let dir = root.join(&name);
            if no_link_at(&dir).is_err() {
                continue;
            }
            let path = dir.join(CURRENT);
            let found = record::read::<ShardRecord>(&self.layout, &path, Kind::Shard);
            let Some((shard, found)) =
                found.ok().flatten().and_then(|found| Some((found.shard_id()?, found)))
            else {
                continue;
            };
            let is_elsewhere = *name != *shard.as_str();
            let own = is_elsewhere
                .then(|| record::read::<ShardRecord>(&self.layout, &self.layout.current(&shard), Kind::Shard))
                .and_then(|own| own.ok().flatten()?.shard(shard.as_str()));
            if own.is_some() {
                damage.push(format!(
                    "{} is the record of shard {shard}, in the place of another; shard {shard} has its own, and goes by that",
                    self.layout.shown(&path)
                ));
            } else if is_elsewhere {
                // A flipped bit in the name of its directory leaves a shard without one: that would be a new shard.
                let what = format!("is the record of shard {shard}, in the place of another");
                let error = self.doubt(&shard, self.layout.shown(&path), what);
                damage.push(format!(
                    "{error}; transfers to shard {shard} are refused until a start finds it in shards/{shard}"
                ));
            } else if let Some(known) = found.shard(shard.as_str()) {
                self.doubt_old_record(&shard, &known, ended, damage);
            }
        }
        Ok(())
    }

    /// A record from a backup, or one whose replacement was lost, is whole. What was installed after it lies beside it, and is neither under way nor of those that
    /// ended here without becoming current.
    fn doubt_old_record(
        &self,
        shard: &ShardId,
        known: &Shard,
        ended: &HashSet<TransferId>,
        damage: &mut Vec<String>,
    ) {
        let Ok(unclaimed) = self.unclaimed(shard) else { return };
        let counted =
            |id: &TransferId| known.state.current.as_ref() == Some(id) || known.previous.contains(id);
        for id in unclaimed.filter(|id| !ended.contains(id) && !counted(id)) {
            let manifest = self.layout.shown(&self.layout.manifest(shard, &id));
            let (file, what) = match self.read_manifest(shard, &id) {
                Ok(Some((plan, _))) if Some(plan.spec.point) > known.state.high_water => {
                    let current = self.layout.shown(&self.layout.current(shard));
                    (current, format!("is older than {manifest} beside it"))
                }
                Ok(_) => continue,
                // Nothing but the record tells of it then, and that is whole.
                Err(error @ StoreError::Damaged { .. }) => {
                    damage.push(format!("{error}; it is not that of the current snapshot"));
                    continue;
                }
                Err(error) => (
                    manifest.clone(),
                    format!(
                        "cannot be read, and may be newer than the record of its shard: {}",
                        described(&error)
                    ),
                ),
            };
            let error = self.doubt(shard, file, what);
            damage.push(format!(
                "{error}; transfers to shard {shard} are refused until a start finds that repaired, or all of shards/{shard} removed, or {manifest} if what that tells of was never current"
            ));
            return;
        }
    }

    /// Refuses `shard` from here on. Returns what it is refused with.
    fn doubt(&self, shard: &ShardId, file: String, what: String) -> StoreError {
        lock(&self.doubted).insert(shard.clone(), (file.clone(), what.clone()));
        StoreError::ShardDamaged { shard: shard.clone(), file, what }
    }

    fn is_doubted(&self, shard: &ShardId) -> bool {
        lock(&self.doubted).contains_key(shard)
    }

    /// Indexes what is installed, and moves away what an interrupted removal left.
    fn recover_shard(
        &self,
        shard: &ShardId,
        ended: &HashSet<TransferId>,
        damage: &mut Vec<String>,
    ) -> Result<(), StoreError> {
        let _shard = lock(self.shard_lock(shard));
        if self.is_doubted(shard) {
            return Ok(());
        }
        if !exists(&self.layout.current(shard)).map_err(failed)? {
            // A first transfer that was placed, and whose staging area was damaged then: nothing of the shard was lost.
            for id in self.unclaimed(shard)?.filter(|id| ended.contains(id)) {
                fs::remove_file(self.layout.manifest(shard, &id)).map_err(failed)?;
                sync_dir(self.layout.shard(shard)).map_err(failed)?;
            }
        }
        let mut known = match self.read_shard(shard) {
            Ok(known) => known,
            Err(error @ StoreError::ShardDamaged { .. }) => {
                damage.push(format!(
                    "{error}; transfers to shard {shard} are refused until it is repaired, or all of shards/{shard} is removed"
                ));
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        for (counts, source) in [(&self.named, &known.named_by), (&self.installed, &known.installed_by)] {
            if let Some(source) = source {
                *lock(counts).entry(source.clone()).or_default() += 1;
            }
        }
        if !exists(&self.layout.current(shard)).map_err(failed)? {
            return Ok(());
        }
        self.prune(shard, &known, None)?;
        let forgotten = |id: &TransferId| !lock(&self.live).contains(id);
        if known.state.superseded.iter().any(forgotten) {
            known.state.superseded.retain(|id| !forgotten(id));
            self.write_shard(shard, &known)?;
        }
        if let Some(id) = &known.state.current {
            let dir = self.layout.installed(shard, id);
            // One whose files were discarded is empty.
            if !exists(&dir).map_err(failed)? {
                damage.push(format!(
                    "{} is missing, and with it the files of the snapshot that is current",
                    self.layout.shown(&dir)
                ));
            }
        }
        let mut current = known.state.current.clone();
        for name in names(&self.layout.shard(shard)).map_err(failed)? {
            let Some(id) = name.strip_suffix(MANIFEST_SUFFIX).and_then(|id| TransferId::new(id).ok()) else {
                continue;
            };
            // Those of transfers under way are added when they become current.
            if known.state.current.as_ref() != Some(&id) && !known.previous.contains(&id) {
                continue;
            }
            current = current.filter(|current| *current != id);
            match self.read_manifest(shard, &id) {
                // Its files may have been discarded.
                Ok(Some(_)) if names(&self.layout.installed(shard, &id)).map_err(failed)?.is_empty() => {}
                Ok(Some((plan, totals))) => self.add_installed(&plan, &totals),
                Ok(None) => {}
                Err(error @ StoreError::Damaged { .. }) => {
                    damage.push(format!("{error}; files of that snapshot are not reused"));
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(id) = current {
            let manifest = self.layout.shown(&self.layout.manifest(shard, &id));
            damage.push(format!("{manifest} is missing; files of that snapshot are not reused"));
        }
        Ok(())
    }

    /// What has a name that the store gives to nothing, by its path in it: a flipped bit makes one of what it has named.
    fn strays(&self) -> Result<Vec<PathBuf>, StoreError> {
        let is_shard = |name: &str| ShardId::new(name).is_ok();
        let is_transfer = |name: &str| TransferId::new(name).is_ok();
        let is_staging =
            |name: &str| is_transfer(name) || name.starts_with(".new.") || name.starts_with(".gone.");
        // With what a crash leaves of one that was being written.
        let is_record = |name: &str| {
            let name = name.strip_suffix(".tmp").unwrap_or(name);
            name == CURRENT || name.strip_suffix(MANIFEST_SUFFIX).is_some_and(is_transfer)
        };
        let mut strays = Vec::new();
        let mut look = |dir: &Path, is_known: &dyn Fn(&str) -> bool| -> io::Result<Vec<PathBuf>> {
            let mut known = Vec::new();
            for name in all_names(dir)? {
                let path = dir.join(&name);
                if name.to_str().is_some_and(is_known) {
                    known.push(path);
                } else {
                    strays.push(path.strip_prefix(self.layout.root()).unwrap_or(&path).to_owned());
                }
            }
            Ok(known)
        };
        let staging = self.layout.staging_root();
        look(&staging, &is_staging).map_err(|error| self.failed_at(&staging, &error))?;
        let is_below: [&dyn Fn(&str) -> bool; 2] = [&is_record, &is_transfer];
        let roots = [self.layout.shards_root(), self.layout.installed_root()];
        for (root, is_known) in roots.into_iter().zip(is_below) {
            for dir in look(&root, &is_shard).map_err(|error| self.failed_at(&root, &error))? {
                // One that is a link, or cannot be read, is told of with its shard.
                if no_link_at(&dir).is_ok() {
                    let _ = look(&dir, is_known);
                }
            }
        }
        Ok(strays)
    }

    /// Without a `CURRENT` record nothing tells what is installed: a first transfer under way, or a lost record.
    fn report_unclaimed(&self, shard: &ShardId, damage: &mut Vec<String>) -> Result<(), StoreError> {
        if self.is_doubted(shard) || exists(&self.layout.current(shard)).map_err(failed)? {
            return Ok(());
        }
        for name in names(&self.layout.installed_shard(shard)).map_err(failed)? {
            if TransferId::new(&name).is_ok_and(|id| !lock(&self.live).contains(&id)) {
                damage.push(format!(
                    "installed/{shard}/{name} is not current and no transfer's; it was left alone"
                ));
            }
        }
        Ok(())
    }
}

/// What lies in the tree of a staging area.
struct Found {
    tree: bool,
    /// Length of each file, by number.
    sizes: Vec<Option<u64>>,
    space: Vec<FileSpace>,
    dirs: HashSet<PathBuf>,
}

impl Found {
    fn look(plan: &TransferPlan, area: &Area) -> io::Result<Self> {
        let tree = exists(&area.tree)?;
        let mut found = Self { tree, sizes: Vec::new(), space: Vec::new(), dirs: HashSet::new() };
        let mut absent = HashSet::new();
        for file in plan.manifest.files() {
            let path = area.tree.join(file.name.as_str());
            let metadata = match tree.then(|| fs::symlink_metadata(&path)) {
                Some(Ok(metadata)) if metadata.is_file() => Some(metadata),
                Some(Ok(_)) => return Err(not_ours("a file", &file.name)),
                Some(Err(error)) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => None,
            };
            found.sizes.push(metadata.as_ref().map(fs::Metadata::len));
            found.space.push(match &metadata {
                Some(metadata) => {
                    FileSpace::found(file, metadata.len(), metadata.blocks().saturating_mul(512))
                }
                None => FileSpace::new(file),
            });
            let mut dir = path.parent();
            while let Some(at) = dir.filter(|at| at.starts_with(&area.tree) && !found.dirs.contains(*at)) {
                if absent.contains(at) {
                    break;
                }
                match fs::symlink_metadata(at) {
                    Ok(metadata) if metadata.is_dir() => found.dirs.insert(at.to_owned()),
                    Ok(_) => return Err(not_ours("a directory", &file.name)),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => absent.insert(at.to_owned()),
                    Err(error) => return Err(error),
                };
                dir = at.parent();
            }
        }
        Ok(found)
    }

    /// Drops records of bytes that are not there, and says so of each file; whether there were any.
    fn drop_missing(
        &self,
        plan: &TransferPlan,
        durable: &mut Durable,
        mut damage: impl FnMut(String),
    ) -> bool {
        let mut dropped = false;
        for ((number, file), size) in plan.manifest.numbered().zip(&self.sizes) {
            let Some(extents) = durable.get_mut(number) else { continue };
            let size = size.unwrap_or(0);
            let beyond: Vec<u64> = extents
                .iter()
                .filter(|(offset, len, _)| offset + len > size)
                .map(|(offset, ..)| offset)
                .collect();
            if let Some(first) = beyond.first() {
                damage(format!(
                    "tree/{} has {size} bytes, less than was recorded from {first} on; that is asked for again",
                    file.name
                ));
                dropped = true;
            }
            for offset in beyond {
                extents.remove(offset);
            }
        }
        dropped
    }

    /// What is promised, and what of it is still to be written.
    fn promised(&self, plan: &TransferPlan) -> (Amount, Amount) {
        let dirs = plan.manifest.directories().count;
        // The tree is one of those found, if there are any, and none of the promised.
        let made = (self.dirs.len() as u64).saturating_sub(1);
        let dirs_left = dirs.saturating_sub(made);
        let files_left = self.sizes.iter().filter(|size| size.is_none()).count() as u64;
        let outstanding = Amount {
            bytes: FileSpace::sum(&self.space).saturating_add(dirs_on_disk(dirs_left)),
            files: files_left.saturating_add(dirs_left),
        };
        let sizes = plan.manifest.files().iter().zip(&self.space);
        let sizes = sizes.map(|(file, space)| file.size.unwrap_or(space.granted()));
        (needed(sizes, dirs).max(outstanding), outstanding)
    }
}

fn is_link(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Ok(found) => Ok(found.is_symlink()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Something else lies where the store makes nothing but files and directories. Through a symbolic link it would write wherever that leads.
fn not_ours(what: &str, name: &FileName) -> io::Error {
    io::Error::other(format!("something else than {what} lies in the place of tree/{name}"))
}

/// With what the system answered.
pub(super) fn described(error: &StoreError) -> String {
    match error {
        StoreError::Io { action, source } => format!("failed to {action}: {source}"),
        error => error.to_string(),
    }
}

fn modified_unix_ms(path: &Path) -> u64 {
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let since = modified.and_then(|modified| modified.duration_since(UNIX_EPOCH).ok());
    since.map_or_else(unix_ms, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// `error`, with the path that it is about below the store's directory: for the log, peers get the kind of an error alone.
pub(super) fn at(path: &str, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{path}: {error}"))
}

/// Says which layout the directory has, or makes sure that it is ours. Returns what to say about the file if it was damaged; it is whole again then.
///
/// # Errors
///
/// [`StoreError::Damaged`] if it names another version. A flipped bit can make another digit of ours, too: nobody can tell that from a store that is not to
/// be touched.
pub(super) fn check_format(path: &Path) -> Result<Option<String>, StoreError> {
    const NAME: &[u8] = b"node snapshot store ";
    const VERSION: &[u8] = b"1";
    const END: &[u8] = b"\n";
    /// More than any version has written.
    const MAX_LEN: u64 = 64;
    let write = |action| {
        write_atomic(path, &[NAME, VERSION, END].concat())
            .map_err(|error| StoreError::io(action, at("FORMAT", &error)))
    };
    let mut found = Vec::new();
    match open_file(path).and_then(|file| file.take(MAX_LEN).read_to_end(&mut found)) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return write("make a store").map(|()| None),
        Err(error) => return Err(StoreError::io("open a store", at("FORMAT", &error))),
    }
    let version = found.strip_prefix(NAME).unwrap_or_default();
    let digits = version.iter().take_while(|byte| byte.is_ascii_digit()).count();
    match version.split_at(digits) {
        (VERSION, END) => Ok(None),
        ([], _) | (VERSION, _) => {
            write("repair a store")?;
            Ok(Some("FORMAT did not say what a store writes there; it was written anew".to_owned()))
        }
        (other, _) => Err(StoreError::Damaged {
            file: "FORMAT".to_owned(),
            what: format!(
                "names layout {}, which this version does not know",
                String::from_utf8_lossy(other)
            ),
        }),
    }
}
