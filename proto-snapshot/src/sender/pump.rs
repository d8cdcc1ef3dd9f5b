//! Reading the source: to send it, or only for its checksums.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::StreamExt as _;
use proto_common::checksum::crc64;
use proto_common::error::Error;
use proto_common::rate::RateLimiter;
use tokio::sync::watch;

use super::checksums::Checksums;
use super::missing::Span;
use super::patience::Patience;
use super::stream::{Heard, Outbound};
use super::work::Work;
use crate::reason::Reason;
use crate::source::SnapshotSource;
use crate::v1::transfer_split_snapshot_request::{Chunk, Frame};

/// Largest chunk that is sent where the receiver allows more: one HTTP/2 frame, so that it is one write at the sender and one buffer at the receiver, whose
/// checksum finds it in the processor's second-level cache. On loopback with 2 cores, 1 GiB from memory to memory took 0.51 s with 256 KiB and 0.34 with
/// 512 KiB (medians of 8 interleaved rounds); with 1 MiB 0.24 to 0.32 where it took 0.26 to 0.31 with 512 KiB (four runs), and twice the memory.
const MAX_CHUNK: usize = 512 << 10;

/// A chunk up to this many bytes goes out together with its neighbours: the frames that it would get by itself cost both ends more than copying it. 16,384 files
/// of 16 KiB took 0.60 s where they went out one by one, 0.50 together; with 64 KiB here it was 0.46, which differs by less than rounds do.
const SMALL: usize = 16 << 10;
/// Bytes of a batch at which it goes out: one write, and with the heads of 4 KiB chunks still one HTTP/2 frame. Of 100,000 files of 4 KiB, batches of
/// 56 KiB took 1.65 s, of 128, 256 and 448 KiB 1.6 s, while the machine was slow. By itself this makes no difference to 256 KiB that is seen; together with
/// 64 files that are read at once and fewer threads that write, it took 1.10 s instead of 1.13.
const BATCH_BYTES: usize = 448 << 10;
/// Chunks of a batch at most.
const BATCH: usize = 256;

/// What all streams of a transfer share.
pub(super) struct Shared<S> {
    pub(super) source: Arc<S>,
    pub(super) checksums: Arc<Checksums>,
    pub(super) limiter: Arc<RateLimiter>,
    pub(super) counters: Arc<Counters>,
    pub(super) patience: Arc<Patience>,
    pub(super) hold: Hold,
}

impl<S> Clone for Shared<S> {
    fn clone(&self) -> Self {
        Self {
            source: Arc::clone(&self.source),
            checksums: Arc::clone(&self.checksums),
            limiter: Arc::clone(&self.limiter),
            counters: Arc::clone(&self.counters),
            patience: Arc::clone(&self.patience),
            hold: self.hold.clone(),
        }
    }
}

impl<S: SnapshotSource> Shared<S> {
    pub(super) fn new(source: S, limiter: RateLimiter) -> Self {
        Self {
            source: Arc::new(source),
            checksums: Arc::default(),
            limiter: Arc::new(limiter),
            counters: Arc::default(),
            patience: Arc::default(),
            hold: Hold::default(),
        }
    }

    /// Sends chunks of at most `chunk` bytes on one stream.
    pub(super) fn pump<'a>(&'a self, outbound: &'a Outbound, heard: &'a Heard, chunk: u32) -> Pump<'a, S> {
        Pump {
            shared: self,
            outbound,
            heard,
            piece: usize::try_from(chunk).map_or(MAX_CHUNK, |chunk| chunk.min(MAX_CHUNK)),
            sent: 0,
            batch: Vec::new(),
            batch_bytes: 0,
        }
    }

    /// Reads what the receiver has already, for the checksums of whole files.
    pub(super) async fn read_known(&self, spans: Vec<Span>) -> Result<(), Error> {
        for span in spans {
            // In pieces of the same size as those that are sent, since a source may keep their memory for the next ones.
            let mut pieces = self.source.open(span.file, span.offset, span.len, MAX_CHUNK).await?;
            let mut at = span.offset;
            while let Some(payload) = pieces.next().await {
                let payload = payload?;
                let len = payload.len() as u64;
                self.checksums.add(span.file, at, len, crc64(&payload));
                self.patience.active();
                at = at.saturating_add(len);
                // Checksums alone are fast enough to keep a thread from everything else.
                tokio::task::yield_now().await;
            }
            self.read_to(span, at)?;
        }
        Ok(())
    }

    /// The source ended at `at` what it was asked for as `span`.
    fn read_to(&self, span: Span, at: u64) -> Result<(), Error> {
        match span.len {
            Some(len) if at != span.end() => Err(Reason::Internal.error(format!(
                "the source gave {} of {len} bytes of file {} at offset {}",
                at.saturating_sub(span.offset),
                span.file,
                span.offset
            ))),
            Some(_) => Ok(()),
            None => {
                self.checksums.end(span.file, at);
                Ok(())
            }
        }
    }
}

