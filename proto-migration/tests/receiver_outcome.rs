//! How a migration ends at the target, and what is left of it after a crash.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use proto_common::error::Error;
use proto_common::guard::RangeGuard;
use proto_common::ids::MigrationId;
use proto_common::slots::SlotRange;
use proto_common::v1::Direction;
use proto_migration::Reason;
use proto_migration::decisions::{Decision, Decisions};
use proto_migration::limits::Limits;
use proto_migration::v1::transfer_migration_data_request::{Discard, Forget, Frame, Header};
use proto_migration::v1::transfer_migration_data_response::Frame as Answer;
use proto_migration::v1::{MigrationDecision, MigrationState};
use support::frames::{COMMIT, Node, bulk, eventually, header, resolve, row};
use support::memory_target::Fault;

#[tokio::test]
async fn it_goes_on_after_a_crash_at_every_step() {
    let node = Node::start().await;
    let (mut source, _) = node.accept(header(1)).await;
    source.bulk(vec![row(10, "a")], false).await;
    source.delta(11, vec![row(11, "c")]).await;
    source.durable().await;
    let node = node.crash().await;
    assert_eq!(node.progress().state(), MigrationState::Receiving);
    let (mut source, accepted) = node.accept(header(2)).await;
    let resume = accepted.resume.unwrap();
    assert!(accepted.known && !resume.copied);
    assert_eq!((&*resume.cursor, resume.through_seq, resume.staged_keys), (&b"behind 1"[..], 11, 2));
    source.bulk(vec![row(10, "b")], true).await;
    source.delta(12, vec![]).await;
    source.prepare(1, &node.target).await;
    assert!(matches!(source.answer().await.unwrap(), Answer::Prepared(_)));
    // Prepared: held from the start of the next process on.
    let node = node.crash().await;
    assert_eq!((node.progress().state(), node.target.holds()), (MigrationState::Prepared, 1));
    let (mut source, accepted) = node.accept(resolve(3)).await;
    assert_eq!((accepted.decision(), accepted.known), (MigrationDecision::Undecided, true));
    assert_eq!((node.target.holds(), accepted.resume), (0, None));
    source.send(Frame::Bulk(bulk(1, vec![], false))).await;
    assert_eq!(source.error().await.reason(), "UNEXPECTED_FRAME");
    let (mut source, accepted) = node.accept(header(4)).await;
    source.watermark = accepted.resume.unwrap().through_seq;
    source.prepare(1, &node.target).await;
    assert!(matches!(source.answer().await.unwrap(), Answer::Prepared(_)));
    source.send(COMMIT).await;
    assert!(matches!(source.answer().await.unwrap(), Answer::Committed(_)));
    // The reply was lost.
    let node = node.crash().await;
    let (mut source, accepted) = node.accept(resolve(5)).await;
    assert_eq!(accepted.committed.unwrap().attempt, 4);
    source.send(Frame::Forget(Forget {})).await;
    assert!(matches!(source.answer().await.unwrap(), Answer::Forgotten(_)));
    source.end().await;
}

#[tokio::test]
async fn a_late_commit_of_a_fenced_attempt_fails() {
    let node = Node::start().await;
    let mut old = node.prepared(1).await;
    let (_new, accepted) = node.accept(resolve(2)).await;
    assert_eq!(accepted.decision(), MigrationDecision::Undecided);
    assert_eq!(node.target.holds(), 0);
    old.send(COMMIT).await;
    assert_eq!(old.error().await.reason(), "SUPERSEDED");
    assert_eq!(node.target.calls("commit"), 0);
    assert!(node.target.disk().owned.is_empty());
}

