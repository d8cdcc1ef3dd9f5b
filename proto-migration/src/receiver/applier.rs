//! What a stream brought, applied in the order in which it came: batches, and what the source asks to be done.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proto_common::clock::millis;
use proto_common::error::Error;
use tokio::sync::{Notify, mpsc};
use tokio::time::timeout_at;

use super::Inner;
use super::batch::{Batch, Moves};
use super::hurry::Hurried;
use super::incoming::{Incoming, Slot, guarded};
use super::outcome::discarded;
use super::record::PreparedAt;
use super::session::Answers;
use crate::Reason;
use crate::digest::{SlotDigest, compare};
use crate::failpoint::reached;
use crate::target::{MigrationTarget, Offer, Staged};
use crate::v1::transfer_migration_data_request::Commit;
use crate::v1::transfer_migration_data_response::{Forgotten, Frame as Answer, PrepareRefused, Prepared};
use crate::v1::{MigrationState, SlotMismatch};

/// Batches that are gathered at most, however small they are: what the applier holds beside their bytes is bounded by it. For 1 GiB of rows 16 are as fast.
const GATHERED: usize = 1024;

/// Freezes of one stream that are refused because they come too often. A source waits longer with each that is refused; one that does not would have the record
/// copied and the refusal logged as fast as it sends.
const TOO_OFTEN: u32 = 64;

/// Something to do.
#[derive(Debug)]
pub(super) enum Work {
    Batch(Batch),
    Prepare(Wanted),
    Release(u64),
    Commit(Commit),
    Discard(String),
    Forget,
}

/// A `Prepare` whose fields were checked.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) at: PreparedAt,
    pub(super) digests: Vec<SlotDigest>,
    pub(super) asked: Instant,
    /// The source gave it up meanwhile.
    pub(super) released: Arc<AtomicBool>,
    /// The store hurries until this is dropped.
    pub(super) hurried: Hurried,
}

/// How far the applier is.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Done {
    /// Last batch that is durable.
    pub(super) number: u64,
    /// Last one of these that clients of the source wait for.
    pub(super) urgent: u64,
    /// Payload bytes that are.
    pub(super) bytes: u64,
    pub(super) durable_seq: u64,
    pub(super) staged: Staged,
    pub(super) state: MigrationState,
    /// `Prepare` was refused up to this freeze.
    pub(super) refused: u64,
}

/// [`Done`], for the reader to look at.
#[derive(Debug, Default)]
pub(super) struct Flow {
    done: Mutex<Done>,
    pub(super) changed: Notify,
}

impl Flow {
    pub(super) fn done(&self) -> Done {
        *self.lock()
    }

    fn lock(&self) -> MutexGuard<'_, Done> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Done)) {
        change(&mut self.lock());
        self.changed.notify_one();
    }

    pub(super) fn follow(&self, incoming: &Incoming) {
        self.change(|done| {
            done.durable_seq = incoming.record.kept.through_seq;
            done.staged = incoming.staged;
            done.state = incoming.state();
        });
    }
}

pub(super) struct Applier<T: MigrationTarget> {
    pub(super) inner: Arc<Inner<T>>,
    pub(super) slot: Arc<Slot>,
    pub(super) attempt: u64,
    pub(super) flow: Arc<Flow>,
    pub(super) answers: Answers,
    /// Freezes that came too often.
    pub(super) too_often: AtomicU32,
}

