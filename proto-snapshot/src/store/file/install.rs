//! From staged to current: seal, place, activate, perhaps discard, remove. Each does nothing where its work is done, so that a crash between any two of
//! their steps is repaired by doing all of them again.

use std::collections::HashSet;
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::Arc;

use proto_common::durable::sync_dir;
use proto_common::ids::{ShardId, TransferId};

use crate::extent::Extent;
use crate::spec::FileTotal;
use crate::store::{PlacedSnapshot, StoreError};

use super::layout::MANIFEST_SUFFIX;
use super::record::{self, Kind, SealedRecord, Shard, ShardRecord};
use super::recover::at;
use super::space::Amount;
use super::staging::{Gate, Inner};
use super::write::{no_link, no_link_at};
use super::{Shared, exists, lock, uncount};

impl Inner {
    pub(super) fn seal(&self, totals: &[FileTotal]) -> Result<(), StoreError> {
        let mut gate = self.exclusive();
        match *gate {
            Gate::Open => {}
            Gate::Sealed => return Ok(()),
            Gate::Removed => {
                return Err(StoreError::invalid("seal a snapshot", "its staging area was removed"));
            }
        }
        if totals.len() != self.plan.manifest.files().len() {
            return Err(StoreError::invalid("seal a snapshot", "there is not one total per file"));
        }
        let mut state = self.lock_state();
        self.make_dirs(&mut state, &self.area.tree)?;
        drop(state);
        let records = lock(&self.records);
        for ((number, file), total) in self.plan.manifest.numbered().zip(totals) {
            // All that is in a file of known size was written by this process, not beyond its end, and is durable: one of many small files
            // need not be looked at.
            let known = !self.inherited && file.size == Some(total.size) && total.size > 0;
            if !(known && records.has_whole(number, total.size)) {
                self.complete(number, total)?;
            }
        }
        drop(records);
        self.flush()?;
        if !self.lock_state().lost.is_empty() {
            return Err(StoreError::invalid("seal a snapshot", "bytes may be lost since a sync failed"));
        }
        record::write_totals(&self.area.sealed(), &self.plan.spec.transfer_id, totals)
            .map_err(|error| StoreError::io("seal a snapshot", error))?;
        *lock(&self.totals) = Some(totals.into());
        self.shared.handles.forget_area(self.serial);
        self.reservation.consume(Amount::ALL);
        *gate = Gate::Sealed;
        Ok(())
    }

    /// Creates the file if it is empty, and checks its length.
    fn complete(&self, number: u32, total: &FileTotal) -> Result<(), StoreError> {
        let path = self.path(number)?;
        let len = match std::fs::symlink_metadata(&path) {
            Ok(found) => found.len(),
            Err(error) if error.kind() == io::ErrorKind::NotFound && total.size == 0 => {
                self.open_file(number)?;
                self.lock_state().dirty.add(Extent { file: number, offset: 0, len: 0 });
                0
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(self.damaged(&path, "is missing"));
            }
            Err(error) => return Err(StoreError::io("seal a snapshot", error)),
        };
        if len < total.size {
            return Err(self.damaged(&path, format!("has {len} bytes of {}", total.size)));
        }
        if len > total.size {
            // Written before a crash and never recorded: not part of what was agreed on.
            let file = no_link().write(true).open(&path);
            file.and_then(|file| file.set_len(total.size))
                .map_err(|error| StoreError::io("seal a snapshot", error))?;
            self.lock_state().dirty.add(Extent { file: number, offset: 0, len: 0 });
        }
        Ok(())
    }

    pub(super) fn place(&self) -> Result<PlacedSnapshot, StoreError> {
        const ACTION: &str = "put a snapshot in place";
        let gate = self.exclusive();
        if *gate != Gate::Sealed {
            return Err(StoreError::invalid(ACTION, "it is not sealed"));
        }
        let totals = self.totals()?;
        let (shared, spec) = (&*self.shared, &self.plan.spec);
        let (shard, id) = (&spec.target_shard, &spec.transfer_id);
        let _shard = lock(shared.shard_lock(shard));
        let known = shared.read_shard(shard)?;
        let failed = |error| StoreError::io(ACTION, error);
        let target = shared.layout.installed(shard, id);
        if known.state.superseded.contains(id) {
            return Ok(PlacedSnapshot { path: Some(target), plan: self.plan.clone() });
        }
        self.refuse_stale(&known)?;
        for dir in [shared.layout.installed_shard(shard), shared.layout.shard(shard)] {
            make_dir(&dir).map_err(|error| failed(at(&shared.layout.shown(&dir), &error)))?;
        }
        let manifest = shared.layout.manifest(shard, id);
        record::write_plan(&manifest, Kind::Manifest, &self.plan, &totals).map_err(failed)?;
        if exists(&self.area.tree).map_err(failed)? {
            if known.state.current.as_ref() == Some(id) {
                return Err(StoreError::invalid(ACTION, "a snapshot of this ID is current already"));
            }
            // A transfer of this ID that nobody remembers left it.
            shared.trash.take(&target).map_err(failed)?;
            std::fs::rename(&self.area.tree, &target).map_err(failed)?;
        } else if !exists(&target).map_err(failed)? {
            return Err(self.damaged(&self.area.tree, "is missing"));
        }
        // Also when it was moved before: the last call may have failed right here.
        sync_dir(shared.layout.installed_shard(shard)).map_err(failed)?;
        sync_dir(&self.area.dir).map_err(failed)?;
        Ok(PlacedSnapshot { path: Some(target), plan: self.plan.clone() })
    }

