//! Where snapshots are kept: the traits to implement for a store of your own, and
//! [`FileSnapshotStore`], which keeps them in a directory.
//!
//! The receiver decides what is written when; a store writes, makes durable, puts in place. It holds no
//! protocol state: [`Staging::records`] is all that a resumed transfer needs.
//!
//! # What makes a store crash-safe
//!
//! 1. [`Staging::sync`] returns after the data of all earlier writes is durable *and then* the records
//!    are. A record without its data would be believed after a crash.
//! 2. [`Staging::seal`], [`Staging::place`], [`Staging::activate`] and [`Staging::remove`] are repeated from the start after a crash, in this
//!    order; each must do nothing where its work is done already.
//! 3. [`Staging::activate`] changes which snapshot is current in one atomic step.

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;

use proto_common::bulk::Payload;
use proto_common::error::Error;
use proto_common::fence::Fence;
use proto_common::ids::{NodeId, ShardId, TransferId};
use tokio_util::sync::CancellationToken;

use crate::extent::{Extent, ExtentRecord};
use crate::reason::Reason;
use crate::spec::{FileTotal, SnapshotPoint, TransferPlan};

mod file;

pub use file::{FileSnapshotStore, FileStaging, FileStoreOptions};

/// Why a store could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The disk has no room. The transfer can go on once there is.
    #[error("no room for {needed_bytes} bytes, {available_bytes} are available")]
    NoSpace {
        /// Bytes that are needed.
        needed_bytes: u64,
        /// Bytes that are available.
        available_bytes: u64,
    },
    /// There is room, but the transfers of that node have their share of it. The transfer can go on once others of the node have ended.
    #[error("no room for {needed_bytes} bytes in the share of node {peer}, which has {available_bytes} left")]
    NoShare {
        /// The node that the snapshot comes from.
        peer: NodeId,
        /// Bytes that are needed.
        needed_bytes: u64,
        /// Bytes that are left of its share.
        available_bytes: u64,
    },
    /// The disk has bytes, but no more files and directories: its file system has a number of them that small files used up. The transfer can go on once some are
    /// deleted.
    #[error("no room for {needed_files} files and directories, {available_files} are available")]
    NoFiles {
        /// Files and directories that are needed.
        needed_files: u64,
        /// Files and directories that are available.
        available_files: u64,
    },
    /// There are files and directories left, but the transfers of that node have their share of them. The transfer can go on once others of the node have ended.
    #[error(
        "no room for {needed_files} files and directories in the share of node {peer}, which has {available_files} left"
    )]
    NoShareOfFiles {
        /// The node that the snapshot comes from.
        peer: NodeId,
        /// Files and directories that are needed.
        needed_files: u64,
        /// Files and directories that are left of its share.
        available_files: u64,
    },
    /// The transfers from a node have named as many shards as it may have remembered of which nothing is installed.
    #[error("node {peer} has named {limit} shards of which nothing is installed")]
    TooManyShards {
        /// The node that the snapshot comes from.
        peer: NodeId,
        /// Shards of one node.
        limit: usize,
    },
    /// As many shards have their first snapshot from a node as it may have installed.
    #[error("snapshots from node {peer} are installed of {limit} shards of which nothing was")]
    TooManyInstalled {
        /// The node that the snapshot comes from.
        peer: NodeId,
        /// Shards of one node.
        limit: usize,
    },
    /// A newer snapshot of the shard is in place.
    #[error("a snapshot of term {} and index {} is installed", installed.term, installed.index)]
    Stale {
        /// The newer snapshot.
        installed: SnapshotPoint,
    },
    /// What is stored is not what was written. Names the file.
    #[error("{file} is damaged: it {what}")]
    Damaged {
        /// Path below the store's directory.
        file: String,
        /// What is wrong with it.
        what: String,
    },
    /// What is recorded of a shard is not what was written last, or gone: which snapshot of it is current, nobody knows. No snapshot of it is taken until the record is
    /// repaired, or all that is recorded of the shard is removed.
    #[error("{file} is damaged: it {what}; nothing else tells of shard {shard}")]
    ShardDamaged {
        /// The shard.
        shard: ShardId,
        /// Path of the record below the store's directory.
        file: String,
        /// What is wrong with it.
        what: String,
    },
    /// Anything else that the storage answered. The message to peers leaves the path out.
    #[error("{action}")]
    Io {
        /// What was tried, without paths.
        action: &'static str,
        /// The answer.
        #[source]
        source: std::io::Error,
    },
}

