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

/// Bytes of keys after which a step of a scan ends, whatever its count: a key may have 64 KiB.
const SCAN_BYTES: usize = 1 << 20;

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
    /// slot is at its end, or `count` rows more, or 1 MiB of keys.
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
        let (mut looked_at, mut bytes) = (0, 0);
        while let Some(found) = rows.next()? {
            let Place { slot, key, .. } = found.place()?;
            if let Some(last) = &last {
                // Ending between slots needs no memory of where it was; a large slot has to be cut.
                let new_slot = slot_of(last) != slot;
                let is_long = bytes >= SCAN_BYTES;
                if (looked_at >= count || is_long) && new_slot {
                    return Ok(Scanned { keys, next: Some(ScanPosition::Slot(slot)) });
                }
                if looked_at >= count.saturating_mul(2) || is_long {
                    return Ok(Scanned { keys, next: Some(ScanPosition::After(last.clone())) });
                }
            }
            let key = Bytes::copy_from_slice(key);
            last = Some(key.clone());
            if found.row()?.is_live(self.now) {
                keys.push(key);
            }
            looked_at += 1;
            bytes += last.as_ref().map_or(0, Bytes::len);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{ReadExtent, test_store};

    #[tokio::test]
    async fn a_step_of_a_scan_ends_after_a_mib_of_keys() {
        const KEY: usize = 64 << 10;
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = test_store::open(dir.path(), "n1", "0-16383");
        // A slot that ends with a step, and one that a step ends in.
        let (first, second) = ("{b}", "{a}");
        assert!(slot_of(first.as_bytes()) < slot_of(second.as_bytes()));
        for (tag, count) in [(first, SCAN_BYTES / KEY), (second, SCAN_BYTES / KEY + 1)] {
            for n in 0..count {
                test_store::set(&store, &format!("{tag}{n:0>width$}", width = KEY - tag.len()), "v").await;
            }
        }
        let mut position = ScanPosition::Slot(0);
        let mut steps = Vec::new();
        loop {
            let from = position.clone();
            let scanned =
                store.read(ReadExtent::Bulk, move |reader| reader.scan(&from, SlotRange::FULL, 10_000)).await;
            let Scanned { keys, next } = scanned.unwrap();
            let last = keys.last().cloned().unwrap();
            steps.push(keys.len());
            let Some(next) = next else { break };
            match steps.len() {
                1 => assert_eq!(next, ScanPosition::Slot(slot_of(second.as_bytes()))),
                _ => assert_eq!(next, ScanPosition::After(last)),
            }
            position = next;
        }
        assert_eq!(steps, [16, 16, 1]);
    }
}
