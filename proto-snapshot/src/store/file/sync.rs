//! Making written bytes durable.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::extent::{Extent, ExtentRecord};
use crate::memory::{in_memory, lies_in};
use crate::store::StoreError;

use super::staging::Inner;

/// From so many files and directories on, the whole file system is synced at once. Measured on ext4 on a virtual disk, files of 4 KiB, one
/// after the other, by eight threads, and by one `syncfs`: 64 files 311, 27 and 10 ms; 256 files 1212, 88 and 28 ms; 1000 files
/// 4684, 249 and 82 ms. But `syncfs` also waits for what everybody else has written (once 325 ms for 8 files), so few files are not worth it.
const MANY: usize = 256;

/// Fewer are synced by this many threads: a device takes several flushes at once, and a journal commits them together.
const THREADS: usize = 8;

/// What was written since the last sync, in the order in which it was.
#[derive(Debug, Default)]
pub(super) struct Dirty {
    runs: Vec<Extent>,
}

impl Dirty {
    /// A file that has no bytes is dirty with an empty extent.
    pub(super) fn add(&mut self, extent: Extent) {
        match self.runs.last_mut() {
            Some(last) if last.file == extent.file && last.end() == extent.offset => last.len += extent.len,
            _ => self.runs.push(extent),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The files, each once.
    pub(super) fn files(&self) -> Vec<u32> {
        let mut files: Vec<u32> = self.runs.iter().map(|run| run.file).collect();
        files.sort_unstable();
        files.dedup();
        files
    }
}

/// Bytes that have to be written again, by file: a failed sync may leave those of a hundred thousand.
#[derive(Debug, Default)]
pub(super) struct Lost {
    files: HashMap<u32, Vec<Extent>>,
}

impl Lost {
    fn add(&mut self, extent: Extent) {
        self.files.entry(extent.file).or_default().push(extent);
    }

    /// `offset..end` of the file was written again.
    pub(super) fn written(&mut self, file: u32, offset: u64, end: u64) {
        let Some(lost) = self.files.get_mut(&file) else { return };
        *lost = lost.iter().flat_map(|lost| without(*lost, offset, end)).collect();
        if lost.is_empty() {
            self.files.remove(&file);
        }
    }

    /// All of the file is another one.
    pub(super) fn forget(&mut self, file: u32) {
        self.files.remove(&file);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty()
    }

    fn overlaps(&self, extent: Extent) -> bool {
        let lost = self.files.get(&extent.file).into_iter().flatten();
        lost.into_iter().any(|lost| lost.offset < extent.end() && extent.offset < lost.end())
    }
}

/// The parts of `lost` that `offset..end` does not cover.
fn without(lost: Extent, offset: u64, end: u64) -> impl Iterator<Item = Extent> {
    let Extent { file, offset: start, .. } = lost;
    let (before, after) = if offset < lost.end() && end > start {
        (offset.saturating_sub(start), lost.end().saturating_sub(end))
    } else {
        (lost.len, 0)
    };
    let rest = [(start, before), (lost.end() - after, after)];
    rest.into_iter().filter(|(_, len)| *len > 0).map(move |(offset, len)| Extent { file, offset, len })
}

/// Shorter runs are not worth a call. Several streams write at once, so a run is often no more than a chunk. A file of 1 GiB in memory, where the advice does nothing,
/// took as long with 1 byte and with 1 MiB.
const UNCACHED_RUN: u64 = 128 << 10;

/// The kernel is to begin to write as soon as so many bytes are there. A disk that has nothing to do until a sync comes has more to do then: 1 GiB to a file on ext4
/// was 1.12, 1.20 and 1.11 times as fast as `cp` and a sync with it, and 1.14, 0.95 and 1.01 times without (medians of 4 rounds, by turns); with 512 KiB and with 8 MiB 0.98 to
/// 1.16 times.
const WRITE_BACK: u64 = 2 << 20;

/// Has the kernel begin to write the pieces of [`WRITE_BACK`] that end in `offset..end`. Does not wait for them; what becomes of them, the next sync tells.
pub(super) fn begin_to_write_back(file: &File, offset: u64, end: u64) {
    let complete = ending_in(offset, end);
    if !complete.is_empty() {
        // The advice begins to write what is dirty; only what is clean leaves the cache.
        dont_need(file, complete.start, complete.end - complete.start);
    }
}

/// The pieces of [`WRITE_BACK`] that end in `offset..end`, so that each is found once where chunks come in order.
fn ending_in(offset: u64, end: u64) -> std::ops::Range<u64> {
    offset / WRITE_BACK * WRITE_BACK..end / WRITE_BACK * WRITE_BACK
}

impl Inner {
    /// Makes durable all that was written and created by calls that returned before this one.
    ///
    /// After an error nothing of that is believed any more: the kernel marks pages clean although it could not write them, and tells only
    /// once. It counts as lost until it is written again.
    pub(super) fn flush(&self) -> Result<(), StoreError> {
        let mut state = self.lock_state();
        let dirty = std::mem::take(&mut state.dirty);
        let dirs = std::mem::take(&mut state.dirty_dirs);
        drop(state);
        let files = dirty.files();
        let result = if files.is_empty() && dirs.is_empty() {
            Ok(())
        } else if let Some(dir) = self.worth_a_whole(files.len() + dirs.len()) {
            sync_file_system(&dir)
        } else {
            self.sync_each(&files, &dirs)
        };
        if let Err(error) = result {
            let mut state = self.lock_state();
            state.dirty_dirs.extend(dirs);
            for run in dirty.runs {
                if run.len > 0 {
                    state.lost.add(run);
                } else {
                    // That a file is there, and how long it is, the next sync of it makes durable.
                    state.dirty.add(run);
                }
            }
            return Err(StoreError::io("make data durable", error));
        }
        let bytes = dirty.runs.iter().map(|run| run.len).sum();
        let durable = self.durable_bytes.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
        if self.is_too_large_for_the_cache(durable) {
            self.uncache(&dirty);
        }
        Ok(())
    }

    /// Whether its files are kept out of the page cache. While its size is unknown, that is the `bytes` that are there.
    pub(super) fn is_too_large_for_the_cache(&self, bytes: u64) -> bool {
        self.plan.manifest.total_bytes().unwrap_or(bytes) >= self.shared.options.uncached_from_bytes
    }

    /// Lets the page cache go of what was just made durable. Only a hint: what the kernel answers does not matter.
    fn uncache(&self, durable: &Dirty) {
        for run in durable.runs.iter().filter(|run| run.len >= UNCACHED_RUN) {
            let handle = self.shared.handles.get(self.serial, run.file);
            // Small files are closed as soon as they are written, others when there are too many.
            if let Some(handle) = handle.or_else(|| File::open(self.path(run.file).ok()?).ok().map(Arc::new))
            {
                dont_need(&handle, run.offset, run.len);
            }
        }
    }

    /// The directory of the area, if so much is to be synced that all of its file system may be, and that can be believed.
    fn worth_a_whole(&self, files: usize) -> Option<Arc<File>> {
        if files < MANY || !syncfs_reports_errors() {
            return None;
        }
        self.dir().ok().filter(|dir| syncs_as_a_whole(dir))
    }

    /// Data, then directories.
    fn sync_each(&self, files: &[u32], dirs: &HashSet<PathBuf>) -> io::Result<()> {
        each(files, |&number| match self.shared.handles.get(self.serial, number) {
            Some(handle) => handle.sync_data(),
            // Closed to make room for others; any descriptor of a file syncs all of it.
            None => File::open(self.path(number).map_err(io::Error::other)?)?.sync_data(),
        })?;
        let dirs: Vec<&PathBuf> = dirs.iter().collect();
        each(&dirs, |dir| File::open(dir)?.sync_all())
    }

    /// Refuses records of bytes that a failed sync may have dropped and that were not written again.
    pub(super) fn refuse_lost(&self, records: &[ExtentRecord]) -> Result<(), StoreError> {
        let state = self.lock_state();
        if records.iter().any(|record| state.lost.overlaps(record.extent)) {
            let why = "its bytes may be lost since a sync failed; write them again";
            return Err(StoreError::invalid("record an extent", why));
        }
        Ok(())
    }
}

/// Does `job` with each of `items`, a few at once; all are tried, the first error is returned.
fn each<T: Sync>(items: &[T], job: impl Fn(&T) -> io::Result<()> + Sync) -> io::Result<()> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut result = Ok(());
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            result = result.and(job(item));
        }
        result
    };
    if items.len() <= 2 {
        return work();
    }
    std::thread::scope(|scope| {
        // Where there is no thread to be had, there are fewer of them.
        let helper = |_| std::thread::Builder::new().spawn_scoped(scope, work).ok();
        let helpers: Vec<_> = (1..THREADS.min(items.len())).filter_map(helper).collect();
        helpers.into_iter().fold(work(), |result, helper| {
            result.and(helper.join().unwrap_or_else(|_| Err(io::Error::other("a sync thread panicked"))))
        })
    })
}

