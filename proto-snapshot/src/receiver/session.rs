//! One stream that brings chunks: the control stream or a lane.
//!
//! The session reads frames, checks and claims them, and hands them to a writer task, so that the socket is read while the store
//! writes. It ends in a fixed order: the writer finishes what it has, then the right to write is given up.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use futures::FutureExt as _;
use proto_common::bulk::Payload;
use proto_common::error::Error;
use proto_common::ids::NodeId;
use proto_common::pace::Pace;
use tokio::sync::mpsc::error::SendTimeoutError;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tonic::Status;

use super::handshake::{Frames, ended_early, idle, too_slow, unexpected};
use super::incoming::{Incoming, StreamPermit};
use super::ledger::{Listed, Listing, weight};
use crate::extent::{Extent, ExtentRecord};
use crate::limits::Limits;
use crate::reason::Reason;
use crate::spec::FileTotal;
use crate::store::{StagedChunk, Staging};
use crate::v1::transfer_split_snapshot_request::{Chunk, End, Frame};
use crate::v1::transfer_split_snapshot_response::{Accepted, Ack, Frame as Answer};
use crate::v1::{TransferPhase, TransferSplitSnapshotResponse};

/// Runs of chunks, of at most [`FRAMES`] each, between the socket and the writer. Credit bounds their payload bytes, and [`OWNED`] what these keep alive.
/// With 16, 64 and 256, 1 GiB from memory to memory took 0.38, 0.41 and 0.42 s: no difference beside that of rounds.
const QUEUE: usize = 64;
/// A payload below this size gets memory of its own: as the slice of an HTTP/2 frame that it came as, it keeps all of that, up to 512 KiB, whatever
/// else was in there, and credit would not bound the memory of the queue. A longer one keeps at most the frames at its two ends, eight times
/// its size. The same goes for small ones that lie one behind the other in memory: together they keep no more than one long payload, and those
/// that came in one batch go to the store as they came.
const OWNED: usize = 128 << 10;
/// Bytes between payloads that lie one behind the other: what is around a payload in a message, and no more.
const BETWEEN: usize = 64;
/// Chunks that the writer takes at once, but for the rest of a run, so that small files do not cost a change of threads each; a fraction of the queue, so
/// that the rest is filled meanwhile. 100,000 files of 4 KiB took 1.60 s with 128, 1.46 with 512, 1.39 with 2048 (1.35 to 1.46 and 1.35 to 1.52 in single rounds).
const BATCH: usize = 512;
/// Bytes of a batch, but for its last run: a quarter of the default credit, since the sender gets that back when all of it is written.
/// With 1, 2 and 4 MiB, 1 GiB from memory to memory took 0.40, 0.39 and 0.39 s.
const BATCH_BYTES: usize = 2 << 20;
/// Credit of a stream that has brought nothing yet; a chunk where that is larger. What is promised cannot be taken back: where many transfers begin at
/// once, the first would have the whole credit of one that is alone. Of 200 of 64 MiB each, when a tenth of all had been sent, the fastest had sent 3 to
/// 5 times as much as the slowest, and 4 to 8 times with all credit at once; at half of it, that made no difference any more.
const FIRST_CREDIT: u64 = 1 << 20;
/// Bytes of chunks that are taken before the session looks at everything else: small ones that are here already cost less than that look. 1 GiB of large ones took
/// 0.32, 0.34 and 0.33 s with 64 KiB, 256 KiB and 1 MiB, and with 16, 64 and 256 [`FRAMES`] as long (medians of 8 interleaved rounds that differ by more).
const AT_ONCE: u64 = 256 << 10;
/// The same for frames, which may be empty.
const FRAMES: u32 = 64;
/// How long an `Ack` may wait for more to tell, where the sender can go on without. Each costs a system call and a wake-up at both
/// ends: one for each MiB took 5 % of what a receiver does. With 1, 5 and 20 ms here, 1 GiB from memory to memory took 0.33, 0.34 and 0.33 s.
const ACK_DELAY: Duration = Duration::from_millis(5);

/// Missing extents in a page of `Accepted`: 40 KiB of memory, and at most as much on the wire (four varints, two of them of at most ten bytes and two of five, and their tags, and tag and
/// length of the extent). A peer that takes no answers has some pages wait for it. 100,000 files of 4 KiB took as long with 128.
const EXTENTS_OF_PAGE: usize = 1024;

/// The answers of one stream.
#[derive(Debug, Clone)]
pub(super) struct Answers {
    sender: mpsc::Sender<Result<TransferSplitSnapshotResponse, Status>>,
    /// How long a peer that does not read is waited for.
    patience: Duration,
}

