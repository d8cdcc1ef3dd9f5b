//! One transfer's staging area.

use std::collections::HashSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError,
};

use proto_common::durable::RecordLog;
use tokio_util::sync::CancellationToken;

use crate::extent::{Extent, ExtentRecord};
use crate::spec::{FileTotal, ManifestFile, TransferPlan};
use crate::store::{Claim, PlacedSnapshot, StagedChunk, Staging, StagingState, StoreError};

use super::layout::Area;
use super::record::{self, ClaimRecord, Kind, decode_extents, encode_extents};
use super::runs::Durable;
use super::space::Reservation;
use super::sync::{Dirty, Lost};
use super::write::{FileSpace, no_link};
use super::{Shared, blocking, lock, unix_ms};

/// The staging area of a [`FileSnapshotStore`](super::FileSnapshotStore).
#[derive(Debug)]
pub struct FileStaging {
    inner: Arc<Inner>,
}

/// What the blocking halves of the methods share. They outlive a future that is dropped, so each of them holds the gate while it
/// works: [`Inner::closed_for_writing`] waits for those that began and refuses the rest.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) shared: Arc<Shared>,
    /// Key of this area's open files.
    pub(super) serial: u64,
    pub(super) plan: TransferPlan,
    pub(super) area: Area,
    /// The directory, open from before the first write on, so that `syncfs` on it reports every failed write since. `None` while nobody
    /// writes; see [`Inner::dir`].
    dir: Mutex<Option<Arc<File>>>,
    pub(super) reservation: Reservation,
    pub(super) state: Mutex<State>,
    pub(super) records: Mutex<Records>,
    /// Bytes that have become durable; more than the content if some were written again.
    pub(super) durable_bytes: AtomicU64,
    opened_state: StagingState,
    /// Whether an earlier process may have written into it.
    pub(super) inherited: bool,
    opened_records: Vec<ExtentRecord>,
    claim: Mutex<Claim>,
    claim_file: Mutex<()>,
    gate: RwLock<Gate>,
    /// What it was sealed with, from then until it is current: each step in between needs them, and need not read them back.
    pub(super) totals: Mutex<Option<Arc<[FileTotal]>>>,
    last_activity: AtomicU64,
}

/// What may still be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    Open,
    Sealed,
    Removed,
}

/// What was changed and is not durable yet.
#[derive(Debug, Default)]
pub(super) struct State {
    /// Directories that exist.
    pub(super) dirs: HashSet<PathBuf>,
    /// What was written since the last sync.
    pub(super) dirty: Dirty,
    /// Directories with entries that were made since the last sync.
    pub(super) dirty_dirs: HashSet<PathBuf>,
    /// What a failed sync may have dropped: the kernel forgets such pages, and a second sync would succeed without them. It has to
    /// be written again before it may be recorded.
    pub(super) lost: Lost,
    /// What of the reservation each file still needs, by number.
    pub(super) space: Vec<FileSpace>,
}

/// The record log and what it says. Its lock also puts syncs one after the other: a sync must not return while an earlier one still
/// works on what it covers.
#[derive(Debug)]
pub(super) struct Records {
    /// `None` after a failure and while nobody writes; opened and rewritten by the next sync.
    log: Option<RecordLog>,
    durable: Durable,
    runs_written: u64,
}

/// What [`Inner::open`] needs.
pub(super) struct Parts {
    pub(super) plan: TransferPlan,
    pub(super) area: Area,
    pub(super) reservation: Reservation,
    pub(super) state: StagingState,
    pub(super) space: Vec<FileSpace>,
    pub(super) dirs: HashSet<PathBuf>,
    pub(super) claim: Claim,
    /// `None`: opened and rewritten by the first sync.
    pub(super) log: Option<RecordLog>,
    pub(super) inherited: bool,
    pub(super) durable: Durable,
    pub(super) last_activity: u64,
}

