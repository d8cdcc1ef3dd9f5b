//! One incoming transfer that is not finished: who writes into it, what is there, what is shown of it.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use proto_common::clock::now_unix_ms;
use proto_common::error::Error;
use proto_common::fence::Fence;
use proto_common::meter::Meter;
use proto_common::registry::Tracker;
use tokio::sync::{Notify, OwnedMutexGuard, watch};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::admission::{Charge, Place};
use super::ledger::Ledger;
use super::reuse::Ticket;
use super::session::{Lanes, told_to_stop};
use crate::extent::ExtentRecord;
use crate::hook::Hold;
use crate::limits::Limits;
use crate::reason::Reason;
use crate::spec::TransferPlan;
use crate::store::{Claim, Staging};
use crate::v1::transfer_split_snapshot_response::Installed;
use crate::v1::{TransferPhase, TransferProgress};

/// The end of a transfer's completion: `None` while it goes on.
pub(super) type Outcome = Option<Result<Installed, Error>>;

/// Streams that wait for the end of one completion. A sender has one, and another while it has not noticed that the first is broken; so may a second sender that
/// does not know of the first. They have no place, and a completion can take long, so more of them end the oldest.
const WAITING: usize = 4;

/// Between streams of lanes, when each has had one. Each is told all that is missing, which is up to a few milliseconds of work for a header of 60 bytes.
const LANE_PAUSE: Duration = Duration::from_millis(100);

/// See the module.
pub(super) struct Incoming<A: Staging> {
    pub(super) plan: TransferPlan,
    pub(super) staging: Arc<A>,
    ledger: Mutex<Ledger>,
    state: Mutex<State>,
    /// One sync at a time, in the order of their records.
    sync: tokio::sync::Mutex<()>,
    sync_wanted: Notify,
    /// Counts up when something was written or synced, or when it failed.
    changes: watch::Sender<u64>,
    meter: Mutex<Meter>,
    wire_bytes: AtomicU64,
    /// When the next stream of a lane would be told what is missing, if all of them were that long apart.
    lane_due: tokio::sync::Mutex<Option<Instant>>,
    /// Files below this number were looked for among installed ones.
    looked_for: AtomicU32,
    /// Tells it from other transfers of its node that have files filled.
    pub(super) ticket: Arc<Ticket>,
    /// `None` once it has moved to the history.
    tracker: Mutex<Option<Tracker<TransferProgress>>>,
    /// What it keeps until it has ended: the hook's, and the memory of its manifest.
    hold: Mutex<Option<(Hold, Charge)>>,
    /// The end that was written to the history, so that a removal that failed can be repeated.
    ended: Mutex<Option<TransferProgress>>,
    /// It is removed to make room for an attempt that starts anew. It has no end of its own.
    makes_room: AtomicBool,
    /// At the last look, its source could not give the slots away any more.
    lost: AtomicBool,
    /// Cancelled where it is closed: what is only done for it need not go on.
    pub(super) closed: CancellationToken,
}

/// How far the transfer is, as far as concurrent calls are concerned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Takes data.
    Open,
    /// `End` came; being checked. Can be cancelled.
    Verifying,
    /// To be installed, whatever happens.
    Installing,
    /// Cancelled or expired; being removed.
    Closed,
}

struct State {
    stage: Stage,
    claim: Claim,
    generation: u64,
    /// Streams that the control stream was told it may use, itself included.
    max_lanes: u32,
    /// Their part of the receive budget, which the control stream has.
    lanes: Weak<Lanes>,
    /// Whether its sender knows of runs of missing files.
    file_runs: bool,
    streams: HashMap<u32, StreamEntry>,
    /// Highest generation seen of each lane of the attempt.
    lane_generations: HashMap<u32, u64>,
    /// Ends the last handshake of each lane.
    lane_handshakes: HashMap<u32, CancellationToken>,
    /// Ends a stream that waits for the outcome, the oldest first.
    waiting: VecDeque<CancellationToken>,
    outcome: watch::Sender<Outcome>,
    /// A write or sync failed: only durable bytes count at the next attach.
    failed: Option<Error>,
    next_stream: u64,
    /// The place that the transfer has while a control stream is connected.
    place: Option<Arc<Place>>,
    /// The last one, which the handshake of a stream that comes to take over may have, too.
    shared_place: Weak<Place>,
    /// Tells the last such handshake why it ends, and what it claims.
    takeover: Option<(Claim, watch::Sender<Option<Error>>)>,
    /// The fence that its sender gave last.
    fence: Option<Fence>,
}

