//! Bytes that are here already.

use std::fs;

use super::support::*;
use crate::extent::{Extent, ExtentRecord};
use crate::spec::Manifest;
use crate::store::file::{FileSnapshotStore, FileStaging, FileStoreOptions};
use crate::store::{SnapshotStore as _, Staging as _};
use proto_common::checksum::crc64;
use proto_common::ids::{NodeId, ShardId};
use tokio_util::sync::CancellationToken;

fn files() -> Files {
    vec![
        ("same".to_owned(), content(1, 3_000_000)),
        ("dir/moved".to_owned(), content(2, 5000)),
        ("changed".to_owned(), content(3, 5000)),
        ("empty".to_owned(), Vec::new()),
    ]
}

fn next() -> Files {
    let mut files = files();
    files[1].0 = "other/place".to_owned();
    files[2].1 = content(4, 5000);
    files
}

async fn base(store: &FileSnapshotStore, with_digests: bool) {
    let plan = if with_digests { plan_with_digests("base", 1, &files()) } else { plan("base", 1, &files()) };
    let staging = store.stage(&plan).await.unwrap();
    fill(&staging, &files()).await;
    install(&staging, &files()).await;
}

/// Reuses what can be, fills the rest, installs; returns which files were reused.
async fn reuse_and_install(store: &FileSnapshotStore, staging: &FileStaging, files: &Files) -> Vec<bool> {
    let mut reused = Vec::new();
    for (number, (_, content)) in (0_u32..).zip(files) {
        let found = staging.reuse(number, CancellationToken::new()).await.unwrap();
        reused.push(found.is_some());
        let extent = Extent { file: number, offset: 0, len: content.len() as u64 };
        match found {
            Some(crc) => {
                assert_eq!(crc, crc64(content));
                staging.sync(vec![ExtentRecord { extent, crc }]).await.unwrap();
            }
            None if content.is_empty() => {}
            None => {
                let (chunk, record) = chunk(files, number, 0, content.len());
                staging.write(vec![chunk]).await.unwrap();
                staging.sync(vec![record]).await.unwrap();
            }
        }
    }
    install(staging, files).await;
    assert_eq!(current(store).await.unwrap().1, as_tree(files));
    reused
}

#[tokio::test]
async fn files_are_found_by_digest_wherever_they_were() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    base(&store, true).await;
    let staging = store.stage(&plan_with_digests("next", 2, &next())).await.unwrap();
    assert_eq!(reuse_and_install(&store, &staging, &next()).await, [true, true, false, false]);
    drop((staging, store));
    // The index is made anew from what is installed.
    let (store, _) = open(dir.path()).await;
    let staging = store.stage(&plan_with_digests("third", 3, &next())).await.unwrap();
    assert_eq!(reuse_and_install(&store, &staging, &next()).await, [true, true, true, false]);
}

#[tokio::test]
async fn a_digest_that_was_not_sent_is_computed_for_a_file_of_the_same_name() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    base(&store, false).await;
    let staging = store.stage(&plan_with_digests("next", 2, &next())).await.unwrap();
    assert_eq!(reuse_and_install(&store, &staging, &next()).await, [true, false, false, false]);
}

#[tokio::test]
async fn a_changed_source_is_not_used_and_does_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    base(&store, true).await;
    let installed = dir.path().join("installed/shard-1/base");
    let mut content = fs::read(installed.join("same")).unwrap();
    content[2_999_999] ^= 1;
    fs::write(installed.join("same"), content).unwrap();
    fs::remove_file(installed.join("dir/moved")).unwrap();
    let staging = store.stage(&plan_with_digests("next", 2, &next())).await.unwrap();
    assert_eq!(staging.reuse(0, CancellationToken::new()).await.unwrap(), None);
    assert_eq!(staging.reuse(1, CancellationToken::new()).await.unwrap(), None);
    assert_eq!(fs::read_dir(dir.path().join("staging/next/reuse")).unwrap().count(), 0);
    assert!(!dir.path().join("staging/next/tree").exists(), "what was copied is not in the tree");
    assert_eq!(reuse_and_install(&store, &staging, &next()).await, [false; 4]);
}

#[tokio::test]
async fn a_copy_that_nobody_needs_any_more_ends() {
    for with_digests in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let (store, _) = open(dir.path()).await;
        base(&store, with_digests).await;
        let staging = store.stage(&plan_with_digests("next", 2, &next())).await.unwrap();
        let stop = CancellationToken::new();
        stop.cancel();
        assert_eq!(staging.reuse(0, stop).await.unwrap(), None);
        assert_eq!(fs::read_dir(dir.path().join("staging/next/reuse")).unwrap().count(), 0);
        assert!(staging.reuse(0, CancellationToken::new()).await.unwrap().is_some());
    }
}

#[tokio::test]
async fn a_store_that_does_not_reuse_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open_with(dir.path(), FileStoreOptions { reuse_installed: false, ..options() }).await;
    base(&store, true).await;
    let staging = store.stage(&plan_with_digests("next", 2, &next())).await.unwrap();
    assert_eq!(reuse_and_install(&store, &staging, &next()).await, [false; 4]);
}

#[tokio::test]
async fn a_replaced_snapshot_is_no_longer_offered() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    base(&store, true).await;
    let other: Files = vec![("x".to_owned(), content(9, 100))];
    let staging = store.stage(&plan_with_digests("other", 2, &other)).await.unwrap();
    assert_eq!(reuse_and_install(&store, &staging, &other).await, [false]);
    let staging = store.stage(&plan_with_digests("next", 3, &files())).await.unwrap();
    assert_eq!(reuse_and_install(&store, &staging, &files()).await, [false; 4]);
}