impl FileStaging {
    pub(super) fn open(shared: &Arc<Shared>, parts: Parts) -> Result<Self, StoreError> {
        let Parts {
            plan,
            area,
            reservation,
            state,
            space,
            dirs,
            claim,
            log,
            inherited,
            durable,
            last_activity,
        } = parts;
        let opened_records = durable.records();
        let durable_bytes = opened_records.iter().map(|record| record.extent.len).sum();
        let gate = match state {
            StagingState::Open => Gate::Open,
            StagingState::Sealed => Gate::Sealed,
        };
        let inner = Inner {
            shared: Arc::clone(shared),
            serial: shared.serials.fetch_add(1, Ordering::Relaxed),
            // A crash may have come before a directory was synced, and nothing tells; so the first sync takes them all.
            state: Mutex::new(State { dirty_dirs: dirs.clone(), dirs, space, ..State::default() }),
            records: Mutex::new(Records { log, durable, runs_written: 0 }),
            durable_bytes: AtomicU64::new(durable_bytes),
            plan,
            area,
            dir: Mutex::new(None),
            reservation,
            opened_state: state,
            inherited,
            opened_records,
            claim: Mutex::new(claim),
            claim_file: Mutex::new(()),
            gate: RwLock::new(gate),
            totals: Mutex::default(),
            last_activity: AtomicU64::new(last_activity),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    #[cfg(test)]
    pub(super) fn inner(&self) -> &Inner {
        &self.inner
    }

    async fn write_off_thread(&self, chunks: Vec<StagedChunk>) -> Result<(), StoreError> {
        self.run("write", move |inner| {
            let open = inner.open_for_writing()?;
            inner.write_open(&chunks, open)
        })
        .await
    }

    /// Writes into a memory file system, without a change of threads: that is a copy and no more, which is cheap while the bytes are in the
    /// cache of the processor that received them, and dear on another one that has to be woken first.
    async fn write_here(&self, mut chunks: Vec<StagedChunk>) -> Result<(), StoreError> {
        while !chunks.is_empty() {
            let rest = chunks.split_off(at_once(&chunks));
            // Somebody wants the area for himself, and waits, or has it: then this waits, on a thread that may.
            let open = self.inner.try_open_for_writing();
            match open.map(|open| open.and_then(|open| self.inner.write_open(&chunks, open))) {
                Some(result) => self.inner.explained(result)?,
                None => self.write_off_thread(chunks).await?,
            }
            chunks = rest;
            if !chunks.is_empty() {
                tokio::task::yield_now().await;
            }
        }
        Ok(())
    }

    /// Does `job` on a blocking thread. What it began goes on when the future is dropped.
    async fn run<T: Send + 'static>(
        &self,
        action: &'static str,
        job: impl FnOnce(&Inner) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = Arc::clone(&self.inner);
        blocking(action, move || inner.explained(job(&inner))).await
    }
}

impl Staging for FileStaging {
    fn plan(&self) -> &TransferPlan {
        &self.inner.plan
    }

    fn state(&self) -> StagingState {
        self.inner.opened_state
    }

    fn claim(&self) -> Claim {
        *lock(&self.inner.claim)
    }

    async fn set_claim(&self, claim: Claim) -> Result<(), StoreError> {
        self.run("persist a claim", move |inner| {
            let _open = inner.alive()?;
            // Held while writing: of two claims, the file keeps the one that memory keeps. Who only asks does not wait for the disk.
            let _one = lock(&inner.claim_file);
            let record = ClaimRecord::new(&inner.plan.spec.transfer_id, claim);
            record::write(&inner.area.claim(), Kind::Claim, &record)
                .map_err(|error| StoreError::io("persist a claim", error))?;
            *lock(&inner.claim) = claim;
            Ok(())
        })
        .await
    }

    fn records(&self) -> Vec<ExtentRecord> {
        self.inner.opened_records.clone()
    }

    fn last_activity_unix_ms(&self) -> u64 {
        self.inner.last_activity.load(Ordering::Relaxed)
    }

