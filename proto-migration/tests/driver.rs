//! The source's side against a real target's side, both over stores in memory: every way that a migration can go.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proto_common::error::{CommonReason, Error};
use proto_common::fence::Fence;
use proto_common::ids::MigrationId;
use proto_common::slots::{SlotRange, slot_of};
use proto_common::v1::{Direction, NodeIdentity};
use proto_migration::Reason;
use proto_migration::driver::{Dial, MigrationDriver, dial_fn};
use proto_migration::entry::Image;
use proto_migration::hold::HoldMode;
use proto_migration::journal::Journal;
use proto_migration::limits::Limits;
use proto_migration::receiver::MigrationReceiver;
use proto_migration::service::MigrationService;
use proto_migration::v1::migration_service_client::MigrationServiceClient;
use proto_migration::v1::{
    self, CancelMigrationRequest, CompleteMigrationRequest, FreezeOutcome, GetMigrationProgressRequest,
    MigrationDecision, MigrationGate, MigrationLimits, MigrationProgress, MigrationSpec, MigrationState,
    ResolveMigrationRequest, StartMigrationRequest,
};
use support::memory_source::{Answer, Faults, MemorySource};
use support::memory_target::{Fault, MemoryTarget};
use tokio::sync::Semaphore;

type Service = MigrationService;

fn identity(id: &str, store: u8) -> NodeIdentity {
    NodeIdentity {
        node_id: id.into(),
        cluster_id: "c".into(),
        store_id: vec![store; 16].into(),
        ..NodeIdentity::default()
    }
}

/// Two nodes, of which each can go down and come back.
struct Pair {
    dir: tempfile::TempDir,
    source: MemorySource,
    target: MemoryTarget,
    /// What dialling reaches; `None`: nothing.
    reachable: Arc<Mutex<Option<Service>>>,
    receiver: Option<MigrationReceiver<MemoryTarget>>,
    stop_driver: Option<Box<dyn FnOnce() -> futures::future::BoxFuture<'static, ()>>>,
    client: MigrationServiceClient<Service>,
}

