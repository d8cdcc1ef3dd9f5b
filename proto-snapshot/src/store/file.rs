//! A store in a directory. Where things lie is told in [`layout`]; where bytes become durable, in [`sync`].

mod handles;
mod index;
mod install;
mod layout;
mod record;
mod recover;
mod reuse;
mod runs;
mod small;
mod space;
mod staging;
mod sync;
#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the numbers of test data are small"
)]
mod tests;
mod trash;
mod write;

use std::collections::{HashMap, HashSet};
use std::fs::{File, TryLockError};
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use proto_common::durable::{History, RecordLog, create_dir_all, sync_dir};
use proto_common::fence::Fence;
use proto_common::ids::{NodeId, ShardId, TransferId};

use crate::memory::in_memory;
use crate::spec::{FileTotal, TransferPlan};

use super::{Claim, PlacedSnapshot, Recovered, ShardState, SnapshotStore, StagingState, StoreError};
use handles::Handles;
use index::Index;
use layout::{Area, Layout, MANIFEST_SUFFIX};
use record::{Kind, PlanRecord, Shard, ShardRecord};
use runs::Durable;
use space::{Amount, Space};
pub use staging::FileStaging;
use staging::Parts;
use trash::Trash;
use write::{FileSpace, needed, no_link_at};

/// Settings of a [`FileSnapshotStore`].
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct FileStoreOptions {
    /// Finished transfers that are remembered at least; at most twice as many lie in the file. Default: 1000.
    pub history_limit: usize,
    /// Bytes of the file system that are never promised to a transfer, so that the node's other files find room.
    /// Default: 64 MiB.
    pub min_free_bytes: u64,
    /// Files and directories of the file system that are never promised to a transfer, for the same reason: many file systems have a number of them that
    /// is settled when they are made, and small files use that up before the bytes. Where there is no such number (Btrfs), nothing is counted. Default: 4096, as many
    /// as ext4 has for 64 MiB.
    pub min_free_files: u64,
    /// Bytes of the disk that the snapshots of the store may take, staged and installed: each file whole blocks of 4 KiB, and one at least, each directory one.
    /// Default: what the file system has.
    pub capacity_bytes: Option<u64>,
    /// What the transfers from one source node that are staged may take, announced or there: so much of the room that there would be without them, in bytes and
    /// in files, in percent, 1 to 100; other numbers count as the nearest of these. Default 75, so that whatever a node announces, others find a quarter of the
    /// room. The price: one snapshot that needs more than that is refused ([`StoreError::NoShare`], [`StoreError::NoShareOfFiles`]), also on a disk that nobody else wants; with
    /// 100 it is taken, and one node can take all. What is installed counts for nobody.
    pub percent_per_peer: u8,
    /// Shards that the transfers from one source node may have named with a fence while nothing of them is installed: each is remembered for
    /// ever, in a file of its own. One more is refused ([`StoreError::TooManyShards`]). Default: 4096, which take 16 MiB.
    pub shards_per_peer: usize,
    /// Shards whose first snapshot came from one source node: each is remembered for ever, with the manifest of the current one. The first snapshot of one
    /// more is refused when it begins ([`StoreError::TooManyInstalled`]), so those that are staged then may still come on top. Default: 16384, which take
    /// 256 MiB beside their manifests and files.
    pub installed_per_peer: usize,
    /// Memory for what is known of installed files so that they can be reused, in bytes, by estimate: about 360 for each, and 768 for each snapshot. Where it is full, files of the
    /// oldest snapshots of the node that has most of it are sent again rather than reused. Default: 256 MiB, as much as 700,000 files take.
    pub reuse_index_bytes: u64,
    /// Whether bytes of installed files may be copied instead of sent again. The store's owner then declares that it does not
    /// change them; a file that was changed all the same is found out by its digest and not used. Default: yes.
    pub reuse_installed: bool,
    /// Snapshots of a shard that are kept beside the current one, the latest first. Default: 0, they are deleted once the
    /// transfer that replaced them has ended.
    pub keep_previous: usize,
    /// Staged files that are held open, for all transfers together. Default: 256, a quarter of the usual limit of a process.
    pub max_open_files: usize,
    /// Snapshots of at least so many bytes leave the page cache as they become durable, so that they do not drive out what the node serves;
    /// files and pieces of less than 128 KiB stay. One of unknown size leaves it from so many bytes on.
    /// Smaller snapshots stay: whoever installs them finds them in memory. Default: 64 MiB. It is faster as well where memory has to be got first, since the same pages
    /// are used again and again: on a virtual machine that gives free pages back to its host, 1 GiB took 1.2 s instead of 4.2 (`cp` and a sync: 1.2; medians of 9), and
    /// 1.2 s with 16 MiB and with 256 MiB, too. Higher where what is installed is read at once and should be found in memory.
    pub uncached_from_bytes: u64,
}

