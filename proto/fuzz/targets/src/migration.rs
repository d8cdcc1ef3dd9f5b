//! Sequences of frames to a migration's target, against a model that knows for each frame whether it must be taken or refused, which rows
//! are staged afterwards, and who owns them in the end.
//!
//! Whatever was sent before, a source that makes no mistake gets the migration committed, with exactly the rows of the model, unless it was
//! discarded; and nothing is ever owned without a commit.

use arbitrary::Unstructured;
use bytes::Bytes;
use proto_common::Error;
use proto_common::checksum::crc64;
use proto_common::ids::MigrationId;
use proto_common::slots::{SlotRange, slot_of};
use proto_common::v1::NodeIdentity;
use proto_migration::entry::{Entry, Image, encode};
use proto_migration::journal::Journal;
use proto_migration::receiver::MigrationReceiver;
use proto_migration::service::MigrationService;
use proto_migration::v1::migration_service_client::MigrationServiceClient;
use proto_migration::v1::transfer_migration_data_request::{
    Bulk, Commit, Delta, Discard, Forget, Frame, Header, Heartbeat, Prepare, Purpose, Release,
};
use proto_migration::v1::transfer_migration_data_response::{Accepted, Frame as Answer};
use proto_migration::v1::{
    MigrationDecision, MigrationSpec, SlotDigest, TransferMigrationDataRequest, TransferMigrationDataResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::harness::{block_on, directory, polite};
use crate::memory_target::{MemoryTarget, Rows, digests_of};

const STREAMS: usize = 8;
const FRAMES: usize = 24;
const BASE_SEQ: u64 = 10;
/// The first half of the slots moves.
const END: u16 = 8192;

struct Model {
    rows: Rows,
    copied: bool,
    watermark: u64,
    attempt: u64,
    /// The stream's, so far.
    number: u64,
    freeze: u64,
    committed: bool,
    discarded: bool,
    /// What was taken is not known: ask.
    unsure: bool,
}

enum Ending {
    Refused(&'static [&'static str]),
    Committed,
    Discarded,
    Dropped,
}

type Receiver = MigrationReceiver<MemoryTarget>;
type Client = MigrationServiceClient<MigrationService>;

/// Plays the frames that `data` says.
pub fn run(data: &[u8]) {
    let dir = directory();
    block_on(async {
        let mut data = Unstructured::new(data);
        let mut target = MemoryTarget::default();
        let mut model = Model {
            rows: Rows::new(),
            copied: false,
            watermark: BASE_SEQ,
            attempt: 0,
            number: 0,
            freeze: 0,
            committed: false,
            discarded: false,
            unsure: false,
        };
        let mut node = start(dir.path(), &target).await;
        for _ in 0..STREAMS {
            if data.is_empty() {
                break;
            }
            if matches!(data.ratio(1_u8, 4), Ok(true)) {
                node.shutdown().await;
                target = target.crash();
                node = start(dir.path(), &target).await;
            }
            let _ = model.stream(&mut data, &client(&node), &target).await;
            model.check(&target);
        }
        model.finish(&client(&node), &target).await;
        node.shutdown().await;
    });
}

async fn start(dir: &std::path::Path, target: &MemoryTarget) -> Receiver {
    let (journal, _) = Journal::open(dir, 10).unwrap();
    MigrationReceiver::builder(identity("n2", 2), target.clone(), journal).start().await.unwrap()
}

fn client(node: &Receiver) -> Client {
    MigrationServiceClient::new(node.clone().into_service())
}

fn identity(id: &str, store: u8) -> NodeIdentity {
    NodeIdentity {
        node_id: id.into(),
        cluster_id: "c".into(),
        store_id: vec![store; 16].into(),
        ..NodeIdentity::default()
    }
}

