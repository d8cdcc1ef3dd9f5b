//! Rows that are staged for slots of another node: invisible, of a generation of their own, until the slots are taken over.
//!
//! A staged row carries the sequence at which it was true. A key that does not exist any more leaves a tombstone, in a
//! table of its own, so that the generation can become visible as it is.

use bytes::Bytes;
use proto::common::ids::MigrationId;
use proto::migration::digest::{SlotDigest, SlotDigests, entry_hash, image_hash};
use proto::migration::entry::Entry;
use proto::migration::target::{Staged, StoredMigration};
use redb::{Durability, ReadableDatabase as _, ReadableTable as _, WriteTransaction};

use super::log::first_not_in;
use super::ownership::{Claim, Ownership, adopt_all, load};
use super::space::ROW_BYTES;
use super::tables::{self, Place, Row};
use super::txn::RowsTxn;
use super::writer::{Phases, Slice};
use super::{Store, StoreError};
use crate::common::{NodeId, SlotRange, slot_of};

/// A row of table `migrations`.
#[derive(Debug, Clone, Default)]
struct Stored {
    /// 0: nothing is staged.
    generation: u32,
    start: u16,
    end: u16,
    staged: Staged,
    record: Bytes,
}

impl Stored {
    fn decode((generation, start, end, keys, bytes, record): (u32, u16, u16, u64, u64, &[u8])) -> Self {
        let record = Bytes::copy_from_slice(record);
        Self { generation, start, end, staged: Staged { keys, bytes }, record }
    }

    fn get(txn: &WriteTransaction, id: &MigrationId) -> Result<Option<Self>, StoreError> {
        Ok(txn.open_table(tables::MIGRATIONS)?.get(id.as_str())?.map(|row| Self::decode(row.value())))
    }

    fn put(&self, txn: &WriteTransaction, id: &MigrationId) -> Result<(), StoreError> {
        let Self { generation, start, end, staged: Staged { keys, bytes }, record } = self;
        let row = (*generation, *start, *end, *keys, *bytes, record.as_ref());
        txn.open_table(tables::MIGRATIONS)?.insert(id.as_str(), row)?;
        Ok(())
    }

    fn is_staging(&self) -> bool {
        self.generation != 0
    }

    /// What was staged is garbage.
    fn drop_staged(&mut self, rows: &mut RowsTxn<'_>) -> Result<(), StoreError> {
        if self.is_staging() {
            let slots = SlotRange::new(self.start, self.end);
            rows.discard(slots.map_err(|error| StoreError::Damaged(error.to_string()))?, self.generation)?;
        }
        *self = Self { record: std::mem::take(&mut self.record), ..Self::default() };
        Ok(())
    }
}

impl Store {
    /// See [`load`](proto::migration::MigrationTarget::load).
    pub(crate) async fn stored_migrations(&self) -> Result<Vec<StoredMigration>, StoreError> {
        self.blocking(|shared| {
            let table = shared.database.begin_read()?.open_table(tables::MIGRATIONS)?;
            let mut all = Vec::new();
            for entry in table.iter()? {
                let (id, row) = entry?;
                let id = MigrationId::new(id.value())
                    .map_err(|error| StoreError::Damaged(format!("a row of table migrations: {error}")))?;
                let Stored { generation, start, end, staged, record } = Stored::decode(row.value());
                let slots = (generation != 0).then(|| SlotRange::new(start, end));
                let slots = slots.transpose().map_err(|error| {
                    StoreError::Damaged(format!("a row of table migrations: {id}: {error}"))
                })?;
                all.push(StoredMigration { id, record, staged, slots });
            }
            Ok(all)
        })
        .await
    }

    /// See [`begin`](proto::migration::MigrationTarget::begin).
    pub(crate) async fn begin_staging(
        &self,
        id: &MigrationId,
        slots: SlotRange,
        record: Bytes,
    ) -> Result<(), StoreError> {
        let id = id.clone();
        self.writer()?
            .transact(move |txn, rows| {
                let mut stored = Stored::get(txn, &id)?.unwrap_or_default();
                stored.drop_staged(rows)?;
                let generation = rows.new_generation()?;
                let (start, end) = (slots.start(), slots.end());
                Stored { generation, start, end, staged: Staged::default(), record }.put(txn, &id)
            })
            .await
    }

