//! Too little room: refused before any data moves, or failing cleanly midway and going on once there is some.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use bytes::Bytes;
use proto_common::fence::Fence;
use proto_common::ids::{NodeId, ShardId};
use proto_common::path::FileName;

use super::support::*;
use crate::spec::{Manifest, ManifestFile, TransferPlan};
use crate::store::file::{FileSnapshotStore, FileStoreOptions};
use crate::store::{SnapshotStore as _, StagedChunk, Staging as _, StoreError};

fn one(len: usize) -> Files {
    vec![("file".to_owned(), content(len as u64, len))]
}

fn no_space(error: &StoreError) -> Option<(u64, u64)> {
    match error {
        StoreError::NoSpace { needed_bytes, available_bytes } => Some((*needed_bytes, *available_bytes)),
        _ => None,
    }
}

#[tokio::test]
async fn the_quota_counts_what_is_promised_and_what_is_installed() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let limited = FileStoreOptions { capacity_bytes: Some(1000 << 10), ..options() };
    let (store, _) = open_with(dir.path(), limited.clone()).await;
    let first = store.stage(&plan("t1", 1, &one(600 << 10))).await.unwrap();
    let error = store.stage(&plan("t2", 2, &one(500 << 10))).await.unwrap_err();
    assert_eq!(no_space(&error), Some((500 << 10, 400 << 10)));
    assert!(error.is_retryable());
    assert!(!dir.path().join("staging/t2").exists());
    fill(&first, &one(600 << 10)).await;
    install(&first, &one(600 << 10)).await;
    assert!(store.stage(&plan("t2", 2, &one(500 << 10))).await.is_err(), "installed ones count");
    let second = store.stage(&plan("t2", 2, &one(400 << 10))).await.unwrap();
    second.remove().await.unwrap();
    drop((first, second, store));

    // The same after a restart, and with what is staged.
    let (store, _) = open_with(dir.path(), limited.clone()).await;
    let second = store.stage(&plan("t2", 2, &one(400 << 10))).await.unwrap();
    assert!(store.stage(&plan("t3", 3, &one(1))).await.is_err());
    drop((second, store));
    let (store, mut recovered) = open_with(dir.path(), limited).await;
    assert!(store.stage(&plan("t3", 3, &one(1))).await.is_err());
    let second = recovered.staged.remove(0);
    fill(&second, &one(400 << 10)).await;
    install(&second, &one(400 << 10)).await;
    // The first one was replaced.
    store.stage(&plan("t3", 3, &one(600 << 10))).await.unwrap();
}

/// Very many small files are not for free.
#[tokio::test]
async fn the_quota_counts_whole_blocks_also_of_what_is_installed() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let limited = FileStoreOptions { capacity_bytes: Some(8 * 4096), ..options() };
    let (store, _) = open_with(dir.path(), limited.clone()).await;
    // Six files, two of which are empty, and a directory.
    let files: Files = (0..6).map(|n| (format!("d/{n}"), content(n, n as usize / 2))).collect();
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    let left = async |store: &FileSnapshotStore| {
        let error = store.stage(&plan("t2", 2, &one(2 * 4096))).await.unwrap_err();
        assert_eq!(no_space(&error), Some((2 * 4096, 4096)));
    };
    left(&store).await;
    fill(&staging, &files).await;
    left(&store).await;
    install(&staging, &files).await;
    left(&store).await;
    drop((staging, store));
    left(&open_with(dir.path(), limited).await.0).await;
}

fn no_share(error: &StoreError) -> Option<(&str, u64, u64)> {
    match error {
        StoreError::NoShare { peer, needed_bytes, available_bytes } => {
            Some((peer.as_str(), *needed_bytes, *available_bytes))
        }
        _ => None,
    }
}

/// The plan, as one of the node `peer`.
fn from_peer(peer: &str, mut plan: TransferPlan) -> TransferPlan {
    plan.spec.source_node = NodeId::new(peer).unwrap();
    plan
}

