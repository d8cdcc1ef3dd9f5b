//! The stream that moves data: rows and changes at the same time, until the lag allows to cut over.

use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Duration;

use proto_common::clock::{millis, now_unix_ms};
use proto_common::error::Error;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::task::AbortOnDropHandle;

use super::dial::Dial;
use super::link::{Link, Outbound, Said, unexpected};
use super::pressure::{LOOK, Pressure};
use super::pump::{Pump, Sent, Wish};
use super::task::{Halt, Task};
use crate::Reason;
use crate::progress::kept;
use crate::source::{ChangeCursor, LogState, MigrationSource};
use crate::v1::transfer_migration_data_request::{Frame, Heartbeat, Purpose};
use crate::v1::{MigrationDecision, MigrationGate, MigrationState};

/// How often the task looks at where it is.
const TICK: Duration = Duration::from_millis(10);

/// A sign of life at least this often.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// An accepted stream with its pump.
pub(super) struct Running {
    pub(super) link: Link,
    pub(super) out: Outbound,
    pub(super) wish: watch::Sender<Wish>,
    pub(super) sent: watch::Receiver<Sent>,
    pub(super) log: watch::Receiver<LogState>,
    pump: AbortOnDropHandle<Error>,
    digests: Option<AbortOnDropHandle<Result<(), Error>>>,
    pub(super) pressure: Pressure,
    /// What earlier streams had counted.
    before: Counted,
    released: u64,
    heartbeat: Instant,
    looked: Instant,
}

#[derive(Debug, Clone, Copy)]
struct Counted {
    wire_bytes: u64,
    changes: u64,
    change_bytes: u64,
    throttled_ms: u64,
}

impl<S: MigrationSource, D: Dial> Task<S, D> {
    /// One stream that moves data. Comes back by an error or a change of state; `Ok` when all is done and told.
    pub(super) async fn transfer(&mut self) -> Result<(), Halt> {
        self.open_log().await?;
        let was_known = self.shown().peer.is_some();
        let link = self.open(Purpose::Transfer).await?;
        let accepted = link.accepted.clone();
        match accepted.decision() {
            MigrationDecision::Undecided => {}
            MigrationDecision::Committed => {
                self.hand_over(&accepted.committed.unwrap_or_default()).await?;
                return self.forget(link).await;
            }
            MigrationDecision::Discarded => {
                self.discarded(&accepted.discarded.unwrap_or_default().reason).await?;
                return Err(Halt::Changed);
            }
            MigrationDecision::Unspecified => {
                return Err(unexpected("the target told no decision that this version knows").into());
            }
        }
        if !accepted.known && was_known && self.state() != MigrationState::Pending {
            drop(link);
            self.copy_again("the target had no record of this migration any more").await?;
            return Err(Halt::Changed);
        }
        let Some(resume) = accepted.resume else {
            return Err(unexpected("the target does not say where to go on").into());
        };
        if resume.copy != self.shown().copy {
            return Err(unexpected("the target goes on with another copy than that of the header").into());
        }
        self.go_on_with_log(resume.through_seq).await?;
        self.wished_rate = accepted.max_bytes_per_second.and_then(NonZeroU64::new);
        self.limit_rate();
        let progress = self.change();
        progress.durable_seq = progress.durable_seq.max(resume.through_seq);
        let task = progress.task();
        (task.items_done, task.bytes_done) = (resume.staged_keys, resume.staged_bytes);
        task.error = None;
        let state = if resume.copied { MigrationState::CatchingUp } else { MigrationState::Copying };
        self.enter(state, MigrationGate::Open).await?;

        let mut running = self.start_pump(link, resume.copied, resume.cursor, resume.through_seq);
        let halt = self.follow(&mut running).await;
        self.inner.source.slow_writers(&self.id, Duration::ZERO);
        self.change().connected = false;
        self.show();
        match halt {
            Ok(()) => self.forget(running.link).await,
            Err(halt) => Err(halt),
        }
    }

    fn start_pump(&mut self, link: Link, copied: bool, cursor: bytes::Bytes, through: u64) -> Running {
        let (wish, wishes) = watch::channel(Wish::Run);
        let (sent, latest) = watch::channel(Sent { watermark: through, ..Sent::default() });
        let log = self.inner.source.watch_log(&self.id);
        let out = link.outbound();
        let pump = Pump {
            source: Arc::clone(&self.inner.source),
            id: self.id.clone(),
            out: out.clone(),
            wish: wishes,
            acks: link.acks.clone(),
            log: log.clone(),
            log_bytes_cap: self.limits.log_bytes_cap,
            rate: self.rate.clone(),
            page_bytes: self.inner.limits.sent_batch_bytes,
            max_batch_bytes: link.accepted.max_batch_bytes,
            rows: (!copied).then_some(cursor),
            changes: ChangeCursor::at(through),
            sent,
        };
        let shown = self.shown();
        let before = Counted {
            wire_bytes: shown.wire_bytes,
            changes: shown.delta_entries,
            change_bytes: shown.delta_bytes,
            throttled_ms: shown.source_throttled_ms,
        };
        Running {
            link,
            out,
            wish,
            sent: latest,
            log,
            pump: AbortOnDropHandle::new(tokio::spawn(pump.run())),
            digests: None,
            pressure: Pressure::default(),
            before,
            released: 0,
            heartbeat: Instant::now(),
            looked: Instant::now(),
        }
    }

