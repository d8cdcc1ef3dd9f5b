//! The checksums of all that was read of the source.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::missing::Span;
use crate::books::Books;
use crate::extent::Extent;
use crate::spec::{FileTotal, Manifest};

/// Checksums of all that this sender has read of its source, across reconnections.
#[derive(Debug, Default)]
pub(super) struct Checksums {
    read: Mutex<Option<Read>>,
}

/// What was read of one manifest.
#[derive(Debug)]
struct Read {
    manifest: Manifest,
    books: Books,
    /// Sizes of files of unknown size, once their ends were read.
    ends: HashMap<u32, u64>,
}

impl Read {
    /// Where `file` ends, as far as that is known.
    fn end(&self, file: u32) -> Option<u64> {
        self.manifest.get(file)?.size.or_else(|| self.ends.get(&file).copied())
    }
}

impl Checksums {
    /// Nothing of `manifest` was read yet, or all of it has to be read anew.
    pub(super) fn start(&self, manifest: &Manifest) {
        let books = Books::new(manifest.clone());
        *self.read() = Some(Read { manifest: manifest.clone(), books, ends: HashMap::new() });
    }

    fn read(&self) -> MutexGuard<'_, Option<Read>> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes were read. Bytes of which a part is known already are left out here and read once more at the
    /// end; that happens only where an earlier attempt cut its chunks elsewhere.
    pub(super) fn add(&self, file: u32, offset: u64, len: u64, crc: u64) {
        if let Some(read) = self.read().as_mut() {
            let _ = read.books.insert(Extent { file, offset, len }, crc);
        }
    }

    /// The end of a file of unknown size was read.
    pub(super) fn end(&self, file: u32, size: u64) {
        if let Some(read) = self.read().as_mut() {
            read.ends.insert(file, size);
        }
    }

    /// What has to be read of the source although the receiver does not lack it: what is neither known nor `missing`, which is
    /// in order and disjoint.
    pub(super) fn unread(&self, mut missing: &[Span]) -> Vec<Span> {
        let read = self.read();
        let mut unread = Vec::new();
        let Some(read) = read.as_ref() else { return unread };
        for (number, _) in read.manifest.numbered() {
            let gaps = missing.iter().take_while(|gap| gap.file <= number).count();
            let (gaps, rest) = missing.split_at(gaps);
            missing = rest;
            // What is beyond the start of an open end is sent.
            let open = gaps.last().filter(|gap| gap.len.is_none()).map(|gap| gap.offset);
            let end = open.or(read.end(number));
            if let [all] = gaps
                && all.offset == 0
                && (open.is_some() || all.len == end)
            {
                continue;
            }
            let known = read.books.get(number);
            let mut runs = known.runs().map(|(offset, len, _)| (offset, offset + len)).peekable();
            let mut gaps = gaps.iter().map(|gap| (gap.offset, gap.end())).peekable();
            let mut at = 0;
            loop {
                // What is known and lost at the receiver overlaps, and is covered either way.
                let next = match (runs.peek(), gaps.peek()) {
                    (Some(run), Some(gap)) if gap < run => gaps.next(),
                    (Some(_), _) => runs.next(),
                    (None, _) => gaps.next(),
                };
                let until = match (next, end) {
                    (Some((start, _)), Some(end)) => Some(start.min(end)),
                    (Some((start, _)), None) => Some(start),
                    (None, end) => end,
                };
                match until {
                    Some(until) if until > at => {
                        unread.push(Span { file: number, offset: at, len: Some(until - at) });
                    }
                    // Its end is known to nobody.
                    None => unread.push(Span { file: number, offset: at, len: None }),
                    Some(_) => {}
                }
                let Some((_, covered)) = next else { break };
                at = at.max(covered);
            }
        }
        unread
    }

    /// Size and checksum of every file, or what has to be read first.
    pub(super) fn totals(&self) -> Result<Vec<FileTotal>, Vec<Span>> {
        let unread = self.unread(&[]);
        if !unread.is_empty() {
            return Err(unread);
        }
        let read = self.read();
        let Some(read) = read.as_ref() else { return Ok(Vec::new()) };
        let total = |(number, _)| {
            let known = read.books.get(number);
            let size = read.end(number).unwrap_or_else(|| known.end());
            FileTotal { size, crc: known.whole(size).unwrap_or(0) }
        };
        Ok(read.manifest.numbered().map(total).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::tests::manifest;

    #[test]
    fn what_is_neither_known_nor_missing_is_unread() {
        let checksums = Checksums::default();
        let span = |file, offset, len| Span { file, offset, len };
        checksums.start(&manifest(&[Some(3), None]));
        assert_eq!(checksums.unread(&[span(0, 0, Some(3)), span(1, 0, None)]), []);
        assert_eq!(
            checksums.unread(&[span(0, 0, Some(2)), span(1, 1, None)]),
            [span(0, 2, Some(1)), span(1, 0, Some(1))]
        );
        checksums.start(&manifest(&[Some(100), Some(0), None, None, Some(10)]));
        for (file, offset, len) in [(0, 20, 10), (0, 50, 50), (2, 0, 8)] {
            checksums.add(file, offset, len, 0);
        }
        let missing = [span(0, 10, Some(15)), span(0, 40, Some(1)), span(0, 60, Some(40)), span(2, 12, None)];
        let expected = [
            span(0, 0, Some(10)),
            span(0, 30, Some(10)),
            span(0, 41, Some(9)),
            span(2, 8, Some(4)),
            span(3, 0, None),
            span(4, 0, Some(10)),
        ];
        assert_eq!(checksums.unread(&missing), expected);
        checksums.end(2, 8);
        checksums.end(3, 0);
        let rest = [span(0, 0, Some(20)), span(0, 30, Some(20)), span(4, 0, Some(10))];
        assert_eq!(checksums.totals().unwrap_err(), rest);
        for span in rest {
            checksums.add(span.file, span.offset, span.len.unwrap(), 0);
        }
        let sizes: Vec<u64> = checksums.totals().unwrap().iter().map(|total| total.size).collect();
        assert_eq!(sizes, [100, 0, 8, 0, 10]);
    }
}