#[tokio::test]
async fn a_node_gets_its_share_of_the_room_and_leaves_the_rest_to_others() {
    const KIB: u64 = 1 << 10;
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let limited = FileStoreOptions { capacity_bytes: Some(1000 * KIB), percent_per_peer: 60, ..options() };
    let (store, _) = open_with(dir.path(), limited.clone()).await;
    let of = |peer: &str, id: &str, len: usize| from_peer(peer, plan(id, 1, &one(len)));
    let error = store.stage(&of("n9", "x0", (600 << 10) + 1)).await.unwrap_err();
    assert_eq!(no_share(&error), Some(("n9", 604 * KIB, 600 * KIB)));
    assert!(error.is_retryable());
    let first = store.stage(&of("n9", "x1", 500 << 10)).await.unwrap();
    // What is written counts as what is announced.
    fill(&first, &one(500 << 10)).await;
    let second = store.stage(&of("n9", "x2", 96 << 10)).await.unwrap();
    let growing = store.stage(&from_peer("n9", unknown("x5"))).await.unwrap();
    for len in [1, 0] {
        let error = store.stage(&of("n9", "x3", len)).await.unwrap_err();
        assert_eq!(no_share(&error), Some(("n9", 4 * KIB, 0)));
    }
    // Another node has its share of what is left. More than all that is left is no matter of shares.
    let other = store.stage(&of("n1", "y1", 200 << 10)).await.unwrap();
    let error = store.stage(&of("n1", "y2", 52 << 10)).await.unwrap_err();
    assert_eq!(no_share(&error), Some(("n1", 52 * KIB, 40 * KIB)));
    let error = store.stage(&of("n3", "z", 300 << 10)).await.unwrap_err();
    assert_eq!(no_space(&error), Some((300 * KIB, 200 * KIB)));
    // One that grows has no more than one that says its size.
    let chunk = |offset| StagedChunk { file: 0, offset, payload: Bytes::from_static(b"x").into() };
    growing.write(vec![chunk(4095)]).await.unwrap();
    assert!(no_share(&growing.write(vec![chunk(4096)]).await.unwrap_err()).is_some());
    growing.remove().await.unwrap();

    // The same after a restart; what was given up, or installed, is not held any more.
    drop((first, second, other, growing, store));
    let (store, recovered) = open_with(dir.path(), limited).await;
    let staged = |id: &str| {
        let found = recovered.staged.iter().find(|staging| staging.plan().spec.transfer_id.as_str() == id);
        Arc::clone(found.unwrap())
    };
    let error = store.stage(&of("n9", "x3", 1)).await.unwrap_err();
    assert_eq!(no_share(&error), Some(("n9", 4 * KIB, 0)));
    staged("x2").remove().await.unwrap();
    assert!(store.stage(&of("n9", "x3", 1)).await.is_err(), "it has 500 of 800 KiB");
    staged("y1").remove().await.unwrap();
    store.stage(&of("n9", "x3", 60 << 10)).await.unwrap().remove().await.unwrap();
    install(&staged("x1"), &one(500 << 10)).await;
    store.stage(&of("n9", "x6", 160 << 10)).await.unwrap();
}

#[tokio::test]
async fn one_node_may_have_all_where_the_owner_says_so() {
    const BLOCK: usize = 4096;
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    for (percent, most) in [(0, 1), (1, 1), (75, 75), (100, 100), (255, 100)] {
        let options = FileStoreOptions {
            capacity_bytes: Some(100 * BLOCK as u64),
            percent_per_peer: percent,
            ..options()
        };
        let (store, _) = open_with(dir.path(), options).await;
        assert!(store.stage(&plan("t", 1, &one(most * BLOCK + 1))).await.is_err(), "{percent}");
        store.stage(&plan("t", 1, &one(most * BLOCK))).await.unwrap().remove().await.unwrap();
    }
}

/// `count` files of a few bytes.
fn small_files(count: u64) -> Files {
    (0..count).map(|number| (format!("f{number}"), content(number, 5))).collect()
}

