//! A driver and a receiver over stores in memory, of which each can go down and come back.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub use super::frames::identity;
use super::memory_source::{Answer, MemorySource};
use super::memory_target::{Fault, MemoryTarget};
use proto_common::error::{CommonReason, Error};
use proto_common::ids::MigrationId;
use proto_common::slots::SlotRange;
use proto_common::v1::Direction;
use proto_migration::driver::{Dial, MigrationDriver, dial_fn};
use proto_migration::entry::Image;
use proto_migration::journal::Journal;
use proto_migration::limits::Limits;
use proto_migration::receiver::MigrationReceiver;
use proto_migration::service::MigrationService;
use proto_migration::v1::migration_service_client::MigrationServiceClient;
use proto_migration::v1::{
    CancelMigrationRequest, CompleteMigrationRequest, GetMigrationProgressRequest, MigrationDecision,
    MigrationProgress, MigrationSpec, MigrationState, ResolveMigrationRequest, StartMigrationRequest,
};
use tokio::sync::Semaphore;

pub type Service = MigrationService;

/// Ends a driver.
pub type Stop = Box<dyn FnOnce() -> futures::future::BoxFuture<'static, ()>>;

/// Two nodes, of which each can go down and come back.
pub struct Pair {
    pub dir: tempfile::TempDir,
    pub source: MemorySource,
    pub target: MemoryTarget,
    /// Of the receiver, when it comes up.
    pub target_limits: Limits,
    /// What dialling reaches; `None`: nothing.
    pub reachable: Arc<Mutex<Option<Service>>>,
    pub receiver: Option<MigrationReceiver<MemoryTarget>>,
    pub stop_driver: Option<Stop>,
    pub client: MigrationServiceClient<Service>,
}