fn header(attempt: u64) -> Header {
    Header {
        migration_id: "m".into(),
        spec: Some(MigrationSpec {
            slots: Some(SlotRange::new(0, END).unwrap().into()),
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

struct Stream {
    frames: Option<mpsc::Sender<TransferMigrationDataRequest>>,
    answers: Streaming<TransferMigrationDataResponse>,
}

impl Stream {
    async fn open(client: &Client, header: Header) -> Self {
        let (frames, requests) = mpsc::channel(256);
        let first = TransferMigrationDataRequest { frame: Some(Frame::Header(header)) };
        frames.send(first).await.unwrap();
        let answers = client.clone().transfer_migration_data(ReceiverStream::new(requests)).await.unwrap();
        Self { frames: Some(frames), answers: answers.into_inner() }
    }

    async fn say(&self, frame: impl Into<Option<Frame>>) {
        if let Some(frames) = &self.frames {
            let _ = frames.send(TransferMigrationDataRequest { frame: frame.into() }).await;
        }
    }

    /// The next answer that is not an `Ack`.
    async fn answer(&mut self) -> Result<Answer, Error> {
        loop {
            match self.answers.message().await {
                Ok(answer) => match answer.expect("an answer before the end").frame.expect("a frame") {
                    Answer::Ack(_) => {}
                    answer => return Ok(answer),
                },
                Err(status) => {
                    let error = Error::from(status);
                    polite(&error);
                    return Err(error);
                }
            }
        }
    }

    async fn accepted(&mut self) -> Result<Accepted, Error> {
        match self.answer().await? {
            Answer::Accepted(accepted) => Ok(accepted),
            other => panic!("{other:?} instead of Accepted"),
        }
    }

    async fn prepared(&mut self) {
        let answer = self.answer().await.unwrap();
        assert!(matches!(answer, Answer::Prepared(_)), "{answer:?} instead of Prepared");
    }
}

impl Model {
    async fn stream(
        &mut self,
        data: &mut Unstructured<'_>,
        client: &Client,
        target: &MemoryTarget,
    ) -> arbitrary::Result<()> {
        let mut header = header(self.attempt + 1);
        if let Some(expected) = spoil(data, &mut header)? {
            let mut stream = Stream::open(client, header).await;
            let error = stream.accepted().await.unwrap_err();
            assert!(expected.contains(&error.reason()), "{error:?} instead of {expected:?}");
            return Ok(());
        }
        let mut stream = Stream::open(client, header).await;
        let Some(accepted) = self.attached(stream.accepted().await.unwrap(), target) else { return Ok(()) };
        assert!(accepted.credit_limit > 1 << 20, "a test far below its credit");
        let ending = self.frames(data, &mut stream).await?;
        match ending {
            Ending::Dropped => {
                self.unsure = true;
                drop(stream);
            }
            Ending::Refused(reasons) => {
                let error = stream.answer().await.unwrap_err();
                assert!(reasons.contains(&error.reason()), "{error:?} instead of {reasons:?}");
            }
            Ending::Committed => {
                let answer = stream.answer().await.unwrap();
                assert!(matches!(answer, Answer::Committed(_)), "{answer:?}");
                self.committed = true;
            }
            Ending::Discarded => {
                let answer = stream.answer().await.unwrap();
                assert!(matches!(answer, Answer::Discarded(_)), "{answer:?}");
                self.discarded = true;
            }
        }
        self.check(target);
        Ok(())
    }

    /// Holds what is said of an accepted stream to the model; `None` where there is nothing more to send.
    fn attached(&mut self, accepted: Accepted, target: &MemoryTarget) -> Option<Accepted> {
        let decided = match accepted.decision() {
            MigrationDecision::Committed => Some(true),
            MigrationDecision::Discarded => Some(false),
            _ => None,
        };
        assert_eq!(decided, self.committed.then_some(true).or(self.discarded.then_some(false)));
        self.attempt += 1;
        (self.number, self.freeze) = (0, 0);
        decided.is_none().then_some(())?;
        let resume = accepted.resume.as_ref().expect("where to go on");
        if std::mem::take(&mut self.unsure) {
            // What the target has is the base of everything that follows.
            self.rows =
                target.disk().staged.get(&MigrationId::new("m").unwrap()).cloned().unwrap_or_default();
        } else {
            assert_eq!(
                (resume.copied, resume.through_seq),
                (self.copied, self.watermark),
                "other batches count than were taken"
            );
        }
        (self.copied, self.watermark) = (resume.copied, resume.through_seq);
        Some(accepted)
    }

    async fn frames(
        &mut self,
        data: &mut Unstructured<'_>,
        stream: &mut Stream,
    ) -> arbitrary::Result<Ending> {
        for _ in 0..FRAMES {
            let kind = data.int_in_range(0..=19_u8)?;
            let refused: &'static [&'static str] = match kind {
                0..=3 if !self.copied => {
                    let (bulk, entries) = self.bulk(data, kind == 0)?;
                    self.copied = bulk.last;
                    self.take(entries);
                    stream.say(Frame::Bulk(bulk)).await;
                    continue;
                }
                0..=6 => {
                    let (delta, entries) = self.delta(data)?;
                    self.watermark = delta.through_seq;
                    self.take(entries);
                    stream.say(Frame::Delta(delta)).await;
                    continue;
                }
                7 => {
                    stream.say(Frame::Heartbeat(Heartbeat::default())).await;
                    continue;
                }
                8 => {
                    let (mut delta, _) = self.delta(data)?;
                    delta.crc64nvme ^= 1 << data.int_in_range(0..=63)?;
                    stream.say(Frame::Delta(delta)).await;
                    &["BATCH_CHECKSUM_MISMATCH"]
                }
                9 => {
                    let (mut delta, _) = self.delta(data)?;
                    delta.number = if data.arbitrary()? { delta.number - 1 } else { u64::MAX };
                    stream.say(Frame::Delta(delta)).await;
                    &["BATCH_OUT_OF_ORDER"]
                }
                10 => {
                    let (mut delta, _) = self.delta(data)?;
                    delta.prev_seq = delta.prev_seq.wrapping_add(data.int_in_range(1..=u64::MAX)?);
                    stream.say(Frame::Delta(delta)).await;
                    &["DELTA_GAP"]
                }
                11 => {
                    let (mut delta, _) = self.delta(data)?;
                    delta.entry_count += 1;
                    stream.say(Frame::Delta(delta)).await;
                    &["MALFORMED_BATCH"]
                }
                12 => {
                    let (mut delta, _) = self.delta(data)?;
                    delta.payload =
                        Bytes::copy_from_slice(&[&[0xff], data.bytes(data.len().min(40))?].concat());
                    delta.crc64nvme = crc64(&delta.payload);
                    stream.say(Frame::Delta(delta)).await;
                    &["MALFORMED_BATCH"]
                }
                13 => {
                    let outside = keys(false)[usize::from(data.arbitrary::<u8>()?) % 4].clone();
                    let entry = Entry { seq: self.watermark + 1, key: outside, image: None };
                    stream.say(Frame::Delta(self.delta_of(vec![entry], self.watermark + 1))).await;
                    &["KEY_OUTSIDE_RANGE"]
                }
                14 => {
                    // A change from before the watermark, or from behind the end of its own batch.
                    let seq = if data.arbitrary()? { self.watermark } else { self.watermark + 9 };
                    let entry = Entry { seq, key: keys(true)[0].clone(), image: None };
                    stream.say(Frame::Delta(self.delta_of(vec![entry], self.watermark + 2))).await;
                    &["INVALID_FIELD"]
                }
                15 => {
                    let frame = match data.int_in_range(0..=3_u8)? {
                        0 => Some(Frame::Header(header(self.attempt))),
                        1 => Some(Frame::Commit(Commit { freeze: 1, new_slot_epoch: 5 })),
                        2 => Some(Frame::Forget(Forget {})),
                        _ => Some(Frame::Release(Release { freeze: self.freeze + 1 })),
                    };
                    stream.say(frame).await;
                    &["UNEXPECTED_FRAME", "INVALID_FIELD"]
                }
                16 => {
                    stream.say(None).await;
                    &["UNKNOWN_FRAME"]
                }
                17 if self.copied => {
                    stream.say(Frame::Prepare(self.prepare())).await;
                    stream.prepared().await;
                    match data.int_in_range(0..=3_u8)? {
                        0 => {
                            stream
                                .say(Frame::Commit(Commit { freeze: self.freeze, new_slot_epoch: 5 }))
                                .await;
                            return Ok(Ending::Committed);
                        }
                        1 => {
                            stream.say(Frame::Delta(self.delta_of(Vec::new(), self.watermark + 1))).await;
                            &["UNEXPECTED_FRAME"]
                        }
                        _ => {
                            stream.say(Frame::Release(Release { freeze: self.freeze })).await;
                            continue;
                        }
                    }
                }
                18 => {
                    if !data.ratio(1_u8, 4)? {
                        continue;
                    }
                    stream.say(Frame::Discard(Discard { reason: "enough\x1b[2J".into() })).await;
                    return Ok(Ending::Discarded);
                }
                _ => {
                    if data.arbitrary()? {
                        return Ok(Ending::Dropped);
                    }
                    stream.frames = None;
                    &["STREAM_ENDED_EARLY"]
                }
            };
            return Ok(Ending::Refused(refused));
        }
        stream.frames = None;
        Ok(Ending::Refused(&["STREAM_ENDED_EARLY"]))
    }

    fn take(&mut self, entries: Vec<Entry>) {
        self.number += 1;
        for Entry { seq, key, image } in entries {
            if self.rows.get(&key).is_none_or(|(held, _)| seq > *held) {
                self.rows.insert(key, (seq, image));
            }
        }
    }

    fn bulk(&self, data: &mut Unstructured<'_>, last: bool) -> arbitrary::Result<(Bulk, Vec<Entry>)> {
        let mut entries = Vec::new();
        for _ in 0..data.int_in_range(0..=3_u8)? {
            let key = keys(true)[usize::from(data.arbitrary::<u8>()?) % 8].clone();
            let value = Bytes::copy_from_slice(data.bytes(data.len().min(3))?);
            let image = Some(Image { value, expires_unix_ms: None });
            entries.push(Entry { seq: data.int_in_range(1..=BASE_SEQ)?, key, image });
        }
        let payload = encode(entries.clone());
        let entry_count = u32::try_from(entries.len()).unwrap();
        let number = self.number + 1;
        let bulk =
            Bulk { number, entry_count, cursor: "c".into(), last, crc64nvme: crc64(&payload), payload };
        Ok((bulk, entries))
    }

    fn delta(&self, data: &mut Unstructured<'_>) -> arbitrary::Result<(Delta, Vec<Entry>)> {
        let mut entries = Vec::new();
        let mut seq = self.watermark;
        for _ in 0..data.int_in_range(1..=3_u8)? {
            seq += 1;
            let key = keys(true)[usize::from(data.arbitrary::<u8>()?) % 8].clone();
            let image = if data.ratio(1_u8, 3)? {
                None
            } else {
                let value = Bytes::copy_from_slice(data.bytes(data.len().min(3))?);
                Some(Image { value, expires_unix_ms: data.arbitrary::<bool>()?.then_some(1) })
            };
            entries.push(Entry { seq, key, image });
        }
        Ok((self.delta_of(entries.clone(), seq), entries))
    }

    fn delta_of(&self, entries: Vec<Entry>, through_seq: u64) -> Delta {
        let entry_count = u32::try_from(entries.len()).unwrap();
        let payload = encode(entries);
        Delta {
            number: self.number + 1,
            entry_count,
            prev_seq: self.watermark,
            through_seq,
            crc64nvme: crc64(&payload),
            payload,
        }
    }

    fn prepare(&mut self) -> Prepare {
        self.freeze += 1;
        let digests = digests_of(&self.rows);
        Prepare {
            freeze: self.freeze,
            final_seq: self.watermark,
            new_slot_epoch: 5,
            keys: digests.iter().map(|digest| digest.keys).sum(),
            digests: digests.into_iter().map(SlotDigest::from).collect(),
        }
    }

    fn check(&mut self, target: &MemoryTarget) {
        let disk = target.disk();
        let staged = disk.staged.get(&MigrationId::new("m").unwrap());
        assert_eq!(
            disk.owned.len(),
            usize::from(self.committed),
            "owned without a commit, or the other way round"
        );
        if let Some((slots, epoch, rows)) = disk.owned.first() {
            assert_eq!((*slots, *epoch), (SlotRange::new(0, END).unwrap(), 5));
            assert_eq!(*rows, self.rows);
        } else if self.discarded {
            assert_eq!(staged, None, "left after it was discarded");
        } else if !self.unsure {
            assert_eq!(
                staged.cloned().unwrap_or_default(),
                self.rows,
                "other rows are staged than were taken"
            );
        }
    }

    /// A source that makes no mistake.
    async fn finish(&mut self, client: &Client, target: &MemoryTarget) {
        let mut stream = Stream::open(client, header(self.attempt + 1)).await;
        let accepted = stream.accepted().await.unwrap();
        if self.attached(accepted, target).is_none() {
            return self.check(target);
        }
        if !self.copied {
            let (bulk, _) = self.bulk(&mut Unstructured::new(&[]), true).unwrap();
            self.take(Vec::new());
            self.copied = true;
            stream.say(Frame::Bulk(bulk)).await;
        }
        stream.say(Frame::Prepare(self.prepare())).await;
        stream.prepared().await;
        stream.say(Frame::Commit(Commit { freeze: self.freeze, new_slot_epoch: 5 })).await;
        let answer = stream.answer().await.unwrap();
        assert!(matches!(answer, Answer::Committed(_)), "{answer:?}");
        self.committed = true;
        self.check(target);
    }
}

/// Eight keys of the slots that move, or of those that do not.
fn keys(inside: bool) -> Vec<Bytes> {
    let keys = (0..).map(|number| Bytes::from(format!("k{number}")));
    keys.filter(|key| (slot_of(key) < END) == inside).take(8).collect()
}

/// Makes the header wrong, or not; what it has to be refused with.
fn spoil(
    data: &mut Unstructured<'_>,
    header: &mut Header,
) -> arbitrary::Result<Option<&'static [&'static str]>> {
    let spec = header.spec.as_mut().unwrap();
    Ok(Some(match data.int_in_range(0..=29_u8)? {
        0 => {
            (*data.choose(&["../m", ".m", "", "m\0", "m/"])?).clone_into(&mut header.migration_id);
            &["INVALID_ID"]
        }
        1 => {
            header.attempt = 0;
            &["INVALID_FIELD"]
        }
        2 => {
            header.session = vec![1; data.int_in_range(0..=15)?].into();
            &["INVALID_FIELD"]
        }
        3 => {
            header.source.as_mut().unwrap().cluster_id = "other\x1b[2J".into();
            &["WRONG_CLUSTER"]
        }
        4 => {
            "n9".clone_into(&mut spec.target_node_id);
            &["WRONG_NODE"]
        }
        5 => {
            spec.slots = None;
            &["INVALID_SLOT_RANGE"]
        }
        6 => {
            header.target_store_id = vec![9; 16].into();
            &["STORE_CHANGED"]
        }
        7 => {
            header.required_features.push("time-travel".to_owned());
            &["UNSUPPORTED_FEATURE"]
        }
        8 => {
            header.purpose = 99;
            &["INVALID_FIELD"]
        }
        9 => {
            header.source = None;
            &["INVALID_FIELD"]
        }
        _ => return Ok(None),
    }))
}
