//! Stores for tests.

use std::path::Path;

use bytes::Bytes;
use redb::{ReadableDatabase as _, ReadableTableMetadata as _};

use super::{Identity, Init, Outcome, SetCondition, SetExpiry, Store, StoreOptions, WriteOp};
use crate::common::{NodeId, SlotRange};
use crate::gate::{Access, Gate, Permits};

pub(crate) fn open(directory: &Path, node: &str, slots: &str) -> (Store, Identity) {
    let slots = if slots == "none" { vec![] } else { vec![slots.parse().unwrap()] };
    let init = Init { node: NodeId::new(node).unwrap(), slots: Some(slots), others: vec![] };
    Store::open(directory, &init, &StoreOptions::default()).unwrap()
}

/// Permits for writes that no gate is asked about.
pub(crate) fn ungated() -> Permits {
    Gate::new(NodeId::new("test").unwrap(), super::Ownership::default(), 0).permits(Access::Write)
}

pub(crate) async fn set(store: &Store, key: &str, value: &str) {
    let op = WriteOp::Set {
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: Bytes::copy_from_slice(value.as_bytes()),
        expiry: SetExpiry::Never,
        condition: SetCondition::Always,
        want_old: false,
    };
    assert_eq!(store.write(vec![op], ungated()).await.unwrap(), [Outcome::Done]);
}

/// Rows in the database, visible or not.
pub(crate) fn stored_rows(store: &Store) -> u64 {
    let txn = store.inner.shared.database.begin_read().unwrap();
    txn.open_table(super::tables::ROWS).unwrap().len().unwrap()
}

/// Checks that all that is kept in step with rows equals a count from scratch.
pub(crate) fn check(store: &Store) {
    use std::collections::{BTreeMap, BTreeSet};

    use super::tables::{self, Place, Row};
    use proto::migration::digest::entry_hash;
    use redb::ReadableTable as _;

    let txn = store.inner.shared.database.begin_read().unwrap();
    let generations =
        super::generations::Generations::load(&txn.open_table(tables::GENERATIONS).unwrap()).unwrap();
    let mut counts: BTreeMap<(u32, u16), u64> = BTreeMap::new();
    let mut sums: BTreeMap<u32, BTreeMap<u16, (u64, u128)>> = BTreeMap::new();
    let mut bytes: BTreeMap<u32, u64> = BTreeMap::new();
    let mut expiry = BTreeSet::new();
    let mut rows = BTreeSet::new();
    for entry in txn.open_table(tables::ROWS).unwrap().iter().unwrap() {
        let (key, stored) = entry.unwrap();
        let (place, row) = (Place::of_row(key.value()).unwrap(), Row::decode(stored.value()).unwrap());
        *counts.entry((place.generation, place.slot)).or_default() += 1;
        let slots = sums.entry(place.generation).or_default();
        let (keys, sum) = slots.get(&place.slot).copied().unwrap_or_default();
        let hash = entry_hash(place.key, row.value, row.expires_at);
        slots.insert(place.slot, (keys + 1, sum.wrapping_add(hash)));
        *bytes.entry(place.generation).or_default() += (place.key.len() + row.value.len()) as u64;
        expiry.extend(row.expires_at.map(|at| place.expiry(at)));
        rows.insert(place.tombstone());
    }
    let stored: BTreeMap<(u32, u16), u64> = txn
        .open_table(tables::SLOT_COUNTS)
        .unwrap()
        .iter()
        .unwrap()
        .map(|entry| entry.map(|(place, count)| (place.value(), count.value())).unwrap())
        .collect();
    assert_eq!(stored, counts, "slot counts");
    for slot in SlotRange::FULL.iter() {
        let count = counts.get(&(generations.of(slot), slot)).copied().unwrap_or_default();
        assert_eq!(store.rows_in(SlotRange::new(slot, slot + 1).unwrap()), count, "slot {slot} in memory");
    }
    let indexed: BTreeSet<Vec<u8>> = txn
        .open_table(tables::EXPIRY)
        .unwrap()
        .iter()
        .unwrap()
        .map(|entry| entry.unwrap().0.value().to_vec())
        .collect();
    assert_eq!(indexed, expiry, "expiry index");
    let stored = txn.open_table(tables::STAGED).unwrap();
    for entry in txn.open_table(tables::MIGRATIONS).unwrap().iter().unwrap() {
        let (generation, _, _, keys, staged_bytes, _) = entry.unwrap().1.value();
        if generation == 0 {
            assert_eq!((keys, staged_bytes), (0, 0));
            continue;
        }
        let found: BTreeMap<u16, (u64, u128)> = stored
            .range((generation, 0)..=(generation, u16::MAX))
            .unwrap()
            .map(|entry| entry.map(|(place, sum)| (place.value().1, sum.value())).unwrap())
            .collect();
        let counted = sums.remove(&generation).unwrap_or_default();
        assert_eq!(found, counted, "digests of generation {generation}");
        assert_eq!(keys, counted.values().map(|(keys, _)| keys).sum::<u64>());
        assert_eq!(staged_bytes, bytes.get(&generation).copied().unwrap_or_default());
    }
    for entry in txn.open_table(tables::TOMBSTONES).unwrap().iter().unwrap() {
        assert!(!rows.contains(entry.unwrap().0.value()), "a key is both staged and a tombstone");
    }
}

/// Entries of change logs, tombstones and sums of what was staged, and marks of garbage.
pub(crate) fn leftovers(store: &Store) -> [u64; 4] {
    let txn = store.inner.shared.database.begin_read().unwrap();
    [
        txn.open_table(super::tables::CHANGES).unwrap().len().unwrap(),
        txn.open_table(super::tables::TOMBSTONES).unwrap().len().unwrap(),
        txn.open_table(super::tables::STAGED).unwrap().len().unwrap(),
        txn.open_table(super::tables::GARBAGE).unwrap().len().unwrap(),
    ]
}
