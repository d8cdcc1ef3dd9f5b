//! A directory as a source.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use futures::StreamExt as _;

use super::disk::{Listing, Place, lock, off_thread, read};
use super::walk::walk;
use super::{Description, PieceStream, SnapshotSource, SourceError};

/// All files below a directory, named by their paths relative to it, sorted.
///
/// Symbolic links, special files and names that break the rules of [`FileName`](proto_common::path::FileName) are refused, all of them at once. Empty directories,
/// modes, owners and times are not part of a snapshot. The directory itself may be a link.
///
/// Whatever makes the content different shows in inode, modification time or size of a file; those make up the content
/// version. A file that changes while it is sent ends the transfer with [`SourceError::Changed`].
#[derive(Debug)]
pub struct DirectorySource {
    root: PathBuf,
    listing: Mutex<Option<Arc<Listing>>>,
}

impl DirectorySource {
    /// The files below `root`. Nothing is read yet.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), listing: Mutex::new(None) }
    }

    /// Whether what was described lies in memory.
    #[cfg(test)]
    pub(super) fn in_memory(&self) -> bool {
        lock(&self.listing).as_ref().is_some_and(|listing| listing.in_memory)
    }
}

impl SnapshotSource for DirectorySource {
    async fn describe(&self, digests: bool) -> Result<Description, SourceError> {
        let root = self.root.clone();
        let (listing, description) = off_thread(move |stop| {
            let files = walk(&root)?;
            let listing = Listing::new(Place::Below(root), files);
            let description = listing.describe(digests, &stop)?;
            Ok((listing, description))
        })
        .await?;
        *lock(&self.listing) = Some(Arc::new(listing));
        Ok(description)
    }

    async fn open(
        &self,
        file: u32,
        offset: u64,
        len: Option<u64>,
        piece: usize,
    ) -> Result<PieceStream, SourceError> {
        let listing = lock(&self.listing).clone();
        if offset == 0
            && let Some(listing) = &listing
            && let Some(small) = listing.ahead.read(listing, file, len, piece).await
        {
            let bytes = small?;
            return Ok(futures::stream::once(async { Ok(bytes) }).boxed());
        }
        read(listing, file, offset, len, piece).await
    }
}
