//! Writing chunks, and reading them back.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto_common::bulk::Payload;
use proto_common::checksum::Crc64Hasher;
use rustix::fs::OFlags;

use crate::extent::Extent;
use crate::memory::in_memory;
use crate::spec::ManifestFile;
use crate::store::{StagedChunk, StoreError};

use super::small::Maker;
use super::space::Amount;
use super::staging::{Inner, State};
use super::sync::{begin_to_write_back, dont_need};

/// Files of at least this size get their blocks when they are created: they end up in few runs, and a full disk shows before the bytes
/// have been sent. Below, there is little to keep together. 512 files of 1 MiB took 0.62 s on ext4 with it and 0.61 without.
pub(super) const PREALLOCATE_FROM: u64 = 1 << 20;

/// A file of unknown size reserves this much ahead: as much as may wait to be synced, so that one call of the file system goes with one sync.
const GROWTH: u64 = 64 << 20;

/// What a file takes on the disk is a multiple of this, on all common file systems.
const BLOCK: u64 = 4096;

/// Pieces that one call writes at most: `IOV_MAX` of Linux and of the BSDs.
const MAX_PIECES: usize = 1024;

/// Reading for checksums and copies, at once: enough that the call is nothing beside what is done with it, and a buffer for each reader.
pub(super) const READ_LEN: usize = 1 << 20;

/// What of the reservation one file still needs.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct FileSpace {
    /// Bytes that are promised to it but not on the disk.
    remaining: u64,
    /// How far a file of unknown size may grow.
    granted: u64,
    /// Bytes written by this process.
    written: u64,
}

impl FileSpace {
    /// Of a file of which nothing is on the disk. One of unknown size may turn out to be empty, and take as much as an empty one.
    pub(super) fn new(file: &ManifestFile) -> Self {
        let remaining = on_disk(file.size.unwrap_or(0));
        Self { remaining, granted: if file.size.is_none() { remaining } else { 0 }, written: 0 }
    }

    /// Of a file of which `content` bytes are there, in `blocks` bytes of the disk.
    pub(super) fn found(file: &ManifestFile, content: u64, blocks: u64) -> Self {
        match file.size {
            Some(0) => Self::default(),
            Some(size) => Self { remaining: on_disk(size).saturating_sub(blocks), ..Self::default() },
            None => {
                let granted = on_disk(content);
                Self { remaining: granted.saturating_sub(blocks), granted, written: 0 }
            }
        }
    }

    /// Bytes that are promised to all of them.
    pub(super) fn sum(files: &[Self]) -> u64 {
        files.iter().map(|space| space.remaining).fold(0, u64::saturating_add)
    }

    /// All of it is on the disk; returns what was promised still.
    pub(super) fn settle(&mut self) -> u64 {
        std::mem::take(&mut self.remaining)
    }

    pub(super) fn granted(&self) -> u64 {
        self.granted
    }
}

/// What a file of `size` bytes takes on the disk. An empty one has an inode, and a name in its directory: less than a block, but not nothing, of which very
/// many would be for free.
pub(super) fn on_disk(size: u64) -> u64 {
    size.div_ceil(BLOCK).max(1).saturating_mul(BLOCK)
}

/// What a snapshot takes that has files of these sizes in `dirs` directories.
pub(super) fn needed(sizes: impl Iterator<Item = u64>, dirs: u64) -> Amount {
    let files = sizes.map(|size| Amount { bytes: on_disk(size), files: 1 });
    files.fold(Amount { bytes: dirs_on_disk(dirs), files: dirs }, |sum, file| sum + file)
}

/// What `count` directories take on the disk.
pub(super) fn dirs_on_disk(count: u64) -> u64 {
    count.saturating_mul(BLOCK)
}

impl Inner {
    pub(super) fn write(&self, chunks: &[StagedChunk]) -> Result<(), StoreError> {
        let _dir = self.dir()?;
        let mut maker = Maker::new(self);
        let written = chunks
            .iter()
            .try_for_each(|chunk| if maker.make(chunk)? { Ok(()) } else { self.write_chunk(chunk) });
        maker.finish();
        written
    }

    fn write_chunk(&self, chunk: &StagedChunk) -> Result<(), StoreError> {
        let StagedChunk { file: number, offset, payload } = chunk;
        let file = self.file(*number)?;
        let len = u64::try_from(payload.len()).unwrap_or(u64::MAX);
        let limit = file.size.unwrap_or(i64::MAX.unsigned_abs());
        let end = offset.checked_add(len).filter(|end| *end <= limit);
        let end = end.ok_or_else(|| StoreError::invalid("write", "the extent reaches beyond the file"))?;
        if file.size.is_none() {
            self.grow(*number, end)?;
        }
        let handle = self.open_file(*number)?;
        let written = write_all_at(&handle, payload, *offset).map_err(|error| StoreError::io("write", error));
        // After the write: a sync that begins before this does not have to cover it, one that begins later finds it here.
        let mut state = self.lock_state();
        state.dirty.add(Extent { file: *number, offset: *offset, len });
        if written.is_ok() {
            state.lost.written(*number, *offset, end);
        }
        let consumed = state.space_of(*number).map_or(0, |space| space.consume(file.size, len));
        drop(state);
        self.reservation.consume(Amount { bytes: consumed, files: 0 });
        if self.is_too_large_for_the_cache(end) {
            begin_to_write_back(&handle, *offset, end);
        }
        written
    }

