//! What the owner of a store is asked on an install: exactly what is left to do, also where a crash came in between.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use proto_common::checksum::crc64;
use proto_common::ids::TransferId;
use proto_common::path::FileName;
use proto_common::v1::Direction;
use proto_snapshot::extent::{Extent, ExtentRecord};
use proto_snapshot::hook::{HookFuture, InstallHook};
use proto_snapshot::spec::{FileTotal, Manifest, ManifestFile, TransferPlan, TransferSpec};
use proto_snapshot::store::{
    FileSnapshotStore, FileStoreOptions, PlacedSnapshot, SnapshotStore as _, StagedChunk, Staging as _,
};
use proto_snapshot::v1::TransferPhase;
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
