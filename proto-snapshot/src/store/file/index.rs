//! What is installed, by content: where to find bytes that do not have to be sent.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher as _, RandomState};
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use proto_common::ids::{NodeId, ShardId, TransferId};
use proto_common::path::FileName;

use crate::spec::{FileTotal, Manifest, TransferPlan};

use super::lock;
use super::write::needed;

type Key = (ShardId, TransferId);

/// What a file is found by: its digest, its size, the number of its snapshot, and its own in the manifest. By its size as well, since anybody may claim any digest: who
/// looks for one would open all that claim it, again and again.
type Entry = ([u8; 32], u64, u64, u32);

/// What one is found by whose digest is not known: a hash of its name instead. There may be very many of them, so their names are in the manifest alone.
type Unknown = (u64, u64, u32);

/// Memory that the index takes for one file beside its name, by estimate: its line of the manifest, its place by digest once that is known, and the digest that
/// was found where it is another one than the manifest has.
const FILE_BYTES: u64 = 320;

/// Memory that it takes for one snapshot beside its files, by estimate.
const SNAPSHOT_BYTES: u64 = 768;

/// An installed file.
#[derive(Debug, Clone)]
pub(super) struct Installed {
    snapshot: Arc<Snapshot>,
    /// Its number in the manifest.
    file: u32,
    /// Bytes of it.
    size: u64,
}

#[derive(Debug)]
struct Snapshot {
    /// Rises from snapshot to snapshot.
    number: u64,
    dir: PathBuf,
    manifest: Manifest,
}

#[derive(Debug)]
pub(super) struct Index {
    /// Memory that the files take at most, by estimate, in bytes.
    limit: u64,
    maps: Mutex<Maps>,
}

/// Whoever leaves is found by what it has itself: nothing here looks at the snapshots or files of others for that, of which there may be very many.
#[derive(Debug, Default)]
struct Maps {
    snapshots: HashMap<Key, Counted>,
    /// Those whose files can be found, by number.
    found: HashMap<u64, Found>,
    by_digest: BTreeSet<Entry>,
    /// The files whose digest nobody has asked for yet.
    unknown: BTreeSet<Unknown>,
    names: RandomState,
    /// Nodes from which something can be found.
    sources: HashMap<NodeId, OfSource>,
    /// The same by the memory that it takes.
    by_memory: BTreeSet<(u64, NodeId)>,
    /// Of all snapshots whose files can be found.
    memory: u64,
    /// Snapshots that were added so far.
    added: u64,
    /// Entries and snapshots that were looked at to leave some out, or to find a file by its name.
    #[cfg(test)]
    touched: u64,
}

/// One installed snapshot.
#[derive(Debug)]
struct Counted {
    /// What it takes of the disk.
    bytes: u64,
    /// `None` where its files could not be found from the start.
    number: Option<u64>,
}

/// What it takes that the files of a snapshot can be found.
#[derive(Debug)]
struct Found {
    source: NodeId,
    memory: u64,
    snapshot: Arc<Snapshot>,
    /// Digests that were found out here, by file: beside those of the manifest, the only ones that lead to its files.
    learned: BTreeMap<u32, [u8; 32]>,
    /// Sizes of the files whose size the manifest does not know.
    sizes: HashMap<u32, u64>,
}

/// What can be found of one node.
#[derive(Debug, Default)]
struct OfSource {
    memory: u64,
    /// Its snapshots, the oldest first.
    numbers: BTreeSet<u64>,
}

impl Installed {
    pub(super) fn path(&self) -> PathBuf {
        let name = self.snapshot.manifest.get(self.file).map_or("", |file| file.name.as_str());
        self.snapshot.dir.join(name)
    }
}

impl Maps {
    /// Makes `found` a part of what can be found.
    fn put(&mut self, found: Found) {
        let (source, number) = (found.source.clone(), found.snapshot.number);
        self.memory = self.memory.saturating_add(found.memory);
        self.count(&source, |of| {
            of.memory = of.memory.saturating_add(found.memory);
            of.numbers.insert(number);
        });
        self.found.insert(number, found);
    }

