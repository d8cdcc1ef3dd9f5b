//! Which bytes of a transfer are there: claimed by a stream, written, durable.
//!
//! A chunk is *claimed* when it is accepted from a stream (so that no other stream brings it too), *written* when the
//! store has taken it, *durable* after a sync. What is missing is what is not claimed.

use proto_common::error::Error;

use crate::books::Books;
use crate::extent::{Extent, ExtentRecord};
use crate::limits::Limits;
use crate::reason::Reason;
use crate::spec::{FileTotal, Manifest};
use crate::v1::transfer_split_snapshot_response as response;

/// The books of one transfer.
#[derive(Debug)]
pub(super) struct Ledger {
    manifest: Manifest,
    claimed: Books,
    written: Books,
    /// Claimed and not written yet.
    unwritten_bytes: u64,
    /// Durable before this process started; read back before they are installed.
    inherited: Vec<ExtentRecord>,
    /// Made durable since this process started.
    durable: Books,
    pending: Vec<ExtentRecord>,
    pending_bytes: u64,
    syncing_bytes: u64,
    durable_bytes: u64,
    reused_bytes: u64,
    /// Runs of all files in `claimed`, and how many there may be.
    claimed_runs: usize,
    max_runs: usize,
    /// Files that are known to be empty.
    empty_files: u64,
    /// Of all files together: what a manifest that leaves sizes open may grow to.
    max_bytes: u64,
}

impl Ledger {
    /// The books of a staging area that was opened with `records`. Records that do not fit the manifest
    /// or each other are left out: their bytes are asked for again.
    pub(super) fn open(manifest: Manifest, records: Vec<ExtentRecord>, limits: &Limits) -> Self {
        let files = manifest.files().len();
        let nothing = Books::new(manifest.clone());
        let mut ledger = Self {
            claimed: nothing.clone(),
            written: nothing.clone(),
            unwritten_bytes: 0,
            inherited: Vec::new(),
            durable: nothing,
            pending: Vec::new(),
            pending_bytes: 0,
            syncing_bytes: 0,
            durable_bytes: 0,
            reused_bytes: 0,
            claimed_runs: 0,
            max_runs: files.saturating_add(limits.extents),
            empty_files: manifest.files().iter().filter(|file| file.size == Some(0)).count() as u64,
            max_bytes: limits.snapshot_bytes,
            manifest,
        };
        for record in records {
            if ledger.check_bounds(record.extent).is_ok() && insert(&mut ledger.written, record) {
                ledger.durable_bytes += record.extent.len;
                ledger.inherited.push(record);
            }
        }
        ledger.forget_claims();
        ledger
    }

    fn check_bounds(&self, extent: Extent) -> Result<(), Error> {
        let Some(file) = self.manifest.get(extent.file) else {
            return Err(Reason::ExtentOutOfBounds.field(
                "chunk.file",
                format!("is {}, the manifest has {} files", extent.file, self.manifest.file_count()),
            ));
        };
        let end = extent.offset.checked_add(extent.len).filter(|end| i64::try_from(*end).is_ok());
        if file.size.is_none() && end.is_some_and(|end| end > self.max_bytes) {
            return Err(self.too_large());
        }
        let size = file.size.unwrap_or(self.max_bytes);
        if end.is_none_or(|end| end > size) {
            return Err(Reason::ExtentOutOfBounds
                .field(
                    "chunk.offset",
                    format!(
                        "{} bytes at offset {} reach beyond the {size} bytes of {}",
                        extent.len, extent.offset, file.name
                    ),
                )
                .metadata("file", extent.file.to_string())
                .metadata("offset", extent.offset.to_string()));
        }
        Ok(())
    }

    fn too_large(&self) -> Error {
        let problem = format!("makes the snapshot larger than the {} bytes that are taken", self.max_bytes);
        Reason::SnapshotTooLarge.field("chunk.offset", problem).metadata("limit", self.max_bytes.to_string())
    }

