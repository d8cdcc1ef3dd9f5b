//! The embedded database: rows of a key-value store, by slot, with expiry and ownership of slots.
//!
//! Writes go through one thread (`writer`) that commits them in groups; reads are redb read transactions,
//! which see the last commit and wait for nobody.
//!
//! | modules | hold |
//! |---|---|
//! | `open`, `tables`, `identity`, `counters`, `fences`, `ownership`, `splits` | what lies in the database |
//! | `writer`, `txn`, `ops`, `apply`, `shared` | write transactions, and what memory learns of them |
//! | `read`, `visible`, `generations` | reading, and which rows are visible |
//! | `sweep`, `space` | deleting in the background, room on the disk |
//! | `snapshot`, `handover` | slot ranges in and out of the database, all at once |
//! | `leases`, `log`, `retained`, `changes`, `digest_scan` | slots that are given away while clients write |
//! | `staging` | slots that are taken over meanwhile |

mod apply;
mod changes;
mod counters;
mod digest_scan;
mod error;
mod fences;
mod generations;
mod handover;
mod hurry;
mod identity;
mod leases;
mod log;
mod open;
mod ops;
mod ownership;
mod read;
mod retained;
mod shared;
mod snapshot;
mod space;
mod splits;
mod staging;
mod strain;
mod sweep;
mod tables;
#[cfg(test)]
pub(crate) mod test_store;
mod txn;
mod visible;
mod writer;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use proto::common::durable::create_dir_all;
use redb::ReadableDatabase as _;
use shared::Shared;

pub(crate) use apply::parse_integer;
pub use error::StoreError;
#[cfg(test)]
pub(crate) use fences::SHARDS_PER_PEER;
pub use identity::{Identity, Init};
pub use ops::{ExpireCondition, MAX_ROW_BYTES, Outcome, SetCondition, SetExpiry, WriteOp};
pub use ownership::{Claim, NodeAddresses, Ownership};
pub(crate) use ownership::{MAX_EPOCH_LEAP, MAX_NODES};
pub use read::{Entry, Reader, ScanPosition, Scanned};
pub use shared::ExpiryPause;
pub(crate) use snapshot::PARTIAL;
pub use snapshot::{ExportSummary, Handover, SnapshotHeader, read_header};
pub(crate) use space::{ROW_BYTES, on_disk};
pub use splits::SplitIntent;

use crate::common::{NodeId, SlotRange};
use crate::gate::Permits;
use writer::Writer;

/// What a store needs to know besides its directory.
#[derive(Debug, Clone)]
pub struct StoreOptions {
    /// Memory for the database's page cache, in bytes.
    pub cache_bytes: usize,
    /// What migrations to this node leave free on the disk for its clients, in bytes.
    pub reserve_bytes: u64,
    /// Reads the whole file at the start and compares each page with its checksum. After a crash that is done anyhow.
    pub verify: bool,
}

impl Default for StoreOptions {
    /// 256 MiB of cache, 64 MiB in reserve, verified.
    fn default() -> Self {
        Self { cache_bytes: 256 << 20, reserve_bytes: 64 << 20, verify: true }
    }
}

/// The database of one node. Clones are the same store.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    directory: PathBuf,
    file: PathBuf,
    cache_bytes: u64,
    reserve_bytes: u64,
    shared: Arc<Shared>,
    writer: Mutex<Option<Writer>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    file_bytes: AtomicU64,
}

impl Store {
    /// Opens or makes the database in `directory`. Blocks: the whole file is verified.
    ///
    /// # Errors
    ///
    /// [`StoreError::DamagedFile`] when it is not what was written; [`StoreError::InUse`] when another process has it open, [`StoreError::Mismatch`] when it belongs to
    /// another node or was made for other slots than `init` says.
    pub fn open(
        directory: &Path,
        init: &Init,
        options: &StoreOptions,
    ) -> Result<(Self, Identity), StoreError> {
        create_dir_all(directory)
            .map_err(|source| StoreError::io(format!("cannot make {}", directory.display()), source))?;
        Self::start(directory, open::open(directory, init, options)?, options)
    }

    /// Opens the database that is in `directory`, whichever node's it is. Blocks, as [`open`](Self::open) does.
    ///
    /// # Errors
    ///
    /// Those of [`open`](Self::open); [`StoreError::Mismatch`] where there is none.
    pub fn open_existing(directory: &Path, options: &StoreOptions) -> Result<(Self, Identity), StoreError> {
        Self::start(directory, open::open_existing(directory, options)?, options)
    }

    fn start(
        directory: &Path,
        (database, identity): (redb::Database, Identity),
        options: &StoreOptions,
    ) -> Result<(Self, Identity), StoreError> {
        let shared = Arc::new(open::load(directory, || Shared::load(database))?);
        let (writer, thread) = Writer::start(Arc::clone(&shared))?;
        let inner = Inner {
            directory: directory.to_path_buf(),
            file: directory.join(open::DATABASE_FILE),
            cache_bytes: u64::try_from(options.cache_bytes).unwrap_or(u64::MAX),
            reserve_bytes: options.reserve_bytes,
            shared,
            writer: Mutex::new(Some(writer)),
            thread: Mutex::new(Some(thread)),
            file_bytes: AtomicU64::new(0),
        };
        inner.measure();
        Ok((Self { inner: Arc::new(inner) }, identity))
    }

