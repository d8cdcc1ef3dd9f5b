//! Sequences of frames to a migration's target, against a model that knows for each frame whether it must be taken or refused, which rows
//! are staged afterwards, and who owns them in the end.
//!
//! Whatever was sent before, a source that makes no mistake gets the migration committed, with exactly the rows of the model, unless it was
//! discarded; and nothing is ever owned without a commit.

use std::sync::Arc;

use arbitrary::Unstructured;
use bytes::Bytes;
use proto_common::Error;
use proto_common::checksum::crc64;
use proto_common::ids::MigrationId;
use proto_common::slots::{SlotRange, slot_of};
use proto_migration::entry::{Entry, Image};
use proto_migration::limits::Limits;
use proto_migration::receiver::MigrationReceiverBuilder;
use proto_migration::v1::MigrationDecision;
use proto_migration::v1::transfer_migration_data_request::{
    Bulk, Commit, Delta, Discard, Forget, Frame, Header, Heartbeat, Prepare, Release,
};
use proto_migration::v1::transfer_migration_data_response::{Accepted, Frame as Answer};

use crate::harness::{block_on, directory, polite, refusal};
use crate::support::frames::{self, BASE_SEQ, Node, Source};
use crate::support::memory_target::{MemoryTarget, Rows};

const STREAMS: usize = 8;
const FRAMES: usize = 24;
/// The first half of the slots moves.
const END: u16 = 8192;

/// Rows, whether all are copied, and the watermark.
type State = (Rows, bool, u64);

struct Model {
    rows: Rows,
    copied: bool,
    watermark: u64,
    /// The highest one that may be known to the target, and the highest one that is.
    attempt: u64,
    accepted: u64,
    copy: u64,
    /// The stream's, so far.
    number: u64,
    freeze: u64,
    committed: bool,
    discarded: bool,
    /// What was taken is not known: ask.
    unsure: bool,
    /// What the target may have since the stream was accepted, batch by batch: they are applied in order.
    states: Vec<State>,
}

enum Ending {
    Refused(&'static [&'static str]),
    /// Another stream takes over, while this one is open.
    Superseded,
    /// The same, and `Commit` of what was prepared is on its way meanwhile, or comes too late.
    SupersededCommit {
        late: bool,
    },
    Committed,
    Discarded,
    Dropped,
}

/// Plays the frames that `data` says.
pub fn run(data: &[u8]) {
    block_on(async {
        let mut data = Unstructured::new(data);
        let mut model = Model {
            rows: Rows::new(),
            copied: false,
            watermark: BASE_SEQ,
            attempt: 0,
            accepted: 0,
            copy: 1,
            number: 0,
            freeze: 0,
            committed: false,
            discarded: false,
            unsure: false,
            states: Vec::new(),
        };
        let mut node = Node::over(MemoryTarget::default(), Arc::new(directory()), at_any_pace).await;
        for _ in 0..STREAMS {
            if data.is_empty() {
                break;
            }
            if matches!(data.ratio(1_u8, 4), Ok(true)) {
                node.receiver.shutdown().await;
                node = Node::over(node.target.crash(), node.dir, at_any_pace).await;
            }
            let _ = model.stream(&mut data, &node).await;
            model.check(&node.target);
        }
        model.finish(&node).await;
        node.receiver.shutdown().await;
    });
}

/// How often a source may come is no part of the model.
fn at_any_pace(builder: MigrationReceiverBuilder<MemoryTarget>) -> MigrationReceiverBuilder<MemoryTarget> {
    let mut limits = Limits::default();
    limits.streams_per_peer = u32::MAX;
    builder.limits(limits)
}

fn header(attempt: u64, copy: u64) -> Header {
    let mut header = Header { copy, ..frames::header(attempt) };
    header.spec.as_mut().unwrap().slots = Some(SlotRange::new(0, END).unwrap().into());
    header
}

fn id() -> MigrationId {
    MigrationId::new(header(1, 1).migration_id).unwrap()
}

/// The next answer that is not an `Ack`.
async fn answer(stream: &mut Source) -> Result<Answer, Error> {
    loop {
        match stream.message().await.map_err(refusal)? {
            Answer::Ack(_) => {}
            answer => return Ok(answer),
        }
    }
}

async fn accepted(stream: &mut Source) -> Result<Accepted, Error> {
    match answer(stream).await? {
        Answer::Accepted(accepted) => Ok(accepted),
        other => panic!("{other:?} instead of Accepted"),
    }
}

async fn prepared(stream: &mut Source) {
    let answer = answer(stream).await.unwrap();
    assert!(matches!(answer, Answer::Prepared(_)), "{answer:?} instead of Prepared");
}

