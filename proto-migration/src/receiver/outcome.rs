//! How a migration ends here: the commit, the discard, and what others decided.

use std::time::Duration;

use proto_common::clock::now_unix_ms;
use proto_common::error::Error;

use super::Inner;
use super::incoming::{Incoming, Slot, guarded};
use super::record::Record;
use crate::Reason;
use crate::decisions::Decision;
use crate::failpoint::reached;
use crate::service::shutting_down;
use crate::target::{MigrationTarget, Takeover};
use crate::v1::transfer_migration_data_response::{Committed, Discarded};
use crate::v1::{FreezeAttempt, FreezeOutcome, MigrationProgress, MigrationState};

/// First and longest wait between two tries of a commit.
const COMMIT_BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));

impl<T: MigrationTarget> Inner<T> {
    /// Makes the slots those of this node, as was prepared: tried until it succeeds or the node stops. Requests are held meanwhile.
    ///
    /// `STALE_SLOT_EPOCH` if another owner has become known since: nothing is prepared any more, unless others have
    /// decided that it commits.
    pub(super) async fn commit(
        &self,
        slot: &Slot,
        incoming: &mut Incoming,
        operator: Option<&str>,
    ) -> Result<Committed, Error> {
        let Some(prepared) = incoming.record.kept.prepared else {
            return Err(Reason::Internal.error("nothing is prepared that could be committed"));
        };
        let _committing = slot.committing();
        if self.decisions.is_some() {
            if !incoming.record.kept.deciding {
                // So that a restart knows that there may be a decision.
                let mut next = incoming.record.clone();
                next.kept.deciding = true;
                self.save(slot, incoming, next).await?;
            }
            if self.decide(slot, prepared.attempt, Decision::Commit, true).await? == Decision::Abort {
                self.unprepare(slot, incoming).await?;
                return Err(Reason::StaleAttempt
                    .error(format!("attempt {} was decided not to commit", prepared.attempt))
                    .metadata("attempt", prepared.attempt.to_string()));
            }
        }
        let committed = Committed {
            attempt: prepared.attempt,
            freeze: prepared.freeze,
            slot_epoch: prepared.new_slot_epoch,
            committed_unix_ms: now_unix_ms(),
            resolved_by_operator: operator.is_some(),
        };
        let mut next = incoming.record.clone();
        next.kept.committed = Some(committed);
        next.kept.deciding = false;
        next.progress.slot_epoch = prepared.new_slot_epoch;
        next.progress.resolved_reason = operator.map(str::to_owned);
        next.progress.add_freeze(FreezeAttempt {
            freeze: prepared.freeze,
            attempt: prepared.attempt,
            started_unix_ms: committed.committed_unix_ms,
            held_requests: incoming.hold.as_ref().map_or(0, |hold| hold.held_requests()),
            final_seq: prepared.final_seq,
            outcome: FreezeOutcome::Committed.into(),
            ..FreezeAttempt::default()
        });
        next.enter(MigrationState::Committed);
        let spec = next.spec.clone();
        let takeover = Takeover {
            id: &slot.id,
            slots: spec.slots,
            from: (operator.is_none() && self.decisions.is_none()).then_some(&spec.source_node),
            slot_epoch: prepared.new_slot_epoch,
        };
        reached("take_over.before", next.state());
        let mut wait = COMMIT_BACKOFF.0;
        while let Err(error) = guarded(async { self.target.commit(&takeover, next.encode()).await }).await {
            tracing::error!(migration_id = %slot.id, error = %error, "cannot commit");
            incoming.show(|progress| progress.incident(&error));
            if error.is(Reason::StaleSlotEpoch) && self.decisions.is_none() {
                self.unprepare(slot, incoming).await?;
                return Err(error);
            }
            self.pause(wait).await.inspect_err(|_| incoming.doubt = true)?;
            wait = (wait * 2).min(COMMIT_BACKOFF.1);
        }
        reached("take_over.after", next.state());
        next.progress.incidents.clone_from(&incoming.record.progress.incidents);
        incoming.record = next;
        incoming.doubt = false;
        incoming.release();
        incoming.show(|_| {});
        tracing::info!(migration_id = %slot.id, slot_epoch = committed.slot_epoch, "committed");
        Ok(committed)
    }

    /// Sees to it that what is prepared, if anything, never commits: true. False: it was decided to commit, and is committed.
    pub(super) async fn abort_prepared(&self, slot: &Slot, incoming: &mut Incoming) -> Result<bool, Error> {
        let Some(prepared) = incoming.record.kept.prepared else { return Ok(true) };
        if self.decisions.is_none()
            || self.decide(slot, prepared.attempt, Decision::Abort, false).await? == Decision::Abort
        {
            return Ok(true);
        }
        self.commit(slot, incoming, None).await?;
        Ok(false)
    }

    /// Asks those who decide, where it is not the store itself; with `insist`, until they answer or the node stops.
    async fn decide(
        &self,
        slot: &Slot,
        attempt: u64,
        wish: Decision,
        insist: bool,
    ) -> Result<Decision, Error> {
        let Some(decisions) = &self.decisions else { return Ok(wish) };
        let mut wait = COMMIT_BACKOFF.0;
        loop {
            let asked = guarded(async { decisions.decide(&slot.id, attempt, wish).await });
            let answer = tokio::select! {
                answer = asked => answer,
                () = self.stopping.cancelled() => return Err(shutting_down()),
            };
            match answer {
                Err(error) if insist => {
                    tracing::warn!(migration_id = %slot.id, error = %error, "the decision is not known yet");
                }
                answer => return answer,
            }
            self.pause(wait).await?;
            wait = (wait * 2).min(COMMIT_BACKOFF.1);
        }
    }

