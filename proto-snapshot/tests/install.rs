//! What the owner of a store is asked on an install: exactly what is left to do, also where a crash came in between.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use proto_common::checksum::crc64;
use proto_common::error::{Code, Error};
use proto_common::ids::TransferId;
use proto_common::path::FileName;
use proto_common::v1::Direction;
use proto_snapshot::Reason;
use proto_snapshot::extent::{Extent, ExtentRecord};
use proto_snapshot::hook::{Hold, HookFuture, InstallHook};
use proto_snapshot::sender::SnapshotSender;
use proto_snapshot::source::DirectorySource;
use proto_snapshot::spec::{FileTotal, Manifest, ManifestFile, TransferPlan, TransferSpec};
use proto_snapshot::store::{
    FileSnapshotStore, FileStoreOptions, PlacedSnapshot, SnapshotStore as _, StagedChunk, Staging as _,
};
use proto_snapshot::v1::{TransferPhase, TransferProgress};
use support::*;

const CONTENT: &[u8] = b"rows";

/// Counts the merges, and keeps files or not.
#[derive(Debug)]
struct Counting {
    merges: Arc<AtomicUsize>,
    keeps_files: bool,
}

impl InstallHook for Counting {
    fn install<'a>(&'a self, snapshot: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        let found = std::fs::read(snapshot.path.as_ref().unwrap().join("file")).unwrap();
        assert_eq!(found, CONTENT, "the files are there when they are merged");
        self.merges.fetch_add(1, Ordering::SeqCst);
        Box::pin(async { Ok(()) })
    }

    fn keeps_files(&self, _: &TransferPlan) -> bool {
        self.keeps_files
    }
}

