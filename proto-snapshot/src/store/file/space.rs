//! Who may use how much of the disk.
//!
//! What a transfer needs is promised before any data moves, and a promise counts against everybody else until its bytes are on the
//! disk. Two limits apply: what the file system has left, and the store's own quota, if it has one. Of what either would have without the
//! transfers of a node, that node gets its share only, so that what it announces never keeps all others out.
//!
//! Files and directories are promised as bytes are: many file systems have a number of them that is settled when they are made (ext4: one for
//! 16 KiB), which small files use up long before the bytes, and without one the node can write nothing of its own any more.

use std::collections::HashMap;
use std::ops::{Add, AddAssign};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use proto_common::ids::NodeId;

use crate::store::StoreError;

use super::lock;

#[derive(Debug)]
pub(super) struct Space {
    root: PathBuf,
    min_free: Amount,
    capacity: Option<u64>,
    /// 1 to 100.
    percent_per_peer: u8,
    ledger: Mutex<Ledger>,
    /// Files that the file system has left, where a test says so.
    #[cfg(test)]
    pub(super) files_left: Mutex<Option<u64>>,
}

#[derive(Debug, Default)]
struct Ledger {
    /// Promised, but not on the disk yet.
    outstanding: Amount,
    /// Bytes that count against the quota: of what is installed, and of whole promises.
    used: u64,
    /// Whole promises, whatever of them is on the disk, by the node that a snapshot comes from; those that have no promise are not in it.
    by_peer: HashMap<NodeId, Amount>,
}

/// Some of the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Amount {
    /// Bytes, of whole blocks.
    pub(super) bytes: u64,
    /// Files and directories.
    pub(super) files: u64,
}

/// What may still be promised.
struct Left {
    disk: Amount,
    quota: u64,
}

/// One transfer's promise; given back when dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    space: Arc<Space>,
    peer: NodeId,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    outstanding: Amount,
    whole: Amount,
}

impl Space {
    pub(super) fn new(
        root: PathBuf,
        min_free: Amount,
        capacity: Option<u64>,
        percent_per_peer: u8,
    ) -> Arc<Self> {
        Arc::new(Self {
            root,
            min_free,
            capacity,
            percent_per_peer: percent_per_peer.clamp(1, 100),
            ledger: Mutex::default(),
            #[cfg(test)]
            files_left: Mutex::default(),
        })
    }

    /// Promises `amount` to a snapshot of the node `peer`.
    pub(super) fn reserve(
        self: &Arc<Self>,
        peer: &NodeId,
        amount: Amount,
    ) -> Result<Reservation, StoreError> {
        let reservation = self.adopt(peer, Amount::default(), Amount::default());
        reservation.grow(amount)?;
        Ok(reservation)
    }

    /// The promise of an earlier process, of which `outstanding` is still to be written: kept even if there is less room than it was.
    pub(super) fn adopt(self: &Arc<Self>, peer: &NodeId, whole: Amount, outstanding: Amount) -> Reservation {
        let reservation = Reservation { space: Arc::clone(self), peer: peer.clone(), held: Mutex::default() };
        reservation.add(&mut lock(&self.ledger), whole, outstanding);
        reservation
    }

    /// Counts the bytes of an installed snapshot against the quota.
    pub(super) fn add_installed(&self, bytes: u64) {
        let mut ledger = lock(&self.ledger);
        ledger.used = ledger.used.saturating_add(bytes);
    }

    /// The opposite, when it is deleted.
    pub(super) fn remove_installed(&self, bytes: u64) {
        let mut ledger = lock(&self.ledger);
        ledger.used = ledger.used.saturating_sub(bytes);
    }

    /// What the file system has, whoever it was promised to.
    fn free(&self) -> Result<Amount, StoreError> {
        let disk = rustix::fs::statvfs(&self.root)
            .map_err(|error| StoreError::io("ask the file system for its free space", error.into()))?;
        // Some make as many as there is room for (Btrfs), and say that they have none at all.
        let files = if disk.f_files == 0 { u64::MAX } else { disk.f_favail };
        #[cfg(test)]
        let files = lock(&self.files_left).unwrap_or(files);
        Ok(Amount { bytes: disk.f_bavail.saturating_mul(disk.f_frsize), files })
    }

    fn left(&self, ledger: &Ledger) -> Result<Left, StoreError> {
        let disk = self.free()?.less(ledger.outstanding).less(self.min_free);
        let quota = self.capacity.map_or(u64::MAX, |capacity| capacity.saturating_sub(ledger.used));
        Ok(Left { disk, quota })
    }

