//! Deletes what was moved out of the way, in the background: a snapshot of many gigabytes takes its time.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::unix_ms;

/// One job at a time deletes; the store ends it when it is dropped, and what is left is deleted after the next start.
#[derive(Debug, Clone)]
pub(super) struct Trash {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    running: AtomicBool,
    stop: AtomicBool,
    names: AtomicU64,
}

impl Trash {
    pub(super) fn new(dir: PathBuf) -> Self {
        let (running, stop, names) =
            (AtomicBool::new(false), AtomicBool::new(false), AtomicU64::new(unix_ms() << 16));
        Self { inner: Arc::new(Inner { dir, running, stop, names }) }
    }

    /// Moves `path` into the trash, if it is there. The caller syncs the directory that it was in.
    pub(super) fn take(&self, path: &Path) -> io::Result<()> {
        loop {
            let name = self.inner.names.fetch_add(1, Ordering::AcqRel);
            match std::fs::rename(path, self.inner.dir.join(format!("{name:x}"))) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                // A name of an earlier process, whose clock was ahead.
                Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                result => return result,
            }
        }
    }

    /// Begins to delete, unless that is under way. Must be called within a Tokio runtime.
    pub(super) fn clean(&self) {
        if !self.inner.running.swap(true, Ordering::AcqRel) {
            let inner = Arc::clone(&self.inner);
            drop(tokio::task::spawn_blocking(move || inner.work()));
        }
    }

    pub(super) fn stop(&self) {
        self.inner.stop.store(true, Ordering::Release);
    }
}

impl Inner {
    fn work(&self) {
        loop {
            let seen = self.names.load(Ordering::Acquire);
            self.empty();
            self.running.store(false, Ordering::Release);
            // Something may have come since the look into the directory; what failed to go waits for the next call.
            let more = self.names.load(Ordering::Acquire) != seen && !self.stopped();
            if !more || self.running.swap(true, Ordering::AcqRel) {
                return;
            }
        }
    }

    fn empty(&self) {
        let Ok(entries) = std::fs::read_dir(&self.dir) else { return };
        for entry in entries.flatten() {
            if let Err(error) = self.delete(&entry.path()) {
                tracing::warn!(%error, "cannot delete an old snapshot; it is tried again later");
            }
        }
    }

    /// Like `remove_dir_all`, but it can be stopped.
    fn delete(&self, path: &Path) -> io::Result<()> {
        if self.stopped() {
            return Ok(());
        }
        if !std::fs::symlink_metadata(path)?.is_dir() {
            return std::fs::remove_file(path);
        }
        for entry in std::fs::read_dir(path)? {
            self.delete(&entry?.path())?;
        }
        if self.stopped() { Ok(()) } else { std::fs::remove_dir(path) }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }
}
