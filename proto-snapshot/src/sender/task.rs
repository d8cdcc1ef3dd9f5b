//! One transfer from its start to its end: claim an attempt, push, and try again for as long as that can help.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use proto_common::clock::now_unix_ms;
use proto_common::connect::Connect;
use proto_common::error::Error;
use proto_common::meter::Meter;
use proto_common::rate::RateLimiter;
use proto_common::registry::Tracker;
use proto_common::retry::BackoffState;
use proto_common::v1 as common;
use proto_common::v1::Direction;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::stream::{
    Counters, Heard, Inbound, Outbound, Pump, Shared, broken, heartbeats, read_known, send_end, send_manifest,
};
use super::work::{Checksums, Unit, Work, intersect};
use super::{SnapshotSender, SnapshotToSend};
use crate::limits::MAX_MESSAGE_BYTES;
use crate::reason::Reason;
use crate::source::SnapshotSource;
use crate::spec::Manifest;
use crate::transfers::Transfers;
use crate::v1::split_snapshot_service_client::SplitSnapshotServiceClient;
use crate::v1::transfer_split_snapshot_request::{Frame, Header, LaneHeader};
use crate::v1::transfer_split_snapshot_response::{Accepted, Installed};
use crate::v1::{CancelTransferRequest, GetTransferProgressRequest, TransferPhase, TransferProgress};

/// How long a cancel tries to reach the receiver.
const CANCEL_PATIENCE: Duration = Duration::from_secs(10);
/// How often what is shown is brought up to date.
const SHOW_EVERY: Duration = Duration::from_millis(200);
/// How often a lane is opened again before the whole transfer starts over.
const LANE_RETRIES: u32 = 3;

/// See the module.
pub(super) struct Task<C: Connect, S: SnapshotSource> {
    sender: SnapshotSender<C>,
    snapshot: SnapshotToSend,
    shared: Shared<S>,
    shown: Arc<Shown>,
    cancel: CancellationToken,
    /// Tells that the transfer has ended, however its task ended.
    _registered: Registered,
}

/// What others see of the transfer.
struct Shown {
    tracker: std::sync::Mutex<Option<Tracker<TransferProgress>>>,
    meter: std::sync::Mutex<Meter>,
    counters: Arc<Counters>,
    durable: AtomicU64,
    last_progress: std::sync::Mutex<Instant>,
}

struct Registered {
    transfers: Transfers,
    id: proto_common::ids::TransferId,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.transfers.forget_outgoing(&self.id);
    }
}

/// The attempt that this task has claimed.
struct Claimed {
    attempt: u64,
    session: [u8; 16],
    generation: u64,
    discard_staged: bool,
}

/// The source, read once at the start.
struct Described {
    manifest: Manifest,
    content_version: String,
}

/// How one control stream ended without an error.
enum Ended {
    Installed(Installed),
    /// The source cannot go on where the receiver is: it has to start anew.
    StartAnew,
}

/// What a new outgoing transfer shows.
pub(super) fn initial_progress(snapshot: &SnapshotToSend) -> TransferProgress {
    let SnapshotToSend {
        transfer_id,
        source_shard,
        target_shard,
        source_node,
        target_node,
        slots,
        point,
        fence: _,
        priority,
    } = snapshot;
    let mut transfer = TransferProgress {
        transfer_id: transfer_id.to_string(),
        source_shard_id: source_shard.to_string(),
        target_shard_id: target_shard.to_string(),
        source_node_id: source_node.to_string(),
        target_node_id: target_node.as_ref().map_or_else(String::new, ToString::to_string),
        slots: Some((*slots).into()),
        snapshot_index: point.index,
        snapshot_term: point.term,
        priority: (*priority).into(),
        progress: Some(common::Progress {
            direction: Direction::Out.into(),
            started_unix_ms: now_unix_ms(),
            ..common::Progress::default()
        }),
        ..TransferProgress::default()
    };
    transfer.enter(TransferPhase::Pending);
    transfer
}

