//! Damaged files of a snapshot store: none keeps it from opening, each is named, no byte is believed that was not written, and the rest goes on.
//!
//! The model reads the same files by its own means, and knows of each what "What damage leads to" in `proto-snapshot/README.md` says.

use std::path::Path;
use std::sync::LazyLock;

use arbitrary::Unstructured;
use bytes::Bytes;
use proto_common::checksum::{combine, crc64};
use proto_common::fence::Fence;
use proto_common::ids::{NodeId, ShardId};
use proto_snapshot::extent::{Extent, ExtentRecord};
use proto_snapshot::spec::{FileTotal, Manifest, TransferPlan, TransferSpec};
use proto_snapshot::store::{
    Claim, FileSnapshotStore, FileStaging, Recovered, SnapshotStore as _, StagedChunk, Staging as _,
    StagingState, StoreError,
};
use proto_snapshot::v1::transfer_split_snapshot_request::Frame;

use crate::damage::{self, Files};
use crate::harness::{block_on, directory, polite};
use crate::sender::{Client, Snapshot, Stream, client, open, receiver};

const FORMAT: &[u8] = b"node snapshot store ";
/// The record of the shard that has one, and the manifest beside it.
const CURRENT: &str = "shards/s2/CURRENT";
const MANIFEST: &str = "shards/s2/done.manifest";
/// The term of that shard's fence.
const TERM: u64 = 5;
/// File, offset, length and checksum of an extent that is on record.
const EXTENT_LEN: usize = 28;

fn snapshot(id: &'static str, shard: &'static str, index: u64) -> Snapshot {
    let content = |seed: usize, len: usize| {
        (0..len).map(|at| u8::try_from((at * 31 + seed + at / 13) % 251).unwrap()).collect()
    };
    let seed = id.len() * 13 + usize::from(id.as_bytes()[0]);
    let files = vec![("a".to_owned(), content(seed, 200)), ("d/b".to_owned(), content(seed + 1, 100))];
    Snapshot { id, shard, index, files }
}

/// What is current.
fn done() -> Snapshot {
    snapshot("done", "s2", 1)
}

/// Two that are under way, and one that had only to be put in place.
fn staged() -> [Snapshot; 3] {
    [snapshot("open", "s2", 2), snapshot("other", "s3", 2), snapshot("sealed", "s4", 2)]
}

fn fence(term: u64) -> Fence {
    Fence { epoch: 1, term }
}

/// Who wrote into every one of them.
const CLAIM: Claim = Claim { attempt: 1, session: [1; 16] };

static WHOLE: LazyLock<Files> = LazyLock::new(|| {
    let dir = directory();
    block_on(async {
        let store = open(dir.path()).unwrap();
        let (shard, node) = (ShardId::new("s2").unwrap(), NodeId::new("n1").unwrap());
        store.raise_fence(&shard, fence(TERM), &node).await.unwrap();
        let node = receiver(store).await;
        let client = client(&node);
        done().send(&client).await.unwrap();
        for snapshot in &staged()[..2] {
            let mut stream = Stream::open(&client, snapshot.header(1, 1)).await;
            stream.say(Frame::Manifest(snapshot.manifest())).await;
            stream.accepted().await.unwrap();
            // Two records, so that a log can be cut between them.
            stream.say(Frame::Chunk(snapshot.chunk(0, 10, 64))).await;
            stream.durable(64).await;
            stream.say(Frame::Chunk(snapshot.chunk(1, 0, 50))).await;
            stream.durable(114).await;
            stream.half_close();
            stream.installed().await.unwrap_err();
        }
        drop(client);
        node.shutdown().await;
        drop(node);
        seal(&open(dir.path()).unwrap(), &staged()[2]).await;
    });
    let whole = crate::tree::tree(dir.path());
    for snapshot in &staged()[..2] {
        assert_eq!(damage::records(&whole[&format!("staging/{}/records", snapshot.id)]).0.len(), 2);
    }
    whole
});

/// What a process leaves that ends between `End` and the step after it.
async fn seal(store: &FileSnapshotStore, snapshot: &Snapshot) {
    let files = snapshot.manifest().files.into_iter().map(|file| file.try_into().unwrap());
    let plan = TransferPlan {
        spec: TransferSpec::from_header(&snapshot.header(1, 1)).unwrap(),
        manifest: Manifest::new(files.collect()).unwrap(),
    };
    let staging = store.stage(&plan).await.unwrap();
    staging.set_claim(CLAIM).await.unwrap();
    let (mut records, mut totals) = (Vec::new(), Vec::new());
    for (file, (_, content)) in (0..).zip(&snapshot.files) {
        let (size, crc) = (content.len() as u64, crc64(content));
        let payload = Bytes::copy_from_slice(content).into();
        staging.write(vec![StagedChunk { file, offset: 0, payload }]).await.unwrap();
        records.push(ExtentRecord { extent: Extent { file, offset: 0, len: size }, crc });
        totals.push(FileTotal { size, crc });
    }
    staging.sync(records).await.unwrap();
    staging.seal(&totals).await.unwrap();
}

