//! A source and a store in memory, so that nothing is measured but what lies between them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use futures::{StreamExt as _, stream};
use proto_common::fence::Fence;
use proto_common::ids::{NodeId, ShardId, TransferId};
use proto_common::path::FileName;
use proto_snapshot::extent::{Extent, ExtentRecord};
use proto_snapshot::source::{Description, PieceStream, SnapshotSource, SourceError};
use proto_snapshot::spec::{FileTotal, ManifestFile, TransferPlan};
use proto_snapshot::store::{
    Claim, PlacedSnapshot, Recovered, ShardState, SnapshotStore, StagedChunk, Staging, StagingState,
    StoreError,
};
use tokio_util::sync::CancellationToken;

use crate::payload::Payload;

/// `bytes` bytes in `files` files.
#[derive(Debug, Clone)]
pub struct MemorySource {
    payload: Payload,
    bytes: u64,
    files: u64,
    /// Gives no byte from this position on, counted over all files.
    stop_at: u64,
    watched: Arc<Watched>,
    given: Arc<AtomicU64>,
}

/// When the first byte from a position on was asked for.
#[derive(Debug)]
pub struct Watched {
    from: u64,
    first: Mutex<Option<Instant>>,
}

impl Watched {
    pub fn first(&self) -> Option<Instant> {
        *self.first.lock().unwrap()
    }
}

impl MemorySource {
    pub fn new(payload: Payload, bytes: u64, files: u64) -> Self {
        let watched = Arc::new(Watched { from: u64::MAX, first: Mutex::new(None) });
        Self { payload, bytes, files: files.max(1), stop_at: u64::MAX, watched, given: Arc::default() }
    }

    /// Bytes that were read of it.
    pub fn given(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.given)
    }

    pub fn stop_at(self, position: u64) -> Self {
        Self { stop_at: position, ..self }
    }

    pub fn watch_from(self, position: u64) -> (Self, Arc<Watched>) {
        let watched = Arc::new(Watched { from: position, first: Mutex::new(None) });
        (Self { watched: Arc::clone(&watched), ..self }, watched)
    }

    /// Where a file begins, counted over all.
    fn start(&self, file: u64) -> u64 {
        self.bytes / self.files * file + (self.bytes % self.files).min(file)
    }
}

impl SnapshotSource for MemorySource {
    async fn describe(&self, _digests: bool) -> Result<Description, SourceError> {
        let files = (0..self.files).map(|number| ManifestFile {
            name: FileName::new(&format!("file-{number:06}")).unwrap(),
            size: Some(self.start(number + 1) - self.start(number)),
            blake3: None,
        });
        Ok(Description { files: files.collect(), content_version: "1".to_owned() })
    }

    async fn open(
        &self,
        file: u32,
        offset: u64,
        len: Option<u64>,
        piece: usize,
    ) -> Result<PieceStream, SourceError> {
        let start = self.start(file.into());
        let end = len.map_or_else(|| self.start(u64::from(file) + 1), |len| start + offset + len);
        let (from, stop_at) = (start + offset, self.stop_at);
        if from >= self.watched.from {
            self.watched.first.lock().unwrap().get_or_insert_with(Instant::now);
        }
        let (payload, given) = (self.payload.clone(), self.given());
        let pieces = (0..(end - from).div_ceil(piece as u64)).map(move |number| from + number * piece as u64);
        let pieces = stream::iter(pieces).then(move |at| {
            let piece = payload.at(at, piece.min((end - at) as usize));
            given.fetch_add(piece.len() as u64, Ordering::Relaxed);
            async move {
                if at + piece.len() as u64 > stop_at {
                    std::future::pending::<()>().await;
                }
                Ok(piece)
            }
        });
        Ok(Box::pin(pieces))
    }
}

/// Forgets the bytes and keeps what is known of them. The receiver has compared their checksums, each chunk's before it is
/// written, each file's before it is sealed.
#[derive(Debug, Default)]
pub struct DiscardStore {
    areas: Mutex<HashMap<TransferId, Arc<DiscardStaging>>>,
    shards: Arc<Mutex<HashMap<ShardId, ShardState>>>,
}