impl Pair {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let source = MemorySource::default();
        let reachable: Arc<Mutex<Option<Service>>> = Arc::default();
        let (client, stop_driver) = driver(&dir, &source, &reachable).await;
        let mut pair = Self {
            dir,
            source,
            target: MemoryTarget::default(),
            reachable,
            receiver: None,
            stop_driver: Some(stop_driver),
            client,
        };
        pair.target_up(2).await;
        pair
    }

    async fn target_up(&mut self, store: u8) {
        let (journal, _) = Journal::open(self.dir.path().join("target"), 10).unwrap();
        let receiver = MigrationReceiver::builder(identity("n2", store), self.target.clone(), journal)
            .start()
            .await
            .unwrap();
        *self.reachable.lock().unwrap() = Some(receiver.clone().into_service());
        self.receiver = Some(receiver);
    }

    /// The target goes down; what it had is on its disk.
    async fn target_down(&mut self) {
        *self.reachable.lock().unwrap() = None;
        if let Some(receiver) = self.receiver.take() {
            receiver.shutdown().await;
        }
        self.target = self.target.crash();
    }

    async fn source_down(&mut self) {
        if let Some(stop) = self.stop_driver.take() {
            stop().await;
        }
    }

    /// The source comes back with the same store and journal.
    async fn source_up(&mut self) {
        let (client, stop) = driver(&self.dir, &self.source, &self.reachable).await;
        (self.client, self.stop_driver) = (client, Some(stop));
    }

    fn request(id: &str) -> StartMigrationRequest {
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

    async fn begin(
        &self,
        change: impl FnOnce(&mut StartMigrationRequest),
    ) -> Result<MigrationProgress, Error> {
        let mut request = Self::request("m1");
        change(&mut request);
        let started = self.client.clone().start_migration(request).await?;
        Ok(started.into_inner().migration.unwrap())
    }

    async fn progress(&self) -> MigrationProgress {
        let request =
            GetMigrationProgressRequest { migration_id: "m1".into(), direction: Direction::Out.into() };
        let answer = self.client.clone().get_migration_progress(request).await.unwrap();
        answer.into_inner().migration.unwrap()
    }

    async fn until(&self, what: &str, wanted: impl Fn(&MigrationProgress) -> bool) -> MigrationProgress {
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

    async fn reaches(&self, state: MigrationState) -> MigrationProgress {
        self.until(state.short_name(), |progress| progress.state() == state).await
    }

    async fn complete(&self, deadline_ms: Option<u64>) -> Result<(), Error> {
        let request = CompleteMigrationRequest { migration_id: "m1".into(), deadline_ms, fence: None };
        Ok(self.client.clone().complete_migration(request).await.map(drop)?)
    }

    async fn cancel(&self) -> Result<MigrationProgress, Error> {
        let request = CancelMigrationRequest {
            migration_id: "m1".into(),
            direction: Direction::Out.into(),
            reason: "why not".into(),
            fence: None,
        };
        Ok(self.client.clone().cancel_migration(request).await?.into_inner().migration.unwrap())
    }

    async fn resolve(
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

    /// Writes some keys before anything starts.
    async fn fill(&self, keys: usize) {
        for n in 0..keys {
            self.source.write(format!("key{n}").as_bytes(), Some(b"before")).await;
        }
    }

    /// The source serves all slots, and nothing is staged.
    async fn source_serves(&self) {
        assert_eq!(self.source.held(), None);
        assert_eq!(self.source.write(b"later", Some(b"1")).await, Answer::Done);
        assert!(!self.source.has_log(&id()));
        assert_eq!(self.source.delay(), Duration::ZERO);
        assert!(self.target.disk().owned.is_empty());
    }

    /// What the target owns.
    fn target_rows(&self) -> Vec<(Vec<u8>, Image)> {
        let disk = self.target.disk();
        let rows = disk.owned.iter().flat_map(|(_, _, rows)| rows);
        rows.filter_map(|(key, (_, image))| Some((key.to_vec(), image.clone()?))).collect()
    }
}

async fn driver(
    dir: &tempfile::TempDir,
    source: &MemorySource,
    reachable: &Arc<Mutex<Option<Service>>>,
) -> (MigrationServiceClient<Service>, Box<dyn FnOnce() -> futures::future::BoxFuture<'static, ()>>) {
    let (journal, recovered) = Journal::open(dir.path().join("source"), 10).unwrap();
    let driver = MigrationDriver::builder(identity("n1", 1), source.clone(), journal, dial(reachable))
        .limits(Limits::default())
        .start(recovered)
        .await
        .unwrap();
    let client = MigrationServiceClient::new(driver.node().into_service());
    let stop = move || -> futures::future::BoxFuture<'static, ()> {
        Box::pin(async move { driver.shutdown().await })
    };
    (client, Box::new(stop))
}

fn dial(reachable: &Arc<Mutex<Option<Service>>>) -> impl Dial + use<> {
    let reachable = Arc::clone(reachable);
    dial_fn(move |_, _| {
        let service = reachable.lock().unwrap().clone();
        async move { service.ok_or_else(|| Error::new(CommonReason::Unavailable, "connection refused")) }
    })
}

fn id() -> MigrationId {
    MigrationId::new("m1").unwrap()
}

fn error_of(progress: &MigrationProgress) -> Error {
    progress.progress.clone().unwrap().error.expect("an error").into()
}

#[tokio::test]
async fn everything_written_before_and_meanwhile_arrives() {
    let pair = Pair::start().await;
    pair.fill(500).await;
    pair.begin(|_| {}).await.unwrap();
    let mut written = 0;
    loop {
        let (key, value) = (format!("key{}", written % 700), written.to_string());
        match pair.source.write(key.as_bytes(), Some(value.as_bytes())).await {
            Answer::Done => written += 1,
            moved => {
                assert_eq!(moved, Answer::Moved { owner: "n2".into(), epoch: 1 });
                break;
            }
        }
        if written % 11 == 0 {
            let gone = format!("key{}", written % 97);
            if pair.source.write(gone.as_bytes(), None).await != Answer::Done {
                break;
            }
        }
    }
    let done = pair.reaches(MigrationState::Completed).await;
    assert_eq!((done.gate(), done.decision()), (MigrationGate::Moved, MigrationDecision::Committed));
    assert!(done.delta_entries > 0 && written > 0, "{done:?}");
    assert_eq!(done.freezes.last().unwrap().outcome(), FreezeOutcome::Committed);
    assert_eq!(done.max_freeze_ms, done.freezes.iter().filter_map(|freeze| freeze.freeze_ms).max().unwrap());
    let states: Vec<_> = done.phases.iter().map(|phase| phase.state()).collect();
    assert_eq!(states.first(), Some(&MigrationState::Pending));
    assert_eq!(states.last(), Some(&MigrationState::Completed));
    // Each written value is the last one, by the digests that both sides compared; here a sample says so, too.
    assert!(pair.target_rows().len() > 500);
    assert_eq!(pair.source.rows(SlotRange::FULL).len(), 0);
    assert_eq!(pair.source.held(), None);
    pair.until("told", |_| std::fs::read_dir(pair.dir.path().join("source/active")).unwrap().count() == 0)
        .await;
}

#[tokio::test]
async fn a_digest_that_differs_fails_it_and_names_the_slot() {
    let pair = Pair::start().await;
    pair.fill(100).await;
    pair.source.set_faults(Faults { wrong_digest: Some(7), ..Faults::default() });
    pair.begin(|_| {}).await.unwrap();
    let failed = pair.reaches(MigrationState::Failed).await;
    let error = error_of(&failed);
    assert_eq!((error.reason(), error.get("slot")), ("DIGEST_MISMATCH", Some("7")));
    let mismatch = failed.mismatch.unwrap();
    assert_eq!((mismatch.slot, mismatch.slots_differing), (7, 1));
    assert_eq!(mismatch.source.unwrap().keys, 1);
    pair.source_serves().await;
    assert!(pair.target.disk().staged.is_empty());
}

#[tokio::test]
async fn a_lost_log_starts_the_copy_again_and_says_so() {
    let pair = Pair::start().await;
    pair.fill(300).await;
    pair.begin(|request| request.spec.as_mut().unwrap().auto_complete = false).await.unwrap();
    pair.reaches(MigrationState::Ready).await;
    pair.source.set_faults(Faults { lose_log: true, ..Faults::default() });
    pair.source.write(b"key1", Some(b"after")).await;
    let again = pair.until("copied again", |progress| progress.copy == 2).await;
    assert!(!again.copy_reason.is_empty());
    pair.reaches(MigrationState::Ready).await;
    pair.complete(None).await.unwrap();
    pair.reaches(MigrationState::Completed).await;
    let rows = pair.target_rows();
    let row = rows.iter().find(|(key, _)| key == b"key1").unwrap();
    assert_eq!((&row.1.value[..], rows.len()), (&b"after"[..], 300));
}

#[tokio::test]
async fn a_freeze_that_takes_too_long_is_given_up_and_tried_again() {
    let pair = Pair::start().await;
    pair.fill(100).await;
    let gate = Arc::new(Semaphore::new(0));
    pair.target.fault("digests", Fault::Wait(Arc::clone(&gate)));
    pair.begin(|request| {
        request.limits = Some(MigrationLimits { freeze_timeout_ms: Some(50), ..MigrationLimits::default() });
    })
    .await
    .unwrap();
    let frozen = pair.until("a freeze timed out", |progress| {
        progress.freezes.iter().any(|freeze| freeze.outcome() == FreezeOutcome::TimedOut)
    });
    let frozen = frozen.await;
    let first = &frozen.freezes[0];
    assert!(first.freeze_ms.unwrap() >= 50 && first.final_seq > 0, "{first:?}");
    assert_eq!(Error::from(first.error.clone().unwrap()).reason(), "FREEZE_TIMEOUT");
    // Writes go on meanwhile.
    assert_eq!(pair.source.write(b"between", Some(b"1")).await, Answer::Done);
    gate.add_permits(10);
    let done = pair.reaches(MigrationState::Completed).await;
    assert!(done.freeze_count >= 2);
    assert!(pair.target_rows().iter().any(|(key, _)| key == b"between"));
}

#[tokio::test]
async fn a_target_that_fails_behind_the_commit_still_owns_the_slots() {
    let pair = Pair::start().await;
    pair.fill(100).await;
    // The commit is durable, and whoever waits for it does not hear so.
    pair.target.fault("commit", Fault::PanicAfter);
    pair.begin(|_| {}).await.unwrap();
    pair.reaches(MigrationState::Completed).await;
    assert_eq!(pair.target_rows().len(), 100);
    assert_eq!(pair.source.held(), None);
    assert_eq!(pair.source.read(b"key1").await, Answer::Moved { owner: "n2".into(), epoch: 1 });
}

#[tokio::test]
async fn while_committing_nothing_but_evidence_opens_the_gate() {
    let mut pair = Pair::start().await;
    pair.fill(100).await;
    let gate = Arc::new(Semaphore::new(0));
    pair.target.fault("commit", Fault::Wait(Arc::clone(&gate)));
    pair.begin(|_| {}).await.unwrap();
    let committing = pair.reaches(MigrationState::Committing).await;
    assert_eq!(committing.gate(), MigrationGate::Closed);
    assert_eq!(pair.source.held(), Some(HoldMode::All));
    assert_eq!(pair.cancel().await.unwrap_err().reason(), "OUTCOME_PENDING");
    assert!(pair.complete(None).await.is_ok(), "the wish is under way");

    // The source dies and comes back: the gate is closed before anybody is served.
    pair.source_down().await;
    pair.source = pair.source.restarted();
    assert_eq!(pair.source.held(), None);
    pair.source_up().await;
    assert_eq!(pair.source.held(), Some(HoldMode::All));
    let source = pair.source.clone();
    let read = tokio::spawn(async move { source.read(b"key1").await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!read.is_finished(), "nobody is served");
    gate.add_permits(10);
    pair.reaches(MigrationState::Completed).await;
    assert_eq!(read.await.unwrap(), Answer::Moved { owner: "n2".into(), epoch: 1 });
    assert_eq!(pair.cancel().await.unwrap_err().reason(), "ALREADY_COMMITTED");
}

#[tokio::test]
async fn a_prepared_attempt_that_did_not_commit_is_fenced_and_goes_on() {
    let mut pair = Pair::start().await;
    pair.fill(100).await;
    let never = Arc::new(Semaphore::new(0));
    pair.target.fault("commit", Fault::Wait(never));
    pair.begin(|_| {}).await.unwrap();
    pair.reaches(MigrationState::Committing).await;
    // The target dies before it commits. Its shutdown would wait for the commit; a crash does not.
    *pair.reachable.lock().unwrap() = None;
    pair.receiver = None;
    pair.target = pair.target.crash();
    pair.source_down().await;
    pair.source = pair.source.restarted();
    pair.source_up().await;
    pair.reaches(MigrationState::Committing).await;
    assert_eq!(pair.source.held(), Some(HoldMode::All), "the target does not answer: no evidence");
    pair.target_up(2).await;
    let done = pair.reaches(MigrationState::Completed).await;
    let outcomes: Vec<_> = done.freezes.iter().map(|freeze| freeze.outcome()).collect();
    assert!(outcomes.contains(&FreezeOutcome::Fenced), "{outcomes:?}");
    assert_eq!(outcomes.last(), Some(&FreezeOutcome::Committed));
    assert_eq!(pair.target_rows().len(), 100);
}

#[tokio::test]
async fn a_target_that_lost_its_disk_while_committing_needs_an_operator() {
    let mut pair = Pair::start().await;
    pair.fill(50).await;
    pair.target.fault("commit", Fault::Wait(Arc::new(Semaphore::new(0))));
    pair.begin(|_| {}).await.unwrap();
    pair.reaches(MigrationState::Committing).await;
    *pair.reachable.lock().unwrap() = None;
    pair.receiver = None;
    pair.source_down().await;
    pair.source = pair.source.restarted();
    pair.source_up().await;
    pair.target = MemoryTarget::default();
    pair.target_up(9).await;
    let stuck = pair.reaches(MigrationState::NeedsOperator).await;
    assert_eq!(error_of(&stuck).reason(), "STORE_CHANGED");
    assert_eq!(stuck.gate(), MigrationGate::Closed);
    assert_eq!(pair.source.held(), Some(HoldMode::All));
    assert_eq!(pair.cancel().await.unwrap_err().reason(), "RESOLVE_REFUSED");

    // It stays so over a restart.
    pair.source_down().await;
    pair.source = pair.source.restarted();
    pair.source_up().await;
    pair.reaches(MigrationState::NeedsOperator).await;
    assert_eq!(pair.source.held(), Some(HoldMode::All));

    let discarded = MigrationDecision::Discarded;
    let wrong = pair.resolve(discarded, |request| request.attempt += 1).await.unwrap_err();
    assert_eq!(wrong.reason(), "RESOLVE_REFUSED");
    let wrong =
        pair.resolve(discarded, |request| request.peer_store_id = vec![9; 16].into()).await.unwrap_err();
    assert_eq!((wrong.reason(), wrong.get("store_id")), ("RESOLVE_REFUSED", Some("02".repeat(16).as_str())));
    let resolved = pair.resolve(discarded, |_| {}).await.unwrap();
    assert_eq!(resolved.state(), MigrationState::Cancelled);
    assert_eq!((resolved.slot_epoch, resolved.resolved_reason.as_deref()), (2, Some("the disk burnt")));
    pair.source_serves().await;
    assert_eq!(pair.resolve(discarded, |_| {}).await.unwrap().state(), MigrationState::Cancelled);
    let other = pair.resolve(MigrationDecision::Committed, |_| {}).await.unwrap_err();
    assert_eq!(other.reason(), "RESOLVE_REFUSED");
}

#[tokio::test]
async fn an_operator_may_give_the_slots_to_the_target() {
    let mut pair = Pair::start().await;
    pair.fill(50).await;
    pair.target.fault("commit", Fault::Wait(Arc::new(Semaphore::new(0))));
    pair.begin(|_| {}).await.unwrap();
    pair.reaches(MigrationState::Committing).await;
    *pair.reachable.lock().unwrap() = None;
    let resolved = pair.resolve(MigrationDecision::Committed, |_| {}).await.unwrap();
    assert_eq!((resolved.state(), resolved.gate()), (MigrationState::Completed, MigrationGate::Moved));
    assert_eq!(pair.source.read(b"key1").await, Answer::Moved { owner: "n2".into(), epoch: 1 });
    pair.source_down().await;
}

#[tokio::test]
async fn a_target_that_lost_its_disk_before_is_stopped_at_and_one_that_forgot_is_copied_to_again() {
    let mut pair = Pair::start().await;
    pair.fill(50).await;
    pair.begin(|request| request.spec.as_mut().unwrap().auto_complete = false).await.unwrap();
    pair.reaches(MigrationState::Ready).await;
    pair.target_down().await;
    pair.target = MemoryTarget::default();
    pair.target_up(2).await;
    let again = pair.until("copied again", |progress| progress.copy == 2).await;
    assert!(again.copy_reason.contains("no record"), "{}", again.copy_reason);
    pair.reaches(MigrationState::Ready).await;
    pair.target_down().await;
    pair.target = MemoryTarget::default();
    pair.target_up(3).await;
    let stuck = pair.reaches(MigrationState::NeedsOperator).await;
    assert_eq!(stuck.gate(), MigrationGate::Open, "the source serves on");
    assert_eq!(pair.source.write(b"key1", Some(b"2")).await, Answer::Done);
    pair.resolve(MigrationDecision::Discarded, |_| {}).await.unwrap();
    pair.source_serves().await;
}

#[tokio::test]
async fn a_target_that_nobody_reaches_fails_it_in_time() {
    let pair = Pair::start().await;
    pair.fill(10).await;
    *pair.reachable.lock().unwrap() = None;
    pair.begin(|request| {
        request.limits = Some(MigrationLimits { accept_timeout_ms: Some(300), ..MigrationLimits::default() });
    })
    .await
    .unwrap();
    let failed = pair.reaches(MigrationState::Failed).await;
    assert_eq!(error_of(&failed).reason(), "TARGET_UNREACHABLE");
    assert!(!failed.incidents.is_empty());
    pair.source_serves().await;
}

#[tokio::test]
async fn a_target_that_swallows_everything_fails_it_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let source = MemorySource::default();
    let (journal, recovered) = Journal::open(dir.path(), 10).unwrap();
    // A connection is made, and nothing ever comes back.
    let silent = dial_fn(|_, _| async { std::future::pending::<Result<Service, Error>>().await });
    let driver =
        MigrationDriver::builder(identity("n1", 1), source, journal, silent).start(recovered).await.unwrap();
    let mut client = MigrationServiceClient::new(driver.node().into_service());
    let mut request = Pair::request("m1");
    request.limits = Some(MigrationLimits { accept_timeout_ms: Some(200), ..MigrationLimits::default() });
    client.start_migration(request).await.unwrap();
    let mut states = client
        .watch_migration_progress(v1::WatchMigrationProgressRequest {
            migration_id: "m1".into(),
            direction: Direction::Out.into(),
        })
        .await
        .unwrap()
        .into_inner();
    let mut last = None;
    while let Some(state) = states.message().await.unwrap() {
        last = state.migration;
    }
    let failed = last.unwrap();
    assert_eq!(failed.state(), MigrationState::Failed, "a watch ends with the last state");
    assert_eq!(error_of(&failed).reason(), "TARGET_UNREACHABLE");
}

#[tokio::test]
async fn what_cannot_begin_is_refused_by_name() {
    type Spoil = fn(&mut StartMigrationRequest);
    let pair = Pair::start().await;
    let bad: [(&str, &str, Spoil); 8] = [
        ("INVALID_ID", "migration_id", |r| r.migration_id = "../x".into()),
        ("SELF_MIGRATION", "spec.target_node_id", |r| r.spec.as_mut().unwrap().target_node_id = "n1".into()),
        ("WRONG_NODE", "spec.source_node_id", |r| r.spec.as_mut().unwrap().source_node_id = "n3".into()),
        ("INVALID_SLOT_RANGE", "spec.slots", |r| r.spec.as_mut().unwrap().slots = None),
        ("INVALID_FIELD", "target_address", |r| r.target_address.clear()),
        ("INVALID_FIELD", "priority", |r| r.priority = 99),
        ("INVALID_FIELD", "limits.freeze_timeout_ms", |r| {
            r.limits = Some(MigrationLimits { freeze_timeout_ms: Some(0), ..MigrationLimits::default() });
        }),
        ("INVALID_FIELD", "spec", |r| r.spec = None),
    ];
    for (reason, field, spoil) in bad {
        let error = pair.begin(spoil).await.unwrap_err();
        assert_eq!((error.reason(), error.violations()[0].field.as_str()), (reason, field));
    }
    pair.source.set_fence(Fence::new(5, 1));
    let stale = pair.begin(|request| request.fence = Some(Fence::new(4, 9).into())).await.unwrap_err();
    assert_eq!((stale.reason(), stale.get("current_epoch")), ("STALE_FENCE", Some("5")));

    let manual: Spoil = |request| request.spec.as_mut().unwrap().auto_complete = false;
    let begun = pair.begin(manual).await.unwrap();
    assert_eq!(begun.state(), MigrationState::Pending);
    pair.begin(manual).await.expect("joins");
    let other = pair.begin(|_| {}).await.unwrap_err();
    assert_eq!((other.reason(), other.get("field")), ("SPECIFICATION_MISMATCH", Some("auto_complete")));
    let overlap = pair
        .begin(|request| {
            request.migration_id = "m2".into();
            request.spec.as_mut().unwrap().slots = Some(SlotRange::new(5, 6).unwrap().into());
        })
        .await
        .unwrap_err();
    assert_eq!((overlap.reason(), overlap.get("holder")), ("RANGE_BUSY", Some("migration m1")));
    assert!(overlap.is_retryable());
}

#[tokio::test]
async fn complete_waits_for_its_time_and_a_missed_deadline_leads_back() {
    let pair = Pair::start().await;
    pair.fill(400).await;
    pair.source.set_faults(Faults { slow_pages: Duration::from_millis(100), ..Faults::default() });
    pair.begin(|request| {
        request.spec.as_mut().unwrap().auto_complete = false;
        request.limits = Some(MigrationLimits { freeze_timeout_ms: Some(30), ..MigrationLimits::default() });
    })
    .await
    .unwrap();
    pair.reaches(MigrationState::Copying).await;
    let early = pair.complete(None).await.unwrap_err();
    assert_eq!(early.reason(), "NOT_READY");
    assert!(early.is_retryable());
    pair.reaches(MigrationState::Ready).await;
    let gate = Arc::new(Semaphore::new(0));
    for _ in 0..50 {
        pair.target.fault("digests", Fault::Wait(Arc::clone(&gate)));
    }
    pair.complete(Some(200)).await.unwrap();
    let missed = pair
        .until("the deadline missed", |progress| {
            progress
                .incidents
                .iter()
                .any(|incident| incident.error.as_ref().is_some_and(|e| e.reason == "COMPLETE_DEADLINE"))
        })
        .await;
    assert_eq!(missed.complete_deadline_unix_ms, None);
    assert!(missed.freeze_count > 0);
    assert_eq!(pair.source.write(b"key1", Some(b"2")).await, Answer::Done);
    gate.add_permits(100);
    pair.reaches(MigrationState::Ready).await;
    pair.complete(Some(20_000)).await.unwrap();
    pair.reaches(MigrationState::Completed).await;
    assert!(pair.complete(None).await.is_ok(), "fulfilled");
}

#[tokio::test]
async fn a_cancel_undoes_it_in_every_state_before_the_commit() {
    // PENDING: nobody has accepted.
    let pair = Pair::start().await;
    *pair.reachable.lock().unwrap() = None;
    pair.begin(|_| {}).await.unwrap();
    assert_eq!(pair.cancel().await.unwrap().state(), MigrationState::Cancelled);
    pair.source_serves().await;
    assert_eq!(pair.cancel().await.unwrap().state(), MigrationState::Cancelled, "again");
    assert_eq!(pair.complete(None).await.unwrap_err().reason(), "MIGRATION_ENDED");

    for state in [MigrationState::Copying, MigrationState::Ready, MigrationState::Freezing] {
        let pair = Pair::start().await;
        pair.fill(200).await;
        if state == MigrationState::Copying {
            pair.source.set_faults(Faults { slow_pages: Duration::from_millis(100), ..Faults::default() });
        }
        let gate = Arc::new(Semaphore::new(0));
        pair.target.fault("digests", Fault::Wait(Arc::clone(&gate)));
        pair.begin(|request| {
            request.spec.as_mut().unwrap().auto_complete = state == MigrationState::Freezing;
            request.limits =
                Some(MigrationLimits { freeze_timeout_ms: Some(20_000), ..MigrationLimits::default() });
        })
        .await
        .unwrap();
        pair.reaches(state).await;
        if state == MigrationState::Freezing {
            pair.until("writes are held", |_| pair.source.held() == Some(HoldMode::Writes)).await;
        }
        let cancelled = pair.cancel().await.unwrap();
        assert!(
            matches!(cancelled.state(), MigrationState::Cancelling | MigrationState::Cancelled),
            "{state:?}: {cancelled:?}"
        );
        assert_eq!(pair.source.held(), None, "the gate is open when the call returns");
        gate.add_permits(10);
        let cancelled = pair.reaches(MigrationState::Cancelled).await;
        assert_eq!(cancelled.cancel_reason, "why not");
        assert_eq!(error_of(&cancelled).reason(), "MIGRATION_CANCELLED");
        pair.source_serves().await;
        assert!(pair.target.disk().staged.is_empty(), "{state:?}");
        assert_eq!(pair.source.rows(SlotRange::FULL).len(), 201);
    }
}

#[tokio::test]
async fn writers_that_outrun_the_target_are_slowed_and_told_so_and_it_ends_all_the_same() {
    let pair = Pair::start().await;
    pair.fill(20).await;
    let limits = |rate| MigrationLimits {
        max_bytes_per_second: rate,
        ready_lag_entries: Some(10),
        ready_lag_ms: Some(50),
        ..MigrationLimits::default()
    };
    pair.begin(|request| request.limits = Some(limits(Some(2_000)))).await.unwrap();
    let source = pair.source.clone();
    let writer = tokio::spawn(async move {
        let mut slowest = Duration::ZERO;
        for n in 0_u64.. {
            let began = Instant::now();
            if source.write(format!("key{}", n % 1000).as_bytes(), Some(&[b'x'; 100])).await != Answer::Done {
                break;
            }
            slowest = slowest.max(began.elapsed());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        slowest
    });
    let slowed = pair.until("not converging", |progress| progress.not_converging).await;
    assert!(slowed.not_converging_since_unix_ms.is_some());
    pair.until("writers are slowed", |progress| progress.writers_slowed_ms > 0).await;
    // More rate for the same migration: it joins, and ends.
    pair.begin(|request| request.limits = Some(limits(None))).await.unwrap();
    let done = pair.reaches(MigrationState::Completed).await;
    assert!(done.source_throttled_ms > 0, "{done:?}");
    assert!(writer.await.unwrap() < Duration::from_secs(20));
    assert_eq!(pair.source.delay(), Duration::ZERO);
}

#[tokio::test]
async fn a_source_that_restarts_goes_on_where_the_target_is() {
    let mut pair = Pair::start().await;
    pair.fill(2_000).await;
    pair.source.set_faults(Faults { slow_pages: Duration::from_millis(20), ..Faults::default() });
    pair.begin(|_| {}).await.unwrap();
    pair.until("some rows are there", |progress| progress.progress.as_ref().unwrap().items_done >= 300).await;
    pair.source_down().await;
    let before = pair.source.pages();
    pair.source_up().await;
    let done = pair.reaches(MigrationState::Completed).await;
    assert_eq!(done.copy, 1);
    // 40 pages of 50 rows; those that had arrived are not read again.
    assert!(pair.source.pages() - before <= 40 - 5, "{}", pair.source.pages() - before);
    assert_eq!(pair.target_rows().len(), 2_000);
}

#[tokio::test]
async fn slots_of_a_damaged_record_are_held_and_the_rest_is_served() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("source/active")).unwrap();
    let slot = slot_of(b"held");
    let file = format!("source/active/{slot:05}-{slot:05}.m9.task");
    std::fs::write(dir.path().join(file), b"NMJ1 garbage").unwrap();
    let source = MemorySource::default();
    let (client, _stop) = driver(&dir, &source, &Arc::default()).await;
    assert_eq!(source.write(b"free", Some(b"1")).await, Answer::Done);
    let held = source.clone();
    let write = tokio::spawn(async move { held.write(b"held", Some(b"1")).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!write.is_finished());
    let error = client.clone().start_migration(Pair::request("m1")).await.unwrap_err();
    let error = Error::from(error);
    assert_eq!(error.reason(), Reason::RangeBusy.error("").reason());
    assert!(error.get("holder").unwrap().contains("m9.task"), "{error:?}");
    write.abort();
}