/// The stream broke, and the source serves: that its next one is refused, again and again, leaves nothing prepared.
#[tokio::test]
async fn what_is_prepared_is_given_up_for_an_attempt_that_is_refused() {
    for (still_open, copy) in [(false, 1), (true, 1), (false, 2)] {
        let node = Node::start().await;
        let old = Some(node.prepared(1).await).filter(|_| still_open);
        let staged = node.target.disk().staged.clone();
        node.target.fault("admit", Fault::Fail(Reason::InsufficientDisk.error("full")));
        assert_eq!(node.refused(Header { copy, ..header(2) }).await.reason(), "INSUFFICIENT_DISK");
        let progress = node.progress();
        assert_eq!((progress.state(), progress.attempt), (MigrationState::Receiving, 2));
        assert_eq!(progress.incidents.last().unwrap().error.as_ref().unwrap().reason, "INSUFFICIENT_DISK");
        assert_eq!(node.target.holds(), 0, "clients are let through");
        if let Some(mut old) = old {
            old.send(COMMIT).await;
            assert_eq!(old.error().await.reason(), "SUPERSEDED");
        }
        for attempt in [1, 2] {
            let refused = node.decide(MigrationDecision::Committed, attempt).await.unwrap_err();
            assert_eq!(
                refused.reason(),
                "RESOLVE_REFUSED",
                "what the source acknowledged since would be lost"
            );
        }
        let node = node.crash().await;
        assert_eq!((node.progress().state(), node.target.holds()), (MigrationState::Receiving, 0));
        assert_eq!(node.target.disk().staged, staged, "no copy begins by a stream that is refused");
        let (mut source, accepted) = node.accept(header(3)).await;
        let resume = accepted.resume.unwrap();
        assert_eq!((resume.copy, resume.copied, resume.through_seq), (1, true, 12));
        source.prepare(1, &node.target).await;
        assert!(matches!(source.answer().await.unwrap(), Answer::Prepared(_)));
        source.send(COMMIT).await;
        assert!(matches!(source.answer().await.unwrap(), Answer::Committed(_)));
    }
}

#[tokio::test]
async fn an_attempt_that_is_refused_disturbs_no_stream_that_brings_rows() {
    let node = Node::start().await;
    let (mut source, _) = node.accept(header(1)).await;
    node.target.fault("admit", Fault::Fail(Reason::InsufficientDisk.error("full")));
    assert_eq!(node.refused(header(2)).await.reason(), "INSUFFICIENT_DISK");
    source.bulk(vec![row(10, "a")], false).await;
    source.durable().await;
    assert_eq!(node.progress().attempt, 1);
}

#[tokio::test]
async fn a_commit_is_tried_until_it_succeeds_and_requests_are_held() {
    let node = Node::start().await;
    let source = node.prepared(1).await;
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    node.target.fault("commit", Fault::Fail(Reason::StorageFailed.error("no")));
    node.target.fault("commit", Fault::Panic);
    node.target.fault("commit", Fault::Wait(Arc::clone(&gate)));
    source.send(COMMIT).await;
    eventually("the third try", || node.target.calls("commit") == 3).await;
    assert_eq!(node.target.holds(), 1);
    assert_eq!(node.cancel().await.unwrap_err().reason(), "OUTCOME_PENDING");
    drop(source);
    gate.add_permits(1);
    eventually("committed though the source is gone", || {
        node.progress().state() == MigrationState::Committed
    })
    .await;
    assert_eq!(node.target.holds(), 0);
    assert_eq!(node.cancel().await.unwrap_err().reason(), "ALREADY_COMMITTED");
}

#[tokio::test]
async fn a_discard_is_for_good() {
    let node = Node::start().await;
    let mut source = node.prepared(1).await;
    source.send(Frame::Discard(Discard { reason: "no".into() })).await;
    let Answer::Discarded(discarded) = source.answer().await.unwrap() else { panic!() };
    assert!(discarded.staged_bytes > 0);
    source.end().await;
    assert_eq!(node.target.holds(), 0);
    assert_eq!(node.progress().state(), MigrationState::Cancelled);
    let node = node.crash().await;
    assert_eq!(node.progress().state(), MigrationState::Cancelled);
    let (mut source, accepted) = node.accept(header(2)).await;
    assert_eq!(accepted.decision(), MigrationDecision::Discarded);
    assert!(node.target.disk().staged.is_empty());
    source.send(Frame::Discard(Discard::default())).await;
    assert!(matches!(source.answer().await.unwrap(), Answer::Discarded(_)));
    assert_eq!(node.cancel().await.unwrap().state(), MigrationState::Cancelled);
}

