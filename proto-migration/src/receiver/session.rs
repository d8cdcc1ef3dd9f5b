//! One stream: frames are checked here and handed to the applier, so that the socket is read while the store works.
//!
//! It ends in a fixed order: the applier finishes what it has, the right to write is given up, and the source is told.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use proto_common::access::Caller;
use proto_common::bulk::Payload;
use proto_common::clock::millis;
use proto_common::error::Error;
use proto_common::pace::Pace;
use proto_common::peer::PeerKey;
use proto_common::prompt;
use proto_common::text::printable;
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tonic::Status;

use super::Inner;
use super::applier::{Applier, Done, Flow, Wanted, Work};
use super::attach::{Attached, estimates};
use super::batch::Checker;
use super::handshake::{CheckedHeader, Frames, ended_early, idle, too_slow, unended, unexpected};
use super::hurry::Hurried;
use super::incoming::{Permit, Stop};
use super::record::PreparedAt;
use crate::Reason;
use crate::digest::from_wire;
use crate::limits::Limits;
use crate::progress::REASON_BYTES;
use crate::service::shutting_down;
use crate::target::MigrationTarget;
use crate::v1::transfer_migration_data_request::{Frame, Heartbeat, Prepare};
use crate::v1::transfer_migration_data_response::{Accepted, Ack, Forgotten, Frame as Answer};
use crate::v1::{MigrationDecision, MigrationState, TransferMigrationDataResponse};

/// Things to do between the reader and the applier; the bytes among them are bounded by credit. 1 GiB of rows took 0.35, 0.36 and 0.34 s with 16, 64 and 256.
const QUEUE: usize = 64;
/// Shortest time between two `Ack` that nobody asked for, unless a good part of the credit is back: at 2.8 GiB/s, a source spends all of 32 MiB in
/// this time and the delay of a timer. 1 GiB of rows took 0.36 s with 2 and with 10 ms here, and 0.39 with 50.
const ACK_INTERVAL: Duration = Duration::from_millis(10);

/// The answers of one stream.
#[derive(Debug, Clone)]
pub(super) struct Answers {
    pub(super) sender: mpsc::Sender<Result<TransferMigrationDataResponse, Status>>,
    /// How long a peer that does not read is waited for.
    pub(super) patience: Duration,
}

impl Answers {
    /// Sends what must arrive.
    pub(super) async fn send(&self, frame: Answer) -> Result<(), Error> {
        let frame = Ok(TransferMigrationDataResponse { frame: Some(frame) });
        self.sender.send_timeout(frame, self.patience).await.map_err(|error| match error {
            SendTimeoutError::Timeout(_) => idle(self.patience),
            SendTimeoutError::Closed(_) => ended_early(),
        })
    }

    /// Sends what the next of its kind repeats; false where the peer does not keep up.
    fn offer(&self, frame: Answer) -> bool {
        self.sender.try_send(Ok(TransferMigrationDataResponse { frame: Some(frame) })).is_ok()
    }

    async fn fail(&self, error: Error) {
        let _ = self.sender.send_timeout(Err(Status::from(error)), Duration::from_secs(5)).await;
    }

    /// Resolves when the peer is gone.
    pub(super) async fn closed(&self) {
        self.sender.closed().await;
    }
}

impl<T: MigrationTarget> Inner<T> {
    /// Serves one stream to its end.
    pub(super) async fn serve(self: Arc<Self>, mut frames: Frames, caller: Caller, answers: Answers) {
        let peer = caller.peer().key();
        let header = tokio::select! {
            header = frames.header(&peer) => header,
            () = self.stopping.cancelled() => Err(shutting_down()),
        };
        let checked = header
            .and_then(|header| CheckedHeader::check(header, &self.identity))
            .and_then(|header| header.authorize(&caller).map(|()| header));
        let attached = match checked {
            Ok(header) => self.attach(&header, &answers).await.map(|attached| (header, attached)),
            Err(error) => Err(error),
        };
        let (header, Attached { accepted, permit }) = match attached {
            Ok(attached) => attached,
            Err(error) => return answers.fail(error).await,
        };
        let Some(permit) = permit else {
            if let Err(error) = self.serve_unknown(&peer, &accepted, &mut frames, &answers).await {
                answers.fail(error).await;
            }
            return;
        };
        let (slot, attempt) = (Arc::clone(permit.slot()), permit.attempt);
        let result = self.clone().run(&header, &peer, accepted, &permit, &mut frames, &answers).await;
        let stopped = permit.stopped();
        self.detach(&permit, result.as_ref().err().filter(|_| stopped.is_none())).await;
        drop(permit);
        match (stopped, result) {
            (_, Ok(())) => {}
            (Some(Stop::Discarded(discarded)), Err(_)) => {
                let _ = answers.send(Answer::Discarded(discarded)).await;
            }
            (Some(Stop::Error(error)), Err(_)) | (None, Err(error)) => {
                tracing::info!(migration_id = %slot.id, attempt, error = %error, "the stream ended");
                answers.fail(error).await;
            }
        }
    }

