//! What has to be sent, by whom, and the checksums of all that was read.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::extent::FileExtents;
use crate::spec::{FileTotal, Manifest};
use crate::v1::transfer_split_snapshot_response::Extent as WireExtent;

/// Largest unit of work, in bytes: small enough that lanes end at about the same time, large enough that opening the source is
/// rare.
const UNIT_BYTES: u64 = 32 << 20;

/// Bytes of one file that one lane sends in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unit {
    pub(super) file: u32,
    pub(super) offset: u64,
    /// `None`: to the end of a file of unknown size.
    pub(super) len: Option<u64>,
}

/// The units that no lane has taken.
#[derive(Debug, Default)]
pub(super) struct Work {
    units: Mutex<VecDeque<Unit>>,
}

impl Work {
    /// Cuts what is missing into units.
    pub(super) fn new(missing: &[WireExtent]) -> Self {
        let mut units = VecDeque::with_capacity(missing.len());
        for extent in missing {
            match extent.length {
                None => units.push_back(Unit { file: extent.file, offset: extent.offset, len: None }),
                Some(len) => {
                    let end = extent.offset.saturating_add(len);
                    let mut at = extent.offset;
                    while at < end {
                        let len = (end - at).min(UNIT_BYTES);
                        units.push_back(Unit { file: extent.file, offset: at, len: Some(len) });
                        at += len;
                    }
                }
            }
        }
        Self { units: Mutex::new(units) }
    }

    fn units(&self) -> MutexGuard<'_, VecDeque<Unit>> {
        self.units.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn take(&self) -> Option<Unit> {
        self.units().pop_front()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.units().is_empty()
    }

    pub(super) fn give_back(&self, units: impl IntoIterator<Item = Unit>) {
        self.units().extend(units);
    }
}

/// What of `taken` is still `missing`: the rest of a lane that broke.
pub(super) fn intersect(taken: &[Unit], missing: &[WireExtent]) -> Vec<Unit> {
    let mut rest = Vec::new();
    for unit in taken {
        let unit_end = unit.len.map_or(u64::MAX, |len| unit.offset.saturating_add(len));
        for gap in missing.iter().filter(|gap| gap.file == unit.file) {
            let gap_end = gap.length.map_or(u64::MAX, |len| gap.offset.saturating_add(len));
            let (start, end) = (unit.offset.max(gap.offset), unit_end.min(gap_end));
            if start < end {
                rest.push(Unit {
                    file: unit.file,
                    offset: start,
                    len: (end != u64::MAX).then(|| end - start),
                });
            }
        }
    }
    rest
}

/// Checksums of all that this sender has read of its source, across reconnections.
#[derive(Debug, Default)]
pub(super) struct Checksums {
    files: Mutex<Vec<KnownFile>>,
}

#[derive(Debug, Clone, Default)]
struct KnownFile {
    runs: FileExtents,
    /// Of a file of unknown size, once its end was read.
    end: Option<u64>,
}

impl Checksums {
    /// Nothing of `manifest` was read yet, or all of it has to be read anew.
    pub(super) fn start(&self, manifest: &Manifest) {
        let files =
            manifest.files().iter().map(|file| KnownFile { runs: FileExtents::default(), end: file.size });
        *self.files() = files.collect();
    }

    fn files(&self) -> MutexGuard<'_, Vec<KnownFile>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes were read. Bytes of which a part is known already are left out here and read once more at the
    /// end; that happens only where an earlier attempt cut its chunks elsewhere.
    pub(super) fn add(&self, file: u32, offset: u64, len: u64, crc: u64) {
        let mut files = self.files();
        if let Some(known) = usize::try_from(file).ok().and_then(|file| files.get_mut(file)) {
            let _ = known.runs.insert(offset, len, crc);
        }
    }

    /// The end of a file of unknown size was read.
    pub(super) fn end(&self, file: u32, size: u64) {
        let mut files = self.files();
        if let Some(known) = usize::try_from(file).ok().and_then(|file| files.get_mut(file)) {
            known.end = Some(size);
        }
    }

    /// What has to be read of the source although the receiver does not lack it: what is neither known nor `missing`.
    pub(super) fn unread(&self, missing: &[WireExtent]) -> Vec<Unit> {
        let files = self.files();
        let mut missing = missing.iter().peekable();
        let mut unread = Vec::new();
        for (number, known) in (0_u32..).zip(files.iter()) {
            let mut covered = known.runs.clone();
            let mut end = known.end;
            while let Some(gap) = missing.next_if(|gap| gap.file <= number) {
                match gap.length {
                    // What is known and lost at the receiver overlaps, and is covered either way.
                    Some(len) => cover(&mut covered, gap.offset, len),
                    None => end = Some(gap.offset),
                }
            }
            let gaps = end.map(|end| covered.gaps(end)).unwrap_or_default();
            unread.extend(gaps.into_iter().map(|(offset, len)| Unit {
                file: number,
                offset,
                len: Some(len),
            }));
        }
        unread
    }

    /// Size and checksum of every file, or what has to be read first.
    pub(super) fn totals(&self) -> Result<Vec<FileTotal>, Vec<Unit>> {
        let unread = self.unread(&[]);
        if !unread.is_empty() {
            return Err(unread);
        }
        let files = self.files();
        Ok(files
            .iter()
            .map(|known| {
                let size = known.end.unwrap_or_else(|| known.runs.end());
                FileTotal { size, crc: known.runs.whole(size).unwrap_or(0) }
            })
            .collect())
    }
}

/// Marks bytes as covered, whatever of them is covered already.
fn cover(runs: &mut FileExtents, offset: u64, len: u64) {
    let end = offset.saturating_add(len);
    let inside: Vec<(u64, u64)> =
        runs.gaps(end).into_iter().filter(|(start, len)| start + len > offset).collect();
    for (start, len) in inside {
        let from = start.max(offset);
        let _ = runs.insert(from, start + len - from, 0);
    }
}