impl Default for FileStoreOptions {
    fn default() -> Self {
        Self {
            history_limit: 1000,
            min_free_bytes: 64 << 20,
            min_free_files: 4096,
            capacity_bytes: None,
            percent_per_peer: 75,
            shards_per_peer: 4096,
            installed_per_peer: 16_384,
            reuse_index_bytes: 256 << 20,
            reuse_installed: true,
            keep_previous: 0,
            max_open_files: 256,
            uncached_from_bytes: 64 << 20,
        }
    }
}

/// Keeps snapshots in a directory of a local file system on Unix. One process uses it at a time.
///
/// An installed snapshot lies in `installed/<shard>/<transfer_id>/` as a tree of plain files with the names of the manifest;
/// [`current`](Self::current) tells which one counts. It is deleted when a newer one is current and the transfer of that has ended
/// ([`FileStoreOptions::keep_previous`]). The file system has to tell names apart that differ in case or Unicode normalization.
///
/// The async methods do their work on Tokio's blocking threads. Dropping a future does not stop what it began; whatever needs
/// the staging area for itself waits for it. In a memory file system, where nothing waits for a device, large chunks are written by the caller's
/// thread, at most 1 MiB before other tasks get their turn; a dropped future ends between two of those.
#[derive(Debug)]
pub struct FileSnapshotStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    layout: Layout,
    options: FileStoreOptions,
    /// Locked for as long as anything of the store is in use.
    _lock: File,
    /// Whether the store lies in a memory file system.
    in_memory: bool,
    space: Arc<Space>,
    handles: Handles,
    index: Index,
    history: History,
    trash: Trash,
    /// Transfers with a staging area.
    live: Mutex<HashSet<TransferId>>,
    /// Those of them whose staging area could not be read or removed: its name, and why.
    blocked: Mutex<HashMap<TransferId, (String, String)>>,
    /// Shards whose record the last start found to be wrong, whatever it says: the file that is damaged, and how.
    doubted: Mutex<HashMap<ShardId, (String, String)>>,
    /// What was found to be damaged and repaired before anything was read; `recover` tells.
    repaired: Mutex<Option<String>>,
    serials: AtomicU64,
    /// Shards whose record is known to be durable as it is.
    settled: Mutex<HashSet<ShardId>>,
    /// Shards whose record may be on the disk otherwise than it reads, as a sync failed: the system tells of that once, so the record is written again
    /// before it is believed.
    unsure: Mutex<HashSet<ShardId>>,
    /// How many shards are remembered of which nothing is installed, by the node that named them.
    named: Mutex<HashMap<NodeId, usize>>,
    /// Of how many shards something was installed, by the node whose snapshot was the first.
    installed: Mutex<HashMap<NodeId, usize>>,
    /// Held while the record of a shard is read or changed; a shard has one of them, chosen by hash.
    shard_locks: [Mutex<()>; 16],
    hasher: RandomState,
}