impl Pair {
    pub async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = MemorySource::default();
        let reachable: Arc<Mutex<Option<Service>>> = Arc::default();
        let (client, stop_driver) = driver(&dir, &source, &reachable).await;
        let mut pair = Self {
            dir,
            source,
            target: MemoryTarget::default(),
            target_limits: Limits::default(),
            reachable,
            receiver: None,
            stop_driver: Some(stop_driver),
            client,
        };
        pair.target_up(2).await;
        pair
    }

    pub async fn target_up(&mut self, store: u8) {
        let (journal, _) = Journal::open(self.dir.path().join("target"), 10).unwrap();
        let receiver = MigrationReceiver::builder(identity("n2", store), self.target.clone(), journal)
            .limits(self.target_limits.clone())
            .start()
            .await
            .unwrap();
        *self.reachable.lock().unwrap() = Some(receiver.clone().into_service());
        self.receiver = Some(receiver);
    }

    /// The target goes down; what it had is on its disk.
    pub async fn target_down(&mut self) {
        *self.reachable.lock().unwrap() = None;
        if let Some(receiver) = self.receiver.take() {
            receiver.shutdown().await;
        }
        self.target = self.target.crash();
    }

    pub async fn source_down(&mut self) {
        if let Some(stop) = self.stop_driver.take() {
            stop().await;
        }
    }

    /// The source comes back with the same store and journal.
    pub async fn source_up(&mut self) {
        self.source_up_within(Limits::default()).await;
    }

    pub async fn source_up_within(&mut self, limits: Limits) {
        let (client, stop) = driver_within(&self.dir, &self.source, dial(&self.reachable), limits).await;
        (self.client, self.stop_driver) = (client, Some(stop));
    }

    pub fn request(id: &str) -> StartMigrationRequest {
        StartMigrationRequest {
            migration_id: id.into(),
            spec: Some(MigrationSpec {
                slots: Some(SlotRange::FULL.into()),
                source_shard_id: "s1".into(),
                target_shard_id: "s2".into(),
                source_node_id: "n1".into(),
                target_node_id: "n2".into(),
                auto_complete: true,
                ..MigrationSpec::default()
            }),
            target_address: "n2:1".into(),
            ..StartMigrationRequest::default()
        }
    }

    pub async fn begin(
        &self,
        change: impl FnOnce(&mut StartMigrationRequest),
    ) -> Result<MigrationProgress, Error> {
        let mut request = Self::request("m1");
        change(&mut request);
        let started = self.client.clone().start_migration(request).await?;
        Ok(started.into_inner().migration.unwrap())
    }

    pub async fn progress(&self) -> MigrationProgress {
        let request =
            GetMigrationProgressRequest { migration_id: "m1".into(), direction: Direction::Out.into() };
        let answer = self.client.clone().get_migration_progress(request).await.unwrap();
        answer.into_inner().migration.unwrap()
    }

    /// The same at the target.
    pub async fn there(&self) -> MigrationProgress {
        let service = self.receiver.clone().expect("the target is up").into_service();
        let request =
            GetMigrationProgressRequest { migration_id: "m1".into(), direction: Direction::In.into() };
        let answer = MigrationServiceClient::new(service).get_migration_progress(request).await.unwrap();
        answer.into_inner().migration.unwrap()
    }

    pub async fn until(&self, what: &str, wanted: impl Fn(&MigrationProgress) -> bool) -> MigrationProgress {
        let began = Instant::now();
        loop {
            let progress = self.progress().await;
            if wanted(&progress) {
                return progress;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "never {what}: {progress:?}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    pub async fn reaches(&self, state: MigrationState) -> MigrationProgress {
        self.until(state.short_name(), |progress| progress.state() == state).await
    }

    pub async fn complete(&self, deadline_ms: Option<u64>) -> Result<(), Error> {
        let request = CompleteMigrationRequest { migration_id: "m1".into(), deadline_ms, fence: None };
        Ok(self.client.clone().complete_migration(request).await.map(drop)?)
    }

    pub async fn cancel(&self) -> Result<MigrationProgress, Error> {
        cancel(self.client.clone(), Direction::Out).await
    }

    /// The same at the target.
    pub async fn cancel_there(&self) -> Result<MigrationProgress, Error> {
        let service = self.receiver.clone().expect("the target is up").into_service();
        cancel(MigrationServiceClient::new(service), Direction::In).await
    }

    pub async fn resolve(
        &self,
        decision: MigrationDecision,
        change: impl FnOnce(&mut ResolveMigrationRequest),
    ) -> Result<MigrationProgress, Error> {
        let shown = self.progress().await;
        let mut request = ResolveMigrationRequest {
            migration_id: "m1".into(),
            direction: Direction::Out.into(),
            decision: decision.into(),
            attempt: shown.attempt,
            peer_store_id: shown.peer.unwrap_or_default().store_id,
            reason: "the disk burnt".into(),
        };
        change(&mut request);
        Ok(self.client.clone().resolve_migration(request).await?.into_inner().migration.unwrap())
    }

    /// The source waits for the answer to `Commit`, and the target never commits.
    pub async fn committing(keys: usize) -> Self {
        let pair = Self::start().await;
        pair.fill(keys).await;
        pair.target.fault("commit", Fault::Wait(Arc::new(Semaphore::new(0))));
        pair.begin(|_| {}).await.unwrap();
        pair.reaches(MigrationState::Committing).await;
        pair
    }

    /// The target dies, whatever it is about to do: its shutdown would wait for that.
    pub fn target_dies(&mut self) {
        *self.reachable.lock().unwrap() = None;
        self.receiver = None;
        self.target = self.target.crash();
    }

    /// Writes some keys before anything starts.
    pub async fn fill(&self, keys: usize) {
        for n in 0..keys {
            self.source.write(format!("key{n}").as_bytes(), Some(b"before")).await;
        }
    }

    /// The source serves all slots, and nothing is staged.
    pub async fn source_serves(&self) {
        assert_eq!(self.source.held(), None);
        assert_eq!(self.source.write(b"later", Some(b"1")).await, Answer::Done);
        assert!(!self.source.has_log(&id()));
        assert_eq!(self.source.delay(), Duration::ZERO);
        assert!(self.target.disk().owned.is_empty());
    }

    /// What the target owns.
    pub fn target_rows(&self) -> Vec<(Vec<u8>, Image)> {
        let disk = self.target.disk();
        let rows = disk.owned.iter().flat_map(|(_, _, rows)| rows);
        rows.filter_map(|(key, (_, image))| Some((key.to_vec(), image.clone()?))).collect()
    }
}

pub async fn driver(
    dir: &tempfile::TempDir,
    source: &MemorySource,
    reachable: &Arc<Mutex<Option<Service>>>,
) -> (MigrationServiceClient<Service>, Stop) {
    driver_within(dir, source, dial(reachable), Limits::default()).await
}

pub async fn driver_within(
    dir: &tempfile::TempDir,
    source: &MemorySource,
    dial: impl Dial,
    limits: Limits,
) -> (MigrationServiceClient<Service>, Stop) {
    let (journal, recovered) = Journal::open(dir.path().join("source"), 10).unwrap();
    let driver = MigrationDriver::builder(identity("n1", 1), source.clone(), journal, dial)
        .limits(limits)
        .start(recovered)
        .await
        .unwrap();
    let client = MigrationServiceClient::new(driver.node().into_service());
    let stop = move || -> futures::future::BoxFuture<'static, ()> {
        Box::pin(async move { driver.shutdown().await })
    };
    (client, Box::new(stop))
}

pub fn dial(reachable: &Arc<Mutex<Option<Service>>>) -> impl Dial + use<> {
    let reachable = Arc::clone(reachable);
    dial_fn(move |_, _| {
        let service = reachable.lock().unwrap().clone();
        async move { service.ok_or_else(|| Error::new(CommonReason::Unavailable, "connection refused")) }
    })
}

async fn cancel(
    mut client: MigrationServiceClient<Service>,
    direction: Direction,
) -> Result<MigrationProgress, Error> {
    let request = CancelMigrationRequest {
        migration_id: "m1".into(),
        direction: direction.into(),
        reason: "why not".into(),
        fence: None,
    };
    Ok(client.cancel_migration(request).await?.into_inner().migration.unwrap())
}

pub fn id() -> MigrationId {
    MigrationId::new("m1").unwrap()
}

pub fn error_of(progress: &MigrationProgress) -> Error {
    progress.progress.clone().unwrap().error.expect("an error").into()
}

/// Waits in READY until it is told to cut over.
pub fn manual(request: &mut StartMigrationRequest) {
    request.spec.as_mut().unwrap().auto_complete = false;
}