    /// Follows the stream. `Ok` when the slots are handed over.
    async fn follow(&mut self, running: &mut Running) -> Result<(), Halt> {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let stopping = self.inner.stopping.clone();
        loop {
            tokio::select! {
                () = stopping.cancelled() => return Err(Halt::Stopping),
                command = self.commands.recv() => match command {
                    Some(command) => self.command(command).await?,
                    None => return Err(Halt::Stopping),
                },
                said = running.link.next() => self.heard(said?).await?,
                ended = &mut running.pump => {
                    return Err(Halt::Failed(ended.unwrap_or_else(|error| {
                        Reason::Internal.error("the pump panicked").caused_by(error)
                    })));
                }
                _ = tick.tick() => {
                    self.look(running).await?;
                    if self.may_freeze() && self.freeze(running).await? {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// What the target says without being asked.
    pub(super) async fn heard(&mut self, said: Said) -> Result<(), Halt> {
        match said {
            Said::Discarded(discarded) => {
                self.discarded(&discarded.reason).await?;
                Err(Halt::Changed)
            }
            // Answers to a freeze that was given up.
            Said::Prepared(_) | Said::Refused(_) => Ok(()),
            Said::Committed(_) | Said::Forgotten => {
                Err(unexpected("the target answered what it was not asked").into())
            }
        }
    }

    /// Brings the progress up to date, and the state with it.
    async fn look(&mut self, running: &mut Running) -> Result<(), Halt> {
        let ack = *running.link.acks.borrow();
        let sent = *running.sent.borrow();
        let log = *running.log.borrow();
        let now = Instant::now();
        if ack.durable_seq > running.released {
            running.released = ack.durable_seq;
            // Something arrived: the next break is a new one.
            self.backoff.reset();
            let (source, id) = (Arc::clone(&self.inner.source), self.id.clone());
            self.meanwhile(async move { source.release_changes(&id, ack.durable_seq).await }).await??;
        }
        let age = log.age_ms();
        self.count(running, &sent, &log, age, now);
        if now >= running.heartbeat {
            let every = HEARTBEAT.min(running.link.idle / 3);
            // Where the queue is full, data is on its way.
            if running.out.offer(Frame::Heartbeat(self.heartbeat())) {
                running.heartbeat = now + every;
            }
        }
        let copied = self.state() != MigrationState::Copying;
        if now >= running.looked {
            running.looked = now + LOOK;
            let verdict = running.pressure.look(&log, Duration::from_millis(age), copied, &self.limits);
            if verdict.outgrown {
                // Writers are not slowed, or are too many for that. Nor is the disk given up for them.
                let text = format!(
                    "{} bytes of changes wait for the target, and have been more than {} for long: it takes them slower than they come",
                    log.bytes, self.limits.log_bytes_cap
                );
                return Err(Reason::LogLost.error(text).into());
            }
            self.inner.source.slow_writers(&self.id, verdict.delay);
            let wish = if verdict.hurry { Wish::Hurry } else { Wish::Run };
            running.wish.send_if_modified(|last| std::mem::replace(last, wish) != wish);
            let progress = self.change();
            progress.not_converging = verdict.not_converging;
            progress.not_converging_since_unix_ms = verdict
                .not_converging
                .then(|| progress.not_converging_since_unix_ms.unwrap_or_else(now_unix_ms));
            self.show();
        }
        match self.state() {
            MigrationState::Copying if sent.copied_by > 0 && ack.durable_number >= sent.copied_by => {
                self.enter(MigrationState::CatchingUp, MigrationGate::Open).await?;
            }
            MigrationState::CatchingUp
                if self.digests_are_ready(running).await? && self.lag_allows(&log, age, 1) =>
            {
                self.enter(MigrationState::Ready, MigrationGate::Open).await?;
            }
            MigrationState::Ready if !self.lag_allows(&log, age, 4) => {
                self.enter(MigrationState::CatchingUp, MigrationGate::Open).await?;
            }
            _ => {}
        }
        self.check_deadline().await
    }

    fn count(&mut self, running: &Running, sent: &Sent, log: &LogState, age: u64, now: Instant) {
        let ack = *running.link.acks.borrow();
        let before = running.before;
        let slowed = self.writers_slowed_ms();
        self.show_lag(log, age);
        let copying = self.state() == MigrationState::Copying;
        let progress = self.record.progress.get_or_insert_default();
        progress.wire_bytes = before.wire_bytes + sent.bytes;
        progress.delta_entries = before.changes + sent.changes;
        progress.delta_bytes = before.change_bytes + sent.change_bytes;
        progress.source_throttled_ms = before.throttled_ms + sent.throttled_ms;
        progress.target_throttled_ms = progress.target_throttled_ms.max(ack.throttled_ms);
        progress.writers_slowed_ms = slowed;
        progress.durable_seq = progress.durable_seq.max(ack.durable_seq);
        let task = progress.task();
        if ack.durable_number > 0 {
            if (task.items_done, task.bytes_done) != (ack.staged_keys, ack.staged_bytes) {
                task.last_activity_unix_ms = now_unix_ms();
            }
            (task.items_done, task.bytes_done) = (ack.staged_keys, ack.staged_bytes);
        }
        task.throttled_ms = before.throttled_ms + sent.throttled_ms;
        if copying {
            // Estimates are never lower than what is there.
            task.items_total = task.items_total.map(|total| total.max(task.items_done));
            task.bytes_total = task.bytes_total.map(|total| total.max(task.bytes_done));
            self.meter.measure(now.into_std(), task);
        } else {
            // All is there. It changes with what clients write, up to the end.
            (task.items_total, task.bytes_total) = (Some(task.items_done), Some(task.bytes_done));
            (task.bytes_per_second, task.eta_ms) = (None, None);
        }
    }

    /// The lower one of the caller's limit and the target's wish is kept.
    pub(super) fn limit_rate(&self) {
        let rate = [self.limits.bytes_per_second, self.wished_rate].into_iter().flatten().min();
        self.rate.set_rate(rate);
    }

    pub(super) fn heartbeat(&self) -> Heartbeat {
        let shown = self.shown();
        Heartbeat {
            state: shown.state,
            lag: shown.lag,
            throttled_ms: shown.source_throttled_ms,
            estimated_keys: shown.progress.as_ref().and_then(|progress| progress.items_total),
            estimated_bytes: shown.progress.as_ref().and_then(|progress| progress.bytes_total),
        }
    }

    fn lag_allows(&self, log: &LogState, age: u64, times: u64) -> bool {
        log.entries <= self.limits.ready_lag_entries.saturating_mul(times)
            && age <= millis(self.limits.ready_lag).saturating_mul(times)
    }

    async fn digests_are_ready(&mut self, running: &mut Running) -> Result<bool, Halt> {
        match running.digests.take() {
            None => {
                let (source, id) = (Arc::clone(&self.inner.source), self.id.clone());
                let preparing = tokio::spawn(async move { source.prepare_digests(&id).await });
                running.digests = Some(AbortOnDropHandle::new(preparing));
                Ok(false)
            }
            Some(preparing) if preparing.is_finished() => {
                preparing.await.map_err(|error| {
                    Reason::Internal.error("preparing the digests panicked").caused_by(error)
                })??;
                // Asked again after the next restart of the stream only; it costs nothing where it is done.
                running.digests = Some(AbortOnDropHandle::new(tokio::spawn(async { Ok(()) })));
                Ok(true)
            }
            preparing => {
                running.digests = preparing;
                Ok(false)
            }
        }
    }

    pub(super) async fn check_deadline(&mut self) -> Result<(), Halt> {
        let Some(deadline) = self.shown().complete_deadline_unix_ms else { return Ok(()) };
        if now_unix_ms() < deadline || !self.in_transfer() {
            return Ok(());
        }
        let error = Reason::CompleteDeadline
            .error("the cut-over did not begin to commit in time; the migration follows changes as before");
        let progress = self.change();
        progress.complete_deadline_unix_ms = None;
        progress.task().error = Some(kept(&error));
        progress.incident(&error);
        self.save().await
    }

    /// How long a cut-over that begins now may take to begin to commit, where a caller said so.
    pub(super) fn wanted_within(&self) -> Duration {
        match self.shown().complete_deadline_unix_ms {
            Some(deadline) if !self.spec.auto_complete => {
                Duration::from_millis(deadline.saturating_sub(now_unix_ms()))
            }
            _ => Duration::MAX,
        }
    }

    fn may_freeze(&self) -> bool {
        let wanted = self.spec.auto_complete || self.shown().complete_deadline_unix_ms.is_some();
        wanted && self.state() == MigrationState::Ready && Instant::now() >= self.freeze_after
    }
}