    /// How much more of what has `available` left a node may have that has `held`: its share of both together.
    fn left_of_share(&self, held: u64, available: u64) -> u64 {
        let all = u128::from(held) + u128::from(available);
        let share = all * u128::from(self.percent_per_peer) / 100;
        u64::try_from(share.saturating_sub(u128::from(held))).unwrap_or(u64::MAX).min(available)
    }

    /// `error` with the numbers of now, if it says that there is no room.
    pub(super) fn explain(&self, error: StoreError, needed: Amount) -> StoreError {
        match error {
            StoreError::NoSpace { needed_bytes: 0, .. } => {
                // The system has one error for both.
                if self.free().is_ok_and(|free| free.files == 0) {
                    return StoreError::NoFiles { needed_files: needed.files, available_files: 0 };
                }
                let left = self.left(&lock(&self.ledger));
                let available_bytes = left.map_or(0, |left| left.disk.bytes.min(left.quota));
                StoreError::NoSpace { needed_bytes: needed.bytes, available_bytes }
            }
            other => other,
        }
    }
}

impl Amount {
    pub(super) const ALL: Self = Self { bytes: u64::MAX, files: u64::MAX };

    fn less(self, other: Self) -> Self {
        let bytes = self.bytes.saturating_sub(other.bytes);
        Self { bytes, files: self.files.saturating_sub(other.files) }
    }

    /// The larger one of each.
    pub(super) fn max(self, other: Self) -> Self {
        Self { bytes: self.bytes.max(other.bytes), files: self.files.max(other.files) }
    }

    fn min(self, other: Self) -> Self {
        Self { bytes: self.bytes.min(other.bytes), files: self.files.min(other.files) }
    }
}

impl Add for Amount {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let bytes = self.bytes.saturating_add(other.bytes);
        Self { bytes, files: self.files.saturating_add(other.files) }
    }
}

impl AddAssign for Amount {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Reservation {
    /// Promises `amount` more.
    pub(super) fn grow(&self, amount: Amount) -> Result<(), StoreError> {
        let mut ledger = lock(&self.space.ledger);
        let Left { disk, quota } = self.space.left(&ledger)?;
        let Amount { bytes: needed_bytes, files: needed_files } = amount;
        for available_bytes in [disk.bytes, quota] {
            if needed_bytes > available_bytes {
                return Err(StoreError::NoSpace { needed_bytes, available_bytes });
            }
        }
        if needed_files > disk.files {
            return Err(StoreError::NoFiles { needed_files, available_files: disk.files });
        }
        let has = ledger.by_peer.get(&self.peer).copied().unwrap_or_default();
        let peer = || self.peer.clone();
        for available in [disk.bytes, quota] {
            let available_bytes = self.space.left_of_share(has.bytes, available);
            if needed_bytes > available_bytes {
                return Err(StoreError::NoShare { peer: peer(), needed_bytes, available_bytes });
            }
        }
        let available_files = self.space.left_of_share(has.files, disk.files);
        if needed_files > available_files {
            return Err(StoreError::NoShareOfFiles { peer: peer(), needed_files, available_files });
        }
        self.add(&mut ledger, amount, amount);
        Ok(())
    }

    fn add(&self, ledger: &mut Ledger, whole: Amount, outstanding: Amount) {
        ledger.outstanding += outstanding;
        ledger.used = ledger.used.saturating_add(whole.bytes);
        let mut held = lock(&self.held);
        held.outstanding += outstanding;
        held.whole += whole;
        *ledger.by_peer.entry(self.peer.clone()).or_default() += whole;
    }

    /// `amount` of the promise is on the disk now, where the file system counts it itself.
    pub(super) fn consume(&self, amount: Amount) {
        let mut ledger = lock(&self.space.ledger);
        let mut held = lock(&self.held);
        let amount = amount.min(held.outstanding);
        held.outstanding = held.outstanding.less(amount);
        ledger.outstanding = ledger.outstanding.less(amount);
    }

    /// What has still to be written.
    pub(super) fn outstanding(&self) -> Amount {
        lock(&self.held).outstanding
    }

    /// Gives everything back. What became of the bytes is counted elsewhere from here on.
    pub(super) fn release(&self) {
        let mut ledger = lock(&self.space.ledger);
        let held = std::mem::take(&mut *lock(&self.held));
        ledger.outstanding = ledger.outstanding.less(held.outstanding);
        ledger.used = ledger.used.saturating_sub(held.whole.bytes);
        if let Some(of_peer) = ledger.by_peer.get_mut(&self.peer) {
            *of_peer = of_peer.less(held.whole);
            if *of_peer == Amount::default() {
                ledger.by_peer.remove(&self.peer);
            }
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.release();
    }
}