impl<C: Connect, S: SnapshotSource> Task<C, S> {
    pub(super) fn new(
        sender: SnapshotSender<C>,
        snapshot: SnapshotToSend,
        source: S,
        tracker: Tracker<TransferProgress>,
        limiter: RateLimiter,
        cancel: CancellationToken,
    ) -> Self {
        let counters = Arc::new(Counters::default());
        let registered = Registered { transfers: sender.transfers.clone(), id: snapshot.transfer_id.clone() };
        Self {
            sender,
            snapshot,
            shared: Shared {
                source: Arc::new(source),
                checksums: Arc::new(Checksums::default()),
                limiter: Arc::new(limiter),
                counters: Arc::clone(&counters),
            },
            shown: Arc::new(Shown {
                tracker: std::sync::Mutex::new(Some(tracker)),
                meter: std::sync::Mutex::default(),
                counters,
                durable: AtomicU64::new(0),
                last_progress: std::sync::Mutex::new(Instant::now()),
            }),
            cancel,
            _registered: registered,
        }
    }

    /// Sends until it is installed or cannot be.
    pub(super) async fn run(self) -> Result<Installed, Error> {
        let cancel = self.cancel.clone();
        let mut result = tokio::select! {
            result = self.push() => result,
            () = cancel.cancelled() => Err(Reason::TransferCancelled.error("the transfer was cancelled at its sender")),
        };
        if cancel.is_cancelled() && result.is_err() {
            result = self.cancel_at_receiver().await;
        }
        let phase = match &result {
            Ok(_) => TransferPhase::Installed,
            Err(error) if error.is(Reason::TransferCancelled) => TransferPhase::Cancelled,
            Err(_) => TransferPhase::Failed,
        };
        if let Some(last) = self.shown.finish(phase, result.as_ref().err()) {
            self.sender.transfers.record(&last).await;
        }
        result
    }

    async fn push(&self) -> Result<Installed, Error> {
        let described = self.describe().await?;
        let mut backoff = self.sender.options.backoff.start();
        let mut claimed = loop {
            match self.claim().await {
                Ok(claimed) => break claimed,
                Err(error) => self.pause(&mut backoff, error).await?,
            }
        };
        loop {
            claimed.generation += 1;
            let before = self.shown.progress_mark();
            let result = self.control(&described, &claimed).await;
            if self.shown.progress_mark() > before {
                backoff.reset();
            }
            match result {
                Ok(Ended::Installed(installed)) => return Ok(installed),
                Ok(Ended::StartAnew) => {
                    claimed = Claimed {
                        attempt: claimed.attempt + 1,
                        session: rand::random(),
                        generation: 0,
                        discard_staged: true,
                    };
                }
                Err(error) => self.pause(&mut backoff, error).await?,
            }
        }
    }

    async fn describe(&self) -> Result<Described, Error> {
        let description = self.shared.source.describe(self.sender.options.digests).await?;
        let manifest = Manifest::new(description.files)?;
        if manifest.file_count() == 0 {
            return Err(Reason::InvalidField.field("source", "has no files; a snapshot has at least one"));
        }
        self.shared.checksums.start(&manifest);
        self.shown.show(|transfer| {
            let progress = transfer.progress.get_or_insert_default();
            progress.bytes_total = manifest.total_bytes();
            progress.items_total = Some(manifest.file_count());
        });
        Ok(Described { manifest, content_version: description.content_version })
    }

    /// Asks for the current attempt and claims the next.
    async fn claim(&self) -> Result<Claimed, Error> {
        let mut client = client(self.sender.connect.connect().await?);
        let request = GetTransferProgressRequest {
            transfer_id: self.snapshot.transfer_id.to_string(),
            direction: Direction::In.into(),
        };
        let current = match client.get_transfer_progress(request).await.map_err(Error::from) {
            Ok(answer) => answer.into_inner().transfer.map_or(0, |transfer| transfer.attempt),
            Err(error) if error.is(Reason::TransferNotFound) => 0,
            Err(error) => return Err(error),
        };
        let attempt = current.checked_add(1).ok_or_else(|| {
            Reason::InvalidField.field("attempt", "cannot be counted further; use a new transfer ID")
        })?;
        Ok(Claimed { attempt, session: rand::random(), generation: 0, discard_staged: false })
    }