#[tokio::test]
async fn a_cancel_at_the_target_ends_the_stream() {
    for prepared in [false, true] {
        let node = Node::start().await;
        let mut source = if prepared { node.prepared(1).await } else { node.accept(header(1)).await.0 };
        assert_eq!(node.cancel().await.unwrap().state(), MigrationState::Cancelled);
        let Answer::Discarded(discarded) = source.answer().await.unwrap() else { panic!() };
        assert_eq!(discarded.reason, "enough");
        source.end().await;
        assert_eq!((node.target.holds(), node.target.calls("commit")), (0, 0));
        let (_, accepted) = node.accept(resolve(2)).await;
        assert_eq!(accepted.decision(), MigrationDecision::Discarded);
        assert_eq!(accepted.discarded.unwrap().reason, "enough");
    }
}

#[tokio::test]
async fn an_operator_decides_what_is_prepared() {
    for decision in [MigrationDecision::Committed, MigrationDecision::Discarded] {
        let node = Node::start().await;
        let (receiving, _) = node.accept(header(1)).await;
        assert_eq!(node.decide(decision, 1).await.unwrap_err().reason(), "RESOLVE_REFUSED");
        drop(receiving);
        drop(node.prepared(2).await);
        let refused = node.decide(decision, 1).await.unwrap_err();
        assert_eq!((refused.reason(), refused.get("attempt")), ("RESOLVE_REFUSED", Some("2")));
        for _ in 0..2 {
            let resolved = node.decide(decision, 2).await.unwrap();
            assert_eq!(resolved.decision(), decision);
            assert_eq!(resolved.resolved_reason.as_deref(), Some("the disk burnt"));
        }
        let other = if decision == MigrationDecision::Committed {
            MigrationDecision::Discarded
        } else {
            MigrationDecision::Committed
        };
        assert_eq!(node.decide(other, 2).await.unwrap_err().reason(), "RESOLVE_REFUSED");
        assert_eq!(node.target.holds(), 0);
        let (_, accepted) = node.accept(resolve(3)).await;
        assert_eq!(accepted.decision(), decision);
    }
}

#[tokio::test]
async fn a_commit_that_a_newer_owner_forbids_is_not_tried_for_ever() {
    for by_operator in [false, true] {
        let node = Node::start().await;
        let mut source = node.prepared(1).await;
        node.target.fault("commit", Fault::Fail(Reason::StaleSlotEpoch.error("n3 owns slot 7 at epoch 9")));
        if by_operator {
            let refused = node.decide(MigrationDecision::Committed, 1).await.unwrap_err();
            assert_eq!(refused.reason(), "RESOLVE_REFUSED");
            assert!(refused.message().contains("n3 owns slot 7"), "{refused}");
        } else {
            source.send(COMMIT).await;
            assert_eq!(source.error().await.reason(), "STALE_SLOT_EPOCH");
        }
        // Clients are let through, and what is staged can be discarded.
        assert_eq!((node.progress().state(), node.target.holds()), (MigrationState::Receiving, 0));
        let (mut source, accepted) = node.accept(resolve(2)).await;
        assert_eq!(accepted.decision(), MigrationDecision::Undecided);
        source.send(Frame::Discard(Discard::default())).await;
        assert!(matches!(source.answer().await.unwrap(), Answer::Discarded(_)));
        assert_eq!(node.target.calls("commit"), 1);
    }
}

