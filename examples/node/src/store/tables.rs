//! How rows lie in the database.
//!
//! | table | key | value |
//! |---|---|---|
//! | `rows` | slot (u16, big endian), generation (u32, big endian), key | flags, sequence and expiry if flagged (u64, big endian), value |
//! | `expiry` | generation, expiry (u64, big endian), slot, key | nothing |
//! | `slot_counts` | generation, slot | rows that are stored, expired ones included |
//! | `generations` | first slot of a range | the generation of it that is visible |
//! | `garbage` | generation, first slot | end: rows that are not visible any more, to be deleted in the background |
//! | `ownership` | first slot | JSON: end, owner, epoch |
//! | `nodes` | node id | JSON: addresses |
//! | `splits` | transfer id | JSON: a hand-over that is under way |
//! | `leases` | migration id | number, slots, and the sequence behind which its change log starts |
//! | `changes` | number of the lease, sequence | time (ms), bytes, slot, key: a change of a key |
//! | `migrations` | migration id | what is staged for it, and its record |
//! | `tombstones` | generation, slot, key | sequence: a staged key that does not exist |
//! | `staged` | generation, slot | keys that are staged, and the sum of their hashes |
//! | `fences` | shard id | epoch, term: the highest fence that was seen |
//! | `counters` | name | the last number that was given away |
//! | `meta` | name | this node's identity, the format's version |
//!
//! In `rows` the slot comes first, so that a slot range is one contiguous range of keys, then the generation: rows of one slot that are
//! visible, staged and given up lie apart, and which of them are visible is one entry in `generations`. Where something is
//! looked for by generation, that comes first.

use redb::TableDefinition;

use super::StoreError;

type Bytes = &'static [u8];

pub(super) const ROWS: TableDefinition<'static, Bytes, Bytes> = TableDefinition::new("rows");
pub(super) const EXPIRY: TableDefinition<'static, Bytes, ()> = TableDefinition::new("expiry");
pub(super) const SLOT_COUNTS: TableDefinition<'static, (u32, u16), u64> = TableDefinition::new("slot_counts");
pub(super) const GENERATIONS: TableDefinition<'static, u16, u32> = TableDefinition::new("generations");
pub(super) const GARBAGE: TableDefinition<'static, (u32, u16), u16> = TableDefinition::new("garbage");
pub(super) const OWNERSHIP: TableDefinition<'static, u16, Bytes> = TableDefinition::new("ownership");
pub(super) const NODES: TableDefinition<'static, &str, Bytes> = TableDefinition::new("nodes");
pub(super) const SPLITS: TableDefinition<'static, &str, Bytes> = TableDefinition::new("splits");
pub(super) const LEASES: TableDefinition<'static, &str, (u32, u16, u16, u64)> =
    TableDefinition::new("leases");
pub(super) const CHANGES: TableDefinition<'static, (u32, u64), Bytes> = TableDefinition::new("changes");
pub(super) const MIGRATIONS: TableDefinition<'static, &str, StoredMigration> =
    TableDefinition::new("migrations");
pub(super) const TOMBSTONES: TableDefinition<'static, Bytes, u64> = TableDefinition::new("tombstones");
pub(super) const STAGED: TableDefinition<'static, (u32, u16), (u64, u128)> = TableDefinition::new("staged");
pub(super) const FENCES: TableDefinition<'static, &str, (u64, u64)> = TableDefinition::new("fences");
/// How many of them each peer has named first.
pub(super) const NAMED_BY: TableDefinition<'static, &str, u64> = TableDefinition::new("named_by");
pub(super) const COUNTERS: TableDefinition<'static, &str, u64> = TableDefinition::new("counters");
pub(super) const META: TableDefinition<'static, &str, Bytes> = TableDefinition::new("meta");

/// Generation (0: nothing is staged), first slot and end, live keys, their bytes, and the record.
pub(super) type StoredMigration = (u32, u16, u16, u64, u64, Bytes);

const SLOT_BYTES: usize = 2;
const GENERATION_BYTES: usize = 4;
const NUMBER_BYTES: usize = 8;
const FLAG_EXPIRES: u8 = 1;
const FLAG_STAGED: u8 = 2;

/// A row as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Row<'a> {
    /// Of a row that was staged: the sequence, at the source, at which it was true.
    pub(super) staged_seq: Option<u64>,
    /// Milliseconds since the Unix epoch.
    pub(super) expires_at: Option<u64>,
    pub(super) value: &'a [u8],
}

impl<'a> Row<'a> {
    /// A row that a client wrote.
    pub(super) fn new(value: &'a [u8], expires_at: Option<u64>) -> Self {
        Self { staged_seq: None, expires_at, value }
    }

    pub(super) fn decode(stored: &'a [u8]) -> Result<Self, StoreError> {
        let (&flags, mut rest) = stored.split_first().ok_or_else(unknown_row)?;
        if flags & !(FLAG_EXPIRES | FLAG_STAGED) != 0 {
            return Err(unknown_row());
        }
        let mut number = |flag| -> Result<Option<u64>, StoreError> {
            if flags & flag == 0 {
                return Ok(None);
            }
            let (number, behind) = rest.split_first_chunk::<NUMBER_BYTES>().ok_or_else(unknown_row)?;
            rest = behind;
            Ok(Some(u64::from_be_bytes(*number)))
        };
        let staged_seq = number(FLAG_STAGED)?;
        let expires_at = number(FLAG_EXPIRES)?;
        Ok(Self { staged_seq, expires_at, value: rest })
    }

