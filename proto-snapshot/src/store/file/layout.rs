//! Where things lie below the store's directory.
//!
//! ```text
//! LOCK                                        held by the process that uses the store
//! FORMAT                                      version of this layout
//! staging/<transfer_id>/meta                  specification and manifest, written once
//! staging/<transfer_id>/claim                 attempt and session
//! staging/<transfer_id>/records               log of durable extents
//! staging/<transfer_id>/sealed                totals; its existence means "has to be installed"
//! staging/<transfer_id>/tree/...              the files
//! staging/<transfer_id>/reuse/                copies of installed files, until they are verified
//! installed/<shard>/<transfer_id>/...         the files, at their final place
//! shards/<shard>/CURRENT                      fence, high-water mark, current snapshot
//! shards/<shard>/<transfer_id>.manifest       what was installed
//! history                                     log of finished transfers
//! trash/                                      moved out of the way, being deleted
//! quarantine/                                 records of damaged staging areas
//! ```
//!
//! Names of a snapshot's files only occur below `tree` and below `installed/<shard>/<transfer_id>`, where the store has nothing
//! of its own. IDs never start with a dot, so names that do are free for what is half made or half removed. Files beside
//! which an ID could be mistaken for a temporary file of [`write_atomic`](proto_common::durable::write_atomic) have a suffix of
//! their own.

use std::path::{Path, PathBuf};

use proto_common::ids::{ShardId, TransferId};

#[derive(Debug, Clone)]
pub(super) struct Layout {
    root: PathBuf,
}

impl Layout {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.root.join("LOCK")
    }

    pub(super) fn format(&self) -> PathBuf {
        self.root.join("FORMAT")
    }

    pub(super) fn history(&self) -> PathBuf {
        self.root.join("history")
    }

    pub(super) fn trash(&self) -> PathBuf {
        self.root.join("trash")
    }

    pub(super) fn quarantine(&self) -> PathBuf {
        self.root.join("quarantine")
    }

    pub(super) fn staging_root(&self) -> PathBuf {
        self.root.join("staging")
    }

    pub(super) fn staging(&self, id: &TransferId) -> PathBuf {
        self.staging_root().join(id.as_str())
    }

    /// A staging area that is being made.
    pub(super) fn staging_new(&self, id: &TransferId) -> PathBuf {
        self.staging_root().join(format!(".new.{id}"))
    }

    /// A staging area that is being removed.
    pub(super) fn staging_gone(&self, id: &TransferId) -> PathBuf {
        self.staging_root().join(format!(".gone.{id}"))
    }

    pub(super) fn installed_root(&self) -> PathBuf {
        self.root.join("installed")
    }

    pub(super) fn installed_shard(&self, shard: &ShardId) -> PathBuf {
        self.installed_root().join(shard.as_str())
    }

    pub(super) fn installed(&self, shard: &ShardId, id: &TransferId) -> PathBuf {
        self.installed_shard(shard).join(id.as_str())
    }

    pub(super) fn shards_root(&self) -> PathBuf {
        self.root.join("shards")
    }

    pub(super) fn shard(&self, shard: &ShardId) -> PathBuf {
        self.shards_root().join(shard.as_str())
    }

    pub(super) fn current(&self, shard: &ShardId) -> PathBuf {
        self.shard(shard).join(CURRENT)
    }

    pub(super) fn manifest(&self, shard: &ShardId, id: &TransferId) -> PathBuf {
        self.shard(shard).join(format!("{id}{MANIFEST_SUFFIX}"))
    }

    /// The directories that always exist.
    pub(super) fn directories(&self) -> [PathBuf; 5] {
        [self.staging_root(), self.installed_root(), self.shards_root(), self.trash(), self.quarantine()]
    }

    /// `path` as it is shown in errors: below the store's directory.
    pub(super) fn shown(&self, path: &Path) -> String {
        path.strip_prefix(&self.root).unwrap_or(path).display().to_string()
    }
}

pub(super) const CURRENT: &str = "CURRENT";
pub(super) const MANIFEST_SUFFIX: &str = ".manifest";

/// The files of one staging area.
#[derive(Debug, Clone)]
pub(super) struct Area {
    pub(super) dir: PathBuf,
    pub(super) tree: PathBuf,
}

impl Area {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { tree: dir.join("tree"), dir }
    }

    pub(super) fn meta(&self) -> PathBuf {
        self.dir.join("meta")
    }

    pub(super) fn claim(&self) -> PathBuf {
        self.dir.join("claim")
    }

    pub(super) fn records(&self) -> PathBuf {
        self.dir.join("records")
    }

    pub(super) fn sealed(&self) -> PathBuf {
        self.dir.join("sealed")
    }

    pub(super) fn reuse(&self) -> PathBuf {
        self.dir.join("reuse")
    }
}
