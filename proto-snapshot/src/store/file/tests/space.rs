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
    let limited = FileStoreOptions { capacity_bytes: Some(1_000_000), ..options() };
    let (store, _) = open_with(dir.path(), limited.clone()).await;
    let first = store.stage(&plan("t1", 1, &one(600_000))).await.unwrap();
    let error = store.stage(&plan("t2", 2, &one(500_000))).await.unwrap_err();
    assert_eq!(no_space(&error), Some((500_000, 400_000)));
    assert!(error.is_retryable());
    assert!(!dir.path().join("staging/t2").exists());
    fill(&first, &one(600_000)).await;
    install(&first, &one(600_000)).await;
    assert!(store.stage(&plan("t2", 2, &one(500_000))).await.is_err(), "installed ones count");
    let second = store.stage(&plan("t2", 2, &one(400_000))).await.unwrap();
    second.remove().await.unwrap();
    drop((first, second, store));

    // The same after a restart, and with what is staged.
    let (store, _) = open_with(dir.path(), limited.clone()).await;
    let second = store.stage(&plan("t2", 2, &one(400_000))).await.unwrap();
    assert!(store.stage(&plan("t3", 3, &one(1))).await.is_err());
    drop((second, store));
    let (store, mut recovered) = open_with(dir.path(), limited).await;
    assert!(store.stage(&plan("t3", 3, &one(1))).await.is_err());
    let second = recovered.staged.remove(0);
    fill(&second, &one(400_000)).await;
    install(&second, &one(400_000)).await;
    // The first one was replaced.
    store.stage(&plan("t3", 3, &one(600_000))).await.unwrap();
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
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    let limited = FileStoreOptions { capacity_bytes: Some(1_000_000), percent_per_peer: 60, ..options() };
    let (store, _) = open_with(dir.path(), limited.clone()).await;
    let of = |peer: &str, id: &str, len: usize| from_peer(peer, plan(id, 1, &one(len)));
    let error = store.stage(&of("n9", "x0", 600_001)).await.unwrap_err();
    assert_eq!(no_share(&error), Some(("n9", 600_001, 600_000)));
    assert!(error.is_retryable());
    let first = store.stage(&of("n9", "x1", 500_000)).await.unwrap();
    // What is written counts as what is announced.
    fill(&first, &one(500_000)).await;
    let second = store.stage(&of("n9", "x2", 100_000)).await.unwrap();
    let error = store.stage(&of("n9", "x3", 1)).await.unwrap_err();
    assert_eq!(no_share(&error), Some(("n9", 1, 0)));
    store.stage(&of("n9", "x4", 0)).await.unwrap();
    // Another node has its share of what is left. More than all that is left is no matter of shares.
    let other = store.stage(&of("n1", "y1", 200_000)).await.unwrap();
    let error = store.stage(&of("n1", "y2", 50_000)).await.unwrap_err();
    assert_eq!(no_share(&error), Some(("n1", 50_000, 40_000)));
    assert_eq!(no_space(&store.stage(&of("n3", "z", 300_000)).await.unwrap_err()), Some((300_000, 200_000)));
    // One that grows has no more than one that says its size.
    let growing = store.stage(&from_peer("n9", unknown("x5"))).await.unwrap();
    let chunk = StagedChunk { file: 0, offset: 0, payload: Bytes::from_static(b"x").into() };
    assert!(no_share(&growing.write(vec![chunk]).await.unwrap_err()).is_some());
    growing.remove().await.unwrap();

    // The same after a restart; what was given up, or installed, is not held any more.
    drop((first, second, other, growing, store));
    let (store, recovered) = open_with(dir.path(), limited).await;
    let staged = |id: &str| {
        let found = recovered.staged.iter().find(|staging| staging.plan().spec.transfer_id.as_str() == id);
        Arc::clone(found.unwrap())
    };
    let error = store.stage(&of("n9", "x3", 1)).await.unwrap_err();
    assert_eq!(no_share(&error), Some(("n9", 1, 0)));
    staged("x2").remove().await.unwrap();
    assert!(store.stage(&of("n9", "x3", 1)).await.is_err(), "it has 500,000 of 800,000");
    staged("y1").remove().await.unwrap();
    store.stage(&of("n9", "x3", 60_000)).await.unwrap().remove().await.unwrap();
    install(&staged("x1"), &one(500_000)).await;
    store.stage(&of("n9", "x6", 160_000)).await.unwrap();
}

#[tokio::test]
async fn one_node_may_have_all_where_the_owner_says_so() {
    let dir = tempfile::tempdir_in(fast_dir()).unwrap();
    for (percent, most) in [(0, 10_000), (1, 10_000), (75, 750_000), (100, 1_000_000), (255, 1_000_000)] {
        let options =
            FileStoreOptions { capacity_bytes: Some(1_000_000), percent_per_peer: percent, ..options() };
        let (store, _) = open_with(dir.path(), options).await;
        assert!(store.stage(&plan("t", 1, &one(most + 1))).await.is_err(), "{percent}");
        store.stage(&plan("t", 1, &one(most))).await.unwrap().remove().await.unwrap();
    }
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
    staging.inner().reservation.outstanding()
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
    assert_eq!(no_space(&error), Some((60_000, 40_000)));
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
    assert_eq!(no_space(&error), Some((20_000, 10_000)));
}

/// A file system of `len` bytes in memory; `None` where mounting is not permitted.
struct Small(PathBuf);

impl Small {
    fn new(at: &Path, len: usize) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let size = format!("size={len}");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(at).output();
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