/// What all streams of a transfer count together.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) wire_bytes: AtomicU64,
    pub(super) throttled_us: AtomicU64,
}

/// Holds everything back that would be sent, as long as it is not known whether it is still wanted.
#[derive(Debug, Clone)]
pub(super) struct Hold(Arc<watch::Sender<bool>>);

impl Default for Hold {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }
}

impl Hold {
    pub(super) fn set(&self, held: bool) {
        self.0.send_replace(held);
    }

    /// Waits until nothing is held back.
    pub(super) async fn pass(&self) {
        if *self.0.borrow() {
            // The sender lives in `self`.
            let _ = self.0.subscribe().wait_for(|held| !held).await;
        }
    }
}

/// Sends chunks on one stream.
pub(super) struct Pump<'a, S> {
    shared: &'a Shared<S>,
    outbound: &'a Outbound,
    heard: &'a Heard,
    piece: usize,
    /// Payload bytes sent on this stream, or waiting in `batch`.
    pub(super) sent: u64,
    /// Small chunks that go out together, and their bytes.
    batch: Vec<Frame>,
    batch_bytes: usize,
}

impl<S: SnapshotSource> Pump<'_, S> {
    /// Sends units until there are none. Every unit taken is added to `taken` first.
    pub(super) async fn drain(&mut self, work: &Work, taken: &mut Vec<Span>) -> Result<(), Error> {
        loop {
            let first = taken.len();
            work.take(taken);
            if taken.len() == first {
                return self.flush().await;
            }
            for unit in &taken[first..] {
                self.send(*unit).await?;
            }
        }
    }

    /// Payload bytes that may have gone out.
    pub(super) fn handed_over(&self) -> u64 {
        self.sent.saturating_sub(self.batch_bytes as u64)
    }

    async fn send(&mut self, unit: Span) -> Result<(), Error> {
        let shared = self.shared;
        let mut pieces = shared.source.open(unit.file, unit.offset, unit.len, self.piece).await?;
        let mut at = unit.offset;
        while let Some(payload) = pieces.next().await {
            let payload = payload?;
            let len = payload.len();
            let bytes = len as u64;
            let crc = crc64(&payload);
            shared.checksums.add(unit.file, at, bytes, crc);
            self.wait_for(bytes).await?;
            let chunk = Frame::Chunk(Chunk { file: unit.file, offset: at, crc64nvme: crc, payload });
            if len > SMALL {
                self.flush().await?;
                self.heard.quiet.bound("a chunk to be read", self.outbound.send(chunk)).await??;
            } else {
                self.batch.push(chunk);
                self.batch_bytes += len;
                if self.batch_bytes >= BATCH_BYTES || self.batch.len() >= BATCH {
                    self.flush().await?;
                }
            }
            self.sent = self.sent.saturating_add(bytes);
            shared.counters.wire_bytes.fetch_add(bytes, Ordering::Relaxed);
            shared.patience.active();
            at = at.saturating_add(bytes);
            if len > SMALL {
                // The connection takes it now, while it is in the cache of the processor, and not when the queue is full: 1 GiB from memory takes 0.84 to 0.90 of the
                // time with one worker thread at each end, as long with two (medians of 8 to 14 rounds); from a file as long.
                tokio::task::yield_now().await;
            }
        }
        shared.read_to(unit, at)
    }

    /// Sends the small chunks that wait.
    async fn flush(&mut self) -> Result<(), Error> {
        if self.batch.is_empty() {
            return Ok(());
        }
        self.shared.hold.pass().await;
        self.batch_bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        self.heard.quiet.bound("chunks to be read", self.outbound.send_together(batch)).await?
    }

    /// Waits for credit and for the rate limit.
    async fn wait_for(&mut self, bytes: u64) -> Result<(), Error> {
        let wanted = self.sent.saturating_add(bytes);
        if self.heard.has_credit(wanted) && self.shared.limiter.rate().is_none() {
            // As a rule. A look at the clock for each of very many small files would be for nothing.
            self.shared.hold.pass().await;
            return Ok(());
        }
        // Credit comes for what has been sent, and a batch may take long to fill.
        self.flush().await?;
        let mut waited = self.shared.limiter.acquire(bytes).await;
        self.shared.hold.pass().await;
        let since = tokio::time::Instant::now();
        self.heard.credit(wanted).await?;
        waited += since.elapsed();
        let waited = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
        self.shared.counters.throttled_us.fetch_add(waited, Ordering::Relaxed);
        Ok(())
    }
}
