//! A snapshot store in memory: what was synced outlives a crash of its host, the rest is lost.
//!
//! The simulation has one of its own because [`FileSnapshotStore`](proto_snapshot::FileSnapshotStore) works on threads, whose order no seed
//! decides. It is also what somebody would write who keeps snapshots elsewhere than in files.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use proto_common::checksum::crc64;
use proto_common::fence::Fence;
use proto_common::ids::{NodeId, ShardId, TransferId};
use proto_snapshot::extent::{Extent, ExtentRecord};
use proto_snapshot::spec::{FileTotal, TransferPlan};
use proto_snapshot::store::{
    Claim, PlacedSnapshot, Recovered, ShardState, SnapshotStore, StagedChunk, Staging, StagingState,
    StoreError,
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::trace::Trace;

/// How long the disk takes, so that a crash can come between two steps.
const WRITE: Duration = Duration::from_millis(1);
const SYNC: Duration = Duration::from_millis(8);

/// What lies on the disk of one host. Clones are the same disk.
#[derive(Debug, Clone)]
pub struct Disk {
    content: Arc<Mutex<Content>>,
    pub trace: Trace,
}

#[derive(Debug, Default)]
struct Content {
    areas: BTreeMap<TransferId, Area>,
    shards: BTreeMap<ShardId, (ShardState, Option<TransferPlan>)>,
    installed: BTreeMap<TransferId, Vec<Vec<u8>>>,
    history: Vec<Vec<u8>>,
    /// Bytes that were written and not synced before a crash.
    lost: u64,
    /// Bytes that were written.
    written: u64,
}

#[derive(Debug)]
struct Area {
    plan: TransferPlan,
    claim: Claim,
    files: Vec<BTreeMap<u64, Bytes>>,
    /// In the memory of the host.
    unsynced: Vec<StagedChunk>,
    records: Vec<ExtentRecord>,
    totals: Option<Vec<FileTotal>>,
}

impl Area {
    /// The stored bytes of an extent; `None` where some are not there.
    fn read(&self, extent: Extent) -> Option<Vec<u8>> {
        let mut found = Vec::new();
        let mut at = extent.offset;
        for (&offset, bytes) in &self.files[extent.file as usize] {
            let end = offset + bytes.len() as u64;
            if offset <= at && at < end {
                let until = end.min(extent.end());
                found.extend_from_slice(&bytes[(at - offset) as usize..(until - offset) as usize]);
                at = until;
            }
        }
        (at == extent.end()).then_some(found)
    }

    fn content(&self) -> Vec<Vec<u8>> {
        let totals = self.totals.iter().flatten();
        let file = |(file, total): (u32, &FileTotal)| {
            self.read(Extent { file, offset: 0, len: total.size }).unwrap()
        };
        (0..).zip(totals).map(file).collect()
    }
}

impl Disk {
    pub fn new(trace: Trace) -> Self {
        Self { content: Arc::default(), trace }
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap()
    }

    /// The store of a host that has just been started.
    pub fn mount(&self) -> MemoryStore {
        let mut content = self.content();
        let Content { areas, lost, .. } = &mut *content;
        for area in areas.values_mut() {
            *lost += area.unsynced.drain(..).map(|chunk| chunk.payload.len() as u64).sum::<u64>();
        }
        drop(content);
        MemoryStore { disk: self.clone() }
    }

    /// The files that were installed as `id`.
    pub fn installed(&self, id: &str) -> Option<Vec<Vec<u8>>> {
        self.content().installed.get(&TransferId::new(id).unwrap()).cloned()
    }

    /// Whether nothing is staged.
    pub fn is_tidy(&self) -> bool {
        self.content().areas.is_empty()
    }

    pub fn lost(&self) -> u64 {
        self.content().lost
    }

    pub fn written(&self) -> u64 {
        self.content().written
    }
}

#[derive(Debug)]
pub struct MemoryStore {
    disk: Disk,
}

impl SnapshotStore for MemoryStore {
    type Staging = MemoryStaging;

    async fn recover(&self) -> Result<Recovered<MemoryStaging>, StoreError> {
        let content = self.disk.content();
        let area = |(id, area): (&TransferId, &Area)| {
            let state = if area.totals.is_some() { StagingState::Sealed } else { StagingState::Open };
            Arc::new(MemoryStaging {
                disk: self.disk.clone(),
                id: id.clone(),
                plan: area.plan.clone(),
                state,
                claim: area.claim,
                records: area.records.clone(),
            })
        };
        let staged: Vec<_> = content.areas.iter().map(area).collect();
        self.disk.trace.add(format_args!("disk: {} areas recovered", staged.len()));
        Ok(Recovered { staged, finished: content.history.clone(), damage: Vec::new() })
    }

    async fn shard(&self, shard: &ShardId) -> Result<ShardState, StoreError> {
        Ok(self.disk.content().shards.get(shard).map(|(state, _)| state.clone()).unwrap_or_default())
    }

    async fn current_plan(&self, shard: &ShardId) -> Result<Option<TransferPlan>, StoreError> {
        Ok(self.disk.content().shards.get(shard).and_then(|(_, plan)| plan.clone()))
    }

    async fn raise_fence(&self, shard: &ShardId, fence: Fence, _: &NodeId) -> Result<Fence, StoreError> {
        let mut content = self.disk.content();
        let (state, _) = content.shards.entry(shard.clone()).or_default();
        state.fence = state.fence.max(fence);
        Ok(state.fence)
    }

    async fn stage(&self, plan: &TransferPlan) -> Result<Arc<MemoryStaging>, StoreError> {
        sleep(SYNC).await;
        let id = plan.spec.transfer_id.clone();
        let claim = Claim { attempt: 0, session: [0; 16] };
        let area = Area {
            plan: plan.clone(),
            claim,
            files: vec![BTreeMap::new(); plan.manifest.files().len()],
            unsynced: Vec::new(),
            records: Vec::new(),
            totals: None,
        };
        assert!(self.disk.content().areas.insert(id.clone(), area).is_none(), "it is staged once");
        self.disk.trace.add(format_args!("disk: stage {id}"));
        let (disk, plan) = (self.disk.clone(), plan.clone());
        Ok(Arc::new(MemoryStaging { disk, id, plan, state: StagingState::Open, claim, records: Vec::new() }))
    }

    async fn record_finished(&self, record: &[u8]) -> Result<(), StoreError> {
        sleep(SYNC).await;
        self.disk.content().history.push(record.to_vec());
        Ok(())
    }
}

#[derive(Debug)]
pub struct MemoryStaging {
    disk: Disk,
    id: TransferId,
    plan: TransferPlan,
    state: StagingState,
    claim: Claim,
    records: Vec<ExtentRecord>,
}

impl MemoryStaging {
    fn with<T>(&self, what: &'static str, work: impl FnOnce(&mut Content) -> T) -> T {
        self.disk.trace.add(format_args!("disk: {what}"));
        work(&mut self.disk.content())
    }

    fn area<T>(&self, what: &'static str, work: impl FnOnce(&mut Area) -> T) -> T {
        self.with(what, |content| work(content.areas.get_mut(&self.id).unwrap()))
    }
}

impl Staging for MemoryStaging {
    fn plan(&self) -> &TransferPlan {
        &self.plan
    }

    fn state(&self) -> StagingState {
        self.state
    }

    fn claim(&self) -> Claim {
        self.claim
    }

    async fn set_claim(&self, claim: Claim) -> Result<(), StoreError> {
        sleep(SYNC).await;
        self.area("claim", |area| area.claim = claim);
        Ok(())
    }

    fn records(&self) -> Vec<ExtentRecord> {
        self.records.clone()
    }

    fn last_activity_unix_ms(&self) -> u64 {
        proto_common::clock::now_unix_ms()
    }

    async fn write(&self, chunks: Vec<StagedChunk>) -> Result<(), StoreError> {
        sleep(WRITE).await;
        let written: u64 = chunks.iter().map(|chunk| chunk.payload.len() as u64).sum();
        self.disk
            .trace
            .add(format_args!("disk: {written} bytes from {}:{}", chunks[0].file, chunks[0].offset));
        self.with("write", |content| {
            content.written += written;
            content.areas.get_mut(&self.id).unwrap().unsynced.extend(chunks);
        });
        Ok(())
    }

    async fn sync(&self, records: Vec<ExtentRecord>) -> Result<(), StoreError> {
        sleep(SYNC).await;
        self.area("data sync", |area| {
            for StagedChunk { file, offset, payload } in std::mem::take(&mut area.unsynced) {
                area.files[file as usize].insert(offset, payload.into_bytes());
            }
        });
        sleep(SYNC).await;
        self.area("record sync", |area| {
            for record in &records {
                let found = area.read(record.extent).expect("what is recorded was written");
                assert_eq!(crc64(&found), record.crc, "a record says what is there");
            }
            area.records.extend(records);
        });
        Ok(())
    }

    async fn checksum(&self, extent: Extent) -> Result<u64, StoreError> {
        Ok(self.area("checksum", |area| crc64(&area.read(extent).unwrap())))
    }

    async fn reset_records(&self, records: Vec<ExtentRecord>) -> Result<(), StoreError> {
        self.area("reset", |area| area.records = records);
        Ok(())
    }

    async fn reuse(&self, _: u32, _: CancellationToken) -> Result<Option<u64>, StoreError> {
        Ok(None)
    }

    async fn seal(&self, totals: &[FileTotal]) -> Result<(), StoreError> {
        sleep(SYNC).await;
        self.area("seal", |area| area.totals = Some(totals.to_vec()));
        Ok(())
    }

    async fn place(&self) -> Result<PlacedSnapshot, StoreError> {
        sleep(SYNC).await;
        self.with("place", |content| {
            let files = content.areas[&self.id].content();
            content.installed.insert(self.id.clone(), files);
        });
        Ok(PlacedSnapshot { path: None, plan: self.plan.clone() })
    }

    async fn activate(&self) -> Result<(), StoreError> {
        sleep(SYNC).await;
        let spec = &self.plan.spec;
        self.with("activate", |content| {
            let (state, plan) = content.shards.entry(spec.target_shard.clone()).or_default();
            if let Some(installed) = state.high_water.filter(|installed| *installed > spec.point) {
                return Err(StoreError::Stale { installed });
            }
            state.current = Some(self.id.clone());
            state.high_water = Some(spec.point);
            *plan = Some(self.plan.clone());
            Ok(())
        })
    }

    async fn remove(&self) -> Result<(), StoreError> {
        sleep(SYNC).await;
        let shard = &self.plan.spec.target_shard;
        self.with("remove", |content| {
            content.areas.remove(&self.id);
            let current = content.shards.get(shard).and_then(|(state, _)| state.current.as_ref());
            if current != Some(&self.id) {
                content.installed.remove(&self.id);
            }
        });
        Ok(())
    }
}
