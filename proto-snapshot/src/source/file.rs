//! One file as a source.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use proto_common::path::FileName;

use super::disk::{Entry, Identity, Listing, Place, lock, off_thread, read};
use super::{Description, PieceStream, SnapshotSource, SourceError};

/// One file of the file system, under its own name or another.
///
/// Its content version is made of inode, modification time and size; a change while it is sent ends the transfer with
/// [`SourceError::Changed`]. The path may be a symbolic link to a file.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
    name: Option<FileName>,
    listing: Mutex<Option<Arc<Listing>>>,
}

impl FileSource {
    /// The file at `path`, called by the last component of it. Nothing is read yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), name: None, listing: Mutex::new(None) }
    }

    /// Calls the file `name` in the snapshot.
    #[must_use]
    pub fn named(self, name: FileName) -> Self {
        Self { name: Some(name), ..self }
    }

    fn name(&self) -> Result<FileName, SourceError> {
        if let Some(name) = &self.name {
            return Ok(name.clone());
        }
        let name = self.path.file_name().unwrap_or_default();
        let refused = |why: String| SourceError::Unsupported { entries: vec![why] };
        let text =
            name.to_str().ok_or_else(|| refused(format!("{}: the name is not UTF-8", name.display())))?;
        FileName::new(text).map_err(|error| refused(error.to_string()))
    }
}

impl SnapshotSource for FileSource {
    async fn describe(&self, digests: bool) -> Result<Description, SourceError> {
        let (name, path) = (self.name()?, self.path.clone());
        let (listing, description) = off_thread(move |stop| {
            let metadata =
                fs::metadata(&path).map_err(|source| SourceError::Io { name: name.to_string(), source })?;
            if !metadata.is_file() {
                return Err(SourceError::Unsupported { entries: vec![format!("{name}: is not a file")] });
            }
            let entry = Entry { name, identity: Identity::of(&metadata) };
            let listing = Listing::new(Place::Only(path), vec![entry]);
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
        read(listing, file, offset, len, piece).await
    }
}