    /// Claims the bytes of a chunk for the stream that brings it.
    pub(super) fn claim(&mut self, extent: Extent) -> Result<(), Error> {
        self.check_bounds(extent)?;
        let claimed = self.durable_bytes + self.unsynced_bytes() + self.unwritten_bytes;
        if claimed.saturating_add(extent.len) > self.max_bytes {
            return Err(self.too_large());
        }
        let before = self.claimed.get(extent.file).run_count();
        // Checksums of claims are not used; those of what is written are.
        self.claimed.insert(extent, 0).map_err(|overlap| {
            Reason::OverlappingExtent
                .field(
                    "chunk.offset",
                    format!(
                        "{} bytes at offset {} of file {} overlap {} bytes at offset {} that are there already; \
                         send only what Accepted lists as missing",
                        extent.len, extent.offset, extent.file, overlap.len, overlap.offset
                    ),
                )
                .metadata("file", extent.file.to_string())
                .metadata("offset", extent.offset.to_string())
        })?;
        let after = self.claimed.get(extent.file).run_count();
        self.claimed_runs = self.claimed_runs + after - before;
        // What fills a gap, or goes on where a piece ends, is taken also of one that has more, as an earlier version may have left it.
        if after > before && self.claimed_runs > self.max_runs {
            return Err(Reason::TooFragmented.field(
                "chunk.offset",
                format!(
                    "the snapshot has come in {} pieces with gaps between them, at most {} are kept track of; send \
                     each file from its start",
                    self.claimed_runs, self.max_runs
                ),
            ));
        }
        self.unwritten_bytes += extent.len;
        Ok(())
    }

    /// The store has taken these bytes.
    pub(super) fn written(&mut self, record: ExtentRecord) {
        let Extent { file, offset, len } = record.extent;
        self.unwritten_bytes = self.unwritten_bytes.saturating_sub(len);
        let fits = insert(&mut self.written, record);
        debug_assert!(fits, "claimed twice: {record:?}");
        if fits {
            match self.pending.last_mut() {
                // Chunks in order become one record.
                Some(last) if last.extent.file == file && last.extent.end() == offset => {
                    last.crc = proto_common::checksum::combine(last.crc, record.crc, len);
                    last.extent.len += len;
                }
                _ => self.pending.push(record),
            }
            self.pending_bytes += len;
        }
    }

    /// Counts a file that was found by its digest; its record is pending like any other.
    pub(super) fn reused(&mut self, record: ExtentRecord) -> Result<(), Error> {
        self.claim(record.extent)?;
        self.written(record);
        self.reused_bytes += record.extent.len;
        Ok(())
    }

    /// Hands out what has to be synced; [`Self::synced`] says that it was.
    pub(super) fn take_pending(&mut self) -> Vec<ExtentRecord> {
        self.syncing_bytes += std::mem::take(&mut self.pending_bytes);
        std::mem::take(&mut self.pending)
    }

    /// `records` are durable.
    pub(super) fn synced(&mut self, records: &[ExtentRecord]) {
        for record in records {
            self.syncing_bytes = self.syncing_bytes.saturating_sub(record.extent.len);
            self.durable_bytes += record.extent.len;
            let fits = insert(&mut self.durable, *record);
            debug_assert!(fits, "synced twice: {record:?}");
        }
    }

    /// A write or a sync failed and no stream writes any more: only what is durable is there. What a failed
    /// sync had in hand is lost, since the kernel may have dropped it and a second sync would not say so.
    pub(super) fn roll_back(&mut self) {
        self.pending.clear();
        self.pending_bytes = 0;
        self.syncing_bytes = 0;
        self.written = self.durable.clone();
        for record in &self.inherited {
            let fits = insert(&mut self.written, *record);
            debug_assert!(fits, "inherited and durable overlap: {record:?}");
        }
        self.forget_claims();
    }

    /// Brought by a stream but not taken by the store yet, in bytes.
    pub(super) fn unwritten_bytes(&self) -> u64 {
        self.unwritten_bytes
    }

    /// Written but not durable, in bytes.
    pub(super) fn unsynced_bytes(&self) -> u64 {
        self.pending_bytes + self.syncing_bytes
    }

