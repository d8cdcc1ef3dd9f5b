//! Reading files off the async threads and ahead of the socket.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::thread;

use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use proto_common::path::FileName;
use rustix::fs::{Mode, OFlags};
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TrySendError;
use tokio::task::JoinHandle;

use crate::memory::in_memory;
use crate::spec::ManifestFile;

use super::ahead::Ahead;
use super::{Description, PieceStream, SourceError};

/// Pieces that wait for the socket, the one that is being read included; [`SnapshotSource::open`](super::SnapshotSource::open) promises
/// four at most: enough that a read and a send overlap; with 8 or 16, a file of 1 GiB moves no faster, and with 1 it took 1.05 times as long. What was handed out and waits at the socket comes to it, [`Given::KEPT`] pieces in all.
const AHEAD: usize = 3;

/// Pieces of a file in memory up to this size are read by whoever asks for them: some 0.1 ms, and others wait for no longer than that.
/// A file of 1 GiB took 1.09 times as long where all were read by other threads.
const HERE: usize = 1 << 20;

/// Read at once for a digest: enough that the call is nothing beside the hash, which takes 0.2 ms for it.
const DIGEST_PIECE: usize = 1 << 20;

/// From so many files on, the hash of their list is worth a thread of its own: 0.2 ms, of 100,000 files 5 ms. Of
/// their whole transfer that is less than rounds differ by.
const MANY: usize = 4096;

/// What tells whether a file is still the same one with the same content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Identity {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Self {
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }

    fn difference(&self, now: &Self) -> Option<String> {
        if self.inode != now.inode {
            Some("it was replaced by another file".to_owned())
        } else if self.size != now.size {
            Some(format!("it had {} bytes and has {}", self.size, now.size))
        } else if self.modified != now.modified {
            Some("it was written to".to_owned())
        } else {
            None
        }
    }
}

/// One file.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) name: FileName,
    pub(super) identity: Identity,
}

/// Where the files of a listing are.
#[derive(Debug, Clone)]
pub(super) enum Place {
    /// Below this directory, each under its name.
    Below(PathBuf),
    /// The only file is here, whatever its name.
    Only(PathBuf),
}

impl Place {
    /// Where the file of this name is.
    fn path(&self, name: &FileName) -> PathBuf {
        match self {
            Self::Below(root) => root.join(name.as_str()),
            Self::Only(path) => path.clone(),
        }
    }
}

/// The files of a source, as they were when it was described. There may be very many, so no entry keeps what the place and its name tell.
#[derive(Debug)]
pub(super) struct Listing {
    place: Place,
    entries: Vec<Entry>,
    given: Given,
    pub(super) ahead: Ahead,
    /// Whether the directory that it is of lies in memory; one below it may not.
    pub(super) in_memory: bool,
}

/// What is guarded is replaced as a whole, so a panic elsewhere leaves it usable.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Set when nobody waits for the result any more.
#[derive(Debug, Clone, Default)]
pub(super) struct Stop(Arc<AtomicBool>);

struct StopOnDrop(Stop);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// Does `job` on a blocking thread, and lets it know when the future is dropped.
pub(super) async fn off_thread<T: Send + 'static>(
    job: impl FnOnce(Stop) -> Result<T, SourceError> + Send + 'static,
) -> Result<T, SourceError> {
    let stop = Stop::default();
    let _stop = StopOnDrop(stop.clone());
    match tokio::task::spawn_blocking(move || job(stop)).await {
        Ok(result) => result,
        Err(error) => Err(SourceError::Io { name: "the source".to_owned(), source: io::Error::other(error) }),
    }
}

impl Entry {
    fn failed(&self, source: io::Error) -> SourceError {
        match source.kind() {
            io::ErrorKind::NotFound => self.changed("it was removed"),
            _ => SourceError::Io { name: self.name.to_string(), source },
        }
    }

    fn changed(&self, what: impl Into<String>) -> SourceError {
        SourceError::Changed { name: self.name.to_string(), what: what.into() }
    }

    fn open(&self, place: &Place) -> Result<File, SourceError> {
        let file = File::open(place.path(&self.name)).map_err(|error| self.failed(error))?;
        self.check(&file)?;
        Ok(file)
    }

    /// Whether the file is still what was described.
    fn check(&self, file: &File) -> Result<(), SourceError> {
        let now = file.metadata().map_err(|error| self.failed(error))?;
        self.identity.difference(&Identity::of(&now)).map_or(Ok(()), |what| Err(self.changed(what)))
    }

    /// Exactly `len` bytes at `offset`.
    fn read_at(&self, file: &File, offset: u64, len: usize) -> Result<Bytes, SourceError> {
        self.read_into(Vec::with_capacity(len), file, offset, len)
    }

