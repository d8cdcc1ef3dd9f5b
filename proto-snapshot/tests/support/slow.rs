//! A store in a directory whose writes wait until they are told to go on.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses a part of it")]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use proto_common::fence::Fence;
use proto_common::ids::{NodeId, ShardId};
use proto_snapshot::extent::{Extent, ExtentRecord};
use proto_snapshot::spec::{FileTotal, TransferPlan};
use proto_snapshot::store::{
    Claim, FileSnapshotStore, FileStaging, PlacedSnapshot, Recovered, ShardState, SnapshotStore, StagedChunk,
    Staging, StagingState, StoreError,
};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What holds the writes of a [`SlowStore`].
#[derive(Debug, Clone)]
pub struct Brake {
    held: watch::Sender<bool>,
    /// Writes that have begun, of those that it may hold.
    pub begun: watch::Sender<usize>,
    /// The source node whose writes it holds; `None`: of all.
    of: Option<&'static str>,
    pub reuses: Arc<Mutex<Reuses>>,
    /// Most records that were synced at once.
    pub most_synced: Arc<AtomicUsize>,
    /// Removals that are still to fail.
    pub removals_fail: Arc<AtomicUsize>,
    /// Resets of records that are still to fail.
    pub resets_fail: Arc<AtomicUsize>,
    /// Seals that are still to fail.
    pub seals_fail: Arc<AtomicUsize>,
}

/// Files that are looked for among installed ones.
#[derive(Debug, Default)]
pub struct Reuses {
    /// The source nodes of those that are now.
    pub now: Vec<String>,
    /// Most at once: of all, and of one source node.
    pub most: (usize, usize),
    pub ever: usize,
    /// Those that were stopped while they were held.
    pub stopped: usize,
}

impl Brake {
    pub fn held() -> Self {
        Self {
            held: watch::Sender::new(true),
            begun: watch::Sender::new(0),
            of: None,
            reuses: Arc::default(),
            most_synced: Arc::default(),
            removals_fail: Arc::default(),
            resets_fail: Arc::default(),
            seals_fail: Arc::default(),
        }
    }

    /// One that holds nothing.
    pub fn released() -> Self {
        let brake = Self::held();
        brake.release();
        brake
    }

    /// Holds the writes of one source node.
    pub fn held_for(node: &'static str) -> Self {
        Self { of: Some(node), ..Self::held() }
    }

    pub fn hold(&self) {
        self.held.send_replace(true);
    }

    pub fn release(&self) {
        self.held.send_replace(false);
    }

    async fn pass(&self, plan: &TransferPlan) {
        if self.of.is_some_and(|node| plan.spec.source_node.as_str() != node) {
            return;
        }
        self.begun.send_modify(|begun| *begun += 1);
        self.held.subscribe().wait_for(|held| !held).await.unwrap();
    }
}

pub struct SlowStore {
    pub store: FileSnapshotStore,
    pub brake: Brake,
}

#[derive(Debug)]
pub struct SlowStaging {
    staging: Arc<FileStaging>,
    brake: Brake,
}

impl SlowStore {
    fn slow(&self, staging: Arc<FileStaging>) -> Arc<SlowStaging> {
        Arc::new(SlowStaging { staging, brake: self.brake.clone() })
    }
}

/// Fails if that is `left` to do.
fn planted(left: &AtomicUsize, action: &'static str) -> Result<(), StoreError> {
    match left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)) {
        Ok(_) => Err(StoreError::Io { action, source: std::io::Error::other("planted") }),
        Err(_) => Ok(()),
    }
}

impl SnapshotStore for SlowStore {
    type Staging = SlowStaging;

    async fn recover(&self) -> Result<Recovered<SlowStaging>, StoreError> {
        let Recovered { staged, finished, damage } = self.store.recover().await?;
        let staged = staged.into_iter().map(|staging| self.slow(staging)).collect();
        Ok(Recovered { staged, finished, damage })
    }