    /// Shows that the stream is gone, and why.
    async fn detach(&self, permit: &Permit, error: Option<&Error>) {
        let mut state = permit.slot().state.lock().await;
        if let Some(incoming) = state.as_mut()
            && incoming.record.progress.attempt == permit.attempt
        {
            incoming.last_stream = Instant::now();
            incoming.show(|progress| {
                progress.connected = false;
                if let Some(error) = error {
                    progress.incident(error);
                }
            });
        }
    }

    /// A stream of a migration that has no record here: it can only be told so.
    async fn serve_unknown(
        &self,
        peer: &PeerKey,
        accepted: &Accepted,
        frames: &mut Frames,
        answers: &Answers,
    ) -> Result<(), Error> {
        answers.send(Answer::Accepted(accepted.clone())).await?;
        let decision = accepted.decision();
        let idle_after = self.idle();
        // It takes no place among the migrations, so it is like a request: small, counted while it is waited for, and over in time whatever comes.
        frames.expect_small();
        let deadline = Instant::now() + idle_after;
        loop {
            let next = async {
                tokio::time::timeout_at(deadline, frames.next()).await.map_err(|_| idle(idle_after))?
            };
            let frame = tokio::select! {
                frame = prompt::first(peer, next) => frame?,
                () = self.stopping.cancelled() => return Err(shutting_down()),
            };
            // A frame that is here counts before the time does.
            if Instant::now() >= deadline {
                return Err(idle(idle_after));
            }
            match frame.0 {
                Frame::Heartbeat(_) => {
                    let ack = Ack { credit_limit: accepted.credit_limit, ..Ack::default() };
                    answers.offer(Answer::Ack(ack));
                }
                Frame::Discard(_) if decision != MigrationDecision::Committed => {
                    let discarded = accepted.discarded.clone().unwrap_or_default();
                    return answers.send(Answer::Discarded(discarded)).await;
                }
                Frame::Forget(_) if decision != MigrationDecision::Discarded => {
                    return answers.send(Answer::Forgotten(Forgotten {})).await;
                }
                other => return Err(unexpected(&other, "an end frame: nothing is under way here")),
            }
        }
    }

    async fn run(
        self: Arc<Self>,
        header: &CheckedHeader,
        peer: &PeerKey,
        accepted: Accepted,
        permit: &Permit,
        frames: &mut Frames,
        answers: &Answers,
    ) -> Result<(), Error> {
        let slot = permit.slot();
        let flow = Arc::new(Flow::default());
        let (checker, throttled_ms) = {
            let state = slot.state.lock().await;
            let incoming = state.as_ref().ok_or_else(|| Reason::Internal.error("the record is gone"))?;
            flow.follow(incoming);
            let checker = Checker::new(&incoming.record, self.limits.batch_bytes);
            (checker, incoming.record.progress.target_throttled_ms)
        };
        let (queue, work) = mpsc::channel(QUEUE);
        let applier = Applier {
            inner: Arc::clone(&self),
            slot: Arc::clone(slot),
            attempt: permit.attempt,
            flow: Arc::clone(&flow),
            answers: answers.clone(),
            too_often: AtomicU32::new(0),
        };
        let mut applying = tokio::spawn(applier.run(work));
        let credit = accepted.credit_limit;
        let data = accepted.resume.is_some();
        let mut reader = Reader {
            inner: &self,
            peer,
            permit,
            answers,
            flow: &flow,
            checker,
            credit,
            phase: if data { Phase::Data } else { Phase::Decided },
            freeze: 0,
            released: Arc::default(),
            transfer: header.transfer,
            throttled_ms,
            starved: None,
            acked: Ack::default(),
        };
        let mut in_hand = None;
        let read = tokio::select! {
            biased;
            read = reader.read(accepted, frames, &queue, &mut in_hand) => Some(read),
            applied = &mut applying => {
                return joined(applied).and_then(|ended| if ended { Ok(()) } else { Err(ended_early()) });
            }
        };
        // What was checked is applied, unless the applier failed.
        if let Some(work) = in_hand {
            let _ = queue.send(work).await;
        }
        drop(queue);
        let ended = joined(applying.await)?;
        match read {
            _ if ended => Ok(()),
            Some(Err(error)) => Err(error),
            _ => Err(ended_early()),
        }
    }
}