    /// Changes what is counted of `source`.
    fn count(&mut self, source: &NodeId, change: impl FnOnce(&mut OfSource)) {
        let of = self.sources.entry(source.clone()).or_default();
        self.by_memory.remove(&(of.memory, source.clone()));
        change(of);
        if of.numbers.is_empty() {
            self.sources.remove(source);
        } else {
            self.by_memory.insert((of.memory, source.clone()));
        }
    }

    /// Leaves out the snapshots of whoever has most here, the oldest first, until the rest fits: what one node has installed
    /// does not drive out that of others.
    fn fit(&mut self, limit: u64) {
        while self.memory > limit {
            let most = self.by_memory.last().and_then(|(_, source)| self.sources.get(source));
            let Some(oldest) = most.and_then(|of| of.numbers.first().copied()) else { return };
            self.leave_out(oldest);
        }
    }

    /// Its files can be found no more.
    fn leave_out(&mut self, number: u64) {
        let Some(Found { source, memory, snapshot, learned, sizes }) = self.found.remove(&number) else {
            return;
        };
        self.memory = self.memory.saturating_sub(memory);
        self.count(&source, |of| {
            of.memory = of.memory.saturating_sub(memory);
            of.numbers.remove(&number);
        });
        for (file, line) in snapshot.manifest.numbered() {
            let size = line.size.or_else(|| sizes.get(&file).copied()).unwrap_or_default();
            if let Some(digest) = learned.get(&file) {
                self.by_digest.remove(&(*digest, size, number, file));
            }
            match line.blake3.as_deref() {
                Some(digest) => self.by_digest.remove(&(*digest, size, number, file)),
                None => self.unknown.remove(&(self.names.hash_one(&line.name), number, file)),
            };
            #[cfg(test)]
            {
                self.touched += 1;
            }
        }
        #[cfg(test)]
        {
            self.touched += 1;
        }
    }

    /// `file` has this digest, whatever was found out of it before.
    fn learn(&mut self, file: &Installed, digest: [u8; 32]) {
        let Installed { snapshot, file, size } = file;
        let (number, file, size) = (snapshot.number, *file, *size);
        let Some(found) = self.found.get_mut(&number) else { return };
        if let Some(before) = found.learned.insert(file, digest) {
            self.by_digest.remove(&(before, size, number, file));
        }
        self.by_digest.insert((digest, size, number, file));
    }
}

impl Index {
    /// One whose files take at most `limit` bytes of memory, by estimate.
    pub(super) fn new(limit: u64) -> Self {
        Self { limit, maps: Mutex::default() }
    }

    /// Adds the snapshot in `dir`; with `files`, they can be found, as far as there is room for that. `None` if it is there already, else
    /// what it takes of the disk, in bytes.
    pub(super) fn add(
        &self,
        plan: &TransferPlan,
        totals: &[FileTotal],
        dir: PathBuf,
        files: bool,
    ) -> Option<u64> {
        let key = (plan.spec.target_shard.clone(), plan.spec.transfer_id.clone());
        let mut maps = lock(&self.maps);
        if maps.snapshots.contains_key(&key) {
            return None;
        }
        let dirs = plan.manifest.directories().count;
        let bytes = needed(totals.iter().map(|total| total.size), dirs).bytes;
        let memory = plan.manifest.file_count().saturating_mul(FILE_BYTES);
        let memory = memory.saturating_add(plan.manifest.name_bytes()).saturating_add(SNAPSHOT_BYTES);
        let mut number = None;
        if files && memory <= self.limit {
            maps.added += 1;
            number = Some(maps.added);
            let snapshot = Snapshot { number: maps.added, dir, manifest: plan.manifest.clone() };
            let snapshot = Arc::new(snapshot);
            let mut sizes = HashMap::new();
            for ((file, line), total) in plan.manifest.numbered().zip(totals) {
                if total.size == 0 {
                    continue;
                }
                if line.size.is_none() {
                    sizes.insert(file, total.size);
                }
                match line.blake3.as_deref() {
                    Some(digest) => {
                        maps.by_digest.insert((*digest, total.size, snapshot.number, file));
                    }
                    None => {
                        let name = maps.names.hash_one(&line.name);
                        maps.unknown.insert((name, snapshot.number, file));
                    }
                }
            }
            let (source, learned) = (plan.spec.source_node.clone(), BTreeMap::new());
            maps.put(Found { source, memory, snapshot, learned, sizes });
        }
        maps.snapshots.insert(key, Counted { bytes, number });
        maps.fit(self.limit);
        Some(bytes)
    }

