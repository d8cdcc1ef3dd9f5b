//! A receiver over a store in memory, and a source that sends whatever a test says, frame by frame.

use std::sync::Arc;
use std::time::Duration;

use super::memory_target::{MemoryTarget, Rows, digests_of};
use bytes::Bytes;
use proto_common::checksum::crc64;
use proto_common::connect::GrpcChannel;
use proto_common::error::Error;
use proto_common::ids::MigrationId;
use proto_common::slots::SlotRange;
use proto_common::v1::{Direction, NodeIdentity};
use proto_migration::digest::to_wire;
use proto_migration::entry::{Entry, Image, encode};
use proto_migration::journal::Journal;
use proto_migration::migrations::Migrations;
use proto_migration::receiver::{MigrationReceiver, MigrationReceiverBuilder};
use proto_migration::service::MigrationService;
use proto_migration::v1::migration_service_client::MigrationServiceClient;
use proto_migration::v1::transfer_migration_data_request::{
    Bulk, Commit, Delta, Frame, Header, Prepare, Purpose,
};
use proto_migration::v1::transfer_migration_data_response::{Accepted, Ack, Frame as Answer};
use proto_migration::v1::{
    CancelMigrationRequest, MigrationDecision, MigrationProgress, MigrationSpec, ResolveMigrationRequest,
    TransferMigrationDataRequest, TransferMigrationDataResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

pub const PATIENCE: Duration = Duration::from_secs(30);

/// Up to where the copy of [`header`] goes.
pub const BASE_SEQ: u64 = 10;

pub type Client = MigrationServiceClient<MigrationService>;

pub fn identity(id: &str, store: u8) -> NodeIdentity {
    NodeIdentity {
        node_id: id.into(),
        cluster_id: "c".into(),
        store_id: vec![store; 16].into(),
        ..NodeIdentity::default()
    }
}

pub fn header(attempt: u64) -> Header {
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
        source: Some(identity("n1", 1)),
        attempt,
        session: vec![7; 16].into(),
        copy: 1,
        base_seq: BASE_SEQ,
        ..Header::default()
    }
}

pub fn resolve(attempt: u64) -> Header {
    Header { purpose: Purpose::Resolve.into(), ..header(attempt) }
}

pub struct Node {
    pub target: MemoryTarget,
    pub receiver: MigrationReceiver<MemoryTarget>,
    pub client: Client,
    pub dir: Arc<tempfile::TempDir>,
}

impl Node {
    pub async fn start() -> Self {
        Self::over(MemoryTarget::default(), Arc::new(tempfile::tempdir().unwrap()), |builder| builder).await
    }

    pub async fn with(
        change: impl FnOnce(MigrationReceiverBuilder<MemoryTarget>) -> MigrationReceiverBuilder<MemoryTarget>,
    ) -> Self {
        Self::over(MemoryTarget::default(), Arc::new(tempfile::tempdir().unwrap()), change).await
    }

    pub async fn over(
        target: MemoryTarget,
        dir: Arc<tempfile::TempDir>,
        change: impl FnOnce(MigrationReceiverBuilder<MemoryTarget>) -> MigrationReceiverBuilder<MemoryTarget>,
    ) -> Self {
        let (journal, recovered) = Journal::open(dir.path(), 100).unwrap();
        let migrations = Migrations::default();
        migrations.seed(recovered.finished);
        let builder =
            MigrationReceiver::builder(identity("n2", 2), target.clone(), journal).migrations(migrations);
        let receiver = change(builder).start().await.unwrap();
        let client = MigrationServiceClient::new(receiver.clone().into_service());
        Self { target, receiver, client, dir }
    }

    /// A new process over what was durable.
    pub async fn crash(self) -> Self {
        let target = self.target.crash();
        Self::over(target, self.dir, |builder| builder).await
    }

    pub async fn open(&self, header: Header) -> Source {
        Source::open(self.client.clone(), header).await
    }

    pub async fn accept(&self, header: Header) -> (Source, Accepted) {
        let mut source = self.open(header).await;
        let accepted = source.accepted().await.unwrap();
        (source, accepted)
    }

    pub async fn refused(&self, header: Header) -> Error {
        self.open(header).await.next().await.unwrap_err()
    }

    pub fn progress(&self) -> MigrationProgress {
        self.receiver.migrations().get(Some(Direction::In), &MigrationId::new("m1").unwrap()).unwrap()
    }

    pub async fn cancel(&self) -> Result<MigrationProgress, Error> {
        let request = CancelMigrationRequest {
            migration_id: "m1".into(),
            reason: "enough".into(),
            ..CancelMigrationRequest::default()
        };
        let cancelled = self.client.clone().cancel_migration(request).await?;
        Ok(cancelled.into_inner().migration.unwrap())
    }

    pub async fn decide(
        &self,
        decision: MigrationDecision,
        attempt: u64,
    ) -> Result<MigrationProgress, Error> {
        let request = ResolveMigrationRequest {
            migration_id: "m1".into(),
            decision: decision.into(),
            attempt,
            peer_store_id: identity("n1", 1).store_id,
            reason: "the disk burnt".into(),
            ..ResolveMigrationRequest::default()
        };
        let resolved = self.client.clone().resolve_migration(request).await?;
        Ok(resolved.into_inner().migration.unwrap())
    }