#[tokio::test]
async fn nobody_waits_for_a_source_that_an_operator_says_is_gone() {
    let node = Node::start().await;
    let mut source = node.prepared(1).await;
    source.send(COMMIT).await;
    assert!(matches!(source.answer().await.unwrap(), Answer::Committed(_)));
    drop(source);
    let refused = node.decide(MigrationDecision::Committed, 2).await.unwrap_err();
    assert_eq!(refused.reason(), "RESOLVE_REFUSED", "of another attempt");
    assert_eq!(node.decide(MigrationDecision::Discarded, 1).await.unwrap_err().reason(), "RESOLVE_REFUSED");
    for _ in 0..2 {
        let confirmed = node.decide(MigrationDecision::Committed, 1).await.unwrap();
        assert_eq!(confirmed.state(), MigrationState::Completed);
        assert_eq!(confirmed.resolved_reason.as_deref(), Some("the disk burnt"));
    }
    assert!(node.target.disk().records.is_empty());
    // The source comes back after all.
    let (_, accepted) = node.accept(resolve(2)).await;
    assert_eq!(accepted.decision(), MigrationDecision::Committed);
}

#[tokio::test]
async fn a_record_that_cannot_be_read_is_left_alone() {
    let node = Node::start().await;
    let id = MigrationId::new("m1").unwrap();
    drop(node.accept(header(1)).await);
    node.target.disk().records.insert(id.clone(), Bytes::from_static(b"\xff"));
    let node = node.crash().await;
    assert_eq!(node.refused(header(1)).await.reason(), "SLOTS_QUARANTINED");
    // Nor does anybody else get the slots that are staged for it.
    let other = node.refused(Header { migration_id: "m2".into(), ..header(1) }).await;
    assert_eq!(other.reason(), "SLOTS_QUARANTINED");
    assert!(other.get("holder").is_some_and(|holder| holder.contains("m1")), "{other:?}");
    assert_eq!(node.target.disk().records[&id], Bytes::from_static(b"\xff"));
}

/// As many migrations as a node shows at once, of a slot each, and one more.
fn one_of_many(number: u16) -> Header {
    let mut header = Header { migration_id: format!("m{number}"), ..header(1) };
    header.spec.as_mut().unwrap().slots = Some(SlotRange::new(number, number + 1).unwrap().into());
    header
}

#[tokio::test]
async fn what_cannot_be_shown_is_not_begun_and_what_was_begun_keeps_no_node_from_starting() {
    const SHOWN: u16 = 1024;
    let mut limits = Limits::default();
    (limits.incoming, limits.incoming_per_peer, limits.streams_per_peer) = (2000, 2000, 2000);
    let node = Node::with(|builder| builder.limits(limits)).await;
    for number in 0..SHOWN {
        drop(node.accept(one_of_many(number)).await);
    }
    assert_eq!(node.refused(one_of_many(SHOWN)).await.reason(), "LIMIT_EXCEEDED");
    assert_eq!(node.target.disk().records.len(), usize::from(SHOWN));
    assert_eq!(node.target.calls("begin"), usize::from(SHOWN));

    // One more than that, as a node of an earlier version may have left it.
    let id = MigrationId::new(format!("m{SHOWN}")).unwrap();
    let elsewhere = Node::start().await;
    drop(elsewhere.accept(one_of_many(SHOWN)).await);
    {
        let (mut disk, mut other) = (node.target.disk(), elsewhere.target.disk());
        disk.records.insert(id.clone(), other.records.remove(&id).unwrap());
        disk.staged.insert(id.clone(), other.staged.remove(&id).unwrap());
        disk.slots.insert(id.clone(), other.slots[&id]);
    }
    let guard = RangeGuard::new();
    let shared = guard.clone();
    let node = Node::over(node.target.crash(), node.dir, |builder| builder.guard(shared)).await;
    let migrations = node.receiver.migrations();
    assert_eq!(migrations.active(Some(Direction::In)).len(), usize::from(SHOWN) + 1);
    assert_eq!(migrations.get(None, &id).unwrap().state(), MigrationState::Receiving);
    let busy = guard.try_acquire(SlotRange::new(SHOWN, SHOWN + 1).unwrap(), "transfer t1").unwrap_err();
    assert!(busy.get("holder").is_some_and(|holder| holder.contains(id.as_str())), "{busy:?}");
    let (_, accepted) = node.accept(Header { attempt: 2, ..one_of_many(SHOWN) }).await;
    assert!(accepted.known);
}

