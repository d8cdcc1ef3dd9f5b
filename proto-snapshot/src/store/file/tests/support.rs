//! Plans, contents and walks that the tests share.

use std::collections::BTreeMap;
use std::path::Path;

use bytes::Bytes;
use proto_common::checksum::crc64;
use proto_common::ids::{NodeId, ShardId, TransferId};
use proto_common::path::FileName;
use proto_common::slots::SlotRange;

pub(crate) use super::tree::tree;
use crate::extent::{Extent, ExtentRecord};
use crate::spec::{FileTotal, Manifest, ManifestFile, SnapshotPoint, TransferPlan, TransferSpec};
use crate::store::file::{FileSnapshotStore, FileStaging, FileStoreOptions};
use crate::store::{Recovered, SnapshotStore as _, StagedChunk, Staging as _};

/// Names and contents.
pub(crate) type Files = Vec<(String, Vec<u8>)>;

pub(crate) fn shard() -> ShardId {
    ShardId::new("shard-1").unwrap()
}

/// The node that the snapshots come from.
pub(crate) fn source() -> NodeId {
    NodeId::new("n1").unwrap()
}

pub(crate) fn spec(id: &str, index: u64) -> TransferSpec {
    TransferSpec {
        transfer_id: TransferId::new(id).unwrap(),
        source_shard: ShardId::new("shard-0").unwrap(),
        target_shard: shard(),
        source_node: source(),
        slots: SlotRange::new(8192, 16384).unwrap(),
        point: SnapshotPoint { term: 3, index },
        content_version: "v1".to_owned(),
    }
}

pub(crate) fn plan(id: &str, index: u64, files: &Files) -> TransferPlan {
    let files = files.iter().map(|(name, content)| ManifestFile {
        name: FileName::new(name).unwrap(),
        size: Some(content.len() as u64),
        blake3: None,
    });
    TransferPlan { spec: spec(id, index), manifest: Manifest::new(files.collect()).unwrap() }
}

/// The same with digests.
pub(crate) fn plan_with_digests(id: &str, index: u64, files: &Files) -> TransferPlan {
    let manifest = files.iter().map(|(name, content)| ManifestFile {
        name: FileName::new(name).unwrap(),
        size: Some(content.len() as u64),
        blake3: Some(Box::new(*blake3::hash(content).as_bytes())),
    });
    TransferPlan { spec: spec(id, index), manifest: Manifest::new(manifest.collect()).unwrap() }
}

/// Bytes that are the same each time and differ at each place.
pub(crate) fn content(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

pub(crate) fn chunk(files: &Files, file: u32, offset: usize, len: usize) -> (StagedChunk, ExtentRecord) {
    let payload = Bytes::copy_from_slice(&files[file as usize].1[offset..offset + len]);
    let extent = Extent { file, offset: offset as u64, len: len as u64 };
    let record = ExtentRecord { extent, crc: crc64(&payload) };
    (StagedChunk { file, offset: offset as u64, payload: payload.into() }, record)
}

pub(crate) fn totals(files: &Files) -> Vec<FileTotal> {
    files.iter().map(|(_, content)| FileTotal { size: content.len() as u64, crc: crc64(content) }).collect()
}

/// Writes all of it in chunks and syncs.
pub(crate) async fn fill(staging: &FileStaging, files: &Files) {
    for (number, (_, content)) in (0_u32..).zip(files) {
        for offset in (0..content.len()).step_by(64 << 10) {
            let (chunk, record) = chunk(files, number, offset, (content.len() - offset).min(64 << 10));
            staging.write(vec![chunk]).await.unwrap();
            staging.sync(vec![record]).await.unwrap();
        }
    }
}

pub(crate) async fn install(staging: &FileStaging, files: &Files) {
    staging.seal(&totals(files)).await.unwrap();
    staging.place().await.unwrap();
    staging.activate().await.unwrap();
    staging.remove().await.unwrap();
}

/// Options without the margins that a small disk might not have.
pub(crate) fn options() -> FileStoreOptions {
    FileStoreOptions {
        min_free_bytes: 0,
        min_free_files: 0,
        percent_per_peer: 100,
        ..FileStoreOptions::default()
    }
}

pub(crate) async fn open(dir: &Path) -> (FileSnapshotStore, Recovered<FileStaging>) {
    open_with(dir, options()).await
}

pub(crate) async fn open_with(
    dir: &Path,
    options: FileStoreOptions,
) -> (FileSnapshotStore, Recovered<FileStaging>) {
    let store = FileSnapshotStore::open(dir, options).unwrap();
    let recovered = store.recover().await.unwrap();
    (store, recovered)
}

pub(crate) fn as_tree(files: &Files) -> BTreeMap<String, Vec<u8>> {
    files.iter().cloned().collect()
}

/// The content of the current snapshot.
pub(crate) async fn current(store: &FileSnapshotStore) -> Option<(TransferId, BTreeMap<String, Vec<u8>>)> {
    let current = store.current(&shard()).await.unwrap()?;
    Some((current.plan.spec.transfer_id, tree(&current.path.unwrap())))
}

/// A file system in memory where there is one: for tests that open a store thousands of times and are not about syncing.
pub(crate) fn fast_dir() -> std::path::PathBuf {
    let shm = Path::new("/dev/shm");
    if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() }
}