    async fn shard(&self, shard: &ShardId) -> Result<ShardState, StoreError> {
        self.store.shard(shard).await
    }

    async fn current_plan(&self, shard: &ShardId) -> Result<Option<TransferPlan>, StoreError> {
        self.store.current_plan(shard).await
    }

    async fn raise_fence(&self, shard: &ShardId, fence: Fence, source: &NodeId) -> Result<Fence, StoreError> {
        self.store.raise_fence(shard, fence, source).await
    }

    async fn stage(&self, plan: &TransferPlan) -> Result<Arc<SlowStaging>, StoreError> {
        self.store.stage(plan).await.map(|staging| self.slow(staging))
    }

    async fn record_finished(&self, record: &[u8]) -> Result<(), StoreError> {
        self.store.record_finished(record).await
    }
}

impl Staging for SlowStaging {
    fn plan(&self) -> &TransferPlan {
        self.staging.plan()
    }

    fn state(&self) -> StagingState {
        self.staging.state()
    }

    fn claim(&self) -> Claim {
        self.staging.claim()
    }

    async fn set_claim(&self, claim: Claim) -> Result<(), StoreError> {
        self.staging.set_claim(claim).await
    }

    fn records(&self) -> Vec<ExtentRecord> {
        self.staging.records()
    }

    fn last_activity_unix_ms(&self) -> u64 {
        self.staging.last_activity_unix_ms()
    }

    async fn write(&self, chunks: Vec<StagedChunk>) -> Result<(), StoreError> {
        self.brake.pass(self.staging.plan()).await;
        self.staging.write(chunks).await
    }

    async fn sync(&self, records: Vec<ExtentRecord>) -> Result<(), StoreError> {
        self.brake.most_synced.fetch_max(records.len(), Ordering::SeqCst);
        self.staging.sync(records).await
    }

    async fn checksum(&self, extent: Extent) -> Result<u64, StoreError> {
        self.staging.checksum(extent).await
    }

    async fn reset_records(&self, records: Vec<ExtentRecord>) -> Result<(), StoreError> {
        planted(&self.brake.resets_fail, "reset records")?;
        self.staging.reset_records(records).await
    }

    async fn reuse(&self, file: u32, stop: CancellationToken) -> Result<Option<u64>, StoreError> {
        let plan = self.staging.plan();
        let source = plan.spec.source_node.to_string();
        {
            let mut reuses = self.brake.reuses.lock().unwrap();
            reuses.now.push(source.clone());
            reuses.ever += 1;
            let of_it = reuses.now.iter().filter(|now| **now == source).count();
            reuses.most = (reuses.most.0.max(reuses.now.len()), reuses.most.1.max(of_it));
        }
        tokio::select! {
            () = self.brake.pass(plan) => {}
            () = stop.cancelled() => self.brake.reuses.lock().unwrap().stopped += 1,
        }
        let found = self.staging.reuse(file, stop).await;
        let mut reuses = self.brake.reuses.lock().unwrap();
        let at = reuses.now.iter().position(|now| *now == source).unwrap();
        reuses.now.remove(at);
        found
    }

    async fn rest(&self) -> Result<(), StoreError> {
        self.staging.rest().await
    }

    async fn seal(&self, totals: &[FileTotal]) -> Result<(), StoreError> {
        planted(&self.brake.seals_fail, "seal a snapshot")?;
        self.staging.seal(totals).await
    }

    async fn place(&self) -> Result<PlacedSnapshot, StoreError> {
        self.staging.place().await
    }

    async fn activate(&self) -> Result<(), StoreError> {
        self.staging.activate().await
    }

    async fn discard(&self) -> Result<(), StoreError> {
        self.staging.discard().await
    }

    async fn remove(&self) -> Result<(), StoreError> {
        planted(&self.brake.removals_fail, "remove a staging area")?;
        self.staging.remove().await
    }
}