    /// The same, into the memory of `buffer`.
    fn read_into(
        &self,
        mut buffer: Vec<u8>,
        file: &File,
        offset: u64,
        len: usize,
    ) -> Result<Bytes, SourceError> {
        buffer.clear();
        self.append(&mut buffer, file, offset, len)?;
        Ok(buffer.into())
    }

    /// The same, behind what is in `buffer`.
    fn append(&self, buffer: &mut Vec<u8>, file: &File, offset: u64, len: usize) -> Result<(), SourceError> {
        let before = buffer.len();
        buffer.reserve_exact(len);
        while buffer.len() - before < len {
            let at = offset + u64::try_from(buffer.len() - before).unwrap_or(u64::MAX);
            // Into memory that nobody has to fill with zeros first.
            match rustix::io::pread(file, rustix::buffer::spare_capacity(buffer), at) {
                Ok(0) => return Err(self.changed(format!("it ends at {at}"))),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(self.failed(error.into())),
            }
        }
        buffer.truncate(before + len);
        Ok(())
    }

    /// Opens the file for `len` bytes at `offset`.
    fn read_once(&self, place: &Place, offset: u64, len: usize) -> Result<Bytes, SourceError> {
        let file = self.open(place)?;
        let bytes = self.read_at(&file, offset, len)?;
        self.check(&file)?;
        Ok(bytes)
    }

    /// The whole file, of `len` bytes, opened in `dir` as `name`, behind what is in `buffer`. Whether it is still what was described is asked once,
    /// after it was read.
    fn read_in(&self, dir: &File, name: &str, len: usize, buffer: &mut Vec<u8>) -> Result<(), SourceError> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(dir, name, flags, Mode::empty());
        let file = File::from(opened.map_err(|error| self.failed(error.into()))?);
        let read = self.append(buffer, &file, 0, len);
        self.check(&file)?;
        read
    }

    pub(super) fn size(&self) -> u64 {
        self.identity.size
    }

    fn digest(&self, place: &Place, stop: &Stop) -> Result<[u8; 32], SourceError> {
        let file = self.open(place)?;
        sequential(&file);
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < self.identity.size {
            if stop.0.load(Ordering::Relaxed) {
                return Err(self.failed(io::ErrorKind::Interrupted.into()));
            }
            let bytes = self.read_at(&file, at, next(at, self.identity.size, DIGEST_PIECE))?;
            hasher.update(&bytes);
            at += u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        }
        self.check(&file)?;
        Ok(hasher.finalize().into())
    }
}

/// The length of the piece at `at`.
fn next(at: u64, end: u64, piece: usize) -> usize {
    usize::try_from(end - at).map_or(piece, |left| left.min(piece))
}

impl Listing {
    pub(super) fn get(&self, file: u32) -> Option<&Entry> {
        self.entries.get(usize::try_from(file).ok()?)
    }

    /// `entries` in the order of their numbers.
    pub(super) fn new(place: Place, mut entries: Vec<Entry>) -> Self {
        entries.shrink_to_fit();
        let in_memory = match &place {
            Place::Below(root) => File::open(root).is_ok_and(|dir| in_memory(&dir)),
            Place::Only(_) => false,
        };
        Self { place, entries, given: Given::default(), ahead: Ahead::default(), in_memory }
    }

    pub(super) fn describe(&self, digests: bool, stop: &Stop) -> Result<Description, SourceError> {
        let files = self.entries.iter().map(|entry| {
            Ok(ManifestFile {
                name: entry.name.clone(),
                size: Some(entry.identity.size),
                blake3: digests.then(|| entry.digest(&self.place, stop)).transpose()?.map(Box::new),
            })
        });
        let version = || self.content_version();
        thread::scope(|scope| {
            // Where there can be no more threads, this one does it all.
            let helper = (self.entries.len() >= MANY)
                .then(|| thread::Builder::new().spawn_scoped(scope, version).ok())
                .flatten();
            let files = files.collect::<Result<_, _>>()?;
            let content_version = helper
                .map_or_else(version, |helper| helper.join().unwrap_or_else(|panic| resume_unwind(panic)));
            Ok(Description { files, content_version })
        })
    }

    /// A hash over name, inode, modification time and size of all files.
    fn content_version(&self) -> String {
        /// What is hashed at once: enough for the widest vectors.
        const AT_ONCE: usize = 32 << 10;
        let mut hasher = blake3::Hasher::new();
        let mut bytes = Vec::with_capacity(AT_ONCE + (4 << 10));
        for Entry { name, identity: Identity { inode, size, modified } } in &self.entries {
            bytes.extend_from_slice(name.as_str().as_bytes());
            // No name contains it, so no two listings make the same bytes.
            bytes.push(0);
            bytes.extend_from_slice(&inode.to_le_bytes());
            bytes.extend_from_slice(&size.to_le_bytes());
            bytes.extend_from_slice(&modified.0.to_le_bytes());
            bytes.extend_from_slice(&modified.1.to_le_bytes());
            if bytes.len() >= AT_ONCE {
                hasher.update(&bytes);
                bytes.clear();
            }
        }
        hasher.update(&bytes);
        format!("stat-{}", hasher.finalize().to_hex())
    }
}