    pub(super) fn encode(self) -> Vec<u8> {
        let mut stored = Vec::with_capacity(1 + 2 * NUMBER_BYTES + self.value.len());
        stored.push(0);
        for (flag, number) in [(FLAG_STAGED, self.staged_seq), (FLAG_EXPIRES, self.expires_at)] {
            if let Some(number) = number {
                stored[0] |= flag;
                stored.extend_from_slice(&number.to_be_bytes());
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

/// Where a row lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place<'a> {
    pub(super) slot: u16,
    pub(super) generation: u32,
    pub(super) key: &'a [u8],
}

impl<'a> Place<'a> {
    /// The key in `rows`.
    pub(super) fn row(self) -> Vec<u8> {
        join(&[&self.slot.to_be_bytes(), &self.generation.to_be_bytes(), self.key])
    }

    pub(super) fn of_row(row: &'a [u8]) -> Result<Self, StoreError> {
        let (slot, rest) = split_u16(row)?;
        let (generation, key) = split_u32(rest)?;
        Ok(Self { slot, generation, key })
    }

    /// The key in `expiry`.
    pub(super) fn expiry(self, at: u64) -> Vec<u8> {
        let generation = self.generation.to_be_bytes();
        join(&[&generation, &at.to_be_bytes(), &self.slot.to_be_bytes(), self.key])
    }

    pub(super) fn of_expiry(entry: &'a [u8]) -> Result<Self, StoreError> {
        let (generation, rest) = split_u32(entry)?;
        let (_, rest) = rest.split_first_chunk::<NUMBER_BYTES>().ok_or_else(short_key)?;
        let (slot, key) = split_u16(rest)?;
        Ok(Self { slot, generation, key })
    }

    /// The key in `tombstones`.
    pub(super) fn tombstone(self) -> Vec<u8> {
        join(&[&self.generation.to_be_bytes(), &self.slot.to_be_bytes(), self.key])
    }

    pub(super) fn of_tombstone(entry: &'a [u8]) -> Result<Self, StoreError> {
        let (generation, rest) = split_u32(entry)?;
        let (slot, key) = split_u16(rest)?;
        Ok(Self { slot, generation, key })
    }

    /// Slot and key: where a row lies among those that are visible.
    pub(super) fn position(self) -> Vec<u8> {
        position(self.slot, self.key)
    }
}

/// Slot and key, in the order of rows of one generation.
pub(super) fn position(slot: u16, key: &[u8]) -> Vec<u8> {
    join(&[&slot.to_be_bytes(), key])
}

pub(super) fn split_position(position: &[u8]) -> Result<(u16, &[u8]), StoreError> {
    split_u16(position)
}

/// The keys in `expiry` of what has expired at `now`: first, and one past the last.
pub(super) fn due_bounds(generation: u32, now: u64) -> (Vec<u8>, Vec<u8>) {
    let generation = generation.to_be_bytes();
    (generation.to_vec(), join(&[&generation, &now.saturating_add(1).to_be_bytes()]))
}

fn split_u16(bytes: &[u8]) -> Result<(u16, &[u8]), StoreError> {
    let (number, rest) = bytes.split_first_chunk::<SLOT_BYTES>().ok_or_else(short_key)?;
    Ok((u16::from_be_bytes(*number), rest))
}

fn split_u32(bytes: &[u8]) -> Result<(u32, &[u8]), StoreError> {
    let (number, rest) = bytes.split_first_chunk::<GENERATION_BYTES>().ok_or_else(short_key)?;
    Ok((u32::from_be_bytes(*number), rest))
}

fn short_key() -> StoreError {
    StoreError::Damaged("a key that is too short for its table".into())
}

fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_survive_their_encoding() {
        let numbers = [None, Some(0), Some(u64::MAX)];
        for (expires_at, staged_seq) in numbers.into_iter().flat_map(|a| numbers.map(|b| (a, b))) {
            for value in [&b""[..], b"\0", b"value"] {
                let row = Row { staged_seq, expires_at, value };
                assert_eq!(Row::decode(&row.encode()).unwrap(), row);
            }
        }
    }

    #[test]
    fn rows_of_another_shape_are_refused() {
        for stored in [&b""[..], b"\x04value", b"\x01short", b"\x0312345678short"] {
            assert!(matches!(Row::decode(stored), Err(StoreError::Damaged(_))));
        }
    }

    #[test]
    fn places_sort_by_slot_then_generation_and_come_back() {
        let place = |slot, generation, key| Place { slot, generation, key };
        let rows = [
            place(1, 1, &b"\xff\xff"[..]),
            place(1, 2, b""),
            place(1, 300, b"a"),
            place(2, 1, b""),
            place(256, 1, b"a"),
        ];
        assert!(rows.windows(2).all(|pair| pair[0].row() < pair[1].row()));
        for place in rows {
            assert_eq!(Place::of_row(&place.row()).unwrap(), place);
            assert_eq!(Place::of_expiry(&place.expiry(7)).unwrap(), place);
            assert_eq!(Place::of_tombstone(&place.tombstone()).unwrap(), place);
            let (start, end) = due_bounds(place.generation, 7);
            assert!((start..end.clone()).contains(&place.expiry(7)));
            assert!(place.expiry(8) >= end);
        }
        assert!(Place::of_row(b"12345").is_err());
    }
}
