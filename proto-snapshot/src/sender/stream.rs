//! What goes over the wire: one control stream and its lanes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt as _;
use proto_common::checksum::crc64;
use proto_common::error::Error;
use proto_common::rate::RateLimiter;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::work::{Checksums, Unit, Work};
use crate::limits::PAGE_BYTES;
use crate::reason::Reason;
use crate::source::SnapshotSource;
use crate::spec::Manifest;
use crate::v1::transfer_split_snapshot_request::{
    Chunk, End, File, FileTotal, Frame, Heartbeat, Manifest as Page,
};
use crate::v1::transfer_split_snapshot_response::{Accepted, Extent, Frame as Answer, Installed};
use crate::v1::{TransferPhase, TransferSplitSnapshotRequest, TransferSplitSnapshotResponse};

/// Frames between the one that makes them and the socket: the next is being read while one is sent.
const QUEUE: usize = 4;
/// Silence before `Accepted`, as the protocol says.
const FIRST_IDLE: Duration = Duration::from_secs(30);
/// Smallest chunk that is worth its frame where the receiver allows more.
const MAX_CHUNK: u32 = 1 << 20;

/// Where frames of one stream go.
#[derive(Debug, Clone)]
pub(super) struct Outbound {
    frames: mpsc::Sender<TransferSplitSnapshotRequest>,
}

impl Outbound {
    /// An outbound half and the stream to call with.
    pub(super) fn new() -> (Self, ReceiverStream<TransferSplitSnapshotRequest>) {
        let (frames, stream) = mpsc::channel(QUEUE);
        (Self { frames }, ReceiverStream::new(stream))
    }

    pub(super) async fn send(&self, frame: Frame) -> Result<(), Error> {
        let sent = self.frames.send(TransferSplitSnapshotRequest { frame: Some(frame) }).await;
        sent.map_err(|_| broken("the connection was closed"))
    }

    fn heartbeat(&self) {
        // A full queue is a sign of life by itself.
        let _ = self
            .frames
            .try_send(TransferSplitSnapshotRequest { frame: Some(Frame::Heartbeat(Heartbeat {})) });
    }
}

/// The stream broke; another may work.
pub(super) fn broken(what: &str) -> Error {
    Error::new(proto_common::error::CommonReason::Unavailable, what)
}

/// What the receiver said on one stream.
#[derive(Debug)]
pub(super) struct Heard {
    credit: watch::Sender<u64>,
    received: watch::Sender<u64>,
    durable: AtomicU64,
    phase: watch::Sender<TransferPhase>,
}

impl Heard {
    pub(super) fn new(credit: u64) -> Self {
        Self {
            credit: watch::Sender::new(credit),
            received: watch::Sender::new(0),
            durable: AtomicU64::new(0),
            phase: watch::Sender::new(TransferPhase::Transferring),
        }
    }

    pub(super) fn durable(&self) -> u64 {
        self.durable.load(Ordering::Relaxed)
    }

    pub(super) fn phase(&self) -> TransferPhase {
        *self.phase.borrow()
    }

    /// Waits until the receiver has written `bytes` of this stream.
    pub(super) async fn received(&self, bytes: u64) {
        // The sender lives in `self`.
        let _ = self.received.subscribe().wait_for(|received| *received >= bytes).await;
    }
}

/// The answers of one stream.
pub(super) struct Inbound {
    answers: Streaming<TransferSplitSnapshotResponse>,
    idle: Duration,
}

impl Inbound {
    pub(super) fn new(answers: Streaming<TransferSplitSnapshotResponse>) -> Self {
        Self { answers, idle: FIRST_IDLE }
    }

    async fn next(&mut self) -> Result<Option<Answer>, Error> {
        let answer = tokio::time::timeout(self.idle, self.answers.message())
            .await
            .map_err(|_| Reason::IdleTimeout.error(format!("the receiver was silent for {:?}", self.idle)))?;
        match answer? {
            None => Ok(None),
            Some(TransferSplitSnapshotResponse { frame: Some(frame) }) => Ok(Some(frame)),
            Some(TransferSplitSnapshotResponse { frame: None }) => {
                Err(Reason::UnknownFrame.error("the receiver sent a frame that this version does not know"))
            }
        }
    }