    async fn pause(&self, wait: Duration) -> Result<(), Error> {
        tokio::select! {
            () = tokio::time::sleep(wait) => Ok(()),
            () = self.stopping.cancelled() => Err(shutting_down()),
        }
    }

    /// Goes back to RECEIVING and lets the requests go that are held.
    pub(super) async fn unprepare(&self, slot: &Slot, incoming: &mut Incoming) -> Result<(), Error> {
        let mut next = incoming.record.clone();
        next.unprepare();
        self.save(slot, incoming, next).await?;
        incoming.hold = None;
        Ok(())
    }

    /// Ends a migration for good without a commit: durable on return. It is RECEIVING, or PREPARED and decided not to commit.
    pub(super) async fn discard(
        &self,
        slot: &Slot,
        incoming: &mut Incoming,
        reason: &str,
        cancelled_at: &str,
        operator: bool,
    ) -> Result<Discarded, Error> {
        let mut next = incoming.record.clone();
        next.unprepare();
        next.kept.discarded_bytes = incoming.staged.bytes;
        next.kept.cursor.clear();
        reason.clone_into(&mut next.progress.cancel_reason);
        cancelled_at.clone_into(&mut next.progress.cancelled_at_node_id);
        next.progress.resolved_reason = operator.then(|| reason.to_owned());
        next.enter(MigrationState::Cancelled);
        let said = if reason.is_empty() { "cancelled".to_owned() } else { format!("cancelled: {reason}") };
        next.progress.task().error = Some(Reason::MigrationCancelled.error(said).into());
        reached("discard.before", next.state());
        guarded(async { self.target.discard(&slot.id, next.encode()).await })
            .await
            .map_err(|error| incoming.failed(error))?;
        reached("discard.after", next.state());
        incoming.record = next;
        incoming.staged = crate::target::Staged::default();
        incoming.release();
        incoming.unrecorded = true;
        incoming.show(|progress| progress.connected = false);
        self.record_end(slot, incoming).await;
        tracing::info!(migration_id = %slot.id, "discarded");
        Ok(discarded(incoming))
    }

    /// Writes a migration that was cancelled to the history; tried again later where that fails.
    pub(super) async fn record_end(&self, slot: &Slot, incoming: &mut Incoming) {
        let Incoming { record, .. } = &*incoming;
        match self.journal.remember(&record.progress).await {
            Ok(()) => incoming.unrecorded = false,
            Err(error) => {
                tracing::error!(migration_id = %slot.id, error = %error, "the end is not in the history yet");
            }
        }
        if let Some(tracker) = incoming.tracker.take() {
            let last = incoming.record.progress.clone();
            tracker.finish(|shown| *shown = last);
        }
    }

    /// The source knows of the commit: the record goes, the history has it.
    pub(super) async fn forget(&self, slot: &Slot, state: &mut Option<Incoming>) -> Result<(), Error> {
        let Some(incoming) = state.as_mut() else { return Ok(()) };
        let mut last = incoming.record.clone();
        last.progress.connected = false;
        last.enter(MigrationState::Completed);
        // First, so that a crash between the two leaves a record that the source asks to be forgotten again.
        self.journal.remember(&last.progress).await?;
        reached("forget.before", last.state());
        guarded(async { self.target.forget(&slot.id).await }).await?;
        reached("forget.after", last.state());
        if let Some(incoming) = state.take()
            && let Some(tracker) = incoming.tracker
        {
            tracker.finish(|shown| *shown = last.progress);
        }
        Ok(())
    }

    /// Makes `next` the record.
    pub(super) async fn save(
        &self,
        slot: &Slot,
        incoming: &mut Incoming,
        next: super::record::Record,
    ) -> Result<(), Error> {
        reached("record.before", next.state());
        let record = next.encode();
        // Where others decide, what says so has to be as safe as they are.
        let only_prepared = next.state() == MigrationState::Prepared && !next.kept.deciding;
        let saving = async {
            if only_prepared {
                self.target.save_prepared(&slot.id, record).await
            } else {
                self.target.save(&slot.id, record).await
            }
        };
        guarded(saving).await.map_err(|error| incoming.failed(error))?;
        reached("record.after", next.state());
        incoming.record = next;
        incoming.show(|_| {});
        Ok(())
    }
}

/// What is told of a migration that was discarded.
pub(super) fn discarded(incoming: &Incoming) -> Discarded {
    let Record { progress, kept, .. } = &incoming.record;
    Discarded { staged_bytes: kept.discarded_bytes, reason: discard_reason(progress) }
}

/// Why it was discarded, if that was decided here; the source knows its own reasons.
pub(super) fn discard_reason(progress: &MigrationProgress) -> String {
    let here = progress.reporter.as_ref().map_or("", |reporter| &reporter.node_id);
    if progress.cancelled_at_node_id == here { progress.cancel_reason.clone() } else { String::new() }
}