/// Needed and available, and the node whose share it is.
fn no_files(error: &StoreError) -> Option<(u64, u64, Option<&str>)> {
    match error {
        StoreError::NoFiles { needed_files, available_files } => {
            Some((*needed_files, *available_files, None))
        }
        StoreError::NoShareOfFiles { peer, needed_files, available_files } => {
            Some((*needed_files, *available_files, Some(peer.as_str())))
        }
        _ => None,
    }
}

/// A file system may run out of files long before it does of bytes.
#[tokio::test]
async fn files_and_directories_are_promised_as_bytes_are() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let limited = FileStoreOptions { min_free_files: 1000, percent_per_peer: 60, ..options() };
    let has = |store: &FileSnapshotStore, files: u64| {
        *crate::store::file::lock(&store.shared.space.files_left) = Some(files);
    };
    let of = |peer: &str, id: &str, count: u64| from_peer(peer, plan(id, 1, &small_files(count)));
    let (store, _) = open_with(dir.path(), limited.clone()).await;
    has(&store, 999);
    let error = store.stage(&of("n9", "x0", 1)).await.unwrap_err();
    assert_eq!(no_files(&error), Some((1, 0, None)), "some are left to the node");
    has(&store, 1100);
    let error = store.stage(&of("n9", "x0", 101)).await.unwrap_err();
    assert_eq!(no_files(&error), Some((101, 100, None)));
    assert!(error.is_retryable());
    let error = store.stage(&of("n9", "x0", 61)).await.unwrap_err();
    assert_eq!(no_files(&error), Some((61, 60, Some("n9"))));
    assert!(error.is_retryable());
    assert!(!dir.path().join("staging/x0").exists());

    let mut nested = small_files(40);
    nested.iter_mut().for_each(|(name, _)| name.insert_str(0, "a/b/"));
    let first = store.stage(&from_peer("n9", plan("x1", 1, &nested))).await.unwrap();
    assert_eq!(first.inner().reservation.outstanding().files, 42);
    let error = store.stage(&of("n9", "x2", 19)).await.unwrap_err();
    assert_eq!(no_files(&error), Some((19, 18, Some("n9"))));
    // Others have their share of the rest.
    let error = store.stage(&of("n1", "y1", 35)).await.unwrap_err();
    assert_eq!(no_files(&error), Some((35, 34, Some("n1"))));
    store.stage(&of("n1", "y1", 34)).await.unwrap().remove().await.unwrap();

    // What is on the disk is counted by the file system, but stays a part of the share.
    for number in 0..10 {
        let (whole, record) = chunk(&nested, number, 0, 5);
        first.write(vec![whole]).await.unwrap();
        first.sync(vec![record]).await.unwrap();
    }
    has(&store, 1100 - 12);
    assert_eq!(first.inner().reservation.outstanding().files, 30);
    let error = store.stage(&of("n9", "x2", 19)).await.unwrap_err();
    assert_eq!(no_files(&error), Some((19, 18, Some("n9"))));
    drop((first, store));

    let (store, mut recovered) = open_with(dir.path(), limited).await;
    has(&store, 1100 - 12);
    let first = recovered.staged.remove(0);
    assert_eq!(first.inner().reservation.outstanding().files, 30);
    let error = store.stage(&of("n9", "x2", 19)).await.unwrap_err();
    assert_eq!(no_files(&error), Some((19, 18, Some("n9"))));
    for number in 10..40 {
        let (whole, record) = chunk(&nested, number, 0, 5);
        first.write(vec![whole]).await.unwrap();
        first.sync(vec![record]).await.unwrap();
    }
    assert_eq!(first.inner().reservation.outstanding().files, 0);
    install(&first, &nested).await;
    has(&store, 1100 - 42);
    let error = store.stage(&of("n9", "x2", 35)).await.unwrap_err();
    assert_eq!(no_files(&error), Some((35, 34, Some("n9"))), "what is installed counts for nobody");
}

