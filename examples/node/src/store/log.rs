//! The change log, as a write transaction sees it.
//!
//! An entry names a key that changed, not what it holds: whoever reads the log looks the key up, so a key that changes often is read
//! once. Entries are written in the transaction of the change itself.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use proto::common::ids::MigrationId;
use redb::{ReadableTable as _, Table, WriteTransaction};

use super::generations::Generations;
use super::leases::ActiveLease;
use super::shared::Shared;
use super::tables::{self, Place};
use super::{StoreError, counters};
use crate::common::SlotRange;

/// Entries that a transaction with changes removes, beside twice as many as it adds, if they are released.
const TRIM: usize = 256;

const HEAD_BYTES: usize = 12;

/// A change of a visible row in leased slots.
#[derive(Debug, Clone)]
pub(super) struct Change {
    /// Number of the lease.
    pub(super) lease: u32,
    pub(super) seq: u64,
    /// Of key and value.
    pub(super) bytes: u64,
    /// Slot and key.
    pub(super) position: Vec<u8>,
    /// Hash of the row before.
    pub(super) old: Option<u128>,
    /// Hash of the row since.
    pub(super) new: Option<u128>,
}

/// An entry of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Logged<'a> {
    pub(super) unix_ms: u64,
    pub(super) bytes: u64,
    pub(super) position: &'a [u8],
}

impl<'a> Logged<'a> {
    fn encode(self) -> Vec<u8> {
        // What is larger counts as 4 GiB.
        let bytes = u32::try_from(self.bytes).unwrap_or(u32::MAX);
        [&self.unix_ms.to_be_bytes()[..], &bytes.to_be_bytes(), self.position].concat()
    }

    pub(super) fn decode(stored: &'a [u8]) -> Result<Self, StoreError> {
        let damaged = || StoreError::Damaged("an entry of the change log of an unknown shape".into());
        let (head, position) = stored.split_first_chunk::<HEAD_BYTES>().ok_or_else(damaged)?;
        let (unix_ms, bytes) = head.split_first_chunk::<8>().ok_or_else(damaged)?;
        let bytes = bytes.first_chunk::<4>().ok_or_else(damaged)?;
        Ok(Self { unix_ms: u64::from_be_bytes(*unix_ms), bytes: u32::from_be_bytes(*bytes).into(), position })
    }
}

/// What becomes of leases by a transaction.
#[derive(Debug)]
pub(super) enum LeaseChange {
    /// A new one, with an empty log.
    Open { id: MigrationId, number: u32, slots: SlotRange, begin: u64 },
    /// It is gone.
    Close { id: MigrationId },
}

/// What the memory of the store learns of a transaction.
#[derive(Debug, Default)]
pub(super) struct LogEffects {
    pub(super) changes: Vec<Change>,
    pub(super) unix_ms: u64,
    /// The last sequence.
    pub(super) last_seq: u64,
    /// Behind which sequence logs start since.
    pub(super) trimmed: Vec<(u32, u64)>,
    pub(super) leases: Vec<LeaseChange>,
}

/// The log in a write transaction.
pub(super) struct LogTxn<'t> {
    txn: &'t WriteTransaction,
    table: Option<Table<'t, (u32, u64), &'static [u8]>>,
    active: Arc<[ActiveLease]>,
    effects: LogEffects,
}

impl<'t> LogTxn<'t> {
    pub(super) fn open(txn: &'t WriteTransaction, shared: &Shared, now: u64) -> Result<Self, StoreError> {
        let active = shared.leases.active();
        let table = if active.is_empty() { None } else { Some(txn.open_table(tables::CHANGES)?) };
        let last_seq = shared.last_seq.load(Ordering::SeqCst);
        let effects = LogEffects { unix_ms: now, last_seq, ..LogEffects::default() };
        Ok(Self { txn, table, active, effects })
    }

    /// The lease of a visible row, if its slot is leased.
    pub(super) fn lease_of(&self, place: Place<'_>, generations: &Generations) -> Option<u32> {
        let lease = self.active.iter().find(|lease| lease.slots.contains(place.slot))?;
        (generations.of(place.slot) == place.generation).then_some(lease.number)
    }

    /// Logs a change.
    pub(super) fn append(
        &mut self,
        lease: u32,
        place: Place<'_>,
        value_bytes: usize,
        old: Option<u128>,
        new: Option<u128>,
    ) -> Result<(), StoreError> {
        let seq = self.effects.last_seq.saturating_add(1);
        let bytes = u64::try_from(place.key.len().saturating_add(value_bytes)).unwrap_or(u64::MAX);
        let position = place.position();
        let logged = Logged { unix_ms: self.effects.unix_ms, bytes, position: &position };
        self.table()?.insert((lease, seq), logged.encode().as_slice())?;
        self.effects.last_seq = seq;
        self.effects.changes.push(Change { lease, seq, bytes, position, old, new });
        Ok(())
    }