/// Damages the store's own files as `data` says, opens it, and goes on with every transfer.
pub fn run(data: &[u8]) {
    let mut files = WHOLE.clone();
    let mut data = Unstructured::new(data);
    // What was installed is its owner's. What was sealed was read back before.
    let ours = |name: &str| {
        !name.starts_with("staging/sealed/tree/") && !name.starts_with("installed/") && name != "LOCK"
    };
    // Where the input ends, the damage does.
    let _ = damage::apply(&mut data, &mut files, ours);
    let _ = remove(&mut data, &mut files, |name| ours(name) && !name.contains("/tree/"));
    let dir = directory();
    damage::write(dir.path(), &files);
    let model = Model { files };
    block_on(async {
        let store = match open(dir.path()) {
            Ok(store) => store,
            Err(StoreError::Damaged { file, .. }) => {
                assert_eq!(file, "FORMAT", "only a store of an unknown layout does not open");
                assert!(model.names_another_version());
                return;
            }
            Err(error) => panic!("{error:?}"),
        };
        assert!(!model.names_another_version(), "a store of another version was opened");
        let recovered = store.recover().await.expect("damage is no error");
        model.judge(&recovered, dir.path());
        drop((recovered, store));

        let store = open(dir.path()).unwrap();
        let node = receiver(store).await;
        let client = client(&node);
        // The rest of the node serves.
        let fresh = snapshot("fresh", "s9", 1);
        fresh.send(&client).await.unwrap();
        assert!(fresh.is_installed_in(dir.path()));
        model.shard(&client, dir.path()).await;
        for snapshot in staged() {
            model.go_on(&snapshot, &client, dir.path()).await;
        }
        drop(client);
        node.shutdown().await;
    });
}

/// Now and then, a hand takes files away.
fn remove(
    data: &mut Unstructured<'_>,
    files: &mut Files,
    eligible: impl Fn(&str) -> bool,
) -> arbitrary::Result<()> {
    for _ in 0..data.int_in_range(0..=5_u8)?.saturating_sub(3) {
        let names: Vec<String> = files.keys().filter(|name| eligible(name)).cloned().collect();
        files.remove(data.choose(&names)?);
    }
    Ok(())
}

/// What of the shard's record is left.
#[derive(Debug, PartialEq, Eq)]
enum Shard {
    Whole,
    Damaged,
    /// Nothing at all: as if there had never been one.
    New,
}

/// What of a staging area is left.
enum Area {
    /// Not what it is of, or not who wrote: the name of the file.
    Aside(String),
    Staged {
        claim: Claim,
        sealed: bool,
        extents: Vec<ExtentRecord>,
    },
}

struct Model {
    /// As they were found.
    files: Files,
}

impl Model {
    /// Whether it is there, and not as it was written.
    fn differs(&self, file: &str) -> bool {
        self.files.get(file).is_some_and(|found| *found != WHOLE[file])
    }

    fn is_whole(&self, file: &str) -> bool {
        self.files.get(file) == WHOLE.get(file)
    }

    fn names_another_version(&self) -> bool {
        let Some(version) = self.files.get("FORMAT").and_then(|found| found.strip_prefix(FORMAT)) else {
            return false;
        };
        let digits = version.iter().take_while(|byte| byte.is_ascii_digit()).count();
        // No more is read of it than any version has written.
        let digits = digits.min(64 - FORMAT.len());
        !matches!(&version[..digits], b"" | b"1")
    }

    fn of_shard(&self) -> Shard {
        if self.is_whole(CURRENT) {
            Shard::Whole
        } else if self.files.contains_key(CURRENT) || self.files.contains_key(MANIFEST) {
            Shard::Damaged
        } else {
            Shard::New
        }
    }

    fn area(&self, snapshot: &Snapshot, unread: &mut Vec<String>) -> Area {
        let file = |name: &str| format!("staging/{}/{name}", snapshot.id);
        let (meta, claim) = (file("meta"), file("claim"));
        if !self.is_whole(&meta) {
            return Area::Aside(meta);
        }
        if self.differs(&claim) {
            return Area::Aside(claim);
        }
        // One that is gone may never have been there.
        let none = Claim { attempt: 0, session: [0; 16] };
        let claim = if self.files.contains_key(&claim) { CLAIM } else { none };
        let extents = self.extents(snapshot, unread);
        let seal = file("sealed");
        if self.differs(&seal) || !WHOLE.contains_key(&seal) && self.files.contains_key(&seal) {
            unread.push(seal.clone());
        }
        let sealed = WHOLE.contains_key(&seal) && self.is_whole(&seal);
        Area::Staged { claim, sealed, extents }
    }

