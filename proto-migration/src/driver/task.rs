//! One migration at the source: its state, and what is persisted when.
//!
//! A task owns its record. Every transition is saved before it is acted on, except the way into and out of FREEZING: a source that
//! restarts holds no writes of a freeze.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use proto_common::clock::{millis, now_unix_ms};
use proto_common::error::{CommonReason, Error};
use proto_common::guard::RangeHold;
use proto_common::ids::MigrationId;
use proto_common::meter::Meter;
use proto_common::rate::RateLimiter;
use proto_common::registry::Tracker;
use proto_common::retry::{Backoff, BackoffState};
use proto_common::text::printable;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Inner;
use super::calls::{Command, given_away, taken_back};
use super::dial::Dial;
use crate::Reason;
use crate::failpoint::reached;
use crate::hold::{Hold, HoldMode};
use crate::journal::SourceRecord;
use crate::limits::TaskLimits;
use crate::progress::{ERROR_TEXT_BYTES, REASON_BYTES, kept};
use crate::source::{Handover, LogState, MigrationSource};
use crate::spec::MigrationSpec;
use crate::v1::transfer_migration_data_response::Committed;
use crate::v1::{
    FreezeAttempt, FreezeOutcome, MigrationDecision, MigrationGate, MigrationLag, MigrationProgress,
    MigrationState,
};

/// Why something stopped half way.
#[derive(Debug)]
pub(super) enum Halt {
    /// The state is another one now: look again.
    Changed,
    /// The node is shutting down.
    Stopping,
    Failed(Error),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

pub(super) struct Task<S: MigrationSource, D: Dial> {
    pub(super) inner: Arc<Inner<S, D>>,
    pub(super) id: MigrationId,
    pub(super) spec: MigrationSpec,
    pub(super) limits: TaskLimits,
    pub(super) record: SourceRecord,
    pub(super) tracker: Tracker<MigrationProgress>,
    pub(super) commands: mpsc::Receiver<Command>,
    /// Came while writes were held for the target to be prepared, and is looked at when the freeze has ended.
    pub(super) later: Vec<Command>,
    /// What clients wait for, outside of a freeze.
    pub(super) hold: Option<Hold>,
    /// Keeps others off the slots until the migration has ended.
    pub(super) range: Option<RangeHold>,
    pub(super) rate: RateLimiter,
    /// What the target of the last stream asked for, in bytes per second.
    pub(super) wished_rate: Option<NonZeroU64>,
    /// What earlier processes slowed writers by, in milliseconds.
    pub(super) slowed_before: u64,
    pub(super) meter: Meter,
    pub(super) backoff: BackoffState,
    /// No freeze before this.
    pub(super) freeze_after: Instant,
    pub(super) freeze_backoff: BackoffState,
    /// When this process began to dial, or found the target there and full for the last time: for `accept_timeout_ms`.
    pub(super) began: Instant,
    /// The target's last word, in PENDING, was that it has no free place.
    pub(super) no_place: bool,
}

/// Longest pause between two questions for the outcome, while reads and writes are held for it.
const COMMITTING_PAUSE: Duration = Duration::from_millis(500);

/// Between freezes that failed: long enough for whatever made them fail to pass, short enough for a deadline of seconds.
pub(super) fn freeze_backoff() -> BackoffState {
    Backoff {
        initial: Duration::from_millis(100),
        max: Duration::from_secs(5),
        jitter: 0.3,
        ..Backoff::default()
    }
    .start()
}

/// Whether another node than the target answered at its address.
pub(super) fn another_node(error: &Error) -> bool {
    error.is(Reason::WrongNode) || error.is(Reason::WrongCluster)
}

impl<S: MigrationSource, D: Dial> Task<S, D> {
    /// Runs until the migration has ended and the target knows, or the node stops.
    pub(super) async fn run(mut self) {
        // Begun by an earlier process. Others may move the slots once that is saved, whether the target is there or not.
        if taken_back(&self.record) && self.claim_back().await.is_err() {
            return;
        }
        loop {
            let ended = match self.state() {
                _ if given_away(self.shown()) => self.give_away().await.and(Err(Halt::Changed)),
                MigrationState::Committing | MigrationState::Cancelling => self.resolve().await,
                MigrationState::Completed | MigrationState::Cancelled | MigrationState::Failed => {
                    if self.record.untold { self.resolve().await } else { Ok(()) }
                }
                MigrationState::NeedsOperator => self.wait_for_operator().await,
                _ => self.transfer().await,
            };
            // Whatever comes next, it comes on another stream.
            self.change().connected = false;
            match ended {
                Ok(()) => return self.finish().await,
                Err(Halt::Changed) => {}
                Err(Halt::Stopping) => return,
                Err(Halt::Failed(error)) => {
                    if let Some(wait) = self.judge(error).await
                        && matches!(self.pause(wait).await, Err(Halt::Stopping))
                    {
                        return;
                    }
                }
            }
            if self.inner.stopping.is_cancelled() {
                return;
            }
        }
    }

