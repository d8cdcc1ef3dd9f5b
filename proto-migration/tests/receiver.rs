//! The target's side, spoken to frame by frame as any source may.

#![cfg(all(feature = "client", feature = "server"))]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a failed expectation is a failed test")]

mod support;

use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use proto_common::checksum::crc64;
use proto_common::error::Error;
use proto_common::guard::RangeGuard;
use proto_common::ids::MigrationId;
use proto_common::slots::SlotRange;
use proto_common::v1::{Direction, NodeIdentity};
use proto_migration::Reason;
use proto_migration::decisions::{Decision, Decisions};
use proto_migration::entry::{Entry, Image, encode};
use proto_migration::journal::Journal;
use proto_migration::limits::Limits;
use proto_migration::migrations::Migrations;
use proto_migration::receiver::{MigrationReceiver, MigrationReceiverBuilder};
use proto_migration::service::MigrationService;
use proto_migration::v1::migration_service_client::MigrationServiceClient;
use proto_migration::v1::transfer_migration_data_request::{
    Bulk, Commit, Delta, Discard, Forget, Frame, Header, Heartbeat, Prepare, Purpose, Release,
};
use proto_migration::v1::transfer_migration_data_response::{Accepted, Ack, Frame as Answer};
use proto_migration::v1::{
    self, CancelMigrationRequest, MigrationDecision, MigrationProgress, MigrationSpec, MigrationState,
    ResolveMigrationRequest, TransferMigrationDataRequest, TransferMigrationDataResponse,
};
use support::memory_target::{Fault, MemoryTarget, Rows, digests_of};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

const PATIENCE: Duration = Duration::from_secs(30);
const SOURCE_STORE: [u8; 16] = [1; 16];
const TARGET_STORE: [u8; 16] = [2; 16];

type Client = MigrationServiceClient<MigrationService>;

fn identity() -> NodeIdentity {
    NodeIdentity {
        node_id: "n2".into(),
        cluster_id: "c".into(),
        store_id: TARGET_STORE.to_vec().into(),
        ..NodeIdentity::default()
    }
}

fn header(attempt: u64) -> Header {
    Header {
        migration_id: "m1".into(),
        spec: Some(MigrationSpec {
            slots: Some(SlotRange::FULL.into()),
            source_shard_id: "s1".into(),
            target_shard_id: "s2".into(),
            source_node_id: "n1".into(),
            target_node_id: "n2".into(),
            ..MigrationSpec::default()
        }),
        purpose: Purpose::Transfer.into(),
        source: Some(NodeIdentity {
            node_id: "n1".into(),
            cluster_id: "c".into(),
            store_id: SOURCE_STORE.to_vec().into(),
            ..NodeIdentity::default()
        }),
        attempt,
        session: vec![7; 16].into(),
        copy: 1,
        base_seq: 10,
        ..Header::default()
    }
}

fn resolve(attempt: u64) -> Header {
    Header { purpose: Purpose::Resolve.into(), ..header(attempt) }
}

struct Node {
    target: MemoryTarget,
    receiver: MigrationReceiver<MemoryTarget>,
    client: Client,
    dir: Arc<tempfile::TempDir>,
}

impl Node {
    async fn start() -> Self {
        Self::over(MemoryTarget::default(), Arc::new(tempfile::tempdir().unwrap()), |builder| builder).await
    }

    async fn with(
        change: impl FnOnce(MigrationReceiverBuilder<MemoryTarget>) -> MigrationReceiverBuilder<MemoryTarget>,
    ) -> Self {
        Self::over(MemoryTarget::default(), Arc::new(tempfile::tempdir().unwrap()), change).await
    }

    async fn over(
        target: MemoryTarget,
        dir: Arc<tempfile::TempDir>,
        change: impl FnOnce(MigrationReceiverBuilder<MemoryTarget>) -> MigrationReceiverBuilder<MemoryTarget>,
    ) -> Self {
        let (journal, recovered) = Journal::open(dir.path(), 100).unwrap();
        let migrations = Migrations::default();
        migrations.seed(recovered.finished);
        let builder = MigrationReceiver::builder(identity(), target.clone(), journal).migrations(migrations);
        let receiver = change(builder).start().await.unwrap();
        let client = MigrationServiceClient::new(receiver.clone().into_service());
        Self { target, receiver, client, dir }
    }

    /// A new process over what was durable.
    async fn crash(self) -> Self {
        let target = self.target.crash();
        Self::over(target, self.dir, |builder| builder).await
    }

    async fn open(&self, header: Header) -> Source {
        let (frames, requests) = mpsc::channel(256);
        let mut client = self.client.clone().max_decoding_message_size(64 << 20);
        let request = TransferMigrationDataRequest { frame: Some(Frame::Header(header)) };
        frames.send(request).await.unwrap();
        let answers = client.transfer_migration_data(ReceiverStream::new(requests)).await.unwrap();
        Source { frames, answers: answers.into_inner(), number: 0, watermark: 0 }
    }

    async fn accept(&self, header: Header) -> (Source, Accepted) {
        let mut source = self.open(header).await;
        let Answer::Accepted(accepted) = source.next().await.unwrap() else { panic!("not accepted") };
        source.watermark = accepted.resume.as_ref().map_or(0, |resume| resume.through_seq);
        (source, accepted)
    }

    async fn refused(&self, header: Header) -> Error {
        self.open(header).await.next().await.unwrap_err()
    }

    fn progress(&self) -> MigrationProgress {
        self.receiver.migrations().get(Some(Direction::In), &MigrationId::new("m1").unwrap()).unwrap()
    }