    /// Reserves for a file of unknown size up to `end`: a step ahead if there is room for it, else what is needed now.
    fn grow(&self, number: u32, end: u64) -> Result<(), StoreError> {
        let mut state = self.lock_state();
        let Some(space) = state.space_of(number) else { return Ok(()) };
        let Some(needed) = end.checked_sub(space.granted).filter(|needed| *needed > 0) else { return Ok(()) };
        let (needed, ahead) = (on_disk(needed), needed.div_ceil(GROWTH).saturating_mul(GROWTH));
        let grow = |bytes| self.reservation.grow(Amount { bytes, files: 0 });
        let grown = match grow(ahead) {
            Ok(()) => ahead,
            Err(StoreError::NoSpace { .. } | StoreError::NoShare { .. }) => grow(needed).map(|()| needed)?,
            Err(error) => return Err(error),
        };
        space.granted += grown;
        space.remaining += grown;
        Ok(())
    }

    /// The file, open for reading and writing, made if there is none.
    pub(super) fn open_file(&self, number: u32) -> Result<Arc<File>, StoreError> {
        if let Some(handle) = self.shared.handles.get(self.serial, number) {
            return Ok(handle);
        }
        // Under the lock until the handle is in the cache: nobody writes to a file whose directory is not marked.
        let mut state = self.lock_state();
        if let Some(handle) = self.shared.handles.get(self.serial, number) {
            return Ok(handle);
        }
        let file = self.file(number)?;
        let path = self.area.tree.join(file.name.as_str());
        // Most often it is new, and one call makes it.
        let handle = match self.make_file(&mut state, &path)? {
            Some(handle) => {
                if let Err(error) = self.preallocate(&mut state, number, file, &handle) {
                    // So that the next attempt allocates, too.
                    let _ = std::fs::remove_file(&path);
                    return Err(error);
                }
                self.reservation.consume(Amount { bytes: 0, files: 1 });
                handle
            }
            None => {
                // Whoever made it may not have come to marking its directory.
                mark(&mut state.dirty_dirs, path.parent().unwrap_or(&self.area.tree));
                let opened = no_link().read(true).write(true).open(&path);
                opened.map_err(|error| StoreError::io("open a staged file", error))?
            }
        };
        let handle = Arc::new(handle);
        self.shared.handles.put(self.serial, number, &handle);
        Ok(handle)
    }

    /// Makes the file at `path`; `None` if it is there.
    fn make_file(&self, state: &mut State, path: &Path) -> Result<Option<File>, StoreError> {
        let parent = path.parent().unwrap_or(&self.area.tree);
        self.make_dirs(state, parent)?;
        match OpenOptions::new().read(true).write(true).create_new(true).open(path) {
            Ok(handle) => {
                mark(&mut state.dirty_dirs, parent);
                Ok(Some(handle))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
            Err(error) => Err(StoreError::io("open a staged file", error)),
        }
    }

    /// Makes `dir`, which is the tree or lies below it, and what is above it.
    pub(super) fn make_dirs(&self, state: &mut State, dir: &Path) -> Result<(), StoreError> {
        if state.dirs.contains(dir) {
            return Ok(());
        }
        if dir != self.area.tree
            && let Some(parent) = dir.parent()
        {
            self.make_dirs(state, parent)?;
        }
        match std::fs::create_dir(dir) {
            // The tree itself is part of no promise.
            Ok(()) if dir == self.area.tree => {}
            Ok(()) => self.reservation.consume(Amount { bytes: dirs_on_disk(1), files: 1 }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                no_link_at(dir).map_err(|error| StoreError::io("make a directory", error))?;
            }
            Err(error) => return Err(StoreError::io("make a directory", error)),
        }
        // Marked before anything can be put into it. The area itself holds the tree.
        if let Some(parent) = dir.parent() {
            state.dirty_dirs.insert(parent.to_owned());
        }
        state.dirty_dirs.insert(dir.to_owned());
        state.dirs.insert(dir.to_owned());
        Ok(())
    }

    fn preallocate(
        &self,
        state: &mut State,
        number: u32,
        file: &ManifestFile,
        handle: &File,
    ) -> Result<(), StoreError> {
        let Some(size) = file.size.filter(|size| *size >= PREALLOCATE_FROM) else { return Ok(()) };
        if !allocate(handle, size)? {
            return Ok(());
        }
        if let Some(space) = state.space_of(number) {
            let bytes = std::mem::take(&mut space.remaining);
            self.reservation.consume(Amount { bytes, files: 0 });
        }
        Ok(())
    }

    pub(super) fn checksum(&self, extent: Extent) -> Result<u64, StoreError> {
        let path = self.path(extent.file)?;
        let handle = match self.shared.handles.get(self.serial, extent.file) {
            Some(handle) => handle,
            None => match no_link().read(true).open(&path) {
                Ok(handle) => Arc::new(handle),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(self.damaged(&path, "is missing"));
                }
                Err(error) => return Err(StoreError::io("open a staged file", error)),
            },
        };
        let mut hasher = Crc64Hasher::new();
        let mut buffer = vec![0; READ_LEN.min(usize::try_from(extent.len).unwrap_or(READ_LEN))];
        let (mut at, end) = (extent.offset, extent.end());
        while at < end {
            let want = usize::try_from(end - at).unwrap_or(READ_LEN).min(buffer.len());
            let piece = &mut buffer[..want];
            match handle.read_exact_at(piece, at) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Err(self.damaged(&path, format!("ends before {end}")));
                }
                Err(error) => return Err(StoreError::io("read a staged file", error)),
            }
            hasher.update(piece);
            at += u64::try_from(want).unwrap_or(0);
        }
        // It left the page cache when it was made durable, and is read just to be looked at.
        if self.is_too_large_for_the_cache(extent.end()) {
            dont_need(&handle, extent.offset, extent.len);
        }
        Ok(hasher.finish())
    }
}

