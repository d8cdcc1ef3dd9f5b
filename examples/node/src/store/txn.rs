//! One write transaction: rows, with all that is kept in step with them.
//!
//! The expiry index and the slot counts follow every row. Changes of visible rows in slots that are [leased](super::leases) are logged,
//! too; where nothing is leased that costs nothing.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use proto::migration::digest::entry_hash;
use redb::{ReadableTable as _, Table, WriteTransaction};

use super::generations::Generations;
use super::log::LogTxn;
use super::shared::Shared;
use super::tables::{self, Place, Row};
use super::writer::Slice;
use super::{StoreError, counters};
use crate::common::{SlotRange, slot_of};

/// The tables of rows, open in a write transaction.
pub(super) struct RowsTxn<'t> {
    txn: &'t WriteTransaction,
    rows: Table<'t, &'static [u8], &'static [u8]>,
    expiry: Table<'t, &'static [u8], ()>,
    counts: Table<'t, (u32, u16), u64>,
    log: LogTxn<'t>,
    generations: Arc<Generations>,
    deltas: HashMap<(u32, u16), i64>,
    switched: Vec<SlotRange>,
    now: u64,
}

impl std::fmt::Debug for RowsTxn<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RowsTxn").field("now", &self.now).finish_non_exhaustive()
    }
}

/// What a row was before it changed.
pub(super) struct Before {
    pub(super) live: bool,
    pub(super) expires_at: Option<u64>,
    pub(super) value: Bytes,
}

/// What the memory of the store learns once the transaction is committed.
pub(super) struct Effects {
    /// Visible rows of each slot where that changed; of equal slots, the last one counts.
    pub(super) counts: Vec<(u16, u64)>,
    /// What is visible, if that changed.
    pub(super) generations: Option<Arc<Generations>>,
    pub(super) log: super::log::LogEffects,
}

impl<'t> RowsTxn<'t> {
    pub(super) fn open(txn: &'t WriteTransaction, shared: &Shared, now: u64) -> Result<Self, StoreError> {
        Ok(Self {
            txn,
            rows: txn.open_table(tables::ROWS)?,
            expiry: txn.open_table(tables::EXPIRY)?,
            counts: txn.open_table(tables::SLOT_COUNTS)?,
            log: LogTxn::open(txn, shared, now)?,
            generations: shared.generations.current(),
            deltas: HashMap::new(),
            switched: Vec::new(),
            now,
        })
    }

    /// Writes what was counted.
    pub(super) fn finish(mut self) -> Result<Effects, StoreError> {
        self.deltas.retain(|_, delta| *delta != 0);
        let mut counts = Vec::new();
        for (&place, &delta) in &self.deltas {
            let (generation, slot) = place;
            let count = self.counts.get(place)?.map_or(0, |count| count.value());
            let changed = count
                .checked_add_signed(delta)
                .ok_or_else(|| StoreError::Damaged(format!("slot {slot} counts fewer rows than it has")))?;
            if changed == 0 {
                self.counts.remove(place)?;
            } else {
                self.counts.insert(place, changed)?;
            }
            if self.generations.of(slot) == generation {
                counts.push((slot, changed));
            }
        }
        for &range in &self.switched {
            counts.extend(range.iter().map(|slot| (slot, 0)));
            for (part, generation) in self.generations.parts(range) {
                for entry in self.counts.range((generation, part.start())..(generation, part.end()))? {
                    let (place, count) = entry?;
                    counts.push((place.value().1, count.value()));
                }
            }
        }
        let generations = (!self.switched.is_empty()).then(|| Arc::clone(&self.generations));
        Ok(Effects { counts, generations, log: self.log.finish()? })
    }