    pub(super) fn state(&self) -> MigrationState {
        self.shown().state()
    }

    /// What is known of the migration.
    pub(super) fn shown(&self) -> &MigrationProgress {
        // A record without a progress is never made, and not believed when it is read.
        static EMPTY: std::sync::OnceLock<MigrationProgress> = std::sync::OnceLock::new();
        self.record.progress.as_ref().unwrap_or_else(|| EMPTY.get_or_init(MigrationProgress::default))
    }

    pub(super) fn change(&mut self) -> &mut MigrationProgress {
        self.record.progress.get_or_insert_default()
    }

    /// Shows the record to whoever looks.
    pub(super) fn show(&self) {
        let shown = self.shown().clone();
        self.tracker.update(|progress| *progress = shown);
    }

    /// Saves the record; tries until it is saved, or the node stops.
    pub(super) async fn save(&mut self) -> Result<(), Halt> {
        let mut backoff = Backoff::default().start();
        loop {
            match self.inner.journal.save(&self.id, self.spec.slots, &self.record).await {
                Ok(()) => {
                    self.show();
                    return Ok(());
                }
                Err(error) => {
                    tracing::error!(migration_id = %self.id, error = %error, "the journal cannot be written");
                    self.change().incident(&error);
                    if self.state().is_final() {
                        // Nobody is told of an end that a crash would take back.
                        self.tracker.update(|shown| shown.incident(&error));
                    } else {
                        self.show();
                    }
                    let wait = backoff.next(&error).unwrap_or(Duration::from_secs(10));
                    tokio::select! {
                        () = self.inner.stopping.cancelled() => return Err(Halt::Stopping),
                        () = tokio::time::sleep(wait) => {}
                    }
                }
            }
        }
    }

    /// Enters a state and the gate that belongs to it, and saves.
    pub(super) async fn enter(&mut self, state: MigrationState, gate: MigrationGate) -> Result<(), Halt> {
        if self.state() != state {
            tracing::info!(migration_id = %self.id, from = self.state().short_name(), to = state.short_name(), "migration");
        }
        let progress = self.change();
        progress.enter(state);
        progress.set_gate(gate);
        self.save().await?;
        if state.is_final() {
            // Others may move the slots, whether the target has been told or not.
            self.range = None;
        }
        Ok(())
    }

    /// Does `work` while callers are answered. What they ask may make it pointless: then it is dropped.
    pub(super) async fn meanwhile<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Halt> {
        let mut work = std::pin::pin!(work);
        let stopping = self.inner.stopping.clone();
        loop {
            tokio::select! {
                biased;
                () = stopping.cancelled() => return Err(Halt::Stopping),
                command = self.commands.recv() => match command {
                    Some(command) => self.command(command).await?,
                    None => return Err(Halt::Stopping),
                },
                done = &mut work => return Ok(done),
            }
        }
    }

    async fn pause(&mut self, wait: Duration) -> Result<(), Halt> {
        self.meanwhile(tokio::time::sleep(wait)).await
    }

    async fn wait_for_operator(&mut self) -> Result<(), Halt> {
        self.meanwhile(std::future::pending()).await
    }

    /// The epoch that the commit gives the slots.
    pub(super) fn new_slot_epoch(&self) -> u64 {
        self.shown().slot_epoch.saturating_add(1)
    }