    /// Shows the error and waits, or returns it where it is final.
    async fn pause(&self, backoff: &mut BackoffState, error: Error) -> Result<(), Error> {
        self.shown.show(|transfer| {
            transfer.enter(TransferPhase::Pending);
            transfer.lanes = 0;
            transfer.progress.get_or_insert_default().error = Some(error.clone().into());
        });
        let Some(pause) = backoff.next(&error) else { return Err(error) };
        if let Some(patience) = self.sender.options.give_up_after {
            let idle = self.shown.since_progress();
            if idle > patience {
                tracing::warn!(transfer_id = %self.snapshot.transfer_id, ?idle, "giving up");
                return Err(error);
            }
        }
        tracing::debug!(transfer_id = %self.snapshot.transfer_id, error = %error, ?pause, "will try again");
        tokio::time::sleep(pause).await;
        Ok(())
    }

    fn header(&self, described: &Described, claimed: &Claimed) -> Header {
        let SnapshotToSend {
            transfer_id,
            source_shard,
            target_shard,
            source_node,
            target_node,
            slots,
            point,
            fence,
            priority,
        } = &self.snapshot;
        Header {
            transfer_id: transfer_id.to_string(),
            source_shard_id: source_shard.to_string(),
            target_shard_id: target_shard.to_string(),
            source_node_id: source_node.to_string(),
            target_node_id: target_node.as_ref().map_or_else(String::new, ToString::to_string),
            slots: Some((*slots).into()),
            snapshot_index: point.index,
            snapshot_term: point.term,
            content_version: described.content_version.clone(),
            fence: fence.map(Into::into),
            attempt: claimed.attempt,
            session: bytes::Bytes::copy_from_slice(&claimed.session),
            generation: claimed.generation,
            priority: (*priority).into(),
            file_count: described.manifest.file_count(),
            name_bytes: described.manifest.name_bytes(),
            total_bytes: described.manifest.total_bytes(),
            lanes: self.sender.options.lanes.max(1),
            discard_staged: claimed.discard_staged && claimed.generation == 1,
            required_features: vec!["crc64nvme".to_owned()],
            supported_features: ["lanes", "reuse", "unknown-size", "crc64nvme"].map(str::to_owned).to_vec(),
        }
    }