    /// Whether a file has no byte yet.
    pub(super) fn is_empty(&self, file: u32) -> bool {
        self.claimed.get(file).bytes() == 0
    }

    pub(super) fn durable_bytes(&self) -> u64 {
        self.durable_bytes
    }

    pub(super) fn reused_bytes(&self) -> u64 {
        self.reused_bytes
    }

    /// Files whose every byte is durable or written.
    pub(super) fn complete_files(&self) -> u64 {
        self.empty_files + self.written.whole_count() as u64
    }

    /// No stream writes: what was claimed but not written is missing again.
    pub(super) fn forget_claims(&mut self) {
        self.claimed = self.written.clone();
        self.unwritten_bytes = 0;
        self.claimed_runs = self.claimed.run_count();
    }

    /// What no stream has brought or is bringing, in order; with `in_runs`, whole files that follow each other are one extent.
    pub(super) fn missing(&self, in_runs: bool) -> Vec<response::Extent> {
        let mut missing: Vec<response::Extent> = Vec::new();
        // Whether the last extent is a run that may go on.
        let mut in_run = false;
        for (number, file) in self.manifest.numbered() {
            let extent = |offset, length| response::Extent { file: number, offset, length, more_files: 0 };
            if in_runs
                && let Some(size) = file.size
                && self.is_empty(number)
            {
                match missing.last_mut().filter(|_| in_run) {
                    Some(run) => run.more_files += 1,
                    None if size > 0 => {
                        missing.push(extent(0, Some(size)));
                        in_run = true;
                    }
                    None => {}
                }
                continue;
            }
            in_run = false;
            let runs = self.claimed.get(number);
            let gaps = runs.gaps(file.size.unwrap_or(runs.end()));
            missing.extend(gaps.map(|(offset, len)| extent(offset, Some(len))));
            if file.size.is_none() {
                missing.push(extent(runs.end(), None));
            }
        }
        missing
    }

    /// Checks `End` against the manifest and what was written.
    pub(super) fn check_totals(&self, totals: &[FileTotal]) -> Result<(), Error> {
        for ((number, file), total) in self.manifest.numbered().zip(totals) {
            let runs = self.written.get(number);
            if let Some(size) = file.size
                && size != total.size
            {
                return Err(totals_mismatch(
                    number,
                    format!("{} has {} bytes in End and {size} in the manifest", file.name, total.size),
                ));
            }
            if runs.end() > total.size {
                return Err(totals_mismatch(
                    number,
                    format!("{} has {} bytes in End, {} arrived", file.name, total.size, runs.end()),
                ));
            }
            if let Some((offset, len)) = runs.gaps(total.size).next() {
                return Err(Reason::MissingExtents
                    .error(format!(
                        "End came while bytes are missing, first {len} at offset {offset} of {}; send them, then End",
                        file.name
                    ))
                    .metadata("file", number.to_string())
                    .metadata("offset", offset.to_string())
                    .metadata("length", len.to_string()));
            }
            if runs.whole(total.size) != Some(total.crc) {
                return Err(Reason::FileChecksumMismatch
                    .error(format!(
                        "{} is not what the sender read: its checksum over all bytes differs; cancel the transfer \
                         and send the snapshot under a new ID",
                        file.name
                    ))
                    .metadata("file", number.to_string()));
            }
        }
        Ok(())
    }

    /// What an earlier process left, to be read back.
    pub(super) fn inherited(&self) -> Vec<ExtentRecord> {
        self.inherited.clone()
    }

    /// All records but the `damaged` ones of the inherited.
    pub(super) fn without(&self, damaged: &[Extent]) -> Vec<ExtentRecord> {
        let all = self.durable_without(damaged);
        all.all().map(|(extent, crc)| ExtentRecord { extent, crc }).collect()
    }