    /// The target owns the slots: gives them up here, lets clients through to be redirected, and records it.
    pub(super) async fn hand_over(&mut self, committed: &Committed) -> Result<(), Halt> {
        if self.hold.is_none() {
            // An operator decided at the target: until now this node served.
            let held = self.until(|task| {
                let (source, slots) = (Arc::clone(&task.inner.source), task.spec.slots);
                async move { source.hold(slots, HoldMode::All).await }
            });
            self.hold = Some(held.await?);
        }
        let handover = Handover {
            id: self.id.clone(),
            slots: self.spec.slots,
            owner: self.spec.target_node.clone(),
            address: self.shown().target_address.clone(),
            slot_epoch: committed.slot_epoch.max(self.new_slot_epoch()),
        };
        // After a crash, a record that is COMMITTING asks the target again before it serves anybody. An operator's word is not saved yet.
        let found_again =
            self.state() == MigrationState::Committing && self.shown().resolved_reason.is_none();
        if found_again && self.inner.source.redirect(&handover) {
            self.open_gate();
            self.end_freeze(FreezeOutcome::Committed, None);
            self.change().set_gate(MigrationGate::Moved);
            self.show();
        }
        reached("give_up.before", self.state());
        self.until(|task| {
            let (source, handover) = (Arc::clone(&task.inner.source), handover.clone());
            async move { source.give_up(&handover).await }
        })
        .await?;
        reached("give_up.after", self.state());
        self.open_gate();
        self.end_freeze(FreezeOutcome::Committed, None);
        let progress = self.change();
        progress.set_decision(MigrationDecision::Committed);
        progress.slot_epoch = handover.slot_epoch;
        let all_is_there = progress.resolved_reason.is_none();
        let task = progress.task();
        task.error = None;
        if all_is_there {
            // An operator may give away what was copied in part.
            (task.items_total, task.bytes_total) = (Some(task.items_done), Some(task.bytes_done));
            task.total_is_estimate = false;
        }
        self.nothing_is_left();
        self.record.untold = true;
        self.enter(MigrationState::Completed, MigrationGate::Moved).await
    }

    /// Does what the store must do, until it has.
    async fn until<T, F>(&mut self, mut work: impl FnMut(&Self) -> F) -> Result<T, Halt>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let mut backoff = Backoff { max: Duration::from_secs(2), ..Backoff::default() }.start();
        loop {
            match work(self).await {
                Ok(value) => return Ok(value),
                Err(error) => {
                    tracing::error!(migration_id = %self.id, error = %error, "the store failed; trying again");
                    self.change().incident(&error);
                    self.show();
                    let wait = backoff.next(&error).unwrap_or(Duration::from_secs(2));
                    tokio::select! {
                        () = self.inner.stopping.cancelled() => return Err(Halt::Stopping),
                        () = tokio::time::sleep(wait) => {}
                    }
                }
            }
        }
    }

    /// The change log ends, and the slots stay here.
    pub(super) async fn keep(&mut self, claim: Option<u64>) -> Result<(), Halt> {
        self.inner.source.slow_writers(&self.id, Duration::ZERO);
        self.until(|task| {
            let (source, id, slots) = (Arc::clone(&task.inner.source), task.id.clone(), task.spec.slots);
            async move { source.keep(&id, slots, claim).await }
        })
        .await?;
        self.nothing_is_left();
        Ok(())
    }

    /// The decision is DISCARDED, or nothing was ever begun at the target: ends as cancelled, or as failed where an error led here. `reason`
    /// is the target's, if that is where it was decided.
    pub(super) async fn discarded(&mut self, reason: &str) -> Result<(), Halt> {
        self.keep(None).await?;
        let failed = self.record.failed;
        let progress = self.change();
        if progress.cancelled_at_node_id.is_empty() && !failed {
            // The cancel came from the target's side.
            progress.cancelled_at_node_id =
                progress.peer.as_ref().map(|peer| peer.node_id.clone()).unwrap_or_default();
            progress.cancel_reason = printable(reason, REASON_BYTES);
        }
        progress.set_decision(MigrationDecision::Discarded);
        self.end_freeze(FreezeOutcome::Cancelled, None);
        let state = if failed { MigrationState::Failed } else { MigrationState::Cancelled };
        if !failed {
            let reason = self.shown().cancel_reason.clone();
            let error = Reason::MigrationCancelled.error(if reason.is_empty() {
                "the migration was cancelled".to_owned()
            } else {
                format!("the migration was cancelled: {reason}")
            });
            self.change().task().error = Some(kept(&error));
        }
        self.enter(state, MigrationGate::Open).await?;
        self.open_gate();
        Ok(())
    }

