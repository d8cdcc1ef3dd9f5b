//! Count and digest of the live keys of a range, by a scan in pages while the rows change.
//!
//! A page is read from a snapshot of the database, and handed over some time later. Rows at or behind the last page are kept up by every
//! change. Changes of rows ahead of it are remembered: those that came after the snapshot of the next page, in its part of the
//! range, are applied on top of it. Pages and changes arrive in the order of the writer thread: when a page of the
//! snapshot at sequence `s` is handed over, every change up to `s` has been reported.

use std::collections::VecDeque;

use proto::migration::digest::{SlotDigest, SlotDigests};

use super::log::Change;
use super::tables;
use crate::common::SlotRange;

/// Changes that are remembered, at most. What came later than a forgotten one needs a newer page.
const MAX_AHEAD: usize = 64 << 10;
/// Bytes of their keys.
const MAX_AHEAD_BYTES: usize = 16 << 20;

/// How far the scan is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Scanned {
    /// Up to this [position](tables::position), inclusive; empty: nothing yet.
    UpTo(Vec<u8>),
    /// All.
    All,
}

/// Some rows of a snapshot, in sum.
#[derive(Debug)]
pub(super) struct DigestPage {
    /// The last position of the page before; empty: none.
    pub(super) behind: Vec<u8>,
    /// How far this one goes.
    pub(super) to: Scanned,
    /// The last sequence in the snapshot.
    pub(super) seq: u64,
    /// What it read.
    pub(super) rows: SlotDigests,
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct DigestScan {
    digests: SlotDigests,
    scanned: Scanned,
    ahead: VecDeque<Change>,
    ahead_bytes: usize,
    /// A page has to be at least so new.
    oldest: u64,
}

impl DigestScan {
    pub(super) fn new() -> Self {
        Self {
            digests: SlotDigests::new(),
            scanned: Scanned::UpTo(Vec::new()),
            ahead: VecDeque::new(),
            ahead_bytes: 0,
            oldest: 0,
        }
    }

    pub(super) fn scanned(&self) -> &Scanned {
        &self.scanned
    }

    /// What was counted, for a scan that is at its end.
    pub(super) fn digests(&self, range: SlotRange) -> Option<Vec<SlotDigest>> {
        (self.scanned == Scanned::All).then(|| self.digests.of(range))
    }

    /// A row changed.
    pub(super) fn change(&mut self, change: Change) {
        if contains(&self.scanned, &change.position) {
            apply(&mut self.digests, &change);
            return;
        }
        self.ahead_bytes += change.position.len();
        self.ahead.push_back(change);
        while self.ahead.len() > MAX_AHEAD || self.ahead_bytes > MAX_AHEAD_BYTES {
            let Some(forgotten) = self.ahead.pop_front() else { break };
            self.ahead_bytes -= forgotten.position.len();
            self.oldest = self.oldest.max(forgotten.seq);
        }
    }

