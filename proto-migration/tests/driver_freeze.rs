//! What is asked of the source, or said by the target, while writes are held.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto_common::slots::SlotRange;
use proto_migration::hold::HoldMode;
use proto_migration::journal::Journal;
use proto_migration::v1::{
    FreezeOutcome, MigrationDecision, MigrationLimits, MigrationProgress, MigrationState,
    StartMigrationRequest,
};
use support::memory_source::{Answer, Faults};
use support::memory_target::Fault;
use support::pair::{Pair, id, manual};
use tokio::sync::Semaphore;

/// Writes are held, and drain until the faults of the source are taken away.
async fn frozen() -> Pair {
    let pair = Pair::start().await;
    pair.fill(100).await;
    pair.source.set_faults(Faults { slow_drain: Duration::from_secs(60), ..Faults::default() });
    pair.begin(|request| request.limits = limits()).await.unwrap();
    pair.reaches(MigrationState::Freezing).await;
    pair.until("writes are held", |_| pair.source.held() == Some(HoldMode::Writes)).await;
    pair
}

fn limits() -> Option<MigrationLimits> {
    Some(MigrationLimits { freeze_timeout_ms: Some(60_000), ..MigrationLimits::default() })
}

#[tokio::test]
async fn what_an_operator_may_not_decide_does_not_end_a_freeze() {
    let pair = frozen().await;
    let refused = pair.resolve(MigrationDecision::Discarded, |_| {}).await.unwrap_err();
    assert_eq!(refused.reason(), "RESOLVE_REFUSED");
    assert_eq!(pair.source.held(), Some(HoldMode::Writes));
    pair.source.set_faults(Faults::default());
    let done = pair.reaches(MigrationState::Completed).await;
    assert_eq!((done.freeze_count, done.attempt), (1, 1), "{done:?}");
}

#[tokio::test]
async fn a_start_that_joins_waits_for_the_end_of_a_freeze_and_not_the_other_way_round() {
    let pair = frozen().await;
    let mut joining = std::pin::pin!(pair.begin(|request| {
        request.limits = limits();
        request.target_address = "n2:2".into();
    }));
    let early = tokio::time::timeout(Duration::from_millis(100), &mut joining).await;
    assert!(early.is_err(), "nothing is saved meanwhile: {early:?}");
    assert_eq!(pair.progress().await.target_address, "n2:1");
    let other = pair.begin(|request| request.migration_id = "m2".into());
    let other = tokio::time::timeout(Duration::from_secs(20), other).await.expect("it waits for nobody");
    assert_eq!(other.unwrap_err().reason(), "RANGE_BUSY");
    pair.source.set_faults(Faults::default());
    assert_eq!(joining.await.unwrap().target_address, "n2:2");
    let done = pair.reaches(MigrationState::Completed).await;
    assert_eq!(done.freeze_count, 1, "{done:?}");
}

#[tokio::test]
async fn a_cancel_at_the_target_is_a_cancel_in_a_freeze_too() {
    for asked in [false, true] {
        let gate = Arc::new(Semaphore::new(0));
        let pair = if asked {
            // The target was asked to prepare, and looks at what it has.
            let pair = Pair::start().await;
            pair.fill(100).await;
            pair.target.fault("digests", Fault::Wait(Arc::clone(&gate)));
            pair.begin(|request| request.limits = limits()).await.unwrap();
            pair.reaches(MigrationState::Freezing).await;
            pair.until("the target looks", |_| pair.target.calls("digests") > 0).await;
            pair
        } else {
            frozen().await
        };
        let cancelling = pair.cancel_there();
        let cancelling = async {
            cancelling.await.unwrap();
            pair.source.set_faults(Faults::default());
        };
        tokio::join!(cancelling, async { gate.add_permits(10) });
        let end = pair.until("it has ended", |progress| progress.state().is_final()).await;
        assert_eq!(end.state(), MigrationState::Cancelled, "{end:?}");
        assert_eq!((end.cancel_reason.as_str(), end.cancelled_at_node_id.as_str()), ("why not", "n2"));
        assert!(end.freezes.iter().all(|freeze| freeze.freeze_ms.is_some()), "{end:?}");
        pair.source_serves().await;
    }
}

/// Reads drain, the last thing before the commit, and the disk of the journal takes nothing.
#[tokio::test]
async fn clients_are_not_held_for_a_call_that_cannot_be_saved() {
    // A cancel ends a freeze. A start that joins does not, nor does it make one longer.
    for (cancels, freeze_ms) in [(true, 60_000), (false, 2_000)] {
        let pair = Pair::start().await;
        pair.fill(100).await;
        pair.source.set_faults(Faults { slow_reads: Duration::from_secs(60), ..Faults::default() });
        let limits = MigrationLimits { freeze_timeout_ms: Some(freeze_ms), ..MigrationLimits::default() };
        pair.begin(|request| request.limits = Some(limits)).await.unwrap();
        pair.until("reads are held", |_| pair.source.held() == Some(HoldMode::All)).await;
        let record = pair.dir.path().join("source").join(Journal::file_of(SlotRange::FULL, &id()));
        std::fs::remove_file(&record).unwrap();
        std::fs::create_dir(&record).unwrap();
        let asked = async {
            if cancels {
                pair.cancel().await
            } else {
                pair.begin(|request| request.limits = Some(limits)).await
            }
        };
        let served = async {
            pair.until("clients are served", |_| pair.source.held().is_none()).await;
            pair.source.set_faults(Faults::default());
            std::fs::remove_dir(&record).expect("nothing was saved");
        };
        let (asked, ()) = tokio::join!(asked, served);
        asked.unwrap();
        let end = pair.until("it has ended", |progress| progress.state().is_final()).await;
        let (state, outcome) = if cancels {
            (MigrationState::Cancelled, FreezeOutcome::Cancelled)
        } else {
            (MigrationState::Completed, FreezeOutcome::TimedOut)
        };
        assert_eq!((end.state(), end.freezes[0].outcome()), (state, outcome), "{end:?}");
    }
}