    /// An error that no retry helps: what is staged is discarded, and the migration ends as FAILED.
    pub(super) async fn fail(&mut self, error: &Error) -> Result<(), Halt> {
        tracing::warn!(migration_id = %self.id, reason = error.reason(), error = %error, "migration failed");
        self.change().task().error = Some(kept(error));
        self.record.failed = true;
        self.end_freeze(FreezeOutcome::Refused, Some(error));
        if self.shown().peer.is_some() {
            self.enter(MigrationState::Cancelling, MigrationGate::Open).await?;
            self.open_gate();
            return Ok(());
        }
        self.record.untold = self.may_be_known();
        self.keep(None).await?;
        self.enter(MigrationState::Failed, MigrationGate::Open).await?;
        self.open_gate();
        Ok(())
    }

    /// Of a migration that was never accepted: a target may have heard of it all the same, and keep the slots from others.
    pub(super) fn may_be_known(&self) -> bool {
        self.shown().attempt > 0
    }

    /// Nobody but an operator can say what happened. The gate stays as it is.
    pub(super) async fn needs_operator(&mut self, error: &Error) -> Result<(), Halt> {
        tracing::error!(migration_id = %self.id, reason = error.reason(), error = %error, "migration needs an operator");
        self.record.stopped_in = self.state().into();
        let gate = self.shown().gate();
        if gate == MigrationGate::Open {
            // However long the operator takes, the log of what clients write is of no use to any decision.
            self.keep(None).await?;
        }
        self.change().task().error = Some(kept(error));
        self.enter(MigrationState::NeedsOperator, gate).await
    }

    /// Whether this node owns the slots as when the migration began.
    pub(super) fn check_owner(&self) -> Result<(), Error> {
        self.inner.source.check_owner(self.spec.slots, self.shown().slot_epoch)
    }

    /// Begins the next copy, from nothing, after a wait.
    pub(super) async fn copy_again(&mut self, why: &str) -> Result<(), Halt> {
        // A copy of slots that another node owns is a copy of nothing, and takes the place of what the target has.
        if let Err(error) = self.check_owner() {
            return self.fail(&error).await;
        }
        let Some(copy) = self.shown().copy.checked_add(1) else {
            let text = "the target told of the highest copy that there is, behind which none can begin";
            return self.fail(&Reason::StaleCopy.error(text).metadata("copy", u64::MAX.to_string())).await;
        };
        tracing::warn!(migration_id = %self.id, why, "copying starts again");
        let base = self
            .until(|task| {
                let (source, id, slots) = (Arc::clone(&task.inner.source), task.id.clone(), task.spec.slots);
                async move { source.open_log(&id, slots, None).await }
            })
            .await?;
        self.record.base_seq = base;
        let progress = self.change();
        progress.copy = copy;
        progress.copy_reason = printable(why, ERROR_TEXT_BYTES);
        progress.durable_seq = base;
        let task = progress.task();
        (task.bytes_done, task.items_done) = (0, 0);
        let state = if self.state() == MigrationState::Pending {
            MigrationState::Pending
        } else {
            MigrationState::Copying
        };
        self.enter(state, MigrationGate::Open).await?;
        // A target that loses it again and again is not asked as fast as it answers.
        let wait = self.wait_after(&Error::new(CommonReason::Unavailable, why));
        self.pause(wait).await
    }

