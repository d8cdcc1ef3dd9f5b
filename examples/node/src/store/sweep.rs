//! What is deleted in the background: rows whose time has come, rows that are not visible any more, and what is left of migrations.
//!
//! All of it is invisible already; this frees the space, in slices between the transactions of clients.

use std::time::{Duration, Instant};

use redb::{Durability, ReadableDatabase as _, ReadableTable, WriteTransaction};
use tokio_util::sync::CancellationToken;

use super::shared::Shared;
use super::txn::{RowsTxn, due_rows};
use super::writer::Slice;
use super::{Store, StoreError, lock, log, staging, tables, unix_ms};
use crate::common::SlotRange;

/// How often it is looked for expired rows; as Redis does by default.
const PERIOD: Duration = Duration::from_millis(100);
/// Pause after a failure, which the log tells each time.
const AFTER_FAILURE: Duration = Duration::from_secs(10);
/// What is looked for at once, of each kind.
const CHUNK: usize = 256;
/// How many times as long as a slice took, its wait for the writer included, the next one waits where clients write. Nobody is in need of
/// the space so soon that they should notice how it is freed.
const REST: u32 = 3;

impl Store {
    /// Deletes in the background until `stop`. Errors are logged and tried again.
    pub async fn sweep(self, stop: CancellationToken) {
        let mut ticks = tokio::time::interval(PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = ticks.tick() => {}
            }
            let swept = tokio::select! {
                () = stop.cancelled() => return,
                swept = self.sweep_once() => swept,
            };
            match swept {
                Ok(()) => {}
                Err(StoreError::Closed) => return,
                Err(error) => {
                    tracing::warn!(%error, "background deletion failed; it is tried again");
                    ticks.reset_after(AFTER_FAILURE);
                }
            }
        }
    }

    /// Deletes what is due, and all garbage that there is, in turns: neither waits for the end of the other, which may take hours.
    ///
    /// # Errors
    ///
    /// What was deleted before stays deleted.
    pub async fn sweep_once(&self) -> Result<(), StoreError> {
        self.inner.measure();
        loop {
            let due = self.delete_due(Instant::now() + PERIOD).await?;
            let garbage = self.delete_garbage(Instant::now() + PERIOD).await?;
            if !due && !garbage {
                return Ok(());
            }
        }
    }

    /// Deletes rows whose time has come, until then, one slice at least. Whether some may be left.
    async fn delete_due(&self, until: Instant) -> Result<bool, StoreError> {
        while self.blocking(is_something_due).await? {
            let paused = self.inner.shared.paused.clone();
            let begun = Instant::now();
            let some_left = self
                .writer()?
                .background(move |_, rows, slice| {
                    let some_left = rows.delete_expired(CHUNK, &paused.ranges(), slice)?;
                    Ok((some_left, Durability::Immediate))
                })
                .await?;
            if !some_left {
                break;
            }
            if Instant::now() >= until {
                return Ok(true);
            }
            tokio::time::sleep(begun.elapsed()).await;
        }
        Ok(false)
    }

    /// Deletes what is not visible any more, until then, one slice at least. Whether some may be left.
    async fn delete_garbage(&self, until: Instant) -> Result<bool, StoreError> {
        let (mut deleted, mut written) = (false, self.client_writes());
        let mut some_left = false;
        while self.blocking(is_something_left).await? {
            if deleted && Instant::now() >= until {
                some_left = true;
                break;
            }
            self.inner.shared.hurry.pass().await;
            let begun = Instant::now();
            let shared = std::sync::Arc::clone(&self.inner.shared);
            self.writer()?
                .background(move |txn, rows, slice| {
                    delete_some(&shared, txn, rows, slice)?;
                    // What a crash brings back is deleted again.
                    Ok(((), Durability::None))
                })
                .await?;
            deleted = true;
            let before = std::mem::replace(&mut written, self.client_writes());
            if written != before {
                tokio::time::sleep(begun.elapsed() * REST).await;
            }
        }
        if deleted {
            // Only with a transaction that is durable is the space free for use: now and then, and at the end.
            self.writer()?.background(|_, _, _| Ok(((), Durability::Immediate))).await?;
        }
        Ok(some_left)
    }
}

fn is_something_due(shared: &Shared) -> Result<bool, StoreError> {
    let (txn, generations) = shared.generations.begin_read(&shared.database)?;
    let expiry = txn.open_table(tables::EXPIRY)?;
    let (now, paused, mut due) = (unix_ms(), shared.paused.ranges(), Vec::new());
    for generation in generations.all() {
        due_rows(&expiry, generation, now, &paused, 1, &mut due)?;
    }
    Ok(!due.is_empty())
}

