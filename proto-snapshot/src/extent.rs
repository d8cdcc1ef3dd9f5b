//! Runs of bytes of one file, with the checksum of each, and what is missing between them.

use proto_common::checksum::combine;

use crate::runs::RunMap;

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
    runs: RunMap<Run>,
    bytes: u64,
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
    /// One run.
    #[cfg(any(feature = "client", feature = "server"))]
    pub(crate) fn one(offset: u64, len: u64, crc: u64) -> Self {
        let mut runs = RunMap::default();
        runs.insert(offset, Run { len, crc });
        Self { runs, bytes: len }
    }

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
        if let Some((before, found)) = self.runs.before(offset)
            && before + found.len == offset
        {
            self.runs.remove(before);
            start = before;
            run = found.then(run);
        }
        if let Some(after) = self.runs.remove(end) {
            run = run.then(after);
        }
        self.runs.insert(start, run);
        self.bytes += len;
        Ok(())
    }

    /// The first run that shares a byte with `len` bytes at `offset`.
    #[must_use]
    pub fn overlap(&self, offset: u64, len: u64) -> Option<Overlap> {
        let end = offset.saturating_add(len);
        let (start, run) = self.runs.before(end)?;
        (start + run.len > offset).then_some(Overlap { offset: start, len: run.len })
    }

    /// Bytes that are there.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Number of runs.
    #[must_use]
    pub fn run_count(&self) -> usize {
        self.runs.len()
    }

    /// One past the last byte that is there.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.runs.before(u64::MAX).map_or(0, |(start, run)| start + run.len)
    }

    /// `(offset, length, checksum)` of each run, in order.
    pub fn runs(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        self.runs.iter().map(|(offset, run)| (offset, run.len, run.crc))
    }

    /// The gaps below `size`, as `(offset, length)`, in order.
    pub fn gaps(&self, size: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.gaps_from(0, size)
    }

    /// What of these gaps lies at `from` or behind it, without a look at what is before.
    pub(crate) fn gaps_from(&self, from: u64, size: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let reaches = self.runs.before(from).map_or(0, |(start, run)| start + run.len);
        let mut at = from.max(reaches);
        let below = self.runs.from(at).take_while(move |(start, _)| *start < size);
        below.map(|(start, run)| (start, run.len)).chain([(size, 0)]).filter_map(move |(start, len)| {
            let gap = (start > at).then(|| (at, start - at));
            at = start + len;
            gap
        })
    }

    /// The checksum of the whole file, if exactly the bytes `0..size` are there.
    #[must_use]
    pub fn whole(&self, size: u64) -> Option<u64> {
        if size == 0 {
            return (self.runs.len() == 0).then_some(0);
        }
        let (start, run) = self.runs.iter().next()?;
        (self.runs.len() == 1 && start == 0 && run.len == size).then_some(run.crc)
    }
}

impl Run {
    fn then(self, next: Self) -> Self {
        Self { len: self.len + next.len, crc: combine(self.crc, next.crc, next.len) }
    }
}

#[cfg(test)]
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the numbers of test data are small"
)]
mod tests {
    use proptest::prelude::*;
    use proto_common::checksum::crc64;

    use super::*;

    #[test]
    fn neighbours_merge_in_any_order() {
        let bytes = b"0123456789";
        for order in [[0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 0, 2]] {
            let mut extents = FileExtents::default();
            for part in order {
                let (from, to) = [(0, 3), (3, 7), (7, 10)][part];
                extents.insert(from, to - from, crc64(&bytes[from as usize..to as usize])).unwrap();
            }
            assert_eq!(extents.runs().collect::<Vec<_>>(), [(0, 10, crc64(bytes))]);
            assert_eq!(extents.whole(10), Some(crc64(bytes)));
            assert_eq!((extents.whole(9), extents.whole(11)), (None, None));
        }
    }

