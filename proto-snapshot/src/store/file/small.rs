//! Files that come whole in one chunk: made, written and closed, without a look at what is there, a handle that is kept, or a walk from
//! the root of the file system for each.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::extent::Extent;
use crate::store::{StagedChunk, StoreError};

use super::space::Amount;
use super::staging::Inner;
use super::write::{PREALLOCATE_FROM, write_all_at};

/// Makes files for one call of [`Inner::write`], and counts them at its end: a sync that begins before does not have to cover them.
pub(super) struct Maker<'a> {
    inner: &'a Inner,
    /// The directory of the last one, below the tree.
    dir: Option<(&'a str, OwnedFd)>,
    made: Vec<Extent>,
    /// Directories of those made, each once in a row.
    dirs: Vec<&'a str>,
}

impl<'a> Maker<'a> {
    pub(super) fn new(inner: &'a Inner) -> Self {
        Self { inner, dir: None, made: Vec::new(), dirs: Vec::new() }
    }

    /// Makes the file of `chunk`; `false` unless it is a small one that comes whole and is not there yet.
    pub(super) fn make(&mut self, chunk: &StagedChunk) -> Result<bool, StoreError> {
        let StagedChunk { file: number, offset, payload } = chunk;
        let file = self.inner.file(*number)?;
        let len = u64::try_from(payload.len()).unwrap_or(u64::MAX);
        if *offset != 0 || file.size != Some(len) || len == 0 || len >= PREALLOCATE_FROM {
            return Ok(false);
        }
        let (parent, name) = file.name.as_str().rsplit_once('/').unwrap_or(("", file.name.as_str()));
        let dir = match &self.dir {
            Some((at, dir)) if *at == parent => dir,
            _ => &self.dir.insert((parent, self.inner.open_dir(parent)?)).1,
        };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let opened = match rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o666)) {
            Ok(opened) => File::from(opened),
            Err(Errno::EXIST) => return Ok(false),
            Err(error) => return Err(StoreError::io("open a staged file", error.into())),
        };
        if self.dirs.last() != Some(&parent) {
            self.dirs.push(parent);
        }
        self.made.push(Extent { file: *number, offset: 0, len });
        write_all_at(&opened, payload, 0).map_err(|error| StoreError::io("write", error)).map(|()| true)
    }

    /// Counts what was made as written. To be called also after an error. Of what was made, nothing was lost before: it was not there.
    pub(super) fn finish(self) {
        if self.made.is_empty() {
            return;
        }
        let mut state = self.inner.lock_state();
        for dir in self.dirs {
            let path = self.inner.area.tree.join(dir);
            state.dirty_dirs.insert(path);
        }
        let mut consumed = Amount { bytes: 0, files: self.made.len() as u64 };
        for extent in self.made {
            state.dirty.add(extent);
            consumed.bytes += state.space_of(extent.file).map_or(0, |space| space.settle());
        }
        drop(state);
        self.inner.reservation.consume(consumed);
    }
}

impl Inner {
    /// The directory `below` the tree, made if there is none.
    fn open_dir(&self, below: &str) -> Result<OwnedFd, StoreError> {
        let path = self.area.tree.join(below);
        self.make_dirs(&mut self.lock_state(), &path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(&path, flags, Mode::empty())
            .map_err(|error| StoreError::io("open a directory", io::Error::from(error)))
    }
}