    /// Reads `Accepted`, all pages of it; its `missing` are those of all pages.
    pub(super) async fn accepted(&mut self) -> Result<Accepted, Error> {
        let mut missing: Vec<Extent> = Vec::new();
        loop {
            match self.next().await? {
                Some(Answer::Accepted(page)) => {
                    missing.extend_from_slice(&page.missing);
                    if page.last {
                        if page.max_chunk_bytes == 0 && !page.already_installed {
                            return Err(Reason::InvalidField.field("accepted.max_chunk_bytes", "is 0"));
                        }
                        if page.idle_timeout_ms > 0 {
                            self.idle = Duration::from_millis(page.idle_timeout_ms);
                        }
                        return Ok(Accepted { missing, ..page });
                    }
                }
                // It is preparing.
                Some(Answer::Ack(_)) => {}
                Some(Answer::Installed(_)) => {
                    return Err(Reason::UnexpectedFrame.error("the receiver sent Installed before Accepted"));
                }
                None => return Err(broken("the receiver ended the stream before it accepted")),
            }
        }
    }

    /// Reads acknowledgements until `Installed`, or `None` at the end of the stream.
    pub(super) async fn listen(
        &mut self,
        heard: &Heard,
        on_ack: impl Fn(),
    ) -> Result<Option<Installed>, Error> {
        loop {
            match self.next().await? {
                Some(Answer::Ack(ack)) => {
                    heard.durable.fetch_max(ack.durable_bytes, Ordering::Relaxed);
                    heard.phase.send_replace(ack.phase());
                    heard.received.send_if_modified(|received| raise(received, ack.received_bytes));
                    heard.credit.send_if_modified(|credit| raise(credit, ack.credit_limit));
                    on_ack();
                }
                Some(Answer::Installed(installed)) => return Ok(Some(installed)),
                Some(Answer::Accepted(_)) => {
                    return Err(Reason::UnexpectedFrame.error("the receiver sent Accepted twice"));
                }
                None => return Ok(None),
            }
        }
    }

    /// Silence that this stream bears.
    pub(super) fn idle(&self) -> Duration {
        self.idle
    }
}

fn raise(value: &mut u64, to: u64) -> bool {
    let higher = to > *value;
    *value = (*value).max(to);
    higher
}

/// Sends heartbeats until dropped.
pub(super) async fn heartbeats(outbound: &Outbound, idle: Duration) {
    let mut every = tokio::time::interval((idle / 3).max(Duration::from_millis(10)));
    loop {
        every.tick().await;
        outbound.heartbeat();
    }
}

/// Sends the manifest in pages.
pub(super) async fn send_manifest(outbound: &Outbound, manifest: &Manifest) -> Result<(), Error> {
    let mut page = Page::default();
    let mut bytes = 0;
    for file in manifest.files() {
        // Name, size and digest with their tags and lengths.
        let size = file.name.as_str().len() + 64;
        if bytes + size > PAGE_BYTES {
            outbound.send(Frame::Manifest(std::mem::take(&mut page))).await?;
            bytes = 0;
        }
        bytes += size;
        page.files.push(File::from(file));
    }
    page.last = true;
    outbound.send(Frame::Manifest(page)).await
}

/// Sends the totals in pages.
pub(super) async fn send_end(outbound: &Outbound, totals: &[crate::spec::FileTotal]) -> Result<(), Error> {
    // Two varints, a fixed64, and their tags and lengths: at most this many bytes each.
    const TOTAL_BYTES: usize = 40;
    let files: Vec<FileTotal> = (0_u32..)
        .zip(totals)
        .map(|(file, total)| FileTotal { file, size: total.size, crc64nvme: total.crc })
        .collect();
    let total_bytes = totals.iter().fold(0_u64, |sum, total| sum.saturating_add(total.size));
    let mut rest = files.as_slice();
    while rest.len() > PAGE_BYTES / TOTAL_BYTES {
        let (page, more) = rest.split_at(PAGE_BYTES / TOTAL_BYTES);
        outbound.send(Frame::End(End { files: page.to_vec(), ..End::default() })).await?;
        rest = more;
    }
    let file_count = totals.len() as u64;
    outbound.send(Frame::End(End { files: rest.to_vec(), last: true, total_bytes, file_count })).await
}