/// The handshake of a control stream.
pub(super) struct Takeover {
    /// Its place, or that of the transfer that it comes to take over, which then stays until it has ended.
    pub(super) place: Arc<Place>,
    /// Why a newer stream that came for the same ends it; none where there is nothing to be taken over.
    replaced_by: Option<watch::Receiver<Option<Error>>>,
}

impl Takeover {
    /// Of a transfer that has no place yet.
    pub(super) fn of_nothing(place: Place) -> Self {
        Self { place: Arc::new(place), replaced_by: None }
    }

    /// Waits until a newer stream comes for the same, and returns what to tell this one.
    pub(super) async fn replaced(&self) -> Error {
        let mut told = self.replaced_by.clone();
        if let Some(told) = &mut told
            && let Some(error) = told_to_stop(told).await
        {
            return error;
        }
        std::future::pending().await
    }
}

/// A stream that waits for the outcome; until dropped.
pub(super) struct Waiting {
    pub(super) outcome: watch::Receiver<Outcome>,
    /// Newer streams wait for it, and this one is one too many.
    pub(super) replaced_by_newer: CancellationToken,
    _over: DropGuard,
}

struct StreamEntry {
    key: u64,
    stop: watch::Sender<Option<Error>>,
    /// Held by the stream's session for as long as it may write.
    quiet: Arc<tokio::sync::Mutex<()>>,
}

/// A stream's right to write; given up when dropped.
pub(super) struct StreamPermit<A: Staging> {
    incoming: Arc<Incoming<A>>,
    lane: u32,
    key: u64,
    pub(super) stop: watch::Receiver<Option<Error>>,
    _quiet: OwnedMutexGuard<()>,
}

impl<A: Staging> Incoming<A> {
    pub(super) fn new(
        staging: Arc<A>,
        hold: Hold,
        memory: Charge,
        tracker: Tracker<TransferProgress>,
        stage: Stage,
        limits: &Limits,
    ) -> Arc<Self> {
        let plan = staging.plan().clone();
        let ledger = Ledger::open(plan.manifest.clone(), staging.records(), limits);
        let claim = staging.claim();
        let incoming = Arc::new(Self {
            plan,
            staging,
            ledger: Mutex::new(ledger),
            state: Mutex::new(State {
                stage,
                claim,
                generation: 0,
                max_lanes: 1,
                lanes: Weak::new(),
                file_runs: false,
                streams: HashMap::new(),
                lane_generations: HashMap::new(),
                lane_handshakes: HashMap::new(),
                waiting: VecDeque::new(),
                outcome: watch::Sender::new(None),
                failed: None,
                next_stream: 0,
                place: None,
                shared_place: Weak::new(),
                takeover: None,
                fence: None,
            }),
            sync: tokio::sync::Mutex::new(()),
            sync_wanted: Notify::new(),
            changes: watch::Sender::new(0),
            meter: Mutex::new(Meter::default()),
            wire_bytes: AtomicU64::new(0),
            lane_due: tokio::sync::Mutex::new(None),
            looked_for: AtomicU32::new(0),
            ticket: Ticket::new(),
            tracker: Mutex::new(Some(tracker)),
            hold: Mutex::new(Some((hold, memory))),
            ended: Mutex::new(None),
            makes_room: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            closed: CancellationToken::new(),
        });
        incoming.show(|_| {});
        incoming
    }

    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stage(&self) -> Stage {
        self.state().stage
    }

    pub(super) fn claim(&self) -> Claim {
        self.state().claim
    }

    /// Streams that may be used, the control stream included.
    pub(super) fn max_lanes(&self) -> u32 {
        self.state().max_lanes
    }

