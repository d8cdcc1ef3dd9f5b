//! The source's side when a node goes down or loses its disk: what it finds out, and what it leaves to an operator.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto_common::error::{CommonReason, Error};
use proto_common::slots::{RECLAIM_STEP, SlotRange, slot_of};
use proto_migration::Reason;
use proto_migration::driver::dial_fn;
use proto_migration::hold::HoldMode;
use proto_migration::journal::{Journal, SourceRecord};
use proto_migration::limits::Limits;
use proto_migration::receiver::MigrationReceiver;
use proto_migration::v1::{
    FreezeOutcome, MigrationDecision, MigrationGate, MigrationLimits, MigrationProgress, MigrationState,
};
use support::frames::{PATIENCE, eventually};
use support::memory_source::{Answer, Faults, MemorySource};
use support::memory_target::{Fault, MemoryTarget};
use support::pair::{Pair, driver, driver_within, error_of, id, identity, manual};
use tokio::sync::Semaphore;

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

/// What the target committed, a source whose store panics does not serve, and moves nowhere else.
#[tokio::test]
async fn a_source_that_panics_behind_the_commit_serves_nobody() {
    let mut pair = Pair::start().await;
    pair.fill(100).await;
    let panics = Arc::new(AtomicU64::new(0));
    pair.source.set_faults(Faults { panics: Some(Arc::clone(&panics)), ..Faults::default() });
    pair.begin(|_| {}).await.unwrap();
    eventually("it panics", || panics.load(Ordering::SeqCst) > 0).await;
    assert_eq!(pair.source.held(), Some(HoldMode::All));
    let other = pair.begin(|request| request.migration_id = "m2".into()).await.unwrap_err();
    assert_eq!(other.reason(), "RANGE_BUSY", "{other}");
    // The next process goes on.
    pair.source.set_faults(Faults::default());
    pair.source_down().await;
    pair.source = pair.source.restarted();
    pair.source_up().await;
    pair.reaches(MigrationState::Completed).await;
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
    let mut pair = Pair::committing(100).await;
    pair.target_dies();
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

/// A migration whose target lost its disk while it committed.
async fn without_the_disk_of_the_target() -> Pair {
    let mut pair = Pair::committing(50).await;
    pair.target_dies();
    pair.source_down().await;
    pair.source = pair.source.restarted();
    pair.source_up().await;
    pair.target = MemoryTarget::default();
    pair.target_up(9).await;
    let stuck = pair.reaches(MigrationState::NeedsOperator).await;
    assert_eq!(error_of(&stuck).reason(), "STORE_CHANGED");
    assert_eq!(stuck.gate(), MigrationGate::Closed);
    pair
}

#[tokio::test]
async fn a_target_that_lost_its_disk_while_committing_needs_an_operator() {
    let mut pair = without_the_disk_of_the_target().await;
    assert_eq!(pair.source.held(), Some(HoldMode::All));
    assert_eq!(pair.cancel().await.unwrap_err().reason(), "RESOLVE_REFUSED");

    // It stays so over a restart.
    pair.source_down().await;
    pair.source = pair.source.restarted();
    pair.source_up().await;
    let stuck = pair.reaches(MigrationState::NeedsOperator).await;
    assert_eq!(pair.source.held(), Some(HoldMode::All));
    let freeze = stuck.freezes.last().unwrap();
    assert_eq!((freeze.outcome(), freeze.freeze_ms), (FreezeOutcome::Running, None), "clients wait still");

    let discarded = MigrationDecision::Discarded;
    let wrong = pair.resolve(discarded, |request| request.attempt += 1).await.unwrap_err();
    assert_eq!(wrong.reason(), "RESOLVE_REFUSED");
    let wrong =
        pair.resolve(discarded, |request| request.peer_store_id = vec![9; 16].into()).await.unwrap_err();
    assert_eq!((wrong.reason(), wrong.get("store_id")), ("RESOLVE_REFUSED", Some("02".repeat(16).as_str())));
    let resolved = pair.resolve(discarded, |_| {}).await.unwrap();
    assert_eq!(resolved.state(), MigrationState::Cancelled);
    assert_eq!(
        (resolved.slot_epoch, resolved.resolved_reason.as_deref()),
        (RECLAIM_STEP, Some("the disk burnt"))
    );
    let freeze = resolved.freezes.last().unwrap();
    assert_eq!((freeze.outcome(), freeze.freeze_ms.is_some()), (FreezeOutcome::Fenced, true), "{freeze:?}");
    pair.source_serves().await;
    assert_eq!(pair.resolve(discarded, |_| {}).await.unwrap().state(), MigrationState::Cancelled);
    let other = pair.resolve(MigrationDecision::Committed, |_| {}).await.unwrap_err();
    assert_eq!(other.reason(), "RESOLVE_REFUSED");
}

/// What the journal of the source holds of a migration. While the source is down.
fn kept(pair: &Pair, id: &str) -> SourceRecord {
    let (_, recovered) = Journal::open(pair.dir.path().join("source"), 10).unwrap();
    let found = recovered.active.into_iter().find(|(other, _)| other.as_str() == id);
    found.expect("a record").1
}

#[tokio::test]
async fn slots_that_were_taken_back_are_free_after_a_crash_though_the_target_stays_away() {
    let mut pair = without_the_disk_of_the_target().await;
    *pair.reachable.lock().unwrap() = None;
    pair.source_down().await;
    // An operator took them back, and the process died before it saved that this was done.
    let mut record = kept(&pair, "m1");
    record.progress.as_mut().unwrap().resolved_reason = Some("the disk burnt".into());
    (record.claim_epoch, record.untold) = (RECLAIM_STEP, true);
    let (journal, _) = Journal::open(pair.dir.path().join("source"), 10).unwrap();
    journal.save(&id(), SlotRange::FULL, &record).await.unwrap();
    pair.source = pair.source.restarted();
    pair.source_up().await;
    pair.reaches(MigrationState::Cancelled).await;
    pair.source_serves().await;

    // Another migration of them begins, as soon as that is saved.
    let began = Instant::now();
    loop {
        let elsewhere = pair.begin(|request| {
            request.migration_id = "m2".into();
            request.spec.as_mut().unwrap().target_node_id = "n3".into();
        });
        let Err(error) = elsewhere.await else { break };
        assert_eq!(error.reason(), "RANGE_BUSY");
        assert!(began.elapsed() < PATIENCE, "{error}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(pair.progress().await.state(), MigrationState::Cancelled);
    pair.source_down().await;
    let saved = kept(&pair, "m1").progress.unwrap();
    assert_eq!((saved.state(), saved.gate()), (MigrationState::Cancelled, MigrationGate::Open));
    assert_eq!((saved.slot_epoch, saved.decision()), (RECLAIM_STEP, MigrationDecision::Discarded));
    // Both are gone on with.
    pair.source = pair.source.restarted();
    pair.source_up().await;
    assert_eq!(pair.progress().await.state(), MigrationState::Cancelled);
    let again = pair.begin(|request| {
        request.migration_id = "m2".into();
        request.spec.as_mut().unwrap().target_node_id = "n3".into();
    });
    assert_eq!(again.await.unwrap().state(), MigrationState::Pending);
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
    pair.begin(manual).await.unwrap();
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
    assert!(!pair.source.has_log(&id()), "and logs nothing for nobody");
    assert_eq!(pair.source.write(b"key1", Some(b"2")).await, Answer::Done);
    // The lost target is never heard of again, and the slots may go elsewhere.
    *pair.reachable.lock().unwrap() = None;
    pair.resolve(MigrationDecision::Discarded, |_| {}).await.unwrap();
    pair.source_serves().await;
    let elsewhere = pair.begin(|request| {
        request.migration_id = "m2".into();
        request.spec.as_mut().unwrap().target_node_id = "n3".into();
    });
    elsewhere.await.unwrap();
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
async fn a_source_that_restarts_goes_on_with_the_log_that_it_has() {
    let mut pair = Pair::start().await;
    pair.fill(100).await;
    pair.begin(manual).await.unwrap();
    pair.reaches(MigrationState::Ready).await;
    let saved = pair.progress().await.durable_seq;
    // What the target acknowledges is dropped from the log, and nothing of it stands in the journal.
    for n in 0..50 {
        pair.source.write(format!("key{n}").as_bytes(), Some(b"after")).await;
    }
    pair.until("the changes have arrived", |progress| {
        progress.durable_seq >= saved + 50 && progress.lag.and_then(|lag| lag.entries) == Some(0)
    })
    .await;
    pair.source_down().await;
    pair.source_up().await;
    pair.reaches(MigrationState::Ready).await;
    pair.complete(None).await.unwrap();
    let done = pair.reaches(MigrationState::Completed).await;
    assert_eq!((done.copy, done.copy_reason.as_str()), (1, ""));
    assert_eq!(pair.target_rows().len(), 100);
}

#[tokio::test]
async fn a_target_that_is_away_for_long_costs_no_more_log_than_the_cap() {
    let mut pair = Pair::start().await;
    pair.fill(100).await;
    pair.begin(|request| {
        request.spec.as_mut().unwrap().auto_complete = false;
        request.limits = Some(MigrationLimits { log_bytes_cap: Some(1 << 20), ..MigrationLimits::default() });
    })
    .await
    .unwrap();
    pair.reaches(MigrationState::Ready).await;
    pair.target_down().await;
    let long = |n: usize| format!("{n:060000}").into_bytes();
    for n in 0..10 {
        pair.source.write(&long(n), Some(b"1")).await;
    }
    let away = pair.until("the lag is shown", |progress| progress.lag.unwrap().entries == Some(10)).await;
    assert_eq!((away.state(), away.connected), (MigrationState::CatchingUp, false), "it is not ready");
    for n in 10..20 {
        pair.source.write(&long(n), Some(b"1")).await;
    }
    pair.until("the log is dropped", |progress| progress.lag.unwrap().entries == Some(0)).await;
    assert_eq!(pair.source.delay(), Duration::ZERO, "nobody waits for a target that is away");
    pair.target_up(2).await;
    let again = pair.until("copied again", |progress| progress.copy == 2).await;
    assert!(!again.copy_reason.is_empty());
    pair.until("ready again", |progress| progress.state() == MigrationState::Ready).await;
    pair.complete(None).await.unwrap();
    pair.reaches(MigrationState::Completed).await;
    assert_eq!(pair.target_rows().len(), 120);
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
    assert_eq!(error.reason(), Reason::SlotsQuarantined.error("").reason());
    assert!(error.get("holder").unwrap().contains("m9.task"), "{error:?}");
    write.abort();
}

#[tokio::test]
async fn a_source_that_was_away_hears_why_the_target_was_told_to_cancel() {
    let mut pair = Pair::start().await;
    pair.fill(50).await;
    pair.begin(manual).await.unwrap();
    pair.reaches(MigrationState::Ready).await;
    pair.source_down().await;
    pair.cancel_there().await.unwrap();
    pair.source_up().await;
    let end = pair.reaches(MigrationState::Cancelled).await;
    assert_eq!((end.cancel_reason.as_str(), end.cancelled_at_node_id.as_str()), ("why not", "n2"));
    pair.source_serves().await;
}

#[tokio::test]
async fn a_damaged_record_at_the_target_is_waited_for() {
    let mut pair = Pair::start().await;
    pair.fill(50).await;
    pair.begin(manual).await.unwrap();
    pair.reaches(MigrationState::Ready).await;
    pair.target_down().await;
    let whole = pair.target.disk().records.insert(id(), Bytes::from_static(b"\xff")).unwrap();
    pair.target_up(2).await;
    let refused = |progress: &MigrationProgress| {
        let errors = progress.incidents.iter().filter_map(|incident| incident.error.as_ref());
        errors.filter(|error| error.reason == "SLOTS_QUARANTINED").count() > 1
    };
    pair.until("it is refused, again and again", refused).await;
    pair.target_down().await;
    pair.target.disk().records.insert(id(), whole);
    pair.target_up(2).await;
    pair.reaches(MigrationState::Ready).await;
    pair.complete(None).await.unwrap();
    let done = pair.reaches(MigrationState::Completed).await;
    assert_eq!(done.copy, 1, "nothing is copied twice");
}

#[tokio::test]
async fn a_cancelled_migration_keeps_no_log_while_the_target_is_away() {
    let mut pair = Pair::start().await;
    pair.fill(50).await;
    pair.begin(manual).await.unwrap();
    pair.reaches(MigrationState::Ready).await;
    assert!(pair.source.has_log(&id()));
    pair.target_down().await;
    let cancelled = pair.cancel().await.unwrap();
    assert_eq!(cancelled.state(), MigrationState::Cancelling);
    pair.until("its log has ended", |_| !pair.source.has_log(&id())).await;
    assert_eq!(pair.progress().await.state(), MigrationState::Cancelling);
    pair.target_up(2).await;
    pair.reaches(MigrationState::Cancelled).await;
}

#[tokio::test]
async fn a_target_without_a_free_place_is_waited_for() {
    let mut pair = Pair::start().await;
    pair.fill(50).await;
    pair.target_down().await;
    pair.target_limits.incoming_per_peer = 0;
    pair.target_up(2).await;
    // As over a network: a connection takes its time.
    pair.source_down().await;
    let reachable = Arc::clone(&pair.reachable);
    let dial = dial_fn(move |_, _| {
        let reachable = Arc::clone(&reachable);
        async move {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let service = reachable.lock().unwrap().clone();
            service.ok_or_else(|| Error::new(CommonReason::Unavailable, "connection refused"))
        }
    });
    let (client, stop) = driver_within(&pair.dir, &pair.source, dial, Limits::default()).await;
    (pair.client, pair.stop_driver) = (client, Some(stop));

    // Longer than a pause that a full target asks for, of a second, and shorter than three.
    let timeout = Duration::from_millis(1500);
    let limits = MigrationLimits {
        accept_timeout_ms: Some(u64::try_from(timeout.as_millis()).unwrap()),
        ..MigrationLimits::default()
    };
    let met = |progress: &MigrationProgress, reason: &str| {
        let reasons = progress.incidents.iter().filter_map(|incident| incident.error.as_ref());
        reasons.filter(|error| error.reason == reason).count()
    };
    let began = Instant::now();
    pair.begin(|request| request.limits = Some(limits)).await.unwrap();
    let full = |progress: &MigrationProgress| {
        let over = progress.state() != MigrationState::Pending;
        over || (began.elapsed() > timeout * 2 && met(progress, "TOO_MANY_MIGRATIONS") >= 3)
    };
    let refused = pair.until("refused for longer than that", full).await;
    assert_eq!(refused.state(), MigrationState::Pending, "{refused:?}");
    // A target that is away for a moment has all of the time to come back.
    pair.target_down().await;
    let away = |progress: &MigrationProgress| met(progress, "UNAVAILABLE") > 0;
    let away = pair.until("not reached", away).await;
    assert_eq!(away.state(), MigrationState::Pending, "{away:?}");
    pair.target_limits.incoming_per_peer = 1;
    pair.target_up(2).await;
    pair.reaches(MigrationState::Completed).await;
}

#[tokio::test]
async fn an_id_that_only_the_target_remembers_gives_nothing_away() {
    let mut pair = Pair::start().await;
    pair.fill(50).await;
    pair.begin(|_| {}).await.unwrap();
    pair.reaches(MigrationState::Completed).await;
    until_progress_there(&pair, MigrationState::Completed).await;
    // Another migration brings the slots back, and the source forgets the first one.
    pair.source_down().await;
    std::fs::remove_dir_all(pair.dir.path().join("source")).unwrap();
    pair.source.take_back(2);
    pair.source = pair.source.restarted();
    pair.source_up().await;
    pair.fill(50).await;

    pair.begin(|_| {}).await.unwrap();
    let failed = pair.reaches(MigrationState::Failed).await;
    let error = error_of(&failed);
    assert_eq!((error.reason(), error.get("field")), ("SPECIFICATION_MISMATCH", Some("migration_id")));
    assert_eq!((pair.source.held(), pair.source.has_log(&id())), (None, false));
    assert_eq!(pair.source.write(b"later", Some(b"1")).await, Answer::Done);
    assert_eq!(pair.source.rows(SlotRange::FULL).len(), 51, "all that was written since is there");
    // Nor does it wait for the target to hear of that.
    pair.begin(|request| request.migration_id = "m2".into()).await.unwrap();
}

async fn until_progress_there(pair: &Pair, state: MigrationState) {
    let began = Instant::now();
    while pair.there().await.state() != state {
        assert!(began.elapsed() < Duration::from_secs(30), "never {state:?}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Another node answers where the target was.
async fn another_node(pair: &Pair) {
    let (journal, _) = Journal::open(pair.dir.path().join("other"), 10).unwrap();
    let starting = MigrationReceiver::builder(identity("n9", 9), MemoryTarget::default(), journal).start();
    let other = starting.await.unwrap();
    *pair.reachable.lock().unwrap() = Some(other.into_service());
}

fn meets_another(progress: &MigrationProgress, times: usize) -> bool {
    let errors = progress.incidents.iter().filter_map(|incident| incident.error.as_ref());
    errors.filter(|error| error.reason == "WRONG_NODE").count() >= times
}

#[tokio::test]
async fn another_node_answers_for_no_commit_and_an_operator_can_name_the_attempt() {
    let mut pair = Pair::committing(50).await;
    pair.target_dies();
    another_node(&pair).await;
    pair.source_down().await;
    pair.source = pair.source.restarted();
    pair.source_up().await;
    let first = pair.until("another node answers", |progress| meets_another(progress, 2)).await;
    let later = pair.until("again and again", |progress| meets_another(progress, 5)).await;
    // One more at the moment at which the other node is asked.
    assert!(later.attempt <= first.attempt + 1, "{first:?} {later:?}");
    assert_eq!((later.state(), later.gate()), (MigrationState::Committing, MigrationGate::Closed));
    assert_eq!(error_of(&later).reason(), "WRONG_NODE");
    pair.target_up(2).await;
    pair.reaches(MigrationState::Completed).await;
    assert_eq!(pair.target_rows().len(), 50);
}

#[tokio::test]
async fn another_node_at_the_address_of_the_target_is_no_word_from_the_target() {
    for cancel in [false, true] {
        let mut pair = Pair::start().await;
        pair.fill(50).await;
        pair.begin(manual).await.unwrap();
        pair.reaches(MigrationState::Ready).await;
        pair.target_down().await;
        another_node(&pair).await;
        if cancel {
            assert_eq!(pair.cancel().await.unwrap().state(), MigrationState::Cancelling);
        }
        let waiting =
            pair.until("another node answers, again and again", |progress| meets_another(progress, 2)).await;
        let state = if cancel { MigrationState::Cancelling } else { MigrationState::CatchingUp };
        assert_eq!((waiting.state(), waiting.gate()), (state, MigrationGate::Open));
        pair.target_up(2).await;
        if cancel {
            pair.reaches(MigrationState::Cancelled).await;
            until_progress_there(&pair, MigrationState::Cancelled).await;
            assert!(pair.target.disk().staged.is_empty(), "the target is told when it is back");
        } else {
            pair.reaches(MigrationState::Ready).await;
            pair.complete(None).await.unwrap();
            pair.reaches(MigrationState::Completed).await;
        }
    }
}

#[tokio::test]
async fn a_target_that_is_too_slow_costs_no_more_log_than_the_cap() {
    let pair = Pair::start().await;
    pair.fill(20).await;
    let limits = |rate| {
        Some(MigrationLimits {
            max_bytes_per_second: rate,
            log_bytes_cap: Some(1 << 20),
            slow_writers: Some(false),
            ..MigrationLimits::default()
        })
    };
    let begin = |rate| {
        pair.begin(move |request| {
            request.spec.as_mut().unwrap().auto_complete = false;
            request.limits = limits(rate);
        })
    };
    begin(Some(20_000)).await.unwrap();
    pair.reaches(MigrationState::Ready).await;
    let long = |n: usize| format!("{n:060000}").into_bytes();
    for n in 0..40 {
        pair.source.write(&long(n), Some(b"1")).await;
    }
    let again = pair.until("copied again", |progress| progress.copy == 2).await;
    assert!(again.copy_reason.contains("slower than they come"), "{}", again.copy_reason);
    pair.until("the log is dropped", |progress| progress.log_bytes < 1 << 20).await;
    begin(None).await.unwrap();
    pair.reaches(MigrationState::Ready).await;
    pair.complete(None).await.unwrap();
    pair.reaches(MigrationState::Completed).await;
    assert_eq!(pair.target_rows().len(), 60);
}

#[tokio::test]
async fn a_source_that_forgot_a_migration_does_not_take_it_up_by_its_id() {
    let mut pair = Pair::start().await;
    pair.fill(50).await;
    pair.begin(manual).await.unwrap();
    pair.reaches(MigrationState::Ready).await;
    pair.source_down().await;
    std::fs::remove_dir_all(pair.dir.path().join("source")).unwrap();
    pair.source.keep_no_log(&id());
    pair.source = pair.source.restarted();
    pair.source_up().await;
    pair.begin(manual).await.unwrap();
    // Nobody could vouch for a target that has accepted nothing.
    let failed = pair.reaches(MigrationState::Failed).await;
    assert_eq!(error_of(&failed).reason(), "SUPERSEDED");
    pair.source_serves().await;
}