impl Model {
    async fn stream(&mut self, data: &mut Unstructured<'_>, node: &Node) -> arbitrary::Result<()> {
        let mut header = header(self.attempt + 1, self.copy);
        let expected = match self.misfit(data, &mut header)? {
            None => spoil(data, &mut header)?,
            expected => expected,
        };
        if let Some(expected) = expected {
            let mut stream = node.open(header).await;
            let error = accepted(&mut stream).await.unwrap_err();
            assert!(expected.contains(&error.reason()), "{error:?} instead of {expected:?}");
            if expected == ["STALE_COPY"] {
                // Where something is prepared that is given up for it, although its data is refused: its source serves again.
                self.attempt += 1;
            }
            return Ok(());
        }
        self.anew(data, &mut header)?;
        let mut stream = node.open(header).await;
        let accepted = accepted(&mut stream).await.unwrap();
        if self.attached(accepted, &node.target).is_none() {
            return self.afterwards(data, stream).await;
        }
        let ending = self.frames(data, &mut stream).await?;
        match ending {
            Ending::Superseded => {
                self.unsure = true;
                let header = self::header(self.attempt + 1, self.copy);
                let mut next = node.open(header).await;
                let accepted = self::accepted(&mut next).await.unwrap();
                let error = answer(&mut stream).await.unwrap_err();
                assert_eq!(error.reason(), "SUPERSEDED", "{error:?}");
                self.attached(accepted, &node.target).expect("undecided");
                // Too late: none of it counts, also where it reaches the store.
                let late = self.delta_of(Vec::new(), self.watermark + 1);
                stream.send(Frame::Delta(late)).await;
                next.half_close();
                let error = answer(&mut next).await.unwrap_err();
                assert_eq!(error.reason(), "STREAM_ENDED_EARLY", "{error:?}");
            }
            Ending::SupersededCommit { late } => {
                let commit = Frame::Commit(Commit { freeze: self.freeze, new_slot_epoch: 5 });
                if !late {
                    stream.send(commit.clone()).await;
                }
                let mut next = node.open(self::header(self.attempt + 1, self.copy)).await;
                let accepted = self::accepted(&mut next).await.unwrap();
                self.committed = accepted.decision() == MigrationDecision::Committed;
                assert!(!(late && self.committed), "committed before anybody said so");
                if self.committed {
                    let answer = answer(&mut stream).await.unwrap();
                    assert!(matches!(answer, Answer::Committed(_)), "{answer:?}");
                } else {
                    let error = answer(&mut stream).await.unwrap_err();
                    assert_eq!(error.reason(), "SUPERSEDED", "{error:?}");
                }
                let undecided = self.attached(accepted, &node.target).is_some();
                stream.send(commit.clone()).await;
                if undecided {
                    self.check(&node.target);
                    // Of another attempt: this one has prepared nothing.
                    next.send(commit).await;
                    let error = answer(&mut next).await.unwrap_err();
                    assert_eq!(error.reason(), "UNEXPECTED_FRAME", "{error:?}");
                }
            }
            Ending::Dropped => {
                self.unsure = true;
                drop(stream);
            }
            Ending::Refused(reasons) => {
                // Where it was taken instead, there is an answer, too.
                stream.half_close();
                let error = answer(&mut stream).await.unwrap_err();
                assert!(reasons.contains(&error.reason()), "{error:?} instead of {reasons:?}");
            }
            Ending::Committed => {
                let answer = answer(&mut stream).await.unwrap();
                assert!(matches!(answer, Answer::Committed(_)), "{answer:?}");
                self.committed = true;
            }
            Ending::Discarded => {
                let answer = answer(&mut stream).await.unwrap();
                assert!(matches!(answer, Answer::Discarded(_)), "{answer:?}");
                self.discarded = true;
            }
        }
        self.check(&node.target);
        Ok(())
    }

