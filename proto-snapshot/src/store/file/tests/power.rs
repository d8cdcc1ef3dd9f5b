//! Power cuts. The store lies on a file system of its own in an image file. After what the store said to be durable, the image is
//! copied as it is, with all that only the page cache knows missing, and that copy is looked at: what a disk would hold.
//!
//! Needs the right to mount (root on Linux) and `mkfs.ext4`; says so and passes where that is missing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use proto_common::fence::Fence;

use super::support::*;
use crate::store::{SnapshotStore as _, Staging as _, StagingState};

struct Mounted {
    at: PathBuf,
}

impl Mounted {
    fn new(what: &Path, at: &Path, options: &str) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        run("mount", &["-o", options, what.to_str()?, at.to_str()?]).then(|| Self { at: at.to_owned() })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run("umount", &["-l", self.at.to_str().unwrap()]);
    }
}

fn run(program: &str, args: &[&str]) -> bool {
    Command::new(program).args(args).output().is_ok_and(|output| output.status.success())
}

/// A new file system, mounted; `None` where that is not permitted.
fn file_system(dir: &Path) -> Option<(PathBuf, Mounted)> {
    let image = dir.join("image");
    fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let made = run("mkfs.ext4", &["-q", "-F", image.to_str()?]);
    // Long between the journal's own commits, so that nothing becomes durable by luck.
    let mounted = made.then(|| Mounted::new(&image, &dir.join("mounted"), "loop,commit=300")).flatten();
    if mounted.is_none() {
        eprintln!("SKIPPED: no right to mount a file system, or no mkfs.ext4: power cuts are not tested");
    }
    Some((image, mounted?))
}

/// What a power cut now would leave.
fn cut(dir: &Path, image: &Path, name: &str) -> Mounted {
    let copy = dir.join(name);
    fs::copy(image, &copy).unwrap();
    Mounted::new(&copy, &dir.join(format!("{name}.mounted")), "loop").unwrap()
}

#[tokio::test]
async fn what_was_synced_survives_a_power_cut() {
    let dir = tempfile::tempdir().unwrap();
    let Some((image, mounted)) = file_system(dir.path()) else { return };
    let files: Files = vec![
        ("new/deep/one".to_owned(), content(1, 100_000)),
        ("two".to_owned(), content(2, 3 << 20)),
        ("new/three".to_owned(), content(3, 50_000)),
    ];
    let root = mounted.at.join("store");
    let (store, _) = open(&root).await;
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();

    let (synced, record) = chunk(&files, 0, 0, 100_000);
    let (large, large_record) = chunk(&files, 1, 4096, 1 << 20);
    staging.write(vec![synced, large]).await.unwrap();
    staging.sync(vec![record, large_record]).await.unwrap();
    let (unsynced, unsynced_record) = chunk(&files, 2, 0, 50_000);
    staging.write(vec![unsynced]).await.unwrap();
    let (id, crc) = (record.extent, record.crc);
    {
        let after = cut(dir.path(), &image, "first");
        // The cut did cut something: what was written and not synced is not there.
        let lost = fs::read(after.at.join("store/staging/t1/tree/new/three")).unwrap_or_default();
        assert_ne!(lost, files[2].1, "a power cut that loses nothing proves nothing");
        let (_store, mut recovered) = open(&after.at.join("store")).await;
        assert_eq!(recovered.damage, Vec::<String>::new());
        let staging = recovered.staged.remove(0);
        assert_eq!(staging.records().len(), 2);
        assert_eq!(staging.checksum(id).await.unwrap(), crc);
        assert_eq!(staging.checksum(large_record.extent).await.unwrap(), large_record.crc);
    }
    staging.sync(vec![unsynced_record]).await.unwrap();
    let (head, head_record) = chunk(&files, 1, 0, 4096);
    let (tail, tail_record) = chunk(&files, 1, 4096 + (1 << 20), (2 << 20) - 4096);
    staging.write(vec![head, tail]).await.unwrap();
    staging.sync(vec![head_record, tail_record]).await.unwrap();
    staging.seal(&totals(&files)).await.unwrap();
    {
        let after = cut(dir.path(), &image, "sealed");
        let (store, mut recovered) = open(&after.at.join("store")).await;
        let staging = recovered.staged.remove(0);
        assert_eq!(staging.state(), StagingState::Sealed);
        install(&staging, &files).await;
        assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
    }
    staging.place().await.unwrap();
    {
        let after = cut(dir.path(), &image, "placed");
        assert_eq!(tree(&after.at.join("store/installed/shard-1/t1")), as_tree(&files));
        let (store, mut recovered) = open(&after.at.join("store")).await;
        assert_eq!(recovered.damage, Vec::<String>::new());
        install(&recovered.staged.remove(0), &files).await;
        assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
    }
    staging.activate().await.unwrap();
    {
        let after = cut(dir.path(), &image, "active");
        let (store, recovered) = open(&after.at.join("store")).await;
        assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
        assert_eq!(recovered.staged.len(), 1);
    }
    staging.remove().await.unwrap();
    store.record_finished(b"t1").await.unwrap();
    {
        let after = cut(dir.path(), &image, "removed");
        let (store, recovered) = open(&after.at.join("store")).await;
        assert!(recovered.staged.is_empty());
        assert_eq!(recovered.finished, [b"t1".to_vec()]);
        assert_eq!(current(&store).await.unwrap().1, as_tree(&files));
    }
}

