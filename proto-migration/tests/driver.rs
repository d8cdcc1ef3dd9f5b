//! The source's side against a real target's side, both over stores in memory: every way that a migration can go.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::cell::Cell;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto_common::error::Error;
use proto_common::fence::Fence;
use proto_common::slots::{SlotRange, slot_of};
use proto_common::v1::Direction;
use proto_migration::MigrationSource as _;
use proto_migration::driver::{MigrationDriver, dial_fn};
use proto_migration::hold::HoldMode;
use proto_migration::journal::Journal;
use proto_migration::v1::migration_service_client::MigrationServiceClient;
use proto_migration::v1::{
    self, FreezeOutcome, MigrationDecision, MigrationGate, MigrationLimits, MigrationProgress,
    MigrationState, StartMigrationRequest,
};
use support::memory_source::{Answer, Faults, MemorySource};
use support::memory_target::Fault;
use support::pair::{Pair, Service, error_of, id, identity, manual};
use tokio::sync::Semaphore;

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
async fn totals_are_what_there_was_however_wrong_the_estimate() {
    for estimate in [(1000, 1 << 20), (10, 10)] {
        let pair = Pair::start().await;
        pair.fill(300).await;
        pair.source.set_faults(Faults { estimate: Some(estimate), ..Faults::default() });
        let started = pair.begin(manual).await.unwrap().progress.unwrap();
        assert_eq!((started.items_total.zip(started.bytes_total)), Some(estimate));
        let ready = pair.reaches(MigrationState::Ready).await.progress.unwrap();
        assert_eq!((ready.items_done, ready.items_total), (300, Some(300)), "{ready:?}");
        assert_eq!(ready.bytes_total, Some(ready.bytes_done), "{ready:?}");
        assert!(ready.total_is_estimate, "clients write on");
        pair.source.write(b"another", Some(b"1")).await;
        pair.until("it counts", |progress| progress.progress.as_ref().unwrap().items_done == 301).await;
        pair.complete(None).await.unwrap();
        let done = pair.reaches(MigrationState::Completed).await.progress.unwrap();
        assert_eq!((done.items_done, done.items_total), (301, Some(301)), "{done:?}");
        assert_eq!((done.bytes_total, done.total_is_estimate), (Some(done.bytes_done), false), "{done:?}");
    }
}