    /// What is on record of a staging area, and there. What is not as it was written is `unread`.
    fn extents(&self, snapshot: &Snapshot, unread: &mut Vec<String>) -> Vec<ExtentRecord> {
        let name = format!("staging/{}/records", snapshot.id);
        let Some(log) = self.files.get(&name) else { return Vec::new() };
        let (records, whole) = damage::records(log);
        let mut extents: Vec<ExtentRecord> = Vec::new();
        let mut all = whole;
        for record in records {
            // Nothing but extents, or all of it is something else.
            if record.len() % EXTENT_LEN != 0 {
                all = false;
                continue;
            }
            for found in record.chunks_exact(EXTENT_LEN).map(extent) {
                let Extent { file, offset, len } = found.extent;
                let size = snapshot.files.get(file as usize).map_or(0, |(_, content)| content.len() as u64);
                let fits = len > 0 && offset.checked_add(len).is_some_and(|end| end <= size);
                let overlaps = |other: &ExtentRecord| {
                    other.extent.file == file
                        && other.extent.offset < found.extent.end()
                        && offset < other.extent.end()
                };
                if fits && !extents.iter().any(overlaps) {
                    extents.push(found);
                } else {
                    all = false;
                }
            }
        }
        if !all {
            unread.push(name);
        }
        let mut extents = merged(extents);
        for (file, (tree, _)) in (0..).zip(&snapshot.files) {
            let name = format!("staging/{}/tree/{tree}", snapshot.id);
            let size = self.files.get(&name).map_or(0, |found| found.len() as u64);
            let before = extents.len();
            extents.retain(|found| found.extent.file != file || found.extent.end() <= size);
            if extents.len() < before {
                unread.push(name);
            }
        }
        extents
    }

    /// Holds what a start finds to what was damaged.
    fn judge(&self, recovered: &Recovered<FileStaging>, dir: &Path) {
        let Recovered { staged: found, finished, damage } = recovered;
        let mut unread = Vec::new();
        if self.differs("FORMAT") {
            unread.push("FORMAT".to_owned());
        }
        let log = self.files.get("history").map_or(&[][..], Vec::as_slice);
        let (ended, whole) = damage::records(log);
        assert!(ended.iter().eq(finished), "others have ended than were written: {finished:?}");
        if !whole {
            unread.push("history".to_owned());
        }
        match self.of_shard() {
            Shard::Damaged => unread.push(CURRENT.to_owned()),
            // Of a shard that takes nothing, it is not looked at.
            Shard::Whole if !self.is_whole(MANIFEST) => unread.push(MANIFEST.to_owned()),
            Shard::Whole | Shard::New => {}
        }
        let quarantine = crate::tree::tree(&dir.join("quarantine"));
        let mut left = 0;
        for snapshot in staged() {
            let found = found.iter().find(|found| found.plan().spec.transfer_id.as_str() == snapshot.id);
            match self.area(&snapshot, &mut unread) {
                Area::Aside(file) => {
                    assert!(found.is_none(), "{} was believed", snapshot.id);
                    // For a look at them, all is kept but the snapshot's own.
                    let kept = quarantine.iter().filter_map(|(name, content)| {
                        let name = name.split_once('.')?.1.strip_prefix(snapshot.id)?.strip_prefix('/')?;
                        Some((format!("staging/{}/{name}", snapshot.id), content))
                    });
                    let own = |name: &str| {
                        name.strip_prefix("staging/")
                            .and_then(|name| name.strip_prefix(snapshot.id)?.strip_prefix('/'))
                            .is_some_and(|name| !name.starts_with("tree/"))
                    };
                    let wanted = self.files.iter().filter(|(name, _)| own(name));
                    assert!(kept.eq(wanted.map(|(name, content)| (name.clone(), content))), "{quarantine:?}");
                    unread.push(file);
                }
                Area::Staged { claim, sealed, extents } => {
                    left += 1;
                    let found = found.unwrap_or_else(|| panic!("{} is gone: {damage:?}", snapshot.id));
                    assert_eq!(found.claim(), claim, "of {}", snapshot.id);
                    assert_eq!(found.state() == StagingState::Sealed, sealed, "{}", snapshot.id);
                    assert_eq!(merged(found.records()), extents, "on record of {}", snapshot.id);
                    assert_eq!(found.plan().spec, TransferSpec::from_header(&snapshot.header(1, 1)).unwrap());
                }
            }
        }
        assert_eq!(found.len(), left, "something else was staged");
        for file in &unread {
            assert!(damage.iter().any(|told| tells_of(told, file)), "{file} is not in {damage:?}");
        }
        for told in damage {
            // The files of the shard that is new as far as anybody knows.
            let unclaimed = !self.files.contains_key(CURRENT) && told.starts_with("installed/s2/done ");
            assert!(unclaimed || unread.iter().any(|file| tells_of(told, file)), "{told}");
        }
    }

