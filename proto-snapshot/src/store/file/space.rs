//! Who may use how much of the disk.
//!
//! What a transfer needs is promised before any data moves, and a promise counts against everybody else until its bytes are on the
//! disk. Two limits apply: what the file system has left, and the store's own quota, if it has one.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use crate::store::StoreError;

use super::lock;

#[derive(Debug)]
pub(super) struct Space {
    root: PathBuf,
    min_free: u64,
    capacity: Option<u64>,
    ledger: Mutex<Ledger>,
}

#[derive(Debug, Default)]
struct Ledger {
    /// Promised, but not on the disk yet.
    outstanding: u64,
    /// What counts against the quota: installed bytes and whole promises.
    used: u64,
}

/// One transfer's promise; given back when dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    space: Arc<Space>,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    outstanding: u64,
    used: u64,
}

impl Space {
    pub(super) fn new(root: PathBuf, min_free: u64, capacity: Option<u64>) -> Arc<Self> {
        Arc::new(Self { root, min_free, capacity, ledger: Mutex::default() })
    }

    /// Promises room for `bytes` of content that take `on_disk` bytes of the disk.
    pub(super) fn reserve(self: &Arc<Self>, bytes: u64, on_disk: u64) -> Result<Reservation, StoreError> {
        let reservation = self.adopt(0, 0);
        reservation.grow(bytes, on_disk)?;
        Ok(reservation)
    }

    /// The promise of an earlier process, of which `outstanding` is still to be written: kept even if there is less room than it was.
    pub(super) fn adopt(self: &Arc<Self>, bytes: u64, outstanding: u64) -> Reservation {
        let held = Held { outstanding, used: bytes };
        let mut ledger = lock(&self.ledger);
        ledger.outstanding = ledger.outstanding.saturating_add(outstanding);
        ledger.used = ledger.used.saturating_add(bytes);
        drop(ledger);
        Reservation { space: Arc::clone(self), held: Mutex::new(held) }
    }

    /// Counts an installed snapshot against the quota.
    pub(super) fn add_installed(&self, bytes: u64) {
        let mut ledger = lock(&self.ledger);
        ledger.used = ledger.used.saturating_add(bytes);
    }

    /// The opposite, when it is deleted.
    pub(super) fn remove_installed(&self, bytes: u64) {
        let mut ledger = lock(&self.ledger);
        ledger.used = ledger.used.saturating_sub(bytes);
    }

    /// What may still be promised: bytes of the disk, and bytes of content.
    fn available(&self, ledger: &Ledger) -> Result<(u64, u64), StoreError> {
        let disk = rustix::fs::statvfs(&self.root)
            .map_err(|error| StoreError::io("ask the file system for its free space", error.into()))?;
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        let free = free.saturating_sub(ledger.outstanding).saturating_sub(self.min_free);
        let quota = self.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(ledger.used));
        Ok((free, quota))
    }

    /// `error` with the numbers of now, if it says that there is no room.
    pub(super) fn explain(&self, error: StoreError, needed: u64) -> StoreError {
        match error {
            StoreError::NoSpace { needed_bytes: 0, .. } => {
                let (free, quota) = self.available(&lock(&self.ledger)).unwrap_or((0, 0));
                StoreError::NoSpace { needed_bytes: needed, available_bytes: free.min(quota) }
            }
            other => other,
        }
    }
}

impl Reservation {
    /// Promises `bytes` of content more, for which `outstanding` bytes of the disk are needed.
    pub(super) fn grow(&self, bytes: u64, outstanding: u64) -> Result<(), StoreError> {
        let mut ledger = lock(&self.space.ledger);
        let (free, quota) = self.space.available(&ledger)?;
        if outstanding > free {
            return Err(StoreError::NoSpace { needed_bytes: outstanding, available_bytes: free });
        }
        if bytes > quota {
            return Err(StoreError::NoSpace { needed_bytes: bytes, available_bytes: quota });
        }
        ledger.outstanding = ledger.outstanding.saturating_add(outstanding);
        ledger.used = ledger.used.saturating_add(bytes);
        let mut held = lock(&self.held);
        held.outstanding = held.outstanding.saturating_add(outstanding);
        held.used = held.used.saturating_add(bytes);
        Ok(())
    }

    /// `bytes` of the promise are on the disk now, where the file system counts them itself.
    pub(super) fn consume(&self, bytes: u64) {
        let mut ledger = lock(&self.space.ledger);
        let mut held = lock(&self.held);
        let bytes = bytes.min(held.outstanding);
        held.outstanding -= bytes;
        ledger.outstanding = ledger.outstanding.saturating_sub(bytes);
    }

    /// What has still to be written.
    pub(super) fn outstanding(&self) -> u64 {
        lock(&self.held).outstanding
    }

    /// Gives everything back. What became of the bytes is counted elsewhere from here on.
    pub(super) fn release(&self) {
        let mut ledger = lock(&self.space.ledger);
        let held = std::mem::take(&mut *lock(&self.held));
        ledger.outstanding = ledger.outstanding.saturating_sub(held.outstanding);
        ledger.used = ledger.used.saturating_sub(held.used);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release();
    }
}
