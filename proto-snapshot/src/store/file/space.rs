//! Who may use how much of the disk.
//!
//! What a transfer needs is promised before any data moves, and a promise counts against everybody else until its bytes are on the
//! disk. Two limits apply: what the file system has left, and the store's own quota, if it has one. Of what either would have without the
//! transfers of a node, that node gets its share only, so that what it announces never keeps all others out.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use proto_common::ids::NodeId;

use crate::store::StoreError;

use super::lock;

#[derive(Debug)]
pub(super) struct Space {
    root: PathBuf,
    min_free: u64,
    capacity: Option<u64>,
    /// 1 to 100.
    percent_per_peer: u8,
    ledger: Mutex<Ledger>,
}

#[derive(Debug, Default)]
struct Ledger {
    /// Promised, but not on the disk yet.
    outstanding: u64,
    /// What counts against the quota: installed bytes and whole promises.
    used: u64,
    /// By the node that a snapshot comes from; those that have no promise are not in it.
    by_peer: HashMap<NodeId, Whole>,
}

/// Whole promises, whatever of them is on the disk.
#[derive(Debug, Clone, Copy, Default)]
struct Whole {
    /// Bytes of the disk.
    disk: u64,
    /// Bytes of content.
    content: u64,
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
    outstanding: u64,
    whole: Whole,
}

impl Space {
    pub(super) fn new(
        root: PathBuf,
        min_free: u64,
        capacity: Option<u64>,
        percent_per_peer: u8,
    ) -> Arc<Self> {
        let percent_per_peer = percent_per_peer.clamp(1, 100);
        Arc::new(Self { root, min_free, capacity, percent_per_peer, ledger: Mutex::default() })
    }

    /// Promises a snapshot of the node `peer` room for `bytes` of content that take `on_disk` bytes of the disk.
    pub(super) fn reserve(
        self: &Arc<Self>,
        peer: &NodeId,
        bytes: u64,
        on_disk: u64,
    ) -> Result<Reservation, StoreError> {
        let reservation = self.adopt(peer, 0, 0, 0);
        reservation.grow(bytes, on_disk)?;
        Ok(reservation)
    }

    /// The promise of an earlier process, `bytes` of content that take `on_disk` bytes of the disk, of which `outstanding` are still to be written:
    /// kept even if there is less room than it was.
    pub(super) fn adopt(
        self: &Arc<Self>,
        peer: &NodeId,
        bytes: u64,
        on_disk: u64,
        outstanding: u64,
    ) -> Reservation {
        let reservation = Reservation { space: Arc::clone(self), peer: peer.clone(), held: Mutex::default() };
        let whole = Whole { disk: on_disk, content: bytes };
        reservation.add(&mut lock(&self.ledger), whole, outstanding);
        reservation
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

    /// How much more of what has `available` left a node may have that has `held`: its share of both together.
    fn left_of_share(&self, held: u64, available: u64) -> u64 {
        let all = u128::from(held) + u128::from(available);
        let share = all * u128::from(self.percent_per_peer) / 100;
        u64::try_from(share.saturating_sub(u128::from(held))).unwrap_or(u64::MAX).min(available)
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

impl Whole {
    fn add(&mut self, more: Self) {
        self.disk = self.disk.saturating_add(more.disk);
        self.content = self.content.saturating_add(more.content);
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
        let has = ledger.by_peer.get(&self.peer).copied().unwrap_or_default();
        let share = self.space.left_of_share(has.disk, free);
        let quota_share = self.space.left_of_share(has.content, quota);
        for (needed_bytes, available_bytes) in [(outstanding, share), (bytes, quota_share)] {
            if needed_bytes > available_bytes {
                return Err(StoreError::NoShare { peer: self.peer.clone(), needed_bytes, available_bytes });
            }
        }
        self.add(&mut ledger, Whole { disk: outstanding, content: bytes }, outstanding);
        Ok(())
    }

    fn add(&self, ledger: &mut Ledger, whole: Whole, outstanding: u64) {
        ledger.outstanding = ledger.outstanding.saturating_add(outstanding);
        ledger.used = ledger.used.saturating_add(whole.content);
        let mut held = lock(&self.held);
        held.outstanding = held.outstanding.saturating_add(outstanding);
        held.whole.add(whole);
        ledger.by_peer.entry(self.peer.clone()).or_default().add(whole);
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
        ledger.used = ledger.used.saturating_sub(held.whole.content);
        if let Some(of_peer) = ledger.by_peer.get_mut(&self.peer) {
            of_peer.disk = of_peer.disk.saturating_sub(held.whole.disk);
            of_peer.content = of_peer.content.saturating_sub(held.whole.content);
            if of_peer.disk == 0 && of_peer.content == 0 {
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