    /// See [`save`](proto::migration::MigrationTarget::save).
    pub(crate) async fn save_migration(&self, id: &MigrationId, record: Bytes) -> Result<(), StoreError> {
        self.save_in(Phases::Two, id, record).await
    }

    /// See [`save_prepared`](proto::migration::MigrationTarget::save_prepared).
    pub(crate) async fn save_prepared(&self, id: &MigrationId, record: Bytes) -> Result<(), StoreError> {
        self.save_in(Phases::One, id, record).await
    }

    async fn save_in(&self, phases: Phases, id: &MigrationId, record: Bytes) -> Result<(), StoreError> {
        let id = id.clone();
        self.writer()?
            .transact_in(phases, move |txn, _| {
                let stored = Stored::get(txn, &id)?.unwrap_or_default();
                Stored { record, ..stored }.put(txn, &id)
            })
            .await
    }

    /// See [`apply`](proto::migration::MigrationTarget::apply). In slices, so that clients are served in between; a crash may leave some of
    /// them, which come again, and the record is saved with the last one.
    ///
    /// Returns what is staged, and by how many bytes its tombstones grew.
    pub(crate) async fn stage(
        &self,
        id: &MigrationId,
        mut entries: Vec<Entry>,
        record: Bytes,
    ) -> Result<(Staged, i64), StoreError> {
        let writer = self.writer()?;
        let mut tombstone_bytes = 0_i64;
        // Changes come as clients made them. In the order of the table a slice of them lies in fewer pages, of which each is written; their sequences say which
        // of two is the newer one.
        entries.sort_by_cached_key(|entry| (slot_of(&entry.key), entry.key.clone()));
        let mut rest = entries.into_iter();
        loop {
            let (id, record) = (id.clone(), record.clone());
            let hurried = self.inner.shared.hurry.contains(&id);
            let (staged, grown, left) = writer
                .background(move |txn, rows, slice| {
                    let long = Slice::long();
                    let slice = if hurried { &long } else { slice };
                    let (staged, grown) = stage(txn, rows, &id, &mut rest, record, slice)?;
                    let durability = if rest.len() == 0 { Durability::Immediate } else { Durability::None };
                    Ok(((staged, grown, rest), durability))
                })
                .await?;
            tombstone_bytes = tombstone_bytes.saturating_add(grown);
            if left.len() == 0 {
                return Ok((staged, tombstone_bytes));
            }
            rest = left;
        }
    }

    /// See [`hurry`](proto::migration::MigrationTarget::hurry): slices are longer then, so that fewer of them wait for a group of writes each.
    pub(crate) fn hurry(&self, id: &MigrationId, wanted: bool) {
        self.inner.shared.hurry.set(id, wanted);
    }

    /// See [`digests`](proto::migration::MigrationTarget::digests).
    pub(crate) async fn staged_digests(&self, id: &MigrationId) -> Result<Vec<SlotDigest>, StoreError> {
        let id = id.clone();
        self.blocking(move |shared| {
            let txn = shared.database.begin_read()?;
            let stored = txn.open_table(tables::MIGRATIONS)?.get(id.as_str())?.map(|row| row.value().0);
            let generation =
                stored.filter(|&generation| generation != 0).ok_or_else(|| nothing_staged(&id))?;
            let mut digests = Vec::new();
            for entry in txn.open_table(tables::STAGED)?.range((generation, 0)..=(generation, u16::MAX))? {
                let (place, sum) = entry?;
                let (keys, sum) = sum.value();
                digests.push(SlotDigest { slot: place.value().1, keys, sum });
            }
            Ok(digests)
        })
        .await
    }

