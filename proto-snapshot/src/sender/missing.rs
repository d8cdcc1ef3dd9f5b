//! What the receiver lacks, believed only as far as the manifest allows.

use proto_common::error::Error;

use crate::reason::Reason;
use crate::spec::Manifest;
use crate::v1::transfer_split_snapshot_response::Extent as WireExtent;

/// Extents that a receiver may name beyond one for each file. What earlier attempts left has a gap for each lane and for each
/// damaged run; this many cost 24 MiB.
const MAX_GAPS: usize = 1 << 20;

/// Bytes of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) file: u32,
    pub(super) offset: u64,
    /// `None`: to the end of a file of unknown size.
    pub(super) len: Option<u64>,
}

impl Span {
    /// One past the last byte.
    pub(super) fn end(&self) -> u64 {
        self.len.map_or(u64::MAX, |len| self.offset.saturating_add(len))
    }
}

/// The pages of `Accepted.missing`.
#[derive(Debug)]
pub(super) struct Missing<'a> {
    manifest: &'a Manifest,
    spans: Vec<Span>,
    limit: usize,
}

impl<'a> Missing<'a> {
    pub(super) fn new(manifest: &'a Manifest) -> Self {
        Self { manifest, spans: Vec::new(), limit: manifest.files().len().saturating_add(MAX_GAPS) }
    }

    /// Adds a page; `INVALID_FIELD` where it is not what the protocol promises.
    pub(super) fn add(&mut self, extents: &[WireExtent], last: bool) -> Result<(), Error> {
        if extents.is_empty() && !last {
            return Err(invalid("a page that is not the last is empty".to_owned()));
        }
        if self.spans.len().saturating_add(extents.len()) > self.limit {
            return Err(invalid(format!(
                "more than {} extents are listed, which no earlier attempt can have left",
                self.limit
            )));
        }
        for extent in extents {
            let span = Span { file: extent.file, offset: extent.offset, len: extent.length };
            let added = self.check(span).and_then(|()| {
                self.spans.push(span);
                if extent.more_files == 0 { Ok(()) } else { self.add_files(span, extent.more_files) }
            });
            added.map_err(|why| {
                let WireExtent { file, offset, length, more_files } = extent;
                invalid(format!(
                    "extent {} ({length:?} bytes at {offset} of file {file}, and {more_files} more files) {why}",
                    self.spans.len()
                ))
            })?;
        }
        Ok(())
    }

    /// Adds all of `more` files that follow that of `first`, which has to be all of its own.
    fn add_files(&mut self, first: Span, more: u32) -> Result<(), &'static str> {
        let whole = |file| self.manifest.get(file).is_some_and(|known| known.size == first.len);
        if first.offset != 0 || first.len.is_none() || !whole(first.file) {
            return Err("is not all of its file, and has more files");
        }
        let last = first.file.checked_add(more).ok_or("has more files than the manifest")?;
        // Before anything is added for them.
        self.manifest.get(last).ok_or("has more files than the manifest")?;
        for file in first.file + 1..=last {
            let size = self.manifest.get(file).and_then(|file| file.size);
            let len = size.ok_or("has more files, of which one has no known size")?;
            if len > 0 {
                self.spans.push(Span { file, offset: 0, len: Some(len) });
            }
        }
        Ok(())
    }

    /// All of it: in order, disjoint, within the manifest.
    pub(super) fn into_spans(self) -> Vec<Span> {
        self.spans
    }

    fn check(&self, span: Span) -> Result<(), &'static str> {
        let file = self.manifest.get(span.file).ok_or("names a file that is not in the manifest")?;
        if span.len == Some(0) {
            return Err("is empty");
        }
        if span.len.is_none() && file.size.is_some() {
            return Err("has no length although the file has a size");
        }
        let end = span.offset.checked_add(span.len.unwrap_or(0)).ok_or("is beyond any file")?;
        if end > file.size.unwrap_or(i64::MAX.unsigned_abs()) {
            return Err("reaches beyond the file");
        }
        match self.spans.last() {
            Some(before) if before.file > span.file => Err("is out of order"),
            Some(before) if before.file == span.file && before.offset > span.offset => Err("is out of order"),
            Some(before) if before.file == span.file && before.end() > span.offset => {
                Err("overlaps the one before it")
            }
            _ => Ok(()),
        }
    }
}

fn invalid(what: String) -> Error {
    Reason::InvalidField.field("accepted.missing", what)
}

