//! What is installed, by content: where to find bytes that do not have to be sent.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use proto_common::ids::{NodeId, ShardId, TransferId};
use proto_common::path::FileName;

use crate::spec::{FileTotal, Manifest, TransferPlan};

use super::lock;

type Key = (ShardId, TransferId);

/// Memory that the index takes for one file beside its name, by estimate: its line of the manifest, and its place by digest once that is known.
const FILE_BYTES: u64 = 320;

/// An installed file.
#[derive(Debug, Clone)]
pub(super) struct Installed {
    snapshot: Arc<Snapshot>,
    /// Its number in the manifest.
    file: u32,
}

#[derive(Debug)]
struct Snapshot {
    key: Key,
    dir: PathBuf,
    manifest: Manifest,
}

#[derive(Debug)]
pub(super) struct Index {
    /// Memory that the files take at most, by estimate, in bytes.
    limit: u64,
    maps: Mutex<Maps>,
}

#[derive(Debug, Default)]
struct Maps {
    snapshots: HashMap<Key, Counted>,
    by_digest: HashMap<[u8; 32], Vec<Installed>>,
    /// Of all snapshots whose files can be found.
    memory: u64,
    /// Snapshots that were added so far.
    added: u64,
}

/// One installed snapshot.
#[derive(Debug)]
struct Counted {
    bytes: u64,
    /// `None` where its files cannot be found.
    found: Option<Found>,
}

/// What it takes that the files of a snapshot can be found.
#[derive(Debug)]
struct Found {
    source: NodeId,
    memory: u64,
    /// Rises from snapshot to snapshot.
    number: u64,
    unknown: Option<Unknown>,
}

/// The files of a snapshot whose digest nobody has asked for yet. There may be very many of them, so they are no entries of a map.
#[derive(Debug)]
struct Unknown {
    snapshot: Arc<Snapshot>,
    /// By name.
    sorted: Vec<u32>,
    /// Sizes of those that the manifest does not know.
    sizes: HashMap<u32, u64>,
    /// Those that somebody has taken out.
    taken: HashSet<u32>,
}

impl Unknown {
    /// The number of the file of this name and size, if it is one of them.
    fn find(&self, name: &FileName, size: u64) -> Option<u32> {
        let manifest = &self.snapshot.manifest;
        let by_name = |file: &u32| manifest.get(*file).map(|file| &file.name).cmp(&Some(name));
        let file = *self.sorted.get(self.sorted.binary_search_by(by_name).ok()?)?;
        let found = manifest.get(file)?.size.or_else(|| self.sizes.get(&file).copied());
        (found == Some(size) && !self.taken.contains(&file)).then_some(file)
    }
}

impl Installed {
    pub(super) fn path(&self) -> PathBuf {
        let name = self.snapshot.manifest.get(self.file).map_or("", |file| file.name.as_str());
        self.snapshot.dir.join(name)
    }
}

impl Maps {
    fn found(&mut self, key: &Key) -> Option<&mut Found> {
        self.snapshots.get_mut(key)?.found.as_mut()
    }

    /// Whether files of that snapshot can be found.
    fn finds(&self, key: &Key) -> bool {
        self.snapshots.get(key).is_some_and(|counted| counted.found.is_some())
    }

    /// Leaves out the snapshots of whoever has most here, the oldest first, until the rest fits: what one node has installed
    /// does not drive out that of others.
    fn fit(&mut self, limit: u64) {
        while self.memory > limit {
            let mut by_source: HashMap<&NodeId, (u64, u64, &Key)> = HashMap::new();
            for (key, counted) in &self.snapshots {
                let Some(found) = &counted.found else { continue };
                let of = by_source.entry(&found.source).or_insert((0, found.number, key));
                of.0 = of.0.saturating_add(found.memory);
                if found.number < of.1 {
                    (of.1, of.2) = (found.number, key);
                }
            }
            let Some((.., oldest)) = by_source.into_values().max_by_key(|(memory, ..)| *memory) else {
                return;
            };
            let oldest = oldest.clone();
            self.leave_out(&oldest);
        }
    }

    /// Its files can be found no more.
    fn leave_out(&mut self, key: &Key) {
        let Some(found) = self.snapshots.get_mut(key).and_then(|counted| counted.found.take()) else {
            return;
        };
        self.memory = self.memory.saturating_sub(found.memory);
        self.by_digest.retain(|_, files| {
            files.retain(|file| file.snapshot.key != *key);
            !files.is_empty()
        });
    }
}

impl Index {
    /// One whose files take at most `limit` bytes of memory, by estimate.
    pub(super) fn new(limit: u64) -> Self {
        Self { limit, maps: Mutex::default() }
    }