    /// One control stream, with its lanes.
    async fn control(&self, described: &Described, claimed: &Claimed) -> Result<Ended, Error> {
        let mut client = client(self.sender.connect.connect().await?);
        let (outbound, frames) = Outbound::new();
        outbound.send(Frame::Header(self.header(described, claimed))).await?;
        let answers = client.transfer_split_snapshot(frames).await?.into_inner();
        let mut inbound = Inbound::new(answers);
        self.shown.show(|transfer| {
            transfer.connections += 1;
            transfer.attempt = claimed.attempt;
        });
        // The receiver may refuse while the manifest is still on its way, and its reason is what counts.
        let accepted = {
            let mut sending = std::pin::pin!(send_manifest(&outbound, &described.manifest));
            let mut sent = false;
            let mut accepted = std::pin::pin!(inbound.accepted());
            loop {
                tokio::select! {
                    accepted = &mut accepted => break accepted?,
                    result = &mut sending, if !sent => {
                        sent = true;
                        if result.is_err() {
                            break accepted.await?;
                        }
                    }
                }
            }
        };
        if accepted.already_installed {
            return self.await_installed(&mut inbound, &outbound).await;
        }
        if !self.shared.source.can_seek()
            && accepted.missing.iter().any(|gap| gap.length.is_none() && gap.offset > 0)
        {
            return Ok(Ended::StartAnew);
        }
        if !self.shared.source.can_seek() {
            // What was read before is not what will be read now.
            self.shared.checksums.start(&described.manifest);
        }
        self.shown.accepted(&accepted);
        self.set_rate(&accepted);

        let work = Arc::new(Work::new(&accepted.missing));
        let unread = self.shared.checksums.unread(&accepted.missing);
        let heard = Heard::new(accepted.credit_limit);
        let mut lanes = self.open_lanes(&accepted, claimed, &work);
        let sending = async {
            let mut pump = self.shared.pump(&outbound, &heard, accepted.max_chunk_bytes);
            let known = read_known(self.shared.source.as_ref(), &self.shared.checksums, unread);
            let pushed = async {
                let mut taken = Vec::new();
                loop {
                    pump.drain(&work, &mut taken).await?;
                    match lanes.join_next().await {
                        // A lane may have given work back before it ended.
                        Some(ended) => ended.map_err(|error| {
                            Reason::Internal.error("a lane ended early").caused_by(error)
                        })??,
                        None if work.is_empty() => return Ok::<_, Error>(()),
                        None => {}
                    }
                }
            };
            tokio::try_join!(pushed, known)?;
            let totals = loop {
                match self.shared.checksums.totals() {
                    Ok(totals) => break totals,
                    Err(unread) => {
                        read_known(self.shared.source.as_ref(), &self.shared.checksums, unread).await?;
                    }
                }
            };
            send_end(&outbound, &totals).await?;
            // The receiver works now; keep the stream, and let the other branches go on.
            std::future::pending::<Result<(), Error>>().await
        };
        let idle = inbound.idle();
        let installed = tokio::select! {
            // Its reason counts more than that of a stream that broke.
            biased;
            listened = inbound.listen(&heard, || self.shown.heard(&heard)) => listened?,
            result = sending => {
                let Err(error) = result else { return Err(broken("the sending ended early")) };
                // A closed stream has its reason in the answers.
                match tokio::time::timeout(Duration::from_secs(1), inbound.listen(&heard, || ())).await {
                    Ok(Err(reason)) if error.is(proto_common::error::CommonReason::Unavailable) => return Err(reason),
                    _ => return Err(error),
                }
            }
            () = heartbeats(&outbound, idle) => None,
            () = self.shown.keep_up_to_date(&heard) => None,
        };
        installed
            .map(Ended::Installed)
            .ok_or_else(|| broken("the receiver ended the stream before it installed"))
    }

    async fn await_installed(&self, inbound: &mut Inbound, outbound: &Outbound) -> Result<Ended, Error> {
        let heard = Heard::new(0);
        let idle = inbound.idle();
        let installed = tokio::select! {
            listened = inbound.listen(&heard, || self.shown.heard(&heard)) => listened?,
            () = heartbeats(outbound, idle) => None,
        };
        installed
            .map(Ended::Installed)
            .ok_or_else(|| broken("the receiver ended the stream before it installed"))
    }

    fn set_rate(&self, accepted: &Accepted) {
        let asked = accepted.max_bytes_per_second.and_then(std::num::NonZeroU64::new);
        let own = self.sender.options.bytes_per_second;
        self.shared.limiter.set_rate(match (own, asked) {
            (Some(own), Some(asked)) => Some(own.min(asked)),
            (own, asked) => own.or(asked),
        });
    }

    fn open_lanes(
        &self,
        accepted: &Accepted,
        claimed: &Claimed,
        work: &Arc<Work>,
    ) -> JoinSet<Result<(), Error>> {
        let mut lanes = JoinSet::new();
        let count = self.sender.options.lanes.max(1).min(accepted.max_lanes.max(1));
        self.shown.show(|transfer| transfer.lanes = count);
        for lane in 1..count {
            let lane = Lane {
                connect: Arc::clone(&self.sender.connect),
                shared: self.shared.clone(),
                work: Arc::clone(work),
                header: LaneHeader {
                    transfer_id: self.snapshot.transfer_id.to_string(),
                    attempt: claimed.attempt,
                    session: bytes::Bytes::copy_from_slice(&claimed.session),
                    lane,
                    // Unique and rising over all control streams of the attempt.
                    generation: claimed.generation << 32,
                },
                backoff: self.sender.options.backoff.start(),
            };
            lanes.spawn(lane.run());
        }
        lanes
    }