/// How long a lock is waited for: a process that was killed holds it until the kernel has taken it down, and one that was just
/// forked until it executes its program.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);

fn lock_soon(lock: &File) -> Result<(), TryLockError> {
    let since = Instant::now();
    loop {
        match lock.try_lock() {
            Err(TryLockError::WouldBlock) if since.elapsed() < LOCK_PATIENCE => {
                std::thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

impl FileSnapshotStore {
    /// Opens the store in `dir`, and makes it if there is none. Blocks.
    ///
    /// # Errors
    ///
    /// [`StoreError::Io`] of kind `WouldBlock` when, after two seconds of waiting, another process, or another store of this one, uses it;
    /// [`StoreError::Damaged`] when it was made by a version that this one does not know. A file `FORMAT` that names no version is written anew;
    /// [`recover`](SnapshotStore::recover) tells.
    pub fn open(dir: impl Into<PathBuf>, options: FileStoreOptions) -> Result<Self, StoreError> {
        let failed = |error| StoreError::io("open a store", error);
        let dir = dir.into();
        create_dir_all(&dir).map_err(failed)?;
        let dir = dir.canonicalize().map_err(failed)?;
        let layout = Layout::new(dir.clone());
        let lock = File::options().read(true).write(true).create(true).truncate(false).open(layout.lock());
        let lock = lock.map_err(|error| failed(recover::at("LOCK", &error)))?;
        lock_soon(&lock).map_err(|error| match error {
            TryLockError::WouldBlock => {
                StoreError::io("lock a store that is in use", io::ErrorKind::WouldBlock.into())
            }
            TryLockError::Error(error) => failed(error),
        })?;
        let repaired = recover::check_format(&layout.format())?;
        for dir in layout.directories() {
            install::make_dir(&dir).map_err(|error| failed(recover::at(&layout.shown(&dir), &error)))?;
        }
        let min_free = Amount { bytes: options.min_free_bytes, files: options.min_free_files };
        let shared = Shared {
            space: Space::new(dir, min_free, options.capacity_bytes, options.percent_per_peer),
            handles: Handles::new(options.max_open_files),
            index: Index::new(options.reuse_index_bytes),
            history: History::new(layout.history(), options.history_limit),
            trash: Trash::new(layout.trash()),
            live: Mutex::default(),
            blocked: Mutex::default(),
            doubted: Mutex::default(),
            repaired: Mutex::new(repaired),
            serials: AtomicU64::new(0),
            settled: Mutex::default(),
            unsure: Mutex::default(),
            named: Mutex::default(),
            installed: Mutex::default(),
            shard_locks: Default::default(),
            hasher: RandomState::new(),
            in_memory: in_memory(&lock),
            _lock: lock,
            layout,
            options,
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The current snapshot of `shard`; `None` before the first.
    ///
    /// # Errors
    ///
    /// [`StoreError::ShardDamaged`] when the record of the shard is damaged, [`StoreError::Damaged`] when that of the snapshot is.
    pub async fn current(&self, shard: &ShardId) -> Result<Option<PlacedSnapshot>, StoreError> {
        let (shared, shard) = (Arc::clone(&self.shared), shard.clone());
        blocking("read what is installed", move || {
            let _shard = lock(shared.shard_lock(&shard));
            let Some((id, plan)) = shared.read_current(&shard)? else { return Ok(None) };
            Ok(Some(PlacedSnapshot { path: Some(shared.layout.installed(&shard, &id)), plan }))
        })
        .await
    }

    /// The directory that the store is in.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.shared.layout.root()
    }
}

impl Drop for FileSnapshotStore {
    fn drop(&mut self) {
        self.shared.trash.stop();
    }
}

impl SnapshotStore for FileSnapshotStore {
    type Staging = FileStaging;

    async fn recover(&self) -> Result<Recovered<FileStaging>, StoreError> {
        let shared = Arc::clone(&self.shared);
        let recovered = blocking("read what is staged", move || shared.recover()).await?;
        self.shared.trash.clean();
        Ok(recovered)
    }

    async fn shard(&self, shard: &ShardId) -> Result<ShardState, StoreError> {
        let (shared, shard) = (Arc::clone(&self.shared), shard.clone());
        blocking("read the record of a shard", move || {
            let _shard = lock(shared.shard_lock(&shard));
            Ok(shared.read_shard(&shard)?.state)
        })
        .await
    }

    /// `None` with a warning in the log if what was written of the snapshot is damaged.
    async fn current_plan(&self, shard: &ShardId) -> Result<Option<TransferPlan>, StoreError> {
        let (shared, shard) = (Arc::clone(&self.shared), shard.clone());
        blocking("read what is installed", move || {
            let _shard = lock(shared.shard_lock(&shard));
            match shared.read_current(&shard) {
                Ok(current) => Ok(current.map(|(_, plan)| plan)),
                Err(CurrentError::Manifest(error @ StoreError::Damaged { .. })) => {
                    tracing::warn!(%error, %shard, "nothing is known of the current snapshot but its ID");
                    Ok(None)
                }
                Err(error) => Err(error.into()),
            }
        })
        .await
    }

    async fn raise_fence(&self, shard: &ShardId, fence: Fence, source: &NodeId) -> Result<Fence, StoreError> {
        let (shared, shard, source) = (Arc::clone(&self.shared), shard.clone(), source.clone());
        blocking("persist a fence", move || {
            let _shard = lock(shared.shard_lock(&shard));
            let mut known = shared.read_shard(&shard)?;
            if fence > known.state.fence {
                let new = known == Shard::default();
                known.state.fence = fence;
                if new {
                    // A directory and a record; only names that are new are for whoever likes to make them up.
                    let taken = Amount { bytes: write::dirs_on_disk(2), files: 2 };
                    let refused = |error| shared.space.explain(error, taken);
                    shared.space.reserve(&source, taken).map_err(refused)?.release();
                    let limit = shared.options.shards_per_peer;
                    if !count(&shared.named, &source, limit) {
                        return Err(StoreError::TooManyShards { peer: source, limit });
                    }
                    known.named_by = Some(source.clone());
                }
                shared.write_shard(&shard, &known).inspect_err(|_| {
                    // If it is there all the same, the next start counts it.
                    if new {
                        uncount(&shared.named, &source);
                    }
                })?;
            }
            Ok(known.state.fence)
        })
        .await
    }

    async fn stage(&self, plan: &TransferPlan) -> Result<Arc<FileStaging>, StoreError> {
        let (shared, plan) = (Arc::clone(&self.shared), plan.clone());
        blocking("make a staging area", move || {
            let result = shared.stage(plan);
            result.map_err(|error| shared.space.explain(error, Amount::default()))
        })
        .await
        .map(Arc::new)
    }

    async fn record_finished(&self, record: &[u8]) -> Result<(), StoreError> {
        let (shared, record) = (Arc::clone(&self.shared), record.to_vec());
        const ACTION: &str = "record a finished transfer";
        blocking(ACTION, move || shared.history.add(&record).map_err(|error| StoreError::io(ACTION, error)))
            .await
    }
}

impl Shared {
    fn stage(self: &Arc<Self>, plan: TransferPlan) -> Result<FileStaging, StoreError> {
        const ACTION: &str = "make a staging area";
        let id = plan.spec.transfer_id.clone();
        if let Some((file, what)) = lock(&self.blocked).get(&id).cloned() {
            return Err(StoreError::Damaged { file, what });
        }
        let shard = lock(self.shard_lock(&plan.spec.target_shard));
        let known = self.read_shard(&plan.spec.target_shard)?;
        drop(shard);
        if known.state.current.as_ref() == Some(&id) {
            return Err(StoreError::invalid(ACTION, "a snapshot of this ID is current already"));
        }
        let (peer, limit) = (&plan.spec.source_node, self.options.installed_per_peer);
        let installed = lock(&self.installed).get(peer).copied().unwrap_or(0);
        if known.state.high_water.is_none() && installed >= limit {
            return Err(StoreError::TooManyInstalled { peer: peer.clone(), limit });
        }
        let space: Vec<FileSpace> = plan.manifest.files().iter().map(FileSpace::new).collect();
        let sizes = plan.manifest.files().iter().map(|file| file.size.unwrap_or(0));
        let amount = needed(sizes, plan.manifest.directories().count);
        let reservation = self.space.reserve(&plan.spec.source_node, amount)?;
        // Only one of two calls for an ID goes on.
        if !lock(&self.live).insert(id.clone()) {
            return Err(StoreError::invalid(ACTION, "there is one of this ID"));
        }
        let (new, dir) = (self.layout.staging_new(&id), self.layout.staging(&id));
        // One that was not recovered is not touched either.
        if !matches!(exists(&dir), Ok(false)) {
            lock(&self.live).remove(&id);
            return Err(StoreError::invalid(ACTION, "there is one of this ID"));
        }
        let made =
            self.was_never_current(&plan).and_then(|()| self.make_area(&plan, &new, &dir)).and_then(|log| {
                let parts = Parts {
                    plan,
                    area: Area::new(dir.clone()),
                    reservation,
                    state: StagingState::Open,
                    space,
                    dirs: HashSet::new(),
                    claim: Claim { attempt: 0, session: [0; 16] },
                    log: Some(log),
                    inherited: false,
                    durable: Durable::default(),
                    last_activity: unix_ms(),
                };
                FileStaging::open(self, parts)
            });
        if made.is_err() {
            // Both are of this call: nobody else uses the ID, and there was none of it. What cannot be removed now is found at the next start.
            let _ = std::fs::remove_dir_all(&new);
            let _ = std::fs::remove_dir_all(&dir);
            lock(&self.live).remove(&id);
        }
        made
    }

    /// A staging area that is new is that of a snapshot that never was current, whatever its ID was for: it may have been that of another one, which is gone.
    fn was_never_current(&self, plan: &TransferPlan) -> Result<(), StoreError> {
        let (shard, id) = (&plan.spec.target_shard, &plan.spec.transfer_id);
        let _shard = lock(self.shard_lock(shard));
        let mut known = self.read_shard(shard)?;
        if known.state.superseded.contains(id) {
            known.state.superseded.retain(|superseded| superseded != id);
            self.write_shard(shard, &known)?;
        }
        Ok(())
    }

    /// Makes an empty staging area at `dir`, by way of `new`: after a crash it is there as a whole or not at all.
    fn make_area(&self, plan: &TransferPlan, new: &Path, dir: &Path) -> Result<RecordLog, StoreError> {
        let failed = |error| StoreError::io("make a staging area", error);
        match std::fs::remove_dir_all(new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        std::fs::create_dir(new).map_err(failed)?;
        let half = Area::new(new.to_owned());
        record::write_plan(&half.meta(), Kind::Meta, plan, &[]).map_err(failed)?;
        drop(RecordLog::open(half.records()).map_err(failed)?);
        std::fs::rename(new, dir).map_err(failed)?;
        sync_dir(self.layout.staging_root()).map_err(failed)?;
        let (log, ..) = RecordLog::open(Area::new(dir.to_owned()).records()).map_err(failed)?;
        Ok(log)
    }

    fn shard_lock(&self, shard: &ShardId) -> &Mutex<()> {
        let hash = self.hasher.hash_one(shard);
        let [first, ..] = hash.to_le_bytes();
        &self.shard_locks[usize::from(first) % self.shard_locks.len()]
    }

    /// What is recorded of `shard`, durably. The caller holds its lock.
    ///
    /// What the file says need not be what a crash would leave: a write may have failed, or the process may have been killed, after
    /// the file was replaced and before the directory was synced.
    fn read_shard(&self, shard: &ShardId) -> Result<Shard, StoreError> {
        let path = self.layout.current(shard);
        let damaged = |file, what| StoreError::ShardDamaged { shard: shard.clone(), file, what };
        if let Some((file, what)) = lock(&self.doubted).get(shard).cloned() {
            return Err(damaged(file, what));
        }
        for dir in [self.layout.shard(shard), self.layout.installed_shard(shard)] {
            match no_link_at(&dir) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                // What the system answers may be another thing the next time.
                Err(error) if error.raw_os_error().is_some() => {
                    let error = recover::at(&self.layout.shown(&dir), &error);
                    return Err(StoreError::io("read the record of a shard", error));
                }
                Err(error) => return Err(damaged(self.layout.shown(&dir), error.to_string())),
            }
        }
        if !lock(&self.settled).contains(shard) {
            match sync_dir(self.layout.shard(shard)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Shard::default()),
                result => result.map_err(|error| {
                    lock(&self.unsure).insert(shard.clone());
                    StoreError::io("sync the record of a shard", error)
                })?,
            }
            lock(&self.settled).insert(shard.clone());
        }
        let found = record::read::<ShardRecord>(&self.layout, &path, Kind::Shard);
        match found {
            Ok(None) => match self.unclaimed(shard)?.next() {
                None => Ok(Shard::default()),
                // As a new shard it would take an older snapshot, and a lower fence.
                Some(id) => {
                    let beside = self.layout.shown(&self.layout.manifest(shard, &id));
                    let what = format!("is missing, although {beside} tells that a snapshot is installed");
                    Err(damaged(self.layout.shown(&path), what))
                }
            },
            Ok(Some(found)) => {
                let known = found.shard(shard.as_str()).ok_or_else(|| {
                    damaged(self.layout.shown(&path), "is the record of another shard".to_owned())
                })?;
                let unsure = lock(&self.unsure).contains(shard);
                if unsure {
                    self.write_shard(shard, &known)?;
                }
                Ok(known)
            }
            Err(StoreError::Damaged { file, what }) => Err(damaged(file, what)),
            Err(error) => Err(error),
        }
    }

    /// Snapshots of `shard` that are of no transfer under way, by their manifests. Without a `CURRENT` there can be none: they become current, or nothing of
    /// them is left.
    fn unclaimed(&self, shard: &ShardId) -> Result<impl Iterator<Item = TransferId>, StoreError> {
        let names = install::names(&self.layout.shard(shard))
            .map_err(|error| StoreError::io("read the record of a shard", error))?;
        let ids =
            names.into_iter().filter_map(|name| TransferId::new(name.strip_suffix(MANIFEST_SUFFIX)?).ok());
        Ok(ids.filter(|id| !lock(&self.live).contains(id)))
    }

    /// The caller holds the shard's lock.
    fn write_shard(&self, shard: &ShardId, known: &Shard) -> Result<(), StoreError> {
        let record = ShardRecord::new(shard.as_str(), known);
        lock(&self.settled).remove(shard);
        let (dir, path) = (self.layout.shard(shard), self.layout.current(shard));
        install::make_dir(&dir)
            .map_err(|error| recover::at(&self.layout.shown(&dir), &error))
            .and_then(|()| record::write(&path, Kind::Shard, &record))
            .map_err(|error| {
                // Where the old one is still there, as on a full disk, that is durable.
                let found = record::read::<ShardRecord>(&self.layout, &path, Kind::Shard);
                if !matches!(found, Ok(found) if found.as_ref() != Some(&record)) {
                    lock(&self.unsure).insert(shard.clone());
                }
                StoreError::io("persist the record of a shard", error)
            })?;
        lock(&self.settled).insert(shard.clone());
        lock(&self.unsure).remove(shard);
        Ok(())
    }

    /// ID and plan of the current snapshot. The caller holds the shard's lock.
    fn read_current(&self, shard: &ShardId) -> Result<Option<(TransferId, TransferPlan)>, CurrentError> {
        let Some(id) = self.read_shard(shard).map_err(CurrentError::Shard)?.state.current else {
            return Ok(None);
        };
        let found = self.read_manifest(shard, &id).and_then(|found| {
            found.ok_or_else(|| StoreError::Damaged {
                file: self.layout.shown(&self.layout.manifest(shard, &id)),
                what: "is missing".to_owned(),
            })
        });
        let (plan, _) = found.map_err(CurrentError::Manifest)?;
        Ok(Some((id, plan)))
    }

    /// Plan and totals of an installed snapshot.
    fn read_manifest(
        &self,
        shard: &ShardId,
        id: &TransferId,
    ) -> Result<Option<(TransferPlan, Vec<FileTotal>)>, StoreError> {
        let path = self.layout.manifest(shard, id);
        let Some(found) = record::read::<PlanRecord>(&self.layout, &path, Kind::Manifest)? else {
            return Ok(None);
        };
        let decoded = found.decode_plan().filter(|(plan, totals)| {
            plan.spec.transfer_id == *id
                && plan.spec.target_shard == *shard
                && totals.len() == plan.manifest.files().len()
        });
        let decoded = decoded.ok_or_else(|| StoreError::Damaged {
            file: self.layout.shown(&path),
            what: "is the record of another snapshot".to_owned(),
        })?;
        Ok(Some(decoded))
    }

    /// Counts a snapshot that is in place, and offers its files for reuse.
    fn add_installed(&self, plan: &TransferPlan, totals: &[FileTotal]) {
        let dir = self.layout.installed(&plan.spec.target_shard, &plan.spec.transfer_id);
        if let Some(bytes) = self.index.add(plan, totals, dir, self.options.reuse_installed) {
            self.space.add_installed(bytes);
        }
    }
}

/// What could not be read of a current snapshot.
enum CurrentError {
    Shard(StoreError),
    Manifest(StoreError),
}

impl From<CurrentError> for StoreError {
    fn from(error: CurrentError) -> Self {
        match error {
            CurrentError::Shard(error) | CurrentError::Manifest(error) => error,
        }
    }
}

impl StoreError {
    fn io(action: &'static str, source: io::Error) -> Self {
        match source.kind() {
            // The numbers are put in by who knows them.
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::NoSpace { needed_bytes: 0, available_bytes: 0 }
            }
            _ => Self::Io { action, source },
        }
    }

    /// The caller broke a rule of the trait.
    fn invalid(action: &'static str, why: &'static str) -> Self {
        Self::Io { action, source: io::Error::new(io::ErrorKind::InvalidInput, why) }
    }
}

/// Counts one more of `source`, unless it has `limit` already.
fn count(counts: &Mutex<HashMap<NodeId, usize>>, source: &NodeId, limit: usize) -> bool {
    let mut counts = lock(counts);
    let count = counts.get(source).copied().unwrap_or(0);
    if count < limit {
        counts.insert(source.clone(), count + 1);
    }
    count < limit
}

fn uncount(counts: &Mutex<HashMap<NodeId, usize>>, source: &NodeId) {
    let mut counts = lock(counts);
    if let Some(count) = counts.get_mut(source) {
        *count = count.saturating_sub(1);
        if *count == 0 {
            counts.remove(source);
        }
    }
}

async fn blocking<T: Send + 'static>(
    action: &'static str,
    job: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(job).await {
        Ok(result) => result,
        Err(error) => Err(StoreError::Io { action, source: io::Error::other(error) }),
    }
}

/// A panic elsewhere leaves nothing here that could not be used: what is guarded is changed in single steps.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn exists(path: &Path) -> io::Result<bool> {
    match std::fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