impl<T: MigrationTarget> Applier<T> {
    /// Does all that is queued. True when the end frame of the stream was answered.
    pub(super) async fn run(self, mut queue: mpsc::Receiver<Work>) -> Result<bool, Error> {
        let (mut next, limits) = (None, &self.inner.limits);
        // Of the next round of batches that nobody waits for.
        let mut due = tokio::time::Instant::now();
        loop {
            let work = match next.take() {
                Some(work) => work,
                None => match queue.recv().await {
                    Some(work) => work,
                    None => return Ok(false),
                },
            };
            match work {
                Work::Batch(first) => {
                    let mut bytes = first.held();
                    let mut waited_for = first.is_waited_for();
                    let mut batches = vec![first];
                    while next.is_none() && bytes < limits.apply_bytes && batches.len() < GATHERED {
                        let more = match queue.try_recv() {
                            Ok(more) => Some(more),
                            // A source that is about to run out of credit waits, too.
                            Err(_) if waited_for || bytes >= limits.credit_bytes / 4 => None,
                            Err(_) => timeout_at(due, queue.recv()).await.unwrap_or(None),
                        };
                        match more {
                            Some(Work::Batch(more))
                                if bytes.saturating_add(more.held()) <= limits.apply_bytes =>
                            {
                                bytes += more.held();
                                waited_for |= more.is_waited_for();
                                batches.push(more);
                            }
                            Some(other) => next = Some(other),
                            None => break,
                        }
                    }
                    due = tokio::time::Instant::now() + limits.apply_every;
                    self.apply(batches).await?;
                }
                Work::Prepare(wanted) => self.prepare(wanted).await?,
                Work::Release(freeze) => self.release(freeze).await?,
                Work::Commit(commit) => self.commit(commit).await?,
                Work::Discard(reason) => {
                    self.discard(&reason).await?;
                    return Ok(true);
                }
                Work::Forget => {
                    self.forget().await?;
                    return Ok(true);
                }
            }
        }
    }