    /// Adds the snapshot in `dir`; with `files`, they can be found, as far as there is room for that. `None` if it is there already, else its bytes.
    pub(super) fn add(
        &self,
        plan: &TransferPlan,
        totals: &[FileTotal],
        dir: PathBuf,
        files: bool,
    ) -> Option<u64> {
        let key = (plan.spec.target_shard.clone(), plan.spec.transfer_id.clone());
        let mut maps = lock(&self.maps);
        if maps.snapshots.contains_key(&key) {
            return None;
        }
        let bytes = totals.iter().fold(0_u64, |sum, total| sum.saturating_add(total.size));
        let memory = plan.manifest.file_count().saturating_mul(FILE_BYTES);
        let memory = memory.saturating_add(plan.manifest.name_bytes());
        let mut found = None;
        if files && memory <= self.limit {
            let manifest = plan.manifest.clone();
            let snapshot = Arc::new(Snapshot { key: key.clone(), dir, manifest });
            let (mut sorted, mut sizes) = (Vec::new(), HashMap::new());
            for ((number, file), total) in plan.manifest.numbered().zip(totals) {
                match file.blake3.as_deref().copied() {
                    _ if total.size == 0 => {}
                    Some(digest) => {
                        let installed = Installed { snapshot: Arc::clone(&snapshot), file: number };
                        maps.by_digest.entry(digest).or_default().push(installed);
                    }
                    None => {
                        sorted.push(number);
                        if file.size.is_none() {
                            sizes.insert(number, total.size);
                        }
                    }
                }
            }
            sorted.sort_unstable_by_key(|file| plan.manifest.get(*file).map(|file| &file.name));
            sorted.shrink_to_fit();
            let taken = HashSet::new();
            let unknown = (!sorted.is_empty()).then_some(Unknown { snapshot, sorted, sizes, taken });
            maps.added += 1;
            maps.memory = maps.memory.saturating_add(memory);
            found =
                Some(Found { source: plan.spec.source_node.clone(), memory, number: maps.added, unknown });
        }
        maps.snapshots.insert(key, Counted { bytes, found });
        maps.fit(self.limit);
        Some(bytes)
    }

    /// Forgets a snapshot; returns its bytes if it was there.
    pub(super) fn remove(&self, shard: &ShardId, id: &TransferId) -> Option<u64> {
        let key = (shard.clone(), id.clone());
        let mut maps = lock(&self.maps);
        maps.leave_out(&key);
        maps.snapshots.remove(&key).map(|counted| counted.bytes)
    }

    /// Files whose content had this digest when they were installed.
    pub(super) fn with_digest(&self, digest: &[u8; 32]) -> Vec<Installed> {
        lock(&self.maps).by_digest.get(digest).cloned().unwrap_or_default()
    }

    /// Takes out the files of this name and size whose digest is not known: who asks computes it and says it with
    /// [`learn`](Self::learn).
    pub(super) fn take_unknown(&self, name: &FileName, size: u64) -> Vec<Installed> {
        let mut maps = lock(&self.maps);
        let found = maps.snapshots.values_mut().filter_map(|counted| counted.found.as_mut());
        let unknown = found.filter_map(|found| found.unknown.as_mut());
        let found = unknown.filter_map(|unknown| {
            let file = unknown.find(name, size)?;
            unknown.taken.insert(file);
            Some(Installed { snapshot: Arc::clone(&unknown.snapshot), file })
        });
        found.collect()
    }

    /// `file` has this digest.
    pub(super) fn learn(&self, file: Installed, digest: [u8; 32]) {
        let mut maps = lock(&self.maps);
        if maps.finds(&file.snapshot.key) {
            maps.by_digest.entry(digest).or_default().push(file);
        }
    }

    /// `file` does not have the digest `claimed`, whatever its sender said or somebody has made of it since: nobody has to read it
    /// for that again. `found` is what it has, if it could be read.
    pub(super) fn correct(&self, file: Installed, claimed: &[u8; 32], found: Option<[u8; 32]>) {
        let same =
            |other: &Installed| other.file == file.file && Arc::ptr_eq(&other.snapshot, &file.snapshot);
        let mut maps = lock(&self.maps);
        if let Some(files) = maps.by_digest.get_mut(claimed) {
            files.retain(|other| !same(other));
            if files.is_empty() {
                maps.by_digest.remove(claimed);
            }
        }
        drop(maps);
        if let Some(digest) = found {
            self.learn(file, digest);
        }
    }

    /// `file` was taken out, but not looked at.
    pub(super) fn put_back(&self, file: &Installed) {
        let mut maps = lock(&self.maps);
        let found = maps.found(&file.snapshot.key);
        if let Some(unknown) = found.and_then(|found| found.unknown.as_mut()) {
            unknown.taken.remove(&file.file);
        }
    }
}