/// So many that the whole file system is synced at once, and with few open files.
#[tokio::test]
async fn many_small_files_survive_a_power_cut() {
    let dir = tempfile::tempdir().unwrap();
    let Some((image, mounted)) = file_system(dir.path()) else { return };
    let files: Files = (0..500).map(|n| (format!("d{}/{n}", n % 20), content(n, 2000))).collect();
    let options = super::FileStoreOptions { max_open_files: 10, ..options() };
    let (store, _) = open_with(&mounted.at.join("store"), options).await;
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    let (chunks, records) = (0..500).map(|n| chunk(&files, n, 0, 2000)).unzip::<_, _, Vec<_>, Vec<_>>();
    staging.write(chunks).await.unwrap();
    staging.sync(records).await.unwrap();
    let after = cut(dir.path(), &image, "after");
    let (_store, mut recovered) = open(&after.at.join("store")).await;
    assert_eq!(recovered.damage, Vec::<String>::new());
    let staging = recovered.staged.remove(0);
    assert_eq!(staging.records().len(), 500);
    for record in staging.records() {
        assert_eq!(staging.checksum(record.extent).await.unwrap(), record.crc);
    }
}

/// A process that was killed may have left files and directories that no power cut would: they are synced once they are used again.
#[tokio::test]
async fn what_a_killed_process_created_is_made_durable_by_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let Some((image, mounted)) = file_system(dir.path()) else { return };
    let files: Files = vec![("new/deep/one".to_owned(), content(1, 100_000))];
    let root = mounted.at.join("store");
    let (store, _) = open(&root).await;
    let staging = store.stage(&plan("t1", 1, &files)).await.unwrap();
    let (first, _) = chunk(&files, 0, 0, 1000);
    staging.write(vec![first]).await.unwrap();
    // As after SIGKILL: the file is there, in memory only.
    drop((staging, store));
    let (_store, mut recovered) = open(&root).await;
    let staging = recovered.staged.remove(0);
    let (all, record) = chunk(&files, 0, 0, 100_000);
    staging.write(vec![all]).await.unwrap();
    staging.sync(vec![record]).await.unwrap();
    let after = cut(dir.path(), &image, "after");
    let (_store, mut recovered) = open(&after.at.join("store")).await;
    assert_eq!(recovered.damage, Vec::<String>::new());
    assert_eq!(recovered.staged.remove(0).checksum(record.extent).await.unwrap(), record.crc);
}

/// A fence that was reported must hold after any crash, also if the write that raised it failed when it had replaced the file.
#[tokio::test]
async fn a_fence_is_durable_when_it_is_returned_also_after_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    let Some((image, mounted)) = file_system(dir.path()) else { return };
    let (old, new) = (Fence { epoch: 1, term: 1 }, Fence { epoch: 1, term: 5 });
    // What the record looks like with the new fence.
    let elsewhere = dir.path().join("elsewhere");
    open(&elsewhere).await.0.raise_fence(&shard(), new, &source()).await.unwrap();
    let raised = fs::read(elsewhere.join("shards/shard-1/CURRENT")).unwrap();

    let root = mounted.at.join("store");
    let (store, _) = open(&root).await;
    assert_eq!(store.raise_fence(&shard(), old, &source()).await.unwrap(), old);
    let at = |file: &str| root.join("shards/shard-1").join(file);
    fs::create_dir(at("CURRENT.tmp")).unwrap();
    store.raise_fence(&shard(), new, &source()).await.unwrap_err();
    fs::remove_dir(at("CURRENT.tmp")).unwrap();
    // What it would have left, had it failed later: everything but the synced directory.
    fs::write(at("CURRENT.tmp"), &raised).unwrap();
    fs::rename(at("CURRENT.tmp"), at("CURRENT")).unwrap();
    let fence = async |cut: Mounted| {
        let (store, _) = open(&cut.at.join("store")).await;
        store.shard(&shard()).await.unwrap().fence
    };
    let before = cut(dir.path(), &image, "before");
    assert_eq!(fence(before).await, old, "a power cut that loses nothing proves nothing");
    assert_eq!(store.raise_fence(&shard(), new, &source()).await.unwrap(), new);
    let after = cut(dir.path(), &image, "after");
    assert_eq!(fence(after).await, new);
}