impl Answers {
    pub(super) fn new(
        sender: mpsc::Sender<Result<TransferSplitSnapshotResponse, Status>>,
        patience: Duration,
    ) -> Self {
        Self { sender, patience }
    }

    /// Sends what must arrive. A peer that reads nothing for the idle timeout is given up: it would keep its place for ever.
    pub(super) async fn send(&self, frame: Answer) -> Result<(), Error> {
        let frame = Ok(TransferSplitSnapshotResponse { frame: Some(frame) });
        self.sender.send_timeout(frame, self.patience).await.map_err(|error| match error {
            SendTimeoutError::Timeout(_) => idle(self.patience),
            SendTimeoutError::Closed(_) => ended_early(),
        })
    }

    /// Sends what the next of its kind repeats; false where the peer does not keep up.
    pub(super) fn offer(&self, frame: Answer) -> bool {
        self.sender.try_send(Ok(TransferSplitSnapshotResponse { frame: Some(frame) })).is_ok()
    }

    /// Ends the stream with an error. A peer that reads nothing is not waited for.
    pub(super) async fn fail(&self, error: Error) {
        let _ = self.sender.send_timeout(Err(Status::from(error)), Duration::from_secs(5)).await;
    }

    /// Whether the peer is gone.
    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Resolves when the peer is gone.
    pub(super) async fn closed(&self) {
        self.sender.closed().await;
    }
}

/// Shares the receive budget: first among the nodes that send, then among the streams of each. So whoever opens many gets no more of
/// it, and leaves the others theirs, whether it uses them or not.
///
/// Each stream may hold a chunk that is not all there, whatever its credit is. So there are no more streams than chunks in the budget, but for one of each transfer: lanes are given
/// out of what is left of them.
#[derive(Debug, Default)]
pub(super) struct Budget {
    /// By source node; those that send nothing are not in it.
    peers: Mutex<HashMap<NodeId, Sends>>,
}

/// What a node has of the budget.
#[derive(Debug, Default)]
struct Sends {
    /// Streams, and lanes that may be opened.
    streams: u64,
    /// Credit of all of them that was given and is not used up, in bytes.
    promised: u64,
}

impl Budget {
    /// The stream that a transfer has in any case.
    pub(super) fn join(self: &Arc<Self>, peer: &NodeId) -> BudgetShare {
        Lanes::take(self, peer, |_, _| 1).join()
    }