/// Refuses what is new, and tells which of the two it was called for.
#[derive(Debug)]
struct Full(std::sync::mpsc::Sender<&'static str>);

impl InstallHook for Full {
    fn admit<'a>(&'a self, _: &'a TransferPlan) -> HookFuture<'a, Hold> {
        self.0.send("admit").unwrap();
        Box::pin(async { Err(Reason::InstallRefused.error("no room")) })
    }

    fn readmit<'a>(&'a self, _: &'a TransferPlan) -> HookFuture<'a, Hold> {
        self.0.send("readmit").unwrap();
        Box::pin(async { Ok(Box::new(()) as Hold) })
    }

    fn install<'a>(&'a self, _: &'a PlacedSnapshot) -> HookFuture<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}

/// What a process leaves that dies after the first `steps` of: seal, place, activate, discard.
async fn leave_after(steps: usize, dir: &Path) {
    let what = snapshot("t1");
    let spec = TransferSpec {
        transfer_id: what.transfer_id,
        source_shard: what.source_shard,
        target_shard: what.target_shard,
        source_node: what.source_node,
        slots: what.slots,
        point: what.point,
        content_version: "v1".to_owned(),
    };
    let file =
        ManifestFile { name: FileName::new("file").unwrap(), size: Some(CONTENT.len() as u64), blake3: None };
    let plan = TransferPlan { spec, manifest: Manifest::new(vec![file]).unwrap() };
    let store = FileSnapshotStore::open(dir, FileStoreOptions::default()).unwrap();
    store.recover().await.unwrap();
    let staging = store.stage(&plan).await.unwrap();
    let payload = Bytes::from_static(CONTENT).into();
    staging.write(vec![StagedChunk { file: 0, offset: 0, payload }]).await.unwrap();
    let extent = Extent { file: 0, offset: 0, len: CONTENT.len() as u64 };
    staging.sync(vec![ExtentRecord { extent, crc: crc64(CONTENT) }]).await.unwrap();
    staging.seal(&[FileTotal { size: CONTENT.len() as u64, crc: crc64(CONTENT) }]).await.unwrap();
    if steps > 1 {
        staging.place().await.unwrap();
    }
    if steps > 2 {
        staging.activate().await.unwrap();
    }
    if steps > 3 {
        staging.discard().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_current_is_not_merged_again_and_what_is_not_is() {
    for steps in 1..=4 {
        for keeps_files in [true, false] {
            let dir = tempfile::tempdir().unwrap();
            leave_after(steps, dir.path()).await;
            let merges = Arc::new(AtomicUsize::new(0));
            let hook = Counting { merges: Arc::clone(&merges), keeps_files };
            let server = Server::start(builder(dir.path()).hook(hook)).await;
            let transfers = server.receiver.transfers();
            let mut watch = transfers.registry().watch(Some(Direction::In), "t1").unwrap();
            let ended = async {
                let mut last = None;
                while let Some(state) = watch.next().await {
                    last = Some(state);
                }
                last.unwrap()
            };
            let last = tokio::time::timeout(LONG, ended).await.unwrap();
            assert_eq!(last.phase(), TransferPhase::Installed);
            let expected = if steps < 3 { 1 } else { 0 };
            assert_eq!(merges.load(Ordering::SeqCst), expected, "after {steps} steps");
            let there = installed_dir(dir.path(), "t1").join("file").exists();
            assert_eq!(there, keeps_files && steps < 4, "after {steps} steps");
            assert!(staging_is_empty(dir.path()));
            let shard = server.receiver.store().shard(&snapshot("t1").target_shard).await.unwrap();
            assert_eq!(shard.current, Some(TransferId::new("t1").unwrap()));
            server.stop().await;
        }
    }
}

async fn send(server: &Server, id: &str, tree: &Path) -> Result<(), Error> {
    let endpoint = proto_common::tuning::endpoint(&server.uri()).unwrap();
    let sending = SnapshotSender::new(endpoint).send(snapshot(id), DirectorySource::new(tree));
    tokio::time::timeout(LONG, sending.unwrap().join()).await.expect("it ends").map(|_| ())
}

/// Flips the last bit of what is recorded of the shard of all these snapshots.
fn damage_shard(dir: &Path) {
    let record = dir.join("shards/s2/CURRENT");
    let mut content = std::fs::read(&record).unwrap();
    *content.last_mut().unwrap() ^= 1;
    std::fs::write(record, content).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shard_whose_record_is_damaged_is_refused_for_good_and_no_path_is_told() {
    let (dir, tree) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    make_tree(tree.path(), 3, 1000, 1);
    let server = Server::start(builder(dir.path())).await;
    send(&server, "t1", tree.path()).await.unwrap();
    damage_shard(dir.path());
    let error = send(&server, "t2", tree.path()).await.unwrap_err();
    assert_eq!((error.code(), error.reason()), (Code::FailedPrecondition, "INSTALL_REFUSED"), "{error:?}");
    assert!(!error.is_retryable(), "{error:?}");
    assert_eq!(
        error.message(),
        "the receiver's record of shard s2 is damaged: it takes no snapshot of that shard until the record is repaired or removed; its log says where"
    );
    let facts: Vec<_> = error.metadata_map().iter().collect();
    assert_eq!(facts, [(&"shard".to_owned(), &"s2".to_owned())]);
    assert!(staging_is_empty(dir.path()));
    server.stop().await;
}

/// What an earlier process has sealed it may have merged, too: a sender that heard that it failed would believe that it was not.
#[tokio::test(flavor = "multi_thread")]
async fn what_may_be_merged_does_not_fail_because_the_record_of_its_shard_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    leave_after(2, dir.path()).await;
    let record = dir.path().join("shards/s2/CURRENT");
    std::fs::write(&record, "damaged").unwrap();
    let merges = Arc::new(AtomicUsize::new(0));
    let hook = Counting { merges: Arc::clone(&merges), keeps_files: true };
    let server = Server::start(builder(dir.path()).hook(hook)).await;
    let transfers = server.receiver.transfers();
    let shown = || transfers.registry().get(Some(Direction::In), "t1").unwrap();
    let error = |shown: TransferProgress| shown.progress.and_then(|progress| progress.error);
    until("it says what is wrong", || error(shown()).is_some()).await;
    assert_eq!(shown().phase(), TransferPhase::Installing);
    assert_eq!(error(shown()).unwrap().reason, "INSTALL_REFUSED");
    assert_eq!(merges.load(Ordering::SeqCst), 0);
    std::fs::remove_file(record).unwrap();
    until("it is installed", || shown().phase() == TransferPhase::Installed).await;
    assert_eq!(merges.load(Ordering::SeqCst), 1);
    server.stop().await;
}

/// What was admitted once need not fulfil again, at a restart, what only a new transfer has to.
#[tokio::test(flavor = "multi_thread")]
async fn an_unfinished_transfer_is_readmitted_at_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    leave_after(1, dir.path()).await;
    let (called, calls) = std::sync::mpsc::channel();
    // An Arc forwards it.
    let hook = Arc::new(Full(called));
    let server = Server::start(builder(dir.path()).hook(hook)).await;
    assert_eq!(calls.try_iter().collect::<Vec<_>>(), ["readmit"]);
    let _ = server;
}
