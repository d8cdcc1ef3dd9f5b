//! Who owns the slots is looked at again and again: whoever does not must not give them away, and what an operator gave away stays so.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto_common::error::Error;
use proto_common::guard::RangeGuard;
use proto_common::slots::{RECLAIM_STEP, SlotRange};
use proto_migration::MigrationDriver;
use proto_migration::hold::HoldMode;
use proto_migration::journal::Journal;
use proto_migration::v1::migration_service_client::MigrationServiceClient;
use proto_migration::v1::{MigrationDecision, MigrationGate, MigrationProgress, MigrationState};
use support::memory_source::{Answer, Faults, MemorySource};
use support::memory_target::{Fault, MemoryTarget};
use support::pair::{Pair, dial, error_of, id, identity, manual};
use tokio::sync::Semaphore;

#[tokio::test]
async fn nobody_else_gets_slots_that_a_start_asks_its_store_about() {
    let dir = tempfile::tempdir().unwrap();
    let (source, guard) = (MemorySource::default(), RangeGuard::new());
    let gate = Arc::new(Semaphore::new(0));
    source.set_faults(Faults { slow_admit: Some(Arc::clone(&gate)), ..Faults::default() });
    let (journal, recovered) = Journal::open(dir.path(), 10).unwrap();
    let driver = MigrationDriver::builder(identity("n1", 1), source.clone(), journal, dial(&Arc::default()))
        .guard(guard.clone())
        .start(recovered)
        .await
        .unwrap();
    let client = MigrationServiceClient::new(driver.node().into_service());
    let start = async |id| client.clone().start_migration(Pair::request(id)).await.map_err(Error::from);
    let mut first = std::pin::pin!(start("m1"));
    let early = tokio::time::timeout(Duration::from_millis(50), &mut first).await;
    assert!(early.is_err(), "the store has not answered: {early:?}");
    let other = guard.try_acquire(SlotRange::FULL, "split");
    assert_eq!(other.unwrap_err().reason(), "RANGE_BUSY");
    gate.add_permits(1);
    first.await.unwrap();
    driver.shutdown().await;
}

#[tokio::test]
async fn a_start_that_is_refused_holds_no_slots() {
    let pair = Pair::start().await;
    pair.source.lose("n3", 1);
    for _ in 0..2 {
        assert_eq!(pair.begin(|_| {}).await.unwrap_err().reason(), "NOT_SLOT_OWNER");
    }
    pair.source.take_back(2);
    pair.begin(|request| request.migration_id = "m2".into()).await.unwrap();
}

