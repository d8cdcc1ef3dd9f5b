//! What can go wrong in the database.

use std::path::PathBuf;
use std::sync::Arc;

use crate::common::NodeId;

/// Why the store could not do what it was asked for.
///
/// Cheap to clone: one failed commit answers every request of its batch.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has the data directory open.
    #[error("data directory {} is in use by another process; stop it, or choose another --data", path.display())]
    InUse {
        /// The data directory.
        path: PathBuf,
    },
    /// The data directory belongs to something else than what was asked for.
    #[error("data directory {}: {what}", path.display())]
    Mismatch {
        /// The data directory.
        path: PathBuf,
        /// What differs, and what to do.
        what: String,
    },
    /// The database failed. After an I/O error it refuses further work until the node is restarted.
    #[error("{}", said(.0))]
    Database(Arc<redb::Error>),
    /// A file could not be read or written.
    #[error("{action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// The answer.
        source: Arc<std::io::Error>,
    },
    /// Stored bytes are not what this program writes.
    #[error("damaged data: {0}")]
    Damaged(String),
    /// The database file is not what was written, or not there any more.
    #[error(
        "the database {} is damaged: {what}; restore it, or keep it aside and start the node anew, with --slots none and another --data; \
         its migrations then wait for an operator",
        path.display()
    )]
    DamagedFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The slots are not this node's, or a newer owner is known.
    #[error("{0}")]
    Refused(String),
    /// Something else is under way with these slots, which passes.
    #[error("{0}")]
    Busy(String),
    /// A slot is claimed at a higher epoch.
    #[error("slot {slot} is claimed at epoch {epoch}, which is newer")]
    Outdated {
        /// The slot.
        slot: u16,
        /// Its epoch.
        epoch: u64,
    },
    /// A slot is known to be of another node than the one that wants to give it away.
    #[error("slot {slot} is known to be of node {owner} at epoch {epoch}, not of {source_node}")]
    NotTheirs {
        /// The slot.
        slot: u16,
        /// Its owner.
        owner: NodeId,
        /// Its epoch.
        epoch: u64,
        /// Who wants to give it away.
        source_node: NodeId,
    },
    /// The change log does not reach back so far.
    #[error("{0}")]
    LogLost(String),
    /// A key is too long to be moved to another node.
    #[error("a key of slot {slot} has {bytes} bytes, which is too long to be moved to another node")]
    KeyTooLong {
        /// Its slot.
        slot: u16,
        /// Its length.
        bytes: usize,
    },
    /// The disk has no room.
    #[error("the disk of {} has {available} bytes left, of {needed} that are needed", path.display())]
    NoSpace {
        /// The data directory.
        path: PathBuf,
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that are left.
        available: u64,
    },
    /// A peer has named as many shards as are remembered for it.
    #[error(
        "node {peer} has named {limit} shards with a fence, and no more are remembered for it; leave the fence out"
    )]
    TooManyShards {
        /// The peer.
        peer: proto::common::ids::NodeId,
        /// How many.
        limit: u64,
    },
    /// The store is shutting down; nothing was done.
    #[error("the node is shutting down")]
    Closed,
}

impl StoreError {
    /// An I/O error with what was tried.
    pub fn io(action: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { action: action.into(), source: Arc::new(source) }
    }

    /// The database failed at the disk, and takes nothing more until the node is restarted.
    pub(crate) fn is_for_good(&self) -> bool {
        matches!(self, Self::Database(error) if matches!(**error, redb::Error::Io(_) | redb::Error::PreviousIo))
    }
}

/// In words of an operator, where redb speaks to its own caller.
fn said(error: &redb::Error) -> String {
    match error {
        redb::Error::PreviousIo => {
            "database: a write to the disk failed, nothing is written any more; make sure that there is room, then restart the node"
                .to_owned()
        }
        error => format!("database: {error}"),
    }
}

macro_rules! from_redb {
    ($($error:ty),* $(,)?) => {$(
        impl From<$error> for StoreError {
            fn from(error: $error) -> Self {
                Self::Database(Arc::new(error.into()))
            }
        }
    )*};
}

from_redb!(
    redb::Error,
    redb::DatabaseError,
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError,
);