fn joined(applied: Result<Result<bool, Error>, tokio::task::JoinError>) -> Result<bool, Error> {
    applied
        .unwrap_or_else(|error| Err(Reason::Internal.error("the stream's applier panicked").caused_by(error)))
}

/// Resolves when the stream has to end.
async fn told(stop: &mut watch::Receiver<Option<Stop>>) {
    // Without a sender, too: then another stream has taken its place.
    let _ = stop.wait_for(Option::is_some).await;
}

/// What may come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Data,
    /// `Prepare` came.
    Frozen,
    /// Only the end is left.
    Decided,
    /// The end frame came: nothing may follow.
    Ending,
}

struct Reader<'a, T: MigrationTarget> {
    inner: &'a Arc<Inner<T>>,
    peer: &'a PeerKey,
    permit: &'a Permit,
    answers: &'a Answers,
    flow: &'a Flow,
    checker: Checker,
    /// What the source was told last.
    credit: u64,
    phase: Phase,
    freeze: u64,
    released: Arc<AtomicBool>,
    transfer: bool,
    throttled_ms: u64,
    /// Since when the source may lack credit.
    starved: Option<Instant>,
    acked: Ack,
}

impl<T: MigrationTarget> Reader<'_, T> {
    async fn read(
        &mut self,
        accepted: Accepted,
        frames: &mut Frames,
        queue: &mpsc::Sender<Work>,
        in_hand: &mut Option<Work>,
    ) -> Result<(), Error> {
        let mut stop = self.permit.stop.clone();
        let idle_after = self.inner.idle();
        tokio::select! {
            sent = self.answers.send(Answer::Accepted(accepted)) => sent?,
            () = told(&mut stop) => return Err(ended_early()),
        }
        let mut deadline = Instant::now() + idle_after;
        let mut is_over = self.is_like_a_request();
        if self.phase == Phase::Decided {
            frames.expect_small();
        }
        let Limits { slowest_bytes, slowest_time, bytes_per_second, .. } = self.inner.limits;
        let mut pace = Pace::new(slowest_bytes, slowest_time, bytes_per_second, 0);
        let mut ack_at: Option<Instant> = None;
        let mut last_ack = Instant::now() - ACK_INTERVAL;
        loop {
            tokio::select! {
                biased;
                () = told(&mut stop) => return Err(ended_early()),
                () = self.inner.stopping.cancelled() => return Err(shutting_down()),
                () = self.answers.closed() => return Err(ended_early()),
                () = self.flow.changed.notified() => {
                    // From here on the time counts, whatever comes.
                    if !is_over && self.is_like_a_request() {
                        is_over = true;
                        deadline = Instant::now() + idle_after;
                    }
                    if (self.is_waited_for() || self.owes_credit()) && self.ack(false) {
                        (ack_at, last_ack) = (None, Instant::now());
                    } else {
                        ack_at.get_or_insert(last_ack + ACK_INTERVAL);
                    }
                }
                () = tokio::time::sleep_until(ack_at.unwrap_or(deadline)), if ack_at.is_some() => {
                    (ack_at, last_ack) = (None, Instant::now());
                    if !self.ack(false) {
                        ack_at = Some(last_ack + ACK_INTERVAL);
                    }
                }
                place = queue.reserve(), if in_hand.is_some() => {
                    let place = place.map_err(|_| ended_early())?;
                    if let Some(work) = in_hand.take() {
                        place.send(work);
                    }
                    deadline = Instant::now() + idle_after;
                }
                frame = self.next(frames), if in_hand.is_none() && self.phase != Phase::Ending => {
                    let (frame, payload) = frame?;
                    *in_hand = self.take(frame, payload)?;
                    // Frames that come one behind the other would keep what is below from being looked at.
                    if self.is_copying() && Instant::now() >= pace.due() {
                        self.keeps_pace(&mut pace)?;
                    }
                    if self.phase == Phase::Decided {
                        frames.expect_small();
                    }
                    if !self.is_like_a_request() {
                        deadline = Instant::now() + idle_after;
                    }
                }
                () = tokio::time::sleep_until(deadline), if in_hand.is_none() && self.phase != Phase::Ending => {
                    return Err(if self.is_like_a_request() { unended(idle_after) } else { idle(idle_after) });
                }
                () = tokio::time::sleep_until(pace.due()), if self.is_copying() => self.keeps_pace(&mut pace)?,
            }
        }
    }

    fn is_copying(&self) -> bool {
        self.phase == Phase::Data && !self.checker.copied
    }

    /// Whether enough comes. What is not durable yet waits for the store, and a source without credit does, too.
    fn keeps_pace(&self, pace: &mut Pace) -> Result<(), Error> {
        if pace.look(self.checker.taken, self.flow.done().bytes) {
            Ok(())
        } else {
            Err(too_slow(&pace.expected()))
        }
    }

    /// Whether nothing but an end frame is left to come, and nothing is under way that would hold a place: the stream is over in time then, whatever comes.
    fn is_like_a_request(&self) -> bool {
        self.phase == Phase::Decided && self.flow.done().state != MigrationState::Prepared
    }

    /// The next frame; counted while it is waited for, where it is like a request. Cancel safe.
    async fn next(&self, frames: &mut Frames) -> Result<(Frame, Payload), Error> {
        if self.is_like_a_request() {
            return prompt::first(self.peer, frames.next()).await;
        }
        frames.next().await
    }

    /// Checks a frame; what it asks for is returned.
    fn take(&mut self, frame: Frame, payload: Payload) -> Result<Option<Work>, Error> {
        let done = self.flow.done();
        if self.phase == Phase::Frozen && done.refused == self.freeze {
            self.phase = Phase::Data;
        }
        let expected = match self.phase {
            Phase::Data => "rows, changes, Prepare or Discard",
            Phase::Frozen => "Release, Commit or Discard",
            Phase::Decided | Phase::Ending => "an end frame: no data may follow",
        };
        match frame {
            Frame::Heartbeat(heartbeat) => {
                self.heartbeat(&heartbeat);
                self.ack(true);
                Ok(None)
            }
            Frame::Bulk(bulk) if self.phase == Phase::Data => {
                let batch = self.checker.bulk(bulk, payload, self.credit)?;
                self.measure(done);
                Ok(Some(Work::Batch(batch)))
            }
            Frame::Delta(delta) if self.phase == Phase::Data => {
                let mut batch = self.checker.delta(&delta, payload, self.credit)?;
                batch.urgent = (delta.urgent && self.checker.copied).then(|| self.hurried());
                self.measure(done);
                Ok(Some(Work::Batch(batch)))
            }
            Frame::Prepare(prepare) if self.phase == Phase::Data => self.prepare(prepare).map(Some),
            Frame::Release(release) if self.freeze != 0 && self.phase != Phase::Decided => {
                if release.freeze != self.freeze {
                    let problem = format!("is {}; the last freeze is {}", release.freeze, self.freeze);
                    return Err(Reason::InvalidField.field("release.freeze", problem));
                }
                self.released.store(true, Ordering::Release);
                self.phase = Phase::Data;
                Ok(Some(Work::Release(release.freeze)))
            }
            Frame::Commit(commit) if self.phase == Phase::Frozen => {
                self.phase = Phase::Decided;
                Ok(Some(Work::Commit(commit)))
            }
            Frame::Discard(discard) => {
                self.phase = Phase::Ending;
                self.released.store(true, Ordering::Release);
                Ok(Some(Work::Discard(printable(&discard.reason, REASON_BYTES))))
            }
            Frame::Forget(_) if self.phase == Phase::Decided => {
                self.phase = Phase::Ending;
                Ok(Some(Work::Forget))
            }
            other => Err(unexpected(&other, expected)),
        }
    }

    fn prepare(&mut self, prepare: Prepare) -> Result<Work, Error> {
        let Prepare { freeze, final_seq, new_slot_epoch, keys, digests } = prepare;
        let bad = |field: &str, problem: String| Reason::InvalidField.field(field, problem);
        if freeze <= self.freeze {
            return Err(bad("prepare.freeze", format!("is {freeze}, not higher than {}", self.freeze)));
        }
        if new_slot_epoch == 0 {
            return Err(bad("prepare.new_slot_epoch", "is 0; it is higher than any before".to_owned()));
        }
        let digests = from_wire(&digests.unwrap_or_default(), self.checker.slots)?;
        let sum = digests.iter().fold(0_u64, |sum, digest| sum.saturating_add(digest.keys));
        if sum != keys {
            return Err(bad("prepare.keys", format!("is {keys}; the digests are of {sum} keys")));
        }
        self.freeze = freeze;
        self.phase = Phase::Frozen;
        self.released = Arc::default();
        let at = PreparedAt { freeze, final_seq, new_slot_epoch, attempt: self.permit.attempt };
        let asked = std::time::Instant::now();
        let hurried = self.hurried();
        Ok(Work::Prepare(Wanted { at, digests, asked, released: Arc::clone(&self.released), hurried }))
    }

    fn hurried(&self) -> Hurried {
        Hurried::new(self.inner, self.permit.slot())
    }

    /// Shows what the source says of itself.
    fn heartbeat(&self, heartbeat: &Heartbeat) {
        // Whoever works on it shows the next one: a heartbeat is answered at once.
        let Ok(mut state) = self.permit.slot().state.try_lock() else { return };
        let Some(incoming) = state.as_mut() else { return };
        if incoming.record.progress.attempt != self.permit.attempt {
            return;
        }
        let copied = incoming.record.kept.copied;
        let throttled_ms = self.throttled_ms;
        incoming.show(|progress| {
            progress.lag = heartbeat.lag;
            progress.source_throttled_ms = heartbeat.throttled_ms;
            progress.target_throttled_ms = throttled_ms;
            if !progress.is_final() {
                estimates(progress.task(), copied, heartbeat.estimated_keys, heartbeat.estimated_bytes);
            }
        });
    }

    /// Measures how long the source lacks credit: it keeps one batch back for changes.
    fn measure(&mut self, done: Done) {
        let credit = self.credit.max(done.bytes + self.inner.credit());
        let lacks = credit.saturating_sub(self.checker.taken) < 2 * self.checker.largest;
        match (lacks, self.starved) {
            (true, None) => self.starved = Some(Instant::now()),
            (false, Some(since)) => {
                self.throttled_ms = self.throttled_ms.saturating_add(millis(since.elapsed()));
                self.starved = None;
            }
            _ => {}
        }
    }

    /// Whether something is durable that clients of the source wait for, and the source was not told yet.
    fn is_waited_for(&self) -> bool {
        self.flow.done().urgent > self.acked.durable_number
    }

    /// Whether a quarter of the credit, or more, is there to be given again.
    fn owes_credit(&self) -> bool {
        let credit = self.inner.credit();
        self.transfer
            && self.flow.done().bytes.saturating_add(credit).saturating_sub(self.credit) >= credit / 4
    }

    /// Tells how far things are; false where the peer does not keep up.
    fn ack(&mut self, asked: bool) -> bool {
        let done = self.flow.done();
        self.measure(done);
        let credit = if self.transfer { done.bytes + self.inner.credit() } else { self.credit };
        let ack = Ack {
            received_number: done.number,
            durable_number: done.number,
            durable_seq: done.durable_seq,
            credit_limit: credit.max(self.credit),
            staged_keys: done.staged.keys,
            staged_bytes: done.staged.bytes,
            throttled_ms: self.throttled_ms,
            state: done.state.into(),
        };
        if !asked && ack == self.acked {
            return true;
        }
        let sent = self.answers.offer(Answer::Ack(ack));
        if sent {
            self.credit = ack.credit_limit;
            self.acked = ack;
        }
        sent
    }
}