    /// See [`commit`](proto::migration::MigrationTarget::commit). Returns the ownership since.
    ///
    /// # Errors
    ///
    /// [`StoreError::Refused`] if nothing is staged, [`StoreError::Outdated`] if a slot is claimed at a higher epoch, [`StoreError::NotTheirs`] if `from` is told
    /// and it is of neither that node nor the owner of `claim`, at whatever epoch.
    pub(crate) async fn take_over(
        &self,
        id: &MigrationId,
        from: Option<&NodeId>,
        claim: Claim,
        record: Bytes,
    ) -> Result<Ownership, StoreError> {
        let (id, from) = (id.clone(), from.cloned());
        self.writer()?
            .transact(move |txn, rows| {
                let stored = Stored::get(txn, &id)?.unwrap_or_default();
                let present = load(&txn.open_table(tables::OWNERSHIP)?)?;
                if !stored.is_staging() {
                    // Done before, or there is nothing to do it with.
                    if !present.gives(&claim) {
                        return Err(nothing_staged(&id));
                    }
                    Stored { record, ..stored }.put(txn, &id)?;
                    return Ok(present);
                }
                if let Some(from) = &from
                    && let Some(Claim { range, owner, epoch }) =
                        present.of_neither(claim.range, from, &claim.owner)
                {
                    return Err(StoreError::NotTheirs {
                        slot: range.start().max(claim.range.start()),
                        owner: owner.clone(),
                        epoch: *epoch,
                        source_node: from.clone(),
                    });
                }
                let ownership = adopt_all(txn, std::slice::from_ref(&claim))?;
                if let Some((slot, epoch)) = ownership.against(&claim) {
                    return Err(StoreError::Outdated { slot, epoch });
                }
                if (stored.start, stored.end) != (claim.range.start(), claim.range.end()) {
                    return Err(StoreError::Refused(format!(
                        "migration {id} stages slots {}-{}, not {}",
                        stored.start,
                        stored.end.saturating_sub(1),
                        claim.range
                    )));
                }
                rows.switch(claim.range, stored.generation)?;
                Stored { record, ..Stored::default() }.put(txn, &id)?;
                Ok(ownership)
            })
            .await
    }

    /// See [`discard`](proto::migration::MigrationTarget::discard).
    pub(crate) async fn discard_staging(&self, id: &MigrationId, record: Bytes) -> Result<(), StoreError> {
        let id = id.clone();
        self.writer()?
            .transact(move |txn, rows| {
                let mut stored = Stored::get(txn, &id)?.unwrap_or_default();
                stored.drop_staged(rows)?;
                Stored { record, ..stored }.put(txn, &id)
            })
            .await
    }

    /// Drops a record and what is staged for it, whatever the record says: for one that nobody can read, and see
    /// [`forget`](proto::migration::MigrationTarget::forget).
    pub(crate) async fn drop_migration(&self, id: &MigrationId) -> Result<(), StoreError> {
        let id = id.clone();
        self.writer()?
            .transact(move |txn, rows| {
                if let Some(mut stored) = Stored::get(txn, &id)? {
                    stored.drop_staged(rows)?;
                }
                txn.open_table(tables::MIGRATIONS)?.remove(id.as_str())?;
                Ok(())
            })
            .await
    }
}

fn nothing_staged(id: &MigrationId) -> StoreError {
    StoreError::Refused(format!("nothing is staged for migration {id}"))
}

/// Stages entries until the slice is over; the record goes with the last one.
fn stage(
    txn: &WriteTransaction,
    rows: &mut RowsTxn<'_>,
    id: &MigrationId,
    entries: &mut std::vec::IntoIter<Entry>,
    record: Bytes,
    slice: &Slice,
) -> Result<(Staged, i64), StoreError> {
    let mut tombstone_bytes = 0_i64;
    let mut stored = Stored::get(txn, id)?.filter(Stored::is_staging).ok_or_else(|| nothing_staged(id))?;
    let mut tombstones = txn.open_table(tables::TOMBSTONES)?;
    let mut digests = SlotDigests::new();
    let Staged { mut keys, mut bytes } = stored.staged;
    while !slice.is_over()
        && let Some(entry) = entries.next()
    {
        let slot = slot_of(&entry.key);
        let place = Place { slot, generation: stored.generation, key: &entry.key };
        let held = rows.inspect(place, |row| Held {
            seq: row.staged_seq.unwrap_or(0),
            hash: entry_hash(place.key, row.value, row.expires_at),
            bytes: len(place.key).saturating_add(len(row.value)),
        })?;
        let tombstone = place.tombstone();
        let tombstone_size = len(place.key).saturating_add(ROW_BYTES);
        let dead = match &held {
            Some(_) => None,
            None => tombstones.get(tombstone.as_slice())?.map(|seq| seq.value()),
        };
        let held_seq = held.as_ref().map(|held| held.seq).or(dead);
        if held_seq.is_some_and(|seq| entry.seq <= seq) {
            continue;
        }
        if let Some(held) = &held {
            keys = keys.saturating_sub(1);
            bytes = bytes.saturating_sub(held.bytes);
        }
        let new = match &entry.image {
            Some(image) => {
                if dead.is_some() {
                    tombstones.remove(tombstone.as_slice())?;
                    tombstone_bytes = tombstone_bytes.saturating_sub_unsigned(tombstone_size);
                }
                let expires_at = image.expires_unix_ms;
                rows.put(place, Row { staged_seq: Some(entry.seq), expires_at, value: &image.value })?;
                keys += 1;
                bytes = bytes.saturating_add(entry.bytes());
                Some(image_hash(&entry.key, image))
            }
            None => {
                rows.delete(place)?;
                tombstones.insert(tombstone.as_slice(), entry.seq)?;
                if dead.is_none() {
                    tombstone_bytes = tombstone_bytes.saturating_add_unsigned(tombstone_size);
                }
                None
            }
        };
        digests.change(slot, held.map(|held| held.hash), new);
    }
    let mut sums = txn.open_table(tables::STAGED)?;
    for SlotDigest { slot, keys, sum } in digests.of(SlotRange::FULL) {
        let place = (stored.generation, slot);
        let (old_keys, old_sum) = sums.get(place)?.map_or((0, 0), |sum| sum.value());
        // What decreased has wrapped.
        match (old_keys.wrapping_add(keys), old_sum.wrapping_add(sum)) {
            (0, 0) => sums.remove(place)?,
            sum => sums.insert(place, sum)?,
        };
    }
    stored.staged = Staged { keys, bytes };
    if entries.len() == 0 {
        stored.record = record;
    }
    stored.put(txn, id)?;
    Ok((stored.staged, tombstone_bytes))
}

