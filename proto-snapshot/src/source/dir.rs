//! A directory as a source.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use futures::StreamExt as _;
use proto_common::path::FileName;
use proto_common::text::printable;

use super::disk::{Entry, Identity, Listing, Place, lock, off_thread, read};
use super::{Description, PieceStream, SnapshotSource, SourceError};

/// Most bytes of a name that an error shows.
const SHOWN: usize = 256;

/// All files below a directory, named by their paths relative to it, sorted.
///
/// Symbolic links, special files and names that break the rules of [`FileName`] are refused, all of them at once. Empty directories,
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

/// The files below `root`, sorted by name.
fn walk(root: &Path) -> Result<Vec<Entry>, SourceError> {
    let mut files = Vec::new();
    let mut refused = Vec::new();
    let mut pending = vec![(root.to_owned(), String::new())];
    while let Some((dir, prefix)) = pending.pop() {
        let failed = |source| SourceError::Io { name: shown(&prefix), source };
        for entry in fs::read_dir(&dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = match entry.file_name().into_string() {
                Ok(name) => format!("{prefix}{name}"),
                Err(name) => {
                    refused.push(format!(
                        "{}: the name is not UTF-8",
                        shown(&format!("{prefix}{}", name.display()))
                    ));
                    continue;
                }
            };
            let kind = entry.file_type().map_err(failed)?;
            // A directory counts by the files in it; but its name has to be a valid one for theirs to be.
            match FileName::new(&name) {
                Err(error) => refused.push(format!("{}: {}", shown(&name), error.problem())),
                Ok(_) if kind.is_dir() => pending.push((entry.path(), format!("{name}/"))),
                Ok(file) if kind.is_file() => {
                    // Of the entry itself, also should it have become a link meanwhile.
                    let identity = entry.metadata().map(|metadata| Identity::of(&metadata));
                    let identity =
                        identity.map_err(|source| SourceError::Io { name: shown(&name), source })?;
                    files.push(Entry { name: file, identity });
                }
                Ok(_) if kind.is_symlink() => refused.push(format!("{}: is a symbolic link", shown(&name))),
                Ok(_) => refused.push(format!("{}: is neither a file nor a directory", shown(&name))),
            }
        }
    }
    if !refused.is_empty() {
        refused.sort_unstable();
        return Err(SourceError::Unsupported { entries: refused });
    }
    if u32::try_from(files.len()).is_err() {
        let source = io::Error::new(io::ErrorKind::InvalidInput, "more than 2^32 files");
        return Err(SourceError::Io { name: ".".to_owned(), source });
    }
    files.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

fn shown(name: &str) -> String {
    if name.is_empty() { ".".to_owned() } else { printable(name, SHOWN) }
}
