//! What a migration reads of slots that are given away: rows, changes, digests.
//!
//! Every read is short, in a read transaction of its own, and stamps what it finds with the last sequence that is committed in it.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::common::ids::MigrationId;
use proto::migration::digest::{SlotDigest, SlotDigests, image_hash};
use proto::migration::entry::{Entry, Image, MAX_KEY_BYTES};
use proto::migration::source::{ChangeCursor, ChangePage, LogState, PageLimit, RowPage};
use redb::{ReadOnlyTable, ReadTransaction};
use tokio::sync::watch;

use super::digest_scan::{DigestPage, Scanned};
use super::generations::Generations;
use super::log::Logged;
use super::shared::Shared;
use super::tables::{self, Place, Row};
use super::visible::VisibleRows;
use super::{Store, StoreError, counters};
use crate::common::SlotRange;

/// How many times as long as a page of the copy took to read, its answer waits: what becomes of it at both nodes takes some times as long. Beside it, clients that
/// wait longer than usual are waited for ([`Strain`](super::strain::Strain)); before they were, the p99 of writes to other slots was 1.5 to 2.1 times as long during migrations as without
/// one, at half of what saturates a node; with 15, and at most 8 ms, 1.8 to 2.1, and 2 to 2.2 with 7 and at most 4.
const REST: u32 = 23;
/// Changes wait for the answer, too, so it is not later than this, but where clients are waited for. With 6 ms, the p99 of others is 1.6 to 2.8 times as long. The driver's pages have 512 KiB at most, so beside clients a copy of large values is no faster than some
/// 40 MiB/s.
const LONGEST_REST: Duration = Duration::from_millis(12);
/// Changes that are not at the target yet, beyond which the copy waits for no clients: changes go out between its pages, and it is about half a second of 30,000 writes/s
/// that is to be caught up with then.
const LATE: u64 = 16_384;
/// Rows of a page that is read for digests alone.
const DIGEST_PAGE: PageLimit = PageLimit { bytes: 256 << 10, entries: 1024 };
/// Where the size of rows is estimated: so many slots, so many rows of each.
const SAMPLED_SLOTS: u16 = 16;
const SAMPLED_ROWS: usize = 16;

impl Store {
    /// See [`open_log`](proto::migration::MigrationSource::open_log).
    pub(crate) async fn open_log(
        &self,
        id: &MigrationId,
        slots: SlotRange,
        from: Option<u64>,
    ) -> Result<u64, StoreError> {
        let lease = id.clone();
        let begin =
            self.writer()?.transact(move |_, rows| rows.log().open_lease(&lease, slots, from)).await?;
        self.release_changes(id, begin);
        Ok(begin)
    }

    /// See [`watch_log`](proto::migration::MigrationSource::watch_log).
    pub(crate) fn watch_log(&self, id: &MigrationId) -> watch::Receiver<LogState> {
        self.inner.shared.leases.watch(id)
    }

    /// The slots whose changes are logged for `id`.
    pub(crate) fn leased_slots(&self, id: &MigrationId) -> Option<SlotRange> {
        self.inner.shared.leases.with(id, |lease| lease.slots())
    }

    /// See [`logs`](proto::migration::MigrationSource::logs).
    pub(crate) fn open_logs(&self) -> Vec<(MigrationId, SlotRange)> {
        let active = self.inner.shared.leases.active();
        active.iter().map(|lease| (lease.id.clone(), lease.slots)).collect()
    }

    /// Changes up to `through` are not needed any more. They are removed with later transactions.
    pub(crate) fn release_changes(&self, id: &MigrationId, through: u64) {
        let shared = &self.inner.shared;
        shared.leases.release(id, through, shared.last_seq.load(Ordering::SeqCst));
    }

