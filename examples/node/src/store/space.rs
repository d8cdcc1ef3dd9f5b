//! Room on the disk, looked at before it is needed: a database that ran out of it refuses all further work.

use super::{Store, StoreError};

/// Bytes that a staged row takes beside its key and value, and a tombstone beside its key: its place, sequence and expiry, again in the index of expiries,
/// and where each begins in its page.
pub(crate) const ROW_BYTES: u64 = 40;

/// Bytes of a row, for [`Store::check_space`]: an expiry has the key once more, in the index.
pub(super) fn row_bytes(key: usize, value: usize, expires: bool) -> u64 {
    let keys = if expires { key.saturating_mul(2) } else { key };
    u64::try_from(keys.saturating_add(value)).unwrap_or(u64::MAX).saturating_add(ROW_BYTES)
}

/// What rows of so many bytes take. Tree pages are two thirds full on average, and a page that changes is written anew before the old one is
/// free: so twice as much.
pub(crate) fn on_disk(bytes: u64) -> u64 {
    bytes.saturating_mul(2)
}

impl Store {
    /// Refuses unless there is room for `bytes` of rows more.
    pub(crate) fn check_space(&self, bytes: u64) -> Result<(), StoreError> {
        let available = self.available()?;
        let needed = on_disk(bytes).saturating_add(self.inner.reserve_bytes);
        if available < needed {
            return Err(StoreError::NoSpace { path: self.inner.directory.clone(), needed, available });
        }
        Ok(())
    }

    /// Bytes of the disk that may be taken, beside what is to be left free.
    pub(crate) fn room(&self) -> Result<u64, StoreError> {
        Ok(self.available()?.saturating_sub(self.inner.reserve_bytes))
    }

    fn available(&self) -> Result<u64, StoreError> {
        let failed = |error: rustix::io::Errno| {
            StoreError::io("cannot ask the file system for its free space", error.into())
        };
        let disk = rustix::fs::statvfs(&self.inner.directory).map_err(failed)?;
        Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
    }
}