    /// Up to `wanted` lanes for a transfer of `peer`, until dropped. Of the streams that others leave, a node has no more than half; so the next one has some, too.
    pub(super) fn lanes(self: &Arc<Self>, peer: &NodeId, wanted: u64, limits: &Limits) -> Arc<Lanes> {
        Lanes::take(self, peer, |of_all, of_peer| {
            let streams = limits.receive_budget_bytes / u64::from(limits.chunk_bytes).max(1);
            let of_others = of_all.saturating_sub(of_peer);
            (streams.saturating_sub(of_others) / 2).saturating_sub(of_peer).min(wanted)
        })
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<NodeId, Sends>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Streams that a transfer may have; until dropped.
#[derive(Debug)]
pub(super) struct Lanes {
    budget: Arc<Budget>,
    peer: NodeId,
    count: u64,
}

impl Lanes {
    /// As many as `count` says, of those that all have and of those of `peer`.
    fn take(budget: &Arc<Budget>, peer: &NodeId, count: impl FnOnce(u64, u64) -> u64) -> Arc<Self> {
        let mut peers = budget.peers();
        let of_all = peers.values().map(|sends| sends.streams).sum();
        let of_peer = peers.get(peer).map_or(0, |sends| sends.streams);
        let count = count(of_all, of_peer);
        if count > 0 {
            peers.entry(peer.clone()).or_default().streams += count;
        }
        drop(peers);
        Arc::new(Self { budget: Arc::clone(budget), peer: peer.clone(), count })
    }

    pub(super) fn count(&self) -> u32 {
        u32::try_from(self.count).unwrap_or(u32::MAX)
    }

    /// One of them sends.
    pub(super) fn join(self: Arc<Self>) -> BudgetShare {
        BudgetShare { lanes: self, promised: AtomicU64::new(0) }
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        let mut peers = self.budget.peers();
        if let Some(sends) = peers.get_mut(&self.peer) {
            sends.streams = sends.streams.saturating_sub(self.count);
            if sends.streams == 0 {
                peers.remove(&self.peer);
            }
        }
    }
}

/// A stream that sends; until dropped.
#[derive(Debug)]
pub(super) struct BudgetShare {
    lanes: Arc<Lanes>,
    /// Its part of [`Sends::promised`], which is changed with that.
    promised: AtomicU64,
}

impl BudgetShare {
    /// What the stream may send in all, after the `received` bytes that it has brought and the `credit` that it was given: its share, and at first no more than [`FIRST_CREDIT`], then twice
    /// that, and so on. What is promised to other streams of its node is not promised again, but a chunk is.
    fn grant(&self, limits: &Limits, received: u64, credit: u64) -> u64 {
        let Lanes { budget, peer, .. } = &*self.lanes;
        let chunk = u64::from(limits.chunk_bytes);
        let begun = received.saturating_add(FIRST_CREDIT.max(chunk));
        let mut peers = budget.peers();
        let of_node = limits.receive_budget_bytes / (peers.len() as u64).max(1);
        let Some(sends) = peers.get_mut(peer) else { return credit };
        let of_others = sends.promised.saturating_sub(self.promised.load(Ordering::Relaxed));
        let share = (of_node / sends.streams.max(1)).min(of_node.saturating_sub(of_others));
        let share = share.min(limits.stream_credit_bytes).max(chunk).min(begun);
        let granted = received.saturating_add(share).max(credit);
        let promised = granted.saturating_sub(received);
        self.promised.store(promised, Ordering::Relaxed);
        sends.promised = of_others.saturating_add(promised);
        granted
    }
}

impl Drop for BudgetShare {
    fn drop(&mut self) {
        let mut peers = self.lanes.budget.peers();
        if let Some(sends) = peers.get_mut(&self.lanes.peer) {
            sends.promised = sends.promised.saturating_sub(self.promised.load(Ordering::Relaxed));
        }
    }
}

/// Sends `Accepted`, in as many pages as it takes; `terms` is the last page without its extents.
pub(super) async fn accept<A: Staging>(
    answers: &Answers,
    terms: Accepted,
    incoming: &Incoming<A>,
    missing: Listing,
    stop: &mut watch::Receiver<Option<Error>>,
) -> Result<(), Error> {
    // A takeover waits for this stream; it does not wait for its peer.
    tokio::select! {
        sent = send_pages(answers, terms, incoming, missing) => sent,
        reason = told_to_stop(stop) => Err(reason.unwrap_or_else(ended_early)),
    }
}

/// Waits until the stream has to end, and returns why. Nothing of the channel is borrowed then: who looks at it once more while it is would wait
/// for whoever wants to tell another reason, which waits for him.
pub(super) async fn told_to_stop(stop: &mut watch::Receiver<Option<Error>>) -> Option<Error> {
    stop.wait_for(Option::is_some).await.map_or(None, |reason| reason.clone())
}

/// Sends what is missing page by page, each of which is made when there is room for it. What streams bring meanwhile is not listed; nobody is told to send what another one sends.
async fn send_pages<A: Staging>(
    answers: &Answers,
    terms: Accepted,
    incoming: &Incoming<A>,
    mut missing: Listing,
) -> Result<(), Error> {
    let mut page = Vec::new();
    loop {
        let listed = incoming.ledger().list(&mut missing, &mut page, EXTENTS_OF_PAGE);
        match listed {
            Listed::Part => tokio::task::yield_now().await,
            Listed::Full => {
                let missing = std::mem::take(&mut page);
                answers.send(Answer::Accepted(Accepted { missing, ..Accepted::default() })).await?;
            }
            Listed::All => break,
        }
    }
    answers.send(Answer::Accepted(Accepted { missing: page, last: true, ..terms })).await
}

/// The data phase of one stream.
pub(super) struct Session<'a, A: Staging> {
    pub(super) permit: &'a StreamPermit<A>,
    pub(super) frames: &'a mut Frames,
    pub(super) answers: &'a Answers,
    pub(super) limits: &'a Limits,
    pub(super) budget: &'a BudgetShare,
    /// Whether `End` may come.
    pub(super) control: bool,
}

/// Checked chunks on their way to the store.
struct Written {
    bytes: AtomicU64,
}

impl<A: Staging> Session<'_, A> {
    /// Credit that is given before the first `Ack`.
    pub(super) fn first_credit(budget: &BudgetShare, limits: &Limits) -> u64 {
        budget.grant(limits, 0, 0)
    }

