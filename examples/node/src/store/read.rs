//! Reads, each in a redb read transaction.

use std::ops::Bound;

use bytes::Bytes;
use redb::{Database, ReadOnlyTable, ReadableDatabase as _};

use super::StoreError;
use super::tables::{self, Row, row_key, split_row_key};
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
    now: u64,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("now", &self.now).finish_non_exhaustive()
    }
}

impl Reader {
    pub(super) fn begin(database: &Database, now: u64) -> Result<Self, StoreError> {
        Ok(Self { rows: database.begin_read()?.open_table(tables::ROWS)?, now })
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
        let Some(stored) = self.rows.get(row_key(slot_of(key), key).as_slice())? else {
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
        match self.rows.get(row_key(slot_of(key), key).as_slice())? {
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
        let (start, end) = tables::range_bounds(range);
        let start = match from {
            ScanPosition::Slot(slot) => Bound::Included(start.max(slot.to_be_bytes()).to_vec()),
            ScanPosition::After(key) => Bound::Excluded(row_key(slot_of(key), key)),
        };
        let bounds = (start.as_ref().map(Vec::as_slice), Bound::Excluded(end.as_slice()));
        let mut keys = Vec::new();
        let mut last: Option<Bytes> = None;
        for (looked_at, entry) in self.rows.range::<&[u8]>(bounds)?.enumerate() {
            let (row, stored) = entry?;
            let (slot, key) = split_row_key(row.value())?;
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
            if Row::decode(stored.value())?.is_live(self.now) {
                keys.push(key);
            }
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
