//! An append-only file of checksummed records.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use super::{parent, replace, sync_dir, with_suffix};
use crate::checksum::{Crc64Hasher, crc64};

/// Longest record, in bytes: 16 MiB. A larger length can only be damage.
pub const MAX_RECORD_LEN: usize = 16 << 20;

/// `len: u32` and `crc: u64`, both little-endian.
const HEADER_LEN: usize = 12;

/// How much is compared with checksums to find a record behind one that cannot be read, in bytes. For 1 MiB of noise half of it is enough.
const MAX_SEARCHED: usize = 256 << 20;

/// How much of what is cut off is set aside, in bytes. A damaged size of a file may be anything.
const MAX_SET_ASIDE: u64 = 64 << 20;

/// What a disk writes as a whole, in bytes; a file system writes no less.
const SECTOR: u64 = 512;

/// An append-only file of records: `[len: u32][crc: u64][bytes]`, little-endian, where `crc` is CRC-64/NVME of `len` and `bytes`.
///
/// A record is durable once [`sync`](Self::sync) has returned; after a crash, [`open`](Self::open) finds all of those, and of the later ones
/// a prefix; what it returns is durable. Once writing or syncing has failed, what the file holds is uncertain, so every further call fails; open it again.
///
/// All methods block.
#[derive(Debug)]
pub struct RecordLog {
    path: PathBuf,
    file: File,
    /// Length of the file in bytes; all of it valid records.
    len: u64,
    broken: bool,
}

/// What [`RecordLog::open`] cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// The last record is not whole, and none follows it: the file ends within it, or holds only zeros where its last sector of 512 bytes should be, or that part of
    /// it which lies there, as where a file system had made the file longer and not come to the data. That is a crash while it was written, and nothing that was
    /// synced is lost. Damage to the length of the last record, or to one that ends in such zeros itself, looks the same. No copy is kept: that of each crash would
    /// replace one of damage.
    TornTail {
        /// Where it began, in bytes from the start of the file.
        offset: u64,
        /// How many bytes were cut.
        bytes: u64,
    },
    /// A record is there in its whole length and does not match its checksum, or has an impossible length, or one that reaches beyond the end while others
    /// follow it. It and all that follows were cut off, and the first 64 MiB of that moved to `<path>.damaged`, if there was room: after a crash these are records that
    /// were not synced; otherwise the disk has lost data.
    BadRecord {
        /// Where it began, in bytes from the start of the file.
        offset: u64,
        /// How many bytes were cut off, from there to the end.
        bytes: u64,
        /// How many of them are in `<path>.damaged`; with 0, that is as it was before.
        set_aside: u64,
    },
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TornTail { offset, bytes } => {
                write!(f, "the last record, {bytes} bytes at {offset}, is not whole and was cut off")
            }
            Self::BadRecord { offset, bytes, set_aside: 0 } => {
                write!(
                    f,
                    "damaged at {offset}; {bytes} bytes from there on were cut off, and there was no room to set them aside"
                )
            }
            Self::BadRecord { offset, bytes, set_aside } if set_aside < bytes => {
                write!(
                    f,
                    "damaged at {offset}; of {bytes} bytes from there on, the first {set_aside} were set aside as *.damaged, and the others cut off"
                )
            }
            Self::BadRecord { offset, bytes, .. } => {
                write!(f, "damaged at {offset}; {bytes} bytes from there on were set aside as *.damaged")
            }
        }
    }
}

impl RecordLog {
    /// Opens the log at `path`, creates it if there is none, and reads all records into memory.
    ///
    /// What cannot be read is cut off, so that the log can be appended to, and reported. What was read is synced: a process that was
    /// killed may have written it and not come to that.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn open(path: impl AsRef<Path>) -> io::Result<(Self, Vec<Vec<u8>>, Option<Damage>)> {
        let path = path.as_ref().to_owned();
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
        let total = file.metadata()?.len();
        let (records, len, end) = read_records(&file, total)?;
        let damage = match end {
            End::Clean => None,
            End::Torn => Some(Damage::TornTail { offset: len, bytes: total - len }),
            End::Bad => {
                let set_aside = set_aside(&file, len, &with_suffix(&path, ".damaged"))?;
                Some(Damage::BadRecord { offset: len, bytes: total - len, set_aside })
            }
        };
        if damage.is_some() {
            file.set_len(len)?;
        }
        file.sync_all()?;
        // Also when the file was there: whoever created it may not have come to this.
        sync_dir(parent(&path))?;
        file.seek(SeekFrom::Start(len))?;
        Ok((Self { path, file, len, broken: false }, records, damage))
    }

    /// Adds a record. It is durable after the next [`sync`](Self::sync).
    ///
    /// # Errors
    ///
    /// `InvalidInput` for more than [`MAX_RECORD_LEN`] bytes, which changes nothing; else those of the file system.
    pub fn append(&mut self, record: &[u8]) -> io::Result<()> {
        self.check()?;
        let mut frame = Vec::with_capacity(HEADER_LEN + record.len());
        encode(record, &mut frame)?;
        self.broken = true;
        self.file.write_all(&frame)?;
        self.broken = false;
        self.len += length(&frame);
        Ok(())
    }

    /// Makes everything appended so far durable.
    ///
    /// # Errors
    ///
    /// Those of the file system. A failed sync may have dropped data, so it is never repeated.
    pub fn sync(&mut self) -> io::Result<()> {
        self.check()?;
        self.broken = true;
        self.file.sync_data()?;
        self.broken = false;
        Ok(())
    }

    /// Replaces all records by `records`, at once and durably: a crash leaves the old ones or the new ones.
    ///
    /// # Errors
    ///
    /// Those of [`append`](Self::append). The old records stay in place.
    pub fn rewrite<R: AsRef<[u8]>>(&mut self, records: impl IntoIterator<Item = R>) -> io::Result<()> {
        self.check()?;
        let mut len = 0;
        let mut frame = Vec::new();
        let file = replace(&self.path, |file| {
            let mut out = io::BufWriter::new(file);
            for record in records {
                frame.clear();
                encode(record.as_ref(), &mut frame)?;
                out.write_all(&frame)?;
                len += length(&frame);
            }
            out.flush()
        });
        match file {
            Ok(file) => {
                self.file = file;
                self.len = len;
                Ok(())
            }
            Err(error) => {
                // The rename may have happened: then `self.file` is a file without a name.
                self.broken = error.kind() != io::ErrorKind::InvalidInput;
                Err(error)
            }
        }
    }

    /// Length of the file in bytes, to decide when to [`rewrite`](Self::rewrite).
    #[must_use]
    pub fn file_len(&self) -> u64 {
        self.len
    }

    /// Where the log lies.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn check(&self) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other("an earlier write failed; open the log again"));
        }
        Ok(())
    }
}