#[tokio::test]
async fn a_migration_that_could_not_begin_is_over() {
    let node = Node::start().await;
    node.target.fault("begin", Fault::Fail(Reason::StorageFailed.error("the disk is full")));
    assert_eq!(node.refused(header(1)).await.reason(), "STORAGE_FAILED");
    let failed = node.progress();
    assert_eq!(failed.state(), MigrationState::Failed);
    assert_eq!(failed.progress.unwrap().error.unwrap().reason, "STORAGE_FAILED");
    assert!(node.target.disk().records.is_empty());
    let (_, accepted) = node.accept(header(2)).await;
    assert!(!accepted.known);
    assert_eq!(node.progress().state(), MigrationState::Receiving);
}

#[tokio::test]
async fn records_that_nobody_needs_are_dropped_and_others_are_not() {
    let mut limits = Limits::default();
    limits.record_kept = Duration::from_millis(50);
    let node = Node::with(|builder| builder.limits(limits)).await;
    drop(node.accept(header(1)).await);
    eventually("the empty record is dropped", || node.target.disk().records.is_empty()).await;
    let (mut source, accepted) = node.accept(header(1)).await;
    assert!(!accepted.known);
    source.bulk(vec![row(10, "a")], false).await;
    source.durable().await;
    drop(source);
    eventually("the stream is gone", || !node.progress().connected).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(node.target.disk().records.len(), 1, "what is staged is never dropped because of its age");
    node.cancel().await.unwrap();
    eventually("the cancelled record is dropped", || node.target.disk().records.is_empty()).await;
    let (mut source, accepted) = node.accept(resolve(9)).await;
    assert_eq!(accepted.decision(), MigrationDecision::Discarded, "the history knows it");
    assert_eq!(accepted.discarded.unwrap().reason, "enough");
    source.send(Frame::Discard(Discard::default())).await;
    let Answer::Discarded(discarded) = source.answer().await.unwrap() else { panic!() };
    assert_eq!(discarded.reason, "enough");
}

/// Whoever owns the slots now would find them busy for as long as the one that has lost them likes.
#[tokio::test(start_paused = true)]
async fn what_its_source_has_lost_is_cancelled_when_that_was_seen_twice() {
    let node = Node::start().await;
    let (mut source, _) = node.accept(header(1)).await;
    source.bulk(vec![row(10, "a")], false).await;
    source.durable().await;
    let other = Header { migration_id: "m2".into(), ..header(1) };
    assert_eq!(node.refused(other.clone()).await.reason(), "RANGE_BUSY");
    drop(source);
    let looks = || node.target.calls("lost_by_source");
    let looked = async || {
        let before = looks();
        eventually("it looks again", || looks() > before).await;
    };
    // What is known is a second old.
    looked().await;
    node.target.lose(Some("slots 3 are of n3"));
    looked().await;
    node.target.lose(None);
    looked().await;
    node.target.lose(Some("slots 3 are of n3"));
    looked().await;
    let (mut source, _) = node.accept(header(2)).await;
    looked().await;
    let Answer::Discarded(discarded) = source.answer().await.unwrap() else { panic!() };
    assert_eq!(discarded.reason, "slots 3 are of n3");
    source.end().await;
    assert_eq!(node.progress().state(), MigrationState::Cancelled);
    node.target.lose(None);
    node.accept(other).await;
}

/// The source may be gone for good, and who says that it owns the slots may lie.
#[tokio::test(start_paused = true)]
async fn what_is_prepared_stays_whoever_is_said_to_own_the_slots() {
    let node = Node::start().await;
    let source = node.prepared(1).await;
    node.target.lose(Some("slots 3 are of n3"));
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!((node.progress().state(), node.target.holds()), (MigrationState::Prepared, 1));
    assert!(!node.target.disk().staged.is_empty());
    drop(source);
}