    /// The directory that it was opened in.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.inner.directory
    }

    /// Size of the database file in bytes, measured a moment ago.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.inner.file_bytes.load(Ordering::Relaxed)
    }

    /// Does writes in order, in one transaction; returns what each answers once all are durable.
    ///
    /// Not cancel safe: when the future is dropped, the writes may or may not be done. `permits` are held until
    /// it is decided.
    ///
    /// # Errors
    ///
    /// None of them was done.
    pub async fn write(&self, ops: Vec<WriteOp>, permits: Permits) -> Result<Vec<Outcome>, StoreError> {
        self.writer()?.write(ops, permits).await
    }

    /// Reads in one read transaction.
    ///
    /// redb reads with `pread` into its own cache, it does not map the file. While the file is no larger than that
    /// cache, a read is a walk through memory, at worst a copy from the page cache: it is done in place, since
    /// moving it to another thread costs more than it takes. Once the file is larger, or when the caller says that
    /// much is read, it goes to a thread that may wait for the disk.
    ///
    /// # Errors
    ///
    /// What `work` returns, or why the database could not be read.
    pub async fn read<T: Send + 'static>(
        &self,
        extent: ReadExtent,
        work: impl FnOnce(&Reader) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        if extent == ReadExtent::Point && self.file_bytes() <= self.inner.cache_bytes {
            return work(&Reader::begin(&self.inner.shared, unix_ms())?);
        }
        self.blocking(move |shared| work(&Reader::begin(shared, unix_ms())?)).await
    }

    /// Runs `work` in a thread that may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Shared) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let shared = Arc::clone(&self.inner.shared);
        tokio::task::spawn_blocking(move || work(&shared)).await.map_err(|_| StoreError::Closed)?
    }

    /// How many rows of `range` are visible. Rows that have expired count until they are deleted, as in Redis.
    #[must_use]
    pub fn rows_in(&self, range: SlotRange) -> u64 {
        self.inner.shared.counts.sum(range)
    }

    /// Leaves expired rows of `range` alone until the result is dropped. A removal that has begun may still go on: see [`Store::stop_expiry`].
    pub(crate) fn pause_expiry(&self, range: SlotRange) -> ExpiryPause {
        self.inner.shared.paused.add(range).0
    }

    /// [`Store::pause_expiry`]; when it returns, no removal is under way. That takes no time where another such pause has the slots already.
    pub(crate) async fn stop_expiry(&self, range: SlotRange) -> Result<ExpiryPause, StoreError> {
        let (pause, is_quiet) = self.inner.shared.paused.add(range);
        if !is_quiet {
            // Behind all deletions in the background that were asked for before.
            self.writer()?.settle().await?;
            pause.is_quiet();
        }
        Ok(pause)
    }

    /// Whether slots of `range` are being imported.
    pub(crate) fn is_importing(&self, range: SlotRange) -> bool {
        lock(&self.inner.shared.importing).iter().any(|(other, _)| other.overlaps(range))
    }

    /// Takes claims over, by epoch, durably, and returns the whole.
    ///
    /// # Errors
    ///
    /// Nothing was changed.
    pub async fn adopt(&self, claims: Vec<Claim>) -> Result<Ownership, StoreError> {
        self.writer()?.transact(move |txn, _| ownership::adopt_all(txn, &claims)).await
    }

    /// Remembers where nodes can be reached.
    ///
    /// # Errors
    ///
    /// Nothing was changed.
    pub async fn put_nodes(&self, nodes: BTreeMap<NodeId, NodeAddresses>) -> Result<(), StoreError> {
        self.writer()?.transact(move |txn, _| ownership::put_nodes(txn, &nodes)).await
    }

    /// Where nodes can be reached, as far as is known.
    ///
    /// # Errors
    ///
    /// The database could not be read.
    pub fn nodes(&self) -> Result<BTreeMap<NodeId, NodeAddresses>, StoreError> {
        ownership::load_nodes(&self.inner.shared.database.begin_read()?.open_table(tables::NODES)?)
    }

    /// Ends the writer thread after what is queued is done. Writes are refused from now on. Blocks.
    pub fn close(&self) {
        drop(lock(&self.inner.writer).take());
        if let Some(thread) = lock(&self.inner.thread).take()
            && thread.join().is_err()
        {
            tracing::error!("the writer thread panicked");
        }
    }

    fn writer(&self) -> Result<Writer, StoreError> {
        lock(&self.inner.writer).clone().ok_or(StoreError::Closed)
    }
}

/// How much a read touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadExtent {
    /// A few keys.
    Point,
    /// Many rows.
    Bulk,
}

impl Inner {
    fn measure(&self) {
        if let Ok(metadata) = std::fs::metadata(&self.file) {
            self.file_bytes.store(metadata.len(), Ordering::Relaxed);
        }
    }
}

/// Milliseconds since the Unix epoch.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