#[cfg(target_os = "linux")]
pub(super) fn dont_need(file: &File, offset: u64, len: u64) {
    let len = std::num::NonZeroU64::new(len);
    let _ = rustix::fs::fadvise(file, offset, len, rustix::fs::Advice::DontNeed);
}

#[cfg(not(target_os = "linux"))]
pub(super) fn dont_need(_file: &File, _offset: u64, _len: u64) {}

#[cfg(target_os = "linux")]
fn sync_file_system(dir: &File) -> io::Result<()> {
    Ok(rustix::fs::syncfs(dir)?)
}

#[cfg(not(target_os = "linux"))]
fn sync_file_system(_dir: &File) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Linux 5.8 and later return from `syncfs` the errors of writing back; before, it said nothing of them.
fn syncfs_reports_errors() -> bool {
    use std::sync::OnceLock;
    static REPORTS: OnceLock<bool> = OnceLock::new();
    *REPORTS.get_or_init(|| {
        cfg!(target_os = "linux")
            && std::fs::read_to_string("/proc/sys/kernel/osrelease")
                .ok()
                .and_then(|release| version(&release))
                .is_some_and(|version| version >= (5, 8))
    })
}

/// Whether `syncfs` on the file system of `dir` makes durable what `fsync` does, and tells of the same errors. One that lies over others (overlayfs) tells of none of
/// theirs, and one in user space need not be asked at all; so only those that are known: `EXT4_SUPER_MAGIC` and others of `linux/magic.h`, and of XFS.
fn syncs_as_a_whole(dir: &File) -> bool {
    /// ext2 to ext4, XFS, Btrfs, F2FS.
    const MAGIC: [i64; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010];
    lies_in(dir, &MAGIC) || in_memory(dir)
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_kernel_versions() {
        assert_eq!(version("6.18.44-fc"), Some((6, 18)));
        assert_eq!(version("5.8-rc1"), Some((5, 8)));
        assert_eq!(version("x"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn only_file_systems_that_are_known_are_synced_as_a_whole() {
        let is_known = |path| syncs_as_a_whole(&File::open(path).unwrap());
        assert_eq!((is_known("/dev/shm"), is_known("/proc")), (true, false));
    }

    #[test]
    fn pieces_begin_to_be_written_once_and_when_they_are_complete() {
        const CHUNK: u64 = WRITE_BACK / 4;
        let chunks = (0..12).map(|chunk| ending_in(chunk * CHUNK, (chunk + 1) * CHUNK));
        let begun: Vec<_> = chunks.filter(|pieces| !pieces.is_empty()).collect();
        assert_eq!(begun, [0..WRITE_BACK, WRITE_BACK..2 * WRITE_BACK, 2 * WRITE_BACK..3 * WRITE_BACK]);
        assert_eq!(ending_in(1, 3 * WRITE_BACK + 1), 0..3 * WRITE_BACK, "a chunk may be long");
    }

    #[test]
    fn tries_all_and_returns_an_error() {
        let done = AtomicUsize::new(0);
        let result = each(&[0; 100], |_| {
            if done.fetch_add(1, Ordering::Relaxed) == 3 { Err(io::Error::other("disk")) } else { Ok(()) }
        });
        assert_eq!(result.unwrap_err().to_string(), "disk");
        assert_eq!(done.into_inner(), 100);
    }
}