    /// Forgets a snapshot; returns what it takes of the disk if it was there.
    pub(super) fn remove(&self, shard: &ShardId, id: &TransferId) -> Option<u64> {
        let key = (shard.clone(), id.clone());
        let mut maps = lock(&self.maps);
        let Counted { bytes, number } = maps.snapshots.remove(&key)?;
        if let Some(number) = number {
            maps.leave_out(number);
        }
        Some(bytes)
    }

    /// A file of this size whose content had this digest when it was installed: the next one after `last`. One at a time, since very many may have it.
    pub(super) fn with_digest(
        &self,
        digest: &[u8; 32],
        size: u64,
        last: Option<&Installed>,
    ) -> Option<Installed> {
        let maps = lock(&self.maps);
        let from = match last {
            None => Bound::Included((*digest, size, 0, 0)),
            Some(last) => Bound::Excluded((*digest, size, last.snapshot.number, last.file)),
        };
        let to = Bound::Included((*digest, size, u64::MAX, u32::MAX));
        let (_, _, number, file) = maps.by_digest.range((from, to)).next()?;
        let found = maps.found.get(number)?;
        Some(Installed { snapshot: Arc::clone(&found.snapshot), file: *file, size })
    }

    /// Takes out a file of this name and size whose digest is not known: who asks computes it and says it with [`learn`](Self::learn). One at a time, since very
    /// many may have a name.
    pub(super) fn take_unknown(&self, name: &FileName, size: u64) -> Option<Installed> {
        let mut maps = lock(&self.maps);
        let hash = maps.names.hash_one(name);
        let of_name = maps.unknown.range((hash, 0, 0)..=(hash, u64::MAX, u32::MAX));
        #[cfg(test)]
        let mut touched = 0;
        let mut found = of_name.filter_map(|&(_, number, file)| {
            #[cfg(test)]
            {
                touched += 1;
            }
            let Found { snapshot, sizes, .. } = maps.found.get(&number)?;
            let line = snapshot.manifest.get(file)?;
            let known = line.size.or_else(|| sizes.get(&file).copied());
            let is_it = line.name == *name && known == Some(size);
            is_it.then(|| Installed { snapshot: Arc::clone(snapshot), file, size })
        });
        let found = found.next();
        #[cfg(test)]
        {
            maps.touched += touched;
        }
        if let Some(found) = &found {
            maps.unknown.remove(&(hash, found.snapshot.number, found.file));
        }
        found
    }

    /// Nobody has read what was [taken out](Self::take_unknown).
    pub(super) fn put_back(&self, file: &Installed) {
        let mut maps = lock(&self.maps);
        let number = file.snapshot.number;
        if maps.found.contains_key(&number)
            && let Some(line) = file.snapshot.manifest.get(file.file)
        {
            let hash = maps.names.hash_one(&line.name);
            maps.unknown.insert((hash, number, file.file));
        }
    }

    /// `file` has this digest.
    pub(super) fn learn(&self, file: &Installed, digest: [u8; 32]) {
        lock(&self.maps).learn(file, digest);
    }