    /// A header that is good by itself, and does not fit what is known here; what it has to be refused with.
    fn misfit(
        &self,
        data: &mut Unstructured<'_>,
        header: &mut Header,
    ) -> arbitrary::Result<Option<&'static [&'static str]>> {
        if self.accepted == 0 {
            return Ok(None);
        }
        let undecided = !self.committed && !self.discarded;
        let spec = header.spec.as_mut().unwrap();
        Ok(Some(match data.int_in_range(0..=23_u8)? {
            // Which attempt was the last one of a migration that was cancelled, a crash may forget.
            0 | 1 if self.discarded => return Ok(None),
            0 => {
                header.attempt = data.int_in_range(1..=self.accepted)?;
                &["STALE_ATTEMPT"]
            }
            1 => {
                header.attempt = data.int_in_range(1..=self.accepted)?;
                header.session = vec![8; 16].into();
                &["SUPERSEDED"]
            }
            2 => {
                let slots = SlotRange::new(0, data.int_in_range(1..=END - 1)?).unwrap();
                spec.slots = Some(slots.into());
                &["SPECIFICATION_MISMATCH"]
            }
            3 => {
                "s9".clone_into(&mut spec.source_shard_id);
                &["SPECIFICATION_MISMATCH"]
            }
            4 => {
                "n9".clone_into(&mut spec.source_node_id);
                "n9".clone_into(&mut header.source.as_mut().unwrap().node_id);
                &["SPECIFICATION_MISMATCH"]
            }
            5 => {
                header.source.as_mut().unwrap().store_id = vec![9; 16].into();
                &["STORE_CHANGED"]
            }
            6 if undecided && self.copy > 1 => {
                header.copy = data.int_in_range(1..=self.copy - 1)?;
                &["STALE_COPY"]
            }
            _ => return Ok(None),
        }))
    }

    /// The source begins anew, now and then.
    fn anew(&mut self, data: &mut Unstructured<'_>, header: &mut Header) -> arbitrary::Result<()> {
        if self.attempt > 0 && !self.committed && !self.discarded && data.ratio(1_u8, 12)? {
            self.copy += data.int_in_range(1..=3)?;
            header.copy = self.copy;
            (self.rows, self.copied, self.watermark, self.unsure) = (Rows::new(), false, BASE_SEQ, false);
        }
        Ok(())
    }

    /// What is decided stays so, whatever is sent.
    async fn afterwards(&mut self, data: &mut Unstructured<'_>, mut stream: Source) -> arbitrary::Result<()> {
        self.number = 0;
        let frame = match data.int_in_range(0..=4_u8)? {
            0 => Frame::Delta(self.delta_of(Vec::new(), self.watermark + 1)),
            1 => Frame::Bulk(frames::bulk(1, Vec::new(), true)),
            2 => Frame::Prepare(self.prepare()),
            3 => Frame::Commit(Commit { freeze: self.freeze, new_slot_epoch: 5 }),
            _ => Frame::Release(Release { freeze: 1 }),
        };
        stream.send(frame).await;
        let error = answer(&mut stream).await.unwrap_err();
        assert_eq!(error.reason(), "UNEXPECTED_FRAME", "{error:?}");
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
        self.accepted = self.attempt;
        (self.number, self.freeze) = (0, 0);
        decided.is_none().then_some(())?;
        let resume = accepted.resume.as_ref().expect("where to go on");
        if std::mem::take(&mut self.unsure) {
            // What the target has is the base of everything that follows.
            let rows = target.disk().staged.get(&id()).cloned().unwrap_or_default();
            let state = (rows, resume.copied, resume.through_seq);
            assert!(self.states.contains(&state), "{state:?} is none of {:?}", self.states);
            (self.rows, self.copied, self.watermark) = state;
        } else {
            assert_eq!(
                (resume.copied, resume.through_seq),
                (self.copied, self.watermark),
                "other batches count than were taken"
            );
        }
        self.states = vec![self.state()];
        Some(accepted)
    }

    async fn frames(
        &mut self,
        data: &mut Unstructured<'_>,
        stream: &mut Source,
    ) -> arbitrary::Result<Ending> {
        for _ in 0..FRAMES {
            let kind = data.int_in_range(0..=19_u8)?;
            let refused: &'static [&'static str] = match kind {
                0..=3 if !self.copied => {
                    let (bulk, entries) = self.bulk(data, kind == 0)?;
                    self.copied = bulk.last;
                    self.take(entries);
                    stream.send(Frame::Bulk(bulk)).await;
                    continue;
                }
                0..=6 => {
                    let (delta, entries) = self.delta(data)?;
                    self.watermark = delta.through_seq;
                    self.take(entries);
                    stream.send(Frame::Delta(delta)).await;
                    continue;
                }
                7 => {
                    stream.send(Frame::Heartbeat(Heartbeat::default())).await;
                    continue;
                }
                8 => {
                    let (mut delta, _) = self.delta(data)?;
                    delta.crc64nvme ^= 1 << data.int_in_range(0..=63)?;
                    stream.send(Frame::Delta(delta)).await;
                    &["BATCH_CHECKSUM_MISMATCH"]
                }
                9 => {
                    let (mut delta, _) = self.delta(data)?;
                    delta.number = if data.arbitrary()? { delta.number - 1 } else { u64::MAX };
                    stream.send(Frame::Delta(delta)).await;
                    &["BATCH_OUT_OF_ORDER"]
                }
                10 => {
                    let (mut delta, _) = self.delta(data)?;
                    delta.prev_seq = match data.int_in_range(0..=2_u8)? {
                        0 => delta.prev_seq - data.int_in_range(1..=BASE_SEQ)?,
                        1 => delta.prev_seq + data.int_in_range(1..=3)?,
                        _ => delta.prev_seq.wrapping_add(data.int_in_range(1..=u64::MAX)?),
                    };
                    stream.send(Frame::Delta(delta)).await;
                    &["DELTA_GAP"]
                }
                11 => {
                    let (mut delta, _) = self.delta(data)?;
                    delta.entry_count += 1;
                    stream.send(Frame::Delta(delta)).await;
                    &["MALFORMED_BATCH"]
                }
                12 => {
                    let (mut delta, _) = self.delta(data)?;
                    delta.payload =
                        Bytes::copy_from_slice(&[&[0xff], data.bytes(data.len().min(40))?].concat());
                    delta.crc64nvme = crc64(&delta.payload);
                    stream.send(Frame::Delta(delta)).await;
                    &["MALFORMED_BATCH"]
                }
                13 => {
                    let outside = keys(false)[usize::from(data.arbitrary::<u8>()?) % 4].clone();
                    let entry = Entry { seq: self.watermark + 1, key: outside, image: None };
                    stream.send(Frame::Delta(self.delta_of(vec![entry], self.watermark + 1))).await;
                    &["KEY_OUTSIDE_RANGE"]
                }
                14 => {
                    // A change from before the watermark, or from behind the end of its own batch.
                    let seq = if data.arbitrary()? { self.watermark } else { self.watermark + 9 };
                    let entry = Entry { seq, key: keys(true)[0].clone(), image: None };
                    stream.send(Frame::Delta(self.delta_of(vec![entry], self.watermark + 2))).await;
                    &["INVALID_FIELD"]
                }
                15 => {
                    let frame = match data.int_in_range(0..=3_u8)? {
                        0 => Some(Frame::Header(header(self.attempt, self.copy))),
                        1 => Some(Frame::Commit(Commit { freeze: 1, new_slot_epoch: 5 })),
                        2 => Some(Frame::Forget(Forget {})),
                        _ => Some(Frame::Release(Release { freeze: self.freeze + 1 })),
                    };
                    stream.send(frame).await;
                    &["UNEXPECTED_FRAME", "INVALID_FIELD"]
                }
                16 => {
                    stream.send(None).await;
                    &["UNKNOWN_FRAME"]
                }
                17 if self.copied => {
                    stream.send(Frame::Prepare(self.prepare())).await;
                    prepared(stream).await;
                    match data.int_in_range(0..=11_u8)? {
                        // PREPARED, with requests held: the next stream finds it so.
                        8 => return Ok(Ending::Dropped),
                        9 => return Ok(Ending::SupersededCommit { late: true }),
                        10 => return Ok(Ending::SupersededCommit { late: false }),
                        4 => {
                            // Of another freeze than the one that was prepared.
                            let freeze = if data.arbitrary()? { self.freeze - 1 } else { self.freeze + 1 };
                            stream.send(Frame::Commit(Commit { freeze, new_slot_epoch: 5 })).await;
                            &["UNEXPECTED_FRAME"]
                        }
                        5 => {
                            let new_slot_epoch = *data.choose(&[0, 4, 6, u64::MAX])?;
                            stream.send(Frame::Commit(Commit { freeze: self.freeze, new_slot_epoch })).await;
                            &["INVALID_FIELD"]
                        }
                        6 => {
                            stream.send(Frame::Release(Release { freeze: self.freeze - 1 })).await;
                            &["INVALID_FIELD"]
                        }
                        0 => {
                            stream
                                .send(Frame::Commit(Commit { freeze: self.freeze, new_slot_epoch: 5 }))
                                .await;
                            return Ok(Ending::Committed);
                        }
                        1 => {
                            stream.send(Frame::Delta(self.delta_of(Vec::new(), self.watermark + 1))).await;
                            &["UNEXPECTED_FRAME"]
                        }
                        _ => {
                            stream.send(Frame::Release(Release { freeze: self.freeze })).await;
                            continue;
                        }
                    }
                }
                18 if data.ratio(1_u8, 2)? => {
                    // What was prepared is not what is there: it is refused, and the stream goes on.
                    let mut prepare = self.prepare();
                    let digests = prepare.digests.get_or_insert_default();
                    let reason = match data.int_in_range(0..=2_u8)? {
                        _ if !self.copied => "NOT_CAUGHT_UP",
                        0 => {
                            prepare.final_seq =
                                prepare.final_seq.wrapping_add(data.int_in_range(1..=u64::MAX)?);
                            "NOT_CAUGHT_UP"
                        }
                        1 if !digests.slots.is_empty() => {
                            digests.sums = digests.sums.iter().map(|byte| byte ^ 1).collect();
                            "DIGEST_MISMATCH"
                        }
                        _ if !digests.slots.is_empty() => {
                            digests.slots.remove(0);
                            prepare.keys -= digests.keys.remove(0);
                            digests.sums = digests.sums.slice(16..);
                            "DIGEST_MISMATCH"
                        }
                        _ => continue,
                    };
                    stream.send(Frame::Prepare(prepare)).await;
                    let Answer::PrepareRefused(refused) = answer(stream).await.unwrap() else {
                        panic!("it was prepared");
                    };
                    let error = Error::from(refused.error.unwrap());
                    assert_eq!(polite(&error), reason, "{error:?}");
                    // It may not be committed either.
                    if data.ratio(1_u8, 4)? {
                        let commit = Commit { freeze: self.freeze, new_slot_epoch: 5 };
                        stream.send(Frame::Commit(commit)).await;
                        &["UNEXPECTED_FRAME"]
                    } else {
                        continue;
                    }
                }
                18 => {
                    if !data.ratio(1_u8, 4)? {
                        continue;
                    }
                    stream.send(Frame::Discard(Discard { reason: "enough\x1b[2J".into() })).await;
                    return Ok(Ending::Discarded);
                }
                _ => {
                    match data.int_in_range(0..=2_u8)? {
                        0 => return Ok(Ending::Dropped),
                        1 => return Ok(Ending::Superseded),
                        _ => {}
                    }
                    stream.half_close();
                    &["STREAM_ENDED_EARLY"]
                }
            };
            return Ok(Ending::Refused(refused));
        }
        stream.half_close();
        Ok(Ending::Refused(&["STREAM_ENDED_EARLY"]))
    }

    fn take(&mut self, entries: Vec<Entry>) {
        self.number += 1;
        for Entry { seq, key, image } in entries {
            if self.rows.get(&key).is_none_or(|(held, _)| seq > *held) {
                self.rows.insert(key, (seq, image));
            }
        }
        self.states.push(self.state());
    }

    fn state(&self) -> State {
        (self.rows.clone(), self.copied, self.watermark)
    }

    fn bulk(&self, data: &mut Unstructured<'_>, last: bool) -> arbitrary::Result<(Bulk, Vec<Entry>)> {
        let mut entries = Vec::new();
        for _ in 0..data.int_in_range(0..=3_u8)? {
            let key = keys(true)[usize::from(data.arbitrary::<u8>()?) % 8].clone();
            let value = Bytes::copy_from_slice(data.bytes(data.len().min(3))?);
            let image = Some(Image { value, expires_unix_ms: None });
            entries.push(Entry { seq: data.int_in_range(1..=BASE_SEQ)?, key, image });
        }
        let bulk = frames::bulk(self.number + 1, entries.clone(), last);
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
        frames::delta(self.number + 1, self.watermark, through_seq, entries)
    }

    fn prepare(&mut self) -> Prepare {
        self.freeze += 1;
        frames::prepare(self.freeze, self.watermark, &self.rows)
    }

    fn check(&mut self, target: &MemoryTarget) {
        let disk = target.disk();
        let staged = disk.staged.get(&id());
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
    async fn finish(&mut self, node: &Node) {
        let mut stream = node.open(header(self.attempt + 1, self.copy)).await;
        let accepted = accepted(&mut stream).await.unwrap();
        if self.attached(accepted, &node.target).is_none() {
            return self.check(&node.target);
        }
        if !self.copied {
            let (bulk, _) = self.bulk(&mut Unstructured::new(&[]), true).unwrap();
            self.copied = true;
            self.take(Vec::new());
            stream.send(Frame::Bulk(bulk)).await;
        }
        stream.send(Frame::Prepare(self.prepare())).await;
        prepared(&mut stream).await;
        stream.send(Frame::Commit(Commit { freeze: self.freeze, new_slot_epoch: 5 })).await;
        let answer = answer(&mut stream).await.unwrap();
        assert!(matches!(answer, Answer::Committed(_)), "{answer:?}");
        self.committed = true;
        self.check(&node.target);
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