    fn durable_without(&self, damaged: &[Extent]) -> Books {
        let mut durable = self.durable.clone();
        for record in self.inherited.iter().filter(|record| !damaged.contains(&record.extent)) {
            let fits = insert(&mut durable, *record);
            debug_assert!(fits, "inherited and durable overlap: {record:?}");
        }
        durable
    }

    /// The inherited records have been read back; `damaged` ones do not match and are missing from now on.
    pub(super) fn verified(&mut self, damaged: &[Extent]) {
        self.durable = self.durable_without(damaged);
        self.inherited = Vec::new();
        if damaged.is_empty() {
            return;
        }
        for extent in damaged {
            self.durable_bytes = self.durable_bytes.saturating_sub(extent.len);
        }
        self.written = self.durable.clone();
        self.forget_claims();
    }
}

fn totals_mismatch(file: u32, message: String) -> Error {
    Reason::TotalsMismatch.error(message).metadata("file", file.to_string())
}

fn insert(books: &mut Books, record: ExtentRecord) -> bool {
    books.insert(record.extent, record.crc).is_ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::tests::manifest;

    proptest! {
        #[test]
        fn runs_of_files_are_the_same_bytes(files in prop::collection::vec((0..4_u64, 0..4_u64, any::<bool>()), 0..40)) {
            // Some of unknown size, some empty, some with a part that is there, at either end.
            let sizes: Vec<_> = files.iter().map(|(size, ..)| Some(*size).filter(|size| *size < 3)).collect();
            let manifest = manifest(&sizes);
            let claims = (0..).zip(&files).filter_map(|(file, (size, len, late))| {
                let size = if *size < 3 { *size } else { 10 };
                let len = size.min(*len);
                let offset = if *late { size - len } else { 0 };
                (len > 0).then_some(Extent { file, offset, len })
            });
            let mut ledger = Ledger::open(manifest.clone(), Vec::new(), &Limits::default());
            claims.for_each(|claim| ledger.claim(claim).unwrap());
            let mut plain = Vec::new();
            for run in ledger.missing(true) {
                plain.push(response::Extent { more_files: 0, ..run });
                for file in run.file + 1..=run.file + run.more_files {
                    let size = manifest.get(file).unwrap().size.unwrap();
                    plain.extend((size > 0).then_some(response::Extent { file, offset: 0, length: Some(size), more_files: 0 }));
                }
            }
            prop_assert_eq!(plain, ledger.missing(false));
        }
    }

    #[test]
    fn one_piece_more_is_refused_and_gaps_are_filled_all_the_same() {
        let limits = Limits { extents: 2, ..Limits::default() };
        let at = |offset| Extent { file: 0, offset, len: 1 };
        // A restart with a lower limit finds more.
        let records = (0..5).map(|at| Extent { file: 0, offset: 4 * at, len: 1 });
        let records = records.map(|extent| ExtentRecord { extent, crc: 0 });
        let mut ledger = Ledger::open(manifest(&[Some(100)]), records.collect(), &limits);
        for offset in [1, 2, 3, 17] {
            ledger.claim(at(offset)).unwrap();
        }
        assert!(ledger.claim(at(50)).unwrap_err().is(Reason::TooFragmented));
        // An honest sender's lanes leave a gap each, and whatever breaks leaves some more.
        let mut ledger = Ledger::open(manifest(&[Some(1 << 40)]), Vec::new(), &Limits::default());
        for gap in 0..=1024 {
            ledger.claim(at(2 * gap)).unwrap();
        }
        assert!(ledger.claim(at(5000)).unwrap_err().is(Reason::TooFragmented));
    }

    #[test]
    fn what_is_new_is_one_run() {
        let mut ledger = Ledger::open(manifest(&[Some(7); 1000]), Vec::new(), &Limits::default());
        assert_eq!(ledger.missing(true).len(), 1);
        assert_eq!(ledger.missing(false).len(), 1000);
        ledger.claim(Extent { file: 500, offset: 0, len: 7 }).unwrap();
        let run = |file, more_files| response::Extent { file, offset: 0, length: Some(7), more_files };
        assert_eq!(ledger.missing(true), [run(0, 499), run(501, 498)]);
    }
}
