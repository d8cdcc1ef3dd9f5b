//! Which bytes of each file of a snapshot are there, with their checksums.

use std::borrow::Cow;
use std::collections::HashMap;

use crate::extent::{Extent, FileExtents, Overlap};
use crate::spec::Manifest;

/// [`FileExtents`] of all files. One that is whole takes eight bytes and a bit: of 100,000 small files nearly all are either whole or not
/// there, and each end keeps several of these books.
#[derive(Debug, Clone)]
pub(crate) struct Books {
    manifest: Manifest,
    /// One bit for each file that is whole; only files of known size.
    whole: Vec<u64>,
    /// The checksum of each of them.
    crcs: Vec<u64>,
    /// Files of which a part is there, and those of unknown size.
    parts: HashMap<u32, FileExtents>,
}

impl Books {
    /// Nothing is there.
    pub(crate) fn new(manifest: Manifest) -> Self {
        let files = manifest.files().len();
        let whole = vec![0; files.div_ceil(64)];
        Self { whole, crcs: vec![0; files], parts: HashMap::new(), manifest }
    }

    /// Adds the bytes of `extent`, of which `crc` is the checksum. They are within the file.
    pub(crate) fn insert(&mut self, extent: Extent, crc: u64) -> Result<(), Overlap> {
        let Extent { file, offset, len } = extent;
        let Some(size) = self.manifest.get(file).and_then(|file| file.size) else {
            return self.parts.entry(file).or_default().insert(offset, len, crc);
        };
        if len == 0 {
            return Ok(());
        }
        if let Some(overlap) = self.whole(file).and_then(|runs| runs.overlap(offset, len)) {
            return Err(overlap);
        }
        let crc = if offset == 0 && len == size && !self.parts.contains_key(&file) {
            crc
        } else {
            let runs = self.parts.entry(file).or_default();
            runs.insert(offset, len, crc)?;
            let Some(crc) = runs.whole(size) else { return Ok(()) };
            self.parts.remove(&file);
            crc
        };
        let (word, bit, at) = place(file);
        if let (Some(word), Some(known)) = (self.whole.get_mut(word), self.crcs.get_mut(at)) {
            *word |= bit;
            *known = crc;
        }
        Ok(())
    }

    /// What is there of `file`.
    pub(crate) fn get(&self, file: u32) -> Cow<'_, FileExtents> {
        if let Some(whole) = self.whole(file) {
            return Cow::Owned(whole);
        }
        self.parts.get(&file).map_or_else(Cow::default, Cow::Borrowed)
    }

    fn whole(&self, file: u32) -> Option<FileExtents> {
        let (word, bit, at) = place(file);
        if self.whole.get(word)? & bit == 0 {
            return None;
        }
        let size = self.manifest.get(file)?.size?;
        Some(FileExtents::one(0, size, *self.crcs.get(at)?))
    }

    /// Runs of all files.
    #[cfg(any(feature = "server", test))]
    pub(crate) fn run_count(&self) -> usize {
        self.whole_count() + self.parts.values().map(FileExtents::run_count).sum::<usize>()
    }

    /// Files of known size, not empty ones, of which every byte is there.
    #[cfg(any(feature = "server", test))]
    pub(crate) fn whole_count(&self) -> usize {
        self.whole.iter().map(|word| usize::try_from(word.count_ones()).unwrap_or(0)).sum()
    }

    /// All runs, file by file.
    #[cfg(any(feature = "server", test))]
    pub(crate) fn all(&self) -> impl Iterator<Item = (Extent, u64)> + '_ {
        self.manifest.numbered().flat_map(|(file, _)| {
            let runs: Vec<_> = self.get(file).runs().collect();
            runs.into_iter().map(move |(offset, len, crc)| (Extent { file, offset, len }, crc))
        })
    }
}

/// Where the bit of a file is: the word, the bit in it; and where its checksum is.
fn place(file: u32) -> (usize, u64, usize) {
    let at = usize::try_from(file).unwrap_or(usize::MAX);
    (at / 64, 1 << (at % 64), at)
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, reason = "the numbers of test data are small")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::tests::manifest;

    proptest! {
        #[test]
        fn are_the_extents_of_each_file(
            steps in prop::collection::vec((0..70_u32, 0..12_u64, 0..12_u64, any::<u64>()), 0..200),
        ) {
            // Sizes from nothing to what no step can fill, and unknown ones.
            let sizes: Vec<_> = (0..70).map(|file| (file % 5 != 4).then_some(file % 5 * 3)).collect();
            let mut books = Books::new(manifest(&sizes));
            let mut model = vec![FileExtents::default(); sizes.len()];
            for (file, offset, len, crc) in steps {
                let at = file as usize;
                // Often the whole file.
                let (offset, len) = match sizes[at] {
                    Some(size) if crc % 3 == 0 => (0, size),
                    Some(size) => (offset.min(size), len.min(size - offset.min(size))),
                    None => (offset, len),
                };
                let extent = Extent { file, offset, len };
                prop_assert_eq!(books.insert(extent, crc), model[at].insert(offset, len, crc));
            }
            for (file, runs) in (0..).zip(&model) {
                let found = books.get(file);
                prop_assert_eq!(found.runs().collect::<Vec<_>>(), runs.runs().collect::<Vec<_>>());
                prop_assert_eq!(found.bytes(), runs.bytes());
            }
            let whole = |(size, runs): (&Option<u64>, &FileExtents)| {
                size.is_some_and(|size| size > 0 && runs.bytes() == size)
            };
            prop_assert_eq!(books.whole_count(), sizes.iter().zip(&model).filter(|pair| whole(*pair)).count());
            prop_assert_eq!(books.run_count(), model.iter().map(FileExtents::run_count).sum::<usize>());
            prop_assert_eq!(books.all().count(), books.run_count());
            // What is whole is kept in the small form alone.
            prop_assert!(books.parts.iter().all(|(file, runs)| sizes[*file as usize] != Some(runs.bytes())
                || runs.bytes() == 0));
        }
    }
}