    pub(super) fn activate(&self) -> Result<(), StoreError> {
        const ACTION: &str = "make a snapshot current";
        let gate = self.exclusive();
        if *gate != Gate::Sealed {
            return Err(StoreError::invalid(ACTION, "it is not sealed"));
        }
        let totals = self.totals()?;
        let (shared, spec) = (&*self.shared, &self.plan.spec);
        let (shard, id) = (&spec.target_shard, &spec.transfer_id);
        let _shard = lock(shared.shard_lock(shard));
        let mut known = shared.read_shard(shard)?;
        if known.state.superseded.contains(id) {
            return Ok(());
        }
        self.refuse_stale(&known)?;
        let target = shared.layout.installed(shard, id);
        if !exists(&target).map_err(|error| StoreError::io(ACTION, error))? {
            return Err(self.damaged(&target, "is missing"));
        }
        if known.state.current.as_ref() != Some(id) {
            let replaced = known.state.current.replace(id.clone());
            // One that is still to be removed has to be told that it was current, if it asks after a restart.
            known.state.superseded.extend(replaced.clone());
            known.previous.retain(|previous| previous != id);
            known.previous.splice(0..0, replaced);
            known.previous.truncate(shared.options.keep_previous);
        }
        {
            let live = lock(&shared.live);
            known.state.superseded.retain(|superseded| live.contains(superseded));
        }
        let first = known.state.high_water.replace(spec.point).is_none();
        if first {
            known.installed_by = Some(spec.source_node.clone());
        }
        let named_by = known.named_by.take();
        // Also when it says so already: the last call may have failed between replacing the file and syncing its directory.
        let written = shared.write_shard(shard, &known);
        // The next call, and every start, count by what the file says.
        let says_so = || {
            let found =
                record::read::<ShardRecord>(&shared.layout, &shared.layout.current(shard), Kind::Shard);
            let found = found.ok().flatten().and_then(|found| found.shard(shard.as_str()));
            found.is_some_and(|found| found.state == known.state)
        };
        if written.is_ok() || says_so() {
            if let Some(source) = named_by {
                uncount(&shared.named, &source);
            }
            if first {
                // It was refused when it was staged, or not at all: by now it may be merged.
                *lock(&shared.installed).entry(spec.source_node.clone()).or_default() += 1;
            }
        }
        written?;
        self.reservation.release();
        shared.add_installed(&self.plan, &totals);
        *lock(&self.totals) = None;
        Ok(())
    }

    pub(super) fn discard(&self) -> Result<(), StoreError> {
        let failed = |error| StoreError::io("discard the files of a snapshot", error);
        let _gate = self.exclusive();
        let (shared, spec) = (&*self.shared, &self.plan.spec);
        let (shard, id) = (&spec.target_shard, &spec.transfer_id);
        let _shard = lock(shared.shard_lock(shard));
        if shared.read_shard(shard)?.state.current.as_ref() != Some(id) {
            return Ok(());
        }
        if let Some(bytes) = shared.index.remove(shard, id) {
            shared.space.remove_installed(bytes);
        }
        // The directory itself stays: it tells that the snapshot was put in place.
        let target = shared.layout.installed(shard, id);
        no_link_at(&target).map_err(failed)?;
        for name in std::fs::read_dir(&target).map_err(failed)? {
            shared.trash.take(&name.map_err(failed)?.path()).map_err(failed)?;
        }
        sync_dir(&target).map_err(failed)?;
        Ok(())
    }

    pub(super) fn remove(&self) -> Result<(), StoreError> {
        const ACTION: &str = "remove a staging area";
        let mut gate = self.exclusive();
        *gate = Gate::Removed;
        let (shared, spec) = (&*self.shared, &self.plan.spec);
        let id = &spec.transfer_id;
        shared.handles.forget_area(self.serial);
        let failed = |error| StoreError::io(ACTION, error);
        // First, so that a crash from here on is seen as one: the next start finishes what is left.
        let gone = shared.layout.staging_gone(id);
        match std::fs::rename(&self.area.dir, &gone) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        sync_dir(shared.layout.staging_root()).map_err(failed)?;
        shared.discard(&spec.target_shard, id)?;
        match std::fs::remove_dir_all(&gone) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        self.reservation.release();
        lock(&shared.live).remove(id);
        Ok(())
    }