#[tokio::test]
async fn a_lost_log_starts_the_copy_again_and_says_so() {
    let pair = Pair::start().await;
    pair.fill(300).await;
    pair.begin(manual).await.unwrap();
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

/// Begins with a freeze of at most 50 ms, and waits until one took longer.
async fn freeze_times_out(pair: &Pair) -> MigrationProgress {
    pair.begin(|request| {
        request.limits = Some(MigrationLimits { freeze_timeout_ms: Some(50), ..MigrationLimits::default() });
    })
    .await
    .unwrap();
    pair.until("a freeze timed out", |progress| {
        progress.freezes.iter().any(|freeze| freeze.outcome() == FreezeOutcome::TimedOut)
    })
    .await
}

#[tokio::test]
async fn a_freeze_that_takes_too_long_is_given_up_and_tried_again() {
    let pair = Pair::start().await;
    pair.fill(100).await;
    let gate = Arc::new(Semaphore::new(0));
    pair.target.fault("digests", Fault::Wait(Arc::clone(&gate)));
    let frozen = freeze_times_out(&pair).await;
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

/// Half of the slots, with that of `key1`.
fn moving() -> SlotRange {
    SlotRange::new(8192, 16_384).unwrap()
}

/// Begins a manual migration, waits until it is READY, and stops the target from applying until the gate is opened.
async fn nothing_is_applied(pair: &Pair, limits: MigrationLimits) -> Arc<Semaphore> {
    pair.fill(20).await;
    pair.begin(|request| {
        let spec = request.spec.as_mut().unwrap();
        (spec.auto_complete, spec.slots) = (false, Some(moving().into()));
        request.limits = Some(limits);
    })
    .await
    .unwrap();
    pair.reaches(MigrationState::Ready).await;
    let (gate, applied) = (Arc::new(Semaphore::new(0)), pair.target.calls("apply"));
    pair.target.fault("apply", Fault::Wait(Arc::clone(&gate)));
    pair.source.write(b"key1", Some(b"1")).await;
    pair.until("it is applied", |_| pair.target.calls("apply") > applied).await;
    assert_eq!(pair.target.calls("hurry"), 0, "nobody waits");
    gate
}

/// Writes until the target's store hurries.
async fn it_hurries(pair: &Pair) -> MigrationProgress {
    let hurries = Cell::new(false);
    let writes = async {
        while !hurries.get() {
            pair.source.write(b"key1", Some(b"2")).await;
            // Each is a batch, of which the target queues 64 while nothing is applied: behind those it would not hear that it is to hurry.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let until = async {
        let progress = pair.until("it hurries", |_| pair.target.hurried()).await;
        hurries.set(true);
        progress
    };
    tokio::join!(until, writes).0
}

#[tokio::test]
async fn the_target_hurries_before_writes_are_held() {
    let pair = Pair::start().await;
    let gate = nothing_is_applied(&pair, MigrationLimits::default()).await;
    pair.complete(Some(60_000)).await.unwrap();
    let hurried = it_hurries(&pair).await;
    assert_eq!(hurried.freeze_count, 0, "while writes go on");
    gate.add_permits(1);
    pair.reaches(MigrationState::Completed).await;
    assert!(!pair.target.hurried());
}

#[tokio::test]
async fn a_freeze_is_not_put_off_for_as_long_as_a_lag_may_last() {
    let pair = Pair::start().await;
    let limits = MigrationLimits {
        freeze_timeout_ms: Some(20_000),
        ready_lag_ms: Some(u64::MAX),
        ..MigrationLimits::default()
    };
    let gate = nothing_is_applied(&pair, limits).await;
    pair.complete(Some(60_000)).await.unwrap();
    pair.until("writes are held", |_| pair.source.held() == Some(HoldMode::Writes)).await;
    gate.add_permits(1);
    pair.reaches(MigrationState::Completed).await;
}

/// Freezes with so many changes on their way that the target has not applied, after as many writes to slots that stay.
async fn freezes_with_a_lag(
    limits: MigrationLimits,
    writes: usize,
    elsewhere: usize,
) -> (Pair, MigrationProgress) {
    let pair = Pair::start().await;
    let limits = MigrationLimits { freeze_timeout_ms: Some(20_000), ready_lag_ms: Some(1000), ..limits };
    let gate = nothing_is_applied(&pair, limits).await;
    let keys = || (0..).map(|n| format!("late{n}"));
    let moves = |key: &String| moving().contains(slot_of(key.as_bytes()));
    let staying = keys().filter(|key| !moves(key)).take(elsewhere);
    for key in keys().filter(moves).take(writes).chain(staying) {
        assert_eq!(pair.source.write(key.as_bytes(), Some(b"1")).await, Answer::Done);
    }
    pair.complete(Some(60_000)).await.unwrap();
    pair.until("who is held is not slowed as well", |_| {
        pair.source.held().is_some() && pair.source.delay().is_zero()
    })
    .await;
    gate.add_permits(1);
    let done = pair.reaches(MigrationState::Completed).await;
    assert_eq!(pair.target_rows().iter().filter(|(key, _)| key.starts_with(b"late")).count(), writes);
    (pair, done)
}

#[tokio::test]
async fn writers_are_slowed_a_little_before_a_freeze_that_has_much_to_send() {
    let (pair, done) = freezes_with_a_lag(MigrationLimits::default(), 200, 0).await;
    // The first of the delays: its round does not end, as nothing is applied.
    assert_eq!(pair.source.longest_delay(), Duration::from_millis(1));
    assert!(!done.not_converging && pair.source.delay().is_zero());
}

#[tokio::test]
async fn nobody_is_slowed_before_a_freeze_who_may_not_be_or_need_not() {
    let unslowed = MigrationLimits { slow_writers: Some(false), ..MigrationLimits::default() };
    let default = MigrationLimits::default();
    for (limits, writes, elsewhere) in [(unslowed, 200, 0), (default, 10, 0), (default, 10, 200)] {
        let (pair, _) = freezes_with_a_lag(limits, writes, elsewhere).await;
        assert_eq!(pair.source.longest_delay(), Duration::ZERO, "{writes} writes, {elsewhere} elsewhere");
    }
}

#[tokio::test]
async fn the_target_hurries_where_the_lag_does_not_fall() {
    let pair = Pair::start().await;
    let limits =
        MigrationLimits { ready_lag_entries: Some(1), ready_lag_ms: Some(10), ..MigrationLimits::default() };
    let gate = nothing_is_applied(&pair, limits).await;
    let hurried = it_hurries(&pair).await;
    assert_eq!((hurried.state(), hurried.freeze_count), (MigrationState::CatchingUp, 0));
    gate.add_permits(1);
    pair.reaches(MigrationState::Ready).await;
    pair.until("it rests", |_| !pair.target.hurried()).await;
}

#[tokio::test]
async fn a_freeze_that_ends_before_the_target_is_asked_is_none_to_the_target() {
    let pair = Pair::start().await;
    pair.fill(100).await;
    pair.source.set_faults(Faults { slow_drain: Duration::from_secs(60), ..Faults::default() });
    let frozen = freeze_times_out(&pair).await;
    let first = &frozen.freezes[0];
    assert!(first.final_seq == 0 && first.drain_ms == 0, "the target was not asked to prepare: {first:?}");
    pair.source.set_faults(Faults::default());
    let done = pair.reaches(MigrationState::Completed).await;
    assert_eq!(done.attempt, frozen.attempt, "{done:?}");
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

    let manual: Spoil = manual;
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
        // The log is gone, and nothing is on its way.
        let task = cancelled.progress.unwrap();
        assert_eq!((cancelled.lag, cancelled.log_bytes), (None, 0), "{state:?}");
        assert_eq!((task.bytes_per_second, task.eta_ms), (None, None), "{state:?}");
        pair.source_serves().await;
        assert!(pair.target.disk().staged.is_empty(), "{state:?}");
        assert_eq!(pair.source.rows(SlotRange::FULL).len(), 201);
    }
}

/// On a clock that stands still while anybody runs: whoever waits for a moment without letting others run waits for ever.
#[tokio::test(start_paused = true)]
async fn rows_wait_for_changes_near_the_cap_of_the_log_and_nobody_spins_meanwhile() {
    let pair = Pair::start().await;
    // The log of this source counts keys.
    let write = async |n: u32| {
        let key = format!("{n:065000}");
        assert_eq!(pair.source.write(key.as_bytes(), Some(b"value")).await, Answer::Done);
    };
    for n in 0..50 {
        write(n).await;
    }
    pair.source.set_faults(Faults { slow_pages: Duration::from_millis(100), ..Faults::default() });
    let gate = Arc::new(Semaphore::new(0));
    pair.target.fault("apply", Fault::Wait(Arc::clone(&gate)));
    pair.begin(|request| {
        request.limits = Some(MigrationLimits { log_bytes_cap: Some(1 << 20), ..MigrationLimits::default() });
    })
    .await
    .unwrap();
    pair.reaches(MigrationState::Copying).await;
    // More than half of the cap waits for the target, and more comes.
    for n in 0..9 {
        write(n).await;
    }
    for _ in 0..200 {
        assert_eq!(pair.source.write(b"small", Some(b"value")).await, Answer::Done);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let behind = pair.until("near the cap", |progress| progress.log_bytes > 512 << 10).await;
    assert_eq!(behind.state(), MigrationState::Copying, "with rows left");
    gate.add_permits(1);
    pair.reaches(MigrationState::Completed).await;
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
async fn what_writers_were_slowed_by_before_a_restart_counts() {
    let mut pair = Pair::start().await;
    pair.begin(manual).await.unwrap();
    let slowed = async |pair: &Pair, sum: u64| {
        pair.reaches(MigrationState::Ready).await;
        pair.source.slow_writers(&id(), Duration::from_millis(5));
        assert_eq!(pair.source.write(b"key", Some(b"1")).await, Answer::Done);
        pair.until("it is told", |progress| progress.writers_slowed_ms == sum).await;
    };
    slowed(&pair, 5).await;
    // Which saves it.
    pair.begin(manual).await.unwrap();
    pair.source_down().await;
    pair.source = pair.source.restarted();
    pair.source_up().await;
    slowed(&pair, 10).await;
    // The same store, with another driver.
    pair.begin(manual).await.unwrap();
    pair.source_down().await;
    pair.source_up().await;
    slowed(&pair, 15).await;
    pair.complete(None).await.unwrap();
    assert_eq!(pair.reaches(MigrationState::Completed).await.writers_slowed_ms, 15);
}

#[tokio::test]
async fn what_the_target_wishes_limits_the_rate_whatever_a_caller_allows() {
    let mut pair = Pair::start().await;
    pair.target_down().await;
    pair.target_limits.bytes_per_second = NonZeroU64::new(4 << 20);
    pair.target_up(2).await;
    for n in 0..100 {
        pair.source.write(format!("key{n}").as_bytes(), Some(&[b'x'; 64 << 10])).await;
    }
    pair.begin(|_| {}).await.unwrap();
    let throttled = |than: u64| move |progress: &MigrationProgress| progress.source_throttled_ms > than;
    let before = pair.until("it waits for the target's rate", throttled(0)).await;
    let rate = Some(1 << 40);
    let limits = MigrationLimits { max_bytes_per_second: rate, ..MigrationLimits::default() };
    pair.begin(|request| request.limits = Some(limits)).await.unwrap();
    let more = before.source_throttled_ms + 300;
    let after = pair.until("it goes on waiting", throttled(more)).await;
    assert_eq!(after.limits.unwrap().max_bytes_per_second, rate);
}

/// Nothing would ever arrive of a row that takes longer than the target waits for one.
#[tokio::test]
async fn a_row_that_the_rate_holds_up_for_longer_than_a_stream_may_be_slow_arrives() {
    let mut pair = Pair::start().await;
    pair.target_down().await;
    (pair.target_limits.slowest_bytes, pair.target_limits.slowest_time) = (8 << 10, Duration::from_secs(2));
    pair.target_up(2).await;
    for n in 0..20 {
        pair.source.write(format!("key{n}").as_bytes(), Some(&[b'x'; 1 << 10])).await;
    }
    pair.source.write(b"large", Some(&[b'x'; 20 << 10])).await;
    let limits = MigrationLimits { max_bytes_per_second: Some(5 << 10), ..MigrationLimits::default() };
    pair.begin(|request| request.limits = Some(limits)).await.unwrap();
    let done = pair.reaches(MigrationState::Completed).await;
    assert!(done.source_throttled_ms > 0, "{done:?}");
    assert!(pair.source.pages() >= 5, "no more at once than in a second: {} pages", pair.source.pages());
    assert_eq!(pair.target_rows().len(), 21);
}