/// What is staged for a key.
struct Held {
    seq: u64,
    hash: u128,
    bytes: u64,
}

fn len(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

/// Generations that are staged, in order.
pub(super) fn live_generations(
    migrations: &impl redb::ReadableTable<&'static str, tables::StoredMigration>,
) -> Result<Vec<u32>, StoreError> {
    let all = migrations.iter()?.map(|entry| entry.map(|(_, row)| row.value().0));
    let mut live: Vec<u32> = all.collect::<Result<_, _>>()?;
    live.retain(|&generation| generation != 0);
    live.sort_unstable();
    Ok(live)
}

/// The first generation that has tombstones and is not staged any more.
pub(super) fn first_dead_tombstones(
    tombstones: &impl redb::ReadableTable<&'static [u8], u64>,
    live: &[u32],
) -> Result<Option<u32>, StoreError> {
    first_not_in(live, |generation| {
        let start = generation.to_be_bytes();
        let next = tombstones.range(start.as_slice()..)?.next().transpose()?;
        next.map(|(key, _)| Place::of_tombstone(key.value()).map(|place| place.generation)).transpose()
    })
}

/// The first generation that has sums and is not staged any more.
pub(super) fn first_dead_sums(
    sums: &impl redb::ReadableTable<(u32, u16), (u64, u128)>,
    live: &[u32],
) -> Result<Option<u32>, StoreError> {
    first_not_in(live, |generation| {
        Ok(sums.range((generation, 0)..)?.next().transpose()?.map(|(place, _)| place.value().0))
    })
}

/// Removes at most `limit` tombstones, and at most as many sums, of generations that are not staged any more.
pub(super) fn remove_dead(txn: &WriteTransaction, limit: usize) -> Result<(), StoreError> {
    let live = live_generations(&txn.open_table(tables::MIGRATIONS)?)?;
    let mut tombstones = txn.open_table(tables::TOMBSTONES)?;
    if let Some(dead) = first_dead_tombstones(&tombstones, &live)? {
        let (start, end) = (dead.to_be_bytes(), dead.saturating_add(1).to_be_bytes());
        let doomed: Vec<Vec<u8>> = tombstones
            .range(start.as_slice()..end.as_slice())?
            .take(limit)
            .map(|entry| entry.map(|(key, _)| key.value().to_vec()))
            .collect::<Result<_, _>>()?;
        for key in doomed {
            tombstones.remove(key.as_slice())?;
        }
    }
    let mut sums = txn.open_table(tables::STAGED)?;
    if let Some(dead) = first_dead_sums(&sums, &live)? {
        let doomed: Vec<(u32, u16)> = sums
            .range((dead, 0)..=(dead, u16::MAX))?
            .take(limit)
            .map(|entry| entry.map(|(place, _)| place.value()))
            .collect::<Result<_, _>>()?;
        for place in doomed {
            sums.remove(place)?;
        }
    }
    Ok(())
}
