//! Which bytes of a transfer are there: claimed by a stream, written, durable.
//!
//! A chunk is *claimed* when it is accepted from a stream (so that no other stream brings it too), *written* when the
//! store has taken it, *durable* after a sync. What is missing is what is not claimed.

use std::collections::HashSet;

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
    /// What both weigh; see [`weight`].
    pending_weight: u64,
    syncing_weight: u64,
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

/// How far a list of what is missing has come.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// Whether whole files that follow each other are one extent.
    in_runs: bool,
    file: u32,
    /// Where what is listed of that file ends.
    offset: u64,
    /// Whether the last extent is a run that may go on.
    in_run: bool,
}

impl Listing {
    /// From the start; with `in_runs`, whole files that follow each other are one extent.
    pub(super) fn new(in_runs: bool) -> Self {
        Self { in_runs, ..Self::default() }
    }
}

/// What became of a page of what is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Listed {
    /// There are more files to look at, which others need not wait for.
    Part,
    /// It has as much as it may have, and more is missing.
    Full,
    /// No more is missing.
    All,
}

/// Files that are looked at while others wait for the books: a tenth of a millisecond. 100,000 files of 4 KiB took as long with 256.
const FILES_AT_ONCE: usize = 4096;

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
            pending_weight: 0,
            syncing_weight: 0,
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
            self.pending_weight += weight(len);
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
        self.syncing_weight += std::mem::take(&mut self.pending_weight);
        std::mem::take(&mut self.pending)
    }

    /// `records` are durable: all that was handed out.
    pub(super) fn synced(&mut self, records: &[ExtentRecord]) {
        self.syncing_weight = 0;
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
        (self.pending_bytes, self.pending_weight) = (0, 0);
        (self.syncing_bytes, self.syncing_weight) = (0, 0);
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

    /// What that weighs, by the chunks that it came in.
    pub(super) fn unsynced_weight(&self) -> u64 {
        self.pending_weight + self.syncing_weight
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

    /// Adds to `page` what no stream has brought or is bringing, in order, until it has `most` extents: from where `at` is, which then is behind that.
    pub(super) fn list(&self, at: &mut Listing, page: &mut Vec<response::Extent>, most: usize) -> Listed {
        for _ in 0..FILES_AT_ONCE {
            let (number, Some(file)) = (at.file, self.manifest.get(at.file)) else { return Listed::All };
            let extent = |offset, length| response::Extent { file: number, offset, length, more_files: 0 };
            let whole = file.size.filter(|_| at.in_runs && at.offset == 0 && self.is_empty(number));
            match whole {
                Some(size) => {
                    if let Some(run) = page.last_mut().filter(|_| at.in_run) {
                        run.more_files += 1;
                    } else if size > 0 {
                        if page.len() >= most {
                            return Listed::Full;
                        }
                        page.push(extent(0, Some(size)));
                        at.in_run = true;
                    }
                }
                None => {
                    at.in_run = false;
                    let runs = self.claimed.get(number);
                    for (offset, len) in runs.gaps_from(at.offset, file.size.unwrap_or(runs.end())) {
                        if page.len() >= most {
                            return Listed::Full;
                        }
                        page.push(extent(offset, Some(len)));
                        at.offset = offset + len;
                    }
                    if file.size.is_none() {
                        if page.len() >= most {
                            return Listed::Full;
                        }
                        page.push(extent(runs.end(), None));
                    }
                }
            }
            (at.file, at.offset) = (number + 1, 0);
        }
        Listed::Part
    }

    /// Whether nothing is missing.
    pub(super) fn has_all(&self) -> bool {
        let bytes = self.durable_bytes + self.unsynced_bytes() + self.unwritten_bytes;
        self.manifest.total_bytes() == Some(bytes)
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
        let damaged: HashSet<&Extent> = damaged.iter().collect();
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

/// What the bytes of a chunk count that are not synced: those of a block at least. Until then this ledger and the store each have an entry for them.
pub(super) fn weight(len: u64) -> u64 {
    const BLOCK: u64 = 4 << 10;
    len.max(BLOCK)
}

fn insert(books: &mut Books, record: ExtentRecord) -> bool {
    books.insert(record.extent, record.crc).is_ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::tests::manifest;

    /// All that is missing, in pages of at most so many extents.
    fn missing(ledger: &Ledger, in_runs: bool, most: usize) -> Vec<response::Extent> {
        let (mut at, mut page, mut all) = (Listing::new(in_runs), Vec::new(), Vec::new());
        loop {
            let listed = ledger.list(&mut at, &mut page, most);
            assert!(page.len() <= most);
            if listed == Listed::Full {
                assert_eq!(page.len(), most);
            }
            if listed != Listed::Part {
                all.append(&mut page);
            }
            if listed == Listed::All {
                return all;
            }
        }
    }

    proptest! {
        #[test]
        fn runs_of_files_are_the_same_bytes(
            files in prop::collection::vec((0..4_u64, 0..4_u64, any::<bool>()), 0..40),
            most in 1..5_usize,
        ) {
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
            for run in missing(&ledger, true, most) {
                plain.push(response::Extent { more_files: 0, ..run });
                for file in run.file + 1..=run.file + run.more_files {
                    let size = manifest.get(file).unwrap().size.unwrap();
                    plain.extend((size > 0).then_some(response::Extent { file, offset: 0, length: Some(size), more_files: 0 }));
                }
            }
            prop_assert_eq!(&plain, &missing(&ledger, false, most));
            let known = manifest.total_bytes().is_some();
            prop_assert_eq!(ledger.has_all(), known && plain.is_empty());
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
        assert_eq!(missing(&ledger, true, 5000).len(), 1);
        assert_eq!(missing(&ledger, false, 5000).len(), 1000);
        ledger.claim(Extent { file: 500, offset: 0, len: 7 }).unwrap();
        let run = |file, more_files| response::Extent { file, offset: 0, length: Some(7), more_files };
        assert_eq!(missing(&ledger, true, 5000), [run(0, 499), run(501, 498)]);
    }

    #[test]
    fn a_page_of_what_is_missing_takes_no_longer_for_what_is_around_it() {
        let many = u32::try_from(3 * FILES_AT_ONCE).unwrap();
        let mut ledger =
            Ledger::open(manifest(&vec![Some(4); 3 * FILES_AT_ONCE]), Vec::new(), &Limits::default());
        for file in 0..many - 1 {
            ledger.claim(Extent { file, offset: 0, len: 4 }).unwrap();
        }
        let (mut at, mut page) = (Listing::new(true), Vec::new());
        for looks in 1..=3 {
            let listed = ledger.list(&mut at, &mut page, 10);
            assert_eq!((listed, at.file), (Listed::Part, many / 3 * looks), "others get the books meanwhile");
        }
        assert_eq!(ledger.list(&mut at, &mut page, 10), Listed::All);
        assert_eq!(page.len(), 1);
        // What is brought while it is listed is not missing any more, whatever it joins.
        let mut ledger = Ledger::open(manifest(&[Some(100)]), Vec::new(), &Limits::default());
        for offset in [10, 20, 30] {
            ledger.claim(Extent { file: 0, offset, len: 5 }).unwrap();
        }
        let (mut at, mut page) = (Listing::new(true), Vec::new());
        assert_eq!(ledger.list(&mut at, &mut page, 2), Listed::Full);
        ledger.claim(Extent { file: 0, offset: 15, len: 5 }).unwrap();
        ledger.claim(Extent { file: 0, offset: 35, len: 5 }).unwrap();
        assert_eq!(ledger.list(&mut at, &mut page, 5), Listed::All);
        let found: Vec<_> = page.iter().map(|gap| (gap.offset, gap.length.unwrap())).collect();
        assert_eq!(found, [(0, 10), (15, 5), (25, 5), (40, 60)]);
    }
}