    /// Told when something was written, synced, or failed.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    pub(super) fn outcome(&self) -> watch::Receiver<Outcome> {
        self.state().outcome.subscribe()
    }

    /// Has one more stream wait for the outcome. One of too many, which its sender must have given up, ends.
    pub(super) fn wait(&self) -> Waiting {
        let mut state = self.state();
        state.waiting.retain(|waiting| !waiting.is_cancelled());
        let oldest = if state.waiting.len() < WAITING { None } else { state.waiting.pop_front() };
        let newest = CancellationToken::new();
        state.waiting.push_back(newest.clone());
        let outcome = state.outcome.subscribe();
        drop(state);
        if let Some(oldest) = oldest {
            oldest.cancel();
        }
        Waiting { outcome, replaced_by_newer: newest.clone(), _over: newest.drop_guard() }
    }

    /// Whether a stream with this claim and generation may take over as control stream.
    pub(super) fn check_claim(&self, claim: Claim, generation: u64) -> Result<(), Error> {
        let state = self.state();
        if state.stage == Stage::Closed {
            return Err(cancelled());
        }
        let current = state.claim;
        let message = if claim.attempt < current.attempt {
            format!("attempt {} was superseded by attempt {}", claim.attempt, current.attempt)
        } else if claim.attempt == current.attempt && claim.session != current.session {
            format!("attempt {} was claimed by another sender", claim.attempt)
        } else if claim == current && generation <= state.generation {
            format!("generation {generation} was superseded by generation {}", state.generation)
        } else {
            return Ok(());
        };
        Err(superseded(current.attempt, &message))
    }

    /// Ends all streams with `error` and waits until none writes.
    pub(super) async fn stop_streams(&self, error: &Error) {
        loop {
            let streams: Vec<_> = {
                let state = self.state();
                state.streams.values().map(|entry| (entry.stop.clone(), Arc::clone(&entry.quiet))).collect()
            };
            if streams.is_empty() {
                return;
            }
            for (stop, _) in &streams {
                tell(stop, error);
            }
            // A lane may have come meanwhile, so look again.
            for (_, quiet) in streams {
                drop(quiet.lock().await);
            }
        }
    }

    /// Makes a control stream of `claim` the writer. The caller has checked the claim, holds the transfer's attach lock
    /// and has stopped all other streams. It gets `place` where it has none.
    pub(super) async fn attach(
        self: &Arc<Self>,
        claim: Claim,
        generation: u64,
        fence: Option<Fence>,
        place: Arc<Place>,
    ) -> Result<StreamPermit<A>, Error> {
        if self.claim() != claim {
            self.staging.set_claim(claim).await?;
        }
        let failed = {
            let mut state = self.state();
            state.claim = claim;
            state.generation = generation;
            state.fence = fence;
            // None until the sender has been told how many there are; all earlier ones have ended.
            state.max_lanes = 1;
            state.lane_generations.clear();
            state.lane_handshakes.clear();
            state.failed.take()
        };
        if failed.is_some() {
            self.ledger().roll_back();
        } else {
            self.flush().await?;
            self.ledger().forget_claims();
        }
        let mut state = self.state();
        if state.stage == Stage::Closed {
            return Err(cancelled());
        }
        let place = Arc::downgrade(state.place.get_or_insert(place));
        state.shared_place = place;
        self.register(&mut state, 0)
    }

    /// Allows `lanes`, as the sender is about to be told, until its control stream gives them up; `file_runs`: it knows of runs of missing files.
    pub(super) fn grant_lanes(&self, lanes: &Arc<Lanes>, file_runs: bool) {
        let mut state = self.state();
        state.max_lanes = lanes.count().saturating_add(1);
        (state.lanes, state.file_runs) = (Arc::downgrade(lanes), file_runs);
    }

    /// Its lanes, as long as it has a control stream.
    pub(super) fn lanes(&self) -> Option<Arc<Lanes>> {
        self.state().lanes.upgrade()
    }

    /// Whether lanes are told of runs of missing files.
    pub(super) fn lists_runs(&self) -> bool {
        self.state().file_runs
    }

    /// Waits until a stream of a lane may be told what is missing: at once for as many as there are lanes, then for one in [`LANE_PAUSE`], in the order in which they
    /// come. A lane has one stream that waits, so none waits longer than all of them together.
    pub(super) async fn turn_of_lane(&self) {
        let mut due = self.lane_due.lock().await;
        let at_once = LANE_PAUSE * self.max_lanes().saturating_sub(2);
        let now = Instant::now();
        let next = due.map_or(now, |due| due.max(now));
        tokio::time::sleep_until(next.checked_sub(at_once).unwrap_or(now)).await;
        *due = Some(next + LANE_PAUSE);
    }

    /// Lets a lane of the current attempt write, after the stream that it replaces is quiet. Only the last one to come waits for that: nobody reads what they
    /// send meanwhile.
    pub(super) async fn attach_lane(
        self: &Arc<Self>,
        claim: Claim,
        lane: u32,
        generation: u64,
    ) -> Result<StreamPermit<A>, Error> {
        let mut first = true;
        let replaced_by_newer = CancellationToken::new();
        loop {
            let (stop, quiet) = {
                let mut state = self.state();
                let current = state.claim;
                if claim.attempt < current.attempt || (claim.attempt == current.attempt && claim != current) {
                    return Err(superseded(current.attempt, "the lane's attempt was superseded"));
                }
                if claim != current || state.stage != Stage::Open || !state.streams.contains_key(&0) {
                    return Err(Reason::NoSuchAttempt.error(format!(
                        "attempt {} has no control stream that is transferring",
                        claim.attempt
                    )));
                }
                if lane == 0 || lane >= state.max_lanes {
                    return Err(Reason::InvalidField.field(
                        "lane_header.lane",
                        format!(
                            "is {lane}; Accepted.max_lanes is {0}, so lanes are 1 to {0} exclusive",
                            state.max_lanes
                        ),
                    ));
                }
                let seen = state.lane_generations.entry(lane).or_insert(0);
                // While it waited, a later stream of the lane may have come.
                if generation < *seen || (first && generation == *seen) {
                    return Err(superseded(
                        current.attempt,
                        &format!("generation {generation} of lane {lane} was superseded by {seen}"),
                    ));
                }
                *seen = generation;
                if first && let Some(earlier) = state.lane_handshakes.insert(lane, replaced_by_newer.clone())
                {
                    earlier.cancel();
                }
                match state.streams.get(&lane) {
                    None => return self.register(&mut state, lane),
                    Some(entry) => (entry.stop.clone(), Arc::clone(&entry.quiet)),
                }
            };
            first = false;
            tell(&stop, &replaced());
            tokio::select! {
                biased;
                () = replaced_by_newer.cancelled() => {
                    let message = format!("generation {generation} of lane {lane} was superseded by a newer one");
                    return Err(superseded(claim.attempt, &message));
                }
                _ = quiet.lock() => {}
            }
        }
    }

    fn register(self: &Arc<Self>, state: &mut State, lane: u32) -> Result<StreamPermit<A>, Error> {
        let quiet = Arc::new(tokio::sync::Mutex::new(()));
        let held = Arc::clone(&quiet)
            .try_lock_owned()
            .map_err(|_| Reason::Internal.error("a new stream is not quiet"))?;
        let (stop, stopped) = watch::channel(None);
        let key = state.next_stream;
        state.next_stream += 1;
        state.streams.insert(lane, StreamEntry { key, stop, quiet });
        Ok(StreamPermit { incoming: Arc::clone(self), lane, key, stop: stopped, _quiet: held })
    }

    /// Whether a control stream is connected.
    pub(super) fn has_control(&self) -> bool {
        self.state().streams.contains_key(&0)
    }

    /// Whether any stream may write.
    pub(super) fn has_streams(&self) -> bool {
        !self.state().streams.is_empty()
    }

    /// Lets the handshake of a stream that may take over begin in the place that the transfer has; `None` if it has none. There is one such handshake at a
    /// time, or any number of streams could be in theirs: an earlier one, which its sender must have given up, ends.
    pub(super) fn take_over(&self, claim: Claim) -> Option<Takeover> {
        let mut state = self.state();
        let place = state.shared_place.upgrade()?;
        let (newer, replaced_by) = watch::channel(None);
        let earlier = state.takeover.replace((claim, newer));
        drop(state);
        if let Some((earlier, ends)) = earlier {
            let why = if claim.attempt > earlier.attempt {
                let (old, new) = (earlier.attempt, claim.attempt);
                superseded(new, &format!("attempt {old} was superseded by attempt {new}"))
            } else {
                replaced()
            };
            // It may have ended by itself.
            let _ = ends.send(Some(why));
        }
        Some(Takeover { place, replaced_by: Some(replaced_by) })
    }

    /// Gives the place back if no control stream needs it.
    pub(super) fn release_place(&self) {
        let place = {
            let mut state = self.state();
            if state.streams.contains_key(&0) { None } else { state.place.take() }
        };
        drop(place);
    }

    /// The fence that its sender gave last.
    pub(super) fn fence(&self) -> Option<Fence> {
        self.state().fence
    }

    /// Takes `End`: from here on the completion owns the transfer. False when it is not open any more.
    pub(super) fn begin_verifying(&self) -> bool {
        let mut state = self.state();
        let open = state.stage == Stage::Open;
        if open {
            state.stage = Stage::Verifying;
            state.outcome.send_replace(None);
        }
        open
    }

    /// The point that cancelling and installing race for. False when it was cancelled.
    pub(super) fn begin_installing(&self) -> bool {
        let mut state = self.state();
        let won = matches!(state.stage, Stage::Verifying | Stage::Installing);
        if won {
            state.stage = Stage::Installing;
        }
        won
    }

    /// Takes [`begin_installing`](Self::begin_installing) back: it is not known to be sealed. After a crash it may be.
    pub(super) fn put_off_installing(&self) {
        let mut state = self.state();
        if state.stage == Stage::Installing {
            state.stage = Stage::Verifying;
        }
    }

    /// Closes the transfer to all but its removal; returns what it was before.
    ///
    /// # Errors
    ///
    /// `TOO_LATE_TO_CANCEL` once it is to be installed.
    pub(super) fn close(&self) -> Result<Stage, Error> {
        let mut state = self.state();
        if state.stage == Stage::Installing {
            return Err(Reason::TooLateToCancel
                .error("the transfer is complete and being installed; it can no longer be cancelled")
                .metadata("phase", TransferPhase::Installing.as_str_name()));
        }
        self.closed.cancel();
        Ok(std::mem::replace(&mut state.stage, Stage::Closed))
    }

    /// The install was refused: nothing but the removal is left.
    pub(super) fn close_for_good(&self) {
        self.closed.cancel();
        self.state().stage = Stage::Closed;
    }

    /// Closes it for an attempt that starts anew.
    ///
    /// # Errors
    ///
    /// As [`close`](Self::close).
    pub(super) fn close_to_make_room(&self) -> Result<(), Error> {
        self.close()?;
        self.makes_room.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Whether it was closed so. With the lock of its slot, it means that the removal failed.
    pub(super) fn makes_room(&self) -> bool {
        self.makes_room.load(Ordering::Relaxed)
    }

    /// Takes note of whether its source has lost the slots, and says whether it had at the last look.
    pub(super) fn lost(&self, lost: bool) -> bool {
        self.lost.swap(lost, Ordering::Relaxed)
    }

    /// The end that was written to the history.
    pub(super) fn ended(&self) -> MutexGuard<'_, Option<TransferProgress>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The completion failed before the transfer was sealed: it takes data again, unless it was cancelled, and streams that wait are told.
    pub(super) fn complete_unsealed(&self, error: Error) {
        let mut state = self.state();
        if state.stage != Stage::Closed {
            state.stage = Stage::Open;
        }
        state.outcome.send_replace(Some(Err(error)));
    }

    /// Ends the completion: streams that wait for it are told.
    pub(super) fn complete(&self, result: Result<Installed, Error>) {
        self.state().outcome.send_replace(Some(result));
    }

    /// Writing or syncing failed: every stream ends, and what is not durable has to be sent again.
    pub(super) fn fail(&self, error: &Error) {
        let mut state = self.state();
        state.failed.get_or_insert_with(|| error.clone());
        for entry in state.streams.values() {
            tell(&entry.stop, error);
        }
        drop(state);
        self.changed();
    }

    fn check_failed(&self) -> Result<(), Error> {
        self.state().failed.clone().map_or(Ok(()), Err)
    }

    pub(super) fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Bytes that streams have brought.
    pub(super) fn wire_bytes(&self) -> u64 {
        self.wire_bytes.load(Ordering::Relaxed)
    }

    /// Whether `file` is still to be looked for among installed ones. In this process each is once, in order: a stream that comes
    /// back does not have the disk read again.
    pub(super) fn may_look_for(&self, file: u32) -> bool {
        file >= self.looked_for.load(Ordering::Relaxed)
    }

    /// Files up to `file` are looked for.
    pub(super) fn looks_for(&self, file: u32) {
        self.looked_for.fetch_max(file.saturating_add(1), Ordering::Relaxed);
    }

    /// Whether a sender may still be reading its snapshot for the totals, `since` the stream began: nothing else is missing.
    pub(super) fn is_reading(&self, since: Duration) -> bool {
        /// The slowest disk that a sender is thought to have, in bytes per second.
        const READ_RATE: u64 = 16 << 20;
        let total = self.plan.manifest.total_bytes();
        total.is_some_and(|total| since < Duration::from_secs(total / READ_RATE)) && self.ledger().has_all()
    }

    /// Counts bytes that a stream brought and the store took.
    pub(super) fn written(&self, records: &[ExtentRecord], limits: &Limits) {
        let bytes: u64 = records.iter().map(|record| record.extent.len).sum();
        self.wire_bytes.fetch_add(bytes, Ordering::Relaxed);
        let unsynced = {
            let mut ledger = self.ledger();
            for record in records {
                ledger.written(*record);
            }
            ledger.unsynced_weight()
        };
        if unsynced >= limits.unsynced_bytes / 4 {
            self.sync_wanted.notify_one();
        }
        self.changed();
    }

    /// Waits until chunks that [weigh](super::ledger::weight) `more` may be written before the next sync. Syncs by itself where there is no room, so that a
    /// lane whose control stream has ended, and its syncer with it, finishes what it has.
    pub(super) async fn room_for(&self, more: u64, limits: &Limits) -> Result<(), Error> {
        loop {
            self.check_failed()?;
            let unsynced = self.ledger().unsynced_weight();
            if unsynced == 0 || unsynced.saturating_add(more) <= limits.unsynced_bytes {
                return Ok(());
            }
            self.flush().await?;
        }
    }

    /// Makes everything durable that was written before the call.
    pub(super) async fn flush(&self) -> Result<(), Error> {
        let _one = self.sync.lock().await;
        self.check_failed()?;
        let records = self.ledger().take_pending();
        if records.is_empty() {
            return Ok(());
        }
        match self.staging.sync(records.clone()).await {
            Ok(()) => {
                self.ledger().synced(&records);
                self.changed();
                Ok(())
            }
            Err(error) => {
                tracing::warn!(transfer_id = %self.plan.spec.transfer_id, error = &error as &dyn std::error::Error, "sync failed");
                let error = Error::from(error);
                self.fail(&error);
                Err(error)
            }
        }
    }

    /// Syncs when much or long enough was written, until `over`.
    pub(super) async fn sync_until(&self, over: CancellationToken, limits: &Limits) {
        while !over.is_cancelled() {
            tokio::select! {
                () = over.cancelled() => {}
                () = self.sync_wanted.notified() => {}
                () = tokio::time::sleep(limits.unsynced_time) => {}
            }
            // A failure has ended the streams, which end this.
            let _ = self.flush().await;
            self.show(|_| {});
        }
    }

    /// Changes what is shown, and brings its counters up to date.
    pub(super) fn show(&self, change: impl FnOnce(&mut TransferProgress)) {
        let (durable, reused, files) = {
            let ledger = self.ledger();
            (ledger.durable_bytes(), ledger.reused_bytes(), ledger.complete_files())
        };
        let (attempt, lanes) = {
            let state = self.state();
            (state.claim.attempt, state.streams.len())
        };
        let total = self.plan.manifest.total_bytes();
        let now = Instant::now().into_std();
        let (rate, eta) = {
            let mut meter = self.meter.lock().unwrap_or_else(PoisonError::into_inner);
            meter.record(now, durable);
            let eta = total.and_then(|total| meter.eta(now, total.saturating_sub(durable)));
            (meter.rate(now), eta)
        };
        let tracker = self.tracker();
        let Some(tracker) = tracker.as_ref() else { return };
        tracker.update(|transfer| {
            transfer.attempt = attempt;
            transfer.lanes = u32::try_from(lanes).unwrap_or(u32::MAX);
            transfer.wire_bytes = self.wire_bytes.load(Ordering::Relaxed);
            transfer.reused_bytes = reused;
            let progress = transfer.progress.get_or_insert_default();
            if progress.bytes_done != durable {
                progress.last_activity_unix_ms = now_unix_ms();
            }
            progress.bytes_done = durable;
            progress.bytes_total = total;
            progress.items_done = files;
            progress.items_total = Some(self.plan.manifest.file_count());
            progress.bytes_per_second = rate;
            progress.eta_ms = eta.map(|eta| u64::try_from(eta.as_millis()).unwrap_or(u64::MAX));
            change(transfer);
            if transfer.phase() != TransferPhase::Transferring {
                // Nothing flows; what flowed is no forecast.
                let progress = transfer.progress.get_or_insert_default();
                (progress.bytes_per_second, progress.eta_ms) = (None, None);
            }
        });
    }

    fn tracker(&self) -> MutexGuard<'_, Option<Tracker<TransferProgress>>> {
        self.tracker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold(&self) -> MutexGuard<'_, Option<(Hold, Charge)>> {
        self.hold.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The charge for the memory of its manifest, for one who uses that, too; `None` once it has ended.
    pub(super) fn memory(&self) -> Option<Charge> {
        self.hold().as_ref().map(|(_, memory)| Charge::clone(memory))
    }

    /// What is shown now; `None` once it has moved to the history.
    pub(super) fn shown(&self) -> Option<TransferProgress> {
        self.tracker().as_ref().map(Tracker::get)
    }

    /// When it is collected, if nobody sends.
    pub(super) fn expires_unix_ms(&self) -> Option<u64> {
        self.shown().and_then(|shown| shown.expires_unix_ms)
    }

    /// Moves it to the history, as `transfer`.
    pub(super) fn finish(&self, transfer: TransferProgress) {
        let hold = self.hold().take();
        drop(hold);
        let tracker = self.tracker().take();
        if let Some(tracker) = tracker {
            tracker.finish(|shown| *shown = transfer);
        }
    }
}