/// Reads whole small files one after the other, as a rule those of one directory, which it keeps open.
pub(super) struct WholeReader<'a> {
    listing: &'a Listing,
    /// The directory of the last one, below the root.
    dir: Option<(&'a str, File)>,
    /// Whether it leaves files to others that do not lie in memory.
    in_memory: bool,
}

impl<'a> WholeReader<'a> {
    pub(super) fn new(listing: &'a Listing) -> Self {
        Self { listing, dir: None, in_memory: false }
    }

    /// One that reads no files but those in memory, for a listing of a directory there.
    pub(super) fn in_memory(listing: &'a Listing) -> Self {
        Self { in_memory: true, ..Self::new(listing) }
    }

    pub(super) fn listing(&self) -> &'a Listing {
        self.listing
    }

    /// Reads all `len` bytes of `entry`, behind what is in `buffer`; false if it is left to others. What is in the buffer after an error is of no use.
    pub(super) fn read(
        &mut self,
        entry: &'a Entry,
        len: usize,
        buffer: &mut Vec<u8>,
    ) -> Result<bool, SourceError> {
        let Place::Below(root) = &self.listing.place else {
            if self.in_memory {
                return Ok(false);
            }
            buffer.extend_from_slice(&entry.read_once(&self.listing.place, 0, len)?);
            return Ok(true);
        };
        let name = entry.name.as_str();
        let (parent, name) = name.rsplit_once('/').unwrap_or(("", name));
        let dir = match &self.dir {
            Some((at, dir)) if *at == parent => dir,
            _ => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let opened = rustix::fs::open(root.join(parent), flags, Mode::empty());
                let opened = File::from(opened.map_err(|error| entry.failed(error.into()))?);
                if self.in_memory && !in_memory(&opened) {
                    return Ok(false);
                }
                &self.dir.insert((parent, opened)).1
            }
        };
        entry.read_in(dir, name, len, buffer).map(|()| true)
    }
}

/// [`SnapshotSource::open`](super::SnapshotSource::open) for a listing.
pub(super) async fn read(
    listing: Option<Arc<Listing>>,
    file: u32,
    offset: u64,
    len: Option<u64>,
    piece: usize,
) -> Result<PieceStream, SourceError> {
    let found = listing.and_then(|listing| Some((listing.get(file)?.clone(), listing)));
    let (entry, listing) = found.ok_or_else(|| SourceError::Io {
        name: format!("file number {file}"),
        source: io::Error::new(io::ErrorKind::InvalidInput, "it was not described"),
    })?;
    let piece = piece.max(1);
    let size = entry.identity.size;
    let end = match len {
        Some(len) => offset.checked_add(len),
        None => Some(size),
    };
    let Some(end) = end.filter(|end| *end <= size && offset <= *end) else {
        let source = io::Error::new(io::ErrorKind::InvalidInput, format!("it has {size} bytes"));
        return Err(SourceError::Io { name: entry.name.to_string(), source });
    };
    if end == offset {
        return Ok(futures::stream::empty().boxed());
    }
    // A small file is not worth a task that outlives this call.
    if let Ok(len) = usize::try_from(end - offset)
        && len <= piece
    {
        let bytes = off_thread(move |_| entry.read_once(&listing.place, offset, len)).await?;
        return Ok(futures::stream::once(async { Ok(bytes) }).boxed());
    }
    let (listing, entry, opened) = off_thread(move |_| {
        let file = entry.open(&listing.place)?;
        sequential(&file);
        Ok((listing, entry, file))
    })
    .await?;
    let here = piece <= HERE && in_memory(&opened);
    let pieces = Pieces { listing, entry, file: opened, at: offset, end, piece };
    if here {
        let next = async |mut pieces: Pieces| {
            // Others get their turn, however fast this one is sent.
            tokio::task::yield_now().await;
            pieces.next().map(|piece| (piece, pieces))
        };
        return Ok(futures::stream::unfold(pieces, next).boxed());
    }
    let mut reading = Reading::new(pieces);
    Ok(futures::stream::poll_fn(move |cx| reading.poll_next(cx)).boxed())
}

/// Reads ahead on other threads, of which it keeps none while nobody takes what was read: the pool has so many, and the store of the node writes on them, too.
struct Reading {
    sender: mpsc::Sender<Result<Bytes, SourceError>>,
    ready: mpsc::Receiver<Result<Bytes, SourceError>>,
    /// What is left to read, while no thread reads.
    rest: Option<Pieces>,
    /// Gives back what is left when as much was read as may wait. Ends with the next piece after this is dropped.
    job: Option<JoinHandle<Option<Pieces>>>,
}