    async fn write(&self, chunks: Vec<StagedChunk>) -> Result<(), StoreError> {
        match spread(chunks) {
            Ok(parts) => {
                let written = parts.into_iter().map(|part| self.write_off_thread(part));
                futures::future::join_all(written).await.into_iter().collect()
            }
            Err(chunks) if self.inner.shared.in_memory => self.write_here(chunks).await,
            Err(chunks) => self.write_off_thread(chunks).await,
        }
    }

    async fn sync(&self, records: Vec<ExtentRecord>) -> Result<(), StoreError> {
        self.run("sync", move |inner| {
            let _open = inner.open_for_writing()?;
            let mut log = lock(&inner.records);
            inner.flush()?;
            inner.refuse_lost(&records)?;
            inner.record(&mut log, &records)
        })
        .await
    }

    async fn checksum(&self, extent: Extent) -> Result<u64, StoreError> {
        self.run("read", move |inner| {
            let _alive = inner.alive()?;
            inner.checksum(extent)
        })
        .await
    }

    async fn reset_records(&self, records: Vec<ExtentRecord>) -> Result<(), StoreError> {
        self.run("replace the records", move |inner| {
            let _open = inner.open_for_writing()?;
            let mut log = lock(&inner.records);
            inner.flush()?;
            inner.refuse_lost(&records)?;
            let mut durable = Durable::default();
            for record in &records {
                durable.insert(record)?;
            }
            log.durable = durable;
            inner.rewrite(&mut log)
        })
        .await
    }

    async fn reuse(&self, file: u32, stop: CancellationToken) -> Result<Option<u64>, StoreError> {
        self.run("copy an installed file", move |inner| {
            let _open = inner.open_for_writing()?;
            inner.reuse(file, &stop)
        })
        .await
    }

    async fn rest(&self) -> Result<(), StoreError> {
        self.run("close a staging area", |inner| {
            inner.rest();
            Ok(())
        })
        .await
    }

    async fn seal(&self, totals: &[FileTotal]) -> Result<(), StoreError> {
        let totals = totals.to_vec();
        self.run("seal a snapshot", move |inner| inner.seal(&totals)).await
    }

    async fn place(&self) -> Result<PlacedSnapshot, StoreError> {
        self.run("put a snapshot in place", Inner::place).await
    }

    async fn activate(&self) -> Result<(), StoreError> {
        self.run("make a snapshot current", Inner::activate).await
    }

    async fn discard(&self) -> Result<(), StoreError> {
        self.run("discard the files of a snapshot", Inner::discard).await?;
        self.inner.shared.trash.clean();
        Ok(())
    }

    async fn remove(&self) -> Result<(), StoreError> {
        self.run("remove a staging area", Inner::remove).await?;
        self.inner.shared.trash.clean();
        Ok(())
    }
}

/// Parts of `chunks` for several threads, where that is worth waking them: making a small file costs many times what its bytes do. Of 100,000 files of
/// 4 KiB in a memory file system, one thread makes 75,000 in a second.
fn spread(mut chunks: Vec<StagedChunk>) -> Result<Vec<Vec<StagedChunk>>, Vec<StagedChunk>> {
    /// Small files that are worth a thread: fewer are what came while the last ones were written. With the batches of the sender as they are, 100,000
    /// files of 4 KiB took 1.13 s with 16 and 1.10 s with 200 (medians of 5 interleaved rounds that differ by up to 0.06).
    const EACH: usize = 200;
    /// No more threads: they wait for each other where they make files in one directory.
    const THREADS: usize = 4;
    /// Asked once: where processor time is limited by a control group, the answer is read from files.
    static CORES: OnceLock<usize> = OnceLock::new();
    let small = chunks.iter().filter(|chunk| chunk.payload.len() < SMALL).count();
    if small < 2 * EACH {
        return Err(chunks);
    }
    let cores = *CORES.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from));
    let parts = (small / EACH).min(cores).min(THREADS);
    if parts < 2 {
        return Err(chunks);
    }
    let each = chunks.len().div_ceil(parts);
    let mut spread = Vec::with_capacity(parts);
    while chunks.len() > each {
        let rest = chunks.split_off(each);
        spread.push(std::mem::replace(&mut chunks, rest));
    }
    spread.push(chunks);
    Ok(spread)
}