#[tokio::test]
async fn the_time_that_a_source_is_down_is_none_of_a_freeze() {
    let mut pair = frozen().await;
    pair.source_down().await;
    pair.target_down().await;
    let (journal, recovered) = Journal::open(pair.dir.path().join("source"), 10).unwrap();
    let (id, mut record) = recovered.active.into_iter().next().unwrap();
    // Of an hour.
    record.progress.as_mut().unwrap().freezes[0].started_unix_ms -= 3_600_000;
    journal.save(&id, SlotRange::FULL, &record).await.unwrap();
    pair.source = pair.source.restarted();
    pair.source_up().await;
    let shown = pair.progress().await;
    let freeze = &shown.freezes[0];
    assert_eq!((freeze.outcome(), freeze.freeze_ms), (FreezeOutcome::Interrupted, Some(60_000)), "{shown:?}");
    assert_eq!(shown.max_freeze_ms, 0, "nobody saw its end");
}

/// Writes are held, until the target has looked at what it has; with a freeze of at most 100 ms.
async fn preparing(change: impl FnOnce(&mut StartMigrationRequest)) -> (Pair, Arc<Semaphore>) {
    let pair = Pair::start().await;
    pair.fill(100).await;
    let gate = Arc::new(Semaphore::new(0));
    for _ in 0..50 {
        pair.target.fault("digests", Fault::Wait(Arc::clone(&gate)));
    }
    pair.begin(change).await.unwrap();
    (pair, gate)
}

#[tokio::test]
async fn writes_that_were_held_go_to_the_target_after_it_was_told_that_the_freeze_is_over() {
    let limits = MigrationLimits { freeze_timeout_ms: Some(100), ..MigrationLimits::default() };
    let (pair, gate) = preparing(|request| request.limits = Some(limits)).await;
    for n in 1..=3_u64 {
        let frozen = |progress: &MigrationProgress| {
            progress.state() == MigrationState::Freezing && progress.freeze_count == n
        };
        pair.until("writes are held", |progress| frozen(progress) && pair.target.calls("digests") > 0).await;
        let before = Instant::now();
        assert_eq!(pair.source.write(b"held", Some(b"1")).await, Answer::Done);
        assert!(before.elapsed() > Duration::from_millis(1), "it was held");
        pair.until("it is over", |progress| progress.state() != MigrationState::Freezing).await;
        gate.add_permits(1);
    }
    gate.add_permits(50);
    let done = pair.reaches(MigrationState::Completed).await;
    assert_eq!(done.attempt, 1, "the stream goes on: {done:?}");
    assert!(pair.target_rows().iter().any(|(key, _)| key == b"held"));
}

#[tokio::test]
async fn a_freeze_ends_with_the_time_that_a_caller_gave_it() {
    let (pair, gate) = preparing(|request| {
        manual(request);
        request.limits = limits();
    })
    .await;
    pair.reaches(MigrationState::Ready).await;
    pair.complete(Some(300)).await.unwrap();
    let missed = pair.until("missed", was_missed).await;
    assert_eq!(missed.complete_deadline_unix_ms, None);
    assert!(missed.max_freeze_ms < 20_000, "{missed:?}");
    assert_eq!(pair.source.held(), None);
    gate.add_permits(50);
    assert_eq!(pair.reaches(MigrationState::Ready).await.freeze_count, 1);
}

#[tokio::test]
async fn another_caller_that_completes_during_a_freeze_has_its_own_time() {
    let (pair, gate) = preparing(|request| {
        manual(request);
        request.limits = limits();
    })
    .await;
    pair.reaches(MigrationState::Ready).await;
    pair.complete(Some(500)).await.unwrap();
    pair.until("writes are held", |_| pair.source.held() == Some(HoldMode::Writes)).await;
    pair.complete(Some(60_000)).await.unwrap();
    pair.until("the first one has failed", |progress| progress.state() != MigrationState::Freezing).await;
    gate.add_permits(50);
    let done = pair.reaches(MigrationState::Completed).await;
    assert!(!was_missed(&done), "{done:?}");
}

#[tokio::test]
async fn a_missed_time_is_told_while_the_target_is_away() {
    let pair = Pair::start().await;
    pair.fill(100).await;
    pair.source.set_faults(Faults { slow_drain: Duration::from_secs(60), ..Faults::default() });
    pair.begin(|request| {
        manual(request);
        request.limits = limits();
    })
    .await
    .unwrap();
    pair.reaches(MigrationState::Ready).await;
    pair.complete(Some(1000)).await.unwrap();
    let mut pair = pair;
    pair.target_down().await;
    let missed = pair.until("missed", was_missed).await;
    assert!(!missed.connected && missed.complete_deadline_unix_ms.is_none(), "{missed:?}");
}

fn was_missed(progress: &MigrationProgress) -> bool {
    let errors = progress.incidents.iter().filter_map(|incident| incident.error.as_ref());
    errors.into_iter().any(|error| error.reason == "COMPLETE_DEADLINE")
}