impl StoreError {
    /// Whether trying again later can help. Not if the caller broke a rule of these traits, which is an
    /// [`Io`](Self::Io) of kind `InvalidInput`.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NoSpace { .. }
            | Self::NoShare { .. }
            | Self::NoFiles { .. }
            | Self::NoShareOfFiles { .. } => true,
            Self::Io { source, .. } => source.kind() != std::io::ErrorKind::InvalidInput,
            Self::Stale { .. }
            | Self::Damaged { .. }
            | Self::ShardDamaged { .. }
            | Self::TooManyShards { .. }
            | Self::TooManyInstalled { .. } => false,
        }
    }
}

/// What is known of a shard, durably, for ever.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShardState {
    /// The highest fence seen.
    pub fence: Fence,
    /// The newest snapshot ever installed, if there was one.
    pub high_water: Option<SnapshotPoint>,
    /// The transfer whose snapshot is current.
    pub current: Option<TransferId>,
    /// Transfers whose snapshots were current and have been replaced, but whose staging areas are still there: they have been
    /// installed, and only [`Staging::remove`] is left to do.
    pub superseded: Vec<TransferId>,
}

/// Who may write into a staging area: the attempt and its session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// The attempt; 0 before the first.
    pub attempt: u64,
    /// The session that claimed it.
    pub session: [u8; 16],
}

/// How far a staging area was when the process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StagingState {
    /// Waiting for data.
    Open,
    /// [`Staging::seal`] was called: it has to be installed.
    Sealed,
}

/// A chunk to be written; its checksum was verified.
#[derive(Debug, Clone)]
pub struct StagedChunk {
    /// Number of the file in the manifest.
    pub file: u32,
    /// Offset of the first byte.
    pub offset: u64,
    /// The bytes, in the pieces in which they came: write them with one vectored write, as they are.
    pub payload: Payload,
}

/// A snapshot in its final place.
#[derive(Debug, Clone)]
pub struct PlacedSnapshot {
    /// The directory that holds the files, for stores on a file system.
    pub path: Option<PathBuf>,
    /// What it is.
    pub plan: TransferPlan,
}

/// Keeps staged and installed snapshots. One process uses a store at a time.
///
/// Every method may be called from any task at any time, for different transfers at once. A future that is dropped
/// may leave its work half done, as a crash would; it must not leave it wrong.
pub trait SnapshotStore: Send + Sync + 'static {
    /// One transfer's staging area.
    type Staging: Staging;

    /// What an earlier process left. Called once, before anything else.
    fn recover(&self) -> impl Future<Output = Result<Recovered<Self::Staging>, StoreError>> + Send;

    /// What is known of `shard`; all of it is durable.
    ///
    /// # Errors
    ///
    /// [`StoreError::ShardDamaged`] when that cannot be told any more.
    fn shard(&self, shard: &ShardId) -> impl Future<Output = Result<ShardState, StoreError>> + Send;

    /// Specification and manifest of the shard's current snapshot, as they were given to [`stage`](Self::stage).
    /// `None` if there is no current one, or if that cannot be told of it any more.
    fn current_plan(
        &self,
        shard: &ShardId,
    ) -> impl Future<Output = Result<Option<TransferPlan>, StoreError>> + Send;

    /// Raises the highest fence seen of `shard` to `fence`, if that is higher, and returns the highest one then. Of two calls at
    /// once, the one with the lower fence never gets that back once the other has returned.
    ///
    /// What is returned is durable, also if an earlier call failed after it had changed something.
    ///
    /// It is asked for by a transfer from `source`, which may name any shard: bound how many are remembered of each node where nothing is
    /// installed.
    ///
    /// # Errors
    ///
    /// [`StoreError::TooManyShards`] for a shard of which nothing is known yet.
    fn raise_fence(
        &self,
        shard: &ShardId,
        fence: Fence,
        source: &NodeId,
    ) -> impl Future<Output = Result<Fence, StoreError>> + Send;

    /// Makes a staging area for `plan` and reserves its space. There is none of this ID.
    ///
    /// # Errors
    ///
    /// [`StoreError::NoSpace`], [`StoreError::NoShare`], [`StoreError::NoFiles`], [`StoreError::NoShareOfFiles`] or [`StoreError::TooManyInstalled`] before anything is kept; [`StoreError::Damaged`] if there is one that could not be recovered.
    fn stage(
        &self,
        plan: &TransferPlan,
    ) -> impl Future<Output = Result<Arc<Self::Staging>, StoreError>> + Send;

    /// Appends an opaque record to the history of finished transfers, durably. The store keeps at least
    /// the last [`history_limit`](FileStoreOptions::history_limit) and may drop older ones.
    fn record_finished(&self, record: &[u8]) -> impl Future<Output = Result<(), StoreError>> + Send;
}

