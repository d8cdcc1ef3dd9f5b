//! The target's side, spoken to frame by frame as any source may: what is let in, checked and applied.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use proto_common::checksum::crc64;
use proto_common::error::Error;
use proto_common::guard::RangeGuard;
use proto_common::ids::MigrationId;
use proto_common::prompt::MAX_REQUEST_BYTES;
use proto_common::slots::SlotRange;
use proto_migration::Reason;
use proto_migration::entry::{Entry, Image};
use proto_migration::limits::Limits;
use proto_migration::v1::transfer_migration_data_request::{
    Bulk, Discard, Forget, Frame, Header, Heartbeat, Prepare, Release,
};
use proto_migration::v1::transfer_migration_data_response::Frame as Answer;
use proto_migration::v1::{
    self, MigrationDecision, MigrationState, TransferMigrationDataRequest, TransferMigrationDataResponse,
};
use support::frames::{COMMIT, Node, Source, bulk, delta, eventually, header, prepare, resolve, row};
use support::memory_target::{Fault, Rows};

#[tokio::test]
async fn a_migration_goes_all_the_way() {
    let node = Node::start().await;
    let mut source = node.prepared(1).await;
    assert_eq!(node.target.holds(), 1);
    assert_eq!(node.progress().state(), MigrationState::Prepared);
    source.send(COMMIT).await;
    let Answer::Committed(committed) = source.answer().await.unwrap() else { panic!() };
    assert_eq!((committed.attempt, committed.freeze, committed.slot_epoch), (1, 1, 5));
    assert_eq!(node.target.holds(), 0);
    assert_eq!(node.progress().decision(), MigrationDecision::Committed);
    source.send(Frame::Forget(Forget {})).await;
    assert!(matches!(source.answer().await.unwrap(), Answer::Forgotten(_)));
    source.end().await;
    let progress = node.progress();
    assert_eq!((progress.state(), progress.slot_epoch), (MigrationState::Completed, 5));
    assert_eq!(progress.progress.as_ref().unwrap().items_done, 2);
    assert_eq!(progress.delta_entries, 2);
    assert!(node.target.disk().records.is_empty());
    let keys: Vec<_> = node.target.disk().owned[0]
        .2
        .iter()
        .filter(|(_, (_, image))| image.is_some())
        .map(|(k, _)| k.clone())
        .collect();
    assert_eq!(keys, ["a", "c"]);
    // A source that did not hear of it, at this process and at the next.
    let (_, again) = node.accept(resolve(2)).await;
    assert_eq!(again.decision(), MigrationDecision::Committed);
    let node = node.crash().await;
    let (mut source, again) = node.accept(resolve(3)).await;
    assert_eq!(again.committed.unwrap(), committed);
    source.send(Frame::Forget(Forget {})).await;
    assert!(matches!(source.answer().await.unwrap(), Answer::Forgotten(_)));
}

#[tokio::test]
async fn what_a_header_may_not_say() {
    type Spoil = fn(&mut Header);
    let node = Node::start().await;
    let cases: [(&str, Spoil); 16] = [
        ("INVALID_ID", |h| h.migration_id = "../x".into()),
        ("INVALID_FIELD", |h| h.spec = None),
        ("INVALID_SLOT_RANGE", |h| h.spec.as_mut().unwrap().slots = None),
        ("SELF_MIGRATION", |h| h.spec.as_mut().unwrap().target_node_id = "n1".into()),
        ("INVALID_FIELD", |h| h.purpose = 9),
        ("INVALID_FIELD", |h| h.source = None),
        ("INVALID_FIELD", |h| h.source.as_mut().unwrap().node_id = "n9".into()),
        ("INVALID_FIELD", |h| h.session = Bytes::from_static(b"short")),
        ("INVALID_FIELD", |h| h.attempt = 0),
        ("INVALID_FIELD", |h| h.copy = 0),
        ("INVALID_FIELD", |h| h.priority = 99),
        ("INVALID_FIELD", |h| h.required_features = vec!["NO".into()]),
        ("UNSUPPORTED_FEATURE", |h| h.required_features = vec!["teleport".into()]),
        ("WRONG_NODE", |h| h.spec.as_mut().unwrap().target_node_id = "n3".into()),
        ("WRONG_CLUSTER", |h| h.source.as_mut().unwrap().cluster_id = "d".into()),
        ("STORE_CHANGED", |h| h.target_store_id = vec![9; 16].into()),
    ];
    for (reason, spoil) in cases {
        let mut header = header(1);
        spoil(&mut header);
        assert_eq!(node.refused(header).await.reason(), reason);
    }
    assert!(node.target.disk().records.is_empty(), "nothing was recorded");
    node.accept(header(1)).await;
}