    /// Adds the page that goes on where the last one ended; false if it is another one, or too old.
    pub(super) fn add(&mut self, page: DigestPage) -> bool {
        let Scanned::UpTo(behind) = &self.scanned else { return false };
        if *behind != page.behind || page.seq < self.oldest {
            return false;
        }
        let DigestPage { behind: _, to, seq, rows } = page;
        self.digests.merge(&rows);
        self.oldest = seq;
        for change in std::mem::take(&mut self.ahead) {
            if change.seq <= seq {
                // In this page, or in a later one, which is no older.
                self.ahead_bytes -= change.position.len();
            } else if contains(&to, &change.position) {
                self.ahead_bytes -= change.position.len();
                apply(&mut self.digests, &change);
            } else {
                self.ahead.push_back(change);
            }
        }
        self.scanned = to;
        true
    }
}

fn contains(scanned: &Scanned, position: &[u8]) -> bool {
    match scanned {
        // A position has a slot at least, so an empty one is less than all.
        Scanned::UpTo(last) => position <= last.as_slice(),
        Scanned::All => true,
    }
}

fn apply(digests: &mut SlotDigests, change: &Change) {
    // A position that was made here has a slot.
    if let Ok((slot, _)) = tables::split_position(&change.position) {
        digests.change(slot, change.old, change.new);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    type Rows = BTreeMap<Vec<u8>, u128>;

    #[derive(Debug, Clone)]
    enum Step {
        /// Writes (or deletes) a key.
        Write(u8, Option<u128>),
        /// Takes the snapshot of the next page of so many rows.
        Read(usize),
        /// Hands a page over that was read.
        HandOver,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            4 => (0_u8..40, prop::option::of(any::<u128>())).prop_map(|(key, hash)| Step::Write(key, hash)),
            2 => (1_usize..8).prop_map(Step::Read),
            2 => Just(Step::HandOver),
        ];
        prop::collection::vec(step, 0..200)
    }

    fn position(key: u8) -> Vec<u8> {
        tables::position(u16::from(key % 4), &[key])
    }

    fn count(rows: &Rows) -> SlotDigests {
        let mut digests = SlotDigests::new();
        for (position, &hash) in rows {
            digests.change(tables::split_position(position).unwrap().0, None, Some(hash));
        }
        digests
    }

    fn read(rows: &Rows, scan: &DigestScan, seq: u64, len: usize) -> Option<DigestPage> {
        let Scanned::UpTo(behind) = scan.scanned().clone() else { return None };
        let ahead: Rows =
            rows.iter().filter(|(at, _)| **at > behind).map(|(at, hash)| (at.clone(), *hash)).collect();
        let page: Rows = ahead.iter().take(len).map(|(at, hash)| (at.clone(), *hash)).collect();
        let to = match page.last_key_value() {
            Some((last, _)) if page.len() < ahead.len() => Scanned::UpTo(last.clone()),
            _ => Scanned::All,
        };
        Some(DigestPage { behind, to, seq, rows: count(&page) })
    }

    proptest! {
        #[test]
        fn equals_a_count_from_scratch_however_scan_and_writes_interleave(steps in steps()) {
            let (mut scan, mut rows, mut seq) = (DigestScan::new(), Rows::new(), 1);
            // Several may be under way; they are handed over in any order, by their order here.
            let mut pages: VecDeque<DigestPage> = VecDeque::new();
            for step in steps {
                match step {
                    Step::Write(key, new) => {
                        let at = position(key);
                        let old = match new {
                            Some(hash) => rows.insert(at.clone(), hash),
                            None => rows.remove(&at),
                        };
                        if old.is_some() || new.is_some() {
                            seq += 1;
                            scan.change(Change { lease: 1, seq, bytes: 0, position: at, old, new });
                        }
                    }
                    Step::Read(len) => pages.extend(read(&rows, &scan, seq, len)),
                    Step::HandOver => {
                        let page = if seq % 2 == 0 { pages.pop_front() } else { pages.pop_back() };
                        page.map(|page| scan.add(page));
                    }
                }
            }
            while let Some(page) = read(&rows, &scan, seq, 3) {
                prop_assert!(scan.add(page), "a fresh page that goes on is taken");
            }
            prop_assert_eq!(scan.digests(SlotRange::FULL), Some(count(&rows).of(SlotRange::FULL)));
            prop_assert!(scan.ahead.is_empty() && scan.ahead_bytes == 0);
        }
    }

    #[test]
    fn a_page_that_is_older_than_a_forgotten_change_is_refused() {
        let mut scan = DigestScan::new();
        let mut rows = Rows::from([(position(1), 7)]);
        let old = read(&rows, &scan, 1, 9).unwrap();
        for seq in 2..u64::try_from(MAX_AHEAD).unwrap() + 3 {
            let (before, new) = (rows[&position(1)], u128::from(seq));
            rows.insert(position(1), new);
            scan.change(Change {
                lease: 1,
                seq,
                bytes: 0,
                position: position(1),
                old: Some(before),
                new: Some(new),
            });
        }
        assert!(!scan.add(old));
        let seq = u64::try_from(MAX_AHEAD).unwrap() + 2;
        assert!(scan.add(read(&rows, &scan, seq, 9).unwrap()));
        assert_eq!(scan.digests(SlotRange::FULL), Some(count(&rows).of(SlotRange::FULL)));
    }
}
