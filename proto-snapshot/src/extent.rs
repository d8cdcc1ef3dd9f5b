//! Runs of bytes of one file, with the checksum of each, and what is missing between them.

use std::collections::BTreeMap;

use proto_common::checksum::combine;

/// A run of bytes of one file of a snapshot. `len` is at least 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Extent {
    /// Number of the file in the manifest.
    pub file: u32,
    /// Offset of the first byte.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
}

impl Extent {
    /// One past the last byte.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset.saturating_add(self.len)
    }
}

/// An extent whose bytes have the CRC-64/NVME `crc`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtentRecord {
    /// Where.
    pub extent: Extent,
    /// CRC-64/NVME of the bytes.
    pub crc: u64,
}

/// The bytes of one file that are there, as disjoint runs; neighbours are merged and their
/// checksums combined, so a file that arrived in order is one run however many chunks it took.
#[derive(Debug, Clone, Default)]
pub struct FileExtents {
    runs: BTreeMap<u64, Run>,
}

#[derive(Debug, Clone, Copy)]
struct Run {
    len: u64,
    crc: u64,
}

/// The bytes are there already, in whole or in part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overlap {
    /// Offset of the first run that is in the way.
    pub offset: u64,
    /// Its length.
    pub len: u64,
}

impl FileExtents {
    /// Adds `len` bytes at `offset` whose checksum is `crc`.
    ///
    /// # Errors
    ///
    /// [`Overlap`] when any of the bytes is there already; nothing changes then.
    pub fn insert(&mut self, offset: u64, len: u64, crc: u64) -> Result<(), Overlap> {
        if len == 0 {
            return Ok(());
        }
        if let Some(overlap) = self.overlap(offset, len) {
            return Err(overlap);
        }
        let end = offset.saturating_add(len);
        let mut start = offset;
        let mut run = Run { len, crc };
        if let Some((&before, &found)) = self.runs.range(..offset).next_back()
            && before + found.len == offset
        {
            self.runs.remove(&before);
            start = before;
            run = found.then(run);
        }
        if let Some(after) = self.runs.remove(&end) {
            run = run.then(after);
        }
        self.runs.insert(start, run);
        Ok(())
    }

    /// The first run that shares a byte with `len` bytes at `offset`.
    #[must_use]
    pub fn overlap(&self, offset: u64, len: u64) -> Option<Overlap> {
        let end = offset.saturating_add(len);
        let (&start, run) = self.runs.range(..end).next_back()?;
        (start + run.len > offset).then_some(Overlap { offset: start, len: run.len })
    }

    /// Removes the run that starts at `offset`; returns its length.
    pub fn remove(&mut self, offset: u64) -> Option<u64> {
        self.runs.remove(&offset).map(|run| run.len)
    }

    /// Bytes that are there.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.runs.values().map(|run| run.len).sum()
    }

    /// One past the last byte that is there.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.runs.last_key_value().map_or(0, |(start, run)| start + run.len)
    }

    /// `(offset, length, checksum)` of each run, in order.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        self.runs.iter().map(|(&offset, run)| (offset, run.len, run.crc))
    }

    /// The gaps below `size`, as `(offset, length)`, in order.
    #[must_use]
    pub fn gaps(&self, size: u64) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        let mut at = 0;
        for (&start, run) in &self.runs {
            if start > at {
                gaps.push((at, start.min(size).saturating_sub(at)));
            }
            at = start + run.len;
        }
        if at < size {
            gaps.push((at, size - at));
        }
        gaps
    }

    /// The checksum of the whole file, if exactly the bytes `0..size` are there.
    #[must_use]
    pub fn whole(&self, size: u64) -> Option<u64> {
        if size == 0 {
            return self.runs.is_empty().then_some(0);
        }
        let (&start, run) = self.runs.first_key_value()?;
        (self.runs.len() == 1 && start == 0 && run.len == size).then_some(run.crc)
    }
}

impl Run {
    fn then(self, next: Self) -> Self {
        Self { len: self.len + next.len, crc: combine(self.crc, next.crc, next.len) }
    }
}
