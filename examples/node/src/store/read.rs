//! Reads, each in a redb read transaction.

use std::sync::Arc;

use bytes::Bytes;
use redb::ReadOnlyTable;

use super::StoreError;
use super::generations::Generations;
use super::shared::Shared;
use super::tables::{self, Place, Row};
use super::visible::VisibleRows;
use crate::common::{SlotRange, slot_of};

/// A live row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The value.
    pub value: Bytes,
    /// When it expires, in milliseconds since the Unix epoch.
    pub expires_at: Option<u64>,
}

/// One read transaction: everything is seen as it was when that began.
pub struct Reader {
    rows: ReadOnlyTable<&'static [u8], &'static [u8]>,
    generations: Arc<Generations>,
    now: u64,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("now", &self.now).finish_non_exhaustive()
    }
}

impl Reader {
    pub(super) fn begin(shared: &Shared, now: u64) -> Result<Self, StoreError> {
        let (txn, generations) = shared.generations.begin_read(&shared.database)?;
        Ok(Self { rows: txn.open_table(tables::ROWS)?, generations, now })
    }

    fn row_key(&self, key: &[u8]) -> Vec<u8> {
        let slot = slot_of(key);
        Place { slot, generation: self.generations.of(slot), key }.row()
    }

    /// The time that expiry is compared with, in milliseconds since the Unix epoch.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.now
    }

    /// The row of `key`, unless it has expired.
    ///
    /// # Errors
    ///
    /// The database could not be read.
    pub fn get(&self, key: &[u8]) -> Result<Option<Entry>, StoreError> {
        let Some(stored) = self.rows.get(self.row_key(key).as_slice())? else {
            return Ok(None);
        };
        let row = Row::decode(stored.value())?;
        Ok(row
            .is_live(self.now)
            .then(|| Entry { value: Bytes::copy_from_slice(row.value), expires_at: row.expires_at }))
    }

    /// Whether `key` exists.
    ///
    /// # Errors
    ///
    /// The database could not be read.
    pub fn exists(&self, key: &[u8]) -> Result<bool, StoreError> {
        match self.rows.get(self.row_key(key).as_slice())? {
            Some(stored) => Ok(Row::decode(stored.value())?.is_live(self.now)),
            None => Ok(false),
        }
    }

    /// Keys from `from` on in `range`, in the order of slot and key, until `count` rows were looked at and the
    /// slot is at its end, or `count` rows more.
    ///
    /// # Errors
    ///
    /// The database could not be read.
    pub fn scan(&self, from: &ScanPosition, range: SlotRange, count: usize) -> Result<Scanned, StoreError> {
        let mut keys = Vec::new();
        let mut last: Option<Bytes> = None;
        let (range, behind) = match from {
            ScanPosition::Slot(slot) => match SlotRange::new(range.start().max(*slot), range.end()) {
                Ok(rest) => (rest, None),
                Err(_) => return Ok(Scanned { keys, next: None }),
            },
            ScanPosition::After(key) => (range, Some(tables::position(slot_of(key), key))),
        };
        let mut rows = VisibleRows::new(&self.rows, &self.generations, range, behind.as_deref())?;
        let mut looked_at = 0;
        while let Some(found) = rows.next()? {
            let Place { slot, key, .. } = found.place()?;
            if let Some(last) = &last {
                // Ending between slots needs no memory of where it was; a large slot has to be cut.
                let new_slot = slot_of(last) != slot;
                if looked_at >= count && new_slot {
                    return Ok(Scanned { keys, next: Some(ScanPosition::Slot(slot)) });
                }
                if looked_at >= count.saturating_mul(2) {
                    return Ok(Scanned { keys, next: Some(ScanPosition::After(last.clone())) });
                }
            }
            let key = Bytes::copy_from_slice(key);
            last = Some(key.clone());
            if found.row()?.is_live(self.now) {
                keys.push(key);
            }
            looked_at += 1;
        }
        Ok(Scanned { keys, next: None })
    }
}

/// Where a scan goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ScanPosition {
    /// At the first key of this slot.
    Slot(u16),
    /// After this key.
    After(Bytes),
}

/// One step of a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scanned {
    /// Live keys.
    pub keys: Vec<Bytes>,
    /// Where to go on; `None` at the end of the range.
    pub next: Option<ScanPosition>,
}
