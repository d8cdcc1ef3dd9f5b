//! How rows lie in the database.
//!
//! | table | key | value |
//! |---|---|---|
//! | `rows` | slot (u16, big endian), key | flags, expiry if flagged (u64, big endian), value |
//! | `expiry` | expiry (u64, big endian), row key | nothing |
//! | `slot_counts` | slot | rows that are stored, expired ones included |
//! | `ownership` | first slot | JSON: end, owner, epoch |
//! | `nodes` | node id | JSON: addresses |
//! | `garbage` | first slot | end: rows of these slots are given up, to be deleted in the background |
//! | `splits` | transfer id | JSON: a hand-over that is under way |
//! | `meta` | name | this node's identity, the format's version |
//!
//! The slot comes first, so that a slot range is one contiguous range of keys.

use redb::TableDefinition;

use super::StoreError;
use crate::common::SlotRange;

pub(super) const ROWS: TableDefinition<'static, &[u8], &[u8]> = TableDefinition::new("rows");
pub(super) const EXPIRY: TableDefinition<'static, &[u8], ()> = TableDefinition::new("expiry");
pub(super) const SLOT_COUNTS: TableDefinition<'static, u16, u64> = TableDefinition::new("slot_counts");
pub(super) const OWNERSHIP: TableDefinition<'static, u16, &[u8]> = TableDefinition::new("ownership");
pub(super) const NODES: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("nodes");
pub(super) const GARBAGE: TableDefinition<'static, u16, u16> = TableDefinition::new("garbage");
pub(super) const SPLITS: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("splits");
pub(super) const META: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("meta");

const SLOT_BYTES: usize = 2;
const EXPIRY_BYTES: usize = 8;
const FLAG_EXPIRES: u8 = 1;

/// A row as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row<'a> {
    /// Milliseconds since the Unix epoch.
    pub(super) expires_at: Option<u64>,
    pub(super) value: &'a [u8],
}

impl<'a> Row<'a> {
    pub(super) fn decode(stored: &'a [u8]) -> Result<Self, StoreError> {
        match stored.split_first() {
            Some((0, value)) => Ok(Self { expires_at: None, value }),
            Some((&FLAG_EXPIRES, rest)) => {
                let (expiry, value) = rest.split_first_chunk::<EXPIRY_BYTES>().ok_or_else(unknown_row)?;
                Ok(Self { expires_at: Some(u64::from_be_bytes(*expiry)), value })
            }
            _ => Err(unknown_row()),
        }
    }

    pub(super) fn encode(self) -> Vec<u8> {
        let mut stored = Vec::with_capacity(1 + EXPIRY_BYTES + self.value.len());
        match self.expires_at {
            None => stored.push(0),
            Some(at) => {
                stored.push(FLAG_EXPIRES);
                stored.extend_from_slice(&at.to_be_bytes());
            }
        }
        stored.extend_from_slice(self.value);
        stored
    }

    /// Whether it can be seen at `now`.
    pub(super) fn is_live(&self, now: u64) -> bool {
        self.expires_at.is_none_or(|at| at > now)
    }
}

fn unknown_row() -> StoreError {
    StoreError::Damaged("a row of an unknown shape".into())
}

pub(super) fn row_key(slot: u16, key: &[u8]) -> Vec<u8> {
    let mut row = Vec::with_capacity(SLOT_BYTES + key.len());
    row.extend_from_slice(&slot.to_be_bytes());
    row.extend_from_slice(key);
    row
}

pub(super) fn split_row_key(row: &[u8]) -> Result<(u16, &[u8]), StoreError> {
    let (slot, key) = row
        .split_first_chunk::<SLOT_BYTES>()
        .ok_or_else(|| StoreError::Damaged("a row key without a slot".into()))?;
    Ok((u16::from_be_bytes(*slot), key))
}

/// The row keys of a slot range: first, and one past the last.
pub(super) fn range_bounds(range: SlotRange) -> ([u8; SLOT_BYTES], [u8; SLOT_BYTES]) {
    (range.start().to_be_bytes(), range.end().to_be_bytes())
}

pub(super) fn expiry_key(at: u64, row: &[u8]) -> Vec<u8> {
    let mut entry = Vec::with_capacity(EXPIRY_BYTES + row.len());
    entry.extend_from_slice(&at.to_be_bytes());
    entry.extend_from_slice(row);
    entry
}

pub(super) fn split_expiry_key(entry: &[u8]) -> Result<(u64, &[u8]), StoreError> {
    let (at, row) = entry
        .split_first_chunk::<EXPIRY_BYTES>()
        .ok_or_else(|| StoreError::Damaged("an expiry entry without a time".into()))?;
    Ok((u64::from_be_bytes(*at), row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_survive_their_encoding() {
        for expires_at in [None, Some(0), Some(u64::MAX)] {
            for value in [&b""[..], b"\0", b"value"] {
                let row = Row { expires_at, value };
                assert_eq!(Row::decode(&row.encode()).unwrap(), row);
            }
        }
    }

    #[test]
    fn rows_of_another_shape_are_refused() {
        for stored in [&b""[..], b"\x02value", b"\x01short"] {
            assert!(matches!(Row::decode(stored), Err(StoreError::Damaged(_))));
        }
    }

    #[test]
    fn slots_sort_before_keys() {
        assert!(row_key(1, b"\xff\xff") < row_key(2, b""));
        assert!(row_key(255, b"z") < row_key(256, b"a"));
        assert_eq!(split_row_key(&row_key(16383, b"k")).unwrap(), (16383, &b"k"[..]));
    }
}