    /// See [`read_rows`](proto::migration::MigrationSource::read_rows).
    pub(crate) async fn read_rows(
        &self,
        id: &MigrationId,
        cursor: &Bytes,
        limit: PageLimit,
    ) -> Result<RowPage, StoreError> {
        let (lease, cursor) = (id.clone(), cursor.clone());
        let (begun, writes) = (Instant::now(), self.client_writes());
        let (page, digest) = self
            .blocking(move |shared| {
                let view = View::begin(shared, &lease)?;
                let page = view.rows(&cursor, limit)?;
                // The rows are at hand: where the scan is here, or will be by pages that are on their way, it need not read them
                // again.
                let is_ahead = shared.leases.with(&lease, |lease| match lease.digests.scanned() {
                    Scanned::UpTo(behind) => cursor >= *behind,
                    Scanned::All => false,
                });
                let digest = (is_ahead == Some(true)).then(|| view.digest_of(&page, &cursor));
                Ok((page, digest.map(|digest| (view.number, digest))))
            })
            .await?;
        if let Some((number, digest)) = digest {
            let id = id.clone();
            self.writer()?.post(move |shared| add_page(shared, &id, number, digest)).await?;
        }
        self.let_clients_pass(id, begun.elapsed(), writes).await;
        Ok(page)
    }

    /// Clients have the processors to themselves most of the time, where some wrote since there were `writes` of theirs: who copies for `id` waits after what `took` so long,
    /// and until they are served as usual.
    async fn let_clients_pass(&self, id: &MigrationId, took: Duration, writes: u64) {
        if self.client_writes() == writes {
            return;
        }
        let shared = &self.inner.shared;
        tokio::time::sleep((took * REST).min(LONGEST_REST)).await;
        let late = || shared.leases.with(id, |lease| lease.entries() > LATE).unwrap_or(true);
        shared.strain.pass(late).await;
    }

    /// Grows with the transactions that hold writes of clients.
    pub(super) fn client_writes(&self) -> u64 {
        self.inner.shared.client_writes.load(Ordering::Relaxed)
    }

    /// See [`read_changes`](proto::migration::MigrationSource::read_changes).
    pub(crate) async fn read_changes(
        &self,
        id: &MigrationId,
        cursor: ChangeCursor,
        limit: PageLimit,
    ) -> Result<ChangePage, StoreError> {
        let lease = id.clone();
        self.blocking(move |shared| View::begin(shared, &lease)?.changes(cursor, limit)).await
    }

    /// See [`prepare_digests`](proto::migration::MigrationSource::prepare_digests). Dropping the future pauses the scan.
    pub(crate) async fn prepare_digests(&self, id: &MigrationId) -> Result<(), StoreError> {
        loop {
            let lease = id.clone();
            let page = self
                .blocking(move |shared| {
                    let view = View::begin(shared, &lease)?;
                    let scanned = shared.leases.with(&lease, |lease| lease.digests.scanned().clone());
                    let Some(Scanned::UpTo(behind)) = scanned else { return Ok(None) };
                    let behind = Bytes::from(behind);
                    let page = view.rows(&behind, DIGEST_PAGE)?;
                    Ok(Some((view.number, view.digest_of(&page, &behind))))
                })
                .await?;
            let Some((number, page)) = page else { return Ok(()) };
            // A page that is not taken was overtaken by one of the copy's: the next is read from there.
            let lease = id.clone();
            self.writer()?.run(move |shared| add_page(shared, &lease, number, page)).await?;
        }
    }

    /// See [`digests`](proto::migration::MigrationSource::digests).
    pub(crate) async fn slot_digests(&self, id: &MigrationId) -> Result<Vec<SlotDigest>, StoreError> {
        loop {
            self.prepare_digests(id).await?;
            let lease = id.clone();
            let digests = self
                .writer()?
                .run(move |shared| shared.leases.with(&lease, |lease| lease.digests.digests(lease.slots())))
                .await?;
            match digests {
                None => return Err(no_lease(id)),
                // A new copy began in between.
                Some(None) => {}
                Some(Some(digests)) => return Ok(digests),
            }
        }
    }