    /// A stream that brought `a` to `c` and is prepared.
    pub async fn prepared(&self, attempt: u64) -> Source {
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

pub struct Source {
    pub frames: mpsc::Sender<TransferMigrationDataRequest>,
    pub answers: Streaming<TransferMigrationDataResponse>,
    pub number: u64,
    pub watermark: u64,
}

impl Source {
    /// A stream that has said nothing yet.
    pub async fn silent(client: MigrationServiceClient<impl GrpcChannel>) -> Self {
        let (frames, requests) = mpsc::channel(256);
        let mut client = client.max_decoding_message_size(64 << 20);
        let answers = client.transfer_migration_data(ReceiverStream::new(requests)).await.unwrap();
        Self { frames, answers: answers.into_inner(), number: 0, watermark: 0 }
    }

    pub async fn open(client: MigrationServiceClient<impl GrpcChannel>, header: Header) -> Self {
        let source = Self::silent(client).await;
        source.send(Frame::Header(header)).await;
        source
    }

    pub async fn accepted(&mut self) -> Result<Accepted, Error> {
        let Answer::Accepted(accepted) = self.next().await? else { panic!("not accepted") };
        self.watermark = accepted.resume.as_ref().map_or(0, |resume| resume.through_seq);
        Ok(accepted)
    }

    /// `None`: a frame of a kind that nobody knows.
    pub async fn send(&self, frame: impl Into<Option<Frame>>) {
        // One that has ended reads nothing; it says why in its answer.
        let _ = self.frames.send(TransferMigrationDataRequest { frame: frame.into() }).await;
    }

    /// Says nothing any more, and still hears.
    pub fn half_close(&mut self) {
        (self.frames, _) = mpsc::channel(1);
    }

    pub async fn message(&mut self) -> Result<Answer, Status> {
        let answer = tokio::time::timeout(PATIENCE, self.answers.message()).await.expect("an answer");
        Ok(answer?.expect("not the end").frame.expect("a known frame"))
    }

    pub async fn next(&mut self) -> Result<Answer, Error> {
        Ok(self.message().await?)
    }

    /// The next answer that is not an `Ack`.
    pub async fn answer(&mut self) -> Result<Answer, Error> {
        loop {
            match self.next().await? {
                Answer::Ack(_) => {}
                answer => return Ok(answer),
            }
        }
    }

    /// Waits for an `Ack` that says so.
    pub async fn acked(&mut self, enough: impl Fn(&Ack) -> bool) -> Ack {
        loop {
            match self.next().await.unwrap() {
                Answer::Ack(ack) if enough(&ack) => return ack,
                Answer::Ack(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    pub async fn error(&mut self) -> Error {
        self.answer().await.unwrap_err()
    }

    /// The stream ends well. How far things are may be told once more.
    pub async fn end(&mut self) {
        let ending = async {
            while let Some(answer) = self.answers.message().await.unwrap() {
                assert!(matches!(answer.frame, Some(Answer::Ack(_))), "{answer:?}");
            }
        };
        tokio::time::timeout(PATIENCE, ending).await.expect("an end");
    }

    pub async fn bulk(&mut self, entries: Vec<Entry>, last: bool) {
        self.number += 1;
        self.send(Frame::Bulk(bulk(self.number, entries, last))).await;
    }

    pub async fn delta(&mut self, through: u64, entries: Vec<Entry>) {
        self.changes(through, entries, false).await;
    }

    /// Changes that clients wait for.
    pub async fn urgent(&mut self, through: u64, entries: Vec<Entry>) {
        self.changes(through, entries, true).await;
    }

    async fn changes(&mut self, through: u64, entries: Vec<Entry>, urgent: bool) {
        self.number += 1;
        let delta = delta(self.number, self.watermark, through, entries);
        self.send(Frame::Delta(Delta { urgent, ..delta })).await;
        self.watermark = through;
    }

    pub async fn durable(&mut self) -> Ack {
        let number = self.number;
        self.acked(|ack| ack.durable_number == number).await
    }

    pub async fn prepare(&mut self, freeze: u64, target: &MemoryTarget) {
        self.prepare_of("m1", freeze, target).await;
    }

    pub async fn prepare_of(&mut self, id: &str, freeze: u64, target: &MemoryTarget) {
        if self.number > 0 {
            self.durable().await;
        }
        let id = MigrationId::new(id).unwrap();
        let prepare = prepare(freeze, self.watermark, &target.disk().staged[&id]);
        self.send(Frame::Prepare(prepare)).await;
    }
}

pub fn row(seq: u64, key: &str) -> Entry {
    let image = Image { value: Bytes::from(format!("{key}@{seq}")), expires_unix_ms: None };
    Entry { seq, key: Bytes::copy_from_slice(key.as_bytes()), image: Some(image) }
}

pub fn bulk(number: u64, entries: Vec<Entry>, last: bool) -> Bulk {
    let entry_count = u32::try_from(entries.len()).unwrap();
    let payload = encode(&entries);
    let cursor = Bytes::from(format!("behind {number}"));
    Bulk { number, entry_count, cursor, last, crc64nvme: crc64(&payload), payload }
}

pub fn delta(number: u64, prev_seq: u64, through_seq: u64, entries: Vec<Entry>) -> Delta {
    let entry_count = u32::try_from(entries.len()).unwrap();
    let payload = encode(&entries);
    Delta { number, entry_count, prev_seq, through_seq, crc64nvme: crc64(&payload), urgent: false, payload }
}

pub fn prepare(freeze: u64, final_seq: u64, rows: &Rows) -> Prepare {
    let digests = digests_of(rows);
    Prepare {
        freeze,
        final_seq,
        new_slot_epoch: 5,
        keys: digests.iter().map(|digest| digest.keys).sum(),
        digests: Some(to_wire(&digests)),
    }
}

pub const COMMIT: Frame = Frame::Commit(Commit { freeze: 1, new_slot_epoch: 5 });

pub async fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !so() {
        assert!(tokio::time::Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