    /// Logs changes of `slots` from this transaction on; see
    /// [`open_log`](proto::migration::MigrationSource::open_log). Returns the sequence behind which the log starts.
    pub(super) fn open_lease(
        &mut self,
        id: &MigrationId,
        slots: SlotRange,
        from: Option<u64>,
    ) -> Result<u64, StoreError> {
        let mut leases = self.txn.open_table(tables::LEASES)?;
        let stored = leases.get(id.as_str())?.map(|lease| lease.value());
        if let Some(from) = from {
            return match stored {
                Some((_, start, end, begin))
                    if (start, end) == (slots.start(), slots.end())
                        && (begin..=self.effects.last_seq).contains(&from) =>
                {
                    Ok(from)
                }
                Some((_, _, _, begin)) => Err(StoreError::LogLost(format!(
                    "the change log of migration {id} holds what came behind sequence {begin} up to {}, for its own slots; \
                     it does not go on from {from}",
                    self.effects.last_seq
                ))),
                None => Err(StoreError::LogLost(format!("there is no change log of migration {id}"))),
            };
        }
        if let Some(other) = self.active.iter().find(|other| other.slots.overlaps(slots) && other.id != *id) {
            return Err(StoreError::Busy(format!(
                "changes of slots {} are logged for migration {} already",
                other.slots, other.id
            )));
        }
        let number = counters::next(self.txn, counters::LEASE)?;
        let number = u32::try_from(number)
            .map_err(|_| StoreError::Damaged("all numbers of leases are used up".into()))?;
        let begin = self.effects.last_seq;
        leases.insert(id.as_str(), (number, slots.start(), slots.end(), begin))?;
        self.effects.leases.push(LeaseChange::Open { id: id.clone(), number, slots, begin });
        Ok(begin)
    }

    /// Ends the log of `id`; true if there was one.
    pub(super) fn close_lease(&mut self, id: &MigrationId) -> Result<bool, StoreError> {
        let was_there = self.txn.open_table(tables::LEASES)?.remove(id.as_str())?.is_some();
        if was_there {
            self.effects.leases.push(LeaseChange::Close { id: id.clone() });
        }
        Ok(was_there)
    }

    /// Removes at most `limit` entries that were released, of each log; returns whether there may be more.
    pub(super) fn trim(&mut self, limit: usize) -> Result<bool, StoreError> {
        let mut more = false;
        for lease in Arc::clone(&self.active).iter() {
            let (begin, released) = lease.trimmable();
            if begin >= released {
                continue;
            }
            let removed = self.remove_entries(lease.number, released, limit)?;
            let Some(&last) = removed.last() else {
                self.effects.trimmed.push((lease.number, released));
                continue;
            };
            let is_part = removed.len() == limit;
            more |= is_part;
            let begin = if is_part { last } else { released };
            let mut leases = self.txn.open_table(tables::LEASES)?;
            let stored = leases.get(lease.id.as_str())?.map(|lease| lease.value());
            if let Some((number, start, end, _)) = stored.filter(|&(number, ..)| number == lease.number) {
                leases.insert(lease.id.as_str(), (number, start, end, begin))?;
                self.effects.trimmed.push((number, begin));
            }
        }
        Ok(more)
    }

    /// Removes at most `limit` entries of logs whose lease is gone; returns whether there may be more.
    pub(super) fn remove_dead(&mut self, limit: usize) -> Result<bool, StoreError> {
        let live = live_leases(&self.txn.open_table(tables::LEASES)?)?;
        let table = self.table()?;
        let Some(dead) = first_dead(table, &live)? else { return Ok(false) };
        self.remove_entries(dead, u64::MAX, limit)?;
        Ok(true)
    }

    fn remove_entries(&mut self, lease: u32, through: u64, limit: usize) -> Result<Vec<u64>, StoreError> {
        let table = self.table()?;
        let removed: Vec<u64> = table
            .range((lease, 0)..=(lease, through))?
            .take(limit)
            .map(|entry| entry.map(|(place, _)| place.value().1))
            .collect::<Result<_, _>>()?;
        for &seq in &removed {
            table.remove((lease, seq))?;
        }
        Ok(removed)
    }

    fn table(&mut self) -> Result<&mut Table<'t, (u32, u64), &'static [u8]>, StoreError> {
        let table = match self.table.take() {
            Some(table) => table,
            None => self.txn.open_table(tables::CHANGES)?,
        };
        Ok(self.table.insert(table))
    }

    pub(super) fn finish(mut self) -> Result<LogEffects, StoreError> {
        if !self.effects.changes.is_empty() {
            counters::set(self.txn, counters::SEQUENCE, self.effects.last_seq)?;
            self.trim(TRIM + 2 * self.effects.changes.len())?;
        }
        Ok(self.effects)
    }
}

/// Numbers of the leases that there are, in order.
pub(super) fn live_leases(
    leases: &impl redb::ReadableTable<&'static str, (u32, u16, u16, u64)>,
) -> Result<Vec<u32>, StoreError> {
    let numbers = leases.iter()?.map(|entry| entry.map(|(_, lease)| lease.value().0));
    let mut numbers: Vec<u32> = numbers.collect::<Result<_, _>>()?;
    numbers.sort_unstable();
    Ok(numbers)
}

/// The first log whose lease is gone.
pub(super) fn first_dead(
    changes: &impl redb::ReadableTable<(u32, u64), &'static [u8]>,
    live: &[u32],
) -> Result<Option<u32>, StoreError> {
    first_not_in(live, |number| {
        Ok(changes.range((number, 0)..)?.next().transpose()?.map(|(place, _)| place.value().0))
    })
}

/// The first number that there is and that is not in `live`, which is in order. `at_or_above` says which number comes next.
pub(super) fn first_not_in(
    live: &[u32],
    mut at_or_above: impl FnMut(u32) -> Result<Option<u32>, StoreError>,
) -> Result<Option<u32>, StoreError> {
    let mut from = 0;
    loop {
        match at_or_above(from)? {
            Some(number) if live.binary_search(&number).is_ok() => from = number.saturating_add(1),
            found => return Ok(found),
        }
    }
}