/// Its caller knows of no migration: a restart must not find one.
#[tokio::test]
async fn nobody_gets_the_slots_of_a_start_that_failed_until_nothing_is_left_of_it() {
    let pair = Pair::start().await;
    pair.fill(10).await;
    // Neither written nor removed.
    let record = pair.dir.path().join("source").join(Journal::file_of(SlotRange::FULL, &id()));
    std::fs::create_dir(&record).unwrap();
    let failed = pair.begin(|_| {}).await.unwrap_err();
    assert_eq!(failed.reason(), "STORAGE_FAILED");
    assert!(failed.message().contains("nor can what was saved of it be removed"), "{failed}");
    for other in ["m1", "m2"] {
        let refused = pair.begin(|request| request.migration_id = other.into()).await.unwrap_err();
        assert_eq!((refused.reason(), refused.get("holder")), ("RANGE_BUSY", Some("migration m1")));
    }
    std::fs::remove_dir(&record).unwrap();
    let began = Instant::now();
    while let Err(busy) = pair.begin(|_| {}).await {
        assert!(busy.reason() == "RANGE_BUSY" && began.elapsed() < Duration::from_secs(30), "{busy}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    pair.reaches(MigrationState::Completed).await;
    assert_eq!(pair.target_rows().len(), 10);
}

#[tokio::test]
async fn slots_that_turn_out_to_be_of_another_node_are_not_given_away() {
    let pair = Pair::start().await;
    pair.fill(100).await;
    pair.begin(manual).await.unwrap();
    pair.reaches(MigrationState::Ready).await;
    pair.source.lose("n3", 1);
    pair.complete(None).await.unwrap();
    let failed = pair.reaches(MigrationState::Failed).await;
    let error = error_of(&failed);
    assert_eq!((error.reason(), error.get("owner")), ("NOT_SLOT_OWNER", Some("n3")), "{failed:?}");
    assert_eq!((failed.gate(), pair.source.held()), (MigrationGate::Open, None));
    assert_eq!(pair.target.calls("commit"), 0);
    assert!(pair.target.disk().owned.is_empty());
}

/// A copy of nothing, with the digests of nothing, would take the place of what is staged.
#[tokio::test]
async fn a_copy_does_not_begin_again_of_slots_that_are_of_another_node() {
    let pair = Pair::start().await;
    pair.fill(100).await;
    pair.begin(manual).await.unwrap();
    pair.reaches(MigrationState::Ready).await;
    pair.source.lose("n3", 1);
    pair.source.set_faults(Faults { lose_log: true, ..Faults::default() });
    pair.source.touch();
    let failed = pair.reaches(MigrationState::Failed).await;
    assert_eq!((error_of(&failed).reason(), failed.copy), ("NOT_SLOT_OWNER", 1), "{failed:?}");
}

/// The store takes no writes: what the operator says is tried for as long as it lasts.
async fn cannot_be_carried_out(pair: &Pair, decision: MigrationDecision) {
    let deciding = pair.resolve(decision, |_| {});
    let early = tokio::time::timeout(Duration::from_millis(200), deciding).await;
    assert!(early.is_err(), "it cannot be carried out yet: {early:?}");
}

async fn is_tried_again(pair: &Pair) {
    let last = |progress: &MigrationProgress| progress.incidents.last().map(|seen| seen.at_unix_ms);
    let before = last(&pair.progress().await);
    pair.until("it is tried again", |progress| last(progress) > before).await;
}

#[tokio::test]
async fn what_an_operator_gave_away_stays_so_though_the_source_dies_over_it() {
    let mut pair = Pair::committing(100).await;
    pair.target_dies();
    pair.source.set_faults(Faults { full_disk: true, ..Faults::default() });
    cannot_be_carried_out(&pair, MigrationDecision::Committed).await;
    assert_eq!(pair.progress().await.state(), MigrationState::Committing);
    pair.source_down().await;
    pair.source = pair.source.restarted();
    pair.target_up(2).await;
    pair.source_up().await;
    assert_eq!(pair.source.held(), Some(HoldMode::All), "nobody is served before it is done");
    is_tried_again(&pair).await;
    pair.source.set_faults(Faults::default());
    let done = pair.reaches(MigrationState::Completed).await;
    assert_eq!(done.resolved_reason.as_deref(), Some("the disk burnt"));
    assert_eq!(pair.source.read(b"key1").await, Answer::Moved { owner: "n2".into(), epoch: 1 });
    // Nobody told the target of it, which then could not commit any more what only it has.
    assert_eq!(pair.target.disk().staged.values().map(|rows| rows.len()).sum::<usize>(), 100);
    let there = pair.there().await;
    assert_eq!(there.state(), MigrationState::Prepared, "{there:?}");
    assert_eq!(
        pair.resolve(MigrationDecision::Discarded, |_| {}).await.unwrap_err().reason(),
        "RESOLVE_REFUSED",
        "it is decided"
    );
}

#[tokio::test]
async fn what_an_operator_took_back_waits_for_the_store_and_keeps_no_node_from_starting() {
    let mut pair = Pair::committing(100).await;
    pair.target_dies();
    pair.source.set_faults(Faults { full_disk: true, ..Faults::default() });
    cannot_be_carried_out(&pair, MigrationDecision::Discarded).await;
    pair.source_down().await;
    pair.source = pair.source.restarted();
    pair.source_up().await;
    assert_eq!(pair.source.held(), Some(HoldMode::All), "nobody is served before it is done");
    is_tried_again(&pair).await;
    pair.source.set_faults(Faults::default());
    let done = pair.reaches(MigrationState::Cancelled).await;
    assert_eq!((done.slot_epoch, done.decision()), (RECLAIM_STEP, MigrationDecision::Discarded));
    pair.source_serves().await;
}

/// Writes went on after the evidence was gone, until an operator gave the slots away.
#[tokio::test]
async fn nobody_is_served_before_what_an_operator_gave_away_while_the_gate_was_open_is_given_up() {
    let mut pair = Pair::start().await;
    pair.fill(100).await;
    pair.begin(manual).await.unwrap();
    pair.reaches(MigrationState::Ready).await;
    pair.target_down().await;
    pair.target = MemoryTarget::default();
    pair.target_up(9).await;
    let stopped = pair.reaches(MigrationState::NeedsOperator).await;
    assert_eq!((stopped.gate(), pair.source.held()), (MigrationGate::Open, None));
    pair.source.set_faults(Faults { full_disk: true, ..Faults::default() });
    cannot_be_carried_out(&pair, MigrationDecision::Committed).await;
    pair.source_down().await;
    pair.source = pair.source.restarted();
    pair.source_up().await;
    assert_eq!(pair.source.held(), Some(HoldMode::All));
    pair.source.set_faults(Faults::default());
    pair.reaches(MigrationState::Completed).await;
    assert_eq!(pair.source.read(b"key1").await, Answer::Moved { owner: "n2".into(), epoch: 1 });
}

/// The source's store says that the target owns the slots, and nobody knows how it came to that: what the target has is not copied over.
#[tokio::test]
async fn a_source_that_lost_the_slots_in_the_commit_asks_for_an_operator() {
    let mut pair = Pair::committing(100).await;
    pair.target_dies();
    pair.source_down().await;
    pair.source = pair.source.restarted();
    pair.source.lose("n2", 1);
    pair.target_up(2).await;
    pair.source_up().await;
    let stopped = pair.reaches(MigrationState::NeedsOperator).await;
    assert_eq!((error_of(&stopped).reason(), stopped.gate()), ("NOT_SLOT_OWNER", MigrationGate::Closed));
    assert_eq!(stopped.copy, 1);
    assert_eq!(pair.target.disk().staged.values().map(|rows| rows.len()).sum::<usize>(), 100);
}

/// It has ended, and its record cannot be taken away.
#[tokio::test]
async fn an_end_is_told_before_the_history_has_it() {
    let pair = Pair::start().await;
    pair.fill(10).await;
    let gate = Arc::new(Semaphore::new(0));
    pair.target.fault("forget", Fault::Wait(Arc::clone(&gate)));
    pair.begin(|_| {}).await.unwrap();
    pair.until("the target is told", |_| pair.target.calls("forget") == 1).await;
    let active = pair.dir.path().join("source/active");
    let record = std::fs::read_dir(&active).unwrap().next().unwrap().unwrap().path();
    std::fs::remove_file(&record).unwrap();
    std::fs::create_dir(&record).unwrap();
    gate.add_permits(1);
    pair.until("the target has forgotten", |_| pair.target.disk().records.is_empty()).await;
    let asked = async {
        assert_eq!(pair.cancel().await.unwrap_err().reason(), "ALREADY_COMMITTED");
        assert_eq!(pair.begin(|_| {}).await.unwrap().state(), MigrationState::Completed);
    };
    tokio::time::timeout(Duration::from_secs(5), asked).await.expect("nobody waits for the history");
    assert!(record.exists(), "it was not taken away until now");
    std::fs::remove_dir(&record).unwrap();
    pair.stop_driver.unwrap()().await;
    let (_, recovered) = Journal::open(pair.dir.path().join("source"), 10).unwrap();
    assert!(recovered.active.is_empty() && !recovered.finished.is_empty(), "{recovered:?}");
}

#[tokio::test]
async fn callers_get_an_answer_though_the_task_waits_for_its_disk() {
    let mut pair = Pair::committing(100).await;
    pair.target_dies();
    pair.source.set_faults(Faults { full_disk: true, ..Faults::default() });
    // How long a caller waits, nobody else has to.
    tokio::time::pause();
    let asked = pair.resolve(MigrationDecision::Committed, |_| {});
    let answer = tokio::time::timeout(Duration::from_secs(60), asked).await.expect("an answer");
    let answer = answer.unwrap_err();
    tokio::time::resume();
    assert_eq!((answer.reason(), answer.is_retryable()), ("OUTCOME_PENDING", true), "{answer}");
    pair.source.set_faults(Faults::default());
    pair.reaches(MigrationState::Completed).await;
}