    /// The change log of this transaction.
    pub(super) fn log(&mut self) -> &mut LogTxn<'t> {
        &mut self.log
    }

    /// The time that expiry is compared with.
    pub(super) fn now(&self) -> u64 {
        self.now
    }

    /// Where the row of a client's key lies.
    pub(super) fn visible<'k>(&self, key: &'k [u8]) -> Place<'k> {
        let slot = slot_of(key);
        Place { slot, generation: self.generations.of(slot), key }
    }

    pub(super) fn before(&self, place: Place<'_>) -> Result<Option<Before>, StoreError> {
        let Some(stored) = self.rows.get(place.row().as_slice())? else {
            return Ok(None);
        };
        let row = Row::decode(stored.value())?;
        Ok(Some(Before {
            live: row.is_live(self.now),
            expires_at: row.expires_at,
            value: Bytes::copy_from_slice(row.value),
        }))
    }

    /// Looks at a row as it is stored.
    pub(super) fn inspect<T>(
        &self,
        place: Place<'_>,
        look: impl FnOnce(Row<'_>) -> T,
    ) -> Result<Option<T>, StoreError> {
        let stored = self.rows.get(place.row().as_slice())?;
        stored.map(|stored| Row::decode(stored.value()).map(look)).transpose()
    }

    /// Stores a row, whatever was there.
    pub(super) fn put(&mut self, place: Place<'_>, new: Row<'_>) -> Result<(), StoreError> {
        let lease = self.log.lease_of(place, &self.generations);
        let old = match self.rows.insert(place.row().as_slice(), new.encode().as_slice())? {
            None => None,
            Some(old) => {
                let old = Row::decode(old.value())?;
                Some((old.expires_at, lease.map(|_| hash(place, old))))
            }
        };
        if old.is_none() {
            self.count(place, 1);
        }
        let old_expiry = old.and_then(|(expires_at, _)| expires_at);
        if old_expiry != new.expires_at {
            if let Some(at) = old_expiry {
                self.expiry.remove(place.expiry(at).as_slice())?;
            }
            if let Some(at) = new.expires_at {
                self.expiry.insert(place.expiry(at).as_slice(), ())?;
            }
        }
        if let Some(lease) = lease {
            self.log.append(
                lease,
                place,
                new.value.len(),
                old.and_then(|(_, hash)| hash),
                Some(hash(place, new)),
            )?;
        }
        Ok(())
    }

    /// Removes a row; true if a live one was there.
    pub(super) fn delete(&mut self, place: Place<'_>) -> Result<bool, StoreError> {
        let lease = self.log.lease_of(place, &self.generations);
        let (live, expires_at, old_hash) = match self.rows.remove(place.row().as_slice())? {
            None => return Ok(false),
            Some(old) => {
                let old = Row::decode(old.value())?;
                (old.is_live(self.now), old.expires_at, lease.map(|_| hash(place, old)))
            }
        };
        self.count(place, -1);
        if let Some(at) = expires_at {
            self.expiry.remove(place.expiry(at).as_slice())?;
        }
        if let Some(lease) = lease {
            self.log.append(lease, place, 0, old_hash, None)?;
        }
        Ok(live)
    }

    fn count(&mut self, place: Place<'_>, delta: i64) {
        *self.deltas.entry((place.generation, place.slot)).or_default() += delta;
    }

    /// A generation that was never used.
    pub(super) fn new_generation(&mut self) -> Result<u32, StoreError> {
        let next = counters::next(self.txn, counters::GENERATION)?;
        u32::try_from(next).map_err(|_| StoreError::Damaged("all generations are used up".into()))
    }

    /// From the commit on, the rows of `range` are those of `generation`; those that were, are garbage.
    pub(super) fn switch(&mut self, range: SlotRange, generation: u32) -> Result<(), StoreError> {
        for (part, old) in self.generations.parts(range) {
            if old != generation {
                self.discard(part, old)?;
            }
        }
        let generations = self.generations.with(range, generation);
        generations.store(self.txn)?;
        self.generations = Arc::new(generations);
        self.switched.push(range);
        Ok(())
    }

    /// The rows that `generation` has in `range` are to be deleted in the background.
    pub(super) fn discard(&mut self, range: SlotRange, generation: u32) -> Result<(), StoreError> {
        self.txn.open_table(tables::GARBAGE)?.insert((generation, range.start()), range.end())?;
        Ok(())
    }

    /// Removes rows whose time has come, but for those of `paused` slots, until the slice is over or it was `limit` of them; returns whether
    /// there may be more.
    pub(super) fn delete_expired(
        &mut self,
        limit: usize,
        paused: &[SlotRange],
        slice: &Slice,
    ) -> Result<bool, StoreError> {
        let mut due = Vec::new();
        for generation in self.generations.all() {
            due_rows(&self.expiry, generation, self.now, paused, limit, &mut due)?;
        }
        self.delete_rows(&due, limit, slice)
    }

    /// Removes rows that `generation` has in `range`, until the slice is over or it was `limit` of them; returns whether there may be more.
    pub(super) fn delete_generation(
        &mut self,
        range: SlotRange,
        generation: u32,
        limit: usize,
        slice: &Slice,
    ) -> Result<bool, StoreError> {
        let mut doomed = Vec::new();
        // The counts say in which slots there are any.
        let counted: Vec<u16> = self
            .counts
            .range((generation, range.start())..(generation, range.end()))?
            .take(limit)
            .map(|entry| entry.map(|(place, _)| place.value().1))
            .collect::<Result<_, _>>()?;
        for slot in counted {
            let first = Place { slot, generation, key: b"" }.row();
            let behind = Place { slot, generation: generation.saturating_add(1), key: b"" }.row();
            for entry in self.rows.range(first.as_slice()..behind.as_slice())? {
                if doomed.len() == limit {
                    break;
                }
                doomed.push(entry?.0.value().to_vec());
            }
        }
        self.delete_rows(&doomed, limit, slice)
    }

    /// Removes these until the slice is over; returns whether there may be more, which there are not if all of fewer than `limit` are.
    fn delete_rows(&mut self, doomed: &[Vec<u8>], limit: usize, slice: &Slice) -> Result<bool, StoreError> {
        for (row, left) in doomed.iter().zip((0..doomed.len()).rev()) {
            self.delete(Place::of_row(row)?)?;
            if slice.is_over() && left > 0 {
                return Ok(true);
            }
        }
        Ok(doomed.len() >= limit)
    }
}

/// Collects the row keys of what has expired, up to `limit`.
pub(super) fn due_rows(
    expiry: &impl redb::ReadableTable<&'static [u8], ()>,
    generation: u32,
    now: u64,
    paused: &[SlotRange],
    limit: usize,
    due: &mut Vec<Vec<u8>>,
) -> Result<(), StoreError> {
    let (start, end) = tables::due_bounds(generation, now);
    for entry in expiry.range(start.as_slice()..end.as_slice())? {
        if due.len() >= limit {
            break;
        }
        let (entry, ()) = entry.map(|(entry, _)| (entry, ()))?;
        let place = Place::of_expiry(entry.value())?;
        if !paused.iter().any(|range| range.contains(place.slot)) {
            due.push(place.row());
        }
    }
    Ok(())
}

fn hash(place: Place<'_>, row: Row<'_>) -> u128 {
    entry_hash(place.key, row.value, row.expires_at)
}