/// Sends chunks on one stream.
pub(super) struct Pump<'a, S> {
    pub(super) source: &'a S,
    pub(super) outbound: &'a Outbound,
    pub(super) heard: &'a Heard,
    pub(super) checksums: &'a Checksums,
    pub(super) limiter: &'a RateLimiter,
    pub(super) chunk: u32,
    /// Told of bytes sent, and of time spent waiting for credit or the limiter.
    pub(super) counters: &'a Counters,
    /// Payload bytes sent on this stream.
    pub(super) sent: u64,
}

/// What all streams of a transfer count together.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) wire_bytes: AtomicU64,
    pub(super) throttled_us: AtomicU64,
}

impl<S: SnapshotSource> Pump<'_, S> {
    /// Sends units until there are none. Every unit taken is added to `taken` first.
    pub(super) async fn drain(&mut self, work: &Work, taken: &mut Vec<Unit>) -> Result<(), Error> {
        while let Some(unit) = work.take() {
            taken.push(unit);
            self.send(unit).await?;
        }
        Ok(())
    }

    async fn send(&mut self, unit: Unit) -> Result<(), Error> {
        let piece = usize::try_from(self.chunk.min(MAX_CHUNK)).unwrap_or(1);
        let mut pieces = self.source.open(unit.file, unit.offset, unit.len, piece).await?;
        let mut at = unit.offset;
        while let Some(payload) = pieces.next().await {
            let payload = payload?;
            let len = payload.len() as u64;
            let crc = crc64(&payload);
            self.checksums.add(unit.file, at, len, crc);
            self.wait_for(len).await?;
            self.outbound
                .send(Frame::Chunk(Chunk { file: unit.file, offset: at, crc64nvme: crc, payload }))
                .await?;
            self.sent += len;
            self.counters.wire_bytes.fetch_add(len, Ordering::Relaxed);
            at += len;
        }
        match unit.len {
            Some(len) if at != unit.offset + len => Err(Reason::Internal.error(format!(
                "the source gave {} of {len} bytes of file {} at offset {}",
                at - unit.offset,
                unit.file,
                unit.offset
            ))),
            Some(_) => Ok(()),
            None => {
                self.checksums.end(unit.file, at);
                Ok(())
            }
        }
    }

    /// Waits for credit and for the rate limit.
    async fn wait_for(&self, bytes: u64) -> Result<(), Error> {
        let mut waited = self.limiter.acquire(bytes).await;
        let needed = self.sent + bytes;
        let mut credit = self.heard.credit.subscribe();
        if *credit.borrow_and_update() < needed {
            let since = tokio::time::Instant::now();
            credit.wait_for(|credit| *credit >= needed).await.map_err(|_| broken("the stream was closed"))?;
            waited += since.elapsed();
        }
        let waited = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
        self.counters.throttled_us.fetch_add(waited, Ordering::Relaxed);
        Ok(())
    }
}

/// Reads what the receiver has already, for the checksums of whole files.
pub(super) async fn read_known<S: SnapshotSource>(
    source: &S,
    checksums: &Checksums,
    units: Vec<Unit>,
) -> Result<(), Error> {
    /// Pieces in which files are read that are not sent.
    const PIECE: usize = 1 << 20;
    for unit in units {
        let mut pieces = source.open(unit.file, unit.offset, unit.len, PIECE).await?;
        let mut at = unit.offset;
        while let Some(payload) = pieces.next().await {
            let payload = payload?;
            checksums.add(unit.file, at, payload.len() as u64, crc64(&payload));
            at += payload.len() as u64;
            // Checksums alone are fast enough to keep a thread from everything else.
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}

/// What a lane needs to know of its control stream.
pub(super) struct Shared<S> {
    pub(super) source: Arc<S>,
    pub(super) checksums: Arc<Checksums>,
    pub(super) limiter: Arc<RateLimiter>,
    pub(super) counters: Arc<Counters>,
}

impl<S> Clone for Shared<S> {
    fn clone(&self) -> Self {
        Self {
            source: Arc::clone(&self.source),
            checksums: Arc::clone(&self.checksums),
            limiter: Arc::clone(&self.limiter),
            counters: Arc::clone(&self.counters),
        }
    }
}