    /// Takes chunks until `End` (whose totals it returns, with the last `Ack`) or, on a lane, until the sender half-closes.
    /// `credit` is what was promised in `Accepted`.
    pub(super) async fn run(&mut self, mut credit: u64) -> Result<(Option<Vec<FileTotal>>, Ack), Error> {
        let incoming = Arc::clone(self.permit.incoming());
        let written = Arc::new(Written { bytes: AtomicU64::new(0) });
        let (queue, runs) = mpsc::channel(QUEUE);
        // The writer is never dropped half-way: it ends when the queue does, and it is waited for.
        let writer =
            tokio::spawn(write_all(Arc::clone(&incoming), runs, Arc::clone(&written), self.limits.clone()));
        let mut in_hand = Gathered::default();
        let result = self.read(&incoming, &queue, &mut in_hand, &written, &mut credit).await;
        // What was claimed must be written, or nobody would send it again while this attempt lasts.
        if let Some(run) = in_hand.end() {
            let _ = queue.send(run).await;
        }
        drop(queue);
        let wrote = writer.await.unwrap_or_else(|error| {
            Err(Reason::Internal.error("the writer of the stream panicked").caused_by(error))
        });
        // The stop reason is the cause where both failed.
        let totals = match (result, wrote) {
            (Err(error), _) => return Err(self.permit.stopped().unwrap_or(error)),
            (Ok(_), Err(error)) => return Err(error),
            (Ok(totals), Ok(())) => totals,
        };
        let last = self.ack(&incoming, &written, credit);
        self.answers.offer(Answer::Ack(last));
        Ok((totals, last))
    }

    async fn read(
        &mut self,
        incoming: &Incoming<A>,
        queue: &mpsc::Sender<Run>,
        in_hand: &mut Gathered,
        written: &Written,
        credit: &mut u64,
    ) -> Result<Option<Vec<FileTotal>>, Error> {
        let mut stop = self.permit.stop.clone();
        let mut changes = incoming.changes();
        let mut alive = tokio::time::interval(self.limits.idle / 3);
        alive.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut deadline = Instant::now() + self.limits.idle;
        let Limits { slowest_bytes, slowest_time, bytes_per_second, .. } = *self.limits;
        let mut pace = Pace::new(slowest_bytes, slowest_time, bytes_per_second, incoming.wire_bytes());
        let mut ack_at = None;
        let mut begun = Begun::default();
        let began = Instant::now();
        let mut last_ack = Ack { credit_limit: *credit, ..Ack::default() };
        loop {
            tokio::select! {
                biased;
                reason = told_to_stop(&mut stop) => return Err(reason.unwrap_or_else(ended_early)),
                () = self.answers.closed() => return Err(ended_early()),
                _ = alive.tick() => {
                    // Also where nothing is new: it is the sign of life.
                    let ack = self.ack(incoming, written, *credit);
                    *credit = ack.credit_limit;
                    if self.answers.offer(Answer::Ack(ack)) {
                        last_ack = ack;
                    }
                }
                permit = queue.reserve(), if !in_hand.is_empty() => {
                    let permit = permit.map_err(|_| ended_early())?;
                    if let Some(run) = in_hand.end() {
                        permit.send(run);
                    }
                    deadline = Instant::now() + self.limits.idle;
                }
                _ = changes.changed() => {
                    let ack = self.ack(incoming, written, *credit);
                    if self.cannot_wait(&ack, &last_ack, begun.taken) && self.tell(ack, credit, &mut last_ack) {
                        ack_at = None;
                    } else {
                        ack_at.get_or_insert_with(|| Instant::now() + ACK_DELAY);
                    }
                }
                () = tokio::time::sleep_until(ack_at.unwrap_or(deadline)), if ack_at.is_some() => {
                    let ack = self.ack(incoming, written, *credit);
                    let told = self.tell(ack, credit, &mut last_ack);
                    ack_at = (!told).then(|| Instant::now() + ACK_DELAY);
                }
                frame = self.frames.next(), if in_hand.is_empty() => {
                    let now = Instant::now();
                    deadline = now + self.limits.idle;
                    let (mut frame, before) = (frame?, begun.taken);
                    for more in (0..FRAMES).rev() {
                        if let ControlFlow::Break(totals) = self.take(frame, incoming, &mut begun, *credit, in_hand)? {
                            return Ok(totals);
                        }
                        // Small chunks that are here do not each get a look at everything else.
                        if more == 0 || begun.taken - before >= AT_ONCE {
                            break;
                        }
                        let Some(next) = self.frames.next().now_or_never() else { break };
                        frame = next?;
                    }
                    // Frames that come one behind the other would keep what is below from being looked at.
                    if self.control && now >= pace.due() {
                        keeps_pace(&mut pace, incoming, began)?;
                    }
                    // Most often there is room, and no need to wait for it.
                    if !in_hand.is_empty()
                        && let Ok(permit) = queue.try_reserve()
                        && let Some(run) = in_hand.end()
                    {
                        permit.send(run);
                    }
                }
                () = tokio::time::sleep_until(deadline), if in_hand.is_empty() => return Err(idle(self.limits.idle)),
                () = tokio::time::sleep_until(pace.due()), if self.control => keeps_pace(&mut pace, incoming, began)?,
            }
        }
    }