    async fn cancel(&self) -> Result<MigrationProgress, Error> {
        let request = CancelMigrationRequest {
            migration_id: "m1".into(),
            reason: "enough".into(),
            ..CancelMigrationRequest::default()
        };
        let cancelled = self.client.clone().cancel_migration(request).await?;
        Ok(cancelled.into_inner().migration.unwrap())
    }

    async fn decide(&self, decision: MigrationDecision, attempt: u64) -> Result<MigrationProgress, Error> {
        let request = ResolveMigrationRequest {
            migration_id: "m1".into(),
            decision: decision.into(),
            attempt,
            peer_store_id: SOURCE_STORE.to_vec().into(),
            reason: "the disk burnt".into(),
            ..ResolveMigrationRequest::default()
        };
        let resolved = self.client.clone().resolve_migration(request).await?;
        Ok(resolved.into_inner().migration.unwrap())
    }

    /// A stream that brought `a` to `c` and is prepared.
    async fn prepared(&self, attempt: u64) -> Source {
        let (mut source, accepted) = self.accept(header(attempt)).await;
        if !accepted.resume.unwrap().copied {
            source.bulk(vec![row(10, "a"), row(10, "b")], true).await;
            source.delta(12, vec![row(11, "c"), Entry { seq: 12, image: None, ..row(12, "b") }]).await;
        }
        source.prepare(1, &self.target).await;
        let answer = source.answer().await.unwrap();
        assert!(matches!(answer, Answer::Prepared(p) if (p.freeze, p.final_seq) == (1, 12)), "{answer:?}");
        source
    }
}

struct Source {
    frames: mpsc::Sender<TransferMigrationDataRequest>,
    answers: Streaming<TransferMigrationDataResponse>,
    number: u64,
    watermark: u64,
}

impl Source {
    async fn send(&self, frame: Frame) {
        let _ = self.frames.send(TransferMigrationDataRequest { frame: Some(frame) }).await;
    }

    async fn next(&mut self) -> Result<Answer, Error> {
        let answer = tokio::time::timeout(PATIENCE, self.answers.message()).await.expect("an answer");
        Ok(answer?.expect("not the end").frame.expect("a known frame"))
    }

    /// The next answer that is not an `Ack`.
    async fn answer(&mut self) -> Result<Answer, Error> {
        loop {
            match self.next().await? {
                Answer::Ack(_) => {}
                answer => return Ok(answer),
            }
        }
    }

    /// Waits for an `Ack` that says so.
    async fn acked(&mut self, enough: impl Fn(&Ack) -> bool) -> Ack {
        loop {
            match self.next().await.unwrap() {
                Answer::Ack(ack) if enough(&ack) => return ack,
                Answer::Ack(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    async fn error(&mut self) -> Error {
        self.answer().await.unwrap_err()
    }

    /// The stream ends well.
    async fn end(&mut self) {
        let end = tokio::time::timeout(PATIENCE, self.answers.message()).await.expect("an end");
        assert!(end.unwrap().is_none());
    }

    async fn bulk(&mut self, entries: Vec<Entry>, last: bool) {
        self.number += 1;
        self.send(Frame::Bulk(bulk(self.number, entries, last))).await;
    }

    async fn delta(&mut self, through: u64, entries: Vec<Entry>) {
        self.number += 1;
        self.send(Frame::Delta(delta(self.number, self.watermark, through, entries))).await;
        self.watermark = through;
    }

    async fn durable(&mut self) -> Ack {
        let number = self.number;
        self.acked(|ack| ack.durable_number == number).await
    }

    async fn prepare(&mut self, freeze: u64, target: &MemoryTarget) {
        if self.number > 0 {
            self.durable().await;
        }
        let id = MigrationId::new("m1").unwrap();
        let digests = digests_of(&target.disk().staged[&id]);
        self.send(Frame::Prepare(Prepare {
            freeze,
            final_seq: self.watermark,
            new_slot_epoch: 5,
            keys: digests.iter().map(|digest| digest.keys).sum(),
            digests: digests.into_iter().map(v1::SlotDigest::from).collect(),
        }))
        .await;
    }
}

fn row(seq: u64, key: &str) -> Entry {
    let image = Image { value: Bytes::from(format!("{key}@{seq}")), expires_unix_ms: None };
    Entry { seq, key: Bytes::copy_from_slice(key.as_bytes()), image: Some(image) }
}

fn bulk(number: u64, entries: Vec<Entry>, last: bool) -> Bulk {
    let entry_count = u32::try_from(entries.len()).unwrap();
    let payload = encode(entries);
    let cursor = Bytes::from(format!("behind {number}"));
    Bulk { number, entry_count, cursor, last, crc64nvme: crc64(&payload), payload }
}

fn delta(number: u64, prev_seq: u64, through_seq: u64, entries: Vec<Entry>) -> Delta {
    let entry_count = u32::try_from(entries.len()).unwrap();
    let payload = encode(entries);
    Delta { number, entry_count, prev_seq, through_seq, crc64nvme: crc64(&payload), payload }
}

const COMMIT: Frame = Frame::Commit(Commit { freeze: 1, new_slot_epoch: 5 });

async fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !so() {
        assert!(tokio::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

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

#[tokio::test]
async fn a_record_that_cannot_be_read_is_left_alone() {
    let node = Node::start().await;
    let id = MigrationId::new("m1").unwrap();
    node.target.disk().records.insert(id.clone(), Bytes::from_static(b"\xff"));
    let node = node.crash().await;
    assert_eq!(node.refused(header(1)).await.reason(), "STORAGE_FAILED");
    assert_eq!(node.target.disk().records[&id], Bytes::from_static(b"\xff"));
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
    let (_, accepted) = node.accept(resolve(9)).await;
    assert_eq!(accepted.decision(), MigrationDecision::Discarded, "the history knows it");
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