#[tokio::test]
async fn who_may_write() {
    let node = Node::start().await;
    let (mut first, accepted) = node.accept(header(2)).await;
    assert!(!accepted.known);
    let stale = node.refused(header(2)).await;
    assert_eq!((stale.reason(), stale.get("attempt")), ("STALE_ATTEMPT", Some("2")));
    let other = Header { session: vec![8; 16].into(), ..header(1) };
    let superseded = node.refused(other).await;
    assert_eq!((superseded.reason(), superseded.is_retryable()), ("SUPERSEDED", false));
    let mut spec = header(3);
    spec.spec.as_mut().unwrap().auto_complete = true;
    assert_eq!(node.refused(spec).await.get("field"), Some("auto_complete"));
    let mut store = header(3);
    store.source.as_mut().unwrap().store_id = vec![5; 16].into();
    assert_eq!(node.refused(store).await.reason(), "STORE_CHANGED");
    // None of those disturbed it.
    first.bulk(vec![row(10, "a")], false).await;
    first.durable().await;
    let next = Header { copy: 2, base_seq: 20, ..header(3) };
    let (_second, accepted) = node.accept(next).await;
    assert_eq!(first.error().await.reason(), "SUPERSEDED");
    let resume = accepted.resume.unwrap();
    assert_eq!((resume.copy, resume.through_seq, resume.staged_keys), (2, 20, 0));
    assert_eq!(node.refused(header(4)).await.get("copy"), Some("2"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_attempts_that_come_at_once_the_last_one_writes() {
    let node = Node::start().await;
    let mut meant = Vec::new();
    for round in 0..30_u64 {
        // Each by a session of its own, as by processes that do not know of each other.
        let opening = (1..=8_u8).map(|number| {
            let header = Header { session: vec![number; 16].into(), ..header(round * 8 + u64::from(number)) };
            let client = node.client.clone();
            tokio::spawn(async move {
                let mut source = Source::open(client, header).await;
                let accepted = source.accepted().await;
                (source, accepted)
            })
        });
        let mut opened = Vec::new();
        for opening in opening.collect::<Vec<_>>() {
            opened.push(opening.await.unwrap());
        }
        let (mut last, accepted) = opened.pop().unwrap();
        accepted.unwrap();
        for (mut source, accepted) in opened {
            let error = match accepted {
                Ok(_) => {
                    source.delta(source.watermark + 1, vec![row(source.watermark + 1, "late")]).await;
                    source.error().await
                }
                Err(error) => error,
            };
            assert_eq!(error.reason(), "SUPERSEDED", "{error:?}");
        }
        let key = format!("of-{round}");
        let seq = last.watermark + 1;
        last.delta(seq, vec![row(seq, &key)]).await;
        last.durable().await;
        meant.push(key);
    }
    let disk = node.target.disk();
    let rows = &disk.staged[&MigrationId::new("m1").unwrap()];
    let mut there: Vec<_> = rows.keys().map(|key| String::from_utf8_lossy(key).into_owned()).collect();
    meant.sort();
    there.sort();
    assert_eq!(there, meant);
}

#[tokio::test]
async fn what_a_batch_may_not_be() {
    type Make = fn() -> Vec<Frame>;
    let cases: [(&str, Make); 17] = [
        ("BATCH_OUT_OF_ORDER", || vec![Frame::Bulk(bulk(2, vec![], false))]),
        ("BATCH_TOO_LARGE", || {
            vec![Frame::Bulk(Bulk { payload: vec![0; (64 << 10) + 1].into(), ..bulk(1, vec![], false) })]
        }),
        ("BATCH_TOO_LARGE", || vec![Frame::Bulk(Bulk { entry_count: 65_537, ..bulk(1, vec![], false) })]),
        ("BATCH_CHECKSUM_MISMATCH", || {
            vec![Frame::Bulk(Bulk { crc64nvme: 1, ..bulk(1, vec![row(10, "a")], false) })]
        }),
        ("MALFORMED_BATCH", || {
            vec![Frame::Bulk(Bulk { entry_count: 3, ..bulk(1, vec![row(10, "a")], false) })]
        }),
        ("MALFORMED_BATCH", || {
            let payload = Bytes::from_static(b"\xff\xff");
            vec![Frame::Bulk(Bulk { crc64nvme: crc64(&payload), payload, ..bulk(1, vec![], false) })]
        }),
        ("INVALID_FIELD", || {
            vec![Frame::Bulk(Bulk { cursor: vec![0; 70_000].into(), ..bulk(1, vec![], false) })]
        }),
        ("INVALID_FIELD", || vec![Frame::Bulk(bulk(1, vec![row(0, "a")], false))]),
        ("UNEXPECTED_FRAME", || vec![Frame::Bulk(bulk(1, vec![], true)), Frame::Bulk(bulk(2, vec![], true))]),
        ("UNEXPECTED_FRAME", || vec![Frame::Header(header(2))]),
        ("UNEXPECTED_FRAME", || vec![COMMIT]),
        ("UNEXPECTED_FRAME", || vec![Frame::Forget(Forget {})]),
        ("UNEXPECTED_FRAME", || vec![Frame::Release(Release { freeze: 1 })]),
        ("DELTA_GAP", || vec![Frame::Delta(delta(1, 11, 12, vec![]))]),
        ("INVALID_FIELD", || vec![Frame::Delta(delta(1, 10, 9, vec![]))]),
        ("INVALID_FIELD", || vec![Frame::Delta(delta(1, 10, 12, vec![row(13, "a")]))]),
        ("INVALID_FIELD", || vec![Frame::Delta(delta(1, 10, 12, vec![row(12, "a"), row(11, "b")]))]),
    ];
    let mut limits = Limits::default();
    limits.batch_bytes = 64 << 10;
    let node = Node::with(|builder| builder.limits(limits)).await;
    for (attempt, (reason, make)) in (1..).zip(cases) {
        let (mut source, _) = node.accept(Header { copy: attempt, ..header(attempt) }).await;
        for frame in make() {
            source.send(frame).await;
        }
        assert_eq!(source.error().await.reason(), reason, "case {attempt}");
    }
    let (source, _) = node.accept(header_of(20)).await;
    let mut source = source;
    source.frames.send(TransferMigrationDataRequest { frame: None }).await.unwrap();
    assert_eq!(source.error().await.reason(), "UNKNOWN_FRAME");
    let (source, _) = node.accept(header_of(21)).await;
    let Source { frames, mut answers, .. } = source;
    drop(frames);
    let error = loop {
        match answers.message().await {
            // What was under way.
            Ok(Some(TransferMigrationDataResponse { frame: Some(Answer::Ack(_)) })) => {}
            other => break Error::from(other.unwrap_err()),
        }
    };
    assert_eq!(error.reason(), "STREAM_ENDED_EARLY");
    // Outside of the range.
    let mut narrow = Header { migration_id: "m2".into(), ..header(1) };
    narrow.spec.as_mut().unwrap().slots = Some(SlotRange::new(0, 1).unwrap().into());
    assert_eq!(node.refused(narrow).await.reason(), "RANGE_BUSY");
}

fn header_of(attempt: u64) -> Header {
    Header { copy: attempt, ..header(attempt) }
}

#[tokio::test]
async fn credit_is_a_limit_and_grows_as_batches_are_applied() {
    let mut limits = Limits::default();
    (limits.batch_bytes, limits.credit_bytes) = (64 << 10, 64 << 10);
    let node = Node::with(|builder| builder.limits(limits)).await;
    let (mut source, accepted) = node.accept(header(1)).await;
    assert_eq!(accepted.credit_limit, 64 << 10);
    let big = |key: &str| Entry {
        image: Some(Image { value: vec![0; 40_000].into(), expires_unix_ms: None }),
        ..row(10, key)
    };
    source.bulk(vec![big("a")], false).await;
    let ack = source.durable().await;
    assert!(ack.credit_limit > 100_000);
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    node.target.fault("apply", Fault::Wait(Arc::clone(&gate)));
    source.bulk(vec![big("b")], false).await;
    source.bulk(vec![big("c")], false).await;
    gate.add_permits(1);
    assert_eq!(source.error().await.reason(), "CREDIT_EXCEEDED");
    let (_, accepted) = node.accept(header(2)).await;
    assert_eq!(accepted.resume.unwrap().staged_keys, 2, "what was checked is durable");
}

/// A fast source has no more to spend long before an acknowledgement is due.
#[tokio::test(start_paused = true)]
async fn a_good_part_of_the_credit_is_given_back_at_once() {
    const INTERVAL: Duration = Duration::from_millis(10);
    let mut limits = Limits::default();
    (limits.batch_bytes, limits.credit_bytes) = (64 << 10, 400_000);
    let node = Node::with(|builder| builder.limits(limits)).await;
    let (mut source, _) = node.accept(header(1)).await;
    let of = |key: &str, len| Entry {
        image: Some(Image { value: vec![0; len].into(), expires_unix_ms: None }),
        ..row(10, key)
    };
    source.bulk(vec![of("a", 1)], false).await;
    source.durable().await;
    // The clock stands still as long as anybody works.
    let began = tokio::time::Instant::now();
    source.bulk(vec![of("b", 40_000)], false).await;
    source.durable().await;
    assert!(began.elapsed() >= INTERVAL, "a tenth of it is no hurry: {:?}", began.elapsed());
    let began = tokio::time::Instant::now();
    for key in ["c", "d", "e"] {
        source.bulk(vec![of(key, 40_000)], false).await;
    }
    source.acked(|ack| ack.credit_limit >= 540_000).await;
    assert!(began.elapsed() < INTERVAL, "{:?}", began.elapsed());
}

/// Clients of the source wait from `Prepare` on, while changes that came before may still be applied.
#[tokio::test]
async fn the_store_hurries_from_prepare_until_it_is_answered() {
    let node = Node::start().await;
    let (mut source, _) = node.accept(header(1)).await;
    source.bulk(vec![row(10, "a")], true).await;
    source.durable().await;
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    node.target.fault("apply", Fault::Wait(Arc::clone(&gate)));
    let last = row(11, "b");
    source.delta(11, vec![last.clone()]).await;
    eventually("it is applied", || node.target.calls("apply") == 2).await;
    assert!(!node.target.hurried());
    let mut rows = node.target.disk().staged[&MigrationId::new("m1").unwrap()].clone();
    rows.insert(last.key, (last.seq, last.image));
    source.send(Frame::Prepare(prepare(1, 11, &rows))).await;
    eventually("it hurries", || node.target.hurried()).await;
    gate.add_permits(1);
    assert!(matches!(source.answer().await.unwrap(), Answer::Prepared(_)));
    assert!(!node.target.hurried());

    // One that panics when it is asked to, and when it may rest, prepares all the same.
    source.send(Frame::Release(Release { freeze: 1 })).await;
    node.target.fault("hurry", Fault::Panic);
    node.target.fault("hurry", Fault::Panic);
    source.send(Frame::Prepare(prepare(2, 11, &rows))).await;
    assert!(matches!(source.answer().await.unwrap(), Answer::Prepared(prepared) if prepared.freeze == 2));

    // Nor does it go on where the stream ends before the answer.
    source.send(Frame::Release(Release { freeze: 2 })).await;
    node.target.fault("digests", Fault::Wait(Arc::clone(&gate)));
    source.send(Frame::Prepare(prepare(3, 11, &rows))).await;
    eventually("it hurries again", || node.target.hurried()).await;
    drop(source);
    gate.add_permits(1);
    eventually("it has ended", || !node.target.hurried()).await;
}

/// Before writes are held, changes that are still many can be few.
#[tokio::test(start_paused = true)]
async fn the_store_hurries_for_urgent_changes_and_tells_of_them_at_once() {
    const INTERVAL: Duration = Duration::from_millis(10);
    let node = Node::start().await;
    let (mut source, _) = node.accept(header(1)).await;
    source.bulk(vec![row(10, "a")], false).await;
    source.urgent(11, vec![row(11, "b")]).await;
    source.bulk(vec![], true).await;
    source.durable().await;
    assert_eq!(node.target.calls("hurry"), 0, "not while rows are copied");

    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    for _ in 0..2 {
        node.target.fault("apply", Fault::Wait(Arc::clone(&gate)));
    }
    // The clock stands still as long as anybody works.
    let began = tokio::time::Instant::now();
    let applied = node.target.calls("apply");
    for seq in [12, 13] {
        source.urgent(seq, vec![row(seq, "b")]).await;
        eventually("the first is applied", || node.target.calls("apply") == applied + 1).await;
    }
    assert!(node.target.hurried());
    gate.add_permits(1);
    eventually("the second is applied", || node.target.calls("apply") == applied + 2).await;
    assert!(node.target.hurried(), "as long as one is waited for");
    gate.add_permits(1);
    let waited = began.elapsed();
    source.durable().await;
    assert!(began.elapsed() - waited < INTERVAL, "the source knows at once");
    assert!(!node.target.hurried());
}

#[tokio::test]
async fn a_prepare_is_refused_and_the_stream_goes_on() {
    let node = Node::start().await;
    let (mut source, _) = node.accept(header(1)).await;
    source.bulk(vec![row(10, "a")], false).await;
    let refused = |answer| match answer {
        Answer::PrepareRefused(refused) => refused,
        other => panic!("{other:?}"),
    };
    source.prepare(1, &node.target).await;
    assert_eq!(refused(source.answer().await.unwrap()).error.unwrap().reason, "NOT_CAUGHT_UP");
    source.bulk(vec![], true).await;
    source.durable().await;
    source
        .send(Frame::Prepare(Prepare { freeze: 2, final_seq: 10, new_slot_epoch: 5, ..Prepare::default() }))
        .await;
    let mismatch = refused(source.answer().await.unwrap());
    assert_eq!(mismatch.error.unwrap().reason, "DIGEST_MISMATCH");
    assert_eq!(mismatch.mismatch.unwrap().target.unwrap().keys, 1);
    node.target.disk().known_epoch = 5;
    source.delta(10, vec![]).await;
    source.prepare(3, &node.target).await;
    assert_eq!(refused(source.answer().await.unwrap()).error.unwrap().reason, "STALE_SLOT_EPOCH");
    node.target.disk().known_epoch = 0;
    node.target.fault("save", Fault::Fail(Reason::StorageFailed.error("no")));
    source.delta(10, vec![]).await;
    source.prepare(4, &node.target).await;
    assert_eq!(refused(source.answer().await.unwrap()).error.unwrap().reason, "STORAGE_FAILED");
    assert_eq!(node.target.holds(), 0);
    source.delta(10, vec![]).await;
    source.prepare(5, &node.target).await;
    assert!(matches!(source.answer().await.unwrap(), Answer::Prepared(_)));
    source.send(Frame::Release(Release { freeze: 5 })).await;
    eventually("released", || node.target.holds() == 0).await;
    assert_eq!(node.progress().state(), MigrationState::Receiving);
    source.delta(11, vec![row(11, "z")]).await;
    source.prepare(6, &node.target).await;
    assert!(matches!(source.answer().await.unwrap(), Answer::Prepared(_)));
    source.send(Frame::Bulk(bulk(9, vec![], false))).await;
    assert_eq!(source.error().await.reason(), "UNEXPECTED_FRAME");
    assert_eq!(node.target.holds(), 1, "prepared until somebody says otherwise");
}

#[tokio::test]
async fn a_failing_store_leaves_what_was_durable() {
    let node = Node::start().await;
    let full = Reason::InsufficientDisk.error("full").metadata("needed_bytes", "9");
    for (attempt, fault, reason) in [
        (1, Fault::Fail(full), "INSUFFICIENT_DISK"),
        (2, Fault::Panic, "INTERNAL"),
        (3, Fault::PanicAfter, "INTERNAL"),
    ] {
        let (mut source, accepted) = node.accept(header(attempt)).await;
        assert_eq!(accepted.resume.unwrap().staged_keys, attempt - 1);
        source.bulk(vec![row(10, &format!("k{attempt}"))], false).await;
        source.durable().await;
        node.target.fault("apply", fault);
        source.bulk(vec![row(10, "x")], false).await;
        assert_eq!(source.error().await.reason(), reason);
    }
    let (_, accepted) = node.accept(header(4)).await;
    assert_eq!(accepted.resume.unwrap().staged_keys, 4, "what was durable before the panic is known");
}

#[tokio::test]
async fn a_batch_that_was_staged_in_part_comes_again_and_counts_once() {
    let mut limits = Limits::default();
    limits.record_kept = Duration::from_millis(50);
    let node = Node::with(|builder| builder.limits(limits)).await;
    let fault = || Fault::FailHalfway(Reason::StorageFailed.error("no"));
    let id = MigrationId::new("m1").unwrap();
    let staged = |node: &Node| node.target.disk().staged.get(&id).map_or(0, Rows::len);
    let batch = |seq| ["a", "b", "c", "d"].map(|key| row(seq, key)).to_vec();

    // Nobody comes back: not even a part is left.
    let (mut source, _) = node.accept(header(1)).await;
    node.target.fault("apply", fault());
    source.bulk(batch(11), false).await;
    assert_eq!(source.error().await.reason(), "STORAGE_FAILED");
    assert_eq!(staged(&node), 2, "the test needs a part");
    drop(source);
    eventually("the record is dropped", || node.target.disk().records.is_empty()).await;
    assert_eq!(staged(&node), 0);

    // It comes back at once, and after a crash; meanwhile `b` was deleted, and `a` changed.
    for crash in [false, true] {
        let node = Node::start().await;
        let (mut source, _) = node.accept(header(1)).await;
        node.target.fault("apply", fault());
        source.bulk(batch(11), false).await;
        assert_eq!(source.error().await.reason(), "STORAGE_FAILED");
        let node = if crash { node.crash().await } else { node };
        assert_eq!(staged(&node), 2);
        let (mut source, accepted) = node.accept(header(2)).await;
        let resume = accepted.resume.unwrap();
        assert!(resume.cursor.is_empty() && !resume.copied, "{resume:?}");
        source.bulk(["a", "c", "d"].map(|key| row(13, key)).to_vec(), true).await;
        source.delta(13, vec![Entry { image: None, ..row(12, "b") }, row(13, "a")]).await;
        source.prepare(1, &node.target).await;
        assert!(matches!(source.answer().await.unwrap(), Answer::Prepared(_)));
        let rows: Vec<_> = node.target.disk().staged[&id]
            .iter()
            .map(|(key, (seq, image))| (key.clone(), *seq, image.is_some()))
            .collect();
        let expected = [("a", 13, true), ("b", 12, false), ("c", 13, true), ("d", 13, true)];
        assert_eq!(rows, expected.map(|(key, seq, lives)| (Bytes::from(key), seq, lives)));
        let progress = node.progress();
        assert_eq!((progress.progress.unwrap().items_done, progress.delta_entries), (3, 2));
    }
}

#[tokio::test]
async fn places_ranges_and_a_node_that_stops() {
    let mut limits = Limits::default();
    limits.incoming = 1;
    let guard = RangeGuard::new();
    let shared = guard.clone();
    let node = Node::with(|builder| builder.limits(limits).guard(shared)).await;
    let busy = guard.try_acquire(SlotRange::new(1, 2).unwrap(), "transfer t1").unwrap();
    let refused = node.refused(header(1)).await;
    assert_eq!((refused.reason(), refused.get("holder")), ("RANGE_BUSY", Some("transfer t1")));
    assert!(refused.retry_after_hint().is_some());
    drop(busy);
    let (mut source, _) = node.accept(header(1)).await;
    let other = Header { migration_id: "m2".into(), ..header(1) };
    assert_eq!(node.refused(other.clone()).await.reason(), "TOO_MANY_MIGRATIONS");
    node.receiver.drain();
    source.bulk(vec![row(10, "a")], false).await;
    source.durable().await;
    source.bulk(vec![row(10, "b")], false).await;
    assert_eq!(node.cancel().await.unwrap().state(), MigrationState::Cancelled);
    assert_eq!(node.refused(other).await.reason(), "SHUTTING_DOWN");
    let node = node.crash().await;
    let (mut source, _) = node.accept(Header { migration_id: "m3".into(), ..header(1) }).await;
    node.receiver.shutdown().await;
    assert_eq!(source.error().await.reason(), "SHUTTING_DOWN");
}

#[tokio::test]
async fn an_unknown_migration_stays_unknown() {
    let node = Node::start().await;
    let (mut source, accepted) = node.accept(resolve(5)).await;
    assert_eq!((accepted.decision(), accepted.known), (MigrationDecision::Undecided, false));
    source.send(Frame::Heartbeat(Heartbeat::default())).await;
    source.acked(|_| true).await;
    source.send(Frame::Discard(Discard::default())).await;
    assert!(matches!(source.answer().await.unwrap(), Answer::Discarded(_)));
    source.end().await;
    assert!(node.target.disk().records.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_stream_of_an_unknown_migration_is_small_and_short() {
    let mut limits = Limits::default();
    limits.idle = Duration::from_secs(5);
    let node = Node::with(|builder| builder.limits(limits)).await;
    let began = tokio::time::Instant::now();
    let (mut source, _) = node.accept(resolve(5)).await;
    let beats = async {
        loop {
            source.send(Frame::Heartbeat(Heartbeat::default())).await;
            tokio::time::sleep(Duration::from_secs(2)).await;
            if source.frames.is_closed() {
                break;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), beats).await.expect("it has ended");
    assert_eq!(source.error().await.reason(), "IDLE_TIMEOUT");
    assert!(began.elapsed() < Duration::from_secs(8), "whatever comes");

    let (mut source, _) = node.accept(resolve(6)).await;
    source.send(Frame::Discard(Discard { reason: "x".repeat(MAX_REQUEST_BYTES) })).await;
    assert_eq!(source.error().await.reason(), "BATCH_TOO_LARGE");
}

/// Whether it was decided before or on this very stream: no place is held for it any more.
#[tokio::test(start_paused = true)]
async fn a_stream_of_a_migration_that_is_decided_is_small_and_short() {
    let mut limits = Limits::default();
    limits.idle = Duration::from_secs(5);
    for (committed, again) in [(false, true), (true, true), (true, false)] {
        let limits = limits.clone();
        let node = Node::with(|builder| builder.limits(limits)).await;
        let decided = async |attempt| {
            if committed {
                let mut source = node.prepared(attempt).await;
                source.send(COMMIT).await;
                assert!(matches!(source.answer().await.unwrap(), Answer::Committed(_)));
                return source;
            }
            let (mut source, _) = node.accept(header(attempt)).await;
            source.send(Frame::Discard(Discard::default())).await;
            assert!(matches!(source.answer().await.unwrap(), Answer::Discarded(_)));
            source.end().await;
            source
        };
        let first = decided(1).await;
        let mut source = if again { node.accept(header(2)).await.0 } else { first };
        let began = tokio::time::Instant::now();
        let frames = source.frames.clone();
        let beats = async {
            let beat = Frame::Heartbeat(Heartbeat::default());
            while frames.send(TransferMigrationDataRequest { frame: Some(beat.clone()) }).await.is_ok() {
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
        };
        let (ended, ()) =
            tokio::time::timeout(Duration::from_secs(60), async { tokio::join!(source.error(), beats) })
                .await
                .expect("it has ended");
        assert_eq!(ended.reason(), "IDLE_TIMEOUT");
        assert!(began.elapsed() < Duration::from_secs(9), "whatever comes: {:?}", began.elapsed());

        let (mut source, _) = node.accept(header(3)).await;
        let payload = vec![0; MAX_REQUEST_BYTES].into();
        source.send(Frame::Bulk(Bulk { payload, ..bulk(1, vec![], false) })).await;
        assert_eq!(source.error().await.reason(), "BATCH_TOO_LARGE");
    }
    // On the stream that brought the commit.
    let node = Node::with(|builder| builder.limits(limits)).await;
    let mut source = node.prepared(1).await;
    source.send(COMMIT).await;
    let payload = vec![0; MAX_REQUEST_BYTES].into();
    source.send(Frame::Bulk(Bulk { payload, ..bulk(1, vec![], false) })).await;
    assert!(matches!(source.answer().await.unwrap(), Answer::Committed(_)));
    assert_eq!(source.error().await.reason(), "BATCH_TOO_LARGE");
}

#[tokio::test]
async fn a_heartbeat_is_answered_and_shown_and_silence_is_not_waited_for() {
    let mut limits = Limits::default();
    limits.idle = Duration::from_secs(3);
    let node = Node::with(|builder| builder.limits(limits)).await;
    let (mut source, accepted) = node.accept(header(1)).await;
    assert_eq!(accepted.idle_timeout_ms, 3000);
    let lag = v1::MigrationLag { entries: Some(3), ..v1::MigrationLag::default() };
    let beat = Heartbeat { lag: Some(lag), throttled_ms: 4, estimated_keys: Some(9), ..Heartbeat::default() };
    source.send(Frame::Heartbeat(beat)).await;
    let ack = source.acked(|_| true).await;
    assert_eq!(ack.state(), MigrationState::Receiving);
    let progress = node.progress();
    assert_eq!((progress.lag, progress.source_throttled_ms), (Some(lag), 4));
    assert_eq!(progress.progress.unwrap().items_total, Some(9));
    assert_eq!(source.error().await.reason(), "IDLE_TIMEOUT");
}

#[tokio::test]
async fn what_nobody_waits_for_is_staged_in_rounds() {
    let mut limits = Limits::default();
    limits.apply_every = Duration::from_secs(3600);
    let node = Node::with(|builder| builder.limits(limits)).await;
    let (mut source, _) = node.accept(header(1)).await;
    source.bulk(vec![row(10, "a")], false).await;
    source.durable().await;
    assert_eq!(node.target.calls("apply"), 1, "the first one at once");
    for key in ["b", "c"] {
        source.bulk(vec![row(10, key)], false).await;
        // Answered once all before it was read.
        source.send(Frame::Heartbeat(Heartbeat::default())).await;
        source.acked(|_| true).await;
    }
    source.bulk(vec![row(10, "d")], true).await;
    source.durable().await;
    assert_eq!(node.target.calls("apply"), 2, "all of them with the last row");
    source.delta(11, vec![row(11, "e")]).await;
    source.send(Frame::Heartbeat(Heartbeat::default())).await;
    source.acked(|_| true).await;
    source.urgent(12, vec![row(12, "f")]).await;
    source.durable().await;
    assert_eq!(node.target.calls("apply"), 3, "with changes that clients wait for");
}

#[derive(Debug, Clone)]
enum Step {
    Rows(Vec<(u8, u64)>),
    Changes(Vec<(u8, bool)>),
    Break,
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => prop::collection::vec((0_u8..12, 1_u64..60), 0..6).prop_map(Step::Rows),
        4 => prop::collection::vec((0_u8..12, any::<bool>()), 0..6).prop_map(Step::Changes),
        1 => Just(Step::Break),
        1 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Rows in any order and any number of times, changes, breaks and crashes: the newest image of each key is staged.
    #[test]
    fn the_newest_image_wins(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (staged, model) = runtime.block_on(async {
            let mut node = Node::start().await;
            let mut attempt = 1;
            let (mut source, _) = node.accept(header(attempt)).await;
            let mut model: HashMap<String, (u64, bool)> = HashMap::new();
            for step in steps {
                let mut seen = Vec::new();
                match step {
                    Step::Rows(rows) => {
                        let rows: Vec<_> = rows.into_iter().map(|(key, seq)| row(seq, &key.to_string())).collect();
                        seen.extend(rows.iter().cloned());
                        source.bulk(rows, false).await;
                    }
                    Step::Changes(changes) => {
                        let mut through = source.watermark;
                        let changes: Vec<_> = changes
                            .into_iter()
                            .map(|(key, removed)| {
                                through += 1;
                                let mut entry = row(through, &key.to_string());
                                if removed {
                                    entry.image = None;
                                }
                                entry
                            })
                            .collect();
                        seen.extend(changes.iter().cloned());
                        source.delta(through, changes).await;
                    }
                    Step::Break | Step::Crash => {
                        if source.number > 0 {
                            source.durable().await;
                        }
                        let watermark = source.watermark;
                        if matches!(step, Step::Crash) {
                            node = node.crash().await;
                        }
                        attempt += 1;
                        let (next, accepted) = node.accept(header(attempt)).await;
                        assert_eq!(accepted.resume.unwrap().through_seq, watermark);
                        source = next;
                    }
                }
                for entry in seen {
                    let key = String::from_utf8(entry.key.to_vec()).unwrap();
                    let held = model.get(&key).map_or(0, |(seq, _)| *seq);
                    if entry.seq > held {
                        model.insert(key, (entry.seq, entry.image.is_some()));
                    }
                }
            }
            if source.number > 0 {
                source.durable().await;
            }
            let staged: Rows = node.target.disk().staged[&MigrationId::new("m1").unwrap()].clone();
            (staged, model)
        });
        let staged: HashMap<String, (u64, bool)> = staged
            .into_iter()
            .map(|(key, (seq, image))| (String::from_utf8(key.to_vec()).unwrap(), (seq, image.is_some())))
            .collect();
        prop_assert_eq!(staged, model);
    }
}