/// It gave up before it was accepted, and cannot tell.
#[tokio::test(start_paused = true)]
async fn a_source_that_never_heard_that_it_was_accepted_has_the_slots_for_a_minute() {
    let node = Node::start().await;
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    node.target.fault("begin", Fault::Wait(Arc::clone(&gate)));
    let source = node.open(header(1)).await;
    eventually("it is about to begin", || node.target.calls("begin") == 1).await;
    drop(source);
    gate.add_permits(1);
    eventually("it has begun", || node.target.disk().records.len() == 1).await;
    let began = tokio::time::Instant::now();
    let other = Header { migration_id: "m2".into(), ..header(1) };
    assert_eq!(node.refused(other.clone()).await.reason(), "RANGE_BUSY");
    tokio::time::sleep(Duration::from_secs(59)).await;
    assert_eq!(node.progress().state(), MigrationState::Receiving, "it may still come");
    eventually("it is given up", || node.progress().state() == MigrationState::Failed).await;
    assert!(began.elapsed() < Duration::from_secs(80), "{:?}", began.elapsed());
    assert!(node.target.disk().records.is_empty());
    drop(node.accept(other).await);
    tokio::time::sleep(Duration::from_secs(60)).await;
    eventually("the other one is given up, too", || node.target.disk().records.is_empty()).await;
    // It comes after all.
    let (_, accepted) = node.accept(header(2)).await;
    assert!(!accepted.known && accepted.resume.is_some());
}

/// Decides in memory; can be made to fail first.
#[derive(Debug, Clone, Default)]
struct Consensus {
    decided: Arc<Mutex<HashMap<u64, Decision>>>,
    failures: Arc<Mutex<usize>>,
}

impl Decisions for Consensus {
    fn decide<'a>(
        &'a self,
        _: &'a MigrationId,
        attempt: u64,
        wish: Decision,
    ) -> Pin<Box<dyn Future<Output = Result<Decision, Error>> + Send + 'a>> {
        Box::pin(async move {
            let mut failures = self.failures.lock().unwrap();
            if *failures > 0 {
                *failures -= 1;
                return Err(Reason::StorageFailed.error("no quorum"));
            }
            Ok(*self.decided.lock().unwrap().entry(attempt).or_insert(wish))
        })
    }
}

#[tokio::test]
async fn others_decide() {
    let consensus = Consensus::default();
    let node = Node::with(|builder| builder.decisions(consensus.clone())).await;
    // A new attempt aborts the one that was prepared.
    drop(node.prepared(1).await);
    let (_, accepted) = node.accept(resolve(2)).await;
    assert_eq!(accepted.decision(), MigrationDecision::Undecided);
    assert_eq!(consensus.decided.lock().unwrap()[&1], Decision::Abort);
    // Somebody aborted it before the commit came.
    let mut source = node.prepared(3).await;
    consensus.decided.lock().unwrap().insert(3, Decision::Abort);
    source.send(COMMIT).await;
    assert_eq!(source.error().await.reason(), "STALE_ATTEMPT");
    assert_eq!((node.target.holds(), node.target.calls("commit")), (0, 0));
    // It was decided to commit, and only then does a new attempt come.
    drop(node.prepared(4).await);
    consensus.decided.lock().unwrap().insert(4, Decision::Commit);
    let (_, accepted) = node.accept(resolve(5)).await;
    assert_eq!(accepted.committed.unwrap().attempt, 4);
    assert_eq!(node.target.disk().owned.len(), 1);
}

#[tokio::test]
async fn a_decision_is_followed_after_a_restart() {
    let consensus = Consensus::default();
    let node = Node::with(|builder| builder.decisions(consensus.clone())).await;
    let source = node.prepared(1).await;
    *consensus.failures.lock().unwrap() = usize::MAX;
    source.send(COMMIT).await;
    eventually("asked", || *consensus.failures.lock().unwrap() < usize::MAX).await;
    node.receiver.shutdown().await;
    assert_eq!(node.target.holds(), 1);
    *consensus.failures.lock().unwrap() = 3;
    let node =
        Node::over(node.target.crash(), node.dir, |builder| builder.decisions(consensus.clone())).await;
    eventually("committed", || node.progress().state() == MigrationState::Committed).await;
    assert_eq!(consensus.decided.lock().unwrap()[&1], Decision::Commit);
}