    /// Tells the receiver to discard what is staged.
    async fn cancel_at_receiver(&self) -> Result<Installed, Error> {
        let cancelled = |what: &str| Err(Reason::TransferCancelled.error(what.to_owned()));
        let asked = tokio::time::timeout(CANCEL_PATIENCE, async {
            let mut client = client(self.sender.connect.connect().await?);
            let request = CancelTransferRequest {
                transfer_id: self.snapshot.transfer_id.to_string(),
                direction: Direction::In.into(),
                reason: "cancelled at the sender".to_owned(),
            };
            client.cancel_transfer(request).await.map_err(Error::from)
        });
        match asked.await {
            Ok(Ok(_)) => cancelled("the transfer was cancelled at its sender"),
            Ok(Err(error)) if error.is(Reason::TransferNotFound) => {
                cancelled("the transfer was cancelled at its sender, before the receiver knew of it")
            }
            Ok(Err(error)) if error.is(Reason::TooLateToCancel) => Err(error),
            Ok(Err(error)) => {
                tracing::warn!(transfer_id = %self.snapshot.transfer_id, error = %error, "the receiver did not hear of the cancel");
                cancelled(
                    "the transfer was cancelled at its sender; the receiver could not be told and keeps what is staged until it expires",
                )
            }
            Err(_) => cancelled(
                "the transfer was cancelled at its sender; the receiver could not be told and keeps what is staged until it expires",
            ),
        }
    }
}

fn client<T: proto_common::connect::GrpcChannel>(channel: T) -> SplitSnapshotServiceClient<T> {
    SplitSnapshotServiceClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES)
}

/// One lane, through reconnections of its own.
struct Lane<C, S> {
    connect: Arc<C>,
    shared: Shared<S>,
    work: Arc<Work>,
    header: LaneHeader,
    backoff: BackoffState,
}

impl<C: Connect, S: SnapshotSource> Lane<C, S> {
    async fn run(mut self) -> Result<(), Error> {
        let mut taken = Vec::new();
        loop {
            self.header.generation += 1;
            let error = match self.stream(&mut taken).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if self.backoff.failures() >= LANE_RETRIES {
                return Err(error);
            }
            let Some(pause) = self.backoff.next(&error) else { return Err(error) };
            tokio::time::sleep(pause).await;
        }
    }

    /// One stream of the lane; `taken` are the units that its earlier ones took.
    async fn stream(&mut self, taken: &mut Vec<Unit>) -> Result<(), Error> {
        let mut client = client(self.connect.connect().await?);
        let (outbound, frames) = Outbound::new();
        outbound.send(Frame::LaneHeader(self.header.clone())).await?;
        let mut inbound = Inbound::new(client.transfer_split_snapshot(frames).await?.into_inner());
        let accepted = inbound.accepted().await?;
        self.work.give_back(intersect(taken, &accepted.missing));
        taken.clear();
        let heard = Heard::new(accepted.credit_limit);
        let idle = inbound.idle();
        let mut pump = self.shared.pump(&outbound, &heard, accepted.max_chunk_bytes);
        let ended = tokio::select! {
            biased;
            listened = inbound.listen(&heard, || ()) => {
                listened?;
                Err(broken("the receiver ended the lane"))
            }
            result = async {
                pump.drain(&self.work, taken).await?;
                heard.received(pump.sent).await;
                Ok(())
            } => result,
            () = heartbeats(&outbound, idle) => Ok(()),
        };
        ended?;
        // Half-close, and let the receiver end the stream.
        drop(outbound);
        inbound.listen(&heard, || ()).await.map(|_| ())
    }
}