    /// Older snapshots and lower fences are taken of a shard of which nothing is known, and of no other.
    async fn shard(&self, client: &Client, dir: &Path) {
        let low = snapshot("low", "s2", 3);
        let mut header = low.header(1, 1);
        header.fence = Some(fence(TERM - 1).into());
        let mut stream = Stream::open(client, header).await;
        stream.say(Frame::Manifest(low.manifest())).await;
        let low = stream.accepted().await.map(drop);
        drop(stream);
        let past = snapshot("past", "s2", 0);
        let past = (past.send(client).await, past.is_installed_in(dir));
        let again = done().send(client).await;
        let reason = |result: &Result<(), _>| result.as_ref().err().map(|error| polite(error).to_owned());
        let found = [reason(&low), reason(&past.0), reason(&again)];
        let expected = match self.of_shard() {
            Shard::Whole => [Some("STALE_FENCE"), Some("STALE_SNAPSHOT"), None],
            Shard::Damaged => [Some("INSTALL_REFUSED"); 3],
            Shard::New => [None; 3],
        };
        assert_eq!(found.each_ref().map(|found| found.as_deref()), expected, "{:?}", self.of_shard());
        assert_eq!(past.1, self.of_shard() == Shard::New);
        // Where nobody knows of it, it makes way for what is installed then.
        let replaced = self.of_shard() == Shard::New && !dir.join("installed/s2/done").exists();
        assert!(replaced || done().is_installed_in(dir));
    }

    /// Goes on with a transfer that was staged, as its sender would.
    async fn go_on(&self, snapshot: &Snapshot, client: &Client, dir: &Path) {
        let sent = snapshot.send(client).await;
        if snapshot.shard == "s2" && self.of_shard() == Shard::Damaged {
            assert_eq!(polite(&sent.unwrap_err()), "INSTALL_REFUSED");
            return assert!(!snapshot.is_installed_in(dir));
        }
        let (mut lost, mut foreign) = (false, false);
        if let Area::Staged { sealed: false, extents, .. } = self.area(snapshot, &mut Vec::new()) {
            for ExtentRecord { extent: Extent { file, offset, len }, crc } in extents {
                let (name, content) = &snapshot.files[file as usize];
                let range = usize::try_from(offset).unwrap()..usize::try_from(offset + len).unwrap();
                let there = &self.files[&format!("staging/{}/tree/{name}", snapshot.id)];
                if crc64(&there[range.clone()]) != crc {
                    lost = true;
                } else if crc64(&content[range]) != crc {
                    // Records and files of another area are as good as its own, until all of a file is looked at.
                    foreign = true;
                }
            }
        }
        let mut sent = sent;
        if lost {
            assert_eq!(polite(&sent.unwrap_err()), "STAGED_DATA_DAMAGED", "of {}", snapshot.id);
            assert!(!snapshot.is_installed_in(dir));
            // What could not be read back is sent again.
            sent = snapshot.send(client).await;
        }
        let refused = sent.as_ref().err().map(polite);
        assert_eq!(refused, foreign.then_some("FILE_CHECKSUM_MISMATCH"), "of {}: {sent:?}", snapshot.id);
        assert_eq!(snapshot.is_installed_in(dir), !foreign, "{}", snapshot.id);
    }
}

/// Whether that is about `file`, as the store writes it.
fn tells_of(told: &str, file: &str) -> bool {
    match file.split_once("/tree/") {
        Some((area, name)) => told.starts_with(&format!("{area}: tree/{name} ")),
        None => told.contains(&format!("{file} ")) || told.contains(&format!("{file}: ")),
    }
}

fn extent(bytes: &[u8]) -> ExtentRecord {
    let number = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let file = u32::from_le_bytes(bytes[..4].try_into().unwrap());
    ExtentRecord { extent: Extent { file, offset: number(4), len: number(12) }, crc: number(20) }
}

/// In order, and neighbours as one: whether they are is for the store to choose.
fn merged(mut extents: Vec<ExtentRecord>) -> Vec<ExtentRecord> {
    extents.sort_unstable_by_key(|found| found.extent);
    let mut merged: Vec<ExtentRecord> = Vec::new();
    for found in extents {
        match merged.last_mut() {
            Some(last)
                if (last.extent.file, last.extent.end()) == (found.extent.file, found.extent.offset) =>
            {
                last.crc = combine(last.crc, found.crc, found.extent.len);
                last.extent.len += found.extent.len;
            }
            _ => merged.push(found),
        }
    }
    merged
}