impl<A: Staging> StreamPermit<A> {
    pub(super) fn incoming(&self) -> &Arc<Incoming<A>> {
        &self.incoming
    }

    /// Why this stream has to end, if it has to.
    pub(super) fn stopped(&self) -> Option<Error> {
        self.stop.borrow().clone()
    }
}

impl<A: Staging> Drop for StreamPermit<A> {
    fn drop(&mut self) {
        let mut state = self.incoming.state();
        if state.streams.get(&self.lane).is_some_and(|entry| entry.key == self.key) {
            state.streams.remove(&self.lane);
            if self.lane == 0 {
                let error = Reason::StreamEndedEarly
                    .error("the control stream of this lane has ended; what arrived is kept");
                for entry in state.streams.values() {
                    tell(&entry.stop, &error);
                }
            }
        }
    }
}

/// The same sender has opened a newer stream.
pub(super) fn replaced() -> Error {
    Reason::StreamEndedEarly.error("a newer stream of the same session has replaced this one")
}

/// Tells a stream why it has to end; the first reason stays.
fn tell(stop: &watch::Sender<Option<Error>>, error: &Error) {
    stop.send_if_modified(|reason| {
        let first = reason.is_none();
        reason.get_or_insert_with(|| error.clone());
        first
    });
}

/// The transfer was cancelled.
pub(super) fn cancelled() -> Error {
    Reason::TransferCancelled.error("the transfer was cancelled; send the snapshot under a new ID")
}

fn superseded(attempt: u64, message: &str) -> Error {
    Reason::Superseded
        .error(format!("{message}; this sender must stop: another one is sending under this ID"))
        .metadata("attempt", attempt.to_string())
}
