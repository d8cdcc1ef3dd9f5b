//! What is installed, by content: where to find bytes that do not have to be sent.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use proto_common::ids::{ShardId, TransferId};
use proto_common::path::FileName;

use crate::spec::{FileTotal, TransferPlan};

use super::lock;

type Key = (ShardId, TransferId);

/// An installed file.
#[derive(Debug, Clone)]
pub(super) struct Installed {
    snapshot: Arc<Snapshot>,
    name: FileName,
}

#[derive(Debug)]
struct Snapshot {
    key: Key,
    dir: PathBuf,
}

#[derive(Debug, Default)]
pub(super) struct Index {
    maps: Mutex<Maps>,
}

#[derive(Debug, Default)]
struct Maps {
    /// Bytes of each installed snapshot.
    snapshots: HashMap<Key, u64>,
    by_digest: HashMap<[u8; 32], Vec<Installed>>,
    /// Files whose digest nobody has asked for yet.
    by_name: HashMap<(FileName, u64), Vec<Installed>>,
}

impl Installed {
    pub(super) fn path(&self) -> PathBuf {
        self.snapshot.dir.join(self.name.as_str())
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
        maps.snapshots.insert(key.clone(), bytes);
        if files {
            let snapshot = Arc::new(Snapshot { key, dir });
            for (file, total) in plan.manifest.files().iter().zip(totals).filter(|(_, total)| total.size > 0)
            {
                let installed = Installed { snapshot: Arc::clone(&snapshot), name: file.name.clone() };
                match file.blake3 {
                    Some(digest) => maps.by_digest.entry(digest).or_default().push(installed),
                    None => maps.by_name.entry((file.name.clone(), total.size)).or_default().push(installed),
                }
            }
        }
        Some(bytes)
    }

    /// Forgets a snapshot; returns its bytes if it was there.
    pub(super) fn remove(&self, shard: &ShardId, id: &TransferId) -> Option<u64> {
        let key = (shard.clone(), id.clone());
        let mut maps = lock(&self.maps);
        let bytes = maps.snapshots.remove(&key)?;
        let others = |files: &mut Vec<Installed>| {
            files.retain(|file| file.snapshot.key != key);
            !files.is_empty()
        };
        maps.by_digest.retain(|_, files| others(files));
        maps.by_name.retain(|_, files| others(files));
        Some(bytes)
    }

    /// Files whose content had this digest when they were installed.
    pub(super) fn with_digest(&self, digest: &[u8; 32]) -> Vec<Installed> {
        lock(&self.maps).by_digest.get(digest).cloned().unwrap_or_default()
    }

    /// Takes out the files of this name and size whose digest is not known: who asks computes it and says it with
    /// [`learn`](Self::learn).
    pub(super) fn take_unknown(&self, name: &FileName, size: u64) -> Vec<Installed> {
        lock(&self.maps).by_name.remove(&(name.clone(), size)).unwrap_or_default()
    }

    /// `file` has this digest.
    pub(super) fn learn(&self, file: Installed, digest: [u8; 32]) {
        let mut maps = lock(&self.maps);
        if maps.snapshots.contains_key(&file.snapshot.key) {
            maps.by_digest.entry(digest).or_default().push(file);
        }
    }

    /// `file` was taken out, but not looked at.
    pub(super) fn put_back(&self, file: Installed, size: u64) {
        let mut maps = lock(&self.maps);
        if maps.snapshots.contains_key(&file.snapshot.key) {
            maps.by_name.entry((file.name.clone(), size)).or_default().push(file);
        }
    }
}
