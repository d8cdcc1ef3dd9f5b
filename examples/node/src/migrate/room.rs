//! How much of the disk the migrations from one node may take while they come in, so that it is left to others whatever that node sends.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use proto::common::error::Error;
use proto::common::ids::MigrationId;
use proto::migration::Reason;
use proto::migration::entry::Entry;
use proto::migration::target::{Offer, Staged};

use super::failed;
use crate::common::NodeId;
use crate::store::{ROW_BYTES, Store, on_disk};

/// The shares of all nodes. What is committed counts no longer.
#[derive(Debug)]
pub(super) struct Room {
    /// 1 to 100, of the room that there would be without what the node has staged.
    percent: u8,
    parts: Mutex<BTreeMap<MigrationId, Part>>,
}

/// What one migration takes, in bytes of keys and values and [`ROW_BYTES`] for each.
#[derive(Debug, Default)]
struct Part {
    /// Unknown where its record cannot be read.
    source: Option<NodeId>,
    rows: u64,
    /// Without those from before a restart.
    tombstones: u64,
    /// What it had and said would come when it was admitted last; 0 after a restart, until the source comes back.
    announced: u64,
}

impl Part {
    fn staged(&self) -> u64 {
        self.rows.saturating_add(self.tombstones)
    }
}

impl Room {
    pub(super) fn new(percent: u8) -> Self {
        Self { percent: percent.clamp(1, 100), parts: Mutex::default() }
    }

    fn parts(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Part>> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets a source come, unless what it announces is more than is left of its share.
    pub(super) fn admit(&self, store: &Store, offer: &Offer<'_>) -> Result<(), Error> {
        let missing = offer.missing_bytes.unwrap_or(0);
        store.check_space(missing).map_err(failed)?;
        let mut parts = self.parts();
        let is_new = !parts.contains_key(offer.id);
        let part = parts.entry(offer.id.clone()).or_default();
        part.source = Some(offer.spec.source_node.clone());
        // It comes instead of what was announced before.
        let before = std::mem::take(&mut part.announced);
        let admitted = self.check_share(&parts, store, offer.id, missing);
        match parts.get_mut(offer.id) {
            Some(part) if admitted.is_ok() => part.announced = part.staged().saturating_add(missing),
            // Or one who is refused could fill the memory with names.
            None => {}
            Some(_) if is_new => drop(parts.remove(offer.id)),
            // The stream that there is goes on with what it was let in for.
            Some(part) => part.announced = before,
        }
        admitted
    }

    /// Refuses entries that do not fit.
    pub(super) fn check(&self, store: &Store, id: &MigrationId, entries: &[Entry]) -> Result<(), Error> {
        let bytes =
            entries.iter().map(|entry| entry.bytes().saturating_add(ROW_BYTES)).fold(0, u64::saturating_add);
        store.check_space(bytes).map_err(failed)?;
        self.check_share(&self.parts(), store, id, bytes)
    }

    /// Counts what an earlier process left, for the source that its record tells.
    pub(super) fn recovered(&self, id: &MigrationId, staged: Staged, source: Option<NodeId>) {
        self.staged(id, staged, 0);
        if let Some(part) = self.parts().get_mut(id).filter(|part| part.source.is_none()) {
            part.source = source;
        }
    }

    /// Counts what is staged, and by how many bytes its tombstones grew.
    pub(super) fn staged(&self, id: &MigrationId, staged: Staged, tombstones: i64) {
        let mut parts = self.parts();
        let part = parts.entry(id.clone()).or_default();
        part.rows = staged.bytes.saturating_add(staged.keys.saturating_mul(ROW_BYTES));
        part.tombstones = part.tombstones.saturating_add_signed(tombstones);
    }

    /// It begins from nothing.
    pub(super) fn begun(&self, id: &MigrationId) {
        if let Some(part) = self.parts().get_mut(id) {
            (part.rows, part.tombstones) = (0, 0);
        }
    }

    /// Nothing is staged for it any more.
    pub(super) fn ended(&self, id: &MigrationId) {
        self.parts().remove(id);
    }

    fn check_share(
        &self,
        parts: &BTreeMap<MigrationId, Part>,
        store: &Store,
        id: &MigrationId,
        more: u64,
    ) -> Result<(), Error> {
        let Some(source) = parts.get(id).and_then(|part| part.source.as_ref()) else { return Ok(()) };
        let (mut staged, mut held) = (0_u64, 0_u64);
        for (other, part) in parts.iter().filter(|(_, part)| part.source.as_ref() == Some(source)) {
            staged = staged.saturating_add(part.staged());
            held = held.saturating_add(if other == id {
                part.staged()
            } else {
                part.staged().max(part.announced)
            });
        }
        let room = store.room().map_err(failed)?;
        let share = share(self.percent, room.saturating_add(on_disk(staged)));
        let (held, needed) = (on_disk(held), on_disk(more));
        let available = share.saturating_sub(held);
        if needed <= available {
            return Ok(());
        }
        Err(Reason::InsufficientDisk
            .error(format!(
                "the disk has {available} bytes left for migrations from node {source}, which is its share, of {needed} that are needed"
            ))
            .metadata("needed_bytes", needed.to_string())
            .metadata("available_bytes", available.to_string())
            .metadata("peer", source.as_str()))
    }
}

fn share(percent: u8, of: u64) -> u64 {
    u64::try_from(u128::from(of) * u128::from(percent) / 100).unwrap_or(u64::MAX)
}