    /// The totals that it was sealed with.
    fn totals(&self) -> Result<Arc<[FileTotal]>, StoreError> {
        if let Some(totals) = &*lock(&self.totals) {
            return Ok(Arc::clone(totals));
        }
        let path = self.area.sealed();
        let sealed: Option<SealedRecord> = record::read(&self.shared.layout, &path, Kind::Sealed)?;
        let totals = sealed
            .and_then(|sealed| sealed.totals(&self.plan.spec.transfer_id))
            .filter(|totals| totals.len() == self.plan.manifest.files().len());
        totals.map(Arc::from).ok_or_else(|| self.damaged(&path, "does not match the manifest"))
    }

    fn refuse_stale(&self, known: &Shard) -> Result<(), StoreError> {
        match known.state.high_water {
            Some(installed) if installed > self.plan.spec.point => Err(StoreError::Stale { installed }),
            _ => Ok(()),
        }
    }
}

impl Shared {
    /// Forgets a transfer that has ended, and moves what is placed of it to the trash unless that counts; if it does, what it
    /// replaced goes there.
    pub(super) fn discard(&self, shard: &ShardId, id: &TransferId) -> Result<(), StoreError> {
        let _shard = lock(self.shard_lock(shard));
        let mut known = match self.read_shard(shard) {
            Ok(known) => known,
            // If nobody knows what is current, nothing that may be is touched.
            Err(error @ StoreError::ShardDamaged { .. }) => {
                tracing::warn!(%error, %shard, "old snapshots of the shard are kept");
                return Ok(());
            }
            // Not known now. What is placed would tell of a lost record, so whoever removes it does that again.
            Err(error) => {
                let placed = [self.layout.manifest(shard, id), self.layout.installed(shard, id)];
                if placed.iter().any(|path| exists(path).unwrap_or(true)) {
                    return Err(error);
                }
                return Ok(());
            }
        };
        let current = known.state.current.as_ref() == Some(id);
        self.prune(shard, &known, (!current).then_some(id))?;
        if known.state.superseded.contains(id) {
            known.state.superseded.retain(|superseded| superseded != id);
            self.write_shard(shard, &known)?;
        }
        Ok(())
    }

    /// Moves snapshots of `shard` that are no longer needed to the trash: all that are neither current, nor kept, nor those of a
    /// transfer that is still under way (a hook may be reading them); or only `only`.
    pub(super) fn prune(
        &self,
        shard: &ShardId,
        known: &Shard,
        only: Option<&TransferId>,
    ) -> Result<(), StoreError> {
        let failed = |error| StoreError::io("remove old snapshots", error);
        let keep: HashSet<&TransferId> = known.state.current.iter().chain(&known.previous).collect();
        let dir = self.layout.installed_shard(shard);
        let mut moved = false;
        for id in self.snapshots_of(shard).map_err(failed)? {
            let wanted = match only {
                Some(only) => id == *only,
                None => !lock(&self.live).contains(&id),
            };
            if !wanted || keep.contains(&id) {
                continue;
            }
            if let Some(bytes) = self.index.remove(shard, &id) {
                self.space.remove_installed(bytes);
            }
            self.trash.take(&self.layout.installed(shard, &id)).map_err(failed)?;
            match std::fs::remove_file(self.layout.manifest(shard, &id)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
                _ => moved = true,
            }
        }
        if moved && exists(&dir).map_err(failed)? {
            sync_dir(dir).map_err(failed)?;
        }
        if moved {
            // A manifest that is back after a power cut would tell of a lost record.
            sync_dir(self.layout.shard(shard)).map_err(failed)?;
        }
        Ok(())
    }

    /// The snapshots of `shard` of which there is a directory or a manifest.
    fn snapshots_of(&self, shard: &ShardId) -> io::Result<HashSet<TransferId>> {
        let mut found = HashSet::new();
        for name in names(&self.layout.installed_shard(shard))? {
            found.extend(TransferId::new(&name));
        }
        for name in names(&self.layout.shard(shard))? {
            found.extend(name.strip_suffix(MANIFEST_SUFFIX).and_then(|id| TransferId::new(id).ok()));
        }
        Ok(found)
    }
}

/// The names in a directory, as far as they are UTF-8; none if there is no directory.
pub(super) fn names(dir: &Path) -> io::Result<Vec<String>> {
    Ok(all_names(dir)?.into_iter().filter_map(|name| name.into_string().ok()).collect())
}

/// The names in a directory; none if there is no directory.
pub(super) fn all_names(dir: &Path) -> io::Result<Vec<OsString>> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    entries.map(|entry| Ok(entry?.file_name())).collect()
}

/// Makes `dir` durably, if it is not there. Refuses a link in its place.
pub(super) fn make_dir(dir: &Path) -> io::Result<()> {
    match std::fs::create_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => no_link_at(dir)?,
        made => made?,
    }
    // Also when it is there: whoever made it may not have come to this.
    match dir.parent() {
        Some(parent) => sync_dir(parent),
        None => Ok(()),
    }
}