/// What of `taken` is still `missing`. `missing` is in order and disjoint; `taken` is disjoint and brought into order.
pub(super) fn intersect(taken: &mut [Span], missing: &[Span]) -> Vec<Span> {
    taken.sort_unstable_by_key(|span| (span.file, span.offset));
    let mut both = Vec::new();
    let mut first = 0;
    for span in taken {
        while missing
            .get(first)
            .is_some_and(|gap| gap.file < span.file || (gap.file == span.file && gap.end() <= span.offset))
        {
            first += 1;
        }
        let mut at = first;
        while let Some(gap) = missing.get(at)
            && gap.file == span.file
            && gap.offset < span.end()
        {
            let (start, end) = (span.offset.max(gap.offset), span.end().min(gap.end()));
            let len = (end != u64::MAX).then(|| end - start);
            both.push(Span { file: span.file, offset: start, len });
            at += 1;
        }
        // The last one may reach into the next span.
        first = first.max(at.saturating_sub(1));
    }
    both
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn span(file: u32, offset: u64, len: u64) -> Span {
        Span { file, offset, len: Some(len) }
    }

    #[test]
    fn an_open_end_is_cut_by_a_closed_one_and_stays_open_otherwise() {
        let open = |offset| Span { file: 1, offset, len: None };
        assert_eq!(
            intersect(&mut [open(5)], &[span(0, 0, 9), span(1, 3, 4), open(9)]),
            [span(1, 5, 2), open(9)]
        );
        assert_eq!(intersect(&mut [span(1, 8, 4)], &[open(10)]), [span(1, 10, 2)]);
        assert_eq!(intersect(&mut [span(1, 8, 4)], &[]), []);
    }

    fn wire(file: u32, length: impl Into<Option<u64>>, more_files: u32) -> WireExtent {
        WireExtent { file, offset: 0, length: length.into(), more_files }
    }

    #[test]
    fn a_run_of_files_is_all_of_each_that_has_bytes() {
        let manifest = crate::spec::tests::manifest(&[Some(3), Some(0), Some(5), Some(7), None]);
        let added = |pages: &[&[WireExtent]]| {
            let mut missing = Missing::new(&manifest);
            pages.iter().try_for_each(|page| missing.add(page, false)).map(|()| missing.into_spans())
        };
        let all = [span(0, 0, 3), span(2, 0, 5), span(3, 0, 7)];
        assert_eq!(added(&[&[wire(0, 3, 3)]]).unwrap(), all);
        assert_eq!(added(&[&[wire(0, 3, 1)], &[wire(2, 5, 0), wire(3, 7, 0)]]).unwrap(), all);
        for (name, page) in [
            ("a part", vec![wire(2, 4, 1)]),
            ("not from the start", vec![WireExtent { offset: 1, ..wire(2, 4, 1) }]),
            ("of unknown size", vec![wire(0, 3, 4)]),
            ("begins with unknown size", vec![wire(4, None, 1)]),
            ("beyond the manifest", vec![wire(3, 7, 2)]),
            ("beyond all numbers", vec![wire(3, 7, u32::MAX)]),
            ("again", vec![wire(0, 3, 2), wire(2, 5, 0)]),
        ] {
            let error = added(&[&page]).unwrap_err();
            assert_eq!(error.violations()[0].field, "accepted.missing", "{name}");
        }
    }

    /// Disjoint spans in order, from the bytes that are set.
    fn spans(bytes: &[bool]) -> Vec<Span> {
        let mut spans: Vec<Span> = Vec::new();
        for (at, _) in bytes.iter().enumerate().filter(|(_, set)| **set) {
            let (file, offset) = (u32::try_from(at / 16).unwrap(), (at % 16) as u64);
            match spans.last_mut() {
                // Neighbours are not always merged.
                Some(last) if last.file == file && last.end() == offset && offset % 5 != 0 => {
                    last.len = last.len.map(|len| len + 1);
                }
                _ => spans.push(span(file, offset, 1)),
            }
        }
        spans
    }

    fn bytes(spans: &[Span]) -> Vec<bool> {
        let mut bytes = vec![false; 64];
        for span in spans {
            for offset in span.offset..span.end() {
                let at = usize::try_from(u64::from(span.file) * 16 + offset).unwrap();
                assert!(!std::mem::replace(&mut bytes[at], true), "{span:?} overlaps");
            }
        }
        bytes
    }

    proptest! {
        #[test]
        fn both_is_what_is_in_both(
            taken in prop::collection::vec(any::<bool>(), 64),
            missing in prop::collection::vec(any::<bool>(), 64),
        ) {
            let mut shuffled = spans(&taken);
            shuffled.reverse();
            let both = intersect(&mut shuffled, &spans(&missing));
            let expected: Vec<bool> = taken.iter().zip(&missing).map(|(a, b)| *a && *b).collect();
            prop_assert_eq!(bytes(&both), expected);
        }
    }
}