impl Reading {
    /// Pieces that wait when more are read: to wake a thread for each would be dear.
    const LOW: usize = 1;

    fn new(pieces: Pieces) -> Self {
        let (sender, ready) = mpsc::channel(AHEAD);
        Self { sender, ready, rest: Some(pieces), job: None }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, SourceError>>> {
        loop {
            if let Some(rest) = self.rest.take_if(|_| self.ready.len() <= Self::LOW) {
                let sender = self.sender.clone();
                self.job = Some(tokio::task::spawn_blocking(move || rest.fill(&sender)));
            }
            let ended = match &mut self.job {
                None => false,
                Some(job) => match Pin::new(job).poll(cx) {
                    Poll::Pending => false,
                    Poll::Ready(ended) => {
                        self.job = None;
                        self.rest = ended.unwrap_or_else(|error| match error.try_into_panic() {
                            Ok(panic) => resume_unwind(panic),
                            // The runtime ends.
                            Err(_) => None,
                        });
                        true
                    }
                },
            };
            match self.ready.poll_recv(cx) {
                Poll::Ready(piece) => return Poll::Ready(piece),
                // This task has had its turn.
                Poll::Pending if !self.ready.is_empty() => return Poll::Pending,
                Poll::Pending if ended => {}
                Poll::Pending if self.job.is_some() => return Poll::Pending,
                Poll::Pending => return Poll::Ready(None),
            }
        }
    }
}

/// What is left to read of a file, piece by piece; ends after the first failure.
struct Pieces {
    listing: Arc<Listing>,
    entry: Entry,
    file: File,
    at: u64,
    end: u64,
    piece: usize,
}

impl Pieces {
    /// Reads until `ready` is full, or nobody wants more. Returns itself, if there may be more to read.
    fn fill(mut self, ready: &mpsc::Sender<Result<Bytes, SourceError>>) -> Option<Self> {
        loop {
            match ready.try_reserve() {
                Ok(place) => place.send(self.next()?),
                Err(TrySendError::Full(())) => return Some(self),
                Err(TrySendError::Closed(())) => return None,
            }
        }
    }
}

impl Iterator for Pieces {
    type Item = Result<Bytes, SourceError>;

    fn next(&mut self) -> Option<Self::Item> {
        let Self { listing, entry, file, at, end, piece } = self;
        if at >= end {
            return None;
        }
        let len = next(*at, *end, *piece);
        let mut read = entry.read_into(listing.given.take(), file, *at, len);
        if let Ok(bytes) = &read {
            listing.given.put(bytes);
        }
        *at += u64::try_from(len).unwrap_or(u64::MAX);
        if at >= end {
            // Before the last piece is handed out: a file that changed meanwhile is never sent as a whole.
            read = read.and_then(|bytes| entry.check(file).map(|()| bytes));
        }
        if read.is_err() {
            *at = *end;
        }
        Some(read)
    }
}

/// Pieces that were handed out, to be read into again when everybody has dropped them: memory that is new to the process costs a page fault for
/// every 4 KiB, about as much as reading into it.
#[derive(Debug, Default)]
struct Given(Mutex<Vec<Bytes>>);

impl Given {
    /// Those of a stream that wait at the same time: here, in the queue of the stream and at the socket. 6 MiB in pieces of 512 KiB, kept
    /// until the source is dropped or described anew.
    const KEPT: usize = 12;

    /// The memory of one that nobody uses any more, or none.
    fn take(&self) -> Vec<u8> {
        let mut kept = lock(&self.0);
        // The one that was handed out last: most of it may still be in the cache of the processor.
        let unused = kept.iter().rposition(Bytes::is_unique).map(|at| kept.remove(at));
        drop(kept);
        // Empty, or its bytes would be moved to where they are.
        let empty = |mut buffer: BytesMut| {
            buffer.clear();
            Vec::from(buffer)
        };
        unused.and_then(|unused| unused.try_into_mut().ok()).map_or_else(Vec::new, empty)
    }

    fn put(&self, bytes: &Bytes) {
        let mut kept = lock(&self.0);
        if kept.len() == Self::KEPT {
            kept.remove(0);
        }
        kept.push(bytes.clone());
    }
}

/// Tells the kernel to read far ahead. Only a hint: what it answers does not matter.
///
/// What was read is left in the page cache, however large it is: a checkpoint shares its files with the store that it was taken of, which
/// may need those pages in the next moment.
#[cfg(target_os = "linux")]
fn sequential(file: &File) {
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::Sequential);
}

#[cfg(not(target_os = "linux"))]
fn sequential(_file: &File) {}
