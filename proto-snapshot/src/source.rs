//! Where a snapshot is read from: the trait to implement for a source of your own, and sources for a
//! file, a directory and a stream.

use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;
use futures::Stream;
use proto_common::error::{Code, Error};

use crate::spec::ManifestFile;

mod ahead;
mod dir;
mod disk;
mod file;
mod stream;
#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the numbers of test data are small"
)]
mod tests;
mod walk;

pub use dir::DirectorySource;
pub use file::FileSource;
pub use stream::{OpenStream, StreamSource};

/// The pieces of an extent, in order.
pub type PieceStream = Pin<Box<dyn Stream<Item = Result<Bytes, SourceError>> + Send>>;

/// Why a source could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// Entries that cannot be part of a snapshot, all of them: symbolic links, special files, names
    /// that break the rules.
    #[error("{} cannot be part of a snapshot: {}", entries.len(), entries.join("; "))]
    Unsupported {
        /// `name: why`, one per entry.
        entries: Vec<String>,
    },
    /// The source is not what it was when the transfer began.
    #[error("{name} changed while it was read: {what}")]
    Changed {
        /// Name of the file.
        name: String,
        /// What differs.
        what: String,
    },
    /// Reading failed.
    #[error("cannot read {name}: {source}")]
    Io {
        /// Name of the file.
        name: String,
        /// The answer of the file system or stream.
        #[source]
        source: std::io::Error,
    },
}

/// The reason of [`SourceError::Changed`], after which nothing that was sent fits what is there.
pub(crate) const SOURCE_CHANGED: &str = "SOURCE_CHANGED";

/// Final errors with the reasons `SOURCE_UNSUPPORTED`, `SOURCE_CHANGED` and `SOURCE_UNREADABLE`.
impl From<SourceError> for Error {
    fn from(error: SourceError) -> Self {
        // Not in the table of the protocol: no peer ever sees them.
        let (code, reason) = match error {
            SourceError::Unsupported { .. } => (Code::InvalidArgument, "SOURCE_UNSUPPORTED"),
            SourceError::Changed { .. } => (Code::FailedPrecondition, SOURCE_CHANGED),
            SourceError::Io { .. } => (Code::Internal, "SOURCE_UNREADABLE"),
        };
        Self::with_code(code, reason, error.to_string()).caused_by(error)
    }
}

/// What a source holds.
#[derive(Debug, Clone)]
pub struct Description {
    /// Its files, in an order that is the same each time.
    pub files: Vec<ManifestFile>,
    /// What makes two reads of it the same bytes: changes whenever the content may have changed.
    /// At most [`MAX_CONTENT_VERSION`](crate::spec::MAX_CONTENT_VERSION) bytes.
    pub content_version: String,
}

/// A set of files to be sent. Reading happens off the async threads and ahead of the socket; from a memory file system, where a piece, or a small
/// file, takes less than that change of threads, it happens when the piece is asked for.
pub trait SnapshotSource: Send + Sync + 'static {
    /// Lists the files. With `digests`, computes the BLAKE3 of those whose digest is not known, which reads
    /// everything once more. Called once per [`SnapshotSender::send`](crate::sender::SnapshotSender::send), before anything is opened.
    ///
    /// # Errors
    ///
    /// [`SourceError::Unsupported`] with every entry that cannot be sent.
    fn describe(&self, digests: bool) -> impl Future<Output = Result<Description, SourceError>> + Send;

    /// The bytes of file number `file` from `offset`: `len` of them, or up to the end where `len` is `None`, in pieces of
    /// exactly `piece` bytes but for the last. At most four pieces are read ahead. Dropping the stream ends the reading.
    ///
    /// # Errors
    ///
    /// [`SourceError::Changed`], here or in the stream, when the file is shorter or longer than described or was
    /// touched since: what was sent of it must not be believed.
    fn open(
        &self,
        file: u32,
        offset: u64,
        len: Option<u64>,
        piece: usize,
    ) -> impl Future<Output = Result<PieceStream, SourceError>> + Send;

    /// Whether [`open`](Self::open) works at any offset, again and again. If not, it is called with offset 0 only, and
    /// a transfer that breaks off starts anew.
    fn can_seek(&self) -> bool {
        true
    }
}