/// Copies what `file` holds from `at` on to `place`, as far as it is kept; how much that is. A full disk does not keep a log from being opened.
fn set_aside(mut file: &File, at: u64, place: &Path) -> io::Result<u64> {
    file.seek(SeekFrom::Start(at))?;
    let mut copied = 0;
    let copy = replace(place, |copy| {
        copied = io::copy(&mut file.take(MAX_SET_ASIDE), copy)?;
        Ok(())
    });
    match copy {
        Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
            Ok(0)
        }
        copy => copy.map(|_| copied),
    }
}

fn encode(record: &[u8], frame: &mut Vec<u8>) -> io::Result<()> {
    let len = u32::try_from(record.len()).ok().filter(|_| record.len() <= MAX_RECORD_LEN);
    let len = len.ok_or_else(|| {
        let message = format!("a record of {} bytes; the limit is {MAX_RECORD_LEN}", record.len());
        io::Error::new(io::ErrorKind::InvalidInput, message)
    })?;
    let len = len.to_le_bytes();
    frame.extend_from_slice(&len);
    frame.extend_from_slice(&checksum(len, record).to_le_bytes());
    frame.extend_from_slice(record);
    Ok(())
}

/// Covers the length too; so zeros, which a file system may leave behind after a crash, are no valid record.
fn checksum(len: [u8; 4], record: &[u8]) -> u64 {
    if record.is_empty() {
        return crc64(&len);
    }
    let mut hasher = Crc64Hasher::new();
    hasher.update(&len);
    hasher.update(record);
    hasher.finish()
}

enum End {
    Clean,
    Torn,
    Bad,
}

/// All valid records, the length of the file up to the end of the last one, and what comes there.
fn read_records(file: &File, total: u64) -> io::Result<(Vec<Vec<u8>>, u64, End)> {
    let mut input = BufReader::with_capacity(256 << 10, file);
    let mut records = Vec::new();
    let mut at = 0;
    loop {
        let left = total - at;
        if left == 0 {
            return Ok((records, at, End::Clean));
        }
        let Some(body) = left.checked_sub(length(&[0; HEADER_LEN])) else {
            return Ok((records, at, End::Torn));
        };
        let mut len = [0; 4];
        let mut crc = [0; 8];
        input.read_exact(&mut len)?;
        input.read_exact(&mut crc)?;
        let record_len = u64::from(u32::from_le_bytes(len));
        // Checked before anything of that size is allocated.
        let size = usize::try_from(record_len).ok().filter(|&size| size <= MAX_RECORD_LEN);
        let Some(size) = size else { return Ok((records, at, End::Bad)) };
        if record_len > body {
            return Ok((records, at, last(file, at, left)?));
        }
        let mut record = vec![0; size];
        input.read_exact(&mut record)?;
        if checksum(len, &record) != u64::from_le_bytes(crc) {
            let torn = record_len == body && ends_in_zeros(total, crc, &record);
            let end = if torn { last(file, at, left)? } else { End::Bad };
            return Ok((records, at, end));
        }
        at += length(&[0; HEADER_LEN]) + record_len;
        records.push(record);
    }
}

/// Whether a record at the end of a file of `total` bytes may have been written but for its last sector. What of it lies there are zeros then.
fn ends_in_zeros(total: u64, crc: [u8; 8], record: &[u8]) -> bool {
    let in_last_sector = usize::try_from((total - 1) % SECTOR + 1).unwrap_or(usize::MAX);
    let written = if record.is_empty() { &crc[..] } else { record };
    written[written.len().saturating_sub(in_last_sector)..].iter().all(|byte| *byte == 0)
}

/// What the `left` bytes at `at` are, a header at least, whose record would be the last one by its length: torn, unless there are whole ones behind it. Then it is
/// the length that is damaged.
fn last(mut file: &File, at: u64, left: u64) -> io::Result<End> {
    file.seek(SeekFrom::Start(at))?;
    let mut rest = Vec::new();
    // No more than the longest record: its length was believed.
    file.take(left).read_to_end(&mut rest)?;
    let mut to_search = MAX_SEARCHED;
    for start in 1..rest.len() {
        let Some((len, behind)) = rest[start..].split_first_chunk::<4>() else { break };
        let Some((crc, body)) = behind.split_first_chunk::<8>() else { break };
        let size = usize::try_from(u32::from_le_bytes(*len)).unwrap_or(usize::MAX);
        let Some(record) = body.get(..size) else { continue };
        let Some(still) = to_search.checked_sub(size) else { return Ok(End::Bad) };
        to_search = still;
        if checksum(*len, record) == u64::from_le_bytes(*crc) {
            return Ok(End::Bad);
        }
    }
    Ok(End::Torn)
}

fn length(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