    /// `file` does not have the digest `claimed`, whatever its sender said or somebody has made of it since: nobody has to read it
    /// for that again. `found` is what it has, if it could be read.
    pub(super) fn correct(&self, file: &Installed, claimed: &[u8; 32], found: Option<[u8; 32]>) {
        let mut maps = lock(&self.maps);
        maps.by_digest.remove(&(*claimed, file.size, file.snapshot.number, file.file));
        if let Some(digest) = found {
            maps.learn(file, digest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::support::spec;
    use super::*;
    use crate::spec::ManifestFile;

    fn plan(
        id: &str,
        source: &str,
        digests: impl Iterator<Item = Option<u64>>,
    ) -> (TransferPlan, Vec<FileTotal>) {
        let digest = |digest: u64| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&digest.to_be_bytes());
            Box::new(bytes)
        };
        let files = digests.enumerate().map(|(number, known)| ManifestFile {
            name: FileName::new(&number.to_string()).unwrap(),
            size: Some(1),
            blake3: known.map(digest),
        });
        let manifest = Manifest::new(files.collect()).unwrap();
        let totals = vec![FileTotal { size: 1, crc: 0 }; manifest.files().len()];
        let mut spec = spec(id, 1);
        spec.source_node = NodeId::new(source).unwrap();
        (TransferPlan { spec, manifest }, totals)
    }

    fn add(index: &Index, (plan, totals): &(TransferPlan, Vec<FileTotal>)) {
        index.add(plan, totals, PathBuf::new(), true).unwrap();
    }

    fn touched(index: &Index) -> u64 {
        std::mem::take(&mut lock(&index.maps).touched)
    }

    /// Everything that leads to the files of snapshots belongs to one that can be found, and the sums are right.
    fn check(index: &Index) {
        let maps = lock(&index.maps);
        assert!(maps.by_digest.iter().all(|(_, _, number, _)| maps.found.contains_key(number)));
        assert!(maps.unknown.iter().all(|(_, number, _)| maps.found.contains_key(number)));
        assert_eq!(maps.memory, maps.found.values().map(|found| found.memory).sum::<u64>());
        assert_eq!(maps.memory, maps.sources.values().map(|of| of.memory).sum::<u64>());
        let by_memory = maps.sources.iter().map(|(source, of)| (of.memory, source.clone()));
        assert_eq!(maps.by_memory, by_memory.collect::<BTreeSet<_>>());
        let numbers: BTreeSet<u64> =
            maps.sources.values().flat_map(|of| of.numbers.iter().copied()).collect();
        assert_eq!(numbers, maps.found.keys().copied().collect::<BTreeSet<_>>());
    }

    /// Of 200,000 files, half of which have one content, as those of the snapshots that leave have.
    #[test]
    fn who_leaves_costs_what_it_has_itself() {
        let index = Index::new(u64::MAX);
        let half = 100_000;
        add(
            &index,
            &plan("large", "n1", (0..2 * half).map(|number| Some(if number < half { 0 } else { number }))),
        );
        let small: Vec<_> =
            (0..1000).map(|n| plan(&format!("small-{n}"), "n2", [Some(0)].into_iter())).collect();
        small.iter().for_each(|small| add(&index, small));
        check(&index);
        assert_eq!(touched(&index), 0, "there is room");
        for (small, _) in &small {
            assert_eq!(index.remove(&small.spec.target_shard, &small.spec.transfer_id), Some(4096));
        }
        assert_eq!(touched(&index), 2000, "one snapshot and one file each");
        check(&index);
        assert_eq!(lock(&index.maps).by_digest.len() as u64, 2 * half);
    }

    /// One snapshot of many files drives out thousands of small ones at once.
    #[test]
    fn who_is_driven_out_costs_what_it_has_itself() {
        const FILES: u64 = 200_000;
        const SMALL: u64 = 3000;
        let large = plan("large", "n1", (0..FILES).map(Some));
        let each = FILE_BYTES + 1 + SNAPSHOT_BYTES;
        let room = FILES * FILE_BYTES + large.0.manifest.name_bytes() + SNAPSHOT_BYTES;
        // Beside it, there is room for the one that another node has, and one more.
        let index = Index::new(room + 2 * each);
        let small = |n: u64, source: &str| plan(&format!("small-{n}"), source, [Some(n)].into_iter());
        add(&index, &small(0, "n2"));
        (1..=SMALL).for_each(|n| add(&index, &small(n, "n1")));
        assert_eq!(touched(&index), 0, "there is room");
        add(&index, &large);
        assert_eq!(touched(&index), 2 * (SMALL - 1), "one snapshot and one file each, but for the latest");
        check(&index);
        let kept: Vec<u64> = lock(&index.maps).sources.values().map(|of| of.numbers.len() as u64).collect();
        assert_eq!((kept.iter().sum::<u64>(), kept.iter().min()), (3, Some(&1)));
        // The large one leaves in one piece: it is the next of who has most.
        add(&index, &small(SMALL + 1, "n1"));
        assert_eq!(touched(&index), 2, "the latest of the small ones before that");
        add(&index, &small(SMALL + 2, "n2"));
        assert_eq!(touched(&index), FILES + 1);
        check(&index);
    }

    #[test]
    fn who_looks_for_a_name_looks_at_files_of_that_name() {
        const OTHERS: u64 = 5000;
        let index = Index::new(u64::MAX);
        for number in 0..OTHERS {
            add(&index, &plan(&format!("other-{number}"), "n1", (0..2).map(|_| None)));
        }
        let (mut wanted, mut totals) = plan("wanted", "n2", (0..3).map(|_| None));
        add(&index, &(wanted.clone(), totals.clone()));
        let third = wanted.manifest.files()[2].name.clone();
        let found = index.take_unknown(&third, 1).unwrap();
        assert_eq!((found.snapshot.number, found.file), (OTHERS + 1, 2));
        assert!(index.take_unknown(&third, 1).is_none());
        assert_eq!(touched(&index), 1, "of 10,003 files whose digest is not known");
        // Where a manifest knows no size, that of what came counts.
        let files = vec![ManifestFile { name: third.clone(), size: None, blake3: None }];
        wanted.manifest = Manifest::new(files).unwrap();
        wanted.spec.transfer_id = TransferId::new("stream").unwrap();
        totals = vec![FileTotal { size: 7, crc: 0 }];
        add(&index, &(wanted, totals));
        assert!(index.take_unknown(&third, 1).is_none());
        assert_eq!(index.take_unknown(&third, 7).unwrap().snapshot.number, OTHERS + 2);
        check(&index);
    }

    /// What was found out of a file leaves with it, and a file has one digest that was found at a time.
    #[test]
    fn digests_that_were_found_leave_with_the_file() {
        let index = Index::new(u64::MAX);
        let digest = |first: u8| [first; 32];
        let (plan, totals) = plan("a", "n1", [None, Some(7)].into_iter());
        index.add(&plan, &totals, PathBuf::new(), true).unwrap();
        let name = &plan.manifest.files()[0].name;
        assert!(index.take_unknown(name, 2).is_none(), "of another size");
        let file = index.take_unknown(name, 1).unwrap();
        assert!(index.take_unknown(name, 1).is_none(), "somebody reads it");
        index.learn(&file, digest(1));
        let claimed = *plan.manifest.files()[1].blake3.as_deref().unwrap();
        assert!(index.with_digest(&claimed, 2, None).is_none(), "of another size");
        let other = index.with_digest(&claimed, 1, None).unwrap();
        index.correct(&other, &claimed, Some(digest(2)));
        // It was changed meanwhile, and two have read it.
        index.correct(&other, &claimed, Some(digest(3)));
        let with = |digest: [u8; 32], last| index.with_digest(&digest, 1, last);
        assert!(with(claimed, None).is_none() && with(digest(2), None).is_none());
        let found = with(digest(3), None).unwrap();
        assert_eq!(found.file, 1);
        assert!(with(digest(3), Some(&found)).is_none());
        index.remove(&plan.spec.target_shard, &plan.spec.transfer_id).unwrap();
        check(&index);
        // Somebody was about to read it.
        index.learn(&file, digest(4));
        assert!(lock(&index.maps).by_digest.is_empty());
    }
}