    /// Bytes of keys and values of `range`, estimated from some of its rows.
    pub(crate) async fn estimate_bytes(&self, range: SlotRange) -> Result<u64, StoreError> {
        let rows = self.rows_in(range);
        self.blocking(move |shared| {
            let (txn, generations) = shared.generations.begin_read(&shared.database)?;
            let table = txn.open_table(tables::ROWS)?;
            let (mut sampled, mut bytes) = (0_u64, 0_u64);
            for slot in range.iter().step_by(usize::from(range.len().div_ceil(SAMPLED_SLOTS))) {
                let Ok(rest) = SlotRange::new(slot, range.end()) else { break };
                let mut found = VisibleRows::new(&table, &generations, rest, None)?;
                for _ in 0..SAMPLED_ROWS {
                    let Some(row) = found.next()? else { break };
                    let len = row.place()?.key.len().saturating_add(row.row()?.value.len());
                    sampled += 1;
                    bytes = bytes.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
                }
            }
            Ok(bytes.saturating_mul(rows).checked_div(sampled).unwrap_or(0))
        })
        .await
    }
}

/// Gives a page to the scan; in the writer's thread.
fn add_page(shared: &Shared, id: &MigrationId, number: u32, page: DigestPage) {
    shared.leases.with(id, |lease| {
        if lease.number() == number {
            lease.digests.add(page);
        }
    });
}

fn no_lease(id: &MigrationId) -> StoreError {
    StoreError::LogLost(format!("there is no change log of migration {id}"))
}

/// Leased slots in one read transaction.
struct View {
    txn: ReadTransaction,
    rows: ReadOnlyTable<&'static [u8], &'static [u8]>,
    generations: Arc<Generations>,
    id: MigrationId,
    number: u32,
    slots: SlotRange,
    /// The log starts behind it.
    begin: u64,
    /// The last sequence that is committed.
    seq: u64,
}

impl View {
    fn begin(shared: &Shared, id: &MigrationId) -> Result<Self, StoreError> {
        let (txn, generations) = shared.generations.begin_read(&shared.database)?;
        let lease = txn.open_table(tables::LEASES)?.get(id.as_str())?.map(|lease| lease.value());
        let (number, start, end, begin) = lease.ok_or_else(|| no_lease(id))?;
        let slots = SlotRange::new(start, end).map_err(|error| StoreError::Damaged(error.to_string()))?;
        let seq = counters::last(&txn.open_table(tables::COUNTERS)?, counters::SEQUENCE)?;
        let rows = txn.open_table(tables::ROWS)?;
        Ok(Self { txn, rows, generations, id: id.clone(), number, slots, begin, seq })
    }

    fn entry(&self, position: &[u8], row: Option<Row<'_>>) -> Result<Entry, StoreError> {
        let (slot, key) = tables::split_position(position)?;
        if key.len() > MAX_KEY_BYTES {
            return Err(StoreError::KeyTooLong { slot, bytes: key.len() });
        }
        let image = row
            .map(|row| Image { value: Bytes::copy_from_slice(row.value), expires_unix_ms: row.expires_at });
        Ok(Entry { seq: self.seq, key: Bytes::copy_from_slice(key), image })
    }

    fn rows(&self, cursor: &[u8], limit: PageLimit) -> Result<RowPage, StoreError> {
        let behind = (!cursor.is_empty()).then_some(cursor);
        let mut rows = VisibleRows::new(&self.rows, &self.generations, self.slots, behind)?;
        let mut page = Page::new(limit);
        let mut end = behind.map_or_else(|| tables::position(self.slots.start(), b""), <[u8]>::to_vec);
        while let Some(found) = rows.next()? {
            let position = found.place()?.position();
            if !page.takes(self.entry(&position, Some(found.row()?))?) {
                return Ok(RowPage { entries: page.entries, cursor: end.into(), last: false });
            }
            end = position;
        }
        Ok(RowPage { entries: page.entries, cursor: end.into(), last: true })
    }

    fn digest_of(&self, page: &RowPage, behind: &[u8]) -> DigestPage {
        let mut rows = SlotDigests::new();
        for entry in &page.entries {
            if let Some(image) = &entry.image {
                rows.change(
                    proto::common::slots::slot_of(&entry.key),
                    None,
                    Some(image_hash(&entry.key, image)),
                );
            }
        }
        let to = if page.last { Scanned::All } else { Scanned::UpTo(page.cursor.to_vec()) };
        DigestPage { behind: behind.to_vec(), to, seq: self.seq, rows }
    }