#[tokio::test]
async fn a_file_system_that_runs_out_of_files_fails_cleanly_and_the_transfer_goes_on_when_there_are_some() {
    let dir = tempfile::tempdir().unwrap();
    let Some(small) = Small::with(&dir.path().join("small"), "size=8m,nr_inodes=100") else { return };
    let reserved = FileStoreOptions { min_free_files: 20, ..options() };
    let (store, _) = open_with(&small.0.join("store"), reserved).await;
    let error = store.stage(&plan("t0", 1, &small_files(90))).await.unwrap_err();
    assert!(no_files(&error).is_some_and(|(needed, left, _)| needed == 90 && left < 80), "{error:?}");
    let files = small_files(50);
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    // Somebody else takes those that were promised.
    let hogs: Vec<PathBuf> = (0..)
        .map(|number| small.0.join(format!("hog-{number}")))
        .take_while(|hog| fs::write(hog, "").is_ok())
        .collect();
    let write = async |number: u32| {
        let (whole, record) = chunk(&files, number, 0, 5);
        staging.write(vec![whole]).await?;
        staging.sync(vec![record]).await
    };
    let error = write(0).await.unwrap_err();
    assert_eq!(no_files(&error), Some((50, 0, None)), "{error:?}");
    assert!(error.is_retryable());
    let raise = |name: &str| {
        let shard = ShardId::new(name).unwrap();
        let store = &store;
        async move { store.raise_fence(&shard, Fence { epoch: 1, term: 1 }, &source()).await }
    };
    let error = raise("made-up").await.unwrap_err();
    assert!(no_files(&error).is_some_and(|(needed, ..)| needed == 2) && error.is_retryable(), "{error:?}");
    assert!(!small.0.join("store/shards/made-up").exists());
    hogs.iter().for_each(|hog| fs::remove_file(hog).unwrap());
    raise("made-up").await.unwrap();
    for number in 0..50 {
        write(number).await.unwrap();
    }
    install(&staging, &files).await;
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
}

#[tokio::test]
async fn a_size_beyond_all_disks_is_refused() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let mut huge = plan("t1", 1, &one(1));
    let file = ManifestFile { size: Some(i64::MAX as u64), ..huge.manifest.files()[0].clone() };
    huge.manifest = Manifest::new(vec![file]).unwrap();
    let error = store.stage(&huge).await.unwrap_err();
    assert!(no_space(&error).is_some(), "{error:?}");
    assert_eq!(fs::read_dir(dir.path().join("staging")).unwrap().count(), 0);
}

#[tokio::test]
async fn min_free_bytes_are_never_promised() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) =
        open_with(dir.path(), FileStoreOptions { min_free_bytes: u64::MAX / 2, ..options() }).await;
    let error = store.stage(&plan("t1", 1, &one(10))).await.unwrap_err();
    assert_eq!(no_space(&error).unwrap().1, 0);
    // An empty file is not nothing.
    let error = store.stage(&plan("t2", 2, &vec![("a/f".to_owned(), Vec::new())])).await.unwrap_err();
    assert_eq!(no_space(&error), Some((8192, 0)));
}

#[tokio::test]
async fn a_large_file_gets_its_blocks_at_once_and_keeps_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let files = one(8 << 20);
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    assert_eq!(staging_outstanding(&staging), 8 << 20);
    let (chunk, record) = chunk(&files, 0, 4096, 1000);
    staging.write(vec![chunk]).await.unwrap();
    let found = fs::metadata(dir.path().join("staging/t1/tree/file")).unwrap();
    assert_eq!(found.len(), 5096);
    if found.blocks() * 512 < 8 << 20 {
        eprintln!("SKIPPED: this file system cannot preallocate");
        return;
    }
    assert_eq!(staging_outstanding(&staging), 0);
    staging.sync(vec![record]).await.unwrap();
    drop((staging, store));
    let (_store, mut recovered) = open(dir.path()).await;
    assert_eq!(staging_outstanding(&recovered.staged.remove(0)), 0);
}

fn staging_outstanding(staging: &crate::store::file::FileStaging) -> u64 {
    staging.inner().reservation.outstanding().bytes
}

