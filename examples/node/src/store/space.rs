//! Room on the disk, looked at before it is needed: a database that ran out of it refuses all further work.

use super::{Store, StoreError};

impl Store {
    /// Refuses unless there is room for `bytes` of rows more. Tree pages are two thirds full on average, and a page
    /// that changes is written anew before the old one is free: so twice as much.
    pub(crate) fn check_space(&self, bytes: u64) -> Result<(), StoreError> {
        let failed = |error: rustix::io::Errno| {
            StoreError::io("cannot ask the file system for its free space", error.into())
        };
        let disk = rustix::fs::statvfs(&self.inner.directory).map_err(failed)?;
        let available = disk.f_bavail.saturating_mul(disk.f_frsize);
        let needed = bytes.saturating_mul(2).saturating_add(self.inner.reserve_bytes);
        if available < needed {
            return Err(StoreError::NoSpace { path: self.inner.directory.clone(), needed, available });
        }
        Ok(())
    }
}