/// What [`SnapshotStore::recover`] found.
#[derive(Debug)]
pub struct Recovered<S> {
    /// Unfinished transfers.
    pub staged: Vec<Arc<S>>,
    /// Finished ones, oldest first, as given to [`SnapshotStore::record_finished`].
    pub finished: Vec<Vec<u8>>,
    /// What was damaged or could not be read and had to be left out, in sentences for the log. One staging area, shard or
    /// record that cannot be read does not keep the rest from being used: [`SnapshotStore::stage`] of the ID of such an area fails with
    /// [`StoreError::Damaged`] until a later start can read it.
    pub damage: Vec<String>,
}

/// One transfer's staging area.
///
/// The receiver calls `write` and `sync` concurrently, but nothing beside `seal` and what follows, except [`rest`](Self::rest).
pub trait Staging: Send + Sync + std::fmt::Debug + 'static {
    /// What is staged.
    fn plan(&self) -> &TransferPlan;

    /// How far it was when it was opened.
    fn state(&self) -> StagingState;

    /// Who claimed it last.
    fn claim(&self) -> Claim;

    /// Persists who may write.
    fn set_claim(&self, claim: Claim) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// The extents that were durable when the area was opened, disjoint, in any order; empty for a new one. Neighbours may be
    /// merged, up to 64 MiB: a checksum that does not match costs the whole extent.
    fn records(&self) -> Vec<ExtentRecord>;

    /// When bytes were last added, in milliseconds since the Unix epoch; decides when it is stale.
    fn last_activity_unix_ms(&self) -> u64;

    /// Writes chunks. They need not be durable yet.
    fn write(&self, chunks: Vec<StagedChunk>) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Makes durable all that `write` calls that *returned* before have written, then `records`, which
    /// describe them.
    ///
    /// # Errors
    ///
    /// After any, what was written since the last sync that succeeded counts as lost: a disk tells only once that it could not
    /// write. It has to be written again before it is recorded.
    fn sync(&self, records: Vec<ExtentRecord>) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// CRC-64/NVME of the stored bytes of an extent.
    fn checksum(&self, extent: Extent) -> impl Future<Output = Result<u64, StoreError>> + Send;

    /// Replaces all records by `records`, durably: what is not in them is no longer there.
    fn reset_records(
        &self,
        records: Vec<ExtentRecord>,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Fills file number `file` from installed files by its BLAKE3 digest, verifying the digest while
    /// copying; it becomes durable with the next `sync`, as what `write` wrote does. Nothing of the file may be staged. Returns the CRC-64/NVME of the content, `None` when there is no such file (or the store does not reuse).
    /// The record of it is the caller's to `sync`.
    ///
    /// Once `stop` is cancelled nobody needs the file any more, and a copy that is under way should end, with `None`: who cancels a transfer waits for it.
    fn reuse(
        &self,
        file: u32,
        stop: CancellationToken,
    ) -> impl Future<Output = Result<Option<u64>, StoreError>> + Send;

    /// Nobody writes for now: closes what is held open for that, as far as nothing is lost by it. A process may have many more areas than
    /// open files. Somebody may have come back meanwhile, so it may be called beside any other method. A store that holds nothing open may do
    /// nothing, as the default does.
    fn rest(&self) -> impl Future<Output = Result<(), StoreError>> + Send {
        std::future::ready(Ok(()))
    }

    /// Everything is there, with these totals (one per file, in order): creates empty files, makes the whole durable and persists
    /// that it has to be installed.
    fn seal(&self, totals: &[FileTotal]) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Moves the sealed files to their final place, durably.
    ///
    /// # Errors
    ///
    /// [`StoreError::Stale`] when a newer snapshot of the shard is in place.
    fn place(&self) -> impl Future<Output = Result<PlacedSnapshot, StoreError>> + Send;

    /// Makes the placed snapshot the shard's current one and raises the high-water mark, in one atomic step. Does nothing if it
    /// was current before and a newer one has replaced it since ([`ShardState::superseded`]).
    ///
    /// # Errors
    ///
    /// [`StoreError::Stale`] when a newer snapshot of the shard is in place.
    fn activate(&self) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Deletes the files of the snapshot, if it is current, and keeps all that says so: its owner has merged them
    /// ([`InstallHook::keeps_files`](crate::hook::InstallHook::keeps_files)). Called between `activate` and `remove`, again after a
    /// crash. A store that has no use for the space may do nothing, as the default does.
    fn discard(&self) -> impl Future<Output = Result<(), StoreError>> + Send {
        std::future::ready(Ok(()))
    }

    /// Ends the transfer: removes the staging area and all that is staged or placed in it but not current, and frees what
    /// was reserved, durably.
    fn remove(&self) -> impl Future<Output = Result<(), StoreError>> + Send;
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        // Paths stay in the log: a peer has no use for them.
        let retry = std::time::Duration::from_secs(1);
        match error {
            StoreError::NoSpace { needed_bytes, available_bytes } => Reason::InsufficientDisk
                .error(format!(
                    "the receiver has {available_bytes} bytes for a snapshot that needs {needed_bytes}; free some space, the transfer resumes by itself"
                ))
                .metadata("needed_bytes", needed_bytes.to_string())
                .metadata("available_bytes", available_bytes.to_string())
                .retry_after(retry),
            StoreError::NoShare { peer, needed_bytes, available_bytes } => Reason::InsufficientDisk
                .error(format!(
                    "node {peer} has {available_bytes} bytes left of its share of the receiver's disk, the snapshot needs {needed_bytes}; it resumes by itself once others of the node have ended, or there is more room"
                ))
                .metadata("needed_bytes", needed_bytes.to_string())
                .metadata("available_bytes", available_bytes.to_string())
                .metadata("peer", peer.as_str())
                .retry_after(retry),
            StoreError::NoFiles { needed_files, available_files } => Reason::InsufficientDisk
                .error(format!(
                    "the receiver's file system has {available_files} files and directories (inodes) left for a snapshot that needs {needed_files}; delete some there, the transfer resumes by itself"
                ))
                .metadata("needed_files", needed_files.to_string())
                .metadata("available_files", available_files.to_string())
                .retry_after(retry),
            StoreError::NoShareOfFiles { peer, needed_files, available_files } => Reason::InsufficientDisk
                .error(format!(
                    "node {peer} has {available_files} files and directories (inodes) left of its share of the receiver's file system, the snapshot needs {needed_files}; it resumes by itself once others of the node have ended, or there are more left"
                ))
                .metadata("needed_files", needed_files.to_string())
                .metadata("available_files", available_files.to_string())
                .metadata("peer", peer.as_str())
                .retry_after(retry),
            StoreError::TooManyShards { peer, limit } => Reason::TooManyShards
                .error(format!(
                    "the receiver remembers the fences of {limit} shards that node {peer} has named and of which nothing is installed, and no more of them; install a snapshot of one, or send this one without a fence"
                ))
                .metadata("limit", limit.to_string())
                .metadata("peer", peer.as_str()),
            StoreError::TooManyInstalled { peer, limit } => Reason::TooManyShards
                .error(format!(
                    "{limit} shards of the receiver have their first snapshot from node {peer}, and no more of them may; send one of a shard that has one"
                ))
                .metadata("limit", limit.to_string())
                .metadata("peer", peer.as_str()),
            StoreError::Stale { installed } => Reason::StaleSnapshot
                .error(format!(
                    "a newer snapshot of the shard is installed: term {}, index {}; send a newer one",
                    installed.term, installed.index
                ))
                .metadata("installed_term", installed.term.to_string())
                .metadata("installed_index", installed.index.to_string()),
            // An area that is damaged is dropped, so that all of it can be sent again; one that cannot be read may be later.
            StoreError::Damaged { .. } => {
                tracing::warn!(%error, "a snapshot cannot be taken");
                Reason::StagedDataDamaged
                    .error("what the receiver has of the snapshot is damaged, or cannot be read; its log says where")
                    .caused_by(error)
            }
            // Final: however often it is sent, somebody has to look at the record first.
            StoreError::ShardDamaged { ref shard, .. } => {
                tracing::warn!(%error, "a snapshot is refused");
                let message = format!(
                    "the receiver's record of shard {shard} is damaged: it takes no snapshot of that shard until the record is repaired or removed; its log says where"
                );
                Reason::InstallRefused.error(message).metadata("shard", shard.as_str()).caused_by(error)
            }
            StoreError::Io { action, ref source } if source.kind() == std::io::ErrorKind::InvalidInput => {
                let message = format!("the receiver failed to {action}: {source}");
                Reason::Internal.error(message).caused_by(error)
            }
            StoreError::Io { action, ref source } => {
                let message = format!("the receiver failed to {action}: {}", source.kind());
                Reason::StorageFailed.error(message).retry_after(retry).caused_by(error)
            }
        }
    }
}
