//! Filling a staged file from an installed one.
//!
//! The copy is made beside the tree and moved into it when its digest is right: a source that changed behind the store's back
//! leaves no trace. A file system that can share blocks (`FICLONE`: Btrfs, XFS, bcachefs) copies nothing, and the clone is read once for
//! its checksums; elsewhere it is a loop of reads and writes rather than `copy_file_range`, because every byte has to be
//! seen for the checksums anyhow.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use proto_common::checksum::Crc64Hasher;
use tokio_util::sync::CancellationToken;

use crate::extent::Extent;
use crate::store::StoreError;

use super::exists;
use super::space::Amount;
use super::staging::Inner;
use super::write::{READ_LEN, no_link, no_link_at, open_file};

struct Copied {
    blake3: [u8; 32],
    crc: u64,
}

/// What became of a copy.
enum Copy {
    /// Nothing was read: it is not there, or of another size.
    None,
    /// It could not be opened now, as where the process has no file left to open.
    Later,
    /// It could not be read to its end, or changed meanwhile.
    Failed,
    /// Nobody needs it any more.
    Stopped,
    Done(Copied),
}

impl Inner {
    pub(super) fn reuse(&self, number: u32, stop: &CancellationToken) -> Result<Option<u64>, StoreError> {
        let file = self.file(number)?;
        let (Some(digest), Some(size)) = (file.blake3.as_deref().copied(), file.size) else {
            return Ok(None);
        };
        if !self.shared.options.reuse_installed || size == 0 {
            return Ok(None);
        }
        let _dir = self.dir()?;
        let index = &self.shared.index;
        let mut last = None;
        while let Some(source) = index.with_digest(&digest, size, last.as_ref()) {
            match self.copy_any(number, &source.path(), size, stop)? {
                Copy::None | Copy::Failed => index.correct(&source, &digest, None),
                Copy::Later => {}
                Copy::Stopped => return Ok(None),
                Copy::Done(copied) if copied.blake3 == digest => {
                    self.move_in(number, size)?;
                    return Ok(Some(copied.crc));
                }
                Copy::Done(copied) => {
                    self.discard_copy(number);
                    index.correct(&source, &digest, Some(copied.blake3));
                }
            }
            last = Some(source);
        }
        while let Some(source) = index.take_unknown(&file.name, size) {
            // The bytes are read to learn the digest; if it is the right one, the file is there with that.
            let found = match self.copy_any(number, &source.path(), size, stop)? {
                Copy::Done(found) => found,
                Copy::Stopped => {
                    index.put_back(&source);
                    return Ok(None);
                }
                Copy::None | Copy::Later | Copy::Failed => continue,
            };
            index.learn(&source, found.blake3);
            if found.blake3 == digest {
                self.move_in(number, size)?;
                return Ok(Some(found.crc));
            }
            self.discard_copy(number);
        }
        Ok(None)
    }

    /// Copies `source` beside the tree, if it has `size` bytes.
    fn copy_any(
        &self,
        number: u32,
        source: &Path,
        size: u64,
        stop: &CancellationToken,
    ) -> Result<Copy, StoreError> {
        let mut from = match open_file(source) {
            Ok(from) => from,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidInput) => {
                return Ok(Copy::None);
            }
            Err(_) => return Ok(Copy::Later),
        };
        if !from.metadata().is_ok_and(|found| found.len() == size) {
            return Ok(Copy::None);
        }
        let failed = |error| StoreError::io("copy an installed file", error);
        let dir = self.area.reuse();
        match std::fs::create_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => no_link_at(&dir).map_err(failed)?,
            made => made.map_err(failed)?,
        }
        let path = self.copy_path(number);
        let copied = copy(&mut from, &path, size, stop);
        if !matches!(copied, Ok(Copy::Done(_))) {
            self.discard_copy(number);
        }
        copied.map_err(failed)
    }

    fn copy_path(&self, number: u32) -> PathBuf {
        self.area.reuse().join(number.to_string())
    }

    /// What is left of it goes with the staging area.
    fn discard_copy(&self, number: u32) {
        let _ = std::fs::remove_file(self.copy_path(number));
    }

    /// Moves the copy into the tree. The next sync makes it durable.
    fn move_in(&self, number: u32, size: u64) -> Result<(), StoreError> {
        let path = self.path(number)?;
        let mut state = self.lock_state();
        let parent = path.parent().unwrap_or(&self.area.tree);
        self.make_dirs(&mut state, parent)?;
        let failed = |error| StoreError::io("move a copied file", error);
        // What an earlier process wrote and never recorded may be there, and is no part of the promise any more.
        let new = !self.inherited || !exists(&path).map_err(failed)?;
        std::fs::rename(self.copy_path(number), &path).map_err(failed)?;
        // Whoever has the replaced file open would write to nowhere.
        self.shared.handles.forget(self.serial, number);
        state.dirty_dirs.insert(parent.to_owned());
        state.dirty.add(Extent { file: number, offset: 0, len: size });
        state.lost.forget(number);
        let bytes = state.space_of(number).map_or(0, |space| space.settle());
        drop(state);
        self.reservation.consume(Amount { bytes, files: u64::from(new) });
        Ok(())
    }
}

/// Copies `from`, which should have `size` bytes, to a new file at `path`, until `stop`.
fn copy(from: &mut File, path: &Path, size: u64, stop: &CancellationToken) -> io::Result<Copy> {
    let mut to = no_link().read(true).write(true).create(true).truncate(true).open(path)?;
    let cloned = clone(&to, from);
    let mut blake3 = blake3::Hasher::new();
    let mut crc = Crc64Hasher::new();
    let mut buffer = vec![0; READ_LEN];
    let mut len = 0;
    // Of a clone, what counts is what is in the clone.
    let mut source = if cloned { to.try_clone()? } else { from.try_clone()? };
    while len <= size {
        if stop.is_cancelled() {
            return Ok(Copy::Stopped);
        }
        let read = match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return Ok(Copy::Failed),
        };
        let bytes = &buffer[..read];
        if !cloned {
            to.write_all(bytes)?;
        }
        blake3.update(bytes);
        crc.update(bytes);
        len += u64::try_from(read).unwrap_or(u64::MAX);
    }
    if len != size {
        return Ok(Copy::Failed);
    }
    Ok(Copy::Done(Copied { blake3: blake3.finalize().into(), crc: crc.finish() }))
}

/// Makes `to` share the blocks of `from`, if the file system can.
#[cfg(target_os = "linux")]
fn clone(to: &File, from: &File) -> bool {
    rustix::fs::ioctl_ficlone(to, from).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn clone(_to: &File, _from: &File) -> bool {
    false
}
