//! The durable runs of staged files.

use proto_common::checksum::combine;

use crate::extent::{Extent, ExtentRecord};
use crate::runs::RunMap;
use crate::store::StoreError;

/// Neighbours are merged up to this length, in bytes. The checksum of a run can only be checked as a whole: a single bad byte costs
/// no more than this. One TiB in order is 16384 runs. With 4 MiB, a file of 1 GiB took as long.
pub(super) const MAX_MERGED: u64 = 64 << 20;

/// The runs of all files of a staging area, by number; as long as the last file of which there are any.
#[derive(Debug, Default)]
pub(super) struct Durable {
    files: Vec<Runs>,
}

impl Durable {
    /// The file is one of the manifest.
    pub(super) fn insert(&mut self, record: &ExtentRecord) -> Result<(), StoreError> {
        let ExtentRecord { extent: Extent { file, offset, len }, crc } = *record;
        let refused = |why| StoreError::invalid("record an extent", why);
        let at = usize::try_from(file).map_err(|_| refused("there is no such file"))?;
        if at >= self.files.len() {
            self.files.resize_with(at + 1, Runs::default);
        }
        let inserted = self.files.get_mut(at).is_some_and(|runs| runs.insert(offset, len, crc));
        if inserted { Ok(()) } else { Err(refused("it is recorded already")) }
    }

    pub(super) fn get(&self, file: u32) -> Option<&Runs> {
        self.files.get(usize::try_from(file).ok()?)
    }

    pub(super) fn get_mut(&mut self, file: u32) -> Option<&mut Runs> {
        self.files.get_mut(usize::try_from(file).ok()?)
    }

    /// All of them.
    pub(super) fn records(&self) -> Vec<ExtentRecord> {
        let files = (0_u32..).zip(&self.files);
        let records = files.flat_map(|(file, runs)| {
            runs.iter()
                .map(move |(offset, len, crc)| ExtentRecord { extent: Extent { file, offset, len }, crc })
        });
        records.collect()
    }

    pub(super) fn run_count(&self) -> usize {
        self.files.iter().map(Runs::len).sum()
    }
}

/// Disjoint runs of bytes of one file with their checksums.
#[derive(Debug, Clone, Default)]
pub(super) struct Runs {
    runs: RunMap<Run>,
}

#[derive(Debug, Clone, Copy)]
struct Run {
    len: u64,
    crc: u64,
}

impl Runs {
    /// Adds a run of at least one byte; `false`, and nothing changes, if any of its bytes is there.
    pub(super) fn insert(&mut self, offset: u64, len: u64, crc: u64) -> bool {
        if len == 0 || self.overlaps(offset, len) {
            return false;
        }
        let (mut offset, mut run) = (offset, Run { len, crc });
        if let Some((before, found)) = self.runs.before(offset)
            && before + found.len == offset
            && let Some(merged) = found.then(run)
        {
            self.runs.remove(before);
            (offset, run) = (before, merged);
        }
        let end = offset.saturating_add(run.len);
        if let Some(merged) = self.runs.get(end).and_then(|after| run.then(after)) {
            self.runs.remove(end);
            run = merged;
        }
        self.runs.insert(offset, run);
        true
    }

    /// Whether any of these bytes is there.
    pub(super) fn overlaps(&self, offset: u64, len: u64) -> bool {
        let end = offset.saturating_add(len);
        self.runs.before(end).is_some_and(|(start, run)| start + run.len > offset)
    }

    pub(super) fn remove(&mut self, offset: u64) {
        self.runs.remove(offset);
    }

    /// Offset, length and checksum of each, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64, u64)> + '_ {
        self.runs.iter().map(|(offset, run)| (offset, run.len, run.crc))
    }

    /// Bytes that are there.
    pub(super) fn bytes(&self) -> u64 {
        self.runs.iter().map(|(_, run)| run.len).sum()
    }

    fn len(&self) -> usize {
        self.runs.len()
    }
}

impl Run {
    /// Both as one, unless that is too long.
    fn then(self, next: Self) -> Option<Self> {
        let len = self.len.checked_add(next.len).filter(|len| *len <= MAX_MERGED)?;
        Some(Self { len, crc: combine(self.crc, next.crc, next.len) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(runs: &Runs) -> Vec<(u64, u64)> {
        runs.iter().map(|(offset, len, _)| (offset, len)).collect()
    }

    #[test]
    fn merges_up_to_a_limit() {
        const MIB: u64 = 1 << 20;
        let mut forward = Runs::default();
        let mut backward = Runs::default();
        for at in 0..130 {
            assert!(forward.insert(at * MIB, MIB, 0));
            assert!(backward.insert((129 - at) * MIB, MIB, 0));
        }
        assert_eq!(lengths(&forward), [(0, 64 * MIB), (64 * MIB, 64 * MIB), (128 * MIB, 2 * MIB)]);
        assert_eq!(lengths(&backward), [(0, 2 * MIB), (2 * MIB, 64 * MIB), (66 * MIB, 64 * MIB)]);
        assert!(!forward.insert(5 * MIB, 1, 0) && !forward.insert(130 * MIB - 1, 2, 0));
        // One that is longer as it comes stays as it is.
        assert!(forward.insert(200 * MIB, 100 * MIB, 0) && forward.insert(300 * MIB, 1, 0));
        assert_eq!(lengths(&forward)[3..], [(200 * MIB, 100 * MIB), (300 * MIB, 1)]);
    }

    #[test]
    fn the_checksum_of_a_merged_run_is_that_of_its_bytes() {
        let bytes: Vec<u8> = (0..=255).collect();
        let crc = proto_common::checksum::crc64;
        let mut runs = Runs::default();
        for (from, to) in [(0, 100), (150, 256), (100, 150)] {
            let (offset, len) = (u64::try_from(from).unwrap(), u64::try_from(to - from).unwrap());
            assert!(runs.insert(offset, len, crc(&bytes[from..to])));
        }
        assert_eq!(runs.iter().collect::<Vec<_>>(), [(0, 256, crc(&bytes))]);
    }
}
