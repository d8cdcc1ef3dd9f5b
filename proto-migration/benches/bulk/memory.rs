//! A store in memory at either end, so that nothing is measured but what lies between them.

use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use proto_common::error::Error;
use proto_common::fence::Fence;
use proto_common::ids::MigrationId;
use proto_common::slots::SlotRange;
use proto_migration::MigrationSpec;
use proto_migration::digest::SlotDigest;
use proto_migration::entry::{Entry, Image};
use proto_migration::hold::{Held, Hold, HoldMode};
use proto_migration::source::{
    ChangeCursor, ChangePage, Handover, LogState, MigrationSource, PageLimit, RowPage, SourceTerms,
};
use proto_migration::target::{MigrationTarget, Offer, Staged, StoredMigration, Takeover};
use tokio::sync::watch;

use crate::payload::Payload;

/// Bytes of a key.
const KEY: usize = 16;

/// Rows of one size, of which nobody changes any.
pub struct MemorySource {
    payload: Payload,
    /// All of them, one behind the other.
    keys: Bytes,
    value: usize,
    log: watch::Sender<LogState>,
}

impl MemorySource {
    pub fn new(payload: Payload, rows: u64, value: usize) -> Self {
        let keys = (0..rows).flat_map(|number| format!("key:{number:012}").into_bytes()).collect();
        Self { payload, keys, value, log: watch::Sender::new(LogState::default()) }
    }

    fn rows(&self) -> u64 {
        (self.keys.len() / KEY) as u64
    }

    fn row(&self, number: u64) -> Entry {
        let value = self.payload.at(number * self.value as u64, self.value);
        let image = Some(Image { value, expires_unix_ms: None });
        let at = number as usize * KEY;
        Entry { seq: 1, key: self.keys.slice(at..at + KEY), image }
    }
}

/// Nothing is ever held: nobody asks.
struct Nobody;

impl Held for Nobody {
    fn held_requests(&self) -> u64 {
        0
    }
}

impl MigrationSource for MemorySource {
    async fn admit(&self, _: &MigrationSpec, _: Option<Fence>) -> Result<SourceTerms, Error> {
        Ok(SourceTerms { slot_epoch: 0, estimated_keys: Some(self.rows()), estimated_bytes: None })
    }

    fn check_owner(&self, _: SlotRange, _: u64) -> Result<(), Error> {
        Ok(())
    }

    async fn open_log(&self, _: &MigrationId, _: SlotRange, _: Option<u64>) -> Result<u64, Error> {
        Ok(0)
    }

    async fn logs(&self) -> Result<Vec<(MigrationId, SlotRange)>, Error> {
        Ok(Vec::new())
    }

    fn watch_log(&self, _: &MigrationId) -> watch::Receiver<LogState> {
        self.log.subscribe()
    }

    async fn read_rows(&self, _: &MigrationId, cursor: &Bytes, limit: PageLimit) -> Result<RowPage, Error> {
        let from = cursor.as_ref().try_into().map_or(0, u64::from_be_bytes);
        let each = self.row(from).bytes();
        let fit = (limit.bytes as u64 / each).clamp(1, limit.entries as u64);
        let end = (from + fit).min(self.rows());
        let entries = (from..end).map(|number| self.row(number)).collect();
        let cursor = Bytes::copy_from_slice(&end.to_be_bytes());
        Ok(RowPage { entries, cursor, last: end == self.rows() })
    }

    async fn read_changes(
        &self,
        _: &MigrationId,
        cursor: ChangeCursor,
        _: PageLimit,
    ) -> Result<ChangePage, Error> {
        Ok(ChangePage { entries: Vec::new(), through: Some(cursor.watermark), next: cursor })
    }

    async fn release_changes(&self, _: &MigrationId, _: u64) -> Result<(), Error> {
        Ok(())
    }

    fn slow_writers(&self, _: &MigrationId, _: Duration) {}

    fn writers_slowed_ms(&self, _: &MigrationId) -> u64 {
        0
    }

    async fn hold(&self, _: SlotRange, _: HoldMode) -> Result<Hold, Error> {
        Ok(Box::new(Nobody))
    }

    async fn prepare_digests(&self, _: &MigrationId) -> Result<(), Error> {
        Ok(())
    }

    async fn digests(&self, _: &MigrationId) -> Result<Vec<SlotDigest>, Error> {
        unreachable!("nothing is cut over")
    }

    async fn give_up(&self, _: &Handover) -> Result<(), Error> {
        unreachable!("nothing is cut over")
    }

    async fn keep(&self, _: &MigrationId, _: SlotRange, _: Option<u64>) -> Result<(), Error> {
        Ok(())
    }
}

/// Counts rows and forgets them. The receiver has compared the checksum of each batch before.
#[derive(Debug, Default)]
pub struct DiscardTarget {
    staged: Mutex<Staged>,
}

impl MigrationTarget for DiscardTarget {
    async fn load(&self) -> Result<Vec<StoredMigration>, Error> {
        Ok(Vec::new())
    }

    async fn admit(&self, _: &Offer<'_>) -> Result<(), Error> {
        Ok(())
    }

    async fn begin(&self, _: &MigrationId, _: SlotRange, _: Bytes) -> Result<(), Error> {
        Ok(())
    }

    async fn save(&self, _: &MigrationId, _: Bytes) -> Result<(), Error> {
        Ok(())
    }

    async fn apply(&self, _: &MigrationId, entries: Vec<Entry>, _: Bytes) -> Result<Staged, Error> {
        let mut staged = self.staged.lock().unwrap();
        staged.keys += entries.len() as u64;
        staged.bytes += entries.iter().map(Entry::bytes).sum::<u64>();
        Ok(*staged)
    }

    async fn digests(&self, _: &MigrationId) -> Result<Vec<SlotDigest>, Error> {
        unreachable!("nothing is cut over")
    }

    async fn check_epoch(&self, _: SlotRange, _: u64) -> Result<(), Error> {
        Ok(())
    }

    async fn commit(&self, _: &Takeover<'_>, _: Bytes) -> Result<(), Error> {
        unreachable!("nothing is cut over")
    }

    async fn discard(&self, _: &MigrationId, _: Bytes) -> Result<(), Error> {
        Ok(())
    }

    async fn forget(&self, _: &MigrationId) -> Result<(), Error> {
        Ok(())
    }

    fn hold(&self, _: SlotRange) -> Hold {
        Box::new(Nobody)
    }
}