    /// The migration, if this attempt may still change it.
    fn mine<'a>(&self, state: &'a mut Option<Incoming>) -> Result<&'a mut Incoming, Error> {
        let incoming = state.as_mut().filter(|incoming| !incoming.doubt).ok_or_else(|| {
            Reason::StorageFailed.error("what the store has of the migration has to be read again")
        })?;
        let current = incoming.record.progress.attempt;
        if current != self.attempt {
            return Err(Reason::Superseded
                .error(format!("attempt {current} has come; this one must stop"))
                .metadata("attempt", current.to_string()));
        }
        Ok(incoming)
    }

    fn receiving<'a>(&self, state: &'a mut Option<Incoming>) -> Result<&'a mut Incoming, Error> {
        let incoming = self.mine(state)?;
        match incoming.state() {
            MigrationState::Receiving => Ok(incoming),
            MigrationState::Cancelled => {
                Err(Reason::MigrationCancelled.error("the migration was cancelled at this node"))
            }
            other => Err(Reason::UnexpectedFrame.error(format!("the migration is {}", other.short_name()))),
        }
    }

    async fn apply(&self, batches: Vec<Batch>) -> Result<(), Error> {
        let mut state = self.slot.state.lock().await;
        let incoming = self.receiving(&mut state)?;
        let mut next = incoming.record.clone();
        let (mut number, mut payload, mut hurried) = (0, 0, None);
        let mut all = Vec::with_capacity(batches.iter().map(|batch| batch.entries.len()).sum());
        for Batch { number: this, payload: bytes, entries, moves, urgent } in batches {
            (number, payload) = (this, payload + bytes);
            hurried = urgent.or(hurried);
            let keys = entries.len() as u64;
            let size = entries.iter().fold(0_u64, |sum, entry| sum.saturating_add(entry.bytes()));
            let progress = &mut next.progress;
            match moves {
                Moves::Copy { cursor, last } => {
                    next.kept.cursor = cursor;
                    next.kept.copied = last;
                    let task = progress.task();
                    task.items_done = task.items_done.saturating_add(keys);
                    task.bytes_done = task.bytes_done.saturating_add(size);
                    if last {
                        (task.items_total, task.bytes_total) = (Some(task.items_done), Some(task.bytes_done));
                        task.total_is_estimate = false;
                    } else {
                        super::attach::estimates(task, false, task.items_total, task.bytes_total);
                    }
                }
                Moves::Watermark(through) => {
                    next.kept.through_seq = through;
                    progress.delta_entries = progress.delta_entries.saturating_add(keys);
                    progress.delta_bytes = progress.delta_bytes.saturating_add(size);
                }
            }
            next.kept.used = true;
            progress.wire_bytes = progress.wire_bytes.saturating_add(bytes);
            progress.task().last_activity_unix_ms = proto_common::clock::now_unix_ms();
            all.extend(entries);
        }
        let record = next.encode();
        reached("apply.before", next.state());
        match guarded(async { self.inner.target.apply(&self.slot.id, all, record).await }).await {
            Ok(staged) => incoming.staged = staged,
            Err(error) => return Err(incoming.failed(error)),
        }
        reached("apply.after", next.state());
        incoming.record = next;
        incoming.show(|_| {});
        self.flow.follow(incoming);
        self.flow.change(|done| {
            done.number = number;
            done.bytes += payload;
            if hurried.is_some() {
                done.urgent = number;
            }
        });
        Ok(())
    }

    async fn prepare(&self, wanted: Wanted) -> Result<(), Error> {
        let freeze = wanted.at.freeze;
        let answer = {
            let mut state = self.slot.state.lock().await;
            let incoming = self.receiving(&mut state)?;
            // Not waited for: writes are held at the source.
            let turn = self.inner.freezes.take(&incoming.record.spec.source_node, Duration::ZERO);
            let prepared = match turn {
                Ok(_) => self.try_prepare(incoming, &wanted).await,
                Err(error) if self.too_often.fetch_add(1, Ordering::Relaxed) >= TOO_OFTEN => {
                    return Err(error);
                }
                Err(error) => Err((error, None)),
            };
            let answer = match prepared {
                Ok(()) => Answer::Prepared(Prepared {
                    freeze,
                    final_seq: wanted.at.final_seq,
                    took_ms: millis(wanted.asked.elapsed()),
                }),
                Err(_) if incoming.doubt => {
                    return Err(Reason::Internal.error("the store panicked while it prepared"));
                }
                Err((error, mismatch)) => {
                    tracing::info!(migration_id = %self.slot.id, freeze, error = %error, "cannot prepare");
                    incoming.show(|progress| {
                        progress.incident(&error);
                        if mismatch.is_some() {
                            progress.mismatch.clone_from(&mismatch);
                        }
                    });
                    self.flow.change(|done| done.refused = freeze);
                    Answer::PrepareRefused(PrepareRefused { freeze, error: Some(error.into()), mismatch })
                }
            };
            self.flow.follow(incoming);
            answer
        };
        drop(wanted.hurried);
        if wanted.released.load(Ordering::Acquire) {
            return Ok(());
        }
        self.answers.send(answer).await
    }

    async fn try_prepare(
        &self,
        incoming: &mut Incoming,
        wanted: &Wanted,
    ) -> Result<(), (Error, Option<SlotMismatch>)> {
        let PreparedAt { final_seq, new_slot_epoch, .. } = wanted.at;
        let (target, id) = (&self.inner.target, &self.slot.id);
        let mut next = incoming.record.clone();
        let slots = next.spec.slots;
        let watermark = next.kept.through_seq;
        if !next.kept.copied || watermark != final_seq {
            let what =
                if next.kept.copied { "the watermark is not final_seq" } else { "the copy is not complete" };
            let error = Reason::NotCaughtUp
                .error(format!("{what}: {watermark} of {final_seq}"))
                .metadata("watermark", watermark.to_string());
            return Err((error, None));
        }
        let plain = |error: Error| (error, None);
        let offer =
            Offer { id, spec: &next.spec, fence: next.kept.fence.map(Into::into), missing_bytes: Some(0) };
        guarded(async { target.admit(&offer).await }).await.map_err(plain)?;
        guarded(async { target.check_epoch(slots, new_slot_epoch).await }).await.map_err(plain)?;
        let digests = guarded(async { target.digests(id).await }).await.map_err(plain)?;
        if let Some(mismatch) = compare(&wanted.digests, &digests) {
            let error = Reason::DigestMismatch
                .error(format!(
                    "{} slots differ at sequence {final_seq}, the first is {}",
                    mismatch.slots_differing, mismatch.slot
                ))
                .metadata("slot", mismatch.slot.to_string());
            return Err((error, Some(mismatch)));
        }
        if wanted.released.load(Ordering::Acquire) {
            return Err(plain(Reason::FreezeTimeout.error("the source gave the freeze up")));
        }
        let hold = guarded(async { Ok(target.hold(slots)) }).await.map_err(plain)?;
        next.kept.prepared = Some(wanted.at);
        next.enter(MigrationState::Prepared);
        self.inner.save(&self.slot, incoming, next).await.map_err(plain)?;
        incoming.hold = Some(hold);
        Ok(())
    }

    async fn release(&self, freeze: u64) -> Result<(), Error> {
        let mut state = self.slot.state.lock().await;
        let incoming = self.mine(&mut state)?;
        if incoming.state() == MigrationState::Prepared
            && incoming.record.kept.prepared.is_some_and(|prepared| prepared.freeze == freeze)
        {
            self.inner.unprepare(&self.slot, incoming).await?;
        }
        self.flow.follow(incoming);
        Ok(())
    }

    async fn commit(&self, commit: Commit) -> Result<(), Error> {
        let committed = {
            let mut state = self.slot.state.lock().await;
            let incoming = self.mine(&mut state)?;
            let prepared = incoming.record.kept.prepared.filter(|prepared| {
                incoming.state() == MigrationState::Prepared
                    && (prepared.attempt, prepared.freeze) == (self.attempt, commit.freeze)
            });
            let Some(prepared) = prepared else {
                return Err(Reason::UnexpectedFrame.field("commit", "came without Prepared of its freeze"));
            };
            if prepared.new_slot_epoch != commit.new_slot_epoch {
                let problem =
                    format!("is {}; {} was prepared", commit.new_slot_epoch, prepared.new_slot_epoch);
                return Err(Reason::InvalidField.field("commit.new_slot_epoch", problem));
            }
            let committed = self.inner.commit(&self.slot, incoming, None).await?;
            self.flow.follow(incoming);
            committed
        };
        self.answers.send(Answer::Committed(committed)).await
    }

    async fn discard(&self, reason: &str) -> Result<(), Error> {
        let answer = {
            let mut state = self.slot.state.lock().await;
            let incoming = self.mine(&mut state)?;
            match incoming.state() {
                MigrationState::Cancelled => discarded(incoming),
                MigrationState::Receiving | MigrationState::Prepared => {
                    if !self.inner.abort_prepared(&self.slot, incoming).await? {
                        return Err(already_committed(incoming));
                    }
                    self.inner.discard(&self.slot, incoming, reason, "", false).await?
                }
                _ => return Err(already_committed(incoming)),
            }
        };
        self.answers.send(Answer::Discarded(answer)).await
    }

    async fn forget(&self) -> Result<(), Error> {
        {
            let mut state = self.slot.state.lock().await;
            let incoming = self.mine(&mut state)?;
            if incoming.state() != MigrationState::Committed {
                let problem = format!("came, but the migration is {}", incoming.state().short_name());
                return Err(Reason::UnexpectedFrame.field("forget", problem));
            }
            self.inner.forget(&self.slot, &mut state).await?;
        }
        self.inner.remove_empty(&self.slot);
        self.answers.send(Answer::Forgotten(Forgotten {})).await
    }
}

pub(super) fn already_committed(incoming: &Incoming) -> Error {
    let epoch = incoming.record.progress.slot_epoch;
    Reason::AlreadyCommitted.error(format!("this node owns the slots already, at slot epoch {epoch}"))
}