#[tokio::test]
async fn empty_files_and_directories_are_promised_what_they_take() {
    const BLOCK: u64 = 4096;
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let (store, _) = open(dir.path()).await;
    let names = ["a/b/c/empty", "a/b/file", "d/empty", "none"];
    let files: Files =
        names.iter().map(|name| ((*name).to_owned(), vec![7; usize::from(name.ends_with("file"))])).collect();
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    assert_eq!(staging_outstanding(&staging), (4 + 4) * BLOCK);
    fill(&staging, &files).await;
    // Two directories and a file are there, also after a restart.
    assert_eq!(staging_outstanding(&staging), 5 * BLOCK);
    drop((staging, store));
    let (store, mut recovered) = open(dir.path()).await;
    let staging = recovered.staged.remove(0);
    assert!(
        (5 * BLOCK..=6 * BLOCK).contains(&staging_outstanding(&staging)),
        "where the blocks are counted late"
    );
    staging.seal(&totals(&files)).await.unwrap();
    assert_eq!(staging_outstanding(&staging), 0);
    drop(store);
}

fn unknown(id: &str) -> TransferPlan {
    let file = ManifestFile { name: FileName::new("dump").unwrap(), size: None, blake3: None };
    TransferPlan { spec: spec(id, 1), manifest: Manifest::new(vec![file]).unwrap() }
}

#[tokio::test]
async fn a_file_of_unknown_size_reserves_as_it_grows() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let limited = FileStoreOptions { capacity_bytes: Some(100_000), ..options() };
    let (store, _) = open_with(dir.path(), limited.clone()).await;
    let staging = store.stage(&unknown("t1")).await.unwrap();
    let bytes = content(1, 150_000);
    let at = |offset: usize, len: usize| StagedChunk {
        file: 0,
        offset: offset as u64,
        payload: Bytes::copy_from_slice(&bytes[offset..offset + len]).into(),
    };
    staging.write(vec![at(0, 60_000)]).await.unwrap();
    let error = staging.write(vec![at(60_000, 60_000)]).await.unwrap_err();
    assert_eq!(no_space(&error), Some((61_440, 38_560)), "in whole blocks");
    staging.write(vec![at(60_000, 30_000)]).await.unwrap();
    let files: Files = vec![("dump".to_owned(), bytes[..90_000].to_vec())];
    let (_, record) = chunk(&files, 0, 0, 90_000);
    staging.sync(vec![record]).await.unwrap();
    drop((staging, store));
    let (store, mut recovered) = open_with(dir.path(), limited).await;
    let staging = recovered.staged.remove(0);
    assert!(staging.write(vec![at(90_000, 20_000)]).await.is_err());
    install(&staging, &files).await;
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
    let error = store.stage(&plan("t2", 2, &one(20_000))).await.unwrap_err();
    assert_eq!(no_space(&error), Some((20_480, 9_888)));
}

/// A file system of `len` bytes in memory; `None` where mounting is not permitted.
struct Small(PathBuf);

impl Small {
    fn new(at: &Path, len: usize) -> Option<Self> {
        Self::with(at, &format!("size={len}"))
    }

    fn with(at: &Path, options: &str) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at).output();
        if mount.is_ok_and(|output| output.status.success()) {
            return Some(Self(at.to_owned()));
        }
        eprintln!("SKIPPED: no right to mount a file system: a full disk is not tested");
        None
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

#[tokio::test]
async fn a_disk_that_fills_up_midway_fails_cleanly_and_the_transfer_goes_on_when_there_is_room() {
    let dir = tempfile::tempdir().unwrap();
    let Some(small) = Small::new(&dir.path().join("small"), 2 << 20) else { return };
    let (store, _) = open(&small.0.join("store")).await;
    let error = store.stage(&plan("t0", 1, &one(4 << 20))).await.unwrap_err();
    assert!(
        no_space(&error).is_some_and(|(needed, available)| needed > available && available > 0),
        "{error:?}"
    );

    let files: Files = (0..12).map(|n| (format!("f{n}"), content(n, 100_000))).collect();
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    // Somebody else takes the room that was promised.
    let hog = small.0.join("hog");
    fs::write(&hog, vec![1; 1_300_000]).unwrap();
    let mut done = 0;
    let error = loop {
        let (chunk, record) = chunk(&files, done, 0, 100_000);
        match staging.write(vec![chunk]).await {
            Ok(()) => staging.sync(vec![record]).await.unwrap(),
            Err(error) => break error,
        }
        done += 1;
    };
    assert!(no_space(&error).is_some(), "{error:?}");
    assert!(done > 0 && done < 12);
    fs::remove_file(&hog).unwrap();
    for file in done..12 {
        let (chunk, record) = chunk(&files, file, 0, 100_000);
        staging.write(vec![chunk]).await.unwrap();
        staging.sync(vec![record]).await.unwrap();
    }
    install(&staging, &files).await;
    assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
}