    /// What follows from an error: how long to wait before the next stream, `None` to look at the state at once.
    async fn judge(&mut self, error: Error) -> Option<Duration> {
        let state = self.state();
        self.change().incident(&error);
        tracing::debug!(migration_id = %self.id, state = state.short_name(), reason = error.reason(), error = %error, "a stream ended");
        self.without_stream().await;
        if self.check_deadline().await.is_err() {
            return None;
        }
        let known = self.shown().peer.is_some();
        let reason = Reason::parse(error.reason());
        let seen = |number| error.get(number).and_then(|seen| seen.parse().ok()).unwrap_or(0_u64);
        if reason == Some(Reason::StaleAttempt) && seen("attempt") > self.shown().attempt {
            self.change().attempt = seen("attempt");
            if self.save().await.is_err() {
                return None;
            }
        }
        // A target that has no place is there, and has one later.
        self.no_place = state == MigrationState::Pending && reason == Some(Reason::TooManyMigrations);
        let unanswered = state == MigrationState::Pending && !self.no_place;
        let done = match reason {
            // Where nothing was accepted, another migration has this ID there, and no operator can decide about it here. Nor can one about an end.
            Some(Reason::Superseded) if known && !state.is_final() => self.needs_operator(&error).await,
            Some(Reason::StoreChanged) if known => {
                match state {
                    // Nothing can have been committed there, and nothing of it is left.
                    MigrationState::Cancelling => self.discarded("").await,
                    MigrationState::Completed | MigrationState::Cancelled | MigrationState::Failed => {
                        self.told()
                    }
                    _ => self.needs_operator(&error).await,
                }
            }
            // A target that never accepted it, and cannot be told, forgets it by itself.
            _ if state.is_final()
                && !known
                && (!error.is_retryable() || self.began.elapsed() >= self.limits.accept_timeout) =>
            {
                self.told()
            }
            _ if matches!(state, MigrationState::Committing | MigrationState::Cancelling)
                || state.is_final() =>
            {
                if another_node(&error) {
                    self.change().task().error = Some(kept(&error));
                }
                self.show();
                return Some(self.wait_after(&error));
            }
            Some(Reason::LogLost) => self.copy_again(error.message()).await,
            Some(Reason::StaleCopy) => {
                let progress = self.change();
                progress.copy = progress.copy.max(seen("copy"));
                self.copy_again("the target has a later copy than this source knew of").await
            }
            _ if unanswered && self.began.elapsed() >= self.limits.accept_timeout => {
                let address = &self.shown().target_address;
                let waited = self.limits.accept_timeout.as_millis();
                let text = format!(
                    "{} at {address} did not accept within {waited} ms: {error}",
                    self.spec.target_node
                );
                self.fail(&Reason::TargetUnreachable.error(text)).await
            }
            // What was accepted waits for an operator to put it right: a certificate, a record at the target, an address at which another node answers for now.
            _ if error.is_retryable()
                || (known
                    && (error.is_renewable()
                        || reason == Some(Reason::SlotsQuarantined)
                        || another_node(&error))) =>
            {
                let wait = self.wait_after(&error);
                self.change().task().error = Some(kept(&error));
                self.show();
                // Only as long as it may still be accepted in time.
                let left = self.limits.accept_timeout.saturating_sub(self.began.elapsed());
                return Some(if unanswered { wait.min(left) } else { wait });
            }
            _ => self.fail(&error).await,
        };
        // Stopping is seen by whoever looks next.
        let _ = done;
        None
    }

    /// What a stream leaves behind: READY no more, and a log that nobody reads. Nor does anybody slow writers for a target that may be
    /// away for long: behind the cap the log is given up rather than the disk. The next stream finds that out, and the next copy begins.
    async fn without_stream(&mut self) {
        if !self.in_transfer() {
            return;
        }
        if self.state() == MigrationState::Ready {
            // Saved with the next attempt; a source that restarts does the same.
            self.change().enter(MigrationState::CatchingUp);
        }
        let mut log = *self.inner.source.watch_log(&self.id).borrow();
        if log.bytes > self.limits.log_bytes_cap {
            tracing::warn!(migration_id = %self.id, bytes = log.bytes, "the change log has outgrown its cap: it is dropped, and the next copy begins");
            match self.inner.source.release_changes(&self.id, log.head_seq).await {
                Ok(()) => log = *self.inner.source.watch_log(&self.id).borrow(),
                Err(error) => self.change().incident(&error),
            }
        }
        self.show_lag(&log, log.age_ms());
        let task = self.change().task();
        (task.bytes_per_second, task.eta_ms) = (None, None);
        self.converges();
    }

    /// Nobody is too fast for the target any more, or for now.
    fn converges(&mut self) {
        let progress = self.change();
        progress.not_converging = false;
        progress.not_converging_since_unix_ms = None;
    }

    /// There is no log any more, and nothing to send.
    fn nothing_is_left(&mut self) {
        self.converges();
        let progress = self.change();
        progress.lag = None;
        progress.log_bytes = 0;
        progress.complete_deadline_unix_ms = None;
        let task = progress.task();
        (task.bytes_per_second, task.eta_ms) = (None, None);
    }

    /// Shows how far the target is behind.
    pub(super) fn show_lag(&mut self, log: &LogState, age_ms: u64) {
        let cap = self.limits.log_bytes_cap;
        let progress = self.change();
        (progress.log_bytes, progress.log_bytes_cap) = (log.bytes, cap);
        progress.lag =
            Some(MigrationLag { entries: Some(log.entries), bytes: Some(log.bytes), age_ms: Some(age_ms) });
    }