fn is_something_left(shared: &Shared) -> Result<bool, StoreError> {
    let txn = shared.database.begin_read()?;
    if next_garbage(&txn.open_table(tables::GARBAGE)?, shared)?.is_some() || shared.leases.is_trimmable() {
        return Ok(true);
    }
    let leases = log::live_leases(&txn.open_table(tables::LEASES)?)?;
    let staged = staging::live_generations(&txn.open_table(tables::MIGRATIONS)?)?;
    Ok(log::first_dead(&txn.open_table(tables::CHANGES)?, &leases)?.is_some()
        || staging::first_dead_tombstones(&txn.open_table(tables::TOMBSTONES)?, &staged)?.is_some()
        || staging::first_dead_sums(&txn.open_table(tables::STAGED)?, &staged)?.is_some())
}

/// Deletes some of what there is: a chunk of what logs and staging left, and rows until the slice is over, one at least.
fn delete_some(
    shared: &Shared,
    txn: &WriteTransaction,
    rows: &mut RowsTxn<'_>,
    slice: &Slice,
) -> Result<(), StoreError> {
    rows.log().trim(CHUNK)?;
    rows.log().remove_dead(CHUNK)?;
    staging::remove_dead(txn, CHUNK)?;
    let mut garbage = txn.open_table(tables::GARBAGE)?;
    // Looked for in the writer, so that an import that begins sees no deletion of its own rows.
    if let Some((generation, range)) = next_garbage(&garbage, shared)?
        && !rows.delete_generation(range, generation, CHUNK, slice)?
    {
        garbage.remove((generation, range.start()))?;
    }
    Ok(())
}

fn next_garbage(
    garbage: &impl ReadableTable<(u32, u16), u16>,
    shared: &Shared,
) -> Result<Option<(u32, SlotRange)>, StoreError> {
    for entry in garbage.iter()? {
        let (place, end) = entry?;
        let (generation, start) = place.value();
        if !lock(&shared.importing).iter().any(|(_, importing)| *importing == generation) {
            let range =
                SlotRange::new(start, end.value()).map_err(|error| StoreError::Damaged(error.to_string()))?;
            return Ok(Some((generation, range)));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::test_store::{leftovers, open, set, stored_rows, ungated};
    use super::super::{SetCondition, SetExpiry, WriteOp};
    use super::*;

    /// More than two slices delete.
    const ROWS: usize = 2 * CHUNK + 1;

    async fn write(store: &Store, name: &str, expiry: SetExpiry) {
        let op = |number| WriteOp::Set {
            key: Bytes::from(format!("{name}{number}")),
            value: Bytes::from_static(b"value"),
            expiry,
            condition: SetCondition::Always,
            want_old: false,
        };
        store.write((0..ROWS).map(op).collect(), ungated()).await.unwrap();
    }

    async fn garbage(store: &Store) {
        write(store, "garbage", SetExpiry::Never).await;
        let switch = |_: &WriteTransaction, rows: &mut RowsTxn<'_>| {
            let generation = rows.new_generation()?;
            rows.switch(SlotRange::FULL, generation)
        };
        store.writer().unwrap().transact(switch).await.unwrap();
    }

    /// The clock stands still but for who waits for it.
    #[tokio::test(start_paused = true)]
    async fn garbage_waits_for_a_hurry_but_not_for_good() {
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = open(directory.path(), "a", "0-16383");
        garbage(&store).await;
        let id = proto::common::ids::MigrationId::new("m1").unwrap();
        store.hurry(&id, true);
        let began = tokio::time::Instant::now();
        store.sweep_once().await.unwrap();
        assert!(began.elapsed() >= Duration::from_secs(1), "{:?}", began.elapsed());
        assert_eq!((stored_rows(&store), leftovers(&store)), (0, [0; 4]));
    }

    #[tokio::test]
    async fn garbage_and_what_is_due_are_deleted_in_turns() {
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = open(directory.path(), "a", "0-16383");
        garbage(&store).await;
        // Late enough that they are written before.
        let due = unix_ms() + 2_000;
        write(&store, "due", SetExpiry::At(due)).await;
        set(&store, "kept", "value").await;
        while unix_ms() <= due {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let rows = stored_rows(&store);
        let past = Instant::now();
        assert!(store.delete_due(past).await.unwrap(), "one slice is not all");
        assert!(store.delete_garbage(past).await.unwrap(), "one slice is not all");
        assert!(stored_rows(&store) < rows - 1, "each deleted some");
        store.sweep_once().await.unwrap();
        assert_eq!((stored_rows(&store), leftovers(&store)), (1, [0; 4]));
    }
}