#[derive(Debug)]
pub struct DiscardStaging {
    plan: TransferPlan,
    claim: Mutex<Claim>,
    bytes: AtomicU64,
    shards: Arc<Mutex<HashMap<ShardId, ShardState>>>,
}

impl SnapshotStore for DiscardStore {
    type Staging = DiscardStaging;

    async fn recover(&self) -> Result<Recovered<DiscardStaging>, StoreError> {
        Ok(Recovered { staged: Vec::new(), finished: Vec::new(), damage: Vec::new() })
    }

    async fn shard(&self, shard: &ShardId) -> Result<ShardState, StoreError> {
        Ok(self.shards.lock().unwrap().get(shard).cloned().unwrap_or_default())
    }

    async fn current_plan(&self, _: &ShardId) -> Result<Option<TransferPlan>, StoreError> {
        Ok(None)
    }

    async fn raise_fence(&self, shard: &ShardId, fence: Fence, _: &NodeId) -> Result<Fence, StoreError> {
        let mut shards = self.shards.lock().unwrap();
        let state = shards.entry(shard.clone()).or_default();
        state.fence = state.fence.max(fence);
        Ok(state.fence)
    }

    async fn stage(&self, plan: &TransferPlan) -> Result<Arc<DiscardStaging>, StoreError> {
        let staging = Arc::new(DiscardStaging {
            plan: plan.clone(),
            claim: Mutex::new(Claim { attempt: 0, session: [0; 16] }),
            bytes: AtomicU64::new(0),
            shards: Arc::clone(&self.shards),
        });
        self.areas.lock().unwrap().insert(plan.spec.transfer_id.clone(), Arc::clone(&staging));
        Ok(staging)
    }

    async fn record_finished(&self, _: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }
}

impl Staging for DiscardStaging {
    fn plan(&self) -> &TransferPlan {
        &self.plan
    }

    fn state(&self) -> StagingState {
        StagingState::Open
    }

    fn claim(&self) -> Claim {
        *self.claim.lock().unwrap()
    }

    async fn set_claim(&self, claim: Claim) -> Result<(), StoreError> {
        *self.claim.lock().unwrap() = claim;
        Ok(())
    }

    fn records(&self) -> Vec<ExtentRecord> {
        Vec::new()
    }

    fn last_activity_unix_ms(&self) -> u64 {
        proto_common::clock::now_unix_ms()
    }

    async fn write(&self, chunks: Vec<StagedChunk>) -> Result<(), StoreError> {
        let bytes: u64 = chunks.iter().map(|chunk| chunk.payload.len() as u64).sum();
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(())
    }

    async fn sync(&self, _: Vec<ExtentRecord>) -> Result<(), StoreError> {
        Ok(())
    }

    async fn checksum(&self, _: Extent) -> Result<u64, StoreError> {
        unreachable!("nothing of an earlier process is here")
    }

    async fn reset_records(&self, _: Vec<ExtentRecord>) -> Result<(), StoreError> {
        unreachable!("nothing of an earlier process is here")
    }

    async fn reuse(&self, _: u32, _: CancellationToken) -> Result<Option<u64>, StoreError> {
        Ok(None)
    }

    async fn seal(&self, totals: &[FileTotal]) -> Result<(), StoreError> {
        let total: u64 = totals.iter().map(|total| total.size).sum();
        assert_eq!(self.bytes.load(Ordering::Relaxed), total, "every byte was written once");
        Ok(())
    }

    async fn place(&self) -> Result<PlacedSnapshot, StoreError> {
        Ok(PlacedSnapshot { path: None, plan: self.plan.clone() })
    }

    async fn activate(&self) -> Result<(), StoreError> {
        let spec = &self.plan.spec;
        let mut shards = self.shards.lock().unwrap();
        let state = shards.entry(spec.target_shard.clone()).or_default();
        (state.high_water, state.current) = (Some(spec.point), Some(spec.transfer_id.clone()));
        Ok(())
    }

    async fn remove(&self) -> Result<(), StoreError> {
        Ok(())
    }
}