/// The log of extents needs room as well; a sync that fails for lack of it works again later, in the same process.
#[tokio::test]
async fn records_that_did_not_fit_are_written_later() {
    let dir = tempfile::tempdir().unwrap();
    let Some(small) = Small::new(&dir.path().join("small"), 1 << 20) else { return };
    let root = small.0.join("store");
    let (store, _) = open(&root).await;
    let files: Files = vec![("f".to_owned(), content(1, 400_000))];
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    let (data, _) = chunk(&files, 0, 0, 400_000);
    staging.write(vec![data]).await.unwrap();
    let hog = small.0.join("hog");
    let mut len = 1 << 20;
    while len > 0 {
        // All that is left, page by page at the end.
        if std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&hog)
            .and_then(|mut file| std::io::Write::write_all(&mut file, &vec![1; len]))
            .is_err()
        {
            len /= 2;
        }
    }
    let records: Vec<_> = (0..4000).map(|n| chunk(&files, 0, n * 100, 100).1).collect();
    let error = staging.sync(records.clone()).await.unwrap_err();
    assert!(no_space(&error).is_some(), "{error:?}");
    fs::remove_file(&hog).unwrap();
    staging.sync(records).await.unwrap();
    drop((staging, store));
    let (_store, mut recovered) = open(&root).await;
    assert_eq!(recovered.damage, Vec::<String>::new());
    assert_eq!(recovered.staged.remove(0).records(), [chunk(&files, 0, 0, 400_000).1]);
}

/// Open descriptors of this process below `dir`, but for those of the deletion in the background.
#[cfg(target_os = "linux")]
fn open_below(dir: &std::path::Path) -> usize {
    let trash = dir.join("trash");
    let counts = |at: std::path::PathBuf| at.starts_with(dir) && !at.starts_with(&trash);
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    open.filter(|fd| std::fs::read_link(fd.as_ref().unwrap().path()).is_ok_and(counts)).count()
}

/// Many transfers may be staged, most of them with nobody who sends: they hold no file open, also after a restart.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn what_rests_holds_no_file_open_and_goes_on() {
    let files: Files = vec![("a".to_owned(), content(1, 5000)), ("b/c".to_owned(), content(2, 3000))];
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let idle = open_below(dir.path());
    let staging = store.stage(&plan("t", 1, &files)).await.unwrap();
    let (one, record) = chunk(&files, 0, 0, 2000);
    staging.write(vec![one]).await.unwrap();
    assert!(open_below(dir.path()) > idle);
    // What is not durable yet needs them.
    staging.rest().await.unwrap();
    assert!(open_below(dir.path()) > idle);
    staging.sync(vec![record]).await.unwrap();
    staging.rest().await.unwrap();
    assert_eq!(open_below(dir.path()), idle);
    let (two, record) = chunk(&files, 0, 2000, 1000);
    staging.write(vec![two]).await.unwrap();
    staging.sync(vec![record]).await.unwrap();
    drop((staging, store));

    let (_store, recovered) = open(dir.path()).await;
    assert_eq!(open_below(dir.path()), idle);
    let staging = &recovered.staged[0];
    assert_eq!(staging.records().iter().map(|record| record.extent.len).sum::<u64>(), 3000);
    let (rest, record) = chunk(&files, 0, 3000, 2000);
    let (other, other_record) = chunk(&files, 1, 0, 3000);
    staging.write(vec![rest, other]).await.unwrap();
    staging.sync(vec![record, other_record]).await.unwrap();
    install(staging, &files).await;
    assert_eq!(tree(&dir.path().join("installed/shard-1/t")), as_tree(&files));
}