    #[test]
    fn an_overlap_changes_nothing_and_names_the_run() {
        let mut extents = FileExtents::default();
        extents.insert(10, 10, 1).unwrap();
        extents.insert(30, 5, 2).unwrap();
        let before: Vec<_> = extents.runs().collect();
        for (offset, len, found) in [
            (10, 10, Overlap { offset: 10, len: 10 }),
            (0, 11, Overlap { offset: 10, len: 10 }),
            (19, 1, Overlap { offset: 10, len: 10 }),
            (12, 2, Overlap { offset: 10, len: 10 }),
            (34, u64::MAX, Overlap { offset: 30, len: 5 }),
        ] {
            assert_eq!(extents.insert(offset, len, 0), Err(found), "{len} at {offset}");
        }
        assert_eq!(extents.runs().collect::<Vec<_>>(), before);
        assert_eq!(extents.overlap(20, 10), None);
        assert_eq!(extents.overlap(35, u64::MAX), None);
        extents.insert(5, 0, 0).unwrap();
        assert_eq!(extents.bytes(), 15);
        assert_eq!(extents.end(), 35);
    }

    #[test]
    fn an_empty_file_is_whole_from_the_start() {
        let extents = FileExtents::default();
        assert_eq!((extents.whole(0), extents.end(), extents.gaps(0).count()), (Some(0), 0, 0));
        assert!(extents.gaps(7).eq([(0, 7)]));
    }

    #[test]
    fn the_end_of_an_extent_does_not_wrap() {
        assert_eq!(Extent { file: 0, offset: u64::MAX, len: 2 }.end(), u64::MAX);
        let mut extents = FileExtents::default();
        extents.insert(u64::MAX - 1, 1, 0).unwrap();
        assert!(extents.gaps(u64::MAX).eq([(0, u64::MAX - 1)]));
    }

    proptest! {
        /// Against one flag per byte.
        #[test]
        fn agrees_with_a_map_of_bytes(
            inserts in prop::collection::vec((0..200_u64, 0..40_u64), 0..30),
            size in 0..260_u64,
        ) {
            let bytes: Vec<u8> = (0..=255).cycle().take(240).collect();
            let mut there = vec![false; 240];
            let mut extents = FileExtents::default();
            for (offset, len) in inserts {
                let range = offset as usize..(offset + len) as usize;
                let free = !there[range.clone()].contains(&true);
                let overlap = extents.overlap(offset, len);
                prop_assert_eq!(extents.insert(offset, len, crc64(&bytes[range.clone()])).is_ok(), free);
                if len > 0 {
                    prop_assert_eq!(overlap.is_none(), free);
                }
                if let Some(Overlap { offset: at, len }) = overlap {
                    prop_assert!(there[at as usize..(at + len) as usize].iter().all(|there| *there));
                }
                if free {
                    there[range].fill(true);
                }
            }
            let mut at_last = None;
            for (offset, len, crc) in extents.runs() {
                prop_assert!(len > 0 && at_last.is_none_or(|end| end < offset), "neighbours are merged");
                prop_assert_eq!(crc, crc64(&bytes[offset as usize..(offset + len) as usize]));
                at_last = Some(offset + len);
            }
            prop_assert_eq!(extents.bytes(), there.iter().filter(|there| **there).count() as u64);
            prop_assert_eq!(extents.end(), there.iter().rposition(|there| *there).map_or(0, |at| at as u64 + 1));
            let mut missing: Vec<bool> = (0..size as usize).map(|at| !there.get(at).copied().unwrap_or(false)).collect();
            for (offset, len) in extents.gaps(size) {
                prop_assert!(len > 0);
                for at in offset..offset + len {
                    prop_assert!(std::mem::replace(&mut missing[at as usize], false), "byte {} twice or not missing", at);
                }
            }
            prop_assert!(!missing.contains(&true), "a gap was left out");
            for from in 0..size {
                let behind: Vec<_> = extents.gaps(size).filter_map(|(offset, len)| {
                    let start = offset.max(from);
                    (start < offset + len).then(|| (start, offset + len - start))
                }).collect();
                let found: Vec<_> = extents.gaps_from(from, size).collect();
                prop_assert_eq!(found, behind);
            }
            let whole = extents.end() == size && extents.gaps(size).next().is_none();
            prop_assert_eq!(extents.whole(size).is_some(), whole);
        }
    }
}
