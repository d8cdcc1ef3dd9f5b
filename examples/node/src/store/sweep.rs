//! What is deleted in the background: rows whose time has come, and rows of slots that were given up.
//!
//! Both are invisible already; this frees their space, in small transactions between those of clients.

use std::time::Duration;

use redb::{ReadableDatabase as _, ReadableTable as _};
use tokio_util::sync::CancellationToken;

use super::{Store, StoreError, lock, tables, unix_ms};
use crate::common::SlotRange;

/// How often it is looked for expired rows; as Redis does by default.
const PERIOD: Duration = Duration::from_millis(100);
/// Rows deleted in one transaction: some milliseconds of work.
const CHUNK: usize = 1024;

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
            match self.sweep_once().await {
                Ok(()) => {}
                Err(StoreError::Closed) => return,
                Err(error) => tracing::warn!(%error, "background deletion failed; it is tried again"),
            }
        }
    }

    /// Deletes one chunk of each kind, if there is any.
    ///
    /// # Errors
    ///
    /// What was deleted before stays deleted.
    pub async fn sweep_once(&self) -> Result<(), StoreError> {
        self.inner.measure();
        while self.is_something_due()? {
            let deleted = self.writer()?.transact(|_, rows| rows.delete_expired(CHUNK)).await?;
            if deleted < CHUNK {
                break;
            }
        }
        while self.collect_garbage(CHUNK).await? {}
        Ok(())
    }

    fn is_something_due(&self) -> Result<bool, StoreError> {
        let expiry = self.inner.database.begin_read()?.open_table(tables::EXPIRY)?;
        match expiry.first()? {
            Some((entry, _)) => Ok(tables::split_expiry_key(entry.value())?.0 <= unix_ms()),
            None => Ok(false),
        }
    }

    /// Deletes at most `limit` rows that were given up; returns whether there was a range to work on.
    async fn collect_garbage(&self, limit: usize) -> Result<bool, StoreError> {
        if self.inner.database.begin_read()?.open_table(tables::GARBAGE)?.first()?.is_none() {
            return Ok(false);
        }
        let store = self.clone();
        self.writer()?
            .transact(move |txn, rows| {
                let mut garbage = txn.open_table(tables::GARBAGE)?;
                let mut next = None;
                for entry in garbage.iter()? {
                    let (start, end) = entry?;
                    let range = SlotRange::new(start.value(), end.value())
                        .map_err(|error| StoreError::Damaged(error.to_string()))?;
                    // Looked at in the writer, so that an import that begins sees no deletion any more.
                    if !store.is_importing(range) {
                        next = Some(range);
                        break;
                    }
                }
                let Some(range) = next else { return Ok(false) };
                if rows.delete_range(range, limit)? < limit {
                    garbage.remove(range.start())?;
                }
                Ok(true)
            })
            .await
    }

    fn is_importing(&self, range: SlotRange) -> bool {
        lock(&self.inner.importing).iter().any(|other| other.overlaps(range))
    }
}