    /// Takes one frame, or the end of the stream. Breaks with the totals, or without any on a lane, when nothing more comes.
    fn take(
        &self,
        frame: Option<(Frame, Payload)>,
        incoming: &Incoming<A>,
        begun: &mut Begun,
        credit: u64,
        in_hand: &mut Gathered,
    ) -> Result<ControlFlow<Option<Vec<FileTotal>>>, Error> {
        let Begun { taken, totals } = begun;
        match frame {
            Some((Frame::Chunk(chunk), payload)) if !totals.begun() => {
                let bytes = payload.len() as u64;
                let checked = self.check(incoming, &chunk, payload, *taken, credit)?;
                *taken += bytes;
                // Claimed from here on, so it must be written, whatever comes.
                in_hand.add(checked);
            }
            Some((Frame::Heartbeat(_), _)) => {}
            Some((Frame::End(end), _)) if self.control => {
                if totals.add(end, incoming)? {
                    return Ok(ControlFlow::Break(Some(std::mem::take(&mut totals.files))));
                }
            }
            Some((other, _)) => {
                let expected = if self.control { "a chunk or the end" } else { "a chunk" };
                return Err(unexpected(&other, expected));
            }
            None if self.control => return Err(ended_early()),
            None => return Ok(ControlFlow::Break(None)),
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Checks a chunk against the credit, after `taken` bytes of it, and claims its bytes. One that could never be taken is not told to wait for credit.
    fn check(
        &self,
        incoming: &Incoming<A>,
        chunk: &Chunk,
        payload: Payload,
        taken: u64,
        credit: u64,
    ) -> Result<(StagedChunk, u64), Error> {
        let Chunk { file, offset, crc64nvme, payload: _ } = *chunk;
        let at =
            |error: Error| error.metadata("file", file.to_string()).metadata("offset", offset.to_string());
        if payload.is_empty() {
            return Err(at(Reason::EmptyChunk.field("chunk.payload", "is empty")));
        }
        if payload.len() as u64 > u64::from(self.limits.chunk_bytes) {
            return Err(at(Reason::ChunkTooLarge.field(
                "chunk.payload",
                format!("has {} bytes, Accepted allows {}", payload.len(), self.limits.chunk_bytes),
            )));
        }
        let bytes = payload.len() as u64;
        if taken.saturating_add(bytes) > credit {
            return Err(Reason::CreditExceeded.field(
                "chunk.payload",
                format!("{taken} bytes were sent, {bytes} more exceed the credit of {credit}"),
            ));
        }
        let actual = payload.crc64();
        if actual != crc64nvme {
            return Err(at(Reason::ChunkChecksumMismatch.field(
                "chunk.crc64nvme",
                format!(
                    "is {crc64nvme:#018x}, the payload has {actual:#018x}; it was not stored, send it again"
                ),
            )));
        }
        incoming.ledger().claim(Extent { file, offset, len: bytes })?;
        Ok((StagedChunk { file, offset, payload }, crc64nvme))
    }

    /// Whether the sender has use for `ack` now: bytes became durable, a good part of its credit is back, or it may not have enough
    /// for a chunk.
    fn cannot_wait(&self, ack: &Ack, last: &Ack, taken: u64) -> bool {
        let chunk = u64::from(self.limits.chunk_bytes);
        let fresh = ack.credit_limit.saturating_sub(last.credit_limit);
        ack.durable_bytes != last.durable_bytes
            || fresh >= (ack.credit_limit.saturating_sub(ack.received_bytes) / 4).max(chunk)
            || last.credit_limit.saturating_sub(taken) < chunk
    }

    /// Sends `ack` if it says anything new; false where the peer does not keep up.
    fn tell(&self, ack: Ack, credit: &mut u64, last: &mut Ack) -> bool {
        if ack == *last {
            return true;
        }
        let sent = self.answers.offer(Answer::Ack(ack));
        if sent {
            *credit = ack.credit_limit;
            *last = ack;
        }
        sent
    }

    fn ack(&self, incoming: &Incoming<A>, written: &Written, credit: u64) -> Ack {
        let received = written.bytes.load(Ordering::Acquire);
        Ack {
            received_bytes: received,
            durable_bytes: incoming.ledger().durable_bytes(),
            credit_limit: self.budget.grant(self.limits, received, credit),
            phase: TransferPhase::Transferring.into(),
        }
    }
}

/// Chunks that go to the writer together, with their checksums.
type Run = Vec<(StagedChunk, u64)>;

/// The run that is being taken from the socket.
#[derive(Debug, Default)]
struct Gathered {
    run: Run,
    /// Where the last chunks lie one behind the other in memory: the first of them, their bytes, and the address of what follows.
    first: usize,
    bytes: usize,
    next: Option<usize>,
}

impl Gathered {
    fn is_empty(&self) -> bool {
        self.run.is_empty()
    }

    fn add(&mut self, chunk: (StagedChunk, u64)) {
        let payload = &chunk.0.payload;
        let (at, next) = match payload.slices() {
            [all] => (Some(all.as_ptr().addr()), Some(all.as_ptr().addr().saturating_add(all.len()))),
            _ => (None, None),
        };
        let follows = self.next.zip(at).and_then(|(next, at)| at.checked_sub(next));
        if follows.is_none_or(|gap| gap > BETWEEN) {
            self.part();
        }
        self.bytes += payload.len();
        self.next = next;
        self.run.push(chunk);
    }

    /// What comes lies elsewhere: what is there so far gets memory of its own, if it is small.
    fn part(&mut self) {
        if self.bytes < OWNED {
            for (chunk, _) in self.run.iter_mut().skip(self.first) {
                chunk.payload = owned(std::mem::take(&mut chunk.payload));
            }
        }
        (self.first, self.bytes, self.next) = (self.run.len(), 0, None);
    }

    /// The whole run, if there is any.
    fn end(&mut self) -> Option<Run> {
        self.part();
        self.first = 0;
        Some(std::mem::take(&mut self.run)).filter(|run| !run.is_empty())
    }
}

/// Without the frame that it came in, if it is small; see [`OWNED`].
fn owned(payload: Payload) -> Payload {
    if payload.len() >= OWNED {
        return payload;
    }
    let mut bytes = BytesMut::with_capacity(payload.len());
    payload.slices().iter().for_each(|slice| bytes.extend_from_slice(slice));
    bytes.freeze().into()
}

/// Whether enough comes. What any stream has taken waits for the store, not for the sender.
fn keeps_pace<A: Staging>(pace: &mut Pace, incoming: &Incoming<A>, began: Instant) -> Result<(), Error> {
    let (written, unwritten) = (incoming.wire_bytes(), incoming.ledger().unwritten_bytes());
    if incoming.is_reading(began.elapsed()) {
        pace.restart(written);
    } else if !pace.look(written.saturating_add(unwritten), written) {
        return Err(too_slow(&pace.expected()));
    }
    Ok(())
}

/// Writes what a session has checked, until its queue ends.
async fn write_all<A: Staging>(
    incoming: Arc<Incoming<A>>,
    mut runs: mpsc::Receiver<Run>,
    written: Arc<Written>,
    limits: Limits,
) -> Result<(), Error> {
    let mut batch = Vec::new();
    while let Some(first) = runs.recv().await {
        let mut size = 0;
        let mut next = Some(first);
        while let Some(run) = next {
            size += run.iter().map(|(chunk, _)| chunk.payload.len()).sum::<usize>();
            batch.extend(run);
            let full = batch.len() >= BATCH || size >= BATCH_BYTES;
            next = if full { None } else { runs.try_recv().ok() };
        }
        let records: Vec<_> = batch
            .iter()
            .map(|(chunk, crc)| ExtentRecord {
                extent: Extent { file: chunk.file, offset: chunk.offset, len: chunk.payload.len() as u64 },
                crc: *crc,
            })
            .collect();
        let bytes: u64 = records.iter().map(|record| record.extent.len).sum();
        let weight = records.iter().map(|record| weight(record.extent.len)).sum();
        incoming.room_for(weight, &limits).await?;
        if let Err(error) = incoming.staging.write(batch.drain(..).map(|(chunk, _)| chunk).collect()).await {
            tracing::warn!(
                transfer_id = %incoming.plan.spec.transfer_id,
                error = &error as &dyn std::error::Error,
                "write failed"
            );
            let error = Error::from(error);
            incoming.fail(&error);
            return Err(error);
        }
        written.bytes.fetch_add(bytes, Ordering::Release);
        incoming.written(&records, &limits);
    }
    Ok(())
}

/// What a stream has brought.
#[derive(Debug, Default)]
struct Begun {
    /// Payload bytes.
    taken: u64,
    totals: Totals,
}

/// The pages of `End`.
#[derive(Debug, Default)]
struct Totals {
    pages: usize,
    files: Vec<FileTotal>,
}

impl Totals {
    fn begun(&self) -> bool {
        self.pages > 0
    }

    /// Adds a page; true when it was the last.
    fn add<A: Staging>(&mut self, end: End, incoming: &Incoming<A>) -> Result<bool, Error> {
        self.pages += 1;
        let manifest = &incoming.plan.manifest;
        let mismatch = |what: String| Reason::TotalsMismatch.field("end.files", what);
        if end.files.is_empty() && !end.last {
            return Err(mismatch("a page that is not the last has no files".to_owned()));
        }
        for total in end.files {
            if u64::from(total.file) != self.files.len() as u64
                || u64::from(total.file) >= manifest.file_count()
            {
                return Err(mismatch(format!(
                    "file {} comes at position {}; every file of the manifest comes once, in order",
                    total.file,
                    self.files.len()
                )));
            }
            self.files.push(FileTotal { size: total.size, crc: total.crc64nvme });
        }
        if !end.last {
            return Ok(false);
        }
        let bytes = self.files.iter().fold(0_u64, |sum, total| sum.saturating_add(total.size));
        if self.files.len() as u64 != manifest.file_count()
            || end.file_count != manifest.file_count()
            || end.total_bytes != bytes
        {
            return Err(Reason::TotalsMismatch.field(
                "end",
                format!(
                    "has {} entries, file_count {} and total_bytes {}; the manifest has {} files, the entries add up to \
                     {bytes} bytes",
                    self.files.len(),
                    end.file_count,
                    end.total_bytes,
                    manifest.file_count()
                ),
            ));
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    /// Bytes of memory that the only slice of `payload` keeps, from its start on.
    fn kept(payload: Payload) -> usize {
        payload.into_bytes().try_into_mut().expect("nobody else has it").capacity()
    }

    #[test]
    fn a_small_payload_does_not_keep_the_frame_that_it_came_in() {
        let of_frame = |len| {
            let mut frame = Bytes::from(vec![7; 512 << 10]);
            frame.truncate(len);
            frame
        };
        assert_eq!(owned(of_frame(1).into()), Bytes::from_static(&[7]).into());
        assert!(kept(owned(of_frame(1).into())) < 1 << 10);
        assert!(kept(of_frame(1).into()) >= 512 << 10, "what it is without that");
        // A large one stays where it is.
        let large = of_frame(OWNED);
        let at = large.as_ptr();
        assert_eq!(owned(large.into()).slices()[0].as_ptr(), at);
    }

    /// A run of chunks with these payloads, and whether each stayed where it was.
    fn gathered(payloads: Vec<Payload>) -> (Run, Vec<bool>) {
        let at = |payload: &Payload| payload.slices()[0].as_ptr();
        let before: Vec<_> = payloads.iter().map(at).collect();
        let mut gathered = Gathered::default();
        for (file, payload) in (0..).zip(payloads) {
            gathered.add((StagedChunk { file, offset: 0, payload }, 0));
        }
        let run = gathered.end().unwrap();
        assert!(gathered.is_empty() && gathered.end().is_none());
        let stayed =
            run.iter().zip(before).map(|((chunk, _), before)| at(&chunk.payload) == before).collect();
        (run, stayed)
    }

    #[test]
    fn small_payloads_stay_in_their_frame_where_they_fill_enough_of_it() {
        let frame = Bytes::from((0..512 << 10).map(|at: u32| at.to_le_bytes()[1]).collect::<Vec<u8>>());
        let part = |at: usize, len: usize| Payload::from(frame.slice(at..at + len));
        let step = (4 << 10) + BETWEEN;
        let all: Vec<_> = (0..40).map(|number| part(number * step, 4 << 10)).collect();
        // 32 of them are 128 KiB, 31 are not.
        assert_eq!(gathered(all[..32].to_vec()).1, [true; 32]);
        assert_eq!(gathered(all[..31].to_vec()).1, [false; 31]);
        // What lies elsewhere does not count with them, and neither does what comes before another.
        let (run, stayed) = gathered([&all[36..], &all[..32], &all[39..]].concat());
        assert_eq!(stayed, [vec![false; 4], vec![true; 32], vec![false]].concat());
        let order: Vec<_> = [&all[36..], &all[..32], &all[39..]].concat();
        assert!(
            run.iter().zip(&order).all(|((chunk, _), sent)| chunk.payload == *sent),
            "the bytes are the same"
        );
        // A wide gap is filled by something that nobody has counted.
        let wide: Vec<_> = (0..40).map(|number| part(number * (step + 1), 4 << 10)).collect();
        assert_eq!(gathered(wide).1, [false; 40]);
        assert_eq!(gathered(vec![part(0, OWNED), part(OWNED, 1 << 10)]).1, [true; 2]);
    }

    #[test]
    fn who_opens_many_streams_gets_no_more_of_the_budget() {
        let limits = Limits { receive_budget_bytes: 16 << 20, ..Limits::default() };
        let (greedy, modest) = (NodeId::new("n9").unwrap(), NodeId::new("n1").unwrap());
        let budget = Arc::new(Budget::default());
        let one = budget.join(&modest);
        let long = limits.stream_credit_bytes;
        let window = |stream: &BudgetShare, received| stream.grant(&limits, received, 0) - received;
        assert_eq!(window(&one, long), limits.stream_credit_bytes, "alone");
        let rises: Vec<_> = [0, 1, 3, 6, 7].map(|mib| window(&one, mib << 20) >> 20).to_vec();
        assert_eq!(rises, [1, 2, 4, 7, 8], "at first less, up to what it gets alone");
        let many: Vec<_> = (0..100).map(|_| budget.join(&greedy)).collect();
        assert_eq!(window(&one, long), 8 << 20, "half of it");
        assert_eq!(window(&many[0], long), u64::from(limits.chunk_bytes), "a chunk at least");
        drop(many);
        let _second = budget.join(&modest);
        assert_eq!(window(&one, long), 8 << 20);
        drop(one);
        assert_eq!(budget.peers().len(), 1);
    }

    #[test]
    fn lanes_are_given_while_each_stream_has_a_chunk_of_the_budget() {
        let limits = Limits::default();
        let chunks = limits.receive_budget_bytes / u64::from(limits.chunk_bytes);
        let budget = Arc::new(Budget::default());
        let node = |number: usize| NodeId::new(format!("n{number}")).unwrap();
        let mut held = Vec::new();
        let mut of_nodes = Vec::new();
        for number in 0..4 {
            let first = held.len();
            for _ in 0..limits.transfers_per_peer {
                let control = budget.join(&node(number));
                let lanes = budget.lanes(&node(number), u64::from(limits.lanes) - 1, &limits);
                held.push((control, lanes));
            }
            let of_node: Vec<_> =
                held[first..].iter().map(|(_, lanes)| 1 + u64::from(lanes.count())).collect();
            of_nodes.push(of_node.iter().sum::<u64>());
            assert!(number > 0 || of_node[0] == 8, "one that is alone has all lanes that it wants");
        }
        assert!(of_nodes.iter().all(|of_node| *of_node <= chunks), "{of_nodes:?}");
        let transfers = held.len() as u64;
        assert!(of_nodes.iter().sum::<u64>() <= chunks + transfers, "{of_nodes:?}");
        drop(held);
        assert!(budget.peers().is_empty());
        // What a node holds leaves lanes to the next one.
        let _all: Vec<_> = (0..64).map(|_| budget.lanes(&node(0), 7, &limits)).collect();
        assert_eq!(budget.lanes(&node(1), 7, &limits).count(), 7);
    }

    #[test]
    fn what_was_promised_to_streams_of_a_node_is_not_promised_again() {
        let limits = Limits::default();
        let (budget, node) = (Arc::new(Budget::default()), NodeId::new("n9").unwrap());
        let mut streams = Vec::new();
        let mut promised = 0;
        for _ in 0..64 {
            let stream = budget.join(&node);
            // It has brought much, and then stops.
            promised += stream.grant(&limits, 1 << 40, 0) - (1 << 40);
            streams.push(stream);
        }
        let chunks = 64 * u64::from(limits.chunk_bytes);
        assert!(promised <= limits.receive_budget_bytes + chunks, "{promised}");
        assert_eq!(budget.peers()[&node].promised, promised);
        // What is used up is there again.
        assert!(streams[1].grant(&limits, 2 << 40, 0) - (2 << 40) <= 2 << 20);
        streams.truncate(1);
        assert_eq!(streams[0].grant(&limits, 2 << 40, 0) - (2 << 40), limits.stream_credit_bytes);
    }
}