#[tokio::test]
async fn shards_that_are_only_named_count_against_the_node_that_names_them() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let limited = FileStoreOptions { shards_per_peer: 2, ..options() };
    let (store, _) = open_with(dir.path(), limited.clone()).await;
    let fence = |term| Fence { epoch: 1, term };
    let named = |name: &str| ShardId::new(name).unwrap();
    let evil = NodeId::new("n9").unwrap();
    for name in ["a", "b"] {
        store.raise_fence(&named(name), fence(1), &evil).await.unwrap();
    }
    let refuses = async |store: &FileSnapshotStore, name: &str, by: &NodeId| {
        let error = store.raise_fence(&named(name), fence(1), by).await.unwrap_err();
        assert!(matches!(&error, StoreError::TooManyShards { peer, limit: 2 } if peer == by), "{error:?}");
        assert!(!error.is_retryable());
        assert!(!dir.path().join("shards").join(name).exists(), "nothing is kept of it");
    };
    refuses(&store, "c", &evil).await;
    // Those that are known are raised as before, by whomever, and others name theirs.
    assert_eq!(store.raise_fence(&named("a"), fence(2), &evil).await.unwrap(), fence(2));
    assert_eq!(store.raise_fence(&named("b"), fence(3), &source()).await.unwrap(), fence(3));
    store.raise_fence(&shard(), fence(1), &source()).await.unwrap();
    store.raise_fence(&named("d"), fence(1), &source()).await.unwrap();
    drop(store);

    let (store, _) = open_with(dir.path(), limited).await;
    refuses(&store, "c", &evil).await;
    refuses(&store, "e", &source()).await;
    // What is installed counts for nobody.
    let staging = store.stage(&plan("t1", 1, &one(10))).await.unwrap();
    fill(&staging, &one(10)).await;
    install(&staging, &one(10)).await;
    store.raise_fence(&named("e"), fence(1), &source()).await.unwrap();
    refuses(&store, "f", &source()).await;
    assert_eq!(store.shard(&shard()).await.unwrap().fence, fence(1), "it is still known");
}

#[tokio::test]
async fn shards_of_which_something_is_installed_count_against_the_node_that_was_first() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let limited = FileStoreOptions { installed_per_peer: 2, ..options() };
    let (store, _) = open_with(dir.path(), limited.clone()).await;
    let of = |by: &str, name: &str, index: u64| {
        let mut plan = plan(&format!("{by}-{name}-{index}"), index, &one(10));
        plan.spec.source_node = NodeId::new(by).unwrap();
        plan.spec.target_shard = ShardId::new(name).unwrap();
        plan
    };
    let installs = async |store: &FileSnapshotStore, plan: TransferPlan| {
        let staging = store.stage(&plan).await.unwrap();
        fill(&staging, &one(10)).await;
        install(&staging, &one(10)).await;
    };
    let refuses = async |store: &FileSnapshotStore, plan: TransferPlan| {
        let error = store.stage(&plan).await.unwrap_err();
        let by = &plan.spec.source_node;
        assert!(matches!(&error, StoreError::TooManyInstalled { peer, limit: 2 } if peer == by), "{error:?}");
        assert!(!error.is_retryable());
        assert!(!dir.path().join("staging").join(plan.spec.transfer_id.as_str()).exists());
    };
    installs(&store, of("n9", "a", 1)).await;
    installs(&store, of("n9", "b", 1)).await;
    refuses(&store, of("n9", "c", 1)).await;
    // Newer ones of those are taken, from whomever, and others have theirs.
    installs(&store, of("n9", "a", 2)).await;
    installs(&store, of("n1", "b", 2)).await;
    installs(&store, of("n1", "c", 1)).await;
    drop(store);

    let (store, _) = open_with(dir.path(), limited).await;
    refuses(&store, of("n9", "d", 1)).await;
    installs(&store, of("n9", "c", 2)).await;
    installs(&store, of("n1", "d", 1)).await;
    refuses(&store, of("n1", "e", 1)).await;
}