    /// Reads the log behind the cursor up to the last committed sequence, or as far as the limit allows. The images are of this
    /// moment, so each key is needed once. If writers are faster than the reader it never gets to that sequence: then the
    /// watermark moves to the goal, which is that sequence as it was when the reader set out.
    fn changes(&self, cursor: ChangeCursor, limit: PageLimit) -> Result<ChangePage, StoreError> {
        let ChangeCursor { watermark, scanned, goal } = cursor;
        if watermark < self.begin || scanned > self.seq {
            return Err(StoreError::LogLost(format!(
                "the change log of migration {} holds what came behind sequence {} up to {}; it does not go on from {watermark}",
                self.id, self.begin, self.seq
            )));
        }
        let moved = |entries, through| ChangePage {
            entries,
            through: Some(through),
            next: ChangeCursor::at(through),
        };
        if goal != 0 && scanned >= goal {
            return Ok(moved(Vec::new(), goal));
        }
        let goal = if goal == 0 { self.seq } else { goal };
        let log = self.txn.open_table(tables::CHANGES)?;
        let mut page = Page::new(limit);
        let mut seen = HashSet::new();
        let mut read_to = scanned;
        // Entries of what changed up to the goal.
        let mut up_to_goal = None;
        for change in log.range((self.number, scanned.saturating_add(1))..=(self.number, self.seq))? {
            let (place, logged) = change?;
            let seq = place.value().1;
            if seq > goal && up_to_goal.is_none() {
                up_to_goal = Some(page.entries.len());
            }
            let position = Logged::decode(logged.value())?.position;
            if !seen.contains(position) {
                let (slot, key) = tables::split_position(position)?;
                let row = Place { slot, generation: self.generations.of(slot), key }.row();
                let stored = self.rows.get(row.as_slice())?;
                let row = stored.as_ref().map(|stored| Row::decode(stored.value())).transpose()?;
                if !page.takes(self.entry(position, row)?) {
                    if let Some(entries) = up_to_goal {
                        page.entries.truncate(entries);
                        read_to = goal;
                    }
                    let next = ChangeCursor { watermark, scanned: read_to, goal };
                    return Ok(ChangePage { entries: page.entries, through: None, next });
                }
                seen.insert(position.to_vec());
            }
            read_to = seq;
        }
        Ok(moved(page.entries, self.seq))
    }
}

/// Entries up to a limit.
struct Page {
    entries: Vec<Entry>,
    limit: PageLimit,
    bytes: usize,
}

impl Page {
    fn new(limit: PageLimit) -> Self {
        Self { entries: Vec::new(), limit, bytes: 0 }
    }

    /// Adds an entry, unless it is too much. The first one never is.
    fn takes(&mut self, entry: Entry) -> bool {
        let bytes = self.bytes.saturating_add(usize::try_from(entry.bytes()).unwrap_or(usize::MAX));
        if !self.entries.is_empty() && (bytes > self.limit.bytes || self.entries.len() >= self.limit.entries)
        {
            return false;
        }
        self.bytes = bytes;
        self.entries.push(entry);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_store::{open, set};
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_copy_waits_for_clients_that_wait_longer_than_usual() {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path(), "n1", "0-16383");
        let id = MigrationId::new("m").unwrap();
        store.open_log(&id, SlotRange::FULL, None).await.unwrap();
        let waits = async |id: &MigrationId, writes| {
            let began = tokio::time::Instant::now();
            store.let_clients_pass(id, Duration::ZERO, writes).await;
            began.elapsed() > Duration::from_millis(40)
        };
        let before = store.client_writes();
        set(&store, "key", "value").await;
        for _ in 0..100 {
            store.inner.shared.strain.took(Duration::from_secs(1), true);
        }
        assert!(waits(&id, before).await);
        assert!(!waits(&id, store.client_writes()).await, "nobody wrote meanwhile");
        assert!(!waits(&MigrationId::new("other").unwrap(), before).await, "it has no log");
    }
}