/// Whoever claims a digest that a file does not have makes a store read it once, not each time that somebody asks.
#[tokio::test]
async fn a_file_that_is_not_what_was_claimed_is_read_for_that_once() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let claimed: Files = vec![("a".to_owned(), content(1, 5000)), ("b".to_owned(), content(2, 5000))];
    let true_ones: Files = vec![("a".to_owned(), content(3, 5000)), ("b".to_owned(), content(2, 5000))];
    let staging = store.stage(&plan_with_digests("base", 1, &claimed)).await.unwrap();
    fill(&staging, &true_ones).await;
    install(&staging, &true_ones).await;
    let found = |content: &[u8]| {
        let size = content.len() as u64;
        let digest = blake3::hash(content);
        let next = |last: &_| store.shared.index.with_digest(digest.as_bytes(), size, Some(last));
        std::iter::successors(store.shared.index.with_digest(digest.as_bytes(), size, None), next).count()
    };
    assert_eq!((found(&claimed[0].1), found(&true_ones[0].1)), (1, 0));
    let staging = store.stage(&plan_with_digests("next", 2, &claimed)).await.unwrap();
    assert_eq!(staging.reuse(0, CancellationToken::new()).await.unwrap(), None);
    assert_eq!((found(&claimed[0].1), found(&true_ones[0].1)), (0, 1));
    // What it is can be had, and so can the other one.
    assert!(staging.reuse(1, CancellationToken::new()).await.unwrap().is_some());
    let staging = store.stage(&plan_with_digests("third", 3, &true_ones)).await.unwrap();
    assert_eq!(reuse_and_install(&store, &staging, &true_ones).await, [true, true]);
}

#[tokio::test]
async fn what_can_be_reused_has_a_limit_and_makes_room_where_one_node_has_most() {
    let dir = tempfile::tempdir().unwrap();
    // Room for two of the snapshots below, by digest or by name.
    let (store, _) = open_with(dir.path(), FileStoreOptions { reuse_index_bytes: 4200, ..options() }).await;
    let mut number = 0;
    let mut installs = async |id: &str, node: &str, digests: bool| {
        number += 1;
        let files: Files =
            (0..3).map(|file| (format!("{id}-{file}"), content(number * 10 + file, 50))).collect();
        let mut plan = if digests { plan_with_digests(id, 1, &files) } else { plan(id, 1, &files) };
        plan.spec.source_node = NodeId::new(node).unwrap();
        plan.spec.target_shard = ShardId::new(id).unwrap();
        let staging = store.stage(&plan).await.unwrap();
        fill(&staging, &files).await;
        install(&staging, &files).await;
        files
    };
    let a = installs("a", "n1", true).await;
    let b = installs("b", "n2", false).await;
    let c = installs("c", "n1", false).await;
    let d = installs("d", "n1", true).await;
    // Of n1's, the latest one is left, and n2's beside it.
    let mut all = Files::new();
    for files in [&a, &b, &c, &d] {
        all.extend(files.iter().cloned());
    }
    let staging = store.stage(&plan_with_digests("all", 2, &all)).await.unwrap();
    let reused = reuse_and_install(&store, &staging, &all).await;
    let of = |from: usize| reused[from..from + 3].to_vec();
    assert_eq!((of(0), of(3), of(6), of(9)), (vec![false; 3], vec![true; 3], vec![false; 3], vec![true; 3]));
}

/// Anybody may claim any digest: who looks for one looks at files of its size alone, and at none for nothing twice.
#[tokio::test]
async fn a_claim_of_a_file_of_another_size_is_not_looked_at() {
    let dir = tempfile::tempdir().unwrap();
    let (store, _) = open(dir.path()).await;
    let wanted: Files = vec![("a".to_owned(), content(1, 5000))];
    let short: Files = vec![("b".to_owned(), content(2, 100))];
    let mut plan = plan_with_digests("base", 1, &short);
    let mut files = plan.manifest.files().to_vec();
    files[0].blake3 = Some(Box::new(*blake3::hash(&wanted[0].1).as_bytes()));
    plan.manifest = Manifest::new(files).unwrap();
    let staging = store.stage(&plan).await.unwrap();
    fill(&staging, &short).await;
    install(&staging, &short).await;
    let digest = *blake3::hash(&wanted[0].1).as_bytes();
    let found = |size| store.shared.index.with_digest(&digest, size, None);
    assert!(found(5000).is_none() && found(100).is_some());
    // Nor is one that is gone, more than once; but one that cannot be opened now.
    let gone = found(100).unwrap().path();
    std::fs::remove_file(&gone).unwrap();
    let mut plan = plan_with_digests("next", 2, &short);
    let mut files = plan.manifest.files().to_vec();
    files[0].blake3 = Some(Box::new(digest));
    plan.manifest = Manifest::new(files).unwrap();
    let staging = store.stage(&plan).await.unwrap();
    std::os::unix::fs::symlink(&gone, &gone).unwrap();
    assert_eq!(staging.reuse(0, CancellationToken::new()).await.unwrap(), None);
    assert!(found(100).is_some(), "a loop of links is not opened, whoever asks");
    std::fs::remove_file(&gone).unwrap();
    assert_eq!(staging.reuse(0, CancellationToken::new()).await.unwrap(), None);
    assert!(found(100).is_none());
}
