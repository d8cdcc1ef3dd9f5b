//! What is installed, by content: where to find bytes that do not have to be sent.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use proto_common::ids::{ShardId, TransferId};
use proto_common::path::FileName;

use crate::spec::{FileTotal, Manifest, TransferPlan};

use super::lock;

type Key = (ShardId, TransferId);

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

#[derive(Debug, Default)]
pub(super) struct Index {
    maps: Mutex<Maps>,
}

#[derive(Debug, Default)]
struct Maps {
    snapshots: HashMap<Key, Counted>,
    by_digest: HashMap<[u8; 32], Vec<Installed>>,
}

/// One installed snapshot.
#[derive(Debug)]
struct Counted {
    bytes: u64,
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

impl Index {
    /// Adds the snapshot in `dir`; with `files`, they can be found. `None` if it is there already, else its bytes.
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
        let mut unknown = None;
        if files {
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
            unknown = (!sorted.is_empty()).then_some(Unknown { snapshot, sorted, sizes, taken });
        }
        maps.snapshots.insert(key, Counted { bytes, unknown });
        Some(bytes)
    }

    /// Forgets a snapshot; returns its bytes if it was there.
    pub(super) fn remove(&self, shard: &ShardId, id: &TransferId) -> Option<u64> {
        let key = (shard.clone(), id.clone());
        let mut maps = lock(&self.maps);
        let Counted { bytes, unknown: _ } = maps.snapshots.remove(&key)?;
        maps.by_digest.retain(|_, files| {
            files.retain(|file| file.snapshot.key != key);
            !files.is_empty()
        });
        Some(bytes)
    }

    /// Files whose content had this digest when they were installed.
    pub(super) fn with_digest(&self, digest: &[u8; 32]) -> Vec<Installed> {
        lock(&self.maps).by_digest.get(digest).cloned().unwrap_or_default()
    }

    /// Takes out the files of this name and size whose digest is not known: who asks computes it and says it with
    /// [`learn`](Self::learn).
    pub(super) fn take_unknown(&self, name: &FileName, size: u64) -> Vec<Installed> {
        let mut maps = lock(&self.maps);
        let unknown = maps.snapshots.values_mut().filter_map(|counted| counted.unknown.as_mut());
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
        if maps.snapshots.contains_key(&file.snapshot.key) {
            maps.by_digest.entry(digest).or_default().push(file);
        }
    }

    /// `file` was taken out, but not looked at.
    pub(super) fn put_back(&self, file: &Installed) {
        let mut maps = lock(&self.maps);
        let counted = maps.snapshots.get_mut(&file.snapshot.key);
        if let Some(unknown) = counted.and_then(|counted| counted.unknown.as_mut()) {
            unknown.taken.remove(&file.file);
        }
    }
}