impl State {
    pub(super) fn space_of(&mut self, number: u32) -> Option<&mut FileSpace> {
        self.space.get_mut(usize::try_from(number).ok()?)
    }
}

impl FileSpace {
    /// `len` bytes were written; returns what of the promise that has used up.
    fn consume(&mut self, size: Option<u64>, len: u64) -> u64 {
        self.written = self.written.saturating_add(len);
        let used = match size {
            // With the last byte, the rest of the last block is taken, too.
            Some(size) if self.written >= size => self.remaining,
            _ => len.min(self.remaining),
        };
        self.remaining -= used;
        used
    }
}

/// How a file of the store's own is opened that is there: nothing that a link in its place leads to is. Links in the place of directories are found by
/// [`no_link_at`].
pub(super) fn no_link() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.custom_flags(OFlags::NOFOLLOW.bits().cast_signed());
    options
}

/// Opens what is there for reading, if it is a file, or a link to one. To open a pipe would wait for whoever writes into it.
///
/// # Errors
///
/// Of kind `InvalidInput` if it is something else.
pub(super) fn open_file(path: &Path) -> io::Result<File> {
    let file =
        OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no file"))
}

/// Refuses what lies at `dir` unless it is a directory itself: through a link, the store would write and delete wherever that leads.
pub(super) fn no_link_at(dir: &Path) -> io::Result<()> {
    if std::fs::symlink_metadata(dir)?.is_dir() {
        return Ok(());
    }
    Err(io::Error::other("something else than a directory lies in the place of one, perhaps a link"))
}

fn mark(dirs: &mut HashSet<PathBuf>, dir: &Path) {
    if !dirs.contains(dir) {
        dirs.insert(dir.to_owned());
    }
}

/// Writes all pieces from `offset` on, with as few calls as the system allows.
pub(super) fn write_all_at(file: &File, payload: &Payload, mut offset: u64) -> io::Result<()> {
    // A small file is one piece, and not worth a list, neither here nor in the kernel.
    if let [all] = payload.slices() {
        return file.write_all_at(all, offset);
    }
    let mut many = payload.io_slices().collect::<Vec<_>>();
    let mut rest = many.as_mut_slice();
    while !rest.is_empty() {
        let now = &rest[..rest.len().min(MAX_PIECES)];
        match rustix::io::pwritev(file, now, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                IoSlice::advance_slices(&mut rest, written);
                offset = offset.saturating_add(u64::try_from(written).unwrap_or(u64::MAX));
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Gives the file its blocks without changing its size. `false` where the file system cannot, and in a memory file system: that would fill
/// all of it with zeros at once (0.3 s for 1 GiB, while the sender waits), and has no runs to keep together.
#[cfg(target_os = "linux")]
fn allocate(file: &File, size: u64) -> Result<bool, StoreError> {
    use rustix::fs::{FallocateFlags, fallocate};
    use rustix::io::Errno;
    if in_memory(file) {
        return Ok(false);
    }
    match fallocate(file, FallocateFlags::KEEP_SIZE, 0, size) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(false),
        Err(error) => Err(StoreError::io("reserve space for a file", error.into())),
    }
}

#[cfg(not(target_os = "linux"))]
fn allocate(_file: &File, _size: u64) -> Result<bool, StoreError> {
    Ok(false)
}