    fn wait_after(&mut self, error: &Error) -> Duration {
        let retryable = if error.is_retryable() {
            error.clone()
        } else {
            // The outcome has to be found out, whatever the target answers.
            Error::new(CommonReason::Unavailable, error.message())
        };
        let wait = self.backoff.next(&retryable).unwrap_or(Duration::from_secs(10));
        // Clients wait for the answer.
        if self.state() == MigrationState::Committing { wait.min(COMMITTING_PAUSE) } else { wait }
    }

    /// Closes the books of the freeze that lasts, if one does.
    pub(super) fn end_freeze(&mut self, outcome: FreezeOutcome, error: Option<&Error>) {
        let progress = self.change();
        let Some(freeze) = progress.freezes.last_mut().filter(|freeze| freeze.freeze_ms.is_none()) else {
            return;
        };
        let lasted = now_unix_ms().saturating_sub(freeze.started_unix_ms);
        freeze.freeze_ms = Some(lasted);
        if freeze.commit_ms == 0 && matches!(outcome, FreezeOutcome::Committed | FreezeOutcome::Fenced) {
            // The outcome was found out on a later stream, or by a later process.
            freeze.commit_ms = lasted.saturating_sub(freeze.drain_ms + freeze.flush_ms + freeze.prepare_ms);
        }
        freeze.set_outcome(outcome);
        freeze.error = error.map(kept);
        progress.max_freeze_ms = progress.max_freeze_ms.max(lasted);
    }

    /// Closes the books of a freeze that an earlier process died in. Nothing is held since; how long it had lasted is not known, but that it was no
    /// longer than it might.
    pub(super) fn lose_freeze(&mut self) {
        let most = millis(self.limits.freeze_timeout);
        let lasting = self.change().freezes.last_mut().filter(|freeze| freeze.freeze_ms.is_none());
        if let Some(freeze) = lasting {
            freeze.freeze_ms = Some(now_unix_ms().saturating_sub(freeze.started_unix_ms).min(most));
            freeze.set_outcome(FreezeOutcome::Interrupted);
        }
    }

    /// How long writers were slowed in all, in milliseconds.
    pub(super) fn writers_slowed_ms(&self) -> u64 {
        self.slowed_before.saturating_add(self.inner.source.writers_slowed_ms(&self.id))
    }

    /// Books a freeze that begins.
    pub(super) fn begin_freeze(&mut self) -> u64 {
        let progress = self.change();
        progress.freeze_count += 1;
        let freeze = FreezeAttempt {
            freeze: progress.freeze_count,
            attempt: progress.attempt,
            started_unix_ms: now_unix_ms(),
            outcome: FreezeOutcome::Running.into(),
            ..FreezeAttempt::default()
        };
        let number = freeze.freeze;
        progress.add_freeze(freeze);
        number
    }

    pub(super) fn open_gate(&mut self) {
        if let (Some(hold), Some(freeze)) =
            (&self.hold, self.record.progress.as_mut().and_then(|p| p.freezes.last_mut()))
        {
            freeze.held_requests = freeze.held_requests.max(hold.held_requests());
        }
        self.hold = None;
    }

    /// The migration has ended and the target knows: into the history.
    async fn finish(mut self) {
        (self.hold, self.range) = (None, None);
        let progress = self.shown().clone();
        // Whoever asks gets the end, whenever the history takes it.
        self.inner.ended(&self.id);
        self.commands.close();
        while self.commands.try_recv().is_ok() {}
        let mut backoff = Backoff::default().start();
        while let Err(error) = self.inner.journal.finish(&self.id, self.spec.slots, &progress).await {
            tracing::error!(migration_id = %self.id, error = %error, "the journal cannot be written");
            let wait = backoff.next(&error).unwrap_or(Duration::from_secs(10));
            tokio::select! {
                () = self.inner.stopping.cancelled() => break,
                () = tokio::time::sleep(wait) => {}
            }
        }
        // It ends with the task.
        self.tracker.update(|shown| *shown = progress);
    }
}

/// The node stops, or the store panicked: what is undecided stays held, so that this process serves it no more.
impl<S: MigrationSource, D: Dial> Drop for Task<S, D> {
    fn drop(&mut self) {
        if let Some(hold) = self.hold.take() {
            // Of a node that goes on, nobody gets the slots either.
            let range = self.range.take().filter(|_| !self.inner.stopping.is_cancelled());
            self.inner.keep_held(hold, range);
        }
    }
}