/// How many of `chunks`, one at least, are written before other tasks get their turn: about 1 MiB, a fraction of a millisecond. A file of 1 GiB took as long with 256 KiB and
/// with 4 MiB, and 100,000 small ones with a quarter and four times of what making one counts.
fn at_once(chunks: &[StagedChunk]) -> usize {
    const BYTES: usize = 1 << 20;
    /// What to make a small file costs, as bytes that are written: some 8 µs.
    const MAKE: usize = 16 << 10;
    let mut bytes = 0;
    let begun = chunks.iter().take_while(|chunk| {
        let before = bytes;
        bytes += chunk.payload.len().max(MAKE);
        before == 0 || bytes <= BYTES
    });
    begun.count()
}

/// Chunks below this size are, as a rule, small files: as a source has it. Of files of 4 KiB it makes no difference whether it is 16 KiB.
const SMALL: usize = 64 << 10;

type Opened<'a> = RwLockReadGuard<'a, Gate>;

impl Inner {
    /// Holds off [`closed_for_writing`](Self::closed_for_writing) while the guard lives.
    fn open_for_writing(&self) -> Result<Opened<'_>, StoreError> {
        writable(self.alive()?)
    }

    /// The same, or `None` where it would have to wait.
    fn try_open_for_writing(&self) -> Option<Result<Opened<'_>, StoreError>> {
        match self.gate.try_read() {
            Ok(gate) => Some(alive(gate).and_then(writable)),
            Err(TryLockError::Poisoned(error)) => Some(alive(error.into_inner()).and_then(writable)),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Holds off removal while the guard lives.
    fn alive(&self) -> Result<Opened<'_>, StoreError> {
        alive(self.gate.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn write_open(&self, chunks: &[StagedChunk], _open: Opened<'_>) -> Result<(), StoreError> {
        self.write(chunks)?;
        self.last_activity.store(unix_ms(), Ordering::Relaxed);
        Ok(())
    }

    fn explained<T>(&self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        result.map_err(|error| self.shared.space.explain(error, self.reservation.outstanding()))
    }

    /// Waits for all who use the area, also for those whose futures were dropped, and keeps others out.
    pub(super) fn exclusive(&self) -> RwLockWriteGuard<'_, Gate> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The directory, held open from before the first write to after the sync that covers it: an error in between is told to those who
    /// had it open.
    pub(super) fn dir(&self) -> Result<Arc<File>, StoreError> {
        let mut dir = lock(&self.dir);
        if let Some(dir) = &*dir {
            return Ok(Arc::clone(dir));
        }
        let opened = no_link()
            .read(true)
            .open(&self.area.dir)
            .map_err(|error| StoreError::io("open a staging area", error))?;
        Ok(Arc::clone(dir.insert(Arc::new(opened))))
    }

    /// Closes what it holds open, unless a sync still needs it.
    fn rest(&self) {
        let _nobody_writes = self.exclusive();
        let mut records = lock(&self.records);
        let state = self.lock_state();
        if state.dirty.is_empty() && state.dirty_dirs.is_empty() {
            records.log = None;
            *lock(&self.dir) = None;
            self.shared.handles.forget_area(self.serial);
        }
    }

    pub(super) fn file(&self, number: u32) -> Result<&ManifestFile, StoreError> {
        self.plan
            .manifest
            .get(number)
            .ok_or_else(|| StoreError::invalid("find a file", "it is not in the manifest"))
    }

    pub(super) fn path(&self, number: u32) -> Result<PathBuf, StoreError> {
        Ok(self.area.tree.join(self.file(number)?.name.as_str()))
    }

    pub(super) fn damaged(&self, path: &Path, what: impl Into<String>) -> StoreError {
        StoreError::Damaged { file: self.shared.layout.shown(path), what: what.into() }
    }

    pub(super) fn lock_state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Appends what is new in `records`, durably. Their data is durable already.
    fn record(&self, log: &mut Records, records: &[ExtentRecord]) -> Result<(), StoreError> {
        if records.is_empty() {
            return Ok(());
        }
        for ExtentRecord { extent, .. } in records {
            let known = log.durable.get(extent.file);
            if known.is_some_and(|known| known.overlaps(extent.offset, extent.len))
                || extent.len == 0
                || self.file(extent.file)?.size.is_some_and(|size| extent.end() > size)
            {
                return Err(StoreError::invalid(
                    "record an extent",
                    "it is recorded already, or not part of the file",
                ));
            }
        }
        if log.log.is_none() || log.is_wasteful() {
            self.rewrite(log)?;
        }
        // Until all of it is durable, a failure leaves the log to be rewritten from what is known.
        let Some(mut file) = log.log.take() else { return Ok(()) };
        let written: Result<(), _> =
            encode_extents(records).try_for_each(|record| file.append(&record)).and_then(|()| file.sync());
        written.map_err(|error| StoreError::io("record extents", error))?;
        log.log = Some(file);
        for record in records {
            log.durable.insert(record)?;
            log.runs_written += 1;
        }
        Ok(())
    }

    /// Replaces the log by what is durable.
    fn rewrite(&self, log: &mut Records) -> Result<(), StoreError> {
        let failed = |error| StoreError::io("rewrite the records", error);
        let mut file = match log.log.take() {
            Some(file) => file,
            None => RecordLog::open(self.area.records()).map_err(failed)?.0,
        };
        let all = log.durable.records();
        file.rewrite(encode_extents(&all)).map_err(failed)?;
        log.runs_written = u64::try_from(all.len()).unwrap_or(u64::MAX);
        log.log = Some(file);
        Ok(())
    }
}

impl Records {
    /// Whether all of the file's `size` bytes are durable.
    pub(super) fn has_whole(&self, file: u32, size: u64) -> bool {
        self.durable.get(file).is_some_and(|runs| runs.bytes() == size)
    }

    /// Whether merging the runs would make the log much smaller. A file that arrives in order in chunks of 1 MiB is one run, but one
    /// record per chunk.
    fn is_wasteful(&self) -> bool {
        const WORTH_IT: u64 = 16 * 1024;
        self.runs_written > WORTH_IT
            && self.runs_written / 4 > u64::try_from(self.durable.run_count()).unwrap_or(u64::MAX)
    }
}

/// The runs in a record log. What cannot be right is left out and described in `damage`: it will be sent again.
pub(super) fn read_records(
    plan: &TransferPlan,
    records: &[Vec<u8>],
    mut damage: impl FnMut(String),
) -> Durable {
    let mut durable = Durable::default();
    for record in records {
        let Some(extents) = decode_extents(record) else {
            damage("a record is not a list of extents".to_owned());
            continue;
        };
        for record in extents {
            let Extent { file, offset, len } = record.extent;
            let size = plan.manifest.get(file).map(|file| file.size.unwrap_or(i64::MAX.unsigned_abs()));
            let fits = size.zip(offset.checked_add(len)).is_some_and(|(size, end)| len > 0 && end <= size);
            if !fits || durable.insert(&record).is_err() {
                damage(format!(
                    "the record of {len} bytes at {offset} of file {file} contradicts the manifest or another"
                ));
            }
        }
    }
    durable
}

fn alive(gate: Opened<'_>) -> Result<Opened<'_>, StoreError> {
    match *gate {
        Gate::Open | Gate::Sealed => Ok(gate),
        Gate::Removed => Err(StoreError::invalid("use a staging area", "it was removed")),
    }
}

fn writable(gate: Opened<'_>) -> Result<Opened<'_>, StoreError> {
    match *gate {
        Gate::Open => Ok(gate),
        Gate::Sealed | Gate::Removed => Err(StoreError::invalid("write", "the snapshot is sealed")),
    }
}