impl<S: SnapshotSource> Shared<S> {
    fn pump<'a>(&'a self, outbound: &'a Outbound, heard: &'a Heard, chunk: u32) -> Pump<'a, S> {
        Pump {
            source: self.source.as_ref(),
            outbound,
            heard,
            checksums: &self.checksums,
            limiter: &self.limiter,
            chunk,
            counters: &self.counters,
            sent: 0,
        }
    }
}

impl Shown {
    fn tracker(&self) -> std::sync::MutexGuard<'_, Option<Tracker<TransferProgress>>> {
        self.tracker.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn show(&self, change: impl FnOnce(&mut TransferProgress)) {
        if let Some(tracker) = self.tracker().as_ref() {
            tracker.update(change);
        }
    }

    /// A number that rises with progress.
    fn progress_mark(&self) -> u64 {
        self.durable.load(Ordering::Relaxed)
    }

    fn since_progress(&self) -> Duration {
        self.last_progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner).elapsed()
    }

    fn accepted(&self, accepted: &Accepted) {
        self.durable_at_least(accepted.durable_bytes);
        self.show(|transfer| {
            transfer.enter(TransferPhase::Transferring);
            transfer.reused_bytes = accepted.reused_bytes;
            if let Some(receiver) = &accepted.receiver {
                transfer.target_node_id = proto_common::text::printable(&receiver.node_id, 128);
            }
            let progress = transfer.progress.get_or_insert_default();
            progress.bytes_done = accepted.durable_bytes;
            progress.error = None;
        });
    }

    fn durable_at_least(&self, durable: u64) {
        if durable > self.durable.fetch_max(durable, Ordering::Relaxed) {
            *self.last_progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Instant::now();
        }
    }

    fn heard(&self, heard: &Heard) {
        self.durable_at_least(heard.durable());
        let phase = heard.phase();
        if matches!(phase, TransferPhase::Verifying | TransferPhase::Installing) {
            // The receiver works; that is progress too.
            *self.last_progress.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Instant::now();
            self.show(|transfer| transfer.enter(phase));
        }
    }

    async fn keep_up_to_date(&self, heard: &Heard) {
        let mut every = tokio::time::interval(SHOW_EVERY);
        loop {
            every.tick().await;
            self.refresh(heard.durable());
        }
    }

    fn refresh(&self, durable: u64) {
        let now = Instant::now().into_std();
        let mut meter = self.meter.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        meter.record(now, durable);
        self.show(|transfer| {
            transfer.wire_bytes = self.counters.wire_bytes.load(Ordering::Relaxed);
            let progress = transfer.progress.get_or_insert_default();
            progress.throttled_ms = self.counters.throttled_us.load(Ordering::Relaxed) / 1000;
            if durable > progress.bytes_done {
                progress.bytes_done = durable;
                progress.last_activity_unix_ms = now_unix_ms();
            }
            progress.bytes_per_second = meter.rate(now);
            progress.eta_ms = progress.bytes_total.and_then(|total| {
                let eta = meter.eta(now, total.saturating_sub(progress.bytes_done))?;
                u64::try_from(eta.as_millis()).ok()
            });
        });
    }

    /// Moves it to the history; returns what is kept.
    fn finish(&self, phase: TransferPhase, error: Option<&Error>) -> Option<TransferProgress> {
        self.refresh(self.durable.load(Ordering::Relaxed));
        let tracker = self.tracker().take()?;
        let mut last = tracker.get();
        last.lanes = 0;
        let progress = last.progress.get_or_insert_default();
        progress.error = error.map(|error| error.clone().into());
        if phase == TransferPhase::Installed {
            progress.items_done = progress.items_total.unwrap_or(0);
            progress.bytes_done = progress.bytes_total.unwrap_or(progress.bytes_done);
            progress.bytes_total = Some(progress.bytes_done);
        }
        last.finish(phase);
        tracker.finish(|shown| *shown = last.clone());
        Some(last)
    }
}
